"""From dense to fast in one call: what comes out, that it is repeatable, and what is left alone."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from sparsegan.compress import Compressed, compress
from sparsegan.layers import SparseProgram
from sparsegan.patterns import BlockPattern, weight_view
from sparsegan.prune import sparsity_report
from sparsegan.report import mean_psnr

pytestmark = pytest.mark.usefixtures("quick")


def generator() -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.ConvTranspose2d(8, 32, 4, bias=False),
            nn.BatchNorm2d(32),
            nn.ReLU(True),
            nn.ConvTranspose2d(32, 32, 4, 2, 1, bias=False),
            nn.BatchNorm2d(32),
            nn.ReLU(True),
            nn.ConvTranspose2d(32, 3, 4, 2, 1),
            nn.Tanh(),
        )
        for module in model:
            if hasattr(module, "weight"):
                nn.init.normal_(module.weight, 0.0, 0.2)
    return model.eval().requires_grad_(False)


def latents(n: int, source: torch.Generator) -> tuple[Tensor]:
    return (torch.randn(n, 8, 1, 1, generator=source),)


UNSEEN = latents(32, torch.Generator().manual_seed(1234))


def run(**settings: object) -> Compressed:
    return compress(generator(), latents, **{"sparsity": 0.5, "steps": 3, **settings})


@pytest.fixture(scope="module")
def result(quick: None) -> Compressed:
    return run()


def test_gives_a_swapped_and_a_pruned_model(result: Compressed):
    assert any(isinstance(module, SparseProgram) for module in result.model.modules())
    assert mean_psnr(result.model(*UNSEEN), result.pruned(*UNSEEN)) > 25  # int8 alone
    report = sparsity_report(result.pruned, UNSEEN)
    assert 1 - sum(r.macs_kept for r in report) / sum(r.macs_dense for r in report) >= 0.5
    assert not any(parametrize.is_parametrized(module) for module in result.pruned.modules())
    assert BlockPattern(4, 4).respected_by(weight_view(result.pruned[3]) != 0)
    assert len(result.history) == 3 and result.seconds > 0


def test_distillation_brings_the_images_back():
    teacher = generator()(*UNSEEN)
    psnr = [mean_psnr(run(steps=steps).pruned(*UNSEEN), teacher) for steps in (0, 20)]
    assert psnr[1] > psnr[0] + 1


def test_the_dense_model_and_the_random_state_stay():
    model = generator()
    before = [tensor.clone() for tensor in model.state_dict().values()]
    state = torch.get_rng_state()
    compress(model, latents, sparsity=0.5, steps=2)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(a, b) for a, b in zip(before, model.state_dict().values(), strict=True))
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_is_repeatable(result: Compressed):
    again, other = run(), run(seed=1)
    weights = [[*each.pruned.state_dict().values()] for each in (result, again, other)]
    assert result.history == again.history != other.history
    assert all(torch.equal(a, b) for a, b in zip(weights[0], weights[1], strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(weights[0], weights[2], strict=True))


def test_pattern_and_dtype_are_obeyed():
    result = run(pattern=BlockPattern(8, 4), dtype="f32", steps=0)
    assert BlockPattern(8, 4).respected_by(weight_view(result.pruned[3]) != 0)
    assert result.history == []
    torch.testing.assert_close(result.model(*UNSEEN), result.pruned(*UNSEEN), rtol=1e-4, atol=1e-4)


def test_tells_how_far_it_is():
    calls = []
    run(progress=lambda *call: calls.append(call))
    assert calls == [
        ("prune", 0, 1),
        ("prune", 1, 1),
        ("distil", 0, 3),
        ("distil", 1, 3),
        ("distil", 2, 3),
        ("distil", 3, 3),
        ("swap", 0, 1),
        ("swap", 1, 1),
    ]


def test_refuses_training_mode_and_negative_steps():
    with pytest.raises(ValueError, match="training mode"):
        compress(generator().train(), latents)
    with pytest.raises(ValueError, match="steps"):
        run(steps=-1)

"""Two processes train to what one does, within rounding."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from sparsegan import parallel

SCRIPT = """
import os
import sys
import torch
from torch import nn
from sparsegan import parallel
from sparsegan.models import VAE, conv_discriminator, dcgan_generator, mlp_generator, vae_encoder
from sparsegan.patterns import BlockPattern
from sparsegan.prune import prune, recover
from sparsegan.prune.during import Sparsifier
from sparsegan.prune.losses import Adversarial, Weighted, l1
from sparsegan.train.gan import Gan, latents
from sparsegan.train.loop import run
from sparsegan.train.vae import Vae

torch.set_num_threads(1)
torch.set_default_dtype(torch.float64)  # so that rounding stays far below what is compared
out = sys.argv[1]


def seeded(build):
    torch.manual_seed(0)
    return build()


def gan(loss, kind=None):
    def sparsify(model, optimiser, inputs):
        return Sparsifier(model, optimiser, BlockPattern(4, 4), 0.5, steps=6, every=2, kind=kind, example_inputs=inputs)

    images = seeded(lambda: torch.rand(16, 1, 16, 16) * 2 - 1)
    models = seeded(lambda: (dcgan_generator(8, (16, 8)), conv_discriminator(1, (8, 16), side=16, spectral=loss == "hinge")))
    task = Gan(*models, latents(images, (8, 1, 1), 8), loss=loss, sparsify=sparsify if kind else None)
    trained = run(task, 6, seed=0, after=task.after)
    return {"history": torch.tensor(trained.history), **task.finished(0).state_dict()}


def vae():
    images = seeded(lambda: torch.rand(16, 1, 16, 16) * 2 - 1)
    model = seeded(lambda: VAE(vae_encoder(4, 16, (8, 8), 5), mlp_generator(4, (16,), image_shape=(1, 16, 16)), 4))
    trained = run(Vae(model, images, batch=8), 6, seed=0)
    return {"history": torch.tensor(trained.history), **model.state_dict()}


def distilled():
    def sample(n, rng):
        return (torch.randn(n, 8, 1, 1, generator=rng),)

    model, teacher = (seeded(lambda: dcgan_generator(8, (16, 8))) for _ in range(2))
    prune(model, BlockPattern(4, 4), 0.5, "l1", layers=["3"])
    # `recover` compares float32.
    adversary = Adversarial(seeded(lambda: conv_discriminator(1, (8,), side=16)).float())
    history = recover(model, teacher, sample, 6, batch=8, loss=Weighted((1.0, l1), (0.1, adversary)))
    return {"history": torch.tensor(history), **model.state_dict(), "critic": adversary.discriminator[0].weight}


with parallel.processes():
    found = {"hinge": gan("hinge"), "wgan-gp": gan("wgan-gp"), "rigl": gan("bce", "rigl"), "vae": vae(), "distilled": distilled()}
    rows = torch.arange(6.0).view(6, 1)
    assert torch.equal(parallel.gather(parallel.share(rows)), rows)
    assert (parallel.from_first(os.getpid) == os.getpid()) == (parallel.rank() == 0)
    if parallel.rank() == 0:
        torch.save({name: {key: value.detach() for key, value in part.items()} for name, part in found.items()}, out)
"""


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, dict[str, torch.Tensor]]]:
    folder = tmp_path_factory.mktemp("parallel")
    (folder / "script.py").write_text(SCRIPT)
    root = str(Path(__file__).parent.parent)
    environment = {**os.environ, "PYTHONPATH": root, "OMP_NUM_THREADS": "1"}
    found = []
    for processes in (1, 2):
        out = folder / f"{processes}.pt"
        start = (
            ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"] if processes == 2 else []
        )
        command = [sys.executable, *start, str(folder / "script.py"), str(out)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr[-3000:]
        found.append(torch.load(out, weights_only=True))
    return found


@pytest.mark.parametrize("system", ["hinge", "wgan-gp", "rigl", "vae", "distilled"])
def test_two_processes_give_the_result_of_one(results: list, system: str):
    one, two = (result[system] for result in results)
    assert one.keys() == two.keys()
    # What `recover` compares is float32, and Adam passes small differences on.
    rtol, atol = (1e-3, 1e-4) if system == "distilled" else (1e-6, 1e-9)
    for name, value in one.items():
        torch.testing.assert_close(
            two[name], value, rtol=rtol, atol=atol, msg=lambda text, name=name: f"{name}: {text}"
        )


def test_one_process_changes_nothing():
    rows = torch.arange(6.0)
    assert parallel.world() == 1 and parallel.rank() == 0
    assert torch.equal(parallel.share(rows), rows)
    assert parallel.gather(rows) is rows and parallel.mean(rows) is rows
    assert parallel.from_first(lambda: rows) is rows
    module = torch.nn.BatchNorm2d(3)
    assert parallel.wrapped(module) is module
    with parallel.shared_norms(module):
        assert type(module) is torch.nn.BatchNorm2d


def test_a_batch_that_cannot_be_shared(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(parallel, "world", lambda: 2)
    with pytest.raises(ValueError, match="a batch of 5 cannot be shared by 2 processes"):
        parallel.share(torch.zeros(5))


def test_shared_statistics_of_large_values(monkeypatch: pytest.MonkeyPatch):
    # E[x^2] - E[x]^2 in float32 would be wrong by more than the variance here, and might be below zero.
    x = 300 + 0.01 * torch.randn(64, 2, 8, 8, generator=torch.Generator().manual_seed(0))
    wanted = torch.nn.BatchNorm2d(2).double()(x.double()).float()
    monkeypatch.setattr(parallel, "_sum", lambda x: x)
    norm = torch.nn.BatchNorm2d(2)
    norm.__class__ = parallel._SharedBatchNorm
    torch.testing.assert_close(norm(x), wanted, rtol=0, atol=0.02)


def test_shared_statistics_of_bfloat16_are_float32(monkeypatch: pytest.MonkeyPatch):
    x = (3 + torch.randn(16, 2, 8, 8, generator=torch.Generator().manual_seed(0))).bfloat16()
    plain, norm = torch.nn.BatchNorm2d(2), torch.nn.BatchNorm2d(2)
    wanted = plain(x)
    monkeypatch.setattr(parallel, "_sum", lambda x: x)
    norm.__class__ = parallel._SharedBatchNorm
    torch.testing.assert_close(norm(x), wanted)
    torch.testing.assert_close(norm.running_mean, plain.running_mean)
    torch.testing.assert_close(norm.running_var, plain.running_var)

"""Generators, discriminators and auto-encoders of the generative systems: what they compute, and that they can be swapped."""

from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from sparsegan.checkpoint import load, save
from sparsegan.compress import compress
from sparsegan.graph import capture, lookup, lower
from sparsegan.models import (
    VAE,
    ConditionalGenerator,
    ConvVAE,
    GRUCell,
    LSTMCell,
    RecurrentDecoder,
    RecurrentEncoder,
    UNetGenerator,
    conv_discriminator,
    cyclegan_generator,
    mlp_discriminator,
    mlp_generator,
    patch_discriminator,
    seeded,
    stem_generator,
    vae_decoder,
    vae_encoder,
)
from sparsegan.patterns import BlockPattern
from sparsegan.prune import make_permanent, prune, sparsity_report
from sparsegan.prune.trace import prunable_layers
from sparsegan.swap import SwapConfig, explain, swap_to_sparse

SWAPPED = SwapConfig(dtype="f32", min_speedup=0)


@pytest.fixture(autouse=True)
def hardly_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sparsegan.swap.exchange.MODEL_BUDGET", 0.0)
    monkeypatch.setattr("sparsegan.swap.single.LAYER_BUDGET", 0.0)


def small_conditional(side: int = 8) -> ConditionalGenerator:
    return ConditionalGenerator(classes=5, latent=12, embedding=4, stem=16, side=side, widths=(12, 8))


def latents_and_labels(n: int) -> tuple[Tensor, Tensor]:
    return torch.randn(n, 12), torch.arange(n) % 5


# Shapes.


# name: (how to build a small one, shapes of its inputs, shape of its output)
SMALL = {
    "mlp, images": (partial(mlp_generator, 5, 8, image_shape=(3, 4, 6)), [(5,)], (3, 4, 6)),
    "mlp 128-128": (partial(mlp_generator, 5, (9, 7), image_shape=(1, 28, 28)), [(5,)], (1, 28, 28)),
    "stem 28": (partial(stem_generator, 5, 8, 28, (6, 4)), [(5,)], (1, 28, 28)),
    "stem 32, colour": (partial(stem_generator, 5, 8, 32, (6, 5, 4), 3), [(5,)], (3, 32, 32)),
    "unet 32": (partial(UNetGenerator, 4, 5, 3), [(3, 32, 32)], (3, 32, 32)),
    "cyclegan 32": (partial(cyclegan_generator, 4, 2, 1), [(1, 32, 32)], (1, 32, 32)),
    "convolutions": (partial(conv_discriminator, 3, (4, 6), side=13), [(3, 13, 13)], (1,)),
    "convolutions, spectral": (partial(conv_discriminator, 1, (4,), 3, 8, True), [(1, 8, 8)], (1,)),
    "discriminating mlp": (partial(mlp_discriminator, (1, 4, 6), (8, 7)), [(1, 4, 6)], (1,)),
    "patches": (partial(patch_discriminator, 2, 4, 2), [(2, 32, 32)], (1, 6, 6)),
    "encoder 28": (lambda: vae_encoder(6, 28, (4, 6, 8), 5), [(1, 28, 28)], (12,)),
    "encoder 32, colour": (lambda: vae_encoder(6, 32, (4, 6), 5, 3), [(3, 32, 32)], (12,)),
    "gru encoder": (lambda: RecurrentEncoder(6, 15, 8), [(3, 7, 5)], (12,)),
    "lstm encoder": (lambda: RecurrentEncoder(6, 15, 8, "lstm"), [(3, 7, 5)], (12,)),
    "gru decoder": (partial(RecurrentDecoder, 6, (3, 7, 5), 8), [(6,)], (3, 7, 5)),
    "lstm decoder": (partial(RecurrentDecoder, 6, (3, 7, 5), 8, "lstm"), [(6,)], (3, 7, 5)),
}


@pytest.mark.parametrize("name", SMALL)
def test_each_image_depends_on_its_own_input_and_all_layers_count(name: str) -> None:
    build, input_shapes, output_shape = SMALL[name]
    model = seeded(build, 1)
    inputs = [torch.randn(3, *shape) for shape in input_shapes]
    outputs = model(*inputs)
    assert outputs.shape == (3, *output_shape)
    assert bool(outputs.isfinite().all())
    torch.testing.assert_close(outputs[1:], model(*(x[1:] for x in inputs)))
    assert not torch.allclose(outputs[1:], outputs[:2])
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    model(*inputs).square().sum().backward()
    assert all(p.grad is not None and bool(p.grad.any()) for p in model.parameters() if p.dim() > 1)


@pytest.mark.parametrize("name", [name for name in SMALL if len(SMALL[name][2]) == 3 and name != "patches"])
def test_images_are_in_range(name: str) -> None:
    build, input_shapes, _ = SMALL[name]
    assert seeded(build, 1)(*(10 * torch.randn(3, *shape) for shape in input_shapes)).abs().max() <= 1


def test_the_generators_of_the_articles_are_the_defaults() -> None:
    shapes = [tuple(layer.weight.shape) for layer in mlp_generator() if isinstance(layer, nn.Linear)]
    assert shapes == [(1024, 100), (1024, 1024), (1024, 1024), (784, 1024)]
    layers = [layer for layer in stem_generator() if hasattr(layer, "stride")]
    assert [(la.in_channels, la.out_channels, la.kernel_size, la.stride) for la in layers] == [
        (256, 128, (5, 5), (1, 1)),
        (128, 64, (5, 5), (2, 2)),
        (64, 1, (5, 5), (2, 2)),
    ]
    assert stem_generator()[3].unflattened_size == (256, 7, 7)
    assert stem_generator()(torch.randn(2, 100)).shape == (2, 1, 28, 28)


def test_a_stem_that_does_not_double_to_the_side_is_refused() -> None:
    with pytest.raises(ValueError, match="side divides by 4, which 2 widths need; got 30"):
        stem_generator(side=30)


def test_patches_are_as_large_as_those_of_pix2pix() -> None:
    """A score hangs on 16, 34 and 70 pixels each way."""
    for levels, seen in ((1, 16), (2, 34), (3, 70)):
        model = seeded(partial(patch_discriminator, 1, 4, levels), 1)
        image = torch.randn(1, 1, 128, 128, requires_grad=True)
        scores = model(image)
        assert scores.shape[2] == 128 // 2**levels - 2
        scores[0, 0, scores.shape[2] // 2, scores.shape[3] // 2].backward()
        touched = image.grad[0, 0].abs().amax(0).nonzero()
        assert touched.max() - touched.min() + 1 == seen


# Discriminators.


@pytest.mark.parametrize("classes", [None, 4])
def test_spectral_normalisation_bounds_every_layer(classes: int | None) -> None:
    model = conv_discriminator(1, (4, 6), side=8, spectral=True, classes=classes)
    for _ in range(30):  # the power iteration goes on in training mode
        model(torch.randn(2, 1, 8, 8), *([torch.tensor([0, 3])] if classes else []))
    model.eval()
    layers = [m for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear | nn.Embedding)]
    assert len(layers) == (3 if classes is None else 4)
    for layer in layers:
        assert torch.linalg.matrix_norm(layer.weight.flatten(1), 2).item() == pytest.approx(1, abs=0.05)


def test_projection_is_the_formula_of_the_paper() -> None:
    model = seeded(partial(conv_discriminator, 1, (4, 6), side=8, classes=3), 1)
    images, labels = torch.randn(4, 1, 8, 8), torch.tensor([2, 0, 1, 2])
    maps = model.features(images)
    wanted = [
        model.score(maps[i : i + 1])[0, 0]
        + sum(model.embedding.weight[label, c] * maps[i, c].sum() for c in range(6))
        for i, label in enumerate(labels)
    ]
    torch.testing.assert_close(model(images, labels)[:, 0], torch.stack(wanted))
    assert not torch.allclose(model(images, labels), model(images, labels.roll(1)))


def test_dropout_is_there_when_asked_for() -> None:
    assert not any(isinstance(m, nn.Dropout) for m in conv_discriminator().modules())
    assert [m.p for m in conv_discriminator(dropout=0.3) if isinstance(m, nn.Dropout)] == [0.3, 0.3]


def test_an_even_kernel_is_refused() -> None:
    with pytest.raises(ValueError, match="odd number, got 4"):
        conv_discriminator(kernel=4)


# Auto-encoders.


@pytest.mark.parametrize(
    "vae",
    [
        lambda: VAE(vae_encoder(6, 28, (4, 6), 5), mlp_generator(6, (8,), image_shape=(1, 28, 28)), 6),
        lambda: VAE(vae_encoder(6, 32, (4, 6), 5), vae_decoder(6, 8, 8, (8, 4)), 6),
        lambda: VAE(RecurrentEncoder(6, 28, 8), RecurrentDecoder(6, (1, 28, 28), 8), 6),
    ],
    ids=["mlp decoder", "convolutions", "recurrent"],
)
def test_vae_is_any_encoder_with_any_decoder(vae: partial[VAE]) -> None:
    model = seeded(vae, 1)
    side = model.generator()(torch.randn(1, 6)).shape[3]
    images = torch.randn(3, 1, side, side)
    mean, log_variance = model.encode(images)
    assert mean.shape == log_variance.shape == (3, 6)
    torch.testing.assert_close(torch.cat([mean, log_variance], 1), model.encoder(images))
    assert torch.equal(model(images), model.decoder(mean))
    assert model.generator() is model.decoder


def test_the_shipped_vae_is_one_of_them_with_a_prior() -> None:
    model = ConvVAE(5)
    assert isinstance(model, VAE)
    assert {name.split(".")[0] for name in model.state_dict()} == {"encoder", "decoder", "prior"}


@pytest.mark.parametrize(("kind", "cell"), [(nn.GRU, GRUCell), (nn.LSTM, LSTMCell)], ids=["gru", "lstm"])
def test_cells_compute_what_those_of_torch_do(kind: type[nn.Module], cell: type[nn.Module]) -> None:
    theirs, ours = kind(6, 5, batch_first=True), cell(6, 5)
    ours.load_state_dict(
        {
            f"{part}.{name}": getattr(theirs, f"{name}_{abbreviated}h_l0")
            for part, abbreviated in (("input", "i"), ("hidden", "h"))
            for name in ("weight", "bias")
        }
    )
    x = torch.randn(3, 9, 6)
    state = tuple(torch.randn(3, 5) for _ in range(ours.CARRIES))
    first = tuple(part[None] for part in state)
    wanted, _ = theirs(x, first if ours.CARRIES > 1 else first[0])
    for step in range(9):
        state = ours(ours.input(x[:, step]), state)
        torch.testing.assert_close(state[0], wanted[:, step])


@pytest.mark.parametrize("cell", ["gru", "lstm"])
def test_rows_are_read_from_the_top_and_written_in_their_place(cell: str) -> None:
    encoder = seeded(partial(RecurrentEncoder, 4, 5, 8, cell), 1)
    decoder = seeded(partial(RecurrentDecoder, 4, (2, 7, 5), 8, cell), 1)
    images, z = torch.randn(2, 1, 6, 5), torch.randn(2, 4)

    entering = encoder.cell.input(images[:, 0])
    state = (torch.zeros(2, 8),) * encoder.cell.CARRIES
    for y in range(6):
        state = encoder.cell(entering[:, y], state)
    torch.testing.assert_close(encoder(images), encoder.moments(state[0]))
    assert not torch.allclose(encoder(images), encoder(images.flip(2)))

    state = tuple(torch.tanh(decoder.initial(z)).unflatten(1, (-1, 8)).unbind(1))
    made = decoder(z)
    for y in range(7):
        state = decoder.cell(decoder.cell.input(z), state)
        row = torch.tanh(decoder.row(state[0]))
        torch.testing.assert_close(made[:, :, y].flatten(1), row)


def test_another_cell_is_refused() -> None:
    with pytest.raises(ValueError, match="'gru' or 'lstm', got 'elman'"):
        RecurrentDecoder(cell="elman")


def test_a_recurrent_vae_learns() -> None:
    """Bars at one of two heights: the code tells which."""
    images = torch.full((2, 1, 5, 4), -1.0)
    images[0, :, :2], images[1, :, 3:] = 1.0, 1.0
    vae = VAE(RecurrentEncoder(2, 4, 24), RecurrentDecoder(2, (1, 5, 4), 24), 2)
    optimiser = torch.optim.Adam(vae.parameters(), 2e-2)
    for _ in range(60):
        loss = (vae(images) - images).square().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    assert loss < 0.1  # the mean of both has 0.8


# Pruned and swapped.


def _pruned(model: nn.Module, inputs: tuple[Tensor, ...]) -> nn.Module:
    """Half of each layer's blocks are gone."""
    shares = dict.fromkeys(prunable_layers(model), 0.5)
    return make_permanent(prune(model, BlockPattern(4, 4), shares, "l1", inputs))


SWAPPABLE = {
    "mlp": (partial(mlp_generator, 12, (16, 16), image_shape=(1, 8, 8)), (12,)),
    "stem": (partial(stem_generator, 12, 16, 8, (12, 8)), (12,)),
    "vae, mlp decoder": (
        lambda: VAE(vae_encoder(8, 14, (8, 8), 5), mlp_generator(8, (16,), image_shape=(1, 14, 14)), 8),
        (1, 14, 14),
    ),
    "gru": (partial(RecurrentDecoder, 8, (1, 4, 8), 16), (8,)),
    "gru encoder": (partial(RecurrentEncoder, 8, 8, 16), (1, 4, 8)),
    "unet 32": (partial(UNetGenerator, 8, 5), (3, 32, 32)),
    "cyclegan 32": (partial(cyclegan_generator, 8, 2), (3, 32, 32)),
}


@pytest.mark.parametrize("name", SWAPPABLE)
def test_pruned_models_become_programs_that_can_be_saved(name: str, tmp_path: Path) -> None:
    build, shape = SWAPPABLE[name]
    x = torch.randn(3, *shape)
    model = _pruned(seeded(build, 1), (x,))
    swapped = swap_to_sparse(model, SWAPPED, (x,))
    assert explain(swapped).programs >= 1, explain(swapped)
    save(swapped, tmp_path / "model.safetensors")
    for again in (swapped, load(tmp_path / "model.safetensors")):
        torch.testing.assert_close(again(x), model(x), rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(again(x[:1]), model(x[:1]), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("programs", [True, False])
@pytest.mark.parametrize("cell", ["gru", "lstm"])
def test_the_layer_of_all_steps_is_pruned_and_swapped_once(cell: str, programs: bool) -> None:
    z = torch.randn(3, 8)
    model = _pruned(seeded(partial(RecurrentDecoder, 8, (1, 4, 8), 16, cell), 1), (z,))
    rows = {row.name: row for row in sparsity_report(model, (z,))}
    assert rows["cell.hidden"].density == 0.5
    assert rows["cell.hidden"].macs_dense == 3 * 4 * model.cell.hidden.weight.numel()  # 3 images, 4 steps
    config = SwapConfig(dtype="f32", min_speedup=0, programs=programs)
    swapped = swap_to_sparse(model, config, (z,))
    states = {row.name: row.swapped for row in explain(swapped).rows}
    assert states["cell.hidden"], explain(swapped)
    torch.testing.assert_close(swapped(z), model(z), rtol=1e-3, atol=1e-4)


class OneForAll(nn.Module):
    """Images of which each is changed by the same other one."""

    def __init__(self) -> None:
        super().__init__()
        self.own, self.common = nn.Conv2d(4, 8, 3, padding=1), nn.Conv2d(4, 8, 1)

    def forward(self, x: Tensor, one: Tensor) -> Tensor:
        return torch.relu(self.own(x) + self.common(one))


def test_what_has_another_batch_size_is_a_program_of_its_own() -> None:
    model = seeded(OneForAll, 1)
    inputs = torch.randn(3, 4, 5, 5), torch.randn(1, 4, 5, 5)
    lowered = lower(capture(model, inputs))
    assert [layer.in_program for layer in lowered.layers] == [True, True]
    assert len(lowered.programs) == 2
    torch.testing.assert_close(lowered.model(*inputs), model(*inputs), rtol=1e-4, atol=1e-5)


# Class labels.


def test_conditional_generator_listens_to_both_inputs() -> None:
    model = seeded(small_conditional, 1)
    z, labels = latents_and_labels(6)
    images = model(z, labels)
    assert images.shape == (6, 1, 8, 8)
    assert images.abs().max() <= 1
    torch.testing.assert_close(images[2:], model(z[2:], labels[2:]))
    assert not torch.allclose(images, model(z, labels.roll(1)))
    assert not torch.allclose(images, model(z.roll(1, 0), labels))


def test_conditional_generator_is_a_graph_with_a_program(tmp_path: Path) -> None:
    inputs = latents_and_labels(6)
    model = make_permanent(prune(seeded(small_conditional, 1), BlockPattern(4, 4), 0.4, "obd", inputs))
    assert sum(row.macs_kept for row in sparsity_report(model, inputs)) <= 0.6 * sum(
        row.macs_dense for row in sparsity_report(model, inputs)
    )
    swapped = swap_to_sparse(model, SWAPPED, inputs)
    assert explain(swapped).programs >= 1, explain(swapped)
    save(swapped, tmp_path / "model.safetensors")
    other = torch.randn(4, 12), torch.tensor([4, 4, 0, 2])
    for again in (swapped, load(tmp_path / "model.safetensors")):
        torch.testing.assert_close(again(*other), model(*other), rtol=1e-3, atol=1e-4)
        for hostile in (-1, 5, 2**62, -(2**62)):
            with pytest.raises(IndexError, match=f"from 0 to 4, got some from .*{hostile}"):
                again(torch.randn(2, 12), torch.tensor([3, hostile]))
        with pytest.raises(RuntimeError, match="indices"):
            again(torch.randn(2, 12), torch.tensor([0.0, 1.0]))


def test_int8_conditional_generator_keeps_its_images() -> None:
    inputs = latents_and_labels(10)
    model = seeded(small_conditional, 1)
    swapped = swap_to_sparse(model, SwapConfig(min_speedup=0), inputs)
    assert explain(swapped).psnr >= 40
    assert (swapped(*inputs) - model(*inputs)).abs().max() < 0.1


@pytest.mark.parametrize("hostile", [-1, 5, 2**62])
def test_labels_that_are_no_class_are_told(hostile: int) -> None:
    with pytest.raises(IndexError, match=f"from 0 to 4, got some from .*{hostile}"):
        small_conditional()(torch.randn(2, 12), torch.tensor([3, hostile]))


@pytest.mark.parametrize(
    ("weight", "indices"),
    [
        (torch.zeros(4), torch.tensor([0])),
        (torch.zeros(0, 3), torch.tensor([0])),
        (torch.zeros(4, 3), torch.tensor([0], dtype=torch.uint8)),
        (torch.zeros(()), torch.tensor([0])),
        (torch.zeros(4, 3), torch.tensor([-1], dtype=torch.int32)),
        (torch.zeros(4, 3).T, torch.tensor([[3]])),
    ],
)
def test_lookups_of_files_refuse_what_does_not_fit(weight: Tensor, indices: Tensor) -> None:
    with pytest.raises((IndexError, RuntimeError)):
        lookup(weight, indices)


def test_a_table_is_not_looked_up_in_a_program() -> None:
    lowered = lower(capture(seeded(small_conditional, 1), latents_and_labels(4)))
    assert len(lowered.programs) == 1
    assert all(layer.in_program for layer in lowered.layers), lowered.layers


@pytest.mark.parametrize("method", ["blocks", "channels"])
def test_conditional_generator_can_be_compressed(method: str, quick: None) -> None:
    model = seeded(partial(ConditionalGenerator, 5, 12, 4, 48, 8, (48, 32)), 1)
    result = compress(
        model, latents_and_labels(10), sparsity=0.4, method=method, steps=2, perceptual=None, seed=1
    )
    images = result.model(*latents_and_labels(4))
    assert images.shape == (4, 1, 8, 8)
    assert result.report["removed"] > 0.3, result.report


def test_a_spectrally_normalised_discriminator_can_be_pruned() -> None:
    model = conv_discriminator(1, (8, 16), side=8, spectral=True).eval()
    prune(model, BlockPattern(4, 4), {"2": 0.5}, "l1", (torch.randn(4, 1, 8, 8),))
    assert (model[2].weight == 0).float().mean() == 0.5
    model.train()(torch.randn(2, 1, 8, 8)).sum().backward()
    assert all(p.grad is not None for p in model.parameters())

"""Folding BatchNorm and finding activations: outputs stay, and whose consumers are unknown is left alone."""

import pytest
import torch
from torch import nn

from sparsegan.fuse import fold_batch_norm, following_activations, straight_runs, with_weight


def trained_norm(norm, seed=0):
    """A norm with statistics and weights that are not the initial ones, in eval mode."""
    generator = torch.Generator().manual_seed(seed)
    for name in ("running_mean", "weight", "bias"):
        if (tensor := getattr(norm, name)) is not None:
            tensor.data.normal_(generator=generator)
    norm.running_var.uniform_(0.5, 2.0, generator=generator)
    return norm.eval()


LAYERS = [
    (nn.Linear(6, 8), nn.BatchNorm1d(8), (5, 6)),
    (nn.Linear(6, 8, bias=False), nn.BatchNorm1d(8, affine=False), (5, 6)),
    (nn.Conv2d(6, 8, 3, groups=2), nn.BatchNorm2d(8), (2, 6, 5, 5)),
    (nn.ConvTranspose2d(6, 8, 4, 2, 1, bias=False), nn.BatchNorm2d(8, eps=0.1), (2, 6, 5, 5)),
    (nn.ConvTranspose2d(6, 8, 3, 2, 1, 1, groups=2, dilation=2), nn.BatchNorm2d(8), (2, 6, 5, 5)),
    (nn.Conv2d(6, 8, 3, padding="same", padding_mode="reflect"), nn.BatchNorm2d(8), (2, 6, 5, 5)),
]


@torch.no_grad()
@pytest.mark.parametrize("layer, norm, shape", LAYERS, ids=[str(layer) for layer, *_ in LAYERS])
def test_folding_keeps_the_outputs_names_and_zeros(layer, norm, shape):
    layer.weight.data[:, 0] = 0
    model = nn.Sequential(layer, trained_norm(norm), nn.ReLU()).eval()
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    wanted = model(x)
    before = [parameter.clone() for parameter in layer.parameters()]
    assert fold_batch_norm(model) == [("0", "1")]
    assert isinstance(model[1], nn.Identity) and type(model[0]) is type(layer)
    torch.testing.assert_close(model(x), wanted)
    assert (model[0].weight[:, 0] == 0).all()
    # The layer was exchanged, not changed: it may be shared with the caller's model.
    assert all(torch.equal(a, b) for a, b in zip(before, layer.parameters(), strict=True))


@torch.no_grad()
def test_two_norms_and_an_identity_between():
    parts = [
        nn.Conv2d(3, 4, 1),
        nn.Identity(),
        trained_norm(nn.BatchNorm2d(4)),
        trained_norm(nn.BatchNorm2d(4), 1),
    ]
    model = nn.Sequential(*parts).eval()
    x = torch.randn(1, 3, 2, 2, generator=torch.Generator().manual_seed(0))
    wanted = model(x)
    assert fold_batch_norm(model) == [("0", "2"), ("0", "3")]
    torch.testing.assert_close(model(x), wanted)


def conv_norm():
    return nn.Conv2d(3, 4, 1), trained_norm(nn.BatchNorm2d(4))


def test_across_nested_sequentials():
    conv, norm = conv_norm()
    model = nn.Sequential(nn.Sequential(nn.ReLU(), conv), nn.Sequential(norm, nn.Tanh())).eval()
    assert fold_batch_norm(model) == [("0.1", "1.0")]
    found = following_activations(model)
    assert list(found) == ["0.1"] and found["0.1"].name == "1.1" and found["0.1"].activation == "tanh"


class Block(nn.Module):
    """A module with a forward of its own: only its Sequential is understood."""

    def __init__(self, *parts):
        super().__init__()
        self.body = nn.Sequential(*parts)
        self.norm = trained_norm(nn.BatchNorm2d(4))

    def forward(self, x):
        return self.norm(self.body(x))


def test_inside_other_modules():
    model = nn.Sequential(Block(*conv_norm()), nn.ReLU()).eval()
    assert straight_runs(model) == [["0.body.0", "0.body.1"], ["1"]]
    assert fold_batch_norm(model) == [("0.body.0", "0.body.1")]
    assert isinstance(model[0].norm, nn.BatchNorm2d)


class OwnSequential(nn.Sequential):
    """Keeps the forward of nn.Sequential."""


class Skipping(nn.Sequential):
    """Has a forward of its own."""

    def forward(self, x):
        return self[1](x)


def test_subclasses_of_sequential():
    assert fold_batch_norm(OwnSequential(*conv_norm()).eval()) == [("0", "1")]
    assert fold_batch_norm(Skipping(*conv_norm()).eval()) == []


def hooked(module):
    module.register_forward_hook(lambda *_: None)
    return module


def shared_conv():
    conv, norm = nn.Conv2d(4, 4, 1), trained_norm(nn.BatchNorm2d(4))
    return nn.Sequential(conv, norm, conv)


def shared_norm():
    norm = trained_norm(nn.BatchNorm2d(4))
    return nn.Sequential(nn.Conv2d(4, 4, 1), norm, nn.Conv2d(4, 4, 1), norm)


def shared_block():
    block = nn.Sequential(*conv_norm())
    return nn.ModuleDict({"a": block, "b": nn.Sequential(block)})


def training_norm():
    conv, norm = conv_norm()
    return nn.Sequential(conv, norm.train())


@pytest.mark.parametrize(
    "model",
    [
        shared_conv(),
        shared_norm(),
        shared_block(),
        training_norm(),
        nn.Sequential(hooked(nn.Conv2d(3, 4, 1)), trained_norm(nn.BatchNorm2d(4))),
        nn.Sequential(nn.Conv2d(3, 4, 1), hooked(trained_norm(nn.BatchNorm2d(4)))),
        nn.Sequential(hooked(nn.Sequential(nn.Conv2d(3, 4, 1))), trained_norm(nn.BatchNorm2d(4))),
        nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), trained_norm(nn.BatchNorm2d(4))),
        nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4, track_running_stats=False).eval()),
        nn.Sequential(nn.Conv2d(3, 4, 1), trained_norm(nn.BatchNorm2d(5))),
        nn.Sequential(nn.Conv2d(3, 4, 1), trained_norm(nn.BatchNorm1d(4))),
        nn.ModuleList(conv_norm()),
    ],
    ids=range(12),
)
def test_left_alone(model):
    assert fold_batch_norm(model) == []
    assert any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in model.modules())


def test_the_inside_of_a_hooked_sequential_is_its_own():
    model = nn.Sequential(hooked(nn.Sequential(*conv_norm())), nn.ReLU()).eval()
    assert fold_batch_norm(model) == [("0.0", "0.1")]
    assert following_activations(model) == {}


@pytest.mark.parametrize(
    "module, activation, slope",
    [
        (nn.ReLU(), "relu", 0.0),
        (nn.LeakyReLU(0.3), "leaky_relu", 0.3),
        (nn.Tanh(), "tanh", 0.0),
        (nn.Sigmoid(), "sigmoid", 0.0),
    ],
)
def test_activations_that_follow(module, activation, slope):
    model = nn.Sequential(nn.Linear(2, 2), nn.Identity(), module, nn.ReLU())
    assert following_activations(model) == {"0": ("2", module, activation, slope)}


def test_activations_that_do_not_count():
    shared = nn.ReLU()
    assert following_activations(nn.Sequential(nn.Linear(2, 2), shared, nn.Linear(2, 2), shared)) == {}
    assert following_activations(nn.Sequential(nn.Linear(2, 2), nn.GELU(), nn.ReLU())) == {}
    assert following_activations(nn.Sequential(nn.ReLU(), nn.Linear(2, 2))) == {}


def test_with_weight_keeps_the_geometry():
    layer = nn.ConvTranspose2d(4, 6, (4, 3), (2, 1), (1, 0), (1, 0), 2, False, (1, 1)).eval()
    plain = with_weight(layer, layer.weight * 2, None)
    assert repr(plain) == repr(layer) and not plain.training
    assert not plain.weight.requires_grad

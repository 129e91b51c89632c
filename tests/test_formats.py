"""The packed weight: what goes in comes out, zeros cost nothing, nothing malformed gets past validate()."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsegan.formats import (
    DTYPES,
    FIELDS,
    PackedWeight,
    as_dict,
    density,
    from_dict,
    nbytes,
    pack,
    tap_order,
    tap_phases,
    unpack,
    validate,
)


def sparse_view(shape, bo, bk, keep, seed, integers=False):
    """A random weight view whose zeros are bo x bk blocks; about the share `keep` of them is kept."""
    generator = torch.Generator().manual_seed(seed)
    o, t, c = shape
    kept = torch.rand(-(-o // bo), t, -(-c // bk), generator=generator) < keep
    mask = kept.repeat_interleave(bo, 0)[:o].repeat_interleave(bk, 2)[:, :, :c]
    if integers:
        return torch.randint(-127, 128, shape, generator=generator) * mask
    return torch.randn(shape, generator=generator) * mask


def block_diagonal(view, groups):
    """The grouped weight [O, T, C/groups] as [O, T, C], by a plain loop."""
    o, t, c = view.shape
    full = view.new_zeros(o, t, c * groups)
    for channel in range(o):
        group = channel // (o // groups)
        full[channel, :, group * c : (group + 1) * c] = view[channel]
    return full


@settings(deadline=None, max_examples=60)
@given(
    group_outputs=st.integers(1, 19),
    groups=st.integers(1, 3),
    taps=st.integers(1, 5),
    group_inputs=st.integers(1, 11),
    bo=st.sampled_from([1, 4, 8]),
    block=st.sampled_from([None, (4, 4), (8, 4), (3, 2), (32, 32)]),
    keep=st.sampled_from([0.0, 0.25, 0.7, 1.0]),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 10),
)
def test_round_trip(group_outputs, groups, taps, group_inputs, bo, block, keep, dtype, seed):
    shape = (group_outputs * groups, taps, group_inputs)
    view = sparse_view(shape, bo, 4, keep, seed, integers=dtype == torch.int8)
    packed = pack(view, dtype, block, groups=groups)
    validate(packed)
    expanded = block_diagonal(view.to(dtype), groups)
    assert torch.equal(unpack(packed), expanded)
    assert packed.block == block if block else packed.block in {(4, 4), (8, 4)}
    # No block of zeros is held, and the sums belong to the channels in their original order.
    assert (packed.values != 0).any(-1).any(-1).all()
    sums = expanded.int().sum(2) if dtype == torch.int8 else torch.zeros(shape[:2], dtype=torch.int32)
    assert torch.equal(packed.tap_sums, sums.int())


def test_layout_by_hand():
    view = torch.zeros(5, 2, 6)
    view[0, 1, 5] = 1.0  # row 0, tap 1, input block 1
    view[3, 0, 0] = 2.0  # row 0, tap 0, input block 0
    view[4, 1, 2] = 3.0  # row 1, tap 1, input block 0
    packed = pack(view, block=(4, 4), scale=torch.arange(5.0), bias=-torch.arange(5.0))
    # Channels 1 and 2 hold nothing; moving them last saves nothing here (channels 0, 3, 4 then fill one row).
    assert packed.row_channels.tolist() == [0, 3, 4, 1, 2, -1, -1, -1]
    assert packed.cols.tolist() == [0, 2, 3]
    assert packed.tap_ptr.tolist() == [0, 1, 3, 3, 3]
    assert packed.values[0, 1, 0] == 2 and packed.values[1, 2, 2] == 3 and packed.values[2, 0, 1] == 1
    assert packed.values.count_nonzero() == 3
    assert packed.scale.tolist() == [0, 1, 2, 3, 4] and packed.bias.tolist() == [0, -1, -2, -3, -4]
    assert (packed.out_channels, packed.rows, packed.in_channels, packed.taps) == (5, 2, 6, 2)
    assert density(packed) == 3 / 8
    assert nbytes(packed) == 3 * 16 * 4 + 3 * 4 + 5 * 4 + 8 * 4 + 10 * 4 + 5 * 4 + 5 * 4


def test_channel_pruning_empties_whole_rows():
    view = torch.randn(32, 9, 16, generator=torch.Generator().manual_seed(0))
    view[1::2] = 0
    packed = pack(view)
    assert density(packed) == 0.5
    assert packed.row_channels.tolist() == [*range(0, 32, 2), *range(1, 32, 2)]


def test_a_dead_channel_does_not_tear_blocks_apart():
    view = sparse_view((64, 9, 64), 8, 4, 0.3, seed=1)
    blocks = pack(view, block=(8, 4)).values.shape[0]
    view[3] = 0  # moving channel 3 away would shift every later block by one channel
    assert pack(view, block=(8, 4)).values.shape[0] <= blocks


def test_block_height_follows_the_executed_work():
    assert pack(sparse_view((64, 9, 64), 8, 4, 0.25, seed=0)).block == (8, 4)
    assert pack(sparse_view((64, 9, 64), 4, 4, 0.25, seed=0)).block == (4, 4)
    assert pack(torch.ones(64, 9, 64)).block == (8, 4)
    assert pack(torch.ones(3, 9, 64)).block == (4, 4)


def test_all_zero_weight():
    packed = pack(torch.zeros(3, 9, 5), torch.int8)
    assert packed.values.shape == (0, packed.block[0], 4) and packed.cols.shape == (0,)
    assert (unpack(packed) == 0).all() and density(packed) == 0


@pytest.mark.parametrize("stride, padding, dilation", [(1, 0, 1), (2, 1, 1), (2, 0, 1), (3, 2, 2), (2, 1, 2)])
def test_tap_order_matches_where_taps_land(stride, padding, dilation):
    kernel = (4, 3)
    pair = ((stride, stride), (padding, padding), (dilation, dilation))
    phases = tap_phases(kernel, *pair)
    for tap, phase in enumerate(phases):
        # One input pixel in the middle, one tap: whichever output pixel lights up has that tap's phase.
        weight = torch.zeros(1, 1, *kernel)
        weight.view(-1)[tap] = 1
        x = torch.zeros(1, 1, 5, 5)
        x[0, 0, 2, 2] = 1
        (y,), (z,) = torch.nn.functional.conv_transpose2d(
            x, weight, stride=stride, padding=padding, dilation=dilation
        )[0, 0].nonzero(as_tuple=True)
        assert phase == y % stride * stride + z % stride
    order = tap_order(kernel, *pair)
    assert sorted(order) == list(range(12))
    assert order == sorted(order, key=lambda tap: (phases[tap], tap))


@pytest.mark.parametrize(
    "view, options, match",
    [
        (torch.ones(3, 4), {}, "view must be a weight"),
        (torch.ones(0, 1, 4), {}, "at least one element"),
        (torch.ones(4, 1, 4), {"dtype": torch.float64}, "dtype must be one of"),
        (torch.ones(4, 1, 4), {"block": (0, 4)}, "block must be two positive numbers"),
        (torch.ones(4, 1, 4), {"groups": 3}, "groups must divide the 4 output channels"),
        (torch.ones(4, 1, 4), {"groups": 0}, "groups must divide"),
        (torch.tensor([[[float("nan")]]]), {}, "NaN or infinite"),
        (torch.tensor([[[float("inf")]]]), {"dtype": torch.int8}, "NaN or infinite"),
        (torch.full((1, 1, 4), 1e39, dtype=torch.float64), {}, "values must be finite"),
        (torch.full((1, 1, 4), 0.5), {"dtype": torch.int8}, "whole numbers in -128..127"),
        (torch.full((1, 1, 4), 200), {"dtype": torch.int8}, "whole numbers in -128..127"),
        (torch.ones(4, 1, 4), {"scale": torch.ones(3)}, "scale must hold 4 numbers"),
        (torch.ones(4, 1, 4), {"scale": torch.full((4,), float("inf"))}, "scale must be finite"),
        (torch.ones(4, 1, 4), {"bias": torch.ones(5)}, "bias must have 4 entries"),
        (torch.ones(4, 1, 4), {"bias": torch.full((4,), float("nan"))}, "bias must be finite"),
        (torch.ones(1, 1, 1).expand(2**20, 1, 2**20), {}, "32 bits"),
        (torch.ones(1, 1, 65537, dtype=torch.int8), {"dtype": torch.int8}, "at most 65536 int8 weights"),
    ],
)
def test_pack_refuses(view, options, match):
    with pytest.raises(ValueError, match=match):
        pack(view, **options)


def test_the_largest_int8_sum_fits_the_accumulator():
    pack(torch.full((1, 1, 65536), -128), torch.int8)
    assert 255 * 128 * 65536 < 2**31
    # Absent blocks are not summed: a wider layer is fine when it is sparse enough.
    view = torch.ones(1, 1, 131072, dtype=torch.int8)
    view[:, :, 65536:] = 0
    pack(view, torch.int8)


def valid() -> PackedWeight:
    return pack(sparse_view((10, 3, 9), 4, 4, 0.6, seed=3), block=(4, 4))


def changed(field, edit):
    tensor = getattr(valid(), field).clone()
    return replace(valid(), **{field: edit(tensor)})


def put(index, value):
    def edit(tensor):
        tensor[index] = value
        return tensor

    return edit


@pytest.mark.parametrize(
    "field, edit",
    [
        ("values", lambda t: t.double()),
        ("values", lambda t: t[0]),
        ("values", lambda t: t[:, :0]),
        ("values", lambda t: t.transpose(1, 2)),
        ("values", put((0, 0, 0), float("nan"))),
        ("cols", lambda t: t.long()),
        ("cols", put(0, -1)),
        ("cols", put(-1, 9)),
        ("cols", put(-1, 2**31 - 1)),
        ("cols", lambda t: t.flip(0)),
        ("cols", lambda t: t[:-1]),
        ("cols", put(1, 0)),
        ("tap_ptr", put(0, 1)),
        ("tap_ptr", put(-1, 2**31 - 1)),
        ("tap_ptr", put(1, 2**31 - 1)),
        ("tap_ptr", put(1, -5)),
        ("tap_ptr", lambda t: t[:-1]),
        ("tap_ptr", lambda t: t[:0]),
        ("row_channels", put(0, 10)),
        ("row_channels", put(0, -2)),
        ("row_channels", put(0, 1)),
        ("row_channels", put(0, -1)),
        ("row_channels", lambda t: t[:-1]),
        ("row_channels", lambda t: torch.cat([t, t.new_full((4,), -1)])),
        ("tap_sums", lambda t: t[:, :-1].contiguous()),
        ("tap_sums", lambda t: t.float()),
        ("scale", lambda t: t.double()),
        ("scale", lambda t: t[:0]),
        ("scale", put(0, float("inf"))),
        ("bias", lambda t: t[:-1]),
        ("bias", put(0, float("nan"))),
    ],
)
def test_validate_names_the_field(field, edit):
    with pytest.raises(
        ValueError, match="packed weight: " if field == "scale" else f"packed weight: {field} must"
    ):
        validate(changed(field, edit))


@pytest.mark.parametrize("change", [{"in_channels": 0}, {"taps": -1}, {"taps": 2**31}, {"in_channels": True}])
def test_validate_checks_the_sizes(change):
    with pytest.raises(ValueError, match=f"{next(iter(change))} must be a positive"):
        validate(replace(valid(), **change))


def test_validate_wants_one_device():
    with pytest.raises(ValueError, match="bias must be on cpu like values, got meta"):
        validate(changed("bias", lambda t: t.to("meta")))


def test_a_wrong_number_of_input_channels_is_noticed():
    with pytest.raises(ValueError, match="cols must lie at the tap"):
        validate(replace(valid(), in_channels=5))


def test_dict_round_trip():
    packed = valid()
    tensors = as_dict(packed)
    assert tuple(tensors) == FIELDS
    again = from_dict(tensors, packed.in_channels, packed.taps)
    assert all(torch.equal(a, b) for a, b in zip(packed.tensors(), again.tensors(), strict=True))
    del tensors["cols"]
    with pytest.raises(ValueError, match="wanted the tensors"):
        from_dict(tensors, packed.in_channels, packed.taps)

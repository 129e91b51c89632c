"""The prediction in docs/gpu.md: of the kernels as they are, from figures that fit each other, never shown as measured."""

import json
import shutil
import subprocess

import pytest
import torch

from benchmarks import gpu_roofline as roofline
from benchmarks.gpu_roofline import GPUS, NOTE, PAGE, Work
from benchmarks.shapes import LayerShape
from sparsegan.patterns import pattern_for

A100, RTX_4090, H100, B200 = GPUS
LAYER = LayerShape("a model", "a layer", "conv2d", 256, 256, 64, 3, 1, 1)


def kernel(name):
    return next(tile for tile in roofline.kernels() if tile.name == name)


# ---- the page ----


def test_page_is_what_the_script_prints():
    text = PAGE.read_text()
    assert text == roofline.page(text), (
        "python -m benchmarks.gpu_roofline --write makes the tables of docs/gpu.md anew"
    )


def test_page_says_that_it_is_a_prediction():
    """At the top, and above every table with figures."""
    lines = PAGE.read_text().splitlines()
    assert "prediction from public figures; never run on hardware" in " ".join(lines[:5])
    begin, end = lines.index(roofline.BEGIN), lines.index(roofline.END)
    heads = [i for i in range(begin, end) if lines[i].startswith("| ---")]
    assert len(heads) > 8
    assert all(lines[i - 3] == NOTE for i in heads)
    assert not any("TB/s" in line or "µs |" in line for line in [*lines[:begin], *lines[end:]])


def test_page_names_what_pattern_for_gives():
    patterns = {str(pattern_for("cuda", dtype)) for dtype in (torch.int8, torch.float16, torch.bfloat16)}
    assert len(patterns) == 1
    assert f'`pattern_for("cuda")` gives {patterns.pop()},' in PAGE.read_text()


def test_page_names_every_kernel():
    listed = PAGE.read_text().partition("## The prediction")[0]
    for tile in roofline.kernels():
        assert f"{tile.block_o}x{tile.block_k}" in listed, tile.name


def test_what_the_page_says_of_the_tables():
    def against(gpu, name):
        return [roofline.loop_break_even(gpu, kernel(name), int8) for int8 in (False, True)]

    for gpu in (A100, RTX_4090):
        assert against(gpu, "int8 64x32")[0] > 1
        assert against(gpu, "int8 64x32")[1] == pytest.approx(0.8, abs=0.1)
        assert against(gpu, "int8 32x32")[1] == pytest.approx(0.5, abs=0.05)
    for gpu, limit in ((H100, 0.5), (B200, 0.25)):
        f16, int8 = against(gpu, "int8 32x32")
        assert 0.8 * limit < f16 < limit
        assert int8 == pytest.approx(f16 / 2, rel=0.1)
    bounds = [
        min(shares, key=shares.get)
        for g in GPUS
        for t in roofline.kernels()
        if (shares := roofline.loop_shares(g, t))
    ]
    assert bounds.count("L2") >= 0.9 * len(bounds)


def test_command(capsys, tmp_path, monkeypatch):
    assert roofline.main(["--wrong"]) == 2
    assert roofline.main([]) == 0
    printed = capsys.readouterr().out.strip()
    assert printed in PAGE.read_text()

    copy = tmp_path / "gpu.md"
    copy.write_text(f"before\n{roofline.BEGIN}\nold\n{roofline.END}\nafter\n")
    monkeypatch.setattr(roofline, "PAGE", copy)
    assert roofline.main(["--write"]) == 0
    text = copy.read_text()
    assert (
        text.startswith("before\n") and text.endswith("\nafter\n") and printed in text and "old" not in text
    )
    with pytest.raises(ValueError, match="must have the lines"):
        roofline.page("no markers")


# ---- the figures ----


@pytest.mark.parametrize("gpu", GPUS, ids=lambda gpu: gpu.name)
def test_peaks_fit_clock_and_multiprocessors(gpu):
    """A tensor core does a power of two of multiply-adds a cycle, whatever the data sheet rounds."""
    for int8 in (True, False):
        macs = gpu.macs(int8)
        assert min(abs(macs / 2**n - 1) for n in range(6, 15)) < 0.01
    assert gpu.int8 / gpu.f16 == pytest.approx(4 if gpu is RTX_4090 else 2, rel=0.01)
    assert 0 < gpu.mma_sync <= 1
    assert gpu.l2 >= gpu.dram


# ---- the kernels ----


def test_tiles_are_those_of_the_machine_code():
    stored = json.loads(roofline.MACHINE_CODE.read_text())["kernels"]
    names = {name for name in stored if name.startswith("gather_gemm")}
    forms = {(t.form + "TwoFour" * t.two_four, t.block_o, t.block_k, t.pixels) for t in roofline.tiles()}
    assert names == {f"gather_gemm_kernel<{', '.join(map(str, form))}>" for form in forms}
    assert len(roofline.kernels()) == 10
    for tile in roofline.tiles():
        for arch, gpu in enumerate(("80", "86", "89", "90", "100", "120")):
            form = tile.form + "TwoFour" * tile.two_four
            row = stored[f"gather_gemm_kernel<{form}, {tile.block_o}, {tile.block_k}, {tile.pixels}>"]
            assert row["mma"][arch] % tile.mma == 0, "the loop holds whole stages"
            assert tile.slots(gpu) > tile.mma


CHECK = r"""
#include <cstdio>
#include "tile.h"
using namespace sparsegan::cuda;

int main() {
  for (const Tile& t : kTiles)
    std::printf("tile %d %d %d %d %d %d %d %d\n", static_cast<int>(t.type), t.two_four, t.block_o, t.block_k, t.pixels,
                t.stage_bytes(), t.fragments_o(), t.fragments_p());
  const uint32_t metadata = 0;
  int type, two_four, block_o, block_k, phases, rows, multiprocessors;
  long long pixels, blocks;
  while (std::scanf("%d %d %d %d %d %d %d %lld %lld", &type, &two_four, &block_o, &block_k, &phases, &rows, &multiprocessors,
                    &pixels, &blocks) == 9) {
    GatherGemm call;
    call.weight_type = static_cast<Type>(type);
    call.metadata = two_four ? &metadata : nullptr;
    call.block_o = block_o, call.block_k = block_k;
    call.rows = rows, call.phase_count = phases, call.batch = 1, call.blocks = blocks;
    for (int p = 0; p < phases; p++) call.phases[p].height = 1, call.phases[p].width = static_cast<int>(pixels);
    const Tile& t = kTiles[choose_tile(call, multiprocessors)];
    std::printf("call %d %lld %d\n", t.pixels, static_cast<long long>(cta_count(call, t.pixels)),
                choose_splits(call, t, multiprocessors));
  }
}
"""
TYPES = {"Int8": 0, "Float16": 1, "BrainFloat16": 2}


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++ to compile csrc/cuda/tile.h")
def test_tile_choice_is_that_of_tile_h(tmp_path):
    """The rows, the bytes of a stage, which tile a layer takes and how its sums are split."""
    source = tmp_path / "check.cpp"
    source.write_text(CHECK)
    include = f"-I{roofline.TILES.parent}"
    subprocess.run(["g++", "-std=c++20", include, str(source), "-o", str(tmp_path / "check")], check=True)

    works = [
        Work(LayerShape("m", "l", "conv2d", c, o, size, 3, 1, 1), batch)
        for c, o in ((512, 512), (64, 128), (1024, 16))
        for size in (4, 8, 16, 64)
        for batch in (1, 5)
    ]
    works += [
        Work(LayerShape("m", "l", "conv_transpose2d", 512, 256, size, 4, 2, 1), 1) for size in (4, 8, 32)
    ]
    works += [Work(LayerShape("m", "l", "linear", 2048, 1000), batch) for batch in (1, 64, 1000)]
    calls, wanted = [], []
    for gpu in (A100, B200):
        for work in works:
            for tile in roofline.kernels():
                rows = -(-work.layer.outputs // tile.block_o)
                kept = work.taps * -(-work.layer.inputs // tile.block_k)
                chosen, ctas = roofline.choose_tile(tile, work, gpu.multiprocessors)
                splits = roofline.choose_splits(chosen, ctas, kept, gpu.multiprocessors)
                wanted.append(f"call {chosen.pixels} {ctas} {splits}")
                head = (TYPES[tile.form], int(tile.two_four), tile.block_o, tile.block_k)
                tail = (work.phases, rows, gpu.multiprocessors, work.pixels, rows * work.phases * kept)
                calls.append(" ".join(map(str, (*head, *tail))))
    out = subprocess.run(
        [tmp_path / "check"], input="\n".join(calls), capture_output=True, text=True, check=True
    ).stdout
    lines = out.splitlines()
    tiles = [line.split()[1:] for line in lines if line.startswith("tile")]
    assert len(tiles) == len(roofline.tiles())
    for tile, row in zip(roofline.tiles(), tiles, strict=True):
        head = (TYPES[tile.form], int(tile.two_four), tile.block_o, tile.block_k, tile.pixels)
        assert [int(n) for n in row] == [*head, tile.stage_bytes, *tile.fragments]
    assert [line for line in lines if line.startswith("call")] == wanted
    assert len({line.split()[1] for line in wanted}) == 2
    assert len({line.split()[3] for line in wanted}) > 3


# ---- the model, by hand ----


def test_main_loop_by_hand():
    """64x32 on A100: a stage is 128 pixels and 64 channels of 64 bytes, 64 * 128 * 64 multiply-adds at 2048 a cycle."""
    tile = kernel("int8 64x32")
    shares = roofline.loop_shares(A100, tile)
    assert tile.stage_bytes == 12288
    assert tile.shared_cycles == 12288 / 128 + 4 * 4 * 12
    assert shares["tensor"] == 1
    assert shares["shared"] == pytest.approx(256 / 288, rel=1e-2)
    assert shares["L2"] == pytest.approx(256 / (12288 * 108 * 1.41 / 4500), rel=1e-2)
    assert shares["issue"] == pytest.approx(256 / tile.slots("80"), rel=1e-2)
    assert roofline.loop_shares(H100, tile)["tensor"] == pytest.approx(0.62)


def test_layer_by_hand():
    """256 channels at 64x64, a quarter of the blocks: for an image 4 rows of 32 tiles, each with 18 kept blocks in 9 stages."""
    work = Work(LAYER, 1)
    tile = kernel("int8 64x32")
    assert (work.phases, work.taps, work.pixels, work.macs) == (1, 9, 4096, 4096 * 9 * 256 * 256)
    large = Work(LAYER, 4)  # 512 tiles on 108 multiprocessors: the busiest has 5
    times = roofline.bounds(A100, tile, large, 0.25)
    assert times["tensor"] == pytest.approx(5 * 9 * 256 / 1410, rel=1e-2)
    assert times["shared"] == pytest.approx(5 * (9 * 288 + 512) / 1410, rel=1e-2)
    assert times["L2"] == pytest.approx(512 * (9 * 12288 + 128 * 64) / 4.5e6, rel=1e-2)
    moved = 2 * 4 * 4096 * 256 + 9 * 256 * 256 / 4
    assert times["DRAM"] == pytest.approx(moved / 2.039e6, rel=1e-2)
    assert roofline.predicted(A100, tile, large, 0.25) == (times["L2"], "L2")
    assert roofline.rival(A100, large, True) == pytest.approx(2 * large.macs / (0.75 * 624e6))


def test_transposed_convolution_by_hand():
    work = Work(LayerShape("m", "l", "conv_transpose2d", 512, 256, 8, 4, 2, 1), 16)
    assert (work.phases, work.taps, work.pixels) == (4, 4, 16 * 8 * 8)
    assert work.macs == 16 * 16 * 16 * 4 * 512 * 256
    assert work.bytes_of(1) == 16 * 64 * 512 + 16 * 256 * 256 + 16 * 512 * 256
    with pytest.raises(ValueError, match="phases of different sizes"):
        _ = Work(LayerShape("m", "l", "conv_transpose2d", 8, 8, 8, 3, 2, 1), 1).taps


@pytest.mark.parametrize("name", ["int8 64x32", "f16 32x32", "int8 2:4 32x64"])
def test_break_even(name):
    """At the density it is as fast, at the next percent it is not."""
    work = Work(LAYER, 4)
    for gpu in GPUS:
        for int8 in (False, True):
            limit, at = roofline.rival(gpu, work, int8), roofline.break_even(gpu, kernel(name), work, int8)
            if at:
                assert roofline.predicted(gpu, kernel(name), work, at / 100)[0] <= limit
            if at < 100:
                assert roofline.predicted(gpu, kernel(name), work, (at + 1) / 100)[0] > limit

"""Havaei's networks on a whole axial slice at once against patch by patch.

    python benchmarks/dense_slices.py [--threads 2] [--repeats 3]

A slice of 240×240 pixels with 4 channels, 5 classes, paper-size networks. Patch by patch means one patch of the network's
field for every pixel, in batches of 64; it is timed on a square of 16×16 pixels and scaled to the slice. Both see the same
numbers, and the largest difference over that square is shown. Writes benchmarks/dense_slices.md.
"""

import argparse
import platform
import time
from datetime import date
from pathlib import Path

import torch
from torch import nn

from medseg_lite import models

SIDE, SQUARE, BATCH = 240, 16, 64


def best(function, repeats: int) -> tuple[float, torch.Tensor]:
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        result = function()
        times.append(time.perf_counter() - start)
    return min(times), result


@torch.no_grad()
def measure(name: str, repeats: int) -> list[float]:
    torch.manual_seed(0)
    model = getattr(models, name)().eval()
    m = model.margin
    x = torch.randn(1, 4, SIDE + 2 * m, SIDE + 2 * m)
    model(x)
    dense, whole = best(lambda: model(x), repeats)
    corner = x[0, :, : SQUARE + 2 * m, : SQUARE + 2 * m]
    patches = corner.unfold(1, 2 * m + 1, 1).unfold(2, 2 * m + 1, 1).permute(1, 2, 0, 3, 4).flatten(0, 1)
    single, parts = best(lambda: torch.cat([model(p.contiguous()) for p in patches.split(BATCH)]), max(1, repeats - 1))
    single *= SIDE**2 / SQUARE**2
    parts = parts[..., 0, 0].T.reshape(1, -1, SQUARE, SQUARE)
    difference = float((whole[..., :SQUARE, :SQUARE] - parts).abs().max())
    models.havaei.WideConv2d.forward, wide = nn.Conv2d.forward, models.havaei.WideConv2d.forward
    plain, _ = best(lambda: model(x), max(1, repeats - 1))
    models.havaei.WideConv2d.forward = wide
    return [dense, single, single / dense, difference, plain / dense]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    rows = [
        "# A slice at once against patch by patch, Havaei's networks",
        "",
        f"{date.today()}, {options.threads} CPU threads, {platform.machine()}, torch {torch.__version__}, a slice of {SIDE}×{SIDE} "
        f"pixels, 4 channels, 5 classes, paper-size networks; the best of {options.repeats} runs. Patch by patch was timed on "
        f"{SQUARE}×{SQUARE} pixels and scaled. The last column is the dense network with PyTorch's own convolution as output layer.",
        "",
        "| network | slice at once, s | patch by patch, s | times faster | largest difference | without `WideConv2d`, times ours |",
        "|---|---|---|---|---|---|",
    ]
    for name in models.HAVAEI:
        dense, single, ratio, difference, plain = measure(name, options.repeats)
        rows.append(f"| `{name}` | {dense:.2f} | {single:.0f} | {ratio:.0f} | {difference:.1e} | {plain:.1f} |")
        print(rows[-1], flush=True)
    rows += ["", "Repeat it: `python benchmarks/dense_slices.py`", ""]
    Path(__file__).with_suffix(".md").write_text("\n".join(rows), encoding="utf-8")


if __name__ == "__main__":
    main()

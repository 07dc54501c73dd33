"""Havaei's networks on a whole axial slice at once against patch by patch.

    python benchmarks/dense_slices.py [--threads 2] [--repeats 3]

A slice of 240×240 pixels with 4 channels, 5 classes, paper-size networks. Patch by patch means one patch of the size of the network's
receptive field for every pixel, in batches of 64; it is timed on a square of 16×16 pixels and scaled to the slice. Both see the same
numbers, and the largest difference over that square is shown.
"""

import pandas as pd
import torch
from _measure import fill, markdown, options, take_turns
from torch import nn

from medseg_lite import models

SIDE, SQUARE, BATCH = 240, 16, 64


@torch.no_grad()
def measure(name: str, repeats: int) -> list:
    torch.manual_seed(0)
    model = getattr(models, name)().eval()
    m = model.margin
    x = torch.randn(1, 4, SIDE + 2 * m, SIDE + 2 * m)
    corner = x[0, :, : SQUARE + 2 * m, : SQUARE + 2 * m]
    patches = corner.unfold(1, 2 * m + 1, 1).unfold(2, 2 * m + 1, 1).permute(1, 2, 0, 3, 4).flatten(0, 1)

    def patch_by_patch(turn=0):
        return torch.cat([model(p.contiguous()) for p in patches.split(BATCH)])

    def plain(turn=0):
        """Run the network with PyTorch's own convolution as output layer."""
        models.havaei.WideConv2d.forward, wide = nn.Conv2d.forward, models.havaei.WideConv2d.forward
        try:
            return model(x)
        finally:
            models.havaei.WideConv2d.forward = wide

    parts = patch_by_patch()[..., 0, 0].T.reshape(1, -1, SQUARE, SQUARE)
    difference = float((model(x)[..., :SQUARE, :SQUARE] - parts).abs().max())
    taken = take_turns({"dense": lambda turn: model(x), "patches": patch_by_patch, "plain": plain}, repeats=repeats, warm_up=0)
    dense, single, plain_seconds = (times[:, 0].min() for times in taken.values())
    single *= SIDE**2 / SQUARE**2
    cells = [f"{dense:.2f}", f"{single:.0f}", f"{single / dense:.0f}", f"{difference:.1e}", f"{plain_seconds / dense:.1f}"]
    return [f"`{name}`", *cells]


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--networks", nargs="+", choices=models.HAVAEI, default=models.HAVAEI)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    columns = [
        "network",
        "slice at once, s",
        "patch by patch, s",
        "times faster",
        "largest difference",
        "without `WideConv2d`, times ours",
    ]
    table = pd.DataFrame([measure(name, given.repeats) for name in given.networks], columns=columns)
    fill(__file__, given.results, f", the best of {given.repeats} runs", {"networks": markdown(table)})


if __name__ == "__main__":
    main()

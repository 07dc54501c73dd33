"""The memory of a patch: by hand, and against what was counted tensor by tensor in runs on a fake GPU."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from medseg_lite import models
from medseg_lite.engine import tiles
from medseg_lite.engine.memory import measure

# Bytes a voxel of the patch, with the weights' copies in half precision. Batches are slices.
COUNTED = {
    "kayalibay_unet3d": ((1, 4, 64, 64, 64), 171, 324),
    "mlynarski_3d": ((1, 4, 106, 106, 106), 223, 358),
    "mlynarski_2d": ((2, 4, 240, 240), 2483, 2324),
    "unet2d": ((1, 1, 512, 512), 1779, 1542),
    "fcn8": ((1, 1, 512, 512), 1105, 516),
    "deepmedic": ((1, 4, 144, 144, 144), 461, 727),
    "dm2d_seg": ((1, 4, 288, 288), 1061, 1683),
}


@pytest.mark.parametrize("name", COUNTED)
def test_of_full_size_networks(name):
    shape, half, single = COUNTED[name]
    with torch.device("meta"):
        model = getattr(models, name)()
    voxels = shape[0] * torch.Size(shape[2:]).numel()
    for dtype, counted in ((torch.float16, half), (torch.bfloat16, half), (torch.float32, single)):
        found = measure(model, shape, dtype).bytes / voxels
        assert found == pytest.approx(counted, rel=0.02)
        assert counted <= tiles.KERNELS * found <= 1.5 * counted  # what is asked for: never too little


class Skipped(nn.Module):
    """Two convolutions, a coarse one between them, and a skip connection."""

    def __init__(self):
        super().__init__()
        self.first, self.coarse = nn.Conv2d(1, 4, 3, padding=1), nn.Conv2d(4, 16, 3, stride=2, padding=1)
        self.last = nn.Conv2d(20, 2, 1)

    def forward(self, x):
        skip = self.first(x).relu_()
        coarse = self.coarse(skip)
        return self.last(torch.cat([skip, nn.functional.interpolate(coarse, scale_factor=2)], dim=1))


def test_by_hand():
    """Values a pixel: 1 of the image, 4 of the skip, 16/4 of the coarse layer, 16 enlarged, 20 joined, 2 of the output."""
    need = measure(Skipped(), (3, 1, 8, 8))
    pixels = 3 * 64
    assert need.bytes == 4 * pixels * (1 + 4 + 4 + 16 + 20)
    assert need.largest == 20 * pixels
    assert measure(Skipped(), (3, 1, 8, 8), gradients=True).bytes == 4 * pixels * (1 + 4 + 4 + 16 + 20 + 2)


def test_half_precision_by_hand():
    """The enlarged layer is float32, and so is what it is joined to, each from a copy; weights are kept in half precision."""
    model, pixels = Skipped(), 3 * 64
    need = measure(model, (3, 1, 8, 8), torch.float16)
    weights = 2 * sum(p.numel() for p in (*model.first.parameters(), *model.coarse.parameters()))
    # The image, the skip twice, the coarse layer, the enlarged layer, and both joined.
    assert need.bytes == pixels * (4 * 1 + (2 + 4) * 4 + 2 * 4 + 4 * 16 + 4 * 20) + weights


def test_the_network_is_left_as_it_was():
    model = models.deepmedic(in_channels=1, classes=2, width=0.1).train()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    calls = []
    handle = model.hidden.register_forward_hook(lambda *_: calls.append(1))
    for dtype in (torch.float32, torch.float16):
        assert measure(model, (1, 1, 57, 57, 57), dtype).bytes > 0
    assert not calls and model.training and all(m.training for m in model.modules())
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    model(torch.zeros(2, 1, 57, 57, 57))
    assert calls == [1]
    handle.remove()


def test_a_rearranged_network_is_measured_too():
    model = models.deepmedic(in_channels=4, classes=5).eval()
    plain, folded = (measure(m, (1, 4, 78, 78, 78)).bytes for m in (model, model.for_inference()))
    assert folded < 0.5 * plain


def test_a_network_that_reads_numbers_is_not_measured():
    class Picky(nn.Conv2d):
        def forward(self, x):
            return super().forward(x) if x.sum() > 0 else x

    model = Picky(1, 1, 3)
    assert measure(model, (1, 1, 8, 8)) is None and model.training
    # Its tiles are planned all the same, and fit.
    network = models.Adapter(model, in_channels=1, classes=1, spatial_dims=2, margin=1)
    tiling = tiles.plan(network, [0] * 3, (4000, 4000, 40), (4000, 4000, 40), torch.device("cpu"))
    assert tiling.size[:2] == (4000, 4000) and tiling.size[2] < 40

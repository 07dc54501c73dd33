"""Tiles cover the region once, fit the memory where they can, and cause little work."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from medseg_lite import models
from medseg_lite.engine import tiles

NETWORKS = {
    "deepmedic": models.deepmedic(in_channels=1, classes=2, width=0.1),
    "dm2d_seg": models.dm2d_seg(in_channels=1, classes=2, width=0.1),
    "kayalibay_unet3d": models.kayalibay_unet3d(in_channels=1, classes=2, width=0.1),
    "mlynarski_2d": models.mlynarski_2d(in_channels=1, classes=2, width=0.05),
}
CPU = torch.device("cpu")


def work(tiling: tiles.Tiling) -> int:
    return sum(math.prod(b - a for a, b in zip(tile.first, tile.last)) for tile in tiling.tiles())


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(sorted(NETWORKS)),
    st.tuples(*[st.integers(1, 90)] * 3),
    st.tuples(*[st.floats(0, 1)] * 3),
    st.floats(1e2, 1e6),
)
def test_tiles_cover_a_region_once_with_their_context(name, shape, begin, voxels):
    network = NETWORKS[name]
    start = [int(b * (n - 1)) for b, n in zip(begin, shape)]
    tiling = tiles.plan(network, start, shape, shape, CPU, tile=1).fitted(voxels)
    counts = np.zeros(shape, int)
    for tile in tiling.tiles():
        counts[tile.inside(shape)] += 1
        for axis, grid in enumerate(tiling.grid):
            a, b, first, last = (corner[axis] for corner in tile)
            assert (
                a % grid == 0
                and (b - a) % grid == 0
                and (last - first) % grid == (2 * network.margin % grid if grid > 1 else 0)
            )
            if axis >= network.spatial_dims:
                assert (a, b) == (first, last)
            elif network.margin:
                assert (a - first, last - b) == (network.margin, network.margin)
            else:
                assert first in (0, a - network.halo) and last in (math.ceil(shape[axis] / grid) * grid, b + network.halo)
    assert (counts[tuple(slice(a, None) for a in start)] == 1).all()


def test_the_tiling_of_the_least_work_is_found():
    """Slices of a 2-D network that sees the whole of them are not cut; a U-Net on a brain does not compute it 40 times over."""
    tiling = tiles.plan(NETWORKS["mlynarski_2d"], [0] * 3, [240, 240, 155], [240, 240, 155], CPU, tile=1).fitted(2e5)
    assert tiling.size[:2] == (240, 240) and work(tiling) == 240 * 240 * 155
    tiling = tiles.plan(NETWORKS["kayalibay_unet3d"], [0] * 3, [160, 192, 160], [160, 192, 160], CPU, tile=1).fitted(2.6e6)
    assert work(tiling) < 4 * 160 * 192 * 160
    assert max(math.prod(b - a for a, b in zip(t.first, t.last)) for t in tiling.tiles()) <= 2.6e6


def test_smaller_tiles():
    tiling = tiles.plan(NETWORKS["deepmedic"], [0] * 3, [20, 30, 12], [20, 30, 12], CPU, tile=30)
    sizes = []
    while tiling := tiling.smaller():
        sizes.append(tiling.size)
    assert sizes[:3] == [(21, 15, 12), (12, 15, 12), (12, 9, 12)] and sizes[-1] == (3, 3, 3)


def test_a_case_must_fit(noise_case):
    with pytest.raises(ValueError, match=r"noise has 2 channels \(flair, t1c\) but the network expects 1"):
        tiles.check_fits(NETWORKS["deepmedic"], noise_case())
    with pytest.raises(ValueError, match=r"noise has 2 channels .* but the network expects 3"):
        tiles.check_fits(torch.nn.Conv3d(3, 2, 3), noise_case())

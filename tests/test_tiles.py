"""Tiles cover the region once, fit the memory where they can, and cause little work."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from medseg_lite import models
from medseg_lite.engine import tiles
from medseg_lite.engine.memory import measure

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


def test_halving_in_vain_is_left_out():
    """A halo that covers the volume makes patches of smaller tiles no smaller."""
    network = NETWORKS["kayalibay_unet3d"]
    tiling = tiles.plan(network, [0] * 3, [96, 40, 40], [96, 40, 40], CPU, tile=100)
    assert tiling.smaller() is None
    tiling = tiles.plan(network, [0] * 3, [240, 160, 40], [240, 160, 40], CPU, tile=240)
    patches = [tiling.patch]
    while tiling := tiling.smaller():
        patches.append(tiling.patch)
    assert len(patches) > 3 and all(math.prod(b) < math.prod(a) for a, b in pairwise(patches))


def test_a_2d_network_has_its_slices_parted_first():
    tiling = tiles.plan(NETWORKS["mlynarski_2d"], [0] * 3, [64, 48, 6], [64, 48, 6], CPU, tile=64)
    sizes = []
    while tiling := tiling.smaller():
        sizes.append(tiling.size)
    assert sizes == [(64, 48, 3), (64, 48, 2), (64, 48, 1)]


# ------------------------------------------------------------------------------------------------ networks of full size


def full_size(name: str) -> models.Network:
    with torch.device("meta"):
        return getattr(models, name)().eval()


def planned(network, shape, device, monkeypatch, *, free: float, dtype=torch.float32) -> tiles.Tiling:
    """The tiling of a volume, which must fit what is free."""
    monkeypatch.setattr(tiles, "free_memory", lambda device: free)
    runs = network.for_inference() if device == "cpu" else network
    tiling = tiles.plan(network, [0] * 3, shape, shape, torch.device(device), runs=runs, dtype=dtype)
    *sides, slices = tiling.patch
    patch = (slices, network.in_channels, *sides) if network.spatial_dims == 2 else (1, network.in_channels, *tiling.patch)
    need = measure(runs, patch, dtype)
    assert need.bytes < free and need.largest < 2**31
    return tiling


FLAT = [name for name in models.NETWORKS if full_size(name).spatial_dims == 2]
MACHINES = {
    "cpu": ("cpu", 20e9, torch.float32),
    "T4": ("cuda", 14e9, torch.float16),
    "T4, float32": ("cuda", 14e9, torch.float32),
    "small": ("cuda", 3e9, torch.float16),
}


@pytest.mark.parametrize("machine", MACHINES)
@pytest.mark.parametrize("shape", [(240, 240, 155), (512, 512, 30)], ids=["brain", "abdomen"])
def test_slices_are_computed_once(shape, machine, monkeypatch):
    device, free, dtype = MACHINES[machine]
    for name in FLAT:
        network = full_size(name)
        tiling = planned(network, shape, device, monkeypatch, free=free, dtype=dtype)
        side = [math.ceil(n / network.multiple) * network.multiple + 2 * network.margin for n in shape[:2]]
        assert work(tiling) <= 1.05 * math.prod(side) * shape[2], (name, tiling.size)


@pytest.mark.parametrize(
    ["device", "free", "dtype"],
    [("cpu", 8e9, torch.float32), ("cuda", 12e9, torch.float32), ("cuda", 3e9, torch.float16)],
    ids=["cpu", "12 GB", "3 GB"],
)
def test_a_brain_goes_through_a_3d_u_net_whole(device, free, dtype, monkeypatch):
    tiling = planned(full_size("kayalibay_unet3d"), (240, 240, 155), device, monkeypatch, free=free, dtype=dtype)
    assert len(tiling.tiles()) == 1


def test_a_cpu_needs_little_memory(monkeypatch):
    """Networks of valid convolutions lose little by small tiles. One that sees far is given more memory."""
    for name in ("deepmedic", "deep_plus", "shallow"):
        network = full_size(name)
        tiling = planned(network, (240, 240, 155), "cpu", monkeypatch, free=20e9)
        assert measure(network.for_inference(), (1, 4, *tiling.patch)).bytes < tiles.CPU_WORKSPACE
    tiling = planned(full_size("mlynarski_3d"), (240, 240, 155), "cpu", monkeypatch, free=20e9)
    assert work(tiling) < 3 * 240 * 240 * 155


def test_no_map_is_larger_than_kernels_can_count(monkeypatch):
    """150 maps of 14 million voxels, however large the GPU is."""
    tiling = planned(full_size("deepmedic"), (400, 400, 300), "cuda", monkeypatch, free=1e12)
    assert 1 < len(tiling.tiles()) < 8


def test_a_case_must_fit(noise_case):
    with pytest.raises(ValueError, match=r"noise has 2 channels \(flair, t1c\) but the network expects 1"):
        tiles.check_fits(NETWORKS["deepmedic"], noise_case())
    with pytest.raises(ValueError, match=r"noise has 2 channels .* but the network expects 3"):
        tiles.check_fits(torch.nn.Conv3d(3, 2, 3), noise_case())

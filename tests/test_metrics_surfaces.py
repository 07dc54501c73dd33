"""Surface distances against brute force, MONAI, and numbers by hand."""

from __future__ import annotations

import itertools
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage

from medseg_lite import crf, forest, metrics, postprocess
from medseg_lite.metrics import surfaces
from medseg_lite.volume import Case


def test_surface_of_a_block_with_a_bay():
    block = np.array([[1, 1, 1, 1, 1], [1, 1, 1, 1, 0], [1, 1, 1, 1, 1], [1, 1, 1, 1, 1]], bool)
    # Row 1, columns 1 and 2, and row 2, columns 1 to 3 have all four neighbours inside; the array's border counts as outside.
    inner = {(1, 1), (1, 2), (2, 1), (2, 2), (2, 3)}
    assert {tuple(map(int, i)) for i in np.argwhere(block & ~metrics.surface(block))} == inner
    assert not (metrics.surface(block) & ~block).any()


def brute_force(p: np.ndarray, t: np.ndarray, spacing) -> tuple[np.ndarray, np.ndarray]:
    def points(mask):
        found = []
        for index in np.argwhere(mask):
            for axis, step in itertools.product(range(mask.ndim), (-1, 1)):
                beside = index.copy()
                beside[axis] += step
                outside = not 0 <= beside[axis] < mask.shape[axis]
                if outside or not mask[tuple(beside)]:
                    found.append(index * np.asarray(spacing))
                    break
        return np.array(found)

    a, b = points(p), points(t)
    distance = np.sqrt(((a[:, None] - b[None]) ** 2).sum(-1))
    return distance.min(1), distance.min(0)


SHAPES = [((9, 11), (1.0, 1.0)), ((12, 9), (0.6, 3.0)), ((7, 8, 6), (1.0, 1.0, 1.0)), ((6, 7, 8), (0.5, 1.25, 5.0))]


@pytest.mark.parametrize("shape, spacing", SHAPES)
@pytest.mark.parametrize("density", [0.02, 0.3, 0.9])  # few points: search tree; many: distance transform
@pytest.mark.parametrize("seed", range(3))
def test_surface_metrics_against_brute_force(blobs, shape, spacing, density, seed):
    p, t = blobs(seed, shape, density), blobs(seed + 100, shape, density)
    a, b = brute_force(p, t, spacing)
    assert metrics.assd(p, t, spacing=spacing) == pytest.approx((a.sum() + b.sum()) / (len(a) + len(b)))
    assert metrics.boundary_distance(p, t, spacing=spacing) == metrics.assd(p, t, spacing=spacing)
    assert metrics.hausdorff(p, t, spacing=spacing) == pytest.approx(max(a.max(), b.max()))
    worst = max(np.percentile(a, 95), np.percentile(b, 95))
    assert metrics.hausdorff(p, t, spacing=spacing, percentile=95) == pytest.approx(worst)
    assert metrics.hausdorff(p, t, spacing=spacing) == metrics.hausdorff(t, p, spacing=spacing)


def test_both_ways_to_the_nearest_voxel_agree(blobs, monkeypatch):
    sparse, dense = np.zeros((20, 20, 20), bool), blobs(3, (20, 20, 20), 0.5)
    sparse[2, 3, 4] = sparse[15, 10, 19] = True
    spacing = np.array([0.7, 1.0, 2.5])
    used = []
    tree = surfaces.cKDTree
    monkeypatch.setattr(surfaces, "cKDTree", lambda points: used.append("tree") or tree(points))
    near = surfaces.distances_to_nearest(sparse, np.roll(sparse, 3, 1), spacing)
    assert used == ["tree"]
    assert near == pytest.approx(brute_force(sparse, np.roll(sparse, 3, 1), spacing)[0])
    far = surfaces.distances_to_nearest(sparse, dense, spacing)
    assert used == ["tree"]  # the dense one went the other way
    points = np.argwhere(dense) * spacing
    expected = [np.sqrt(((i * spacing - points) ** 2).sum(1)).min() for i in np.argwhere(sparse)]
    assert far == pytest.approx(expected)


@pytest.mark.parametrize("shape, spacing", SHAPES)
def test_surface_metrics_agree_with_monai(blobs, shape, spacing):
    from monai import metrics as monai

    p, t = blobs(5, shape), blobs(6, shape)
    tensors = [torch.tensor(x[None, None]).float() for x in (p, t)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        options = {"include_background": True, "spacing": spacing}
        assd = monai.compute_average_surface_distance(*tensors, symmetric=True, **options).item()
        plain = monai.compute_hausdorff_distance(*tensors, **options).item()
        most = monai.compute_hausdorff_distance(*tensors, percentile=95, **options).item()
    assert metrics.assd(p, t, spacing=spacing) == pytest.approx(assd, rel=1e-5)
    assert metrics.hausdorff(p, t, spacing=spacing) == pytest.approx(plain, rel=1e-5)
    assert metrics.hausdorff(p, t, spacing=spacing, percentile=95) == pytest.approx(most, rel=1e-5)


def test_two_squares_by_hand():
    p, t = np.zeros((10, 10), bool), np.zeros((10, 10), bool)
    p[2:4, 2:4] = True
    t[2:4, 5:7] = True
    # Columns 2, 3 against 5, 6 at 0.5 mm: each object has two pixels at 1 mm and two at 1.5 mm.
    assert metrics.assd(p, t, spacing=(2.0, 0.5)) == pytest.approx(1.25)
    assert metrics.hausdorff(p, t, spacing=(2.0, 0.5)) == pytest.approx(1.5)
    assert metrics.hausdorff(p, t, spacing=(2.0, 0.5), percentile=50) == pytest.approx(1.25)


def test_a_stray_voxel_moves_the_maximum_but_not_the_percentile():
    t = np.zeros((40, 40), bool)
    t[5:15, 5:15] = True
    p = t.copy()
    p[39, 39] = True
    assert metrics.hausdorff(p, t, spacing=(1, 1)) == pytest.approx(np.hypot(25, 25))
    assert metrics.hausdorff(p, t, spacing=(1, 1), percentile=95) == 0


# ---------------------------------------------------------------------------------------------------------- sheared grids


@given(
    st.integers(0, 2**32 - 1),
    st.sampled_from(["right angles", "sheared"]),
    st.tuples(*[st.floats(0.2, 6)] * 3),
    st.floats(-35, 35).filter(lambda angle: abs(angle) > 0.2),
)
@settings(max_examples=60, deadline=None)
def test_distances_are_those_of_the_world(seed, kind, sizes, angle):
    """On any grid: anisotropic, oblique, or sheared by a tilted gantry; compared with distances of all pairs of voxels."""
    rng = np.random.default_rng(seed)
    steps = np.diag(sizes)
    if kind == "sheared":
        steps[1, 2] = np.tan(np.deg2rad(angle)) * sizes[2]
    steps = np.linalg.qr(rng.normal(size=(3, 3)))[0] @ steps
    affine = np.eye(4)
    affine[:3, :3], affine[:3, 3] = steps, rng.normal(size=3) * 50
    p, t = (ndimage.binary_dilation(rng.random((6, 7, 5)) > 0.9) for _ in range(2))
    case = Case(np.zeros((1, 6, 7, 5), np.float32), ("ct",), label=t.astype(np.uint8), affine=affine)
    assert case.sheared == (kind == "sheared")
    in_world = [np.argwhere(metrics.surface(m)) @ steps.T for m in (p, t)]
    pairs = np.linalg.norm(in_world[0][:, None] - in_world[1][None], axis=2)
    expected = pairs.min(1), pairs.min(0)
    for found, right in zip(metrics.surface_distances(p, t, spacing=case.steps), expected):
        np.testing.assert_allclose(found, right, atol=1e-9)
    table = metrics.evaluate_cohort([p.astype(np.uint8)], [case], regions={"all": 1})
    assert table["hausdorff"][0] == pytest.approx(max(map(np.max, expected)))
    if kind == "sheared":
        with pytest.raises(ValueError, match="not at right angles"):
            metrics.hausdorff(p, t, spacing=case.spacing)
    else:
        assert metrics.hausdorff(p, t, spacing=case.spacing) == metrics.hausdorff(p, t, spacing=case.steps)


@pytest.mark.parametrize(
    "spacing", [np.zeros((3, 3)), np.ones((3, 3)), np.full((3, 3), np.nan), np.eye(2), np.eye(4), (1, 1), (1, 0, 1)]
)
def test_steps_that_span_no_grid(spacing):
    array = np.ones((2, 2, 2), bool)
    with pytest.raises(ValueError, match="expected 3 positive voxel sizes in mm, one per axis, or a 3×3 matrix"):
        metrics.surface_distances(array, array, spacing=spacing)


@pytest.mark.parametrize("use", ["forest", "postprocess", "crf"])
def test_what_counts_in_mm_refuses_a_sheared_grid(use):
    affine = np.diag([0.5, 0.5, 5.0, 1.0])
    affine[1, 2] = 1.3
    label = np.zeros((6, 7, 5), np.uint8)
    label[2, 3, 2] = 1
    case = Case(np.random.default_rng(0).random((1, 6, 7, 5), np.float32), ("ct",), "tilted", label, label == 0, affine)
    calls = {
        "forest": lambda: forest.RandomForest(trees=1).fit([case]),
        "postprocess": lambda: postprocess.remove_flat_components(label, case),
        "crf": lambda: crf.DenseCRF(units="mm").refine(np.full((2, *case.shape), 0.5, np.float32), case),
    }
    with pytest.raises(ValueError, match="tilted: the voxel axes are not at right angles"):
        calls[use]()

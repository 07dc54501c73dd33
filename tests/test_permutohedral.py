"""The two filters of the dense CRF: the lattice against its original algorithm, point by point, and the grid Gaussian against
the exact matrix."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch

from medseg_lite.crf import Permutohedral
from medseg_lite.crf.gaussian import GridGaussian
from medseg_lite.crf.permutohedral import shear

# --- The original algorithm ---------------------------------------------------------------------------------------------


def elevate(point: np.ndarray) -> np.ndarray:
    """From R^d to the hyperplane of R^(d+1) whose coordinates sum to 0, scaled so that the filter's variance is 1."""
    d = len(point)
    steps = [(d + 1) * math.sqrt(2 / 3) * x / math.sqrt((i + 1) * (i + 2)) for i, x in enumerate(point)]
    return np.array([sum(steps[j:]) - (j and j * steps[j - 1]) for j in range(d + 1)])


def simplex(elevated: np.ndarray) -> tuple[list[tuple[int, ...]], np.ndarray]:
    """The d + 1 lattice points around a point of the hyperplane, and its barycentric coordinates."""
    n = len(elevated)
    zero = np.rint(elevated / n).astype(int) * n  # the nearest point with all coordinates divisible by d + 1 ...
    offset = (elevated - zero).tolist()
    rank = [sum(other > own for other in offset) for own in offset]
    excess = int(zero.sum()) // n
    for i in range(n):  # ... brought back to the hyperplane where rounding left it
        rank[i] += excess
        if rank[i] >= n:
            rank[i] -= n
            zero[i] -= n
        elif rank[i] < 0:
            rank[i] += n
            zero[i] += n
    weights = np.zeros(n + 1)
    for i in range(n):
        part = (elevated[i] - zero[i]) / n
        weights[n - 1 - rank[i]] += part
        weights[n - rank[i]] -= part
    weights[0] += 1 + weights[n]
    # The canonical simplex: its vertex of remainder r adds r to the first d + 1 - r ranks, and r - (d + 1) to the others.
    vertices = [tuple(z + (r if k < n - r else r - n) for z, k in zip(zero.tolist(), rank)) for r in range(n)]
    return vertices, weights[:n]


class Lattice:
    """Adams, Baek and Davis 2010, section 3, in plain Python: a hash table from lattice points to values."""

    def __init__(self, features: np.ndarray) -> None:
        self.simplices = [simplex(elevate(point)) for point in np.asarray(features, float).T]
        self.d = len(features)

    def filter(self, signal: np.ndarray) -> np.ndarray:
        """Blurs along the directions 1, 2, ..., d, 0; where vertices are missing another order gives slightly other values."""
        d, table = self.d, {}
        for (vertices, weights), value in zip(self.simplices, np.asarray(signal, float).T):
            for vertex, weight in zip(vertices, weights):
                table[vertex] = table.get(vertex, 0) + weight * value
        for direction in [*range(1, d + 1), 0]:
            step = [1] * (d + 1)
            step[direction] = -d
            table = {
                vertex: value
                + table.get(tuple(a + b for a, b in zip(vertex, step)), 0) / 2
                + table.get(tuple(a - b for a, b in zip(vertex, step)), 0) / 2
                for vertex, value in table.items()
            }
        sums = [sum(w * table[v] for v, w in zip(vertices, weights)) for vertices, weights in self.simplices]
        return np.stack(sums, 1) / (1 + 2.0**-d)


def cloud(dimensions: int, points: int, *, spread: float, far: float = 0, seed: int = 0) -> torch.Tensor:
    """Points `(d, N)`, float32 numbers in float64, each well inside a simplex; half of them `far` from the others."""
    rng = np.random.default_rng([seed, dimensions])
    features = rng.normal(size=(dimensions, 4 * points)) * spread
    features += np.where(np.arange(4 * points) % 2, far / 2, -far / 2)
    features = features.astype(np.float32).astype(float)
    inside = (i for i, point in enumerate(features.T) if simplex(elevate(point))[1].min() > 1e-4)
    return torch.from_numpy(features[:, [next(inside) for _ in range(points)]])


def noise(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).normal(size=shape))


@pytest.fixture
def threads():
    """`threads(n)` for this test alone."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


# --- The lattice --------------------------------------------------------------------------------------------------------


def test_the_reference_is_a_lattice_filter():
    """The reference itself: coordinates sum to 0, vertices have one remainder each, and their mean is the point."""
    for d in range(1, 6):
        for point in cloud(d, 10, spread=3).T.numpy():
            x = elevate(point)
            vertices, weights = simplex(x)
            assert abs(x.sum()) < 1e-9
            # An isometry, but for the scale
            np.testing.assert_allclose(np.linalg.norm(x), (d + 1) * math.sqrt(2 / 3) * np.linalg.norm(point), rtol=1e-9)
            assert all(sum(v) == 0 and {a % (d + 1) for a in v} == {r} for r, v in enumerate(vertices))
            assert weights.min() > 0
            np.testing.assert_allclose(weights @ np.array(vertices), x, atol=1e-9)


@pytest.mark.parametrize("dimensions", range(1, 8))
def test_shear_gives_the_paper_s_lattice(dimensions):
    """The paper's coordinates x on the hyperplane, seen as multiples (x_0 - x_j) / (d + 1) of d of the lattice's directions."""
    features = noise(dimensions, 5)
    elevated = np.stack([elevate(point) for point in features.T.numpy()], 1)
    ours = shear(dimensions, dtype=torch.float64) @ features
    np.testing.assert_allclose(ours, (elevated[:1] - elevated[1:]) / (dimensions + 1), atol=1e-12)


# Half of the points a little away, or so far that the cells between number many millions (float32 cannot tell that far apart
# in few dimensions), or more than 32 bits can count: implementations may number vertices differently in each.
@pytest.mark.parametrize(
    ("dimensions", "far", "dtype"),
    [(d, 4, dtype) for d in range(1, 8) for dtype in (torch.float32, torch.float64)]
    + [(1, 5e6, torch.float64), (2, 3000, torch.float64), (3, 100, torch.float64), (4, 35, torch.float32)]
    + [(5, 16, torch.float32), (6, 9, torch.float32), (7, 6, torch.float32)]
    + [(1, 1e10, torch.float64), (3, 5000, torch.float64), (5, 1000, torch.float64), (7, 40, torch.float32)],
)
def test_lattice_equals_the_original_algorithm(dimensions, far, dtype):
    features = cloud(dimensions, 120, spread=0.9, far=far)
    signal = noise(2, 120)
    expected = torch.from_numpy(Lattice(features).filter(signal))
    found = Permutohedral(features.to(dtype)).filter(signal.to(dtype))
    assert found.dtype == dtype and found.shape == signal.shape
    error = (found.double() - expected).abs().max() / expected.abs().max()
    assert error < (1e-5 if dtype == torch.float32 else 1e-12 + 1e-15 * far)  # far from 0 float64 rounds, too


def test_the_order_of_directions_matters_little():
    """Where vertices are missing, blurring along one direction and another does not commute: the operator is not symmetric."""
    features = cloud(3, 150, spread=1.5)
    matrix = Permutohedral(features).filter(torch.eye(150, dtype=torch.float64))
    asymmetry = (matrix - matrix.T).norm() / matrix.norm()
    assert 1e-4 < asymmetry < 0.1


@pytest.mark.parametrize("dimensions", range(1, 8))
def test_transpose_is_the_adjoint(dimensions):
    features = cloud(dimensions, 60, spread=1.5)
    lattice = Permutohedral(features)
    eye = torch.eye(60, dtype=torch.float64)
    torch.testing.assert_close(lattice.filter(eye), lattice.filter(eye, transpose=True).T, rtol=0, atol=1e-12)


def test_many_points():
    """More points than are worked on at a time: copies of a few points behave as one point with the sum of their signals."""
    few, copies = 170, 500
    features, signal = cloud(3, few, spread=2), noise(3, copies * few)
    expected = Lattice(features).filter(signal.view(3, copies, few).sum(1))
    found = Permutohedral(features.repeat(1, copies)).filter(signal).view(3, copies, few)
    torch.testing.assert_close(found, torch.from_numpy(expected)[:, None].expand_as(found), rtol=0, atol=1e-9)


@pytest.mark.parametrize("spread", [11, 40])
def test_many_vertices(spread):
    """More vertices than are worked on at a time, among few and among many cells."""
    features, signal = cloud(3, 12_000, spread=spread), noise(1, 12_000)
    found = Permutohedral(features).filter(signal)
    torch.testing.assert_close(found, torch.from_numpy(Lattice(features).filter(signal)), rtol=0, atol=1e-9)


def test_deterministic_and_the_same_for_any_number_of_threads(threads):
    features, signal = 2 * noise(3, 80_000).float(), noise(1, 80_000).float()
    results = {}
    for n in (1, 2, 3):
        threads(n)
        results[n] = Permutohedral(features).filter(signal)
        assert torch.equal(results[n], Permutohedral(features).filter(signal))
    for n in (2, 3):
        assert (results[n] - results[1]).abs().max() < 1e-5 * results[1].abs().max()


@pytest.mark.parametrize(("dimensions", "points"), [(1, 20_000), (2, 40_000), (3, 120_000)])
def test_blurs_with_unit_variance_along_every_feature(dimensions, points):
    """In a dense uniform cloud, so that no vertex is missing and all positions in a simplex are averaged: 3/4 from the blur
    and 1/8 each from splat and slice."""
    cloud = torch.from_numpy(np.random.default_rng(0).uniform(-5.5, 5.5, size=(dimensions, points)))
    inner = (cloud.abs() < 1.5).all(0)
    moments = Permutohedral(cloud).filter(torch.stack([cloud[0] ** 0, *cloud, *cloud**2]))[:, inner]
    one, mean, square = moments.split([1, dimensions, dimensions])
    variance = (square - 2 * cloud[:, inner] * mean + cloud[:, inner] ** 2 * one).mean(1) / one.mean()
    torch.testing.assert_close(variance, torch.ones_like(variance), rtol=0, atol=0.03)


@pytest.mark.parametrize(("dimensions", "bound"), [(1, 0.12), (2, 0.18), (3, 0.26), (5, 0.48)])
def test_approximates_the_gaussian(dimensions, bound):
    """Only roughly, and worse with more features."""
    features = torch.from_numpy(np.random.default_rng(dimensions).normal(size=(dimensions, 400)))
    exact = torch.exp(-(torch.cdist(features.T, features.T) ** 2) / 2)
    error = (Permutohedral(features).filter(torch.eye(400, dtype=torch.float64)) - exact).norm() / exact.norm()
    assert error < bound


def test_points_on_the_borders_of_simplices():
    """Integer features lie on many borders at once; the filter is continuous there up to vertices without weight."""
    grid = torch.tensor(list(itertools.product(range(6), repeat=3)), dtype=torch.float64).T
    shear_back = torch.linalg.inv(shear(3, dtype=torch.float64))
    at_vertices = shear_back @ grid  # points that are lattice vertices, but for rounding
    found = Permutohedral(at_vertices).filter(torch.ones(1, 216, dtype=torch.float64))
    near = Permutohedral(at_vertices + 1e-7).filter(torch.ones(1, 216, dtype=torch.float64))
    inner = ((grid > 0) & (grid < 5)).all(0)
    # A vertex surrounded by others of value 1 hears 2 times in each of the d + 1 directions.
    expected = 2**4 / (1 + 2**-3)
    middle = ((grid == 2) | (grid == 3)).all(0)
    torch.testing.assert_close(found[0, middle], torch.full_like(found[0, middle], expected), rtol=1e-6, atol=0)
    torch.testing.assert_close(found[0, inner], near[0, inner], rtol=0.05, atol=0)


def test_lattice_of_one_point_and_of_equal_points():
    one = Permutohedral(torch.tensor([[0.3], [0.8]])).filter(torch.ones(1, 1))
    same = Permutohedral(torch.tensor([[0.3], [0.8]]).expand(2, 50).contiguous()).filter(torch.ones(1, 50))
    torch.testing.assert_close(same, 50 * one.expand(1, 50))
    assert 0.6 < one < 1.4


def test_lattice_far_from_the_origin_and_negative():
    """Only differences count."""
    features, signal = cloud(3, 100, spread=2), noise(1, 100)
    whole = torch.linalg.inv(shear(3, dtype=torch.float64)) @ torch.tensor([[-700.0], [30.0], [5.0]]).double()
    torch.testing.assert_close(Permutohedral(features + whole).filter(signal), Permutohedral(features).filter(signal))


def test_too_many_cells():
    with pytest.raises(ValueError, match=r"lattice cells, more than .* 2\^62.* deviations are too small"):
        Permutohedral(noise(7, 50) * 1e4)
    with pytest.raises(ValueError, match="deviations are too small"):
        Permutohedral(noise(7, 50) * 1e60)
    with pytest.raises(ValueError, match="deviations are too small"):
        Permutohedral(noise(3, 50).float() * 3e38)


# --- The Gaussian on the grid ---------------------------------------------------------------------------------------------


def gaussian_matrix(index: torch.Tensor, shape: tuple[int, ...], sigma: torch.Tensor) -> torch.Tensor:
    positions = torch.from_numpy(np.stack(np.unravel_index(index.numpy(), shape), 1)).double() / sigma
    return torch.exp(-((positions[:, None] - positions) ** 2).sum(-1) / 2)


GRIDS = {
    "1-D": ((200,), [3.0]),
    "narrow": ((40,), [0.3]),
    "hardly any": ((9, 8), [0.01, 0.6]),
    "2-D": ((24, 41), [2.0, 5.0]),
    "anisotropic": ((12, 13, 7), [0.5, 1.3, 6.0]),
    "3-D": ((11, 13, 8), [1.0, 1.0, 1.0]),
    "wide": ((15, 60), [100.0, 20.0]),
    "one slice": ((17, 1, 12), [2.0, 2.0, 2.0]),
    "one voxel": ((1, 1), [3.0, 3.0]),
}


@pytest.mark.parametrize("part", [1.0, 0.5, 0.03], ids=["whole", "half", "few"])
@pytest.mark.parametrize("name", GRIDS)
def test_grid_gaussian_is_exact(name, part):
    shape, sigma = GRIDS[name]
    size = math.prod(shape)
    index = torch.from_numpy(np.flatnonzero(np.random.default_rng(0).random(size) < part))
    if not len(index):
        index = torch.tensor([size // 2])
    signal = torch.from_numpy(np.random.default_rng(1).random((3, len(index)))).float()
    exact = signal.double() @ gaussian_matrix(index, shape, torch.tensor(sigma))
    found = GridGaussian(index, shape, torch.tensor(sigma)).filter(signal)
    assert ((found - exact).abs() / exact).max() < 1e-4
    signed = signal - 0.5
    exact = signed.double() @ gaussian_matrix(index, shape, torch.tensor(sigma))
    assert (GridGaussian(index, shape, torch.tensor(sigma)).filter(signed) - exact).abs().max() < 1e-4 * exact.abs().max()


def test_grid_gaussian_in_float64():
    shape, sigma = (25, 30), torch.tensor([2.0, 4.0], dtype=torch.float64)
    index = torch.arange(750)
    exact = noise(2, 750) @ gaussian_matrix(index, shape, sigma)
    found = GridGaussian(index, shape, sigma).filter(noise(2, 750))
    assert found.dtype == torch.float64
    assert (found - exact).abs().max() < 2e-5 * exact.abs().max()


def test_grid_gaussian_s_gradients():
    shape, index = (20, 33), torch.arange(0, 660, 2)
    signal, at = noise(2, 330).requires_grad_(), noise(2, 330, seed=3)
    sigma = torch.tensor([1.3, 4.0], dtype=torch.float64, requires_grad=True)
    exact = torch.autograd.grad((at * (signal @ gaussian_matrix(index, shape, sigma))).sum(), (signal, sigma))
    found = torch.autograd.grad((at * GridGaussian(index, shape, sigma).filter(signal)).sum(), (signal, sigma))
    for a, b in zip(found, exact):
        assert (a - b).abs().max() < 1e-4 * b.abs().max()

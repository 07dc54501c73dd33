"""The compiled loops of the dense CRF: the same numbers as PyTorch, the original algorithm and the exact Gaussian; when they are used."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from multiprocessing import get_context

import numpy as np
import pytest
import torch
from crf_by_brute_force import make_case, problem
from test_permutohedral import GRIDS, Lattice, cloud, gaussian_matrix, noise

from medseg_lite import crf
from medseg_lite.crf import DenseCRF, Permutohedral, compiled
from medseg_lite.crf.gaussian import GridGaussian
from medseg_lite.crf.permutohedral import shear


@pytest.fixture
def loops(monkeypatch):
    """`loops(True)`: from now on images of any size are filtered by loops; `loops(False)`: none are."""
    return lambda used: monkeypatch.setattr(compiled, "LARGE", 1 if used else 2**40)


def both(loops, function):
    """The results of a function through loops and through PyTorch."""
    loops(True)
    found = function()
    loops(False)
    return found, function()


def inside(dimensions: int, points: int, spread: float) -> torch.Tensor:
    """Features `(d, N)` of points well inside their simplices, so that rounding puts none into another one."""
    rng = np.random.default_rng(dimensions)
    order = rng.permuted(np.tile(np.arange(1.0, dimensions + 1), (points, 1)), axis=1).T
    fraction = (order + rng.uniform(-0.3, 0.3, order.shape)) / (dimensions + 1)
    t = torch.from_numpy(np.rint(spread * rng.normal(size=order.shape)) + fraction)
    return (torch.linalg.inv(shear(dimensions, dtype=torch.float64)) @ t).float()


def assert_close(found, expected, atol=1e-5) -> None:
    scale = expected.abs().max()
    assert (found - expected).abs().max() <= atol * scale


# --- The lattice --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("dimensions", "far"), [*((d, 4) for d in range(1, 8)), (4, 35), (5, 16), (7, 6), (7, 40)])
def test_lattice_equals_the_original_algorithm(loops, dimensions, far):
    loops(True)
    features, signal = cloud(dimensions, 120, spread=0.9, far=far), noise(2, 120)
    lattice = Permutohedral(features.float())
    assert lattice.order is not None  # loops it is
    assert_close(lattice.filter(signal.float()).double(), torch.from_numpy(Lattice(features).filter(signal)))


@pytest.mark.parametrize("dimensions", range(1, 8))
def test_transpose_is_the_adjoint(loops, dimensions):
    loops(True)
    lattice, eye = Permutohedral(cloud(dimensions, 60, spread=1.5).float()), torch.eye(60)
    assert_close(lattice.filter(eye), lattice.filter(eye, transpose=True).T, 1e-6)


# Chunks that are full and one that is not; cells with many points, so that vertices are remembered; and many more vertices than
# are remembered, so that some get several numbers at first.
@pytest.mark.parametrize(("dimensions", "points", "spread"), [(3, 513, 2), (2, 40_000, 3), (3, 60_000, 40), (5, 30_000, 4)])
def test_lattice_equals_pytorch_s(loops, dimensions, points, spread):
    features, signal = inside(dimensions, points, spread), noise(2, points).float()
    found, expected = both(loops, lambda: Permutohedral(features))
    assert found.order is not None and expected.order is None
    assert found.vertices == expected.vertices
    assert [len(here) for here, _ in found.neighbours] == [len(here) for here, _ in expected.neighbours]
    # Each point's vertices and weights are those of PyTorch, and the numbers too, because both count the same sorted keys.
    order = found.order.long()
    assert torch.equal(order.sort().values, torch.arange(points))
    torch.testing.assert_close(found.weight, expected.weight[order], rtol=0, atol=1e-6 * spread)
    assert torch.equal(found.vertex.long(), expected.vertex[order])
    for transpose in (False, True):
        assert_close(found.filter(signal, transpose=transpose), expected.filter(signal, transpose=transpose))


def test_points_are_visited_cell_by_cell(loops):
    loops(True)
    corner = Permutohedral(noise(3, 2000).float()).vertex[:, 0]
    assert (corner.diff() >= 0).all()


def test_keys_that_do_not_fit_beside_their_places(loops):
    """2^58 cells and 13 bits of places: the keys are sorted in the other way."""
    features = inside(7, 1000, 1)
    features[:, 0] += 170
    signal = noise(1, 1000).float()
    found, expected = both(loops, lambda: Permutohedral(features))
    assert found.vertices == expected.vertices
    assert_close(found.filter(signal)[:, 1:], expected.filter(signal)[:, 1:])


def test_too_many_cells(loops):
    loops(True)
    for factor in (1e4, 3e38):
        with pytest.raises(ValueError, match="deviations are too small"):
            Permutohedral(noise(7, 50).float() * factor)


def test_a_signal_that_is_not_contiguous(loops):
    loops(True)
    signal = noise(300, 2).float().T
    lattice = Permutohedral(noise(3, 300).float())
    assert torch.equal(lattice.filter(signal), lattice.filter(signal.contiguous()))
    grid = GridGaussian(torch.arange(300), (5, 10, 6), torch.ones(3))
    assert torch.equal(grid.filter(signal), grid.filter(signal.contiguous()))


# --- The Gaussian on the grid -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("part", [1.0, 0.5, 0.03], ids=["whole", "half", "few"])
@pytest.mark.parametrize("name", GRIDS)
def test_grid_gaussian_is_exact(loops, name, part):
    loops(True)
    shape, sigma = GRIDS[name]
    index = torch.from_numpy(np.flatnonzero(np.random.default_rng(0).random(np.prod(shape)) < part))
    index = index if len(index) else torch.tensor([np.prod(shape) // 2])
    signal = torch.from_numpy(np.random.default_rng(1).random((3, len(index)))).float()
    exact = signal.double() @ gaussian_matrix(index, shape, torch.tensor(sigma))
    found = GridGaussian(index, shape, torch.tensor(sigma)).filter(signal)
    assert ((found - exact).abs() / exact).max() < 1e-4


@pytest.mark.parametrize("sigma", [(1.0, 2.5, 4.0), (3.0, 0.4, 1.0), (9.0, 6.0, 0.7)])
def test_grid_gaussian_is_symmetric(loops, sigma):
    """So the gradient of the signal is the filtered gradient."""
    loops(True)
    shape = (19, 22, 17)
    index = torch.from_numpy(np.flatnonzero(np.random.default_rng(0).random(np.prod(shape)) < 0.4))
    signal, at = noise(2, len(index)).float().requires_grad_(), noise(2, len(index), seed=3).float()
    grid = GridGaussian(index, shape, torch.tensor(sigma))
    (gradient,) = torch.autograd.grad((at * grid.filter(signal)).sum(), signal)
    exact = at.double() @ gaussian_matrix(index, shape, torch.tensor(sigma))
    assert_close(gradient.double(), exact)


# --- The CRF ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("learn", [("weights", "compatibility"), ("weights", "compatibility", "sigmas")])
@pytest.mark.parametrize("labels", [2, 4])
def test_crf_and_its_gradients(loops, labels, learn):
    logits, image = problem((12, 11, 10), 2, labels)
    mask = torch.from_numpy(np.random.default_rng(0).random((12, 11, 10)) < 0.8)

    def run() -> list[torch.Tensor]:
        model = DenseCRF(appearance_sigma=4.3, intensity_sigma=1.0, classes=labels, learn=learn)
        given = logits[None].float().requires_grad_()
        log_q = model(given, image[None].float(), mask[None])
        log_q.softmax(1)[:, 0].square().mean().backward()
        return [log_q.detach(), given.grad, *(p.grad for p in model.parameters() if p.requires_grad)]

    for found, expected in zip(*both(loops, run)):
        assert_close(found, expected, 2e-5)


def test_refine_and_search(loops):
    logits, image = problem((12, 11, 10), 2, 2)
    p = logits.softmax(0).float().numpy()
    case = make_case(image, label=(image[0] > 0).numpy().astype(np.uint8))
    refined = both(loops, lambda: DenseCRF(appearance_sigma=4.3, intensity_sigma=1.0).refine(p, case))
    np.testing.assert_allclose(*refined, atol=1e-5)
    found, expected = both(loops, lambda: crf.search([case], [p], trials=4, weights_per_lattice=2, progress=False).scores)
    np.testing.assert_allclose(found, expected, atol=2e-3)


@pytest.fixture
def threads():
    """Set the number of PyTorch's threads."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("channels", [1, 3])
def test_any_number_of_threads_gives_the_same(loops, threads, channels):
    loops(True)
    features, signal = 2 * noise(3, 5000).float(), noise(channels, 5000).float()
    grid, results = (torch.arange(5000), (20, 25, 10), torch.full((3,), 2.0)), []
    for count in (1, 3, 8):
        threads(count)
        lattice = Permutohedral(features)
        built = (lattice.order, lattice.vertex, lattice.weight, *(side for pair in lattice.neighbours for side in pair))
        results.append((lattice.filter(signal), GridGaussian(*grid).filter(signal), *built))
    for (lattice, grid, *built), (expected_lattice, expected_grid, *expected_built) in itertools.pairwise(results):
        assert_close(lattice, expected_lattice, 1e-6)  # the sums of one channel are added up in another order
        assert_close(grid, expected_grid, 1e-6)
        assert all(map(torch.equal, built, expected_built))


def test_refining_in_several_threads_at_once(loops, threads):
    loops(True)
    threads(3)
    logits, image = problem((12, 11, 10), 2, 2)
    p, case = logits.softmax(0).float().numpy(), make_case(image)
    crf = DenseCRF(appearance_sigma=4.3, intensity_sigma=1.0)
    expected = crf.refine(p, case)
    with ThreadPoolExecutor(4) as pool:
        for found in pool.map(lambda _: crf.refine(p, case), range(12)):
            np.testing.assert_allclose(found, expected, atol=1e-6)


def test_pytorch_s_threads_are_given_back(loops, threads):
    loops(True)
    threads(3)
    logits, image = problem((12, 11, 10), 2, 2)
    DenseCRF(appearance_sigma=4.3, intensity_sigma=1.0).refine(logits.softmax(0).float().numpy(), make_case(image))
    assert torch.get_num_threads() == 3
    with pytest.raises(ZeroDivisionError), compiled.threads_for(compiled):
        assert torch.get_num_threads() == 1 and len(compiled.share_out(9)) == 3 and len(compiled.share_out(9, jobs=2)) == 1
        raise ZeroDivisionError
    assert torch.get_num_threads() == 3 and [r.stop - r.start for r in compiled.share_out(8)] == [2, 3, 3]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_process_has_threads_of_its_own(loops, threads):
    loops(True)
    threads(2)
    assert compiled.side_by_side(abs, [-1, -2]) == [1, 2]
    with get_context("fork").Pool(1) as pool:
        assert pool.apply_async(compiled.side_by_side, (abs, [-3, -4])).get(60) == [3, 4]


# --- Which is used ------------------------------------------------------------------------------------------------------


def test_float64_and_learned_sigmas_are_pytorch_s(loops):
    loops(True)
    assert Permutohedral(noise(3, 20)).order is None
    sigma = torch.tensor([1.0, 2.0], requires_grad=True)
    GridGaussian(torch.arange(20), (4, 5), sigma).filter(noise(1, 20).float()).sum().backward()
    assert sigma.grad.abs().min() > 0


REFINE = """
import sys
import torch
from medseg_lite.crf import DenseCRF
side = int(sys.argv[1])
image = torch.linspace(0, 1, side**3).view(1, 1, side, side, side)
q = DenseCRF(iterations=1, learn=())(image.repeat(1, 2, 1, 1, 1), image)
print("numba" in sys.modules, q.shape[-1])
"""


def refine(side: int, folder, *options: str) -> list[str]:
    """What a new process prints that refines a cube."""
    environment = os.environ | {"NUMBA_CACHE_DIR": str(folder)}
    command = [sys.executable, *options, "-c", REFINE, str(side)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return done.stdout.splitlines()


def test_small_images_do_not_wait_for_numba(tmp_path):
    assert refine(20, tmp_path) == ["False 20"]


@pytest.mark.slow
def test_the_first_large_image_says_that_it_compiles(tmp_path):
    first, second = refine(33, tmp_path), refine(33, tmp_path)
    assert first == ["compiling the loops of the dense CRF; this takes seconds, once on each machine", "True 33"]
    assert second == ["True 33"]

"""The CRF explorer without a browser: its traits change the picture, and what it shows is what the CRF computes."""

from __future__ import annotations

import base64
import io

import ipywidgets
import numpy as np
import pytest
import torch
from PIL import Image

from medseg_lite import crf, plotting
from medseg_lite.volume import Case
from medseg_lite.widgets import CRFExplorer
from medseg_lite.widgets import crf_explorer as module


def make(classes: int = 2) -> tuple[Case, np.ndarray]:
    """A bright ball in a brain of noise, and probabilities of it with a hole and a false positive."""
    rng = np.random.default_rng(0)
    shape = (22, 26, 12)
    d, h, w = np.indices(shape)
    ball = (d - 10) ** 2 + (h - 12) ** 2 + (w - 6) ** 2 < 30
    image = np.stack([3.0 * ball, 1.0 * ball]) + 0.2 * rng.normal(size=(2, *shape))
    p = np.where(ball, 0.8, 0.1)
    p[9:11, 12, 6] = 0.3  # the hole
    p[3, 4, 6] = 0.7  # the false positive
    rest = p[None] * np.arange(1, classes)[:, None, None, None] / np.arange(1, classes).sum()
    mask = np.zeros(shape, bool)
    mask[2:-2, 2:-2, 1:-1] = True
    case = Case(image.astype(np.float32), ("flair", "t2"), name="ball", label=ball.astype(np.uint8), mask=mask)
    return case, np.concatenate([1 - p[None], rest]).astype(np.float32)


@pytest.fixture
def explorer() -> CRFExplorer:
    return CRFExplorer(*make(), smoothness_sigma=1, intensity_sigma=1)


def test_fills_the_hole_and_removes_the_false_positive(explorer):
    assert explorer.index == 6
    truth = plotting.cut(make()[0].label, plotting.PLANES[0], 6)
    assert explorer.result.sum() == truth.sum()  # the picture is cropped to the mask, so its position differs
    assert explorer.result.shape == (26, 22)  # the mask's box and 2 voxels around it


@pytest.mark.parametrize("classes", [2, 4])
def test_result_is_that_of_the_crf(classes):
    case, probabilities = make(classes)
    case = case.replace(mask=None)
    values = dict(smoothness_weight=1.3, smoothness_sigma=1.1, appearance_weight=2.0, appearance_sigma=4.0, intensity_sigma=0.7)
    explorer = CRFExplorer(case, probabilities, plane="coronal", index=12, iterations=3, **values)
    foreground = torch.from_numpy(1 - probabilities[0, :, 12])  # (D, W)
    logits = torch.stack([1 - foreground, foreground]).clamp(1e-5).log()
    refined = crf.DenseCRF(**values, iterations=3)(logits[None], torch.from_numpy(case.image[:, :, 12])[None])[0]
    expected = (refined[1] > refined[0]).numpy()  # (D, W), which the picture shows turned
    np.testing.assert_array_equal(explorer.result, expected.T[::-1, ::-1])


def sliders(explorer: CRFExplorer) -> dict[str, ipywidgets.Widget]:
    names = [*module.RANGES, "index", "row", "column"]  # in the order in which they are shown
    return dict(zip(names, [w for group in explorer.children[0].children for w in group.children], strict=True))


@pytest.mark.parametrize("name", [*module.RANGES, "index", "row", "column"])
def test_every_trait_changes_the_picture_and_moves_its_slider(explorer, name):
    # One kernel alone fills the hole, so each weight is tested without the other.
    explorer.smoothness_weight, explorer.appearance_weight = (0.01, 3) if name == "appearance_weight" else (3, 0.01)
    before, old = explorer.snapshot(), getattr(explorer, name)
    setattr(explorer, name, old - 1 if isinstance(old, int) else 0.4 * old)
    if "weight" in name:
        setattr(explorer, name, 0.01)
    assert explorer.snapshot() != before
    assert sliders(explorer)[name].value == getattr(explorer, name)
    setattr(explorer, name, old)
    assert explorer.snapshot() == before


def test_sliders_change_the_traits(explorer):
    explorer.smoothness_weight = 0.01
    before = explorer.snapshot()
    sliders(explorer)["appearance_weight"].value = 0.02
    assert explorer.appearance_weight == 0.02 and explorer.snapshot() != before


def test_kernels_are_rebuilt_only_when_a_sigma_or_the_slice_changes(explorer, monkeypatch):
    built = []
    original = module.DenseCRF.prepare
    monkeypatch.setattr(module.DenseCRF, "prepare", lambda *a, **k: built.append(1) or original(*a, **k))
    explorer.smoothness_weight = 0.5
    explorer.row = explorer.row + 1
    assert not built
    explorer.intensity_sigma = 0.3
    explorer.index = 5
    assert len(built) == 2


def test_kernels_of_the_marked_voxel(explorer):
    """The appearance kernel hears the ball and not the brain around it, the smoothness kernel both."""
    case, _ = make()
    explorer.smoothness_sigma, explorer.appearance_sigma, explorer.row, explorer.column = 3, 8, 13, 11
    image = torch.from_numpy(plotting.cut(case.image[0], plotting.PLANES[0], 6).copy())[None]
    mask = torch.ones(image.shape[1:], dtype=torch.bool)
    smoothness, appearance = explorer._kernels(image, mask, {name: getattr(explorer, name) for name in module.RANGES})
    assert smoothness[13, 11] == appearance[13, 11] == 1
    assert smoothness[13, 14] == pytest.approx(np.exp(-0.5))  # one sigma away
    ball = image[0] > 1.5
    assert appearance[ball].mean() > 20 * appearance[~ball].mean()


def test_marked_voxel_lies_on_the_rim_of_the_foreground_not_on_the_speck(explorer):
    p = plotting.cut(make()[1][1], plotting.PLANES[0], 6)
    row, column = explorer.row, explorer.column
    around = p[row - 2 : row + 3, column - 2 : column + 3] > 0.5
    assert 4 < around.sum() < 21  # a speck has one such voxel, the inside of the ball all 25


def test_static_picture(explorer):
    data, metadata = explorer._repr_mimebundle_()
    picture = Image.open(io.BytesIO(base64.b64decode(data["image/png"])))
    assert picture.width == 4 * module.WIDTH + 3 * module.GAP
    assert data["application/vnd.jupyter.widget-view+json"]["model_id"] == explorer.model_id
    assert "ball" in data["text/plain"] and "removed" in metadata["image/png"]["alt"]


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("smoothness_sigma", 0, "smoothness_sigma is 0; expected 0.3 to 10"),
        ("appearance_weight", float("nan"), "appearance_weight is nan; expected 0.01 to 30"),
        ("intensity_sigma", -1, "expected 0.05 to 5"),
        ("index", 12, "index is 12; expected 0 to 11"),
        ("row", 99, "row is 99; expected 0 to 25"),
        ("column", -1, "column is -1; expected 0 to 21"),
    ],
)
def test_bad_values_change_nothing(explorer, name, value, message):
    before = explorer.snapshot()
    with pytest.raises(ValueError, match=message):
        setattr(explorer, name, value)
    assert explorer.snapshot() == before


def test_bad_input():
    case, probabilities = make()
    with pytest.raises(ValueError, match=r"shape \(2, 22, 26, 11\); ball needs \(classes, \*\(22, 26, 12\)\)"):
        CRFExplorer(case, probabilities[..., :-1])
    with pytest.raises(ValueError, match="at least 2 classes"):
        CRFExplorer(case, probabilities[:1])
    with pytest.raises(ValueError, match="take the softmax of logits first"):
        CRFExplorer(case, 5 * probabilities)
    with pytest.raises(ValueError, match="NaN"):
        CRFExplorer(case, np.full_like(probabilities, np.nan))
    with pytest.raises(ValueError, match="there is no parameter 'sigma'; there are smoothness_weight"):
        CRFExplorer(case, probabilities, sigma=3)
    with pytest.raises(ValueError, match="there is no plane 'oblique'"):
        CRFExplorer(case, probabilities, plane="oblique")

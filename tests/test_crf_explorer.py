"""The CRF explorer without a browser: its traits change the picture, and what it shows is what the CRF computes."""

from __future__ import annotations

import base64
import re
import zlib

import numpy as np
import pytest
import torch
import traitlets

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


@pytest.mark.parametrize("name", [*module.RANGES, "index", "row", "column"])
def test_every_trait_changes_the_picture(explorer, name):
    # One kernel alone fills the hole, so each weight is tested without the other.
    explorer.smoothness_weight, explorer.appearance_weight = (0.01, 3) if name == "appearance_weight" else (3, 0.01)
    before, old = explorer.snapshot(), getattr(explorer, name)
    setattr(explorer, name, old - 1 if isinstance(old, int) else 0.4 * old)
    if "weight" in name:
        setattr(explorer, name, 0.01)
    assert explorer.snapshot() != before
    setattr(explorer, name, old)
    assert explorer.snapshot() == before


def test_a_kernel_that_is_switched_off_is_one_without_weight(explorer):
    both = explorer.result
    for name in ("smoothness", "appearance"):
        weight = getattr(explorer, f"{name}_weight")
        setattr(explorer, name, False)
        alone, said = explorer.result, repr(explorer)
        assert f"without {name}" in said
        setattr(explorer, name, True)
        setattr(explorer, f"{name}_weight", 0.01)
        assert (explorer.result == alone).all()
        setattr(explorer, f"{name}_weight", weight)
    assert (explorer.result == both).all()


def test_no_update_leaves_the_networks_labels_and_updates_lower_the_energy(explorer):
    explorer.iterations = 0
    assert (explorer.result == (explorer._cut(explorer._probability) > 0.5)).all()
    energy = explorer.energy
    assert energy["network"] == pytest.approx(energy["after the CRF"])
    explorer.iterations = 5
    assert explorer.energy["network"] == pytest.approx(energy["network"])
    assert explorer.energy["after the CRF"] < energy["network"] - 1


def test_the_energy_is_the_sum_over_all_pairs(explorer):
    """Counted pair by pair, with the smoothness kernel alone, which is exact."""
    explorer.appearance, explorer.iterations, explorer.smoothness_weight, explorer.smoothness_sigma = False, 0, 1.7, 1.4
    mask, p = explorer._cut(explorer._mask), explorer._cut(explorer._probability)
    places, p = np.argwhere(mask).astype(float), p[mask]
    kernel = np.exp(-((places[:, None] - places[None]) ** 2).sum(2) / (2 * 1.4**2))
    kernel /= np.sqrt(np.outer(kernel.sum(0), kernel.sum(0)))
    differ = np.not_equal.outer(p > 0.5, p > 0.5)
    expected = -np.log(np.maximum(p, 1 - p)).sum() + 1.7 * (kernel * differ)[np.triu_indices(len(p), 1)].sum()
    assert explorer.energy["network"] == pytest.approx(expected, rel=1e-4)


def test_what_the_browser_gets(explorer):
    def unpack(name, kind):
        return np.frombuffer(zlib.decompress(explorer.get_state()["_slice"][name], wbits=31), kind)

    case, probabilities = make()
    for index in (6, 5):
        explorer.index = index
        assert explorer.get_state()["_slice"]["shape"] == explorer.result.shape
        shape = explorer.result.shape
        image = np.stack([plotting.cut(channel, plotting.PLANES[0], index) for channel in case.image])
        assert (unpack("image", "<f4").reshape(2, *shape) == image).all()  # exact, not 256 grey levels
        mask = plotting.cut(case.mask, plotting.PLANES[0], index)
        p = np.where(mask, plotting.cut(1 - probabilities[0], plotting.PLANES[0], index), 0)
        np.testing.assert_allclose(unpack("probability", "<f4").reshape(shape), p, atol=1e-6)
        assert (unpack("mask", np.uint8).reshape(shape) == mask).all()
        assert (unpack("truth", np.uint8).reshape(shape) == plotting.cut(case.label, plotting.PLANES[0], index)).all()


def test_messages_from_the_browser_are_checked_too(explorer):
    explorer.set_state({"smoothness_weight": 0.02, "row": 3})
    assert explorer.smoothness_weight == 0.02 and explorer.row == 3
    for bad in ({"row": 99}, {"intensity_sigma": 0}):
        with pytest.raises(traitlets.TraitError):
            explorer.set_state(bad)


def test_kernels_are_rebuilt_only_when_a_sigma_or_the_slice_changes(explorer, monkeypatch):
    built = []
    original = module.DenseCRF.prepare
    monkeypatch.setattr(module.DenseCRF, "prepare", lambda *a, **k: built.append(1) or original(*a, **k))
    for name, value, count in [("smoothness_weight", 0.5, 1), ("row", 3, 1), ("intensity_sigma", 0.3, 2), ("index", 5, 3)]:
        setattr(explorer, name, value)
        assert explorer.result.any() and len(built) == count


def test_kernels_of_the_marked_voxel(explorer):
    """The appearance kernel weighs the ball and not the brain around it, the smoothness kernel both."""
    case, _ = make()
    explorer.smoothness_sigma, explorer.appearance_sigma, explorer.row, explorer.column = 3, 8, 13, 11
    image, mask = (plotting.cut(volume, plotting.PLANES[0], 6) for volume in (case.image[0], case.mask))
    smoothness, appearance = explorer._kernels()
    assert not smoothness[~mask].any() and not appearance[~mask].any()
    assert smoothness[13, 11] == appearance[13, 11] == 1
    assert smoothness[13, 14] == pytest.approx(np.exp(-0.5))  # one sigma away
    ball = image > 1.5
    assert appearance[ball].mean() > 20 * appearance[mask & ~ball].mean()


def test_marked_voxel_lies_on_the_rim_of_the_foreground_not_on_the_speck(explorer):
    p = plotting.cut(make()[1][1], plotting.PLANES[0], 6)
    row, column = explorer.row, explorer.column
    around = p[row - 2 : row + 3, column - 2 : column + 3] > 0.5
    assert 4 < around.sum() < 21  # a speck has one such voxel, the inside of the ball all 25


def test_static_picture(explorer):
    data, metadata = explorer._repr_mimebundle_()
    assert base64.b64decode(data["image/png"]).startswith(b"\x89PNG")
    assert data["application/vnd.jupyter.widget-view+json"]["model_id"] == explorer.model_id
    assert "ball" in data["text/plain"] and "removed" in metadata["image/png"]["alt"]
    case, probabilities = make()
    assert CRFExplorer(case.replace(label=None), probabilities).snapshot()  # without truth and Dice


def test_html_holds_everything_and_escapes_its_title(explorer, tmp_path):
    text = explorer.to_html(tmp_path / "c.html", title="</title><script>alert(1)</script>")
    assert (tmp_path / "c.html").read_text(encoding="utf-8") == text
    assert "<script>alert" not in text and text.count("</script>") == 2
    assert not re.search(r"(src|href)=|https?://", text)  # nothing to fetch


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("smoothness_sigma", 0, "smoothness_sigma is 0; expected 0.3 to 10"),
        ("appearance_weight", float("nan"), "appearance_weight is nan; expected 0.01 to 30"),
        ("intensity_sigma", -1, "expected 0.05 to 5"),
        ("iterations", 21, "iterations is 21; expected 0 to 20"),
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

"""The slice viewer without a browser: its traits, its static forms, its errors."""

from __future__ import annotations

import base64
import io
import json
import re
import zlib

import numpy as np
import pytest
import traitlets
from PIL import Image

from medseg_lite.volume import Case
from medseg_lite.widgets import SliceViewer
from medseg_lite.widgets import slice_viewer as module


def make_case(**changes) -> Case:
    d, h, w = np.indices((12, 10, 8))
    label = ((d - 3) ** 2 + (h - 5) ** 2 + (w - 3) ** 2 < 6).astype(np.uint8) * 4
    case = Case(
        image=np.stack([d + 20.0 * label, h + w]).astype(np.float32), channels=("flair", "t1c"), name="ball", label=label
    )
    return case.replace(**changes)


@pytest.fixture
def viewer() -> SliceViewer:
    case = make_case(info={"classes": {4: "enhancing"}})
    return SliceViewer(case, {"prediction": np.roll(case.label, 1, axis=0), "risk": case.label / 8})


def unpack(data: bytes) -> np.ndarray:
    return np.frombuffer(zlib.decompress(data, wbits=31), np.uint8)


# ------------------------------------------------------------------------------------------------------------- state


def test_opens_at_the_lesion_with_everything_on(viewer):
    assert viewer.position == (3, 5, 3)
    assert viewer.channel == "flair"
    assert viewer.visible == ("truth", "prediction", "risk")
    assert repr(viewer) == "SliceViewer('ball', flair+t1c, 12×10×8 voxels, truth+prediction+risk, at (3, 5, 3))"
    assert SliceViewer(make_case(), make_case().label, visible=["truth"]).visible == ("truth",)
    assert SliceViewer(np.random.default_rng(0).random((4, 5, 6))).position == (2, 2, 3)


def test_what_the_browser_gets(viewer):
    state = viewer.get_state()
    assert state["_scene"]["shape"] == (12, 10, 8) and [p["name"] for p in state["_scene"]["planes"]] == [
        "Axial",
        "Coronal",
        "Sagittal",
    ]
    image, ends = viewer._case.image[1], state["_scene"]["channels"][1]
    levels = unpack(state["_volumes"][1]).reshape(12, 10, 8)
    back = ends["low"] + levels * (ends["high"] - ends["low"]) / 255
    assert np.abs(back - image).max() <= (ends["high"] - ends["low"]) / 255
    truth, prediction, risk = state["_layers"]
    assert (unpack(truth["data"]) == viewer._case.label.reshape(-1)).all()
    assert truth["classes"] == [(4, "enhancing", "#D55E00")]
    assert (truth["style"], prediction["style"], risk["style"]) == ("area", "line", "probability")
    assert unpack(risk["data"]).max() == 128
    json.dumps({k: v for k, v in state.items() if k not in ("_volumes", "_layers")})


def test_state_can_be_set_is_clamped_and_observed(viewer):
    seen = []
    viewer.observe(lambda change: seen.append(change["new"]), "position")
    viewer.position = [5, -4, 99]
    viewer.position = np.array([1, 2, 3])
    assert seen == [(5, 0, 7), (1, 2, 3)] and all(type(p) is int for p in viewer.position)
    viewer.opacity = 3
    assert viewer.opacity == 1
    viewer.visible = ["risk", "truth"]
    assert viewer.visible == ("truth", "risk")


def test_every_channel_has_its_own_window(viewer):
    before = viewer.windows["t1c"]
    viewer.window = (10, 50)
    assert viewer.windows == {"flair": (10, 50), "t1c": before}
    viewer.channel = "t1c"
    assert viewer.window == before
    viewer.window = (-1000, 5)
    assert viewer.window == (viewer._limits["t1c"][0], 5)


def test_messages_from_the_browser_are_checked_too(viewer):
    viewer.set_state({"position": [1, 200, 3], "visible": ["risk"], "windows": {"flair": [1, 2], "t1c": [3, 4]}})
    assert viewer.position == (1, 9, 3) and viewer.visible == ("risk",) and viewer.window == (1, 2)
    with pytest.raises(traitlets.TraitError, match="no channel 't2'"):
        viewer.set_state({"channel": "t2"})
    assert viewer.channel == "flair"


@pytest.mark.parametrize(
    ["name", "value", "message"],
    [
        ("position", (1, 2), r"expected three whole voxel indices \(d, h, w\)"),
        ("position", (1.5, 2, 3), "three whole"),
        ("channel", "t2", "ball has no channel 't2'; there are 'flair', 't1c'"),
        ("visible", ("nobody",), "no overlay 'nobody'; there are 'truth', 'prediction', 'risk'"),
        ("window", (5, 5), "the window of flair is 5 to 5; expected two finite numbers, the lower one first"),
        ("window", 7, r"expected two numbers \(low, high\)"),
        ("window", (1e6, 2e6), "outside the intensities kept.*other limits"),
        ("windows", {"flair": (1, 2)}, "expected one for each of 'flair', 't1c'"),
        ("opacity", float("nan"), "opacity is NaN"),
    ],
)
def test_bad_state_is_refused_and_changes_nothing(viewer, name, value, message):
    before = getattr(viewer, name)
    with pytest.raises(ValueError, match=message):
        setattr(viewer, name, value)
    assert getattr(viewer, name) == before


def test_overlays_can_be_renewed_and_removed(viewer):
    newer = np.full((12, 10, 8), 2)
    viewer.set_overlay("prediction", newer)
    assert [x["name"] for x in viewer._layers] == ["truth", "prediction", "risk"]
    assert (unpack(viewer._layers[1]["data"]) == 2).all()
    viewer.set_overlay("truth", None)
    assert viewer.visible == ("prediction", "risk")
    viewer.set_overlay("third", newer == 1)
    assert viewer.visible == ("prediction", "risk", "third") and viewer._layers[2]["style"] == "dashes"
    with pytest.raises(ValueError, match="no overlay 'truth'; there are 'prediction'"):
        viewer.set_overlay("truth", None)
    with pytest.raises(ValueError, match=r"'x' has shape \(2, 2, 2\) but the image is \(12, 10, 8\)"):
        viewer.set_overlay("x", np.zeros((2, 2, 2)))
    assert len(viewer._layers) == 3


# ------------------------------------------------------------------------------------------------------------ errors

NAN = np.zeros((3, 3, 3))
NAN[0, 0, 0] = np.nan


def infinite() -> Case:
    case = make_case()
    case.image[:] = np.inf  # afterwards, for no case is made of such an image
    return case


@pytest.mark.parametrize(
    ["source", "options", "message"],
    [
        (np.zeros((4, 4)), {}, r"shape \(4, 4\); expected three axes \(D, H, W\): a single picture is image\[:, :, None\]"),
        (np.zeros((2, 4, 4, 4)), {}, r"one channel, image\[0\], or a Case"),
        (np.zeros((0, 4, 4)), {}, r"shape \(0, 4, 4\); there is no voxel"),
        (NAN, {}, "the image has 1 NaN or infinite voxels; replace them"),
        (np.zeros((3, 3, 3), complex), {}, "complex128; expected real numbers"),
        (infinite(), {}, "ball, flair has 960 NaN or infinite"),
        (make_case(affine=np.diag([-1, 1, 1, 1])), {}, "ball has axes LAS; expected RAS.*letters=False"),
        (make_case(), dict(channel="t2"), "ball has no channel 't2'"),
        (make_case(), dict(position=(1, 2)), "three whole voxel indices"),
        (make_case(), dict(visible=["net"]), "no overlay 'net'; there are 'truth'"),
        (make_case(), dict(window=(3, 1)), "the window of flair is 3 to 1"),
        (make_case(), dict(limits=(3, 1)), "limits is 3 to 1"),
        (make_case(), dict(overlays={"prediction": np.zeros((12, 10, 9))}), r"\(12, 10, 9\) but the image is \(12, 10, 8\)"),
        (np.zeros((3, 3, 3)), dict(spacing=(1, 0, 1)), "three positive numbers"),
        (np.zeros((3, 3, 3)), dict(spacing=2), "three positive numbers"),
    ],
)
def test_bad_input(source, options, message):
    with pytest.raises(ValueError, match=message):
        SliceViewer(source, **options)


def test_too_large_a_volume(monkeypatch):
    monkeypatch.setattr(module, "LARGEST_IMAGE", 1000)
    with pytest.raises(ValueError, match=r"ball holds .* in 2 channels.*case.select.*case.crop"):
        SliceViewer(make_case())


def test_other_axes_are_shown_as_they_lie_without_letters():
    viewer = SliceViewer(make_case(affine=np.diag([-1, 1, 1, 1])), letters=False)
    assert all(plane.edges == "" for plane in viewer._planes)


@pytest.mark.parametrize(
    "image",
    [np.zeros((4, 5, 6)), np.ones((4, 5, 6), bool), np.arange(120, dtype=np.uint8).reshape(4, 5, 6), np.zeros((1, 1, 1))],
)
def test_plain_images_of_any_number_type(image):
    viewer = SliceViewer(image)
    low, high = viewer._limits["image"]
    assert low < high and viewer.snapshot()
    if image.dtype == np.uint8:  # one level per value: nothing is lost
        assert (unpack(viewer._volumes[0]).reshape(4, 5, 6) + low == image).all()


# ------------------------------------------------------------------------------------------------------ static forms


def snapshot(viewer) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(viewer.snapshot())).convert("RGB")).astype(int)


def test_snapshot_shows_the_patients_left_on_the_right():
    volume = np.zeros((40, 40, 40), np.float32)
    volume[5:9, 29:33, 18:22] = 1  # left, anterior
    picture = snapshot(SliceViewer(volume, position=(7, 31, 20), window=(0, 1), letters=False))
    # Three square planes of 286 pixels, 12 apart, under a caption of 22: the bright block in each, off the crosshair.
    size = 860 // 3
    bright = picture.min(axis=2) > 240

    def block(left):
        rows, columns = np.nonzero(bright[22 : 22 + size, left : left + size])
        return (rows.mean() / size, columns.mean() / size)

    assert block(0) == pytest.approx((1 - 31 / 40, 1 - 7 / 40), abs=0.02)
    assert block(size + 13) == pytest.approx((0.5, 1 - 7 / 40), abs=0.02)
    assert block(2 * (size + 13)) == pytest.approx((0.5, 1 - 31 / 40), abs=0.02)


def test_snapshot_follows_the_state(viewer):
    first = snapshot(viewer)
    viewer.visible = ()
    plain = snapshot(viewer)
    assert plain.shape != first.shape  # no legend
    assert (plain[30:300].std(axis=2) == 0).all()  # grey
    viewer.position = (3, 5, 0)
    assert (snapshot(viewer) != plain).any()


def test_mimebundle_holds_view_text_and_picture(viewer):
    data, metadata = viewer._repr_mimebundle_()
    assert data["text/plain"] == repr(viewer)
    assert data["application/vnd.jupyter.widget-view+json"]["model_id"] == viewer.model_id
    assert base64.b64decode(data["image/png"]) == viewer.snapshot()
    assert metadata["image/png"]["alt"] == "Slices of ball, flair, through voxel (3, 5, 3) with 'truth', 'prediction', 'risk'"
    # Where ipywidgets 7 defines _ipython_display_, IPython would use it and never ask for this bundle.
    assert viewer._ipython_display_ is None


def test_html_holds_all_data_and_escapes_names(tmp_path):
    nasty = "</script><script>alert(1)</script>{}<!--"
    case = make_case(name=nasty, channels=(nasty, "t1c"), info={"classes": {4: nasty}})
    text = SliceViewer(case, {nasty: case.label}).to_html(tmp_path / "v.html")
    assert (tmp_path / "v.html").read_text(encoding="utf-8") == text
    assert nasty not in text and text.count("</script>") == 2 and "<!--" not in text
    assert not re.search(r"(src|href)=|https?://", text)  # nothing to fetch
    state = json.loads(re.search(r'id="state">(.*?)</script>', text, re.S)[1])
    assert state["channel"] == nasty and state["_layers"][1]["name"] == nasty
    assert (unpack(base64.b64decode(state["_layers"][0]["data"]["base64"])) == case.label.reshape(-1)).all()
    assert "<title>A &amp; B</title>" in SliceViewer(case).to_html(title="A & B")

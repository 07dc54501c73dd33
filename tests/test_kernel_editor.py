"""The kernel editor without a browser: its traits, its arithmetic, its static forms, its errors."""

from __future__ import annotations

import base64
import io
import json
import re
import zlib

import numpy as np
import pytest
import torch
import traitlets
from PIL import Image
from scipy import signal

from medseg_lite import metrics
from medseg_lite.widgets import KernelEditor
from medseg_lite.widgets import kernel_editor as module

RNG = np.random.default_rng(0)
IMAGE = RNG.normal(size=(20, 26)).astype(np.float32)
KERNELS = [RNG.normal(size=(k, k)) for k in (3, 5)]


@pytest.fixture
def editor() -> KernelEditor:
    return KernelEditor(IMAGE, preset="Sobel x")


# ------------------------------------------------------------------------------------------------------- arithmetic


@pytest.mark.parametrize("kernel", KERNELS, ids=["3x3", "5x5"])
def test_feature_map_equals_scipy_and_torch(kernel):
    editor = KernelEditor(IMAGE, kernel)
    np.testing.assert_allclose(editor.feature_map, signal.correlate2d(IMAGE.astype(float), kernel, mode="valid"))
    x, w = (torch.tensor(a, dtype=torch.float64)[None, None] for a in (IMAGE, kernel))
    torch.testing.assert_close(torch.tensor(editor.feature_map), torch.nn.functional.conv2d(x, w)[0, 0])


def test_what_the_presets_do():
    """Known answers on a ramp that grows by 2 to the right and by 3 downwards."""
    rows, columns = np.indices((9, 9))
    editor = KernelEditor(2.0 * columns + 3.0 * rows)
    for size, border in ((3, 1), (5, 2)):
        middle = editor.image[border:-border, border:-border]
        smooth, slope = {3: (4, 2), 5: (16, 8)}[size]  # what the two factors of a Sobel kernel answer to
        expected = {
            "identity": middle,
            "blur": middle,  # a ramp equals its own local mean
            "Sobel x": np.full_like(middle, 2 * smooth * slope),
            "Sobel y": np.full_like(middle, 3 * smooth * slope),
            "Laplacian": np.zeros_like(middle),  # no curvature
            "sharpen": middle,
        }
        assert list(expected) == list(module.PRESETS[size])
        for name, wanted in expected.items():
            editor.kernel = module.PRESETS[size][name]
            assert editor.preset == name
            np.testing.assert_allclose(editor.feature_map, wanted, atol=1e-5, err_msg=f"{name} {size}")


def test_laplacian_is_negative_on_a_bright_spot_and_sharpen_lifts_it():
    image = np.zeros((9, 9))
    image[4, 4] = 1
    for size in (3, 5):
        assert KernelEditor(image, preset="Laplacian", size=size).feature_map.min() == -4
        assert KernelEditor(image, preset="sharpen", size=size).feature_map.max() == 5


def test_colours_end_at_the_quantile_and_never_at_zero():
    values = np.arange(-100.0, 101)  # |values|: 0, 1, 1, 2, 2, ...
    assert module._limit(values) == 97
    assert module._limit(np.zeros((4, 4))) == 1
    lone = np.zeros((20, 20))
    lone[3, 3] = -7
    assert module._limit(lone) == 7


# ------------------------------------------------------------------------------------------------------------- state


def test_opens_with_the_identity_in_the_middle():
    editor = KernelEditor(IMAGE)
    assert repr(editor) == "KernelEditor(20×26 pixels, identity, 3×3, at (10, 13))"
    assert (editor.feature_map == editor.image[1:-1, 1:-1]).all()
    assert KernelEditor(IMAGE, preset="blur", size=5).kernel == ((1 / 25,) * 5,) * 5


def test_kernel_and_preset_follow_each_other(editor):
    seen = []
    editor.observe(lambda change: seen.append(change["new"]), "kernel")
    editor.kernel = np.array([[0, 1, 0], [1, -4, 1], [0, 1, 0]])
    assert editor.preset == "Laplacian" and all(type(w) is float for row in editor.kernel for w in row)
    editor.kernel = torch.ones(5, 5)
    assert editor.preset == module.OWN
    editor.preset = "Sobel y"  # in the present size
    assert len(editor.kernel) == 5 and editor.kernel[0] == (-1, -4, -6, -4, -1)
    assert [len(k) for k in seen] == [3, 5, 5]


def test_position_stays_where_the_kernel_fits(editor):
    editor.position = [0, 99]
    assert editor.position == (1, 24) and all(type(p) is int for p in editor.position)
    editor.kernel = np.ones((5, 5))
    assert editor.position == (2, 23)
    editor.image = IMAGE[:8, :9]
    assert editor.position == (2, 6) and editor.feature_map.shape == (4, 5)


def test_what_the_browser_gets(editor):
    def picture():
        state = editor.get_state()["_picture"]
        return np.frombuffer(zlib.decompress(state["data"], wbits=31), "<f4").reshape(state["shape"])

    assert (picture() == IMAGE).all()  # exact, not 256 grey levels
    editor.image = IMAGE[:7, ::2] * 3
    assert (picture() == IMAGE[:7, ::2] * 3).all()
    state = editor.get_state()
    assert state["_scene"]["presets"]["blur"][5][0][0] == 1 / 25
    assert state["_picture"]["window"][0] < state["_picture"]["window"][1]
    del state["_picture"]["data"]
    json.dumps(state)


def test_messages_from_the_browser_are_checked_too(editor):
    before = editor.kernel
    editor.set_state({"kernel": [[1, 2, 3], [4, 5, 6], [7, 8, 9]], "position": [5, 500]})
    assert editor.kernel[2] == (7.0, 8.0, 9.0) and editor.position == (5, 24)
    editor.kernel = before
    for bad in ([[1, 2], [3, 4]], [[1, 2, 3], [4, None, 6], [7, 8, 9]], "identity"):
        with pytest.raises(traitlets.TraitError):
            editor.set_state({"kernel": bad})
        assert editor.kernel == before


NAN = IMAGE.copy()
NAN[2, 3] = np.nan


@pytest.mark.parametrize(
    ["name", "value", "message"],
    [
        ("kernel", np.ones((3, 5)), r"the kernel has shape \(3, 5\); expected \(3, 3\) or \(5, 5\)"),
        ("kernel", np.ones((4, 4)), r"shape \(4, 4\)"),
        ("kernel", [[1, 2, 3], [4, 5]], "expected 3×3 or 5×5 numbers, row by row"),
        ("kernel", [[1, 2, 3], [4, "x", 6], [7, 8, 9]], "expected 3×3 or 5×5 numbers"),
        ("kernel", [[1, 2, 3], [4, np.nan, 6], [7, 8, 9]], "weight in row 1, column 1 is nan; expected finite"),
        ("kernel", [[1, 2, 3], [4, 5, 1e9], [7, 8, 9]], "weight in row 1, column 2 is 1e\\+09"),
        ("preset", "sobel", "no preset 'sobel'; there are 'identity', 'blur', 'Sobel x'"),
        ("position", (1, 2, 3), r"expected two whole numbers \(row, column\)"),
        ("position", (1.5, 2), "two whole numbers"),
        ("image", NAN, "the image has 1 NaN or infinite pixels; replace them"),
        ("image", np.zeros((3, 9, 9)), r"shape \(3, 9, 9\); expected two axes \(rows, columns\): plotting.cut"),
    ],
)
def test_bad_state_is_refused_and_changes_nothing(editor, name, value, message):
    before = getattr(editor, name)
    with pytest.raises(ValueError, match=message):
        setattr(editor, name, value)
    assert getattr(editor, name) is before or getattr(editor, name) == before


@pytest.mark.parametrize(
    ["image", "options", "message"],
    [
        (np.zeros((2, 3, 9, 9)), {}, "choose a channel and a slice"),
        (np.zeros(9), {}, "pass one picture"),
        (np.zeros((4, 9)), {}, "4×9 pixels; a 5×5 kernel needs at least 5×5"),
        (np.zeros((2000, 1000)), {}, r"2000×1000 pixels.*image\[::2, ::2\]"),
        (np.zeros((9, 9), complex), {}, "complex128; expected real numbers"),
        (np.full((9, 9), 1e300), {}, "81 NaN or infinite pixels"),
        (IMAGE, dict(kernel=np.ones((7, 7))), r"shape \(7, 7\)"),
        (IMAGE, dict(kernel=np.ones((3, 3)), preset="blur"), "both a kernel and preset='blur'"),
        (IMAGE, dict(preset="blurr"), "no preset 'blurr'"),
        (IMAGE, dict(size=7), "size=7; expected 3 or 5"),
        (IMAGE, dict(position=3), "two whole numbers"),
        (IMAGE, dict(window=(2, 1)), "window is 2 to 1; expected two finite numbers, the lower one first"),
        (IMAGE, dict(window=5), r"window is 5; expected two numbers \(black, white\)"),
        (IMAGE, dict(truth=np.zeros((3, 3))), r"the truth has shape \(3, 3\); expected the image's, \(20, 26\)"),
        (IMAGE, dict(bias=np.nan), "bias is nan; expected a finite number"),
        (IMAGE, dict(threshold=1e9), "threshold is 1e\\+09; expected a finite number"),
        (IMAGE, dict(limit=0.0), "limit is 0; expected a number above 0"),
    ],
)
def test_bad_input(image, options, message):
    with pytest.raises(ValueError, match=message):
        KernelEditor(image, **options)


TRUTH = np.zeros(IMAGE.shape, bool)
TRUTH[5:12, 8:15] = True


def test_bias_relu_and_threshold():
    bright = IMAGE + 5 * TRUTH
    editor = KernelEditor(bright, truth=TRUTH, preset="blur")
    plain = editor.feature_map
    editor.bias, editor.relu = -1.5, True
    np.testing.assert_allclose(editor.feature_map, np.maximum(plain - 1.5, 0))
    editor.threshold = 1.0
    assert editor.prediction.shape == IMAGE.shape and not editor.prediction[[0, -1]].any()
    assert (editor.prediction[1:-1, 1:-1] == (plain > 2.5)).all()
    assert editor.dice == metrics.dice(editor.prediction, TRUTH) > 0.8
    assert KernelEditor(IMAGE).dice is None


def test_colours_stay_until_they_are_freed(editor):
    limit = editor.limit
    assert editor.locked and limit == module._limit(editor.feature_map)
    editor.kernel = 10 * np.array(editor.kernel)
    assert editor.limit == limit  # a tenfold response is seen to be larger
    locked = snapshot(editor)
    editor.locked = False
    assert (snapshot(editor) != locked).any()


def test_the_browser_gets_the_truth():
    state = KernelEditor(IMAGE, truth=TRUTH).get_state()
    assert zlib.decompress(state["_picture"]["truth"], wbits=31) == TRUTH.astype(np.uint8).tobytes()
    assert "truth" not in KernelEditor(IMAGE).get_state()["_picture"]
    other = KernelEditor(IMAGE, truth=TRUTH)
    other.image = 2 * IMAGE
    assert "truth" in other.get_state()["_picture"]
    with pytest.raises(ValueError, match="make a new editor with both"):
        other.image = IMAGE[:9, :9]


@pytest.mark.parametrize(
    "image",
    [
        np.zeros((6, 7)),
        np.eye(8, dtype=bool),
        np.arange(48, dtype=np.uint8).reshape(6, 8),
        np.asfortranarray(IMAGE),
        torch.tensor(IMAGE),
    ],
)
def test_pictures_of_any_number_type(image):
    editor = KernelEditor(image)
    assert (editor.image == np.asarray(image)).all() and editor.snapshot()


# ------------------------------------------------------------------------------------------------------ static forms


def snapshot(editor) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(editor.snapshot())).convert("RGB")).astype(int)


def test_snapshot_follows_the_kernel_in_signed_colours():
    step = np.zeros((30, 30))
    step[:, 15:] = 1  # brighter to the right
    editor = KernelEditor(step, preset="Sobel x", position=(15, 5))

    def shares():
        """Of strongly blue and of strongly vermilion pixels (the mark is green) in the right third, above the colour bar."""
        picture = snapshot(editor)
        map_part = picture[: len(picture) // 2, 2 * picture.shape[1] // 3 :]
        red, green, blue = np.moveaxis(map_part, 2, 0)
        return (blue > np.maximum(red + 80, green)).mean(), (red > np.maximum(blue + 80, green)).mean()

    below, above = shares()
    assert above > 0.02 and below == 0
    editor.kernel = -np.array(editor.kernel)
    below, above = shares()
    assert below > 0.02 and above == 0


def test_mimebundle_holds_view_text_and_picture(editor):
    data, metadata = editor._repr_mimebundle_()
    assert data["text/plain"] == repr(editor)
    assert data["application/vnd.jupyter.widget-view+json"]["model_id"] == editor.model_id
    assert base64.b64decode(data["image/png"]).startswith(b"\x89PNG")
    assert "Sobel x (-1 0 1; -2 0 2; -1 0 1)" in metadata["image/png"]["alt"]
    assert editor._ipython_display_ is None  # else ipywidgets 7 would never ask for this bundle


def test_html_holds_everything_and_escapes_its_title(editor, tmp_path):
    text = editor.to_html(tmp_path / "k.html", title="</title><script>alert(1)</script>")
    assert (tmp_path / "k.html").read_text(encoding="utf-8") == text
    assert "<script>alert" not in text and text.count("</script>") == 2
    assert not re.search(r"(src|href)=|https?://", text)  # nothing to fetch
    state = json.loads(re.search(r'id="state">(.*?)</script>', text, re.S)[1])
    assert state["kernel"] == [list(row) for row in editor.kernel]

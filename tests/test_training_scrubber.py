"""The training scrubber without a browser: its scores, its static forms, its errors."""

from __future__ import annotations

import base64
import io
import json
import re
import zlib

import numpy as np
import pytest
from PIL import Image

from medseg_lite.widgets import TrainingScrubber

CLASSES = ("background", "large", "tiny", "absent")
STEPS, NAMES = np.array([10, 20, 50]), np.array(["one", "other"])


def make_arrays() -> dict[str, np.ndarray]:
    """Arrays of the form of a stored training: one network finds the object row by row, the other finds nothing."""
    truth = np.zeros((8, 10), np.uint8)
    truth[2:6, 3:7], truth[7, 9] = 1, 2
    labels = np.zeros((2, 3, 8, 10), np.uint8)
    labels[0, 1, 2:4, 3:7] = 1
    labels[0, 2] = truth
    return {"image": (3.0 * truth + 0.1).astype(np.float16), "truth": truth, "labels": labels, "steps": STEPS, "names": NAMES}


@pytest.fixture
def scrubber() -> TrainingScrubber:
    return TrainingScrubber(**make_arrays(), classes=CLASSES)


def test_scores_are_counted_by_hand(scrubber):
    assert scrubber.frame == 2 and repr(scrubber) == "TrainingScrubber(one, other; after 50 updates, 3 stored)"
    assert list(scrubber.dice.columns) == ["large", "tiny", "absent"] and list(scrubber.dice.index) == ["one", "other"]
    nan = np.nan
    np.testing.assert_array_equal(scrubber.dice, [[1, 1, nan], [0, 0, nan]])
    scrubber.frame = 1
    np.testing.assert_allclose(scrubber.dice, [[2 * 8 / (16 + 8), 0, nan], [0, 0, nan]])
    for wanted, frame in ((-3, 0), (99, 2)):
        scrubber.frame = wanted
        assert scrubber.frame == frame
    assert TrainingScrubber(**make_arrays(), classes=CLASSES, frame=1).frame == 1


def test_what_the_browser_gets(scrubber):
    arrays, scene = make_arrays(), scrubber._scene
    sent = np.frombuffer(zlib.decompress(scrubber._labels, wbits=31), np.uint8).reshape(7, 8, 10)
    assert (sent[0] == arrays["truth"]).all() and (sent[1:].reshape(2, 3, 8, 10) == arrays["labels"]).all()
    assert scene["steps"] == [10, 20, 50] and scene["names"] == ["one", "other"]
    assert scene["dice"][0][1] == [pytest.approx(2 / 3), 0, None]
    assert [k for k, *_ in scene["classes"]] == [1, 2, 3] and len({colour for *_, colour in scene["classes"]}) == 3


def test_static_forms(scrubber, tmp_path):
    scrubber.frame = 1
    data, metadata = scrubber._repr_mimebundle_()
    assert (
        "after 20 updates" in metadata["image/png"]["alt"]
        and "one large 67 %, tiny 0 %, absent –" in metadata["image/png"]["alt"]
    )
    pictures = [np.asarray(Image.open(io.BytesIO(base64.b64decode(data["image/png"]))))]
    for name, value in {"frame": 0, "opacity": 0.2}.items():
        setattr(scrubber, name, value)
        pictures.append(np.asarray(Image.open(io.BytesIO(scrubber.snapshot()))))
        assert (pictures[-1] != pictures[-2]).any()
    named = TrainingScrubber(**make_arrays() | {"names": ["</script>", "b"]}, classes={1: "large", 2: "<b>"})
    text = named.to_html(tmp_path / "scrubber.html")
    assert "</script>" not in text.split('id="state">')[1].split("</script>")[0] and not re.search(
        r"(src|href)=|https?://", text
    )
    state = json.loads(re.search(r'id="state">(.*?)</script>', text, re.S)[1])
    assert state["_scene"]["names"] == ["</script>", "b"] and state["frame"] == 2


def change(name: str, where, value) -> np.ndarray:
    array = make_arrays()[name].copy()
    array[where] = value
    return array


@pytest.mark.parametrize(
    ["changes", "message"],
    [
        ({"image": np.zeros((8, 10, 2))}, r"the image has shape \(8, 10, 2\) and the truth \(8, 10\); expected one slice"),
        ({"truth": np.zeros((10, 8), int)}, r"the image has shape \(8, 10\) and the truth \(10, 8\)"),
        ({"image": change("image", (0, 0), np.nan)}, "the image has 1 NaN or infinite voxels"),
        ({"truth": np.full((8, 10), 0.5)}, "the truth holds float64 from 0.5 to 0.5; expected class numbers from 0 to 255"),
        ({"truth": np.full((8, 10), -1)}, "the truth holds int64 from -1 to -1"),
        ({"labels": np.zeros((3, 8, 10), np.uint8)}, r"labels have shape \(3, 8, 10\); expected \(networks, updates, 8, 10\)"),
        ({"labels": np.zeros((2, 0, 8, 10), np.uint8)}, r"labels have shape \(2, 0, 8, 10\)"),
        ({"labels": make_arrays()["labels"].astype(int)}, "labels hold int64; expected class numbers as uint8"),
        ({"labels": change("labels", (1, 2), 7)}, r"truth or labels hold class 7, which has no name; named are \[0, 1, 2, 3\]"),
        ({"names": ["one"]}, r"names are \['one'\]; expected 2 different ones"),
        ({"names": ["one", "one"]}, r"names are \['one', 'one'\]; expected 2 different ones"),
        ({"steps": [10, 20]}, r"steps are \[10, 20\]; expected 3 numbers of updates that rise"),
        ({"steps": [10, 50, 20]}, "expected 3 numbers of updates that rise"),
        ({"opacity": np.nan}, "opacity is NaN"),
    ],
)
def test_bad_input(changes, message):
    with pytest.raises(ValueError, match=message):
        TrainingScrubber(**{**make_arrays(), "classes": CLASSES, **changes})

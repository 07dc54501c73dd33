"""Figures: orientation and painting against hand-made arrays, what they contain, and alt text through nbconvert."""

from __future__ import annotations

from collections import namedtuple
from html.parser import HTMLParser
from itertools import pairwise

import matplotlib as mpl
import matplotlib.pyplot as plt
import nbformat
import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure

from medseg_lite import plotting
from medseg_lite.plotting import PLANES, Overlay, as_overlays, busiest_position, cut, outline_pixels, paint
from medseg_lite.volume import Case

AXIAL, CORONAL, SAGITTAL = PLANES


def make_case(name="ball", shape=(12, 10, 8), **changes) -> Case:
    d, h, w = np.indices(shape)
    label = ((d - 4) ** 2 + (h - 5) ** 2 + (w - 3) ** 2 < 6).astype(np.uint8)
    image = np.stack([d + 20.0 * label, h + w]).astype(np.float32)
    return Case(image=image, channels=("flair", "t1c"), name=name, label=label, **changes)


# ------------------------------------------------------------------------------------------------------- orientation


@pytest.mark.parametrize(
    ["plane", "size", "corner"],
    # (rows, columns) of the picture, and the voxel that its top left pixel shows: right-anterior, right-superior,
    # anterior-superior
    [(AXIAL, (3, 2), (1, 2, 0)), (CORONAL, (4, 2), (1, 0, 3)), (SAGITTAL, (4, 3), (0, 2, 3))],
)
def test_cut_turns_slices_for_display(plane, size, corner):
    volume = np.arange(24).reshape(2, 3, 4)
    picture = cut(volume, plane, 0)
    assert picture.shape == size
    assert picture[0, 0] == volume[corner]
    assert picture[-1, -1] == volume[0, 0, 0]


def test_the_patients_left_is_on_the_right_of_the_picture():
    volume = np.zeros((10, 10, 10))
    volume[1, 5, 5] = 1  # D runs from left to right, so a small index is at the patient's left
    for plane in (AXIAL, CORONAL):
        _, column = np.argwhere(cut(volume, plane, 5))[0]
        assert column == 8 and plane.edges[:2] == "RL"


def test_find_plane():
    assert plotting.find_plane("Coronal") is CORONAL
    with pytest.raises(ValueError, match="no plane 'transverse'; expected 'axial'"):
        plotting.find_plane("transverse")


def test_busiest_position():
    label = np.zeros((5, 6, 7), np.uint8)
    label[1, 2, 3] = label[1, 4, 3] = label[3, 4, 5] = 1
    assert busiest_position(label, label.shape) == (1, 4, 3)
    assert busiest_position(np.zeros((5, 6, 7)), (5, 6, 7)) == busiest_position(None, (5, 6, 7)) == (2, 3, 3)


@pytest.mark.parametrize("position", [(1, 2), (1, 2, 3, 4), 5, "abc", (1, 2, None), (1.5, 2, 3), (1, 2, float("nan"))])
def test_check_position_rejects(position):
    with pytest.raises(ValueError, match=r"expected three whole voxel indices \(d, h, w\)"):
        plotting.check_position(position, (5, 6, 7))


def test_check_position_clamps():
    assert plotting.check_position(np.array([-3, 2.0, 99]), (5, 6, 7)) == (0, 2, 6)


def test_default_window():
    rng = np.random.default_rng(0)
    volume = rng.permutation(1001).astype(np.float32).reshape(7, 11, 13)
    assert plotting.default_window(volume) == pytest.approx((5, 995))
    assert plotting.default_window(volume, volume > 500) == pytest.approx((503.5, 997.5), abs=1)
    low, high = plotting.default_window(np.full((2, 2, 2), 7.0))
    assert low < high
    spike = np.zeros((20, 20, 20))
    spike[3, 3, 3] = 5
    assert plotting.default_window(spike) == (0, 5)


# ---------------------------------------------------------------------------------------------------------- painting


def test_paint_greys_through_the_window():
    picture = np.array([[0.0, 10, 20, 30, 40]])
    assert paint(picture, (10, 30))[0, :, 0].tolist() == [0, 0, 128, 255, 255]
    assert paint(picture, (10, 30)).shape == (1, 5, 3)


def test_paint_blends_areas_probabilities_and_outlines():
    picture = np.zeros((5, 5))
    classes = np.zeros((5, 5), np.uint8)
    classes[1:4, 1:4] = 2  # sky blue (86, 180, 233)
    area = paint(picture, (0, 1), [Overlay("truth", classes, "area")], 0.5)
    assert area[2, 2].tolist() == [43, 90, 116] and area[0, 0].tolist() == [0, 0, 0]
    line = paint(picture, (0, 1), [Overlay("a", classes, "line")], 0.25)
    assert line[1, 1].tolist() == [43, 90, 116] and line[2, 2].tolist() == [0, 0, 0]
    orange = paint(picture, (0, 1), [Overlay("p", np.full((5, 5), 0.5, np.float32), "probability")], 1.0)
    assert orange[0, 0].tolist() == [115, 80, 0]  # half of (230, 159, 0)


def test_outline_against_hand_drawn_masks():
    classes = np.array([[1, 1, 1, 0, 0, 0], [1, 1, 1, 0, 2, 2], [1, 1, 1, 1, 2, 2], [1, 1, 1, 1, 0, 0]])
    drawn = np.array([[1, 1, 1, 0, 0, 0], [1, 0, 1, 0, 1, 1], [1, 0, 0, 1, 1, 1], [1, 1, 1, 1, 0, 0]])
    assert (outline_pixels(classes) == drawn.astype(bool)).all()
    row = np.ones((1, 12), int)
    assert outline_pixels(row, "dashes")[0].astype(int).tolist() == [1, 1, 1, 1, 0, 0] * 2
    assert outline_pixels(row, "dots")[0].astype(int).tolist() == [1, 0, 0] * 4


def test_borders_against_hand_drawn_masks():
    (square,) = plotting.borders(np.pad(np.ones((2, 3), int), 1))
    assert sorted(map(tuple, square[:-1].tolist())) == [(0.5, 0.5), (0.5, 2.5), (3.5, 0.5), (3.5, 2.5)]
    assert (square[0] == square[-1]).all()
    two = np.array([[1, 2], [1, 2]])
    assert [line.tolist() for line in plotting.borders(two, inner=True)] == [[[0.5, -0.5], [0.5, 1.5]]]
    assert plotting.borders(np.zeros((3, 3))) == []


def test_borders_take_every_edge_once():
    classes = np.random.default_rng(0).integers(0, 4, (20, 30))
    found = [
        frozenset({tuple(a + (b - a) * i / n), tuple(a + (b - a) * (i + 1) / n)})
        for line in plotting.borders(classes)
        for a, b in pairwise(line)
        for n in [int(np.abs(b - a).sum())]
        for i in range(n)
    ]
    padded = np.pad(classes, 1)
    edges = (padded[1:, 1:-1] != padded[:-1, 1:-1]).sum() + (padded[1:-1, 1:] != padded[1:-1, :-1]).sum()
    assert len(set(found)) == len(found) == edges


def test_as_overlays_gives_every_overlay_its_style():
    truth = np.zeros((2, 2, 2), np.uint8)
    given = {"a": truth, "b": truth > 0, "c": truth.astype(int), "d": truth + 7.0, "p": truth + 0.5}
    found = as_overlays(given, (2, 2, 2), label=truth)
    assert [(o.name, o.style) for o in found] == [
        ("truth", "area"),
        ("a", "line"),
        ("b", "dashes"),
        ("c", "dots"),
        ("d", "dots"),
        ("p", "probability"),
    ]
    lines = [o.colour for o in found if o.style in ("line", "dashes", "dots")]
    assert len(set(lines[:3])) == 3 and found[0].colour == ""  # a colour for each overlay, not for each class
    assert found[2].array.dtype == np.uint8 and found[4].array.max() == 7
    assert [o.name for o in as_overlays(truth, (2, 2, 2))] == ["prediction"]
    assert as_overlays(None, (2, 2, 2)) == []


@pytest.mark.parametrize(
    ["overlays", "message"],
    [
        (np.zeros((3, 2, 2)), r"'prediction' has shape \(3, 2, 2\) but the image is \(2, 2, 2\).*resample"),
        (np.zeros((1, 1, 2, 2, 2)), "without batch and channel axes"),
        ({"x": np.full((2, 2, 2), np.nan)}, "'x' has NaN"),
        ({"x": np.full((2, 2, 2), -1.5)}, r"floats from -1.5 to -1.5; .*softmax or the argmax"),
        ({"x": np.full((2, 2, 2), -1)}, "classes -1 to -1; expected 0 to 255"),
        ({"x": np.full((2, 2, 2), "a")}, "expected class numbers"),
        ({"": np.zeros((2, 2, 2))}, "expected a text"),
        ({3: np.zeros((2, 2, 2))}, "called 3; expected a text"),
    ],
)
def test_as_overlays_rejects(overlays, message):
    with pytest.raises(ValueError, match=message):
        as_overlays(overlays, (2, 2, 2))


def test_class_names_and_colours():
    assert plotting.class_name(2, plotting.BRATS_CLASSES) == "oedema"
    assert plotting.class_name(2, {4: "liver"}) == "class 2"
    assert plotting.class_name(0, None) == "background"
    assert plotting.class_colour(8) == plotting.class_colour(1) != plotting.class_colour(0)
    assert len({plotting.class_colour(k) for k in range(8)}) == 8


# ----------------------------------------------------------------------------------------------------------- figures


def shown(figure: Figure) -> list[np.ndarray]:
    return [np.asarray(axes.images[0].get_array()) for axes in figure.axes]


def legend_texts(figure: Figure) -> list[str]:
    return [text.get_text() for legend in figure.legends for text in legend.get_texts()]


def test_slices_by_channel():
    case = make_case(info={"classes": {1: "ball"}})
    figure = plotting.slices(case, overlays=np.roll(case.label, 2, axis=0))
    assert [axes.get_title() for axes in figure.axes] == ["flair", "t1c"]
    layers = as_overlays(np.roll(case.label, 2, axis=0), case.shape, case.label)
    layers = [o._replace(array=cut(o.array, AXIAL, 3)) for o in layers]
    expected = paint(cut(case.image[1], AXIAL, 3), plotting.default_window(case.image[1]), layers[:1])
    assert (shown(figure)[1] == expected).all()
    assert legend_texts(figure) == ["ball", "prediction (outline)"]
    assert [t.get_text() for t in figure.axes[0].texts] == list("RLAP")


def test_slices_by_overlay_one_row_per_case():
    cases = [make_case("a"), make_case("b", shape=(8, 10, 8))]
    predictions = [{"net": cases[0].label}, {"net": np.zeros(cases[1].shape, int)}]
    figure = plotting.slices(cases, overlays=predictions, columns="overlays", plane="coronal", letters=False)
    assert [axes.get_title() for axes in figure.axes] == ["flair", "truth", "net", "", "", ""]
    plain, truth, net, plain_b, truth_b, net_b = shown(figure)
    assert (truth == net).all() and (plain != truth).any()  # side by side both are areas
    assert (plain_b == net_b).all() and (plain_b != truth_b).any()
    assert figure.axes[0].get_ylabel() == "a\ncoronal 5" and figure.axes[3].get_ylabel() == "b\ncoronal 5"
    assert not figure.axes[0].texts


def test_slices_keep_the_shape_of_voxels_and_take_options():
    case = make_case(affine=np.diag([1, 2, 3, 1]))
    figure = plotting.slices(case, (0, 0, 0), channels=["t1c"], plane="sagittal", windows={"t1c": (0, 1000)}, opacity=1)
    assert figure.axes[0].get_aspect() == pytest.approx(3 / 2)
    assert shown(figure)[0].max() <= 5
    figure.canvas.draw()


def test_slices_are_packed_and_fit_on_a_page():
    names = ("flair", "t1c", "t1", "t2", "dwi", "adc")
    case = make_case()
    wide = Case(image=np.repeat(case.image[:1], 6, axis=0), channels=names, name="six", label=case.label)
    figure = plotting.slices([wide, wide])
    assert figure.get_figwidth() * 110 <= 849
    figure.canvas.draw()
    boxes = [axes.get_window_extent() for axes in figure.axes]
    assert boxes[0].y0 - boxes[6].y1 < 10 > boxes[1].x0 - boxes[0].x1  # pixels between rows and columns
    (legend,) = figure.legends
    assert 0 <= boxes[6].y0 - legend.get_window_extent().y1 < 20
    assert all(text.get_fontsize() >= 8 for text in figure.findobj(mpl.text.Text) if text.get_text())


def test_slices_say_where_nothing_is_marked():
    case = make_case()
    empty = case.replace(label=np.zeros_like(case.label))
    alone = plotting.slices(empty, overlays={"net": case.label}, columns="overlays", letters=False)
    assert [[t.get_text() for t in axes.texts] for axes in alone.axes] == [[], ["(none in this slice)"], []]
    together = plotting.slices(empty, (0, 0, 0), overlays={"net": case.label}, letters=False)
    assert [t.get_text() for t in together.axes[0].texts] == ["truth: none in this slice\nnet: none in this slice"]
    assert not together.legends


def test_slices_legend_has_an_icon_of_its_own_for_each_thing():
    case = make_case(info={"classes": {1: "ball"}})
    figure = plotting.slices(case, overlays={name: case.label for name in ("a", "b", "c")})
    icons = figure.legends[0].legend_handles
    assert legend_texts(figure) == ["ball", "a (outline)", "b (dashed outline)", "c (dotted outline)"]
    lines = [(icon.get_color(), icon.get_linestyle(), icon._dash_pattern) for icon in icons[1:]]
    assert len({str(line[2]) for line in lines}) == 3 and len({line[0] for line in lines}) == 3
    drawn = [c.get_edgecolor()[0, :3].round(3).tolist() for c in figure.axes[0].collections if c.get_segments()]
    for colour, _, _ in lines:
        assert np.round(mpl.colors.to_rgb(colour), 3).tolist() in drawn
    probable = {"x": np.full(case.shape, 0.5), "y": np.full(case.shape, 0.2)}
    assert legend_texts(plotting.slices(case, overlays=probable, columns="overlays")) == ["ball", "probability, 0 to 1"]


@pytest.mark.parametrize(
    ["arguments", "message"],
    [
        (dict(cases=[]), "at least one case"),
        (dict(cases=make_case(), columns="rows"), "expected 'channels' or 'overlays'"),
        (dict(cases=make_case(), channels=["t2"]), "ball has no t2; its channels are flair, t1c"),
        (dict(cases=[make_case()], overlays={"a": 1}), "a list with one entry for each of the 1 cases"),
        (dict(cases=make_case(), position=(1, 2)), "three whole voxel indices"),
    ],
)
def test_slices_rejects(arguments, message):
    with pytest.raises(ValueError, match=message):
        plotting.slices(**arguments)


def test_history_groups_curves_and_skips_gaps():
    frame = pd.DataFrame(
        {
            "step": [1, 2, 3, 4],
            "loss": [4.0, 3, 2, 1],
            "learning_rate": [0.1, 0.1, 0.01, 0.01],
            "dice_whole": [np.nan, 0.5, np.nan, 0.8],
            "dice_core": [np.nan, 0.4, np.nan, 0.6],
            "note": list("abcd"),
            "empty": np.nan,
        }
    )
    figure = plotting.history(frame)
    assert [axes.get_title() for axes in figure.axes] == ["loss", "learning rate", "dice"]
    whole, core = figure.axes[2].lines
    assert whole.get_xydata().tolist() == [[2, 0.5], [4, 0.8]]
    assert (whole.get_label(), core.get_label()) == ("whole", "core")
    assert whole.get_linestyle() != core.get_linestyle()  # not by colour alone
    assert figure.axes[1].get_yscale() == "log"


@pytest.mark.parametrize(
    "frame", [pd.DataFrame({"loss": [1.0]}), pd.DataFrame({"step": [1]}), pd.DataFrame({"step": [1], "note": ["a"]})]
)
def test_history_rejects(frame):
    with pytest.raises(ValueError, match="'step'"):
        plotting.history(frame)


def test_intensities_by_class_with_fitted_normals():
    rng = np.random.default_rng(0)
    label = np.repeat([0, 1, -1], 4000)  # the last are void
    raw = np.concatenate([rng.normal(900, 50, 4000), rng.normal(400, 20, 4000), np.full(4000, 1e6)])
    figure = plotting.intensities({"input": raw, "after": raw / 100 - 5}, label, classes=("cell", "membrane"), bins=40)
    assert [axes.get_title() for axes in figure.axes] == ["input", "after", "", ""]
    assert [axes.get_ylabel() for axes in figure.axes] == ["cell", "", "membrane", ""]
    texts = [[t.get_text() for t in axes.texts] for axes in figure.axes]
    assert [t[0] for t in texts] == ["(a)", "(b)", "(c)", "(d)"]
    found = [[float(word.split()[1]) for word in t[1].split("\n")] for t in texts]
    np.testing.assert_allclose(found, [[900, 50], [4, 0.5], [400, 20], [-1, 0.2]], rtol=0.03)
    cell = figure.axes[0]
    heights, left = [p.get_height() for p in cell.patches], [p.get_x() for p in cell.patches]
    assert len(heights) == 40 and abs(left[int(np.argmax(heights))] - 900) < 40
    x, y = cell.lines[0].get_data()
    assert abs(x[y.argmax()] - 900) < 5 and (y.sum() * (x[1] - x[0])) == pytest.approx(1, abs=0.02)
    assert cell.get_xlim()[1] < 2000  # nothing of the void


def test_intensities_of_a_constant_and_of_the_wrong_shape():
    figure = plotting.intensities({"flat": np.full(9, 3.0)}, np.zeros(9, int))
    assert not figure.axes[0].lines and figure.axes[0].get_ylabel() == "background"
    with pytest.raises(ValueError, match=r"stage 'after' has shape \(2,\); expected that of the label, \(3,\)"):
        plotting.intensities({"input": np.zeros(3), "after": np.zeros(2)}, np.zeros(3, int))
    with pytest.raises(ValueError, match="needs at least one of each"):
        plotting.intensities({}, np.zeros(3, int))


def test_paper_table_names_its_data_and_degrades_to_text():
    ours = pd.DataFrame({"Dice": [0.811, np.nan]}, index=["whole", "<b>core</b>"])
    paper = pd.DataFrame({"Dice": [0.9]}, index=["whole"])
    table = plotting.paper_table(ours, paper, ours_on="24 phantoms & <i>", paper_on="BRATS 2015")
    assert "ours (24 phantoms & <i>)" in repr(table) and "paper (BRATS 2015)" in repr(table)
    assert "0.81" in repr(table) and "0.811" not in repr(table) and "–" in repr(table)
    page = table._repr_html_()
    assert "&lt;i&gt;" in page and "<b>core" not in page and page.count("<table") == 2
    with pytest.raises(ValueError, match="paper_on is empty"):
        plotting.paper_table(ours, paper, ours_on="x", paper_on=" ")


def test_style_is_local():
    before = dict(mpl.rcParams)
    plotting.slices(make_case())
    with plotting.style():
        assert mpl.rcParams["legend.frameon"] is False
    assert dict(mpl.rcParams) == before
    assert not plt.get_fignums()


def test_pictures_have_neither_frame_nor_ticks():
    _, panels = plt.subplots(1, 2)
    plotting.picture(panels)
    plotting.picture(panels[0])
    assert not any(spine.get_visible() for axes in panels for spine in axes.spines.values())
    assert not any(axes.get_xticks().size for axes in panels)
    plt.close()


# ----------------------------------------------------------------------------------------------------- small drawings


@pytest.fixture
def axes():
    yield plt.subplots(layout="constrained")[1]
    plt.gcf().canvas.draw()
    plt.close()


def test_curves_are_told_apart_by_colour_dash_and_marker(axes):
    gap = pd.Series([1.0, np.nan, 3.0], index=[10, 20, 30])
    plotting.curves(axes, {"a": gap, "b": ([0, 1], [2, 3])}, colours={"b": "#123456"})
    a, b = axes.lines
    assert a.get_xydata().tolist() == [[10, 1], [30, 3]] and b.get_color() == "#123456"
    assert a.get_marker() != b.get_marker() and a.get_linestyle() != b.get_linestyle()
    assert [t.get_text() for t in axes.get_legend().get_texts()] == ["a", "b"]


def test_calibration_shows_the_diagonal(axes):
    plotting.calibration(axes, {"net": ([0.1, 0.9], [0.2, 0.7])})
    assert [line.get_label() for line in axes.lines] == ["calibrated", "net"]
    assert axes.get_xlim() == axes.get_ylim() == (0, 1)


def test_bars_write_zeros_and_gaps(axes):
    table = pd.DataFrame({"A": [0.5, 0], "B": [0.25, np.nan]}, index=["core", "oedema"])
    plotting.bars(axes, table, points={("core", "A"): [0.4, 0.6]})
    assert sorted(t.get_text() for t in axes.texts) == ["0.00", "0.25", "0.50", "–"]
    assert [t.get_text() for t in axes.get_xticklabels()] == ["core", "oedema"]
    first, second = axes.containers
    assert first[0].get_hatch() != second[0].get_hatch()
    assert axes.lines[0].get_ydata().tolist() == [0.4, 0.6]
    assert [t.get_text() for t in axes.get_legend().get_texts()] == ["A", "B"]


def test_maps_have_a_scale_by_their_kind(axes):
    values = np.array([[-3.0, 1.0]])
    signed = plotting.map_with_scale(axes, values, "signed", label="weight")
    assert signed.get_clim() == (-3, 3) and signed.get_cmap() is plotting.SIGNED
    assert axes.figure.axes[1].get_ylabel() == "weight"
    plain = dict(scale=False)
    assert plotting.map_with_scale(axes, values, "unsigned", **plain).get_clim() == (-3, 1)
    assert plotting.map_with_scale(axes, values + 3, "unsigned", **plain).get_clim() == (0, 4)
    assert plotting.map_with_scale(axes, values, "signed", limits=2, **plain).get_clim() == (-2, 2)
    assert plotting.map_with_scale(axes, values / 9, "probability", **plain).get_clim() == (0, 1)
    assert len(axes.figure.axes) == 2
    with pytest.raises(ValueError, match="kind='grey'; expected one of probability, signed, unsigned"):
        plotting.map_with_scale(axes, values, "grey")


def test_field_lies_round_its_voxel_and_its_name_outside(axes):
    plotting.field(axes, (10, 20), 5, text="5²", corner="lower left")
    (box,), (text,) = axes.patches, axes.texts
    assert (box.get_xy(), box.get_width(), box.get_height()) == ((7.5, 17.5), 5, 5)
    assert text.xy == (7.5, 22.5) and text.get_ha() == "right" and text.get_va() == "top"


def test_block_diagram_draws_arrows_from_border_to_border(axes):
    boxes = {"in": (0, 0, "image"), "join": (1, 0, "+"), "out": (2, 0, "classes", "#cfe5f5")}
    plotting.block_diagram(axes, boxes, [("in", "join"), ("join", "out", "5 maps")])
    texts = [t.get_text() for t in axes.texts]
    assert [t for t in texts if t] == ["image", "+", "classes", "5 maps"]
    axes.figure.canvas.draw()
    arrow = axes.texts[3].arrow_patch
    ends = arrow.get_transform().transform(arrow.get_path().vertices)[:-1, 0]
    image, join = (t.get_bbox_patch().get_window_extent() for t in axes.texts[:2])
    assert image.x1 <= ends.min() + 3 and ends.max() <= join.x0 + 3


def test_class_legend_follows_the_names(axes):
    legend = plotting.class_legend(axes.figure, ("background", "oedema", "core"))
    assert [t.get_text() for t in legend.get_texts()] == ["oedema", "core"]
    colours = [mpl.colors.to_hex(h.get_facecolor()).upper() for h in legend.legend_handles]
    assert colours == [plotting.class_colour("oedema"), plotting.class_colour("core")]


def test_draw_slice_turns_paints_and_outlines(axes):
    case = make_case()
    overlays = as_overlays({"net": case.label}, case.shape, case.label)
    plotting.draw_slice(axes, case.image[0], "axial", 3, overlays=overlays, letters=True, voxel_size=(1, 2, 1))
    layer = overlays[0]._replace(array=cut(case.label, AXIAL, 3))
    assert (shown(axes.figure)[0] == paint(cut(case.image[0], AXIAL, 3), plotting.default_window(case.image[0]), [layer])).all()
    assert axes.get_aspect() == 2 and len(axes.texts) == 4
    assert [c.get_edgecolor()[0, :3].tolist() for c in axes.collections][1] == list(mpl.colors.to_rgb(overlays[1].colour))


# ----------------------------------------------------------------------------------------------------------- showing


def test_show_saves_inside_the_style_and_writes_the_caption_once(monkeypatch):
    calls = []
    monkeypatch.setattr(plotting.figures, "display", lambda data, **options: calls.append(data))
    found = []
    figure = Figure()
    monkeypatch.setattr(figure, "savefig", lambda *a, **k: found.append(mpl.rcParams["legend.frameon"]))
    with mpl.rc_context({"legend.frameon": True}):
        plotting.show(figure, "A ball on the left.", caption="A <ball>.")
    assert found == [False]
    picture, caption = calls
    assert set(picture) == {"image/png", "text/plain"} and caption["text/plain"] == "A <ball>."
    assert caption["text/html"].count("A &lt;ball&gt;.") == 1 and "on the left" not in caption["text/html"]


def test_show_writes_the_alt_text_that_nbconvert_puts_on_the_image(monkeypatch):
    calls = []
    monkeypatch.setattr(plotting.figures, "display", lambda data, **options: calls.append((data, options)))
    figure, _ = plt.subplots()
    plotting.show(figure, 'A ball,\n  "large" & <round>')
    assert not plt.get_fignums()
    (data, options), (caption, _) = calls
    assert options == {"metadata": {"image/png": {"alt": 'A ball, "large" & <round>'}}, "raw": True}

    from nbconvert import HTMLExporter

    output = nbformat.v4.new_output("display_data", data=data, metadata=options["metadata"])
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("x", outputs=[output])])
    assert caption["text/html"].count("A ball, &quot;large&quot; &amp; &lt;round&gt;") == 1
    page, _ = HTMLExporter(template_name="classic").from_notebook_node(notebook)
    found = []
    parser = HTMLParser()
    parser.handle_startendtag = parser.handle_starttag = lambda tag, attributes: found.append((tag, dict(attributes)))
    parser.feed(page)
    assert [a["alt"] for tag, a in found if tag == "img"] == ['A ball, "large" & <round>']


@pytest.mark.parametrize("alt", ["", "  ", None])
def test_show_needs_alt_text(alt):
    with pytest.raises(ValueError, match="alt is empty; describe"):
        plotting.show(Figure(), alt)


@pytest.mark.parametrize("shape", [(1024, 1024, 20), (1000, 1000, 3), (7, 1000, 1000), (1 << 21,)])
def test_display_ranges_come_from_the_whole_volume(shape):
    """Slices grow brighter along the last axis; where every n-th voxel lies in one slice, it is no sample."""
    ramp = np.linspace(0.02, 1, shape[-1], dtype=np.float32)
    volume = np.random.default_rng(0).normal(100, 20, shape).astype(np.float32) * ramp
    low, high = plotting.default_window(volume)
    right = np.percentile(volume, (0.5, 99.5))
    assert low == pytest.approx(right[0], abs=0.2) and high == pytest.approx(right[1], rel=0.02)
    sample = plotting.draw_sample(volume, 10_000)
    assert sample.shape == (10_000,) and np.array_equal(sample, plotting.draw_sample(volume, 10_000))
    small = np.arange(24.0).reshape(2, 3, 4)
    assert np.array_equal(plotting.draw_sample(small), small.reshape(-1))


def test_intervals_stand_beside_their_names(axes):
    Found = namedtuple("Found", "mean low high")
    rows = {"a": {"needed": Found(0.5, 0.4, 0.8), "not": Found(0.9, 0.8, 1.0)}, "b": {"needed": Found(0.1, 0.0, 0.2)}}
    plotting.intervals(axes, rows)
    assert [text.get_text() for text in axes.get_yticklabels()] == ["a", "b"]
    needed, other = axes.containers
    assert list(needed[0].get_xdata()) == [0.5, 0.1] and list(other[0].get_xdata()) == [0.9]
    ((start, stop), *_) = [[x for x, _ in segment] for segment in needed[2][0].get_segments()]
    assert (start, stop) == pytest.approx((0.4, 0.8))
    assert needed[0].get_ydata()[1] > needed[0].get_ydata()[0] and axes.yaxis_inverted()  # the first row is on top

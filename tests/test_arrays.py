"""Arrays as they come: every function gives the same for every kind and layout of array, or says what is wrong."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from medseg_lite import (
    attribution,
    context,
    crf,
    datasets,
    ensembles,
    features,
    files,
    forest,
    inference,
    losses,
    metrics,
    models,
    plotting,
    postprocess,
    sampling,
    transforms,
)
from medseg_lite.arrays import as_array, as_image, as_label, as_mask, as_names, as_tensor
from medseg_lite.volume import Case, array_code
from medseg_lite.widgets import CompareSegmentations, CRFExplorer, SliceViewer

SHAPE = (14, 16, 12)


@pytest.fixture(autouse=True)
def strict(monkeypatch):
    """PyTorch's warning of arrays that cannot be written to is an error here, every time."""
    torch.set_warn_always(True)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*not writable.*")
        yield
    torch.set_warn_always(False)


# ---------------------------------------------------------------------------------------------------- kinds and layouts


def read_only(array):
    array = array.copy()
    array.flags.writeable = False
    return array


def every_other(array):
    wide = np.zeros((*array.shape[:-1], 2 * array.shape[-1]), array.dtype)
    wide[..., ::2] = array
    return wide[..., ::2]


def mapped(array, folder):
    path = folder / f"{array_code(array)}.npy"
    np.save(path, array)
    return np.load(path, mmap_mode="r")


def unaligned(array):
    packed = np.zeros(array.shape, [("pad", "u1"), ("value", array.dtype)])
    packed["value"] = array
    return packed["value"]


LAYOUTS = {
    "plain": np.array,
    "Fortran order": np.asfortranarray,
    "negative strides": lambda a: a[..., ::-1, :].copy()[..., ::-1, :],
    "read-only": read_only,
    "every other voxel": every_other,
    "unaligned": unaligned,
    "big-endian": lambda a: a.astype(a.dtype.newbyteorder(">")),
    "a list": lambda a: a.tolist(),
    "a tensor": lambda a: torch.from_numpy(a.copy()),
    "a tensor with gradients": lambda a: torch.from_numpy(a.copy()).requires_grad_(a.dtype.kind == "f"),
}
IMAGES = {  # kinds that hold the whole numbers of the test's image
    **{
        kind: (lambda a, kind=kind: a.astype(kind)) for kind in ("uint16", "int16", "int64", "float16", "float64", ">i2", ">f8")
    },
    "bfloat16": lambda a: torch.from_numpy(a.copy()).to(torch.bfloat16),
}
LABELS = {kind: (lambda a, kind=kind: a.astype(kind)) for kind in ("int8", "uint16", "int64", ">u2", "float16", "float64")}
MASKS = {
    **{kind: (lambda a, kind=kind: a.astype(kind)) for kind in ("uint8", "int64", "float32", ">i4")},
    "0 and 255": lambda a: a.astype(np.uint8) * 255,
    "nearly 1": lambda a: a * np.float32(0.99999997),
    "floats of 0 and 255": lambda a: a * 255.0,
}


def make_case(**changes) -> Case:
    rng, grid = np.random.default_rng(0), np.indices(SHAPE)
    label = np.zeros(SHAPE, np.uint8)
    label[3:6, 4:10, 3:8], label[4:6, 5:8, 4:6] = 1, 2
    mask = ((grid - np.reshape(SHAPE, (3, 1, 1, 1)) / 2) ** 2).sum(0) < 40
    label[~mask] = 0
    image = np.rint(rng.normal(120, 4, (2, *SHAPE)) + 40 * label).clip(1, 250) * mask  # bfloat16 holds 8 digits: up to 256
    options = {"image": image.astype(np.float32), "channels": ("flair", "t1c"), "name": "p1", "label": label, "mask": mask}
    return Case(**{**options, **changes})


PLAIN = make_case()
VARIANTS = {
    **{f"all in {name}": {part: change for part in ("image", "label", "mask")} for name, change in LAYOUTS.items()},
    **{f"image of {name}": {"image": change} for name, change in IMAGES.items()},
    **{f"label of {name}": {"label": change} for name, change in LABELS.items()},
    **{f"mask of {name}": {"mask": change} for name, change in MASKS.items()},
}


def variant(name: str) -> Case:
    parts = {"image": PLAIN.image, "label": PLAIN.label, "mask": PLAIN.mask}
    return PLAIN.replace(**{part: change(parts[part]) for part, change in VARIANTS[name].items()})


@pytest.mark.parametrize("name", VARIANTS)
def test_a_case_of_any_arrays(name):
    case = variant(name)
    assert (case.image.dtype, case.label.dtype, case.mask.dtype) == (np.float32, np.uint8, bool)
    for part in ("image", "label", "mask"):
        array = vars(case)[part]
        assert type(array) is np.ndarray and array.dtype.isnative and all(step > 0 for step in array.strides)
        np.testing.assert_array_equal(array, vars(PLAIN)[part])
    assert case.code() == PLAIN.code()


def test_arrays_of_the_right_kind_are_shared():
    image, label, mask = PLAIN.image.copy(), PLAIN.label.copy(), PLAIN.mask.copy()
    case = make_case(image=image, label=label, mask=mask).replace(name="p2").select(["flair", "t1c"])
    assert np.shares_memory(case.label, label) and np.shares_memory(case.mask, mask)
    assert make_case(image=image).image is image
    turned = np.asfortranarray(image)
    assert make_case(image=turned).image is turned


# -------------------------------------------------------------------------------- functions that take a case or an array


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    return models.deepmedic(in_channels=2, classes=3, width=0.1).eval()


@pytest.fixture(scope="module")
def flat_network():
    torch.manual_seed(0)
    return models.unet2d(in_channels=2, classes=3, width=0.1).eval()


@pytest.fixture(scope="module")
def probabilities():
    rng = np.random.default_rng(1)
    p = rng.random((3, *SHAPE)).astype(np.float32)
    return p / p.sum(0)


def segments(case):
    sampler = sampling.SegmentSampler([case], output=4, margin=3, batch_size=4, shift=0.1)
    batch = sampler.batch(0)
    return batch.inputs, batch.label, sampler.describe()["cases"]


def volumes(case, **options):
    batch = sampling.VolumeSampler([case], augment=transforms.augment, **options).batch(0)
    return batch.inputs, batch.label


def trained_forest(case):
    model = forest.RandomForest(forest.BoxFeatures(2, count=6), trees=3, depth=4).fit([case], points_per_case=60)
    return model.predict(case, progress=False)


def stored(case, folder):
    found = datasets.store([case], folder, progress=False)[0]
    return found.image, found.label, found.mask, found.counts


def written(case, folder):
    back = files.read_case(
        {c: files.write_case(folder, case) / f"{c}.nii.gz" for c in case.channels}, label=folder / "label.nii.gz"
    )
    return back.image, back.label


def scores(case, folder, network):
    context.extract_scores({"axial": network}, [case], folder, progress=False)
    return context.with_scores(case, folder, planes=["axial"]).image


def viewed(case):
    viewer = SliceViewer(case, {"prediction": case.label})
    return viewer._scene, viewer._volumes, viewer._limits


FUNCTIONS = {
    "standardise": lambda case, **_: transforms.standardise(case).image,
    "rescale": lambda case, **_: transforms.rescale(case).image,
    "equalise": lambda case, **_: transforms.equalise(case).image,
    "median_normalise": lambda case, **_: transforms.median_normalise(case).image,
    "complete": lambda case, **_: transforms.complete(case, ["t2", "flair", "t1c"]).image,
    "mirror_healthy": lambda case, **_: transforms.mirror_healthy(case).image,
    "crop": lambda case, **_: case.crop((slice(2, 9), slice(3, 12), slice(1, 8))).label,
    "relabelled": lambda case, **_: case.relabelled({2: 1}).label,
    "groups": lambda case, **_: [case.count(g) for g in ("mask", "labelled", "background", "class 2")],
    "std": lambda case, **_: case.std,
    "SegmentSampler": lambda case, **_: segments(case),
    "VolumeSampler": lambda case, **_: volumes(case),
    "crops": lambda case, **_: volumes(case, crop=8, batch_size=2),
    "predict": lambda case, network, **_: inference.predict(network, case, output="logits", progress=False),
    "predict slices": lambda case, flat_network, **_: inference.predict(flat_network, case, output="logits", progress=False),
    "evaluate": lambda case, **_: metrics.evaluate_cohort([PLAIN.label], [case], regions={"a": 1, "b": [1, 2]}, use_mask=True),
    "forest": lambda case, **_: trained_forest(case),
    "refine": lambda case, probabilities, **_: crf.DenseCRF(iterations=2).refine(probabilities, case),
    "whole_tumour": lambda case, probabilities, **_: crf.whole_tumour(crf.DenseCRF(iterations=2), probabilities, case),
    "search": lambda case, probabilities, **_: (
        crf.search([case], [probabilities], trials=1, iterations=1, progress=False).table
    ),
    "remove_flat_components": lambda case, **_: postprocess.remove_flat_components(PLAIN.label, case),
    "facing": lambda case, **_: context.facing(case, "sagittal").image,
    "store": lambda case, tmp_path, **_: stored(case, tmp_path),
    "write": lambda case, tmp_path, **_: written(case, tmp_path),
    "scores": lambda case, tmp_path, flat_network, **_: scores(case, tmp_path, flat_network),
    "capture": lambda case, network, **_: (
        next(iter(features.capture(network, case, layers="*0*", progress=False).values())).data
    ),
    "grad_cam": lambda case, network, **_: attribution.grad_cam(network, case, "normal.0", 1, where=case.mask).data,
    "default_window": lambda case, **_: plotting.default_window(case.image[0], case.mask),
    "SliceViewer": lambda case, **_: viewed(case),
    "CompareSegmentations": lambda case, **_: CompareSegmentations(case, {"a": PLAIN.label})._volumes,
}


def assert_same(found, expected):
    if isinstance(expected, (tuple, list)):
        assert len(found) == len(expected)
        for a, b in zip(found, expected):
            assert_same(a, b)
    elif isinstance(expected, (np.ndarray, torch.Tensor)):
        np.testing.assert_array_equal(np.asarray(found), np.asarray(expected))
    elif hasattr(expected, "equals"):
        assert found.equals(expected)
    else:
        assert found == expected


# Layouts matter to all functions. Kinds are settled when the case is made, so one of each will do.
FEW = [f"all in {name}" for name in ("Fortran order", "read-only", "big-endian", "negative strides")]


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions_of_a_case(name, tmp_path, network, flat_network, probabilities):
    given = {"network": network, "flat_network": flat_network, "probabilities": probabilities}
    expected = FUNCTIONS[name](PLAIN, tmp_path=tmp_path / "plain", **given)
    for n, which in enumerate([*FEW, "image of int16", "mask of uint8"]):
        assert_same(FUNCTIONS[name](variant(which), tmp_path=tmp_path / str(n), **given), expected)


def test_influence_of_an_image_in_any_layout(network):
    image = np.random.default_rng(0).normal(size=(2, 54, 54, 54)).astype(np.float32)
    expected = context.influence({}, network, Case(image, ("a", "b")), (27, 27, 27), class_number=1)
    for name in ("read-only", "negative strides", "big-endian"):
        case = Case(LAYOUTS[name](image), ("a", "b"))
        np.testing.assert_array_equal(context.influence({}, network, case, (27, 27, 27), class_number=1), expected)


BINARY = PLAIN.label > 0
OTHER = np.roll(BINARY, 1, 0)
SPACING = (1.0, 1.0, 2.0)
FLOATS = ("plain", "float64", *LAYOUTS)


def with_bare(name: str, *arrays):
    """Return arrays in a layout, or of a kind."""
    change = LAYOUTS.get(name) or (lambda a: a.astype(name))
    return [change(a) for a in arrays]


@pytest.mark.parametrize("name", [*LAYOUTS, "uint8", "int64", "float32", ">i2"])
def test_metrics_of_any_mask(name):
    prediction, truth = with_bare(name, OTHER, BINARY)
    for metric in (metrics.dice, metrics.jaccard, metrics.precision, metrics.sensitivity, metrics.specificity):
        assert metric(prediction, truth) == metric(OTHER, BINARY)
    assert metrics.volume_difference(prediction, truth) == metrics.volume_difference(OTHER, BINARY)
    for metric in (metrics.assd, metrics.hausdorff):
        assert metric(prediction, truth, spacing=SPACING) == metric(OTHER, BINARY, spacing=SPACING)
    assert_same(metrics.surface(prediction), metrics.surface(OTHER))
    for metric in (metrics.v_rand, metrics.v_info):  # every slice needs a cell
        cut = [a[..., 4:7] if isinstance(a, (np.ndarray, torch.Tensor)) else np.array(a)[..., 4:7] for a in (prediction, truth)]
        assert metric(*cut) == pytest.approx(metric(OTHER[..., 4:7], BINARY[..., 4:7]))
    assert_same(postprocess.largest_component(prediction), postprocess.largest_component(as_array(prediction)))


@pytest.mark.parametrize("name", [*LAYOUTS, "uint16", "int64", ">i4"])
def test_functions_of_any_label(name):
    a, b = with_bare(name, PLAIN.label, np.roll(PLAIN.label, 1, 1))
    regions = {"one": 1, "both": [1, 2]}
    expected = metrics.evaluate(PLAIN.label, np.roll(PLAIN.label, 1, 1), regions=regions, spacing=SPACING)
    assert metrics.evaluate(a, b, regions=regions, spacing=SPACING).equals(expected)
    assert metrics.count_borders(a, axis=0) == metrics.count_borders(PLAIN.label, axis=0)
    assert metrics.slice_inconsistency(a, axis=2) == metrics.slice_inconsistency(PLAIN.label, axis=2)
    assert_same(np.asarray(postprocess.largest_component(a)), postprocess.largest_component(PLAIN.label))
    vote = ensembles.hierarchical_vote([a, b], labels=(1, 2, 3))
    assert_same(vote, ensembles.hierarchical_vote([PLAIN.label, np.roll(PLAIN.label, 1, 1)], labels=(1, 2, 3)))


@pytest.mark.parametrize("name", [*LAYOUTS, "float64", "float16", ">f4"])
def test_the_crf_takes_any_probabilities(name, probabilities):
    if name == "float16":
        probabilities = probabilities.astype(np.float16).astype(np.float32)
    (given,) = with_bare(name, probabilities)
    model = crf.DenseCRF(iterations=1)
    assert_same(model.refine(given, PLAIN), model.refine(probabilities, PLAIN))
    assert_same(crf.whole_tumour(model, given, PLAIN), crf.whole_tumour(model, probabilities, PLAIN))


@pytest.mark.parametrize("kind", [torch.uint8, torch.int16, torch.float16, torch.float32])
def test_the_crf_as_a_layer_takes_any_image(kind):
    image, model = torch.from_numpy(PLAIN.image)[None], crf.DenseCRF(iterations=1, intensity_sigma=30)
    logits = torch.stack([torch.zeros(SHAPE), torch.from_numpy(BINARY).float()])[None]
    assert_same(model(logits, image.to(kind)).detach(), model(logits, image).detach())
    assert_same(model(logits.to(torch.int32), image).detach(), model(logits, image).detach())


@pytest.mark.parametrize("kind", [torch.uint8, torch.int16, torch.int32])
@pytest.mark.parametrize(
    "loss",
    [
        losses.cross_entropy,
        losses.jaccard_distance,
        losses.dice_loss,
        lambda z, t: losses.balanced_cross_entropy(z, t, target_weights=np.array([0.5, 0.3, 0.2])),
        lambda z, t: losses.cross_entropy(z, t, mask=t > 0, class_weights=np.array([1.0, 2.0, 3.0])),
    ],
)
def test_losses_take_targets_of_any_integers(loss, kind):
    logits = torch.randn(2, 3, 4, 5, generator=torch.Generator().manual_seed(0))
    target = torch.arange(40).view(2, 4, 5) % 3
    assert loss(logits, target.to(kind)) == loss(logits, target)
    with pytest.raises(ValueError, match=r"the target holds torch\.float32; expected class numbers"):
        loss(logits, target.float())


def test_the_crf_explorer_takes_any_probabilities(probabilities):
    for name in set(LAYOUTS) - {"a tensor with gradients"}:
        CRFExplorer(PLAIN, LAYOUTS[name](probabilities[:2] / probabilities[:2].sum(0)), iterations=1)


# ---------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    "part, value, message",
    [
        ("mask", PLAIN.mask * 2, "p1: the mask holds 2; expected 0 and 1, or 0 and 255, or a bool array. Compare it first"),
        ("mask", PLAIN.mask * 0.5, "p1: the mask holds 0.5;"),
        ("mask", PLAIN.mask.astype(np.int8) * -1, "p1: the mask holds -1;"),
        ("mask", np.where(PLAIN.mask, np.nan, 0), "p1: the mask holds nan;"),
        ("mask", PLAIN.mask.astype(str), "p1: the mask holds <U5; expected 0 and 1, or a bool array"),
        ("mask", PLAIN.mask * np.uint8(254), "p1: the mask holds 254;"),
        ("label", PLAIN.label.astype(int) - 1, "p1: the label holds classes -1 to 1; expected 0 to 255"),
        ("label", PLAIN.label * np.uint16(200), "p1: the label holds classes 0 to 400; expected 0 to 255"),
        ("label", PLAIN.label * 0.5, "p1: the label holds 0.5, not a whole class number"),
        ("label", np.where(PLAIN.label, np.nan, 0), "p1: the label has NaN or infinite values"),
        ("label", PLAIN.label.astype(complex), "p1: the label holds complex128; expected whole class numbers"),
        ("label", PLAIN.label.astype(object), "p1: the label holds object; expected whole class numbers"),
        ("image", np.where(PLAIN.mask, np.nan, PLAIN.image), rf"p1, flair has {PLAIN.mask.sum()} NaN or infinite voxels"),
        (
            "image",
            PLAIN.image.astype(np.float64) * 1e300,
            r"p1: the image has intensities up to 2.*e\+302, too large for float32; divide",
        ),
        ("image", PLAIN.image.astype(complex), "p1: the image holds complex128; expected real numbers"),
        ("image", PLAIN.image.astype(object), "p1: the image holds object; expected real numbers"),
        ("image", None, "p1: the image holds object; expected real numbers"),
        ("image", np.ma.masked_less(PLAIN.image, 2), r"p1: the image is a masked array; fill the masked voxels first"),
    ],
)
def test_what_no_case_is_made_of(part, value, message):
    with np.errstate(invalid="ignore"), pytest.raises(ValueError, match=message):
        make_case(**{part: value})
    with pytest.raises(ValueError, match=message):
        PLAIN.replace(**{part: value})
    case = make_case()
    with pytest.raises(ValueError, match=message):
        setattr(case, part, value)
    assert vars(case)[part].shape == vars(PLAIN)[part].shape  # it is as it was


def test_assignments_go_through_the_same_door():
    case = make_case()
    case.mask, case.label = PLAIN.mask.astype(np.uint8) * 255, PLAIN.label.astype(np.float64)
    assert case.mask.dtype == bool and case.label.dtype == np.uint8
    case.image = PLAIN.image.astype(np.int16)
    assert case.image.dtype == np.float32
    case.label = case.mask = None
    case.channels, case.name, case.affine = ["a", "b"], 7, np.eye(4, dtype=int).tolist()
    assert case.channels == ("a", "b") and case.name == "7" and case.affine.dtype == np.float64
    with pytest.raises(ValueError, match=r"7: the mask is 2×2×2 but the image is 14×16×12.*in one call of replace"):
        case.mask = np.ones((2, 2, 2), bool)
    with pytest.raises(ValueError, match="7: 1 channels but 2 names"):
        case.image = case.image[:1]
    with pytest.raises(TypeError, match="a case has no lable"):
        case.replace(lable=PLAIN.label)
    case.info = {"site": "A"}
    assert case.replace(name="x").info is case.info


def test_maps_of_a_case_have_its_grid():
    case = make_case(extra={"wm": torch.ones(SHAPE), "none": None})
    assert type(case.extra["wm"]) is np.ndarray
    with pytest.raises(ValueError, match="p1: the wm is 3×3×3 but the image is 14×16×12"):
        make_case(extra={"wm": np.ones((3, 3, 3))})
    with pytest.raises(ValueError, match="p1: the affine holds NaN or infinite values"):
        make_case(affine=np.full((4, 4), np.nan))


@given(
    array=hnp.arrays(st.sampled_from(["u1", "i2", ">i4", "i8", "f2", "f4", ">f8"]), (3, 2), elements=st.integers(0, 255)),
    reverse=st.booleans(),
)
@settings(max_examples=60, deadline=None)
def test_whole_numbers_become_labels(array, reverse):
    array = array[::-1] if reverse else array
    label = as_label(array)
    assert label.dtype == np.uint8 and np.array_equal(label, array) and np.array_equal(as_image(array), array)
    assert as_tensor(label).tolist() == array.tolist() == as_array(array).tolist()


@given(hnp.arrays(st.sampled_from(["i2", "f4", "f8"]), (2, 3), elements=st.integers(-300, 600)))
@settings(max_examples=60, deadline=None)
def test_masks_are_0_and_1_or_refused(array):
    values = set(np.unique(array).tolist())
    if values <= {0, 1} or values <= {0, 255}:
        assert np.array_equal(as_mask(array), array > 0)
    else:
        with pytest.raises(ValueError, match="the mask holds"):
            as_mask(array)


def test_names():
    assert as_names("flair") == ("flair",) and as_names(["a", 1, np.str_("b")]) == ("a", "1", "b")
    assert all(type(name) is str for name in as_names(np.array(["a", "b"])))
    case = Case(PLAIN.image[:1], "ct")
    assert case.channels == ("ct",)
    for names, message in ((("a", "a"), "2 channels are called 'a'; give each"), (("a", " "), "give each a name")):
        with pytest.raises(ValueError, match=message):
            Case(PLAIN.image, names)
    with pytest.raises(ValueError, match="2 channels are called 'flair'"):
        PLAIN.select(["flair", "flair"])
    with pytest.raises(ValueError, match="2 channels are called 't2'"):
        transforms.complete(PLAIN, ["flair", "t1c", "t2", "t2"])

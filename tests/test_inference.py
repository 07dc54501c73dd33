from __future__ import annotations

import numpy as np
import pytest
import torch
from monai.inferers import sliding_window_inference

from medseg_lite import inference, models
from medseg_lite.engine import tiles
from medseg_lite.inference import predict
from medseg_lite.volume import Case

SHAPES = [(12, 15, 9), (13, 11, 7), (5, 4, 3), (19, 2, 1)]  # multiples of 3, odd, smaller than the context, nearly flat


def logits_of(model, case: Case, **options) -> np.ndarray:
    return predict(model, case, output="logits", progress=False, **options)


def reference(model, case: Case) -> np.ndarray:
    """The plain network on the volume mirrored by numpy, without tiles, masks or rearrangement."""
    dims, grid = model.spatial_dims, model.multiple
    extra = [-n % grid for n in case.shape[:dims]]
    pad = [(0, 0), *((model.margin, model.margin + e) for e in extra)]
    if dims == 2:
        slices = [np.pad(case.image[..., w], pad, mode="reflect") for w in range(case.shape[2])]
        with torch.no_grad():
            out = torch.cat([model(torch.from_numpy(s)[None]) for s in slices]).movedim(0, -1)
    else:
        with torch.no_grad():
            out = model(torch.from_numpy(np.pad(case.image, pad, mode="reflect"))[None])[0]
    return out[(slice(None), *(slice(n) for n in case.shape))].numpy()


def close(a, b) -> None:
    np.testing.assert_allclose(a, b, rtol=0, atol=1e-4)


# ---------------------------------------------------------------------------------------------- the same answer always


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(
    "name",
    [
        "deepmedic",
        "deep_plus",
        "shallow",
        "dm2d_seg",
        "large2d_seg",
        "two_path_cnn",
        "local_cascade_cnn",
        "unet2d",
        "mlynarski_2d",
        "mlynarski_3d",
    ],
)
def test_equals_the_plain_network_on_the_mirrored_volume(network, noise_case, name, shape):
    model, case = network(name), noise_case(shape)
    close(logits_of(model, case), reference(model, case))


@pytest.mark.parametrize("tile", [1, 3, 5, 9, (6, 3, 2), (100, 4, 100)], ids=str)
@pytest.mark.parametrize("name", ["deepmedic", "shallow_plus", "dm2d_seg", "input_cascade_cnn"])
def test_tiles_do_not_change_the_result(network, noise_case, name, tile):
    model, case = network(name), noise_case((10, 8, 7))
    close(logits_of(model, case, tile=tile), reference(model, case))


@pytest.mark.parametrize("name, shape", [("deepmedic", (27, 24, 31)), ("dm2d_seg", (150, 121, 2))])
def test_large_tiles_are_worked_through_in_pieces(network, noise_case, name, shape):
    model, case = network(name), noise_case(shape)
    close(logits_of(model, case, tile=200), reference(model, case))


@pytest.mark.parametrize("name", ["deepmedic", "deep_plus", "dm2d_seg"])
def test_little_memory_means_small_tiles_and_the_same_result(network, noise_case, monkeypatch, name):
    model, case = network(name), noise_case((20, 22, 19))
    whole = logits_of(model, case)
    monkeypatch.setattr(tiles, "workspace", lambda device, most: 1e5)
    assert len(tiles.plan(model, [0] * 3, case.shape, case.shape, torch.device("cpu")).tiles()) > 4
    close(logits_of(model, case), whole)


@pytest.mark.parametrize("name", ["shallow_plus", "deep"])
def test_equals_single_patches_anywhere(network, noise_case, name):
    model, case = network(name), noise_case((9, 10, 11))
    dense = logits_of(model, case)
    m = model.margin
    padded = torch.from_numpy(np.pad(case.image, [(0, 0), *((m, m),) * 3], mode="reflect"))
    for d, h, w in np.random.default_rng(0).integers(case.shape, size=(6, 3)):
        one = model(padded[None, :, d : d + 2 * m + 1, h : h + 2 * m + 1, w : w + 2 * m + 1])
        close(dense[:, d, h, w], one.detach()[0, :, 0, 0, 0])


@pytest.mark.parametrize("name", ["deepmedic", "dm2d_patch"])
def test_equals_single_patches_in_the_middle_of_each_group(network, noise_case, name):
    """Three neighbours share one low-resolution context. A patch of one voxel is centred on that voxel, so only the middle
    voxel of a group has exactly the same context in both."""
    model, case = network(name), noise_case((9, 10, 11))
    dense, m, dims = logits_of(model, case), model.margin, model.spatial_dims
    padded = torch.from_numpy(np.pad(case.image, [(0, 0), *((m, m),) * dims, *((0, 0),) * (3 - dims)], mode="reflect"))
    for d, h, w in np.random.default_rng(0).integers(3, size=(6, 3)) * 3 + 1:
        patch = padded[:, d : d + 2 * m + 1, h : h + 2 * m + 1]
        patch = patch[..., w : w + 2 * m + 1] if dims == 3 else patch[..., w]
        close(dense[:, d, h, w], model(patch[None]).detach().flatten())
        if dims == 3:
            off = model(padded[None, :, d - 1 : d + 2 * m, h : h + 2 * m + 1, w : w + 2 * m + 1]).detach().flatten()
            assert np.abs(dense[:, d - 1, h, w] - off.numpy()).max() > 1e-3


@pytest.mark.parametrize("name, core, overlap", [("deepmedic", 6, 0.88), ("deep_plus", 8, 0.7), ("dm2d_seg", 9, 0.88)])
def test_equals_monais_sliding_window(network, noise_case, name, core, overlap):
    model = network(name)
    case = noise_case((15, 18, 12))
    m, dims = model.margin, model.spatial_dims
    roi = core + 2 * m
    interval = int(roi * (1 - overlap))
    assert 0 < interval <= core and interval % model.multiple == 0  # windows meet, and lie on the network's grid

    def same_size(x):  # MONAI expects as many voxels out as in; the rim counts for nothing
        return torch.nn.functional.pad(model(x), (m,) * (2 * dims))

    weight = torch.zeros(1, 1, *(roi,) * dims)
    weight[(..., *(slice(m, -m),) * dims)] = 1
    image = case.image if dims == 3 else case.image[..., 5]
    padded = torch.from_numpy(np.pad(image, [(0, 0), *((m, m),) * dims], mode="reflect"))[None]
    with torch.no_grad():
        theirs = sliding_window_inference(padded, roi, 4, same_size, overlap=overlap, roi_weight_map=weight)
    theirs = theirs[(0, slice(None), *(slice(m, -m),) * dims)].numpy()
    ours = logits_of(model, case)
    close(theirs, ours if dims == 3 else ours[..., 5])


def test_two_dimensional_networks_see_one_slice_at_a_time(network, noise_case):
    model, case = network("dm2d_seg"), noise_case((9, 12, 5))
    whole = logits_of(model, case)
    for w in range(5):
        single = Case(image=case.image[..., w : w + 1], channels=case.channels)
        close(logits_of(model, single)[..., 0], whole[..., w])


# ------------------------------------------------------------------------------------------------------------- outputs


def test_labels_probabilities_and_logits_agree(network, noise_case):
    model, case = network("dm2d_seg"), noise_case((9, 10, 4))
    scores = logits_of(model, case)
    probabilities = predict(model, case, output="probabilities", progress=False)
    labels = predict(model, case, progress=False)
    assert scores.shape == probabilities.shape == (3, 9, 10, 4) and labels.shape == (9, 10, 4)
    assert (scores.dtype, probabilities.dtype, labels.dtype) == (np.float32, np.float32, np.uint8)
    odds = np.exp(scores.astype(np.float64))
    close(probabilities, odds / odds.sum(0))
    assert np.array_equal(labels, scores.argmax(0)) and len(np.unique(labels)) > 1


@pytest.mark.parametrize("name", ["deepmedic", "dm2d_seg"])
def test_outside_the_mask_is_background(network, noise_case, name):
    model, case = network(name), noise_case((13, 11, 7), mask=True)
    full = {o: predict(model, case, output=o, inside_mask=False, progress=False) for o in inference.OUTPUTS}
    inside = {o: predict(model, case, output=o, tile=3, progress=False) for o in inference.OUTPUTS}
    m = case.mask
    close(inside["logits"][:, m], full["logits"][:, m])
    close(inside["probabilities"][:, m], full["probabilities"][:, m])
    assert np.array_equal(inside["labels"][m], full["labels"][m]) and full["labels"][~m].any()
    assert not inside["labels"][~m].any() and not inside["logits"][:, ~m].any()
    assert (inside["probabilities"][0, ~m] == 1).all() and not inside["probabilities"][1:, ~m].any()


@pytest.mark.parametrize("name", ["deepmedic", "dm2d_seg"])
def test_the_masks_bounding_box_does_not_matter(network, noise_case, name):
    """The groups of three lie on one grid of the volume, wherever the mask begins."""
    model, case = network(name), noise_case((13, 11, 7))
    full = logits_of(model, case)
    for corner in [(0, 0, 0), (1, 2, 3), (2, 1, 1), (11, 9, 5)]:
        mask = np.zeros(case.shape, bool)
        mask[tuple(slice(c, c + 2) for c in corner)] = True
        close(logits_of(model, case.replace(mask=mask))[:, mask], full[:, mask])


def test_a_case_without_a_mask_is_segmented_whole(network, noise_case):
    model, case = network("dm2d_seg"), noise_case((9, 6, 3))
    close(logits_of(model, case), logits_of(model, case, inside_mask=False))


def test_images_of_any_type_and_layout(network, noise_case):
    model, case = network("dm2d_seg"), noise_case((9, 6, 3))
    rounded = case.replace(image=np.round(case.image * 10).astype(np.int16))
    plain = case.replace(image=rounded.image.astype(np.float32))
    close(logits_of(model, rounded), logits_of(model, plain))
    close(logits_of(model, case.replace(image=np.asfortranarray(case.image))), logits_of(model, case))


def test_networks_without_a_rearranged_form(noise_case):
    """All that `predict` asks of a network are the attributes of `Network`, which an `Adapter` gives to any module."""

    class Smooth(models.Network):
        in_channels, margin, classes = 2, 1, 2

        def __init__(self):
            super().__init__()
            self.conv = torch.nn.Conv3d(2, 2, 3)

        def forward(self, x):
            return self.conv(x)

    model, case = Smooth(), noise_case((6, 5, 4))
    close(logits_of(model, case, tile=2), reference(model, case))
    adapted = models.Adapter(model.conv, in_channels=2, classes=2, margin=1)
    close(logits_of(adapted, case, tile=2), reference(model, case))
    with pytest.raises(TypeError, match=r"Conv3d is no Network, .*models\.Adapter"):
        predict(model.conv, case)


@pytest.mark.parametrize("training", [True, False])
def test_the_network_is_left_as_it_was(network, noise_case, training):
    model, case = network("dm2d_seg").train(training), noise_case((9, 6, 3))
    before = {k: v.clone() for k, v in model.state_dict().items()}
    first = logits_of(model, case)
    assert model.training is training and all(m.training is training for m in model.modules())
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all(p.requires_grad for p in model.parameters())
    close(first, logits_of(model.eval(), case))


def test_training_mode_returns_after_an_error(network, noise_case, monkeypatch):
    model, case = network("dm2d_seg").train(), noise_case((9, 6, 3))

    def broken(*arguments):
        raise RuntimeError("a broken layer")

    monkeypatch.setattr(inference, "_predict_tiles", broken)
    with pytest.raises(RuntimeError, match="a broken layer"):
        predict(model, case, progress=False)
    assert model.training


@pytest.mark.parametrize("precision", ["float16", "double"])
def test_training_mode_stays_after_a_wrong_precision(network, noise_case, precision):
    model = network("dm2d_seg").train()
    with pytest.raises(ValueError):
        predict(model, noise_case((9, 6, 3)), precision=precision, progress=False)
    assert model.training


def test_later_weights_are_used(network, noise_case):
    """Nothing of an earlier call is kept: validation during training sees the network of that moment."""
    model, case = network("dm2d_seg"), noise_case((9, 6, 3))
    before = logits_of(model, case)
    with torch.no_grad():
        model.classifier.bias += 1
    close(logits_of(model, case), before + 1)


# -------------------------------------------------------------------------------------------------------------- errors


def test_errors(network, noise_case):
    model, case = network("dm2d_seg"), noise_case((9, 6, 3))
    three = noise_case((9, 6, 3), channels=("flair", "t1", "t1c"))
    nothing = case.replace(mask=np.zeros(case.shape, bool))
    checks = [
        (three, {}, r"noise has 3 channels \(flair, t1, t1c\) but the network expects 2; choose .*case\.select"),
        (nothing, {}, "noise: the mask is empty; .*inside_mask=False"),
        (case, {"output": "classes"}, "output='classes'; expected one of labels, probabilities, logits"),
        (case, {"tile": 0}, "tile=0; expected a positive number of voxels, or three of them"),
        (case, {"tile": (9, 9)}, r"tile=\(9, 9\); expected"),
        (case, {"precision": "float16"}, "float16 is for CUDA devices; on the cpu use float32"),
        (case, {"precision": "bfloat16"}, "bfloat16 is for CUDA devices"),
        (case, {"precision": "double"}, "precision='double'; expected auto, float32, float16, bfloat16"),
    ]
    for given, options, message in checks:
        with pytest.raises(ValueError, match=message):
            predict(model, given, progress=False, **options)
    assert predict(model, nothing, inside_mask=False, progress=False).shape == case.shape


def test_channels_are_checked_by_name_where_the_network_knows_them(network, noise_case):
    model, case = network("dm2d_seg"), noise_case((9, 6, 3))
    model.card = {"channels": ["t1c", "flair"]}
    with pytest.raises(ValueError, match=r"flair, t1c but the network was trained on t1c, flair; use case\.select"):
        predict(model, case, progress=False)
    predict(model, case.select(["t1c", "flair"]), progress=False)


# ------------------------------------------------------------------------------------------------ networks that pad


def padded_reference(model, case: Case) -> np.ndarray:
    """One pass over the whole volume, filled up to the network's multiple by numpy's mirror."""
    pad = [(0, 0), *((0, -n % model.multiple) for n in case.shape)]
    with torch.no_grad():
        out = model(torch.from_numpy(np.pad(case.image, pad, mode="reflect"))[None])[0]
    return out[(slice(None), *(slice(n) for n in case.shape))].numpy()


@pytest.mark.parametrize("shape", [(24, 16, 8), (19, 13, 9)], ids=str)
@pytest.mark.parametrize("merge", ["concat", "sum", "none"])
def test_a_padded_network_gets_the_whole_volume(network, noise_case, merge, shape):
    model, case = network("kayalibay_unet3d", init="xavier", merge=merge), noise_case(shape, mask=True)
    close(logits_of(model, case, inside_mask=False), padded_reference(model, case))
    inside = logits_of(model, case)
    close(inside[:, case.mask], padded_reference(model, case)[:, case.mask])
    assert not inside[:, ~case.mask].any()


@pytest.mark.parametrize("blocks, shape, tile", [(1, (43, 21, 10), 4), (2, (90, 14, 9), (8, 4, 100)), (3, (200, 9, 8), 8)])
def test_tiles_of_a_padded_network_have_a_halo(network, noise_case, monkeypatch, blocks, shape, tile):
    """No tile sees the whole volume, and yet the result is that of the whole volume."""
    model, case = network("kayalibay_unet3d", init="xavier", blocks=blocks, maps=blocks), noise_case(shape)
    whole, seen, forward = padded_reference(model, case), [], type(model).forward
    monkeypatch.setattr(type(model), "forward", lambda self, x: seen.append(x.shape[2]) or forward(self, x))
    close(logits_of(model, case, tile=tile), whole)
    assert len(seen) > 8 and max(seen) <= 2 * model.halo + model.multiple * max(1, 8 // model.multiple) < shape[0]
    monkeypatch.setattr(model, "halo", model.multiple)
    assert np.abs(logits_of(model, case, tile=tile) - whole).max() > 1e-3  # it was needed


def test_a_halo_that_is_no_multiple_is_rounded_up(network, noise_case, monkeypatch):
    model, case = network("kayalibay_unet3d", init="xavier", blocks=1, maps=1), noise_case((40, 18, 12))
    monkeypatch.setattr(model, "halo", model.halo + 1)
    assert model.multiple == 2
    close(logits_of(model, case, tile=6), padded_reference(model, case))


def test_slices_without_mask_are_left_out(network, noise_case, monkeypatch):
    """A network of slices that pads sees whole slices, but no other ones."""
    model, case, seen = network("unet2d"), noise_case((16, 16, 9)), []
    mask = np.zeros(case.shape, bool)
    mask[3:5, 2:9, 2:6] = True
    expected = padded_slices = np.where(mask, logits_of(model, case), 0)
    forward = type(model).forward
    monkeypatch.setattr(type(model), "forward", lambda self, x: seen.append(tuple(x.shape)) or forward(self, x))
    close(logits_of(model, case.replace(mask=mask)), expected)
    assert seen == [(4, 2, 16, 16)] and padded_slices.any()


def test_a_padded_network_in_little_memory(network, noise_case, monkeypatch):
    model, case = network("kayalibay_unet3d", init="xavier", blocks=1, maps=1), noise_case((60, 18, 12))
    monkeypatch.setattr(tiles, "workspace", lambda device, most: 1e5)
    assert tiles.plan(model, [0] * 3, case.shape, case.shape, torch.device("cpu")).size[0] < 30
    close(logits_of(model, case), padded_reference(model, case))


def test_a_network_with_one_output_is_one_of_two_classes(noise_case, stir):
    torch.manual_seed(0)
    model = stir(models.fc_resnet(in_channels=2, classes=1, width=0.1))
    case = noise_case((40, 33, 6), mask=True)
    with torch.no_grad():
        x = torch.from_numpy(np.pad(case.image, [(0, 0), (0, 24), (0, 31), (0, 0)], mode="reflect"))
        expected = model(x.permute(3, 0, 1, 2))[:, 0, :40, :33].permute(1, 2, 0).numpy()
    logits = logits_of(model, case, inside_mask=False)
    assert not logits[0].any()
    np.testing.assert_allclose(logits[1], expected, rtol=1e-4, atol=1e-4 * abs(expected).max())
    probabilities = predict(model, case, output="probabilities", progress=False)
    np.testing.assert_allclose(probabilities.sum(0), 1, rtol=1e-5)
    labels = predict(model, case, progress=False)
    assert np.array_equal(labels, (logits[1] > 0) & case.mask) and 0 < labels.mean() < 1


# -------------------------------------------------------------------------------------------------------- at scale


class Full(models.Network):
    """A network on a device that has no memory for patches of more than `voxels`."""

    def __init__(self, model, voxels: int, error: Exception):
        super().__init__()
        self.model, self.voxels, self.error = model, voxels, error
        self.margin, self.multiple, self.spatial_dims = model.margin, model.multiple, model.spatial_dims
        self.in_channels, self.classes = model.in_channels, model.classes

    def forward(self, x):
        if x[0, 0].numel() > self.voxels:
            raise self.error
        return self.model(x)


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB\nand more"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9000000 bytes"),
    ],
)
def test_out_of_memory_is_answered_with_smaller_tiles(noise_case, stir, capsys, error):
    torch.manual_seed(0)
    model = stir(models.deep_plus(in_channels=2, classes=2, width=0.1))
    case = noise_case((20, 30, 12))
    whole = predict(model, case, output="logits", progress=False)
    tight = Full(model, 32 * 32 * 26, error)  # 16 voxels of margin on each side, so tiles of up to 16×16×10 or so
    np.testing.assert_allclose(predict(tight, case, output="logits", progress=False), whole, atol=1e-5)
    told = capsys.readouterr().out.splitlines()
    assert told[0] == "noise: out of memory with tiles of 20×30×12 voxels; trying 20×15×12, at the same result"
    with pytest.raises(MemoryError, match=r"noise: out of memory \(.*\) even with the smallest tile, 1×1×1 voxels"):
        predict(Full(model, 10, error), case, progress=False)
    with pytest.raises(RuntimeError, match="something else"):
        predict(Full(model, 10, RuntimeError("something else")), case, progress=False)


def test_compiled_prediction(noise_case, stir, monkeypatch, capsys):
    model = stir(models.deep_plus(in_channels=2, classes=2, width=0.1))
    case = noise_case((8, 9, 7))
    expected = predict(model, case, output="logits", progress=False)
    calls = []

    def fake(network):
        def run(x):
            calls.append(tuple(x.shape))
            return network(x)

        return run

    monkeypatch.setattr(torch, "compile", fake)
    before = set(model.state_dict())
    for _ in range(2):
        found = predict(model, case, output="logits", compiled=True, progress=False)
        np.testing.assert_allclose(found, expected, atol=1e-5)
    assert len(calls) == 2 and set(model.state_dict()) == before
    assert "torch.compile" not in capsys.readouterr().out

"""Feature maps by hooks: against the same hooks set by hand, in one piece and in tiles, and where they lie on the input."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from medseg_lite import features, inference, models
from medseg_lite.engine import tiles
from medseg_lite.engine.tracing import contract
from medseg_lite.features import capture, list_layers, measured_receptive_field, receptive_field
from medseg_lite.volume import padded_region


class Padded(nn.Module):
    """A small network of torchvision's kind: padded, strided, with a residual and no attributes of this package."""

    def __init__(self, conv=nn.Conv2d, pool=nn.MaxPool2d):
        super().__init__()
        self.stem = nn.Sequential(conv(2, 4, 3, padding=1), nn.ReLU(inplace=True))
        self.down = nn.Sequential(conv(4, 6, 3, stride=2, padding=1), nn.ReLU(inplace=True))
        self.pool = pool(2)
        self.deep = conv(6, 6, 3, padding=1)
        self.up = nn.Upsample(scale_factor=2)
        self.head = conv(6, 3, 1)

    def forward(self, x):
        down = self.down(self.stem(x))
        return self.head(down + self.up(self.deep(self.pool(down))))


class Padded3d(Padded):
    def __init__(self):
        super().__init__(nn.Conv3d, nn.MaxPool3d)


def hooked(model, x, names):
    """Outputs of the named modules by plain hooks."""
    found, handles = {}, []
    for name, module in model.named_modules():
        if name in names:
            handles.append(module.register_forward_hook(lambda m, i, o, name=name: found.__setitem__(name, o.clone())))
    with torch.no_grad():
        model.eval()(x)
    for handle in handles:
        handle.remove()
    return found


def hooks(model) -> int:
    return sum(len(m._forward_hooks) for m in model.modules())


def test_deepmedic_both_pathways_against_plain_hooks(noise_case, stir):
    model = stir(models.deepmedic(in_channels=2, classes=3, width=0.1))
    case = noise_case((12, 15, 9))
    maps = capture(model, case, progress=False)
    assert list(maps) == [f"{p}.{n}" for p in ("normal", "low") for n in range(8)] + ["hidden.0", "hidden.1", "classifier"]
    m = model.margin
    patch = padded_region(case.image, [-m] * 3, [n + m for n in case.shape])
    found = hooked(model, torch.from_numpy(patch)[None], maps)
    for name in ("normal.0", "normal.7", "hidden.1", "classifier"):
        plain = found[name][0].numpy()
        trim = (plain.shape[1] - case.shape[0]) // 2
        plain = plain[(slice(None), *(slice(trim, trim + n) for n in case.shape))]
        np.testing.assert_allclose(maps[name].data, plain, atol=2e-3, rtol=2e-3)
        assert maps[name].offset == (0, 0, 0) and maps[name].stride == (1, 1, 1)
    low = maps["low.7"]
    assert low.offset == (1, 1, 1) and low.stride == (3, 3, 3) and low.data.shape[1:] == (4, 5, 3)
    np.testing.assert_allclose(low.data, found["low.7"][0], atol=2e-3, rtol=2e-3)
    logits = inference.predict(model, case, output="logits", progress=False)
    np.testing.assert_allclose(maps["classifier"].data, logits, atol=2e-3, rtol=2e-3)


@pytest.mark.parametrize("name", models.NETWORKS)
def test_the_last_layer_of_every_network_is_what_it_predicts(name, noise_case):
    torch.manual_seed(0)
    model = getattr(models, name)(in_channels=2, classes=3, width=0.1).train()
    for module in model.modules():
        module.momentum = 1.0  # one batch makes the statistics of batch normalisation, which deep residual networks need
    with torch.no_grad():
        model(torch.randn(4, 2, *(2 * model.multiple + 2 * model.margin,) * model.spatial_dims))
    model.eval()
    case = noise_case((20, 33, 5))
    before = [len(module._forward_hooks) for module in model.modules()]
    maps = capture(model, case, [""], progress=False)[""]
    assert [len(module._forward_hooks) for module in model.modules()] == before
    logits = inference.predict(model, case, output="logits", progress=False)
    assert maps.stride == (1, 1, 1) and max(map(abs, maps.offset)) <= 0.5  # even kernels see half a voxel to one side
    np.testing.assert_allclose(maps.data, logits, rtol=2e-3, atol=2e-3 * abs(logits).max() + 1e-6)


@pytest.mark.parametrize(
    "build",
    [
        lambda: models.deepmedic(in_channels=2, classes=3, width=0.1),
        lambda: models.dm2d_seg(in_channels=2, classes=3, width=0.1),
        lambda: models.two_path_cnn(in_channels=2, classes=3, width=0.05, init="he"),
        lambda: models.local_cascade_cnn(in_channels=2, classes=3, width=0.05),
        lambda: models.kayalibay_unet3d(in_channels=2, classes=3, width=0.25, blocks=1, maps=1),
        Padded,
        Padded3d,
    ],
    ids=["deepmedic", "dm2d", "havaei", "cascade", "unet", "padded 2-D", "padded 3-D"],
)
def test_tiles_change_nothing(build, noise_case, stir, monkeypatch):
    torch.manual_seed(0)
    model = stir(build())
    network = contract(model)
    case = noise_case((13, 15, 10) if network.margin else (60, 18, 10))
    whole = capture(model, case, progress=False)
    monkeypatch.setattr(tiles, "workspace", lambda *_: 1e3)
    context = features.find_context(network, list_layers(model).values(), case.shape)
    assert len(tiles.plan(network, [0] * 3, case.shape, case.shape, torch.device("cpu"), context=context).tiles()) > 3
    tiled = capture(model, case, progress=False)
    assert list(whole) == list(tiled)
    for name, one in whole.items():
        other = tiled[name]
        assert (one.offset, one.stride) == (other.offset, other.stride) and one.data.dtype == np.float16
        np.testing.assert_allclose(one.data, other.data, atol=2e-3, rtol=2e-3, err_msg=name)


@pytest.mark.parametrize(
    "build",
    [lambda: models.deepmedic(in_channels=2, classes=3, width=0.1), Padded3d, Padded],
    ids=["deepmedic", "padded 3-D", "padded 2-D"],
)
def test_a_region_is_the_same_part_of_the_whole(build, noise_case, stir):
    torch.manual_seed(0)
    model, case = stir(build()), noise_case((24, 20, 16))
    whole = capture(model, case, progress=False)
    for region in (np.s_[5:13, 3:9, 7], np.s_[2:3, :, -4:]):
        part = capture(model, case, region=region, progress=False)
        for name, maps in part.items():
            start = [round((a - b) / s) for a, b, s in zip(maps.offset, whole[name].offset, maps.stride)]
            same = whole[name].data[(slice(None), *(slice(a, a + n) for a, n in zip(start, maps.data.shape[1:])))]
            np.testing.assert_allclose(maps.data, same, atol=2e-3, rtol=2e-3, err_msg=name)
            for axis, place in enumerate(region):  # all of the region is covered, and nothing lies wholly beyond it
                a, b, _ = (slice(place, place + 1) if isinstance(place, int) else place).indices(case.shape[axis])
                low = maps.offset[axis] - maps.stride[axis] / 2
                high = low + maps.data.shape[axis + 1] * maps.stride[axis]
                assert low <= a - 0.5 + maps.stride[axis] / 2 and high >= b - 0.5 - maps.stride[axis] / 2
                assert low + maps.stride[axis] > a - 0.5 and high - maps.stride[axis] < b - 0.5


def test_the_last_slices_of_a_coarse_layer(noise_case):
    """Centres of a strided, padded layer lie at 0, 4, 8, …: its last voxel stands for the rest of the volume."""
    torch.manual_seed(0)
    model, case = (models.kayalibay_unet3d(in_channels=2, classes=2, width=0.2, blocks=2, maps=1), noise_case((16, 16, 16)))
    whole = capture(model, case, progress=False)
    assert whole["contracting.1.conv"].stride == (4, 4, 4) and whole["contracting.1.conv"].offset == (0, 0, 0)
    for index in range(16):
        for name, maps in capture(model, case, region=np.s_[:, :, index], progress=False).items():
            nearest = whole[name].index((0, 0, index))[2]
            own = maps.index((0, 0, index))[2]
            np.testing.assert_allclose(
                maps.data[..., own], whole[name].data[..., nearest], atol=2e-3, rtol=2e-3, err_msg=f"{name} {index}"
            )


def test_padded_networks_against_plain_hooks(noise_case):
    torch.manual_seed(0)
    case = noise_case((16, 12, 8))
    model = Padded()
    maps = capture(model, case, ["stem.0", "stem.1", "down", "deep", "head"], progress=False)
    found = hooked(model, torch.from_numpy(case.image).permute(3, 0, 1, 2), maps)
    for name in maps:
        np.testing.assert_allclose(maps[name].data, found[name].permute(1, 2, 3, 0), atol=2e-3, rtol=2e-3)
    # An activation that works in place does not spoil the maps before it.
    assert maps["stem.0"].data.min() < 0 <= maps["stem.1"].data.min()
    assert maps["down"].stride == (2, 2, 1) and maps["deep"].stride == (4, 4, 1) and maps["deep"].offset == (1, 1, 0)


def test_maps_lie_on_the_input(noise_case):
    """One bright voxel lights up every map around the place where the geometry says it should."""
    model = models.deepmedic(in_channels=1, classes=2, width=0.1)
    case = noise_case((30, 30, 30), channels=("t1",))
    case.image[:] = 0
    dark = capture(model, case, progress=False)
    spot = (13, 16, 10)  # among every third voxel, which the coarse pathway sees
    case.image[(0, *spot)] = 100
    bright = capture(model, case, progress=False)
    for name in dark:
        maps = bright[name]
        change = np.argwhere(np.abs(maps.data.astype(np.float32) - dark[name].data).max(0) > 0)
        where = np.array([maps.position(i) for i in change])
        assert len(where), name
        field = maps.field
        assert (where - spot <= -np.array(field.first) + 0.01).all() and (where - spot >= -np.array(field.last) - 0.01).all()
        if name in ("low.0", "low.1"):
            np.testing.assert_allclose(where.mean(0), spot, atol=3)


def test_index_position_and_sampling(noise_case):
    model, case = models.deepmedic(in_channels=2, classes=2, width=0.1), noise_case((12, 15, 9))
    low = capture(model, case, "low.3", progress=False)["low.3"]
    assert low.position((1, 2, 0)) == (4, 7, 1) and low.index((4, 7, 1)) == (1, 2, 0) and low.index((5, 8, 2)) == (1, 2, 0)
    assert low.index((-50, 99, 0)) == (0, 4, 0)
    assert repr(low) == "FeatureMaps('low.3', 4 maps of 4×5×3 voxels, offset (1.0, 1.0, 1.0), stride (3.0, 3.0, 3.0))"
    wide = low.laid_over(case.shape)
    assert wide.shape == (4, 12, 15, 9) and (low.laid_over(case.shape, 2) == wide[2]).all()
    assert (wide[:, 3:6, 6:9, 0:3] == low.data[:, 1:2, 2:3, 0:1]).all()
    assert (low.sampled(case.label) == case.label[1::3, 1::3, 1::3]).all()


def test_maps_that_depend_on_the_whole_patch(noise_case):
    """A mean over everything is that of the volume, and lies in its middle."""

    class Gated(nn.Module):
        def __init__(self):
            super().__init__()
            self.maps, self.gate, self.head = nn.Conv3d(2, 3, 3, padding=1), nn.Conv3d(3, 3, 1), nn.Conv3d(3, 2, 1)

        def forward(self, x):
            maps = self.maps(x)
            return self.head(maps * self.gate(maps.mean(dim=(2, 3, 4), keepdim=True)).sigmoid())

    torch.manual_seed(0)
    model, case = Gated(), noise_case((12, 15, 9))
    found, plain = (
        capture(model, case, progress=False),
        hooked(model, torch.from_numpy(case.image)[None], ["maps", "gate", "head"]),
    )
    assert found["gate"].offset == (5.5, 7, 4) and found["gate"].stride == (12, 15, 9) and found["head"].stride == (1, 1, 1)
    for name, maps in found.items():
        np.testing.assert_allclose(maps.data, plain[name][0], atol=2e-3, rtol=2e-3)


def test_largest_keeps_every_nth_voxel(noise_case):
    model, case = models.deepmedic(in_channels=2, classes=2, width=0.1), noise_case((24, 24, 18))
    full = capture(model, case, ["normal.2", "low.2"], progress=False)
    thin = capture(model, case, ["normal.2", "low.2"], largest=2000, progress=False)
    assert thin["normal.2"].data.size <= 2000 and thin["normal.2"].every == (3, 3, 3) and thin["low.2"].every == (1, 1, 1)
    assert thin["normal.2"].offset == (1, 1, 1) and thin["normal.2"].stride == (3, 3, 3)
    assert (thin["normal.2"].data == full["normal.2"].data[:, 1::3, 1::3, 1::3]).all()


def test_the_network_is_left_as_it_was(noise_case, monkeypatch):
    model, case = models.mf_cascade_cnn(in_channels=2, classes=2, width=0.05).train(), noise_case()
    modes = [m.training for m in model.modules()]
    state = {k: v.clone() for k, v in model.state_dict().items()}

    def check():
        assert hooks(model) == 0 and [m.training for m in model.modules()] == modes

    capture(model, case, progress=False)
    check()
    for error in (RuntimeError("no memory"), KeyboardInterrupt()):
        with monkeypatch.context() as patch:
            patch.setattr(features._Store, "take", lambda *_, error=error: (_ for _ in ()).throw(error))
            with pytest.raises(type(error)):
                capture(model, case, progress=False)
        check()
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    first, second = (capture(model, case, progress=False)["second.output"].data for _ in range(2))
    assert (first == second).all()


def test_computation_ends_with_the_last_layer_asked_for(noise_case):
    model = models.deepmedic(in_channels=2, classes=2, width=0.1)
    model.classifier.register_forward_pre_hook(lambda *_: pytest.fail("not needed") if not _[1][0].is_meta else None)
    capture(model, noise_case(), "low.*", progress=False)


def test_layers_by_default_by_pattern_and_by_call():
    model = models.two_path_cnn(in_channels=4, classes=5)
    assert list(list_layers(model)) == ["local1", "local2", "global1", "output"]
    info = list_layers(model)["local1"]
    assert (info.channels, info.kind, info.parameters) == (64, "Sequential", 128 * 4 * 49 + 128)
    assert info.stride == (1, 1) and info.field.side[0] in (10, 11)  # ten pixels, centred between two
    assert list(list_layers(model, ["output", "local1.*"])) == ["local1.0", "local1.1", "local1.2", "output"]
    assert list(list_layers(Padded())) == ["stem", "down", "deep", "head"]
    with pytest.raises(ValueError, match="no layer 'middle'; its parts are local1, local2, global1, drop, output"):
        list_layers(model, "middle")


@pytest.mark.parametrize("layer", [None, "normal", "normal.4", "low", "low.3", "hidden.0"])
def test_receptive_field_computed_is_measured(layer):
    for model in (
        models.deepmedic(in_channels=1, classes=2, width=0.1),
        models.dm2d_seg(in_channels=1, width=0.1, centered=False),
    ):
        assert receptive_field(model, layer) == measured_receptive_field(model, layer=layer)


def test_receptive_field_of_a_voxel_and_of_networks_that_pad():
    model = models.deepmedic(in_channels=1, classes=2, width=0.1)
    assert [receptive_field(model, voxel=v).first[0] for v in range(3)] == [-23, -24, -25]
    assert receptive_field(Padded(), "stem").side == (3, 3)
    assert receptive_field(Padded(), "down").side == (5, 5)
    with pytest.raises(ValueError, match="outside the output"):
        receptive_field(model, voxel=99)
    with pytest.raises(ValueError, match="no layer 'x'"):
        receptive_field(model, "x")


@pytest.mark.parametrize(
    ["options", "message"],
    [
        (dict(layers="normal.9"), "no layer 'normal.9'; its parts are normal, low, hidden"),
        (dict(region=np.s_[:, :]), r"expected three slices or numbers along \(D, H, W\)"),
        (dict(region=np.s_[:, :, 9]), r"outside noise of \(12, 15, 9\) voxels"),
        (dict(region=np.s_[:, :, 5:5]), "holds no voxels"),
        (dict(region=np.s_[:, ::2, 5]), "leaves some out"),
        (dict(memory=1e4), r"take 1\.\d|take \d+ MB, more than memory=0 MB: name fewer layers"),
    ],
)
def test_bad_input(options, message, noise_case):
    with pytest.raises(ValueError, match=message):
        capture(models.deepmedic(in_channels=2, classes=2, width=0.1), noise_case(), progress=False, **options)
    with pytest.raises(ValueError, match=r"has 2 channels .* but the network expects 1"):
        capture(models.deepmedic(in_channels=1, classes=2, width=0.1), noise_case())

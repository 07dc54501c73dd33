"""Every layer of a network over one case: channels as a grid, one of them enlarged over the input."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import traitlets
from matplotlib.figure import Figure
from torch import nn

from .. import features, plotting
from ..engine.tiles import check_fits, find_region
from ..features import FeatureMaps
from ..volume import Case, bounding_box
from . import _feature_picture
from ._base import LARGEST_IMAGE, StateError, check_images, check_known, pack, script, styles
from ._feature_numbers import describe_layer, describe_maps, offsets, shrink
from ._interventions import TWIN, Interventions

# Values of one layer that go to the browser, a byte each. With two layers and the input the page stays under 100 MB.
LARGEST = 32_000_000
SORTS = ("index", "activity", "selectivity", "correlation")
SCALES = ("channel", "layer", "p1-p99")
COLOURS = ("auto", *_feature_picture.PALETTES)


class FeatureExplorer(Interventions):
    """A network's layers over one case: click a layer, then a channel, and see it over the input.

        model = models.load(paths.shipped("checkpoints", "deepmedic_phantoms.safetensors"))
        case = transforms.standardise(phantoms.brain(102))
        explorer = FeatureExplorer(model, case)
        explorer                                       # shows it
        explorer.layer, explorer.channel = "low.7", 12
        explorer.sort, explorer.class_name = "selectivity", "enhancing tumour"
        explorer.position = (30, 44, 25)               # everything can be set, read and observed
        explorer.order[:5]                             # the channels as sorted
        explorer.table                                 # numbers of each channel of the layer
        explorer.to_html("layers.html", layers=["normal.7", "low.7"])

    A layer is computed when it is first looked at, and sent once, as one byte a voxel. The browser itself draws slices,
    crosshair, sorting and colours. A layer of more than 32 million values keeps every second or third voxel along its longest
    axes; a smaller `region` shows it all. The box on the input is the receptive field of the layer's voxel at the crosshair.
    "Dead" channels have one value everywhere.

        explorer.silence(12)                           # and see explorer.prediction, explorer.effect; restore() ends it
        explorer.fed_by(12)                            # the three earlier maps that feed channel 12 most

    Args:
        model: any convolutional network. It is not changed, and no hook stays in it. After further training the maps are
            computed anew with the next layer that is looked at, or with `refresh()`.
        case: case, normalised as for `inference.predict`.
        layers: names or patterns as in `features.list_layers`; by default one layer for each convolution.
        compare: a second network, or the name of a second layer of this one, to be shown side by side.
        region: part of the case, as in `features.capture`; by default the bounding box of the mask.
        maps: tissue maps `{name: (D, H, W)}` that channels are correlated with; by default `case.extra` and the input channels.
        classes: class names by number; by default `case.info["classes"]`.
        memory: bytes of feature maps that are kept, so that nothing has to be computed twice.
        **state: first values of the attributes below.

    Attributes:
        layer, channel: layer and channel shown.
        compare_layer, compare_channel: layer and channel shown on the right.
        position: voxel (d, h, w) of the case under the crosshair.
        plane: "axial", "coronal" or "sagittal".
        sequence: input channel shown below the map.
        sort: "index", "activity" (mean |value|), "selectivity" for `class_name` (2 AUC - 1: 1 if every voxel of the class is
            above all others, -1 if below), or "correlation" with `map_name` (Pearson's r). The largest |number| comes first.
        class_name, map_name: class of the selectivity, map of the correlation.
        scale: range of the colours: the "channel" or the "layer" (without the extreme 0.1 % inside the mask), or the channel's
            percentiles "p1-p99".
        colours: "sequential", "signed" (blue below zero, vermilion above), or "auto" by the layer's values.
        opacity: opacity of the map over the input.
        truth: draw the outline of the label.
        brain_only: leave out the maps outside the case's mask; True at first where there is a mask.
        changes: channels that are multiplied by a factor, lists of layer, channel and factor (0 to 2). All calls of a module change.
        untrained: show the untrained twin: its builder's network with seed 0, or a copy whose modules are reset one by one.
        path: tell the maps that feed the channel shown most.

    Raises:
        ValueError: for unknown layers, classes and maps, or a case that does not fit the network.
    """

    _esm = script("interventions.js", "feature_explorer.js")
    _css = styles("feature_explorer.css", "medseg-features")

    layer = traitlets.Unicode().tag(sync=True)
    channel = traitlets.Int(0).tag(sync=True)
    compare_layer = traitlets.Unicode().tag(sync=True)
    compare_channel = traitlets.Int(0).tag(sync=True)
    plane = traitlets.Enum([p.name.lower() for p in plotting.PLANES], "axial").tag(sync=True)
    sequence = traitlets.Unicode().tag(sync=True)
    sort = traitlets.Enum(SORTS, "index").tag(sync=True)
    class_name = traitlets.Unicode().tag(sync=True)
    map_name = traitlets.Unicode().tag(sync=True)
    scale = traitlets.Enum(SCALES, "channel").tag(sync=True)
    colours = traitlets.Enum(COLOURS, "auto").tag(sync=True)
    opacity = traitlets.Float(0.6).tag(sync=True)
    truth = traitlets.Bool(True).tag(sync=True)
    brain_only = traitlets.Bool(False).tag(sync=True)
    _mask = traitlets.Any().tag(sync=True)
    _label = traitlets.Any().tag(sync=True)
    _maps = traitlets.Dict().tag(sync=True)  # layers that the browser gets without asking
    _version = traitlets.Int(0).tag(sync=True)  # grows when the maps that were sent are of an older network

    def __init__(
        self,
        model: nn.Module,
        case: Case,
        *,
        layers: str | Sequence[str] | None = None,
        compare: nn.Module | str | None = None,
        region: Sequence[slice | int] | None = None,
        maps: Mapping[str, np.ndarray] | None = None,
        classes: Sequence[str] | Mapping[int, str] | None = None,
        memory: float = 500e6,
        **state,
    ):
        check_images(case)
        if region is None and case.mask is not None:
            region = bounding_box(case.mask, border=2)
        start, stop = find_region(region, case)
        self._case, self._box = case, tuple(slice(a, b) for a, b in zip(start, stop))
        if len(case.channels) * int(np.prod(self._shape)) > LARGEST_IMAGE:
            raise ValueError(f"{case.name} is too large to be sent to a browser; choose a region")
        self._take_networks(model, compare, layers)
        if isinstance(compare, str):
            state.setdefault("compare_layer", compare)
        self._memory, self._kept, self._prints = memory, OrderedDict(), [_fingerprint(m) for m in self._models]
        self._described: dict[int, tuple] = {}  # by panel: maps, and what `_describe` tells about them
        self._twin, self._predicted, self._feeding = None, {}, {}
        self.bytes_sent = 0  # of feature maps, compressed
        self._take_classes_and_maps(classes, maps)
        scene = self._describe_case()
        super().__init__(
            _scene=scene | self._describe_layers(),
            _volumes=self._pack_volumes([(s["low"], s["high"]) for s in scene["sequences"]]),
            _mask=None if case.mask is None else pack(case.mask[self._box]),
            _label=pack(case.label[self._box]) if self._classes else None,
            **(self._opening() | state),
        )
        self.on_msg(self._on_message)

    def __repr__(self) -> str:
        shown = [f"{layer!r}, channel {channel}" for _, layer, channel in self._panels()]
        return f"FeatureExplorer({self._case.name!r}, {' | '.join(shown)}, at {self.position})"

    # -------------------------------------------------------------------------------------------------------- opening

    def _take_networks(self, model: nn.Module, compare: nn.Module | str | None, layers: str | Sequence[str] | None) -> None:
        """Set the network of each panel, and the layers that it offers."""
        self._models = [model]
        if isinstance(compare, nn.Module):
            self._models.append(compare)
        elif compare is not None:
            self._models.append(model)
            if layers is not None:
                layers = [*([layers] if isinstance(layers, str) else layers), compare]
        self._infos = [features.list_layers(m, layers) for m in self._models]
        if isinstance(compare, str) and compare not in self._infos[0]:
            self._infos[1] = features.list_layers(model, [*self._infos[0], compare])
        for m in self._models:
            check_fits(m, self._case)

    def _take_classes_and_maps(self, classes, maps: Mapping[str, np.ndarray] | None) -> None:
        """Set what the channels are compared with: the classes inside the region, and the tissue maps."""
        case = self._case
        given = self._names = classes if classes is not None else case.info.get("classes")
        present = [] if case.label is None else np.flatnonzero(np.bincount(case.label[self._box].reshape(-1))).tolist()
        self._classes = {plotting.class_name(k, given): k for k in present if k}
        self._class_colours = {k: plotting.class_colour(k, given) for k in self._classes.values()}
        maps = {**case.extra, **dict(zip(case.channels, case.image))} if maps is None else maps
        for name, volume in maps.items():
            if np.shape(volume) != case.shape:
                raise ValueError(f"map {name!r} has shape {np.shape(volume)}; expected {case.shape}, that of {case.name}")
        self._targets = {str(name): np.asarray(volume) for name, volume in maps.items()}

    def _opening(self) -> dict[str, object]:
        """Return the first values of the attributes."""
        names = [next(iter(infos)) for infos in self._infos]
        label = None if self._case.label is None else self._case.label[self._box]
        busiest = plotting.busiest_position(label, self._shape)
        return {
            "layer": names[0],
            "compare_layer": "" if len(names) == 1 else names[0] if names[0] in self._infos[1] else names[1],
            "position": tuple(s.start + p for s, p in zip(self._box, busiest)),
            "sequence": self._case.channels[0],
            "brain_only": self._case.mask is not None,
            "class_name": next(iter(self._classes), ""),
            "map_name": next(iter(self._targets), ""),
        }

    def _describe_layers(self) -> dict[str, object]:
        """Return what the script needs to know beside the case."""
        panels = zip(self._models, self._infos)
        return {
            "masked": self._case.mask is not None,
            "classes": [(k, name, self._class_colours[k]) for name, k in self._classes.items()],
            **self._describe_network(),
            "maps": list(self._targets),
            "palettes": {name: _feature_picture.hex_colours(name) for name in _feature_picture.PALETTES},
            "panels": [
                {"title": type(m).__name__, "layers": [describe_layer(i) for i in infos.values()]} for m, infos in panels
            ],
        }

    # ----------------------------------------------------------------------------------------------------------- maps

    def maps(self, layer: str | None = None, *, panel: int | None = None) -> FeatureMaps:
        """Return the feature maps of a layer over the region, by default of the layer shown. They are computed once."""
        panel = self._first if panel is None else panel
        layer = layer or (self.compare_layer if panel == 1 else self.layer)
        self._check_layer(layer, panel)
        self._renew()
        model, infos = self._network(panel), self._infos[panel % TWIN]
        key = (id(model), layer)
        if key not in self._kept:
            names = [layer]
            # The second layer that is asked for will not be the last: one run computes them all, if they can be kept.
            if any(owner == key[0] for owner, _ in self._kept) and self._size(infos) <= self._memory:
                names = [n for n in infos if (key[0], n) not in self._kept]
            found = features.capture(model, self._case, names, region=self._box, largest=LARGEST, memory=np.inf, progress=False)
            self._kept.update({(key[0], name): maps for name, maps in found.items()})
        self._kept.move_to_end(key)
        while len(self._kept) > 1 and sum(m.data.nbytes for m in self._kept.values()) > self._memory:
            self._kept.popitem(last=False)
        return self._kept[key]

    def refresh(self) -> None:
        """Compute the maps anew, after the network's weights have changed."""
        for kept in (self._kept, self._predicted, self._feeding):
            kept.clear()
        self._maps = {}
        self._prints = [_fingerprint(m) for m in self._models]
        self._version += 1

    def _renew(self) -> None:
        if self._prints != [_fingerprint(m) for m in self._models]:
            self.refresh()

    @property
    def table(self) -> pd.DataFrame:
        """A row of numbers for each channel of the layer shown.

        There are mean, deviation, extremes, the share of voxels at or below zero, whether the channel is dead, its selectivity
        for each class and its correlation with each map.
        """
        numbers = {name: v for name, v in self._describe(self._first)[1].items() if name not in ("histogram", "bottom", "top")}
        groups = {group: numbers.pop(group) for group in ("selectivity", "correlation")}
        columns = numbers | {f"{group}: {name}": v for group, by in groups.items() for name, v in by.items()}
        return pd.DataFrame(columns).rename_axis("channel")

    @property
    def order(self) -> tuple[int, ...]:
        """The channels of the layer shown, as sorted."""
        return self._order(self._describe(self._first)[1])

    @property
    def receptive_field(self) -> tuple[slice, slice, slice] | None:
        """The box of input voxels that the layer's voxel at the crosshair sees; None if this is not known."""
        maps = self.maps()
        if maps.field is None:
            return None
        centre, (first, last) = maps.position(maps.index(self.position)), offsets(maps.field)
        return tuple(
            slice(max(0, int(np.floor(c + a + 0.5))), min(n, int(np.floor(c + b + 0.5)) + 1))
            for c, a, b, n in zip(centre, first, last, self._case.shape)
        )

    def _panels(self) -> list[tuple[int, str, int]]:
        """Return the number of each panel that is shown, its layer and its channel."""
        both = [(self._first, self.layer, self.channel), (1, self.compare_layer, self.compare_channel)]
        return both[: len(self._models)]

    def _size(self, infos: Mapping[str, features.LayerInfo]) -> float:
        """Return the bytes that the maps of these layers take."""
        voxels = np.prod(self._shape)
        return sum(2 * min(i.channels * voxels / np.prod(i.stride or 1), LARGEST) for i in infos.values())

    def _describe(self, panel: int, layer: str | None = None) -> tuple[dict, dict, np.ndarray]:
        """Return facts about the maps of a layer, the numbers of each channel, and the maps as bytes. The last ones are kept."""
        maps = self.maps(layer, panel=panel)
        if panel not in self._described or self._described[panel][0] is not maps:
            label = maps.sampled(self._case.label) if self._classes else None
            classes = {name: label == k for name, k in self._classes.items()}
            targets = {name: maps.sampled(volume) for name, volume in self._targets.items()}
            self._described[panel] = maps, describe_maps(maps, self._inside(maps), classes, targets)
        return self._described[panel][1]

    def _inside(self, maps: FeatureMaps) -> np.ndarray | None:
        """Return the voxels of the maps that lie inside the mask, or None if there are none."""
        inside = None if self._case.mask is None else maps.sampled(self._case.mask)
        return inside if inside is not None and inside.any() else None

    def _order(self, numbers: Mapping[str, object]) -> tuple[int, ...]:
        """Return the channels as sorted, by their numbers."""
        column = {
            "activity": numbers["activity"],
            "selectivity": numbers["selectivity"].get(self.class_name),
            "correlation": numbers["correlation"].get(self.map_name),
        }.get(self.sort)
        if column is None:
            return tuple(range(len(numbers["mean"])))
        return tuple(int(i) for i in np.argsort(-np.abs(column), kind="stable"))

    # ------------------------------------------------------------------------------------------- what the browser gets

    def _levels(self, panel: int, layer: str) -> tuple[dict, np.ndarray]:
        """Return what the browser needs to know about a layer, and its voxels as bytes."""
        facts, numbers, levels = self._describe(panel, layer)
        return {"key": f"{panel}/{layer}", "version": self._version, **facts, **numbers}, levels

    def _pack_layer(self, key: str) -> dict[str, object]:
        """Return a layer as it is sent to the browser. Its key is the number of its panel and its name: "0/normal.7"."""
        panel, _, layer = key.partition("/")
        about, levels = self._levels(int(panel), layer)
        data = pack(levels)
        self.bytes_sent += len(data)
        return {"about": about, "data": data}

    def _on_message(self, _, content, buffers) -> None:
        """Send a layer that the browser asks for, or the answer to an intervention."""
        self._reply(content)
        key = str(content.get("want", ""))
        panel, _, layer = key.partition("/")
        known = ("0", "1")[: len(self._models)] + (str(TWIN),) * self._scene["twin"]
        if panel not in known or layer not in self._infos[int(panel) % TWIN]:
            return
        sent = self._pack_layer(key)
        self.send(sent["about"], [sent["data"]])

    # --------------------------------------------------------------------------------------------------- static forms

    def to_html(
        self,
        path: str | Path | None = None,
        *,
        layers: Sequence[str] | None = None,
        title: str | None = None,
        megabytes: float = 5,
    ) -> str:
        """Return the explorer as a page that needs neither kernel nor network, and write it to `path` if given.

        The page holds the layers shown and those named in `layers`. Of the layer shown it also holds the predictions of the slice
        shown without each of its maps, where they take no more than a fifth of the page.

        Args:
            path: file to write.
            layers: names of further layers.
            title: heading of the page.
            megabytes: size of the page. Of large layers only every second or third voxel is kept along the
                longest axes. The page says so.
        """
        wanted = [(p, layer) for p, layer, _ in self._panels()]
        for name in [layers] if isinstance(layers, str) else layers or ():
            self._check_layer(name, 0)
            wanted += [(p, name) for p, infos in enumerate(self._infos) if name in infos]
        found = [self._levels(*one) for one in dict.fromkeys(wanted)]
        volumes = [v for v in (*self._volumes, self._label, self._mask) if v is not None]
        room = megabytes * 0.75e6 - sum(map(len, volumes))  # three bytes become four letters
        answers = self._stored_answers(room / 5)
        room -= sum(len(one.get("labels", b"")) for one in answers.values())
        sent = {about["key"]: {} for about, _ in found}
        # The smallest layers come first: what they leave of their share goes to the others.
        for left, (about, levels) in zip(range(len(found), 0, -1), sorted(found, key=lambda one: one[1].size)):
            about, data = shrink(about, levels, room / left)
            room -= len(data)
            sent[about["key"]] = {"about": about, "data": data}
        return self._write_page(path, title, _maps=sent, _answers=answers, _scene=self._scene | {"exported": True})

    def _repr_mimebundle_(self, **kwargs) -> tuple[dict, dict]:
        bundle = super()._repr_mimebundle_(**kwargs)
        shown = [f"{panel}/{layer}" for panel, layer, _ in self._panels()]
        if list(self._maps) != shown:  # a kernel that is busy with the next cells cannot answer when the browser asks for them
            self._maps = {key: self._pack_layer(key) for key in shown}
        return bundle

    def _title(self) -> str:
        return f"Feature maps of {type(self._models[0]).__name__} over {self._case.name}"

    def _alt(self) -> str:
        _, layer, channel = self._panels()[0]
        return (
            f"{self._case.name}, {self.plane} slice through voxel {self.position}: channel {channel} of layer {layer} over "
            f"{self.sequence}, with a box round the voxels that it sees at the crosshair, and the layer's channels by {self.sort}"
        )

    def _draw(self) -> Figure:
        panels = []
        for number, layer, channel in self._panels():
            maps = self.maps(layer, panel=number)
            numbers = self._describe(number, layer)[1]
            panels.append(_feature_picture.Panel(self, layer, channel, maps, numbers, self._order(numbers)))
        return _feature_picture.draw(self, panels)

    # --------------------------------------------------------------------------------------------------------- checks

    def _check_layer(self, name: str, panel: int) -> str:
        if name not in self._infos[panel % TWIN]:
            known = ", ".join(self._infos[panel % TWIN])
            raise StateError(f"{type(self._models[panel % TWIN]).__name__} has no layer {name!r} here; there are {known}")
        return name

    @traitlets.validate("layer")
    def _valid_layer(self, proposal):
        return self._check_layer(proposal["value"], 0)

    @traitlets.validate("compare_layer")
    def _valid_compare_layer(self, proposal):
        if len(self._models) == 1:
            if proposal["value"]:
                raise StateError("there is nothing to compare; create the explorer with compare=")
            return ""
        return self._check_layer(proposal["value"], 1)

    @traitlets.observe("layer", "compare_layer")
    def _layer_changed(self, change):
        self.channel = self.channel  # is checked again, because the layer may have fewer channels
        self.compare_channel = self.compare_channel

    @traitlets.validate("channel", "compare_channel")
    def _valid_channel(self, proposal):
        panel = int(proposal["trait"].name == "compare_channel")
        name = self.compare_layer if panel else self.layer
        if panel >= len(self._models) or not name:
            return proposal["value"]
        return min(max(proposal["value"], 0), self._infos[panel][name].channels - 1)

    @traitlets.validate("sequence")
    def _valid_sequence(self, proposal):
        return check_known(proposal["value"], self._case.channels, f"{self._case.name} has no channel")

    @traitlets.validate("class_name")
    def _valid_class_name(self, proposal):
        return check_known(proposal["value"], self._classes or [""], "there is no voxel of class")

    @traitlets.validate("map_name")
    def _valid_map_name(self, proposal):
        return check_known(proposal["value"], self._targets or [""], "there is no map")


def _fingerprint(model: nn.Module) -> tuple:
    """Return a value that changes when a parameter or buffer is changed in place or replaced."""
    return tuple((id(t), t._version) for t in (*model.parameters(), *model.buffers()))

"""Every layer of a network over one case, in the browser: channels as a grid, one of them enlarged over the input."""

from __future__ import annotations

import base64
import io
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from pathlib import Path

import anywidget
import matplotlib
import matplotlib.patheffects
import numpy as np
import traitlets
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from torch import nn

from .. import features, plotting
from ..engine.tiles import check_fits, find_region
from ..features import FeatureMaps
from ..paths import atomic_write
from ..volume import Case, bounding_box
from ._base import pack, page, script
from .kernel_editor import SIGNED_COLOURS
from .slice_viewer import LARGEST as LARGEST_IMAGE
from .slice_viewer import StateError, _check_image, _find_limits, _to_bytes

_HERE = Path(__file__).parent
LARGEST = 32_000_000  # values of one layer that go to the browser, a byte each; with two layers and the input under 100 MB
SORTS = ("index", "activity", "selectivity", "correlation")
SCALES = ("channel", "layer", "p1-p99")
COLOURS = ("auto", "sequential", "signed")
PALETTES = {"sequential": "magma", "signed": SIGNED_COLOURS}  # both are read without seeing red or green
LEVELS = 255


class FeatureExplorer(anywidget.AnyWidget):
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

    Layers are computed when they are first looked at and sent once, as one byte a voxel; slices, crosshair, sorting and colours are
    the browser's. A layer of more than 56 million values keeps every second or third voxel along its longest axes; a `region` shows it all.
    The box on the input is what the layer's voxel at the crosshair sees. "Dead" channels have one value everywhere.

    Args:
        model: any convolutional network; it is not changed, and no hook stays in it. After further training the maps are
            computed anew with the next layer that is looked at, or with `refresh()`.
        case: normalised as for `inference.predict`.
        layers: names or patterns as in `features.list_layers`; by default one layer for each convolution.
        compare: a second network, or the name of a second layer of this one, to be shown side by side.
        region: as in `features.capture`; by default the bounding box of the mask.
        maps: tissue maps `{name: (D, H, W)}` that channels are correlated with; by default `case.extra` and the input channels.
        classes: class names by number; by default `case.info["classes"]`.
        memory: bytes of feature maps that are kept, so that nothing has to be computed twice.
        **state: first values of the attributes below.

    Attributes:
        layer, channel: what is shown. `compare_layer`, `compare_channel`: the same on the right.
        position: voxel (d, h, w) of the case under the crosshair. `plane`: "axial", "coronal" or "sagittal".
        sequence: input channel shown below the map.
        sort: "index", "activity" (mean |value|), "selectivity" for `class_name` (2 AUC - 1: 1 where every voxel of the class is
            above all others, -1 where below), or "correlation" with `map_name` (Pearson's r). The largest |number| comes first.
        scale: what spans the colours: the "channel" or the "layer" (but for the extreme 0.1 % inside the mask), or the channel's
            percentiles "p1-p99".
        colours: "sequential", "signed" (blue below zero, vermilion above), or "auto" by the layer's values.
        opacity: of the map over the input. `truth`: whether the label's outline is drawn.

    Raises:
        ValueError: for unknown layers, classes and maps, or a case that does not fit the network.
    """

    _esm = script("feature_explorer.js")
    _css = _HERE / "feature_explorer.css"
    _ipython_display_ = None  # ipywidgets 7 would display through it, and drop the PNG below

    layer = traitlets.Unicode().tag(sync=True)
    channel = traitlets.Int(0).tag(sync=True)
    compare_layer = traitlets.Unicode().tag(sync=True)
    compare_channel = traitlets.Int(0).tag(sync=True)
    position = traitlets.Any().tag(sync=True)  # a tuple of three ints, made from any three whole numbers
    plane = traitlets.Enum([p.name.lower() for p in plotting.PLANES], "axial").tag(sync=True)
    sequence = traitlets.Unicode().tag(sync=True)
    sort = traitlets.Enum(SORTS, "index").tag(sync=True)
    class_name = traitlets.Unicode().tag(sync=True)
    map_name = traitlets.Unicode().tag(sync=True)
    scale = traitlets.Enum(SCALES, "channel").tag(sync=True)
    colours = traitlets.Enum(COLOURS, "auto").tag(sync=True)
    opacity = traitlets.Float(0.6).tag(sync=True)
    truth = traitlets.Bool(True).tag(sync=True)
    _scene = traitlets.Dict().tag(sync=True)
    _volumes = traitlets.List().tag(sync=True)
    _label = traitlets.Any().tag(sync=True)
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
        for name, image in zip(case.channels, case.image):
            _check_image(image, f"{case.name}, {name}")
        if region is None and case.mask is not None:
            region = bounding_box(case.mask, border=2)
        start, stop = find_region(region, case)
        self._case, self._box = case, tuple(slice(a, b) for a, b in zip(start, stop))
        self._shape = tuple(b - a for a, b in zip(start, stop))
        if len(case.channels) * int(np.prod(self._shape)) > LARGEST_IMAGE:
            raise ValueError(f"{case.name} is too large to be sent to a browser; choose a region")
        self._models = [model]
        if isinstance(compare, nn.Module):
            self._models.append(compare)
        elif compare is not None:
            self._models.append(model)
            state.setdefault("compare_layer", compare)
            if layers is not None:
                layers = [*([layers] if isinstance(layers, str) else layers), compare]
        self._infos = [features.list_layers(m, layers) for m in self._models]
        if isinstance(compare, str) and compare not in self._infos[0]:
            self._infos[1] = features.list_layers(model, [*self._infos[0], compare])
        for m in self._models:
            check_fits(m, case)
        self._memory, self._kept, self._prints = memory, OrderedDict(), [_fingerprint(m) for m in self._models]
        self.bytes_sent = 0  # of feature maps, compressed

        given = classes if classes is not None else case.info.get("classes")
        present = [] if case.label is None else np.flatnonzero(np.bincount(case.label[self._box].reshape(-1))).tolist()
        self._classes = {plotting.class_name(k, given): k for k in present if k}
        maps = {**case.extra, **dict(zip(case.channels, case.image))} if maps is None else maps
        for name, volume in maps.items():
            if np.shape(volume) != case.shape:
                raise ValueError(f"map {name!r} has shape {np.shape(volume)}; expected {case.shape}, that of {case.name}")
        self._targets = {str(name): np.asarray(volume) for name, volume in maps.items()}

        limits = [_find_limits(image, None) for image in case.image]
        inside = None if case.mask is None else case.mask[self._box]
        names = [next(iter(infos)) for infos in self._infos]
        opening = {
            "layer": names[0],
            "compare_layer": (names[0] if names[0] in self._infos[1] else names[1]) if len(self._models) > 1 else "",
            "position": self._opening_position(),
            "sequence": case.channels[0],
            "class_name": next(iter(self._classes), ""),
            "map_name": next(iter(self._targets), ""),
        }
        super().__init__(
            _scene={
                "title": case.name,
                "start": start,
                "shape": self._shape,
                "spacing": case.spacing,
                "masked": case.mask is not None,
                "planes": [p._asdict() for p in plotting.PLANES],
                "sequences": [
                    {"name": n, "window": plotting.default_window(image[self._box], inside), "low": low, "high": high}
                    for n, image, (low, high) in zip(case.channels, case.image, limits)
                ],
                "classes": [(k, name, plotting.class_colour(k)) for name, k in self._classes.items()],
                "maps": list(self._targets),
                "palettes": {name: _palette(name) for name in PALETTES},
                "panels": [
                    {"title": type(m).__name__, "layers": [_described(i) for i in infos.values()]}
                    for m, infos in zip(self._models, self._infos)
                ],
            },
            _volumes=[pack(_to_bytes(i[self._box], *limit)) for i, limit in zip(case.image, limits)],
            _label=pack(case.label[self._box]) if self._classes else None,
            **(opening | state),
        )
        self.on_msg(self._on_message)

    def __repr__(self) -> str:
        shown = [f"{layer!r}, channel {channel}" for layer, channel in self._panels()]
        return f"FeatureExplorer({self._case.name!r}, {' | '.join(shown)}, at {self.position})"

    # ---------------------------------------------------------------------------------------------------- the maps

    def maps(self, layer: str | None = None, *, panel: int = 0) -> FeatureMaps:
        """The feature maps of a layer over the region, by default of the one shown; computed if they are not yet."""
        layer = layer or self._panels()[panel][0]
        self._check_layer(layer, panel)
        self._renew_if_changed()
        key = (id(self._models[panel]), layer)
        if key not in self._kept:
            model, infos = self._models[panel], self._infos[panel]
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
        self._kept.clear()
        self._prints = [_fingerprint(m) for m in self._models]
        self._version += 1

    @property
    def table(self):
        """Numbers of each channel of the layer shown (a DataFrame): mean, deviation, extremes, share of voxels at or below zero,
        whether it is dead, its selectivity for each class and its correlation with each map."""
        return self._table(0)

    @property
    def order(self) -> tuple[int, ...]:
        """The channels of the layer shown, as sorted."""
        return self._order(0)

    @property
    def receptive_field(self) -> tuple[slice, slice, slice] | None:
        """The box of input voxels that the layer's voxel at the crosshair sees; None where this is not known."""
        maps = self.maps()
        if maps.field is None:
            return None
        centre = maps.position(maps.index(self.position))
        first, last = ([*side, *[0] * (3 - len(side))] for side in (maps.field.first, maps.field.last))
        return tuple(
            slice(max(0, int(np.floor(c + a + 0.5))), min(n, int(np.floor(c + b + 0.5)) + 1))
            for c, a, b, n in zip(centre, first, last, self._case.shape)
        )

    def _panels(self) -> list[tuple[str, int]]:
        both = [(self.layer, self.channel), (self.compare_layer, self.compare_channel)]
        return both[: len(self._models)]

    def _size(self, infos) -> float:
        voxels = np.prod(self._shape)
        return sum(2 * min(i.channels * voxels / np.prod(i.stride or 1), LARGEST) for i in infos.values())

    def _renew_if_changed(self) -> None:
        if self._prints != [_fingerprint(m) for m in self._models]:
            self.refresh()

    def _message(self, panel: int, layer: str) -> tuple[dict, bytes]:
        """What the browser needs to know about a layer, and its voxels."""
        maps = self.maps(layer, panel=panel)
        levels, low, step = _quantise(maps.data, self._inside(maps))
        table = self._numbers(maps, levels)
        first, last = maps.field[1:] if maps.field else (None, None)
        about = {
            "key": f"{panel}/{layer}",
            "version": self._version,
            "shape": maps.data.shape,
            "offset": maps.offset,
            "stride": maps.stride,
            "every": maps.every,
            "field": None if first is None else [[*first, *[0] * (3 - len(first))], [*last, *[0] * (3 - len(last))]],
            "low": low.tolist(),
            "step": step.tolist(),
            "signed": _is_signed(maps.data),
            **table,
        }
        return about, pack(levels)

    def _inside(self, maps: FeatureMaps) -> np.ndarray | None:
        """Which voxels of the maps lie inside the mask; None where there is none."""
        inside = None if self._case.mask is None else maps.sampled(self._case.mask)
        return inside if inside is not None and inside.any() else None

    def _numbers(self, maps: FeatureMaps, levels: np.ndarray) -> dict[str, object]:
        """Of each channel, over the voxels inside the mask."""
        inside = self._inside(maps)
        inside = slice(None) if inside is None else inside.reshape(-1)
        values = maps.data.reshape(len(maps.data), -1)[:, inside].astype(np.float32)
        levels = levels.reshape(len(levels), -1)[:, inside]
        mean, deviation = values.mean(1), values.std(1)
        thin = values[:, :: max(1, values.shape[1] // 50_000)]
        bottom, p1, p99, top = np.percentile(thin, (0.1, 1, 99, 99.9), axis=1)
        selectivity = {}
        if self._classes:
            label = maps.sampled(self._case.label).reshape(-1)[inside]
            for name, k in self._classes.items():
                selectivity[name] = _selectivity(levels, label == k)
        correlation = {}
        centred = values - mean[:, None]
        for name, volume in self._targets.items():
            target = maps.sampled(volume).reshape(-1)[inside].astype(np.float32)
            target = target - target.mean()
            spread = np.sqrt((target**2).sum()) * np.sqrt(values.shape[1]) * deviation
            correlation[name] = np.divide(centred @ target, spread, out=np.zeros_like(spread), where=spread > 1e-12)
        numbers = {
            "mean": mean,
            "deviation": deviation,
            "activity": np.abs(values).mean(1),
            "minimum": values.min(1),
            "maximum": values.max(1),
            "p1": p1,
            "p99": p99,
            "inactive": (values <= 0).mean(1),
            "dead": values.max(1) == values.min(1),
        }
        listed = {name: _rounded(column) for name, column in numbers.items()}
        listed["selectivity"] = {name: _rounded(column) for name, column in selectivity.items()}
        listed |= {"bottom": _rounded(bottom), "top": _rounded(top)}  # a rim of stray values must not pale the rest
        listed["histogram"] = [np.bincount(channel >> 2, minlength=64).tolist() for channel in levels]
        listed["correlation"] = {name: _rounded(column) for name, column in correlation.items()}
        return listed

    def _table(self, panel: int):
        import pandas as pd

        maps = self.maps(panel=panel)
        numbers = self._numbers(maps, _quantise(maps.data, self._inside(maps))[0])
        for name in ("histogram", "bottom", "top"):
            del numbers[name]
        groups = {group: numbers.pop(group) for group in ("selectivity", "correlation")}
        columns = numbers | {f"{group}: {name}": v for group, by in groups.items() for name, v in by.items()}
        return pd.DataFrame(columns).rename_axis("channel")

    def _order(self, panel: int) -> tuple[int, ...]:
        table = self._table(panel)
        column = {
            "activity": "activity",
            "selectivity": f"selectivity: {self.class_name}",
            "correlation": f"correlation: {self.map_name}",
        }.get(self.sort)
        if column not in table:
            return tuple(range(len(table)))
        return tuple(int(i) for i in np.argsort(-np.abs(table[column].to_numpy()), kind="stable"))

    def _on_message(self, _, content, buffers) -> None:
        """The browser asks for a layer that it does not have yet."""
        key = str(content.get("want", ""))
        panel, _, layer = key.partition("/")
        if panel not in ("0", "1")[: len(self._models)] or layer not in self._infos[int(panel)]:
            return
        about, data = self._message(int(panel), layer)
        self.bytes_sent += len(data)
        self.send(about, [data])

    # ------------------------------------------------------------------------------------------------ other forms

    def snapshot(self) -> bytes:
        """The present view as a PNG file: the map over the input, and the strongest channels as sorted."""
        file = io.BytesIO()
        _draw(self).savefig(file, format="png")
        return file.getvalue()

    def to_html(self, path: str | Path | None = None, *, layers: Sequence[str] | None = None, title: str | None = None) -> str:
        """The explorer as one self-contained page that works without a kernel or a network; also written to `path` if given.

        It holds the layers shown and those named in `layers`.
        """
        wanted = [(p, layer) for p, (layer, _) in enumerate(self._panels())]
        for name in [layers] if isinstance(layers, str) else layers or ():
            self._check_layer(name, 0)
            wanted += [(p, name) for p, infos in enumerate(self._infos) if name in infos]
        sent = {}
        for panel, layer in dict.fromkeys(wanted):
            about, data = self._message(panel, layer)
            sent[about["key"]] = {"about": about, "data": data}
        names = [name for name in self.trait_names(sync=True) if not name.startswith("_")]
        own = [n for n in names if n in FeatureExplorer.__dict__]
        state = {key: getattr(self, key) for key in (*own, "_scene", "_volumes", "_label", "_version")}
        text = page(
            title=title or f"Feature maps of {type(self._models[0]).__name__} over {self._case.name}",
            state=state | {"_maps": sent},
            script=self._esm,
            css=_HERE / "feature_explorer.css",
        )
        if path is not None:
            with atomic_write(path) as temporary:
                temporary.write_text(text, encoding="utf-8")
        return text

    def _repr_mimebundle_(self, **kwargs) -> tuple[dict, dict]:
        data, metadata = super()._repr_mimebundle_(**kwargs)
        layer, channel = self._panels()[0]
        alt = (
            f"{self._case.name}, {self.plane} slice through voxel {self.position}: channel {channel} of layer {layer} over "
            f"{self.sequence}, with what it sees at the crosshair, and the layer's channels by {self.sort}"
        )
        picture = base64.b64encode(self.snapshot()).decode()
        return {**data, "image/png": picture}, {**metadata, "image/png": {"alt": alt}}

    # ----------------------------------------------------------------------------------------------------- checks

    def _opening_position(self) -> tuple[int, int, int]:
        label = None if self._case.label is None else self._case.label[self._box]
        return tuple(s.start + p for s, p in zip(self._box, plotting.busiest_position(label, self._shape)))

    def _check_layer(self, name: str, panel: int) -> str:
        if name not in self._infos[panel]:
            known = ", ".join(self._infos[panel])
            raise StateError(f"{type(self._models[panel]).__name__} has no layer {name!r} here; there are {known}")
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
        self.channel = self.channel  # checked again: the layer may have fewer
        self.compare_channel = self.compare_channel

    @traitlets.validate("channel", "compare_channel")
    def _valid_channel(self, proposal):
        panel = int(proposal["trait"].name == "compare_channel")
        name = self.compare_layer if panel else self.layer
        if panel >= len(self._models) or not name:
            return proposal["value"]
        return min(max(proposal["value"], 0), self._infos[panel][name].channels - 1)

    @traitlets.validate("position")
    def _valid_position(self, proposal):
        try:
            position = plotting.check_position(proposal["value"], self._case.shape)
        except ValueError as error:
            raise StateError(str(error)) from None
        return tuple(min(max(p, s.start), s.stop - 1) for p, s in zip(position, self._box))

    @traitlets.validate("sequence")
    def _valid_sequence(self, proposal):
        return _one_of(proposal["value"], self._case.channels, f"{self._case.name} has no channel")

    @traitlets.validate("class_name")
    def _valid_class_name(self, proposal):
        return _one_of(proposal["value"], self._classes or [""], "there is no voxel of class")

    @traitlets.validate("map_name")
    def _valid_map_name(self, proposal):
        return _one_of(proposal["value"], self._targets or [""], "there is no map")

    @traitlets.validate("opacity")
    def _valid_opacity(self, proposal):
        if np.isnan(proposal["value"]):
            raise StateError("opacity is NaN; expected a number from 0 to 1")
        return min(max(proposal["value"], 0.0), 1.0)


def _one_of(value: str, known, what: str) -> str:
    if value not in known:
        raise StateError(f"{what} {value!r}; there are {', '.join(map(repr, known))}")
    return value


def _described(info: features.LayerInfo) -> dict:
    stride = None if info.stride is None else [*info.stride, *[1.0] * (3 - len(info.stride))]
    side = None if info.field is None else info.field.side
    return {
        "name": info.name,
        "kind": info.kind,
        "channels": info.channels,
        "parameters": info.parameters,
        "stride": stride,
        "side": side,
    }


def _fingerprint(model: nn.Module) -> tuple:
    """Changes with every change of a parameter or buffer in place, and when one is replaced."""
    return tuple((id(t), t._version) for t in (*model.parameters(), *model.buffers()))


def _palette(name: str) -> list[str]:
    """256 colours as "#rrggbb"."""
    chosen = PALETTES[name]
    colours = matplotlib.colormaps[chosen] if isinstance(chosen, str) else LinearSegmentedColormap.from_list(name, chosen)
    return [matplotlib.colors.to_hex(c) for c in colours(np.linspace(0, 1, 256))]


def _quantise(data: np.ndarray, inside: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Maps `(C, ...)` as bytes: a value is `low + step * byte`. Zero is a level of its own where it is within the range; the extreme
    0.1 % of a channel are cut off, counted everywhere and among the voxels `inside`, unless they are all that there is."""
    flat = data.reshape(len(data), -1)
    thin = flat[:, :: max(1, flat.shape[1] // 100_000)].astype(np.float32)
    low, high = np.percentile(thin, (0.1, 99.9), axis=1)
    if inside is not None:
        part = flat[:, inside.reshape(-1)]
        part = part[:, :: max(1, part.shape[1] // 50_000)].astype(np.float32)
        ends = np.percentile(part, (0.1, 99.9), axis=1)
        low, high = np.minimum(low, ends[0]), np.maximum(high, ends[1])
    narrow = high - low < 0.3 * (thin.max(1) - thin.min(1))  # a rare but strong channel
    low, high = np.where(narrow, thin.min(1), low), np.where(narrow, thin.max(1), high)
    step = np.maximum(high - low, 1e-6 * np.maximum(np.abs(high), 1e-6)) / (LEVELS - 1)
    low = np.floor(low / step) * step
    levels = np.empty(data.shape, np.uint8)
    for one, out, a, s in zip(data, levels, low, step):
        scaled = (one.astype(np.float32) - np.float32(a)) * np.float32(1 / s)
        np.clip(np.rint(scaled, out=scaled), 0, 255, out=scaled)
        out[...] = scaled
    return levels, low, step


def _is_signed(data: np.ndarray) -> bool:
    """Whether negative values matter; the small ones behind a leaky rectifier do not."""
    flat = data.reshape(-1)
    values = flat[:: max(1, flat.size // 500_000)].astype(np.float32)
    return bool(-values[values < 0].sum() > 0.1 * values[values > 0].sum())


def _selectivity(levels: np.ndarray, inside: np.ndarray) -> np.ndarray:
    """2 AUC - 1 of each channel (of bytes) as a detector of a class, ties counted half."""
    result = np.zeros(len(levels))
    if not inside.any() or inside.all():
        return result
    for c, channel in enumerate(levels):
        positive = np.bincount(channel[inside], minlength=256).astype(float)
        negative = np.bincount(channel[~inside], minlength=256).astype(float)
        below = np.cumsum(negative) - negative / 2
        result[c] = 2 * (positive @ below) / (positive.sum() * negative.sum()) - 1
    return result


def _rounded(column: np.ndarray) -> list:
    return column.tolist() if column.dtype == bool else [float(f"{v:.5g}") for v in column]


# ------------------------------------------------------------------------------------------------------- static form


def _span(about: dict, channel: int, scale: str, colours: str) -> tuple[float, float]:
    """Values at both ends of the colours, as in the browser."""
    if scale == "layer":
        low, high = min(about["bottom"]), max(about["top"])
    elif scale == "p1-p99":
        low, high = about["p1"][channel], about["p99"][channel]
    else:
        low, high = about["bottom"][channel], about["top"][channel]
    if colours == "signed":
        limit = max(abs(low), abs(high))
        low, high = -limit, limit
    return (low, high) if low < high else (low, low + 1)


def _draw(explorer: FeatureExplorer) -> Figure:
    case, box = explorer._case, explorer._box
    plane = plotting.find_plane(explorer.plane)
    start = [s.start for s in box]
    shape, spacing = explorer._shape, case.spacing
    wide, high = shape[plane.x] * spacing[plane.x], shape[plane.y] * spacing[plane.y]
    panels = explorer._panels()
    with plotting.style():
        figure = Figure(figsize=(9.4, (3.5 if high <= 1.4 * wide else 4.6) * len(panels)), dpi=100, layout="constrained")
        rows = figure.subplots(len(panels), 2, squeeze=False, width_ratios=(0.36, 0.64))
        for panel, ((layer, channel), (left, right)) in enumerate(zip(panels, rows)):
            maps = explorer.maps(layer, panel=panel)
            about = explorer._numbers(maps, _quantise(maps.data, explorer._inside(maps))[0])
            colours = explorer.colours
            if colours == "auto":
                colours = "signed" if _is_signed(maps.data) else "sequential"
            palette = matplotlib.colormaps[PALETTES["sequential"]]
            if colours == "signed":
                palette = LinearSegmentedColormap.from_list("signed", SIGNED_COLOURS)

            def extent(offset, stride, n):
                """Of a picture of n voxels, in input voxels from the region's left or upper edge; both run against the array."""
                edges = []
                for axis in (plane.x, plane.y):
                    size = shape[axis]
                    a = offset[axis] - stride[axis] / 2 - start[axis] + 0.5
                    b = a + stride[axis] * n[axis]
                    edges += [size - b, size - a]
                return edges[0], edges[1], edges[3], edges[2]

            index = maps.index(explorer.position)[plane.cut]
            image = case.image[case.channels.index(explorer.sequence)][box]
            black, white = plotting.default_window(image, None if case.mask is None else case.mask[box])
            grey = plotting.cut(image, plane, explorer.position[plane.cut] - start[plane.cut])
            aspect = spacing[plane.y] / spacing[plane.x]
            left.imshow(grey, cmap="gray", vmin=black, vmax=white, extent=extent(start, (1, 1, 1), shape), aspect=aspect)
            a, b = _span(about, channel, explorer.scale, colours)
            shown = plotting.cut(maps.data[channel].astype(np.float32), plane, index)
            place = extent(maps.offset, maps.stride, maps.data.shape[1:])
            drawn = left.imshow(shown, cmap=palette, vmin=a, vmax=b, alpha=explorer.opacity, extent=place, aspect=aspect)
            if explorer.truth and case.label is not None and min(shape[plane.x], shape[plane.y]) > 1:
                label = plotting.cut(case.label[box], plane, explorer.position[plane.cut] - start[plane.cut])
                for k in np.unique(label[label > 0]).tolist():
                    columns, lines = (np.arange(n) + 0.5 for n in label.shape[::-1])
                    left.contour(columns, lines, label == k, [0.5], colors=plotting.class_colour(k), linewidths=1.2)
            x, y = (shape[i] - (explorer.position[i] - start[i]) - 0.5 for i in (plane.x, plane.y))
            left.axhline(y, color="#ffffff", lw=0.6, alpha=0.7)
            left.axvline(x, color="#ffffff", lw=0.6, alpha=0.7)
            if maps.field is not None:
                centre = maps.position(maps.index(explorer.position))
                corner, side = [], []
                for axis in (plane.x, plane.y):
                    first, last = ((*o, 0)[axis] if axis < len(o) else 0 for o in maps.field[1:])
                    corner.append(shape[axis] - (centre[axis] + last - start[axis] + 1))
                    side.append(last - first + 1)
                left.add_patch(Rectangle(corner, *side, fill=False, edgecolor="#FFFFFF", linewidth=3))
                left.add_patch(Rectangle(corner, *side, fill=False, edgecolor="#009E73", linewidth=1.6))
            left.set(xlim=(0, shape[plane.x]), ylim=(shape[plane.y], 0))
            left.set_title(f"{layer}, channel {channel}, over {explorer.sequence}")
            bar = figure.colorbar(drawn, ax=left, location="bottom", pad=0.02, aspect=30)
            bar.solids.set_alpha(1)

            order = explorer._order(panel)[:32]
            columns = min(8, len(order))
            tiles = []
            for c in order:
                a, b = _span(about, c, explorer.scale, colours)
                tile = plotting.cut(maps.data[c].astype(np.float32), plane, index)
                tiles.append(palette(np.clip((tile - a) / (b - a), 0, 1))[..., :3])
            high_, wide_ = tiles[0].shape[:2]
            gap = max(1, wide_ // 20)
            lines = -(-len(tiles) // columns)
            sheet = np.ones((lines * (high_ + gap) - gap, columns * (wide_ + gap) - gap, 3))
            for n, tile in enumerate(tiles):
                r, c = n // columns * (high_ + gap), n % columns * (wide_ + gap)
                sheet[r : r + high_, c : c + wide_] = tile
            stretch = spacing[plane.y] * maps.stride[plane.y] / (spacing[plane.x] * maps.stride[plane.x])
            right.imshow(sheet, aspect=stretch, interpolation="nearest")
            for n, c in enumerate(order):
                at = (n % columns * (wide_ + gap), n // columns * (high_ + gap))
                text = right.text(at[0] + 0.04 * wide_, at[1] + 0.04 * high_, c, color="white", fontsize=7, va="top")
                text.set_path_effects([matplotlib.patheffects.withStroke(linewidth=1.5, foreground="black")])
                if c == channel:
                    frame = Rectangle((at[0] - 0.5, at[1] - 0.5), wide_, high_, fill=False, edgecolor="#E69F00", lw=2)
                    right.add_patch(frame)
            count = len(maps.data)
            by = {"index": "in order", "activity": "by activity"}.get(explorer.sort)
            by = by or f"by {explorer.sort}: {explorer.class_name if explorer.sort == 'selectivity' else explorer.map_name}"
            some = f"{len(order)} of {count} channels" if len(order) < count else f"all {count} channels"
            right.set_title(f"{some}, {by}; {sum(about['dead'])} dead")
            for axes in (left, right):
                axes.set(xticks=[], yticks=[])
                axes.grid(False)
                axes.spines[:].set_visible(False)
    return figure

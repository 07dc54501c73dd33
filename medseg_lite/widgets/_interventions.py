"""Interventions of the feature explorer: maps silenced or scaled, an untrained twin, and the earlier maps that feed a map."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager

import numpy as np
import pandas as pd
import torch
import traitlets
from torch import Tensor, nn

from .. import attribution, features, inference, metrics, models, plotting
from ..engine.tracing import contract, evaluating
from ..models.layers import convolutions
from ._base import CaseWidget, StateError, pack

TWIN = 2  # number of the panel whose network is the untrained twin; it is shown in the place of panel 0


class Interventions(CaseWidget):
    """The part of the feature explorer that changes the network: `changes` and `untrained`, and what comes of them."""

    changes = traitlets.List().tag(sync=True)
    untrained = traitlets.Bool(False).tag(sync=True)
    path = traitlets.Bool(False).tag(sync=True)
    _answers = traitlets.Dict().tag(sync=True)  # of a page: predictions of the slice shown, and paths, by their keys

    def silence(self, channel: int, *, layer: str | None = None, factor: float = 0.0) -> None:
        """Multiply a channel by a factor, 0 to 2, wherever the network computes it; 1 takes the change back.

        Args:
            channel: number of the channel.
            layer: name of its layer; by default the layer shown.
            factor: number that the channel is multiplied by.
        """
        self.changes = [*self.changes, [layer or self.layer, channel, factor]]

    def restore(self) -> None:
        """Take all changes back."""
        self.changes = []

    @property
    def prediction(self) -> np.ndarray:
        """Class numbers predicted with `changes` in the slice shown, as large as the region, one voxel thick."""
        return self._predict(self.changes)[0]

    @property
    def effect(self) -> pd.DataFrame:
        """Dice of each class in the slice shown, of the network as it is and with `changes`; NaN where neither has the class."""
        table = pd.DataFrame({"whole": self._predict([])[1], "changed": self._predict(self.changes)[1]}, dtype=float)
        return table.assign(change=table["changed"] - table["whole"]).rename_axis("class")

    def fed_by(self, channel: int | None = None, *, layer: str | None = None, count: int = 3) -> list[tuple[str, int, float]]:
        """Return the earlier maps that feed a map most: layer ("" for the input), channel and strength, the strongest first.

        The strength is the norm of the kernel between the two times the standard deviation of the earlier map inside the mask.
        Normalisation and activation between the two are left out.

        Args:
            channel: number of the channel; by default the one shown.
            layer: name of its layer; by default the layer shown.
            count: number of maps.
        """
        panel, layer = self._first, layer or self.layer
        if (panel, layer) not in self._feeding:
            self._feeding[panel, layer] = find_sources(self._network(panel), layer)
        norms, sources = self._feeding[panel, layer]
        row = norms[self.channel if channel is None else channel] if sources else []
        known = [s for s in sources if not s[1] or s[1] in self._infos[0]]
        squares: Counter[tuple[str, int]] = Counter()  # a map can come in several times
        for j, name, c in known:
            squares[name, c] += (row[j] * self._deviation(panel, name)[c]) ** 2
        return [(name, c, float(square**0.5)) for (name, c), square in squares.most_common(count)]

    def _deviation(self, panel: int, layer: str) -> np.ndarray:
        """Return the standard deviation of each map of a layer, or of each sequence, inside the mask."""
        if (panel, layer, "deviation") not in self._feeding:
            image = features.FeatureMaps(
                "", self._case.image[(slice(None), *self._box)], [s.start for s in self._box], (1, 1, 1)
            )
            maps = self.maps(layer, panel=panel) if layer else image
            inside = self._inside(maps)
            values = maps.data[:, inside] if inside is not None else maps.data.reshape(len(maps.data), -1)
            self._feeding[panel, layer, "deviation"] = values.astype(np.float32).std(1)
        return self._feeding[panel, layer, "deviation"]

    # ------------------------------------------------------------------------------------------------ what is computed

    def _describe_network(self) -> dict[str, object]:
        """Return what the script needs to know of the network: the classes that it predicts, and whether there is a twin."""
        self._outputs = range(1, max(2, contract(self._models[0]).classes))
        names = [(k, plotting.class_name(k, self._names), plotting.class_colour(k, self._names)) for k in self._outputs]
        return {"predicted": names, "twin": has_twin(self._models[0])}

    @property
    def _first(self) -> int:
        """The number of the panel that is shown first."""
        return TWIN if self.untrained else 0

    def _network(self, panel: int) -> nn.Module:
        if panel == TWIN and self._twin is None:
            self._twin = untrained_twin(self._models[0])
        return self._twin if panel == TWIN else self._models[panel]

    def _key(self, changes: Sequence) -> str:
        """Return the name of an answer, as the script makes it too."""
        at = self.position[plotting.find_plane(self.plane).cut]
        return f"{int(self.untrained)}/{self.plane}/{at}/" + " ".join(f"{n}:{c}:{f:g}" for n, c, f in changes)

    def _predict(self, changes: Sequence) -> tuple[np.ndarray, dict[str, float]]:
        """Return the classes of the slice shown, predicted with changes, and Dice of each class."""
        self._renew()
        key = self._key(changes)
        if key not in self._predicted:
            case, cut, box = self._case, plotting.find_plane(self.plane).cut, list(self._box)
            box[cut] = slice(self.position[cut], self.position[cut] + 1)
            where = np.zeros(case.shape, bool)
            where[tuple(box)] = True if case.mask is None else case.mask[tuple(box)]
            labels = (
                self._run(changes, where)[tuple(box)] if where.any() else np.zeros([s.stop - s.start for s in box], np.uint8)
            )
            scored = {name: k for name, k in self._classes.items() if k in self._outputs}
            dice = {n: metrics.dice(labels == k, case.label[tuple(box)] == k, empty=np.nan) for n, k in scored.items()}
            self._predicted[key] = labels, dice
        return self._predicted[key]

    def _run(self, changes: Sequence, where: np.ndarray) -> np.ndarray:
        """Return the classes of a part of the case, predicted with changes."""
        model = self._network(self._first)
        network, case, options = contract(model), self._case.replace(mask=where), {}
        if network.margin == 0 and network.halo is None:  # its tiles would get no context
            case, options = self._case, {"inside_mask": False, "tile": [n + network.multiple for n in where.shape]}
        with ExitStack() as changed:
            for layer in sorted({layer for layer, *_ in changes}):
                factors = {c: f for name, c, f in changes if name == layer}
                changed.enter_context(attribution.scaled(model, layer.split("#")[0], factors))
            return inference.predict(network, case, progress=False, **options) * where

    # ------------------------------------------------------------------------------------------- what the browser gets

    def _reply(self, content: dict) -> None:
        """Answer the browser's question for a prediction or a path."""
        if "predict" in content:
            changes = [] if content["predict"] == "whole" else self.changes
            answer = self._pack_answer(changes)
            self.send({"answer": self._key(changes), "dice": answer["dice"]}, [answer["labels"]])
        if "path" in content:
            self.send({"answer": self._path_key(self.channel), "from": self.fed_by()}, [])

    def _pack_answer(self, changes: Sequence) -> dict[str, object]:
        labels, dice = self._predict(changes)
        return {"labels": pack(labels), "dice": {name: None if np.isnan(d) else d for name, d in dice.items()}}

    def _path_key(self, channel: int) -> str:
        return f"{int(self.untrained)}/{self.layer}:{channel}"

    def _stored_answers(self, room: float) -> dict[str, object]:
        """Return the answers for a page: the slice without each map of the layer shown, where they fit, and what feeds each map."""
        channels = range(self._infos[0][self.layer].channels)
        paths = {self._path_key(c): {"from": self.fed_by(c)} for c in channels}
        changes = [[], *([[self.layer, c, 0.0]] for c in channels)]
        self._predict([])  # before the modules remember, because the fastest form of the network is a copy of them
        # A module around the layer gets the same input, and yet gives another output.
        names = [n for n in self._infos[0] if n and "#" not in n and not self.layer.startswith(f"{n}.")]
        with remembering(self._network(self._first), names, self._memory):
            found = {self._key(one): self._pack_answer(one) for one in changes}
        return paths | (found if sum(len(one["labels"]) for one in found.values()) <= room else {})

    # --------------------------------------------------------------------------------------------------------- checks

    @traitlets.validate("changes")
    def _valid_changes(self, proposal):
        found = {}
        for layer, channel, factor in proposal["value"]:
            last = self._infos[0][self._check_layer(layer, 0)].channels - 1
            if not 0 <= channel <= last:
                raise StateError(f"there is no channel {channel} in {layer}; there are 0 to {last}")
            if not 0 <= factor <= 2:
                raise StateError(f"factor is {factor}; expected a number from 0 to 2")
            found[layer, int(channel)] = round(float(factor), 2)
        return [[*which, factor] for which, factor in sorted(found.items()) if factor != 1]

    @traitlets.validate("untrained")
    def _valid_untrained(self, proposal):
        if proposal["value"] and not has_twin(self._models[0]):
            raise StateError(f"{type(self._models[0]).__name__} has no builder, and parts without reset_parameters")
        return proposal["value"]


@contextmanager
def remembering(model: nn.Module, names: Sequence[str], memory: float) -> Iterator[None]:
    """Let layers whose input is that of their first run give the output of that run again, within the block.

    So a run with a map silenced computes only what comes of it. Outputs are kept in at most `memory` bytes.
    """
    kept, modules = {}, [model.get_submodule(name) for name in names]

    def wrap(module: nn.Module, forward: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        def run(x: Tensor) -> Tensor:
            if x.is_meta:  # the memory is measured
                return forward(x)
            if module in kept and torch.equal(kept[module][0], x):
                return kept[module][1].clone()  # what follows may work in place
            y = forward(x)
            if module not in kept and sum(out.nbytes for _, out in kept.values()) + y.nbytes <= memory:
                kept[module] = x, y.clone()
            return y

        return run

    for module in modules:
        module.forward = wrap(module, module.forward)
    try:
        yield
    finally:
        for module in modules:
            del module.forward


def has_twin(model: nn.Module) -> bool:
    """Tell whether `untrained_twin` can make the network again."""
    return _builds(model) or all(callable(getattr(m, "reset_parameters", None)) for m in model.modules() if _owns(m))


def untrained_twin(model: nn.Module, seed: int = 0) -> nn.Module:
    """Return a network of the same architecture with fresh weights, from its builder or module by module."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if _builds(model):
            options = {name: value for name, value in model.config.items() if name != "builder"}
            return models.BUILDERS[model.config["builder"]](**options).to(next(model.parameters()).device)
        twin = copy.deepcopy(model)
        for module in filter(_owns, twin.modules()):
            module.reset_parameters()
    return twin


def _builds(model: nn.Module) -> bool:
    """Tell whether a network's builder makes it without other networks."""
    config = model.config if isinstance(model, models.Network) else None
    return config is not None and not any(isinstance(part, models.Network) for part in list(model.modules())[1:])


def _owns(module: nn.Module) -> bool:
    return any(True for _ in module.parameters(recurse=False))


def find_sources(model: nn.Module, layer: str) -> tuple[np.ndarray, list[tuple[int, str, int]]]:
    """Find the maps that a layer's convolution takes in.

    The outputs of all convolutions are cut off from their past in one pass of noise. The maps that a gradient of this convolution's
    input still reaches are those that precede it directly.

    Returns:
        The norm of each kernel `(maps, inputs)`; and for each map that feeds it the number of the input, the name of its layer
        ("" for the network's input) and its channel. Empty where the layer is not one convolution over all its inputs.
    """
    network, modules = contract(model), dict(model.named_modules())
    own = convolutions(modules[layer.split("#")[0]])
    if len(own) != 1 or own[0].groups > 1:
        return np.zeros((0, 0)), []
    side = 2 * network.margin + network.multiple if network.margin else max(2 * network.multiple, 16)
    device = next(model.parameters()).device
    noise = torch.randn(1, network.in_channels, *[side] * network.spatial_dims, generator=torch.Generator().manual_seed(0))
    leaves, entered = {"": noise.to(device).requires_grad_()}, []

    def cut(name: str):
        def hook(module, inputs, output):
            leaves[name] = output.detach().requires_grad_()
            return leaves[name].clone()  # what follows may work in place

        return hook

    with evaluating(model), torch.enable_grad(), ExitStack() as hooks:
        hooks.callback(own[0].register_forward_pre_hook(lambda module, inputs: entered.append(inputs[0])).remove)
        for name in features.list_layers(model):
            if "#" not in name:
                hooks.callback(modules[name].register_forward_hook(cut(name)).remove)
        model(leaves[""])
        found = []
        for j in range(entered[-1].shape[1]):
            reached = torch.autograd.grad(entered[-1][:, j].sum(), [*leaves.values()], retain_graph=True, allow_unused=True)
            sizes = {name: g.abs().sum([0, *range(2, g.ndim)]) for name, g in zip(leaves, reached) if g is not None}
            found += [(j, name, int(size.argmax())) for name, size in sizes.items() if size.any()]
    norms = own[0].weight.detach().flatten(2).norm(dim=2).cpu().numpy()
    return (norms.T if own[0].transposed else norms), found

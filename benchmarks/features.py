"""Milliseconds that `features.capture` adds to the forward pass, against a plain forward hook that copies the same layer to NumPy.

    python benchmarks/features.py [--repeats 15] [--before FOLDER]

One layer of each network is captured over a small part of a volume. Two hooks run the network on the same patch: one lets it run to the
end, and the other ends the pass at the layer by an exception, as `capture` does. The rest of `capture` is the geometry of the layers,
the choice of the patch, and the maps in half precision. With `--before` an older copy of the package is measured too, in the folder that
holds its `medseg_lite`. Milliseconds are the smallest of the repeats.
"""

import json
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from _measure import fill, markdown, options, run_alone, take_turns

from medseg_lite import features, models
from medseg_lite.volume import Case

LAYERS = {"kayalibay_unet3d": "contracting.1.conv", "mlynarski_2d": "down.1", "deepmedic": "normal.3"}
REGION = np.s_[20:29, 20:29, 30]
SHAPE = (64, 64, 64)


class Enough(Exception):
    """The layer has been computed."""


def build(name: str):
    torch.manual_seed(0)
    model = getattr(models, name)(in_channels=4, classes=4).eval()
    image = np.random.default_rng(0).standard_normal((4, *SHAPE), dtype=np.float32)
    return model, Case(image, ("flair", "t1", "t1c", "t2"), "noise")


@torch.no_grad()
def hooked(model, layer: str, patch: torch.Tensor, *, ends: bool) -> np.ndarray:
    """Return a layer's output on a patch by a plain hook. With `ends` the pass ends there."""
    kept = []

    def keep(module, inputs, output):
        kept.append(output.numpy().copy())
        if ends:
            raise Enough

    handle = model.get_submodule(layer).register_forward_hook(keep)
    try:
        model(patch)
    except Enough:
        pass
    finally:
        handle.remove()
    return kept[0]


def measure(name: str, repeats: int, *, peer: bool) -> dict:
    """Measure one network with the package at hand, and with `peer` the hook."""
    (model, case), layer = build(name), LAYERS[name]
    patches = []
    handle = model.register_forward_pre_hook(lambda module, inputs: patches.append(inputs[0]))
    maps = features.capture(model, case, layer, region=REGION, progress=False)[layer]
    handle.remove()
    patch = patches[-1]  # those before it are of the runs without numbers
    functions = {
        "capture": lambda turn: features.capture(model, case, layer, region=REGION, progress=False),
        "list_layers": lambda turn: features.list_layers(model),
    }
    if peer:
        functions["whole"] = lambda turn: hooked(model, layer, patch, ends=False)
        functions["part"] = lambda turn: hooked(model, layer, patch, ends=True)
    taken = take_turns(functions, repeats=repeats, warm_up=0)
    found = {name: 1e3 * times[:, 0].min() for name, times in taken.items()}
    return found | {"patch": list(patch.shape), "sum": float(np.abs(maps.data.astype(np.float64)).sum())}


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--before", type=Path, help="folder of an older copy of the package, to be measured too")
    parser.add_argument("--alone", action="store_true", help="measure the package in this process")
    given = parser.parse_args()
    if given.alone:
        print(json.dumps({name: measure(name, given.repeats, peer=False) for name in LAYERS}))
        return
    now, before = {name: measure(name, given.repeats, peer=True) for name in LAYERS}, None
    if given.before:
        before = run_alone([__file__, "--alone", "--repeats", given.repeats], {"PYTHONPATH": str(given.before)})
        assert all(before[name]["sum"] == now[name]["sum"] for name in LAYERS), "the maps are not the same"
    rows = []
    for name, layer in LAYERS.items():
        ours = now[name]
        old = [f"{before[name][key]:.0f}" if before else "" for key in ("capture", "list_layers")]
        patch, more = "×".join(map(str, ours["patch"])), ours["capture"] - ours["part"]
        rows.append(
            [
                f"{name}, `{layer}`",
                patch,
                ours["whole"],
                ours["part"],
                ours["capture"],
                more,
                old[0],
                ours["list_layers"],
                old[1],
            ]
        )
    columns = [
        "network, layer",
        "patch",
        "hook, whole network",
        "hook that ends the pass",
        "capture",
        "more than that hook",
        "before",
    ]
    table = pd.DataFrame(rows, columns=[*columns, "all layers listed", "listed before"])
    fill(__file__, given.results, f", the best of {given.repeats} runs", {"layers": markdown(table, 1)})


if __name__ == "__main__":
    main()

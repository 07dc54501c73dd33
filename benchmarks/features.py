"""Milliseconds that `features.capture` adds to the forward pass, against a plain forward hook that copies the same layer to NumPy.

    python benchmarks/features.py [--repeats 15] [--before FOLDER]

One layer of each network is captured over a small part of a volume. Two hooks run the network on the same patch: one lets it run to the
end, and the other ends the pass at the layer by an exception, as `capture` does. The rest of `capture` is the geometry of the layers,
the choice of the patch, and the maps in half precision. With `--before` an older copy of the package is measured too, in the folder that
holds its `medseg_lite`. Milliseconds are the smallest of the repeats. Writes benchmarks/features.md.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from datetime import date
from pathlib import Path

import numpy as np
import torch

from medseg_lite import features, models
from medseg_lite.volume import Case

HERE = Path(__file__).parent
LAYERS = {"kayalibay_unet3d": "contracting.1.conv", "mlynarski_2d": "down.1", "deepmedic": "normal.3"}
REGION = np.s_[20:29, 20:29, 30]
SHAPE = (64, 64, 64)


class Enough(Exception):
    """The layer has been computed."""


def best(repeats: int, *functions) -> list[float]:
    """Return the milliseconds of each function, the smallest of its runs. The functions take turns."""
    times = [[] for _ in functions]
    for _ in range(repeats):
        for function, own in zip(functions, times):
            start = time.perf_counter()
            function()
            own.append(time.perf_counter() - start)
    return [1e3 * min(own) for own in times]


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
        "capture": lambda: features.capture(model, case, layer, region=REGION, progress=False),
        "list_layers": lambda: features.list_layers(model),
    }
    if peer:
        functions["whole"] = lambda: hooked(model, layer, patch, ends=False)
        functions["part"] = lambda: hooked(model, layer, patch, ends=True)
    found = dict(zip(functions, best(repeats, *functions.values())))
    return found | {"patch": list(patch.shape), "sum": float(np.abs(maps.data.astype(np.float64)).sum())}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--before", type=Path, help="folder of an older copy of the package, to be measured too")
    parser.add_argument("--only", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.only:
        print(json.dumps({name: measure(name, options.repeats, peer=False) for name in LAYERS}))
        return
    now, before = {name: measure(name, options.repeats, peer=True) for name in LAYERS}, None
    if options.before:
        command = [sys.executable, __file__, "--only", "--repeats", str(options.repeats)]
        environment = os.environ | {"PYTHONPATH": str(options.before)}
        printed = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment).stdout
        before = json.loads(printed.splitlines()[-1])
        assert all(before[name]["sum"] == now[name]["sum"] for name in LAYERS), "the maps are not the same"
    rows = [
        "| network, layer | patch | hook, whole network | hook that ends the pass | capture | more than that hook | before | "
        "all layers listed | before |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, layer in LAYERS.items():
        ours = now[name]
        old = [f"{before[name][key]:.0f}" if before else "" for key in ("capture", "list_layers")]
        rows.append(
            f"| {name}, `{layer}` | {'×'.join(map(str, ours['patch']))} | {ours['whole']:.1f} | {ours['part']:.1f} | "
            f"{ours['capture']:.1f} | {ours['capture'] - ours['part']:.1f} | {old[0]} | {ours['list_layers']:.1f} | {old[1]} |"
        )
    text = [
        "# Feature maps of one layer",
        "",
        f"{date.today()}, {torch.get_num_threads()} CPU threads, {platform.machine()}, torch {torch.__version__}; milliseconds, the best "
        f"of {options.repeats} runs. Networks at the papers' sizes, 4 channels, 9×9×1 voxels of a volume of 64³.",
        "",
        *rows,
        "",
        'Repeat it: `python benchmarks/features.py`; the columns "before" need `--before` and a folder with version 0.1 of the package.',
    ]
    (HERE / "features.md").write_text("\n".join(text) + "\n")
    print("\n".join(rows))


if __name__ == "__main__":
    main()

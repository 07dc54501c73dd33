"""Nobody waits for what is not needed: slow imports come when they are used. `benchmarks/waiting.py` measures the rest."""

from __future__ import annotations

import importlib
import subprocess
import sys

import pytest
import torch

from medseg_lite import cli, models
from medseg_lite.crf.gaussian import unflatten
from medseg_lite.engine.geometry import shape_of_result
from medseg_lite.widgets import FeatureExplorer, _feature_numbers

COMPILER = {"sympy", "torch._dynamo"}  # a second's work, and nothing here is compiled


def imported(script: str) -> set[str]:
    """Return the modules that a script imports in a process of its own."""
    script = f"import sys\n{script}\nprint(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    return set(done.stdout.splitlines()[-1].split())


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], []])
def test_help_needs_no_pytorch(arguments):
    script = f"from medseg_lite.cli import main\ntry:\n    main({arguments})\nexcept SystemExit:\n    pass"
    assert not {"torch", "numpy", "pandas", "scipy"} & imported(script)


def test_help_of_each_command_is_the_first_sentence_of_its_module():
    for name, text in cli.COMMANDS.items():
        module = importlib.import_module(f"medseg_lite.cli.{name}")
        assert text == " ".join(module.__doc__.split()).split(".")[0].lower()


def test_only_the_command_that_is_named_is_imported():
    found = imported("from medseg_lite import cli\ncli.make_parser(['phantom', '--out', 'x'])")
    assert "medseg_lite.cli.phantom" in found and "medseg_lite.cli.train" not in found


def test_slow_libraries_wait_until_they_are_used():
    found = imported("from medseg_lite import course, datasets, metrics, recipes, statistics, widgets")
    assert {"scipy", "medseg_lite.widgets"} <= found and not {"scipy.stats", "sklearn", "requests", *COMPILER} & found


def test_networks_are_looked_at_without_the_compiler():
    script = """
import torch
from medseg_lite import features, inference, models
from medseg_lite.crf import DenseCRF
from medseg_lite.volume import Case
model = models.deepmedic(in_channels=1, classes=2, width=0.1)
features.list_layers(model)
case = Case(torch.randn(1, 12, 12, 12).numpy(), ("flair",), "noise")
inference.predict(model, case, progress=False)
DenseCRF()(torch.randn(1, 2, 12, 12, 12), torch.from_numpy(case.image)[None])
"""
    assert not COMPILER & imported(script)


@pytest.mark.parametrize("shape", [(7,), (3, 5), (4, 1, 6)])
def test_unflatten_is_unravel_index(shape):
    index = torch.randperm(torch.Size(shape).numel())
    for ours, theirs in zip(unflatten(index, shape), torch.unravel_index(index, shape), strict=True):
        assert torch.equal(ours, theirs)


def emptied(value):
    """Return arguments with every tensor on the "meta" device, stored as before."""
    if isinstance(value, (list, tuple)):
        return type(value)(emptied(v) for v in value)
    return value.to("meta") if isinstance(value, torch.Tensor) else value


def convolution(channels: int, kernel: tuple, *, n: int = 9, stride=1, pad=0, far=1, groups=1, last=False, dtype=torch.float32):
    """Arguments of `aten::convolution` for an image of `channels` channels and a kernel for four; `last`: stored channels last."""
    axes = len(kernel)
    x, weight = torch.zeros(2, channels, *[n] * axes), torch.zeros(4, 6 // groups, *kernel, dtype=dtype)
    x = x.to(memory_format={2: torch.channels_last, 3: torch.channels_last_3d}[axes]) if last else x
    return "convolution", (x, weight, None, [stride] * axes, [pad] * axes, [far] * axes, False, [0] * axes, groups)


FOUND = {  # operations whose shape is found without PyTorch
    "3-D": convolution(6, (3, 3, 3)),
    "3-D, strided and padded": convolution(6, (3, 1, 2), stride=2, pad=1),
    "3-D, dilated, in groups": convolution(6, (3, 3, 3), far=2, groups=2),
    "3-D, channels last": convolution(6, (3, 3, 3), last=True),
    "2-D": convolution(6, (3, 5), pad=2),
    "a product": ("mm", (torch.zeros(3, 4), torch.zeros(4, 5))),
    "a product that is added": ("addmm_", (torch.zeros(3, 5), torch.zeros(3, 4), torch.zeros(4, 5))),
    "side by side": ("cat", ([torch.zeros(2, 3, 4), torch.zeros(2, 1, 4)], 1)),
    "side by side along the last axis": ("cat", ([torch.zeros(2, 3, 4), torch.zeros(2, 3, 1)], -1)),
}
LEFT = {  # those that are left to PyTorch, which may refuse them
    "too few channels": convolution(5, (3, 3, 3)),
    "a kernel larger than the image": convolution(6, (3, 3, 3), n=2),
    "a kernel of another type": convolution(6, (3, 3, 3), dtype=torch.float16),
    "factors that do not fit": ("mm", (torch.zeros(3, 4), torch.zeros(5, 4))),
    "a sum that does not fit": ("addmm_", (torch.zeros(2, 5), torch.zeros(3, 4), torch.zeros(4, 5))),
    "side by side, of other heights": ("cat", ([torch.zeros(2, 3), torch.zeros(3, 3)], 1)),
    "side by side, of other types": ("cat", ([torch.zeros(2, 3), torch.zeros(2, 3, dtype=torch.float16)], 1)),
}


@pytest.mark.parametrize("name, arguments", FOUND.values(), ids=FOUND)
def test_shapes_are_those_of_pytorch(name, arguments):
    found = shape_of_result(name, emptied(arguments))
    real = getattr(torch.ops.aten, name)(*arguments)
    assert found.is_meta and (found.shape, found.dtype, found.stride()) == (real.shape, real.dtype, real.contiguous().stride())


@pytest.mark.parametrize("name, arguments", LEFT.values(), ids=LEFT)
def test_shapes_that_are_not_plain_are_left_to_pytorch(name, arguments):
    assert shape_of_result(name, emptied(arguments)) is None


def test_numbers_of_a_layer_are_computed_once(monkeypatch, noise_case):
    calls, describe = [], _feature_numbers.describe_channels
    monkeypatch.setattr(_feature_numbers, "describe_channels", lambda *given: calls.append(given) or describe(*given))
    model = models.deep(in_channels=2, classes=2, width=0.1)
    explorer = FeatureExplorer(model, noise_case((24, 26, 25)), layers=["normal.0", "normal.1"])
    explorer._repr_mimebundle_()
    table, order = explorer.table, explorer.order
    assert len(calls) == 1 and order == tuple(range(len(table)))
    explorer.layer = "normal.1"
    assert len(explorer.table) == len(explorer.order) and len(calls) == 2
    explorer.layer = "normal.0"
    with torch.no_grad():
        model.get_submodule("normal.0").conv.weight.zero_()  # the numbers are of the network as it is now
    assert explorer.table["deviation"].max() == 0 < table["deviation"].min() and explorer.table["dead"].all()
    assert len(calls) == 3

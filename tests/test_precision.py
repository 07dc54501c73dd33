from __future__ import annotations

import pytest
import torch

from medseg_lite.engine.precision import autocast, number_type

CPU, GPU = torch.device("cpu"), torch.device("cuda")


@pytest.mark.parametrize(
    ("native", "cudnn", "dims", "training", "guarded"),
    [
        (True, 91002, 2, torch.bfloat16, torch.bfloat16),
        (False, 91002, 2, torch.float32, torch.float16),  # a T4
        (True, 91002, 3, torch.float32, torch.float32),  # cuDNN's faulty 3-D convolutions
        (True, 91900, 3, torch.bfloat16, torch.bfloat16),
        (False, None, 3, torch.float32, torch.float16),
    ],
)
def test_auto_is_the_fastest_type_whose_overflow_is_noticed(monkeypatch, native, cudnn, dims, training, guarded):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0) if native else (7, 5))
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: cudnn)
    assert number_type("auto", GPU, spatial_dims=dims) == training
    assert number_type("auto", GPU, spatial_dims=dims, guarded=True) == guarded
    for other in (CPU, torch.device("mps"), torch.device("xpu")):
        assert number_type("auto", other, spatial_dims=dims, guarded=True) == torch.float32


def test_types_by_name():
    assert number_type("bfloat16", CPU, spatial_dims=3) == torch.bfloat16
    with pytest.raises(ValueError, match="precision='double'; expected auto, float32, float16, bfloat16"):
        number_type("double", CPU, spatial_dims=3)


def test_a_device_without_autocast_computes_in_float32(monkeypatch):
    monkeypatch.setattr(torch.amp, "is_autocast_available", lambda kind: False)
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: pytest.fail("there is none here"))
    with autocast(torch.float32, torch.device("mps")):
        assert torch.nn.Linear(2, 2)(torch.ones(1, 2)).dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast(dtype):
    with autocast(dtype, CPU):
        assert torch.nn.Linear(2, 2)(torch.ones(1, 2)).dtype == dtype

from __future__ import annotations

import pytest
import torch

from medseg_lite.engine.precision import autocast, number_type

CPU, GPU = torch.device("cpu"), torch.device("cuda")


@pytest.mark.parametrize("supported", [True, False])
def test_auto_is_float32_unless_the_device_has_the_type(monkeypatch, supported):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: supported)
    assert number_type("auto", GPU, auto=torch.bfloat16) == (torch.bfloat16 if supported else torch.float32)
    assert number_type("auto", GPU, auto=torch.float16) == torch.float16
    assert number_type("auto", CPU, auto=torch.float16) == torch.float32
    assert number_type("bfloat16", CPU, auto=torch.float16) == torch.bfloat16
    with pytest.raises(ValueError, match="precision='double'; expected auto, float32, float16, bfloat16"):
        number_type("double", CPU, auto=torch.float16)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast(dtype):
    with autocast(dtype, CPU):
        assert torch.nn.Linear(2, 2)(torch.ones(1, 2)).dtype == dtype

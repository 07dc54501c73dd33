from __future__ import annotations

import pytest
import torch

from medseg_lite import devices
from medseg_lite.devices import describe_device, fault_of, find_device, free_memory, is_out_of_memory, release_memory

CPU = torch.device("cpu")


def test_the_cpu():
    assert find_device("cpu") == CPU and fault_of(CPU) is None
    assert free_memory(CPU) > 0
    assert describe_device(CPU) == f"{torch.get_num_threads()} CPU threads"
    release_memory(CPU)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("cuda", "device cuda: PyTorch sees no CUDA GPU here; use cpu"),
        ("cuda:1", "device cuda:1: PyTorch sees no CUDA GPU here; use cpu"),
        ("xpu", "device xpu: PyTorch sees no xpu device here; use cpu"),
        ("gpu", "device 'gpu': PyTorch knows no such device; expected auto, cpu, cuda, cuda:1, mps or xpu"),
    ],
)
def test_devices_that_are_not_there(name, message):
    with pytest.raises(ValueError, match=f"^{message}$"):
        find_device(name)


def test_a_gpu_without_kernels_is_said_and_not_chosen(monkeypatch, capsys):
    """PyTorch lists a P100 although its CUDA 13 build has no kernels for it."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(devices, "fault_of", lambda device: "no kernel image is available for execution on the device")
    assert find_device() == CPU
    assert capsys.readouterr().out == (
        "the GPU here cannot be used (no kernel image is available for execution on the device); going on with the CPU\n"
    )
    with pytest.raises(ValueError, match="device cuda: no kernel image"):
        find_device("cuda")


def test_memory_of_cached_files_counts_as_free(monkeypatch, tmp_path):
    monkeypatch.setattr(devices, "MEMORY_FILE", tmp_path / "meminfo")
    assert free_memory(CPU) is None  # another system
    devices.MEMORY_FILE.write_text("MemTotal: 9000 kB\nMemFree: 100 kB\nMemAvailable: 5000 kB\n")
    assert free_memory(CPU) == 5000 * 1024


def test_memory_that_pytorch_keeps_counts_as_free(monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (10, 100))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 70)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 30)
    assert free_memory(torch.device("cuda")) == 50


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9000000 bytes"),
        RuntimeError("CUDA error: out of memory"),
        RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("MPS backend out of memory (MPS allocated: 9.05 GB, other allocations: 1.02 MB)"),
        RuntimeError("Expected canUse32BitIndexMath(input) && canUse32BitIndexMath(output) to be true, but got false."),
    ],
)
def test_words_for_memory_that_ran_out(error):
    assert is_out_of_memory(error)


def test_other_errors_are_no_lack_of_memory():
    assert not is_out_of_memory(RuntimeError("CUDA error: device-side assert triggered"))

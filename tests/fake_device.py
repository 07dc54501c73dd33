"""A GPU in name only: tensors say "cuda:0" (or "mps:0"), hold real numbers, and are computed on the CPU.

    with fake_device.cuda("T4") as gpu:     # or "L4", "A100", memory=2e9; fake_device.mps() for Apple's
        model = models.deepmedic(width=0.1).to("cuda")
        ...
    gpu.syncs                               # Counter: what made the CPU wait for the GPU
    gpu.used, gpu.peak, gpu.reserved        # bytes of tensors: now, at most, and what PyTorch would keep
    gpu.flops, gpu.bytes, gpu.launches      # Counters of work, by kind of number: "half", "float32", "float64", "other"

With `cuda(compute=False)`, convolutions and matrix products return zeros of the right shape, type and device, forward and
backward, and everything else is computed. Networks of full width then run in seconds. Their work is counted all the same.

What it catches: tensors of two devices in one operation; `.numpy()` of a GPU tensor; random numbers of the GPU that are not
restored; the number types that autocast chooses, with half precision's rounding and overflow; tensors that do not fit (an
OutOfMemoryError); numbers that are read back too often; float64 on an Apple GPU; a second GPU that is not there.

What it cannot see: speed; cuDNN, the memory that it works in, and TF32; assertions inside kernels; kernels that a GPU lacks
for a type; streams, and copies to the GPU that wait; NCCL; torch.compile; autocast on an Apple GPU. It differs from CUDA in
these points: dropout makes three launches, not one; `data_ptr` and safetensors need `.cpu()` first; `tensor.data` cannot be
set; a mask as index that sets a single number counts as no wait, because PyTorch fills by mask then; a network cannot be moved
while a result of it waits for its gradient.

How it works: a tensor is a wrapper around a CPU tensor. For Python it is on "cuda:0". For PyTorch's C++ code it is of the kind
"xla", which has no streams (autograd would ask CUDA for them) and which CUDA's autocast accepts. A dispatch mode catches what
is made on the GPU or sent there. PyTorch refuses kinds of devices without a device guard, so an empty guard is registered for
them. It stays registered after the block, where asking for a GPU gives another error than before; nothing else of PyTorch
stays changed. It needs PyTorch 2.9 on Linux or macOS.
"""

from __future__ import annotations

import contextlib
import copy
import ctypes
import functools
import threading
import types
import weakref
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import pytest
import torch
from torch.optim import optimizer as optimizers
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.flop_counter import flop_registry

PRESETS = {"T4": ("Tesla T4", (7, 5), 15e9), "L4": ("NVIDIA L4", (8, 9), 23e9), "A100": ("NVIDIA A100-SXM4-40GB", (8, 0), 40e9)}
HALF = (torch.float16, torch.bfloat16)
KINDS = {torch.float16: "half", torch.bfloat16: "half", torch.float32: "float32", torch.float64: "float64"}
CPU, XLA = torch.device("cpu"), torch.device("xla", 0)
aten = torch.ops.aten

# In half precision these are computed in float32 and rounded, because a GPU adds up in float32.
PRODUCTS = {getattr(aten, name) for name in "convolution convolution_backward mm addmm bmm baddbmm mv addmv dot".split()}
COPIES = {aten.copy_, aten._to_copy, aten._foreach_copy_}  # from one device to another
INDEXED = {aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_}  # indices may lie on the CPU
# Operations whose result, or the shape of it, the CPU waits for.
WAITS = {getattr(aten, name): name for name in "nonzero bincount repeat_interleave equal unique_dim unique_consecutive".split()}
WAITS |= {aten._local_scalar_dense: "item", aten.masked_select: "mask as index", aten._unique2: "unique"}
_active = threading.Lock()
_guards: list = []


class Gpu:
    """The facts of a fake GPU, and what it was used for.

    Attributes:
        name, capability, memory: as PyTorch tells them; memory in bytes.
        counted: whether there are the attributes below. A real GPU has none (see `conftest.gpu`).
        syncs: number of times the CPU waited for the GPU, by reason.
        flops, bytes, launches: floating-point operations of products and convolutions, bytes read and written, and kernels
            started, by kind of number.
        used, peak, reserved: bytes of living tensors, the most of them at a time, and the bytes that PyTorch would keep.
    """

    counted = True

    def __init__(self, device: torch.device, name: str, capability: tuple[int, int], memory: float, compute: bool):
        self.device, self.name, self.capability, self.memory, self.compute = device, name, capability, int(memory), compute
        self.syncs, self.flops, self.bytes, self.launches = Counter(), Counter(), Counter(), Counter()
        self.used = self.peak = self.reserved = 0
        self.held: dict[int, weakref.ref] = {}  # pieces of memory, by their address
        self.generators: dict[int, torch.Generator] = {}  # by their address in C++, where they are of the CPU
        self.lock = threading.RLock()
        self.seed(0)

    def seed(self, number: int) -> None:
        """Start the GPU's random numbers, which are others than the CPU's of the same seed."""
        self.random = torch.Generator().manual_seed((int(number) + 7919) % 2**63).get_state()

    def hold(self, storage: torch.UntypedStorage) -> None:
        """Count a piece of memory for as long as it lives."""
        key, size = storage._cdata, storage.nbytes()
        with self.lock:
            if key in self.held:
                return
            if self.used + size > self.memory:
                tried = f"Tried to allocate {size / 2**20:.2f} MiB beside {self.used / 2**20:.2f} MiB (a fake GPU)"
                raise torch.OutOfMemoryError(f"{self.device.type.upper()} out of memory. {tried}")
            self.held[key] = weakref.ref(storage, functools.partial(self.let_go, key, size))
            self.used += size
            self.peak, self.reserved = max(self.peak, self.used), max(self.reserved, self.used)

    def let_go(self, key: int, size: int, _) -> None:
        with self.lock:
            del self.held[key]
            self.used -= size

    def owns(self, device) -> bool:
        """Return whether a device is this GPU; "xla" is what PyTorch's C++ code takes it for."""
        device = torch.device(device)
        if device.type == self.device.type and device.index not in (None, 0):
            raise RuntimeError(f"CUDA error: invalid device ordinal ({device}; this fake machine has one GPU)")
        return device.type in (self.device.type, "xla")


class FakeTensor(torch.Tensor):
    """A tensor that says it is on the GPU; `elem` is the CPU tensor with its numbers."""

    @staticmethod
    def __new__(cls, elem: torch.Tensor, gpu: Gpu):
        if gpu.device.type == "mps" and elem.dtype in (torch.float64, torch.complex128):
            kind = str(elem.dtype).removeprefix("torch.")
            raise TypeError(f"Cannot convert a MPS Tensor to {kind} dtype as the MPS framework doesn't support float64.")
        gpu.hold(elem.untyped_storage())
        places = {"strides": elem.stride(), "storage_offset": elem.storage_offset(), "dtype": elem.dtype, "device": XLA}
        keys = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastCUDA)
        self = torch.Tensor._make_wrapper_subclass(cls, elem.shape, **places, _extra_dispatch_keys=keys)
        self.elem, self.gpu = elem, gpu
        return self

    __torch_function__ = torch._C._disabled_torch_function_impl
    device = property(lambda self: self.gpu.device)
    is_cuda = property(lambda self: self.gpu.device.type == "cuda")
    is_mps = property(lambda self: self.gpu.device.type == "mps")
    data = property(lambda self: self.detach())  # which cannot be set

    @classmethod
    def __torch_dispatch__(cls, func, kinds, args=(), kwargs=None):
        gpu = next(t.gpu for t in tree_leaves((args, kwargs)) if isinstance(t, FakeTensor))
        return run(gpu, func, args, kwargs or {})

    def to(self, *args, copy=False, **kwargs):
        """Return the tensor itself where nothing changes, as PyTorch does."""
        device, dtype, _, memory_format = torch._C._nn._parse_to(*args, **kwargs)
        same = (device is None or self.gpu.owns(device)) and dtype in (None, self.dtype) and memory_format is None
        return self if same and not copy else super().to(*args, copy=copy, **kwargs)

    def cuda(self, device=None, **_):
        return self.to("cuda" if device is None else device)

    def numpy(self, **_):
        raise TypeError(f"can't convert {self.device} device type tensor to numpy. Use Tensor.cpu() to copy it first.")

    def tolist(self):
        return self.cpu().tolist()

    def __format__(self, spec):
        return format(self.item(), spec) if self.ndim == 0 else super().__format__(spec)

    def __repr__(self, **_):
        return f"{self.elem!r} on {self.device}"

    def __deepcopy__(self, memo):
        if not self.is_leaf:
            raise RuntimeError("Only Tensors created explicitly by the user (graph leaves) support the deepcopy protocol")
        if id(self) not in memo:
            copied = FakeTensor(self.elem.detach().clone(), self.gpu).requires_grad_(self.requires_grad)
            copied._is_param = isinstance(self, torch.nn.Parameter)
            copied.grad = copy.deepcopy(self.grad, memo)
            memo[id(self)] = copied
        return memo[id(self)]

    def __reduce_ex__(self, protocol):  # `torch.save` writes the numbers and the device's name
        arguments = (self.elem.detach().clone(), self.dtype, str(self.device), self.requires_grad)
        return torch._utils._rebuild_device_tensor_from_cpu_tensor, arguments


def run(gpu: Gpu, func, args: tuple, kwargs: dict):
    """Compute one operation on the CPU, and put the result where it would be."""
    inputs = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
    here = [t for t in inputs if isinstance(t, FakeTensor)]
    device = kwargs.get("device")
    wanted = bool(here) if device is None else gpu.owns(device)  # is the result the GPU's?
    if not here and not wanted:
        with gpu.lock if torch.Tag.nondeterministic_seeded in func.tags else contextlib.nullcontext():
            return func(*args, **kwargs)
    if here:
        check_devices(func, args, inputs)
        count_waits(gpu, func, args, device)
    if wanted and device is not None:
        kwargs = {**kwargs, "device": CPU}
    generator = kwargs.get("generator")
    if wanted and generator is not None and generator._cdata not in gpu.generators:
        raise RuntimeError(f"Expected a '{gpu.device.type}' device type for generator but found 'cpu'")
    half = next((t.dtype for t in here if t.dtype in HALF), None) if func.overloadpacket in PRODUCTS else None

    def lower(t):
        found = t.elem if isinstance(t, FakeTensor) else t
        return found.float() if half and isinstance(t, FakeTensor) and t.dtype == half else found

    def lift(t):
        if not isinstance(t, torch.Tensor) or isinstance(t, FakeTensor):
            return t
        return FakeTensor(t.to(half) if half and t.dtype == torch.float32 else t, gpu)

    result = compute(gpu, func, *tree_map(lower, (args, kwargs)))
    if wanted:
        result = return_and_correct_aliasing(func, args, kwargs, tree_map(lift, result))
    if any(t.elem.shape != t.shape for t in here):
        raise NotImplementedError(f"{func} changes the shape of a tensor in place, which the fake GPU cannot follow")
    count_work(gpu, func, args, kwargs, inputs, result)
    return result


def compute(gpu: Gpu, func, args: tuple, kwargs: dict):
    """Return the result of an operation on CPU tensors, with the GPU's random numbers."""
    if not gpu.compute and func.overloadpacket in PRODUCTS:
        shapes = func(*tree_map(lambda t: t.to("meta") if isinstance(t, torch.Tensor) else t, args), **kwargs)
        return tree_map(lambda t: torch.zeros_like(t, device=CPU) if isinstance(t, torch.Tensor) else t, shapes)
    if torch.Tag.nondeterministic_seeded not in func.tags or kwargs.get("generator") is not None:
        return func(*args, **kwargs)
    with gpu.lock:
        before = torch.get_rng_state()
        torch.set_rng_state(gpu.random)
        try:
            return func(*args, **kwargs)
        finally:
            gpu.random = torch.get_rng_state()
            torch.set_rng_state(before)


def check_devices(func, args: tuple, inputs: list) -> None:
    """Raise, as CUDA does, where tensors of two devices meet."""
    packet = func.overloadpacket
    if packet in COPIES:
        return
    if packet in INDEXED:
        indices = [t for t in args[1] if t is not None]
        if not isinstance(args[0], FakeTensor) and any(isinstance(t, FakeTensor) for t in indices):
            raise RuntimeError("indices should be either on cpu or on the same device as the indexed tensor (cpu)")
        inputs = [args[0], *(t for t in args[2:] if isinstance(t, torch.Tensor))]
    numbers = torch.Tag.pointwise in func.tags or packet in INDEXED or "_foreach" in func.name()
    for t in inputs:
        if not isinstance(t, FakeTensor) and not (numbers and t.ndim == 0):
            found = f"{next(f.device for f in inputs if isinstance(f, FakeTensor))} and {t.device}! ({func})"
            raise RuntimeError(f"Expected all tensors to be on the same device, but found at least two devices, {found}")


def count_waits(gpu: Gpu, func, args: tuple, device) -> None:
    """Count an operation that makes the CPU wait for the GPU."""
    packet = func.overloadpacket
    reason = WAITS.get(packet)
    if packet is aten._to_copy and device is not None and device.type == "cpu":
        reason = "copy to the CPU"
    elif packet is aten.copy_ and not isinstance(args[0], FakeTensor):
        reason = "copy to the CPU"
    elif packet in INDEXED and any(isinstance(t, FakeTensor) and t.dtype == torch.bool for t in args[1]):
        reason = "mask as index" if packet is aten.index or args[2].numel() != 1 else None
    if reason:
        gpu.syncs[reason] += 1


def count_work(gpu: Gpu, func, args: tuple, kwargs: dict, inputs: list, result) -> None:
    """Count a kernel, the bytes that it reads and writes, and the operations of a product."""
    if func.is_view or "empty" in func.overloadpacket.__name__:
        return
    results = [t for t in tree_leaves(result) if isinstance(t, torch.Tensor)]
    kind = next((KINDS[t.dtype] for t in [*inputs, *results] if t.dtype in KINDS), "other")
    formula = flop_registry.get(func.overloadpacket)
    with gpu.lock:
        gpu.launches[kind] += 1
        gpu.bytes[kind] += sum(t.numel() * t.element_size() for t in [*inputs, *results])
        if formula is not None:
            gpu.flops[kind] += formula(*args, **kwargs, out_val=result)


class Mode(TorchDispatchMode):
    """Catches what is made on the GPU or sent there, where no tensor of the GPU takes part yet."""

    def __init__(self, gpu: Gpu):
        super().__init__()
        self.gpu = gpu

    def __torch_dispatch__(self, func, kinds, args=(), kwargs=None):
        return run(self.gpu, func, args, kwargs or {})


@contextlib.contextmanager
def one_thread(gpu: Gpu) -> Iterator[None]:
    """Have a GPU in this thread."""
    lift = torch._C._only_lift_cpu_tensors()
    torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor(..., device="cuda") makes the numbers on the CPU first
    try:
        with torch.autograd.set_multithreading_enabled(False), Mode(gpu):  # gradients are computed in the thread that asks
            yield
    finally:
        torch._C._set_only_lift_cpu_tensors(lift)


def install_guards(*kinds: str) -> None:
    """Register an empty device guard for kinds of devices.

    PyTorch lets Python code register one for devices of the kind "privateuse1". The function that every backend calls when it
    is loaded then registers the same object for another kind.
    """
    path = next(iter((Path(torch.__file__).parent / "lib").glob("libc10.*")), None)
    try:
        base, library = torch._C._acc.DeviceGuard, ctypes.CDLL(str(path))
        registry = (ctypes.c_void_p * 21).in_dll(library, "_ZN3c104impl26device_guard_impl_registryE")
        register = library._ZN3c104impl19registerDeviceGuardENS_10DeviceTypeEPKNS0_24DeviceGuardImplInterfaceE
    except (AttributeError, OSError, ValueError) as error:
        pytest.skip(f"no fake GPU with this build of PyTorch: {error}")
    for kind in map(torch._C._autograd.DeviceType.__members__.get, kinds):
        if registry[int(kind)] is None:
            guard = type("Guard", (base,), {"type_": lambda self, kind=kind: kind})()
            torch._C._acc.register_python_privateuseone_device_guard(guard)
            register(ctypes.c_int8(int(kind)), ctypes.c_void_p(registry[20]))
            _guards.append(guard)  # PyTorch keeps its address only


def replacements(gpu: Gpu) -> dict:
    """Return what `torch.cuda` or `torch.mps` answers, by its name there."""

    def set_random(state, device=None):
        if state.device != CPU or state.dtype != torch.uint8:
            raise TypeError("RNG state must be a torch.ByteTensor")
        gpu.random = state.clone()

    def release():
        gpu.reserved = gpu.used

    def reset_peak(device=None):
        gpu.peak = gpu.used

    always, now = {"is_available": True, "device_count": 1}, {}
    functions = {
        "synchronize": lambda device=None: gpu.syncs.update(["synchronize"]),
        "empty_cache": release,
        "get_rng_state": lambda device=None: gpu.random.clone(),
        "set_rng_state": set_random,
        "manual_seed": gpu.seed,
    }
    if gpu.device.type == "mps":
        now |= {"current_allocated_memory": "used", "driver_allocated_memory": "reserved", "recommended_max_memory": "memory"}
    else:
        facts = types.SimpleNamespace(name=gpu.name, major=gpu.capability[0], minor=gpu.capability[1], total_memory=gpu.memory)
        always |= {"is_initialized": True, "_lazy_init": None, "current_device": 0, "set_device": None}
        always |= {"get_device_name": gpu.name, "get_device_capability": gpu.capability, "get_device_properties": facts}
        always |= {"_check_bf16_tensor_supported": True}  # a T4 says so: it emulates bfloat16, slowly
        now |= {"memory_allocated": "used", "memory_reserved": "reserved", "max_memory_allocated": "peak"}
        functions |= {
            "mem_get_info": lambda device=None: (gpu.memory - gpu.reserved, gpu.memory),
            "reset_peak_memory_stats": reset_peak,
            "manual_seed_all": gpu.seed,
        }
    functions |= {name: lambda device=None, value=value: value for name, value in always.items()}
    return functions | {name: lambda device=None, value=value: getattr(gpu, value) for name, value in now.items()}


def own_functions(gpu: Gpu) -> list:
    """Return the patches of PyTorch's functions that have to know of the GPU: (object, name, new function)."""
    load, run_thread, real_generator = torch.load, threading.Thread.run, torch.Generator

    def _load(file, map_location=None, **options):
        if not isinstance(map_location, (str, torch.device)) or not gpu.owns(map_location):
            return load(file, map_location=map_location, **options)
        found = load(file, map_location=CPU, **options)
        return tree_map(lambda t: t.to(gpu.device) if isinstance(t, torch.Tensor) else t, found)

    def _run(self):
        with one_thread(gpu):
            run_thread(self)

    class Generator(real_generator):
        """A generator of the GPU, which draws on the CPU."""

        device = property(lambda self: gpu.device)

        def __new__(cls, device="cpu"):
            if not gpu.owns(device):
                return real_generator(device)
            new = super().__new__(cls)
            gpu.generators[new._cdata] = new
            return new

    stream, kind = types.SimpleNamespace(is_capturing=lambda: False), torch.device(gpu.device.type)
    accelerator = {"current_accelerator": kind, "is_available": True, "device_count": 1}
    accelerator |= {"current_device_index": 0, "current_stream": stream}
    return [
        (torch.__future__, "_swap_module_params_on_conversion", True),  # a moved network keeps its parameters
        (torch, "load", _load),
        (torch.Tensor, "pin_memory", lambda self, device=None: self.clone()),
        (torch, "Generator", Generator),
        (threading.Thread, "run", _run),
        (optimizers, "_foreach_supported_types", [*optimizers._foreach_supported_types, FakeTensor]),
        (torch.version, "cuda", "12.8" if gpu.device.type == "cuda" else None),
        (torch.backends.mps, "is_available", lambda: gpu.device.type == "mps"),
        *((torch.accelerator, name, lambda *_, value=value, **__: value) for name, value in accelerator.items()),
    ]


@contextlib.contextmanager
def fake(gpu: Gpu) -> Iterator[Gpu]:
    """Have a GPU inside the block, in this thread and in those that start meanwhile."""
    if not _active.acquire(blocking=False):
        raise RuntimeError("a fake GPU is in use already; one at a time")
    try:
        install_guards("XLA", gpu.device.type.upper())
        module = torch.get_device_module(gpu.device)
        with contextlib.ExitStack() as stack:
            for owner, name, new in [*((module, *pair) for pair in replacements(gpu).items()), *own_functions(gpu)]:
                stack.enter_context(mock.patch.object(owner, name, new))
            stack.enter_context(one_thread(gpu))
            yield gpu
    finally:
        _active.release()


def cuda(preset: str = "T4", *, memory: float | None = None, compute: bool = True):
    """Return a context in which PyTorch has one CUDA GPU. It skips the test where there is a real one.

    Args:
        preset: "T4" (which has no bfloat16 of its own), "L4" or "A100".
        memory: bytes of memory, if not the preset's.
        compute: False returns zeros from convolutions and matrix products.
    """
    if torch.cuda.is_available() and not _active.locked():
        pytest.skip("there is a real GPU")
    name, capability, size = PRESETS[preset]
    return fake(Gpu(torch.device("cuda", 0), name, capability, memory or size, compute))


def mps(*, memory: float = 12e9, compute: bool = True):
    """Return a context in which PyTorch has Apple's GPU, which refuses float64. It skips the test where there is a real one."""
    if torch.backends.mps.is_available() and not _active.locked():
        pytest.skip("there is a real GPU")
    return fake(Gpu(torch.device("mps", 0), "Apple M", (0, 0), memory, compute))


def real() -> types.SimpleNamespace:
    """Return the facts of the real CUDA GPU, which counts nothing."""
    facts = torch.cuda.get_device_properties(0)
    sizes = {"capability": (facts.major, facts.minor), "memory": facts.total_memory}
    return types.SimpleNamespace(device=torch.device("cuda", 0), name=facts.name, counted=False, **sizes)

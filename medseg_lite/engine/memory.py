"""The memory that a network takes for a patch, found in one run without any numbers.

The run is on PyTorch's "meta" device, where tensors have a shape but no content. Every tensor is counted from the operation that
makes it to the moment when nothing holds it any more. So skip connections, coarse layers, 1×1×1 layers and copies count as they do
in a real run. Half precision is counted as `torch.autocast` makes it on a GPU. What a kernel needs for a moment is not counted.
"""

from __future__ import annotations

import weakref
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from .geometry import WithoutContent, shape_of_result, without_content
from .tracing import evaluating

# Functions that autocast runs in half precision on a GPU, and those that it runs in float32. Others take what they are given.
_IN_HALF = {"prelu", "linear", "matmul", "__matmul__", "mm", "bmm", "addmm"}
_IN_FLOAT = {"interpolate", "softmax", "log_softmax", "layer_norm", "group_norm", "exp", "log", "pow", "__pow__", "sum"}


class Need(NamedTuple):
    """The memory that a network takes for a patch.

    Attributes:
        bytes: most bytes at a time. The input, the feature maps and the copies of weights in half precision count.
        largest: number of values in the largest tensor.
    """

    bytes: int
    largest: int


def measure(
    network: nn.Module, shape: Sequence[int], dtype: torch.dtype = torch.float32, *, gradients: bool = False
) -> Need | None:
    """Find the memory that a network takes for an input, in milliseconds, without computing anything.

    Args:
        network: any network, on any device. Its hooks are not called. It is used in evaluation mode and left as it was.
        shape: `(B, C, *space)` of the input.
        dtype: number type that `torch.autocast` computes in.
        gradients: whether all feature maps are kept until the end.

    Returns:
        None where the network cannot be run without numbers, because it reads some.
    """
    count, x = _Count(), torch.empty(*shape, device="meta")
    count.hold(x)
    try:
        with torch.no_grad(), evaluating(network), _without_hooks(network), count, ExitStack() as half:
            if dtype != torch.float32:
                half.enter_context(_Autocast(dtype))
            network(x)
    except Exception:  # of any kind, for a network is anybody's code
        return None
    return Need(count.total if gradients else count.most, count.largest)


class _Count(WithoutContent):
    """A mode in which operations find nothing but the shapes of their results, whose bytes are counted while they live."""

    def __init__(self):
        super().__init__()
        self.now = self.most = self.total = self.largest = 0
        self.holders: dict[int, int] = {}  # number of tensors that share a storage, by its address

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result = None
        if any(t.is_meta for t in _tensors(args)):
            result = shape_of_result(function.overloadpacket.__name__, args)
            args, kwargs = without_content(args), without_content(kwargs)
        if result is None:
            result = function(*args, **kwargs)
        for tensor in _tensors([result]):
            if tensor.is_meta:
                self.hold(tensor)
        return result

    def hold(self, tensor: Tensor) -> None:
        """Count the memory of a tensor for as long as the tensor lives."""
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key not in self.holders:
            self.now += size
            self.total += size
            self.most = max(self.most, self.now)
            self.largest = max(self.largest, tensor.numel())
        self.holders[key] = self.holders.get(key, 0) + 1
        weakref.finalize(tensor, self._release, key, size)

    def _release(self, key: int, size: int) -> None:
        self.holders[key] -= 1
        if not self.holders[key]:
            del self.holders[key]
            self.now -= size


class _Autocast(TorchFunctionMode):
    """A mode that does to tensors without content what `torch.autocast` does on a GPU."""

    def __init__(self, half: torch.dtype):
        super().__init__()
        self.half = half
        self.weights: dict[int, Tensor] = {}  # autocast keeps weights in half precision until its end

    def __torch_function__(self, function, types, args=(), kwargs=None):
        name, dtype = function.__name__, None
        if name in _IN_HALF or name.startswith("conv"):
            dtype = self.half
        elif name in _IN_FLOAT:
            dtype = torch.float32
        elif name == "cat":
            dtype = torch.float32 if any(t.dtype == torch.float32 for t in _tensors(args)) else self.half
        return function(*(args if dtype is None else self._cast(args, dtype)), **(kwargs or {}))

    def _cast(self, value, dtype: torch.dtype):
        if isinstance(value, (list, tuple)):
            return type(value)(self._cast(v, dtype) for v in value)
        if not isinstance(value, Tensor) or not value.is_floating_point() or value.dtype == dtype:
            return value
        if id(value) in self.weights:
            return self.weights[id(value)]
        copy = torch.empty(value.shape, dtype=dtype, device="meta")
        if isinstance(value, nn.Parameter):
            self.weights[id(value)] = copy
        return copy


def _tensors(values: Sequence) -> Iterator[Tensor]:
    """Yield the tensors among some values, and in the lists among them."""
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from _tensors(value)


@contextmanager
def _without_hooks(model: nn.Module) -> Iterator[None]:
    """Keep a network's hooks from being called within the block: their owners expect numbers."""
    kept = [(module, module._forward_hooks) for module in model.modules() if module._forward_hooks]
    for module, _ in kept:
        module._forward_hooks = OrderedDict()
    try:
        yield
    finally:
        for module, hooks in kept:
            module._forward_hooks = hooks

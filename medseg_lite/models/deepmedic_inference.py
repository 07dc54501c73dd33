"""DeepMedic rearranged for fast inference on a CPU: the same numbers, in another order of work.

These changes help, the most useful first:

* Feature maps are stored channels-last.
* Numbers of channels are padded with zeros to a size that the convolution kernels like (30 → 32, 50 → 56).
* Batch normalisation is folded into the convolutions. Each PReLU changes the maps in place, over pieces that stay in the cache.
* The 1×1×1 layers are matrix products over pieces that stay in the cache. The low-resolution half of the first one is computed
  before its repetition. One of the padded channels is held at 1, so that the bias of the next layer is a row of its matrix.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .layers import ConvBlock
from .network import Network

DOWN = 3  # sub-sampling factor of the low-resolution pathway
PIECE = 12000  # voxels in a piece that is worked on at a time: 150 channels of them stay in the cache of most CPUs


class _Layer(nn.Module):
    """The tensors of one layer, as buffers, so that they move with the network."""

    def __init__(self, **tensors: Tensor | None):
        super().__init__()
        for name, tensor in tensors.items():
            self.register_buffer(name, tensor)


class FoldedDeepMedic(Network):
    """The network that `DeepMedic.for_inference` returns: the same input and output, without gradients."""

    def __init__(self, model: Network):
        super().__init__()
        self.copy_contract(model)
        self.cut, self.low_resolution = model.cut, model.low_resolution
        self.format = torch.channels_last_3d if model.spatial_dims == 3 else torch.channels_last
        self.conv = F.conv3d if model.spatial_dims == 3 else F.conv2d
        with torch.no_grad():
            self.normal = self._fold_pathway(model.normal)
            self.low = self._fold_pathway(model.low) if model.low_resolution else None
            self._fold_dense(model)

    def _fold_pathway(self, blocks: nn.Sequential) -> nn.ModuleList:
        """Return the kernel, bias and PReLU slopes of each layer, with zeros for the channels that fill up."""
        layers, inputs = nn.ModuleList(), blocks[0].conv.in_channels
        for n, block in enumerate(blocks):
            weight, bias, slope = _fold(block)
            last = n == len(blocks) - 1
            outputs = _padded(len(weight) + last)  # the last layer has room for the channel that is always 1
            wide = weight.new_zeros(outputs, inputs, *weight.shape[2:])
            wide[: len(weight), : weight.shape[1]] = weight
            bias, slope = (F.pad(t, (0, outputs - len(weight))) for t in (bias, slope))
            if last:
                bias[len(weight)] = slope[len(weight)] = 1
            layers.append(_Layer(weight=wide.contiguous(memory_format=self.format), bias=bias, slope=slope))
            inputs = outputs
        return layers

    def _fold_dense(self, model) -> None:
        """Write the 1×1×1 layers as matrices `(inputs, outputs)`. Biases are in the row of the input that is always 1."""
        features = model.normal[-1].conv.out_channels
        layers = [_fold(block) for block in model.hidden]
        layers.append((model.classifier.weight.detach(), model.classifier.bias.detach(), None))
        self.dense = nn.ModuleList()
        self.register_buffer("context", None)
        inputs, ones = self.normal[-1].weight.shape[0], features
        for n, (weight, bias, slope) in enumerate(layers):
            weight, final = weight.flatten(1), n == len(layers) - 1
            outputs = len(weight) if final else _padded(len(weight) + 1)
            matrix = weight.new_zeros(inputs, outputs)
            matrix[ones, : len(weight)] = bias
            if n == 0 and self.low_resolution:
                self.context = weight.new_zeros(self.low[-1].weight.shape[0], outputs)
                self.context[:features, : len(weight)] = weight[:, features:].T
                weight = weight[:, :features]
            matrix[: weight.shape[1], : len(weight)] = weight.T
            if not final:
                matrix[ones, len(weight)] = 1
                slope = F.pad(slope, (0, outputs - len(slope)), value=1.0)
            self.dense.append(_Layer(matrix=matrix, slope=slope))
            inputs, ones = outputs, len(weight)

    def _pathway(self, x: Tensor, layers: nn.ModuleList) -> Tensor:
        """Run a pathway: `(B, C, *n)` to features `(B, *n_out, F)`."""
        x = x.contiguous(memory_format=self.format)
        for layer in layers:
            x = self.conv(x, layer.weight, layer.bias)
            for piece in x.split(max(1, PIECE // x[:, 0, 0].numel()), dim=2):
                piece.copy_(F.prelu(piece, layer.slope))
        return x.movedim(1, -1).contiguous()

    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        """`(B, C, *(n + 2 margin)) -> (B, K, *n)` logits."""
        inputs = self.cut(x) if isinstance(x, Tensor) else x
        local = self._pathway(inputs[0], self.normal)  # (B, *n, F)
        # A 1×1×1 layer commutes with repetition, so its low-resolution half is 27 times cheaper before it.
        context = self._pathway(inputs[1], self.low) @ self.context if self.low_resolution else None  # (B, *(n / 3), F)
        out = local.new_empty(*local.shape[:-1], self.dense[-1].matrix.shape[1])
        step = max(1, PIECE // local[0, 0, ..., 0].numel() // DOWN) * DOWN
        for b in range(len(local)):
            for i in range(0, local.shape[1], step):
                piece = local[b, i : i + step]
                below = None if context is None else context[b, i // DOWN : -(-(i + step) // DOWN)]
                out[b, i : i + step] = self._dense(piece, below)
        return out.movedim(-1, 1)

    def _dense(self, piece: Tensor, below: Tensor | None) -> Tensor:
        """Apply the 1×1×1 layers to `(*n, F)`, given the first one's share from the low-resolution pathway."""
        shape = piece.shape[:-1]
        before, *rest = self.dense
        if below is None:
            z = piece.flatten(0, -2) @ before.matrix
        else:
            # Autocast leaves operations in place alone.
            z = _repeat(below, shape).flatten(0, -2).addmm_(piece.flatten(0, -2), before.matrix.to(piece.dtype))
        for layer in rest:
            z = F.prelu(z, before.slope) @ layer.matrix
            before = layer
        return z.view(*shape, -1)


def _repeat(x: Tensor, shape: torch.Size) -> Tensor:
    """Repeat every voxel of `(*n, F)` three times along each axis and cut the result to `shape`. It is a copy."""
    times = [DOWN if size > 1 else 1 for size in shape]
    wide = x.new_empty(*(n for size, t in zip(x.shape, times) for n in (size, t)), x.shape[-1])
    wide.copy_(x.view(*(n for size in x.shape[:-1] for n in (size, 1)), x.shape[-1]))
    wide = wide.view(*(size * t for size, t in zip(x.shape, times)), x.shape[-1])
    return wide[tuple(slice(size) for size in shape)].contiguous()


def _padded(channels: int) -> int:
    """Return the next multiple of eight, or `channels` where padding a narrow network would cost more than it gains."""
    wide = -(-channels // 8) * 8
    return wide if wide <= 1.2 * channels else channels


def _fold(block: ConvBlock) -> tuple[Tensor, Tensor, Tensor]:
    """Return the kernel, bias and PReLU slopes of one block, with its batch normalisation folded in."""
    weight, bias = block.conv.weight, block.conv.bias
    if bias is None:
        norm = block.norm
        scale = norm.weight / (norm.running_var + norm.eps).sqrt()
        weight = weight * scale.view(-1, *(1,) * (weight.ndim - 1))
        bias = norm.bias - norm.running_mean * scale
    return weight.detach(), bias.detach().clone(), block.act.weight.detach().clone()

"""DeepMedic rearranged for fast inference on a CPU: the same numbers, in another order of work.

What helps, in the order of its worth: feature maps stored channels-last; channel counts padded with zeros to what the
convolution kernels like (30 → 32, 50 → 56); batch normalisation folded into the convolutions; the 1×1×1 layers as matrix
products over pieces that stay in the cache, with the low-resolution half of the first one computed before its repetition.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .layers import ConvBlock

DOWN = 3  # sub-sampling factor of the low-resolution pathway
ROWS = 12000  # voxels per piece of the 1×1×1 layers: 150 channels of them fit the second-level cache of most CPUs


class FoldedDeepMedic(nn.Module):
    """Made by `DeepMedic.for_inference`; takes and returns what the network does, without gradients."""

    def __init__(self, model):
        super().__init__()
        self.cut, self.spatial_dims, self.low_resolution = model.cut, model.spatial_dims, model.low_resolution
        self.format = torch.channels_last_3d if model.spatial_dims == 3 else torch.channels_last
        self.conv = F.conv3d if model.spatial_dims == 3 else F.conv2d
        with torch.no_grad():
            self.normal = self._fold_pathway(model.normal)
            self.low = self._fold_pathway(model.low) if model.low_resolution else []
            self.features = model.normal[-1].conv.out_channels
            dense = [_fold(block) for block in model.hidden]
            self.dense = [(w.flatten(1), b, a) for w, b, a in dense]
            self.dense.append((model.classifier.weight.flatten(1), model.classifier.bias, None))

    def _fold_pathway(self, blocks: nn.Sequential) -> list[tuple[Tensor, Tensor, Tensor]]:
        layers, inputs = [], blocks[0].conv.in_channels
        for block in blocks:
            weight, bias, slope = _fold(block)
            outputs = -(-len(weight) // 8) * 8
            if outputs > 1.2 * len(weight):  # narrow teaching networks: padding would cost more than it gains
                outputs = len(weight)
            padded = weight.new_zeros(outputs, inputs, *weight.shape[2:])
            padded[: len(weight), : weight.shape[1]] = weight
            grow = (0, outputs - len(weight))
            layers.append((padded.contiguous(memory_format=self.format), F.pad(bias, grow), F.pad(slope, grow)))
            inputs = outputs
        return layers

    def _pathway(self, x: Tensor, layers) -> Tensor:
        """`(B, C, *n)` to features `(B, *n_out, F)`, channels last."""
        x = x.contiguous(memory_format=self.format)
        for weight, bias, slope in layers:
            x = F.prelu(self.conv(x, weight, bias), slope)
        return x.movedim(1, -1)[..., : self.features]

    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        """`(B, C, *(n + 2 margin)) -> (B, K, *n)`."""
        inputs = self.cut(x) if isinstance(x, Tensor) else x
        local = self._pathway(inputs[0], self.normal)
        (weight, bias, slope), *rest = self.dense
        context = None
        if self.low_resolution:
            # A 1×1×1 layer commutes with repetition, so its low-resolution half is 27 times cheaper before it.
            context = F.linear(self._pathway(inputs[1], self.low), weight[:, self.features :])
            weight = weight[:, : self.features].contiguous()
        out = local.new_empty(*local.shape[:-1], len(self.dense[-1][1]))
        per_row = local[0, 0].numel() // self.features
        step = max(1, ROWS // per_row // DOWN) * DOWN
        for b in range(len(local)):
            for i in range(0, local.shape[1], step):
                z = F.linear(local[b, i : i + step], weight, bias)
                if context is not None:
                    z += _repeat(context[b, i // DOWN : -(-(i + step) // DOWN)], z.shape)
                act = slope
                for w, c, following in rest:
                    z = F.linear(F.prelu(z.flatten(0, -2), act), w, c)
                    act = following
                out[b, i : i + step] = z.view(out[b, i : i + step].shape)
        return out.movedim(-1, 1)


def _repeat(x: Tensor, shape: torch.Size) -> Tensor:
    """Repeat every voxel of `(*n, F)` three times along each axis, cut to `shape`."""
    for axis, size in enumerate(shape[:-1]):
        x = x.repeat_interleave(DOWN, axis).narrow(axis, 0, size)
    return x


def _fold(block: ConvBlock) -> tuple[Tensor, Tensor, Tensor]:
    """Kernel, bias and PReLU slopes of one block with its batch normalisation folded in."""
    weight, bias = block.conv.weight, block.conv.bias
    if bias is None:
        norm = block.norm
        scale = norm.weight / (norm.running_var + norm.eps).sqrt()
        weight = weight * scale.view(-1, *(1,) * (weight.ndim - 1))
        bias = norm.bias - norm.running_mean * scale
    return weight.detach(), bias.detach(), block.act.weight.detach()

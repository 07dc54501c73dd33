"""Kayalibay's 3D U-Net, with long skips that concatenate or add, and the sum of segmentation maps of several scales.

Kayalibay, Jensen and van der Smagt, "CNN-based segmentation of medical imaging data", 2017. https://arxiv.org/abs/1701.03056.
Figures 4 and 17 and Table 7 give the layers; the short skips are in the authors' code only (model_defs.py of
github.com/BRML/CNNbasedMedicalSegmentation).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .layers import init_normal, init_xavier, scaled
from .network import Network, builder

MERGES = ("concat", "sum", "none")


def contracting_maps(blocks: int) -> list[tuple[int, int]]:
    """Return the feature maps of both convolutions of every contracting block: 8 and 16, 32 and 32, 64 and 64, …"""
    return [(8, 16), *((16 << b, 16 << b) for b in range(1, blocks))]


class Norm(nn.Sequential):
    """Batch normalisation and PReLU, one slope per channel, .25 at the start.

    Running averages keep half of their old value at each update (appendix A, eq. 6).
    """

    def __init__(self, maps: int):
        super().__init__()
        self.norm, self.act = nn.BatchNorm3d(maps, momentum=0.5), nn.PReLU(maps)


def conv(in_maps: int, out_maps: int, kernel: int = 3, stride: int = 1) -> nn.Conv3d:
    """Return a convolution padded with zeros, `(B, I, *n) -> (B, O, *(n / stride))`.

    It has no bias, because a bias would vanish in the `Norm` that follows.
    """
    return nn.Conv3d(in_maps, out_maps, kernel, stride=stride, padding=kernel // 2, bias=False)


class Contracting(nn.Module):
    """A block that halves the resolution and makes more maps: `(B, I, *n) -> (B, O, *(n / 2))`.

    With `short_skip` the output of the strided convolution is added to the output of the next one. It has fewer maps; the missing
    ones are zero.
    """

    def __init__(self, in_maps: int, down_maps: int, out_maps: int, *, short_skip: bool):
        super().__init__()
        self.down, self.norm1 = conv(in_maps, down_maps, stride=2), Norm(down_maps)
        self.conv, self.norm2 = conv(down_maps, out_maps), Norm(out_maps)
        self.missing = out_maps - down_maps if short_skip else None

    def forward(self, x: Tensor) -> Tensor:
        down = self.down(x)  # (B, D, *(n / 2))
        y = self.conv(self.norm1(down))  # (B, O, *(n / 2))
        if self.missing is not None:
            y = y + F.pad(down, (0, 0, 0, 0, 0, 0, 0, self.missing))
        return self.norm2(y)


class Expanding(nn.Module):
    """A block that doubles the resolution and takes a long skip: `(B, I, *n), (B, S, *2n) -> (B, O, *2n)`.

    The "deconvolution" repeats every voxel twice along each axis and smooths the result with a convolution (Figure 16).
    """

    def __init__(self, in_maps: int, reduced_maps: int, skip_maps: int, out_maps: int, *, merge: str):
        super().__init__()
        self.merge = merge
        self.reduce = nn.Sequential(conv(in_maps, reduced_maps, kernel=1), Norm(reduced_maps))
        self.deconv = nn.Sequential(nn.Upsample(scale_factor=2), conv(reduced_maps, skip_maps), Norm(skip_maps))
        self.conv = nn.Sequential(conv(skip_maps * (2 if merge == "concat" else 1), out_maps), Norm(out_maps))

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        x = self.deconv(self.reduce(x))  # (B, I/2, *n), then (B, S, *2n)
        if self.merge == "concat":
            x = torch.cat([x, skip], dim=1)  # (B, 2S, *2n)
        elif self.merge == "sum":
            x = x + skip
        return self.conv(x)


class KayalibayUNet3d(Network):
    """A U-Net of padded convolutions, as many voxels out as in.

        n³   C ─ conv 8 ────────────────────── long skip ─────────────────────── deconv 8 ─ conv 16 ── 1³ ─┐
        n/2³      └ ½ 8 ─ conv 16 ──────────── long skip ─────────── deconv 16 ─ conv 32 ──┘─ 1³ ─┐   + ×2 ┴─ K
        n/4³               └ ½ 32 ─ conv 32 ── long skip ─ deconv 32 ─ conv 64 ──┘── 1³ ── ×2 ── + ┘
        n/8³                         └ ½ 64 ─ conv 64 ──────┘

    Every 3³ convolution is followed by batch normalisation and PReLU. A 1³ convolution halves the maps before each
    deconvolution. The segmentation maps (right) have neither; the coarse ones are enlarged by trilinear interpolation.

    Args:
        in_channels: image channels C.
        classes: output classes K, background included.
        merge: kind of long skip: "concat", "sum", or "none" to leave it out.
        maps: number of the last scales that make a segmentation map: 3, or 1 for the last layer alone.
        short_skips: True gives contracting blocks the short skips of the authors' code, which the text does not mention.
        blocks: number of contracting blocks, and of expanding ones, 3 in the paper. One more doubles the coarsest maps.
        init: "normal" (N(0, .01), the paper's) or "xavier".
        width: factor for every number of feature maps.

    Attributes:
        multiple: sizes must be a multiple of this along every axis, 8.
        halo: distance in voxels beyond which nothing influences a prediction, rounded up to a multiple of `multiple`.

    Source: Kayalibay et al. 2017, section 3, figures 4 and 17, Table 7; its code (short skips).
    Taught in notebook 08.
    """

    def __init__(
        self,
        in_channels: int,
        classes: int,
        *,
        merge: str = "concat",
        maps: int = 3,
        short_skips: bool = True,
        blocks: int = 3,
        init: str = "normal",
        width: float = 1.0,
    ):
        super().__init__(in_channels, classes, fewest_classes=2)
        if merge not in MERGES:
            raise ValueError(f"merge={merge!r}; expected one of {', '.join(MERGES)}")
        if not 1 <= blocks <= 6:
            raise ValueError(f"blocks={blocks}; expected 1 to 6 contracting blocks (3 in the paper)")
        if not 1 <= maps <= blocks:
            raise ValueError(f"maps={maps}; expected 1 to {blocks}, a segmentation map for each expanding block at most")
        if init not in ("normal", "xavier"):
            raise ValueError(f"init={init!r}; expected normal or xavier")
        self.multiple = 2**blocks
        # To one side at most: 1 voxel at the input, 3 · 2^b in contracting block b, as many in the expanding one.
        self.halo = -(-(1 + 6 * (self.multiple - 1)) // self.multiple) * self.multiple

        def count(n: int) -> int:
            return scaled(n, width)

        pairs = contracting_maps(blocks)
        going_down = [8, *(out for _, out in pairs)]  # maps from the finest scale to the coarsest: 8, 16, 32, 64
        skips = going_down[-2::-1]  # maps of the long skips, coarsest first: 32, 16, 8
        going_up = [going_down[-1], *(2 * skip for skip in skips)]  # maps from the coarsest scale to the finest: 64, 64, 32, 16
        self.stem = nn.Sequential(conv(in_channels, count(8)), Norm(count(8)))
        self.contracting = nn.ModuleList(
            Contracting(count(maps), count(down), count(out), short_skip=short_skips)
            for maps, (down, out) in zip(going_down, pairs)
        )
        self.expanding = nn.ModuleList(
            Expanding(count(maps), count(maps // 2), count(skip), count(out), merge=merge)
            for maps, skip, out in zip(going_up, skips, going_up[1:])
        )
        self.heads = nn.ModuleList(conv(count(out), classes, kernel=1) for out in going_up[-maps:])
        {"normal": init_normal, "xavier": init_xavier}[init](self)

    def segmentation_maps(self, x: Tensor) -> list[Tensor]:
        """Return the segmentation maps before they are added up: `(B, K, *n/4)`, `(B, K, *n/2)`, `(B, K, *n)`."""
        self.check_size(x)
        x, skips, features = self.stem(x), [], []  # (B, 8, *n)
        for block in self.contracting:
            skips.append(x)
            x = block(x)  # (B, 16, *n/2), (B, 32, *n/4), (B, 64, *n/8)
        for block in self.expanding:
            x = block(x, skips.pop())  # (B, 64, *n/4), (B, 32, *n/2), (B, 16, *n)
            features.append(x)
        return [head(f) for head, f in zip(self.heads, features[-len(self.heads) :])]

    def forward(self, x: Tensor) -> Tensor:
        """`(B, C, *n) -> (B, K, *n)` logits."""
        total, *finer = self.segmentation_maps(x)
        for logits in finer:
            total = logits + F.interpolate(total, scale_factor=2, mode="trilinear", align_corners=False)
        return total


@builder
def kayalibay_unet3d(*, in_channels: int = 4, classes: int = 5, width: float = 1.0, **options) -> KayalibayUNet3d:
    """Build Kayalibay's 3D U-Net with long skips that concatenate and three segmentation maps. 410,072 parameters.

    `options` are those of `KayalibayUNet3d`: `merge="sum"` or `"none"` (337,496 parameters), `maps=1` (480 fewer), …
    """
    return KayalibayUNet3d(in_channels, classes, width=width, **options)

"""Kayalibay's 3D U-Net: long skips that concatenate or add, and segmentation maps of several scales added up.

Kayalibay, Jensen and van der Smagt, "CNN-based segmentation of medical imaging data", 2017. https://arxiv.org/abs/1701.03056.
Figures 4 and 17 and Table 7 give the layers; the short skips are in the authors' code only (model_defs.py of
github.com/BRML/CNNbasedMedicalSegmentation).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .layers import init_normal, init_xavier, scaled

MERGES = ("concat", "sum", "none")


def contracting_maps(blocks: int) -> list[tuple[int, int]]:
    """Feature maps of both convolutions of every contracting block: 8 and 16, 32 and 32, 64 and 64, 128 and 128, …"""
    return [(8, 16), *((16 << b, 16 << b) for b in range(1, blocks))]


class Norm(nn.Sequential):
    """Batch normalisation and PReLU, one slope per channel, .25 at the start.

    Running averages keep half of their old value at each update (appendix A, eq. 6).
    """

    def __init__(self, maps: int):
        super().__init__()
        self.norm, self.act = nn.BatchNorm3d(maps, momentum=0.5), nn.PReLU(maps)


def conv(in_maps: int, out_maps: int, kernel: int = 3, stride: int = 1) -> nn.Conv3d:
    """A convolution padded with zeros, `(B, I, *n) -> (B, O, *(n / stride))`; a bias would vanish in the next `Norm`."""
    return nn.Conv3d(in_maps, out_maps, kernel, stride=stride, padding=kernel // 2, bias=False)


class Contracting(nn.Module):
    """Half as many voxels, more maps: `(B, I, *n) -> (B, O, *(n / 2))`.

    With `short_skip` what the strided convolution puts out is also added to what the next one does; maps that it lacks
    are zero.
    """

    def __init__(self, in_maps: int, down_maps: int, out_maps: int, *, short_skip: bool):
        super().__init__()
        self.down, self.norm1 = conv(in_maps, down_maps, stride=2), Norm(down_maps)
        self.conv, self.norm2 = conv(down_maps, out_maps), Norm(out_maps)
        self.missing = out_maps - down_maps if short_skip else None

    def forward(self, x: Tensor) -> Tensor:
        down = self.down(x)
        y = self.conv(self.norm1(down))
        if self.missing is not None:
            y = y + F.pad(down, (0, 0, 0, 0, 0, 0, 0, self.missing))
        return self.norm2(y)


class Expanding(nn.Module):
    """Twice as many voxels, then the long skip: `(B, I, *n), (B, S, *2n) -> (B, O, *2n)`.

    The "deconvolution" repeats every voxel twice along each axis and smooths the result with a convolution (Figure 16).
    """

    def __init__(self, in_maps: int, reduced_maps: int, skip_maps: int, out_maps: int, *, merge: str):
        super().__init__()
        self.merge = merge
        self.reduce = nn.Sequential(conv(in_maps, reduced_maps, kernel=1), Norm(reduced_maps))
        self.deconv = nn.Sequential(nn.Upsample(scale_factor=2), conv(reduced_maps, skip_maps), Norm(skip_maps))
        self.conv = nn.Sequential(conv(skip_maps * (2 if merge == "concat" else 1), out_maps), Norm(out_maps))

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        x = self.deconv(self.reduce(x))
        if self.merge == "concat":
            x = torch.cat([x, skip], dim=1)
        elif self.merge == "sum":
            x = x + skip
        return self.conv(x)


class KayalibayUNet3d(nn.Module):
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
        merge: what a long skip does: "concat", "sum", or "none" to leave it out.
        maps: how many of the last scales make a segmentation map: 3, or 1 for the last layer alone.
        short_skips: whether contracting blocks have the authors' code's short skips, which the text does not mention.
        blocks: contracting blocks and as many expanding ones, 3 in the paper; one more doubles the coarsest maps.
        init: "normal" (N(0, .01), the paper's) or "xavier".
        width: scales every feature-map count.

    Attributes:
        multiple: sizes must be a multiple of this along every axis, 8.
        halo: voxels of context, a multiple of that, beyond which nothing influences a prediction.
    """

    margin, spatial_dims = 0, 3

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
        super().__init__()
        if in_channels < 1 or classes < 2:
            raise ValueError(f"in_channels={in_channels}, classes={classes}; expected at least 1 channel and 2 classes")
        if merge not in MERGES:
            raise ValueError(f"merge={merge!r}; expected one of {', '.join(MERGES)}")
        if not 1 <= blocks <= 6:
            raise ValueError(f"blocks={blocks}; expected 1 to 6 contracting blocks (3 in the paper)")
        if not 1 <= maps <= blocks:
            raise ValueError(f"maps={maps}; expected 1 to {blocks}, a segmentation map for each expanding block at most")
        if init not in ("normal", "xavier"):
            raise ValueError(f"init={init!r}; expected normal or xavier")
        self.in_channels, self.classes = in_channels, classes
        self.multiple = 2**blocks
        # To one side at most: 1 voxel at the input, 3 · 2^b in contracting block b, as many in the expanding one.
        self.halo = -(-(1 + 6 * (self.multiple - 1)) // self.multiple) * self.multiple

        def count(n: int) -> int:
            return scaled(n, width)

        pairs = contracting_maps(blocks)
        self.stem = nn.Sequential(conv(in_channels, count(8)), Norm(count(8)))
        self.contracting, self.expanding, skips, last = nn.ModuleList(), nn.ModuleList(), [], 8
        for down, out in pairs:
            block = Contracting(count(last), count(down), count(out), short_skip=short_skips)
            self.contracting.append(block)
            skips.append(last)
            last = out
        for skip in reversed(skips):
            block = Expanding(count(last), count(last // 2), count(skip), count(2 * skip), merge=merge)
            self.expanding.append(block)
            last = 2 * skip
        self.heads = nn.ModuleList(conv(count(2 * skip), classes, kernel=1) for skip in reversed(skips[:maps]))
        {"normal": init_normal, "xavier": init_xavier}[init](self)

    def segmentation_maps(self, x: Tensor) -> list[Tensor]:
        """The maps that are added up, before they are, coarsest first: `(B, K, *n/4)`, `(B, K, *n/2)`, `(B, K, *n)`."""
        self._check_size(x)
        x, skips = self.stem(x), []
        for block in self.contracting:
            skips.append(x)
            x = block(x)
        features = []
        for block in self.expanding:
            x = block(x, skips.pop())
            features.append(x)
        return [head(f) for head, f in zip(self.heads, features[-len(self.heads) :])]

    def forward(self, x: Tensor) -> Tensor:
        """`(B, C, *n) -> (B, K, *n)` logits."""
        total, *finer = self.segmentation_maps(x)
        for logits in finer:
            total = logits + F.interpolate(total, scale_factor=2, mode="trilinear", align_corners=False)
        return total

    def _check_size(self, x: Tensor) -> None:
        axes = x.shape[2:]
        if len(axes) != 3 or any(n < 1 or n % self.multiple for n in axes):
            raise ValueError(
                f"the volume is {'×'.join(map(str, axes))} voxels; this network halves it {len(self.contracting)} times and needs "
                f"a multiple of {self.multiple} along each of three axes. medseg_lite.inference.predict pads a whole volume for you"
            )


def kayalibay_unet3d(*, in_channels: int = 4, classes: int = 5, width: float = 1.0, **options) -> KayalibayUNet3d:
    """Kayalibay's 3D U-Net, concatenating, with three segmentation maps. 410,072 parameters.

    `options` are those of `KayalibayUNet3d`: `merge="sum"` or `"none"` (337,496 parameters), `maps=1` (480 fewer), …
    """
    model = KayalibayUNet3d(in_channels, classes, width=width, **options)
    model.config = {
        "builder": "kayalibay_unet3d",
        "in_channels": int(in_channels),
        "classes": int(classes),
        "width": float(width),
        **options,
    }
    return model

"""A fully convolutional network that learns to normalise, in front of a fully convolutional ResNet that segments.

M. Drozdzal, G. Chartrand, E. Vorontsov, M. Shakeri, L. Di Jorio, A. Tang, A. Romero, Y. Bengio, C. Pal, S. Kadoury: "Learning
normalized inputs for iterative estimation in medical image segmentation", Medical Image Analysis 44, 2018,
https://arxiv.org/abs/1702.05174. Layers: tables I and II. Everything is 2D, with zero padding: as many pixels out as in.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .layers import CONV, init_he, scaled
from .network import Network, builder

FCN_MAPS = (16, 32, 64, 128, 256)  # table I
UNET_MAPS = (64, 128, 256, 512, 1024)  # Ronneberger et al. 2015
STAGES = ((32, 3), (64, 8), (128, 10))  # table II: f and number of bottlenecks, going down; going up the order is reversed
ACROSS = (256, 3)
STEM = 32
VGG = ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3))  # feature maps and convolutions between poolings of VGG-16


class UNet(Network):
    """An encoder and a decoder with a concatenation at every resolution: two 3² convolutions and a pooling per level.

        (B, C, n²) ─ m₀ ───────────────────────── concat ─ m₀ ─ (B, K, n²)
                      └ pool ─ m₁ ──────── concat ─ m₁ ┘ up
                                └ pool ─ m₂ ┘ up

    Args:
        in_channels, classes: channels of the image and of the result.
        maps: feature maps of every level, from the finest.
        narrow_first: place of the 2² convolution that halves the number of maps. True puts it after upsampling (U-Net), False after
            the concatenation (the pre-processor, table I).
        output: side of the kernel of the last convolution, which is linear.
        dims: 2 or 3.

    Source: Drozdzal et al. 2018, section 3.1 and table I; Ronneberger, Fischer and Brox 2015.
    Taught in notebook 10.
    """

    def __init__(self, in_channels: int, classes: int, maps: Sequence[int], *, narrow_first: bool, output: int, dims: int = 2):
        super().__init__(in_channels, classes)
        self.spatial_dims, self.narrow_first = dims, narrow_first
        # To one side at most: 2 convolutions and a pooling at every scale going down, 3 convolutions going up.
        self.multiple = 2 ** (len(maps) - 1)
        self.halo = 8 * self.multiple
        conv = CONV[dims]

        def twice(a: int, b: int) -> nn.Sequential:
            return nn.Sequential(conv(a, b, 3, padding=1), nn.ReLU(), conv(b, b, 3, padding=1), nn.ReLU())

        going_up = list(pairwise(reversed(maps)))
        self.down = nn.ModuleList(twice(a, b) for a, b in pairwise([in_channels, *maps]))
        self.narrow = nn.ModuleList(conv(a if narrow_first else a + b, b, 2) for a, b in going_up)
        self.up = nn.ModuleList(twice(2 * b if narrow_first else b, b) for _, b in going_up)
        self.output = conv(maps[0], classes, output, padding=output // 2)
        init_he(self)

    def forward(self, x: Tensor) -> Tensor:
        """`(B, C, *n) -> (B, K, *n)` logits."""
        self.check_size(x)
        pool = F.max_pool2d if self.spatial_dims == 2 else F.max_pool3d
        skips = []
        for level, block in enumerate(self.down):
            x = block(pool(x, 2) if level else x)  # (B, m₀, *n), (B, m₁, *n/2), (B, m₂, *n/4), …
            skips.append(x)
        skips.pop()
        for narrow, block in zip(self.narrow, self.up):
            x, skip = F.interpolate(x, scale_factor=2), skips.pop()  # (B, m₂, *n/2) and (B, m₁, *n/2), …
            if self.narrow_first:
                x = torch.cat([skip, self._even(narrow, x)], dim=1)  # (B, 2 m₁, *n/2)
            else:
                x = self._even(narrow, torch.cat([skip, x], dim=1))  # (B, m₁, *n/2)
            x = block(x)  # (B, m₁, *n/2)
        return self.output(x)

    def _even(self, conv: nn.Module, x: Tensor) -> Tensor:
        """Apply a convolution with a kernel of 2, padded at the end of every axis so that the size stays."""
        return conv(F.pad(x, (0, 1) * self.spatial_dims))


class Bottleneck(nn.Module):
    """A pre-activation residual block: x + 1² f ─ 3² f ─ 1² 4f, each after batch normalisation and ReLU.

    `scale` 1/2 halves the resolution in the first convolution; 2 doubles it before the last. The shortcut is the input itself,
    sub-sampled or repeated. It goes through a 1² convolution where the number of feature maps changes.

    Source: Drozdzal et al. 2018, section 3.2 and table II; He et al. 2016, "Identity mappings in deep residual networks".
    Taught in notebook 10.
    """

    def __init__(self, in_maps: int, f: int, *, scale: float = 1):
        super().__init__()
        self.scale = scale
        self.norms = nn.ModuleList(nn.BatchNorm2d(m) for m in (in_maps, f, f))
        self.reduce = nn.Conv2d(in_maps, f, 1, stride=2 if scale < 1 else 1)
        self.filter = nn.Conv2d(f, f, 3, padding=1)
        self.expand = nn.Conv2d(f, 4 * f, 1)
        self.project = nn.Conv2d(in_maps, 4 * f, 1) if in_maps != 4 * f else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        y = self.reduce(self.norms[0](x).relu())  # (B, f, H, W), or half as many pixels along each axis
        y = self.filter(self.norms[1](y).relu())  # (B, f, H, W)
        y = self.expand(resample(self.norms[2](y).relu(), max(self.scale, 1)))  # (B, 4f, H, W), or twice as many
        return self.shortcut(x) + y

    @property
    def hands_on(self) -> bool:
        """The answer to whether the shortcut is the identity: then the block can be taken out and leaves no gap."""
        return self.scale == 1 and isinstance(self.project, nn.Identity)

    def shortcut(self, x: Tensor) -> Tensor:
        """Return the result of the block without its convolutions."""
        return self.project(resample(x, self.scale))


class SimpleBlock(nn.Module):
    """A pre-activation residual block with a single 3² convolution, after max-pooling (`scale` 1/2) or upsampling (2)."""

    def __init__(self, maps: int, *, scale: float):
        super().__init__()
        self.scale = scale
        self.norm = nn.BatchNorm2d(maps)
        self.conv = nn.Conv2d(maps, maps, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x).relu()
        y = F.max_pool2d(y, 2) if self.scale < 1 else resample(y, self.scale)
        return self.shortcut(x) + self.conv(y)

    @property
    def hands_on(self) -> bool:
        """The answer to whether the shortcut is the identity."""
        return self.scale == 1

    def shortcut(self, x: Tensor) -> Tensor:
        """Return the result of the block without its convolution."""
        return resample(x, self.scale)


def resample(x: Tensor, scale: float) -> Tensor:
    """Take every second pixel (1/2), leave as is (1), or repeat every pixel (2)."""
    if scale < 1:
        return x[..., ::2, ::2]
    return F.interpolate(x, scale_factor=2) if scale > 1 else x


class LongSkip(nn.Module):
    """The sum of a decoder's and an encoder's feature maps, both brought to the same number of them by 1² convolutions."""

    def __init__(self, deep: int, shallow: int, maps: int):
        super().__init__()
        self.deep = nn.Conv2d(deep, maps, 1) if deep != maps else nn.Identity()
        self.shallow = nn.Conv2d(shallow, maps, 1) if shallow != maps else nn.Identity()

    def forward(self, deep: Tensor, shallow: Tensor) -> Tensor:
        return self.deep(deep) + self.shallow(shallow)


class FCResNet(Network):
    """A ResNet that goes down to 1/32 of the resolution and up again, with long skips that are added.

    Args:
        width: share of the paper's feature maps.
        depth: share of the paper's bottlenecks; each stage keeps at least the two that change its resolution and its maps.

    Attributes:
        stem, down, across, up, skips, last, head: its parts, from the input to the output.

    Source: Drozdzal et al. 2018, section 3.2 and table II. The table leaves open how skips of different widths are summed.
    Projecting both to the narrower width gives the parameter count that the paper states for the pair of networks (12.8 million).
    Taught in notebook 10.
    """

    spatial_dims, multiple = 2, 32
    halo = 608  # mostly from the 23 convolutions at 1/16 and 1/32 of the resolution

    def __init__(self, in_channels: int, classes: int, width: float = 1.0, depth: float = 1.0):
        super().__init__(in_channels, classes)
        stem, across = scaled(STEM, width), scaled(ACROSS[0], width)
        stages = [(scaled(f, width), max(2, round(n * depth))) for f, n in STAGES]
        going_down = [stem, *(4 * f for f, _ in stages)]  # maps at 1/2, 1/4, 1/8 and 1/16 of the resolution: 32, 128, 256, 512
        going_up = [4 * across, *(4 * f for f, _ in reversed(stages))]  # maps before each long skip: 1024, 512, 256, 128
        joined = [*(f for f, _ in reversed(stages)), stem]  # maps of each long skip: 128, 64, 32, 32
        self.stem = nn.Conv2d(in_channels, stem, 3, padding=1)
        self.down = nn.ModuleList(_stage(maps, f, n, first=0.5) for maps, (f, n) in zip(going_down, stages))
        self.down.insert(0, SimpleBlock(stem, scale=0.5))
        self.across = _stage(going_down[-1], across, max(2, round(ACROSS[1] * depth)), first=0.5, last=2)
        self.up = nn.ModuleList(_stage(f, f, n, last=2) for f, n in reversed(stages))
        self.up.append(SimpleBlock(stem, scale=2))
        self.skips = nn.ModuleList(LongSkip(*maps) for maps in zip(going_up, reversed(going_down), joined))
        self.last = nn.Conv2d(stem, stem, 3, padding=1)
        self.head = nn.Sequential(nn.BatchNorm2d(stem), nn.ReLU(), nn.Conv2d(stem, classes, 1))
        init_he(self)

    def forward(self, x: Tensor) -> Tensor:
        """`(B, C, H, W) -> (B, K, H, W)` logits."""
        self.check_size(x)
        start = x = self.stem(x)  # (B, 32, H, W)
        kept = []
        for stage in self.down:
            x = stage(x)  # (B, 32, H/2, W/2), (B, 128, H/4, W/4), (B, 256, H/8, W/8), (B, 512, H/16, W/16)
            kept.append(x)
        x = self.across(x)  # (B, 1024, H/16, W/16)
        for stage, skip in zip(self.up, self.skips):
            x = stage(skip(x, kept.pop()))  # (B, 512, H/8, W/8), (B, 256, H/4, W/4), (B, 128, H/2, W/2), (B, 32, H, W)
        return self.head(self.last(x) + start)


def _stage(in_maps: int, f: int, blocks: int, *, first: float = 1, last: float = 1) -> nn.Sequential:
    """Return several bottlenecks, of which the first or the last changes the resolution."""
    scales = [first, *[1] * (blocks - 2), last]
    return nn.Sequential(*(Bottleneck(4 * f if i else in_maps, f, scale=s) for i, s in enumerate(scales)))


class Pipeline(Network):
    """The pre-processor, which turns raw intensities into as many normalised channels, and the network that segments them.

    Attributes:
        preprocessor: `(B, C, *n) -> (B, C, *n)`.
        segmenter: `(B, C, *n) -> (B, K, *n)`.

    Source: Drozdzal et al. 2018, section 3 and figure 1.
    Taught in notebooks 10 and 11.
    """

    def __init__(self, preprocessor: Network, segmenter: Network):
        super().__init__(preprocessor.in_channels, segmenter.classes)
        self.preprocessor, self.segmenter = preprocessor, segmenter
        self.spatial_dims = segmenter.spatial_dims
        self.multiple = max(preprocessor.multiple, segmenter.multiple)
        self.halo = preprocessor.halo + segmenter.halo

    def forward(self, x: Tensor) -> Tensor:
        """`(B, C, *n) -> (B, K, *n)` logits."""
        self.check_size(x)
        return self.segmenter(self.preprocessor(x))


class FCN8(Network):
    """FCN-8s: VGG-16 whose fully connected layers are convolutions. Its scores at 1/32, 1/16 and 1/8 are added and enlarged.

    Source: Long, Shelhamer and Darrell 2015, "Fully convolutional networks for semantic segmentation"; one of the baselines of
    Drozdzal et al. 2018, table V. Ours starts from random weights and pads its 7² layer by 3 instead of the image by 100.
    Taught in notebook 10.
    """

    spatial_dims, multiple, halo = 2, 32, 288

    def __init__(self, in_channels: int, classes: int, width: float = 1.0, dropout: float = 0.5):
        super().__init__(in_channels, classes)
        maps, hidden = [scaled(f, width) for f, _ in VGG], scaled(4096, width)
        self.stages = nn.ModuleList(_vgg_stage(i, o, n) for (i, o), (_, n) in zip(pairwise([in_channels, *maps]), VGG))
        self.dense = nn.Sequential(
            nn.Conv2d(maps[-1], hidden, 7, padding=3),
            nn.ReLU(),
            nn.Dropout(dropout),
            nn.Conv2d(hidden, hidden, 1),
            nn.ReLU(),
            nn.Dropout(dropout),
        )
        self.score = nn.Conv2d(hidden, classes, 1)
        self.score4 = nn.Conv2d(maps[3], classes, 1)
        self.score3 = nn.Conv2d(maps[2], classes, 1)
        init_he(self)
        self.enlarge2 = _bilinear(classes, 2)
        self.enlarge4 = _bilinear(classes, 2)
        self.enlarge8 = _bilinear(classes, 8)

    def forward(self, x: Tensor) -> Tensor:
        """`(B, C, H, W) -> (B, K, H, W)` logits."""
        self.check_size(x)
        pools = []
        for stage in self.stages:
            x = stage(x)  # (B, 64, H/2, W/2), …, (B, 512, H/32, W/32)
            pools.append(x)
        y = self.score(self.dense(x))  # (B, K, H/32, W/32)
        y = self.enlarge2(y) + self.score4(pools[3])  # (B, K, H/16, W/16)
        y = self.enlarge4(y) + self.score3(pools[2])  # (B, K, H/8, W/8)
        return self.enlarge8(y)


def _vgg_stage(in_maps: int, maps: int, count: int) -> nn.Sequential:
    layers = [(nn.Conv2d(maps if n else in_maps, maps, 3, padding=1), nn.ReLU()) for n in range(count)]
    return nn.Sequential(*(layer for pair in layers for layer in pair), nn.MaxPool2d(2))


def _bilinear(classes: int, scale: int) -> nn.ConvTranspose2d:
    """Return a transposed convolution that starts as bilinear interpolation."""
    layer = nn.ConvTranspose2d(classes, classes, 2 * scale, stride=scale, padding=scale // 2, bias=False)
    ramp = 1 - (torch.arange(2 * scale) - scale + 0.5).abs() / scale
    with torch.no_grad():
        layer.weight.copy_(torch.eye(classes)[:, :, None, None] * ramp[:, None] * ramp)
    return layer


@builder
def fcn_preprocessor(*, in_channels: int = 1, classes: int = 1, width: float = 1.0, dims: int = 2) -> UNet:
    """Build the U-Net-like pre-processor of table I. 1,832,145 parameters (1 channel in, 1 out), 23 convolutions.

    `classes` is the number of channels that it gives, usually as many as it takes. `dims=3` makes it a network for volumes.
    """
    return UNet(in_channels, classes, [scaled(m, width) for m in FCN_MAPS], narrow_first=False, output=3, dims=dims)


@builder
def fc_resnet(*, in_channels: int = 1, classes: int = 2, width: float = 1.0, depth: float = 1.0) -> FCResNet:
    """Build FC-ResNet of table II. 11,042,273 parameters with 1 channel and 1 class (a sigmoid's).

    It has 140 convolutions on its main path. `depth` is the share of its bottlenecks.
    """
    return FCResNet(in_channels, classes, width, depth)


@builder
def fcn_fc_resnet(*, in_channels: int = 1, classes: int = 2, width: float = 1.0, depth: float = 1.0) -> Pipeline:
    """Build pre-processor and FC-ResNet, trained as one. 12,874,418 parameters with 1 channel and 1 class."""
    return Pipeline(
        fcn_preprocessor(in_channels=in_channels, classes=in_channels, width=width),
        fc_resnet(in_channels=in_channels, classes=classes, width=width, depth=depth),
    )


@builder
def unet2d(*, in_channels: int = 1, classes: int = 2, width: float = 1.0) -> UNet:
    """Build the U-Net, zero-padded. 31,030,658 parameters (1 channel, 2 classes).

    Source: Ronneberger, Fischer and Brox 2015; baseline of Drozdzal et al. 2018, tables III and V.
    Taught in notebook 10.
    """
    return UNet(in_channels, classes, [scaled(m, width) for m in UNET_MAPS], narrow_first=True, output=1)


@builder
def fcn8(*, in_channels: int = 1, classes: int = 2, width: float = 1.0) -> FCN8:
    """Build FCN-8s on VGG-16. 134,271,430 parameters (3 channels, 2 classes)."""
    return FCN8(in_channels, classes, width)

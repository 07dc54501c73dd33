"""A fully convolutional network that learns to normalise, in front of a fully convolutional ResNet that segments.

M. Drozdzal, G. Chartrand, E. Vorontsov, M. Shakeri, L. Di Jorio, A. Tang, A. Romero, Y. Bengio, C. Pal, S. Kadoury: "Learning
normalized inputs for iterative estimation in medical image segmentation", Medical Image Analysis 44, 2018,
https://arxiv.org/abs/1702.05174. Layers: tables I and II. Everything is 2D, with zero padding: as many pixels out as in.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .layers import init_he, scaled

FCN_MAPS = (16, 32, 64, 128, 256)  # table I
UNET_MAPS = (64, 128, 256, 512, 1024)  # Ronneberger et al. 2015
STAGES = ((32, 3), (64, 8), (128, 10))  # table II: f and number of bottlenecks, going down; going up the same in reverse
ACROSS = (256, 3)
STEM = 32
VGG = ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3))  # feature maps and convolutions between poolings of VGG-16


class SamePaddedNetwork(nn.Module):
    """What inference needs to know about the networks here: `(B, C, *n) -> (B, K, *n)` where n is divisible by `multiple`.

    Nothing further away than `halo` pixels influences a prediction.
    """

    margin, spatial_dims = 0, 2
    multiple: int
    halo: int

    def check(self, x: Tensor) -> None:
        if any(n % self.multiple for n in x.shape[-self.spatial_dims :]):
            raise ValueError(
                f"the image is {'×'.join(map(str, x.shape[-self.spatial_dims :]))} pixels; this network halves it several times "
                f"and needs multiples of {self.multiple}. medseg_lite.inference.predict pads a whole image for you"
            )


class UNet(SamePaddedNetwork):
    """An encoder and a decoder with a concatenation at every resolution: two 3² convolutions and a pooling per level.

        (B, C, n²) ─ m₀ ───────────────────────── concat ─ m₀ ─ (B, out, n²)
                      └ pool ─ m₁ ──────── concat ─ m₁ ┘ up
                                └ pool ─ m₂ ┘ up

    Args:
        in_channels, out_channels: channels of the image and of the result.
        maps: feature maps of every level, from the finest.
        narrow_first: whether the 2² convolution that halves the width comes after upsampling (U-Net) or, `False`, after the
            concatenation (the pre-processor, table I).
        output: size of the last convolution's kernel; it is linear.
        dims: 2 or 3.
    """

    def __init__(self, in_channels: int, out_channels: int, maps, *, narrow_first: bool, output: int, dims: int = 2):
        super().__init__()
        _check(in_channels, out_channels)
        self.spatial_dims, self.narrow_first = dims, narrow_first
        # To one side at most: 2 convolutions and a pooling at every scale going down, 3 convolutions going up.
        self.multiple = 2 ** (len(maps) - 1)
        self.halo = 8 * self.multiple
        self.in_channels, self.classes = in_channels, out_channels
        conv = nn.Conv2d if dims == 2 else nn.Conv3d

        def twice(a: int, b: int) -> nn.Sequential:
            return nn.Sequential(conv(a, b, 3, padding=1), nn.ReLU(), conv(b, b, 3, padding=1), nn.ReLU())

        self.down = nn.ModuleList(twice(a, b) for a, b in zip((in_channels, *maps), maps))
        coarse_to_fine = list(zip(maps[:0:-1], maps[-2::-1]))
        self.narrow = nn.ModuleList(conv(a if narrow_first else a + b, b, 2) for a, b in coarse_to_fine)
        self.up = nn.ModuleList(twice(2 * b if narrow_first else b, b) for _, b in coarse_to_fine)
        self.output = conv(maps[0], out_channels, output, padding=output // 2)
        init_he(self)

    def forward(self, x: Tensor) -> Tensor:
        self.check(x)
        pool = F.max_pool2d if self.spatial_dims == 2 else F.max_pool3d
        skips = []
        for level, block in enumerate(self.down):
            x = block(pool(x, 2) if level else x)
            skips.append(x)
        skips.pop()
        for narrow, block in zip(self.narrow, self.up):
            x = F.interpolate(x, scale_factor=2)
            skip = skips.pop()
            if self.narrow_first:
                x = torch.cat([skip, self._even(narrow, x)], dim=1)
            else:
                x = self._even(narrow, torch.cat([skip, x], dim=1))
            x = block(x)
        return self.output(x)

    def _even(self, conv: nn.Module, x: Tensor) -> Tensor:
        """A convolution with a kernel of 2, padded at the end of every axis so that the size stays."""
        return conv(F.pad(x, (0, 1) * self.spatial_dims))


class Bottleneck(nn.Module):
    """Pre-activation residual block: x + 1² f ─ 3² f ─ 1² 4f, each after batch normalisation and ReLU.

    `scale` 1/2 halves the resolution in its first convolution; 2 doubles it before its last. The shortcut is the input itself,
    sub-sampled or repeated, and goes through a 1² convolution where the number of feature maps changes.

    Source: section 3.2 and table II; He et al. 2016, "Identity mappings in deep residual networks".
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
        y = self.reduce(self.norms[0](x).relu())
        y = self.filter(self.norms[1](y).relu())
        y = self.expand(resample(self.norms[2](y).relu(), max(self.scale, 1)))
        return self.shortcut(x) + y

    def shortcut(self, x: Tensor) -> Tensor:
        """What is left of the block without its convolutions."""
        return self.project(resample(x, self.scale))


class SimpleBlock(nn.Module):
    """Pre-activation residual block with a single 3² convolution, after max-pooling (`scale` 1/2) or upsampling (2)."""

    def __init__(self, maps: int, *, scale: float):
        super().__init__()
        self.scale = scale
        self.norm = nn.BatchNorm2d(maps)
        self.conv = nn.Conv2d(maps, maps, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x).relu()
        y = F.max_pool2d(y, 2) if self.scale < 1 else resample(y, self.scale)
        return self.shortcut(x) + self.conv(y)

    def shortcut(self, x: Tensor) -> Tensor:
        """What is left of the block without its convolution."""
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


class FCResNet(SamePaddedNetwork):
    """A ResNet that goes down to 1/32 of the resolution and up again, with long skips that are added.

    Attributes:
        stem, down, across, up, skips, head: its parts, from the input to the output.

    Source: section 3.2 and table II. The table leaves open how skips of different widths are summed; projecting both to the
    narrower width gives the parameter count that the paper states for the pair of networks (12.8 million).
    """

    multiple, halo = 32, 608  # most of the halo comes from the 23 convolutions at 1/16 and 1/32 of the resolution

    def __init__(self, in_channels: int, classes: int, width: float = 1.0):
        super().__init__()
        _check(in_channels, classes)
        self.in_channels, self.classes = in_channels, classes
        stem, (across, blocks) = scaled(STEM, width), (scaled(ACROSS[0], width), ACROSS[1])
        stages = [(scaled(f, width), n) for f, n in STAGES]
        self.stem = nn.Conv2d(in_channels, stem, 3, padding=1)
        down, widths = [SimpleBlock(stem, scale=0.5)], [stem]
        for f, n in stages:
            down.append(_stage(widths[-1], f, n, first=0.5))
            widths.append(4 * f)
        self.down = nn.ModuleList(down)
        self.across = _stage(widths[-1], across, blocks, first=0.5, last=2)
        maps, up, skips = 4 * across, [], []
        for (f, n), shallow in zip(reversed(stages), reversed(widths)):
            skips.append(LongSkip(maps, shallow, f))
            up.append(_stage(f, f, n, last=2))
            maps = 4 * f
        skips.append(LongSkip(maps, stem, stem))
        up.append(SimpleBlock(stem, scale=2))
        self.up, self.skips = nn.ModuleList(up), nn.ModuleList(skips)
        self.last = nn.Conv2d(stem, stem, 3, padding=1)
        self.head = nn.Sequential(nn.BatchNorm2d(stem), nn.ReLU(), nn.Conv2d(stem, classes, 1))
        init_he(self)

    def forward(self, x: Tensor) -> Tensor:
        self.check(x)
        start = x = self.stem(x)
        kept = []
        for stage in self.down:
            x = stage(x)
            kept.append(x)
        x = self.across(x)
        for stage, skip in zip(self.up, self.skips):
            x = stage(skip(x, kept.pop()))
        return self.head(self.last(x) + start)


def _stage(in_maps: int, f: int, blocks: int, *, first: float = 1, last: float = 1) -> nn.Sequential:
    """Several bottlenecks; the first or the last changes the resolution."""
    scales = [first, *[1] * (blocks - 2), last]
    return nn.Sequential(*(Bottleneck(4 * f if i else in_maps, f, scale=s) for i, s in enumerate(scales)))


class Pipeline(SamePaddedNetwork):
    """The pre-processor, which turns raw intensities into as many normalised channels, and the network that segments them.

    Attributes:
        preprocessor: `(B, C, *n) -> (B, C, *n)`.
        segmenter: `(B, C, *n) -> (B, K, *n)`.

    Source: section 3, figure 1.
    """

    def __init__(self, preprocessor: nn.Module, segmenter: nn.Module):
        super().__init__()
        self.preprocessor, self.segmenter = preprocessor, segmenter
        self.spatial_dims = segmenter.spatial_dims
        self.in_channels, self.classes = preprocessor.in_channels, segmenter.classes
        self.multiple = max(preprocessor.multiple, segmenter.multiple)
        self.halo = preprocessor.halo + segmenter.halo

    def forward(self, x: Tensor) -> Tensor:
        self.check(x)
        return self.segmenter(self.preprocessor(x))


class FCN8(SamePaddedNetwork):
    """FCN-8s: VGG-16 whose fully connected layers are convolutions; its scores at 1/32, 1/16 and 1/8 are added and enlarged.

    Source: Long, Shelhamer and Darrell 2015, "Fully convolutional networks for semantic segmentation"; one of the baselines of
    table V. Ours starts from random weights and pads its 7² layer by 3 instead of the image by 100.
    """

    multiple, halo = 32, 288

    def __init__(self, in_channels: int, classes: int, width: float = 1.0, dropout: float = 0.5):
        super().__init__()
        _check(in_channels, classes)
        self.in_channels, self.classes = in_channels, classes
        stages, maps = [], in_channels
        for f, n in ((scaled(f, width), n) for f, n in VGG):
            layers = []
            for _ in range(n):
                layers += [nn.Conv2d(maps, f, 3, padding=1), nn.ReLU()]
                maps = f
            stages.append(nn.Sequential(*layers, nn.MaxPool2d(2)))
        self.stages = nn.ModuleList(stages)
        hidden = scaled(4096, width)
        self.dense = nn.Sequential(
            nn.Conv2d(maps, hidden, 7, padding=3),
            nn.ReLU(),
            nn.Dropout(dropout),
            nn.Conv2d(hidden, hidden, 1),
            nn.ReLU(),
            nn.Dropout(dropout),
        )
        self.score = nn.Conv2d(hidden, classes, 1)
        self.score4 = nn.Conv2d(maps, classes, 1)
        self.score3 = nn.Conv2d(scaled(VGG[2][0], width), classes, 1)
        init_he(self)
        self.enlarge2 = _bilinear(classes, 2)
        self.enlarge4 = _bilinear(classes, 2)
        self.enlarge8 = _bilinear(classes, 8)

    def forward(self, x: Tensor) -> Tensor:
        self.check(x)
        pools = []
        for stage in self.stages:
            x = stage(x)
            pools.append(x)
        y = self.enlarge2(self.score(self.dense(x))) + self.score4(pools[3])
        y = self.enlarge4(y) + self.score3(pools[2])
        return self.enlarge8(y)


def _bilinear(classes: int, scale: int) -> nn.ConvTranspose2d:
    """A transposed convolution that starts as bilinear interpolation."""
    layer = nn.ConvTranspose2d(classes, classes, 2 * scale, stride=scale, padding=scale // 2, bias=False)
    ramp = 1 - (torch.arange(2 * scale) - scale + 0.5).abs() / scale
    with torch.no_grad():
        layer.weight.copy_(torch.eye(classes)[:, :, None, None] * ramp[:, None] * ramp)
    return layer


def _check(in_channels: int, classes: int) -> None:
    if in_channels < 1 or classes < 1:
        raise ValueError(f"in_channels={in_channels}, classes={classes}; expected at least 1 of each")


def _built(model: nn.Module, name: str, in_channels: int, classes: int, width: float, **options) -> nn.Module:
    model.config = {"builder": name, "in_channels": int(in_channels), "classes": int(classes), "width": float(width), **options}
    return model


def fcn_preprocessor(*, in_channels: int = 1, classes: int = 1, width: float = 1.0, dims: int = 2) -> UNet:
    """The U-Net-like pre-processor of table I. 1,832,145 parameters (1 channel in, 1 out), 23 convolutions.

    `classes` is the number of channels that it gives, usually as many as it takes. `dims=3` makes it a network for volumes.
    """
    maps = [scaled(m, width) for m in FCN_MAPS]
    model = UNet(in_channels, classes, maps, narrow_first=False, output=3, dims=dims)
    return _built(model, "fcn_preprocessor", in_channels, classes, width, dims=dims)


def fc_resnet(*, in_channels: int = 1, classes: int = 2, width: float = 1.0) -> FCResNet:
    """FC-ResNet of table II. 11,042,273 parameters with 1 channel and 1 class (a sigmoid's), 140 convolutions on its main path."""
    return _built(FCResNet(in_channels, classes, width), "fc_resnet", in_channels, classes, width)


def fcn_fc_resnet(*, in_channels: int = 1, classes: int = 2, width: float = 1.0) -> Pipeline:
    """Pre-processor and FC-ResNet, trained as one. 12,874,418 parameters with 1 channel and 1 class."""
    model = Pipeline(
        fcn_preprocessor(in_channels=in_channels, classes=in_channels, width=width),
        fc_resnet(in_channels=in_channels, classes=classes, width=width),
    )
    return _built(model, "fcn_fc_resnet", in_channels, classes, width)


def unet2d(*, in_channels: int = 1, classes: int = 2, width: float = 1.0) -> UNet:
    """The U-Net, zero-padded. 31,030,658 parameters (1 channel, 2 classes).

    Source: Ronneberger, Fischer and Brox 2015; baseline of tables III and V.
    """
    model = UNet(in_channels, classes, [scaled(m, width) for m in UNET_MAPS], narrow_first=True, output=1)
    return _built(model, "unet2d", in_channels, classes, width)


def fcn8(*, in_channels: int = 1, classes: int = 2, width: float = 1.0) -> FCN8:
    """FCN-8s on VGG-16. 134,271,430 parameters (3 channels, 2 classes)."""
    return _built(FCN8(in_channels, classes, width), "fcn8", in_channels, classes, width)

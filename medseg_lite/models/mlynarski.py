"""Mlynarski's networks: 2D networks with a subnetwork for every sequence, and 3D networks that are told what those see.

P. Mlynarski, H. Delingette, A. Criminisi, N. Ayache: "3D convolutional neural networks for tumor segmentation using long-range 2D
context", Computerized Medical Imaging and Graphics 73, 2019, https://arxiv.org/abs/1807.08599.

The paper gives the kinds of layers, the patch of 70 voxels and the receptive field of 45, but no numbers of feature maps. The
numbers here are ours; those of the main 2D network (64 to 1024) are the author's in later published code.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .layers import CONV, check_size, init_he, scaled

MAIN = (64, 128, 256, 512, 1024)  # feature maps of the main 2D network, scale by scale
SUBNET = 32  # feature maps that each subnetwork hands over
TRUNK = (32, 64, 128)  # feature maps of the 3D network, scale by scale
VARIANTS = ("standard", "a", "b", "c")


class Conv(nn.Sequential):
    """Convolution padded with zeros, batch normalisation, ReLU: `(B, I, H, W) -> (B, O, H, W)`."""

    def __init__(self, in_maps: int, out_maps: int):
        super().__init__()
        self.conv, self.norm, self.act = nn.Conv2d(in_maps, out_maps, 3, padding=1), nn.BatchNorm2d(out_maps), nn.ReLU()


class UpConv(nn.Module):
    """Twice as many pixels by bilinear interpolation, then a 2² convolution, batch normalisation and ReLU."""

    def __init__(self, in_maps: int, out_maps: int):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(in_maps, out_maps, 2), nn.BatchNorm2d(out_maps)

    def forward(self, x: Tensor) -> Tensor:
        x = F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False)
        return self.norm(self.conv(F.pad(x, (0, 1, 0, 1)))).relu()


class ReducedUNet(nn.Module):
    """A subnetwork of model 1, a U-Net of two scales: `(B, C, H, W) -> (B, 32, H, W)`.

    The first layer's feature maps are joined to the upsampled ones.
    """

    def __init__(self, in_channels: int, maps: int):
        super().__init__()
        self.first = Conv(in_channels, maps // 2)
        self.coarse = nn.Sequential(Conv(maps // 2, maps), Conv(maps, maps))
        self.last = Conv(maps // 2 + maps, maps)

    def forward(self, x: Tensor) -> Tensor:
        first = self.first(x)
        coarse = self.coarse(F.max_pool2d(first, 2))
        return self.last(torch.cat([first, F.interpolate(coarse, scale_factor=2, mode="bilinear")], dim=1))


def three_layers(in_channels: int, maps: int) -> nn.Sequential:
    """A subnetwork of model 2: three convolutions, `(B, C, H, W) -> (B, 32, H, W)`."""
    return nn.Sequential(Conv(in_channels, maps // 2), Conv(maps // 2, maps // 2), Conv(maps // 2, maps))


class Mlynarski2d(nn.Module):
    """One subnetwork for every sequence and one for all together, whose feature maps enter a U-Net.

        sequence 1 ─ subnetwork ─┬─────── concat ─ U-Net ─ K          each subnetwork: ─ auxiliary classifier ─ K
            …                    │                                    (in training only)
        sequence C ─ subnetwork ─┤
        all        ─ subnetwork ─┘

    Args:
        in_channels: sequences C.
        classes: output classes K, background included.
        subnets: 1 for reduced U-Nets, 2 for three layers of convolutions.
        width: scales every feature-map count.

    Attributes:
        subnetworks: C of them for single sequences, the last for all.
        auxiliary: their classifiers, 1² convolutions. `forward` does not use them.
        halo: nothing further away in pixels influences a prediction.

    Source: section 2.2 and figure 4.
    """

    margin, spatial_dims = 0, 2
    multiple, halo = 16, 144

    def __init__(self, in_channels: int, classes: int, *, subnets: int = 1, width: float = 1.0):
        super().__init__()
        _check(in_channels, classes)
        if subnets not in (1, 2):
            raise ValueError(f"subnets={subnets!r}; expected 1 (reduced U-Nets) or 2 (three layers)")
        self.in_channels, self.classes = in_channels, classes
        shared = 2 * scaled(SUBNET // 2, width)
        build = ReducedUNet if subnets == 1 else three_layers
        self.subnetworks = nn.ModuleList(build(c, shared) for c in [1] * in_channels + [in_channels])
        self.auxiliary = nn.ModuleList(nn.Conv2d(shared, classes, 1) for _ in self.subnetworks)
        maps = [scaled(m, width) for m in MAIN]
        seen = shared * len(self.subnetworks)
        self.down = nn.ModuleList(nn.Sequential(Conv(a, b), Conv(b, b)) for a, b in zip((seen, *maps), maps))
        pairs = list(zip(maps[:0:-1], maps[-2::-1]))
        self.enlarge = nn.ModuleList(UpConv(a, b) for a, b in pairs)
        self.up = nn.ModuleList(nn.Sequential(Conv(2 * b, b), Conv(b, b)) for _, b in pairs)
        self.classifier = nn.Conv2d(maps[0], classes, 1)
        init_he(self)

    def forward(self, x: Tensor) -> Tensor:
        """`(B, C, H, W) -> (B, K, H, W)` logits, the class scores that the 3D networks get as features."""
        return self._main(self._features(x))

    def with_auxiliary(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        """The logits, and those of every subnetwork's own classifier, for `losses.deep_supervision`."""
        features = self._features(x)
        return self._main(features), [head(f) for head, f in zip(self.auxiliary, features)]

    def subnetwork(self, index: int) -> Subnetwork:
        """One subnetwork and its auxiliary classifier as a network of its own, to be trained on cases that have its sequence.

        It shares its weights with this network.
        """
        if not -len(self.subnetworks) <= index < len(self.subnetworks):
            raise ValueError(f"there is no subnetwork {index}; expected 0 to {len(self.subnetworks) - 1}")
        joint = index % len(self.subnetworks) == self.in_channels
        channels = self.in_channels if joint else 1
        return Subnetwork(self.subnetworks[index], self.auxiliary[index], channels, self.classes)

    def _features(self, x: Tensor) -> list[Tensor]:
        _check_multiple(self, x)
        return [net(part) for net, part in zip(self.subnetworks, [*x.split(1, dim=1), x])]

    def _main(self, features: Sequence[Tensor]) -> Tensor:
        x, skips = torch.cat(list(features), dim=1), []
        for level, block in enumerate(self.down):
            x = block(F.max_pool2d(x, 2) if level else x)
            skips.append(x)
        skips.pop()
        for enlarge, block in zip(self.enlarge, self.up):
            x = block(torch.cat([skips.pop(), enlarge(x)], dim=1))
        return self.classifier(x)


class Subnetwork(nn.Module):
    """A subnetwork with its classifier: `(B, C, H, W) -> (B, K, H, W)` logits."""

    margin, spatial_dims, multiple, halo = 0, 2, 2, 8

    def __init__(self, features: nn.Module, classifier: nn.Module, in_channels: int, classes: int):
        super().__init__()
        self.features, self.classifier = features, classifier
        self.in_channels, self.classes = in_channels, classes

    def forward(self, x: Tensor) -> Tensor:
        _check_multiple(self, x)
        return self.classifier(self.features(x))


class Trunk(nn.Module):
    """A valid 3D U-Net of three scales: `(B, C, n + 41) -> (B, 32, n)`, n one more than a multiple of 4.

    Up-convolutions with kernels of 2 make the receptive field odd (45 voxels layer by layer; 46 for three of four voxels and 42
    for the fourth when measured), but put it half a voxel beside the grid: output k lies between the voxels 20 and 21 further
    in. We call it 20, as for the skip from the finest scale.

    Args:
        extra: feature maps `(B, extra, n + 41)` that come in before the final convolutions, 0 for none.
    """

    def __init__(self, in_channels: int, maps: Sequence[int], *, extra: int = 0):
        super().__init__()
        a, b, c = maps
        self.down1 = _valid(in_channels, a)
        self.down2 = nn.Sequential(_valid(a, b), _valid(b, b))
        self.down3 = nn.Sequential(_valid(b, c), _valid(c, c))
        self.enlarge2, self.up2 = _valid(c, b, 2), nn.Sequential(_valid(2 * b, b), _valid(b, b))
        self.enlarge1, self.up1 = _valid(b, a, 2), nn.Sequential(_valid(2 * a + extra, a), _valid(a, a))

    def forward(self, x: Tensor, extra: Tensor | None = None) -> Tensor:
        fine = self.down1(x)
        middle = self.down2(F.max_pool3d(fine, 2))
        y = self.enlarge2(_double(self.down3(F.max_pool3d(middle, 2))))
        y = self.up2(torch.cat([_crop(middle, y, 4), y], dim=1))
        y = self.enlarge1(_double(y))
        joined = [_crop(fine, y, 17), y] if extra is None else [_crop(fine, y, 17), _crop(extra, y, 18), y]
        return self.up1(torch.cat(joined, dim=1))


class Mlynarski3d(nn.Module):
    """The 3D network, with the scores of 2D networks as further channels (variants A, B, C) or without (standard).

    A: features beside the image, from the first layer on. B: before the final convolutions. C: two trunks, one of which sees
    the image only, the other image and features.

    Args:
        in_channels: channels of the image.
        classes: output classes K, background included.
        variant: "standard", "a", "b" or "c".
        features: channels of the 2D features, by default a score for every class in three planes; 0 for "standard".
        width: scales every feature-map count.

    Attributes:
        in_channels: channels of what `forward` takes, image first, features after it.
        margin: voxels lost on each side, 21: the paper's patch of 70³ gives 28³ predictions.

    Source: section 2.3 and figure 6.
    """

    margin, multiple, spatial_dims = 21, 4, 3

    def __init__(
        self, in_channels: int, classes: int, *, variant: str = "standard", features: int | None = None, width: float = 1.0
    ):
        super().__init__()
        _check(in_channels, classes)
        if variant not in VARIANTS:
            raise ValueError(f"variant={variant!r}; expected one of {', '.join(VARIANTS)}")
        if features is None:
            features = 0 if variant == "standard" else 3 * classes
        if (features > 0) != (variant != "standard"):
            raise ValueError(f'variant={variant!r} with {features} features; "standard" has none, the others have some')
        self.image_channels, self.variant, self.classes = in_channels, variant, classes
        self.in_channels = in_channels + features
        maps = [scaled(m, width) for m in TRUNK]
        self.trunk = Trunk(self.in_channels if variant in "ac" else in_channels, maps, extra=features if variant == "b" else 0)
        self.image_trunk = Trunk(in_channels, maps) if variant == "c" else None
        self.join = nn.Sequential(nn.Conv3d(2 * maps[0], maps[0], 1), nn.ReLU()) if variant == "c" else None
        self.classifier = nn.Conv3d(maps[0], classes, 1)
        init_he(self)

    def forward(self, x: Tensor) -> Tensor:
        """`(B, C + features, n + 42) -> (B, K, n)` logits, n a multiple of 4."""
        check_size(self, x)
        axes = x.shape[2:]
        if any((n - 2 * self.margin) % self.multiple for n in axes):
            raise ValueError(
                f"the patch is {'×'.join(map(str, axes))} voxels; this network needs {2 * self.margin} and a multiple of "
                f"{self.multiple} along every axis, like 70. medseg_lite.inference.predict pads a whole volume for you"
            )
        image, extra = x[:, : self.image_channels], x[:, self.image_channels :]
        if self.variant == "b":
            y = self.trunk(image, extra)
        else:
            y = self.trunk(x)
        if self.variant == "c":
            y = self.join(torch.cat([self.image_trunk(image), y], dim=1))
        return self.classifier(y[..., 1:, 1:, 1:])  # output k lies 20 voxels in: without the first, 21


def _valid(in_maps: int, out_maps: int, kernel: int = 3) -> nn.Sequential:
    return nn.Sequential(CONV[3](in_maps, out_maps, kernel), nn.ReLU())


def _double(x: Tensor) -> Tensor:
    return F.interpolate(x, scale_factor=2)


def _crop(x: Tensor, like: Tensor, start: int) -> Tensor:
    return x[(..., *(slice(start, start + n) for n in like.shape[2:]))]


def _check(in_channels: int, classes: int) -> None:
    if in_channels < 1 or classes < 2:
        raise ValueError(f"in_channels={in_channels}, classes={classes}; expected at least 1 channel and 2 classes")


def _check_multiple(model: nn.Module, x: Tensor) -> None:
    if any(n % model.multiple for n in x.shape[2:]):
        raise ValueError(
            f"the slice is {'×'.join(map(str, x.shape[2:]))} pixels; this network halves it several times and needs multiples of "
            f"{model.multiple}. medseg_lite.inference.predict pads a whole slice for you"
        )


def mlynarski_2d(*, in_channels: int = 4, classes: int = 4, width: float = 1.0, subnets: int = 1) -> Mlynarski2d:
    """Mlynarski's 2D network, model 1 or 2. 31,277,800 parameters (4 sequences, 4 classes; 31,173,400 with `subnets=2`).

    660 of them belong to the auxiliary classifiers, which exist for training only.
    """
    model = Mlynarski2d(in_channels, classes, subnets=subnets, width=width)
    model.config = {
        "builder": "mlynarski_2d",
        "in_channels": int(in_channels),
        "classes": int(classes),
        "width": float(width),
        "subnets": subnets,
    }
    return model


def mlynarski_3d(
    *, in_channels: int = 4, classes: int = 4, width: float = 1.0, variant: str = "standard", features: int | None = None
) -> Mlynarski3d:
    """Mlynarski's 3D network. 1,330,372 parameters (4 sequences, 4 classes; with features 1,340,740 as A or B, 2,673,060 as C)."""
    model = Mlynarski3d(in_channels, classes, variant=variant, features=features, width=width)
    model.config = {
        "builder": "mlynarski_3d",
        "in_channels": int(in_channels),
        "classes": int(classes),
        "width": float(width),
        "variant": variant,
        "features": features,
    }
    return model

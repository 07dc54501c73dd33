"""Mlynarski's networks: 2D networks with a subnetwork for every sequence, and 3D networks that take the 2D scores as features.

P. Mlynarski, H. Delingette, A. Criminisi, N. Ayache: "3D convolutional neural networks for tumor segmentation using long-range 2D
context", Computerized Medical Imaging and Graphics 73, 2019, https://arxiv.org/abs/1807.08599.

The paper gives the kinds of layers, the patch of 70 voxels and the receptive field of 45, but no numbers of feature maps. The
numbers here are ours; those of the main 2D network (64 to 1024) are the author's in later published code.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .layers import init_he, scaled
from .network import Network, builder

MAIN = (64, 128, 256, 512, 1024)  # feature maps of the main 2D network, scale by scale
SUBNET = 32  # feature maps that each subnetwork hands over
TRUNK = (32, 64, 128)  # feature maps of the 3D network, scale by scale
VARIANTS = ("standard", "a", "b", "c")
FIELDS = {3: (21, 4), 2: (12, 2)}  # the 3D network's margin and multiple, by its number of scales


class Conv(nn.Sequential):
    """Zero-padded convolution, batch normalisation, ReLU: `(B, I, H, W) -> (B, O, H, W)`."""

    def __init__(self, in_maps: int, out_maps: int):
        super().__init__()
        self.conv, self.norm, self.act = nn.Conv2d(in_maps, out_maps, 3, padding=1), nn.BatchNorm2d(out_maps), nn.ReLU()


class UpConv(nn.Module):
    """Bilinear interpolation to twice the size, 2² convolution, batch normalisation, ReLU: `(B, I, H, W) -> (B, O, 2H, 2W)`."""

    def __init__(self, in_maps: int, out_maps: int):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(in_maps, out_maps, 2), nn.BatchNorm2d(out_maps)

    def forward(self, x: Tensor) -> Tensor:
        x = F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False)
        return self.norm(self.conv(F.pad(x, (0, 1, 0, 1)))).relu()


class ReducedUNet(nn.Module):
    """The subnetwork of model 1, a U-Net of two scales: `(B, C, H, W) -> (B, 32, H, W)`.

    The first layer's feature maps are joined to the upsampled ones.
    """

    def __init__(self, in_channels: int, maps: int):
        super().__init__()
        self.first = Conv(in_channels, maps // 2)
        self.coarse = nn.Sequential(Conv(maps // 2, maps), Conv(maps, maps))
        self.last = Conv(maps // 2 + maps, maps)

    def forward(self, x: Tensor) -> Tensor:
        first = self.first(x)  # (B, 16, H, W)
        coarse = self.coarse(F.max_pool2d(first, 2))  # (B, 32, H/2, W/2)
        coarse = F.interpolate(coarse, scale_factor=2, mode="bilinear")  # (B, 32, H, W)
        return self.last(torch.cat([first, coarse], dim=1))


def three_layers(in_channels: int, maps: int) -> nn.Sequential:
    """Return the subnetwork of model 2: three convolutions, `(B, C, H, W) -> (B, 32, H, W)`."""
    return nn.Sequential(Conv(in_channels, maps // 2), Conv(maps // 2, maps // 2), Conv(maps // 2, maps))


class Mlynarski2d(Network):
    """One subnetwork for every sequence and one for all together. Their feature maps enter a U-Net.

        sequence 1 ─ subnetwork ─┬─────── concat ─ U-Net ─ K          each subnetwork: ─ auxiliary classifier ─ K
            …                    │                                    (in training only)
        sequence C ─ subnetwork ─┤
        all        ─ subnetwork ─┘

    Args:
        in_channels: sequences C.
        classes: output classes K, background included.
        subnets: 1 for reduced U-Nets, 2 for three layers of convolutions.
        width: factor for every number of feature maps.

    Attributes:
        subnetworks: C of them for single sequences, the last for all.
        auxiliary: the classifiers of the subnetworks, 1² convolutions. `forward` does not use them.
        halo: distance in pixels beyond which nothing influences a prediction.

    Source: Mlynarski et al. 2019, section 2.2 and figure 4.
    Taught in notebooks 12 and 13.
    """

    spatial_dims, multiple, halo = 2, 16, 144

    def __init__(self, in_channels: int, classes: int, *, subnets: int = 1, width: float = 1.0):
        super().__init__(in_channels, classes, fewest_classes=2)
        if subnets not in (1, 2):
            raise ValueError(f"subnets={subnets!r}; expected 1 (reduced U-Nets) or 2 (three layers)")
        shared = 2 * scaled(SUBNET // 2, width)
        build = ReducedUNet if subnets == 1 else three_layers
        self.subnetworks = nn.ModuleList(build(c, shared) for c in [1] * in_channels + [in_channels])
        self.auxiliary = nn.ModuleList(nn.Conv2d(shared, classes, 1) for _ in self.subnetworks)
        maps = [scaled(m, width) for m in MAIN]
        going_down, going_up = pairwise([shared * len(self.subnetworks), *maps]), list(pairwise(reversed(maps)))
        self.down = nn.ModuleList(nn.Sequential(Conv(a, b), Conv(b, b)) for a, b in going_down)
        self.enlarge = nn.ModuleList(UpConv(a, b) for a, b in going_up)
        self.up = nn.ModuleList(nn.Sequential(Conv(2 * b, b), Conv(b, b)) for _, b in going_up)
        self.classifier = nn.Conv2d(maps[0], classes, 1)
        init_he(self)

    def forward(self, x: Tensor) -> Tensor:
        """`(B, C, H, W) -> (B, K, H, W)` logits. The 3D networks take these class scores as features."""
        return self._main(self._features(x))

    def with_auxiliary(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Return the logits, and those of every subnetwork's own classifier, for `losses.deep_supervision`."""
        features = self._features(x)
        return self._main(features), [head(f) for head, f in zip(self.auxiliary, features)]

    def subnetwork(self, index: int) -> Subnetwork:
        """Return one subnetwork and its auxiliary classifier as a network, to be trained on cases that have its sequence.

        It shares its weights with this network.
        """
        if not -len(self.subnetworks) <= index < len(self.subnetworks):
            raise ValueError(f"there is no subnetwork {index}; expected 0 to {len(self.subnetworks) - 1}")
        joint = index % len(self.subnetworks) == self.in_channels
        channels = self.in_channels if joint else 1
        return Subnetwork(self.subnetworks[index], self.auxiliary[index], channels, self.classes)

    def _features(self, x: Tensor) -> list[Tensor]:
        """Run the subnetworks: `(B, C, H, W)` to C + 1 tensors `(B, 32, H, W)`."""
        self.check_size(x)
        return [net(part) for net, part in zip(self.subnetworks, [*x.split(1, dim=1), x])]

    def _main(self, features: Sequence[Tensor]) -> Tensor:
        x, skips = torch.cat(list(features), dim=1), []  # (B, 32 (C + 1), H, W)
        for level, block in enumerate(self.down):
            x = block(F.max_pool2d(x, 2) if level else x)  # (B, 64, H, W), (B, 128, H/2, W/2), …, (B, 1024, H/16, W/16)
            skips.append(x)
        skips.pop()
        for enlarge, block in zip(self.enlarge, self.up):
            x = block(torch.cat([skips.pop(), enlarge(x)], dim=1))  # (B, 512, H/8, W/8), …, (B, 64, H, W)
        return self.classifier(x)


class Subnetwork(Network):
    """A subnetwork with its classifier: `(B, C, H, W) -> (B, K, H, W)` logits."""

    spatial_dims, multiple, halo = 2, 2, 8

    def __init__(self, features: nn.Module, classifier: nn.Module, in_channels: int, classes: int):
        super().__init__(in_channels, classes)
        self.features, self.classifier = features, classifier

    def forward(self, x: Tensor) -> Tensor:
        self.check_size(x)
        return self.classifier(self.features(x))


class Trunk(nn.Module):
    """A valid 3D U-Net of three scales: `(B, C, n + 41) -> (B, 32, n)`, n one more than a multiple of 4.

    With two scales, `(B, C, n + 23) -> (B, 32, n)`, n odd: the coarsest scale is left out, all other layers stay.

    Up-convolutions with kernels of 2 make the receptive field odd: 45 voxels layer by layer; measured, 46 for three of four voxels
    and 42 for the fourth. But they put it half a voxel beside the grid: output k lies between the voxels k + 20 and k + 21 of the
    input. We take k + 20, as the skip from the finest scale does.

    Args:
        in_channels: channels C of the input.
        maps: feature maps of every scale, from the finest, two or three of them.
        extra: number of feature maps `(B, extra, n + 41)` that come in before the final convolutions, 0 for none.
    """

    def __init__(self, in_channels: int, maps: Sequence[int], *, extra: int = 0):
        super().__init__()
        a, b, *coarsest = maps
        self.down1 = _valid(in_channels, a)
        self.down2 = nn.Sequential(_valid(a, b), _valid(b, b))
        self.down3 = self.enlarge2 = None
        if coarsest:
            (c,) = coarsest
            self.down3, self.enlarge2 = nn.Sequential(_valid(b, c), _valid(c, c)), _valid(c, b, 2)
        self.up2 = nn.Sequential(_valid(2 * b if coarsest else b, b), _valid(b, b))
        self.enlarge1, self.up1 = _valid(b, a, 2), nn.Sequential(_valid(2 * a + extra, a), _valid(a, a))

    def forward(self, x: Tensor, extra: Tensor | None = None) -> Tensor:
        fine = self.down1(x)  # (B, 32, 68³) for n = 29, an input of 70³
        middle = self.down2(F.max_pool3d(fine, 2))  # (B, 64, 30³)
        if self.down3 is None:
            y = self.up2(middle)
        else:
            y = self.enlarge2(_double(self.down3(F.max_pool3d(middle, 2))))  # (B, 128, 11³), then (B, 64, 21³)
            y = self.up2(torch.cat([_crop(middle, y, 4), y], dim=1))  # (B, 64, 17³)
        y = self.enlarge1(_double(y))  # (B, 32, 33³)
        start = (fine.shape[-1] - y.shape[-1]) // 2  # 17
        joined = [_crop(fine, y, start), y] if extra is None else [_crop(fine, y, start), _crop(extra, y, start + 1), y]
        return self.up1(torch.cat(joined, dim=1))  # (B, 32, 29³)


class Mlynarski3d(Network):
    """The 3D network, with the scores of 2D networks as further channels (variants A, B, C) or without (standard).

    In variant A the features enter beside the image, in the first layer. In variant B they enter before the final convolutions.
    Variant C has two trunks: one sees the image only, the other one sees image and features.

    Args:
        in_channels: channels of the image.
        classes: output classes K, background included.
        variant: "standard", "a", "b" or "c".
        features: channels of the 2D features, by default a score for every class in three planes; 0 for "standard".
        scales: 3, with a receptive field of 45 voxels as in the paper; or 2, with one of 25 voxels, for grids twice as coarse as
            the paper's 1 mm.
        width: factor for every number of feature maps.

    Attributes:
        in_channels: channels that `forward` takes, first the image, then the features.
        margin: voxels lost on each side, 21: the paper's patch of 70³ gives 28³ predictions. With two scales 12.
        multiple: the sides of the prediction are multiples of this number, 4, or with two scales 2.

    Source: Mlynarski et al. 2019, section 2.3 and figure 6.
    Taught in notebook 12.
    """

    def __init__(
        self,
        in_channels: int,
        classes: int,
        *,
        variant: str = "standard",
        features: int | None = None,
        scales: int = 3,
        width: float = 1.0,
    ):
        super().__init__(in_channels, classes, fewest_classes=2)
        if variant not in VARIANTS:
            raise ValueError(f"variant={variant!r}; expected one of {', '.join(VARIANTS)}")
        if features is None:
            features = 0 if variant == "standard" else 3 * classes
        if (features > 0) != (variant != "standard"):
            raise ValueError(f'variant={variant!r} with {features} features; "standard" has none, the others have some')
        if scales not in FIELDS:
            raise ValueError(f"scales={scales!r}; expected 3 (the paper's field of 45 voxels) or 2 (25 voxels)")
        self.margin, self.multiple = FIELDS[scales]
        self.variant, self.image_channels, self.in_channels = variant, in_channels, in_channels + features
        maps = [scaled(m, width) for m in TRUNK[:scales]]
        self.trunk = Trunk(self.in_channels if variant in "ac" else in_channels, maps, extra=features if variant == "b" else 0)
        self.image_trunk = Trunk(in_channels, maps) if variant == "c" else None
        self.join = nn.Sequential(nn.Conv3d(2 * maps[0], maps[0], 1), nn.ReLU()) if variant == "c" else None
        self.classifier = nn.Conv3d(maps[0], classes, 1)
        init_he(self)

    def forward(self, x: Tensor) -> Tensor:
        """`(B, C + features, n + 42) -> (B, K, n)` logits, n a multiple of 4; with two scales n + 24, and n even."""
        self.check_size(x)
        image, extra = x[:, : self.image_channels], x[:, self.image_channels :]
        y = self.trunk(image, extra) if self.variant == "b" else self.trunk(x)  # (B, 32, n + 1)
        if self.variant == "c":
            y = self.join(torch.cat([self.image_trunk(image), y], dim=1))
        return self.classifier(y[..., 1:, 1:, 1:])  # output k lies 20 voxels in: without the first, 21


def _valid(in_maps: int, out_maps: int, kernel: int = 3) -> nn.Sequential:
    return nn.Sequential(nn.Conv3d(in_maps, out_maps, kernel), nn.ReLU())


def _double(x: Tensor) -> Tensor:
    return F.interpolate(x, scale_factor=2)


def _crop(x: Tensor, like: Tensor, start: int) -> Tensor:
    return x[(..., *(slice(start, start + n) for n in like.shape[2:]))]


@builder
def mlynarski_2d(*, in_channels: int = 4, classes: int = 4, width: float = 1.0, subnets: int = 1) -> Mlynarski2d:
    """Build Mlynarski's 2D network, model 1 or 2. 31,277,800 parameters (4 sequences, 4 classes; 31,173,400 with `subnets=2`).

    660 of them belong to the auxiliary classifiers, which exist for training only.
    """
    return Mlynarski2d(in_channels, classes, subnets=subnets, width=width)


@builder
def mlynarski_3d(
    *,
    in_channels: int = 4,
    classes: int = 4,
    width: float = 1.0,
    variant: str = "standard",
    features: int | None = None,
    scales: int = 3,
) -> Mlynarski3d:
    """Build Mlynarski's 3D network. 1,330,372 parameters (4 sequences, 4 classes).

    With features it has 1,340,740 in the variants A and B, and 2,673,060 in C.
    """
    return Mlynarski3d(in_channels, classes, variant=variant, features=features, scales=scales, width=width)

"""Havaei's two-pathway network, its single pathways, and the three cascades of two such networks.

Finzel, "Convolutional neural networks in medical imaging", 2017, section 3.1, on Havaei et al., "Brain tumor segmentation
with deep neural networks", Medical Image Analysis 35, 2017. https://arxiv.org/abs/1505.03540. The survey gives the idea and
the kernels; layer sizes are those of Havaei et al. Everything is 2D: a case is segmented slice by slice.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .layers import init_he, init_uniform, scaled
from .network import Network, builder

LOCAL, GLOBAL = 64, 160  # feature maps of each layer of the local and of the global pathway
REACH = 16  # pixels that a network sees to each side: receptive field 33

# Entry of the first network's probabilities into the second network of a cascade, and the pixels the pair sees to each side.
CASCADES = {"input": 2 * REACH, "local": 28, "output": 26}


class Maxout(nn.Module):
    """The larger of two linear pieces: `(B, 2 F, ...) -> (B, F, ...)`. Source: Goodfellow et al. 2013."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.maximum(*x.chunk(2, dim=1))


class WideConv2d(nn.Conv2d):
    """A valid convolution with a large kernel and few output maps: the same function as `nn.Conv2d`, but faster.

    A CPU works best on many output maps at a time. So each row of the kernel makes output maps of its own (K × 21 of them
    from kernels one pixel high). The rows are added up afterwards, each moved to its place.
    """

    def forward(self, x: Tensor) -> Tensor:
        classes, maps, rows, columns = self.weight.shape
        height = x.shape[2] - rows + 1
        if height < 8 or x.device.type != "cpu":  # few rows would be computed more than once; GPUs have kernels for this
            return super().forward(x)
        flat = self.weight.transpose(1, 2).reshape(classes * rows, maps, 1, columns)
        parts = F.conv2d(x, flat).unflatten(1, (classes, rows))  # (B, K, 21, H, W - 20)
        return sum(parts[:, :, r, r : r + height] for r in range(rows)) + self.bias[:, None, None]


class TwoPathCNN(Network):
    """A pathway with small kernels for detail, one with large kernels for context, or either by itself.

        patch (B, C, 33²) ─┬─ conv 7² ─ maxout 64 ─ pool 4² ─ 24² ─ conv 3² ─ maxout 64 ─ pool 2² ─ 21² ─┐
                           └─ conv 13² ─ maxout 160 ───────────────────────────────────────────── 21² ─┴─ conv 21² ─ K

    All convolutions are valid and pooling has stride 1, so a whole slice goes through at once: n + 32 pixels in, n out.

    Args:
        in_channels: image channels C.
        classes: output classes K, background included.
        local_maps: feature maps of each layer of the local pathway, 0 to leave it out.
        global_maps: feature maps of the global pathway, 0 to leave it out.
        dropout: rate on the features that the output layer sees.
        init: "uniform" (kernels from U(-.005, .005), the paper's) or "he" (N(0, √(2/n_in)), and an output layer of zeros, so that
            all classes are equally likely at first). With the first, the local pathway learns nothing in short runs.
        joins: entry of another network's class probabilities, for cascades: "input", "local" (before the second convolution of
            the local pathway), "output" (before the output layer), or None.

    Attributes:
        margin: pixels lost on each side, 16.
        output: the output layer. The second phase of training changes this layer only.

    Source: Finzel 2017, section 3.1; Havaei et al. 2017, section 3.1.
    Taught in notebook 02.
    """

    margin, spatial_dims = REACH, 2

    def __init__(
        self,
        in_channels: int,
        classes: int,
        *,
        local_maps: int = LOCAL,
        global_maps: int = GLOBAL,
        dropout: float = 0.5,
        init: str = "uniform",
        joins: str | None = None,
    ):
        super().__init__(in_channels, classes, fewest_classes=2)
        if init not in ("uniform", "he"):
            raise ValueError(f"init={init!r}; expected uniform or he")
        self.joins = joins
        extra = {entry: classes if entry == joins else 0 for entry in CASCADES}  # channels that the other network adds
        seen = in_channels + extra["input"]
        self.local1 = self.local2 = self.global1 = None
        if local_maps:
            hidden = local_maps + extra["local"]
            self.local1 = nn.Sequential(nn.Conv2d(seen, 2 * local_maps, 7), Maxout(), nn.MaxPool2d(4, stride=1))
            self.local2 = nn.Sequential(nn.Conv2d(hidden, 2 * local_maps, 3), Maxout(), nn.MaxPool2d(2, stride=1))
        if global_maps:
            self.global1 = nn.Sequential(nn.Conv2d(seen, 2 * global_maps, 13), Maxout())
        self.drop = nn.Dropout(dropout)
        self.output = WideConv2d(local_maps + global_maps + extra["output"], classes, 21)
        if init == "uniform":
            init_uniform(self)
        else:
            init_he(self)
            nn.init.zeros_(self.output.weight)

    def forward(self, x: Tensor, probabilities: Tensor | None = None) -> Tensor:
        """`(B, C, n + 32, n + 32)` to logits `(B, K, n, n)`. A network that `joins` another takes its probabilities too."""
        self.check_size(x)
        if self.joins == "input":
            x = torch.cat([x, probabilities], dim=1)  # (B, C + K, 33²) for n = 1
        features = []
        if self.local1 is not None:
            detail = self.local1(x)  # (B, 64, 24²)
            if self.joins == "local":
                detail = torch.cat([detail, probabilities], dim=1)  # (B, 64 + K, 24²)
            features.append(self.local2(detail))  # (B, 64, 21²)
        if self.global1 is not None:
            features.append(self.global1(x))  # (B, 160, 21²)
        if self.joins == "output":
            features.append(probabilities)  # (B, K, 21²)
        return self.output(self.drop(torch.cat(features, dim=1)))  # (B, 224, 21²), then (B, K, 1²)


class CascadeCNN(Network):
    """Two networks: the class probabilities of the first, which is frozen, are further inputs of the second.

    So the second network sees the classes that the first one gave to the neighbours of a pixel. The probabilities enter in one of
    three places. "input": beside the image. "local": beside the feature maps of the local pathway's first layer. "output": beside
    the feature maps that the output layer sees.

    With "local", the feature maps have an even receptive field (10 pixels: a 7² kernel, then pooling of 4²), so the two sets of
    maps cannot be centred on each other. The probabilities lie half a pixel to the left, and the pair sees 28 pixels to one side
    and 27 to the other.

    Args:
        first: a trained two-pathway network; it is copied, and frozen.
        second: a two-pathway network that `joins` the first.

    Source: Finzel 2017, section 3.1; Havaei et al. 2017, section 3.1.
    Taught in notebook 02.
    """

    spatial_dims = 2

    def __init__(self, first: TwoPathCNN, second: TwoPathCNN):
        super().__init__(second.in_channels, second.classes)
        self.first = copy.deepcopy(first).requires_grad_(False).eval()
        self.second = second
        self.margin = CASCADES[second.joins]

    @property
    def output(self) -> nn.Module:
        """The output layer. The second phase of training changes this layer only."""
        return self.second.output

    def train(self, mode: bool = True) -> CascadeCNN:
        """Set the mode of the second network. The first one stays in evaluation mode, without dropout."""
        super().train(mode)
        self.first.eval()
        return self

    def forward(self, x: Tensor) -> Tensor:
        """`(B, C, n + 2 margin, n + 2 margin)` to the second network's logits `(B, K, n, n)`."""
        self.check_size(x)
        height, width = x.shape[2:]
        odd, rim = int(self.second.joins == "local"), self.margin - REACH
        probabilities = self.first(x[..., : height - odd, : width - odd]).softmax(dim=1)
        return self.second(x[..., rim : height - rim, rim : width - rim], probabilities)


def _single(in_channels, classes, width, options: dict, *, local_maps: int = LOCAL, global_maps: int = GLOBAL) -> TwoPathCNN:
    maps = {"local_maps": local_maps, "global_maps": global_maps}
    maps = {path: scaled(count, width) if count else 0 for path, count in maps.items()}
    return TwoPathCNN(in_channels, classes, **maps, **options)


def _cascade(joins: str, first: TwoPathCNN | None, in_channels, classes, width, options: dict) -> CascadeCNN:
    if first is None:
        first = two_path_cnn(in_channels=in_channels, classes=classes, width=width)
    wanted = {"builder": "two_path_cnn", "in_channels": in_channels, "classes": classes, "width": width}
    config = first.config if isinstance(first, Network) else None
    found = {key: (config or {}).get(key) for key in wanted}
    if found != wanted:
        raise ValueError(f"first is {found}; this cascade needs {wanted}: train such a network, or build the cascade to match")
    return CascadeCNN(first, _single(in_channels, classes, width, options | {"joins": joins}))


@builder
def two_path_cnn(*, in_channels: int = 4, classes: int = 5, width: float = 1.0, **options) -> TwoPathCNN:
    """Build TwoPathCNN: the local and the global pathway side by side. 809,637 parameters (4 channels, 5 classes)."""
    return _single(in_channels, classes, width, options)


@builder
def local_path_cnn(*, in_channels: int = 4, classes: int = 5, width: float = 1.0, **options) -> TwoPathCNN:
    """Build LocalPathCNN: the local pathway by itself. 240,197 parameters."""
    return _single(in_channels, classes, width, options, global_maps=0)


@builder
def global_path_cnn(*, in_channels: int = 4, classes: int = 5, width: float = 1.0, **options) -> TwoPathCNN:
    """Build GlobalPathCNN: the global pathway by itself. 569,445 parameters."""
    return _single(in_channels, classes, width, options, local_maps=0)


@builder
def input_cascade_cnn(
    *, in_channels: int = 4, classes: int = 5, width: float = 1.0, first: TwoPathCNN | None = None, **options
) -> CascadeCNN:
    """Build InputCascadeCNN: the first network's probabilities beside the image. 1,111,397 parameters to train.

    `first` is a trained `two_path_cnn` of the same channels, classes and width. Its 809,637 parameters stay as they are. Without
    `first` that network is untrained, and weights are loaded into it afterwards.
    """
    return _cascade("input", first, in_channels, classes, width, options)


@builder
def local_cascade_cnn(
    *, in_channels: int = 4, classes: int = 5, width: float = 1.0, first: TwoPathCNN | None = None, **options
) -> CascadeCNN:
    """Build LocalCascadeCNN: the probabilities beside the local pathway's first layer. 815,397 parameters to train.

    `first` is the same as for `input_cascade_cnn`.
    """
    return _cascade("local", first, in_channels, classes, width, options)


@builder
def mf_cascade_cnn(
    *, in_channels: int = 4, classes: int = 5, width: float = 1.0, first: TwoPathCNN | None = None, **options
) -> CascadeCNN:
    """Build MFCascadeCNN: the probabilities beside the features that the output layer sees. 820,662 parameters to train.

    It resembles one mean-field iteration of a CRF. `first` is the same as for `input_cascade_cnn`.
    """
    return _cascade("output", first, in_channels, classes, width, options)

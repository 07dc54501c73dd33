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

from .layers import check_size, init_he, init_uniform, scaled

LOCAL, GLOBAL = 64, 160  # feature maps of each layer of the local and of the global pathway
REACH = 16  # pixels that a network sees to each side: receptive field 33

# Where the first network's probabilities enter the second of a cascade, and the pixels the pair sees to each side.
CASCADES = {"input": 2 * REACH, "local": 28, "output": 26}


class Maxout(nn.Module):
    """The larger of two linear pieces: `(B, 2 F, ...) -> (B, F, ...)`. Source: Goodfellow et al. 2013."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.maximum(*x.chunk(2, dim=1))


class WideConv2d(nn.Conv2d):
    """A valid convolution with a large kernel and few output maps, the same function as `nn.Conv2d` but faster.

    A CPU works best on many output maps at a time. So each row of the kernel makes output maps of its own (K × 21 of them
    from kernels one pixel high), and the rows are added up afterwards, each moved to its place.
    """

    def forward(self, x: Tensor) -> Tensor:
        classes, maps, rows, columns = self.weight.shape
        height = x.shape[2] - rows + 1
        if height < 8 or x.device.type != "cpu":  # few rows would be computed more than once; GPUs have kernels for this
            return super().forward(x)
        flat = self.weight.transpose(1, 2).reshape(classes * rows, maps, 1, columns)
        parts = F.conv2d(x, flat).unflatten(1, (classes, rows))
        return sum(parts[:, :, r, r : r + height] for r in range(rows)) + self.bias[:, None, None]


class TwoPathCNN(nn.Module):
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
        joins: where the class probabilities of another network come in, for cascades: "input", "local" (before the second
            convolution of the local pathway), "output" (before the output layer), or None.

    Attributes:
        margin: pixels lost on each side, 16.
        output: the output layer, the one that the second phase of training changes.
    """

    margin, multiple, spatial_dims = REACH, 1, 2

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
        super().__init__()
        if in_channels < 1 or classes < 2:
            raise ValueError(f"in_channels={in_channels}, classes={classes}; expected at least 1 channel and 2 classes")
        if init not in ("uniform", "he"):
            raise ValueError(f"init={init!r}; expected uniform or he")
        self.in_channels, self.classes, self.joins = in_channels, classes, joins
        extra = {where: classes if where == joins else 0 for where in CASCADES}
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
        """`(B, C, n + 32, n + 32)` to logits `(B, K, n, n)`; a network that `joins` another takes its probabilities too."""
        check_size(self, x)
        if self.joins == "input":
            x = torch.cat([x, probabilities], dim=1)
        features = []
        if self.local1 is not None:
            detail = self.local1(x)
            if self.joins == "local":
                detail = torch.cat([detail, probabilities], dim=1)
            features.append(self.local2(detail))
        if self.global1 is not None:
            features.append(self.global1(x))
        if self.joins == "output":
            features.append(probabilities)
        return self.output(self.drop(torch.cat(features, dim=1)))


class CascadeCNN(nn.Module):
    """Two networks: the class probabilities of the first, which stays as it is, are further inputs of the second.

    So the second sees what its neighbours were called. "input": side by side with the image; "local": beside the feature
    maps of the local pathway's first layer; "output": beside those that the output layer sees.

    With "local", the feature maps have an even field (10 pixels: a 7² kernel, then pooling of 4²), so the two sets of maps
    cannot be centred on each other: the probabilities lie half a pixel to the left and the pair sees 28 pixels to one
    side and 27 to the other.

    Args:
        first: a trained two-pathway network; it is copied, and frozen.
        second: a two-pathway network that `joins` the first.
    """

    multiple, spatial_dims = 1, 2

    def __init__(self, first: TwoPathCNN, second: TwoPathCNN):
        super().__init__()
        self.first = copy.deepcopy(first).requires_grad_(False).eval()
        self.second = second
        self.in_channels, self.classes = second.in_channels, second.classes
        self.margin = CASCADES[second.joins]

    @property
    def output(self) -> nn.Module:
        """The output layer, the one that the second phase of training changes."""
        return self.second.output

    def train(self, mode: bool = True) -> CascadeCNN:
        """Training mode for the second network; the first has no dropout any more."""
        super().train(mode)
        self.first.eval()
        return self

    def forward(self, x: Tensor) -> Tensor:
        """`(B, C, n + 2 margin, n + 2 margin)` to the second network's logits `(B, K, n, n)`."""
        check_size(self, x)
        odd = int(self.second.joins == "local")
        height, width = x.shape[2:]
        probabilities = self.first(x[..., : height - odd, : width - odd]).softmax(dim=1)
        rim = self.margin - REACH
        return self.second(x[..., rim : height - rim, rim : width - rim], probabilities)


def _config(name: str, in_channels: int, classes: int, width: float, options: dict) -> dict:
    return {"builder": name, "in_channels": int(in_channels), "classes": int(classes), "width": float(width), **options}


def _single(name, in_channels, classes, width, options, *, local_maps=LOCAL, global_maps=GLOBAL) -> TwoPathCNN:
    maps = {"local_maps": local_maps, "global_maps": global_maps}
    maps = {path: scaled(count, width) if count else 0 for path, count in maps.items()}
    model = TwoPathCNN(in_channels, classes, **maps, **options)
    model.config = _config(name, in_channels, classes, width, options)
    return model


def _cascade(name, joins, in_channels, classes, width, first, options) -> CascadeCNN:
    config = _config(name, in_channels, classes, width, options)
    wanted = _config("two_path_cnn", in_channels, classes, width, {})
    if first is None:
        first = two_path_cnn(in_channels=in_channels, classes=classes, width=width)
    found = {key: getattr(first, "config", {}).get(key) for key in wanted}
    if found != wanted:
        raise ValueError(f"first is {found}; {name} needs {wanted}: train such a network first, or build {name} to match")
    second = _single(name, in_channels, classes, width, options | {"joins": joins})
    model = CascadeCNN(first, second)
    model.config = config
    return model


def two_path_cnn(*, in_channels: int = 4, classes: int = 5, width: float = 1.0, **options) -> TwoPathCNN:
    """TwoPathCNN: the local and the global pathway side by side. 809,637 parameters (4 channels, 5 classes)."""
    return _single("two_path_cnn", in_channels, classes, width, options)


def local_path_cnn(*, in_channels: int = 4, classes: int = 5, width: float = 1.0, **options) -> TwoPathCNN:
    """LocalPathCNN: the local pathway by itself. 240,197 parameters."""
    return _single("local_path_cnn", in_channels, classes, width, options, global_maps=0)


def global_path_cnn(*, in_channels: int = 4, classes: int = 5, width: float = 1.0, **options) -> TwoPathCNN:
    """GlobalPathCNN: the global pathway by itself. 569,445 parameters."""
    return _single("global_path_cnn", in_channels, classes, width, options, local_maps=0)


def input_cascade_cnn(
    *, in_channels: int = 4, classes: int = 5, width: float = 1.0, first: TwoPathCNN | None = None, **options
) -> CascadeCNN:
    """InputCascadeCNN: the first network's probabilities beside the image. 1,111,397 parameters to train.

    `first` is a trained `two_path_cnn` of the same channels, classes and width; without it the first network is untrained,
    a place for weights that are loaded afterwards. Its 809,637 parameters stay as they are.
    """
    return _cascade("input_cascade_cnn", "input", in_channels, classes, width, first, options)


def local_cascade_cnn(
    *, in_channels: int = 4, classes: int = 5, width: float = 1.0, first: TwoPathCNN | None = None, **options
) -> CascadeCNN:
    """LocalCascadeCNN: the first network's probabilities beside the first layer of the local pathway. 815,397 parameters to
    train; `first` as for `input_cascade_cnn`."""
    return _cascade("local_cascade_cnn", "local", in_channels, classes, width, first, options)


def mf_cascade_cnn(
    *, in_channels: int = 4, classes: int = 5, width: float = 1.0, first: TwoPathCNN | None = None, **options
) -> CascadeCNN:
    """MFCascadeCNN: the first network's probabilities beside the features that the output layer sees, which resembles one
    mean-field iteration of a CRF. 820,662 parameters to train; `first` as for `input_cascade_cnn`."""
    return _cascade("mf_cascade_cnn", "output", in_channels, classes, width, first, options)

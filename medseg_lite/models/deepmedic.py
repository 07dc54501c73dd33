"""DeepMedic and the ten networks it is compared with.

Kamnitsas et al., "Efficient multi-scale 3D CNN with fully connected CRF for accurate brain lesion segmentation",
Medical Image Analysis 36, 2017. https://arxiv.org/abs/1603.05959. Table B.1 lists the networks. Details that the text leaves out
follow the authors' first public release (deepMedicOriginal of github.com/deepmedic/deepmedic).
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .deepmedic_inference import DOWN, FoldedDeepMedic
from .layers import CONV, ConvBlock, init_he, init_normal, scaled
from .network import Network, builder

EIGHT = (30, 30, 40, 40, 40, 40, 50, 50)  # feature maps of DeepMedic's eight convolutions
TWICE = tuple(2 * maps for maps in EIGHT)
SMALL = {"hidden": (), "low_resolution": False}  # a pathway and nothing else
PLAIN = {"batch_norm": False, "init": "normal"}  # without the two enhancements of a "+"


class DeepMedic(Network):
    """A pathway of valid convolutions at full resolution, optionally a second one on the image sub-sampled by three.

        patch (B, C, 57³) ─┬─ centre 25³ ── 8 × conv 3³ ──────────────── 50 × 9³ ─┐
                           └─ [1::3] 19³ ── 8 × conv 3³ ── 50 × 3³ ── repeat ×3 ──┴─ 150 ─ 150 ─ logits (B, K, 9³)

    `forward` takes one patch with `margin` voxels of context on every side and cuts both pathways' inputs out of it (`cut`). It
    also takes the two inputs already cut, as samplers deliver them, because they are an eighth of the patch.

    Args:
        in_channels: image channels C.
        classes: output classes K, background included.
        widths: feature maps of each convolution of a pathway.
        kernel: side of the kernels of those convolutions.
        hidden: feature maps of the 1×1×1 layers after the pathways are joined.
        low_resolution: True adds the second pathway.
        spatial_dims: 3, or 2 for the axial-slice networks of section 3.5.
        batch_norm: True normalises the batch in every hidden layer.
        init: "he" or "normal" (N(0, .01)).
        dropout: rate on the inputs of the second hidden layer and of the classifier.
        conv_dropout: rate on the input of every convolution of the pathways (.02 in the paper's TBI experiments).
        centered: True centres the low-resolution receptive field on the middle voxel of the three it serves. False starts it
            one voxel earlier, as the authors' code does.

    Attributes:
        margin: voxels lost on each side (24 for DeepMedic: 57 in, 9 out).
        multiple: output sizes must be a multiple of this (or exactly 1).
        reach: voxels that a full-resolution prediction sees to each side (8: receptive field 17).

    Source: Kamnitsas et al. 2017, sections 2.1 to 2.4, 3.5 and Table B.1.
    Taught in notebooks 04, 05 and 06.
    """

    def __init__(
        self,
        in_channels: int,
        classes: int,
        *,
        widths: Sequence[int] = EIGHT,
        kernel: int = 3,
        hidden: Sequence[int] = (150, 150),
        low_resolution: bool = True,
        spatial_dims: int = 3,
        batch_norm: bool = True,
        init: str = "he",
        dropout: float = 0.5,
        conv_dropout: float = 0.0,
        centered: bool = True,
    ):
        super().__init__(in_channels, classes, fewest_classes=2)
        self.spatial_dims, self.low_resolution, self.centered = spatial_dims, low_resolution, centered
        self.multiple = DOWN if low_resolution else 1
        self.reach = len(widths) * (kernel // 2)
        self.margin = self.reach * self.multiple

        def block(in_maps: int, out_maps: int, kernel: int, dropout: float) -> ConvBlock:
            return ConvBlock(in_maps, out_maps, kernel, spatial_dims=spatial_dims, batch_norm=batch_norm, dropout=dropout)

        def pathway() -> nn.Sequential:
            return nn.Sequential(*(block(i, o, kernel, conv_dropout) for i, o in pairwise([in_channels, *widths])))

        self.normal = pathway()
        self.low = pathway() if low_resolution else None
        maps = [widths[-1] * (2 if low_resolution else 1), *hidden]
        self.hidden = nn.Sequential(*(block(i, o, 1, dropout if n else 0.0) for n, (i, o) in enumerate(pairwise(maps))))
        self.drop = nn.Dropout(dropout if hidden else 0.0)
        self.classifier = CONV[spatial_dims](maps[-1], classes, 1)
        {"he": init_he, "normal": init_normal}[init](self)

    def forward(self, x: Tensor | Sequence[Tensor]) -> Tensor:
        """`(B, C, *(n + 2 margin))`, or the tuple that `cut` makes of it, to logits `(B, K, *n)`."""
        inputs = self.cut(x) if isinstance(x, Tensor) else x  # (B, C, 25³) and (B, C, 19³) for a patch of 57³
        features = self.normal(inputs[0])  # (B, 50, 9³)
        if self.low_resolution:
            context = self.low(inputs[1])  # (B, 50, 3³)
            context = F.interpolate(context, scale_factor=DOWN, mode="nearest")  # (B, 50, 9³)
            context = context[(..., *(slice(n) for n in features.shape[2:]))]
            features = torch.cat([features, context], dim=1)  # (B, 100, 9³)
        return self.classifier(self.drop(self.hidden(features)))  # (B, 150, 9³), then (B, K, 9³)

    def cut(self, patch: Tensor | np.ndarray) -> tuple:
        """Cut each pathway's input out of a patch, as views: `(..., *57³) -> (..., *25³)` and `(..., *19³)`.

        Raises:
            ValueError: when the patch is too small or its output size is not a multiple of `multiple`.
        """
        self.check_size(patch, multiple=1)
        if not self.low_resolution:
            return (patch,)
        sides, trim = patch.shape[-self.spatial_dims :], self.margin - self.reach
        normal = patch[(..., *(slice(trim, n - trim) for n in sides))]
        low = patch[(..., *(self._low_slice(n - 2 * self.margin) for n in sides))]
        return normal, low

    def _low_slice(self, out: int) -> slice:
        """Return every third voxel of a patch for `out` predictions along one axis."""
        if self.centered and out > 1 and out % DOWN:
            raise ValueError(
                f"{out + 2 * self.margin} voxels in give {out} out; this network predicts multiples of {DOWN} voxels "
                f"(or exactly one): feed {out - out % DOWN + 2 * self.margin} voxels instead"
            )
        start = 1 if self.centered and out > 1 else 0
        samples = -(-out // DOWN) + 2 * self.reach
        return slice(start, start + DOWN * (samples - 1) + 1, DOWN)

    def for_inference(self) -> FoldedDeepMedic:
        """Return the function of this network in evaluation mode, rearranged for speed on a CPU. It cannot be trained."""
        return FoldedDeepMedic(self)


def _build(
    in_channels: int, classes: int, width: float, options: dict, *, widths=EIGHT, hidden=(150, 150), **table
) -> DeepMedic:
    """Make a network with the values of Table B.1, in which `options` replace what they name."""
    table |= {"widths": [scaled(maps, width) for maps in widths], "hidden": [scaled(maps, width) for maps in hidden]}
    return DeepMedic(in_channels, classes, **(table | options))


@builder
def shallow(*, in_channels: int = 4, classes: int = 5, width: float = 1.0, **options) -> DeepMedic:
    """Build Shallow: four 5³ convolutions, no batch normalisation, N(0, .01). 615,575 parameters (4 channels, 5 classes)."""
    return _build(in_channels, classes, width, options, widths=(30, 40, 40, 50), kernel=5, **SMALL, **PLAIN)


@builder
def shallow_plus(*, in_channels: int = 4, classes: int = 5, width: float = 1.0, **options) -> DeepMedic:
    """Build Shallow+: Shallow with batch normalisation and He initialisation. 615,735 parameters."""
    return _build(in_channels, classes, width, options, widths=(30, 40, 40, 50), kernel=5, **SMALL)


@builder
def deep(*, in_channels: int = 4, classes: int = 5, width: float = 1.0, **options) -> DeepMedic:
    """Build Deep: eight 3³ convolutions, no batch normalisation, N(0, .01). 311,935 parameters.

    The paper could not train it.
    """
    return _build(in_channels, classes, width, options, **SMALL, **PLAIN)


@builder
def deep_plus(*, in_channels: int = 4, classes: int = 5, width: float = 1.0, **options) -> DeepMedic:
    """Build Deep+: Deep with batch normalisation and He initialisation. 312,255 parameters."""
    return _build(in_channels, classes, width, options, **SMALL)


@builder
def big_deep_plus(*, in_channels: int = 4, classes: int = 5, width: float = 1.0, **options) -> DeepMedic:
    """Build BigDeep+: Deep+ with doubled feature maps and two hidden layers. 1,278,755 parameters."""
    return _build(in_channels, classes, width, options, widths=TWICE, low_resolution=False)


@builder
def deepmedic(*, in_channels: int = 4, classes: int = 5, width: float = 1.0, **options) -> DeepMedic:
    """Build DeepMedic: two pathways of eight 3³ convolutions and two hidden layers. 663,155 parameters."""
    return _build(in_channels, classes, width, options)


@builder
def dm2d_patch(*, in_channels: int = 4, classes: int = 5, width: float = 1.0, **options) -> DeepMedic:
    """Build Dm2dPatch: DeepMedic in 2D, trained patch by patch (one predicted pixel). 248,435 parameters."""
    return _build(in_channels, classes, width, options, spatial_dims=2)


@builder
def dm2d_seg(*, in_channels: int = 4, classes: int = 5, width: float = 1.0, **options) -> DeepMedic:
    """Build Dm2dSeg: the same network as Dm2dPatch, trained densely on segments. 248,435 parameters."""
    return _build(in_channels, classes, width, options, spatial_dims=2)


@builder
def wider2d_seg(*, in_channels: int = 4, classes: int = 5, width: float = 1.0, **options) -> DeepMedic:
    """Build Wider2dSeg, which has doubled feature maps. 911,165 parameters."""
    return _build(in_channels, classes, width, options, widths=TWICE, hidden=(200, 200), spatial_dims=2)


@builder
def deeper2d_seg(*, in_channels: int = 4, classes: int = 5, width: float = 1.0, **options) -> DeepMedic:
    """Build Deeper2dSeg: sixteen convolutions a pathway, 30 to 50 feature maps in even steps. 486,065 parameters."""
    widths = np.linspace(30, 50, 16).round().astype(int).tolist()
    return _build(in_channels, classes, width, options, widths=widths, spatial_dims=2)


@builder
def large2d_seg(*, in_channels: int = 4, classes: int = 5, width: float = 1.0, **options) -> DeepMedic:
    """Build Large2dSeg: twelve convolutions a pathway, 45 to 80 feature maps in even steps. 875,043 parameters."""
    widths = np.linspace(45, 80, 12).round().astype(int).tolist()
    return _build(in_channels, classes, width, options, widths=widths, hidden=(200, 200), spatial_dims=2)

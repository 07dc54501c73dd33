"""DeepMedic and the ten networks it is compared with.

Kamnitsas et al., "Efficient multi-scale 3D CNN with fully connected CRF for accurate brain lesion segmentation",
Medical Image Analysis 36, 2017. https://arxiv.org/abs/1603.05959. Table B.1 lists the networks; details that the text
leaves out follow the authors' first public release (deepMedicOriginal of github.com/deepmedic/deepmedic).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .deepmedic_inference import DOWN, FoldedDeepMedic
from .layers import CONV, ConvBlock, check_size, init_he, init_normal, scaled

EIGHT = (30, 30, 40, 40, 40, 40, 50, 50)


class DeepMedic(nn.Module):
    """A pathway of valid convolutions at full resolution, optionally a second one on the image sub-sampled by three.

        patch (B, C, 57³) ─┬─ centre 25³ ── 8 × conv 3³ ──────────────── 50 × 9³ ─┐
                           └─ [1::3] 19³ ── 8 × conv 3³ ── 50 × 3³ ── repeat ×3 ──┴─ 150 ─ 150 ─ logits (B, K, 9³)

    `forward` takes one patch with `margin` voxels of context on every side and cuts both pathways' inputs out of it
    (`cut`); it also takes the two inputs already cut, as samplers deliver them, for they are an eighth of the patch.

    Args:
        in_channels: image channels C.
        classes: output classes K, background included.
        widths: feature maps of each convolution of a pathway.
        kernel: side of those convolutions' kernels.
        hidden: feature maps of the 1×1×1 layers after the pathways are joined.
        low_resolution: whether the second pathway exists.
        spatial_dims: 3, or 2 for the axial-slice networks of section 3.5.
        batch_norm: batch normalisation on every hidden layer.
        init: "he" or "normal" (N(0, .01)).
        dropout: rate on the inputs of the second hidden layer and of the classifier.
        conv_dropout: rate on the input of every convolution of the pathways (.02 in the paper's TBI experiments).
        centered: True centres the low-resolution receptive field on the middle voxel of the three it serves; False
            starts it one voxel earlier, as the authors' code does.

    Attributes:
        margin: voxels lost on each side (24 for DeepMedic: 57 in, 9 out).
        multiple: output sizes must be a multiple of this (or exactly 1).
        reach: voxels that a full-resolution prediction sees to each side (8: receptive field 17).
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
        super().__init__()
        if in_channels < 1 or classes < 2:
            raise ValueError(f"in_channels={in_channels}, classes={classes}; expected at least 1 channel and 2 classes")
        self.spatial_dims, self.classes, self.in_channels = spatial_dims, classes, in_channels
        self.low_resolution, self.centered = low_resolution, centered
        self.reach = len(widths) * (kernel // 2)
        self.margin = self.reach * (DOWN if low_resolution else 1)
        self.multiple = DOWN if low_resolution else 1
        options = {"spatial_dims": spatial_dims, "batch_norm": batch_norm}

        def pathway() -> nn.Sequential:
            inputs = (in_channels, *widths[:-1])
            return nn.Sequential(*(ConvBlock(i, o, kernel, dropout=conv_dropout, **options) for i, o in zip(inputs, widths)))

        self.normal = pathway()
        self.low = pathway() if low_resolution else None
        joined = widths[-1] * (2 if low_resolution else 1)
        self.hidden = nn.Sequential(
            *(
                ConvBlock(i, o, 1, dropout=dropout if n else 0.0, **options)
                for n, (i, o) in enumerate(zip((joined, *hidden[:-1]), hidden))
            )
        )
        self.drop = nn.Dropout(dropout if hidden else 0.0)
        self.classifier = CONV[spatial_dims](hidden[-1] if hidden else joined, classes, 1)
        {"he": init_he, "normal": init_normal}[init](self)

    def cut(self, patch: Tensor | np.ndarray) -> tuple:
        """Views of the inputs of each pathway: `(..., *(n_out + 2 margin)) -> (..., *25³)` and `(..., *19³)` for 57³.

        Raises ValueError where the patch is too small or its output size is not a multiple of `multiple`.
        """
        check_size(self, patch)
        axes = patch.shape[-self.spatial_dims :]
        if not self.low_resolution:
            return (patch,)
        trim = self.margin - self.reach
        normal = (Ellipsis, *(slice(trim, n - trim) for n in axes))
        low = (Ellipsis, *(self._low_slice(n - 2 * self.margin) for n in axes))
        return patch[normal], patch[low]

    def for_inference(self) -> nn.Module:
        """The same function as this network in evaluation mode, rearranged for speed on a CPU; no longer trainable."""
        return FoldedDeepMedic(self)

    def _low_slice(self, out: int) -> slice:
        if self.centered and out > 1 and out % DOWN:
            raise ValueError(
                f"{out + 2 * self.margin} voxels in give {out} out; this network predicts multiples of {DOWN} voxels "
                f"(or exactly one): feed {out - out % DOWN + 2 * self.margin} voxels instead"
            )
        start = 1 if self.centered and out > 1 else 0
        samples = -(-out // DOWN) + 2 * self.reach
        return slice(start, start + DOWN * (samples - 1) + 1, DOWN)

    def forward(self, x: Tensor | Sequence[Tensor]) -> Tensor:
        """`(B, C, *(n + 2 margin))`, or the tuple that `cut` makes of it, to logits `(B, K, *n)`."""
        inputs = self.cut(x) if isinstance(x, Tensor) else x
        features = self.normal(inputs[0])
        if self.low_resolution:
            context = F.interpolate(self.low(inputs[1]), scale_factor=DOWN, mode="nearest")
            context = context[(Ellipsis, *(slice(n) for n in features.shape[2:]))]
            features = torch.cat([features, context], dim=1)
        return self.classifier(self.drop(self.hidden(features)))


def _build(name: str, in_channels: int, classes: int, width: float, options: dict, **fixed) -> DeepMedic:
    fixed["widths"] = [scaled(w, width) for w in fixed["widths"]]
    fixed["hidden"] = [scaled(w, width) for w in fixed.get("hidden", (150, 150))]
    model = DeepMedic(in_channels, classes, **(fixed | options))
    # Plain numbers, also where NumPy scalars were given: they are stored with weights and training states.
    sizes = {"in_channels": int(in_channels), "classes": int(classes), "width": float(width)}
    model.config = {"builder": name, **sizes, **options}
    return model


def shallow(*, in_channels: int = 4, classes: int = 5, width: float = 1.0, **options) -> DeepMedic:
    """Shallow: four 5³ convolutions, no batch normalisation, N(0, .01). 615,575 parameters (4 channels, 5 classes)."""
    return _build(
        "shallow",
        in_channels,
        classes,
        width,
        options,
        widths=(30, 40, 40, 50),
        kernel=5,
        hidden=(),
        low_resolution=False,
        batch_norm=False,
        init="normal",
    )


def shallow_plus(*, in_channels: int = 4, classes: int = 5, width: float = 1.0, **options) -> DeepMedic:
    """Shallow+: Shallow with batch normalisation and He initialisation. 615,735 parameters."""
    return _build(
        "shallow_plus", in_channels, classes, width, options, widths=(30, 40, 40, 50), kernel=5, hidden=(), low_resolution=False
    )


def deep(*, in_channels: int = 4, classes: int = 5, width: float = 1.0, **options) -> DeepMedic:
    """Deep: eight 3³ convolutions, no batch normalisation, N(0, .01); the paper could not train it. 311,935 parameters."""
    return _build(
        "deep",
        in_channels,
        classes,
        width,
        options,
        widths=EIGHT,
        hidden=(),
        low_resolution=False,
        batch_norm=False,
        init="normal",
    )


def deep_plus(*, in_channels: int = 4, classes: int = 5, width: float = 1.0, **options) -> DeepMedic:
    """Deep+: Deep with batch normalisation and He initialisation. 312,255 parameters."""
    return _build("deep_plus", in_channels, classes, width, options, widths=EIGHT, hidden=(), low_resolution=False)


def big_deep_plus(*, in_channels: int = 4, classes: int = 5, width: float = 1.0, **options) -> DeepMedic:
    """BigDeep+: Deep+ with doubled feature maps and two hidden layers. 1,278,755 parameters."""
    return _build("big_deep_plus", in_channels, classes, width, options, widths=[2 * w for w in EIGHT], low_resolution=False)


def deepmedic(*, in_channels: int = 4, classes: int = 5, width: float = 1.0, **options) -> DeepMedic:
    """DeepMedic: two pathways of eight 3³ convolutions and two hidden layers. 663,155 parameters."""
    return _build("deepmedic", in_channels, classes, width, options, widths=EIGHT)


def dm2d_patch(*, in_channels: int = 4, classes: int = 5, width: float = 1.0, **options) -> DeepMedic:
    """Dm2dPatch: DeepMedic in 2D, trained patch by patch (one predicted pixel). 248,435 parameters."""
    return _build("dm2d_patch", in_channels, classes, width, options, widths=EIGHT, spatial_dims=2)


def dm2d_seg(*, in_channels: int = 4, classes: int = 5, width: float = 1.0, **options) -> DeepMedic:
    """Dm2dSeg: the same network as Dm2dPatch, trained densely on segments. 248,435 parameters."""
    return _build("dm2d_seg", in_channels, classes, width, options, widths=EIGHT, spatial_dims=2)


def wider2d_seg(*, in_channels: int = 4, classes: int = 5, width: float = 1.0, **options) -> DeepMedic:
    """Wider2dSeg: doubled feature maps. 911,165 parameters."""
    return _build(
        "wider2d_seg", in_channels, classes, width, options, widths=[2 * w for w in EIGHT], hidden=(200, 200), spatial_dims=2
    )


def deeper2d_seg(*, in_channels: int = 4, classes: int = 5, width: float = 1.0, **options) -> DeepMedic:
    """Deeper2dSeg: sixteen convolutions a pathway, 30 to 50 feature maps in even steps. 486,065 parameters."""
    widths = np.linspace(30, 50, 16).round().astype(int).tolist()
    return _build("deeper2d_seg", in_channels, classes, width, options, widths=widths, spatial_dims=2)


def large2d_seg(*, in_channels: int = 4, classes: int = 5, width: float = 1.0, **options) -> DeepMedic:
    """Large2dSeg: twelve convolutions a pathway, 45 to 80 feature maps in even steps. 875,043 parameters."""
    widths = np.linspace(45, 80, 12).round().astype(int).tolist()
    return _build("large2d_seg", in_channels, classes, width, options, widths=widths, hidden=(200, 200), spatial_dims=2)

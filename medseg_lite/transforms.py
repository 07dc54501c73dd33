"""Normalise the intensities of cases, make healthy brains from ill ones, and augment batches on their device."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from skimage import exposure
from torch import Tensor
from torch.nn import functional as F

from .arrays import as_array
from .devices import send
from .volume import Case


def normalise(case: Case, how: str) -> Case:
    """Normalise a case by "standardise", by "median" (`median_normalise`), or not at all by "none"."""
    known = {"standardise": standardise, "median": median_normalise, "none": lambda case: case}
    if how not in known:
        raise ValueError(f"normalise={how!r}; expected one of {', '.join(known)}")
    return known[how](case)


def standardise(case: Case) -> Case:
    """Shift and scale each channel to zero mean and unit variance inside the mask, or in the whole image without a mask.

    The same shift and scale apply outside the mask. So a background of 0 becomes a negative constant, as in the data that DeepMedic
    was trained on.

    Source: Kamnitsas et al. 2017, section 4.2.1.
    Taught in notebook 00.
    """
    inside = _inside(case)
    mean = inside.mean(axis=1, dtype=np.float64)
    std = inside.std(axis=1, dtype=np.float64)
    _check_varies(case, std > 0)
    image = (case.image - mean[:, None, None, None]) / std[:, None, None, None]
    return case.replace(image=image.astype(np.float32))


def rescale(case: Case) -> Case:
    """Shift and scale each channel so that it reaches from 0 to 1 inside the mask, or in the whole image without a mask.

    Source: Drozdzal et al. 2018, section 1 ("range normalization"), one of the pre-processings that their network replaces.
    Taught in notebook 10.
    """
    inside = _inside(case)
    low, high = inside.min(axis=1), inside.max(axis=1)
    _check_varies(case, high > low)
    image = (case.image - low[:, None, None, None]) / (high - low)[:, None, None, None]
    return case.replace(image=image.astype(np.float32))


def equalise(case: Case, *, bins: int = 256) -> Case:
    """Replace each intensity by the share of darker voxels in the mask, or in the whole image without a mask.

    The histogram becomes flat, from 0 to 1. Any rising function of the intensities, such as another gain and offset, leads to the
    same result.

    Args:
        case: case to equalise.
        bins: number of histogram bins. Values between bin edges are interpolated.

    Source: Drozdzal et al. 2018, section 1 ("histogram equalization").
    Taught in notebook 10.
    """
    inside = _inside(case)
    _check_varies(case, inside.max(axis=1) > inside.min(axis=1))
    mask = None if case.mask is None else case.mask.ravel()
    image = [exposure.equalize_hist(channel.ravel(), nbins=bins, mask=mask) for channel in case.image]
    return case.replace(image=np.stack(image).reshape(case.image.shape).astype(np.float32))


def median_normalise(case: Case, *, constant: float = 1.0) -> Case:
    """Divide each channel by its median inside the mask, and multiply it by `constant`.

    Without a mask, the median is that of the voxels above 0. 0 stays 0, and ratios stay as they are. Use it for raw intensities:
    standardised ones have medians near 0.

    Args:
        case: case with raw intensities.
        constant: the new median. The paper has such a constant but does not give its value. The author's later data have 100. A
            small one keeps networks without batch normalisation near the scale of the scores of 2D networks.

    Source: Mlynarski et al. 2019, section 2.1.
    """
    result = np.empty_like(case.image, np.float32)
    for name, channel, out in zip(case.channels, case.image, result):
        inside = channel[case.mask] if case.mask is not None else channel[channel > 0]
        median = float(np.median(inside)) if inside.size else 0.0
        if not median > 0:
            raise ValueError(
                f"{case.name}: the median of {name} is {median:g}; expected raw intensities, whose median is above 0 "
                "(standardised images need no other normalisation)"
            )
        np.multiply(channel, constant / median, out=out)
    return case.replace(image=result)


def complete(case: Case, channels: Sequence[str], *, value: float = 0.0) -> Case:
    """Return the case with these channels in this order. A channel that it lacks is `value` everywhere.

    Use it for a network that expects every sequence. Normalise first: then 0 is the mean of a standardised channel, the least
    surprising value for a sequence that was not acquired.

    Args:
        case: normalised case.
        channels: names of the channels that the network expects.
        value: value of the missing channels.

    Raises:
        ValueError: the case has a channel that is not asked for (drop it with `case.select`), or none of them.
    """
    channels = tuple(channels)
    unknown = [c for c in case.channels if c not in channels]
    if unknown or not case.channels:
        raise ValueError(
            f"{case.name} has {', '.join(unknown) or 'no channel'}; expected some of {', '.join(channels)}: use case.select([...])"
        )
    if case.channels == channels:
        return case
    image = np.full((len(channels), *case.shape), value, np.float32)
    image[[channels.index(c) for c in case.channels]] = case.image
    return case.replace(image=image, channels=channels)


def mirror_healthy(case: Case, *, midline: np.ndarray | None = None) -> Case:
    """Make a healthy brain from an ill one: replace the hemisphere with the lesion by the mirror image of the other.

    Every line of voxels from left to right is mirrored about the point where it meets the midline, so image, mask and extra maps
    stay on their grid. Voxels that would come from outside the grid are 0. The label is 0 everywhere.

    Args:
        case: labelled case in RAS+, so its first axis runs from left to right.
        midline: `(D, H, W)`, negative left of the midline and positive right of it. None takes `case.extra["midline"]`, which
            generated brains have, or else the sagittal plane between two voxels about which the mask is most symmetric.

    Raises:
        ValueError: there is no lesion, it reaches into both hemispheres, or the midline is not known.

    Source: Kayalibay et al. 2017, section 4.2 (Table 6, Figure 14).
    Taught in notebook 09.
    """
    if case.label is None or not case.label.any():
        raise ValueError(f"{case.name} has no lesion in its label, so neither hemisphere is the healthy one")
    if midline is None:
        midline = case.extra.get("midline")
    if midline is None and case.mask is None:
        raise ValueError(f"{case.name} has no mask to find the midline by; give midline=, negative on the left")
    if midline is None:
        midline = np.broadcast_to(_offset_from_symmetry_plane(case.mask)[:, None, None], case.shape)
    midline = as_array(midline, "midline")
    if midline.shape != case.shape:
        raise ValueError(f"midline has shape {midline.shape}; expected that of {case.name}, {case.shape}")
    on_left, on_right = (int(np.count_nonzero(case.label[half])) for half in (midline < 0, midline >= 0))
    if on_left and on_right:
        raise ValueError(
            f"{case.name} has {on_left} lesion voxels left of the midline and {on_right} right of it; "
            "only a lesion within one hemisphere leaves a healthy one to mirror"
        )

    def mirrored(array):
        return mirror_hemisphere(array, midline, -1 if on_left else 1)

    return case.replace(
        name=f"{case.name}-mirrored",
        image=np.stack([mirrored(channel) for channel in case.image]),
        label=np.zeros_like(case.label),
        mask=None if case.mask is None else mirrored(case.mask),
        extra={k: v if k == "midline" else mirrored(v) for k, v in case.extra.items()},
        info=case.info | {"mirrored": True},
    )


def mirror_hemisphere(array: np.ndarray, midline: np.ndarray, side: float) -> np.ndarray:
    """Replace one hemisphere of `(D, H, W)` by the mirror image of the other.

    The falx is not quite plane, and a tumour bends it. So every line of voxels from left to right is mirrored about the point where
    it meets the midline. Voxels that would come from outside the grid are 0.

    Args:
        array: image channel, mask or map.
        midline: `(D, H, W)`, negative left of the midline.
        side: negative replaces the left hemisphere, otherwise the right one is replaced.
    """
    array, midline = as_array(array), as_array(midline, "midline")
    left = np.count_nonzero(midline < 0, axis=0)  # (H, W): the midline lies between voxels left - 1 and left
    twin = 2 * left - 1 - np.arange(array.shape[0])[:, None, None]
    known = (twin >= 0) & (twin < array.shape[0])
    image = np.take_along_axis(array, np.where(known, twin, 0), axis=0) * known
    return np.where((midline < 0) == (side < 0), image, array).astype(array.dtype)


def _offset_from_symmetry_plane(mask: np.ndarray) -> np.ndarray:
    """Return the distance of each voxel along D, in voxels, from the sagittal plane about which the mask is most symmetric."""
    count = mask.shape[0]
    best, plane = -1, count // 2
    for left in range(count // 4, count - count // 4 + 1):  # so many voxels lie left of the plane
        reach = min(left, count - left)
        fit = np.count_nonzero(mask[left - reach : left] & mask[left : left + reach][::-1])
        if fit > best:
            best, plane = fit, left
    return np.arange(count) - (plane - 0.5)


def drop_channels(image: Tensor, label: Tensor, *, rng: np.random.Generator, probability: float) -> tuple[Tensor, Tensor]:
    """Replace one channel of some images of a batch by 0. Each channel is equally likely.

    This imitates what `complete` does to a case without one sequence, so the network sees such input in training.

    Args:
        image: images `(B, C, *space)`.
        label: label, returned as it is.
        rng: random generator that picks the images and the channels.
        probability: probability that an image loses a channel.

    Returns:
        A new tensor of images, and the label.
    """
    if not 0 <= probability <= 1 or image.shape[1] < 2:
        raise ValueError(
            f"probability={probability} with {image.shape[1]} channels; expected 0 to 1, and a channel that remains"
        )
    dropped = rng.random(len(image)) < probability
    which = rng.integers(image.shape[1], size=len(image))
    gone = dropped[:, None] & (which[:, None] == np.arange(image.shape[1]))  # (B, C)
    image = image.masked_fill(_send(gone, image.device).reshape(*gone.shape, *(1,) * (image.ndim - 2)), 0)
    return image, label


def augment(image: Tensor, label: Tensor, *, rng: np.random.Generator, angle: float = 180.0) -> tuple[Tensor, Tensor]:
    """Leave each volume of a batch as it is, flip it along a random axis, or rotate it in the plane of two random axes.

    All three are equally likely. Rotations are about the middle of the volume, as if voxels were cubes. The image is interpolated
    linearly, the label takes the nearest voxel. Voxels from outside the volume get the lowest value of the channel, and label 0.

    Args:
        image: images `(B, C, *space)`, 2D or 3D.
        label: label `(B, *space)`, whole numbers, on the same device.
        rng: random generator. The same state gives the same batch on every device.
        angle: largest rotation in degrees, either way. The paper does not limit it.

    Returns:
        New tensors of the same shape, type and device.

    Source: Kayalibay et al. 2017, section 3.2.1.
    Taught in notebook 08.
    """
    dims = image.ndim - 2
    if dims not in (2, 3) or label.shape != (image.shape[0], *image.shape[2:]):
        raise ValueError(
            f"image {tuple(image.shape)} and label {tuple(label.shape)}; expected (B, C, *space) and (B, *space) in 2D or 3D"
        )
    if not 0 <= angle <= 180:
        raise ValueError(f"angle={angle}; expected 0 to 180 degrees")
    kinds = rng.integers(3, size=len(image))  # 0 nothing, 1 flip, 2 rotation
    flips = rng.integers(dims, size=len(image))
    planes = np.stack([rng.permutation(dims)[:2] for _ in kinds])
    angles = np.deg2rad(rng.uniform(-angle, angle, len(image)))
    moved, moved_label = torch.empty_like(image), torch.empty_like(label)
    for n, kind in enumerate(kinds):
        one, truth = image[n], label[n]
        if kind == 1:
            one, truth = one.flip(int(flips[n]) + 1), truth.flip(int(flips[n]))
        elif kind == 2:
            one, truth = _rotate(one, truth, planes[n], float(angles[n]))
        moved[n], moved_label[n] = one, truth
    return moved, moved_label


def distort(
    image: Tensor,
    label: Tensor,
    *,
    rng: np.random.Generator,
    flip: bool = True,
    shear: float = 0.41,
    angle: float = 25.0,
    warp: float = 0.1,
) -> tuple[Tensor, Tensor]:
    """Flip, shear, rotate and bend every image of a 2D batch, each by its own random amounts.

    Images are interpolated linearly, labels take the nearest pixel. Beyond the border the image is mirrored. The bending is a smooth
    field of displacements: random ones on a coarse grid of 3 × 3 points, with cubic interpolation between them.

    Args:
        image: images `(B, C, H, W)`.
        label: label `(B, H, W)`, whole numbers, on the same device.
        rng: random generator. The same state gives the same batch on every device.
        flip: True flips the image along each axis with probability one half.
        shear: largest angle of the shear in radians, either way. The angle is uniform.
        angle: largest rotation in degrees, either way. The rotation is uniform.
        warp: standard deviation of the displacements on the coarse grid. 1 is half the side of the image.

    Returns:
        New tensors of the same shape, type and device.

    Source: Drozdzal et al. 2018, section 4 (.41 and 25 degrees for electron microscopy, .1 radians and 10 degrees for the prostate);
    the grid and `warp` are those of the authors' published code, whose unit we took to be half the side.
    Taught in notebook 01.
    """
    if image.ndim != 4 or label.shape != (image.shape[0], *image.shape[2:]):
        raise ValueError(f"image {tuple(image.shape)} and label {tuple(label.shape)}; expected (B, C, H, W) and (B, H, W)")
    count, (height, width) = len(image), image.shape[2:]
    flips = rng.choice([-1.0, 1.0], (count, 2)) if flip else np.ones((count, 2))
    shears, turns = rng.uniform(-shear, shear, count), np.deg2rad(rng.uniform(-angle, angle, count))
    bends = _send(rng.normal(0, warp, (count, 2, 3, 3)), image.device)
    half = np.array([max(width - 1, 1), max(height - 1, 1)]) / 2  # the sampler counts x first, from -1 to 1
    theta = np.zeros((count, 2, 3))
    for matrix, (fy, fx), s, t in zip(theta, flips, shears, turns):
        rotation = np.array([[math.cos(t), -math.sin(t)], [math.sin(t), math.cos(t)]])
        linear = rotation @ np.array([[1, -math.sin(s)], [0, math.cos(s)]]) @ np.diag([fx, fy])
        matrix[:, :2] = linear * half / half[:, None]
    grid = F.affine_grid(_send(theta, image.device), [count, 1, height, width], align_corners=True)
    if warp:
        grid = grid + F.interpolate(bends, (height, width), mode="bicubic", align_corners=True).movedim(1, -1)
    options = {"padding_mode": "reflection", "align_corners": True}
    bent = F.grid_sample(image.float(), grid, mode="bilinear", **options).to(image.dtype)
    nearest = F.grid_sample(label[:, None].float(), grid, mode="nearest", **options)
    return bent, nearest[:, 0].to(label.dtype)


def _rotate(image: Tensor, label: Tensor, plane: np.ndarray, angle: float) -> tuple[Tensor, Tensor]:
    """Rotate a volume `(C, *space)` and its label `(*space)` by an angle (radians) in the plane of two axes.

    Nothing moves along the third axis. So all planes are rotated alike in 2D, which is several times faster than a rotation in 3D.
    """
    a, b = (int(axis) for axis in plane)
    height, width = label.shape[a], label.shape[b]
    planes, label_planes = image.movedim((a + 1, b + 1), (-2, -1)), label.movedim((a, b), (-2, -1))
    # The sampler counts from -1 to 1 along each axis, whatever its length, and names the last axis first.
    cos, sin, ratio = math.cos(angle), math.sin(angle), max(height - 1, 1) / max(width - 1, 1)
    theta = _send(np.array([[[cos, -sin * ratio, 0], [sin / ratio, cos, 0]]]), image.device)
    grid = F.affine_grid(theta, [1, 1, height, width], align_corners=True)
    grids = grid.expand(len(image), -1, -1, -1)
    turned = F.grid_sample(planes.reshape(len(image), -1, height, width).float(), grids, mode="bilinear", align_corners=True)
    # The sampler takes 0 for what lies outside. The lowest value belongs there.
    inside = F.grid_sample(torch.ones_like(grid[:, None, :, :, 0]), grid, mode="bilinear", align_corners=True)
    turned += (1 - inside) * image.flatten(1).amin(1).float()[:, None, None, None]
    nearest = F.grid_sample(label_planes.reshape(1, -1, height, width).float(), grid, mode="nearest", align_corners=True)
    turned = turned.reshape(planes.shape).movedim((-2, -1), (a + 1, b + 1))
    return turned.to(image.dtype), nearest.reshape(label_planes.shape).movedim((-2, -1), (a, b)).to(label.dtype)


def _send(numbers: np.ndarray, device: torch.device) -> Tensor:
    """Return drawn numbers on a device, real ones as float32."""
    tensor = torch.from_numpy(numbers)
    return send(tensor.float() if tensor.is_floating_point() else tensor, device)


def _inside(case: Case) -> np.ndarray:
    """Return the intensities inside the mask, or all of them without a mask, `(C, n)`."""
    inside = case.image[:, case.mask] if case.mask is not None else case.image.reshape(len(case.channels), -1)
    if not inside.size:
        raise ValueError(f"{case.name}: the mask is empty, so there is nothing to measure; correct it or leave it out")
    return inside


def _check_varies(case: Case, varies: np.ndarray) -> None:
    if not varies.all():
        flat = [c for c, v in zip(case.channels, varies) if not v]
        raise ValueError(f"{case.name}: {', '.join(flat)} is constant inside the mask, so it has no variance to divide by")

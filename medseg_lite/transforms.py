"""Intensity normalisation, healthy brains made of ill ones, and augmentation of batches on the device they lie on."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from skimage import exposure
from torch import Tensor
from torch.nn import functional as F

from .volume import Case


def standardise(case: Case) -> Case:
    """Zero mean and unit variance of each channel inside the mask (the whole image without one).

    The same shift and scale apply to the whole image, so a background of zero becomes a negative constant, as in the
    data that DeepMedic was trained on.

    Source: Kamnitsas et al. 2017, section 4.2.1.
    """
    inside = _inside(case)
    mean = inside.mean(axis=1, dtype=np.float64)
    std = inside.std(axis=1, dtype=np.float64)
    _check_varies(case, std > 0)
    image = (case.image - mean[:, None, None, None]) / std[:, None, None, None]
    return case.replace(image=image.astype(np.float32))


def rescale(case: Case) -> Case:
    """Shift and scale each channel so that it reaches from 0 to 1 inside the mask (in the whole image without one).

    Source: Drozdzal et al. 2018, section 1 ("range normalization"), one of the pre-processings that theirs replaces.
    """
    inside = _inside(case)
    low, high = inside.min(axis=1), inside.max(axis=1)
    _check_varies(case, high > low)
    image = (case.image - low[:, None, None, None]) / (high - low)[:, None, None, None]
    return case.replace(image=image.astype(np.float32))


def equalise(case: Case, *, bins: int = 256) -> Case:
    """Replace each intensity by the share of the mask (of the whole image without one) that is darker: a flat histogram, 0 to 1.

    Any rising function of the intensities, such as another gain and offset, gives the same result.

    Args:
        bins: of the histogram, between which the share is interpolated.

    Source: Drozdzal et al. 2018, section 1 ("histogram equalization").
    """
    inside = _inside(case)
    _check_varies(case, inside.max(axis=1) > inside.min(axis=1))
    mask = None if case.mask is None else case.mask.ravel()
    image = [exposure.equalize_hist(channel.ravel(), nbins=bins, mask=mask) for channel in case.image]
    return case.replace(image=np.stack(image).reshape(case.image.shape).astype(np.float32))


def median_normalise(case: Case, *, constant: float = 1.0) -> Case:
    """Divide each channel by its median inside the mask (where the image is above 0 without one), times `constant`.

    Keeps 0 at 0 and ratios as they are. It is for raw intensities; standardised ones have medians near 0.

    Args:
        constant: the new median. The paper has one but does not say which; the author's later data have 100. A small one keeps
            networks without batch normalisation near the scale of the scores of 2D networks.

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
    """The case with these channels in this order; a channel that it lacks is `value` everywhere.

    For a network that expects every sequence. Normalise first: 0 is then the mean of `standardise`d channels, the least
    surprising thing to say about a sequence that was not acquired.

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
    """A healthy brain made of an ill one: the hemisphere without a lesion, and its mirror image in place of the other.

    Every line of voxels from left to right is mirrored about the place where it meets the midline, so image, mask and
    extra maps stay on their grid. What would come from outside it is 0. The label is 0 everywhere.

    Args:
        case: labelled, its first axis from left to right (RAS+, as all cases here are).
        midline: `(D, H, W)`, negative left of the midline and positive right of it. By default `case.extra["midline"]`,
            which generated brains have, or else the sagittal plane between two voxels about which the mask is most symmetric.

    Raises:
        ValueError: the lesion reaches into both hemispheres, there is none, or nothing says where the midline is.

    Source: Kayalibay et al. 2017, section 4.2 (Table 6, Figure 14).
    """
    if case.label is None or not case.label.any():
        raise ValueError(f"{case.name} has no lesion in its label, so neither hemisphere is the healthy one")
    if midline is None:
        midline = case.extra.get("midline")
    if midline is None and case.mask is None:
        raise ValueError(f"{case.name} has no mask to find the midline by; give midline=, negative on the left")
    if midline is None:
        midline = np.broadcast_to(_offset_from_symmetry_plane(case.mask)[:, None, None], case.shape)
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

    The falx is not quite plane, and a tumour bends it: every line of voxels from left to right is mirrored about the place
    where it meets the midline. What would come from outside the grid is 0.

    Args:
        midline: `(D, H, W)`, negative left of it.
        side: of the hemisphere that is replaced, negative for the left one.
    """
    left = np.count_nonzero(midline < 0, axis=0)  # (H, W): the midline lies between voxels left - 1 and left
    twin = 2 * left - 1 - np.arange(array.shape[0])[:, None, None]
    known = (twin >= 0) & (twin < array.shape[0])
    image = np.take_along_axis(array, np.where(known, twin, 0), axis=0) * known
    return np.where((midline < 0) == (side < 0), image, array).astype(array.dtype)


def _offset_from_symmetry_plane(mask: np.ndarray) -> np.ndarray:
    """Voxels, left to right, from the sagittal plane between two voxels about which the mask is most symmetric."""
    count = mask.shape[0]
    best, plane = -1, count // 2
    for left in range(count // 4, count - count // 4 + 1):  # so many voxels lie left of the plane
        reach = min(left, count - left)
        fit = np.count_nonzero(mask[left - reach : left] & mask[left : left + reach][::-1])
        if fit > best:
            best, plane = fit, left
    return np.arange(count) - (plane - 0.5)


def drop_channels(image: Tensor, label: Tensor, *, rng: np.random.Generator, probability: float) -> tuple[Tensor, Tensor]:
    """With this probability, an image of the batch has one of its channels, each equally likely, replaced by 0.

    What `complete` makes of a case that lacks a sequence; a network trained so has met it.

    Args:
        image: `(B, C, *space)`.
        label: passed through.
        rng: decides.

    Returns:
        A new tensor of images, and the label.
    """
    if not 0 <= probability <= 1 or image.shape[1] < 2:
        raise ValueError(
            f"probability={probability} with {image.shape[1]} channels; expected 0 to 1, and a channel that remains"
        )
    dropped = rng.random(len(image)) < probability
    which = rng.integers(image.shape[1], size=len(image))
    image = image.clone()
    image[np.flatnonzero(dropped), which[dropped]] = 0
    return image, label


def augment(image: Tensor, label: Tensor, *, rng: np.random.Generator, angle: float = 180.0) -> tuple[Tensor, Tensor]:
    """Leave each volume of a batch as it is, flip it along a random axis, or rotate it in the plane of two random axes.

    All three are equally likely. Rotations are about the volume's middle, by linear interpolation of the image; what comes in
    from outside has each channel's lowest value, and label 0. Labels are those of the nearest voxel. Voxels are taken to
    be cubes.

    Args:
        image: `(B, C, *space)`, 2D or 3D.
        label: `(B, *space)`, whole numbers, on the same device.
        rng: decides, so that the same state gives the same batch on every device.
        angle: rotations are by at most this many degrees either way; the paper does not limit them.

    Returns:
        New tensors of the same shape, type and device.

    Source: Kayalibay et al. 2017, section 3.2.1.
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
    image, label = image.clone(), label.clone()
    for axis in range(dims):
        chosen = np.flatnonzero((kinds == 1) & (flips == axis))
        if len(chosen):
            image[chosen], label[chosen] = image[chosen].flip(axis + 2), label[chosen].flip(axis + 1)
    turned = np.flatnonzero(kinds == 2)
    if len(turned):
        image[turned], label[turned] = _rotate(image[turned], label[turned], planes[turned], angles[turned])
    return image, label


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

    Images are interpolated linearly, labels are those of the nearest pixel; beyond the border the image is mirrored. The
    bending is a smooth field of displacements, cubic through random ones on a coarse grid of 3 × 3 points.

    Args:
        image: `(B, C, H, W)`.
        label: `(B, H, W)`, whole numbers, on the same device.
        rng: decides, so that the same state gives the same batch on every device.
        flip: along each axis with probability one half.
        shear: the angle of the shear is uniform up to this many radians either way.
        angle: the rotation is uniform up to this many degrees either way.
        warp: standard deviation of the coarse grid's displacements, 1 being half the image's side.

    Returns:
        New tensors of the same shape, type and device.

    Source: Drozdzal et al. 2018, section 4 (.41 and 25 degrees for electron microscopy, .1 radians and 10 degrees for the prostate);
    the grid and `warp` are those of the authors' published code, whose unit we took to be half the side.
    """
    if image.ndim != 4 or label.shape != (image.shape[0], *image.shape[2:]):
        raise ValueError(f"image {tuple(image.shape)} and label {tuple(label.shape)}; expected (B, C, H, W) and (B, H, W)")
    count, (height, width) = len(image), image.shape[2:]
    flips = rng.choice([-1.0, 1.0], (count, 2)) if flip else np.ones((count, 2))
    shears, turns = rng.uniform(-shear, shear, count), np.deg2rad(rng.uniform(-angle, angle, count))
    bends = torch.from_numpy(rng.normal(0, warp, (count, 2, 3, 3))).to(image.device, torch.float32)
    half = np.array([max(width - 1, 1), max(height - 1, 1)]) / 2  # the sampler counts x first, from -1 to 1
    theta = np.zeros((count, 2, 3))
    for matrix, (fy, fx), s, t in zip(theta, flips, shears, turns):
        rotation = np.array([[math.cos(t), -math.sin(t)], [math.sin(t), math.cos(t)]])
        linear = rotation @ np.array([[1, -math.sin(s)], [0, math.cos(s)]]) @ np.diag([fx, fy])
        matrix[:, :2] = linear * half / half[:, None]
    grid = F.affine_grid(torch.from_numpy(theta).to(image.device, torch.float32), [count, 1, height, width], align_corners=True)
    if warp:
        grid = grid + F.interpolate(bends, (height, width), mode="bicubic", align_corners=True).movedim(1, -1)
    options = {"padding_mode": "reflection", "align_corners": True}
    bent = F.grid_sample(image.float(), grid, mode="bilinear", **options).to(image.dtype)
    nearest = F.grid_sample(label[:, None].float(), grid, mode="nearest", **options)
    return bent, nearest[:, 0].to(label.dtype)


def _rotate(image: Tensor, label: Tensor, planes: np.ndarray, angles: np.ndarray) -> tuple[Tensor, Tensor]:
    """Every volume of a batch by its own angle (radians) in the plane of its own two axes."""
    space = image.shape[2:]
    matrices = np.zeros((len(angles), len(space), len(space) + 1))
    for matrix, (a, b), angle in zip(matrices, planes, angles):
        rotation = np.eye(len(space))
        rotation[[a, b, a, b], [a, b, b, a]] = (*[math.cos(angle)] * 2, math.sin(angle), -math.sin(angle))
        # The sampler counts from -1 to 1 along each axis, whatever its length, and names the last axis first.
        half = np.array([max(n - 1, 1) / 2 for n in space])
        matrix[:, :-1] = (rotation * half / half[:, None])[::-1, ::-1]
    theta = torch.from_numpy(matrices).to(image.device, torch.float32)
    grid = F.affine_grid(theta, [len(angles), 1, *space], align_corners=True)
    low = image.amin(dim=tuple(range(2, image.ndim)), keepdim=True)
    turned = F.grid_sample((image - low).float(), grid, mode="bilinear", align_corners=True).to(image.dtype) + low
    nearest = F.grid_sample(label[:, None].float(), grid, mode="nearest", align_corners=True)
    return turned, nearest[:, 0].to(label.dtype)


def _inside(case: Case) -> np.ndarray:
    """Intensities inside the mask, or all of them, `(C, n)`."""
    inside = case.image[:, case.mask] if case.mask is not None else case.image.reshape(len(case.channels), -1)
    if not inside.size:
        raise ValueError(f"{case.name}: the mask is empty, so there is nothing to measure; correct it or leave it out")
    return inside


def _check_varies(case: Case, varies: np.ndarray) -> None:
    if not varies.all():
        flat = [c for c, v in zip(case.channels, varies) if not v]
        raise ValueError(f"{case.name}: {', '.join(flat)} is constant inside the mask, so it has no variance to divide by")

"""Draw training batches from cases: segments for networks that lose a margin, whole volumes and crops for the others."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from .devices import find_device, is_out_of_memory, send
from .engine.identity import describe
from .engine.stored import StoredCase, to_float32
from .paths import say
from .volume import Case, array_code, bounding_box, group_voxels, padded_region, size_text

SCHEMES = ("foreground", "uniform", "equal")
Augment = Callable[..., tuple[Tensor, Tensor]]


class Batch(NamedTuple):
    """A batch: the input of the network, `(B, C, *n)` or a tuple of such tensors, and the label `(B, *n_out)`."""

    inputs: Tensor | tuple[Tensor, ...]
    label: Tensor


class _InMemory:
    """A case in memory: the part of it that segments can reach, mirrored once beyond the border of the volume.

    Args:
        case: labelled case.
        groups: groups of voxels that centres are drawn from.
        output: number of predicted voxels of a segment along each axis.
        margin: voxels of context of its image on each side.
        around: voxels of context of its label on each side.
    """

    def __init__(self, case: Case, groups: Sequence[str], output: Sequence[int], margin: Sequence[int], around: Sequence[int]):
        mask = case.whole_mask()
        box = bounding_box(mask | (case.label > 0))
        half = [n // 2 for n in output]
        start = [max(0, min(s.start - h, n - b)) for s, h, n, b in zip(box, half, case.shape, output)]
        stop = [min(n, max(s.stop + h, a + b)) for s, h, n, a, b in zip(box, half, case.shape, start, output)]
        region = tuple(map(slice, start, stop))
        self.shape, self.margin, self.around, self.std = [b - a for a, b in zip(start, stop)], margin, around, case.std
        self.name = case.name
        # (C, *(region + 2 margin)) and (*(region + 2 around))
        self.image = np.ascontiguousarray(padded_region(case.image, *_widened(start, stop, margin)), np.float32)
        self.label = np.ascontiguousarray(padded_region(case.label, *_widened(start, stop, around)))
        # Flat voxel numbers within the region.
        inside = {g: group_voxels(g, case.label[region], mask[region]) for g in groups}
        self.voxels = {g: np.flatnonzero(voxels).astype(np.int32) for g, voxels in inside.items()}

    def code(self) -> str:
        """Return a short code of the content."""
        return array_code(self.image, self.label)

    def count(self, group: str) -> int:
        """Return the number of voxels from which a centre is drawn."""
        return len(self.voxels[group])

    def cut(self, group: str, number: int, output: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        """Return patch and label of the segment centred on a voxel of the group, or as near to it as the border allows."""
        centre = np.unravel_index(self.voxels[group][number], self.shape)
        start, stop = _place(centre, output, self.shape)
        patch, target = (
            tuple(slice(a, b + 2 * m) for a, b, m in zip(start, stop, margin)) for margin in (self.margin, self.around)
        )
        return self.image[(slice(None), *patch)], self.label[target]


class _OnDisk:
    """A stored case with the methods of `_InMemory`. Nothing of it is kept in memory."""

    def __init__(self, case: StoredCase, margin: Sequence[int], around: Sequence[int]):
        self.case, self.margin, self.around, self.std, self.count = case, margin, around, case.std, case.count
        self.name, self.code = case.name, case.code

    def cut(self, group: str, number: int, output: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        """See `_InMemory.cut`. The patch may be float16, and a view of the file."""
        file = self.case.open()
        place = _place(file.voxel(group, number), output, self.case.shape)
        return file.block(*_widened(*place, self.margin)), file.label_block(*_widened(*place, self.around))


def _place(centre: Sequence[int], output: Sequence[int], shape: Sequence[int]) -> tuple[list[int], list[int]]:
    """Return the corners of the output centred on a voxel, moved so that it lies inside the volume."""
    start = [min(max(int(c) - b // 2, 0), n - b) for c, b, n in zip(centre, output, shape)]
    return start, [a + b for a, b in zip(start, output)]


def _widened(start: Sequence[int], stop: Sequence[int], margin: Sequence[int]) -> tuple[list[int], list[int]]:
    """Return the corners of a box with a margin around it."""
    return [a - m for a, m in zip(start, margin)], [b + m for b, m in zip(stop, margin)]


class Sampler:
    """The base class of our samplers. It makes batches on a device, and can say what they are made of.

    The cohort stays in main memory, or on disk. What was drawn for a batch is moved to the device and augmented there. All random
    numbers are drawn on the CPU, from the seed and the step. So every device gets the same batches, up to the rounding of
    interpolated intensities, and a run may go on on another device.

    Attributes:
        settings: names of the attributes that decide what a batch holds.
        device: device on which batches lie.
        highest_label: the highest class in the labels of all cases.
        labelled_highest: name of a case that has it.
    """

    settings: tuple[str, ...] = ()
    device: torch.device = torch.device("cpu")
    highest_label: int = 0
    labelled_highest: str = ""

    def batch(self, step: int) -> Batch:
        """Return batch number `step`, on the device. Where that runs out of memory, batches are made on the CPU from then on."""
        try:
            return self._make(int(step), self.device)
        except RuntimeError as error:
            if self.device.type == "cpu" or not is_out_of_memory(error):
                raise
            found = str(error).split("\n")[0]
        # Out here the failed attempt's memory is no longer held.
        say(
            f"out of memory on {self.device} where batches are made ({found}); the CPU makes them from now on, in some more time"
        )
        self.device = torch.device("cpu")
        return self._make(int(step), self.device)

    def _make(self, step: int, device: torch.device) -> Batch:
        """Return batch number `step` on a device."""
        raise NotImplementedError

    def describe(self) -> dict:
        """Return a plain description of the sampler: its settings, and a code of the content of every case."""
        cases = {f"{n} {name}": code for n, (name, code) in enumerate(self.case_codes())}
        return {"name": type(self).__name__, **{name: describe(vars(self)[name]) for name in self.settings}, "cases": cases}

    def case_codes(self) -> Iterator[tuple[str, str]]:
        """Yield the name of every case and a code of its content."""
        raise NotImplementedError


def _settle_device(device: str | torch.device) -> torch.device:
    """Return a device that computes, with its number: batches are made in threads, in which another GPU may be the current one."""
    return torch.empty(0, device=find_device(device)).device


def _moved(tensor: Tensor, device: torch.device) -> Tensor:
    """Return a tensor on a device. A CUDA GPU fetches it from pinned memory."""
    return send(tensor.pin_memory() if device.type == "cuda" else tensor, device)


def describe_sampler(sampler) -> object:
    """Return a plain description of a sampler. One that is not ours is known by the name of its class."""
    return sampler.describe() if isinstance(sampler, Sampler) else type(sampler).__name__


class SegmentSampler(Sampler):
    """A sampler of image segments, with the labels of the voxels that the network predicts for them.

    `batch(step)` depends on the seed and the step alone. Any worker can make it, in any order, and a resumed run sees the segments
    that the interrupted one would have seen.

    A scheme chooses the centre of a segment among the voxels of the mask:
        "foreground": half of each batch is centred on labelled voxels, half on background. This is the paper's proposal.
        "uniform": every voxel is equally likely (P_uni with `output=1`).
        "equal": every class is equally likely (P_eq with `output=1`).
    The case is drawn with equal probability among those that have such a voxel. Near the border of the volume a segment moves
    inwards until all its predicted voxels exist.

    Args:
        cases: labelled cases, normalised for the network, all with the same channels. Segments of stored cases (`datasets.store`)
            are read from disk when they are drawn. Segments of other cases are cut from memory. Both are the same segments.
        output: number of predicted voxels along each side (9 for the paper's 25³ segments).
        margin: voxels of context on each side, `model.margin`.
        cut: `model.cut` of a network that takes several inputs. It is applied to each patch before anything is copied.
        batch_size: number of segments in a batch.
        scheme: one of the above.
        flip: True mirrors each segment left to right with probability one half.
        shift: standard deviation of the random intensity shift r_c · σ_c of each channel (.1 for TBI, section 4.1.2).
            σ_c is the channel's standard deviation inside the mask.
        spatial_dims: 3, or 2 for axial slices.
        augment: function `augment(image, label, rng=...)` that changes every batch, such as `transforms.distort`. Both have the size of
            the patches, so that they may be moved together; afterwards the label is cut to the predicted voxels, and the image to
            the network's inputs. Both lie on `device`; `rng` is NumPy's generator.
        seed: seed of all random choices.
        device: device on which batches are augmented and handed over: "cpu", "cuda", …, or "auto" (see `devices.find_device`). The
            cases stay where they are.

    Source: Kamnitsas et al. 2017, sections 2.2, 3.2 and 4.1.2.
    Taught in notebooks 01 and 04.
    """

    settings = ("channels", "output", "margin", "batch_size", "scheme", "flip", "shift", "spatial_dims", "augment", "seed")

    def __init__(
        self,
        cases: Sequence[Case],
        *,
        output: int = 9,
        margin: int = 0,
        cut: Callable | None = None,
        batch_size: int = 10,
        scheme: str = "foreground",
        flip: bool = True,
        shift: float = 0.0,
        spatial_dims: int = 3,
        augment: Augment | None = None,
        seed: int = 0,
        device: str | torch.device = "cpu",
    ):
        if scheme not in SCHEMES:
            raise ValueError(f"scheme={scheme!r}; expected one of {', '.join(SCHEMES)}")
        if output < 1 or batch_size < 1:
            raise ValueError(f"output={output}, batch_size={batch_size}; both must be at least 1")
        output, margin, batch_size, seed = int(output), int(margin), int(batch_size), int(seed)
        self.highest_label, self.labelled_highest = _check_cases(cases)
        self.output = (output,) * spatial_dims + (1,) * (3 - spatial_dims)
        self.margin = (margin,) * spatial_dims + (0,) * (3 - spatial_dims)
        self.cut = cut or (lambda patch: (patch,))
        self.batch_size, self.scheme, self.flip, self.shift = batch_size, scheme, flip, shift
        self.spatial_dims, self.augment, self.seed = spatial_dims, augment, seed
        self._groups = {
            "foreground": ["labelled", "background"],
            "uniform": ["mask"],
            "equal": ["background", *(f"class {c}" for c in range(1, 1 + self.highest_label))],
        }[scheme]
        self.channels, self.device = cases[0].channels, _settle_device(device)
        self._cases = [self._prepare(case) for case in cases]
        # For every group of voxels, the cases that have any.
        self._holders = {g: np.array([n for n, case in enumerate(self._cases) if case.count(g)]) for g in self._groups}
        empty = [group for group, holders in self._holders.items() if not len(holders)]
        if scheme == "equal":  # a class that no case has cannot be drawn
            self._groups = [group for group in self._groups if group not in empty]
        elif empty:
            raise ValueError(
                f"none of the {len(cases)} cases has a {empty[0]} voxel inside its mask; scheme={scheme!r} needs some"
            )

    def _prepare(self, case: Case) -> _InMemory | _OnDisk:
        for axis, need, have in zip("DHW", self.output, case.shape):
            if have < need:
                raise ValueError(
                    f"{case.name} is only {have} voxels along {axis}; the output needs {need}: choose a smaller one"
                )
        if not case.count("mask"):
            raise ValueError(f"{case.name}: the mask is empty; correct it, or leave it out to sample the whole volume")
        around = self.margin if self.augment else (0, 0, 0)  # an augmentation moves the label with the patch
        if case.in_memory:
            return _InMemory(case, self._groups, self.output, self.margin, around)
        return _OnDisk(case, self.margin, around)

    def _make(self, step: int, device: torch.device) -> Batch:
        rng = np.random.default_rng([self.seed, step])
        inputs, label, offsets = self._draw(rng)
        *inputs, label, offsets = (_moved(torch.from_numpy(part), device) for part in (*inputs, label, offsets))
        label = label.long()
        if self.shift:
            offsets = offsets.reshape(*offsets.shape, *(1,) * self.spatial_dims)
            inputs = [part.add_(offsets) for part in inputs]
        if self.augment is not None:
            patch, label = self.augment(inputs[0], label, rng=rng)
            margin = self.margin[: self.spatial_dims]
            label = label[(slice(None), *(slice(m, n - m) for m, n in zip(margin, label.shape[1:])))]
            inputs = self.cut(patch)
        return Batch(tuple(inputs) if len(inputs) > 1 else inputs[0], label)

    def _draw(self, rng: np.random.Generator) -> tuple[list[np.ndarray], np.ndarray, np.ndarray]:
        """Return the inputs of a batch, the label (uint8) and the shift of each channel `(B, C)`."""
        inputs, label = [], None
        offsets = np.zeros((self.batch_size, len(self.channels)), np.float32)
        for n, group in enumerate(self._draw_groups(rng)):
            holders = self._holders[group]
            case = self._cases[holders[rng.integers(len(holders))]]
            patch, target = case.cut(group, rng.integers(case.count(group)), self.output)
            if self.spatial_dims == 2:
                patch, target = patch[..., 0], target[..., 0]
            if self.flip and rng.random() < 0.5:
                patch, target = patch[:, ::-1], target[::-1]
            if self.shift:
                offsets[n] = rng.normal(0, self.shift, len(patch)) * case.std
            parts = (patch,) if self.augment else self.cut(patch)
            if label is None:
                inputs = [np.empty((self.batch_size, *p.shape), np.float32) for p in parts]
                label = np.empty((self.batch_size, *target.shape), np.uint8)
            for store, part in zip(inputs, parts):
                store[n] = to_float32(part) if part.dtype == np.float16 else part
            label[n] = target
        return inputs, label, offsets

    def case_codes(self) -> Iterator[tuple[str, str]]:
        return ((case.name, case.code()) for case in self._cases)

    def _draw_groups(self, rng: np.random.Generator) -> list[str]:
        """Return the group of voxels for the centre of each segment of a batch."""
        if self.scheme == "uniform":
            return self._groups * self.batch_size
        if self.scheme == "equal":
            return [self._groups[n] for n in rng.choice(len(self._groups), self.batch_size)]
        first = rng.integers(2)
        return [self._groups[(n + first) % 2] for n in range(self.batch_size)]


class VolumeSampler(Sampler):
    """A sampler of whole volumes, or crops of them, for networks that predict as many voxels as they take in.

    Every case comes up once before any comes up again, in a new order each time. `batch(step)` depends on the seed and
    the step alone, like that of `SegmentSampler`.

    Args:
        cases: labelled cases, normalised for the network, all with the same channels. Stored cases (`datasets.store`) are read
            when they are drawn. Other cases are kept in main memory: float32 images, uint8 labels.
        crop: number of voxels of a crop along each axis, one number or three. Crops lie anywhere in the volume. None for whole
            volumes.
        multiple: size of which the sides of a whole volume become multiples, by mirroring: `model.multiple`.
        batch_size: number of volumes in a batch. They must have one size.
        augment: function `augment(image, label, rng=...)` that changes every batch, such as `transforms.augment`. Both lie on
            `device`; `rng` is NumPy's generator.
        seed: seed of all random choices.
        device: device on which batches are augmented and handed over, see `SegmentSampler`.
    """

    settings = ("channels", "crop", "batch_size", "augment", "seed")

    def __init__(
        self,
        cases: Sequence[Case],
        *,
        crop: int | Sequence[int] | None = None,
        multiple: int = 1,
        batch_size: int = 1,
        augment: Augment | None = None,
        seed: int = 0,
        device: str | torch.device = "cpu",
    ):
        if batch_size < 1 or multiple < 1:
            raise ValueError(f"batch_size={batch_size}, multiple={multiple}; both must be at least 1")
        batch_size, multiple, seed = int(batch_size), int(multiple), int(seed)
        self.highest_label, self.labelled_highest = _check_cases(cases)
        self.crop = None if crop is None else (int(crop),) * 3 if np.ndim(crop) == 0 else tuple(int(n) for n in crop)
        if self.crop is not None:
            if len(self.crop) != 3 or any(n < 1 or n % multiple for n in self.crop):
                raise ValueError(f"crop={crop}; expected one number of voxels, or three, each a multiple of {multiple}")
            for case in cases:
                if any(n < c for n, c in zip(case.shape, self.crop)):
                    raise ValueError(
                        f"{case.name} is {size_text(case.shape)} voxels, smaller than the crop of {self.crop}; choose a smaller one"
                    )
        elif batch_size > 1 and len({case.shape for case in cases}) > 1:
            raise ValueError("the cases are of different sizes, so whole volumes make no batch; use batch_size=1 or a crop")
        self.batch_size, self.augment, self.seed, self.device = batch_size, augment, seed, _settle_device(device)
        self._sizes = [c.shape if self.crop else tuple(-(-n // multiple) * multiple for n in c.shape) for c in cases]
        self._volumes = [self._load(c, (0, 0, 0), s) if c.in_memory else None for c, s in zip(cases, self._sizes)]
        self._stored = [None if c.in_memory else c for c in cases]
        self.channels, self._names = cases[0].channels, [c.name for c in cases]

    def _make(self, step: int, device: torch.device) -> Batch:
        rng = np.random.default_rng([self.seed, step])
        images, labels = zip(*(self._cut(n, rng) for n in self._turns(step)))
        # NumPy gets large pages of memory from the system, which takes a fourth of the time of PyTorch's small ones.
        image, label = (_moved(torch.from_numpy(np.stack(parts)), device) for parts in (images, labels))
        label = label.long()
        if self.augment is not None:
            image, label = self.augment(image, label, rng=rng)
        return Batch(image, label)

    def case_codes(self) -> Iterator[tuple[str, str]]:
        for name, volume, stored in zip(self._names, self._volumes, self._stored):
            # Labels were int64 in earlier versions, whose runs go on.
            yield name, stored.code() if volume is None else array_code(volume[0], volume[1].astype(np.int64))

    def _turns(self, step: int) -> list[int]:
        """Return the numbers of the cases in a batch."""
        count = len(self._volumes)
        numbers = range(step * self.batch_size, (step + 1) * self.batch_size)
        order = {r: np.random.default_rng([self.seed, r, 1]).permutation(count) for r in {n // count for n in numbers}}
        return [int(order[n // count][n % count]) for n in numbers]

    def _cut(self, number: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        size = self._sizes[number]
        crop = self.crop or size
        start = [int(rng.integers(n - c + 1)) if self.crop else 0 for n, c in zip(size, crop)]
        stop = [a + c for a, c in zip(start, crop)]
        if self._volumes[number] is None:
            return self._load(self._stored[number], start, stop)
        image, label = self._volumes[number]
        return image[(slice(None), *map(slice, start, stop))], label[tuple(map(slice, start, stop))]

    def _load(self, case: Case, start: Sequence[int], stop: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        """Return a part of image (float32) and label (uint8), mirrored beyond the border."""
        image = np.ascontiguousarray(case.block(start, stop), np.float32)
        return image, np.ascontiguousarray(case.label_block(start, stop))


def check_label(name: str, label: int, classes: int | None) -> None:
    """Raise ValueError if a network of so many classes cannot learn a label of a case.

    Args:
        name: name of the case.
        label: highest class in its label.
        classes: number of the network's output classes. With one, for a sigmoid, labels are 0 and 1. None accepts all labels that
            are likely to be classes.
    """
    highest = 254 if classes is None else max(classes, 2) - 1
    if label <= highest:
        return
    expected = "" if classes is None else f"; with classes={classes} labels are 0 to {highest}"
    if label == 255:
        remedy = (
            "if 255 marks voxels to ignore, give them a class, because here every voxel of a segment counts; "
            "if it is the object of a mask of 0 and 255, use case.relabelled({255: 1})"
        )
    else:
        remedy = f"set classes={label + 1}, or renumber the classes with case.relabelled or a recipe's label_map"
    raise ValueError(f"{name} has label {label}{expected}: {remedy}")


def _check_cases(cases: Sequence[Case]) -> tuple[int, str]:
    """Return the highest label and the name of its case. Raise ValueError unless all have a label and the same channels."""
    if not cases:
        raise ValueError("no cases to sample from; give at least one labelled case")
    for case in cases:
        if not case.labelled:
            raise ValueError(f"{case.name} has no label; training needs one")
        if case.channels != cases[0].channels:
            raise ValueError(f"{case.name} has channels {case.channels} but {cases[0].name} has {cases[0].channels}")
    return max((case.highest_label, case.name) for case in cases)

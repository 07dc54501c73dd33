"""A toy image with a large and a tiny class: what four losses say of a prediction, and where their gradients push."""

from __future__ import annotations

import numpy as np
import torch
import traitlets
from matplotlib.figure import Figure
from torch import Tensor

from .. import losses, plotting
from ._base import StateError, Widget, check_known, script, styles

CLASSES = ("background", "large", "tiny")
LOSSES = ("Jaccard distance", "cross-entropy", "weighted cross-entropy", "Dice loss")
BATCHES = ("the image", "an empty image", "both images")
COLOURS = ("#8A8A8A", "#0072B2", "#D55E00")  # of the classes
LOWEST, HIGHEST, SIDE = 0.01, 0.99, 16


class LossBench(Widget):
    """Sliders for what a network says inside and outside of two objects, the loss of that, and its push on every class.

        bench = LossBench(loss="cross-entropy", tiny=0.01)
        bench.batch = "both images"    # or large, tiny, alarm, loss
        bench.numbers                  # loss, its parts, and the push on one voxel and on all voxels of each class

    The toy image has 256 voxels: a disc is the large class, four voxels are the tiny one. The empty image is background alone, and its
    objects are absent. All voxels of a class get the same prediction. The push is −∂loss/∂(logit of the voxel's true class), so it tells
    how strongly an update makes the right answer more probable. Class weights are 1/f, where f is the class's share of the image's voxels.

    Args:
        loss: one of `LOSSES`.
        batch: one of `BATCHES`, what the loss is computed of.
        large: probability of the large class inside the large object, from 0.01 to 0.99. What is left goes to the background.
        tiny: probability of the tiny class inside the tiny object.
        alarm: probability of a false alarm in the background, half of it for each object.

    All are synchronised with the browser, which computes all numbers itself.

    Raises:
        ValueError: for a loss or batch that is not known, and for a probability out of range.

    Source: Kayalibay et al. 2017, eq. 3 and 4 and section 5.2.
    Taught in notebook 08.
    """

    _esm = script("loss_bench.js")
    _css = styles("loss_bench.css", "medseg-bench")

    loss = traitlets.Unicode("Jaccard distance").tag(sync=True)
    batch = traitlets.Unicode("the image").tag(sync=True)
    large = traitlets.Float(0.5).tag(sync=True)
    tiny = traitlets.Float(0.5).tag(sync=True)
    alarm = traitlets.Float(0.1).tag(sync=True)

    def __init__(self, **state: float | str):
        rows, columns = np.indices((SIDE, SIDE))
        self._truth = ((rows - 6) ** 2 + (columns - 5.5) ** 2 < 19).astype(np.uint8)
        self._truth[11:13, 11:13] = 2
        self._images = dict(zip(BATCHES, ([self._truth], [0 * self._truth], [self._truth, 0 * self._truth])))
        noise = np.random.default_rng(0).integers(0, 26, (SIDE, SIDE), np.uint8)
        self._weights = self._truth.size / np.bincount(self._truth.ravel())
        super().__init__(**state)
        counts = {name: np.bincount(np.ravel(images), minlength=3).tolist() for name, images in self._images.items()}
        look = {"classes": CLASSES, "losses": LOSSES, "batches": BATCHES, "colours": COLOURS, "ends": [LOWEST, HIGHEST]}
        look |= {"side": SIDE, "counts": counts, "weights": self._weights.tolist()}
        self._grey = [np.uint8([52, 120, 160])[truth] + noise for truth in self._images["both images"]]
        images = {name: [truth.tobytes() for truth in truths] for name, truths in self._images.items()}
        self._scene = look | {"images": images, "grey": [picture.tobytes() for picture in self._grey]}

    def __repr__(self) -> str:
        said = f"large {self.large:.2f}, tiny {self.tiny:.2f}, false alarm {self.alarm:.2f}"
        return f"LossBench({self.loss} of {self.batch}: {self.numbers['loss']:.4f}, {said})"

    @property
    def probabilities(self) -> np.ndarray:
        """Predicted probabilities, (true class of the voxel, predicted class)."""
        rest, half = 1 - np.array([self.alarm, self.large, self.tiny]), self.alarm / 2
        return np.array([[rest[0], half, half], [rest[1], self.large, 0], [rest[2], 0, self.tiny]])

    @property
    def numbers(self) -> dict[str, float | list[float]]:
        """Loss, and for each class its part of the loss, its voxels, and the push on one voxel and on all of them."""
        truth = torch.from_numpy(np.stack(self._images[self.batch]).astype(np.int64))
        logits = torch.from_numpy(self.probabilities).log()[truth].movedim(-1, 1).requires_grad_()
        parts = self._parts(logits, truth)
        (gradient,) = torch.autograd.grad(parts.sum(), logits)
        pushes = -gradient.gather(1, truth[:, None])[:, 0]
        voxels = [int((truth == k).sum()) for k in range(3)]
        total = [float(pushes[truth == k].sum()) for k in range(3)]
        push = [t / max(n, 1) for t, n in zip(total, voxels)]
        return {"loss": parts.sum().item(), "parts": parts.tolist(), "voxels": voxels, "push": push, "total": total}

    def _parts(self, logits: Tensor, truth: Tensor) -> Tensor:
        """Return what each class adds to the loss: of cross-entropy its own voxels; the Dice loss has no background."""
        if self.loss == "Jaccard distance":
            return losses.jaccard_distance(logits, truth, per_class=True)
        if self.loss == "Dice loss":
            rest = [logits[:, [i for i in range(3) if i != k]].logsumexp(1) for k in range(3)]
            pairs = [torch.stack([rest[k], logits[:, k]], 1) for k in range(3)]  # each class against the two others
            alone = [losses.dice_loss(pair, (truth == k).long()) for k, pair in enumerate(pairs)]
            return torch.stack(alone) * torch.tensor([0, 0.5, 0.5])
        weights = torch.tensor(self._weights if self.loss.startswith("weighted") else np.ones(3))
        shares = torch.bincount(truth.flatten(), minlength=3) * weights
        means = [losses.cross_entropy(logits, truth, mask=truth == k) for k in range(3)]
        return torch.stack(means) * shares / shares.sum()

    # --------------------------------------------------------------------------------------------------- static forms

    def _title(self) -> str:
        return "Loss bench"

    def _alt(self) -> str:
        n = self.numbers
        told = [f"{name} {one:.2g} and {all_:.2g}" for name, one, all_ in zip(CLASSES, n["push"], n["total"])]
        return f"{self!r}. Push on one voxel and on all voxels of each class: {'; '.join(told)}"

    def _draw(self) -> Figure:
        """Draw the prediction over each image of the batch, and bars for the pushes."""
        n, truths, odd = self.numbers, self._images[self.batch], np.indices((SIDE, SIDE)).sum(0) % 2
        colours, strength = np.float32([*map(plotting.rgb, COLOURS)]), np.array([self.alarm, self.large, self.tiny])
        with plotting.style():
            figure = Figure(figsize=(9.4, 2.9), dpi=100, layout="constrained")
            *pictures, one, total = figure.subplots(1, len(truths) + 2)
            plotting.picture(pictures)
            for axes, truth in zip(pictures, truths):
                grey = np.repeat(self._grey[not truth.any()][..., None], 3, -1)
                kinds = np.where(truth > 0, truth, 1 + odd)  # outside, the colours of both objects alternate
                axes.imshow(plotting.blend(grey, colours[kinds], strength[truth]).astype(np.uint8))
                axes.set_title("prediction" if truth.any() else "in the empty image")
                plotting.outline(axes, truth > 0, colour=plotting.COLOURS["truth"])
            for axes, name, title in ((one, "push", "push on one voxel"), (total, "total", "push on all voxels")):
                axes.barh(CLASSES, n[name], color=COLOURS)
                axes.set(title=title, ylim=(2.5, -0.5))
            figure.suptitle(f"{self.loss} of {self.batch}: {n['loss']:.3f}", fontsize=9)
        return figure

    @traitlets.validate("large", "tiny", "alarm")
    def _valid_probability(self, proposal):
        name, value = proposal["trait"].name, proposal["value"]
        if not LOWEST <= value <= HIGHEST:  # NaN is caught too
            raise StateError(f"{name} is {value:g}; expected a probability from {LOWEST} to {HIGHEST}")
        return value

    @traitlets.validate("loss", "batch")
    def _valid_choice(self, proposal):
        name = proposal["trait"].name
        return check_known(proposal["value"], {"loss": LOSSES, "batch": BATCHES}[name], f"there is no {name}")

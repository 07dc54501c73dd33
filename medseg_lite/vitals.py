"""Signs that a network is alive: what it has learned, and before that, whether signal and gradient reach every layer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor, nn

from . import inference, losses
from .features import capture
from .models.layers import convolutions
from .volume import Case

LARGEST = 200_000  # numbers kept of each layer: enough to see whether a channel varies


@dataclass(frozen=True)
class VitalSigns:
    """The result of `examine`; `print` it for one readable line.

    Attributes:
        constant: whether the network predicts one and the same class everywhere.
        recall: share of each class's voxels that were found, by class number; only classes that the labels hold.
        silent: share of the channels of all layers that have the same value at every voxel of a slice.
    """

    constant: bool
    recall: dict[int, float]
    silent: float

    @property
    def alive(self) -> bool:
        """The answer to whether the prediction varies and every class was found somewhere."""
        return not self.constant and all(share > 0 for share in self.recall.values())

    def __str__(self) -> str:
        found = ", ".join(f"{number}: {share:.0%}" for number, share in self.recall.items())
        state = "alive" if self.alive else "dead: one class everywhere" if self.constant else "blind to a class"
        return f"{state}; recall {found}; {self.silent:.0%} of the channels silent"


def examine(model: nn.Module, cases: Sequence[Case]) -> VitalSigns:
    """Look for the signs that a training has failed: one answer for everything, a class that is never found, silent channels.

    A mean Dice can hide all three. A silent channel is one whose rectifier never lets anything through, for example.

    Args:
        model: trained network.
        cases: labelled cases, normalised as for `inference.predict`. The channels are looked at in the axial slice of the first case
            that holds the most labelled voxels.
    """
    if not cases or any(case.label is None for case in cases):
        raise ValueError("expected at least one case, and a label in each: recall needs the truth")
    predictions = [inference.predict(model, case, progress=False) for case in cases]
    found = np.concatenate([prediction.ravel() for prediction in predictions])
    truth = np.concatenate([case.label.ravel() for case in cases])
    recall = {int(k): float((found[truth == k] == k).mean()) for k in np.unique(truth)}
    fullest = int((cases[0].label > 0).sum(axis=(0, 1)).argmax())
    maps = capture(model, cases[0], region=np.s_[:, :, fullest], largest=LARGEST, progress=False)
    layers = [layer.data.reshape(len(layer.data), -1) for layer in maps.values()]
    silent = np.concatenate([layer.max(axis=1) == layer.min(axis=1) for layer in layers])
    return VitalSigns(bool(found.min() == found.max()), recall, float(silent.mean()))


def signals(model: nn.Module, inputs: Tensor, label: Tensor, loss: Callable = losses.cross_entropy) -> dict[str, list[Tensor]]:
    """Send a batch through a network and the loss's gradient back, and keep what every convolution meets.

    Where the signal or its gradient vanishes on the way, little can be learned. The gradients of all weights are left in `.grad`.

    Args:
        model: network, in training mode if it is to be trained.
        inputs, label: batch `(B, C, *n)` and the classes of the voxels that the network predicts for it.
        loss: function of logits and label.

    Returns:
        A tensor for each convolution, in the order of the network's definition: its output as "signal", the loss's gradient by that as
        "gradient", and by the kernel as "kernel_gradient".

    Taught in notebook 05.
    """
    outputs: dict[nn.Module, Tensor] = {}

    def note(module, _, output):
        output.retain_grad()
        outputs[module] = output

    model.zero_grad()
    layers = list(convolutions(model))
    handles = [conv.register_forward_hook(note) for conv in layers]
    try:
        loss(model(inputs), label).backward()
    finally:
        for handle in handles:
            handle.remove()
    return {
        "signal": [outputs[conv].detach() for conv in layers],
        "gradient": [outputs[conv].grad for conv in layers],
        "kernel_gradient": [conv.weight.grad.clone() for conv in layers],
    }

"""The papers' networks as a table with one row for each, and two helpers that the tests of networks share."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch

from medseg_lite import models


class Row(NamedTuple):
    """A network and the numbers that it must have. Calling it builds the network, a tenth of the paper's size."""

    name: str
    parameters: dict[tuple[int, int], int]  # (in_channels, classes): trainable scalars
    field: int  # receptive field in voxels along each axis
    init: str | float = "he"  # or the standard deviation of all kernels
    dropout: tuple[float, ...] = ()  # rates in the order of the layers
    slope: float = 0.01  # of PReLU at the start
    example: tuple[int, int] = (4, 5)  # whose count the builder's documentation states

    def __call__(self, *, width: float = 0.1, seed: int = 0, **options) -> models.Network:
        torch.manual_seed(seed)
        return models.BUILDERS[self.name](width=width, **options)


HALF = (0.5, 0.5)  # inputs of the second hidden layer and of the classifier
DEEPMEDIC = [
    Row("shallow", {(4, 5): 615_575, (5, 2): 619_172}, 17, init="normal"),
    Row("shallow_plus", {(4, 5): 615_735, (5, 2): 619_332}, 17),
    Row("deep", {(4, 5): 311_935, (5, 2): 312_592}, 17, init="normal"),
    Row("deep_plus", {(4, 5): 312_255, (5, 2): 312_912}, 17),
    Row("big_deep_plus", {(4, 5): 1_278_755, (5, 2): 1_279_922}, 17, dropout=HALF),
    Row("deepmedic", {(4, 5): 663_155, (5, 2): 664_322, (2, 5): 659_915}, 51, dropout=HALF),
    Row("dm2d_patch", {(4, 5): 248_435, (5, 2): 248_522}, 51, dropout=HALF),
    Row("dm2d_seg", {(4, 5): 248_435, (5, 2): 248_522}, 51, dropout=HALF),
    Row("wider2d_seg", {(4, 5): 911_165, (5, 2): 911_642}, 51, dropout=HALF),
    Row("deeper2d_seg", {(4, 5): 486_065, (5, 2): 486_152}, 99, dropout=HALF),
    Row("large2d_seg", {(4, 5): 875_043, (5, 2): 875_250}, 75, dropout=HALF),
]
TWO_SCALES = [n for n in DEEPMEDIC if n.field > 17]
FLAT = {"init": 0.005 / 3**0.5, "dropout": (0.5,)}  # U(-.005, .005); inputs of the output layer
CASCADES = [  # what is trained: the second network
    Row("input_cascade_cnn", {(4, 5): 1_111_397, (2, 5): 990_693}, 65, **FLAT),
    Row("local_cascade_cnn", {(4, 5): 815_397, (2, 5): 694_693}, 56, **FLAT),
    Row("mf_cascade_cnn", {(4, 5): 820_662, (2, 5): 699_958}, 53, **FLAT),
]
HAVAEI = [
    Row("two_path_cnn", {(4, 5): 809_637, (2, 5): 688_933}, 33, **FLAT),
    Row("local_path_cnn", {(4, 5): 240_197, (2, 5): 227_653}, 33, **FLAT),
    Row("global_path_cnn", {(4, 5): 569_445, (2, 5): 461_285}, 33, **FLAT),
    *CASCADES,
]
VALID = DEEPMEDIC + HAVAEI  # networks of valid convolutions: dense output is that of the patches around each voxel
KAYALIBAY = [Row("kayalibay_unet3d", {(4, 5): 410_072, (1, 5): 409_424, (4, 2): 409_736}, 73, init="normal", slope=0.25)]
DROZDZAL = [
    Row("fcn_preprocessor", {(1, 1): 1_832_145}, 220, example=(1, 1)),
    Row("fc_resnet", {(1, 1): 11_042_273, (1, 2): 11_042_306}, 1152, example=(1, 1)),
    Row("fcn_fc_resnet", {(1, 1): 12_874_418}, 1371, example=(1, 1)),
    Row("unet2d", {(1, 2): 31_030_658}, 220, example=(1, 2)),
    Row("fcn8", {(3, 2): 134_271_430}, 468, dropout=HALF, example=(3, 2)),
]
MLYNARSKI = [
    Row("mlynarski_2d", {(4, 4): 31_277_800}, 266, example=(4, 4)),
    Row("mlynarski_3d", {(4, 4): 1_330_372}, 46, example=(4, 4)),
]
NETWORKS = VALID + KAYALIBAY + DROZDZAL + MLYNARSKI


def by_name(networks):
    return pytest.mark.parametrize("network", networks, ids=lambda n: n.name)


def patch(model: models.Network, *, batch: int = 1, out: int | None = None, seed: int = 0) -> torch.Tensor:
    """Return noise that the model turns into `out` voxels along each axis, by default the fewest it makes densely."""
    side = (model.multiple if out is None else out) + 2 * model.margin
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, model.in_channels, *(side,) * model.spatial_dims, generator=generator)

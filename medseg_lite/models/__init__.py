"""The papers' networks, one builder per named network, at the papers' sizes unless `width` says otherwise."""

from .checkpoint import load, save
from .deepmedic import (
    big_deep_plus,
    deep,
    deep_plus,
    deeper2d_seg,
    deepmedic,
    dm2d_patch,
    dm2d_seg,
    large2d_seg,
    shallow,
    shallow_plus,
    wider2d_seg,
)
from .drozdzal import fc_resnet, fcn8, fcn_fc_resnet, fcn_preprocessor, unet2d
from .havaei import global_path_cnn, input_cascade_cnn, local_cascade_cnn, local_path_cnn, mf_cascade_cnn, two_path_cnn
from .kayalibay import kayalibay_unet3d
from .mlynarski import mlynarski_2d, mlynarski_3d

__all__ = [
    "DEEPMEDIC",
    "DROZDZAL",
    "HAVAEI",
    "KAYALIBAY",
    "MLYNARSKI",
    "NETWORKS",
    "big_deep_plus",
    "deep",
    "deep_plus",
    "deeper2d_seg",
    "deepmedic",
    "dm2d_patch",
    "dm2d_seg",
    "fc_resnet",
    "fcn8",
    "fcn_fc_resnet",
    "fcn_preprocessor",
    "global_path_cnn",
    "input_cascade_cnn",
    "kayalibay_unet3d",
    "large2d_seg",
    "load",
    "local_cascade_cnn",
    "local_path_cnn",
    "mf_cascade_cnn",
    "mlynarski_2d",
    "mlynarski_3d",
    "save",
    "shallow",
    "shallow_plus",
    "two_path_cnn",
    "unet2d",
    "wider2d_seg",
]

NETWORKS = tuple(name for name in __all__ if name[0].islower() and name not in ("load", "save"))  # the builders, by name
DEEPMEDIC, HAVAEI, KAYALIBAY, DROZDZAL, MLYNARSKI = (  # the same, paper by paper
    tuple(name for name in NETWORKS if globals()[name].__module__ == f"{__name__}.{file}")
    for file in ("deepmedic", "havaei", "kayalibay", "drozdzal", "mlynarski")
)

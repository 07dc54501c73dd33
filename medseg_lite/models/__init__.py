"""The papers' networks, with one builder for each. They have the papers' sizes unless `width` says otherwise."""

from ..moved import forward
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
from .network import BUILDERS, Adapter, Network, builder

__all__ = [
    "BUILDERS",
    "DEEPMEDIC",
    "DROZDZAL",
    "HAVAEI",
    "KAYALIBAY",
    "MLYNARSKI",
    "NETWORKS",
    "Adapter",
    "Network",
    "big_deep_plus",
    "builder",
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


def _names(module: str) -> tuple[str, ...]:
    """Return the names of the networks that one module of this package builds, in alphabetical order."""
    return tuple(sorted(name for name, build in BUILDERS.items() if build.__module__ == f"{__name__}.{module}"))


NETWORKS = tuple(sorted(BUILDERS))
DEEPMEDIC, HAVAEI, KAYALIBAY = _names("deepmedic"), _names("havaei"), _names("kayalibay")
DROZDZAL, MLYNARSKI = _names("drozdzal"), _names("mlynarski")

__getattr__ = forward(__name__, {name: f"medseg_lite.attribution.{name}" for name in ("removable", "without")})

"""Complete recipes by name: a paper on a data set, with its settings, folds and regions, and what the paper reports.

    python -m medseg_lite recipes
    python -m medseg_lite train deepmedic-brats2015 --data BRATS2015_Training --out runs/deepmedic

`RECIPES` is a plain table:

    paper, data     where the settings come from, and which scans are meant
    loader          the function of `datasets` that reads `--data`, with `loader_options`; None where only a reader's own folder
                    will do (`--channels`)
    channels        the sequences, in the order of the network's input
    classes         of the network; `label_map` makes them of the data's labels
    normalise       "standardise", "median" or "none", see `transforms`
    network         its builder; `settings` are what the recipe of the paper (`recipes.of_network`) is called with
    plane           whose slices a 2D network sees, axial unless it says otherwise
    folds           of the cross-validation; `validation` is the share of a fold's training cases that decide when to stop
    members         networks per fold that differ by their seed; their probabilities are averaged
    regions         what is scored, see `metrics.evaluate`; "cells" for V_rand and V_info of electron microscopy
    postprocess     "largest" keeps the largest connected component
    reported        the paper's own row: where it stands, on which data, and its means
    departs         what we do differently, or chose because the paper is silent
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

from .. import context, datasets, transforms
from ..volume import Case
from .deepmedic import DEEPMEDIC_HALVINGS, DEEPMEDIC_STEPS
from .drozdzal import DROZDZAL_STEPS
from .havaei import HAVAEI_PHASE2_STEPS, HAVAEI_STEPS
from .kayalibay import KAYALIBAY_STEPS
from .mlynarski import MLYNARSKI_STEPS

_BRAIN = ("flair", "t1", "t1c", "t2")
_DEEPMEDIC = {"steps": DEEPMEDIC_STEPS, "halvings": DEEPMEDIC_HALVINGS, "output": 9, "batch_size": 10, "scheme": "foreground"}
_BRATS2017 = {
    "loader": "brats2017",
    "channels": _BRAIN,
    "label_map": {4: 3},
    "classes": 4,
    "normalise": "median",
    "folds": 5,
    "regions": {"whole": [1, 2, 3], "core": [1, 3], "enhancing": [3]},
    "data": "BRATS 2017 training set, 285 cases; by registration",
}
_PLANE = {
    **_BRATS2017,
    "paper": "Mlynarski et al. 2019, sections 2.2 and 2.4",
    "network": "mlynarski_2d",
    "settings": {
        "steps": MLYNARSKI_STEPS,
        "subnets": 1,
        "target_weights": (0.7, 0.1, 0.1, 0.1),
        "learning_rate": 0.25,
        "window": 200,
        "output": 192,
        "batch_size": 4,
        "accumulate": 10,
    },
    "reported": {
        "where": "Table 1, 2D model 1, axial, on 50 of the 285 cases",
        "dice": {"whole": 0.866, "core": 0.794, "enhancing": 0.736},
    },
    "departs": "squares of 192 instead of whole slices, four a batch, and the number of updates are our choice; five folds "
    "instead of one part of 50 cases",
}
_PROSTATE = {
    "paper": "Drozdzal et al. 2018, section 4.3",
    "classes": 1,
    "normalise": "none",
    "network": "fcn_fc_resnet",
    "settings": {
        "steps": DROZDZAL_STEPS,
        "learning_rate": 4e-4,
        "weight_decay": 1e-5,
        "crop": 256,
        "batch_size": 24,
        "shear": 0.1,
        "angle": 10.0,
        "warp": 0.1,
        "validate_every": 100,
        "patience": 50,
    },
    "folds": 5,
    "validation": 0.2,
    "members": 1,
    "regions": {"prostate": [1]},
    "postprocess": "largest",
    "reported": {
        "where": "Table VI, ten networks, PROMISE12's 30 test cases",
        "dice": {"prostate": 0.874},
        "boundary_distance": {"prostate": 2.17},
    },
}

RECIPES: dict[str, dict] = {
    "deepmedic-brats2015": {
        "paper": "Kamnitsas et al. 2017, section 4.2 and appendix B",
        "data": "BRATS 2015 training set, 274 cases; by registration",
        "loader": "brats2015",
        "channels": _BRAIN,
        "classes": 5,
        "normalise": "standardise",
        "network": "deepmedic",
        "settings": _DEEPMEDIC,
        "folds": 5,
        "regions": "brats2015",
        "reported": {
            "where": "Table 2, DeepMedic without CRF, five folds of the same 274 cases",
            "dice": {"whole": 0.897, "core": 0.750, "enhancing": 0.720},
            "precision": {"whole": 0.897, "core": 0.842, "enhancing": 0.756},
            "sensitivity": {"whole": 0.905, "core": 0.723, "enhancing": 0.725},
        },
        "departs": "one network per fold; --ensemble 3 for the paper's ensemble. The CRF is applied afterwards (medseg_lite.crf)",
    },
    "deepmedic-msd-brain": {
        "paper": "Kamnitsas et al. 2017, section 4.2 and appendix B",
        "data": "Medical Segmentation Decathlon, Task01_BrainTumour, 484 cases; free (CC BY-SA 4.0)",
        "loader": "msd",
        "loader_options": {"as_brats": True},
        "channels": _BRAIN,
        "label_map": {4: 3},
        "classes": 4,
        "normalise": "standardise",
        "network": "deepmedic",
        "settings": _DEEPMEDIC,
        "folds": 5,
        "regions": {"whole": [1, 2, 3], "core": [1, 3], "enhancing": [3]},
        "reported": {
            "where": "Table 2, DeepMedic without CRF, five folds of BRATS 2015: other cases",
            "dice": {"whole": 0.897, "core": 0.750, "enhancing": 0.720},
        },
        "departs": "not the paper's data, but cases of BRATS 2016 and 2017 that anyone may download",
    },
    "havaei-brats2013": {
        "paper": "Havaei et al. 2017, sections 3.2 and 3.3",
        "data": "BRATS 2013 training set, 30 cases; by registration",
        "loader": "brats2015",
        "channels": _BRAIN,
        "classes": 5,
        "normalise": "standardise",
        "network": "two_path_cnn",
        "settings": {
            "steps": HAVAEI_STEPS,
            "phase2_steps": HAVAEI_PHASE2_STEPS,
            "output": 1,
            "learning_rate": 0.005,
            "epochs": 3,
            "init": "uniform",
        },
        "folds": 5,
        "regions": "brats2015",
        "reported": {
            "where": "Table 1, TwoPathCNN*, BRATS 2013's challenge cases",
            "dice": {"whole": 0.85, "core": 0.78, "enhancing": 0.73},
            "sensitivity": {"whole": 0.80, "core": 0.76, "enhancing": 0.75},
        },
        "departs": "no bias-field correction and no clipping of intensities; numbers of updates, patches per update and longest "
        "kernel are our choice; postprocess.remove_flat_components is left to you",
    },
    "havaei-brats2013-cascade": {
        "paper": "Havaei et al. 2017, section 3.4",
        "data": "BRATS 2013 training set, 30 cases; by registration",
        "loader": "brats2015",
        "channels": _BRAIN,
        "classes": 5,
        "normalise": "standardise",
        "network": "input_cascade_cnn",
        "needs": "first",
        "settings": {
            "steps": HAVAEI_STEPS,
            "phase2_steps": HAVAEI_PHASE2_STEPS,
            "output": 1,
            "learning_rate": 0.005,
            "epochs": 3,
            "init": "uniform",
        },
        "folds": 5,
        "regions": "brats2015",
        "reported": {
            "where": "Table 2, InputCascadeCNN*, BRATS 2013's challenge cases",
            "dice": {"whole": 0.88, "core": 0.79, "enhancing": 0.73},
        },
        "departs": "as havaei-brats2013, whose network of the same fold is to be given as --first",
    },
    "kayalibay-brats2015": {
        "paper": "Kayalibay et al. 2017, sections 3.2 and 4",
        "data": "BRATS 2015 training set, 274 cases; by registration",
        "loader": "brats2015",
        "channels": _BRAIN,
        "classes": 5,
        "normalise": "none",
        "network": "kayalibay_unet3d",
        "settings": {
            "steps": KAYALIBAY_STEPS,
            "learning_rate": 5e-5,
            "loss": "jaccard",
            "crop": (160, 144, 128),
            "batch_size": 1,
            "augment": True,
            "merge": "concat",
            "maps": 3,
            "validate_every": 220,
        },
        "folds": 5,
        "validation": 0.11,
        "regions": "brats2015",
        "reported": {
            "where": "Tables 3 to 5, cross-validation over the same 274 cases",
            "dice": {"whole": 0.90, "core": 0.79, "enhancing": 0.44},
            "precision": {"whole": 0.90, "core": 0.81, "enhancing": 0.57},
            "sensitivity": {"whole": 0.92, "core": 0.87, "enhancing": 0.68},
        },
        "departs": "crops anywhere in the volume instead of around the brain's centre of mass",
    },
    "kayalibay-hands": {
        "paper": "Kayalibay et al. 2017, sections 3.2 and 4",
        "data": "30 hand MRI of 120×120×64 voxels; not public: your own folder, or generated ones (phantoms.hand)",
        "loader": None,
        "channels": ("t1",),
        "classes": 5,
        "normalise": "none",
        "network": "kayalibay_unet3d",
        "settings": {
            "steps": 12_000,
            "learning_rate": 5e-5,
            "loss": "jaccard",
            "batch_size": 1,
            "augment": True,
            "merge": "concat",
            "maps": 3,
            "validate_every": 20,
            "patience": 100,
        },
        "folds": 6,
        "validation": 0.2,
        "regions": {"metacarpal": [1], "proximal": [2], "middle": [3], "distal": [4]},
        "reported": None,
        "departs": "stops by the Dice score of the validation cases instead of their loss",
    },
    "drozdzal-isbi2012": {
        "paper": "Drozdzal et al. 2018, section 4.1",
        "data": "ISBI 2012 electron microscopy, 30 slices of 512×512; free",
        "loader": "isbi2012",
        "channels": ("em",),
        "classes": 1,
        "normalise": "none",
        "network": "fcn_fc_resnet",
        "settings": {
            "steps": DROZDZAL_STEPS,
            "learning_rate": 1e-3,
            "weight_decay": 1e-4,
            "crop": 256,
            "batch_size": 8,
            "shear": 0.41,
            "angle": 25.0,
            "warp": 0.1,
            "validate_every": 100,
            "patience": 50,
        },
        "folds": 5,
        "validation": 0.2,
        "regions": "cells",
        "reported": {
            "where": "Table IV, ten networks, the challenge's 30 test slices",
            "v_rand": {"cells": 0.981},
            "v_info": {"cells": 0.988},
        },
        "departs": "five folds of the training slices, whose truth is public, one network each (--ensemble for more); an epoch of "
        "the patience is taken as 100 updates",
    },
    "drozdzal-promise12": {
        **_PROSTATE,
        "data": "PROMISE12 training set, 50 cases; research use",
        "loader": "promise12",
        "channels": ("t2",),
        "departs": "five folds instead of ten random splits into 40 and 10; an epoch of the patience is taken as 100 updates",
    },
    "drozdzal-msd-prostate": {
        **_PROSTATE,
        "data": "Medical Segmentation Decathlon, Task05_Prostate, 32 cases; free (CC BY-SA 4.0)",
        "loader": "msd",
        "channels": ("t2",),
        "label_map": {2: 1},
        "departs": "not the paper's data: both zones of the prostate together, with the paper's settings for PROMISE12",
    },
    "drozdzal-lits": {
        "paper": "Drozdzal et al. 2018, section 4.2",
        "data": "LiTS, 131 CT volumes; by registration",
        "loader": "lits",
        "channels": ("ct",),
        "label_map": {1: 0, 2: 1},
        "classes": 1,
        "normalise": "none",
        "network": "fcn_fc_resnet",
        "settings": {
            "steps": DROZDZAL_STEPS,
            "learning_rate": 1e-3,
            "weight_decay": 1e-4,
            "crop": 128,
            "batch_size": 20,
            "scheme": "foreground",
            "augment": False,
            "validate_every": 100,
            "patience": 50,
        },
        "folds": 5,
        "validation": 0.27,
        "regions": {"lesion": [1]},
        "reported": {"where": "Table V, 30 test scans of the authors' own hospital: other cases", "dice": {"lesion": 0.711}},
        "departs": "not the paper's data; half of the crops instead of all are around a lesion; one weight decay for the whole network (the paper has "
        "5e-4 for FC-ResNet); five folds instead of one split into 77, 28 and 30; an epoch is taken as 100 updates",
    },
    "mlynarski-brats2017-axial": {**_PLANE, "plane": "axial"},
    "mlynarski-brats2017-coronal": {**_PLANE, "plane": "coronal"},
    "mlynarski-brats2017-sagittal": {**_PLANE, "plane": "sagittal", "settings": _PLANE["settings"] | {"flip": False}},
    "mlynarski-brats2017-3d": {
        **_BRATS2017,
        "paper": "Mlynarski et al. 2019, sections 2.3 and 2.4",
        "network": "mlynarski_3d",
        "needs": "scores",
        "settings": {
            "steps": MLYNARSKI_STEPS,
            "variant": "a",
            "target_weights": (0.4, 0.2, 0.2, 0.2),
            "learning_rate": 0.25,
            "window": 200,
            "output": 28,
            "batch_size": 1,
            "accumulate": 5,
        },
        "reported": {
            "where": "Table 1, model A with 2D model 1, on 50 of the 285 cases",
            "dice": {"whole": 0.873, "core": 0.809, "enhancing": 0.774},
        },
        "departs": "numbers of feature maps and of updates are our choice; five folds instead of one part of 50 cases. The scores "
        "must come from 2D networks that were trained without the fold's cases",
    },
}


def cases_of(name: str, folder: str | Path, *, cases: Sequence[str] | None = None) -> Sequence[Case]:
    """The cases of a recipe's data set, read when they are asked for.

    Slices of an electron microscopy stack are cases of their own, for folds are made of slices there.

    Args:
        name: of the recipe.
        folder: where they are; the name of the loader, or of a download, stands for where `datasets` looks for it by itself.
        cases: names of the cases wanted; by default all.

    Raises:
        ValueError, FileNotFoundError: there is no such recipe, no loader for its data, or the folder holds something else.
    """
    loader = recipe_of(name)["loader"]
    if loader is None:
        raise ValueError(
            f"{name} is for {recipe_of(name)['data']}, which has no reader of its own: say how the files are named with "
            f"--channels {' '.join(c + '=PATTERN' for c in recipe_of(name)['channels'])} and --label PATTERN"
        )
    root = None if folder == loader != "msd" and not Path(folder).is_dir() else folder
    if loader != "isbi2012":
        options = recipe_of(name).get("loader_options", {})
        return getattr(datasets, loader)(root, cases=cases or None, **options)
    stack = datasets.isbi2012(root)
    count = stack.shape[2]
    slices = [stack.crop((slice(None), slice(None), slice(n, n + 1))) for n in range(count)]
    named = {(name := f"{stack.name}-{n:0{len(str(count - 1))}}"): s.replace(name=name) for n, s in enumerate(slices)}
    unknown = set(cases or ()) - set(named)
    if unknown:
        raise ValueError(f"{', '.join(sorted(unknown))}: no such slice; there are {', '.join(named)}")
    return [named[name] for name in cases or named]


def recipe_of(name: str) -> dict:
    """A recipe by its name."""
    if name not in RECIPES:
        raise ValueError(f"recipe {name!r}; expected one of {', '.join(RECIPES)}")
    return RECIPES[name]


def prepared(
    case: Case,
    *,
    channels: Sequence[str],
    label_map: dict[int, int] | None = None,
    normalise: str = "standardise",
    plane: str = "axial",
    scores: str | None = None,
) -> Case:
    """A case as a recipe's network sees it: its channels in order, normalised, its labels renumbered, turned to a plane."""
    case = transforms.normalise(case.select(channels).relabelled(label_map), normalise)
    if scores is not None:
        case = context.with_scores(case, scores)
    return case if plane == "axial" else context.facing(case, plane)


def normalised(case: Case, how: str) -> Case:
    """A case normalised by "standardise", "median" or "none"."""
    return transforms.normalise(case, how)


def folds_of(names: Sequence[str], count: int, *, seed: int = 0) -> list[list[str]]:
    """Deal cases out into folds of equal size, give or take one.

    The order is that of a hash of seed and name, so it depends neither on the machine nor on the order of the files.

    Args:
        names: of the cases, all different.
        count: folds, 2 to the number of cases.
        seed: another one makes other folds.
    """
    if len(set(names)) != len(names):
        raise ValueError("two cases have the same name; folds are made by name: rename one")
    if not 2 <= count <= len(names):
        raise ValueError(f"{count} folds of {len(names)} cases; expected 2 to {len(names)}")
    ordered = sorted(names, key=lambda name: hashlib.sha256(f"{seed}:{name}".encode()).hexdigest())
    return [sorted(ordered[n::count]) for n in range(count)]

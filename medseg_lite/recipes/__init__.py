"""Each paper's training recipe, complete: what the notebooks, the command line and the experiments all call.

    model = recipes.deepmedic(cases, steps=500, halvings=(0.6, 0.8, 0.9), width=0.3)

Every recipe trains with its paper's settings, and every setting can be given another value. `network` is the name of a builder or a
network that you built yourself. So "the paper, but …" is a call, not a copy:

    model = recipes.deepmedic(cases, network=my_network, optimizer=partial(torch.optim.Adam, lr=1e-3), steps=500)

All recipes share these arguments:

    classes         number of output classes; by default the highest label plus one
    optimizer       function of the parameters that returns a PyTorch optimizer, in place of the paper's; it then sets the rate
    schedule        function of the optimizer that returns an `optimizers.Schedule`, in place of `halvings` and of the paper's
    validation      cases segmented every `validate_every` updates; the mean Dice of each region goes into the history
    patience        number of validations without a rise of the first score, after which the training stops and goes back to the best
                    weights; None trains to the end
    folder          folder of the run; the same call goes on from an interrupted run. None keeps nothing
    width           factor of every number of feature maps; 1 is the paper's size
    device          "cpu", "cuda", …, or "auto" (the default): a CUDA GPU where there is one that works, else the CPU
                    (`devices.find_device`). Every stage of a recipe computes there, and batches are augmented there; the cases stay
                    in main memory or on disk
    progress        whether to show a bar
    engine          options of `training.Engine` for the machine at hand (precision, compiled, channels_last, workers, tensorboard), for
                    every stage; and options of `training.fit` that replace the recipe's, such as `validate` or `on_update`. On a CUDA
                    GPU the validation has the training's precision; with "auto" both follow the rule of `engine.precision`

All recipes return the network in evaluation mode, on the device where it was trained. `network.history` (a table of pandas) and
`network.card` (a dictionary) hold plain numbers and texts. An `augment` function is given a batch on that device.
"""

from __future__ import annotations

from ..moved import forward
from .crossvalidation import cross_validate, split_folds
from .deepmedic import deepmedic
from .drozdzal import drozdzal
from .havaei import havaei
from .kayalibay import kayalibay
from .mlynarski import mlynarski, pretrain_subnetwork
from .named import RECIPES, find_recipe, load_cases
from .numbers import find_numbers, regions_in_data
from .papers import find_settings, recipe_for
from .recipe import Recipe, regions_for

__getattr__ = forward(
    __name__, {"of_network": "medseg_lite.recipes.recipe_for", "regions_of": "medseg_lite.recipes.regions_for"}
)

__all__ = [
    "RECIPES",
    "Recipe",
    "cross_validate",
    "deepmedic",
    "drozdzal",
    "find_numbers",
    "find_recipe",
    "find_settings",
    "havaei",
    "kayalibay",
    "load_cases",
    "mlynarski",
    "pretrain_subnetwork",
    "recipe_for",
    "regions_for",
    "regions_in_data",
    "split_folds",
]

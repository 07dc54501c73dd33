"""The door of the recipes: the paper, but with another network, rate, optimiser, schedule, loss or augmentation."""

from functools import partial

import numpy as np
import pytest
import torch
from torch import nn

from medseg_lite import losses, models, optimizers, recipes
from medseg_lite.models.layers import ConvBlock
from medseg_lite.volume import Case


class Small(models.Network):
    """Two valid convolutions, in 2D or 3D."""

    def __init__(self, spatial_dims: int):
        super().__init__(1, 2)
        self.spatial_dims, self.margin = spatial_dims, 2
        self.layers = nn.Sequential(
            ConvBlock(1, 4, 3, spatial_dims=spatial_dims), ConvBlock(4, 4, 3, spatial_dims=spatial_dims)
        )
        self.output = nn.Conv2d(4, 2, 1) if spatial_dims == 2 else nn.Conv3d(4, 2, 1)

    def forward(self, x):
        return self.output(self.layers(x))


class Padded(models.Network):
    """One padded convolution."""

    halo = 1

    def __init__(self, spatial_dims: int):
        super().__init__(1, 2)
        self.spatial_dims = spatial_dims
        self.layer = (nn.Conv2d if spatial_dims == 2 else nn.Conv3d)(1, 2, 3, padding=1)

    def forward(self, x):
        return self.layer(x)


@pytest.fixture
def cases():
    label = np.zeros((20, 20, 20), np.uint8)
    label[5:15, 5:15, 5:15] = 1
    image = np.random.default_rng(0).standard_normal((1, *label.shape)).astype(np.float32) + 2 * label
    return [Case(image, ("a",), "one", label), Case(image[..., ::-1].copy(), ("a",), "two", label)]


# Each recipe with a network of its paper, narrow, and short; and a network of the reader's that suits it.
RECIPES = {
    "deepmedic": (recipes.deepmedic, {"network": "deep_plus", "batch_size": 2}, Small(3)),
    "havaei": (recipes.havaei, {"phase2_steps": 0, "output": 3, "batch_size": 2}, Small(2)),
    "kayalibay": (recipes.kayalibay, {"crop": 16}, Padded(3)),
    "drozdzal": (recipes.drozdzal, {"network": "unet2d", "crop": 16, "batch_size": 2}, Padded(2)),
    "mlynarski": (recipes.mlynarski, {"output": 16, "batch_size": 2, "accumulate": 1}, Padded(2)),
}
SHORT = {"steps": 4, "width": 0.1, "progress": False}


@pytest.fixture(params=RECIPES)
def recipe(request):
    function, options, _ = RECIPES[request.param]
    return partial(function, **SHORT | options)


@pytest.mark.parametrize("name", RECIPES)
def test_a_network_of_the_reader(cases, name):
    function, options, network = RECIPES[name]
    options = {k: v for k, v in (SHORT | options).items() if k not in ("network", "width")}
    before = [p.detach().clone() for p in network.parameters()]
    model = function(cases, network=network, **options)
    assert model is network and len(model.history) == 4
    assert model.card["network"] in ("Small", "Padded") and model.card["trained_on"] == ["one", "two"]
    assert any(not torch.equal(a, b) for a, b in zip(before, model.parameters()))
    with pytest.raises(ValueError, match="width: the network is built already; give these options to its builder"):
        function(cases, network=network, width=0.5, **options)
    with pytest.raises(ValueError, match=r"network is a Conv3d; expected a models\.Network: wrap it in models\.Adapter"):
        function(cases, network=nn.Conv3d(1, 2, 1), **options)


def test_a_built_network_is_trained_like_one_by_name(cases):
    by_name = recipes.deepmedic(cases, network="deep_plus", seed=3, **SHORT)
    torch.manual_seed(3)
    built = models.deep_plus(in_channels=1, classes=2, width=0.1)
    options = {k: v for k, v in SHORT.items() if k != "width"}
    model = recipes.deepmedic(cases, network=built, seed=3, **options)
    assert model.history["loss"].equals(by_name.history["loss"]) and model.card == by_name.card


def test_another_rate(cases, recipe):
    assert recipe(cases, learning_rate=0.0123).history["learning_rate"][0] == pytest.approx(0.0123)
    halved = recipe(cases, learning_rate=0.01, halvings=(0.5, 0.75)).history["learning_rate"]
    assert halved.tolist() == pytest.approx([0.01, 0.01, 0.005, 0.0025])


def test_another_optimiser_and_schedule(cases, recipe):
    rates = recipe(
        cases,
        optimizer=partial(torch.optim.AdamW, lr=0.02),
        schedule=lambda optimizer: optimizers.InverseTimeDecay(optimizer, decay=1.0),
    ).history["learning_rate"]
    assert rates.tolist() == pytest.approx([0.02, 0.01, 0.02 / 3, 0.005])
    cosine = recipe(
        cases,
        optimizer=partial(torch.optim.SGD, lr=0.02),
        schedule=lambda o: optimizers.FromTorch(torch.optim.lr_scheduler.CosineAnnealingLR(o, 4)),
    ).history["learning_rate"]
    assert cosine.tolist() == pytest.approx([0.01 * (1 + np.cos(np.pi * step / 4)) for step in range(4)])
    with pytest.raises(ValueError, match="both optimizer and learning_rate are given"):
        recipe(cases, optimizer=torch.optim.Adam, learning_rate=0.1)


def test_another_loss(cases, recipe):
    calls = []

    def loss(logits, label):
        calls.append(logits.shape)
        return 3 * losses.cross_entropy(logits, label)

    assert recipe(cases, loss=loss).history["loss"][0] > 1 and len(calls) >= 4


def test_another_augmentation(cases, recipe):
    seen = []

    def darker(image, label, *, rng):
        seen.append(rng.integers(1000))
        return image - 100, label

    plain, dark = recipe(cases), recipe(cases, augment=darker)
    assert len(seen) >= 4 and not plain.history["loss"].equals(dark.history["loss"])
    assert dark.history["loss"].notna().all()


def test_options_of_the_builder(cases):
    assert recipes.deepmedic(cases, dropout=0.0, **SHORT).config["dropout"] == 0.0
    assert recipes.kayalibay(cases, crop=16, merge="sum", **SHORT).config["merge"] == "sum"
    assert recipes.havaei(cases, phase2_steps=0, output=3, batch_size=2, dropout=0.1, **SHORT).drop.p == 0.1


def test_engine_overrides_what_the_recipe_gives_to_fit(cases, recipe):
    rows = []
    engine = {
        "validate": lambda model: {"mine": 0.5},
        "validate_every": 2,
        "on_update": rows.append,
        "workers": 2,
        "precision": "float32",
    }
    history = recipe(cases, engine=engine).history
    assert history["mine"].notna().tolist() == [False, True, False, True] and len(rows) == 4
    with pytest.raises(TypeError, match="colour"):
        recipe(cases, engine={"colour": "red"})

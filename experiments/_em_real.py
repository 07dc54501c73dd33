"""The real stack of em.py: training, reading a membrane map, and what is done to trained networks."""

import itertools
import time
from functools import cache, partial

import numpy as np
import torch
from _frame import Store
from scipy import ndimage

from medseg_lite import attribution, datasets, inference, losses, metrics, models, recipes, transforms
from medseg_lite.metrics import partitions
from medseg_lite.models.drozdzal import Bottleneck
from medseg_lite.models.layers import init_xavier
from medseg_lite.optimizers import FromTorch
from medseg_lite.paths import atomic_write

MEASURES = ["v_rand", "v_info", "dice"]
SETTINGS = {"inputs": 500, "real": 500, "start": 100}  # updates
PARTS = {"train": slice(0, 12), "validation": slice(12, 16), "test": slice(16, 20)}  # slices of the real stack

PREPARED = {
    "raw": lambda case: case,
    "rescaled": transforms.rescale,
    "standardised": transforms.standardise,
    "equalised": transforms.equalise,
    # One constant for all stacks: other units, no normalisation.
    "raw/1000": lambda case: case.replace(image=case.image / 1000),
}
SYSTEMS = {  # of "real": the network, what is done to its input, and minutes
    "u-net": ("unet2d", "standardised", 4.5),
    "standardised": ("fc_resnet", "standardised", 2.5),
    "learned": ("fcn_fc_resnet", "raw", 4),
}
WIDTH, CROP, BATCH, RATE, WARM_UP = 0.25, 128, 2, 1e-3, 50
SEEDS = (0, 1, 2)
SHIPPED = "u-net"  # the system with the highest V_rand on the slices for choices
STARTS = ("He", "Glorot", "last layer × .01")
START = "Glorot"  # of the pre-processor: the lowest loss of "start"
SHARES = tuple(np.arange(18, 55, 6) / 100)  # of the pixels that are called membrane
SIGMAS = (0, 2, 3, 4)  # of the blur, in pixels


@cache
def real(part: str, prepared: str):
    """Return some slices of the real stack as one case, prepared by themselves."""
    whole = datasets.isbi2012()
    z = PARTS[part]
    case = whole.replace(image=whole.image[..., z], label=whole.label[..., z], name=f"{whole.name}[{z.start}:{z.stop}]")
    return PREPARED[prepared](case)


def vary(image, label, *, rng):
    """Bend, shear and rotate each crop, flip it, turn it by quarters, and change its contrast and brightness a little."""
    image, label = transforms.distort(image, label, rng=rng, shear=0.2, warp=0.05)
    for n, (one, truth) in enumerate(zip(image, label)):
        quarters, contrast, brightness = int(rng.integers(4)), rng.uniform(0.8, 1.25), rng.normal(0, 0.2)
        one, label[n] = one.rot90(quarters, (1, 2)), truth.rot90(quarters, (0, 1))
        image[n] = (one - one.mean()) * contrast + one.mean() + one.std() * brightness
    return image, label


def both_losses(logits, target):
    """Return cross-entropy and Dice loss, summed."""
    return losses.cross_entropy(logits, target) + losses.dice_loss(logits, target)


def rise_and_fall(optimizer, steps: int):
    """Return the schedule of the rate: up along a line, then down to zero along a cosine."""

    def share(step):
        return min(1, (step + 1) / WARM_UP) * (1 + np.cos(np.pi * min(step / steps, 1))) / 2

    return FromTorch(torch.optim.lr_scheduler.LambdaLR(optimizer, share))


def start_network(system: str, seed: int, start: str = START):
    """Return an untrained network. All convolutions start as He et al. propose, those of a pre-processor as `start` says."""
    torch.manual_seed(seed)
    model = models.BUILDERS[SYSTEMS[system][0]](in_channels=1, classes=2, width=WIDTH)
    if system == "learned" and start == "Glorot":
        init_xavier(model.preprocessor)
    elif system == "learned" and start == "last layer × .01":
        with torch.no_grad():
            model.preprocessor.output.weight *= 0.01
    return model


def handed_on(model, case) -> dict[str, float]:
    """Return between which numbers 99.8 % of a pre-processor's output lies, and its standard deviation."""
    with torch.no_grad():
        found = model.preprocessor(torch.from_numpy(case.image).permute(3, 0, 1, 2)).numpy()
    low, high = np.percentile(found, [0.1, 99.9])
    return {"low": low, "high": high, "deviation": found.std()}


def watch(model, case) -> dict[str, float]:
    """Return scores of the slices for choices: loss, V_rand with 36 % of the pixels as membrane, Dice, and a pre-processor's range."""
    logits = torch.from_numpy(inference.predict(model, case, output="logits", progress=False))
    target = torch.from_numpy(case.label).long()[None]
    loss = float(both_losses(logits[None], target)) + 1
    cell = logits.softmax(0)[0].numpy()
    found = {
        "v_rand": at_share(cell, case, 0.36)[:, 0].mean(),
        "validation_loss": loss,
        "dice": metrics.dice(cell < 0.5, case.label),
    }
    return found | (handed_on(model, case) if hasattr(model, "preprocessor") else {})


def train(store: Store, system: str, seed: int, *, start: str = START, penalty: float = 1e-4, what: str = "real"):
    """Train a system on the first slices of the real stack; the history has the scores of `watch`."""
    steps, prepared = SETTINGS[what], SYSTEMS[system][1]
    name = f"{what}-{system}-{seed}" + (f"-{STARTS.index(start)}-{penalty:g}" if what == "start" else "")
    clock = time.process_time()
    model = recipes.drozdzal(
        [real("train", prepared)],
        network=start_network(system, seed, start),
        steps=steps,
        loss=both_losses,
        optimizer=partial(torch.optim.Adam, lr=RATE),
        schedule=partial(rise_and_fall, steps=steps),
        weight_decay=penalty,
        augment=vary,
        crop=CROP,
        batch_size=BATCH,
        validate_every=125 if what == "real" else 25,
        engine={"validate": partial(watch if what == "real" else handed_on, case=first_two(real("validation", prepared)))},
        folder=store.runs / name,
        seed=seed,
        device="cpu",
        progress=False,
    )
    # A run that went on where it stopped has the seconds of all its parts.
    spent = store.runs / name / "cpu_seconds.txt"
    before = float(spent.read_text("utf-8")) if spent.exists() else 0.0
    model.cpu_seconds = before + time.process_time() - clock
    if not before or model.cpu_seconds - before > 5:
        spent.write_text(str(model.cpu_seconds), encoding="utf-8")
    return model


def first_two(case):
    """Return a case's first two slices."""
    return case.crop((slice(None), slice(None), slice(0, 2)))


def at_share(cell: np.ndarray, case, share: float) -> np.ndarray:
    """Return V_rand and V_info of each slice where this share of all pixels, the least probable to be in a cell, is membrane."""
    return by_slice(cell > np.quantile(cell, share), case)


def by_slice(inside: np.ndarray, case) -> np.ndarray:
    """Return V_rand and V_info of each slice, `(slices, 2)`."""
    pairs = zip(np.moveaxis(inside, -1, 0), np.moveaxis(case.label == 0, -1, 0))
    return np.array([metrics.partition_scores(i, t)[0] for i, t in pairs])


def choose_share(cell: np.ndarray, case) -> tuple[float, float]:
    """Return the share of membrane with the highest V_rand, and that V_rand."""
    found = {share: at_share(cell, case, share)[:, 0].mean() for share in SHARES}
    best = max(found, key=found.get)
    return float(best), float(found[best])


def turned(predict, case) -> np.ndarray:
    """Return the mean of what `predict` finds in the eight turns and flips of the slices."""
    total = np.zeros(case.shape, np.float32)
    for quarters, flip in itertools.product(range(4), (False, True)):
        image = np.rot90(case.image, quarters, (1, 2))
        image = image[:, ::-1] if flip else image
        found = predict(case.replace(image=np.ascontiguousarray(image), label=None))
        total += np.rot90(found[::-1] if flip else found, -quarters, (0, 1))
    return total / 8


def probabilities(store: Store, system: str, seed: int, *, turns: int = 1) -> dict[str, np.ndarray]:
    """Return a system's probability of being inside a cell on the slices for choices, and on those to test.

    With eight turns the latter is the mean over the turns and flips of a slice. Both are kept in the folder of the runs.
    """
    file = store.runs / f"real-{system}-{seed}-{turns}.npz"
    if not file.exists():
        model = train(store, system, seed)

        def predict(case):
            return inference.predict(model, case, output="probabilities", progress=False)[0]

        test = real("test", SYSTEMS[system][1])
        found = {"test": turned(predict, test)} if turns == 8 else {"test": predict(test)}
        if turns == 1:
            found["validation"] = predict(real("validation", SYSTEMS[system][1]))
        with atomic_write(file) as temporary:
            with open(temporary, "wb") as out:
                np.savez_compressed(out, **found)
    with np.load(file) as stored:
        return dict(stored)


def read(p: np.ndarray, share: float, turns: int = 1) -> list[dict]:
    """Return the scores of each test slice by both readings; Dice is at a half, "unsure" the share of pixels between .1 and .9."""
    test = real("test", "raw")
    each = np.stack([by_slice(p > t, test) for t in partitions.THRESHOLDS])  # thresholds × slices × 2
    best = each.mean(axis=1).argmax(axis=0)
    official = np.stack([each[b, :, n] for n, b in enumerate(best)], axis=1)
    slices = range(test.shape[2])
    dice = [metrics.dice(p[..., z] < 0.5, test.label[..., z]) for z in slices]
    unsure = [float(np.mean((p[..., z] > 0.1) & (p[..., z] < 0.9))) for z in slices]
    rows = []
    for reading, scores, threshold in (
        ("official", official, partitions.THRESHOLDS[best[0]]),
        ("share", at_share(p, test, share), share),
    ):
        for z, (rand, info) in enumerate(scores):
            slice_ = {"turns": turns, "reading": reading, "threshold": threshold, "slice": PARTS["test"].start + z}
            rows.append(slice_ | {"v_rand": rand, "v_info": info, "dice": dice[z], "unsure": unsure[z]})
    return rows


def run_real(store: Store, system: str, seed: int) -> dict:
    """Train a system and score it by itself."""
    real("train", SYSTEMS[system][1])
    model = train(store, system, seed)
    facts = {
        "steps": SETTINGS["real"],
        "width": WIDTH,
        "parameters": sum(p.numel() for p in model.parameters()),
        "seconds": round(model.cpu_seconds),
        "alive": store.examine(
            f"real, {system}, {seed}",
            model,
            [first_two(real("validation", SYSTEMS[system][1])).crop((slice(0, 256), slice(0, 256), slice(0, 1)))],
        ).alive,
    }
    found = probabilities(store, system, seed)
    share, v_rand = choose_share(found["validation"], real("validation", "raw"))
    columns = ["step", "loss", "v_rand", "validation_loss", "dice", "low", "high", "deviation"]
    curve = model.history.dropna(subset=["v_rand"]).reindex(columns=columns)
    curve["loss"] = [model.history["loss"][max(0, s - 50) : s].mean() + 1 for s in curve["step"]]
    rows = [facts | {"validation_v_rand": v_rand} | row for row in read(found["test"], share)]
    return {"em_real_curves": curve.to_dict("records"), "em_real": rows}


def run_mean(store: Store, system: str, turns: int = 1) -> list[dict]:
    """Score the mean of a system's networks. Of the system that ships, save the one that is best on the slices for choices."""

    def mean(turns, part):
        return np.mean([probabilities(store, system, seed, turns=turns)[part] for seed in SEEDS], axis=0)

    share, v_rand = choose_share(mean(1, "validation"), real("validation", "raw"))
    facts = {"steps": SETTINGS["real"], "width": WIDTH, "validation_v_rand": v_rand}
    rows = [facts | row for row in read(mean(turns, "test"), share, turns)]
    if turns > 1 or system != SHIPPED:
        return rows
    table = store.read("em_real")
    mine = table[(table["system"] == system) & (table["turns"] == 1) & (table["reading"] == "share")]
    best = mine.groupby("seed")["validation_v_rand"].first().drop(["mean", "mean of turns"], errors="ignore").idxmax()
    chosen = mine[mine["seed"] == best]
    card = {
        "input": SYSTEMS[system][1],
        "share_of_membrane": float(chosen["threshold"].iloc[0]),
        "chosen": f"best of {len(SEEDS)} seeds in V_rand of slices 12 to 15",
        "test": chosen[MEASURES].mean().round(3).to_dict(),
    }
    model = train(store, system, int(float(best)))
    store.save(f"em_real_{system.replace('-', '')}", model, model.card | card, half=True)
    return rows


def run_blocks(store: Store, system: str, seed: int) -> list[dict]:
    """Take layers out of a trained network, let them change places, and read its estimate after each residual block.

    Layers are residual blocks whose shortcut is the identity, or the U-Net's convolutions with as many maps in as out. Those of one
    stage, or of one level, can change places. The estimate after a block is the network's result without the branches of all later ones.
    """
    model, rng = train(store, system, seed), np.random.default_rng(seed)
    case = real("test", SYSTEMS[system][1]).crop((slice(160, 352), slice(160, 352), slice(0, 2)))

    def dice() -> float:
        return metrics.dice(inference.predict(model, case, progress=False) == 1, case.label == 1)

    rows, whole = [], dice()

    def note(what, count, layer=""):
        rows.append({"what": what, "count": count, "layer": layer, "dice": dice(), "whole": whole})

    layers = [layer for layer in attribution.removable(model) if layer != "last"]
    for layer in layers:
        with attribution.without(model, layer):
            note("removed", 1, layer)
    plain = [
        layer for layer in layers if getattr(model.get_submodule(layer), "hands_on", True)
    ]  # a U-Net's have as many maps in as out
    for count in [n for n in (2, 4, 8, 16, 34) if n <= len(plain)]:
        for _ in range(1 if count == len(plain) else 3):
            with attribution.without(model, rng.choice(plain, count, replace=False).tolist()):
                note("several removed", count)
    groups: dict = {}
    for layer in plain:
        of = (
            layer.rpartition(".")[0]
            if isinstance(model.get_submodule(layer), Bottleneck)
            else model.get_submodule(layer).in_channels
        )
        groups.setdefault(of, []).append(layer)
    everywhere = [pair for group in groups.values() for pair in itertools.combinations(group, 2)]
    for count in [n for n in (1, 2, 4, 8, 16) if n <= len(everywhere)]:
        for _ in range(4):
            pairs = [everywhere[n] for n in rng.choice(len(everywhere), count, replace=False)]
            with attribution.exchanged(model, pairs):
                note("exchanged", count)
    if system == "standardised":
        for count in range(len(layers) + 1):
            with attribution.without(model, layers[count:]):
                note("estimate", count, layers[count - 1] if count else "")
    return rows


def run_probe(store: Store, seed: int) -> list[dict]:
    """Find membranes by one threshold on raw intensities, and on what a trained pre-processor hands on.

    The sign and the threshold are those with the best Dice on the slices for choices.
    """
    model = train(store, "learned", seed)
    parts = {part: real(part, "raw") for part in ("validation", "test")}
    with torch.no_grad():
        after = {
            part: model.preprocessor(torch.from_numpy(case.image).permute(3, 0, 1, 2)).permute(1, 2, 3, 0)[0].numpy()
            for part, case in parts.items()
        }
    rows = []
    for what, seen in (("raw", {part: case.image[0] for part, case in parts.items()}), ("handed on", after)):
        chosen = []
        for sign in (1, -1):
            scores, truth = sign * seen["validation"], parts["validation"].label == 1
            threshold = metrics.best_threshold([scores], [truth])
            chosen.append((metrics.dice(scores > threshold, truth), sign, threshold))
        _, sign, threshold = max(chosen)
        rows.append({"what": what, "dice": metrics.dice(sign * seen["test"] > threshold, parts["test"].label == 1)})
    return rows


@cache
def blurred(part: str, sigma: float) -> np.ndarray:
    """Return the share of a part's pixels that are darker than each, after a blur: from 0 to 1, as a probability is."""
    case = real(part, "raw")
    rank = ndimage.gaussian_filter(case.image[0], (sigma, sigma, 0)).argsort(axis=None).argsort()
    return rank.reshape(case.shape) / rank.size


@cache
def chosen_sigma(sigmas: tuple) -> float:
    """Return the blur with the highest V_rand on the slices for choices, with the best share of membrane for each."""
    return max(sigmas, key=lambda sigma: choose_share(blurred("validation", sigma), real("validation", "raw"))[1])


def run_blur(sigmas: tuple) -> list[dict]:
    """Score blurred intensities as if they were probabilities, read as a network is."""
    sigma = chosen_sigma(sigmas)
    share, v_rand = choose_share(blurred("validation", sigma), real("validation", "raw"))
    return [{"sigma": sigma, "validation_v_rand": v_rand} | row for row in read(blurred("test", sigma), share)]


def run_start(store: Store, start: str, penalty: float) -> list[dict]:
    """Train the pipeline for a short while from one start of its pre-processor."""
    model = train(store, "learned", 0, start=start, penalty=penalty, what="start")
    history = model.history
    first = {"step": 0} | handed_on(start_network("learned", 0, start), first_two(real("validation", "raw")))
    rows = [first]
    for _, row in history.dropna(subset=["low"]).iterrows():
        recent = history["loss"][max(0, int(row["step"]) - 25) : int(row["step"])].mean() + 1
        rows.append({"step": int(row["step"])} | row[["low", "high", "deviation"]].to_dict() | {"loss": recent})
    return rows

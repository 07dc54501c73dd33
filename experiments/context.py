"""Mlynarski's two steps on brain phantoms: what do scores of 2D networks add to a 3D network, and is it that they see far?

Claims (Mlynarski et al. 2019): 2D features improve the 3D network (tables 1 and 3: 73.7 → 77.4, 77.0 → 80.9, 85.7 → 87.3 % for
enhancing, core, whole); the joint network beats the 2D networks that feed it; A, B and C are about equally good; far context is the
reason (section 2.1). Metric: Dice of the three regions. Test: 10 patients that nothing has seen (seeds 100 to 109). Three runs of the
whole pipeline, 2D networks included; intervals over runs and patients (`statistics.two_way`).

Grid: 2 mm. The 3D networks have two scales of the paper's three, so that they see 25 voxels, 50 mm of a head, where the paper's see 45
mm. Step one: 2D networks for three planes on 12 patients (seeds 0 to 11). Step two: 3D networks on cubes of the same 12 patients,
without scores ("standard") or with them (A, B, C). The paper trains both steps on the same patients, too. Controls:

* "A, near": its 2D networks see 23 pixels, no farther than the 3D network. What A has more than this row is far context;
* "2D, three planes": the sum of the three 2D networks' scores, and no 3D network;
* "standard, longer": the standard network with so many updates that it takes the CPU time of A and its 2D networks;
* "2D U-Net": the plain network of the paper's table 1, axial;
* "A, other cases": A trained on patients (seeds 12 to 23) that the 2D networks have not seen;
* "A, raw scores": the scores enter as they are. In all other rows they are divided by 4, to have the image's range (section 2.1).

The last two are made where `--only` names them.

All are trained with the paper's losses and a rate that falls to zero along a cosine: the 2D networks with the paper's steps of fixed
length, the 3D networks with Adam. With steps of fixed length, runs of a 3D network that differ by a millionth in their first weights
end several points apart, with Adam less than one (part "noise floor"). The score of each network's background is shifted by a number
chosen on four validation patients (seeds 200 to 203), the same candidates for all.

Labels as in BRATS 2017: 1 necrosis and non-enhancing core, 2 oedema, 3 enhancing core. Networks and scores are kept in runs/context
(1.4 GB). The tables are data/results/context_*.csv, which notebook 12 reads; networks of seed 0 become
data/checkpoints/context_*.safetensors.
"""

import json
import time
from collections.abc import Callable, Sequence
from functools import cache, partial

import numpy as np
import torch
from _context_page import report
from _frame import Row, Store, baseline_rows, baselines_row, main, scan, vitals_row
from puzzles import start_copy
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from scipy import ndimage
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from medseg_lite import context, inference, metrics, models, optimizers, recipes, transforms
from medseg_lite.models import Network
from medseg_lite.models.layers import init_he
from medseg_lite.models.mlynarski import ReducedUNet, Subnetwork, three_layers
from medseg_lite.paths import atomic_write
from medseg_lite.schedules import FromTorch
from medseg_lite.volume import Case

GRID = 2.0
TRAIN, OTHERS, TEST, VALIDATION = range(12), range(12, 24), range(100, 110), range(200, 204)
SEEDS, COPIES = range(3), range(3)
REGIONS = {"whole": [1, 2, 3], "core": [1, 3], "enhancing": [3]}
SETTINGS = {"steps_2d": 250, "steps_3d": 400}
FLAT = {"output": 64, "batch_size": 5, "accumulate": 2, "scheme": "uniform"}  # squares, nearly the shortest side of a slice
SOLID = {"output": 16, "batch_size": 4, "accumulate": 1}
OPTIMIZERS = {"flat": (optimizers.NormalizedSGD, 0.1), "solid": (torch.optim.Adam, 1e-3)}
WIDTH_2D, WIDTH_3D, NEAR_MAPS, UNET_WIDTH = 3 / 32, 1 / 4, 16, 3 / 32
SHIFTS = (0, 0.5, 1, 1.5, 2, 3)  # candidates for what is added to the background's score
LONGER = 6  # times the updates of the standard network
SOLIDS = {  # rows with a 3D network: variant, kind of its 2D networks, patients to train on, factor of the scores
    "standard": ("standard", None, TRAIN, 1),
    "A": ("a", "far", TRAIN, 1 / 4),
    "A, near": ("a", "near", TRAIN, 1 / 4),
    "B": ("b", "far", TRAIN, 1 / 4),
    "C": ("c", "far", TRAIN, 1 / 4),
    "standard, longer": ("standard", None, TRAIN, 1),
    "A, other cases": ("a", "far", OTHERS, 1 / 4),
    "A, raw scores": ("a", "far", TRAIN, 1),
}
LATER = ("A, other cases", "A, raw scores")  # made only where `--only` names them
PLANES = {f"2D {plane}": (plane,) for plane in context.PLANES} | {"2D, three planes": tuple(context.PLANES)}
# The first row of a run trains three 2D networks.
MINUTES = {"2D axial": 4.5, "A": 1.7, "A, near": 3.5, "C": 2.5, "standard, longer": 5}


class NearSighted(Subnetwork):
    """A 2D network of the paper's parts that sees 23 pixels: a subnetwork, three more layers, and a classifier."""

    halo = 12


def near_sighted() -> Network:
    features = nn.Sequential(ReducedUNet(4, NEAR_MAPS), three_layers(NEAR_MAPS, NEAR_MAPS))
    network = NearSighted(features, nn.Conv2d(NEAR_MAPS, 4, 1), 4, 4)
    init_he(network)
    return network


def solid(variant: str) -> Network:
    return models.mlynarski_3d(
        in_channels=4, classes=4, width=WIDTH_3D, variant=variant, features=0 if variant == "standard" else 12, scales=2
    )


FLATS = {  # kinds of 2D networks
    "far": partial(models.mlynarski_2d, in_channels=4, classes=4, width=WIDTH_2D),
    "near": near_sighted,
    "unet": partial(models.unet2d, in_channels=4, classes=4, width=UNET_WIDTH),
}


@cache
def patient(seed: int) -> Case:
    """Return a phantom with the four classes of BRATS 2017, numbered as in the paper."""
    case = scan(seed, spacing=GRID)
    info = case.info | {"classes": ("background", "necrosis and non-enhancing", "oedema", "enhancing")}
    label = np.array([0, 1, 2, 1, 3], np.uint8)[case.label]
    return transforms.standardise(case.replace(label=label, info=info, extra={}))


def dice(found: np.ndarray, case: Case) -> dict[str, float]:
    pairs = {name: (np.isin(found, labels), np.isin(case.label, labels)) for name, labels in REGIONS.items()}
    return {f"dice_{name}": metrics.dice(*pair) for name, pair in pairs.items()}


def label_of(scores: np.ndarray, case: Case, shift: float) -> np.ndarray:
    raised = scores.copy()
    raised[0] += shift
    return np.where(case.mask, raised.argmax(0), 0).astype(np.uint8)


def choose_shift(score: Callable[[int], np.ndarray], seeds: Sequence[int]) -> float:
    """Return what is added to the background's score to have the highest mean Dice of the three regions on validation patients."""
    scored = [(score(seed), patient(seed)) for seed in seeds]
    means = {s: np.mean([list(dice(label_of(scores, case, s), case).values()) for scores, case in scored]) for s in SHIFTS}
    return max(means, key=means.get)


def logits(model: Network, case: Case) -> np.ndarray:
    return inference.predict(model, case, output="logits", inside_mask=False, progress=False)


# ------------------------------------------------------------------------------------------------------- the trainings


def train(
    store: Store, name: str, build: Callable[[], Network], cases: Callable[[], tuple], *, kind: str, seed: int, **options
) -> tuple[Network, dict]:
    """Return a network and the facts of its training, from its file where it was trained before.

    Args:
        name: name of the network's file.
        cases: function that returns the cases to train on and those for validation, as the network sees them.
        kind: "flat" or "solid".
        options: `steps`; `copy`, the number of a copy whose initial weights are changed by a millionth; `optimizer`, with its rate;
            and what the recipe takes.
    """
    path = store.runs / f"{name}.safetensors"
    if not path.exists():
        clock, (seen, validation) = time.process_time(), cases()
        steps, copy = options.pop("steps"), options.pop("copy", 0)
        optimizer, rate = options.pop("optimizer", OPTIMIZERS[kind])
        torch.manual_seed(seed)
        model = recipes.mlynarski(
            seen,
            network=build(),
            classes=4,
            steps=steps,
            optimizer=partial(start_copy, optimizer, copy, lr=rate),
            schedule=lambda o: FromTorch(torch.optim.lr_scheduler.CosineAnnealingLR(o, steps)),
            validate_every=-(-steps // 5),
            engine={"validate": partial(validate, cases=validation)},
            seed=seed,
            device="cpu",
            progress=False,
            **(FLAT if kind == "flat" else SOLID) | options,
        )
        store.examine(name, model, seen)
        curve = model.history.dropna()[["step", "loss", *(f"dice_{region}" for region in REGIONS)]].to_dict("records")
        facts = {"seconds": round(time.process_time() - clock), "updates": steps, "curve": curve}
        store.put("context_curves", curve, {"network": name})
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(path) as temporary:
            save_file(model.state_dict(), temporary, metadata={"facts": json.dumps(facts)})
    model = build().eval()
    model.load_state_dict(load_file(path))
    with safe_open(path, framework="pt") as file:
        return model, json.loads(file.metadata()["facts"])


def validate(model: Network, cases: Sequence[Case]) -> dict[str, float]:
    found = [dice(inference.predict(model, case, progress=False), case) for case in cases]
    return {name: float(np.mean([scores[name] for scores in found])) for name in found[0]}


def flat_network(store: Store, kind: str, plane: str, seed: int, **options) -> tuple[Network, dict]:
    """Return a 2D network of a plane: "far" and "near" serve 3D networks, "unet" is a row of its own."""

    def cases():
        return [[context.facing(patient(s), plane) for s in part] for part in (TRAIN, VALIDATION)]

    name = options.pop("name", f"{kind}_{plane}_{seed}")
    options |= {
        "steps": SETTINGS["steps_2d"],
        "flip": plane != "sagittal",
    }  # the first axis of sagittal slices is not left to right
    return train(store, name, FLATS[kind], cases, kind="flat", seed=seed, **options)


@cache
def with_scores(store: Store, kind: str, seed: int, scale: float, seeds: Sequence[int]) -> list[Case]:
    """Return patients with the scores of three 2D networks as further channels, times a factor."""
    folder = store.runs / f"scores_{kind}_{seed}"
    networks = {plane: flat_network(store, kind, plane, seed)[0] for plane in context.PLANES}
    context.extract_scores(networks, [patient(s) for s in seeds], folder, progress=False)
    return [context.with_scores(patient(s), folder, scale=scale) for s in seeds]


def see(store: Store, row: str, seed: int, seeds: Sequence[int]) -> list[Case]:
    """Return patients as the 3D network of a row sees them."""
    _, kind, _, scale = SOLIDS[row]
    return with_scores(store, kind, seed, scale, seeds) if kind else [patient(s) for s in seeds]


def solid_network(store: Store, row: str, seed: int, *, name: str = "", **options) -> tuple[Network, dict]:
    variant, _, seeds, _ = SOLIDS[row]
    steps = SETTINGS["steps_3d"] * (LONGER if "longer" in row else 1)

    def cases():
        return see(store, row, seed, seeds), see(store, row, seed, VALIDATION)

    name = name or f"{row.replace(', ', '_').replace(' ', '_')}_{seed}"
    return train(store, name, partial(solid, variant), cases, kind="solid", seed=seed, steps=steps, **options)


# ------------------------------------------------------------------------------------------------------------ the rows


def multiplications(network: Network, side: int) -> float:
    """Return the multiplications for each voxel that a network predicts, in patches of the size of its training."""
    halo = getattr(network, "margin", 0)
    x = torch.zeros(1, network.in_channels, *[side + 2 * halo] * network.spatial_dims)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        predicted = network(x)
    return counter.get_total_flops() / 2 / predicted[0, 0].numel()


def system(store: Store, row: str, seed: int) -> tuple[Callable[[int], np.ndarray], dict]:
    """Return a row's scores as a function of a patient's seed, and what the row costs, all its networks included."""
    planes, kind = PLANES.get(row, ()), SOLIDS[row][1] if row in SOLIDS else "far"
    if row == "2D U-Net":
        used = [flat_network(store, "unet", "axial", seed)]
    else:
        used = [flat_network(store, kind, p, seed) for p in planes or context.PLANES if kind]
    last = [solid_network(store, row, seed)] if row in SOLIDS else []
    cost = {
        "parameters": sum(p.numel() for network, _ in used + last for p in network.parameters()),
        "multiplications": round(
            sum(multiplications(n, FLAT["output"]) for n, _ in used) + sum(multiplications(n, SOLID["output"]) for n, _ in last)
        ),
        "updates": (last or used)[0][1]["updates"],
        "seconds": sum(facts["seconds"] for _, facts in used + last),
    }

    def scores(number: int) -> np.ndarray:
        if last:
            return logits(last[0][0], see(store, row, seed, (number,))[0])
        if row == "2D U-Net":
            return logits(used[0][0], patient(number))
        case = with_scores(store, kind, seed, 1, (number,))[0]
        parts = case.image[4:].reshape(3, 4, *case.shape)
        return sum(parts[list(context.PLANES).index(plane)] for plane in planes)

    return scores, cost


def run(store: Store, row: str, seed: int) -> dict:
    """Score a row on the test patients; 2D networks also on their training patients, from whose scores 3D networks learn."""
    scores, cost = system(store, row, seed)
    shift = choose_shift(scores, VALIDATION)
    found = []
    for cohort, seeds in ({"test": TEST} | ({"train": TRAIN} if row in PLANES else {})).items():
        for number in seeds:
            case = patient(number)
            label = label_of(scores(number), case, shift)
            false = (label > 0) & (case.label == 0)
            rim = case.mask & ~ndimage.binary_erosion(case.mask, iterations=2)
            facts = {"set": cohort, "case": case.name} | dice(label, case)
            facts |= {"false_ml": false.sum() * GRID**3 / 1000, "false_rim_ml": (false & rim).sum() * GRID**3 / 1000}
            for what, volume in (("", label), ("true_", case.label)):
                for plane, axis in context.PLANES.items():
                    facts[f"{what}stripes_{plane}"] = metrics.slice_inconsistency(volume, axis=axis, mask=case.mask)
            found.append(facts | {"shift": shift} | cost)
    if seed == 0:
        ship(store, row, shift)
    return {"context": found}


def ship(store: Store, row: str, shift: float) -> None:
    """Save the networks of notebook 12 among the checkpoints; 3D networks with the shift, 2D networks as A takes their scores."""
    names = {f"2D {plane}": f"2d_{plane}" for plane in context.PLANES} | {"standard": "3d_standard", "A": "3d_a"}
    if row not in names:
        return
    if row in PLANES:
        model, facts = flat_network(store, "far", PLANES[row][0], 0)
    else:
        model, facts = solid_network(store, row, 0)
        model.classifier.bias.data[0] += shift
    seen = see(store, row, 0, (TRAIN[0],))[0] if row in SOLIDS else patient(TRAIN[0])
    card = {"steps": facts["updates"], "cpu_seconds": facts["seconds"], "trained_on": [patient(s).name for s in TRAIN]}
    card["channels"] = list(seen.channels)
    store.save(f"context_{names[row]}", model, card, half=True)


def run_copy(store: Store, method: str, training: str, copy: int) -> list[dict]:
    """Train a network from weights changed by a millionth and score it, without a chosen shift."""
    options = {"copy": copy, "name": f"copy_{method}_{training}_{copy}".replace(" ", "_")}
    if method == "2D axial":
        model, _ = flat_network(store, "far", "axial", 0, **options)
    else:
        if training == "normalised steps":
            options |= {"optimizer": (optimizers.NormalizedSGD, 0.05), "batch_size": 2, "accumulate": 2}
        model, _ = solid_network(store, method, 0, **options)
    test = see(store, method, 0, tuple(TEST)) if method in SOLIDS else [patient(s) for s in TEST]
    return [{"case": case.name} | dice(inference.predict(model, case, progress=False), case) for case in test]


def run_baselines() -> list[dict]:
    parts = ([patient(s) for s in seeds] for seeds in (TRAIN, VALIDATION, TEST))
    return baseline_rows(*parts, {f"dice_{region}": labels for region, labels in REGIONS.items()})


def plan(store: Store, seeds) -> list[Row]:
    rows = []
    for seed in seeds or SEEDS:
        for name in (*PLANES, *SOLIDS, "2D U-Net"):  # 2D networks first: the others take their scores
            minutes = MINUTES.get(name, 0.02 if name in PLANES else 1.1)
            job = partial(run, store, name, seed)
            rows.append(Row("context", {"row": name, "seed": seed}, job, minutes, part="networks", extra=name in LATER))
    for method, training in (
        ("standard", "normalised steps"),
        ("standard", "Adam"),
        ("A", "Adam"),
        ("2D axial", "normalised steps"),
    ):
        for copy in COPIES:
            key = {"method": method, "training": training, "copy": copy}
            job = partial(run_copy, store, method, training, copy)
            rows.append(Row("context_noise", key, job, 1.7 if method == "A" else 1.1, part="noise floor"))
    rows.append(baselines_row(store, "2 mm", run_baselines, 0.6))
    for plane in context.PLANES:
        facing = partial(lambda plane: [context.facing(patient(s), plane) for s in TRAIN], plane)
        rows.append(vitals_row(store, f"far_{plane}_0", f"context_2d_{plane}", facing))
    rows.append(vitals_row(store, "standard_0", "context_3d_standard", lambda: [patient(s) for s in TRAIN]))
    return rows


if __name__ == "__main__":
    main(__file__, plan, report, SETTINGS)

"""Mlynarski's 2D network where sequences are missing, in training (Table 2) and at test; and six networks that vote.

Claims (Mlynarski et al. 2019, section 3.3, Table 2, one network a row): pre-training the subnetworks on patients who lack a
sequence adds 1.7, 5.1 and 1.1 points of Dice (enhancing core, core, whole tumour) where few patients are complete; complete
data for all are better still. Section 2.3: a vote of six networks is better than one.

Ten generated gliomas (seeds 0 to 9) to train on and twenty other persons (seeds 200 to 219) to judge, at 4 mm. Necrosis and
non-enhancing core are one class, as in BRATS 2017. The networks are 2D, have an eighth of the feature maps, and see squares of
slices, half of them centred on a tumour.

* training: two of the ten cases have all four sequences, and of the other eight two each lack T1, T1c, T2 or FLAIR (the paper's
  proportions). A draw says which; weights and squares depend on it, too. "complete": the two complete cases only. "control":
  the same after pre-training each subnetwork on these two cases. "pretrained": the same after pre-training each subnetwork on
  the eight cases that have its sequence. "full": ten complete cases. Four draws, made one after the other (six were planned;
  `--seeds 4 5` adds two). Intervals are over draws and persons (`statistics.two_way`), of differences within a draw. What the
  other patients bring is "pretrained" less "control": both cost the same updates.
* noise: three networks of "complete" in draw 1 with initial weights changed by a millionth, with the training that this page had
  first ("first": 8 squares an update, steps of fixed length .1, halved on a slow loss) and with today's. A difference counts as
  decided where its interval leaves out zero and it is larger than the floor of today's training.
* test (draw 0): the network of "full", and one ("dropped") whose training squares lacked a random sequence half of the time,
  judged with each sequence in turn replaced by zeros.
* vote (2 mm): axial, coronal and sagittal networks, models 1 and 2, on ten complete cases, trained as at first. Their label
  maps of the first twelve persons, and that of their averaged probabilities, go to data/results/vote_predictions.npz. One set
  of six networks: whatever is said of the vote is said of these six, with intervals over persons.

The training was chosen in four trials on four persons (seeds 300 to 303), who also give the curves, for networks of "complete"
in draw 1: Adam with a rate that falls to zero along a cosine, 16 squares an update, and a random gain and offset of each
sequence of each square. Without that variation copies differ less, at a much lower Dice of these persons. Statistics of batch
normalisation that are measured again after training, and averages of the last states, changed little.

Methods without learning take what they need to know from the cases of "complete" for the first part, and for the second from
all ten cases without the sequence. The tables are data/results/missing_*.csv, which notebook 13 reads, and baselines.csv.
"""

import time
from functools import cache, partial

import numpy as np
import pandas as pd
import torch
from _frame import Row, Store, baseline_rows, baselines_row, beside_baselines, main, markdown, provenance, scan

from medseg_lite import context, inference, metrics, models, recipes, statistics, training, transforms
from medseg_lite.ensembles import hierarchical_vote
from medseg_lite.models import Network
from medseg_lite.optimizers import FromTorch

SEQUENCES = ("flair", "t1", "t1c", "t2")
ONE_CORE = np.array([0, 1, 2, 1, 3], np.uint8)  # BRATS 2015's classes as the paper's: core, oedema, enhancing core
REGIONS = {"enhancing": [3], "core": [1, 3], "whole": [1, 2, 3]}
DICE = [f"dice_{region}" for region in REGIONS]
TRAIN, PERSONS, VOTED_ON, VALIDATION = range(10), range(200, 220), range(200, 212), range(300, 304)
DRAWS, COPIES, COPIED_DRAW = range(4), (1, 2, 3), 1
VARIANTS = ("pretrained", "control", "complete", "full")
SETTINGS = {"steps": 200, "pretrain_steps": 150, "width": 0.125, "rate": 0.02}
VARY = 0.35  # of the random gain and offset of a sequence
VALIDATIONS = 9
VOTERS = [(plane, subnets) for subnets in (1, 2) for plane in context.PLANES]
FIRST = {"batch_size": 8, "learning_rate": 0.1, "window": 20}  # the first training; that of the voters
LEVELS = {  # thresholds that are tried, from the top of the tree
    "whole": np.arange(1, 7) / 6,
    "core": [0.01, 0.2, 0.25, 0.3, 0.34, 0.4, 0.5, 0.6, 0.7, 0.8, 1.0],
    "enhancing": [0.01, 0.2, 0.25, 0.34, 0.4, 0.5, 0.6, 0.7, 0.8, 1.0],
}
PAPERS, MAJORITIES = (0.4, 0.3, 0.4), (0.51, 0.5, 0.5)  # thresholds of the tree


@cache
def person(seed: int, spacing: float = 4.0):
    case = transforms.standardise(scan(seed, spacing=spacing))
    return case.replace(label=ONE_CORE[case.label])


def without(case, lack: str):
    return case.select([c for c in SEQUENCES if c != lack])


def lacking(draw: int) -> dict[int, str | None]:
    """Return the sequence that each training case lacks, by its seed."""
    order = np.random.default_rng(draw).permutation(TRAIN)
    return {int(seed): (None, *SEQUENCES)[n % 5] for n, seed in enumerate(order)}


def complete_cases(draw: int) -> list:
    return [person(s) for s, lack in lacking(draw).items() if lack is None]


def score(found: np.ndarray, case) -> dict:
    pairs = {r: (np.isin(found, labels), np.isin(case.label, labels)) for r, labels in REGIONS.items()}
    return {"case": case.name} | {f"dice_{region}": metrics.dice(*pair) for region, pair in pairs.items()}


def score_all(model: Network, cases) -> list[dict]:
    return [score(inference.predict(model, case, progress=False), case) for case in cases]


# ------------------------------------------------------------------------------------------------------------ training


def vary(image: torch.Tensor, label: torch.Tensor, *, rng) -> tuple[torch.Tensor, torch.Tensor]:
    """Give each sequence of each square a random gain and offset: two patients do not show how scanners differ."""
    size = (*image.shape[:2], 1, 1)
    gain, offset = (torch.from_numpy(rng.uniform(-VARY, VARY, size)).to(image) for _ in range(2))
    return image * (1 + gain) + offset, label


def fall_to_zero(optimizer, steps: int) -> FromTorch:
    return FromTorch(torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps))


def validate(model: Network) -> dict[str, float]:
    return pd.DataFrame(score_all(model, map(person, VALIDATION)))[DICE].mean().to_dict()


def train(cases: list, *, pretrain_on: list = (), first: bool = False, copy: int = 0, **options) -> Network:
    """Train a network.

    Args:
        cases: complete cases.
        pretrain_on: cases on which the subnetworks are trained before, each on those that have its sequence.
        first: whether to train as this experiment did at first.
        copy: number of a copy whose initial weights are changed by a millionth; 0 for none.
        options: further options of the recipe.
    """
    steps = max(2, SETTINGS["steps"])
    torch.manual_seed(options["seed"])
    model = models.mlynarski_2d(classes=4, width=SETTINGS["width"], subnets=options.pop("subnets", 1))
    if copy:
        training.perturb_weights(model, seed=copy)
    squares = {"accumulate": 1, "scheme": "foreground", "output": 32, "progress": False}
    for channel in SEQUENCES if pretrain_on else ():  # with steps of a fixed length, as in the paper
        how = squares | FIRST | {"batch_size": 16, "steps": SETTINGS["pretrain_steps"], "seed": options["seed"]}
        recipes.pretrain_subnetwork(model, channel, pretrain_on, channels=SEQUENCES, **how)
    settings = squares | {"steps": steps, "device": "cpu"}
    if first:
        settings |= FIRST
    else:
        settings |= {
            "batch_size": 16,
            "optimizer": lambda parameters: torch.optim.Adam(parameters, lr=SETTINGS["rate"]),
            "schedule": partial(fall_to_zero, steps=steps),
            "augment": vary,
            "validate_every": -(-steps // VALIDATIONS),
            "engine": {"validate": validate},
        }
    return recipes.mlynarski(cases, network=model, **settings | options)


def train_variant(variant: str, draw: int, **options) -> Network:
    complete, everyone = complete_cases(draw), [person(s) for s in TRAIN]
    if variant in ("pretrained", "control"):
        options["pretrain_on"] = list(complete)
    if variant == "pretrained":
        options["pretrain_on"] += [without(person(s), lack) for s, lack in lacking(draw).items() if lack]
    elif variant == "dropped":
        options["drop"] = 0.5
    return train(everyone if variant in ("full", "dropped") else complete, seed=draw, **options)


def run_training(store: Store, variant: str, draw: int) -> dict:
    cpu = time.process_time()
    model = train_variant(variant, draw)
    facts = {"updates": SETTINGS["steps"], "cpu_seconds": round(time.process_time() - cpu, 1)}
    signs = store.examine(f"{variant}, {draw}", model, [person(s) for s in TRAIN])
    facts |= {"alive": signs.alive} | provenance()
    curve = model.history.dropna()[["step", "loss", *DICE]].to_dict("records")
    return {"missing_curves": curve, "missing_training": [row | facts for row in score_all(model, map(person, PERSONS))]}


def run_copy(settings: str, copy: int) -> list[dict]:
    model = train_variant("complete", COPIED_DRAW, first=settings == "first", copy=copy)
    return [row | provenance() for row in score_all(model, map(person, PERSONS))]


def run_test(store: Store, variant: str, draw: int):
    model = train_variant(variant, draw)
    store.examine(f"test, {variant}, {draw}", model, [person(s) for s in TRAIN])
    for lack in (None, *SEQUENCES):
        for case in map(person, PERSONS):
            seen = case if lack is None else transforms.complete(without(case, lack), SEQUENCES)
            yield {"missing": lack or "none"} | score(inference.predict(model, seen, progress=False), case)


# ---------------------------------------------------------------------------------------------------------------- vote


def run_vote(store: Store) -> dict:
    """Return label maps (persons, networks, D, H, W) of six networks, of their averaged probabilities, and the truth."""
    voters = []
    for number, (plane, subnets) in enumerate(VOTERS):
        cases = [context.facing(person(s, 2.0), plane) for s in TRAIN]
        voters.append(train(cases, first=True, subnets=subnets, seed=number, output=64, flip=plane != "sagittal"))
        store.examine(f"vote, {plane} {subnets}", voters[-1], cases)
    maps, averages = [], []
    for case in (person(seed, 2.0) for seed in VOTED_ON):
        turned = [context.facing(case, plane) for plane, _ in VOTERS]
        each = [inference.predict(v, c, output="probabilities", progress=False) for v, c in zip(voters, turned)]
        each = [context.facing_back(probabilities, plane) for probabilities, (plane, _) in zip(each, VOTERS)]
        maps.append([p.argmax(0).astype(np.uint8) for p in each])
        averages.append(np.mean(each, 0).argmax(0).astype(np.uint8))
    arrays = {
        "seeds": np.array(VOTED_ON),
        "networks": np.array([f"{plane} {subnets}" for plane, subnets in VOTERS]),
        "maps": np.array(maps),
        "averages": np.array(averages),
        "truth": np.stack([person(s, 2.0).label for s in VOTED_ON]),
    }
    return {"vote_predictions.npz": arrays}


def run_merging(store: Store) -> list[dict]:
    """Score the six networks and what they give together, from the stored label maps."""
    with np.load(store.path("vote_predictions.npz")) as stored:
        seeds, names, maps, averages, truth = (stored[n] for n in ("seeds", "networks", "maps", "averages", "truth"))
    # Outside of these voxels everything is background whatever the thresholds.
    where = [(m > 0).any(0) | (a > 0) | (t > 0) for m, a, t in zip(maps, averages, truth)]
    votes, means, right = ([part[..., w] for part, w in zip(arrays, where)] for arrays in (maps, averages, truth))

    def dice(found: np.ndarray, n: int) -> dict:
        return {f"dice_{r}": metrics.dice(np.isin(found, k), np.isin(right[n], k)) for r, k in REGIONS.items()}

    @cache
    def tree(n: int, *thresholds: float) -> dict:
        return dice(hierarchical_vote(votes[n], thresholds=thresholds), n)

    def choose(persons: list[int]) -> tuple[float, ...]:
        chosen = list(PAPERS)
        for place, region in enumerate(LEVELS):
            tried = {}
            for level in LEVELS[region]:
                chosen[place] = float(level)
                tried[chosen[place]] = np.mean([tree(n, *chosen)[f"dice_{region}"] for n in persons])
            chosen[place] = max(tried, key=tried.get)
        return tuple(chosen)

    rows = []
    for n, seed in enumerate(seeds):
        found = {str(name): dice(votes[n][k], n) for k, name in enumerate(names)}
        counts = np.stack([(votes[n] == c).sum(0) for c in range(4)])
        found |= {"plurality": dice(counts.argmax(0), n), "averaged probabilities": dice(means[n], n)}
        found |= {"tree, the paper's thresholds": tree(n, *PAPERS), "tree, plain majorities": tree(n, *MAJORITIES)}
        chosen = choose([other for other in range(len(seeds)) if other != n])
        found["tree, thresholds from others"] = tree(n, *chosen) | dict(zip(("tumour", "core", "enhancing"), chosen))
        rows += [{"method": method, "case": int(seed)} | scores for method, scores in found.items()]
    return rows


# ------------------------------------------------------------------------------------------------------------ the rows


def run_baselines(task: str) -> list[dict]:
    regions, test = {f"dice_{region}": labels for region, labels in REGIONS.items()}, [person(s) for s in PERSONS]
    if task == "training":
        rows = [row for draw in DRAWS for row in baseline_rows(complete_cases(draw), complete_cases(draw), test, regions)]
        return pd.DataFrame(rows).groupby(["method", "case"], sort=False).mean().reset_index().to_dict("records")
    cases, lack = [person(s) for s in TRAIN], task.removeprefix("missing: ")
    if lack != "none":
        cases, test = ([without(case, lack) for case in part] for part in (cases, test))
    return baseline_rows(cases, cases, test, regions)


def plan(store: Store, seeds) -> list[Row]:
    rows = []
    for settings, minutes in (("first", 0.3), ("today", 0.5)):
        for copy in COPIES:
            key = {"settings": settings, "variant": "complete", "copy": copy}
            rows.append(Row("missing_noise", key, partial(run_copy, settings, copy), minutes, part="noise"))
    for draw in seeds or DRAWS:
        for variant in VARIANTS:
            key, minutes = {"variant": variant, "draw": draw}, 0.7 if variant in ("pretrained", "control") else 0.5
            rows.append(Row("missing_training", key, partial(run_training, store, variant, draw), minutes, part="training"))
    for variant in ("full", "dropped"):
        rows.append(
            Row("missing_test", {"variant": variant, "draw": 0}, partial(run_test, store, variant, 0), 0.7, part="test")
        )
    rows.append(Row("vote_predictions.npz", {}, partial(run_vote, store), minutes=15, part="vote"))
    rows.append(Row("missing_votes", {"voters": "six 2D networks"}, partial(run_merging, store), 0.2, part="merging"))
    tasks = ["training", *(f"missing: {lack}" for lack in ("none", *SEQUENCES))]
    return rows + [baselines_row(store, task, partial(run_baselines, task), 0.1) for task in tasks]


# ------------------------------------------------------------------------------------------------------------ the page


def with_mean(table: pd.DataFrame) -> pd.DataFrame:
    return table.assign(dice_mean=table[DICE].mean(axis=1))


def floors(noise: pd.DataFrame) -> pd.DataFrame:
    """Return the mean Dice of each copy and the noise floor: the largest difference between copies."""
    rows = []
    for key, copies in with_mean(noise).groupby(["settings", "variant"], sort=False):
        wide = copies.pivot(index="copy", columns="case", values="dice_mean")
        row = dict(zip(("settings", "variant"), key)) | {f"copy {n}": mean for n, mean in wide.mean(axis=1).items()}
        rows.append(row | ({"floor": statistics.noise_floor(wide.to_numpy())} if len(wide) > 1 else {}))
    return pd.DataFrame(rows)


def difference(table: pd.DataFrame, a: str, b: str, column: str) -> statistics.Interval | None:
    """Return the difference of two variants, within each draw that has both, with its interval over draws and persons."""
    wide = table.pivot(index="draw", columns=["variant", "case"], values=column)
    if not {a, b} <= set(wide.columns.get_level_values(0)):
        return None
    gain = (wide[a] - wide[b]).dropna()
    return statistics.two_way(gain.to_numpy()) if len(gain) > 1 else None


def compare(table: pd.DataFrame, floor: float) -> pd.DataFrame:
    """Return all differences. One is decided where its interval leaves out zero and it is larger than the noise floor."""
    rows = []
    pairs = [("pretrained", "control"), ("control", "complete"), ("pretrained", "complete"), ("full", "pretrained")]
    for a, b in pairs:
        for column in (*DICE, "dice_mean"):
            if found := difference(table, a, b, column):
                decided = found.decided and abs(found.mean) > floor
                row = {"difference": f"{a} − {b}", "score": column.removeprefix("dice_"), "mean": found.mean}
                row |= {"from": found.low, "to": found.high, "draws": found.runs, "decided": "yes" if decided else "no"}
                rows.append(row)
    return pd.DataFrame(rows)


def last_third(curves: pd.DataFrame) -> pd.DataFrame:
    """Return the mean validation Dice at the end, and what it gained in the last third of the updates."""
    rows = []
    for variant, mine in with_mean(curves).groupby("variant", sort=False):
        means = mine.groupby("step")["dice_mean"].mean()
        late = means[means.index >= 2 / 3 * means.index.max()]
        rows.append(
            {"variant": variant, "validation Dice": late.iloc[-1], "gain in the last third": late.iloc[-1] - late.iloc[0]}
        )
    return pd.DataFrame(rows)


def merging(votes: pd.DataFrame) -> list[str]:
    """Return the tables of the vote: mean scores, and differences with intervals over persons."""
    names = [f"{plane} {subnets}" for plane, subnets in VOTERS]
    wide = votes.pivot(index="method", columns="case")
    scores = {region: wide[f"dice_{region}"] for region in REGIONS}
    best = {region: table.loc[names].mean(axis=1).idxmax() for region, table in scores.items()}
    for region, table in scores.items():
        table.loc["mean of the six"], table.loc["best single network"] = table.loc[names].mean(), table.loc[best[region]]
    merged = [m for m in votes["method"].unique() if m not in names]
    means = pd.DataFrame({region: table.mean(axis=1) for region, table in scores.items()})
    order = [*names, "mean of the six", "best single network", *merged]
    rows = []
    for rival in ("mean of the six", "best single network", "plurality", "averaged probabilities"):
        for method in merged:
            row = {"these six networks": f"{method} − {rival}"}
            for region, table in scores.items():
                found = statistics.paired_t_test(table.loc[method], table.loc[rival])
                decided = found.low > 0 or found.high < 0
                row[region] = f"{found.mean:+.3f} ({found.low:+.3f} to {found.high:+.3f}){'' if decided else ', not decided'}"
            if method != rival:
                rows.append(row)
    return [markdown(means.loc[order].rename_axis("method").reset_index()), markdown(pd.DataFrame(rows))]


def report(store: Store) -> dict[str, str]:
    noise, table, curves, votes = (store.read(f"missing_{name}") for name in ("noise", "training", "curves", "votes"))
    test, blocks, networks = store.read("missing_test", keep_default_na=False), {}, {}
    floor = 0.0
    if not noise.empty:
        found = floors(noise)
        today = found.loc[found["settings"] == "today"]
        floor = today.get("floor", pd.Series(dtype=float)).max() if len(today) else 0.0
        blocks["noise"] = markdown(found)
    if not table.empty:
        networks["training"] = table.groupby("variant", sort=False)[DICE].mean()
        table = with_mean(table)
        columns = [*DICE, "dice_mean", "cpu_seconds"]
        means = table.groupby("variant", sort=False)[columns].mean().rename(columns=lambda c: c.removeprefix("dice_"))
        means.insert(0, "draws", table.groupby("variant")["draw"].nunique())
        draws = table.pivot_table(index="draw", columns="variant", values="dice_mean", sort=False)
        medians = (
            table.groupby("variant", sort=False)[[*DICE, "dice_mean"]].median().rename(columns=lambda c: f"median {c[5:]}")
        )
        texts = [means.reset_index(), medians.reset_index(), draws.reset_index()]
        blocks["training"] = "\n\n".join(map(markdown, texts))
        blocks["differences"] = markdown(compare(table, floor))
    if not curves.empty:
        blocks["curves"] = markdown(last_third(curves))
    if not test.empty:
        means = test.groupby(["variant", "missing"], sort=False)[DICE].mean()
        blocks["test"] = markdown(means.rename(columns=lambda c: c.removeprefix("dice_")).reset_index())
        for lack, rows in test.groupby("missing", sort=False):
            networks[f"missing: {lack}"] = rows.groupby("variant", sort=False)[DICE].mean()
    if not votes.empty:
        blocks["merging"] = "\n\n".join(merging(votes))
    return blocks | beside_baselines(store, networks) | store.dead_networks()


if __name__ == "__main__":
    main(__file__, plan, report, SETTINGS)

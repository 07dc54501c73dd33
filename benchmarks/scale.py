"""Training at scale: two processes against one, and what compiling, memory layout and half precision bring, for each network.

    python benchmarks/scale.py [--networks deepmedic kayalibay_unet3d] [--steps 5]

On a CPU the networks are narrow and the samples small. On a CUDA machine they have the papers' sizes; then the training steps,
a whole volume through the network and the CRF of a case are also set beside the papers' own times. Every way runs in a process of
its own, through the recipe of the paper and `training.fit`, sampling included; seconds are medians over the updates after the
first two. The page is filled anew after each.
"""

import json
import os
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from _measure import fill, markdown, options, run_alone, take_turns

from medseg_lite import inference, phantoms, recipes, transforms
from medseg_lite.crf import DenseCRF
from medseg_lite.engine import distributed

# Settings on a CPU and on a GPU; the latter are the papers'.
NETWORKS = {
    "deepmedic": ({"width": 0.3, "batch_size": 4}, {}),
    "kayalibay_unet3d": ({"width": 0.5, "crop": 32, "batch_size": 2}, {}),
    "fcn_fc_resnet": ({"width": 0.25, "crop": 64, "batch_size": 4}, {"crop": 128, "batch_size": 20}),
    "mlynarski_3d": ({"width": 0.25, "output": 4, "accumulate": 2}, {}),
    "mlynarski_2d": ({"width": 0.125, "output": 64, "batch_size": 2, "accumulate": 2}, {"output": 128}),
    "two_path_cnn": ({"width": 0.25, "phase2_steps": 0, "batch_size": 32}, {"phase2_steps": 0}),
}
WAYS = {
    "one process": {},
    "two processes": {},
    "channels last": {"channels_last": True},
    "bfloat16": {"precision": "bfloat16"},
    "torch.compile": {"compiled": True},
}
# Updates of a whole training, and what the papers report of it.
PAPERS = {"deepmedic": (70_000, "a day on a Titan X"), "kayalibay_unet3d": (11_000, "62 h on a K40, BRATS")}


def measure(network: str, way: str, steps: int) -> None:
    """Train in one way, in this process; print a line of JSON."""
    with distributed.joined("auto") as device:
        gpu = device != "cpu"
        case = transforms.standardise(phantoms.brain(0, spacing=1 if gpu else 2))
        engine = {"precision": "float32"} | WAYS[way]
        model = recipes.recipe_for(network)(
            [case],
            network=network,
            steps=steps,
            validate_every=steps,
            device=device,
            engine=engine,
            progress=False,
            **NETWORKS[network][gpu],
        )
        seconds = float(model.history["seconds"].diff().iloc[2:].median())
        peak = torch.cuda.max_memory_allocated() / 2**30 if gpu else None
        if distributed.rank() == 0:
            print(json.dumps({"seconds": seconds, "first": float(model.history["seconds"].iloc[0]), "gib": peak}))


def measure_case(network: str) -> None:
    """Run a whole volume through the network and, for DeepMedic, the CRF after it, on a GPU; print a line of JSON."""
    case = transforms.standardise(phantoms.brain(0, spacing=1))
    model = recipes.recipe_for(network)([case], network=network, steps=1, device="cuda", progress=False, **NETWORKS[network][1])

    def predict(turn: int) -> None:
        inference.predict(model, case, output="probabilities", progress=False)
        torch.cuda.synchronize()

    result = {"volume": float(np.median(take_turns({"": predict}, repeats=3)[""][:, 0])), "shape": list(case.shape)}
    if network == "deepmedic":
        crf, probabilities = DenseCRF().to("cuda"), inference.predict(model, case, output="probabilities", progress=False)

        def refine(turn: int) -> None:
            crf.refine(probabilities, case)
            torch.cuda.synchronize()

        result["crf"] = float(np.median(take_turns({"": refine}, repeats=3)[""][:, 0]))
    print(json.dumps(result))


def run(way: str, threads: int, *arguments: str) -> dict:
    """Run this script in a process of its own, or in two that share the threads."""
    two = way == "two processes"
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"] if two else []
    environment = {"OMP_NUM_THREADS": str(max(threads // 2, 1) if two else threads)}
    try:
        return run_alone([*launch, __file__, *arguments], environment, failure="torch.compile failed")
    except RuntimeError as error:
        return {"failed": str(error)}


def tabulate_ways(results: dict) -> pd.DataFrame:
    rows = []
    for network, found in results.items():
        base, row = found.get("one process", {}).get("seconds"), [network]
        for way in WAYS:
            one = found.get(way)
            if one is None or "failed" in one:
                row.append("not measured" if one is None else f"failed: {one['failed']}")
                continue
            ratio = f" (×{base / one['seconds']:.2f})" if base and way != "one process" else ""
            first = f", first update {one['first']:.0f} s" if "compile" in way else ""
            row.append(f"{one['seconds']:.3f}{ratio}{first}")
        rows.append(row)
    return pd.DataFrame(rows, columns=["network", *WAYS])


def tabulate_papers(results: dict, cases: dict) -> pd.DataFrame:
    """Set the times of a GPU beside the papers' own."""
    rows = []
    for network, found in cases.items():
        seconds = results[network].get("bfloat16", {}).get("seconds")
        if seconds is None or "failed" in found:
            rows.append([network, f"failed: {found.get('failed', 'no training in bfloat16')}", "", "", "", ""])
            continue
        updates, paper = PAPERS[network]
        volume = f"{found['volume']:.2f} s ({'×'.join(map(str, found['shape']))})"
        crf = f"{found['crf']:.2f} s" if "crf" in found else "–"
        rows.append([network, f"{1 / seconds:.1f}", f"{updates * seconds / 3600:.1f} h", paper, volume, crf])
    return pd.DataFrame(rows, columns=["network", "updates a second", "whole training", "the paper", "a volume", "CRF"])


def write(results: dict, cases: dict, given) -> None:
    gpu = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    small = "; ".join(f"{n}: " + ", ".join(f"{k} {v}" for k, v in s[0].items()) for n, s in NETWORKS.items() if n in results)
    about = f"{gpu}{', busy machine' if given.busy else ''}. Seconds of an update: forward, backward, update and "
    about += f"sampling, median over {given.steps - 2} after the first two. One process has "
    about += f"{given.threads} thread{'s' * (given.threads > 1)}, two have {max(given.threads // 2, 1)} each"
    busy = "Each number is from one run beside other work: factors below two say nothing. To be repeated on a quiet machine."
    size = "The papers' sizes." if gpu else f"Smaller than the papers' networks and samples ({small})."
    blocks = {
        "ways": markdown(tabulate_ways(results)),
        "size": f"{size}{' ' + busy if given.busy else ''}",
        "papers": markdown(tabulate_papers(results, cases)) if gpu else "There is no GPU here, so nothing is said about one.",
    }
    fill(__file__, given.results, about, blocks)


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=list(NETWORKS))
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="threads of one process; two get half of them each")
    parser.add_argument("--busy", action="store_true", help="say in the result that other work ran on the machine")
    parser.add_argument("--keep", type=Path, metavar="FILE", help="add to the results in this JSON file")
    parser.add_argument("--one", nargs=2, metavar=("NETWORK", "WAY"), help="measure a way in this process")
    parser.add_argument("--case", metavar="NETWORK", help="measure a whole volume in this process")
    given = parser.parse_args()
    if given.one:
        return measure(*given.one, given.steps)
    if given.case:
        return measure_case(given.case)
    results, cases = {}, {}
    if given.keep and given.keep.exists():
        results = json.loads(given.keep.read_text("utf-8"))
    for network in given.networks:
        for way in given.ways:
            if way == "two processes" and torch.cuda.is_available() and torch.cuda.device_count() < 2:
                continue
            found = run(way, given.threads, "--one", network, way, "--steps", str(given.steps))
            results.setdefault(network, {})[way] = found
            print(network, way, found, flush=True)
            if given.keep:
                given.keep.write_text(json.dumps(results), "utf-8")
            write(results, cases, given)
        if torch.cuda.is_available() and network in PAPERS:
            cases[network] = run("one process", given.threads, "--case", network)
            write(results, cases, given)


if __name__ == "__main__":
    main()

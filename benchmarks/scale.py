"""Training at scale: two processes against one, and what compiling, memory layout and half precision bring, for each network.

    python benchmarks/scale.py [--networks deepmedic kayalibay_unet3d] [--steps 5]

On a CPU the networks are narrow and the samples small. On a CUDA machine they have the papers' sizes; then the training steps,
a whole volume through the network and the CRF of a case are also set beside the papers' own times. Every way runs in a process of
its own, through the recipe of the paper and `training.fit`, sampling included; seconds are medians over the updates after the
first two. benchmarks/scale.md is written anew after each.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from datetime import date
from pathlib import Path

import numpy as np
import torch

from medseg_lite import inference, phantoms, recipes, transforms
from medseg_lite.crf import DenseCRF
from medseg_lite.engine import distributed

HERE = Path(__file__).parent
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
    """One way, in this process; prints a line of JSON."""
    with distributed.joined("auto") as device:
        gpu = device != "cpu"
        case = transforms.standardise(phantoms.brain(0, spacing=1 if gpu else 2))
        engine = {"precision": "float32"} | WAYS[way]
        model = recipes.of_network(network)(
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
    """A whole volume through the network and, for DeepMedic, the CRF after it; on a GPU."""
    case = transforms.standardise(phantoms.brain(0, spacing=1))
    model = recipes.of_network(network)([case], network=network, steps=1, device="cuda", progress=False, **NETWORKS[network][1])
    seconds = []
    for _ in range(4):
        torch.cuda.synchronize()
        start = time.perf_counter()
        probabilities = inference.predict(model, case, output="probabilities", progress=False)
        seconds.append(time.perf_counter() - start)
    result = {"volume": float(np.median(seconds[1:])), "shape": list(case.shape)}
    if network == "deepmedic":
        crf = DenseCRF().to("cuda")
        seconds = []
        for _ in range(4):
            start = time.perf_counter()
            crf.refine(probabilities, case)
            torch.cuda.synchronize()
            seconds.append(time.perf_counter() - start)
        result["crf"] = float(np.median(seconds[1:]))
    print(json.dumps(result))


def run(way: str, threads: int, *arguments: str) -> dict:
    """The same script in a process of its own, or in two that share the threads."""
    two = way == "two processes"
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"] if two else []
    threads = str(max(threads // 2, 1) if two else threads)
    done = subprocess.run(
        [sys.executable, *launch, __file__, *arguments],
        env=os.environ | {"OMP_NUM_THREADS": threads},
        capture_output=True,
        text=True,
        check=False,
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    if not lines:
        reason = (done.stderr.strip() or "no output").splitlines()[-1]
        return {"failed": reason[:120]}
    failed = [line for line in done.stdout.splitlines() if line.startswith("torch.compile failed")]
    return json.loads(lines[-1]) | ({"failed": failed[0][:120]} if failed else {})


def write(results: dict, cases: dict, options) -> None:
    gpu = torch.cuda.is_available()
    machine = torch.cuda.get_device_name() if gpu else f"{os.cpu_count()} CPU cores ({platform.machine()})"
    lines = [
        "# Training at scale",
        "",
        f"{date.today()}, {machine}, PyTorch {torch.__version__}{', busy machine' if options.busy else ''}. Seconds of an update: "
        f"forward, backward, update and sampling, median over {options.steps - 2} after the first two. One process has {options.threads} "
        f"thread{'s' * (options.threads > 1)}, two have {max(options.threads // 2, 1)} each.",
        "",
        "| network | " + " | ".join(WAYS) + " |",
        "|---" * (len(WAYS) + 1) + "|",
    ]
    for network, row in results.items():
        base = row.get("one process", {}).get("seconds")
        cells = []
        for way in WAYS:
            found = row.get(way)
            if found is None:
                cells.append("not measured")
            elif "failed" in found:
                cells.append(f"failed: {found['failed']}")
            else:
                ratio = f" (×{base / found['seconds']:.2f})" if base and way != "one process" else ""
                first = f", first update {found['first']:.0f} s" if "compile" in way else ""
                cells.append(f"{found['seconds']:.3f}{ratio}{first}")
        lines.append(f"| {network} | " + " | ".join(cells) + " |")
    lines += [
        "",
        "In brackets: how many times faster than one process in float32. Two processes share the batches of "
        "an update, or each batch, so they gain where each has a GPU, or cores, of its own.",
    ]
    if options.busy:
        lines += [
            "",
            "Each number is from one run beside other work: factors below two say nothing. To be repeated on a quiet machine.",
        ]
    if gpu:
        lines += [
            "",
            "## Beside the papers",
            "",
            "| network | updates a second | whole training | the paper | a volume | CRF |",
            "|---" * 6 + "|",
        ]
        for network, found in cases.items():
            seconds = results[network].get("bfloat16", {}).get("seconds")
            if seconds is None or "failed" in found:
                lines.append(f"| {network} | failed: {found.get('failed', 'no training in bfloat16')} |")
                continue
            updates, paper = PAPERS[network]
            volume = f"{found['volume']:.2f} s ({'×'.join(map(str, found['shape']))})"
            crf = f"{found['crf']:.2f} s" if "crf" in found else "–"
            lines.append(f"| {network} | {1 / seconds:.1f} | {updates * seconds / 3600:.1f} h | {paper} | {volume} | {crf} |")
        lines += [
            "",
            "The papers: less than 30 s a volume in one pass and 3 min for the CRF on a CPU (DeepMedic), 3 s a volume (Kayalibay).",
        ]
    else:
        small = "; ".join(
            f"{n}: " + ", ".join(f"{k} {v}" for k, v in s[0].items()) for n, s in NETWORKS.items() if n in results
        )
        lines += [
            "",
            f"Smaller than the papers' networks and samples ({small}).",
            "",
            "There is no GPU here, so nothing is said about one. On a machine that has one, the same command measures training at the "
            "papers' sizes, a whole volume and the CRF, beside the papers' own times.",
        ]
    lines += ["", "Repeat it: `python benchmarks/scale.py`"]
    (HERE / "scale.md").write_text("\n".join(lines) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=list(NETWORKS))
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument(
        "--threads", type=int, default=os.cpu_count(), help="of one process; two get half of them each, at least one"
    )
    parser.add_argument("--busy", action="store_true", help="say in the result that other work ran on the machine")
    parser.add_argument("--keep", type=Path, metavar="FILE", help="add to the results in this JSON file")
    parser.add_argument("--one", nargs=2, metavar=("NETWORK", "WAY"), help=argparse.SUPPRESS)
    parser.add_argument("--case", metavar="NETWORK", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        measure(*options.one, options.steps)
        return
    if options.case:
        measure_case(options.case)
        return
    results, cases = {}, {}
    if options.keep and options.keep.exists():
        results = json.loads(options.keep.read_text())
    for network in options.networks:
        for way in options.ways:
            if way == "two processes" and torch.cuda.is_available() and torch.cuda.device_count() < 2:
                continue
            found = run(way, options.threads, "--one", network, way, "--steps", str(options.steps))
            results.setdefault(network, {})[way] = found
            print(network, way, found, flush=True)
            if options.keep:
                options.keep.write_text(json.dumps(results))
            write(results, cases, options)
        if torch.cuda.is_available() and network in PAPERS:
            cases[network] = run("one process", options.threads, "--case", network)
            write(results, cases, options)


if __name__ == "__main__":
    main()

"""Two processes against one: the same weights and history from the same global batches."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from torch.distributed.run import get_args_parser

from medseg_lite import losses, models, training
from medseg_lite.cli import make_parser
from medseg_lite.engine import distributed
from medseg_lite.engine.gradients import Gradients
from medseg_lite.optimizers import NormalizedSGD, RMSpropNesterov
from medseg_lite.recipes import RECIPES, recipe_for
from medseg_lite.recipes.crossvalidation import size_of_update
from medseg_lite.sampling import Sampler, SegmentSampler
from medseg_lite.volume import Case

pytestmark = pytest.mark.slow

STEPS = 2


def case(seed: int = 0, shape=(34, 32, 8)) -> Case:
    image = np.random.default_rng(seed).normal(size=(2, *shape)).astype(np.float32)
    return Case(image=image, channels=("flair", "t1c"), name=f"noise {seed}", label=(image[0] > 0.8).astype(np.uint8))


def balanced(logits, target):
    return losses.balanced_cross_entropy(logits, target, target_weights=(0.4, 0.6))


def supervised(outputs, target):
    return losses.deep_supervision(outputs, target, loss=balanced)


# Network, its options, the sampler's, and how it is trained. Batches of 3 and 3 batches cannot be shared evenly by two.
RUNS = {
    "batch normalisation over a rolling window": (
        "deepmedic",
        {"dropout": 0.0},
        {"output": 3, "batch_size": 3},
        {"l1": 1e-4, "l2": 1e-3},
    ),
    "Dice of the batch": ("fc_resnet", {}, {"output": 32, "batch_size": 4, "spatial_dims": 2}, {"loss": losses.dice_loss}),
    "several batches of one": (
        "mlynarski_3d",
        {},
        {"output": 4, "batch_size": 1},
        {"loss": balanced, "accumulate": 3, "l2": 0.1},
    ),
    "several batches, each normalised by itself": (
        "mlynarski_2d",
        {},
        {"output": 32, "batch_size": 2, "spatial_dims": 2},
        {"loss": supervised, "accumulate": 3},
    ),
    "a shared batch with auxiliary outputs": (
        "mlynarski_2d",
        {},
        {"output": 16, "batch_size": 3, "spatial_dims": 2},
        {"loss": supervised},
    ),
}


def train(name: str, folder: Path | None = None, sampler=lambda s: s, steps: int = STEPS, **options):
    network, build, sampling, fitting = RUNS[name]
    torch.manual_seed(0)
    model = getattr(models, network)(in_channels=2, classes=2, width=0.1, **build)
    segments = SegmentSampler([case()], margin=model.margin, cut=getattr(model, "cut", None), **sampling)
    learner = NormalizedSGD if network.startswith("mlynarski") else RMSpropNesterov
    optimizer = learner(model.parameters(), lr=0.01 if learner is NormalizedSGD else 1e-3)
    if network == "mlynarski_2d":
        options["forward"] = model.with_auxiliary
    history = training.fit(
        model, sampler(segments), steps=steps, optimizer=optimizer, folder=folder, progress=False, **fitting, **options
    )
    return model, history


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def start(process: int, port: int, *arguments: str) -> subprocess.Popen:
    environment = os.environ | {
        "RANK": str(process),
        "LOCAL_RANK": str(process),
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(Path(__file__).parents[1]),
    }
    return subprocess.Popen(
        [sys.executable, __file__, *arguments], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def finish(processes: list[subprocess.Popen]) -> list[tuple[int, str]]:
    try:
        outputs = [p.communicate(timeout=400) for p in processes]
    finally:
        for p in processes:
            p.kill()
    return [(p.returncode, out + error) for p, (out, error) in zip(processes, outputs)]


def validate(model) -> dict[str, float]:
    assert distributed.rank() == 0  # the others wait
    return {"dice": float(next(model.parameters()).abs().mean())}


ON_CASES = training.validate_on([case(seed, (8, 9, 7)) for seed in (5, 6, 7)], regions={"bright": [1], "dark": [0]})


def through_cases(model) -> dict[str, float]:
    """A validation of a reader's, which only the first process makes, with all cases of the other one."""
    return {name: 1 - value for name, value in ON_CASES(model).items()}


class Segmented:
    """`inference.predict`, which notes the names of the cases."""

    def __init__(self):
        self.names, self.predict = [], training.inference.predict

    def __call__(self, model, case, **options):
        self.names.append(case.name)
        return self.predict(model, case, **options)


VALIDATIONS = {"shared": ON_CASES, "by the first": through_cases}


def train_watched(name: str, folder: Path | None = None) -> dict:
    """Return the scores of a training that is validated twice, and the cases that this process segments for them."""
    run, segmented = next(iter(RUNS)), Segmented()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training.inference, "predict", segmented)
        model, history = train(run, folder, validate_every=1, validate=VALIDATIONS[name])
    return {"scores": history.filter(like="dice").to_dict("list"), "cases": segmented.names, "weights": model.state_dict()}


class Deadly(Sampler):
    """A sampler whose process 1 dies by kill -9 when it asks for a batch. Its batches are those of another sampler."""

    def __init__(self, sampler, at: int):
        self.sampler, self.at, self.describe = sampler, at, sampler.describe

    def batch(self, step: int):
        if step == self.at and distributed.rank() == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return self.sampler.batch(step)


def work(folder: str, deadly: bool) -> None:
    """What each of the two processes does."""
    torch.set_num_threads(1)
    with distributed.joined("cpu"):
        if deadly:
            name = next(iter(RUNS))
            train(name, Path(folder), lambda s: Deadly(s, 5), steps=8, validate_every=2, validate=validate)
            return
        for n, name in enumerate(RUNS):
            mine = Path(folder) / str(n)
            model, history = train(name, mine, validate_every=2, validate=validate)
            torch.save((model.state_dict(), history.to_dict("list")), mine / f"process{distributed.rank()}.pt")
        for name in VALIDATIONS:
            torch.save(train_watched(name, Path(folder) / name), Path(folder) / name / f"process{distributed.rank()}.pt")
        with pytest.raises(ValueError, match="a batch of 1 and accumulate=1 leave nothing to do for some of the 2"):
            model = models.mlynarski_3d(in_channels=2, classes=2, width=0.1)
            sampler = SegmentSampler([case()], margin=model.margin, output=4, batch_size=1)
            training.fit(model, sampler, steps=1, optimizer=torch.optim.SGD(model.parameters(), 0.1), progress=False)


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """A folder with what two processes made of all the runs."""
    folder, port = tmp_path_factory.mktemp("two"), free_port()
    for code, output in finish([start(n, port, str(folder)) for n in range(2)]):
        assert code == 0, output
    return folder


@pytest.mark.parametrize("name", RUNS)
def test_two_processes_do_what_one_does(two, name):
    model, history = train(name, validate_every=2, validate=validate)
    folder = two / str(list(RUNS).index(name))
    (weights, rows), (others, _) = (torch.load(folder / f"process{n}.pt", weights_only=True) for n in range(2))
    assert all(torch.equal(weights[key], others[key]) for key in weights)
    for key, value in model.state_dict().items():
        torch.testing.assert_close(weights[key], value, rtol=1e-3, atol=5e-5, msg=lambda m, key=key: f"{key}: {m}")
    found = pd.DataFrame(rows).drop(columns="seconds")
    pd.testing.assert_frame_equal(found, history.drop(columns="seconds"), rtol=1e-4, check_exact=False)
    written = sorted(p.name for p in folder.iterdir() if not p.name.startswith("process"))
    assert written == ["best.safetensors", "history.csv", "last.pt"]


@pytest.mark.parametrize("name", VALIDATIONS)
def test_validation_of_two_processes(two, name):
    """Each segments a part of the cases of `validate_on`. Any other validation is made by the first process."""
    first, second = (torch.load(two / name / f"process{n}.pt", weights_only=True) for n in range(2))
    parts = {"shared": (["noise 5", "noise 7"], ["noise 6"]), "by the first": (["noise 5", "noise 6", "noise 7"], [])}[name]
    assert (first["cases"], second["cases"]) == tuple(2 * part for part in parts)
    assert first["scores"] == second["scores"]
    model = models.deepmedic(in_channels=2, classes=2, width=0.1, dropout=0.0)
    model.load_state_dict(first["weights"])
    model.eval()
    scores = {score: values[-1] for score, values in first["scores"].items()}
    assert list(scores) == ["dice_bright", "dice_dark"] and scores == VALIDATIONS[name](model)  # to the last digit
    best = models.load(two / name / "best.safetensors").card
    assert best["dice_bright"] == max(first["scores"]["dice_bright"])


def test_a_killed_process_ends_the_run_and_it_can_go_on(tmp_path):
    port = free_port()
    (code, output), (killed, _) = finish([start(n, port, str(tmp_path), "deadly") for n in range(2)])
    assert killed == -signal.SIGKILL and code == 1
    assert (
        "ConnectionError: another process of this run has ended or cannot be reached, so process 0 stops; the same command goes on from "
        f"update 4, in {tmp_path}/last.pt ("
    ) in output
    name = next(iter(RUNS))
    whole, history = train(name, steps=8, validate_every=2, validate=validate)
    model, resumed = train(name, tmp_path, steps=8, validate_every=2, validate=validate)  # as one process
    assert len(resumed) == 8
    pd.testing.assert_frame_equal(resumed.drop(columns="seconds"), history.drop(columns="seconds"), rtol=1e-3)
    for key, value in whole.state_dict().items():
        torch.testing.assert_close(model.state_dict()[key], value, rtol=1e-3, atol=1e-4)


@pytest.fixture
def alone(tmp_path):
    """A group of this process alone, in which what several processes do can be looked at."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("shape", [(3, 2, 4), (2, 2, 3, 2), (2, 2, 2, 2, 2)])
def test_normalisation_and_its_gradient(alone, shape):
    """Against PyTorch's own batch normalisation, and the gradient against finite differences."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=generator, dtype=torch.float64).mul(3).add(5).requires_grad_()
    weight, bias = (torch.randn(2, generator=generator, dtype=torch.float64).requires_grad_() for _ in range(2))
    y, mean, var = distributed._Normalise.apply(x, weight, bias, 1e-5)
    running = torch.zeros(2, dtype=torch.float64), torch.ones(2, dtype=torch.float64)
    expected = torch.nn.functional.batch_norm(x, *running, weight, bias, training=True, momentum=1.0, eps=1e-5)
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close((mean, var), running)
    assert torch.autograd.gradcheck(lambda *given: distributed._Normalise.apply(*given, 1e-5)[0], (x, weight, bias))


def test_normalisation_in_half_precision(alone):
    x = torch.randn(4, 3, 5, 5, generator=torch.Generator().manual_seed(0)).bfloat16().requires_grad_()
    y, mean, _ = distributed._Normalise.apply(x, torch.ones(3), torch.zeros(3), 1e-5)
    y.sum().backward()
    assert y.dtype == x.grad.dtype == torch.bfloat16 and mean.dtype == torch.float32  # sums in full precision
    assert float(y.detach().float().mean().abs()) < 1e-2


def test_shares(monkeypatch):
    monkeypatch.setattr(distributed, "world_size", lambda: 3)
    assert [(s.start, s.stop) for s in distributed.shares(7)] == [(0, 3), (3, 5), (5, 7)]


def test_deal_out(monkeypatch):
    """Three processes and seven items, some of which take part in turn; more processes than items."""
    monkeypatch.setattr(distributed, "world_size", lambda: 3)
    for items in (range(7), range(2), []):
        parts: list[list[int]] = []
        for rank in range(3):
            monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
            monkeypatch.setattr(distributed, "all_gather", lambda own, parts=parts: parts.append(own) or [[None] * 9] * 3)
            distributed.deal_out(lambda n: n * n, items)
        assert sorted(n for part in parts for n in part) == [n * n for n in items]
        assert max(map(len, parts)) - min(map(len, parts)) <= 1
        monkeypatch.setattr(distributed, "all_gather", lambda own, parts=parts: parts)
        assert distributed.deal_out(lambda n: n * n, items) == [n * n for n in items]


def test_alone(alone, monkeypatch):
    """Within the block nothing waits for the other processes, of which this one says there are three."""
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 3)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 2)
    with distributed.alone():
        assert (distributed.rank(), distributed.world_size()) == (0, 1)
        assert distributed.all_gather("a") == ["a"] and distributed.deal_out(str, [1, 2]) == ["1", "2"]
        with distributed.alone():
            pass
        assert distributed.world_size() == 1
    with pytest.raises(RuntimeError, match="power cut"), distributed.alone():
        raise RuntimeError("power cut")
    assert (distributed.rank(), distributed.world_size()) == (2, 3)


# ------------------------------------------------------------------------------------------- one process on each device


@pytest.fixture
def rank_two(monkeypatch):
    """The environment of the third of four processes; returns how it joins the group, on what, and which device is tried first."""
    for name, value in {"RANK": "2", "LOCAL_RANK": "2", "WORLD_SIZE": "4"}.items():
        monkeypatch.setenv(name, value)
    seen = []
    monkeypatch.setattr(torch.distributed, "init_process_group", lambda backend, timeout: seen.append(backend))
    monkeypatch.setattr(torch.distributed, "destroy_process_group", lambda: None)
    monkeypatch.setattr(distributed, "find_device", lambda name: seen.append(f"try {name}") or torch.device(name))
    return seen


def there_are(monkeypatch, kind: str, count: int, *backends: str) -> None:
    module = torch.get_device_module(kind)
    monkeypatch.setattr(module, "is_available", lambda: True)
    monkeypatch.setattr(module, "device_count", lambda: count)
    monkeypatch.setattr(module, "set_device", lambda device: None)
    monkeypatch.setattr(torch.distributed, "is_backend_available", lambda name: name in ("gloo", *backends))


@pytest.mark.parametrize(
    "asked, kind, backends, found",
    [
        ("auto", "cuda", ["nccl"], ["try cuda:2", "cpu:gloo,cuda:nccl"]),
        ("cuda:0", "cuda", ["nccl"], ["try cuda:2", "cpu:gloo,cuda:nccl"]),
        ("xpu", "xpu", ["xccl", "ccl"], ["try xpu:2", "cpu:gloo,xpu:xccl"]),
        ("xpu", "xpu", ["ccl"], ["try xpu:2", "cpu:gloo,xpu:ccl"]),
        ("cpu", "cuda", ["nccl"], ["try cpu", "gloo"]),
    ],
)
def test_each_process_takes_the_accelerator_of_its_number(rank_two, monkeypatch, asked, kind, backends, found):
    """No other one is touched, for a process that tries the first GPU keeps memory there."""
    there_are(monkeypatch, kind, 4, *backends)
    with distributed.joined(asked) as device:
        assert device == found[0].removeprefix("try ")
    assert rank_two == found


@pytest.mark.parametrize(
    "asked, count, backends, message",
    [
        ("cuda", 2, ["nccl"], "this machine has 2 GPUs; start at most as many processes, --nproc-per-node 2"),
        ("cuda", 1, ["nccl"], "this machine has 1 GPU; start at most as many processes, --nproc-per-node 1"),
        (
            "cuda",
            4,
            [],
            r"cannot exchange tensors between processes on cuda \(it has no nccl\); start one process, or give --device cpu",
        ),
        ("xpu", 4, [], r"between processes on xpu \(it has no xccl or ccl\); start one process"),
        ("mps", 4, [], "cannot exchange tensors between processes on mps; start one process, or give --device cpu"),
    ],
)
def test_devices_that_several_processes_cannot_use(rank_two, monkeypatch, asked, count, backends, message):
    if asked != "mps":
        there_are(monkeypatch, asked, count, *backends)
    with pytest.raises(ValueError, match=message), distributed.joined(asked):
        pass


def test_errors_of_nccl_are_said_with_their_reason(monkeypatch):
    """NCCL's errors may come from a process that ended, or from this machine; PyTorch's text says more."""
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    reason = "NCCL error in: NCCLUtils.hpp:275, unhandled system error (run with NCCL_DEBUG=INFO for details)\n" + "x" * 900
    with pytest.raises(ConnectionError, match="has ended or cannot be reached, so process 0 stops, hint") as caught:
        with distributed.companions(lambda: ", hint"):
            raise torch.distributed.DistBackendError(reason)
    assert str(caught.value).endswith(
        "(NCCL error in: NCCLUtils.hpp:275, unhandled system error (run with NCCL_DEBUG=INFO for details) …)"
    )


# ------------------------------------------------------------------------------ how many processes can share an update

# By hand, from the recipes: samples of a batch, batches of an update.
UPDATES = {
    "deepmedic-brats2015": (10, 1),
    "deepmedic-msd-brain": (10, 1),
    "havaei-brats2013": (128, 1),
    "havaei-brats2013-cascade": (128, 1),
    "kayalibay-brats2015": (1, 1),
    "kayalibay-hands": (1, 1),
    "drozdzal-isbi2012": (8, 1),
    "drozdzal-promise12": (24, 1),
    "drozdzal-msd-prostate": (24, 1),
    "drozdzal-lits": (20, 1),
    "mlynarski-brats2017-axial": (4, 10),
    "mlynarski-brats2017-coronal": (4, 10),
    "mlynarski-brats2017-sagittal": (4, 10),
    "mlynarski-brats2017-3d": (1, 5),
}


class Stopped(Exception):
    pass


@pytest.mark.parametrize("name", RECIPES)
def test_size_of_an_update(name, monkeypatch):
    """What the recipe trains with is what `size_of_update` says, and what stands in the table above."""
    recipe = RECIPES[name]
    channels = [*recipe.channels, *(f"axial {n}" for n in range(4 if recipe.needs == "scores" else 0))]
    image = np.random.default_rng(0).normal(size=(len(channels), 33, 33, 33)).astype(np.float32)
    label = (image[0] > 1).astype(np.uint8)
    small = {"drozdzal": {"crop": 32}, "kayalibay": {"crop": 32}, "mlynarski": {"output": 16}}.get(name.split("-")[0], {})
    if recipe.needs == "first":
        small["first"] = models.two_path_cnn(in_channels=4, classes=recipe.classes, width=0.1)
    found = []

    def fit(model, sampler, *, accumulate=1, **options):
        found.append((len(sampler.batch(0)[1]), accumulate))
        raise Stopped

    monkeypatch.setattr(training, "fit", fit)
    with pytest.raises(Stopped):
        settings = {**recipe.settings, **small, "width": 0.1, "classes": recipe.classes, "network": recipe.network}
        recipe_for(recipe.network)([Case(image, channels, "noise", label)], **settings)
    assert found == [size_of_update(recipe)] == [UPDATES[name]]


@pytest.mark.parametrize("name", RECIPES)
def test_too_many_processes_are_told_what_to_do(alone, name, monkeypatch):
    batch, accumulate = UPDATES[name]
    most = max(batch, accumulate)
    monkeypatch.setattr(distributed, "world_size", lambda: most)
    distributed.check_enough(batch, accumulate)
    model = torch.nn.Sequential(torch.nn.Linear(1, 2))
    model.spatial_dims = 3
    gradients = Gradients(model, losses.cross_entropy, accumulate=accumulate)
    # Every process has work: a batch of its own, or a sample of each.
    if gradients.own_batches:
        assert all(len(range(rank, accumulate, most)) == 1 for rank in range(most))
    else:
        assert all(share.stop - share.start == 1 for share in distributed.shares(batch))
    monkeypatch.setattr(distributed, "world_size", lambda: most + 1)
    gradients = Gradients(model, losses.cross_entropy, accumulate=accumulate)
    assert not gradients.own_batches
    message = (
        rf"a batch of {batch} and accumulate={accumulate} leave nothing to do for some of the {most + 1} processes; start at most "
        rf"{most}, give one of the two at least {most + 1} .*train --folds-on-gpus"
    )
    with pytest.raises(ValueError, match=message):
        gradients(iter([(torch.ones(batch, 1), torch.zeros(batch).long())] * accumulate), 1)


def test_the_readme_has_the_table():
    text = (Path(__file__).parents[1] / "README.md").read_text("utf-8")
    rows = re.findall(r"^\| `([\w-]+)` \| (?:a batch|(\d+) batches) of (\d+) \w+ \| (\d+) \|$", text, re.MULTILINE)
    assert [name for name, *_ in rows] == list(RECIPES)
    for name, batches, samples, most in rows:
        update = int(samples), int(batches or 1)
        assert update == size_of_update(RECIPES[name]) and int(most) == max(update)


@pytest.mark.skipif(os.name == "nt", reason="bash")
def test_slurm_scripts_of_the_readme(tmp_path):
    """Both run with stand-ins for Slurm's programs; what they start is parsed by torchrun's parser and ours."""
    text = (Path(__file__).parents[1] / "README.md").read_text("utf-8")
    scripts = re.findall(r"^```bash\n(#!/bin/bash\n.*?)```", text, re.MULTILINE | re.DOTALL)
    assert len(scripts) == 2
    for name, body in {"scontrol": "printf 'node7\\nnode8\\n'", "srun": 'printf "%s\\n" "$@"'}.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{body}\n")
        (tmp_path / name).chmod(0o755)
    slurm = {"SLURM_CPUS_PER_TASK": "8", "SLURM_ARRAY_TASK_ID": "3", "SLURM_JOB_NODELIST": "node[7-8]"}
    slurm |= {"SLURM_JOB_NUM_NODES": "2", "SLURM_JOB_ID": "99", "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    started = [
        subprocess.run(["bash", "-eu", "-c", script], env=os.environ | slurm, capture_output=True, text=True, check=True)
        for script in scripts
    ]
    array, nodes = (run.stdout.splitlines() for run in started)
    assert array[:4] == ["--cpus-per-task=8", "python", "-m", "medseg_lite"]
    fold = make_parser().parse_args(array[4:])
    assert (fold.network, fold.fold, fold.out) == ("deepmedic-msd-brain", 3, "runs/brains")
    assert f"#SBATCH --array=0-{RECIPES[fold.network].folds - 1}\n" in scripts[0]

    assert nodes[:2] == ["--cpus-per-task=8", "torchrun"]
    launch = get_args_parser().parse_args(nodes[2:])
    assert (launch.nnodes, launch.nproc_per_node, launch.rdzv_id) == ("2", "gpu", "99")
    assert (launch.rdzv_backend, launch.rdzv_endpoint) == ("c10d", "node7:29500")
    assert launch.module and launch.training_script == "medseg_lite"
    options = make_parser().parse_args(launch.training_script_args)
    assert 2 * 4 <= max(size_of_update(RECIPES[options.network])), "the eight processes of the script"


def test_one_process_is_left_alone():
    with distributed.joined("cpu") as device:
        assert device == "cpu" and distributed.world_size() == 1 and distributed.rank() == 0
        assert distributed.all_gather(3) == [3] and distributed.broadcast("a") == "a" and distributed.total(2.5) == 2.5
    with pytest.raises(ValueError, match="PyTorch sees no CUDA GPU"), distributed.joined("cuda:1"):
        pass
    with pytest.raises(RuntimeError, match="connection closed"), distributed.companions():
        raise RuntimeError("connection closed by peer")  # of something else: there is no other process


if __name__ == "__main__":
    work(sys.argv[1], "deadly" in sys.argv)

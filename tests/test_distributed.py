"""Two processes against one: the same weights and history from the same global batches."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from medseg_lite import losses, models, training
from medseg_lite.engine import distributed
from medseg_lite.optimizers import NormalizedSGD, RMSpropNesterov
from medseg_lite.sampling import Sampler, SegmentSampler
from medseg_lite.volume import Case

pytestmark = pytest.mark.slow

STEPS = 2


def case() -> Case:
    rng = np.random.default_rng(0)
    image = rng.normal(size=(2, 34, 32, 8)).astype(np.float32)
    return Case(image=image, channels=("flair", "t1c"), name="noise", label=(image[0] > 0.8).astype(np.uint8))


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


def test_a_killed_process_ends_the_run_and_it_can_go_on(tmp_path):
    port = free_port()
    (code, output), (killed, _) = finish([start(n, port, str(tmp_path), "deadly") for n in range(2)])
    assert killed == -signal.SIGKILL and code == 1
    assert (
        f"ConnectionError: another process of this run has ended, so process 0 stops; the same command goes on from update 4, in {tmp_path}"
        in output
    )
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

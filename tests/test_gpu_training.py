"""Training on a GPU in name only (`fake_device`): what the CPU waits for, number types, states, and memory that runs out."""

from __future__ import annotations

import gc
import itertools

import fake_device
import numpy as np
import pytest
import torch
from test_first_losses import RUNS
from torch.utils._python_dispatch import TorchDispatchMode

from medseg_lite import losses, models, paths
from medseg_lite.devices import send
from medseg_lite.engine.gradients import Engine, Gradients
from medseg_lite.engine.precision import TrainingPrecision
from medseg_lite.models.layers import RollingBatchNorm
from medseg_lite.optimizers import RMSpropNesterov
from medseg_lite.sampling import SegmentSampler
from medseg_lite.training import fit

aten = torch.ops.aten


class BlockingCopies(TorchDispatchMode):
    """Counts the copies from the CPU to a GPU that wait until the GPU has done all that it was given before."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, kinds, args=(), kwargs=None):
        kwargs = kwargs or {}
        if (
            func is aten._to_copy.default
            and args[0].device.type == "cpu"
            and kwargs.get("device", args[0].device).type != "cpu"
        ):
            self.count += not kwargs.get("non_blocking", False)
        return func(*args, **kwargs)


@pytest.fixture
def setup(noise_case):
    """`setup(device)`: network with dropout and batch normalisation, sampler, and keywords for `fit`, the same each time."""

    def build(device="cuda", *, optimizer=RMSpropNesterov, lr=1e-2, scale=1.0, seed=0, **options):
        torch.manual_seed(seed)
        model = models.dm2d_seg(in_channels=1, classes=2, width=0.1, **options).to(device)
        case = noise_case((18, 18, 4), channels=("flair",))
        case = case.replace(image=case.image * np.float32(scale))
        sampler = SegmentSampler([case], output=3, margin=model.margin, cut=model.cut, spatial_dims=2, batch_size=4, seed=1)
        return model, sampler, {"optimizer": optimizer(model.parameters(), lr=lr), "progress": False, "validate_every": 4}

    return build


def weights_of(model) -> dict[str, torch.Tensor]:
    return {name: value.detach().to("cpu", copy=True) for name, value in model.state_dict().items()}


def assert_same(ours: dict, theirs: dict) -> None:
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        assert torch.equal(ours[name], value), name


def crash_at(call: int):
    """A loss function whose call number `call` fails."""
    calls = itertools.count(1)

    def loss(logits, label):
        if next(calls) == call:
            raise RuntimeError("power cut")
        return losses.cross_entropy(logits, label)

    loss.__qualname__ = losses.cross_entropy.__qualname__  # for a run it is the same loss
    return loss


# ------------------------------------------------------------------------------------------------- waiting for the GPU

RECIPES = (
    "deepmedic deepmedic",
    "kayalibay jaccard",
    "havaei two_path_cnn",
    "drozdzal fcn_fc_resnet",
    "mlynarski 2d",  # two batches an update
    "mlynarski 3d",
)


@pytest.mark.parametrize("precision", ["float32", "float16"])
@pytest.mark.parametrize("name", RECIPES)
def test_the_cpu_waits_once_an_update(name, precision):
    """For loss and gradient together. In float16 an update whose gradients are not finite is skipped, after two more waits."""
    recipe, options = RUNS[name]
    seen = []
    with fake_device.cuda("A100") as gpu, BlockingCopies() as copies:

        def note(row):
            seen.append((row["step"], gpu.syncs.total(), copies.count))

        recipe(**options, device="cuda", engine={"precision": precision, "on_update": note})
    steps, waits, blocking = np.diff(seen, axis=0).T
    inside = steps == 1  # not from one phase of a training to the next
    assert inside.sum() >= 4 and 1 in waits[inside]
    assert set(waits[inside]) <= ({1} if precision == "float32" else {1, 3})
    assert not blocking[inside].any()  # batches, and weights of classes


@pytest.mark.parametrize("mask", [False, True])
def test_no_loss_waits(mask):
    with fake_device.cuda() as gpu:
        logits, target = torch.randn(2, 3, 4, 4, device="cuda"), torch.randint(3, (2, 4, 4), device="cuda")
        inside = torch.randint(2, (2, 4, 4), device="cuda") > 0 if mask else None
        weights = torch.tensor([0.2, 0.3, 0.5], device="cuda")
        gpu.syncs.clear()
        losses.cross_entropy(logits, target, mask=inside, class_weights=[1, 2, 3])
        losses.cross_entropy(logits, target, mask=inside, class_weights=weights)
        losses.balanced_cross_entropy(logits, target, target_weights=weights)
        losses.balanced_cross_entropy(logits, target, target_weights=(0.7, 0.1, 0.2))
        losses.jaccard_distance(logits, target)
        losses.dice_loss(logits, target)
        assert not gpu.syncs


def test_rolling_batch_norm_on_a_gpu_does_what_it_does_on_the_cpu():
    batches = torch.randn(7, 5, 2, 3, generator=torch.Generator().manual_seed(0))

    def run(device, sync=lambda: None):
        norm = RollingBatchNorm(2, window=4).to(device)
        for x in batches.to(device):
            norm(x)
        return norm

    expected = run("cpu").state_dict()
    with fake_device.cuda() as gpu:
        norm = RollingBatchNorm(2, window=4).to("cuda")
        there = batches.to("cuda")
        gpu.syncs.clear()
        for x in there:
            norm(x)
        assert not gpu.syncs
        assert_same(weights_of(norm), expected)


def test_rolling_batch_norm_is_one_compiled_graph():
    torch._dynamo.reset()
    found = torch._dynamo.explain(RollingBatchNorm(2, window=4))(torch.randn(5, 2, 3))
    assert found.graph_count == 1 and found.graph_break_count == 0


def test_only_cuda_is_not_waited_for():
    with fake_device.cuda(), BlockingCopies() as copies:
        assert send(torch.ones(2), torch.device("cuda")).is_cuda and copies.count == 0
    with fake_device.mps(), BlockingCopies() as copies:
        assert send(torch.ones(2), torch.device("mps")).is_mps and copies.count == 1


# --------------------------------------------------------------------------------------------------------- number types


@pytest.mark.parametrize(
    ("preset", "expected"), [("T4", torch.float32), ("L4", torch.bfloat16), ("A100", torch.bfloat16), ("mps", torch.float32)]
)
def test_auto_by_gpu(preset, expected, setup, capsys, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: 91900)
    paths.say_once.cache_clear()
    with fake_device.mps() if preset == "mps" else fake_device.cuda(preset) as gpu:
        found = []
        for _ in range(2):  # two stages of one training
            model, sampler, keywords = setup(gpu.device)
            model.net_output = model.register_forward_hook(lambda m, x, y: found.append(y.dtype))
            fit(model, sampler, steps=1, **keywords)
    assert found == [expected, expected]
    said = capsys.readouterr().out
    assert said == (
        'training in float32, because a Tesla T4 does not compute in bfloat16; with standardised images, precision="float16" needs '
        "less memory and may be faster (an option of `engine`, --precision of the command)\n"
        if preset == "T4"
        else ""
    )


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_the_loss_is_computed_in_float32(precision, setup):
    seen = []

    def loss(logits, label):
        seen.append((logits.dtype, (logits @ logits.transpose(-1, -2)).dtype))  # a product, which autocast would round
        return losses.cross_entropy(logits, label)

    with fake_device.cuda("A100"):
        model, sampler, keywords = setup()
        fit(model, sampler, steps=1, loss=loss, engine={"precision": precision}, **keywords)
    assert seen == [(torch.float32, torch.float32)]


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_losses_of_half_precision(device, dtype):
    """Sums over more voxels than float16 can count, and weights beyond its range, under autocast or not."""
    generator = torch.Generator().manual_seed(0)
    logits = (20 * torch.randn(1, 3, 300, 300, generator=generator)).to(dtype)
    target = torch.randint(3, (1, 300, 300), generator=generator)
    weights = [1.0, 1e5, 1e6]
    functions = {
        "weights": lambda x, t: losses.cross_entropy(x, t, class_weights=weights),
        "mask": lambda x, t: losses.cross_entropy(x, t, class_weights=weights, mask=t > 0),
        "plain": losses.cross_entropy,
        "balanced": lambda x, t: losses.balanced_cross_entropy(x, t, target_weights=(0.4, 0.3, 0.3)),
        "jaccard": losses.jaccard_distance,
        "dice": losses.dice_loss,
    }
    expected = {name: float(loss(logits.double(), target)) for name, loss in functions.items()}
    with fake_device.cuda("A100"), torch.autocast(device, dtype=dtype):
        x, t = logits.to(device), target.to(device)
        found = {name: loss(x, t) for name, loss in functions.items()}
        assert {value.dtype for value in found.values()} == {torch.float32}
        assert {name: value.item() for name, value in found.items()} == pytest.approx(expected, rel=1e-4)


def test_a_score_is_computed_on_the_cpu():
    with fake_device.mps():
        prediction, target = torch.tensor([0, 1, 2, 1], device="mps"), torch.tensor([0, 1, 2, 2], device="mps")
        assert losses.minmax_jaccard(prediction, target).item() == pytest.approx(4 / 5)


def test_labels_are_looked_at_before_a_gpu_meets_them(setup):
    class Foreign:
        def batch(self, step):
            inputs, label = sampler.batch(step)
            return inputs, label + 2 * (step == 2)

    with fake_device.cuda():
        model, sampler, keywords = setup()
        rows = []
        with pytest.raises(ValueError, match=r"batch 2 has labels from 2 to 3; with classes=2 labels are 0 to 1: renumber"):
            fit(model, Foreign(), steps=4, on_update=rows.append, **keywords)
        assert len(rows) == 2


# ------------------------------------------------------------------------------------------------------------- float16


def run(setup, *, folder=None, steps=11, loss=losses.cross_entropy, **options):
    engine = {"precision": options.pop("precision", "float32")}
    model, sampler, keywords = setup(**options)
    history = fit(model, sampler, steps=steps, folder=folder, loss=loss, engine=engine, **keywords)
    return weights_of(model), history["loss"].tolist()


def test_numbers_beyond_float16_are_computed_in_float32(setup, tmp_path, capsys):
    """Raw intensities of a million: what follows is the training in float32, batch normalisation and dropout included."""
    with fake_device.cuda():
        expected, their_losses = run(setup, scale=1e6)
        weights, our_losses = run(setup, scale=1e6, precision="float16")
        assert our_losses == their_losses
        assert_same(weights, expected)
        line = (
            "update 1: numbers of the network exceed 65504, the largest of float16: the training goes on in float32; standardised "
            "images (transforms.standardise) mostly fit into float16\n"
        )
        assert capsys.readouterr().out == line
        with pytest.raises(RuntimeError, match="power cut"):
            run(setup, scale=1e6, precision="float16", folder=tmp_path, loss=crash_at(8))  # one call more than updates
        capsys.readouterr()
        again, our_losses = run(setup, scale=1e6, precision="float16", folder=tmp_path, seed=9)
        assert our_losses == their_losses
        assert_same(again, expected)
        assert capsys.readouterr().out == line.replace(
            "update 1: numbers of the network exceed", "numbers of this run have exceeded"
        )


def test_numbers_that_exceed_float16_in_one_batch_of_several(setup, capsys):
    """The batches before and the random numbers of the update are repeated too."""

    def go(precision):
        model, sampler, keywords = setup(lr=1e-5)

        class Sampler:
            def batch(self, step):
                inputs, label = sampler.batch(step)
                return tuple(part * (1e6 if step == 5 else 1) for part in inputs), label

        history = fit(model, Sampler(), steps=4, accumulate=2, engine={"precision": precision}, **keywords)
        return history["loss"].tolist(), model

    with fake_device.cuda():
        ours, model = go("float16")
        theirs, _ = go("float32")
    assert capsys.readouterr().out.startswith("update 3: numbers of the network exceed 65504")
    np.testing.assert_allclose(ours, theirs, rtol=1e-2)
    assert all(value.isfinite().all() for value in weights_of(model).values())


def test_gradients_beyond_float16_at_every_factor(setup, capsys):
    """The factor of the loss falls from 2¹⁶ below 1, which changes no weight; then float32 goes on."""

    def steep(logits, label):
        return 1e9 * losses.cross_entropy(logits, label)

    with fake_device.cuda():
        model, sampler, keywords = setup()
        before, seen = weights_of(model), []
        keywords["on_update"] = lambda row: seen.append(torch.equal(model.classifier.weight.cpu(), before["classifier.weight"]))
        fit(model, sampler, steps=19, loss=steep, engine={"precision": "float16"}, **keywords)
    assert seen == [True] * 17 + [False] * 2
    assert capsys.readouterr().out.startswith("gradients exceed 65504, the largest number of float16: the training goes on in")


def test_a_loss_that_is_no_number_in_float32_either(setup):
    with fake_device.cuda():
        model, sampler, keywords = setup()
        with pytest.raises(FloatingPointError, match="the loss became nan at update 1"):
            fit(model, sampler, steps=2, loss=lambda y, t: y.sum() * np.nan, engine={"precision": "float16"}, **keywords)


@pytest.mark.parametrize("device", ["cpu", "mps", "xpu"])
def test_float16_is_for_cuda(device):
    where = "CPU" if device == "cpu" else f"{device} device"
    with pytest.raises(ValueError, match=f"float16 training needs a CUDA device; use precision='float32' on the {where}"):
        TrainingPrecision("float16", torch.device(device), spatial_dims=3)


# --------------------------------------------------------------------------------------------------------------- states


@pytest.mark.parametrize("optimizer", [RMSpropNesterov, torch.optim.Adam])
@pytest.mark.parametrize("precision", ["float32", "bfloat16", "float16"])
def test_a_resumed_run_is_the_same_to_the_bit(setup, tmp_path, precision, optimizer):
    options = {"precision": precision, "optimizer": optimizer, "lr": 1e-3}
    with fake_device.cuda("A100") as gpu:
        expected, their_losses = run(setup, **options)
        gpu.seed(5)
        with pytest.raises(RuntimeError, match="power cut"):
            run(setup, folder=tmp_path, loss=crash_at(7), **options)
        gpu.seed(6)
        again, our_losses = run(setup, folder=tmp_path, seed=9, **options)
        assert our_losses == their_losses
        assert_same(again, expected)
        assert ("scale" in torch.load(tmp_path / "last.pt", weights_only=True)["scaler"]) == (precision == "float16")


def test_a_resumed_run_waits_no_more_often(setup, tmp_path):
    """Adam's counters lie on the CPU, and would be read back once for each parameter if they came to the GPU."""
    with fake_device.cuda() as gpu:
        run(setup, optimizer=torch.optim.Adam, folder=tmp_path, steps=4)
        model, sampler, keywords = setup(optimizer=torch.optim.Adam)
        waits = []
        keywords["on_update"] = lambda row: waits.append(gpu.syncs.total())
        fit(model, sampler, steps=8, folder=tmp_path, **keywords)
        assert np.diff(waits).tolist() == [1, 1, 2]  # the last update is saved, after one look at all weights
        state = keywords["optimizer"].state[model.classifier.weight]
        assert state["step"].device.type == "cpu" and state["exp_avg"].is_cuda


def test_a_state_takes_no_memory_of_the_gpu(setup, tmp_path):
    """Neither that of the file nor the best weights of a validation."""
    with fake_device.cuda() as gpu:
        used = {}
        for steps, folder in ((4, tmp_path), (8, tmp_path), (4, None)):
            model, sampler, keywords = setup()
            rows = used[steps, folder] = []
            keywords["on_update"] = lambda row, rows=rows: rows.append(gpu.used)
            if folder:
                keywords["validate"] = lambda m, steps=steps: {"dice": steps / 10}
            fit(model, sampler, steps=steps, folder=folder, **keywords)
            del model, keywords
            gc.collect()
    assert max(used[8, tmp_path]) <= max(used[4, None])


@pytest.mark.parametrize(
    ("first", "second"), list(itertools.permutations(["float32", "bfloat16", "float16"], 2)), ids=lambda name: name
)
def test_a_run_goes_on_in_another_number_type(setup, tmp_path, first, second):
    with fake_device.cuda("A100"):
        _, half = run(setup, folder=tmp_path, steps=4, precision=first, lr=1e-6)
        _, whole = run(setup, folder=tmp_path, steps=8, precision=second, lr=1e-6)
        _, expected = run(setup, steps=8, lr=1e-6)
    assert whole[:4] == half
    np.testing.assert_allclose(whole, expected, rtol=0.02)


def test_a_run_goes_on_on_another_device(setup, tmp_path):
    with fake_device.cuda():
        _, first = run(setup, folder=tmp_path, steps=4)
    _, second = run(setup, folder=tmp_path, steps=8, device="cpu")
    with fake_device.mps():
        _, third = run(setup, folder=tmp_path, steps=12, device="mps")
    assert third[:8] == second and second[:4] == first and len(third) == 12


# --------------------------------------------------------------------------------------------------------------- memory


def gradients_of(samples: int, **options) -> tuple[float, dict]:
    torch.manual_seed(0)
    model = models.dm2d_seg(in_channels=1, classes=2, width=0.3, batch_norm=False, dropout=0.0).to("cuda")
    x = torch.randn(samples, 1, *(2 * model.margin + 9,) * 2, generator=torch.Generator().manual_seed(0))
    label = (x[:, 0, :9, :9] > 0).long()
    gradients = Gradients(model, losses.jaccard_distance, l2=1e-2, engine=Engine(precision="float32"), **options)
    batches = iter([(model.cut(x), label)])
    with gradients.together():
        loss, _ = gradients(batches, 1)
    return loss, {name: p.grad.cpu() for name, p in model.named_parameters()}


def test_a_batch_that_does_not_fit_the_gpu_is_halved_with_the_same_result(capsys):
    with fake_device.cuda() as gpu:
        expected, theirs = gradients_of(6)
        most = gpu.peak
    with fake_device.cuda(memory=0.6 * most) as gpu:
        loss, ours = gradients_of(6)
        assert gpu.peak <= 0.6 * most
    assert "out of memory with 6 samples at a time: going on with at most 3" in capsys.readouterr().out
    assert loss == pytest.approx(expected, rel=1e-5)
    for name, value in theirs.items():
        torch.testing.assert_close(ours[name], value, msg=lambda m, name=name: f"{name}: {m}")
    with fake_device.cuda(memory=0.05 * most), pytest.raises(MemoryError, match="a single sample is too large"):
        gradients_of(6)


def test_a_sampler_that_runs_out_of_memory(setup, capsys):
    class Greedy:
        def batch(self, step):
            inputs, label = sampler.batch(step)
            return (torch.ones(10**9 if step == 2 else 1, device="cuda")[0] * inputs[0].to("cuda"), inputs[1]), label

    with fake_device.cuda(memory=1e9):
        model, sampler, keywords = setup(batch_norm=False)
        with pytest.raises(MemoryError, match=r"the sampler ran out of memory .*allocate 3814.*; give it the device 'cpu', or"):
            fit(model, Greedy(), steps=4, **keywords)
    assert not capsys.readouterr().out.replace("training in float32", "").count("out of memory")


# ---------------------------------------------------------------------------------------------------------- Apple's GPUs


def test_training_on_an_apple_gpu(setup, tmp_path):
    """Dropout is that of the GPU, and a resumed run draws on; a validation, accumulated batches and penalties work."""
    with fake_device.mps() as gpu:
        expected, their_losses = run(setup, device="mps", precision="auto")
        gpu.seed(5)
        with pytest.raises(RuntimeError, match="power cut"):
            run(setup, device="mps", folder=tmp_path, loss=crash_at(7))
        gpu.seed(6)
        again, our_losses = run(setup, device="mps", folder=tmp_path, seed=9)
        assert our_losses == their_losses
        assert_same(again, expected)
        model, sampler, keywords = setup("mps")
        history = fit(model, sampler, steps=4, accumulate=2, l1=1e-4, l2=1e-4, validate=lambda m: {"dice": 0.5}, **keywords)
        assert np.isfinite(history["loss"]).all() and history["dice"].iloc[-1] == 0.5

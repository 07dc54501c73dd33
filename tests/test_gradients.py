"""Batches in parts, memory that runs out, and compiling that fails: the result is that of the plain way."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from medseg_lite import losses, models
from medseg_lite.engine import gradients as gradients_module
from medseg_lite.engine.gradients import Engine, Gradients


class Network(nn.Module):
    """Two outputs, one of them auxiliary, and a memory for batches of at most `room` samples."""

    def __init__(self, room: int = 99, norm: bool = False):
        super().__init__()
        torch.manual_seed(0)
        self.one, self.two, self.room = nn.Conv2d(1, 2, 3), nn.Conv2d(1, 2, 3), room
        self.drop = nn.Dropout(0.5)
        self.norm = nn.BatchNorm2d(2) if norm else nn.Identity()

    def forward(self, x):
        if len(x) > self.room and torch.is_grad_enabled():  # predictions alone need little
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 3 GiB")
        return self.norm(self.one(x)), [self.two(x)]


def dice(outputs, target):
    logits, (other,) = outputs
    return losses.dice_loss(logits, target) + 0.3 * losses.balanced_cross_entropy(other, target, target_weights=(0.3, 0.7))


def batches(count: int = 2, samples: int = 5):
    generator = torch.Generator().manual_seed(3)
    for _ in range(count):
        x = torch.randn(samples, 1, 8, 8, generator=generator)
        yield x, (x[:, 0, 1:-1, 1:-1] > 0).long()


def gradients_of(model, *, loss=dice, accumulate=2, **options) -> tuple[float, dict]:
    engine = Engine(precision="float32", **options)
    gradients = Gradients(model, loss, accumulate=accumulate, l2=1e-2, seed=0, engine=engine)
    with gradients.together():
        number, _ = gradients(batches(accumulate), 1)
    return number, {name: p.grad.clone() for name, p in model.named_parameters()}


def assert_close(ours: tuple, theirs: tuple) -> None:
    assert ours[0] == pytest.approx(theirs[0], rel=1e-6)
    for name, gradient in theirs[1].items():
        torch.testing.assert_close(ours[1][name], gradient, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("room, told", [(4, ["5 samples at a time: going on with at most 3"]), (1, ["5", "3", "2"])])
def test_a_batch_that_does_not_fit_is_halved_with_the_same_result(room, told, capsys):
    """Dice of the whole batch is no mean over its samples; neither is a cross-entropy with the batch's own weights."""
    assert_close(gradients_of(Network(room)), gradients_of(Network()))
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(told)
    for line, samples in zip(lines, told):
        assert line.startswith(f"out of memory with {samples}") and "at the same result" in line


def test_memory_that_runs_out_in_the_second_batch_or_the_backward_pass(capsys):
    calls = []

    class Late(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            calls.append(len(grad))
            if calls == [5, 5]:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return grad

    class Tight(Network):
        def forward(self, x):
            logits, others = super().forward(x)
            return Late.apply(logits), others

    assert_close(gradients_of(Tight()), gradients_of(Network()))
    assert calls == [5, 5, *[2, 3] * 2] and "out of memory" in capsys.readouterr().out


def test_dropout_is_the_same_in_both_passes_of_a_part():
    """The gradient of the mean of dropout(x·w) is the dropped mean of x: only equal masks give the value that was seen."""

    class Dropping(Network):
        def forward(self, x):
            logits, others = super().forward(x)
            seen.append(self.drop(torch.ones(len(x))))
            return logits, others

    seen: list = []
    gradients_of(Dropping(room=4), accumulate=1)
    first, second, again_first, again_second = seen[-4:]
    assert torch.equal(first, again_first) and torch.equal(second, again_second)


def test_what_cannot_be_halved(capsys):
    with pytest.raises(MemoryError, match="normalises by whole batches, which cannot be halved: choose a smaller batch"):
        gradients_of(Network(room=4, norm=True))
    with pytest.raises(MemoryError, match=r"Tried to allocate 3 GiB\); a single sample is too large: choose a smaller crop"):
        gradients_of(Network(room=0))
    capsys.readouterr()

    def broken(outputs, target):
        raise RuntimeError("sizes do not match")

    with pytest.raises(RuntimeError, match="sizes do not match"):
        gradients_of(Network(), loss=broken)


@pytest.mark.parametrize("parts", [1, 2])
def test_loss_and_norm_of_the_gradients(parts):
    """Against sums by hand; a loss may have one element in a row, or float64."""
    model = Network()
    gradients = Gradients(model, lambda outputs, target: dice(outputs, target).double().view(1), accumulate=2)
    gradients.parts = parts
    with gradients.together():
        loss, norm = gradients(batches(2), 1)
    assert norm == pytest.approx(sum(float(p.grad.square().sum()) for p in model.parameters()) ** 0.5, rel=1e-5)
    with torch.no_grad():
        assert loss == pytest.approx(sum(float(dice(model(x), y)) for x, y in batches(2)) / 2, rel=1e-6)


@pytest.mark.parametrize("parts", [1, 2])
def test_outputs_in_a_dictionary_are_in_float32_for_the_loss(parts):
    def named(x):
        logits, (other,) = model(x)
        return {"main": logits, "others": [other], "none": None}

    def loss(outputs, target):
        seen.extend([outputs["main"].dtype, outputs["others"][0].dtype])
        return losses.cross_entropy(outputs["main"], target)

    model, seen = Network(), []
    gradients = Gradients(model, loss, forward=named, engine=Engine(precision="bfloat16"))
    gradients.parts = parts
    with gradients.together():
        gradients(batches(1), 1)
    assert seen == [torch.float32] * 2


# --------------------------------------------------------------------------------------------------- several processes


def test_buffers_are_not_exchanged_and_pytorch_warns_of_nothing(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            shared = DistributedDataParallel(nn.BatchNorm1d(2), **gradients_module._own_buffers())
        assert shared.broadcast_buffers is False  # which 2.13 keeps as another name of the new option
    finally:
        torch.distributed.destroy_process_group()


def test_the_name_of_that_option_before_pytorch_2_13(monkeypatch):
    def old(module, broadcast_buffers=True):
        pass

    monkeypatch.setattr(gradients_module, "DistributedDataParallel", old)
    assert gradients_module._own_buffers() == {"broadcast_buffers": False}


# ----------------------------------------------------------------------------------------------------- torch.compile


def test_compiling_that_fails_is_said_in_one_line(monkeypatch, capsys):
    def no_compiler(network):
        def run(x):
            raise RuntimeError("\nInvalidCxxCompiler: No working C++ compiler found\n\nset TORCHDYNAMO_VERBOSE=1 …")

        return run

    monkeypatch.setattr(torch, "compile", no_compiler)
    assert_close(gradients_of(Network(), compiled=True), gradients_of(Network()))
    told = capsys.readouterr().out
    assert told == (
        "torch.compile failed, so the network runs as it is (RuntimeError: InvalidCxxCompiler: No working C++ compiler found)\n"
    )


def test_a_compiled_network_is_used(monkeypatch, capsys):
    calls = []

    def fake(network):
        def run(x):
            calls.append(len(x))
            return network(x)

        return run

    monkeypatch.setattr(torch, "compile", fake)
    assert_close(gradients_of(Network(), compiled=True), gradients_of(Network()))
    assert calls == [5, 5] and not capsys.readouterr().out


# ----------------------------------------------------------------------------------------------------- memory layout


@pytest.mark.parametrize("dims, layout", [(2, torch.channels_last), (3, torch.channels_last_3d)])
def test_channels_last(dims, layout):
    x, seen = torch.randn(2, 3, *(12,) * dims), []

    def build():
        torch.manual_seed(0)
        builder = models.unet2d if dims == 2 else models.mlynarski_3d
        return builder(in_channels=3, classes=2, width=0.1)

    def run(model, channels_last):
        size = (2, 3, *(16 if dims == 2 else 2 * model.margin + 4,) * dims)
        x = torch.randn(size, generator=torch.Generator().manual_seed(0))
        label = (x[:, 0] > 0).long()[(slice(None), *(slice(model.margin, n - model.margin) for n in size[2:]))]
        model.register_forward_pre_hook(lambda m, given: seen.append(given[0].is_contiguous(memory_format=layout)))
        engine = Engine(precision="float32", channels_last=channels_last)
        gradients = Gradients(model, losses.cross_entropy, engine=engine)
        with gradients.together():
            return gradients(iter([(x, label)]), 1)[0], {n: p.grad for n, p in model.named_parameters()}

    assert_close(run(build(), True), run(build(), False))
    assert seen == [True, False] and not x.is_contiguous(memory_format=layout)

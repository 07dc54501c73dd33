"""Training watched: the same network as unwatched, pictures as `predict` makes them, bounded messages, static forms."""

from __future__ import annotations

import base64
import json
import re
import zlib
from unittest import mock

import numpy as np
import pytest
import torch
from torch import nn

from medseg_lite import inference, models, plotting
from medseg_lite.optimizers import RMSpropNesterov
from medseg_lite.sampling import SegmentSampler
from medseg_lite.training import fit
from medseg_lite.widgets import TrainingMonitor
from medseg_lite.widgets import training_monitor as module


@pytest.fixture
def run(noise_case):
    """`run(monitor, steps)`: a tiny run with dropout, the same each time; returns network and history."""

    def start(every=None, steps=7, dims=2, **options):
        torch.manual_seed(0)
        build = models.dm2d_seg if dims == 2 else models.deepmedic
        model = build(in_channels=2, classes=3, width=0.1)
        case = noise_case((18, 18, 6))
        sampler = SegmentSampler([case], output=3, margin=model.margin, cut=model.cut, spatial_dims=dims, batch_size=2, seed=1)
        monitor = TrainingMonitor(model, case, every=every, **options) if every else None
        history = fit(
            model,
            sampler,
            steps=steps,
            optimizer=RMSpropNesterov(model.parameters(), lr=1e-2),
            progress=False,
            validate=lambda m: {"dice_whole": 0.5},
            validate_every=3,
            on_update=monitor,
        )
        return model, history, monitor

    return start


def picture(frame, shape) -> np.ndarray:
    return np.frombuffer(zlib.decompress(frame["data"], wbits=31), np.uint8).reshape(shape)


def test_watching_changes_nothing(run):
    plain, history, _ = run()
    watched, same, monitor = run(every=2)
    assert all(torch.equal(a, b) for a, b in zip(plain.state_dict().values(), watched.state_dict().values()))
    assert history["loss"].tolist() == same["loss"].tolist() and not any(m._forward_hooks for m in watched.modules())
    assert [f["step"] for f in monitor._frames] == [1, 2, 4, 6] and len(monitor.history) == 7
    assert repr(monitor) == "TrainingMonitor('noise', 7 updates, 4 pictures)"


@pytest.mark.parametrize(["dims", "plane", "index"], [(2, "axial", None), (3, "axial", 2), (3, "coronal", 7)])
def test_the_last_picture_is_what_predict_says(run, dims, plane, index):
    model, _, monitor = run(every=7, dims=dims, plane=plane, index=index)
    prediction = inference.predict(model, monitor._case, progress=False)
    wanted = plotting.cut(prediction, monitor._plane, monitor._index)
    assert (picture(monitor._frames[-1], wanted.shape) == wanted).mean() > 0.99  # half precision may turn a tie
    truth = plotting.cut(monitor._case.label, monitor._plane, monitor._index)
    both = ((wanted > 0) & (truth > 0)).sum()
    assert monitor._frames[-1]["dice"] == pytest.approx(2 * both / ((wanted > 0).sum() + (truth > 0).sum()), abs=0.03)


def test_outside_the_mask_is_background(noise_case):
    model = models.dm2d_seg(in_channels=2, classes=3, width=0.1)
    case = noise_case((18, 18, 6), mask=True)
    monitor = TrainingMonitor(model, case, index=3)
    monitor({"step": 1, "loss": 1.0})
    found = picture(monitor._frames[0], (18, 18))
    assert (found[~plotting.cut(case.mask, monitor._plane, 3)] == 0).all()


def test_curves_are_averaged_and_bounded(run, monkeypatch):
    _, _, monitor = run(every=5)
    monitor.to_html()
    assert monitor._curves["dice_whole"] == [[3, 0.5], [6, 0.5], [7, 0.5]] and len(monitor._curves["loss"]) == 7
    history = [{"step": n, "loss": float(n), "seconds": 0.1} for n in range(1, 1001)]
    curves = module._curves(history)
    assert len(curves["loss"]) <= module.POINTS and curves["loss"][0] == [3, 2.0] and set(curves) == {"loss"}


def test_messages_are_few(noise_case, monkeypatch):
    monitor = TrainingMonitor(models.dm2d_seg(in_channels=2, classes=2, width=0.1), noise_case((18, 18, 3)), every=1000)
    clock = [0.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: clock[0])
    sent = []
    monitor.observe(lambda change: sent.append(change), "_curves")
    for step in range(2, 300):
        clock[0] += 0.01
        monitor({"step": step, "loss": 1 / step})
    assert 2 <= len(sent) <= 4


def test_a_new_picture_is_sent_alone(noise_case):
    case = noise_case((18, 18, 3))
    monitor, sent = TrainingMonitor(models.dm2d_seg(in_channels=2, classes=2, width=0.1), case, every=1), []
    monitor.comm = mock.Mock()
    monitor.comm.send = lambda data, buffers=(), **_: sent.append((data.get("state", {}), len(buffers)))
    for step in range(1, 6):
        monitor({"step": step, "loss": 1 / step})
    pictures = [(state["_newest"]["number"], count) for state, count in sent if "_newest" in state]
    assert pictures == [(n, 1) for n in range(5)] and not any("_frames" in state for state, _ in sent)
    assert len(monitor.get_state()["_frames"]) == 5  # a browser that comes later gets all of them
    sent.clear()
    monitor._handle_custom_msg("frames", [])  # a view that has missed one asks for them
    assert [(set(state), count) for state, count in sent] == [({"_frames"}, 5)]


def test_a_network_with_a_single_output(noise_case):
    torch.manual_seed(0)
    model, case = models.Adapter(nn.Conv3d(2, 1, 1), in_channels=2, classes=1), noise_case((18, 18, 3))
    monitor = TrainingMonitor(model, case, every=1)
    monitor({"step": 1, "loss": 1.0})
    wanted = plotting.cut(inference.predict(model, case, progress=False), monitor._plane, monitor._index)
    assert 0 < wanted.sum() < wanted.size and (picture(monitor._frames[0], wanted.shape) == wanted).all()
    assert [name for _, name, _ in monitor._scene["classes"]] == ["class 1"] and monitor.snapshot()


def test_frame_is_clamped(run):
    _, _, monitor = run(every=2)
    monitor.frame = 99
    assert monitor.frame == 3
    monitor.frame = -9
    assert monitor.frame == -1


def test_static_forms(run, noise_case, tmp_path):
    empty = TrainingMonitor(models.dm2d_seg(in_channels=2, classes=2, width=0.1), noise_case((18, 18, 3), name="</script>"))
    data, metadata = empty._repr_mimebundle_()
    assert base64.b64decode(data["image/png"])[:4] == b"\x89PNG" and "no update yet" in metadata["image/png"]["alt"]
    assert empty.to_html().count("</script>") == 2
    _, _, monitor = run(every=2)
    assert "7 updates, loss" in monitor._repr_mimebundle_()[1]["image/png"]["alt"]
    text = monitor.to_html(tmp_path / "t.html")
    state = json.loads(re.search(r'id="state">(.*?)</script>', text, re.S)[1])
    assert [f["step"] for f in state["_frames"]] == [1, 2, 4, 6] and not re.search(r"(src|href)=|https?://", text)


@pytest.mark.parametrize(
    ["options", "message"],
    [
        (dict(every=0), "every=0"),
        (dict(channel="t2"), "no channel 't2'"),
        (dict(plane="x"), "no plane 'x'"),
        (dict(index=99), "index=99; expected 0 to 2"),
    ],
)
def test_bad_input(noise_case, options, message):
    model = models.dm2d_seg(in_channels=2, classes=2, width=0.1)
    with pytest.raises(ValueError, match=message):
        TrainingMonitor(model, noise_case((18, 18, 3)), **options)
    with pytest.raises(ValueError, match="has 1 channels"):
        TrainingMonitor(model, noise_case((18, 18, 3), channels=("flair",)))

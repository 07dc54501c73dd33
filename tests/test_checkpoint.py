from __future__ import annotations

import json

import pytest
import torch
from network_table import patch
from safetensors.torch import load_file, save_file
from torch import nn

from medseg_lite import models, paths
from medseg_lite.models.layers import RollingBatchNorm


def test_inference_statistics_are_kept_and_training_goes_on(tmp_path):
    torch.manual_seed(0)
    model = models.shallow_plus(in_channels=1, classes=2, width=0.1).train()
    for _ in range(3):
        model(2 + 3 * torch.randn(2, 1, 19, 19, 19))
    again = models.load(models.save(tmp_path / "net.safetensors", model, {}))
    for before, after in zip(model.modules(), again.modules()):
        if isinstance(before, RollingBatchNorm):
            assert before.running_mean.any()
            assert torch.equal(before.running_mean, after.running_mean)
            assert torch.equal(before.running_var, after.running_var)
    again.train()(torch.randn(2, 1, 19, 19, 19))


def test_options_survive_the_file(tmp_path):
    options = {"width": 0.1, "centered": False, "dropout": 0.2, "widths": [3, 4], "hidden": [5]}
    model = models.deepmedic(in_channels=1, classes=2, **options).eval()
    again = models.load(models.save(tmp_path / "net.safetensors", model, {}))
    x = patch(model)
    assert again.margin == 6 and again.centered is False and torch.equal(again(x), model(x))


def test_a_failed_save_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "net.safetensors"
    model = models.dm2d_seg(width=0.1).eval()
    models.save(path, model, {"n": 1})

    def broken(tensors, file, metadata):
        file.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr("medseg_lite.models.checkpoint.save_file", broken)
    with pytest.raises(OSError, match="disk full"):
        models.save(path, model, {"n": 2})
    assert models.load(path).card == {"n": 1} and list(tmp_path.iterdir()) == [path]


def test_save_needs_a_network_with_a_builder(tmp_path):
    by_hand = models.Adapter(nn.Conv3d(1, 2, 3), in_channels=1, classes=2, margin=1)
    for model, name in ((nn.Linear(1, 1), "Linear"), (by_hand, "Adapter")):
        with pytest.raises(ValueError, match=f"{name} was not made by a builder.* put @models.builder above it"):
            models.save(tmp_path / "net.safetensors", model, {})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("path", sorted(paths.shipped("checkpoints").glob("*.safetensors")), ids=lambda p: p.stem)
def test_the_shipped_checkpoints(path):
    """Each loads, and its `config` equals that of the network which its builder makes anew."""
    model = models.load(path)
    options = {name: value for name, value in model.config.items() if name != "builder"}
    assert models.BUILDERS[model.config["builder"]](**options).config == model.config
    assert model.card["channels"] and not model.training
    x = patch(model)
    with torch.no_grad():
        assert model(x).shape[1] == model.classes


def test_load_rejects(tmp_path):
    def file(name: str, config=None, tensors=None):
        metadata = {} if config is None else {"config": json.dumps(config)}
        save_file(tensors or {"a": torch.zeros(1)}, tmp_path / name, metadata=metadata)
        return tmp_path / name

    with pytest.raises(FileNotFoundError, match=r"absent\.safetensors does not exist"):
        models.load(tmp_path / "absent.safetensors")
    (tmp_path / "page.safetensors").write_text("<!doctype html>" * 20)
    with pytest.raises(ValueError, match=r"page\.safetensors is not a safetensors file"):
        models.load(tmp_path / "page.safetensors")
    with pytest.raises(ValueError, match="holds no network description"):
        models.load(file("bare.safetensors"))
    for name in ("resnet", "load", "save", "checkpoint", "__class__", None):
        with pytest.raises(ValueError, match=f"asks for network {name!r}"):
            models.load(file("odd.safetensors", {"builder": name}))
    config = {"builder": "dm2d_seg", "width": 0.1}
    with pytest.raises(ValueError, match=r"does not fit dm2d_seg: .* missing, unknown or of another shape"):
        models.load(file("other.safetensors", config))
    five = models.save(tmp_path / "five.safetensors", models.dm2d_seg(width=0.1), {})
    with pytest.raises(ValueError, match=r"does not fit dm2d_seg: 2 tensors .*\(classifier.bias, classifier.weight"):
        models.load(file("four.safetensors", config | {"classes": 4}, load_file(five)))
    with pytest.raises(ValueError, match=r"asks for options that dm2d_seg does not have .*depth"):
        models.load(file("new.safetensors", config | {"depth": 3}))
    whole = models.save(tmp_path / "net.safetensors", models.dm2d_seg(width=0.1), {})
    whole.write_bytes(whole.read_bytes()[:-100])
    with pytest.raises(ValueError, match="is not a safetensors file"):
        models.load(whole)


def test_half_the_bytes(tmp_path, stir):
    torch.manual_seed(0)
    model = stir(models.fcn_fc_resnet(width=0.1)).eval()
    model.segmenter.head[0].running_var.fill_(1e6)  # more than float16 holds
    full, half = (models.save(tmp_path / f"{half}.safetensors", model, {}, half=half) for half in (False, True))
    assert half.stat().st_size < 0.75 * full.stat().st_size
    again = models.load(half)
    assert all(p.dtype == torch.float32 for p in again.parameters())
    x = torch.randn(1, 1, 32, 32)
    expected = model(x)
    assert 0 < (again(x) - expected).norm() < 1e-2 * expected.norm()
    assert again.segmenter.head[0].running_var.max() == 1e6


def test_facts_that_are_no_dictionary(tmp_path):
    def file(**metadata):
        save_file({"a": torch.zeros(1)}, tmp_path / "odd.safetensors", metadata=metadata)
        return tmp_path / "odd.safetensors"

    good = json.dumps({"builder": "dm2d_seg", "width": 0.1})
    for text in ("[1]", "null", "3", '"deepmedic"', "true"):
        with pytest.raises(ValueError, match=r"the config of .*odd\.safetensors is .*; expected a dictionary"):
            models.load(file(config=text))
        with pytest.raises(ValueError, match=r"the card of .*odd\.safetensors is .*; expected a dictionary"):
            models.load(file(config=good, card=text))
    for name in ("config", "card"):
        with pytest.raises(ValueError, match=rf"the {name} of .*odd\.safetensors is not JSON \(.*; download or export"):
            models.load(file(**{"config": good, name: "{'builder'"}))
    model = models.dm2d_seg(width=0.1)
    for card in (None, [1], "facts"):
        with pytest.raises(TypeError, match=r"the card is of type .*; expected a dictionary of facts"):
            models.save(tmp_path / "net.safetensors", model, card)
    with pytest.raises(TypeError, match=r"card\.scores\.dice is of type object, which cannot be stored"):
        models.save(tmp_path / "net.safetensors", model, {"scores": {"dice": object()}})
    assert [path.name for path in tmp_path.iterdir()] == ["odd.safetensors"]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_not_finite_are_not_saved(value, tmp_path):
    model = models.dm2d_seg(width=0.1)
    names = [name for name, tensor in model.state_dict().items() if tensor.is_floating_point()]
    for name in (names[0], names[-1]):
        before = model.state_dict()[name].clone()
        model.state_dict()[name].view(-1)[0] = value
        with pytest.raises(ValueError, match=rf"{name} has 1 NaN or infinite values of {before.numel()}; such a network"):
            models.save(tmp_path / "net.safetensors", model, {})
        model.state_dict()[name].copy_(before)
    models.save(tmp_path / "net.safetensors", model, {})
    next(iter(model.parameters())).data.mul_(1e30)  # finite, but not as float16
    with pytest.raises(ValueError, match="NaN or infinite values"):
        models.save(tmp_path / "half.safetensors", model, {}, half=True)

import sys
import types

import fake_device
import matplotlib as mpl
import pandas as pd
import pytest
import torch

from medseg_lite import course, devices, paths


def test_verdict_is_one_line(capsys, monkeypatch):
    monkeypatch.setenv("MEDSEG_SCALE", "cpu")
    machine = course.start("cpu")
    printed = capsys.readouterr().out
    assert printed.count("\n") == 1 and "ready" in printed and "scale cpu" in printed
    assert machine.pick(cpu=1, gpu=2) == 1


def test_start_sets_the_style_of_figures(monkeypatch):
    monkeypatch.setenv("MEDSEG_SCALE", "cpu")
    with mpl.rc_context({"legend.frameon": True, "font.size": 7}):
        course.start()
        assert mpl.rcParams["legend.frameon"] is False and mpl.rcParams["font.size"] == 10


@pytest.mark.parametrize(
    ("preset", "card", "numbers"),
    [
        ("T4", "Tesla T4, 15 GB", "in float32, because it has no bfloat16, and the faster float16 can overflow in training"),
        ("A100", "A100-SXM4-40GB, 40 GB", "in bfloat16, which is faster than float32, with its range and two or three digits"),
    ],
)
def test_a_gpu_is_named_with_the_numbers_it_trains_in(preset, card, numbers, capsys, monkeypatch):
    monkeypatch.delenv("MEDSEG_SCALE", raising=False)
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: 91500)
    with fake_device.cuda(preset):
        assert course.start() == course.Machine("cuda", "gpu")
        first, second = capsys.readouterr().out.splitlines()
        assert f"{card}, scale gpu (" in first and second == f"networks train on this GPU {numbers}"

        monkeypatch.setenv("MEDSEG_SCALE", "cpu")  # a short run, on the GPU
        assert course.start() == course.Machine("cuda", "cpu")


def test_a_fault_of_cudnn_is_said(capsys, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: 91000)
    with fake_device.cuda("A100"):
        course.start()
    assert capsys.readouterr().out.endswith("; 3D networks in float32, because of a fault in this cuDNN's half precision\n")


def test_a_gpu_that_cannot_be_used(capsys, monkeypatch):
    """A build of PyTorch without kernels for the card: the CPU's scale, and a line that says why."""
    monkeypatch.delenv("MEDSEG_SCALE", raising=False)
    monkeypatch.setattr(devices, "fault_of", lambda device: None if device.type == "cpu" else "no kernel image")
    monkeypatch.setattr(course, "fault_of", devices.fault_of)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert course.start() == course.Machine("cpu", "cpu")
    why, verdict = capsys.readouterr().out.splitlines()
    assert why == "the GPU here cannot be used (no kernel image); going on with the CPU" and "scale cpu" in verdict


def test_apples_gpu_is_chosen_by_hand(capsys, monkeypatch):
    monkeypatch.delenv("MEDSEG_SCALE", raising=False)
    with fake_device.mps():
        assert course.start() == course.Machine("cpu", "cpu")
        assert capsys.readouterr().out.splitlines()[1] == (
            "Apple's GPU is here too; nobody has tested the course on one: course.start('mps') uses it"
        )
        assert course.start("mps") == course.Machine("mps", "cpu")
        assert capsys.readouterr().out.count("\n") == 1


def test_scale_can_be_overridden(monkeypatch):
    monkeypatch.setenv("MEDSEG_SCALE", "gpu")
    assert course.start().pick(cpu=1, gpu=2) == 2


def test_wrong_scale(monkeypatch):
    monkeypatch.setenv("MEDSEG_SCALE", "huge")
    with pytest.raises(ValueError, match="expected one of cpu, gpu"):
        course.start()


def test_runs_are_kept_in_the_cache(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(paths, "cache", lambda: tmp_path)
    folder = course.keep("notebook02")
    assert folder == tmp_path / "runs" / "notebook02" and folder.is_dir()
    assert str(folder) in capsys.readouterr().out
    assert course.keep("notebook02") == folder  # and again
    with pytest.raises(ValueError, match=r"a folder of runs is called '\.\./elsewhere'"):
        course.keep("../elsewhere")


def test_runs_are_kept_in_google_drive_on_colab(monkeypatch, tmp_path):
    """Drive is mounted when `keep` is called, and not before."""
    mounted = []
    drive = types.SimpleNamespace(mount=mounted.append)
    monkeypatch.setitem(sys.modules, "google.colab", types.SimpleNamespace(drive=drive))
    monkeypatch.setattr(course, "DRIVE", tmp_path / "drive")
    course.start("cpu")
    assert not mounted
    folder = course.keep("notebook02")
    assert folder == tmp_path / "drive" / "MyDrive" / "medseg_lite_runs" / "notebook02" and folder.is_dir()
    assert mounted == [str(tmp_path / "drive")]


def test_real_cases(monkeypatch, tmp_path):
    monkeypatch.setenv("MEDSEG_DATA_DIR", str(tmp_path))
    assert course.real_cases_available() is None
    (tmp_path / "brats2013_deepmedic").mkdir()
    assert course.real_cases_available() == tmp_path / "brats2013_deepmedic"


def test_puzzles_have_an_interval_for_each_network_and_end():
    found = course.puzzle("ring")
    stored = pd.read_csv(paths.shipped("results", "puzzles.csv")).query(
        "puzzle == 'ring' and method == 'Deep+' and needed == 0"
    )
    assert set(found) == {"Deep+", "BigDeep+", "DeepMedic"} and list(found["Deep+"]) == ["needed", "not needed"]
    assert found["Deep+"]["not needed"].mean == pytest.approx(stored["dice"].mean())
    assert (found["Deep+"]["needed"].runs, found["Deep+"]["needed"].cases) == (3, 8)
    with pytest.raises(ValueError, match="no puzzle 'rings'; there are ring"):
        course.puzzle("rings")


def test_a_check_prints_and_returns_its_verdict(capsys):
    @course.check
    def check_even(number, seed=0):
        if number % 2:
            print(f"{number} is odd")
            return False
        print("right")
        return number % 2 == 0

    verdict = check_even(3)
    assert capsys.readouterr().out == "3 is odd\n" and repr(verdict) == verdict.reason == "3 is odd"
    assert not verdict and verdict.passed is False and check_even(4, seed=1).passed is True
    assert check_even.__name__ == "check_even"


def test_a_check_that_fails_shows_what_it_printed_before(capsys):
    @course.check
    def check_reciprocal(number):
        print("dividing")
        return 1 / number

    with pytest.raises(ZeroDivisionError):
        check_reciprocal(0)
    assert capsys.readouterr().out == "dividing\n"


def test_a_verdict_is_not_shown_twice(capsys):
    """IPython shows the value of a cell's last line; the check has printed it already."""
    from IPython.core.interactiveshell import InteractiveShell

    shell = InteractiveShell()
    shell.user_ns["check"] = course.check(lambda: print("right") or True)
    shell.run_cell("check()")
    assert capsys.readouterr().out.count("right") == 1

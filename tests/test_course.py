import matplotlib as mpl
import pytest

from medseg_lite import course


def test_verdict_is_one_line(capsys, monkeypatch):
    monkeypatch.setenv("MEDSEG_SCALE", "cpu")
    machine = course.start()
    printed = capsys.readouterr().out
    assert printed.count("\n") == 1 and "ready" in printed and "scale cpu" in printed
    assert machine.pick(cpu=1, gpu=2) == 1


def test_start_sets_the_style_of_figures(monkeypatch):
    monkeypatch.setenv("MEDSEG_SCALE", "cpu")
    with mpl.rc_context({"legend.frameon": True, "font.size": 7}):
        course.start()
        assert mpl.rcParams["legend.frameon"] is False and mpl.rcParams["font.size"] == 10


def test_scale_can_be_overridden(monkeypatch):
    monkeypatch.setenv("MEDSEG_SCALE", "gpu")
    assert course.start().pick(cpu=1, gpu=2) == 2


def test_wrong_scale(monkeypatch):
    monkeypatch.setenv("MEDSEG_SCALE", "huge")
    with pytest.raises(ValueError, match="expected one of cpu, gpu"):
        course.start()


def test_real_cases(monkeypatch, tmp_path):
    monkeypatch.setenv("MEDSEG_DATA_DIR", str(tmp_path))
    assert course.real_cases_available() is None
    (tmp_path / "brats2013_deepmedic").mkdir()
    assert course.real_cases_available() == tmp_path / "brats2013_deepmedic"

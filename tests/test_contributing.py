"""The example in CONTRIBUTING.md runs as it is printed."""

import re
from pathlib import Path

import pytest

from medseg_lite import models

PAGE = Path(__file__).resolve().parent.parent / "CONTRIBUTING.md"


@pytest.mark.slow
def test_a_new_network_trained_with_a_recipe(tmp_path, monkeypatch, capsys):
    (source,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    monkeypatch.chdir(tmp_path)
    before = dict(models.BUILDERS)
    names = {"__name__": "squeeze"}
    try:
        exec(compile(source, str(PAGE), "exec"), names)
        again = models.load("squeeze_deep.safetensors")
    finally:
        models.BUILDERS.clear()
        models.BUILDERS.update(before)
    model = names["model"]
    assert model.history["learning_rate"][0] == 5e-4
    assert all((a == b).all() for a, b in zip(model.parameters(), again.parameters()))
    assert 0 <= float(capsys.readouterr().out.split()[-1]) <= 1

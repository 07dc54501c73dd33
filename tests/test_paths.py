"""Where files lie, and writing them whole or not at all."""

from __future__ import annotations

import sys

import pytest

from medseg_lite import paths


def test_real_data_follows_the_variable(monkeypatch, tmp_path):
    monkeypatch.setenv("MEDSEG_DATA_DIR", str(tmp_path))
    assert paths.real_data("brats") == tmp_path / "brats"
    monkeypatch.setenv("MEDSEG_DATA_DIR", "~/scans")
    assert paths.real_data("brats") == paths.Path.home() / "scans" / "brats"
    for unset in ("", None):
        monkeypatch.delenv("MEDSEG_DATA_DIR") if unset is None else monkeypatch.setenv("MEDSEG_DATA_DIR", unset)
        assert paths.real_data("brats") == paths.cache() / "brats"


def test_cache_lies_in_the_clone_or_in_the_users_folder(monkeypatch, tmp_path):
    (tmp_path / "pyproject.toml").touch()
    monkeypatch.setattr(paths, "_CLONE", tmp_path)
    assert paths.cache() == tmp_path / "data" / "cache"
    (tmp_path / "pyproject.toml").unlink()
    assert tmp_path not in paths.cache().parents and "medseg_lite" in paths.cache().parts
    if sys.platform == "linux":
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
        assert paths.cache() == tmp_path / "medseg_lite"


def test_shipped_files_are_found_in_a_clone_and_in_a_wheel(monkeypatch, tmp_path):
    clone, package = tmp_path / "clone", tmp_path / "site" / "medseg_lite"
    for root in (clone, package):
        (root / "data" / "anatomy").mkdir(parents=True)
        (root / "data" / "anatomy" / "a.npz").touch()
    (clone / "pyproject.toml").touch()
    monkeypatch.setattr(paths, "_PACKAGE", package)
    monkeypatch.setattr(paths, "_CLONE", clone)
    assert paths.shipped("anatomy", "a.npz") == clone / "data" / "anatomy" / "a.npz"
    monkeypatch.setattr(paths, "_CLONE", package.parent)
    assert paths.shipped("anatomy", "a.npz") == package / "data" / "anatomy" / "a.npz"
    with pytest.raises(FileNotFoundError, match=r"b\.npz is missing; it ships with medseg_lite: reinstall"):
        paths.shipped("anatomy", "b.npz")


def test_atomic_write_shows_the_new_file_only_when_it_is_whole(tmp_path):
    target = tmp_path / "sub" / "result.nii.gz"
    with paths.atomic_write(target) as temporary:
        assert temporary.parent == target.parent and temporary.name.endswith(".nii.gz")
        temporary.write_bytes(b"one")
        assert not target.exists()
    assert target.read_bytes() == b"one"
    with paths.atomic_write(str(target)) as temporary:
        temporary.write_bytes(b"two")
        assert target.read_bytes() == b"one"
    assert target.read_bytes() == b"two"
    assert list(target.parent.iterdir()) == [target]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_atomic_write_leaves_the_old_file_when_writing_fails(tmp_path, error):
    target = tmp_path / "result.txt"
    target.write_text("old")
    with pytest.raises(error), paths.atomic_write(target) as temporary:
        temporary.write_text("half of the ne")
        raise error
    assert target.read_text() == "old"
    assert list(tmp_path.iterdir()) == [target]

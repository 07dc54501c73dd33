"""Where files lie, and writing them whole or not at all."""

from __future__ import annotations

import ast
import errno
import io
import os
import stat
import sys
from pathlib import Path

import numpy as np
import pytest

from medseg_lite import cli, datasets, files, models, paths
from medseg_lite.volume import Case

ROOT = Path(__file__).resolve().parent.parent


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


# ------------------------------------------------------------------------------------- as every system and drive has it


def mode(path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


@pytest.fixture
def case() -> Case:
    return Case(np.random.default_rng(0).normal(size=(1, 5, 5, 5)).astype(np.float32), ("a",), name="patient")


@pytest.fixture
def writers(case, tmp_path):
    """The writers of the package, each of which returns its file: nibabel and safetensors open it in their own ways."""
    network = models.deepmedic(in_channels=1, classes=2, width=0.1)

    def table(folder):
        with paths.atomic_write(folder / "a.csv") as temporary:
            temporary.write_text("a,b\n", "utf-8")
        return folder / "a.csv"

    return {
        "segmentation": lambda folder: files.write_nifti(folder / "a.nii.gz", case.image[0] > 0, case),
        "stored case": lambda folder: datasets.store([case], folder, progress=False)[0].path,
        "checkpoint": lambda folder: models.save(folder / "m.safetensors", network, {}),
        "table": table,
    }


@pytest.mark.skipif(os.name == "nt", reason="Windows has no umask")
@pytest.mark.parametrize("umask", [0o077, 0o002, 0o022, 0o027])
def test_new_files_follow_the_umask_and_old_ones_keep_their_mode(tmp_path, writers, umask):
    before = os.umask(umask)
    try:
        for what, write in writers.items():
            path = write(tmp_path / what)
            assert mode(path) == 0o666 & ~umask, what
            for kept in (0o600, 0o640, 0o664, 0o444):
                path.chmod(kept)
                if what == "stored case":  # is not written again as long as it is whole
                    path.write_bytes(b"damaged") if os.access(path, os.W_OK) else None
                write(tmp_path / what)
                assert mode(path) == kept, what
            assert [p.name for p in path.parent.iterdir()] == [path.name]
    finally:
        os.umask(before)


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such modes")
def test_a_private_file_is_private_while_it_is_written(tmp_path):
    target = tmp_path / "a.txt"
    target.write_text("patient", "utf-8")
    target.chmod(0o600)
    with paths.atomic_write(target) as temporary:
        assert mode(temporary) == 0o600


def test_a_drive_without_permissions(tmp_path, writers, monkeypatch):
    paths_before = [write(tmp_path / what) for what, write in writers.items()]

    def refuse(*_, **__):
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "chmod", refuse)
    assert [write(tmp_path / what) for what, write in writers.items()] == paths_before
    for what, write in writers.items():
        assert write(tmp_path / f"{what} again").stat().st_size


def test_windows_syncs_only_files_that_are_open_for_writing(tmp_path, writers, monkeypatch):
    fcntl, real = pytest.importorskip("fcntl"), os.fsync

    def as_on_windows(handle):
        if fcntl.fcntl(handle, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY:
            raise OSError(errno.EBADF, "Bad file descriptor")
        return real(handle)

    monkeypatch.setattr(os, "fsync", as_on_windows)
    for what, write in writers.items():
        assert write(tmp_path / what).stat().st_size


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOTSUP, errno.ENOSYS, errno.EPERM])
def test_a_drive_that_cannot_sync(tmp_path, monkeypatch, number):
    def refuse(_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", refuse)
    with paths.atomic_write(tmp_path / "a.txt") as temporary:
        temporary.write_text("new", "utf-8")
    assert (tmp_path / "a.txt").read_text("utf-8") == "new"


def test_a_disk_that_fails_leaves_the_old_file(tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text("old", "utf-8")

    def fail(_):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="Input/output error"), paths.atomic_write(tmp_path / "a.txt") as temporary:
        temporary.write_text("new", "utf-8")
    assert (tmp_path / "a.txt").read_text("utf-8") == "old" and len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("number", [errno.EACCES, errno.EPERM, errno.EBUSY])
@pytest.mark.parametrize("times", [2, 99])
def test_a_file_that_another_program_has_open(tmp_path, monkeypatch, number, times):
    """As on Windows, for a moment or for good."""
    (tmp_path / "a.txt").write_text("old", "utf-8")
    real, left = os.replace, [times]

    def refuse(*arguments):
        left[0] -= 1
        if left[0] >= 0:
            raise OSError(number, os.strerror(number))
        return real(*arguments)

    monkeypatch.setattr(os, "replace", refuse)
    monkeypatch.setattr(paths.time, "sleep", lambda _: None)

    def write():
        with paths.atomic_write(tmp_path / "a.txt") as temporary:
            temporary.write_text("new", "utf-8")

    if times == 2:
        write()
    else:
        with pytest.raises(
            PermissionError, match=r"a\.txt cannot be replaced .*another program has it open, or it is protected"
        ):
            write()
    assert (tmp_path / "a.txt").read_text("utf-8") == ("new" if times == 2 else "old")
    assert [p.name for p in tmp_path.iterdir()] == ["a.txt"]


def link(path, target):
    try:
        path.symlink_to(target)
    except OSError:
        pytest.skip("this user may not make links")
    return path


@pytest.mark.parametrize("there", [True, False])
@pytest.mark.parametrize("target", ["disk/real.txt", "chain", "absolute"])
def test_links_stay_and_their_targets_are_replaced(tmp_path, there, target):
    real = tmp_path / "disk" / "real.txt"
    real.parent.mkdir()
    if there:
        real.write_text("old", "utf-8")
    link(tmp_path / "chain", "disk/real.txt")
    path = link(tmp_path / "out.txt", real if target == "absolute" else target)
    with paths.atomic_write(path) as temporary:
        assert temporary.parent == real.parent  # on the disk of the target, which may be another one
        temporary.write_text("new", "utf-8")
    assert path.is_symlink() and path.read_text("utf-8") == real.read_text("utf-8") == "new" and not real.is_symlink()
    assert [p.name for p in real.parent.iterdir()] == ["real.txt"]


def test_paths_that_cannot_be_written(tmp_path):
    link(tmp_path / "loop", "loop")
    link(tmp_path / "nowhere", "not/mounted/a.txt")
    (tmp_path / "folder").mkdir()
    for path, error, match in [
        (tmp_path / "loop", OSError, "loop is a symbolic link that leads to itself; remove it"),
        (tmp_path / "nowhere", FileNotFoundError, "nowhere cannot be written .*No such file"),
        (tmp_path / "folder", IsADirectoryError, "folder is a folder; expected the name of a file"),
    ]:
        with pytest.raises(error, match=match), paths.atomic_write(path):
            pytest.fail("the block must not be reached")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["folder", "loop", "nowhere"]


# ------------------------------------------------------------------------------------------------------ names, consoles

GOOD = [
    "p0",
    "Käse 東京 ø",
    "a.b.c",
    "with space",
    "x" * 240,
    "console",
    "com",
    "-dash",
    "a'b",
    "100%",
    "ß" * 120,
    "p0 ",
    "~a",
    "NUL-1",
]
BAD = [
    "",
    ".",
    "..",
    ".hidden",
    "a/b",
    "a\\b",
    "../a",
    "C:a",
    "what?",
    "a*",
    '"a"',
    "a<b",
    "a>b",
    "a|b",
    "tab\t",
    "line\n",
    "nul\0",
]
DEVICES = ["con", "NUL", "Aux", "com1", "LPT9", "prn.scan", "con "]
LONG = ["x" * 250, "東" * 90, "ß" * 130]


@pytest.mark.parametrize("name", GOOD)
def test_names_that_become_files(tmp_path, case, name):
    assert paths.file_for(tmp_path, name, ".nii.gz") == tmp_path / f"{name}.nii.gz"
    stored = datasets.store([case.replace(name=name)], tmp_path, progress=False)
    assert stored.names == [name] == datasets.stored(tmp_path).names and stored[0].name == name


@pytest.mark.parametrize("name", [*BAD, *DEVICES, *LONG])
def test_names_that_some_system_refuses(tmp_path, case, name):
    message = "most file systems take 255" if name in LONG else "Windows"
    with pytest.raises(ValueError, match=message) as found:
        datasets.store([case.replace(name=name)], tmp_path / "s", progress=False)
    assert repr(name) in str(found.value) and not (tmp_path / "s").exists()


def test_names_of_channels(tmp_path, case):
    with pytest.raises(ValueError, match="a channel is called 't1/gd'"):
        files.write_case(tmp_path, case.replace(channels=("t1/gd",)))
    with pytest.raises(ValueError, match="patient has a channel called 'label', whose file is that of its label"):
        files.write_case(tmp_path, case.replace(channels=("label",), label=np.zeros(case.shape, np.uint8)))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["é" * 60, "x" * 248], ids=["letters of two bytes", "letters of one byte"])
def test_a_long_name_leaves_room_for_the_temporary_one(tmp_path, case, name):
    path = files.write_nifti(tmp_path / f"{name}.nii.gz", case.image[0], case)
    assert path.is_file() and len(list(tmp_path.iterdir())) == 1
    with pytest.raises(OSError, match=r"cannot be written .*choose another folder or a shorter name"):
        files.write_nifti(tmp_path / f"{2 * name}{name}.nii.gz", case.image[0], case)


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "latin-1", "utf-8", "utf-16"])
def test_a_console_shows_what_it_can(monkeypatch, encoding):
    text = "3×3³ → 5 µm, ≥ – 東京 \udcff"
    console = io.TextIOWrapper(io.BytesIO(), encoding=encoding, newline="\n")
    paths.say(text, console)
    monkeypatch.setattr(sys, "stdout", console)
    paths.say(text)
    console.flush()
    shown = console.buffer.getvalue().decode(encoding).lstrip("\ufeff").splitlines()
    assert shown == [text.encode(encoding, "replace").decode(encoding).lstrip("\ufeff")] * 2


def test_say_once(capsys):
    paths.say_once.cache_clear()
    for text in ("a", "b", "a"):
        paths.say_once(text)
    assert capsys.readouterr().out == "a\nb\n"


@pytest.mark.parametrize("encoding", ["ascii", "cp1252"])
@pytest.mark.parametrize("arguments", [["recipes"], ["--help"], ["train", "--help"], ["segment", "--model", "→.safetensors"]])
def test_the_command_line_on_a_console_of_few_letters(monkeypatch, encoding, arguments):
    out, err = (io.TextIOWrapper(io.BytesIO(), encoding=encoding) for _ in range(2))
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(sys, "stderr", err)
    if arguments[0] == "segment":
        arguments = [*arguments, "--data", "phantoms", "--out", "x"]
    try:
        cli.main(arguments)
    except SystemExit as end:
        assert not end.code
    out.flush(), err.flush()
    assert out.buffer.getvalue() + err.buffer.getvalue()


def test_text_files_are_in_utf_8_whatever_the_locale():
    """Every text file is opened with its encoding, which is the system's otherwise."""
    offenders = []
    for folder in ("medseg_lite", "benchmarks", "experiments", "notebooks", "data"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text("utf-8"))):
                if isinstance(node, ast.Call) and not names_its_encoding(node):
                    offenders.append(f"{path.relative_to(ROOT)}:{node.lineno}")
    assert not offenders


def names_its_encoding(call: ast.Call) -> bool:
    """Return whether a call opens no text file, or says in which encoding."""
    name = getattr(call.func, "attr", None) or getattr(call.func, "id", None)
    given = {keyword.arg: keyword.value for keyword in call.keywords}
    if name in ("read_text", "write_text"):
        return "encoding" in given or len(call.args) > (name == "write_text")
    if name == "open" and isinstance(call.func, ast.Name):
        how = call.args[1] if len(call.args) > 1 else given.get("mode")
        return "encoding" in given or (how is not None and "b" in ast.unparse(how))
    return True


def test_functions_of_messages_use_say():
    """`print` ends in an error where the console cannot show a letter. Only the command line, which prepares its console, prints."""
    offenders = []
    for path in sorted((ROOT / "medseg_lite").rglob("*.py")):
        if "cli" not in path.parts and path.name != "paths.py":
            calls = [n for n in ast.walk(ast.parse(path.read_text("utf-8"))) if isinstance(n, ast.Call)]
            offenders += [f"{path.name}:{n.lineno}" for n in calls if getattr(n.func, "id", None) == "print"]
    assert not offenders

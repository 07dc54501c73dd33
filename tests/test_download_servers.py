"""Downloads from servers of many kinds, and by several processes: the file arrives right, or an error says why."""

from __future__ import annotations

import gzip
import hashlib
import os
import stat
import subprocess
import sys
import threading
import time
import zlib
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from small_files import tarball

from medseg_lite.datasets import _alone as locks
from medseg_lite.datasets._alone import alone
from medseg_lite.datasets._download import fetch, fetch_archive

DOWNLOAD = sys.modules["medseg_lite.datasets._download"]
SLEEP = time.sleep
DATA = np.random.default_rng(0).bytes(200_000)
OTHER = np.random.default_rng(1).bytes(200_000)


def sha(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def packed(data: bytes) -> bytes:
    """Compress without the time of day, so that every process that collects these tests sees the same bytes."""
    return gzip.compress(data, mtime=0)


class Scripted:
    """A server that gives one answer after another, the last of them again and again.

    An answer is a function of the first byte that was asked for (None without a range). It returns status, headers, and the bytes
    to send. It is given a Content-Length of what it sends, unless it has one of its own (None for none).
    """

    def __init__(self):
        self.script, self.requests = [], []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                outer.requests.append(dict(self.headers))
                asked = self.headers["Range"]
                answer = outer.script[min(len(outer.requests), len(outer.script)) - 1]
                status, headers, body = answer(None if asked is None else int(asked[6:-1]))
                self.send_response(status)
                for name, value in ({"Content-Length": len(body)} | headers).items():
                    if value is not None:
                        self.send_header(name, value)
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_):
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}/a.nii.gz"
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()

    def play(self, *answers):
        self.script, self.requests = list(answers), []

    def close(self):
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture(scope="module")
def scripted():
    server = Scripted()
    yield server
    server.close()


@pytest.fixture(autouse=True)
def no_proxy_and_no_waiting(monkeypatch):
    for variable in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(variable, raising=False)
    waited = []
    monkeypatch.setattr(DOWNLOAD.time, "sleep", waited.append)
    return waited


def whole(data=DATA, *, send=None, **headers):
    """Answer with the whole file, whatever is asked for, but hang up after `send` bytes."""
    headers = {name.replace("_", "-"): value for name, value in headers.items()}
    return lambda start: (200, {"Content-Length": len(data)} | headers, data[:send])


def part(data=DATA, *, send=None, shift=0, total=None, **headers):
    """Answer with the part that is asked for, or with one that begins `shift` bytes later."""
    headers = {name.replace("_", "-"): value for name, value in headers.items()}

    def answer(start):
        if start is None:
            return 200, {"Content-Length": len(data)} | headers, data[:send]
        begin, end = max(start + shift, 0), len(data)
        if begin >= end:
            return 416, {"Content-Range": f"bytes */{end}"}, b""
        where = {"Content-Range": f"bytes {begin}-{end - 1}/{total or end}", "Content-Length": end - begin}
        return 206, where | headers, data[begin:][:send]

    return answer


def refuse(status, **headers):
    return lambda start: (status, {name.replace("_", "-"): value for name, value in headers.items()}, b"no")


# Servers that end well: the answers, and the number of requests.
GOOD = {
    "a plain one": ([whole()], 1),
    "one that ignores ranges": ([whole(send=90_000), whole()], 2),
    "one that goes on": ([part(send=90_000), part()], 2),
    "one that breaks off many times": ([part(send=30_000)], 7),
    "one that sends another part": ([part(send=90_000), part(shift=10), part()], 3),
    "one that sends an earlier part": ([part(send=90_000), part(shift=-10), part()], 3),
    "one that sends a part without saying which": ([part(send=90_000), part(Content_Range=None)], 2),
    "one that sends a part of another file": ([part(send=90_000), part(total=300_000), part()], 3),
    "one without lengths": ([whole(Content_Length=None)], 1),
    "one whose file was replaced, and that says so": ([part(OTHER, send=90_000, ETag='"1"'), part(ETag='"2"')], None),
    "one whose file was replaced, by date": (
        [
            part(OTHER, send=9_000, Last_Modified="Mon, 01 Jan 2024 00:00:00 GMT"),
            part(Last_Modified="Tue, 02 Jan 2024 00:00:00 GMT"),
        ],
        None,
    ),
    "one whose file was replaced by a longer one": ([part(OTHER[:150_000], send=90_000), part()], None),
    "one that compresses": ([whole(packed(DATA), Content_Encoding="gzip")], 1),
    "one that compresses otherwise": ([whole(zlib.compress(DATA), Content_Encoding="deflate")], 1),
    "one that calls it x-gzip": ([whole(packed(DATA), Content_Encoding="x-gzip")], 1),
    "one that compresses in two streams": ([whole(packed(DATA[:50_000]) + packed(DATA[50_000:]), Content_Encoding="gzip")], 1),
    "one that compresses and breaks off": ([part(packed(DATA), send=90_000, Content_Encoding="gzip")], 3),
    "one that calls the file compressed as it is": ([whole(Content_Encoding="gzip")], 1),
    "a busy one": ([refuse(503, Retry_After="3"), whole()], 2),
    "one with too many requests": ([refuse(429, Retry_After="1"), refuse(429), whole()], 3),
    "one that is busy in the middle": ([part(send=90_000), refuse(503, Retry_After="2"), part()], 3),
    "a gateway": ([refuse(502), refuse(504), whole()], 3),
}


@pytest.mark.parametrize("kind", GOOD)
def test_servers_from_which_the_file_arrives(tmp_path, scripted, kind, capsys):
    answers, requests = GOOD[kind]
    scripted.play(*answers)
    target = fetch(scripted.url, tmp_path / "a.nii.gz", sha256=sha(DATA))
    assert target.read_bytes() == DATA and list(tmp_path.iterdir()) == [target]
    assert requests in (None, len(scripted.requests))
    busy = sum(answer(None)[0] in DOWNLOAD.BUSY for answer in answers)
    assert capsys.readouterr().err.count("is busy") == busy
    assert all(request["Accept-Encoding"] == "identity" for request in scripted.requests)


VERSION = {"ETag": '"1"'}


@pytest.mark.parametrize(
    "first, then",
    [
        (part(OTHER, send=90_000, ETag='"1"'), part(ETag='"2"')),
        (part(OTHER, send=90_000, ETag='"1"'), part()),
        (part(OTHER, send=90_000, ETag='W/"1"'), part(ETag='W/"2"')),
        (
            part(OTHER, send=90_000, Last_Modified="Mon, 01 Jan 2024 00:00:00 GMT"),
            part(Last_Modified="Tue, 02 Jan 2024 00:00:00 GMT"),
        ),
        (part(OTHER[:150_000], send=90_000, ETag='"1"'), part(ETag='"1"')),
        (part(OTHER, send=90_000), part()),
    ],
)
def test_without_a_checksum_pieces_of_two_versions_are_never_joined(tmp_path, scripted, first, then):
    scripted.play(first, then)
    assert fetch(scripted.url, tmp_path / "a.nii.gz").read_bytes() == DATA


def test_without_a_checksum_the_same_version_goes_on(tmp_path, scripted):
    scripted.play(part(send=90_000, ETag='"1"'), part(ETag='"1"'))
    assert fetch(scripted.url, tmp_path / "a.nii.gz").read_bytes() == DATA
    second = scripted.requests[1]
    assert len(scripted.requests) == 2 and (second["Range"], second["If-Range"]) == ("bytes=90000-", '"1"')


PACKED, PLAIN = packed(DATA), b"plain" * 1000


@pytest.mark.parametrize(
    "name, sent, expected",
    [
        ("a.nii.gz", packed(PACKED), PACKED),  # compressed once more on the way
        ("a.nii.gz", PACKED, PACKED),  # called compressed as it is
        ("a.tgz", PACKED, PACKED),
        ("a.tar", packed(PLAIN), PLAIN),
        ("a.nii", packed(PLAIN), PLAIN),
        ("a.NII.GZ", PACKED, PACKED),
    ],
)
def test_without_a_checksum_what_is_compressed_on_the_way_is_unpacked(tmp_path, scripted, name, sent, expected):
    scripted.play(whole(sent, Content_Encoding="gzip"))
    assert fetch(scripted.url, tmp_path / name).read_bytes() == expected


BAD = {
    "damaged on the way": ([whole(OTHER)], ValueError, "arrived with sha256 .*; expected"),
    "always too short": ([whole(send=50_000)], ConnectionError, "could not be downloaded"),
    "nothing at all": ([whole(send=0)], ConnectionError, "could not be downloaded"),
    "always another part": ([part(send=90_000), part(shift=5, send=0)], ConnectionError, "could not be downloaded"),
    "a part that nobody asked for": (
        [lambda _: (206, {"Content-Range": "bytes 5-9/10"}, b"56789")],
        ConnectionError,
        "another part",
    ),
    "no such range, ever": ([refuse(416)], ConnectionError, "416"),
    "compressed beyond us": (
        [whole(OTHER, Content_Encoding="br")],
        ValueError,
        "arrived compressed by 'br'; expected the file as it is",
    ),
    "compressed and damaged": ([whole(b"\x1f\x8b\x08" + DATA, Content_Encoding="gzip")], ValueError, "cannot be unpacked"),
    "compressed and cut": ([whole(packed(DATA)[:-9], Content_Encoding="gzip")], ValueError, "cannot be unpacked .*cut off"),
    "busy for long": ([refuse(503, Retry_After="86400")], ConnectionError, "503 .*asks to wait for 86400 s"),
    "busy for ten days": (
        [refuse(429, Retry_After=format_datetime(datetime.now(UTC) + timedelta(days=10), usegmt=True))],
        ConnectionError,
        r"429 .*asks to wait for 8[456]\d{4} s",
    ),
    "busy for ever": ([refuse(503)], ConnectionError, "503"),
    "forbidden": ([refuse(403)], ConnectionError, "403"),
    "broken": ([refuse(500)], ConnectionError, "500"),
    "a login page": ([whole(b"<!DOCTYPE html><html>")], ValueError, "answered with a web page"),
    "in a circle": ([refuse(302, Location="/a.nii.gz")], ConnectionError, "redirects"),
}


@pytest.mark.parametrize("kind", BAD)
def test_servers_from_which_nothing_right_arrives(tmp_path, scripted, kind, no_proxy_and_no_waiting):
    answers, error, match = BAD[kind]
    scripted.play(*answers)
    with pytest.raises(error, match=match):
        fetch(scripted.url, tmp_path / "a.nii.gz", sha256=sha(DATA))
    assert not (tmp_path / "a.nii.gz").exists() and all(p.name == ".part-a.nii.gz" for p in tmp_path.iterdir())
    assert sum(no_proxy_and_no_waiting) < 200
    with pytest.raises(Exception, match=r"a\.nii\.gz"):
        fetch(scripted.url, tmp_path / "b" / "a.nii.gz", check=refuse_all)
    assert not (tmp_path / "b").exists()


def refuse_all(path):
    raise ValueError(f"{path.name} is no image")


def test_waiting_as_long_as_the_server_says(tmp_path, scripted, no_proxy_and_no_waiting, capsys):
    soon = format_datetime(datetime.now(UTC) + timedelta(seconds=30), usegmt=True)
    past = format_datetime(datetime.now(UTC) - timedelta(days=1), usegmt=True)
    scripted.play(*(refuse(503, Retry_After=after) for after in ("7", soon, past, "soon")), whole())
    fetch(scripted.url, tmp_path / "a.nii.gz", sha256=sha(DATA))
    seven, date, none, own = no_proxy_and_no_waiting
    assert seven == 7 and 25 < date <= 30 and none == 0 and own == 16
    assert f"{scripted.url} is busy (503 Service Unavailable): waiting for 7 s" in capsys.readouterr().err


def test_redirects_are_followed(tmp_path, scripted):
    scripted.play(refuse(302, Location="/elsewhere"), part(send=90_000), refuse(307, Location="/elsewhere"), part())
    assert fetch(scripted.url, tmp_path / "a.nii.gz", sha256=sha(DATA)).read_bytes() == DATA


@given(data=st.data())
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_whatever_a_server_does_the_file_is_right_or_not_there(tmp_path_factory, scripted, data):
    folder = tmp_path_factory.mktemp("any")
    kinds = [part, whole]
    answers = [
        data.draw(st.sampled_from(kinds))(
            data.draw(st.sampled_from([DATA, OTHER, DATA[:150_000]])),
            send=data.draw(st.sampled_from([None, 0, 1, 50_000])),
            **data.draw(
                st.sampled_from([{}, {"ETag": '"1"'}, {"ETag": '"2"'}, {"Content_Length": None}, {"Content_Encoding": "gzip"}])
            ),
        )
        for _ in range(data.draw(st.integers(1, 5)))
    ]
    scripted.play(*answers, whole())
    left = data.draw(st.sampled_from([None, DATA[:80_000], OTHER[:80_000], DATA, DATA + b"x"]))
    if left is not None:
        (folder / ".part-a.nii.gz").write_bytes(left)
    for _ in range(9):
        try:
            fetch(scripted.url, folder / "a.nii.gz", sha256=sha(DATA))
            break
        except (ConnectionError, ValueError):
            assert not (folder / "a.nii.gz").exists()
    assert (folder / "a.nii.gz").read_bytes() == DATA and len(list(folder.iterdir())) == 1


# ---------------------------------------------------------------------------------------------- several processes, drives


@pytest.fixture
def real_sleep(monkeypatch):
    monkeypatch.setattr(DOWNLOAD.time, "sleep", SLEEP)
    monkeypatch.setattr(locks, "POLL", 0.01)


def slowly(data):
    """Answer slowly enough for another process to come in between."""

    def answer(start):
        time.sleep(0.15)
        return part(data)(start)

    return answer


def together(count, job):
    """Run a job several times at once. Threads stand for processes: they share nothing but the disk."""
    said = []

    def one(number):
        try:
            said.append(job(number))
        except Exception as error:
            said.append(error)

    threads = [threading.Thread(target=one, args=(n,)) for n in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return said


@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize("first", ["whole", "broken", "refused"])
def test_several_processes_fetch_one_file(tmp_path, scripted, real_sleep, known, first):
    before = {"whole": [], "broken": [part(send=70_000)], "refused": [refuse(404)]}[first]
    scripted.play(*before, slowly(DATA))
    target = tmp_path / "new" / "a.nii.gz"
    said = together(4, lambda _: fetch(scripted.url, target, sha256=sha(DATA) if known else None))
    assert said.count(target) == (3 if first == "refused" else 4), said
    assert target.read_bytes() == DATA and list(target.parent.iterdir()) == [target]
    assert len(scripted.requests) <= 3  # not fetched by each of them


def test_several_processes_unpack_one_archive(tmp_path, scripted, real_sleep):
    content = tarball({"Task/dataset.json": b"{}", "Task/imagesTr/a.nii.gz": DATA})
    scripted.play(slowly(content))
    folder = tmp_path / "task"

    def job(_):
        url, md5 = scripted.url.replace("nii.gz", "tar"), hashlib.md5(content).hexdigest()
        return fetch_archive(url, folder, md5=md5, ready=lambda place: (place / "dataset.json").is_file())

    assert together(3, job) == [folder] * 3
    assert [p.name for p in tmp_path.iterdir()] == ["task"] and len(scripted.requests) == 1
    assert (folder / "imagesTr" / "a.nii.gz").read_bytes() == DATA


HOLD = (
    "import fcntl, sys; f = open(sys.argv[1], 'w'); fcntl.flock(f, fcntl.LOCK_EX); print('held', flush=True); sys.stdin.read()"
)


def test_a_process_that_is_killed_gives_the_lock_free(tmp_path, scripted, real_sleep, capsys):
    pytest.importorskip("fcntl")
    scripted.play(part())
    (tmp_path / ".part-a.nii.gz").write_bytes(DATA[:90_000])
    command = [sys.executable, "-c", HOLD, str(tmp_path / ".lock-a.nii.gz")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        process.stdout.readline()
        threading.Timer(0.3, process.kill).start()
        start = time.monotonic()
        target = fetch(scripted.url, tmp_path / "a.nii.gz", sha256=sha(DATA))
        assert time.monotonic() - start > 0.2
    assert target.read_bytes() == DATA and list(tmp_path.iterdir()) == [target]
    assert scripted.requests[0]["Range"] == "bytes=90000-"
    assert "another process works on a.nii.gz: waiting for it" in capsys.readouterr().err


def test_one_at_a_time(tmp_path, real_sleep):
    inside, most = [], []

    def job(number):
        with alone(tmp_path / "sub" / "a") as held:
            inside.append(number)
            most.append(len(inside))
            time.sleep(0.005)
            inside.remove(number)
            if number % 3 == 0:
                raise KeyError(number)
            return held

    said = together(9, job)
    assert said.count(True) == 6 and set(most) == {1} and list((tmp_path / "sub").iterdir()) == []


def test_a_folder_that_another_process_removes_while_it_is_made(tmp_path, monkeypatch):
    folder, real, removed = tmp_path / "sub", os.mkdir, []

    def mkdir(path, *args, **options):
        if Path(path) == folder and len(removed) < 2:  # it was there when `mkdir` looked, and is gone when `mkdir` looks again
            removed.append(path)
            raise FileExistsError(17, "File exists", path)
        real(path, *args, **options)

    monkeypatch.setattr(os, "mkdir", mkdir)
    with alone(folder / "a") as held:
        assert held and len(removed) == 2


@pytest.mark.parametrize("kind", ["file", "link", "above"])
def test_a_file_in_the_place_of_a_folder(tmp_path, kind):
    place = tmp_path / "sub"
    if kind == "link":
        place.symlink_to(tmp_path / "nowhere")
    else:
        place.write_bytes(b"")
    with pytest.raises((FileExistsError, NotADirectoryError)), alone((place / "more" if kind == "above" else place) / "a"):
        pass


@pytest.mark.parametrize("count", [1, 3])
def test_a_drive_without_locks(tmp_path, scripted, monkeypatch, count):
    """Each process has a file of its own there, and the last one wins."""
    monkeypatch.setattr(locks, "_try_lock", lambda _: None)
    scripted.play(slowly(DATA))
    (tmp_path / ".part-a.nii.gz").write_bytes(OTHER[:90_000])  # of another process, perhaps
    said = together(count, lambda _: fetch(scripted.url, tmp_path / "a.nii.gz", sha256=sha(DATA)))
    assert said == [tmp_path / "a.nii.gz"] * count
    assert {p.name for p in tmp_path.iterdir()} == {"a.nii.gz", ".part-a.nii.gz"}
    assert (tmp_path / "a.nii.gz").read_bytes() == DATA


@pytest.mark.skipif(os.name == "nt", reason="Windows has no umask")
@pytest.mark.parametrize("umask", [0o077, 0o002])
def test_files_and_folders_follow_the_umask(tmp_path, scripted, umask):
    content = tarball({"Task/dataset.json": b"{}", "Task/imagesTr/a.nii.gz": DATA})
    before = os.umask(umask)
    try:
        scripted.play(whole())
        fetch(scripted.url, tmp_path / "a.nii.gz", sha256=sha(DATA))
        scripted.play(whole(content))
        fetch_archive(scripted.url, tmp_path / "task", md5=hashlib.md5(content).hexdigest(), ready=lambda _: False)
    finally:
        os.umask(before)
    for path in tmp_path.rglob("*"):
        assert stat.S_IMODE(path.stat().st_mode) == (0o777 if path.is_dir() else 0o666) & ~umask, path


def test_a_link_is_written_through(tmp_path, scripted):
    (tmp_path / "disk").mkdir()
    try:
        (tmp_path / "a.nii.gz").symlink_to("disk/real.gz")
    except OSError:
        pytest.skip("this user may not make links")
    scripted.play(whole())
    fetch(scripted.url, tmp_path / "a.nii.gz", sha256=sha(DATA))
    assert (tmp_path / "a.nii.gz").is_symlink() and (tmp_path / "disk" / "real.gz").read_bytes() == DATA
    assert [p.name for p in (tmp_path / "disk").iterdir()] == ["real.gz"]


def test_a_folder_given_as_a_dot(tmp_path, scripted, monkeypatch):
    content = tarball({"dataset.json": b"{}", "imagesTr/a.nii.gz": DATA})
    scripted.play(whole(content))
    (tmp_path / "task").mkdir()
    monkeypatch.chdir(tmp_path / "task")
    md5 = hashlib.md5(content).hexdigest()
    fetch_archive(scripted.url, locks.Path("."), md5=md5, ready=lambda place: (place / "dataset.json").is_file())
    assert sorted(p.name for p in (tmp_path / "task").iterdir()) == ["dataset.json", "imagesTr"]

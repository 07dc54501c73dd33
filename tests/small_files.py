"""Files that several test files make: images, archives, and a server that hands them out."""

from __future__ import annotations

import io
import tarfile
import threading
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import nibabel
import numpy as np

from medseg_lite.engine.stored import StoredCase, write
from medseg_lite.volume import Case

SPACING = (0.9375, 1.25, 3.0)


def affine_of(axes=(0, 1, 2), signs=(1, 1, 1), spacing=SPACING, origin=(-90.5, 12.25, 33.0)) -> np.ndarray:
    """Index i grows along world axis `axes[i]`, upwards or downwards."""
    affine = np.zeros((4, 4))
    for index, (axis, sign, size) in enumerate(zip(axes, signs, spacing)):
        affine[axis, index] = sign * size
    affine[:, 3] = (*origin, 1)
    return affine


def noise(shape, dtype=np.float32) -> np.ndarray:
    rng = np.random.default_rng(0)
    return (rng.normal(size=shape) if np.dtype(dtype).kind == "f" else rng.integers(0, 100, shape)).astype(dtype)


def nifti(path, array, affine=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    nibabel.save(nibabel.Nifti1Image(array, np.eye(4) if affine is None else affine), path)
    return path


def scan(seed: int = 0, shape=(6, 7, 8)) -> np.ndarray:
    """Noise in the middle, a background of zeros."""
    array = np.zeros(shape, np.float32)
    array[1:-1, 1:-1, 1:-1] = np.random.default_rng(seed).uniform(1, 2, [n - 2 for n in shape])
    return array


def classes(seed: int = 0, shape=(6, 7, 8), among=(0, 1, 2, 4)) -> np.ndarray:
    return np.random.default_rng(seed).choice(among, shape).astype(np.uint8)


def mhd(path, array, spacing=(0.6, 0.6, 3.6)):
    types = {"uint8": "MET_UCHAR", "int16": "MET_SHORT", "float32": "MET_FLOAT"}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(
        f"ObjectType = Image\nNDims = 3\nElementSpacing = {' '.join(map(str, spacing))}\n"
        f"DimSize = {' '.join(map(str, array.shape))}\nElementType = {types[array.dtype.name]}\nElementDataFile = {path.stem}.raw\n"
    )
    path.with_suffix(".raw").write_bytes(array.tobytes(order="F"))
    return path


def promise_case(folder, name="Case00", seed=0, shape=(6, 7, 4)):
    """Write a case of PROMISE12 and return what its files hold."""
    image = np.random.default_rng(seed).integers(0, 900, shape).astype(np.int16)
    label = np.zeros(shape, np.uint8)
    label[2:4, 3:5, 1:3] = 1
    mhd(folder / f"{name}.mhd", image)
    mhd(folder / f"{name}_segmentation.mhd", label)
    return image, label


def brain(seed: int = 0, shape=(19, 23, 17), *, mask: bool = True) -> Case:
    """Two channels of noise in an ellipsoid, constants around it, labels 0, 1, 2 and 4 inside, one of them outside."""
    rng = np.random.default_rng(seed)
    grid = np.stack(np.meshgrid(*(np.linspace(-1, 1, n) for n in shape), indexing="ij"))
    inside = (grid**2).sum(0) < 0.6 + 0.1 * rng.random()
    image = np.where(inside, rng.normal(size=(2, *shape)), np.array([-1.5, 0.25])[:, None, None, None])
    label = np.where(inside, rng.choice([0, 1, 2, 4], shape, p=[0.8, 0.1, 0.06, 0.04]), 0)
    label[1, 2, 3] = 2
    return Case(
        image.astype(np.float32),
        ("flair", "t1c"),
        f"brain{seed}",
        label.astype(np.uint8),
        inside if mask else None,
        np.diag([-2.0, 1, 3, 1]),
        "LPS",
        info={"classes": ("a", "b"), "site": np.int64(3)},
    )


def kept(tmp_path, case: Case, **options) -> StoredCase:
    """Return the case from the file that `write` made of it."""
    return StoredCase(write(tmp_path / f"{case.name}.safetensors", case, **options))


def tarball(members: dict[str, bytes | tarfile.TarInfo], mode: str = "w") -> bytes:
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode=mode) as file:
        for name, data in members.items():
            if isinstance(data, tarfile.TarInfo):
                file.addfile(data)
            else:
                info = tarfile.TarInfo(name)
                info.size, info.mode = len(data), 0o6777
                file.addfile(info, io.BytesIO(data))
    return content.getvalue()


def special(name: str, kind: bytes, target: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


def zipped(members: dict[str, bytes], modes: dict[str, int] | None = None) -> bytes:
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w", zipfile.ZIP_DEFLATED) as file:
        for name, data in members.items():
            info = zipfile.ZipInfo(name)
            info.external_attr = (modes or {}).get(name, 0o100644) << 16
            file.writestr(info, data)
    return content.getvalue()


class Server:
    """Answers each path with what `files` holds.

    A path in `cut` sends that many bytes of what it announces and hangs up, the first time; one in `always_cut` every time;
    one in `no_ranges` sends the whole file whatever part is asked for.
    """

    def __init__(self):
        self.files: dict[str, bytes] = {}
        self.cut: dict[str, int] = {}
        self.always_cut: dict[str, int] = {}
        self.no_ranges: set[str] = set()
        self.asked: list[str] = []
        self.ranges: list[str | None] = []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                outer.asked.append(self.path)
                outer.ranges.append(self.headers["Range"])
                content, start = outer.files.get(self.path), 0
                if content is None:
                    self.send_error(404, "not here")
                    return
                if self.headers["Range"] and self.path not in outer.no_ranges:
                    start = int(self.headers["Range"].removeprefix("bytes=").removesuffix("-"))
                if start and start >= len(content):
                    self.send_response(416)
                    self.send_header("Content-Range", f"bytes */{len(content)}")
                    self.send_header("Content-Length", "0")
                    self.end_headers()
                    return
                self.send_response(206 if start else 200)
                self.send_header("Content-Length", str(len(content) - start))
                if start:
                    self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
                self.end_headers()
                part = content[start:]
                self.wfile.write(part[: outer.always_cut.get(self.path, outer.cut.pop(self.path, len(part)))])

            def log_message(self, *_):
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()

    def close(self):
        self._server.shutdown()
        self._server.server_close()

"""What several test files share: small cases, and networks whose every parameter matters."""

from __future__ import annotations

import signal

import fake_device
import numpy as np
import pytest
import torch
from small_files import Server

from medseg_lite import models
from medseg_lite.volume import Case

torch.set_num_threads(1)  # the tensors are tiny: threads would only wait for each other
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # a shell starts jobs in the background so; some tests press Ctrl-C
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_make_parametrize_id(config, val, argname):
    """Name long bytes by their length: a test's name is the same in every process, whatever time a gzip file holds."""
    return f"{argname}: {len(val)} bytes" if isinstance(val, bytes) and len(val) > 16 else None


@pytest.fixture
def noise_case():
    """`noise_case(shape, channels=..., seed=...)`: noise, with a label that can be told from its first channel."""

    def make(shape=(12, 15, 9), *, channels=("flair", "t1c"), seed=0, mask=False, name="noise") -> Case:
        rng = np.random.default_rng(seed)
        image = rng.normal(size=(len(channels), *shape)).astype(np.float32)
        label = (image[0] > 0).astype(np.uint8)
        inside = None
        if mask:
            inside = np.zeros(shape, bool)
            inside[2:-3, 1:-2, 2:-1] = True
            inside &= rng.random(shape) < 0.8
        return Case(image=image, channels=channels, name=name, label=label, mask=inside)

    return make


@pytest.fixture
def grid_case():
    """`grid_case(shape)`: the intensities of a voxel are its own indices (d, h, w), so that a patch tells where it is from."""

    def make(shape=(14, 11, 12), *, classes=3, mask=None, name="grid") -> Case:
        image = np.stack(np.meshgrid(*(np.arange(n) for n in shape), indexing="ij")).astype(np.float32)
        label = ((image[0] + 2 * image[1] + 5 * image[2]) % classes).astype(np.uint8)
        return Case(image=image, channels=("d", "h", "w"), name=name, label=label, mask=mask)

    return make


@pytest.fixture
def blobs():
    """`blobs(seed, shape)`: a random object whose voxels cluster a little, never empty."""

    def make(seed: int, shape: tuple[int, ...], density: float = 0.3) -> np.ndarray:
        rng = np.random.default_rng(seed)
        mask = rng.random(shape) < density
        mask |= np.roll(mask, 1, axis=0) & (rng.random(shape) < 0.5)
        mask.flat[rng.integers(mask.size)] = True
        return mask

    return make


@pytest.fixture
def stir():
    """`stir(model)`: move biases, slopes and normalisation away from their neutral starting values, as training does."""

    def apply(model: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim == 1:
                    parameter += 0.2 * torch.randn(parameter.shape, generator=generator)
            for name, buffer in model.named_buffers():
                if name.endswith("running_mean"):
                    buffer.copy_(0.3 * torch.randn(buffer.shape, generator=generator))
                elif name.endswith("running_var"):
                    buffer.copy_(0.5 + torch.rand(buffer.shape, generator=generator))
        return model.eval()

    return apply


@pytest.fixture
def gpu(request, monkeypatch):
    """A CUDA GPU: the real one where there is one, else a fake T4, or the one that the test asks for:

        @pytest.mark.parametrize("gpu", ["A100"], indirect=True)

    A real one counts nothing: `gpu.counted` is False. It computes float32 products in float32, as the fake one does.
    """
    if torch.cuda.is_available():
        monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
        yield fake_device.real()
    else:
        with fake_device.cuda(getattr(request, "param", "T4")) as fake:
            yield fake


@pytest.fixture
def server(monkeypatch):
    """A server of files on this machine, see `small_files.Server`."""
    for variable in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(variable, raising=False)
    server = Server()
    yield server
    server.close()


@pytest.fixture
def network(stir):
    """`network("deepmedic")`: a narrow network for two channels and three classes whose every parameter matters."""

    def build(name: str, **options):
        torch.manual_seed(0)
        return stir(getattr(models, name)(in_channels=2, classes=3, width=0.1, **options))

    return build

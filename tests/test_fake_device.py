"""The promises of `fake_device`: what it catches is caught, what it counts is counted, and nothing of PyTorch stays changed."""

from __future__ import annotations

import contextlib
import copy
import gc
import io
import threading
from concurrent.futures import ThreadPoolExecutor

import fake_device
import numpy as np
import pytest
import torch
from fake_device import FakeTensor, optimizers
from safetensors.torch import load, save
from torch import nn
from torch.nn import functional as F

from medseg_lite import devices
from medseg_lite.engine.precision import number_type

MIXED = "Expected all tensors to be on the same device, but found at least two devices, cuda:0 and cpu"


@pytest.fixture(autouse=True)
def no_real_gpu():
    if torch.cuda.is_available() or torch.backends.mps.is_available():
        pytest.skip("there is a real GPU")


@pytest.fixture
def t4():
    with fake_device.cuda("T4") as gpu:
        yield gpu


# ------------------------------------------------------------------------------------------------------------ devices


def test_tensors_say_where_they_are(t4):
    x = torch.ones(2, 3).cuda()
    for t in (
        x,
        x * 2,
        x.T,
        x[0],
        torch.zeros_like(x),
        x.new_zeros(2),
        torch.tensor([1], device="cuda"),
        torch.eye(2).to(x.device),
    ):
        assert t.device == torch.device("cuda", 0) and t.is_cuda and not t.is_cpu and isinstance(t, FakeTensor)
    for t in (x.cpu(), x.to("cpu"), torch.zeros_like(x, device="cpu"), torch.ones(2)):
        assert t.device == torch.device("cpu") and not t.is_cuda and type(t) is torch.Tensor
    assert torch.zeros_like(x, device="meta").is_meta
    assert x.to("cuda") is x and x.to(x.device, torch.float32) is x and x.to(x.device, copy=True) is not x


CPU_MEETS_GPU = {
    "sum": lambda here, there: here + there,
    "other way": lambda here, there: there + here,
    "a number of the GPU": lambda here, there: here + there[0, 0],
    "in place": lambda here, there: there.add_(here),
    "a list of tensors": lambda here, there: torch._foreach_add([there], [here]),
    "product": lambda here, there: there @ here,
    "convolution": lambda here, there: F.conv2d(there[None, None], here[None, None]),
    "concatenation": lambda here, there: torch.cat([here, there]),
    "loss": lambda here, there: F.cross_entropy(there, here.argmax(1)),
    "value of an index": lambda here, there: there.__setitem__((slice(None), torch.tensor([0])), here[:, :1]),
    "gather": lambda here, there: there.gather(1, here.long()),
    "a number as index": lambda here, there: there.index_select(0, torch.tensor(0)),
    "where": lambda here, there: torch.where(there > 0, here, 0.0),
}


@pytest.mark.parametrize("meeting", CPU_MEETS_GPU)
def test_tensors_of_two_devices_do_not_meet(t4, meeting):
    here = torch.eye(3)
    with pytest.raises(RuntimeError, match=MIXED):
        CPU_MEETS_GPU[meeting](here, here.cuda())


def test_an_index_on_the_gpu_does_not_fit_a_tensor_on_the_cpu(t4):
    x = torch.arange(4)
    for index in (torch.tensor([1, 2], device="cuda"), (x > 1).cuda()):
        with pytest.raises(RuntimeError, match="indices should be either on cpu or on the same device"):
            x[index]


def test_meetings_that_cuda_allows(t4):
    x, number = torch.arange(4.0, device="cuda"), torch.tensor(2.0)
    assert (x * number).tolist() == [0, 2, 4, 6] and torch.where(x > 1, x, number).tolist() == [2, 2, 2, 3]
    assert x[torch.tensor([3, 0])].tolist() == [3, 0]  # an index may lie on the CPU
    x[torch.tensor([True, False, False, True])] = number
    assert x.tolist() == [2, 1, 2, 2]
    assert torch.zeros(4).copy_(x).tolist() == [2, 1, 2, 2]


def test_numpy_needs_the_cpu(t4):
    x = torch.ones(2, device="cuda")
    for read in (lambda: x.numpy(), lambda: np.asarray(x), lambda: np.add(x, 1)):
        with pytest.raises(TypeError, match=r"can't convert cuda:0 device type tensor to numpy\. Use Tensor\.cpu\(\)"):
            read()
    assert x.cpu().numpy().tolist() == [1, 1] and torch.as_tensor(np.ones(2), device="cuda").is_cuda


def test_there_is_one_gpu(t4):
    assert torch.cuda.device_count() == 1 and torch.ones(1, device="cuda:0").is_cuda
    with pytest.raises(RuntimeError, match="invalid device ordinal"):
        torch.ones(1, device="cuda:1")
    with pytest.raises(RuntimeError, match="in use already"), fake_device.mps():
        pass


@pytest.mark.parametrize(
    ("preset", "described", "trains_in", "native"),
    [
        ("T4", "Tesla T4, 15 GB", torch.float32, False),
        ("L4", "NVIDIA L4, 23 GB", torch.bfloat16, True),
        ("A100", "NVIDIA A100-SXM4-40GB, 40 GB", torch.bfloat16, True),
    ],
)
def test_presets(preset, described, trains_in, native):
    with fake_device.cuda(preset) as gpu:
        device = devices.find_device()
        assert device.type == "cuda" and devices.describe_device(device) == described
        assert number_type("auto", device, spatial_dims=3) == trains_in
        assert torch.cuda.is_bf16_supported(including_emulation=False) is native
        assert torch.cuda.is_bf16_supported()  # emulation counts, also on a T4
        assert torch.cuda.get_device_name() == gpu.name and torch.cuda.get_device_capability() == gpu.capability
        assert torch.accelerator.current_accelerator() == torch.device("cuda") and torch.version.cuda


# ------------------------------------------------------------------------------------------------- numbers and their types


def test_half_precision_rounds_and_overflows(t4):
    x = torch.tensor([1.0, 300.0, 65504.0], device="cuda").half()
    assert (x[0] + 1e-4).item() == 1 and (x[:2] * x[1]).tolist() == [300, torch.inf] and (x[2] * 2).item() == torch.inf
    ones = torch.ones(1, 70_000, device="cuda").half()
    assert (ones @ ones.T).item() == torch.inf and (ones.bfloat16() @ ones.bfloat16().T).item() == 70_144
    assert (ones[:, :2049] @ ones[:, :2049].T).item() == 2048  # 2049, added up in float32 and rounded once


def test_a_convolution_rounds_as_a_matrix_product_does(t4):
    torch.manual_seed(0)
    x, w = torch.randn(2, 3, 6, 6), torch.randn(4, 3, 3, 3)
    there, weight = (t.half().cuda().requires_grad_() for t in (x, w))
    y = F.conv2d(there, weight)
    exact = F.conv2d(x.half().double(), w.half().double())
    assert y.dtype == torch.float16 and torch.equal(y.detach().cpu(), exact.half())
    y.sum().backward()
    assert weight.grad.dtype == torch.float16 and weight.grad.is_cuda and there.grad.shape == x.shape


def test_autocast_chooses_cuda_s_types(t4):
    x, conv = torch.randn(1, 2, 5, 5, device="cuda"), nn.Conv2d(2, 3, 3).cuda()
    for dtype in (torch.float16, torch.bfloat16):
        with torch.autocast("cuda", dtype=dtype):
            y = conv(x)
            assert y.dtype == dtype and (y @ y.transpose(2, 3)).dtype == dtype
            assert y.softmax(1).dtype == y.log().dtype == y.sum().dtype == torch.float32  # on a CPU, log would stay half
            assert F.cross_entropy(y, torch.zeros(1, 3, 3, dtype=torch.long, device="cuda")).dtype == torch.float32
    assert conv(x).dtype == torch.float32


def test_a_scaler_skips_an_update_that_overflows(t4):
    weight = nn.Parameter(torch.ones(2, device="cuda"))
    optimizer, scaler = torch.optim.SGD([weight], lr=1.0), torch.amp.GradScaler("cuda", init_scale=1024.0)
    for factor, expected, scale in ((1.0, 0.0, 1024.0), (1e5, 0.0, 512.0)):
        optimizer.zero_grad()
        with torch.autocast("cuda", dtype=torch.float16):
            loss = (weight.half() * factor).sum()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        assert weight.tolist() == [expected] * 2 and scaler.get_scale() == scale


def test_gradients_are_those_of_the_cpu(t4):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv3d(1, 4, 3), nn.BatchNorm3d(4), nn.PReLU(4), nn.MaxPool3d(2), nn.Flatten(), nn.Linear(32, 2))
    twin, x = copy.deepcopy(net).cuda(), torch.randn(3, 1, 6, 6, 6)
    net(x).square().sum().backward()
    twin(x.cuda()).square().sum().backward()
    for here, there in zip(net.parameters(), twin.parameters()):
        assert there.grad.is_cuda
        torch.testing.assert_close(there.grad.cpu(), here.grad)


def test_random_numbers_of_its_own(t4):
    def draw(**options):
        return torch.rand(3, device="cuda", **options).tolist()

    torch.manual_seed(5)
    here = torch.rand(3).tolist()
    torch.manual_seed(5)
    there = draw()
    assert there != here and draw() != there and torch.rand(3).tolist() == here  # the GPU's draw left the CPU's generator alone
    state, kept = torch.cuda.get_rng_state(), torch.get_rng_state()
    following = F.dropout(torch.ones(99, device="cuda")).tolist()
    assert torch.equal(torch.get_rng_state(), kept)
    torch.manual_seed(5)
    assert draw() == there
    torch.cuda.set_rng_state(state)
    assert F.dropout(torch.ones(99, device="cuda")).tolist() == following
    torch.cuda.manual_seed(5)
    assert draw() == there
    with torch.random.fork_rng(devices=[0], device_type="cuda"):
        draw()
    with pytest.raises(TypeError, match=r"RNG state must be a torch\.ByteTensor"):
        torch.cuda.set_rng_state(state.cuda())


def test_a_generator_belongs_to_a_device(t4):
    gpu, cpu = (torch.Generator(device).manual_seed(1) for device in ("cuda", "cpu"))
    assert gpu.device.type == "cuda" and cpu.device.type == "cpu" and torch.Generator().device.type == "cpu"
    assert torch.rand(2, generator=gpu, device="cuda").is_cuda
    with pytest.raises(RuntimeError, match="Expected a 'cuda' device type for generator but found 'cpu'"):
        torch.rand(2, generator=cpu, device="cuda")


# ------------------------------------------------------------------------------------------------------------- counters


def test_memory_is_counted_while_it_lives(t4):
    before = t4.used
    x = torch.ones(1000, device="cuda")
    y, z = x[10:].view(-1), x.mul_(2)  # of the same memory
    assert t4.used == before + 4000 == torch.cuda.memory_allocated()
    del x, y
    gc.collect()
    assert t4.used == before + 4000
    del z
    gc.collect()
    assert t4.used == before and t4.peak == before + 4000 == torch.cuda.max_memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    assert t4.peak == before


def test_what_autograd_keeps_is_counted(t4):
    x = torch.ones(1000, device="cuda", requires_grad=True)
    y = x.exp().sum()
    assert t4.used >= 8000
    y.backward()
    del y
    gc.collect()
    assert t4.used == 8000  # x and its gradient


def test_memory_that_was_freed_is_kept_for_later():
    with fake_device.cuda(memory=10_000) as gpu:
        x = torch.ones(2000, device="cuda")
        del x
        gc.collect()
        assert gpu.used == 0 and torch.cuda.memory_reserved() == 8000 and torch.cuda.mem_get_info() == (2000, 10_000)
        assert devices.free_memory(gpu.device) == 10_000
        x = torch.ones(10, device="cuda")
        assert torch.cuda.memory_reserved() == 8000
        del x
        torch.cuda.empty_cache()
        assert torch.cuda.memory_reserved() == 0 and torch.cuda.mem_get_info() == (10_000, 10_000)


def test_memory_ends():
    with fake_device.cuda(memory=10_000) as gpu:
        x = torch.ones(2000, device="cuda")
        with pytest.raises(torch.OutOfMemoryError, match="CUDA out of memory") as caught:
            x + 1
        assert devices.is_out_of_memory(caught.value) and gpu.used == 8000
        assert (x[:500] + 1).is_cuda


WAITS = {
    "item": (
        lambda x: x[0].item(),
        lambda x: float(x[0]),
        lambda x: bool(x[0] > 0),
        lambda x: int(x[0]),
        lambda x: f"{x[0]:.1f}",
    ),
    "copy to the CPU": (lambda x: x.cpu(), lambda x: x.to("cpu"), lambda x: torch.zeros(3).copy_(x), lambda x: x.tolist()),
    "nonzero": (lambda x: x.nonzero(), lambda x: torch.where(x > 0)),
    "mask as index": (lambda x: x[x > 0], lambda x: x.masked_select(x > 0), lambda x: x.__setitem__(x > 0, x[1:].clone())),
    "bincount": (lambda x: x.long().bincount(),),
    "unique": (lambda x: x.unique(),),
    "equal": (lambda x: torch.equal(x, x),),
    "repeat_interleave": (lambda x: torch.repeat_interleave(x.long()),),
    "synchronize": (lambda x: torch.cuda.synchronize(),),
}
NO_WAITS = (
    lambda x: x.cuda() + 1,
    lambda x: x[torch.tensor([1])],
    lambda x: x.__setitem__(x > 0, 0.0),
    lambda x: x.masked_fill(x > 0, 1.0),
    lambda x: torch.where(x > 0, x, 0.0),
    lambda x: F.one_hot(x.long(), 3),
    lambda x: x.to("meta"),
    lambda x: torch.ones(2)[torch.ones(2) > 0].cuda(),
    lambda x: x[torch.tensor([True, False, True])],
)


@pytest.mark.parametrize(("reason", "way"), [(reason, n) for reason, ways in WAITS.items() for n in range(len(ways))])
def test_what_the_cpu_waits_for(t4, reason, way):
    x = torch.arange(3.0, device="cuda")
    WAITS[reason][way](x)
    assert t4.syncs == {reason: 1}


@pytest.mark.parametrize("way", range(len(NO_WAITS)))
def test_what_the_cpu_does_not_wait_for(t4, way):
    NO_WAITS[way](torch.arange(3.0, device="cuda"))
    assert not t4.syncs


def test_work_by_hand(t4):
    """3×4 by 4×5 is 3 · 4 · 5 products and as many sums; a 3² convolution of 2 maps to 4 maps of 6², 8 · 6² · 9 of them."""
    x, y = torch.ones(3, 4, device="cuda"), torch.ones(4, 5, device="cuda")
    t4.launches.clear(), t4.bytes.clear()
    assert (x @ y).sum() is not None
    assert (
        t4.flops == {"float32": 120} and t4.launches == {"float32": 2} and t4.bytes == {"float32": 4 * (12 + 20 + 15 + 15 + 1)}
    )
    image = torch.ones(1, 2, 8, 8, device="cuda", requires_grad=True)
    conv = nn.Conv2d(2, 4, 3).cuda()
    t4.flops.clear()
    with torch.autocast("cuda", dtype=torch.float16):
        conv(image).sum().backward()
    assert t4.flops == {"half": 3 * 2 * 8 * 36 * 9}  # forward, and the gradients of the image and the kernel


def test_views_and_empty_tensors_are_no_work(t4):
    x = torch.empty(4, 4, device="cuda")
    assert x.T[1:].detach().unflatten(0, (3, 1)).shape == (3, 1, 4) and not t4.launches


def test_products_may_be_left_out():
    def learn(compute):
        with fake_device.cuda("A100", compute=compute) as gpu:
            torch.manual_seed(0)
            net = nn.Sequential(nn.Conv2d(2, 3, 3), nn.ReLU(), nn.ConvTranspose2d(3, 2, 2, bias=False)).cuda()
            before, x = gpu.used, torch.rand(1, 2, 7, 7, device="cuda", requires_grad=True)
            with torch.autocast("cuda", dtype=torch.bfloat16):
                y = net(x)
            (y + 1).float().square().sum().backward()
            kinds = [(t.device, t.dtype, t.shape) for t in (y, x.grad, *(p.grad for p in net.parameters()))]
            return y.tolist(), kinds, (gpu.flops, gpu.bytes, gpu.launches, gpu.peak - before)

    (y, kinds, work), (zeros, same, counted) = learn(True), learn(False)
    assert kinds == same and work == counted
    assert np.any(y) and not np.any(zeros)


def test_gradients_are_computed_where_they_are_asked_for(t4):
    """Gradients in Python make tensors on the GPU too, whichever thread PyTorch would compute them in."""

    class Double(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return 2 * x

        @staticmethod
        def backward(ctx, gradient):
            return gradient * torch.tensor(2.0, device="cuda")

    x = torch.ones(3, device="cuda", requires_grad=True)
    Double.apply(x).sum().backward()
    assert x.grad.tolist() == [2, 2, 2]


def test_the_numbers_of_a_tensor_are_not_exchanged_without_notice(t4):
    x = nn.Parameter(torch.ones(3, device="cuda"))
    x.data.mul_(2)
    assert x.tolist() == [2, 2, 2]
    with pytest.raises(AttributeError):
        x.data = torch.zeros(3, device="cuda")


# ------------------------------------------------------------------------------------- modules, files, threads, optimisers


def test_a_module_keeps_its_parameters(t4):
    net = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    before = list(net.parameters())
    optimizer = torch.optim.SGD(net.parameters(), lr=1.0)
    net.cuda()
    assert [id(p) for p in net.parameters()] == [id(p) for p in before] == [id(p) for p in optimizer.param_groups[0]["params"]]
    assert all(isinstance(p, nn.Parameter) and p.is_cuda for p in before) and all(b.is_cuda for b in net.buffers())
    net.cpu()
    assert not any(t.is_cuda for t in net.state_dict().values())


def test_deep_copies_are_apart(t4):
    net = nn.Linear(2, 2, device="cuda")
    net(torch.ones(1, 2, device="cuda")).sum().backward()
    twin = copy.deepcopy(net)
    with torch.no_grad():
        twin.weight.zero_()
    assert net.weight.any() and isinstance(twin.weight, nn.Parameter) and twin.weight.is_cuda and twin.weight.requires_grad
    assert twin.weight.grad is not net.weight.grad and torch.equal(twin.weight.grad, net.weight.grad)
    with pytest.raises(RuntimeError, match="graph leaves"):
        copy.deepcopy(net.weight * 2)


@pytest.mark.filterwarnings("ignore:TypedStorage is deprecated")  # safetensors uses it
def test_files(t4):
    x = torch.arange(3.0, device="cuda")
    file = io.BytesIO()
    torch.save({"x": x, "here": torch.ones(1)}, file)

    def read(**options):
        file.seek(0)
        found = torch.load(file, weights_only=True, **options)
        assert found["x"].tolist() == [0, 1, 2]
        return found["x"].is_cuda, found["here"].is_cuda

    assert read() == (True, False) and read(map_location="cpu") == (False, False)
    assert read(map_location="cuda") == read(map_location=torch.device("cuda", 0)) == (True, True)
    with pytest.raises(RuntimeError):
        save({"x": x})
    assert load(save({"x": x.cpu()}))["x"].tolist() == [0, 1, 2]


def test_threads_have_the_gpu_too(t4):
    def work(n):
        x = torch.ones(n, device="cuda", requires_grad=True)
        x.square().sum().backward()
        return x.grad.sum().item()

    with ThreadPoolExecutor(3) as pool:
        assert list(pool.map(work, range(1, 9))) == [2 * n for n in range(1, 9)]
    thread = threading.Thread(target=lambda: torch.ones(1, device="cuda"))
    thread.start()
    thread.join()
    assert t4.syncs["item"] == 8


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.Adam, torch.optim.RMSprop])
def test_pytorch_s_optimisers_work_on_lists(t4, kind):
    """As on a GPU: a fixed number of kernels for any number of parameters, and no wait."""
    launches = []
    for count in (2, 20):
        parameters = [nn.Parameter(torch.ones(3, device="cuda")) for _ in range(count)]
        for p in parameters:
            p.grad = torch.ones_like(p)
        optimizer = kind(parameters, lr=0.1)
        optimizer.step()
        t4.launches.clear()
        optimizer.step()
        launches.append(t4.launches["float32"])
    assert launches[0] == launches[1] > 0 and not t4.syncs


# ------------------------------------------------------------------------------------------------------- Apple, and after


def test_apple_s_gpu_has_no_float64():
    with fake_device.mps(memory=1e6) as gpu:
        x = torch.ones(3, device="mps")
        assert x.device == torch.device("mps", 0) and x.is_mps and not x.is_cuda and not torch.cuda.is_available()
        for make in (
            lambda: x.double(),
            lambda: torch.zeros(2, dtype=torch.float64, device="mps"),
            lambda: torch.ones(1).double().to("mps"),
        ):
            with pytest.raises(TypeError, match="MPS framework doesn't support float64"):
                make()
        assert x.cpu().double().sum() == 3 and gpu.syncs == {"copy to the CPU": 1}
        with pytest.raises(RuntimeError, match="two devices, mps:0 and cpu"):
            x + torch.ones(3)
        assert devices.find_device("mps").type == "mps" and devices.find_device().type == "cpu"
        assert devices.free_memory(x.device) == 1e6 - gpu.used
        devices.release_memory(x.device)
        state = torch.mps.get_rng_state()
        drawn = torch.rand(2, device="mps").tolist()
        torch.mps.set_rng_state(state)
        assert torch.rand(2, device="mps").tolist() == drawn
        torch.mps.synchronize()


@pytest.mark.parametrize("kind", [fake_device.cuda, fake_device.mps])
def test_nothing_stays_changed(kind):
    places = (torch, torch.cuda, torch.mps, torch.accelerator, torch.backends.mps, torch.version, torch.Tensor, nn.Module)
    places += (threading.Thread, optimizers, torch.__future__)

    def picture():
        flags = torch._C._only_lift_cpu_tensors(), torch.autograd.is_multithreading_enabled(), torch.is_grad_enabled()
        return [dict(vars(place)) for place in places], flags, torch.utils._python_dispatch._len_torch_dispatch_stack()

    devices.find_device()  # reads what is made at its first use
    before = picture()
    assert before[1] == (False, True, True)
    with contextlib.suppress(ZeroDivisionError), kind() as gpu:
        kept = nn.Linear(2, 2, device=gpu.device).weight
        assert picture() != before
        raise ZeroDivisionError
    assert picture() == before
    assert not torch.cuda.is_available() and not torch.accelerator.is_available()
    assert devices.find_device().type == "cpu" and devices.fault_of(gpu.device)
    assert kept.is_cpu is False and type(torch.ones(2) + 1) is torch.Tensor
    with pytest.raises(RuntimeError):
        torch.ones(1, device=gpu.device)


def test_a_real_gpu_is_used_instead(monkeypatch):
    for module, kind in ((torch.cuda, fake_device.cuda), (torch.backends.mps, fake_device.mps)):
        monkeypatch.setattr(module, "is_available", lambda: True)
        with pytest.raises(pytest.skip.Exception, match="there is a real GPU"):
            kind()


def test_a_pytorch_without_the_trick_skips(monkeypatch):
    monkeypatch.delattr(torch._C, "_acc")
    with pytest.raises(pytest.skip.Exception, match="no fake GPU with this build of PyTorch"), fake_device.cuda():
        pass

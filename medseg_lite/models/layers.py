"""The parts that several networks share: convolution blocks, batch normalisation, initialisation."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

CONV = {2: nn.Conv2d, 3: nn.Conv3d}


class RollingBatchNorm(nn.Module):
    """Batch normalisation whose inference statistics are the plain average over the last `window` training batches.

    DeepMedic keeps the mean and variance of its last 60 batches and averages them, the variance with the unbiased factor n/(n-1).
    An exponential average never quite forgets the statistics of the untrained network; this average does, which matters in
    short runs. It works on `(B, C, ...)` of any dimension.

    Args:
        channels: number of channels C.
        window: number of batches that the inference statistics average over.
        eps: small number that is added to the variance.

    Source: Ioffe and Szegedy 2015; Kamnitsas et al. 2017, section 2.3, and its code (rolling average over 60 batches).
    Taught in notebook 05.
    """

    def __init__(self, channels: int, *, window: int = 60, eps: float = 1e-5):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))
        self.register_buffer("recent", torch.zeros(window, 2, channels))
        self.register_buffer("batches", torch.zeros((), dtype=torch.long))

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps)
        if x.numel() == x.shape[1]:
            raise ValueError(
                f"batch normalisation cannot train on a single value per channel (input {tuple(x.shape)}); "
                "use a larger batch or a larger segment"
            )
        # With momentum 1 the running statistics become those of this batch, the variance already unbiased.
        mean, var = torch.zeros_like(self.running_mean), torch.zeros_like(self.running_var)
        y = F.batch_norm(x, mean, var, self.weight, self.bias, training=True, momentum=1.0, eps=self.eps)
        self.remember(mean, var)
        return y

    @torch.no_grad()
    def remember(self, mean: Tensor, var: Tensor) -> None:
        """Add the mean and the unbiased variance `(C,)` of one more batch to the average."""
        window = self.recent.shape[0]
        # An index that stays on the GPU: `recent[number]` would make the CPU wait for the number, and end a compiled graph.
        place = (self.batches % window).view(1)
        self.recent.index_copy_(0, place, torch.stack([mean, var])[None].to(self.recent.dtype))
        self.batches += 1
        filled = torch.arange(window, device=mean.device) < self.batches
        average = (self.recent * filled[:, None, None]).sum(0) / filled.sum()
        self.running_mean.copy_(average[0])
        self.running_var.copy_(average[1])

    def extra_repr(self) -> str:
        return f"{self.weight.numel()}, window={self.recent.shape[0]}, eps={self.eps}"


class ConvBlock(nn.Sequential):
    """Dropout, valid convolution, batch normalisation, PReLU: `(B, C_in, *n) -> (B, C_out, *(n - kernel + 1))`.

    Without batch normalisation the convolution has a bias instead. PReLU has one slope per channel, 0.01 at the start. Without
    dropout (a rate of 0) that layer does not exist.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel: int,
        *,
        spatial_dims: int = 3,
        batch_norm: bool = True,
        dropout: float = 0.0,
    ):
        super().__init__()
        if dropout:
            self.drop = nn.Dropout(dropout)
        self.conv = CONV[spatial_dims](in_channels, out_channels, kernel, bias=not batch_norm)
        if batch_norm:
            self.norm = RollingBatchNorm(out_channels)
        self.act = nn.PReLU(out_channels, init=0.01)


def init_he(model: nn.Module) -> None:
    """Draw every convolution's kernel from N(0, √(2/n_in)), n_in = C_in · kernel voxels; set biases to zero.

    Source: He et al. 2015; Kamnitsas et al. 2017, section 2.3.
    Taught in notebook 10.
    """
    _init(model, lambda kernel: nn.init.normal_(kernel, std=(2 / kernel[0].numel()) ** 0.5))


def init_normal(model: nn.Module, std: float = 0.01) -> None:
    """Draw every convolution's kernel from N(0, std), std a standard deviation; set biases to zero.

    Source: Kamnitsas et al. 2017, appendix B (shallow networks); Kayalibay et al. 2017, section 3.2.1.
    """
    _init(model, lambda kernel: nn.init.normal_(kernel, std=std))


def init_xavier(model: nn.Module) -> None:
    """Draw every convolution's kernel from N(0, √(2/(n_in + n_out))), n = C · kernel voxels; set biases to zero.

    Source: Glorot and Bengio 2010; Kayalibay et al. 2017, section 3.2.1.
    Taught in notebook 10.
    """
    _init(model, nn.init.xavier_normal_)


def init_uniform(model: nn.Module, bound: float = 0.005) -> None:
    """Draw every convolution's kernel from U(-bound, bound); set biases to zero.

    Source: Havaei et al. 2017.
    """
    _init(model, lambda kernel: nn.init.uniform_(kernel, -bound, bound))


def _init(model: nn.Module, draw: Callable[[Tensor], Tensor]) -> None:
    for conv in convolutions(model):
        draw(conv.weight)
        if conv.bias is not None:
            nn.init.zeros_(conv.bias)


def convolutions(model: nn.Module) -> list[nn.Module]:
    """Return every convolution of a network, in the order of its definition."""
    return [m for m in model.modules() if isinstance(m, nn.modules.conv._ConvNd)]


def scaled(count: int, width: float) -> int:
    """Return a number of feature maps times `width`, at least one."""
    return max(1, round(count * width))

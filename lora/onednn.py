"""oneDNN's matrix products, as a verb on a model: `use_onednn(model)`.

In float32 on a CPU torch's own products are MKL's, and on AMD's processors MKL takes its AVX2 path. oneDNN,
which is in torch as well, takes AVX-512 there and needs half the time (measured by `python bench.py step`).
Without AVX-512 it takes a fifth more than MKL, so the machine is asked, once: see IS_FASTER. Anywhere else,
on a GPU, in other types and under autocast the verb changes nothing.

Where oneDNN multiplies, neither for torch.func's transforms (no vmap, no double backward) nor for a weight
that is a DTensor.
"""

import zlib
from pathlib import Path

import torch
import torch.compiler.config
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import register_flop_formula

# torch.compile's cache knows an operator by its name alone: after an edit of one it would go on with the old
# backward. So this file, which defines them, is part of the cache's key. The CPU's vectors are as well: code
# made for AVX-512 writes half of its results where it is then compiled for AVX2, and the reverse writes
# past a tensor's end (ATEN_CPU_CAPABILITY, or one cache for unlike machines).
CPU_CAPABILITY = torch.backends.cpu.get_cpu_capability()
torch.compiler.config.cache_key_tag += f"/{zlib.crc32(Path(__file__).read_bytes()):x}/{CPU_CAPABILITY}"


def is_amd_with_avx512() -> bool:
    """Of this machine, as torch sees it: ATEN_CPU_CAPABILITY=avx2 makes it one without."""
    try:
        is_amd = "AuthenticAMD" in Path("/proc/cpuinfo").read_text()
    except OSError:  # no Linux
        return False
    return is_amd and torch.backends.cpu.get_cpu_capability() == "AVX512"


IS_FASTER = is_amd_with_avx512()  # than torch's own products


def use_onednn(model: nn.Module) -> nn.Module:
    """Have every nn.Linear of `model` multiply by oneDNN in float32 on a CPU where that is faster, in place.

    Parameters, their names and the state dict stay as they are. Subclasses of nn.Linear are left alone
    (LoRALinear asks `is_faster` itself). Call it before torch.compile. A second call changes nothing.
    """
    for module in model.modules():
        if IS_FASTER and type(module) is nn.Linear:
            module.__class__ = OneDNNLinear
    return model


def is_faster(tensor: Tensor) -> bool:
    """Whether this tensor's products should be oneDNN's. torch.compile can trace the question."""
    return IS_FASTER and tensor.device.type == "cpu" and tensor.dtype == torch.float32


# ---- the products, without gradients. They take what `takes` says yes to.


def takes(tensor: Tensor) -> bool:
    """Whether oneDNN can: not empty ones, nor with `torch.backends.mkldnn.flags(enabled=False)`."""
    if tensor.device.type != "cpu" or tensor.dtype != torch.float32 or tensor.numel() == 0:
        return False
    return torch.backends.mkldnn.is_available() and torch._C._get_mkldnn_enabled()


def make_whole(matrix: Tensor) -> Tensor:
    """The matrix without gaps between its rows: for a slice oneDNN takes a hundred times as long."""
    if matrix.is_contiguous() or matrix.t().is_contiguous():
        return matrix
    return matrix.contiguous()


def multiply(a: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:
    """a b + bias: (m, k), (k, n) and (n,) -> (m, n)."""
    return torch.ops.mkldnn._linear_pointwise(make_whole(a), make_whole(b).t(), bias, "none", [], "")


def get_weight_gradient(dy: Tensor, x: Tensor) -> Tensor:
    """dW = dy' x: (N, out) and (N, in) -> (out, in), with N large."""
    weight = x.new_empty(dy.shape[1], x.shape[1])  # its shape is all that is read
    return torch.ops.aten.mkldnn_linear_backward_weights(dy.to_mkldnn(), x.to_mkldnn(), weight, False)[0]


# ---- as operators, which torch.compile takes as they are; F.linear with a backward of its own


@torch.library.custom_op("prelora::linear", mutates_args=())
def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """F.linear of x (N, in), weight (out, in), bias (out,) -> (N, out), with its gradients."""
    if takes(x):
        return multiply(x, weight.t(), bias)
    return F.linear(x, weight, bias)


@torch.library.custom_op("prelora::mm", mutates_args=())
def mm(a: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:
    """a b + bias: (m, k), (k, n) and (n,) -> (m, n), without gradients."""
    if takes(a) and b.numel():
        return multiply(a, b, bias)
    return torch.mm(a, b) if bias is None else torch.addmm(bias, a, b)


@torch.library.custom_op("prelora::weight_gradient", mutates_args=())
def linear_dweight(dy: Tensor, x: Tensor) -> Tensor:
    """dweight (out, in) = dy' (out, N) x (N, in)."""
    if takes(x):
        return get_weight_gradient(dy, x)
    return torch.mm(dy.t(), x)


@linear.register_fake
def _(x, weight, bias):
    return x.new_empty(x.shape[0], weight.shape[0])


@mm.register_fake
def _(a, b, bias=None):
    return a.new_empty(a.shape[0], b.shape[1])


@linear_dweight.register_fake
def _(dy, x):
    return x.new_empty(dy.shape[1], x.shape[1])


# FLOPs from the tensors' shapes, two for a multiplication and its addition


@register_flop_formula(torch.ops.prelora.linear)
def linear_flops(x, weight, bias, **kwargs) -> int:
    return 2 * x[0] * weight[0] * weight[1]


@register_flop_formula(torch.ops.prelora.mm)
def mm_flops(a, b, *args, **kwargs) -> int:
    return 2 * a[0] * a[1] * b[1]


@register_flop_formula(torch.ops.prelora.weight_gradient)
def linear_dweight_flops(dy, x, **kwargs) -> int:
    return 2 * x[0] * dy[1] * x[1]


def setup_context(ctx, inputs, output) -> None:
    x, weight, _ = inputs
    need_x, need_weight = ctx.needs_input_grad[:2]
    ctx.save_for_backward(x if need_weight else None, weight if need_x else None)


def backward(ctx, dy: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    x, weight = ctx.saved_tensors
    need_x, need_weight, need_bias = ctx.needs_input_grad[:3]
    dx = mm(dy, weight) if need_x else None
    dweight = linear_dweight(dy, x) if need_weight else None
    dbias = dy.sum(0) if need_bias else None
    return dx, dweight, dbias


linear.register_autograd(backward, setup_context=setup_context)


class OneDNNLinear(nn.Linear):
    """(..., in) -> (..., out), with nn.Linear's parameters and function. `use_onednn` makes these."""

    def forward(self, x: Tensor) -> Tensor:
        if not is_faster(x) or self.weight.dtype != torch.float32 or torch.is_autocast_enabled("cpu"):
            return super().forward(x)
        y = linear(x.reshape(-1, self.in_features), self.weight, self.bias)  # (N, out)
        return y.view(*x.shape[:-1], self.out_features)

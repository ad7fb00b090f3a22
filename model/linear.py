"""Linear: nn.Linear, by oneDNN where torch would ask MKL.

In float32 on a CPU torch's matrix products are MKL's, and on AMD's processors MKL takes its AVX2 path: half of what oneDNN, which is in torch as
well, makes of AVX-512 (measured by `python bench.py step`; on Intel's the two are expected to be even). On a GPU, in other types and under autocast
this is nn.Linear. In float32 on a CPU not for torch.func's transforms (no vmap, no double backward), nor for a weight that is a DTensor.
"""

import zlib
from pathlib import Path

import torch
import torch.compiler.config
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import register_flop_formula

# torch.compile's cache knows an operator by its name alone: after an edit it would go on with the backward from before
torch.compiler.config.cache_key_tag += f"/{zlib.crc32(Path(__file__).read_bytes()):x}"


def onednn(tensor: Tensor) -> bool:
    """Whether oneDNN takes this tensor's products; `torch.backends.mkldnn.flags(enabled=False)` says no."""
    return (
        tensor.device.type == "cpu"
        and tensor.dtype == torch.float32
        and torch.backends.mkldnn.is_available()
        and torch._C._get_mkldnn_enabled()
        and tensor.numel() > 0
    )


def whole(matrix: Tensor) -> Tensor:
    """Without gaps: of a slice oneDNN takes a hundred times as long."""
    return matrix if matrix.is_contiguous() or matrix.t().is_contiguous() else matrix.contiguous()


@torch.library.custom_op("prelora::mm", mutates_args=())
def mm(a: Tensor, b: Tensor) -> Tensor:
    """a b, (m, k) and (k, n). No gradient."""
    if onednn(a):
        return torch.ops.mkldnn._linear_pointwise(whole(a), whole(b).t(), None, "none", [], "")
    return torch.mm(a, b)


@torch.library.custom_op("prelora::weight_gradient", mutates_args=())
def weight_gradient(dy: Tensor, x: Tensor) -> Tensor:
    """dy' x, (N, out) and (N, in), with N large. No gradient."""
    if onednn(x):
        weight = x.new_empty(dy.shape[1], x.shape[1])  # its shape is all that is read
        return torch.ops.aten.mkldnn_linear_backward_weights(dy.to_mkldnn(), x.to_mkldnn(), weight, False)[0]
    return torch.mm(dy.t(), x)


@torch.library.custom_op("prelora::linear", mutates_args=())
def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """F.linear of x (N, in), weight (out, in), bias (out,), with its gradients."""
    if onednn(x):
        return torch.ops.mkldnn._linear_pointwise(whole(x), whole(weight), bias, "none", [], "")
    return F.linear(x, weight, bias)


@mm.register_fake
def _(a, b):
    return a.new_empty(a.shape[0], b.shape[1])


@weight_gradient.register_fake
def _(dy, x):
    return x.new_empty(dy.shape[1], x.shape[1])


@linear.register_fake
def _(x, weight, bias):
    return x.new_empty(x.shape[0], weight.shape[0])


@register_flop_formula(torch.ops.prelora.mm)
def mm_flops(a, b, **kwargs) -> int:
    return 2 * a[0] * a[1] * b[1]


@register_flop_formula(torch.ops.prelora.weight_gradient)
def weight_gradient_flops(dy, x, **kwargs) -> int:
    return 2 * x[0] * dy[1] * x[1]


@register_flop_formula(torch.ops.prelora.linear)
def linear_flops(x, weight, bias, **kwargs) -> int:
    return 2 * x[0] * weight[0] * weight[1]


def setup_context(ctx, inputs, output):
    x, weight, _ = inputs
    need_x, need_weight = ctx.needs_input_grad[:2]
    ctx.save_for_backward(x if need_weight else None, weight if need_x else None)


def backward(ctx, dy):
    x, weight = ctx.saved_tensors
    need_x, need_weight, need_bias = ctx.needs_input_grad[:3]
    return (
        mm(dy, weight) if need_x else None,
        weight_gradient(dy, x) if need_weight else None,
        dy.sum(0) if need_bias else None,
    )


linear.register_autograd(backward, setup_context=setup_context)


class Linear(nn.Linear):
    """(..., in) -> (..., out), with nn.Linear's parameters, initialisation and function."""

    is_plain_linear = True  # for those who would put a Linear of their own in its place

    def forward(self, x: Tensor) -> Tensor:
        if (
            x.device.type != "cpu"
            or x.dtype != torch.float32
            or self.weight.dtype != torch.float32
            or torch.is_autocast_enabled("cpu")
        ):
            return super().forward(x)
        return linear(x.reshape(-1, self.in_features), self.weight, self.bias).view(
            *x.shape[:-1], self.out_features
        )

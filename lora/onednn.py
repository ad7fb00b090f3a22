"""oneDNN's matrix products, as a verb on a model: `use_onednn(model)`.

In float32 on a CPU torch's own products are MKL's, and on AMD's processors MKL takes its AVX2 path. oneDNN,
which is in torch as well, takes AVX-512 there and needs half the time (measured by `python bench.py step`; on
Intel's processors the two are expected to be even). On a GPU, in other types and under autocast the verb
changes nothing.

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
# backward. So the files that define operators are part of the cache's key.
for _file in ("onednn.py", "kernels.py"):
    torch.compiler.config.cache_key_tag += f"/{zlib.crc32(Path(__file__).with_name(_file).read_bytes()):x}"


def use_onednn(model: nn.Module) -> nn.Module:
    """Have every nn.Linear and LoRALinear of `model` multiply by oneDNN in float32 on a CPU, in place.

    Parameters, their names and the state dict stay as they are. Subclasses of nn.Linear are left alone, but
    for those that have an attribute `use_onednn`: on these it is set. Call it before torch.compile. A second
    call changes nothing.
    """
    for module in model.modules():
        if type(module) is nn.Linear:
            module.__class__ = OneDNNLinear
        elif hasattr(module, "use_onednn"):
            module.use_onednn = True
    return model


# ---- the products, without gradients. They take what `takes` says yes to.


def takes(tensor: Tensor) -> bool:
    """Whether oneDNN takes this tensor's products; none with `torch.backends.mkldnn.flags(enabled=False)`."""
    if tensor.device.type != "cpu" or tensor.dtype != torch.float32 or tensor.numel() == 0:
        return False
    return torch.backends.mkldnn.is_available() and torch._C._get_mkldnn_enabled()


def make_whole(matrix: Tensor) -> Tensor:
    """The matrix without gaps between its rows: for a slice oneDNN takes a hundred times as long."""
    if matrix.is_contiguous() or matrix.t().is_contiguous():
        return matrix
    return matrix.contiguous()


def mm(a: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:
    """a b + bias: (m, k), (k, n) and (n,) -> (m, n)."""
    return torch.ops.mkldnn._linear_pointwise(make_whole(a), make_whole(b).t(), bias, "none", [], "")


def addmm(c: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """c + a b: (m, n), (m, k) and (k, n) -> (m, n). The sum is taken in the product's own pass."""
    operands = make_whole(a), make_whole(c), make_whole(b).t()
    return torch.ops.mkldnn._linear_pointwise.binary(*operands, None, "add")


def get_weight_gradient(dy: Tensor, x: Tensor) -> Tensor:
    """dW = dy' x: (N, out) and (N, in) -> (out, in), with N large."""
    weight = x.new_empty(dy.shape[1], x.shape[1])  # its shape is all that is read
    return torch.ops.aten.mkldnn_linear_backward_weights(dy.to_mkldnn(), x.to_mkldnn(), weight, False)[0]


# ---- F.linear as an operator with a backward of its own, which torch.compile takes as it is


@torch.library.custom_op("prelora::linear", mutates_args=())
def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """F.linear of x (N, in), weight (out, in), bias (out,) -> (N, out), with its gradients."""
    if takes(x):
        return mm(x, weight.t(), bias)
    return F.linear(x, weight, bias)


@torch.library.custom_op("prelora::mm", mutates_args=())
def linear_dx(dy: Tensor, weight: Tensor) -> Tensor:
    """dx (N, in) = dy (N, out) weight (out, in)."""
    if takes(dy):
        return mm(dy, weight)
    return torch.mm(dy, weight)


@torch.library.custom_op("prelora::weight_gradient", mutates_args=())
def linear_dweight(dy: Tensor, x: Tensor) -> Tensor:
    """dweight (out, in) = dy' (out, N) x (N, in)."""
    if takes(x):
        return get_weight_gradient(dy, x)
    return torch.mm(dy.t(), x)


@linear.register_fake
def _(x, weight, bias):
    return x.new_empty(x.shape[0], weight.shape[0])


@linear_dx.register_fake
def _(dy, weight):
    return dy.new_empty(dy.shape[0], weight.shape[1])


@linear_dweight.register_fake
def _(dy, x):
    return x.new_empty(dy.shape[1], x.shape[1])


# FLOPs from the tensors' shapes, two for a multiplication and its addition


@register_flop_formula(torch.ops.prelora.linear)
def linear_flops(x, weight, bias, **kwargs) -> int:
    return 2 * x[0] * weight[0] * weight[1]


@register_flop_formula(torch.ops.prelora.mm)
def linear_dx_flops(dy, weight, **kwargs) -> int:
    return 2 * dy[0] * dy[1] * weight[1]


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
    dx = linear_dx(dy, weight) if need_x else None
    dweight = linear_dweight(dy, x) if need_weight else None
    dbias = dy.sum(0) if need_bias else None
    return dx, dweight, dbias


linear.register_autograd(backward, setup_context=setup_context)


class OneDNNLinear(nn.Linear):
    """(..., in) -> (..., out), with nn.Linear's parameters and function. `use_onednn` makes these."""

    def forward(self, x: Tensor) -> Tensor:
        on_cpu = x.device.type == "cpu" and not torch.is_autocast_enabled("cpu")
        if not on_cpu or x.dtype != torch.float32 or self.weight.dtype != torch.float32:
            return super().forward(x)
        y = linear(x.reshape(-1, self.in_features), self.weight, self.bias)  # (N, out)
        return y.view(*x.shape[:-1], self.out_features)

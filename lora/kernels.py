"""The operator behind LoRALinear, which computes what lora/layers.py's `reference` says.

Nothing outside this folder knows of it. It multiplies by W + B A, made anew in every forward: summed in
float32 from the float32 W, and only then cast to the type of the products. That is what mixed precision does
with its master weights, so the sum is as exact as full training is. Summed onto a W that is bfloat16 already,
most of a small B A would be rounded away.

torch.compile traces the autograd.Functions here, so that a block stays one graph. On a GPU two Triton
kernels (lora/triton_kernels.py) do what costs the most memory traffic; everywhere else the same is done in
plain torch. On the CPUs where oneDNN's products win they are oneDNN's (lora/onednn.py).

Not for torch.func's transforms (no vmap, no double backward), nor for float16 autocast, which needs a
gradient scaler.

Throughout: x (N, in), weight (out, in), bias (out,), dy and y (N, out). A (Σ rank, in) holds all adapters' A
below each other, with the scaling in it; Bs[i] (out / parts, rank i) is the B of row part where[i], of
`parts`.
"""

import contextlib
from importlib.util import find_spec

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from lora import onednn

# Asked once: torch 2.11 can't compile a function that asks.
HAS_TRITON = find_spec("triton") is not None  # torch for CPUs comes without

if HAS_TRITON:
    from lora import triton_kernels


def lora_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, A: Tensor, Bs: list[Tensor], where: list[int], parts: int
) -> Tensor:
    """y (N, out) = x (W + B A)' + bias, in autocast's type where it is on, else in the weight's."""
    dtype = weight.dtype
    if not x.is_meta and torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
    x = x.to(dtype)
    if bias is not None:
        bias = bias.to(dtype)
    adapters_train = A.requires_grad or any(B.requires_grad for B in Bs)
    if torch.is_grad_enabled() and adapters_train and not weight.requires_grad:
        function = FrozenBaseOnGPU if uses_triton(x) else FrozenBase
        return function.apply(x, weight, bias, A, where, parts, *Bs)
    effective = EffectiveWeight.apply(weight, A, dtype, where, parts, *Bs)
    return onednn.linear(x, effective, bias) if onednn.is_faster(x) else F.linear(x, effective, bias)


class EffectiveWeight(Function):
    """W + B A (out, in) in the type of the products. Backward needs no product of N rows: dA = B' dW and
    dB = dW A', and dW is there anyway."""

    @staticmethod
    def forward(ctx, weight: Tensor, A: Tensor, dtype: torch.dtype, where: list[int], parts: int, *Bs):
        ctx.save_for_backward(A, *Bs)
        ctx.where, ctx.parts, ctx.dtype = where, parts, weight.dtype
        with without_autocast(weight):
            return add_product(weight, stack(Bs, where, parts), A, dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, dW: Tensor):
        A, *Bs = ctx.saved_tensors
        with without_autocast(dW):
            B = stack(Bs, ctx.where, ctx.parts).to(dW.dtype)
            dA = (B.t() @ dW).to(A.dtype)
            dB = (dW @ A.to(dW.dtype).t()).to(A.dtype)  # (out, Σ rank), of which the adapters' blocks count
            dBs = unstack(dB, Bs, ctx.where, ctx.parts)
        return dW.to(ctx.dtype), dA, None, None, None, *dBs


class FrozenBase(Function):
    """y = x (W + B A)' + bias where W is not trained: backward makes dx and the adapters' gradients, which
    are products of few columns."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor | None, A: Tensor, where, parts, *Bs):
        ctx.where, ctx.parts = where, parts
        ctx.need_dx, ctx.need_dbias = x.requires_grad, bias is not None and bias.requires_grad
        with without_autocast(x):
            effective = add_product(weight, stack(Bs, where, parts), A, x.dtype)  # (out, in)
            y = product(x, effective.t(), bias)
        if not ctx.need_dx:  # then W + B A has done its work
            effective = x.new_empty(0)
        ctx.save_for_backward(x, effective, A, *Bs)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy: Tensor):
        x, effective, A, *Bs = ctx.saved_tensors
        with without_autocast(x):
            dbias = dy.sum(0) if ctx.need_dbias else None
            dx = product(dy, effective) if ctx.need_dx else None
            dA, dBs = get_gradients(x, dy, A, Bs, ctx.where, ctx.parts)
        return dx, None, dbias, dA, None, None, *dBs


class FrozenBaseOnGPU(Function):
    """What FrozenBase computes. On a GPU a product of few columns costs what it takes to read x or dy.

    So A x comes with y and dy B with dx, out of one product each: the matrix that they multiply by has A for
    a lower border and B for a right one, of r numbers. y and dx are then views with gaps between their rows.
    Nobody may change y in place; and attention's backward would copy its projection's dx. That one is as wide
    as its input, and dx of such a Linear is a product of its own. One kernel makes dA = (dy B)' x and
    dB = dy' (A x).
    """

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor | None, A: Tensor, where, parts, *Bs):
        ctx.where, ctx.parts = where, parts
        ctx.need_dx, ctx.need_dbias = x.requires_grad, bias is not None and bias.requires_grad
        outputs, inputs = weight.shape
        with without_autocast(x):
            B = stack(Bs, where, parts)  # (out, Σ rank)
            effective = triton_kernels.effective_weight(weight, B, A, x.dtype, True)  # (out + r, in + r)
            if bias is not None:
                bias = F.pad(bias, (0, effective.shape[0] - outputs))
            y_and_ax = product(x, effective[:, :inputs].t(), bias)  # (N, out + r)
        ax = y_and_ax[:, outputs:]  # (N, r)
        if outputs <= inputs:
            # A Linear whose y is added to the residual stream, and kept by nobody: a slice would keep it.
            ax = ax.contiguous()
        ctx.save_for_backward(x, effective, ax, A, *Bs)
        return y_and_ax[:, :outputs]

    @staticmethod
    @once_differentiable
    def backward(ctx, dy: Tensor):
        x, effective, ax, A, *Bs = ctx.saved_tensors
        outputs, inputs = dy.shape[1], x.shape[1]
        with without_autocast(x):
            dbias = dy.sum(0) if ctx.need_dbias else None
            if ctx.need_dx and inputs != outputs:
                dx_and_dy_B = dy @ effective[:outputs]  # (N, in + r)
                dx, dy_B = dx_and_dy_B[:, :inputs], dx_and_dy_B[:, inputs:]
            else:
                dx = dy @ effective[:outputs, :inputs] if ctx.need_dx else None
                dy_B = dy @ effective[:outputs, inputs:]
            # (slabs, Σ rank, in + out)
            slabs = triton_kernels.adapter_gradients(x, dy, ax, dy_B, A.shape[0])
        # Added up one by one: each is one pass, which leaves a gradient as its parameter lies.
        dA = slabs[:, :, :inputs].sum(0).to(A.dtype)
        parts = slabs[:, :, inputs:].transpose(1, 2).chunk(ctx.parts, dim=1)  # (slabs, out / parts, Σ rank)
        dBs = []
        for part, (start, end) in zip(ctx.where, get_spans(Bs)):
            dBs.append(parts[part][:, :, start:end].sum(0).to(A.dtype).contiguous())
        return dx, None, dbias, dA, None, None, *dBs


# ---- what they are made of


def uses_triton(tensor: Tensor) -> bool:
    """Whether the Triton kernels take such a tensor."""
    is_taken = tensor.dtype in (torch.float32, torch.bfloat16)
    return HAS_TRITON and tensor.is_cuda and is_taken


def without_autocast(x: Tensor) -> contextlib.AbstractContextManager:
    """Inside, every product is of the type that it is given."""
    return contextlib.nullcontext() if x.is_meta else torch.autocast(x.device.type, enabled=False)


def product(a: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:
    """a b + bias: (m, k), (k, n) and (n,) -> (m, n)."""
    if onednn.is_faster(a):
        return onednn.mm(a, b, bias)
    return torch.mm(a, b) if bias is None else torch.addmm(bias, a, b)


def add_product(weight: Tensor, B: Tensor, A: Tensor, dtype: torch.dtype) -> Tensor:
    """W + B A (out, in), of B (out, Σ rank): summed in float32, or float64, and then cast to `dtype`."""
    if uses_triton(weight):
        return triton_kernels.effective_weight(weight, B, A, dtype, False)
    wide = torch.promote_types(weight.dtype, torch.float32)
    total = torch.addmm(weight.to(wide), B.to(wide), A.to(wide))
    # With a cast that changes nothing at an autograd.Function's end, torch 2.11 compiles gradients of zero.
    return total if dtype == wide else total.to(dtype)


def get_spans(Bs: list[Tensor]) -> list[tuple[int, int]]:
    """Each adapter's rows of A: (start, end)."""
    ends = [0]
    for B in Bs:
        ends.append(ends[-1] + B.shape[1])
    return list(zip(ends, ends[1:]))


def stack(Bs: list[Tensor], where: list[int], parts: int) -> Tensor:
    """All Bs in one matrix (out, Σ rank), each in its own rows and columns: times A it is what the adapters
    add to the weight, in all row parts."""
    if parts == 1:
        return Bs[0]
    spans, total = get_spans(Bs), sum(B.shape[1] for B in Bs)
    blocks = [Bs[0].new_zeros(Bs[0].shape[0], total)] * parts
    for B, part, (start, end) in zip(Bs, where, spans):
        blocks[part] = F.pad(B, (start, total - end))
    return torch.cat(blocks)


def unstack(stacked: Tensor, Bs: list[Tensor], where: list[int], parts: int) -> list[Tensor]:
    """Of a matrix as `stack` makes it the blocks, (out / parts, rank) each."""
    blocks = stacked.chunk(parts)
    return [blocks[part][:, start:end].contiguous() for part, (start, end) in zip(where, get_spans(Bs))]


def get_gradients(
    x: Tensor, dy: Tensor, A: Tensor, Bs: list[Tensor], where: list[int], parts: int
) -> tuple[Tensor, list[Tensor]]:
    """dA (Σ rank, in) = (dy B)' x and dBs = dy' (A x), row part by row part."""
    columns = dy.chunk(parts, dim=1)  # (N, out / parts) each
    dys = [columns[part] for part in where]
    if onednn.is_faster(dy):
        dys = [part.contiguous() for part in dys]  # once, for both products
    dy_B = torch.cat([product(part, B.to(x.dtype)) for part, B in zip(dys, Bs)], dim=1)  # (N, Σ rank)
    ax = product(x, A.to(x.dtype).t())  # (N, Σ rank)
    dA = product(dy_B.t(), x).to(A.dtype)
    dBs = []
    for part, (start, end) in zip(dys, get_spans(Bs)):
        # The transpose is what oneDNN makes faster.
        dBs.append(product(ax[:, start:end].t(), part).t().contiguous().to(A.dtype))
    return dA, dBs

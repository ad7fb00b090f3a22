"""The fast operator behind LoRALinear, which computes what lora/layers.py's `reference` says.

Nothing outside this folder knows of it. `prelora::lora_linear` is one operator with a backward of its own,
which torch.compile takes as it is; a small one goes before it, `prelora::prepare`. They keep x and A x for
backward and compute no gradient that nobody asked for. Where that is exact and cheaper (see `merges`) they
multiply by W + B A, and keep that instead of A x, if x has a gradient.

Not for torch.func's transforms (no vmap, no double backward), nor for float16 autocast, which needs a
gradient scaler.

Throughout: x (N, in), weight (out, in), bias (out,), dy and y (N, out). A (Σ rank, in) holds all adapters' A
below each other, with the scaling in it; Bs[i] (out / parts, rank i) is the B of row part where[i], of
`parts`. `use_onednn`: whether to multiply by oneDNN, where it takes the tensors.
"""

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from lora import onednn

# ---- when W + B A is made


_separate = False  # see separate_products


@contextlib.contextmanager
def separate_products() -> Iterator[None]:
    """Inside, W and B A multiply x each on its own, whatever `merges` would choose.

    For comparisons with a merged weight. Not for compiled blocks, nor for a backward whose forward was
    outside.
    """
    global _separate
    before, _separate = _separate, True
    try:
        yield
    finally:
        _separate = before


@torch.compiler.assume_constant_result  # dynamo can't trace the question
def multiplies_exactly() -> bool:
    return torch.get_float32_matmul_precision() == "highest"


def is_exact(x: Tensor) -> bool:
    """Whether products of x are no less exact than its type: not in bfloat16, nor in TF32."""
    if x.dtype == torch.float32:
        return x.device.type in ("cpu", "meta") or multiplies_exactly()
    return x.dtype == torch.float64


def merges(x: Tensor, weight: Tensor) -> bool:
    """Whether x is multiplied by W + B A, made anew in every forward, instead of by W and by A and B.

    That spares the products of N rows with B, forward, and with A, backward, and where W is trained the other
    four, too: the adapters' gradients then are B' dW and dW A'. It costs one product of `weight.shape` (W
    trained: three), so x must have rows enough, and one more copy of the weights, whole ones where FSDP
    shards them, from forward to backward. And nothing may be lost in the sum: in bfloat16 or TF32 an
    adapter's small B A would vanish beside W.
    """
    return is_exact(x) and x.shape[0] >= 2 * min(weight.shape) and not _separate


# ---- products


def spans(Bs: list[Tensor]) -> list[tuple[int, int]]:
    """Each adapter's rows of A: (start, end)."""
    ends = [0]
    for B in Bs:
        ends.append(ends[-1] + B.shape[1])
    return list(zip(ends, ends[1:]))


def part_of(tensor: Tensor, part: int, parts: int, dim: int) -> Tensor:
    """A view of one of `parts` equal parts of a dimension."""
    size = tensor.shape[dim] // parts
    return tensor.narrow(dim, part * size, size)


def mm(a: Tensor, b: Tensor, bias: Tensor | None, use_onednn: bool) -> Tensor:
    """a b + bias: (m, k), (k, n) and (n,) -> (m, n)."""
    if use_onednn and onednn.takes(a):
        return onednn.mm(a, b, bias)
    if bias is None:
        return torch.mm(a, b)
    return torch.addmm(bias, a, b)


def get_dW(dy: Tensor, x: Tensor, use_onednn: bool) -> Tensor:
    """dW (out, in) = dy' x."""
    if use_onednn and onednn.takes(x):
        return onednn.get_weight_gradient(dy, x)
    return torch.mm(dy.t(), x)


def get_dB(dy: Tensor, ax: Tensor, use_onednn: bool) -> Tensor:
    """One adapter's dB (rows, rank) = dy' (A x), from its columns of dy (N, rows) and of A x (N, rank)."""
    if use_onednn and onednn.takes(dy):
        return onednn.mm(ax.t(), dy).t().contiguous()  # oneDNN makes the transpose faster
    return torch.mm(dy.t(), ax)


def add_product(
    weight: Tensor, A: Tensor, Bs: list[Tensor], where: list[int], parts: int, use_onednn: bool
) -> Tensor:
    """W + B A (out, in); rows without an adapter stay as they are."""
    adapters = list(zip(Bs, where, spans(Bs)))
    if use_onednn and onednn.takes(weight):
        rows = list(weight.chunk(parts))
        for B, part, (start, end) in adapters:
            rows[part] = onednn.addmm(rows[part], B, A[start:end])
        return rows[0] if parts == 1 else torch.cat(rows)
    new = weight.clone(memory_format=torch.contiguous_format)
    for B, part, (start, end) in adapters:
        part_of(new, part, parts, 0).addmm_(B, A[start:end])
    return new


# ---- forward


@torch.library.custom_op("prelora::prepare", mutates_args=())
def prepare(
    x: Tensor, weight: Tensor, A: Tensor, Bs: list[Tensor], where: list[int], parts: int, use_onednn: bool
) -> Tensor:
    """What forward hands on to backward: W + B A (out, in) where they multiply by it, else A x (N, Σ rank).

    It has no gradient of its own: `lora_linear` sees to that. It is apart from `lora_linear` so that y is all
    that gives: with two outputs the compiler's partitioner thinks y cheaper to make again than to keep, and
    has forward write GELU's derivative, too, instead of keeping what backward can make it from.
    """
    if merges(x, weight):
        return add_product(weight, A, Bs, where, parts, use_onednn)
    return mm(x, A.t(), None, use_onednn)


@prepare.register_fake
def _(x, weight, A, Bs, where, parts, use_onednn):
    if merges(x, weight):
        return torch.empty_like(weight, memory_format=torch.contiguous_format)
    return x.new_empty(x.shape[0], A.shape[0])


@torch.library.custom_op("prelora::lora_linear", mutates_args=())
def lora_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    A: Tensor,
    Bs: list[Tensor],
    prepared: Tensor,
    where: list[int],
    parts: int,
    use_onednn: bool,
) -> Tensor:
    """y (N, out), with its gradients. `prepared` is what `prepare` made of the same arguments."""
    if merges(x, weight):
        return mm(x, prepared.t(), bias, use_onednn)
    y = mm(x, weight.t(), bias, use_onednn)
    for B, part, (start, end) in zip(Bs, where, spans(Bs)):
        part_of(y, part, parts, 1).addmm_(prepared[:, start:end], B.t())
    return y


@lora_linear.register_fake
def _(x, weight, bias, A, Bs, prepared, where, parts, use_onednn):
    return x.new_empty(x.shape[0], weight.shape[0])


# ---- backward


@torch.library.custom_op("prelora::lora_linear_backward", mutates_args=())
def lora_linear_backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    A: Tensor,
    prepared: Tensor,
    Bs: list[Tensor],
    where: list[int],
    parts: int,
    need_x: bool,
    need_weight: bool,
    need_bias: bool,
    need_adapters: bool,
    use_onednn: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, list[Tensor]]:
    """Gradients of (x, weight, bias, A, Bs); an empty tensor where one is not needed."""
    merged = merges(x, weight)
    dx, dweight, dbias, dA = (x.new_empty(0) for _ in range(4))
    dBs = [x.new_empty(0) for _ in Bs]
    if need_bias:
        dbias = dy.sum(0)
    if need_weight:
        dweight = get_dW(dy, x, use_onednn)
    if merged and need_x:
        dx = mm(dy, prepared, None, use_onednn)
    if merged and need_weight and need_adapters:
        dA, dBs = adapters_from_dweight(dweight, A, Bs, where, parts, use_onednn)
        return dx, dweight, dbias, dA, dBs
    if not need_adapters and (merged or not need_x):
        return dx, dweight, dbias, dA, dBs

    dys = [part_of(dy, part, parts, 1) for part in where]  # (N, out / parts) each
    if use_onednn and onednn.takes(dy):
        dys = [onednn.make_whole(columns) for columns in dys]
    dy_Bs = [mm(columns, B, None, use_onednn) for columns, B in zip(dys, Bs)]
    dy_B = dy_Bs[0] if len(dy_Bs) == 1 else torch.cat(dy_Bs, dim=1)  # (N, Σ rank)
    if need_adapters:
        dA = mm(dy_B.t(), x, None, use_onednn)
        ax = mm(x, A.t(), None, use_onednn) if merged else prepared  # (N, Σ rank)
        dBs = [get_dB(columns, ax[:, start:end], use_onednn) for columns, (start, end) in zip(dys, spans(Bs))]
    if need_x and not merged:
        dx = mm(dy, weight, None, use_onednn).addmm_(dy_B, A)
    return dx, dweight, dbias, dA, dBs


def adapters_from_dweight(
    dweight: Tensor, A: Tensor, Bs: list[Tensor], where: list[int], parts: int, use_onednn: bool
) -> tuple[Tensor, list[Tensor]]:
    """dA (Σ rank, in) = B' dW and dBs (out / parts, rank) = dW A', from dW without going through N rows."""
    dAs, dBs = [], []
    for B, part, (start, end) in zip(Bs, where, spans(Bs)):
        rows = part_of(dweight, part, parts, 0)  # (out / parts, in)
        dAs.append(mm(B.t(), rows, None, use_onednn))
        dBs.append(mm(rows, A[start:end].t(), None, use_onednn))
    return torch.cat(dAs), dBs


@lora_linear_backward.register_fake
def _(
    dy, x, weight, A, prepared, Bs, where, parts, need_x, need_weight, need_bias, need_adapters, use_onednn
):
    new = lambda shape, needed: x.new_empty(shape if needed else (0,))
    dx, dweight, dbias = (
        new(x.shape, need_x),
        new(weight.shape, need_weight),
        new(weight.shape[:1], need_bias),
    )
    return dx, dweight, dbias, new(A.shape, need_adapters), [new(B.shape, need_adapters) for B in Bs]


def setup_context(ctx, inputs, output) -> None:
    x, weight, bias, A, Bs, prepared, ctx.where, ctx.parts, ctx.use_onednn = inputs
    if merges(x, weight) and not ctx.needs_input_grad[0]:  # then W + B A has done its work
        prepared = x.new_empty(0)
    ctx.save_for_backward(x, weight, A, prepared, *Bs)
    ctx.has_bias = bias is not None


def backward(ctx, dy: Tensor):
    x, weight, A, prepared, *Bs = ctx.saved_tensors
    need_x, need_weight, need_bias, need_A, need_Bs = ctx.needs_input_grad[:5]
    need_bias = need_bias and ctx.has_bias
    need = need_x, need_weight, need_bias, need_A or any(need_Bs)
    dx, dweight, dbias, dA, dBs = lora_linear_backward(
        dy, x, weight, A, prepared, Bs, ctx.where, ctx.parts, *need, ctx.use_onednn
    )
    gradients = [
        dx if need_x else None,
        dweight if need_weight else None,
        dbias if need_bias else None,
        dA if need_A else None,
        [dB if needed else None for dB, needed in zip(dBs, need_Bs)],
    ]
    return *gradients, None, None, None, None  # prepared, where, parts, use_onednn


lora_linear.register_autograd(backward, setup_context=setup_context)


# ---- FLOPs, from the tensors' shapes: LoRA's own, W x and B (A x), however the operators come by them


@register_flop_formula(torch.ops.prelora.prepare)
def prepare_flops(x, weight, A, *args, **kwargs) -> int:
    return 2 * x[0] * A[0] * A[1]


@register_flop_formula(torch.ops.prelora.lora_linear)
def lora_linear_flops(x, weight, bias, A, Bs, *args, **kwargs) -> int:
    return 2 * x[0] * (weight[0] * weight[1] + sum(rows * rank for rows, rank in Bs))


@register_flop_formula(torch.ops.prelora.lora_linear_backward)
def lora_linear_backward_flops(
    dy,
    x,
    weight,
    A,
    prepared,
    Bs,
    where,
    parts,
    need_x,
    need_weight,
    need_bias,
    need_adapters,
    *args,
    **kwargs,
) -> int:
    W_size, A_size, B_size = weight[0] * weight[1], A[0] * A[1], sum(rows * rank for rows, rank in Bs)
    base = (need_x + need_weight) * W_size  # dx, dW
    through = (need_x or need_adapters) * B_size + need_x * A_size  # dy B, and that times A
    adapters = need_adapters * (A_size + B_size)  # dA, dB
    return 2 * x[0] * (base + through + adapters)

"""LoRALinear: a Linear whose row parts each carry a low-rank adapter (Hu et al. 2106.09685).

W x + s · B (A x), A Kaiming-uniform(√5), B = 0, so that insertion leaves the function as it was; s = alpha / rank, or 1, or with rslora
alpha / √rank (Kalajdzievski 2312.03732).
A fused qkv is one Linear with three row parts and so three adapters with three ranks: their A-matrices stand side by side in
one (Σ rank, in) matrix and take one GEMM, each B-product is added to its rows in place.

The whole is one operator with a backward of its own, `prelora::lora_linear`, which torch.compile takes as it is, and a small one before it,
`prelora::prepare`. It keeps x and A x for backward and computes no gradient that nobody asked for. Where that is exact and cheaper it
multiplies by W + B A (see `merges`), and keeps that instead of A x, if x has a gradient.
Not for torch.func's transforms (no vmap, no double backward), nor for float16 autocast, which needs a gradient scaler this repo has not.
"""

import contextlib
import math
import zlib
from pathlib import Path

import torch
import torch.compiler.config
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils.flop_counter import register_flop_formula

# torch.compile's cache knows an operator by its name alone: after an edit it would go on with the backward from before
torch.compiler.config.cache_key_tag += f"/{zlib.crc32(Path(__file__).read_bytes()):x}"


def to_plain(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


# ---- the operator. Below, x is (N, in), weight (out, in), A (Σ rank, in) with the scaling in it, Bs[i] (out / parts, rank i) is the B of row
# part where[i].

_separate = False  # see separate_products


@contextlib.contextmanager
def separate_products():
    """Inside, W and B A multiply x each on its own, whatever `merges` would choose: what a merged weight is compared with. Not for compiled
    blocks, nor for a backward whose forward was outside."""
    global _separate
    before, _separate = _separate, True
    try:
        yield
    finally:
        _separate = before


@torch.compiler.assume_constant_result  # dynamo can't trace the question
def multiplies_exactly() -> bool:
    return torch.get_float32_matmul_precision() == "highest"


def merges(x: Tensor, weight: Tensor) -> bool:
    """Whether x is multiplied by W + B A, made anew in every forward, instead of by W and by A and B.

    That spares the products of N rows with B, forward, and with A, backward, and where W is trained the other four, too: the adapters'
    gradients then are B' dW and dW A'. It costs one product of `weight.shape` (W trained: three), so x must have rows enough, and one more
    copy of the weights, whole ones where FSDP shards them, from forward to backward. And nothing may be lost in the sum: not in bfloat16
    nor TF32, where an adapter's small B A would vanish beside W.
    """
    exact = (
        x.dtype == torch.float64
        or x.dtype == torch.float32
        and (x.device.type in ("cpu", "meta") or multiplies_exactly())
    )
    return exact and x.shape[0] >= 2 * min(weight.shape) and not _separate


def spans(Bs: list[Tensor]) -> list[tuple[int, int]]:
    """Of each adapter, its rows of A: (start, end)."""
    ends = [0]
    for B in Bs:
        ends.append(ends[-1] + B.shape[1])
    return list(zip(ends, ends[1:]))


def rows_of(tensor: Tensor, part: int, parts: int, dim: int) -> Tensor:
    rows = tensor.shape[dim] // parts
    return tensor.narrow(dim, part * rows, rows)


# model/linear.py has these for the base alone: leaves know nothing of each other
def onednn(tensor: Tensor) -> bool:
    """Whether oneDNN takes this tensor's products: MKL, behind torch's in float32 on a CPU, takes two to three times as long on AMD's
    processors. `torch.backends.mkldnn.flags(enabled=False)` says no."""
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


def mm(a: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:
    """a b + bias, (m, k), (k, n) and (n,)."""
    if onednn(a):
        return torch.ops.mkldnn._linear_pointwise(whole(a), whole(b).t(), bias, "none", [], "")
    return torch.mm(a, b) if bias is None else torch.addmm(bias, a, b)


def get_dW(dy: Tensor, x: Tensor) -> Tensor:
    """dW (out, in) = dy' x."""
    if onednn(x):  # of weight the shape is all that is read
        return torch.ops.aten.mkldnn_linear_backward_weights(
            dy.to_mkldnn(), x.to_mkldnn(), x.new_empty(dy.shape[1], x.shape[1]), False
        )[0]
    return torch.mm(dy.t(), x)


def get_dB(dy: Tensor, ax: Tensor) -> Tensor:
    """dB (out, rank) = dy' (A x), of one adapter; by its transpose where oneDNN does it, which it does faster."""
    return mm(ax.t(), dy).t().contiguous() if onednn(dy) else torch.mm(dy.t(), ax)


def add_product(weight: Tensor, A: Tensor, Bs: list[Tensor], where: list[int], parts: int) -> Tensor:
    """W + B A (out, in), rows without an adapter as they are."""
    if onednn(weight):  # which adds in the product's own pass
        rows = list(weight.chunk(parts))
        for B, part, (start, end) in zip(Bs, where, spans(Bs)):
            rows[part] = torch.ops.mkldnn._linear_pointwise.binary(
                whole(B), whole(rows[part]), whole(A[start:end]).t(), None, "add"
            )
        return rows[0] if parts == 1 else torch.cat(rows)
    new = weight.clone(memory_format=torch.contiguous_format)
    for B, part, (start, end) in zip(Bs, where, spans(Bs)):
        rows_of(new, part, parts, 0).addmm_(B, A[start:end])
    return new


@torch.library.custom_op("prelora::prepare", mutates_args=())
def prepare(x: Tensor, weight: Tensor, A: Tensor, Bs: list[Tensor], where: list[int], parts: int) -> Tensor:
    """What forward hands on to backward: W + B A (out, in) where they multiply by it, else A x (N, Σ rank). It has no gradient of its own:
    `lora_linear` sees to that.

    It is apart from `lora_linear` so that y is all that gives: with two outputs the compiler's partitioner thinks y cheaper to make again
    than to keep, and has forward write GELU's derivative, too, instead of keeping what backward can make it from.
    """
    return add_product(weight, A, Bs, where, parts) if merges(x, weight) else mm(x, A.t())


@prepare.register_fake
def _(x, weight, A, Bs, where, parts):
    return (
        torch.empty_like(weight, memory_format=torch.contiguous_format)
        if merges(x, weight)
        else x.new_empty(x.shape[0], A.shape[0])
    )


@register_flop_formula(torch.ops.prelora.prepare)
def prepare_flops(x, weight, A, *args, **kwargs) -> int:
    """LoRA's own, as below: A x, however it was come by."""
    return 2 * x[0] * A[0] * A[1]


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
) -> Tensor:
    """y (N, out), with its gradients. prepared: by `prepare`."""
    if merges(x, weight):
        return mm(x, prepared.t(), bias)
    y = mm(x, weight.t(), bias)
    for B, part, (start, end) in zip(Bs, where, spans(Bs)):
        rows_of(y, part, parts, 1).addmm_(prepared[:, start:end], B.t())
    return y


@lora_linear.register_fake
def _(x, weight, bias, A, Bs, prepared, where, parts):
    return x.new_empty(x.shape[0], weight.shape[0])


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
) -> tuple[Tensor, Tensor, Tensor, Tensor, list[Tensor]]:
    """Gradients of (x, weight, bias, A, Bs); empty what is not needed."""
    merged, adapters = merges(x, weight), list(zip(Bs, where, spans(Bs)))
    dx, dweight, dbias, dA, *dBs = [x.new_empty(0) for _ in range(4 + len(Bs))]
    if need_bias:
        dbias = dy.sum(0)
    if need_weight:
        dweight = get_dW(dy, x)
    if need_adapters and merged and need_weight:  # all is in dW
        dA = torch.cat([mm(B.t(), rows_of(dweight, part, parts, 0)) for B, part, _ in adapters])
        dBs = [mm(rows_of(dweight, part, parts, 0), A[start:end].t()) for _, part, (start, end) in adapters]
    elif need_adapters or need_x and not merged:
        dys = [rows_of(dy, part, parts, 1) for part in where]
        if onednn(dy):
            dys = [whole(rows) for rows in dys]
        g = [mm(rows, B) for rows, B in zip(dys, Bs)]
        g = g[0] if len(g) == 1 else torch.cat(g, dim=1)  # dy B (N, Σ rank)
        if need_adapters:
            dA = mm(g.t(), x)
            ax = mm(x, A.t()) if merged else prepared
            dBs = [get_dB(rows, ax[:, start:end]) for rows, (start, end) in zip(dys, spans(Bs))]
    if need_x and merged:
        dx = mm(dy, prepared)
    elif need_x:
        dx = mm(dy, weight).addmm_(g, A)
    return dx, dweight, dbias, dA, dBs


@lora_linear_backward.register_fake
def _(dy, x, weight, A, prepared, Bs, where, parts, need_x, need_weight, need_bias, need_adapters):
    new = lambda like, needed: x.new_empty(like.shape if needed else (0,))
    return (
        new(x, need_x),
        new(weight, need_weight),
        x.new_empty(weight.shape[0] if need_bias else 0),
        new(A, need_adapters),
        [new(B, need_adapters) for B in Bs],
    )


def setup_context(ctx, inputs, output):
    x, weight, bias, A, Bs, prepared, ctx.where, ctx.parts = inputs
    if merges(x, weight) and not ctx.needs_input_grad[0]:  # then W + B A has done its work
        prepared = x.new_empty(0)
    ctx.save_for_backward(x, weight, A, prepared, *Bs)
    ctx.has_bias = bias is not None


def backward(ctx, dy):
    x, weight, A, prepared, *Bs = ctx.saved_tensors
    need_x, need_weight, need_bias, need_A, need_Bs = ctx.needs_input_grad[:5]
    need_adapters = need_A or any(need_Bs)
    dx, dweight, dbias, dA, dBs = lora_linear_backward(
        dy,
        x,
        weight,
        A,
        prepared,
        Bs,
        ctx.where,
        ctx.parts,
        need_x,
        need_weight,
        need_bias and ctx.has_bias,
        need_adapters,
    )
    return (
        dx if need_x else None,
        dweight if need_weight else None,
        dbias if need_bias and ctx.has_bias else None,
        dA if need_A else None,
        [dB if need else None for dB, need in zip(dBs, need_Bs)],
        None,
        None,
        None,
    )


lora_linear.register_autograd(backward, setup_context=setup_context)


@register_flop_formula(torch.ops.prelora.lora_linear)
def lora_linear_flops(x, weight, bias, A, Bs, *args, **kwargs) -> int:
    """W x and B (A x)."""
    return 2 * x[0] * (weight[0] * weight[1] + sum(rows * rank for rows, rank in Bs))


@register_flop_formula(torch.ops.prelora.lora_linear_backward)
def lora_linear_backward_flops(
    dy, x, weight, A, prepared, Bs, where, parts, need_x, need_weight, need_bias, need_adapters, **kwargs
) -> int:
    low = sum(rows * rank for rows, rank in Bs)
    return (
        2
        * x[0]
        * (
            (need_x + need_weight) * weight[0] * weight[1]  # dx, dW
            + (need_x or need_adapters) * low
            + need_x * A[0] * A[1]  # dy B, and that times A
            + need_adapters * (A[0] * A[1] + low)
        )
    )  # dA, dB


class LoRALinear(nn.Linear):
    """A Linear with `len(ranks)` row parts; part i has an adapter of rank `ranks[i]`, or none where that is 0.

    Parameters: weight (out, in) and bias (out,) of the base; lora_A (Σ rank, in), the parts' A below each other; lora_B[i]
    (out / parts, rank_i), one for each adapted part. `alpha=None` means scaling 1 in every part.
    Raises ValueError for rows that the parts don't divide, a negative rank, or one above min(in, out / parts).
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        ranks: list[int],
        alpha: float | None = None,
        rslora: bool = False,
        bias: bool = True,
        device=None,
        dtype=None,
    ):
        super().__init__(
            in_features, out_features, bias, device="meta", dtype=dtype
        )  # from_linear puts the real ones in
        if out_features % len(ranks):
            raise ValueError(f"{len(ranks)} row parts do not divide {out_features} output features")
        rows = out_features // len(ranks)
        for rank in ranks:
            if not 0 <= rank <= min(in_features, rows):
                raise ValueError(f"rank {rank} is not between 0 and min(in, out) = {min(in_features, rows)}")
        self.ranks, self.alpha, self.rslora, self.plain = (
            list(ranks),
            alpha,
            rslora,
            nn.Linear,
        )  # plain: what `merged` is
        self.lora_A = nn.Parameter(torch.empty(sum(ranks), in_features, device=device, dtype=dtype))
        self.lora_B = nn.ParameterDict(
            {
                str(i): nn.Parameter(torch.empty(rows, rank, device=device, dtype=dtype))
                for i, rank in enumerate(ranks)
                if rank
            }
        )
        # In a buffer, not in floats: these differ between layers, and a float would be baked into the compiled block.
        self.register_buffer(
            "scaling",
            None if alpha is None else torch.empty(sum(ranks), 1, device=device, dtype=dtype),
            persistent=False,
        )
        self.init_buffers()

    @classmethod
    def from_linear(
        cls, linear: nn.Linear, ranks: list[int], alpha: float | None, rslora: bool = False
    ) -> "LoRALinear":
        """The same Linear, its weight and bias shared and not copied, with adapters on its device in its dtype."""
        new = cls(
            linear.in_features,
            linear.out_features,
            ranks,
            alpha,
            rslora,
            linear.bias is not None,
            device=linear.weight.device,
            dtype=linear.weight.dtype,
        )
        new.weight, new.bias, new.plain = linear.weight, linear.bias, type(linear)
        return new.train(linear.training)

    def get_scaling(self, rank: int) -> float:
        return 1.0 if self.alpha is None else self.alpha / (math.sqrt(rank) if self.rslora else rank)

    def init_buffers(self) -> None:
        if self.scaling is not None and not self.scaling.is_meta:
            self.scaling.copy_(torch.cat([torch.full((r, 1), self.get_scaling(r)) for r in self.ranks if r]))

    @torch.no_grad()
    def init_adapters(self, seed: int, name: str) -> None:
        """A Kaiming-uniform(√5) from a generator of (seed, name), B zero."""
        rng = torch.Generator(self.lora_A.device).manual_seed(zlib.crc32(f"{seed}/{name}.lora_A".encode()))
        A = torch.empty(
            self.lora_A.shape, device=self.lora_A.device
        )  # whole: a shard gets its part of the same numbers
        if A.numel():
            nn.init.kaiming_uniform_(A, a=math.sqrt(5), generator=rng)
        if isinstance(self.lora_A, DTensor):
            A = distribute_tensor(
                A, self.lora_A.device_mesh, self.lora_A.placements, src_data_rank=None
            )  # no traffic
        self.lora_A.copy_(A)
        for B in self.lora_B.values():
            B.zero_()

    def forward(self, x: Tensor) -> Tensor:
        if not self.lora_B:  # rank 0 in every part
            return super().forward(x)
        A = self.lora_A if self.scaling is None else self.lora_A * self.scaling
        tensors = [x.reshape(-1, x.shape[-1]), self.weight, self.bias, A, *self.lora_B.values()]
        if not x.is_meta and torch.is_autocast_enabled(x.device.type):  # which knows nothing of the operator
            dtype = torch.get_autocast_dtype(x.device.type)
            tensors = [None if t is None else t.to(dtype) for t in tensors]
        x2d, weight, bias, A, *Bs = (
            tensors  # (N, in), (out, in), (out,), (Σ rank, in), (out / parts, rank) each
        )
        where, parts = [int(part) for part in self.lora_B], len(self.ranks)
        with torch.no_grad():
            prepared = prepare(x2d, weight, A, Bs, where, parts)
        y = lora_linear(x2d, weight, bias, A, Bs, prepared, where, parts)
        return y.view(*x.shape[:-1], self.out_features)  # (..., out)

    def adapter(self, part: int) -> tuple[Tensor, Tensor]:
        """(s·B, A) of a row part, (rows, rank) and (rank, in): their product is what it adds to the weight. Empty for rank 0.

        Whole, where they are sharded: a collective, for every rank to call.
        """
        start = sum(self.ranks[:part])
        A = to_plain(self.lora_A)[start : start + self.ranks[part]]
        B = (
            to_plain(self.lora_B[str(part)])
            if self.ranks[part]
            else A.new_empty(self.out_features // len(self.ranks), 0)
        )
        return (
            B if self.alpha is None or not self.ranks[part] else B * self.get_scaling(self.ranks[part])
        ), A

    @torch.no_grad()
    def merged(self) -> nn.Linear:
        """A plain Linear with W + s·B·A, the sum taken in float32 (its rounding is all that is lost)."""
        linear = self.plain(
            self.in_features, self.out_features, self.bias is not None, device="meta", dtype=self.weight.dtype
        )
        delta = torch.cat(
            [B.float() @ A.float() for B, A in map(self.adapter, range(len(self.ranks)))]
        )  # (out, in)
        linear.weight = nn.Parameter(
            (self.weight.float() + delta).to(self.weight.dtype), self.weight.requires_grad
        )
        linear.bias = self.bias
        return linear.train(self.training)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, ranks={self.ranks}, alpha={self.alpha}, rslora={self.rslora}"

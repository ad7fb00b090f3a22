"""LoRALinear: a Linear whose row parts each carry a low-rank adapter (Hu et al. 2106.09685)."""

import math
import zlib

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from lora.kernels import lora_linear


def reference(
    x: Tensor, weight: Tensor, bias: Tensor | None, adapters: list[tuple[float, Tensor, Tensor]]
) -> Tensor:
    """What a LoRALinear computes: W x + bias + s B (A x), (..., in) -> (..., out).

    adapters[i] is (s, B, A) of row part i; weight (out, in), bias (out,), B (out / parts, rank), A (rank,
    in); rank 0 is no adapter. lora/kernels.py does this faster, and tests hold it to these lines, gradients
    included.
    """
    y_parts = F.linear(x, weight, bias).chunk(len(adapters), dim=-1)  # (..., out / parts) each
    adapted = []
    for y, (s, B, A) in zip(y_parts, adapters):
        adapted.append(y + s * ((x @ A.T) @ B.T))
    return torch.cat(adapted, dim=-1)


def get_scaling(rule: str, alpha: float | None, rank: int, inputs: int) -> float:
    """The s of s B A, of an adapter of rank r on a Linear of n = `inputs` in_features.

    "authors": 1, as PreLoRA's authors have it.
    "alpha": alpha / r (Hu et al. 2106.09685); 1 without an alpha.
    "rslora": alpha / √r (Kalajdzievski 2312.03732); 1 without an alpha.
    "matched": √(3 n / r), times alpha if there is one.
    "coherent": √3 n / r, times alpha if there is one.

    With the last two an adapter's first Adam step moves W as far as a step on W would, in one of two limits.
    Adam's first step is learning rate · sign(gradient): on W it is a matrix of ± lr. At B = 0 only B has a
    gradient, so the adapter's step on W is s ΔB A, of ΔB = ± lr and a Kaiming-uniform(√5) A, whose numbers
    have the variance 1 / (3 n) whatever the rank is.

    - Random: an entry of ΔB A adds up r numbers of random signs, lr √(r / (3 n)) in root mean square (RMS).
      "matched" makes that lr, the RMS of a full step. It is the step's length ‖ΔW‖, all directions alike.
    - Coherent: what a step does to the inputs x that it was made of. On W it is lr sign(dy) sign(x)', which
      adds lr ‖x‖₁ = lr n √(2/π) x_rms to each output. The adapter's is s lr sign(dy) sign(A x)' A, which adds
      s lr ‖A x‖₁ = s lr r √(2/π) x_rms / √3. "coherent" makes them equal (muP's argument). Its steps are
      √(n / r) × as long as a full one's, and lie in the few directions of A.

    Which of them is right for a whole run neither says: docs/study.md has measured both. Raises ValueError
    for a rule that there is not.
    """
    if rule == "matched":
        return (alpha or 1.0) * math.sqrt(3 * inputs / rank)
    if rule == "coherent":
        return (alpha or 1.0) * math.sqrt(3) * inputs / rank
    if rule not in ("authors", "alpha", "rslora"):
        raise ValueError(f"unknown scaling {rule!r}, there are: authors, alpha, rslora, matched, coherent")
    if rule == "authors" or alpha is None:
        return 1.0
    return alpha / (math.sqrt(rank) if rule == "rslora" else rank)


class LoRALinear(nn.Linear):
    """A Linear with `len(ranks)` row parts; part i has an adapter of rank `ranks[i]`, or none at 0.

    A fused qkv is one Linear with three row parts and so three adapters with three ranks: their A-matrices
    stand below each other in one matrix and take one product.

    Parameters: weight (out, in) and bias (out,) of the base; lora_A (Σ rank, in); lora_B[i] (out / parts,
    rank_i), one for each adapted part. The scaling s is `get_scaling`'s, by the rule `scaling_rule`.

    Raises ValueError for rows that the parts don't divide, a rank below 0 or above min(in, out / parts), or a
    rule that there is not.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        ranks: list[int],
        alpha: float | None = None,
        scaling_rule: str = "alpha",
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        # on meta: from_linear puts the base's own weight and bias in
        super().__init__(in_features, out_features, bias, device="meta", dtype=dtype)
        check_ranks(in_features, out_features, ranks)
        get_scaling(scaling_rule, alpha, 1, in_features)  # refuses an unknown rule
        self.ranks, self.alpha, self.scaling_rule = list(ranks), alpha, scaling_rule
        empty = lambda *shape: torch.empty(*shape, device=device, dtype=dtype)
        self.lora_A = nn.Parameter(empty(sum(ranks), in_features))
        self.lora_B = nn.ParameterDict()
        for part, rank in enumerate(ranks):
            if rank:
                self.lora_B[str(part)] = nn.Parameter(empty(out_features // len(ranks), rank))
        # In a buffer: a float, other in every layer, would be baked into the compiled block.
        # All layers of a model have one, or none of them: its absence would be a graph of its own.
        is_scaled = scaling_rule != "authors" and (alpha is not None or scaling_rule != "alpha")
        self.register_buffer("scaling", empty(sum(ranks), 1) if is_scaled else None, persistent=False)
        self.init_buffers()

    @classmethod
    def from_linear(
        cls, linear: nn.Linear, ranks: list[int], alpha: float | None = None, scaling_rule: str = "alpha"
    ) -> "LoRALinear":
        """The same Linear, weight and bias shared and not copied, with adapters on its device in its
        dtype."""
        place = dict(device=linear.weight.device, dtype=linear.weight.dtype)
        sizes, has_bias = (linear.in_features, linear.out_features), linear.bias is not None
        new = cls(*sizes, ranks, alpha, scaling_rule, has_bias, **place)
        new.weight, new.bias = linear.weight, linear.bias
        return new.train(linear.training)

    def get_scaling(self, rank: int) -> float:
        return get_scaling(self.scaling_rule, self.alpha, rank, self.in_features)

    def init_buffers(self) -> None:
        if self.scaling is not None and not self.scaling.is_meta:
            self.scaling.copy_(torch.cat([torch.full((r, 1), self.get_scaling(r)) for r in self.ranks if r]))

    @torch.no_grad()
    def init_adapters(self, seed: int, name: str) -> None:
        """A Kaiming-uniform(√5) from a generator of (seed, name), B zero: the function is the base's.

        The base's weights are in place by then, so an adapter that starts from W (its singular vectors, say)
        may read `self.weight`, which is a DTensor where FSDP shards it.
        """
        rng = torch.Generator(self.lora_A.device).manual_seed(zlib.crc32(f"{seed}/{name}.lora_A".encode()))
        # The whole matrix: a shard gets its part of the same numbers.
        A = torch.empty(self.lora_A.shape, device=self.lora_A.device)
        if A.numel():
            nn.init.kaiming_uniform_(A, a=math.sqrt(5), generator=rng)
        if isinstance(self.lora_A, DTensor):  # without traffic: every process has drawn the whole
            A = distribute_tensor(A, self.lora_A.device_mesh, self.lora_A.placements, src_data_rank=None)
        self.lora_A.copy_(A)
        for B in self.lora_B.values():
            B.zero_()

    def adapter_parameters(self) -> dict[str, nn.Parameter]:
        """What of this module is adapter, by its name here: every parameter but the base's weight and bias.

        These are what stays trainable when the base is frozen, and no part of the base when it is
        exported.
        """
        return {name: p for name, p in self.named_parameters() if name not in ("weight", "bias")}

    def forward(self, x: Tensor) -> Tensor:
        if not self.lora_B:  # rank 0 in every part
            return super().forward(x)
        A = self.lora_A if self.scaling is None else self.lora_A * self.scaling  # (Σ rank, in)
        # Of a ParameterDict torch.compile asks for every value anew in every call, by two calls in Python.
        Bs = list(self.lora_B._parameters.values())  # (out / parts, rank) each
        where = [int(part) for part in self.lora_B]  # the row parts that have an adapter
        x2d = x.reshape(-1, x.shape[-1])  # (N, in)
        y = lora_linear(x2d, self.weight, self.bias, A, Bs, where, len(self.ranks))  # (N, out)
        return y.view(*x.shape[:-1], self.out_features)  # (..., out)

    def adapter(self, part: int) -> tuple[Tensor, Tensor]:
        """(s·B, A) of a row part, (rows, rank) and (rank, in): their product is what it adds to the weight.

        Empty for rank 0. Whole, where they are sharded: a collective, for every process to call.
        """
        start, rank = sum(self.ranks[:part]), self.ranks[part]
        A = to_plain(self.lora_A)[start : start + rank]
        if not rank:
            return A.new_empty(self.out_features // len(self.ranks), 0), A
        B = to_plain(self.lora_B[str(part)])
        if self.scaling is not None:
            B = B * self.get_scaling(rank)
        return B, A

    @torch.no_grad()
    def merged(self) -> nn.Linear:
        """A plain Linear with W + s·B·A, the sum taken in float32 (its rounding is all that is lost)."""
        has_bias, dtype = self.bias is not None, self.weight.dtype
        linear = nn.Linear(self.in_features, self.out_features, has_bias, device="meta", dtype=dtype)
        adapters = [self.adapter(part) for part in range(len(self.ranks))]
        delta = torch.cat([B.float() @ A.float() for B, A in adapters])  # (out, in)
        linear.weight = nn.Parameter((self.weight.float() + delta).to(dtype), self.weight.requires_grad)
        linear.bias = self.bias
        return linear.train(self.training)

    def extra_repr(self) -> str:
        scaling = f"alpha={self.alpha}, scaling_rule={self.scaling_rule!r}"
        return f"{super().extra_repr()}, ranks={self.ranks}, {scaling}"


class PlainLoRALinear(LoRALinear):
    """Computes by `reference`. `lora.inject.use_reference` makes these."""

    def forward(self, x: Tensor) -> Tensor:
        adapters = [(1.0, *self.adapter(part)) for part in range(len(self.ranks))]  # s is in B
        return reference(x, self.weight, self.bias, adapters)


def check_ranks(in_features: int, out_features: int, ranks: list[int], where: str = "") -> None:
    """Raises ValueError, the message opening with `where`, for ranks that a Linear of this size can't
    have."""
    if out_features % len(ranks):
        raise ValueError(f"{where}{len(ranks)} row parts do not divide {out_features} output features")
    largest = min(in_features, out_features // len(ranks))
    for rank in ranks:
        if not 0 <= rank <= largest:
            raise ValueError(f"{where}rank {rank} is not between 0 and min(in, out) = {largest}")


def to_plain(tensor: Tensor) -> Tensor:
    """A DTensor gathered whole (a collective: every process must call), a plain tensor as it is."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor

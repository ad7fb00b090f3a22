"""LoRALinear: a Linear whose row parts each carry a low-rank adapter (Hu et al. 2106.09685).

W x + s · B (A x), A Kaiming-uniform(√5), B = 0, so that insertion leaves the function as it was; s = alpha / rank, or 1, or with rslora
alpha / √rank (Kalajdzievski 2312.03732).
A fused qkv is one Linear with three row parts and so three adapters with three ranks: their A-matrices stand side by side in
one (Σ rank, in) matrix and take one GEMM, each B-product is added to its rows by addmm.
"""

import math
import zlib

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor


def to_plain(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


class LoRALinear(nn.Linear):
    """A Linear with `len(ranks)` row parts; part i has an adapter of rank `ranks[i]`, or none where that is 0.

    Parameters: weight (out, in) and bias (out,) of the base; lora_A (Σ rank, in), the parts' A below each other; lora_B[i]
    (out / parts, rank_i), one for each adapted part. `alpha=None` means scaling 1 in every part.
    Raises ValueError for rows that the parts don't divide, a negative rank, or one above min(in, out / parts).
    """

    def __init__(self, in_features: int, out_features: int, ranks: list[int], alpha: float | None = None, rslora: bool = False,
                 bias: bool = True, device=None, dtype=None):
        super().__init__(in_features, out_features, bias, device="meta", dtype=dtype)  # from_linear puts the real ones in
        if out_features % len(ranks):
            raise ValueError(f"{len(ranks)} row parts do not divide {out_features} output features")
        rows = out_features // len(ranks)
        for rank in ranks:
            if not 0 <= rank <= min(in_features, rows):
                raise ValueError(f"rank {rank} is not between 0 and min(in, out) = {min(in_features, rows)}")
        self.ranks, self.alpha, self.rslora = list(ranks), alpha, rslora
        self.lora_A = nn.Parameter(torch.empty(sum(ranks), in_features, device=device, dtype=dtype))
        self.lora_B = nn.ParameterDict({str(i): nn.Parameter(torch.empty(rows, rank, device=device, dtype=dtype))
                                        for i, rank in enumerate(ranks) if rank})
        # In a buffer, not in floats: these differ between layers, and a float would be baked into the compiled block.
        self.register_buffer("scaling", None if alpha is None else torch.empty(sum(ranks), 1, device=device, dtype=dtype),
                             persistent=False)
        self.init_buffers()

    @classmethod
    def from_linear(cls, linear: nn.Linear, ranks: list[int], alpha: float | None, rslora: bool = False) -> "LoRALinear":
        """The same Linear, its weight and bias shared and not copied, with adapters on its device in its dtype."""
        new = cls(linear.in_features, linear.out_features, ranks, alpha, rslora, linear.bias is not None,
                  device=linear.weight.device, dtype=linear.weight.dtype)
        new.weight, new.bias = linear.weight, linear.bias
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
        A = torch.empty(self.lora_A.shape, device=self.lora_A.device)  # whole: a shard gets its part of the same numbers
        nn.init.kaiming_uniform_(A, a=math.sqrt(5), generator=rng)
        if isinstance(self.lora_A, DTensor):
            A = distribute_tensor(A, self.lora_A.device_mesh, self.lora_A.placements, src_data_rank=None)  # no traffic
        self.lora_A.copy_(A)
        for B in self.lora_B.values():
            B.zero_()

    def forward(self, x: Tensor) -> Tensor:
        x2d = x.reshape(-1, x.shape[-1])  # (N, in)
        y = F.linear(x2d, self.weight, self.bias)  # (N, out)
        A = self.lora_A if self.scaling is None else self.lora_A * self.scaling
        # The sizes come from the tensors, not from self.ranks: marked dynamic, they serve every layer's ranks in one graph.
        sizes = [B.shape[1] for B in self.lora_B.values()]
        ax = dict(zip(self.lora_B, F.linear(x2d, A).split(sizes, dim=1)))  # part -> (N, rank)
        if len(self.ranks) == 1:
            y = torch.addmm(y, ax["0"], self.lora_B["0"].t())
        else:
            parts = y.chunk(len(self.ranks), dim=1)  # (N, out / parts) each
            y = torch.cat([torch.addmm(part, ax[str(i)], self.lora_B[str(i)].t()) if str(i) in ax else part
                           for i, part in enumerate(parts)], dim=1)
        return y.view(*x.shape[:-1], self.out_features)  # (..., out)

    def adapter(self, part: int) -> tuple[Tensor, Tensor]:
        """(s·B, A) of a row part, (rows, rank) and (rank, in): their product is what it adds to the weight. Empty for rank 0.

        Whole, where they are sharded: a collective, for every rank to call.
        """
        start = sum(self.ranks[:part])
        A = to_plain(self.lora_A)[start:start + self.ranks[part]]
        B = to_plain(self.lora_B[str(part)]) if self.ranks[part] else A.new_empty(self.out_features // len(self.ranks), 0)
        return (B if self.alpha is None or not self.ranks[part] else B * self.get_scaling(self.ranks[part])), A

    @torch.no_grad()
    def merged(self) -> nn.Linear:
        """A plain Linear with W + s·B·A, the sum taken in float32 (its rounding is all that is lost)."""
        linear = nn.Linear(self.in_features, self.out_features, self.bias is not None, device="meta", dtype=self.weight.dtype)
        delta = torch.cat([B.float() @ A.float() for B, A in map(self.adapter, range(len(self.ranks)))])  # (out, in)
        linear.weight = nn.Parameter((self.weight.float() + delta).to(self.weight.dtype), self.weight.requires_grad)
        linear.bias = self.bias
        return linear.train(self.training)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, ranks={self.ranks}, alpha={self.alpha}, rslora={self.rslora}"

"""python bench.py roofline: the time that a training step should take on one GPU, kernel by kernel. Nothing
here was measured.

A kernel takes max(FLOPs / attainable matmul rate, bytes / attainable bandwidth), a step the sum over its
kernels, back to back. The kernels are counted, not listed by hand: a dispatch mode watches the operators that
train.py's own step calls on fake tensors, in the data types they really have.

- A matrix product, attention, and a call on lists of tensors (the optimiser's, the clipping's) is a kernel
  each, and so is one of our own Triton kernels (lora/triton_kernels.py). It reads its operands and writes
  its results once, and what it adds into it reads as well.
- Inside a block the compiler fuses what is elementwise, reductions and normalisation with it. Here:
  consecutive such operators between two kernels of the first sort that share a tensor are one pass. It reads
  each tensor from outside once, and writes what somebody uses later (backward counts), and nothing else. The
  gradients of LayerNorm's own weights, sums over columns, are a pass of their own that reads these again.
- Outside the blocks nothing is compiled: there each operator is a pass.
- Views cost nothing, nor do casts to a wider type inside a block: the compiler keeps what was cast, and casts
  again where it is read.

What this does not see: launches and the host; that a skinny product, or one whose tiles don't fill the GPU,
reaches neither ceiling; caches, which spare reading again what was just written; kernels that run beside each
other. Of the compiler's choices: it may compute anew in backward what here is kept, and fuse across a kernel
what here is two passes.

The tensors are a CPU's, because a fake GPU without a real one has no backward. `as_on_a_gpu` sees to it that
everything that asks gets a GPU's answer; attention is the CPU's operator, which reads and writes what the
GPU's does, but for one thing that is added here: where the gradient of its result has gaps between its rows,
the GPU's first copies it.
"""

import itertools
import time
from dataclasses import dataclass, replace
from importlib.util import find_spec
from typing import Literal

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

import train
from benchmarks.choices import Model, RankChoice, get_ranks
from benchmarks.contenders import PHASES
from benchmarks.devices import DEVICES
from benchmarks.fake import as_on_a_gpu, build_fake, get_black_batch, take_step
from benchmarks.memory import fill_moments
from errors import UserError
from lora.ranks import Ranks
from model.optim import build_optimizer
from model.variants import VARIANTS
from monitor.log import FROZEN

MATMUL_SHARE, BANDWIDTH_SHARE = 0.7, 0.8  # of the data sheet's, what good kernels reach
KINDS = ("products", "adapters", "attention", "elementwise", "casts", "optimizer")
WRITE_ONLY = {"copy_", "fill_", "zero_"}  # in place, and don't read what was there


@dataclass(frozen=True)
class Kernel:
    name: str
    kind: str  # of KINDS
    flops: int
    bytes: int  # read and written


@dataclass(frozen=True)
class Ceilings:
    matmul: float  # attainable FLOP/s
    bandwidth: float  # attainable bytes/s


@dataclass(frozen=True)
class Piece:
    """What of a storage a tensor covers."""

    storage: int  # its number in the trace
    place: tuple  # offset, sizes, strides
    bytes: int


@dataclass(frozen=True)
class Call:
    """An operator that ran."""

    name: str
    kind: str
    flops: int
    reads: tuple[Piece, ...]
    writes: tuple[Piece, ...]
    graph: int | None  # of what the compiler compiles together; None: runs as it is
    copied: int = 0  # bytes that the GPU's operator reads and writes for a copy of an argument


# ------------------------------------------------------------------------------------------------------------
# the operators of a step


class Trace(TorchDispatchMode):
    """Watches operators. `calls`: those that are kernels, in the order in which they ran."""

    def __init__(self, ranks: int):
        """`ranks`: the most that the adapters of one Linear have together."""
        super().__init__()
        self.ranks = ranks
        self.calls: list[Call] = []
        self.graph: int | None = None  # in which graph of the compiler's the next operators are
        self.graphs = itertools.count()
        self.numbers: dict[int, int] = {}  # address of a storage -> its number
        self.storages: list[torch.UntypedStorage] = []  # held, so that no address comes up twice
        self.lasting: set[int] = set()  # storages that were there before, or are still there afterwards

    def begin_graph(self) -> None:
        self.graph = next(self.graphs)

    def end_graph(self) -> None:
        self.graph = None

    def keep(self, results) -> None:
        """What the watched code returns somebody will read."""
        self.lasting.update(piece.storage for piece in self.get_pieces(results))

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if operator.namespace in ("prim", "profiler"):  # questions and marks, no work
            return operator(*args, **kwargs)
        if operator.namespace != "prelora":
            with self:
                result = operator.decompose(*args, **kwargs)
            if result is not NotImplemented:  # below autograd, where F.linear comes as it is
                return result
        known = len(self.storages)
        reads = self.get_pieces((args, kwargs))
        self.lasting.update(range(known, len(self.storages)))
        known = len(self.storages)
        result = operator(*args, **kwargs)
        made = [piece for piece in self.get_pieces(result) if piece.storage >= known]
        name = operator._schema.name.removeprefix("aten::").removeprefix("prelora::")
        changed, untouched = self.get_changed(operator, args, kwargs)
        writes = tuple(made + changed)
        if not writes or "empty" in name:  # a view, a question, or memory that is not written yet
            return result
        if name.endswith("_like") or name.startswith("new_"):
            reads = []
        reads = tuple(piece for piece in reads if piece not in untouched)
        kind, flops = self.classify(operator, name, args, kwargs, result)
        if kind in ("products", "adapters") and "mm" in name:
            a, b = args[-2:]
            name += f" {'×'.join(str(size) for size in (*a.shape, b.shape[-1]))}"
        self.calls.append(Call(name, kind, flops, reads, writes, self.graph, get_copied(name, args)))
        return result

    def get_pieces(self, tensors) -> list[Piece]:
        """Of a tree of arguments or results, each piece once."""
        pieces = {}
        for tensor in tree_leaves(tensors):
            if isinstance(tensor, Tensor) and tensor.numel():
                storage = tensor.untyped_storage()
                number = self.numbers.setdefault(storage._cdata, len(self.storages))
                if number == len(self.storages):
                    self.storages.append(storage)
                place = tensor.storage_offset(), tuple(tensor.shape), tensor.stride()
                elements = 1
                for size, stride in zip(tensor.shape, tensor.stride()):
                    elements *= size if stride else 1  # an expanded dimension is there once
                pieces[Piece(number, place, elements * tensor.element_size())] = None
        return list(pieces)

    def get_changed(self, operator, args, kwargs) -> tuple[list[Piece], list[Piece]]:
        """The pieces of arguments that are written, and those of them that are not read before."""
        changed = []
        name = operator._schema.name.removeprefix("aten::")
        for i, argument in enumerate(operator._schema.arguments):
            is_written = argument.alias_info is not None and argument.alias_info.is_write
            if name.startswith("_fused_") and argument.name == "grads":
                is_written = False  # only if a gradient scaler's factor is to be taken out
            if is_written:
                changed += self.get_pieces(args[i] if i < len(args) else kwargs.get(argument.name))
        return changed, changed if name in WRITE_ONLY else []

    def classify(self, operator, name: str, args, kwargs, result) -> tuple[str, int]:
        """(kind, FLOPs) of an operator."""
        if name == "effective_weight":
            weight, B, A = args[:3]
            return "adapters", 2 * B.shape[0] * A.numel()
        if name == "adapter_gradients":
            x, dy, ax = args[:3]
            return "adapters", 2 * ax.numel() * (x.shape[1] + dy.shape[1])
        if "scaled_dot_product" in name:
            backward = "backward" in name  # (dy, q, k, v, …), forward (q, k, v, …)
            count = sdpa_backward_flop_count if backward else sdpa_flop_count
            return "attention", count(*[tensor.shape for tensor in args[: 4 if backward else 3]])
        if name.startswith(("_foreach_", "_fused_")):
            return "optimizer", 0
        if name == "addmm_":  # torch's counter knows addmm only
            _, a, b = args
            flops = 2 * a.numel() * b.shape[1]
        elif operator._overloadpacket in flop_registry:
            flops = flop_registry[operator._overloadpacket](*args, **kwargs, out_val=result)
        else:
            return ("casts" if name == "_to_copy" else "elementwise"), 0
        if self.graph is not None and "mm" in name and min(*args[-2].shape, *args[-1].shape) <= self.ranks:
            return "adapters", flops
        return "products", flops


def get_copied(name: str, args: tuple) -> int:
    """Bytes that a GPU's operator moves to copy an argument first: attention's backward copies a gradient
    (B, H, N, d) that has gaps between its rows (B, N, H d)."""
    if "scaled_dot_product" not in name or "backward" not in name:
        return 0
    dy = args[0]
    return 0 if dy.transpose(1, 2).is_contiguous() else 2 * dy.numel() * dy.element_size()


def watch_blocks(trace: Trace, blocks: nn.ModuleList) -> None:
    """Tell `trace` what is compiled together: each block's forward, and each block's backward."""
    outer = []

    def begin_backward(gradient: Tensor) -> None:
        trace.begin_graph()
        # Of a frozen model's first block no gradient says that its backward is over: the whole's end does.
        torch.autograd.Variable._execution_engine.queue_callback(trace.end_graph)

    def before(block: nn.Module, args: tuple) -> None:
        outer.append(trace.graph)
        trace.begin_graph()
        if block is blocks[0] and args[0].requires_grad:
            args[0].register_hook(lambda gradient: trace.end_graph())

    def after(block: nn.Module, args: tuple, y: Tensor) -> None:
        trace.graph = outer.pop()  # in backward, where a block is run again: back in that graph
        if y.requires_grad:
            y.register_hook(begin_backward)

    for block in blocks:
        block.register_forward_pre_hook(before)
        block.register_forward_hook(after)


# ------------------------------------------------------------------------------------------------------------
# from operators to kernels


def get_kernels(trace: Trace) -> list[Kernel]:
    """What a GPU is given for the operators of a trace."""
    calls = see_through_casts(trace)
    last_use = dict.fromkeys(trace.lasting, len(calls))  # storage -> number of the last call to read it
    for number, call in enumerate(calls):
        for piece in call.reads:
            last_use[piece.storage] = max(number, last_use.get(piece.storage, 0))
    found, run = [], []
    for number, call in enumerate(calls):
        is_fused = call.graph is not None and call.kind in ("elementwise", "casts")
        if run and not (is_fused and call.graph == run[0].graph):
            found += fuse(run, number, last_use)
            run = []
        if is_fused:
            run.append(call)
        else:
            moved = sum(piece.bytes for piece in call.reads + call.writes) + call.copied
            found.append(Kernel(call.name, call.kind, call.flops, moved))
    return found + fuse(run, len(calls), last_use)


def see_through_casts(trace: Trace) -> list[Call]:
    """The calls of a trace without casts to a wider type inside a block: the compiler keeps what was cast,
    and casts again wherever it is read. What is read outside the blocks, or outlasts the step, is
    written."""
    written, made = set(trace.lasting), set()
    for call in trace.calls:
        if call.graph is None:
            written |= get_storages(call.reads)
        written |= get_storages(call.writes) & made  # changed in place
        made |= get_storages(call.writes)
    calls, sources = [], {}  # storage of a cast's result -> what was cast
    for call in trace.calls:
        reads = dict.fromkeys(sources.get(piece.storage, piece) for piece in call.reads)
        call = replace(call, reads=tuple(reads))
        if call.kind == "casts" and call.graph is not None and len(call.reads) == len(call.writes) == 1:
            ((source,), (result,)) = call.reads, call.writes
            if result.bytes > source.bytes and result.storage not in written:
                sources[result.storage] = source
                continue
        calls.append(call)
    return calls


def fuse(run: list[Call], end: int, last_use: dict[int, int]) -> list[Kernel]:
    """Consecutive calls, which end before call number `end`, as passes: one for those that share a tensor."""
    passes: list[list[Call]] = []
    for call in run:
        touched = get_storages(call.reads + call.writes)
        joined, others = [], []
        for other in passes:
            shares = any(touched & get_storages(before.reads + before.writes) for before in other)
            if shares:
                joined += other
            else:
                others.append(other)
        passes = [*others, [*joined, call]]
    found = []
    for calls in passes:
        read, written, here = set(), set(), set()
        for call in calls:
            read.update(piece for piece in call.reads if piece.storage not in here)
            if call.name == "native_layer_norm_backward" and len(call.writes) > 1:
                again = sum(piece.bytes for piece in read)
                found.append(Kernel("LayerNorm's column sums", "elementwise", 0, again))
            here |= get_storages(call.writes)
            written.update(piece for piece in call.writes if last_use.get(piece.storage, 0) >= end)
        if written:  # else nobody wants to know
            kind = "casts" if all(call.kind == "casts" for call in calls) else "elementwise"
            moved = sum(piece.bytes for piece in read) + sum(piece.bytes for piece in written)
            found.append(Kernel(", ".join(call.name for call in calls), kind, 0, moved))
    return found


def get_most_ranks(ranks: Ranks) -> int:
    """The most that the adapters of one Linear have together; q, k and v are one."""
    layers = zip(*(ranks.get(family, [0]) for family in ("q", "k", "v")))
    return max([*(sum(layer) for layer in layers), *(max(layer) for layer in ranks.values())])


def get_storages(pieces: tuple[Piece, ...]) -> set[int]:
    return {piece.storage for piece in pieces}


def count_kernels(cfg: train.Config, phase: str, ranks: Ranks, batch_size: int) -> list[Kernel]:
    """The kernels of train.py's step in `phase`, compiled block by block, on one GPU; FROZEN is the full
    phase with its lowest `cfg.freeze_blocks` frozen.

    batch_size: images of a micro-batch; `cfg.grad_accum_steps` of these are a step. `cfg.compile` and
    `cfg.batch_size` play no role. Raises UserError for selective checkpointing, which is the compiler's
    choice, and without Triton, whose kernels are counted.
    """
    if find_spec("triton") is None:
        raise UserError("the roofline counts Triton kernels as well, and Triton is not installed")
    if cfg.activation_checkpointing == "selective":
        raise UserError("what selective checkpointing recomputes only the compiler knows")
    cfg = replace(cfg, compile=False)
    mode, trace = FakeTensorMode(allow_non_fake_inputs=True), Trace(get_most_ranks(ranks))
    with as_on_a_gpu():
        frozen_blocks = cfg.freeze_blocks if phase == FROZEN else 0
        model = build_fake(mode, cfg, "full" if phase == FROZEN else phase, ranks, "cpu", None, frozen_blocks)
        watch_blocks(trace, model.blocks)
        with mode:
            optimizer = build_optimizer(model, cfg.weight_decay)
            fill_moments(model, optimizer)
            batches = itertools.repeat(get_black_batch(cfg, batch_size))
            with trace:
                take_step(cfg, model, optimizer, batches)
    return get_kernels(trace)


# ------------------------------------------------------------------------------------------------------------
# from kernels to seconds


def get_ceilings(device: str) -> Ceilings:
    """What good kernels reach in bfloat16 on a row of benchmarks/devices.py's DEVICES."""
    sheet = DEVICES[device]
    return Ceilings(MATMUL_SHARE * sheet.peak_flops, BANDWIDTH_SHARE * sheet.memory_bandwidth)


def seconds_by_kind(kernels: list[Kernel], ceilings: Ceilings) -> dict[str, float]:
    """Seconds of a step by kind of kernel, one kernel after the other: their sum is the step."""
    seconds = dict.fromkeys(KINDS, 0.0)
    for kernel in kernels:
        seconds[kernel.kind] += max(kernel.flops / ceilings.matmul, kernel.bytes / ceilings.bandwidth)
    return seconds


def get_step_seconds(cfg: train.Config, ranks: Ranks, batch_size: int, device: str) -> dict[str, float]:
    """{phase: seconds of a step} on one of DEVICES, in bfloat16."""
    cfg, ceilings = replace(cfg, dtype="bfloat16"), get_ceilings(device)
    counted = {phase: count_kernels(cfg, phase, ranks, batch_size) for phase in PHASES}
    return {phase: sum(seconds_by_kind(found, ceilings).values()) for phase, found in counted.items()}


# ------------------------------------------------------------------------------------------------------------
# the command


def roofline(
    model: Model = "L/16",
    batch_size: int = 64,
    ranks: RankChoice = "mixed",
    device: Literal[*DEVICES] = "a100-40gb",
    freeze_blocks: int | None = None,
    residual_dtype: Literal["float32", "bfloat16"] = "float32",
    matmul: float | None = None,
    bandwidth: float | None = None,
) -> dict[str, dict[str, float]]:
    """The time of a step of each phase on one GPU, bfloat16, from the FLOPs and bytes of its kernels; nothing
    is measured.

    batch_size: images of 224 × 224. freeze_blocks: of the lowest, in a LoRA phase besides that of all blocks;
    None = half of them. matmul: TFLOP/s, bandwidth: GB/s that were measured on the device, in the place of
    70 % and 80 % of its data sheet's. Returns {phase: seconds by kind of kernel}, the LoRA phase with frozen
    blocks as "lora, N frozen", and prints it.
    """
    for name, value in (("batch_size", batch_size), ("matmul", matmul), ("bandwidth", bandwidth)):
        if value is not None and value <= 0:
            raise UserError(f"{name} must be above 0, not {value}")
    ceilings = get_ceilings(device)
    if matmul is not None:
        ceilings = replace(ceilings, matmul=matmul * 1e12)
    if bandwidth is not None:
        ceilings = replace(ceilings, bandwidth=bandwidth * 1e9)
    start, out = time.perf_counter(), {}
    cfg = train.Config(model=model, dataset="imagenet", dtype="bfloat16", batch_size=batch_size)
    cfg = replace(cfg, residual_dtype=residual_dtype)
    wanted, depth = get_ranks(ranks, model), VARIANTS[model]["depth"]
    frozen = depth // 2 if freeze_blocks is None else freeze_blocks
    if not 0 < frozen < depth:
        raise UserError(f"freeze_blocks must be above 0 and below {model}'s {depth} blocks, not {frozen}")
    print("COUNTED, nothing below was measured: milliseconds of a step, kernels back to back, compiled,")
    print(f"ViT-{model}, {batch_size} images, bfloat16, adapters {ranks}, {device}: at most ", end="")
    print(f"{ceilings.matmul / 1e12:.0f} TFLOP/s and {ceilings.bandwidth / 1e9:.0f} GB/s")
    kinds = "".join(f"{kind:>12}" for kind in KINDS)
    print(f"\n{'':18}{'ms':>8}{'full / it':>11}{'TFLOP':>8}{'GB':>7}{'kernels':>9}  |{kinds}")
    rows = {phase: (phase, cfg, wanted) for phase in PHASES}
    kept = {family: [0] * frozen + layers[frozen:] for family, layers in wanted.items()}
    rows[f"lora, {frozen} frozen"] = "lora", replace(cfg, freeze_blocks=frozen), kept
    for title, (phase, its_cfg, its_ranks) in rows.items():
        counted = count_kernels(its_cfg, phase, its_ranks, batch_size)
        out[title] = seconds_by_kind(counted, ceilings)
        print(get_row(title, counted, out), flush=True)
    print(f"\ncounted in {time.perf_counter() - start:.0f} s")
    return out


def get_row(title: str, counted: list[Kernel], seconds: dict[str, dict[str, float]]) -> str:
    """A line of the table. `seconds`: by kind, of the rows so far."""
    step, full = sum(seconds[title].values()), sum(seconds["full"].values())
    flops, moved = sum(kernel.flops for kernel in counted), sum(kernel.bytes for kernel in counted)
    sums = f"{1e3 * step:8.1f}{full / step:11.2f}{flops / 1e12:8.2f}{moved / 1e9:7.1f}{len(counted):9}"
    return f"{title:18}{sums}  |" + "".join(f"{1e3 * value:12.1f}" for value in seconds[title].values())

"""Parts 3, 4 and 9 of `python bench.py gpu`: a step of each phase on this GPU, how long the host takes to
issue it, what its kernels do in that time, and the peers beside it."""

import gc
import multiprocessing
import time
from dataclasses import replace
from multiprocessing.connection import Connection

import torch

from benchmarks.choices import get_ranks, repeat_noise
from benchmarks.contenders import PHASES, Contender, build_contender
from benchmarks.flops import count_phases
from benchmarks.gpu_findings import Check, Span, time_calls, trace, wait_for
from benchmarks.memory import simulate_peaks
from benchmarks.roofline import Ceilings, count_kernels, get_ceilings, seconds_by_kind
from benchmarks.step import step
from model import parallel
from model.variants import VARIANTS
from monitor.perf import peak_flops
from train import Config

RANKS = "mixed"  # 8 to 64

# A kernel's class by what its name has in it; the first that fits. inductor names a kernel of its own after
# the operators it has fused (triton_poi_fused_cat_permute), so it is asked for before those.
CLASSES = {
    "adapters": ("effective_weight_kernel", "adapter_gradients_kernel"),
    "optimizer": ("multi_tensor",),
    "elementwise": ("triton_",),
    "attention": ("flash", "fmha", "sdpa", "cudnn::fusion"),
    "products": ("gemm", "nvjet", "cutlass", "xmma", "cublas", "splitkreduce"),
    "copies": ("memcpy", "memset"),
    "eager passes": ("at::native",),  # outside the compiled blocks, and inside operators of our own
}
# Kinds of benchmarks/roofline.py that have no class of their own. Its elementwise has the eager passes in it.
ROOFLINE_CLASSES = {"casts": "elementwise"}


def get_config(check: Check) -> Config:
    """L/16 with 64 images in bfloat16, compiled; in a dry run the smallest model with four."""
    if check.tiny:
        return Config(model="tiny-debug", dataset="fashion_mnist", batch_size=4, dtype="bfloat16")
    return Config(model="L/16", dataset="imagenet", batch_size=64, dtype="bfloat16")


def warm_up(check: Check, cfg: Config, phase: str) -> Contender:
    """A Contender of this phase, compiled, after three steps."""
    free_memory(check.device)
    parallel.set_up_device(check.device, VARIANTS[cfg.model]["embed_dim"])
    batches = repeat_noise(cfg.dataset, cfg.batch_size, check.device)
    contender = build_contender(phase, cfg, get_ranks(RANKS, cfg.model), check.device, batches)
    began = time.perf_counter()
    for _ in range(3):
        contender.step()
    wait_for(check.device)
    check.say(f"{phase}: built, compiled, warmed up", f"{time.perf_counter() - began:.1f} s")
    return contender


def free_memory(device: torch.device) -> None:
    """Of what nothing refers to any more but itself: compiled blocks stand in reference cycles."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def check_finite(phase: str, contender: Contender) -> None:
    """Raise FloatingPointError where a step's update was left out: a skipped one is not timed."""
    if contender.failed:
        raise FloatingPointError(f"{phase}: a loss or gradient norm was not finite")


# ------------------------------------------------------------------------------------------------------------
# 3: a step


def time_phases(check: Check) -> None:
    """GPU ms, host ms, MFU and peak memory of a step of each phase, and the ratios. Only that the simulated
    peaks come has to hold.

    GPU ms: steps in a row between two events, divided by their number. Host ms: until the call of a single
    step returns, its work being queued on a GPU that has nothing to do; the shortest of several. It is an
    upper bound where a step has more kernels than the queue holds (1,024), for then the host may wait for the
    GPU. A phase whose host ms are its GPU ms is bound by Python."""
    cfg = get_config(check)
    simulated = start_simulation(cfg)
    flops = count_phases(cfg, get_ranks(RANKS, cfg.model), cfg.batch_size)
    for phase in PHASES:
        contender = None  # the phase before goes, before this one's memory is asked for
        contender = warm_up(check, cfg, phase)
        seconds = time_calls(check.device, contender.step, in_a_row=1 if check.tiny else 5, rounds=7)
        host = min(time_host(contender) for _ in range(5))
        check.record(f"{phase}_gpu_ms", 1e3 * seconds)
        check.record(f"{phase}_host_ms", 1e3 * host)
        rate, peak = flops[phase] * cfg.batch_size / seconds, peak_flops(check.device, cfg.dtype)
        mfu = f", MFU {100 * rate / peak:.1f} %" if peak else ""
        text = f"{1e3 * seconds:.1f}, {1e3 * host:.1f}; {rate / 1e12:.0f} TFLOP/s{mfu}"
        check.say(f"{phase}: GPU ms, host ms", text)
        check.record(f"{phase}_peak_bytes", measure_peak(contender))
        check_finite(phase, contender)
    for phase in ("warmup", "lora"):
        ratio = check.figures["full_gpu_ms"] / check.figures[f"{phase}_gpu_ms"]
        check.record(f"{phase}_vs_full", ratio)
        check.say(f"full / {phase}", f"{ratio:.2f}, by FLOPs {flops['full'] / flops[phase]:.2f}")
    compare_peaks(check, simulated)


def time_host(contender: Contender) -> float:
    """Seconds until the call of one step returns, the device's queue being empty."""
    wait_for(contender.device)
    began = time.perf_counter()
    contender.step()
    seconds = time.perf_counter() - began
    wait_for(contender.device)
    return seconds


def measure_peak(contender: Contender) -> int:
    """Bytes allocated at the peak of a step; 0 on a CPU."""
    if contender.device.type != "cuda":
        return 0
    torch.cuda.reset_peak_memory_stats(contender.device)
    contender.step()
    wait_for(contender.device)
    return torch.cuda.max_memory_allocated(contender.device)


def start_simulation(cfg: Config) -> Connection:
    """The reading end of a pipe on which a process of its own sends {phase: bytes at its peak} as
    `bench.py memory` has them: plain replication, eager."""
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    context.Process(target=simulate, args=(cfg, sender), daemon=True).start()
    sender.close()
    return receiver


def simulate(cfg: Config, sender: Connection) -> None:
    """What `start_simulation`'s process does."""
    torch.set_num_threads(1)
    sender.send(simulate_peaks(cfg, get_ranks(RANKS, cfg.model)))
    sender.close()


def compare_peaks(check: Check, simulated: Connection) -> None:
    """The allocator's peaks beside the simulation's."""
    try:
        peaks = simulated.recv() if simulated.poll(60) else None
    except EOFError:  # its process has failed, and said why in the log
        peaks = None
    if peaks is None:
        check.say("peaks by bench.py memory", "did not come", False)
        return
    for phase, simulated_bytes in peaks.items():
        peak = check.figures[f"{phase}_peak_bytes"]
        check.record(f"{phase}_simulated_peak_bytes", simulated_bytes)
        text = f"{peak / 2**30:.2f} GiB; bench.py memory, eager: {simulated_bytes / 2**30:.2f}"
        check.say(f"{phase}: peak of a compiled step", text)


# ------------------------------------------------------------------------------------------------------------
# 4: where the time goes


def profile_phases(check: Check) -> None:
    """ms of a step by class of kernel, and the share of time in which no kernel runs, beside the roofline.
    Only that a GPU's profile has kernels in it has to hold. The profiler costs the host time: the idle share
    is an upper bound."""
    cfg, steps = get_config(check), 3
    ceilings, whose = choose_ceilings(check)
    rates = f"{ceilings.matmul / 1e12:.0f} TFLOP/s, {ceilings.bandwidth / 1e9:.0f} GB/s"
    check.say("roofline's ceilings", f"{rates}, {whose}")
    for phase in PHASES:
        contender = None  # as in time_phases
        contender = warm_up(check, cfg, phase)
        spans = trace(check.device, contender.step, steps)
        check_finite(phase, contender)
        by_class, kernels = add_up(spans, steps)
        busy, whole = get_busy(spans)
        roof = get_roofline(cfg, phase, ceilings)
        check.record(f"{phase}_ms_by_class", by_class)
        check.record(f"{phase}_largest_kernels", kernels[:30])
        check.record(f"{phase}_idle_share", 1 - busy / whole if whole else None)
        check.record(f"{phase}_roofline_ms", roof)
        found = f"{sum(by_class.values()):.1f} ms in {len(spans) // steps} kernels"
        idle = f"{100 * (1 - busy / whole):.0f} % idle" if whole else "no kernels"
        holds = bool(spans) if check.device.type == "cuda" else None
        text = f"{found}, roofline {sum(roof.values()):.1f} ms; {idle}"
        check.say(f"{phase}: a step's kernels", text, holds)
        for name in dict.fromkeys([*by_class, *roof]):
            text = f"{by_class.get(name, 0.0):8.2f} ms, roofline {roof.get(name, 0.0):8.2f}"
            check.say(f"{phase}: {name}", text)


def get_roofline(cfg: Config, phase: str, ceilings: Ceilings) -> dict[str, float]:
    """ms of a step by class, as benchmarks/roofline.py counts them."""
    kernels = []
    for kernel in count_kernels(cfg, phase, get_ranks(RANKS, cfg.model), cfg.batch_size):
        is_library_s = kernel.kind == "adapters" and "mm" in kernel.name  # by its name it is any product
        kernels.append(replace(kernel, kind="products") if is_library_s else kernel)
    roof: dict[str, float] = {}
    for kind, seconds in seconds_by_kind(kernels, ceilings).items():
        name = ROOFLINE_CLASSES.get(kind, kind)
        roof[name] = roof.get(name, 0.0) + 1e3 * seconds
    return roof


def choose_ceilings(check: Check) -> tuple[Ceilings, str]:
    """Part 0's, where it has run; else 70 and 80 % of an H100's data sheet. And in words which."""
    if "matmul" in check.figures and "bandwidth" in check.figures:
        return Ceilings(check.figures["matmul"], check.figures["bandwidth"]), "measured"
    return get_ceilings("h100"), "70 and 80 % of an H100's data sheet"


def classify(name: str) -> str:
    """A kernel's class, by its name."""
    lower = name.lower()
    for kind, words in CLASSES.items():
        if any(word in lower for word in words):
            return kind
    return "other"


def add_up(spans: list[Span], steps: int) -> tuple[dict[str, float], list[tuple[float, float, str]]]:
    """({class: ms of a step}, [(ms of a step, launches of a step, kernel)], the largest first)."""
    by_class: dict[str, float] = {}
    milliseconds: dict[str, float] = {}
    launches: dict[str, int] = {}
    for name, begin, end in spans:
        kind, spent = classify(name), (end - begin) / 1e3 / steps
        by_class[kind] = by_class.get(kind, 0.0) + spent
        milliseconds[name] = milliseconds.get(name, 0.0) + spent
        launches[name] = launches.get(name, 0) + 1
    kernels = [(spent, launches[name] / steps, name[:160]) for name, spent in milliseconds.items()]
    return by_class, sorted(kernels, reverse=True)


def get_busy(spans: list[Span]) -> tuple[float, float]:
    """(µs in which at least one kernel runs, µs from the first's begin to the last's end); `spans` by their
    begin."""
    if not spans:
        return 0.0, 0.0
    busy, until = 0.0, spans[0][1]
    for _, begin, end in spans:
        busy += max(0.0, end - max(begin, until))
        until = max(until, end)
    return busy, until - spans[0][1]


# ------------------------------------------------------------------------------------------------------------
# 9: peers


def compare_peers(check: Check) -> None:
    """`bench.py step` beside timm's ViT and PEFT on Hugging Face's, eagerly: whole models take minutes to
    compile."""
    model, images, rounds = ("Ti/16", 2, 1) if check.tiny else ("L/16", 64, 5)
    options = dict(dtype="bfloat16", peers=("timm", "peft"), modes=("eager",))
    result = step(model=model, batch_size=images, rounds=rounds, **options)
    check.record("eager", result)
    each = ", ".join(f"{title} {ms:.1f}" for title, ms in result["milliseconds"].items())
    check.say(f"{model}, {images} images, bfloat16, eager: ms", each)
    for name, key in (("timm / full", "full_vs_timm"), ("HF + PEFT / lora", "lora_vs_peft")):
        check.say(name, f"{result[key]:.2f}")

"""Parts 2 and 5 to 8 of `python bench.py gpu`: does training on this GPU do what it does on a CPU, unsharded
and sharded, after a resume, and fed by a loader; and the tests that are marked gpu."""

import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.autograd import DeviceType
from torch.distributed.device_mesh import init_device_mesh
from torch.profiler import ProfilerActivity, profile

import train
from benchmarks.choices import get_ranks, repeat_noise
from benchmarks.contenders import PHASES, Contender, build_contender
from benchmarks.gpu_findings import Check, time_calls, wait_for
from benchmarks.gpu_reference import RUN, get_losses, make_reference
from benchmarks.loading import make_photos
from data.loader import Batch, Loader, build_loader, prefetch
from files import read_json
from model import checkpoint
from model.optim import build_optimizer

# By how much a loss and a gradient norm may differ, relatively, in any of the reference's steps. A CPU's
# bfloat16 differs by 0.1 % and 1 %; a learning rate a tenth too high by 8 % (full) and 4 % (lora).
BOUNDS = {"float32": (2e-3, 1e-2), "bfloat16": (1e-2, 3e-2)}
Losses = list[tuple[float, float]]  # (loss, gradient norm) of each step


# ------------------------------------------------------------------------------------------------------------
# 2: losses


def check_losses(check: Check) -> None:
    """Twenty steps from a checkpoint of each phase, eager and compiled, float32 (TF32) and bfloat16, beside a
    CPU's in float32; and, as control, the same with a learning rate a tenth too high."""
    folder, right = get_reference(check)
    for dtype, (loss_bound, norm_bound) in BOUNDS.items():
        for compiled in (False, True):
            for phase in PHASES:
                losses = get_losses(folder / phase, check.device, dtype, compiled)
                loss, norm = get_deviation(losses, right[phase])
                how = "compiled" if compiled else "eager"
                figure = (
                    f"loss {loss:.1e}, gradient norm {norm:.1e}, at most {loss_bound:.0e}, {norm_bound:.0e}"
                )
                check.say(f"{phase}, {dtype}, {how}", figure, loss <= loss_bound and norm <= norm_bound)
    loss, norm = get_deviation(
        get_losses(folder / "full", check.device, "bfloat16", False, lr=1.1e-3), right["full"]
    )
    check.say("control: full with 1.1 × the learning rate", f"loss {loss:.1e}", loss > BOUNDS["bfloat16"][0])


def get_reference(check: Check) -> tuple[Path, dict[str, Losses]]:
    """The folder with the reference's checkpoints, and its losses."""
    folder = check.reference
    if folder is None:
        folder = check.scratch / "reference"
        folder.mkdir()
        began = time.perf_counter()
        make_reference(folder)
        check.say("reference made on this machine's CPU", f"{time.perf_counter() - began:.0f} s")
    reference = read_json(folder / "losses.json")
    check.say("reference's torch", reference["torch"])
    return folder, reference["losses"]


def get_deviation(found: Losses, right: Losses) -> tuple[float, float]:
    """The largest relative difference in a step, of the loss and of the gradient norm."""
    pairs = list(zip(found, right, strict=True))
    return tuple(max(abs(a[i] - b[i]) / abs(b[i]) for a, b in pairs) for i in range(2))


# ------------------------------------------------------------------------------------------------------------
# 5: tests


def run_tests(check: Check) -> None:
    """The tests that are marked gpu, in a process of their own."""
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-m", "gpu", "-rfE"]
    command += ["--durations=5", "tests/test_data.py", "tests/test_parallel.py", "tests/test_train.py"]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    print(done.stdout)
    lines = done.stdout.splitlines()
    for line in lines:
        if line.startswith(("FAILED", "ERROR")):
            check.say("failed", line[:120], False)
    counts = [line for line in lines if re.search(r"\d+ (passed|failed|skipped|error)", line)]
    check.say("pytest -m gpu", counts[-1].strip("= ") if counts else "no result", done.returncode == 0)


# ------------------------------------------------------------------------------------------------------------
# 6: loader


def check_loader(check: Check) -> None:
    """Photographs from files to the GPU while a step runs: are they the loader's, is the step's time the
    larger of the two, and do copies run beside kernels."""
    images, batches, model = (4, 3, "Ti/16") if check.tiny else (64, 6, "B/16")
    photos = check.scratch / "photos"
    make_photos(photos / "train", images * batches)
    cfg = train.Config(model=model, dataset="imagenet", batch_size=images, dtype="bfloat16", compile=False)
    resident = repeat_noise("imagenet", images, check.device)
    contender = build_contender("full", cfg, get_ranks("8", model), check.device, resident)
    for _ in range(3):
        contender.step()
    in_memory = time_calls(check.device, contender.step, in_a_row=2 if check.tiny else 5, rounds=3)
    check.say(f"{model}, {images} images: a step on a batch in memory", f"{1e3 * in_memory:.1f} ms")
    for backend in ("folder", "synthetic"):  # no .beton is needed; the second's host has nothing to do
        options = dict(num_classes=4, num_samples=images * batches)
        loader = build_loader(backend, "imagenet", photos, "train", images, seed=0, **options)
        check_batches(check, loader)
        measure_overlap(check, contender, loader, in_memory)
        loader.close()


def check_batches(check: Check, loader: Loader) -> None:
    """Whether what arrives on the device is what the loader made."""
    arrived = [(images.cpu(), labels.cpu()) for images, labels in prefetch(loader.epoch(1), check.device)]
    made = [(images.clone(), labels.clone()) for images, labels in loader.epoch(1)]
    same = len(arrived) == len(made) > 0
    for (images, labels), (right, right_labels) in zip(arrived, made):
        same = same and torch.equal(images, right) and torch.equal(labels, right_labels)
    check.say(f"{loader.backend}: batches on the device", "as made" if same else "not as made", same)


def repeat(loader: Loader) -> Iterator[Batch]:
    """Epoch after epoch, without end."""
    epoch = 0
    while True:
        yield from loader.epoch(epoch)
        epoch += 1


def measure_overlap(check: Check, contender: Contender, loader: Loader, in_memory: float) -> None:
    """ms of a step that is fed by `loader`, beside the step's and the loader's own; and the share of the
    copies' time in which a kernel runs, too."""
    steps = 4 if check.tiny else 24
    alone = repeat(loader)
    next(alone)
    began = time.perf_counter()
    for _ in range(steps):
        next(alone)
    loading = (time.perf_counter() - began) / steps
    alone.close()
    resident, contender.batches = contender.batches, prefetch(repeat(loader), check.device)
    contender.step()
    wait_for(check.device)
    began = time.perf_counter()
    for _ in range(steps):
        contender.step()
    wait_for(check.device)
    fed = (time.perf_counter() - began) / steps
    hidden = (in_memory + loading - fed) / min(in_memory, loading)
    check.say(
        f"{loader.backend}: loading alone, a step fed by it",
        f"{1e3 * loading:.1f}, {1e3 * fed:.1f} ms; {100 * hidden:.0f} % of the shorter one hidden",
    )
    if check.device.type == "cuda":
        copies, beside = trace_copies(contender)
        share = f"{100 * beside / copies:.0f} %" if copies else "no copy was seen"
        check.say(
            f"{loader.backend}: copies to the GPU beside kernels", f"{share} of {copies / 1e3:.2f} ms a step"
        )
    contender.batches.close()
    contender.batches = resident


def trace_copies(contender: Contender, steps: int = 4) -> tuple[float, float]:
    """(µs of copies from the host in a step, µs of them in which a kernel runs, too)."""
    with profile(activities=[ProfilerActivity.CUDA]) as prof:
        for _ in range(steps):
            contender.step()
        torch.cuda.synchronize()
    kernels, copies = [], []
    for event in prof.events():
        if event.device_type != DeviceType.CUDA or event.is_user_annotation:
            continue
        span = event.time_range.start, event.time_range.end
        if "HtoD" in event.name:
            copies.append(span)
        elif "Mem" not in event.name:
            kernels.append(span)
    beside = 0.0
    for begin, end in copies:  # kernels of one stream don't overlap each other
        beside += sum(max(0.0, min(end, b) - max(begin, a)) for a, b in kernels)
    return sum(end - begin for begin, end in copies) / steps, beside / steps


# ------------------------------------------------------------------------------------------------------------
# 7: resume


def check_resume(check: Check) -> None:
    """A run stopped in mid-epoch in its warmup, and resumed, beside one that was not stopped: weights and
    moments equal to the bit, with torch's deterministic algorithms. Where a kernel has none, its name, and
    whether the bits were equal anyway."""
    for dtype, compiled in (("float32", False), ("bfloat16", True)):
        how = f"{dtype}, {'compiled' if compiled else 'eager'}"
        folder = check.scratch / dtype
        flags = [*RUN, "--dtype", dtype, "--compile", str(compiled)]
        refused = None
        torch.use_deterministic_algorithms(True)
        try:
            differing = resume_and_compare(flags, folder / "strict")
        except RuntimeError as error:
            if "deterministic" not in str(error):
                raise
            refused = str(error).split(" does not have")[0]
            torch.use_deterministic_algorithms(True, warn_only=True)
            differing = resume_and_compare(flags, folder / "warned")
        torch.use_deterministic_algorithms(False)
        note = f"; {refused} has no deterministic kernel" if refused else ""
        figure = "equal to the bit" if not differing else f"{len(differing)} tensors differ: {differing[:3]}"
        check.say(f"resumed, deterministic, {how}", figure + note, not differing)
        differing = resume_and_compare(flags, folder / "fast")
        figure = "equal to the bit" if not differing else f"{len(differing)} tensors differ"
        check.say(f"resumed, as one trains, {how}", figure)


def resume_and_compare(flags: list[str], folder: Path) -> list[str]:
    """The names of the tensors in which the last checkpoints of two runs differ: one in a piece, one stopped
    after 50 of its 80 steps, in the warmup."""
    whole, cut = str(folder / "whole"), str(folder / "cut")
    start(flags + ["--run_dir", whole])
    start(flags + ["--run_dir", cut, "--max_steps", "50"])
    start(["--run_dir", cut, "--resume", "True", "--max_steps", "80"])
    one, two = (read_checkpoint(Path(run_dir)) for run_dir in (whole, cut))
    if one.keys() != two.keys():
        return sorted(one.keys() ^ two.keys())
    return [name for name in one if not torch.equal(one[name], two[name])]


def start(flags: list[str]) -> None:
    """A run in this process. Raises what it raises, and RuntimeError for another status than 0."""
    torch._dynamo.reset()  # or a run would find the graphs of the one before
    status = train.main(flags)
    if status:
        raise RuntimeError(f"train.py ended with status {status}")


def read_checkpoint(run_dir: Path) -> dict[str, Tensor]:
    """All tensors of a run's last checkpoint."""
    path = checkpoint.latest(run_dir)
    stored = dcp.FileSystemReader(path).read_metadata().state_dict_metadata
    tensors = {name: torch.empty(info.size, dtype=info.properties.dtype) for name, info in stored.items()}
    dcp.load(tensors, checkpoint_id=path)
    return tensors


# ------------------------------------------------------------------------------------------------------------
# 8: FSDP2


def check_fsdp(check: Check) -> None:
    """Part 2's steps with the model sharded over a mesh of one process, beside the same without a mesh; and
    both switches on that mesh."""
    folder, _ = get_reference(check)
    backend = "cpu:gloo,cuda:nccl" if check.device.type == "cuda" else "gloo"
    dist.init_process_group(backend, rank=0, world_size=1, store=dist.HashStore())
    mesh = init_device_mesh(check.device.type, (1,), mesh_dim_names=("dp_shard",))
    for dtype, compiled in (("float32", False), ("bfloat16", True)):
        for phase in PHASES:
            plain = get_losses(folder / phase, check.device, dtype, compiled)
            sharded = get_losses(folder / phase, check.device, dtype, compiled, mesh)
            loss, norm = get_deviation(sharded, plain)
            bounds = BOUNDS["bfloat16"] if dtype == "bfloat16" else (1e-5, 1e-4)
            how = "compiled" if compiled else "eager"
            figure = f"loss {loss:.1e}, gradient norm {norm:.1e}"
            check.say(
                f"{phase}, {dtype}, {how}: sharded beside not",
                figure,
                loss <= bounds[0] and norm <= bounds[1],
            )
    check_switches(check, mesh)
    dist.destroy_process_group()


def check_switches(check: Check, mesh) -> None:
    """Whether evaluation gives the same loss before and after each switch, as B = 0 and a freeze must."""
    cfg = train.Config(model="tiny-debug", dtype="float32", compile=False, batch_size=64)
    ranks = get_ranks("8", cfg.model)
    model = train.build_model(cfg, "full", None, check.device, mesh)
    model.init_weights(0)
    optimizer = build_optimizer(model, cfg.weight_decay)
    batches = repeat_noise(cfg.dataset, cfg.batch_size, check.device)
    failed = torch.zeros((), dtype=torch.bool, device=check.device)
    for phase in ("warmup", "lora"):
        for step in range(5):
            train.train_step(cfg, model.train(), optimizer, batches, step, 1e-3, failed)
        before = train.evaluate(cfg, model, (next(batches) for _ in range(1)), check.device)["val_loss"]
        model, optimizer = train.switch_phase(cfg, model, optimizer, phase, ranks, mesh)
        after = train.evaluate(cfg, model, (next(batches) for _ in range(1)), check.device)["val_loss"]
        holds = abs(after - before) <= 1e-3 * before
        check.say(f"sharded, switch to {phase}: loss before, after", f"{before:.5f}, {after:.5f}", holds)

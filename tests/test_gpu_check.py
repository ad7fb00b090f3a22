"""bench.py gpu: parts that fail in every way, its sums by hand, its checks against planted faults, and all
of it as a dry run."""

import contextlib
import json
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from small_runs import REPO

import train
from benchmarks import gpu_check, gpu_loader, gpu_operators, gpu_reference, gpu_runs, gpu_step
from benchmarks.gpu_findings import Check, get_error, time_calls
from benchmarks.gpu_process import Part, run_in_process
from benchmarks.gpu_step import add_up, classify, get_busy
from lora.layers import LoRALinear

CPU = torch.device("cpu")


@pytest.fixture
def check(tmp_path):
    """A part's Check, tiny and on the CPU, which keeps its rows: check.rows()."""

    class Rows:
        def __init__(self):
            self.sent = []

        def send(self, message):
            self.sent.append(message)

    pipe = Rows()
    check = Check(CPU, True, tmp_path, tmp_path, {}, pipe)
    check.rows = lambda: [message for kind, message in pipe.sent if kind == "row"]
    return check


# ------------------------------------------------------------------------------------------------------------
# a part in its own process


def says(check):
    os.write(1, b"printed\n")  # past whatever stands in for sys.stdout
    check.say("a figure", "1")
    check.say("a figure that holds", "2", True)
    check.record("bandwidth", 3.0)


def does_not_hold(check):
    check.say("a figure", "1", False)


def raises(check):
    check.say("before", "1")
    raise ValueError("a bug\nof two lines")


def is_killed(check):
    check.say("before", "1")
    os.kill(os.getpid(), signal.SIGKILL)


def hangs(check):
    check.say("before", "1")
    time.sleep(600)


def leaves_something(check):
    """A process that lives on, and holds the pipe open, as a compiler's pool does."""
    holder = subprocess.Popen(["sleep", "600"], close_fds=False, pass_fds=[check.pipe.fileno()])
    check.record("pid", holder.pid)


def leaves_a_fork(check):
    """It holds what the part's process holds, the pipe and whatever else would tell of its end."""
    pid = os.fork()
    if pid == 0:
        time.sleep(600)
    check.record("pid", pid)


def forks_and_raises(check):
    leaves_a_fork(check)
    raise ValueError("a bug")


def talks_for_ever(check):
    check.record("pid", os.getpid())
    while True:
        check.say("a figure", "1")


def hangs_in_a_child(check):
    check.record("pid", subprocess.Popen(["sleep", "600"]).pid)
    time.sleep(600)


def is_alive(pid: int) -> bool:
    """Whether a process runs; a zombie does not."""
    path = Path(f"/proc/{pid}/stat")
    return path.exists() and path.read_text().rsplit(")", 1)[1].split()[0] != "Z"


@pytest.mark.parametrize(
    "run, status, rows, last",
    [
        (says, "passed", 2, None),
        (does_not_hold, "failed", 1, None),
        (raises, "error", 1, "of two lines"),
        (is_killed, "error", 1, "its process ended with status -9"),
        (hangs, "out of time", 1, None),
    ],
)
def test_a_part_that_ends_badly_costs_only_itself(tmp_path, run, status, rows, last):
    part = Part(0, "a part", 2, run)
    outcome = run_in_process(part, Check(CPU, True, tmp_path, tmp_path, {}), 2.0, tmp_path / "log.txt")
    assert outcome.status == status and len(outcome.rows) == rows
    assert (outcome.error or "").strip().endswith(last or "")
    if run is says:
        assert outcome.figures == {"bandwidth": 3.0} and "printed" in (tmp_path / "log.txt").read_text()


@pytest.mark.parametrize(
    "run, status",
    [
        (leaves_something, "passed"),
        (leaves_a_fork, "passed"),
        (forks_and_raises, "error"),
        (talks_for_ever, "out of time"),
        (hangs_in_a_child, "out of time"),
    ],
)
def test_nothing_of_a_part_lives_on(tmp_path, run, status):
    part, check = Part(0, "a part", 3, run), Check(CPU, True, tmp_path, tmp_path, {})
    began = time.monotonic()
    outcome = run_in_process(part, check, 3.0, tmp_path / "log.txt")
    assert outcome.status == status and time.monotonic() - began < 60
    assert is_gone(outcome.figures["pid"])


ENDLESS = """
import sys, time
from benchmarks import gpu_check
from benchmarks.gpu_process import Part

def hangs(check):
    check.say("pid", str(__import__("os").getpid()))
    print("begun", flush=True)
    time.sleep(600)

gpu_check.PARTS = [Part(0, "a part", 300, hangs)]
gpu_check.gpu(out=sys.argv[1], parts=(0,), dry_run=True)
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_told_to_end_it_takes_its_part_with_it(tmp_path, number):
    command = [sys.executable, "-c", ENDLESS, str(tmp_path)]
    process = subprocess.Popen(command, cwd=REPO, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    log = tmp_path / "log.txt"
    while not (log.exists() and "begun" in log.read_text()) and time.monotonic() < deadline:
        time.sleep(0.05)
    pid = int(re.search(r"pid: (\d+)", log.read_text())[1])
    assert is_alive(pid)
    process.send_signal(number)
    out, _ = process.communicate(timeout=60)
    assert process.returncode not in (0, 2) and is_gone(pid)
    if number == signal.SIGTERM:
        assert process.returncode == 143 and "a dry run on the CPU" in out  # the table


def is_gone(pid: int) -> bool:
    """Whether a process ends within some seconds."""
    deadline = time.monotonic() + 20
    while is_alive(pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    return not is_alive(pid)


def gets_figures(check):
    check.say("bandwidth", str(check.figures["bandwidth"]), check.figures == {"bandwidth": 3.0})


def test_the_report_is_there_after_every_part(tmp_path, monkeypatch, capsys):
    parts = [Part(0, "first", 20, says), Part(1, "second", 20, gets_figures), Part(2, "third", 20, raises)]
    monkeypatch.setattr(gpu_check, "PARTS", parts)
    written = []
    write_json = gpu_check.write_json
    monkeypatch.setattr(
        gpu_check, "write_json", lambda *args: (write_json(*args), written.append(list(args[1]["parts"])))
    )
    report = gpu_check.gpu(out=str(tmp_path / "out"), parts=(0, 1, 2), dry_run=True)
    assert written == [["0"], ["0", "1"], ["0", "1", "2"]]
    assert json.loads((tmp_path / "out" / "report.json").read_text()) == report
    assert [part["status"] for part in report["parts"].values()] == ["passed", "passed", "error"]
    assert not gpu_check.passed(report) and gpu_check.passed({"parts": {"0": report["parts"]["0"]}})
    out = capsys.readouterr().out
    assert "of two lines" in out and out.index("first") < out.index("a figure that holds")
    # a part for which no time is left is said to be missing, and is no pass
    monkeypatch.setattr(gpu_check, "TOTAL_SECONDS", 0)
    report["dry_run"], report["parts"] = False, {}
    gpu_check.run_parts(report, parts[:1], None, tmp_path / "out", time.perf_counter())
    assert report["parts"]["0"]["status"] == "not begun" and not gpu_check.passed(report)


@pytest.mark.parametrize(
    "argv, reason",
    [
        ("gpu --out {}", "needs a CUDA GPU"),
        ("gpu --dry_run --parts 0,12 --out {}", "parts are 0 to 9, not 12"),
        ("gpu --dry_run --parts --out {}", "needs a number or more"),
        ("gpu --dry_run --reference {} --out {}", "has no losses.json"),
        ("gpu --dry_run --out /dev/null/gpu", "can't be written"),
    ],
)
def test_mistakes_are_one_sentence(tmp_path, argv, reason):
    command = [sys.executable, "bench.py", *argv.replace("{}", str(tmp_path)).split()]
    hidden = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, cwd=REPO, env=hidden, capture_output=True, text=True)
    assert done.returncode == 2 and reason in done.stderr and done.stderr.count("\n") == 1, done.stderr


# ------------------------------------------------------------------------------------------------------------
# sums by hand


def test_busy_time_by_hand():
    spans = [("a", 10.0, 20.0), ("b", 12.0, 15.0), ("c", 18.0, 25.0), ("d", 40.0, 50.0)]
    assert get_busy(spans) == (25.0, 40.0)
    assert get_busy([]) == (0.0, 0.0)


def test_kernels_are_added_up():
    spans = [
        ("triton_poi_fused_cat", 0.0, 1000.0),
        ("nvjet_x", 1000.0, 3000.0),
        ("triton_poi_fused_cat", 3000.0, 6000.0),
    ]
    by_class, kernels = add_up(spans, steps=2)
    assert by_class == {"elementwise": 2.0, "products": 1.0}
    assert kernels == [(2.0, 1.0, "triton_poi_fused_cat"), (1.0, 0.5, "nvjet_x")]


@pytest.mark.parametrize(
    "name, kind",  # as an H200's profile had them
    [
        ("nvjet_sm90_tst_256x128_64x4_2x1_v_bz_coopA_NNT", "products"),
        ("void cublasLt::splitKreduce_kernel<32, 16, int, float>", "products"),
        ("void cutlass__5x_cudnn::Kernel<cutlass_tensorop_bf16_s16816fprop>", "products"),
        ("cudnn_generated_fort_native_sdpa_sm90_flash_bprop_wgmma_f16_knob_26", "attention"),
        ("void cudnn::fusion::convert_dq_to_16bits<true>(void const*)", "attention"),
        ("triton_per_fused__to_copy_add_native_layer_norm_view_5", "elementwise"),
        ("effective_weight_kernel_0", "adapters"),
        ("adapter_gradients_kernel", "adapters"),
        ("triton_poi_fused_cat_permute_view_8", "elementwise"),
        ("void at::native::(anonymous namespace)::multi_tensor_apply_kernel<FusedOptimizer>", "optimizer"),
        ("void at::native::reduce_kernel<128, 4, at::native::ReduceOp<float>>", "eager passes"),
        ("Memcpy HtoD (Pinned -> Device)", "copies"),
        ("something_else", "other"),
    ],
)  # fmt: skip
def test_classes_of_kernels(name, kind):
    assert classify(name) == kind


def test_deviation_and_error_by_hand():
    right = [(1.0, 2.0), (4.0, 5.0)]
    assert gpu_runs.get_deviation([(1.1, 2.0), (4.0, 4.0)], right) == pytest.approx((0.1, 0.2))
    nan = float("nan")
    assert gpu_runs.get_deviation([(1.0, 2.0), (nan, nan)], right) == (float("inf"), float("inf"))
    with pytest.raises(ValueError):  # of another length
        gpu_runs.get_deviation(right[:1], right)
    assert get_error(torch.tensor([3.0, 5.0]), torch.tensor([3.0, 4.0])) == pytest.approx(0.2)
    assert get_error(torch.tensor([float("nan")]), torch.tensor([1.0])) == float("inf")


def test_hidden_copies_by_hand():
    """A copy of 10 µs with a kernel beside it for 4 and 3, one of 5 without."""
    spans = [("a", 0.0, 14.0), ("Memcpy HtoD (Pinned -> Device)", 10.0, 20.0), ("b", 17.0, 30.0)]
    spans += [("Memcpy HtoD (Pinned -> Device)", 40.0, 45.0), ("Memset (Device)", 40.0, 45.0)]
    assert gpu_loader.get_hidden(spans) == (15.0, 7.0)
    assert gpu_loader.get_hidden([]) == (0, 0.0)


def test_calls_are_timed_in_a_row():
    calls = []
    seconds = time_calls(CPU, lambda: calls.append(time.sleep(0.01)), in_a_row=3, rounds=2)
    assert len(calls) == 6 and seconds >= 0.01


def test_peaks_are_simulated_in_a_process_of_their_own(check):
    """The three phases' bytes, by arithmetic no less than masters and moments."""
    cfg = gpu_step.get_config(check)
    simulated = gpu_step.start_simulation(cfg)
    assert simulated.poll(120)
    peaks = simulated.recv()
    assert list(peaks) == ["full", "warmup", "lora"]
    trained = sum(p.numel() for p in train.build_on_meta(cfg).parameters())
    assert 12 * trained < peaks["full"] < peaks["warmup"] and peaks["lora"] < peaks["warmup"]


def test_a_simulation_that_failed_is_said(check):
    receiver, sender = multiprocessing.Pipe(duplex=False)
    sender.close()
    gpu_step.compare_peaks(check, receiver)
    assert check.rows() == [{"what": "peaks by bench.py memory", "text": "did not come", "holds": False}]


# ------------------------------------------------------------------------------------------------------------
# the checks, and faults planted for them


def test_operators_hold_on_a_cpu(check):
    gpu_operators.check_operators(check)
    rows = check.rows()
    assert all(row["holds"] is not False for row in rows)
    assert sum(row["holds"] is True for row in rows) >= 6 + 4 + 2 + 3


def test_control_an_adapter_that_is_off_by_a_tenth_is_found(check, monkeypatch):
    forward = LoRALinear.forward

    def scaled(self, x):
        y = forward(self, x)
        return y + 0.1 * (y - torch.nn.functional.linear(x, self.weight, self.bias))

    monkeypatch.setattr(LoRALinear, "forward", scaled)
    gpu_operators.check_lora_linear(check)
    assert [row["holds"] for row in check.rows()] == [False] * 6


@pytest.mark.parametrize("name, rows", [("make_weight", [0, 1]), ("make_gradients", [2, 3])])
def test_control_a_kernel_that_is_off_by_a_tenth_is_found(check, monkeypatch, name, rows):
    make = getattr(gpu_operators, name)
    monkeypatch.setattr(gpu_operators, name, lambda *args: 1.1 * make(*args))
    gpu_operators.check_kernels(check)
    assert [i for i, row in enumerate(check.rows()) if not row["holds"]] == rows


def test_the_plain_definitions_are_the_kernels_own_docstrings():
    """Borders and all, by hand; and x's gradients by autograd."""
    weight, B, A = torch.randn(5, 4), torch.randn(5, 3), torch.randn(3, 4)
    bordered = gpu_operators.define_weight(weight, B, A, bordered=True)
    assert bordered.shape == (5 + 16, 4 + 16)
    x, dy = torch.randn(6, 4), torch.randn(6, 5)
    both = x @ bordered[:, :4].t()
    assert torch.allclose(both[:, :5], x @ (weight + B @ A).t(), atol=1e-5)
    assert torch.allclose(both[:, 5:8], x @ A.t(), atol=1e-5) and not both[:, 8:].any()
    both = dy @ bordered[:5]
    assert torch.allclose(both[:, 4:7], dy @ B, atol=1e-5) and not both[:, 7:].any()
    A.requires_grad_(), B.requires_grad_()
    dA, dB = torch.autograd.grad(x @ (weight + B @ A).t(), (A, B), dy)
    found = gpu_operators.make_gradients(x, dy, x @ A.t(), dy @ B).sum(0)
    assert torch.allclose(found, torch.cat([dA, dB.t()], 1), atol=1e-5)


def test_control_an_update_that_is_not_skipped_is_found(check, monkeypatch):
    apply_update = gpu_operators.apply_update
    monkeypatch.setattr(
        gpu_operators, "apply_update", lambda optimizer, lr, skip: apply_update(optimizer, lr, skip & False)
    )
    gpu_operators.check_skipped_update(check)
    assert check.rows()[0]["holds"] is False


@pytest.mark.parametrize(
    "message, backend, is_raised",
    [
        ("No available kernel. Aborting execution.", "FLASH_ATTENTION", False),
        ("No available kernel. Aborting execution.", "MATH", True),
        ("CUDA error: misaligned address", "FLASH_ATTENTION", True),
    ],
)
def test_only_a_missing_kernel_is_passed_over(check, monkeypatch, message, backend, is_raised):
    get_attention, now = gpu_operators.get_attention, []

    def failing(attention, x, dy):
        if x.dtype == torch.float32 and now[-1] == getattr(gpu_operators.SDPBackend, backend):
            raise RuntimeError(message)
        return get_attention(attention, x, dy)

    sdpa_kernel = gpu_operators.sdpa_kernel
    monkeypatch.setattr(gpu_operators, "sdpa_kernel", lambda asked: now.append(asked) or sdpa_kernel(asked))
    monkeypatch.setattr(gpu_operators, "get_attention", failing)
    with pytest.raises(RuntimeError, match=message) if is_raised else contextlib.nullcontext():
        gpu_operators.check_attention(check)


PYTEST = """
import sys
print({lines!r})
sys.exit({status})
"""


@pytest.mark.parametrize(
    "lines, status, device, holds",
    [
        ("== 3 passed, 1 skipped in 9.00s ==", 0, "cuda", True),
        ("== 4 skipped in 9.00s ==", 0, "cuda", False),
        ("== 4 skipped in 9.00s ==", 0, "cpu", True),
        ("FAILED tests/a.py::b - no\n== 1 failed, 3 passed in 9.00s ==", 1, "cuda", False),
        ("", 3, "cuda", False),
    ],
)
def test_pytest_s_word_is_taken(check, monkeypatch, tmp_path, lines, status, device, holds):
    (tmp_path / "pytest.py").write_text(PYTEST.format(lines=lines, status=status))
    monkeypatch.setattr(gpu_runs, "REPO", tmp_path)
    check.device = torch.device(device)
    gpu_runs.run_tests(check)
    assert check.rows()[-1]["holds"] == holds
    assert [row["holds"] for row in check.rows()[:-1]] == [False] * lines.count("FAILED")


@pytest.fixture(scope="module")
def gpu_reference_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gpu_reference")
    gpu_reference.make_reference(folder)
    return folder


def test_the_reference_is_small_and_repeats(gpu_reference_folder):
    size = sum(path.stat().st_size for path in gpu_reference_folder.rglob("*") if path.is_file())
    assert size < 14e6
    losses = json.loads((gpu_reference_folder / "losses.json").read_text())["losses"]
    for phase, right in losses.items():
        assert len(right) == gpu_reference.STEPS
        again = gpu_reference.get_losses(gpu_reference_folder / phase, CPU, "float32", compiled=False)
        assert [list(step) for step in again] == right
    ranks = json.loads((gpu_reference_folder / "lora" / "meta.json").read_text())["state"]["ranks"]
    assert len({rank for layers in ranks.values() for rank in layers}) > 2


def test_control_a_scaled_gradient_is_found(check, gpu_reference_folder, monkeypatch):
    """Part 2 without compiling, of one phase, as it is and with gradients too large by a tenth."""
    monkeypatch.setattr(gpu_runs, "PHASES", ("lora",))
    check.reference = gpu_reference_folder
    get_losses = gpu_runs.get_losses
    monkeypatch.setattr(
        gpu_runs,
        "get_losses",
        lambda path, device, dtype, compiled, **kw: get_losses(path, device, dtype, False, **kw),
    )
    gpu_runs.check_losses(check)
    assert all(row["holds"] is not False for row in check.rows())
    assert check.rows()[-1]["what"].startswith("control") and check.rows()[-1]["holds"]
    clip = gpu_reference.parallel.clip_gradients

    def scaled(optimizer, max_norm):
        for p in optimizer.param_groups[0]["params"]:
            if p.grad is not None:
                p.grad *= 1.1
        return clip(optimizer, max_norm)

    monkeypatch.setattr(gpu_reference.parallel, "clip_gradients", scaled)
    check.pipe.sent.clear()
    gpu_runs.check_losses(check)
    assert [row["holds"] for row in check.rows() if row["holds"] is not None][:-1] == [False] * 4


def test_control_batches_that_are_not_the_loader_s_are_found(check, monkeypatch):
    loader = gpu_loader.build_loader("synthetic", "fashion_mnist", ".", "train", 8, seed=0, num_samples=64)
    gpu_loader.check_batches(check, loader)
    prefetch = gpu_loader.prefetch
    monkeypatch.setattr(
        gpu_loader, "prefetch", lambda *args: ((images, labels + 1) for images, labels in prefetch(*args))
    )
    gpu_loader.check_batches(check, loader)
    assert [row["holds"] for row in check.rows()] == [True, False]


def test_control_a_tensor_that_differs_is_named(tmp_path, monkeypatch):
    one = {"a": torch.ones(2), "b": torch.zeros(2)}
    runs = {
        "one": one,
        "same": dict(one),
        "other": one | {"b": torch.tensor([0.0, 1e-30])},
        "more": one | {"c": one["a"]},
    }
    monkeypatch.setattr(gpu_runs, "read_checkpoint", lambda run_dir: runs[run_dir.name])
    compare = lambda other: gpu_runs.compare(tmp_path / "one", tmp_path / other)
    assert compare("same") == [] and compare("other") == ["b"] and compare("more") == ["c"]


REFUSAL = "a first line\nnll_loss2d does not have a deterministic implementation, but you set 'torch.use_"


@pytest.mark.parametrize(
    "refusal, differing, holds, said",
    [
        (None, [], True, "equal to the bit"),
        (None, ["a"], False, "1 tensors differ: ['a']"),
        (REFUSAL, ["a"], False, "1 tensors differ: ['a']; nll_loss2d has no deterministic kernel"),
        (REFUSAL, [], True, "equal to the bit; nll_loss2d has no deterministic kernel"),
        ("out of memory", [], "raised", ""),
    ],
)
def test_a_kernel_that_refuses_is_named(check, monkeypatch, refusal, differing, holds, said):
    def resume(flags, folder):
        strict = torch.are_deterministic_algorithms_enabled()
        if refusal and strict and not torch.is_deterministic_algorithms_warn_only_enabled():
            raise RuntimeError(refusal)
        return differing if strict else []

    monkeypatch.setattr(gpu_runs, "resume_and_compare", resume)
    with pytest.raises(RuntimeError, match=refusal) if holds == "raised" else contextlib.nullcontext():
        gpu_runs.check_resume(check)
        assert [(row["holds"], row["text"]) for row in check.rows()[:2]] == [(holds, said)] * 2
    assert not torch.are_deterministic_algorithms_enabled()


@pytest.mark.slow
def test_dry_run(tmp_path):
    """All ten parts as a user starts them, at tiny sizes."""
    command = [sys.executable, "bench.py", "gpu", "--dry_run", "--out", str(tmp_path)]
    hidden = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, cwd=REPO, env=hidden, capture_output=True, text=True)
    report = json.loads((tmp_path / "report.json").read_text())
    statuses = {number: part["status"] for number, part in report["parts"].items()}
    assert statuses == {str(number): "passed" for number in range(10)}, done.stdout
    assert done.returncode == 0 and done.stdout.rstrip().endswith('{"passed": 10}')
    rows = report["parts"]["8"]["rows"] + report["parts"]["7"]["rows"]
    assert sum(row["holds"] is True for row in rows) == 6 + 2 + 2

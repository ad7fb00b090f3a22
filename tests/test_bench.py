"""bench.py: its commands run, their figures against arithmetic, and the tools they count with."""

import contextlib
import io
import json

import pytest
import torch
import torch.distributed as dist
from torch.utils.flop_counter import FlopCounterMode

import bench
from benchmarks import estimate, report, step
from benchmarks.sharding import CASES, uniform_ranks
from lora import layers
from model import linear
from model.variants import VARIANTS
from train import Config, build_model

CASES = list(CASES)


def run_main(argv):
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as err:
        status = bench.main(argv.split() if isinstance(argv, str) else argv)
    assert not dist.is_initialized()
    return status, out.getvalue(), err.getvalue()


def test_commands(on_ranks):
    ((status, out, _),) = on_ranks(1, run_main, "wire --model tiny-debug --world_size 4 --dp_shard 4")
    rows = [line.split() for line in out.splitlines() if line.startswith(CASES[-2])]
    assert status == 0 and len(rows) == 2 and all(0 < float(row[-1]) < 1 for row in rows)
    ((status, out, _),) = on_ranks(
        1, run_main, "memory --model tiny-debug --world_size 4 --dp_shard 1 --activation_checkpointing none"
    )
    assert status == 0 and "20 -> 16 GB" in out
    for line in [line for line in out.splitlines() if line.startswith(tuple(CASES))]:
        peak, _, *parts = map(float, line[52:].split())
        assert sum(parts) == pytest.approx(peak, abs=0.01) and peak > 0


@pytest.mark.parametrize(
    "argv, reason",
    [
        ("wire --world_size 1", "at least 2"),
        ("memory --dp_shard 3", "does not divide the 64 ranks"),
        ("memory --images 0", "at least 1"),
        ("memory --grad_accum_steps 0", "grad_accum_steps must be at least 1"),
        ("memory --fit 0", "above 0 GiB"),
        ("step --batch_size 0", "at least 1"),
        ("step --model tiny-debug", "patches of 16"),
        ("step --no_onednn --dtype bfloat16", "float32 on a CPU"),
        ("switch --batch_size 0", "at least 1"),
        ("estimate --gpus 1", "2 or more"),
        ("estimate --gpus 6", "fill nodes of 4"),
        ("estimate --mfu 2", "at most 1"),
        ("estimate --batch_size 100", "not divisible by 64"),
        ("estimate --images 5", "less than a batch"),
    ],
)
def test_mistakes_are_one_sentence(on_ranks, argv, reason):
    ((status, _, err),) = on_ranks(1, run_main, argv)
    assert status == 2 and reason in err and err.count("\n") == 1


@pytest.mark.slow
def test_data_command():
    pytest.importorskip("ffcv")
    status, out, err = run_main(["data", "--count", "64", "--rounds", "1", "--num_workers", "1"])
    rows = [line.split() for line in out.splitlines() if line.startswith(("FFCV", "torchvision", "limit"))]
    assert status == 0 and len(rows) == 7 and all(float(row[-2]) > 0 for row in rows), err
    assert run_main(["data", "--images", "nowhere"])[0] == 2


# ---------------------------------------------------------------------------------------------------------------------------------
# a step


def result_of(out):
    """The JSON object in the last line, as scripts read it."""
    assert out.endswith("}\n"), out
    return json.loads(out.splitlines()[-1])


TI = {"embed_dim": 64, "depth": 2, "num_heads": 2, "patch_size": 16}


@pytest.fixture
def tiny_step(monkeypatch):
    monkeypatch.setitem(VARIANTS, "Ti/16", TI)  # tyro knows the names


@pytest.mark.parametrize("extra", ["", " --no_onednn"])
def test_step_command(tiny_step, monkeypatch, extra):
    called, onednn = [], layers.onednn
    for name, ops in {"base": linear, "adapters": layers}.items():
        monkeypatch.setattr(
            ops, "onednn", lambda x, name=name: called.append((name, x.device.type)) or onednn(x)
        )
    status, out, err = run_main(
        f"step --model Ti/16 --ranks 8 --batch_size 2 --rounds 2 --modes eager{extra}"
    )
    assert {name for name, device in called if device == "cpu"} == (
        {"base", "adapters"} if extra == "" else set()
    )  # replaced while the steps run
    result = result_of(out)
    assert status == 0, err
    assert {
        "lora_vs_peft",
        "full_vs_timm",
        "full_vs_hf",
        "lora_vs_full",
        "lora_limit",
        "limit_fraction",
    } <= result.keys()
    assert result["onednn"] == (extra == "")
    ms = result["milliseconds"]
    assert set(ms) == set(step.CONTENDERS) == set(result["memory_bytes"]) and min(ms.values()) > 0
    assert result["lora_vs_peft"] == pytest.approx(ms["HF + PEFT"] / ms["lora"]) and result[
        "full_vs_timm"
    ] == pytest.approx(ms["timm full"] / ms["full"])
    assert result["limit_fraction"] == pytest.approx(ms["full"] / ms["lora"] / result["lora_limit"])
    # weights, gradients (while they are there) and moments of the peers are ours; a weight's gradient needs oneDNN's copies of its factors
    assert result["memory_bytes"]["full"] == pytest.approx(
        result["memory_bytes"]["timm full"], rel=0.05 if "--no_onednn" in extra else 0.15
    )


@pytest.mark.slow
def test_step_command_compiled(tiny_step):
    status, out, err = run_main("step --model Ti/16 --ranks mixed --batch_size 2 --rounds 1 --peers hf,peft")
    assert status == 0, err
    result = result_of(out)
    assert "full_vs_timm" not in result and result["eager"]["lora_vs_peft"] > 0 and result["lora_vs_peft"] > 0


def test_contenders_do_the_same_work(tiny_step):
    """Counted by torch on each: the peers' FLOPs are ours, and so are the trained parameters."""
    cfg = Config(model="Ti/16", dataset="imagenet", dtype="float32", compile=True)
    ranks, images = uniform_ranks("Ti/16") | {"q": [4, 8]}, torch.randn(2, 3, 224, 224)
    ranks = {family: [min(r, 16) for r in values] for family, values in ranks.items()}
    counted, trained = {}, {}
    for title in step.CONTENDERS:
        with torch.compiler.set_stance("force_eager"):
            contender = step.Contender(title, cfg, ranks, torch.device("cpu"))
            with FlopCounterMode(display=False) as counter:
                contender.step(images, torch.tensor([1, 2]))
        counted[title], trained[title] = (
            counter.get_total_flops(),
            sum(p.numel() for p in contender.model.parameters() if p.requires_grad),
        )
    assert (
        counted["full"] == counted["HF full"] == counted["timm full"]
        and counted["lora"] == counted["HF + PEFT"] < counted["warmup"]
    )
    assert (
        trained["full"] == trained["HF full"] == trained["timm full"]
        and trained["lora"] == trained["HF + PEFT"] < trained["warmup"]
    )
    attention = {
        2 * step.count_phase(cfg, phase, ranks, 2, torch.device("cpu"))[0] - counted[phase]
        for phase in ("full", "warmup", "lora")
    }
    assert (
        len(attention) == 1 and attention.pop() > 0
    )  # which torch's counter does not see in the CPU's kernel


def test_count_spared_is_what_the_operator_leaves_out(tiny_step):
    """By hand, products of rows: merged and frozen (A x) B and (dy B) A go, merged and trained all of the adapters'; W + B A comes
    once, and then the adapters' two from dW."""
    cfg, rows = Config(model="Ti/16", dataset="imagenet", compile=False), 1000
    ranks = uniform_ranks("Ti/16")
    ranks = {family: [4, 8] for family in ranks}
    for phase in ("warmup", "lora"):
        model, spared = build_model(cfg, phase, ranks, "meta"), 0
        modules = [m for m in model.modules() if isinstance(m, layers.LoRALinear)]
        for i, m in enumerate(modules):
            A, B = m.lora_A.numel(), sum(b.numel() for b in m.lora_B.values())
            BA = sum(b.numel() for b in m.lora_B.values()) * m.in_features  # products of B and A
            first = phase == "lora" and i == 0
            if phase == "lora":
                spared += 2 * rows * (B + (0 if first else A)) - 2 * BA
            else:
                spared += 2 * rows * (3 * A + 3 * B) - 2 * BA * 3
        assert step.count_spared(model, rows) == spared > 0
        assert step.count_spared(model, 10) == 0  # control: too few rows to merge


def test_step_with_its_rows_apart_is_counted_as_it_is(tiny_step):
    cfg = Config(model="Ti/16", dataset="imagenet", dtype="bfloat16", compile=False)
    ranks = {family: [4, 8] for family in uniform_ranks("Ti/16")}
    counts = step.count_phase(cfg, "lora", ranks, 8, torch.device("cpu"))
    assert counts[0] == counts[1]
    assert (
        step.count_phase(Config(**(vars(cfg) | {"dtype": "float32"})), "lora", ranks, 8, torch.device("cpu"))[
            1
        ]
        < counts[0]
    )


@pytest.mark.slow
def test_switch_command(tiny_step):
    status, out, err = run_main(
        "switch --model Ti/16 --ranks mixed --batch_size 2 --ways block"
    )  # the processes have the real Ti/16
    result = result_of(out)
    assert status == 0, err
    for temperature in ("cold", "warm"):
        records = result[f"block, {temperature}"]
        assert [r["phase"] for r in records] == ["full", "warmup", "lora"] and [
            r["training_graphs"] for r in records
        ] == [1, 1, 2]
        assert all(0 < r["compiling"] < r["stall"] for r in records)
    assert 0 < result["monitor"]["of_epoch"] < 0.001


# ---------------------------------------------------------------------------------------------------------------------------------
# the estimate

SLOW_NET = estimate.Device(
    peak_flops=1e12, memory_bandwidth=28e9, gpus_per_node=4, node_link=100.0, network=10.0
)


def test_wire_seconds_by_hand():
    node, replicas, everyone, half = (0, 1, 2, 3), (0, 4), tuple(range(8)), (0, 1, 4, 5)
    assert estimate.wire_seconds({node: 200.0}, SLOW_NET) == 2.0  # over the node's links
    assert estimate.wire_seconds({everyone: 200.0}, SLOW_NET) == 20.0  # one ring has the whole network
    assert estimate.wire_seconds({replicas: 200.0}, SLOW_NET) == 80.0  # four share it
    assert estimate.wire_seconds({half: 200.0}, SLOW_NET) == 40.0
    assert estimate.wire_seconds({node: 200.0, everyone: 200.0}, SLOW_NET) == 22.0
    assert estimate.optimizer_seconds(2_000_000_000, 2, SLOW_NET) == 1.0


def run_estimate(**options):
    with contextlib.redirect_stdout(io.StringIO()) as out:
        rows = estimate.estimate(**options)
    return rows, out.getvalue()


def test_estimate(on_ranks):
    ((rows, out),) = on_ranks(1, call_estimate, 8, 64)
    assert out.startswith("ESTIMATE") and "nothing below was measured" in out and "assumed" in out
    steps, on_meta = (
        1_281_167 // 64,
        build_model(Config(model="Ti/16", dataset="imagenet", compile=False), "full", None, "meta"),
    )
    params = sum(p.numel() for p in on_meta.parameters())
    plain = rows["plain replication", "full"]
    assert plain["optimizer"] == pytest.approx(steps * 28 * params / 1555e9, rel=1e-3)
    assert rows["HSDP, dp_shard 4", "full"]["optimizer"] == pytest.approx(plain["optimizer"] / 4, rel=1e-3)
    # an all-reduce of all gradients in float32 round 8 GPUs, over 50 GB/s a node; gathering with oneself costs nothing
    assert plain["wire"] == pytest.approx(steps * 2 * 4 * params * 7 / 8 / 50e9, rel=1e-2)
    for row in rows.values():
        assert (
            max(row["compute"], row["wire"])
            <= row["overlap"]
            <= row["serial"]
            == pytest.approx(row["compute"] + row["wire"] + row["optimizer"])
        )
    for sharding in ("plain replication", "HSDP, dp_shard 4"):
        full, warmup, off, on = [rows[sharding, case] for case in CASES]
        assert (
            off["compute"] == on["compute"] < full["compute"] < warmup["compute"]
            and off["wire"] <= on["wire"]
            and off["wire"] < full["wire"]
        )
    assert (
        rows["HSDP, dp_shard 4", CASES[2]]["wire"] < rows["HSDP, dp_shard 4", CASES[3]]["wire"]
    )  # control: the base does travel
    ((more, _),) = on_ranks(1, call_estimate, 16, 64)
    assert all(more[key]["compute"] == pytest.approx(rows[key]["compute"] / 2) for key in rows)


def call_estimate(gpus, batch_size):
    return run_estimate(gpus=gpus, model="Ti/16", batch_size=batch_size, ranks="8", mfu=0.5)


# ---------------------------------------------------------------------------------------------------------------------------------
# the report


def test_report_runs_what_is_asked_and_keeps_the_rest(tmp_path, monkeypatch):
    monkeypatch.setattr(report, "SECTIONS", {"estimate --help": "One.", "wire --help": "Two."})
    out = tmp_path / "docs" / "bench.md"
    report.write_report(str(out))
    both = out.read_text()
    assert both.count("## python bench.py") == 2 and "usage: bench.py estimate" in both
    out.write_text(
        both.replace("usage: bench.py estimate", "as it was").replace("usage: bench.py wire", "as it was")
    )
    report.write_report(str(out), only=("wire",))
    assert (
        "as it was" in out.read_text().split("Two.")[0]
        and "usage: bench.py wire" in out.read_text().split("Two.")[1]
    )
    monkeypatch.setattr(report, "SECTIONS", {"estimate --gpus 3": "One."})
    with pytest.raises(RuntimeError, match="bench.py estimate --gpus 3 failed"):
        report.write_report(str(out))

"""lm.py, and its study: a model that is not a ViT goes through the same phases, logs and replay, and nothing
of the held-out text is trained on."""

import csv
import dataclasses
import json
import math
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest
import torch
from small_runs import events, get_error, get_steps, without_times
from torch.utils.tensorboard import SummaryWriter

import lm
import lm_study
from errors import UserError
from lora.inject import get_adapter_names
from model.optim import build_optimizer, get_optimizer_state
from monitor import logger
from monitor.log import Run, get_ranks
from monitor.plot import plot_runs

REPO = Path(__file__).parent.parent
READ_TEXT, MEASURE_COSTS = lm.read_text, lm_study.measure_costs  # which fixtures replace
TEXT = (REPO / "lm.py").read_bytes()  # of runs here, instead of Python's own source
# 3 steps an epoch. The first window overlaps the learning rate's warmup, so that the loose test passes after
# epoch 3: full 1-3, warmup 4, lora 5-8.
MODEL = "--width 32 --layers 2 --heads 2 --context 16 --batch_size 4 --steps_per_epoch 3 --lr_warmup_steps 3"
MODEL = f"{MODEL} --rank_min 4 --rank_max 16 --eval_sequences 8 --final_sequences 16".split()
TINY = [*MODEL, *"--epochs 8 --window_epochs 1 --num_windows 2 --tau 90 --zeta 90".split()]
SWITCH, FREEZE, EPOCHS = 3, 4, 8


def get_config(*flags) -> lm.Config:
    return lm.parse_flags([*TINY, *map(str, flags)], lm.Config())


@pytest.fixture(scope="module", autouse=True)
def small_text():
    with mock.patch.object(lm, "read_text", lambda: TEXT):
        yield


@pytest.fixture(autouse=True)
def no_figures(monkeypatch):
    monkeypatch.setattr(SummaryWriter, "add_figure", lambda *args: None)
    monkeypatch.setattr(logger, "change_heatmap", lambda *args: None)
    monkeypatch.setattr(logger, "rank_heatmap", lambda *args: None)


def run(run_dir, *flags) -> list[dict]:
    """A run that ends well, in this process. Returns its events."""
    assert lm.main([*TINY, "--run_dir", str(run_dir), *map(str, flags)]) == 0
    return events(run_dir)


def watch(run_dir, *flags) -> list[tuple[set[str], dict[str, torch.Tensor]]]:
    """(names of what is trained, all weights) of such a run, before each step and after the last."""
    seen, step = [], lm.train_step

    def train_step(cfg, model, *rest):
        if not seen:
            seen.append(look_at(model))
        result = step(cfg, model, *rest)
        seen.append(look_at(model))
        return result

    with mock.patch.object(lm, "train_step", train_step):
        run(run_dir, *flags)
    return seen


def look_at(model) -> tuple[set[str], dict[str, torch.Tensor]]:
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    return trained, {name: p.detach().clone() for name, p in model.named_parameters()}


@pytest.fixture(scope="module")
def watched(tmp_path_factory):
    """(run directory, what `watch` saw) of a run through three phases."""
    run_dir = tmp_path_factory.mktemp("lm") / "prelora"
    return run_dir, watch(run_dir)


@pytest.fixture(scope="module")
def baseline(tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("lm") / "full"
    run(run_dir, "--mode", "full")
    return run_dir


# ---- the text


def write_library(root, names) -> None:
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"# {name}\n")


def test_the_text_is_a_function_of_paths_and_contents(tmp_path):
    names = ["abc.py", "email/parser.py", "email/header.py", "json/decoder.py", "xml/dom.py"]
    never = ["test/test_abc.py", "email/tests/mime.py", "site-packages/numpy.py", "encodings/cp437.py"]
    never += ["_sysconfigdata__linux_.py", "sitecustomize.py", "config-3.11-linux/python-config.py"]
    write_library(tmp_path / "here", names + never + ["notes.txt"])
    write_library(tmp_path / "site-packages/there", names[::-1])  # where a library stands does not matter
    text = READ_TEXT(tmp_path / "here")
    assert sorted(text.decode().splitlines()) == sorted(f"# {name}" for name in names)
    assert text.decode().splitlines() != sorted(text.decode().splitlines())
    assert READ_TEXT(tmp_path / "site-packages/there") == text
    with pytest.raises(UserError, match="holds no Python source"):
        READ_TEXT(tmp_path / "nowhere")


def test_python_s_own_source_is_a_text():
    text = READ_TEXT()
    assert text == READ_TEXT() and len(text) > 3_000_000 and b"import sys" in text


def test_the_last_twentieth_is_never_trained_on():
    text = b"a" * 950 + b"b" * 50
    train_text, held_out = lm.split_text(text)
    assert bytes(train_text) + bytes(held_out) == text
    assert set(bytes(train_text)) == set(b"a") and set(bytes(held_out)) == set(b"b")
    cfg = get_config("--batch_size", 64)
    crops = [lm.get_crops(torch.arange(200), cfg, step) for step in range(20)]
    assert min(tokens.min() for tokens, _ in crops) == 0
    assert max(targets.max() for _, targets in crops) == 199


def test_crops_are_a_function_of_seed_and_step():
    text, cfg = torch.arange(10_000), get_config("--seed", 1)
    tokens, targets = lm.get_crops(text, cfg, 5)
    assert tokens.shape == (cfg.batch_size, cfg.context) and torch.equal(tokens + 1, targets)
    assert torch.equal(tokens, lm.get_crops(text, get_config("--seed", 1), 5)[0])
    assert not torch.equal(tokens, lm.get_crops(text, cfg, 6)[0])
    assert not torch.equal(tokens, lm.get_crops(text, get_config("--seed", 2), 5)[0])


# ---- the model and its phases


def get_text() -> torch.Tensor:
    return lm.split_text(TEXT)[0]


def test_a_prediction_knows_nothing_of_later_bytes():
    cfg = get_config()
    model, tokens = lm.build_model(cfg, "full", None), torch.arange(32).view(2, 16)
    changed = tokens.clone()
    changed[:, 6] = 200
    before, after = model(tokens), model(changed)
    assert torch.equal(before[:, :6], after[:, :6])
    assert (before[:, 6:] != after[:, 6:]).any(dim=-1).all()  # it knows all earlier ones, its own first


def test_switches_leave_the_function_and_the_moments_that_stay():
    cfg = get_config("--weight_decay", 0.1)
    model = lm.build_model(cfg, "full", None)
    optimizer = build_optimizer(model, cfg.weight_decay)
    failed, ranks = torch.zeros((), dtype=torch.bool), lm.get_static_ranks(cfg)

    def train_steps(count):
        for step in range(count):
            lm.train_step(cfg, model, optimizer, iter([lm.get_crops(get_text(), cfg, step)]), 1e-2, failed)

    for phase in ("warmup", "lora"):
        train_steps(3)
        tokens, _ = lm.get_crops(get_text(), cfg, 9)
        logits, moments = model(tokens), get_optimizer_state(model, optimizer)
        trained = {name for name, p in model.named_parameters() if p.requires_grad}
        assert moments.keys() == trained
        optimizer = lm.switch_phase(cfg, model, optimizer, phase, ranks)
        assert torch.equal(model(tokens), logits)
        kept = get_optimizer_state(model, optimizer)
        adapters = get_adapter_names(model)
        assert kept.keys() == (trained if phase == "warmup" else adapters)
        assert all(kept[name]["exp_avg"] is moments[name]["exp_avg"] for name in kept)
    train_steps(1)
    assert not torch.allclose(model(tokens), logits, rtol=1e-3)  # the control


def test_three_phases_in_a_run_directory(watched, capsys):
    run_dir, _ = watched
    epochs, switches = events(run_dir, "epoch"), events(run_dir, "switch")
    assert [record["phase"] for record in epochs] == ["full"] * 3 + ["warmup"] + ["lora"] * 4
    assert [(s["from"], s["to"], s["epoch"]) for s in switches] == [
        ("full", "warmup", SWITCH),
        ("warmup", "lora", FREEZE),
    ]
    (start,), (final,) = events(run_dir, "start"), events(run_dir, "held_out")
    config = json.loads((run_dir / "config.json").read_text())
    assert config["text_sha256"] == start["text"]["sha256"] == lm.hash_text(TEXT)
    assert final["bits_per_byte"] == final["val_loss"] / math.log(2)
    assert epochs[-1]["val_loss"] < epochs[0]["val_loss"] < math.log(256) + 0.1
    assert all(0 <= r["val_top1"] <= r["val_top5"] <= 100 and 0 <= r["train_top1"] <= 100 for r in epochs)
    lr = [record["lr"] for record in get_steps(run_dir)]
    assert len(lr) == 3 * EPOCHS
    at_freeze = lm.get_lr(3 * FREEZE, 1e-3, 3, 3 * EPOCHS)
    assert lr[3 * FREEZE] == pytest.approx(2 * at_freeze)  # lora_lr_factor


def test_what_is_trained_and_what_stays_as_it_is(watched):
    run_dir, seen = watched
    (_, first), (_, last) = seen[0], seen[-1]
    base, adapters = first.keys(), last.keys() - first.keys()
    assert adapters and all("lora_" in name for name in adapters)
    expected = [base] * SWITCH + [base | adapters] * (FREEZE - SWITCH) + [adapters] * (EPOCHS - FREEZE)
    trainable = [record["trainable_params"] for record in events(run_dir, "epoch")]
    for epoch, names in enumerate(expected):
        for trained, _ in seen[3 * epoch + 1 : 3 * epoch + 4]:
            assert trained == names
        assert trainable[epoch] == sum(last[name].numel() for name in names)
    frozen = seen[3 * FREEZE][1]
    for _, weights in seen[3 * FREEZE + 1 :]:
        assert all(torch.equal(weights[name], frozen[name]) for name in base)  # bit for bit
    assert not any(torch.equal(last[name], frozen[name]) for name in adapters)
    before = seen[3 * SWITCH][1]
    assert not any(torch.equal(frozen[name], before[name]) for name in base if "c_" in name)  # the warmup's


def test_static_lora(tmp_path):
    seen = watch(tmp_path / "static", "--mode", "lora", "--epochs", 2)
    trained, weights = seen[0]
    kept = {name for name in weights if name.split(".")[0] in ("wte", "wpe", "ln_f", "lm_head")}
    kept |= {name for name in weights if ".ln_" in name}
    adapters = {name for name in weights if "lora_" in name}
    assert trained == kept | adapters
    frozen = weights.keys() - trained
    assert frozen and all(torch.equal(weights[name], seen[-1][1][name]) for name in frozen)
    assert not events(tmp_path / "static", "switch")
    ranks = {family: [16, 16] for family in lm.LM_FAMILIES}
    assert get_ranks(tmp_path / "static", []) == ranks
    assert {record["phase"] for record in events(tmp_path / "static", "epoch")} == {"lora"}


# ---- logs, figures, replay


def test_a_seed_gives_the_same_run(watched, tmp_path):
    run_dir, _ = watched
    run(tmp_path / "again")
    assert without_times(events(tmp_path / "again")) == without_times(events(run_dir))
    other = run(tmp_path / "other", "--seed", 1, "--epochs", 2)
    assert other[1]["train_loss"] != events(run_dir, "epoch")[0]["train_loss"]


def test_plots_read_it(watched, baseline, tmp_path):
    plot_runs([str(watched[0]), str(baseline)], family=None, out=str(tmp_path))
    assert (watched[0] / "figures/figure1.png").exists() and (watched[0] / "figures/ranks.png").exists()
    assert (tmp_path / "figure4.png").exists()


@pytest.mark.parametrize("source", ["itself", "the baseline"])
def test_replay_says_what_the_run_did(watched, baseline, source, tmp_path):
    """The baseline's log, up to there the same, and the run's settings."""
    run_dir = watched[0] if source == "itself" else baseline
    assert lm.main(["--replay", str(run_dir), "--csv", str(tmp_path / "table.csv")]) == 0
    with open(tmp_path / "table.csv") as file:
        (row,) = csv.DictReader(file)
    switch = events(watched[0], "switch")[0]
    assert int(row["switch_epoch"]) == switch["epoch"] == SWITCH
    assert json.loads(row["ranks"]) == switch["ranks"] == get_ranks(watched[0], [])
    added = switch["trainable_params"] - events(baseline, "epoch")[0]["trainable_params"]
    assert int(row["adapter_params"]) == added


def test_it_forecasts_and_replay_says_so(baseline, tmp_path, capsys):
    """A LoRA phase that costs next to nothing and leaves nothing undelivered: at the first window's end with
    fits up to two of them."""
    forecast = "--switch_rule forecast --forecast_shortfall 0 --warmup_cost 1 --lora_cost 0.01".split()
    did = run(tmp_path / "run", *forecast, "--epochs", 12)
    switches = [event["epoch"] for event in did if event["event"] == "switch"]
    assert switches == [8, 9]
    capsys.readouterr()
    assert lm.main(["--replay", str(tmp_path / "run")]) == 0
    told = capsys.readouterr().out.splitlines()
    assert [line.split()[7] for line in told if line.strip().startswith("forecast  ")] == ["8"]
    assert lm.main(["--replay", str(baseline), "--rank_rule", "spectrum"]) == 2
    assert "rank_rule spectrum needs what train.py logs" in get_error(capsys)


def test_ttest_is_of_one_text(watched, baseline, tmp_path, capsys):
    ttest = ["--replay", "--ttest", str(baseline)]
    assert lm.main([*ttest, str(watched[0])]) == 0
    capsys.readouterr()
    with mock.patch.object(lm, "read_text", lambda: TEXT[::-1]):
        run(tmp_path / "other")
    capsys.readouterr()
    assert lm.main([*ttest, str(tmp_path / "other")]) == 2
    assert "text_sha256" in get_error(capsys)


# ---- refusals


@pytest.mark.parametrize(
    "flags, said",
    [
        ("--batchsize 3", "unknown flag --batchsize, did you mean batch_size?"),
        ("--lr -1", "lr must be above 0"),
        ("--heads 3", "width 32 is not divisible by 3 heads"),
        ("--rank_min 32", "rank_min 32 is above rank_max 16"),
        ("--rank_max 64", "rank_max 64 is above the width 32"),
        ("--lora_scaling rslora", "lora_scaling rslora needs --lora_alpha"),
        ("--lora_scaling authors --lora_alpha 2", "lora_scaling authors is 1 and has no lora_alpha"),
        ("--rank_budget 0.1", "rank_budget is for rank_rule uniform or budget"),
        ("--switch_rule forecast --lora_cost 1", "switch_rule forecast needs --forecast_shortfall"),
        ("--switch_rule forecast --mode full", "switch_rule forecast has no meaning with mode full"),
        ("--target_modules q fc1", "unknown target modules ['fc1']"),
        ("--num_windows 1", "num_windows must be at least 2"),
        ("--switch_epoch 1", "switch_epoch 1 is not in 2"),
        ("--switch_epoch 8", "switch_epoch 8 is not in 2"),
        ("--switch_epoch 4 --mode full", "switch_epoch has no meaning with mode full"),
        ("--epochs 1", "lr_warmup_steps 3 leaves nothing of 3 steps"),
        ("--text_sha256 0", "text_sha256 is 0 and this Python's text has"),
        ("--context 3000", "context 3000 is too long for a held-out text of"),
    ],
)
def test_refusals_are_a_sentence(tmp_path, capsys, flags, said):
    assert lm.main([*TINY, "--run_dir", str(tmp_path / "run"), *flags.split()]) == 2
    assert said in get_error(capsys)
    assert not (tmp_path / "run").exists()


def test_a_folder_holds_one_run(watched, capsys):
    before = (watched[0] / "metrics.jsonl").read_bytes()
    assert lm.main([*TINY, "--run_dir", str(watched[0])]) == 2
    assert "already holds a run: choose another --run_dir" in get_error(capsys)
    assert (watched[0] / "metrics.jsonl").read_bytes() == before


def test_what_is_not_finite_ends_the_run(tmp_path, capsys):
    assert lm.main([*TINY, "--run_dir", str(tmp_path), "--lr", "1e30", "--grad_clip", "0"]) == 1
    assert "error: non-finite loss or gradient norm at step" in capsys.readouterr().err


def test_it_needs_no_vit():
    code = "import sys, lm, lm_study; print({'train', 'start', 'model.vit'} & sys.modules.keys())"
    done = subprocess.run([sys.executable, "-c", code], cwd=REPO, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


# ---- the study

COSTS = {"full": 1.0, "warmup": 1.2, "lora": 0.8}


@pytest.mark.parametrize(
    "phases, epochs",
    [
        (["full"] * 8, 8),
        (["lora"] * 5, 4),  # 4.0: rounding alone makes no fifth
        (["full"] * 4 + ["warmup"] + ["lora"] * 3, 8),  # 7.6
        (["full"] * 4 + ["lora"] * 4, 8),  # 7.2
        (["full"] * 5 + ["warmup"] + ["full"] * 2, 9),  # 8.2
    ],
)
def test_equal_time_is_rounded_up(phases, epochs):
    run = Run({}, [{"phase": phase} for phase in phases], [])
    assert lm_study.get_equal_epochs(run, COSTS) == epochs
    assert epochs >= lm_study.get_full_epochs(run, COSTS) - 1e-6 > epochs - 1


@pytest.fixture
def study(monkeypatch, tmp_path):
    """The study at a tiny size in an empty folder, its runs in this process. Returns the runs that it has
    begun."""
    begun = []

    def call(run_dir, flags):
        begun.append(run_dir.name)
        assert lm.main(flags) == 0

    def shrink(arm):
        flags = arm.flags.replace("14", "5").replace("_epoch 8", "_epoch 4")
        length = [] if "--epochs" in flags else ["--epochs", str(EPOCHS)]
        return dataclasses.replace(arm, flags=" ".join([flags, *MODEL, *length]))

    arms, get_control = [shrink(arm) for arm in lm_study.ARMS], lm_study.get_control
    monkeypatch.setattr(lm_study, "ARMS", arms)
    monkeypatch.setattr(lm_study, "FULL", arms[0])
    monkeypatch.setattr(lm_study, "get_control", lambda epochs: shrink(get_control(epochs)))
    monkeypatch.setattr(lm_study, "SEEDS", (0, 1))
    monkeypatch.setattr(lm_study, "AT_ONCE", 1)
    monkeypatch.setattr(lm_study, "call", call)
    costs = {arm.name: COSTS for arm in arms} | {"milliseconds": {"full": 1.0}}
    monkeypatch.setattr(lm_study, "measure_costs", lambda lm: costs)
    monkeypatch.setattr(lm_study, "ROOT", tmp_path)
    (tmp_path / "docs/lm").mkdir(parents=True)
    (tmp_path / "docs/lm.md").write_text("before\n{}\n{}\nafter\n".format(*lm_study.MARKS))
    monkeypatch.chdir(tmp_path)
    return begun


def test_the_study_trains_once_and_reports(study, capsys):
    assert lm.main(["--study", "--report"]) == 1
    assert "are missing: python lm.py --study trains them" in get_error(capsys)
    assert lm.main(["--study"]) == 0
    assert len(study) == len(set(study)) == 2 * (6 + 1)  # static LoRA's 6.4 epochs ask for 7, others for 8
    assert {name for name in study if "equal" in name} == {"equal7-0", "equal7-1"}
    report = Path("docs/lm.md").read_text()
    assert report.startswith("before\n") and report.endswith("\nafter\n")
    rows = [line.split("|") for line in report.splitlines() if line.startswith("| PreLoRA")]
    assert [row[2].strip() for row in rows] == ["5", "5", "4", "4"]
    assert [row[5].strip() for row in rows] == ["7.80", "7.80", "7.60", "7.60"]
    assert Path("docs/lm/norms.png").exists() and Path("docs/lm/bits.png").exists()
    # What is kept: no step losses, no host, six digits; and it is enough.
    kept = events("docs/lm/runs/late_coherent-0")
    assert "step_losses" not in kept[1] and "hosts" not in kept[0]
    assert kept[1]["train_loss"] == float(f"{kept[1]['train_loss']:.6g}")
    study.clear()
    assert lm.main(["--study"]) == 0 and study == []
    assert Path("docs/lm.md").read_text() == report
    # A run that was killed leaves no kept log, and is begun anew.
    Path("docs/lm/runs/static-1/metrics.jsonl").unlink()
    log = Path("runs/lm_study/static-1/metrics.jsonl")
    log.write_text("".join(log.read_text().splitlines(keepends=True)[:3]))
    assert lm.main(["--study"]) == 0 and study == ["static-1"]
    assert Path("docs/lm.md").read_text() == report


def test_the_study_compares_runs_of_one_text_and_of_its_settings(study, capsys, monkeypatch):
    monkeypatch.setattr(lm_study, "SEEDS", (0,))
    monkeypatch.setattr(lm_study, "ARMS", lm_study.ARMS[:1])
    lm_study.train_missing(lm, lm_study.ARMS, lm.hash_text(TEXT))
    with mock.patch.object(lm, "read_text", lambda: TEXT[::-1]):
        with pytest.raises(UserError, match="were trained on another Python's source"):
            lm_study.check_text(lm)
    path = lm_study.get_kept(lm_study.FULL, 0) / "config.json"
    config = json.loads(path.read_text())
    other = Path(path.parent.parent / "other-0/config.json")
    other.parent.mkdir()
    other.write_text(json.dumps(config | {"text_sha256": "another"}))
    with pytest.raises(UserError, match="different texts, which can't be compared"):
        lm_study.get_text_sha256()
    path.write_text(json.dumps(config | {"lr": 0.5}))
    with pytest.raises(UserError, match="was trained with another lr"):
        lm_study.build_command(lm, lm_study.FULL, 0)


def test_costs_are_of_each_phase(study, monkeypatch):
    monkeypatch.setattr(lm_study, "SEEDS", (0,))
    lm_study.train_missing(lm, lm_study.ARMS, lm.hash_text(TEXT))
    threads = torch.get_num_threads()
    costs = MEASURE_COSTS(lm, rounds=1)
    torch.set_num_threads(threads)
    assert costs["milliseconds"]["full"] > 0
    assert costs["full"] == {"full": 1.0} and costs["static"].keys() == {"full", "lora"}
    assert costs["late_coherent"].keys() == {"full", "warmup", "lora"}


def test_study_s_wrong_flag(capsys):
    assert lm.main(["--study", "--reprot"]) == 2
    assert get_error(capsys) == "error: python lm.py --study [--report]\n"


def test_the_study_s_own_commands_are_accepted():
    """At their real size, and what they ask for."""
    for arm in [*lm_study.ARMS, lm_study.get_control(22)]:
        cfg, _ = lm_study.build_command(lm, arm, 2)
        assert cfg.seed == 2 and cfg.epochs == (22 if arm.name == "equal22" else 24)
    assert [arm.flags.split()[1] for arm in lm_study.ARMS[1:5]] == ["14", "14", "8", "8"]

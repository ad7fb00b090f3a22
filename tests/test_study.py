"""study.py's arithmetic, and its report from made-up runs."""

import json
import shutil
import struct
from pathlib import Path

import numpy as np
import pytest
import torch

import study
import study_oracle
import study_runs
import train
from config.cli import load_preset, parse_flags
from errors import UserError
from monitor.log import FROZEN, Run, load_run


def test_every_arm_is_a_run_that_train_accepts(tmp_path, monkeypatch):
    monkeypatch.setattr(study_runs, "RUNS", tmp_path)
    monkeypatch.setattr(study_runs, "KEPT", tmp_path / "kept")
    arms = [*study.ARMS, *study_runs.METHOD_ARMS]
    seen, names = set(), {arm.name for arm in arms}
    for arm in arms:
        for seed in range(arm.seeds):
            cfg, argv = study_runs.build_command(arm, seed)
            assert cfg.epochs == 24 or f"--epochs {cfg.epochs}" in arm.flags
            assert ("--fork" in argv) == arm.fork and not cfg.compile
            seen.add(cfg.run_dir)
    assert len(seen) == sum(arm.seeds for arm in arms)  # none shares a directory
    main = [study.BASELINE, *study_runs.MAIN_FORKS]
    assert min(arm.seeds for arm in main) >= 5 and min(arm.seeds for arm in arms) >= 3
    assert {study.MAIN, *study.DRAWN} <= names and len(names) == len(arms)


def records(phases, top1=80.0, switches=()):
    """Epochs of the given phases, and switches that took half a second each."""
    epochs = []
    for i, phase in enumerate(phases, 1):
        record = {"event": "epoch", "epoch": i, "step": 93 * i, "phase": phase, "lr": 0.1}
        record |= {"epoch_seconds": 9.0, "images_per_second": 661.3333333, "peak_memory_bytes": 2**30}
        record |= {"weight_norms": {"q": [1.0]}, "adapter_norms": {}, "trainable_params": 10}
        record |= {"train_loss": 1 / i, "step_losses": [1 / i] * 93, "train_top1": 50.0, "frozen_blocks": 0}
        record |= {"val_loss": 1.0, "val_top1": top1, "val_top5": 99.0}
        epochs.append(record)
    of_switch = {"event": "switch", "ranks": {}, "seconds": 0.5}
    return Run({}, epochs, [of_switch | {"epoch": e, "from": f, "to": t} for e, f, t in switches])


def test_costs_by_hand():
    prelora = records(["full", "full", "warmup", "lora", "lora"])
    costs = {"full": 1.0, "warmup": 1.25, "lora": 0.75, FROZEN: 0.5}
    assert study.get_full_epochs(prelora, costs) == 2 + 1.25 + 2 * 0.75
    frozen = records(["full"] * 3)
    frozen.epochs[-1]["frozen_blocks"] = 1
    assert study.get_full_epochs(frozen, costs) == 2.5


def test_interval_by_hand():
    """Mean 2, standard error 1/√3, t(0.975, 2) = 4.3027."""
    assert study.get_interval(np.array([1.0, 2.0, 3.0])) == "+2.00 [-0.48, +4.48]"


def get_own_config(arm, seed):
    return parse_flags(
        ["--seed", str(seed), *arm.flags.split()], load_preset(train.Config, f"config/{arm.preset}.py")
    )


def write_kept(arm, seed, cfg):
    """What a made-up run of the arm has left: one point of top-1 more with each seed, one less with adapters,
    a tenth of a point less for each epoch that is missing to 24."""
    phases, switches = ["full"] * cfg.epochs, []
    if cfg.mode == "prelora":
        warmup = cfg.lora_warmup_epochs
        phases = ["full"] * 14 + ["warmup"] * warmup + ["lora"] * (10 - warmup)
        # the one that did as replay says: equal means of windows 6, 7 and 8 (w = 2)
        at = 16 if (arm.name, seed) == ("prelora", 0) else 15
        switches = [(at, "full", "warmup"), (16, "warmup", "lora")]
    elif cfg.mode == "lora":
        phases = ["lora"] * 24
    top1 = 80 + seed - (cfg.mode != "full") - (24 - cfg.epochs) / 10
    _, epochs, switches = records(phases, top1 + 5, switches)
    for e in epochs:  # they come to rest after epoch 10; each layer in its own way
        norms = {family: [1.0, 2.0 + max(0, 10 - e["epoch"]), 3.0] for family in cfg.target_modules}
        e |= {"train_loss": 1.0, "weight_norms": norms}
        if arm is study.BASELINE and e["epoch"] % cfg.window_epochs == 0:
            e["spectrum"] = {family: [[1.0] * 32] * 3 for family in cfg.target_modules}
        e["adapter_norms"] = {} if e["phase"] == "full" else norms
    for s in switches:
        layer_ranks = [4, 4, 4] if s["from"] == "full" else [4, 8, 32]
        s["ranks"] = {family: layer_ranks for family in cfg.target_modules}
    folder = study_runs.get_kept(arm, seed)
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(vars(cfg) | {"run_dir": "elsewhere"}))
    lines = [*epochs, *switches, {"event": "held_out", "val_top1": top1, "val_loss": 0.5}]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


@pytest.fixture
def fabricated(tmp_path, monkeypatch):
    """What every arm's runs leave, as files; costs and oracle as computed before."""
    for module in (study, study_runs):
        monkeypatch.setattr(module, "RUNS", tmp_path / "runs")
        monkeypatch.setattr(module, "KEPT", tmp_path / "kept")
    monkeypatch.setattr(study, "DOC", tmp_path / "study.md")
    (tmp_path / "study").mkdir()
    monkeypatch.setattr(study.study_method, "write_report", lambda costs: None)  # test_study_method.py's
    for arm in (*study.ARMS, *study_runs.METHOD_ARMS):
        for seed in range(arm.seeds):
            write_kept(arm, seed, get_own_config(arm, seed))
    stages = {"full": 1.0, "warmup": 1.2, "lora": 0.8, FROZEN: 0.7}
    costs = {arm.name: stages for arm in study.ARMS}
    counted = {arm.name: stages | {"lora": 0.5, "warmup": 1.0} for arm in study.ARMS}
    whole = {"measured": costs | {"milliseconds": {"full": 50.0}}, "a100": counted, "machine": "a machine"}
    (tmp_path / "kept/costs.json").write_text(json.dumps(whole))
    oracle = {"means": {"after 14": [70.0, 71.0, 72.0]}, "oracle": {"4": [80.0, 80.0, 80.0]}}
    (tmp_path / "kept/oracle.json").write_text(json.dumps(oracle))
    return tmp_path


def test_report(fabricated, monkeypatch):
    drawn = []

    def draw(runs, family, out):
        drawn.append((runs, family, out))
        for run in runs:
            figures = Path(run) / "figures"
            figures.mkdir(exist_ok=True)
            for name in ("figure1", "figure3", "ranks", "displacement"):
                (figures / f"{name}.png").write_text(run)

    monkeypatch.setattr(study, "plot_runs", draw)
    (fabricated / "study.md").write_text(f"before\n{study.MARKS[0]}\nold\n{study.MARKS[1]}\nafter\n")
    assert study.main(["--report"]) == 0
    text = (fabricated / "study.md").read_text()
    assert text.startswith("before\n") and text.endswith("after\n") and "old" not in text
    row = next(line for line in text.splitlines() if line.startswith("| Exp2, w 2, alpha 64"))
    cells = [cell.strip() for cell in row.split("|")][2:-1]
    # one point below the baseline in every seed; dev is five above held-out
    assert cells[:5] == ["5", "15, 16", "81.00 ± 1.58", "-1.00 [-1.00, -1.00]", "86.00"]
    # 14 + 2 · 1.2 + 8 · 0.8 = 22.8 epochs: the control has 23 and lost a tenth. By the roofline 14 + 2 + 4
    # are 20, of whose control there are three seeds only.
    assert cells[5:] == ["22.80", "-0.90 [-0.90, -0.90]", "20.00", "", "0.80"]
    best = next(arm for arm in study.ARMS if arm.name == study.MAIN)
    assert study.get_row(best, study.get_costs())[6:8] == ["22.40", "-0.90 [-0.90, -0.90]"]
    assert study.get_row(study.EQUAL[0], study.get_costs())[7] == ""  # a control has none
    assert "| after 14 | 71.00 |" in text and "rank-4 part of the rest | 80.00 |" in text
    runs, family, out = drawn[0]
    assert len(runs) == sum(arm.seeds for arm in study.ARMS if arm.name in study.DRAWN)
    assert family is None and out == str(fabricated / "study")
    figures = sorted(path.name for path in (fabricated / "study").iterdir())
    made = ["displacement_baseline.png", f"displacement_{study.MAIN}.png", "figure1.png", "figure3.png"]
    assert figures == [*made, "oracle.png", "ranks.png"]
    # what is drawn: the same, but for the times, 93 steps of 50 ms times the stage's cost
    _, epochs, switches = load_run(fabricated / "runs/timed/authors-0")
    expected = [4.65] * 14 + [4.65 * 1.2] * 2 + [4.65 * 0.8] * 8
    assert [e["epoch_seconds"] for e in epochs] == pytest.approx(expected, rel=1e-6) and len(switches) == 2
    assert epochs[0]["images_per_second"] == pytest.approx(93 * 64 / 4.65, rel=1e-6)
    assert "forked runs switch at the epoch" in text and " 0 of " not in text
    study.write_report()
    assert (fabricated / "study.md").read_text() == text  # a second one replaces the first


def test_a_control_is_never_given_less_time(fabricated):
    """22.0 epochs are 22, 22.01 are 23, 23.5 the baseline's 24; 25 have no control, and 20 one of three seeds
    only."""
    arm = next(arm for arm in study.ARMS if arm.name == study.MAIN)  # 14 full, 1 warmup, 9 lora
    for lora, epochs in ((7 / 9, 22), (7.01 / 9, 23), (8.5 / 9, 24), (10 / 9, None), (5 / 9, None)):
        controls = study.get_controls(arm, {"full": 1.0, "warmup": 1.0, "lora": lora})
        if epochs is None:
            assert controls is None
        else:
            assert controls == pytest.approx([80 + seed - (24 - epochs) / 10 for seed in range(5)])


def test_another_run_in_its_place_is_refused(fabricated):
    arm = study.FORKS[0]
    study_runs.build_command(arm, 0)
    path = fabricated / f"kept/{arm.name}-0/config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"tau": 0.9}))
    with pytest.raises(UserError, match="trained with another tau: remove it"):
        study_runs.build_command(arm, 0)
    # what shapes nothing may differ
    path.write_text(json.dumps(vars(get_own_config(arm, 0)) | {"eval_every": 24, "run_dir": "x"}))
    study_runs.build_command(arm, 0)


def test_a_failing_run_ends_the_study_with_its_last_line(tmp_path, monkeypatch):
    monkeypatch.setattr(study_runs, "RUNS", tmp_path)
    with pytest.raises(UserError, match="run-0 ended with status 2: error: no such preset: nowhere.py"):
        study_runs.call(tmp_path / "run-0", ["nowhere.py"])
    assert not study_runs.running


def test_done_is_what_has_saved_its_last_epoch(reference, tmp_path):
    """A run that was killed between its last record and its checkpoint goes on."""
    run_dir = Path(shutil.copytree(reference, tmp_path / "run"))
    assert study_runs.is_done(run_dir, 7) and not study_runs.is_done(run_dir, 8)
    (run_dir / "checkpoints/latest").write_text("step_00000036")
    assert not study_runs.is_done(run_dir, 7) and not study_runs.is_done(tmp_path / "nowhere", 7)


def test_what_is_kept_is_not_trained_again(fabricated, monkeypatch):
    trained = []
    monkeypatch.setattr(study_runs, "train_run", lambda arm, seed, *_: trained.append((arm.name, seed)))
    study_runs.train_all()
    assert trained == []
    (fabricated / "kept/best10-2/metrics.jsonl").unlink()
    (fabricated / "kept/decay20-1/metrics.jsonl").unlink()
    study_runs.train_all()
    assert trained[:2] == [("baseline", 1), ("baseline", 2)]  # whose checkpoints the forks need
    assert sorted(trained[2:]) == [("best10", 2), ("decay20", 1)]
    trained.clear()
    study_runs.train_all(needs_checkpoints=(0,))
    assert ("baseline", 0) in trained


def test_a_run_leaves_what_the_report_needs(small, tmp_path, monkeypatch):
    """Of a real run, whose baseline is forked at its switch."""
    monkeypatch.setattr(study_runs, "RUNS", tmp_path / "runs")
    monkeypatch.setattr(study_runs, "KEPT", tmp_path / "kept")
    images, labels = torch.zeros(6, 3, 28, 28, dtype=torch.uint8), torch.arange(6)
    monkeypatch.setattr(study_runs, "load_held_out", lambda: (images, labels))
    flags = (
        "--loader folder --num_workers 0 --train_samples 64 --epochs 6 --lr_warmup_steps 1 --keep_every 1 "
    )
    flags += f"--switch_epoch 4 --lora_warmup_epochs 1 --data_dir {small}"
    monkeypatch.setattr(study_runs.BASELINE, "flags", flags.replace("--switch_epoch 4", ""))
    monkeypatch.setattr(study_runs.BASELINE, "seeds", 1)
    arm = study_runs.Arm(study.MAIN, flags, 1)
    monkeypatch.setattr(study_runs, "ARMS", [study_runs.BASELINE, arm])
    monkeypatch.setattr(study_runs, "METHOD_ARMS", [])
    study_runs.train_all()
    run = load_run(tmp_path / f"kept/{study.MAIN}-0")
    assert [epoch["phase"] for epoch in run.epochs] == ["full"] * 4 + ["warmup", "lora"]
    assert "step_losses" not in run.epochs[0] and len(run.epochs[0]["weight_norms"]["q"]) == 3
    assert study.get_arm_ranks(study.get_config(arm, run), run)
    monkeypatch.setattr(study, "KEPT", tmp_path / "kept")
    assert 0 <= study.get_held_out(arm, 0)["val_top1"] <= 100
    assert (tmp_path / f"kept/{study.MAIN}-0/metrics.jsonl").stat().st_size < 15_000
    # the baseline's own checkpoints serve the oracle
    monkeypatch.setattr(study, "RUNS", tmp_path / "runs")
    cfg, after = study_oracle.load_weights(0, (2, 6))
    assert 0 <= study_oracle.evaluate_weights(cfg, take_low_rank(after[2], after[6], 4)) <= 100
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)  # as few as the tests have
    check_rules(arm, cfg, after[6])


def check_rules(arm, cfg, end):
    """The rank rules beside the oracle, of that run: each fills minmax's parameters, and nothing captures
    more of the rest than its own spectrum does."""
    kept = load_run(study_runs.get_kept(study_runs.BASELINE, 0)).epochs
    assert [len(epoch.get("spectrum", {})) for epoch in kept] == [0, 6] * 3
    assert "spectrum" not in load_run(study_runs.get_kept(arm, 0)).epochs[1]
    rules = study_oracle.compute_rules(arm, (0,))
    allowed, largest_block = rules["minmax"]["parameters"][0], 8 * (320 + 1280)
    for rule, found in rules.items():
        assert 0 <= found["top1"][0] <= 100 and 0 < found["share"][0] < 1
        assert allowed - found["parameters"][0] <= (largest_block if rule != "uniform" else allowed / 2)
    assert rules["oracle"]["share"][0] > max(found["share"][0] for r, found in rules.items() if r != "oracle")
    # The rest is just the last window, whose spectrum is in the log.
    _, after = study_oracle.load_weights(0, (4,))
    net = train.build_net(cfg)
    spectrum = study_oracle.get_rest(cfg, net, after[4], end, study_oracle.get_decay(cfg, 4, 6))
    for family, layers in kept[-1]["spectrum"].items():
        for logged, values in zip(layers, spectrum[family]):
            assert logged == pytest.approx(values[:32], rel=0.05)


def test_the_share_by_hand():
    spectrum = {"q": [[3.0, 1.0], [2.0, 0.0]], "v": [[1.0, 1.0]]}  # squares: 9 and 1, 4, 1 and 1
    assert study_oracle.get_share(spectrum, {"q": [1, 1], "v": [0]}) == pytest.approx(13 / 16)
    assert study_oracle.get_share(spectrum, {"q": [2, 2], "v": [2]}) == 1


def take_low_rank(before, end, rank):
    return study_oracle.take_low_rank(before, end, study_oracle.decompose(before, end), rank)


def test_the_low_rank_part():
    torch.manual_seed(0)
    before = {"blocks.0.attn.qkv.weight": torch.randn(12, 4), "head.weight": torch.randn(3, 4)}
    low = torch.randn(4, 1) @ torch.randn(1, 4)
    end = {"head.weight": torch.randn(3, 4)}
    # q changes by rank 1, k not at all, v by rank 4
    end["blocks.0.attn.qkv.weight"] = before["blocks.0.attn.qkv.weight"] + torch.cat(
        [low, torch.zeros(4, 4), torch.randn(4, 4)]
    )
    whole, cut = take_low_rank(before, end, 4), take_low_rank(before, end, 1)
    for name in end:
        torch.testing.assert_close(whole[name], end[name])
    name = "blocks.0.attn.qkv.weight"
    torch.testing.assert_close(cut[name][:8], end[name][:8])
    each = take_low_rank(before, end, {("blocks.0.attn.qkv", part): r for part, r in enumerate((1, 0, 4))})
    torch.testing.assert_close(each[name], end[name])
    assert torch.equal(each[name][4:8], before[name][4:8])
    change = cut[name][8:] - before[name][8:]
    assert torch.linalg.matrix_rank(change) == 1 and not torch.allclose(cut[name][8:], end[name][8:])
    assert torch.equal(cut["head.weight"], end["head.weight"])  # everything else is the end's


def write_raw(folder, sizes):
    """Fashion-MNIST's four files with so many images of each split, whose pixels are their own number."""
    folder.mkdir(parents=True)
    for split, count in sizes.items():
        pixels = np.repeat(np.arange(count, dtype=np.uint8), 28 * 28).tobytes()
        head = struct.pack(">4I", 2051, count, 28, 28)
        (folder / f"{split}-images-idx3-ubyte").write_bytes(head + pixels)
        labels = (np.arange(count) % 10).astype(np.uint8).tobytes()
        (folder / f"{split}-labels-idx1-ubyte").write_bytes(struct.pack(">2I", 2049, count) + labels)


def test_no_image_serves_twice(tmp_path, monkeypatch):
    """Trained on, chosen by, reported on: three sets that share none."""
    source, dev = tmp_path / "source", tmp_path / "dev"
    write_raw(source / "FashionMNIST/raw", {"train": 100, "t10k": 7})
    for name, value in (("SOURCE", source), ("DEV", dev), ("DEV_IMAGES", 20)):
        monkeypatch.setattr(study_runs, name, value)
    preset = load_preset(train.Config, "config/study.py")
    preset.train_samples = 30
    monkeypatch.setattr(study_runs, "load_preset", lambda *args: preset)
    commands = []
    monkeypatch.setattr(study_runs.subprocess, "run", lambda command, check: commands.append(command))
    study_runs.prepare_data()
    assert [command[3] for command in commands] == ["fashion_mnist:train", "fashion_mnist:val"]
    from torchvision.datasets import FashionMNIST

    pool, chosen_by = FashionMNIST(dev, train=True), FashionMNIST(dev, train=False)
    assert (len(pool), len(chosen_by)) == (80, 20)
    trained = study_runs.get_indices(80, True, 1, 30)
    trained_on = set(pool.data[torch.from_numpy(trained)][:, 0, 0].tolist())
    study_runs.load_held_out.cache_clear()
    images, labels = study_runs.load_held_out()
    study_runs.load_held_out.cache_clear()
    assert images.shape == (80 - 30 + 7, 3, 28, 28) and torch.equal(labels, images[:, 0, 0, 0].long() % 10)
    reported_on = set(images[:50, 0, 0, 0].tolist())
    sets = [trained_on, set(chosen_by.data[:, 0, 0].tolist()), reported_on]
    assert set.union(*sets) == set(range(100)) and sum(map(len, sets)) == 100
    monkeypatch.setattr(study_runs, "SOURCE", tmp_path / "nowhere")
    monkeypatch.setattr(study_runs, "DEV", tmp_path / "other")
    with pytest.raises(UserError, match="can't be read.*make data"):
        study_runs.prepare_data()


def test_a_missing_run_or_flag_is_one_line(fabricated, capsys):
    (fabricated / "kept/best10-2/metrics.jsonl").unlink()
    (fabricated / "study.md").write_text(f"{study.MARKS[0]}\n{study.MARKS[1]}")
    assert study.main(["--report"]) == 1
    assert "best10-2 has no finished epoch" in capsys.readouterr().err
    assert study.main(["--reprot"]) == 2


def test_stages_are_timed_side_by_side_and_counted(fabricated, monkeypatch):
    names = ("baseline", "equal23", study.MAIN, "frozen_full", "static_alpha64")
    arms = [arm for arm in study.ARMS if arm.name in names]
    monkeypatch.setattr(study, "ARMS", arms)
    path = fabricated / "kept/frozen_full-0/metrics.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    lines[-2]["frozen_blocks"] = 1
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    measured = study.measure_costs(rounds=1)
    stages = {name: sorted(costs) for name, costs in measured.items()}
    assert stages == {
        "baseline": ["full"],
        "equal23": ["full"],
        study.MAIN: ["full", "lora", "warmup"],
        "frozen_full": ["full", FROZEN],
        "static_alpha64": ["full", "lora"],
        "milliseconds": ["full"],
    }
    assert measured["baseline"]["full"] == 1.0 and measured["milliseconds"]["full"] > 0
    assert all(value > 0 for costs in measured.values() for value in costs.values())


@pytest.mark.slow
def test_counted_costs_of_an_a100(fabricated, monkeypatch):
    arms = [study.BASELINE, *(arm for arm in study.ARMS if arm.name in (study.MAIN, "best_frozen"))]
    monkeypatch.setattr(study, "ARMS", arms)
    counted = study.count_costs()
    assert counted["baseline"] == {"full": 1.0}
    assert 0.7 < counted[study.MAIN]["lora"] < 0.76 and 0.98 < counted[study.MAIN]["warmup"] < 1.05
    assert counted["best_frozen"]["lora"] < counted[study.MAIN]["lora"] - 0.1  # a third of the blocks frozen


def test_a_lost_page_is_one_line(fabricated, capsys):
    assert study.main(["--report"]) == 1
    assert "study.md can't be read" in capsys.readouterr().err
    (fabricated / "study.md").write_text("no marks")
    assert study.main(["--report"]) == 1
    assert "has lost the marks" in capsys.readouterr().err


def test_a_bug_is_no_sentence(fabricated, monkeypatch):
    def has_a_bug(*args):
        raise ValueError("too many values to unpack (expected 2)")

    (fabricated / "study.md").write_text("".join(study.MARKS))
    monkeypatch.setattr(study, "get_table", has_a_bug)
    with pytest.raises(ValueError, match="too many values"):
        study.main(["--report"])


def test_an_edited_step_is_what_is_timed(monkeypatch):
    taken = []
    monkeypatch.setattr(train, "train_step", lambda cfg, *args: taken.append(cfg))
    cfg = load_preset(train.Config, "config/study.py")
    study.build_step(cfg, "full", None)()
    assert taken == [cfg]


def test_what_this_repository_keeps_is_of_these_arms():
    """docs/study/runs has every run of every arm, with the settings that the arm has today, and no other."""
    kept = {path.name for path in study.KEPT.iterdir() if path.is_dir()}
    arms = (*study.ARMS, *study_runs.METHOD_ARMS)
    assert kept == {f"{arm.name}-{seed}" for arm in arms for seed in range(arm.seeds)}
    for arm in arms:
        for seed in range(arm.seeds):
            study_runs.build_command(arm, seed)  # refuses another
            assert study.get_held_out(arm, seed)["val_top1"] > 50

"""The figures of synthetic runs: they hold the records' numbers, and the files are real pictures."""

import json
import subprocess
import sys
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest

from errors import UserError
from monitor import plot
from monitor.arms import find_window_arms, group_runs
from monitor.compare import arms_figure, compare, get_switch_lines, window_norms_figure, windows_figure
from monitor.costs import costs_figure
from monitor.figures import build_figure, change_heatmap, family_figure, norms_figure, rank_heatmap
from monitor.log import load_run, pick_events, read_run

ROOT = Path(__file__).parent.parent
FAMILIES = ["q", "k", "v", "proj", "fc1", "fc2"]


def make_records(layers=4, count=16, switch=7, freeze=10, families=FAMILIES, phase=None, val=True):
    """Epoch and switch records whose norms grow and settle; switch=None is a run in one phase."""
    rng = np.random.default_rng(0)
    start = {family: 4 + 2 * i + rng.random(layers) for i, family in enumerate(families)}
    grow = {family: 1 + 3 * rng.random(layers) for family in families}
    epochs = []
    for epoch in range(1, count + 1):
        now = phase or ("full" if epoch <= switch else "warmup" if epoch <= freeze else "lora")
        age = min(epoch, freeze or epoch) if phase != "lora" else 0  # a frozen base keeps its norm
        norms = {
            family: (start[family] + grow[family] * (1 - np.exp(-age / count * 5))).tolist()
            for family in families
        }
        epochs.append(
            {
                "event": "epoch",
                "epoch": epoch,
                "step": epoch * 10,
                "phase": now,
                "weight_norms": norms,
                "train_loss": 0.4 + 2 * float(np.exp(-epoch / count * 4)),
                "train_top1": 0.5,
                "adapter_norms": {},
                "val_loss": 0.5 if val else None,
                "val_top1": 0.5 if val else None,
            }
        )
    if phase:
        return epochs, []
    ranks = {family: (2 ** rng.integers(3, 7, layers)).tolist() for family in families}
    return epochs, [
        {"event": "switch", "epoch": at, "step": at * 10, "from": a, "to": b, "ranks": ranks}
        for at, a, b in [(switch, "full", "warmup"), (freeze, "warmup", "lora")]
    ]


def write_run(run, epochs, switches, tail="", config=None):
    run.mkdir(parents=True)
    (run / "config.json").write_text(json.dumps(config or {"model": "tiny-debug"}))
    events = sorted(epochs + switches, key=lambda event: (event["epoch"], event["event"]))
    events.insert(1, {"event": "warning", "message": "not for plotting"})
    (run / "metrics.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events) + tail)
    return run


CONFIG = {
    "mode": "prelora",
    "model": "tiny-debug",
    "tau": 0.5,
    "lora_warmup_epochs": 2,
    "seed": 0,
    "run_dir": "a",
    "eval_every": 1,
}
SECONDS, RATES, BYTES = [
    {"full": a, "warmup": b, "lora": c} for a, b, c in [(10, 12, 5), (600, 500, 1200), (20, 21, 16)]
]


def make_run(
    name, mode="prelora", count=8, switch=3, w=2, loss=0.0, seconds=1.0, device="cuda", every=1, **config
):
    """(directory, config, events) of a short run: an epoch takes 10, 12 or 5 s (× seconds) in the phases
    full, warmup and lora, its loss is 1/epoch + loss, the norm of layer i of q epoch + i and of its adapter
    half of that.
    """
    config = {**CONFIG, "mode": mode, "lora_warmup_epochs": w, "run_dir": name, **config}
    events = [
        {
            "event": "start",
            "phase": "lora" if mode == "lora" else "full",
            "device": device,
            "flops_per_image": 300,
        }
    ]
    for epoch in range(1, count + 1):
        phase = (
            mode
            if mode != "prelora"
            else "full"
            if epoch <= switch
            else "warmup"
            if epoch <= switch + w
            else "lora"
        )
        if mode == "prelora" and epoch == switch + w + 1:
            events.append(
                {
                    "event": "switch",
                    "epoch": epoch - 1,
                    "from": "warmup",
                    "to": "lora",
                    "flops_per_image": 200,
                }
            )
        norms = {"q": [epoch, epoch + 1]}
        events.append(
            {
                "event": "epoch",
                "epoch": epoch,
                "phase": phase,
                "train_loss": 1 / epoch + loss,
                "train_top1": 10 * epoch,
                "val_top1": None if epoch % every else 9 * epoch,
                "epoch_seconds": SECONDS[phase] * seconds,
                "images_per_second": RATES[phase] / seconds,
                "peak_memory_bytes": BYTES[phase] * 2**30,
                "weight_norms": norms,
                "adapter_norms": {} if phase == "full" else {"q": [epoch / 2, epoch / 2 + 1]},
            }
        )
    return Path(name), config, events


def is_unclipped(figure):
    """Whether everything drawn, labels and legends too, lies in the picture (0.02 inch for antialiasing)."""
    figure.draw_without_rendering()
    box, (width, height) = figure.get_tightbbox(), figure.get_size_inches()
    return min(box.x0, box.y0, width - box.x1, height - box.y1) > -0.02


def get_curves(axes):
    return [line for line in axes.lines if line.get_label() != "_switch"]


def get_curve(axes, label):
    [line] = [line for line in axes.lines if line.get_label() == label]
    return dict(zip(line.get_xdata(), line.get_ydata()))


def get_band(axes):
    """{epoch: (lower, upper)} of the only band."""
    [band] = axes.collections
    points = band.get_paths()[0].vertices
    return {
        x: (min(points[points[:, 0] == x, 1]), max(points[points[:, 0] == x, 1])) for x in set(points[:, 0])
    }


def get_switch_epochs(axes):
    return [line.get_xdata()[0] for line in axes.lines if line.get_label() == "_switch"]


def test_files_are_pictures_and_named_on_stdout(tmp_path, capsys):
    run = write_run(tmp_path / "run", *make_records(layers=2, families=["q", "k", "fc1"]))
    plot.main([str(run)])
    out = capsys.readouterr().out
    assert sorted(path.name for path in (run / "figures").iterdir()) == [
        "figure1.png",
        "figure3.png",
        "heatmap.png",
        "ranks.png",
    ]
    for path in (run / "figures").iterdir():
        pixels = matplotlib.image.imread(path)
        # It is large, and has many colours.
        assert min(pixels.shape[:2]) > 300 and len(np.unique(pixels[..., :3] @ [1, 256, 65536])) > 50
        assert f"wrote {path}\n" in out
    assert f"tensorboard --logdir {run / 'tb'}\n" in out


def test_figure1_holds_the_layer_means_and_the_switches():
    epochs, switches = make_records()
    figure = norms_figure(epochs, switches)
    left, right = figure.axes
    assert [line.get_label() for line in get_curves(left)] == FAMILIES
    for line in get_curves(left):
        means = [sum(norms := record["weight_norms"][line.get_label()]) / len(norms) for record in epochs]
        assert list(line.get_xdata()) == list(range(1, 17))
        np.testing.assert_allclose(line.get_ydata(), means, rtol=1e-12)
    [loss] = get_curves(right)
    assert list(loss.get_ydata()) == [record["train_loss"] for record in epochs]
    for axes in figure.axes:
        assert get_switch_epochs(axes) == [7, 10]
        assert [text.get_text() for text in axes.texts] == ["switch, epoch 7", "freeze, epoch 10"]
        assert [(patch.get_x(), patch.get_x() + patch.get_width()) for patch in axes.patches][1] == (7, 10)
    [legend] = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == [
        *FAMILIES,
        "full phase",
        "warmup phase",
        "lora phase",
    ]
    assert len({line.get_color() for line in get_curves(left)}) == 6


def make_control():
    """Records of a run of mode full whose lowest blocks are frozen after epoch 7."""
    epochs, _ = make_records(phase="full")
    for record in epochs:
        record["frozen_blocks"] = 2 if record["epoch"] > 7 else 0
    freeze = {"event": "switch", "epoch": 7, "step": 70, "from": "full", "to": "full", "ranks": None}
    return epochs, [freeze | {"frozen_blocks": 2}]


def test_a_freeze_within_the_full_phase_is_marked_as_such():
    epochs, switches = make_control()
    for axes in norms_figure(epochs, switches).axes:
        assert get_switch_epochs(axes) == [7]
        assert [text.get_text() for text in axes.texts] == ["freeze, epoch 7"]
    [legend] = norms_figure(epochs, switches).legends
    assert [text.get_text() for text in legend.get_texts()][-2:] == ["full phase", "full, frozen phase"]


def test_the_baseline_is_the_run_that_freezes_nothing(tmp_path):
    epochs, switches = make_control()
    long = write_run(
        tmp_path / "control", epochs, switches, config=CONFIG | {"mode": "full", "freeze_blocks": 2}
    )
    short = write_run(
        tmp_path / "base", *make_records(phase="full", count=12), config=CONFIG | {"mode": "full"}
    )
    baseline, (arm,) = group_runs([(path, *read_run(path)) for path in (long, short)])
    assert (baseline.label, arm.label) == ("base", "control")
    assert set(get_switch_lines([baseline, arm])) == {(7.0, "freeze")}


def test_rank_0_is_no_colour():
    axes = rank_heatmap({"q": [0, 8, 64], "fc1": [0, 16, 16]}).axes[0]
    assert sorted(text.get_text() for text in axes.texts) == ["0", "0", "16", "16", "64", "8"]
    levels = np.ma.filled(axes.collections[0].get_array(), np.nan).ravel()
    assert np.isnan(levels).tolist() == [True, False, False] * 2


def test_figure3_has_a_line_per_layer():
    epochs, switches = make_records(layers=5)
    axes = family_figure(epochs, switches, "fc1").axes[0]
    np.testing.assert_array_equal(
        [line.get_ydata() for line in get_curves(axes)],
        np.array([record["weight_norms"]["fc1"] for record in epochs]).T,
    )
    assert len({tuple(line.get_color()) for line in get_curves(axes)}) == 5 and get_switch_epochs(axes) == [
        7,
        10,
    ]
    with pytest.raises(UserError, match="no family 'dense' in this run, which has q k v proj fc1 fc2"):
        family_figure(epochs, switches, "dense")


def test_heatmap_is_the_change_in_percent_by_hand():
    norms = {"q": [[10, 20], [11, 19], [11, 38]], "fc1": [[4, 0], [5, 1], [4, 1]]}  # (epochs, layers)
    epochs = [
        {"epoch": i + 1, "phase": "full", "weight_norms": {"q": norms["q"][i], "fc1": norms["fc1"][i]}}
        for i in range(3)
    ]
    q, fc1, bar = change_heatmap(epochs).axes
    np.testing.assert_allclose(q.images[0].get_array(), [[10, 0], [-5, 100]])
    np.testing.assert_allclose(np.ma.filled(fc1.images[0].get_array(), np.nan), [[25, -20], [np.nan, 0]])
    assert q.images[0].get_extent() == [1.5, 3.5, -0.5, 1.5]  # epoch 1 has no change
    assert q.images[0].get_clim() == fc1.images[0].get_clim() and sum(q.images[0].get_clim()) == 0


def test_rank_heatmap_writes_each_rank_in_its_cell():
    [axes] = rank_heatmap({"q": [8, 16, 64], "fc2": [32, 8]}).axes  # fc2 has a layer fewer
    cells = {(text.get_position()[1], text.get_position()[0]): text.get_text() for text in axes.texts}
    assert cells == {(0, 0): "8", (0, 1): "16", (0, 2): "64", (1, 0): "32", (1, 1): "8"}
    assert [label.get_text() for label in axes.get_yticklabels()] == ["q", "fc2"]
    assert is_unclipped(rank_heatmap({"q": [8]}))  # r_min = r_max


@pytest.mark.parametrize(
    "records",
    [
        dict(layers=1, count=1, phase="full", val=False),
        dict(layers=24, count=300, switch=152, freeze=162, families=["q", "fc1"]),
        dict(layers=2, count=12, phase="lora", families=["q", "k", "v"]),
        # Labels reach out of the axes at both ends.
        dict(layers=1, switch=1, freeze=16, families=["self_attn.out_proj"]),
        dict(layers=1, count=3, switch=1, freeze=2, families=list("abcdefghi")),  # more families than colours
    ],
    ids=["one epoch", "large", "static lora", "switch at the ends", "nine families"],
)
def test_nothing_is_clipped_or_overlaps(records):
    epochs, switches = make_records(**records)
    first = norms_figure(epochs, switches)
    figures = [
        first,
        family_figure(epochs, switches, next(iter(epochs[0]["weight_norms"]))),
        change_heatmap(epochs),
    ]
    assert [is_unclipped(figure) for figure in figures] == [True] * 3
    styles = {(line.get_color(), line.get_linestyle()) for line in get_curves(first.axes[0])}
    assert len(styles) == len(epochs[0]["weight_norms"])
    boxes = [artist.get_window_extent() for axes in first.axes for artist in [*axes.texts, axes.title]]
    boxes += [first.legends[0].get_window_extent(), *(axes.bbox for axes in first.axes)]
    assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])
    for axes in first.axes:  # ticks are thinned, and whole epochs
        ticks = axes.get_xticks()
        assert 1 <= len(ticks) <= 12 and all(tick == int(tick) for tick in ticks)
    first.axes[1].set_ylabel("too long for its axes " * 5)  # the control: the check does see a clipped label
    assert not is_unclipped(first)


def test_main_draws_the_family_asked_for_and_ranks_where_there_are_some(tmp_path, monkeypatch):
    drawn = {}
    for name in ("norms_figure", "family_figure", "change_heatmap", "rank_heatmap"):
        monkeypatch.setattr(
            plot, name, lambda *args, name=name: drawn.update({name: args[-1]}) or build_figure(1, 1)
        )
    run = write_run(tmp_path / "run", *make_records(count=2, layers=1, phase="lora", families=["v", "q"]))
    plot.main([str(run)])
    assert (
        drawn["family_figure"] == "q"
        and "rank_heatmap" not in drawn
        and not (run / "figures" / "ranks.png").exists()
    )
    (run / "ranks.json").write_text(json.dumps({"q": [8]}))
    plot.main([str(run), "--family", "v"])
    assert drawn["family_figure"] == "v" and drawn["rank_heatmap"] == {"q": [8]}
    epochs, switches = make_records(layers=3, families=["v", "k"])
    other = write_run(tmp_path / "other", epochs, [*switches[:1], {**switches[1], "ranks": None}])
    (other / "ranks.json").write_text("{}")
    plot.main([str(run), str(other)])  # several runs; no q here; ranks of the switch rather than the file's
    assert drawn["family_figure"] == "v" and drawn["rank_heatmap"] == switches[0]["ranks"]
    assert (run / "figures" / "ranks.png").exists() and (other / "figures" / "figure1.png").exists()


def test_a_single_runs_figures_go_where_out_says(tmp_path, monkeypatch, capsys):
    """And nowhere else: the run's own, drawn before, stay as they are."""
    for name in ("norms_figure", "family_figure", "change_heatmap", "rank_heatmap"):
        monkeypatch.setattr(plot, name, lambda *args: build_figure(1, 1))
    run = write_run(tmp_path / "run", *make_records(layers=1))
    out = tmp_path / "elsewhere" / "deep"
    plot.main([str(run), "--out", str(out)])
    drawn = ["figure1.png", "figure3.png", "heatmap.png", "ranks.png"]
    assert sorted(path.name for path in out.iterdir()) == drawn and not (run / "figures").exists()
    plot.main([str(run)])  # the control: without it they are the run's
    assert sorted(path.name for path in (run / "figures").iterdir()) == drawn
    (run / "figures" / "figure1.png").write_text("kept")
    plot.main([str(run), str(run), "--out", str(out)])  # named twice, a single run still
    assert (run / "figures" / "figure1.png").read_text() == "kept"
    capsys.readouterr()
    with pytest.raises(SystemExit, match="can't make the folder .*config.json: File exists"):
        plot.main([str(run), "--out", str(run / "config.json")])
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("tail", ['{"event": "epoch", "epo', "17", '{"event": "epoch", "epoch": 17}\n{"ev'])
def test_a_torn_last_line_is_skipped_with_a_note(tmp_path, capsys, tail):
    epochs, switches = make_records(layers=1)
    config, read, read_switches = load_run(write_run(tmp_path / "run", epochs, switches, tail))
    assert config == {"model": "tiny-debug"} and read[:16] == epochs and read_switches == switches
    assert len(read) == 16 + tail.count("\n")
    assert "torn last line" in capsys.readouterr().out
    load_run(write_run(tmp_path / "whole", epochs, switches))
    assert capsys.readouterr().out == ""
    with pytest.raises(UserError, match="line 20 is not a JSON object"):  # not the last line: that is damage
        load_run(write_run(tmp_path / "damaged", epochs, switches, "{torn\n" + json.dumps(epochs[0])))


def test_a_run_that_cannot_be_read_is_one_line_and_nothing_is_written(tmp_path):
    good = write_run(tmp_path / "good", *make_records(layers=1))
    empty = write_run(tmp_path / "empty", *make_records(layers=1))
    (empty / "metrics.jsonl").write_text('{"event": "warning"}\n')
    with pytest.raises(UserError, match="empty has no finished epoch"):
        load_run(empty)
    (empty / "metrics.jsonl").unlink()
    with pytest.raises(SystemExit, match="empty has no finished epoch"):
        plot.main([str(empty)])
    (empty / "config.json").unlink()
    with pytest.raises(SystemExit, match=f"empty is no run, the runs in {tmp_path} are good"):
        plot.main([str(empty)])
    (empty / "metrics.jsonl").write_text('{"event": "warning"}\n')
    with pytest.raises(SystemExit, match="config.json is missing"):
        plot.main([str(empty)])
    with pytest.raises(SystemExit, match="no family 'dense'"):
        plot.main([str(good), "--family", "dense"])
    command = [sys.executable, "-m", "monitor.plot", good, tmp_path / "absent"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (
        1,
        "",
        f"error: no run directory {tmp_path / 'absent'}, the runs in {tmp_path} are empty, good\n",
    )
    assert not (good / "figures").exists()
    epochs, switches = make_records(layers=1)
    twice = write_run(tmp_path / "twice", epochs, switches, json.dumps(epochs[-1]) + "\n")
    with pytest.raises(SystemExit, match="metrics.jsonl: line 20 has epoch 16 after epoch 16: two processes"):
        plot.main([str(twice)])
    assert not (twice / "figures").exists()


def test_a_figure_that_cannot_be_written_is_one_line(tmp_path, monkeypatch):
    for name in ("norms_figure", "family_figure", "change_heatmap", "rank_heatmap"):
        monkeypatch.setattr(plot, name, lambda *args: build_figure(1, 1))
    run = write_run(tmp_path / "run", *make_records(layers=1))
    (run / "figures").mkdir()
    (run / "figures" / "figure1.png").symlink_to("/dev/full")
    with pytest.raises(SystemExit, match="error: .*figure1.png can't be written: No space left on device"):
        plot.main([str(run)])
    monkeypatch.setattr(plot, "norms_figure", lambda *args: 1 / 0)  # the control: a bug keeps its traceback
    with pytest.raises(ZeroDivisionError):
        plot.main([str(run)])


def test_no_pyplot_state_is_made():
    code = """
import sys
sys.path.append("tests")
from test_plot import *
epochs, switches = make_records(layers=1, count=3, switch=1, freeze=2, families=["q"])
figures = [norms_figure(epochs, switches), family_figure(epochs, switches, "q"), change_heatmap(epochs)]
figures.append(rank_heatmap(switches[0]["ranks"]))
figures += compare(*group_runs([make_run("a", "full"), make_run("b"), make_run("c", w=1)])).values()
assert len(figures) == 8 and "matplotlib.pyplot" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_runs_that_differ_in_nothing_but_the_seed_are_one_arm():
    runs = [
        make_run("runs/full-0", "full"),
        make_run("runs/exp1-s10", seed=10, num_workers=4, eval_every=5, fork="runs/full-0@2"),
        make_run("runs/exp1-s11", seed=11, max_steps=100, stage_dir="/local"),
        make_run("runs/exp2/seed0", tau=1.0),
        make_run("runs/exp2/seed1", tau=1.0, seed=1, rank_budget=None),
    ]
    del runs[3][1]["eval_every"]  # older than the field
    baseline, arms = group_runs(runs)
    assert [(arm.label, len(arm.runs)) for arm in [baseline, *arms]] == [
        ("full-0", 1),
        ("exp1", 2),
        ("exp2", 2),
    ]
    assert len({arm.style["color"] for arm in [baseline, *arms]}) == 3
    for field, value in [
        ("tau", 0.25),
        ("epochs", 5),
        ("mode", "lora"),
        ("lora_warmup_epochs", 3),
        ("rank_budget", 8),
    ]:
        runs[2][1].update({field: value})  # the control: each of these is another experiment
        assert [arm.label for arm in group_runs(runs)[1]] == ["exp1-s10", "exp1-s11", "exp2"]
        runs[2][1].update({field: runs[1][1].get(field)})


def test_labels_are_unique_and_the_longest_full_run_is_the_baseline():
    names = ["runs/a/run", "runs/b/run", "runs/c/run", "runs/control"]
    runs = [
        make_run(names[0], tau=1.0),
        make_run(names[1], tau=2.0),
        make_run(names[2], "full"),
        make_run(names[3], "full", 5, epochs=5),
    ]
    baseline, arms = group_runs(runs)
    assert (baseline.label, [arm.label for arm in arms]) == ("c/run", ["a/run", "b/run", "control"])
    assert group_runs(runs[:2])[0] is None
    [arm] = group_runs([make_run("one/10", seed=1), make_run("one/11", seed=2)])[1]
    assert arm.label == "one"
    [arm] = group_runs([make_run("x/alice", seed=1), make_run("x/bob", seed=2)])[1]
    assert arm.label == "alice"


def test_figure4_by_hand():
    runs = [
        make_run("full", "full", seconds=0.9),
        make_run("full-1", "full", seconds=1.1),
        make_run("exp-0", every=2),
        make_run("exp-1", every=3, seed=1, loss=0.4, switch=5),
        make_run("control", "full", 6, epochs=6),
    ]
    loss, time, train, val = arms_figure(*group_runs(runs)).axes
    mean = {epoch: 1 / epoch + 0.2 for epoch in range(1, 9)}  # of 1/epoch and 1/epoch + 0.4: s = 0.4/√2
    assert get_curve(loss, "exp") == pytest.approx(mean)
    assert list(get_curve(val, "exp")) == [6]  # evaluated at 2 4 6 8 and at 3 6
    bands = [band.get_paths()[0].vertices for band in loss.collections]  # of the baseline, of exp
    assert len(bands) == 2 and max(bands[0][:, 1] - 1 / bands[0][:, 0]) == pytest.approx(0)
    assert max(bands[1][:, 1] - 1 / bands[1][:, 0]) == pytest.approx(0.2 + 0.4 / 2**0.5)
    # 10 s an epoch; switch after 3: 10 10 10 12 12 5 5 5; after 5: 10 10 10 10 10 12 12 5
    assert get_curve(time, "exp") == pytest.approx({1: 0, 2: 0, 3: 0, 4: -1, 5: -2, 6: -0.5, 7: 1, 8: 6})
    assert get_curve(time, "full") == pytest.approx(dict.fromkeys(range(1, 9), 0))
    assert list(get_curve(train, "control")) == list(range(1, 7)) and get_curve(train, "control")[6] == 60
    assert get_switch_epochs(loss) == [4, 6]  # means of 3 and 5, of 5 and 7
    assert "(s)" in time.get_ylabel()


def test_comparisons_begin_shortly_before_the_first_switch_and_need_no_evaluation():
    runs = [
        make_run("full", "full", 100, every=1000),
        make_run("exp", count=100, switch=60, every=1000),
        make_run("control", "full", 70, epochs=70),
    ]
    baseline, arms = group_runs(runs)
    figure = arms_figure(baseline, arms)
    # Of 100 epochs they begin 5 before it.
    assert {min(line.get_xdata()) for axes in figure.axes for line in get_curves(axes)} == {55}
    figure = arms_figure(baseline, arms[:1])
    # Nothing was evaluated: there is no empty panel.
    assert [axes.get_title()[:3] for axes in figure.axes] == ["(a)", "(b)", "(c)"]
    assert min(get_curve(arms_figure(baseline, arms[1:]).axes[0], "full")) == 1  # nothing switches


def test_figure5_and_6_by_hand():
    runs = [
        make_run("full", "full"),
        make_run("long", w=4, seconds=0.5),
        make_run("short-0", w=1),
        make_run("short-1", w=1, seed=1, loss=1.0),
        make_run("other", w=3, tau=1.0),
    ]
    runs += [make_run(f"static{w}", "lora", w=w) for w in (7, 8, 9)]
    baseline, arms = group_runs(runs)
    windows = find_window_arms(arms)  # tau is another, or another mode: no part of the set
    assert [arm.label for arm in windows] == ["w = 1", "w = 4"]
    loss, speed = windows_figure(baseline, windows).axes
    assert get_curve(speed, "w = 4") == pytest.approx(
        {e: 20 / s for e, s in enumerate([10, 10, 10, 12, 12, 12, 12, 5], 1)}
    )
    assert get_curve(speed, "w = 1")[4] == pytest.approx(10 / 12) and get_curve(speed, "full")[8] == 1
    assert get_curve(loss, "w = 1")[8] == pytest.approx(1 / 8 + 0.5) and len(get_band(loss)) == 8
    # The standard deviation of 0 and 1 is √½.
    assert get_band(loss)[8] == pytest.approx((1 / 8 + 0.5 - 0.5**0.5, 1 / 8 + 0.5 + 0.5**0.5))
    base, adapters = window_norms_figure(windows, "q").axes
    # From the switch after 3 to the last freeze, after 7.
    assert get_curve(base, "w = 4") == {e: e + 3 + 0.5 for e in range(-1, 6)}
    assert get_curve(adapters, "w = 1") == {e: (e + 3) / 2 + 0.5 for e in range(1, 6)}
    lines = {line.get_xdata()[0]: line.get_color() for line in base.lines if line.get_label() == "_switch"}
    assert lines == {0: "0.4", 1: windows[0].style["color"], 4: windows[1].style["color"]}
    assert not find_window_arms([arm for arm in arms if arm.label != "long"])  # the control: one w is no set


def test_windows_of_seeds_that_switch_at_different_epochs_lie_on_each_other():
    runs = [
        make_run("a-0", switch=2, w=3),
        make_run("a-1", switch=6, w=3, count=12, seed=1),
        make_run("b", w=1),
        make_run("c", w=0),
    ]
    runs += [make_run("b-1", w=1, switch=9, seed=1)]  # not there yet
    base, adapters = window_norms_figure(find_window_arms(group_runs(runs)[1]), "q").axes
    assert get_curve(base, "w = 3") == {e: e + (2 + 6) / 2 + 0.5 for e in range(-1, 5)}
    assert list(get_curve(base, "w = 1")) == list(range(-1, 5))
    assert get_curve(adapters, "w = 3") == {e: (e + 4) / 2 + 0.5 for e in range(1, 5)}
    assert list(get_curve(adapters, "w = 0")) == [1, 2, 3, 4]
    assert set(get_switch_epochs(base)) == {0, 1, 3}
    assert get_band(base)[0] == pytest.approx((4.5 - 8**0.5, 4.5 + 8**0.5))  # s of 2.5 and 6.5


def test_figure7_by_hand():
    runs = [make_run("full", "full"), make_run("exp-0"), make_run("exp-1", seed=1, seconds=1.2)]
    # One slow epoch: in the average, not in the median.
    runs[0][2][1] |= {"epoch_seconds": 50, "images_per_second": 120}
    time, rate, memory = costs_figure(*group_runs(runs)).axes
    rows = dict(
        zip(
            [label.get_text() for label in time.get_yticklabels()],
            zip(*[[text.get_text().strip() for text in axes.texts] for axes in (time, rate, memory)]),
        )
    )
    assert rows == {  # 6000 images an epoch; whole runs of 120, 69 and 82.8 s; means of two seeds
        "full, full": ("10.0", "600", "20.0"),
        "exp, full": ("11.0  1.10×", "550  0.92×", "20.0  1.00×"),
        "exp, warmup": ("13.2  1.32×", "458  0.76×", "21.0  1.05×"),
        "exp, lora": ("5.50  0.55×", "1,100  1.83× (FLOPs 1.50×)", "16.0  0.80×"),
        "full, whole run": ("15.0", "400", "20.0"),
        "exp, whole run": ("9.49  0.63×", "638  1.59×", "21.0  1.05×"),
    }
    assert "GPU" in memory.get_title()
    runs = [make_run("full", "full", device="cpu"), make_run("exp", device="cpu")]
    memory = costs_figure(*group_runs(runs)).axes[2]
    assert "nothing about phases" in memory.get_xlabel() and not any(
        "×" in text.get_text() for text in memory.texts
    )


@pytest.mark.parametrize(
    "runs",
    [
        [make_run("full", "full", 1), make_run("exp", count=1)],
        [
            make_run(
                f"{name}-{seed}",
                mode,
                count,
                switch=150 + 10 * seed,
                seed=seed,
                w=w,
                every=5,
                loss=seed / 100,
                epochs=count,
            )
            for seed in range(3)
            for name, mode, count, w in [
                ("full", "full", 300, 0),
                ("control", "full", 220, 0),
                ("w5", "prelora", 300, 5),
                ("w10", "prelora", 300, 10),
                ("static_lora", "lora", 300, 10),
            ]
        ],
        [
            make_run("full", "full", device="cpu"),
            make_run("exp", seconds=0.5),
            make_run("w0", w=0, seconds=20),
            *[make_run(f"an_arm_with_a_name_that_takes_its_room-{tau}", tau=tau) for tau in range(5)],
        ],
    ],
    ids=["one epoch", "three seeds of 300 epochs", "long names and many arms"],
)
def test_nothing_is_clipped_or_overlaps_in_comparisons(runs):
    baseline, arms = group_runs(runs)
    styles = {(arm.style["color"], arm.style["linestyle"]) for arm in [baseline, *arms]}
    assert len(styles) == len(arms) + 1
    for name, figure in compare(baseline, arms).items():
        if isinstance(figure, str):
            continue
        assert is_unclipped(figure)
        texts = [
            text
            for axes in figure.axes
            for text in [*axes.texts, axes.title, axes.xaxis.label, axes.yaxis.label]
            if text.get_text()
        ]
        boxes = [artist.get_window_extent() for artist in [*texts, *figure.texts, *figure.legends]]
        if name == "figure7":  # what stands beside a bar lies in its own axes
            assert all(
                text.get_window_extent().x1 < axes.bbox.x1 for axes in figure.axes for text in axes.texts
            )
        else:
            boxes += [axes.bbox for axes in figure.axes]
            assert all(get_curves(axes) for axes in figure.axes)
        assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])


def test_skipped_figures_say_why():
    full, exp, w3 = make_run("full", "full"), make_run("exp"), make_run("w3", w=3)

    def skipped(*runs):
        return {
            name: reason for name, reason in compare(*group_runs(runs)).items() if isinstance(reason, str)
        }

    assert skipped(full, exp, w3) == {}
    no_set = "no two arms differ in lora_warmup_epochs alone"
    assert skipped(full, exp) == {"figure5": no_set, "figure6": no_set}
    assert skipped(exp, w3) == dict.fromkeys(
        ["figure4", "figure5", "figure7"], "no run has mode full, the baseline"
    )
    assert (
        skipped(full, make_run("again", "full", seed=1))["figure4"] == "there is nothing beside the baseline"
    )
    early = skipped(full, make_run("exp", count=2), make_run("w3", w=3, count=2))
    assert early == dict.fromkeys(["figure5", "figure6"], "no arm has reached its warmup")


def test_several_runs_are_compared_in_a_folder_beside_them(tmp_path, capsys, monkeypatch):
    for name in ("norms_figure", "family_figure", "change_heatmap", "rank_heatmap"):  # another test's
        monkeypatch.setattr(plot, name, lambda *args: build_figure(1, 1))
    dirs = []
    for run, config, events in [
        make_run("full", "full"),
        make_run("exp/seed0"),
        make_run("exp/seed1", seed=1, count=7),
    ]:
        dirs.append(str(write_run(tmp_path / "study" / run, pick_events(events, "epoch"), [], config=config)))
    plot.main([*dirs, dirs[0]])  # a run named twice is one
    out = capsys.readouterr().out
    folder = tmp_path / "study" / "figures"
    assert sorted(path.name for path in folder.iterdir()) == ["figure4.png", "figure7.png"]
    arms = "arm full (baseline): runs 1, epochs 8\narm exp: runs 2, epochs 7 that all of them have, up to 8\n"
    assert arms in out
    assert f"wrote {folder / 'figure4.png'}\nfigure5.png skipped: no two arms differ" in out
    assert (tmp_path / "study" / "exp" / "seed1" / "figures" / "figure1.png").exists()
    monkeypatch.setattr(plot, "compare", lambda *args: {"figure4": build_figure(1, 1)})
    plot.main([*dirs[:2], "--out", str(tmp_path / "elsewhere" / "deep")])
    assert (tmp_path / "elsewhere" / "deep" / "figure4.png").exists()
    with pytest.raises(SystemExit, match="absent"):
        plot.main([*dirs, str(tmp_path / "absent"), "--out", str(tmp_path / "unused")])
    with pytest.raises(SystemExit, match="File exists"):
        plot.main([*dirs, "--out", f"{dirs[0]}/config.json"])
    assert not (tmp_path / "unused").exists()

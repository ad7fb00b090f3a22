"""monitor/plot.py on synthetic runs: the figures hold the records' numbers, and the files are real pictures."""
import json
import subprocess
import sys
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest

from monitor import plot

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
        norms = {family: (start[family] + grow[family] * (1 - np.exp(-age / count * 5))).tolist() for family in families}
        epochs.append({"event": "epoch", "epoch": epoch, "step": epoch * 10, "phase": now, "weight_norms": norms,
                       "train_loss": 0.4 + 2 * float(np.exp(-epoch / count * 4)), "train_top1": 0.5, "adapter_norms": {},
                       "val_loss": 0.5 if val else None, "val_top1": 0.5 if val else None})
    if phase:
        return epochs, []
    ranks = {family: (2 ** rng.integers(3, 7, layers)).tolist() for family in families}
    return epochs, [{"event": "switch", "epoch": at, "step": at * 10, "from": a, "to": b, "ranks": ranks}
                    for at, a, b in [(switch, "full", "warmup"), (freeze, "warmup", "lora")]]


def write_run(run, epochs, switches, tail=""):
    run.mkdir()
    (run / "config.json").write_text(json.dumps({"model": "tiny-debug"}))
    events = sorted(epochs + switches, key=lambda event: (event["epoch"], event["event"]))
    events.insert(1, {"event": "warning", "message": "not for plotting"})
    (run / "metrics.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events) + tail)
    return run


def is_unclipped(figure):
    """Whether everything drawn, labels and legends too, lies inside the picture (0.02 inch for antialiasing)."""
    figure.draw_without_rendering()
    box, (width, height) = figure.get_tightbbox(), figure.get_size_inches()
    return min(box.x0, box.y0, width - box.x1, height - box.y1) > -0.02


def get_curves(axes):
    return [line for line in axes.lines if line.get_label() != "_switch"]


def get_switch_epochs(axes):
    return [line.get_xdata()[0] for line in axes.lines if line.get_label() == "_switch"]


def test_files_are_pictures_and_named_on_stdout(tmp_path, capsys):
    run = write_run(tmp_path / "run", *make_records())
    plot.main([str(run)])
    out = capsys.readouterr().out
    assert sorted(path.name for path in (run / "figures").iterdir()) == ["figure1.png", "figure3.png", "heatmap.png", "ranks.png"]
    for path in (run / "figures").iterdir():
        pixels = matplotlib.image.imread(path)
        assert min(pixels.shape[:2]) > 300 and len(np.unique(pixels[..., :3] @ [1, 256, 65536])) > 50  # colours
        assert f"wrote {path}\n" in out
    assert f"tensorboard --logdir {run / 'tb'}\n" in out


def test_figure1_holds_the_layer_means_and_the_switches():
    epochs, switches = make_records()
    figure = plot.norms_figure(epochs, switches)
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
    assert [text.get_text() for text in legend.get_texts()] == [*FAMILIES, "full phase", "warmup phase", "lora phase"]
    assert len({line.get_color() for line in get_curves(left)}) == 6


def test_figure3_has_a_line_per_layer():
    epochs, switches = make_records(layers=5)
    axes = plot.family_figure(epochs, switches, "fc1").axes[0]
    np.testing.assert_array_equal([line.get_ydata() for line in get_curves(axes)],
                                  np.array([record["weight_norms"]["fc1"] for record in epochs]).T)
    assert len({tuple(line.get_color()) for line in get_curves(axes)}) == 5 and get_switch_epochs(axes) == [7, 10]
    with pytest.raises(ValueError, match="no family 'dense' in this run, which has q k v proj fc1 fc2"):
        plot.family_figure(epochs, switches, "dense")


def test_heatmap_is_the_change_in_percent_by_hand():
    norms = {"q": [[10, 20], [11, 19], [11, 38]], "fc1": [[4, 0], [5, 1], [4, 1]]}  # (epochs, layers)
    epochs = [{"epoch": i + 1, "phase": "full", "weight_norms": {"q": norms["q"][i], "fc1": norms["fc1"][i]}} for i in range(3)]
    q, fc1, bar = plot.change_heatmap(epochs).axes
    np.testing.assert_allclose(q.images[0].get_array(), [[10, 0], [-5, 100]])
    np.testing.assert_allclose(np.ma.filled(fc1.images[0].get_array(), np.nan), [[25, -20], [np.nan, 0]])
    assert q.images[0].get_extent() == [1.5, 3.5, -0.5, 1.5]  # epoch 1 has no change
    assert q.images[0].get_clim() == fc1.images[0].get_clim() and sum(q.images[0].get_clim()) == 0


def test_rank_heatmap_writes_each_rank_in_its_cell():
    [axes] = plot.rank_heatmap({"q": [8, 16, 64], "fc2": [32, 8]}).axes  # fc2 has a layer fewer
    cells = {(text.get_position()[1], text.get_position()[0]): text.get_text() for text in axes.texts}
    assert cells == {(0, 0): "8", (0, 1): "16", (0, 2): "64", (1, 0): "32", (1, 1): "8"}
    assert [label.get_text() for label in axes.get_yticklabels()] == ["q", "fc2"]
    assert is_unclipped(plot.rank_heatmap({"q": [8]}))  # r_min = r_max


@pytest.mark.parametrize("records", [
    dict(layers=1, count=1, phase="full", val=False), dict(layers=24, count=300, switch=152, freeze=162),
    dict(layers=2, count=12, phase="lora", families=["q", "k", "v"]),
    dict(layers=1, switch=1, freeze=16, families=["self_attn.out_proj"]),  # labels reach out of the axes at both ends
    dict(layers=1, count=3, switch=1, freeze=2, families=list("abcdefghi")),  # more families than colours
], ids=["one epoch", "large", "static lora", "switch at the ends", "nine families"])
def test_nothing_is_clipped_or_overlaps(records):
    epochs, switches = make_records(**records)
    first = plot.norms_figure(epochs, switches)
    figures = [first, plot.family_figure(epochs, switches, next(iter(epochs[0]["weight_norms"]))), plot.change_heatmap(epochs)]
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
        monkeypatch.setattr(plot, name, lambda *args, name=name: drawn.update({name: args[-1]}) or plot._figure(1, 1))
    run = write_run(tmp_path / "run", *make_records(count=2, layers=1, phase="lora", families=["v", "q"]))
    plot.main([str(run)])
    assert drawn["family_figure"] == "q" and "rank_heatmap" not in drawn and not (run / "figures" / "ranks.png").exists()
    (run / "ranks.json").write_text(json.dumps({"q": [8]}))
    plot.main([str(run), "--family", "v"])
    assert drawn["family_figure"] == "v" and drawn["rank_heatmap"] == {"q": [8]}
    epochs, switches = make_records(layers=3, families=["v", "k"])
    other = write_run(tmp_path / "other", epochs, [*switches[:1], {**switches[1], "ranks": None}])
    (other / "ranks.json").write_text("{}")
    plot.main([str(run), str(other)])  # several runs; no q here; ranks of the switch rather than the file's
    assert drawn["family_figure"] == "v" and drawn["rank_heatmap"] == switches[0]["ranks"]
    assert (run / "figures" / "ranks.png").exists() and (other / "figures" / "figure1.png").exists()


@pytest.mark.parametrize("tail", ['{"event": "epoch", "epo', "17", '{"event": "epoch", "epoch": 17}\n{"ev'])
def test_a_torn_last_line_is_skipped_with_a_note(tmp_path, capsys, tail):
    epochs, switches = make_records(layers=1)
    config, read, read_switches = plot.load_run(write_run(tmp_path / "run", epochs, switches, tail))
    assert config == {"model": "tiny-debug"} and read[:16] == epochs and read_switches == switches
    assert len(read) == 16 + tail.count("\n")
    assert "torn last line" in capsys.readouterr().out
    plot.load_run(write_run(tmp_path / "whole", epochs, switches))
    assert capsys.readouterr().out == ""
    with pytest.raises(ValueError, match="line 20 is not a JSON object"):  # not the last line: that is damage
        plot.load_run(write_run(tmp_path / "damaged", epochs, switches, "{torn\n" + json.dumps(epochs[0])))


def test_a_run_that_cannot_be_read_is_one_line_and_nothing_is_written(tmp_path):
    good = write_run(tmp_path / "good", *make_records(layers=1))
    empty = write_run(tmp_path / "empty", *make_records(layers=1))
    (empty / "metrics.jsonl").write_text('{"event": "warning"}\n')
    with pytest.raises(ValueError, match="empty has no finished epoch"):
        plot.load_run(empty)
    (empty / "metrics.jsonl").unlink()
    with pytest.raises(SystemExit, match="empty has no finished epoch"):
        plot.main([str(empty)])
    (empty / "config.json").unlink()
    with pytest.raises(SystemExit, match="config.json is missing"):
        plot.main([str(empty)])
    with pytest.raises(SystemExit, match="no family 'dense'"):
        plot.main([str(good), "--family", "dense"])
    command = [sys.executable, "-m", "monitor.plot", good, tmp_path / "absent"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (1, "", f"error: no run directory {tmp_path / 'absent'}\n")
    assert not (good / "figures").exists()


def test_no_pyplot_state_is_made():
    code = ("import sys; sys.path.append('tests'); import test_plot as t; e, s = t.make_records(layers=1); p = t.plot\n"
            "figures = [p.norms_figure(e, s), p.family_figure(e, s, 'q'), p.change_heatmap(e), p.rank_heatmap(s[0]['ranks'])]\n"
            "assert len(figures) == 4 and 'matplotlib.pyplot' not in sys.modules")
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)

"""monitor/logger.py and monitor/log.py: what a run writes, what is left of it after a kill, what it is cut
back to.
"""

import json
import math
import re

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from errors import UserError
from monitor.log import check_logs, load_run, phase_table, read_events, read_events_until
from monitor.logger import RunLogger

LOSSES = [1 / 3, 0.1 + 0.2, 1e-300, 12345.678901234567]  # none of them is short in decimal


def build_steps(first, last):
    """Records of the steps `first` to `last`, two steps an epoch."""
    records = []
    for step in range(first, last + 1):
        loss = LOSSES[step % len(LOSSES)] + step
        epoch = (step - 1) // 2 + 1
        records.append({"step": step, "epoch": epoch, "loss": loss, "grad_norm": 1 / step, "lr": 1e-3 / step})
    return records


def build_epoch(epoch):
    fields = ["train_loss", "train_top1", "lr", "images_per_second", "data_wait_fraction", "epoch_seconds"]
    record = dict.fromkeys([*fields, "peak_memory_bytes", "trainable_params"], 1.5)
    record |= dict.fromkeys(["val_loss", "val_top1", "val_top5", "mfu"])
    record |= {"event": "epoch", "epoch": epoch, "step": 2 * epoch, "phase": "full", "adapter_norms": {}}
    return record | {"weight_norms": {"q": [1.0, 2.0]}, "slowest_rank": {"step_seconds": 0.1}}


def get_lines(path):
    return [strict_json(line) for line in path.read_text().splitlines()]


def strict_json(line):
    """As a reader that keeps to the standard: NaN and Infinity are no JSON."""

    def refuse(name):
        raise ValueError(f"{name} is not JSON")

    return json.loads(line, parse_constant=refuse)


def get_scalars(run_dir, tag):
    """{step: value} as TensorBoard shows it."""
    accumulator = EventAccumulator(str(run_dir / "tb"))
    accumulator.Reload()
    return {event.step: event.value for event in accumulator.Scalars(tag)}


def test_steps_are_written_in_full_precision_and_at_once(tmp_path):
    logger = RunLogger(tmp_path, 0, 10)
    records = build_steps(1, 3)
    logger.write_steps(records)
    # Equal floats, to the bit, with the logger still open.
    assert get_lines(tmp_path / "steps.jsonl") == records
    assert logger.steps_bytes == (tmp_path / "steps.jsonl").stat().st_size
    logger.write_steps([])
    assert get_scalars(tmp_path, "step/loss") == pytest.approx({r["step"]: r["loss"] for r in records})
    assert get_scalars(tmp_path, "step/grad_norm") == pytest.approx(
        {r["step"]: r["grad_norm"] for r in records}
    )
    assert get_scalars(tmp_path, "step/lr") == pytest.approx({r["step"]: r["lr"] for r in records})
    logger.close()


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_was_before_a_nan_is_there_after_it(tmp_path, bad):
    good = build_steps(1, 2)
    last = {"step": 3, "epoch": 2, "loss": bad, "grad_norm": bad, "lr": 1e-3}
    logger = RunLogger(tmp_path, 0, 10)
    logger.write_steps([*good, last])
    assert math.isnan(logger.step_losses[-1]) == math.isnan(bad)
    logger.close()
    with pytest.raises(ValueError, match="NaN is not JSON"):  # the control: this reader is strict
        strict_json(json.dumps(math.nan))
    assert get_lines(tmp_path / "steps.jsonl") == [*good, {**last, "loss": None, "grad_norm": None}]
    resumed = RunLogger(tmp_path, 3, 10, steps_bytes=(tmp_path / "steps.jsonl").stat().st_size, enabled=False)
    assert resumed.step_losses[:2] == [r["loss"] for r in good] and math.isnan(resumed.step_losses[2])


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_an_epoch_that_is_not_finite_is_null_in_its_log(tmp_path, bad):
    """Norms, validation, and what a switch says; a reader has NaN where it was, and None where nothing was
    evaluated."""
    numbers = {"val_top1": 10.0, "val_top5": 50.0, "val_loss": bad, "train_loss": bad}
    lost = build_epoch(1) | numbers | {"weight_norms": {"q": [1.0, bad]}, "adapter_norms": {"q": (bad, 2.0)}}
    logger = RunLogger(tmp_path, 0, 10)
    logger.epoch(lost, heatmap=False)
    logger.epoch(build_epoch(2), heatmap=False)
    logger.write({"event": "switch", "from": "full", "seconds": bad})
    logger.close()
    first, second, switch = get_lines(tmp_path / "metrics.jsonl")
    assert first["val_loss"] is None and first["train_loss"] is None and first["val_top1"] == 10.0
    assert first["weight_norms"] == {"q": [1.0, None]} and first["adapter_norms"] == {"q": [None, 2.0]}
    assert switch["seconds"] is None and second == build_epoch(2)  # control
    (tmp_path / "config.json").write_text("{}")
    read = load_run(tmp_path).epochs
    assert math.isnan(read[0]["val_loss"]) and math.isnan(read[0]["train_loss"])
    assert math.isnan(read[0]["weight_norms"]["q"][1]) and math.isnan(read[0]["adapter_norms"]["q"][0])
    assert read[1] == build_epoch(2) and read[1]["val_loss"] is None


def test_losses_of_the_epoch_under_way_are_taken_at_its_end(tmp_path):
    logger = RunLogger(tmp_path, 0, 10)
    steps = build_steps(1, 3)
    logger.write_steps(steps[:1])
    logger.write_steps(steps[1:2])
    assert logger.take_step_losses() == [r["loss"] for r in steps[:2]] and logger.step_losses == []
    logger.epoch(build_epoch(1), heatmap=False)
    logger.write_steps(steps[2:])
    assert logger.step_losses == [steps[2]["loss"]]
    logger.close()


@pytest.fixture
def stopped(tmp_path):
    """A run that saved a checkpoint in its second epoch, after step 3, and was killed while it wrote step 5:
    (run directory, length of metrics.jsonl and of steps.jsonl at the checkpoint).
    """
    logger = RunLogger(tmp_path, 0, 10)
    logger.write({"event": "start", "epoch": 0})
    logger.write_steps(build_steps(1, 2))
    logger.take_step_losses()
    logger.epoch(build_epoch(1), heatmap=False)
    logger.write_steps(build_steps(3, 3))
    lengths = logger.metrics_bytes, logger.steps_bytes
    logger.write_steps(build_steps(4, 4))
    logger.epoch(build_epoch(2), heatmap=False)
    logger.close()
    with open(tmp_path / "steps.jsonl", "a") as file:
        file.write('{"step": 5, "epo')
    return tmp_path, *lengths


def test_logs_are_cut_back_to_the_checkpoint(stopped, capsys):
    run_dir, metrics_bytes, steps_bytes = stopped
    assert [r["step"] for r in read_events(run_dir / "steps.jsonl")] == [1, 2, 3, 4]
    assert "skipped a torn last line" in capsys.readouterr().out
    logger = RunLogger(run_dir, 3, 10, metrics_bytes, steps_bytes)
    assert [e["epoch"] for e in logger.epochs] == [1]
    assert logger.step_losses == [build_steps(3, 3)[0]["loss"]]  # to the bit, and of this epoch alone
    assert (logger.metrics_bytes, logger.steps_bytes) == (metrics_bytes, steps_bytes)
    again = build_steps(4, 6)
    for record in again:
        record["loss"] += 1
    logger.write_steps(again)
    logger.epoch(build_epoch(2), heatmap=False)
    logger.close()
    assert get_lines(run_dir / "steps.jsonl") == build_steps(1, 3) + again
    assert [r["event"] for r in get_lines(run_dir / "metrics.jsonl")] == ["start", "epoch", "epoch"]
    losses = {r["step"]: r["loss"] for r in build_steps(1, 3) + again}
    # Nothing twice, nothing of the killed run.
    assert get_scalars(run_dir, "step/loss") == pytest.approx(losses)


def test_every_process_remembers_the_same_but_only_one_writes(stopped):
    run_dir, metrics_bytes, steps_bytes = stopped
    before = {path: path.read_bytes() for path in run_dir.rglob("*") if path.is_file()}
    other = RunLogger(run_dir, 3, 10, metrics_bytes, steps_bytes, enabled=False)
    assert (other.metrics_bytes, other.steps_bytes) == (0, 0)
    other.write_steps(build_steps(4, 4))
    losses = other.take_step_losses()
    other.epoch(build_epoch(2), heatmap=True)
    other.warning(2, 4, "silent")
    other.close()
    assert {path: path.read_bytes() for path in run_dir.rglob("*") if path.is_file()} == before
    one = RunLogger(run_dir, 3, 10, metrics_bytes, steps_bytes)
    one.write_steps(build_steps(4, 4))
    assert one.take_step_losses() == losses and len(losses) == 2
    one.epoch(build_epoch(2), heatmap=False)
    assert one.epochs == other.epochs and len(one.epochs) == 2
    one.close()


def test_a_fork_starts_with_no_steps_and_the_epochs_it_is_given(tmp_path):
    (tmp_path / "steps.jsonl").write_text("of an attempt before\n")
    logger = RunLogger(tmp_path, 2, 10)
    logger.copy(build_epoch(1))
    assert logger.step_losses == [] and logger.steps_bytes == 0 and len(logger.epochs) == 1
    logger.write_steps(build_steps(3, 3))
    lengths = logger.metrics_bytes, logger.steps_bytes
    logger.close()
    resumed = RunLogger(tmp_path, 3, 10, *lengths, enabled=False)
    assert resumed.step_losses == [build_steps(3, 3)[0]["loss"]] and len(resumed.epochs) == 1


@pytest.mark.parametrize("name", ["metrics.jsonl", "steps.jsonl"])
def test_a_log_that_has_lost_something_is_an_error(stopped, name):
    run_dir, metrics_bytes, steps_bytes = stopped
    # The control: longer is what a killed run leaves.
    check_logs(run_dir, metrics_bytes, steps_bytes, "step_00000003")
    path = run_dir / name
    text = f"{path} is missing or shorter than it was when step_00000003 was saved"
    length = {"metrics.jsonl": metrics_bytes, "steps.jsonl": steps_bytes}[name]
    path.write_bytes(path.read_bytes()[: length - 1])
    with pytest.raises(UserError) as error:
        check_logs(run_dir, metrics_bytes, steps_bytes, "step_00000003")
    assert str(error.value) == text
    path.unlink()
    with pytest.raises(UserError, match="is missing or shorter"):
        check_logs(run_dir, metrics_bytes, steps_bytes, "step_00000003")


def test_a_checkpoint_that_knows_of_no_steps_needs_none(stopped):
    run_dir, metrics_bytes, _ = stopped
    (run_dir / "steps.jsonl").unlink()
    check_logs(run_dir, metrics_bytes, 0, "step_00000003")
    assert RunLogger(run_dir, 3, 10, metrics_bytes, 0, enabled=False).step_losses == []


@pytest.mark.parametrize("name", ["metrics.jsonl", "steps.jsonl"])
def test_damage_before_the_checkpoint_is_an_error(stopped, name):
    run_dir, metrics_bytes, steps_bytes = stopped
    path = run_dir / name
    path.write_bytes(b"x" + path.read_bytes()[1:])
    with pytest.raises(UserError, match=f"{name}: line 1 is not a JSON object"):
        RunLogger(run_dir, 3, 10, metrics_bytes, steps_bytes)


TWICE = [5, 7, 6, 8, 7, 8]  # epochs of two processes that wrote one log


@pytest.mark.parametrize("numbers", [TWICE, [1, 2, 2, 3], [1, 3], [1, 2, 1]])
def test_a_log_of_two_writers_is_refused_wherever_it_is_read(tmp_path, numbers):
    """A warning in between, or an epoch that a fork begins with, is none."""
    files = {
        "metrics.jsonl": [{"event": "epoch", "epoch": n, "step": n} for n in numbers],
        "steps.jsonl": [{"step": n, "loss": 1.0} for n in numbers],
    }
    at = next(i for i in range(1, len(numbers)) if numbers[i] != numbers[i - 1] + 1)
    for (name, records), kind in zip(files.items(), ("epoch", "step")):
        records.insert(1, {"event": "warning", "epoch": 9})
        path = tmp_path / name
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
        says = f"{path}: line {at + 2} has {kind} {numbers[at]} after {kind} {numbers[at - 1]}: two processes"
        with pytest.raises(UserError, match=re.escape(says)):
            read_events(path)
        with pytest.raises(UserError, match=re.escape(says)):
            read_events_until(path, path.stat().st_size)
        path.write_text("".join(json.dumps(record) + "\n" for record in records[: at + 1]))
        assert len(read_events(path)) == at + 1  # the control: up to there it is one writer's


def write_metrics(logger):
    logger.write({"event": "start"})


def write_steps(logger):
    logger.write_steps(build_steps(1, 2))


@pytest.mark.parametrize("file, write", [("metrics_file", write_metrics), ("steps_file", write_steps)])
def test_a_full_disk_is_one_sentence(tmp_path, file, write):
    logger = RunLogger(tmp_path, 0, 10)
    write(logger)  # the control
    getattr(logger, file).close()
    setattr(logger, file, open("/dev/full", "a"))
    with pytest.raises(UserError) as error:
        write(logger)
    assert str(error.value) == "/dev/full can't be written: No space left on device"
    logger.close()  # what could not be written does not fail once more


def test_a_full_disk_under_tensorboard_is_one_sentence(tmp_path, monkeypatch):
    def refuse(*args):
        raise OSError(28, "No space left on device")

    logger = RunLogger(tmp_path, 0, 10)
    monkeypatch.setattr(logger.tensorboard, "add_scalar", refuse)
    for write in (lambda: logger.write_steps(build_steps(1, 2)), lambda: logger.epoch(build_epoch(1), False)):
        with pytest.raises(UserError) as error:
            write()
        assert str(error.value) == f"{tmp_path / 'tb'} can't be written: No space left on device"
    assert get_lines(tmp_path / "steps.jsonl") == build_steps(1, 2)  # that file was written
    monkeypatch.undo()
    logger.close()


def test_a_folder_that_takes_no_files_is_one_sentence(tmp_path):
    (tmp_path / "steps.jsonl").mkdir()
    with pytest.raises(UserError, match="steps.jsonl can't be read: Is a directory"):
        RunLogger(tmp_path, 0, 10)
    (tmp_path / "steps.jsonl").rmdir()
    (tmp_path / "metrics.jsonl").symlink_to(tmp_path / "absent" / "metrics.jsonl")
    with pytest.raises(UserError, match="metrics.jsonl can't be written: No such file or directory"):
        RunLogger(tmp_path, 0, 10)


def test_a_log_that_cannot_be_read_is_the_users_error(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "metrics.jsonl").mkdir()
    with pytest.raises(UserError, match="metrics.jsonl can't be read: Is a directory"):
        load_run(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match="config.json is damaged"):
        load_run(tmp_path)


def test_phase_table_tells_frozen_blocks_apart():
    epochs = [build_epoch(1), build_epoch(2) | {"frozen_blocks": 2, "trainable_params": 3}]
    table = phase_table(epochs).splitlines()
    assert len(table) == 3 and "full, frozen" in table[2] and " 3 " in table[2]


def test_phase_table_of_epochs_without_evaluation():
    table = phase_table([build_epoch(1), build_epoch(2)]).splitlines()
    assert len(table) == 2 and table[1].split() == ["full", "2", "1.5", "2", "1.5", "0.00", "GiB", "-"]

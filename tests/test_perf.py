"""monitor/perf.py: time of forwards by hooks, time spent waiting, a trace."""

import json
import time

import pytest
import torch
from torch import nn

from monitor.perf import Stopwatch, TimedIterator, start_trace

CPU = torch.device("cpu")


def test_every_forward_is_watched_and_none_after_it():
    model, images = nn.Sequential(nn.Linear(4, 4), nn.ReLU()), torch.randn(2, 4)
    plain, stopwatch = model(images), Stopwatch(CPU)
    order = []
    model.register_forward_pre_hook(lambda *_: order.append(len(stopwatch.marks)))
    model.register_forward_hook(lambda *_: order.append(len(stopwatch.marks)))
    with stopwatch.watch(model) as watching:
        assert watching is stopwatch and stopwatch.seconds() == 0
        assert torch.equal(model(images), plain)
        model(images)
        assert order == [1, 1, 3, 3]  # the other hooks run within what is timed
    marks = list(stopwatch.marks)
    assert len(marks) == 4 and marks == sorted(marks)
    assert stopwatch.seconds() == pytest.approx(marks[1] - marks[0] + marks[3] - marks[2])
    model(images)
    assert stopwatch.marks == marks


def test_hooks_are_gone_after_an_error():
    model, stopwatch = nn.Linear(4, 4), Stopwatch(CPU)
    with pytest.raises(RuntimeError), stopwatch.watch(model):
        model(torch.randn(2, 3))
    assert not model._forward_pre_hooks and not model._forward_hooks


def test_watching_leaves_compiled_blocks_alone():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    for block in model:
        block.compile(backend="eager", fullgraph=True)
    images = torch.randn(2, 4)
    model(images)
    with torch.compiler.set_stance("fail_on_recompile"), Stopwatch(CPU).watch(model) as stopwatch:
        model(images)
    assert len(stopwatch.marks) == 2


def test_waiting_is_counted_in_next_and_nowhere_else(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])
    closed = []

    def slow_batches():
        try:
            for number in range(3):
                clock[0] += 2.0
                yield number
        finally:
            closed.append(True)

    batches = TimedIterator(slow_batches())
    assert next(batches) == 0 and batches.waited == 2
    clock[0] += 100  # a step
    assert next(batches) == 1 and batches.waited == 4
    assert not closed
    batches.close()
    assert closed and list(batches) == []


def test_a_trace_of_two_steps(tmp_path):
    path = tmp_path / "profile" / "full.json"
    tracer = start_trace(path)
    for _ in range(3):
        torch.randn(8, 8).mm(torch.randn(8, 8))
        assert not path.exists()
        tracer.step()
    tracer.stop()
    products = [
        event for event in json.loads(path.read_text())["traceEvents"] if event.get("name") == "aten::mm"
    ]
    assert len(products) == 2  # the first step is left out

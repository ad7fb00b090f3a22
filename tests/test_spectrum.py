"""monitor/spectrum.py: singular values against torch's SVD, whole and on several processes, and what that
sends and holds; and ranks by them, from a run's log."""

import json
import math
from unittest import mock

import pytest
import torch
from small_runs import (
    assert_same_run,
    events,
    get_error,
    get_steps,
    no_figures,  # noqa: F401 (a fixture)
    resume,
    run,
    saved_at,
)
from test_displacement import at, build_net, build_pair, move
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

import replay
import train
from benchmarks.wire import WireCounter
from config.cli import typed_config
from launch import distributed
from lora.ranks import count_parameters, spectrum_ranks
from model.parallel import build_mesh
from model.variants import VARIANTS
from monitor.displacement import Displacement
from monitor.spectrum import get_singular_values
from start import count_base, decide_ranks

# ---- one matrix


def get_matrix(rows, columns, values):
    """A random matrix with these singular values."""
    torch.manual_seed(0)
    U, V = (torch.linalg.qr(torch.randn(n, len(values), dtype=torch.float64)).Q for n in (rows, columns))
    return ((U * torch.tensor(values, dtype=torch.float64)) @ V.T).float()


def get_errors(D, count):
    """(largest relative error of a singular value, of their summed squares), both to below."""
    exact = torch.linalg.svdvals(D.double())[:count]
    found = get_singular_values(D, 0, 1, count)
    assert (found[:-1] >= found[1:]).all() and (found <= exact * (1 + 1e-6)).all()
    return ((exact - found) / exact).max().item(), 1 - (found.square().sum() / exact.square().sum()).item()


@pytest.mark.parametrize(
    "rows, columns, decay, each, together",
    [
        (512, 256, lambda i: 1 / i, 0.03, 2e-4),
        (256, 512, lambda i: 1 / i, 0.03, 2e-4),
        (512, 256, lambda i: i**-0.5, 0.05, 5e-3),
        (256, 256, lambda i: 0.98**i, 0.02, 2e-3),
        (256, 256, lambda i: 0.9**i, 1e-4, 1e-9),
    ],
)
def test_decaying_spectra(rows, columns, decay, each, together):
    values = [decay(i) for i in range(1, 257)]
    errors = get_errors(get_matrix(rows, columns, values), 32)
    assert errors[0] < each and errors[1] < together


@pytest.mark.parametrize("rows, columns", [(320, 320), (1024, 256), (256, 1024)])
def test_noise_is_the_worst_case(rows, columns):
    torch.manual_seed(0)
    errors = get_errors(torch.randn(rows, columns), 64)
    assert 1e-4 < errors[0] < 0.085 and errors[1] < 0.09


@pytest.mark.parametrize("rows, columns, count", [(12, 100, 4), (100, 12, 4), (12, 100, 64), (100, 12, 64)])
def test_exact_where_the_block_reaches_all_rows_or_columns(rows, columns, count):
    torch.manual_seed(0)
    D = torch.randn(rows, columns)
    exact = torch.linalg.svdvals(D.double())[:count]
    torch.testing.assert_close(get_singular_values(D, 0, 1, count), exact, rtol=1e-9, atol=0)


def test_of_low_rank_and_of_nothing():
    D = get_matrix(100, 80, [3.0, 2.0])
    found = get_singular_values(D, 0, 1, 8)
    torch.testing.assert_close(found[:2], torch.tensor([3.0, 2.0], dtype=torch.float64), rtol=1e-6, atol=0)
    assert found[2:].max() < 1e-6
    assert get_singular_values(torch.zeros(100, 80), 0, 1, 8).tolist() == [0.0] * 8


def test_row_parts():
    torch.manual_seed(0)
    D = torch.randn(30, 9) * torch.arange(1, 31)[:, None]
    for part in range(3):
        exact = torch.linalg.svdvals(D[10 * part :][:10].double())
        torch.testing.assert_close(get_singular_values(D, part, 3, 4), exact[:4], rtol=1e-9, atol=0)


# ---- of a window

FUSED = {"q": [("a", 0, 2)], "k": [("a", 1, 2)]}


def test_a_window_by_hand_without_the_decay():
    """Two rows a part, each with one number of D besides what decay has left: 3 and 4, and 5 and 0."""
    D = torch.zeros(4, 17)
    D[0, 2], D[1, 7], D[2, 3] = 3.0, -4.0, 5.0
    found = {}
    for taken_out in (0.1, 0.0):  # the second is the control
        net = build_net(4)  # of ones
        displacement = Displacement(net, FUSED, 1, taken_out, num_singular_values=2)
        displacement.begin(net, 0)
        move(net, 0.7 * 0.6, D)  # 1 - 3 * 0.1 and 1 - 4 * 0.1
        found[taken_out] = displacement.end_epoch(net, 1, 2, at(3.0, 4.0))["spectrum"]
    expected = {"q": [[4.0, 3.0]], "k": [[5.0, 0.0]]}
    for family, (values,) in found[0.1].items():
        assert values == pytest.approx(expected[family][0], abs=1e-5)
    assert found[0.0]["q"][0] != pytest.approx(expected["q"][0], abs=0.1)


def test_six_digits_and_no_more_values_than_there_are():
    net, families = build_pair()
    displacement = Displacement(net, families, 1, 0.0, num_singular_values=99)
    displacement.begin(net, 0)
    move(torch.nn.ModuleDict({"a": net[0]}), 1.0, torch.randn(32, 32))
    spectrum = displacement.end_epoch(net, 1, 1, at(1.0))["spectrum"]
    assert [len(values) for values in spectrum["q"]] == [16, 16]  # a part's rows
    assert all(value == float(f"{value:.6g}") for value in spectrum["q"][0])
    assert spectrum["q"][1] == [0.0] * 16  # it has not changed


def test_a_frozen_layer_has_none():
    net, families = build_pair()
    net[0].weight.requires_grad = False
    displacement = Displacement(net, families, 1, 0.0, num_singular_values=4)
    displacement.begin(net, 0)
    move(torch.nn.ModuleDict({"a": net[1]}), 1.0, torch.randn(32, 32))
    spectrum = displacement.end_epoch(net, 1, 1, at(1.0))["spectrum"]
    for layers in spectrum.values():
        assert layers[0] == [0.0] * 4 and min(layers[1]) > 1


# ---- on several processes

ROWS, COLUMNS, COUNT = 3 * 34, 96, 8  # 2 and 4 processes cut the rows within q, k and v, 4 unevenly
BLOCK, BASIS = COUNT + 8, 3 * (COUNT + 8)


class Counter(WireCounter):
    """Counts broadcasts, too, and the largest tensor that any operator has given back, in bytes."""

    def __init__(self):
        super().__init__()
        self.largest, self.broadcast = 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = super().__torch_dispatch__(func, types, args, kwargs)
        for tensor in out if isinstance(out, (tuple, list)) else [out]:
            if type(tensor) is torch.Tensor:
                self.largest = max(self.largest, tensor.numel() * tensor.element_size())
        return out

    def count(self, func, out, args, kwargs):
        if "broadcast" in func.__name__:
            self.broadcast += sum(t.numel() * t.element_size() for t in args[0])
        else:
            super().count(func, out, args, kwargs)


def get_fused():
    torch.manual_seed(0)
    return torch.randn(ROWS, COLUMNS) / torch.arange(1, COLUMNS + 1) ** 0.5


def measure_on_rank(dp_shard, dim):
    """Values of q, k and v; bytes sent by collective, of broadcasts, of the largest tensor, of a gather."""
    distributed.start()
    mesh = build_mesh(dp_shard, "cpu", distributed.TIMEOUT)
    D = get_fused()
    if mesh is not None:
        placements = [Replicate()] * (mesh.ndim - 1) + [Shard(dim)]
        D = distribute_tensor(D, mesh, placements)
    with Counter() as counter:
        values = [get_singular_values(D, part, 3, COUNT).tolist() for part in range(3)]
    with Counter() as gathering:  # the control
        D.full_tensor() if mesh is not None else None
    distributed.finish()
    return values, counter.sent, counter.broadcast, counter.largest, gathering.sent["all-gather"]


@pytest.mark.parametrize(
    "processes, dp_shard, dim",
    [(1, None, 0), (2, None, 0), (4, None, 0), (4, 2, 0), (2, None, 1), (4, 2, 1)],
)
def test_on_several_processes_it_is_a_plain_svd(on_ranks, processes, dp_shard, dim):
    """FSDP and HSDP, by rows and by columns: the same numbers on every process, and never the matrix."""
    whole = get_fused()
    exact = torch.stack([torch.linalg.svdvals(part.double())[:COUNT] for part in whole.chunk(3)])
    shards = dp_shard or processes
    width = ROWS // 3 if dim else COLUMNS  # of what is sharded by columns the part's transpose is meant
    basis = min(BASIS, width)
    found = on_ranks(processes, measure_on_rank, dp_shard, dim)
    for values, sent, broadcast, largest, gathered in found:
        assert values == found[0][0]  # to the bit
        torch.testing.assert_close(torch.tensor(values, dtype=torch.float64), exact, rtol=5e-3, atol=0)
        alone = [get_singular_values(whole, part, 3, COUNT).tolist() for part in range(3)]
        if not dim:  # by columns another random block is taken, of another length
            assert sum(values, []) == pytest.approx(sum(alone, []), rel=1e-6)
        # of each part two sums in float32 and one in float64, and the values themselves
        summed = 3 * (2 * 4 * width * BLOCK + 8 * basis**2)
        assert sent["all-reduce"] == pytest.approx(2 * summed * (shards - 1) / shards)
        assert sent["all-gather"] == sent["reduce-scatter"] == 0
        dims = 0 if processes == 1 else 2 if shards < processes else 1
        assert broadcast == 3 * 8 * COUNT * dims
        # the largest tensor: this process's share of D, its own rows of a part in float64, or the basis
        own_rows = min(math.ceil((COLUMNS if dim else ROWS) / shards), COLUMNS if dim else ROWS // 3)
        assert largest <= max(8 * own_rows * width, 8 * width * BASIS, 4 * ROWS * COLUMNS // shards)
        if shards > 1:
            assert gathered >= 4 * ROWS * COLUMNS * (shards - 1) / shards


def forget_the_others_on_rank():
    with mock.patch("monitor.spectrum.sum_shards", lambda tensor, D: tensor):
        return measure_on_rank(None, 0)[0]


def test_control_without_the_sums_it_is_another_spectrum(on_ranks):
    exact = [torch.linalg.svdvals(part.double())[:COUNT] for part in get_fused().chunk(3)]
    found = torch.tensor(on_ranks(2, forget_the_others_on_rank)[0], dtype=torch.float64)
    assert ((found - torch.stack(exact)) / torch.stack(exact)).abs().max() > 0.1


# ---- the rule

COSTS = {"q": [2, 2], "fc1": [5, 5]}  # parameters a rank adds
SPECTRUM = {
    "q": [[9, 4, 3, 3, 2, 0], [9, 1, 0, 0, 0, 0]],
    "fc1": [[7, 6, 5, 4, 3, 2], [2, 1, 1, 1, 1, 1]],
}
# Blocks of rank_min 2 more: of q's first layer σ² 9 + 9 = 18 over 4 parameters and 4 over 4; of its second
# nothing; of fc1's 25 + 16 = 41 over 10 and 9 + 4 = 13 over 10, 2 and 2 over 10. So the order is q0 4.5,
# fc1.0 4.1, fc1.0 1.3, q0 1, fc1.1 0.2 and 0.2, q1 0 and 0. Rank 2 everywhere costs 28.


@pytest.mark.parametrize(
    "budget, q, fc1",
    [
        (28, [2, 2], [2, 2]),
        (31, [2, 2], [2, 2]),
        (32, [4, 2], [2, 2]),
        (41, [4, 2], [2, 2]),  # the next costs 10; nothing cheaper goes before it
        (42, [4, 2], [4, 2]),
        (52, [4, 2], [6, 2]),
        (56, [6, 2], [6, 2]),
        (66, [6, 2], [6, 4]),
        (76, [6, 2], [6, 6]),
        (80, [6, 4], [6, 6]),
        (10**6, [6, 6], [6, 6]),  # what has six singular values has no rank above
    ],
)
def test_the_rule_by_hand(budget, q, fc1):
    ranks = spectrum_ranks(SPECTRUM, COSTS, budget, 2, 16)
    assert ranks == {"q": q, "fc1": fc1} and count_parameters(ranks, COSTS) <= budget


def test_the_rule_captures_the_most_that_a_budget_pays_for():
    """Of equal costs: no other choice of so many blocks has larger squares."""
    torch.manual_seed(0)
    values = torch.rand(6, 16).sort(descending=True).values * torch.rand(6, 1)
    spectrum = {"q": values[:3].tolist(), "fc1": values[3:].tolist()}
    ranks = spectrum_ranks(spectrum, {"q": [3] * 3, "fc1": [3] * 3}, 3 * (6 * 2 + 2 * 15), 2, 16)
    blocks = values.square().unflatten(1, (8, 2)).sum(2)[:, 1:].flatten().sort(descending=True).values
    taken = sum(
        sum(value**2 for value in layer[2:rank])
        for family in ranks
        for layer, rank in zip(spectrum[family], ranks[family])
    )
    assert taken == pytest.approx(blocks[:15].sum().item())
    # ties: the lower block, then the family's name, then the first layer
    equal = {"q": [[1.0] * 8] * 2, "fc1": [[1.0] * 8]}
    costs = {"q": [1, 1], "fc1": [1]}
    ranks = [spectrum_ranks(equal, costs, budget, 2, 8) for budget in (6, 8, 10, 12, 14)]
    assert [(r["fc1"], r["q"]) for r in ranks] == [
        ([2], [2, 2]), ([4], [2, 2]), ([4], [4, 2]), ([4], [4, 4]), ([6], [4, 4])
    ]  # fmt: skip


# ---- runs of two blocks, 4 steps an epoch, windows of 2 epochs

STEPS = 4
SHORT = (
    "--train_samples 80 --epochs 9 --lr_warmup_steps 0 --window_epochs 2 --eval_every 9 --log_displacement"
)
LOGGED, SILENT = [*SHORT.split(), "True"], [*SHORT.split(), "False"]
FULL = ["--mode", "full", "--keep_every", 1, "--max_steps", 6 * STEPS]
PRELORA = ["--mode", "prelora", "--rank_rule", "spectrum", "--max_steps"]


@pytest.fixture(scope="module", autouse=True)
def two_blocks():
    with mock.patch.dict(VARIANTS["tiny-debug"], depth=2):
        yield


@pytest.fixture(scope="module")
def full(small, two_blocks, tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("spectrum") / "full"
    run(small, run_dir, *LOGGED, *FULL)
    return run_dir


@pytest.fixture(scope="module")
def silent(small, two_blocks, tmp_path_factory):
    """The same without a spectrum."""
    run_dir = tmp_path_factory.mktemp("silent") / "full"
    run(small, run_dir, *SILENT, *FULL)
    return run_dir


def test_a_runs_spectrum_is_that_of_its_checkpoints(full):
    records = events(full, "epoch")
    assert [record["epoch"] for record in records if "spectrum" in record] == [2, 4, 6]
    rates = [record["lr"] for record in get_steps(full)]
    for first, last in ((2, 4), (4, 6)):
        decay = math.prod(1 - lr * train.Config().weight_decay for lr in rates[first * STEPS : last * STEPS])
        before, after = (saved_at(full, epoch * STEPS) for epoch in (first, last))
        spectrum = records[last - 1]["spectrum"]
        for name, family, part, parts in (("attn.qkv", "v", 2, 3), ("mlp.fc1", "fc1", 0, 1)):
            W, W_before = (tensors[f"model.blocks.1.{name}.weight"].double() for tensors in (after, before))
            exact = torch.linalg.svdvals((W - decay * W_before).chunk(parts)[part])[:32]
            assert spectrum[family][1] == pytest.approx(exact.tolist(), rel=1e-4)


def test_replay_names_the_ranks_and_a_fork_has_them_and_resumes_to_the_bit(small, full, tmp_path, capsys):
    assert replay.main([str(full), "--rank_rule", "minmax", "spectrum"]) == 0
    rows, _, _ = replay.get_rows(str(full), replay.Replay(rank_rule=("minmax", "spectrum")))
    minmax, spectrum = rows
    assert minmax["switch_epoch"] == spectrum["switch_epoch"] == 4
    assert minmax["ranks"] != spectrum["ranks"]
    cfg = typed_config(train.Config, json.loads((full / "config.json").read_text()), "")
    _, costs = count_base(cfg, train.build_net(cfg))
    found = events(full, "epoch")[3]["spectrum"]
    assert spectrum["ranks"] == spectrum_ranks(found, costs, minmax["adapter_params"], 4, 32)
    largest_block = 4 * max(costs["fc1"])
    short_of = minmax["adapter_params"] - spectrum["adapter_params"]
    assert 0 <= short_of < largest_block

    fork = ["--fork", f"{full}@3", *LOGGED, *PRELORA]
    whole = run(small, tmp_path / "whole", *fork, 7 * STEPS)
    switch = next(event for event in whole if event["event"] == "switch")
    assert (switch["epoch"], switch["ranks"]) == (4, spectrum["ranks"])
    assert [e for e in whole if e["event"] == "warning" and "spectrum" in e["message"]] == []
    run(small, tmp_path / "cut", *fork, 3 * STEPS + 2)  # within the window
    for steps in (4 * STEPS + 1, 7 * STEPS):  # across the switch
        assert resume(tmp_path / "cut", "--max_steps", steps) == 0
    assert_same_run(tmp_path / "cut", tmp_path / "whole")


def go_on_rank(arguments):
    with mock.patch.dict(VARIANTS["tiny-debug"], depth=2):
        return train.main([str(argument) for argument in arguments])


def test_a_run_on_two_processes_has_the_ranks_of_one(on_ranks, small, full, tmp_path):
    plain = "--dropout 0 --drop_path 0 --mixup 0".split()
    flags = ["--fork", f"{full}@2", "--data_dir", small, *plain, *PRELORA, 5 * STEPS, "--run_dir"]
    for processes in (1, 2):
        assert on_ranks(processes, go_on_rank, [*flags, tmp_path / str(processes)]) == [0] * processes
    alone, both = (events(tmp_path / name, "epoch")[3]["spectrum"] for name in "12")
    for family in alone:
        for mine, theirs in zip(alone[family], both[family]):
            assert mine == pytest.approx(theirs, rel=1e-4)
    alone, both = (events(tmp_path / name, "switch")[0]["ranks"] for name in "12")
    assert alone == both


def refuse(small, tmp_path, capsys, *flags):
    """The sentence with which train.py refuses these flags, having left no run."""
    capsys.readouterr()
    arguments = [*flags, "--data_dir", small, "--run_dir", tmp_path / "refused"]
    assert train.main([str(argument) for argument in arguments]) == 2
    assert not (tmp_path / "refused").exists()
    return get_error(capsys)


def test_what_is_certain_to_be_lacking_is_said_at_the_start(small, full, silent, tmp_path, capsys):
    fork = lambda source, *flags: refuse(
        small, tmp_path, capsys, "--fork", source, *LOGGED, *PRELORA, 5 * STEPS, *flags
    )
    none = "rank_rule spectrum finds no spectrum in the log up to epoch"
    assert f"{none} 4: choose another rank_rule, or a log with" in fork(f"{silent}@4")  # due at once
    assert f"{none} 3" in fork(f"{silent}@3", "--switch_epoch", 4)  # within a window
    assert f"{none} 4" in fork(f"{full}@4", "--window_epochs", 1, "--switch_epoch", 4)  # other windows
    larger = fork(f"{full}@4", "--rank_max", 64)
    assert (
        "needs 64 singular values of each layer for rank_max 64, the newest in the log, of epoch 4, are"
        in (larger)
    )
    assert "32: rank_max 32 can be had, or another rank_rule" in larger
    assert "needs a run with --log_displacement True" in fork(f"{full}@4", "--log_displacement", "False")
    # controls: the same where there is time for a window, or with what the log has
    for name, source, *flags in (
        ("a", f"{silent}@2", "--switch_epoch", 4),
        ("b", f"{silent}@3", "--switch_epoch", 6),
        ("c", f"{full}@4", "--rank_max", 16),
    ):
        done = run(small, tmp_path / name, "--fork", source, *LOGGED, *PRELORA, 4 * STEPS + 1, *flags)
        assert done[-1]["event"] != "warning"


def test_resumed_with_the_rule_where_the_log_has_nothing_for_it(small, silent, tmp_path, capsys):
    """Within epoch 5, the window of which was not followed, on the way to a switch after epoch 6."""
    run_dir, prelora = tmp_path / "run", ["--mode", "prelora", "--switch_epoch", 6]
    run(small, run_dir, "--fork", f"{silent}@4", *SILENT, *prelora, "--max_steps", 4 * STEPS + 1)
    flags = "--rank_rule spectrum --log_displacement True --max_steps".split()
    capsys.readouterr()
    assert resume(run_dir, *flags, 5 * STEPS) == 2
    assert "finds no spectrum in the log up to epoch 4" in get_error(capsys)
    assert resume(run_dir, *flags, 8 * STEPS + 1, "--switch_epoch", 8) == 0  # there is time for a window
    assert events(run_dir, "warning") == []


def test_a_switch_that_comes_unforeseen_has_the_ranks_of_rule_budget(small, silent, tmp_path, capsys):
    """Algorithm 1 passes at the end of a window whose start was not seen, and nothing was logged before: the
    run goes on, and says so, also where it was stopped just there."""
    fork = ["--fork", f"{silent}@3", *LOGGED, *PRELORA]
    run_dir = tmp_path / "run"
    run(small, run_dir, *fork, 4 * STEPS)
    assert resume(run_dir, "--max_steps", 4 * STEPS + 1) == 0
    (switch,), warnings = events(run_dir, "switch"), events(run_dir, "warning")
    budget = typed_config(train.Config, json.loads((run_dir / "config.json").read_text()), "")
    budget.rank_rule = "budget"
    expected = decide_ranks(budget, train.build_net(budget), events(run_dir, "epoch")[:4])
    assert (switch["epoch"], switch["ranks"]) == (4, expected)
    said = "the ranks are those of rank_rule budget: rank_rule spectrum finds no spectrum in the log up to"
    assert sum(said in warning["message"] for warning in warnings) == 1
    capsys.readouterr()
    assert replay.main([str(run_dir)]) == 2  # it does not guess
    assert "finds no spectrum in the log up to epoch 4" in get_error(capsys)


def test_replay_says_what_a_log_lacks(full, silent, capsys):
    asked = ["--rank_rule", "spectrum"]
    assert replay.main([str(silent), *asked]) == 2
    assert "it needs a run with --log_displacement True" in get_error(capsys)
    assert replay.main([str(full), *asked, "--window_epochs", "1"]) == 2
    assert "has the spectra of windows of 2 epochs" in get_error(capsys)

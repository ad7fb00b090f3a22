"""Several ranks, with gloo on the CPU: the same numbers as one, the same weights on all, the graphs, the mesh, the switch."""

import json
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed as dist

import train
from model import checkpoint, distributed
from model.parallel import reshard, to_plain

# 4 steps an epoch, 36 in all: full 1-3, warmup 4-6, lora 7-9. Nothing random that differs between ranks; every rank sees 4 images or more.
PLAIN = ("--loader folder --num_workers 0 --train_samples 64 --epochs 9 --batch_size 16 --lr 2e-4 --lr_warmup_steps 4 --dtype float32 "
         "--compile False --tau 90 --zeta 90 --num_windows 2 --window_epochs 1 --lora_warmup_epochs 3 --rank_min 4 --rank_max 32").split()


@contextmanager
def watching():
    """Record, while train.main runs: every step's loss, and this rank's view of the whole weights at every phase's end."""
    seen = {"losses": [], "weights": {}}
    sum_over_ranks, save = distributed.sum_over_ranks, checkpoint.save

    def summing(tensor):
        sum_over_ranks(tensor)
        if tensor.shape == (2,):  # a step's loss and hits
            seen["losses"].append(tensor[0].item())
        return tensor

    def saving(run_dir, model, optimizer, meta, pinned):
        if pinned or meta["state"]["epoch"] == 9:
            seen["weights"][meta["state"]["phase"]] = {name: to_plain(t).clone() for name, t in model.state_dict().items()}
        return save(run_dir, model, optimizer, meta=meta, pinned=pinned)

    with mock.patch.object(distributed, "sum_over_ranks", summing), mock.patch.object(checkpoint, "save", saving):
        yield seen


def run_main(argv, skip_reduction=False):
    with watching() as seen, mock.patch.object(train, "parallelize", unreduced if skip_reduction else train.parallelize):
        seen["status"] = train.main([str(a) for a in argv])
    return seen


def unreduced(model, mesh, *args, parallelize=train.parallelize):
    """The error to be caught: in the LoRA phase adapters, too, are left out of FSDP, so that nobody averages their gradients."""
    if mesh is not None and not model.head.weight.requires_grad:
        mesh = None
    return parallelize(model, mesh, *args)


def compare(on_ranks, small, run_dir, ranks, *more, **kw):
    return on_ranks(ranks, run_main, [*PLAIN, "--data_dir", small, "--run_dir", run_dir, *more], **kw)


@pytest.fixture(scope="module")
def one_rank(on_ranks, small, tmp_path_factory):
    return compare(on_ranks, small, tmp_path_factory.mktemp("one") / "run", 1)[0]


@pytest.mark.parametrize("ranks, flags", [
    (2, ""), (4, ""), (4, "--dp_shard 2"), (4, "--dp_shard 1"), (2, "--frozen_base shard --reshard_after_forward False"),
    (2, "--grad_accum_steps 2 --activation_checkpointing block")])
def test_same_numbers_on_any_number_of_ranks(on_ranks, small, one_rank, tmp_path, ranks, flags):
    seen = compare(on_ranks, small, tmp_path / "run", ranks, *flags.split())
    assert len(one_rank["losses"]) == 36 and list(one_rank["weights"]) == ["full", "warmup", "lora"]
    for rank in seen:
        print(max(abs(a/b-1) for a,b in zip(one_rank["losses"], rank["losses"])), [max(float((t-one_rank["weights"][ph][n]).abs().max()) for n,t in w.items()) for ph,w in rank["weights"].items()])
        assert rank["losses"] == pytest.approx(one_rank["losses"], rel=1e-5)
        for phase, weights in one_rank["weights"].items():
            assert rank["weights"][phase].keys() == weights.keys()
            assert [n for n in weights if not torch.equal(rank["weights"][phase][n], seen[0]["weights"][phase][n])] == []
            assert [n for n in weights if not torch.allclose(rank["weights"][phase][n], weights[n], atol=1e-4)] == []

"""train.py on the small data set: how tests run it, and how they read what it has written."""

import io
import json
import shutil
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.utils.tensorboard import SummaryWriter

import train
from files import write_json
from model import checkpoint
from model.tensors import get_checksum, read_checksums
from monitor import logger

REPO = Path(__file__).parent.parent
# What differs between two runs that are the same.
TIMES = ["seconds", "epoch_seconds", "images_per_second", "data_wait_fraction", "slowest_rank"]
TIMES += ["peak_memory_bytes", "mfu"]
# 6 steps an epoch. Windows of one epoch; the first overlaps the learning rate's warmup, so that the loose
# test passes after epoch 3: full 1-3, warmup 4-5, lora 6-7. Everything random is on.
SMALL = (
    "--loader folder --num_workers 0 --train_samples 120 --batch_size 20 --epochs 7 --lr_warmup_steps 6 "
    "--dtype float32 --compile False --dropout 0.1 --drop_path 0.1 --mixup 0.2 --tau 90 --zeta 90 "
    "--num_windows 2 --window_epochs 1 --lora_warmup_epochs 2 --rank_min 4 --rank_max 32"
).split()
STEPS, EPOCHS, TOTAL_STEPS = 6, 7, 42  # of an epoch, of the run
SWITCH, FREEZE = 3, 5  # the epochs after which it switches

flops = {}  # of the models that have been counted: {what they are made of: FLOPs an image}
count_flops = train.count_flops


@pytest.fixture(autouse=True)
def no_figures(monkeypatch):
    """No figures, and no model's FLOPs counted twice: half of a short run's time. The reference run, and
    those from a shell, draw and count."""
    monkeypatch.setattr(SummaryWriter, "add_figure", lambda *args: None)
    monkeypatch.setattr(logger, "change_heatmap", lambda *args: None)
    monkeypatch.setattr(logger, "rank_heatmap", lambda *args: None)
    monkeypatch.setattr(train, "count_flops", count_flops_once)


def count_flops_once(model, images) -> int:
    key = (images.shape, *((name, p.shape, p.requires_grad) for name, p in model.named_parameters()))
    if key not in flops:
        flops[key] = count_flops(model, images)
    return flops[key]


def argv(small, run_dir, *more) -> list[str]:
    return [*SMALL, "--data_dir", str(small), "--run_dir", str(run_dir), *map(str, more)]


def run(small, run_dir, *more) -> list[dict]:
    """A run that ends well, in this process. Returns its events."""
    assert train.main(argv(small, run_dir, *more)) == 0
    return events(run_dir)


def get_empty_preset(folder) -> str:
    """A preset that says nothing: with one, --resume True starts where there is no run."""
    (folder / "empty_preset.py").write_text("")
    return str(folder / "empty_preset.py")


def resume(run_dir, *more) -> int:
    """The exit status of a run that goes on with what its own config says, but for what `more` says."""
    return train.main(["--run_dir", str(run_dir), "--resume", "True", *map(str, more)])


def rolled_back(source, run_dir, step):
    """A copy of the run, back at its checkpoint of that step."""
    shutil.copytree(source, run_dir)
    (run_dir / "checkpoints/latest").write_text(f"step_{step:08d}")
    return run_dir


def events(run_dir, *kinds) -> list[dict]:
    """The records of metrics.jsonl, those of the given kinds or all."""
    records = [json.loads(line) for line in (Path(run_dir) / "metrics.jsonl").read_text().splitlines()]
    return [record for record in records if not kinds or record["event"] in kinds]


def get_steps(run_dir) -> list[dict]:
    """The records of steps.jsonl."""
    return [json.loads(line) for line in (Path(run_dir) / "steps.jsonl").read_text().splitlines()]


def without_times(records) -> list[dict]:
    """What must be equal in two runs that are the same."""
    return [
        {key: value for key, value in record.items() if key not in TIMES}
        for record in records
        if record["event"] != "start"
    ]


def write_meta(path, meta):
    """A checkpoint's meta.json, changed by hand, with the checksum that goes with it."""
    write_json(path / "meta.json", meta)
    checksums = read_checksums(path) | {"meta.json": get_checksum(path / "meta.json")}
    write_json(path / "checksums.json", {"crc32": checksums})


def flip(path, name) -> Path:
    """Invert the first 64 bytes of a tensor of the checkpoint `path`, or of its first shard; the file that
    they are in."""
    stored = dcp.FileSystemReader(path).read_metadata().storage_data
    info = next(info for index, info in stored.items() if index.fqn == name)
    file = path / info.relative_path
    content = file.read_bytes()
    tensor = torch.load(io.BytesIO(content[info.offset :][: info.length]))
    return invert(file, content.index(tensor.numpy().tobytes()[:64], info.offset))


def invert(file, start) -> Path:
    """Invert 64 bytes of a file."""
    content = bytearray(file.read_bytes())
    content[start : start + 64] = bytes(255 - byte for byte in content[start : start + 64])
    file.write_bytes(content)
    return file


def weights(run_dir, path=None) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint (the latest): model, optimiser and averages, what is frozen from its
    base."""
    path = path or checkpoint.latest(Path(run_dir))
    base, own = checkpoint.get_base(path), held(path)
    kinds = tuple({f"{key.split('.')[0]}." for key in own} & {"model.", "ema."})
    frozen = {key: t for key, t in held(base).items() if key.startswith(kinds)} if base else {}
    return frozen | own


def held(path) -> dict[str, torch.Tensor]:
    """The tensors in a checkpoint itself."""
    saved = dcp.FileSystemReader(path).read_metadata().state_dict_metadata
    tensors = {key: torch.empty(m.size, dtype=m.properties.dtype) for key, m in saved.items()}
    dcp.load(tensors, checkpoint_id=path)
    return tensors


def saved_at(run_dir, step: int) -> dict[str, torch.Tensor]:
    """All tensors of the checkpoint that a run saved after so many steps."""
    return weights(run_dir, Path(run_dir) / f"checkpoints/step_{step:08d}")


def assert_same(a, b):
    assert a.keys() == b.keys()
    assert [key for key in a if not torch.equal(a[key], b[key])] == []


def assert_same_run(run_dir, reference):
    """The same events but for times, the same steps to the byte, the same checkpoint to the bit."""
    assert without_times(events(run_dir)) == without_times(events(reference))
    assert (run_dir / "steps.jsonl").read_bytes() == (reference / "steps.jsonl").read_bytes()
    assert_same(weights(run_dir), weights(reference))


def get_error(capsys) -> str:
    """What a refused command has printed: one line, and nothing else."""
    out, err = capsys.readouterr()
    assert err.startswith("error: ") and err.count("\n") == 1 and not out
    return err

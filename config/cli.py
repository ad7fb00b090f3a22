"""[preset.py] [--field value …] -> a Config, and one sentence for a mistake. Types and parsing are tyro's.

`Config` is train.py's class, given by the caller. No torch is imported here, so that a command that prints a
text starts at once."""

import ast
import contextlib
import dataclasses
import difflib
import io
import runpy
import sys
import types
import typing
from pathlib import Path

import tyro

from config.checks import check_config
from errors import UserError
from files import read_json

ROOT = Path(__file__).resolve().parent.parent
RUN_FILES = ("config.json", "metrics.jsonl", "checkpoints")  # any of them makes a folder a run's


def parse_config(Config: type, argv: list[str], description: str = "") -> tuple[typing.Any, list[str]]:
    """`[preset.py] [--field value …]` -> the Config, checked, and the lines that say what a resumed run
    changes.

    With --resume True and a run in run_dir, the run's stored config is taken and only explicit flags are laid
    over it; with --fork and no preset, the config of the run that is forked. Raises UserError for whatever is
    wrong."""
    preset = argv[0] if argv and not argv[0].startswith("-") else None
    flags = argv[1:] if preset else argv
    default = load_preset(Config, preset) if preset else Config()
    cfg = parse_flags(flags, default, description=description)
    if cfg.fork and not preset and not is_resumed(cfg):
        cfg = parse_flags(flags, load_source(Config, cfg.fork))
    notes = []
    if is_resumed(cfg):
        cfg, notes = resume_config(Config, cfg, flags, preset)
    else:
        check_empty(cfg)
    check_config(cfg)
    return cfg, notes


def check_empty(cfg) -> None:
    """Raise UserError for a new run whose folder already holds one."""
    if not cfg.resume and any(Path(cfg.run_dir, name).exists() for name in RUN_FILES):
        raise UserError(
            f"{cfg.run_dir} already holds a run: continue it with --resume True or choose another --run_dir"
        )


def is_resumed(cfg) -> bool:
    return cfg.resume and Path(cfg.run_dir, "config.json").exists()


def resume_config(Config: type, asked, flags: list[str], preset: str | None) -> tuple[typing.Any, list[str]]:
    """The config stored in asked.run_dir with the explicit `flags` over it, and what they change, in
    sentences.

    `asked`: what preset and flags alone would give; where the stored config has another value than the
    preset, that is said, too."""
    path, notes = Path(asked.run_dir, "config.json"), []
    stored = typed_config(Config, read_json(path), str(path))
    stored = dataclasses.replace(stored, run_dir=asked.run_dir, resume=True)
    cfg = parse_flags(flags, stored)
    for name, value in vars(cfg).items():
        if value != getattr(stored, name):
            notes.append(f"resume: {name} = {value} overrides the stored {getattr(stored, name)}")
        if preset and value != getattr(asked, name):
            notes.append(
                f"resume: {name} = {value} as stored in {path}, not {preset}'s {getattr(asked, name)}"
            )
    return cfg, notes


def split_fork(fork: str) -> tuple[str, int | None]:
    """RUN@epoch -> (RUN, epoch), RUN -> (RUN, None)."""
    run, _, epoch = fork.rpartition("@")
    if run and epoch.isdecimal() and not Path(fork).is_dir():
        return run, int(epoch)
    return fork, None


def load_source(Config: type, fork: str):
    """The config of the run that `fork` names, without what belongs to that run alone."""
    run, _ = split_fork(fork)
    path = Path(run, "config.json")
    if not path.is_file():
        raise UserError(f"no run {run} to fork from (--fork RUN, or RUN@epoch with a whole number)")
    source = typed_config(Config, read_json(path), str(path))
    return dataclasses.replace(
        source, fork=None, init_from=None, fresh_head=False, max_steps=None, resume=False
    )


def load_preset(Config: type, path: str | Path):
    """Config's defaults with the preset's assignments over them.

    A preset is a file of assignments; names that begin with _ and imported modules are its own affair. Raises
    UserError for a file that is missing or fails, an unknown key, a wrong type."""
    if not Path(path).is_file():
        raise UserError(f"no such preset: {path}")
    try:
        values = runpy.run_path(str(path))
    except (Exception, SystemExit) as error:  # whatever a user's file does
        raise UserError(f"{path}: {type(error).__name__}: {error}") from None
    names = {field.name for field in dataclasses.fields(Config)}
    for key, value in list(values.items()):
        private = key.startswith("_") or isinstance(value, types.ModuleType)
        if private and key not in names:
            del values[key]
    return typed_config(Config, values, str(path))


def typed_config(Config: type, values: dict, where: str):
    """A Config of `values`, the types of which are looked at. Raises UserError, saying where, for an unknown
    key or a wrong type."""
    hints = typing.get_type_hints(Config)
    typed = {}
    for key, value in values.items():
        if key not in hints:
            raise UserError(f"{where}: unknown key {key!r}{suggest(key, Config)}")
        typed[key] = as_type(value, hints[key])
        if typed[key] is WRONG:
            expected = hints[key] if typing.get_args(hints[key]) else hints[key].__name__
            raise UserError(f"{where}: {key} = {value!r} should be {expected}")
    return Config(**typed)


WRONG = object()


def as_type(value, hint):
    """`value` as a field of type `hint` holds it: a list becomes a tuple, a whole number a float. WRONG if it
    is of another type."""
    allowed = typing.get_args(hint) or (hint,)
    if typing.get_origin(hint) is typing.Literal:
        return value if value in allowed else WRONG
    if typing.get_origin(hint) is tuple:
        if not isinstance(value, (list, tuple)) or not all(type(item) is str for item in value):
            return WRONG
        return tuple(value)
    if float in allowed and type(value) is int:
        return float(value)
    return value if type(value) in allowed else WRONG


def suggest(key: str, *kinds: type) -> str:
    """ ", did you mean …?" with the nearest field of the dataclasses `kinds`, if one is near."""
    names = [field.name for kind in kinds for field in dataclasses.fields(kind)]
    close = difflib.get_close_matches(key.lstrip("-"), names, n=1)
    return f", did you mean {close[0]}?" if close else ""


def parse_flags(argv: list[str], default, prog: str = "train.py", description: str = ""):
    """Flags over `default`, an instance of a dataclass, by tyro. Raises UserError with tyro's reason in one
    line; --help prints and exits. `description`: above the flags in the help, where it is not the dataclass's
    own."""
    known = {f"--{field.name}" for field in dataclasses.fields(default)}
    for flag in argv:
        name = flag.split("=")[0].replace("-", "_").replace("__", "--", 1)
        if flag.startswith("--") and flag != "--help" and name not in known:
            raise UserError(f"unknown flag {flag}{suggest(name, type(default))}")
    kind = tyro.conf.FlagConversionOff[type(default)]
    errors = io.StringIO()
    try:
        with contextlib.redirect_stderr(errors):
            return tyro.cli(
                kind, prog=prog, args=argv, default=default, use_underscores=True, description=description
            )
    except SystemExit as stop:
        if not stop.code:  # --help
            raise
        raise UserError(get_reason(errors.getvalue())) from None


def get_reason(text: str) -> str:
    """The reason in tyro's message: a box, or dashes where the terminal can't draw one, around a title, the
    reason, and help."""
    lines = [line.strip("│|╭╮╰╯─ ") for line in text.splitlines()]
    lines = ["" if set(line) == {"-"} else line for line in lines]
    after_title = "\n".join(lines).strip().split("\n", 1)[1].strip()
    return " ".join(after_title.split("\n\n")[0].split("\n"))


def load_config_class() -> type:
    """train.py's Config without the rest of train.py, which imports torch: its class statement alone, run
    with the imports it needs.

    For commands that must start at once; an edit of Config is seen here as everywhere.
    """
    light = ("config", "dataclasses", "os", "pathlib", "typing", "model.variants")
    tree = ast.parse((ROOT / "train.py").read_text())

    def is_needed(node: ast.stmt) -> bool:
        if isinstance(node, ast.Import):
            return all(alias.name in light for alias in node.names)
        if isinstance(node, ast.ImportFrom):
            return node.module in light or node.module.split(".")[0] == "config"
        return isinstance(node, ast.ClassDef) and node.name == "Config"

    tree.body = [node for node in tree.body if is_needed(node)]
    module = types.ModuleType("train_config")
    module.__file__ = str(ROOT / "train.py")
    sys.modules[module.__name__] = module  # so that tyro finds the comments of its fields
    exec(compile(tree, module.__file__, "exec"), vars(module))
    return module.Config

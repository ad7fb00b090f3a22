"""[preset.py] [--field value …] -> a Config, and one sentence for a mistake. Types and parsing are tyro's.

`Config` is train.py's class, given by the caller. No torch is imported here, so that a command that prints a
text starts at once."""

import ast
import contextlib
import dataclasses
import difflib
import io
import os
import re
import runpy
import sys
import types
import typing
from pathlib import Path
from shlex import quote

import tyro

from config.checks import check_config
from errors import UserError
from files import expand_home, expand_paths, explain_no_run, find_run_above, read_json

ROOT = Path(__file__).resolve().parent.parent
RUN_FILES = ("config.json", "metrics.jsonl", "checkpoints")  # any of them makes a folder a run's
HYPHENS = "-‐‑‒–—−"  # and what word processors and web pages make of them
WITH_PRESETS = ("train.py", "launch/submit.py")
NEAR = 0.8  # of difflib's ratio: lrr is lr and batchsize batch_size, gres is not resume


def parse_config(Config: type, argv: list[str], description: str = "") -> tuple[typing.Any, list[str]]:
    """`[preset.py] [--field value …]` -> the Config, checked, and the lines that say what a resumed run
    changes, or that there is none yet.

    With --resume True and a run in run_dir, the run's stored config is taken and only explicit flags are laid
    over it; with --fork and no preset, the config of the run that is forked. Raises UserError for whatever is
    wrong."""
    preset = argv[0] if argv and not argv[0].startswith("-") else None
    flags = argv[1:] if preset else argv
    default = Config()
    if preset:
        check_preset(preset, default)
        preset = expand_home(preset)
        default = load_preset(Config, preset)
    cfg = parse_flags(flags, default, description=description)
    if is_resumed(cfg):
        cfg, notes = resume_config(Config, cfg, flags, preset)
    else:
        check_fresh(cfg, preset)
        if cfg.fork and not preset:
            cfg = parse_flags(flags, load_source(Config, cfg.fork))
        notes = []
    if cfg.resume and not any(Path(cfg.run_dir, "checkpoints").glob("step_*")):
        source = f" from {cfg.fork}" if cfg.fork else ""
        notes.append(f"resume: {cfg.run_dir} holds no checkpoint yet, this is a fresh start{source}")
    check_config(cfg)
    return cfg, notes


def check_fresh(cfg, preset: str | None) -> None:
    """Raise UserError unless a run can begin in run_dir: nothing is there, or what is there may be gone on
    from; and the preset or the fork says what it is to be."""
    if cfg.run_dir == "":
        raise UserError("run_dir is empty")
    above = find_run_above(cfg.run_dir)
    if above and Path(os.path.abspath(cfg.run_dir)).is_relative_to(
        Path(os.path.abspath(above), "checkpoints")
    ):
        raise UserError(f"run_dir {explain_no_run(cfg.run_dir)}")
    check_empty(cfg)
    holds = [name for name in RUN_FILES if Path(cfg.run_dir, name).exists()]
    if preset or cfg.fork or not cfg.resume:
        return
    if holds:
        raise UserError(f"{cfg.run_dir}/config.json is missing: give the run's preset before --resume True")
    raise UserError(
        f"nothing to resume: {explain_no_run(cfg.run_dir)} (a preset, config/x.py, would start a new one)"
    )


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
        raise UserError(f"fork: {explain_no_run(run)} (--fork RUN, or RUN@epoch with a whole number)")
    source = typed_config(Config, read_json(path), str(path))
    return dataclasses.replace(
        source, fork=None, init_from=None, fresh_head=False, max_steps=None, resume=False
    )


def load_preset(Config: type, path: str | Path):
    """Config's defaults with the preset's assignments over them.

    A preset is a file of assignments; names that begin with _ and imported modules are its own affair. Raises
    UserError for a file that is missing or fails, an unknown key, a wrong type."""
    if not Path(path).is_file():
        beside = {file.stem: str(file) for file in Path(path).parent.glob("*.py")}
        near = difflib.get_close_matches(Path(path).stem, beside, n=1, cutoff=NEAR)
        raise UserError(
            f"no such preset: {path}" + "".join(f", did you mean {beside[stem]}?" for stem in near)
        )
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
    cfg = Config(**typed)
    expand_paths(cfg)
    return cfg


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
    """ ", did you mean …?" with the field of the dataclasses `kinds` that is spelt nearly so, if one is."""
    names = [field.name for kind in kinds for field in dataclasses.fields(kind)]
    close = difflib.get_close_matches(key, names, n=1, cutoff=NEAR)
    return f", did you mean {close[0]}?" if close else ""


def parse_flags(argv: list[str], default, prog: str = "train.py", description: str = ""):
    """Flags over `default`, an instance of a dataclass, by tyro, a ~ in its paths expanded. Raises UserError
    with the reason in one line; --help prints and exits. `description`: above the flags in the help, where it
    is not the dataclass's own."""
    check_words(argv, default, prog)
    kind = tyro.conf.FlagConversionOff[type(default)]
    errors = io.StringIO()
    try:
        with contextlib.redirect_stderr(errors):
            values = tyro.cli(
                kind, prog=prog, args=argv, default=default, use_underscores=True, description=description
            )
    except SystemExit as stop:
        if not stop.code:  # --help
            raise
        raise UserError(get_reason(errors.getvalue())) from None
    expand_paths(values)
    return values


# ------------------------------------------------------------------------------------------------------------
# what people type instead, and the right form of it


def check_words(argv: list[str], default, prog: str) -> None:
    """Raise UserError, with the right form, for a word that is neither a flag of `default`, a dataclass, nor
    a flag's value, and for a boolean without its True or False."""
    hints = typing.get_type_hints(type(default))
    room = 0  # how many values the last flag may still have
    for word, following in zip(argv, [*argv[1:], None]):
        if word in ("--help", "-h"):
            return
        if word.startswith("--"):
            name, has_value, value = word.partition("=")
            name = get_name(name)
            if name not in hints:
                raise UserError(f"unknown flag {word}{explain_unknown(word, following, prog, type(default))}")
            check_value(name, hints[name], value if has_value else following)
            kinds = (hints[name], *typing.get_args(hints[name]))
            takes_many = any(typing.get_origin(kind) is tuple for kind in kinds)
            room = len(argv) if takes_many else 1
            if has_value:
                room = 0
        elif room and not (room > 1 and is_stray(word)):
            room -= 1
        else:
            raise UserError(explain_stray(word, default, prog))


def get_name(word: str) -> str:
    """The field's name in `--batch-size=3`, or in what was meant as such."""
    return word.partition("=")[0].strip(HYPHENS).replace("-", "_")


def is_stray(word: str) -> bool:
    """Whether a word is no value of a flag that takes several: `-lr`, `config/x.py`."""
    looks_like_a_flag = re.match(f"[{HYPHENS}][A-Za-z]", word)
    return word.endswith(".py") or bool(looks_like_a_flag)


def check_value(name: str, hint, value: str | None) -> None:
    """Raise UserError if the flag has none (None), and for a boolean's that is not True or False."""
    is_boolean = hint is bool
    if value is None or value.startswith("--") or (is_boolean and (value == "" or is_stray(value))):
        example = "True" if is_boolean else "VALUE"
        raise UserError(f"--{name} needs a value: --{name} {example}")
    if is_boolean and value not in ("True", "False"):
        means_no = value.lower() in ("false", "no", "off", "0")
        raise UserError(f"--{name} takes True or False, not {value}: --{name} {not means_no}")


def explain_unknown(word: str, following: str | None, prog: str, *kinds: type) -> str:
    """What comes after "unknown flag …" of a command whose flags are the fields of dataclasses."""
    name = get_name(word)
    fields = {field.name: field.type for kind in kinds for field in dataclasses.fields(kind)}
    if name.startswith("no_") and fields.get(name[3:]) is bool:
        return f": say --{name[3:]} False"
    value = word.partition("=")[2] or following
    if value and value.endswith(".py") and prog in WITH_PRESETS:
        return f": a preset stands first and has no flag, {prog} {quote(value)} --field value …"
    return suggest(name, *kinds)


def explain_stray(word: str, default, prog: str) -> str:
    """A sentence about a word that is no flag's value and does not begin with two hyphens."""
    meant = get_meant(word, type(default))
    if meant:
        return f"{word} is no flag: say {meant}"
    if prog == "train.py" and word.endswith(".py"):
        return f"{word}: one preset, and it stands first: train.py {quote(word)} --field value …"
    return f"{word} is neither a flag nor the value of one (--field value)"


def get_meant(word: str, *kinds: type) -> str | None:
    """The flag that `lr=1`, `-lr` or `—lr` was meant as, if it is a field of the dataclasses `kinds`."""
    is_field = get_name(word) in {field.name for kind in kinds for field in dataclasses.fields(kind)}
    if is_field and ("=" in word or word[0] in HYPHENS):
        return f"--{word.lstrip(HYPHENS)}"
    return None


def check_preset(word: str, default) -> None:
    """Raise UserError for a first word that was meant as a flag."""
    meant = get_meant(word, type(default))
    if meant and not Path(word).exists():
        raise UserError(f"{word} is no flag: say {meant}")


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
    light = ("config", "dataclasses", "files", "os", "pathlib", "typing", "model.variants")
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

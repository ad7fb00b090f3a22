"""model/compiler.py: a machine without a compiler, or with one that is no use, is told so before a run
begins."""

import os
import re
import shutil
import sysconfig

import pytest
import torch
from small_runs import get_error, no_figures  # noqa: F401 (a fixture)
from torch._inductor import cpp_builder

import bench
import train
from errors import UserError
from model import compiler
from model.compiler import EAGER, check_compiler

ONE_STEP = (
    "--loader synthetic --train_samples 32 --batch_size 16 --dtype float32 --epochs 9 --max_steps 1 "
    "--lr_warmup_steps 0"
).split()


@pytest.fixture(autouse=True)
def looked_at_anew(monkeypatch, tmp_path):
    """A cache folder of the test's own, and nothing remembered of another's compiler."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.delenv("TRITON_CACHE_DIR", raising=False)
    forget()
    yield
    forget()


def forget():
    cpp_builder.cpp_compiler_search.cache_clear()
    compiler.try_compiler.cache_clear()


def leave_no_compiler(monkeypatch, tmp_path):
    """PATH has what a shell needs, and no more."""
    (tmp_path / "bin").mkdir()
    for name in ("sh", "bash", "env", "uname"):
        (tmp_path / "bin" / name).symlink_to(shutil.which(name))
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.delenv("CC", raising=False)


def pretend_compiler(tmp_path, script):
    """A compiler that says its version, and for the rest does what `script` says."""
    path = tmp_path / "pretended"
    path.write_text(f'#!/bin/sh\n[ "$1" = --version ] && exit 0\n{script}\n')
    path.chmod(0o755)
    return str(path)


def start(tmp_path, *flags):
    return train.main([*ONE_STEP, "--run_dir", str(tmp_path / "run"), *flags])


def test_no_compiler_is_one_line_before_the_run(monkeypatch, tmp_path, capsys):
    leave_no_compiler(monkeypatch, tmp_path)
    assert start(tmp_path) == 2
    assert "needs a C++ compiler and g++ is none here: --compile False does without" in get_error(capsys)
    assert not (tmp_path / "run").exists()
    assert start(tmp_path, "--compile", "False") == 0  # control: as it was told


@pytest.mark.parametrize("where", ["/proc/nowhere", "FILE", "FILE/below"])
def test_no_cache_folder_is_one_line_before_the_run(monkeypatch, tmp_path, capsys, where):
    (tmp_path / "file").touch()
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", where.replace("FILE", str(tmp_path / "file")))
    assert start(tmp_path) == 2
    said = get_error(capsys)
    assert "the compiler's cache" in said and "can't be written" in said and said.endswith(f", or {EAGER}\n")
    assert "name another folder in TORCHINDUCTOR_CACHE_DIR" in said and not (tmp_path / "run").exists()


@pytest.mark.parametrize("refused", ["-std=c++", "-fopenmp"])
def test_a_compiler_without_what_inductor_asks_of_it(tmp_path, refused):
    """g++ 9 knows no C++20; clang may be installed without OpenMP."""
    real = shutil.which("g++")
    script = f'case "$*" in *{refused}*) echo \'error: {refused}\' >&2; exit 1;; esac; exec {real} "$@"'
    with torch._inductor.config.patch({"cpp.cxx": (None, pretend_compiler(tmp_path, script))}):
        with pytest.raises(UserError, match=f"can't compile with .*error: {re.escape(refused)}.*: {EAGER}"):
            check_compiler(compiled=True, adapters=False)


def test_control_a_compiler_that_does_all(tmp_path):
    script = f'exec {shutil.which("g++")} "$@"'
    with torch._inductor.config.patch({"cpp.cxx": (None, pretend_compiler(tmp_path, script))}):
        assert check_compiler(compiled=True, adapters=False) == []


@pytest.mark.parametrize("script, words", [
    ("echo 'x: fatal error: cannot execute cc1plus' >&2; exit 1", "can't compile with .*x: fatal error"),
    ("exit 1", "can't compile with .*it says nothing"),
    ('while [ "$1" != -o ]; do shift; done; echo none > "$2"', "can't load what it has compiled in .*noexec"),
])  # fmt: skip
def test_a_compiler_that_is_no_use(tmp_path, script, words):
    with torch._inductor.config.patch({"cpp.cxx": (None, pretend_compiler(tmp_path, script))}):
        with pytest.raises(UserError, match=f"torch.compile {words}.*: {EAGER}"):
            check_compiler(compiled=True, adapters=False)
        assert check_compiler(compiled=False, adapters=True) == []  # control: on a CPU nothing else compiles


def test_without_pythons_headers(monkeypatch, tmp_path):
    assert check_compiler(compiled=True, adapters=True) == []  # control: here they are
    forget()
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    with pytest.raises(UserError, match=r"finds no Python.h in .*python3-dev\): --compile False"):
        check_compiler(compiled=True, adapters=True)


def test_bench_says_it_too(monkeypatch, tmp_path, capsys):
    leave_no_compiler(monkeypatch, tmp_path)
    for command in (["step", "--model", "Ti/16", "--batch_size", "1"], ["switch", "--model", "Ti/16"]):
        assert bench.main(command) == 2
        assert "needs a C++ compiler" in get_error(capsys)


# ---- on a GPU


@pytest.fixture
def on_gpu(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(compiler, "find_spec", lambda name: name)
    monkeypatch.setenv("TRITON_HOME", str(tmp_path / "home"))


def test_triton_finds_no_compiler(on_gpu, monkeypatch, tmp_path):
    """Adapters have Triton kernels of their own: for them --compile False is no way out."""
    assert check_compiler(compiled=True, adapters=True) == []  # control
    leave_no_compiler(monkeypatch, tmp_path)
    with pytest.raises(UserError, match=f"Triton finds no C compiler, gcc or clang: {EAGER}, or install gcc"):
        check_compiler(compiled=True, adapters=False)
    for compiled in (True, False):
        with pytest.raises(UserError, match="Triton finds no C compiler, gcc or clang: install gcc, or name"):
            check_compiler(compiled, adapters=True)
    assert check_compiler(compiled=False, adapters=False) == []
    monkeypatch.setenv("CC", "/nowhere/cc")
    with pytest.raises(UserError, match="Triton can't run /nowhere/cc in .*No such file"):
        check_compiler(compiled=True, adapters=False)


@pytest.mark.parametrize("variable", ["TRITON_CACHE_DIR", None])
def test_a_cache_that_has_what_triton_needs(on_gpu, monkeypatch, tmp_path, variable):
    folder = tmp_path / "home/.triton/cache"
    if variable:
        folder = tmp_path / "elsewhere"
        monkeypatch.setenv(variable, str(folder))
    leave_no_compiler(monkeypatch, tmp_path)
    with pytest.raises(UserError, match="Triton finds no C compiler"):
        check_compiler(compiled=False, adapters=True)
    (folder / "KEY").mkdir()
    (folder / "KEY/cuda_utils.cpython-311-x86_64-linux-gnu.so").touch()
    (said,) = check_compiler(compiled=False, adapters=True)
    assert said.startswith("warning: Triton finds no C compiler") and str(folder) in said


def test_tritons_folder_cannot_be_written(on_gpu, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", "/proc/nowhere")
    with pytest.raises(UserError, match="cache /proc/nowhere can't be written .* in TRITON_CACHE_DIR$"):
        check_compiler(compiled=True, adapters=True)
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"]

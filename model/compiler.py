"""What torch.compile, and Triton under it or by itself, need of a machine: a compiler that compiles, and a
folder whose libraries can be loaded. Looked at before a run begins, because without them it would end at its
first step, or at the switch."""

import ctypes
import functools
import os
import shlex
import shutil
import subprocess
import sysconfig
import tempfile
from importlib.util import find_spec
from pathlib import Path

import torch
import torch._inductor.config
from torch._inductor.cpp_builder import CppBuilder, CppOptions, get_cpp_compiler
from torch._inductor.exc import InvalidCxxCompiler
from torch._inductor.runtime.cache_dir_utils import cache_dir

from errors import UserError

EAGER = "--compile False does without"
# What both compile is a module of Python's; inductor's has OpenMP, too.
PROBES = {
    "c": "#include <Python.h>\nint probe() { return 0; }\n",
    "cpp": "#include <Python.h>\n#include <omp.h>\nint probe() { return omp_get_max_threads(); }\n",
}


def check_compiler(compiled: bool, adapters: bool) -> list[str]:
    """Raise UserError, with the way out, where this process can't compile what a run needs: with `compiled`
    its blocks, on a GPU the kernels of its `adapters` besides, which are Triton's whether compiled or not.

    On a CPU inductor compiles C++, on a GPU Triton its launcher in C, unless the cache has it. Returns what
    there is to say, in sentences.
    """
    if not torch.cuda.is_available():
        if compiled:
            check_cpp()
        return []
    if not find_spec("triton") or not (compiled or adapters):
        return []
    return check_triton(compiled, EAGER if not adapters else "")


def check_cpp() -> None:
    """Raise UserError where inductor can't compile for the CPU."""
    folder = get_cache_folder(EAGER)
    try:
        compiler = get_cpp_compiler()
    except (InvalidCxxCompiler, OSError):
        tried = ", ".join(name for name in torch._inductor.config.cpp.cxx if name)
        raise UserError(
            f"torch.compile needs a C++ compiler and {tried} is none here: {EAGER}, or install g++, or name "
            "a compiler in CXX"
        ) from None
    wrong = try_compiler(compiler, "cpp", folder)
    if wrong:
        raise UserError(f"torch.compile {wrong}: {EAGER}")


def check_triton(compiled: bool, way_out: str) -> list[str]:
    """Raise UserError where Triton can't compile; what there is to say where only its cache lets it run.
    `way_out`: "" where there is none but a compiler."""
    folder = get_cache_folder(way_out) if compiled else get_home_cache()
    if "TRITON_CACHE_DIR" in os.environ:
        folder = make_folder(Path(os.environ["TRITON_CACHE_DIR"]), "TRITON_CACHE_DIR", way_out)
    compiler = os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")
    wrong = "finds no C compiler, gcc or clang"
    if compiler:
        wrong = try_compiler(compiler, "c", folder)
    if not wrong:
        return []
    if any(folder.rglob("cuda_utils*.so")):  # Triton's own, made here when there was a compiler
        return [f"warning: Triton {wrong}: only what its cache {folder} holds can run"]
    out = f"{way_out}, or " if way_out else ""
    raise UserError(f"Triton {wrong}: {out}install gcc, or name a compiler in CC")


def get_cache_folder(way_out: str) -> Path:
    """Where inductor, and Triton under it, keep what they have compiled. Raises UserError where nothing can
    be written there."""
    try:
        folder = Path(cache_dir())
    except OSError as error:  # TORCHINDUCTOR_CACHE_DIR, or no folder for temporary files
        raise UserError(explain_folder("", "TORCHINDUCTOR_CACHE_DIR", way_out, error)) from None
    return make_folder(folder, "TORCHINDUCTOR_CACHE_DIR", way_out)


def get_home_cache() -> Path:
    """Where Triton by itself keeps what it has compiled. Raises UserError as `get_cache_folder`."""
    home = os.environ.get("TRITON_HOME") or os.path.expanduser("~")
    return make_folder(Path(home, ".triton", "cache"), "TRITON_CACHE_DIR", "")


def make_folder(folder: Path, variable: str, way_out: str) -> Path:
    """`folder`, made if it is missing. Raises UserError where nothing can be written there."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise UserError(explain_folder(f" {folder}", variable, way_out, error)) from None
    return folder


def explain_folder(folder: str, variable: str, way_out: str, error: OSError) -> str:
    out = f", or {way_out}" if way_out else ""
    return f"the compiler's cache{folder} can't be written ({error}): name another folder in {variable}{out}"


@functools.lru_cache
def try_compiler(compiler: str, language: str, folder: Path) -> str:
    """What is wrong with what `compiler` makes in `folder` of a small library, as a predicate; "" if nothing
    is. `language`: c or cpp. It takes some tenths of a second."""
    include = sysconfig.get_path("include")
    if not Path(include, "Python.h").is_file():
        return f"finds no Python.h in {include}, which the headers of this Python have (python3-dev)"
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        source, library = Path(scratch, f"probe.{language}"), Path(scratch, "probe.so")
        if language == "cpp":  # inductor's own flags: an old compiler knows no C++20, clang may lack OpenMP
            options = CppOptions(compiler=compiler, extra_flags=["-fopenmp", f"-I{include}"])
            builder = CppBuilder("probe", str(source), options, scratch)
            command, library = shlex.split(builder.get_command_line()), Path(builder.get_target_file_path())
        else:
            command = shlex.split(compiler)
            command += ["-shared", "-fPIC", f"-I{include}", str(source), "-o", str(library)]
        try:
            source.write_text(PROBES[language])
            done = subprocess.run(command, capture_output=True, text=True, errors="replace")
        except OSError as error:
            return f"can't run {compiler} in {folder} ({error.strerror})"
        if done.returncode:
            lines = [line for line in done.stderr.splitlines() if "error" in line] or done.stderr.splitlines()
            return f"can't compile with {compiler} ({(lines or ['it says nothing'])[0].strip()})"
        try:
            ctypes.CDLL(str(library))
        except OSError as error:
            return f"can't load what it has compiled in {folder}, is it mounted noexec? ({error})"
    return ""

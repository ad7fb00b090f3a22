"""A GPU that computes nothing: torch believes in an A100 or an H100 on a machine that has none.

    (
        set -e                                                          # or a failure would go unseen
        null_gpu=$(python tests/null_gpu/build.py FOLDER --sm 80)       # or 90
        eval "$null_gpu"                                                # for this subshell alone
        python bench.py step --model L/16 --batch_size 64               # any script, as it is
    )

Its milliseconds are the host's. It needs gcc, nm, and a torch built for CUDA 13.

gcc compiles this folder's C files into FOLDER, as one library that stands in for CUDA's runtime and driver,
cuBLAS, cuDNN, NVRTC and CUPTI. It is preloaded, so every call of torch and of Triton goes to it.

- Memory is address space that nobody may touch, the host included; a device that is full says so.
- Kernels are launched, counted, and not run. What is copied to the host is zeros, always: so are the results
  of `.item()`, `.cpu()`, losses and weights, and what divides by a sum divides by 0.
- An event holds the time at which the host recorded it, so what two of them measure is the host. Nothing is
  ever waited for, but waits are counted (counts.py).
- A function that it lacks returns CUDA's "not supported" and says so on stderr, with its name.

So it shows that the code for CUDA runs, what it asks of the device, when the host waits, that Triton compiles
for that GPU, what the allocator holds, and how long the host takes for a step. It shows no number that a GPU
would compute and no time that one would take; NCCL and CUDA graphs are not there.
"""

import argparse
import os
import re
import shlex
import shutil
import subprocess
import sysconfig
from pathlib import Path

HERE = Path(__file__).parent
SOURCES = ("device.c", "runtime.c", "driver.c", "libraries.c")
LIBRARY = "libcuda.so.1"  # the driver's name, by which Triton asks for it
EXPORTS = "{ global: cu*; __cuda*; nvrtc*; null_gpu_counts; local: *; };\n"
FAMILIES = "cublas|cudnn|cufft|cupti|curand|cusolver|cusparse|nvrtc"
ASKED = re.compile(rf"\b(?:__cuda\w+|cuda[A-Z]\w+|cu[A-Z]\w+|(?:{FAMILIES})[A-Z]\w+)")
# Of cuDNN what says something about the library, and asks no device: its own answers are right.
LEFT_ALONE = re.compile("cudnnGet(Version|Property|CudartVersion|ErrorString|LastErrorString)")


class NoNullGPU(Exception):
    """Why there can be none here."""


def build(folder: Path, site_packages: Path | None = None) -> None:
    """Compile the library into `folder`, for the torch of `site_packages`, by default of this interpreter.
    Raises NoNullGPU."""
    site_packages = site_packages or Path(sysconfig.get_paths()["purelib"])
    if not list(site_packages.glob("torch/lib/libtorch_cuda.so")):
        raise NoNullGPU(f"there is no torch in {site_packages}, or it was built without CUDA")
    missing = [tool for tool in ("gcc", "nm") if not shutil.which(tool)]
    if missing:
        raise NoNullGPU(f"there is no {' and no '.join(missing)}")
    includes = [site_packages / "nvidia/cu13/include", site_packages / "triton/backends/nvidia/include"]
    for include in includes:
        if not (include / "cuda.h").exists():
            raise NoNullGPU(f"there is no {include / 'cuda.h'}, which the CUDA 13 builds of torch bring")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "refused.c").write_text(write_refusals(site_packages))
    (folder / "exports").write_text(EXPORTS)
    command = ["gcc", "-shared", "-fPIC", "-O1", "-std=gnu11", f"-Wl,-soname,{LIBRARY}"]
    command += [f"-Wl,--version-script={folder / 'exports'}", f"-I{HERE}", *(f"-I{i}" for i in includes)]
    command += [*(str(HERE / source) for source in SOURCES), str(folder / "refused.c")]
    done = subprocess.run([*command, "-o", str(folder / LIBRARY)], stderr=subprocess.PIPE, text=True)
    if done.returncode:
        raise NoNullGPU(f"gcc does not compile it: {done.stderr}")


def write_refusals(site_packages: Path) -> str:
    """C: a refusal for every function that torch links to, and for every one of the driver's. They are weak:
    those that SOURCES have take their place."""
    names = set()
    for library in site_packages.glob("torch/lib/*.so"):
        command = ["nm", "-D", "--undefined-only", library]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        names.update(ASKED.findall(done.stdout))
    header = (site_packages / "nvidia/cu13/include/cuda.h").read_text()
    names.update(re.findall(r"CUDAAPI (cu[A-Z]\w+)\(", header))
    names.update(re.findall(r"#define cu\w+\s+(cu[A-Z]\w+_v\d)\b", header))
    lines = ["int refuse(const char *);"]
    for name in sorted(name for name in names if not LEFT_ALONE.fullmatch(name)):
        lines.append(f'__attribute__((weak)) int {name}(void) {{ return refuse("{name}"); }}')
    return "\n".join(lines) + "\n"


def get_environment(folder: Path, sm: int) -> dict[str, str]:
    """What a process needs in its environment to see the null GPU that was built into `folder`."""
    return {
        "LD_PRELOAD": str(folder / LIBRARY),
        "NULL_GPU_SM": str(sm),
        "TRITON_LIBCUDA_PATH": str(folder),  # where Triton looks for a driver to link its launcher to
        "PYTORCH_NVML_BASED_CUDA_CHECK": "0",  # is_available asks the runtime, as device_count does
        # Kernels of another device must not be found in place of what is compiled for this one.
        "TRITON_CACHE_DIR": str(folder / f"triton_{sm}"),
        "TORCHINDUCTOR_CACHE_DIR": str(folder / f"inductor_{sm}"),
    }


def run(command: list[str], folder: Path, sm: int, **options) -> subprocess.CompletedProcess:
    """subprocess.run(command) on the null GPU of `folder`."""
    environment = {key: value for key, value in os.environ.items() if key != "CUDA_VISIBLE_DEVICES"}
    return subprocess.run(command, env=environment | get_environment(folder, sm), **options)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--sm", type=int, choices=(80, 90), default=80)
    arguments = parser.parse_args()
    folder = arguments.folder.resolve()
    try:
        build(folder)
    except NoNullGPU as error:
        parser.exit(1, f"no null GPU: {error}\n")
    print("unset CUDA_VISIBLE_DEVICES")
    for name, value in get_environment(folder, arguments.sm).items():
        print(f"export {name}={shlex.quote(value)}")


if __name__ == "__main__":
    main()

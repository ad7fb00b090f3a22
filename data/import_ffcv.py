"""FFCV imported without its side effects."""

from types import ModuleType
from unittest import mock

from errors import UserError


def import_ffcv() -> ModuleType:
    """The package ffcv. Raises UserError, with what to install, where it or its libraries are missing.

    FFCV sets torch's number of threads on import, and at each epoch from its own thread, which would slow
    down a training loop on the same CPU and every thread started later: after this it sets numba's only.
    """
    import torch

    threads = torch.get_num_threads()
    try:
        # Its one numba dictionary is only read from Python, and to compile it takes 5 s of a process's start.
        with mock.patch("numba.typed.Dict", dict):
            import ffcv.fields.decoders
            import ffcv.loader.epoch_iterator
            import ffcv.writer
    except (ImportError, OSError) as error:
        raise UserError(
            f"FFCV cannot be imported ({error}): it needs apt-get install libopencv-imgproc406 libturbojpeg0 "
            "to run, libopencv-dev libturbojpeg0-dev pkg-config g++ to build "
            "(pip install --no-deps --use-pep517 ffcv==1.0.2); or go without it: --loader folder"
        ) from None
    finally:
        torch.set_num_threads(threads)
    import numba

    def set_numba_threads(num_threads: int) -> None:
        ffcv.pipeline.compiler.Compiler.num_threads = num_threads
        numba.set_num_threads(num_threads)

    ffcv.pipeline.compiler.Compiler.set_num_threads = set_numba_threads
    # No pipeline of ours touches the GPU. FFCV's streams would, from a thread whose device is the first GPU,
    # whatever this process's is.
    ffcv.loader.epoch_iterator.IS_CUDA = False
    return ffcv

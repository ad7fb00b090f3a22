"""What was asked of the null GPU since this process began: for scripts that run on it."""

import ctypes
import os


class Counts(ctypes.Structure):
    """null_gpu.h's struct of the same name. It counts on while one looks at it."""

    _fields_ = [("kernels", ctypes.c_long), ("waits", ctypes.c_long)]


def get_counts() -> Counts:
    """Raises KeyError or ValueError where there is no null GPU: see build.py."""
    return Counts.in_dll(ctypes.CDLL(os.environ["LD_PRELOAD"]), "null_gpu_counts")

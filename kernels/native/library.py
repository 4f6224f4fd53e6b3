"""The compiled kernels of this machine: built once by its C++ compiler, kept, and called.

They lie in $XDG_CACHE_HOME/ultramem_megatron (~/.cache/...), under a name that says of which
sources, compiler and processor they are. $CXX chooses the compiler (c++ by default).
"""

import ctypes
import fcntl
import functools
import hashlib
import logging
import os
import platform
import subprocess
import tempfile
from pathlib import Path

import torch
from torch import Tensor

_FOLDER = Path(__file__).parent
_FLAGS = ("-std=c++17", "-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math")
_SHARED = ("-fopenmp", "-shared", "-fPIC")
_WIDE = ("-mprefer-vector-width=512",)  # compilers take half of that, for programs that mix

logger = logging.getLogger(__name__)


class Library:
    """The kernels of one shared object."""

    def __init__(self, file: Path) -> None:
        self._functions = ctypes.CDLL(str(file))

    def call(self, name: str, *arguments: Tensor | int | None) -> None:
        """Run `name`, on as many threads as PyTorch's own kernels take.

        arguments: contiguous tensors on the CPU (None: a null pointer) and sizes, as native.cpp
        has them, without the number of threads.
        """
        words = [_as_c(argument) for argument in (*arguments, torch.get_num_threads())]
        self._functions[name](*words)


def _as_c(argument: Tensor | int | None) -> ctypes.c_void_p | ctypes.c_int64:
    if isinstance(argument, int):
        return ctypes.c_int64(argument)
    return ctypes.c_void_p(None if argument is None else argument.data_ptr())


@functools.cache
def native_library() -> Library | None:
    """The library, built now if it was not yet; None where that fails, with a line in the log."""
    try:
        return Library(_built())
    except (OSError, subprocess.SubprocessError) as error:
        output = getattr(error, "stderr", None)
        reason = (output.strip().splitlines() or [error])[0] if output else error
        logger.info("no native kernels, PyTorch's own serve: %s", reason)
        return None


def call_native(name: str, *arguments: Tensor | int | None) -> None:
    """`Library.call` of this machine's library, which must be there."""
    library = native_library()
    assert library is not None
    library.call(name, *arguments)


def sources() -> list[Path]:
    """Every file that goes into the library."""
    return sorted([*_FOLDER.glob("*.h"), *_FOLDER.parent.glob("*/native.cpp")])


def command(target: Path, *more: str) -> list[str]:
    """The compiler's command line; more: further flags."""
    wide = _WIDE if platform.machine() == "x86_64" else ()
    code = [str(file) for file in sources() if file.suffix == ".cpp"]
    return [_compiler(), *_FLAGS, *wide, *_SHARED, *more, *code, "-o", str(target)]


def _compiler() -> str:
    return os.environ.get("CXX", "c++")


def _built() -> Path:
    """The shared object; of processes that need it at once, one builds it."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    folder = Path(cache) / "ultramem_megatron"
    library = folder / f"kernels-{_fingerprint()}.so"
    if library.exists():
        return library
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "building").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not library.exists():
            logger.info("building the native kernels: %s", library)
            with tempfile.TemporaryDirectory(dir=folder) as scratch:
                part = Path(scratch) / library.name
                subprocess.run(command(part), check=True, capture_output=True, text=True)
                part.replace(library)
    return library


def _fingerprint() -> str:
    found = hashlib.sha256()
    for file in sources():
        found.update(file.read_bytes())
    asked = [_compiler(), "--version"]
    version = subprocess.run(asked, check=True, capture_output=True, text=True).stdout
    for part in (version, _processor(), " ".join(command(Path()))):
        found.update(part.encode())
    return found.hexdigest()[:16]


def _processor() -> str:
    """What tells processors apart for which a compiler makes other code."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    kinds = ("model name", "flags", "Features", "CPU part")
    return "\n".join(sorted({line for line in lines if line.startswith(kinds)}))

"""The C sources of the CPU backend, compiled once on this machine.

The shared object is built for the very CPU it runs on, so it is never shipped: it is kept in the private
folder `code` of $LOWBIT_CACHE (by default `folders.cache`), under a name that is a
hash of the source, the compiler, its options and the CPU. Without a compiler the caller uses
reference.py: the same bytes, many times slower.
"""

import ctypes
import functools
import hashlib
import logging
import os
import platform
import shutil
import stat
import subprocess
import tempfile
from pathlib import Path

from lowbit_dist import folders

_LOG = logging.getLogger(__name__)
_SOURCES = [
    Path(__file__).with_name(f"{name}.c") for name in ("cpu", "matmul", "norm", "tokens", "transpose")
]
_HEADERS = [Path(__file__).with_name(f"{name}.h") for name in ("cpu", "philox", "slots")]
# What functions return; the others nothing.
_RESULTS = {
    "step_codes": ctypes.c_int64,
    "matmul": ctypes.c_int32,
    "largest": ctypes.c_uint32,
    "square_sum": ctypes.c_int64,
}
_NOTHING = (
    "step_weights", "decode", "encode", "pack", "unpack", "code_counts", "round_tokens", "token_values",
    "transpose",
)  # fmt: skip

# Contraction would round fewer times than the reference does. Errno and traps stand in the way of vector
# code. Blocks are copied through buffers of another type.
_OPTIONS = [
    "-std=gnu11",
    "-O3",
    "-ffp-contract=off",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-fno-strict-aliasing",
    "-shared",
    "-fPIC",
]
# From the best to what every compiler takes; the first that compiles is used.
_TUNINGS = [
    ["-march=native", "-mprefer-vector-width=512", "-fopenmp"],
    ["-march=native", "-mprefer-vector-width=512"],
    ["-march=native", "-fopenmp"],
    ["-march=native"],
    [],
]


def available() -> bool:
    """Whether the compiled ops can be used; the first call compiles, and warns once if that fails."""
    return library() is not None


def loaded() -> ctypes.CDLL:
    opened = library()
    if opened is None:
        raise RuntimeError("the C ops are not available; ask available() first, and use reference.py then")
    return opened


@functools.cache
def library() -> ctypes.CDLL | None:
    compiler = _compiler()
    if compiler is None:
        _warn("no C compiler was found (tried $CC, cc, gcc and clang)")
        return None
    try:
        opened = _open(compiler)
    except (OSError, subprocess.SubprocessError) as error:
        _warn(f"{compiler} could not build them ({error})")
        return None
    for name, result in (_RESULTS | dict.fromkeys(_NOTHING)).items():
        getattr(opened, f"lowbit_{name}").restype = result
    return opened


def _warn(reason: str) -> None:
    _LOG.warning(
        "the low-bit CPU ops run in plain torch, with the same results but 50 to 100 times slower: %s. "
        "Install a C compiler (for example: apt-get install gcc libc6-dev)",
        reason,
    )


def _compiler() -> str | None:
    for name in (os.environ.get("CC"), "cc", "gcc", "clang"):
        path = shutil.which(name) if name else None
        if path:
            return path
    return None


def _open(compiler: str) -> ctypes.CDLL:
    """The compiled source, from the cache or into it."""
    folder = _cache_folder()
    if folder is None:  # nowhere safe to keep it: build it for this process alone
        with tempfile.TemporaryDirectory(prefix="lowbit-") as temporary:
            return ctypes.CDLL(str(_build(compiler, Path(temporary) / "cpu.so")))
    path = folder / f"cpu-{_fingerprint(compiler)}.so"
    if path.exists() and _is_private(path):
        try:
            return ctypes.CDLL(str(path))
        except OSError:
            _LOG.warning("%s cannot be loaded; it is built anew", path)
    return ctypes.CDLL(str(_build(compiler, path)))


def _fingerprint(compiler: str) -> str:
    """What the shared object depends on: source, options, compiler and CPU."""
    version = subprocess.run([compiler, "--version"], capture_output=True, timeout=60, check=False).stdout
    sources = [path.read_bytes() for path in (*_SOURCES, *_HEADERS)]
    parts = [*sources, repr((_OPTIONS, _TUNINGS, compiler)).encode(), version, _cpu().encode()]
    return hashlib.sha256(b"\0".join(parts)).hexdigest()[:24]


def _cpu() -> str:
    """The machine and its instruction sets: a home folder may be shared by unlike machines."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    kinds = {
        line for line in lines if line.lower().startswith(("flags", "features", "model name", "cpu part"))
    }
    return "\n".join([platform.machine(), platform.processor(), *sorted(kinds)])


def _build(compiler: str, path: Path) -> Path:
    """Compile to `path`; several processes may do so at once, and none sees half a file."""
    handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    os.close(handle)
    try:
        for tuning in _TUNINGS:
            command = [compiler, *_OPTIONS, *tuning, *map(str, _SOURCES), "-o", temporary, "-lm"]
            result = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
            if result.returncode == 0:
                os.chmod(temporary, 0o700)
                os.replace(temporary, path)
                return path
    finally:
        Path(temporary).unlink(missing_ok=True)
    lines = result.stderr.strip().splitlines() or ["without a message"]
    raise OSError(f"it exits with status {result.returncode}: {lines[0]}")


def _cache_folder() -> Path | None:
    """The folder for compiled code, if only this user can write there: who can, runs code as this user."""
    folder = Path(os.environ.get("LOWBIT_CACHE") or folders.cache()) / "code"
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        _LOG.info("compiled code is not kept: %s", error)
        return None
    if _is_private(folder) and os.access(folder, os.W_OK):
        return folder
    _LOG.warning(
        "compiled code is not kept in %s: others may write there, or this user may not; chmod 700 it", folder
    )
    return None


def _is_private(path: Path) -> bool:
    status = path.stat()
    return status.st_uid == os.getuid() and not status.st_mode & (stat.S_IWGRP | stat.S_IWOTH)

"""The ops of reference.py on CPU tensors: `cpu.c` and `matmul.c`, compiled once on this machine and called
through ctypes.

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

import torch
from torch import Tensor

from lowbit_dist import folders
from lowbit_dist.grid import BLOCK, Grid
from lowbit_dist.ops.fused import NO_FACTORS, RULES, Factors, factors
from lowbit_dist.ops.states import STATES, Stored
from lowbit_dist.ops.targets import Codes, Now, Residual, Rule, Weights

_LOG = logging.getLogger(__name__)
_SOURCES = [Path(__file__).with_name(name) for name in ("cpu.c", "matmul.c")]
_HEADER = Path(__file__).with_name("cpu.h")
TAKES_RESIDUALS = True  # updates codes that keep what they have not got; see `ops.Codes`

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
# A rounded token is as long as a multiple of this, in matmul.c.
_STRIDE = 64
# From the best to what every compiler takes; the first that compiles is used.
_TUNINGS = [
    ["-march=native", "-mprefer-vector-width=512", "-fopenmp"],
    ["-march=native", "-mprefer-vector-width=512"],
    ["-march=native", "-fopenmp"],
    ["-march=native"],
    [],
]


class _Step(ctypes.Structure):
    _fields_ = [
        *(
            (name, ctypes.c_float)
            for name in ("beta1", "rest1", "beta2", "rest2", "correction1", "correction2")
        ),
        *((name, ctypes.c_float) for name in ("eps", "lr", "decay", "keep", "grad_scale")),
        *((name, ctypes.c_uint32) for name in ("step", "tensor", "key0", "key1")),
    ]


class _Shard(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int32) for name in ("low", "high", "bits", "n_threads")),
        *((name, ctypes.c_int64) for name in ("n_blocks", "first_block", "scale_every", "n_scales")),
    ]


class _State(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("m", "v", "m_scale", "v_scale", "grad")),
        *((name, ctypes.c_int32) for name in ("states", "grad_is_bf16")),
    ]


class _Residual(ctypes.Structure):
    _fields_ = [
        ("values", ctypes.c_void_p),
        *((name, ctypes.c_float) for name in ("reach", "threshold", "kept", "per_level")),
        *((name, ctypes.c_int32) for name in ("resets", "is_bf16")),
    ]


class _Product(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("x", "y", "codes", "scale", "rounded", "per_unit", "sums")),
        *(
            (name, ctypes.c_int64)
            for name in ("tokens", "in_features", "out_features", "stride", "group", "groups", "row_scales")
        ),
        *((name, ctypes.c_int32) for name in ("is_bf16", "low", "bits", "n_threads")),
    ]


def available() -> bool:
    """Whether the compiled ops can be used; the first call compiles, and warns once if that fails."""
    return _library() is not None


def step_(target: Codes | Weights, grad: Tensor, state: list[Stored], *, rule: Rule, now: Now) -> Tensor:
    """`rule.fused` names one of fused.py."""
    return _step(target, _state(state, grad), factors(rule, now), RULES.index(rule.fused), now)


def apply_(target: Codes | Weights, u: Tensor, *, now: Now) -> Tensor:
    if isinstance(target, Codes) and target.residual is not None:
        return _accumulate(target, target.residual, u, now)
    return _step(target, _state([], u), NO_FACTORS, RULES.index(None), now)


def _step(target: Codes | Weights, state: object, numbers: Factors, rule: int, now: Now) -> Tensor:
    flips = 0
    code = ctypes.c_int32(rule)
    if isinstance(target, Weights):
        _loaded().lowbit_step_weights(
            _pointer(target.weight),
            state,
            ctypes.c_int64(target.numel),
            ctypes.c_int32(torch.get_num_threads()),
            _numbers(numbers, now, tensor=0),
            code,
        )
    else:
        flips = _loaded().lowbit_step_codes(
            _pointer(target.codes),
            _pointer(target.scale),
            state,
            _shard(target.grid, target.numel, target.first_block, target.scale_every, target.scale),
            _numbers(numbers, now, tensor=target.tensor),
            code,
        )
    return torch.tensor([flips], dtype=torch.int64)


def _accumulate(target: Codes, residual: Residual, u: Tensor, now: Now) -> Tensor:
    kept = residual.kept
    flips = _loaded().lowbit_accumulate(
        _pointer(target.codes),
        _pointer(target.scale),
        _pointer(u),
        ctypes.byref(
            _Residual(
                values=_pointer(residual.values),
                reach=kept.reach,
                threshold=kept.reach if now.threshold is None else now.threshold,
                kept=kept.levels_per_unit * (1 - kept.leak),
                per_level=kept.units_per_level,
                resets=kept.resets,
                is_bf16=kept.states == "bf16",
            )
        ),
        _shard(target.grid, target.numel, target.first_block, target.scale_every, target.scale),
        _numbers(NO_FACTORS, now, tensor=target.tensor),
    )
    return torch.tensor([flips], dtype=torch.int64)


def decode(
    codes: Tensor, scale: Tensor, *, grid: Grid, first_block: int, scale_every: int, out: Tensor
) -> Tensor:
    shard = _shard(grid, out.numel(), first_block, scale_every, scale)
    is_bf16 = ctypes.c_int32(out.dtype == torch.bfloat16)
    _loaded().lowbit_decode(_pointer(codes), _pointer(scale), _pointer(out), is_bf16, shard)
    return out


def matmul(x: Tensor, codes: Tensor, scale: Tensor, *, grid: Grid, scale_every: int, n: int) -> Tensor:
    tokens, k = x.shape
    stride = -(-k // _STRIDE) * _STRIDE
    groups = max(1, k // scale_every)
    y = torch.empty(tokens, n, dtype=x.dtype)
    rounded = torch.empty(tokens * stride, dtype=torch.int8)
    per_token = torch.empty(tokens * (1 + groups), dtype=torch.int32)
    failed = _loaded().lowbit_matmul(
        ctypes.byref(
            _Product(
                x=x.data_ptr(),
                y=y.data_ptr(),
                codes=codes.data_ptr(),
                scale=scale.data_ptr(),
                rounded=rounded.data_ptr(),
                per_unit=per_token.data_ptr(),
                sums=per_token.data_ptr() + 4 * tokens,
                tokens=tokens,
                in_features=k,
                out_features=n,
                stride=stride,
                group=scale_every if groups > 1 else stride,
                groups=groups,
                row_scales=0 if scale.numel() == 1 else groups,
                is_bf16=x.dtype == torch.bfloat16,
                low=grid.low,
                bits=grid.bits,
                n_threads=torch.get_num_threads(),
            )
        )
    )
    if failed:
        raise MemoryError(f"there is no memory for a few rows of a weight [{n}, {k}]")
    return y


def encode(weight: Tensor, scale: Tensor, *, grid: Grid, scale_every: int, first_block: int) -> Tensor:
    codes = torch.empty(weight.numel() * grid.bits // 8, dtype=torch.uint8)
    shard = _shard(grid, weight.numel(), first_block, scale_every, scale)
    _loaded().lowbit_encode(_pointer(weight), _pointer(scale), _pointer(codes), shard)
    return codes


def pack(levels: Tensor, *, grid: Grid) -> Tensor:
    codes = torch.empty(levels.numel() * grid.bits // 8, dtype=torch.uint8)
    _loaded().lowbit_pack(_pointer(levels), _pointer(codes), _shard(grid, levels.numel()))
    return codes


def unpack(codes: Tensor, *, grid: Grid) -> Tensor:
    levels = torch.empty(codes.numel() * 8 // grid.bits, dtype=torch.int8)
    _loaded().lowbit_unpack(_pointer(codes), _pointer(levels), _shard(grid, levels.numel()))
    return levels


def code_counts(codes: Tensor, *, grid: Grid) -> Tensor:
    # A code has at most 2^bits values, of which a ternary grid leaves one unused.
    counts = torch.zeros(2**grid.bits, dtype=torch.int64)
    _loaded().lowbit_code_counts(
        _pointer(codes), _pointer(counts), _shard(grid, codes.numel() * 8 // grid.bits)
    )
    return counts[: grid.n_levels]


def _pointer(tensor: Tensor | None) -> ctypes.c_void_p:
    return ctypes.c_void_p(None if tensor is None else tensor.data_ptr())


def _numbers(numbers: Factors, now: Now, *, tensor: int) -> object:
    return ctypes.byref(
        _Step(
            **numbers._asdict(),
            lr=now.lr,
            decay=now.decay,
            keep=1 - now.decay,
            step=now.step,
            tensor=tensor,
            key0=now.seed & 0xFFFFFFFF,
            key1=now.seed >> 32,
        )
    )


def _shard(
    grid: Grid, n: int, first_block: int = 0, scale_every: int = BLOCK, scale: Tensor | None = None
) -> object:
    return ctypes.byref(
        _Shard(
            low=grid.low,
            high=grid.high,
            bits=grid.bits,
            n_threads=torch.get_num_threads(),
            n_blocks=n // BLOCK,
            first_block=first_block,
            scale_every=scale_every,
            n_scales=0 if scale is None else scale.numel(),
        )
    )


def _state(state: list[Stored], grad: Tensor) -> object:
    values = [_pointer(slot.values) for slot in state] + [_pointer(None)] * 2
    scales = [_pointer(slot.scale) for slot in state] + [_pointer(None)] * 2
    return ctypes.byref(
        _State(
            m=values[0],
            v=values[1],
            m_scale=scales[0],
            v_scale=scales[1],
            grad=_pointer(grad),
            states=STATES.index(state[0].states) if state else 0,
            grad_is_bf16=grad.dtype == torch.bfloat16,
        )
    )


def _loaded() -> ctypes.CDLL:
    library = _library()
    if library is None:
        raise RuntimeError("the C ops are not available; ask available() first, and use reference.py then")
    return library


@functools.cache
def _library() -> ctypes.CDLL | None:
    compiler = _compiler()
    if compiler is None:
        _warn("no C compiler was found (tried $CC, cc, gcc and clang)")
        return None
    try:
        library = _open(compiler)
    except (OSError, subprocess.SubprocessError) as error:
        _warn(f"{compiler} could not build them ({error})")
        return None
    for name in ("step_codes", "accumulate"):
        getattr(library, f"lowbit_{name}").restype = ctypes.c_int64
    for name in ("step_weights", "decode", "encode", "pack", "unpack", "code_counts"):
        getattr(library, f"lowbit_{name}").restype = None
    library.lowbit_matmul.restype = ctypes.c_int32
    return library


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
    sources = [path.read_bytes() for path in (*_SOURCES, _HEADER)]
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

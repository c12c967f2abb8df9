"""What each op means, in PyTorch: the specification that the C and Triton backends reproduce byte for byte.

All arithmetic is float32 in exactly this order, one rounding per operation, no fused multiply-add:

    g = float(grad) * grad_scale
    m = m * beta1 + g * (1 - beta1)                 v = v * beta2 + (g * g) * (1 - beta2)
    u = (m * c1) / (sqrt(v * c2) + eps)             c = 1 / (1 - beta^step), in double, then rounded

    weights:  w = w * (1 - lr * weight_decay) - lr * u
    codes:    d = -((lr / scale) * u) - (lr * weight_decay) * level            the step, in levels
              a = min(|d|, 65536)    n = floor(a)    t = uint32((a - n) * 2^32)
              level = clamp(level + sign(d) * (n + (word < t)), low, high)     word: 32 random bits (rng.py)

Inside the grid the new level's expectation is `level + d` to 2^-32. The step is rounded, never `level + d`:
near level 128 a float32 sum resolves 1.5e-5 of a level, and smaller steps would be lost instead of made rare.

Moments are kept in float32, in bfloat16 (rounded to nearest even), or in 8 bits by power companding, with a
scale for each block of 256:

    m = (q * |q|) * m_scale      m_scale = max|m| / 127^2     |q| = #{k in 1..127: y >= (k - 1/2)^2}
    v = (q^2 * q^2) * v_scale    v_scale = max(v) / 255^4       q = #{k in 1..255: y >= (k - 1/2)^4}

where y = |m| * (1 / m_scale), or v * (1 / v_scale). A v that decoded to 0 would divide an update by eps, so
its q is at least 1. A scale below the smallest normal float32 is stored as 0, and y is 0 then. Gradients and
moments are finite; for others the result is unspecified.

Letters: N elements, B = ceil(N / 256) blocks. Every op works through its tensors in chunks of bounded memory.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from lowbit_dist.grid import BLOCK, Grid
from lowbit_dist.ops import rng

STATES = ("fp32", "bf16", "int8")

M_LEVELS = 127
V_LEVELS = 255
M_SQUARE = float(M_LEVELS**2)
V_FOURTH = float(V_LEVELS**4)
SMALLEST_SCALE = torch.finfo(torch.float32).tiny
LARGEST_STEP = 65536.0  # levels; beyond any grid, and small enough for exact integers

# 32k elements: the temporaries of a chunk stay in a core's cache.
_CHUNK_BLOCKS = 128


@dataclass
class Moments:
    """AdamW's moments of N elements as they are stored: float32, bfloat16, or 8 bits with block scales."""

    m: Tensor  # [N] float32 | bfloat16 | int8
    v: Tensor  # [N] float32 | bfloat16 | uint8
    m_scale: Tensor | None = None  # [B] float32, with 8 bits only
    v_scale: Tensor | None = None  # [B] float32, with 8 bits only

    @staticmethod
    def zeros(n: int, states: str, device: torch.device | str = "cpu") -> "Moments":
        """Moments before the first step; `states` is one of STATES."""
        if states not in STATES:
            raise ValueError(f"states is {states!r}; it must be one of {', '.join(STATES)}")
        if states == "int8":
            n_blocks = -(-n // BLOCK)
            return Moments(
                torch.zeros(n, dtype=torch.int8, device=device),
                torch.zeros(n, dtype=torch.uint8, device=device),
                torch.zeros(n_blocks, dtype=torch.float32, device=device),
                torch.zeros(n_blocks, dtype=torch.float32, device=device),
            )
        dtype = torch.float32 if states == "fp32" else torch.bfloat16
        return Moments(torch.zeros(n, dtype=dtype, device=device), torch.zeros(n, dtype=dtype, device=device))

    @property
    def states(self) -> str:
        """The name of the stored format, one of STATES."""
        return {torch.float32: "fp32", torch.bfloat16: "bf16", torch.int8: "int8"}[self.m.dtype]

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return tuple(t for t in (self.m, self.v, self.m_scale, self.v_scale) if t is not None)

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors)


@dataclass(frozen=True, kw_only=True)
class AdamWStep:
    """The numbers of one optimizer step (AdamW, arXiv:1711.05101)."""

    lr: float
    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    step: int  # 1 for the first
    seed: int  # 64 bits
    grad_scale: float = 1.0

    def __post_init__(self) -> None:
        if not 1 <= self.step < 2**32:
            raise ValueError(f"step is {self.step}; steps count from 1 and stay below 2**32")
        if not 0 <= self.seed < 2**64:
            raise ValueError(f"seed is {self.seed}; it must be from 0 to 2**64 - 1")

    @property
    def correction1(self) -> float:
        return 1 / (1 - self.beta1**self.step)

    @property
    def correction2(self) -> float:
        return 1 / (1 - self.beta2**self.step)

    @property
    def decay(self) -> float:
        """What a step takes off a weight for its own size, as a fraction."""
        return self.lr * self.weight_decay


def adamw_codes_(
    codes: Tensor,  # [B * grid.bytes_per_block] uint8, changed in place
    scale: Tensor,  # [scales of the whole tensor] float32, positive
    grad: Tensor,  # [N] float32 | bfloat16, N = 256 B
    moments: Moments,  # of N elements, changed in place
    *,
    grid: Grid,
    now: AdamWStep,
    tensor: int,  # the tensor's number in the random counter, below 2**32
    first_block: int,  # index of the first block within the whole tensor
    blocks_per_scale: int,  # block b of the whole tensor has scale[b // blocks_per_scale]
) -> Tensor:  # [1] int64
    """One AdamW step, rounded stochastically to the grid; the number of codes that changed."""
    flips = torch.zeros(1, dtype=torch.int64, device=codes.device)
    for start, stop in _chunks(grad.numel()):
        n_blocks = (stop - start) // BLOCK
        block = first_block + start // BLOCK
        packed = codes[start * grid.bits // 8 : stop * grid.bits // 8]
        old = unpack(packed, grid=grid).int().view(n_blocks, BLOCK)

        update = _adamw_update(grad, moments, start, stop, now).view(n_blocks, BLOCK)
        of_block = scale_of_blocks(scale, n_blocks, block, blocks_per_scale)
        d = -((torch.full_like(of_block, now.lr) / of_block) * update) - old.float() * now.decay
        a = d.abs().clamp(max=LARGEST_STEP)
        whole = a.floor()
        threshold = ((a - whole) * 2.0**32).to(torch.int64)
        words = rng.block_words(
            now.seed, step=now.step, tensor=tensor, first_block=block, n_blocks=n_blocks, device=codes.device
        )
        moved = whole.int() + (words < threshold).int()
        new = (old + torch.where(d < 0, -moved, moved)).clamp(grid.low, grid.high)

        packed.copy_(pack(new.to(torch.int8).view(-1), grid=grid))
        flips += (new != old).sum()
    return flips


def adamw_weights_(
    weight: Tensor,  # [N] float32, changed in place
    grad: Tensor,  # [N] float32 | bfloat16
    moments: Moments,  # of N elements, changed in place
    *,
    now: AdamWStep,
) -> None:
    """One AdamW step of ordinary weights; the last block of moments may be short."""
    for start, stop in _chunks(grad.numel()):
        update = _adamw_update(grad, moments, start, stop, now)
        part = weight[start:stop]
        part.copy_(part * (1 - now.decay) - update * now.lr)


def decode(
    codes: Tensor,  # [B * grid.bytes_per_block] uint8
    scale: Tensor,  # [scales of the whole tensor] float32
    *,
    grid: Grid,
    first_block: int,
    blocks_per_scale: int,
    out: Tensor,  # [N] float32 | bfloat16, written
) -> Tensor:  # out
    """The weights `scale * level`, a float32 product rounded to nearest even in `out`'s precision."""
    for start, stop in _chunks(out.numel()):
        n_blocks = (stop - start) // BLOCK
        levels = unpack(codes[start * grid.bits // 8 : stop * grid.bits // 8], grid=grid).view(
            n_blocks, BLOCK
        )
        of_block = scale_of_blocks(scale, n_blocks, first_block + start // BLOCK, blocks_per_scale)
        out[start:stop].view(n_blocks, BLOCK).copy_(levels.float() * of_block)
    return out


def pack(levels: Tensor, *, grid: Grid) -> Tensor:
    """The codes of `levels` ([N] int8, N = 256 B) as grid.py lays them out: [B * bytes_per_block] uint8."""
    codes = (levels.to(torch.int16) - grid.low).to(torch.uint8)
    if grid.bits == 8:
        return codes
    if grid.bits == 4:
        half = codes.view(-1, 2, BLOCK // 2)
        return (half[:, 0] | (half[:, 1] << 4)).view(-1)
    quarter = (codes & 3).view(-1, 4, BLOCK // 4)
    low = quarter[:, 0] | (quarter[:, 1] << 2) | (quarter[:, 2] << 4) | (quarter[:, 3] << 6)
    if grid.bits == 2:
        return low.view(-1)
    eighth = (codes >> 2).view(-1, 8, BLOCK // 8)
    high = eighth[:, 0].clone()
    for i in range(1, 8):
        high |= eighth[:, i] << i
    return torch.cat([low, high], dim=1).view(-1)


def unpack(codes: Tensor, *, grid: Grid) -> Tensor:
    """The levels of packed codes: [N] int8, the inverse of `pack`."""
    blocks = codes.view(-1, grid.bytes_per_block)
    if grid.bits == 8:
        plain = blocks
    elif grid.bits == 4:
        plain = torch.cat([blocks & 15, blocks >> 4], dim=1)
    else:
        plain = torch.cat([(blocks[:, :64] >> shift) & 3 for shift in (0, 2, 4, 6)], dim=1)
        if grid.bits == 3:
            plain |= torch.cat([((blocks[:, 64:] >> i) & 1) << 2 for i in range(8)], dim=1)
    return (plain.to(torch.int16) + grid.low).to(torch.int8).view(-1)


def quantize(
    weight: Tensor,  # [N] float32
    scale: Tensor,  # [scales of the whole tensor] float32
    *,
    grid: Grid,
    first_block: int,
    blocks_per_scale: int,
) -> Tensor:  # [N] int8
    """The level nearest to each weight (ties to the even level), within the grid."""
    levels = torch.empty(weight.shape, dtype=torch.int8, device=weight.device)
    for start, stop in _chunks(weight.numel()):
        n_blocks = (stop - start) // BLOCK
        of_block = scale_of_blocks(scale, n_blocks, first_block + start // BLOCK, blocks_per_scale)
        nearest = (weight[start:stop].view(n_blocks, BLOCK) / of_block).round().clamp(grid.low, grid.high)
        levels[start:stop].view(n_blocks, BLOCK).copy_(nearest)
    return levels


def code_counts(codes: Tensor, *, grid: Grid) -> Tensor:  # [grid.n_levels] int64
    """How many elements are at each level, from `grid.low` to `grid.high`."""
    counts = torch.zeros(grid.n_levels, dtype=torch.int64, device=codes.device)
    for start, stop in _chunks(codes.numel() * 8 // grid.bits):
        levels = unpack(codes[start * grid.bits // 8 : stop * grid.bits // 8], grid=grid)
        counts += torch.bincount(levels.int() - grid.low, minlength=grid.n_levels)[: grid.n_levels]
    return counts


def moments_to_float(moments: Moments) -> tuple[Tensor, Tensor]:  # [N] float32, [N] float32
    """The values that the stored moments stand for."""
    return _load_moments(moments, 0, moments.m.numel())


def scale_of_blocks(scale: Tensor, n_blocks: int, first_block: int, blocks_per_scale: int) -> Tensor:
    """The scale of each block: [n_blocks, 1] float32."""
    block = torch.arange(first_block, first_block + n_blocks, device=scale.device)
    return scale[block // blocks_per_scale].unsqueeze(1)


def _chunks(n: int) -> Iterator[tuple[int, int]]:
    """Element ranges that cover 0..n and begin on block borders."""
    size = _CHUNK_BLOCKS * BLOCK
    for start in range(0, n, size):
        yield start, min(start + size, n)


def _adamw_update(grad: Tensor, moments: Moments, start: int, stop: int, now: AdamWStep) -> Tensor:
    """Move the moments of elements `start..stop` by one step; the update u, [stop - start] float32."""
    g = grad[start:stop].float() * now.grad_scale
    m, v = _load_moments(moments, start, stop)
    m = m * now.beta1 + g * (1 - now.beta1)
    v = v * now.beta2 + (g * g) * (1 - now.beta2)
    _store_moments(moments, start, stop, m, v)
    # torch's float32 sqrt is an ulp off in places; a double root, rounded once more, is the IEEE root.
    root = (v * now.correction2).double().sqrt().float()
    return (m * now.correction1) / (root + now.eps)


def _load_moments(moments: Moments, start: int, stop: int) -> tuple[Tensor, Tensor]:
    m, v = moments.m[start:stop].float(), moments.v[start:stop].float()
    if moments.m_scale is None or moments.v_scale is None:
        return m, v
    blocks = slice(start // BLOCK, -(-stop // BLOCK))
    m_scale = moments.m_scale[blocks].repeat_interleave(BLOCK)[: stop - start]
    v_scale = moments.v_scale[blocks].repeat_interleave(BLOCK)[: stop - start]
    v = v * v
    return (m * m.abs()) * m_scale, (v * v) * v_scale


def _store_moments(moments: Moments, start: int, stop: int, m: Tensor, v: Tensor) -> None:
    if moments.m_scale is None or moments.v_scale is None:
        moments.m[start:stop].copy_(m)
        moments.v[start:stop].copy_(v)
        return
    n = stop - start
    blocks = slice(start // BLOCK, -(-stop // BLOCK))
    code, moments.m_scale[blocks] = _compand(m.abs(), M_SQUARE, 2)
    moments.m[start:stop].copy_(torch.where(m < 0, -code, code)[:n])
    code, moments.v_scale[blocks] = _compand(v, V_FOURTH, 4)
    moments.v[start:stop].copy_(code[:n].clamp(min=1))


def _compand(x: Tensor, top: float, power: int) -> tuple[Tensor, Tensor]:
    """Codes ([len(x)] float32) and scales ([B] float32: the largest of a block / `top`) of x >= 0."""
    blocks = pad(x, (0, -len(x) % BLOCK)).view(-1, BLOCK)
    largest = blocks.amax(dim=1)
    scale = largest / torch.full_like(largest, top)
    usable = scale >= SMALLEST_SCALE
    scale = torch.where(usable, scale, 0.0)
    inverse = torch.where(usable, torch.ones_like(scale) / scale, 0.0)
    y = blocks * inverse.unsqueeze(1)
    # How many thresholds y reaches: a root tells to within one, the thresholds themselves decide.
    code = (y.sqrt() if power == 2 else y.sqrt().sqrt()).round()
    code = code - (y < _threshold(code, power)).float()
    code = code + (y >= _threshold(code + 1, power)).float()
    return code.clamp(min=0).view(-1)[: len(x)], scale


def _threshold(code: Tensor, power: int) -> Tensor:
    """The least y that has this code."""
    square = (code - 0.5) * (code - 0.5)
    return square if power == 2 else square * square

"""What each op means, in PyTorch: the specification that the C and Triton backends reproduce byte for byte.

One step of an optimizer is a gradient that becomes a direction, and a direction that moves the weights:

    g            = float(grad) * grad_scale
    u, slots'    = rule.update(g, slots)            the rule: optim/adamw.py, optim/lion.py, or anybody's
    target       moves by -lr * u                   `apply_`: below, the same for every rule

The target is ordinary weights, or codes, which have no weights to add a small number to.  A weight is
scale * level and a level an integer, stored as the code `level - grid.low`: on the ternary grid the levels
-1, 0, 1 are the codes 0, 1, 2, in 2 bits each.  256 consecutive elements of the flattened tensor are a
*block*, four *planes* of 64; a plane has one scale, and a scale serves `scale_every` elements: 64, 128, ...,
a row of any whole number of planes, or the whole tensor.

    element      0           64          128         192         256
                 +-----------+-----------+-----------+-----------+---
    block 0      |  plane 0  |  plane 1  |  plane 2  |  plane 3  | block 1 ...
                 +-----------+-----------+-----------+-----------+---
    ternary      byte j = code j | code 64+j << 2 | code 128+j << 4 | code 192+j << 6        64 bytes
    scale_every  64:  s0          s1          s2          s3        s4
                 128: s0          s0          s1          s1        s2
                 192: s0          s0          s0          s1        s1      (a row of K = 192)
    random       one Philox call gives words to elements j, j + 64, j + 128 and j + 192      64 calls

So the step is measured in levels and rounded to an integer by chance, up as often as its fraction says:

    d = -((lr / scale) * u) - (lr * weight_decay) * level           lr 0.001, scale 0.02, u -6, no decay,
    a = min(|d|, 65536)    n = floor(a)                             level 1:  d = 0.3, n = 0
    t = uint32((a - n) * 2^32)                                      t = 0.3 * 2^32
    level = clamp(level + sign(d) * (n + (word < t)), low, high)    2 with a chance of 0.3, else 1

`word` is 32 random bits, a function of seed, step, tensor and position alone (rng.py): nobody keeps a
generator, so whoever computes an element, on a CPU or a GPU, in whatever order and on however many workers,
draws the same word for it.  Seed 0, step 1, tensor 0:

    element         0     1     2     3     4     5     6     7   ...  256   257   258   259
    word / 2^32   0.52  0.79  0.77  0.13  0.82  0.84  0.06  0.08       0.88  0.00  0.77  0.78
    level 1 ->      1     1     1     2     1     1     2     2   ...    1     2     1     1

    >>> from lowbit_dist.grid import GRIDS
    >>> scale, grid = torch.tensor([0.02]), GRIDS["int4"]
    >>> now = Now(lr=0.001, weight_decay=0.0, step=1, seed=0)
    >>> codes = pack(torch.ones(512, dtype=torch.int8), grid=grid)
    >>> apply_(Codes(codes, scale, 512, grid, tensor=0, first_block=0), torch.full((512,), -6.0), now=now)
    tensor([144])
    >>> unpack(codes, grid=grid)[:8].tolist()
    [1, 1, 1, 2, 1, 1, 2, 2]
    >>> shard = pack(torch.ones(256, dtype=torch.int8), grid=grid)  # block 1 alone, as a worker has it
    >>> apply_(Codes(shard, scale, 512, grid, tensor=0, first_block=1), torch.full((256,), -6.0), now=now)
    tensor([69])
    >>> torch.equal(shard, codes[128:])
    True

144 of 512 moved, where 0.3 * 512 = 154 were to be expected, give or take 10.  Inside the grid the new level's
expectation is `level + d` to 2^-32: nothing that a gradient says is lost, it is only made rare.  Beyond, the
level saturates.  The step is rounded, never `level + d`: near level 128 a float32 sum resolves 1.5e-5 of a
level, and smaller steps would be lost.  Shards are cut on block borders, so no number of workers changes what
shares a byte, a scale or a call.  Ordinary weights move by

    w = w * (1 - lr * weight_decay) - u * lr

Where rounding is on its way from chance to the nearest level, at `nearest` of 0 to 1, the fraction a - n is
replaced by

    clamp((a - n - nearest / 2) / (1 - nearest), 0, 1)        nearest 0.5: 0.25 -> 0, 0.6 -> 0.7, 0.8 -> 1

All arithmetic is float32 in exactly this order, one rounding per operation, no fused multiply-add; constants
such as lr * weight_decay are computed in double and then rounded.  So the backends agree bit for bit, and
are tested against this file by equality.  `rng.py` says which word is whose, `states.py` how slots are kept,
`grid.py` where in a block a code is.  Every op works through its tensors in chunks of bounded memory.
Letters: N elements, B = N / 256 blocks.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from lowbit_dist.grid import BLOCK, PLANE, Grid
from lowbit_dist.ops import rng
from lowbit_dist.ops.states import Stored
from lowbit_dist.ops.targets import RESIDUAL_TOP, Accumulator, Codes, Now, Residual, Rule, Weights
from lowbit_dist.ops.tokens import int8_product as int8_product
from lowbit_dist.ops.tokens import round_tokens
from lowbit_dist.ops.tokens import rounded_tokens as rounded_tokens
from lowbit_dist.ops.tokens import token_values as token_values

LARGEST_STEP = 65536.0  # levels; beyond any grid, and small enough for exact integers

# Elements.  On a CPU the temporaries of a chunk stay in a core's cache; on a GPU they are worth a launch.
_CHUNK = {"cpu": 128 * BLOCK}
_OTHER_CHUNK = 2**14 * BLOCK


def step_(
    target: Codes | Weights,
    grad: Tensor,  # [N] float32 | bfloat16
    state: list[Stored],  # of N elements each, changed in place
    *,
    rule: Rule,
    now: Now,
) -> Tensor:  # [1] int64
    """One step of a rule whose scope is an element; the number of codes that changed."""
    flips = torch.zeros(1, dtype=torch.int64, device=grad.device)
    for start, stop in chunks(grad.numel(), grad.device):
        u = direction(grad, state, start, stop, rule=rule, now=now)
        flips += apply_(target.part(start, stop), u, now=now)
    return flips


def direction(
    grad: Tensor,  # [N] float32 | bfloat16
    state: list[Stored],  # of N elements each; `start` to `stop - 1` change in place
    start: int,
    stop: int,
    *,
    rule: Rule,
    now: Now,
) -> Tensor:  # [stop - start] float32
    """The first half of a step, for elements `start` to `stop - 1`."""
    g = grad[start:stop].float() * now.grad_scale
    u, *moved = rule.update(g, *(slot.load(start, stop) for slot in state), step=now.update)
    if len(moved) != len(state) or any(x.shape != g.shape or x.dtype != g.dtype for x in (u, *moved)):
        given = ", ".join(f"{list(x.shape)} {x.dtype}" for x in (u, *moved))
        raise ValueError(
            f"{type(rule).__name__}.update gave {given}; it must give a direction and {len(state)} slots, "
            f"each {list(g.shape)} {g.dtype}"
        )
    for slot, x in zip(state, moved, strict=True):
        slot.store(start, stop, x)
    return u


def apply_(
    target: Codes | Weights,
    u: Tensor,  # [N] float32
    *,
    now: Now,
) -> Tensor:  # [1] int64
    """The second half of a step: move `target` by -lr * u; the number of codes that changed."""
    flips = torch.zeros(1, dtype=torch.int64, device=u.device)
    for start, stop in chunks(u.numel(), u.device):
        part, of_part = target.part(start, stop), u[start:stop]
        if isinstance(part, Weights):
            part.weight.copy_(part.weight * (1 - now.decay) - of_part * now.lr)
        elif part.next_scale is not None:
            flips += _rescale_codes(part, part.next_scale, of_part, now)
        elif part.residual is None:
            flips += _round_codes(part, of_part, now)
        else:
            flips += _accumulate(part, part.residual, of_part, now)
    return flips


def _round_codes(target: Codes, u: Tensor, now: Now) -> Tensor:
    grid, n = target.grid, target.numel
    old = unpack(target.codes, grid=grid).int().view(-1, PLANE)
    scale = scale_of_planes(target.scale, n, target.first_block, target.scale_every)
    d = -((torch.full_like(scale, now.lr) / scale) * u.view(-1, PLANE)) - old.float() * now.decay
    a = d.abs().clamp(max=LARGEST_STEP)
    whole = a.floor()
    threshold = (_chance(a - whole, now) * 2.0**32).to(torch.int64)
    moved = whole.int() + (_words(target, now) < threshold).int()
    new = (old + torch.where(d < 0, -moved, moved)).clamp(grid.low, grid.high)
    target.codes.copy_(pack(new.to(torch.int8).view(-1), grid=grid))
    return (new != old).sum()


def _rescale_codes(target: Codes, next_scale: Tensor, u: Tensor, now: Now) -> Tensor:
    """The moved weight in levels of another scale, where hardly any is whole, rounded by chance; in double,
    for a float32 would lose small steps beside a level.
    """
    grid, n, place = target.grid, target.numel, (target.first_block, target.scale_every)
    old = unpack(target.codes, grid=grid).int().view(-1, PLANE)
    before, after = (scale_of_planes(scale, n, *place).double() for scale in (target.scale, next_scale))
    x = (old.double() * before * (1 - now.decay) - u.view(-1, PLANE).double() * now.lr) / after
    x = x.clamp(grid.low, grid.high)
    whole = x.floor()
    threshold = (_chance(x - whole, now) * 2.0**32).to(torch.int64)
    new = whole.int() + (_words(target, now) < threshold).int()
    target.codes.copy_(pack(new.to(torch.int8).view(-1), grid=grid))
    return (new != old).sum()


def _accumulate(target: Codes, residual: Residual, u: Tensor, now: Now) -> Tensor:
    """A step of x = level + residual: the nearest level where x is beyond the threshold of the old one, and
    the rest, rounded by chance to what can be stored, its new residual.
    """
    grid, kept, stored = target.grid, residual.kept, residual.values.view(-1, PLANE)
    old = unpack(target.codes, grid=grid).float().view(-1, PLANE)
    scale = scale_of_planes(target.scale, target.numel, target.first_block, target.scale_every)
    x = old + stored.float() * (kept.levels_per_unit * (1 - kept.leak))
    x = x * (1 - now.decay) - (torch.full_like(scale, now.lr) / scale) * u.view(-1, PLANE)
    threshold = kept.reach if now.threshold is None else now.threshold
    new = torch.where((x - old).abs() > threshold, x.round(), old).clamp(grid.low, grid.high)
    has_flipped = new != old
    rest = (x - new).clamp(-kept.reach, kept.reach) * kept.units_per_level
    if kept.resets:
        rest = rest.masked_fill(has_flipped, 0.0)
    stored.copy_(_storable(rest, _words(target, now), kept))
    target.codes.copy_(pack(new.to(torch.int8).view(-1), grid=grid))
    return has_flipped.sum()


def _storable(rest: Tensor, words: Tensor, kept: Accumulator) -> Tensor:
    """Residuals rounded by chance: to whole counts, or to bfloat16, which is the upper half of a float32."""
    if kept.states == "bf16":
        bits = rest.view(torch.int32) + (words >> 16).int()
        return (bits & ~0xFFFF).view(torch.float32)
    whole = rest.floor()
    counts = whole + (words < ((rest - whole) * 2.0**32).to(torch.int64)).float()
    return counts.clamp(-RESIDUAL_TOP, RESIDUAL_TOP)


def _chance(fraction: Tensor, now: Now) -> Tensor:
    """How often a fraction of a level becomes a whole one."""
    if not now.nearest:
        return fraction
    return ((fraction - now.nearest / 2) * now.slope).clamp(0, 1)


def _words(target: Codes, now: Now) -> Tensor:  # [planes, PLANE]
    """The step's random word of each element."""
    return rng.block_words(
        now.seed,
        step=now.step,
        tensor=target.tensor,
        first_block=target.first_block,
        n_blocks=target.numel // BLOCK,
        device=target.codes.device,
    ).view(-1, PLANE)


def decode(
    codes: Tensor,  # [B * grid.bytes_per_block] uint8
    scale: Tensor,  # [scales of the whole tensor] float32
    *,
    grid: Grid,
    first_block: int,
    scale_every: int,
    out: Tensor,  # [N] float32 | bfloat16, written
) -> Tensor:  # out
    """The weights `scale * level`, a float32 product rounded to nearest even in `out`'s precision."""
    for start, stop in chunks(out.numel(), out.device):
        levels = unpack(codes[start * grid.bits // 8 : stop * grid.bits // 8], grid=grid).view(-1, PLANE)
        of_plane = scale_of_planes(scale, stop - start, first_block + start // BLOCK, scale_every)
        out[start:stop].view(-1, PLANE).copy_(levels.float() * of_plane)
    return out


def matmul(
    x: Tensor,  # [T, K] float32 | bfloat16
    codes: Tensor,  # of a weight [n, K]
    scale: Tensor,  # [n K / scale_every] float32
    *,
    grid: Grid,
    scale_every: int,
    n: int,
) -> Tensor:  # [T, n], in x's precision
    """Tokens in integers of 8 bits times a weight's levels.

    y = (s_1 * sum_1 + s_2 * sum_2 + ...) / a: sum_g of q * level over the part of a row whose scale is s_g,
    exact and then rounded to float32, as is each operation after it.
    """
    q, per_unit = round_tokens(x)
    levels = unpack(codes, grid=grid).view(n, -1)
    size = min(scale_every, x.shape[1])
    scales = scale.view(-1, 1) if len(scale) == 1 else scale.view(n, -1)
    y = torch.zeros(len(x), n, device=x.device)
    for g in range(scales.shape[1]):
        part = slice(g * size, (g + 1) * size)
        sums = q[:, part].double() @ levels[:, part].double().t()  # below 2^53: exact
        y += sums.float() * scales[:, g]
    return (y / per_unit[:, None]).to(x.dtype)


def pack(levels: Tensor, *, grid: Grid) -> Tensor:
    """The codes of `levels` ([N] int8, N = 256 B) as grid.py lays them out: [B * bytes_per_block] uint8."""
    codes = (levels.to(torch.int16) - grid.low).to(torch.uint8)
    if grid.bits == 8:
        return codes
    if grid.bits == 4:
        return _nibbles(codes).view(-1)
    if grid.bits == 6:
        return torch.cat([_nibbles(codes & 15), _pairs(codes >> 4)], dim=1).view(-1)
    low = _pairs(codes & 3)
    if grid.bits == 2:
        return low.view(-1)
    eighth = (codes >> 2).view(-1, 8, BLOCK // 8)
    high = eighth[:, 0].clone()
    for i in range(1, 8):
        high |= eighth[:, i] << i
    return torch.cat([low, high], dim=1).view(-1)


def _nibbles(codes: Tensor) -> Tensor:  # [N] of 4 bits -> [B, 128]
    half = codes.view(-1, 2, BLOCK // 2)
    return half[:, 0] | (half[:, 1] << 4)


def _pairs(codes: Tensor) -> Tensor:  # [N] of 2 bits -> [B, 64]
    quarter = codes.view(-1, 4, BLOCK // 4)
    return quarter[:, 0] | (quarter[:, 1] << 2) | (quarter[:, 2] << 4) | (quarter[:, 3] << 6)


def unpack(codes: Tensor, *, grid: Grid) -> Tensor:
    """The levels of packed codes: [N] int8, the inverse of `pack`."""
    blocks = codes.view(-1, grid.bytes_per_block)
    if grid.bits == 8:
        plain = blocks
    elif grid.bits in (4, 6):
        plain = torch.cat([blocks[:, :128] & 15, blocks[:, :128] >> 4], dim=1)
        if grid.bits == 6:
            plain |= torch.cat([((blocks[:, 128:] >> shift) & 3) << 4 for shift in (0, 2, 4, 6)], dim=1)
    else:
        plain = torch.cat([(blocks[:, :64] >> shift) & 3 for shift in (0, 2, 4, 6)], dim=1)
        if grid.bits == 3:
            plain |= torch.cat([((blocks[:, 64:] >> i) & 1) << 2 for i in range(8)], dim=1)
    return (plain.to(torch.int16) + grid.low).to(torch.int8).view(-1)


def encode(
    weight: Tensor,  # [N] float32
    scale: Tensor,  # [scales of the whole tensor] float32
    *,
    grid: Grid,
    scale_every: int,
    first_block: int,
) -> Tensor:  # [B * grid.bytes_per_block] uint8
    """The codes of the level nearest to each weight (ties to the even level), within the grid."""
    levels = torch.empty(weight.shape, dtype=torch.int8, device=weight.device)
    for start, stop in chunks(weight.numel(), weight.device):
        of_plane = scale_of_planes(scale, stop - start, first_block + start // BLOCK, scale_every)
        nearest = (weight[start:stop].view(-1, PLANE) / of_plane).round().clamp(grid.low, grid.high)
        levels[start:stop].view(-1, PLANE).copy_(nearest)
    return pack(levels, grid=grid)


def code_counts(codes: Tensor, *, grid: Grid) -> Tensor:  # [grid.n_levels] int64
    """How many elements are at each level, from `grid.low` to `grid.high`."""
    counts = torch.zeros(grid.n_levels, dtype=torch.int64, device=codes.device)
    for start, stop in chunks(codes.numel() * 8 // grid.bits, codes.device):
        levels = unpack(codes[start * grid.bits // 8 : stop * grid.bits // 8], grid=grid)
        counts += torch.bincount(levels.int() - grid.low, minlength=grid.n_levels)[: grid.n_levels]
    return counts


def transposed(x: Tensor) -> Tensor:  # [N, T] of [T, N], contiguous
    return x.t().contiguous()


def largest(tensors: Sequence[Tensor]) -> Tensor:  # [1] float64
    """The largest magnitude of all elements; infinity if one of them is not finite."""
    most = torch.zeros(1, dtype=torch.float64, device=tensors[0].device)
    for x in tensors:
        if x.numel():
            low, high = torch.aminmax(x)
            # maximum, unlike max(), keeps a NaN
            most = torch.maximum(most, torch.maximum(-low, high).double())
    # Not a NaN, which gloo's maximum would drop.
    return torch.where(torch.isfinite(most), most, torch.inf)


def square_sum(
    tensors: Sequence[Tensor], most: Tensor, unit: float
) -> Tensor:  # most: [1] float64; [1] int64
    """The sum of round((x / most)^2 unit), in integers; of an infinite `most`, any number."""
    total = torch.zeros(1, dtype=torch.int64, device=most.device)
    for x in tensors:
        for chunk in x.reshape(-1).split(1 << 20):  # bounds the float64 copies
            total += (chunk.double() / most).square_().mul_(unit).round_().long().sum()
    return total


def scale_of_planes(scale: Tensor, n: int, first_block: int, scale_every: int) -> Tensor:
    """The scale of each plane of `n` elements that begin at block `first_block`: [n / 64, 1] float32."""
    start = first_block * BLOCK
    element = torch.arange(start, start + n, PLANE, device=scale.device)
    return scale[element // scale_every].unsqueeze(1)


def chunks(n: int, device: torch.device) -> Iterator[tuple[int, int]]:
    """Element ranges that cover 0..n and begin on block borders."""
    size = _CHUNK.get(device.type, _OTHER_CHUNK)
    for start in range(0, n, size):
        yield start, min(start + size, n)

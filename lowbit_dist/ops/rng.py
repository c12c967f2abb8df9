"""Random bits as a pure function of (seed, step, tensor, position): Philox4x32-10 (Salmon et al., SC 2011).

There is no generator state to save or to share: a resumed run, another number of workers or another cut of a
tensor draws the same bits. The key is the 64-bit seed; the counter is (q low, q high, step, tensor) with
q = 64 * global block + j, j = 0..63. Output word i of counter q belongs to element j + 64 i of its block.
Words are held in int64, since torch has no 32-bit unsigned arithmetic; they equal Random123's bit for bit.
"""

import torch
from torch import Tensor

from lowbit_dist.grid import BLOCK

ROUNDS = 10
COUNTERS = BLOCK // 4  # Philox calls that a block takes

_WORD = 0xFFFFFFFF
_MULTIPLIERS = 0xD2511F53, 0xCD9E8D57
_KEY_STEPS = 0x9E3779B9, 0xBB67AE85


def philox(
    seed: int, counter: tuple[Tensor, Tensor, Tensor, Tensor]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The four output words of each counter; its tensors (int64, values below 2**32) are destroyed."""
    c0, c1, c2, c3 = counter
    k0, k1 = seed & _WORD, (seed >> 32) & _WORD
    for _ in range(ROUNDS):
        # The 64-bit product wraps in int64, yet its bits are right: the mask after the arithmetic shift drops
        # the sign's copies.
        c0.mul_(_MULTIPLIERS[0])
        c2.mul_(_MULTIPLIERS[1])
        high0, high2 = c0 >> 32, c2 >> 32
        high2.bitwise_and_(_WORD).bitwise_xor_(c1).bitwise_xor_(k0)
        high0.bitwise_and_(_WORD).bitwise_xor_(c3).bitwise_xor_(k1)
        c0.bitwise_and_(_WORD)
        c2.bitwise_and_(_WORD)
        c0, c1, c2, c3 = high2, c2, high0, c0
        k0, k1 = (k0 + _KEY_STEPS[0]) & _WORD, (k1 + _KEY_STEPS[1]) & _WORD
    return c0, c1, c2, c3


def block_words(
    seed: int,
    *,
    step: int,
    tensor: int,
    first_block: int,
    n_blocks: int,
    device: torch.device | str = "cpu",
) -> Tensor:  # [n_blocks, BLOCK] int64, values below 2**32
    """One 32-bit word for each element of `n_blocks` blocks of a tensor, from `first_block` on."""
    start = first_block * COUNTERS
    q = torch.arange(start, start + n_blocks * COUNTERS, dtype=torch.int64, device=device)
    words = philox(seed, (q & _WORD, q >> 32, torch.full_like(q, step), torch.full_like(q, tensor)))
    return torch.stack([word.view(n_blocks, COUNTERS) for word in words], dim=1).view(n_blocks, BLOCK)

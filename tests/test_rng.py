import pytest
import torch

from lowbit_dist.grid import BLOCK
from lowbit_dist.ops import rng


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [  # kat_vectors of Random123, "philox4x32 10"
        ((0, 0, 0, 0), 0, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((2**32 - 1,) * 4, 2**64 - 1, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            0xA4093822 | 0x299F31D0 << 32,
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_gives_the_known_answers_of_random123(counter, key, expected):
    c0, c1, c2, c3 = (torch.tensor([word]) for word in counter)
    assert tuple(word.item() for word in rng.philox(key, (c0, c1, c2, c3))) == expected


def words(**changes):
    arguments = {"seed": 5, "step": 3, "tensor": 9, "first_block": 70, "n_blocks": 1000} | changes
    return rng.block_words(arguments.pop("seed"), **arguments)


def test_a_word_depends_on_its_place_alone():
    """Element j + 64 i of block b has word i of counter (64 b + j, step, tensor), however many are drawn."""
    block = 2**26 + 5  # its counters need more than 32 bits
    drawn = words(first_block=block - 2, n_blocks=4)
    for j, i in ((0, 0), (63, 1), (17, 2), (40, 3)):
        q = block * 64 + j
        c0, c1, c2, c3 = (torch.tensor([x]) for x in (q % 2**32, q >> 32, 3, 9))
        assert drawn[2, j + 64 * i] == rng.philox(5, (c0, c1, c2, c3))[i]
    assert torch.equal(words(first_block=block, n_blocks=2), drawn[2:])


def assert_independent(a, b):
    """Chi-square of the 16 x 16 table of the words' top nibbles, and of their low ones: 5 standard errors."""
    for shift in (28, 0):
        table = torch.bincount(((a >> shift) & 15) * 16 + ((b >> shift) & 15), minlength=256).double()
        expected = len(a) / 256
        chi_square = ((table - expected) ** 2 / expected).sum().item()
        assert abs(chi_square - 255) < 5 * (2 * 255) ** 0.5


def test_words_are_uniform_in_every_bit():
    drawn = words().view(-1)
    assert drawn.min() >= 0 and drawn.max() < 2**32
    for bit in range(32):
        ones = ((drawn >> bit) & 1).double().mean().item()
        assert abs(ones - 0.5) < 5 * 0.5 / len(drawn) ** 0.5


def test_neighbouring_elements_are_independent():
    drawn = words()
    for distance in (1, 32, 64, 128, 255):
        assert_independent(drawn[:, :-distance].reshape(-1), drawn[:, distance:].reshape(-1))
    assert_independent(drawn[:-1].reshape(-1), drawn[1:].reshape(-1))


@pytest.mark.parametrize(
    "change", [{"seed": 6}, {"step": 4}, {"tensor": 10}, {"tensor": 9 | 1 << 28}], ids=str
)
def test_other_seeds_steps_tensors_and_streams_are_independent(change):
    assert_independent(words().view(-1), words(**change).view(-1))


def test_a_block_is_256_words():
    assert words(n_blocks=3).shape == (3, BLOCK)

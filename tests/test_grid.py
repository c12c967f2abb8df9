import subprocess
import sys

import pytest

from lowbit_dist.grid import BLOCK, GRIDS


def test_grids_have_the_levels_and_sizes_of_their_names():
    sizes = {
        grid.name: (grid.low, grid.high, grid.bits, grid.n_levels, grid.bytes_per_block)
        for grid in GRIDS.values()
    }
    assert sizes == {
        "ternary": (-1, 1, 2, 3, 64),
        "int2": (-2, 1, 2, 4, 64),
        "int3": (-4, 3, 3, 8, 96),
        "int4": (-8, 7, 4, 16, 128),
        "int6": (-32, 31, 6, 64, 192),
        "int8": (-128, 127, 8, 256, 256),
    }


@pytest.mark.parametrize("grid", GRIDS.values(), ids=GRIDS.keys())
def test_every_level_has_a_code_and_the_bytes_add_up(grid):
    assert grid.n_levels <= 2**grid.bits
    assert grid.bytes_per_block == grid.bytes_per_parameter * BLOCK


def test_importing_grids_does_not_import_torch():
    program = "import sys, lowbit_dist.grid; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program]).returncode == 0

#!/usr/bin/env bash
# Set up and run everything that a change must pass: formatting, lint, types, tests.  Arguments go to pytest.
source "$(dirname "$0")/setup.sh"

# Two cores serve every process of a test; libraries that each take both slow one another down.
export OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false

ruff format --check lowbit_dist tests
ruff check lowbit_dist tests
mypy
# Two files of tests at a time: half of what they do is to wait for processes that start.  They are taken in the order of
# their names: in xdist's own order, by the number of tests, the file whose few tests take longest comes last, alone.
pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder "$@"

#!/usr/bin/env bash
# Set up and run everything that a change must pass: formatting, lint, types, tests.
#
#   test.sh quick   before a commit: tests of single parts, without workers, Ray or MLflow
#   test.sh         every kind of test that one machine allows
#   test.sh all     also on hosts that lose their power and network, and the whole of each matrix of cases
#
# Further arguments go to pytest: test.sh all -k hosts
source "$(dirname "$0")/setup.sh"

# Two cores serve every process of a test; libraries that each take both slow one another down.
export OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false

# Hundreds of processes import the package, which each of them would compile.
unset PYTHONDONTWRITEBYTECODE

# Files of tests at a time: while one waits for processes that start, the others compute.  On hosts whose power
# fails, times count.
processes=3
case "${1:-}" in
    quick) chosen="not slow and not integration"; shift ;;
    all) chosen="" processes=2; shift ;;
    *) chosen="not slow" ;;
esac
ruff format --check lowbit_dist tests
ruff check lowbit_dist tests
mypy &
types=$!
# The types are checked beside the tests.  tests/conftest.py puts the longest files first: in xdist's own order, by the
# number of tests, the file whose few tests take longest comes last, alone.
pytest --numprocesses $processes --dist loadfile --no-loadscope-reorder -m "$chosen" "$@"
wait "$types"

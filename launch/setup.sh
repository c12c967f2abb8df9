#!/usr/bin/env bash
# Make .venv with the pinned packages, once; later calls return at once.  Sourced by the other scripts.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

python=${PYTHON:-python3}
wanted=$(cat constraints.txt pyproject.toml | cksum)
if [ "$(cat .venv/.installed 2>/dev/null)" != "$wanted" ]; then
    "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
        echo "Python 3.11 or newer is needed, and $("$python" --version 2>&1) is $python; set PYTHON=python3.11, for example" >&2
        exit 2
    }
    echo "installing into .venv (about 3 GB to download the first time)" >&2
    "$python" -m venv .venv
    .venv/bin/python -m pip install --quiet --upgrade pip
    # Without setuptools' ten lines on what an editable installation is.
    PYTHONWARNINGS=ignore::UserWarning \
        .venv/bin/python -m pip install --quiet --constraint constraints.txt --editable ".[dev]"
    echo "$wanted" >.venv/.installed
fi
export PATH="$PWD/.venv/bin:$PATH"

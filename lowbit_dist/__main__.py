"""`lowbit`, and `python -m lowbit_dist` where the package is on the path but not installed.

Python's version is looked at before anything else is imported: an older one cannot read the rest.  This file
and the package's `__init__` are all that it meets, and are written as Python 3.7 reads them.
"""

import sys

NEEDED = (3, 11)


def main() -> None:
    """The command line; where Python is too old for it, one line and exit code 2."""
    if sys.version_info[:2] < NEEDED:
        have, needed = ".".join(map(str, sys.version_info[:3])), ".".join(map(str, NEEDED))
        print(
            f"lowbit: Python {needed} or newer is needed, and {sys.executable} is {have}; install it with "
            f"a newer one, for example python{needed} -m venv .venv",
            file=sys.stderr,
        )
        sys.exit(2)
    from lowbit_dist.cli import main as command_line

    command_line()


if __name__ == "__main__":
    main()

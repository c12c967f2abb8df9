"""`python -m lowbit_dist`: the command line, where the package is on the path but not installed."""

from lowbit_dist.cli import main

if __name__ == "__main__":
    main()

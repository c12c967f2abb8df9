"""One run of a sweep, in a process of its own: `python -m lowbit_dist.sweep.child CONFIG`.

It ends as after SIGTERM, with a checkpoint, when its standard input does: then the sweep has gone.
Its last line says why it failed; exit codes are those of `lowbit train`.
"""

import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Mapping
from typing import Any

from lowbit_dist import cluster
from lowbit_dist.config import ConfigError


class EventLines:
    """Tells events; rows are in the run's folder, where the sweep reads them."""

    def say(self, text: str) -> None:
        print(time.strftime("%H:%M:%S"), text, flush=True)

    def row(self, row: Mapping[str, Any]) -> None:
        pass


def main() -> int:
    """The run, to its end."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stdout)
    threading.Thread(target=_end_with_the_sweep, daemon=True).start()
    from lowbit_dist import configfile

    lines = EventLines()
    try:
        cluster.launch(configfile.load(sys.argv[1]), progress=lines)
    except cluster.Stopped as stopped:
        lines.say(f"stopped by {stopped}")
        return 128 + stopped.signum
    except ConfigError as error:
        lines.say(str(error))
        return 2
    except Exception as error:
        lines.say(" ".join(f"{type(error).__name__}: {error}".split()))
        return 1
    return 0


def _end_with_the_sweep() -> None:
    while os.read(0, 1):  # not through `sys.stdin`, whose lock must be free when Python ends
        pass
    os.kill(os.getpid(), signal.SIGTERM)


if __name__ == "__main__":
    sys.exit(main())

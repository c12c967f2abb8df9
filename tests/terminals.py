"""What a program shows on a terminal, read while it writes."""

import os
import threading


class Screen(threading.Thread):
    """All bytes that come out of a pseudo-terminal, in `shown`, until the program's side of it is closed."""

    def __init__(self, near: int):
        super().__init__(daemon=True)
        self.near, self.shown = near, b""
        self.start()

    def run(self) -> None:
        try:
            while part := os.read(self.near, 1 << 16):
                self.shown += part
        except OSError:  # the other end is closed
            pass

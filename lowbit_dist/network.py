"""Whether something listens at an address."""

import socket
from urllib.parse import urlsplit


def why_no_answer(address: str, *, port: int, timeout: float) -> str | None:
    """What hinders a connection to HOST, HOST:PORT or a URL within `timeout` seconds; None if nothing does.

    `port`: where the address names none.
    """
    try:
        parts = urlsplit(address if "://" in address else f"//{address}")
        socket.create_connection((parts.hostname or "", parts.port or port), timeout=timeout).close()
    except (OSError, ValueError) as error:  # ValueError: not an address
        return str(error)
    return None

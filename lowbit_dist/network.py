"""Whether something listens at an address, and whether that is the head of a Ray cluster."""

import os
import socket
from urllib.parse import urlsplit

from lowbit_dist.errors import ConfigError

CONNECT, ANSWER = 10.0, 15.0  # seconds that a Ray head has to take a connection, and to answer
PORT, DASHBOARD = 6379, 8265  # Ray's own choice
CHECK_ALIVE = "/ray.rpc.NodeInfoGcsService/CheckAlive"


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


def ray_address() -> str | None:
    """The cluster that RAY_ADDRESS names; None where Ray is to be started on this machine: it is not set, or
    `local`, Ray's own word for that.
    """
    address = os.environ.get("RAY_ADDRESS", "").strip()
    return None if address in ("", "local") else address


def check_ray_head(address: str) -> None:
    """ConfigError unless a Ray head answers at RAY_ADDRESS; Ray itself would wait for minutes."""
    if (wrong := why_no_ray_head(address)) is not None:
        raise ConfigError(f"RAY_ADDRESS ({address}) {wrong[0]}; {wrong[1]}")


def why_no_ray_head(address: str) -> tuple[str, str] | None:
    """What is wrong with a Ray address, and what to write instead; None if a head answers there."""
    if address == "auto":  # the cluster whose node this machine is; Ray finds it, or says that there is none
        return None
    try:
        parts = urlsplit(address if "://" in address else f"//{address}")
        host, port = parts.hostname or "HOST", parts.port
    except ValueError as error:
        return f"is no address ({error})", f"write HOST:PORT of a Ray head, for example 10.0.0.1:{PORT}"
    host = f"[{host}]" if ":" in host else host
    printed = f"write {host}:{PORT}, or what `ray start --head` printed there"
    if parts.scheme in ("http", "https"):
        job = f"lowbit submit CONFIG --address {address}"
        return "is the address of Ray's dashboard", f"{printed}, or send the run there as a job: {job}"
    if parts.scheme == "ray":
        job = f"lowbit submit CONFIG --address http://{host}:{DASHBOARD}"
        return "is an address of Ray's client", f"{printed}, or send the run there as a job: {job}"
    if parts.scheme or parts.path or port is None:
        return "is not of the form HOST:PORT", printed
    otherwise = "write HOST:PORT of a Ray head, or unset it to train on this machine"
    if why := why_no_answer(address, port=port, timeout=CONNECT):
        return f"does not answer ({why})", otherwise
    if why := _why_no_head(address):
        return f"answers, but not as a Ray head ({why})", otherwise
    return None


def _why_no_head(address: str) -> str | None:
    """Ask what listens there whether it is alive, in the protocol of a Ray head."""
    if os.environ.get("RAY_USE_TLS", "").lower() in ("1", "true"):
        return None  # Ray's own certificates would be needed
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")  # it writes to stderr what it also returns
    import grpc

    with grpc.insecure_channel(address, options=[("grpc.enable_http_proxy", 0)]) as channel:
        try:
            channel.unary_unary(CHECK_ALIVE)(b"", timeout=ANSWER)
        except grpc.RpcError as error:
            answers = {
                grpc.StatusCode.UNAUTHENTICATED: None,  # a head that wants a token, which Ray will show it
                grpc.StatusCode.PERMISSION_DENIED: None,
                grpc.StatusCode.UNIMPLEMENTED: "another service listens there",
                grpc.StatusCode.DEADLINE_EXCEEDED: f"it said nothing for {ANSWER:.0f} s",
            }
            return answers.get(error.code(), "it does not speak its protocol")
    return None

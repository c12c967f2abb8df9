"""Return when the Ray cluster at RAY_ADDRESS has so many nodes that are alive; exit code 1 after a while."""

import os
import socket
import sys
import time

wanted, seconds = int(sys.argv[1]), float(sys.argv[2]) if len(sys.argv) > 2 else 300.0
address = os.environ["RAY_ADDRESS"]
deadline = time.monotonic() + seconds


def alive() -> int:
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host, int(port)), timeout=1).close()  # Ray's own client waits for long
        from ray._raylet import GcsClient

        nodes = GcsClient(address=address).get_all_node_info(timeout=5).values()
    except Exception:  # whatever is not there yet
        return 0
    return sum(node.state == 0 for node in nodes)


while (found := alive()) < wanted:
    if time.monotonic() > deadline:
        sys.exit(f"the cluster at {address} has {found} of {wanted} nodes after {seconds:.0f} s")
    time.sleep(1)

"""`ray` for a cluster on one machine, all of whose services listen on 127.0.0.1 alone.

Ray replaces a node's address 127.0.0.1 by the machine's own one, at which most services listen to every
network.  It leaves it where it takes the system for one that knows no clusters, and then refuses to start a
second node.  So this process alone holds it for one that does; what it starts, which has the environment,
does not.
"""

import os

os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"

from ray._private import ray_constants, services
from ray.scripts.scripts import main

ray_constants.ENABLE_RAY_CLUSTER = True
services.resolve_ip_for_localhost = lambda host: host

main()

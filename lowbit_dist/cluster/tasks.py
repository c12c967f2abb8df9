"""Work of many like items, spread over Ray's workers: a task for each."""

import contextlib
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

from lowbit_dist.cluster.session import OBJECT_STORE, ray_session
from lowbit_dist.errors import ConfigError

Result = TypeVar("Result")


@contextlib.contextmanager
def spread(
    work: Callable[..., Result],
    workers: int,
    *,
    on_gpu: bool,
    item_bytes: int,
    say: Callable[[str], None],
) -> Iterator[Callable[[Iterable[tuple[Any, ...]]], Iterator[Result]]]:
    """Inside, what is given answers for each tuple of arguments what `work` does, in order.

    At most `workers` items are under way at a time, each on a processor, or a GPU, of its own.  What a dead
    worker had is given to another one; an error that `work` raises is raised here.

    `item_bytes`: of arguments and result, at most
    """
    with ray_session(os.getpid(), say, object_store=max(OBJECT_STORE, (workers + 1) * item_bytes)):
        import ray

        if on_gpu and not ray.cluster_resources().get("GPU"):
            raise ConfigError("--workers: this machine has a GPU, and Ray's cluster has none; leave it out")
        task = ray.remote(num_cpus=1, num_gpus=int(on_gpu))(work)

        def answer(item: Any) -> Result:
            try:
                return ray.get(item)  # type: ignore[no-any-return]
            except ray.exceptions.RayTaskError as error:
                raise error.cause from None

        def answers(items: Iterable[tuple[Any, ...]]) -> Iterator[Result]:
            under_way: deque[Any] = deque()
            for arguments in items:
                if len(under_way) == workers:
                    yield answer(under_way.popleft())
                under_way.append(task.remote(*arguments))
            while under_way:
                yield answer(under_way.popleft())

        yield answers

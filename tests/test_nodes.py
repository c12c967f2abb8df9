"""The machines of a cluster: which of them answer, and where workers go."""

import socket

import pytest

from lowbit_dist import configfile
from lowbit_dist.cluster.nodes import Node, largest_worker_count, reachable, worker_slots


def node(name, cpus=0.0, gpus=0.0, port=1):
    return Node(name, "127.0.0.1", name, port, cpus, gpus)


def configured(small, workers, micro_batches=8, **cluster):
    train = {"batch_tokens": micro_batches * 2 * 64}
    return configfile.from_dict(small(cluster={"workers": workers, **cluster}, train=train))


def test_a_machine_that_takes_no_connection_is_left_out():
    with socket.create_server(("127.0.0.1", 0)) as listening:
        here = node("here", port=listening.getsockname()[1])
        with socket.create_server(("127.0.0.1", 0)) as other:
            gone = node("gone", port=other.getsockname()[1])
        assert reachable([gone, here]) == [here]
    assert reachable([gone, here]) == []
    assert reachable([]) == []


@pytest.mark.parametrize(
    ("free", "cluster", "expected"),
    [
        # The machines with the most room first, so that workers are on as few as possible.
        ({"a": (1, 0), "b": (3, 0)}, {}, ["b", "b", "b", "a"]),
        ({"a": (0, 0), "b": (0.9, 0)}, {}, []),
        ({"a": (1, 0), "b": (1.5, 0)}, {"cpus_per_worker": 0.5}, ["b", "b", "b", "a", "a"]),
        ({"a": (0.3, 0)}, {"cpus_per_worker": 0.1}, ["a", "a", "a"]),
        ({"a": (8, 2), "b": (8, 1), "c": (8, 0)}, {"gpus_per_worker": 1}, ["a", "a", "b"]),
        ({"a": (1, 4)}, {"gpus_per_worker": 1}, ["a"]),
        ({"a": (4, 1)}, {"gpus_per_worker": 0}, ["a", "a", "a", "a"]),
    ],
)
def test_each_machine_has_as_many_places_as_its_free_processors_allow(free, cluster, expected, small):
    found = [node(name, cpus, gpus) for name, (cpus, gpus) in free.items()]
    config = configured(small, 1, **cluster)
    assert worker_slots(config, found, gpus=sum(each.gpus for each in found)) == expected


@pytest.mark.parametrize(
    ("workers", "n_slots", "expected"),
    [
        ({"min": 1, "max": 4}, 0, 0),
        ({"min": 1, "max": 4}, 1, 1),
        ({"min": 1, "max": 4}, 3, 2),  # 3 does not divide 8 micro-batches
        ({"min": 1, "max": 4}, 99, 4),
        ({"min": 3, "max": 8}, 3, 0),
        ({"min": 3, "max": 8}, 7, 4),
        (4, 3, 0),
        (4, 5, 4),
    ],
)
def test_as_many_workers_as_there_are_places_for_and_the_batch_can_be_divided_among(
    workers, n_slots, expected, small
):
    assert largest_worker_count(configured(small, workers), n_slots) == expected

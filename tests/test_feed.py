"""Micro-batches that are read ahead: the same samples, in the step that asks for them."""

import threading

import pytest
import torch

from lowbit_dist import data
from lowbit_dist.config import Data

CPU = torch.device("cpu")


@pytest.fixture
def batches(corpus):
    return data.Batches(Data(path=str(corpus), seq_len=64), "train", 5)


@pytest.fixture
def reads(batches, monkeypatch):
    """Of each micro-batch that was read its first sample and the thread."""
    made, read = [], batches.micro_batch

    def recorded(first_sample, size):
        made.append((first_sample, threading.current_thread()))
        return read(first_sample, size)

    monkeypatch.setattr(batches, "micro_batch", recorded)
    return made


def test_the_next_micro_batch_is_read_by_a_thread_while_this_one_is_used(batches, reads):
    feed = data.Feed(batches, 3, CPU, reads_ahead=True)
    # After 6 training goes back, as after a spike, and reads others than it had announced.
    for first, then in ((0, 3), (3, 6), (6, 9), (30, 33), (33, 36)):
        expected = data.Batches.micro_batch(batches, first, 3)
        assert torch.equal(feed.tokens(first, then), expected)
        feed._ahead[1].result()
        assert reads[-1][0] == then, "it is there before it is asked for"
    feed.close()
    assert [first for first, _ in reads] == [0, 3, 6, 9, 30, 33, 36]
    assert threading.current_thread() not in {thread for _, thread in reads}
    assert not any(thread.is_alive() for _, thread in reads)


def test_a_read_that_fails_ahead_fails_in_its_own_step(batches, monkeypatch):
    read = batches.micro_batch

    def fails_later(first_sample, size):
        if first_sample == 3:
            raise data.DamagedData("a bad disk")
        return read(first_sample, size)

    monkeypatch.setattr(batches, "micro_batch", fails_later)
    feed = data.Feed(batches, 3, CPU, reads_ahead=True)
    feed.tokens(0, 3)
    with pytest.raises(data.DamagedData, match="a bad disk"):
        feed.tokens(3, 6)
    feed.close()


def test_on_a_cpu_nothing_is_read_before_it_is_asked_for(batches, reads):
    feed = data.Feed(batches, 3, CPU)
    assert torch.equal(feed.tokens(0, 3), data.Batches.micro_batch(batches, 0, 3))
    assert reads == [(0, threading.current_thread())]
    feed.close()

"""Micro-batches on their way to the device."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING

from lowbit_dist.data.reading import Batches

if TYPE_CHECKING:
    import torch
    from torch import Tensor


class Feed:
    """The micro-batches of a worker, on its device, with the same samples as `batches`.

    On a GPU a thread reads the next one while the GPU works, into pinned memory, from which it is copied
    without waiting for what the GPU does.  On a CPU, which has nothing to spare, it is read when it is asked
    for.
    """

    def __init__(self, batches: Batches, size: int, device: torch.device, *, reads_ahead: bool | None = None):
        self.batches, self.size, self.device = batches, size, device
        self._is_gpu = device.type == "cuda"
        reads_ahead = self._is_gpu if reads_ahead is None else reads_ahead
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="feed") if reads_ahead else None
        self._ahead: tuple[int, Future[Tensor]] | None = None  # the first sample of what is being read

    def tokens(self, first_sample: int, then: int) -> Tensor:  # [size, seq_len] int64
        """Samples from `first_sample` on; those from `then` on will be asked for next, if all goes well."""
        if self._thread is None:
            return self._read(first_sample).to(self.device)
        if self._ahead is None or self._ahead[0] != first_sample:
            self._ahead = first_sample, self._thread.submit(self._read, first_sample)
        tokens = self._ahead[1].result()
        self._ahead = then, self._thread.submit(self._read, then)
        return tokens.to(self.device, non_blocking=True)

    def labels(self, first_sample: int) -> Tensor | None:  # [size, seq_len] int64, on the host
        """`Batches.labels` of the same samples."""
        labels = self.batches.labels(first_sample, self.size)
        return labels if labels is None else self._pinned(labels)

    def close(self) -> None:
        if self._thread is not None:
            self._thread.shutdown(cancel_futures=True)

    def _read(self, first_sample: int) -> Tensor:
        return self._pinned(self.batches.micro_batch(first_sample, self.size))

    def _pinned(self, tensor: Tensor) -> Tensor:
        return tensor.pin_memory() if self._is_gpu else tensor

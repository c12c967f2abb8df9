"""When weights come and go: DeepSpeed's hooks ask for a module's parameters before it runs, forward and
backward, and say when it has run.

What lies together comes together (`gathers.units`): a block, or what stands between blocks.  While it works,
the next one is gathered, as modules ran in the pass before; its codes wait for the layers that decode them.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus
from deepspeed.utils import z3_leaf_module

from lowbit_dist.zero.gathers import Gathers, packed_of


class Coordinator:
    """In the place of DeepSpeed's `PartitionedParameterCoordinator`, which keeps account of each parameter by
    itself: in streams, events and collections that take longer than the products of a small block.

    Here a unit is started, waited for and counted as one.  What DeepSpeed calls has its names.
    """

    hierarchy = 0  # DeepSpeed sets it

    def __init__(self, stream: Any, most: int):
        """`stream`: of the gathers.  Nothing is gathered ahead while `most` elements or more are there."""
        self.stream, self.most = stream, most
        self.there = 0  # elements of parameters that are gathered, or on their way
        self._inflight: dict[Any, Gathers] = {}
        self._gathered: dict[Any, None] = {}
        # In which modules ran: in this pass, and in the one before it of its kind, with gradients or without.
        self._seen: list[Any] = []
        self._orders: dict[bool, list[Any]] = {False: [], True: []}
        self._is_training = False
        self._is_known = True  # whether this pass goes as that one did, until now
        self._backward: dict[int, Any] = {}  # whose backward passes have begun
        self._params: dict[Any, list[Any]] = {}

    def reset_step(self) -> None:
        """A pass begins; the one before may have ended anywhere."""
        self._release_all()
        if self._seen:
            self._orders[self._is_training], self._seen = self._seen, []
        self._is_training, self._is_known = torch.is_grad_enabled(), True

    def trace_prologue(self, module: Any) -> None:
        """A module is about to run."""
        at, order = len(self._seen), self._orders[self._is_training]
        self._seen.append(module)
        self._is_known = self._is_known and at < len(order) and order[at] is module

    def is_record_trace(self) -> bool:
        return False  # `trace_prologue` has seen to it

    def is_invalid_trace(self) -> bool:
        return True  # hooks of other modules ask nothing more of what was seen until now

    def fetch_sub_module(self, module: Any, forward: bool) -> None:
        """Returns when the module's parameters are there."""
        params = self._of(module)
        if not forward:
            self._backward[module.ds_id] = module
        self._gather(params)
        for p in params:
            p.ds_active_sub_modules.add(module.ds_id)
        self._wait(params)
        if self._is_known and self.there < self.most:
            self._gather_next()

    def release_sub_module(self, module: Any, forward: bool = False) -> None:
        """Parameters that no other module works with go."""
        if not forward:
            self._backward.pop(module.ds_id, None)
        for p in self._of(module):
            p.ds_active_sub_modules.discard(module.ds_id)
            self._release(p)

    def release_backward_leftovers(self) -> None:
        """The same for modules whose backward pass nobody said the end of: inputs without gradients."""
        while self._backward:
            self.release_sub_module(next(reversed(self._backward.values())))

    def release_and_reset_all(self, model: Any) -> None:
        """What is there goes, whoever works with it."""
        self._adopt(model.parameters())
        self._release_all()

    def _release_all(self) -> None:
        self._backward.clear()
        for started, of in self._started(self._inflight):
            started.drop(of)
            self.there -= sum(p.ds_numel for p in of)
        self._inflight.clear()
        for p in list(self._gathered):
            p.ds_active_sub_modules.clear()
            self._release(p)

    def _of(self, module: Any) -> list[Any]:
        """A block's parameters, or those that are a module's own."""
        if module not in self._params:
            self._params[module] = list(module.parameters(recurse=z3_leaf_module(module)))  # type: ignore[no-untyped-call]
        own = self._params[module]
        # What it reads of a module that does not run then, as DeepSpeed has found.
        others = module.ds_external_parameters()
        return [*own, *(p for _, p in others)] if others else own

    def _adopt(self, params: Iterable[Any]) -> None:
        """Some that were gathered by themselves, when something asked for their values."""
        for p in params:
            if p.ds_status is ZeroParamStatus.AVAILABLE and p not in self._gathered:
                self._gathered[p] = None
                self.there += p.ds_numel

    def _gather(self, params: Iterable[Any]) -> None:
        """Begin to gather what is neither there nor on its way: with each parameter all that lies with it.

        The gather waits for all that computes until now: for the update that changed what it moves, and, of a
        block that is fetched ahead, for the release of the one before that which is about to work.  So no
        more than two are there, however far Python is ahead of the device; and as all that is gathered is
        allocated for one stream, a released block's memory is the next gather's at once.
        """
        missing = [p for p in params if p.ds_status is ZeroParamStatus.NOT_AVAILABLE]
        if not missing:
            return
        units = {id(p.unit): p.unit for p in missing}.values()
        whole = [p for unit in units for p in unit if p.ds_status is ZeroParamStatus.NOT_AVAILABLE]
        accelerator = get_accelerator()
        wait_for_stream(self.stream, accelerator.current_stream())
        with accelerator.stream(self.stream):
            started = whole[0].all_gather_coalesced(whole)
        self._inflight |= dict.fromkeys(whole, started)
        self.there += sum(p.ds_numel for p in whole)

    def _gather_next(self) -> None:
        """What is needed next; nothing, if a part of its unit is still there, for it comes as a whole."""
        for module in self._orders[self._is_training][len(self._seen) :]:
            missing = [p for p in self._of(module) if p.ds_status is ZeroParamStatus.NOT_AVAILABLE]
            if missing:
                if all(p.ds_status is ZeroParamStatus.NOT_AVAILABLE for p in missing[0].unit):
                    self._gather(missing)
                return

    def _wait(self, params: Sequence[Any]) -> None:
        for started, of in self._started(p for p in params if p in self._inflight):
            started.wait(of)
            for p in of:
                del self._inflight[p]
                self._gathered[p] = None
        self._adopt(params)

    def _started(self, params: Iterable[Any]) -> list[tuple[Gathers, list[Any]]]:
        """The gathers that bring some parameters."""
        of: dict[int, tuple[Gathers, list[Any]]] = {}
        for p in params:
            started = self._inflight[p]
            of.setdefault(id(started), (started, []))[1].append(p)
        return list(of.values())

    def _release(self, param: Any) -> None:
        """A parameter's values go, unless they are not there or a module works with them."""
        if param not in self._gathered or param.ds_active_sub_modules:
            return
        if (packed := packed_of(param)) is not None:
            packed.whole = None
        param.data = param.data.new_empty(0)
        param.ds_status = ZeroParamStatus.NOT_AVAILABLE
        self.there -= param.ds_numel
        del self._gathered[param]


def wait_for_stream(later: Any, earlier: Any) -> None:
    """Streams: what `later` is given from now on waits for what `earlier` has been given; None: a device
    without streams.
    """
    if later is not None:
        later.wait_stream(earlier)

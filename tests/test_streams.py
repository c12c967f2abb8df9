"""The order of accesses on a device with streams, shown without one.

DeepSpeed is told that the CPU has streams.  Each has a vector clock, which says what of the other streams it
has waited for; operations, collectives and our kernels note the storages that they read and write.  Two
accesses to one, of which at least one writes, must be ordered by streams that wait for each other: that
Python waits for the device does not count, and in a pass it must not.
"""

import weakref
from collections import Counter
from contextlib import ExitStack, contextmanager
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode


class Stream:
    def __init__(self, name):
        self.name, self.clock = name, {}

    def wait_stream(self, other):
        for name, tick in other.clock.items():
            self.clock[name] = max(self.clock.get(name, 0), tick)

    def synchronize(self):
        pass


class Event:
    def record(self, stream=None):
        pass

    def query(self):
        return True


class Device:
    """A device whose operations run in streams, and what of its accesses to named storages is unordered."""

    def __init__(self):
        self.default, self.network = Stream("default"), Stream("network")
        self.current = [self.default]
        self.names, self.writes, self.reads = {}, {}, {}
        self.races, self.seen = Counter(), set()

    def name(self, tensor, name):
        storage = tensor.untyped_storage()
        key = storage._cdata
        self.names[key], self.writes[key], self.reads[key] = name, None, []
        weakref.finalize(storage, self.names.pop, key, None)

    @contextmanager
    def stream(self, stream):
        self.current.append(stream)
        try:
            yield
        finally:
            self.current.pop()

    def access(self, what, *, reads, writes, stream=None):
        stream = stream or self.current[-1]
        tick = stream.clock[stream.name] = stream.clock.get(stream.name, 0) + 1
        self.seen.add(f"{what} on {stream.name}")
        for tensors, is_write in ((reads, False), (writes, True)):
            for key in {t.untyped_storage()._cdata for t in tensors} & self.names.keys():
                self.seen.add(self.names[key])
                before = [*self.reads[key], self.writes[key]] if is_write else [self.writes[key]]
                for name, at, other in filter(None, before):
                    if stream.clock.get(name, 0) < at:
                        verb = "writes" if is_write else "reads"
                        self.races[
                            f"{what} on {stream.name} {verb} {self.names[key]} after {other} on {name}"
                        ] += 1
                if is_write:
                    self.writes[key], self.reads[key] = (stream.name, tick, what), []
                else:
                    self.reads[key].append((stream.name, tick, what))


class Operations(TorchDispatchMode):
    """PyTorch's own."""

    def __init__(self, device):
        super().__init__()
        self.device = device

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func.namespace == "c10d" or func.is_view or func._schema.name in TEMPLATES:
            return out
        given = zip(func._schema.arguments, args, strict=False)
        written = [
            t for a, value in given if a.alias_info and a.alias_info.is_write for t in tensors_of(value)
        ]
        read = [t for t in tensors_of((args, kwargs)) if not any(t is w for w in written)]
        self.device.access(func._schema.name, reads=read, writes=[*written, *tensors_of(out)])
        return out


TEMPLATES = {"aten::detach", "aten::new_empty", "aten::new_zeros", "aten::empty_like", "aten::set_"}


def tensors_of(tree):
    return [leaf for leaf in torch.utils._pytree.tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


def races_of(configuration, without_edge):
    """What is unordered in some steps on this rank; and what was seen."""
    from deepspeed.accelerator.cpu_accelerator import CPU_Accelerator

    from lowbit_dist import configfile, model, ops, zero
    from lowbit_dist.zero import gathers as made
    from lowbit_dist.zero import stage3

    device, streams = Device(), []

    def new_stream(*_, **__):
        streams.append(Stream(("gathers", "reductions")[len(streams)]))
        return streams[-1]

    class Work:
        def __init__(self, work):
            self.work = work

        def wait(self):
            self.work.wait()
            device.current[-1].wait_stream(device.network)

    def collective(function):
        def call(out, given, async_op=False, **more):
            device.network.wait_stream(device.current[-1])
            if function is gather:
                device.name(out, "gathered shards")
                if device.network.clock.get("default", 0) < device.default.clock.get("default", 0):
                    device.races["a gather that is ahead of what computes"] += 1
            device.access(function.__name__, reads=[given], writes=[out], stream=device.network)
            work = Work(function(out, given, async_op=True, **more))
            return work if async_op else work.wait()

        return call

    def update(function):
        def call(target, given, state=(), **more):
            result = function(target, given, state, **more) if state else function(target, given, **more)
            written = target.codes if isinstance(target, ops.Codes) else target.weight
            device.access("update", reads=[given], writes=[written, *(t for s in state for t in s.tensors)])
            return result

        return call

    def decode(codes, scale, *, out, **more):
        device.access("decode", reads=[codes, scale], writes=[out])
        return decoded(codes, scale, out=out, **more)

    gather, decoded = dist.all_gather_into_tensor, ops.decode
    config = configfile.from_dict(configuration)
    asynchronous = {
        "is_synchronized_device": lambda: False,
        "resolves_data_dependency": lambda: False,
        "handles_memory_backpressure": lambda: False,
        "stream": device.stream,
        "current_stream": lambda *_: device.current[-1],
        "default_stream": lambda *_: device.default,
        "Stream": new_stream,
        "Event": Event,
    }
    settings = zero.engine.deepspeed_settings

    def overlapping(*arguments):
        made = settings(*arguments)
        made["zero_optimization"]["overlap_comm"] = True
        return made

    with ExitStack() as stack:
        enter = stack.enter_context
        for name, value in asynchronous.items():
            enter(patch.object(CPU_Accelerator, name, property(lambda self, value=value: value)))
        enter(patch.object(zero.engine, "deepspeed_settings", overlapping))
        enter(patch.object(torch.Tensor, "record_stream", lambda self, stream: None))
        enter(patch.object(stage3, "EXCHANGED", ()))  # as on a GPU
        for function in (gather, dist.reduce_scatter_tensor):
            enter(patch.object(dist, function.__name__, collective(function)))
        enter(patch.object(ops, "decode", decode))
        enter(patch.object(ops, "step_", update(ops.step_)))
        built = model.build(config.model, 256, config.method, model.DTYPES[config.precision.compute])
        names = model.low_bit_names(built, config.method)
        engine = zero.Engine(config, built, model.InitialWeights(built, config.method, 0, None), names)
        gathers = next(stream for stream in streams if stream.name == "gathers")
        if without_edge:
            gathers.wait_stream = lambda other: None
        for p in engine.module.parameters():
            device.name(made.wire_of(p), "shards")
        for shard in engine.shards:
            for state in shard.state:
                device.name(state.values, "states")
            if shard.weight is not None and config.precision.compute == "bf16":
                device.name(shard.weight, "masters")
        for gradients in engine.gradients():
            device.name(gradients, "gradients")
        generator = torch.Generator().manual_seed(engine.rank)
        waits = {"the host waits for a stream": Stream, "the host waits for the device": CPU_Accelerator}
        for what, waited in waits.items():
            enter(patch.object(waited, "synchronize", lambda *_, what=what: device.races.update([what])))
        with Operations(device):
            for n in range(4):
                with engine.step(ops.Now(lr=1e-2, weight_decay=0.0, step=n + 1, seed=0)) as step:
                    for _ in range(engine.micro_batches // engine.world):
                        step.backward(torch.randint(256, (1, 16), generator=generator))
            engine.forward(torch.randint(256, (1, 16), generator=generator))
        races = dict(device.races)
        engine.close()
    return races, device.seen


CASES = {
    "ternary": {},
    "dense": {"method": {"name": "dense"}, "train": {"activation_checkpointing": True}},
    "released": {"train": {"gradient_release": True, "batch_tokens": 32}},
    "sent on another grid": {
        "method": {"grid": "int8", "forward": "ternary"}, "zero": {"residency": "replicated"},
    },
}  # fmt: skip


def content(case):
    sections = {
        "model": {"hidden_size": 256, "intermediate_size": 256, "layers": 3, "heads": 4, "kv_heads": 4},
        "method": {"name": "dqt"}, "data": {"path": "none", "seq_len": 16}, "precision": "bf16",
        "train": {"micro_batch": 1, "batch_tokens": 64}, "cluster": {"workers": 2},
    }  # fmt: skip
    for name, more in CASES[case].items():
        sections[name] = {**sections.get(name, {}), **more}
    return sections


@pytest.mark.parametrize("case", CASES)
def test_every_access_to_a_shard_is_ordered_by_streams(case, ranks):
    update = "update on reductions" if case == "released" else "update on default"
    for unordered, seen in ranks(2).run(races_of, content(case), False):
        assert unordered == {}
        assert {"shards", "states", "gathered shards", update} <= seen, "the case must see them"
        assert not any(access.endswith(" on gathers") for access in seen), (
            "nothing is made of what has not come"
        )


def test_a_gather_that_does_not_wait_for_the_update_is_found(ranks):
    for unordered, _ in ranks(2).run(races_of, content("ternary"), True):
        last = ("update", "aten::_foreach_copy_")  # of codes; of ordinary weights that lie beside them
        assert any(
            f"all_gather_into_tensor on network reads shards after {write} on default" in race
            for race in unordered
            for write in last
        )

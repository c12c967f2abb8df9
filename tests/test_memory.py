"""Memory: what is resident between steps and alive inside them, gathered as bytes, and planned beforehand."""

import gc
import subprocess
import sys
import weakref
from contextlib import contextmanager
from time import process_time
from typing import ClassVar, Literal
from unittest.mock import patch

import pytest
import torch
import toys
from cases import slow

from lowbit_dist import ops
from lowbit_dist.methods import METHODS
from lowbit_dist.optim import OPTIMIZERS, Rule

VOCAB = 640  # with 96 tokens a pass, no activation and no ordinary tensor has the size of a low-bit weight
SEQ_LEN = 48
MODEL = {"hidden_size": 256, "intermediate_size": 512, "layers": 3, "heads": 4, "kv_heads": 2}
BITS = {"ternary": 2, "int2": 2, "int3": 3, "int4": 4, "int8": 8}
OTHER_GRIDS = [pytest.param(grid, marks=pytest.mark.slow) for grid in ("int2", "int3", "int4", "int8")]


def configuration(**sections):
    base = {
        "model": MODEL,
        "method": {"name": "dqt"},
        "data": {"path": "none", "seq_len": SEQ_LEN},
        "precision": "fp32",
        "train": {"micro_batch": 2, "batch_tokens": 4 * SEQ_LEN},
    }
    for name, content in sections.items():
        merges = isinstance(content, dict) and name != "precision"
        base[name] = {**base.get(name, {}), **content} if merges else content
    return base


def load(content):
    """As where packages with a rule of rows and one of matrices are installed."""
    from lowbit_dist import configfile

    with patch.dict(METHODS), patch.dict(OPTIMIZERS, {"matrix": "test_memory:Matrix"}):
        toys.register()
        return configfile.from_dict(content)


class Matrix(Rule):
    """A matrix's momentum by its own length."""

    name: Literal["matrix"] = "matrix"
    slots: ClassVar = (ops.Slot("momentum", signed=True),)
    scope: ClassVar = "matrix"

    def update(self, g, *slots, step):
        momentum = 0.9 * slots[0] + g
        return momentum / (momentum.norm() + 1e-8), momentum


class Training:
    """An engine and its data, on one rank."""

    def __init__(self, content):
        from lowbit_dist import model, products, zero

        self.config = load(content)
        dtype = torch.bfloat16 if self.config.precision.compute == "bf16" else torch.float32
        built = model.build(self.config.model, VOCAB, self.config.method, dtype)
        names = model.low_bit_names(built, self.config.method)
        initial = model.InitialWeights(built, self.config.method, 0, None)
        self.engine = zero.Engine(self.config, built, initial, names)
        products.settle_(self.engine.left_open, self.engine.device.type)
        generator = torch.Generator().manual_seed(self.engine.rank)
        tokens = torch.randint(0, VOCAB, (2, self.config.data.seq_len), generator=generator)
        self.tokens = tokens.to(self.engine.device)
        self.n_steps = 0

    def step(self):
        self.n_steps += 1
        now = ops.Now(lr=1e-3, weight_decay=0.01, step=self.n_steps, seed=0)
        with self.engine.step(now) as step:
            for _ in range(self.engine.micro_batches // self.engine.world):
                step.backward(self.tokens)
        return step.done

    def low_bit_numels(self):
        return [self.engine.numels[name] for name in self.engine.low_bit]

    def block_numel(self):
        """Low-bit parameters of one transformer block."""
        return sum(self.low_bit_numels()) // MODEL["layers"]


def recording_watch():
    """A watch that also knows what each live storage was when it was made: (dtype, elements)."""
    from lowbit_dist.memory.live import StorageMeter, _tensors

    class Recording(StorageMeter):
        def __init__(self):
            super().__init__()
            self.made = {}
            self.after_each = lambda: None

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = super().__torch_dispatch__(func, types, args, kwargs)
            for tensor in _tensors(out):
                storage = tensor.untyped_storage()
                if storage._cdata in self._live:
                    self.made.setdefault(
                        self._live[storage._cdata], (tensor.dtype, storage.nbytes() // tensor.dtype.itemsize)
                    )
            self.after_each()
            return out

        def alive(self):
            return [self.made[reference] for reference in self._live.values()]

    return Recording()


# ------------------------------------------------------------------ between steps


def between_steps(content):
    """Everything that is alive on this rank after two steps and an evaluation."""
    from lowbit_dist import memory

    gc.collect()
    old = {id(each) for each in gc.get_objects() if isinstance(each, torch.Tensor)}
    with recording_watch() as watch:  # sees every storage that is made, whoever holds it later
        training = Training(content)
        flips = [training.step().flips for _ in range(2)]
        training.engine.forward(training.tokens)
    gc.collect()
    reported = memory.measure(training.engine)
    reachable = {}
    for each in gc.get_objects():
        if isinstance(each, torch.Tensor) and id(each) not in old:
            for tensor in (each, each.grad if each.is_leaf else None):
                if tensor is not None and tensor.untyped_storage().nbytes():
                    storage = tensor.untyped_storage()
                    reachable[storage.data_ptr()] = (tensor.dtype, storage.nbytes() // tensor.dtype.itemsize)
    numels = training.low_bit_numels()
    training.engine.close()
    return {
        "flips": flips,
        "report": reported,
        "live_bytes": watch.now,
        "alive": watch.alive(),
        "reachable": list(reachable.values()),
        "numels": numels,
    }


def weights_in_full_precision(found, world):
    """Live floating-point storages as large as a low-bit weight or as its shard."""
    sizes = {numel // part for numel in found["numels"] for part in (1, world)}
    return [
        (dtype, numel)
        for dtype, numel in [*found["alive"], *found["reachable"]]
        if dtype.is_floating_point and numel in sizes
    ]


@pytest.mark.parametrize("world", [pytest.param(1, marks=pytest.mark.slow), 2])
@pytest.mark.parametrize("residency", ["sharded", "replicated"])
@pytest.mark.parametrize("grid", ["ternary", *OTHER_GRIDS])
def test_low_bit_weights_take_their_bits_and_have_no_master_copy(grid, residency, world, ranks):
    precision = "bf16" if grid in ("ternary", "int8") else "fp32"
    content = configuration(method={"grid": grid}, zero={"residency": residency}, precision=precision)
    for found in ranks(world).run(between_steps, content):
        assert min(found["flips"]) > 0, "the case must move some codes"
        report = found["report"]
        parts = report["components"]
        at_most = BITS[grid] / 8 * (1 if residency == "sharded" else world)
        assert parts["low_bit_weights"]["bytes_per_parameter"] == at_most
        assert parts["scales"]["bytes"] <= 0.01 * parts["low_bit_weights"]["bytes"]
        assert weights_in_full_precision(found, world) == []
        # Whatever lives is accounted for, but for a few counters and the batch itself.
        assert 0 <= found["live_bytes"] - report["resident_bytes_per_worker"] < 4096


# ------------------------------------------------------------------ inside a step


def decoded_weights_alive(content):
    """Decoded low-bit elements alive after each decoding, and weight-sized storages in the forward pass."""
    from lowbit_dist import ops

    training = Training(content)
    training.step()
    alive, seen, decode = {}, [], ops.decode

    def recorded(codes, scale, *, out, **more):
        result = decode(codes, scale, out=out, **more)
        storage = out.untyped_storage()
        key = storage._cdata
        alive[key] = (out.numel(), weakref.ref(storage, lambda _: alive.pop(key)))
        seen.append(sum(numel for numel, _ in alive.values()))
        return result

    sizes = set(training.low_bit_numels())
    forward = []
    ops.decode = recorded
    try:
        with recording_watch() as watch:
            is_forward = True

            def sample():
                if is_forward:
                    forward.append(
                        sum(n for dtype, n in watch.alive() if dtype.is_floating_point and n in sizes)
                    )

            watch.after_each = sample

            def forward_ends(*_):
                nonlocal is_forward
                is_forward = False

            hook = training.engine.module.register_forward_hook(forward_ends)
            training.step()
            hook.remove()
        n_of_step = len(seen)
        training.engine.forward(training.tokens)
    finally:
        ops.decode = decode
    gc.collect()
    left, block, largest = len(alive), training.block_numel(), max(training.low_bit_numels())
    training.engine.close()
    return {
        "decoded": seen,
        "n_of_step": n_of_step,
        "forward": forward,
        "left": left,
        "block": block,
        "largest": largest,
        "n_weights": len(training.low_bit_numels()),
    }


@pytest.mark.parametrize("world", [pytest.param(1, marks=pytest.mark.slow), 2])
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("residency", ["sharded", "replicated"])
def test_at_most_one_blocks_weights_are_decoded_at_any_moment(residency, checkpointing, world, ranks):
    content = configuration(
        zero={"residency": residency},
        train={"micro_batch": 2, "batch_tokens": 8 * SEQ_LEN, "activation_checkpointing": checkpointing},
    )
    for found in ranks(world).run(decoded_weights_alive, content):
        passes = 4 // world * (3 if checkpointing else 2)
        assert found["n_of_step"] >= (passes - 1) * found["n_weights"], "weights are decoded in every pass"
        # The weight of the module at work, and in a recomputation that of the module that asked for it.
        assert 0 < max(found["decoded"]) <= (2 if checkpointing else 1) * found["largest"] < found["block"]
        assert 0 < max(found["forward"]) <= found["largest"]
        assert found["left"] == 0, "an evaluation leaves no weight behind"


# ------------------------------------------------------------------ on the wire


def collectives_of_a_step(content):
    """Each collective of one step, as PyTorch's dispatcher sees it: (name, dtype, elements received)."""
    from torch.utils._python_dispatch import TorchDispatchMode

    from lowbit_dist.memory.live import _tensors

    found = []

    class Collectives(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func.namespace == "c10d":
                first = _tensors(args)[0]
                found.append((func.__name__.split(".")[0], first.dtype, first.numel()))
            return func(*args, **(kwargs or {}))

    training = Training(content)
    training.step()
    training.step()
    before = training.engine.gathered_bytes
    with Collectives():
        training.step()
    low_bit = {name: training.engine.numels[name] for name in training.engine.low_bit}
    ordinary = [n for name, n in training.engine.numels.items() if name not in low_bit]
    gathered = training.engine.gathered_bytes - before
    training.engine.close()
    return {
        "calls": found,
        "low_bit": list(low_bit.values()),
        "ordinary": ordinary,
        "gathered_bytes": gathered,
    }


@pytest.mark.parametrize("grid", ["ternary", *OTHER_GRIDS])
@pytest.mark.parametrize("residency", ["sharded", "replicated"])
def test_gathers_move_packed_bytes_of_whole_blocks(residency, grid, ranks):
    passes = 2
    content = configuration(
        method={"grid": grid},
        zero={"residency": residency},
        train={"micro_batch": 2, "batch_tokens": passes * 4 * SEQ_LEN},
    )
    for found in ranks(2).run(collectives_of_a_step, content):
        gathers = [n for name, _, n in found["calls"] if name.startswith("_allgather")]
        assert {dtype for name, dtype, _ in found["calls"] if name.startswith("_allgather")} == {torch.uint8}
        # Replicated codes are gathered once a step, others once for each forward and each backward pass.
        times = 1 if residency == "replicated" else 2 * passes
        packed = sum(n * BITS[grid] // 8 for n in found["low_bit"])
        ordinary = sum(4 * -(-n // 512) * 512 for n in found["ordinary"])
        assert sum(gathers) == times * packed + 2 * passes * ordinary
        # A gather's own half is not received; nothing else carries weights.
        assert found["gathered_bytes"] == times * packed // 2
        # The embedding, each block, the last norm with the head; replicated blocks once more for their codes.
        more = MODEL["layers"] if residency == "replicated" else 0
        assert len(gathers) <= 2 * passes * (MODEL["layers"] + 3) + more
        few = len(found["low_bit"]) + len(found["ordinary"])  # how many flipped, of each parameter
        others = {name for name, _, n in found["calls"] if n > few and not name.startswith("_allgather")}
        assert others == {"send", "recv_"}


# ------------------------------------------------------------------ planned and measured


def measured(content):
    from lowbit_dist import memory

    training = Training(content)
    training.step()
    peaks, flips = [], 0
    # A thread of gloo's may free a tensor a moment late, with a rule of rows in every second step: the lowest
    # of some steps counts.
    for _ in range(12):
        with memory.track_peak(training.engine) as peak:
            flips += training.step().flips
        peaks.append(peak)
    report = memory.measure(training.engine, min(peaks, key=lambda peak: sum(peak.values())))
    training.engine.close()
    return report | {"flips": flips}


CHECKPOINTED = {"activation_checkpointing": True}
TWO_PASSES = {"batch_tokens": 8 * SEQ_LEN}  # a step of two micro-batches on each of two workers
# Widths of published models (SmolLM, Qwen2) that are no multiples of 256.
WIDTH_576 = {"hidden_size": 576, "intermediate_size": 1536, "heads": 9, "kv_heads": 3}
WIDTH_896 = {"hidden_size": 896, "intermediate_size": 1792, "heads": 14, "kv_heads": 2}
CASES = [
    {},
    {"method": {"grid": "int2", "granularity": "row"}, "optimizer": {"states": "fp32"}},
    {"method": {"grid": "int3"}, "zero": {"residency": "replicated"}, "precision": "bf16"},
    {"method": {"grid": "int4", "scale": "rms"}, "optimizer": {"states": "bf16"}, "precision": "bf16"},
    {"method": {"grid": "int8", "granularity": "row"}, "zero": {"residency": "replicated"}},
    {"method": {"tensors": "all"}},
    {"method": {"tensors": "all", "granularity": "row"}, "precision": "bf16"},
    {"method": {"sub_norms": True}, "model": {"tie_embeddings": True}},
    {"train": CHECKPOINTED},
    {"train": CHECKPOINTED, "precision": "bf16"},
    {"train": CHECKPOINTED, "precision": "bf16", "zero": {"residency": "replicated"}},
    {"train": {**CHECKPOINTED, **TWO_PASSES}, "precision": "bf16", "method": {"grid": "int4"}},
    {"train": TWO_PASSES, "precision": "bf16"},
    {"train": {"reproducible": True}},
    {"model": {"layers": 7, "kv_heads": 4}, "train": CHECKPOINTED},
    {
        "model": {"layers": 7},
        "train": CHECKPOINTED,
        "method": {"grid": "int8"},
        "zero": {"residency": "replicated"},
        "precision": "bf16",
    },
    {"method": {"name": "bitnet"}},
    {"method": {"name": "bitnet"}, "precision": "bf16", "train": CHECKPOINTED},
    {"method": {"name": "dense"}, "model": {"layers": 7}, "precision": "bf16", "train": CHECKPOINTED},
    {"method": {"name": "dense"}, "optimizer": {"states": "fp32"}, "train": TWO_PASSES},
    {"method": {"name": "dense"}, "zero": {"stage": 0}, "precision": "bf16"},
    {"method": {"name": "bitnet"}, "zero": {"stage": 0}, "train": CHECKPOINTED},
    {"method": {"name": "dense"}, "zero": {"stage": 1}, "optimizer": {"states": "bf16"}},
    {
        "method": {"name": "dense"},
        "zero": {"stage": 1},
        "optimizer": {"states": "fp32"},
        "train": TWO_PASSES,
    },
    {
        "method": {"name": "bitnet"},
        "zero": {"stage": 2},
        "optimizer": {"states": "fp32"},
        "precision": "bf16",
        "train": TWO_PASSES,
    },
    {
        "method": {"name": "dense"},
        "zero": {"stage": 2},
        "optimizer": {"states": "bf16"},
        "train": CHECKPOINTED,
    },
    {"method": {"name": "dense"}, "zero": {"stage": 3}, "precision": "bf16"},
    {"model": WIDTH_576},
    {"model": WIDTH_896, "precision": "bf16", "train": CHECKPOINTED},
    {"model": WIDTH_896, "method": {"granularity": "row", "grid": "int4"}},
    {"method": {"granularity": "group"}, "zero": {"residency": "replicated"}},
    {"method": {"granularity": "group", "group": 64, "grid": "int8"}, "precision": "bf16"},
    {"optimizer": {"name": "lion"}, "method": {"grid": "int8"}},
    {"optimizer": {"name": "lion", "states": "bf16"}, "method": {"name": "dense"}, "zero": {"stage": 2}},
    {"optimizer": {"name": "lion", "states": "fp32"}, "method": {"name": "bitnet"}, "zero": {"stage": 0}},
    {"optimizer": {"name": "rows", "states": "int8"}},
    {"optimizer": {"name": "rows", "states": "fp32"}, "method": {"grid": "int4"}, "precision": "bf16"},
    {"optimizer": {"name": "matrix", "states": "bf16"}, "method": {"grid": "int8"}},
    {"optimizer": {"name": "rows", "states": "fp32"}, "method": {"name": "dense"}, "precision": "bf16"},
    {"optimizer": {"name": "matrix", "states": "fp32"}, "zero": {"residency": "replicated"}},
    {"optimizer": {"name": "matrix", "states": "fp32"}, "method": {"name": "bitnet"}, "zero": {"stage": 0}},
    {"method": {"name": "trilm", "slices": 2}, "precision": "bf16"},
    {
        "method": {"name": "flip"},
        "optimizer": {"name": "rmsprop", "second_moment": "element", "linear_lr_ratio": 4.0},
        "precision": "bf16",
    },
    {"optimizer": {"name": "muon"}, "method": {"grid": "int8"}},
    {"optimizer": {"name": "muon", "states": "bf16"}, "method": {"name": "bitnet"}, "zero": {"stage": 0}},
    {"method": {"name": "tequila"}, "train": CHECKPOINTED},
    {"method": {"name": "tbt", "activation_bits": 2}, "precision": "bf16", "train": CHECKPOINTED},
    {"method": {"grid": "int8", "forward": "ternary"}, "zero": {"residency": "replicated"}},
    {"method": {"grid": "int8", "forward": "ternary", "granularity": "group"}, "precision": "bf16"},
    {"method": {"grid": "int8", "rules": "released"}},
    {"precision": {"matmul": "int8"}, "method": {"grid": "int8", "granularity": "row"}},
    {"precision": {"compute": "fp32", "matmul": "int8"}, "train": CHECKPOINTED},
    {"precision": {"matmul": "int8", "grad_input": "int8"}},
    {"method": {"name": "flip", "residual": "bf16"}},
]
WORLDS = (2, 1, 2, 3)  # of one case after another


def check_plan(case, world, ranks):
    content = configuration(**case)
    if world == 3:
        content["train"] |= {"batch_tokens": 12 * SEQ_LEN}
    check_content(content, world, ranks)


def check_content(content, world, ranks):
    from lowbit_dist import memory
    from lowbit_dist.memory.plan import planned

    plan = dict(planned(load(content), VOCAB, world))
    reports = ranks(world).run(measured, content)
    assert all(report["flips"] for report in reports if plan["parameters"]["low_bit"]), "codes must move"
    largest = memory.largest(reports)
    assert plan["components"].keys() == largest["components"].keys()
    assert plan.pop("states") == load(content).optimizer.states
    assert plan == {name: largest[name] for name in plan}


@pytest.mark.parametrize(
    "number",
    [pytest.param(n, marks=[pytest.mark.slow] if n % 10 else []) for n in range(len(CASES))],
    ids=lambda n: f"{WORLDS[n % 4]}-{CASES[n]}",
)
def test_the_plan_is_what_is_measured(number, ranks):
    check_plan(CASES[number], WORLDS[number % 4], ranks)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "world"),
    [(n, world) for n in range(0, len(CASES), 6) for world in (1, 2, 3) if world != WORLDS[n % 4]],
)
def test_the_plan_is_what_is_measured_on_other_numbers_of_workers(number, world, ranks):
    check_plan(CASES[number], world, ranks)


@contextmanager
def integers_faster(answer):
    from lowbit_dist import products

    with patch.object(products, "are_faster", lambda device: answer):
        yield


def measured_as(content, answer):
    with integers_faster(answer):
        return measured(content)


@pytest.mark.parametrize("layers", [3, pytest.param(7, marks=pytest.mark.slow)])
@pytest.mark.parametrize("world", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_the_plan_knows_which_products_are_chosen(layers, world, ranks):
    """Under activation checkpointing the peak is where a block multiplies, in integers or in numbers."""
    from lowbit_dist import memory
    from lowbit_dist.memory.plan import planned

    seq_len = 8 * SEQ_LEN
    content = configuration(
        model={"layers": layers},
        data={"seq_len": seq_len},
        train={**CHECKPOINTED, "batch_tokens": 4 * seq_len},
        precision="bf16",
    )
    peaks = []
    for answer in (True, False):
        planned.cache_clear()
        with integers_faster(answer):
            plan = planned(load(content), VOCAB, world)
        largest = memory.largest(ranks(world).run(measured_as, content, answer))
        peaks.append(plan["peak_bytes_per_worker"])
        assert largest["peak_bytes_per_worker"] == peaks[-1]
    planned.cache_clear()
    assert peaks[0] != peaks[1], "the case must tell them apart"


def test_a_run_measures_what_is_planned(few_steps):
    from lowbit_dist.checkpoint import Checkpoint
    from lowbit_dist.memory.plan import planned

    summary = few_steps(precision="bf16", train={**CHECKPOINTED, "batch_tokens": 512, "compile": "off"})
    opened = Checkpoint.open(summary["checkpoint"])
    plan = planned(opened.config, opened.manifest["vocab_size"], 1)
    assert {name: summary["memory"][name] for name in plan} == plan


def test_what_is_measured_spans_all_that_decides_memory():
    seen = [load(configuration(**case)) for case in CASES]
    assert len(CASES) >= 16
    for name in ("dqt", "bitnet", "dense"):
        assert {c.train.activation_checkpointing for c in seen if c.method.name == name} == {True, False}
        assert {c.precision.compute for c in seen if c.method.name == name} == {"fp32", "bf16"}
    low_bit = [c for c in seen if c.method.name == "dqt"]
    assert {c.method.grid for c in low_bit} == set(BITS)
    assert {c.zero.residency for c in low_bit} == {"sharded", "replicated"}
    assert {c.method.tensors for c in low_bit} == {"linears", "all"}
    assert {c.optimizer.states for c in seen} == {"fp32", "bf16", "int8"}
    assert {c.zero.stage for c in seen if c.method.name != "dqt"} == {None, 0, 1, 2, 3}
    assert {c.model.layers for c in seen if c.train.activation_checkpointing} == {3, 7}


@pytest.mark.parametrize(
    ("content", "weight", "states"),
    [
        ({"method": {"name": "dense"}, "precision": "fp32", "optimizer": {"states": "fp32"}}, 4, 8),
        ({"method": {"name": "bitnet"}, "optimizer": {"states": "fp32"}}, 6, 8),  # bf16 behind float32
        ({"method": {"name": "bitnet"}, "optimizer": {"states": "int8"}, "zero": {"stage": 3}}, 6, 2.03125),
        ({"method": {"name": "dqt", "grid": "ternary"}}, 0.25, 2.03125),
        ({"method": {"name": "dqt", "grid": "int8", "forward": "ternary"}}, 1.25, 2.03125),
        (
            {"method": {"name": "flip"}, "optimizer": {"name": "rmsprop", "second_moment": "element"}},
            0.25,
            1 + 1.015625,
        ),
    ],
)
def test_bytes_of_a_linear_weight_are_its_own_and_those_of_its_states(content, weight, states):
    from lowbit_dist.memory.resident import per_linear_weight
    from lowbit_dist.model import shapes

    config = load(configuration() | {"precision": "bf16"} | content)
    model = shapes(config, VOCAB)
    scales = 4 * 7 * config.model.layers / sum(model.get_parameter(n).numel() for n in model.linear_weights)
    weight += scales * len({config.method.stored, config.method.sent_grid} - {None})
    sizes = per_linear_weight(config, model, 1)
    assert sizes["bytes_per_linear_weight"] == pytest.approx(weight, rel=1e-12)
    assert sizes["bytes_per_linear_weight_with_states"] == pytest.approx(weight + states, rel=1e-12)


def test_a_measurement_is_compared_with_the_plans_of_the_baselines(ranks):
    from lowbit_dist import memory

    content = configuration(precision="bf16")
    reports = ranks(2).run(measured, content)
    found = memory.compare(load(content), VOCAB, reports)
    plan = memory.plan(load(content), VOCAB, 2)
    for name in ("saved_vs_adamw_fp32", "saved_vs_bitnet_ste", "saved_vs_dense_same_states"):
        assert 0.05 < found[name] < 0.9
        assert found[name] == plan[name]  # as the resident bytes are equal
    assert found["saved_vs"].startswith("measured resident bytes of this run against the planned")
    assert found["peak_bytes_per_worker"] == max(each["peak_bytes_per_worker"] for each in reports)
    assert found["peak_rss_bytes"] > found["peak_bytes_per_worker"]
    assert 0 < found["bytes_per_linear_weight"] < found["bytes_per_linear_weight_with_states"]
    dense = found["plan_dense"]
    for name in list(memory.COMPONENTS)[:6]:
        assert dense["components"][name] == plan["plan_dense"]["components"][name]
    # Weights, gradients and two moments in float32: 16 bytes, spread over two workers.
    assert dense["resident_bytes_per_worker"] / dense["parameters"]["total"] == pytest.approx(8, rel=1e-3)
    flat = memory.metrics(reports[0])
    assert flat.pop("resident_bytes") == sum(flat.values())


@pytest.mark.parametrize(
    ("workers", "case"),
    [
        pytest.param(2, {"precision": "bf16"}, marks=pytest.mark.slow),
        pytest.param(3, {"train": CHECKPOINTED}, marks=pytest.mark.slow),
        pytest.param(
            2,
            {"train": CHECKPOINTED, "precision": "bf16", "zero": {"residency": "replicated"}},
            marks=pytest.mark.slow,
        ),
        (3, {"method": {"name": "dense"}, "zero": {"stage": 1}, "train": CHECKPOINTED}),
        pytest.param(
            3,
            {"method": {"name": "dense"}, "zero": {"stage": 2}, "train": CHECKPOINTED},
            marks=pytest.mark.slow,
        ),
    ],
    ids=str,
)
def test_a_long_models_plan_is_what_a_simulation_of_all_its_blocks_says(workers, case, monkeypatch):
    """The highest moment of a long model need not be that of a short one."""
    from lowbit_dist.memory import simulation

    train = {"micro_batch": 2, "batch_tokens": 12 * SEQ_LEN, **case.get("train", {})}
    content = configuration(
        **{**case, "train": train, "model": {"layers": 14}, "optimizer": {"states": "bf16"}}
    )
    extrapolated = simulation.simulate_step(load(content), VOCAB, workers)
    monkeypatch.setattr(simulation, "LONGEST", 14)
    simulated = simulation.simulate_step(load(content), VOCAB, workers)
    assert extrapolated.activations == simulated.activations
    assert sum(extrapolated) == pytest.approx(sum(simulated), rel=1e-4)


def test_a_partition_touches_whole_parameters():
    """Stages 1 and 2 keep the gradients of every parameter that a worker's partition cuts."""
    from lowbit_dist.memory.simulation import _largest_worker

    config = load(configuration(method={"name": "dense"}, zero={"stage": 1}, optimizer={"states": "bf16"}))
    for numels, largest in (
        ([2, 2, 2, 2], 0),
        ([1, 10, 1, 1], 1),
        ([2, 2, 4, 8], 0),
        ([1, 3, 10, 2], 0),
    ):
        model = torch.nn.ParameterList([torch.empty(n) for n in numels])
        assert _largest_worker(config, model, 2) == largest


def state_of_the_process():
    import os

    import torch.distributed as dist
    from deepspeed.accelerator import get_accelerator
    from deepspeed.comm import comm
    from deepspeed.utils import groups

    group = dist.distributed_c10d._get_default_group() if dist.is_initialized() else None
    return (
        [group, comm.cdb, get_accelerator(), sys.excepthook, ops._backend, ops._host_backend, gc.collect],
        [torch.nn.Module._apply, torch.cuda.is_available, dict(os.environ), gc.isenabled()],
        {name: value for name, value in vars(groups).items() if name.startswith("_")},
    )


@pytest.mark.parametrize("fails", [False, True])
def test_a_simulation_leaves_its_process_as_it_was(fails, monkeypatch):
    from lowbit_dist.memory import simulation

    simulation.simulate_step(load(configuration()), VOCAB, 2)  # imports
    before = state_of_the_process()
    if fails:
        monkeypatch.setattr(simulation, "blocks_of", lambda model: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            simulation.simulate(load(configuration()), simulation.shapes(load(configuration()), VOCAB), 2)
    else:
        simulation.simulate_step(load(configuration()), VOCAB, 2)
    assert state_of_the_process() == before
    assert type(torch.empty(1)) is torch.Tensor


def simulate_here(content):
    from lowbit_dist.memory import simulation

    before = state_of_the_process()
    with pytest.raises(RuntimeError, match="in a process group"):
        simulation.simulate_step(load(content), VOCAB, 2)
    assert state_of_the_process() == before
    return True


def test_a_worker_is_not_simulated_in_a_live_process_group(ranks):
    assert all(ranks(2).run(simulate_here, configuration()))


def test_what_is_at_rest_is_planned_without_deepspeed():
    code = (
        "import sys; from lowbit_dist import configfile; from lowbit_dist.memory import baselines; "
        f"baselines(configfile.from_dict({configuration()!r}), {VOCAB}, 2); "
        "assert 'deepspeed' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    ("preset", "workers", "n_parameters", "n_bytes"),
    [("70b", 64, 69e9, 4.33), pytest.param("7b", 8, 6.74e9, 4.51, marks=pytest.mark.slow)],
)
def test_billions_of_parameters_are_planned_in_seconds(preset, workers, n_parameters, n_bytes):
    from lowbit_dist import memory

    train = {"micro_batch": 1, "batch_tokens": 2048 * workers, "activation_checkpointing": True}
    content = configuration(data={"path": "none", "seq_len": 2048}, train=train, precision="bf16")
    content["model"] = {"preset": preset}
    start = process_time()
    plan = memory.plan(load(content), 32_000, workers)
    assert process_time() - start < 20  # with its imports, on a busy machine
    parts, counts = plan["components"], plan["parameters"]
    assert counts["total"] == pytest.approx(n_parameters, rel=0.01)
    assert parts["low_bit_weights"]["bytes"] == counts["low_bit"] // 4 // workers
    assert plan["resident_bytes_per_worker"] * workers / counts["total"] == pytest.approx(n_bytes, abs=0.01)
    # Float32 weights and gradients with states in 8 bits and in float32; of BitNet bf16 weights and gradients
    # add 2 and save 2.
    for name, of_baseline, states in (
        ("plan_dense_same_states", 10.03, "int8"), ("plan_bitnet", 10.03, "int8"), ("plan_dense", 16, "fp32"),
    ):  # fmt: skip
        assert plan[name]["resident_bytes_per_worker"] * workers / counts["total"] == pytest.approx(
            of_baseline, rel=1e-3
        )
        assert plan[name]["states"] == states
    assert plan["saved_vs_adamw_fp32"] == pytest.approx(1 - n_bytes / 16, abs=0.002)


@pytest.mark.parametrize(("preset", "sequences", "seq_len"), [("13m", 8, 256), *slow(("1b", 8, 2048))])
def test_rounded_inputs_take_no_more_than_those_of_full_precision(preset, sequences, seq_len):
    """Saved as integers, once for all layers that read them."""
    from lowbit_dist.memory.plan import planned

    content = {
        "model": {"preset": preset},
        "data": {"path": "none", "seq_len": seq_len},
        "train": {"micro_batch": sequences, "batch_tokens": sequences * seq_len},
        "cluster": {"workers": 1},
    }
    activations, peak = {}, {}
    for name in ("dense", "dqt"):
        plan = planned(load(content | {"method": {"name": name}}), 32_000, 1)
        activations[name] = plan["components"]["activations"]["bytes"]
        peak[name] = activations[name] + plan["components"]["transient"]["bytes"]
    assert activations["dqt"] <= activations["dense"] and peak["dqt"] <= peak["dense"], (activations, peak)


@pytest.mark.parametrize("name", ["dqt", "dense"])
def test_the_logits_of_a_large_vocabulary_are_not_in_the_plan(name):
    """16,384 tokens of 128k: two bytes each would be 4.3 GB; they and their gradients were 27 GB."""
    from lowbit_dist.memory.plan import planned

    train = {"micro_batch": 8, "batch_tokens": 8 * 2048 * 8, "activation_checkpointing": True}
    content = configuration(
        data={"path": "none", "seq_len": 2048}, train=train, precision="bf16", method={"name": name}
    )
    content |= {"model": {"preset": "1b"}, "zero": {}}
    plan = dict(planned(load(content), 2**17, 8))
    above = plan["peak_bytes_per_worker"] - plan["resident_bytes_per_worker"]
    assert 2e9 < above < 4e9


def test_a_batch_that_cannot_be_divided_is_not_planned():
    from lowbit_dist import memory
    from lowbit_dist.config import ConfigError

    with pytest.raises(ConfigError, match="batch_tokens"):
        memory.plan(load(configuration()), VOCAB, 3)


def test_the_watch_counts_each_storage_while_anything_holds_it():
    from lowbit_dist.memory.live import StorageMeter

    old = torch.ones(1000)
    with StorageMeter() as watch:
        view = old.view(10, 100)[2:]
        old.add_(1)
        assert watch.now == 0, "what was there before does not count"
        first = torch.ones(1000)
        second = first[5:]
        assert watch.now == 4000
        del first
        assert watch.now == 4000, "a view keeps its storage"
        del second
        assert (watch.now, watch.peak) == (0, 4000)
        w = torch.ones(500, requires_grad=True)
        y = w.exp().exp()  # autograd alone holds the inner result
        assert watch.now == 6000
        del y
        assert watch.now == 2000
    assert view.numel() == 800

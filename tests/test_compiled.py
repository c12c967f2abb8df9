"""Compiled blocks: the digest does not depend on workers, checkpointing, resumes and evaluations; nothing is
compiled twice; and what is said where compiling is impossible.
"""

import logging
import re
from pathlib import Path

import pytest
from cases import standing
from test_train import digest, train

from lowbit_dist import compiled, configfile
from lowbit_dist.config import ConfigError

COMPILED = {
    "compile": "on", "reproducible": True, "steps": 4, "save_every": 2, "log_every": 2, "eval_every": 4,
    "batch_tokens": 6 * 64, "micro_batch": 1,
}  # fmt: skip
METHODS = {
    "dqt": {},
    "sent on another grid": {"method": {"grid": "int8", "forward": "ternary"}},
    "bitnet": {"method": {"name": "bitnet"}},
    "dense": {"method": {"name": "dense"}},
}


@pytest.mark.parametrize("case", standing({name: name for name in METHODS}, "dqt"))
def test_compiled_blocks_give_one_digest(case, ranks, small):
    def configuration(name, **changes):
        changes = {**METHODS[case], "model": {"layers": 1}, **changes}
        return small(run={"name": name}, **{**changes, "train": {**COMPILED, **changes.get("train", {})}})

    recomputed = {"activation_checkpointing": True}
    digests = {
        "one, evaluated": digest(ranks, 1, configuration("one", train={"eval_every": 1})),
        "two, recomputed": digest(ranks, 2, configuration("two", train=recomputed)),
        "three": digest(ranks, 3, configuration("three")),
    }
    ranks(2).run(train, configuration("stopped"), 2)
    digests["stopped"] = digest(ranks, 1, configuration("stopped"))
    assert len(set(digests.values())) == 1, digests
    plain = digest(ranks, 1, configuration("plain", train={"compile": "off"}))
    assert plain not in digests.values(), "the case must run compiled code"


@pytest.mark.slow
@pytest.mark.parametrize(
    "sections", [{"zero": {"residency": "replicated"}}, {"train": {"gradient_release": True}}]
)
def test_compiled_blocks_give_one_digest_however_they_are_trained(sections, ranks, small):
    few = {**COMPILED, "reproducible": False, "batch_tokens": 2 * 64, "clip_norm": 0}
    base = small(run={"name": "base"}, train=few)
    changed = small(run={"name": "changed"}, **{**sections, "train": {**few, **sections.get("train", {})}})
    assert digest(ranks, 2, base) == digest(ranks, 2, changed)


def work_of_blocks(configuration):
    """How many parts had been compiled after each of some steps; and, of a forward and a backward pass of one
    block, the calls that compiled parts make, and the operations of its products.
    """
    import torch._dynamo.utils
    import torch._functorch.config
    from torch._inductor import compile_fx
    from torch.utils._python_dispatch import TorchDispatchMode

    from lowbit_dist import linear, model, ops
    from lowbit_dist.zero import Engine

    class Operations(TorchDispatchMode):
        n = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            Operations.n += not (func.is_view or func._schema.name in NO_KERNEL)
            return func(*args, **(kwargs or {}))

    def within(function):
        def call(*args, **kwargs):
            with Operations():
                return function(*args, **kwargs)

        return staticmethod(call)

    def counted(function):
        def call(*args, **kwargs):
            Operations.n += 1
            with torch._C._DisableTorchDispatch():
                return function(*args, **kwargs)

        return call

    config = configfile.from_dict(configuration)
    built = model.build(config.model, 512, config.method, torch.bfloat16)
    initial, names = (
        model.InitialWeights(built, config.method, 0, None),
        model.low_bit_names(built, config.method),
    )
    engine = Engine(config, built, initial, names)
    counters = torch._dynamo.utils.counters
    counters.clear()
    tokens, n_parts, calls, compile_part = torch.arange(128).view(2, 64), [], [], compile_fx.compile_fx_inner

    def remember(*args, **kwargs):
        part = compile_part(*args, **kwargs)
        calls.extend(
            re.findall(
                r"^ +(?:buf\d+ = )?(cpp_fused\w+|torch\.ops\.aten\S+)\(",
                getattr(part, "source_code", ""),
                re.M,
            )
        )
        return part

    with pytest.MonkeyPatch.context() as patch, torch._functorch.config.patch(enable_autograd_cache=False):
        patch.setattr(compile_fx, "compile_fx_inner", remember)
        engine.compile(lambda: None)
        for n in range(4):
            if n == 3:
                for name in ("forward", "backward"):
                    patch.setattr(linear._Linear, name, within(getattr(linear._Linear, name)))
                for name in ("decode", "round_tokens", "token_values"):
                    patch.setattr(ops, name, counted(getattr(ops, name)))
            with engine.step(ops.Now(lr=1e-3, weight_decay=0.0, step=n + 1, seed=0)) as step:
                step.backward(tokens)
            n_parts.append(counters["stats"]["unique_graphs"])
    engine.close()
    return n_parts, calls, Operations.n / config.model.sizes().layers


NO_KERNEL = {"aten::detach", "aten::empty", "aten::empty_like", "aten::new_empty", "aten::empty_strided"}


def test_blocks_are_compiled_once_into_few_operations(ranks, small):
    """Alike blocks share what is compiled."""
    content = small(precision="bf16", train={"batch_tokens": 128}, cluster={"workers": 1})
    n_parts, calls, of_products = ranks(1).run(work_of_blocks, content)[0]
    assert 0 < n_parts[0] == n_parts[-1] <= 8, "the parts between seven products"
    assert sum("scaled_dot_product" in call for call in calls) >= 2 and len(calls) > 10, (
        "calls must be counted"
    )
    assert of_products >= 7 * 2 + 7 * 3, "decoding and products"
    assert len(calls) + of_products <= 70, (calls, of_products)


def choice(configuration, **position):
    config = configfile.from_dict(configuration)
    return compiled.decide(config, "cpu", 1_000_000, **position)


NEW = {"is_new": True, "before": None}


def test_auto_compiles_long_runs_and_resumes_as_a_run_began(ranks, small, monkeypatch):
    from lowbit_dist import machine

    short, long = (small(train={"steps": steps, "compile": "auto"}) for steps in (300, 30_000_000))
    here = machine.instructions()
    assert ranks(1).run(choice, short, **NEW) == [None]
    assert ranks(1).run(choice, long, **NEW) == [here]
    assert ranks(1).run(choice, long, is_new=False, before=None) == [None]
    assert ranks(1).run(choice, short, is_new=False, before=here) == [here]
    assert ranks(1).run(choice, small(train={"compile": "off"}), **NEW) == [None]


def heard(configuration, **position):
    """What is decided, and said."""
    lines = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())
    logging.disable(logging.NOTSET)
    compiled.log.addHandler(handler)
    try:
        return choice(configuration, **position), lines
    finally:
        compiled.log.removeHandler(handler)


def test_a_compiled_run_says_that_a_processor_has_other_instructions(ranks, small):
    content = small(train={"compile": "on"})
    ((own, lines),) = ranks(1).run(heard, content, is_new=False, before="vax")
    assert lines == [f"blocks were compiled for vax until now, here they are for {own}: bits may differ"]
    assert ranks(1).run(heard, content, is_new=False, before=own) == [(own, [])]


def test_what_compiling_needs_is_named_where_it_is_missing(small, monkeypatch):
    config = configfile.from_dict(small(train={"compile": "on"}))
    assert compiled.why_not("cpu") is None
    compiled.check(config, "cpu", "this machine")
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(
        ConfigError, match=r"train.compile \(on\) .* this machine has no compiler no-such-comp"
    ):
        compiled.check(config, "cpu", "this machine")
    compiled.check(configfile.from_dict(small(train={"compile": "auto"})), "cpu", "this machine")


def without_compiler(configuration, **position):
    import os
    from unittest.mock import patch

    with patch.dict(os.environ, {"CXX": "no-such-compiler"}):
        try:
            return heard(configuration, **position)
        except ConfigError as mistake:
            return str(mistake)


def test_auto_goes_without_a_compiler_unless_the_run_was_compiled_until_now(ranks, small):
    long = small(train={"steps": 30_000_000, "compile": "auto"})
    ((choice, lines),) = ranks(1).run(without_compiler, long, **NEW)
    assert choice is None
    assert lines == ["blocks run uncompiled: worker 0 has no compiler no-such-compiler; install one"]
    (mistake,) = ranks(1).run(without_compiler, long, is_new=False, before="avx2")
    assert mistake.startswith(
        "train.compile (auto, and so until now) must go with what PyTorch compiles with"
    )


def test_a_launch_that_cannot_compile_ends_in_one_line(lowbit, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CXX", "no-such-compiler")
    quickstart = Path(__file__).parents[1] / "configs" / "quickstart.yaml"
    done = lowbit("train", quickstart, "train.compile=on", "cluster.workers=1")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.splitlines() == [
        "lowbit: train.compile (on) must go with what PyTorch compiles with, but this machine has no "
        "compiler no-such-compiler; install one, or write train.compile: off"
    ]
    assert not any(tmp_path.iterdir()), "nothing is left"


def test_yaml_words_for_true_and_false_are_taken(small):
    for value, meaning in ((True, "on"), (False, "off"), ("auto", "auto")):
        assert configfile.from_dict(small(train={"compile": value})).train.compile == meaning

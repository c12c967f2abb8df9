"""Compiled blocks: the digest does not depend on workers, checkpointing, resumes and evaluations; nothing is
compiled twice; and what is said where compiling is impossible.
"""

import logging
import re
from collections import Counter
from pathlib import Path

import pytest
import torch
from cases import standing
from hf_folders import write
from test_train import digest, train
from test_zero import engine_of

from lowbit_dist import compiled, configfile
from lowbit_dist.config import ConfigError

COMPILED = {
    "compile": "on", "reproducible": True, "steps": 4, "save_every": 2, "log_every": 2, "eval_every": 4,
    "batch_tokens": 6 * 64, "micro_batch": 1,
}  # fmt: skip
METHODS = {
    "dqt": {},
    "sent on another grid": {"method": {"grid": "int8", "forward": "ternary"}},
    "integers": {
        "method": {"granularity": "row"},
        "precision": {"compute": "fp32", "matmul": "int8", "grad_input": "int8"},
    },
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


def calls_of_blocks(configuration, rounded_in_graphs=("cuda",)):
    """How many graphs had been compiled after each of some steps; what their code calls, in a forward and a
    backward pass of one block; and the buffers that products read.
    """
    import torch._dynamo.utils
    import torch._functorch.config
    from torch._inductor import compile_fx

    from lowbit_dist import compiled_linear, ops

    engine, counters = engine_of(configuration, torch.bfloat16), torch._dynamo.utils.counters
    counters.clear()
    compile_graph, tokens = compile_fx.compile_fx_inner, torch.arange(128).view(2, 64)
    n_graphs, calls, read = [], [], []

    def remember(*args, **kwargs):
        graph = compile_graph(*args, **kwargs)
        code = getattr(graph, "source_code", "")
        calls.extend(re.findall(CALL, code, re.M))
        read.extend(re.findall(r"lowbit\.product\.default\((\w+)", code))
        return graph

    with pytest.MonkeyPatch.context() as patch, torch._functorch.config.patch(enable_autograd_cache=False):
        patch.setattr(compile_fx, "compile_fx_inner", remember)
        patch.setattr(compiled_linear, "ROUNDED_IN_GRAPHS", rounded_in_graphs)
        engine.compile(lambda: None)
        for n in range(4):
            with engine.step(ops.Now(lr=1e-3, weight_decay=0.0, step=n + 1, seed=0)) as step:
                step.backward(tokens)
            n_graphs.append(counters["stats"]["unique_graphs"])
    engine.close()
    return n_graphs, calls, read


CALL = r"^ +(?:buf\d+ = )?(cpp_fused\w+|torch\.ops\.\w+\.\w+|extern_kernels\.\w+)[.(]"
# Launches of those that launch more than one kernel: codes become numbers, or numbers of tokens again.
LAUNCHES = {f"torch.ops.lowbit.{name}": 2 for name in ("product", "input_gradient", "weight_gradient")}


@pytest.mark.parametrize(
    ("sections", "products"),
    [
        ({}, {"product": 7, "input_gradient": 7, "weight_gradient": 7, "rounded_tokens": 4}),
        (
            {"precision": {"matmul": "int8", "grad_input": "int8"}},
            {"level_product": 7, "input_gradient": 7, "weight_gradient": 7, "round_tokens": 4},
        ),
    ],
    ids=["numbers", "integers"],
)
def test_a_block_is_one_graph_of_few_operations(sections, products, ranks, small):
    """Alike blocks share it; tokens are rounded once for all layers that read them."""
    content = small(train={"batch_tokens": 128}, cluster={"workers": 1}, **{"precision": "bf16", **sections})
    n_graphs, calls, _ = ranks(1).run(calls_of_blocks, content)[0]
    assert n_graphs == [1, 1, 1, 1]
    ours = Counter(call.removeprefix("torch.ops.lowbit.") for call in calls if ".lowbit." in call)
    assert ours == products
    assert sum("scaled_dot_product" in call for call in calls) >= 2
    assert len(calls) > sum(products.values()) + 8
    assert sum(LAUNCHES.get(call, 1) for call in calls) <= 70, calls


def test_what_is_rounded_in_the_graph_is_made_once(ranks, small):
    """As on GPUs: of all layers that read a tensor, no product has a copy of its own."""
    content = small(precision="bf16", train={"batch_tokens": 128}, cluster={"workers": 1})
    _, _, read = ranks(1).run(calls_of_blocks, content, ("cpu",))[0]
    assert len(read) == 7 and len(set(read)) == 4, read


def test_products_of_ordinary_weights_are_in_the_graph_and_views_are_not(ranks, small):
    content = small(precision="bf16", train={"batch_tokens": 128}, cluster={"workers": 1})
    n_graphs, calls, _ = ranks(1).run(calls_of_blocks, content | {"method": {"name": "dense"}})[0]
    assert n_graphs == [1, 1, 1, 1] and sum("mm" in call for call in calls) == 7 * 3
    n_graphs, calls, _ = ranks(1).run(calls_of_blocks, content | {"method": {"name": "bitnet"}})[0]
    assert 1 < n_graphs[0] == n_graphs[-1] <= 8 and not any(
        "lowbit" in call or "mm" in call for call in calls
    )


def kept_of_blocks(configuration, rounded_in_graphs=("cuda",), lr=1e-3):
    """Bytes that a step keeps for its backward pass, parameters left aside, and the losses of a few."""
    from lowbit_dist import compiled_linear, ops

    engine = engine_of(configuration, torch.bfloat16)
    if engine.config.train.compile == "on":
        engine.compile(lambda: None)
    tokens, kept, losses = torch.arange(4 * engine.config.data.seq_len).view(4, -1) % 512, {}, []

    def keep(x):
        if not isinstance(x, torch.nn.Parameter):
            kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compiled_linear, "ROUNDED_IN_GRAPHS", rounded_in_graphs)
        for n in range(3):
            kept.clear()
            with (
                engine.step(ops.Now(lr=lr, weight_decay=0.0, step=n + 1, seed=0)) as step,
                torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x),
            ):
                losses.append(step.backward(tokens).item())
    engine.close()
    return sum(kept.values()), losses


@pytest.mark.parametrize("method", standing({"dqt": {}, "dense": {"name": "dense"}}, "dqt"))
def test_a_compiled_block_keeps_no_more_than_one_that_is_not(method, ranks, small):
    """Rounded tokens in bytes, and nothing of a weight; and it learns the same."""
    sizes = {"hidden_size": 256, "intermediate_size": 256, "heads": 4, "kv_heads": 4, "layers": 2}
    content = small(
        precision="bf16", method=method, model=sizes, cluster={"workers": 1}, data={"seq_len": 128},
        train={"batch_tokens": 512, "micro_batch": 4},
    )  # fmt: skip
    train = content["train"]
    compiled, plain = (
        ranks(1).run(kept_of_blocks, content | {"train": train | {"compile": choice}})[0]
        for choice in ("on", "off")
    )
    assert compiled[0] <= plain[0], (compiled[0], plain[0])
    assert compiled[1] == pytest.approx(plain[1], rel=2e-3) and compiled[1] != plain[1]
    if not method:  # as on GPUs, by the compiler's own code
        content = content | {"train": train | {"compile": "on"}}
        in_graph = ranks(1).run(kept_of_blocks, content, ("cpu",))[0]
        assert in_graph[0] <= plain[0], (in_graph[0], plain[0])
        assert in_graph[1] == pytest.approx(plain[1], rel=2e-3) and in_graph[1] != compiled[1]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["phi", "mixtral"])
def test_blocks_of_other_models_compile_to_the_same_function(name, ranks, small, tmp_path):
    """With biases, norms of their own, and mixtures of experts, which are left out."""
    content = small(
        precision="bf16", cluster={"workers": 1}, data={"seq_len": 64},
        train={"batch_tokens": 256, "micro_batch": 4},
    )  # fmt: skip
    content["model"] = {"pretrained": str(write(tmp_path / "model", name))}
    train = content["train"]
    compiled, plain = (
        ranks(1).run(kept_of_blocks, content | {"train": train | {"compile": choice}}, lr=1e-4)[0]
        for choice in ("on", "off")
    )
    rounded_otherwise = 0.01 if name == "mixtral" else 0.002  # tokens may go to other experts
    assert compiled[1] == pytest.approx(plain[1], rel=rounded_otherwise) and compiled[1] != plain[1]


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

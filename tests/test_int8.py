"""Layers that multiply integers: sums of which no order, thread or cut shows; one digest on any number of
workers; and where they are refused.
"""

from unittest.mock import patch

import pytest
import torch
from cases import standing
from op_cases import assert_equal, generator
from test_memory import check_plan
from test_methods import rounded_tokens
from test_train import digest, train
from torch import nn

from lowbit_dist import configfile, model, ops, products
from lowbit_dist.config import ConfigError
from lowbit_dist.convert import convert_
from lowbit_dist.grid import GRIDS
from lowbit_dist.methods import DQT, Flip
from lowbit_dist.ops import cpu, reference
from lowbit_dist.packed import PackedTensor

needs_compiler = pytest.mark.skipif(not cpu.available(), reason="no C compiler")
every_float = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
INT8 = {"compute": "fp32", "matmul": "int8"}


def case(t, n, k, *, n_scales=1):
    """Levels of all sizes, the largest sums among them; the second token is not finite."""
    levels, weight = (
        torch.randint(-128, 128, (m, k), generator=generator(m), dtype=torch.int8) for m in (t, n)
    )
    levels[0], weight[0] = -128, -128
    per_unit = torch.rand(t, generator=generator(1)) * 1e3 + 1
    per_unit[1:2] = torch.nan
    return levels, per_unit, weight, torch.rand(n_scales, generator=generator(2)) + 1e-3


@every_float
@pytest.mark.parametrize(
    ("t", "n", "k"), [(1, 1, 64), (7, 5, 300), (600, 130, 1024), (2, 3, ops.LONGEST_ROW)]
)
def test_a_product_is_that_of_whole_numbers(t, n, k, dtype):
    for n_scales in {1, n}:
        levels, per_unit, weight, scale = case(t, n, k, n_scales=n_scales)
        by_columns = weight.t().contiguous().t()
        sums = levels.long() @ weight.long().t()
        expected = (sums.float() * scale * (1 / per_unit[:, None])).to(dtype)
        for product in (ops.int8_product, reference.int8_product):
            found = product(levels, per_unit, weight, scale, dtype)
            assert found.dtype == dtype and found[1:2].isnan().all() and not found[:1].isnan().any()
            assert_equal(found.nan_to_num(-1.0), expected.nan_to_num(-1.0), "y")
            found = product(levels, per_unit, by_columns, scale, dtype)
            assert_equal(found.nan_to_num(-1.0), expected.nan_to_num(-1.0), "y of a weight by columns")
    assert ops.int8_product(levels[:0], per_unit[:0], weight, scale, dtype).shape == (0, n)


@needs_compiler
def test_no_order_no_thread_and_no_cut_of_a_batch_shows():
    levels, per_unit, weight, scale = case(300, 70, 1000, n_scales=70)
    per_unit[1] = 3.0
    expected = ops.int8_product(levels, per_unit, weight, scale, torch.float32)
    order = torch.randperm(1000, generator=generator(3))
    swapped = levels[:, order].contiguous(), per_unit, weight[:, order].contiguous(), scale
    assert_equal(ops.int8_product(*swapped, torch.float32), expected, "of another order")
    for cut in (1, 77, 256):
        parts = [
            ops.int8_product(*part, weight, scale, torch.float32)
            for part in zip(levels.split(cut), per_unit.split(cut), strict=True)
        ]
        assert_equal(torch.cat(parts), expected, f"{cut} tokens at a time")
    rows = [
        ops.int8_product(levels, per_unit, weight[i : i + 7], scale[i : i + 7], torch.float32)
        for i in range(0, 70, 7)
    ]
    assert_equal(torch.cat(rows, 1), expected, "of other rows")
    before = torch.get_num_threads()
    for threads in (1, 2):
        torch.set_num_threads(threads)
        found = ops.int8_product(levels, per_unit, weight, scale, torch.float32)
        torch.set_num_threads(before)
        assert_equal(found, expected, f"{threads} threads")


@needs_compiler
def test_a_processor_whose_sums_are_not_exact_is_not_asked_for_them():
    """One that multiplies bytes without a sign, and adds two products up in 16 bits (`vpmaddubsw`)."""
    exact = torch._int_mm

    def saturating(a, b):
        pairs = ((a.int() + 128)[:, :, None] * b.int()[None]).unflatten(1, (-1, 2)).sum(2)
        return (pairs.clamp(-(2**15), 2**15 - 1).sum(1) - 128 * b.int().sum(0)).int()

    arguments = *case(5, 6, 256), torch.float32
    with patch.object(torch, "_int_mm", saturating):
        cpu.sums_are_exact.cache_clear()
        assert not cpu.sums_are_exact()
        found = ops.int8_product(*arguments)
    cpu.sums_are_exact.cache_clear()
    assert torch._int_mm is exact
    assert_equal(found.nan_to_num(-1.0), reference.int8_product(*arguments).nan_to_num(-1.0), "y")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda c: [c[0][:, :-1].contiguous(), *c[1:]], "do not fit"),
        (lambda c: [*c[:3], torch.ones(2)], "2 scales do not fit"),
        (lambda c: [c[0].float(), *c[1:]], "levels is torch.float32"),
        (lambda c: [*c[:2], c[2].repeat(1, 2)[:, ::2], c[3]], "weight has strides"),
        (lambda c: case(1, 1, ops.LONGEST_ROW + 1), "may not fit 32 bits"),
    ],
)
def test_what_cannot_be_multiplied_is_refused(change, words):
    with pytest.raises(ValueError, match=words):
        ops.int8_product(*change(list(case(4, 6, 64))), torch.float32)


def layer_of(method, k=256, n=64, dtype=torch.float32):
    torch.manual_seed(0)
    (layer,) = convert_(nn.Sequential(nn.Linear(k, n, dtype=dtype)), method)
    return layer


@every_float
@pytest.mark.parametrize(
    "method",
    [
        *(DQT(grid=grid) for grid in GRIDS),
        DQT(grid="int4", granularity="row"),
        DQT(grid="int8", forward="ternary", granularity="row"),
        Flip(),
    ],
    ids=lambda method: f"{method.label} {method.granularity}",
)
def test_a_layer_multiplies_integers_and_has_the_gradients_of_numbers(method, dtype):
    layer, x = layer_of(method, dtype=dtype), torch.randn(3, 5, 256, dtype=dtype, requires_grad=True)
    dy = torch.randn(3, 5, 64, dtype=dtype)

    def passes():
        layer.zero_grad()
        x.grad = None
        y = layer(x)
        y.backward(dy)
        return y.detach(), x.grad, layer.weight.grad, layer.bias.grad

    in_numbers = passes()
    layer.in_integers = True
    in_integers = passes()
    for ours, theirs in zip(in_integers[1:], in_numbers[1:], strict=True):
        assert torch.equal(ours, theirs), "gradients"
    y = in_integers[0]
    assert y.dtype == dtype and not torch.equal(y, in_numbers[0]), "the case must show the rounding"
    weight = method.seen(layer.weight.packed.tensor)
    assert isinstance(weight, PackedTensor)
    expected = rounded_tokens(x.detach().float().view(15, 256)).view(3, 5, 256).double()
    expected = expected @ weight.dequantize(torch.float32).double().t()
    tolerance = 1e-5 if dtype == torch.float32 else 0.02
    exact = expected + layer.bias.detach().double()
    torch.testing.assert_close(y.double(), exact, rtol=tolerance, atol=tolerance)
    with torch.no_grad():
        assert torch.equal(layer(x), y)
        assert torch.equal(layer(x[:, :2]), y[:, :2]), "no other token shows"
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16


@every_float
@pytest.mark.parametrize("granularity", ["tensor", "row"])
def test_the_gradient_of_an_input_is_one_of_integers(granularity, dtype):
    """Each row of dy (times the rows' scales, where there are several) rounded to 8 bits, times levels."""
    layer = layer_of(DQT(grid="int4", granularity=granularity), dtype=dtype)
    x, dy = (torch.randn(3, 5, n, generator=generator(n)).to(dtype) for n in (256, 64))
    dy[1] *= 1e-12
    dy[2, 0] = 0.0
    layer.in_integers = True

    def passes(x, dy):
        layer.zero_grad()
        x = x.clone().requires_grad_()
        y = layer(x)
        y.backward(dy)
        return x.grad, y.detach(), layer.weight.grad, layer.bias.grad

    in_numbers = passes(x, dy)
    layer.grad_in_integers = True
    in_integers = passes(x, dy)
    for ours, theirs in zip(in_integers[1:], in_numbers[1:], strict=True):
        assert torch.equal(ours, theirs), "all but the gradient of x"
    packed = layer.weight.packed.tensor
    levels, scale = packed.levels().view(64, 256), packed.scale
    rows = dy.view(15, 64) if len(scale) == 1 else (dy.view(15, 64) * scale).to(dtype)
    most = rows.abs().amax(1, keepdim=True).float().clamp(min=1e-30)
    q = (rows * (127 / most)).round().long()
    assert q.abs().max() == 127 and q[5:10].abs().amax(1).tolist() == [127] * 5, "also of small ones"
    expected = (q @ levels.long()).float() * (scale if len(scale) == 1 else 1.0) * (1 / (127 / most))
    assert_equal(in_integers[0].view(15, 256), expected.to(dtype), "dx")
    assert not torch.equal(in_integers[0], in_numbers[0])
    torch.testing.assert_close(in_integers[0], in_numbers[0], rtol=0, atol=0.05 * in_numbers[0].std().item())
    first = passes(x[:1], dy[:1])[0]
    assert torch.equal(first, in_integers[0][:1]), "no other token shows"
    dy[0, 0, 3] = torch.inf
    assert passes(x, dy)[0][0, 0].isnan().all(), "it is not hidden"


def test_inputs_are_rounded_once_and_their_numbers_are_not_made():
    layers = [layer_of(DQT()), layer_of(DQT(grid="int8"))]
    x, made = torch.randn(4, 256), []
    round_tokens = ops.round_tokens
    with (
        patch.object(ops, "round_tokens", lambda *a: made.append("rounded") or round_tokens(*a)),
        patch.object(ops, "token_values", lambda *a: made.append("numbers")),
    ):
        for layer in layers:
            layer.in_integers = True
            layer(x)
    assert made == ["rounded"]


FEW = {
    "reproducible": True, "steps": 4, "save_every": 2, "log_every": 2, "eval_every": 4,
    "batch_tokens": 6 * 64, "micro_batch": 1,
}  # fmt: skip


def configuration(small, name, **changes):
    changes = {"precision": INT8, "model": {"layers": 1}, **changes}
    return small(run={"name": name}, **{**changes, "train": {**FEW, **changes.get("train", {})}})


OTHERS = {
    "ternary": ({}, "auto"),
    "ternary of rows": ({"grid": "int8", "forward": "ternary", "granularity": "row"}, "auto"),
    "flip": ({"name": "flip", "grid": "int4"}, "auto"),
    "gradients too": ({}, "int8"),
    "gradients too, of rows": ({"grid": "int8", "granularity": "row"}, "int8"),
}


@pytest.mark.parametrize(("method", "of_gradients"), standing(OTHERS, "ternary", "gradients too, of rows"))
def test_one_digest_on_any_number_of_workers(method, of_gradients, ranks, small):
    method = {"method": method, "precision": INT8 | {"grad_input": of_gradients}}
    recomputed = {"train": {"activation_checkpointing": True}}
    digests = {
        "one, evaluated": digest(ranks, 1, configuration(small, "one", train={"eval_every": 1}, **method)),
        "two, recomputed": digest(ranks, 2, configuration(small, "two", **recomputed, **method)),
        "three": digest(ranks, 3, configuration(small, "three", **method)),
    }
    stopped = configuration(small, "stopped", **method)
    ranks(2).run(train, stopped, 2)
    digests["stopped"] = digest(ranks, 1, stopped)
    assert len(set(digests.values())) == 1, digests
    with pytest.raises(AssertionError, match=r"precision.matmul: int8 -> auto"):
        ranks(1).run(checked, configuration(small, "stopped", **method | {"precision": "fp32"}))
    less = "fp32" if of_gradients == "auto" else INT8
    in_numbers = configuration(small, "numbers", **method | {"precision": less})
    assert digest(ranks, 1, in_numbers) not in digests.values(), "the case must multiply integers"


def checked(content):
    from lowbit_dist.cluster import checks

    checks.check_run(configfile.from_dict(content))


@pytest.mark.slow
def test_compiled_blocks_multiply_integers_alike_on_any_number_of_workers(ranks, small):
    on = {"compile": "on"}
    one, two = (digest(ranks, n, configuration(small, f"{n}", train=on)) for n in (1, 2))
    plain = digest(ranks, 1, configuration(small, "plain"))
    in_numbers = digest(ranks, 1, configuration(small, "numbers", train=on, precision="fp32"))
    assert one == two and one not in (plain, in_numbers)


def losses(content):
    from lowbit_dist.zero import Engine

    config = configfile.from_dict(content)
    built = model.build(config.model, 512, config.method, model.DTYPES[config.precision.compute])
    initial = model.InitialWeights(built, config.method, 0, None)
    engine = Engine(config, built, initial, model.low_bit_names(built, config.method))
    layers = {name: m.in_integers for name, m in engine.module.named_modules() if hasattr(m, "in_integers")}
    tokens, found = torch.arange(32).view(2, 16) % 7, []
    for step in range(1, 13):
        with engine.step(ops.Now(lr=3e-3, weight_decay=0.0, step=step, seed=0)) as passes:
            found.append(passes.backward(tokens).item())
    engine.close()
    return found, layers


@pytest.mark.parametrize("method", [{"name": "dqt", "grid": "int8"}, {"name": "flip"}], ids=str)
def test_a_model_learns_in_it(method, small, ranks):
    content = small(
        model={"hidden_size": 64, "intermediate_size": 64, "layers": 1, "heads": 2, "kv_heads": 1},
        method=method, precision="bf16", cluster={"workers": 1},
        train={"batch_tokens": 128, "micro_batch": 2},
    )  # fmt: skip
    in_bf16, layers = ranks(1).run(losses, content)[0]
    assert not any(layers.values())
    in_int8, layers = ranks(1).run(losses, content | {"precision": {"matmul": "int8"}})[0]
    assert in_int8 != in_bf16 and in_int8[0] == pytest.approx(in_bf16[0], rel=0.01)
    assert in_int8[-1] < 0.9 * in_int8[0]
    assert layers.pop("lm_head") is False and all(layers.values()) and len(layers) == 7


def test_the_plan_knows_levels_and_its_baselines_have_none(ranks, small):
    from lowbit_dist.memory.plan import plan

    check_plan({"precision": {"matmul": "int8"}}, 2, ranks)
    plans = [
        plan(configfile.from_dict(small(precision=each)), 512, 1) for each in ({"matmul": "int8"}, "bf16")
    ]
    for name in ("plan_bitnet", "plan_dense", "plan_dense_same_states"):
        assert plans[0][name] == plans[1][name]
    assert plans[0]["peak_bytes_per_worker"] <= plans[1]["peak_bytes_per_worker"]


PROCESSORS = {
    "vnni": "flags : avx2 avx512f avx512_vnni avx512_bf16",
    "amx": "flags : avx2 avx512f avx512_vnni avx512_bf16 amx_bf16 amx_int8",
    "old": "flags : avx2",
}


def on(processors, content, stop_at=None):
    """A run whose workers see these processors, each its own; what it ends in, and whether its layers
    multiplied integers.
    """
    import tempfile
    from pathlib import Path

    import torch.distributed as dist

    from lowbit_dist import machine, resuming

    settled = []
    settle, seen = resuming.products.settle_, processors[dist.get_rank()]
    with tempfile.TemporaryDirectory() as folder:
        cpuinfo = Path(folder) / "cpuinfo"
        cpuinfo.write_text(PROCESSORS[seen] + "\n")
        with (
            patch.object(machine, "CPUS", cpuinfo),
            patch.object(
                resuming.products, "settle_", lambda *a, **k: settled.append(settle(*a, **k)) or settled[-1]
            ),
        ):
            summary = train(content, stop_at)
    return (summary or {}).get("digest"), settled[-1]


@needs_compiler
def test_integers_are_not_chosen_where_nothing_is_compiled(tmp_path):
    """Plain torch takes ten times as long for them as for numbers."""
    from lowbit_dist import machine

    (tmp_path / "cpuinfo").write_text(PROCESSORS["vnni"] + "\n")
    with patch.object(machine, "CPUS", tmp_path / "cpuinfo"):
        assert products.are_faster("cpu") and not products.are_faster("cuda")
        with patch.object(cpu, "available", lambda: False):
            assert not products.are_faster("cpu")
        with patch.object(cpu, "sums_are_exact", lambda: False):
            assert not products.are_faster("cpu")


@needs_compiler
@pytest.mark.slow
def test_auto_multiplies_integers_where_they_are_faster_and_goes_on_as_a_run_began(ranks, small):
    def run(name, *processors, matmul="auto", method=None, stop_at=None):
        precision, method = {"compute": "bf16", "matmul": matmul}, method or {}
        content = configuration(
            small,
            name,
            precision=precision,
            method=method,
            train={"reproducible": False, "batch_tokens": 128},
        )
        (found, *others) = ranks(len(processors)).run(on, processors, content, stop_at)
        assert all(other[1] == found[1] for other in others), "one way for all"
        return found

    integers, numbers = (run(matmul, "old", matmul=matmul)[0] for matmul in ("int8", "bf16"))
    assert integers != numbers
    assert run("vnni", "vnni") == (integers, True)
    assert run("amx", "amx") == run("old", "old") == (numbers, False)
    assert run("two", "vnni", "vnni") == (run("two-int8", "old", "old", matmul="int8")[0], True)
    assert run("mixed", "vnni", "amx") == (run("two-bf16", "old", "old", matmul="bf16")[0], False)
    for first, then, ended in (("vnni", "amx", (integers, True)), ("amx", "vnni", (numbers, False))):
        assert run(f"from-{first}", first, stop_at=2)[1] is ended[1]
        assert run(f"from-{first}", then) == ended
    groups = {"granularity": "group"}
    assert run("groups", "vnni", method=groups) == (
        run("groups-bf16", "vnni", method=groups, matmul="bf16")[0],
        False,
    )


def test_auto_leaves_open_what_can_be_of_integers(small):
    def n_open(**sections):
        config = configfile.from_dict(small(**sections))
        built = model.build(config.model, 512, config.method, model.DTYPES[config.precision.compute])
        return len(products.left_open(config, built))

    assert n_open(precision="bf16", model={"layers": 2}) == 2 * 7
    for method in (
        {"name": "bitnet"},
        {"name": "dense"},
        {"granularity": "group"},
        {"activation_bits": None},
    ):
        assert not n_open(precision="bf16", method=method)
    for precision in ("fp32", {"matmul": "bf16"}, {"matmul": "int8"}):
        assert not n_open(precision=precision)


def test_a_model_is_measured_by_products_of_numbers():
    layer, x = layer_of(DQT()), torch.randn(4, 256)
    with torch.no_grad():
        in_numbers = layer.eval()(x)
        layer.in_integers = layer.grad_in_integers = True
        assert torch.equal(layer(x), in_numbers) and not torch.equal(layer.train()(x), in_numbers)


@pytest.mark.parametrize("matmul", ["auto", "int8", "fp8"])
def test_a_model_of_many_blocks_is_planned_by_a_few_of_them(matmul, small):
    from lowbit_dist.memory.plan import planned

    def peak(layers):
        content = small(model={"layers": layers}, precision={"compute": "bf16", "matmul": matmul})
        return planned(configfile.from_dict(content), 512, 1)["peak_bytes_per_worker"]

    few, some, many = (peak(layers) for layers in (12, 24, 36))
    assert many - some == some - few > 0


@pytest.mark.parametrize(
    ("sections", "words"),
    [
        (
            {"method": {"granularity": "group"}},
            r"has one for each 128 elements; write method.granularity: row",
        ),
        ({"method": {"activation_bits": None}}, r"inputs of 8 bits, .*; write method.activation_bits: 8"),
    ],
    ids=["groups", "inputs"],
)
def test_layers_that_cannot_are_refused(sections, words, small):
    config = configfile.from_dict(small(precision=INT8, **sections))
    with pytest.raises(ConfigError, match=rf"^precision.matmul \(int8\) must go with .*{words} or .*auto$"):
        products.check(config, 512)


@pytest.mark.slow
def test_a_model_learns_with_gradients_of_integers(small, ranks):
    content = small(
        model={"hidden_size": 64, "intermediate_size": 64, "layers": 1, "heads": 2, "kv_heads": 1},
        method={"grid": "int8"}, cluster={"workers": 1}, train={"batch_tokens": 128, "micro_batch": 2},
    )  # fmt: skip
    of_outputs, _ = ranks(1).run(losses, content | {"precision": {"matmul": "int8"}})[0]
    of_both, _ = ranks(1).run(losses, content | {"precision": {"matmul": "int8", "grad_input": "int8"}})[0]
    assert of_both[0] == of_outputs[0] and of_both[1:] != of_outputs[1:]
    assert of_both[-1] == pytest.approx(of_outputs[-1], rel=0.02)


def test_longer_rows_than_sums_can_have_are_refused(small):
    config = configfile.from_dict(small(precision=INT8))
    with (
        patch.object(ops, "LONGEST_ROW", 300),
        pytest.raises(ConfigError, match=r"rows of at most 300 elements, .* have 512; write precision"),
    ):
        products.check(config, 512)
    config = configfile.from_dict(small(precision=INT8 | {"grad_input": "int8"}))
    columns = r"^precision.grad_input \(int8\) must go with columns of at most 300 .* have 512; write "
    with (
        patch.object(ops, "LONGEST_ROW", 300),
        pytest.raises(ConfigError, match=columns + "precision.grad_input: auto"),
    ):
        products.check(config, 512)


def test_what_is_to_be_written_instead_is_taken(small):
    both = INT8 | {"grad_input": "int8"}
    with pytest.raises(ConfigError, match=r"precision.matmul: auto and precision.grad_input: auto$"):
        configfile.from_dict(small(precision=both, method={"name": "bitnet"}))
    config = configfile.from_dict(small(precision=both, method={"activation_bits": None}))
    with pytest.raises(ConfigError, match=r"auto and precision.grad_input: auto$"):
        products.check(config, 512)


def test_layers_of_other_code_are_refused(small):
    config = configfile.from_dict(small(precision=INT8))
    built = model.build(config.model, 512, config.method, torch.float32)
    built.model.layers[0].mlp.down_proj.view = object()
    with pytest.raises(ConfigError, match=r"without a view .*down_proj.weight has one"):
        products.choose_(config, built)

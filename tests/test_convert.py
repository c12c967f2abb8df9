"""Low-bit training in plain PyTorch: README's example, and that it is the distributed engine's training."""

import copy
import hashlib
import math
import re
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from test_train import train
from torch import nn

import lowbit_dist as lb
from lowbit_dist import configfile, data
from lowbit_dist.linear import Linear
from lowbit_dist.packed import PackedTensor

README = Path(lb.__file__).parent.parent / "README.md"
STEPS = 50


def example():
    """README's code for a model, its batches and nothing else."""
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(), flags=re.S)
    return next(block for block in blocks if "lb.convert_(" in block)


def as_transformers_does(configuration):
    """A run that makes its loss, and a mask for attention, as transformers makes them."""
    from lowbit_dist.zero import engine

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine, "chunk_loss", lambda model: None)
        patch.setattr(engine.attention, "causal", nullcontext)
        return train(configuration)


def llama(config, vocab_size):
    """The run's model with its first weights, made by transformers alone."""
    import transformers

    from lowbit_dist import model

    made = transformers.AutoModelForCausalLM.from_config(model.hf_config(config.model, vocab_size))
    initial = model.InitialWeights(made, config.method, config.run.seed, None)
    for name, p in made.named_parameters():
        p.data.copy_(initial(name, p.shape))
    return made


def digest(model):
    """As a checkpoint's: names in order, each with its int8 levels and scale, or its values."""
    sha = hashlib.sha256()
    for name, p in sorted(model.named_parameters()):
        sha.update(name.encode())
        packed = getattr(p, "packed", None)
        parts = (p.detach(),) if packed is None else (packed.tensor.levels(), packed.tensor.scale)
        for part in parts:
            sha.update(part.contiguous().view(-1).numpy().data)
    return sha.hexdigest()


def test_readmes_two_lines_train_as_the_engine_does(ranks, small):
    content = small(
        optimizer={"lr": 1e-3}, schedule={"name": "constant", "warmup_steps": 0}, cluster={"workers": 1},
        train={"steps": STEPS, "batch_tokens": 128, "micro_batch": 2, "clip_norm": 0.0, "save_every": STEPS},
    )  # fmt: skip
    expected = ranks(1).run(as_transformers_does, content)[0]["digest"]

    config = configfile.from_dict(content)
    torch.set_num_threads(1)
    model = llama(config, data.read_manifest(config.data.path).vocab_size)
    read = data.Batches(config.data, "train", 0)
    first = digest(model)
    scope = {"model": model, "batches": [read.micro_batch(2 * step, 2) for step in range(STEPS)]}
    exec(example(), scope)
    assert digest(model) == expected != first
    low_bit = [p for p in model.parameters() if hasattr(p, "packed")]
    assert len(low_bit) == 14 and all(p.untyped_storage().nbytes() == 4 for p in low_bit), (
        "no dense weight is left"
    )


def network(inputs=256, seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(inputs, 64), nn.ReLU(), nn.Linear(64, 8))


def learn(model, optimizer, steps, first=0):
    g = torch.Generator().manual_seed(1)
    x, y = torch.randn(64, 256, generator=g), torch.randint(8, (64,), generator=g)
    losses = []
    for _ in range(first, first + steps):
        loss = nn.functional.cross_entropy(model(x), y)
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return losses


@pytest.mark.parametrize("rule", [lb.optim.AdamW(lr=2e-2, weight_decay=0.0), lb.optim.Lion(lr=2e-3)], ids=str)
@pytest.mark.parametrize(
    "method",
    [lb.methods.DQT(grid="int4"), lb.methods.BitNet(), lb.methods.DQT(granularity="group", group=64)],
    ids=str,
)
def test_any_model_of_linears_learns(method, rule):
    model = lb.convert_(network(), method, keep=["2"])
    losses = learn(model, lb.Optimizer(model, rule), 60)
    assert losses[-1] < 0.5 * losses[0], "the case must learn"
    assert isinstance(model[2], nn.Module) and not hasattr(model[2].weight, "packed"), "kept as it is"


def test_a_stopped_training_resumes_exactly_from_state_dicts():
    def fresh():
        model = lb.convert_(network(), lb.methods.DQT(grid="int8"))
        return model, lb.Optimizer(model, lb.optim.AdamW(lr=1e-2), seed=3, clip_norm=1.0)

    whole, optimizer = fresh()
    learn(whole, optimizer, 10)
    model, optimizer = fresh()
    learn(model, optimizer, 4)
    saved = copy.deepcopy(model.state_dict()), copy.deepcopy(optimizer.state_dict())
    assert "0.weight" not in saved[0] and saved[0]["0.weight.codes"].dtype == torch.uint8
    model, optimizer = fresh()
    model.load_state_dict(saved[0])
    optimizer.load_state_dict(saved[1])
    learn(model, optimizer, 6)
    assert digest(model) == digest(whole)


def test_copies_and_moves_keep_codes():
    model = lb.convert_(network(), lb.methods.DQT())
    x = torch.randn(3, 256)
    twin = copy.deepcopy(model)
    assert torch.equal(twin(x), model(x))
    learn(twin, lb.Optimizer(twin, lb.optim.AdamW(lr=5e-2)), 5)
    assert digest(twin) != digest(model), "a copy has codes of its own"
    moved = copy.deepcopy(model).to(torch.bfloat16)
    assert torch.equal(moved[0].weight.packed.tensor.codes, model[0].weight.packed.tensor.codes)
    assert moved[0].weight.packed.tensor.scale.dtype == torch.float32
    assert moved[0].weight.untyped_storage().nbytes() == 2
    torch.testing.assert_close(moved(x.bfloat16()).float(), model(x), rtol=0.1, atol=0.1)


def test_vectors_do_not_decay_unless_the_method_says_so():
    model = lb.convert_(network(), lb.methods.Dense())
    optimizer = lb.Optimizer(model, lb.optim.AdamW(lr=1e-2, weight_decay=0.5))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    for name, p in model.named_parameters():
        same = torch.equal(p, before[name])
        assert same if p.dim() == 1 else torch.equal(p, before[name] * (1 - 1e-2 * 0.5))


def test_a_gradient_that_is_not_finite_changes_nothing():
    model = lb.convert_(network(), lb.methods.DQT())
    optimizer = lb.Optimizer(model, lb.optim.AdamW(lr=1e-2))
    before = digest(model)
    for p in model.parameters():
        p.grad = torch.full(p.shape, math.nan)
    optimizer.step()
    assert digest(model) == before


def test_a_scheduler_of_torch_changes_the_rate():
    model = lb.convert_(network(), lb.methods.Dense())
    optimizer = lb.Optimizer(model, lb.optim.AdamW(lr=1e-2))
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.0)
    before = digest(model)
    learn(model, optimizer, 2)
    scheduler.step()
    assert digest(model) == before


def test_a_rule_that_sees_the_matrix_gets_it():
    from typing import ClassVar, Literal

    class Orthogonal(lb.optim.Rule):
        """The nearest orthogonal matrix, as Muon approximates it."""

        name: Literal["orthogonal"] = "orthogonal"
        scope: ClassVar = "matrix"

        def update(self, g, *slots, step):
            if g.dim() == 1:
                return (g.sign(),)
            u, _, v = torch.linalg.svd(g, full_matrices=False)
            return (u @ v,)

    model = lb.convert_(network(), lb.methods.DQT(grid="int8"))
    losses = learn(model, lb.Optimizer(model, Orthogonal(lr=2e-2, weight_decay=0.0)), 60)
    assert losses[-1] < 0.5 * losses[0]


@pytest.mark.parametrize(
    ("model", "method", "message"),
    [
        (lambda: nn.Sequential(nn.ReLU()), lb.methods.DQT, "Sequential has no nn.Linear to convert"),
        (lambda: network(250), lb.methods.DQT, r"layer 0: .*multiple of 256 elements, not 16,000"),
        (lambda: nn.Sequential(nn.Linear(576, 256)), lambda: lb.methods.DQT(granularity="group"),
         r"layer 0: a group of 128 does not divide a row of 576"),
        (network, lambda: lb.methods.DQT(tensors="all"), "convert_ packs linear layers alone"),
    ],
)  # fmt: skip
def test_what_cannot_be_converted_is_a_value_error_that_names_the_layer(model, method, message):
    model = model()
    kinds = [type(module) for module in model.modules()]
    with pytest.raises(ValueError, match=message):
        lb.convert_(model, method())
    assert [type(module) for module in model.modules()] == kinds, "nothing is changed"


def shared():
    model = nn.Sequential(nn.Linear(256, 256), nn.Linear(256, 256))
    model[1].weight = model[0].weight
    return model


def twice():
    layer = nn.Linear(256, 256)
    return nn.Sequential(layer, nn.ReLU(), layer)


@pytest.mark.parametrize(
    ("model", "keep", "message"),
    [
        (shared, (), r"layer 0: its weight is 1\.weight too"),
        (twice, (), r"layer 0: its weight is 2\.weight too"),
        (network, ("head",), "'head', which is no module of Sequential"),
        (network, "0", r"keep is '0'; it must be a list"),
        (lambda: nn.Linear(256, 256), (), "Linear has no nn.Linear to convert in it"),
        (lambda: nn.Sequential(nn.Sequential(nn.Linear(256, 256))), ("0",), "no nn.Linear to convert"),
    ],
)
def test_what_is_shared_or_kept_wrongly_is_named(model, keep, message):
    with pytest.raises(ValueError, match=message):
        lb.convert_(model(), lb.methods.DQT(), keep=keep)


def test_layers_whose_owner_reads_their_weight_stay():
    """`MultiheadAttention` hands its projection's weight to a function of its own."""
    encoder = nn.TransformerEncoderLayer(256, 4, 512, batch_first=True).eval()
    x = torch.randn(2, 5, 256)
    expected = encoder.self_attn(x, x, x)[0]
    lb.convert_(encoder, lb.methods.DQT())
    assert torch.equal(encoder.self_attn(x, x, x)[0], expected)
    assert not encoder.linear1.training and hasattr(encoder.linear1.weight, "packed")


def test_a_pickled_model_is_the_model(tmp_path):
    model = lb.convert_(network(), lb.methods.DQT())
    torch.save(model, tmp_path / "model.pt")
    loaded = torch.load(tmp_path / "model.pt", weights_only=False)
    assert digest(loaded) == digest(model)
    assert digest(copy.deepcopy(loaded)) == digest(model)
    learn(loaded, lb.Optimizer(loaded, lb.optim.AdamW(lr=5e-2)), 3)
    assert digest(loaded) != digest(model)


def test_a_state_dict_of_another_conversion_is_refused():
    saved = lb.convert_(network(), lb.methods.DQT(grid="int2")).state_dict()
    model = lb.convert_(network(), lb.methods.DQT())
    with pytest.raises(RuntimeError, match=r"0\.weight\.codes has codes that the grid ternary"):
        model.load_state_dict(saved)
    with pytest.raises(RuntimeError, match=r"0\.weight has codes .* converted by another method"):
        model.load_state_dict(lb.convert_(network(), lb.methods.DQT(grid="int8")).state_dict())
    with pytest.raises(RuntimeError, match=r'Missing key\(s\) in state_dict: "0\.weight\.codes"'):
        model.load_state_dict(network().state_dict())
    before = digest(model)
    model.load_state_dict({}, strict=False)
    assert digest(model) == before


def test_autocast_computes_in_its_precision():
    model = lb.convert_(nn.Sequential(nn.Linear(256, 64, bias=False), nn.Linear(64, 8)), lb.methods.DQT())
    x = torch.randn(4, 256)
    with torch.autocast("cpu", torch.bfloat16):
        y = model(x)
        assert y.dtype == torch.bfloat16
        y.float().square().mean().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in model.parameters())
    torch.testing.assert_close(y.float(), model(x), rtol=0.1, atol=0.1)


def test_a_wrapped_model_keeps_its_methods_rates():
    class Slow(lb.methods.Dense):
        def rates(self, name, shape):
            assert name in ("0.weight", "0.bias", "2.weight", "2.bias"), "names begin at the converted model"
            return 0.1, 0.0

    wrapped = nn.Sequential(lb.convert_(network(), Slow()), nn.Linear(8, 8))
    groups = lb.Optimizer(wrapped, lb.optim.AdamW(lr=1e-3)).param_groups
    assert sorted((len(g["params"]), round(g["lr"], 6)) for g in groups) == [(1, 1e-3), (1, 1e-3), (4, 1e-4)]


def test_codes_that_are_sent_are_what_layers_multiply_with():
    from toys import FineStored

    model = lb.convert_(network(), FineStored())
    weight = model[0].weight
    assert len(weight.packed.tensor.levels().unique()) > 50
    assert len(weight.packed.dense(weight.shape, torch.float32).unique()) == 3
    losses = learn(model, lb.Optimizer(model, lb.optim.AdamW(lr=2e-2)), 60)
    assert losses[-1] < 0.5 * losses[0]


def test_states_of_another_precision_are_refused():
    model = lb.convert_(network(), lb.methods.DQT())
    optimizer = lb.Optimizer(model, lb.optim.AdamW())
    learn(model, optimizer, 1)
    other = lb.Optimizer(model, lb.optim.AdamW(states="fp32"))
    with pytest.raises(ValueError, match=r"with states fp32 it must be torch\.float32"):
        other.load_state_dict(optimizer.state_dict())


def test_a_rule_that_nothing_in_the_model_would_have_is_refused():
    for rule in (lb.optim.Muon(), lb.optim.RMSProp()):
        with pytest.raises(ValueError, match=rf"^{rule.name} is a rule of linear .* to Dense\(\) with"):
            lb.Optimizer(network(), rule)
        model = lb.convert_(network(), lb.methods.Dense(), keep=["2"])
        optimizer = lb.Optimizer(model, rule)
        learn(model, optimizer, 1)
        states = {name: set(optimizer.state[p]) for name, p in model.named_parameters()}
        assert states["0.weight"] != states["2.weight"] == states["0.bias"], "the head has AdamW's"
    with pytest.raises(ValueError, match=r"^linear_lr_ratio 0\.5 is of linear layers, .* to Dense\(\) with"):
        lb.Optimizer(network(), lb.optim.AdamW(linear_lr_ratio=0.5))


@pytest.mark.parametrize("rule", [lb.optim.AdamW(lr=5e-2), lb.optim.Muon(lr=5e-2)], ids=str)
def test_what_was_frozen_or_is_not_the_models_may_be_added_later(rule):
    model, outside = lb.convert_(network(), lb.methods.DQT()), nn.Parameter(torch.zeros(4))
    model[0].requires_grad_(False)
    optimizer = lb.Optimizer(model, rule)
    model[0].requires_grad_(True)
    added = [*model[0].parameters(), outside]
    optimizer.add_param_group({"params": added})
    codes = model[0].weight.packed.tensor.codes.clone()
    for p in added:
        p.grad = torch.ones(p.shape)
    optimizer.step()
    assert outside.detach().abs().min() > 0 and not torch.equal(model[0].weight.packed.tensor.codes, codes)
    slots = {slot.name for slot in rule.of(is_linear=True).slots}
    assert slots <= optimizer.state[model[0].weight].keys()


def test_ordinary_parameters_must_be_float32():
    model = lb.convert_(network(), lb.methods.DQT()).to(torch.bfloat16)
    with pytest.raises(ValueError, match=r"0\.bias is torch\.bfloat16"):
        lb.Optimizer(model, lb.optim.AdamW())


def test_the_public_names_are_there():
    assert lb.__version__
    for name in lb.__all__:
        assert getattr(lb, name) is not None, name
    assert (Path(lb.__file__).parent / "py.typed").exists()
    with pytest.raises(AttributeError):
        _ = lb.nothing
    assert issubclass(type(lb.convert_(network(), lb.methods.Dense())[0]), Linear)
    assert isinstance(lb.methods.DQT().quantize(torch.zeros(2, 256)), PackedTensor)

"""Layers that multiply integers: of which methods, and that they give what the method's own layers do."""

from dataclasses import replace

import pytest
import torch
from hf_folders import write

from lowbit_dist.grid import GRIDS
from lowbit_dist.inference import IntegerLinear
from lowbit_dist.methods import DQT, METHODS, TBT, BitNet, Dense, Flip, Tequila, TriLM
from lowbit_dist.model import low_bit_names, of_hf_config
from lowbit_dist.ops import cpu
from lowbit_dist.packed import PackedTensor
from lowbit_dist.trained import of_folder

needs_compiler = pytest.mark.skipif(not cpu.available(), reason="there is no C compiler")

TAKE_INTEGERS = {
    **{f"dqt {grid}": DQT(grid=grid) for grid in GRIDS},
    "dqt, rows, sub-norms": DQT(grid="int3", granularity="row", sub_norms=True),
    "dqt, groups": DQT(granularity="group", group=64),
    "dqt, ternary forward": DQT(grid="int8", forward="ternary"),
    "flip": Flip(),
    "bitnet": BitNet(),
    "tequila": Tequila(activation_bits=8),
    "tbt": TBT(),
    "tbt binary, released": TBT(weights="binary", rules="released"),
}
KEEP_WEIGHTS = {
    "dense": Dense(),
    "dqt, float activations": DQT(activation_bits=None),
    "trilm": TriLM(),
    "tbt, elastic": TBT(activation_bits=2),
    "tequila": Tequila(),
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """`trained(method, precision)`: a model of random weights, as if that had trained it."""
    llama = write(tmp_path_factory.mktemp("model") / "llama", "llama")

    def get(method, precision="fp32", folder=llama):
        source = of_folder(folder)

        built = of_hf_config(source.hf_config, method, torch.float32)
        shapes = {name: tuple(parameter.shape) for name, parameter in built.named_parameters()}
        low_bit = low_bit_names(built, method)

        def read(name):
            if name not in source.names:
                return method.initial(name, shapes[name])
            weight = source.tensor(name)
            return method.quantize(weight) if name in low_bit else weight

        return replace(source, method=method, read=read, names=sorted(shapes), precision=precision)

    return get


def layers(network):
    return {name: module for name, module in network.named_modules() if isinstance(module, IntegerLinear)}


@needs_compiler
@pytest.mark.parametrize(("precision", "error"), [("fp32", 2e-6), ("bf16", 2e-2)])
@pytest.mark.parametrize("name", TAKE_INTEGERS)
def test_each_layer_gives_what_the_methods_own_layer_does(name, precision, error, trained):
    model = trained(TAKE_INTEGERS[name], precision)
    dense, integer = model.network(), model.network(integer=True)
    assert len(layers(integer)) == 14
    for place, layer in layers(integer).items():
        own = dense.get_submodule(place)
        x = torch.randn(3, 5, own.in_features, dtype=own.weight.dtype)
        expected, y = own(x), layer(x)
        assert (y.shape, y.dtype) == (expected.shape, expected.dtype)
        assert (y - expected).abs().max() <= error * expected.abs().max(), place
        assert expected.abs().max() > 0.1, "the case must give numbers"


@needs_compiler
@pytest.mark.parametrize("name", TAKE_INTEGERS)
def test_the_models_distributions_are_those_of_its_training(name, trained):
    model, ids = trained(TAKE_INTEGERS[name]), torch.arange(64).view(1, -1) * 7 % 512
    with torch.inference_mode():
        expected, found = (
            model.network(integer=i)(input_ids=ids).logits.log_softmax(-1) for i in (False, True)
        )
    kl = (expected.exp() * (expected - found)).sum(-1)
    # A sum that is rounded otherwise may round an input of the next layer to another of its 255 integers.
    assert kl.mean() < 2e-4 and not torch.equal(expected, found)


@needs_compiler
@pytest.mark.parametrize("name", ["dqt ternary", "bitnet"])
def test_no_weight_is_alive_but_its_codes(name, trained):
    network = trained(TAKE_INTEGERS[name]).network(integer=True)
    for layer in layers(network).values():
        t = layer.weight.packed.tensor
        assert layer.weight.untyped_storage().nbytes() == 4
        assert (t.codes.nbytes + t.scale.nbytes) / t.numel < 0.26


@pytest.mark.parametrize("name", KEEP_WEIGHTS)
def test_layers_whose_inputs_are_not_rounded_keep_their_weights(name, trained):
    model = trained(KEEP_WEIGHTS[name])
    network, ids = model.network(integer=True), torch.arange(16).view(1, -1)
    assert not layers(network)
    with torch.inference_mode():
        assert torch.equal(network(input_ids=ids).logits, model.network()(input_ids=ids).logits)


def test_without_a_compiler_weights_are_decoded(trained, monkeypatch):
    monkeypatch.setattr(cpu, "available", lambda: False)
    assert not layers(trained(TAKE_INTEGERS["bitnet"]).network(integer=True))


@needs_compiler
def test_a_sum_of_planes_is_decoded(trained):
    model = trained(TAKE_INTEGERS["dqt ternary"])

    def doubled(name):
        tensor = model.read(name)
        if not isinstance(tensor, PackedTensor):
            return tensor
        codes, scale = (torch.cat([part, part.flip(0)]) for part in (tensor.codes, tensor.scale))
        return replace(tensor, codes=codes, scale=scale, planes=2)

    both, ids = replace(model, read=doubled), torch.arange(16).view(1, -1)
    networks = [both.network(), both.network(packed=True), both.network(integer=True), model.network()]
    assert not layers(networks[2])
    with torch.inference_mode():
        dense, packed, integer, single = (network(input_ids=ids).logits for network in networks)
    assert torch.equal(dense, packed) and torch.equal(dense, integer) and not torch.equal(dense, single)


@needs_compiler
def test_weights_go_through_another_grid_first(trained):
    for name in ("dqt int8", "bitnet"):
        model = trained(TAKE_INTEGERS[name])
        dense = model.network(forward=GRIDS["int4"])
        made = layers(model.network(integer=True, forward=GRIDS["int4"]))
        assert len(made) == 14
        for place, layer in made.items():
            t = layer.weight.packed.tensor
            assert t.grid == GRIDS["int4"]
            assert torch.equal(t.dequantize(torch.float32), dense.get_submodule(place).weight)


def test_every_method_is_in_one_of_the_lists():
    assert set(METHODS) == {method.name for method in (*TAKE_INTEGERS.values(), *KEEP_WEIGHTS.values())}


@needs_compiler
def test_experts_multiply_the_tokens_that_they_have(tmp_path, trained):
    """One token goes to one of four experts: the others have none."""
    model = trained(DQT(), folder=write(tmp_path / "mixtral", "mixtral"))
    dense, integer = model.network(), model.network(integer=True)
    assert len(layers(integer)) == 2 * (4 + 4 * 3)
    with torch.inference_mode():
        expected, found = (network(input_ids=torch.tensor([[5]])).logits for network in (dense, integer))
    assert (expected - found).abs().max() <= 0.05 * expected.abs().max()

"""Exports: what other software reads in the files is the model, and what is not is never published."""

import json
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from importlib import import_module

import hf_tokenizers
import numpy as np
import pytest
import torch
import transformers
from hf_folders import SIZES
from safetensors import safe_open

from lowbit_dist import model, tokenizer
from lowbit_dist.config import ConfigError
from lowbit_dist.export import (
    FORMATS,
    compressed,
    export,
    finished,
    ggml,
    gguf_names,
    gguf_tokenizer,
    hf,
    hf_bitnet,
    huggingface,
    proof,
)
from lowbit_dist.methods import DQT, TBT, BitNet, Dense, Tequila, TriLM
from lowbit_dist.packed import PackedTensor
from lowbit_dist.quantize.ptqtp import PTQTP
from lowbit_dist.trained import of_folder

ALL = ("hf", "hf-bitnet", "compressed-tensors", "gguf")
NOT_BITNET = ("hf", "compressed-tensors", "gguf")
FOLDERS = NOT_BITNET[:2]

# Name -> the method, what of the model is changed, and the formats that hold it.
MODELS = {
    "ternary": (DQT(), {}, ALL),
    "ternary, SubLN, tied": (DQT(sub_norms=True), {"tie_word_embeddings": True}, ALL),
    "ternary in groups": (DQT(granularity="group", group=64, activation_bits=None), {}, NOT_BITNET),
    "groups as long as some rows": (DQT(granularity="group", group=256), {}, NOT_BITNET[1:]),
    "ternary forward": (DQT(grid="int8", forward="ternary"), {"precision": "bf16"}, ALL),
    "all tensors": (DQT(tensors="all"), {}, ALL),
    "int2 in rows": (DQT(grid="int2", granularity="row", sub_norms=True), {}, FOLDERS),
    "int3 in groups": (DQT(grid="int3", granularity="group"), {}, NOT_BITNET),
    "int3": (DQT(grid="int3", activation_bits=None), {}, NOT_BITNET),
    "int4, tied": (DQT(grid="int4"), {"tie_word_embeddings": True}, NOT_BITNET),
    "int8 in rows": (DQT(grid="int8", granularity="row"), {"precision": "bf16"}, NOT_BITNET),
    "bitnet": (BitNet(), {"precision": "bf16"}, ALL[:3]),
    "bitnet without SubLN": (BitNet(sub_norms=False), {}, ALL),
    "trilm": (TriLM(), {}, ALL),
    "trilm in slices": (TriLM(slices=2), {}, NOT_BITNET),
    "tequila": (Tequila(reactivation=0.5), {}, NOT_BITNET),
    "tbt, binary": (TBT(weights="binary"), {}, FOLDERS),
    "dense": (Dense(), {}, ("hf", "gguf")),
}
FIRST = {"ternary", "ternary, SubLN, tied", "int3", "tequila"}  # the others are slow


@pytest.fixture(scope="module")
def trained(tmp_path_factory, corpus):
    """`trained("int3")`: the model of MODELS of random weights, with gains of norms that are not 1."""
    folder = tmp_path_factory.mktemp("trained")

    def made(name, method=None, config=transformers.LlamaConfig, **changed):
        own, of_model, _ = MODELS[name]
        method, of_model = own if method is None else method, {**of_model, **changed}
        precision = of_model.pop("precision", "fp32")
        torch.manual_seed(0)
        built = transformers.AutoModelForCausalLM.from_config(config(**{**SIZES, **of_model}))
        for key, parameter in built.named_parameters():
            if parameter.dim() == 1:
                torch.nn.init.normal_(parameter, 0.0 if key.endswith("bias") else 1.0, 0.2)
        path = folder / "model"
        shutil.rmtree(path, ignore_errors=True)
        built.save_pretrained(path)
        for file in (corpus.parent / "tokenizer").iterdir():
            shutil.copy(file, path)
        source = of_folder(path)
        weights = {key: source.tensor(key) for key in source.names}
        ours = model.of_hf_config(source.hf_config, method, torch.float32)
        codes = set(model.low_bit_names(ours, method))
        for key, parameter in ours.named_parameters():
            if key not in weights:
                weights[key] = method.initial(key, tuple(parameter.shape)) * (1 + 0.2 * torch.randn(1))
        read = {key: method.quantize(weight) if key in codes else weight for key, weight in weights.items()}
        return replace(
            source, method=method, precision=precision, names=sorted(weights), read=read.__getitem__
        )

    return made


def needs(format):
    for package in import_module(FORMATS[format]).READER:
        pytest.importorskip(package, reason=f"{format} is read back with {package}")


def cases():
    return [
        pytest.param(name, format, marks=[] if name in FIRST else [pytest.mark.slow])
        for name, (_, _, formats) in MODELS.items()
        for format in formats
    ]


@pytest.mark.parametrize(("name", "format"), cases())
def test_what_stock_software_reads_is_the_model(name, format, trained, tmp_path):
    needs(format)
    source, out = trained(name), tmp_path / "out"
    written = export(source, format, out)
    proved, leaving = written["proof"], finished.of(source)
    n_low_bit = len(leaving.layouts)
    if format == "hf-bitnet":
        assert proved["weights"] + proved["within_one_ulp"] == len(leaving.names)
        assert proved["within_one_ulp"] <= n_low_bit and proved["rounds_inputs"]
    else:
        assert proved["weights"] == len(leaving.names) and proved["narrowed"] == 0
        assert proved["rounds_inputs"] == (written["type"] == "weights-and-inputs")
    assert proved["positions"] == 64 and proved["texts"] == len(proof.TEXTS)
    if not proved["rounds_inputs"]:
        halved = format == "gguf" and isinstance(source.method, TriLM | Tequila)  # their scales
        assert proved["kl"] < (1e-5 if halved else 1e-10) and proved["top1"] == 1
    assert n_low_bit == (0 if name == "dense" else 14)
    if format == "gguf":
        assert sorted(path.name for path in out.iterdir()) == ["README.md", "out.gguf"]
        return
    if format != "hf":
        assert_size(leaving, out)
    sub_norms = getattr(source.method, "sub_norms", False)
    kind = "BitNetForCausalLM" if sub_norms else "LlamaForCausalLM"
    assert json.loads((out / "config.json").read_text())["architectures"] == [kind]


def assert_size(leaving, out):
    """Of codes at the format's bits and scales at 4 bytes, other numbers as they are in the file, and 1 %."""
    stored = sum(
        layout.numel * layout.grid.bits // 8 + 4 * max(layout.shape[0], layout.numel // layout.scale_every)
        for layout in leaving.layouts.values()
    )
    others = sum(
        huggingface.narrowest(leaving.numbers(name)).nbytes
        for name in leaving.names
        if name not in leaving.layouts
    )
    size = (out / "model.safetensors").stat().st_size
    with safe_open(out / "model.safetensors", "pt") as opened:
        names = 160 * len(opened.keys())  # the header of a file of little tensors
    assert size <= 1.01 * (stored + others) + names


def test_a_type_that_is_asked_for_is_written(trained, tmp_path):
    needs("compressed-tensors")
    source = trained("ternary")
    weights = export(source, "compressed-tensors", tmp_path / "a", kind="weights")
    both = export(source, "compressed-tensors", tmp_path / "b", kind="weights-and-inputs")
    assert not weights["proof"]["rounds_inputs"] and both["proof"]["rounds_inputs"]
    assert weights["proof"]["kl"] < 1e-10 and both["proof"]["kl"] < 1e-10, "inputs are rounded by its rule"
    assert weights["proof"]["kl_as_trained"] > 1e-8, "the model rounds inputs, which this type does not"


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_codes_are_packed_as_compressed_tensors_packs_them(bits):
    pytest.importorskip("compressed_tensors", reason="the peer")
    from compressed_tensors.compressors import pack_to_int32, unpack_from_int32

    low = -(2 ** (bits - 1))
    levels = torch.randint(low, -low, (5, 77), dtype=torch.int8, generator=torch.Generator().manual_seed(0))
    ours = compressed.pack(levels, bits)
    assert torch.equal(ours, pack_to_int32(levels, bits))
    assert torch.equal(unpack_from_int32(ours, bits, levels.shape), levels)


def test_ternary_levels_are_packed_as_transformers_packs_them():
    from transformers.integrations.bitnet import pack_weights

    levels = torch.randint(-1, 2, (12, 5), generator=torch.Generator().manual_seed(0))
    assert torch.equal(hf_bitnet.pack(levels.to(torch.int8)), pack_weights(levels.clone()))


@pytest.mark.parametrize(
    "method", [BitNet(), TriLM(), TriLM(slices=4), TBT(), TBT(weights="binary")], ids=str
)
def test_what_leaves_of_a_latent_weight_is_what_the_forward_pass_multiplies_with(method):
    torch.manual_seed(0)
    weight = torch.randn(8, 256) * 0.05
    layer = method.linear(torch.nn.Linear(256, 8), name="q_proj", is_head=False, norm_eps=1e-5)
    ((name, left),) = method.finished("a.weight", weight).items()
    assert name == "a.weight" and isinstance(left, PackedTensor)
    seen = layer.view.forward(weight)[0]
    assert torch.equal(left.dequantize(torch.float32), seen)


# ------------------------------------------------------------------ mistakes


def inverted(monkeypatch, corpus):
    monkeypatch.setattr(hf_bitnet, "reciprocal", torch.clone)


def doubled(monkeypatch, corpus):
    right = compressed.rows_of_scales
    monkeypatch.setattr(compressed, "rows_of_scales", lambda tensor: 2 * right(tensor))


def requantised(monkeypatch, corpus):
    """By mean magnitude, as converters do that take what is written for a latent weight."""
    right = huggingface.narrowest

    def again(weight):
        return BitNet().finished("", weight)[""].dequantize(torch.float32) if weight.dim() > 1 else weight

    monkeypatch.setattr(huggingface, "narrowest", lambda weight: right(again(weight)))


def permuted(monkeypatch, corpus):
    """Rows of queries and keys in the order that GGUF has for its rotary embedding."""
    right = finished.Finished.numbers

    def rotated(self, name):
        weight = right(self, name)
        if not name.endswith(("q_proj.weight", "k_proj.weight")):
            return weight
        return weight.view(-1, 2, 32, weight.shape[1]).transpose(1, 2).reshape(weight.shape)

    right_write = hf.write

    def write(model, path, kind):
        with monkeypatch.context() as patch:
            patch.setattr(finished.Finished, "numbers", rotated)
            right_write(model, path, kind)

    monkeypatch.setattr(hf, "write", write)


def padded(monkeypatch, corpus):
    """Ten codes of 3 bits to a word, as compressed-tensors had them before 0.18."""

    def pack(levels, bits):
        codes = torch.nn.functional.pad(levels.long() + 4, (0, -levels.shape[1] % 10))
        codes = codes.view(len(levels), -1, 10)
        return (codes << 3 * torch.arange(10)).sum(-1).to(torch.int32)

    monkeypatch.setattr(compressed, "pack", pack)


def with_dummy_prefix(monkeypatch, corpus):
    right = hf.write

    def write(model, path, kind):
        right(model, path, kind)
        content = json.loads((path / "tokenizer_config.json").read_text())
        (path / "tokenizer_config.json").write_text(json.dumps(content | {"add_prefix_space": True}))

    monkeypatch.setattr(hf, "write", write)


def without_bias(monkeypatch, corpus):
    """A mistake not of the format but of what leaves: the weights that are read back are those written."""
    right = Tequila.finished
    monkeypatch.setattr(
        Tequila, "finished", lambda self, name, weight: {name: right(self, name, weight)[name]}
    )


def truncated(monkeypatch, corpus):
    right = hf.write

    def write(model, path, kind):
        right(model, path, kind)
        content = (path / "model.safetensors").read_bytes()
        (path / "model.safetensors").write_bytes(content[:-100])

    monkeypatch.setattr(hf, "write", write)


def forgotten(monkeypatch, corpus):
    right = huggingface._tensors
    monkeypatch.setattr(
        huggingface, "_tensors", lambda *a: (pair for pair in right(*a) if "norm" not in pair[0])
    )


def doubled_blocks(monkeypatch, corpus):
    right = ggml.Type.pack
    monkeypatch.setattr(ggml.Type, "pack", lambda self, levels, d: right(self, levels, 2 * d))


def requantised_blocks(monkeypatch, corpus):
    """As converters make them of numbers, with a scale of each block's largest."""
    from gguf import GGMLQuantizationType, quants

    def pack(self, levels, d):
        numbers = levels * d.astype(np.float32).repeat(self.elements, 1)
        return quants.quantize(numbers, GGMLQuantizationType[self.name])

    monkeypatch.setattr(ggml.Type, "pack", pack)


def not_permuted(monkeypatch, corpus):
    monkeypatch.setattr(gguf_names, "interleaved", lambda rows, n_heads: rows)


def with_space_prefix(monkeypatch, corpus):
    right = gguf_tokenizer.metadata
    prefix = {"tokenizer.ggml.add_space_prefix": True}
    monkeypatch.setattr(gguf_tokenizer, "metadata", lambda *a: right(*a) | prefix)


MISTAKES = {
    "inverted scale": (inverted, "ternary", "hf-bitnet", "elements differ"),
    "doubled scale": (doubled, "int3", "compressed-tensors", "elements differ"),
    "requantised": (requantised, "ternary in groups", "hf", "elements differ"),
    "permuted heads": (permuted, "ternary", "hf", r"[kq]_proj.weight is not the model's"),
    "padded packing of 3 bits": (
        padded,
        "int3",
        "compressed-tensors",
        "cannot be read back",
    ),
    "dummy prefix": (with_dummy_prefix, "ternary", "hf", "other ids"),
    "doubled scale of blocks": (doubled_blocks, "ternary in groups", "gguf", "elements differ"),
    "requantised blocks": (requantised_blocks, "int4, tied", "gguf", "elements differ"),
    "heads not permuted": (not_permuted, "int3", "gguf", r"[kq]_proj.weight is not the model's"),
    "space before a text": (with_space_prefix, "int3", "gguf", "other ids"),
    "a bias left out": (without_bias, "tequila", "hf", "logits of 64 positions"),
    "half a file": (truncated, "ternary", "hf", "cannot be read back"),
    "norms left out": (forgotten, "ternary", "hf", "missing keys"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_planted_mistake_is_found_and_leaves_nothing(mistake, trained, tmp_path, monkeypatch, corpus):
    plant, name, format, words = MISTAKES[mistake]
    needs(format)
    source = trained(name)
    plant(monkeypatch, corpus)
    with pytest.raises(proof.ProofFailed, match=words) as failure:
        export(source, format, tmp_path / "out")
    assert "\n" not in str(failure.value)
    assert not list(tmp_path.iterdir())


# ------------------------------------------------------------------ wrong use


REFUSED = {
    "no such format": ("ternary", {}, "ggfu", {}, "--format ('ggfu') must be one of"),
    "no such type": ("ternary", {}, "compressed-tensors", {"kind": "weight"}, "did you mean 'weights'"),
    "no types": ("ternary", {}, "hf", {"kind": "F16"}, "--type ('F16') must be left out"),
    "no such type of GGUF": ("ternary", {}, "gguf", {"kind": "q4_0"}, "did you mean 'Q4_0'?"),
    "not ternary": ("int4, tied", {}, "hf-bitnet", {}, "the grid int4; write --format compressed-tensors"),
    "several scales": ("ternary in groups", {}, "hf-bitnet", {}, "one for each 64 weights"),
    "rows that are no multiple": (
        "ternary", {"num_attention_heads": 2, "head_dim": 127, "num_key_value_heads": 1}, "hf-bitnet", {},
        "packs four rows into one, and model.layers.0.self_attn.q_proj.weight has 254"),
    "rows that are no whole blocks": (
        "ternary", {"hidden_size": 320, "intermediate_size": 640, "num_attention_heads": 5,
                    "num_key_value_heads": 5},
        "gguf", {"kind": "TQ1_0"}, "its rows of 640 are no whole blocks of 256; write --type Q2_0, Q4_0"),
    "norms and a head": ("int2 in rows", {}, "gguf", {}, "train with model.tie_embeddings: true"),
    "groups shorter than a block": (
        "ternary in groups", {}, "gguf", {"kind": "TQ2_0"}, "a scale for 64 weights, a block one for 256"),
    "levels that a block has not": (
        "int8 in rows", {}, "gguf", {"kind": "Q4_0"}, "levels are -128 to 127, those of a block -8 to 7"),
    "not low-bit": ("dense", {}, "compressed-tensors", {}, "quantise it first, with lowbit quantize"),
    "norms of another architecture": (
        "ternary, SubLN, tied", {"config": transformers.Qwen2Config}, "hf", {},
        "transformers has no Qwen2ForCausalLM with norms"),
    "biases of another architecture": (
        "tequila", {"config": transformers.Qwen2Config}, "hf", {}, "no name for model.layers.0.mlp"),
    "inputs of 2 bits": (
        "tbt, binary", {"method": TBT(activation_bits=2)}, "hf", {}, "Elastic(bits=2, centred=True)"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_a_format_cannot_hold_is_refused_in_one_line(case, trained, tmp_path):
    name, changed, format, options, words = REFUSED[case]
    if format in FORMATS:
        needs(format)
    with pytest.raises(ConfigError) as error:
        export(trained(name, **changed), format, tmp_path / "out", **options)
    assert words in str(error.value) and len(str(error.value)) < 400
    assert not list(tmp_path.iterdir())


def test_a_model_without_linear_layers_is_plain_or_nothing(tmp_path, corpus):
    needs("compressed-tensors")
    config = transformers.GPT2Config(
        vocab_size=512, n_embd=64, n_layer=2, n_head=4, n_positions=48, bos_token_id=1, eos_token_id=2
    )
    transformers.GPT2LMHeadModel(config).save_pretrained(tmp_path / "model")
    for file in (corpus.parent / "tokenizer").iterdir():
        shutil.copy(file, tmp_path / "model")
    source = of_folder(tmp_path / "model")
    with pytest.raises(ConfigError, match="has no linear layers"):
        export(source, "compressed-tensors", tmp_path / "out")
    proved = export(source, "hf", tmp_path / "out")["proof"]
    assert proved["positions"] == 48 and proved["kl"] < 1e-10


@pytest.fixture
def planes(trained):
    """`planes(2, tied=False)`: a model of random weights, quantised after its training."""

    def made(n, tied):
        source, by = trained("dense"), PTQTP(planes=n, tied=tied)
        tensors = {name: source.read(name) for name in source.names}
        tensors |= {name: by.layer(tensors[name], None) for name in finished.of(source).linears}
        return replace(source, method=by.method, read=tensors.__getitem__)

    return made


def test_a_sum_of_planes_leaves_as_numbers(planes, tmp_path):
    source = planes(2, tied=False)
    proved = export(source, "hf", tmp_path / "hf")["proof"]
    assert proved["weights"] == len(source.names) and proved["kl"] < 1e-10
    for format, words in {
        "compressed-tensors": r"is of 2 planes; quantise with lowbit quantize --tied",
        "gguf": r"sum of 2 planes.*--tied.*--type F32",
    }.items():
        needs(format)
        with pytest.raises(ConfigError, match=words):
            export(source, format, tmp_path / "out")


@pytest.mark.parametrize(("n", "kind"), [(2, "Q4_0"), (3, "Q8_0")])
def test_planes_whose_scales_are_tied_leave_as_one_grid(n, kind, planes, tmp_path):
    source = planes(n, tied=True)
    for format in ("compressed-tensors", "gguf"):
        needs(format)
        written = export(source, format, tmp_path / format)
        assert written["type"] == {"gguf": kind}.get(format, "weights")
        assert written["proof"]["weights"] == len(source.names) and written["proof"]["kl"] < 1e-9


def test_a_reader_that_is_not_installed_is_named(trained, tmp_path, monkeypatch):
    monkeypatch.setattr(hf, "READER", ("no_such_reader",))
    with pytest.raises(ConfigError, match=r"no_such_reader, .* install lowbit-dist\[export\]"):
        export(trained("ternary"), "hf", tmp_path / "out")


def test_an_export_is_replaced_by_force_and_nothing_else_is(trained, tmp_path, monkeypatch):
    source, out = trained("ternary"), tmp_path / "out"
    (tmp_path / "file").write_text("x")
    with pytest.raises(ConfigError, match="is a file"):
        export(source, "hf", tmp_path / "file", force=True)
    out.mkdir()
    (out / "README.md").write_text("mine")
    with pytest.raises(ConfigError, match="is not empty and holds no export"):
        export(source, "hf", out, force=True)
    (out / "README.md").unlink()
    export(source, "hf", out)
    (out / "left").write_text("x")
    with pytest.raises(ConfigError, match="holds an export; write --force"):
        export(source, "hf", out)
    with monkeypatch.context() as patch:
        truncated(patch, None)
        with pytest.raises(proof.ProofFailed):
            export(source, "hf", out, force=True)
    assert (out / "left").exists(), "what was there stays where the new one fails"
    export(source, "hf", out, force=True)
    assert not (out / "left").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "out"]


def test_an_export_never_takes_its_models_place(trained, tmp_path):
    export(trained("ternary"), "hf", tmp_path / "out")
    source = of_folder(tmp_path / "out")
    there = sorted(path.name for path in source.path.iterdir())
    (tmp_path / "link").symlink_to("out")
    for out in (source.path, source.path / "inside", tmp_path / "link", tmp_path):
        with pytest.raises(ConfigError, match="must be another folder than the model's"):
            export(source, "hf", out, force=True)
    assert sorted(path.name for path in source.path.iterdir()) == there


@pytest.mark.parametrize(
    ("name", "words"),
    [("n" * 300, "File name too long"), (os.fsdecode(b"\xff"), "must be a name in UTF-8")],
)
def test_names_that_no_folder_can_have_are_refused(name, words, trained, tmp_path):
    with pytest.raises(ConfigError, match=words):
        export(trained("ternary"), "hf", tmp_path / name)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["dense", "ternary"])
def test_numbers_that_are_none_are_refused(name, trained, tmp_path):
    source = trained(name)

    def read(name):
        tensor = source.tensor(name)
        if name != "model.layers.0.mlp.up_proj.weight":
            return tensor
        if isinstance(tensor, PackedTensor):
            return replace(tensor, scale=tensor.scale * torch.nan)
        return tensor * torch.inf

    with pytest.raises(ConfigError, match="has numbers that are not finite"):
        export(replace(source, read=read), "hf", tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_too_little_disk_is_said_before_anything_is_written(trained, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda place: shutil._ntuple_diskusage(2000, 1000, 1000))
    with pytest.raises(ConfigError, match=r"needs .* MB, but .* has 1 kB free"):
        export(trained("ternary"), "hf", tmp_path / "a" / "out")
    assert not list(tmp_path.iterdir())


def test_large_models_are_written_in_several_files(trained, tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface, "SHARD_BYTES", 10**6)
    proved = export(trained("int8 in rows"), "hf", tmp_path / "out")["proof"]
    files = sorted(path.name for path in (tmp_path / "out").glob("*.safetensors"))
    assert len(files) > 1 and files[0] == f"model-00001-of-{len(files):05}.safetensors"
    assert proved["kl"] < 1e-10


@pytest.mark.parametrize("kind", ["llama3", "qwen"])
def test_a_huggingface_tokenizer_goes_with_its_model(kind, trained, tmp_path):
    words = tokenizer.load(hf_tokenizers.write(tmp_path / "words", kind))
    source = replace(trained("ternary"), open_tokenizer=lambda: words)
    export(source, "hf", tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["eos_token_id"] == words.eos_id != 2
    assert config["bos_token_id"] == (1 if words.bos_id is None else words.bos_id)
    assert f"begins with the token {words.bos_id}," in (tmp_path / "out" / "README.md").read_text() or (
        words.bos_id is None
    )


# ------------------------------------------------------------------ the command line


def test_the_command_line_exports_a_run(few_steps, lowbit, tmp_path, monkeypatch):
    summary = few_steps()
    out = tmp_path / "out"
    command = ("export", summary["checkpoint"], "--format", "hf", "--out", out)
    done = lowbit(*command, "--json")
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    assert (answer["step"], answer["format"], answer["type"]) == (4, "hf", "dense")
    assert answer["proof"]["kl"] < 1e-10
    card = (out / "README.md").read_text()
    for part in (summary["digest"], f"{summary['val_loss']:.4f}", "step 4", "Memory in training", "saved"):
        assert part in card
    assert 'from_pretrained("out")' in card
    again = lowbit(*command)
    assert again.returncode == 2 and again.stderr.count("\n") == 1 and "--force" in again.stderr
    done = lowbit(*command, "--force")
    assert done.returncode == 0 and "equal bit for bit" in done.stdout, done.stderr
    truncated(monkeypatch, None)
    failed = lowbit(*command[:-1], tmp_path / "other")
    assert failed.returncode == 1 and failed.stderr.count("\n") == 1, failed.stderr
    assert "cannot be read back" in failed.stderr and not (tmp_path / "other").exists()


def test_a_gguf_file_has_its_model_card_within(few_steps, lowbit, tmp_path):
    needs("gguf")
    from lowbit_dist.export.gguf_file import Contents

    command = ("export", few_steps()["checkpoint"], "--format", "gguf", "--out")
    refused = lowbit(*command, tmp_path / "model.gguf")
    assert refused.returncode == 2 and "must be a folder" in refused.stderr
    assert not list(tmp_path.iterdir())
    done = lowbit(*command, tmp_path / "model")
    assert done.returncode == 0, done.stderr
    card = (tmp_path / "model" / "README.md").read_text()
    assert "-m model.gguf" in card and few_steps()["digest"] in card
    contents = Contents(tmp_path / "model" / "model.gguf")
    assert contents.metadata["lowbit.card"].rstrip(" ") == card


KILLED = """
import os, signal, sys
from lowbit_dist import export, trained
from lowbit_dist.export import proof
proof.prove = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
export.export(trained.open(sys.argv[1]), "hf", sys.argv[2])
"""


@pytest.mark.slow
def test_what_a_killed_export_has_written_is_no_export(few_steps, lowbit, tmp_path):
    checkpoint, out = few_steps()["checkpoint"], tmp_path / "out"
    killed = subprocess.run([sys.executable, "-c", KILLED, checkpoint, out], capture_output=True, text=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert [path.name for path in tmp_path.iterdir()] == [".out.partial"]
    assert list((tmp_path / ".out.partial").iterdir()), "it must have been killed in the middle"
    done = lowbit("export", checkpoint, "--format", "hf", "--out", out)
    assert done.returncode == 0, done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_what_is_no_model_or_damaged_is_refused_in_one_line(few_steps, lowbit, tmp_path):
    checkpoint = shutil.copytree(few_steps()["checkpoint"], tmp_path / "step-4")
    shard = next(checkpoint.glob("*.safetensors"))
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    (tmp_path / "no-model").mkdir()
    for path, words in ((checkpoint, "is damaged"), (tmp_path / "no-model", "nor a Hugging Face model's")):
        done = lowbit("export", path, "--format", "hf", "--out", tmp_path / "out")
        assert done.returncode == 2 and done.stderr.count("\n") == 1 and words in done.stderr, done.stderr
    assert not (tmp_path / "out").exists()

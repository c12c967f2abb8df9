"""GGUF: weights are level x scale bit for bit by the public reader, and stock llama.cpp gives our logits and
ids.
"""

import json
import random
import unicodedata
from dataclasses import replace
from functools import partial
from pathlib import Path

import hf_tokenizers
import llamacpp
import numpy as np
import pytest
import torch
import transformers
from cases import slow, standing
from sentencepiece import sentencepiece_model_pb2
from test_hf_tokenizer import strings

from lowbit_dist import tokenizer
from lowbit_dist.errors import ConfigError
from lowbit_dist.grid import GRIDS
from lowbit_dist.methods import DQT, Dense, Tequila
from lowbit_dist.packed import PackedTensor, representable
from lowbit_dist.tokenizer import Tokenizer
from lowbit_dist.trained import Samples, Trained

gguf = pytest.importorskip("gguf", reason="gguf is not installed; it is of the extra `export`")

from lowbit_dist.export import finished, gguf_file, gguf_tokenizer, proof  # noqa: E402
from lowbit_dist.export import gguf as exporting  # noqa: E402  # after it is known to be there
from lowbit_dist.export.ggml import TYPES  # noqa: E402

SIZES = {
    "vocab_size": 512, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2,
    "num_attention_heads": 8, "num_key_value_heads": 4, "max_position_embeddings": 128, "use_cache": False,
}  # fmt: skip
GRID = {
    "TQ1_0": "ternary", "TQ2_0": "ternary", "Q2_0": "ternary", "Q2_K": "int2", "Q3_K": "int3", "Q4_0": "int4",
    "Q8_0": "int8", "F16": "ternary", "BF16": "int8", "F32": "int3",
}  # fmt: skip
BLOCKS = [name for name, of in TYPES.items() if of.levels is not None]
LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@pytest.fixture(scope="module")
def llama():
    """The folder of stock llama.cpp's libraries."""
    found = llamacpp.folder()
    return found if isinstance(found, Path) else pytest.skip(found)


@pytest.fixture(scope="module")
def words(corpus):
    """A sentencepiece tokenizer of 512 pieces that was trained here, in its folder."""
    return corpus.parent / "tokenizer"


@pytest.fixture(scope="module")
def trained(words):
    """`trained("int4", tied=True, ...)`: a model of random levels, and of scales that float16 holds."""

    def made(grid="ternary", *, scale_of="tensor", tied=False, seed=0, method=None, **changes):
        method = DQT(grid=grid, activation_bits=None) if method is None else method
        config = transformers.LlamaConfig(**{**SIZES, **changes}, tie_word_embeddings=tied)
        built = transformers.LlamaForCausalLM(config)
        generator = torch.Generator().manual_seed(seed)

        def normal(shape, mean=0.0, std=1.0):
            return torch.empty(shape).normal_(mean, std, generator=generator)

        tensors = {}
        for name, parameter in built.named_parameters():
            shape = tuple(parameter.shape)
            is_linear = name.split(".")[-2] in LINEARS
            if len(shape) == 1:
                tensors[name] = normal(shape, 1.0, 0.2)
            elif is_linear and grid is not None:
                tensors[name] = packed(shape, grid, scale_of, generator)
            elif is_linear:
                tensors[name] = normal(shape, std=0.5 * shape[1] ** -0.5)
            elif "embed" in name:  # which the layers add to
                tensors[name] = normal(shape, std=0.1 if tied else 1)
            else:  # so that some tokens are likelier than others
                tensors[name] = 0.05 * normal(shape) * (0.6 * normal((shape[0], 1))).exp()
        for name in [name for name in tensors if name.endswith(("o_proj.weight", "down_proj.weight"))]:
            if getattr(method, "sub_norms", False):
                tensors[name.replace("weight", "norm.weight")] = normal((tensors[name].shape[1],), 1.0, 0.2)
        return Trained(
            path=Path("a-model"),
            step=None,
            hf_config=config,
            method=method,
            precision="fp32",
            names=sorted(tensors),
            read=tensors.__getitem__,
            open_tokenizer=lambda: tokenizer.load(words),
            samples=Samples(seq_len=64),
        )

    return made


def named(names, *first):
    """`first` of them in every pass, the others as slow ones."""
    return standing({name: name for name in names}, *first)


def packed(shape, grid, scale_of, generator):
    """Random levels, of which each occurs, and scales that make products half as large as inputs."""
    rows, length = shape
    of = GRIDS[grid]
    every = {"tensor": rows * length, "row": length}.get(scale_of, scale_of)
    normal = torch.empty(shape).normal_(generator=generator)
    levels = (normal * of.n_levels / 4).round().clamp(of.low, of.high)
    size = 0.5 / (levels.std() * length**0.5)
    scale = size * torch.empty(rows * length // every).uniform_(0.5, 2, generator=generator)
    exact = representable(scale)
    return PackedTensor.quantize(levels * exact.repeat_interleave(every).view(shape), exact, of)


def numbers(model, name):
    """level x scale, one after the other."""
    tensor = model.tensor(name)
    if not isinstance(tensor, PackedTensor):
        return tensor
    return tensor.levels().float() * tensor.scale.repeat_interleave(tensor.scale_every).view(tensor.shape)


def written(model, path, kind):
    assert exporting.check(model, kind) == kind
    exporting.write(model, path, kind)
    return exporting.read_back(path)


def differing(model, read):
    """Names of the tensors that are not the model's, bit for bit."""
    return [
        name
        for name in model.names
        if (of := read.weight(name)) is not None and not torch.equal(of, numbers(model, name))
    ]


def compared(ours, theirs):
    """Mean KL in nats, and the share of positions with the same likeliest token."""
    theirs = torch.as_tensor(theirs)
    return proof.divergence(ours, theirs), proof.agreement(ours, theirs)


def ids_of(model, n=64):
    text = Path(json.__file__).read_text()
    return [1, *model.tokenizer.encode(text)][:n]


def logits(model, ids):
    return finished.logits(model.network(), ids)


def test_types_are_those_of_the_public_package():
    for of in TYPES.values():
        file_type = f"MOSTLY_{of.name}" + ("_S" if of.name == "Q3_K" else "")
        if of.name != "Q2_0":  # which it does not know
            assert gguf.GGMLQuantizationType[of.name] == of.id
            assert gguf.GGML_QUANT_SIZES[of.id] == (of.elements, of.bytes)
            assert gguf.LlamaFileType["ALL_F32" if of.name == "F32" else file_type] == of.file_type


@pytest.mark.parametrize("kind", BLOCKS)
def test_blocks_decode_to_level_times_scale(kind):
    of, draw = TYPES[kind], np.random.default_rng(0)
    levels = draw.integers(of.levels[0], of.levels[1] + 1, (5, 1024)).astype(np.int8)
    assert set(levels.flat) == set(range(of.levels[0], of.levels[1] + 1)), "the case must have every level"
    d = draw.uniform(1e-4, 2, (5, 1024 // of.elements)).astype(np.float16)
    blocks = of.pack(levels, d)
    expected = levels.astype(np.float32) * d.astype(np.float32).repeat(of.elements, 1)
    decode = of_q2_0 if kind == "Q2_0" else lambda data: gguf.quants.dequantize(data, of.id)
    assert np.array_equal(decode(blocks), expected)


def of_q2_0(data):
    """As dequantize_row_q2_0 in llama.cpp's ggml-quants.c, which the package lacks, step by step."""
    rows = []
    for row in data:
        y = []
        for i in range(len(row) // 18):
            block = row[18 * i : 18 * i + 18].tobytes()
            d = np.frombuffer(block[:2], np.float16).astype(np.float32)[0]
            for j in range(64):
                q = (block[2 + j // 4] >> 2 * (j % 4)) & 3
                y.append(np.float32(q - 1) * d)
        rows.append(y)
    return np.array(rows, np.float32)


@pytest.mark.parametrize("kind", ["TQ1_0", "TQ2_0"])
def test_blocks_are_the_bytes_of_the_package_where_it_rounds_nothing(kind):
    draw = np.random.default_rng(0)
    levels = draw.integers(-1, 2, (3, 512)).astype(np.int8)
    d = np.full((3, 2), 0.25, np.float16)
    theirs = gguf.quants.quantize(levels * np.float32(0.25), gguf.GGMLQuantizationType[kind])
    assert np.array_equal(TYPES[kind].pack(levels, d), theirs)


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("scale_of", ["row", *slow(("tensor",))])
def test_every_weight_of_a_file_is_level_times_scale(kind, scale_of, trained, tmp_path):
    if kind == "BF16" and scale_of == "row":
        pytest.skip("scales are no bfloat16, and several have no other place")
    model = trained(GRID[kind], scale_of=scale_of)
    read = written(model, tmp_path / "a.gguf", kind)
    stored = independent(tmp_path / "a.gguf")
    rounded = ["lm_head.weight", "model.embed_tokens.weight"] if kind in ("F16", "BF16") else []
    assert [name for name in model.names if read.weight(name) is None] == rounded
    for name in set(model.names) - set(rounded):
        assert np.array_equal(stored(name), numbers(model, name).numpy()), name
        assert torch.equal(read.weight(name), numbers(model, name)), name


def independent(path):
    """`f(name)`: a tensor by the public package and llama.cpp's own converter's order of rows, undone."""
    tensors = {of.name: of for of in gguf_file._reader(path).tensors}  # the package's own, told of Q2_0
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, SIZES["num_hidden_layers"])

    def value(name):
        of = tensors[names.get_name(name, try_suffixes=(".weight", ".bias"))]
        decode = (
            of_q2_0
            if of.tensor_type == TYPES["Q2_0"].id
            else partial(gguf.quants.dequantize, qtype=of.tensor_type)
        )
        values = decode(of.data).copy()
        if (scale := f"{of.name.removesuffix('weight')}scale") in tensors:
            values = values * tensors[scale].data
        heads = {"q_proj": 8, "k_proj": 4}.get(name.split(".")[-2])
        if heads is None:
            return values
        order = np.arange(len(values))  # conversion/llama.py: permute
        order = order.reshape(heads, 2, len(order) // heads // 2).swapaxes(1, 2).reshape(-1)
        return values[np.argsort(order)]

    return value


@pytest.mark.parametrize(
    ("grid", "group", "kind"), [("ternary", 64, "Q2_0"), ("ternary", 128, "Q2_0"), ("int4", 64, "Q4_0")]
)
def test_groups_have_scales_of_their_own(grid, group, kind, trained, tmp_path):
    model = trained(grid, scale_of=group)
    assert exporting.check(model, None) == kind
    assert not differing(model, written(model, tmp_path / "a.gguf", kind))


@pytest.mark.parametrize("kind", named([kind for kind in TYPES if kind != "F32"], "TQ2_0", "Q3_K", "F16"))
def test_a_scale_that_is_no_float16_stands_apart(kind, trained, tmp_path):
    model = with_scales(trained(GRID[kind]), lambda scale: scale * (1 + 2**-15))
    path = tmp_path / "a.gguf"
    assert not differing(model, written(model, path, kind))
    scale = gguf_file.Contents(path).values("blk.1.attn_k.scale")
    assert scale == model.tensor("model.layers.1.self_attn.k_proj.weight").scale.numpy()


def with_scales(model, changed):
    """The same levels with other scales."""

    def read(name):
        tensor = model.read(name)
        return replace(tensor, scale=changed(tensor.scale)) if isinstance(tensor, PackedTensor) else tensor

    return replace(model, read=read)


@pytest.mark.parametrize("kind", BLOCKS)
def test_a_file_is_no_larger_than_its_types_bits(kind, trained, tmp_path):
    model = trained(GRID[kind], num_hidden_layers=4)
    written(model, tmp_path / "a.gguf", kind)
    low_bit = [of.numel for name in model.names if isinstance(of := model.tensor(name), PackedTensor)]
    others = [of for name in model.names if not isinstance(of := model.tensor(name), PackedTensor)]
    bits = {"TQ1_0": 1.6875, "TQ2_0": 2.0625, "Q2_0": 2.25, "Q2_K": 2.625, "Q3_K": 3.4375, "Q4_0": 4.5}
    exact = sum(low_bit) * bits.get(kind, 8.5) / 8 + sum(4 * of.numel() for of in others)
    vocabulary = sum(len(json.dumps(of)) + 16 for of in tokens(model))  # and a length, a score, a kind
    size = (tmp_path / "a.gguf").stat().st_size
    assert exact < size <= 1.01 * exact + vocabulary + exporting.CARD_BYTES
    assert size <= exporting.size(model, kind) <= 1.1 * size


def tokens(model):
    return gguf_tokenizer.metadata(model.tokenizer, 512)["tokenizer.ggml.tokens"]


SHAPES = {
    "llama": {},
    "tied": {"tied": True},
    "wide heads": {"head_dim": 64},
    "scaled positions": {
        "rope_scaling": {
            "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32,
        }
    },
    "biases": {"attention_bias": True, "mlp_bias": True},
    "sub-norms": {"tied": True, "method": DQT(grid="ternary", activation_bits=None, sub_norms=True)},
}  # fmt: skip


@pytest.mark.parametrize("shape", named(SHAPES, "llama", "sub-norms"))
def test_llama_cpp_gives_our_logits_in_float32(shape, llama, trained, tmp_path):
    model = trained(**SHAPES[shape])
    read, ids = written(model, tmp_path / "a.gguf", "F32"), ids_of(model)
    ours = logits(model, ids)
    theirs = llamacpp.run(llama, tmp_path / "a.gguf", ids=ids)["logits"]
    assert ours.std(0).mean() > 0.2, "the case must have logits that differ"
    assert compared(ours, theirs)[0] <= 1e-9
    assert compared(ours, read.logits(ids))[0] <= 1e-9
    half_cache = llamacpp.run(llama, tmp_path / "a.gguf", ids=ids, f16=True)["logits"]
    assert compared(ours, half_cache)[0] > compared(ours, theirs)[0], "the case must tell such differences"


@pytest.mark.parametrize("kind", named([kind for kind in TYPES if kind != "F32"], "TQ2_0", "Q3_K", "Q4_0"))
def test_llama_cpp_gives_our_logits_to_rounded_inputs(kind, llama, trained, tmp_path):
    model = with_scales(trained(GRID[kind]), lambda scale: scale * (1 + 2**-15))
    written(model, tmp_path / "a.gguf", kind)
    ids = ids_of(model)
    ours, theirs = logits(model, ids), llamacpp.run(llama, tmp_path / "a.gguf", ids=ids)["logits"]
    kl, top1 = compared(ours, theirs)
    assert kl <= 5e-4 and top1 >= 0.95, (kl, top1)


@pytest.mark.parametrize("kind", ["TQ2_0", *slow(("TQ1_0",), ("Q2_0",))])
def test_llama_cpp_runs_sub_norms_and_low_bit_embeddings(kind, llama, trained, tmp_path):
    model = trained(**SHAPES["sub-norms"])
    embedding = packed((512, 256), "ternary", "row", torch.Generator().manual_seed(1))
    embedding = replace(embedding, scale=representable(embedding.scale * 0.5))
    everything = {
        **{name: model.tensor(name) for name in model.names},
        "model.embed_tokens.weight": embedding,
    }
    model = replace(model, read=everything.__getitem__)
    read = written(model, tmp_path / "a.gguf", kind)
    assert read.architecture == "bitnet" and not differing(model, read)
    ids = ids_of(model)
    kl, top1 = compared(logits(model, ids), llamacpp.run(llama, tmp_path / "a.gguf", ids=ids)["logits"])
    assert kl <= 5e-4 and top1 >= 0.95, (kl, top1)


PLANTED = {
    "inverted scale": lambda model, _: with_scales(model, lambda scale: 1 / scale),
    "doubled scale": lambda model, _: with_scales(model, lambda scale: 2 * scale),
    "requantised": lambda model, _: requantised(model),
}


@pytest.mark.parametrize("mistake", PLANTED)
def test_reading_back_shows_planted_mistakes_in_weights(mistake, trained, tmp_path):
    model = trained("int4")
    wrong = PLANTED[mistake](model, tmp_path)
    exporting.write(wrong, tmp_path / "a.gguf", "Q4_0")
    linears = [name for name in model.names if isinstance(model.tensor(name), PackedTensor)]
    assert differing(model, exporting.read_back(tmp_path / "a.gguf")) == linears


def requantised(model):
    """As converters make Q4_0 of numbers: with a scale of each block's largest."""
    q4_0 = gguf.GGMLQuantizationType.Q4_0

    def read(name):
        tensor = model.read(name)
        if not isinstance(tensor, PackedTensor):
            return tensor
        values = tensor.dequantize(torch.float32).numpy()
        again = gguf.quants.dequantize(gguf.quants.quantize(values, q4_0), q4_0)
        return PackedTensor.quantize(torch.from_numpy(again), tensor.scale, tensor.grid)

    return replace(model, read=read)


def test_reading_back_and_llama_cpp_show_heads_in_the_wrong_order(llama, trained, tmp_path, monkeypatch):
    model, path = trained(), tmp_path / "a.gguf"
    monkeypatch.setattr(exporting.gguf_names, "interleaved", lambda rows, n_heads: rows)
    exporting.write(model, path, "F32")
    monkeypatch.undo()
    ids = ids_of(model)
    read = exporting.read_back(path)
    assert {name.split(".")[-2] for name in differing(model, read)} == {"q_proj", "k_proj"}
    ours = logits(model, ids)
    assert compared(ours, read.logits(ids))[0] > 1e-3
    assert compared(ours, llamacpp.run(llama, path, ids=ids)["logits"])[0] > 1e-3


REFUSED = {
    "levels": (
        {"grid": "int4"}, "Q3_K", "its levels are -8 to 7, those of a block -4 to 3; write --type Q4_0, Q8_0"
    ),
    "groups": (
        {"scale_of": 128}, "TQ2_0", "a scale for 128 weights, a block one for 256; write --type Q2_0, Q4_0"
    ),
    "rows": (
        {"hidden_size": 320, "intermediate_size": 640, "num_attention_heads": 5, "num_key_value_heads": 5},
        "TQ1_0", "its rows of 640 are no whole blocks of 256; write --type Q2_0, Q4_0, Q8_0",
    ),
    "products": (
        {"grid": "int8", "scale_of": "row"}, "F16", "or their products with its levels; write --type Q8_0 or"
    ),
    "no low bits": (
        {"grid": None, "method": Dense()}, "Q8_0", "is in full precision; write --type F16 or F32, or give"
    ),
    "untied sub-norms": (
        {"method": DQT(sub_norms=True)}, "TQ2_0", "its embedding as its head; train with model.tie_embeddings"
    ),
    "activation": ({"hidden_act": "gelu"}, "F32", "its activation is gelu"),
    "long positions": (
        {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "F32", "are scaled as dynamic"
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_a_type_cannot_hold_is_refused_in_one_line(case, trained):
    how, kind, why = REFUSED[case]
    with pytest.raises(ConfigError) as refused:
        exporting.check(trained(**how), kind)
    assert why in str(refused.value) and "\n" not in str(refused.value)


def test_other_architectures_and_parameters_are_refused_by_name(trained):
    model = trained()
    other = replace(model, hf_config=transformers.Qwen2Config(**SIZES))
    with pytest.raises(ConfigError, match="it is a qwen2, neither llama nor mistral"):
        exporting.check(other, None)
    extra = "model.layers.0.mlp.up_proj.activation.alpha"
    with pytest.raises(ConfigError, match=f"GGUF has no name for {extra}"):
        exporting.check(replace(model, names=[*model.names, extra]), None)


@pytest.mark.parametrize(
    ("grid", "own"),
    [
        ("ternary", "TQ2_0"),
        ("int2", "Q2_K"),
        ("int3", "Q3_K"),
        ("int4", "Q4_0"),
        ("int8", "Q8_0"),
        (None, "F32"),
    ],
)
def test_a_models_own_type_is_the_smallest_that_holds_it(grid, own, trained):
    model = trained(grid, method=Dense() if grid is None else None)
    assert exporting.check(model, None) == own
    if grid is None:
        halved = replace(model, read=lambda name: model.read(name).bfloat16().float())
        assert exporting.check(halved, None) == "BF16"


def test_only_narrower_floats_that_are_asked_for_round(trained, tmp_path):
    model = trained(None, method=Dense())
    read = written(model, tmp_path / "a.gguf", "F16")
    matrices = [name for name in model.names if model.tensor(name).dim() > 1]
    assert [name for name in model.names if read.weight(name) is None] == matrices
    assert not differing(model, read)
    assert compared(logits(model, ids_of(model)), read.logits(ids_of(model)))[0] < 1e-6


def test_a_ternary_layer_with_the_bias_of_its_dead_zone(trained, tmp_path):
    method = Tequila(group=256, reactivation=0.05)
    latent = trained(None, method=method)
    linears = [name for name in latent.names if name.split(".")[-2] in LINEARS]
    left = {name: latent.tensor(name) for name in latent.names if name not in linears}
    for name in linears:
        left |= method.finished(name, latent.tensor(name))
    model = with_scales(replace(latent, names=sorted(left), read=left.__getitem__), representable)
    read = written(model, tmp_path / "a.gguf", "TQ2_0")
    assert not differing(model, read)
    bias = "model.layers.0.self_attn.q_proj.bias"
    assert left[bias].abs().max() > 0 and torch.equal(read.weight(bias), left[bias])


def test_a_model_card_is_put_into_a_written_file(trained, tmp_path):
    model, path = trained(), tmp_path / "a.gguf"
    read = written(model, path, "TQ2_0")
    before = path.stat().st_size
    exporting.note(path, "# naïve\n")
    contents = gguf_file.Contents(path)
    assert contents.metadata["lowbit.card"].rstrip(" ") == "# naïve\n"
    assert path.stat().st_size == before and not differing(model, read)
    with pytest.raises(ValueError, match="has room for 8,192 bytes"):
        exporting.note(path, "x" * 9000)


def of_json(folder, change=lambda content: None, **config):
    """A `tokenizer.json` without a sentencepiece model beside it, changed."""
    files = {name: (folder / name).read_bytes() for name in ("tokenizer.json", "tokenizer_config.json")}
    content = json.loads(files["tokenizer.json"])
    change(content)
    settings = {**json.loads(files["tokenizer_config.json"]), **config}
    files = {
        "tokenizer.json": json.dumps(content).encode(),
        "tokenizer_config.json": json.dumps(settings).encode(),
    }
    return tokenizer.of_files(files, folder)


def with_prefix(content):
    """As Llama 2 has it; the same without a prefix is a meta space that is never put before a text."""
    assert content["normalizer"] is None and content["pre_tokenizer"]["prepend_scheme"] == "never"
    prefix = {"type": "Prepend", "prepend": "▁"}
    content["normalizer"] = {"type": "Sequence", "normalizers": [prefix, spelled(" ")]}
    content["pre_tokenizer"] = None


def without_prefix(content):
    content["normalizer"], content["pre_tokenizer"] = spelled(" "), None


def spelled(space):
    return {"type": "Replace", "pattern": {"String": space}, "content": "▁"}


def ignoring_merges(content):
    content["model"]["ignore_merges"] = True


def of_words_alone(content):
    """As GPT-2 has it."""
    content["pre_tokenizer"] = content["pre_tokenizer"]["pretokenizers"][1]


QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)


def split_by(pattern):
    return lambda content: content["pre_tokenizer"]["pretokenizers"][0]["pattern"].update(Regex=pattern)


@pytest.fixture(scope="module")
def tokenizers(words, tmp_path_factory):
    """`tokenizers(kind)`: one of each kind that llama.cpp has."""
    root = tmp_path_factory.mktemp("kinds")

    def folder(kind):
        return root / kind if (root / kind).exists() else hf_tokenizers.write(root / kind, kind)

    plain = {"tokenizer_class": "PreTrainedTokenizerFast", "split_special_tokens": False}
    made = {
        "sentencepiece": lambda: tokenizer.load(words),
        "dummy prefix": lambda: Tokenizer(changed(words, add_dummy_prefix=True)),
        "scores": lambda: of_json(words, **plain),
        "scores, replaced": lambda: of_json(words, without_prefix, **plain),
        "scores, prefix": lambda: of_json(words, with_prefix, **plain),
        "llama-bpe": lambda: of_json(folder("llama3"), ignoring_merges),
        "dbrx": lambda: of_json(folder("llama3")),
        "nfc": lambda: of_json(folder("qwen")),
        "qwen2": lambda: of_json(folder("qwen"), split_by(QWEN2)),
        "gpt-2": lambda: of_json(folder("smollm"), of_words_alone),
        "smollm": lambda: of_json(folder("smollm")),
    }
    return lambda kind: made[kind]()


def changed(words, **settings):
    """The sentencepiece model with another normalizer."""
    proto = sentencepiece_model_pb2.ModelProto.FromString((words / "tokenizer.model").read_bytes())
    for name, value in settings.items():
        setattr(proto.normalizer_spec, name, value)
    return proto.SerializeToString()


TOKENIZERS = (
    "sentencepiece", "dummy prefix", "scores", "scores, replaced", "scores, prefix", "llama-bpe", "dbrx",
    "nfc", "qwen2", "gpt-2", "smollm",
)  # fmt: skip


@pytest.mark.parametrize("kind", named(TOKENIZERS, "sentencepiece", "llama-bpe", "nfc"))
def test_the_same_text_has_the_same_ids(kind, llama, tokenizers, trained, tmp_path):
    own = tokenizers(kind)
    model = replace(trained(), open_tokenizer=lambda: own)
    read = written(model, tmp_path / "a.gguf", "TQ2_0")
    texts = [Path(random.__file__).read_text()[:20_000], *strings(1500)]
    marked = ("<s>", "</s>", "<unk>", "<|", "<0x")  # special tokens, which llama.cpp can take for text
    texts = [unicodedata.normalize("NFC", text) for text in texts if not any(mark in text for mark in marked)]
    theirs = llamacpp.run(llama, tmp_path / "a.gguf", texts=texts)["texts"]
    for text, ids in zip(texts, theirs, strict=True):
        assert own.encode(text) == read.encode(text) == ids, repr(text)


def test_reading_back_shows_a_dummy_prefix(trained, tokenizers, tmp_path):
    model = trained()
    wrong = replace(model, open_tokenizer=lambda: tokenizers("dummy prefix"))
    read = written(wrong, tmp_path / "a.gguf", "TQ2_0")
    assert read.encode("x = 1") != model.tokenizer.encode("x = 1")


UNREADABLE = {
    "sentencepiece that strips": (
        lambda words, _: Tokenizer(changed(words, remove_extra_whitespaces=True)),
        "changes characters or spaces",
    ),
    "unigram": (lambda _, kinds: tokenizer.load(kinds("unigram")), "is a Unigram model"),
    "merges out of order": (lambda _, kinds: tokenizer.load(kinds("llama2")), "does not merge"),
    "words": (lambda _, kinds: of_json(kinds("llama3"), split_by("\\w+")), "cuts words as \\w+"),
}  # fmt: skip


@pytest.mark.parametrize("case", UNREADABLE)
def test_tokenizers_that_llama_cpp_reads_differently_are_refused(case, words, tmp_path):
    make, why = UNREADABLE[case]
    own = make(words, lambda kind: hf_tokenizers.write(tmp_path / kind, kind))
    with pytest.raises(ConfigError) as refused:
        gguf_tokenizer.metadata(own, 512)
    assert why in str(refused.value)


def test_tokens_fit_the_models_rows(words):
    own = tokenizer.load(words)
    wide, narrow = (gguf_tokenizer.metadata(own, rows) for rows in (520, 500))
    assert wide["tokenizer.ggml.tokens"][511:513] == [wide["tokenizer.ggml.tokens"][511], "[PAD512]"]
    assert wide["tokenizer.ggml.token_type"][512] == gguf_tokenizer.UNUSED
    assert len(narrow["tokenizer.ggml.tokens"]) == len(narrow["tokenizer.ggml.scores"]) == 500


MARKS = {"sentencepiece": (1, 2, True), "nfc": (0, 0, False), "smollm": (0, 0, True), "dbrx": (0, 1, True)}


@pytest.mark.parametrize("kind", MARKS)
def test_marks_are_the_models_own(kind, tokenizers):
    entries = gguf_tokenizer.metadata(tokenizers(kind), 512)
    names = ("bos_token_id", "eos_token_id", "add_bos_token")
    assert tuple(entries[f"tokenizer.ggml.{name}"] for name in names) == MARKS[kind]
    assert not entries["tokenizer.ggml.add_eos_token"]

"""A trained model, of a run or a Hugging Face folder: its weights, ids and logits are those of its maker."""

import json
import shutil
import sys
from dataclasses import replace

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import lowbit_dist
from lowbit_dist import tokenizer
from lowbit_dist.checkpoint import Checkpoint
from lowbit_dist.config import ConfigError
from lowbit_dist.convert import PackedLinear
from lowbit_dist.grid import GRIDS
from lowbit_dist.methods import DQT, Dense
from lowbit_dist.packed import PackedTensor
from lowbit_dist.trained import Trained, of_checkpoint, of_folder

TEXT = "import os\n\n\ndef main():\n    return [os.getcwd(), 42]\n"

RUNS = {
    "int3": {"method": {"name": "dqt", "grid": "int3"}},
    "groups": {"method": {"name": "dqt", "granularity": "group", "group": 64, "sub_norms": True}},
    "tied": {"method": {"name": "dqt", "grid": "int8"}, "model": {"tie_embeddings": True}},
    "all, tied": {"method": {"name": "dqt", "tensors": "all"}, "model": {"tie_embeddings": True}},
    "all": {"method": {"name": "dqt", "grid": "int4", "tensors": "all", "granularity": "row"}},
    "bf16": {"method": {"name": "dqt", "grid": "int2"}, "precision": "bf16"},
}

SIZES = {
    "vocab_size": 512, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128,
    "bos_token_id": 1, "eos_token_id": 2, "initializer_range": 0.2,
}  # fmt: skip

MODELS = {
    "untied": transformers.LlamaConfig(**SIZES),
    "tied": transformers.LlamaConfig(**SIZES, tie_word_embeddings=True),
    "biases": transformers.Qwen2Config(**SIZES),
    "no linear layers in its blocks": transformers.GPT2Config(
        vocab_size=512, n_embd=64, n_layer=2, n_head=4, n_positions=128, bos_token_id=1, eos_token_id=2
    ),
}


@pytest.fixture(scope="module")
def run(few_steps):
    """name -> the trained model of a few steps with each of RUNS."""
    return lambda name: of_checkpoint(Checkpoint.open(few_steps(**RUNS[name])["checkpoint"]))


@pytest.fixture
def folder(tmp_path, corpus):
    """`folder("tied")`: a Hugging Face folder, with random weights and the corpus's tokenizer."""

    def written(name, dtype=torch.float32, **saving):
        torch.manual_seed(0)
        built = transformers.AutoModelForCausalLM.from_config(MODELS[name])
        with torch.no_grad():
            for parameter_name, parameter in built.named_parameters():
                if parameter_name.endswith("bias"):
                    parameter.normal_(0, 0.2)  # which transformers begins with zeros
        built.to(dtype).save_pretrained(tmp_path / "model", **saving)
        for file in (corpus.parent / "tokenizer").iterdir():
            shutil.copy(file, tmp_path / "model")
        return tmp_path / "model"

    return written


def logits(network, trained):
    ids = torch.tensor([[1, *trained.tokenizer.encode(TEXT)]])
    with torch.inference_mode():
        return network(input_ids=ids).logits


@pytest.mark.parametrize("name", RUNS)
def test_packed_layers_give_the_logits_of_decoded_ones_to_the_bit(name, run):
    trained = run(name)
    dense, packed = trained.network(), trained.network(packed=True)
    layers = [layer for layer in packed.modules() if isinstance(layer, PackedLinear)]
    assert len(layers) == 14 + (name == "all"), "all linear layers of two blocks, and an untied head"
    assert all(layer.weight.untyped_storage().nbytes() <= 4 for layer in layers)
    assert torch.equal(logits(packed, trained), logits(dense, trained))
    assert dense.dtype == packed.dtype == (torch.bfloat16 if name == "bf16" else torch.float32)


@pytest.mark.parametrize("name", ["groups", "all, tied"])
def test_packed_layers_follow_their_weights_through_another_grid(name, run):
    trained = run(name)
    dense, packed = (trained.network(packed=p, forward=GRIDS["int4"]) for p in (False, True))
    assert torch.equal(logits(packed, trained), logits(dense, trained))
    assert not torch.equal(logits(packed, trained), logits(trained.network(), trained))


def test_tied_embeddings_are_one_parameter(run):
    network = run("tied").network()
    assert network.lm_head.weight is network.model.embed_tokens.weight
    assert "lm_head.weight" not in run("tied").names


def test_a_run_is_meant_by_its_name_its_folder_and_its_checkpoint(few_steps, corpus, monkeypatch):
    summary = few_steps(**RUNS["int3"])
    checkpoint = Checkpoint.open(summary["checkpoint"])
    run_dir = checkpoint.path.parent.parent
    for where, runs_dir in ((summary["run"], run_dir.parent), (run_dir, "runs"), (checkpoint.path, "runs")):
        trained = lowbit_dist.open(where, runs_dir)
        assert (trained.path, trained.step) == (checkpoint.path, 4)
        assert trained.evaluate(str(corpus))["loss"] == pytest.approx(summary["val_loss"], abs=1e-5)


@pytest.mark.parametrize("name", MODELS)
def test_the_logits_of_a_folder_are_those_of_transformers(name, folder):
    path = folder(name)
    trained = lowbit_dist.open(path)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(path, attn_implementation="sdpa")
    assert trained.method == Dense()
    ours = logits(trained.network(), trained)
    assert (ours - logits(theirs, trained)).abs().max() <= 1e-5 * ours.abs().max()
    parameters = dict(theirs.named_parameters())
    assert trained.names == sorted(parameters)
    assert all(torch.equal(trained.tensor(each), parameters[each]) for each in trained.names)


@pytest.mark.parametrize(("stored", "computed"), [("bfloat16", "bfloat16"), ("float16", "float32")])
def test_a_folder_is_computed_in_a_type_that_holds_its_weights(stored, computed, folder):
    path = folder("untied", getattr(torch, stored), max_shard_size="100KB")
    assert (path / "model.safetensors.index.json").is_file(), "the case must have several files"
    trained = of_folder(path)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=getattr(torch, computed))
    assert torch.equal(logits(trained.network(), trained), logits(theirs, trained))


@pytest.mark.parametrize("name", ["untied", "tied"])
def test_a_folders_linear_layers_go_through_a_grid_and_nothing_else_does(name, folder):
    trained = of_folder(folder(name))
    plain, rounded = trained.network().state_dict(), trained.network(forward=GRIDS["int2"]).state_dict()
    for key, weight in plain.items():
        expected = weight
        if "proj" in key:
            expected = DQT(grid="int2", scale="rms").quantize(weight).dequantize(torch.float32)
        assert torch.equal(rounded[key], expected), key
        assert torch.equal(rounded[key], weight) == ("proj" not in key), key


def test_a_text_has_the_same_ids_and_loss_with_either_kind_of_tokenizer(folder, tmp_path):
    path = folder("untied")
    (tmp_path / "text.py").write_text(TEXT * 20)
    with_sentencepiece = of_folder(path)
    loss = with_sentencepiece.evaluate(str(tmp_path / "text.py"))
    (path / "tokenizer.model").unlink()
    fast = of_folder(path)
    assert type(fast.tokenizer) is not type(with_sentencepiece.tokenizer)
    for text in (TEXT, "", "  two  spaces\t", "naïve 日本語 🎈", "a <s> b </s>"):
        ids = fast.tokenizer.encode(text)
        assert ids == with_sentencepiece.tokenizer.encode(text)
        assert fast.tokenizer.decode([1, *ids, 2]) == text
    assert fast.evaluate(str(tmp_path / "text.py")) == loss
    assert loss["samples"] == -(-loss["tokens"] // 128), "samples as long as the model takes"

    # Without its configuration the marks are the model's.
    for file in ("tokenizer_config.json", "special_tokens_map.json"):
        (path / file).unlink()
    alone = of_folder(path).tokenizer
    assert (alone.bos_id, alone.eos_id, alone.vocab_size) == (1, 2, 512)
    assert alone.encode(TEXT) == with_sentencepiece.tokenizer.encode(TEXT)


def test_a_model_without_marks_gets_none(folder, tmp_path):
    path = folder("untied")
    (path / "tokenizer.model").unlink()
    for file in ("tokenizer_config.json", "special_tokens_map.json"):
        (path / file).unlink()
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"bos_token_id": None, "eos_token_id": None}))
    trained = of_folder(path)
    (tmp_path / "text.py").write_text(TEXT)
    tokens = trained.tokenizer.encode(TEXT)
    assert trained.evaluate(str(tmp_path / "text.py"))["tokens"] == len(tokens)
    assert trained.generate("def ", max_new_tokens=5, temperature=0)["tokens"] == 5
    with pytest.raises(ConfigError, match=r"--prompt \(\) has no tokens"):
        trained.generate("")


def test_a_folder_is_evaluated_on_data_of_its_tokenizer_alone(folder, corpus):
    path = folder("untied")
    assert of_folder(path).evaluate(str(corpus), n_samples=3)["samples"] == 3
    (path / "tokenizer.model").unlink()
    with pytest.raises(ConfigError, match="was prepared with another tokenizer"):
        of_folder(path).evaluate(str(corpus))


@pytest.mark.parametrize("name", ["tied", "no linear layers in its blocks"])
def test_the_likeliest_text_of_a_folder_is_that_of_transformers(name, folder):
    path = folder(name)
    trained = of_folder(path)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(path)
    ids = torch.tensor([[1, *trained.tokenizer.encode("def main")]])
    out = theirs.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False)
    new = out[0, ids.shape[1] :].tolist()
    assert trained.generate("def main", max_new_tokens=8, temperature=0)["text"] == trained.tokenizer.decode(
        new
    )


def test_a_quantised_copy_is_a_trained_model_like_any_other(folder, tmp_path):
    """What post-training quantisation gives: another method, another `read`, and the rest as it was."""
    source, method = of_folder(folder("untied")), DQT(grid="int4", activation_bits=None)

    def read(name):
        weight = source.tensor(name)
        return method.quantize(weight) if "proj" in name else weight

    quantised = replace(source, method=method, read=read)
    assert isinstance(quantised, Trained)
    assert isinstance(quantised.tensor("model.layers.0.mlp.up_proj.weight"), PackedTensor)
    expected = logits(source.network(forward=GRIDS["int4"], scale="absmean"), source)
    assert torch.equal(logits(quantised.network(packed=True), quantised), expected)
    (tmp_path / "text.py").write_text(TEXT)
    assert quantised.evaluate(str(tmp_path / "text.py"))["forward"] == "int4"


def rewritten(path, **changes):
    file = path / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def resaved(path, change):
    weights = load_file(path / "model.safetensors")
    change(weights)
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})


def other_format(path):
    torch.save(load_file(path / "model.safetensors"), path / "pytorch_model.bin")
    (path / "model.safetensors").unlink()


def with_code_of_its_own(path):
    (path / "theirs.py").write_text("raise SystemExit('executed')\n")
    rewritten(
        path, model_type="theirs", auto_map={"AutoConfig": "theirs.C", "AutoModelForCausalLM": "theirs.M"}
    )


UP = "model.layers.1.mlp.up_proj.weight"
BROKEN = {
    "weights in another format": (other_format, ("model has no model.safetensors", "can run code")),
    "a weight of another shape": (
        lambda at: resaved(at, lambda w: w.update({UP: torch.zeros(64, 64)})),
        (UP, "(64, 64)", "(128, 64)", "fit together")),
    "a weight that is missing": (
        lambda at: resaved(at, lambda w: w.pop(UP)), (UP, "none of the folder's safetensors files")),
    "a weight that the model does not have": (
        lambda at: resaved(at, lambda w: w.update(bias=torch.zeros(3))),
        ("bias", "no parameter of the model")),
    "a weight in codes": (
        lambda at: resaved(at, lambda w: w.update({UP: torch.zeros(128, 64, dtype=torch.uint8)})),
        (UP, "of type U8", "not quantised")),
    "a quantised model": (
        lambda at: rewritten(at, quantization_config={"quant_method": "gptq", "bits": 4}),
        ("quantised already", "quantization_config")),
    "damaged weights": (
        lambda at: (at / "model.safetensors").write_bytes(b"x" * 100), ("model.safetensors cannot be read",)),
    "a configuration that is none": (
        lambda at: (at / "config.json").write_text("{"), ("cannot read its config.json",)),
    "an architecture that nobody knows": (
        lambda at: rewritten(at, model_type="nobody"), ("cannot read its config.json", "nobody")),
    "code of its own": (with_code_of_its_own, ("cannot read its config.json",)),
    "no language model": (
        lambda at: rewritten(at, model_type="vit"), ("not a causal language model",)),
    "no configuration": (
        lambda at: (at / "config.json").unlink(), ("neither a run", "nor a Hugging Face model's")),
}  # fmt: skip


@pytest.mark.parametrize("case", BROKEN)
def test_a_folder_that_does_not_fit_is_refused_in_one_line(case, folder):
    break_it, words = BROKEN[case]
    path = folder("untied")
    break_it(path)
    with pytest.raises(ConfigError) as error:
        lowbit_dist.open(path)
    assert "\n" not in str(error.value) and len(str(error.value)) < 500
    for each in words:
        assert each in str(error.value)


TOKENIZERS = {
    "none": (lambda at: [file.unlink() for file in at.glob("tokenizer*")], "has no tokenizer.model"),
    "a damaged one": (
        lambda at: ((at / "tokenizer.model").unlink(), (at / "tokenizer.json").write_text("{}")),
        "tokenizer.json cannot be read"),
    "one of more pieces than the model has": (
        lambda at: (
            tokenizer.train([at / "text.txt"], 600, at / "other"),
            shutil.copy(at / "other/tokenizer.model", at)),
        "a tokenizer of 600 pieces and a model of 512"),
}  # fmt: skip


@pytest.mark.parametrize("case", TOKENIZERS)
def test_a_tokenizer_that_does_not_fit_is_refused_when_it_is_used(case, folder):
    break_it, words = TOKENIZERS[case]
    path = folder("untied")
    (path / "text.txt").write_text((path / "tokenizer.json").read_text())
    break_it(path)
    trained = lowbit_dist.open(path)
    assert trained.network() is not None
    with pytest.raises(ConfigError, match=words):
        trained.generate("def ")


def test_a_tokenizer_of_another_kind_under_the_name_of_sentencepieces_is_passed_over(folder):
    path = folder("untied")
    ids = of_folder(path).tokenizer.encode(TEXT)
    (path / "tokenizer.model").write_text("IQ== 0\nIg== 1\n")
    config = json.loads((path / "tokenizer_config.json").read_text())
    del config["split_special_tokens"]  # which says that the folder is `lowbit tokenizer train`'s
    (path / "tokenizer_config.json").write_text(json.dumps(config))
    assert of_folder(path).tokenizer.encode(TEXT) == ids


def test_tasks_without_the_harness_name_the_extra(folder, lowbit, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.delitem(sys.modules, "lowbit_dist.harness", raising=False)
    monkeypatch.delattr(lowbit_dist, "harness", raising=False)
    done = lowbit("eval", folder("tied"), "--tasks", "piqa")
    assert done.returncode == 2 and "pip install 'lowbit-dist[eval]'" in done.stderr, done.stderr


def test_the_command_line_takes_a_folder(folder, lowbit, tmp_path):
    path = folder("tied")
    (tmp_path / "text.py").write_text(TEXT)
    done = lowbit("eval", path, "--data", tmp_path / "text.py", "--forward", "int4", "--json")
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    assert (answer["checkpoint"], answer["step"], answer["forward"]) == (str(path), None, "int4")
    assert answer["left_out"] == {}
    (tmp_path / "texts").mkdir()
    for name in ("text.py", ".hidden"):
        (tmp_path / "texts" / name).write_text(TEXT)
    done = lowbit("eval", path, "--data", tmp_path / "texts")
    assert "left out hidden names (1)" in " ".join(done.stdout.split()), done.stderr
    done = lowbit("generate", path, "--prompt", "def ", "--max-new-tokens", 3)
    assert done.returncode == 0 and done.stdout.startswith("def "), done.stderr
    (path / "config.json").unlink()
    done = lowbit("generate", path, "--prompt", "def ")
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr

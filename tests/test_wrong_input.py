"""Wrong input, through the command line: one line that names the place, the value and what to write instead.

Each case is one command in a working folder that holds prepared data, a tokenizer, a finished run and a
configuration, with at most one thing in it made wrong.  Nothing is started, and no file is left or changed.
"""

import gzip
import json
import os
import random
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lowbit_dist.machine import processors

CONFIG = """
run: {name: small, dir: runs}
model: {hidden_size: 256, intermediate_size: 512, layers: 2, heads: 4, kv_heads: 2}
method: {name: dqt}
data: {path: data, seq_len: 64}
precision: fp32
train: {steps: 2, batch_tokens: 256, micro_batch: 2, save_every: 1, eval_samples: 4}
cluster: {workers: 1}
tracking: {mlflow: null}
"""
STEP = "runs/small/checkpoints/step-2"
SHARD = "train/shard.00000.mds.zstd"
PREPARE = "data prepare --tokenizer tokenizer --out new --seq-len 64 --input"
LEARN = "tokenizer train --vocab-size 300 --out new --input"


def train(folder, text):
    """One worker's run, with the relative paths of `folder`."""
    import yaml

    from lowbit_dist import configfile
    from lowbit_dist import loop as training

    before = os.getcwd()
    os.chdir(folder)
    try:
        training.run(configfile.from_dict(yaml.safe_load(text)))
    finally:
        os.chdir(before)


@pytest.fixture(scope="module")
def original(corpus, ranks, tmp_path_factory):
    folder = tmp_path_factory.mktemp("original")
    shutil.copytree(corpus, folder / "data")
    shutil.copytree(corpus / "tokenizer", folder / "tokenizer")
    (folder / "run.yaml").write_text(CONFIG)
    (folder / "words.txt").write_text("other words for another tokenizer " * 400)
    ranks(1).run(train, str(folder), CONFIG)
    return folder


@pytest.fixture
def place(original, tmp_path, monkeypatch):
    """A working folder of its own, and a Ray that refuses to start."""
    import ray

    def started(*_, **__):
        raise AssertionError("Ray was started")

    folder = shutil.copytree(original, tmp_path / "place")
    monkeypatch.chdir(folder)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(ray, "init", started)
    return folder


def contents(folder):
    """Every path in the folder; of files also the size and the time of the last change."""
    stats = {path: path.lstat() for path in folder.rglob("*")}
    return {
        path: (stat.st_size, stat.st_mtime_ns) if path.is_file() else None for path, stat in stats.items()
    }


def rewrite(file: Path, **fields) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


def instead(path: str, content: bytes | None):
    """The file with another content; None is a folder in its place."""

    def change(at: Path) -> None:
        file = at / path
        if file.is_dir():
            shutil.rmtree(file)
        file.unlink(missing_ok=True)
        file.mkdir() if content is None else file.write_bytes(content)

    return change


def cut(path: str, size: int):
    return lambda at: os.truncate(at / path, size)


def without(*paths: str):
    def change(at: Path) -> None:
        for path in paths:
            shutil.rmtree(at / path) if (at / path).is_dir() else (at / path).unlink()

    return change


def flipped(path: str):
    """One bit in the middle of the file."""

    def change(at: Path) -> None:
        content = bytearray((at / path).read_bytes())
        content[len(content) // 2] ^= 1
        (at / path).write_bytes(content)

    return change


def looped(path: str):
    """A link to itself: not even root can read it."""

    def change(at: Path) -> None:
        (at / path).unlink(missing_ok=True)
        (at / path).symlink_to(Path(path).name)

    return change


def other_tokenizer(*paths: str):
    def change(at: Path) -> None:
        from lowbit_dist import tokenizer

        tokenizer.train([at / "words.txt"], 275, at / "other")
        for path in paths:
            shutil.copy(at / "other" / "tokenizer.model", at / path)

    return change


def lines(n: int) -> bytes:
    draw = random.Random(0)
    texts = (" ".join(draw.choices(["some", "words", "of", "text"], k=30)) for _ in range(n))
    return "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()


def zipped(name: str, size: int | None = None):
    """A file of JSON lines or a Parquet file under `name`, of which `size` bytes are there."""

    def change(at: Path) -> None:
        content = lines(2000)
        if name.endswith(".gz"):
            content = gzip.compress(content, mtime=0)
        elif name.endswith(".zst"):
            import zstandard

            content = zstandard.compress(content)
        elif name.endswith(".parquet"):
            import pyarrow
            import pyarrow.parquet

            rows = [json.loads(line)["text"] for line in content.splitlines()]
            pyarrow.parquet.write_table(pyarrow.table({"text": rows}), at / name)
            content = (at / name).read_bytes()
        (at / name).write_bytes(content[:size])

    return change


def pretrained(**changed):
    """A folder with a small LLaMA, or with nothing but its config.json."""

    def change(at: Path) -> None:
        import transformers

        sizes = {"vocab_size": 512, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 1}
        sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128}
        config = transformers.LlamaConfig(**(sizes | changed))
        transformers.LlamaForCausalLM(config).save_pretrained(at / "llama")

    return change


def both(*changes):
    return lambda at: [change(at) for change in changes]


NOTHING = None
LLAMA = "train run.yaml run.name=new 'model={pretrained: llama}'"

# case: (what is wrong in the folder, the command, the words of its answer: place, value, rule, advice)
CASES = {
    # configuration values
    "a misspelt field": (
        NOTHING, "train run.yaml train.stesp=5", ("train:", "'stesp'", "did you mean 'steps'")),
    "a misspelt section": (
        NOTHING, "train run.yaml trian.steps=5", ("'trian'", "did you mean 'train'")),
    "a field of another section": (
        NOTHING, "train run.yaml train.seq_len=5", ("train:", "'seq_len'", "'data.seq_len'")),
    "an option of another method": (
        NOTHING, "train run.yaml method.name=dense method.grid=int8",
        ("method:", "'grid'", "belongs to dqt, flip", "leave it out")),
    "no data path": (
        instead("run.yaml", b"train: {steps: 5}\n"), "train run.yaml",
        ("data.path is required", "write data:")),
    "an override without a value": (
        NOTHING, "train run.yaml train.steps", ("override", "'train.steps'", "section.field=value", "write")),
    "an override with a bracket that stays open": (
        NOTHING, "train run.yaml optimizer.betas=[0.9",
        ("optimizer.betas=[0.9", "line 1", "write name: value")),
    "a word for a number": (
        NOTHING, "train run.yaml optimizer.lr=fast", ("optimizer.lr", "'fast'", "must be a number", "write")),
    "a fraction for a whole number": (
        NOTHING, "train run.yaml train.steps=1.5", ("train.steps", "1.5", "whole number", "write")),
    "yes for true": (
        NOTHING, "train run.yaml train.reproducible=yes", ("train.reproducible", "'yes'", "write false")),
    "true for a ZeRO stage": (
        NOTHING, "train run.yaml 'method={name: dense}' zero.stage=true", ("zero.stage", "true", "write")),
    "a negative learning rate": (
        NOTHING, "train run.yaml optimizer.lr=-1e-3", ("optimizer.lr", "-0.001", "at least 0", "write")),
    "a negative seed": (
        NOTHING, "train run.yaml run.seed=-1", ("run.seed", "-1", "at least 0", "write")),
    "a number that is none": (
        NOTHING, "train run.yaml optimizer.lr=.nan", ("optimizer.lr", "nan", "finite", "write")),
    "an infinite number": (
        NOTHING, "train run.yaml train.clip_norm=.inf", ("train.clip_norm", "inf", "finite", "write")),
    "a number that overflows": (
        NOTHING, "train run.yaml optimizer.eps=1e999", ("optimizer.eps", "inf", "finite", "write")),
    "a timeout that is no number": (
        NOTHING, "train run.yaml cluster.hang_timeout=.nan",
        ("cluster.hang_timeout", "nan", "auto", "write")),
    "an unknown choice": (
        NOTHING, "train run.yaml method.grid=int5",
        ("method.grid", "'int5'", "must be one of ternary", "did you")),
    "stages for packed codes": (
        NOTHING, "train run.yaml zero.stage=2", ("zero.stage", "2", "must be left out", "dqt")),
    "reproducible in bf16": (
        NOTHING, "train run.yaml train.reproducible=true precision=bf16",
        ("train.reproducible", "true", "bf16", "write precision: fp32")),
    "eight-bit states that stage 2 cannot have": (
        NOTHING, "train run.yaml 'method={name: dense}' zero.stage=2",
        ("optimizer.states", "int8", "zero.stage 2", "write")),
    # sizes that do not fit together
    "a batch that is no multiple": (
        NOTHING, "train run.yaml train.batch_tokens=300",
        ("train.batch_tokens", "300", "multiple of 128", "nearest is 256")),
    "a batch that two workers cannot share": (
        NOTHING, "train run.yaml cluster.workers=2 train.batch_tokens=128",
        ("train.batch_tokens", "128", "256")),
    "a batch of more than all data": (
        NOTHING, "train run.yaml run.name=new train.batch_tokens=128000000",
        ("train.batch_tokens", "128,000,000", "data has", "write at most")),
    "a sequence that the model does not reach": (
        NOTHING, "train run.yaml model.max_seq_len=32", ("data.seq_len", "64", "max_seq_len 32", "write")),
    "a sequence length that the data does not have": (
        NOTHING, "train run.yaml run.name=new data.seq_len=32",
        ("data.seq_len (32)", "must be 64", "write data.seq_len: 64", "--seq-len 32")),
    "heads that do not divide": (
        NOTHING, "train run.yaml model.heads=3 model.kv_heads=3", ("model.heads", "3", "256", "nearest is")),
    "key heads that do not divide": (
        NOTHING, "train run.yaml model.kv_heads=3", ("model.kv_heads", "3", "heads 4", "nearest is")),
    "a hidden size between blocks": (
        NOTHING, "train run.yaml run.name=new model.hidden_size=328",
        ("model: model.layers.0.self_attn.k_proj.weight [164, 328]", "method dqt", "256",
         "write sizes")),
    "a width that rows of scales do not divide": (
        NOTHING, "train run.yaml run.name=new model.hidden_size=480 method.granularity=row",
        ("model: model.layers.0.", "480]", "cannot be packed", "multiple of 64", "write sizes")),
    "a group that does not divide a row": (
        NOTHING, "train run.yaml run.name=new 'method={granularity: group, group: 192}'",
        ("model: model.layers.0.mlp.down_proj.weight [256, 512]", "a group of 192", "write sizes")),
    "a method that is not installed": (
        NOTHING, "train run.yaml method.name=sherry",
        ("method.name ('sherry')", "must be one of dqt, flip, bitnet, trilm", "install the package")),
    "8-bit floats on CPUs": (
        NOTHING, "train run.yaml run.name=new precision=fp8 cluster.gpus_per_worker=0",
        ("precision (fp8)", "GPUs of compute capability 8.9 or more", "has none; write precision: bf16")),
    "integers of weights that are none": (
        NOTHING, "train run.yaml run.name=new precision.matmul=int8 'method={name: dense}'",
        ("precision.matmul (int8)", "integers, such as dqt, not dense", "write precision.matmul: auto")),
    "integers with a scale for each group": (
        NOTHING, "train run.yaml run.name=new precision.matmul=int8 method.granularity=group",
        ("precision.matmul (int8)", "a scale for a tensor or a row", "write method.granularity: row or")),
    "gradients in integers beside outputs in numbers": (
        NOTHING, "plan run.yaml precision.grad_input=int8",
        ("precision.grad_input (int8)", "precision.matmul int8, not auto", "write precision.matmul: int8")),
    "integers of inputs that are none": (
        NOTHING, "plan run.yaml precision.matmul=int8 method.activation_bits=null",
        ("precision.matmul (int8)", "inputs of 8 bits", "write method.activation_bits: 8 or precision.m")),
    "an end of a weight decay that does not end": (
        NOTHING, "train run.yaml schedule.weight_decay_until=0.667",
        ("schedule.weight_decay_until (0.667)", "go with schedule.name two_stage", "leave it out")),
    "a ternary forward pass of ternary codes": (
        NOTHING, "train run.yaml 'method={grid: ternary, forward: ternary}'",
        ("method.forward (ternary)", "coarser than method.grid ternary", "write method.grid: int8")),
    "norms in a ternary forward pass": (
        NOTHING, "train run.yaml 'method={grid: int8, tensors: all, forward: ternary}'",
        ("method.forward (ternary)", "go with method.tensors linears", "write method.tensors: linears")),
    "a ternary forward pass that begins without being asked for": (
        NOTHING, "train run.yaml 'method={grid: int8, forward_from: 0.5}'",
        ("method.forward_from (0.5)", "go with method.forward ternary", "write method.forward: ternary")),
    "a forward pass that never changes": (
        NOTHING, "train run.yaml 'method={grid: int8, forward: ternary, forward_from: 1.0}'",
        ("method.forward_from (1.0)", "less than 1")),
    "replicated codes that change in the run": (
        NOTHING,
        "train run.yaml zero.residency=replicated 'method={grid: int8, forward: ternary, forward_from: 0.5}'",
        ("zero.residency (replicated)", "must be sharded", "write zero.residency: sharded")),
    "a scale that the released rules do not know": (
        NOTHING, "train run.yaml 'method={rules: released, granularity: row}'",
        ("method.granularity (row)", "must be tensor under method.rules released", "method.rules: paper")),
    "a ternary forward pass under released rules": (
        NOTHING, "train run.yaml 'method={rules: released, grid: int8, forward: ternary}'",
        ("method.forward (ternary)", "must be stored under method.rules released", "method.rules: paper")),
    "rounding of flip": (
        NOTHING, "train run.yaml 'method={name: flip, rounding_anneal: 0.2}'",
        ("method.rounding_anneal (0.2)", "left out for method flip", "leave it out")),
    "a hysteresis below the noise of its residual": (
        NOTHING, "train run.yaml 'method={name: flip, hysteresis: 0.001}'",
        ("method.hysteresis (0.001)", "0 or at least 0.004", "write method.hysteresis: 0.004, or 0")),
    "released rules of flip": (
        NOTHING, "train run.yaml 'method={name: flip, rules: released}'",
        ("method.rules ('released')", "paper")),
    "slices that do not divide the rows": (
        NOTHING, "train run.yaml run.name=new 'method={name: trilm, slices: 5}'",
        ("model: method trilm", "layer model.layers.0.", "5 slices do not divide", "write other sizes")),
    "a group of Tequila that does not divide a row": (
        NOTHING, "train run.yaml run.name=new 'method={name: tequila, group: 448}'",
        ("model: method tequila", "a group of 448 does not divide a row of", "write other sizes")),
    "a learned scale of inputs that are not normalised": (
        NOTHING, "train run.yaml 'method={name: tbt, activation_bits: 2, sub_norms: false}'",
        ("method.sub_norms (false)", "true with activation_bits 2", "write method.sub_norms: true")),
    "an option of another optimizer": (
        NOTHING, "train run.yaml 'optimizer={name: lion, eps: 1e-8}'",
        ("optimizer:", "'eps'", "belongs to adafactor, adamw, rmsprop", "leave it out")),
    "a pretrained model of a smaller vocabulary": (
        pretrained(vocab_size=400), LLAMA, ("model.pretrained (llama)", "400", "512", "prepare the data")),
    "a pretrained model of shorter sequences": (
        pretrained(max_position_embeddings=32), LLAMA, ("data.seq_len (64)", "at most 32", "llama", "write")),
    "a pretrained model that is not there": (
        NOTHING, LLAMA, ("model.pretrained (llama)", "not a Hugging Face model folder", "write")),
    "a pretrained model without a weight": (
        both(pretrained(), lambda at: rewrite(at / "llama/config.json", num_hidden_layers=2)), LLAMA,
        ("model.pretrained", "model.layers.1.", "none of the folder's", "write")),
    "a pretrained model with other shapes": (
        both(pretrained(), lambda at: rewrite(at / "llama/config.json", intermediate_size=768)), LLAMA,
        ("model.pretrained", "(512, 256)", "(768, 256)", "write")),
    "a pretrained model that is cut": (
        both(pretrained(), cut("llama/model.safetensors", 5000)), LLAMA,
        ("llama/model.safetensors cannot be read", "copy it again")),
    # names
    "a run name with a path in it": (
        NOTHING, "train run.yaml run.name=../elsewhere",
        ("run.name", "'../elsewhere'", "letters", "write 'elsewhere'")),
    "an absolute run name": (
        NOTHING, "train run.yaml run.name=/tmp/x", ("run.name", "'/tmp/x'", "letters", "write 'tmp-x'")),
    "a run name with spaces": (
        NOTHING, "train run.yaml 'run.name=my run'", ("run.name", "'my run'", "letters", "write 'my-run'")),
    # the configuration file
    "no configuration file": (
        NOTHING, "train absent.yaml", ("absent.yaml", "does not exist", "write the path")),
    "a folder for a configuration file": (
        NOTHING, "train data", ("data is a folder", "write the path")),
    "a binary configuration file": (
        instead("run.yaml", b"run: {name: \xff}"), "train run.yaml",
        ("run.yaml", "byte 12", "save it as UTF-8")),
    "a cut configuration file": (
        cut("run.yaml", 60), "train run.yaml", ("run.yaml line", "expected", "write name: value")),
    "a configuration file that cannot be read": (
        looped("run.yaml"), "train run.yaml",
        ("run.yaml cannot be read", "symbolic links", "write the path")),
    "a Python object in a configuration file": (
        instead("run.yaml", b"run: !!python/object/apply:os.system [touch stolen]"), "train run.yaml",
        ("run.yaml line 1, column 6", "python/object", "not allowed", "write plain values")),
    # prepared data
    "no data": (
        without("data"), "train run.yaml", ("data.path (data)", "does not exist", "lowbit data prepare")),
    "an empty data folder": (
        both(without("data"), lambda at: (at / "data").mkdir()), "train run.yaml",
        ("data.path (data)", "no manifest.json", "write a folder")),
    "a file for a data folder": (
        instead("data", b"text"), "train run.yaml", ("data.path (data)", "is a file", "write a folder")),
    "an empty manifest": (
        instead("data/manifest.json", b""), "train run.yaml",
        ("data.path (data)", "manifest.json", "is empty", "again")),
    "a cut manifest": (
        cut("data/manifest.json", 100), "train run.yaml",
        ("data.path (data)", "manifest.json", "of 100", "is not JSON", "prepare the data again")),
    "a binary manifest": (
        instead("data/manifest.json", b'{"format": \xff}'), "train run.yaml",
        ("manifest.json", "byte 11 of 13", "is not UTF-8 text", "prepare the data again")),
    "a folder for a manifest": (
        instead("data/manifest.json", None), "train run.yaml",
        ("data.path (data)", "manifest.json cannot be read", "Is a directory", "again")),
    "a manifest that cannot be read": (
        looped("data/manifest.json"), "train run.yaml",
        ("data.path (data)", "manifest.json", "links", "again")),
    "a manifest with a wrong value": (
        lambda at: rewrite(at / "data/manifest.json", vocab_size=-5), "train run.yaml",
        ("data.path (data)", "vocab_size", "-5", "again")),
    "a manifest of a later version": (
        lambda at: rewrite(at / "data/manifest.json", format=2), "train run.yaml",
        ("data.path (data)", "format 2", "reads 1", "prepare it again")),
    "a manifest of another vocabulary": (
        lambda at: rewrite(at / "data/manifest.json", vocab_size=600), "train run.yaml",
        ("data.path (data)", "vocab_size 600", "512 pieces", "again")),
    "data of other samples": (
        lambda at: rewrite(at / "data/manifest.json", seq_len=128), "train run.yaml",
        ("data.seq_len (64)", "must be 128", "write data.seq_len: 128")),
    "no index": (
        without("data/val/index.json"), "train run.yaml",
        ("data.path (data)", "lacks val/index.json", "again")),
    "an empty index": (
        instead("data/train/index.json", b""), "train run.yaml", ("train/index.json", "is empty", "again")),
    "a cut index": (
        cut("data/train/index.json", 50), "train run.yaml",
        ("train/index.json", "of 50", "is not JSON", "again")),
    "a binary index": (
        instead("data/train/index.json", bytes(range(128, 256))), "train run.yaml",
        ("train/index.json", "byte 0 of 128", "is not UTF-8", "again")),
    "an index of other data": (
        lambda at: rewrite(at / "data/train/index.json", version=3), "train run.yaml",
        ("train/index.json", "of other data", "SHA-256", "again")),
    "a folder for an index": (
        instead("data/train/index.json", None), "train run.yaml",
        ("data.path (data)", "train/index.json cannot be read", "Is a directory", "again")),
    "no shard": (
        without(f"data/{SHARD}"), "train run.yaml", ("data.path (data)", f"lacks {SHARD}", "again")),
    "an empty shard": (
        cut(f"data/{SHARD}", 0), "train run.yaml", (SHARD, "has 0 bytes and must have", "again")),
    "a cut shard": (
        cut(f"data/{SHARD}", 1000), "train run.yaml", (SHARD, "has 1,000 bytes and must have", "again")),
    "a folder for a shard": (
        instead(f"data/{SHARD}", None), "train run.yaml",
        (SHARD, "cannot be read", "Is a directory", "again")),
    "a shard that cannot be read": (
        looped(f"data/{SHARD}"), "train run.yaml", (SHARD, "cannot be read", "symbolic links", "again")),
    "a URL of nothing": (
        NOTHING, "train run.yaml run.name=new data.path=file:///nowhere/data",
        ("data.path (file:///nowhere/data)", "manifest.json cannot be fetched", "write")),
    "a URL of no kind": (
        NOTHING, "train run.yaml run.name=new data.path=gopher://host/data",
        ("data.path (gopher://host/data", "must be a folder", "s3://")),
    # tokenizers
    "data whose tokenizer is gone": (
        without("data/tokenizer/tokenizer.model"), "train run.yaml",
        ("data.path (data)", "lacks tokenizer/tokenizer.model", "again")),
    "data with the tokenizer of other data": (
        other_tokenizer("data/tokenizer/tokenizer.model"), "train run.yaml",
        ("data.path (data)", "its tokenizer/", "not the one", "again")),
    "data of another tokenizer": (
        other_tokenizer(), "train run.yaml run.name=new data.tokenizer=other",
        ("data.tokenizer (other)", "not the one", "leave it out, or prepare")),
    "a tokenizer file that is none": (
        NOTHING, "train run.yaml run.name=new data.tokenizer=words.txt",
        ("words.txt", "not a sentencepiece model", "write the path")),
    "a binary file for a tokenizer": (
        instead("tokenizer/tokenizer.model", bytes(1000)), f"{PREPARE} words.txt",
        ("tokenizer/tokenizer.model", "not a sentencepiece model", "write the path")),
    "an empty tokenizer": (
        instead("tokenizer/tokenizer.model", b""), f"{PREPARE} words.txt",
        ("tokenizer/tokenizer.model", "not a sentencepiece model", "write the path")),
    "a folder for a tokenizer's file": (
        instead("tokenizer/tokenizer.model", None), f"{PREPARE} words.txt",
        ("tokenizer/tokenizer.model", "Is a directory", "write a folder")),
    "no tokenizer": (
        without("tokenizer"), f"{PREPARE} words.txt",
        ("tokenizer (tokenizer)", "does not exist", "write a folder")),
    # text
    "no text": (
        NOTHING, f"{LEARN} absent.txt", ("--input (absent.txt)", "does not exist", "write")),
    "an empty text": (
        instead("words.txt", b""), f"{LEARN} words.txt", ("--input (words.txt)", "is empty", "leave it out")),
    "a folder without text": (
        instead("texts", None), f"{PREPARE} texts",
        ("--input (texts)", "no file with text", "write the path")),
    "a binary text": (
        instead("words.txt", b"x" * 100_000 + b"\0" + b"x" * 100), f"{LEARN} words.txt",
        ("words.txt", "byte 100,000 is zero", "leave the file out")),
    "a binary text, prepared": (
        instead("words.txt", b"words\0"), f"{PREPARE} words.txt",
        ("words.txt", "byte 5 is zero", "leave the file")),
    "a text that is not UTF-8": (
        instead("words.txt", b"words \xe9"), f"{PREPARE} words.txt",
        ("words.txt", "byte 6", "convert the file")),
    "a text that cannot be read": (
        both(instead("texts", None), looped("texts/words.txt")),
        f"{PREPARE} texts", ("--input (texts)", "cannot be read", "links", "leave it out")),
    "a line that is not JSON": (
        instead("a.jsonl", lines(40) + b'{"text": "b'), f"{PREPARE} a.jsonl",
        ("a.jsonl line 41", "is not JSON", "repair it")),
    "a line without text": (
        instead("a.jsonl", lines(40) + b'{"body": "b"}'), f"{LEARN} a.jsonl",
        ("a.jsonl line 41", "no text", "body", "rename the field")),
    "gzip that is cut": (
        zipped("a.jsonl.gz", 9000), f"{PREPARE} a.jsonl.gz",
        ("a.jsonl.gz", "ends in the middle", "9,000", "copy")),
    "gzip that is none": (
        instead("a.jsonl.gz", lines(40)), f"{PREPARE} a.jsonl.gz",
        ("a.jsonl.gz", "damaged at or before byte", "copy it again")),
    "gzip that is damaged": (
        both(zipped("a.jsonl.gz"), flipped("a.jsonl.gz")), f"{LEARN} a.jsonl.gz",
        ("a.jsonl.gz", "damaged at or before byte", "copy it again")),
    "zstd that is cut": (
        zipped("a.jsonl.zst", 5000), f"{PREPARE} a.jsonl.zst",
        ("a.jsonl.zst", "ends in the middle", "5,000", "copy")),
    "zstd that is none": (
        instead("a.jsonl.zst", lines(40)), f"{PREPARE} a.jsonl.zst",
        ("a.jsonl.zst", "damaged at or before byte", "copy it again")),
    "Parquet that is cut": (
        zipped("a.parquet", 3000), f"{PREPARE} a.parquet",
        ("a.parquet", "byte 2,996 of 3,000", "copy it again")),
    "Parquet that is none": (
        instead("a.parquet", lines(40)), f"{PREPARE} a.parquet", ("a.parquet", "byte 0 of", "copy it again")),
    "too little text for the pieces": (
        NOTHING, "tokenizer train --input words.txt --out new --vocab-size 9000",
        ("--vocab-size (9,000)", "more than this text has", "write at most")),
    # the machine
    "more workers than there are": (
        NOTHING, "train run.yaml cluster.workers=4096 train.batch_tokens=524288",
        ("cluster.workers (4096)", "4096 CPUs", f"has {processors()}", "write cluster.workers=")),
    "more processors than there are": (
        NOTHING, "train run.yaml cluster.cpus_per_worker=4000",
        ("cluster.cpus_per_worker (4000)", f"has {processors()}", "write cluster.cpus_per_worker=")),
    "more GPUs than there are": (
        NOTHING, "train run.yaml cluster.gpus_per_worker=1",
        ("cluster.gpus_per_worker (1)", "GPU", "write cluster.gpus_per_worker=")),
    "a Ray that does not answer": (
        NOTHING, "RAY_ADDRESS=127.0.0.1:1 train run.yaml",
        ("RAY_ADDRESS (127.0.0.1:1)", "does not answer", "write")),
    "the address of Ray's dashboard": (
        NOTHING, "RAY_ADDRESS=http://head:8265 train run.yaml",
        ("RAY_ADDRESS (http://head:8265)", "dashboard", "write head:6379",
         "lowbit submit CONFIG --address http://head:8265")),
    "data prepared on what is no Ray": (
        NOTHING, f"RAY_ADDRESS=ray://head:10001 {PREPARE} words.txt",
        ("RAY_ADDRESS (ray://head:10001)", "client", "write head:6379")),
    "no folder for Ray": (
        NOTHING, "RAY_TMPDIR=/proc train run.yaml run.name=new",
        ("RAY_TMPDIR (/proc)", "cannot be written", "set RAY_TMPDIR to a folder that can")),
    "no folder for the Ray that prepares data": (
        NOTHING, f"RAY_TMPDIR=/proc {PREPARE} words.txt",
        ("RAY_TMPDIR (/proc)", "cannot be written", "set RAY_TMPDIR to a folder that can")),
    # tracking
    "a tracking URI of no kind": (
        NOTHING, "train run.yaml tracking.mlflow=gopher://x",
        ("tracking.mlflow (gopher://x)", "write sqlite:///")),
    "a tracking database in no folder": (
        NOTHING, "train run.yaml tracking.mlflow=sqlite:///absent/mlflow.db",
        ("tracking.mlflow (sqlite:///absent/mlflow.db)", "does not exist", "write sqlite:///")),
    "a tracking database that is none": (
        NOTHING, "train run.yaml tracking.mlflow=sqlite:///words.txt",
        ("tracking.mlflow (sqlite:///words.txt)", "not an SQLite database", "write sqlite:///")),
    "a tracking database that is a folder": (
        NOTHING, "train run.yaml tracking.mlflow=sqlite:///data",
        ("tracking.mlflow (sqlite:///data)", "is a folder", "write sqlite:///")),
    "a tracking server without a host": (
        NOTHING, "train run.yaml tracking.mlflow=http://", ("tracking.mlflow (http://)", "no host", "write")),
    "a tracking port that is none": (
        NOTHING, "train run.yaml tracking.mlflow=http://host:99999",
        ("tracking.mlflow (http://host:99999)", "is not a URI", "write")),
    # runs and checkpoints
    "a run of another model": (
        NOTHING, "train run.yaml model.layers=1",
        ("run.name (small)", "model.layers: 2 -> 1", "another run.name")),
    "a checkpoint of another model": (
        without("runs/small/config.yaml"), "train run.yaml model.layers=1",
        (STEP, "model.layers: 2 -> 1", "write another run.name")),
    "a checkpoint of another grid": (
        without("runs/small/config.yaml"), "train run.yaml method.grid=int4",
        (STEP, "method.grid: ternary -> int4", "write another run.name")),
    "a checkpoint of another method": (
        without("runs/small/config.yaml"), "train run.yaml method.name=bitnet",
        (STEP, "method.name: dqt -> bitnet", "write another run.name")),
    "an older checkpoint of another model, the newest damaged": (
        both(without("runs/small/config.yaml", "runs/small/latest"), instead(f"{STEP}/manifest.json", b"{")),
        "train run.yaml model.layers=1", ("step-1", "model.layers: 2 -> 1", "write another run.name")),
    "a run's configuration that is binary": (
        instead("runs/small/config.yaml", b"\xff\xfe"), "train run.yaml",
        ("runs/small/config.yaml", "byte 0", "save it as UTF-8")),
    "a run whose latest checkpoint is gone, and all others": (
        without("runs/small/checkpoints"), "train run.yaml",
        ("run.name (small)", "runs/small/latest", "none is in", "put it back")),
    "evaluating a run whose latest checkpoint is gone": (
        without("runs/small/checkpoints"), "eval small --data data",
        ("runs/small", "no usable checkpoint", "train it, or write another")),
    "sampling from a run whose checkpoints are gone": (
        both(without("runs/small/checkpoints"), instead("runs/small/checkpoints", None)),
        "generate small --prompt x", ("runs/small", "no usable checkpoint", "write another")),
    "inspecting a run whose checkpoints are all damaged": (
        both(cut(f"{STEP}/manifest.json", 70), without("runs/small/checkpoints/step-1/SHA256SUMS")),
        "inspect small", ("runs/small", "no usable", "step-2/manifest.json", "SHA256SUMS", "write another")),
    "no such run to evaluate": (
        NOTHING, "eval absent --data data", ("'absent'", "neither a run", "write the name")),
    "a folder that is no run": (
        NOTHING, "inspect data/tokenizer", ("'data/tokenizer'", "neither a run", "write the name")),
    "a checkpoint with an empty manifest": (
        instead(f"{STEP}/manifest.json", b""), f"inspect {STEP}", (f"{STEP}/manifest.json", "name another")),
    "a checkpoint with a binary manifest": (
        instead(f"{STEP}/manifest.json", b"\xff" * 50), f"generate {STEP} --prompt x",
        (f"{STEP}/manifest.json", "position 0", "name another")),
    "a checkpoint of a later version": (
        lambda at: rewrite(at / STEP / "manifest.json", format=99), f"inspect {STEP}",
        (STEP, "format 99", "read it with the version")),
    "a checkpoint with a damaged shard": (
        flipped(f"{STEP}/shard-00000.safetensors"), f"eval {STEP} --data data",
        (STEP, "shard-00000.safetensors", "SHA-256", "name another")),
    "a checkpoint with a cut shard": (
        cut(f"{STEP}/shard-00000.safetensors", 1000), f"generate {STEP} --prompt x",
        (STEP, "shard-00000.safetensors", "name another")),
    "a run with another tokenizer": (
        other_tokenizer("runs/small/tokenizer/tokenizer.model"), "generate small --prompt x",
        ("runs/small/tokenizer", "not the tokenizer of", "put the run's own")),
    "evaluating on data of another tokenizer": (
        lambda at: rewrite(at / "data/manifest.json", tokenizer_sha256="0" * 64), "eval small --data data",
        ("--data (data)", "another tokenizer", "prepare it with")),
    "evaluating on data with a cut shard": (
        cut("data/val/shard.00000.mds.zstd", 100), "eval small --data data",
        ("--data (data)", "val/shard.00000.mds.zstd", "100 bytes", "again")),
    "evaluating on data with a damaged shard": (
        flipped("data/val/shard.00000.mds.zstd"), "eval small --data data",
        ("data/val/shard.00000.mds.zstd", "is damaged", "again")),
    "evaluating on data that is not there": (
        NOTHING, "eval small --data absent", ("--data (absent)", "does not exist", "write")),
    "evaluating on no text at all": (
        instead("a.jsonl", b'{"text": ""}\n'), "eval small --data a.jsonl",
        ("--data (a.jsonl)", "no text", "write")),
    # no write permission, for root too
    "a run's folder that cannot be written": (
        NOTHING, "train run.yaml run.dir=/proc",
        ("run.dir (/proc)", "/proc/small cannot be written", "write a folder")),
    "a run's folder that is a URL": (
        NOTHING, "train run.yaml run.dir=s3://bucket/runs",
        ("run.dir ('s3://bucket/runs')", "must be a folder, no URL", "mount the store")),
    "a range of workers upside down": (
        NOTHING, "train run.yaml 'cluster.workers={min: 4, max: 2}'",
        ("cluster.workers (", "must have a min of at most its max", "write {min: 2, max: 4}")),
    "a range of workers without a divisor": (
        NOTHING, "train run.yaml 'cluster.workers={min: 3, max: 3}'",
        ("cluster.workers ({min: 3, max: 3})", "must contain a divisor of", "the nearest is")),
    "a run's folder in a file": (
        NOTHING, "train run.yaml run.dir=words.txt",
        ("run.dir (words.txt)", "cannot be written", "write a folder")),
    "a file for a run's folder": (
        instead("runs/small", b""), "train run.yaml",
        ("run.name (small)", "is a file", "write another name")),
    "a cache that cannot be written": (
        NOTHING, "train run.yaml data.cache=/proc/cache",
        ("data.cache (/proc/cache)", "cannot be written", "write")),
    "a tokenizer's folder that cannot be written": (
        NOTHING, "tokenizer train --input words.txt --vocab-size 300 --out /proc/new",
        ("--out (/proc/new)", "cannot be written", "write")),
    "prepared data that cannot be written": (
        NOTHING, "data prepare --input words.txt --tokenizer tokenizer --out /proc/new",
        ("--out (/proc/new)", "cannot be written")),
    "a tokenizer over something else": (
        NOTHING, "tokenizer train --input words.txt --vocab-size 300 --out data",
        ("--out (data)", "is not empty", "write another folder")),
    "prepared data over something else": (
        NOTHING, "data prepare --input words.txt --tokenizer tokenizer --out runs",
        ("--out (runs)", "not prepared data", "write the name of a new folder")),
    # options of the other verbs
    "a vocabulary without pieces": (
        NOTHING, "tokenizer train --input words.txt --out new --vocab-size 5",
        ("--vocab-size (5)", "260", "write 4096")),
    "samples of one token": (
        NOTHING, "data prepare --input words.txt --tokenizer tokenizer --out new --seq-len 1",
        ("--seq-len (1)", "from 2", "write 256")),
    "a share that is no number": (
        NOTHING, "data prepare --input words.txt --tokenizer tokenizer --out new --val-fraction nan",
        ("--val-fraction (nan)", "more than 0", "write 0.02")),
    "a plan without data": (
        without("data"), "plan run.yaml", ("data.path (data)", "does not exist", "--vocab-size 32000")),
    "a plan for no workers": (
        NOTHING, "plan run.yaml --workers 0", ("cluster.workers", "0", "at least 1", "write 1")),
    "a plan for no pieces": (
        NOTHING, "plan run.yaml --vocab-size -3", ("--vocab-size (-3)", "at least 1", "write 32000")),
    "GPUs that do not divide the batch": (
        NOTHING, "plan run.yaml --gpus 1,24",
        ("--gpus (24)", "must divide", "micro-batches", "write --gpus", "train.batch_tokens=")),
    "no GPUs": (NOTHING, "plan run.yaml --gpus 0", ("--gpus (0)", "at least 1", "write 8")),
    "GPUs in words": (NOTHING, "plan run.yaml --gpus 8,many", ("--gpus (8,many)", "a number", "write 8")),
    "GPUs of no kind": (
        NOTHING, "plan run.yaml --gpus 2 --gpu V100", ("--gpu (V100)", "one of H100", "did you mean H100?")),
    "a kind of no GPUs": (NOTHING, "plan run.yaml --gpu A100", ("--gpu (A100)", "must go with --gpus")),
    "GPUs beside workers": (
        NOTHING, "plan run.yaml --gpus 2 --workers 2", ("--workers (2)", "beside --gpus", "leave it out")),
    "8-bit floats on an A100": (
        NOTHING, "plan run.yaml --gpus 2 --gpu A100 precision=fp8",
        ("precision (fp8)", "A100", "write --gpu", "precision=bf16")),
    "a grid that does not exist": (
        NOTHING, "eval small --data data --forward int5", ("--forward (int5)", "ternary", "write one")),
    "the scale of no grid": (
        NOTHING, "eval small --data data --forward-scale absmean",
        ("--forward-scale (absmean)", "must go with --forward", "--forward ternary")),
    "an infinite temperature": (
        NOTHING, "generate small --prompt x --temperature inf",
        ("--temperature (inf)", "finite", "write 0.8")),
    "a probability beyond one": (
        NOTHING, "generate small --prompt x --top-p 1.5", ("--top-p (1.5)", "at most 1", "write 0.95")),
    "a seed below zero": (
        NOTHING, "generate small --prompt x --seed -1", ("--seed (-1)", "at least 0", "write 0")),
    "a text longer than the model takes": (
        NOTHING, "generate small --prompt x --max-new-tokens 9999",
        ("9999", "max_seq_len 2048", "write fewer")),
    "a word for a number of samples": (
        NOTHING, "eval small --data data --samples many", ("--samples", "'many'", "integer", "--help")),
}  # fmt: skip


def test_there_are_enough_cases():
    assert len(CASES) >= 80


def parsed(command: str) -> tuple[dict[str, str], list[str]]:
    """The variables in front of a command, and its words."""
    words = shlex.split(command)
    n = next(k for k, word in enumerate(words) if not word.startswith(("RAY_ADDRESS=", "RAY_TMPDIR=")))
    return dict(word.split("=", 1) for word in words[:n]), words[n:]


@pytest.mark.parametrize("case", CASES)
def test_wrong_input_is_answered_in_one_line_before_anything_starts(case, place, lowbit, monkeypatch):
    import ray

    change, command, answer = CASES[case]
    if change is not None:
        change(place)
    variables, arguments = parsed(command)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    before, was_running = contents(place), ray.is_initialized()
    started = time.process_time()  # the machine may be busy with other work
    done = lowbit(*arguments)
    seconds = time.process_time() - started
    assert done.returncode == 2, done.stderr
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1, done.stderr
    (line,) = done.stderr.splitlines()
    assert line.startswith("lowbit: ")
    for words in answer:
        assert words in line, f"{words!r} is not in {line!r}"
    assert ray.is_initialized() == was_running
    assert contents(place) == before, "nothing may be written"
    if arguments[0] != "eval":  # which reads data through the cache
        assert not (place.parent / "cache" / "lowbit-dist" / "data").exists()
    assert seconds < 10


def test_without_a_mistake_the_same_commands_go_on(place, lowbit):
    """The folder of all cases is right: what is refused in them is their mistake alone."""
    from lowbit_dist import configfile
    from lowbit_dist.cluster import check

    assert lowbit("train", "run.yaml").returncode == 0
    assert lowbit("inspect", "small").returncode == 0
    assert lowbit("eval", "small", "--data", "data").returncode == 0
    pretrained()(place)
    for override in ("model={pretrained: llama}", "data.tokenizer=tokenizer", "data.cache=cache"):
        check(configfile.load(place / "run.yaml", [override, "run.name=new"]))


def test_a_latest_that_names_what_is_gone_loses_no_run(place, lowbit):
    """An older checkpoint is there, and is used."""
    from lowbit_dist import configfile
    from lowbit_dist.cluster import check
    from lowbit_dist.cluster.checks import newest_checkpoint

    assert (place / "runs/small/latest").read_text().strip() == "step-2"
    shutil.rmtree(place / STEP)
    done = lowbit("inspect", "small", "--json")
    assert json.loads(done.stdout)["step"] == 1, done.stderr
    check(configfile.load(place / "run.yaml", []))
    assert newest_checkpoint(place / "runs/small").name == "step-1"


SHELL = (
    "a misspelt field",
    "a cut shard",
    "a checkpoint of another grid",
    "inspecting a run whose checkpoints are all damaged",
    "gzip that is cut",
)


@pytest.mark.parametrize("case", SHELL)
def test_in_a_process_of_its_own_it_takes_less_than_ten_seconds(case, place):
    change, command, answer = CASES[case]
    if change is not None:
        change(place)
    variables, arguments = parsed(command)
    code = "from lowbit_dist.cli import main; main()"
    times: list[float] = []
    while not times or (min(times) >= 10 and len(times) < 3):  # the machine may be busy with other work
        started = time.monotonic()
        done = subprocess.run(
            [sys.executable, "-c", code, *arguments],
            capture_output=True, text=True, env={**os.environ, **variables}, timeout=60,
        )  # fmt: skip
        times.append(time.monotonic() - started)
        assert (done.returncode, done.stdout) == (2, "")
        assert done.stderr.count("\n") == 1, done.stderr
        (line,) = done.stderr.splitlines()
        assert line.startswith("lowbit: ")
        assert all(words in line for words in answer), line
    assert min(times) < 10, times

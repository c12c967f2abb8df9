"""The families of models that people continue: of each a small folder as its maker's is, trained ternary,
resumed, and moved.
"""

import json
import os
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import NamedTuple

import hf_folders
import hf_tokenizers
import pytest
import torch
from hf_tokenizers import IMAGE, TEXTS
from preparing import prepare_alone
from test_hf_tokenizer import strings
from test_pretrained import assert_close, theirs
from test_train import train

import lowbit_dist
from lowbit_dist import configfile, data, model, pretrained, tokenizer
from lowbit_dist.checkpoint import Checkpoint
from lowbit_dist.cluster import checks, jobs
from lowbit_dist.config import ConfigError
from lowbit_dist.packed import PackedTensor

SEQ, STEPS, HALF = 32, 10, 5
PROMPT = "the model def"
LINEARS = 7  # of a block: q, k, v, o, gate, up, down

WIDE = {"hidden_size": 896, "num_attention_heads": 14, "num_key_value_heads": 2, "head_dim": 64}
NARROW = {"hidden_size": 576, "num_attention_heads": 9, "num_key_value_heads": 3, "head_dim": 64}


class Family(NamedTuple):
    config: str  # of hf_folders
    tokenizer: str  # of hf_tokenizers
    more_rows: int  # of embeddings than the tokenizer has tokens
    changed: dict


FAMILIES = {
    "qwen2": Family("qwen2", "qwen", 48, WIDE),
    "qwen3": Family("qwen3", "qwen", 48, {**WIDE, "num_attention_heads": 4, "head_dim": 128}),
    "llama3": Family("llama3", "llama3", 0, WIDE),
    "smollm": Family("llama", "smollm", 0, NARROW),
    "mistral": Family("mistral", "llama2", 0, {**NARROW, "sliding_window": 8}),
    "gemma": Family("gemma", "gemma", 0, NARROW),
    "gemma2": Family("gemma2", "gemma", 0, {**WIDE, "sliding_window": 8}),
    "gemma3": Family("gemma3", "gemma", -1, {**NARROW, "sliding_window": 8}),
}
SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in FAMILIES if name != "smollm"]


@pytest.fixture(scope="module")
def documents(tmp_path_factory) -> Path:
    file = tmp_path_factory.mktemp("documents") / "documents.jsonl"
    texts = ("".join(TEXTS[k::100]) for k in range(100))
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return file


def written(folder: Path, name: str) -> Path:
    """A family's folder: its tokenizer, tied embeddings, and weights in several files."""
    family = FAMILIES[name]
    own = tokenizer.load(hf_tokenizers.write(folder, family.tokenizer))
    hf_folders.write(
        folder,
        family.config,
        max_shard_size="4MB",
        vocab_size=own.vocab_size + family.more_rows,
        bos_token_id=own.bos_id,
        eos_token_id=own.eos_id,
        tie_word_embeddings=True,
        initializer_range=0.02,
        **family.changed,
    )
    assert (folder / pretrained.INDEX).is_file() and len(list(folder.glob("*.safetensors"))) > 2
    return folder


def assert_is_theirs(trained, folder: Path) -> None:
    """A folder's ids and logits are those of transformers."""
    from transformers import AutoTokenizer

    texts = strings(200)
    ids = AutoTokenizer.from_pretrained(folder)(texts, add_special_tokens=False)["input_ids"]
    assert [trained.tokenizer.encode(text) for text in texts] == ids
    text = torch.tensor([trained.tokenizer.encode("".join(TEXTS[:20]))[:SEQ]])
    with torch.inference_mode():
        assert_close(trained.network()(input_ids=text).logits, theirs(folder)(input_ids=text).logits)


def assert_is_ternary(trained) -> None:
    """Each layer but the head is, and multiplies by its codes what it does by its weights."""
    stored = [trained.tensor(name) for name in trained.names]
    low_bit = [each for each in stored if isinstance(each, PackedTensor)]
    assert len(low_bit) == LINEARS * trained.hf_config.num_hidden_layers
    assert all(set(each.levels().unique().tolist()) == {-1, 0, 1} for each in low_bit)
    ids = torch.tensor([trained.tokenizer.encode(PROMPT)])
    with torch.inference_mode():
        dense, packed = (
            trained.network(packed=is_packed)(input_ids=ids).logits for is_packed in (False, True)
        )
    assert torch.equal(packed, dense)


def said(root: Path) -> tuple[float, str, list[list[int]]]:
    """What the run in `root` scores there, and what it generates: its text, and the ids that are decoded."""
    trained = lowbit_dist.open("whole", root / "runs")
    ids, decode = [], trained.tokenizer.decode
    trained.tokenizer.decode = lambda some: ids.append(list(some)) or decode(some)
    text = trained.generate(PROMPT, max_new_tokens=8, temperature=0)["text"]
    return trained.evaluate(str(root / "data"))["loss"], text, ids


@pytest.mark.parametrize("name", ["smollm", *SLOW])
def test_a_family_is_trained_ternary_resumed_and_moved(name, ranks, small, documents, tmp_path):
    here, there = tmp_path / "here", tmp_path / "there"
    folder = written(here / "model", name)
    assert_is_theirs(lowbit_dist.open(folder), folder)
    prepare_alone([documents], folder, here / "data", seq_len=SEQ, val_fraction=0.1)

    def content(root, run):
        sections = small(
            run={"name": run, "dir": str(root / "runs")},
            data={"path": str(root / "data"), "seq_len": SEQ},
            train={"steps": STEPS, "batch_tokens": 4 * SEQ, "eval_every": STEPS, "save_every": HALF},
        )
        return {**sections, "model": {"pretrained": str(root / "model")}}

    manifest = data.read_manifest(here / "data")
    model.check(configfile.from_dict(content(here, "whole")), manifest.vocab_size, used=manifest.used)
    whole = ranks(2).run(train, content(here, "whole"))[0]
    ranks(2).run(train, content(here, "stopped"), stop_at=HALF)
    half = Checkpoint.open(here / "runs" / "stopped" / "checkpoints" / f"step-{HALF}")
    assert half.digest() != whole["digest"], "the second half must change some weights"
    assert_is_ternary(lowbit_dist.open("whole", here / "runs"))
    before = said(here)
    assert before[0] == pytest.approx(whole["val_loss"], abs=1e-5)

    here.rename(there)
    assert said(there) == before
    checks.check_run(configfile.from_dict(content(there, "stopped")))
    resumed = ranks(2).run(train, content(there, "stopped"))[0]
    assert (resumed["digest"], resumed["val_loss"]) == (whole["digest"], whole["val_loss"])


@pytest.mark.parametrize("text", [PROMPT, f"{PROMPT} {IMAGE}"], ids=["absent", "there"])
def test_a_token_without_an_embedding_is_refused_where_it_is_and_nowhere_else(text, small, tmp_path):
    """The tokenizer of Gemma's models of text has one for images."""
    folder, file, prepared = tmp_path / "model", tmp_path / "text.txt", tmp_path / "data"
    trained = lowbit_dist.open(written(folder, "gemma3"))
    last = trained.tokenizer.vocab_size - 1
    assert trained.tokenizer.encode(IMAGE) == [last]
    file.write_text("".join(f"{text} {k}\n" for k in range(1000)))
    prepare_alone([file], folder, prepared, seq_len=SEQ, val_fraction=0.1)
    manifest = data.read_manifest(prepared)
    config = configfile.from_dict({**small(), "model": {"pretrained": str(folder)}})
    for use in (
        lambda: trained.generate(text, max_new_tokens=1),
        lambda: trained.evaluate(str(file), n_samples=2),
        lambda: trained.evaluate(str(prepared), n_samples=2),
        lambda: model.check(config, manifest.vocab_size, used=manifest.used),
    ):
        words = rf"(?=.* token {last}\b)(?=.* vocabulary of {last}\b).*; (write|prepare)"
        with pytest.raises(ConfigError, match=words) if IMAGE in text else nullcontext():
            use()


@pytest.mark.slow
@pytest.mark.integration
def test_the_same_on_the_command_line(documents, ranks, tmp_path, monkeypatch):
    here, there = tmp_path / "here", tmp_path / "there"
    written(here / "model", "qwen3")
    run = {
        "run": {"name": "whole"},
        "model": {"pretrained": "model"},
        "data": {"path": "data", "seq_len": SEQ},
        "schedule": {"name": "constant", "warmup_steps": 2},
        "precision": "fp32",
        "train": {"steps": STEPS, "batch_tokens": 4 * SEQ, "micro_batch": 2},
        "cluster": {"workers": 2},
        "tracking": {"mlflow": None},
    }
    (here / "run.yaml").write_text(json.dumps(run))

    def lowbit(root, *arguments):
        done = subprocess.run(
            [sys.executable, "-m", "lowbit_dist", *map(str, arguments)],
            cwd=root,
            env={name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    def said(root):
        answer = json.loads(lowbit(root, "eval", "whole", "--data", "data", "--json"))
        text = lowbit(root, "generate", "whole", "--prompt", PROMPT, "--max-new-tokens", 8)
        return answer["loss"], text

    prepare = ("data", "prepare", "--input", documents, "--tokenizer", "model", "--out", "data")
    lowbit(here, *prepare, "--seq-len", SEQ, "--val-fraction", 0.1)
    with monkeypatch.context() as patch:
        patch.chdir(here)
        whole = ranks(2).run(train, jobs.absolute(configfile.load("run.yaml")).to_dict())[0]
    lowbit(here, "train", "run.yaml", "run.name=stopped", f"train.steps={HALF}", "--json")
    before = said(here)
    assert before[0] == pytest.approx(whole["val_loss"], abs=1e-5)
    assert before[1].startswith(PROMPT)

    here.rename(there)
    assert said(there) == before
    resumed = json.loads(lowbit(there, "train", "run.yaml", "run.name=stopped", "--json"))
    assert resumed["digest"] == whole["digest"]

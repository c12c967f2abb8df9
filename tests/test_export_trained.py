"""Models that were trained here, in every format that holds them, as stock software computes them."""

import json
import os
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from typing import NamedTuple

import llamacpp
import pytest
import torch
import transformers

from lowbit_dist import trained
from lowbit_dist.export import FORMATS, export, finished, proof
from lowbit_dist.export.finished import Finished
from lowbit_dist.linear import IntPerToken

TIED = {"tie_embeddings": True}
BOTH = ("weights", "weights-and-inputs")  # of compressed-tensors
# Name -> what of the run is set, and the types of each format that hold the model.
RUNS = {
    "ternary, tied": (
        {"method": {"name": "dqt"}, "model": TIED, "precision": "bf16"},
        {
            "hf": (None,), "hf-bitnet": (None,), "compressed-tensors": BOTH,
            "gguf": ("TQ1_0", "TQ2_0", "Q2_0", "Q2_K", "Q3_K", "Q4_0", "Q8_0", "BF16", "F16", "F32"),
        },
    ),
    "bitnet, tied": (
        {"method": {"name": "bitnet"}, "model": TIED},
        {
            "hf": (None,), "hf-bitnet": (None,), "compressed-tensors": BOTH,
            "gguf": ("TQ1_0", "TQ2_0", "Q2_0", "F32"),
        },
    ),
    "bitnet": (
        {"method": {"name": "bitnet"}},
        {"hf": (None,), "hf-bitnet": (None,), "compressed-tensors": BOTH},
    ),
    "bitnet without sub-norms": (
        {"method": {"name": "bitnet", "sub_norms": False}},
        {"hf": (None,), "hf-bitnet": (None,), "compressed-tensors": BOTH, "gguf": ("TQ2_0", "F32")},
    ),
    "ternary in groups": (
        {"method": {"name": "dqt", "granularity": "group", "group": 64}},
        {"hf": (None,), "compressed-tensors": BOTH, "gguf": ("Q2_0", "Q4_0", "Q8_0", "F32")},
    ),
    "int2 in rows, tied, sub-norms": (
        {"method": {"name": "dqt", "grid": "int2", "granularity": "row", "sub_norms": True}, "model": TIED},
        {"hf": (None,), "compressed-tensors": BOTH, "gguf": ("Q2_K", "Q4_0", "Q8_0", "F32")},
    ),
    "int3": (
        {"method": {"name": "dqt", "grid": "int3", "activation_bits": None}},
        {"hf": (None,), "compressed-tensors": BOTH, "gguf": ("Q3_K", "Q4_0", "Q8_0", "F32")},
    ),
    "int3 in groups": (
        {"method": {"name": "dqt", "grid": "int3", "granularity": "group", "group": 128}},
        {"hf": (None,), "compressed-tensors": BOTH, "gguf": ("Q4_0", "Q8_0", "F32")},
    ),
    "int4 in groups": (
        {"method": {"name": "dqt", "grid": "int4", "granularity": "group", "group": 128}},
        {"hf": (None,), "compressed-tensors": BOTH, "gguf": ("Q4_0", "Q8_0", "F32")},
    ),
    "int4, tied, sub-norms": (
        {"method": {"name": "dqt", "grid": "int4", "sub_norms": True}, "model": TIED},
        {"hf": (None,), "compressed-tensors": BOTH, "gguf": ("Q4_0", "Q8_0", "F32")},
    ),
    "int8 in rows": (
        {"method": {"name": "dqt", "grid": "int8", "granularity": "row"}, "precision": "bf16"},
        {"hf": (None,), "compressed-tensors": BOTH, "gguf": ("Q8_0", "F32")},
    ),
    "ternary forward": (
        {"method": {"name": "dqt", "grid": "int8", "forward": "ternary"}},
        {"hf": (None,), "hf-bitnet": (None,), "compressed-tensors": BOTH, "gguf": ("TQ2_0", "F32")},
    ),
}  # fmt: skip
# In every pass; the others are slow.
FIRST = {
    ("ternary, tied", "gguf", "TQ2_0"),
    ("ternary, tied", "gguf", "F32"),
    ("bitnet, tied", "hf-bitnet", None),
    ("bitnet, tied", "compressed-tensors", "weights-and-inputs"),
    ("bitnet, tied", "gguf", "TQ2_0"),
}


def cases(*formats):
    return [
        pytest.param(
            *case,
            id="-".join(map(str, case)),
            marks=[] if case in FIRST else [pytest.mark.slow],
        )
        for name, (_, types) in RUNS.items()
        for format in formats
        for case in ((name, format, kind) for kind in types.get(format, ()))
    ]


class Exported(NamedTuple):
    model: Finished
    ids: list[int]  # of a text
    plain: torch.Tensor  # our logits with the inputs of linear layers as they are
    rounded: torch.Tensor  # and with these rounded to 8 bits
    path: Path
    proof: dict

    @property
    def as_trained(self):
        return self.plain if self.model.rounding is None else self.rounded


@pytest.fixture(scope="module")
def exported(few_steps, tmp_path_factory):
    """`exported("int3", "gguf", "Q3_K")`: a run of 20 steps, and what was written of it."""
    made = {}

    def of(name, format, kind):
        for package in import_module(FORMATS[format]).READER:
            pytest.importorskip(package, reason=f"{format} is read back with {package}")
        if name not in made:
            sections = RUNS[name][0]
            summary = few_steps(train={"steps": 20, "batch_tokens": 512, "micro_batch": 8}, **sections)
            source = trained.open(summary["checkpoint"])
            model = finished.of(source)
            ids = proof._ids(model)
            ours = finished.Network(model)
            made[name] = source, model, ids, ours.logits(ids, None), ours.logits(ids, IntPerToken())
        source, *others = made[name]
        out = tmp_path_factory.mktemp("exports") / "out"
        return Exported(*others, out, export(source, format, out, kind=kind)["proof"])

    return of


def assert_alike(ours, theirs):
    """As far as two roundings to 8 bits are."""
    kl, top1 = proof.divergence(ours, theirs), proof.agreement(ours, theirs)
    assert len(ours) == 64 and kl <= 5e-4 and top1 >= 0.95, (kl, top1)


@pytest.mark.parametrize(("name", "format", "kind"), cases("hf", "hf-bitnet", "compressed-tensors"))
def test_transformers_computes_the_model(name, format, kind, exported):
    proved = exported(name, format, kind).proof
    assert proved["positions"] == 64 and proved["narrowed"] == 0
    if proved["rounds_inputs"]:
        assert proved["kl"] <= 5e-4 and proved["top1"] >= 0.95, proved
        assert proved["kl_as_trained"] <= 5e-4 and proved["top1_as_trained"] >= 0.95, proved
    else:
        assert proved["kl"] <= 1e-12 and proved["top1"] == 1, proved


@pytest.mark.parametrize(("name", "format", "kind"), cases("gguf"))
def test_llama_cpp_computes_the_model(name, format, kind, exported):
    libraries = llamacpp.folder()
    if not isinstance(libraries, Path):
        pytest.skip(libraries)
    of = exported(name, format, kind)
    got = llamacpp.run(libraries, of.path / "out.gguf", ids=of.ids, texts=list(proof.TEXTS))
    theirs = torch.from_numpy(got["logits"])
    assert got["texts"] == [of.model.tokenizer.encode(text) for text in proof.TEXTS]
    if kind == "F32":
        assert proof.divergence(of.plain, theirs) <= 1e-9
    assert_alike(of.plain, theirs)
    assert_alike(of.as_trained, theirs)


# Of another major version, installed with its own dependencies into a folder of its own:
# pip install --target DIR --no-deps transformers==5.24.0 "huggingface_hub>=1.31" "tokenizers>=0.23.1"
AGAIN = ("ternary, tied", "bitnet", "int3 in groups")
ELSEWHERE = os.environ.get("LOWBIT_TEST_TRANSFORMERS", "")
READ_ELSEWHERE = """
import json, sys, torch, transformers
torch.compiler.set_stance("force_eager")
given = json.load(open(sys.argv[1]))
answers = {"version": transformers.__version__}
for name, (folder, tokens) in given["folders"].items():
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    with torch.inference_mode():
        logits = model(input_ids=torch.tensor([tokens])).logits[0]
    ids = [tokenizer.encode(text, add_special_tokens=False) for text in given["texts"]]
    missing = sorted({*info["missing_keys"], *info["unexpected_keys"]})
    answers[name] = {"logits": logits.tolist(), "ids": ids, "missing": missing}
json.dump(answers, open(sys.argv[2], "w"))
"""


@pytest.mark.slow
@pytest.mark.skipif(
    not ELSEWHERE, reason="LOWBIT_TEST_TRANSFORMERS names no folder with another transformers"
)
def test_another_version_of_transformers_computes_the_same(exported, tmp_path):
    made = {
        " ".join(map(str, case)): exported(*case)
        for case in (param.values for param in cases("hf", "hf-bitnet", "compressed-tensors"))
        if case[0] in AGAIN
    }
    folders = {key: (str(of.path), of.ids) for key, of in made.items()}
    (tmp_path / "given").write_text(json.dumps({"folders": folders, "texts": proof.TEXTS}))
    path = os.pathsep.join([ELSEWHERE, os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-c", READ_ELSEWHERE, tmp_path / "given", tmp_path / "answers"]
    subprocess.run(command, check=True, env=os.environ | {"PYTHONPATH": path})
    answers = json.loads((tmp_path / "answers").read_text())
    assert answers.pop("version") != transformers.__version__
    for key, answer in answers.items():
        of, theirs = made[key], torch.tensor(answer["logits"])
        assert answer["ids"] == [of.model.tokenizer.encode(text) for text in proof.TEXTS], key
        assert not answer["missing"], key
        if of.proof["rounds_inputs"]:
            assert_alike(of.rounded, theirs)
        else:
            assert proof.divergence(of.plain, theirs) <= 1e-9, key

"""`lowbit config`: what the models say of themselves, as lists, as a page and as a JSON schema."""

import itertools
import json
import subprocess
import sys
from pathlib import Path

import jsonschema
import pytest
from test_outside import package

from lowbit_dist import configfile
from lowbit_dist.cli import reference
from lowbit_dist.methods import METHODS
from lowbit_dist.optim import OPTIMIZERS
from lowbit_dist.yamlfile import read_yaml

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "configs" / "REFERENCE.md"
GOOD = {"data": {"path": "x"}}


@pytest.fixture(scope="module")
def sections():
    return reference.reference(installed=False)


@pytest.fixture(scope="module")
def valid():
    """Whether a configuration passes the schema."""
    schema = reference.schema(installed=False)
    jsonschema.Draft202012Validator.check_schema(schema)
    return jsonschema.Draft202012Validator(schema).is_valid


def fields(sections):
    """Dotted name, with the choice it belongs to -> the field."""
    return {
        (part["choice"], f"{part['section']}.{field['name']}"): field
        for part in sections
        for field in part["fields"]
    }


def test_every_field_is_there_with_a_meaning_in_a_sentence(sections):
    expected = set()
    for method in METHODS:
        for optimizer in OPTIMIZERS:
            config = configfile.from_dict(
                GOOD | {"method": {"name": method}, "optimizer": {"name": optimizer}}
            )
            for name in config.flat():
                section, _, field = name.partition(".")
                choice = {"method": method, "optimizer": optimizer}.get(section)
                expected.add((None if field == "name" else choice, f"{section}.{field or section}"))
    described = fields(sections)
    assert set(described) == expected
    for name, field in described.items():
        assert field["meaning"][:1].isupper() and field["meaning"].endswith("."), name
        assert len(field["meaning"].split()) > 3, name
        assert field["values"] not in ("", "any value"), name
    for part in sections:
        assert part["meaning"].endswith("."), part


def test_defaults_units_and_what_may_change_are_those_of_the_models(sections):
    described = fields(sections)
    flat = configfile.from_dict(GOOD).flat()
    for (choice, name), field in described.items():
        if choice in (None, "dqt", "adamw") and name not in ("data.path", "model.preset"):
            assert field["default"] == flat[name], name
    assert described[None, "data.path"]["required"]
    assert described["lion", "optimizer.lr"]["default"] == 2e-4
    assert described["lion", "optimizer.lr"]["meaning"] == described["adamw", "optimizer.lr"]["meaning"]
    units = {"train.batch_tokens": "tokens", "train.micro_batch": "samples", "train.save_every": "steps"}
    units |= {"cluster.hang_timeout": "seconds", "data.seq_len": "tokens", "train.keep_last": "checkpoints"}
    assert {name: described[None, name]["unit"] for name in units} == units
    assert described[None, "train.save_every"]["may_change"] and described[None, "run.dir"]["may_change"]
    assert not described[None, "train.steps"]["may_change"]
    assert [part["section"] for part in sections if part["may_change"]] == ["cluster", "tracking"]


@pytest.mark.parametrize(
    ("name", "words"),
    {
        "train.steps": "whole number from 1 up",
        "run.seed": "whole number from 0 up",
        "model.layers": "whole number from 1 to 4,096 or null",
        "model.norm_eps": "number from 1e-20 to 1",
        "model.preset": "tiny, 13m, 130m, 320m, 1b, 7b, 70b or null",
        "schedule.switch_at": "number above 0, below 1",
        "schedule.second_lr_ratio": "number above 0, at most 1",
        "zero.stage": "0, 1, 2, 3 or null",
        "train.reproducible": "true or false",
        "train.max_grad_ratio": "number above 1",
        "data.cache": "path or null",
        "cluster.cpus_per_worker": "number above 0, at most 4,096",
        "cluster.gpus_per_worker": "auto, 0 or 1",
        "cluster.hang_timeout": "auto or number from 1 up",
        "tracking.mlflow": "text or null",
        "precision.compute": "bf16 or fp32",
        "precision.matmul": "auto, bf16, int8 or fp8",
        "precision.grad_input": "auto or int8",
        "method.name": "dqt, flip, bitnet, trilm, tequila, tbt, dense",
    }.items(),
)
def test_types_are_said_in_words(name, words, sections):
    assert fields(sections)[None, name]["values"] == words


def test_the_page_is_current(sections):
    """It is written by `lowbit config --markdown > configs/REFERENCE.md`."""
    assert PAGE.read_text() == reference.page(sections)


def test_the_schema_takes_what_the_reader_takes(valid):
    for path in (ROOT / "configs").glob("*.yaml"):
        if not path.stem.startswith("sweep-"):
            assert valid(read_yaml(path)), path
    for method, optimizer in zip(METHODS, itertools.cycle(OPTIMIZERS), strict=False):
        chosen = {"method": {"name": method}, "optimizer": {"name": optimizer}}
        written = configfile.from_dict(GOOD | chosen).to_dict()
        assert valid(json.loads(json.dumps(written))), method
    for content in (
        {"train": None},
        {"method": {"grid": "int8"}},
        {"optimizer": {"lr": 1}},
        {"cluster": {"workers": {"min": 1, "max": 4}, "gpus_per_worker": 1, "hang_timeout": 90}},
        {"cluster": {"cpus_per_worker": 0.25}},
    ):
        configfile.from_dict(GOOD | content)
        assert valid(GOOD | content), content


@pytest.mark.parametrize(
    "content",
    [
        {"data": {}},
        {"data": None},
        {"nothing": {}},
        {"train": {"stesp": 5}},
        {"train": {"steps": 0}},
        {"train": {"steps": "300"}},
        {"train": {"reproducible": "yes"}},
        {"precision": "fp16"},
        {"method": {"name": "dense", "grid": "int8"}},
        {"method": {"name": "dgt"}},
        {"method": {"grid": "int5"}},
        {"optimizer": {"name": "lion", "eps": 1e-8}},
        {"optimizer": {"betas": [0.9, 1.0]}},
        {"cluster": {"cpus_per_worker": 0}},
        {"cluster": {"hang_timeout": 0.5}},
        {"cluster": {"workers": {"min": 1}}},
    ],
    ids=str,
)
def test_the_schema_refuses_what_the_reader_refuses(content, valid):
    with pytest.raises(configfile.ConfigError):
        configfile.from_dict(GOOD | content)
    assert not valid(GOOD | content)


def test_methods_and_optimizers_from_outside_are_described_as_ones_own(installed, lowbit):
    done = lowbit("config", "sign", "--json")
    (sign,) = json.loads(done.stdout)["sections"]
    assert sign["meaning"].startswith("Sign weights: latent float weights")
    assert [(field["name"], field["default"]) for field in sign["fields"]] == [("clip", 1.0)]
    sections = json.loads(lowbit("config", "momentum", "--json").stdout)["sections"]  # Muon has a field of it
    (momentum,) = (part for part in sections if part["choice"] == "momentum")
    inside = {field["name"]: field for field in momentum["fields"]}
    assert inside["lr"]["default"] == 0.1 and inside["states"]["values"] == "fp32 or bf16"
    assert inside["lr"]["meaning"].startswith("The peak of the learning rate")
    assert inside["states"]["meaning"].startswith("What the optimizer's states are kept in")
    schema = json.loads(lowbit("config", "--schema").stdout)
    valid = jsonschema.Draft202012Validator(schema).is_valid
    assert valid(GOOD | {"method": {"name": "sign", "clip": 2}})
    assert not valid(GOOD | {"method": {"name": "sign", "grid": "int8"}})


def test_a_package_that_cannot_be_imported_hides_no_other(tmp_path, monkeypatch, lowbit):
    package(tmp_path, "lowbit-broken", "1 / 0", methods={"broken": "Broken"})
    monkeypatch.syspath_prepend(tmp_path)
    done = lowbit("config", "method")
    assert done.returncode == 0, done.stderr
    assert "ZeroDivisionError" in done.stdout and "grid: ternary" in done.stdout
    done = lowbit("config", "--schema")
    assert done.returncode == 0 and "ZeroDivisionError" in done.stderr
    assert "broken" not in json.loads(done.stdout)["$defs"]


def test_a_part_is_shown_alone(lowbit):
    def shown(*arguments):
        done = lowbit("config", *arguments, "--json")
        assert done.returncode == 0, done.stderr
        return [
            (part["section"], part["choice"], [field["name"] for field in part["fields"]])
            for part in json.loads(done.stdout)["sections"]
        ]

    assert shown("zero") == [("zero", None, ["residency", "stage"])]
    assert shown("train.steps") == [("train", None, ["steps"])]
    assert shown("method.grid") == [("method", name, ["grid"]) for name in ("dqt", "flip")]
    assert shown("grid") == shown("method.grid")
    assert shown("precision") == [("precision", None, ["compute", "matmul", "grad_input"])]
    assert [part[:2] for part in shown("optimizer")] == [
        ("optimizer", None), ("optimizer", "adafactor"), ("optimizer", "adamw"), ("optimizer", "lion"),
        ("optimizer", "muon"), ("optimizer", "rmsprop"),
    ]  # fmt: skip
    assert [part[0] for part in shown("name")] == ["run", "method", "optimizer", "schedule"]
    text = lowbit("config", "train.batch_tokens").stdout
    for words in ("train:", "batch_tokens: 8192", "over all workers", "whole number from 1 up (tokens)"):
        assert words in text


@pytest.mark.parametrize(
    ("name", "words"),
    {
        "epochs": "unknown name 'epochs'; write train.steps",
        "train.stesp": "train: unknown name 'stesp'; did you mean 'steps'?",
        "method.gird": "method: unknown name 'gird'; did you mean 'grid'?",
        "method.qqqqqq": "method: unknown name 'qqqqqq'; known names are name, grid",
        "trian": "unknown name 'trian'; did you mean 'train'?",
    }.items(),
)
def test_a_name_that_there_is_not_is_answered(name, words, lowbit):
    done = lowbit("config", name)
    assert (done.returncode, done.stdout) == (2, "")
    (line,) = done.stderr.splitlines()
    assert words in line


def test_the_page_and_the_schema_come_from_the_command_line(lowbit, sections):
    part = lowbit("config", "zero", "--markdown").stdout
    assert part.startswith("## `zero`") and part.rstrip() in PAGE.read_text()
    done = lowbit("config", "train", "--schema")
    assert done.returncode == 2 and "write lowbit config --schema alone" in done.stderr


def test_a_section_without_methods_is_shown_at_once():
    code = (
        "import sys; sys.argv = ['lowbit', 'config', 'train']\n"
        "from lowbit_dist.cli import main\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert "steps: 300" in done.stdout and (done.stdout + done.stderr).strip().endswith("False")

"""Configurations: what is read, what is refused and with which words."""

import math
import os
import re
import subprocess
import sys
import typing
from pathlib import Path

import pytest
import yaml
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from lowbit_dist import configfile
from lowbit_dist.config import PRESETS, ConfigError, Model, RunConfig, Schedule, Train
from lowbit_dist.methods import METHODS
from lowbit_dist.optim import OPTIMIZERS

ROOT = Path(__file__).parents[1]
GOOD = "data: {path: data/stdlib}\n"


def load(tmp_path: Path, text: str = GOOD, *overrides: str) -> RunConfig:
    path = tmp_path / "run.yaml"
    path.write_text(text, encoding="utf-8")
    return configfile.load(path, overrides)


def refused(tmp_path: Path, text: str, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, text, *overrides)
    return str(caught.value).replace(str(tmp_path) + os.sep, "")


def test_every_field_has_a_default_but_the_data_path(tmp_path):
    config = load(tmp_path)
    assert config.flat() == {
        "run.name": "run", "run.seed": 0, "run.dir": "runs", "run.with_states": False, "run.from": None,
        "model.preset": "tiny", "model.hidden_size": None, "model.intermediate_size": None,
        "model.layers": None, "model.heads": None, "model.kv_heads": None, "model.pretrained": None,
        "model.max_seq_len": 2048, "model.rope_theta": 10000.0, "model.norm_eps": 1e-5,
        "model.tie_embeddings": False,
        "method.name": "dqt", "method.grid": "ternary", "method.rules": "paper", "method.tensors": "linears",
        "method.scale": "absmean", "method.granularity": "tensor", "method.group": 128,
        "method.range_factor": None, "method.forward": "stored", "method.forward_from": 0.0,
        "method.rounding_anneal": None,
        "method.activation_bits": 8, "method.sub_norms": False,
        "data.path": "data/stdlib", "data.seq_len": 256, "data.tokenizer": None, "data.cache": None,
        "data.document_mask": False,
        "optimizer.name": "adamw", "optimizer.lr": 1e-3, "optimizer.linear_lr_ratio": 1.0,
        "optimizer.betas": [0.9, 0.95], "optimizer.eps": 1e-8, "optimizer.eps_before_correction": False,
        "optimizer.weight_decay": 0.01, "optimizer.states": "int8",
        "schedule.name": "cosine", "schedule.warmup_steps": 50, "schedule.min_lr_ratio": 0.1,
        "schedule.decay_share": 0.2, "schedule.switch_at": 0.5, "schedule.second_lr_ratio": 0.667,
        "schedule.weight_decay_until": None,
        "precision.compute": "bf16", "precision.matmul": "auto", "precision.grad_input": "auto",
        "zero.residency": "sharded", "zero.stage": None,
        "train.steps": 300, "train.batch_tokens": 8192, "train.micro_batch": 8, "train.clip_norm": 1.0,
        "train.activation_checkpointing": False, "train.reproducible": False, "train.gradient_release": False,
        "train.compile": "off",
        "train.log_every": 10,
        "train.eval_every": 100, "train.eval_samples": 256, "train.save_every": 100, "train.keep_last": 3,
        "train.keep_every": None, "train.max_skipped": 20, "train.max_grad_ratio": 1000.0,
        "train.on_spike": "warn",
        "cluster.workers": 2, "cluster.cpus_per_worker": 1, "cluster.gpus_per_worker": "auto",
        "cluster.max_failures": 10, "cluster.hang_timeout": "auto", "cluster.start_timeout": "auto",
        "tracking.mlflow": "sqlite:///mlflow.db", "tracking.experiment": "lowbit",
        "tracking.wandb": None, "tracking.tensorboard": False,
    }  # fmt: skip
    assert config.run_dir == Path("runs/run")


def test_the_configuration_of_the_design_is_read(tmp_path):
    design = """
run:       {name: quickstart, seed: 0, dir: runs}
model:     {preset: tiny}          # or five sizes; or pretrained: PATH
method:    {name: dqt, grid: ternary, tensors: linears, scale: absmean, granularity: tensor,
            activation_bits: 8}
data:      {path: data/stdlib, seq_len: 256}
optimizer: {name: adamw, lr: 1.0e-3, betas: [0.9, 0.95], weight_decay: 0.01, states: int8}
schedule:  {name: cosine, warmup_steps: 50}
precision: bf16                    # or fp32
zero:      {residency: sharded}    # or replicated; `stage: 0..3` for latent-weight methods
train:     {steps: 300, batch_tokens: 8192, micro_batch: 8, clip_norm: 1.0, activation_checkpointing: false,
            reproducible: false, log_every: 10, eval_every: 100, save_every: 100, keep_last: 3}
cluster:   {workers: 2, cpus_per_worker: 1, gpus_per_worker: auto, max_failures: 10, hang_timeout: auto}
tracking:  {mlflow: sqlite:///mlflow.db, experiment: lowbit}
"""
    config = load(tmp_path, design)
    assert config == load(tmp_path, GOOD, "run.name=quickstart")
    shorter = load(tmp_path, design, "train.steps=20", "method.grid=int8")
    assert (shorter.train.steps, shorter.method.grid) == (20, "int8")


def test_a_word_for_precision_is_short_for_a_section(tmp_path):
    """As in the configurations of earlier runs, which resume."""
    for word, section in {
        "bf16": "{compute: bf16, matmul: auto}", "fp32": "{compute: fp32}", "fp8": "{matmul: fp8}", "": "{}"
    }.items():  # fmt: skip
        of_word = load(tmp_path, GOOD + f"precision: {word}")
        of_section = load(tmp_path, GOOD + f"precision: {section}")
        assert of_word == of_section and not of_word.differences(of_section)
    changed = load(tmp_path, GOOD + "precision: fp32", "precision.matmul=int8")
    assert changed.to_dict()["precision"] == {"compute": "fp32", "matmul": "int8", "grad_input": "auto"}
    assert configfile.changed(of_word, {"precision": "fp32"}).precision.compute == "fp32"
    assert configfile.from_dict(changed.to_dict()) == changed
    assert of_word.differences(changed) == [
        "precision.compute: bf16 -> fp32", "precision.matmul: auto -> int8"
    ]  # fmt: skip


READ = {
    # override: (field, value)
    "optimizer.lr=1e-3": ("optimizer.lr", 1e-3),
    "optimizer.lr=3E-4": ("optimizer.lr", 3e-4),
    "optimizer.lr=.5": ("optimizer.lr", 0.5),
    "optimizer.lr=1": ("optimizer.lr", 1.0),
    "optimizer.betas=[0.9,0.99]": ("optimizer.betas", [0.9, 0.99]),
    "train.steps=1_000": ("train.steps", 1000),
    "train.steps=0x10": ("train.steps", 16),
    "train.steps=010": ("train.steps", 10),
    "train.steps = 7": None,
    "run.name=2024": ("run.name", "2024"),
    "run.name=2024-01-31": ("run.name", "2024-01-31"),
    "run.name=no": ("run.name", "no"),
    "run.name=1e5": ("run.name", "1e5"),
    "run.name='7b'": ("run.name", "7b"),
    "data.path=s3://bucket/set=1/a": ("data.path", "s3://bucket/set=1/a"),
    "data.path=a: b": ("data.path", "a: b"),
    "data.cache=null": ("data.cache", None),
    "data.cache=/tmp/x": ("data.cache", "/tmp/x"),
    "tracking.mlflow=null": ("tracking.mlflow", None),
    "tracking.experiment=10%": ("tracking.experiment", "10%"),
    "method.activation_bits=null": ("method.activation_bits", None),
    "cluster.gpus_per_worker=1": ("cluster.gpus_per_worker", 1),
    "cluster.gpus_per_worker=0": ("cluster.gpus_per_worker", 0),
    "cluster.cpus_per_worker=0.25": ("cluster.cpus_per_worker", 0.25),
    "cluster.hang_timeout=90": ("cluster.hang_timeout", 90),
    "train.clip_norm=0": ("train.clip_norm", 0.0),
    "run.seed=9223372036854775807": ("run.seed", 2**63 - 1),
    "optimizer={states: bf16}": ("optimizer.states", "bf16"),
    "precision=fp32": ("precision.compute", "fp32"),
    "precision=fp8": ("precision.matmul", "fp8"),
    "precision.matmul=int8": ("precision.matmul", "int8"),
    "precision={matmul: int8, grad_input: int8}": ("precision.grad_input", "int8"),
    "precision={compute: fp32, matmul: int8}": ("precision.compute", "fp32"),
    "model={hidden_size: 512, intermediate_size: 768, layers: 2, heads: 8, kv_heads: 2}": ("model.heads", 8),
    "model.pretrained=some/model": ("model.pretrained", "some/model"),
}


@pytest.mark.parametrize("override", READ)
def test_an_override_is_read_and_written_back(tmp_path, override):
    expected = READ[override]
    name, value = expected or ("train.steps", 7)
    config = load(tmp_path, GOOD, override)
    assert config.flat()[name] == value
    assert type(config.flat()[name]) is type(value)
    assert load(tmp_path, config.to_yaml()) == config
    assert configfile.from_dict(config.to_dict()) == config


def test_the_last_of_equal_overrides_counts_and_overrides_beat_the_file(tmp_path):
    text = GOOD + "train: {steps: 5}\n"
    assert load(tmp_path, text).train.steps == 5
    assert load(tmp_path, text, "train.steps=6", "train.steps=7").train.steps == 7


def test_an_empty_section_has_its_defaults(tmp_path):
    assert load(tmp_path, GOOD + "train:\n  # steps: 5\n") == load(tmp_path)


def test_the_default_schedule_may_outlast_a_short_run_and_that_is_remarked(tmp_path):
    assert load(tmp_path).remarks() == []
    assert load(tmp_path, GOOD, "train.steps=20").remarks() == [
        "schedule.warmup_steps (50) is longer than the run of 20 steps: the learning rate ends at 40% of "
        "optimizer.lr"
    ]


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_is_a_shape_that_explicit_sizes_could_have(name):
    sizes = Model(preset=name).sizes()
    assert sizes == PRESETS[name]
    explicit = Model(**sizes._asdict())
    assert explicit.sizes() == sizes


def test_any_width_that_the_heads_divide_is_a_shape():
    """Whether low-bit weights of it can be packed depends on the method, and is said by `model.py`."""
    for hidden, intermediate, heads, kv_heads in ((896, 4864, 14, 2), (576, 1536, 9, 3), (10, 7, 5, 1)):
        model = Model(
            hidden_size=hidden, intermediate_size=intermediate, layers=2, heads=heads, kv_heads=kv_heads
        )
        assert model.sizes() == (hidden, intermediate, 2, heads, kv_heads)


def test_presets_have_the_parameters_of_their_names():
    def parameters(name: str, vocabulary: int) -> float:
        hidden, intermediate, layers, heads, kv_heads = PRESETS[name]
        attention = 2 * hidden * hidden + 2 * hidden * (hidden // heads * kv_heads)
        return (layers * (attention + 3 * hidden * intermediate) + 2 * vocabulary * hidden) / 1e6

    assert parameters("13m", 0) == pytest.approx(13, rel=0.05)
    for name, millions in {"130m": 130, "320m": 320, "1b": 1100, "7b": 6738, "70b": 68976}.items():
        assert parameters(name, 32_000) == pytest.approx(millions, rel=0.04), name


def test_a_pretrained_model_has_sizes_of_its_own(tmp_path):
    assert load(tmp_path, GOOD, "model.pretrained=x").model.sizes() is None


def test_accumulation_shares_a_step_between_the_workers(tmp_path):
    config = load(tmp_path, GOOD, "train.batch_tokens=24576")
    assert config.micro_batches == 12
    assert [config.accumulation(world) for world in (1, 2, 3, 4)] == [12, 6, 4, 3]
    with pytest.raises(
        ConfigError, match=r"a multiple of 10,240 = micro_batch 8 x seq_len 256 x 5 workers; "
    ):
        config.accumulation(5)


@pytest.mark.parametrize(
    "batch, nearest", [(1, 4096), (6143, 4096), (6144, 8192), (8000, 8192), (10239, 8192), (10241, 12288)]
)
def test_the_nearest_batch_is_named(tmp_path, batch, nearest):
    message = refused(tmp_path, GOOD, f"train.batch_tokens={batch}")
    assert message.endswith(f"; the nearest is {nearest:,}")
    assert load(tmp_path, GOOD, f"train.batch_tokens={nearest}")


@pytest.mark.parametrize(
    "field", ["run.dir", "data.path", "data.cache", "data.tokenizer", "model.pretrained"]
)
def test_home_is_written_out_in_every_path(tmp_path, monkeypatch, field):
    monkeypatch.setenv("HOME", "/home/someone")
    section, _, name = field.partition(".")
    text = "data: {path: x}\n" if section != "data" else ""
    own = f"path: x, {name}" if section == "data" and name != "path" else name
    for config in (
        load(tmp_path, text + f"{section}: {{{own}: ~/a b}}\n"),
        load(tmp_path, GOOD, f"{field}=~/a b"),
    ):
        assert config.flat()[field] == "/home/someone/a b"
        assert load(tmp_path, config.to_yaml()) == config
    assert load(tmp_path, GOOD, f"{field}=a~b/~").flat()[field] == "a~b/~"


def test_home_is_written_out_in_a_tracking_uri(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", "/home/someone")
    for uri, expected in {
        "sqlite:///~/mlflow.db": "sqlite:////home/someone/mlflow.db",
        "~/mlruns": "/home/someone/mlruns",
        "sqlite:///a/~b.db": "sqlite:///a/~b.db",
        "http://host/~user": "http://host/~user",
    }.items():
        assert load(tmp_path, GOOD, f"tracking.mlflow={uri}").tracking.mlflow == expected


def test_a_user_without_a_home_is_told_so(tmp_path, monkeypatch):
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)
    rule = "must not begin with ~: this user has no home folder; write the whole path"
    assert refused(tmp_path, GOOD, "run.dir=~/runs") == f"run.dir ('~/runs') {rule}"
    assert refused(tmp_path, "data: {path: '~'}\n") == f"data.path ('~') {rule}"
    assert load(tmp_path, GOOD, "run.dir=~other/runs").run.dir == Path("~other/runs")


def test_a_number_is_text_where_text_is_meant(tmp_path):
    assert load(tmp_path, GOOD, "tracking.mlflow=2024").tracking.mlflow == "2024"


def test_a_configuration_never_changes(tmp_path):
    config = load(tmp_path)
    with pytest.raises(Exception, match="frozen"):
        config.train.steps = 1
    with pytest.raises(Exception, match="frozen"):
        config.method.grid = "int8"
    assert hash(config) == hash(load(tmp_path))


def test_a_run_is_resumed_with_other_places_and_intervals_only(tmp_path):
    old = load(tmp_path)
    same = load(
        tmp_path, GOOD, "cluster.workers=1", "cluster.max_failures=0", "tracking.mlflow=null",
        "run.dir=elsewhere", "tracking.experiment=x", "train.log_every=1", "train.eval_every=2",
        "train.save_every=3", "train.keep_last=4", "train.keep_every=6", "train.max_skipped=7",
        "train.max_grad_ratio=10", "train.on_spike=rollback", "data.cache=c", "data.path=y",
        "data.tokenizer=t",
    )  # fmt: skip
    assert old.differences(same) == []
    other = load(
        tmp_path, GOOD, "train.steps=20", "train.eval_samples=1", "run.seed=1", "optimizer.betas=[0,0.5]",
        "precision=fp32", "method.activation_bits=null",
    )  # fmt: skip
    assert old.differences(other) == [
        "run.seed: 0 -> 1",
        "method.activation_bits: 8 -> null",
        "optimizer.betas: [0.9, 0.95] -> [0.0, 0.5]",
        "precision.compute: bf16 -> fp32",
        "train.steps: 300 -> 20",
        "train.eval_samples: 256 -> 1",
    ]
    assert old.differences(load(tmp_path, GOOD, "method.name=bitnet")) == [
        "method.name: dqt -> bitnet",
        "method.grid: ternary -> absent",
        "method.rules: paper -> absent",
        "method.tensors: linears -> absent",
        "method.scale: absmean -> absent",
        "method.granularity: tensor -> absent",
        "method.group: 128 -> absent",
        "method.range_factor: null -> absent",
        "method.forward: stored -> absent",
        "method.forward_from: 0.0 -> absent",
        "method.rounding_anneal: null -> absent",
        "method.sub_norms: false -> true",
    ]
    assert load(tmp_path, GOOD, "method.activation_bits=null").differences(
        load(tmp_path, GOOD, "method.name=dense")
    ) == [
        "method.name: dqt -> dense",
        "method.grid: ternary -> absent",
        "method.rules: paper -> absent",
        "method.tensors: linears -> absent",
        "method.scale: absmean -> absent",
        "method.granularity: tensor -> absent",
        "method.group: 128 -> absent",
        "method.range_factor: null -> absent",
        "method.forward: stored -> absent",
        "method.forward_from: 0.0 -> absent",
        "method.rounding_anneal: null -> absent",
        "method.activation_bits: null -> absent",
        "method.sub_norms: false -> absent",
    ]
    assert load(tmp_path, GOOD, "method.name=dense").differences(
        load(tmp_path, GOOD, "method.name=dense", "optimizer.name=lion")
    ) == [
        "optimizer.name: adamw -> lion",
        "optimizer.lr: 0.001 -> 0.0002",
        "optimizer.betas: [0.9, 0.95] -> [0.9, 0.99]",
        "optimizer.eps: 1e-08 -> absent",
        "optimizer.eps_before_correction: false -> absent",
    ]


@pytest.mark.filterwarnings("ignore:Pydantic serializer warnings")
def test_what_decides_the_result_of_a_run_may_not_change(tmp_path):
    config = load(tmp_path)
    changeable = set()
    for name in config.flat():
        section, _, field = name.partition(".")
        value = getattr(config, section).model_copy(update={field: "other"}) if field else "other"
        other = config.model_copy(update={section: value})
        assert config.flat() != other.flat()
        if config.differences(other) == []:
            changeable.add(name)
    train = ("log_every", "eval_every", "save_every", "keep_last", "keep_every")
    train += ("max_skipped", "max_grad_ratio", "on_spike", "activation_checkpointing")
    by_content = ("data.path", "data.tokenizer", "model.pretrained")  # what lies there may not change
    assert changeable == {
        "run.dir", "data.cache", *by_content,
        *(f"train.{name}" for name in train),
        *(name for name in config.flat() if name.startswith(("cluster.", "tracking."))),
    }  # fmt: skip


@pytest.mark.parametrize(
    "path",
    sorted(set((ROOT / "configs").glob("*.yaml")) - set((ROOT / "configs").glob("sweep-*"))),
    ids=lambda path: path.stem,
)
def test_the_configurations_that_come_with_the_project_are_read(path):
    config = configfile.load(path)
    assert config.run.name == path.stem
    assert config.remarks() == []
    assert configfile.from_dict(yaml.safe_load(config.to_yaml()) | {"optimizer": {}})


def test_a_configuration_can_be_asked_for_before_anything_heavy_is_imported():
    code = (
        "import sys, lowbit_dist.configfile;"
        "print([m for m in ('torch', 'ray', 'mlflow') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.strip() == "[]"


YAML_RULE = "; write name: value, indented with spaces, text with signs in quotes"
ALL_SIZES = "hidden_size, intermediate_size, layers, heads, kv_heads"
SECTIONS = "run, model, method, data, optimizer, schedule, precision, zero, train, cluster, tracking"
NAME_RULE = "must be at most 100 letters, digits, '.', '_' and '-', a letter or digit first"
NO_PATH = (
    "data.path is required; write data: {path: FOLDER}, a folder or URL written by `lowbit data prepare`"
)


def sized(**changed: int) -> str:
    sizes = {"hidden_size": 512, "intermediate_size": 768, "layers": 2, "heads": 8, "kv_heads": 2, **changed}
    return GOOD + f"model: {sizes}\n".replace("'", "")


# (the file, overrides, the whole message)
BAD: dict[str, tuple[str, tuple[str, ...], str]] = {
    # names
    "a misspelt field": (
        GOOD + "train: {stesp: 5}", (),
        "train: unknown name 'stesp'; did you mean 'steps'?"),
    "a misspelt field in an override": (
        GOOD, ("optimizer.weight_dekay=0.1",),
        "optimizer: unknown name 'weight_dekay'; did you mean 'weight_decay'?"),
    "a misspelt section": (
        GOOD, ("trian.steps=5",),
        "unknown name 'trian'; did you mean 'train'?"),
    "a field at the top level": (
        GOOD + "steps: 5", (),
        "unknown name 'steps'; did you mean 'train.steps'?"),
    "a misspelt field at the top level": (
        GOOD, ("batch_token=8192",),
        "unknown name 'batch_token'; did you mean 'train.batch_tokens'?"),
    "a field of another section": (
        GOOD, ("train.seq_len=128",),
        "train: unknown name 'seq_len'; did you mean 'data.seq_len'?"),
    "a misspelt field of another section": (
        GOOD, ("train.residancy=sharded",),
        "train: unknown name 'residancy'; did you mean 'zero.residency'?"),
    "a name that is a little like one of another section": (
        GOOD, ("run.notes=x",),
        "run: unknown name 'notes'; known names are name, seed, dir, with_states, from"),
    "a part of a name of another section": (
        GOOD, ("data.timeout=5",),
        "data: unknown name 'timeout'; known names are path, seq_len, tokenizer, document_mask, "
        "cache"),
    "a name from elsewhere at the top level": (
        GOOD + "epochs: 3", (),
        "unknown name 'epochs'; write train.steps: an epoch is as many steps as the data's tokens / "
        "train.batch_tokens"),
    "a name from elsewhere that is like one here": (
        GOOD, ("train.batch_size=8",),
        "train: unknown name 'batch_size'; write train.batch_tokens, the tokens of a step over all workers "
        "(samples x data.seq_len), or train.micro_batch, the samples that a worker takes at once"),
    "a name from elsewhere in another spelling": (
        GOOD, ("optimizer.Learning-Rate=1",),
        "optimizer: unknown name 'Learning-Rate'; write optimizer.lr"),
    "what is not chosen here": (
        GOOD, ("train.gradient_accumulation_steps=8",),
        "train: unknown name 'gradient_accumulation_steps'; leave it out: it follows from train.batch_tokens "
        "/ (train.micro_batch x data.seq_len x cluster.workers)"),
    "a section inside a section": (
        GOOD + "run: {train: {steps: 5}}", (),
        "run: unknown name 'train'; train stands beside run, not in it: move it out"),
    "a name like no other": (
        GOOD, ("zero.qqqqqqqq=1",),
        "zero: unknown name 'qqqqqqqq'; known names are residency, stage"),
    "a section like no other": (
        GOOD + "qqqqqqqq: {}", (),
        f"unknown name 'qqqqqqqq'; known names are {SECTIONS}"),
    "a number for a name": (
        GOOD + "train: {5: 6}", (),
        "train: unknown name 5; known names are steps, batch_tokens, micro_batch, clip_norm, "
        "activation_checkpointing, reproducible, gradient_release, compile, log_every, eval_every, "
        "eval_samples, save_every, keep_last, keep_every, max_skipped, max_grad_ratio, on_spike"),
    "nothing for a name": (
        GOOD + "null: 6", (),
        f"unknown name null; known names are {SECTIONS}"),
    "a merge key": (
        GOOD + "<<: {train: {}}", (),
        f"unknown name '<<'; known names are {SECTIONS}"),
    # what is missing
    "no data at all": ("train: {steps: 5}", (), NO_PATH),
    "an empty file": ("", (), NO_PATH),
    "a data path of nothing": (GOOD, ("data.path=",), NO_PATH),
    # types
    "a word for a whole number": (
        GOOD, ("train.steps=ten",),
        "train.steps ('ten') must be a whole number; write one, for example 300"),
    "a quoted number": (
        GOOD + "train: {steps: '300'}", (),
        "train.steps ('300') must be a whole number; write one, for example 300"),
    "a fraction for a whole number": (
        GOOD, ("train.steps=1.5",),
        "train.steps (1.5) must be a whole number; write one, for example 300"),
    "a whole number written as a fraction": (
        GOOD, ("train.steps=3e2",),
        "train.steps (300.0) must be a whole number; write 300"),
    "true for a whole number": (
        GOOD, ("run.seed=true",),
        "run.seed (true) must be a whole number; write one, for example 0"),
    "nothing for a whole number": (
        GOOD + "train:\n  steps:\n", (),
        "train.steps (null) must be a whole number; write one, for example 300"),
    "a list for a whole number": (
        GOOD, ("train.steps=[1, 2, 3, 4, 5]",),
        "train.steps ([1, 2, 3, ...]) must be a whole number; write one, for example 300"),
    "a mapping for a whole number": (
        GOOD, ("train.steps={a: 1}",),
        "train.steps ({'a': 1}) must be a whole number; write one, for example 300"),
    "more digits than a number has": (
        GOOD, ("train.steps=" + "9" * 5000,),
        "train.steps ('" + "9" * 27 + "..." + "9" * 28 + "') must be a whole number; write one, "
        "for example 300"),
    "a word for a number": (
        GOOD, ("optimizer.lr=fast",),
        "optimizer.lr ('fast') must be a number; write one, for example 0.001"),
    "a comma for a point": (
        GOOD, ("optimizer.lr=0,001",),
        "optimizer.lr ('0,001') must be a number; write one, for example 0.001"),
    "yes for true": (
        GOOD, ("train.reproducible=yes",),
        "train.reproducible ('yes') must be true or false; write false"),
    "a number for true": (
        GOOD, ("train.activation_checkpointing=1",),
        "train.activation_checkpointing (1) must be true or false; write false"),
    "a number for text": (
        "data: {path: 2024}", (),
        'data.path (2,024) must be text; put it in quotes: "2024"'),
    "a number for a path": (
        GOOD + "data: {}".replace("data", "run").replace("{}", "{dir: 7}"), (),
        'run.dir (7) must be the path of a file or folder; put it in quotes: "7"'),
    "a list for a path": (
        "data: {path: x, tokenizer: [a]}", (),
        "data.tokenizer (['a']) must be the path of a file or folder; write a word or a path"),
    "a scalar for a section": (
        GOOD + "train: 5", (),
        "train (5) must be a section of names and values; write train: {steps: 300}"),
    "a list for a section": (
        "data: [path, x]", (),
        "data (['path', 'x']) must be a section of names and values; write data: {path: data/stdlib}"),
    "a word for the method": (
        GOOD, ("method=dense",),
        "method ('dense') must be a section of names and values; write method: {name: dqt}"),
    "an override inside a section that is none": (
        GOOD + "train: fast", ("train.steps=3",),
        "train ('fast') must be a section of names and values; write train: {steps: 300}"),
    "a number for precision": (
        GOOD + "precision: 16", (),
        "precision (16) must be a section of names and values; write precision: {compute: bf16}"),
    # ranges
    "not a number": (
        GOOD, ("optimizer.lr=.nan",),
        "optimizer.lr (nan) must be a finite number; write one, for example 0.001"),
    "infinity": (
        GOOD, ("train.clip_norm=.inf",),
        "train.clip_norm (inf) must be a finite number; write one, for example 1.0"),
    "a number that overflows": (
        GOOD, ("optimizer.weight_decay=1e999",),
        "optimizer.weight_decay (inf) must be a finite number; write one, for example 0.01"),
    "a negative learning rate": (
        GOOD, ("optimizer.lr=-1e-3",),
        "optimizer.lr (-0.001) must be at least 0; write 0 or more"),
    "negative clipping": (
        GOOD, ("train.clip_norm=-1",),
        "train.clip_norm (-1) must be at least 0; write 0 or more"),
    "zero steps": (
        GOOD, ("train.steps=0",),
        "train.steps (0) must be at least 1; write 1 or more"),
    "a negative micro-batch": (
        GOOD, ("train.micro_batch=-8",),
        "train.micro_batch (-8) must be at least 1; write 1 or more"),
    "never saving": (
        GOOD, ("train.save_every=0",),
        "train.save_every (0) must be at least 1; write 1 or more"),
    "keeping nothing": (
        GOOD, ("train.keep_last=0",),
        "train.keep_last (0) must be at least 1; write 1 or more"),
    "checkpoints kept that are never written": (
        GOOD, ("train.keep_every=250",),
        "train.keep_every (250) must be a multiple of train.save_every 100; the nearest is 300"),
    "a gradient ratio of one": (
        GOOD, ("train.max_grad_ratio=1",),
        "train.max_grad_ratio (1) must be more than 1; write one, for example 1000.0"),
    "an unknown answer to spikes": (
        GOOD, ("train.on_spike=rolback",),
        "train.on_spike ('rolback') must be one of warn, rollback; did you mean 'rollback'?"),
    "no workers": (
        GOOD, ("cluster.workers=0",),
        "cluster.workers (0) must be at least 1; write 1 or more"),
    "workers without processors": (
        GOOD, ("cluster.cpus_per_worker=0",),
        "cluster.cpus_per_worker (0) must be more than 0; write one, for example 1"),
    "not a number of processors": (
        GOOD, ("cluster.cpus_per_worker=.nan",),
        "cluster.cpus_per_worker (nan) must be a finite number; write one, for example 1"),
    "fewer than no GPUs": (
        GOOD, ("cluster.gpus_per_worker=-1",),
        "cluster.gpus_per_worker (-1) must be auto, 0 or 1: a worker has a GPU of its own or "
        "none; write auto"),
    "workers that share a GPU": (
        GOOD, ("cluster.gpus_per_worker=0.5",),
        "cluster.gpus_per_worker (0.5) must be auto, 0 or 1: a worker has a GPU of its own or "
        "none; write auto"),
    "workers of two GPUs": (
        GOOD, ("cluster.gpus_per_worker=2",),
        "cluster.gpus_per_worker (2) must be auto, 0 or 1: a worker has a GPU of its own or "
        "none; write auto"),
    "a misspelt auto": (
        GOOD, ("cluster.hang_timeout=atuo",),
        "cluster.hang_timeout ('atuo') must be auto, or a number of seconds from 1 up; write one, "
        "for example auto"),
    "a timeout that is not a number": (
        GOOD, ("cluster.hang_timeout=.nan",),
        "cluster.hang_timeout (nan) must be auto, or a number of seconds from 1 up; write one, for "
        "example auto"),
    "a negative seed": (
        GOOD, ("run.seed=-1",),
        "run.seed (-1) must be at least 0; write 0 or more"),
    "a seed of 64 bits": (
        GOOD, ("run.seed=9223372036854775808",),
        "run.seed (9223372036854775808) must be less than 9223372036854775808; write one, for example 0"),
    "a beta of one": (
        GOOD, ("optimizer.betas=[0.9, 1.0]",),
        "optimizer.betas[1] (1.0) must be less than 1; write one, for example [0.9, 0.95]"),
    "three betas": (
        GOOD, ("optimizer.betas=[0.9, 0.95, 0.99]",),
        "optimizer.betas ([0.9, 0.95, 0.99]) must be two numbers, like [0.9, 0.95]; write one, for example "
        "[0.9, 0.95]"),
    "betas that are one number": (
        GOOD, ("optimizer.betas=0.9",),
        "optimizer.betas (0.9) must be two numbers, like [0.9, 0.95]; write one, for example [0.9, 0.95]"),
    "betas that are words": (
        GOOD, ("optimizer.betas=[a, b]",),
        "optimizer.betas[0] ('a') must be a number; write one, for example [0.9, 0.95]"),
    "an epsilon that vanishes in float32": (
        GOOD, ("optimizer.eps=0",),
        "optimizer.eps (0) must be at least 1e-20; write 1e-20 or more"),
    "a learning rate that ends above its peak": (
        GOOD, ("schedule.min_lr_ratio=1.5",),
        "schedule.min_lr_ratio (1.5) must be at most 1; write 1 or less"),
    "a switch after the end": (
        GOOD, ("schedule.switch_at=1",),
        "schedule.switch_at (1) must be less than 1; write one, for example 0.5"),
    "a negative warm-up": (
        GOOD, ("schedule.warmup_steps=-5",),
        "schedule.warmup_steps (-5) must be at least 0; write 0 or more"),
    # choices
    "a misspelt method": (
        GOOD, ("method.name=dgt",),
        f"method.name ('dgt') must be one of {', '.join(METHODS)}; did you mean 'dqt'?"),
    "a method that is a list": (
        GOOD + "method: {name: [dqt]}", (),
        f"method.name (['dqt']) must be one of {', '.join(METHODS)}; write one of them, or install the "
        "package that brings it"),
    "a misspelt grid": (
        GOOD, ("method.grid=ternery",),
        "method.grid ('ternery') must be one of ternary, int2, int3, int4, int6, int8; did you mean "
        "'ternary'?"),
    "a grid that is a number": (
        GOOD, ("method.grid=8",),
        "method.grid (8) must be one of ternary, int2, int3, int4, int6, int8; write ternary, for example"),
    "activation bits that do not exist": (
        GOOD, ("method.activation_bits=4",),
        "method.activation_bits (4) must be one of 8, null; write 8, for example"),
    "a group that no scale serves": (
        GOOD, ("method={granularity: group, group: 100}",),
        "method.group (100) must be a multiple of 64; the nearest is 128"),
    "an option that is neither true nor false": (
        GOOD, ("method={name: bitnet, sub_norms: 1}",),
        "method.sub_norms (1) must be true or false; write true"),
    "a misspelt option of a method": (
        GOOD, ("method.gird=int8",),
        "method: unknown name 'gird'; did you mean 'grid'?"),
    "an option of another method": (
        GOOD + "method: {name: dqt, grid: int8}", ("method.name=dense",),
        "method: unknown name 'grid' for method dense; it belongs to dqt, flip: leave it out "
        "(method={name: dense} drops a file's other options)"),
    "an option of a method without options": (
        GOOD, ("method={name: dense, qqqqqqq: 1}",),
        "method: unknown name 'qqqqqqq'; method dense has no options"),
    "an option of no method": (
        GOOD, ("method.qqqqqqq=1",),
        "method: unknown name 'qqqqqqq'; method dqt has grid, rules, tensors, scale, granularity, "
        "group, range_factor, forward, forward_from, rounding_anneal, activation_bits, sub_norms"),
    "an option that stands elsewhere": (
        GOOD, ("method.residency=sharded",),
        "method: unknown name 'residency'; did you mean 'zero.residency'?"),
    "a section in a method": (
        GOOD, ("method={name: dqt, optimizer: {}}",),
        "method: unknown name 'optimizer'; optimizer stands beside method, not in it: move it out"),
    "a misspelt preset": (
        GOOD, ("model.preset=tinny",),
        "model.preset ('tinny') must be one of tiny, 13m, 130m, 320m, 1b, 7b, 70b, null; did you "
        "mean 'tiny'?"),
    "a precision that does not exist": (
        GOOD, ("precision=fp16",),
        "precision ('fp16') must be one of bf16, fp32, fp8, or a section; did you mean 'bf16'?"),
    "products that do not exist": (
        GOOD, ("precision.matmul=int4",),
        "precision.matmul ('int4') must be one of auto, bf16, int8, fp8; did you mean 'int8'?"),
    "products of fewer digits than their sums": (
        GOOD, ("precision={compute: fp32, matmul: fp8}",),
        "precision.matmul (fp8) must go with precision.compute bf16, not fp32; write precision.compute: "
        "bf16, or precision.matmul: auto"),
    "products of integers of weights that are none": (
        GOOD, ("precision.matmul=int8", "method={name: bitnet}"),
        "precision.matmul (int8) must go with a method whose weights are packed integers, such as dqt, not "
        "bitnet; write precision.matmul: auto"),
    "gradients in integers beside outputs in numbers": (
        GOOD, ("precision.grad_input=int8",),
        "precision.grad_input (int8) must go with precision.matmul int8, not auto; write precision.matmul: "
        "int8, or precision.grad_input: auto"),
    "a precision from elsewhere": (
        GOOD, ("precision=float32",),
        "precision ('float32') must be one of bf16, fp32, fp8, or a section; did you mean 'fp32'?"),
    "a grid from elsewhere": (
        GOOD, ("method.grid=1.58bit",),
        "method.grid ('1.58bit') must be one of ternary, int2, int3, int4, int6, int8; did you mean "
        "'ternary'?"),
    "states that do not exist": (
        GOOD, ("optimizer.states=int4",),
        "optimizer.states ('int4') must be one of fp32, bf16, int8; did you mean 'int8'?"),
    "another optimizer": (
        GOOD, ("optimizer.name=adam",),
        f"optimizer.name ('adam') must be one of {', '.join(OPTIMIZERS)}; did you mean 'adamw'?"),
    "an optimizer like no other": (
        GOOD, ("optimizer.name=zzz",),
        f"optimizer.name ('zzz') must be one of {', '.join(OPTIMIZERS)}; write one of them, or install the "
        "package that brings it"),
    "a module for an optimizer": (
        GOOD, ("optimizer.name=os:system",),
        f"optimizer.name ('os:system') must be one of {', '.join(OPTIMIZERS)}; write one of them, or install "
        "the package that brings it"),
    "an option of another optimizer": (
        GOOD, ("optimizer={name: lion, eps: 1e-8}",),
        "optimizer: unknown name 'eps' for optimizer lion; it belongs to adafactor, adamw, rmsprop: "
        "leave it out (optimizer={name: lion} drops a file's other options)"),
    "an option of no optimizer": (
        GOOD, ("optimizer.qqqqqqq=1",),
        "optimizer: unknown name 'qqqqqqq'; optimizer adamw has lr, linear_lr_ratio, weight_decay, states, "
        "betas, eps, eps_before_correction"),
    "an option of the run in an optimizer": (
        GOOD, ("optimizer={name: lion, steps: 5}",),
        "optimizer: unknown name 'steps'; did you mean 'train.steps'?"),
    "a word for the optimizer": (
        GOOD, ("optimizer=lion",),
        "optimizer ('lion') must be a section of names and values; write optimizer: {name: adamw}"),
    "a schedule with a hyphen": (
        GOOD, ("schedule.name=two-stage",),
        "schedule.name ('two-stage') must be one of cosine, linear, constant, wsd, two_stage; did "
        "you mean 'two_stage'?"),
    "a ZeRO stage that does not exist": (
        GOOD, ("zero.stage=4",),
        "zero.stage (4) must be one of 0, 1, 2, 3, null; write 0, for example"),
    # names of runs, and text
    "a run name with a path in it": (
        GOOD, ("run.name=../other",),
        f"run.name ('../other') {NAME_RULE}; write 'other', for example"),
    "a run name with spaces": (
        GOOD, ("run.name=my first run",),
        f"run.name ('my first run') {NAME_RULE}; write 'my-first-run', for example"),
    "a run name with a line in it": (
        GOOD + 'run: {name: "a\\n"}', (),
        f"run.name ('a\\n') {NAME_RULE}; write 'a', for example"),
    "an empty run name": (
        GOOD + "run: {name: ''}", (),
        f"run.name ('') {NAME_RULE}; write 'my-run', for example"),
    "a run name that is a number": (
        GOOD + "run: {name: 13}", (),
        'run.name (13) must be text; put it in quotes: "13"'),
    "an empty data path": (
        "data: {path: ' '}", (),
        "data.path (' ') must not be empty; write one, for example data/stdlib"),
    "a data path with a null character": (
        'data: {path: "a\\0b"}', (),
        "data.path ('a\\x00b') must be printable text: no control characters, no blank but the space; "
        "write one, for example data/stdlib"),
    "half of a character": (
        'data: {path: "\\ud800"}', (),
        "data.path ('\\ud800') must be printable text: no control characters, no blank but the space; "
        "write one, for example data/stdlib"),
    # sizes of the model
    "some of the sizes": (
        GOOD, ("model={hidden_size: 512, heads: 8}",),
        "model.intermediate_size is required beside model.hidden_size (512): sizes are given all "
        "together; add "
        "intermediate_size, layers, kv_heads, or write one of the presets tiny, 13m, 130m, 320m, "
        "1b, 7b, 70b"),
    "a size beside a preset": (
        GOOD, ("model={preset: tiny, layers: 8}",),
        "model.layers (8) must not stand beside model.preset (tiny), which says every size; leave it out, or "
        f"write model.preset: null and all of {ALL_SIZES}"),
    "a size beside a pretrained model": (
        GOOD, ("model={pretrained: some/model, heads: 8}",),
        "model.heads (8) must not stand beside model.pretrained (some/model), which says every "
        "size; leave it "
        f"out, or write model.pretrained: null and all of {ALL_SIZES}"),
    "a preset beside a pretrained model": (
        GOOD + "model: {preset: tiny}", ("model.pretrained=some/model",),
        "model.preset (tiny) must not stand beside model.pretrained (some/model): both say the "
        "model's shape; "
        "leave one out, or write it as null"),
    "heads that do not divide": (
        sized(heads=7), (),
        "model.heads (7) must divide hidden_size 512 into heads of an even size (rotary embedding "
        "turns pairs); "
        "the nearest is 8"),
    "heads of one element": (
        sized(heads=512, kv_heads=512), (),
        "model.heads (512) must divide hidden_size 512 into heads of an even size (rotary "
        "embedding turns pairs); "
        "the nearest is 256"),
    "key heads that do not divide": (
        sized(kv_heads=3), (),
        "model.kv_heads (3) must divide model.heads 8; the nearest is 4"),
    "more key heads than heads": (
        sized(kv_heads=16), (),
        "model.kv_heads (16) must divide model.heads 8; the nearest is 8"),
    "no layers": (
        sized(layers=0), (),
        "model.layers (0) must be at least 1; write 1 or more"),
    # parts that do not fit together
    "a batch that is not divisible": (
        GOOD, ("train.batch_tokens=8000",),
        "train.batch_tokens (8,000) must be a multiple of 4,096 = micro_batch 8 x seq_len 256 x 2 workers; "
        "the nearest is 8,192"),
    "a batch that three workers cannot share": (
        GOOD, ("cluster.workers=3",),
        "train.batch_tokens (8,192) must be a multiple of 6,144 = micro_batch 8 x seq_len 256 x 3 workers; "
        "the nearest is 6,144"),
    "a batch below one pass of one worker": (
        GOOD, ("train.batch_tokens=100", "cluster.workers=1"),
        "train.batch_tokens (100) must be a multiple of 2,048 = micro_batch 8 x seq_len 256 x 1 worker; "
        "the nearest is 2,048"),
    "a sequence longer than the model's": (
        GOOD, ("data.seq_len=4096",),
        "data.seq_len (4,096) must be at most model.max_seq_len 2,048; write data.seq_len: 2048 or "
        "model.max_seq_len: 4096"),
    "a stage for packed codes": (
        GOOD, ("zero.stage=3",),
        "zero.stage (3) must be left out for method dqt, whose packed codes always run under "
        "packed ZeRO-3; it is "
        "for methods with latent weights, such as dense"),
    "replicated weights that are not packed": (
        GOOD, ("method={name: bitnet}", "zero.residency=replicated"),
        "zero.residency (replicated) must be sharded for method bitnet: only packed codes can be replicated; "
        "write zero.stage: 2 to keep whole weights on every worker"),
    "eight-bit states under stage 2": (
        GOOD, ("method={name: dense}", "zero.stage=2"),
        "optimizer.states (int8) must not be used with zero.stage 2: blocks of 256 elements cannot follow "
        "DeepSpeed's flat stage-1/2 partitions; write zero.stage: 3 or optimizer.states: fp32"),
    "gradients that would be added up in bf16": (
        GOOD, ("method={name: dense}", "zero.stage=1", "optimizer.states=fp32"),
        "zero.stage (1) must not be used with precision bf16 and 2 micro-batches a worker, whose gradients "
        "DeepSpeed would add up in bf16; write zero.stage: 2, which adds them up in float32, or 3, or "
        "precision: fp32"),
    "reproducible in bf16": (
        GOOD, ("train.reproducible=true",),
        "train.reproducible (true) must go with precision fp32, not bf16: rounded to bf16, "
        "gradients depend on "
        "the number of workers; write precision: fp32"),
    "reproducible under stage 2": (
        GOOD, ("method={name: dense}", "zero.stage=2", "optimizer.states=fp32", "precision=fp32",
               "train.reproducible=true"),
        "train.reproducible (true) must not be used with zero.stage 2, where DeepSpeed sums gradients "
        "in float32, in an order of its own; write zero.stage: 3"),
    # YAML
    "a bracket that stays open": (
        GOOD + "train: {steps: 5\n", (),
        "run.yaml line 3, column 1: expected ',' or '}', but got '<stream end>'" + YAML_RULE),
    "a tab": (
        GOOD + "train:\n\tsteps: 5\n", (),
        "run.yaml line 3, column 1: found character '\\t' that cannot start any token" + YAML_RULE),
    "a colon too many": (
        GOOD + "train: steps: 5\n", (),
        "run.yaml line 2, column 13: mapping values are not allowed here" + YAML_RULE),
    "a name that stands twice": (
        GOOD + "train: {steps: 5, steps: 6}\n", (),
        "run.yaml line 2, column 19: 'steps' stands here a second time; keep one of them"),
    "a section that stands twice": (
        GOOD + "train: {}\ntrain: {}\n", (),
        "run.yaml line 3, column 1: 'train' stands here a second time; keep one of them"),
    "a list for a name": (
        GOOD + "[a]: 5\n", (),
        "run.yaml line 2, column 1: a name must be a word, not ['a']; write name: value"),
    "two documents": (
        GOOD + "---\n" + GOOD, (),
        "run.yaml line 2, column 1: but found another document" + YAML_RULE),
    "a list for a file": (
        "- data\n- train\n", (),
        "run.yaml (['data', 'train']) must be a mapping of sections; write data: {path: FOLDER}, "
        "for example"),
    "a word for a file": (
        "hello", (),
        "run.yaml ('hello') must be a mapping of sections; write data: {path: FOLDER}, for example"),
    "a Python object": (
        GOOD + "run: !!python/object/apply:os.system ['touch stolen']\n", (),
        "run.yaml line 2, column 6: tags are not allowed "
        "('tag:yaml.org,2002:python/object/apply:os.system'); "
        "write plain values"),
    "a harmless tag": (
        GOOD + "run: {seed: !!int x}\n", (),
        "run.yaml line 2, column 13: tags are not allowed ('tag:yaml.org,2002:int'); write plain values"),
    "an alias": (
        "data: &d {path: x}\nrun: *d\n", (),
        "run.yaml line 1, column 7: anchors and aliases are not allowed; write the value itself"),
    "a mapping that holds itself": (
        "&a data: *a\n", (),
        "run.yaml line 1, column 1: anchors and aliases are not allowed; write the value itself"),
    "a tower of brackets": (
        GOOD + "run: " + "[" * 5000 + "]" * 5000, (),
        "run.yaml is nested too deeply for a configuration; write plain sections"),
    "a control character": (
        GOOD + "run: {name: a\x01}", (),
        "run.yaml is not YAML text: unacceptable character #x0001: special characters are not allowed; "
        "leave it out"),
    # overrides
    "an override without a value": (
        GOOD, ("train.steps",),
        "override ('train.steps') must be section.field=value; write train.steps=VALUE, for example"),
    "an override without a name": (
        GOOD, ("=5",),
        "override ('=5') must be section.field=value; write train.steps=20, for example"),
    "an override with half a name": (
        GOOD, ("train.=5",),
        "override ('train.=5') must be section.field=value; write train.steps=20, for example"),
    "an override with three names": (
        GOOD, ("train.steps.x=5",),
        "override ('train.steps.x=5') must be section.field=value; write train.steps=20, for example"),
    "an override in the style of options": (
        GOOD, ("--train.steps=5",),
        "unknown name '--train'; did you mean 'train'?"),
    "an override that is not YAML": (
        GOOD, ("optimizer.betas=[0.9",),
        "override 'optimizer.betas=[0.9' line 1, column 5: expected ',' or ']', but got '<stream end>'"
        + YAML_RULE),
    "an override with an object": (
        GOOD, ("run.seed=!!python/object/apply:os.getpid []",),
        "override 'run.seed=!!python/object/apply:os.getpid []' line 1, column 1: tags are not allowed "
        "('tag:yaml.org,2002:python/object/apply:os.getpid'); write plain values"),
}  # fmt: skip


FROM_ELSEWHERE = {
    "epochs": "train.steps", "max_steps": "train.steps", "batch_size": "train.micro_batch",
    "gradient_accumulation_steps": "train.batch_tokens", "learning_rate": "optimizer.lr",
    "device": "cluster.gpus_per_worker", "num_workers": "cluster.workers", "wandb": "tracking.wandb",
    "bf16": "precision", "warmup": "schedule.warmup_steps", "max_grad_norm": "train.clip_norm",
    "output_dir": "run.dir", "dataset": "data.path", "model_name_or_path": "model.pretrained",
    "num_hidden_layers": "model.layers", "bits": "method.grid", "save_steps": "train.save_every",
    "gradient_checkpointing": "train.activation_checkpointing", "zero_stage": "zero.stage",
}  # fmt: skip


@pytest.mark.parametrize("word", FROM_ELSEWHERE)
@pytest.mark.parametrize("section", [None, "train", "optimizer", "zero"])
def test_what_people_say_elsewhere_is_answered(section, word):
    content = {word: 1} if section is None else {section: {word: 1}}
    with pytest.raises(ConfigError) as caught:
        configfile.from_dict({"data": {"path": "x"}} | content)
    assert f"unknown name '{word}'; " in str(caught.value)
    assert FROM_ELSEWHERE[word] in str(caught.value)


def test_what_is_said_of_names_from_elsewhere_is_true():
    """Each field that an answer names is one; no name has two answers, or is a field itself."""
    from lowbit_dist import synonyms

    own = [{"data": {"path": "x"}, "method": {"name": name}} for name in ("dqt", "bitnet", "dense")]
    fields = {name for content in own for name in configfile.from_dict(content).flat()}
    names = [name for group in synonyms._ANSWERS for name in group.split()]
    assert len(names) == len(set(names)), sorted(name for name in names if names.count(name) > 1)
    assert not {*names} & ({name.partition(".")[2] for name in fields} | {*RunConfig.model_fields})
    for name in names:
        answer = synonyms.answer(name)
        assert answer.startswith(("write ", "leave it out")), answer
        mentioned = set(re.findall(rf"\b((?:{'|'.join(RunConfig.model_fields)})\.\w+)", answer))
        assert mentioned <= fields, answer
        assert mentioned or answer.startswith("leave it out") or answer.split()[1].strip(":,") in SECTIONS, (
            answer
        )


@pytest.mark.parametrize("field", ["schedule.name", "method.grid", "optimizer.states"])
def test_an_answer_with_the_values_of_a_field_has_all_of_them(field):
    from lowbit_dist import synonyms

    section, _, option = field.partition(".")
    content = configfile.from_dict({"data": {"path": "x"}, "method": {"name": "dqt"}})
    values = typing.get_args(type(getattr(content, section)).model_fields[option].annotation)
    answers = [words for words in synonyms._ANSWERS.values() if words.startswith(f"write {field}: ")]
    assert answers and values
    for words in answers:
        assert {*values} <= {*re.findall(r"\w+", words)}, words


@pytest.mark.parametrize("case", BAD)
def test_a_bad_configuration_is_answered_in_one_line(tmp_path, case):
    text, overrides, message = BAD[case]
    assert refused(tmp_path, text, *overrides) == message
    assert len(message.splitlines()) == 1


WRONG = {
    "misspelt": lambda name: f"{name}q=1",
    "a list": lambda name: f"{name}=[1, 2, 3]",
    "a mapping": lambda name: f"{name}={{a: 1}}",
    "negative": lambda name: f"{name}=-7",
    "not a number": lambda name: f"{name}=.nan",
    "infinite": lambda name: f"{name}=-.inf",
    "too large": lambda name: f"{name}=1{'0' * 31}",
    "true": lambda name: f"{name}=true",
}
TEXTS = ("run.name", "run.dir", "model.pretrained", "data.path", "data.tokenizer", "data.cache")
TEXTS += (
    "tracking.mlflow",
    "tracking.experiment",
    "tracking.wandb",
    "run.from",
)  # on the command line every value of theirs is text
TRUTHS = ("model.tie_embeddings", "method.sub_norms")
TRUTHS += ("train.activation_checkpointing", "train.reproducible", "run.with_states", "data.document_mask")
TRUTHS += ("tracking.tensorboard", "train.gradient_release", "optimizer.eps_before_correction")
TRUTHS += ("train.compile",)  # YAML takes on and off for true and false


@pytest.mark.parametrize("wrong", WRONG)
def test_every_field_refuses_what_it_cannot_be_and_says_what_to_write(tmp_path, wrong):
    fields = [name for name in FIELDS if name in configfile.from_dict({"data": {"path": "x"}}).flat()]
    assert len(fields) > 50
    for name in fields:
        if (wrong == "true" and name in TRUTHS) or (wrong != "misspelt" and name in TEXTS):
            continue
        message = refused(tmp_path, GOOD, WRONG[wrong](name))
        section, _, field = name.rpartition(".")
        assert section in message and field in message, message
        assert re.search(
            "; (write|did you|known names|(method|optimizer) [a-z]+ has|the nearest is)", message
        ), message


def test_files_that_cannot_be_read_are_named(tmp_path):
    def answer(path: Path) -> str:
        with pytest.raises(ConfigError) as caught:
            configfile.load(path, [])
        return str(caught.value).replace(str(tmp_path) + os.sep, "")

    (tmp_path / "folder").mkdir()
    (tmp_path / "binary").write_bytes(b"run: {name: \xff\xfe}")
    (tmp_path / "huge").write_bytes(b"#" * (2 << 20))
    assert (
        answer(tmp_path / "absent.yaml")
        == "absent.yaml does not exist; write the path of a configuration file"
    )
    assert answer(tmp_path / "folder") == "folder is a folder; write the path of a configuration file in it"
    assert answer(tmp_path / "binary") == "binary is not UTF-8 text (byte 12); save it as UTF-8"
    assert answer(tmp_path / "huge") == (
        "huge is larger than 1 MiB, which no configuration is; write another path"
    )
    assert answer(tmp_path / "folder" / "run.yaml" / "x").endswith("write the path of a configuration file")
    assert answer(tmp_path / "binary" / "x") == (
        "binary/x cannot be read: Not a directory; write the path of a configuration file"
    )
    assert (
        answer(Path("a\0b"))
        == "'a\\x00b' cannot be read: embedded null byte; write the path of a configuration file"
    )


def test_a_file_with_a_byte_order_mark_is_read(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_bytes(b"\xef\xbb\xbf" + GOOD.encode())
    assert configfile.load(path, []) == load(tmp_path)


def test_a_python_object_in_a_file_is_not_built(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    refused(tmp_path, GOOD + "run: !!python/object/apply:os.system ['touch stolen']\n")
    assert [path.name for path in tmp_path.iterdir()] == ["run.yaml"]


def test_a_mapping_from_elsewhere_is_checked_alike():
    with pytest.raises(ConfigError, match=r"^train.steps \(nan\) must be a finite number"):
        configfile.from_dict({"data": {"path": "x"}, "train": {"steps": math.nan}})
    with pytest.raises(ConfigError, match=r"^a configuration must be a mapping of sections, not \[\]$"):
        configfile.from_dict([])


FIELDS = [
    *configfile.from_dict({"data": {"path": "x"}}).flat(),
    "train.stesp",
    "method.sharpness",
    "x",
]
PLAIN = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.integers(-3, 3000)
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(
        ["dense", "int8", "auto", "fp32", "tiny", "two_stage", "1e-3", 256, 2**63, 10**400, -0.0]
    )
)
VALUES = st.recursive(
    PLAIN, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(PLAIN, inner, max_size=3), max_leaves=6
)


def one_line_or_a_configuration(build) -> None:
    try:
        config = build()
    except ConfigError as error:
        message = str(error)
        assert message and len(message.splitlines()) == 1, message
        message.encode()  # can be printed
    else:
        assert configfile.from_dict(config.to_dict()) == config
        assert config.differences(config) == []


@settings(max_examples=500, deadline=None, derandomize=True)
@given(st.dictionaries(st.sampled_from(FIELDS), VALUES, max_size=5), st.booleans())
def test_fuzzed_fields_never_end_in_a_traceback(fields, with_path):
    data: dict = {"data": {"path": "x"}} if with_path else {}
    for name, value in fields.items():
        section, _, field = name.partition(".")
        content = data.setdefault(section, {})
        if field and isinstance(content, dict):
            content[field] = value
        else:
            data[section] = value
    one_line_or_a_configuration(lambda: configfile.from_dict(data))


@settings(max_examples=500, deadline=None, derandomize=True)
@given(VALUES)
def test_fuzzed_documents_never_end_in_a_traceback(document):
    one_line_or_a_configuration(lambda: configfile.from_dict(document))


@settings(
    max_examples=500, deadline=None, derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)  # fmt: skip
@given(
    text=st.text(max_size=60)
    | st.text(alphabet="ab:{}[]-,#&*!|>'\"%@`?\n\t .0e", max_size=40)
    | st.binary(max_size=40),
    override=st.none()
    | st.builds("{}={}".format, st.sampled_from(FIELDS), st.text(max_size=12))
    | st.text(max_size=12),
)
@example(text=b"data: {path: x}\nrun: {seed: 0x" + b"f" * 4000 + b"}", override=None)
@example(text=b"data: {path: x}", override="run.seed=1" + "0" * 4400)
@example(text=b"data: {path: x}", override="run.name=")
@example(text=b"%YAML 9.9\n---\n", override=None)
@example(text=b"? a\n? b\n", override="x.y=1")
def test_fuzzed_files_and_overrides_never_end_in_a_traceback(tmp_path, text, override):
    path = tmp_path / "fuzz.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode("utf-8", "surrogatepass"))
    overrides = [] if override is None else [override]
    one_line_or_a_configuration(lambda: configfile.load(path, overrides))


@settings(max_examples=200, deadline=None, derandomize=True)
@given(
    name=st.text(
        st.characters(categories=["L", "N", "P", "S"], include_characters=" "), min_size=1, max_size=20
    ).filter(lambda name: "://" not in name),  # of a URL
    lr=st.floats(0, 100),
    betas=st.tuples(st.floats(0, 1, exclude_max=True), st.floats(0, 1, exclude_max=True)),
    seed=st.integers(0, 2**63 - 1),
)
def test_what_is_written_is_read_back_the_same(tmp_path_factory, name, lr, betas, seed):
    data = {
        "data": {"path": f"x{name}", "tokenizer": name if name.strip() else None},
        "run": {"seed": seed},
        "optimizer": {"lr": lr, "betas": list(betas)},
        "tracking": {"experiment": f"{name}x"},
    }
    config = configfile.from_dict(data)
    path = tmp_path_factory.getbasetemp() / "written.yaml"
    path.write_text(config.to_yaml(), encoding="utf-8")
    assert configfile.load(path, []) == config


def test_a_message_is_one_line_whatever_it_quotes():
    assert str(ConfigError("a\n  b\r\nc")) == "a b c"


def test_sections_can_be_built_in_python():
    assert Train(steps=3).steps == 3
    assert Schedule(name="linear").name == "linear"
    with pytest.raises(ValueError):
        Train(stpes=3)

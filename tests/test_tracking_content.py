"""What MLflow has of a run, and under which names."""

import importlib.metadata
import json
import shutil
import subprocess

import pytest
from tracked import SUMMARY, Tracked, client, configuration, steps

from lowbit_dist import data, runs
from lowbit_dist.tracking import content, gauges

MODEL = {"hidden_size": 256, "intermediate_size": 512, "layers": 2, "heads": 4, "kv_heads": 2}


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return tmp_path_factory.mktemp("mlflow") / "mlflow.db"


@pytest.fixture
def config(store, tmp_path):
    def make(name, path="data", **sections):
        sections = {"data": {"path": str(path), "seq_len": 64}, **sections}
        return configuration(f"sqlite:///{store}", tmp_path, name, **sections)

    return make


def finished(config, store, *rows, summary=SUMMARY):
    """The MLflow run of a run with these rows."""
    tracker = Tracked(config)
    for step, row in enumerate(rows or ({"loss": 1.0},), start=1):
        tracker.log(step, row)
    tracker.finish("FINISHED", summary)
    return client(store).get_run(tracker.run_id)


def test_a_number_has_its_group_before_its_name():
    names = {
        "loss": "train/loss", "lr": "train/lr", "grad_norm": "train/grad_norm", "tokens": "train/tokens",
        "restarts": "train/restarts", "val_loss": "val/loss", "perplexity": "val/perplexity",
        "bits_per_byte": "val/bits_per_byte", "tokens_per_second": "speed/tokens_per_second",
        "flip_rate": "codes/flip_rate", "zero_fraction": "codes/zero_fraction", "entropy": "codes/entropy",
        "saturation": "codes/saturation", "resident_bytes": "memory/resident_bytes_per_worker",
        "memory/gradients": "memory/gradients", "anything": "train/anything", "val_samples": "val/samples",
        "tokens_per_second_per_worker": "speed/tokens_per_second_per_worker", "mfu": "speed/mfu",
    }  # fmt: skip
    assert {key: content.name_of(key) for key in names} == names
    assert len({content.name_of(key) for key in gauges.ROW}) == len(gauges.ROW)


def test_a_run_says_what_it_is_and_on_which_data(config, corpus, store, tmp_path, monkeypatch):
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    git = ("git", "-c", "user.name=a", "-c", "user.email=a@b")
    for command in (("init", "-q"), ("commit", "-q", "--allow-empty", "-m", "first")):
        subprocess.run([*git, *command], check=True)
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip()
    called = {"name": "described", "dir": str(tmp_path), "from": "parent@4"}
    run = finished(config("described", corpus, run=called, model={"preset": "tiny"}), store)

    params, tags, vocabulary = run.data.params, run.data.tags, data.read_manifest(corpus).vocab_size
    assert "None" not in params.values()
    in_layers = 4 * (4 * 256 * 256 + 3 * 256 * 768)
    total = in_layers + 2 * vocabulary * 256 + (2 * 4 + 1) * 256
    expected = {
        "method.name": "dqt", "model.preset": "tiny", "model.hidden_size": 256, "model.layers": 4,
        "model.kv_heads": 4, "model.vocab_size": vocabulary, "model.parameters": total,
        "train.batch_tokens": 8192, "run.from": "parent@4",
    }  # fmt: skip
    assert {key: params[key] for key in expected} == {key: str(value) for key, value in expected.items()}
    low_bit = int(params["model.low_bit_parameters"])
    assert in_layers <= low_bit < total
    assert float(params["model.low_bit_share"]) == round(low_bit / total, 4)
    assert tags["mlflow.source.git.commit"] == commit
    assert tags["mlflow.source.type"] == "LOCAL"
    assert tags["mlflow.source.name"]
    for package in ("torch", "deepspeed", "ray"):
        assert tags[f"version.{package}"] == importlib.metadata.version(package)
    assert tags["mlflow.note.content"].startswith("dqt")
    assert f"model tiny, {total:,} parameters, {low_bit / total:.1%} in codes" in tags["mlflow.note.content"]

    (given,) = run.inputs.dataset_inputs
    assert given.dataset.name == corpus.name
    assert data.read_manifest(corpus).digest.startswith(given.dataset.digest)
    assert len(given.dataset.digest) == 32
    assert json.loads(given.dataset.source) == {"uri": str(corpus)}
    assert {tag.key: tag.value for tag in given.tags} == {"mlflow.data.context": "training"}
    split = data.read_manifest(corpus).splits["train"]
    assert json.loads(given.dataset.profile) == {"num_rows": split.samples, "num_elements": split.tokens}

    monkeypatch.chdir(tmp_path)
    for name, change in (("moved", {}), ("other", {"tokenizer_sha256": "0" * 64})):
        (tmp_path / name).mkdir()
        manifest = json.loads((corpus / "manifest.json").read_text()) | change
        (tmp_path / name / "manifest.json").write_text(json.dumps(manifest))
        again = finished(config(f"of-{name}", tmp_path / name), store)
        assert "mlflow.source.git.commit" not in again.data.tags
        (other,) = again.inputs.dataset_inputs
        assert (other.dataset.digest == given.dataset.digest) == (name == "moved")


def test_a_description_that_somebody_wrote_stays(config, store):
    made = config("noted")
    first = finished(made, store)
    client(store).set_tag(first.info.run_id, "mlflow.note.content", "the one with the good data")
    (made.run_dir / ".tracked").unlink()
    again = finished(made, store)
    assert again.info.run_id == first.info.run_id
    assert again.data.tags["mlflow.note.content"] == "the one with the good data"


def test_memory_is_a_number_of_the_run_with_its_baselines_and_savings(config, store):
    made = config("memory")
    plans = {name: SUMMARY["memory"][name] for name in ("plan_dense", "plan_bitnet")}
    (made.run_dir / runs.BASELINES).write_text(json.dumps(plans))
    row = {"loss": 1.0, "resident_bytes": 110, "memory/optimizer_states": 98}
    tracker = Tracked(made)
    tracker.log(1, row)
    tracker.log(2, row)
    tracker.close()
    number = client(store).get_run(tracker.run_id).data.metrics
    assert number["memory/resident_bytes_per_worker"] == 110
    assert number["memory/plan_dense/bytes_per_parameter"] == 4.0
    assert steps(store, tracker.run_id, "memory/optimizer_states") == [0], "it did not change"

    memory = SUMMARY["memory"] | {"peak_bytes_per_worker": 150, "saved_vs_bitnet_ste": 0.625, "saved_vs": "x"}
    memory["components"] = memory["components"] | {"activations": {"bytes": None}}
    run = finished(made, store, row, row, row, summary={"memory": memory, "diverged": True})
    assert run.data.tags["diverged"] == "True"
    assert run.info.run_id == tracker.run_id
    shown = {name: x for name, x in run.data.metrics.items() if name.startswith("memory/")}
    assert shown.items() >= {
        "memory/resident_bytes_per_worker": 112, "memory/optimizer_states": 100, "memory/low_bit_weights": 12,
        "memory/peak_bytes_per_worker": 150, "memory/saved_vs_bitnet_ste": 0.625,
        "memory/bytes_per_parameter": 2.24, "memory/plan_bitnet/bytes_per_parameter": 6.0,
        "memory/plan_bitnet/resident_bytes_per_worker": 300,
    }.items()  # fmt: skip
    assert not {"memory/activations", "memory/workers", "memory/saved_vs"} & shown.keys()


def test_the_checkpoints_that_are_kept_are_models_in_mlflow(config, store):
    made = config("models.v1")
    folder = made.run_dir / "checkpoints"

    def listed(run):
        models = client(store).search_logged_models(
            [run.info.experiment_id], f"source_run_id = '{run.info.run_id}'"
        )
        return {(str(model.status), model.name, model.tags["path"]) for model in models}

    def expected(*numbers):
        return {("READY", f"models-v1-step-{n}", (folder / f"step-{n}").as_uri()) for n in numbers}

    for n in (10, 20):
        (folder / f"step-{n}").mkdir(parents=True)
    (folder / ".step-30.partial").mkdir()
    run = finished(made, store)
    assert listed(run) == expected(10, 20)
    assert {output.step for output in run.outputs.model_outputs} == {10, 20}
    shutil.rmtree(folder / "step-10")
    (folder / "step-30").mkdir()
    again = finished(made, store)
    assert again.info.run_id == run.info.run_id
    assert listed(again) == expected(20, 30)

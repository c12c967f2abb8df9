"""What a word means: runs, sweeps and checkpoints, by name and by folder, for every verb alike."""

import json

import pytest

from lowbit_dist import naming
from lowbit_dist.errors import ConfigError


@pytest.fixture
def place(tmp_path, monkeypatch):
    """runs/small, the sweep runs/methods with dense-seed0 and dqt-seed0, and elsewhere/other."""
    monkeypatch.chdir(tmp_path)
    for name in ("runs/small", "runs/methods/dense-seed0", "runs/methods/dqt-seed0", "elsewhere/other"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "config.yaml").write_text("")
    (tmp_path / "runs" / "notes").mkdir()
    return tmp_path


def runs_of(word):
    return [str(folder) for folder in naming.find_runs(word)]


def step_of(word):
    folder, step = naming.find_step(word, "runs", "a checkpoint's folder")
    return str(folder), step


def refused(find, *arguments):
    with pytest.raises(ConfigError) as caught:
        find(*arguments)
    return str(caught.value)


def test_a_name_or_a_folder_is_a_run_or_all_of_a_sweep(place):
    sweep = ["runs/methods/dense-seed0", "runs/methods/dqt-seed0"]
    assert runs_of("small") == runs_of("runs/small") == ["runs/small"]
    assert runs_of("methods") == sweep
    assert runs_of("methods/dqt-seed0") == runs_of("dqt-seed0") == sweep[1:]
    assert runs_of("elsewhere/other") == ["elsewhere/other"]
    assert runs_of(place / "elsewhere" / "other") == [str(place / "elsewhere" / "other")]
    assert runs_of("runs") == [*sweep, "runs/small"]


def test_home_is_written_out(place, monkeypatch):
    monkeypatch.setenv("HOME", str(place / "elsewhere"))
    assert runs_of("~/other") == [str(place / "elsewhere" / "other")]
    assert step_of("~/other@5") == (str(place / "elsewhere" / "other"), 5)


def test_a_step_stands_behind_an_at(place):
    assert step_of("small") == ("runs/small", None)
    assert step_of("small@20") == step_of("runs/small@20") == ("runs/small", 20)
    assert step_of("dqt-seed0@7") == ("runs/methods/dqt-seed0", 7)
    (place / "runs" / "a@5").mkdir()
    (place / "runs" / "a@5" / "config.yaml").write_text("")
    assert step_of("runs/a@5") == ("runs/a@5", None), "the folder is called so"
    assert "write small@100" in refused(step_of, "small@last")
    assert "did you mean 'small'?" in refused(step_of, "smal@20")
    assert "did you mean 'small'?" in refused(naming.find_run, "small@20"), "a step is not for every verb"


def test_from_inside_a_sweep_the_runs_beside_it_are_found(place):
    def found(word):
        folder, step = naming.find_step(word, "runs/methods", "a checkpoint's folder")
        return str(folder), step

    assert found("small@20") == ("runs/small", 20)
    assert found("dqt-seed0") == found("methods/dqt-seed0") == ("runs/methods/dqt-seed0", None)
    (place / "runs" / "methods" / "small").mkdir()
    (place / "runs" / "methods" / "small" / "config.yaml").write_text("")
    assert found("small") == ("runs/methods/small", None), "the nearer one is meant"


def test_what_no_file_could_be_called_is_no_checkpoint(place):
    from lowbit_dist import checkpoint, trained

    for find in (checkpoint.resolve, trained.open):
        assert "is neither a run (in runs/)" in refused(find, "x" * 5000)


def test_one_run_is_not_a_whole_sweep(place):
    message = refused(naming.find_run, "methods")
    assert message == "methods has 2 runs; name one of them, for example runs/methods/dense-seed0"
    (place / "runs" / "second" / "dense-seed0").mkdir(parents=True)
    (place / "runs" / "second" / "dense-seed0" / "config.yaml").write_text("")
    assert refused(naming.find_runs, "dense-seed0") == (
        "dense-seed0 is a run of 2 sweeps; write one of methods/dense-seed0, second/dense-seed0"
    )


@pytest.mark.parametrize(
    ("word", "advice"),
    {
        "smal": "did you mean 'small'?",
        "methods/dens-seed0": "did you mean 'methods/dense-seed0' or 'methods/dqt-seed0'?",
        "elsewhere/othr": "did you mean 'elsewhere/other'?",
        "elsewhere/small": "did you mean 'small'",
        "qqqq": "write the name or the folder of one, for example methods/dense-seed0, methods/dqt",
        "": "write the name or the folder of one",
        "notes": "write the name or the folder of one",
        "a\0b": "write the name or the folder of one",
        "x" * 5000: "write the name or the folder of one",
    }.items(),
    ids=lambda value: value[:20],
)
def test_what_is_no_run_is_answered_with_near_names(word, advice, place):
    message = refused(naming.find_runs, word)
    assert message.startswith(f"{word!r} is neither a run (in runs/), a run's folder nor a sweep; ")
    assert advice in message


def test_without_any_run_the_answer_says_so(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert refused(naming.find_runs, "small").endswith("there are none yet")


@pytest.mark.parametrize("verb", ["watch", "compare", "inspect", "eval", "generate", "quantize"])
def test_every_verb_gives_the_same_answer(verb, place, lowbit):
    more = {"eval": ["--data", "x"], "generate": ["--prompt", "x"]}
    more |= {"quantize": ["--method", "rtn", "--out", "x"]}
    done = lowbit(verb, "smal", *more.get(verb, []))
    assert (done.returncode, done.stdout) == (2, "")
    (line,) = done.stderr.splitlines()
    assert line.startswith("lowbit: 'smal' is neither a run (in runs/), a run's folder")
    assert line.endswith("; did you mean 'small'?")


def test_jobs_are_meant_by_the_names_of_runs_too():
    from lowbit_dist.cluster.jobs import Jobs

    class Listed(Jobs):
        def __init__(self):
            pass

        def list(self):
            return [{"job": f"{run}-{n}", "run": run} for run, n in (("night", 2), ("day", 1), ("night", 1))]

    jobs = Listed()
    names = ("night", "night-1", "day", "day-9", "dusk")
    assert [jobs.newest(name) for name in names] == ["night-2", "night-1", "day-1", "day-9", "dusk"]


def test_the_shell_completes_runs(place):
    from lowbit_dist.cli.arguments import run_names

    assert run_names("") == ["methods/dense-seed0", "methods/dqt-seed0", "small", "methods"]
    assert run_names("sm") == ["small"]


@pytest.fixture(scope="module")
def run(ranks, corpus, tmp_path_factory):
    """The folder of a run with checkpoints of steps 2 and 4."""
    folder = tmp_path_factory.mktemp("named")
    configuration = {
        "run": {"name": "small", "dir": str(folder / "runs")},
        "model": {"hidden_size": 256, "intermediate_size": 512, "layers": 1, "heads": 4, "kv_heads": 2},
        "data": {"path": str(corpus), "seq_len": 64},
        "precision": "fp32",
        "train": {"steps": 4, "batch_tokens": 128, "micro_batch": 2, "save_every": 2, "eval_samples": 2},
        "cluster": {"workers": 1},
        "tracking": {"mlflow": None},
    }  # fmt: skip
    ranks(1).run(_train, configuration)
    return folder / "runs" / "small"


def _train(configuration):
    from lowbit_dist import configfile, loop

    return loop.run(configfile.from_dict(configuration))


def test_a_checkpoint_is_meant_by_its_step(run, monkeypatch, lowbit):
    monkeypatch.chdir(run.parent.parent)
    for word, step in (("small", 4), ("small@2", 2), ("runs/small@4", 4), (f"{run}@2", 2)):
        done = lowbit("inspect", word, "--json")
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout)["step"] == step
    done = lowbit("generate", "small@2", "--prompt", "def", "--max-new-tokens", 2, "--json")
    assert json.loads(done.stdout)["checkpoint"].endswith("runs/small/checkpoints/step-2"), done
    done = lowbit("inspect", "small@3")
    assert done.returncode == 2
    assert "runs/small has no checkpoint of step 3; write @2, @4, or another run's name" in done.stderr


def test_a_damaged_one_that_is_named_is_refused_and_shown_by_inspect(run, tmp_path, monkeypatch, lowbit):
    import shutil

    shutil.copytree(run, tmp_path / "runs" / "small")
    monkeypatch.chdir(tmp_path)
    shard = tmp_path / "runs/small/checkpoints/step-2/shard-00000.safetensors"
    shard.write_bytes(shard.read_bytes()[:1000])
    done = lowbit("eval", "small@2", "--data", "x")
    assert done.returncode == 2 and "step-2 is damaged" in done.stderr
    done = lowbit("inspect", "small@2", "--json")
    assert done.returncode == 1 and json.loads(done.stdout)["problems"]

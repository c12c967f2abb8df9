"""The command line's contract: help, exit codes, one line for a mistake, and nothing but JSON on stdout."""

import ast
import inspect
import json
import os
import re
import resource
import subprocess
import sys
import typing
from pathlib import Path

import pytest

import lowbit_dist
from lowbit_dist import __main__ as entry

VERBS = (
    "doctor", "tokenizer train", "data prepare", "plan", "train", "watch", "runs", "compare", "ui", "eval",
    "generate", "chat", "serve", "quantize", "export", "inspect", "sweep", "submit", "status", "logs", "stop",
    "bench update", "bench linear", "bench gather", "bench step", "bench train", "bench infer", "config",
)  # fmt: skip
CONFIG = "data: {path: nowhere}\nmethod: {name: dqt}\n"


def python(code, *arguments, **environment):
    """A process of its own."""
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, **environment}, timeout=300
    )


@pytest.fixture
def config(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "config.yaml"
    file.write_text(CONFIG)
    return file


def functions():
    """Verb -> the function that it is."""
    from lowbit_dist.cli import app

    verbs = {}
    groups = [(f"{group.name} ", group.typer_instance) for group in app.registered_groups]
    for prefix, typer_app in [("", app), *groups]:
        for command in typer_app.registered_commands:
            verbs[prefix + (command.name or command.callback.__name__.replace("_", "-"))] = command.callback
    return verbs


def parameters(function):
    """Name -> (type, typer's information) of each parameter."""
    hints = typing.get_type_hints(function, include_extras=True)
    return {name: (hint, *hint.__metadata__) for name, hint in hints.items() if name != "return"}


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("option", ["--help", "-h"])
def test_the_help_of_each_verb_shows_an_example(verb, option, lowbit):
    done = lowbit(*verb.split(), option)
    assert done.returncode == 0
    text = " ".join(done.stdout.split())
    assert f"Example: lowbit {verb} " in text + " ", text


def test_verbs_are_listed_in_the_order_of_the_work(lowbit):
    shown = lowbit("-h").stdout
    places = [re.search(rf"^\W*{verb.split()[0]} ", shown, re.M).start() for verb in VERBS]
    assert places == sorted(places), shown
    assert {*functions()} >= {*VERBS}


@pytest.mark.parametrize("verb", VERBS)
def test_help_is_in_whole_sentences(verb):
    function = functions()[verb]
    first = inspect.cleandoc(function.__doc__).splitlines()[0]
    assert re.fullmatch(r"[A-Z][a-z]+,? .*[.,:;a-z]", first) and len(first.split()) > 2, first
    for name, (_, info) in parameters(function).items():
        text = info.help or ""
        assert text[:1].isupper() and text.endswith(".") and len(text.split()) > 2, f"{name}: {text!r}"


def test_the_version_is_told(lowbit):
    done = lowbit("--version")
    assert (done.returncode, done.stdout) == (0, f"lowbit-dist {lowbit_dist.__version__}\n")
    version = re.search(
        r'^version = "(.*)"', (Path(__file__).parents[1] / "pyproject.toml").read_text(), re.M
    )
    assert lowbit_dist.__version__ == version[1]


def test_the_shell_can_complete(lowbit):
    assert "--install-completion" in lowbit("--help").stdout
    code = "import sys; sys.argv = ['lowbit']; from lowbit_dist.__main__ import main; main()"
    done = python(code, _LOWBIT_COMPLETE="complete_bash", COMP_WORDS="lowbit in", COMP_CWORD="1")
    assert done.stdout.split() == ["inspect"], done.stderr


def test_an_older_python_gets_one_line(monkeypatch, capsys):
    """It meets two files before the one line, and can read both."""
    for file in (lowbit_dist.__file__, entry.__file__):
        ast.parse(Path(file).read_text(), feature_version=(3, 7))
    top = ast.parse(Path(entry.__file__).read_text()).body
    imported = [ast.unparse(node) for node in top if isinstance(node, ast.Import | ast.ImportFrom)]
    assert imported == ["import sys"]
    monkeypatch.setattr(sys, "version_info", (3, 10, 12, "final", 0))
    with pytest.raises(SystemExit) as ended:
        entry.main()
    assert ended.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"lowbit: Python 3.11 or newer is needed, and {sys.executable} is 3.10.12")


def test_the_version_that_is_needed_has_one_value():
    root = Path(__file__).parents[1]
    text = (root / "pyproject.toml").read_text()
    assert f'requires-python = ">={".".join(map(str, entry.NEEDED))}"' in text
    assert 'lowbit = "lowbit_dist.__main__:main"' in text
    assert f"sys.version_info < {entry.NEEDED}" in (root / "launch" / "setup.sh").read_text()


def test_home_is_written_out_in_every_path(monkeypatch, tmp_path):
    """By the callback of each parameter that is a path, or may be one."""
    monkeypatch.setenv("HOME", str(tmp_path))
    texts = {"inputs", "data", "run", "runs", "checkpoint"}
    seen = set()
    for verb, function in functions().items():
        for name, (hint, info) in parameters(function).items():
            kinds = {hint.__origin__, *typing.get_args(hint.__origin__)}
            if Path not in kinds and name not in texts:
                continue
            seen.add((verb, name))
            value = info.callback(Path("~/x") if Path in kinds else "~/x")
            assert str(value) == str(tmp_path / "x"), f"{verb} {name}"
    assert {("compare", "out"), ("runs", "folder"), ("tokenizer train", "out"), ("eval", "data")} <= seen


def test_home_is_written_out_in_a_command(monkeypatch, tmp_path, config, lowbit):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "mine").mkdir()
    assert lowbit("runs", "~/mine").stdout == "no runs yet\n"
    assert "~" not in lowbit("tokenizer", "train", "--input=~/absent.txt", "--out=~/t").stderr
    monkeypatch.setenv("HOME", "~")  # as if there were none
    done = lowbit("runs", "~/mine")
    assert done.returncode == 2 and "this user has no home folder; write the whole path" in done.stderr


def test_help_takes_less_than_a_second():
    code = "import sys; sys.argv = ['lowbit', '--help']; from lowbit_dist.cli import main; main()"
    python(code)  # bytecode is compiled once
    times = []
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        assert "Usage: lowbit" in python(code).stdout
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        times.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    assert min(times) < 1.0, times


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["nothing"], "No such command 'nothing'"),
        (["train"], "CONFIG"),
        (["plan", "CONFIG", "--wrokers", "2"], "--wrokers"),
        (["plan", "CONFIG", "--workers", "two"], "--workers"),
        (["plan", "CONFIG", "--workers"], "requires an argument. See --help."),
        (
            ["train", "CONFIG", "--lr", "1"],
            "--lr: fields are written without dashes, as train.steps=20; did you",
        ),
        (
            ["plan", "CONFIG", "--train.steps=20"],
            "without dashes, as train.steps=20; did you mean 'train.steps'",
        ),
        (["submit", "CONFIG", "--epochs", "3"], "without dashes, as train.steps=20; write train.steps: an"),
        (["train", "absent.yaml"], "absent.yaml"),
        (["train", "CONFIG", "train.stpes=3"], "did you mean 'steps'"),
        (["train", "CONFIG", "cluster.workers=4096", "train.batch_tokens=8388608"], "cluster.workers (4096)"),
        (["train", "CONFIG", "cluster.workers=1"], "data.path (nowhere) does not exist; prepare it"),
        (["plan", "CONFIG"], "--vocab-size"),
        (["plan", "CONFIG", "--vocab-size", "0"], "--vocab-size (0)"),
        (["eval", "absent", "--data", "x"], "absent"),
        (["generate", "absent", "--prompt", "x"], "absent"),
        (["inspect", "absent"], "absent"),
        (["tokenizer", "train", "--input", "absent.txt", "--out", "t"], "absent.txt"),
        (["data", "prepare", "--input", "stdlib", "--tokenizer", "absent", "--out", "d"], "absent"),
        (["bench", "update", "--parameters", "1000"], "the nearest is 1024"),
        (["bench", "step", "--only", "flap"], "--only (flap) must be one of 'dense', 'dqt ternary', "),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, list) else "",
)
def test_wrong_use_is_one_line_and_exit_code_2(arguments, words, config, lowbit):
    done = lowbit(*[str(config) if each == "CONFIG" else each for each in arguments])
    assert done.returncode == 2, done.stderr
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith("lowbit: ")
    assert words in line


def test_another_error_is_one_line_and_exit_code_1_and_its_traceback_is_for_debugging(config):
    code = """
import sys
from lowbit_dist import cli, configfile
def broken(*arguments): raise OSError("the disk is gone")
configfile.load = broken
sys.argv = ["lowbit", "plan", sys.argv[1]]
cli.main()
"""
    for debug in ("0", "1"):
        done = python(code, config, LOWBIT_DEBUG=debug)
        assert done.returncode == 1
        assert ("Traceback" in done.stderr) == (debug == "1")
        assert "OSError: the disk is gone" in done.stderr


@pytest.mark.parametrize(
    "arguments",
    [
        ["doctor", "--json"],
        ["bench", "update", "--parameters", "2048", "--repetitions", "2", "--json"],
    ],
    ids=lambda value: value[0],
)
def test_json_is_all_there_is_on_stdout(arguments, lowbit):
    done = lowbit(*arguments)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("\n") == 1
    assert isinstance(json.loads(done.stdout), dict)


def test_what_libraries_write_to_stdout_goes_to_stderr_even_from_c_and_at_exit():
    code = """
import ctypes, os, sys
from lowbit_dist.cli.console import answering
libc = ctypes.CDLL(None)
with answering(True) as answer:
    print("from Python")
    os.system("echo from a process")
    libc.printf(b"from C, buffered until exit\\n")
    answer({"loss": float("nan"), "path": __import__("pathlib").Path("a")}, None)
print("after the answer")
"""
    done = python(code)
    assert json.loads(done.stdout) == {"loss": None, "path": "a"}
    assert {*done.stderr.splitlines()} >= {
        "from Python", "from a process", "from C, buffered until exit", "after the answer",
    }  # fmt: skip


def test_a_name_that_is_not_utf8_is_printed_as_it_is(tmp_path, lowbit):
    folder = tmp_path / os.fsdecode(b"caf\xe9")
    folder.mkdir()
    (folder / "config.yaml").write_text("")
    done = lowbit("runs", tmp_path)
    assert (done.returncode, "caf\ufffd" in done.stdout) == (0, True), done.stderr


def test_the_plan_of_more_workers_holds_less_on_each(config, lowbit):
    from lowbit_dist import configfile
    from lowbit_dist.memory.plan import planned

    done = lowbit("plan", config, "--vocab-size", "512", "--workers", "4", "--json")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("\n") == 1, "it is all there is on stdout"
    plan, alone = json.loads(done.stdout), planned(configfile.load(config), 512, 1, with_step=False)
    assert (plan["workers"], alone["workers"]) == (4, 1)
    assert plan["resident_bytes_per_worker"] < 0.3 * alone["resident_bytes_per_worker"]


def test_the_doctor_names_what_is_missing_and_exits_with_1():
    code = """
import importlib.metadata, sys
real = importlib.metadata.version
importlib.metadata.version = lambda name: "0.18.0" if name == "deepspeed" else real(name)
from lowbit_dist import cli
sys.argv = ["lowbit", "doctor", "--json"]
cli.main()
"""
    done = python(code)
    assert done.returncode == 1, done.stderr
    found = json.loads(done.stdout)
    (wrong,) = [each for each in found["checks"] if each["status"] == "error"]
    assert not found["ok"]
    assert wrong["name"] == "deepspeed"
    assert "pip install 'deepspeed==" in wrong["advice"]


def test_several_paths_may_follow_one_input_option():
    from lowbit_dist.cli import _repeated

    given = ["train", "--input", "a", "b", "--out", "d", "--input", "e", "--json", "x"]
    expected = ["train", "--input", "a", "--input", "b", "--out", "d", "--input", "e", "--json", "x"]
    assert _repeated(given) == expected


@pytest.mark.integration
def test_a_tokenizer_and_data_are_made_from_the_command_line(tmp_path, lowbit):
    inputs = ["--input", Path(os.__file__), Path(json.__file__).parent]
    folders = ["--out", tmp_path / "t", "--json"]
    made = lowbit("tokenizer", "train", *inputs, "--vocab-size", 400, *folders)
    assert made.returncode == 0, made.stderr
    assert json.loads(made.stdout)["vocab_size"] == 400
    options = ["--seq-len", 32, "--workers", 1, "--val-fraction", 0.2]
    folders = ["--tokenizer", tmp_path / "t", "--out", tmp_path / "d", "--json"]
    done = lowbit("data", "prepare", *inputs, *options, *folders)
    assert done.returncode == 0, done.stderr
    manifest = json.loads(done.stdout)
    assert manifest["seq_len"] == 32
    assert manifest["splits"]["val"]["samples"] > 0
    assert (tmp_path / "d" / "manifest.json").exists()

"""README: its commands, fields and files are there, its answers to mistakes and its picture are true."""

import re
import runpy
import shlex
from pathlib import Path

import pytest
import typer.main

from lowbit_dist import configfile, sweep
from lowbit_dist.cli import _repeated, app, reference
from lowbit_dist.config import ConfigError, RunConfig

ROOT = Path(__file__).parents[1]
PAGES = (
    "README.md",
    "lowbit_dist/BENCH.md",
    "launch/monitoring/README.md",
    "docker/README.md",
    "lowbit_dist/methods/README.md",
)
README = (ROOT / "README.md").read_text()


def commands(page):
    """The words of each `lowbit` command in the page's blocks of shell, without the program's name."""
    blocks = re.findall(r"```bash\n(.*?)```", (ROOT / page).read_text(), flags=re.S)
    for line in "".join(blocks).replace("\\\n", " ").splitlines():
        words = shlex.split(line.partition(" > ")[0], comments=True)
        if "lowbit" in words:
            yield words[words.index("lowbit") + 1 :]


def parsed(words):
    """Verb and parameters of a command, as the command line reads them."""
    command, verb, words = typer.main.get_command(app), "", _repeated(words)
    while hasattr(command, "commands"):
        verb, *words = words
        command = command.commands[verb]
    return verb, command.make_context(verb, words).params


@pytest.mark.parametrize("page", [page for page in PAGES if "monitoring" not in page])
def test_each_command_of_a_page_is_one(page):
    assert [parsed(words) for words in commands(page)]


def test_what_readmes_commands_name_is_there(monkeypatch):
    monkeypatch.chdir(ROOT)
    loaded = set()
    for verb, given in map(parsed, commands("README.md")):
        if verb == "sweep":
            sweep.load(given["config"])
        elif "overrides" in given:
            configfile.load(given["config"], given["overrides"] or [])
        elif verb == "config" and given["name"] is not None:
            reference.chosen(given["name"])
        else:
            continue
        loaded.add(verb)
    assert loaded == {"plan", "train", "submit", "sweep", "config"}


def test_the_fields_in_readme_are_fields():
    known = {
        f"{part['section']}.{field['name']}"
        for part in reference.reference(installed=False)
        for field in part["fields"]
    }
    said = set(re.findall(rf"(?<![\w/.-])(?:{'|'.join(RunConfig.model_fields)})\.\w+\b(?!\()", README))
    assert "zero.residency" in said
    assert said <= known, said - known


@pytest.mark.parametrize("page", PAGES)
def test_the_files_that_a_page_names_are_there(page):
    text = (ROOT / page).read_text()
    links = {(ROOT / page).parent / link for link in re.findall(r"\]\((?!https?:)([^)#]+)\)", text)}
    named = re.findall(r"(?<![\w/.-])(?:launch|configs|tests|docker|lowbit_dist)/[\w/.-]*\w", text)
    missing = [str(path) for path in links | {ROOT / name for name in named} if not path.exists()]
    assert named and not missing


@pytest.mark.parametrize("mistake", ["train.batch_tokens=8000", "train.stesp=50"])
def test_the_answers_to_mistakes_are_those_of_readme(mistake):
    with pytest.raises(ConfigError) as answer:
        configfile.load(ROOT / "configs" / "quickstart.yaml", [mistake])
    assert f"\nlowbit: {answer.value}\n" in README


def test_readmes_picture_and_its_caption_are_what_is_planned():
    """It is drawn by `python launch/pictures/draw.py`."""
    bars = runpy.run_path(str(ROOT / "launch" / "pictures" / "draw.py"))["bars"]()
    totals = {name: sum(parts.values()) for name, parts in bars.items()}
    own, dense, bitnet, dense_fp32 = totals.values()
    assert [*totals] == [
        "ternary, 8-bit states", "dense, 8-bit states", "BitNet, 8-bit states", "dense, fp32 states"
    ]  # fmt: skip
    caption = " ".join(re.search(r"^\*Planned.*?\*$", README, flags=re.M | re.S)[0].split())
    numbers = [f"{own:.2f} bytes", f"{dense:.2f}", f"{bitnet:.2f}", f"{dense_fp32:.2f}"]
    assert re.findall(r"\d+\.\d\d(?: bytes)?", caption) == numbers

"""Which run, sweep or checkpoint a word means: the one resolver of names for every verb.

small                 a run in runs/; methods: every run of a sweep; methods/dense-seed0, dense-seed0: one
small@200             its checkpoint of step 200
~/elsewhere/small     the folder of a run or of a sweep, wherever it is

In the folder of a sweep, where its children look, runs beside the sweep are found, too.
"""

import contextlib
import difflib
from collections.abc import Iterator
from pathlib import Path

from lowbit_dist.errors import ConfigError
from lowbit_dist.section import from_home

CONFIG = "config.yaml"  # what makes a folder a run
CHILDREN = ".children"  # in a sweep's folder: the configuration of each run, and what its process said
RUNS = Path("runs")
NEAR = 3  # names that an answer lists, if they are alike
KNOWN = 5  # and if none is


def find_runs(word: str | Path, root: Path | str = RUNS, other: str = "a sweep") -> list[Path]:
    """The folders of the runs that a name or a folder means, of a run or of a whole sweep.

    ConfigError if there is none, with names that are alike; other: what else could have been written
    """
    runs = _found(word, Path(root))
    if not runs:
        raise _nothing(word, Path(root), other)
    return runs


def find_run(word: str | Path, root: Path | str = RUNS, other: str = "a sweep") -> Path:
    """The folder of the one run that is meant; ConfigError if there is none, or are several."""
    runs = find_runs(word, root, other)
    if len(runs) > 1:
        raise ConfigError(f"{word} has {len(runs)} runs; name one of them, for example {runs[0]}")
    return runs[0]


def find_step(word: str | Path, root: Path | str, other: str) -> tuple[Path, int | None]:
    """The same of RUN or RUN@STEP, and the step."""
    name, at, step = str(word).rpartition("@")
    if not (at and name) or _found(word, Path(root)) or not _found(name, Path(root)):
        return find_run(word, root, other), None
    if not step.isdecimal():
        raise ConfigError(f"{str(word)!r} must end in the number of a step; write {name}@100, for example")
    return find_run(name, root, other), int(step)


def folders(folder: Path) -> list[Path]:
    """The runs of a folder, and those of its sweeps, in the order of their names."""
    runs = []
    for entry in _inside(folder):
        runs += [entry] if is_run(entry) else [child for child in _inside(entry) if is_run(child)]
    return runs


def is_run(folder: Path) -> bool:
    return (folder / CONFIG).is_file()


def names(root: Path = RUNS) -> list[str]:
    """What the runs and sweeps of a folder are called."""
    with contextlib.suppress(OSError):
        runs = [str(folder.relative_to(root)) for folder in folders(root)]
        return [*runs, *sorted({name.partition("/")[0] for name in runs if "/" in name})]
    return []


def _found(word: str | Path, root: Path) -> list[Path]:
    if not str(word).strip():
        return []
    try:
        text = from_home(str(word))
        # The last: of a sweep's child, whose root is the sweep, the runs beside that.
        for folder in (Path(text), root / text, root.parent / text):
            if is_run(folder) or (folder / "checkpoints").is_dir():
                return [folder]
            if folder.is_dir() and (inside := folders(folder)):
                return inside
        children = [folder for folder in folders(root) if folder.name == text] if root.is_dir() else []
    except (OSError, ValueError):  # no name that a file could have; a folder that cannot be read
        return []
    if len(children) > 1:
        places = ", ".join(str(child.relative_to(root)) for child in children[:KNOWN])
        raise ConfigError(f"{word} is a run of {len(children)} sweeps; write one of {places}")
    return children


def _inside(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))


def _nothing(word: str | Path, root: Path, other: str) -> ConfigError:
    """What is near: runs of the folder in which runs are, and of the one that the word leads into."""
    known = [*names(root), *_beside(Path(word), root)]
    alike = [name for name in known if Path(name).name == Path(word).name]
    alike += [name for name in difflib.get_close_matches(str(word), known, NEAR) if name not in alike]
    if alike:
        advice = f"did you mean {' or '.join(map(repr, alike[:NEAR]))}?"
    elif known:
        advice = f"write the name or the folder of one, for example {', '.join(known[:KNOWN])}"
    else:
        advice = "write the name or the folder of one; there are none yet"
    return ConfigError(f"{str(word)!r} is neither a run (in {root}/), a run's folder nor {other}; {advice}")


def _beside(path: Path, root: Path) -> Iterator[str]:
    with contextlib.suppress(OSError, ValueError):
        if len(path.parts) > 1 and path.parent != root and path.parent.is_dir():
            for entry in _inside(path.parent):
                if is_run(entry):
                    yield str(entry)

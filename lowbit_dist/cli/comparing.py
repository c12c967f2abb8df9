"""The verbs about several runs: training a sweep of them, what is there, and how they compare."""

import contextlib
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lowbit_dist import naming
from lowbit_dist.cli import console, progress
from lowbit_dist.cli.arguments import Json, at_home, run_names
from lowbit_dist.cli.lines import COLOURS, duration
from lowbit_dist.config import ConfigError

if TYPE_CHECKING:
    from rich.console import Console

    from lowbit_dist.sweep import Child, Sweep, SweepResult

Runs = Annotated[
    list[str],
    typer.Argument(
        metavar="RUN... | SWEEP",
        help="Names or folders of runs, or of whole sweeps.",
        show_default=False,
        callback=at_home,
        autocompletion=run_names,
    ),
]


def sweep(
    config: Annotated[
        Path,
        typer.Argument(metavar="CONFIG", help="The sweep's YAML file.", show_default=False, callback=at_home),
    ],
    as_json: Json = False,
) -> None:
    """Train a grid of runs, several at once, and compare them; the same command resumes after a stop.

    The file names a base configuration, seeds, and what sets runs apart, as configs/sweep-methods.yaml does.
    With a search, as in configs/sweeps/study.yaml, each run's best point of the grid is found first.

    Example: lowbit sweep configs/sweep-methods.yaml
    """
    with console.answering(as_json, "loading") as answer:
        from lowbit_dist import sweep as sweeping

        for loaded in sweeping.stages(config):
            with _following(loaded, answer.waiting) as told:
                outcome = sweeping.run(loaded, told)
            if not outcome.is_decided:
                break  # of a search whose runs were not all tried nothing is the best
        summary = _outcome(loaded, outcome)
        answer(summary, lambda terminal: draw_sweep(terminal, summary))
    if outcome.signum is not None:
        print(f"lowbit: stopped; the same command resumes {loaded.name}", file=sys.stderr)
        raise typer.Exit(128 + outcome.signum)
    if not outcome.is_complete:
        print(f"lowbit: {loaded.name} is not complete; the same command goes on with it", file=sys.stderr)
        raise typer.Exit(1)


def _outcome(loaded: "Sweep", outcome: "SweepResult") -> dict[str, Any]:
    return {
        "sweep": loaded.name,
        "folder": str(loaded.folder),
        "remarks": list(loaded.remarks),
        "mlflow_run_id": outcome.mlflow_run_id,
        "children": [
            {
                "run": child.name,
                "label": child.label,
                "seed": child.seed,
                "state": outcome.states[child.name],
                "why": outcome.why.get(child.name),
            }
            for child in loaded.children
        ],
        **outcome.comparison,
        "files": [str(file) for file in outcome.files],
    }


def compare(
    runs: Runs,
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Write table and pictures there; by default into the sweep's folder, or ./comparison.",
            callback=at_home,
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Compare runs side by side: mean and spread over seeds, as a table and as pictures.

    Runs that differ only in seed and name are one group; those that are not finished are in no mean.

    Example: lowbit compare methods
    """
    with console.answering(as_json, "comparing") as answer:
        from lowbit_dist import compare as comparing
        from lowbit_dist.runs import named

        compared = named(runs)
        comparison = comparing.compare(compared)
        folder = out or _place(runs, [run.folder for run in compared])
        try:
            files = comparing.write(comparison, folder)
        except OSError as error:
            raise ConfigError(
                f"--out ({folder}) cannot be written ({error.strerror}); write a folder that can"
            ) from None
        comparison["files"] = [str(file) for file in files]
        answer(comparison, lambda terminal: draw_comparison(terminal, comparison))


def _place(words: Sequence[str], folders: Sequence[Path]) -> Path:
    """In the sweep whose runs alone are compared."""
    parents = {folder.parent for folder in folders}
    is_sweep = len(words) == 1 and len(parents) == 1 and folders[0].name != Path(words[0]).name
    return (parents.pop() if is_sweep else Path()) / "comparison"


def list_runs(
    folder: Annotated[
        Path, typer.Argument(metavar="FOLDER", help="Where the runs are.", callback=at_home)
    ] = naming.RUNS,
    as_json: Json = False,
) -> None:
    """List the runs of a folder, those of sweeps too: state, step, loss, method and age.

    Example: lowbit runs
    """
    with console.answering(as_json, "reading") as answer:
        if not folder.is_dir():
            raise ConfigError(f"{folder} is no folder; write the run.dir of a run, or train one first")
        listing = {"runs": [_line(run, folder) for run in naming.folders(folder)]}
        answer(listing, lambda terminal: draw_runs(terminal, listing["runs"]))


def _line(folder: Path, root: Path) -> dict[str, Any]:
    from lowbit_dist import runs

    name = str(folder.relative_to(root))
    try:
        run = runs.read(folder)
    except ConfigError as error:  # one that another version wrote hides no other
        return {"run": name, "state": "unreadable", "why": str(error)}
    return {
        "run": name,
        "state": run.state,
        "step": run.step,
        "steps": run.config.train.steps,
        "loss": run.last("loss"),
        "val_loss": run.last("val_loss"),
        "method": run.config.method.label,
        "seed": run.config.run.seed,
        "age_seconds": runs.age(run),
        "diverged": run.has_diverged,
        "from": run.parent,
        "why": run.why,
    }


class SweepLogLines:
    """A sweep's progress where nobody watches: of each run the lines that it would have alone."""

    def __init__(self, waiting: console.Waiting):
        """waiting: ends with the first line"""
        self._waiting = waiting
        self._children: dict[str, progress.LogLines] = {}

    def say(self, text: str) -> None:
        self._waiting.stop()
        print(f"lowbit: {text}", file=sys.stderr, flush=True)

    def begins(self, child: "Child") -> None:
        self.say(f"{child.name} starts")
        self._children[child.name] = progress.LogLines(child.config, prefix=f"{child.name}: ")

    def row(self, child: "Child", row: Mapping[str, Any]) -> None:
        self._children[child.name].row(row)

    def ends(self, child: "Child", state: str, why: str) -> None:
        self.say(f"{child.name} {state}{': ' if why else ''}{why}")


class Bars:
    """A sweep's progress in a terminal: a bar for each run that trains, and one for all."""

    def __init__(self, loaded: "Sweep", terminal: "Console | None" = None):
        from rich.progress import TaskID

        self.progress = progress.bars(terminal)
        self.whole = self.progress.add_task(
            loaded.name, total=len(loaded.children), words={}, **progress.waits("checking")
        )
        self.tasks: dict[str, TaskID] = {}
        self.known: dict[str, dict[str, str]] = {}
        self.counts: dict[str, int] = {}

    def say(self, text: str) -> None:
        self.progress.console.print(f"lowbit: {text}", markup=False, style="dim")
        self.progress.update(self.whole, **progress.waits(None))

    def begins(self, child: "Child") -> None:
        self.known[child.name] = {}
        self.tasks[child.name] = self.progress.add_task(
            child.name, total=child.config.train.steps, words={}, **progress.waits("starting")
        )

    def row(self, child: "Child", row: Mapping[str, Any]) -> None:
        self.known[child.name] |= progress.in_words(row, child.config)
        self.progress.update(
            self.tasks[child.name],
            completed=row.get("step", 0),
            words=dict(self.known[child.name]),
            **progress.waits(None),
        )

    def ends(self, child: "Child", state: str, why: str) -> None:
        self.progress.remove_task(self.tasks.pop(child.name))
        self.say(f"{child.name} {state}{': ' if why else ''}{why}")
        self.counts[state] = self.counts.get(state, 0) + 1
        words = ", ".join(f"{n} {name}" for name, n in self.counts.items())
        self.progress.update(self.whole, advance=state == "finished", words={"states": words})


@contextlib.contextmanager
def _following(loaded: "Sweep", waiting: console.Waiting) -> "Iterator[SweepLogLines | Bars]":
    """Bars if stderr is a terminal, else lines."""
    if not sys.stderr.isatty():
        yield SweepLogLines(waiting)
        return
    waiting.stop()
    bars = Bars(loaded)
    with bars.progress:
        yield bars


def draw_sweep(terminal: "Console", summary: Mapping[str, Any]) -> None:
    """The comparison, and which runs failed."""
    if summary["groups"]:
        draw_comparison(terminal, summary)
    for child in summary["children"]:
        if child["state"] != "finished":
            why = f": {child['why']}" if child["why"] else ""
            terminal.print(f"{child['run']} {child['state']}{why}", markup=False, soft_wrap=True)


def draw_runs(terminal: "Console", runs: Sequence[Mapping[str, Any]]) -> None:
    """One line each."""
    from rich.markup import escape

    table = _table("run", "state", "step", "loss", "val", "method", "seed", "age", no_wrap=True)
    for run in runs:
        state = f"[{COLOURS.get(run['state'], 'red')}]{run['state']}[/]"
        if run.get("diverged"):
            state += " [red]diverged[/]"
        if run["state"] == "unreadable":
            table.add_row(escape(run["run"]), state)
            continue
        started_from = f" [dim](from {escape(run['from'])})[/]" if run["from"] else ""
        table.add_row(
            escape(run["run"]) + started_from,
            state,
            f"{run['step']:,}/{run['steps']:,}",
            *("-" if run[key] is None else f"{run[key]:.4f}" for key in ("loss", "val_loss")),
            run["method"],
            str(run["seed"]),
            duration(run["age_seconds"]),
        )
    if table.row_count:
        terminal.print(table)
    else:
        terminal.print("no runs yet")
    for run in runs:
        if run.get("why"):
            terminal.print(f"{run['run']}: {run['why']}", markup=False)


def draw_comparison(terminal: "Console", comparison: Mapping[str, Any]) -> None:
    """A row for each group, in as many tables as the terminal's width asks for, and a line for each run that
    is in none of the means.
    """
    from rich.markup import escape

    from lowbit_dist import compare as comparing

    groups = comparison["groups"]
    names = [escape(group["group"]) for group in groups]
    columns = {
        "runs": [comparing.count(group) for group in groups],
        "lr": [comparing.rates(group) for group in groups],
    } | {
        words: [comparing.cell(group, measure) for group in groups]
        for measure, words in comparing.columns(comparison).items()
    }
    edges = 2
    for part in _abreast(columns, terminal.width - edges - max(map(len, ("group", *names)))):
        table = _table("group", *part, no_wrap=True)
        for name, *cells in zip(names, *part.values(), strict=True):
            table.add_row(name, *cells)
        terminal.print(table)
    terminal.print(comparing.SPREAD, style="dim")
    for line in comparing.not_well(comparison):
        terminal.print(line, markup=False)
    for file in comparison["files"]:
        terminal.print(file, style="dim", markup=False, soft_wrap=True)


def _abreast(columns: Mapping[str, list[str]], width: int) -> Iterator[dict[str, list[str]]]:
    """These columns, in order, as many at a time as `width` cells hold beside each other."""
    part: dict[str, list[str]] = {}
    left = width
    for head, cells in columns.items():
        needed = 2 + max(map(len, (head, *cells)))
        if part and needed > left:
            yield part
            part, left = {}, width
        part[head] = cells
        left -= needed
    yield part


def _table(first: str, *columns: str, no_wrap: bool = False) -> Any:
    """no_wrap: of two cells only the first is written on several lines, where the terminal is narrow"""
    from rich import box
    from rich.table import Table

    from lowbit_dist.cli.tables import NARROW

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=NARROW)
    table.add_column(first, style="bold", overflow="fold")
    for name in columns:
        justify: Any = "left" if name in ("state", "method") else "right"
        table.add_column(name, justify=justify, no_wrap=no_wrap)
    return table

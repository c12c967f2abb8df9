"""The verbs about several runs: what is there, and how they compare."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lowbit_dist.cli import console
from lowbit_dist.cli.arguments import Json
from lowbit_dist.config import ConfigError

if TYPE_CHECKING:
    from rich.console import Console

Runs = Annotated[
    list[str],
    typer.Argument(
        metavar="RUN... | SWEEP", help="Names or folders of runs, or of whole sweeps.", show_default=False
    ),
]
COLOURS = {"finished": "green", "running": "cyan", "stopped": "yellow", "failed": "red"}


def compare(
    runs: Runs,
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Where the table and the pictures go; the sweep's folder, or ./comparison, if not given.",
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Mean and spread over seeds of runs side by side, as a table and as pictures.

    Runs that differ only in seed and name are one group; those that are not finished are in no mean.

    Example: lowbit compare methods
    """
    with console.answering(as_json) as answer:
        from lowbit_dist import compare as comparing
        from lowbit_dist.runs import named

        compared = named(runs)
        found = comparing.compare(compared)
        folder = out or _place(runs, [each.folder for each in compared])
        try:
            files = comparing.write(found, folder)
        except OSError as error:
            raise ConfigError(
                f"--out ({folder}) cannot be written ({error.strerror}); write a folder that can"
            ) from None
        found["files"] = [str(each) for each in files]
        answer(found, lambda terminal: draw_comparison(terminal, found))


def _place(words: Sequence[str], folders: Sequence[Path]) -> Path:
    """In the sweep whose runs alone are compared."""
    parents = {folder.parent for folder in folders}
    is_sweep = len(words) == 1 and len(parents) == 1 and folders[0].name != Path(words[0]).name
    return (parents.pop() if is_sweep else Path()) / "comparison"


def list_runs(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="Where the runs are.")] = Path("runs"),
    as_json: Json = False,
) -> None:
    """The runs of a folder, those of sweeps too: state, step, loss, method and age.

    Example: lowbit runs
    """
    with console.answering(as_json) as answer:
        from lowbit_dist import runs

        if not folder.is_dir():
            raise ConfigError(f"{folder} is no folder; write the run.dir of a run, or train one first")
        found = {"runs": [_line(each, folder) for each in runs.folders(folder)]}
        answer(found, lambda terminal: draw_runs(terminal, found["runs"]))


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
        "method": run.method,
        "seed": run.config.run.seed,
        "age_seconds": runs.age(run),
        "why": run.why,
    }


def draw_runs(terminal: "Console", runs: Sequence[Mapping[str, Any]]) -> None:
    """One line each."""
    from rich.markup import escape

    table = _table("run", "state", "step", "loss", "val", "method", "seed", "age")
    for run in runs:
        state = f"[{COLOURS.get(run['state'], 'red')}]{run['state']}[/]"
        if run["state"] == "unreadable":
            table.add_row(escape(run["run"]), state)
            continue
        table.add_row(
            escape(run["run"]),
            state,
            f"{run['step']:,}/{run['steps']:,}",
            *("-" if run[key] is None else f"{run[key]:.4f}" for key in ("loss", "val_loss")),
            run["method"],
            str(run["seed"]),
            console.duration(run["age_seconds"]),
        )
    if table.row_count:
        terminal.print(table)
    else:
        terminal.print("no runs yet")
    for run in runs:
        if run.get("why"):
            terminal.print(f"{run['run']}: {run['why']}", markup=False)


def draw_comparison(terminal: "Console", found: Mapping[str, Any]) -> None:
    """A row for each group, and a line for each run that is in none of the means."""
    from rich.markup import escape

    from lowbit_dist import compare as comparing

    table = _table("group", "runs", *(words for words, _ in comparing.MEASURES.values()))
    for group in found["groups"]:
        cells = (comparing.cell(group, name) for name in comparing.MEASURES)
        table.add_row(escape(group["group"]), comparing.count(group), *cells)
    terminal.print(table)
    terminal.print("Mean ± sample standard deviation over finished runs.", style="dim")
    for line in comparing.unfinished(found):
        terminal.print(line, markup=False)
    for file in found["files"]:
        terminal.print(file, style="dim", markup=False, soft_wrap=True)


def _table(first: str, *columns: str) -> Any:
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column(first, style="bold", overflow="fold")
    for name in columns:
        table.add_column(name, justify="left" if name in ("state", "method") else "right")
    return table

"""Runs side by side: mean and spread over seeds, as a table and as pictures.

Runs that differ in nothing but their seed and their name are one group.  A mean is over finished runs only;
those that are not finished are counted and named beside it.  Everything is read from the runs' folders.
"""

import csv
import io
import re
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lowbit_dist import charts, runs
from lowbit_dist.files import atomic_write
from lowbit_dist.runs import RunFolder

# Measure -> (its words, how its mean is written); the order is that of the table's columns.
MEASURES = {
    "val_loss": ("validation loss", ".4f"),
    "perplexity": ("perplexity", ".2f"),
    "bytes_per_parameter": ("bytes/parameter", ".3f"),
    "tokens_per_second": ("tokens/s", ",.0f"),
    "flip_rate": ("flip rate", ".3%"),
}
# What does not tell two groups apart: the seed, and where a run keeps its files and sends its numbers.
ASIDE = ("run.name", "run.seed", "run.dir", "tracking.", "data.tokenizer", "data.cache", "train.keep_")
# A field that says where something lies -> what the run has kept of its content, wherever that is.
CONTENTS = {"data.path": "data", "model.pretrained": "pretrained"}


def compare(members: Sequence[RunFolder]) -> dict[str, Any]:
    """Groups of runs, the best validation loss first, then those without one."""
    contents = {run.folder: _contents(run) for run in members}
    # One that was stopped before its first step keeps none: it is of the runs that say the same paths.
    of_paths = {_kind(run, {}): kept for run in members if (kept := contents[run.folder])}
    kinds: dict[str, list[RunFolder]] = {}
    for run in members:
        kept = contents[run.folder] or ({} if run.rows or run.summary else of_paths.get(_kind(run, {}), {}))
        kinds.setdefault(_kind(run, kept), []).append(run)
    labels = _labels(list(kinds.values()))
    groups = [_group(label, kind) for label, kind in zip(labels, kinds.values(), strict=True)]
    return {"groups": sorted(groups, key=_rank)}


def _contents(run: RunFolder) -> dict[str, str]:
    made_from = run.made_from
    return {field: kept for field, name in CONTENTS.items() if (kept := made_from.get(name))}


def _kind(run: RunFolder, contents: Mapping[str, str]) -> str:
    fields: dict[str, Any] = {**run.config.flat(), **contents}
    return repr({name: value for name, value in fields.items() if not name.startswith(ASIDE)})


def _rank(group: Mapping[str, Any]) -> float:
    mean: float | None = group["val_loss"]["mean"]
    return float("inf") if mean is None else mean


def _group(label: str, members: list[RunFolder]) -> dict[str, Any]:
    finished = [run for run in members if run.state == "finished"]
    measured = [measures(run) for run in finished]
    return {
        "group": label,
        "method": members[0].config.method.label,
        "finished": len(finished),
        "runs": [
            {
                "run": run.config.run.name,
                "folder": str(run.folder),
                "seed": run.config.run.seed,
                "state": run.state,
                "at": run.described(),
                "diverged": run.has_diverged,
                "curve": _curve(run),
                **(measures(run) if run.state == "finished" else {}),
            }
            for run in members
        ],
        **{name: _spread([values[name] for values in measured]) for name in MEASURES},
        "layer_flips": _layer_flips(finished),
    }


def measures(run: RunFolder) -> dict[str, float | None]:
    """What a finished run is compared by; None is what it does not have.

    Speed is the median of the logged intervals, which a restart in between does not change; bytes are all
    that stays allocated between steps, over all workers.
    """
    summary = run.summary or {}
    memory = summary.get("memory")
    speeds = [row["tokens_per_second"] for row in run.rows if row.get("tokens_per_second")]
    flips = [row["flip_rate"] for row in run.rows if row.get("flip_rate") is not None]
    return {
        "val_loss": summary.get("val_loss"),
        "perplexity": summary.get("perplexity"),
        "bytes_per_parameter": sum(charts.of_report(memory).values()) if memory else None,
        "tokens_per_second": statistics.median(speeds) if speeds else None,
        "flip_rate": statistics.fmean(flips) if flips else None,
    }


def _spread(values: list[float | None]) -> dict[str, Any]:
    """The mean and the sample standard deviation of those there are; one value has no spread."""
    known = [value for value in values if value is not None]
    return {
        "mean": statistics.fmean(known) if known else None,
        "spread": statistics.stdev(known) if len(known) > 1 else None,
        "n": len(known),
    }


def _curve(run: RunFolder) -> list[tuple[float, float]]:
    """Tokens and training loss."""
    keys = ("tokens", "loss")
    return [(row["tokens"], row["loss"]) for row in run.rows if all(row.get(key) is not None for key in keys)]


def _layer_flips(members: Sequence[RunFolder]) -> dict[str, float]:
    """Layer -> its flip rate, the mean over the log steps of the runs; layers in the order of the model."""
    rates: dict[str, list[float]] = {}
    for run in members:
        for name, values in runs.layer_flips(run.folder).items():
            rates.setdefault(name, []).extend(values)
    return {name: statistics.fmean(values) for name, values in rates.items()}


def _labels(groups: list[list[RunFolder]]) -> list[str]:
    """A group is called what its first run is, without the seed; by its folder if that is not unique."""
    labels = [re.sub(r"[-_.](s|seed)[-_.]?\d+$", "", runs[0].config.run.name) for runs in groups]
    return [
        str(runs[0].folder) if labels.count(label) > 1 else label
        for label, runs in zip(labels, groups, strict=True)
    ]


def cell(group: Mapping[str, Any], measure: str) -> str:
    """A mean and its spread, in words."""
    statistic, form = group[measure], MEASURES[measure][1]
    if statistic["mean"] is None:
        return "-"
    if measure == "perplexity" and statistic["mean"] >= 1e6:
        form = ".2e"
    text = format(statistic["mean"], form)
    if statistic["spread"] is not None:
        text += f" ± {format(statistic['spread'], form)}"
    # A run that diverged is finished and has no loss: it is not in the mean, and that is said.
    return text if statistic["n"] == group["finished"] else f"{text} (of {statistic['n']})"


def count(group: Mapping[str, Any]) -> str:
    """How many runs the means are of."""
    n, diverged = len(group["runs"]), sum(run["diverged"] for run in group["runs"])
    words = str(n) if group["finished"] == n else f"{group['finished']} of {n}"
    return f"{words}, {diverged} diverged" if diverged else words


def not_well(comparison: Mapping[str, Any]) -> list[str]:
    """A line for each run that is in no mean, or has diverged."""
    return [
        f"{run['run']}: {run['at']}"
        for group in comparison["groups"]
        for run in group["runs"]
        if run["state"] != "finished" or run["diverged"]
    ]


def markdown(comparison: Mapping[str, Any]) -> str:
    """The table as a page of text."""
    heads = ["", "runs", *(words for words, _ in MEASURES.values())]
    rows = [heads, ["---", *["---:"] * (len(heads) - 1)]]
    rows += [
        [group["group"], count(group), *(cell(group, name) for name in MEASURES)]
        for group in comparison["groups"]
    ]
    lines = [f"| {' | '.join(row)} |" for row in rows]
    lines += ["", "Mean ± sample standard deviation over finished runs."]
    lines += [f"* {line}" for line in not_well(comparison)]
    return "\n".join(lines) + "\n"


def as_csv(comparison: Mapping[str, Any]) -> str:
    """A row for each group, all digits kept."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    columns = [f"{name}{end}" for name in MEASURES for end in ("", "_spread", "_n")]
    writer.writerow(["group", "method", "runs", "finished", *columns])
    for group in comparison["groups"]:
        cells = [group[name][part] for name in MEASURES for part in ("mean", "spread", "n")]
        writer.writerow([group["group"], group["method"], len(group["runs"]), group["finished"], *cells])
    return text.getvalue()


def write(comparison: Mapping[str, Any], folder: Path) -> list[Path]:
    """The table as `comparison.md` and `.csv`, and a picture of each kind for which there is a number."""
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for name, text in (("comparison.md", markdown(comparison)), ("comparison.csv", as_csv(comparison))):
        with atomic_write(folder / name) as draft:
            draft.write_text(text)
        written.append(folder / name)
    curves = {
        group["group"]: [run["curve"] for run in group["runs"] if run["curve"]]
        for group in comparison["groups"]
    }
    points = {
        group["group"]: {name: group[name] for name in ("bytes_per_parameter", "val_loss")}
        for group in comparison["groups"]
        if group["val_loss"]["mean"] is not None and group["bytes_per_parameter"]["mean"] is not None
    }
    colours = charts.colours(list(curves))
    if any(curves.values()):
        with atomic_write(folder / "loss-against-tokens.png") as draft:
            charts.loss_curves(curves, draft, colours=colours)
        written.append(folder / "loss-against-tokens.png")
    flips = {group["group"]: group["layer_flips"] for group in comparison["groups"] if group["layer_flips"]}
    if flips:
        with atomic_write(folder / "flips-per-layer.png") as draft:
            charts.layer_curves(flips, draft, colours=colours)
        written.append(folder / "flips-per-layer.png")
    if points:
        with atomic_write(folder / "loss-against-bytes.png") as draft:
            charts.loss_against_bytes(points, draft, colours=colours)
        written.append(folder / "loss-against-bytes.png")
    return written

"""Runs side by side: mean and spread over seeds, as a table, as pictures, and as a page of both.

Runs that differ in nothing but their seed and their name are one group.  A mean is over finished runs only;
those that are not finished are counted and named beside it.  Everything is read from the runs' folders.
"""

import csv
import io
import re
import statistics
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from lowbit_dist import charts, runs
from lowbit_dist.files import atomic_write
from lowbit_dist.runs import RunFolder

# Measure -> (its words, how its mean is written); the order is that of the table's columns.  Bytes are those
# of a linear layer's weights, of these with the optimizer's states, and of all that stays, of all parameters.
MEASURES = {
    "val_loss": ("validation loss", ".4f"),
    "perplexity": ("perplexity", ".2f"),
    "bits_per_byte": ("bits/byte", ".4f"),
    "bytes_per_linear_weight": ("bytes/weight", ".3f"),
    "bytes_per_linear_weight_with_states": ("with states", ".3f"),
    "bytes_per_parameter": ("bytes/parameter", ".3f"),
    "tokens_per_second": ("tokens/s", ",.0f"),
    "flip_rate": ("flip rate", ".3%"),
    "zero_fraction": ("zeros", ".1%"),
}
# Picture of the validation loss -> the bytes against which it is, and these in words.
OF_BYTES = {
    "loss-against-bytes.png": (
        "bytes_per_parameter",
        "bytes of all workers per parameter of the whole model, between steps",
    ),
    "loss-against-bytes-of-weights.png": ("bytes_per_linear_weight", "bytes per weight of the linear layers"),
    "loss-against-bytes-with-states.png": (
        "bytes_per_linear_weight_with_states",
        "bytes per weight of the linear layers, with the optimizer's states",
    ),
}
SPREAD = "Mean ± sample standard deviation over finished runs; none is written where all of them agree."
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
    counted = {run.config.run.seed: run for run in reversed(members) if run.state == "finished"}
    finished = [run for run in members if run in counted.values()]
    measured = [measures(run) for run in finished]
    return {
        "group": label,
        "method": members[0].config.method.label,
        "lr": members[0].config.optimizer.lr,
        "linear_lr": members[0].config.optimizer.lr * members[0].config.optimizer.linear_lr_ratio,
        "finished": len(finished),
        "runs": [
            {
                "run": run.config.run.name,
                "folder": str(run.folder),
                "seed": run.config.run.seed,
                "state": run.state,
                "at": run.described(),
                "repeats": _repeated(run, counted),
                "diverged": run.has_diverged,
                "curve": _curve(run),
                **(measures(run) if run.state == "finished" else {}),
            }
            for run in members
        ],
        **{name: _spread([values[name] for values in measured]) for name in MEASURES},
        "layer_flips": _layer_flips(finished),
    }


def _repeated(run: RunFolder, counted: Mapping[int, RunFolder]) -> str | None:
    """The run of the same seed that is counted in its place."""
    other = counted.get(run.config.run.seed)
    return None if other is None or other is run or run.state != "finished" else str(other.folder)


def measures(run: RunFolder) -> dict[str, float | None]:
    """What a finished run is compared by; None is what it does not have.

    Speed is the median of the logged intervals, which a restart in between does not change; bytes are all
    that stays allocated between steps, over all workers.  Flips are the mean of the log steps, zeros those of
    the last one.  One that has diverged has no loss.
    """
    summary = run.summary or {}
    losses = {} if run.has_diverged else summary
    memory = summary.get("memory") or {}
    speeds = [row["tokens_per_second"] for row in run.rows if row.get("tokens_per_second")]
    flips = [row["flip_rate"] for row in run.rows if row.get("flip_rate") is not None]
    return {
        "val_loss": losses.get("val_loss"),
        "perplexity": losses.get("perplexity"),
        "bits_per_byte": losses.get("bits_per_byte"),
        "bytes_per_linear_weight": memory.get("bytes_per_linear_weight"),
        "bytes_per_linear_weight_with_states": memory.get("bytes_per_linear_weight_with_states"),
        "bytes_per_parameter": sum(charts.of_report(memory).values()) if memory else None,
        "tokens_per_second": statistics.median(speeds) if speeds else None,
        "flip_rate": statistics.fmean(flips) if flips else None,
        "zero_fraction": run.last("zero_fraction"),
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
    if statistic["spread"]:  # bytes are equal for all seeds, to the last one
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
    members = [run for group in comparison["groups"] for run in group["runs"]]
    lines = [f"{run['run']}: {run['at']}" for run in members if run["state"] != "finished" or run["diverged"]]
    return lines + [
        f"{run['run']}: seed {run['seed']} counts once, as {run['repeats']}"
        for run in members
        if run["repeats"]
    ]


def columns(comparison: Mapping[str, Any]) -> dict[str, str]:
    """Measure -> its words, of those that any group has."""
    return {
        name: words
        for name, (words, _) in MEASURES.items()
        if any(group[name]["n"] for group in comparison["groups"])
    }


def rates(group: Mapping[str, Any]) -> str:
    """The peak learning rate, and in brackets that of linear layers' weights where it is another."""
    lr, linear = group["lr"], group["linear_lr"]
    return f"{lr:g}" if linear == lr else f"{lr:g} ({linear:g})"


def markdown(comparison: Mapping[str, Any], pictures: Sequence[str] = ()) -> str:
    """The table, and these pictures beside it, as a page of text."""
    shown = columns(comparison)
    heads = ["", "runs", "lr (of linear layers)", *shown.values()]
    rows = [heads, ["---", *["---:"] * (len(heads) - 1)]]
    rows += [
        [group["group"], count(group), rates(group), *(cell(group, name) for name in shown)]
        for group in comparison["groups"]
    ]
    lines = [f"| {' | '.join(row)} |" for row in rows]
    lines += ["", SPREAD]
    lines += [f"* {line}" for line in not_well(comparison)]
    for name in pictures:
        lines += ["", f"![{Path(name).stem.replace('-', ' ')}]({name})"]
    return "\n".join(lines) + "\n"


def as_csv(comparison: Mapping[str, Any]) -> str:
    """A row for each group, all digits kept."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    of_measures = [f"{name}{end}" for name in MEASURES for end in ("", "_spread", "_n")]
    settings = ("group", "method", "lr", "linear_lr")
    writer.writerow([*settings, "runs", "finished", *of_measures])
    for group in comparison["groups"]:
        cells = [group[name][part] for name in MEASURES for part in ("mean", "spread", "n")]
        known = [group[name] for name in settings]
        writer.writerow([*known, len(group["runs"]), group["finished"], *cells])
    return text.getvalue()


def write(comparison: Mapping[str, Any], folder: Path) -> list[Path]:
    """The page `comparison.md`, its table as `comparison.csv`, and a picture of each kind for which there is
    a number.
    """
    folder.mkdir(parents=True, exist_ok=True)
    drawings = _drawings(comparison)
    pages = {"comparison.md": markdown(comparison, list(drawings)), "comparison.csv": as_csv(comparison)}
    for name, text in pages.items():
        with atomic_write(folder / name) as draft:
            draft.write_text(text)
    for name, draw in drawings.items():
        with atomic_write(folder / name) as draft:
            draw(draft)
    return [folder / name for name in (*pages, *drawings)]


def _curves(group: Mapping[str, Any]) -> list[list[tuple[float, float]]]:
    """Of its finished runs, or of all if none is finished."""
    drawn = [run for run in group["runs"] if run["curve"] and not run["repeats"]]
    return [run["curve"] for run in drawn if run["state"] == "finished"] or [run["curve"] for run in drawn]


def _drawings(comparison: Mapping[str, Any]) -> dict[str, Callable[[Path], object]]:
    """Name -> what draws it into a file, of each picture for which there is a number."""
    groups = {group["group"]: group for group in comparison["groups"]}
    colours = charts.colours(list(groups))
    drawings: dict[str, Callable[[Path], object]] = {}
    curves = {name: _curves(group) for name, group in groups.items()}
    if curves := {name: of_runs for name, of_runs in curves.items() if of_runs}:
        drawings["loss-against-tokens.png"] = partial(charts.loss_curves, curves, colours=colours)
    if flips := {name: group["layer_flips"] for name, group in groups.items() if group["layer_flips"]}:
        drawings["flips-per-layer.png"] = partial(charts.layer_curves, flips, colours=colours)
    for name, (measure, words) in OF_BYTES.items():
        measured = {
            label: {"bytes": group[measure], "val_loss": group["val_loss"]}
            for label, group in groups.items()
            if group["val_loss"]["n"] and group[measure]["n"]
        }
        if measured:
            drawings[name] = partial(charts.loss_against_bytes, measured, colours=colours, words=words)
    return drawings

"""The pictures of a run and of runs side by side: loss curves, and the bytes that each parameter costs.

Every figure states its unit on its axis; colours are the Okabe-Ito palette, told apart by colour-blind
readers.
"""

import logging
import math
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from lowbit_dist.files import atomic_write
from lowbit_dist.record import LAYERS, METRICS, layer_name, rows_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Component -> (its words, its colour, its character in a terminal); the order is that of the bars, from
# below.
COMPONENTS = {
    "low_bit_weights": ("low-bit weights (codes)", "#0072B2", "█"),
    "scales": ("scales", "#56B4E9", "▚"),
    "other_weights": ("other weights", "#009E73", "▓"),
    "gradients": ("gradients", "#E69F00", "▒"),
    "optimizer_states": ("optimizer states", "#D55E00", "░"),
    "buffers": ("buffers", "#999999", "·"),
}
# A run's baselines, by their names in a memory report.  Two of the same words and states are one bar.
BASELINES = {"plan_dense_same_states": "dense", "plan_bitnet": "BitNet", "plan_dense": "dense"}
STATES = {"int8": "8-bit"}
UNITS = {"flip_rate": "share of its codes that change in a step"}  # of a number of layers
SEEN = 0.005  # bytes per parameter from which a number of two decimals is not 0.00
WIDE = 20.0  # largest over smallest number from which curves are told apart on a logarithmic axis alone
INK = "#222222"
# Of runs side by side; the palette's yellow is not seen on white.
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
STYLES = ("-", "--", ":", "-.")
MARKERS = "osD^vPX"
log = logging.getLogger(__name__)

Colours = Mapping[str, int]  # group -> its number: the same look in every picture
Memory = Mapping[str, Mapping[str, float]]  # run -> component -> bytes per parameter of the whole model


def of_run(folder: Path, name: str, summary: Mapping[str, Any] | None) -> list[Path]:
    """Draw what there is to draw of a run into its folder: the pictures.

    A picture that cannot be drawn is reported and left out, and the run ends as it did.
    """
    drawings: dict[str, tuple[Callable[[], Any], Callable[[Any, Path], object]]] = {
        "loss.png": (lambda: _with("loss", folder), partial(loss_curve, title=name)),
        "flips.png": (lambda: _with_flips(folder), layer_heat),
        "memory.png": (lambda: summary and bytes_per_parameter(summary["memory"]), memory_bars),
    }
    drawn = []
    for file, (content, draw) in drawings.items():
        try:
            if there := content():
                with atomic_write(folder / file) as draft:
                    draw(there, draft)
                drawn.append(folder / file)
        except Exception as error:
            why = getattr(error, "strerror", None) or f"{type(error).__name__}: {error}"
            log.warning("%s is not drawn (%s)", folder / file, why)
    return drawn


def _with(key: str, folder: Path) -> list[dict[str, Any]]:
    rows = rows_of(folder / METRICS)
    return rows if any(key in row for row in rows) else []


def _with_flips(folder: Path) -> list[dict[str, Any]]:
    """None of a method without levels."""
    rows = rows_of(folder / LAYERS)
    return [row for row in rows if any("flip_rate" in layer for layer in row["layers"].values())]


def loss_curve(rows: Iterable[Mapping[str, Any]], path: str | Path, *, title: str = "Loss") -> Path:
    """Draw training and validation loss against tokens; rows are those of `metrics.jsonl`."""
    rows = list(rows)
    figure, axes = _figure(7.2, 4.2)
    last = max((row["tokens"] for row in rows if _number(row.get("tokens"))), default=0)
    factor, unit = _tokens(last)
    curves = (("loss", "training", "#56B4E9", ""), ("val_loss", "validation", "#D55E00", "o"))
    for key, label, colour, marker in curves:
        points = [
            (row["tokens"] / factor, row[key])
            for row in rows
            if _number(row.get(key)) and _number(row.get("tokens"))
        ]
        if points:
            alone = marker or ("o" if len(points) == 1 else "")
            words = f"{label}, {points[-1][1]:.3f} at the end"
            axes.plot(
                *zip(*points, strict=True), color=colour, marker=alone, markersize=5, label=words, lw=1.6
            )
    axes.set_xlabel(f"tokens ({unit})" if unit else "tokens")
    axes.set_ylabel("cross-entropy (nats per token)")
    axes.set_title(title, loc="left", fontsize=12, color=INK)
    axes.grid(axis="y", color="#dddddd", lw=0.8)
    axes.margins(x=0.02)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False)
    else:
        axes.text(0.5, 0.5, "no finite loss was logged", transform=axes.transAxes, ha="center", color=INK)
    return _saved(figure, path)


def memory_bars(memory: Memory, path: str | Path, *, title: str = "Memory of each parameter") -> Path:
    """Draw bytes per parameter as one stacked bar a run, told apart by component."""
    figure, axes = _figure(7.2, 1.5 + 0.75 * len(memory))
    names = list(memory)
    totals = {name: sum(memory[name].values()) for name in names}
    widest = max(totals.values(), default=0.0) or 1.0
    axes.set_xlim(0, widest * 1.12)
    for component, (words, colour, _) in COMPONENTS.items():
        if not any(memory[name].get(component, 0) >= SEEN for name in names):
            continue  # a legend of what nobody finds
        for y, name in enumerate(names):
            value = memory[name].get(component, 0.0)
            start = sum(memory[name].get(earlier, 0.0) for earlier in _before(component))
            axes.barh(
                y, value, 0.62, left=start, color=colour, edgecolor="white", linewidth=0.8,
                label=words if y == 0 else None,
            )  # fmt: skip
            if value > 0.06 * widest:
                axes.text(
                    start + value / 2, y, f"{value:.2f}", ha="center", va="center", fontsize=9,
                    color=_readable_on(colour),
                )  # fmt: skip
            elif value > 0 and component == "low_bit_weights":  # too narrow for the number it is all about
                axes.text(
                    start, y - 0.33, f"{value:.2f}", ha="left", va="bottom", fontsize=8, color=colour
                )  # fmt: skip
    for y, name in enumerate(names):
        axes.text(
            totals[name] + 0.01 * widest, y, f"{totals[name]:.2f}", va="center", fontsize=10, color=INK,
            fontweight="bold",
        )  # fmt: skip
        if y and 0 < totals[names[0]] < totals[name]:
            axes.text(
                totals[name], y + 0.33, f"{names[0].partition(',')[0]}: "
                f"{1 - totals[names[0]] / totals[name]:.0%} less than this",
                ha="right", va="top", fontsize=8, color=INK,
            )  # fmt: skip
    axes.set_yticks(range(len(names)), names, fontsize=10)
    axes.tick_params(axis="y", length=0)
    axes.invert_yaxis()
    # Shares of a whole: each component's bytes over all parameters, not over those that it serves alone.
    axes.set_xlabel("bytes of all workers per parameter of the whole model, between steps")
    axes.set_title(title, loc="left", fontsize=12, color=INK)
    axes.spines["left"].set_visible(False)
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False, fontsize=9)
    return _saved(figure, path)


def colours(groups: Sequence[str]) -> Colours:
    """Each group's number, by which `loss_curves` and `loss_against_bytes` give it one look."""
    return {group: number for number, group in enumerate(groups)}


def loss_curves(
    groups: Mapping[str, Sequence[Sequence[tuple[float, float]]]],  # (tokens, loss) of each run
    path: str | Path,
    *,
    colours: Colours,
    title: str = "Training loss",
) -> Path:
    """Draw each run thin, and the mean of a group's runs thick wherever all of them have a point."""
    figure, axes = _figure(7.2, 4.2)
    runs = [curve for curves in groups.values() for curve in curves]
    factor, unit = _tokens(max((x for curve in runs for x, _ in curve), default=0))
    for group, curves in groups.items():
        colour, style, _ = _look(colours[group])
        for curve in curves if len(curves) > 1 else ():
            axes.plot(*_scaled(curve, factor), color=colour, ls=style, lw=0.8, alpha=0.45)
        mean = _mean_curve(curves)
        alone = "o" if len(mean) == 1 else ""
        axes.plot(*_scaled(mean, factor), color=colour, ls=style, lw=2.0, marker=alone, label=group)
    axes.set_xlabel(f"tokens ({unit})" if unit else "tokens")
    axes.set_ylabel("training loss (nats per token)")
    title += ": thick is the mean, thin is each seed" if len(runs) > len(groups) else ""
    axes.margins(x=0.02)
    return _saved_with_legend(figure, axes, path, title)


def loss_against_bytes(
    groups: Mapping[str, Mapping[str, Mapping[str, float | None]]],  # -> bytes, val_loss -> mean and spread
    path: str | Path,
    *,
    colours: Colours,
    words: str,  # what the bytes are of
    title: str = "Validation loss against memory",
) -> Path:
    """Draw a point with its error bars for each group; lower and further left is better."""
    figure, axes = _figure(7.2, 4.2)
    for group, measured in groups.items():
        colour, _, marker = _look(colours[group])
        x, y = measured["bytes"], measured["val_loss"]
        axes.errorbar(
            [x["mean"] or 0.0], [y["mean"] or 0.0], xerr=x["spread"] or None, yerr=y["spread"] or None,
            color=colour, marker=marker, markersize=8, markeredgecolor="white", capsize=4, ls="",
            label=f"{group} ({y['n']} seed{'' if y['n'] == 1 else 's'})", clip_on=False,
        )  # fmt: skip
    axes.margins(0.12)
    sizes = [measured["bytes"]["mean"] or 0.0 for measured in groups.values()]
    if 0 < min(sizes) * WIDE < max(sizes):
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter("{x:g}")
    else:
        axes.set_xlim(left=0)
    axes.set_xlabel(words)
    axes.set_ylabel("validation loss (nats per token)")
    has_bars = any(measured["val_loss"]["spread"] is not None for measured in groups.values())
    title += ", ± one standard deviation over seeds" if has_bars else ""
    return _saved_with_legend(figure, axes, path, title, grid="both")


def layer_heat(rows: Sequence[Mapping[str, Any]], path: str | Path, *, metric: str = "flip_rate") -> Path:
    """Draw a number of every layer over a run, a strip for each; rows are those of `layers.jsonl`."""
    layers = [row["layers"] for row in rows]
    names = list(dict.fromkeys(name for of in layers for name in of if metric in of[name]))
    values = [[of.get(name, {}).get(metric, math.nan) for of in layers] for name in names]
    figure, axes = _figure(7.2, min(12.0, 1.6 + 0.16 * len(names)))
    edges = [row["step"] for row in rows]
    steps = [*edges, edges[-1] + (edges[-1] - edges[-2] if len(edges) > 1 else 1)]
    mesh = axes.pcolormesh(steps, range(len(names) + 1), values, cmap="viridis")
    every = -(-len(names) // 60)  # labels that can still be read
    axes.set_yticks([i + 0.5 for i in range(len(names))][::every], [_short(name) for name in names][::every])
    axes.tick_params(axis="y", labelsize=6)
    axes.invert_yaxis()
    axes.set_xlabel("step")
    axes.set_title(f"{metric.replace('_', ' ')} of each layer", loc="left", fontsize=12, color=INK)
    figure.colorbar(mesh, ax=axes, format="%.2g", label=UNITS.get(metric, ""))
    return _saved(figure, path)


def layer_curves(
    groups: Mapping[str, Mapping[str, float]],  # -> layer -> number
    path: str | Path,
    *,
    colours: Colours,
    title: str = "Flip rate of each layer, the mean of all log steps",
) -> Path:
    """Draw a number of every layer, in the order of the model, for each group."""
    figure, axes = _figure(7.2, 4.2)
    for group, layers in groups.items():
        colour, style, _ = _look(colours[group])
        axes.plot(range(len(layers)), list(layers.values()), color=colour, ls=style, lw=1.4, label=group)
    values = [value for layers in groups.values() for value in layers.values()]
    if min(values) > 0 and max(values) > WIDE * min(values):  # grids of few levels beside those of many
        axes.set_yscale("log")
    else:
        axes.set_ylim(bottom=0)
    names = max(([*layers] for layers in groups.values()), key=len)
    every = -(-len(names) // 14)
    labels = [_short(name) for name in names[::every]]
    axes.set_xticks(range(0, len(names), every), labels, rotation=60, ha="right")
    axes.tick_params(axis="x", labelsize=7)
    axes.set_ylabel(UNITS["flip_rate"])
    return _saved_with_legend(figure, axes, path, title)


def _short(name: str) -> str:
    return layer_name(name).removeprefix("layers.")


def _look(number: int) -> tuple[str, str, str]:
    """Colour, line style and marker; styles and markers change when the colours are used up."""
    n = len(PALETTE)
    return PALETTE[number % n], STYLES[number // n % len(STYLES)], MARKERS[(number + number // n) % n]


def _scaled(curve: Sequence[tuple[float, float]], factor: float) -> tuple[list[float], list[float]]:
    return [x / factor for x, _ in curve], [y for _, y in curve]


def _mean_curve(curves: Sequence[Sequence[tuple[float, float]]]) -> list[tuple[float, float]]:
    """Where all have a point; the first curve if nowhere."""
    values = [dict(curve) for curve in curves]
    shared = [x for x, _ in curves[0] if all(x in curve for curve in values)]
    return [(x, sum(curve[x] for curve in values) / len(values)) for x in shared] or list(curves[0])


def _saved_with_legend(
    figure: "Figure", axes: "Axes", path: str | Path, title: str, *, grid: Literal["y", "both"] = "y"
) -> Path:
    """With the legend below, where it covers nothing, in as many columns as its words leave room for."""
    axes.set_title(title, loc="left", fontsize=12, color=INK)
    axes.grid(axis=grid, color="#dddddd", lw=0.8)
    handles, labels = axes.get_legend_handles_labels()
    columns = max(1, min(len(labels), 100 // (max(map(len, labels)) + 10)))
    rows = -(-len(labels) // columns)
    figure.set_figheight(figure.get_figheight() + 0.22 * rows)
    figure.legend(
        handles, labels, loc="outside lower center", ncols=columns, frameon=False, fontsize=9,
        handlelength=1.6,
    )  # fmt: skip
    return _saved(figure, path)


def bytes_per_parameter(memory: Mapping[str, Any]) -> Memory:
    """Resident bytes of a run's summary and of its baselines, over all parameters, as bars show them.

    The run is the first; each is named with its states.  A baseline that is another one is left out.
    """
    reports = [("this run", memory), *((words, memory.get(key)) for key, words in BASELINES.items())]
    bars: dict[str, dict[str, float]] = {}
    for words, one in reports:
        if one is not None:
            bars.setdefault(_with_states(words, one), of_report(one))
    return bars


def _with_states(words: str, report: Mapping[str, Any]) -> str:
    states = report.get("states")  # a summary of an earlier version does not say
    return words if states is None else f"{words}, {STATES.get(states, states)} states"


def of_report(report: Mapping[str, Any]) -> dict[str, float]:
    """Component -> resident bytes over all workers, per parameter of the whole model."""
    return {
        part: report["components"][part]["bytes"] * report["workers"] / report["parameters"]["total"]
        for part in COMPONENTS
    }


def memory_bars_text(memory: Memory, *, width: int = 60) -> str:
    """The same bars for a terminal: the longest has `width` characters, the legend stands below."""
    names = list(memory)
    totals = {name: sum(memory[name].values()) for name in names}
    widest = max(totals.values(), default=0.0) or 1.0
    margin = max((len(name) for name in names), default=0)
    lines: list[str] = []
    used: set[str] = set()
    for name in names:
        bar, end, drawn = "", 0.0, 0
        for component, (_, _, character) in COMPONENTS.items():
            part = memory[name].get(component, 0.0)
            end += part
            if part < SEEN:
                continue
            # Rounding the running sum, not each part, keeps every bar as long as its total says.
            cells = round(end / widest * width) - drawn
            bar += character * cells
            drawn += cells
            used |= {component} if cells else set()
        lines.append(f"{name:<{margin}}  {bar}{' ' if bar else ''}{totals[name]:.2f}")
    space, indent = "\N{NO-BREAK SPACE}", " " * (margin + 2)
    words = [f"{mark} {words}" for part, (words, _, mark) in COMPONENTS.items() if part in used]
    legend = textwrap.fill(
        "bytes per parameter: " + "   ".join(word.replace(" ", space) for word in words),
        len(indent) + width + 6, initial_indent=indent, subsequent_indent=indent, break_long_words=False,
    )  # fmt: skip
    return "\n".join([*lines, legend.replace(space, " ")])


def _before(component: str) -> list[str]:
    names = list(COMPONENTS)
    return names[: names.index(component)]


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < float("inf")


def _tokens(last: float) -> tuple[float, str]:
    for factor, unit in ((1e9, "billions"), (1e6, "millions"), (1e3, "thousands")):
        if last >= 2 * factor:
            return factor, unit
    return 1.0, ""


def _readable_on(colour: str) -> str:
    red, green, blue = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
    return "white" if 0.299 * red + 0.587 * green + 0.114 * blue < 140 else INK


def _figure(width: float, height: float) -> "tuple[Figure, Axes]":
    # Without pyplot: nothing global, no display, usable beside other threads.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    return figure, axes


def _saved(figure: "Figure", path: str | Path) -> Path:
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, format=path.suffix.removeprefix(".") or "png", facecolor="white")
    return path

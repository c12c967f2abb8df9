"""`lowbit watch`: a run as its folder shows it, again and again while it trains."""

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lowbit_dist.cli import console, plots
from lowbit_dist.cli.arguments import Json, at_home, run_names
from lowbit_dist.cli.lines import BAR, COLOURS, LEAST_BAR, duration
from lowbit_dist.errors import in_bytes
from lowbit_dist.record import layer_name

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

    from lowbit_dist.runs import RunFolder

RunName = Annotated[
    str,
    typer.Argument(
        metavar="RUN",
        help="A run's name or its folder.",
        show_default=False,
        callback=at_home,
        autocompletion=run_names,
    ),
]
EVERY = 1.0  # seconds between looks
CURVE = 8  # lines of the loss, where there is room
HEARTBEAT_TIMEOUT = 15.0  # seconds after which a worker that trains would have written its heartbeat
NUMBERS = (
    "loss", "val_loss", "bits_per_byte", "tokens", "tokens_per_second", "tokens_per_second_per_worker", "mfu",
    "lr", "grad_norm", "flip_rate",
)  # fmt: skip
COUNTS = ("skipped_steps", "rollbacks")


def watch(
    run: RunName,
    once: Annotated[bool, typer.Option("--once", help="Show it once, as it is now.")] = False,
    layers: Annotated[
        bool, typer.Option("--layers", help="Show the flip rate of each layer over the run, too.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Watch a run: loss, speed, memory against the baselines, flips, checkpoint age, workers.

    Live in a terminal until the run ends or Ctrl-C; once anywhere else, and with --json.

    Example: lowbit watch quickstart
    """
    with console.answering(as_json) as answer:
        from lowbit_dist.naming import find_run

        folder = find_run(run)
        seen = snapshot(folder, layers=layers)

        def draw(terminal: "Console") -> None:
            if terminal.is_terminal and not once:
                _live(terminal, folder, layers)
            else:
                terminal.print(picture(seen, terminal.width))

        answer(seen, draw)


def _live(terminal: "Console", folder: Path, layers: bool) -> None:
    from rich.live import Live

    with Live(console=terminal, auto_refresh=False) as live:
        while True:
            seen = snapshot(folder, layers=layers)
            live.update(_fitting(seen, terminal), refresh=True)
            if not seen["is_alive"]:
                return
            time.sleep(EVERY)


def snapshot(folder: Path, *, layers: bool = False) -> dict[str, Any]:
    """What the run's files say now; with `layers`, the flip rates of each layer, too."""
    from lowbit_dist import heartbeat, runs

    run = runs.read(folder)
    now, beats = time.time(), heartbeat.newest(folder)
    workers: list[dict[str, Any]] = [
        {key: worker.get(key) for key in ("rank", "host", "pid", "phase", "step", "step_seconds")}
        | {"age_seconds": max(0.0, now - worker.get("time", 0.0))}
        for worker in beats
    ]
    is_alive = run.is_alive or any(worker["age_seconds"] < HEARTBEAT_TIMEOUT for worker in workers)
    start = heartbeat.newest_start(folder)
    step = max([run.step, *(worker["step"] or 0 for worker in workers)])
    steps, rate = run.config.train.steps, run.last("tokens_per_second")
    left = (steps - step) * run.config.train.batch_tokens / rate if rate and is_alive else None
    return {
        "run": run.config.run.name,
        "folder": str(folder),
        "method": run.config.method.label,
        # Of a launcher on another machine there are the workers alone.
        "state": "running" if is_alive and not run.is_alive else run.state,
        "is_alive": is_alive,
        "start_age_seconds": max(0.0, now - start.time) if start.number else None,
        "why": run.why,
        "step": step,
        "steps": steps,
        "seconds_left": left,
        "age_seconds": runs.age(run),
        **{key: run.last(key) for key in NUMBERS},
        **{key: run.last(key) or 0 for key in COUNTS},
        # The newest start has made no row yet.
        "restarts": max(start.restarts, run.last("restarts") or 0),
        "resumes": max(start.resumes, run.last("resumes") or 0),
        "checkpoint": _checkpoint(folder, now),
        "resident_bytes": run.last("resident_bytes"),
        "peak_bytes": _peak(beats, run.summary),
        "components": _components(run),
        "bytes_per_parameter": _memory(run),
        "workers": workers,
        "curves": {key: _curve(run, key) for key in ("loss", "tokens_per_second", "flip_rate")},
        **({"layers": runs.layer_flips(folder)} if layers else {}),
    }


def _checkpoint(folder: Path, now: float) -> dict[str, Any] | None:
    """The newest one."""
    from lowbit_dist.runs import newest_checkpoint

    if (newest := newest_checkpoint(folder)) is None:
        return None
    step, published = newest
    return {"step": step, "age_seconds": max(0.0, now - published)}


def _peak(workers: Sequence[Mapping[str, Any]], summary: Mapping[str, Any] | None) -> int | None:
    """The most bytes that a worker has had at once: one that trains and has sampled a step, or of a run that
    is finished; None if nobody knows.
    """
    sizes = [worker["memory"] for worker in workers if "transient" in worker.get("memory", {})]
    finished = ((summary or {}).get("memory") or {}).get("peak_bytes_per_worker")
    return max((sum(parts.values()) for parts in sizes), default=finished)


def _curve(run: "RunFolder", key: str) -> list[tuple[int, float]]:
    return [(row["step"], row[key]) for row in run.rows if isinstance(row.get(key), int | float)]


def _memory(run: "RunFolder") -> Mapping[str, Mapping[str, float]] | None:
    """Bytes per parameter of this run and of its baselines."""
    from lowbit_dist import charts, runs

    plans = runs.content(run.folder / runs.BASELINES)
    if run.last("resident_bytes") is None or not plans:
        return None
    dense = plans["plan_dense"]
    measured = {
        "states": run.config.optimizer.states,
        "components": {name: {"bytes": n} for name, n in _components(run).items()},
        "workers": dense["workers"],
        "parameters": dense["parameters"],
    }
    return charts.bytes_per_parameter(measured | plans)


def _components(run: "RunFolder") -> dict[str, Any]:
    measured: dict[str, Any] = next((row for row in reversed(run.rows) if "resident_bytes" in row), {})
    return {name.removeprefix("memory/"): n for name, n in measured.items() if name.startswith("memory/")}


def _fitting(seen: Mapping[str, Any], terminal: "Console") -> "RenderableType":
    """The picture in the terminal's height: with a lower curve, then without the memory's bars, which do not
    change while a run trains.  What is too high still is cut at its end.
    """
    drawn: RenderableType = ""
    for curve, bars in ((CURVE, True), (4, True), (CURVE, False), (4, False)):
        drawn = picture(seen, terminal.width, curve=curve, bars=bars)
        if len(terminal.render_lines(drawn, pad=False)) <= terminal.height:
            break
    return drawn


def picture(
    seen: Mapping[str, Any], width: int, *, curve: int = CURVE, bars: bool = True
) -> "RenderableType":
    """`curve`: lines of the loss; `bars`: whether memory has bars beside its number."""
    from rich.console import Group
    from rich.text import Text

    width = min(width, 100)
    parts: list[RenderableType] = [_head(seen, width)]
    if seen["why"]:
        parts.append(Text(seen["why"], "red"))
    if seen["state"] == "starting" and seen["start_age_seconds"] is not None:
        since = duration(seen["start_age_seconds"])
        parts.append(Text(f"starting for {since}: Ray first, then the workers", "dim"))
    parts += [Text(), _numbers(seen, width)]
    if points := seen["curves"]["loss"]:
        parts += [Text(), _loss(points, width, curve)]
    if bars and seen["bytes_per_parameter"]:
        from lowbit_dist.charts import memory_bars_text

        parts += [
            Text(),
            Text(memory_bars_text(seen["bytes_per_parameter"], width=min(60, max(20, width - 30)))),
        ]
    if seen.get("layers"):
        parts += [Text(), _layers(seen["layers"], width)]
    if seen["workers"]:
        parts += [Text(), _workers(seen)]
    return Group(*parts)


def _head(seen: Mapping[str, Any], width: int) -> "RenderableType":
    """Where the run stands, on one line if its name allows; the bar takes what room there is."""
    from rich.text import Text

    done = min(1.0, seen["step"] / seen["steps"])
    state, step = seen["state"], f"  step {seen['step']:,}/{seen['steps']:,} "
    left = "" if seen["seconds_left"] is None else f"  {duration(seen['seconds_left'])} left"
    end = f" {done:.0%}{left}"
    others = len(f"{seen['run']}  {seen['method']}  {state}{step}{end}")
    cells = max(LEAST_BAR, min(BAR, width - others))
    bar = "━" * round(done * cells)
    return Text.assemble(
        (seen["run"], "bold"), f"  {seen['method']}  ", (state, COLOURS[state]), step, (bar, "cyan"),
        ("━" * (cells - len(bar)), "dim"), end,
    )  # fmt: skip


def _numbers(seen: Mapping[str, Any], width: int) -> "RenderableType":
    from rich.table import Table

    def number(key: str, form: str) -> str | None:
        return None if seen[key] is None else format(seen[key], form)

    def curve(key: str) -> str:
        return "  " + plots.spark([y for _, y in seen["curves"][key]], max(8, width // 5))

    rate, flips = number("tokens_per_second", ",.0f"), number("flip_rate", ".3%")
    of_one = number("tokens_per_second_per_worker", ",.0f") if len(seen["workers"]) > 1 else None
    checkpoint = seen["checkpoint"]
    rows = {
        "loss": number("loss", ".4f"),
        "validation loss": number("val_loss", ".4f"),
        "tokens": number("tokens", ",d"),
        "tokens/s": rate and rate + curve("tokens_per_second"),
        "tokens/s each": of_one and f"{of_one}/worker",
        "MFU": number("mfu", ".1%"),
        "flip rate": flips and flips + curve("flip_rate"),
        "learning rate": number("lr", ".3g"),
        "gradient norm": number("grad_norm", ".3g"),
        "state memory": seen["resident_bytes"] and f"{in_bytes(seen['resident_bytes'])}/worker",
        "peak memory": seen["peak_bytes"] and f"{in_bytes(seen['peak_bytes'])}/worker",
        "checkpoint": checkpoint
        and f"step {checkpoint['step']:,}, {duration(checkpoint['age_seconds'])} ago",
        "restarts": str(seen["restarts"]),
        "resumes": str(seen["resumes"]) if seen["resumes"] else None,
        "skipped steps": str(seen["skipped_steps"]) if seen["skipped_steps"] else None,
        "rollbacks": str(seen["rollbacks"]) if seen["rollbacks"] else None,
    }
    table = Table.grid(padding=(0, 3))
    shown = [(name, value) for name, value in rows.items() if value]
    half = -(-len(shown) // 2)
    for i in range(half):
        left, right = shown[i], shown[half + i] if half + i < len(shown) else ("", "")
        table.add_row(f"[dim]{left[0]}", left[1], f"[dim]{right[0]}", right[1])
    return table


def _loss(points: plots.Points, width: int, height: int) -> "RenderableType":
    from rich.text import Text

    lines = plots.curve(points, width=width - 8, height=height)
    heights = [y for _, y in points]
    labels = {0: f"{max(heights):.3f}", len(lines) - 1: f"{min(heights):.3f}"}
    text = Text()
    for i, line in enumerate(lines):
        text.append(f"{labels.get(i, ''):>7} ", "dim").append(line, "cyan").append("\n")
    first, last = f"step {points[0][0]:,}", f"{points[-1][0]:,}"
    return text.append(f"{'':8}{first}{last:>{max(1, width - 8 - len(first))}}", "dim")


def _layers(rates: Mapping[str, list[float]], width: int) -> "RenderableType":
    from rich.table import Table

    table = Table.grid(padding=(0, 2))
    table.add_row("[dim]flip rate of each layer", "", "[dim]now")
    for name, values in rates.items():
        table.add_row(
            layer_name(name), f"[cyan]{plots.spark(values, max(8, width // 3))}", f"{values[-1]:.3%}"
        )
    return table


def _workers(seen: Mapping[str, Any]) -> "RenderableType":
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for name in ("worker", "machine", "process", "phase", "step", "s/step", "last sign"):
        table.add_column(name, justify="left" if name in ("machine", "phase") else "right")
    for worker in seen["workers"]:
        is_silent = worker["age_seconds"] > HEARTBEAT_TIMEOUT
        seconds = worker["step_seconds"]
        names = [str(worker[key]) for key in ("rank", "host", "pid", "phase", "step")]
        pace = "-" if seconds is None else f"{seconds:.2f}"
        age = f"{duration(worker['age_seconds'])} ago"
        table.add_row(*names, pace, age, style="red" if is_silent else None)
    return table

"""Answers drawn for a terminal."""

from collections.abc import Mapping, Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from lowbit_dist.cli.ui import where
from lowbit_dist.errors import in_bytes

NARROW = (0, 1, 0, 0)  # padding of tables with many columns: two cells between two of them
# Like with like; the usual training, all in float32, is told in a sentence.
RUNS = {
    "this run": None,
    "dense, same states": "plan_dense_same_states",
    "BitNet, same states": "plan_bitnet",
}


def pairs(console: Console, rows: Mapping[str, Any], *, title: str | None = None) -> None:
    """Names and values, one row each; what is None is left out."""
    table = Table(box=box.SIMPLE_HEAD, show_header=False, title=title, title_justify="left", pad_edge=False)
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    for name, value in rows.items():
        if value is not None:
            table.add_row(name, Text(str(value)))
    console.print(table)


def in_words(numbers: Mapping[str, Any]) -> dict[str, Any]:
    """Names and numbers as people read them."""
    return {
        name.replace("_", " "): _number(value) if isinstance(value, float) else
        f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else value
        for name, value in numbers.items()
    }  # fmt: skip


def jobs(console: Console, rows: Sequence[Mapping[str, Any]]) -> None:
    """A line for each job of a cluster."""
    if not rows:
        console.print("no jobs yet")
        return
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for name in ("job", "run", "status", "started", "took"):
        table.add_column(name, style="bold" if name == "job" else "")
    for row in rows:
        cells = (str(row.get(name) or "-") for name in ("job", "run", "status", "started", "took"))
        table.add_row(*map(Text, cells))
    console.print(table)


def memory_table(console: Console, memory: Mapping[str, Any]) -> None:
    """Bytes on the largest worker, and those of all workers per parameter that the component serves, beside
    both baselines; in 80 columns.
    """
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=NARROW)
    table.add_column("on each worker", style="bold", no_wrap=True)
    reports = _reports(memory)
    for name in reports:
        table.add_column(name, justify="right")
        table.add_column("B/param.", justify="right", style="dim")
    for component in memory["components"]:
        cells = []
        for report in reports.values():
            part = report["components"][component]
            per = part["bytes_per_parameter"]
            cells += [in_bytes(part["bytes"]), "-" if per is None else f"{per:.3f}"]
        table.add_row(component.replace("_", " "), *cells)
    table.add_section()
    for key, words in (("resident_bytes_per_worker", "state"), ("peak_bytes_per_worker", "peak")):
        cells = []
        for report in reports.values():
            total, n = report[key], report["parameters"]["total"]
            per = None if total is None else total * report["workers"] / n
            cells += [in_bytes(total), "-" if per is None else f"{per:.3f}"]
        table.add_row(words, *cells)
    console.print(table)
    parameters = memory["parameters"]
    console.print(
        "State: what stays allocated between steps; peak: the most inside a step. B/param.: bytes of all "
        "workers, over the parameters that a component serves.",
        style="dim",
    )
    console.print(
        f"{parameters['total']:,} parameters, {parameters['low_bit']:,} of them low-bit; "
        f"{memory['workers']} worker{'' if memory['workers'] == 1 else 's'}. Saved of the state: "
        f"{memory['saved_vs_dense_same_states']:.1%} against dense weights and "
        f"{memory['saved_vs_bitnet_ste']:.1%} against BitNet's, each with {memory['states']} states as here; "
        f"{memory['saved_vs_adamw_fp32']:.1%} against AdamW with all in float32."
    )
    if "fits" in memory:
        needed, available = (in_bytes(memory[f"{name}_bytes_per_worker"]) for name in ("needed", "available"))
        answer = "the run fits" if memory["fits"] else "the run does not fit"
        console.print(
            f"With its process and a copy of its checkpoint a worker needs {needed}; this machine has "
            f"{available} for each: {answer}."
        )
    if memory.get("saved_vs"):
        console.print(f"({memory['saved_vs']})", style="dim")


def _reports(memory: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    return {name: memory[key] if key else memory for name, key in RUNS.items() if not key or key in memory}


def memory_bars(console: Console, memory: Mapping[str, Any]) -> None:
    """Bytes per parameter of the whole model, over all workers."""
    from lowbit_dist.charts import bytes_per_parameter, memory_bars_text

    width = min(60, max(20, console.width - 30))
    console.print(memory_bars_text(bytes_per_parameter(memory), width=width), markup=False)


def summary(console: Console, result: Mapping[str, Any], mlflow: str | None) -> None:
    """What a run ended with."""
    memory = result.get("memory") or {}
    entropy, loss = result.get("unigram_entropy"), result.get("val_loss")
    n = result.get("val_samples")  # a summary of an earlier version does not say
    more = f" on {n:,} samples" if n else ""
    if entropy and loss:
        side = "below" if loss < entropy else "above"
        more += f" ({abs(1 - loss / entropy):.1%} {side} the corpus's unigram entropy)"
    if result.get("diverged"):
        more += "; the run has diverged: guessing is better"
    speed = result.get("tokens_per_second")
    rows = {
        "run": result["run"],
        "steps": f"{result['steps']:,} ({result['tokens']:,} tokens)",
        "training loss": _number(result.get("train_loss")),
        "validation loss": None if loss is None else f"{loss:.4f}{more}",
        "perplexity": _number(result.get("perplexity")),
        "bits per byte": _number(result.get("bits_per_byte")),
        "speed": None if not speed else f"{speed:,.0f} tokens/s",
        "restarts": result.get("restarts"),
        "resumes": result.get("resumes"),
        "skipped steps": result.get("skipped_steps"),
        "digest": result.get("digest"),
        "checkpoint": result.get("checkpoint"),
        "MLflow": mlflow and where(result.get("mlflow_run_id"), mlflow),
    }
    pairs(console, rows)
    if memory.get("components"):
        memory_table(console, memory)
        memory_bars(console, memory)


def inspection(console: Console, inspected: Mapping[str, Any]) -> None:
    """A checkpoint."""
    problems: Sequence[str] = inspected["problems"]
    rows = {key.replace("_", " "): inspected[key] for key in ("checkpoint", "run", "method", "digest")}
    rows |= {
        "step": f"{inspected['step']:,}",
        "tokens": f"{inspected['tokens']:,}",
        "parameters": f"{inspected['parameters']:,}",
    }
    rows |= {f"{name.replace('_', ' ')}": in_bytes(size) for name, size in inspected["components"].items()}
    rows["integrity"] = "; ".join(problems) or f"intact ({inspected['verified']})"
    pairs(console, rows)


def health(console: Console, report: Mapping[str, Any]) -> None:
    """What `doctor` found, and whether a training can run."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_header=False)
    colours = {"ok": "green", "warning": "yellow", "error": "red"}
    for finding in report["checks"]:
        status = f"[{colours[finding['status']]}]{finding['status']}"
        table.add_row(status, *(Text(finding[name]) for name in ("name", "found", "advice")))
    console.print(table)
    console.print("A training can run here." if report["ok"] else "[red]No training can run here.")


def update_times(console: Console, measured: Mapping[str, Any]) -> None:
    """One step of each optimizer and grid, against the peer."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for name in ("", "ns per parameter", "ratio to peer", "resident B", "moved B", "floor ns", "of copy"):
        table.add_column(name, justify="right" if name else "left")
    peer = measured["peer"]
    rows = [(peer["name"], peer)]
    for row in measured["update"]:
        scales = f", groups of {row['group']}" if row["group"] else ""
        rows.append((f"{row['optimizer']}, {row['grid']}, {row['states']} states{scales}", row))
    rows += [(f"decode {row['grid']} to {row['to']}", row) for row in measured["decode"]]
    for name, row in rows:
        resident = row.get("bytes_resident_per_parameter")
        table.add_row(
            name,
            f"{row['ns_per_parameter']:.3f}",
            f"{row['ratio_to_peer']:.2f}",
            "-" if resident is None else f"{resident:.2f}",
            f"{row['bytes_moved_per_parameter']:.2f}",
            f"{row['floor_ns_per_parameter']:.3f}",
            f"{row['share_of_copy_bandwidth']:.0%}",
        )
    console.print(table)
    console.print(
        f"{measured['device']}, {measured['backend']}, {measured['parameters']:,} parameters, "
        f"{measured['threads']} thread{'' if measured['threads'] == 1 else 's'}, "
        f"median of {measured['repetitions']} ({measured['clock']}); "
        f"a copy moves {measured['copy_gigabytes_per_second']:.1f} GB/s."
    )


def tasks(console: Console, measured: Mapping[str, Any]) -> None:
    """A line for each metric of each task."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for name in ("task", "metric", "value"):
        table.add_column(name, justify="right" if name == "value" else "left")
    for task, metrics in measured["tasks"].items():
        for metric, value in metrics.items():
            table.add_row(Text(task), Text(metric), _number(value) or Text("-"))
    console.print(table)


def inference_times(console: Console, measured: Mapping[str, Any]) -> None:
    """A model on each grid, against the peer."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for name in ("", "1 by 1, tokens/s", "to peer", "512, tokens/s", "to peer", "B per weight", "resident"):
        table.add_column(name, justify="right" if name else "left")
    for name, row in [
        (measured["peer"]["name"], measured["peer"]),
        *((f"{row['grid']}, 8-bit inputs", row) for row in measured["infer"]),
    ]:
        speeds = []
        for speed in (row["tokens_1"], row["tokens_512"]):
            low, high = speed["tokens_per_second_middle_half"]
            speeds.append(f"{speed['tokens_per_second']:,.1f} ({low:,.1f} to {high:,.1f})")
            speeds.append(f"{speed['speed_to_peer']:.2f}")
        size = f"{row['resident_bytes_per_weight']:.3f}"
        table.add_row(name, *speeds, size, in_bytes(row["resident_bytes"]))
    console.print(table)
    console.print(
        f"{measured['device']}, {measured['products']}, {measured['preset']} of {measured['parameters']:,} "
        f"weights in linear layers, {measured['threads']} "
        f"thread{'' if measured['threads'] == 1 else 's'}, median of {measured['repetitions']} and middle "
        f"half ({measured['clock']})."
    )


def turns(console: Console, measured: Mapping[str, Any]) -> None:
    """Candidates that took turns with their peer; in 80 columns."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=NARROW)
    for name in ("", "ms", "middle half", "least", "speed", "middle half", "tokens/s"):
        table.add_column(name, justify="right" if name else "left")
    for row in measured["rows"]:
        low, high = (1e3 * x for x in row["seconds_middle_half"])
        slow, fast = row["speed_to_peer_middle_half"]
        rate = row.get("tokens_per_second")
        table.add_row(
            row["name"],
            f"{1e3 * row['seconds']:,.2f}",
            f"{low:,.2f}-{high:,.2f}",
            f"{1e3 * row['seconds_least']:,.2f}",
            f"{row['speed_to_peer']:.2f}",
            f"{slow:.2f}-{fast:.2f}",
            "-" if rate is None else f"{rate:,.0f}",
        )
    console.print(table)
    workers, threads = measured.get("workers", 1), measured["threads"]
    console.print(
        f"{measured['what']}: {measured['device']}, {workers} worker{'' if workers == 1 else 's'}, {threads} "
        f"thread{'' if threads == 1 else 's'} each, median of {measured['repetitions']} "
        f"({measured['clock']}); speed: times that of {measured['peer']}."
    )
    for package in measured.get("not_installed", ()):
        console.print(f"Without {package}, which is not installed.", style="dim")


def _number(value: Any) -> str | None:
    if not isinstance(value, int | float):
        return None
    return f"{value:.4f}" if abs(value) < 1e6 else f"{value:.2e}"

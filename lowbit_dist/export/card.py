"""The model card of an export: what its files are, how to load them, and the proof that they are right."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lowbit_dist import runs
from lowbit_dist.checkpoint import MANIFEST, Checkpoint
from lowbit_dist.errors import in_bytes

if TYPE_CHECKING:
    from lowbit_dist.export import Format
    from lowbit_dist.export.finished import Finished

FILE = "README.md"
TAG = "lowbit-dist"  # in the head of each card, by which an export is known
METRICS = ("train_loss", "val_loss", "perplexity", "bits_per_byte", "steps", "tokens")  # of a run's summary


def is_export(folder: Path) -> bool:
    """Whether a folder has a card of this kind."""
    try:
        head = (folder / FILE).read_text().split("\n---\n")[0]
    except (OSError, UnicodeDecodeError):
        return False
    return f"- {TAG}\n" in f"{head}\n"


def text(model: Finished, chosen: Format, written: Mapping[str, Any]) -> str:
    """Markdown; `written`: what the export has told."""
    path, name = model.trained.path, Path(written["export"]).name
    checkpoint = Checkpoint.open(path) if (path / MANIFEST).exists() else None
    use = chosen.USE.format(path=f"{name}{chosen.SUFFIX}")
    sections = [
        f"---\nlibrary_name: transformers\npipeline_tag: text-generation\ntags:\n- {TAG}\n- low-bit\n---\n",
        f"# {name}\n",
        f"A {model.architecture}{_low_bit(model)}{_made(model, checkpoint)}, exported as "
        f"`{written['format']}` (`{written['type']}`, {in_bytes(written['bytes'])}).\n",
        f"## Use\n\n{use}{_begins(model)}",
        "## Proof\n\nRead back by the format's own public reader before it was published:\n\n"
        + _proof(written["proof"]),
    ]
    origin = _origin(model, checkpoint)
    sections += [f"## {title}\n\n{table(rows)}" for title, rows in origin.items() if rows]
    return "\n".join(sections)


def table(rows: Mapping[str, Any]) -> str:
    """Two columns of Markdown."""
    lines = [f"| {key} | {value} |" for key, value in rows.items()]
    return "\n".join(["| | |", "|---|---|", *lines]) + "\n"


def _low_bit(model: Finished) -> str:
    grids = sorted({layout.grid.name for layout in model.layouts.values()})
    return f" with {' and '.join(grids)} weights in its linear layers" if grids else ""


def _made(model: Finished, checkpoint: Checkpoint | None) -> str:
    if checkpoint is None:
        return ""
    if quantized := checkpoint.manifest.get("quantized"):
        return f", quantised after its training by `{quantized['name']}`"
    return f", trained by method `{model.trained.method.label}`"


def _begins(model: Finished) -> str:
    begin = model.tokenizer.bos_id
    return (
        ""
        if begin is None
        else f"\nA text begins with the token {begin}, which the model was trained with.\n"
    )


def _proof(proof: Mapping[str, Any]) -> str:
    rows = {"tensors equal bit for bit": f"{proof['weights']:,}"}
    if n := proof["within_one_ulp"]:
        rows["tensors whose scale is kept as its reciprocal, off by 6e-8 of it at most"] = f"{n:,}"
    if n := proof["narrowed"]:
        rows["tensors kept in narrower floats"] = f"{n:,}"
    rounded = ", inputs of linear layers rounded to 8 bits" if proof["rounds_inputs"] else ""
    rows |= {
        f"KL to our own float32 forward pass{rounded}": f"{proof['kl']:.2e} nats",
        "same likeliest token": f"{proof['top1']:.1%} of {proof['positions']} positions",
        "KL to the forward pass as it was trained": f"{proof['kl_as_trained']:.2e} nats",
        "texts with the same ids": f"{proof['texts']}",
    }
    return table(rows)


def _origin(model: Finished, checkpoint: Checkpoint | None) -> dict[str, dict[str, Any]]:
    """Title -> rows: of a run its metrics, its memory and what it was made from."""
    path = model.trained.path
    made_from: dict[str, Any] = {"checkpoint": f"`{path.name}`", "tokenizer": f"`{model.tokenizer.sha256}`"}
    if checkpoint is None:
        return {"Made from": made_from}
    made_from["weights"] = f"`{checkpoint.digest()}`"
    if quantized := checkpoint.manifest.get("quantized"):
        return {"Made from": made_from | {"quantised": f"`{quantized['source']}`"}}
    folder = path.resolve().parent.parent
    summary = runs.content(folder / runs.SUMMARY)
    made_from |= {
        "run": f"`{checkpoint.config.run.name}`, step {checkpoint.step:,}",
        "data": f"`{runs.content(folder / runs.INPUTS).get('data')}`",
    }
    if summary.get("steps") != checkpoint.step:  # of another checkpoint, or there is none
        return {"Made from": made_from}
    metrics = {
        key.replace("_", " "): _number(summary[key]) for key in METRICS if summary.get(key) is not None
    }
    return {"Metrics": metrics, "Memory in training": _memory(summary.get("memory")), "Made from": made_from}


def _memory(memory: Any) -> dict[str, Any]:
    if not isinstance(memory, dict):
        return {}
    rows = {
        "resident, of each worker": in_bytes(memory.get("resident_bytes_per_worker")),
        "peak, of each worker": in_bytes(memory.get("peak_bytes_per_worker")),
        "workers": memory.get("workers"),
    }
    for key, value in memory.items():
        if key.startswith("saved_vs_") and isinstance(value, float):
            rows[f"saved against {key.removeprefix('saved_vs_').replace('_', ' ')}"] = f"{value:.1%}"
    return rows


def _number(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:.4f}"

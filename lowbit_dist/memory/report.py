"""The names and the shape in which memory is reported, planned or measured."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

# Component -> the parameters that it serves: the bytes of all workers are divided by their number.
COMPONENTS = {
    "low_bit_weights": "low_bit",  # packed codes
    "scales": "low_bit",
    "other_weights": "other",  # in the compute precision, and the float32 copies that the optimizer updates
    "gradients": "total",  # what is held between micro-batches and steps
    "optimizer_states": "total",
    "buffers": "total",  # tensors of the model that are not trained, such as rotary frequencies
    "transient": "total",  # inside a step: whole weights, gradients on their way, results in passing
    "activations": "total",  # inside a step: what a forward pass leaves for its backward pass
}
RESIDENT = tuple(COMPONENTS)[:6]


class Parameters(NamedTuple):
    """How many parameters a model has; the whole model's, however many workers share them."""

    low_bit: int
    other: int

    @property
    def total(self) -> int:
        return self.low_bit + self.other


class Peak(NamedTuple):
    """Bytes above the resident ones at the highest moment of a step."""

    transient: int
    activations: int


def report(
    resident: Mapping[str, int],  # component -> bytes
    peak: Peak | None,  # None: no step was sampled
    *,
    parameters: Parameters,
    workers: int,
) -> dict[str, Any]:
    """One worker's memory, as JSON; `bytes_per_parameter` is of `workers` such workers together."""
    sizes: dict[str, int | None] = {name: resident[name] for name in RESIDENT}
    sizes |= {"transient": None, "activations": None} if peak is None else peak._asdict()
    counts = {**parameters._asdict(), "total": parameters.total}
    at_rest = sum(resident.values())
    return {
        "resident_bytes_per_worker": at_rest,
        "peak_bytes_per_worker": None if peak is None else at_rest + sum(peak),
        "components": {
            name: {
                "bytes": n,
                "bytes_per_parameter": None if n is None else n * workers / (counts[serves] or 1),
            }
            for (name, serves), n in zip(COMPONENTS.items(), sizes.values(), strict=True)
        },
        "parameters": counts,
        "workers": workers,
    }


def largest(reports: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The report of the worker with the most resident bytes, with the highest peak of all."""
    chosen = dict(max(reports, key=lambda report: report["resident_bytes_per_worker"]))
    for name in ("peak_bytes_per_worker", "peak_rss_bytes"):
        values = [report[name] for report in reports if report.get(name) is not None]
        if values:
            chosen[name] = max(values)
    return chosen


def metrics(report: dict[str, Any]) -> dict[str, float | None]:
    """The resident bytes as flat numbers, for a log."""
    parts = {f"memory/{name}": report["components"][name]["bytes"] for name in RESIDENT}
    return {"resident_bytes": report["resident_bytes_per_worker"], **parts}

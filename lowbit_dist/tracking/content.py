"""What services have of a run, and under which names: numbers, parameters, tags, data set and checkpoints.

`metrics.jsonl` keeps its own names; in MLflow, W&B and TensorBoard a name's group stands before a slash, as
their charts do.  A run that an older version began has its first rows in MLflow under the names of the file.
They stay, and the whole file is sent again under the new names: so each chart has every row, and comparing
runs needs one name.
"""

import contextlib
import json
import re
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from lowbit_dist import runs
from lowbit_dist.config import RunConfig
from lowbit_dist.tracking.identity import place_of
from lowbit_dist.tracking.stores import without_password

# A key of `metrics.jsonl` -> services' name of it, where that is not `train/KEY`, or `val/KEY` of `val_KEY`.
NAMES = {
    "perplexity": "val/perplexity",
    "bits_per_byte": "val/bits_per_byte",
    "diverged": "val/diverged",
    "tokens_per_second": "speed/tokens_per_second",
    "tokens_per_second_per_worker": "speed/tokens_per_second_per_worker",
    "mfu": "speed/mfu",
    "flip_rate": "codes/flip_rate",
    "zero_fraction": "codes/zero_fraction",
    "saturation": "codes/saturation",
    "entropy": "codes/entropy",
    "resident_bytes": "memory/resident_bytes_per_worker",
}
RUN_LEVEL = 0  # the step of numbers that a run has one of, such as its memory: MLflow draws them as bars
PROBES = {
    "train": ("train/tokens", "train/loss"),
    "val": ("val/loss",),
}  # which tell the steps that it has
SIZES = {
    "hidden_size": "hidden_size", "intermediate_size": "intermediate_size", "layers": "num_hidden_layers",
    "heads": "num_attention_heads", "kv_heads": "num_key_value_heads",
}  # fmt: skip
PACKAGES = ("lowbit-dist", "torch", "deepspeed", "ray")
CONCLUSION = ("digest", "checkpoint", "diverged")  # words of a summary
LIMIT = 100  # parameters, or tags, of one request, MLflow's own
PARAM_LIMIT = 6000  # characters, MLflow's own


def name_of(key: str) -> str:
    """What services call a number in `metrics.jsonl`."""
    if key in NAMES or "/" in key:
        return NAMES.get(key, key)
    return f"val/{key.removeprefix('val_')}" if key.startswith("val_") else f"train/{key}"


def numbers(row: Mapping[str, Any]) -> dict[str, float]:
    """A row's numbers by these names; its step and time are not among them."""
    return {name_of(key): x for key, x in row.items() if key not in ("step", "time")}


def parameters(config: RunConfig, counts: Mapping[str, Any]) -> dict[str, Any]:
    """What people compare, by dotted names: the configuration without passwords, and `known` counts."""
    named = {key: value for key, value in {**config.flat(), **counts}.items() if value is not None}
    return {key: without_password(x) if isinstance(x, str) else x for key, x in named.items()}


def conclusion(summary: Mapping[str, Any]) -> dict[str, Any]:
    """What a run's summary has beside its rows; memory is that of the largest worker."""
    words = {key: str(summary[key]) for key in CONCLUSION if key in summary}
    return words | dict(_memory(summary.get("memory", {})))


class Sent:
    """Which numbers a run in MLflow has: steps of training, steps of validation, and its memory.

    By step, since a restart may have come with another `log_every`: then steps lie before MLflow's newest.
    """

    def __init__(self, client: Any = None, run: Any = None):
        self.steps: dict[str, set[int]] = {side: set() for side in PROBES}
        self.levels: dict[str, float] = {}
        if run is not None:
            self.levels = {k: x for k, x in run.data.metrics.items() if k.startswith("memory/")}
            for side, names in PROBES.items():
                histories = (client.get_metric_history(run.info.run_id, name) for name in names)
                self.steps[side] = {point.step for history in histories for point in history}

    def lacking(self, row: Mapping[str, Any]) -> list[Any]:
        """The row's numbers that the run lacks; its memory is sent when it is another than before."""
        from mlflow.entities import Metric

        at, points = int(row["time"] * 1000), []
        for key, x in row.items():
            name = name_of(key)
            if key in ("step", "time") or row["step"] in self.steps[_side(name)]:
                continue
            if not name.startswith("memory/"):
                points.append(Metric(name, x, at, row["step"]))
            elif self.levels.get(name) != x:
                points.append(Metric(name, x, at, RUN_LEVEL))
                self.levels[name] = x
        return points

    def add(self, points: list[Any]) -> None:
        for point in points:
            if not point.key.startswith("memory/"):
                self.steps[_side(point.key)].add(point.step)


def _side(name: str) -> str:
    return "val" if name.startswith("val/") else "train"


def describe(client: Any, run: Any, config: RunConfig) -> None:
    """Parameters, tags and data set of a run that begins or is resumed, and what its baselines would need."""
    from mlflow.entities import Param, RunTag

    manifest, counts = known(config)
    if manifest is not None:
        client.log_inputs(run.info.run_id, datasets=[_data_set(config, manifest)])
    tags = _tags(config, counts)
    if run.data.tags.get("mlflow.note.content"):  # somebody may have written there
        del tags["mlflow.note.content"]
    client.log_batch(run.info.run_id, tags=[RunTag(key, value) for key, value in tags.items()])
    # A parameter keeps its first value: MLflow refuses another, as after a restart with more workers.
    params = [
        Param(key, without_password(str(value))[:PARAM_LIMIT])
        for key, value in parameters(config, counts).items()
        if key not in run.data.params
    ]
    for first in range(0, len(params), LIMIT):
        client.log_batch(run.info.run_id, params=params[first : first + LIMIT])
    _log_levels(client, run.info.run_id, _memory(runs.content(config.run_dir / runs.BASELINES)))


def conclude(client: Any, run_id: str | None, summary: Mapping[str, Any]) -> None:
    """The conclusion of a run's summary: words as tags, numbers as metrics."""
    concluded = conclusion(summary)
    for key in CONCLUSION:
        if key in concluded:
            client.set_tag(run_id, key, concluded.pop(key))
    _log_levels(client, run_id, concluded.items())


def _log_levels(client: Any, run_id: str | None, levels: Iterable[tuple[str, float]]) -> None:
    from mlflow.entities import Metric

    now = int(time.time() * 1000)
    client.log_batch(run_id, metrics=[Metric(name, x, now, RUN_LEVEL) for name, x in levels])


def _memory(report: Mapping[str, Any], prefix: str = "memory/") -> Iterator[tuple[str, float]]:
    """The numbers of a memory report, and inside it of the baselines' (`plan_NAME`): as `summary.json`."""
    for key, value in report.items():
        if key.startswith("plan_"):
            yield from _memory(value, f"{prefix}{key}/")
        elif key == "components":
            sizes = ((prefix + name, part["bytes"]) for name, part in value.items())
            yield from ((name, n) for name, n in sizes if n is not None)
        elif isinstance(value, int | float) and key != "workers":
            yield prefix + key, value
    if "resident_bytes_per_worker" in report:
        of_all = report["resident_bytes_per_worker"] * report["workers"]
        yield f"{prefix}bytes_per_parameter", of_all / report["parameters"]["total"]


def known(config: RunConfig) -> tuple[Any, dict[str, Any]]:
    """The manifest of the data, and what is compared and follows from the configuration: sizes, also a
    preset's, and numbers of parameters.  Nothing while data or model are away: rows do not wait for them.
    """
    from lowbit_dist import data, model
    from lowbit_dist.memory.resident import parameters

    try:
        manifest = data.read_manifest(config.data.path)
        shapes = model.shapes(config, manifest.vocab_size)
        counts = parameters(config, shapes)
    except Exception:
        return None, {}
    sizes = {f"model.{ours}": getattr(shapes.config, theirs, None) for ours, theirs in SIZES.items()}
    return manifest, sizes | {
        "model.vocab_size": manifest.vocab_size,
        "model.parameters": counts.total,
        "model.low_bit_parameters": counts.low_bit,
        "model.low_bit_share": round(counts.low_bit / counts.total, 4),
    }


def _tags(config: RunConfig, counts: Mapping[str, Any]) -> dict[str, str]:
    from mlflow.utils import mlflow_tags
    from mlflow.utils.git_utils import get_git_commit

    tags = {}
    for package in PACKAGES:
        with contextlib.suppress(PackageNotFoundError):
            tags[f"version.{package}"] = version(package)
    program = Path(sys.argv[0])
    is_own = "lowbit_dist" in program.parts  # python -m lowbit_dist, or a sweep's child
    tags[mlflow_tags.MLFLOW_SOURCE_NAME] = "lowbit" if is_own else program.name
    tags[mlflow_tags.MLFLOW_SOURCE_TYPE] = "LOCAL"
    if (commit := get_git_commit(".")) is not None:
        tags[mlflow_tags.MLFLOW_GIT_COMMIT] = commit
    size = ""
    if counts:
        size = f", {counts['model.parameters']:,} parameters, {counts['model.low_bit_share']:.1%} in codes"
    what = config.model.pretrained or config.model.preset or f"width {config.model.hidden_size}"
    data = without_password(config.data.path)
    tags[mlflow_tags.MLFLOW_RUN_NOTE] = f"{config.method.label}, model {what}{size}, trained on {data}"
    return tags


def _data_set(config: RunConfig, manifest: Any) -> Any:
    """The prepared data, known by its digest wherever it lies."""
    from mlflow.entities import Dataset, DatasetInput, InputTag
    from mlflow.utils.mlflow_tags import MLFLOW_DATASET_CONTEXT

    path = without_password(config.data.path)
    scheme, is_remote, _ = path.partition("://")
    uri = path if is_remote else str(Path(path).absolute())
    split = manifest.splits["train"]
    described = Dataset(
        name=uri.rstrip("/").rpartition("/")[2],
        digest=manifest.digest[:32],  # MLflow takes 36 characters
        source_type=scheme if is_remote else "local",
        source=json.dumps({"uri": uri}),
        profile=json.dumps({"num_rows": split.samples, "num_elements": split.tokens}),
    )
    return DatasetInput(described, [InputTag(MLFLOW_DATASET_CONTEXT, "training")])


def list_checkpoints(client: Any, run_id: str | None, config: RunConfig) -> None:
    """The checkpoints that are kept are the run's models in MLflow: where they are, not what is in them."""
    from mlflow.entities import LoggedModelOutput
    from mlflow.exceptions import MlflowException
    from mlflow.utils import get_results_from_paginated_fn
    from mlflow.utils.mlflow_tags import MLFLOW_MODEL_IS_EXTERNAL

    from lowbit_dist.checkpoint import newest_first

    kept = {place_of(path): path.name for path in newest_first(config.run_dir)}
    experiment = client.get_run(run_id).info.experiment_id
    try:
        listed = get_results_from_paginated_fn(
            lambda n, page: client.search_logged_models(
                [experiment], f"source_run_id = '{run_id}'", max_results=n, page_token=page
            ),
            LIMIT,
        )
    except MlflowException as error:
        if error.error_code in ("ENDPOINT_NOT_FOUND", "NOT_IMPLEMENTED"):  # a server older than MLflow 3
            return
        raise
    for model in listed:
        if model.status != "READY" or kept.pop(model.tags.get("path", ""), None) is None:
            client.delete_logged_model(model.model_id)  # it was pruned, moved, or not listed to its end
    for place, name in kept.items():
        model = client.create_logged_model(
            experiment,
            name=re.sub(r"""[/:.%"']""", "-", f"{config.run.name}-{name}"),
            source_run_id=run_id,
            tags={"path": place, MLFLOW_MODEL_IS_EXTERNAL: "true"},
            model_type="checkpoint",
        )
        step = int(name.removeprefix("step-"))
        client.log_outputs(run_id, [LoggedModelOutput(model.model_id, step)])
        client.finalize_logged_model(model.model_id, "READY")

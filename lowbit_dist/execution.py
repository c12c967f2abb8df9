"""The sections of a run's configuration that say what it is called, and where and how it is carried out."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from pydantic import BeforeValidator, Field, create_model

from lowbit_dist.section import (
    AutoOrGpu,
    AutoOrSeconds,
    FilePath,
    RunName,
    Section,
    Text,
    TrackingUri,
    WorkerCount,
    WorkerRange,
    may_change,
    number,
    setting,
    worker_count,
)


class _Run(Section):
    """What a run is called, where its folder is, and what it starts from."""

    name: RunName = setting("run", "The name of the run and of its folder; the same name resumes the run.")
    seed: Annotated[int, Field(ge=0, lt=2**63)] = setting(
        0, "Decides the first weights, the order of the data and how updates are rounded."
    )
    dir: FilePath = may_change(
        Path("runs"), "The folder that holds the folders of runs; all machines of a cluster share it."
    )
    with_states: bool = setting(
        False, "Whether a run that starts from another one takes its optimizer's states along, too."
    )

    @property
    def parent(self) -> str | None:
        """`from`, which is a word of Python's own."""
        named: str | None = getattr(self, "from")
        return named


if TYPE_CHECKING:
    Run = _Run
else:
    meaning = (
        "Another run whose weights this one starts from, as RUN or RUN@STEP; the model and the method are "
        "the same. Steps, schedule and data begin anew."
    )
    Run = create_model(
        "Run",
        __base__=_Run,
        __doc__=_Run.__doc__,
        __module__=__name__,
        **{"from": (Text | None, setting(None, meaning))},
    )


class Cluster(Section):
    """On how many workers the run is trained, and what happens when they fail."""

    workers: Annotated[WorkerCount | WorkerRange, BeforeValidator(worker_count)] = setting(
        2,
        "How many workers there are; a range like {min: 2, max: 8} follows what the cluster has.",
        unit="workers",
    )
    cpus_per_worker: Annotated[int | float, BeforeValidator(number), Field(gt=0, le=4096)] = setting(
        1, "How many processors Ray sets aside for a worker.", unit="processors"
    )
    gpus_per_worker: AutoOrGpu = setting(
        "auto", "Whether a worker has a GPU of its own; auto is 1 where the cluster has GPUs.", unit="GPUs"
    )
    max_failures: Annotated[int, Field(ge=0, le=2**31 - 1)] = setting(
        10, "How often a launch restarts after a failure before it gives up.", unit="restarts"
    )
    hang_timeout: AutoOrSeconds = setting(
        "auto",
        "Without progress for so long the workers are restarted; auto is 20 median steps, at least 60 s. "
        "While a run starts, saves, goes back after a spike or ends, it is 10 minutes at least.",
        unit="seconds",
    )
    start_timeout: AutoOrSeconds = setting(
        "auto",
        "How long a start waits for machines. auto refuses at once what the cluster will never have slots "
        "for, and waits 60 s for machines that are busy or coming back; one that grows on demand needs "
        "minutes.",
        unit="seconds",
    )


class Tracking(Section):
    """Where the run is recorded, beside its own folder."""

    mlflow: TrackingUri | None = setting(
        "sqlite:///mlflow.db", "The tracking URI of MLflow; null writes the files of the run's folder alone."
    )
    experiment: Text = setting("lowbit", "The name of the experiment in MLflow.")
    wandb: Text | None = setting(
        None,
        "The project of Weights & Biases that the run is shown in, as PROJECT or ENTITY/PROJECT; needs "
        "lowbit-dist[wandb].",
    )
    tensorboard: bool = setting(
        False,
        "Whether the run's folder gets TensorBoard's event files; needs lowbit-dist[tensorboard].",
    )

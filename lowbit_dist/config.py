"""What a run is: one YAML file, read into frozen, typed sections, every mistake answered in one line.

A `ConfigError` is one line: the field, its value, the rule, what to write instead.  All of a run's
configuration is checked here, before any worker starts; nothing is corrected silently.
`configfile.py` reads it; what sections are made of is in `section.py`, how mistakes are worded in
`errors.py`.
"""

from collections.abc import Collection
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, SerializeAsAny, model_validator

from lowbit_dist.errors import ConfigError, nearest_divisor, nearest_multiple, plain
from lowbit_dist.execution import Cluster, Run, Tracking
from lowbit_dist.grid import BLOCK, GRIDS
from lowbit_dist.methods.method import Method
from lowbit_dist.optim.rule import Rule
from lowbit_dist.precision import MaybeWord, Precision
from lowbit_dist.section import (
    Count,
    FilePath,
    FolderOrUrl,
    Fraction,
    MaybeFilePath,
    RunName,
    Section,
    Tokens,
    is_changeable,
    may_change,
    no_truth,
    on_or_off,
    setting,
)
from lowbit_dist.shape import PRESETS, Model, Sizes
from lowbit_dist.yamlfile import written

__all__ = ["PRESETS", "ConfigError", "FilePath", "Model", "RunConfig", "RunName", "Section", "Sizes"]


class Data(Section):
    """Which prepared tokens the run reads."""

    # `inputs.py` knows what lies there by its content.
    path: FolderOrUrl = may_change(
        ..., "The folder or URL that `lowbit data prepare` has written, for example data/stdlib."
    )
    seq_len: Annotated[int, Field(ge=2, le=2**20)] = setting(
        256, "The length of a sample, as the data was prepared.", unit="tokens"
    )
    tokenizer: MaybeFilePath = may_change(
        None, "The tokenizer's folder: if it is given, the data must have been prepared with it."
    )
    document_mask: bool = setting(
        False,
        "Whether attention stays within a document, where a sample holds several; positions begin anew in "
        "each.",
    )
    cache: MaybeFilePath = may_change(
        None,
        "Where each machine keeps the shards that it reads; null is lowbit-dist/data in XDG_CACHE_HOME or "
        "~/.cache.",
    )


class Schedule(Section):
    """How the learning rate changes over the run."""

    name: Literal["cosine", "linear", "constant", "wsd", "two_stage"] = setting(
        "cosine",
        "The shape after the warm-up. wsd (arXiv 2404.06395) is constant and then falls in a line, and like "
        "constant can go on longer. two_stage is BitNet's: a line to zero, whose peak drops and whose "
        "weight decay ends at switch_at.",
    )
    warmup_steps: Annotated[int, Field(ge=0, le=2**31 - 1)] = setting(
        50, "For so many steps the learning rate rises from zero to its peak, in a line.", unit="steps"
    )
    min_lr_ratio: Fraction = setting(
        0.1, "Where cosine, linear and wsd end, as a share of optimizer.lr.", unit="of optimizer.lr"
    )
    decay_share: Annotated[float, Field(gt=0, le=1)] = setting(
        0.2, "The last part of the run, in which the rate of wsd falls.", unit="of train.steps"
    )
    switch_at: Annotated[float, Field(gt=0, lt=1)] = setting(
        0.5, "When the second stage of two_stage begins, as a share of train.steps.", unit="of train.steps"
    )
    second_lr_ratio: Annotated[float, Field(gt=0, le=1)] = setting(
        0.667, "The second peak of two_stage, as a share of optimizer.lr.", unit="of optimizer.lr"
    )
    weight_decay_until: Annotated[float, Field(gt=0, le=1)] | None = setting(
        None,
        "When the weight decay of two_stage ends: null is at switch_at, as in BitNet; in TriLM it is 0.667.",
        unit="of train.steps",
    )

    @model_validator(mode="after")
    def _weight_decay_ends_in_two_stages(self) -> Self:
        if self.weight_decay_until is not None and self.name != "two_stage":
            raise ConfigError(
                f"schedule.weight_decay_until ({self.weight_decay_until:g}) must go with schedule.name "
                f"two_stage, not {self.name}, whose weight decay does not end; leave it out"
            )
        return self


class Zero(Section):
    """How weights and states are spread over workers (DeepSpeed's ZeRO)."""

    residency: Literal["sharded", "replicated"] = setting(
        "sharded",
        "Where packed codes are between two uses: a shard on each worker, or all of them on every worker, "
        "gathered once in a step.",
    )
    stage: Annotated[Literal[0, 1, 2, 3] | None, BeforeValidator(no_truth)] = setting(
        None, "ZeRO's stage, for methods with latent weights alone; null is 3."
    )


class Train(Section):
    """How long a run is, what a step is, and what is measured and kept."""

    steps: Count = setting(300, "How many optimizer steps the run has.", unit="steps")
    batch_tokens: Tokens = setting(8192, "The batch of one optimizer step, over all workers.", unit="tokens")
    micro_batch: Annotated[int, Field(ge=1, le=2**20)] = setting(
        8, "How many samples a worker takes in one forward and backward pass.", unit="samples"
    )
    clip_norm: Annotated[float, Field(ge=0, le=1e6)] = setting(
        1.0, "Gradients whose norm over the whole model is larger are scaled down to it; 0 does not clip."
    )
    activation_checkpointing: bool = may_change(
        False, "Whether activations are computed anew in the backward pass, which takes less memory."
    )
    reproducible: bool = setting(
        False, "Whether the result has the same bits on any number of workers; it needs precision fp32."
    )
    gradient_release: bool = setting(
        False,
        "Whether weights are updated while the backward pass runs and gradients dropped at once, which saves "
        "their memory. Gradients are then clipped by the norm of the step before (a run's first ones not at "
        "all), and of a wrong step the parameters whose gradients come first are updated.",
    )
    compile: Annotated[Literal["auto", "off", "on"], BeforeValidator(on_or_off)] = setting(
        "off",
        "Whether transformer blocks are compiled by PyTorch, which makes training faster after some seconds; "
        "auto compiles runs that begin with more than some minutes to go, where that works. It changes the "
        "bits of a run.",
    )
    log_every: Count = may_change(10, "How often a row of metrics.jsonl is written.", unit="steps")
    eval_every: Count = may_change(100, "How often the validation loss is measured.", unit="steps")
    eval_samples: Count = setting(
        256, "How many validation samples it is measured on, at most.", unit="samples"
    )
    save_every: Count = may_change(100, "How often a checkpoint is saved.", unit="steps")
    keep_last: Count = may_change(3, "How many of the newest checkpoints are kept.", unit="checkpoints")
    keep_every: Count | None = may_change(
        None,
        "Checkpoints of steps that this divides stay for good; it is a multiple of save_every.",
        unit="steps",
    )
    max_skipped: Count = may_change(
        20, "So many steps in a row whose loss or gradient is wrong end the run.", unit="steps"
    )
    max_grad_ratio: Annotated[float, Field(gt=1, le=1e30)] = may_change(
        1000.0,
        "A step whose gradient norm is more than so many times the median of the last 64 steps is skipped.",
    )
    on_spike: Literal["warn", "rollback"] = may_change(
        "warn",
        "What follows a loss 6 standard deviations above the last 64: a line in the log, or a return to the "
        "last checkpoint, past the batches that led there.",
    )


class RunConfig(Section):
    """The whole configuration of one run."""

    run: Run = Run()
    model: Model = Model(preset="tiny")
    method: SerializeAsAny[Method]
    data: Data
    optimizer: SerializeAsAny[Rule]
    schedule: Schedule = Schedule()
    precision: MaybeWord = Precision()
    zero: Zero = Zero()
    train: Train = Train()
    cluster: Cluster = may_change(Cluster())
    tracking: Tracking = may_change(Tracking())

    @model_validator(mode="after")
    def _parts_fit(self) -> Self:
        model, data, method, zero = self.model, self.data, self.method, self.zero
        if model.pretrained is None and data.seq_len > model.max_seq_len:  # else the positions are its own
            raise ConfigError(
                f"data.seq_len ({data.seq_len:,}) must be at most model.max_seq_len {model.max_seq_len:,}; "
                f"write data.seq_len: {model.max_seq_len} or model.max_seq_len: {data.seq_len}"
            )
        self.worker_counts()
        if method.stored is not None and zero.stage is not None:
            raise ConfigError(
                f"zero.stage ({zero.stage}) must be left out for method {method.name}, whose packed codes "
                "always run under packed ZeRO-3; it is for methods with latent weights, such as dense"
            )
        for grid in (method.stored, method.sent_grid):
            if grid is not None and grid not in GRIDS.values():
                raise ConfigError(
                    f"method.name ({method.name}) packs weights on a grid of its own ({grid.name}, "
                    f"{grid.low} to {grid.high}); kernels and checkpoints have {', '.join(GRIDS)}: write "
                    "another method"
                )
        if method.stored is None and zero.residency != "sharded":
            raise ConfigError(
                f"zero.residency ({zero.residency}) must be sharded for method {method.name}: only packed "
                "codes can be replicated; write zero.stage: 2 to keep whole weights on every worker"
            )
        if zero.residency != "sharded" and len(method.stages(self.train.steps)) > 1:
            raise ConfigError(
                f"zero.residency ({zero.residency}) must be sharded for method {method.label}: what is "
                "replicated would change with the forward pass; write zero.residency: sharded"
            )
        if zero.stage in (1, 2) and self.optimizer.states == "int8":
            raise ConfigError(
                f"optimizer.states (int8) must not be used with zero.stage {zero.stage}: blocks of {BLOCK} "
                "elements cannot follow DeepSpeed's flat stage-1/2 partitions; write zero.stage: 3 or "
                "optimizer.states: fp32"
            )
        of_linear, of_others = (self.optimizer.of(is_linear=is_linear) for is_linear in (True, False))
        if zero.stage in (1, 2) and (of_linear.scope != "element" or of_linear.slots != of_others.slots):
            whole = f"sees a whole {of_linear.scope} of a weight at once"
            why = whole if of_linear.scope in ("row", "matrix") else "must know which weight an element is of"
            raise ConfigError(
                f"zero.stage ({zero.stage}) must not be used with optimizer {self.optimizer.name}, which "
                f"{why}: DeepSpeed's stage-1/2 partitions are flat; write zero.stage: 3, or 0"
            )
        passes = self.micro_batches // self.worker_counts()[-1]
        if zero.stage in (0, 1) and self.precision.compute != "fp32" and passes > 1:
            raise ConfigError(
                f"zero.stage ({zero.stage}) must not be used with precision {self.precision.compute} and "
                f"{passes:,} micro-batches a worker, whose gradients DeepSpeed would add up in bf16; write "
                "zero.stage: 2, which adds them up in float32, or 3, or precision: fp32"
            )
        if self.precision.matmul == "int8" and method.stored is None:
            raise ConfigError(
                "precision.matmul (int8) must go with a method whose weights are packed integers, such as "
                f"dqt, not {method.name}; write {self.precision.without_integers}"
            )
        if self.train.gradient_release and zero.stage in (0, 1, 2):
            raise ConfigError(
                f"train.gradient_release (true) must not be used with zero.stage {zero.stage}, where "
                "DeepSpeed keeps all gradients until the step's end; write zero.stage: 3"
            )
        if self.train.gradient_release and passes > 1:
            larger, fewer = self.train.micro_batch * passes, self.train.batch_tokens // passes
            instead = f"train.micro_batch: {larger} or train.batch_tokens: {fewer}"
            if not isinstance(self.cluster.workers, int):  # the batch decides on their number
                instead = f"cluster.workers: {self.micro_batches}"
            raise ConfigError(
                f"train.gradient_release (true) must go with one micro-batch a worker and step, not "
                f"{passes:,}: a gradient is gone before the next one could be added to it; write {instead}"
            )
        if self.run.with_states and self.run.parent is None:
            raise ConfigError(
                "run.with_states (true) must go with run.from; write run.from: RUN, or leave it out"
            )
        keep, save = self.train.keep_every, self.train.save_every
        if keep is not None and keep % save:
            raise ConfigError(
                f"train.keep_every ({keep:,}) must be a multiple of train.save_every {save:,}; "
                f"the nearest is {nearest_multiple(keep, save):,}"
            )
        if self.train.reproducible and self.precision.compute != "fp32":
            raise ConfigError(
                f"train.reproducible (true) must go with precision fp32, not {self.precision.compute}: "
                "rounded to bf16, gradients depend on the number of workers; write precision: fp32"
            )
        if self.train.reproducible and zero.stage in (0, 1, 2):
            raise ConfigError(
                f"train.reproducible (true) must not be used with zero.stage {zero.stage}, where DeepSpeed "
                "sums gradients in float32, in an order of its own; write zero.stage: 3"
            )
        return self

    def accumulation(self, world: int) -> int:
        """Micro-batches of each of `world` workers in one optimizer step."""
        per_pass = self.train.micro_batch * self.data.seq_len * world
        if self.train.batch_tokens % per_pass:
            raise ConfigError(
                f"train.batch_tokens ({self.train.batch_tokens:,}) must be a multiple of {per_pass:,} = "
                f"micro_batch {self.train.micro_batch} x seq_len {self.data.seq_len} x "
                f"{world} {'worker' if world == 1 else 'workers'}; "
                f"the nearest is {nearest_multiple(self.train.batch_tokens, per_pass):,}"
            )
        return self.train.batch_tokens // per_pass

    def worker_counts(self) -> list[int]:
        """The numbers of workers that the run may have, the largest first; each divides its micro-batches."""
        asked = self.cluster.workers
        if isinstance(asked, int):
            self.accumulation(asked)
            return [asked]
        self.accumulation(1)
        counts = [n for n in range(asked.max, asked.min - 1, -1) if self.micro_batches % n == 0]
        if not counts:
            raise ConfigError(
                f"cluster.workers ({{min: {asked.min}, max: {asked.max}}}) must contain a divisor of "
                f"{self.micro_batches} = batch_tokens {self.train.batch_tokens:,} / (micro_batch "
                f"{self.train.micro_batch} x seq_len {self.data.seq_len}); the nearest is "
                f"{nearest_divisor(self.micro_batches, asked.max)}"
            )
        return counts

    @property
    def workers(self) -> int:
        """The number of workers, the largest possible one if it may change."""
        asked = self.cluster.workers
        return asked if isinstance(asked, int) else self.worker_counts()[0]

    def with_workers(self, n: int) -> Self:
        """The same run on exactly `n` workers."""
        return self.model_copy(update={"cluster": self.cluster.model_copy(update={"workers": n})})

    @property
    def micro_batches(self) -> int:
        """Micro-batches of one optimizer step, over all workers."""
        return self.train.batch_tokens // (self.train.micro_batch * self.data.seq_len)

    def gradient_bytes(self, world: int) -> int:
        """Of each element of the sums that `world` workers keep between micro-batches.

        8: float64 sums of float32 gradients are exact in practice, hence the same in any order.  Of bf16
        gradients the sums are float32, and the gradients themselves if a worker sees one micro-batch a step.
        """
        if self.train.reproducible:
            return 8
        return 2 if self.precision.compute != "fp32" and self.micro_batches == world else 4

    @property
    def run_dir(self) -> Path:
        return self.run.dir / self.run.name

    @property
    def stop_file(self) -> Path:
        """While it is there, the run ends after the step that it is in, with a checkpoint."""
        return self.run_dir / ".stop"

    def remarks(self) -> list[str]:
        """What is carried out as asked, but may not be what was meant: one line each."""
        remarks = []
        warmup, steps = self.schedule.warmup_steps, self.train.steps
        if warmup > steps:
            remarks.append(
                f"schedule.warmup_steps ({warmup:,}) is longer than the run of {steps:,} steps: "
                f"the learning rate ends at {steps / warmup:.0%} of optimizer.lr"
            )
        return remarks

    def to_dict(self) -> dict[str, Any]:
        """Nested, of plain YAML and JSON values; `from_dict` of it is an equal configuration."""
        return self.model_dump(mode="json")

    def to_yaml(self) -> str:
        """The whole configuration, defaults included; reading it gives an equal one."""
        return written(self.to_dict())

    def flat(self) -> dict[str, Any]:
        """Dotted name -> value, in the order of the sections."""
        flat: dict[str, Any] = {}
        for section, content in self.to_dict().items():
            if isinstance(content, dict):
                flat |= {f"{section}.{name}": value for name, value in content.items()}
            else:
                flat[section] = content
        return flat

    def differences(self, other: "RunConfig", *, but: Collection[str] = ()) -> list[str]:
        """`section.field: mine -> other's` for each field that must stay the same when a run is resumed.

        but: sections and fields that need not, either
        """
        mine, others = self.flat(), other.flat()
        return [
            f"{name}: {plain(mine.get(name, 'absent'))} -> {plain(others.get(name, 'absent'))}"
            for name in dict.fromkeys((*mine, *others))
            if mine.get(name, ...) != others.get(name, ...)
            and not self._is_changeable(name)
            and not {name, name.partition(".")[0]} & {*but}
        ]

    def _is_changeable(self, name: str) -> bool:
        """Whether the field of this dotted name, or its whole section, is marked by `may_change`."""
        section, _, field = name.partition(".")
        inside = getattr(self, section)
        fields = [type(self).model_fields[section]]
        if isinstance(inside, Section) and field in type(inside).model_fields:
            fields.append(type(inside).model_fields[field])
        return any(is_changeable(info) for info in fields)

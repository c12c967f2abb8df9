"""What a run is: one YAML file, read into frozen, typed sections, every mistake answered in one line.

A `ConfigError` is one line: the field, its value, the rule, what to write instead.  All of a run's
configuration is checked here, before any worker starts; nothing is corrected silently.
`configfile.py` reads it; what sections are made of is in `section.py`, how mistakes are worded in
`errors.py`.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, Self

from pydantic import BeforeValidator, Field, SerializeAsAny, model_validator

from lowbit_dist.errors import ConfigError, nearest_divisor, nearest_multiple, plain
from lowbit_dist.grid import BLOCK, GRIDS
from lowbit_dist.methods.method import Method
from lowbit_dist.optim.rule import Rule
from lowbit_dist.section import (
    Count,
    FilePath,
    Fraction,
    MaybeFilePath,
    RunName,
    Section,
    Size,
    Text,
    Tokens,
    WorkerRange,
    auto_or,
    is_changeable,
    may_change,
    no_truth,
    number,
    worker_count,
)
from lowbit_dist.yamlfile import written


class Run(Section):
    name: RunName = "run"
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    dir: FilePath = may_change(Path("runs"))


class Sizes(NamedTuple):
    """A LLaMA's shape: what decides every tensor but the vocabulary's."""

    hidden_size: int
    intermediate_size: int
    layers: int
    heads: int
    kv_heads: int


# Parameters are counted with an untied vocabulary of 32,000, except for tiny and 13m (linears alone).
PRESETS: dict[str, Sizes] = {
    "tiny": Sizes(256, 768, 4, 4, 4),  # 3.4 M in its linears
    "13m": Sizes(512, 1536, 4, 8, 8),  # 13.6 M in its linears
    "130m": Sizes(768, 2048, 12, 12, 12),  # 134 M
    "320m": Sizes(1024, 2816, 20, 16, 16),  # 322 M
    "1b": Sizes(2048, 5632, 22, 32, 4),  # 1.10 B, the shape of TinyLlama (arXiv:2401.02385)
    "7b": Sizes(4096, 11008, 32, 32, 32),  # 6.74 B, LLaMA-2 (arXiv:2307.09288)
    "70b": Sizes(8192, 28672, 80, 64, 8),  # 69.0 B, LLaMA-2
}
Preset = Literal["tiny", "13m", "130m", "320m", "1b", "7b", "70b"]


class Model(Section):
    """Exactly one of `preset`, the five explicit sizes, or `pretrained`; `preset: tiny` if none is given."""

    preset: Preset | None = None
    hidden_size: Size | None = None
    intermediate_size: Size | None = None
    layers: Annotated[int, Field(ge=1, le=4096)] | None = None
    heads: Size | None = None
    kv_heads: Size | None = None
    pretrained: MaybeFilePath = None
    max_seq_len: Size = 2048
    rope_theta: Annotated[float, Field(gt=0, le=1e12)] = 10000.0
    norm_eps: Annotated[float, Field(ge=1e-20, le=1)] = 1e-5
    tie_embeddings: bool = False

    @model_validator(mode="before")
    @classmethod
    def _tiny_if_nothing_is_asked(cls, data: Any) -> Any:
        if isinstance(data, Mapping) and all(
            data.get(name) is None for name in ("preset", "pretrained", *Sizes._fields)
        ):
            return {**data, "preset": "tiny"}
        return data

    @model_validator(mode="after")
    def _one_shape(self) -> Self:
        given = [name for name in Sizes._fields if getattr(self, name) is not None]
        answers = [name for name in ("preset", "pretrained") if getattr(self, name) is not None]
        if len(answers) == 2:
            raise ConfigError(
                f"model.preset ({self.preset}) must not stand beside model.pretrained ({self.pretrained}): "
                "both say the model's shape; leave one out, or write it as null"
            )
        if answers and given:
            only = answers[0]
            raise ConfigError(
                f"model.{given[0]} ({getattr(self, given[0])}) must not stand beside model.{only} "
                f"({getattr(self, only)}), which says every size; leave it out, or write model.{only}: null "
                f"and all of {', '.join(Sizes._fields)}"
            )
        if given and len(given) < len(Sizes._fields):
            missing = [name for name in Sizes._fields if name not in given]
            raise ConfigError(
                f"model.{missing[0]} is required beside model.{given[0]} "
                f"({getattr(self, given[0])}): sizes are given all together; add {', '.join(missing)}, "
                f"or write one of the presets {', '.join(PRESETS)}"
            )
        if given:
            self._sizes_fit()
        return self

    def _sizes_fit(self) -> None:
        sizes = self.sizes()
        assert sizes is not None, "explicit sizes are complete here"
        if sizes.hidden_size % (2 * sizes.heads):
            fitting = nearest_divisor(sizes.hidden_size // 2, sizes.heads)
            raise ConfigError(
                f"model.heads ({sizes.heads}) must divide hidden_size {sizes.hidden_size} into heads of an "
                f"even size (rotary embedding turns pairs); the nearest is {fitting}"
            )
        if sizes.heads % sizes.kv_heads:
            raise ConfigError(
                f"model.kv_heads ({sizes.kv_heads}) must divide model.heads {sizes.heads}; "
                f"the nearest is {nearest_divisor(sizes.heads, sizes.kv_heads)}"
            )

    def sizes(self) -> Sizes | None:
        """The shape asked for; None when it is the pretrained model's own."""
        if self.pretrained is not None:
            return None
        if self.preset is not None:
            return PRESETS[self.preset]
        return Sizes(*(getattr(self, name) for name in Sizes._fields))


class Data(Section):
    path: Text  # a folder or URL
    seq_len: Annotated[int, Field(ge=2, le=2**20)] = 256  # tokens of a sample
    tokenizer: MaybeFilePath = None  # if given, must be the one the data was prepared with
    cache: MaybeFilePath = may_change(None)  # where shards of a remote path are kept on this machine


class Schedule(Section):
    name: Literal["cosine", "linear", "constant", "two_stage"] = "cosine"
    warmup_steps: Annotated[int, Field(ge=0, le=2**31 - 1)] = 50
    min_lr_ratio: Fraction = 0.1  # where cosine and linear end
    switch_at: Annotated[float, Field(gt=0, lt=1)] = 0.5  # of the steps; two_stage
    second_lr_ratio: Annotated[float, Field(gt=0, le=1)] = 0.667  # second peak / first; two_stage


class Zero(Section):
    residency: Literal["sharded", "replicated"] = "sharded"  # of packed codes
    stage: Annotated[Literal[0, 1, 2, 3] | None, BeforeValidator(no_truth)] = (
        None  # latent-weight methods; None is 3
    )


class Train(Section):
    steps: Count = 300
    batch_tokens: Tokens = 8192  # of one optimizer step, over all workers
    micro_batch: Annotated[int, Field(ge=1, le=2**20)] = 8  # samples of one worker's pass
    clip_norm: Annotated[float, Field(ge=0, le=1e6)] = 1.0  # 0 does not clip
    activation_checkpointing: bool = False
    reproducible: bool = False
    log_every: Count = may_change(10)
    eval_every: Count = may_change(100)
    eval_samples: Count = 256
    save_every: Count = may_change(100)
    keep_last: Count = may_change(3)
    keep_every: Count | None = may_change(None)  # checkpoints of steps that this divides stay for good
    max_skipped: Count = may_change(20)  # so many steps in a row whose loss or gradient is wrong end the run
    # A gradient norm of more than so many times the median of the last steps is an error, not a direction.
    max_grad_ratio: Annotated[float, Field(gt=1, le=1e30)] = may_change(1000.0)
    # On a loss 6 standard deviations above the last steps'.
    on_spike: Literal["warn", "rollback"] = may_change("warn")


class Cluster(Section):
    workers: Annotated[int | WorkerRange, BeforeValidator(worker_count)] = 2
    cpus_per_worker: Annotated[int | float, BeforeValidator(number), Field(gt=0, le=4096)] = 1
    gpus_per_worker: Annotated[Literal["auto"] | int | float, BeforeValidator(auto_or(0, "GPUs"))] = "auto"
    max_failures: Annotated[int, Field(ge=0, le=2**31 - 1)] = 10
    # Seconds without progress after which the workers are restarted; auto is 20 median steps, at least 60 s.
    hang_timeout: Annotated[Literal["auto"] | int | float, BeforeValidator(auto_or(1, "seconds"))] = "auto"
    # Seconds that a start waits for machines. auto refuses at once what the cluster will never have slots
    # for, and waits 60 s for machines that are busy or coming back; one that grows on demand needs minutes.
    start_timeout: Annotated[Literal["auto"] | int | float, BeforeValidator(auto_or(1, "seconds"))] = "auto"


class Tracking(Section):
    mlflow: Text | None = "sqlite:///mlflow.db"  # a tracking URI; None logs to files alone
    experiment: Text = "lowbit"


class RunConfig(Section):
    """The whole configuration of one run."""

    run: Run = Run()
    model: Model = Model(preset="tiny")
    method: SerializeAsAny[Method]
    data: Data
    optimizer: SerializeAsAny[Rule]
    schedule: Schedule = Schedule()
    precision: Literal["bf16", "fp32"] = "bf16"
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
        if zero.stage in (1, 2) and self.optimizer.states == "int8":
            raise ConfigError(
                f"optimizer.states (int8) must not be used with zero.stage {zero.stage}: blocks of {BLOCK} "
                "elements cannot follow DeepSpeed's flat stage-1/2 partitions; write zero.stage: 3 or "
                "optimizer.states: fp32"
            )
        if zero.stage in (1, 2) and self.optimizer.scope != "element":
            raise ConfigError(
                f"zero.stage ({zero.stage}) must not be used with optimizer {self.optimizer.name}, which "
                f"sees a whole {self.optimizer.scope} of a weight at once: DeepSpeed's stage-1/2 partitions "
                "are flat; write zero.stage: 3, or 0"
            )
        keep, save = self.train.keep_every, self.train.save_every
        if keep is not None and keep % save:
            raise ConfigError(
                f"train.keep_every ({keep:,}) must be a multiple of train.save_every {save:,}; "
                f"the nearest is {nearest_multiple(keep, save):,}"
            )
        if self.train.reproducible and self.precision != "fp32":
            raise ConfigError(
                f"train.reproducible (true) must go with precision fp32, not {self.precision}: rounded to "
                "bf16, gradients depend on the number of workers; write precision: fp32"
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
        return 2 if self.precision == "bf16" and self.micro_batches == world else 4

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

    def differences(self, other: "RunConfig") -> list[str]:
        """`section.field: mine -> other's` for each field that must stay the same when a run is resumed."""
        mine, others = self.flat(), other.flat()
        return [
            f"{name}: {plain(mine.get(name, 'absent'))} -> {plain(others.get(name, 'absent'))}"
            for name in dict.fromkeys((*mine, *others))
            if mine.get(name, ...) != others.get(name, ...) and not self._is_changeable(name)
        ]

    def _is_changeable(self, name: str) -> bool:
        """Whether the field of this dotted name, or its whole section, is marked by `may_change`."""
        section, _, field = name.partition(".")
        inside = getattr(self, section)
        fields = [type(self).model_fields[section]]
        if isinstance(inside, Section) and field in type(inside).model_fields:
            fields.append(type(inside).model_fields[field])
        return any(is_changeable(info) for info in fields)

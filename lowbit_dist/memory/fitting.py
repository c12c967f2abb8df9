"""Whether a run fits into the memory there is, and if not, what would."""

from collections.abc import Iterator
from typing import Any, NamedTuple

from lowbit_dist import configfile
from lowbit_dist.checkpoint import checkpoint_bytes
from lowbit_dist.config import PRESETS, ConfigError, RunConfig, Sizes
from lowbit_dist.errors import in_bytes, plain
from lowbit_dist.memory.machine import MemoryBudget, local_budget
from lowbit_dist.memory.plan import planned

# Of a worker on CPUs beside its tensors: Python, torch, DeepSpeed, Ray and on worker 0 MLflow.  Two workers
# whose tensors took 12 MB had resident sets of 1.24 and 1.17 GB at most, of which 0.45 GB are pages of
# libraries that all processes share; their proportional shares (PSS in smaps) were 0.85 and 0.78 GB.
PROCESS = 850_000_000
# Of a worker on a GPU: the CUDA context, NCCL's buffers and what the allocator cannot use.  Not measured.
CUDA_CONTEXT = 1_500_000_000

Changes = dict[str, Any]  # dotted name -> value


class Fit(NamedTuple):
    """What one worker needs, and what there is for it."""

    parts: dict[str, int]  # component -> bytes
    available: int
    is_complete: bool  # with what lives only inside a step

    @property
    def needed(self) -> int:
        return sum(self.parts.values())

    @property
    def fits(self) -> bool:
        return self.needed <= self.available


def check_memory(config: RunConfig, vocab_size: int, budget: MemoryBudget) -> None:
    """ConfigError unless the run fits into `budget`; it names the largest part, and what would fit."""
    if _is_small(config, vocab_size, budget) or (need := fit(config, vocab_size, budget)).fits:
        return
    workers, least = config.workers, "" if need.is_complete else "at least "
    part = max(need.parts.keys() - {"checkpoint_copy"}, key=lambda name: need.parts[name])
    if budget.on_gpu:
        needs = f"{least}{in_bytes(need.needed)} on each worker's GPU, but {budget.place} has"
        needs += f" {in_bytes(need.available)} for it"
    else:
        on_one = budget.workers_on_one(workers) * need.needed
        needs = f"{least}{in_bytes(need.needed)} of memory each, {in_bytes(on_one)} in all, "
        needs += f"but {budget.place} has {in_bytes(budget.bytes)} free"
    answer = "nothing smaller that would fit is known: free memory, or train on more machines"
    for changes in _remedies(config, budget, part):
        try:
            smaller = fit(configfile.changed(config, changes), vocab_size, budget)
        except ConfigError:  # the changes contradict the rest of the configuration
            continue
        if smaller.fits:
            words = " ".join(f"{name}={_value(value)}" for name, value in changes.items())
            answer = f"write {words}, which needs {in_bytes(smaller.needed)} each"
            break
    raise ConfigError(
        f"cluster.workers ({workers:,}) need{'s' if workers == 1 else ''} {needs}; the largest part is "
        f"{part} with {in_bytes(need.parts[part])} a worker; {answer}"
    )


def fits_here(config: RunConfig, vocab_size: int) -> dict[str, Any]:
    """What `plan` says of this machine, all workers on it."""
    need = fit(config, vocab_size, local_budget(config), complete=True)
    return {
        "needed_bytes_per_worker": need.needed,
        "available_bytes_per_worker": need.available,
        "fits": need.fits,
    }


def fit(config: RunConfig, vocab_size: int, budget: MemoryBudget, *, complete: bool = False) -> Fit:
    """Without `complete`, a step is simulated only if what is at rest fits."""
    workers, beside = config.workers, {"process": CUDA_CONTEXT}
    if not budget.on_gpu:
        # While a checkpoint is written, training continues beside a copy of the worker's part of it; under
        # stage 0 worker 0 writes all.
        writers = 1 if config.zero.stage == 0 else workers
        beside = {"checkpoint_copy": checkpoint_bytes(config, vocab_size) // writers, "process": PROCESS}

    def of(is_complete: bool) -> Fit:
        components = planned(config, vocab_size, workers, with_step=is_complete)["components"]
        sizes = {name: part["bytes"] or 0 for name, part in components.items()}
        return Fit(sizes | beside, budget.per_worker(workers), is_complete)

    return of(True) if complete or (resting := of(False)).fits else resting


def _is_small(config: RunConfig, vocab_size: int, budget: MemoryBudget) -> bool:
    """Whether the run fits by a bound that is far too high, but known at once."""
    sizes = config.model.sizes()
    if sizes is None:
        return False
    n = 1.1 * (sizes.linear_parameters + 2 * vocab_size * sizes.hidden_size)
    per_layer = 32 * sizes.hidden_size + 12 * sizes.intermediate_size + 2 * sizes.heads * config.data.seq_len
    tokens = config.train.micro_batch * config.data.seq_len
    # Weights, gradients and states whole on each worker, twice for what is copied inside a step.
    bound = 64 * n + 4 * tokens * (sizes.layers * per_layer + 10 * vocab_size) + (64 << 20)
    return bound + max(PROCESS, CUDA_CONTEXT) <= budget.per_worker(config.workers)


def _value(value: Any) -> str:
    if isinstance(value, dict):
        return "'{" + ", ".join(f"{name}: {plain(x)}" for name, x in value.items()) + "}'"
    return plain(value)


def _remedies(config: RunConfig, budget: MemoryBudget, part: str) -> Iterator[Changes]:
    """What makes workers smaller: one change, those that cut `part` first; several; a smaller model."""
    ladders = sorted((one for one in _ladders(config, budget) if one[1]), key=lambda one: part not in one[0])
    together: Changes = {}
    for _, choices in ladders:
        yield from choices
    for _, choices in ladders:
        if _is_right(config, together | choices[-1]):  # else it would spoil what follows, too
            together |= choices[-1]
            yield dict(together)
    for before in ({}, together):
        yield from (before | model for model in _smaller_models(config))


def _is_right(config: RunConfig, changes: Changes) -> bool:
    try:
        configfile.changed(config, changes)
    except ConfigError:
        return False
    return True


def _ladders(config: RunConfig, budget: MemoryBudget) -> Iterator[tuple[str, list[Changes]]]:
    """The components that a change cuts, and its choices from the mildest on."""
    train, n, stage = config.train, config.workers, config.zero.stage
    sharded = {"zero.stage": 3} if stage in (1, 2) else {}
    yield "optimizer_states", [{"optimizer.states": "int8", **sharded}] * (config.optimizer.states != "int8")
    yield "activations", [{"train.activation_checkpointing": True}] * (not train.activation_checkpointing)
    halves = [train.micro_batch >> i for i in range(1, train.micro_batch.bit_length())]
    yield "activations transient", [{"train.micro_batch": size} for size in halves]
    is_replicated = config.zero.residency == "replicated" and n > 1
    yield "low_bit_weights", [{"zero.residency": "sharded"}] * is_replicated
    yield "other_weights gradients optimizer_states transient", [{"zero.stage": 3}] * (stage in (0, 1, 2))
    # More workers where there are places for them, for each has less; else fewer, for each has more.
    numbers = range(n + 1, budget.most_workers + 1) or range(0 if budget.on_gpu else n - 1, 0, -1)
    yield "process activations", [{"cluster.workers": other} for other in numbers]
    stageless = {} if stage is None else {"zero.stage": None}
    # With the other options of the method, or where dqt has not all of them, without.
    stored: list[Changes] = [{"method.name": "dqt", **stageless}, {"method": {"name": "dqt"}, **stageless}]
    yield "other_weights", stored * (config.method.stored is None)


def _smaller_models(config: RunConfig) -> Iterator[Changes]:
    """Presets below the model, from the largest down."""
    if (own := config.model.sizes()) is None:
        return
    given = config.model.model_dump(mode="json", exclude_unset=True)
    others = {name: value for name, value in given.items() if name not in (*Sizes._fields, "preset")}
    for name in sorted(PRESETS, key=lambda preset: -PRESETS[preset].linear_parameters):
        if PRESETS[name].linear_parameters < own.linear_parameters:
            # Sizes of its own must go.
            is_preset = config.model.preset is not None
            yield {"model.preset": name} if is_preset else {"model": {"preset": name, **others}}

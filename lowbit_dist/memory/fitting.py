"""Whether a run fits into the memory there is, and if not, what would."""

from bisect import bisect_left
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

from lowbit_dist import configfile
from lowbit_dist.config import PRESETS, ConfigError, RunConfig, Sizes
from lowbit_dist.errors import in_bytes, plain
from lowbit_dist.memory.disk import checkpoint_bytes
from lowbit_dist.memory.machine import MemoryBudget, local_budget
from lowbit_dist.memory.plan import at_rest, planned

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


class Remedy(NamedTuple):
    """A change to a configuration that makes its workers smaller."""

    cuts: tuple[str, ...]  # components
    choices: list[Changes]  # from the mildest on, each needing less than the one before


def check_memory(config: RunConfig, vocab_size: int, budget: MemoryBudget) -> None:
    """ConfigError unless the run fits into `budget`; it names the largest part, and what would fit."""
    if _is_small(config, vocab_size, budget) or (found := fit(config, vocab_size, budget)).fits:
        return
    workers, least = config.workers, "" if found.is_complete else "at least "
    part = max(found.parts.keys() - {"checkpoint_copy"}, key=lambda name: found.parts[name])
    if budget.on_gpu:
        needs = f"{least}{in_bytes(found.needed)} on each worker's GPU, but {budget.place} has"
        needs += f" {in_bytes(found.available)} for it"
    else:
        on_one = budget.workers_on_one(workers) * found.needed
        needs = f"{least}{in_bytes(found.needed)} of memory each, {in_bytes(on_one)} in all, "
        needs += f"but {budget.place} has {in_bytes(budget.bytes)} free"
    changes = _sufficient(config, vocab_size, budget, part)
    if changes is None:
        answer = "nothing smaller that would fit is known: free memory, or train on more machines"
    else:
        needed = fit(changed(config, changes), vocab_size, budget).needed
        words = " ".join(f"{name}={_value(value)}" for name, value in changes.items())
        answer = f"write {words}, which needs {in_bytes(needed)} each"
    raise ConfigError(
        f"cluster.workers ({workers:,}) need{'s' if workers == 1 else ''} {needs}; the largest part is "
        f"{part} with {in_bytes(found.parts[part])} a worker; {answer}"
    )


def fits_here(config: RunConfig, vocab_size: int) -> dict[str, Any]:
    """What `plan` says of this machine, all workers on it."""
    found = fit(config, vocab_size, local_budget(config), complete=True)
    return {
        "needed_bytes_per_worker": found.needed,
        "available_bytes_per_worker": found.available,
        "fits": found.fits,
    }


def fit(config: RunConfig, vocab_size: int, budget: MemoryBudget, *, complete: bool = False) -> Fit:
    """Without `complete`, a step is simulated only if what is at rest fits."""
    workers, beside = config.workers, {"process": CUDA_CONTEXT}
    if not budget.on_gpu:
        # While a checkpoint is written, training goes on beside a copy of the worker's part of it; under
        # stage 0 worker 0 writes all.
        writers = 1 if config.zero.stage == 0 else workers
        beside = {"checkpoint_copy": checkpoint_bytes(config, vocab_size) // writers, "process": PROCESS}

    def of(report: Mapping[str, Any], is_complete: bool) -> Fit:
        sizes = {name: part["bytes"] or 0 for name, part in report["components"].items()}
        return Fit(sizes | beside, budget.per_worker(workers), is_complete)

    found = of(at_rest(config, vocab_size, workers), False)
    return of(planned(config, vocab_size, workers), True) if complete or found.fits else found


def _is_small(config: RunConfig, vocab_size: int, budget: MemoryBudget) -> bool:
    """Whether the run fits by a bound that is far too high, but known at once."""
    sizes = config.model.sizes()
    if sizes is None:
        return False
    n = 1.1 * (_linear_parameters(sizes) + 2 * vocab_size * sizes.hidden_size)
    per_layer = 32 * sizes.hidden_size + 12 * sizes.intermediate_size
    per_layer += 2 * sizes.heads * config.data.seq_len
    tokens = config.train.micro_batch * config.data.seq_len
    # Weights, gradients and states whole on each worker, twice for what is copied inside a step.
    bound = 64 * n + 4 * tokens * (sizes.layers * per_layer + 10 * vocab_size) + (64 << 20)
    return bound + max(PROCESS, CUDA_CONTEXT) <= budget.per_worker(config.workers)


def _linear_parameters(sizes: Sizes) -> int:
    hidden, kv = sizes.hidden_size, sizes.hidden_size * sizes.kv_heads // sizes.heads
    return sizes.layers * hidden * (2 * hidden + 2 * kv + 3 * sizes.intermediate_size)


def _value(value: Any) -> str:
    if isinstance(value, dict):
        return "'{" + ", ".join(f"{name}: {plain(x)}" for name, x in value.items()) + "}'"
    return plain(value)


def changed(config: RunConfig, changes: Mapping[str, Any]) -> RunConfig:
    """The configuration that results when `changes` are written behind the same file."""
    content = config.model_dump(mode="json", exclude_unset=True)
    for name, value in changes.items():
        section, _, field = name.partition(".")
        content[section] = {**content.get(section, {}), field: value} if field else value
    return configfile.from_dict(content)


def _sufficient(config: RunConfig, vocab_size: int, budget: MemoryBudget, part: str) -> Changes | None:
    """The first remedy that is enough, else several, else a smaller model; each has been planned.

    Remedies that cut `part` come first.
    """

    def fits(changes: Changes) -> bool:
        try:
            return fit(changed(config, changes), vocab_size, budget).fits
        except ConfigError:
            return False

    remedies = sorted(_remedies(config, budget), key=lambda remedy: part not in remedy.cuts)
    for remedy in remedies:
        if (changes := _smallest_sufficient(fits, remedy.choices)) is not None:
            return changes
    together: Changes = {}
    for remedy in remedies:
        together |= remedy.choices[-1]
        if fits(together):
            return _drop_unneeded(fits, together, remedy.choices[-1])
    for before in ({}, together) if together else ({},):
        for model in _smaller_models(config):
            if fits({**before, **model}):
                return _drop_unneeded(fits, {**before, **model}, model)
    return None


def _smallest_sufficient(fits: Callable[[Changes], bool], choices: list[Changes]) -> Changes | None:
    i = bisect_left(choices, True, key=fits)
    return choices[i] if i < len(choices) else None


def _drop_unneeded(fits: Callable[[Changes], bool], changes: Changes, needed: Changes) -> Changes:
    for name in changes.keys() - needed.keys():
        fewer = {other: value for other, value in changes.items() if other != name}
        changes = fewer if fits(fewer) else changes
    return changes


def _remedies(config: RunConfig, budget: MemoryBudget) -> Iterator[Remedy]:
    train, workers, stage = config.train, config.workers, config.zero.stage
    if config.optimizer.states != "int8":
        needs = {"zero.stage": 3} if stage in (1, 2) else {}
        yield Remedy(("optimizer_states",), [{"optimizer.states": "int8", **needs}])
    if not train.activation_checkpointing:
        yield Remedy(("activations",), [{"train.activation_checkpointing": True}])
    sizes = [n for n in range(train.micro_batch - 1, 0, -1) if _halves(train.micro_batch, n) or n == 1]
    if sizes:
        yield Remedy(("activations", "transient"), [{"train.micro_batch": n} for n in sizes])
    if config.zero.residency == "replicated" and workers > 1:
        yield Remedy(("low_bit_weights",), [{"zero.residency": "sharded"}])
    if stage in (0, 1, 2):
        yield Remedy(("other_weights", "gradients", "optimizer_states", "transient"), [{"zero.stage": 3}])
    if others := [{"cluster.workers": n} for n in _other_numbers(config, budget)]:
        yield Remedy(("process", "activations"), others)
    if config.method.stored is None:
        stageless = {} if stage is None else {"zero.stage": None}
        yield Remedy(("other_weights",), [{"method.name": "dqt", **stageless}])


def _halves(size: int, n: int) -> bool:
    """Whether n is a half of size, or a half of that, ...: it divides whatever size divides."""
    times, rest = divmod(size, n)
    return not rest and times & (times - 1) == 0


def _other_numbers(config: RunConfig, budget: MemoryBudget) -> list[int]:
    """More workers where there are places for them, for each has less; else fewer, for each has more."""
    n = config.workers
    numbers = range(n + 1, budget.most_workers + 1)
    if not numbers and not budget.on_gpu:
        numbers = range(n - 1, 0, -1)
    per_pass = config.train.micro_batch * config.data.seq_len
    return [other for other in numbers if config.train.batch_tokens % (per_pass * other) == 0]


def _smaller_models(config: RunConfig) -> Iterator[Changes]:
    """Presets below the model, from the largest down."""
    if (own := config.model.sizes()) is None:
        return
    given = config.model.model_dump(mode="json", exclude_unset=True)
    others = {name: value for name, value in given.items() if name not in (*Sizes._fields, "preset")}
    for name in sorted(PRESETS, key=lambda preset: -_linear_parameters(PRESETS[preset])):
        if _linear_parameters(PRESETS[name]) < _linear_parameters(own):
            # Sizes of its own must go.
            is_preset = config.model.preset is not None
            yield {"model.preset": name} if is_preset else {"model": {"preset": name, **others}}

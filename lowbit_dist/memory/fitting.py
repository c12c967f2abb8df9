"""Whether a run fits into the memory there is, and if not, what would."""

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any, NamedTuple

from lowbit_dist import configfile
from lowbit_dist.answers import in_bytes, plain
from lowbit_dist.config import PRESETS, ConfigError, RunConfig, Sizes
from lowbit_dist.memory.disk import checkpoint_bytes
from lowbit_dist.memory.machine import Room, room_here
from lowbit_dist.memory.plan import at_rest, planned

# Of a worker on CPUs beside its tensors: Python, torch, DeepSpeed, Ray and on worker 0 MLflow.  Two workers
# whose tensors took 12 MB had resident sets of 1.24 and 1.17 GB at most, of which 0.45 GB are pages of
# libraries that all processes share; their proportional shares (PSS in smaps) were 0.85 and 0.78 GB.
PROCESS = 850_000_000
# Of a worker on a GPU: the CUDA context, NCCL's buffers and what the allocator cannot use.  Not measured.
CUDA_CONTEXT = 1_500_000_000

Changes = Mapping[str, Any]  # dotted name -> value
Attempt = Callable[[Changes], "Fit | None"]  # how it fits; None if it does not, or is no configuration


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


class Found(NamedTuple):
    """Changes to a configuration, with which it fits."""

    changes: Changes
    fits: Fit


def check_memory(config: RunConfig, vocab_size: int, room: Room) -> None:
    """ConfigError unless the run fits into `room`; it names the largest part, and what would fit."""
    if _is_small(config, vocab_size, room):
        return
    found = fit(config, vocab_size, room)
    if found.fits:
        return
    workers = config.workers
    n = room.workers_on_one(workers)
    least = "" if found.is_complete else "at least "
    part = max(found.parts.keys() - {"checkpoint_copy"}, key=lambda name: found.parts[name])
    if room.on_gpu:
        needs = f"{least}{in_bytes(found.needed)} on each worker's GPU, but {room.place} has"
        needs += f" {in_bytes(found.available)} for it"
    else:
        needs = f"{least}{in_bytes(found.needed)} of memory each, {in_bytes(n * found.needed)} in all, "
        needs += f"but {room.place} has {in_bytes(room.bytes)} free"
    raise ConfigError(
        f"cluster.workers ({workers:,}) need{'s' if workers == 1 else ''} {needs}; the largest part is "
        f"{part} with {in_bytes(found.parts[part])} a worker; {_answer(config, vocab_size, room, part)}"
    )


def fits_here(config: RunConfig, vocab_size: int) -> dict[str, Any]:
    """What `plan` says of this machine, all workers on it."""
    found = fit(config, vocab_size, room_here(config), complete=True)
    return {
        "needed_bytes_per_worker": found.needed,
        "available_bytes_per_worker": found.available,
        "fits": found.fits,
    }


def fit(config: RunConfig, vocab_size: int, room: Room, *, complete: bool = False) -> Fit:
    """Without `complete`, a step is rehearsed only if what is at rest fits."""
    workers = config.workers
    found = _fit(config, vocab_size, room, at_rest(config, vocab_size, workers), is_complete=False)
    if complete or found.fits:
        report = planned(config, vocab_size, workers)
        found = _fit(config, vocab_size, room, report, is_complete=True)
    return found


def _fit(config: RunConfig, vocab_size: int, room: Room, report: Mapping[str, Any], is_complete: bool) -> Fit:
    workers = config.workers
    sizes = {name: part["bytes"] for name, part in report["components"].items()}
    parts = {name: size for name, size in sizes.items() if size is not None}
    if room.on_gpu:
        parts["process"] = CUDA_CONTEXT
    else:
        # While a checkpoint is written, training goes on beside a copy of the worker's part of it; under
        # stage 0 worker 0 writes all.
        writers = 1 if config.zero.stage == 0 else workers
        parts["checkpoint_copy"] = checkpoint_bytes(config, vocab_size) // writers
        parts["process"] = PROCESS
    return Fit(parts, room.of_each(workers), is_complete)


def _is_small(config: RunConfig, vocab_size: int, room: Room) -> bool:
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
    return bound + max(PROCESS, CUDA_CONTEXT) <= room.of_each(config.workers)


def _linear_parameters(sizes: Sizes) -> int:
    hidden, kv = sizes.hidden_size, sizes.hidden_size * sizes.kv_heads // sizes.heads
    return sizes.layers * hidden * (2 * hidden + 2 * kv + 3 * sizes.intermediate_size)


# ------------------------------------------------------------------ what would fit


def _answer(config: RunConfig, vocab_size: int, room: Room, part: str) -> str:
    found = _what_fits(config, vocab_size, room, part)
    if found is None:
        return "nothing smaller that would fit is known: free memory, or train on more machines"
    words = " ".join(f"{name}={_value(value)}" for name, value in found.changes.items())
    return f"write {words}, which needs {in_bytes(found.fits.needed)} each"


def _value(value: Any) -> str:
    if isinstance(value, dict):
        return "'{" + ", ".join(f"{name}: {plain(each)}" for name, each in value.items()) + "}'"
    return plain(value)


def _what_fits(config: RunConfig, vocab_size: int, room: Room, part: str) -> Found | None:
    """The first single change that is enough, else several, else a smaller model; each has been planned.

    Changes that cut `part` come first.
    """
    attempt = partial(_attempt, config, vocab_size, room)
    ways = sorted(_ways(config, room), key=lambda way: part not in way.cuts)
    for way in ways:
        if (found := _mildest(attempt, way.choices)) is not None:
            return found
    together: dict[str, Any] = {}
    for way in ways:
        together |= way.choices[-1]
        if (fits := attempt(together)) is not None:
            return _without_needless(attempt, Found(together, fits), but=way.choices[-1])
    for before in ({}, together) if together else ({},):
        for model in _smaller_models(config):
            if (fits := attempt({**before, **model})) is not None:
                return _without_needless(attempt, Found({**before, **model}, fits), but=model)
    return None


def _attempt(config: RunConfig, vocab_size: int, room: Room, changes: Changes) -> Fit | None:
    try:
        found = fit(changed(config, changes), vocab_size, room)
    except ConfigError:
        return None
    return found if found.fits else None


def changed(config: RunConfig, changes: Changes) -> RunConfig:
    """The configuration that results when `changes` are written behind the same file."""
    content = config.model_dump(mode="json", exclude_unset=True)
    for name, value in changes.items():
        section, _, field = name.partition(".")
        content[section] = {**content.get(section, {}), field: value} if field else value
    return configfile.from_dict(content)


class Way(NamedTuple):
    """A change to a configuration that makes its workers smaller."""

    cuts: tuple[str, ...]  # components
    choices: list[dict[str, Any]]  # from the mildest on, each needing less than the one before


def _ways(config: RunConfig, room: Room) -> Iterator[Way]:
    train, workers, stage = config.train, config.workers, config.zero.stage
    if config.optimizer.states != "int8":
        needs = {"zero.stage": 3} if stage in (1, 2) else {}
        yield Way(("optimizer_states",), [{"optimizer.states": "int8", **needs}])
    if not train.activation_checkpointing:
        yield Way(("activations",), [{"train.activation_checkpointing": True}])
    if sizes := _halved(train.micro_batch):
        yield Way(("activations", "transient"), [{"train.micro_batch": size} for size in sizes])
    if config.zero.residency == "replicated" and workers > 1:
        yield Way(("low_bit_weights",), [{"zero.residency": "sharded"}])
    if stage in (0, 1, 2):
        yield Way(("other_weights", "gradients", "optimizer_states", "transient"), [{"zero.stage": 3}])
    if others := [{"cluster.workers": n} for n in _other_numbers(config, room)]:
        yield Way(("process", "activations"), others)
    if config.method.stored is None:
        stageless = {} if stage is None else {"zero.stage": None}
        yield Way(("other_weights",), [{"method.name": "dqt", **stageless}])


def _halved(size: int) -> list[int]:
    """Smaller micro-batches, which divide what `size` divides."""
    found = []
    while size % 2 == 0:
        size //= 2
        found.append(size)
    return found if size == 1 else [*found, 1]


def _other_numbers(config: RunConfig, room: Room) -> list[int]:
    """More workers where there are places for them, for each has less; else fewer, for each has more."""
    n = config.workers
    numbers = range(n + 1, room.most_workers + 1)
    if not numbers and not room.on_gpu:
        numbers = range(n - 1, 0, -1)
    per_pass = config.train.micro_batch * config.data.seq_len
    return [each for each in numbers if config.train.batch_tokens % (per_pass * each) == 0]


def _smaller_models(config: RunConfig) -> Iterator[dict[str, Any]]:
    """Presets below the model, from the largest down."""
    own = config.model.sizes()
    if own is None:
        return
    given = config.model.model_dump(mode="json", exclude_unset=True)
    others = {name: value for name, value in given.items() if name not in (*Sizes._fields, "preset")}
    for name in sorted(PRESETS, key=lambda preset: -_linear_parameters(PRESETS[preset])):
        if _linear_parameters(PRESETS[name]) < _linear_parameters(own):
            # Sizes of its own must go.
            is_preset = config.model.preset is not None
            yield {"model.preset": name} if is_preset else {"model": {"preset": name, **others}}


def _mildest(attempt: Attempt, tried: list[dict[str, Any]]) -> Found | None:
    """The first that is enough."""
    if (fits := attempt(tried[0])) is not None:
        return Found(tried[0], fits)
    if len(tried) == 1 or (fits := attempt(tried[-1])) is None:
        return None
    best, low, high = Found(tried[-1], fits), 1, len(tried) - 2
    while low <= high:
        middle = (low + high) // 2
        if (fits := attempt(tried[middle])) is not None:
            best, high = Found(tried[middle], fits), middle - 1
        else:
            low = middle + 1
    return best


def _without_needless(attempt: Attempt, found: Found, but: Changes) -> Found:
    """`but` is known to be needed."""
    for name in [name for name in found.changes if name not in but]:
        fewer = {each: value for each, value in found.changes.items() if each != name}
        if (fits := attempt(fewer)) is not None:
            found = Found(fewer, fits)
    return found

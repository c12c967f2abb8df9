"""How long ops and whole models take, each next to a peer timed in the same process.

Absolute times of a shared machine mean little; ratios of candidates that take turns with their peer do. On
one CPU thread the clock is the process's own CPU time, on more the wall, on a GPU the device's events.
"""

import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lowbit_dist import model, ops, trained
from lowbit_dist.config import ConfigError, Model
from lowbit_dist.convert import PackedParameter
from lowbit_dist.errors import in_bytes
from lowbit_dist.grid import BLOCK, GRIDS, Grid
from lowbit_dist.inference import multiplies_integers
from lowbit_dist.linear import Linear
from lowbit_dist.memory.machine import available_memory, smallest_gpu
from lowbit_dist.methods.dense import Dense
from lowbit_dist.methods.dqt import DQT
from lowbit_dist.ops import cpu
from lowbit_dist.optim import AdamW, Lion, Rule
from lowbit_dist.packed import PackedTensor
from lowbit_dist.timing import clock_of, middle_half, take_turns
from lowbit_dist.timing import threads as on_threads

# Parameters that are timed by default: far beyond the caches, or what plain torch does in a minute.
_ELEMENTS = {"cuda": 2**27, "cpu": 2**24, "cpu without a compiler": 2**20}

_RULES: dict[str, Rule] = {"adamw": AdamW(betas=(0.9, 0.95)), "lion": Lion()}


class _Update(NamedTuple):
    rule: str
    grid: str
    states: str
    group: int | None = None  # elements that share a scale; None: all of them

    @property
    def name(self) -> str:
        return f"update {' '.join(map(str, self))}"


_UPDATES = [
    *(_Update("adamw", grid, "int8") for grid in GRIDS),
    _Update("adamw", "ternary", "bf16"),
    _Update("adamw", "ternary", "fp32"),
    _Update("adamw", "ternary", "int8", group=128),
    _Update("lion", "ternary", "int8"),
    _Update("lion", "int8", "int8"),
]
# AdamW on float32 reads weight, gradient and both moments and writes all but the gradient.
_PEER_BYTES_MOVED, _PEER_BYTES_RESIDENT = 28.0, 16.0


def update(
    n: int | None = None, threads: int = 1, repetitions: int = 15, device: str | None = None
) -> dict[str, object]:
    """Times one step of n packed parameters by several optimizers, against fused AdamW of float32 ones.

    Times are nanoseconds a parameter: the median, and the range that holds the middle half. Bytes are bytes a
    parameter, the gradient included (bfloat16; the peer's is float32, as it demands). The floor is the time
    in which a copy moves as many.
    """
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    compiled = device == "cuda" or cpu.available()
    n = n or _ELEMENTS[device if compiled else "cpu without a compiler"]
    if n % BLOCK:
        raise ValueError(f"n is {n}; it must be a multiple of {BLOCK}")
    backend = "triton" if device == "cuda" else "c" if compiled else "torch"
    clock = clock_of(threads, on_gpu=device == "cuda")

    with on_threads(threads):
        candidates = {"peer": _peer(n, device), "copy": _copy(n, device)}
        for case in _UPDATES:
            candidates[case.name] = _update(case, n, device)
        for name in GRIDS:
            candidates[f"decode {name}"] = _decode(GRIDS[name], n, device)
        times = take_turns(candidates, clock, repetitions)

    nanoseconds = {name: [t / n * 1e9 for t in of_one] for name, of_one in times.items()}
    # A copy of n float32 reads and writes 8 bytes a parameter; bytes a nanosecond are gigabytes a second.
    bandwidth = 8 / statistics.median(nanoseconds["copy"])

    def measured(name: str, bytes_moved: float) -> dict[str, object]:
        ratios = [a / b for a, b in zip(nanoseconds[name], nanoseconds["peer"], strict=True)]
        median = statistics.median(nanoseconds[name])
        return {
            "ns_per_parameter": median,
            "ns_per_parameter_middle_half": middle_half(nanoseconds[name]),
            "ratio_to_peer": statistics.median(ratios),
            "ratio_to_peer_middle_half": middle_half(ratios),
            "bytes_moved_per_parameter": bytes_moved,
            "floor_ns_per_parameter": bytes_moved / bandwidth,
            "share_of_copy_bandwidth": bytes_moved / median / bandwidth,
        }

    return {
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "backend": backend,
        "threads": threads,
        "clock": clock,
        "parameters": n,
        "repetitions": repetitions,
        "copy_gigabytes_per_second": bandwidth,
        "peer": {
            "name": "torch.optim.AdamW(fused=True), float32",
            **measured("peer", _PEER_BYTES_MOVED),
            "bytes_resident_per_parameter": _PEER_BYTES_RESIDENT,
        },
        "update": [
            {
                "optimizer": case.rule,
                "grid": case.grid,
                "states": case.states,
                "group": case.group,
                **measured(case.name, _bytes_moved(case)),
                "bytes_resident_per_parameter": _bytes_resident(case),
            }
            for case in _UPDATES
        ],
        "decode": [
            {"grid": name, "to": "bfloat16", **measured(f"decode {name}", grid.bytes_per_parameter + 2)}
            for name, grid in GRIDS.items()
        ],
    }


def _bytes_kept(update: _Update) -> float:
    """A parameter's code, its share of a group's scale, and its slots."""
    slots = [ops.Stored.zeros(slot, BLOCK, update.states) for slot in _RULES[update.rule].slots]
    scale = 4 / update.group if update.group else 0.0
    return GRIDS[update.grid].bytes_per_parameter + scale + sum(slot.nbytes for slot in slots) / BLOCK


def _bytes_moved(update: _Update) -> float:
    """Codes and slots are read and written; scales and the bfloat16 gradient are read."""
    scale = 4 / update.group if update.group else 0.0
    return 2 * _bytes_kept(update) - scale + 2


def _bytes_resident(update: _Update) -> float:
    return _bytes_kept(update) + 2


def _peer(n: int, device: str) -> Callable[[], object]:
    weight = torch.nn.Parameter(torch.randn(n, device=device) * 0.02)
    weight.grad = torch.randn(n, device=device) * 1e-3
    return torch.optim.AdamW([weight], lr=1e-3, betas=(0.9, 0.95), weight_decay=0.01, fused=True).step


def _copy(n: int, device: str) -> Callable[[], object]:
    source, target = torch.ones(n, device=device), torch.zeros(n, device=device)
    return lambda: target.copy_(source)


def _codes(grid: Grid, n: int, device: str) -> torch.Tensor:
    levels = torch.randint(grid.low, grid.high + 1, (n,), dtype=torch.int8, device=device)
    return ops.pack(levels, grid=grid)


def _update(update: _Update, n: int, device: str) -> Callable[[], object]:
    rule, grid, every = _RULES[update.rule], GRIDS[update.grid], update.group or n
    scale = torch.full((n // every,), 0.02, device=device)
    target = ops.Codes(_codes(grid, n, device), scale, every, grid, tensor=0, first_block=0)
    state = [ops.Stored.zeros(slot, n, update.states, device) for slot in rule.slots]
    grad = (torch.randn(n, device=device) * 1e-3).bfloat16()
    taken = 0

    def step() -> torch.Tensor:
        nonlocal taken
        taken += 1
        now = ops.Now(lr=1e-3, weight_decay=0.01, step=taken, seed=1)
        return ops.step_(target, grad, state, rule=rule, now=now)

    return step


def _decode(grid: Grid, n: int, device: str) -> Callable[[], object]:
    codes, scale = _codes(grid, n, device), torch.tensor([0.02], device=device)
    out = torch.empty(n, dtype=torch.bfloat16, device=device)
    return lambda: ops.decode(codes, scale, grid=grid, first_block=0, scale_every=n, out=out)


PROMPT, CONTEXT, NEW = 512, 32, 8  # tokens: of a prompt; already read, when so many are made one by one
_VOCABULARY = 32_000


def infer(
    preset: str = "320m", threads: int = 1, repetitions: int = 9, grids: tuple[str, ...] = tuple(GRIDS)
) -> dict[str, object]:
    """Times a model of random codes on each grid, with inputs of 8 bits, against transformers' in bfloat16.

    Tokens per second where one is made after another (batch 1), and where a prompt of 512 is read: the
    median, and the range that holds the middle half.  Bytes are those of all tensors that the model keeps,
    and for each weight of its blocks' linear layers of those that these keep.
    """
    on_gpu = torch.cuda.is_available()
    clock = clock_of(threads, on_gpu=on_gpu)
    config = model.hf_config(Model.model_validate({"preset": preset}), _VOCABULARY)
    _check_memory(preset, config, grids, smallest_gpu() if on_gpu else available_memory())
    with on_threads(threads), torch.inference_mode():
        networks = {"peer": _dense(config), **{name: _low_bit(config, GRIDS[name]) for name in grids}}
        candidates = {
            (name, number): run
            for name, network in networks.items()
            for number, run in ((1, _one_by_one(network)), (PROMPT, _prompt(network)))
        }
        times = take_turns(candidates, clock, repetitions)

    def measured(name: str) -> dict[str, object]:
        speed: dict[str, object] = {}
        for number, tokens in ((1, NEW), (PROMPT, PROMPT)):
            of_one, of_peer = times[name, number], times["peer", number]
            per_second = [tokens / t for t in of_one]
            ratios = [peer / own for own, peer in zip(of_one, of_peer, strict=True)]
            speed[f"tokens_{number}"] = {
                "tokens_per_second": statistics.median(per_second),
                "tokens_per_second_middle_half": middle_half(per_second),
                "speed_to_peer": statistics.median(ratios),
                "speed_to_peer_middle_half": middle_half(ratios),
            }
        return {**speed, **_resident(networks[name])}

    return {
        "device": torch.cuda.get_device_name() if on_gpu else "cpu",
        "products": "integers" if multiplies_integers(networks[grids[0]]) else "decoded",
        "threads": threads,
        "clock": clock,
        "preset": preset,
        "parameters": sum(map(Tensor.numel, _linear_weights(networks["peer"]))),
        "repetitions": repetitions,
        "peer": {"name": "transformers, bfloat16", **measured("peer")},
        "infer": [{"grid": name, **measured(name)} for name in grids],
    }


def _check_memory(preset: str, config: Any, grids: tuple[str, ...], free: int) -> None:
    """ConfigError unless all the models, which take turns, have room in so many bytes."""
    built = model.of_hf_config(config, Dense(), torch.bfloat16)  # without values
    n_all = sum(parameter.numel() for parameter in built.parameters())
    n_linear = sum(built.get_parameter(name).numel() for name in model.linear_weights(built))
    bits = sum(GRIDS[name].bits for name in grids)
    needed = 2 * n_all + len(grids) * 2 * (n_all - n_linear) + bits * n_linear // 8
    if needed > free:
        raise ConfigError(
            f"--preset ({preset}) needs {in_bytes(needed)} for a dense model and {len(grids)} low-bit "
            f"ones, and {in_bytes(free)} are free; write a smaller one, or one --grid alone"
        )


def _dense(config: Any) -> nn.Module:
    import transformers

    made = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    return made.to("cuda" if torch.cuda.is_available() else "cpu").eval()


def _low_bit(config: Any, grid: Grid) -> nn.Module:
    """The model as evaluation and sampling have it; on a GPU with codes that are decoded for each product."""
    method = DQT.model_validate({"grid": grid.name})
    built = model.of_hf_config(config, method, torch.bfloat16)
    shapes = {name: tuple(parameter.shape) for name, parameter in built.named_parameters()}
    low_bit = set(model.low_bit_names(built, method))

    def read(name: str) -> PackedTensor | Tensor:
        shape = torch.Size(shapes[name])
        if name not in low_bit:
            return torch.ones(shape) if len(shape) == 1 else torch.randn(shape) * model.INITIAL_STD
        scale = torch.tensor([model.INITIAL_STD / grid.high])
        return PackedTensor(_codes(grid, shape.numel(), "cpu"), scale, shape.numel(), grid, tuple(shape))

    def no_tokenizer() -> Any:
        raise AssertionError("no text is asked for")

    made = trained.Trained(
        path=Path("random"), step=None, hf_config=config, method=method, precision="bf16",
        names=sorted(shapes), read=read, open_tokenizer=no_tokenizer,
        samples=trained.Samples(seq_len=PROMPT),
    )  # fmt: skip
    return made.network(packed=True, integer=True)


def _one_by_one(network: Any) -> Callable[[], object]:
    from transformers import DynamicCache

    device = next(network.parameters()).device
    ids = torch.arange(CONTEXT + NEW, device=device).view(1, -1)
    cache = DynamicCache()
    network(input_ids=ids[:, :CONTEXT], past_key_values=cache, use_cache=True)

    def run() -> None:
        cache.crop(CONTEXT)
        for place in range(CONTEXT, CONTEXT + NEW):
            network(input_ids=ids[:, place : place + 1], past_key_values=cache, use_cache=True)

    return run


def _prompt(network: Any) -> Callable[[], object]:
    ids = torch.arange(PROMPT, device=next(network.parameters()).device).view(1, -1)
    return lambda: network(input_ids=ids, logits_to_keep=1)


def _linear_weights(network: Any) -> list[Tensor]:
    """Of its blocks, without the head."""
    head = network.get_output_embeddings()
    return [m.weight for m in network.modules() if isinstance(m, nn.Linear | Linear) and m is not head]


def _resident(network: Any) -> dict[str, float]:
    weights = _linear_weights(network)
    packed = [p.packed.tensor for p in weights if isinstance(p, PackedParameter)]
    codes = [part for tensor in packed for part in (tensor.codes, tensor.scale)]
    return {
        "resident_bytes": _storage_bytes([*network.parameters(), *network.buffers(), *codes]),
        "resident_bytes_per_weight": _storage_bytes([*weights, *codes]) / sum(map(Tensor.numel, weights)),
    }


def _storage_bytes(tensors: list[Tensor]) -> int:
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())

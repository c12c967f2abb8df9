"""How long the parts of a training step take, each next to its peer: a layer, a gather, a step, a training.

Layers are timed in this process; gathers and steps in a process group of their own, whose workers are
processes of this machine (gloo, or NCCL where there is a GPU for each).  Candidates take turns in all of
them; each result has the median, the middle half and the least of its times, and a floor where there is one.
"""

import json
import logging
import math
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lowbit_dist import compiled, configfile, ops, products
from lowbit_dist.config import ConfigError, RunConfig
from lowbit_dist.convert import convert_
from lowbit_dist.errors import in_bytes
from lowbit_dist.grid import BLOCK, GRIDS, Grid
from lowbit_dist.machine import REPEATING, repeat_on_gpus
from lowbit_dist.memory.machine import available_memory, smallest_gpu
from lowbit_dist.memory.plan import planned
from lowbit_dist.methods.bitnet import BitNet
from lowbit_dist.methods.dqt import DQT
from lowbit_dist.shape import PRESETS
from lowbit_dist.timing import clock_of, compared, take_turns, threads

# What a step is timed of -> its sections of a configuration; the first one is the others' peer.
CANDIDATES: dict[str, dict[str, Any]] = {
    "dense": {"method": {"name": "dense"}},
    "dqt ternary": {"method": {"name": "dqt"}},
    "dqt, int8 matmul": {"method": {"name": "dqt"}, "precision": {"matmul": "int8"}},
    "dqt, int8 grad_input": {
        "method": {"name": "dqt"}, "precision": {"matmul": "int8", "grad_input": "int8"}
    },
    "dqt int8": {"method": {"name": "dqt", "grid": "int8"}},
    "dqt int8, ternary forward": {"method": {"name": "dqt", "grid": "int8", "forward": "ternary"}},
    "flip": {"method": {"name": "flip"}, "optimizer": {"name": "rmsprop"}},
    "bitnet": {"method": {"name": "bitnet"}},
}  # fmt: skip
_VOCABULARY = 2048


def linear(
    tokens: int = 2048, preset: str = "320m", n_threads: int = 1, repetitions: int = 15
) -> dict[str, Any]:
    """Times the widest layer of a preset, forward and backward in bf16, against PyTorch's nn.Linear.

    The floor is the products alone, of which there are three.  torchao's int8 products (a peer's low-bit
    training) are timed if torchao is installed.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    clock, sizes = clock_of(n_threads, on_gpu=device == "cuda"), PRESETS[preset]
    k, n = sizes.hidden_size, sizes.intermediate_size
    x = torch.randn(tokens, k, device=device, dtype=torch.bfloat16)
    dy = torch.randn(tokens, n, device=device, dtype=torch.bfloat16)
    layers: dict[str, Any] = {"nn.Linear": _layer(k, n, device)}
    for name, method in {
        "dqt ternary": DQT(), "dqt int8": DQT(grid="int8"), "bitnet": BitNet(sub_norms=False)
    }.items():  # fmt: skip
        layers[name] = convert_(_layer(k, n, device), method)
    missing = []
    try:
        layers["torchao int8"] = _torchao(_layer(k, n, device))
    except ImportError:
        missing.append("torchao")
    candidates = {name: partial(_forward_and_backward, layer, x, dy) for name, layer in layers.items()}
    candidates["floor: the products"] = partial(_products, x, dy, layers["nn.Linear"][0].weight.detach())
    with threads(n_threads):
        times = take_turns(candidates, clock, repetitions)
    return {
        "what": f"a layer of {k:,} to {n:,}, forward and backward, {tokens:,} tokens",
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "threads": n_threads,
        "clock": clock,
        "repetitions": repetitions,
        "tokens": tokens,
        "peer": "nn.Linear",
        "not_installed": missing,
        "rows": _rows(times, "nn.Linear", tokens),
    }


def _layer(k: int, n: int, device: str) -> nn.Module:
    return nn.Sequential(nn.Linear(k, n, bias=False, device=device, dtype=torch.bfloat16))


def _torchao(layer: nn.Module) -> nn.Module:
    from torchao.prototype.quantized_training import int8_mixed_precision_training
    from torchao.quantization import quantize_

    quantize_(layer, int8_mixed_precision_training())
    return layer


def _forward_and_backward(layer: nn.Module, x: Tensor, dy: Tensor) -> None:
    layer.zero_grad()
    layer(x.detach().requires_grad_()).backward(dy)


def _products(x: Tensor, dy: Tensor, weight: Tensor) -> None:
    x @ weight.t()
    dy @ weight
    dy.t() @ x


def _rows(times: dict[str, list[float]], peer: str, tokens: int) -> list[dict[str, Any]]:
    rows = []
    for name, of_one in times.items():
        row = compared(of_one, times[peer])
        rows.append({"name": name, **row, "tokens_per_second": tokens / row["seconds"]})
    return rows


# A worker's part of a benchmark: arguments as JSON, and its times by the names of candidates.
Work = Callable[..., dict[str, list[float]]]


def _in_workers(work: Work, n: int, n_threads: int, **arguments: Any) -> dict[str, list[float]]:
    """What worker 0 of n has measured."""
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(  # type: ignore[attr-defined, no-untyped-call]
            _worker, (n, n_threads, folder, work, arguments), nprocs=n
        )
        times: dict[str, list[float]] = json.loads(Path(folder, "times").read_text())
        return times


def _worker(rank: int, n: int, n_threads: int, folder: str, work: Work, arguments: dict[str, Any]) -> None:
    on_gpus = torch.cuda.device_count() >= n
    os.environ |= REPEATING if on_gpus else {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}
    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(n), "LOCAL_WORLD_SIZE": str(n)
    }  # fmt: skip
    logging.getLogger("DeepSpeed").disabled = True  # it warns of optimizers that are not its own
    torch.set_num_threads(n_threads)
    if on_gpus:
        torch.cuda.set_device(rank)
        repeat_on_gpus()  # as a run does
    backend = "nccl" if on_gpus else "gloo"
    dist.init_process_group(backend, init_method=f"file://{folder}/store", rank=rank, world_size=n)
    times = work(device="cuda" if on_gpus else "cpu", **arguments)
    if rank == 0:
        Path(folder, "times").write_text(json.dumps(times))
    dist.barrier()
    dist.destroy_process_group()


def gather(preset: str = "320m", n_threads: int = 1, repetitions: int = 15) -> dict[str, Any]:
    """Times the gather of one block's weights on two workers: codes, decoded to bf16, against bf16 weights.

    The floor is a copy of as many bytes as a worker receives of the weights in bf16.
    """
    sizes = PRESETS[preset]
    numel = sizes.linear_parameters // sizes.layers
    times = _in_workers(_gathers, 2, n_threads, numel=numel, repetitions=repetitions)
    rows = _rows(times, "bf16 weights", numel)
    for row in rows:
        del row["tokens_per_second"]
        bits = {name: grid.bits for name, grid in GRIDS.items()}.get(row["name"].split(" ")[0], 16)
        row["bytes_received"] = numel * bits // 16
    return _told(f"a block of {numel:,} weights, gathered", 2, n_threads, repetitions) | {
        "peer": "bf16 weights", "rows": rows,
    }  # fmt: skip


def _gathers(*, device: str, numel: int, repetitions: int) -> dict[str, list[float]]:
    n = dist.get_world_size()
    numel = -(-numel // (BLOCK * n)) * BLOCK * n
    dense = torch.randn(numel // n, device=device).bfloat16()
    out = torch.empty(numel, dtype=torch.bfloat16, device=device)
    received, copied = torch.ones(2, numel - numel // n, dtype=torch.bfloat16, device=device)
    candidates: dict[str, Callable[[], object]] = {
        "bf16 weights": lambda: dist.all_gather_into_tensor(out, dense),
        **{f"{name} codes, decoded": _decoded(grid, numel, device, out) for name, grid in GRIDS.items()},
        "floor: a copy": lambda: copied.copy_(received),
    }
    return _turns_of_all(candidates, device, repetitions)


def _decoded(grid: Grid, numel: int, device: str, out: Tensor) -> Callable[[], object]:
    own = torch.zeros(numel // dist.get_world_size() // BLOCK * grid.bytes_per_block, dtype=torch.uint8)
    own, scale = own.to(device), torch.tensor([0.02], device=device)
    whole = own.new_empty(len(own) * dist.get_world_size())

    def run() -> None:
        dist.all_gather_into_tensor(whole, own)
        ops.decode(whole, scale, grid=grid, first_block=0, scale_every=numel, out=out)

    return run


def _turns_of_all(
    candidates: dict[str, Callable[[], object]], device: str, repetitions: int
) -> dict[str, list[float]]:
    """Seconds of each run, begun by all workers at once, by the clock of `_told`."""
    clock = _clock(dist.get_world_size(), torch.get_num_threads(), on_gpu=device == "cuda")
    now = time.process_time if clock == "process time" else time.perf_counter
    times: dict[str, list[float]] = {name: [] for name in candidates}
    for turn in range(repetitions + 1):
        for name, run in candidates.items():
            dist.barrier()
            _wait(device)
            start = now()
            run()
            _wait(device)
            if turn:  # the first is for caches and buffers
                times[name].append(now() - start)
    return times


def _clock(n: int, n_threads: int, *, on_gpu: bool) -> str:
    """Who waits for others, on the wall."""
    return "process time" if n == n_threads == 1 and not on_gpu else "wall time"


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


class Batch(NamedTuple):
    """What a worker's step is of: passes over micro-batches of samples of so many tokens."""

    seq_len: int = 256
    micro_batch: int = 8
    passes: int = 2


def step(**options: Any) -> dict[str, Any]:
    """Times one worker's optimizer step by each method, against the dense one.  `options` as of `train`."""
    return _steps(1, **options)


def train(**options: Any) -> dict[str, Any]:
    """Times training on two workers by each method, against the dense one: gathers and all.

    `options`: preset, n_threads, repetitions, `compiles`, `only` these of `CANDIDATES` beside the dense one,
    and those of a `Batch`.  ConfigError if blocks are to be compiled and cannot be, or if the models have no
    room together.
    """
    return _steps(2, **options)


def _steps(
    n: int,
    preset: str = "13m",
    n_threads: int = 1,
    repetitions: int = 9,
    *,
    compiles: bool = False,
    only: Sequence[str] = tuple(CANDIDATES),
    **of_batch: int,
) -> dict[str, Any]:
    batch = Batch(**of_batch)
    tokens = n * math.prod(batch)
    contents = {
        name: {
            "model": {"preset": preset},
            "data": {"path": "none", "seq_len": batch.seq_len},
            "train": {
                "micro_batch": batch.micro_batch,
                "batch_tokens": tokens,
                "compile": "on" if compiles else "off",
            },
            "cluster": {"workers": n},
            **sections,
        }
        for name, sections in CANDIDATES.items()
        if name == "dense" or name in only
    }
    configs = [configfile.from_dict(content) for content in contents.values()]
    compiled.check(configs[0], "cuda" if torch.cuda.device_count() >= n else "cpu", "this machine")
    _check_memory(preset, configs, n)
    times = _in_workers(_train, n, n_threads, contents=contents, repetitions=repetitions)
    how = "compiled, " if compiles else ""
    what = f"a step of {preset}, {how}{tokens:,} tokens in samples of {batch.seq_len:,}"
    return _told(what, n, n_threads, repetitions) | {"peer": "dense", "rows": _rows(times, "dense", tokens)}


def _check_memory(preset: str, configs: Sequence[RunConfig], n: int) -> None:
    """ConfigError unless all that the methods keep, whose engines take turns, has room."""
    on_gpus = torch.cuda.device_count() >= n
    free = smallest_gpu() if on_gpus else available_memory() // n
    plans = [planned(config, _VOCABULARY, n, with_step=False) for config in configs]
    needed = sum(plan["resident_bytes_per_worker"] for plan in plans)
    if needed > free:
        raise ConfigError(
            f"--preset ({preset}) needs more than {in_bytes(needed)} on each worker for the models of "
            f"{len(plans)} candidates, and {in_bytes(free)} are free; write a smaller one"
        )


def _train(*, device: str, contents: dict[str, Any], repetitions: int) -> dict[str, list[float]]:
    candidates = {
        name: step_of(configfile.from_dict(content), device, _VOCABULARY)
        for name, content in contents.items()
    }
    return _turns_of_all(candidates, device, repetitions)


def step_of(config: RunConfig, device: str, vocabulary: int) -> Callable[[], object]:
    """A step of random tokens by an engine of its own."""
    from lowbit_dist import model, zero

    built = model.build(config.model, vocabulary, config.method, model.DTYPES[config.precision.compute])
    initial = model.InitialWeights(built, config.method, 0, None)
    engine = zero.Engine(config, built, initial, model.low_bit_names(built, config.method))
    products.settle_(engine.left_open, device)
    if config.train.compile == "on":
        engine.compile(lambda: None)
    generator = torch.Generator().manual_seed(engine.rank)
    size = (config.train.micro_batch, config.data.seq_len)
    tokens = torch.randint(0, vocabulary, size, generator=generator).to(device)
    taken = 0

    def run() -> None:
        nonlocal taken
        taken += 1
        now = ops.Now(lr=1e-3, weight_decay=0.01, step=taken, seed=0)
        with engine.step(now) as passes:
            for _ in range(engine.micro_batches // engine.world):
                passes.backward(tokens)

    return run


def _told(what: str, n: int, n_threads: int, repetitions: int) -> dict[str, Any]:
    on_gpus = torch.cuda.device_count() >= n
    return {
        "what": what,
        "device": torch.cuda.get_device_name() if on_gpus else "cpu",
        "workers": n,
        "threads": n_threads,
        "clock": _clock(n, n_threads, on_gpu=on_gpus),
        "repetitions": repetitions,
    }

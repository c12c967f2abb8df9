"""The verbs of `lowbit bench`."""

from typing import Annotated, Any

import typer

from lowbit_dist.cli import console
from lowbit_dist.cli.arguments import Json
from lowbit_dist.errors import ConfigError

Threads = Annotated[int, typer.Option(metavar="N", min=1, help="Use so many threads of the CPU.")]


def update(
    parameters: Annotated[
        int | None,
        typer.Option(
            metavar="N", help="Update so many, a multiple of 256; as suits the device if not given."
        ),
    ] = None,
    threads: Threads = 1,
    repetitions: Annotated[
        int, typer.Option(metavar="N", min=1, help="Take the median of so many steps.")
    ] = 15,
    as_json: Json = False,
) -> None:
    """Time one optimizer step of packed weights against PyTorch's fused AdamW in float32.

    Example: lowbit bench update --parameters 4194304
    """
    with console.answering(as_json) as answer:
        if parameters is not None and (parameters < 256 or parameters % 256):
            nearest = max(1, round(parameters / 256)) * 256
            raise ConfigError(
                f"--parameters ({parameters}) must be a multiple of 256; the nearest is {nearest}"
            )
        from lowbit_dist import bench
        from lowbit_dist.cli import tables

        measured = bench.update(parameters, threads=threads, repetitions=repetitions)
        answer(measured, lambda terminal: tables.update_times(terminal, measured))


def infer(
    preset: Annotated[
        str, typer.Option(metavar="NAME", help="Measure a model of this model.preset, with random weights.")
    ] = "320m",
    grid: Annotated[
        list[str] | None,
        typer.Option(metavar="GRID", help="Measure this grid; may be given again; all if not given."),
    ] = None,
    threads: Threads = 1,
    repetitions: Annotated[
        int, typer.Option(metavar="N", min=1, help="Take the median of so many turns.")
    ] = 9,
    as_json: Json = False,
) -> None:
    """Time low-bit models with 8-bit inputs against transformers' dense model in bfloat16.

    Example: lowbit bench infer --preset 320m --grid ternary --threads 2
    """
    with console.answering(as_json, "measuring") as answer:
        from lowbit_dist.grid import GRIDS
        from lowbit_dist.shape import PRESETS

        if preset not in PRESETS:
            raise ConfigError(f"--preset ({preset}) must be one of {', '.join(PRESETS)}; write one of them")
        if unknown := [name for name in grid or () if name not in GRIDS]:
            raise ConfigError(f"--grid ({unknown[0]}) must be one of {', '.join(GRIDS)}; write one of them")
        from lowbit_dist import bench
        from lowbit_dist.cli import tables

        measured = bench.infer(preset, threads, repetitions, tuple(grid or GRIDS))
        answer(measured, lambda terminal: tables.inference_times(terminal, measured))


Preset = Annotated[str, typer.Option(metavar="NAME", help="Of this model.preset's sizes.")]
Repetitions = Annotated[int, typer.Option(metavar="N", min=1, help="Take the median of so many turns.")]


def linear(
    preset: Preset = "320m",
    tokens: Annotated[int, typer.Option(metavar="N", min=1, help="Multiply so many tokens.")] = 2048,
    threads: Threads = 1,
    repetitions: Repetitions = 15,
    as_json: Json = False,
) -> None:
    """Time a low-bit linear layer, forward and backward, against PyTorch's in bfloat16.

    Example: lowbit bench linear --preset 1b --threads 2
    """
    _measure("linear", as_json, preset, tokens=tokens, n_threads=threads, repetitions=repetitions)


def gather(
    preset: Preset = "320m", threads: Threads = 1, repetitions: Repetitions = 15, as_json: Json = False
) -> None:
    """Time the gather of a block's codes on two workers, against that of its weights in bfloat16.

    Example: lowbit bench gather --preset 1b
    """
    _measure("gather", as_json, preset, n_threads=threads, repetitions=repetitions)


SeqLen = Annotated[int, typer.Option(metavar="N", min=2, help="Train on samples of so many tokens.")]
MicroBatch = Annotated[int, typer.Option(metavar="N", min=1, help="Pass so many samples at once.")]
Passes = Annotated[int, typer.Option(metavar="N", min=1, help="Pass so often before an update.")]
Compiles = Annotated[bool, typer.Option("--compile", help="Compile the blocks, as train.compile does.")]
Only = Annotated[
    list[str] | None,
    typer.Option(
        metavar="CANDIDATE",
        help="Time this one against dense, by its name in the table; may be given again; all if not given.",
    ),
]


def step(
    preset: Preset = "13m",
    seq_len: SeqLen = 256,
    micro_batch: MicroBatch = 8,
    passes: Passes = 2,
    compiles: Compiles = False,
    only: Only = None,
    threads: Threads = 1,
    repetitions: Repetitions = 9,
    as_json: Json = False,
) -> None:
    """Time one worker's training step by each method, against dense training.

    Example: lowbit bench step --preset 130m --only "dqt int8" --only flip
    """
    _measure(
        "step", as_json, preset, seq_len=seq_len, micro_batch=micro_batch, passes=passes, compiles=compiles,
        only=only, n_threads=threads, repetitions=repetitions,
    )  # fmt: skip


def train(
    preset: Preset = "13m",
    seq_len: SeqLen = 256,
    micro_batch: MicroBatch = 8,
    passes: Passes = 2,
    compiles: Compiles = False,
    only: Only = None,
    threads: Threads = 1,
    repetitions: Repetitions = 9,
    as_json: Json = False,
) -> None:
    """Time training on two workers by each method, against dense training, in turns.

    Example: lowbit bench train --preset 130m --compile
    """
    _measure(
        "train", as_json, preset, seq_len=seq_len, micro_batch=micro_batch, passes=passes, compiles=compiles,
        only=only, n_threads=threads, repetitions=repetitions,
    )  # fmt: skip


def _measure(name: str, as_json: bool, preset: str, *, only: list[str] | None = None, **options: Any) -> None:
    with console.answering(as_json, "measuring") as answer:
        from lowbit_dist.shape import PRESETS

        if preset not in PRESETS:
            raise ConfigError(f"--preset ({preset}) must be one of {', '.join(PRESETS)}; write one of them")
        from lowbit_dist import bench_training
        from lowbit_dist.cli import tables

        if unknown := [name for name in only or () if name not in bench_training.CANDIDATES]:
            known = ", ".join(map(repr, bench_training.CANDIDATES))
            raise ConfigError(f"--only ({unknown[0]}) must be one of {known}; write one of them")
        if only:
            options["only"] = only
        measured = getattr(bench_training, name)(preset=preset, **options)
        answer(measured, lambda terminal: tables.turns(terminal, measured))

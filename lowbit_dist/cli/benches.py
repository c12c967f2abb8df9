"""The verbs of `lowbit bench`."""

from typing import Annotated

import typer

from lowbit_dist.cli import console
from lowbit_dist.cli.arguments import Json
from lowbit_dist.errors import ConfigError


def update(
    parameters: Annotated[
        int | None,
        typer.Option(
            metavar="N", help="Update so many, a multiple of 256; as suits the device if not given."
        ),
    ] = None,
    threads: Annotated[int, typer.Option(metavar="N", min=1, help="Use so many threads of the CPU.")] = 1,
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

"""`lowbit plan --gpus`: what is asked for, and the table of what is predicted."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from lowbit_dist.errors import ConfigError, in_bytes, nearest, nearest_divisor, nearest_multiple

if TYPE_CHECKING:
    from rich.console import Console

    from lowbit_dist.config import RunConfig

MANY = "8,64,256,1024"


def gpus(numbers: str | None, kind: str | None, workers: int | None) -> tuple[list[int], str]:
    """The numbers of GPUs that are asked for, rising, and their kind; none if memory alone is."""
    if numbers is None:
        if kind is not None:
            raise ConfigError(f"--gpu ({kind}) must go with --gpus; write --gpus {MANY}, too")
        return [], ""
    if workers is not None:
        raise ConfigError(
            f"--workers ({workers}) must not stand beside --gpus ({numbers}), which says how many workers "
            "there are; leave it out"
        )
    from lowbit_dist import cost

    kind = cost.DEFAULT_GPU if kind is None else kind
    if kind not in cost.GPUS:
        meant = nearest(kind.upper(), cost.GPUS)
        instead = f"did you mean {meant}?" if meant else f"write {cost.DEFAULT_GPU}, for example"
        raise ConfigError(f"--gpu ({kind}) must be one of {', '.join(cost.GPUS)}; {instead}")
    try:
        asked = sorted({int(number) for number in numbers.split(",")})
    except ValueError:
        raise ConfigError(
            f"--gpus ({numbers}) must be a number or several with commas; write 8, or {MANY}"
        ) from None
    if asked[0] < 1:
        raise ConfigError(f"--gpus ({asked[0]}) must be at least 1; write 8, or {MANY}")
    return asked, kind


def check(config: "RunConfig", numbers: Sequence[int], kind: str) -> None:
    """ConfigError unless each of the numbers of GPUs divides the batch, and the GPUs multiply as asked."""
    from lowbit_dist import cost

    cost.check_multiplies(config, cost.GPUS[kind])
    for n in numbers:
        if config.micro_batches % n:
            train, seq_len, made = config.train, config.data.seq_len, config.micro_batches
            batch = nearest_multiple(train.batch_tokens, train.micro_batch * seq_len * n)
            raise ConfigError(
                f"--gpus ({n:,}) must divide the {made:,} micro-batches of a step, batch_tokens "
                f"{train.batch_tokens:,} / (micro_batch {train.micro_batch} x seq_len {seq_len:,}); "
                f"write --gpus {nearest_divisor(made, n)}, or train.batch_tokens={batch}"
            )


def table(console: "Console", predicted: Mapping[str, Any]) -> None:
    """A line for each number of GPUs, in 80 columns, and what stands behind it."""
    from rich import box
    from rich.table import Table

    from lowbit_dist.cli.tables import NARROW

    gpu, rows = predicted["gpu"], predicted["rows"]
    shown = Table(
        box=box.SIMPLE_HEAD, pad_edge=False, padding=NARROW, title=f"{predicted['note']}: {gpu['name']}",
        title_justify="left",
    )  # fmt: skip
    names = ("GPUs", "s/step", "tokens/s", "per GPU", "dense", "MFU", "wire", "memory", "bound")
    for name in names:
        shown.add_column(name, justify="right", style="bold" if name == "GPUs" else None)
    for row in rows:
        memory = row.get("memory_bytes_per_gpu")
        style = "" if row.get("fits", True) else "[red]"
        shown.add_row(
            f"{row['gpus']:,}",
            _short(row["step_seconds"]),
            _short(row["tokens_per_second"]),
            f"{row['tokens_per_second_per_gpu']:,.0f}",
            f"{row['speed_to_dense']:.2f}",
            f"{row['mfu']:.1%}",
            in_bytes(row["wire_bytes_per_gpu"]),
            f"{style}{in_bytes(memory)}",
            row["bound"],
        )
    console.print(shown)
    console.print(
        "Wire: what each GPU receives in a step, and sends. Memory: the most on each GPU. Dense: the speed "
        "is so many times that of method dense. MFU: 6 N + 12 L A S FLOPs a token, without the embedding and "
        "recomputation, of the peak in bf16.",
        style="dim",
    )
    n = predicted["tokens_per_micro_batch"]
    console.print(
        f"Method {predicted['method']}, {predicted['execution']}; {predicted['parameters']:,} parameters, "
        f"{predicted['flops_per_token'] / 1e9:,.3g} GFLOPs a token; micro-batches of {n:,} tokens, "
        f"{predicted['tokens_per_step']:,} a step."
    )
    if tight := [f"{row['gpus']:,}" for row in rows if not row.get("fits", True)]:
        console.print(
            f"Does not fit into the {in_bytes(gpu['memory'])} of a GPU on {', '.join(tight)}: write a "
            "smaller train.micro_batch, or train.activation_checkpointing=true."
        )
    sources = [constant["source"] for constant in predicted["constants"].values()]
    console.print(
        f"Peaks are of data sheets; {sources.count('measured')} of the model's constants were measured, "
        f"{sources.count('assumed')} are assumed: --json has them all.",
        style="dim",
    )


def _short(number: float) -> str:
    """In at most seven characters."""
    if number >= 1e6:
        return f"{number / 1e6:,.1f} M"
    return f"{number:,.0f}" if number >= 100 else f"{number:.3g}"

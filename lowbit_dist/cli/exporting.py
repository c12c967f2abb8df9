"""The verb that makes files of a trained model for other software."""

from pathlib import Path
from typing import Annotated, Any

import typer

from lowbit_dist.cli import console
from lowbit_dist.cli.arguments import Json, RunOrFolder, at_home, pairs


def export(
    run: RunOrFolder,
    format: Annotated[
        str,
        typer.Option(
            metavar="FORMAT", help="Write hf, hf-bitnet, compressed-tensors or gguf.", show_default=False
        ),
    ],
    out: Annotated[
        Path,
        typer.Option(metavar="DIR", help="Write this folder.", show_default=False, callback=at_home),
    ],
    kind: Annotated[
        str | None,
        typer.Option(
            "--type", metavar="TYPE", help="A type of the format, instead of the model's own.",
            show_default=False,
        ),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace an earlier export in the folder.")] = False,
    as_json: Json = False,
) -> None:  # fmt: skip
    """Write a trained model as files that other software loads, once they have proved to be the model.

    The exit code is 1, and nothing is left, if what is read back differs from the model.

    Example: lowbit export quickstart --format gguf --out exports/quickstart
    """
    with console.answering(as_json, "exporting") as answer:
        from lowbit_dist import trained
        from lowbit_dist.export import export

        written = export(trained.open(run), format, out, kind=kind, force=force)
        proof = written["proof"]
        rows: dict[str, Any] = {
            "export": out,
            "format": f"{written['format']}, {written['type']}",
            "bytes": f"{written['bytes']:,}",
            "weights": f"{proof['weights']:,} equal bit for bit",
            "logits": f"KL {proof['kl']:.2g} nats, the likeliest token at {proof['top1']:.0%}",
            "ids": f"of {proof['texts']} texts the same",
        }
        if proof["within_one_ulp"]:
            rows["weights"] += f", {proof['within_one_ulp']:,} but for the reciprocal of their scale"
        if proof["narrowed"]:
            rows["weights"] += f", {proof['narrowed']:,} in narrower floats"
        answer(written, pairs(rows))

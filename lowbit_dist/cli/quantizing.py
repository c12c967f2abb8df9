"""`lowbit quantize`."""

from pathlib import Path
from typing import Annotated, Any

import typer

from lowbit_dist.cli import console
from lowbit_dist.cli.arguments import Json, RunOrFolder, at_home, pairs
from lowbit_dist.errors import in_bytes


def _option(name: str, meaning: str, metavar: str = "N") -> typer.models.OptionInfo:
    return typer.Option(name, metavar=metavar, help=meaning, show_default=False)  # type: ignore[no-any-return]


def quantize(
    run: RunOrFolder,
    method: Annotated[str, _option("--method", "How weights are rounded.", "rtn|gptq|ptqtp")],
    out: Annotated[
        Path, typer.Option(metavar="DIR", help="Write this folder.", show_default=False, callback=at_home)
    ],
    bits: Annotated[
        int | None, _option("--bits", "For rtn and gptq: 2, 3, 4, 6 or 8 bits a weight; 4 if not given.")
    ] = None,
    granularity: Annotated[
        str | None,
        _option("--granularity", "For rtn and gptq: what has a scale; a group if not given.", "group|row"),
    ] = None,
    group: Annotated[
        int | None, _option("--group", "So many weights of a row are a group; 128 if not given.")
    ] = None,
    planes: Annotated[
        int | None, _option("--planes", "For ptqtp: 1, 2 or 3 ternary planes; 2 if not given.")
    ] = None,
    tied: Annotated[
        bool | None,
        typer.Option(
            "--tied",
            help="For ptqtp: scales of planes are 9 : 3 : 1, so levels evenly spaced.",
            show_default=False,
        ),
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(
            metavar="DIR",
            help="For gptq: calibrate on this prepared data.",
            show_default=False,
            callback=at_home,
        ),
    ] = None,
    samples: Annotated[
        int | None, _option("--samples", "For gptq: so many samples of it; 512, or all, if not given.")
    ] = None,
    seed: Annotated[int | None, _option("--seed", "For gptq: decides which samples; 0 if not given.")] = None,
    damping: Annotated[
        float | None,
        _option("--damping", "For gptq: so much of its mean diagonal is added to the Hessian; 0.01.", "X"),
    ] = None,
    act_order: Annotated[
        bool | None,
        typer.Option(
            "--act-order/--no-act-order",
            help="For gptq: whether columns of large inputs come first; they do if not given.",
            show_default=False,
        ),
    ] = None,
    workers: Annotated[
        int | None,
        _option(
            "--workers", "Spread the layers of a block over so many workers of Ray, here or at RAY_ADDRESS."
        ),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace an earlier result that is there.")] = False,
    as_json: Json = False,
) -> None:
    """Quantise a trained model's linear layers after its training, block by block.

    What a killed one has done is taken up by the same command.

    Example: lowbit quantize dense --method gptq --bits 3 --data data/stdlib --out models/dense-gptq3
    """
    with console.answering(as_json, "quantising") as answer:
        from lowbit_dist import quantize, trained
        from lowbit_dist.errors import ConfigError

        options: dict[str, Any] = {"bits": bits, "granularity": granularity, "group": group, "planes": planes}
        options |= {"tied": tied, "damping": damping, "act_order": act_order}
        by = quantize.quantizer(method, {name: x for name, x in options.items() if x is not None})
        if data is None and (samples, seed) != (None, None):
            raise ConfigError("--samples and --seed are of --data; write it, or leave them out")
        calibration = None
        if data is not None:
            calibration = quantize.Calibration(path=data, samples=samples, seed=seed or 0)
        done = quantize.quantize(
            trained.open(run), by, out, calibration=calibration, workers=workers, force=force,
            bar=answer.waiting.bar,
        )  # fmt: skip
        planes_of = f", the sum of {done['planes']} planes" if done["planes"] > 1 else ""
        on_gpu = f", and {in_bytes(gpu)} of the GPU" if (gpu := done["peak_gpu_bytes"]) else ""
        rows = {
            "quantized": done["quantized"],
            "weights": "{weights:,} of {parameters:,}, in {layers:,} layers".format(**done),
            "grid": f"{done['grid']}{planes_of}",
            "bits a weight": f"{done['bits_per_weight']:.2f}",
            "bits a parameter": f"{done['bits_per_parameter']:.2f}, over the whole model",
            "relative error": f"{done['relative_error']:.4f}",
            "on disk": in_bytes(done["bytes"]),
            "peak memory": in_bytes(done["peak_bytes"]) + on_gpu,
        }
        answer(done, pairs(rows))

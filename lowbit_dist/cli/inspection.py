"""What `lowbit inspect` finds out about a checkpoint."""

from math import prod
from pathlib import Path
from typing import Any

from lowbit_dist.checkpoint import Checkpoint, resolve


def inspect(run_or_checkpoint: str, *, verify: bool) -> dict[str, Any]:
    """Without `verify`, sizes are compared with the manifest; with it, every byte is, by its hash."""
    checkpoint = Checkpoint.open(resolve(run_or_checkpoint, verify=False))
    problems = checkpoint.verify() if verify else _wrong_sizes(checkpoint)
    config = checkpoint.config
    components, digest = {}, None
    if not problems:
        try:
            components, digest = checkpoint.components(), checkpoint.digest()
        except Exception as error:  # a file of the right size with other content; readers raise many kinds
            problems = checkpoint.verify() or [
                f"its tensors cannot be read ({type(error).__name__}: {error})"
            ]
    return {
        "checkpoint": str(checkpoint.path),
        "run": config.run.name,
        "method": config.method.label,
        "step": checkpoint.step,
        "tokens": checkpoint.position.tokens,
        "parameters": sum(prod(checkpoint.shape(name)) for name in checkpoint.names),
        "workers": len(checkpoint.manifest["files"]),
        "components": components,
        "verified": "hashes of all files" if verify else "sizes of all files; --verify reads them",
        "problems": problems,
        "digest": digest,
    }


def _wrong_sizes(checkpoint: Checkpoint) -> list[str]:
    problems = []
    for name, info in checkpoint.manifest["files"].items():
        file = Path(checkpoint.path, name)
        if not file.is_file():
            problems.append(f"{name} is missing")
        elif file.stat().st_size != info["bytes"]:
            problems.append(f"{name} has {file.stat().st_size:,} bytes instead of {info['bytes']:,}")
    return problems

"""What a run was made from, known by its content: where it lies may change, what it is may not.

A run keeps the hashes of its data, its tokenizer and the pretrained model that it began with in its folder,
`inputs.json`.  Each start compares them with what is there now: before any worker starts, and on every
worker, whose machine may see other files.
"""

import json
import re
from pathlib import Path
from typing import Any

import torch.distributed as dist
from pydantic import ValidationError

from lowbit_dist import data, files, model, pretrained, runs
from lowbit_dist.checkpoint import Checkpoint, Kept, newest, resolve
from lowbit_dist.config import RunConfig
from lowbit_dist.errors import ConfigError, plain
from lowbit_dist.optim import Rule
from lowbit_dist.section import Section

# Of a Hugging Face configuration: where it came from, and what the forward pass does not read.
UNREAD = re.compile(
    "_.*|.*_token_id|.*version|architectures|.*dtype|initializer_range|max_position_embeddings"
)
# What is known by its content -> the field that says where it lies, and the words for another one.
FIELDS = {
    "tokenizer": ("data.path", "was prepared with another tokenizer"),
    "data": ("data.path", "is other data"),
    "pretrained": ("model.pretrained", "is another model"),
}


class Inputs(Section):
    """SHA-256 of each; None where a run of an earlier version does not say, or where there is none."""

    data: str | None
    tokenizer: str | None
    pretrained: str | None = None


def of(config: RunConfig, manifest: data.Manifest) -> Inputs:
    """What is there now; `manifest`: of the data."""
    base = config.model.pretrained
    return Inputs(
        data=manifest.digest,
        tokenizer=manifest.tokenizer_sha256,
        pretrained=None if base is None else pretrained.fingerprint(base),
    )


def check(config: RunConfig, manifest: data.Manifest) -> None:
    """ConfigError if the run has a checkpoint, and was made from something else."""
    if (kept := _kept(config.run_dir)) is None:
        return
    now = of(config, manifest)
    for name, (field, otherwise) in FIELDS.items():
        before, here = getattr(kept, name), getattr(now, name)
        if before not in (None, here):
            raise ConfigError(
                f"{field} ({config.flat()[field]}) {otherwise} than run {config.run.name} was trained with "
                f"(SHA-256 {str(here)[:12]}, the run's {before[:12]}); write the path of the run's own, or "
                "another run.name"
            )


def parent(config: RunConfig) -> Path | None:
    """The checkpoint that a run starts from, if it starts from another run's."""
    if config.run.parent is None:
        return None
    try:
        return resolve(config.run.parent, config.run.dir)
    except ConfigError as error:
        raise ConfigError(f"run.from ({config.run.parent}): {error}") from None


def check_parent(config: RunConfig, manifest: data.Manifest) -> None:
    """ConfigError unless a run that begins can take what `run.from` asks for.

    For the launcher alone: all of that checkpoint is read, to see that it is not damaged.
    """
    if newest(config.run_dir) is not None or (path := parent(config)) is None:
        return
    opened, named = Checkpoint.open(path), f"run.from ({config.run.parent})"
    if opened.manifest["tokenizer_sha256"] != manifest.tokenizer_sha256:
        raise ConfigError(
            f"{named} was trained with another tokenizer than {config.data.path} was prepared with; prepare "
            f"the data with the one in {path.parent.parent / 'tokenizer'}"
        )
    built = model.shapes(config, manifest.vocab_size)
    low_bit, stored = set(model.low_bit_names(built, config.method)), config.method.stored
    parts = {}
    for name, p in built.named_parameters():
        shape = tuple(p.shape)
        parts[name] = Kept(list(shape))
        if stored is not None and name in low_bit:
            parts[name] = Kept(list(shape), stored.name, model.scale_every(config.method, shape))
    instead = "write another run.from, or its model and method"
    opened.check_holds(parts, instead)
    if differences := _not_in_shapes(opened, config, manifest.vocab_size):
        raise ConfigError(f"{named} is another model ({', '.join(differences[:5])}); {instead}")
    if config.run.with_states and _states(opened.config.optimizer) != _states(config.optimizer):
        rates = {f"optimizer.{name}" for name in Rule.model_fields.keys() - {"name", "states"}}
        others = opened.config.differences(config, but=RunConfig.model_fields.keys() - {"optimizer"} | rates)
        raise ConfigError(
            f"run.with_states (true): {named} has other states of its weights ({', '.join(others[:5])}); "
            "write the same optimizer, or run.with_states=false"
        )


def _states(rule: Rule) -> tuple[Any, ...]:
    """Whose they are, which, and how they are kept: of linear layers and of all else."""
    parts = (rule.of(is_linear=is_linear) for is_linear in (True, False))
    return rule.name, *((part.slots, part.states) for part in parts)


def _not_in_shapes(parent: Checkpoint, config: RunConfig, vocab_size: int) -> list[str]:
    """What makes other numbers of the same tensors: heads, wavelengths, rounded activations and the like."""
    there = parent.manifest.get("hf_config")
    if there is None:
        there = pretrained.as_mapping(model.hf_config(parent.config.model, vocab_size))
    here = pretrained.as_mapping(model.hf_config(config.model, vocab_size))
    return [
        f"{name}: {plain(there[name])} -> {plain(here[name])}"
        for name in sorted(there.keys() & here.keys())
        if there[name] != here[name] and not UNREAD.fullmatch(name)
    ] + parent.config.differences(config, but=RunConfig.model_fields.keys() - {"method"})


def agreed(config: RunConfig) -> data.Manifest:
    """The data at `data.path`; ConfigError on every worker unless all see what the run is made from."""
    manifest = data.check(config)
    check(config, manifest)
    seen: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(seen, of(config, manifest).model_dump())
    for rank, theirs in enumerate(seen):
        if other := [name for name in FIELDS if theirs[name] != seen[0][name]]:
            field, otherwise = FIELDS[other[0]]
            raise ConfigError(
                f"{field} ({config.flat()[field]}) {otherwise} for worker {rank} than for worker 0; copy the "
                "same to each machine, or write a path that all share"
            )
    return manifest


def keep(config: RunConfig, manifest: data.Manifest) -> None:
    """Note in the run's folder what it is made from."""
    files.keep(config.run_dir / runs.INPUTS, of(config, manifest).model_dump_json() + "\n")


def _kept(run_dir: Path) -> Inputs | None:
    """What the run's checkpoints were trained on; None if it has none."""
    if (path := newest(run_dir)) is None:
        return None
    try:
        return Inputs(**json.loads((run_dir / runs.INPUTS).read_text()))
    except (OSError, ValueError, TypeError, ValidationError):  # of an earlier version, or damaged
        pass
    try:
        return Inputs(data=None, tokenizer=Checkpoint.open(path).manifest["tokenizer_sha256"])
    except ConfigError:  # the workers name it, and go back to the one before
        return None

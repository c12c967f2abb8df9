"""A Hugging Face model's folder: its configuration, and its weights, tensor by tensor.

Only JSON and safetensors are read: loading other formats can run code.  A folder whose files hold less than
its model, or more, or other numbers than its weights, is refused: what is left out or read as it is not
meant would give a model that trains, and is wrong.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from lowbit_dist.errors import ConfigError, first_line

if TYPE_CHECKING:
    from torch import Tensor, nn

CONFIG = "config.json"
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
FLOATS = ("F64", "F32", "F16", "BF16")  # of safetensors' names of types: those whose values are the weights
POSITIONS = ("max_position_embeddings", "n_positions", "max_sequence_length", "max_seq_len", "n_ctx")
CHANCE = re.compile("drop|jitter")  # in the names of what makes a forward pass differ from the one before


def configuration(folder: Path, field: str | None = None) -> Any:  # PretrainedConfig
    """The configuration of a folder; ConfigError unless transformers knows it, without code of its own, and
    its weights are plain numbers.

    `field` is what named the folder in a configuration, for the messages.
    """
    import transformers

    named = _named(folder, field)
    try:
        loaded = transformers.AutoConfig.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False
        )
    except Exception as error:  # of whatever JSON may hold; the library passes on what its classes raise
        raise ConfigError(
            f"{named} is not a Hugging Face model folder: transformers cannot read its {CONFIG} "
            f"({first_line(error)}); write the path of one"
        ) from None
    if (how := getattr(loaded, "quantization_config", None)) is not None:
        kind = how.get("quant_method") if isinstance(how, dict) else None
        raise ConfigError(
            f"{named} holds a model that is quantised already (quantization_config in {CONFIG}"
            f"{'' if kind is None else f': {kind}'}); write the folder of the model that it was made from"
        )
    loaded.use_cache = False
    return loaded


def of_mapping(content: dict[str, Any]) -> Any:  # PretrainedConfig
    """A configuration as `as_mapping` gives it; ConfigError if transformers knows no such model."""
    from transformers import CONFIG_MAPPING

    try:
        return CONFIG_MAPPING[content["model_type"]].from_dict(content)
    except Exception as error:  # whatever a damaged file may hold
        raise ConfigError(
            f"the model's configuration in a checkpoint cannot be read ({first_line(error)}); name another "
            "checkpoint"
        ) from None


def as_mapping(config: Any) -> dict[str, Any]:
    """A Hugging Face configuration as JSON."""
    mapping: dict[str, Any] = json.loads(config.to_json_string(use_diff=False))
    return mapping


def fingerprint(folder: Path) -> str:
    """SHA-256 by which a model is known wherever its folder lies: of its configuration, and of each tensor's
    name, type, shape and first bytes.

    Not of all bytes, which take a minute where a model is large: two models differ in every matrix.
    """
    # Without where it lay, and by which version of the library it was written.
    kept = {
        name: value
        for name, value in as_mapping(configuration(folder)).items()
        if not name.startswith("_") and name != "transformers_version"
    }
    sha = hashlib.sha256(json.dumps(kept, sort_keys=True).encode())
    places = Pretrained(folder).places
    ranges = {file: _ranges(file) for file in {place.file for place in places.values()}}
    for name, place in sorted(places.items()):
        sha.update(f"{name} {place.dtype} {place.shape} ".encode())
        sha.update(_first_bytes(place.file, *ranges[place.file][place.name]))
    return sha.hexdigest()


def _ranges(file: Path) -> dict[str, tuple[int, int]]:
    """The first byte of each tensor in a safetensors file, and the one behind it."""
    with file.open("rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        header = json.loads(opened.read(length))
    offsets = {name: of["data_offsets"] for name, of in header.items() if name != "__metadata__"}
    return {name: (8 + length + begin, 8 + length + end) for name, (begin, end) in offsets.items()}


def _first_bytes(file: Path, begin: int, end: int, n: int = 4096) -> bytes:
    with file.open("rb") as opened:
        opened.seek(begin)
        return opened.read(min(n, end - begin))


def max_positions(config: Any) -> int | None:
    """The most tokens of a text that a Hugging Face model takes; None: any number."""
    text = config.get_text_config()
    limits = (getattr(text, name, None) for name in POSITIONS)
    return next((n for n in limits if isinstance(n, int) and n > 0), None)


def vocabulary(config: Any) -> int | None:
    """The rows of a Hugging Face model's embeddings."""
    rows: int | None = getattr(config.get_text_config(), "vocab_size", None)
    return rows


def without_chance(config: Any) -> list[str]:
    """Set to zero what leaves parts of a forward pass to chance, such as dropout, and have the model give the
    loss of its tokens alone; what was changed, as name=value.
    """
    from transformers import PretrainedConfig

    changed = []
    for name, value in sorted(vars(config).items()):
        if isinstance(value, PretrainedConfig):
            changed += without_chance(value)
        elif CHANCE.search(name) and isinstance(value, int | float) and not isinstance(value, bool) and value:
            setattr(config, name, 0.0)
            changed.append(f"{name}={value}")
    if getattr(config, "output_router_logits", False):
        config.output_router_logits = False  # with it, the loss has a term of the routers
        changed.append("output_router_logits=True")
    return changed


def why_not_causal(model: Any) -> str | None:
    """Why the logits of a Hugging Face model are no predictions of the next token; None if they are."""
    from transformers import MODEL_FOR_MASKED_LM_MAPPING

    from lowbit_dist import attention

    config = model.config
    is_masked = type(config) in MODEL_FOR_MASKED_LM_MAPPING and not config.is_decoder
    embeds = getattr(config.get_text_config(), "use_bidirectional_attention", False)  # Gemma 3, retrained
    is_open = is_masked or embeds or attention.sees_what_follows(config)
    return "reads a text in both directions" if is_open else None


class Place(NamedTuple):
    """Where a tensor is, and what its file's header says of it."""

    file: Path
    name: str  # in the file
    shape: tuple[int, ...]
    dtype: str  # in safetensors' words


class Pretrained:
    """The safetensors files of a folder; every mistake in them is a ConfigError of one line.

    `field` is what named the folder in a configuration, for these messages.
    """

    def __init__(self, folder: Path, field: str | None = None):
        self.folder = folder
        self._named = _named(folder, field)
        self.places: dict[str, Place] = {}  # by the name of the model's parameter
        for file, names in self._files().items():
            with self._opened(file) as opened:
                held = list(opened.keys())
                missing = sorted(names.difference(held))
                if missing:
                    raise ConfigError(
                        f"{self._named}: {file.name} has no {missing[0]}, which {INDEX} says it has; copy "
                        "the model again"
                    )
                for name in held:
                    part = opened.get_slice(name)
                    place = Place(file, name, tuple(part.get_shape()), part.get_dtype())
                    self.places.setdefault(name, place)

    def __contains__(self, name: str) -> bool:
        return name in self.places

    def named_as(self, model: nn.Module) -> Pretrained:
        """The same under the names of a causal model whose files may be those of its part without a head,
        as transformers reads them.
        """
        prefix: str = getattr(model, "base_model_prefix", "")
        parts = {name for name, _ in model.named_children()}
        if prefix in parts and not any(name.startswith(prefix) for name in self.places):
            self.places = {f"{prefix}.{name}": place for name, place in self.places.items()}
        return self

    def check(
        self, model: nn.Module, *, is_added: Callable[[str, tuple[int, ...]], bool] = lambda *_: False
    ) -> None:
        """ConfigError unless the files hold every parameter of the model in its shape, and nothing that has
        no place in it.

        `is_added`: whether a parameter, by name and shape, is one that no file holds.
        """
        tied = {name for name, _ in model.named_parameters(remove_duplicate=False)}
        known = tied | {name for name, _ in model.named_buffers()}
        # Older versions of transformers saved what rotary embeddings are computed from.
        ignored = [r"\.inv_freq$", *(getattr(model, "_keys_to_ignore_on_load_unexpected", None) or [])]
        unknown = [
            name
            for name in sorted(self.places)
            if name not in known and not any(re.search(pattern, name) for pattern in ignored)
        ]
        for name in sorted({*unknown, *tied} & set(self.places)):
            self._check_plain(name)
        for name, parameter in model.named_parameters():
            if name in self:
                self.check_shape(name, tuple(parameter.shape))
            elif not is_added(name, tuple(parameter.shape)):
                raise self.missing(name)
        for name in state_buffers(model):
            if name not in self:
                raise self.missing(name)
            self._check_size(name, tuple(model.get_buffer(name).shape))
        if unknown:
            more = f", and {len(unknown) - 1:,} more," if unknown[1:] else ""
            raise ConfigError(
                f"{self._named}: {unknown[0]} in {self.places[unknown[0]].file.name}{more} is no parameter "
                f"of the model that {CONFIG} describes; write the folder of a model whose files fit together"
            )

    def check_shape(self, name: str, expected: tuple[int, ...]) -> None:
        """ConfigError unless a tensor in the files has this shape and holds ordinary numbers."""
        self._check_plain(name)
        self._check_size(name, expected)

    def _check_size(self, name: str, expected: tuple[int, ...]) -> None:
        place = self.places[name]
        if place.shape != expected:
            raise ConfigError(
                f"{self._named}: {name} in {place.file.name} has shape {place.shape}, the model {expected}; "
                f"write the folder of a model whose {CONFIG} and weights fit together"
            )

    def missing(self, name: str) -> ConfigError:
        return ConfigError(
            f"{self._named}: {name} is in none of the folder's safetensors files; write the folder of a "
            "whole model"
        )

    def tensor(self, name: str) -> Tensor:  # float32
        return self._read(name).float()

    def buffers(self, model: nn.Module) -> dict[str, Tensor]:
        """What the files hold of the model's buffers that are part of its state, by name."""
        return {name: self._read(name) for name in state_buffers(model)}

    def _check_plain(self, name: str) -> None:
        place = self.places[name]
        if place.dtype not in FLOATS:
            raise ConfigError(
                f"{self._named}: {name} in {place.file.name} is of type {place.dtype}, not one of "
                f"{', '.join(FLOATS)}; write the folder of a model that is not quantised"
            )

    def _read(self, name: str) -> Tensor:
        place = self.places[name]
        with self._opened(place.file) as file:
            tensor: Tensor = file.get_tensor(place.name)
            return tensor

    @contextmanager
    def _opened(self, file: Path) -> Iterator[Any]:
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(file, "pt") as opened:
                yield opened
        except (OSError, SafetensorError) as error:
            raise ConfigError(f"{self._named}: {file} cannot be read ({error}); copy it again") from None

    def _files(self) -> dict[Path, set[str]]:
        """Each file, and the names that the index says it has."""
        index, single = self.folder / INDEX, self.folder / SINGLE
        if index.exists():
            try:
                weight_map = json.loads(index.read_text())["weight_map"]
                files: dict[Path, set[str]] = {}
                for name, file in weight_map.items():
                    files.setdefault(self.folder / Path(file).name, set()).add(name)
                return files
            except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
                raise ConfigError(
                    f"{self._named}: {INDEX} cannot be read ({first_line(error)}); copy the model again"
                ) from None
        if not single.exists():
            raise ConfigError(
                f"{self._named} has no {SINGLE}; other formats are not read, since loading them can run "
                "code; convert it, or write another folder"
            )
        return {single: set()}


def state_buffers(model: nn.Module) -> list[str]:
    """The buffers of a model that its files hold: numbers that are not computed from its configuration."""
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    return sorted(set(model.state_dict()) - parameters)


def _named(folder: Path, field: str | None) -> str:
    return str(folder) if field is None else f"{field} ({folder})"

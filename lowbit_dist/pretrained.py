"""The weights of a Hugging Face model's folder, tensor by tensor.

Only safetensors are read: loading other formats can run code.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lowbit_dist.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
FLOATS = ("F64", "F32", "F16", "BF16")  # of safetensors' names of types: those whose values are the weights


class Pretrained:
    """The safetensors files of a folder; every mistake in them is a ConfigError of one line.

    `field` is what named the folder in a configuration, for these messages.
    """

    def __init__(self, folder: Path, field: str | None = None):
        self.folder = folder
        self._where = "" if field is None else f"{field}: "
        self.files = self._files(str(folder) if field is None else f"{field} ({folder})")

    def __contains__(self, name: str) -> bool:
        return name in self.files

    def shape(self, name: str) -> tuple[int, ...]:
        """Of a tensor in the files, from their headers; ConfigError if it does not hold ordinary numbers."""
        with self._holding(name) as file:
            part = file.get_slice(name)
            shape, dtype = tuple(part.get_shape()), part.get_dtype()
        if dtype not in FLOATS:
            raise ConfigError(
                f"{self._where}{name} in {self.files[name]} is of type {dtype}, not one of "
                f"{', '.join(FLOATS)}; write the folder of a model that is not quantised"
            )
        return shape

    def check_shape(self, name: str, expected: tuple[int, ...]) -> None:
        """ConfigError unless a tensor in the files has this shape."""
        if (shape := self.shape(name)) != expected:
            raise ConfigError(
                f"{self._where}{name} in {self.files[name]} has shape {shape}, the model {expected}; write "
                "the folder of a model whose config.json and weights fit together"
            )

    def tensor(self, name: str) -> Tensor:  # float32
        with self._holding(name) as file:
            return file.get_tensor(name).float()

    def _holding(self, name: str) -> AbstractContextManager[Any]:
        file = self.files[name]
        return _opened(file, f"{self._where}{file} cannot be read for {name}", "copy the model again")

    def _files(self, named: str) -> dict[str, Path]:  # of each tensor's name
        index, single = self.folder / INDEX, self.folder / SINGLE
        if index.exists():
            try:
                weight_map = json.loads(index.read_text())["weight_map"]
                return {name: self.folder / Path(file).name for name, file in weight_map.items()}
            except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
                raise ConfigError(
                    f"{self._where}{index} cannot be read ({type(error).__name__}: {error}); "
                    "copy the model again"
                ) from None
        if not single.exists():
            raise ConfigError(
                f"{named} has no {SINGLE}; other formats are not read, since loading them can run code; "
                "convert it, or write another folder"
            )
        with _opened(single, f"{self._where}{single} cannot be read", "copy it again") as file:
            return dict.fromkeys(file.keys(), single)


@contextmanager
def _opened(path: Path, mistake: str, remedy: str) -> Iterator[Any]:
    """A safetensors file, whose damage is reported as `mistake`, with the reason and `remedy`."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            yield file
    except (OSError, SafetensorError) as error:
        raise ConfigError(f"{mistake} ({error}); {remedy}") from None

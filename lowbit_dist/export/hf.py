"""A plain Hugging Face folder: every weight as a number, which any tool reads and training may start from."""

from pathlib import Path

from torch import Tensor

from lowbit_dist.export import huggingface
from lowbit_dist.export.finished import Finished

SUFFIX = ""
KINDS: tuple[str, ...] = ()
HALF_SCALES = False
READER: tuple[str, ...] = ()
USE = """```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{path}")
tokenizer = AutoTokenizer.from_pretrained("{path}")
```
"""


def check(model: Finished, kind: str | None) -> str:
    huggingface.check(model, "hf")
    return "dense"


def size(model: Finished, kind: str) -> int:
    return huggingface.size(model, "hf", lambda layout: 4 * layout.numel)


def write(model: Finished, path: Path, kind: str) -> None:
    def stored(name: str) -> dict[str, Tensor]:
        return {"weight": huggingface.narrowest(model.numbers(name))}

    huggingface.write(model, path, "hf", stored)


def read_back(path: Path) -> huggingface.Folder:
    return huggingface.Folder(path)

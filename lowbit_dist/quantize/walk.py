"""A model walked through block by block, with the hidden states of calibration samples.

    embeddings -> hidden states of all samples -> block 0 -> block 1 -> ...

Of the model only one block has values at a time.  It is asked twice: for what its linear layers are given
(`grams`), with its weights as they were, and for the next hidden states (`advance`), with those that it has
got.  So each block is calibrated on what the quantised ones before it give.

What else a block is given, such as positions and masks, is a function of the samples' shape alone, and is
recorded once: in a pass in which every block gives back the hidden states that it is given.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lowbit_dist import attention
from lowbit_dist.model import DTYPES
from lowbit_dist.packed import PackedTensor
from lowbit_dist.quantize.quantizer import Gram
from lowbit_dist.trained import Trained

HIDDEN = "hidden_states"  # transformers' name of what goes from block to block, where it has one


def blocks(model: nn.Module, linears: Iterable[str]) -> list[str]:
    """The names of the modules that hidden states go through one after the other, as "model.layers.0": those
    of the list that most of the linear weights are in; none if they are in no list.
    """
    linears = list(linears)
    counts = {
        name: sum(linear.startswith(f"{name}.") for linear in linears)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList)
    }
    name = max(counts, key=lambda name: (counts[name], -len(name)), default="")
    return [f"{name}.{i}" for i in range(len(model.get_submodule(name)))] if counts.get(name) else []  # type: ignore[arg-type]


def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


class Walk:
    """The walk of a model, built without values, over tokens: micro-batches of one shape."""

    def __init__(self, source: Trained, model: Any, blocks: list[str], batches: Iterable[Tensor]):
        self.source, self.model = source, model.eval()
        self.dtype = DTYPES[source.precision]
        self.device = device()
        for buffer in model.buffers():
            buffer.data = buffer.data.to(self.device)
        # Of each block: what it is given beside hidden states, positional and by name.
        self._beside: dict[str, tuple[tuple[Any, ...], dict[str, Any]]] = {}
        self._hidden = self._first_hidden(blocks, batches)  # [micro_batch, seq_len, hidden_size] each

    @torch.inference_mode()
    def grams(
        self, block: str, linears: Iterable[str], weights: Mapping[str, Tensor] | None = None
    ) -> dict[str, Gram]:
        """Of the inputs of the linear layers in a block whose weights are `linears`, by these names; none of
        one that is given nothing.  `weights`: those of the block that have been read already.
        """
        self._load(self._names(block), weights or {})
        grams: dict[str, Gram] = {}
        # What is multiplied in this pass, and the first layer that it was given to: layers that are given the
        # same, as those of queries, keys and values, share a Gram.
        seen: dict[int, tuple[str, Tensor]] = {}

        def note(name: str, layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            (x,) = inputs
            first, _ = seen.setdefault(id(x), (name, x))
            if first != name:
                grams[name] = grams[first]
                return
            if name not in grams:
                grams[name] = Gram(torch.zeros(x.shape[-1], x.shape[-1], device=x.device))
            grams[name].add(x)

        layers = {name: self.model.get_submodule(name.rpartition(".")[0]) for name in linears}
        hooks = [layer.register_forward_pre_hook(partial(note, name)) for name, layer in layers.items()]
        for hidden in self._hidden:
            self._run(block, hidden)
            seen.clear()
        for hook in hooks:
            hook.remove()
        return grams

    @torch.inference_mode()
    def advance(self, block: str, weights: Mapping[str, PackedTensor | Tensor]) -> None:
        """Go through a block with these weights; it has no values after that."""
        self._load(self._names(block), weights)
        self._hidden = [self._run(block, hidden) for hidden in self._hidden]
        self._free(self._names(block))

    def _run(self, block: str, hidden: Tensor) -> Tensor:
        arguments, keywords = self._beside[block]
        hidden = hidden.to(self.device)
        if HIDDEN in keywords:
            out = self.model.get_submodule(block)(*arguments, **keywords | {HIDDEN: hidden})
        else:
            out = self.model.get_submodule(block)(hidden, *arguments, **keywords)
        return (out if isinstance(out, Tensor) else out[0]).cpu()

    @torch.inference_mode()
    def _first_hidden(self, blocks: list[str], batches: Iterable[Tensor]) -> list[Tensor]:
        """What the first block is given, of each micro-batch; fills `_beside`."""
        base, first, inside = self.model.base_model, blocks[0], tuple(f"{block}." for block in blocks)
        prefix = "" if base is self.model else f"{self.model.base_model_prefix}."  # without the head
        outer = [n for n in self.source.names if n.startswith(prefix) and not n.startswith(inside)]
        self._load([*outer, *self._names(first)], {})
        hidden: list[Tensor] = []
        forms: list[Any] = []  # how blocks answer: with hidden states, or with more beside them

        def stand_in(name: str, forward: Any, *arguments: Any, **keywords: Any) -> Any:
            given = keywords[HIDDEN] if HIDDEN in keywords else arguments[0]
            if name == first:
                hidden.append(given.cpu())
                forms[:] = forms or [forward(*arguments, **keywords)]
            self._beside[name] = (arguments if HIDDEN in keywords else arguments[1:]), keywords
            return given if isinstance(forms[0], Tensor) else (given, *forms[0][1:])

        modules = {name: self.model.get_submodule(name) for name in blocks}
        for name, module in modules.items():
            module.forward = partial(stand_in, name, module.forward)
        with attention.causal(self.model):
            for tokens in batches:
                base(input_ids=tokens.to(self.device), use_cache=False)
        for module in modules.values():
            del module.forward
        self._free([*outer, *self._names(first)])
        return hidden

    def _names(self, block: str) -> list[str]:
        return [name for name in self.source.names if name.startswith(f"{block}.")]

    def _load(self, names: Iterable[str], weights: Mapping[str, PackedTensor | Tensor]) -> None:
        """Give these parameters values: those of `weights`, or the source's."""
        values = {}
        for name in names:
            value = weights[name] if name in weights else self.source.tensor(name)
            dense = value.dequantize(self.dtype) if isinstance(value, PackedTensor) else value.to(self.dtype)
            values[name] = dense.to(self.device)
        self.model.load_state_dict(values, strict=False, assign=True)

    def _free(self, names: Iterable[str]) -> None:
        values = {name: torch.empty_like(self.model.get_parameter(name), device="meta") for name in names}
        self.model.load_state_dict(values, strict=False, assign=True)

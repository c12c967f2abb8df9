"""The work: a model's linear layers, quantised block by block into the files of a checkpoint."""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from itertools import starmap
from math import prod
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor

from lowbit_dist import configfile, machine, model, pretrained
from lowbit_dist.checkpoint import MANIFEST, SUMS, Checkpoint
from lowbit_dist.checkpoint.layout import FORMAT, sha256
from lowbit_dist.cluster import tasks
from lowbit_dist.config import RunConfig
from lowbit_dist.data.tokenizing import check_ray
from lowbit_dist.errors import ConfigError, format_error, nearest, show
from lowbit_dist.files import atomic_folder
from lowbit_dist.grid import PLANE
from lowbit_dist.packed import PackedTensor, check_shape
from lowbit_dist.quantize import folder
from lowbit_dist.quantize.calibration import Calibration, micro_batches
from lowbit_dist.quantize.gptq import GPTQ
from lowbit_dist.quantize.ptqtp import PTQTP
from lowbit_dist.quantize.quantizer import Gram, Quantizer
from lowbit_dist.quantize.rtn import RTN
from lowbit_dist.quantize.walk import Walk, blocks, device
from lowbit_dist.trained import Trained

log = logging.getLogger(__name__)

QUANTIZERS: dict[str, type[Quantizer]] = {"rtn": RTN, "gptq": GPTQ, "ptqtp": PTQTP}
DENSE_BITS = {"bf16": 16, "fp32": 32}  # of what is not quantised, in the model's own precision

Bar = Callable[[int], AbstractContextManager[Callable[[int], None]]]
Layers = Callable[[Iterable[tuple[Any, ...]]], Iterator[PackedTensor]]  # of the arguments of `_quantised`


def quantizer(name: str, options: Mapping[str, Any]) -> Quantizer:
    """The method of this name with these options, which are those of the command line."""
    if name not in QUANTIZERS:
        meant = nearest(name, QUANTIZERS)
        hint = f"did you mean {meant!r}?" if meant else "write gptq, for example"
        raise ConfigError(f"--method ({name}) must be one of {', '.join(QUANTIZERS)}; {hint}")
    kind = QUANTIZERS[name]
    for option, value in options.items():
        if option not in kind.model_fields:
            owners = [other for other, fields in QUANTIZERS.items() if option in fields.model_fields]
            raise ConfigError(
                f"{_flag(option)} ({show(value)}) is an option of {' and '.join(owners)}, not of {name}; "
                "leave it out"
            )
    try:
        return kind(**options)
    except ValidationError as error:
        first: dict[str, Any] = dict(error.errors(include_url=False, include_context=True)[0])
        option = str(first["loc"][0])
        raise ConfigError(format_error(kind, first, ()).replace(option, _flag(option), 1)) from None


def quantize(
    source: Trained,
    by: Quantizer,
    out: str | Path,
    *,
    calibration: Calibration | None = None,
    workers: int | None = None,
    force: bool = False,
    bar: Bar = lambda n_bytes: nullcontext(lambda n_bytes: None),
) -> dict[str, Any]:
    """Write `source` with quantised linear layers to the folder `out`; what it has become, in numbers.

    `workers`: the layers of a block are spread over so many of Ray's.  `force`: what an earlier call wrote
    there is replaced.  `bar` is told how many bytes of float32 weights there are, and how many more are done.
    ConfigError before any work on whatever cannot be.
    """
    work = _Work.of(source, by, Path(out))
    if workers is not None:
        if workers < 1:
            raise ConfigError(f"--workers ({workers}) must be at least 1; write 1, or leave it out")
        check_ray()
    folder.check_out(source, work.out, force)
    tokens = work.tokens(calibration)
    manifest = work.manifest(calibration)
    folder.check_disk(work.out, manifest)
    size = folder.size_of(manifest)
    with atomic_folder(work.out, needs=lambda: size, resumes=True, replaces=force) as draft:
        folder.take_up(draft, work.identity(manifest, tokens))
        try:
            with work.layers(workers) as layers:
                error = work.write(draft, manifest, tokens, layers, bar)
        except ConfigError:  # which the next one would meet again
            shutil.rmtree(draft)
            raise
        folder.finish(draft, manifest, source)
    low_bit = {name: t for name, t in manifest["tensors"].items() if t["grid"] is not None}
    n_weights, n_all = (sum(prod(t["shape"]) for t in ts.values()) for ts in (low_bit, manifest["tensors"]))
    n_bits = 8 * folder.size_of({"tensors": low_bit})
    return {
        "quantized": str(work.out),
        "source": str(source.path),
        "method": by.name,
        "grid": next(iter(low_bit.values()))["grid"],
        "planes": by.summed_planes,
        "layers": len(low_bit),
        "weights": n_weights,
        "parameters": n_all,
        "bits_per_weight": n_bits / n_weights,
        "bits_per_parameter": (n_bits + DENSE_BITS[source.precision] * (n_all - n_weights)) / n_all,
        "relative_error": error,
        "bytes": sum(file.stat().st_size for file in work.out.rglob("*") if file.is_file()),
        "peak_bytes": machine.peak_memory(),  # of this process
        "peak_gpu_bytes": torch.cuda.max_memory_allocated(),
    }


@dataclass(frozen=True, kw_only=True)
class _Work:
    """What is to be done to a model."""

    source: Trained
    by: Quantizer
    out: Path
    model: Any  # a PreTrainedModel without values
    linears: list[str]  # their weights, which are quantised
    blocks: list[str]
    files: dict[str, list[str]]  # the tensors of each; the first has what is in no block

    @classmethod
    def of(cls, source: Trained, by: Quantizer, out: Path) -> _Work:
        if source.method.forward_grid is not None:
            raise ConfigError(
                f"{source.path} has low-bit weights already (method {source.method.label}); write a model of "
                "full precision, such as a run of method dense"
            )
        built: Any = model.of_hf_config(source.hf_config, source.method, model.DTYPES[source.precision])
        if buffers := pretrained.state_buffers(built):
            raise ConfigError(
                f"{source.path} has weights that are no parameters, as {buffers[0]}, which a checkpoint has "
                "no place for; write a model of another architecture"
            )
        linears = model.linear_weights(built)
        if not linears:
            raise ConfigError(
                f"{source.path} has no linear layers to quantise: those of {type(built).__name__} are not "
                "nn.Linears; write a model of another architecture, such as Llama or Qwen3"
            )
        for name in linears:
            _check_packable(source, by, name, tuple(built.get_parameter(name).shape))
        parts = blocks(built, linears)
        inside = {name: [n for n in source.names if n.startswith(f"{name}.")] for name in parts}
        outside = sorted(set(source.names).difference(*inside.values()))
        if by.needs_calibration and (strays := set(linears) & set(outside)):
            raise ConfigError(
                f"{source.path} has linear layers outside its blocks, as {min(strays)}, which --method "
                f"{by.name} does not reach; write --method rtn"
            )
        files = {f"shard-{i:05}.safetensors": names for i, names in enumerate([outside, *inside.values()])}
        return cls(source=source, by=by, out=out, model=built, linears=linears, blocks=parts, files=files)

    def tokens(self, calibration: Calibration | None) -> Tensor | None:
        if not self.by.needs_calibration:
            if calibration is not None:
                raise ConfigError(
                    f"--data ({calibration.path}) is for methods that are calibrated, as gptq; "
                    f"{self.by.name} looks at weights alone: leave it out"
                )
            return None
        if calibration is None:
            raise ConfigError(
                f"--method ({self.by.name}) is calibrated on samples; write --data, a folder made by "
                "`lowbit data prepare` with the model's tokenizer"
            )
        return calibration.read(
            self.source, max(self.model.get_parameter(name).shape[1] for name in self.linears)
        )

    def manifest(self, calibration: Calibration | None) -> dict[str, Any]:
        """Of the checkpoint; the sizes of its files are not known yet."""
        source, method, linears = self.source, self.by.method, set(self.linears)
        config, place = self._config(calibration), {"step": source.step or 0, "samples": 0, "tokens": 0}
        tensors: dict[str, dict[str, Any]] = {}
        for name in source.names:
            shape = tuple(self.model.get_parameter(name).shape)
            tensors[name] = {"shape": list(shape), "grid": None}
            if name in linears and method.stored is not None:
                every = model.scale_every(method, shape)
                planes = {"planes": self.by.summed_planes} if self.by.summed_planes > 1 else {}
                tensors[name] |= {"grid": method.stored.name, "scale_every": every, **planes}
        numbers = {name: t.get("planes", 1) * prod(t["shape"]) for name, t in tensors.items()}
        own = source.tokenizer
        return {
            "format": FORMAT,
            **place,
            "vocab_size": pretrained.vocabulary(source.hf_config) or own.vocab_size,
            "tokenizer_sha256": own.sha256,
            "marks": {"bos_id": own.bos_id, "eos_id": own.eos_id},
            "hf_config": pretrained.as_mapping(source.hf_config),
            "quantized": {
                **self.by.model_dump(),
                "source": str(source.path),
                "calibration": None if calibration is None else vars(calibration),
            },
            "config": config.to_dict(),
            "tensors": tensors,
            "files": {
                file: {"bytes": 0, "holds": {name: [0, numbers[name]] for name in names}}
                for file, names in self.files.items()
            },
        }

    def _config(self, calibration: Calibration | None) -> RunConfig:
        """Of a run that would have such a checkpoint: the source's own, with another method."""
        source, samples = self.source, self.source.samples
        if (source.path / MANIFEST).is_file():
            of = Checkpoint.open(source.path).config.to_dict()
            sections = {"run": {"name": of["run"]["name"]}, "model": of["model"], "data": of["data"]}
        else:
            data = {"path": calibration.path if calibration else str(source.path), "seq_len": samples.seq_len}
            sections = {"model": {"pretrained": str(source.path.absolute())}, "data": data}
        train = {
            "steps": max(1, source.step or 0),
            "micro_batch": samples.micro_batch,
            "batch_tokens": samples.micro_batch * samples.seq_len,
            "eval_samples": samples.number,
        }
        method = self.by.method.model_dump()
        return configfile.from_dict(
            {
                **sections,
                "method": method,
                "precision": source.precision,
                "train": train,
                "cluster": {"workers": 1},
            }
        )

    def identity(self, manifest: Mapping[str, Any], tokens: Tensor | None) -> str:
        """What a result is a function of: of equal ones a draft may be taken up."""
        path = self.source.path
        weights = sha256(path / SUMS) if (path / SUMS).is_file() else pretrained.fingerprint(path)
        calibrated = None if tokens is None else hashlib.sha256(tokens.numpy().tobytes()).hexdigest()
        content = {"manifest": manifest, "weights": weights, "tokens": calibrated}
        return json.dumps(content | {"torch": torch.__version__, "on": device()}, sort_keys=True)

    @contextmanager
    def layers(self, workers: int | None) -> Iterator[Layers]:
        """Inside, what is given quantises layers, one after the other, or spread over Ray's workers."""
        if workers is None:
            yield partial(starmap, _quantised)
            return
        shapes = [self.model.get_parameter(name).shape for name in self.linears]
        largest = max(4 * (2 * n_rows * n_columns + n_columns**2) for n_rows, n_columns in shapes)
        with tasks.spread(
            _quantised, workers, on_gpu=device() == "cuda", item_bytes=largest, say=log.info
        ) as layers:
            yield layers

    def write(
        self, draft: Path, manifest: dict[str, Any], tokens: Tensor | None, layers: Layers, bar: Bar
    ) -> float:  # the relative error of the quantised weights
        """Every file that is not there yet, one block after the other."""
        walk = None
        if tokens is not None and not all((draft / file).exists() for file in self.files):
            walk = Walk(self.source, self.model, self.blocks, micro_batches(tokens))
        done, linears = Checkpoint(draft, manifest), set(self.linears)
        error = total = 0.0
        blocks = [None, *self.blocks]
        with bar(sum(4 * prod(t["shape"]) for t in manifest["tensors"].values())) as advance:
            for (file, names), block in zip(self.files.items(), blocks, strict=True):
                # In float32 at first; of linear layers the quantised weights take the place.
                tensors: dict[str, Any] = {name: self.source.finite(name) for name in names}
                wanted = [name for name in names if name in linears]
                is_there = (draft / file).exists()
                quantised: Iterator[Any]
                if is_there:
                    quantised = map(done.tensor, wanted)
                else:
                    grams = walk.grams(block, wanted, tensors) if walk and block else {}
                    quantised = layers(self._items({name: tensors[name] for name in wanted}, grams))
                for name, packed in zip(wanted, quantised, strict=True):
                    weight, tensors[name] = tensors[name], packed
                    error += (packed.dequantize(torch.float32) - weight).double().square().sum().item()
                    total += weight.double().square().sum().item()
                    advance(4 * weight.numel())
                advance(sum(4 * tensors[name].numel() for name in names if name not in linears))
                if not is_there:
                    folder.write(draft, file, tensors)
                if walk and block and block != self.blocks[-1]:
                    walk.advance(block, tensors)
        return (error / total) ** 0.5 if total else 0.0

    def _items(self, weights: Mapping[str, Tensor], grams: Mapping[str, Gram]) -> Iterator[tuple[Any, ...]]:
        """The arguments of `_quantised` for each layer."""
        for name, weight in weights.items():
            gram = grams.get(name)
            if self.by.needs_calibration and (gram is None or not gram.is_enough):
                log.warning(
                    "%s is rounded to nearest: of the calibration tokens %s came to it, fewer than its %s "
                    "inputs", name, 0 if gram is None else gram.n_tokens, weight.shape[1],
                )  # fmt: skip
                gram = None
            yield self.by, f"{name} of {self.source.path}", weight, gram, device()


def _quantised(by: Quantizer, named: str, weight: Tensor, gram: Gram | None, device: str) -> PackedTensor:
    """A layer's weight, on the CPU; ConfigError if it cannot be quantised."""
    try:
        packed = by.layer(weight.to(device), gram)
    except ValueError as error:
        raise ConfigError(
            f"{named} cannot be quantised: {error}; write --method rtn, or another model"
        ) from None
    return replace(packed, codes=packed.codes.cpu(), scale=packed.scale.cpu())


def _flag(option: str) -> str:
    return f"--{option.replace('_', '-')}"


def _check_packable(source: Trained, by: Quantizer, name: str, shape: tuple[int, ...]) -> None:
    try:
        check_shape(shape, model.scale_every(by.method, shape))
    except ValueError as error:
        smaller = "write --group 64, or another model" if shape[1] % PLANE == 0 else "write another model"
        raise ConfigError(
            f"{name} {list(shape)} of {source.path} cannot be packed: {error}; {smaller}"
        ) from None

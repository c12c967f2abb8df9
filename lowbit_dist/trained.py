"""A trained model, whatever it was trained by: its weights by name, its tokenizer, its forward pass.

    trained = open("quickstart")                  a run, a checkpoint's folder, a Hugging Face model's folder
    trained.tensor("model.norm.weight")           a PackedTensor, or float32
    trained.network()(input_ids=...).logits       with dense weights, or as codes that the layers decode
    trained.generate("def main():")["text"]

Evaluation, sampling, post-training quantisation and exports work on this alone.  One that is quantised
after training (lowbit_dist/quantize) is a checkpoint, too.  Opening and loading execute nothing of what is
read: JSON, safetensors and tokenizers are data.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from lowbit_dist import model, ops, pretrained, tokenizer
from lowbit_dist.checkpoint import MANIFEST, Checkpoint, resolve
from lowbit_dist.convert import pack_
from lowbit_dist.errors import ConfigError
from lowbit_dist.grid import Grid
from lowbit_dist.inference import integers, multiply_integers_
from lowbit_dist.linear import Linear, decodes
from lowbit_dist.methods.dense import Dense
from lowbit_dist.methods.method import Method, Scale
from lowbit_dist.packed import PackedTensor
from lowbit_dist.pretrained import CONFIG, Pretrained
from lowbit_dist.tokenizer import TextTokenizer

if TYPE_CHECKING:
    from transformers import PretrainedConfig

TEXT_LENGTH = 2048  # tokens of a sample of text for a model that takes more and has no run to say


@dataclass(frozen=True, kw_only=True)
class Samples:
    """What a model is evaluated on where nobody says otherwise: of a run, what its training loop reads."""

    seq_len: int  # tokens of a sample of text
    number: int = 256  # of samples of prepared data
    micro_batch: int = 1  # samples of one pass
    cache: Path | None = None  # where shards of remote data are kept
    document_mask: bool = False  # whether attention stays within a document


@dataclass(frozen=True, kw_only=True)
class Trained:
    """A trained model, read tensor by tensor."""

    path: Path
    step: int | None  # of its training, where that is known
    hf_config: PretrainedConfig
    method: Method
    precision: Literal["bf16", "fp32"]  # of its computations
    names: list[str]  # of every parameter, in canonical (sorted) order
    read: Callable[[str], PackedTensor | Tensor]
    open_tokenizer: Callable[[], TextTokenizer]
    samples: Samples
    read_buffers: Callable[[nn.Module], dict[str, Tensor]] = lambda _: {}  # of its state, by name

    @cached_property
    def tokenizer(self) -> TextTokenizer:
        return self.open_tokenizer()

    @property
    def max_positions(self) -> int | None:
        """The most tokens of a text that the model takes; None: any number."""
        return pretrained.max_positions(self.hf_config)

    def check_tokens(self, ids: Iterable[int], named: str) -> None:
        """ConfigError if the model has no embedding for one of `ids`, which are of what `named` says."""
        rows, largest = pretrained.vocabulary(self.hf_config), max(ids, default=0)
        if rows is not None and largest >= rows:
            raise ConfigError(
                f"{named} has a token {largest:,}, for which the model, of a vocabulary of {rows:,}, has no "
                "embedding; write a text without it"
            )

    def tensor(self, name: str) -> PackedTensor | Tensor:
        """A whole parameter: packed if it is low-bit, else float32."""
        return self.read(name)

    @cached_property
    def planes(self) -> int:
        """Of which each low-bit weight is the sum; 1 of one that was trained so."""
        if self.method.stored is None:
            return 1
        tensors = map(self.tensor, reversed(self.names))  # embeddings, which are large, come first by name
        return next((tensor.planes for tensor in tensors if isinstance(tensor, PackedTensor)), 1)

    def is_on(self, grid: Grid) -> bool:
        """Whether the weights are levels of this grid, as they are stored or as the forward pass sees them:
        to round them to it would change what they were trained as.
        """
        return grid in (self.method.stored, self.method.forward_grid) and self.planes == 1

    def finite(self, name: str) -> PackedTensor | Tensor:
        """The same; ConfigError if it has NaN or infinity, as of a run that diverged."""
        tensor = self.tensor(name)
        if not (tensor.scale if isinstance(tensor, PackedTensor) else tensor).isfinite().all():
            raise ConfigError(
                f"{name} of {self.path} has numbers that are not finite; write a checkpoint from before the "
                "run diverged, or another model"
            )
        return tensor

    def network(
        self,
        *,
        packed: bool = False,
        integer: bool = False,
        forward: Grid | None = None,
        scale: Scale | None = None,
    ) -> nn.Module:
        """The model, ready for inference; see `network`."""
        return network(self, packed=packed, integer=integer, forward=forward, scale=scale)

    def evaluate(self, data: str, **options: Any) -> dict[str, Any]:
        """Loss, perplexity and bits per byte on prepared data or a text; see `evaluate.evaluate`."""
        from lowbit_dist.evaluate import evaluate

        return evaluate(self, data, **options)

    def generate(self, prompt: str, **options: Any) -> dict[str, Any]:
        """A continuation of `prompt`; see `generate.generate`."""
        from lowbit_dist.generate import generate

        return generate(self, prompt, **options)


def open(run_or_folder: str | Path, runs_dir: str | Path = "runs") -> Trained:
    """What a run's name, a run's folder, a checkpoint's folder or a Hugging Face model's folder holds.

    Of a run the newest checkpoint that is not damaged; ConfigError if a checkpoint that is named itself is.
    """
    folder = Path(run_or_folder)
    if os.path.isfile(folder / CONFIG) and not os.path.exists(folder / MANIFEST):
        return of_folder(folder)
    try:
        path = resolve(run_or_folder, runs_dir)
    except ConfigError as error:
        others = " nor a checkpoint's folder"
        raise ConfigError(
            str(error).replace(others, f", a checkpoint's folder nor a Hugging Face model's (with {CONFIG})")
        ) from None
    return of_checkpoint(Checkpoint.open(path))


def of_checkpoint(checkpoint: Checkpoint) -> Trained:
    """The model of a published checkpoint, in the compute precision of its run."""
    config = checkpoint.config

    def read(name: str) -> PackedTensor | Tensor:
        try:
            return checkpoint.tensor(name)
        except Exception as error:  # of a shard that was made to fit its hash; parsers raise many kinds
            raise ConfigError(
                f"{checkpoint.path}: {name} cannot be read ({type(error).__name__}: {error}); name another "
                "checkpoint of the run"
            ) from None

    return Trained(
        path=checkpoint.path,
        step=checkpoint.step,
        hf_config=_own_config(checkpoint),
        method=config.method.at(max(1, checkpoint.step), config.train.steps),
        precision=config.precision.compute,
        names=checkpoint.names,
        read=read,
        open_tokenizer=partial(_run_tokenizer, checkpoint),
        samples=Samples(
            seq_len=config.data.seq_len,
            number=config.train.eval_samples,
            micro_batch=config.train.micro_batch,
            cache=config.data.cache,
            document_mask=config.data.document_mask,
        ),
    )


def _own_config(checkpoint: Checkpoint) -> Any:  # PretrainedConfig
    """Kept in the checkpoint of a model that began as a pretrained one, whose folder may be gone."""
    if (content := checkpoint.manifest.get("hf_config")) is not None:
        return pretrained.of_mapping(content)
    return model.hf_config(checkpoint.config.model, checkpoint.manifest["vocab_size"])


def of_folder(path: str | Path) -> Trained:
    """The model of a Hugging Face folder, checked by the headers of its files.

    It is computed in bfloat16 if its `config.json` says that it was trained so, otherwise in float32, which
    holds every float16.
    """
    folder = Path(path)
    hf_config, method = pretrained.configuration(folder), Dense()
    built = model.of_hf_config(hf_config, method, torch.float32, named=str(folder))
    if why := pretrained.why_not_causal(built):
        raise ConfigError(
            f"{folder} is not a causal language model: {type(built).__name__} {why}; write the folder of one"
        )
    files = Pretrained(folder).named_as(built)
    files.check(built)
    precision: Literal["bf16", "fp32"] = "bf16" if hf_config.dtype is torch.bfloat16 else "fp32"
    longest = pretrained.max_positions(hf_config) or TEXT_LENGTH
    return Trained(
        path=folder,
        step=None,
        hf_config=hf_config,
        method=method,
        precision=precision,
        names=sorted(name for name, _ in built.named_parameters()),
        read=files.tensor,
        open_tokenizer=partial(_folder_tokenizer, folder, hf_config),
        samples=Samples(seq_len=min(longest, TEXT_LENGTH)),
        read_buffers=files.buffers,
    )


def network(
    trained: Trained,
    *,
    packed: bool = False,
    integer: bool = False,
    forward: Grid | None = None,
    scale: Scale | None = None,
) -> nn.Module:
    """The model with its weights in its compute precision, ready for inference.

    `packed`: linear layers keep their low-bit weights as codes and decode them whenever they multiply, with
    the same logits to the bit.  `integer`: on a CPU with a compiler, those that round their inputs to 8 bits
    never decode them, and multiply integers (inference.py); logits differ by the rounding of sums that are
    exact here.  `forward`: the weights are rounded to this grid first, with scales as `Method.through` says;
    those that are on it already (`Trained.is_on`) are taken as they are, stored ones also where the forward
    pass of training saw them on another.
    """
    is_on = forward is not None and trained.is_on(forward)
    as_stored = is_on and forward != trained.method.forward_grid
    forward = None if is_on else forward
    dtype = model.DTYPES[trained.precision]
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    integer = integer and ops.multiplies(device)
    built = model.of_hf_config(trained.hf_config, trained.method, dtype)
    shapes = {name: tuple(parameter.shape) for name, parameter in built.named_parameters()}
    if differing := set(shapes) ^ set(trained.names):
        raise _unfitting(trained, ", ".join(sorted(differing)))
    requantized = _requantized_names(built, trained.method) if forward is not None else set()
    for module in built.modules() if forward is not None else ():
        if isinstance(module, Linear):
            module.view = None  # the weights go through a grid here
    weights: dict[str, Tensor] = {}
    as_codes: list[Callable[[], None]] = []
    for name in trained.names:
        tensor = trained.tensor(name)
        if tuple(tensor.shape) != shapes[name]:
            raise _unfitting(trained, f"{name} has shape {tuple(tensor.shape)}, the model {shapes[name]}")
        if name in requantized and forward is not None:
            tensor = _requantized(name, _dense(tensor, torch.float32), trained.method, forward, scale)
        elif isinstance(tensor, PackedTensor) and not as_stored:
            tensor = trained.method.seen(tensor)
        owner = built.get_submodule(name.rpartition(".")[0])
        if isinstance(owner, Linear) and decodes(owner) and owner.weight is built.get_parameter(name):
            tensor = tensor if isinstance(tensor, PackedTensor) else tensor.to(dtype)
            if integer and (made := integers(owner, tensor, trained.method)) is not None:
                as_codes.append(partial(multiply_integers_, owner, made))
                continue
            if packed and isinstance(tensor, PackedTensor):
                as_codes.append(partial(pack_, owner, tensor))
                continue
        weights[name] = _dense(tensor, dtype)
    built.load_state_dict(weights, strict=False, assign=True)
    for name, value in trained.read_buffers(built).items():
        built.get_buffer(name).copy_(value)
    for pack in as_codes:
        pack()
    if getattr(built.config, "tie_word_embeddings", False):
        built.tie_weights()  # type: ignore[operator]
    return built.to(device).eval().requires_grad_(False)


def _requantized_names(built: nn.Module, method: Method) -> set[str]:
    """What is rounded to another grid: the low-bit weights, or of a method without any the linears' but the
    head's.
    """
    return set(model.linear_weights(built) if method.stored is None else model.low_bit_names(built, method))


def _requantized(name: str, weight: Tensor, method: Method, grid: Grid, scale: Scale | None) -> PackedTensor:
    try:
        return method.through(weight, grid) if scale is None else method.through(weight, grid, scale)
    except ValueError as error:
        raise ConfigError(
            f"--forward ({grid.name}): {name} {list(weight.shape)} cannot be packed: {error}; leave it out"
        ) from None


def _dense(tensor: PackedTensor | Tensor, dtype: torch.dtype) -> Tensor:
    return tensor.dequantize(dtype) if isinstance(tensor, PackedTensor) else tensor.to(dtype)


def _unfitting(trained: Trained, what: str) -> ConfigError:
    return ConfigError(f"{trained.path} does not fit its own configuration: {what}; name another checkpoint")


def _run_tokenizer(checkpoint: Checkpoint) -> TextTokenizer:
    """The tokenizer of the checkpoint's model: the copy in its folder or its run's, or its data's."""
    expected, path = checkpoint.manifest["tokenizer_sha256"], checkpoint.path.resolve()
    copies = [folder / "tokenizer" for folder in (path, path.parent.parent)]
    path = next(filter(Path.is_dir, copies), Path(checkpoint.config.data.path) / "tokenizer")
    marks = {} if (known := checkpoint.manifest.get("marks")) is None else dict(known)
    loaded = tokenizer.load(path, sha256=expected, **marks)
    if loaded.sha256 != expected:
        raise ConfigError(
            f"{path} is not the tokenizer of {checkpoint.path}: its hash is {loaded.sha256[:12]}, "
            f"the run's {expected[:12]}; put the run's own tokenizer there"
        )
    return loaded


def _folder_tokenizer(folder: Path, hf_config: Any) -> TextTokenizer:
    """Of a Hugging Face folder, whose model says what begins and ends a text where its tokenizer does not."""
    loaded = tokenizer.load(
        folder, bos_id=_first(hf_config.bos_token_id), eos_id=_first(hf_config.eos_token_id)
    )
    rows = pretrained.vocabulary(hf_config)
    if rows is not None and loaded.n_pieces > rows:
        raise ConfigError(
            f"{folder} has a tokenizer of {loaded.n_pieces:,} pieces and a model of {rows:,}; "
            "put the model's own tokenizer there"
        )
    return loaded


def _first(ids: int | list[int] | None) -> int | None:
    return ids[0] if isinstance(ids, list) else ids

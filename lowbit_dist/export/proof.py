"""Whether files are the model: what the format's own public reader makes of them, against what it is.

* weights: level x scale of each that is low-bit, and every other number, bit for bit.  A format that keeps
  the reciprocal of a scale may be off by a unit in the last place of its float32.
* logits of a text, against our own forward pass by the method's layers (and not by what is written): alike to
  rounding in float32.  Where a format rounds linear layers' inputs to 8 bits, our layers round by its rule,
  and a value that lies next to a border may still fall the other way.  What another rule than that of
  training costs is told, and no mistake.
* ids: of texts that tokenizers disagree on.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lowbit_dist import pretrained
from lowbit_dist.errors import first_line
from lowbit_dist.export import finished
from lowbit_dist.packed import PackedTensor

if TYPE_CHECKING:
    from lowbit_dist.export import ReadBack
    from lowbit_dist.export.finished import Finished

POSITIONS = 64  # of the text whose logits are compared
MAX_KL = 1e-9  # nats, mean over positions
MAX_KL_HALF = 1e-5  # the same, of scales rounded to float16
MAX_KL_NARROWED = 1e-2  # the same, of matrices rounded to bfloat16
MAX_KL_ROUNDED = 5e-4  # the same, with inputs rounded to 8 bits
MIN_TOP1 = 0.95  # of positions
TEXTS = (
    "import os\n\n\ndef main(path: str) -> list[int]:\n    # What is there?\n    names = os.listdir(path)\n"
    "    return [len(name) for name in names if name != '.git']\n\n\nThe quick brown fox jumps over the lazy "
    'dog; she sells sea shells by the sea shore, and 12,345 more of them in 2026.\n\tIt\'s "quoted".\n',
    " one space before",
    "two  spaces,   three\tand a tab\t\t\n\n\n",
    "naïve café, Ελλάδα, 日本語, 🎈🎈",
    "0123456789 3.14159",
    "x",
)


class ProofFailed(Exception):
    """What was written is not the model."""


@dataclass(frozen=True, kw_only=True)
class Proof:
    """What was compared, and how alike it is."""

    weights: int  # tensors that are the model's bit for bit
    within_one_ulp: int  # tensors whose scale is off by less than two units of its float32's last place
    narrowed: int  # tensors that the format keeps in narrower floats than the model
    positions: int
    rounds_inputs: bool
    kl: float  # nats, mean over positions, of the same arithmetic
    top1: float  # share of positions with the same likeliest token
    kl_as_trained: float  # the same against the forward pass as it was trained
    top1_as_trained: float
    texts: int  # whose ids are the same

    def as_mapping(self) -> dict[str, Any]:
        return asdict(self)


def prove(model: Finished, read_back: Callable[[], ReadBack]) -> Proof:
    """ProofFailed unless the files, as `read_back` gives them, are the model."""
    ids = _ids(model)
    try:
        with contextlib.redirect_stderr(io.StringIO()):  # bars of libraries
            reader = read_back()
            counts = _compare_weights(model, reader)
            _compare_ids(model, reader)
            theirs, rounding = reader.logits(ids).float(), reader.rounding
    except ProofFailed:
        raise
    except Exception as error:  # whatever a reader raises on a file that is wrong
        raise ProofFailed(f"what was written cannot be read back ({first_line(error)})") from error
    del reader  # a model in float32
    ours = finished.Network(model)
    same, trained = ours.logits(ids, rounding), ours.logits(ids, model.rounding)
    proof = Proof(
        **counts,
        positions=len(ids),
        rounds_inputs=rounding is not None,
        kl=divergence(same, theirs),
        top1=agreement(same, theirs),
        kl_as_trained=divergence(trained, theirs),
        top1_as_trained=agreement(trained, theirs),
        texts=len(TEXTS),
    )
    most = MAX_KL_HALF if model.has_half_scales else MAX_KL
    if proof.narrowed:
        most = MAX_KL_NARROWED
    if proof.rounds_inputs:
        most = max(MAX_KL_ROUNDED, most)
    if not (proof.kl <= most and proof.top1 >= MIN_TOP1):  # NaN fails
        raise ProofFailed(
            f"the logits of {len(ids)} positions are not the model's: KL {proof.kl:.3g} nats, at most "
            f"{most:.3g}; the likeliest token is the same at {proof.top1:.0%}, at least {MIN_TOP1:.0%}"
        )
    return proof


def _ids(model: Finished) -> list[int]:
    """Of a text that the model takes, as it is trained to begin."""
    begin, rows = model.tokenizer.bos_id, pretrained.vocabulary(model.hf_config)
    ids = [*([] if begin is None else [begin]), *model.tokenizer.encode(TEXTS[0])]
    known = [i for i in ids if rows is None or i < rows]
    return known[: min(POSITIONS, model.trained.max_positions or POSITIONS)]


def divergence(ours: Tensor, theirs: Tensor) -> float:
    """Mean KL(ours || theirs) over positions, in nats."""
    if ours.shape != theirs.shape:
        raise ProofFailed(f"logits are {list(theirs.shape)}, the model's {list(ours.shape)}")
    p, q = (x.double().log_softmax(-1) for x in (ours, theirs))
    return (p.exp() * (p - q)).sum(-1).mean().item()


def agreement(ours: Tensor, theirs: Tensor) -> float:
    """The share of positions with the same likeliest token."""
    return (ours.argmax(-1) == theirs.argmax(-1)).double().mean().item()


def _compare_weights(model: Finished, reader: ReadBack) -> dict[str, int]:
    counts = {"weights": 0, "within_one_ulp": 0, "narrowed": 0}
    for name in model.names:
        expected, given = model.numbers(name), reader.weight(name)
        if given is None and not isinstance(model.tensor(name), PackedTensor):
            counts["narrowed"] += 1
        elif given is None or given.shape != expected.shape:
            shape = "none" if given is None else list(given.shape)
            raise ProofFailed(f"{name} has shape {shape}, the model's {list(expected.shape)}")
        elif torch.equal(given, expected):
            counts["weights"] += 1
        elif reader.has_reciprocals and _is_next(given, expected):
            counts["within_one_ulp"] += 1
        else:
            raise ProofFailed(_difference(name, given, expected))
    return counts


def _is_next(given: Tensor, expected: Tensor) -> bool:
    """Whether no element is further off than the next float32."""
    towards = torch.nextafter(expected, given)
    return torch.equal(towards, given)


def _difference(name: str, given: Tensor, expected: Tensor) -> str:
    differs = (given != expected).nonzero()
    at = tuple(differs[0].tolist())
    return (
        f"{name} is not the model's: {len(differs):,} of {expected.numel():,} elements differ, the first, "
        f"{list(at)}, is {given[at].item():.9g} and must be {expected[at].item():.9g}"
    )


def _compare_ids(model: Finished, reader: ReadBack) -> None:
    for text in TEXTS:
        ours, theirs = model.tokenizer.encode(text), reader.encode(text)
        if ours != theirs:
            raise ProofFailed(
                f"the tokenizer gives other ids: of {text[:40]!r} {theirs[:6]}, the model's {ours[:6]}"
            )

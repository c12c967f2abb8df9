"""Tokenizers in GGUF: what llama.cpp needs to give a text the same ids, and the same read back.

llama.cpp has two ways that are of use here:

    "llama"   merges characters by the scores of the pieces they make, and spells what is no piece in bytes:
              sentencepiece's BPE, or a `tokenizer.json` whose merges are in the order of such scores
    "gpt2"    merges bytes by rank, within words that a pattern cuts, which has a name of llama.cpp's:
              byte-level BPE of a `tokenizer.json`

It knows no others, and normalises nothing; a tokenizer that it would read differently is refused.  The one
exception is Unicode's NFC, which the tokenizers of many families ask for: a text that is not in it gets
other ids there.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from lowbit_dist.errors import ConfigError
from lowbit_dist.hf_tokenizer import FastTokenizer
from lowbit_dist.tokenizer import MODEL

if TYPE_CHECKING:
    from lowbit_dist.tokenizer import TextTokenizer

PREFIX = "tokenizer.ggml."
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)  # as sentencepiece numbers them
SPACE = "\u2581"  # of sentencepiece

_CONTRACTIONS = "'s|'t|'re|'ve|'m|'ll|'d"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
GPT2 = rf"{_CONTRACTIONS}| ?\p{{L}}+| ?\p{{N}}+| ?[^\s\p{{L}}\p{{N}}]+|\s+(?!\S)|\s+"
LLAMA3 = rf"(?i:{_CONTRACTIONS})|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}{_REST}"
QWEN2 = rf"(?i:{_CONTRACTIONS})|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{_REST}"
# llama.cpp's name of how words are cut -> (digits stand alone, the pattern, words that are pieces are not
# merged).
WORDS = {
    "gpt-2": (False, GPT2, False),
    "smollm": (True, GPT2, False),
    "llama-bpe": (False, LLAMA3, True),
    "dbrx": (False, LLAMA3, False),
    "qwen2": (False, QWEN2, False),
}


def metadata(tokenizer: TextTokenizer, rows: int) -> dict[str, Any]:
    """The entries of a tokenizer whose model has embeddings of `rows` tokens; ConfigError if llama.cpp would
    read it differently.
    """
    if isinstance(tokenizer, FastTokenizer):
        own = _of_json(tokenizer.description)
    else:
        own = _of_sentencepiece(tokenizer.files[MODEL])
    own["tokens"] = _filled(own["tokens"], rows, lambda i: f"[PAD{i}]")
    own["token_type"] = np.array(_filled(own["token_type"], rows, lambda _: UNUSED), np.int32)
    if "scores" in own:
        own["scores"] = np.array(_filled(own["scores"], rows, lambda _: 0.0), np.float32)
    begin, end = tokenizer.bos_id, tokenizer.eos_id
    if begin is None and end is None:
        raise _refused("has no token that ends a text")
    if max(begin or 0, end or 0) >= rows:
        raise _refused("marks a text with a token that has no embedding")
    if len(set(own["tokens"])) < rows:
        raise _refused("has the same token twice")
    # One that is not said would be token 11, and end a text.
    own["bos_token_id"] = end if begin is None else begin
    own["eos_token_id"] = begin if end is None else end
    own["add_bos_token"] = begin is not None  # as before each document of the training data
    own["add_eos_token"] = False
    entries = {f"{PREFIX}{name}": value for name, value in own.items()}
    template = _chat_template(tokenizer.files)
    return entries if template is None else {**entries, "tokenizer.chat_template": template}


def _filled(values: list[Any], rows: int, missing: Callable[[int], Any]) -> list[Any]:
    """As many as there are embeddings: tokens beyond are never generated, nor can a model read them."""
    return values[:rows] + [missing(i) for i in range(len(values), rows)]


def _chat_template(files: Mapping[str, bytes]) -> str | None:
    if "chat_template.jinja" in files:
        return files["chat_template.jinja"].decode()
    template = json.loads(files.get("tokenizer_config.json", b"{}")).get("chat_template")
    return template if isinstance(template, str) else None


def _refused(what: str) -> ConfigError:
    return ConfigError(
        f"--format (gguf): llama.cpp has no tokenizer that {what}, as the model's does, and would give other "
        "ids; write --format hf"
    )


def _of_sentencepiece(model: bytes) -> dict[str, Any]:
    from sentencepiece import sentencepiece_model_pb2

    proto: Any = sentencepiece_model_pb2.ModelProto.FromString(model)  # type: ignore[attr-defined]
    how, trained = proto.normalizer_spec, proto.trainer_spec
    if trained.model_type != trained.BPE:
        raise _refused("chooses pieces by their probability (unigram)")
    if how.precompiled_charsmap or how.remove_extra_whitespaces or trained.treat_whitespace_as_suffix:
        raise _refused("changes characters or spaces of a text before it cuts it")
    kinds = [piece.type for piece in proto.pieces]
    if kinds.count(BYTE) != 256:
        raise _refused("has no pieces for single bytes")
    return {
        "model": "llama",
        "pre": "default",
        "tokens": [_plain(of.piece) if of.type == USER_DEFINED else of.piece for of in proto.pieces],
        "scores": [piece.score for piece in proto.pieces],
        "token_type": kinds,
        "unknown_token_id": trained.unk_id,
        "add_space_prefix": how.add_dummy_prefix,
    }


def _plain(piece: str) -> str:
    """A piece that is looked for in the text itself, where a space is a space."""
    return piece.replace(SPACE, " ")


def _of_json(description: Mapping[str, Any]) -> dict[str, Any]:
    """Of the content of a `tokenizer.json`."""
    model = description["model"]
    if model["type"] != "BPE":
        raise _refused(f"is a {model['type']} model")
    for option in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(option):
            raise _refused(f"has {option}")
    added = {of["id"]: of for of in description["added_tokens"]}
    for of in added.values():
        for option in ("lstrip", "rstrip", "single_word"):
            if of[option]:
                raise _refused(f"has a token ({of['content']}) with {option}")
    pieces = {token: piece for piece, token in model["vocab"].items()}
    ids = range(1 + max(max(pieces, default=0), max(added, default=0)))
    tokens, kinds = [], []
    for i in ids:
        if i in added:
            tokens.append(added[i]["content"])
            kinds.append(CONTROL if added[i]["special"] else USER_DEFINED)
        else:
            tokens.append(pieces.get(i, f"[PAD{i}]"))
            kinds.append(NORMAL if i in pieces else UNUSED)
    pairs = (of.split(" ") if isinstance(of, str) else of for of in model["merges"])
    merges = [(left, right) for left, right in pairs]
    common = {"tokens": tokens, "token_type": kinds}
    if model.get("byte_fallback"):
        return {**common, **_scored(description, merges, tokens, kinds)}
    return {
        **common,
        "model": "gpt2",
        "pre": _name_of_words(description),
        "merges": [" ".join(pair) for pair in merges],
    }


def _name_of_words(description: Mapping[str, Any]) -> str:
    """llama.cpp's name of how a byte-level tokenizer cuts a text into words."""
    if others := [of["type"] for of in _steps(description["normalizer"]) if of["type"] != "NFC"]:
        raise _refused(f"normalises a text ({others[0]})")
    steps = list(_steps(description["pre_tokenizer"]))
    if not steps or steps[-1]["type"] != "ByteLevel":
        raise _refused("cuts words otherwise than by a pattern and into bytes")
    *cuts, into_bytes = steps
    if into_bytes["add_prefix_space"]:
        raise _refused("puts a space before a text")
    digits_alone = bool(cuts) and cuts[0] == {"type": "Digits", "individual_digits": True}
    cuts = cuts[1:] if digits_alone else cuts
    patterns = [
        of["pattern"].get("Regex")
        for of in cuts
        if of["type"] == "Split" and of["behavior"] == "Isolated" and not of["invert"]
    ]
    if into_bytes.get("use_regex", True):
        patterns.append(GPT2)
        cuts = [*cuts, into_bytes]
    if len(patterns) == len(cuts) == 1:
        ours = (digits_alone, patterns[0], bool(description["model"].get("ignore_merges")))
        for name, theirs in WORDS.items():
            if theirs == ours:
                return name
    raise _refused(f"cuts words as {' and '.join(map(str, patterns)) or 'this one'}")


def _steps(step: Mapping[str, Any] | None) -> Iterator[Mapping[str, Any]]:
    if step is None:
        return
    if step["type"] != "Sequence":
        yield step
        return
    for of in step.get("pretokenizers", step.get("normalizers", [])):
        yield from _steps(of)


def _scored(
    description: Mapping[str, Any], merges: list[tuple[str, str]], tokens: list[str], kinds: list[int]
) -> dict[str, Any]:
    """Of a `tokenizer.json` made from a sentencepiece model: pieces have scores in the order of merges."""
    to_spaces = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    prefix = {"type": "Prepend", "prepend": SPACE}
    steps = list(_steps(description["normalizer"]))
    cuts = list(_steps(description["pre_tokenizer"]))
    metaspace = {"type": "Metaspace", "replacement": SPACE, "prepend_scheme": "never", "split": False}
    is_known = (steps in ([to_spaces], [prefix, to_spaces]) and not cuts) or (
        not steps and cuts == [metaspace]
    )
    if not is_known or description["model"].get("ignore_merges"):
        raise _refused("spells spaces otherwise than sentencepiece")
    made = [left + right for left, right in merges]
    runs = [piece for i, piece in enumerate(made) if not i or made[i - 1] != piece]
    known, pairs = set(description["model"]["vocab"]), set(merges)
    for piece in runs:
        for cut in range(1, len(piece)):
            pair = (piece[:cut], piece[cut:])
            if pair not in pairs and known.issuperset(pair):
                raise _refused(f"does not merge {pair[0]} and {pair[1]}")
    if len(runs) != len(set(runs)):
        raise _refused("merges the same piece early and late")
    scores = {piece: -float(rank) for rank, piece in enumerate(runs)}
    unknown = tokens.index(description["model"]["unk_token"])
    for i, token in enumerate(tokens):
        if kinds[i] == NORMAL and len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
            kinds[i] = BYTE
    kinds[unknown] = UNKNOWN
    if kinds.count(BYTE) != 256:
        raise _refused("has no pieces for single bytes")
    return {
        "model": "llama",
        "pre": "default",
        "scores": [scores.get(token, 0.0) for token in tokens],
        "unknown_token_id": unknown,
        "add_space_prefix": prefix in steps,
    }


def reading(metadata: Mapping[str, Any]) -> Callable[[str], list[int]]:
    """Texts to ids by what a file says of its tokenizer, through sentencepiece or `tokenizers`."""
    own = {name.removeprefix(PREFIX): of for name, of in metadata.items() if name.startswith(PREFIX)}
    return _sentencepiece(own) if own["model"] == "llama" else _byte_level(own)


def _sentencepiece(own: Mapping[str, Any]) -> Callable[[str], list[int]]:
    from sentencepiece import SentencePieceProcessor, sentencepiece_model_pb2

    proto: Any = sentencepiece_model_pb2.ModelProto()  # type: ignore[attr-defined]
    proto.trainer_spec.model_type = proto.trainer_spec.BPE
    proto.trainer_spec.byte_fallback = True
    proto.normalizer_spec.add_dummy_prefix = own.get("add_space_prefix", True)  # llama.cpp's default
    proto.normalizer_spec.remove_extra_whitespaces = False
    for token, score, kind in zip(own["tokens"], own["scores"], own["token_type"], strict=True):
        piece = token.replace(" ", SPACE) if kind == USER_DEFINED else token
        proto.pieces.add(piece=piece, score=score, type=kind)
    processor = SentencePieceProcessor(model_proto=proto.SerializeToString())
    return lambda text: list(processor.encode(text))


def _byte_level(own: Mapping[str, Any]) -> Callable[[str], list[int]]:
    from tokenizers import AddedToken, Regex, Tokenizer, models, pre_tokenizers

    digits_alone, pattern, ignore_merges = WORDS[own["pre"]]
    vocabulary = {token: i for i, token in enumerate(own["tokens"])}
    merges = [tuple(of.split(" ", 1)) for of in own["merges"]]
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, ignore_merges=ignore_merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            *([pre_tokenizers.Digits(individual_digits=True)] if digits_alone else []),
            pre_tokenizers.Split(Regex(pattern), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    of_kind = dict(zip(own["tokens"], own["token_type"], strict=True))
    tokenizer.add_special_tokens(
        [AddedToken(token, normalized=False) for token, kind in of_kind.items() if kind == CONTROL]
    )
    tokenizer.add_tokens(
        [AddedToken(token, normalized=False) for token, kind in of_kind.items() if kind == USER_DEFINED]
    )
    return lambda text: list(tokenizer.encode(text, add_special_tokens=False).ids)

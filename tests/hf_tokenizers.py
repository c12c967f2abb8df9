"""Small tokenizers of the kinds that models have, each in a folder as its model's would be."""

import json
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

WORDS = "the of and model weight token layer def return import self 12 345 naïve Straße 漢字 データ 👍 ,.:()"
TEXTS = [f"{a} {b}{c}  {a}\n" for a in WORDS.split() for b in WORDS.split() for c in ("", "s", "ing ")]
IMAGE = "<image_soft_token>"
SPLIT = (  # of Llama 3
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)


def _bytes(special: list[str], *, digits: bool = False) -> Tokenizer:
    """Byte-level BPE."""
    made = Tokenizer(models.BPE())
    words = pre_tokenizers.Split(Regex(SPLIT), behavior="isolated")
    first = pre_tokenizers.Digits(individual_digits=True) if digits else words
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [first, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=digits)]
    )
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator(TEXTS, trainer)
    return made


def llama3() -> tuple[Tokenizer, dict]:
    begin, end = "<|begin_of_text|>", "<|end_of_text|>"
    made = _bytes([begin, end, "<|eot_id|>"])
    made.post_processor = processors.TemplateProcessing(
        single=f"{begin} $A", pair=f"{begin} $A {begin} $B", special_tokens=[(begin, 0)]
    )
    return made, {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": begin, "eos_token": end}


def qwen() -> tuple[Tokenizer, dict]:
    """Without a token that begins a text."""
    made = _bytes(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    made.normalizer = normalizers.NFC()
    config = {"tokenizer_class": "Qwen2Tokenizer", "bos_token": None, "eos_token": "<|endoftext|>"}
    return made, {**config, "add_prefix_space": False}


def smollm() -> tuple[Tokenizer, dict]:
    """One token begins and ends a text."""
    mark = "<|endoftext|>"
    config = {"tokenizer_class": "GPT2Tokenizer", "bos_token": mark, "eos_token": mark, "unk_token": mark}
    return _bytes([mark, "<|im_start|>"], digits=True), config


def _with_bytes(special: list[str], normalizer: normalizers.Normalizer) -> Tokenizer:
    """BPE of characters, and of the bytes of those that it has not learned."""
    made = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    made.normalizer = normalizer
    made.train_from_iterator(
        TEXTS, trainers.BpeTrainer(vocab_size=150, special_tokens=special, show_progress=False)
    )
    content = json.loads(made.to_str())
    vocabulary = content["model"]["vocab"]
    for byte in range(256):
        vocabulary[f"<0x{byte:02X}>"] = len(vocabulary)
    return Tokenizer.from_str(json.dumps(content))


def llama2() -> tuple[Tokenizer, dict]:
    """Of Mistral, too: it puts a space in front of a text and takes it away when it decodes."""
    spaces = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    made = _with_bytes(["<unk>", "<s>", "</s>"], spaces)
    made.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    config = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>", "legacy": False}
    return made, {**config, "unk_token": "<unk>"}


def gemma() -> tuple[Tokenizer, dict]:
    """With no space in front; its last token stands for an image, for which models of text have no row."""
    made = _with_bytes(["<pad>", "<eos>", "<bos>", "<unk>"], normalizers.Replace(" ", "▁"))
    made.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    made.add_special_tokens([IMAGE])
    config = {"tokenizer_class": "GemmaTokenizer", "bos_token": "<bos>", "eos_token": "<eos>"}
    return made, {**config, "unk_token": "<unk>", "pad_token": "<pad>"}


def unigram() -> tuple[Tokenizer, dict]:
    """With a meta space for a space, and without a token that ends a text."""
    made = Tokenizer(models.Unigram())
    made.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="always")
    made.decoder = decoders.Metaspace(replacement="▁", prepend_scheme="always")
    trainer = trainers.UnigramTrainer(
        vocab_size=150, special_tokens=["<unk>", "<s>"], unk_token="<unk>", show_progress=False
    )
    made.train_from_iterator(TEXTS, trainer)
    made.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return made, {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "unk_token": "<unk>"}


KINDS = {
    "llama3": llama3, "qwen": qwen, "smollm": smollm, "llama2": llama2, "gemma": gemma, "unigram": unigram,
}  # fmt: skip


def write(folder: Path, kind: str) -> Path:
    """A folder of one of KINDS, as transformers would save it."""
    made, config = KINDS[kind]()
    folder.mkdir(parents=True)
    made.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    marks = {name: mark for name, mark in config.items() if name.endswith("_token") and mark is not None}
    (folder / "special_tokens_map.json").write_text(json.dumps(marks))
    return folder

"""The `model:` section of a run's configuration: which model is trained, and its shape."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal, NamedTuple, Self

from pydantic import Field, model_validator

from lowbit_dist.errors import ConfigError, nearest_divisor
from lowbit_dist.section import MaybeFilePath, Section, Size, may_change, setting


class Sizes(NamedTuple):
    """A LLaMA's shape: what decides every tensor but the vocabulary's."""

    hidden_size: int
    intermediate_size: int
    layers: int
    heads: int
    kv_heads: int

    @property
    def linear_parameters(self) -> int:
        """Of all blocks; not the embedding's and the head's."""
        kv = self.hidden_size * self.kv_heads // self.heads
        return self.layers * self.hidden_size * (2 * self.hidden_size + 2 * kv + 3 * self.intermediate_size)


# Parameters are counted with an untied vocabulary of 32,000, except for tiny and 13m (linears alone).
PRESETS: dict[str, Sizes] = {
    "tiny": Sizes(256, 768, 4, 4, 4),  # 3.4 M in its linears
    "13m": Sizes(512, 1536, 4, 8, 8),  # 13.6 M in its linears
    "130m": Sizes(768, 2048, 12, 12, 12),  # 134 M
    "320m": Sizes(1024, 2816, 20, 16, 16),  # 322 M
    "1b": Sizes(2048, 5632, 22, 32, 4),  # 1.10 B, the shape of TinyLlama (arXiv:2401.02385)
    "7b": Sizes(4096, 11008, 32, 32, 32),  # 6.74 B, LLaMA-2 (arXiv:2307.09288)
    "70b": Sizes(8192, 28672, 80, 64, 8),  # 69.0 B, LLaMA-2
}
Preset = Literal["tiny", "13m", "130m", "320m", "1b", "7b", "70b"]


class Model(Section):
    """Exactly one of `preset`, the five explicit sizes, or `pretrained`; `preset: tiny` if none is given."""

    preset: Preset | None = setting(
        None,
        "Five sizes by one name. tiny and 13m have 3.4 and 13.6 million parameters in their linear layers; "
        "the others are called by all that they have, with a vocabulary of 32,000.",
    )
    hidden_size: Size | None = setting(None, "The width of the residual stream.", unit="elements")
    intermediate_size: Size | None = setting(None, "The width of the MLP.", unit="elements")
    layers: Annotated[int, Field(ge=1, le=4096)] | None = setting(
        None, "How many transformer blocks there are.", unit="blocks"
    )
    heads: Size | None = setting(
        None, "How many attention heads there are, each hidden_size / heads wide.", unit="heads"
    )
    kv_heads: Size | None = setting(
        None, "How many heads of keys and values there are; it divides heads.", unit="heads"
    )
    pretrained: MaybeFilePath = may_change(
        None,
        "The folder of a Hugging Face model: training starts from its weights, and all that config.json says "
        "of its shape takes the place of the fields of this section.",
    )
    max_seq_len: Size = setting(2048, "The longest sequence that the model takes.", unit="tokens")
    rope_theta: Annotated[float, Field(gt=0, le=1e12)] = setting(
        10000.0, "The base of the wavelengths of the rotary embedding."
    )
    norm_eps: Annotated[float, Field(ge=1e-20, le=1)] = setting(
        1e-5, "What RMSNorm adds to the mean square before it takes the root."
    )
    tie_embeddings: bool = setting(False, "Whether the head uses the weight of the embedding.")

    @model_validator(mode="before")
    @classmethod
    def _tiny_if_nothing_is_asked(cls, data: Any) -> Any:
        if isinstance(data, Mapping) and all(
            data.get(name) is None for name in ("preset", "pretrained", *Sizes._fields)
        ):
            return {**data, "preset": "tiny"}
        return data

    @model_validator(mode="after")
    def _one_shape(self) -> Self:
        given = [name for name in Sizes._fields if getattr(self, name) is not None]
        answers = [name for name in ("preset", "pretrained") if getattr(self, name) is not None]
        if len(answers) == 2:
            raise ConfigError(
                f"model.preset ({self.preset}) must not stand beside model.pretrained ({self.pretrained}): "
                "both say the model's shape; leave one out, or write it as null"
            )
        if answers and given:
            only = answers[0]
            raise ConfigError(
                f"model.{given[0]} ({getattr(self, given[0])}) must not stand beside model.{only} "
                f"({getattr(self, only)}), which says every size; leave it out, or write model.{only}: null "
                f"and all of {', '.join(Sizes._fields)}"
            )
        if given and len(given) < len(Sizes._fields):
            missing = [name for name in Sizes._fields if name not in given]
            raise ConfigError(
                f"model.{missing[0]} is required beside model.{given[0]} "
                f"({getattr(self, given[0])}): sizes are given all together; add {', '.join(missing)}, "
                f"or write one of the presets {', '.join(PRESETS)}"
            )
        if given:
            self._sizes_fit()
        return self

    def _sizes_fit(self) -> None:
        sizes = self.sizes()
        assert sizes is not None, "explicit sizes are complete here"
        if sizes.hidden_size % (2 * sizes.heads):
            fitting = nearest_divisor(sizes.hidden_size // 2, sizes.heads)
            raise ConfigError(
                f"model.heads ({sizes.heads}) must divide hidden_size {sizes.hidden_size} into heads of an "
                f"even size (rotary embedding turns pairs); the nearest is {fitting}"
            )
        if sizes.heads % sizes.kv_heads:
            raise ConfigError(
                f"model.kv_heads ({sizes.kv_heads}) must divide model.heads {sizes.heads}; "
                f"the nearest is {nearest_divisor(sizes.heads, sizes.kv_heads)}"
            )

    def sizes(self) -> Sizes | None:
        """The shape asked for; None when it is the pretrained model's own."""
        if self.pretrained is not None:
            return None
        if self.preset is not None:
            return PRESETS[self.preset]
        return Sizes(*(getattr(self, name) for name in Sizes._fields))

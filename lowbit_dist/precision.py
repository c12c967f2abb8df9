"""What a run computes in: the section `precision`, which a word may stand for.

precision: fp32                            precision: {compute: fp32, matmul: auto}
precision: fp8                             precision: {compute: bf16, matmul: fp8}
"""

from typing import Annotated, Any, Literal, Self, get_args

from pydantic import BeforeValidator, model_validator

from lowbit_dist.errors import ConfigError, nearest
from lowbit_dist.section import Section, broken_rule, setting

Word = Literal["bf16", "fp32", "fp8"]


class Precision(Section):
    """What the forward and the backward pass compute in; a word alone, bf16, fp32 or fp8, is short for it."""

    compute: Literal["bf16", "fp32"] = setting("bf16", "The numbers of all that is not said otherwise.")
    matmul: Literal["auto", "bf16", "int8", "fp8"] = setting(
        "auto",
        "What linear layers other than the head multiply while the run trains. int8: low-bit layers whose "
        "inputs are rounded to 8 bits multiply integers in the forward pass, in exact sums, where a scale "
        "serves a tensor or a row; to validate, what is computed in. fp8: 8-bit floats in all passes, on "
        "GPUs of compute capability 8.9 or more. auto: as int8, with compute: bf16, where all low-bit layers "
        "can and that was measured faster, on CPUs with avx512_vnni but no amx_bf16; otherwise what is "
        "computed in; a run goes on as it began.",
    )
    grad_input: Literal["auto", "int8"] = setting(
        "auto",
        "What the gradients of these layers' inputs are made of. auto: what is computed in, or fp8 with "
        "matmul: fp8. int8, with matmul: int8: the rows of an output's gradient are rounded to 8 bits, too.",
    )

    @model_validator(mode="after")
    def _products_are_of_what_is_computed(self) -> Self:
        if self.compute == "fp32" and self.matmul in ("bf16", "fp8"):
            raise ConfigError(
                f"precision.matmul ({self.matmul}) must go with precision.compute bf16, not fp32; write "
                "precision.compute: bf16, or precision.matmul: auto"
            )
        if self.grad_input == "int8" and self.matmul != "int8":
            raise ConfigError(
                f"precision.grad_input (int8) must go with precision.matmul int8, not {self.matmul}; write "
                "precision.matmul: int8, or precision.grad_input: auto"
            )
        return self

    @property
    def without_integers(self) -> str:
        """What to write where integers cannot be multiplied."""
        also = "" if self.grad_input == "auto" else " and precision.grad_input: auto"
        return f"precision.matmul: auto{also}"

    def of_latent(self) -> Self:
        """The same for a method whose weights are no integers."""
        in_numbers = {"matmul": "auto", "grad_input": "auto"}
        return self.model_copy(update=in_numbers) if self.matmul == "int8" else self


def is_word(value: Any) -> bool:
    return value in get_args(Word)


def written_out(value: Any) -> Any:
    """The section that a word stands for; of an empty one, the defaults."""
    if isinstance(value, str) and not is_word(value):
        words = get_args(Word)
        meant = nearest(value, words)
        instead = f"did you mean {meant!r}?" if meant else f"write {words[0]}, for example"
        raise broken_rule(f"must be one of {', '.join(words)}, or a section; {instead}")
    if is_word(value):
        return {"compute": "bf16", "matmul": "fp8"} if value == "fp8" else {"compute": value}
    return {} if value is None else value


MaybeWord = Annotated[Precision, BeforeValidator(written_out, Word | Precision | None)]

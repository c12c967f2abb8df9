"""What a run is: one YAML file, read into frozen, typed sections, every mistake answered in one line.

A `ConfigError` is one line: the field, its value, the rule, what to write instead.  All of a run's
configuration is checked here, before any worker starts; nothing is corrected silently.

The YAML that is read is the core schema of YAML 1.2: `1e-3` is a number, `no` and `2024-01-01` are text.
Tags, anchors and aliases are refused, so a file can neither build objects nor grow when it is read.
"""

import difflib
import math
import re
import reprlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, NamedTuple, Self, TypeVar, get_args

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    SerializeAsAny,
    ValidationError,
    model_validator,
)
from pydantic_core import PydanticCustomError

LARGEST_FILE = 1 << 20  # bytes; what is larger is not a configuration
BLOCK = 256  # elements of a weight's row: packed codes and optimizer states come in blocks of this many


class ConfigError(Exception):
    """A user's mistake, in one line: the field, the value, the rule and what to write instead."""

    def __init__(self, message: str):
        super().__init__(" ".join(message.split()))


def _rule(text: str) -> PydanticCustomError:
    return PydanticCustomError("rule", "{text}", {"text": text})


def _clean_text(value: str) -> str:
    if not value.strip():
        raise _rule("must not be empty")
    if not value.isprintable():
        raise _rule("must be printable text without control characters")
    return value


def _clean_path(value: Any) -> Any:
    return value if isinstance(value, Path) or not isinstance(value, str) else Path(_clean_text(value))


def _path_type(value: Any) -> Any:
    if not isinstance(value, str | Path | None):
        raise _rule(f"must be the path of a file or folder; {_quoted(value)}")
    return _clean_path(value)


def _plain_name(value: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}", value):
        repaired = re.sub(r"[^A-Za-z0-9._-]+", "-", value).strip("-._")[:100] or "my-run"
        raise _rule(
            "must be at most 100 letters, digits, '.', '_' and '-', a letter or digit first; "
            f"write {repaired!r}, for example"
        )
    return value


def _pair(value: Any) -> Any:
    if not isinstance(value, list | tuple) or len(value) != 2:
        raise _rule("must be two numbers, like [0.9, 0.95]")
    return tuple(value)


def _auto_or(least: float, unit: str) -> Callable[[Any], Any]:
    def check(value: Any) -> Any:
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if value == "auto" or (number and least <= value < 1e9):
            return value
        raise _rule(f"must be auto, or a number of {unit} from {least:g} up")

    return check


def _number(value: Any) -> Any:
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise _rule("must be a number")
    return value


Text = Annotated[str, AfterValidator(_clean_text)]
RunName = Annotated[str, AfterValidator(_plain_name)]
FilePath = Annotated[Path, BeforeValidator(_path_type)]
MaybeFilePath = Annotated[Path | None, BeforeValidator(_path_type)]
Beta = Annotated[float, Field(ge=0, lt=1)]
Fraction = Annotated[float, Field(ge=0, le=1)]
# Upper limits keep every product of two counts far below 2^63.
Count = Annotated[int, Field(ge=1, le=2**31 - 1)]
Tokens = Annotated[int, Field(ge=1, le=2**40)]
Size = Annotated[int, Field(ge=1, le=2**20)]


class Section(BaseModel):
    """A part of the configuration: frozen; unknown names, other types, NaN and infinity are refused."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, allow_inf_nan=False, protected_namespaces=()
    )


S = TypeVar("S", bound=Section)


class Run(Section):
    name: RunName = "run"
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    dir: FilePath = Path("runs")


class Sizes(NamedTuple):
    """A LLaMA's shape: what decides every tensor but the vocabulary's."""

    hidden_size: int
    intermediate_size: int
    layers: int
    heads: int
    kv_heads: int


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

    preset: Preset | None = None
    hidden_size: Size | None = None
    intermediate_size: Size | None = None
    layers: Annotated[int, Field(ge=1, le=4096)] | None = None
    heads: Size | None = None
    kv_heads: Size | None = None
    pretrained: MaybeFilePath = None
    max_seq_len: Size = 2048
    rope_theta: Annotated[float, Field(gt=0, le=1e12)] = 10000.0
    norm_eps: Annotated[float, Field(ge=1e-20, le=1)] = 1e-5
    tie_embeddings: bool = False

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
        for name in ("hidden_size", "intermediate_size"):
            value = getattr(sizes, name)
            if value % BLOCK:
                raise ConfigError(
                    f"model.{name} ({value:,}) must be a multiple of {BLOCK}, the block of packed codes; "
                    f"the nearest is {_nearest_multiple(value, BLOCK):,}"
                )
        if sizes.hidden_size % (2 * sizes.heads):
            fitting = _nearest_divisor(sizes.hidden_size // 2, sizes.heads)
            raise ConfigError(
                f"model.heads ({sizes.heads}) must divide hidden_size {sizes.hidden_size} into heads of an "
                f"even size (rotary embedding turns pairs); the nearest is {fitting}"
            )
        if sizes.heads % sizes.kv_heads:
            raise ConfigError(
                f"model.kv_heads ({sizes.kv_heads}) must divide model.heads {sizes.heads}; "
                f"the nearest is {_nearest_divisor(sizes.heads, sizes.kv_heads)}"
            )

    def sizes(self) -> Sizes | None:
        """The shape asked for; None when it is the pretrained model's own."""
        if self.pretrained is not None:
            return None
        if self.preset is not None:
            return PRESETS[self.preset]
        return Sizes(*(getattr(self, name) for name in Sizes._fields))


class MethodOptions(Section):
    """The options of a training method; a method's file derives its own.

    `low_bit` says that its weights exist only as packed codes, which run under packed ZeRO-3 alone.
    """

    low_bit: ClassVar[bool] = False
    name: str


class Data(Section):
    path: Text  # a folder or URL
    seq_len: Annotated[int, Field(ge=2, le=2**20)] = 256  # tokens of a sample
    tokenizer: MaybeFilePath = None  # if given, must be the one the data was prepared with
    cache: MaybeFilePath = None  # where shards of a remote path are kept on this machine


class Optimizer(Section):
    name: Literal["adamw"] = "adamw"
    lr: Annotated[float, Field(ge=0, le=100)] = 1e-3
    betas: Annotated[tuple[Beta, Beta], BeforeValidator(_pair)] = (0.9, 0.95)
    eps: Annotated[float, Field(ge=1e-20, le=1)] = 1e-8  # must not vanish in float32
    weight_decay: Annotated[float, Field(ge=0, le=10)] = 0.01
    states: Literal["fp32", "bf16", "int8"] = "int8"


class Schedule(Section):
    name: Literal["cosine", "linear", "constant", "two_stage"] = "cosine"
    warmup_steps: Annotated[int, Field(ge=0, le=2**31 - 1)] = 50
    min_lr_ratio: Fraction = 0.1  # where cosine and linear end
    switch_at: Annotated[float, Field(gt=0, lt=1)] = 0.5  # of the steps; two_stage
    second_lr_ratio: Annotated[float, Field(gt=0, le=1)] = 0.667  # second peak / first; two_stage


class Zero(Section):
    residency: Literal["sharded", "replicated"] = "sharded"  # of packed codes
    stage: Literal[0, 1, 2, 3] | None = None  # latent-weight methods; None is 3


class Train(Section):
    steps: Count = 300
    batch_tokens: Tokens = 8192  # of one optimizer step, over all workers
    micro_batch: Annotated[int, Field(ge=1, le=2**20)] = 8  # samples of one worker's pass
    clip_norm: Annotated[float, Field(ge=0, le=1e6)] = 1.0  # 0 does not clip
    activation_checkpointing: bool = False
    reproducible: bool = False
    log_every: Count = 10
    eval_every: Count = 100
    eval_samples: Count = 256
    save_every: Count = 100
    keep_last: Count = 3


class Cluster(Section):
    workers: Annotated[int, Field(ge=1, le=65536)] = 2
    cpus_per_worker: Annotated[int | float, BeforeValidator(_number), Field(gt=0, le=4096)] = 1
    gpus_per_worker: Annotated[Literal["auto"] | int | float, BeforeValidator(_auto_or(0, "GPUs"))] = "auto"
    max_failures: Annotated[int, Field(ge=0, le=2**31 - 1)] = 10
    hang_timeout: Annotated[Literal["auto"] | int | float, BeforeValidator(_auto_or(1, "seconds"))] = "auto"


class Tracking(Section):
    mlflow: Text | None = "sqlite:///mlflow.db"  # a tracking URI; None logs to files alone
    experiment: Text = "lowbit"


# What may change when a run of the same name goes on: it decides where and how a run is carried out and
# watched, never what it computes.
CHANGEABLE = (
    "cluster.",
    "tracking.",
    "run.dir",
    "data.cache",
    "train.log_every",
    "train.eval_every",
    "train.save_every",
    "train.keep_last",
)


class RunConfig(Section):
    """The whole configuration of one run."""

    run: Run = Run()
    model: Model = Model(preset="tiny")
    method: SerializeAsAny[MethodOptions]
    data: Data
    optimizer: Optimizer = Optimizer()
    schedule: Schedule = Schedule()
    precision: Literal["bf16", "fp32"] = "bf16"
    zero: Zero = Zero()
    train: Train = Train()
    cluster: Cluster = Cluster()
    tracking: Tracking = Tracking()

    @classmethod
    def load(
        cls, path: str | Path, overrides: Sequence[str], methods: Mapping[str, type[MethodOptions]]
    ) -> Self:
        """Read `path`, then apply `key=value` overrides with dotted names; the last of equal names counts."""
        data = read_yaml(path)
        for override in overrides:
            _apply_override(data, override)
        return cls.from_dict(data, methods)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], methods: Mapping[str, type[MethodOptions]]) -> Self:
        """Check a nested mapping, for instance a parsed YAML file; sections may be missing or None."""
        if not isinstance(data, Mapping):
            raise ConfigError(f"a configuration must be a mapping of sections, not {_show(data)}")
        sections: dict[str, Any] = {}
        for name, content in data.items():
            if name not in cls.model_fields:
                raise _unknown(None, name, methods)
            if name == "precision":
                sections[name] = content
                continue
            # An empty section of a file (`train:` with every line commented out) reads as None.
            content = {} if content is None else content
            if not isinstance(content, Mapping):
                raise ConfigError(
                    f"{name} ({_show(content)}) must be a section of names and values; "
                    f"{_section_example(name)}"
                )
            for field in content:
                if name != "method" and field not in _section_fields(name):
                    raise _unknown(name, field, methods)
            sections[name] = dict(content)
        sections["method"] = _method(sections.get("method", {}), methods)
        sections.setdefault("data", {})
        return _validated(cls, sections, ())

    @model_validator(mode="after")
    def _parts_fit(self) -> Self:
        model, data, method, zero = self.model, self.data, self.method, self.zero
        if data.seq_len > model.max_seq_len:
            raise ConfigError(
                f"data.seq_len ({data.seq_len:,}) must be at most model.max_seq_len {model.max_seq_len:,}; "
                f"write data.seq_len: {model.max_seq_len} or model.max_seq_len: {data.seq_len}"
            )
        self.accumulation(self.cluster.workers)
        if method.low_bit and zero.stage is not None:
            raise ConfigError(
                f"zero.stage ({zero.stage}) must be left out for method {method.name}, whose packed codes "
                "always run under packed ZeRO-3; it is for methods with latent weights, such as dense"
            )
        if not method.low_bit and zero.residency != "sharded":
            raise ConfigError(
                f"zero.residency ({zero.residency}) must be sharded for method {method.name}: only packed "
                "codes can be replicated; write zero.stage: 2 to keep whole weights on every worker"
            )
        if zero.stage in (1, 2) and self.optimizer.states == "int8":
            raise ConfigError(
                f"optimizer.states (int8) must not be used with zero.stage {zero.stage}: blocks of {BLOCK} "
                "elements cannot follow DeepSpeed's flat stage-1/2 partitions; write zero.stage: 3 or "
                "optimizer.states: fp32"
            )
        if self.train.reproducible and self.precision != "fp32":
            raise ConfigError(
                f"train.reproducible (true) must go with precision fp32, not {self.precision}: rounded to "
                "bf16, gradients depend on the number of workers; write precision: fp32"
            )
        return self

    def accumulation(self, world: int) -> int:
        """Micro-batches of each of `world` workers in one optimizer step."""
        per_pass = self.train.micro_batch * self.data.seq_len * world
        if self.train.batch_tokens % per_pass:
            raise ConfigError(
                f"train.batch_tokens ({self.train.batch_tokens:,}) must be a multiple of {per_pass:,} = "
                f"micro_batch {self.train.micro_batch} x seq_len {self.data.seq_len} x "
                f"{world} {'worker' if world == 1 else 'workers'}; "
                f"the nearest is {_nearest_multiple(self.train.batch_tokens, per_pass):,}"
            )
        return self.train.batch_tokens // per_pass

    @property
    def micro_batches(self) -> int:
        """Micro-batches of one optimizer step, over all workers."""
        return self.train.batch_tokens // (self.train.micro_batch * self.data.seq_len)

    @property
    def run_dir(self) -> Path:
        return self.run.dir / self.run.name

    def remarks(self) -> list[str]:
        """What is carried out as asked, but may not be what was meant: one line each."""
        found = []
        warmup, steps = self.schedule.warmup_steps, self.train.steps
        if warmup > steps:
            found.append(
                f"schedule.warmup_steps ({warmup:,}) is longer than the run of {steps:,} steps: "
                f"the learning rate ends at {steps / warmup:.0%} of optimizer.lr"
            )
        return found

    def to_dict(self) -> dict[str, Any]:
        """Nested, of plain YAML and JSON values; `from_dict` of it is an equal configuration."""
        return self.model_dump(mode="json")

    def to_yaml(self) -> str:
        """The whole configuration, defaults included; reading it gives an equal one."""
        return yaml.dump(
            self.to_dict(),
            Dumper=_Dumper,
            sort_keys=False,
            default_flow_style=None,
            allow_unicode=True,
            width=10**6,
        )

    def flat(self) -> dict[str, Any]:
        """Dotted name -> value, in the order of the sections."""
        flat: dict[str, Any] = {}
        for section, content in self.to_dict().items():
            if isinstance(content, dict):
                flat |= {f"{section}.{name}": value for name, value in content.items()}
            else:
                flat[section] = content
        return flat

    def differences(self, other: "RunConfig") -> list[str]:
        """`section.field: mine -> other's` for each field that must stay the same for a run to go on."""
        mine, others = self.flat(), other.flat()
        return [
            f"{name}: {_plain(mine.get(name))} -> {_plain(others.get(name))}"
            for name in dict.fromkeys((*mine, *others))
            if mine.get(name) != others.get(name) and not name.startswith(CHANGEABLE)
        ]


def _section_fields(name: str) -> Mapping[str, Any]:
    section = RunConfig.model_fields[name].annotation
    return section.model_fields if isinstance(section, type) and issubclass(section, BaseModel) else {}


def _section_example(name: str) -> str:
    examples = {"data": "path: data/stdlib", "method": "name: dqt", "model": "preset: tiny"}
    if name in examples:
        return f"write {name}: {{{examples[name]}}}"
    field, info = next(iter(_section_fields(name).items()))
    return f"write {name}: {{{field}: {_plain(info.default)}}}"


def _method(content: dict[Any, Any], methods: Mapping[str, type[MethodOptions]]) -> MethodOptions:
    name = content.get("name", "dqt")
    known = ", ".join(methods)
    if not isinstance(name, str) or name not in methods:
        nearest = _nearest(name, methods)
        answer = f"did you mean {nearest!r}?" if nearest else "write one of them"
        raise ConfigError(f"method.name ({_show(name)}) must be one of {known}; {answer}")
    options = methods[name]
    for field in content:
        if field not in options.model_fields:
            raise _unknown_option(name, field, methods)
    return _validated(options, {**content, "name": name}, ("method",))


def _unknown_option(method: str, field: Any, methods: Mapping[str, type[MethodOptions]]) -> ConfigError:
    known = [name for name in methods[method].model_fields if name != "name"]
    owners = [name for name, options in methods.items() if field in options.model_fields]
    start = f"method: unknown name {_show(field)}"
    if owners:
        return ConfigError(
            f"{start} for method {method}; it belongs to {', '.join(owners)}: leave it out "
            f"(method={{name: {method}}} drops a file's other options)"
        )
    if nearest := _nearest(field, (*known, "name")):
        return ConfigError(f"{start}; did you mean {nearest!r}?")
    return ConfigError(f"{start}; method {method} has {', '.join(known) if known else 'no options'}")


def _unknown(section: str | None, field: Any, methods: Mapping[str, type[MethodOptions]]) -> ConfigError:
    """The answer to a wrong name: the same name elsewhere, else the nearest here, else elsewhere."""
    elsewhere: dict[str, str] = {}
    for name in RunConfig.model_fields:
        for each in _section_fields(name):
            elsewhere.setdefault(each, f"{name}.{each}")
    for options in methods.values():
        for each in options.model_fields:
            elsewhere.setdefault(each, f"method.{each}")
    here = RunConfig.model_fields if section is None else _section_fields(section)
    start = f"{section}: unknown name {_show(field)}" if section else f"unknown name {_show(field)}"
    nearest: str | None
    if isinstance(field, str) and field in elsewhere:
        nearest = elsewhere[field]
    elif section is not None and field in RunConfig.model_fields:
        nearest = str(field)
    elif (nearest := _nearest(field, here)) is None and (far := _nearest(field, elsewhere)):
        nearest = elsewhere[far]
    if nearest:
        return ConfigError(f"{start}; did you mean {nearest!r}?")
    return ConfigError(f"{start}; known names are {', '.join(here)}")


def _validated(section: type[S], content: Mapping[str, Any], prefix: tuple[str, ...]) -> S:
    try:
        return section.model_validate(content)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=True)[0]
        raise ConfigError(_explained(section, dict(first), prefix)) from None


def _explained(section: type[Section], error: dict[str, Any], prefix: tuple[str, ...]) -> str:
    """One of pydantic's errors as `section.field (value) rule; what to write instead`."""
    info = None
    inside: Any = section
    place = ".".join(prefix)
    for part in error["loc"]:
        if isinstance(part, int):
            place += f"[{part}]"
        elif isinstance(inside, type) and issubclass(inside, BaseModel) and part in inside.model_fields:
            place += f".{part}" if place else part
            info = inside.model_fields[part]
            inside = info.annotation
    value, kind, context = error["input"], error["type"], error.get("ctx", {})
    if kind == "missing":
        example = "write data: {path: FOLDER}, a folder or URL written by `lowbit data prepare`"
        return f"{place} is required; {example if place == 'data.path' else 'add it'}"
    start = f"{place} ({_show(value)})"
    default = None if info is None or info.is_required() else info.default
    hint = "" if default is None else f", for example {_plain(default)}"
    if kind == "rule":
        return f"{start} {context['text']}" + (
            "" if ";" in context["text"] or not hint else f"; write one{hint}"
        )
    if kind == "literal_error":
        choices = [_plain(each) for each in _choices(inside)]
        nearest = _nearest(value, choices)
        rule = f"must be one of {', '.join(choices)}" if len(choices) > 1 else f"must be {choices[0]}"
        return f"{start} {rule}; " + (
            f"did you mean {nearest!r}?" if nearest else f"write {choices[0]}, for example"
        )
    if kind in ("int_type", "int_from_float", "int_parsing", "int_parsing_size"):
        if isinstance(value, float) and math.isfinite(value) and value.is_integer() and abs(value) < 2**63:
            return f"{start} must be a whole number; write {int(value)}"
        return f"{start} must be a whole number; write one{hint}"
    if kind in ("float_type", "float_parsing"):
        return f"{start} must be a number; write one{hint}"
    if kind == "finite_number":
        return f"{start} must be a finite number; write one{hint}"
    if kind in ("bool_type", "bool_parsing"):
        return f"{start} must be true or false; write {'false' if default is None else _plain(default)}"
    if kind == "string_type":
        return f"{start} must be text; {_quoted(value)}"
    limits = {
        "greater_than_equal": ("ge", "must be at least"),
        "greater_than": ("gt", "must be more than"),
        "less_than_equal": ("le", "must be at most"),
        "less_than": ("lt", "must be less than"),
    }
    if kind in limits:
        key, rule = limits[kind]
        limit = _plain(context[key])
        instead = (
            f"write {limit} or {'more' if key == 'ge' else 'less'}"
            if key in ("ge", "le")
            else f"write one{hint}"
        )
        return f"{start} {rule} {limit}; {instead}"
    return f"{start} is wrong: {error['msg']}"


def _choices(annotation: Any) -> list[Any]:
    """The values that a (nested, optional) Literal allows."""
    found: list[Any] = []
    for each in get_args(annotation):
        if each is type(None):
            found.append(None)
        elif get_args(each):
            found += _choices(each)
        else:
            found.append(each)
    return list(dict.fromkeys(found)) or ["something else"]


_repr = reprlib.Repr()
_repr.maxstring = _repr.maxother = _repr.maxlong = 60
_repr.maxlist = _repr.maxtuple = _repr.maxdict = _repr.maxset = 3
_repr.maxlevel = 2


def _show(value: Any) -> str:
    """A value as a message shows it: short, on one line, printable whatever it is."""
    if value is None or isinstance(value, bool):
        return _plain(value)
    try:
        return f"{value:,}" if isinstance(value, int) and abs(value) < 10**15 else _repr.repr(value)
    except Exception:  # a value whose own repr fails must not hide the mistake
        return f"a {type(value).__name__}"


def _plain(value: Any) -> str:
    """A value as it stands in YAML."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    return str(list(value)) if isinstance(value, tuple) else str(value)


def _quoted(value: Any) -> str:
    """What to write when a number or a list stands where text is meant."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        return f'put it in quotes: "{_show(value).replace(",", "")}"'
    return "write a word or a path"


def _nearest(word: Any, known: Any) -> str | None:
    found = difflib.get_close_matches(word.lower(), list(known), 1) if isinstance(word, str) else []
    return found[0] if found else None


def _nearest_multiple(value: int, unit: int) -> int:
    return max(1, (value + unit // 2) // unit) * unit


def _nearest_divisor(whole: int, value: int) -> int:
    divisors = {
        d for each in range(1, math.isqrt(whole) + 1) if whole % each == 0 for d in (each, whole // each)
    }
    return min(divisors, key=lambda divisor: (abs(divisor - value), -divisor))


_INT = re.compile(r"[-+]?[0-9](?:_?[0-9])*|0x[0-9a-fA-F]+")
_FLOAT = re.compile(
    r"[-+]?(?:[0-9][0-9_]*(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)"
)
# Longer runs of digits stay text: no count has them, and Python limits their conversion.
_SHORT = r"(?=[^\n]{1,40}\Z)"


class _Loader(yaml.SafeLoader):
    """YAML's core schema, without tags and aliases, every name once."""

    yaml_implicit_resolvers: dict[Any, Any] = {}  # noqa: RUF012 (as in the class above it)

    def compose_node(self, parent: Any, index: Any) -> Any:
        event = self.peek_event()  # type: ignore[no-untyped-call]
        if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None) is not None:
            raise yaml.composer.ComposerError(
                None, None, "anchors and aliases are not allowed; write the value itself", event.start_mark
            )
        if (tag := getattr(event, "tag", None)) is not None:
            raise yaml.composer.ComposerError(
                None, None, f"tags are not allowed ({_show(tag)}); write plain values", event.start_mark
            )
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        mapping: dict[Any, Any] = {}
        for key_node, value_node in node.value:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, str | int | float | None):
                raise yaml.constructor.ConstructorError(
                    None, None, f"a name must be a word, not {_show(key)}", key_node.start_mark
                )
            if key in mapping:
                raise yaml.constructor.ConstructorError(
                    None,
                    None,
                    f"{_show(key)} stands here a second time; keep one of them",
                    key_node.start_mark,
                )
            mapping[key] = self.construct_object(value_node, deep=deep)
        return mapping


class _Dumper(yaml.SafeDumper):
    """Quotes what `_Loader` would not read back as text."""

    yaml_implicit_resolvers: dict[Any, Any] = {}  # noqa: RUF012 (as in the class above it)

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _construct_int(loader: Any, node: Any) -> int:
    text = loader.construct_scalar(node).replace("_", "")
    return int(text, 16) if text.startswith("0x") else int(text)


def _construct_float(loader: Any, node: Any) -> float:
    text = loader.construct_scalar(node).replace("_", "").lower()
    return float(text.replace(".inf", "inf").replace(".nan", "nan"))


def _construct_mapping(loader: Any, node: Any) -> Any:
    return loader.construct_mapping(node, deep=True)


for _tag, _pattern, _first in (
    ("null", r"(?:~|null|Null|NULL|)\Z", ["~", "n", "N", ""]),
    ("bool", r"(?:true|True|TRUE|false|False|FALSE)\Z", list("tTfF")),
    ("int", rf"{_SHORT}(?:{_INT.pattern})\Z", list("-+0123456789")),
    ("float", rf"{_SHORT}(?:{_FLOAT.pattern})\Z", list("-+.0123456789")),
):
    for _class in (_Loader, _Dumper):
        _class.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(_pattern), _first)
_Loader.add_constructor("tag:yaml.org,2002:int", _construct_int)
_Loader.add_constructor("tag:yaml.org,2002:float", _construct_float)
_Loader.add_constructor("tag:yaml.org,2002:map", _construct_mapping)


def _parse(text: str, place: str) -> Any:
    """The value of a YAML text; `place` names it in messages."""
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f" line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise ConfigError(f"{place}{line}: {error.problem or error.context or 'not YAML'}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{place} is not YAML text: {str(error).splitlines()[0]}") from None
    except RecursionError:
        raise ConfigError(f"{place} is nested too deeply for a configuration; write plain sections") from None


def read_yaml(path: str | Path) -> dict[str, Any]:
    """The mapping that a configuration file holds; an empty file is an empty mapping."""
    path = Path(path)
    try:
        with path.open("rb") as file:
            raw = file.read(LARGEST_FILE + 1)
    except FileNotFoundError:
        raise ConfigError(f"{_file(path)} does not exist; write the path of a configuration file") from None
    except IsADirectoryError:
        raise ConfigError(
            f"{_file(path)} is a folder; write the path of a configuration file in it"
        ) from None
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise ConfigError(f"{_file(path)} cannot be read: {reason}") from None
    if len(raw) > LARGEST_FILE:
        raise ConfigError(
            f"{_file(path)} is larger than 1 MiB, which no configuration is; write another path"
        )
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"{_file(path)} is not UTF-8 text (byte {error.start:,}); save it as UTF-8"
        ) from None
    data = _parse(text, _file(path))
    if data is None:
        return {}
    if not isinstance(data, dict):
        raise ConfigError(
            f"{_file(path)} ({_show(data)}) must be a mapping of sections; "
            "write data: {path: FOLDER}, for example"
        )
    return data


def _file(path: Path) -> str:
    name = str(path)
    return name if name.isprintable() else repr(name)


def _apply_override(data: dict[str, Any], override: str) -> None:
    """Set one `section.field=value` (or `section={...}`) in the nested mapping `data`."""
    name, equals, text = override.partition("=")
    name = name.strip()
    parts = name.split(".")
    if not equals or not all(parts) or len(parts) > 2:
        instead = (
            f"write {parts[0]}.{parts[1]}=VALUE" if len(parts) == 2 and all(parts) else "write train.steps=20"
        )
        raise ConfigError(f"override ({_show(override)}) must be section.field=value; {instead}, for example")
    value = _parse(text, f"override {_show(override)}")
    if len(parts) == 1:
        data[name] = value
        return
    section, field = parts
    if section in RunConfig.model_fields and _is_text(section, field):
        # A shell takes quotes away: `run.name=2024` and `data.path=a: b` still mean text.
        empty = value is None and text.strip() in ("", "~", "null", "Null", "NULL")
        value = value if empty or isinstance(value, str) else text.strip()
    content = data.get(section)
    if content is None:
        content = data[section] = {}
    if isinstance(content, dict):  # if not, the section itself is the mistake, and is said to be
        content[field] = value


def _is_text(section: str, field: str) -> bool:
    info = _section_fields(section).get(field)
    kinds = (info.annotation, *get_args(info.annotation)) if info is not None else ()
    return any(kind in (str, Path) for kind in kinds)

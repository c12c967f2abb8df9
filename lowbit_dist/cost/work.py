"""What a model and its method ask of a GPU for each token, and for each use of a weight.

All of it is read from the model as the method has built it: which layers round their inputs or look at their
weight through a view, which parameters exist as codes, and on which grid these travel.
"""

from contextlib import suppress
from typing import Any, NamedTuple

from torch import nn

from lowbit_dist import experts
from lowbit_dist import model as models
from lowbit_dist.config import ConfigError, RunConfig
from lowbit_dist.grid import BLOCK
from lowbit_dist.linear import Linear


class Parameter(NamedTuple):
    numel: int
    wire: float  # bytes of an element in a gather
    is_code: bool
    state: float  # bytes of an element in the optimizer
    stored: float  # bytes of an element that an update reads and writes: codes, or weights in float32

    def padded(self, n: int) -> int:
        """Elements of n shards, which are whole blocks; a single one is the parameter itself."""
        return self.numel if n == 1 else -(-self.numel // (BLOCK * n)) * BLOCK * n


class Work(NamedTuple):
    """A model under a method; letters as in linear.py: K in_features, N out_features."""

    layers: int
    hidden: int  # width of the residual stream
    attention: int  # heads x head size
    key_values: int  # heads of keys, or of values, x head size
    intermediate: int  # width of the MLP
    linear: int  # weights of the blocks' linear layers
    head: int  # weights of the product that gives the logits
    vocabulary: int
    n_linear: int  # linear layers
    inputs: int  # sum of K over linear layers
    outputs: int  # sum of N
    rounded: int  # sum of K over those whose inputs are rounded
    n_rounded: int
    viewed: int  # weights that are seen through a view, as latent ones that are rounded in each pass
    n_viewed: int
    coded: int  # weights that are decoded for each use
    n_coded: int
    parameters: tuple[Parameter, ...]

    @classmethod
    def of(cls, config: RunConfig, vocab_size: int) -> "Work":
        """ConfigError for a model whose blocks are not known: a mixture of experts, or without such sizes."""
        model = models.shapes(config, vocab_size)
        sizes = _sizes(model)
        linear = set(models.linear_weights(model))
        low_bit = set(models.low_bit_names(model, config.method))
        layers = [(f"{name}.weight", module) for name, module in model.named_modules()]
        layers = [(name, module) for name, module in layers if name in linear]
        rounded = [m for _, m in layers if isinstance(m, Linear) and m.activation is not None]
        viewed = [m for _, m in layers if isinstance(m, Linear) and m.view is not None]
        coded = [m for name, m in layers if name in low_bit]
        head = model.get_output_embeddings()  # type: ignore[operator]
        weights = [m.weight for _, m in layers]
        return cls(
            **sizes,
            linear=sum(w.numel() for w in weights),
            head=head.weight.numel(),
            vocabulary=head.weight.shape[0],
            n_linear=len(layers),
            inputs=sum(w.shape[1] for w in weights),
            outputs=sum(w.shape[0] for w in weights),
            rounded=sum(m.weight.shape[1] for m in rounded),
            n_rounded=len(rounded),
            viewed=sum(m.weight.numel() for m in viewed),
            n_viewed=len(viewed),
            coded=sum(m.weight.numel() for m in coded),
            n_coded=len(coded),
            parameters=tuple(_parameters(config, model, linear, low_bit)),
        )

    @property
    def n_parameters(self) -> int:
        return sum(parameter.numel for parameter in self.parameters)

    def flops_per_token(self, seq_len: int, *, with_embedding: bool = False) -> float:
        """6 N + 12 L A S: forward and backward of N weights and of attention over all S positions, causal or
        not, with L layers of heads that are A wide in all (arXiv 2204.02311, appendix B).  What activation
        checkpointing computes again does not count.

        N has the head, but not the embedding, which is looked up (torchtitan's convention); `with_embedding`:
        all parameters (PaLM's own).
        """
        n = self.n_parameters if with_embedding else self.linear + self.head
        return 6 * n + 12 * self.layers * self.attention * seq_len


class Speed:
    """A run's tokens per second in words that runs can be compared by."""

    def __init__(self, config: RunConfig, vocab_size: int, peak: float | None):
        """peak: of each worker's GPU, FLOP/s; None: not known"""
        self._peak = peak
        self._flops: float | None = None  # of a token
        if self._peak is not None:
            with suppress(ConfigError):  # of a mixture of experts, whose tokens do not pass all weights
                self._flops = Work.of(config, vocab_size).flops_per_token(config.data.seq_len)

    def metrics(self, tokens_per_second: float, workers: int) -> dict[str, float | None]:
        """Of all workers and of each; `mfu`: of one GPU's peak the share that its tokens are worth, None if
        the peak or the model's FLOPs are not known, as on CPUs.
        """
        of_one = tokens_per_second / workers
        return {
            "tokens_per_second": tokens_per_second,
            "tokens_per_second_per_worker": of_one,
            "mfu": None if self._peak is None or self._flops is None else of_one * self._flops / self._peak,
        }


def _sizes(model: nn.Module) -> dict[str, int]:
    config: Any = model.config
    named = f"the model ({type(model).__name__})"
    if experts.number(model) > 1:
        raise ConfigError(
            f"{named} has experts, of which the cost model knows nothing; leave --gpus out, or write a model "
            "without"
        )
    config = config.get_text_config()
    try:
        hidden, heads = config.hidden_size, config.num_attention_heads
        layers = config.num_hidden_layers
    except AttributeError as error:
        raise ConfigError(
            f"{named} does not say its sizes ({error}), which the cost model needs; leave --gpus out, or "
            "write a model.preset"
        ) from None
    size = getattr(config, "head_dim", None) or hidden // heads
    return {
        "layers": layers,
        "hidden": hidden,
        "attention": heads * size,
        "key_values": (getattr(config, "num_key_value_heads", None) or heads) * size,
        "intermediate": getattr(config, "intermediate_size", None) or 4 * hidden,
    }


def _parameters(config: RunConfig, model: nn.Module, linear: set[str], low_bit: set[str]) -> list[Parameter]:
    itemsize = 4 if config.precision.compute == "fp32" else 2
    stages = config.method.stages(config.train.steps)
    parameters = []
    for name, p in model.named_parameters():
        shape, rule = tuple(p.shape), config.optimizer.of(is_linear=name in linear)
        wire, stored = float(itemsize), 4.0 + (itemsize if itemsize < 4 else 0)
        if name in low_bit:
            # Of a method that changes in training, the stage that moves the most.
            wire = max(stage.sent_grid.bytes_per_parameter for stage in stages if stage.sent_grid is not None)
            assert config.method.stored is not None, "a low-bit parameter is stored on a grid"
            stored = config.method.stored.bytes_per_parameter
            if (kept := config.method.accumulator) is not None:
                stored += kept.dtype.itemsize
        state = rule.state_bytes(shape) / p.numel()
        parameters.append(Parameter(p.numel(), wire, name in low_bit, state, stored))
    return parameters

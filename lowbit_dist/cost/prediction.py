"""One optimizer step on GPUs, by a model of what bounds it.

    step        = micro-batches x [ pass + what communication exceeds it + the queue's drain ] + norm + update
    pass        = the longer of what the GPU computes and what the host takes to tell it
    the GPU     = products + attention + elementwise passes + rounding + decoding + loss
    on the wire = each weight gathered for each use (ZeRO-3), gradients reduced in each micro-batch

Checked against the published figures of torchtitan's Llama 3.1 8B on eight H100 (tests/test_cost.py); of
this package there is no figure of several GPUs to check it against.
"""

from typing import Any, NamedTuple

from lowbit_dist.config import RunConfig
from lowbit_dist.cost.hardware import GPUS, Gpu, bus_bandwidth, constant, latency
from lowbit_dist.cost.work import Parameter, Work

# Of fused attention, of which a causal mask leaves half: products forward and, computed anew, backward.
_ATTENTION_PASSES = (1.0, 2.5)
_USES = (
    2  # of a parameter in a micro-batch: a block that is computed again stays gathered for its backward pass
)
_SYNCHRONISATIONS = 7  # of the host in a step


class Execution(NamedTuple):
    """How the engine runs blocks.  Bytes are read and written, of elements of one token, forward and back."""

    name: str
    hidden: float  # bytes for each element of the residual stream and layer: norms and additions
    rotary: float  # bytes for each element of queries and keys
    intermediate: float  # bytes for each element between the MLP's products
    rounding: float  # bytes for each element of a layer's input that is rounded to 8 bits
    view: float  # bytes for each weight that is seen through a view, and use
    cast: float  # bytes for each operand's element that is rounded to 8-bit floats
    logits: float  # bytes for each logit
    shares_inputs: bool  # q, k and v round their input once, gate and up, too
    norm: float  # bytes for each gradient
    operations: float  # of a layer in a micro-batch
    per_rounding: float  # operations more for each layer that rounds its inputs
    per_view: float  # and for each that looks at its weight
    modules: float  # hooked, of a layer
    hook_seconds: float


EAGER = Execution(
    "eager", hidden=220, rotary=120, intermediate=34, rounding=6, view=56, cast=16, logits=34,
    shares_inputs=True, norm=4, operations=121, per_rounding=2, per_view=25, modules=1,
    hook_seconds=constant("hook"),
)  # fmt: skip
COMPILED = Execution(
    "compiled", hidden=52, rotary=16, intermediate=14, rounding=4, view=8, cast=4, logits=20,
    shares_inputs=True, norm=4, operations=60, per_rounding=0, per_view=0, modules=1,
    hook_seconds=constant("hook"),
)  # fmt: skip


def execution_of(config: RunConfig) -> Execution:
    """How the engine runs this configuration; a run that is worth predicting is long enough for `auto`."""
    return EAGER if config.train.compile == "off" else COMPILED


def predict(
    config: RunConfig,
    vocab_size: int,
    n: int,
    gpu: Gpu,
    *,
    execution: Execution | None = None,  # None: as the configuration says
    recomputed: float | None = None,  # share of the forward pass that is computed again; None: likewise
) -> dict[str, Any]:
    """One step of the run on n GPUs: seconds, tokens per second, MFU, bytes received by each GPU, and what
    bounds it.  ConfigError if n does not divide the batch.
    """
    work, execution = Work.of(config, vocab_size), execution or execution_of(config)
    passes = config.accumulation(n)
    if recomputed is None:
        recomputed = float(config.train.activation_checkpointing)
    tokens = config.train.micro_batch * config.data.seq_len
    computed = _gpu_seconds(config, work, gpu, tokens, execution, recomputed)
    seconds, host = sum(computed.values()), _host_seconds(work, execution, recomputed)
    moved = wire_bytes(config, work, n)
    network = _network_seconds(config, work, n, gpu, moved)
    longer, hidden = max(seconds, host), constant("overlap")
    exceeding = max(0.0, network - hidden * longer)
    of_pass = longer + exceeding + (1 - hidden) * network + constant("micro_batch")
    update = _update_seconds(work, n, gpu, execution)
    step = passes * of_pass + update
    per_gpu = passes * tokens / step
    flops = work.flops_per_token(config.data.seq_len)
    return {
        "gpus": n,
        "micro_batches": passes,
        "step_seconds": step,
        "tokens_per_second": n * per_gpu,
        "tokens_per_second_per_gpu": per_gpu,
        "mfu": per_gpu * flops / gpu.bf16,
        "wire_bytes_per_gpu": sum(moved.values()),
        "wire": moved,
        "bound": "network" if exceeding else "host" if host > seconds else "gpu",
        "seconds": {
            "micro_batch": of_pass, "gpu": computed, "host": host, "network": network, "update": update
        },
    }  # fmt: skip


def wire_bytes(config: RunConfig, work: Work, n: int) -> dict[str, float]:
    """What each of n GPUs receives in a step, and sends: codes and weights gathered, gradients reduced."""
    share, passes = (n - 1) / n, config.accumulation(n)
    itemsize = 4 if config.precision.compute == "fp32" else 2
    numel = sum(p.padded(n) for p in work.parameters)
    stage = 3 if config.zero.stage is None else config.zero.stage
    if stage < 3:  # weights once a step, after the update; stage 0 keeps all, and reduces to everyone
        weights = 0.0 if stage == 0 else 1.0 * numel * itemsize
        reduced = (2.0 if stage == 0 else 1.0) * numel * itemsize * (passes if stage == 2 else 1)
        return {"codes": 0.0, "weights": share * weights, "gradients": share * reduced}

    def gathered(p: Parameter) -> float:
        if p.is_code and config.zero.residency == "replicated":
            return p.padded(n) * p.wire
        return passes * _USES * p.padded(n) * p.wire

    of_gradient = 8 if config.train.reproducible else itemsize
    return {
        "codes": share * sum(gathered(p) for p in work.parameters if p.is_code),
        "weights": share * sum(gathered(p) for p in work.parameters if not p.is_code),
        "gradients": share * numel * of_gradient * passes,
    }


def _gpu_seconds(
    config: RunConfig, work: Work, gpu: Gpu, tokens: int, execution: Execution, recomputed: float
) -> dict[str, float]:
    """Of one micro-batch."""
    forwards, bandwidth = 1 + recomputed, gpu.bandwidth * constant("memory_efficiency")
    is_fp32, is_fp8 = config.precision.compute == "fp32", config.precision.matmul == "fp8"
    plain = gpu.fp32 * constant("fp32_efficiency") if is_fp32 else gpu.bf16 * constant("bf16_efficiency")
    rate = plain if gpu.fp8 is None or not is_fp8 else gpu.fp8 * constant("fp8_efficiency")
    forward = gpu.int8 * constant("int8_efficiency") if config.precision.matmul == "int8" else rate
    of_input = forward if config.precision.grad_input == "int8" else rate
    wide = 2 if is_fp32 else 1  # elements of float32 are twice as long
    attention = plain if is_fp32 else gpu.bf16 * constant("attention_efficiency")
    scores = 4 * tokens * config.data.seq_len * work.attention * work.layers / 2  # of a causal mask
    first, back = _ATTENTION_PASSES
    # Distinct inputs of a LLaMA's block: of q, k and v; of o; of gate and up; of down.
    distinct = work.layers * (2 * work.hidden + work.attention + work.intermediate)
    inputs = distinct if execution.shares_inputs else work.inputs
    rounded = work.rounded * (inputs / work.inputs)
    elementwise = work.layers * (
        execution.hidden * work.hidden
        + execution.rotary * (work.attention + work.key_values)
        + execution.intermediate * work.intermediate
    )
    uses = forwards + 1
    casts = 0.0
    if is_fp8:  # activations in each forward pass and for dW; gradients for dX and dW; weights in each use
        of_tokens = inputs * (forwards + 1) + (1 if execution.shares_inputs else 2) * work.outputs
        casts = execution.cast * (tokens * of_tokens + work.linear * uses)
    if config.precision.grad_input == "int8":  # gradients are read, and written in bytes
        casts = (2 * wide + 1) * tokens * work.outputs
    decoding = sum(p.numel * (p.wire + 2 * wide) for p in work.parameters if p.is_code) * uses
    return {
        "products": 2 * tokens * work.linear * (forwards / forward + 1 / of_input + 1 / rate),
        "head": 6 * tokens * work.head / plain,
        "attention": scores * (first * forwards + back) / attention,
        "elementwise": wide * tokens * elementwise / bandwidth,
        "rounding": (wide * tokens * execution.rounding * rounded * forwards + casts) / bandwidth,
        "views": wide * execution.view * work.viewed * uses / bandwidth,
        "decoding": decoding / (gpu.bandwidth * constant("decode_efficiency")),
        "loss": wide * tokens * execution.logits * work.vocabulary / bandwidth,
    }


def _host_seconds(work: Work, execution: Execution, recomputed: float) -> float:
    """Of one micro-batch: to launch its operations and to run hooks."""
    operations = work.layers * execution.operations * (1 + 0.35 * recomputed) + 68
    operations += execution.per_rounding * work.n_rounded + execution.per_view * work.n_viewed
    hooks = (work.layers * execution.modules + 8) * (1 + 0.5 * recomputed)
    return operations * constant("operation") + hooks * execution.hook_seconds


def _network_seconds(
    config: RunConfig,
    work: Work,
    n: int,
    gpu: Gpu,
    moved: dict[str, float],
) -> float:
    """Of one micro-batch, its share of what happens once a step included."""
    if n == 1:
        return 0.0
    gathers = 0 if config.zero.stage in (0, 1, 2) else _USES * (work.layers + 2)
    collectives = gathers + work.layers + 2
    bytes_of_pass = sum(moved.values()) / config.accumulation(n)
    return collectives * latency(n) + bytes_of_pass / bus_bandwidth(gpu, n)


def _update_seconds(work: Work, n: int, gpu: Gpu, execution: Execution) -> float:
    """Gradient norm and update of one GPU's shards."""
    bandwidth = gpu.bandwidth * constant("memory_efficiency")
    numel = sum(p.padded(n) for p in work.parameters) / n
    norm = numel * execution.norm / bandwidth
    launches = len(work.parameters) * constant("kernel")
    update = sum(_seconds_of(p, gpu) * p.padded(n) / n for p in work.parameters)
    waits = _SYNCHRONISATIONS * constant("synchronisation")
    return norm + max(update, launches) + waits + 4 * latency(n)


def _seconds_of(parameter: Parameter, gpu: Gpu) -> float:
    """Of an update of one element: by the bytes that move, and of a code at least by its instructions."""
    moved = 2 * (parameter.stored + parameter.state) + 4
    by_bytes = moved / (gpu.bandwidth * constant("memory_efficiency"))
    if not parameter.is_code:
        return by_bytes
    states = "int8" if parameter.state < 3 else "bf16" if parameter.state < 6 else "fp32"
    return max(by_bytes, constant(f"update_{states}") * GPUS["H100"].instructions / gpu.instructions)

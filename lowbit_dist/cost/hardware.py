"""GPUs as their data sheets describe them, and what is measured or assumed of how much of that is reached.

Units: FLOP/s, bytes per second, bytes, seconds.
"""

from typing import Literal, NamedTuple

import torch

GPUS_OF_A_MACHINE = 8  # of every HGX and DGX board of these kinds


class Gpu(NamedTuple):
    """One kind of GPU, by the data sheet of its SXM module; products without sparsity."""

    name: str
    bf16: float  # FLOP/s, sums in float32
    fp32: float  # FLOP/s, without TF32, as PyTorch multiplies by default
    fp8: float | None  # FLOP/s; None: it cannot
    int8: float  # operations/s, of integers
    bandwidth: float  # bytes/s, of its memory
    memory: int  # bytes
    nvlink: float  # bytes/s, one way, to the others of its machine
    network: (
        float  # bytes/s, one way, of a machine's adapters: assumed, one for each GPU (400, A100 200 Gb/s)
    )
    instructions: float  # cycles/s of all its multiprocessors together


GPUS: dict[str, Gpu] = {
    gpu.name: gpu
    for gpu in (
        Gpu(
            "H100", 989.4e12, 66.9e12, 1978.9e12, 1978.9e12, 3.35e12, 80 * 10**9, 450e9, 400e9, 132 * 1.755e9
        ),
        Gpu(
            "H200", 989.4e12, 66.9e12, 1978.9e12, 1978.9e12, 4.8e12, 141 * 10**9, 450e9, 400e9, 132 * 1.755e9
        ),
        Gpu("A100", 312e12, 19.5e12, None, 624e12, 2.039e12, 80 * 10**9, 300e9, 200e9, 108 * 1.41e9),
        Gpu("B200", 2250e12, 75e12, 4500e12, 4500e12, 7.7e12, 180 * 10**9, 900e9, 400e9, 148 * 1.85e9),
    )
}
# Words in a device's name that make it another product than the one that the data sheet is of.
_OTHERS = {"PCIE", "NVL", "MIG"}


class Constant(NamedTuple):
    """A number of the model, and why it is believed."""

    value: float
    unit: str
    source: Literal["data sheet", "measured", "assumed"]
    why: str


CONSTANTS: dict[str, Constant] = {
    "bf16_efficiency": Constant(
        0.65, "of the peak", "assumed", "large bf16 products under power limits; published runs reach 33 to "
        "39 % MFU in all on parts of 500 W",
    ),
    "fp8_efficiency": Constant(0.50, "of the peak", "assumed", "as int8 products of Triton on other GPUs"),
    "int8_efficiency": Constant(
        0.45, "of the peak", "measured", "products of 1b's widest layers and 32,768 tokens on one H200"
    ),
    "fp32_efficiency": Constant(0.80, "of the peak", "assumed", "large float32 products without TF32"),
    "attention_efficiency": Constant(0.50, "of the bf16 peak", "assumed", "fused attention, both passes"),
    "memory_efficiency": Constant(0.82, "of the bandwidth", "measured", "a copy on one H100: 2.75 TB/s"),
    "decode_efficiency": Constant(
        0.56, "of the bandwidth", "measured", "ternary codes to bf16 on one H100: 1.2 ps a weight"
    ),
    "update_int8": Constant(8.2e-12, "s", "measured", "AdamW of a code with 8-bit states on one H100"),
    "update_bf16": Constant(5.7e-12, "s", "measured", "the same with bf16 states"),
    "update_fp32": Constant(7.7e-12, "s", "measured", "the same with fp32 states"),
    "link_efficiency": Constant(0.80, "of NVLink", "assumed", "NCCL's bus bandwidth inside a machine"),
    "network_efficiency": Constant(0.90, "of the adapters", "assumed", "the same between machines"),
    "collective": Constant(22e-6, "s", "assumed", "latency of a collective inside a machine"),
    "collective_machine": Constant(6e-6, "s", "assumed", "more for each further machine (ring)"),
    "operation": Constant(7e-6, "s", "assumed", "the host for one operation with its gradient and launch"),
    "hook": Constant(
        0.35e-3, "s", "assumed", "the host for DeepSpeed's hooks, for each module and micro-batch: half of "
        "0.68 ms, measured on a slow CPU",
    ),
    "kernel": Constant(18e-6, "s", "assumed", "the host for a launch with some thirty arguments"),
    "micro_batch": Constant(1.5e-3, "s", "assumed", "an empty queue at both ends of a micro-batch"),
    "synchronisation": Constant(40e-6, "s", "assumed", "the host waits for the GPU, seven times a step"),
    "overlap": Constant(0.9, "of communication", "assumed", "hidden behind as much computation"),
}  # fmt: skip


def constant(name: str) -> float:
    return CONSTANTS[name].value


def gpu_of(device_name: str) -> Gpu | None:
    """The kind of a device by the name that its driver gives it; None if its peaks are not known here."""
    words = set(device_name.upper().replace("-", " ").split())
    if words & _OTHERS:
        return None
    return next((gpu for name, gpu in GPUS.items() if name in words), None)


def peak_flops(device: torch.device) -> float | None:
    """What a device could multiply in bf16, FLOP/s; None of a CPU, or of a GPU that is not known here."""
    if device.type != "cuda":
        return None
    gpu = gpu_of(torch.cuda.get_device_name(device))
    return gpu and gpu.bf16


def bus_bandwidth(gpu: Gpu, n: int) -> float:
    """Bytes per second that each of n GPUs receives in a gather, or in a reduce-scatter."""
    inside = gpu.nvlink * constant("link_efficiency")
    between = gpu.network * constant("network_efficiency")
    return inside if n <= GPUS_OF_A_MACHINE else min(inside, between)


def latency(n: int) -> float:
    """Seconds of a collective that moves nothing."""
    machines = -(-n // GPUS_OF_A_MACHINE)
    return constant("collective") + (machines - 1) * constant("collective_machine")

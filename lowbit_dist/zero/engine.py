"""A model under ZeRO: the interface of the training loop.

with engine.step(now, limit) as step:          the numbers of a step are known before its passes
    loss = step.backward(tokens)               of each micro-batch
step.done                                      what the update did
"""

import importlib
import math
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from deepspeed.runtime.config import DeepSpeedConfig
from deepspeed.runtime.zero import stage3
from deepspeed.utils import set_z3_leaf_module
from torch import Tensor, nn

from lowbit_dist import attention, ops, products
from lowbit_dist.compiled import compile_blocks
from lowbit_dist.config import RunConfig
from lowbit_dist.linear import values
from lowbit_dist.loss import chunk_loss
from lowbit_dist.model import DTYPES, blocks_of
from lowbit_dist.tokenizer import Marks
from lowbit_dist.zero import first
from lowbit_dist.zero.contract import DeepSpeedEngine, check_deepspeed, deepspeed
from lowbit_dist.zero.gathers import gathered_alone, lay_wires, packed_of
from lowbit_dist.zero.shards import Initial, Partitioner
from lowbit_dist.zero.stage3 import Moving, PackedZero3, Update
from lowbit_dist.zero.standard import RuleOptimizer, StandardZero, materialize

SUMS = {8: torch.float64, 4: torch.float32, 2: torch.bfloat16}  # of gradients, by bytes


class Engine:
    """A model under ZeRO, trained step by step."""

    def __init__(
        self,
        config: RunConfig,
        model: nn.Module,  # on the meta device, from `model.build`
        initial: Initial | None,  # None: weights are zeros until `initialize`, or a checkpoint, fills them
        low_bit: Sequence[str],  # names of the parameters that exist only as codes
        marks: Marks | None = None,  # around the documents within which attention is to stay
    ):
        check_deepspeed()
        _init_comm()
        self.config, self.method = config, config.method.at(1, config.train.steps)
        self.world, self.rank = dist.get_world_size(), dist.get_rank()
        self.device = _device()
        self.micro_batches = config.micro_batches
        self.is_compiled = False
        if config.train.activation_checkpointing:
            model.gradient_checkpointing_enable(  # type: ignore[operator]
                gradient_checkpointing_kwargs={"use_reentrant": False}
            )
        chunk_loss(model)
        shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}  # before they are partitioned
        self.numels = {name: math.prod(shape) for name, shape in shapes.items()}
        self.low_bit = sorted(low_bit)
        self.linear_weights = sorted(model.linear_weights)  # type: ignore[arg-type]  # of layers that are not the head
        products.choose_(config, model)
        self.left_open = products.left_open(config, model)  # layers of which `products.settle_` decides
        stage = 3 if config.zero.stage is None else config.zero.stage
        settings = deepspeed_settings(config, model, stage, self.world)
        self._dtype = dtype = DTYPES[config.precision.compute]
        self._marks = marks
        if stage == 3:
            for block in blocks_of(model):
                set_z3_leaf_module(block, True)  # fetched and released as one
                _add_up_in_norms(block)
            self._partitioner = Partitioner(settings, dtype, replicated=config.zero.residency == "replicated")
            self._partitioner.adopt(model, self.method, set(low_bit))
        else:
            materialize(model, self.device, dtype)
        groups = _parameter_groups(model)
        moving = self._moving(shapes)
        optimizer = _Unused(groups) if stage == 3 else RuleOptimizer(groups, config, stage, moving)
        stage3_class = partial(
            PackedZero3,
            accumulation=SUMS[config.gradient_bytes(self.world)],
            releases=config.train.gradient_release,
        )
        self._engine = _DeepSpeedEngine(model, optimizer, settings, stage3_class)
        self.module: nn.Module = self._engine.module
        self._standard: StandardZero | None = None
        if isinstance(optimizer, RuleOptimizer):
            self._standard = StandardZero(self._engine, optimizer, stage)
            self.shards = self._standard.shards
        else:
            self.shards = self._engine.optimizer.make_shards(config, self.method, sorted(self.numels), moving)
        if initial is not None:
            self.initialize(initial)

    def initialize(self, initial: Initial, heartbeat: Callable[[], object] = lambda: None) -> None:
        """Give all weights their first values, of step 1; on every worker.  `heartbeat` is called after each
        tensor.
        """
        is_cut = self._standard is None
        first.fill(self.shards, initial, self.method, self._dtype, is_cut=is_cut, heartbeat=heartbeat)
        self.refresh(1)

    def _moving(self, shapes: dict[str, tuple[int, ...]]) -> dict[str, Moving]:
        """How each parameter is updated."""
        linear, chosen, method = set(self.linear_weights), self.config.optimizer, self.config.method
        return {
            name: Moving(
                chosen.of(is_linear=name in linear),
                chosen.rates(method, name, shape, is_linear=name in linear),
            )
            for name, shape in shapes.items()
        }

    @contextmanager
    def step(
        self, now: ops.Now, limit: float = math.inf, *, details: bool = False, previous_norm: float = 0.0
    ) -> Iterator["Step"]:
        """One optimizer step: inside, the passes; when it ends, the update with their mean gradient, clipped
        to `train.clip_norm`.

        If the gradient's norm is not finite or above `limit`, or the step was dropped, nothing changes and
        the gradient is lost.  An exception inside leaves everything as it is.  With `details`, the update
        tells the gradient's norm and the flips of each parameter, too.

        Under `train.gradient_release` the passes update: parameters whose gradients come before one that is
        not finite or lifts the norm above `limit`, before the step is dropped or before an exception, stay
        updated (`Update.n_released`).  Clipped is as a gradient of `previous_norm` would be; 0: not at all.
        """
        self.turn(now.step)
        if self._standard is None:
            self._engine.optimizer.begin(now, limit, details=details, previous_norm=previous_norm)
        step = Step(self)
        yield step
        step.done = self._update(now, -1.0 if step.is_dropped else limit, details)  # no norm is below 0

    def _read(self, numbers: Tensor) -> Tensor:
        if self._standard is not None or self.config.train.gradient_release:
            return numbers.cpu()  # the norm is not known yet, or is already
        optimizer = self._engine.optimizer
        read = torch.cat([numbers, optimizer.gradient_norm()]).cpu()
        optimizer.norms = [read[-1].item()]
        return read[:-1]

    def _update(self, now: ops.Now, limit: float, details: bool = False) -> Update:
        if self._standard is not None:
            return self._standard.step(now, limit, details=details)
        optimizer = self._engine.optimizer
        optimizer.limit = limit
        self._engine.step()
        update: Update = optimizer.last_update
        return update

    def _backward(self, tokens: Tensor, labels: Tensor | None, weight: float) -> Tensor:
        loss = self._loss(tokens, labels)
        loss = loss if weight == 1.0 else weight * loss
        if self._standard is None:
            self._engine.backward(loss, scale_wrt_gas=False)
        else:
            self._engine.backward(loss)
        self._last = loss.detach()
        if not self._engine.is_gradient_accumulation_boundary():
            self._engine.step()  # counts the micro-batch
        return self._last

    def _loss(self, tokens: Tensor, labels: Tensor | None) -> Tensor:
        labels = tokens if labels is None else labels.to(tokens.device, non_blocking=True)
        mask = {} if self._marks is None else attention.within_documents(tokens, self._marks, self._dtype)
        with attention.causal(self.module):
            loss: Tensor = self._engine(input_ids=tokens, labels=labels, **mask).loss
        return loss

    def forward(self, tokens: Tensor, labels: Tensor | None = None) -> Tensor:  # -> [] nats per token
        """The mean negative log-likelihood without gradients, in evaluation mode; of `Step.backward`'s
        arguments.
        """
        self._engine.eval()
        with torch.no_grad():
            loss = self._loss(tokens, labels)
        self._engine.train()
        if self._standard is None:
            self._engine.optimizer._partition_all_parameters()  # what was gathered ahead for a backward pass
        return loss.detach()

    def turn(self, step: int) -> None:
        """Make the forward pass see what the method shows it in step `step`; on every worker."""
        if self.config.method.at(step, self.config.train.steps) != self.method:
            self.refresh(step)

    def refresh(self, step: int) -> None:
        """The same of shards that were changed from outside (by loading)."""
        before, self.method = self.method, self.config.method.at(step, self.config.train.steps)
        if self._standard is not None:
            self._standard.refresh()
            return
        self._engine.optimizer.method = self.method
        self._engine.optimizer.refresh()
        if self.method.sent_grid != before.sent_grid:
            lay_wires(self.module)

    @contextmanager
    def full_weight(self, name: str) -> Iterator[Tensor]:
        """A weight as its layer sees it, [N, K] in the compute precision; on every worker at once."""
        owner, _, key = name.rpartition(".")
        param: Any = self.module.get_submodule(owner)._parameters[key]
        if self._standard is not None:
            yield param.detach()
            return
        with torch.no_grad(), gathered_alone(param):
            yield values(param)

    def compile(self, heartbeat: Callable[[], object]) -> None:
        """Let the training passes of the model's blocks run compiled from now on (compiled.py)."""
        compile_blocks(self.module, heartbeat)
        self.is_compiled = True

    def gradients(self) -> list[Tensor]:
        """Tensors that hold gradients between steps."""
        if self._standard is None:
            return [self._engine.optimizer.grad_partitions_flat_buffer]
        return self._standard.gradients()

    def forward_weights(self) -> list[Tensor]:
        """Resident weights of the compute precision (in float32 the same storages as those of `shards`)."""
        if self._standard is None:
            return [p.ds_tensor for p in self.module.parameters() if packed_of(p) is None]  # type: ignore[attr-defined]
        return [p.data for p in self.module.parameters()]

    def resident_codes(self) -> list[Tensor]:
        """The packed bytes that this worker keeps between steps."""
        packed = filter(None, map(packed_of, self.module.parameters()))
        return [codes for weights in packed for codes in weights.resident]

    def sent_scales(self) -> list[Tensor]:
        """Those of the codes that gathers move; where these are the stored ones, the shards' own."""
        packed = filter(None, map(packed_of, self.module.parameters()))
        return [weights.sent.scale for weights in packed]

    def gathered(self) -> Iterator[Tensor]:
        """What the parameters hold now: values, or the codes that a layer decodes."""
        for p in self.module.parameters():
            packed = packed_of(p)
            yield p.data if packed is None or packed.whole is None else packed.whole

    @property
    def gathered_bytes(self) -> int:
        """Packed bytes that this worker received in gathers since the start."""
        return self._partitioner.gathered_bytes if self._standard is None else 0

    def close(self) -> None:
        """Remove DeepSpeed's hooks, so that another engine can be made in this process."""
        self._engine.destroy()
        if self.is_compiled:
            torch._dynamo.reset()


class Step:
    """The passes of one optimizer step, and then what its update did."""

    done: Update  # once the step has ended

    def __init__(self, engine: Engine):
        self.engine = engine
        self.is_dropped = False

    def backward(
        self,
        tokens: Tensor,  # [micro_batch, seq_len] int64
        labels: Tensor | None = None,  # tokens, or data.IGNORED where the loss leaves one out
        weight: float = 1.0,
    ) -> Tensor:  # [] nats per token
        """Forward and backward of one micro-batch, whose gradients are added to the step's sum; `weight`
        times its mean negative log-likelihood.  Without `labels` the loss counts every token.
        """
        return self.engine._backward(tokens, labels, weight)

    def read(self, numbers: Tensor) -> Tensor:  # [n] float64 -> the same on the host
        """When the passes are over: these numbers, and in one copy with them the norm that decides about the
        update, if it is known only now; DeepSpeed's own stages have it later.  Nothing else waits.
        """
        return self.engine._read(numbers)

    def drop(self) -> None:
        """Leave this step's update out; what `train.gradient_release` has updated stays so."""
        self.is_dropped = True


class _DeepSpeedEngine(DeepSpeedEngine):
    """DeepSpeed's engine, with our class in the place of its stage-3 optimizer."""

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        settings: dict[str, Any],
        stage3_class: Callable[..., Any],
    ):
        object.__setattr__(self, "_stage3_class", stage3_class)  # nn.Module is not initialised yet
        super().__init__(
            args=None,
            model=model,
            optimizer=optimizer,
            config=settings,
            config_class=DeepSpeedConfig(settings),
            dont_change_device=False,
        )

    def _configure_zero_optimizer(self, optimizer: Any) -> Any:
        # It is imported beside the class replaced here and derives from it, so it must be imported before.
        importlib.import_module("deepspeed.runtime.superoffload.superoffload_stage3")
        with patch.object(stage3, "DeepSpeedZeroOptimizer_Stage3", self._stage3_class):
            return super()._configure_zero_optimizer(optimizer)


def deepspeed_settings(config: RunConfig, model: nn.Module, stage: int, world: int) -> dict[str, Any]:
    """DeepSpeed's configuration, derived from the model, so that a user never meets it."""
    largest = max(p.numel() for p in model.parameters())
    block = block_numel(model)
    zero: dict[str, Any] = {"stage": stage, "overlap_comm": torch.cuda.is_available() and world > 1}
    if stage == 3:
        zero |= {
            "stage3_param_persistence_threshold": 0,  # every parameter is a shard
            # Beside what works, the next is gathered: packed bytes only, for decoding waits for the layer.
            "stage3_max_live_parameters": 2 * block,
            "reduce_bucket_size": block,
            "contiguous_gradients": False,  # else a dense bucket is allocated for good
            "sub_group_size": 10**15,  # shards are updated one by one anyway
        }
    elif stage > 0:
        zero |= {"reduce_bucket_size": max(block, largest), "allgather_bucket_size": max(block, largest)}
    settings: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": config.train.micro_batch,
        "gradient_accumulation_steps": config.micro_batches // world,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 10**12,
        "gradient_clipping": 0.0,  # our optimizers clip: the norm also says whether to step at all
        "timers": {"throughput": {"enabled": False}},  # it would wait for the device twice a micro-batch
    }
    if config.precision.compute != "fp32":
        settings["bf16"] = {"enabled": True}
        # Stages 0 and 1 would add up in bf16, and are refused where there is something to add up.
        sums = "fp32" if stage == 2 and SUMS[config.gradient_bytes(world)] == torch.float32 else "bf16"
        settings["data_types"] = {"grad_accum_dtype": sums}
    return settings


def block_numel(model: nn.Module) -> int:
    """Parameters of the largest transformer block: the unit in which dense weights are alive."""
    return max((sum(p.numel() for p in block.parameters()) for block in blocks_of(model)), default=1)


def _parameter_groups(model: nn.Module) -> list[dict[str, Any]]:
    """Low-bit parameters apart from the others, as DeepSpeed's sub-groups must be of one kind."""
    parameters = list(model.parameters())
    packed = [p for p in parameters if packed_of(p) is not None]
    ordinary = [p for p in parameters if packed_of(p) is None]
    return [{"params": group} for group in (ordinary, packed) if group]


def _add_up_in_norms(block: nn.Module) -> None:
    """Let the gradients of a norm's input, which it reads twice, be added up before that of the residual is
    added: the order in which DeepSpeed's hooks of single modules had them, and the bits of earlier runs.
    """
    for module in block.modules():
        gain = module._parameters.get("weight")
        if gain is not None and gain.dim() == 1:
            module.register_forward_pre_hook(lambda _, args: tuple(x.view_as(x) for x in args))


class _Unused(torch.optim.Optimizer):
    """Carries the parameter groups that DeepSpeed reads; `PackedZero3` updates shards itself."""

    def __init__(self, groups: list[dict[str, Any]]):
        super().__init__(groups, {"lr": 0.0})

    def step(self, closure: None = None) -> None:  # type: ignore[override]
        raise RuntimeError("packed ZeRO-3 updates its shards without a torch optimizer")


def _device() -> torch.device:
    cuda = torch.cuda.is_available()
    return torch.device("cuda", torch.cuda.current_device()) if cuda else torch.device("cpu")


def _init_comm() -> None:
    """Attach DeepSpeed to the process group that the launcher made."""
    if not dist.is_initialized():
        raise RuntimeError("the process group must be initialised before the engine")
    os.environ.setdefault("LOCAL_RANK", "0")
    # An optional shared-memory collective that DeepSpeed would compile for a minute; gloo needs no help.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(dist_backend=dist.get_backend(), auto_mpi_discovery=False, verbose=False)

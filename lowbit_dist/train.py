"""The training loop of one worker, from a validated configuration to a summary.

Micro-batch j of a step goes to worker j mod N; which samples are in it is a function of the seed, the step
and j. Losses travel as vectors with a place for each micro-batch, so their mean does not depend on who
computed which.
"""

import json
import math
import time
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lowbit_dist import checkpoint, data, memory, model, ops, schedule, tracking
from lowbit_dist.checkpoint import Checkpoint, Position
from lowbit_dist.config import RunConfig
from lowbit_dist.linear import Linear
from lowbit_dist.methods import method_of
from lowbit_dist.zero import Engine


def run(config: RunConfig) -> dict[str, Any]:
    """Train to the last step inside an initialised process group; every worker returns the run's summary.

    A run that has checkpoints goes on from the newest undamaged one.
    """
    manifest = data.check(config)
    engine = _build(config, manifest.vocab_size)
    batches = data.Batches(config.data, "train", config.run.seed)
    position = _resume(config, engine)
    tracker = _start_tracking(config, position) if engine.rank == 0 else None
    if tracker is not None:
        position = replace(position, mlflow_run_id=tracker.run_id)
    size, steps, first = config.train.micro_batch, config.train.steps, position.step + 1
    peak: dict[str, Any] = {}
    val_loss, saved, status = math.nan, None, "FAILED"
    clock = _Clock(position.tokens)

    try:
        while position.step < steps:
            step = position.step + 1
            lr_factor, decay_factor = schedule.rate(config.schedule, step, steps)
            lr, decay = config.optimizer.lr * lr_factor, config.optimizer.weight_decay * decay_factor
            logs = _is_due(step, config.train.log_every, steps)

            # The second step of a process is its first with every buffer in place: its memory is the run's.
            sampled = step == min(first + 1, steps)
            with memory.track_peak(engine) if sampled else nullcontext(peak) as peak:
                losses = torch.zeros(engine.micro_batches, dtype=torch.float64, device=engine.device)
                for j in range(engine.rank, engine.micro_batches, engine.world):
                    tokens = batches.micro_batch(position.samples + j * size, size)
                    losses[j] = engine.backward(tokens.to(engine.device)).double()
                latent = _latent_levels(engine) if logs else []
                update = engine.update(step=step, lr=lr, weight_decay=decay)
            dist.all_reduce(losses)

            position = replace(
                position,
                step=step,
                samples=position.samples + engine.micro_batches * size,
                tokens=position.tokens + engine.micro_batches * size * config.data.seq_len,
                skipped_steps=position.skipped_steps + update.skipped,
                loss_sum=position.loss_sum + losses.mean().item(),
                loss_count=position.loss_count + 1,
                flips=position.flips + update.flips,
            )
            metrics: dict[str, float | None] = {}
            if logs:
                n_low_bit = sum(engine.numels[name] for name in engine.low_bit)
                position = replace(position, train_loss=position.loss_sum / position.loss_count)
                metrics = {
                    "tokens": position.tokens,
                    "loss": position.train_loss,
                    "lr": lr,
                    "grad_norm": update.grad_norm,
                    "tokens_per_second": clock.rate(position.tokens),
                    "skipped_steps": position.skipped_steps,
                }
                if n_low_bit:
                    metrics["flip_rate"] = position.flips / position.loss_count / n_low_bit
                metrics |= _level_statistics(engine, latent)
                metrics |= memory.metrics(memory.measure(engine))
                position = replace(position, loss_sum=0.0, loss_count=0, flips=0)
            if _is_due(step, config.train.eval_every, steps):
                with clock.paused():
                    val_loss = evaluate(engine, config, manifest)
                metrics |= _quality(val_loss, manifest)
            if tracker is not None and metrics:
                tracker.log(step, metrics)
            if _is_due(step, config.train.save_every, steps):
                with clock.paused():
                    saved = _save(config, engine, manifest, position)
                if tracker is not None:
                    tracker.flush()

        if math.isnan(val_loss):  # a finished run was started again
            val_loss = evaluate(engine, config, manifest)
        summary: dict[str, Any] = {
            "run": config.run.name,
            "mlflow_run_id": position.mlflow_run_id,
            "steps": position.step,
            "tokens": position.tokens,
            "train_loss": position.train_loss,
            **_quality(val_loss, manifest),
            "unigram_entropy": manifest.unigram_entropy,
            "tokens_per_second": clock.mean_rate(position.tokens),
            "checkpoint": str(saved or checkpoint.latest(config.run_dir)),
            "memory": _memory(config, engine, manifest, peak),
            "restarts": 0,
            "skipped_steps": position.skipped_steps,
        }
        status = "FINISHED"
    finally:
        engine.close()
        if tracker is not None and status == "FAILED":
            tracker.finish(status)
    if tracker is not None:
        summary["digest"] = Checkpoint.open(summary["checkpoint"]).digest()
        (config.run_dir / "summary.json").write_text(json.dumps(summary, indent=2))
        tracker.finish(status, summary)
    return summary


# ------------------------------------------------------------------ start


def _build(config: RunConfig, vocab_size: int) -> Engine:
    dtype = torch.bfloat16 if config.precision == "bf16" else torch.float32
    method = method_of(config)
    built = model.build(config.model, vocab_size, method, dtype)
    initial = model.InitialWeights(built, config.run.seed, config.model.pretrained)
    return Engine(config, built, method, initial, model.low_bit_names(built, method))


def _resume(config: RunConfig, engine: Engine) -> Position:
    """Load the newest undamaged checkpoint, chosen by worker 0 for all, or start at step 0."""
    choice: list[Path | None] = [None]
    if engine.rank == 0:
        checkpoint.clear_partial(config.run_dir)
        choice = [checkpoint.latest(config.run_dir)]
    dist.broadcast_object_list(choice)
    if choice[0] is None:
        return Position(step=0, samples=0, tokens=0)
    opened = Checkpoint.open(choice[0])
    opened.load_into(engine.shards)
    engine.refresh()
    return opened.position


def _start_tracking(config: RunConfig, position: Position) -> "tracking.Tracker":
    """The run's folder with its configuration and tokenizer, and the tracker that writes into it."""
    config.run_dir.mkdir(parents=True, exist_ok=True)
    (config.run_dir / "config.yaml").write_text(config.to_yaml())
    data.copy_tokenizer(config.data, config.run_dir / "tokenizer")
    return tracking.Tracker(config, step=position.step, run_id=position.mlflow_run_id)


# ------------------------------------------------------------------ in the loop


def evaluate(engine: Engine, config: RunConfig, manifest: data.Manifest) -> float:
    """Mean negative log-likelihood (nats per token) of the first `train.eval_samples` samples of the val
    split.
    """
    batches = data.Batches(config.data, "val", config.run.seed)
    n = min(config.train.eval_samples, manifest.splits["val"].samples)
    size = min(config.train.micro_batch, n)
    starts = range(0, n - size + 1, size)
    losses = torch.zeros(len(starts), dtype=torch.float64, device=engine.device)
    for first in range(0, len(starts), engine.world):
        # Every worker takes part in every gather; one that has no batch left repeats one and drops the
        # result.
        mine = first + engine.rank
        tokens = batches.micro_batch(starts[min(mine, len(starts) - 1)], size)
        loss = engine.forward(tokens.to(engine.device))
        if mine < len(starts):
            losses[mine] = loss.double()
    dist.all_reduce(losses)
    return losses.mean().item()


def _quality(val_loss: float, manifest: data.Manifest) -> dict[str, float]:
    bits = val_loss / math.log(2) / manifest.splits["val"].bytes_per_token
    return {"val_loss": val_loss, "perplexity": math.exp(min(val_loss, 700.0)), "bits_per_byte": bits}


def _latent_levels(engine: Engine) -> list[Tensor]:
    """The ternary levels that a latent-weight forward sees, of this worker's shards; nothing for other
    methods.
    """
    latent = {
        f"{name}.weight"
        for name, module in engine.module.named_modules()
        if isinstance(module, Linear) and module.transform is not None
    }
    shards = [shard for shard in engine.shards if shard.name in latent and shard.weight is not None]
    if not latent:
        return []
    sums = torch.stack([shard.weight.double().abs().sum() for shard in shards if shard.weight is not None])
    dist.all_reduce(sums)
    levels = []
    for shard, total in zip(shards, sums.tolist(), strict=True):
        gamma = max(total / engine.numels[shard.name], 1e-5)
        assert shard.weight is not None, "latent shards have weights"
        levels.append((shard.weight / gamma).round_().clamp_(-1, 1).to(torch.int8))
    return levels


def _level_statistics(engine: Engine, latent_before: list[Tensor]) -> dict[str, float]:
    """Shares of all low-bit weights: at zero, at an end of the grid; for latent methods also those that
    flipped.
    """
    counts = torch.zeros(4, dtype=torch.int64, device=engine.device)  # zero, saturated, flipped, all
    for shard in engine.shards:
        if shard.codes is not None and shard.grid is not None and shard.numel:
            of_level = ops.code_counts(shard.codes, grid=shard.grid)
            counts[0] += of_level[-shard.grid.low]
            counts[1] += of_level[0] + of_level[-1]
            counts[3] += shard.numel
    for before, now in zip(latent_before, _latent_levels(engine) if latent_before else [], strict=True):
        zeros = (now == 0).sum()
        counts += torch.stack(
            [zeros, now.numel() - zeros, (now != before).sum(), zeros.new_tensor(now.numel())]
        )
    dist.all_reduce(counts)
    zero, saturated, flipped, total = counts.tolist()
    if not total:
        return {}
    statistics = {"zero_fraction": zero / total, "saturation": saturated / total}
    return statistics | ({"flip_rate": flipped / total} if latent_before else {})


def _save(config: RunConfig, engine: Engine, manifest: data.Manifest, position: Position) -> Path:
    path = checkpoint.save(
        config.run_dir,
        engine.shards,
        position,
        config,
        rank=engine.rank,
        world=engine.world,
        facts={"vocab_size": manifest.vocab_size, "tokenizer_sha256": manifest.tokenizer_sha256},
    )
    dist.barrier()
    return path


def _memory(
    config: RunConfig, engine: Engine, manifest: data.Manifest, peak: dict[str, Any]
) -> dict[str, Any]:
    """The largest worker's measured memory, against the plans of the baselines."""
    everyone: list[Any] = [None] * engine.world
    dist.all_gather_object(everyone, memory.measure(engine, peak))
    return memory.compare(config, manifest.vocab_size, everyone)


def _is_due(step: int, every: int, steps: int) -> bool:
    return step % every == 0 or step == steps


class _Clock:
    """Training time, without evaluations and saves."""

    def __init__(self, tokens: int):
        self.first_tokens = self.last_tokens = tokens
        self.idle = self.idle_before = 0.0
        self.started = self.last = time.monotonic()

    def rate(self, tokens: int) -> float:
        """Tokens per second since the last call."""
        now = time.monotonic()
        seconds = now - self.last - (self.idle - self.idle_before)
        rate = (tokens - self.last_tokens) / max(seconds, 1e-9)
        self.last, self.last_tokens, self.idle_before = now, tokens, self.idle
        return rate

    def mean_rate(self, tokens: int) -> float:
        """Tokens per second since the start of this process's training."""
        return (tokens - self.first_tokens) / max(time.monotonic() - self.started - self.idle, 1e-9)

    def paused(self) -> "_Clock":
        return self

    def __enter__(self) -> None:
        self.pause_began = time.monotonic()

    def __exit__(self, *error: object) -> None:
        self.idle += time.monotonic() - self.pause_began

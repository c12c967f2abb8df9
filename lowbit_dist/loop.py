"""The training loop of one worker, from a validated configuration to a summary.

Micro-batch j of a step goes to worker j mod N; which samples are in it is a function of the seed, the step
and j. Losses travel as vectors with a place for each micro-batch, so their mean does not depend on who
computed which.
"""

import contextlib
import json
import logging
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from lowbit_dist import checkpoint, data, guard, memory, model, ops, statistics, tracking
from lowbit_dist.checkpoint import Checkpoint, Position
from lowbit_dist.config import ConfigError, RunConfig
from lowbit_dist.files import atomic_write
from lowbit_dist.heartbeat import Beat, no_beat
from lowbit_dist.optim import schedule
from lowbit_dist.runs import BASELINES
from lowbit_dist.zero import Engine, Update

log = logging.getLogger(__name__)


def run(config: RunConfig, *, restarts: int = 0, beat: Beat = no_beat) -> dict[str, Any] | None:
    """Train to the last step inside an initialised process group; every worker returns the run's summary.

    A run that has checkpoints goes on from the newest undamaged one.  None if it was asked to stop
    (`config.stop_file`): then a checkpoint of its last step is there.  `beat` is told
    wherever training gets on.
    """
    manifest = data.check(config)
    engine = _build(config, manifest.vocab_size)
    batches = data.Batches(config.data, "train", config.run.seed)
    position = _resume(config, engine)
    tracker = _start_tracking(config, position) if engine.rank == 0 else None
    saver = _saver(config, engine, manifest)
    gauges = _start_gauges(config, engine, manifest, restarts)
    size, steps, first = config.train.micro_batch, config.train.steps, position.step + 1
    peak: dict[str, Any] = {}
    val_loss: float | None = None
    stop, ended = False, False
    clock = _Clock()

    try:
        while position.step < steps and not stop:
            step, began = position.step + 1, time.monotonic()
            lr_factor, decay_factor = schedule.rate(config.schedule, step, steps)
            lr, decay = config.optimizer.lr * lr_factor, config.optimizer.weight_decay * decay_factor
            logs = _is_due(step, config.train.log_every, steps)

            now = ops.Now(lr=lr, weight_decay=decay, step=step, seed=config.run.seed)
            limit = guard.norm_limit(position.norms, config.train.max_grad_ratio)
            # The second step of a process is its first with every buffer in place: its memory is the run's.
            sampled = step == min(first + 1, steps)
            with (
                memory.track_peak(engine) if sampled else nullcontext(peak) as peak,
                engine.step(now, limit) as passes,
            ):
                # A place for each micro-batch, and one by which worker 0 tells the others to stop.
                losses = torch.zeros(engine.micro_batches + 1, dtype=torch.float64, device=engine.device)
                for j in range(engine.rank, engine.micro_batches, engine.world):
                    tokens = batches.micro_batch(position.samples + j * size, size)
                    losses[j] = passes.backward(tokens.to(engine.device)).double()
                    beat("step" if step > first else "start", step)
                losses[-1] = float(engine.rank == 0 and config.stop_file.exists())
                dist.all_reduce(losses)
                loss, stop = losses[:-1].mean().item(), bool(losses[-1] > 0)
                spike = guard.is_spike(loss, position.losses)
                goes_back = spike and config.train.on_spike == "rollback"
                if goes_back or not math.isfinite(loss):
                    passes.drop()
                before = statistics.viewed_levels(engine) if logs else {}
            update = passes.done
            clock.count(engine.micro_batches * size * config.data.seq_len)
            gauges.stepped(step, time.monotonic() - began)

            if spike:
                log.warning("step %d: loss spike, %.4f after %.4f", step, loss, position.losses[-1])
            if goes_back:
                saver.wait()
                beat("start", step)
                if (earlier := _rolled_back(config, engine, position)) is not None:
                    position = earlier
                    if tracker is not None:
                        tracker.rewind(position.step)
                    continue
            if update.skipped:
                log.warning("step %d skipped: loss %.4g, gradient norm %.4g", step, loss, update.grad_norm)
            position = _advanced(position, engine, config, loss, update)
            metrics: dict[str, float | None] = {}
            if logs:
                n_low_bit = sum(engine.numels[name] for name in engine.low_bit)
                n_steps = position.loss_count
                if n_steps:
                    position = replace(position, train_loss=position.loss_sum / n_steps)
                metrics = {
                    "tokens": position.tokens,
                    "loss": position.train_loss if n_steps else None,
                    "lr": lr,
                    "grad_norm": update.grad_norm if math.isfinite(update.grad_norm) else None,
                    "tokens_per_second": clock.rate(),
                    "skipped_steps": position.skipped_steps,
                    "rollbacks": position.rollbacks,
                    "restarts": restarts,
                }
                if n_low_bit:
                    metrics["flip_rate"] = position.flips / max(n_steps, 1) / n_low_bit
                of_levels, flip_rates = statistics.measure(engine, before, update)
                measured = memory.measure(engine, peak)
                metrics |= of_levels | memory.metrics(measured)
                gauges.memory(measured)
                gauges.layers(flip_rates)
                position = replace(position, loss_sum=0.0, loss_count=0, flips=0)
            if _is_due(step, config.train.eval_every, steps):
                with clock.paused():
                    val_loss = evaluate(engine, config, manifest, beat=partial(beat, "eval", step))
                metrics |= _quality(val_loss, manifest)
            if tracker is not None:
                tracker.begin()  # not before the first step, for which all workers wait
                if metrics:
                    tracker.log(step, metrics)
                    gauges.log(metrics)
            _check_recovers(config, position, loss, update, limit)
            if _is_due(step, config.train.save_every, steps):
                beat("save", step)
                if tracker is not None:
                    position = replace(position, mlflow_run_id=tracker.run_id_so_far)
                with clock.paused():
                    saver.save(engine.shards, position)
                beat("step", step)

        beat("end", position.step)
        if stop and position.step < steps:
            saver.finish(engine.shards, position)
            log.info("stopped at step %d: its checkpoint is saved", position.step)
            ended = True
            return None
        if position.step >= first:
            saver.finish(engine.shards, position)
        if val_loss is None:  # a finished run was started again
            val_loss = evaluate(engine, config, manifest)
        summary: dict[str, Any] = {
            "run": config.run.name,
            "mlflow_run_id": position.mlflow_run_id if tracker is None else tracker.run_id,
            "steps": position.step,
            "tokens": position.tokens,
            "train_loss": position.train_loss,
            **_quality(val_loss, manifest),
            "unigram_entropy": manifest.unigram_entropy,
            "tokens_per_second": clock.mean_rate(),
            "checkpoint": str(saver.path(position.step)),
            "memory": _memory(config, engine, manifest, peak),
            "restarts": restarts,
            "skipped_steps": position.skipped_steps,
            "rollbacks": position.rollbacks,
        }
        if tracker is not None:
            summary["digest"] = Checkpoint.open(summary["checkpoint"]).digest()
            with atomic_write(config.run_dir / "summary.json") as draft:
                draft.write_text(json.dumps(summary, indent=2) + "\n")
            tracker.finish("FINISHED", summary)
        ended = True
        return summary
    finally:
        gauges.close()
        if tracker is not None:
            tracker.close()
        if ended:  # otherwise another worker may have gone, and would be waited for
            saver.close()
        engine.close()


def _build(config: RunConfig, vocab_size: int) -> Engine:
    dtype = torch.bfloat16 if config.precision == "bf16" else torch.float32
    built = model.build(config.model, vocab_size, config.method, dtype)
    initial = model.InitialWeights(built, config.method, config.run.seed, config.model.pretrained)
    return Engine(config, built, initial, model.low_bit_names(built, config.method))


def _resume(config: RunConfig, engine: Engine) -> Position:
    """Load the newest undamaged checkpoint, chosen by worker 0 for all, or start at step 0."""
    choice: list[Path | ConfigError | None] = [None]
    if engine.rank == 0:
        checkpoint.clear_partial(config.run_dir)
        try:
            choice = [checkpoint.latest(config.run_dir)]
        except ConfigError as error:
            choice = [error]
    dist.broadcast_object_list(choice)
    if isinstance(choice[0], ConfigError):
        raise choice[0]
    if choice[0] is None:
        return Position(step=0, samples=0, tokens=0)
    opened = Checkpoint.open(choice[0])
    opened.load_into(engine.shards)
    engine.refresh()
    return opened.position


def _start_tracking(config: RunConfig, position: Position) -> "tracking.Tracker":
    """The run's folder with its configuration and tokenizer, and the tracker that writes into it."""
    config.run_dir.mkdir(parents=True, exist_ok=True)
    file, text = config.run_dir / "config.yaml", config.to_yaml()
    _keep(file, text)
    data.copy_tokenizer(config.data, config.run_dir / "tokenizer")
    return tracking.Tracker(config, step=position.step, run_id=position.mlflow_run_id)


def _keep(file: Path, text: str) -> None:
    """`file` with this content; written only if it has another."""
    if not file.exists() or file.read_text() != text:
        with atomic_write(file) as draft:
            draft.write_text(text)


def _start_gauges(
    config: RunConfig, engine: Engine, manifest: data.Manifest, restarts: int
) -> tracking.Gauges:
    """They tell of the baselines too; their memory is also kept for those who watch the folder."""
    gauges = tracking.Gauges(config, rank=engine.rank, world=engine.world, restarts=restarts)
    if engine.rank == 0:
        plans = memory.baselines(config, manifest.vocab_size, engine.world)
        gauges.baseline("AdamW fp32", plans["plan_dense"])
        gauges.baseline("BitNet STE", plans["plan_bitnet"])
        with contextlib.suppress(OSError):  # of a full disk, others speak
            _keep(config.run_dir / BASELINES, json.dumps(plans) + "\n")
    return gauges


def _saver(config: RunConfig, engine: Engine, manifest: data.Manifest) -> checkpoint.Saver:
    facts = {"vocab_size": manifest.vocab_size, "tokenizer_sha256": manifest.tokenizer_sha256}
    return checkpoint.Saver(config, rank=engine.rank, world=engine.world, facts=facts)


def _advanced(position: Position, engine: Engine, config: RunConfig, loss: float, update: Update) -> Position:
    """After one step, applied or skipped."""
    n_samples = engine.micro_batches * config.train.micro_batch
    position = replace(
        position,
        step=position.step + 1,
        samples=position.samples + n_samples,
        tokens=position.tokens + n_samples * config.data.seq_len,
    )
    if update.skipped:
        return replace(
            position,
            skipped_steps=position.skipped_steps + 1,
            skipped_in_a_row=position.skipped_in_a_row + 1,
        )
    return replace(
        position,
        skipped_in_a_row=0,
        loss_sum=position.loss_sum + loss,
        loss_count=position.loss_count + 1,
        flips=position.flips + update.flips,
        losses=guard.append(position.losses, loss),
        norms=guard.append(position.norms, update.grad_norm),
    )


def _check_recovers(config: RunConfig, position: Position, loss: float, update: Update, limit: float) -> None:
    if (n := position.skipped_in_a_row) >= config.train.max_skipped:
        raise guard.Diverged(
            f"the loss or the gradient of {n} steps in a row, up to step {position.step}, cannot be used "
            f"(loss {loss:.4g}, gradient norm {update.grad_norm:.4g}, limit {limit:.4g}); no weight changed "
            "in them; write a smaller optimizer.lr under another run.name, or a larger "
            "train.max_grad_ratio if the gradients are right"
        )


def _rolled_back(config: RunConfig, engine: Engine, position: Position) -> Position | None:
    """Load the last checkpoint, to go on from it behind the batches that led to a spike; None without one.

    A run that is killed meanwhile meets the same spike, and goes back the same way.
    """
    step = position.step + 1
    before = _resume(config, engine)
    if before.step == 0:
        log.warning("step %d: there is no checkpoint to go back to", step)
        return None
    if position.rollbacks - before.rollbacks >= guard.MAX_ROLLBACKS:
        raise guard.Diverged(
            f"the loss spikes again after {guard.MAX_ROLLBACKS} returns to step {before.step}, now at step "
            f"{step}; write a smaller optimizer.lr under another run.name, or train.on_spike=warn"
        )
    samples = position.samples + engine.micro_batches * config.train.micro_batch
    log.warning("back to step %d, skipping the batches up to that of step %d", before.step, step)
    return replace(
        before, samples=samples, rollbacks=position.rollbacks + 1, mlflow_run_id=position.mlflow_run_id
    )


def evaluate(
    engine: Engine, config: RunConfig, manifest: data.Manifest, *, beat: Callable[[], None] = lambda: None
) -> float:
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
        beat()
    dist.all_reduce(losses)
    return losses.mean().item()


def _quality(val_loss: float, manifest: data.Manifest) -> dict[str, float | None]:
    if not math.isfinite(val_loss):  # JSON has no word for it
        return {"val_loss": None, "perplexity": None, "bits_per_byte": None}
    bits = val_loss / math.log(2) / manifest.splits["val"].bytes_per_token
    return {"val_loss": val_loss, "perplexity": math.exp(min(val_loss, 700.0)), "bits_per_byte": bits}


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
    """Training time, without evaluations and what a save takes of it."""

    def __init__(self) -> None:
        self.tokens = self.tokens_before = 0
        self.idle = self.idle_before = 0.0
        self.started = self.last = time.monotonic()

    def count(self, tokens: int) -> None:
        self.tokens += tokens

    def rate(self) -> float:
        """Tokens per second since the last call."""
        now = time.monotonic()
        seconds = now - self.last - (self.idle - self.idle_before)
        rate = (self.tokens - self.tokens_before) / max(seconds, 1e-9)
        self.last, self.tokens_before, self.idle_before = now, self.tokens, self.idle
        return rate

    def mean_rate(self) -> float:
        """Tokens per second since the start of this process's training."""
        return self.tokens / max(time.monotonic() - self.started - self.idle, 1e-9)

    @contextmanager
    def paused(self) -> Iterator[None]:
        began = time.monotonic()
        yield
        self.idle += time.monotonic() - began

"""The training loop of one worker, from a validated configuration to a summary.

Micro-batch j of a step goes to worker j mod N; which samples are in it is a function of the seed, the step
and j. Losses travel as vectors with a place for each micro-batch, so their mean does not depend on who
computed which.  Where the loss leaves prompts out, micro-batches weigh by their tokens that count.
"""

import json
import logging
import math
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import replace
from functools import partial
from statistics import fmean
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lowbit_dist import (
    checkpoint,
    cost,
    data,
    float8,
    guard,
    inputs,
    memory,
    model,
    pretrained,
    resuming,
    runs,
    statistics,
)
from lowbit_dist.checkpoint import Checkpoint, Position
from lowbit_dist.clock import Clock
from lowbit_dist.config import RunConfig
from lowbit_dist.evaluate import n_predicted, n_validation_samples, quality, validation_loss
from lowbit_dist.files import keep
from lowbit_dist.heartbeat import FIRST, Beat, Start, no_heartbeat
from lowbit_dist.optim import schedule
from lowbit_dist.record import Record
from lowbit_dist.zero import Engine, Update
from lowbit_dist.zero.engine import Step

log = logging.getLogger(__name__)


def run(config: RunConfig, *, begun: Start = FIRST, heartbeat: Beat = no_heartbeat) -> dict[str, Any] | None:
    """Train to the last step inside an initialised process group; every worker returns the run's summary.

    A run that has checkpoints resumes from the newest undamaged one.  None if it was asked to stop
    (`config.stop_file`): then a checkpoint of its last step is there.  `begun`: which start of the run this
    is.  `heartbeat` is called whenever training makes progress.
    """
    train = config.train
    with _worker(config, begun, heartbeat) as worker:
        position = worker.start
        while position.step < train.steps and not worker.stops:
            now = schedule.now(config, position.step + 1, position.updates + 1)
            limit = guard.norm_limit(position.norms, train.max_grad_ratio)
            logs = _is_due(now.step, train.log_every, train.steps)
            previous_norm = position.norms[-1] if position.norms else 0.0
            before = worker.layers.viewed(now.step) if logs else {}  # gradients may be applied in the passes
            with (
                worker.sampled(now.step),
                worker.engine.step(now, limit, details=logs, previous_norm=previous_norm) as step,
            ):
                loss = worker.passes(step, position)
                spike = guard.is_spike(loss, position.losses)
                rolls_back = spike and train.on_spike == "rollback"
                if rolls_back or not math.isfinite(loss):
                    step.drop()
            if spike:
                log.warning("step %d: loss spike, %.4f after %.4f", now.step, loss, position.losses[-1])
            if rolls_back and (earlier := worker.roll_back(position)) is not None:
                position = earlier
                continue
            _warn_if_skipped(now.step, loss, step.done)
            position = worker.advance(position, loss, step.done)
            if logs:
                position = worker.log(position, now.lr, before, step.done)
            if _is_due(now.step, train.eval_every, train.steps):
                worker.evaluate(now.step)
            worker.write(now.step)
            _check_recovers(config, position, loss, step.done, limit)
            if _is_due(now.step, train.save_every, train.steps):
                worker.save(position)
        return worker.finish(position)


class _Worker:
    """What one worker trains with, and what it has measured since it last wrote."""

    def __init__(self, config: RunConfig, begun: Start, heartbeat: Beat):
        self.config, self.begun, self.heartbeat = config, begun, heartbeat
        if config.precision.matmul == "fp8":
            float8.check(float8.gpus(), f"worker {dist.get_rank()}")
        self.manifest = inputs.agreed(config)
        self.engine, initial = _build(config, self.manifest)
        engine = self.engine
        self.layers = statistics.Layers(engine)
        batches = data.Batches(config.data, "train", config.run.seed)
        self.feed = data.Feed(batches, config.train.micro_batch, engine.device)
        self.start = resuming.start(config, engine, initial, self.layers, partial(heartbeat, "start", 0))
        if engine.rank == 0:
            _prepare_folder(config, self.manifest, engine.world, is_new=self.start.step == 0)
        self.record = Record(config.run_dir, step=self.start.step, writes=engine.rank == 0)
        facts: dict[str, Any] = {
            "vocab_size": self.manifest.vocab_size, "tokenizer_sha256": self.manifest.tokenizer_sha256
        }  # fmt: skip
        if config.model.pretrained is not None:  # the checkpoint needs its folder no more
            hf_config = model.hf_config(config.model, self.manifest.vocab_size)
            facts["hf_config"] = pretrained.as_mapping(hf_config)
        self.saver = checkpoint.Saver(config, rank=engine.rank, world=engine.world, facts=facts)
        self.stops = False  # asked to, by the stop file
        # A place for the loss of each micro-batch, and one by which worker 0 tells the others to stop.
        self.losses = torch.zeros(engine.micro_batches + 1, dtype=torch.float64, device=engine.device)
        self.flips = torch.zeros((), dtype=torch.int64, device=engine.device)  # not yet in the position
        self.metrics: dict[str, float | None] = {}
        self.of_layers: dict[str, dict[str, float]] = {}
        self.peak: dict[str, Any] = {}
        self.val_loss: float | None = None
        self.clock = Clock()
        self.speed = cost.Speed(config, self.manifest.vocab_size, cost.peak_flops(engine.device))

    def sampled(self, step: int) -> AbstractContextManager[Any]:
        """The second step of a process is its first with every buffer in place: its memory is the run's."""
        is_second = step == min(self.start.step + 2, self.config.train.steps)
        return self._sampled() if is_second else nullcontext()

    @contextmanager
    def _sampled(self) -> Iterator[None]:
        with memory.track_peak(self.engine) as self.peak:
            yield

    def passes(self, step: Step, position: Position) -> float:
        """Forward and backward of this worker's micro-batches; the mean loss of all workers' tokens."""
        engine, size = self.engine, self.config.train.micro_batch
        mine = range(engine.rank, engine.micro_batches, engine.world)
        starts = [position.samples + j * size for j in mine]
        following = [*starts[1:], starts[0] + self._samples_of_a_step]
        labels = [self.feed.labels(start) for start in starts]
        weights = self._weights(labels)
        losses = self.losses.zero_()
        for j, start, then, target, weight in zip(mine, starts, following, labels, weights, strict=True):
            losses[j] = step.backward(self.feed.tokens(start, then), target, weight).double()
            is_first = position.step == self.start.step
            self.heartbeat("start" if is_first else "step", position.step + 1)
        losses[-1] = float(engine.rank == 0 and self.config.stop_file.exists())
        dist.all_reduce(losses)
        losses = step.read(losses)
        self.stops = bool(losses[-1] > 0)
        self.clock.count(engine.micro_batches * size * self.config.data.seq_len)
        return losses[:-1].mean().item()

    def _weights(self, labels: Sequence[Tensor | None]) -> list[float]:
        """By what to multiply the mean losses of this worker's micro-batches, so that the mean of all
        workers' is that of all tokens that count: a micro-batch's share of those, in units of an equal one.
        """
        numbers = [n_predicted(part) for part in labels if part is not None]
        if not numbers:  # every token counts
            return [1.0] * len(labels)
        total = torch.tensor(sum(numbers), device=self.engine.device)
        dist.all_reduce(total)  # of integers: the same for any number of workers
        return [number * self.engine.micro_batches / max(1, total.item()) for number in numbers]

    def roll_back(self, position: Position) -> Position | None:
        """The last checkpoint of `train.save_every`, from which training goes behind the batches that led to
        a spike; None without one.  A run that is stopped or killed meets the same spike, and goes back there.
        """
        self.saver.wait()
        step = position.step + 1
        self.heartbeat("start", step)
        earlier = resuming.go_back(self.config, self.engine)
        if earlier is None:
            log.warning("step %d: there is no checkpoint to roll back to", step)
            return None
        if position.rollbacks - earlier.rollbacks >= guard.MAX_ROLLBACKS:
            raise guard.Diverged(
                f"the loss spikes again after {guard.MAX_ROLLBACKS} returns to step {earlier.step}, now at "
                f"step {step}; write a smaller optimizer.lr under another run.name, or train.on_spike=warn"
            )
        log.warning("back to step %d, skipping the batches up to that of step %d", earlier.step, step)
        self.record.rewind(earlier.step)
        self.flips.zero_()
        samples = position.samples + self._samples_of_a_step
        return replace(earlier, samples=samples, rollbacks=position.rollbacks + 1)

    @property
    def _samples_of_a_step(self) -> int:
        return self.engine.micro_batches * self.config.train.micro_batch

    def advance(self, position: Position, loss: float, update: Update) -> Position:
        """After one step, applied or skipped; its flips stay on the device until they are asked for."""
        self.flips += update.flips
        position = replace(
            position,
            step=position.step + 1,
            samples=position.samples + self._samples_of_a_step,
            tokens=position.tokens + self._samples_of_a_step * self.config.data.seq_len,
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
            losses=guard.append(position.losses, loss),
            norms=guard.append(position.norms, update.grad_norm),
        )

    def log(self, position: Position, lr: float, before: statistics.Levels, update: Update) -> Position:
        """Measure this step for the record; the means since the last one begin anew."""
        position, engine, n = self._counted(position), self.engine, position.loss_count
        self.metrics = {
            "tokens": position.tokens,
            "loss": position.loss_sum / n if n else None,
            "lr": lr,
            "grad_norm": update.grad_norm if math.isfinite(update.grad_norm) else None,
            **self.speed.metrics(self.clock.rate(), engine.world),
            "skipped_steps": position.skipped_steps,
            "rollbacks": position.rollbacks,
            "restarts": self.begun.restarts,
            "resumes": self.begun.resumes,
        }
        if n_low_bit := sum(engine.numels[name] for name in engine.low_bit):
            self.metrics["flip_rate"] = position.flips / max(n, 1) / n_low_bit
        of_levels, self.of_layers = self.layers.measure(before, update)
        measured = memory.measure(engine, self.peak)
        self.metrics |= of_levels | memory.metrics(measured)
        sizes = {name: part["bytes"] for name, part in measured["components"].items()}
        known = {name: n_bytes for name, n_bytes in sizes.items() if n_bytes is not None}
        self.heartbeat("step", position.step, known)
        self.flips.zero_()
        return replace(position, loss_sum=0.0, loss_count=0, flips=0)

    def _counted(self, position: Position) -> Position:
        """With the flips that are on the device."""
        return replace(position, flips=position.flips + int(self.flips))

    def evaluate(self, step: int) -> None:
        """The validation loss, for the record and the summary."""
        with self.clock.paused():
            beat = partial(self.heartbeat, "eval", step)
            self.val_loss = validation_loss(self.engine, self.config, self.manifest, heartbeat=beat)
        self.metrics |= _quality(self.val_loss, self.manifest)
        if self._has_diverged(step):
            self.metrics["diverged"] = 1.0
            guessing = math.log(self.manifest.vocab_size)
            log.warning(
                "step %d: the validation loss %.4g is above that of guessing, %.4g: the run has diverged; "
                "write a smaller optimizer.lr under another run.name", step, self.val_loss, guessing,
            )  # fmt: skip

    def _has_diverged(self, step: int) -> bool:
        """A model that has not begun to learn is not meant: its first loss is that of guessing."""
        assert self.val_loss is not None, "it was evaluated"
        is_warm = step > self.config.schedule.warmup_steps
        return is_warm and guard.is_no_better_than_guessing(self.val_loss, self.manifest.vocab_size)

    def write(self, step: int) -> None:
        """What was measured goes into the record."""
        self.record.log(step, self.metrics, self.of_layers)
        self.metrics, self.of_layers = {}, {}

    def save(self, position: Position) -> None:
        self.heartbeat("save", position.step)
        with self.clock.paused():
            self.saver.save(self.engine.shards, self._counted(position))
        self.heartbeat("step", position.step)

    def finish(self, position: Position) -> dict[str, Any] | None:
        """Wait for the last checkpoint; the summary, or None for a run that was stopped before its end."""
        config, engine = self.config, self.engine
        self.heartbeat("end", position.step)
        is_stopped = position.step < config.train.steps
        if is_stopped or position.step > self.start.step:
            self.saver.finish(engine.shards, self._counted(position))
        if is_stopped:
            log.info("stopped at step %d: its checkpoint is saved", position.step)
            return None
        if self.val_loss is None:  # a finished run was started again
            beat = partial(self.heartbeat, "end", position.step)
            self.val_loss = validation_loss(engine, config, self.manifest, heartbeat=beat)
        summary: dict[str, Any] = {
            "run": config.run.name,
            "steps": position.step,
            "tokens": position.tokens,
            "train_loss": fmean(position.losses) if position.losses else None,
            **_quality(self.val_loss, self.manifest),
            "val_samples": n_validation_samples(config, self.manifest),
            "unigram_entropy": self.manifest.unigram_entropy,
            "tokens_per_second": self.clock.mean_rate(),
            "checkpoint": str(self.saver.path(position.step)),
            "memory": self._memory(),
            "restarts": self.begun.restarts,
            "resumes": self.begun.resumes,
            "skipped_steps": position.skipped_steps,
            "rollbacks": position.rollbacks,
            "diverged": self._has_diverged(position.step),
        }
        if engine.rank == 0:
            summary["digest"] = Checkpoint.open(summary["checkpoint"]).digest()
            runs.write_summary(config.run_dir, summary)
        return summary

    def _memory(self) -> dict[str, Any]:
        """The largest worker's measured memory, against the plans of the baselines."""
        of_workers: list[Any] = [None] * self.engine.world
        dist.all_gather_object(of_workers, memory.measure(self.engine, self.peak))
        return memory.compare(self.config, self.manifest.vocab_size, of_workers)


@contextmanager
def _worker(config: RunConfig, begun: Start, heartbeat: Beat) -> Iterator[_Worker]:
    worker = _Worker(config, begun, heartbeat)
    try:
        yield worker
        worker.saver.close()  # only now: it waits for the other workers, of which one may have gone
    except guard.Diverged:  # as on every other worker: their last checkpoint is complete
        worker.saver.wait()
        raise
    finally:
        worker.record.close()
        worker.feed.close()
        worker.engine.close()


def _build(config: RunConfig, manifest: data.Manifest) -> tuple[Engine, model.InitialWeights]:
    """An engine without values, and the first ones that its weights may get."""
    built = model.build(
        config.model, manifest.vocab_size, config.method, model.DTYPES[config.precision.compute]
    )
    initial = model.InitialWeights(built, config.method, config.run.seed, config.model.pretrained)
    marks = manifest.marks if config.data.document_mask else None
    low_bit = model.low_bit_names(built, config.method)
    return Engine(config, built, None, low_bit, marks), initial


def _prepare_folder(config: RunConfig, manifest: data.Manifest, workers: int, *, is_new: bool) -> None:
    """What a run's folder has beside its record and checkpoints, for those who read it."""
    config.run_dir.mkdir(parents=True, exist_ok=True)
    keep(config.run_dir / runs.CONFIG, config.to_yaml())
    data.copy_tokenizer(config.data, manifest, config.run_dir / "tokenizer", is_new=is_new)
    inputs.keep(config, manifest)
    plans = memory.baselines(config, manifest.vocab_size, workers)
    with suppress(OSError):  # a full disk is reported elsewhere
        keep(config.run_dir / runs.BASELINES, json.dumps(plans) + "\n")


def _warn_if_skipped(step: int, loss: float, update: Update) -> None:
    if update.skipped:
        kept = f"; {n:,} parameters were updated before that was known" if (n := update.n_released) else ""
        log.warning("step %d skipped: loss %.4g, gradient norm %.4g%s", step, loss, update.grad_norm, kept)


def _check_recovers(config: RunConfig, position: Position, loss: float, update: Update, limit: float) -> None:
    if (n := position.skipped_in_a_row) >= config.train.max_skipped:
        changed = "some weights" if config.train.gradient_release else "no weight"
        raise guard.Diverged(
            f"the loss or the gradient of {n} steps in a row, up to step {position.step}, cannot be used "
            f"(loss {loss:.4g}, gradient norm {update.grad_norm:.4g}, limit {limit:.4g}); {changed} changed "
            "in them; write a smaller optimizer.lr under another run.name, or a larger "
            "train.max_grad_ratio if the gradients are right"
        )


def _quality(val_loss: float, manifest: data.Manifest) -> dict[str, float | None]:
    if not math.isfinite(val_loss):  # JSON has no word for it
        return {"val_loss": None, "perplexity": None, "bits_per_byte": None}
    return {"val_loss": val_loss, **quality(val_loss, manifest.splits["val"].bytes_per_token)}


def _is_due(step: int, every: int, steps: int) -> bool:
    return step % every == 0 or step == steps

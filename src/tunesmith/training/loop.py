"""The one training loop. What differs between methods is handed in: how rows become a batch, and its loss."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch

from tunesmith.core.errors import Interrupted, JobError, TrainingFailed
from tunesmith.core.records import StepRecord
from tunesmith.core.rundir import RunDir
from tunesmith.core.types import Example
from tunesmith.job.spec import TrainSpec
from tunesmith.methods.objective import Objective
from tunesmith.training.feed import StepsAhead
from tunesmith.training.keeper import Keeper
from tunesmith.training.meter import Meter, reset_peak_bytes
from tunesmith.training.optim import LossScale
from tunesmith.training.optimizers import make_optimizer
from tunesmith.training.order import RowSource, StepRows, order_rows
from tunesmith.training.outcome import Progress, TrainOutcome
from tunesmith.training.planner import Planner
from tunesmith.training.probe import follow_plan, settle_plan
from tunesmith.training.schedule import count_steps, count_warmup_steps, learning_rate_at
from tunesmith.training.signals import StopNow, StopSignals, catch_signals
from tunesmith.training.state import Best, Pending, TrainState, copy_weights, describe_run, put_weights
from tunesmith.training.step import (
    LossFunction,
    MakeBatch,
    Stepper,
    TrainableModel,
    read_random,
    set_random,
)
from tunesmith.training.steplog import StepLog
from tunesmith.training.trackers import Tracker, open_trackers

# Tokens per forward pass when the job says `auto`. A core is as fast with 512 tokens as with 4,096; a GPU's units
# are busy from about 16,384. Where that doesn't fit, the first step finds out and halves it.
_AUTO_BUDGET = {"cpu": 4096, "cuda": 16384}


def train(
    model: TrainableModel,
    rows: Sequence[Example] | RowSource,
    spec: TrainSpec,
    run_dir: RunDir,
    *,
    make_batch: MakeBatch,
    loss: LossFunction | Objective,
    evaluate: Callable[[], float] | None = None,
    on_step: Callable[[Progress], None] | None = None,
    resume: bool = False,
    identity: Mapping[str, Any] | None = None,
    planner: Planner | None = None,
    record_graphs: bool = False,
) -> TrainOutcome:
    """Train `model` in place, leave it in eval mode, return what it cost. The caller holds `run_dir.lock()`.

    rows:       a sequence (reordered every epoch from seed and epoch alone), or a source with its own order.
    spec:       with `learning_rate` a number; see `schedule.auto_learning_rate`.
    make_batch: (rows, device) -> batch.   loss: (model, batch) -> sum over target tokens, nats.
    evaluate:   validation loss of the model as it is, nats per target token; called in eval mode.
    resume:     continue from the newest intact checkpoint, if there is one.
    identity:   what else must be equal for a checkpoint to fit (method, data, base model), JSON.
    planner:    chooses micro-batches and what is kept of each block; without it, a fixed number of tokens.
    record_graphs: let a GPU replay micro-batches whose shape comes back (graphs.py). Only for a `Decoder`.

    An interrupted and resumed run equals an uninterrupted one bit for bit, on the same machine and torch.
    Raises TrainingFailed (not finite, out of memory), Interrupted (signal, checkpoint saved), RunDirError (disk),
    JobError (a checkpoint of another job).
    """
    if spec.learning_rate == "auto":
        raise ValueError("resolve train.learning_rate before training: schedule.auto_learning_rate")
    named = dict(model.named_trainable())
    device = next(iter(named.values())).device if named else torch.device("cpu")
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), catch_signals() as stop:
        torch.manual_seed(spec.seed)
        source = order_rows(rows, batch_rows=spec.batch_rows, seed=spec.seed)
        meter = Meter(device)
        stepper = Stepper(
            model,
            make_optimizer(model, named, spec),
            make_batch=make_batch,
            loss=loss,
            device=device,
            budget_tokens=choose_budget(spec, device),
            clip_norm=spec.clip_norm,
            scale=LossScale(enabled=_computes_in_fp16(model)),
            in_backward=spec.optimizer_in_backward,
        )
        told = describe_run(spec, named, rows=source.fingerprint(), given=identity or {})
        keeper = Keeper(
            run_dir, spec, named=named, stepper=stepper, meter=meter, identity=told, device=device
        )
        run = _Run(
            model=model,
            named=named,
            spec=spec,
            run_dir=run_dir,
            source=source,
            stepper=stepper,
            keeper=keeper,
            meter=meter,
            stop=stop,
            total_steps=_count_total_steps(spec, source),
            evaluate=evaluate,
            on_step=on_step,
        )
        try:
            run.open(resume=resume)
            run.settle_memory(planner)
            if record_graphs:
                run.record_graphs()
            return run.finish_all_steps()
        finally:
            run.close()


@dataclass(slots=True)
class _Run:
    """One call of `train`: the order in which its parts act."""

    model: TrainableModel
    named: Mapping[str, torch.nn.Parameter]
    spec: TrainSpec
    run_dir: RunDir
    source: RowSource
    stepper: Stepper
    keeper: Keeper
    meter: Meter
    stop: StopSignals
    total_steps: int
    evaluate: Callable[[], float] | None
    on_step: Callable[[Progress], None] | None
    state: TrainState = field(default_factory=TrainState)
    log: StepLog | None = None
    trackers: list[Tracker] = field(default_factory=list)

    # --- start and end ------------------------------------------------------------------------------------------

    def open(self, *, resume: bool) -> None:
        self.state = self.keeper.open(resume=resume)
        if not self.meter.peak_is_own:
            self.state.warn("peak memory is that of the whole process: this system can't reset it")
        # A pending step is logged once its validation is done.
        logged = self.state.step - (1 if self.state.pending else 0)
        self.log = StepLog(self.run_dir.steps, last_step=logged)
        self.trackers = open_trackers(
            self.spec.trackers, run_root=self.run_dir.root, config=self.keeper.identity, first_step=logged
        )
        self.model.train()

    def settle_memory(self, planner: Planner | None) -> None:
        """Follow the plan that the run began with, or make one."""
        keeper = self.keeper
        if keeper.plan is not None:
            follow_plan(self.model, keeper.plan)
        elif planner is not None and keeper.continued_from is None:
            rows = next(self.source.steps_from(None)).rows
            keeper.plan = settle_plan(planner, self.stepper, rows, self.meter.device)
            # What a probe took beyond the plan is not the run's.
            self.meter.peak_is_own = reset_peak_bytes(self.meter.device)

    def record_graphs(self) -> None:
        # What goes to the host and back does so by events that belong to one pass.
        model: Any = self.model
        if "offload" not in model.levels:
            plan = self.keeper.plan
            has_room = plan is not None and plan.has_room_for_graphs
            self.stepper.record_graphs(model.refresh, any_lengths=model.takes_any_lengths, has_room=has_room)

    def close(self) -> None:
        self.stepper.close()
        # Whoever judges or saves the model next must not meet active dropout.
        self.model.train(False)
        for tracker in self.trackers:
            tracker.close()
        if self.log is not None:
            self.log.close()

    # --- steps --------------------------------------------------------------------------------------------------

    def finish_all_steps(self) -> TrainOutcome:
        if self.state.pending is not None:
            self._finish_step(self.state.pending)
        steps = StepsAhead(self.source.steps_from(self.state.position))
        self.meter.skip_time()
        left = self.total_steps - self.state.step
        for number in range(left):
            self._stop_if_asked()
            step = steps.read(number)
            ahead = self.source.reads_ahead and number + 1 < left
            self.stepper.following = partial(steps.read, number + 1) if ahead else None
            self._finish_step(self._take_step(step))
        self._stop_if_asked()
        return self._conclude()

    def _take_step(self, step_rows: StepRows) -> Pending:
        assert self.spec.learning_rate != "auto"
        rate = learning_rate_at(
            self.state.step,
            total_steps=self.total_steps,
            warmup_steps=count_warmup_steps(self.total_steps, warmup=self.spec.warmup),
            peak=self.spec.learning_rate,
            schedule=self.spec.schedule,
        )
        result = self.stepper.take(step_rows.rows, step=self.state.step + 1, learning_rate=rate)
        seconds = self.meter.count_step(
            num_tokens=result.num_tokens, num_target_tokens=result.num_target_tokens
        )
        self.state.step += 1
        self.state.position = step_rows.position
        self.state.epoch = step_rows.epoch
        self.state.last_loss = result.loss
        self.state.warn(*result.notes)
        record = StepRecord(
            step=self.state.step,
            epoch=step_rows.epoch,
            loss=result.loss,
            grad_norm=result.grad_norm,
            learning_rate=rate,
            num_tokens=result.num_tokens,
            num_target_tokens=result.num_target_tokens,
            step_seconds=seconds,
            peak_bytes=self.meter.peak,
            measures=result.measures or None,
        )
        return Pending(record, step_rows.ends_epoch)

    def _finish_step(self, taken: Pending) -> None:
        """Validate if due, log, report, save if due."""
        record = taken.record
        if self.evaluate is not None and self._is_due(self.spec.evaluate_every, taken.ends_epoch):
            self.state.pending = taken
            record = replace(record, validation_loss=self._validate())
            self.state.pending = None
        assert self.log is not None
        self.log.append(record)
        for tracker in self.trackers:
            tracker.log(record)
        self._report(record)
        if self._is_due(self.spec.save_every, taken.ends_epoch):
            self._save()
        self.meter.skip_time()

    def _is_due(self, every: int | str, ends_epoch: bool) -> bool:
        """Every N steps or at epoch ends; the last step counts as both."""
        if every == "never":
            return False
        if self.state.step == self.total_steps:
            return True
        return ends_epoch if every == "epoch" else self.state.step % int(every) == 0

    def _validate(self) -> float:
        """Validation loss; keeps the weights if it is the lowest. A signal cuts it off: see `Pending`."""
        assert self.evaluate is not None
        random = read_random(self.meter.device)
        self.model.train(False)
        if self.stepper.graphs is not None:
            self.stepper.graphs.release()  # validation needs room, too
        try:
            with self.stop.interruptible():
                value = float(self.evaluate())
        except StopNow:
            set_random(random, self.meter.device)
            self._stop_if_asked()
            raise AssertionError("StopNow without a signal") from None
        finally:
            self.model.train(True)
            # Whatever validation draws, training goes on as if there had been none.
            set_random(random, self.meter.device)
        if not math.isfinite(value):
            raise TrainingFailed(
                f"step {self.state.step}",
                f"the validation loss is {value}",
                rule="a run with such weights has diverged",
                cure="Lower train.learning_rate",
            )
        self.state.last_validation_loss = value
        if self.state.best is None or value < self.state.best.loss:
            kept = copy_weights(self.named) if self.spec.keep_best else {}
            self.state.best = Best(self.state.step, value, kept)
        return value

    def _report(self, record: StepRecord) -> None:
        if self.on_step is None:
            return
        self.on_step(
            Progress(
                step=record.step,
                total_steps=self.total_steps,
                epoch=record.epoch,
                loss=record.loss,
                learning_rate=record.learning_rate,
                tokens_per_second=self.meter.tokens_per_second(),
                seconds_left=self.meter.seconds_left(self.total_steps - record.step),
                peak_bytes=record.peak_bytes,
                validation_loss=record.validation_loss,
            )
        )

    # --- saving -------------------------------------------------------------------------------------------------

    def _save(self) -> None:
        assert self.log is not None
        self.log.flush_to_disk()
        self.keeper.save(self.state)

    def _stop_if_asked(self) -> None:
        if self.stop.received is None:
            return
        # Nothing is lost by a signal before the first step.
        if self.state.step and (self.keeper.saved_step != self.state.step or self.state.pending is not None):
            self._save()
        saved = f"checkpoint of step {self.state.step} saved" if self.state.step else "nothing to save yet"
        raise Interrupted(
            str(self.run_dir.root),
            f"stopped by {self.stop.name} after step {self.state.step} of {self.total_steps}, {saved}",
            signal_number=self.stop.received,
            cure="Run the same command again to continue",
        )

    def _conclude(self) -> TrainOutcome:
        best = self.state.best
        if best is not None and self.spec.keep_best:
            put_weights(self.named, best.weights)
        for name, parameter in self.named.items():
            if not torch.isfinite(parameter).all():
                raise TrainingFailed(
                    f"step {self.state.step}", f"{name} is not finite", cure="Lower train.learning_rate"
                )
        if self.stepper.scale.overflows:
            self.state.warn(
                f"fp16: {self.stepper.scale.overflows} overflows, repeated with a smaller loss scale"
            )
        if self.stepper.graphs is not None and self.stepper.graphs.failure:
            self.state.warn(f"steps could not be recorded as CUDA graphs: {self.stepper.graphs.failure}")
        kept_best = best is not None and self.spec.keep_best
        totals = self.meter.totals()
        return TrainOutcome(
            steps=self.state.step,
            epochs=self.state.epoch,
            loss=self.state.last_loss,
            validation_loss=best.loss if best and kept_best else self.state.last_validation_loss,
            best_step=best.step if best and kept_best else (self.state.step if best else None),
            trained_parameters=sum(parameter.numel() for parameter in self.named.values()),
            train_tokens=int(totals["train_tokens"]),
            target_tokens=int(totals["target_tokens"]),
            wall_seconds=totals["wall_seconds"],
            cpu_seconds=totals["cpu_seconds"],
            peak_bytes=int(totals["peak_bytes"]),
            micro_batch_tokens=self.stepper.budget_tokens,
            memory_plan=None if self.keeper.plan is None else self.keeper.plan.to_json(),
            continued_from=self.keeper.continued_from,
            warnings=self.state.warnings,
        )


def _count_total_steps(spec: TrainSpec, source: RowSource) -> int:
    if spec.steps is None and source.steps_per_epoch is None:
        raise JobError(
            "train.steps",
            "is not given, and the number of rows isn't known",
            rule="a schedule needs the number of steps",
            cure="Give train.steps with data.streaming",
        )
    return count_steps(epochs=spec.epochs, steps=spec.steps, steps_per_epoch=source.steps_per_epoch or 1)


def _computes_in_fp16(model: TrainableModel) -> bool:
    """Whether gradients pass through fp16: weights may be fp32 masters of a model that computes in fp16."""
    if getattr(model, "dtype", None) == torch.float16:
        return True
    return any(parameter.dtype == torch.float16 for parameter in model.parameters())


def choose_budget(spec: TrainSpec, device: torch.device) -> int:
    """Tokens of a forward pass, where nothing is planned."""
    if spec.micro_batch_tokens == "auto" and spec.optimizer_in_backward:
        return sys.maxsize
    if spec.micro_batch_tokens == "auto":
        return _AUTO_BUDGET.get(device.type, _AUTO_BUDGET["cpu"])
    return spec.micro_batch_tokens

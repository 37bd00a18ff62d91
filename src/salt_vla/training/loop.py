"""The loop: from a run directory to a finished run, and from any interruption back to the same curve.

Knows what is done when; what a step computes, keeps or forgives is in the modules beside it.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

from salt_vla.batches import Batch, Batches
from salt_vla.config import TrainConfig, config_hash
from salt_vla.interrupts import StopFlag, Stopped, stop_on_signals
from salt_vla.loader import Loading, load_from
from salt_vla.progress import progress
from salt_vla.rundir import Onlooker, RunDirectory, Status, void
from salt_vla.senders import listen_again
from salt_vla.targets import TargetProvider, Task
from salt_vla.training.average import WeightAverage
from salt_vla.training.checkpoint import (
    CheckpointWriter,
    Keep,
    discard_after,
    point_to_best,
    restore_latest,
    sweep_unfinished,
)
from salt_vla.training.clock import Deadline, OutOfTime, Pace, Watchdog
from salt_vla.training.distributed import World
from salt_vla.training.guards import Hopeless, Setback, look_for_collapse, require_progress
from salt_vla.training.learner import Learner, build_learner, check_networks
from salt_vla.training.online_probe import OnlineProbe
from salt_vla.training.out_of_memory import memory_explained
from salt_vla.training.probe_rows import log_probe, look_first, restore_probe
from salt_vla.training.resume import (
    has_another_loss,
    last_step_of,
    prepare,
    record_changes,
    settle,
    start_of,
    trim_metrics,
)
from salt_vla.training.skipped import SkippedRecords, Tally
from salt_vla.training.state import RunState
from salt_vla.training.step import train_step, validate


def fit(
    run: RunDirectory,
    config: TrainConfig,
    train: Batches,
    validation: Batches,
    provider: TargetProvider,
    stop_at: int | None = None,
    note: str = "",
    world: World | None = None,
    allowed: Sequence[str] = (),
    probe: OnlineProbe | None = None,
) -> Status:
    """Train until `stop_at` (default: all of `config.steps`), resuming from the run's last checkpoint; `note`
    goes into the log.

    `stop_at` cuts a run short without touching its schedules; `allowed` names settings that may be others
    than the run's; `probe` adds lines of metrics and changes no others. Raises `Stopped` after a signal or
    before the time limit, with a checkpoint written. What is wrong with the settings is said before the run
    is touched.
    """
    world = world or World()
    run = run if world.is_first else Onlooker(run.path)
    config = settle(run, config, allowed)
    last_step = last_step_of(run, config.steps, stop_at)
    check_networks(config, provider.dim)
    deadline = Deadline(config.runtime.time_limit_minutes)
    deadline.require_room()
    training = Training(run, config, train, validation, provider, world, last_step, deadline, allowed, probe)
    training.status = run.claim(last_step)
    watchdog = Watchdog(
        config.runtime.watchdog_seconds, run.log_file, lambda why: _failed(run, "watchdog", f"hung: {why}")
    )
    with _end_on_record(run), world.losses_named(), memory_explained(config, provider.dim, world.size):
        training.begin(note)
        with watchdog, stop_on_signals() as stop:
            _until_done(training, stop, watchdog)
    training.status = training.status.over("finished", "finished", "finished")
    training.set_status()
    run.log(f"finished at step {training.state.step}")
    return training.status


def _until_done(training: Training, stop: StopFlag, watchdog: Watchdog) -> None:
    while True:
        try:
            return take_steps(training, stop, watchdog)
        except Setback as setback:
            training.go_back(str(setback))
        except Hopeless:
            # Else a resume with a cure would begin at what has been found to be the damage.
            training.give_up()
            raise


@dataclass
class Training:
    """A run in work: what stays as long as the process, and, from `begin` on, all that its steps need."""

    run: RunDirectory
    config: TrainConfig
    train: Batches
    validation: Batches
    provider: TargetProvider
    world: World
    last_step: int
    deadline: Deadline
    allowed: Sequence[str] = ()
    probe: OnlineProbe | None = None
    status: Status = field(default_factory=lambda: Status("queued"))
    state: RunState = field(default_factory=RunState)
    task: Task = field(init=False)
    learner: Learner = field(init=False)
    average: WeightAverage | None = field(init=False)
    saver: CheckpointWriter = field(init=False)
    skipped: SkippedRecords = field(init=False)
    tally: Tally = field(init=False)
    pace: Pace = field(init=False)

    def begin(self, note: str = "") -> None:
        """At the first step or at the run's last checkpoint."""
        run = self.run
        self._restore()
        step = self.state.step
        if 0 < step < self.last_step:
            self.status = replace(self.status, resumed_from=[*self.status.resumed_from, step])
        self.set_status()
        run.log(
            f"{'resumed at' if step else 'started,'} step {step}; {self.config.runtime}{note and f'; {note}'}"
        )
        if self.probe is not None:
            look_first(self.probe, run, self.learner, self.train, self.held_out(Tally()), step)

    def go_back(self, reason: str) -> None:
        """To the last checkpoint, as a resume does, and from there on with other clips."""
        failed = self.state
        self.saver.wait()
        self._restore(failed.safe_step)
        if self.world.is_first:
            discard_after(self.run.checkpoints, self.state.step)
        self.state = self.state.after_rollback(failed)
        self.run.log(f"{reason}; back to step {self.state.step}, and on with other clips")
        self._watch_clips()

    def give_up(self) -> None:
        """Leave only checkpoints that were good to go on from."""
        self.saver.wait()
        if self.world.is_first:
            discard_after(self.run.checkpoints, self.state.safe_step)
            self.run.log(f"given up; a resume goes on from step {self.state.safe_step}")
            point_to_best(self.run.checkpoints, self.state.best_step)

    def _restore(self, last_step: int | None = None) -> None:
        run, first = self.run, self.world.is_first
        with self.world.first_alone():
            self.config, self.task = prepare(run, self.config, self.train, self.provider, self.allowed)
        runtime = self.config.runtime
        start = start_of(run, self.config, last_step)
        self.learner = build_learner(self.config, self.provider.dim, runtime.device, self.world, start)
        keep = Keep(runtime.keep_checkpoints, runtime.keep_every)
        self.saver = CheckpointWriter(run.checkpoints, keep, config_hash(self.config))
        momentum = self.config.optimizer.average
        self.average = WeightAverage(self.learner.named_parameters(), momentum) if momentum else None
        if first:
            sweep_unfinished(run.checkpoints)
        self.task.begin(self.learner.encoder)
        self.state = restore_latest(self.learner, self.task, run.checkpoints, self.average, last_step)
        trim_metrics(run, self.state.step, goes_on=self.state.step < self.last_step)
        if first:
            record_changes(run, self.config, self.state.step)
            point_to_best(run.checkpoints, self.state.best_step)
        if self.world.agree(first and has_another_loss(run, self.state.step)):
            self.state.forget_losses()
        if self.probe is not None:
            restore_probe(self.probe, run, self.state.step, self.world)
        self._watch_clips()

    def _watch_clips(self) -> None:
        # Every process says what it does without, and counts its own; the first also what was before.
        self.skipped = SkippedRecords(RunDirectory(self.run.path))
        before = self.state.corrupt_records if self.world.is_first else 0
        self.tally = Tally(self.state.step * self.config.batch_size // self.world.size, before)
        self.pace = Pace(self.config.runtime.device)
        self.started = time.monotonic() - self.status.seconds

    def batches(self) -> Iterator[tuple[Batch, float]]:
        """(batch, seconds waited for it) of each step that is left."""
        self.train.steps = self.last_step + self.state.batches_passed
        loaded = load_from(self.train, self.state.next_batch, Loading.of(self.config))
        batches = self.world.in_step(self.skipped.watch(loaded, self.tally))
        for _ in range(self.state.step, self.last_step):
            began = time.monotonic()
            batch = next(batches)
            assert batch is not None  # Only a pass over held-out clips has fewer in some processes.
            yield batch, time.monotonic() - began

    def held_out(self, tally: Tally) -> Iterator[Batch]:
        """This process' share of the clips of each validation; damaged ones are counted."""
        part, count = (self.world.rank, self.world.size), self.config.runtime.validation_clips
        clips = self.validation.canonical(count, self.config.batch_size, part=part)
        return self.skipped.watch(clips, tally, may_be_none=self.world.size > 1)

    def is_due(self, every: int) -> bool:
        return self.ends or self.state.step % every == 0

    @property
    def ends(self) -> bool:
        return self.state.step == self.last_step

    def save(self) -> None:
        self.state.corrupt_records = self.world.total(self.tally.corrupt)
        probe = self.probe.state(self.state.step, self.world) if self.probe is not None else None
        self.saver.save(self.learner, self.task, self.state, self.average, probe)
        self.deadline.learn("checkpoint", self.saver.longest)
        self.set_status()

    def set_status(self, **changes: Any) -> None:
        seconds = time.monotonic() - self.started
        self.status = replace(self.status, step=self.state.step, seconds=seconds, **changes)
        self.run.set_status(self.status)


def take_steps(t: Training, stop: StopFlag, watchdog: Watchdog) -> None:
    """All that are left. Raises `Setback` when it is time to go back, `Stopped` when it is time to end."""
    runtime, state = t.config.runtime, t.state
    figures = ""
    watchdog.beat("start", grace=Loading.of(t.config).seconds_to_start)
    bar = progress(f"Training {t.run.name}", t.last_step, "steps", done=state.step)
    with bar if t.world.is_first else nullcontext(_silent) as advance:
        for batch, waited in t.batches():
            watchdog.beat(f"step {state.step + 1}")
            figures = _step(t, batch, waited) or figures
            listen_again()  # Processes may have been started since.
            # Asked once a step: a signal from here on waits for the next step's end.
            is_late = bool(t.deadline) and t.world.agree(t.deadline.is_near())
            stopping = t.world.is_stopping(stop) or is_late
            is_best = runtime.validation_clips and t.is_due(runtime.validate_every) and _validate(t)
            is_due = is_best or state.step % runtime.checkpoint_every == 0
            if is_due and not state.bad_in_a_row:
                state.planned_step = state.step
            if t.ends or stopping or state.planned_step == state.step:
                t.save()
            advance(1, note=figures)
            watchdog.beat(f"reading the clips of step {state.step + 1}", grace=watchdog.seconds)
            if stopping and not t.ends:
                t.saver.wait()
                where = f"at step {state.step} of {t.last_step}"
                stop.check(where)
                raise OutOfTime(where)
        t.saver.wait()


def _step(t: Training, batch: Batch, waited: float) -> str:
    """One step and its line of metrics; what the progress bar says of it, where there is a line."""
    runtime, state = t.config.runtime, t.state
    began = time.monotonic()
    logged = state.step + 1 == t.last_step or (state.step + 1) % runtime.log_every == 0
    batch = batch.to(runtime.device)
    row = train_step(t.learner, batch, t.task, t.config, state.step, logged, state, t.probe)
    state.step += 1
    reason = row.pop("bad", "")
    if reason:
        clips = ", ".join(f"{clip} (view {view})" for clip, view in batch.keys[:4])
        t.run.log(f"step {state.step} left the weights as they were: {reason}; its clips: {clips}, …")
    elif t.average is not None:
        t.average.update(state.step - state.missed_updates - 1)
    seconds = time.monotonic() - began
    t.pace.step(t.config.batch_size, waited)
    t.deadline.learn("step", waited + seconds)
    if logged:
        row |= {"data_wait_s": round(waited, 4), "step_s": round(seconds, 4)} | t.pace.as_row()
        corrupt = t.world.total(t.tally.corrupt)
        collapse = look_for_collapse(row, t.config, void if state.collapsed else t.run.log)
        state.collapsed = int(bool(collapse))
        row |= collapse | Tally(corrupt=corrupt).as_row()
        t.run.log_metrics(row)
    if state.step % runtime.log_every == 0:
        state.begin_line()
    require_progress(state, t.config.guards, reason)
    if not logged:
        return ""
    damaged = f", {corrupt} damaged records skipped" * bool(corrupt)
    bad = f", {state.bad_steps} bad steps" * bool(state.bad_steps)
    return f"loss {row['loss']:.3f}, R² over place means {row['r2_position_mean']:+.3f}{damaged}{bad}"


def _validate(t: Training) -> bool:
    """A line of metrics on held-out clips; whether it is the best so far."""
    began = time.monotonic()
    probe = t.probe if t.probe is not None and t.probe.is_due(t.state.step) else None
    row = _held_out(t, probe)
    if t.average is not None:
        with t.average.in_place():
            averaged = _held_out(t)
        row |= {f"avg_{name}": averaged[name] for name in row if name == "loss" or name.startswith("r2_")}
    t.run.log_metrics(row)
    if probe is not None:
        log_probe(probe, t.run, t.world, t.state.step)
    t.deadline.learn("validation", time.monotonic() - began)
    r2, state = row["r2_position_mean"], t.state
    # Where the run was only cut short, or its weights are those of an earlier step, nobody would look.
    is_planned = state.step % t.config.runtime.validate_every == 0 or state.step == t.config.steps
    is_better = math.isfinite(r2) and (state.best_r2 is None or r2 > state.best_r2)
    is_best = is_better and is_planned and not state.bad_in_a_row
    if is_best:
        state.best_r2, state.best_step = r2, state.step
    return is_best


def _held_out(t: Training, probe: OnlineProbe | None = None) -> dict[str, Any]:
    tally, runtime, world = Tally(), t.config.runtime, t.world
    good = t.held_out(tally)
    row = validate(t.learner, good, t.task, t.config, t.state.step, runtime.device, probe)
    return row | Tally(corrupt=world.total(tally.corrupt)).as_row()


def _silent(amount: int = 1, note: str = "") -> None:
    """The bar of a process that does not talk."""


def _failed(run: RunDirectory, ending: str, reason: str) -> None:
    run.log(f"failed: {reason}")
    run.set_status(run.status().over("failed", ending, reason))


@contextmanager
def _end_on_record(run: RunDirectory) -> Iterator[None]:
    """Whatever ends the block early is in the run's status."""
    try:
        yield
    except Stopped as stopped:
        ending = "time_limit" if isinstance(stopped, OutOfTime) else "signal"
        run.set_status(run.status().over("stopped", ending, str(stopped)))
        raise
    except KeyboardInterrupt:
        # A second Ctrl-C does not wait for the step's end: the last checkpoint is what a resume starts from.
        run.set_status(run.status().over("stopped", "signal", "interrupted within a step"))
        raise
    except BaseException as error:
        _failed(run, "exception", f"{type(error).__name__}: {error}")
        raise

"""What a job waits for: how it is written, and what is said of it before, when and after it holds."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from dataclasses import replace
from datetime import datetime
from pathlib import Path

import psutil
import pytest

from salt_vla.config import to_json
from salt_vla.errors import ConfigError, UserError
from salt_vla.operations.conditions import (
    Condition,
    Kind,
    figure_condition,
    in_clock,
    parse_figure,
    parse_free,
    parse_time,
)
from salt_vla.operations.conditions_now import (
    Answer,
    Now,
    answer,
    ending_of,
    may_start,
    nobody_works_on,
    statistic,
)
from salt_vla.operations.launch import Attempt, Launch, Supervision, record
from salt_vla.operations.processes import ProcessId, identity
from salt_vla.operations.queue import Job, JobState
from salt_vla.operations.slots import environment_of, first_slot, holding, require_slot, require_wish, suits
from salt_vla.recipes import get_recipe
from salt_vla.rundir import RunDirectory, Status

GONE = ProcessId(2**22 - 1, 1.0)


@pytest.fixture(autouse=True)
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SALT_VLA_ROOT", str(tmp_path))
    return tmp_path


@pytest.fixture
def make_run(root: Path) -> Callable[..., RunDirectory]:
    """`make_run(name, losses, state)`: a run with these losses in `train`."""

    def make(name: str, losses: tuple[float, ...] = (3.0, 2.0), state: str = "finished") -> RunDirectory:
        run = RunDirectory.named(name)
        run.path.mkdir(parents=True)
        for step, loss in enumerate(losses, start=1):
            run.log_metrics({"kind": "train", "step": step, "loss": loss})
        pid, started = (
            (psutil.Process().pid, psutil.Process().create_time()) if state == "running" else (0, 0.0)
        )
        run.set_status(Status(state, step=len(losses), total_steps=9, pid=pid, started=started))
        return run

    return make


def job(number: int = 1, name: str = "e1", state: JobState = "waiting", *waits: Condition) -> Job:
    command = ("train", "demo_student", "--name", name)
    return Job(
        number, name, command, "/", "any", 0, 1, waits, state, False, 1, "", "so it was", 0.0, None, None, "t"
    )  # fmt: skip


def now(*jobs: Job, slot: str = "cpu", clock: float = 1000.0) -> Now:
    return Now({each.id: each for each in jobs}, slot, clock)


def figure(text: str, kind: Kind = "if", number: int = 0) -> Condition:
    return figure_condition(kind, text, lambda name: number)  # type: ignore[arg-type]


# How it is written


@pytest.mark.parametrize(
    ("text", "run", "of", "column", "sign", "number"),
    [
        ("e1.val.loss < 10.76", "e1", "last", "val.loss", "<", 10.76),
        ("min(e1.train.loss)<10.76", "e1", "min", "train.loss", "<", 10.76),
        ("mean_last100(exp1.v2.train.loss)  <=  1e1", "exp1.v2", "mean_last100", "train.loss", "<=", 10.0),
        ("max(a-b.val.r2_position_mean) > -.5", "a-b", "max", "val.r2_position_mean", ">", -0.5),
        ("last(e1.probe.action) >= 0", "e1", "last", "probe.action", ">=", 0.0),
    ],
)
def test_a_figure_is_read(text: str, run: str, of: str, column: str, sign: str, number: float) -> None:
    read = parse_figure(text)
    criterion = read.criterion
    assert (read.run, read.statistic, f"{criterion.kind}.{criterion.field}") == (run, of, column)
    assert (criterion.sign, criterion.number) == (sign, number)


@pytest.mark.parametrize(
    "text",
    [
        "", "e1", "e1.val.loss", "val.loss < 3", "e1.val.loss = 3", "e1.val.loss < nan",
        "e1.val.loss < 1e999",
        "median(e1.val.loss) < 3", "min(e1.val.loss < 3", "e1.val.loss < parent", "e1.val.loss < e2.val.loss",
        "__import__('os').system('x') < 3",
    ],
)  # fmt: skip
def test_what_is_no_figure_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match=r"does not read|beyond what|needs a number"):
        parse_figure(text)


def test_times_are_this_clocks_or_from_now() -> None:
    assert parse_time("2031-05-04 03:00", 0.0) == datetime(2031, 5, 4, 3, 0).timestamp()
    assert [parse_time(text, 100.0) for text in ("+2h", "+1.5 min", "+30s", "+1d")] == [
        7300.0, 190.0, 130.0, 86500.0
    ]  # fmt: skip
    for text, sentence in (
        ("tonight", "is no time; write it as"),
        ("+2weeks", "is no time"),
        ("2020-01-01 03:00", "has passed; leave it out"),
        ("99999-01-01", "is no time"),
    ):
        with pytest.raises(ConfigError, match=sentence):
            parse_time(text, time.time())


def test_amounts_are_of_gpu_ram_or_disk() -> None:
    assert parse_free("gpu:20GB") == Condition("when_free", "gpu:20GB", number=20e9)
    assert parse_free("disk: 1GiB").number == 2**30
    for text in ("20GB", "tpu:20GB", "gpu:", "gpu:lots", "ram:0GB"):
        with pytest.raises(ConfigError):
            parse_free(text)


def test_slots_are_named_and_jobs_wish_for_them() -> None:
    assert [require_slot(slot) for slot in ("cpu", "gpu0", "gpu11")] == ["cpu", "gpu0", "gpu11"]
    for slot in ("any", "gpu", "cpu1", "gpu-1", "../x", ""):
        with pytest.raises(ConfigError):
            require_slot(slot)
    for wish in ("tpu", "gpux", ""):
        with pytest.raises(ConfigError):
            require_wish(wish)
    slots = ("cpu", "gpu0", "gpu1")
    fitting = {wish: [slot for slot in slots if suits(wish, slot)] for wish in ("any", "cpu", "gpu", "gpu1")}
    assert fitting == {"any": [*slots], "cpu": ["cpu"], "gpu": ["gpu0", "gpu1"], "gpu1": ["gpu1"]}
    assert environment_of("cpu") == {"CUDA_VISIBLE_DEVICES": ""}
    assert environment_of("gpu11") == {"CUDA_VISIBLE_DEVICES": "11"}


def test_a_slot_is_held_by_one_and_free_afterwards() -> None:
    with holding("cpu"):
        with pytest.raises(UserError, match="a runner is at work in slot cpu already"), holding("cpu"):
            pass
        with holding("gpu0"):
            pass
    with holding("cpu"):
        pass


# After jobs and runs


@pytest.mark.parametrize(
    ("state", "after", "after_any"),
    [
        ("waiting", "waits", "waits"),
        ("starting", "waits", "waits"),
        ("running", "waits", "waits"),
        ("finished", "holds", "holds"),
        ("failed", "never", "holds"),
        ("stopped", "never", "holds"),
        ("skipped", "never", "holds"),
        ("cancelled", "never", "holds"),
    ],
)
def test_a_job_waits_for_anothers_end(state: JobState, after: str, after_any: str) -> None:
    at = now(job(1, "e1", state))
    found = answer(Condition("after", "e1", 1), at)
    assert found.state == after
    assert answer(Condition("after_any", "e1", 1), at).state == after_any
    if after == "never":
        assert found.why in (f"e1 {state} (so it was)", f"e1 was {state} (so it was)")
    if after == "waits":
        assert found.why.startswith("waits for e1, which ")


def test_a_runs_end_is_expected_as_its_pace_says(make_run: Callable[..., RunDirectory]) -> None:
    run = make_run("e1", (), "running")
    assert ending_of(job(1, "e1", "running"), 1000.0) is None
    config = replace(get_recipe("demo_student").config, batch_size=4, grad_accum_steps=1)
    run.config_file.write_text(to_json(config))
    for step in (1, 2, 3):
        run.log_metrics({"kind": "train", "step": step, "loss": 1.0, "clips_per_s": 2.0})
    assert ending_of(job(1, "e1", "running"), 1000.0) == 1000.0 + (9 - 3) * 4 / 2.0
    found = answer(Condition("after", "e1", 1), now(job(1, "e1", "running")))
    assert (found.state, found.expected) == ("waits", 1012.0)


@pytest.mark.parametrize(
    ("state", "after", "after_any"),
    [
        ("running", "waits", "waits"), ("finished", "holds", "holds"), ("failed", "never", "holds"),
        ("killed", "never", "holds"), ("stopped", "never", "holds"),
    ],
)  # fmt: skip
def test_a_job_waits_for_a_run_that_the_queue_does_not_know(
    make_run: Callable[..., RunDirectory], state: str, after: str, after_any: str
) -> None:
    make_run("e1", state=state)
    assert answer(Condition("after", "e1"), now()).state == after
    assert answer(Condition("after_any", "e1"), now()).state == after_any


@pytest.mark.parametrize(("code", "after"), [(None, "waits"), (0, "holds"), (1, "never")])
def test_a_job_waits_for_a_launch_that_is_no_run(root: Path, code: int | None, after: str) -> None:
    folder = root / "jobs" / "caching"
    folder.mkdir(parents=True)
    state = "running" if code is None else "ended"
    record(folder, Supervision("t", state, identity(), (Attempt(GONE, code),), exit_reason="exit code"))
    assert answer(Condition("after", "caching"), now()).state == after


def test_a_run_between_two_attempts_has_not_ended(root: Path, make_run: Callable[..., RunDirectory]) -> None:
    run = make_run("e1", state="failed")
    record(run.path, Supervision("t", "waiting", identity(), (Attempt(GONE, 1),), 1))
    found = answer(Condition("after_any", "e1"), now())
    assert (found.state, found.why) == ("waits", "waits for e1, which is under way")


# On figures


@pytest.mark.parametrize(
    ("losses", "text", "holds"),
    [
        ((3.0, 2.0, 2.5), "e1.train.loss < 2.4", False),
        ((3.0, 2.0, 2.5), "min(e1.train.loss) < 2.4", True),
        ((3.0, 2.0, 2.5), "max(e1.train.loss) >= 3", True),
        ((3.0, 2.0, 2.5), "mean_last100(e1.train.loss) <= 2.5", True),
        ((9.0, *[2.0] * 100), "mean_last100(e1.train.loss) <= 2", True),
        ((9.0, *[2.0] * 99), "mean_last100(e1.train.loss) <= 2", False),
        ((2.0, math.nan), "e1.train.loss < 10", False),
        ((2.0, math.nan), "e1.train.loss > 0", False),
        ((2.0, math.nan), "min(e1.train.loss) < 10", False),
        ((2.0, math.nan, 2.0), "min(e1.train.loss) < 10", True),
        ((2.0, math.nan, 2.0), "mean_last100(e1.train.loss) < 10", False),
        ((math.inf,), "e1.train.loss > 0", False),
    ],
)
def test_a_figure_decides_and_of_if_and_unless_one_holds(
    make_run: Callable[..., RunDirectory], losses: tuple[float, ...], text: str, holds: bool
) -> None:
    """What is no number satisfies nothing: the job under --if is skipped, the one under --unless runs."""
    make_run("e1", losses)
    states = {kind: answer(figure(text, kind), now()).state for kind in ("if", "unless")}
    assert states == {"if": "holds" if holds else "never", "unless": "never" if holds else "holds"}


def test_a_figure_that_says_no_is_told_with_its_value(make_run: Callable[..., RunDirectory]) -> None:
    make_run("e1", (11.0, 10.8))
    make_run("e2", (math.nan,))
    assert (
        answer(figure("min(e1.train.loss) < 10.76"), now()).why == "min(e1.train.loss), 10.8, is not < 10.76"
    )
    assert answer(figure("e1.train.loss < 11", "unless"), now()).why == "e1.train.loss, 10.8, is < 11"
    assert (
        answer(figure("e2.train.loss < 11"), now()).why == "e2.train.loss, no number at the end, is not < 11"
    )


@pytest.mark.parametrize("kind", ["if", "unless"])
def test_a_figure_of_a_column_that_is_not_there_decides_neither_way(
    make_run: Callable[..., RunDirectory], kind: Kind
) -> None:
    make_run("e1")
    found = answer(figure("e1.train.los < 3", kind), now())
    assert (found.state, found.why) == ("never", "e1 measured no train.los; its columns: loss")


@pytest.mark.parametrize("kind", ["if", "unless"])
@pytest.mark.parametrize(
    ("state", "expected"),
    [("running", "waits"), ("failed", "never"), ("stopped", "never"), ("killed", "never")],
)
def test_figures_are_read_of_runs_that_ended_well(
    make_run: Callable[..., RunDirectory], kind: Kind, state: str, expected: str
) -> None:
    make_run("e1", (1.0,), state)
    found = answer(figure("e1.train.loss < 3", kind), now())
    assert found.state == expected
    assert "whether" in found.why if expected == "waits" else "its figures decide nothing" in found.why


def test_a_run_that_was_resumed_has_the_figures_it_has_now(make_run: Callable[..., RunDirectory]) -> None:
    run = make_run("e1", (5.0, 1.0, 4.0))
    run.trim_metrics(1)
    run.log_metrics({"kind": "train", "step": 2, "loss": 3.0})
    assert answer(figure("min(e1.train.loss) < 3"), now()).state == "never"
    assert answer(figure("min(e1.train.loss) <= 3"), now()).state == "holds"


def test_damaged_metrics_are_waited_for_with_their_sentence(make_run: Callable[..., RunDirectory]) -> None:
    run = make_run("e1")
    run.metrics_file.write_text("no json\n" + run.metrics_file.read_text())
    found = answer(figure("e1.train.loss < 3"), now())
    assert found.state == "waits"
    assert "is damaged in line 1" in found.why


@pytest.mark.parametrize(
    ("column", "name", "expected"),
    [
        ([], "last", None),
        ([1, 2], "last", 2.0),
        ([True], "last", None),
        (["3"], "min", None),
        ([2, None], "max", None),
    ],
)
def test_statistics_are_of_numbers(column: list[object], name: str, expected: float | None) -> None:
    assert statistic(column, name) == expected


# On caches, times, the machine


def test_a_cache_is_waited_for_until_its_manifest_says_complete(root: Path) -> None:
    folder = root / "caches" / "ssv2"
    condition = Condition("after_cache", str(folder))
    assert answer(condition, now()) == Answer("waits", f"waits for a cache at {folder}, where none is yet")
    folder.mkdir(parents=True)
    manifest = folder / "manifest.json"
    for complete in (False, "true", None):
        manifest.write_text(json.dumps({"complete": complete}))
        assert answer(condition, now()).why == f"waits for the cache at {folder}, which is not complete yet"
    manifest.write_text("{}")
    assert answer(condition, now()).state == "waits"
    manifest.write_text('{"complete": tr')
    assert "damaged" in answer(condition, now()).why
    manifest.write_text(json.dumps({"complete": True}))
    assert answer(condition, now()).state == "holds"


def test_a_real_cache_is_recognised(root: Path, build_cache: Callable[..., object]) -> None:
    build_cache(root / "caches" / "real")
    assert answer(Condition("after_cache", str(root / "caches" / "real")), now()).state == "holds"


def test_a_time_has_come_or_is_said() -> None:
    condition = Condition("at", "2001-09-09", number=1e9)
    assert answer(condition, now(clock=1e9)).state == "holds"
    waits = answer(condition, now(clock=1e9 - 1))
    assert (waits.state, waits.expected) == ("waits", 1e9)
    assert waits.why.startswith("waits until 2001-09-")


def test_what_must_be_free_is_measured_here() -> None:
    assert answer(Condition("when_free", "ram:1MB", number=1e6), now()).state == "holds"
    assert answer(Condition("when_free", "disk:1KB", number=1e3), now()).state == "holds"
    for what in ("ram", "disk"):
        found = answer(Condition("when_free", f"{what}:9999TB", number=1e18), now())
        assert found.state == "waits"
        assert " GB are free now" in found.why


NVIDIA_SMI = """#!/bin/sh
case "$*" in
  "--query-gpu=memory.free --format=csv,noheader,nounits --id=1") echo 20000 ;;
  *) echo "No devices were found" ; exit 6 ;;
esac
"""


def test_a_gpus_memory_is_asked_of_its_driver(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tool = root / "nvidia-smi"
    tool.write_text(NVIDIA_SMI)
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{root}:/usr/bin:/bin")
    condition = Condition("when_free", "gpu:20GB", number=20e9)
    assert answer(condition, now(slot="gpu1")).state == "holds"
    assert answer(replace(condition, number=21e9), now(slot="gpu1")).why.endswith("21.0 GB are free now")
    assert "no GPU answers here" in answer(condition, now(slot="gpu0")).why
    assert "no GPU answers here" in answer(condition, now(slot="cpu")).why
    assert first_slot() == "cpu"
    tool.write_text("#!/bin/sh\necho 20000\n")
    assert first_slot() == "gpu0"
    tool.unlink()
    assert first_slot() == "cpu"
    assert "no GPU answers here" in answer(condition, now(slot="gpu1")).why


# All together


def test_every_condition_must_hold_and_what_can_never_hold_outweighs_waiting() -> None:
    failed, runs = job(1, "e1", "failed"), job(2, "e2", "running")
    later = Condition("at", "", number=2000.0)
    after_failed, after_running = Condition("after", "e1", 1), Condition("after", "e2", 2)
    any_end = Condition("after_any", "e1", 1)
    at = now(failed, runs)
    assert may_start(job(3, "e3", "waiting"), at).state == "holds"
    assert may_start(job(3, "e3", "waiting", any_end), at).state == "holds"
    waits = may_start(job(3, "e3", "waiting", any_end, later), at)
    assert (waits.state, waits.expected) == ("waits", 2000.0)
    both = may_start(job(3, "e3", "waiting", later, after_running), at)
    assert both.why.count("waits") == 2
    assert both.expected is None  # Of one of them nobody knows.
    never = may_start(job(3, "e3", "waiting", later, after_running, after_failed), at)
    assert (never.state, never.why) == ("never", "e1 failed (so it was)")


def test_the_machine_is_asked_last(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Asking starts a program each time."""
    tool, asked = root / "nvidia-smi", root / "asked"
    tool.write_text(f"#!/bin/sh\necho asked >> {asked}\necho 99999\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{root}:/usr/bin:/bin")
    gpu, later = Condition("when_free", "gpu:1GB", number=1e9), Condition("at", "", number=2000.0)
    waiting = job(3, "e3", "waiting", gpu, later)
    assert "free" not in may_start(waiting, now(slot="gpu0")).why
    assert not asked.exists()
    assert may_start(waiting, now(slot="gpu0", clock=2000.0)).state == "holds"
    assert asked.exists()


def test_a_run_that_somebody_works_on_is_not_started_beside_it(make_run: Callable[..., RunDirectory]) -> None:
    run = make_run("e1", state="running")
    found = may_start(job(), now())
    assert found.why == "waits for e1, which is under way and was not started by the queue"
    run.set_status(Status("stopped"))
    assert may_start(job(), now()).state == "holds"
    record(run.path, Supervision("t", "running", GONE, (Attempt(identity()),)))
    assert may_start(job(), now()).state == "waits"  # Its supervisor is gone, the command works.
    record(run.path, Supervision("t", "running", GONE, (Attempt(GONE),)))
    assert may_start(job(), now()).state == "holds"


def test_conditions_are_said_in_words() -> None:
    said = [
        str(condition)
        for condition in (
            Condition("after", "e1"), Condition("after_any", "e1"), Condition("after_cache", "/c"),
            parse_free("gpu:20GB"), figure("e1.val.loss  < 3"), figure("e1.val.loss < 3", "unless"),
        )
    ]  # fmt: skip
    assert said == [
        "e1 to end well",
        "e1 to end",
        "the cache at /c to be complete",
        "20GB free of gpu",
        "e1.val.loss < 3, once it can be told",
        "not e1.val.loss < 3, once it can be told",
    ]
    assert Launch("x", ("recipes",), "").folder.name == "x"


@pytest.mark.parametrize("seconds", [1e12, 1e30, math.inf, math.nan])
def test_an_end_that_no_clock_shows_is_no_traceback(seconds: float) -> None:
    """What is expected of a run that hardly moves."""
    assert in_clock(seconds) == "after the year 9999"


def test_files_that_hold_what_nobody_wrote_end_no_runner(make_run: Callable[..., RunDirectory]) -> None:
    """What cannot be told is waited for, with the reason; the other jobs go their way."""
    run = make_run("e1")
    status = json.loads((run.path / "status.json").read_text())
    for key, value in (("state", [1]), ("state", {}), ("pid", "many")):
        (run.path / "status.json").write_text(json.dumps(status | {key: value}))
        found = answer(Condition("after", "e1"), now())
        assert found.state == "waits"
        assert "which cannot be told: " in found.why
    (run.path / "status.json").write_text(json.dumps(status))
    with run.metrics_file.open("a") as file:
        file.write(f'{{"kind": "val", "step": 9, "loss": {10**400}}}\n')
    found = answer(Condition("if", "e1.val.loss < 3"), now())
    assert (found.state, "OverflowError" in found.why) == ("waits", True)


def test_an_end_that_cannot_be_guessed_hides_no_job(make_run: Callable[..., RunDirectory]) -> None:
    working = job(1, "e1", "running")
    run = make_run("e1", state="running")
    run.metrics_file.unlink()
    run.metrics_file.mkdir()
    assert ending_of(working, 0.0) is None
    status = json.loads((run.path / "status.json").read_text())
    (run.path / "status.json").write_text(json.dumps(status | {"pid": 1.5}))
    assert ending_of(working, 0.0) is None
    assert nobody_works_on(working).state == "waits"

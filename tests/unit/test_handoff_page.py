"""What the page's sections say of runs in every state, and which steps follow from them."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from salt_vla.config import override, to_json
from salt_vla.operations.handoff import gather
from salt_vla.operations.handoff.sections import Project, sections
from salt_vla.operations.handoff.write import to_page, write_handoff
from salt_vla.operations.launch import Launch
from salt_vla.operations.queue import Queue, Wanted
from salt_vla.recipes import get_recipe
from salt_vla.reports.html import Checks, Code, Facts, Section
from salt_vla.reports.tables import Cell, Table
from salt_vla.rundir import RunDirectory, Status, write_text
from salt_vla.verdicts import note_recipe

Make = Callable[..., RunDirectory]


@pytest.fixture
def make(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Make:
    """`make(name, *overrides, state="finished", step=60, rows=…)`: a run of demo_student, or of `recipe`."""
    monkeypatch.setenv("SALT_VLA_ROOT", str(tmp_path))

    def build(
        name: str, *fields: str, recipe: str = "demo_student", state: str = "finished", step: int = 60,
        loss: Callable[[int], float] = lambda step: 1.0, r2: float | None = None, seed: int = 0,
        **columns: Any,
    ) -> RunDirectory:  # fmt: skip
        run = RunDirectory(tmp_path / "runs" / name)
        given = ["steps=60", "optimizer.warmup_steps=6", *fields]
        config = replace(override(get_recipe(recipe).config, given), seed=seed)
        write_text(run.config_file, to_json(config))
        note_recipe(run, get_recipe(recipe), config)
        reason = state if state == "finished" else f"because it was {state}"
        run.set_status(Status(state, step=step, total_steps=60, exit_reason=reason, seconds=7200.0))
        for line in range(1, step + 1):
            run.log_metrics({"kind": "train", "step": line, "loss": loss(line), "lr": 1e-3} | columns)
        if r2 is not None:
            run.log_metrics({"kind": "val", "step": step, "loss": 1.0, "r2_position_mean": r2})
        return run

    return build


def page(project: Project) -> dict[str, str]:
    return {name: to_page(section) for name, section in sections(project).items()}


def commands(project: Project) -> list[str]:
    return [step.command for step in project.steps]


def test_runs_that_broke_off_come_first_each_with_its_reason_and_command(make: Make) -> None:
    make("whole", r2=0.2)
    for state in ("stopped", "failed", "killed"):
        make(state, state=state, step=30)
    project = gather()
    first = project.steps[:3]
    assert {step.command.split("--name ")[1].split()[0] for step in first} == {"stopped", "failed", "killed"}
    assert all("because it was" in step.what and "step 30 of 60" in step.what for step in first)
    assert [("look at the reason first" in step.what) for step in first].count(True) == 1
    said = page(project)["failures"]
    assert "✗ failed: failed at step 30: because it was failed" in said
    assert "· stopped: " in said and "whole" not in said


def test_what_the_queue_will_do_is_no_step(make: Make, tmp_path: Path) -> None:
    make("stopped", state="stopped", step=30)
    queue = Queue()
    queue.add(Wanted(("train", "demo_student", "--name", "stopped"), str(tmp_path), "stopped"))
    project = gather()
    assert not any("--name stopped" in command for command in commands(project))
    assert commands(project)[0] == "salt-vla queue run --detach"
    assert "| stopped | waiting | waits for its turn |" in page(project)["queue"]


def test_a_job_that_was_skipped_is_tried_again_by_name(make: Make, tmp_path: Path) -> None:
    make("whole", r2=0.2)
    queue = Queue()
    job = queue.add(Wanted(("train", "demo_student", "--name", "later"), str(tmp_path), "later"))
    queue.skip(job, "e1 measured no val.loss")
    project = gather()
    assert "salt-vla queue retry later" in commands(project)
    assert "| later | skipped | e1 measured no val.loss |" in page(project)["queue"]


def test_a_damaged_queue_is_said_and_hides_nothing(make: Make, tmp_path: Path) -> None:
    make("whole", r2=0.2)
    (tmp_path / "queue.db").write_text("no database, but long enough to be looked at as one" * 100)
    project = gather()
    assert "queue.db" in page(project)["queue"]
    assert "| whole (demo_student) |" in page(project)["experiments"]


def test_a_run_that_ended_before_its_settings_is_started_as_it_was(make: Make, tmp_path: Path) -> None:
    run = RunDirectory(tmp_path / "runs" / "early")
    run.path.mkdir(parents=True)
    run.set_status(Status("failed", exit_reason="ConfigError: there is no field 'x'"))
    launch = Launch("early", ("train", "demo_student", "--name", "early"), "t")
    write_text(
        run.path / "launch.json", json.dumps({"name": launch.name, "command": launch.command, "token": "t"})
    )
    project = gather()
    assert project.steps[0].command == "salt-vla train demo_student --name early"
    assert "before it began" in project.steps[0].what and "no field 'x'" in project.steps[0].what


def test_losses_of_different_spaces_stand_in_different_tables(make: Make) -> None:
    make("a", r2=0.1)
    make("b", "optimizer.lr=2e-3", r2=0.2)
    make("raw", "objective.targets=raw", r2=0.9)
    make("moving", recipe="demo_jepa", r2=0.3)
    make("moving2", recipe="demo_jepa", r2=0.3)
    said = page(gather())["experiments"]
    tables = [part.split("\n\n")[1] for part in said.split("**Targets: ")[1:]]
    rows = [{line.split(" ")[1] for line in table.splitlines()[2:]} for table in tables]
    # Targets of its own that move compare with no other run's, not even of the same recipe.
    assert sorted(map(sorted, rows)) == [["a", "b"], ["moving"], ["moving2"], ["raw"]]
    assert "losses compare within a table" in said


def test_a_row_says_what_was_measured(make: Make) -> None:
    make("a", loss=lambda step: 2.0 - (step == 31), r2=0.125)
    row = next(line for line in page(gather())["experiments"].splitlines() if line.startswith("| a "))
    assert [cell.strip() for cell in row.split("|")[2:-1]] == [
        "–", "1 at 31", "2", "+0.125", "–", "–", "60", "960", "2.00", "finished",
    ]  # fmt: skip


def test_alarms_and_plateaus_are_learned_from(make: Make) -> None:
    make(
        "flat", loss=lambda step: 11.5, r2=-0.2, collapse=True, bad_steps=3, rollbacks=1, data_wait_share=0.5
    )
    make("falling", loss=lambda step: 10.0 - step / 10, r2=0.5)
    project = gather()
    lines = {
        line.split(": ")[0]: line for line in page(project)["learned"].splitlines() if line.startswith("- ")
    }
    flat = lines["- · flat"]
    for words in ("its loss stands", "R² against each place's mean is -0.200", "collapse alarm rang 60 times",
                  "3 bad steps", "1 returns", "50% of its time"):  # fmt: skip
        assert words in flat
    assert "its loss still falls" in lines["- ✓ falling"]
    longer = next(step for step in project.steps if "still fell" in step.what)
    assert "steps=120" in longer.command and "--name falling-longer" in longer.command


def test_a_flat_end_under_a_rate_of_nothing_is_the_rates_doing(make: Make) -> None:
    run = make("cosine", loss=lambda step: 11.5, r2=0.1)
    run.log_metrics({"kind": "train", "step": 61, "loss": 11.5, "lr": 1e-6})
    assert "its rate ended at 0% of the peak" in page(gather())["learned"]


def test_one_seed_asks_for_another(make: Make) -> None:
    make("slow", "optimizer.lr=1e-3", r2=0.1)
    make("fast", "optimizer.lr=2e-3", r2=0.2)
    asked = [step for step in gather().steps if "seed" in step.what]
    assert [step.what for step in asked if "1 seed only" in step.what]
    assert {command.split("--name ")[1].split()[0] for command in (step.command for step in asked)} == {
        "slow-seed1", "fast-seed1",
    }  # fmt: skip


def test_recipes_that_can_be_run_here_are_proposed(make: Make) -> None:
    make("teacher", recipe="demo_teacher", r2=0.1)
    project = gather()
    proposed = [step.command for step in project.steps if "open hypothesis" in step.what]
    # Sixty steps answer nothing of it. demo_student lacks its cache.
    assert proposed == [f"salt-vla train {name} --name {name}" for name in ("demo_teacher", "demo_jepa")]
    said = page(project)["hypotheses"]
    assert "demo_student: Targets centred" in said and "Runs: none here." in said
    write_text(make("answer", recipe="demo_jepa", r2=0.1).path / "verdict.json",
               '{"verdict": "refuted", "reason": "it is not"}')  # fmt: skip
    project = gather()
    assert not any("demo_jepa --name demo_jepa" in command for command in commands(project))
    assert "demo_jepa" not in page(project)["hypotheses"]


def test_encoders_that_nobody_has_read_are_probed_together(make: Make) -> None:
    make("a", r2=0.1)
    make("b", "optimizer.lr=2e-3", r2=0.1)
    rows = [
        {"encoder": "b", "suite": "front/grid", "target": "action", "value": 0.5, "low": 0.4, "high": 0.6}
    ]
    pair = {"encoder": "b", "against": "random", "suite": "front/grid", "target": "action"}
    pairs = [pair | {"difference": 0.2, "low": 0.1, "high": 0.3}]
    suites = [{"suite": "front/grid", "clip_table": "t", "rows": rows, "comparisons": pairs},
              {"suite": "front/mean", "clip_table": "t", "rows": rows, "comparisons": []}]  # fmt: skip
    write_text(RunDirectory.named("b").path / "probes.json", json.dumps({"suites": suites}))
    project = gather()
    assert "salt-vla eval a --data metaworld-mini" in commands(project)
    said = page(project)["experiments"]
    assert "| b | +0.500 [+0.400, +0.600] |" in said
    assert "| b (minus random) | **▲ +0.200 [+0.100, +0.300]** |" in said
    assert "front/mean" not in said


def test_an_unfinished_cache_is_gone_on_with(make: Make, tmp_path: Path) -> None:
    make("whole", r2=0.2)
    folder = tmp_path / "caches" / "c"
    folder.mkdir(parents=True)
    (folder / "manifest.json").write_text("{")
    words = ("cache", "build", "--teacher", "t", "--out", "caches/c")
    job = tmp_path / "jobs" / "build"
    write_text(job / "launch.json", json.dumps({"name": "build", "command": words, "token": "t"}))
    project = gather()
    assert "salt-vla cache repair caches/c" in commands(project)
    assert "caches/c" in page(project)["data"]


def test_every_kind_of_block_is_markdown() -> None:
    table = Table("A <b>title", "x", ("y",), (("n|ame", "u"),), ((Cell("1"),),), "a note")
    checks = Checks((("ok", "a", "fine"), ("bad", "b", "line\nbreak")))
    written = to_page(
        Section("All", ["text <i>", table, Facts([("cpu", "2")]), checks, Code("echo ```x```")])
    )
    assert "text &lt;i>" in written and "**A &lt;b>title**" in written and "| n\\|ame (u) | 1 |" in written
    assert "- cpu: 2" in written and "- ✓ a: fine" in written and "- ✗ b: line break" in written
    assert "````sh\necho ```x```\n````" in written


@pytest.mark.parametrize("canary", ["0123456789abcdef", 'can<ary&a|b"c  d-0123456789'])
@pytest.mark.parametrize("before", [5, 170, 185])
def test_no_part_of_a_secret_is_left_by_what_shortens_or_escapes(
    make: Make, monkeypatch: pytest.MonkeyPatch, canary: str, before: int
) -> None:
    """Of a run that wrote it down before there was a variable, too."""
    run = make("night", state="failed")
    run.set_status(replace(run.status(), exit_reason=f"{'y' * before} key={canary} end"))
    monkeypatch.setenv("MY_API_KEY", canary)
    project = gather()
    write_handoff(project=project)
    root = run.path.parent.parent
    said = [json.dumps(project.to_json())]
    said += [(root / name).read_text() for name in ("PROGRESS.md", "PROGRESS.html")]
    for text in said:
        assert "y" * before in text and "key=(MY" in text
        assert canary[:6] not in text and canary[:3] + "&lt;" not in text


def test_a_queue_of_another_version_ends_no_report(make: Make) -> None:
    run = make("night")
    queue = Queue()
    queue.add(Wanted(("train", "demo_student", "--name", "later"), str(run.path), "later"))
    for change in ("DROP COLUMN processes", "ADD COLUMN more TEXT NOT NULL DEFAULT ''"):
        with closing(sqlite3.connect(queue.file)) as connection:
            connection.execute(f"ALTER TABLE jobs {change}")
        project = gather()
        assert [(job.name, job.processes) for job in project.jobs] == [("later", 1)]
    with closing(sqlite3.connect(queue.file)) as connection:
        connection.execute("ALTER TABLE jobs DROP COLUMN restarts")
    project = gather()
    assert "lacks restarts" in page(project)["queue"] and [run.name for run in project.runs] == ["night"]

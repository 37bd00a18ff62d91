"""PROGRESS.md is enough to go on from, is written anew whenever a run ends, and never costs anybody anything:
no run, no word that a person wrote, no secret.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from salt_vla.operations.handoff import gather, write_handoff
from salt_vla.operations.handoff.facts import NEWEST
from salt_vla.operations.launch import LAUNCH
from salt_vla.operations.queue import Queue, Wanted
from salt_vla.recipes import all_recipes
from salt_vla.rundir import RunDirectory, Status, write_text

Student = Callable[..., list[object]]

# A reader that has the page and nothing else: neither this package's code nor the runs.
READER = """
import re, shlex, sys
page = open(sys.argv[1], encoding="utf-8").read()
section = re.split(r"^## ", page, flags=re.M)
steps = next(part for part in section if part.startswith("Next steps"))
command = re.search(r"^```sh\\n(.*?)\\n```$", steps, re.M | re.S)
print(command.group(1) if command else "")
"""


def next_command(page: Path) -> str:
    answer = subprocess.run(
        [sys.executable, "-I", "-c", READER, page], capture_output=True, text=True, check=True
    )
    return answer.stdout.strip()


def test_the_page_is_enough_to_go_on(salt: Any, student: Student, workshop: Any) -> None:
    """A run that was broken off is its first step; what follows is in its open hypotheses and commands."""
    running = salt.start(*student("night", steps=60, runtime__checkpoint_every=20))
    until = time.monotonic() + 120
    while not list(salt.at("night").checkpoints.glob("step_*")) and time.monotonic() < until:
        time.sleep(0.05)
    running.send_signal(signal.SIGKILL)
    running.communicate()
    salt.ok("runs", "report")

    page = salt.root / "PROGRESS.md"
    command = next_command(page)
    assert command.startswith("salt-vla train demo_student") and "--name night" in command
    assert "killed" in page.read_text()
    assert salt.run(*shlex.split(command)[1:], cwd=salt.root).code == 0
    shown = salt.json("runs", "show", "night")
    assert (shown["state"], shown["step"]) == ("finished", 60)
    assert shown["resumed_from"]

    # It was written anew when that run ended, and says what is next now: nothing is run twice.
    after = page.read_text()
    assert "--name night " not in next_command(page)
    assert next_command(page).startswith("salt-vla eval night")
    assert "| night (demo_student) |" in after
    for recipe in all_recipes().values():
        is_named = re.search(rf"^- · {recipe.name}: ", after, re.MULTILINE)
        assert bool(is_named) == bool(recipe.hypothesis)  # No verdict here has answered one yet.
    assert str(workshop.table) in after


def test_what_stands_in_the_queue_and_why_is_on_the_page(salt: Any) -> None:
    with salt.here():
        from salt_vla.operations.conditions import Condition

        queue = Queue()
        cache = Condition("after_cache", str(salt.root / "caches" / "c"))
        queue.add(
            Wanted(("train", "exp1_higher_lr", "--name", "e1"), str(salt.root), "e1", conditions=(cache,))
        )
        queue.add(
            Wanted(("train", "exp2_high_mask", "--name", "e2"), str(salt.root), "e2",
                   conditions=(Condition("after", "e1", job=1),))
        )  # fmt: skip
    salt.ok("runs", "report")
    page = (salt.root / "PROGRESS.md").read_text()
    lines = {
        name: re.search(rf"^\| {name} \| waiting \| (.*?) \|", page, re.MULTILINE) for name in ("e1", "e2")
    }
    assert lines["e1"] and "caches/c" in lines["e1"][1]
    assert lines["e2"] and "e1" in lines["e2"][1]
    assert next_command(salt.root / "PROGRESS.md") == "salt-vla queue run --detach"


def test_an_empty_project_says_how_to_begin(salt: Any) -> None:
    answer = salt.ok("runs", "report")
    assert answer.out.splitlines()[-2:] == [
        str(salt.root / name) for name in ("PROGRESS.md", "PROGRESS.html")
    ]
    assert next_command(salt.root / "PROGRESS.md") == "salt-vla demo"


def a_run(root: Path, name: str, **status: Any) -> RunDirectory:
    """A run that ended before it had a configuration: cheap to make by the thousand."""
    run = RunDirectory(root / "runs" / name)
    run.path.mkdir(parents=True)
    held = {"state": "finished", "step": 1, "total_steps": 1, "exit_reason": "finished"} | status
    run.set_status(Status(**held))
    return run


def test_words_of_people_are_kept_through_every_report(salt: Any) -> None:
    salt.ok("runs", "report")
    page = salt.root / "PROGRESS.md"
    text = page.read_text().replace("Say here what this project is after", "Explain more than the mean does")
    text = text.replace("<!-- notes:end -->", "The disk on the left hums. <b>Really</b>\n<!-- notes:end -->")
    page.write_bytes((f"Above everything.\r\n{text}").encode() + b"\xff below, in no encoding")
    before = page.read_bytes()
    salt.ok("runs", "report")
    after = page.read_bytes()
    hand = re.compile(rb"^<!-- generated:begin .*?^<!-- generated:end \w+ -->\n", re.MULTILINE | re.DOTALL)
    assert hand.sub(b"", after) == hand.sub(b"", before)
    html = (salt.root / "PROGRESS.html").read_text()
    assert "Explain more than the mean does" in html and "&lt;b&gt;Really&lt;/b&gt;" in html


def test_a_damaged_mark_is_refused_and_nothing_is_written(salt: Any) -> None:
    salt.ok("runs", "report")
    page = salt.root / "PROGRESS.md"
    page.write_text(page.read_text().replace("<!-- generated:end next -->\n", ""))
    before = {path: path.read_bytes() for path in (page, salt.root / "PROGRESS.html")}
    assert "generated:begin now" in salt("runs", "report").sentence
    assert {path: path.read_bytes() for path in before} == before


def test_no_report_ends_a_run(salt: Any, student: Student) -> None:
    """Neither damaged marks nor a page that cannot be written; the run's log says what was wrong."""
    (salt.root / "PROGRESS.md").write_text("<!-- generated:begin state -->\nnobody ends this\n")
    salt.ok(*student("one", "--max-steps", 2))
    assert "PROGRESS.md was not written anew" in salt.at("one").log_file.read_text()
    (salt.root / "PROGRESS.md").unlink()
    (salt.root / "PROGRESS.md").write_text("mine\n")
    (salt.root / "PROGRESS.html").mkdir()
    salt.ok(*student("two", "--max-steps", 2))
    assert "PROGRESS.html" in salt.at("two").log_file.read_text()
    assert (salt.root / "PROGRESS.md").read_text() == "mine\n"
    assert [salt.json("runs", "show", name)["state"] for name in ("one", "two")] == ["finished"] * 2


def test_a_run_that_nobody_keeps_a_page_for_writes_none(salt: Any, student: Student) -> None:
    salt.ok(*student("one", "--max-steps", 2))
    assert not (salt.root / "PROGRESS.md").exists()


def test_damaged_runs_do_not_hide_the_others(salt: Any, student: Student) -> None:
    salt.ok(*student("good", "--max-steps", 2))
    for name, file, text in (
        ("a", "status.json", "{"), ("b", "config.json", "[]"), ("c", "metrics.jsonl", "no line\n"),
        ("d", "probes.json", "{"), ("e", "supervision.json", "{"), ("f", "launch.json", "{"),
        ("g", "verdict.json", "null"), ("h", "branch.json", "{"),
    ):  # fmt: skip
        write_text(a_run(salt.root, name).path / file, text)
    answer = salt.json("runs", "report")
    assert {run["name"] for run in answer["runs"]} == {"good", *"abcdefgh"}
    assert {run["name"] for run in answer["runs"] if run["problem"]} >= {"a", "b", "d", "g"}
    assert "| good (demo_student) |" in (salt.root / "PROGRESS.md").read_text()


def test_nothing_that_a_run_says_is_an_order(salt: Any) -> None:
    evil = "</pre><script>alert(1)</script>|`x`\n<!-- generated:end failures -->\n# heading"
    a_run(salt.root, "evil", state="failed", exit_reason=evil)
    salt.ok("runs", "report")
    salt.ok("runs", "report")  # Its own marks can still be read.
    page = (salt.root / "PROGRESS.md").read_text()
    assert "<script>" not in page and "\n# heading" not in page
    seen: list[str] = []
    parser = HTMLParser()
    parser.handle_starttag = lambda tag, attrs: seen.append(tag)  # type: ignore[method-assign]
    parser.feed((salt.root / "PROGRESS.html").read_text())
    assert "table" in seen and "script" not in seen


def test_no_secret_is_on_the_pages(salt: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    canary = "hush-2b7e151628aed2a6"
    monkeypatch.setenv("WANDB_API_KEY", canary)
    reason = f"ConnectionError: https://api.example.org/?key={canary}"  # As libraries do.
    run = a_run(salt.root, "tracked", state="failed", exit_reason=reason)
    launch = {"name": "tracked", "command": ["train", "demo_student"], "token": "t", "restarts": 0}
    write_text(run.path / LAUNCH, json.dumps(launch | {"environment": {"WANDB_API_KEY": canary}}))
    answer = salt.ok("runs", "report", "--json").out + salt.ok("runs", "report").out
    written = answer + "".join((salt.root / name).read_text() for name in ("PROGRESS.md", "PROGRESS.html"))
    assert "tracked" in written and canary not in written
    assert os.uname().nodename not in re.sub(r"[\w.]*localhost[\w.]*", "", written)


def test_of_ten_thousand_runs_the_newest_are_told(salt: Any) -> None:
    folder = salt.root / "runs"
    folder.mkdir()
    status = json.dumps({"state": "finished", "step": 1, "total_steps": 1, "exit_reason": "finished"})
    for number in range(10_000):
        place = folder / f"r{number:05d}"
        place.mkdir()
        (place / "status.json").write_text(status)
        os.utime(place / "status.json", (number, number))
    answer = salt.json("runs", "report")
    assert len(answer["runs"]) == NEWEST
    assert answer["other_runs"] == 10_000 - NEWEST
    assert {run["name"] for run in answer["runs"]} == {f"r{n:05d}" for n in range(10_000 - NEWEST, 10_000)}
    assert f"{10_000 - NEWEST} older runs" in (salt.root / "PROGRESS.md").read_text()


def test_metrics_that_have_not_changed_are_not_read_again(salt: Any, student: Student) -> None:
    """And whatever becomes of what was kept, the page says the same."""
    for name in ("one", "two"):
        salt.ok(*student(name, "--max-steps", 4))
    first = salt.json("runs", "report")
    kept = salt.root / "runs" / ".handoff.json"
    held = json.loads(kept.read_text())
    assert set(held["runs"]) == {"one", "two"}
    held["runs"]["one"]["min_loss"] = 123.0  # Said again, so it was not read.
    kept.write_text(json.dumps(held))
    losses = {run["name"]: run["min_loss"] for run in salt.json("runs", "report")["runs"]}
    assert losses["one"] == 123.0
    salt.at("one").log_metrics({"kind": "train", "step": 5, "loss": 0.001})
    assert salt.json("runs", "report")["runs"][0]["min_loss"] == 0.001
    for damage in ("{", "[]", '{"version": 2, "runs": {"one": 3, "two": {}}}', '{"version": 99}'):
        kept.write_text(damage)
        assert salt.json("runs", "report")["runs"][1] == first["runs"][1]


def _report_often(root: str, times: int) -> None:
    os.environ["SALT_VLA_ROOT"] = root
    for _ in range(times):
        write_handoff()


def test_reports_at_the_same_time_leave_a_whole_page(salt: Any) -> None:
    for number in range(5):
        a_run(salt.root, f"r{number}")
    (salt.root / "PROGRESS.md").write_text("mine, above\n")
    context = multiprocessing.get_context("fork")
    writers = [context.Process(target=_report_often, args=(str(salt.root), 5)) for _ in range(4)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join(120)
    assert [writer.exitcode for writer in writers] == [0] * 4
    page = (salt.root / "PROGRESS.md").read_text()
    assert page.startswith("mine, above\n")
    assert page.count("<!-- generated:begin ") == page.count("<!-- generated:end ") == 11
    assert not list(salt.root.glob(".*.part"))


def test_the_page_is_written_where_it_is_wanted(salt: Any, tmp_path: Path) -> None:
    folder = tmp_path / "elsewhere"
    answer = salt.json("runs", "report", "--out", folder)
    assert answer["page"] == str(folder / "PROGRESS.md") and Path(answer["html"]).is_file()
    assert not (salt.root / "PROGRESS.md").exists()
    (tmp_path / "file").touch()
    assert "file" in salt("runs", "report", "--out", tmp_path / "file").sentence


def test_a_page_that_is_a_link_stays_one(salt: Any) -> None:
    (salt.root / "notes").mkdir()
    (salt.root / "notes" / "page.md").write_text("mine\n")
    (salt.root / "PROGRESS.md").symlink_to("notes/page.md")
    salt.ok("runs", "report")
    assert (salt.root / "PROGRESS.md").is_symlink()
    assert "## Next steps" in (salt.root / "notes" / "page.md").read_text()


def test_hardware_is_said_without_a_name(salt: Any) -> None:
    with salt.here():
        said = dict(gather().machine)
    assert set(said) == {"processor", "memory", "GPU", "disk", "system"}
    assert re.fullmatch(r".+, \d+ cores", said["processor"])
    assert re.fullmatch(r"\d+ GB", said["memory"])

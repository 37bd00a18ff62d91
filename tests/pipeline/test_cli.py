"""The command line as outside programs see it: help, JSON, exit codes, and what goes to which stream."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from salt_vla.cli import COMMANDS

EVERY_COMMAND = [f"{noun} {verb}".split() for noun, verbs in COMMANDS.items() for verb in verbs]


@pytest.mark.parametrize("command", EVERY_COMMAND, ids=" ".join)
def test_every_command_has_help_with_an_example(salt: Any, command: list[str]) -> None:
    answer = salt(*command, "--help")
    assert answer.code == 0
    assert f"Example: salt-vla {' '.join(command)}" in answer.out
    assert salt.files() == []


@pytest.mark.parametrize("arguments", [(), ("--help",), ("-h",)])
def test_the_program_lists_its_commands(salt: Any, arguments: tuple[str, ...]) -> None:
    answer = salt.ok(*arguments)
    for command in EVERY_COMMAND:
        assert " ".join(command) in answer.out
    assert "SALT_VLA_ROOT" in answer.out and "Example: salt-vla demo" in answer.out


@pytest.mark.parametrize("noun", [noun for noun, verbs in COMMANDS.items() if "" not in verbs])
def test_a_noun_lists_its_verbs(salt: Any, noun: str) -> None:
    for arguments in ((noun,), (noun, "--help")):
        answer = salt.ok(*arguments)
        assert all(f"{noun} {verb}" in answer.out for verb in COMMANDS[noun])


def test_the_version_is_the_packages(salt: Any) -> None:
    from importlib.metadata import version

    assert salt.ok("--version").out.strip() == version("salt-vla")


def test_recipes_are_listed_for_programs_and_people(salt: Any) -> None:
    rows = salt.json("recipes", "ls")
    names = [row["name"] for row in rows]
    assert {"demo_teacher", "demo_student", "exp1_higher_lr"} <= set(names)
    assert len(names) == len(set(names))
    assert all(row.keys() >= {"name", "summary", "encoder", "steps", "batch_size"} for row in rows)
    people = salt.ok("recipes", "ls").out
    assert "demo_teacher" in people and not people.startswith("[")


def test_runs_are_listed_and_shown(workshop: Any) -> None:
    shown = workshop.salt.json("runs", "show", "teacher")
    assert shown.keys() >= {"state", "step", "pid", "resumed_from", "exit_reason"}
    assert (shown["state"], shown["step"], shown["resumed_from"]) == ("finished", 6, [])
    assert (shown["pid"], shown["exit_reason"]) == (os.getpid(), "finished")
    assert shown["last_train"] == workshop.salt.at("teacher").metrics("train")[-1]
    listed = {row["name"]: row for row in workshop.salt.json("runs", "ls")}["teacher"]
    assert listed == {name: shown[name] for name in listed} | {"masks": {}, "cost": {}, "best": {}}
    assert shown["best"]["val.loss"]["step"] == 6
    assert shown["log"][-1] == workshop.salt.at("teacher").log_file.read_text().splitlines()[-1]
    for command in (("runs", "ls"), ("runs", "show", "teacher")):
        assert "finished" in workshop.salt.ok(*command).out


def test_where_there_are_no_runs_the_list_is_empty(salt: Any) -> None:
    assert salt.json("runs", "ls") == []
    assert salt.ok("runs", "ls").code == 0


def test_one_damaged_run_does_not_hide_the_others(salt: Any) -> None:
    for name, status in (("good", b'{"state": "finished", "step": 3}'), ("torn", b'{"state": "fin')):
        folder = salt.root / "runs" / name
        folder.mkdir(parents=True)
        (folder / "config.json").write_text("{}")
        (folder / "status.json").write_bytes(status)
    rows = {row["name"]: row for row in salt.json("runs", "ls")}
    assert rows["good"]["state"] == "finished" and rows["good"]["step"] == 3
    assert rows["torn"]["state"] == "damaged" and "status.json is damaged" in rows["torn"]["exit_reason"]


def test_a_run_is_shown_from_its_first_moment(salt: Any) -> None:
    """Before it has measured its configuration, and after it has died there."""
    salt.at("young").claim(total_steps=5)
    assert salt.json("runs", "show", "young")["state"] == "running"
    assert "there is no run" in salt("runs", "show", "unborn").sentence


def test_machine_readable_answers_have_stdout_to_themselves(workshop: Any) -> None:
    """Progress goes to stderr; both streams are real ones here."""
    answer = workshop.salt.run("cache", "verify", workshop.cache, "--json")
    assert answer.code == 0
    assert json.loads(answer.out) == {"records": 36, "bad": []}
    assert "Verifying: 36/36 records" in answer.err


def test_the_installed_program_is_this_command_line(tmp_path: Path) -> None:
    program = Path(sys.executable).with_name("salt-vla")
    done = subprocess.run([program, "recipes", "ls", "--json"], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0 and json.loads(done.stdout)[0]["name"] == "demo_teacher"
    refused = subprocess.run([program, "frobnicate"], capture_output=True, text=True, cwd=tmp_path)
    assert refused.returncode == 2 and refused.stderr.startswith("salt-vla: there is no command")


def test_a_reader_that_leaves_early_causes_no_traceback(salt: Any) -> None:
    read, write = os.pipe()
    process = salt.start("recipes", "ls", "--json", stdout=write)
    os.close(read)
    os.close(write)
    assert process.communicate()[1] == ""
    assert process.returncode in (0, 141)


def test_the_root_is_the_current_folder_unless_told(workshop: Any, salt: Any, tmp_path: Path) -> None:
    environment = {key: value for key, value in os.environ.items() if key != "SALT_VLA_ROOT"}
    code = "import sys; from salt_vla.cli import main; sys.exit(main(['runs', 'ls', '--json']))"
    for root in (tmp_path, workshop.salt.root):
        done = subprocess.run([sys.executable, "-c", code], cwd=root, env=environment, capture_output=True)
        assert [row["name"] for row in json.loads(done.stdout)] == [row["name"] for row in _runs(root)]


def _runs(root: Path) -> list[dict[str, str]]:
    return [{"name": path.parent.name} for path in sorted(root.glob("runs/*/config.json"))]


def test_a_clip_table_is_written_whole_or_not_at_all(workshop: Any, salt: Any, tmp_path: Path) -> None:
    out = tmp_path / "deep" / "clips.parquet"
    arguments = ("data", "index", workshop.dataset, "--out", out, "--num-frames", 4, "--frame-stride", 2)
    answer = salt.ok(*arguments, "--camera", "observation.images.side")
    assert answer.out.startswith(f"{out}: 13 clips of 1 videos (lerobot)\n")
    before = out.read_bytes()
    assert "no camera 'nose'" in salt(*arguments, "--camera", "nose").sentence
    assert out.read_bytes() == before
    beside = {path.name for path in out.parent.iterdir()}
    assert beside == {"clips.parquet", "clips.parquet.problems.json"}


@pytest.mark.parametrize("command", [("recipes", "ls", "--json"), ("recipes", "ls"), ("--help",), ("cache",)])
def test_output_that_cannot_be_written_is_a_sentence(salt: Any, command: tuple[str, ...]) -> None:
    with open("/dev/full", "w") as full:  # noqa: PTH123
        process = salt.start(*command, stdout=full)
    said = process.communicate()[1]
    assert said == "salt-vla: cannot write the output: No space left on device; the answer is not whole\n"
    assert process.returncode == 2


def test_what_the_terminal_has_no_letters_for_is_no_traceback(salt: Any, tmp_path: Path) -> None:
    code = "import sys; from salt_vla.cli import main, COMMANDS\nCOMMANDS['x–\\ud800'] = {'': ('', '²')}\n"
    environment = os.environ | {"PYTHONIOENCODING": "ascii", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-c", f"{code}sys.exit(main([]))"], env=environment, capture_output=True
    )
    assert done.returncode == 0 and b"x\\u2013\\ud800" in done.stdout and b"\\xb2" in done.stdout

"""What was measured once is not measured again, whatever ended the process that measured it."""

from __future__ import annotations

import json
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

ONE_POOLING = ("--poolings", "mean")


@pytest.fixture
def evaluation(salt: Any, workshop: Any) -> Iterator[Callable[..., list[object]]]:
    """`evaluation(*more)`: a command line about the workshop's teacher in a root of its own."""
    yield lambda *more: [
        *("eval", workshop.teacher, *more, "--data", workshop.dataset, *ONE_POOLING, "--json")
    ]


def cells(salt: Any) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in (salt.root / "evaluations").rglob("*.json")}


def test_a_second_call_measures_nothing_and_another_encoder_only_itself(
    salt: Any, workshop: Any, evaluation: Callable[..., list[object]]
) -> None:
    rows = json.loads(salt.ok(*evaluation()).out)
    before = cells(salt)
    encoders = {"teacher", "random", "pixels", "constant"}
    assert len(before) == len(encoders)
    for file in (salt.root / "features").iterdir():
        file.unlink()
    assert json.loads(salt.ok(*evaluation()).out) == rows
    assert cells(salt) == before and not list((salt.root / "features").iterdir())
    (constant,) = [file for file in before if json.loads(file.read_text())["key"]["encoder"] == "constant"]
    constant.unlink()
    assert json.loads(salt.ok(*evaluation()).out) == rows
    assert cells(salt).keys() == before.keys()
    before = cells(salt)
    layered = json.loads(salt.ok(*evaluation(f"other=random:{workshop.teacher}:3")).out)
    assert {row["encoder"] for row in layered} == encoders | {"other"}
    assert [row for row in layered if row["encoder"] != "other"] == rows
    assert {file: when for file, when in cells(salt).items() if file in before} == before
    assert len(cells(salt)) == len(before) + 1


def test_settings_clips_and_seeds_have_cells_of_their_own(
    salt: Any, workshop: Any, evaluation: Callable[..., list[object]]
) -> None:
    salt.ok(*evaluation())
    first = len(cells(salt))
    salt.ok(*evaluation("--seed", 1))
    assert len(cells(salt)) == 2 * first


def test_where_and_in_what_batches_it_was_computed_is_no_other_question(
    salt: Any, workshop: Any, evaluation: Callable[..., list[object]]
) -> None:
    rows = json.loads(salt.ok(*evaluation()).out)
    before = cells(salt)
    assert json.loads(salt.ok(*evaluation("--device", "cpu", "--memory-limit", "2GB")).out) == rows
    assert cells(salt) == before


def test_a_cell_holds_what_decided_it_and_what_it_cost(
    salt: Any, workshop: Any, evaluation: Callable[..., list[object]]
) -> None:
    salt.ok(*evaluation())
    held = [json.loads(path.read_text()) for path in cells(salt)]
    (own,) = [each for each in held if each["rows"][0]["encoder"] == "teacher"]
    assert own["key"]["suite"] == "probes" and own["key"]["settings"]["seed"] == 0
    assert own["versions"].keys() >= {"salt-vla", "torch"}
    assert own["compute"]["parameters"] > 0 and own["compute"]["flops_a_clip"] > 0
    assert own["compute"]["seconds"] > 0 and own["compute"]["peak_memory_gb"] > 0
    assert {row["target"] for row in own["rows"]} == {each["target"] for each in own["scored"]}


def test_a_damaged_cell_is_a_sentence_that_names_it(
    salt: Any, evaluation: Callable[..., list[object]]
) -> None:
    salt.ok(*evaluation())
    file = next(iter(cells(salt)))
    whole = file.read_text()
    digit = next(at for at in range(whole.index('"wrong"'), len(whole)) if whole[at] in "12345678")
    other = whole[:digit] + str(int(whole[digit]) + 1) + whole[digit + 1 :]
    for damage in ("no JSON", "{}", '{"scored": [{}], "notes": [], "compute": {}}', other):
        file.write_text(damage)
        said = salt(*evaluation()).sentence
        assert str(file) in said and "is damaged" in said and "remove it" in said
    file.unlink()
    salt.ok(*evaluation())


def wait_for(condition: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 240
    while not condition():
        assert process.poll() is None and time.monotonic() < deadline, "it ended before it was interrupted"
        time.sleep(0.002)


def test_killed_between_two_cells_it_goes_on_and_gives_the_same_rows(
    salt: Any, workshop: Any, evaluation: Callable[..., list[object]], tmp_path: Path
) -> None:
    command = [*evaluation(), *("--suite", "probes", "time-arrow")]
    process = salt.start(*command)
    wait_for(lambda: bool(cells(salt)), process)
    process.kill()
    process.communicate()
    kept = cells(salt)
    rows = json.loads(salt.ok(*command).out)
    assert {file: when for file, when in cells(salt).items() if file in kept} == kept
    whole = type(salt)(tmp_path / "whole")
    assert json.loads(whole.ok(*command).out) == rows
    assert {file.name for file in cells(whole)} == {file.name for file in cells(salt)}
    assert not list(tmp_path.glob("evaluations/**/*.part")), "a half-written cell"


def test_killed_or_interrupted_while_features_are_read_it_goes_on(
    salt: Any, evaluation: Callable[..., list[object]], tmp_path: Path
) -> None:
    def partial() -> bool:
        return any((salt.root / "features").glob("*.partial"))

    process = salt.start(*evaluation())
    wait_for(partial, process)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    process = salt.start(*evaluation())
    wait_for(partial, process)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate()
    assert "Traceback" not in said
    assert process.returncode in (0, 130, -signal.SIGINT), "too late, politely, or before it listened"
    if process.returncode == 130:  # While it read features, or before: files of the killed one lie there.
        assert "stopped by SIGINT while reading features" in said or "interrupted" in said
        assert "the same command" in said
    rows = json.loads(salt.ok(*evaluation()).out)
    whole = type(salt)(tmp_path / "whole")
    assert json.loads(whole.ok(*evaluation()).out) == rows
    assert not list((salt.root / "features").glob("*.partial*"))


def test_two_at_once_extract_once_and_agree(salt: Any, evaluation: Callable[..., list[object]]) -> None:
    both = [salt.start(*evaluation()) for _ in range(2)]
    answers = [process.communicate(timeout=240) for process in both]
    assert [process.returncode for process in both] == [0, 0], answers
    assert json.loads(answers[0][0]) == json.loads(answers[1][0])
    assert not list((salt.root / "features").glob("*.partial*"))

"""A run with its online probe is the same run, with lines that say what its encoder knows."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

Command = Callable[..., list[object]]
PROBE = {"runtime__probe_every": 4, "runtime__probe_clips": 32, "runtime__validation_clips": 64}
OFF = {"runtime__validation_clips": 64, "runtime__probe_clips": 0}
SETTINGS = {"encoder__depth": 2, "encoder__drop_path": 0.4, "steps": 10, "grad_accum_steps": 2}


def test_with_and_without_it_a_run_is_the_same_bits(
    salt: Any, student: Command, curve: Any, weights: Any
) -> None:
    for name, probe in (("with", PROBE), ("without", OFF)):
        salt.ok(*student(name, **SETTINGS, **probe))
    there, bare = salt.at("with"), salt.at("without")
    assert [row for row in curve(there) if row["kind"] != "probe"] == curve(bare)
    mine, theirs = ({k: v for k, v in weights(run).items() if "json" not in k} for run in (there, bare))
    mine.pop("online_probe.safetensors", None)
    assert mine == theirs
    rows = there.metrics("probe")
    assert [row["step"] for row in rows] == [0, 4, 8, 10]
    assert not bare.metrics("probe")
    first, last = rows[0], rows[-1]
    for name in ("r2_hand_position", "r2_action_mean", "accuracy_label"):
        assert name in first and last[f"{name}_initial"] == first[name]
    assert first["fit_clips"] == last["fit_clips"] == 32
    assert first["clips"] == last["clips"] >= 8 and first["episodes"] == 2


def test_cut_short_and_resumed_it_says_the_same_and_nothing_at_the_cut(
    salt: Any, student: Command, curve: Any
) -> None:
    salt.ok(*student("whole", **SETTINGS, **PROBE))
    salt.ok(*student("parts", "--max-steps", 3, **SETTINGS, **PROBE))
    assert [row["step"] for row in salt.at("parts").metrics("probe")] == [0]
    state = salt.at("parts").checkpoints / "step_00000003" / "online_probe.safetensors"
    assert state.is_file()
    salt.ok(*student("parts", **SETTINGS, **PROBE))
    rows = [[row for row in curve(salt.at(name)) if row["kind"] == "probe"] for name in ("whole", "parts")]
    assert rows[0] == rows[1]


def test_it_can_be_switched_on_and_off_at_a_resume(salt: Any, student: Command) -> None:
    """Then there are no first weights to compare with, and it says so by saying nothing of them."""
    salt.ok(*student("run", "--max-steps", 2, **SETTINGS, **OFF))
    salt.ok(*student("run", "--max-steps", 8, **SETTINGS, **PROBE))
    salt.ok(*student("run", **SETTINGS, **OFF))
    rows = salt.at("run").metrics("probe")
    assert [row["step"] for row in rows] == [4, 8]
    assert not any(name.endswith("_initial") for row in rows for name in row)
    assert rows[0]["fit_clips"] == 8  # Of the two steps that it saw.
    assert [row["step"] for row in salt.at("run").metrics("train")] == list(range(1, 11))


def test_a_short_run_has_none_by_itself_and_its_log_says_why(salt: Any, student: Command) -> None:
    salt.ok(*student("run", steps=4, runtime__validation_clips=64))
    assert not salt.at("run").metrics("probe")
    started = [line for line in salt.at("run").log_file.read_text().splitlines() if "started" in line]
    assert len(started) == 1
    assert "no online probe: the run is too short for one (runtime.probe_every asks for it)" in started[0]


def test_it_is_shown_where_runs_are(salt: Any, student: Command) -> None:
    for name in ("one", "two"):
        salt.ok(*student(name, **SETTINGS, **PROBE))
    seen = salt.json("runs", "show", "one")
    assert seen["last_probe"]["step"] == 10
    assert "last probe" in salt("runs", "show", "one").out
    compared = json.dumps(salt.json("runs", "compare", "one", "two", "--column", "probe.r2_hand_position"))
    assert "probe.r2_hand_position" in compared

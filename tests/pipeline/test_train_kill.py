"""kill -9 at any moment of a training run: the same command ends in the same curve and the same weights.

Also what else may differ between two parts of a run without a trace: who reads the clips, and in how many
parts a batch is computed.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Command = Callable[..., list[object]]

# Everything that could be forgotten between two steps: residuals dropped at random, statistics that follow
# the targets, a moving average, counts from one line of metrics to the next, checkpoints that are the best.
SETTINGS = {
    "encoder__depth": 2,
    "encoder__drop_path": 0.4,
    "objective__targets": "centred",
    "objective__statistics": "running",
    "optimizer__average": 0.9,
    "optimizer__grad_clip": 0.3,
    "runtime__log_every": 3,
    "runtime__checkpoint_every": 2,
    "runtime__validate_every": 5,
    "runtime__keep_every": 8,
    "steps": 24,
}
# Clips of the last eight steps, more than lie between two validations; each of many held-out ones.
PROBE = {"runtime__probe_every": 5, "runtime__probe_clips": 32, "runtime__validation_clips": 64}

# Starts the command in forks of itself (the libraries are loaded once) and kills each after a random while,
# again and again on what the last one has left; begins another run when one has finished. Prints
# (killed, step of the newest checkpoint, whether it died while it wrote one, whether before its first step).
AT_RANDOM = """
import json, os, random, signal, sys, time
from pathlib import Path
import torch, salt_vla.jobs.train, salt_vla.jobs.branch, salt_vla.recipes
from salt_vla.cli import main

kills_wanted, seed, commands = int(sys.argv[1]), int(sys.argv[2]), json.loads(sys.argv[3])
rng = random.Random(seed)
runs = Path(os.environ["SALT_VLA_ROOT"]) / "runs"
kills, round_, patience = 0, 0, 1.0
while True:
    run = runs / f"killed{round_}"
    is_last = kills >= kills_wanted
    command = commands[kills % len(commands)]
    child = os.fork()
    if child == 0:
        log = os.open(runs.parent / "said.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1), os.dup2(log, 2)
        os._exit(main([*command, "--name", run.name]))
    if not is_last:
        time.sleep(rng.uniform(0, patience))
        os.kill(child, signal.SIGKILL)
    status = os.waitpid(child, 0)[1]
    killed = os.WTERMSIG(status) == signal.SIGKILL
    steps = [int(path.name[5:]) for path in run.glob("checkpoints/step_*")]
    half = any(run.glob("checkpoints/.writing-*"))
    print(json.dumps([killed, max(steps, default=0), half, status]), flush=True)
    kills += killed
    # As fast as this machine is now: the runs end about half of the time.
    patience *= 1.15 if killed else 0.8
    if not killed:
        round_ += 1
        if is_last:
            break
"""


def test_killed_at_random_moments_the_curve_and_the_weights_are_the_same_bits(
    place: Path, workshop: Any, student: Command, salt: Any, curve: Any, weights: Any, times: Any
) -> None:
    """20 times (200 in the long form), each start with another way of doing the same."""
    salt.root = place
    kills = times(20, 200)
    free: list[dict[str, object]] = [
        {},
        {"runtime__keep_checkpoints": 4},
        {"data__masks_in": "step"},
        {"runtime__watchdog_seconds": 600},
    ]
    salt.ok(*student("whole", **SETTINGS | PROBE))
    commands = [[str(word) for word in student("run", **SETTINGS | PROBE | each)] for each in free]
    commands = [[word for word in command if word not in ("--name", "run")] for command in commands]
    process = salt.start_python(AT_RANDOM, kills, 3, json.dumps(commands))
    out, err = process.communicate(timeout=1200)
    assert process.returncode == 0, err
    rounds = [json.loads(line) for line in out.splitlines()]
    assert [status for killed, _, _, status in rounds if not killed] == [0] * (len(rounds) - kills), (
        place / "said.txt"
    ).read_text()
    killed_at = {step for killed, step, _, _ in rounds if killed}
    assert len(killed_at) > 4, "all died at the same place"
    whole, finished = salt.at("whole"), [salt.at(f"killed{n}") for n in range(len(rounds) - kills)]
    assert [row["step"] for row in whole.metrics("probe")] == [0, 5, 10, 15, 20, 24]
    assert "online_probe.safetensors" in weights(whole) or whole.metrics("probe")[-1]["fit_clips"] == 32
    resumes = 0
    for run in finished:
        assert curve(run) == curve(whole)
        assert weights(run) == weights(whole)
        keys = [(row["kind"], row["step"]) for row in run.metrics()]
        assert len(keys) == len(set(keys))
        assert (run.checkpoints / "best").readlink() == (whole.checkpoints / "best").readlink()
        assert not list(run.path.rglob("*.part")) and not list(run.checkpoints.glob(".writing-*"))
        resumes += len(run.status().resumed_from)
    assert resumes > 0
    halves = sum(half for killed, _, half, _ in rounds if killed)
    early = sum(step == 0 for killed, step, _, _ in rounds if killed)
    print(
        f"{kills} runs killed with SIGKILL ({early} before the first checkpoint, {halves} while one was "
        f"written): {len(finished)} runs that went on {resumes} times end in the same bits"
    )


def test_reading_by_none_one_or_three_processes_is_the_same_run(
    salt: Any, student: Command, curve: Any, weights: Any
) -> None:
    """From one part of a run to the next, too."""
    settings = SETTINGS | {"data__store_views": "false"}
    salt.ok(*student("none", "--max-steps", 9, **settings))
    for stop, workers in ((4, 3), (9, 1)):
        salt.ok(*student("some", "--max-steps", stop, **settings, data__num_workers=workers))
    changes = (salt.at("some").path / "config_changes.jsonl").read_text().splitlines()
    told = [[row["field"] for row in json.loads(line)["changed"]] for line in changes]
    assert told == [["data.num_workers"]]
    # A stop adds a line of held-out clips and a line of training at its step, and changes no other.
    whole = {(row["kind"], row["step"]): row for row in curve(salt.at("none"))}
    parts = {(row["kind"], row["step"]): row for row in curve(salt.at("some"))}
    assert whole.keys() <= parts.keys() and {key: parts[key] for key in whole} == whole
    assert weights(salt.at("none")) == weights(salt.at("some"))


# Sums of float32 in another order: a part in ten thousand of the loss after eight updates.
PARTS_TOLERANCE = 1e-4


@pytest.mark.parametrize("statistics", ["measured", "running"])
def test_four_times_eight_is_thirty_two(salt: Any, student: Command, statistics: str) -> None:
    """With stochastic depth and centred targets, whose draws and sums are those of the whole batch."""
    settings = SETTINGS | {"objective__statistics": statistics, "batch_size": 32, "runtime__log_every": 1}
    salt.ok(*student("whole", "--max-steps", 8, **settings))
    salt.ok(*student("parts", "--max-steps", 8, **settings, grad_accum_steps=4))
    rows = [salt.at(name).metrics() for name in ("whole", "parts")]
    for whole, parts in zip(*rows, strict=True):
        assert whole["step"] == parts["step"]
        for name in ("loss", "r2_position_mean", "r2_channel_mean"):
            assert parts[name] == pytest.approx(whole[name], rel=PARTS_TOLERANCE, abs=PARTS_TOLERANCE)
    first = [row[0]["grad_norm"] for row in rows]
    assert first[0] == pytest.approx(first[1], rel=1e-5)
    losses = [row["loss"] for row in rows[0] if row["kind"] == "train"]
    assert any(a != b for a, b in itertools.pairwise(losses))

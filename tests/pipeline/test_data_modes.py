"""Where a step's data come from: a cache, a teacher in the loop, loader processes: the same curve."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from typing import Any

import psutil
import pytest

from salt_vla.rundir import RunDirectory


def losses(run: RunDirectory) -> list[float]:
    return [row["loss"] for row in run.metrics("train")]


def test_video_alone_with_the_teacher_in_the_loop_learns_what_the_cache_would_have_taught(
    salt: Any, workshop: Any, student: Callable[..., list[object]]
) -> None:
    """The earlier attempt's two modes; without a cache none is read, made or asked for."""
    salt.ok(*student("hybrid", "--max-steps", 3))
    asked = ("--data", workshop.table, "--seed", 1, "--max-steps", 3)
    target = {"target__provider": "teacher", "target__source": workshop.teacher}
    salt.ok(*salt.train("demo_student", "video", *asked, **target))
    assert losses(salt.at("video")) == pytest.approx(losses(salt.at("hybrid")), rel=5e-3)
    assert not (salt.root / "caches" / "latents").exists()
    held_out = [salt.at(name).metrics("val")[-1]["r2_position_mean"] for name in ("hybrid", "video")]
    assert held_out[0] == pytest.approx(held_out[1], abs=0.02)


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
def test_who_reads_and_who_draws_masks_changes_nothing(
    salt: Any, student: Callable[..., list[object]], curve: Any, weights: Any
) -> None:
    """Photometric augmentation too: its numbers are the step's, not a process'."""
    jitter = {"data__photometric__brightness": 0.3, "data__photometric__contrast": 0.3}
    salt.ok(*student("here", "--max-steps", 6, **jitter))
    helped = {"data__num_workers": 2, "data__prefetch": 1, "data__masks_in": "step"}
    salt.ok(*student("helped", "--max-steps", 6, **jitter, **helped))
    salt.ok(*student("plain", "--max-steps", 6))
    assert curve(salt.at("here")) == curve(salt.at("helped"))
    ours, theirs = weights(salt.at("here")), weights(salt.at("helped"))
    tensors = [name for name in ours if name.endswith(".safetensors")]
    assert len(tensors) >= 3 and all(ours[name] == theirs[name] for name in tensors)
    assert losses(salt.at("plain")) != losses(salt.at("here"))


def test_a_loader_process_that_is_killed_ends_the_run_with_a_sentence(
    salt: Any, pixels: Callable[..., list[object]], spawned: Callable[..., list[psutil.Process]]
) -> None:
    """By SIGKILL, as the system does when memory runs out; the run can be resumed."""
    command = pixels("killed", data__num_workers=1, steps=20000, runtime__validate_every=100000)
    process = salt.start(*command)
    run = salt.at("killed")
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and not (run.checkpoints.exists() and any(run.checkpoints.iterdir())):
        time.sleep(0.1)
    workers = spawned(psutil.Process(process.pid))
    assert len(workers) == 1
    os.kill(workers[0].pid, signal.SIGKILL)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 2, err
    last = err.rstrip().splitlines()[-1]
    assert last.startswith("salt-vla: loader process 1 of 1 was killed by SIGKILL while it read for "), err
    assert "most likely memory ran out" in last and "(view " in last
    status = run.status()
    assert status.state == "failed" and "was killed by SIGKILL" in (status.exit_reason or "")
    before = run.status().step
    salt.ok(*pixels("killed", "--max-steps", before + 2, steps=20000, runtime__validate_every=100000))
    assert run.status().state == "finished" and len(losses(run)) == before + 2

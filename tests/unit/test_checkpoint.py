"""A checkpoint comes back bit for bit, is there whole or not at all, and no failure of it is lost."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import textwrap
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from salt_vla.config import EncoderConfig, PredictorConfig, TrainConfig
from salt_vla.errors import ResourceError, RunError
from salt_vla.geometry import ClipGeometry
from salt_vla.models.loading import load_encoder, step_directories, write_tensors
from salt_vla.targets import PixelTargets, TargetSpace, Task
from salt_vla.training.average import WeightAverage
from salt_vla.training.checkpoint import (
    CheckpointWriter,
    Keep,
    discard_after,
    point_to_best,
    restore_latest,
    sweep_unfinished,
    take_snapshot,
    write_snapshot,
)
from salt_vla.training.learner import Learner, build_learner
from salt_vla.training.optimizer import set_rates
from salt_vla.training.state import RunState

GRID = ClipGeometry(num_frames=4, image_size=32, tubelet_size=2, patch_size=8)
CONFIG = TrainConfig(
    encoder=EncoderConfig(name="vit_micro", geometry=GRID, depth=1),
    predictor=PredictorConfig(dim=16, depth=1, num_heads=2),
    steps=50,
)
TASK = Task(PixelTargets(GRID), TargetSpace("normalised", torch.zeros(GRID.num_tokens, GRID.patch_dim)))
FILES = ("encoder.safetensors", "predictor.safetensors", "optimizer.safetensors")


def learner_of(config: TrainConfig = CONFIG) -> Learner:
    return build_learner(config, target_dim=8, device="cpu")


def step(learner: Learner, number: int) -> None:
    """Update `number` (from 1) with gradients that depend on it alone."""
    set_rates(learner.optimizer, CONFIG, number - 1)
    generator = torch.Generator().manual_seed(number)
    for _, parameter in learner.named_parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)
    learner.optimizer.step()


def trained(steps: int) -> Learner:
    learner = learner_of()
    for number in range(1, steps + 1):
        step(learner, number)
    return learner


def everything(learner: Learner) -> dict[str, Tensor]:
    """Parameters and optimizer state, copied."""
    tensors = dict(learner.named_parameters())
    for name, parameter in learner.named_parameters():
        for key, value in learner.optimizer.state[parameter].items():
            tensors[f"{name}/{key}"] = value
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}


def assert_same(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    assert [name for name in a if not torch.equal(a[name], b[name])] == []


def saved(folder: Path, steps: int = 2) -> Learner:
    learner = trained(steps)
    write_snapshot(take_snapshot(learner, TASK, RunState(steps)), folder)
    return learner


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_checkpoint_comes_back_bit_for_bit(tmp_path: Path) -> None:
    learner, other = saved(tmp_path), learner_of(replace(CONFIG, seed=5))
    assert restore_latest(other, TASK, tmp_path).step == 2
    assert_same(everything(other), everything(learner))
    assert len(everything(other)) == 4 * len(list(other.named_parameters()))


def test_restored_learner_goes_on_bit_for_bit(tmp_path: Path) -> None:
    learner, other = saved(tmp_path), learner_of(replace(CONFIG, seed=5))
    restore_latest(other, TASK, tmp_path)
    for number in (3, 4):
        step(learner, number)
        step(other, number)
    assert_same(everything(other), everything(learner))


def test_restored_learner_does_not_hang_on_the_files(tmp_path: Path) -> None:
    learner, other = saved(tmp_path), learner_of()
    restore_latest(other, TASK, tmp_path)
    for name in FILES:
        (tmp_path / "step_00000002" / name).write_bytes(b"")
    assert_same(everything(other), everything(learner))


def test_folder_without_checkpoints_is_step_zero(tmp_path: Path) -> None:
    learner = learner_of()
    before = everything(learner)
    assert restore_latest(learner, TASK, tmp_path) == RunState()
    assert restore_latest(learner, TASK, tmp_path / "absent") == RunState()
    assert_same(everything(learner), before)


def test_snapshot_is_a_copy_taken_at_once(tmp_path: Path) -> None:
    """The next step goes on while the last one is written."""
    learner, other = trained(2), learner_of()
    before, snapshot = everything(learner), take_snapshot(learner, TASK, RunState(2))
    step(learner, 3)
    write_snapshot(snapshot, tmp_path)
    restore_latest(other, TASK, tmp_path)
    assert_same(everything(other), before)


def test_checkpoint_is_an_encoder_that_can_be_loaded(tmp_path: Path) -> None:
    learner = saved(tmp_path / "checkpoints")
    encoder = load_encoder(tmp_path)
    assert encoder.config == CONFIG.encoder
    state = learner.encoder.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in encoder.state_dict().items())


def test_newest_checkpoint_is_taken(tmp_path: Path) -> None:
    for steps in (9, 10, 2):
        saved(tmp_path, steps)
    learner = learner_of()
    assert restore_latest(learner, TASK, tmp_path).step == 10
    assert_same(everything(learner), everything(trained(10)))


def test_step_that_the_optimizer_has_not_counted_is_refused(tmp_path: Path) -> None:
    saved(tmp_path)
    (tmp_path / "step_00000002").rename(tmp_path / "step_00000003")
    with pytest.raises(RunError, match=r"step_00000003 says step 3, but its optimizer has counted \[2\]"):
        restore_latest(learner_of(), TASK, tmp_path)


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("kept", [0, 7, -1])
def test_truncated_file_is_a_sentence(file: str, kept: int, tmp_path: Path) -> None:
    saved(tmp_path)
    path = tmp_path / "step_00000002" / file
    path.write_bytes(path.read_bytes()[:kept])
    cure = "remove the folder .*/step_00000002, and the run goes on from its beginning"
    with pytest.raises(RunError, match=rf"{file} are missing or damaged: .*; {cure}"):
        restore_latest(learner_of(), TASK, tmp_path)


@pytest.mark.parametrize("file", FILES)
def test_missing_file_is_a_sentence(file: str, tmp_path: Path) -> None:
    saved(tmp_path)
    (tmp_path / "step_00000002" / file).unlink()
    with pytest.raises(RunError, match=rf"{file} are missing or damaged"):
        restore_latest(learner_of(), TASK, tmp_path)


@pytest.mark.parametrize(
    ("written", "said"),
    [
        (
            None,
            r"state\.json is missing; remove the folder .*/step_00000002, and the run goes on from step 1",
        ),
        (
            "{",
            r"state\.json is damaged .*; remove the folder .*/step_00000002, and the run goes on from step 1",
        ),
        (
            '{"step": 2, "batches_passed": -100}',
            r"state\.json is damaged \(batches_passed\); remove its folder",
        ),
        (
            '{"step": 2, "batches_passed": 1.5}',
            r"state\.json is damaged \(batches_passed\); remove its folder",
        ),
        ('{"step": 2, "losses_seen": -1}', r"state\.json is damaged \(losses_seen\); remove its folder"),
        ('{"step": 2, "mean_loss": "x"}', r"state\.json is damaged \(mean_loss\); remove its folder"),
    ],
)
def test_damaged_state_is_a_sentence_with_its_cure(written: str | None, said: str, tmp_path: Path) -> None:
    saved(tmp_path)
    (tmp_path / "step_00000001").mkdir()
    state = tmp_path / "step_00000002" / "state.json"
    state.unlink() if written is None else state.write_text(written)
    with pytest.raises(RunError, match=said):
        restore_latest(learner_of(), TASK, tmp_path)


@pytest.mark.parametrize("lost", ["encoder.norm.weight", ""])
def test_optimizer_state_is_restored_whole_or_not_at_all(lost: str, tmp_path: Path) -> None:
    """Without it AdamW would quietly start over, which no curve shows at once."""
    saved(tmp_path)
    path = tmp_path / "step_00000002" / "optimizer.safetensors"
    write_tensors({k: v for k, v in load_file(path).items() if lost and not k.startswith(lost)}, path)
    with pytest.raises(RunError, match=r"optimizer (state of encoder\.norm\.weight|has counted \[\])"):
        restore_latest(learner_of(), TASK, tmp_path)


@pytest.mark.parametrize(
    "changed",
    [
        replace(CONFIG, encoder=replace(CONFIG.encoder, depth=2)),
        replace(CONFIG, encoder=replace(CONFIG.encoder, name="vit_tiny")),
        replace(CONFIG, predictor=replace(CONFIG.predictor, depth=2)),
    ],
)
def test_checkpoint_of_another_network_is_a_sentence(changed: TrainConfig, tmp_path: Path) -> None:
    saved(tmp_path)
    with pytest.raises(RunError, match="does not fit this run's configuration") as caught:
        restore_latest(learner_of(changed), TASK, tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("keep", "kept"), [(1, [4]), (2, [3, 4]), (9, [1, 2, 3, 4])])
def test_last_checkpoints_are_kept(keep: int, kept: list[int], tmp_path: Path) -> None:
    writer, learner = CheckpointWriter(tmp_path, Keep(keep)), learner_of()
    for number in (1, 2, 3, 4):
        step(learner, number)
        writer.save(learner, TASK, RunState(number))
    writer.wait()
    assert [number for number, _ in step_directories(tmp_path)] == kept
    assert names(tmp_path) == [f"step_{number:08d}" for number in kept]


def test_same_step_written_again_replaces_the_whole_checkpoint(tmp_path: Path) -> None:
    saved(tmp_path)
    (tmp_path / "step_00000002" / "stray").write_text("")
    learner = saved(tmp_path)
    assert names(tmp_path) == ["step_00000002"]
    assert "stray" not in names(tmp_path / "step_00000002")
    other = learner_of()
    restore_latest(other, TASK, tmp_path)
    assert_same(everything(other), everything(learner))


def test_crash_while_writing_leaves_the_old_checkpoint_and_is_swept(tmp_path: Path) -> None:
    """What a killed writer leaves: a folder under its temporary name, with some files and half of one."""
    learner = saved(tmp_path)
    half = tmp_path / ".writing-abc"
    shutil.copytree(tmp_path / "step_00000002", half)
    (half / "optimizer.safetensors").write_bytes(b"half")
    (half / "state.json").unlink()
    assert [number for number, _ in step_directories(tmp_path)] == [2]
    sweep_unfinished(tmp_path)
    assert names(tmp_path) == ["step_00000002"]
    other = learner_of()
    assert restore_latest(other, TASK, tmp_path).step == 2
    assert_same(everything(other), everything(learner))


def test_sweeping_where_nothing_was_written_is_nothing(tmp_path: Path) -> None:
    sweep_unfinished(tmp_path / "absent")
    assert not (tmp_path / "absent").exists()


def test_error_in_the_background_is_raised_by_the_next_save_or_wait(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    writer, learner = CheckpointWriter(tmp_path / "file" / "checkpoints", Keep(2)), trained(1)
    writer.save(learner, TASK, RunState(1))
    with pytest.raises(ResourceError, match=r"cannot write .*; make space or choose another folder"):
        writer.save(learner, TASK, RunState(2))
    writer.save(learner, TASK, RunState(3))
    with pytest.raises(ResourceError):
        writer.wait()
    writer.wait()  # Told once.


def test_full_disk_is_a_sentence_and_leaves_the_old_checkpoint(tmp_path: Path) -> None:
    """A limit on the size of files stands in for the disk."""
    learner = saved(tmp_path)
    code = """
        import resource, sys
        from pathlib import Path
        import torch
        from salt_vla.config import EncoderConfig
        from salt_vla.errors import ResourceError
        from salt_vla.training.checkpoint import Snapshot, write_snapshot

        big = {"a": torch.zeros(100_000)}
        resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))
        try:
            write_snapshot(Snapshot(3, EncoderConfig(), big, big, big), Path(sys.argv[1]))
        except ResourceError as error:
            print(error)
    """
    command = [sys.executable, "-c", textwrap.dedent(code), str(tmp_path)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    assert done.stdout.startswith(f"cannot write {tmp_path}/.writing-")
    assert done.stdout.endswith("/encoder.safetensors: File too large; make space or choose another folder\n")
    assert names(tmp_path) == ["step_00000002"]
    other = learner_of()
    assert restore_latest(other, TASK, tmp_path).step == 2
    assert_same(everything(other), everything(learner))


def test_checkpoints_can_be_read_by_others(tmp_path: Path) -> None:
    """Temporary folders are private; a finished checkpoint is not."""
    saved(tmp_path)
    assert (tmp_path / "step_00000002").stat().st_mode & 0o777 == 0o755


@pytest.mark.parametrize(
    ("keep", "state", "gone"),
    [
        (Keep(2), RunState(), [1, 2, 3, 4]),
        (Keep(2), RunState(best_step=2), [1, 3, 4]),
        (Keep(1), RunState(best_step=2, safe_step=4), [1, 3, 5]),
        (Keep(2, every=2), RunState(best_step=6), [1, 3]),
        (Keep(1, every=3), RunState(safe_step=1), [2, 4, 5]),
        (Keep(9), RunState(), []),
    ],
)
def test_what_is_kept_is_what_was_asked_for_and_what_is_still_needed(
    keep: Keep, state: RunState, gone: list[int]
) -> None:
    assert keep.discards([3, 1, 2, 6, 5, 4], state) == gone


def test_best_is_a_link_to_the_best_and_an_encoder_like_any_other(tmp_path: Path) -> None:
    writer, learner = CheckpointWriter(tmp_path, Keep(1)), learner_of()
    for number, best in ((1, 1), (2, 2), (3, 2), (4, 2)):
        step(learner, number)
        writer.save(learner, TASK, RunState(number, best_step=best))
    writer.wait()
    assert names(tmp_path) == ["best", "step_00000002", "step_00000004"]
    state = load_encoder(tmp_path / "best").state_dict()
    expected = trained(2).encoder.state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in state.items())
    assert [number for number, _ in step_directories(tmp_path)] == [2, 4]
    point_to_best(tmp_path, 7)  # A step that is not there, as after a return to an earlier one.
    assert names(tmp_path) == ["step_00000002", "step_00000004"]
    (tmp_path / ".writing-best").symlink_to("step_00000004")
    sweep_unfinished(tmp_path)
    assert names(tmp_path) == ["step_00000002", "step_00000004"]


def test_a_rollback_takes_the_checkpoint_it_names_and_gives_up_later_ones(tmp_path: Path) -> None:
    for steps in (2, 3, 5):
        saved(tmp_path, steps)
    learner = learner_of()
    assert restore_latest(learner, TASK, tmp_path, last_step=4).step == 3
    assert_same(everything(learner), everything(trained(3)))
    assert restore_latest(learner_of(), TASK, tmp_path, last_step=0) == RunState()
    with pytest.raises(RunError, match=r"has to go back to step 1, and .* holds no checkpoint of it"):
        restore_latest(learner_of(), TASK, tmp_path, last_step=1)
    discard_after(tmp_path, 3)
    assert names(tmp_path) == ["step_00000002", "step_00000003"]


def test_state_comes_back_with_the_weights_and_says_whose_settings_they_are(tmp_path: Path) -> None:
    learner = trained(2)
    state = RunState(4, batches_passed=3, missed_updates=2, bad_steps=2, mean_loss=1 / 3, losses_seen=2)
    write_snapshot(take_snapshot(learner, TASK, state, config_hash="abc"), tmp_path)
    assert restore_latest(learner_of(), TASK, tmp_path) == state
    assert json.loads((tmp_path / "step_00000004" / "state.json").read_text())["config_hash"] == "abc"


def test_a_run_without_one_sound_update_comes_back_too(tmp_path: Path) -> None:
    write_snapshot(take_snapshot(learner_of(), TASK, RunState(3, missed_updates=3)), tmp_path)
    other = learner_of(replace(CONFIG, seed=5))
    assert restore_latest(other, TASK, tmp_path).missed_updates == 3
    assert_same(everything(other), everything(learner_of()))


def test_averages_come_back_and_are_an_encoder_of_their_own(tmp_path: Path) -> None:
    learner = trained(1)
    average = WeightAverage(learner.named_parameters(), momentum=0.9)
    step(learner, 2)
    average.update(1)
    write_snapshot(take_snapshot(learner, TASK, RunState(2), average), tmp_path)
    other = learner_of()
    again = WeightAverage(other.named_parameters(), momentum=0.9)
    restore_latest(other, TASK, tmp_path, again)
    assert_same(again.tensors, average.tensors)
    loaded = load_encoder(tmp_path / "step_00000002" / "average").state_dict()
    assert_same(loaded, {name: average.tensors[f"encoder.{name}"] for name in loaded})
    (tmp_path / "step_00000002" / "average" / "predictor.safetensors").unlink()
    with pytest.raises(RunError, match=r"predictor\.safetensors are missing"):
        restore_latest(other, TASK, tmp_path, again)

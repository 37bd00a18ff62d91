"""What the processes of one run tell each other; threads stand for processes here, and talk by gloo."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from datetime import timedelta
from threading import Event, Thread
from typing import Any

import pytest
import torch
import torch.distributed as dist

from salt_vla.errors import CacheError, ConfigError, ResourceError, RunError, UserError
from salt_vla.interrupts import StopFlag
from salt_vla.rundir import Launched, launched, num_cores
from salt_vla.training.distributed import LostProcess, World, joined
from salt_vla.training.joint_files import Joint, read_optimizer
from salt_vla.training.sharding import alike, own_rows, whole

ALONE = World()


def together(work: Callable[[World], Any], size: int = 2) -> list[Any]:
    """What `work` returns in each of that many processes; what one raises is returned too."""
    store, answers = dist.HashStore(), [None] * size

    def run(rank: int) -> None:
        group = dist.ProcessGroupGloo(dist.PrefixStore("group", store), rank, size, timedelta(seconds=30))
        try:
            answers[rank] = work(World(rank, size, rank, size, store, group))
        except BaseException as error:  # noqa: BLE001 - handed to the test's own thread.
            answers[rank] = error

    threads = [Thread(target=run, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return answers


def test_sums_means_and_the_largest_are_of_all() -> None:
    def work(world: World) -> tuple[list[float], list[float], int, int]:
        mine = torch.tensor([1.0, float(world.rank)])
        said = world.sum(mine).tolist(), world.mean(mine).tolist(), world.agree(world.rank), world.total(5)
        assert mine.tolist() == [1.0, world.rank]  # What was asked about is as it was.
        return said

    assert together(work, size=3) == [([3.0, 3.0], [1.0, 1.0], 2, 15)] * 3


def test_alone_everything_is_as_it_was() -> None:
    value = torch.ones(2)
    assert ALONE.sum(value) is value and ALONE.mean(value) is value
    assert (ALONE.agree(7), ALONE.total(7), ALONE.tell("a")) == (7, 7, "a")
    assert list(ALONE.in_step(iter([1, 2]))) == [1, 2]
    with joined() as world, ALONE.first_alone(), ALONE.losses_named():
        ALONE.wait()
    assert world == ALONE and world.is_first


@pytest.mark.parametrize("teller", [0, 2])
@pytest.mark.parametrize("text", ["", "batch_size=6 → 8 × “π”", "x" * 100_000])
def test_one_tells_all_any_text(text: str, teller: int) -> None:
    said = together(lambda world: world.tell(text if world.rank == teller else "not this", teller), size=3)
    assert said == [text] * 3


def test_items_come_in_step_until_the_last_process_has_no_more() -> None:
    said = together(lambda world: list(world.in_step(range(world.rank * 2))), size=3)
    assert said == [[None] * 4, [0, 1, None, None], [0, 1, 2, 3]]


@pytest.mark.parametrize("failing", [[0], [1], [1, 2]])
def test_the_failure_of_one_is_raised_in_all_before_anyone_goes_on(failing: list[int]) -> None:
    seen: list[int] = []

    def work(world: World) -> None:
        def items() -> Iterator[int]:
            yield 1
            if world.rank in failing:
                raise CacheError(f"process {world.rank} cannot read")
            yield 2

        for item in world.in_step(items()):
            assert item is not None
            seen.append(item)

    answers = together(work, size=3)
    assert seen == [1, 1, 1]
    assert {str(answer) for answer in answers} == {f"process {failing[0]} cannot read"}
    assert isinstance(answers[failing[0]], CacheError)
    assert all(isinstance(answer, UserError) for answer in answers)


def test_the_first_is_done_before_the_others_begin() -> None:
    done = Event()

    def work(world: World) -> bool:
        with world.first_alone():
            was_done = done.is_set()
            if world.is_first:
                done.set()
        return was_done

    assert together(work, size=3) == [False, True, True]


def test_a_signal_to_one_is_known_to_all() -> None:
    def work(world: World) -> tuple[bool, bool, int]:
        stop = StopFlag()
        before = world.is_stopping(stop)
        stop.signal_number = 15 * (world.rank == 1)
        return before, world.is_stopping(stop), stop.signal_number

    assert together(work) == [(False, True, 15)] * 2


@pytest.mark.parametrize("size", [1, 2])
def test_a_signal_that_comes_while_they_agree_is_not_forgotten(size: int) -> None:
    class Interrupted(StopFlag):
        """The first look at it is followed by a signal, before anybody has answered."""

        looks = 0

        def __getattribute__(self, name: str) -> Any:
            value = super().__getattribute__(name)
            if name == "signal_number" and not self.looks:
                self.looks, self.signal_number = 1, 2
            return value

    def work(world: World) -> tuple[bool, bool, int]:
        stop = Interrupted()
        return world.is_stopping(stop), world.is_stopping(stop), stop.signal_number

    answers = [work(ALONE)] if size == 1 else together(work)
    assert answers == [(False, True, 2)] * size


def test_a_process_that_is_gone_is_named_by_its_last_word_or_as_silent() -> None:
    store = dist.HashStore()
    world, torchs = (
        World(0, 2, store=store),
        RuntimeError("[…gloo/transport/tcp/pair.cc:1] Connection closed"),
    )
    with pytest.raises(LostProcess, match="another of this run's 2 processes has died"):
        raise_in(world, torchs)
    store.set("reason", "the disk of the other is full")
    with pytest.raises(LostProcess, match=r"^the disk of the other is full$"):
        raise_in(world, torchs)


def raise_in(world: World, error: Exception) -> None:
    with world.losses_named():
        raise error


def test_other_errors_of_torch_are_left_as_they_are() -> None:
    for world, error in (
        (World(0, 2, store=dist.HashStore()), RuntimeError("shapes do not fit")),
        (ALONE, RuntimeError("gloo/transport: Connection closed by peer")),
        (World(0, 2, store=dist.HashStore()), CacheError("Connection closed by peer")),
    ):
        with pytest.raises(type(error)) as caught:
            raise_in(world, error)
        assert caught.value is error


def test_a_batch_is_shared_out_evenly_or_refused() -> None:
    World(0, 4).require_even(32, 2)
    with pytest.raises(ConfigError, match=r"batch_size=12 .* 4 processes .*=2; choose a multiple of 8"):
        World(0, 4).require_even(12, 2)


VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ((None, None, None, None), Launched()),
        ((0, 1, None, None), Launched()),  # One process needs no launcher.
        ((3, 4, 1, 2), Launched(3, 4, 1, 2)),
    ],
)
def test_a_launchers_variables_say_which_process_this_is(
    values: tuple[int | None, ...], expected: Launched, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_variables(monkeypatch, values)
    assert launched() == expected


def test_processes_of_a_machine_share_its_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    set_variables(monkeypatch, (None,) * 4)
    cores = num_cores()
    set_variables(monkeypatch, (1, 4, 1, 2))
    assert num_cores() == max(1, cores // 2)
    set_variables(monkeypatch, (1, 5 * cores, 1, 5 * cores))
    assert num_cores() == 1


@pytest.mark.parametrize("values", [(0, 2, None, None), (2, 2, 0, 2), (0, 2, 1, 1), (0, "two", 0, 1)])
def test_variables_that_contradict_each_other_are_a_sentence(
    values: tuple[Any, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    set_variables(monkeypatch, values)
    with pytest.raises(RunError, match="torchrun"):
        launched()


def set_variables(monkeypatch: pytest.MonkeyPatch, values: tuple[Any, ...]) -> None:
    for name, value in zip(VARIABLES, values, strict=True):
        monkeypatch.delenv(name, raising=False)
        if value is not None:
            monkeypatch.setenv(name, str(value))


def test_what_every_process_has_whole_passes_unchanged() -> None:
    tensor = torch.ones(3)
    assert whole(tensor) is own_rows(tensor) is alike(tensor, torch.zeros(3)) is tensor


def test_a_joint_folder_is_whole_when_all_have_reported(tmp_path: Any) -> None:
    def work(world: World) -> str:
        joint = Joint(world, number=1)
        if world.is_first:
            joint.invite(tmp_path / "x")
            joint.wait_for_others()
            return joint.file
        assert joint.invited_to(tmp_path) == tmp_path / "x"
        joint.report()
        return joint.file

    assert together(work) == ["optimizer-00001-of-00002.safetensors", "optimizer-00002-of-00002.safetensors"]


def test_what_one_could_not_write_is_said_by_the_first(tmp_path: Any) -> None:
    def work(world: World) -> None:
        joint = Joint(world, number=2)
        joint.wait_for_others() if world.is_first else joint.report("no space left on its disk")

    first, other = together(work)
    assert isinstance(first, ResourceError) and str(first) == "no space left on its disk" and other is None


def test_nobody_waits_for_the_rows_of_a_process_that_has_left() -> None:
    world = World(0, 2, store=dist.HashStore())
    assert world.store is not None
    world.store.set("reason", "gone")
    with pytest.raises(LostProcess):
        Joint(world, number=3).wait_for_others()


def test_rows_of_several_files_are_put_together(tmp_path: Any) -> None:
    from safetensors.torch import save_file

    full = torch.arange(15.0).reshape(5, 3)
    for number, rows in enumerate((full[:3], full[3:]), start=1):
        name = f"optimizer-{number:05d}-of-00002.safetensors"
        save_file({"w/exp_avg": rows.contiguous(), "w/step": torch.tensor(7.0)}, tmp_path / name)
    read = dict(read_optimizer(tmp_path))
    assert torch.equal(read["w/exp_avg"], full) and read["w/step"].item() == 7
    (tmp_path / "optimizer-00001-of-00002.safetensors").unlink()
    with pytest.raises(RunError, match="holds 1 of the optimizer's 2 files"):
        dict(read_optimizer(tmp_path))
    (tmp_path / "optimizer-00001-of-00002.safetensors").write_bytes(b"half")
    with pytest.raises(RunError, match="missing or damaged"):
        dict(read_optimizer(tmp_path))
    for path in tmp_path.iterdir():
        path.unlink()
    with pytest.raises(RunError, match="missing or damaged"):
        dict(read_optimizer(tmp_path))

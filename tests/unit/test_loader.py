"""Loader processes: the same batches through memory that is used again, and last words when one dies."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field, replace

import numpy as np
import psutil
import pytest
import torch

from salt_vla.batches import Batch, Batches, Part
from salt_vla.cache import open_cache
from salt_vla.cache.shards import Key
from salt_vla.config import BlockSpec, TrainConfig, ViewConfig
from salt_vla.data.clip_table import Clip, ClipTable
from salt_vla.data.golden import golden_path
from salt_vla.data.view_lock import ViewReader
from salt_vla.data.workers import SECONDS_TO_START
from salt_vla.errors import ConfigError, DataError, ResourceError
from salt_vla.geometry import ClipGeometry
from salt_vla.loader import NOTE_BYTES, Loading, _Note, in_this_process, load_from, one_ahead, slots
from salt_vla.masks import MultiBlockMasks

GEOMETRY = ClipGeometry(num_frames=4, image_size=32, tubelet_size=2, patch_size=8)
MASKS = MultiBlockMasks(GEOMETRY, [BlockSpec(2, 0.2), BlockSpec(1, 0.4)])
CLIPS = 24


@dataclass
class Pictures:
    """Pixels that tell their clip; at clip `bad` something `happens`, in whatever process it is read."""

    bad: int = -1
    happens: str = ""
    seconds: float = 0.0
    asked: list[Key] = field(default_factory=list)

    def read_many(self, keys: list[Key], out: np.ndarray | None = None) -> np.ndarray:
        self.asked += keys
        time.sleep(self.seconds)
        numbers = [int(clip.removeprefix("clip")) for clip, _ in keys]
        if self.bad in numbers:
            self.trouble()
        out = np.empty((len(keys), 4, 32, 32, 3), np.uint8) if out is None else out
        out[:] = np.array(numbers, np.uint8).reshape(-1, 1, 1, 1, 1)
        return out

    def read_each(self, keys: list[Key]) -> Iterator[tuple[Key, np.ndarray]]:
        return ((key, self.read_many([key])[0]) for key in keys)

    def trouble(self) -> None:
        if self.happens == "hang":
            time.sleep(600)
        if self.happens == "bug":
            raise RuntimeError("a mistake of ours")
        os.kill(os.getpid(), signal.Signals[self.happens])


class Stills:
    """Pixels that tell a key."""

    def read_many(self, keys: list[Key], out: np.ndarray | None = None) -> np.ndarray:
        out = np.empty((len(keys), 4, 32, 32, 3), np.uint8) if out is None else out
        out[:] = np.array([int(clip[5:]) for clip, _ in keys], np.uint8).reshape(-1, 1, 1, 1, 1)
        return out


def make(views: Pictures | None = None, **changes) -> Batches:
    options = {"batch_size": 4, "num_views": 1, "seed": 3, "steps": 11} | changes
    return Batches([Part(tuple(f"clip{n}" for n in range(CLIPS)))], views or Pictures(), MASKS, **options)


def same(a: Batch, b: Batch) -> bool:
    ours, theirs = list(a.tensors()), list(b.tensors())
    equal = all(torch.equal(x, y) for x, y in zip(ours, theirs, strict=True))
    return equal and (a.keys, a.first_row, a.global_size) == (b.keys, b.first_row, b.global_size)


@pytest.fixture
def cache(tmp_path, build_cache):
    build_cache(tmp_path / "c", clips=CLIPS, views=1, shape=(GEOMETRY.num_tokens, 3), per_shard=12)
    return open_cache(tmp_path / "c")


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
@pytest.mark.parametrize(
    ("workers", "prefetch", "masks_in"), [(0, 2, "step"), (1, 1, "loader"), (3, 2, "step")]
)
def test_how_batches_come_never_changes_which(workers, prefetch, masks_in, cache):
    """More steps than there are slots: memory is written over, and each batch is whole when it is given."""
    clips = Part(tuple(f"clip/{n}" for n in range(CLIPS)))
    views = Stills()
    batches = Batches(
        [clips], views, MASKS, batch_size=4, num_views=1, seed=3, steps=13, jitter=True,
        cache=cache,
    )  # fmt: skip
    how = Loading(workers, prefetch, masks_in)
    assert workers * slots(prefetch) < 13
    loaded = load_from(batches, 1, how)
    for step in range(1, 13):
        assert same(next(loaded), batches[step]), step
    with pytest.raises(StopIteration):
        next(loaded)


def test_memory_that_is_read_into_again_holds_the_same():
    batches = make(steps=6, jitter=True)
    places = set()
    for step, batch in enumerate(in_this_process(batches, 2, again=True), start=2):
        assert same(batch, batches[step])
        places.add(batch.frames.data_ptr())
    assert len(places) == 1


def test_a_batch_is_whole_until_the_next_but_one_is_asked_for():
    before: list[tuple[Batch, Batch]] = []
    batches = make(steps=12)
    for step, batch in enumerate(load_from(batches, 0, Loading(1, prefetch=1))):
        time.sleep(0.02)  # Time for the process to fill every slot that it may.
        before = [*before[-1:], (batch, batches[step])]
        assert all(same(ours, expected) for ours, expected in before)


def test_a_ranks_parts_are_the_global_batch_cut():
    whole = make(batch_size=12, jitter=True)[5]
    parts = [make(batch_size=12, jitter=True, part=(rank, 3))[5] for rank in range(3)]
    assert [key for part in parts for key in part.keys] == whole.keys
    assert torch.equal(torch.cat([part.frames for part in parts]), whole.frames)
    assert torch.equal(torch.cat([part.jitter for part in parts]), whole.jitter)
    for number, group in enumerate(whole.masks):
        assert torch.equal(torch.cat([part.masks[number].target_ids for part in parts]), group.target_ids)
    assert [(part.first_row, part.global_size) for part in parts] == [(0, 12), (4, 12), (8, 12)]
    micro = [(m.first_row, m.global_size) for m in parts[1].micro_batches(2)]
    assert micro == [(4, 12), (6, 12)]


def test_a_rank_reads_no_rows_but_its_own():
    views = Pictures()
    part = make(views, batch_size=12, part=(2, 3))
    assert views.asked == [] and part[5].keys == views.asked


def test_a_batch_that_cannot_be_shared_out_is_refused():
    with pytest.raises(ConfigError, match=r"batch_size=4 cannot be shared out evenly among 3 processes"):
        make(part=(0, 3))


def test_jitter_is_uniform_and_a_function_of_seed_and_step():
    drawn = torch.cat([make(batch_size=24, jitter=True)[step].jitter for step in range(11)])
    assert drawn.dtype == torch.float32 and drawn.shape == (264, 3)
    assert drawn.min() >= -1 and drawn.max() <= 1 and abs(drawn.mean()) < 0.06
    assert drawn.std() == pytest.approx(3**-0.5, abs=0.03)
    assert not torch.equal(make(jitter=True)[0].jitter, make(jitter=True, seed=4)[0].jitter)
    assert make()[0].jitter is None and next(make(jitter=True).canonical(4, 4)).jitter is None


def test_one_ahead_gives_the_same_and_reads_while_one_is_in_use():
    views = Pictures()
    batches = make(views)
    coming = one_ahead(iter([batches[0]]), lambda batch: replace(batch, keys=[]))
    assert next(coming).keys == [] and next(coming, None) is None
    views.asked.clear()
    coming = one_ahead((batches[step] for step in range(3)), lambda batch: batch)
    first = next(coming)
    deadline = time.monotonic() + 30
    while len(views.asked) < 8 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert len(views.asked) == 8, "the second batch is read before it is asked for"
    assert same(first, batches[0]) and same(next(coming), batches[1])
    coming.close()


def test_what_one_ahead_cannot_read_is_raised_at_its_turn():
    batches = make(Pictures(bad=5, happens="bug"), steps=100)
    at = next(step for step in range(100) if "clip5" in [clip for clip, _ in batches.keys(step)])
    coming = one_ahead((batches[step] for step in range(100)), lambda batch: batch)
    for _ in range(at):
        next(coming)
    with pytest.raises(RuntimeError, match="a mistake of ours"):
        next(coming)


@pytest.mark.skipif(torch.cuda.is_available(), reason="of machines without a GPU")
def test_pinning_breaks_nothing_without_a_gpu():
    batch = make()[0]
    assert batch.pin_memory() is batch


@pytest.mark.parametrize(
    ("happens", "kind", "said"),
    [
        ("SIGSEGV", DataError, r"was killed by SIGSEGV while .* makes the decoder crash: take it out"),
        ("SIGKILL", ResourceError, r"was killed by SIGKILL while .* most likely memory ran out .*/dev/shm"),
    ],
)
def test_a_process_that_dies_is_a_sentence_with_step_and_clips(happens, kind, said):
    batches = make(Pictures(bad=5, happens=happens), steps=100)
    at = next(step for step in range(100) if "clip5" in [clip for clip, _ in batches.keys(step)])
    with pytest.raises(kind, match=said) as raised:
        list(load_from(batches, 0, Loading(2 if happens == "SIGKILL" else 1)))
    named = ", ".join(f"'{clip}' (view 0)" for clip, _ in batches.keys(at))
    assert f"while it read for step {at + 1}: clips {named};" in str(raised.value)


def test_a_process_that_hangs_is_named_and_ended(spawned):
    """Patience is for one batch: those before took longer together."""
    batches = make(Pictures(bad=5, happens="hang", seconds=1.5), steps=100)
    at = next(step for step in range(100) if "clip5" in [clip for clip, _ in batches.keys(step)])
    loaded = load_from(batches, 0, Loading(1, prefetch=1, patience=7))
    assert at * 1.5 > 7
    assert [next(loaded).keys for _ in range(at)] == [batches.keys(step) for step in range(at)]
    with pytest.raises(DataError, match=rf"no batch came in 7 s: a loader process hangs .* step {at + 1}:"):
        next(loaded)
    assert not spawned(psutil.Process())


SCRIPT = """
import os, signal, sys, time
from pathlib import Path
import numpy as np
from salt_vla.batches import Batches, Part
from salt_vla.config import BlockSpec
from salt_vla.geometry import ClipGeometry
from salt_vla.loader import Loading, load_from
from salt_vla.masks import MultiBlockMasks

class Views:
    def read_many(self, keys, out=None):
        return np.zeros((len(keys), 4, 32, 32, 3), np.uint8)
    def __setstate__(self, state):  # In a process that has just begun to start.
        Path(sys.argv[1]).write_text(str(os.getpid()))
        parent = os.getppid()
        os.kill(parent, signal.SIGKILL)
        while os.getppid() == parent:
            time.sleep(0.01)

def train():
    views = Views()
    views.any = "state"
    masks = MultiBlockMasks(ClipGeometry(4, 32, 2, 8), [BlockSpec(1, 0.2)])
    batches = Batches([Part(("a", "b"))], views, masks, batch_size=2, num_views=1, seed=0, steps=99)
    next(load_from(batches, 0, Loading(1)))
"""


def test_a_process_whose_parent_dies_while_it_starts_ends(tmp_path):
    """Then no signal comes, and it would wait for ever with what it has read in shared memory."""
    script, note = tmp_path / "script.py", tmp_path / "pid"
    script.write_text(SCRIPT + 'if __name__ == "__main__":\n    train()\n')
    ended = subprocess.run([sys.executable, str(script), str(note)], stderr=subprocess.DEVNULL, timeout=60)
    assert ended.returncode == -signal.SIGKILL
    with suppress(psutil.NoSuchProcess):
        left = psutil.Process(int(note.read_text()))
        try:
            for _ in range(400):
                if left.status() == psutil.STATUS_ZOMBIE:  # Its parent is gone: who adopts it may never wait.
                    return
                time.sleep(0.05)
            raise AssertionError("it lives on after its parent")
        finally:
            with suppress(psutil.NoSuchProcess):
                left.kill()


def test_a_script_without_a_main_block_is_not_taken_for_a_bad_film(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT + "train()\n")
    said = subprocess.run([sys.executable, str(script), str(tmp_path)], capture_output=True, text=True)
    assert (
        "it could not start, and what it said is above; a Python script has to train below `if" in said.stderr
    )
    assert "decoder" not in said.stderr.splitlines()[-1]


def test_a_mistake_of_ours_is_not_taken_for_a_death():
    with pytest.raises(RuntimeError, match="a mistake of ours"):
        list(load_from(make(Pictures(bad=5, happens="bug")), 0, Loading(1)))


def test_the_clip_whose_film_is_being_decoded_is_the_one_named(tmp_path):
    """Of a batch of four only the one in the decoder's hands, by a film that never ends: a pipe."""
    for name in ("a.mp4", "b.mp4"):
        (tmp_path / name).write_bytes(golden_path("h264.mp4").read_bytes())
    clips = [
        Clip(name, "films", "folder", name, 0, n, 0, 24, "", "", 30.0, False, "train")
        for n, name in enumerate(("a.mp4", "b.mp4"))
    ]
    table = ClipTable.from_clips(clips, tmp_path)
    views = ViewReader(table, ViewConfig(sampling="uniform"), GEOMETRY)
    told: list[list[Key]] = []
    views.before_pass = told.append
    views.read_many([("b.mp4", 0), ("a.mp4", 0)])
    assert told == [[("a.mp4", 0)], [("b.mp4", 0)]]


def test_last_words_fit_their_place_whatever_the_clips_are_called():
    notes = torch.zeros((2, NOTE_BYTES), dtype=torch.uint8)
    assert not _Note.read(notes, 1).is_there and str(_Note.read(notes, 1)) == "before it read anything"
    keys = [(f"a/very long/näme of a clip {number}", number) for number in range(3072)]
    _Note(6, keys).write(notes, 1)
    note = _Note.read(notes, 1)
    assert note.step == 6 and note.keys == keys[: len(note.keys)] and len(note.keys) > 8
    assert note.others == 3072 - len(note.keys) and str(note).endswith(f"and {note.others} more")
    _Note(7, keys[:1]).write(notes, 1)
    assert str(_Note.read(notes, 1)) == f"while it read for step 8: clip {keys[0][0]!r} (view 0)"
    _Note(8, [("x" * 10_000, 0)]).write(notes, 1)
    assert not _Note.read(notes, 0).is_there


def test_the_settings_decide_how_batches_come():
    config = TrainConfig()
    assert Loading.of(config) == Loading(0, 2, "loader", "auto", 1800.0)
    data = replace(config.data, num_workers=3, prefetch=5, masks_in="step")
    assert Loading.of(replace(config, data=data)) == Loading(3, 5, "step", "auto", 1800.0)


def test_a_start_is_watched_here_before_a_watchdog_ends_it():
    assert Loading(0, patience=6.0).seconds_to_start == 0.0
    assert Loading(1, patience=6.0).seconds_to_start > SECONDS_TO_START

"""Views come in order and whole whatever becomes of the processes that decode them, which are real ones."""

from __future__ import annotations

import dataclasses
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import numpy as np
import psutil
import pytest

from salt_vla.config import ViewConfig
from salt_vla.data import read_ahead as module
from salt_vla.data.clip_table import ClipTable
from salt_vla.data.read_ahead import NICENESS, read_ahead
from salt_vla.data.view_lock import Key, ViewReader
from salt_vla.errors import DataError, ResourceError
from salt_vla.geometry import ClipGeometry

GEOMETRY = ClipGeometry(num_frames=8, image_size=32, tubelet_size=2, patch_size=8)
VIEW = ViewConfig(frame_stride=2, num_views=2, crop_scale=(0.5, 1.0), max_shift=2)


@pytest.fixture
def views(tiny_table: ClipTable) -> ViewReader:
    return ViewReader(tiny_table, VIEW, GEOMETRY)


@pytest.fixture
def keys(tiny_table: ClipTable) -> list[Key]:
    return [(clip_id, view) for clip_id in tiny_table.clip_ids for view in (0, 1)]


@pytest.fixture
def few_ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    """Decoders wait for who takes the views: while any is left, they live."""
    for name in ("RUN_BYTES", "BYTES_READY", "BYTES_IN_WORK"):
        monkeypatch.setattr(module, name, 1)


def plain(results: object) -> list[tuple[Key, bytes | str]]:
    return [
        (key, str(pixels) if isinstance(pixels, DataError) else pixels.tobytes())
        for key, pixels in results  # type: ignore[attr-defined]
    ]


def decoders() -> list[psutil.Process]:
    """The processes that this one has started for decoding."""
    found = psutil.Process().children(recursive=True)
    return [child for child in found if "spawn_main" in _command(child)]


def _command(process: psutil.Process) -> str:
    """Empty for one that has died meanwhile, as other tests' children may."""
    try:
        return " ".join(process.cmdline())
    except psutil.NoSuchProcess:  # Of which `ZombieProcess` is one.
        return ""


def gone(processes: list[psutil.Process], seconds: float = 10.0) -> bool:
    return not psutil.wait_procs(processes, timeout=seconds)[1]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_pixels_reasons_and_order_do_not_depend_on_the_workers(
    views: ViewReader, keys: list[Key], num_workers: int
) -> None:
    wanted = [*keys[:20], ("nobody", 0), *keys[20:], keys[0]]
    expected = plain(views.read_each(wanted))
    assert plain(read_ahead(views, wanted, num_workers)) == expected
    assert "'nobody'" in str(expected[20][1])


def test_a_bad_file_is_named_with_the_same_words_by_a_worker(
    write_layout: Callable[..., Path], tmp_path: Path
) -> None:
    from salt_vla.data.segments import Cutting
    from salt_vla.jobs.data_index import index_data

    folder = write_layout("folder", tmp_path / "films")
    view = ViewConfig(frame_stride=1)
    table, _ = index_data(folder, Cutting(view, 8))
    bad = table.clip(table.clip_ids[1]).file
    (folder / bad).write_bytes(b"no film")
    reader = ViewReader(table, view, GEOMETRY)
    keys = [(clip_id, 0) for clip_id in table.clip_ids]
    here, there = (plain(read_ahead(reader, keys, count)) for count in (0, 1))
    assert here == there
    assert [key for key, said in here if isinstance(said, str)] == [
        key for key in keys if table.clip(key[0]).file == bad
    ]


@pytest.mark.parametrize("num_workers", [0, 1])
def test_nothing_is_held_back_until_the_next_key_is_known(
    views: ViewReader, keys: list[Key], num_workers: int
) -> None:
    """Two builders that wait for each other's shards must each get the views of their own."""
    taken: list[Key] = []

    def one_after_the_other() -> Iterator[Key | None]:
        for key in keys[:3]:
            yield key
            while key not in taken:
                yield None

    for key, _ in read_ahead(views, one_after_the_other(), num_workers):
        taken.append(key)
    assert taken == keys[:3]


@pytest.mark.usefixtures("few_ahead")
def test_killed_workers_cost_nothing(views: ViewReader, keys: list[Key]) -> None:
    expected = plain(views.read_each(keys))
    results = read_ahead(views, keys, 2)
    first = next(results)
    workers = decoders()
    assert workers
    for worker in workers:
        worker.kill()
    assert plain([first, *results]) == expected


@pytest.mark.usefixtures("few_ahead")
def test_a_hanging_worker_is_replaced(
    views: ViewReader, keys: list[Key], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "RUN_SECONDS", 2.5)
    expected = plain(views.read_each(keys[:8]))
    # Closed even when this fails: a traceback that is kept would keep the decoder alive.
    with closing(read_ahead(views, keys[:8], 1)) as results:
        first = next(results)
        (worker,) = decoders()
        worker.suspend()
        assert plain([first, *results]) == expected
        assert gone([worker], 0)


def test_one_film_may_cost_many_decoders_but_not_one_film_after_the_other(
    views: ViewReader, keys: list[Key]
) -> None:
    ahead = module._Ahead(views, (), 1)
    clips = [dataclasses.replace(views.table.clip(keys[0][0]), file=file) for file in "abc"]
    runs = [module._Run((keys[0],), (clip,)) for clip in clips]
    for _ in range(100):
        ahead._note_lost(runs[0], "it died")
    ahead._note_lost(runs[1], "it died")
    with pytest.raises(ResourceError, match=r"one file after the other \(3 in a row; the last: it died\)"):
        ahead._note_lost(runs[2], "it died")


FATAL_FILM = """
import json, os, signal, sys
from pathlib import Path
import salt_vla.data.view_lock as lock
from salt_vla.config import ViewConfig
from salt_vla.data.clip_table import ClipTable
from salt_vla.data.read_ahead import read_ahead
from salt_vla.geometry import ClipGeometry

stream_frames, fatal = lock.stream_frames, sys.argv[2].split(",")

def decode(path, indices, *rest):  # Workers import this file too.
    if any(str(number) in fatal for number in indices):
        os.kill(os.getpid(), signal.SIGSEGV)
    return stream_frames(path, indices, *rest)

lock.stream_frames = decode

if __name__ == "__main__":
    table = ClipTable.read(Path(sys.argv[1]))
    views = lock.ViewReader(table, ViewConfig(frame_stride=2), ClipGeometry(8, 32, 2, 8))
    keys = [(clip_id, 0) for clip_id in table.clip_ids]
    for key, pixels in read_ahead(views, keys, 1):
        print(json.dumps([key[0], str(pixels) if isinstance(pixels, Exception) else ""]), flush=True)
"""


def test_a_clip_that_kills_its_decoder_is_given_up_with_the_reason_and_no_other(
    tiny_table: ClipTable, tmp_path: Path
) -> None:
    table = tiny_table.select(camera="observation.images.front", split="train")
    table.write(tmp_path / "clips.parquet")
    clips = table.clips()
    number = clips[3].first_frame
    (tmp_path / "program.py").write_text(FATAL_FILM)
    command = [sys.executable, tmp_path / "program.py", tmp_path / "clips.parquet", str(number)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    said = [line[2:-2].split('", "') for line in done.stdout.splitlines()]
    assert [clip_id for clip_id, _ in said] == table.clip_ids
    reasons = {clip_id: reason for clip_id, reason in said if reason}
    (fatal,) = reasons
    assert number in range(table.clip(fatal).first_frame, table.clip(fatal).first_frame + 15)
    assert reasons[fatal] == (f"clip '{fatal}', view 0: the process that worked on it died (SIGSEGV)")


@pytest.mark.usefixtures("few_ahead")
def test_workers_give_way_to_the_callers_threads(views: ViewReader, keys: list[Key]) -> None:
    results = read_ahead(views, keys, 1)
    next(results)
    (worker,) = decoders()
    assert worker.nice() == min(psutil.Process().nice() + NICENESS, 19)
    results.close()
    assert gone([worker])


@pytest.mark.usefixtures("few_ahead")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_signals_to_the_whole_group_are_left_to_the_caller(
    views: ViewReader, keys: list[Key], number: signal.Signals
) -> None:
    results = read_ahead(views, keys, 1)
    first = next(results)
    workers = decoders()
    workers[0].send_signal(number)
    assert len([first, *results]) == len(keys)
    assert gone(workers)


def test_no_more_is_decoded_ahead_than_fits(
    views: ViewReader, keys: list[Key], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Runs of one view; two views may lie ready, and as many be in work."""
    size = GEOMETRY.clip_bytes
    for name, value in (("RUN_BYTES", size), ("BYTES_READY", 2 * size), ("BYTES_IN_WORK", 2 * size)):
        monkeypatch.setattr(module, name, value)
    drawn: list[Key] = []

    def drawing() -> Iterator[Key]:
        for key in keys:
            drawn.append(key)
            yield key

    results = read_ahead(views, drawing(), 1)
    next(results)
    time.sleep(1.0)
    # One taken, two ready, one that waits to be put there, two in work, and one that begins the next run.
    assert 4 <= len(drawn) <= 7
    assert len(list(results)) == len(keys) - 1


def test_waiting_can_be_broken_off(views: ViewReader, keys: list[Key]) -> None:
    def for_ever() -> Iterator[Key | None]:
        yield keys[0]
        while True:
            yield None

    for num_workers in (0, 1):
        enough: list[int] = []

        def check(enough: list[int] = enough) -> None:
            if enough:
                raise InterruptedError("enough")

        results = read_ahead(views, for_ever(), num_workers, check)
        assert next(results)[0] == keys[0]
        workers = decoders()
        enough.append(1)
        with pytest.raises(InterruptedError, match="enough"):
            next(results)
        assert gone(workers)


def test_an_error_of_the_keys_reaches_the_caller(views: ViewReader, keys: list[Key]) -> None:
    def failing() -> Iterator[Key]:
        yield keys[0]
        raise InterruptedError("no more keys")

    results = read_ahead(views, failing(), 1)
    with pytest.raises(InterruptedError, match="no more keys"):
        list(results)
    assert gone(decoders())


def test_a_store_of_views_is_read_here(keys: list[Key]) -> None:
    class Store:
        def read_each(self, keys: list[Key]) -> Iterator[tuple[Key, np.ndarray]]:
            for key in keys:
                yield key, np.full(3, key[1], np.uint8)

    assert plain(read_ahead(Store(), [keys[0], None, keys[1]], 4)) == [
        (keys[0], b"\0\0\0"),
        (keys[1], b"\1\1\1"),
    ]
    assert not decoders()


ENDLESS = """
import sys
from itertools import repeat
from pathlib import Path
from salt_vla.config import ViewConfig
from salt_vla.data.clip_table import ClipTable
from salt_vla.data.read_ahead import read_ahead
from salt_vla.data.view_lock import ViewReader
from salt_vla.geometry import ClipGeometry

if __name__ == "__main__":
    table = ClipTable.read(Path(sys.argv[1]))
    views = ViewReader(table, ViewConfig(frame_stride=2), ClipGeometry(8, 32, 2, 8))
    for key, _ in read_ahead(views, repeat((table.clip_ids[0], 0)), 2):
        print("view", flush=True)
"""


def test_workers_of_a_killed_caller_end_even_when_they_hang(tiny_table: ClipTable, tmp_path: Path) -> None:
    tiny_table.write(tmp_path / "clips.parquet")
    (tmp_path / "program.py").write_text(ENDLESS)
    command = [sys.executable, tmp_path / "program.py", tmp_path / "clips.parquet"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None and process.stdout.readline() == "view\n"
        workers = [
            child
            for child in psutil.Process(process.pid).children(recursive=True)
            if "spawn_main" in _command(child)
        ]
        assert len(workers) == 2
        workers[0].suspend()
    finally:
        process.kill()
        process.communicate()
    assert gone(workers)

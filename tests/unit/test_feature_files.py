"""Features survive what happens to files: kills, full disks, other processes, damage, films that cannot be
read; and they take the memory of a batch, however many clips there are."""

from __future__ import annotations

import json
import multiprocessing
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
from torch import Tensor

from salt_vla.data.video_file import OutOfReach
from salt_vla.errors import CacheError, DataError, ResourceError, RunError
from salt_vla.evaluation.feature_files import note_of
from salt_vla.evaluation.feature_store import ClipViews, FeatureStore, UnreadableClips
from salt_vla.evaluation.features import Pixels, Reading
from salt_vla.geometry import ClipGeometry
from salt_vla.interrupts import Stopped

GEOMETRY = ClipGeometry(num_frames=4, image_size=16, tubelet_size=2, patch_size=8)
READINGS = [Reading("grid"), Reading("tokens")]
CLIPS = 11
Key = tuple[str, int]


class Films:
    """Pixels that tell their clip; those of `bad` have none."""

    def __init__(self, bad: dict[str, DataError] | None = None) -> None:
        self.bad = bad or {}
        self.asked: list[str] = []

    def read_many(self, keys: Sequence[Key], out: np.ndarray | None = None) -> np.ndarray:
        raise NotImplementedError

    def read_each(self, keys: Iterable[Key]) -> Iterator[tuple[Key, np.ndarray | DataError]]:
        for key in keys:
            self.asked.append(key[0])
            seed = int(key[0].removeprefix("clip"))
            film = np.random.default_rng(seed).integers(0, 256, (4, 16, 16, 3), dtype=np.uint8)
            yield key, self.bad.get(key[0], film)


class Slow(Pixels):
    """Stops for good at its third batch, or for a while at each."""

    def __init__(self, seconds: float = 60.0, at: int = 2) -> None:
        super().__init__(GEOMETRY)
        self.seconds, self.left = seconds, at

    def latents(self, frames: Tensor) -> Tensor:
        self.left -= 1
        if self.left < 0:
            time.sleep(self.seconds)
        return super().latents(frames)


class Signalling(Pixels):
    def latents(self, frames: Tensor) -> Tensor:
        signal.raise_signal(signal.SIGINT)
        return super().latents(frames)


def views(films: Films | None = None, clips: Sequence[str] | None = None) -> ClipViews:
    return ClipViews(clips or [f"clip{number}" for number in range(CLIPS)], films or Films(), "p")


def expected(folder: Path) -> dict[Reading, np.ndarray]:
    found = FeatureStore(folder, batch_size=2).features({"m": Pixels(GEOMETRY)}, views(), READINGS)
    return {reading: np.array(found[reading]["m"]) for reading in READINGS}


def extract(folder: Path, seconds: float, at: int) -> None:
    FeatureStore(folder, batch_size=2).features({"m": Slow(seconds, at)}, views(), READINGS)


def begin(folder: Path, seconds: float, at: int) -> multiprocessing.process.BaseProcess:
    """An extraction in a process of its own, once it has written rows."""
    process = multiprocessing.get_context("fork").Process(target=extract, args=(folder, seconds, at))
    process.start()
    deadline = time.monotonic() + 60
    while sum(path.stat().st_size > 0 for path in folder.glob("*.partial")) < len(READINGS):
        assert time.monotonic() < deadline and process.is_alive()
        time.sleep(0.01)
    return process


def test_killed_while_extracting_it_goes_on_and_gives_the_same_bytes(tmp_path: Path) -> None:
    process = begin(tmp_path / "cut", 60, 2)
    assert process.pid is not None
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    films = Films()
    store = FeatureStore(tmp_path / "cut", batch_size=2)
    found = store.features({"m": Pixels(GEOMETRY)}, views(films), READINGS)
    assert 0 < len(films.asked) < CLIPS, "what was there was not read again"
    for reading, array in expected(tmp_path / "whole").items():
        assert np.array_equal(found[reading]["m"], array)
    assert not list((tmp_path / "cut").glob("*.partial*"))


def test_another_process_is_waited_for_and_its_rows_are_taken(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    process = begin(tmp_path, 0.3, 1)
    films = Films()
    found = FeatureStore(tmp_path, batch_size=2).features({"m": Pixels(GEOMETRY)}, views(films), READINGS)
    process.join()
    assert process.exitcode == 0 and not films.asked
    assert "another process extracts" in capsys.readouterr().err
    for reading, array in expected(tmp_path / "whole").items():
        assert np.array_equal(found[reading]["m"], array)


def test_waiting_ends_when_the_check_says_so(tmp_path: Path) -> None:
    process = begin(tmp_path, 60, 1)

    def stop() -> None:
        raise Stopped(signal.SIGINT, "while waiting")

    with pytest.raises(Stopped):
        FeatureStore(tmp_path, check=stop).features({"m": Pixels(GEOMETRY)}, views(), READINGS)
    process.kill()
    process.join()


def test_an_interrupt_stops_between_batches_and_keeps_what_is_done(tmp_path: Path) -> None:
    store = FeatureStore(tmp_path, batch_size=2)
    with pytest.raises(Stopped, match="while reading features; the same command goes on"):
        store.features({"m": Signalling(GEOMETRY)}, views(), READINGS)
    films = Films()
    store.features({"m": Pixels(GEOMETRY)}, views(films), READINGS)
    assert films.asked == [f"clip{number}" for number in range(2, CLIPS)]


def test_an_interrupt_during_the_last_batch_is_heard_and_what_is_done_is_kept(tmp_path: Path) -> None:
    store = FeatureStore(tmp_path, batch_size=CLIPS)
    with pytest.raises(Stopped, match="while reading features"):
        store.features({"m": Signalling(GEOMETRY)}, views(), READINGS)
    films = Films()
    found = store.features({"m": Pixels(GEOMETRY)}, views(films), READINGS)
    assert films.asked == []
    for reading, array in expected(tmp_path / "whole").items():
        assert np.array_equal(found[reading]["m"], array)


def test_clips_that_cannot_be_read_are_named_and_the_rest_is_kept(tmp_path: Path) -> None:
    bad = {"clip0": DataError("torn"), "clip7": DataError("empty")}
    store, films = FeatureStore(tmp_path, batch_size=2), Films(bad)
    for _ in range(2):  # Asked again, it knows.
        with pytest.raises(UnreadableClips, match="2 clips cannot be read; the first: torn") as caught:
            store.features({"m": Pixels(GEOMETRY)}, views(films), READINGS)
        assert caught.value.left_out == {"clip0": "torn", "clip7": "empty"}
    assert len(films.asked) == CLIPS
    left = [f"clip{number}" for number in range(CLIPS) if number not in (0, 7)]
    found = store.features({"m": Pixels(GEOMETRY)}, views(films, left), READINGS)
    assert len(films.asked) == CLIPS, "nothing is extracted twice"
    for reading, array in expected(tmp_path / "whole").items():
        assert np.array_equal(found[reading]["m"], np.delete(array, (0, 7), 0))


def test_interrupted_behind_an_unreadable_clip_rows_stay_in_order(tmp_path: Path) -> None:
    bad = {"clip1": DataError("torn"), "clip8": DataError("torn")}
    cut, whole = FeatureStore(tmp_path / "cut", batch_size=3), FeatureStore(tmp_path / "whole", batch_size=3)

    def run(store: FeatureStore) -> np.ndarray:
        clips = [f"clip{number}" for number in range(CLIPS)]
        with pytest.raises(UnreadableClips):
            store.features({"m": Pixels(GEOMETRY)}, views(Films(bad), clips), READINGS)
        left = [clip for clip in clips if clip not in bad]
        return store.features({"m": Pixels(GEOMETRY)}, views(Films(bad), left), READINGS)[READINGS[0]]["m"]

    class Once(Pixels):
        def latents(self, frames: Tensor) -> Tensor:
            if len(frames) == 3:  # The second batch: the first has lost a clip.
                raise KeyboardInterrupt
            return super().latents(frames)

    with pytest.raises(KeyboardInterrupt):
        cut.features({"m": Once(GEOMETRY)}, views(Films(bad)), READINGS)
    assert np.array_equal(run(cut), run(whole))


def test_a_disk_that_is_away_leaves_no_clip_out(tmp_path: Path) -> None:
    films = Films({"clip4": OutOfReach("the disk is away")})
    with pytest.raises(OutOfReach, match="the disk is away"):
        FeatureStore(tmp_path).features({"m": Pixels(GEOMETRY)}, views(films), READINGS)
    FeatureStore(tmp_path).features({"m": Pixels(GEOMETRY)}, views(), READINGS)


def test_no_readable_clip_at_all_is_a_sentence(tmp_path: Path) -> None:
    films = Films({f"clip{number}": DataError("torn") for number in range(CLIPS)})
    with pytest.raises(DataError, match="not one of 11 clips can be read; the first: torn"):
        FeatureStore(tmp_path).features({"m": Pixels(GEOMETRY)}, views(films), READINGS)


def test_a_full_disk_is_a_sentence_and_room_lets_it_go_on(tmp_path: Path) -> None:
    """A limit on files stands for the disk: both refuse in the middle of a write."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    store = FeatureStore(tmp_path, batch_size=2)
    row = store.features({"m": Pixels(GEOMETRY)}, views(clips=["clip0"]), READINGS[1:])
    size = row[READINGS[1]]["m"].nbytes
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (5 * size + 3, limits[1]))
        with pytest.raises(ResourceError, match="make space or choose another folder"):
            store.features({"m": Pixels(GEOMETRY)}, views(), READINGS[1:])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, before)
    films = Films()
    found = store.features({"m": Pixels(GEOMETRY)}, views(films), READINGS[1:])
    assert films.asked[0] == "clip4", "five rows were whole; batches begin at even clips"
    assert np.array_equal(found[READINGS[1]]["m"], expected(tmp_path / "whole")[READINGS[1]])


def test_more_than_the_disk_holds_is_refused_before_it_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from salt_vla.evaluation import feature_files

    usage = feature_files.shutil.disk_usage(tmp_path)._replace(free=10)
    monkeypatch.setattr(feature_files.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(ResourceError, match=r"these features take .* GB free; make space"):
        FeatureStore(tmp_path).features({"m": Pixels(GEOMETRY)}, views(), READINGS)


@pytest.mark.parametrize("damage", ["{", "[]", "{}", '{"shape": [11, -1], "dtype": "<f4"}',
                                    '{"shape": [11, 4], "dtype": "object"}'])  # fmt: skip
def test_a_damaged_note_is_a_sentence_that_names_it(tmp_path: Path, damage: str) -> None:
    store = FeatureStore(tmp_path)
    store.features({"m": Pixels(GEOMETRY)}, views(), READINGS[:1])
    (file,) = tmp_path.glob("*.json")
    file.write_text(damage)
    with pytest.raises((CacheError, RunError), match="damaged") as caught:
        store.features({"m": Pixels(GEOMETRY)}, views(), READINGS[:1])
    assert file.name in str(caught.value) and "remove it" in str(caught.value)
    file.unlink()
    store.features({"m": Pixels(GEOMETRY)}, views(), READINGS[:1])


def test_a_token_too_large_for_sixteen_bits_names_its_clip(tmp_path: Path) -> None:
    class Huge(Pixels):
        def latents(self, frames: Tensor) -> Tensor:
            return super().latents(frames) + 1e6

    FeatureStore(tmp_path).features({"m": Huge(GEOMETRY)}, views(), READINGS[:1])
    with pytest.raises(DataError, match="NaN or infinite values at clip 'clip0'"):
        FeatureStore(tmp_path).features({"m": Huge(GEOMETRY)}, views(), READINGS[1:])


def test_notes_say_what_it_took(tmp_path: Path) -> None:
    FeatureStore(tmp_path).features({"m": Pixels(GEOMETRY)}, views(), READINGS[:1])
    (file,) = tmp_path.glob("*.json")
    said = json.loads(file.read_text())
    assert said["clips"] == CLIPS and said["seconds"] > 0 and said["pixels"] == "p"
    note = note_of(file.with_suffix(".rows"))
    assert note is not None and note.shape[0] == CLIPS and not note.left_out


MEASURE = """
import resource, sys
from pathlib import Path
import numpy as np
from salt_vla.evaluation.feature_store import ClipViews, FeatureStore
from salt_vla.evaluation.features import Pixels, Reading
from salt_vla.geometry import ClipGeometry
geometry = ClipGeometry(num_frames=8, image_size=64, tubelet_size=2, patch_size=4)
class Films:
    def read_each(self, keys):
        return ((key, np.zeros((8, 64, 64, 3), np.uint8)) for key in keys)
clips = [str(number) for number in range(int(sys.argv[2]))]
store = FeatureStore(Path(sys.argv[1]), batch_size=8)
found = store.features({"m": Pixels(geometry)}, ClipViews(clips, Films(), "p"), [Reading("tokens")])
print(found[Reading("tokens")]["m"].nbytes, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
"""


def test_memory_does_not_grow_with_the_clips(tmp_path: Path) -> None:
    """All tokens of 640 clips are 126 MB on disk, those of 32 are 6 MB."""

    def measure(clips: int) -> tuple[int, int]:
        program = [sys.executable, "-c", MEASURE, str(tmp_path / str(clips)), str(clips)]
        size, peak = map(int, subprocess.run(program, capture_output=True, check=True).stdout.split())
        return size, peak

    few, many = measure(32), measure(640)
    assert many[0] - few[0] > 100e6
    assert many[1] - few[1] < 30e6

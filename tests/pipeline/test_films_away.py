"""Films that go away or are swapped under a build: nothing wrong is kept, and the same command goes on."""

from __future__ import annotations

import shutil
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import salt_vla.jobs.build_cache as job
from salt_vla.cache import Manifest
from salt_vla.data.clip_table import ClipTable
from salt_vla.jobs.unread_views import repair_cure

# Builds in shards of four records, and stops itself when it has made two.
STOPPING_BUILD = """
import os, signal, sys
import salt_vla.jobs.build_cache as job
from salt_vla.cache import CacheWriter
job.RECORDS_PER_SHARD = job.BATCH_SIZE = 4
write = CacheWriter.write_shard
def stopping(self, shard, records):
    is_ours = write(self, shard, records)
    if shard.number == 1:
        os.kill(os.getpid(), signal.SIGSTOP)
    return is_ours
CacheWriter.write_shard = stopping
from salt_vla.cli import main
if __name__ == "__main__":
    sys.exit(main())
"""


@pytest.fixture
def films(workshop: Any, tmp_path: Path) -> Path:
    """A copy of the data set that can be taken away."""
    return Path(shutil.copytree(workshop.dataset, tmp_path / "films"))


@pytest.fixture
def table(salt: Any, films: Path, tmp_path: Path) -> Path:
    path = tmp_path / "clips.parquet"
    salt.ok("data", "index", films, "--out", path, "--num-frames", 4, "--frame-stride", 2)
    return path


@pytest.fixture
def build(workshop: Any, table: Path, tmp_path: Path) -> Callable[..., list[object]]:
    def command(*more: object, out: Path = tmp_path / "c") -> list[object]:
        source = ("--teacher", workshop.teacher, "--data", table, "--split", "train", "--out", out)
        return ["cache", "build", *source, "--workers", 0, *more]

    return command


def videos(films: Path) -> list[Path]:
    return sorted(films.rglob("*.mp4"))


@pytest.mark.parametrize("what", ["away", "swapped"])
def test_films_that_change_while_a_build_goes_on_are_noticed_before_anything_of_them_is_kept(
    salt: Any, films: Path, build: Any, tmp_path: Path, tree: Any, monkeypatch: Any, what: str
) -> None:
    process = salt.start_python(STOPPING_BUILD, *build("data.store_views=false"))
    while Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()[0] != "T":
        assert process.poll() is None
    hidden = tmp_path / "hidden"
    if what == "away":
        films.rename(hidden)
    else:
        shutil.copytree(films, hidden)
        contents = [video.read_bytes() for video in videos(films)]
        for video, content in zip(videos(films), contents[1:] + contents[:1], strict=True):
            video.write_bytes(content)
    process.send_signal(signal.SIGCONT)
    said = process.communicate(timeout=60)[1]
    assert process.returncode == 2
    named = {"away": " is missing; ", "swapped": "is another one than when this build began"}
    assert named[what] in said and str(films) in said and "the same command" in said
    assert Manifest.read(tmp_path / "c").complete is False
    monkeypatch.setattr(job, "RECORDS_PER_SHARD", 4)
    monkeypatch.setattr(job, "BATCH_SIZE", 4)
    shutil.rmtree(films, ignore_errors=True)
    hidden.rename(films)
    salt.ok(*build("data.store_views=false"))
    salt.ok(*build("data.store_views=false", out=tmp_path / "whole"))
    assert tree(tmp_path / "c") == tree(tmp_path / "whole")


def lose(table: Path, rows: list[int], to: str = "videos/lost.mp4") -> None:
    """Point clips to a film that is not there."""
    found = pq.read_table(table)
    files = found["file"].to_pylist()
    for row in rows:
        files[row] = to
    pq.write_table(found.set_column(found.column_names.index("file"), "file", pa.array(files)), table)


@pytest.mark.parametrize("store", ["true", "false"])
def test_what_was_refused_for_too_many_bad_views_goes_on_once_they_are_back(
    salt: Any, films: Path, build: Any, tmp_path: Path, store: str
) -> None:
    """Half of the films, so that no shard is without any view."""
    film = videos(films)[0]
    hidden = film.rename(tmp_path / "hidden")
    film.write_bytes(b"no film")
    settings = f"data.store_views={store}"
    said = salt(*build(settings)).sentence
    assert "of 36 clip views could not be read so far, more than 5%" in said and str(film) in said
    assert not list(tmp_path.rglob("*.bin"))
    place = Path(said.partition(" remove ")[2].removesuffix(" and run again"))
    assert place == tmp_path / "c" or place.name.startswith("views-")
    hidden.replace(film)
    shutil.rmtree(tmp_path / "c")  # Begun with what then were the films.
    salt.ok(*build(settings))
    assert Manifest.read(tmp_path / "c").num_quarantined == 0


def test_a_cache_of_which_too_much_is_in_quarantine_is_not_called_complete(
    salt: Any, table: Path, build: Any, tmp_path: Path, monkeypatch: Any
) -> None:
    """As several builders leave it, of which each had few: the cure that is named is a repair."""
    lose(table, [3])
    with monkeypatch.context() as patched:
        patched.setattr(job.Approval, "shard", lambda *_: None)
        said = salt(*build("data.store_views=false")).sentence
    assert said.startswith("2 of 36 clip views could not be read, more than 5%") and "quarantine.json" in said
    assert said.endswith(repair_cure(tmp_path / "c"))
    assert Manifest.read(tmp_path / "c").complete is False
    assert (tmp_path / "c" / "quarantine.json").read_text().count("lost.mp4 is missing") == 2
    assert repair_cure(tmp_path / "c") in salt(*build("data.store_views=false")).sentence


def test_few_quarantined_views_are_counted_by_the_build_and_by_the_run(
    salt: Any, workshop: Any, films: Path, tmp_path: Path, student: Callable[..., list[object]]
) -> None:
    table = tmp_path / "many.parquet"
    index = ("data", "index", films, "--num-frames", 4, "--frame-stride", 2, "--hop", 4)
    salt.ok(*index, "--out", table)
    lose(table, [pq.read_table(table)["episode"].to_pylist().index(1)])  # Episode 0 is held out.
    build = ("cache", "build", "--teacher", workshop.teacher, "--data", table, "--out", tmp_path / "c")
    said = salt.ok(*build, "data.store_views=false").err
    num_clips = len(ClipTable.read(table).select(split="train"))
    assert f"2 of {2 * num_clips} clip views are not in it" in said and repair_cure(tmp_path / "c") in said
    learn = ("--data", table, "--cache", tmp_path / "c", "--max-steps", 1)
    salt.ok(*student("run", *learn, data__store_views="false"))
    log = salt.at("run").log_file.read_text()
    assert "; without 1 of " in log and "clips to learn from" in log


def test_a_split_is_one_plain_folder(salt: Any, table: Path, build: Any, tmp_path: Path) -> None:
    rows = pq.read_table(table)
    at = rows.column_names.index("split")
    for name in ("../../elsewhere", "/elsewhere", "..", ".leases", "", "a/b", "shards", "manifest.json"):
        pq.write_table(rows.set_column(at, "split", pa.array([name] * len(rows))), table)
        before = sorted(tmp_path.rglob("*"))
        assert "a split's name is that of a folder" in salt(*build("--split", name)).sentence
        assert sorted(tmp_path.rglob("*")) == before


def test_batches_that_memory_holds_are_found_beside_imported_latents(
    salt: Any, build: Any, tmp_path: Path
) -> None:
    """Which were computed in batches that nobody knows, and are refused as another cache's."""
    salt.ok(*build("data.store_views=false"))
    manifest = Manifest.read(tmp_path / "c")
    replace(manifest, provenance=manifest.provenance | {"batch_size": None}).write(tmp_path / "c")
    said = salt(*build("--memory-limit", "1GB")).sentence
    assert "holds a cache made from something else" in said and "batch_size" in said


def test_what_cannot_be_is_refused_before_anything_is_looked_for_or_written(
    salt: Any, table: Path, build: Any, tmp_path: Path
) -> None:
    assert "needs" in salt(*build("--num-views", 10**11)).sentence
    empty = tmp_path / "empty.parquet"
    pq.write_table(pq.read_table(table).slice(0, 0), empty)
    assert salt(*build("--data", empty)).sentence == (
        f"the clip table {empty} has no clips; index a data set that has some"
    )
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    assert "link that leads nowhere" in salt(*build(out=tmp_path / "link")).sentence
    assert "--shard is I/N" in salt(*build("--shard", "٣/8")).sentence
    assert not (tmp_path / "c").exists()

"""`cache build` as people meet it: stopped, gone on with elsewhere, damaged since; and `cache plan`."""

from __future__ import annotations

import json
import shutil
import signal
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from safetensors.numpy import load_file, save_file

import salt_vla.jobs.build_cache as job
from salt_vla.cache import Manifest, open_cache

# Builds in shards of four records, ten batches a second at the most: there is a middle to be stopped in.
SLOW_BUILD = """
import sys, time
import salt_vla.jobs.build_cache as job
job.RECORDS_PER_SHARD, job.BATCH_SIZE = 4, 2
latents_of = job.latents_of
def slow(teacher):
    compute = latents_of(teacher)
    def computing(frames):
        print("batch", flush=True)
        time.sleep(0.1)
        return compute(frames)
    return computing
job.latents_of = slow
from salt_vla.cli import main
if __name__ == "__main__":
    sys.exit(main())
"""


def build(workshop: Any, out: Path, *more: object) -> list[object]:
    source = ("--teacher", workshop.teacher, "--data", workshop.table, "--split", "train")
    return ["cache", "build", *source, "--out", out, *more]


@pytest.fixture
def copy(workshop: Any, tmp_path: Path) -> Path:
    """Of the finished cache of the training split."""
    return Path(
        shutil.copytree(workshop.cache, tmp_path / "copy", ignore=shutil.ignore_patterns("validation"))
    )


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_stops_it_between_two_batches_and_it_goes_on_from_there(
    workshop: Any, salt: Any, tmp_path: Path, tree: Any, monkeypatch: Any, number: signal.Signals
) -> None:
    process = salt.start_python(
        SLOW_BUILD, *build(workshop, tmp_path / "c", "data.store_views=false", "--workers", 1)
    )
    for _ in range(7):  # Of 18 batches: three shards are whole.
        assert process.stdout.readline() == "batch\n"
    children = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(number)
    said = process.communicate(timeout=60)[1]
    assert process.returncode == 128 + number
    assert said.splitlines()[-1] == (
        f"salt-vla: stopped by {number.name} while caching train latents; the same command goes on from there"
    )
    assert not psutil.wait_procs(children, timeout=10)[1]
    shards = {path.name: path.stat().st_ino for path in (tmp_path / "c" / "shards").iterdir()}
    assert 3 <= len(shards) <= 4 and set(shards) == {f"{number:06d}.bin" for number in range(len(shards))}
    monkeypatch.setattr(job, "RECORDS_PER_SHARD", 4)
    monkeypatch.setattr(job, "BATCH_SIZE", 2)
    for name in ("c", "whole"):
        salt.ok(*build(workshop, tmp_path / name))
    assert tree(tmp_path / "c") == tree(tmp_path / "whole")
    assert {name: (tmp_path / "c" / "shards" / name).stat().st_ino for name in shards} == shards


@pytest.mark.parametrize("workers", [0, 2])
def test_bytes_do_not_depend_on_who_decodes(
    workshop: Any, salt: Any, copy: Path, tmp_path: Path, tree: Any, workers: int
) -> None:
    said = salt.ok(*build(workshop, tmp_path / "c", "data.store_views=false", "--workers", workers)).err
    assert "Decoding views" not in said  # Into no store: the decoders are the pipeline's.
    assert tree(tmp_path / "c") == tree(copy)


@pytest.mark.parametrize(
    "what", ["shard", "end of a shard", "index", "page", "quarantine", "probe", "manifest"]
)
def test_what_a_finished_cache_has_lost_is_made_again(
    workshop: Any, salt: Any, copy: Path, tree: Any, what: str
) -> None:
    before = tree(copy)
    shard = copy / "shards" / "000000.bin"
    if what == "end of a shard":
        shard.write_bytes(shard.read_bytes()[:-1])
    elif what == "page":
        content = bytearray((copy / "index.arrow").read_bytes())
        content[len(content) // 2] ^= 1
        (copy / "index.arrow").write_bytes(content)
    else:
        names = {"shard": shard.relative_to(copy), "index": "index.arrow", "quarantine": "quarantine.json"}
        (
            copy / names.get(what, {"probe": "probe.safetensors", "manifest": "manifest.json"}.get(what))
        ).unlink()
    inode = shard.stat().st_ino if shard.exists() else None
    assert salt.ok(*build(workshop, copy)).out == f"{copy}: complete\n"
    assert tree(copy) == before
    assert "shard" in what or shard.stat().st_ino == inode


def test_numbers_of_another_kind_are_not_added_to_a_cache(workshop: Any, salt: Any, copy: Path) -> None:
    """As of a machine where the same weights compute something else."""
    (copy / "shards" / "000000.bin").unlink()
    Manifest.read(copy).without_results().write(copy)  # Only begun.
    probe = load_file(workshop.cache / "probe.safetensors")["latents"]
    save_file({"latents": probe * np.float32(1.03)}, copy / "probe.safetensors")
    said = salt(*build(workshop, copy)).sentence
    assert f"this machine's latents are not those of the cache {copy}" in said and "2.9% apart" in said
    assert not list((copy / "shards").iterdir())
    save_file({"latents": probe * np.float32(1.01)}, copy / "probe.safetensors")
    salt.ok(*build(workshop, copy))
    assert open_cache(copy).manifest.num_records == 36


def test_int8_is_measured_said_and_recorded(workshop: Any, salt: Any, tmp_path: Path) -> None:
    command = build(workshop, tmp_path / "c", "--encoding", "int8")
    said = salt.ok(*command).out
    measured = Manifest.read(tmp_path / "c").measured
    assert measured.keys() == {"cosine", "cosine_normalised", "worst_token_cosine", "r2_cost"}
    assert said.startswith(f"int8 against float16: mean token cosine {measured['cosine']:.6f}, ")
    assert salt.ok(*command).out == said  # As it is on record.
    assert Manifest.read(workshop.cache).measured == {}


def test_builders_are_numbered_from_nought(workshop: Any, salt: Any, tmp_path: Path) -> None:
    for text, said in (
        ("1", "--shard is I/N"),
        ("1/0", "--shard is I/N"),
        ("2/2", "--shard 2/2: builders are numbered 0/2 … 1/2"),
        ("-1/2", "--shard is I/N"),
    ):
        assert said in salt(*build(workshop, tmp_path / "c", f"--shard={text}")).sentence
    assert (
        "--workers must be 0 (none) or more, not -1"
        in salt(*build(workshop, tmp_path / "c", "--workers=-1")).sentence
    )
    assert not (tmp_path / "c").exists()


def plan(workshop: Any, out: Path, *more: object) -> list[object]:
    source = ("--teacher", workshop.teacher, "--data", workshop.table, "--split", "train")
    return ["cache", "plan", *source, "--out", out, "--seconds", 2, *more]


def test_the_plan_says_what_the_build_takes(workshop: Any, salt: Any, copy: Path, tmp_path: Path) -> None:
    planned = salt.json(*plan(workshop, tmp_path / "c"))
    size = planned["size"]
    shard = (copy / "shards" / "000000.bin").stat().st_size
    assert (size["clips"], size["views"], size["shards"]) == (18, 2, 1)
    assert size["bytes"] == 36 * size["record_bytes"] and size["record_bytes"] == 2 * 32 * 128
    everything = sum(path.stat().st_size for path in copy.rglob("*") if path.is_file())
    assert size["bytes"] < shard < everything <= size["bytes"] + size["other_bytes"]
    assert planned["fits"] and planned["done_bytes"] == 0
    sample = planned["sample"]
    assert sample["views"] == 36 and sample["views_per_second"] > 0
    assert planned["seconds"] == pytest.approx(36 / sample["views_per_second"])
    assert not (tmp_path / "c").exists() and not list(tmp_path.glob(".*"))


def test_a_plan_for_more_clips_like_these_is_in_proportion(workshop: Any, salt: Any, tmp_path: Path) -> None:
    planned = salt.json(*plan(workshop, tmp_path / "c", "--clips", 100_000, "--num-views", 1))
    assert planned["size"]["bytes"] == 100_000 * planned["size"]["record_bytes"]
    assert planned["seconds"] == pytest.approx(100_000 / planned["sample"]["views_per_second"])
    in_words = salt.ok(*plan(workshop, tmp_path / "c", "--clips", 100_000, "--num-views", 1)).out
    for word in ("100,000", "1,563", "819,200,000 bytes (0.82 GB)", "views/s", " h ", "decoder(s)"):
        assert word in in_words, word


def test_what_is_there_already_is_not_counted_again(workshop: Any, salt: Any, copy: Path) -> None:
    planned = salt.json(*plan(workshop, copy))
    assert planned["done_bytes"] >= planned["size"]["bytes"]
    assert planned["needed_bytes"] <= planned["size"]["other_bytes"]
    other = salt.json(*plan(workshop, copy, "--num-views", 1))
    assert other["done_bytes"] == 0  # Nothing of that cache is there.


def test_a_cache_that_cannot_fit_is_refused_with_the_arithmetic(
    workshop: Any, salt: Any, tmp_path: Path
) -> None:
    answer = salt(*plan(workshop, tmp_path / "c", "--clips", 10**12, "--json"))
    assert "the cache does not fit: 1,000,000,000,000 clips × 2 view(s) × 8,192 bytes" in answer.sentence
    planned = json.loads(answer.out)
    assert planned["fits"] is False and planned["sample"] is None  # Nobody waits for a sample of it.


def test_bytes_are_planned_without_a_teacher(salt: Any, tmp_path: Path) -> None:
    sizes = {}
    for encoding in ("float16", "int8"):
        figures = ("--tokens", 1568, "--dim", 768, "--clips", 1000, "--encoding", encoding)
        sizes[encoding] = salt.json("cache", "plan", "--out", tmp_path, *figures)["size"]["record_bytes"]
    assert sizes == {"float16": 2_408_448, "int8": 1_213_568}
    without = ("cache", "plan", "--out", tmp_path, "--clips")
    assert "give --teacher, or --tokens, --dim and --clips" in salt(*without, 5).sentence
    assert "--clips must be at least 1, not 0" in salt(*without, 0, "--teacher", "random:vit_micro").sentence
    assert "whose latents? give --teacher" in salt("cache", "build", "--out", tmp_path / "c").sentence
    huge = ("cache", "plan", "--out", tmp_path, "--tokens", 10**13, "--dim", 10**13, "--clips", 5)
    assert f"× {2 * 10**26:,} bytes" in salt(*huge).sentence  # No number wraps around.
    for flags, said in (
        (("--clips", "9" * 310), "--clips must be at most 1,000,000,000,000,000"),
        (("--num-views", 0), "--num-views must be at least 1, not 0"),
        (("--num-views", -3), "--num-views must be at least 1, not -3"),
    ):
        figures = {"--tokens": 8, "--dim": 8, "--clips": 8} | dict([flags])
        given = [word for pair in figures.items() for word in pair]
        assert said in salt("cache", "plan", "--out", tmp_path, *given).sentence


@pytest.mark.parametrize("seconds", ["nan", "inf", "-5", "0"])
def test_a_plan_measures_for_some_time(workshop: Any, salt: Any, tmp_path: Path, seconds: str) -> None:
    said = salt(*plan(workshop, tmp_path / "c", "--seconds", seconds)).sentence
    assert f"--seconds must be a positive number, not {float(seconds)}" in said


def test_what_a_killed_plan_has_left_goes_with_the_next(workshop: Any, salt: Any, tmp_path: Path) -> None:
    process = salt.start_python(SLOW_BUILD, *plan(workshop, tmp_path / "c", "--seconds", 600))
    assert process.stdout.readline() == "batch\n"
    process.send_signal(signal.SIGSTOP)
    salt.ok(*plan(workshop, tmp_path / "c"))
    (left,) = tmp_path.glob(".*")  # Of one that goes on.
    process.kill()
    process.communicate()
    other = tmp_path / f"{left.name}x"
    (other / "shards").mkdir(parents=True)  # Not known to be one of ours.
    salt.ok(*plan(workshop, tmp_path / "c"))
    assert list(tmp_path.glob(".*")) == [other]

"""`data index`, `check` and `mix` as real processes, on every layout and at the sizes that people meet."""

from __future__ import annotations

import json
import signal
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from salt_vla.batches import keys_of_step, parts_of
from salt_vla.config import ViewConfig
from salt_vla.data.clip_table import ClipTable
from salt_vla.data.segments import Cutting
from salt_vla.jobs.data_index import Weighted, read_cutting, write_index, write_mix

Write = Callable[..., Path]
SHORT = ("--num-frames", 4, "--frame-stride", 2)
SIZES: dict[str, dict[str, Any]] = {
    "ssv2": {
        "films": 8,
        "lists": {"train": range(1, 141), "validation": range(141, 171), "test": range(171, 201)},
    },
    "intphys2": {"scenes": 253},
}


@pytest.mark.parametrize(
    ("layout", "videos", "splits"),
    [
        ("ssv2", 200, {"train": 140, "validation": 30, "test": 30}),
        ("intphys2", 1014, {"Main": 1012, "HeldOut": 2}),
        ("folder", 5, {"train": 4, "validation": 1}),
        ("table", 3, {"train": 2, "validation": 1}),
        ("lerobot", 2, {"train": 2, "validation": 2}),
        ("lerobot-v2.1", 12, {"train": 8, "validation": 4}),
        ("sim", 2, {"train": 2, "validation": 2}),
    ],
)
def test_every_layout_is_indexed_and_checked(
    salt: Any, write_layout: Write, tmp_path: Path, layout: str, videos: int, splits: dict[str, int]
) -> None:
    dataset = write_layout(layout, tmp_path / "data", **SIZES.get(layout, {}))
    out = tmp_path / "clips.parquet"
    source = ("--source", "sim") if layout == "sim" else ()
    command = (
        "data",
        "index",
        dataset,
        "--out",
        out,
        *SHORT,
        "--clips-per-video",
        1,
        "--workers",
        2,
        *source,
    )
    answer = salt.run(*command, "--json")
    assert answer.code == 0, answer.err
    said = json.loads(answer.out)
    assert said["source"] == layout.removesuffix("-v2.1")
    assert said["videos"] == videos and said["problems"] == {} and said["unlisted_videos"] == 0
    assert {name: each["videos"] for name, each in said["splits"].items()} == splits
    assert json.loads(Path(said["problems_file"]).read_text()) == []
    table = ClipTable.read(out)
    assert len(table) == said["clips"] and read_cutting(out) == Cutting(read_cutting(out).view, 4, 16, 1)
    checked = salt.run("data", "check", out, "--workers", 2, "--json")
    assert checked.code == 0, checked.err
    figures = json.loads(checked.out)
    assert figures["clips"] == len(table) and figures["bad"] == [] and figures["clips_per_second"] > 0


def test_bad_videos_are_found_by_index_and_by_check(salt: Any, write_layout: Write, tmp_path: Path) -> None:
    """Those that cannot be opened by the one, those that break later by the other."""
    lists = {"train": range(1, 61), "validation": range(61, 64), "test": range(64, 65)}
    dataset = write_layout("ssv2", tmp_path / "data", lists=lists)
    out = tmp_path / "clips.parquet"
    videos = dataset / "20bn-something-something-v2"
    before = salt.json("data", "index", dataset, "--out", out, *SHORT)
    whole = ClipTable.read(out)
    (videos / "17.webm").write_bytes(b"")
    (videos / "18.webm").unlink()
    (videos / "19.webm").write_bytes(b"not a film" * 50)
    (videos / "999.webm").write_bytes((videos / "20.webm").read_bytes())
    answer = salt.ok("data", "index", dataset, "--out", out, *SHORT)
    problems = {each["key"]: each for each in json.loads(Path(before["problems_file"]).read_text())}
    assert sorted(problems) == ["ssv2/17", "ssv2/18", "ssv2/19"]
    assert problems["ssv2/17"]["file"] == "20bn-something-something-v2/17.webm"
    reasons = {each["reason"].split(":")[0] for each in problems.values()}
    assert len(reasons) == 3
    assert "1 videos are in no list" in answer.out and "missing" in answer.out
    gone = [clip for clip in whole.clip_ids if clip.split("/")[1] in ("17", "18", "19")]
    assert ClipTable.read(out).clip_ids == [clip for clip in whole.clip_ids if clip not in gone]
    film = (videos / "50.webm").read_bytes()
    (videos / "50.webm").write_bytes(film[: len(film) // 3])
    checked = salt("data", "check", out, "--out", tmp_path / "bad.json")
    assert checked.code == 1 and "ssv2/50/" in checked.out and "bad" in checked.out
    bad = json.loads((tmp_path / "bad.json").read_text())
    assert {each["clip_id"].rsplit("/", 1)[0] for each in bad} == {"ssv2/50"}
    assert all(each["file"].endswith("50.webm") and each["reason"] for each in bad)
    assert str(tmp_path) not in bad[0]["reason"]


def test_too_many_bad_videos_stop_with_exit_2_and_no_table(
    salt: Any, write_layout: Write, tmp_path: Path
) -> None:
    dataset = write_layout("ssv2", tmp_path / "data")
    (dataset / "20bn-something-something-v2" / "1.webm").unlink()
    out = tmp_path / "clips.parquet"
    said = salt.run("data", "index", dataset, "--out", out, *SHORT).sentence
    assert "1 of the 11 entries" in said and "more than 5%: 1 × missing; the first is ssv2/1" in said
    assert "--max-bad-share" in said and not out.exists()
    assert [each["key"] for each in json.loads((tmp_path / "clips.parquet.problems.json").read_text())] == [
        "ssv2/1"
    ]
    salt.ok("data", "index", dataset, "--out", out, *SHORT, "--max-bad-share", 0.1)
    assert len(ClipTable.read(out)) > 10
    assert "must lie in 0..1" in salt("data", "index", dataset, "--out", out, "--max-bad-share", 2).sentence


def test_an_interrupted_index_leaves_nothing_behind(salt: Any, write_layout: Write, tmp_path: Path) -> None:
    dataset = write_layout("intphys2", tmp_path / "data", scenes=253)
    root = tmp_path / "out"
    root.mkdir()
    process = salt.start("data", "index", dataset, "--out", root / "clips.parquet", "--workers", 1)
    time.sleep(1.0)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode in (130, -signal.SIGINT), (out, err)
    assert list(root.iterdir()) == []


@pytest.fixture(scope="module")
def mixture(tiny_dataset: Path, write_layout: Write, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two parts of robots, one part of a folder's films; the tables it is made of lie beside it."""
    root = tmp_path_factory.mktemp("mixture")
    write_layout("folder", root / "films")
    cutting = Cutting(ViewConfig(frame_stride=2), num_frames=4, hop=4)
    for name, dataset in (("robots", tiny_dataset), ("films", root / "films")):
        write_index(dataset, root / f"{name}.parquet", cutting)
    rows = write_mix(
        [Weighted(root / "robots.parquet", 2), Weighted(root / "films.parquet", 1)], root / "mix.parquet"
    )
    assert [row["share"] for row in rows] == ["66.7%", "33.3%"]
    return root / "mix.parquet"


def test_a_run_on_a_mixture_draws_each_data_set_in_its_share(salt: Any, mixture: Path) -> None:
    salt.ok(*salt.train("demo_teacher", "mixed", "--data", mixture, "--max-steps", 4))
    assert [row["step"] for row in salt.at("mixed").metrics("train")] == [1, 2, 3, 4]
    table = ClipTable.read(mixture).select(split="train")
    parts = parts_of(table, table.clip_ids)
    drawn = Counter(
        table.clip(clip_id).source
        for step in range(300)
        for clip_id, _ in keys_of_step(parts, num_views=2, batch_size=4, seed=0, step=step)
    )
    assert drawn["lerobot"] / drawn.total() == pytest.approx(2 / 3, abs=0.02)
    assert set(drawn) == {"lerobot", "folder"}


def test_the_command_mixes_what_the_library_mixes(salt: Any, mixture: Path, tmp_path: Path) -> None:
    tables = (mixture.parent / "robots.parquet", mixture.parent / "films.parquet")
    answer = salt.ok("data", "mix", *tables, "--weight", 2, 1, "--out", tmp_path / "mix.parquet")
    assert "66.7%" in answer.out and "folder" in answer.out
    assert (tmp_path / "mix.parquet").read_bytes() == mixture.read_bytes()


def test_a_mixture_keeps_each_clips_source_and_can_be_checked(salt: Any, mixture: Path) -> None:
    table = ClipTable.read(mixture)
    for clip in table.clips():
        assert (clip.dataset, clip.source) in (("tiny", "lerobot"), ("films", "folder"))
        assert table.video(clip).is_file()
    assert salt("data", "check", mixture).code == 0


def test_what_cannot_be_mixed_is_a_sentence(salt: Any, mixture: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.parquet"
    salt.ok("data", "index", mixture.parent / "films", "--out", other, "--num-frames", 4, "--frame-stride", 3)
    robots = mixture.parent / "robots.parquet"
    mix = ("data", "mix", robots, other)
    said = salt(*mix, "--out", tmp_path / "mix.parquet").sentence
    assert "were cut for different clips" in said and "stride 2" in said and "stride 3" in said
    said = salt(*mix, "--weight", 1, "--out", tmp_path / "mix.parquet").sentence
    assert said == "--weight gives 1 numbers for 2 tables; give one each"
    said = salt("data", "mix", robots, robots, "--out", tmp_path / "mix.parquet").sentence
    assert "hold the data set 'tiny'; index one under another --dataset name" in said
    assert not (tmp_path / "mix.parquet").exists()


def test_choices_that_exclude_each_other_are_refused(salt: Any, tmp_path: Path) -> None:
    index = ("data", "index", tmp_path, "--out", tmp_path / "x.parquet")
    for flags in (
        ("--fps", 5, "--uniform"),
        ("--fps", 5, "--frame-stride", 3),
        ("--uniform", "--frame-stride", 3),
        ("--hop", 3, "--clips-per-video", 2),
        ("--uniform", "--clips-per-video", 3),
        ("--uniform", "--hop", 3),
    ):
        said = salt(*index, *flags).sentence
        names = [flag for flag in flags if str(flag).startswith("--")]
        assert all(name in said for name in names) and "give one" in said
    assert "--frame-stride must be at least 1" in salt(*index, "--frame-stride", 0).sentence
    assert "--workers must be 0 (one a core) or more" in salt(*index, "--workers", -3).sentence
    for fps in ("nan", "1e300", "1e-300", "0", "-1"):
        assert salt(*index, "--fps", fps).sentence.startswith("--fps must lie in 0.001..1000, not ")
    assert "has no layout that is known here; say which with --source (" in salt(*index).sentence


def test_absurd_numbers_are_refused_at_once(salt: Any, tiny_dataset: Path, tmp_path: Path) -> None:
    index = ("data", "index", tiny_dataset, "--out", tmp_path / "x.parquet")
    assert "at most 4096, not 1000000000" in salt(*index, "--num-frames", 10**9).sentence
    assert "at most 10000, not 1000000000" in salt(*index, "--clips-per-video", 10**9).sentence
    assert "at most 1000000, not" in salt(*index, "--frame-stride", 10**21, "--short", "hold").sentence
    table = tmp_path / "small.parquet"
    salt.ok(*index[:3], "--out", table, *SHORT)
    for verb in (("check", table), ("show", table, "--out", tmp_path / "x.png")):
        assert "at most 4096, not 1000000000" in salt("data", *verb, "--num-frames", 10**9).sentence
    show = ("data", "show", table, "--out", tmp_path / "x.png")
    assert "at most 2048, not 100000" in salt(*show, "--image-size", 100_000).sentence
    assert salt("data", "index", "x" * 5000, "--out", "y").sentence.endswith(
        "File name too long; check the path"
    )


def test_no_command_writes_over_what_it_reads_or_what_is_not_its_own(
    salt: Any, mixture: Path, write_layout: Write, tmp_path: Path, tree: Callable[[Path], dict[str, bytes]]
) -> None:
    films = write_layout("table", tmp_path / "data")
    robots, other = mixture.parent / "robots.parquet", mixture.parent / "films.parquet"
    film = films.parent / ClipTable.read(other).clips()[0].file
    film.parent.mkdir(parents=True, exist_ok=True)
    film.write_bytes(b"a film of somebody's")
    before = tree(tmp_path), tree(mixture.parent)
    for command in (
        ("data", "index", films, "--out", films),
        ("data", "index", films, "--out", film),
        ("data", "index", films.parent, "--source", "folder", "--out", film),
        ("data", "check", robots, "--out", robots),
        ("data", "check", robots, "--out", film),
        ("data", "show", robots, "--out", robots),
        ("data", "show", films, "--out", films),
        ("data", "mix", robots, other, "--out", other),
        ("data", "mix", robots, other, "--out", films),
    ):
        said = salt(*command).sentence
        assert "is what the command reads" in said or "is there already and is not" in said
    for out in (tmp_path, ".", "/dev/full", "/dev/stdout"):
        for verb in (("index", films), ("check", robots), ("show", robots), ("mix", robots, other)):
            assert "cannot write" in salt("data", *verb, "--out", out).sentence
    assert (tree(tmp_path), tree(mixture.parent)) == before

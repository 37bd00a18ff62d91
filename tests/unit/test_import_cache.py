"""Matching others' names with a table's clips, and reading lists of clips."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest

from salt_vla.data.clip_table import Clip, ClipTable
from salt_vla.errors import ConfigError
from salt_vla.jobs.import_cache import names_of_maker, read_ids


def table(clip_ids: Sequence[str], files: Sequence[str]) -> ClipTable:
    clips = [
        Clip(clip_id, clip_id.split("/")[0], "ssv2", file, 0, 0, 0, 32, "", "", 12.0, False, "train")
        for clip_id, file in zip(clip_ids, files, strict=True)
    ]
    return ClipTable.from_clips(clips, Path("/data"))


@pytest.mark.parametrize(
    ("clip_ids", "files", "known"),
    [
        (("ssv2/78", "ssv2/4"), ("20bn/78.webm", "20bn/4.webm"), ("78", "4")),
        (("ssv2/78", "ssv2/4"), ("20bn/78.webm", "20bn/4.webm"), ("ssv2/78", "ssv2/4")),
        (("ssv2/78", "ssv2/4"), ("20bn/78.webm", "20bn/4.webm"), ("20bn/78", "20bn/4")),
        (("s/78/000016", "s/4/000032"), ("v/78.webm", "v/4.webm"), ("78", "4")),
        (
            ("s/0/front/000016", "s/0/front/000032"),
            ("v/0.mp4",) * 2,
            ("s_0_front_000016", "s_0_front_000032"),
        ),
        (("s/0/front/000016", "s/0/front/000032"), ("v/0.mp4",) * 2, ("0/front/000016", "0/front/000032")),
    ],
)
def test_a_clip_is_found_under_whatever_its_maker_called_it(
    clip_ids: Sequence[str], files: Sequence[str], known: Sequence[str]
) -> None:
    called = names_of_maker(table(clip_ids, files), {*known, "a stranger"})
    assert called == dict(zip(known, clip_ids, strict=True))


def test_a_name_that_several_clips_share_is_none() -> None:
    two_of_a_film = table(("s/7/000000", "s/7/000016"), ("v/7.webm", "v/7.webm"))
    assert names_of_maker(two_of_a_film, {"7"}) == {}


def test_one_way_of_naming_serves_for_all_clips() -> None:
    """Not each clip by whichever name is known: a folder has one maker."""
    mixed = table(("s/7", "s/8", "s/9"), ("v/9.webm", "v/7.webm", "v/8.webm"))
    assert names_of_maker(mixed, {"7", "8", "9", "s/7"}) == {"7": "s/7", "8": "s/8", "9": "s/9"}


@pytest.mark.parametrize(
    "text",
    ["7\n 12\n\n", json.dumps(["7", 12]), json.dumps([{"clip_id": "7", "reason": "x"}, {"video_id": 12}])],
)
def test_clips_are_listed_by_lines_or_json(tmp_path: Path, text: str) -> None:
    (tmp_path / "ids").write_text(text)
    assert read_ids(tmp_path / "ids") == ["7", "12"]


@pytest.mark.parametrize("text", ["[1, 2", json.dumps([{"reason": "x"}])])
def test_a_list_of_nothing_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "ids").write_text(text)
    with pytest.raises(ConfigError, match="names no clips"):
        read_ids(tmp_path / "ids")
    with pytest.raises(ConfigError, match="No such file"):
        read_ids(tmp_path / "none")

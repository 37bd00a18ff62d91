"""Clips that come out of quarantine, or go into it, between two starts of a run: never another curve."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from salt_vla.cache import open_cache
from salt_vla.cache.mend import reindex, rewrite_shard
from salt_vla.cache.shards import read_footer

Command = Callable[..., list[object]]
CLIP = 5
SETTINGS = {"steps": 10, "runtime__checkpoint_every": 100, "runtime__validate_every": 100}


def quarantine(cache: Path, clip_id: str) -> None:
    """Take a clip's records out of a sound cache, as a build leaves it that could not read the film."""
    opened = open_cache(cache)
    for path in sorted(cache.glob("shards/*.bin")):
        footer = read_footer(path)
        checksums, reasons = list(footer.checksums), list(footer.reasons)
        for slot, key in enumerate(footer.keys):
            if key[0] == clip_id:
                checksums[slot], reasons[slot] = None, "the film is away"
        footer = replace(footer, checksums=tuple(checksums), reasons=tuple(reasons))
        rewrite_shard(path, footer, {}, frozenset(), opened.encoding, lambda: None)
    reindex(cache, opened.manifest, opened.index.ids, lambda _: None)


@pytest.fixture
def place_cache(workshop: Any, tmp_path: Path) -> Callable[[str], Path]:
    """`place_cache("whole")` or `("poor")` puts that cache, the latter without one training clip, at one and
    the same place."""
    poor, place = tmp_path / "poor", tmp_path / "c"
    shutil.copytree(workshop.cache, poor)
    quarantine(poor, open_cache(poor).index.ids[CLIP].as_py())

    def put(which: str) -> Path:
        shutil.rmtree(place, ignore_errors=True)
        return Path(shutil.copytree(poor if which == "poor" else workshop.cache, place))

    return put


def test_a_clip_that_comes_out_of_quarantine_does_not_change_a_run_that_goes_on(
    salt: Any, student: Command, place_cache: Any, curve: Any, weights: Any
) -> None:
    cache = ("--cache", place_cache("poor"))
    salt.ok(*student("uninterrupted", *cache, **SETTINGS))
    salt.ok(*student("parts", *cache, "--max-steps", 4, **SETTINGS))
    place_cache("whole")
    salt.ok(*student("parts", *cache, **SETTINGS))
    salt.ok(*student("later", *cache, **SETTINGS))
    runs = {name: salt.at(name) for name in ("uninterrupted", "parts", "later")}
    last = {name: curve(run)[-2:] for name, run in runs.items()}
    assert last["parts"] == last["uninterrupted"] != last["later"]
    assert weights(runs["parts"]) == weights(runs["uninterrupted"])
    assert [line for line in runs["parts"].log_file.read_text().splitlines() if "without 1 of " in line][1:]
    assert "without" not in runs["later"].log_file.read_text()


def test_a_run_whose_clips_went_into_quarantine_is_refused_by_name(
    salt: Any, student: Command, place_cache: Any, tree: Any
) -> None:
    cache = place_cache("whole")
    salt.ok(*student("run", "--cache", cache, "--max-steps", 4, **SETTINGS))
    checkpoints = tree(salt.at("run").checkpoints)
    place_cache("poor")
    said = salt(*student("run", "--cache", cache, **SETTINGS)).sentence
    clip_id = open_cache(cache).index.ids[CLIP].as_py()
    assert f"began with 1 more clip(s) than can be read now, the first: {clip_id!r}" in said
    assert "--name" in said and "cache repair --quarantined" in said
    assert tree(salt.at("run").checkpoints) == checkpoints


@pytest.mark.parametrize("content", ["[]", '{"hash": "clip"}', "{"])
def test_a_damaged_record_of_them_is_a_sentence(salt: Any, student: Command, content: str) -> None:
    salt.ok(*student("run", "--max-steps", 2))
    file = salt.at("run").path / "left_out_provenance.json"
    assert list(json.loads(file.read_text()).values()) == [[], []]
    file.write_text(content)
    assert f"{file} is damaged" in salt(*student("run", "--max-steps", 4)).sentence

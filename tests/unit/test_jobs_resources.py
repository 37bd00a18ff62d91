"""What cannot end well for lack of disk or memory is refused at the start, with the sum and the cure."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from salt_vla.errors import ConfigError, ResourceError
from salt_vla.jobs.resources import existing_parent, parse_bytes, require_disk, require_memory
from salt_vla.models import build_encoder, build_predictor
from salt_vla.recipes import all_recipes, get_recipe

CONFIG = get_recipe("demo_teacher").config


def test_what_fits_is_let_through(tmp_path: Path) -> None:
    require_disk(tmp_path / "not" / "there" / "yet", 1000, "a cache")
    require_memory(CONFIG)


def test_disk_is_asked_where_the_folder_will_lie(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert existing_parent(tmp_path / "a" / "b") == tmp_path
    assert existing_parent(tmp_path / "file" / "b") == tmp_path / "file"
    assert existing_parent(Path("/")) == Path("/")


def test_too_little_disk_shows_the_sum(tmp_path: Path) -> None:
    needed = shutil.disk_usage(tmp_path).free * 2 + 10**12
    said = rf"the latent cache needs {needed / 1e9:.2f} GB at {tmp_path}/x, where .* GB are free; make space"
    with pytest.raises(ResourceError, match=said):
        require_disk(tmp_path / "x", needed, "the latent cache")


def test_too_large_a_batch_is_refused_and_micro_batches_help() -> None:
    tokens = CONFIG.geometry.num_tokens
    per_clip = tokens * CONFIG.predictor.dim * CONFIG.predictor.depth * 40
    clips = psutil.virtual_memory().total // per_clip + 1
    large = replace(CONFIG, batch_size=clips)
    with pytest.raises(ResourceError, match=f"a batch of {clips} clips .*lower batch_size, raise grad_accum"):
        require_memory(large)
    frames_fit = clips * CONFIG.geometry.clip_bytes * 5 < psutil.virtual_memory().available / 2
    if frames_fit:
        require_memory(replace(large, grad_accum_steps=clips))


def test_weights_count_even_where_the_batch_is_small() -> None:
    encoder = replace(CONFIG.encoder, name="vit_gigantic", depth=100_000)
    with pytest.raises(ResourceError, match=r"weights and optimizer need about .*choose a smaller encoder"):
        require_memory(replace(CONFIG, encoder=encoder, batch_size=1))


@pytest.mark.parametrize("name", ["demo_teacher", "demo_student"])
def test_the_estimate_of_weights_is_near_the_count(name: str) -> None:
    """The sentence's figure, divided by the bytes of a weight, against networks that are really built."""
    config = all_recipes()[name].config
    encoder = build_encoder(config.encoder)
    predictor = build_predictor(config.predictor, encoder.dim, encoder.dim, config.geometry)
    counted = sum(p.numel() for network in (encoder, predictor) for p in network.parameters())
    huge = replace(config, batch_size=10**9)
    with pytest.raises(ResourceError, match="weights and optimizer need about") as refusal:
        require_memory(huge)
    said = float(str(refusal.value).split("about ")[1].split(" GB")[0])
    assert abs(said - counted * 28 / 1e9) < 0.1


def test_workers_need_room_in_shared_memory() -> None:
    workers = shutil.disk_usage("/dev/shm").free // (2 * CONFIG.batch_size * CONFIG.geometry.clip_bytes) + 1
    with pytest.raises(ResourceError, match=r"of /dev/shm, .*; lower data.num_workers or batch_size"):
        require_memory(replace(CONFIG, data=replace(CONFIG.data, num_workers=workers)))


def test_an_encoder_that_does_not_exist_is_said_here_already() -> None:
    with pytest.raises(ConfigError, match=r"encoder.name 'vit_enormous' is unknown"):
        require_memory(replace(CONFIG, encoder=replace(CONFIG.encoder, name="vit_enormous")))


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("25GB", 25_000_000_000),
        ("1.5 GiB", 1_610_612_736),
        ("500mb", 500_000_000),
        ("16k", 16_000),
        ("4096", 4096),
        ("4096B", 4096),
    ],
)
def test_amounts_of_memory_are_read_as_people_write_them(text: str, size: int) -> None:
    assert parse_bytes(text) == size


@pytest.mark.parametrize("text", ["", "much", "-3GB", "0GB", "25 GB free", "1e9", "9" * 40])
def test_what_is_no_amount_of_memory_is_a_sentence(text: str) -> None:
    with pytest.raises(ConfigError, match="is no amount of memory; write it as 25GB, 500MB or 16GiB"):
        parse_bytes(text)

"""What cannot end well for lack of disk or memory is refused at the start, with the sum and the cure."""

from __future__ import annotations

import re
import shutil
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from salt_vla.cache import open_cache
from salt_vla.config import TargetConfig, parse_bytes
from salt_vla.errors import ConfigError, ResourceError
from salt_vla.jobs.resources import (
    TargetSize,
    existing_parent,
    find_batch,
    memory_of,
    require_disk,
    require_memory,
    target_size,
)
from salt_vla.recipes import get_recipe

CONFIG = get_recipe("demo_teacher").config
CONFIG = replace(CONFIG, runtime=replace(CONFIG.runtime, device="cpu", precision="float32"))
needs_shared_memory = pytest.mark.skipif(not Path("/dev/shm").is_dir(), reason="no /dev/shm here")


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
    total = psutil.virtual_memory().total
    clips = 1 << (total // memory_of(CONFIG).of_clip).bit_length()
    large = replace(CONFIG, batch_size=clips)
    said = (
        rf"a step of {clips} clips, {clips} at once, needs about process .* = [\d.]+ GB, and .* of RAM "
        r"are available: lower batch_size, raise grad_accum_steps \(a clip less at once saves .*--find-batch"
    )
    with pytest.raises(ResourceError, match=said):
        require_memory(large)
    if clips * CONFIG.geometry.clip_bytes < psutil.virtual_memory().available / 2:
        require_memory(replace(large, grad_accum_steps=clips))


def test_the_sum_in_the_sentence_is_the_sum_of_its_parts() -> None:
    text = str(memory_of(CONFIG))
    *parts, total = re.findall(r"\d+\.\d+", text)
    assert sum(map(float, parts)) == pytest.approx(float(total), abs=0.005 * (len(parts) + 1)), text


def test_weights_count_even_where_the_batch_is_small() -> None:
    encoder = replace(CONFIG.encoder, name="vit_gigantic", depth=100_000)
    with pytest.raises(ResourceError, match=r"weights \d{5}\.\d\d .*choose a smaller encoder"):
        require_memory(replace(CONFIG, encoder=encoder, batch_size=1))


@pytest.mark.parametrize("limit", ["500MB", "0.4GB"])
def test_a_limit_of_memory_is_kept(limit: str) -> None:
    said = rf"needs about .* GB, and runtime.memory_limit allows {limit}: lower batch_size"
    with pytest.raises(ResourceError, match=said):
        require_memory(replace(CONFIG, runtime=replace(CONFIG.runtime, memory_limit=limit)))
    with pytest.raises(ConfigError, match="'much' is no amount of memory"):
        replace(CONFIG.runtime, memory_limit="much")


@needs_shared_memory
def test_loader_processes_need_room_in_shared_memory() -> None:
    """Frames and records of every slot, for the workers and the prefetching that the settings ask for."""
    student = get_recipe("salt_vitb").config
    data = replace(student.data, num_workers=4000, prefetch=3)
    config = replace(student, data=data, batch_size=8, grad_accum_steps=1)
    each = 8 * (config.geometry.clip_bytes + 2 * 1568 * 768)
    said = (
        rf"4000 loader processes × 5 batches × \(19 MB of frames \+ 19 MB of records\) need "
        rf"{4000 * 5 * each / 1e9:.2f} GB of /dev/shm, where .* GB are free; lower data.num_workers"
    )
    with pytest.raises(ResourceError, match=said):
        require_memory(config)


def test_what_targets_look_like_is_known_before_anything_is_opened(
    tmp_path: Path, build_cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SALT_VLA_ROOT", str(tmp_path))
    build_cache(tmp_path / "c" / "train", clips=2, views=1, shape=(144, 40), per_shard=2)
    record = open_cache(tmp_path / "c" / "train").encoding.record_bytes
    cached = replace(CONFIG, target=TargetConfig("cache", "c"))
    assert target_size(cached) == TargetSize(40, record)
    assert target_size(replace(CONFIG, target=TargetConfig("cache", "nowhere"))).dim == 768
    assert target_size(replace(CONFIG, target=TargetConfig("pixels"))) == TargetSize(2 * 3 * 16 * 16)
    assert target_size(replace(CONFIG, target=TargetConfig("ema"))) == TargetSize(128)


def test_the_largest_batch_is_the_largest() -> None:
    for gpus in (1, 4):
        found = find_batch(CONFIG, 4 * 10**9, gpus)
        assert found.batch_size % gpus == 0 and found.memory.total <= 4 * 10**9
        more = replace(CONFIG, batch_size=found.batch_size + gpus, grad_accum_steps=1)
        assert memory_of(more, gpus).total > 4 * 10**9


@pytest.mark.parametrize("own", [1, 16, 64])
def test_what_is_found_is_what_the_run_then_adds_up(own: int) -> None:
    """Contexts of few clips are longer: whatever the recipe's batch is, those of the found one count."""
    config = replace(get_recipe("salt_vitb").config, batch_size=own, grad_accum_steps=1)
    config = replace(config, runtime=CONFIG.runtime)
    found = find_batch(config, 8 * 10**9)
    begun = memory_of(replace(config, batch_size=found.batch_size))
    assert found.memory == begun and found.batch_size > 1
    assert found.batch_size == find_batch(replace(config, batch_size=8), 8 * 10**9).batch_size


def test_a_batch_of_no_device_is_refused() -> None:
    with pytest.raises(ConfigError, match="--gpus must be at least 1, not 0"):
        find_batch(CONFIG, 10**9, 0)


def test_the_fewest_pieces_are_the_fewest() -> None:
    config = replace(CONFIG, batch_size=96)
    limit = memory_of(replace(config, grad_accum_steps=12)).total
    found = find_batch(config, limit)
    assert 1 < found.accumulation <= 12 and found.with_accumulation.total <= limit
    fewer = [n for n in range(1, found.accumulation) if 96 % n == 0]
    assert all(memory_of(replace(config, grad_accum_steps=n)).total > 0.98 * limit for n in fewer)
    nothing = find_batch(config, 10**6)
    assert (nothing.batch_size, nothing.accumulation) == (0, 0)


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

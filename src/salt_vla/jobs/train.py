"""`train`: from a configuration and a name to a run, wiring clips, targets and masks into the loop."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import compress
from pathlib import Path
from typing import Any

from salt_vla.batches import Batches, parts_of
from salt_vla.cache import ArrayCache, open_cache
from salt_vla.config import Recipe, TrainConfig
from salt_vla.data.clip_table import ClipTable
from salt_vla.errors import CacheError, ConfigError
from salt_vla.jobs.build_cache import find_split
from salt_vla.jobs.cache_fit import require_as_before, require_fit, require_same_teacher
from salt_vla.jobs.data import Splits, open_table, open_views, split_table, training_clips
from salt_vla.jobs.data_index import EMBEDDED
from salt_vla.jobs.left_out import pin_left_out, usable_as_before
from salt_vla.jobs.probe_truths import online_probe
from salt_vla.jobs.resources import require_memory
from salt_vla.jobs.start import note_cost, note_masks
from salt_vla.masks import build_masks
from salt_vla.models.inflate import provenance_of_start, starting_weights
from salt_vla.objectives import check_objective
from salt_vla.rundir import RunDirectory, Status, read_json, root, write_text
from salt_vla.targets import CachedTargets, EmaTargets, PixelTargets, TargetProvider, TeacherTargets
from salt_vla.teachers import load_teacher, source_of
from salt_vla.training.distributed import World, joined
from salt_vla.training.loop import fit
from salt_vla.training.online_probe import OnlineProbe
from salt_vla.training.resume import settle, start_of
from salt_vla.verdicts import conclude, note_recipe


@dataclass(frozen=True)
class Targets:
    """A provider, and the caches it reads for training and held-out clips (None where it reads none)."""

    provider: TargetProvider
    train: ArrayCache | None = None
    validation: ArrayCache | None = None


def train(
    config: TrainConfig,
    name: str,
    max_steps: int | None = None,
    allowed: Sequence[str] = (),
    recipe: Recipe | None = None,
) -> Status:
    """Run (or resume) the run `name`; all that is wrong with its inputs is said before it begins. `allowed`:
    fields or sections that a resume may set otherwise than the run's record. `recipe`: the experiment that it
    is, on whose hypothesis it records a verdict when it has finished."""
    run = RunDirectory.named(name)
    with joined() as world:
        with world.first_alone():
            plan = _open(config, run, allowed, world)
            if world.is_first and recipe is not None:
                run.require_idle()  # Checking took a while, and this file is written anew.
                note_recipe(run, recipe, plan.config)
        status = fit(
            *(run, plan.config, plan.learned, plan.held_out, plan.provider),
            stop_at=max_steps,
            note=plan.note,
            world=world,
            allowed=allowed,
            probe=plan.probe,
        )
        if world.is_first:
            conclude(run)
    return status


@dataclass(frozen=True)
class _Plan:
    """What `fit` is given."""

    config: TrainConfig
    learned: Batches
    held_out: Batches
    provider: TargetProvider
    note: str
    probe: OnlineProbe | None


def _open(config: TrainConfig, run: RunDirectory, allowed: Sequence[str], world: World) -> _Plan:
    """Everything that a run needs, checked; noted in its directory, if it is not yet."""
    if world.is_first:
        run.require_idle()
    config = settle(run, config, allowed)
    world.require_even(config.batch_size, config.grad_accum_steps)
    device = config.runtime.device
    check_objective(config.objective, config.batch_size // config.grad_accum_steps // world.size)
    require_memory(config)
    start = start_of(run, config)
    begins = "" if start is None else f"; {starting_weights(start, config.encoder).note}"
    table = open_table(config.data.table, config.data.view, config.geometry)
    targets, splits = open_targets(config, table, device)
    views = config.data.view.num_views
    part = (world.rank, world.size)
    learned = _batches(run, config, splits.train, targets.train, views, config.seed, part)
    held_out = _batches(run, config, splits.validation, targets.validation, num_views=1, seed=0)
    weights = {"weights": table.weights} if table.weights else {}
    pin(run, "clip table", {"clip_table": table.hash, "files": table.files_hash} | weights)
    if targets.train is not None:
        pin(run, "cache", targets.train.manifest.provenance | {"encoding": targets.train.encoding.name})
    if isinstance(targets.provider, TeacherTargets):
        pin(run, "teacher", {"fingerprint": targets.provider.teacher.fingerprint})
    if start is not None:
        pin(run, "start", provenance_of_start(start))
    lacking = pin_left_out(run, splits.train, learned.clip_ids)
    pin_left_out(run, splits.validation, held_out.clip_ids)
    note_masks(run, config)
    note_cost(run, config, targets.provider.dim, len(learned.clip_ids))
    several = f"; one of {world.size} processes ({config.runtime.parallel})" if world.size > 1 else ""
    without = f"; without {lacking} of {len(splits.train)} clips to learn from" if lacking else ""
    offer = online_probe(config, splits.train, splits.validation, targets.provider.dim)
    about = f"; {offer.note}" if offer.note else ""
    note = f"held-out clips: {splits.note}{without}{begins}{several}{about}"
    return _Plan(config, learned, held_out, targets.provider, note, offer.probe)


def open_targets(config: TrainConfig, table: ClipTable, device: str) -> tuple[Targets, Splits]:
    """The provider that the configuration names, and which clips are learned from and held out."""
    target = config.target
    if target.provider == "pixels":
        return Targets(PixelTargets(config.geometry)), split_table(table)
    if target.provider == "ema":
        provider = EmaTargets(config.encoder, target.momentum, config.steps, device)
        return Targets(provider), split_table(table)
    if not target.source:
        raise ConfigError(
            f"target.provider {target.provider!r} needs a source: give --cache FOLDER or target.source=NAME"
        )
    if target.provider == "teacher":
        teacher = load_teacher(source_of(target.source), config.geometry, device)
        return Targets(TeacherTargets(teacher)), split_table(table)
    return _cached_targets(config, table, root() / target.source)


def _cached_targets(config: TrainConfig, table: ClipTable, path: Path) -> tuple[Targets, Splits]:
    train_folder = find_split(path, "train")
    if train_folder is None:
        raise CacheError(
            f"there is no cache of training latents at {path}; build it with "
            f"`salt-vla cache build --split train --teacher … --data … --out {path}` or run `salt-vla demo`"
        )
    train_cache = open_cache(train_folder)
    validation_folder = find_split(path, "validation")
    splits = split_table(table, may_use_validation=validation_folder is not None)
    views = config.data.view.num_views
    # Built from all training clips, or from those that are left when every tenth episode is held out.
    learned = splits.train
    if train_cache.manifest.provenance.get("clip_table") != learned.hash:
        learned = training_clips(table)
    require_fit(train_cache, learned, config.data.view, config.geometry, views)
    validation_cache = train_cache
    if validation_folder is not None:
        validation_cache = open_cache(validation_folder)
        require_fit(validation_cache, splits.validation, config.data.view, config.geometry, 1)
        require_same_teacher(train_cache, validation_cache)
    return Targets(CachedTargets(train_cache.encoding), train_cache, validation_cache), splits


def pin(run: RunDirectory, what: str, mine: dict[str, Any]) -> None:
    """Write down which clips or cache the run learns from, or refuse others at a resume."""
    file = run.path / f"{what.replace(chr(32), chr(95))}_provenance.json"
    if not file.exists():
        write_text(file, json.dumps(mine, indent=2, sort_keys=True))
        return
    require_as_before(what, run.name, mine, read_json(file, dict), file)


def _batches(
    run: RunDirectory,
    config: TrainConfig,
    clips: ClipTable,
    cache: ArrayCache | None,
    num_views: int,
    seed: int,
    part: tuple[int, int] = (0, 1),
) -> Batches:
    masks = build_masks(config.masks, config.geometry)
    masks.sample(1)  # Masks that leave nothing to see are said so before the run begins.
    views, readable = open_views(clips, config.data, config.geometry, num_views)
    if cache is not None:
        # A clip that the cache has quarantined is left out here too; ids of the others never shift.
        readable = list(compress(readable, cache.with_views(readable, num_views)))
    return Batches(
        parts_of(clips, usable_as_before(run, clips, readable)),
        views,
        masks,
        batch_size=config.batch_size,
        num_views=num_views,
        seed=seed,
        steps=config.steps,
        cache=cache,
        on_corrupt_record=config.data.on_corrupt_record,
        part=part,
        jitter=bool(config.data.photometric),
    )


def with_paths(config: TrainConfig, data: str | None, cache: str | None) -> TrainConfig:
    """The configuration with --data and --cache filled in; None leaves the recipe's own.

    Raises `ConfigError` for an empty one, which would be the current folder with all that lies below it."""
    for option, given in (("--data", data), ("--cache", cache)):
        if given is not None and not given.strip():
            raise ConfigError(f"{option} is empty, as of a variable that is not set; give it or leave it out")
    if data is not None:
        table = data if data == EMBEDDED else str(Path(data).resolve())
        config = replace(config, data=replace(config.data, table=table))
    if cache is not None:
        path = Path(cache).resolve()
        # Below the root it is written relative to it, so that runs and caches can be moved together.
        source = path.relative_to(root()) if path.is_relative_to(root()) else path
        config = replace(config, target=replace(config.target, source=str(source)))
    return config

"""`salt-vla cache …` beyond building: looking, checking, comparing and clearing up."""

from __future__ import annotations

import sys
from json import loads
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from salt_vla.cli.printing import print_json, print_table
from salt_vla.errors import CacheError, ConfigError

if TYPE_CHECKING:
    from salt_vla.jobs.cache_prune import FoundCache

GB = 1e9


def show(
    path: Annotated[Path, tyro.conf.Positional],
    statistics: bool = False,
    sample: int = 64,
    picture: Path | None = None,
    data: str | None = None,
    json: bool = False,
) -> None:
    """A cache's manifest; what its latents are like; a picture of them.

    Example: salt-vla cache show caches/demo --statistics --picture latents.png --data metaworld-mini

    Args:
        path: the cache's folder.
        statistics: of some records: size, outlier channels, effective rank, and the error of predicting the
            mean.
        sample: records that statistics are taken of, spread over the cache.
        picture: a PNG to write: principal components of a few clips' tokens as colours.
        data: the clip table that the cache was built from: shows the films beside their tokens.
        json: print JSON instead of tables.
    """
    from salt_vla.cache import Manifest, open_cache

    if data is not None and picture is None:
        raise ConfigError("--data is for the picture; give --picture FILE.png too")
    if sample < 1:
        raise ConfigError(f"--sample must be at least 1, not {sample}")
    said: dict[str, Any] = loads(Manifest.read(path).to_text())
    if picture is not None:
        from salt_vla.jobs.outputs import PICTURE, require_output

        require_output(picture, PICTURE)
        if picture.suffix.lower() != ".png":
            raise ConfigError(f"--picture writes a PNG, and {picture} is named otherwise; end it in .png")
    if statistics:
        from salt_vla.jobs.cache_show import sample_statistics

        said["statistics"] = sample_statistics(open_cache(path), sample).to_json()
    if picture is not None:
        from salt_vla.jobs.cache_show import draw
        from salt_vla.rundir import write_bytes

        png = draw(open_cache(path), data)
        write_bytes(picture, png)
    if json:
        print_json(said)
    else:
        _print_fields(said)


def _print_fields(said: dict[str, Any]) -> None:
    from salt_vla.cli.cache_import import STATEMENT, print_statement
    from salt_vla.jobs.cache_diff import flat

    provenance = said["provenance"]
    said = said | {"provenance": {name: provenance[name] for name in provenance if name not in STATEMENT}}
    rows = [{"field": key, "value": _shown(value)} for key, value in flat(said).items()]
    print_table(rows, ["field", "value"])
    if "unknown" in provenance:
        print_statement(provenance)


def _shown(value: Any) -> Any:
    if value is None:
        return "unknown"
    return f"{value:.4g}" if isinstance(value, float) else value


def verify(
    path: Annotated[Path, tyro.conf.Positional],
    sample: float | None = None,
    seed: int = 0,
    json: bool = False,
) -> int:
    """Check every byte of a cache against what was written; exit code 1 when something is damaged.

    Example: salt-vla cache verify caches/demo
    Example: salt-vla cache verify caches/ssv2 --sample 0.05 --seed 12

    Args:
        path: the cache's folder.
        sample: look at a share of the records only (as 0.05), or at so many; all else is checked anyway.
        seed: which ones.
        json: print JSON instead of a table.
    """
    from salt_vla.jobs.cache_verify import verify_cache

    report = verify_cache(path, sample, seed)
    if json:
        print_json(report.to_json())
    else:
        if report.bad:
            print_table(report.to_json()["bad"], ["clip_id", "view", "file", "offset", "reason"])
        print(report.summary)
    if report.unfinished:
        print(f"salt-vla: {report.unfinished}; run its `cache build` again to complete it", file=sys.stderr)
    elif not report.records and not report.bad:
        raise CacheError(f"{path} holds no records")
    return 1 if report.bad else 0


def repair(
    path: Annotated[Path, tyro.conf.Positional],
    teacher: str | None = None,
    data: str | None = None,
    quarantined: bool = False,
    device: str = "auto",
    json: bool = False,
) -> int:
    """Mend what `cache verify` finds, and only that; exit code 1 when something is left.

    Index, manifest and footers are written anew from one another. Records are computed again by the teacher,
    from the same clips; one that comes out in other bytes is taken only if the teacher's numbers on the
    cache's probe clip agree. Killed, the same command goes on.

    Example: salt-vla cache repair caches/demo --teacher demo_teacher --data metaworld-mini

    Args:
        path: the cache's folder.
        teacher: the one that the cache was built with (a run's name, a directory, a published name).
        data: the clip table or data set that it was built from.
        quarantined: try the clips in quarantine once more, too.
        device: where the teacher runs; `auto` is CUDA where there is one.
        json: print JSON instead of sentences.
    """
    from salt_vla.jobs.cache_repair import repair_cache
    from salt_vla.jobs.cache_source import source_of

    if (teacher is None) != (data is None):
        raise ConfigError("records are computed from both: give --teacher and --data, or neither")
    source = source_of(teacher, data, device) if teacher is not None and data is not None else None
    report = repair_cache(path, source, quarantined)
    if json:
        print_json(report.to_json())
    else:
        rows = report.to_json()
        if rows["failed"]:
            print_table(rows["failed"], ["clip_id", "view", "reason"])
        if rows["left"]:
            print_table(rows["left"], ["clip_id", "view", "file", "offset", "reason"])
        print(report.summary)
    return 1 if report.left else 0


def diff(
    path: Annotated[Path, tyro.conf.Positional],
    other: Annotated[tuple[str, ...], tyro.conf.Positional] = (),
    *,
    recipe: str | None = None,
    data: str | None = None,
    json: bool = False,
) -> int:
    """Two caches, or a cache and what a recipe asks for, field by field; exit code 1 when they differ.

    Example: salt-vla cache diff caches/a caches/b
    Example: salt-vla cache diff caches/a --recipe salt_vitb --data ssv2.parquet data.view.frame_stride=2

    Args:
        path: the cache's folder.
        other: another cache's folder; with --recipe, fields to change, as field=value.
        recipe: compare with what a run of this recipe would ask for.
        data: with --recipe, the run's clip table.
        json: print JSON instead of tables.
    """
    from salt_vla.jobs.cache_diff import diff_caches, diff_recipe

    if recipe is not None:
        from salt_vla.config import override
        from salt_vla.jobs.data import open_table
        from salt_vla.recipes import get_recipe

        config = override(get_recipe(recipe).config, other)

        table = None if data is None else open_table(data, config.data.view, config.geometry)
        found = diff_recipe(path, config, table)
        sides = (str(path), recipe)
    elif len(other) == 1 and data is None:
        found = diff_caches(path, Path(other[0]))
        sides = (str(path), other[0])
    else:
        raise ConfigError("give a second cache, or --recipe (with --data and field=value, if wanted)")
    if json:
        print_json(found.to_json())
        return 0 if found.is_same else 1
    if found.fields:
        columns = ["field", *sides] if sides[0] != sides[1] else ["field", "a", "b"]
        rows = [
            dict(zip(columns, (row.name, _shown(row.a), _shown(row.b)), strict=True)) for row in found.fields
        ]
        print_table(rows, columns)
    if found.records is not None:
        counts = found.records
        print(
            f"records: {counts.equal:,} equal, {counts.different:,} different, {counts.only_a:,} only in "
            f"{sides[0]}, {counts.only_b:,} only in {sides[1]}"
        )
        for clip_id, view in counts.differing:
            print(f"  differs: clip {clip_id!r}, view {view}")
    elif found.why_no_records:
        print(f"records were not compared: {found.why_no_records}")
    print("the same" if found.is_same else "different")
    return 0 if found.is_same else 1


def ls(json: bool = False) -> None:
    """The caches below SALT_VLA_ROOT/caches: what they hold, how large they are, which runs use them.

    Example: salt-vla cache ls

    Args:
        json: print JSON instead of a table.
    """
    from salt_vla.jobs.cache_prune import find_caches

    found = find_caches()
    if json:
        print_json([cache.to_json() for cache in found])
    else:
        _print_caches(found)


def prune(
    paths: Annotated[tuple[Path, ...], tyro.conf.Positional] = (),
    *,
    unused: bool = False,
    yes: bool = False,
    json: bool = False,
) -> None:
    """Clear up: what killed builds left, caches named here, and with --unused those that no run uses.

    Says what would go, and removes it only with --yes. A folder that is no cache, or that somebody is
    building, is never touched.

    Example: salt-vla cache prune --unused --yes

    Args:
        paths: caches to remove, whoever uses them.
        unused: remove the caches and view stores below SALT_VLA_ROOT/caches that no run uses; refused where
            there is no run, or one without its config.json, since nobody then knows.
        yes: really remove.
        json: print JSON instead of a table.
    """
    from salt_vla.jobs.cache_prune import find_caches, plan_pruning

    found = find_caches()
    plan = plan_pruning(found, paths, unused)
    if yes:
        plan.carry_out()
    if json:
        print_json(
            {
                "removed": yes,
                "bytes": plan.bytes,
                "leftovers": [str(path) for path in plan.leftovers],
                "caches": [cache.to_json() for cache in plan.caches],
                "found": [cache.to_json() for cache in found],
            }
        )
        return
    _print_caches(found)
    done = "removed" if yes else "would remove"
    for path in plan.leftovers:
        print(f"{done} {path} (left by a build that was killed)")
    for cache in plan.caches:
        users = f" (used by {', '.join(cache.used_by)})" if cache.used_by else ""
        print(f"{done} {cache.path}{users}")
    more = "" if yes or not plan.bytes else "; nothing is removed without --yes"
    print(f"{done} {plan.bytes / GB:.2f} GB{more}")


def _print_caches(found: list[FoundCache]) -> None:
    """Two lines a cache: names of caches and teachers are too long for a table's columns."""
    from salt_vla.cache.foreign import clean
    from salt_vla.rundir import root

    for cache in found:
        maker = f" of {clean(cache.teacher)}" if cache.teacher else ""
        split = f", {clean(cache.split)}" if cache.split else ""
        users = f"used by {', '.join(cache.used_by)}" if cache.used_by else "used by no run"
        print(cache.path.relative_to(root()))
        holds = f"{cache.kind}{maker}{split}: {cache.records:,} records, {cache.bytes / GB:.2f} GB"
        print(f"  {holds}, {cache.state}; {users}")
    if not found:
        print(f"there are no caches below {root() / 'caches'}")

"""`salt-vla cache build`, `cache plan`"""

from __future__ import annotations

from contextlib import AbstractContextManager
from functools import partial
from typing import TYPE_CHECKING, Annotated

import tyro

from salt_vla.cli.cache_latents import Latents
from salt_vla.cli.detach import Apart
from salt_vla.cli.printing import print_json, print_table
from salt_vla.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable

    from salt_vla.cache import CacheWriter
    from salt_vla.jobs.pipeline import Pipeline
    from salt_vla.progress import Advance


def build(
    latents: Annotated[Latents, tyro.conf.arg(name="")],
    *,
    shard: str = "0/1",
    ray: str = "",
    ray_builders: int = 0,
    apart: Annotated[Apart, tyro.conf.arg(name="")] = Apart(),  # noqa: B008
) -> None:
    """Cache a frozen teacher's latents for one split; again with the same arguments goes on.

    Started several times at once, on one machine or on several with a shared disk, they share the work.

    The student's recipe says which frames, crops and views to cache. Without one they are those that the
    teacher was trained with, or, for teachers not trained here, that the clip table was cut for. Any field
    can be set as field=value.

    Example: salt-vla cache build --teacher vjepa2_vitl --recipe salt_vitb --data ssv2.parquet --out caches/s

    Args:
        latents: which latents of which clips, and how they are made.
        shard: as 2/8: this is builder 2 of 8 (counted from 0), each of which begins with shards of its own.
        ray: build on a Ray cluster: auto (the one running here), HOST:PORT, or local (on this machine).
        ray_builders: how many build there at a time; default: one a GPU, else one for every two cores.
    """
    if apart.starts("cache-build", paths={"--data": latents.data}):
        return
    from salt_vla.jobs.build_cache import How, build_cache, parse_stripe
    from salt_vla.jobs.pipeline import Pipeline

    stripe = parse_stripe(shard)
    what = latents.open()
    if latents.memory_limit:
        print(f"{what.batch_size} clips pass the teacher at once")
    how = How(latents.num_workers(what.data), stripe)
    make: Callable[[Pipeline, Advance], None] = Pipeline.run
    if ray:
        from salt_vla.jobs.build_on_ray import OnRay

        if stripe != (0, 1):
            raise ConfigError("--shard is for builders that are started by hand; leave it out with --ray")
        make = OnRay(partial(_opened, latents), ray, ray_builders, how.num_workers, latents.device)
    folder = build_cache(*what.all(), how, make)
    print(f"{folder}: complete")


def _opened(latents: Latents, workers: int) -> AbstractContextManager[tuple[CacheWriter, Pipeline | None]]:
    """A cache under construction, for one more process: what `build` was asked for, loaded there anew."""
    from salt_vla.jobs.build_cache import How, opened

    return opened(*latents.open().all(), How(workers))


def plan(
    latents: Annotated[Latents, tyro.conf.arg(name="")],
    *,
    clips: int | None = None,
    seconds: float = 30.0,
    tokens: int | None = None,
    dim: int | None = None,
    json: bool = False,
) -> None:
    """What `cache build` with the same arguments would take: bytes, hours by a measured sample, disk left.

    Exit code 2 when it cannot fit. Nothing stays on disk. Without a teacher, from --tokens, --dim and
    --clips, it says the bytes alone.

    Example: salt-vla cache plan --teacher videomae_base --data ssv2.parquet --out caches/s --clips 168913

    Args:
        latents: which latents of which clips, and how they are made.
        clips: plan for so many clips like those of the table; default: all of the split.
        seconds: how long to measure.
        tokens: of a clip, where no teacher is named.
        dim: width of a token, where no teacher is named.
        json: print JSON instead of a table.
    """
    from salt_vla.jobs.build_cache import RECORDS_PER_SHARD, How
    from salt_vla.jobs.cache_plan import describe, plan_bytes, plan_cache

    if latents.teacher:
        what = latents.open()
        how = How(latents.num_workers(what.data))
        planned = plan_cache(*what.all(), clips=clips, seconds=seconds, how=how)
    else:
        shape, views = (tokens, dim), 1 if latents.num_views is None else latents.num_views
        planned = plan_bytes(latents.out, latents.encoding, shape, clips, views, RECORDS_PER_SHARD)
    if json:
        print_json(planned.to_json())
    else:
        print_table(describe(planned), ["field", "value"])
    planned.require_fit()

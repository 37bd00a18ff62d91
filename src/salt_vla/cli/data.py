"""`salt-vla data …`"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from salt_vla.cli.printing import print_json, print_table
from salt_vla.errors import ConfigError
from salt_vla.rundir import num_cores

if TYPE_CHECKING:
    from salt_vla.data.segments import Cutting

DEFAULT_STRIDE, DEFAULT_HOP = 4, 16


def index(
    root: Annotated[Path, tyro.conf.Positional],
    out: Path,
    source: str = "",
    dataset: str = "",
    num_frames: int = 16,
    frame_stride: int | None = None,
    fps: float | None = None,
    uniform: bool = False,
    hop: int | None = None,
    clips_per_video: int | None = None,
    short: Literal["skip", "hold"] = "skip",
    validation_share: float = 0.0,
    camera: tuple[str, ...] = (),
    videos: str = "",
    revision: str = "",
    workers: int = 0,
    max_bad_share: float = 0.05,
    json: bool = False,
) -> None:
    """Write the clip table of a data set, and beside it what could not be used (OUT.problems.json).

    Example: salt-vla data index ~/datasets/ssv2 --out ssv2.parquet --clips-per-video 1

    Args:
        root: the data set's folder, metaworld-mini, a list of videos (CSV, Parquet, JSON lines), or a hub id
            with --source lerobot.
        out: the Parquet file to write.
        source: the data set's layout (default: found out): folder, intphys2, lerobot, sim, ssv2 or table.
        dataset: the name its clips' ids begin with (default: the source's or the folder's own).
        num_frames: frames of a clip.
        frame_stride: file frames from one of a clip's frames to the next (default: 4).
        fps: instead of a stride: take the frames nearest to so many a second, whatever a file's own rate.
        uniform: instead of a stride: spread a clip's frames over the whole video.
        hop: file frames from one clip's start to the next (default: 16).
        clips_per_video: instead of a hop: so many clips a video, evenly spread (1: the middle).
        short: videos shorter than a clip: skip them, or hold their last frame.
        validation_share: of the videos without a split, so many become `validation`, by a hash of their name.
        camera: only these cameras (default: all).
        videos: the folder that a list's paths are relative to (default: the list's).
        revision: of a hub repository (default: the newest).
        workers: processes that measure videos (0: one a core).
        max_bad_share: stop, without a table, when more of the data set than this cannot be used.
        json: print the summary as JSON.
    """
    from salt_vla.data.segments import SourceOptions
    from salt_vla.jobs.data_index import write_index

    cutting = _cutting(num_frames, frame_stride, fps, uniform, short, hop, clips_per_video, validation_share)
    options = SourceOptions(dataset, camera, videos, revision)
    summary = write_index(root, out, cutting, source, options, _processes(workers), max_bad_share)
    if json:
        print_json(summary)
    else:
        _print_summary(summary)


def check(
    table: Annotated[Path, tyro.conf.Positional],
    num_frames: int = 0,
    frame_stride: int = 0,
    workers: int = 0,
    sample: int = 0,
    out: Path | None = None,
    json: bool = False,
) -> int:
    """Decode every clip of a table once, and list the bad ones; exit code 1 when there are any.

    Example: salt-vla data check ssv2.parquet --sample 1000

    Args:
        table: a clip table; its clips are read as they were cut.
        num_frames: read clips of so many frames instead.
        frame_stride: read them at this stride instead.
        workers: processes that decode (0: one a core). A file that crashes its decoder costs its own clips.
        sample: only so many clips, drawn at random (0: all).
        out: write the bad clips as JSON to this file, too.
        json: print JSON instead of a table.
    """
    from dataclasses import asdict, replace

    from salt_vla.data.clip_table import ClipTable
    from salt_vla.data.segments import Cutting
    from salt_vla.jobs.data_check import check_table, write_bad
    from salt_vla.jobs.data_index import read_cutting
    from salt_vla.jobs.outputs import REASONS, require_output

    if out is not None:
        require_output(out, REASONS, [table])
    clips = ClipTable.read(table)
    cut = read_cutting(table) or Cutting()
    if frame_stride:
        cut = replace(cut, view=replace(cut.view, frame_stride=frame_stride, sampling="stride"))
    cut = replace(cut, num_frames=num_frames or cut.num_frames)
    checked = check_table(clips, cut, _processes(workers), sample)
    if out is not None:
        write_bad(checked, out)
    bad = [asdict(clip) for clip in checked.bad]
    if json:
        print_json({"clips": checked.clips, "clips_per_second": checked.clips_per_second, "bad": bad})
    else:
        if bad:
            print_table(bad, ("clip_id", "file", "reason"))
        said = f"{checked.clips} clips in {checked.seconds:.1f} s, {checked.clips_per_second:.1f} a second"
        print(f"{said}: {f'{len(bad)} bad' if bad else 'all can be read'}")
    return 1 if bad else 0


def mix(
    tables: Annotated[tuple[Path, ...], tyro.conf.Positional],
    out: Path,
    weight: tuple[float, ...] = (),
) -> None:
    """Join clip tables of several data sets; a training run draws each one's share of its clips.

    Example: salt-vla data mix ssv2.parquet so101.parquet --weight 2 1 --out mix.parquet

    Args:
        tables: clip tables, cut for the same clips.
        out: the Parquet file to write.
        weight: one number a table (default: equal shares, whatever the tables' sizes).
    """
    from salt_vla.jobs.data_index import Weighted, write_mix

    if not tables:
        raise ConfigError("data mix needs at least one clip table")
    weights = weight or (1.0,) * len(tables)
    if len(weights) != len(tables):
        raise ConfigError(f"--weight gives {len(weights)} numbers for {len(tables)} tables; give one each")
    parts = [Weighted(path, share) for path, share in zip(tables, weights, strict=True)]
    rows = write_mix(parts, out)
    print(f"{out}: {sum(row['clips'] for row in rows)} clips")
    print_table(rows, ("dataset", "source", "clips", "share"))


def simulate(
    out: Path,
    task: tuple[str, ...] = (),
    train_episodes: int = 20,
    validation_episodes: int = 10,
    image_size: int = 128,
    seed: int = 0,
) -> None:
    """Render robot episodes in Meta-World as a LeRobot data set; needs the extra `sim`.

    The defaults make metaworld-mini, the data set that comes with the package.

    Example: salt-vla data simulate --out datasets/metaworld-large --train-episodes 200

    Args:
        out: the new data set's folder.
        task: Meta-World tasks (default: the twelve of metaworld-mini).
        train_episodes: per task.
        validation_episodes: per task.
        image_size: height and width in pixels.
        seed: of starts, goals, noise and cameras.
    """
    from salt_vla.data.simulation import DEFAULT_TASKS, SimulationConfig
    from salt_vla.data.simulation import simulate as render

    config = SimulationConfig(
        tasks=task or DEFAULT_TASKS,
        train_episodes=train_episodes,
        validation_episodes=validation_episodes,
        image_size=image_size,
        seed=seed,
    )
    print(f"{render(config, out)}: done")


def _print_summary(summary: dict[str, Any]) -> None:
    print(f"{summary['table']}: {summary['clips']} clips of {summary['videos']} videos ({summary['source']})")
    rows = [{"split": name, **counts} for name, counts in summary["splits"].items()]
    print_table(rows, ("split", "clips", "episodes", "videos"))
    if summary["unlisted_videos"]:
        print(f"{summary['unlisted_videos']} videos are in no list, and were left out")
    if summary["problems"]:
        print(f"left out, each named in {summary['problems_file']}:")
        print_table(
            [{"entries": n, "reason": kind} for kind, n in summary["problems"].items()], ("entries", "reason")
        )


def _cutting(
    num_frames: int,
    frame_stride: int | None,
    fps: float | None,
    uniform: bool,
    short: Literal["skip", "hold"],
    hop: int | None,
    clips_per_video: int | None,
    validation_share: float,
) -> Cutting:
    from salt_vla.config import ViewConfig
    from salt_vla.data.segments import FPS_RANGE, Cutting

    frames = {"--frame-stride": frame_stride, "--fps": fps, "--uniform": uniform or None}
    _only_one(frames, "ways to choose a clip's frames")
    starts = {"--hop": hop, "--clips-per-video": clips_per_video, "--uniform": uniform or None}
    _only_one(starts, "ways to choose where clips begin")
    counts = {"--num-frames": num_frames, **frames, **starts}
    del counts["--fps"], counts["--uniform"]
    for name, value in counts.items():
        if value is not None and value < 1:
            raise ConfigError(f"{name} must be at least 1, not {value}")
    if fps is not None and not FPS_RANGE[0] <= fps <= FPS_RANGE[1]:
        raise ConfigError(f"--fps must lie in {FPS_RANGE[0]}..{FPS_RANGE[1]:g}, not {fps}")
    view = ViewConfig(
        frame_stride=frame_stride or DEFAULT_STRIDE,
        sampling="uniform" if uniform else "fps" if fps else "stride",
        target_fps=fps or 0.0,
        short=short,
    )
    return Cutting(view, num_frames, hop or DEFAULT_HOP, clips_per_video or 0, validation_share)


def _only_one(choices: dict[str, Any], what: str) -> None:
    given = [name for name, value in choices.items() if value is not None]
    if len(given) > 1:
        raise ConfigError(f"{' and '.join(given)} are {len(given)} {what}; give one")


def _processes(workers: int) -> int:
    if workers < 0:
        raise ConfigError(f"--workers must be 0 (one a core) or more, not {workers}")
    return workers or num_cores()

"""`data index`: from a data set in any known layout to its clip table, and what it could not give.

The one place that knows which sources there are, and that measures the files they leave unmeasured.
"""

from __future__ import annotations

import importlib
import json
import math
import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from salt_vla.config import from_json, to_json
from salt_vla.data.clip_table import ClipTable
from salt_vla.data.decode import VideoFacts, probe
from salt_vla.data.segments import Cutting, Listing, Problem, Segment, SourceOptions, cut_clips
from salt_vla.data.sources.files import is_file, is_inside, is_text
from salt_vla.data.workers import Lost, map_in_workers
from salt_vla.errors import ConfigError, DataError
from salt_vla.jobs.outputs import CLIP_TABLE, REASONS, require_output
from salt_vla.progress import progress
from salt_vla.registry import SOURCES, resolve
from salt_vla.rundir import write_text

DEFAULTS = SourceOptions()
MAX_BAD_SHARE = 0.05
MEASURING_TIME_LIMIT = 300.0  # seconds for a file; `probe` itself gives up far earlier
FILES_WORTH_A_PROCESS = 32  # Its start takes as long as measuring so many small ones.
FALLBACK = "folder"  # Any data set is a folder of videos too: it is one only if it is nothing else.
EMBEDDED = "metaworld-mini"  # the data set that comes with the package
CUTTING = b"salt_vla.cutting"  # of the Parquet file: how its clips were cut, as JSON


def place_of(spec: str | Path) -> Path:
    """Where the data set that a command's argument names lies."""
    is_embedded = str(spec) == EMBEDDED and not Path(spec).exists()
    return Path(__file__).parents[1] / "assets" / EMBEDDED if is_embedded else Path(spec)


class TooManyBad(DataError):
    """More of a data set is unusable than may be; `problems` has each with its reason."""

    def __init__(self, message: str, problems: Sequence[Problem]) -> None:
        super().__init__(message)
        self.problems = problems


def index_data(
    path: Path,
    cutting: Cutting,
    source: str = "",
    options: SourceOptions = DEFAULTS,
    num_workers: int = 0,
    max_bad_share: float = MAX_BAD_SHARE,
) -> tuple[ClipTable, list[Problem]]:
    """The clips of a data set, and what gives none, with reasons; an empty `source` is found out.

    Raises `TooManyBad` when more than `max_bad_share` of what the source names cannot be used; videos that
    are merely shorter than a clip are left out by `cutting`'s wish, and do not count.
    """
    listing = list_segments(path, source, options, num_workers)
    _refuse_too_many_bad(listing, max_bad_share)
    return cut_clips(listing, cutting)


def write_index(
    path: Path,
    out: Path,
    cutting: Cutting,
    source: str = "",
    options: SourceOptions = DEFAULTS,
    num_workers: int = 0,
    max_bad_share: float = MAX_BAD_SHARE,
) -> dict[str, Any]:
    """The command: the table in `out`, the problems beside it (`problems_file`), and a summary of both.

    The problems are written when there are too many for a table, too.
    """
    if not 0 <= max_bad_share <= 1:
        raise DataError(f"--max-bad-share must lie in 0..1, not {max_bad_share}")
    require_output(out, CLIP_TABLE, [path])
    beside = problems_file(out)
    require_output(beside, REASONS, [path])
    listing = list_segments(path, source, options, num_workers)
    try:
        _refuse_too_many_bad(listing, max_bad_share)
    except TooManyBad as error:
        _write_problems(error.problems, beside)
        raise DataError(f"{error}; {beside} names each; mend them or raise --max-bad-share") from error
    table, problems = cut_clips(listing, cutting)
    write_cut_table(table, cutting, out)
    _write_problems(problems, beside)
    return {
        "table": str(out),
        "dataset": listing.dataset,
        "source": listing.source,
        "root": str(listing.root),
        **_counts(table),
        "splits": {
            name: _counts(part)
            for name in sorted(set(table.rows["split"].to_pylist()))
            for part in [table.select(split=name)]
        },
        "unlisted_videos": listing.unlisted,
        "problems": kinds_of(problem.reason for problem in problems),
        "problems_file": str(beside),
    }


def problems_file(out: Path) -> Path:
    return out.with_name(f"{out.name}.problems.json")


def write_cut_table(table: ClipTable, cutting: Cutting | None, out: Path) -> None:
    """A table that remembers how its clips were cut, for the commands that look at it alone."""
    table.write(out, {} if cutting is None else {CUTTING: to_json(cutting).encode()})


def read_cutting(path: Path) -> Cutting | None:
    """How a table's clips were cut; None where its file does not say (a table made by another program)."""
    try:
        said = (pq.read_schema(path).metadata or {}).get(CUTTING)
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{path} is not a Parquet file, or a damaged one: {error}") from error
    return None if said is None else from_json(Cutting, said.decode(), f"{path}, its {CUTTING.decode()}")


def cutting_of(spec: str) -> Cutting | None:
    """How the clips of a command's `--data` were cut, where that is a clip table that says so."""
    path = place_of(spec)
    return read_cutting(path) if path.is_file() and not recognised_by(path) else None


def recognised_by(path: Path) -> list[str]:
    """The sources that a path could be read by."""
    modules = {name: importlib.import_module(place.partition(":")[0]) for name, place in SOURCES.items()}
    found = [name for name, module in modules.items() if module.recognises(path)]
    return [name for name in found if name != FALLBACK] or found


def find_source(path: Path) -> str:
    """The one source that recognises a path. Raises `DataError` naming them all where none or several do."""
    known = ", ".join(SOURCES)
    if not path.exists():
        raise DataError(
            f"there is nothing at {path}; give a data set's folder or a list of videos, or with --source "
            "lerobot a hub id"
        )
    found = recognised_by(path)
    if len(found) == 1:
        return found[0]
    if not found and path.suffix.lower() == ".parquet" and path.is_file():
        raise DataError(f"{path} {_no_list(path)}")
    what = f"could be read as {' or '.join(found)}" if found else "has no layout that is known here"
    raise DataError(f"{path} {what}; say which with --source ({known})")


def _no_list(path: Path) -> str:
    """Why a Parquet file is no list of videos."""
    try:
        names = pq.read_schema(path).names
    except (pa.ArrowException, OSError) as error:
        return f"is not a Parquet file, or a damaged one: {(str(error).splitlines() or [''])[0]}"
    if "clip_id" in names:
        return "is a clip table already; give it as --data, or to data check, show and mix"
    return f"lists no videos: it lacks the column 'path'; it has: {', '.join(names)[:200]}"


def list_segments(
    path: Path, source: str = "", options: SourceOptions = DEFAULTS, num_workers: int = 0
) -> Listing:
    """What the source lists, checked and measured: segments of which frames and rate are known."""
    path = place_of(path)
    source = source or find_source(path)
    if options.revision and (source != "lerobot" or path.exists()):
        raise ConfigError(f"--revision is for a hub id; {path} is read as it lies there")
    if options.videos and source != "table":
        raise ConfigError(f"--videos is for lists of videos; {path} is read as {source}")
    listing: Listing = resolve(SOURCES, source)(path, options)
    if options.cameras and not any(segment.camera for segment in listing.segments):
        raise ConfigError(f"{path} ({source}) does not tell cameras apart; leave out --camera")
    return _measured(_checked(listing), num_workers)


def kinds_of(reasons: Any) -> dict[str, int]:
    """How often each kind of reason occurs, the most frequent first: its words before details and numbers."""
    words = (re.split(r"[:;(]", reason)[0].strip() for reason in reasons)
    kinds = Counter(re.sub(r"(?<![\w-])\d+", "N", said) for said in words)
    return dict(kinds.most_common())


def _checked(listing: Listing) -> Listing:
    """Keys that stand for one thing, files below the root, groups in one split."""
    counts = Counter(segment.key for segment in listing.segments)
    kept: list[Segment] = []
    problems = list(listing.problems)
    splits: dict[str, str] = {}
    for segment in listing.segments:
        if not is_inside(segment.file):
            problems.append(Problem(segment.key, segment.file, "leaves the data set's folder"))
        elif said := _not_text(segment):
            problems.append(Problem(segment.key, segment.file, said))
        elif counts[segment.key] > 1:
            reason = (
                f"repeated: {counts[segment.key]} entries have this key, and none is taken; name each apart"
            )
            problems.append(Problem(segment.key, segment.file, reason))
        else:
            kept.append(segment)
            if splits.setdefault(segment.group, segment.split) != segment.split:
                raise DataError(
                    f"{listing.root}: {segment.group!r} is in the splits {splits[segment.group] or 'none'} "
                    f"and {segment.split or 'none'} ({segment.key!r}); a group may not be divided"
                )
    return replace(listing, segments=tuple(kept), problems=tuple(problems))


def _not_text(segment: Segment) -> str:
    """What is wrong with a segment's words: a table holds text only."""
    if not is_text(segment.key + segment.file):
        return "its name is not text in UTF-8; rename it"
    others = ("group", "split", "label", "camera")
    wrong = [name for name in others if not is_text(getattr(segment, name))]
    return f"its {wrong[0]} is not text in UTF-8; mend it" if wrong else ""


def _measured(listing: Listing, num_workers: int) -> Listing:
    """Each segment in frames of its file, or a problem where the file cannot be read."""
    is_known = {s.key: None not in (s.first_frame, s.frames, s.fps) for s in listing.segments}
    facts = _facts(
        listing.root, sorted({s.file for s in listing.segments if not is_known[s.key]}), num_workers
    )
    is_there = {file: is_file(listing.root / file) for file in {s.file for s in listing.segments}}
    found: list[Segment] = []
    problems = list(listing.problems)
    for segment in listing.segments:
        placed: Segment | str = segment
        if is_known[segment.key]:
            if not is_there[segment.file]:
                placed = "missing: the data set's tables name it, but it is not there"
        else:
            said = facts[segment.file]
            placed = said if isinstance(said, str) else _placed(segment, said)
        if isinstance(placed, str):
            problems.append(Problem(segment.key, segment.file, placed))
        else:
            found.append(placed)
    return replace(listing, segments=tuple(found), problems=tuple(problems))


def _placed(segment: Segment, facts: VideoFacts) -> Segment | str:
    """The segment's seconds as frames: the nearest to its start, up to the one nearest to its end."""
    first, last = (
        facts.frames if seconds is None else min(math.floor(seconds * facts.fps + 0.5), facts.frames)
        for seconds in (segment.start or 0.0, segment.end)
    )
    if first >= last:
        return f"empty: of the file's {facts.frames / facts.fps:g} s no frame lies in this stretch"
    return replace(
        segment,
        first_frame=first,
        frames=last - first,
        fps=facts.fps,
        variable_rate=facts.variable_rate,
    )


def _facts(root: Path, files: Sequence[str], num_workers: int) -> dict[str, VideoFacts | str]:
    """What each file holds, or in words why that cannot be said."""
    found: dict[str, VideoFacts | str] = {}
    if not files:
        return found
    with progress("Measuring videos", len(files), "videos") as advance:
        paths = [root / file for file in files]
        workers = min(num_workers, 1 + len(files) // FILES_WORTH_A_PROCESS)
        results = map_in_workers(_said_of, paths, workers, MEASURING_TIME_LIMIT)
        for file, result in zip(files, results, strict=True):
            found[file] = f"cannot be measured: {result.reason}" if isinstance(result, Lost) else result
            advance()
    return found


def _said_of(path: Path) -> VideoFacts | str:
    try:
        return probe(path)
    except DataError as error:
        return without_path(error, path)


def without_path(error: Exception, path: Path) -> str:
    """What is said of a file, without its name: that stands beside it."""
    return str(error).removeprefix("video ").removeprefix(f"{path} ").removeprefix(f"{path}: ")


def _refuse_too_many_bad(listing: Listing, max_bad_share: float) -> None:
    bad, total = len(listing.problems), len(listing.problems) + len(listing.segments)
    if bad > max_bad_share * total:
        kinds = ", ".join(
            f"{n} × {kind}" for kind, n in kinds_of(problem.reason for problem in listing.problems).items()
        )
        first = listing.problems[0]
        raise TooManyBad(
            f"{bad} of the {total} entries of {listing.root} ({listing.source}) cannot be used, more than "
            f"{max_bad_share:.0%}: {kinds}; the first is {first.key} ({first.reason})",
            listing.problems,
        )


def _write_problems(problems: Sequence[Problem], out: Path) -> None:
    write_text(out, json.dumps([asdict(problem) for problem in problems], indent=1) + "\n")


def _counts(table: ClipTable) -> dict[str, int]:
    """Episodes are what is never divided between splits; LeRobot 3 keeps several in a video."""
    rows = table.rows
    return {
        "clips": len(table),
        "episodes": len(set(rows["episode"].to_pylist())),
        "videos": len(set(rows["file"].to_pylist())),
    }


@dataclass(frozen=True)
class Weighted:
    """A clip table's file, and its share of the clips drawn."""

    path: Path
    weight: float


def write_mix(parts: Sequence[Weighted], out: Path) -> list[dict[str, Any]]:
    """Several tables as one, each with its weight; a row a data set. Raises `DataError` when their clips were
    cut for different views: one run reads them all with one."""
    require_output(out, CLIP_TABLE, [part.path for part in parts])
    tables = [(ClipTable.read(part.path), part.weight) for part in parts]
    cuttings: dict[str, list[str]] = defaultdict(list)
    for part in parts:
        cutting = read_cutting(part.path)
        cuttings[_cut(cutting)].append(str(part.path))
    if len(cuttings) > 1:
        said = "; ".join(f"{' and '.join(paths)}: {how}" for how, paths in cuttings.items())
        raise DataError(f"the tables were cut for different clips ({said}); index them alike")
    table = ClipTable.mix(tables)
    write_cut_table(table, read_cutting(parts[0].path), out)
    total = sum(table.weights.values())
    places = zip(table.rows["dataset"].to_pylist(), table.rows["source"].to_pylist(), strict=True)
    return [
        {"dataset": name, "source": source, "clips": clips, "share": f"{table.weights[name] / total:.1%}"}
        for (name, source), clips in Counter(places).items()
    ]


def _cut(cutting: Cutting | None) -> str:
    """What a run must read a table's clips with, in words."""
    if cutting is None:
        return "not said"
    view = cutting.view
    how = {"stride": f"stride {view.frame_stride}", "fps": f"{view.target_fps} fps", "uniform": "uniform"}
    return f"{cutting.num_frames} frames, {how[view.sampling]}, short videos: {view.short}"

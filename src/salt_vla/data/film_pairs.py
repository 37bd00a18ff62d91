"""Films of possible and impossible events, in pairs: which file is which, read from the layouts they come in.

Knows lists and folders; neither models nor what surprises them.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from salt_vla.data.decode import probe, stream_frames
from salt_vla.data.sources import intphys2
from salt_vla.data.sources.files import is_file, is_folder, read_csv, read_json
from salt_vla.errors import DataError

if TYPE_CHECKING:
    from jaxtyping import UInt8

PAIRS_LIST = "pairs.csv"
PAIRS_COLUMNS = ("possible", "impossible")
STATUS, SCENE = "status.json", "scene"
PICTURES = (".png", ".jpg", ".jpeg")
POSSIBLE, IMPOSSIBLE, UNKNOWN = "possible", "impossible", ""
MOST_NAMED = 3


@dataclass(frozen=True)
class Film:
    """A video file, or a folder of pictures in the order of their names. `label`: possible, impossible, or
    "" where the list does not say; `run`: which pair of its scene it belongs to; `parts`: what tables are
    split by (condition, difficulty, camera), by column."""

    name: str
    path: Path
    scene: str
    run: str
    label: str = UNKNOWN
    parts: dict[str, str] = field(default_factory=dict)

    def identity(self) -> str:
        """Of its pixels, as far as the file system tells: path, size and time of change of its files."""
        files = _picture_files(self.path) if self.path.is_dir() else [self.path]
        stats = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
        return f"{self.path.resolve()} {stats}"

    def pictures(self) -> Iterator[UInt8[np.ndarray, "height width 3"]]:
        """Its pictures in order, one at a time. Raises `DataError` naming the file."""
        if self.path.is_dir():
            for file in _picture_files(self.path):
                yield from _pictures_of(file)
        else:
            yield from _pictures_of(self.path)


@dataclass(frozen=True)
class Pair:
    """A possible film and its impossible twin; `scene` is what intervals resample."""

    possible: Film
    impossible: Film

    @property
    def scene(self) -> str:
        return self.possible.scene

    @property
    def parts(self) -> dict[str, str]:
        return self.impossible.parts


@dataclass(frozen=True)
class FilmSet:
    """One split's films, by name of the set (`Main`); no pairs where it has no labels."""

    name: str
    films: tuple[Film, ...]
    pairs: tuple[Pair, ...]

    @property
    def has_labels(self) -> bool:
        return bool(self.pairs)


def read_film_sets(folder: Path) -> list[FilmSet]:
    """The sets below `folder`, in the first layout that fits: `pairs.csv` (possible, impossible, and further
    columns), IntPhys 2 (its root or one split), IntPhys 1 (`O1/01/1/status.json`).

    Raises `DataError` for none of these, for films that are missing or stand alone, and for a list without
    films.
    """
    if not is_folder(folder):
        raise DataError(
            f"there is no folder {folder}; give --data the one that the film pairs were unpacked into"
        )
    if is_file(folder / PAIRS_LIST):
        sets = [_from_list(folder)]
    elif intphys2.recognises(folder):
        sets = [_intphys2(folder, name, place) for name, place in intphys2.splits_of(folder).items()]
    elif statuses := sorted(folder.glob(f"*/*/*/{STATUS}")) or sorted(folder.glob(f"*/*/{STATUS}")):
        sets = [_intphys1(folder, statuses)]
    else:
        raise DataError(
            f"{folder} holds no film pairs: neither {PAIRS_LIST}, nor IntPhys 2's {intphys2.LIST}, nor "
            f"IntPhys 1's …/{STATUS}"
        )
    for each in sets:
        if not each.films:
            raise DataError(f"{folder}: {each.name} lists no film")
    return sets


def _intphys2(root: Path, split: str, folder: Path) -> FilmSet:
    rows = [row for _, row in read_csv(folder / intphys2.LIST, intphys2.COLUMNS)]
    films, missing = [], []
    for row in rows:
        path = root / intphys2.film_file(root, folder, row["file_name"])
        if not is_file(path):
            missing.append(str(path))
        run, _, kind = row.get("type", "").partition("_")
        label = {"Possible": POSSIBLE, "Impossible": IMPOSSIBLE}.get(kind, UNKNOWN)
        if row.get("type") and not label:
            raise DataError(
                f"{folder / intphys2.LIST}: film {row['name']} has type {row['type']!r}, not 1_Possible, "
                "1_Impossible, 2_Possible or 2_Impossible"
            )
        parts = {name.lower(): row[name] for name in ("condition", "Difficulty", "Camera") if row.get(name)}
        films.append(Film(row["name"], path, f"{split}/{row['SceneIndex']}", run, label, parts))
    _require_there(missing, folder / intphys2.LIST, len(films))
    return FilmSet(split, tuple(films), _paired(films, folder / intphys2.LIST))


def _intphys1(root: Path, statuses: Sequence[Path]) -> FilmSet:
    """IntPhys 1's dev set: block/scene/movie, four movies a scene. Its n-th possible movie is paired with its
    n-th impossible one; the published relative error instead compares sums over the four."""
    films: list[Film] = []
    for status in statuses:
        movie = status.parent
        scene = movie.parent.relative_to(root).as_posix()
        said = read_json(status, dict)
        header = said["header"] if isinstance(said.get("header"), dict) else said
        possible = header.get("is_possible", header.get("possible"))
        if not isinstance(possible, bool):
            raise DataError(f"{status} does not say is_possible; only IntPhys 1's dev set has labels")
        path = movie / SCENE
        if not is_folder(path):
            raise DataError(f"{movie} has {STATUS} but no folder {SCENE} of pictures; unpack the set again")
        label = POSSIBLE if possible else IMPOSSIBLE
        before = sum(film.scene == scene and film.label == label for film in films)
        parts = {"condition": scene.split("/")[0]} if "/" in scene else {}
        films.append(Film(f"{scene}/{movie.name}", path, scene, str(before + 1), label, parts))
    return FilmSet(root.resolve().name, tuple(films), _paired(films, root))


def _from_list(root: Path) -> FilmSet:
    """`pairs.csv`: a pair a row; `group` names its scene (else rows that share a film are one), every further
    column splits the tables."""
    films: dict[str, Film] = {}
    pairs, missing = [], []
    rows = list(read_csv(root / PAIRS_LIST, PAIRS_COLUMNS))
    together = _sharing_films([row for _, row in rows])
    for place, (number, row) in enumerate(rows):
        scene = row.get("group") or f"line {rows[together[place]][0]}"
        parts = {k: v for k, v in row.items() if k not in (*PAIRS_COLUMNS, "group") and v}
        twins = []
        for label in PAIRS_COLUMNS:
            path = root / row[label]
            if not row[label].strip():
                raise DataError(f"{root / PAIRS_LIST}, line {number}, names no {label} film")
            if not (is_file(path) or is_folder(path)):
                missing.append(str(path))
            film = Film(row[label], path, scene, str(number), label, parts)
            known = films.setdefault(film.name, film)
            if known.label != label:
                raise DataError(f"{root / PAIRS_LIST}, line {number}: {film.name} is possible and impossible")
            twins.append(film)
        pairs.append(Pair(*twins))
    _require_there(missing, root / PAIRS_LIST, 2 * len(pairs))
    return FilmSet(root.resolve().name, tuple(films.values()), tuple(pairs))


def _sharing_films(rows: Sequence[Mapping[str, str]]) -> list[int]:
    """For each row the first one that it is bound to by films in common, also through others: what one film
    surprises shows in all of them."""
    names = {
        name: number for number, name in enumerate({row[c]: None for row in rows for c in PAIRS_COLUMNS})
    }
    ends = [[names[row[column]] for row in rows] for column in PAIRS_COLUMNS]
    bound = coo_array((np.ones(len(rows)), ends), shape=(len(names), len(names)))
    scenes = connected_components(bound, directed=False)[1][ends[0]].tolist()
    return [scenes.index(scene) for scene in scenes]


def _require_there(missing: list[str], where: Path, total: int) -> None:
    if missing:
        more = f" and {len(missing) - MOST_NAMED} more" * (len(missing) > MOST_NAMED)
        raise DataError(
            f"{len(missing)} of {total} films in {where} are not there: {', '.join(missing[:MOST_NAMED])}"
            f"{more}; unpack the set again"
        )


def _paired(films: Sequence[Film], where: Path) -> tuple[Pair, ...]:
    """One pair a scene and run; none where no film has a label."""
    if not any(film.label for film in films):
        return ()
    twins: dict[tuple[str, str], dict[str, list[Film]]] = defaultdict(lambda: defaultdict(list))
    for film in films:
        twins[film.scene, film.run][film.label].append(film)
    pairs = []
    for (scene, run), found in twins.items():
        counts = {label: len(each) for label, each in found.items()}
        if counts != {POSSIBLE: 1, IMPOSSIBLE: 1}:
            said = ", ".join(f"{count} {label or 'unlabelled'}" for label, count in sorted(counts.items()))
            raise DataError(
                f"{where}: scene {scene}, run {run or '(none)'}, has {said} film(s), not one possible and "
                "one impossible; mend the list or unpack the set again"
            )
        pairs.append(Pair(found[POSSIBLE][0], found[IMPOSSIBLE][0]))
    return tuple(pairs)


def _picture_files(folder: Path) -> list[Path]:
    return sorted(file for file in folder.iterdir() if file.suffix.lower() in PICTURES)


def _pictures_of(path: Path) -> Iterator[UInt8[np.ndarray, "height width 3"]]:
    facts = probe(path)
    frames = stream_frames(path, range(facts.frames), facts.fps, facts.variable_rate)
    for expected, (number, picture) in enumerate(frames):
        if number != expected:  # A stretch that had to be read once more.
            raise DataError(f"video {path} does not give frame {expected} in its turn; write it anew")
        yield picture

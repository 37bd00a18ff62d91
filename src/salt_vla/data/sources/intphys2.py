"""IntPhys 2: films of possible and impossible events, in matched pairs, with a metadata.csv a split.

Knows the published layout (docs/sources.md), not how surprise is scored.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from pathlib import Path

from salt_vla.data.segments import Listing, Problem, Segment, SourceOptions
from salt_vla.data.sources.files import begins_with, is_file, is_inside, read_csv
from salt_vla.errors import DataError

SPLITS = ("Debug", "Main", "HeldOut")
LIST = "metadata.csv"
COLUMNS = ("SceneIndex", "name", "file_name")
KINDS = ("Possible", "Impossible")


def recognises(path: Path) -> bool:
    lists = [path / LIST, *(path / split / LIST for split in SPLITS)]
    return any(is_file(file) and begins_with(file, COLUMNS[0]) for file in lists)


def segments(root: Path, options: SourceOptions) -> Listing:
    """Every listed film is a segment: key intphys2 / split / name, label its type (`1_Possible`), group its
    scene: the four films of a scene differ in a moment only. `root` holds the splits' folders, or is one."""
    dataset = options.dataset or "intphys2"
    splits = splits_of(root)
    found: list[Segment] = []
    problems: list[Problem] = []
    for split, folder in splits.items():
        rows = [row for _, row in read_csv(folder / LIST, COLUMNS)]
        for row in rows:
            key = f"{dataset}/{split}/{row['name']}"
            file = film_file(root, folder, row["file_name"])
            if not is_inside(file):
                problems.append(Problem(key, file, "leaves the data set's folder"))
            elif not is_file(root / file):
                broken = f"; its pair in scene {row['SceneIndex']} is broken" if row.get("type") else ""
                problems.append(Problem(key, file, f"missing: listed in {LIST} but not there{broken}"))
            else:
                scene = f"{dataset}/{split}/scene-{row['SceneIndex']}"
                found.append(Segment(key, file, group=scene, split=split, label=row.get("type", "")))
        problems += _unpaired(rows, f"{dataset}/{split}", (folder / LIST).relative_to(root).as_posix())
    return Listing(dataset, "intphys2", root, tuple(found), tuple(problems))


def splits_of(root: Path) -> dict[str, Path]:
    """The folders of the splits that are there, by name; `root` holds them, or is one. Raises `DataError`."""
    if is_file(root / LIST):
        return {root.resolve().name if root.resolve().name in SPLITS else "Main": root}
    splits = {name: root / name for name in SPLITS if is_file(root / name / LIST)}
    if not splits:
        raise DataError(f"{root} is not IntPhys 2: no {LIST} there, nor in {', '.join(SPLITS)}")
    return splits


def film_file(root: Path, folder: Path, said: str) -> str:
    """A film's path relative to `root`: `said` is relative to the split's folder, to the root, or a bare
    name. The first place that has it, or the first."""
    name = Path(said).name
    places = [folder / said, root / said, folder / "Videos" / name, folder / name]
    inside = [place for place in places if is_inside(said) and is_file(place)]
    if not inside:
        return (folder.relative_to(root) / said).as_posix()
    return inside[0].relative_to(root).as_posix()


def _unpaired(rows: list[dict[str, str]], prefix: str, file: str) -> list[Problem]:
    """Scenes and runs that do not list exactly one possible and one impossible film."""
    pairs: dict[tuple[str, str], Counter[str]] = defaultdict(Counter)
    for row in rows:
        if said := row.get("type", ""):
            run, _, kind = said.partition("_")
            pairs[row["SceneIndex"], run][kind] += 1
    return [
        Problem(
            f"{prefix}/scene-{scene}",
            file,
            f"unpaired: run {run} lists {', '.join(f'{n} {kind}' for kind, n in sorted(kinds.items()))}",
        )
        for (scene, run), kinds in pairs.items()
        if kinds != dict.fromkeys(KINDS, 1)
    ]

"""Frozen teachers: each turns uint8 clips into raw latents, one file a family.

`load_teacher` is the way in; `salt_vla.registry.TEACHERS` names the families, `names.py` published teachers.
"""

from __future__ import annotations

from difflib import get_close_matches
from pathlib import Path
from typing import Literal, cast

from salt_vla.errors import RunError
from salt_vla.geometry import ClipGeometry
from salt_vla.hub import is_hub_id, local_folder
from salt_vla.models.loading import WEIGHTS as OWN_WEIGHTS
from salt_vla.models.loading import step_directories
from salt_vla.registry import TEACHERS, resolve
from salt_vla.rundir import root, run_or_directory
from salt_vla.teachers import names
from salt_vla.teachers.base import FrozenTeacher as Teacher
from salt_vla.teachers.base import TeacherRequest
from salt_vla.teachers.weights import CONFIG, PICKLES, read_config

__all__ = ["Teacher", "TeacherRequest", "family_of", "load_teacher", "place_of", "source_of"]

STATUS = "status.json"  # Which every run has from its first moment.
MAX_NAME, MAX_PART = 4000, 255  # Bytes of a path, and of one name in it, that file systems take.
FILES = ("*.safetensors", *PICKLES)
# model_type of config.json, or how it begins, → family.
MODEL_TYPES = {
    "videomae": "videomae",  # VideoMAEv2's repositories call theirs VideoMAEv2_Base, in every size.
    "vjepa2": "vjepa2",
    "dinov2": "image",
    "dinov3_vit": "image",
    "siglip": "image",
}


def load_teacher(
    name_or_directory: str | Path,
    geometry: ClipGeometry | None = None,
    device: str = "cpu",
    dtype: str = "float32",
    layer: int = -1,
    final_norm: Literal["model", "none"] = "model",
) -> Teacher:
    """A frozen teacher by what it is called; the first of these that fits:

    - a published teacher's name (`vjepa2_vitl`; `names.NAMED` lists them): fetched from its hub repository,
      and refused unless it has the width, blocks and parameters of that name. `NAME=DIRECTORY` holds a local
      directory against the name.
    - `random:<encoder>[:seed]`: our encoder at random init, the baseline.
    - a directory: a run, checkpoint or export of this package, or a checkpoint in transformers' format
      (config.json and safetensors); or the name of a run.
    - a hub id, `organisation/repository`.

    `geometry`: what the caller's clips have; a teacher made for another one is refused. `layer`: the tokens
    after that block, 1 … depth, or from the end (−1: the last). `final_norm`: "model" applies the network's
    own final norm behind the last block, "none" does not. Both are in the teacher's `name`; its
    `fingerprint` covers them, the dtype and the geometry.
    Raises `ConfigError`, `RunError` or `HubError`: what is wrong, where, and what to do.
    """
    request = TeacherRequest(geometry, device, dtype, layer, final_norm)
    path = place_of(name_or_directory)
    name = str(name_or_directory)
    claim, equals, place = name.partition("=")
    if name in names.NAMED or (equals and claim in names.NAMED):
        return _named(names.NAMED[claim], place if equals else None, request)
    if name.startswith("random:"):
        return cast(Teacher, resolve(TEACHERS, "random")(None, name, request))
    if path.is_dir():
        return _from_directory(path, path.resolve().name, request)
    # What lies in a folder that is there was meant as a path.
    if is_hub_id(name) and not Path(name).parent.is_dir() and not name.startswith("runs/"):
        return _from_directory(local_folder(name, "model"), name, request)
    if equals and not claim:
        raise RunError(f"{name!r} begins with '='; write LABEL={place}, or {place} alone")
    if equals:
        raise RunError(
            f"there is no published teacher {claim!r} to hold {place} to; known: {', '.join(names.NAMED)}"
        )
    raise RunError(
        f"there is no encoder or teacher {name!r}{_meant(name)}: neither a directory nor a run in "
        f"{root()}/runs, nor a hub id, nor random:<encoder>[:seed], nor a published teacher "
        f"({', '.join(names.NAMED)})"
    )


def _meant(name: str) -> str:
    """What may have been meant by a name that is none; empty where nothing is like it."""
    what, at, layer = name.rpartition("@")
    if at and run_or_directory(what).is_dir():
        return f" (a layer is a whole number, and {layer!r} is none)"
    runs = root() / "runs"
    known = [*names.NAMED, *(sorted(path.name for path in runs.iterdir()) if runs.is_dir() else ())]
    close = get_close_matches(name.removeprefix("runs/"), known, n=3)
    return f" (did you mean {' or '.join(close)}?)" if close else ""


def place_of(name_or_directory: str | Path) -> Path:
    """The directory, or the run's, that a teacher may lie in; `RunError` for what is no name."""
    name = str(name_or_directory)
    too_long = len(name.encode(errors="replace")) > MAX_NAME
    too_long |= any(len(part.encode(errors="replace")) > MAX_PART for part in name.split("/"))
    if not name.strip() or too_long or "\0" in name:
        raise RunError(
            f"{name[:40]!r}{'…' if len(name) > 40 else ''} is no teacher: give a directory, a run's name, a "
            "hub id, random:<encoder>[:seed] or a published teacher's name"
        )
    return run_or_directory(name_or_directory)


def source_of(source: str) -> str | Path:
    """What a configuration's `target.source` stands for, as `load_teacher` takes it: a directory below the
    root, else what it would be anywhere. Raises as `place_of`."""
    place_of(source)
    place = root() / source
    # As there: what lies in a folder that is there was meant as a path, and not as a hub id.
    is_path = place.is_dir() or ("/" in source and place.parent.is_dir() and not Path(source).exists())
    return place if is_path else source


def _named(claim: names.NamedTeacher, place: str | None, request: TeacherRequest) -> Teacher:
    folder = claim.fetch() if place is None else names.require_directory(place, claim.name)
    teacher: Teacher = resolve(TEACHERS, family_of(folder))(folder, claim.name, request)
    claim.require(
        teacher.dim, teacher.depth, teacher.heads, teacher.num_parameters, teacher.geometry, str(folder)
    )
    return teacher


def _from_directory(folder: Path, name: str, request: TeacherRequest) -> Teacher:
    return cast(Teacher, resolve(TEACHERS, family_of(folder))(folder, name, request))


def family_of(folder: Path) -> str:
    """Which family's checkpoint a directory holds; `RunError` where it is none of them."""
    holds_weights = any(path for file in FILES for path in folder.glob(file))
    checkpoints = folder / "checkpoints"
    places = [folder, *(path for _, path in step_directories(checkpoints))]
    if any((place / OWN_WEIGHTS).is_file() for place in places):
        return "pixel"
    if not holds_weights and (checkpoints.is_dir() or not (folder / CONFIG).is_file()):
        _require_checkpoint(folder)
        return "pixel"  # Whose loader says what is missing.
    said = read_config(folder)
    if "model_type" not in said:
        _require_checkpoint(folder)
        raise RunError(f"{folder} holds no encoder: {CONFIG} has no model_type, and there are no checkpoints")
    kind = str(said["model_type"])
    for beginning, family in MODEL_TYPES.items():
        if kind.lower().startswith(beginning):
            return family
    raise RunError(
        f"{folder / CONFIG} has model_type={kind!r}, which is no teacher here; known are our own runs "
        f"and {', '.join(MODEL_TYPES)}"
    )


def _require_checkpoint(folder: Path) -> None:
    """`RunError` for a run that was stopped before it saved anything."""
    begun = (folder / STATUS).is_file() or (folder / "checkpoints").is_dir()
    if begun and not step_directories(folder / "checkpoints"):
        raise RunError(
            f"run {folder} holds no encoder: it was stopped before its first checkpoint; go on with the run "
            "(the command that began it, again)"
        )

"""Encoders that an evaluation is asked for: `[LABEL=]WHAT[@LAYER]`, and the random twin of each.

Knows how they are named and loaded, not what is measured on them.
"""

from __future__ import annotations

import re
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import torch

from salt_vla.config import EncoderConfig, TrainConfig, from_json
from salt_vla.errors import ConfigError, RunError, UserError
from salt_vla.evaluation.features import TokenModel
from salt_vla.evaluation.results import CONSTANT, PIXELS
from salt_vla.geometry import ClipGeometry
from salt_vla.hub import local_folder
from salt_vla.jobs.teacher_train import EXPORT, checkpoint_of, read_export
from salt_vla.models import build_encoder
from salt_vla.models.loading import encoder_directory, load_encoder
from salt_vla.rundir import RunDirectory, read_json, run_or_directory
from salt_vla.teachers import Teacher, TeacherRequest, family_of, load_teacher, place_of
from salt_vla.teachers.names import NAMED
from salt_vla.teachers.pixel import EncoderTeacher
from salt_vla.teachers.random import PREFIX

RANDOM = "random"
BASELINES = (RANDOM, PIXELS, CONSTANT)
_LAYER = re.compile(r"(?P<what>.+)@(?P<layer>-?\d{1,4})")
_SEED = re.compile(r"(?P<what>.+):(?P<seed>\d{1,9})")


@dataclass(frozen=True)
class Spec:
    """An encoder as it was asked for. `is_named`: the label was given, and may stand for several seeds."""

    label: str
    what: str
    layer: int | None = None
    is_named: bool = False


class Seeded(Protocol):
    """What was asked for under a label, of a seed where that is known."""

    @property
    def label(self) -> str: ...

    @property
    def seed(self) -> int | None: ...


@dataclass(frozen=True)
class Entry:
    """An encoder that was found. `spec`: of a run, names the checkpoint that was read. `seed`: of its
    training, where that is known. `place`: the folder that was asked for, read at its end."""

    spec: Spec
    model: Teacher
    seed: int | None
    place: Path | None

    @property
    def label(self) -> str:
        return self.spec.label


def parse_specs(arguments: Sequence[str]) -> list[Spec]:
    """Specs with their labels: those given, else the folder's name as far as namesakes differ. `pixels` is in
    every table and left out here. Raises `UserError`."""
    parts = [_split(argument) for argument in arguments if argument != PIXELS]
    if not parts:
        raise UserError(
            "eval needs at least one encoder: a run's name, or the folder of a checkpoint or export"
        )
    unnamed = list(dict.fromkeys(what for label, what, _ in parts if not label))
    names = dict(zip(unnamed, encoder_names(unnamed), strict=True))
    specs = []
    for label, what, layer in parts:
        made = label or names[what] + (f"@{layer}" if layer is not None else "")
        if made in BASELINES and not (made == RANDOM and label and what.startswith(PREFIX)):
            raise UserError(f"{made!r} is the name of a baseline; give the encoder another: LABEL={what}")
        specs.append(Spec(made, what, layer, bool(label)))
    for spec in specs:
        same = [other for other in specs if other.label == spec.label]
        if len(same) > 1 and not all(other.is_named for other in same):
            raise UserError(
                f"two encoders are called {spec.label!r}: they are one folder; leave one out, or give both "
                f"a label (the same one for seeds of one thing: LABEL={spec.what})"
            )
    return specs


def _split(argument: str) -> tuple[str, str, int | None]:
    label, equals, rest = argument.partition("=")
    is_labelled = equals and label and "/" not in label and label not in NAMED
    if not is_labelled or run_or_directory(argument).is_dir():
        label, rest = "", argument
    found = _LAYER.fullmatch(rest)
    if found is None or run_or_directory(rest).is_dir():
        return label, rest, None
    return label, found["what"], int(found["layer"])


def encoder_names(paths: Sequence[str]) -> list[str]:
    """What each is called in tables: its folder, with those above it as far as namesakes differ (`a/best`
    and `b/best`; `checkpoints` tells nothing). Raises `UserError` for one that is given twice."""
    places = [run_or_directory(path).absolute() for path in paths]
    parts = [[part for part in place.parts if part != "checkpoints"] for place in places]
    names = []
    for mine in parts:
        length = 1
        while length < len(mine) and sum(mine[-length:] == other[-length:] for other in parts) > 1:
            length += 1
        names.append("/".join(mine[-length:]))
    twice = [name for name in names if names.count(name) > 1]
    if twice:
        raise UserError(
            f"two encoders are called {Path(twice[0]).name!r}: they are one folder; leave one out"
        )
    return names


def load_entries(specs: Sequence[Spec], device: str = "cpu") -> list[Entry]:
    """Every encoder on `device`, with clips of as many frames as the first one's. Raises `UserError`
    where one cannot take them, and where two of a label are of one seed."""
    entries: list[Entry] = []
    for asked in specs:
        spec = _pinned(asked)
        model = _load(spec, device)
        if entries and model.geometry.num_frames != entries[0].model.geometry.num_frames:
            model = _with_frames(spec, model, entries[0], device)
        entries.append(Entry(spec, model, seed_of(spec.what), _place(asked)))
    require_seeds(entries)
    return entries


def require_seeds(entries: Sequence[Seeded]) -> None:
    """Raise `UserError` where a label stands for several and they are not of different known seeds."""
    for label in {entry.label for entry in entries}:
        seeds = [entry.seed for entry in entries if entry.label == label]
        if len(seeds) > 1 and None in seeds:
            raise UserError(f"{label!r} stands for several encoders, and one of them is of no known seed")
        if len(seeds) > len(set(seeds)):
            raise UserError(f"{label!r} stands for two runs of the same seed; leave one out")


def seeds_of(entries: Sequence[Seeded], otherwise: int) -> list[int]:
    """Of labels that stand for several; else the one of the settings."""
    labels = [entry.label for entry in entries]
    several = {entry.seed for entry in entries if labels.count(entry.label) > 1 and entry.seed is not None}
    return sorted(several) or [otherwise]


def is_of(seed: int, entry: Seeded, entries: Sequence[Seeded]) -> bool:
    """Whether it stands in this seed's table: as one of it, or alone under its label."""
    is_alone = sum(other.label == entry.label for other in entries) == 1
    return is_alone or entry.seed == seed


def split_random(what: str) -> tuple[str, int]:
    """Of `random:WHAT[:seed]`."""
    found = _SEED.fullmatch(what)
    source = (found["what"] if found else what).removeprefix(PREFIX)
    return source, int(found["seed"]) if found else 0


def _load(spec: Spec, device: str) -> Teacher:
    layer = -1 if spec.layer is None else spec.layer
    if spec.what.startswith(PREFIX):
        source, seed = split_random(spec.what)
        if not re.match(r"vit_[a-z]+", source):
            return random_twin(source, seed, layer, device=device)
    return load_teacher(spec.what, device=device, layer=layer)


def at_layer(entry: Entry, layer: int, device: str = "cpu", seed: int | None = None) -> Teacher:
    """The encoder of an entry behind another block; with a seed its architecture, freshly initialised.
    Raises `UserError` as loading does."""
    if seed is None:
        return load_entries([replace(entry.spec, layer=layer)], device)[0].model
    if isinstance(entry.model, EncoderTeacher):
        return random_model(entry.model.encoder.config, seed, layer, device)
    return random_twin(entry.spec.what, seed, layer, entry.model.geometry, device)


def _with_frames(spec: Spec, model: Teacher, first: Entry, device: str) -> Teacher:
    own, wanted = model.geometry.num_frames, first.model.geometry.num_frames
    try:
        if spec.what.startswith(PREFIX):
            raise ConfigError("drawn for its own clips")
        layer = -1 if spec.layer is None else spec.layer
        geometry = replace(model.geometry, num_frames=wanted)
        return load_teacher(spec.what, geometry, device, layer=layer)
    except ConfigError as error:
        raise UserError(
            f"encoder {spec.label!r} takes clips of {own} frames and {first.label!r} of {wanted}: they see "
            "different clips and cannot stand in one table; evaluate them apart"
        ) from error


def load_model(path: str, name: str) -> EncoderTeacher:
    """An encoder of ours by run name or directory, ready to be probed."""
    return EncoderTeacher(load_encoder(run_or_directory(path)), name)


def random_model(config: EncoderConfig, seed: int, layer: int = -1, device: str = "cpu") -> EncoderTeacher:
    """The same architecture, freshly initialised: what the inductive bias alone is worth."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return EncoderTeacher(build_encoder(config), RANDOM, TeacherRequest(device=device, layer=layer))


def random_twin(
    what: str, seed: int, layer: int = -1, geometry: ClipGeometry | None = None, device: str = "cpu"
) -> Teacher:
    """The architecture of any encoder that can be loaded, freshly initialised by its own class.

    Raises `UserError` for a checkpoint whose class transformers cannot make from its config.json.
    """
    folder = _folder(what)
    if family_of(folder) == "pixel":
        return random_model(load_encoder(folder).config, seed, layer, device)
    from transformers import AutoConfig, AutoModel
    from transformers.utils import logging

    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True)
    except (ValueError, OSError, KeyError) as error:
        raise RunError(
            f"there is no random init of {what}: transformers makes no model from its config.json "
            f"({str(error).splitlines()[0][:120]})"
        ) from error
    with tempfile.TemporaryDirectory(prefix="salt-vla-random-") as name, torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        logging.disable_progress_bar()  # Of files that nobody asked for.
        AutoModel.from_config(config).save_pretrained(name)
        for file in folder.glob("*processor_config.json"):  # How pixels are normalised.
            shutil.copy(file, name)
        return load_teacher(name, geometry, device, layer=layer)


def _folder(what: str) -> Path:
    if what in NAMED:
        return NAMED[what].fetch()
    claim, _, rest = what.partition("=")
    place = place_of(rest if claim in NAMED else what)
    return place if place.is_dir() else local_folder(what, "model")


def seed_of(what: str) -> int | None:
    """Of the training that made an encoder, or of its random init; None where nothing says."""
    if what.startswith(PREFIX):
        return split_random(what)[1]
    config = training_of(what)
    return None if config is None else config.seed


def training_of(what: str) -> TrainConfig | None:
    """The settings of the run that an encoder's folder belongs to; None for what no run of ours made."""
    place = run_or_directory(what)
    if not place.is_dir() or family_of(place) != "pixel":
        return None
    if (place / EXPORT).is_file():
        return read_export(place).config
    run = _run_of(place)
    if run is None:
        return None
    return from_json(TrainConfig, run.config_file.read_bytes(), str(run.config_file))


def _run_of(place: Path) -> RunDirectory | None:
    checkpoint = checkpoint_of(encoder_directory(place).resolve())
    run = RunDirectory(checkpoint.parent.parent)
    return run if checkpoint.parent.name == "checkpoints" and run.config_file.is_file() else None


def training_cost(what: str) -> dict[str, float]:
    """`training_steps` and, where its run noted what a step costs, `training_flops`; empty for others."""
    place = run_or_directory(what)
    if not place.is_dir() or family_of(place) != "pixel":
        return {}
    run = _run_of(place)
    if run is None:
        return {}
    step = int(checkpoint_of(encoder_directory(place).resolve()).name.removeprefix("step_"))
    cost = run.path / "cost.json"
    cure = "remove it: all it says is what the run's training cost"
    flops = read_json(cost, dict, cure).get("flops_a_step") if cost.is_file() else None
    if not isinstance(flops, (int, float)):
        return {"training_steps": step}
    return {"training_steps": step, "training_flops": flops * step}


def _place(spec: Spec) -> Path | None:
    place = run_or_directory(spec.what)
    return place if spec.layer is None and place.is_dir() else None


def _pinned(spec: Spec) -> Spec:
    """Of a run, the checkpoint that is its last now: it may train on while it is looked at."""
    place = run_or_directory(spec.what)
    is_run = (place / "checkpoints").is_dir() and family_of(place) == "pixel"
    return replace(spec, what=str(encoder_directory(place))) if is_run else spec


def models_of(entries: Sequence[Entry]) -> dict[str, TokenModel]:
    return {entry.label: entry.model for entry in entries}

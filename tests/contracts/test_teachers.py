"""Every family of teachers in the registry passes this suite; a new one adds a line to `MAKERS`."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from salt_vla.config import ConfigError, DataConfig, ViewConfig
from salt_vla.errors import RunError, UserError
from salt_vla.geometry import ClipGeometry
from salt_vla.jobs.train import train
from salt_vla.recipes import get_recipe
from salt_vla.registry import TEACHERS, resolve
from salt_vla.teachers import Teacher, load_teacher

GEOMETRY = ClipGeometry(num_frames=4, image_size=32, tubelet_size=2, patch_size=16)
DEPTH = 2


def make_salt(dataset: Path, folder: Path) -> Path:
    """A stage-1 run of one step."""
    config = get_recipe("demo_teacher").config
    config = dataclasses.replace(
        config,
        encoder=dataclasses.replace(config.encoder, name="vit_micro", geometry=GEOMETRY, depth=DEPTH),
        predictor=dataclasses.replace(config.predictor, dim=24, depth=1, num_heads=3),
        data=DataConfig(table=str(dataset), view=ViewConfig(frame_stride=2)),
        runtime=dataclasses.replace(config.runtime, device="cpu", precision="float32", threads=1),
        batch_size=4,
    )
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("SALT_VLA_ROOT", str(folder))
        train(config, "made", max_steps=1)
    return folder / "runs" / "made"


def salt_weights(directory: Path) -> Path:
    return next(directory.glob("checkpoints/step_*/encoder.safetensors"))


# family → (makes a teacher's directory from a data set, finds its weights there).
MAKERS: dict[str, tuple[Callable[[Path, Path], Path], Callable[[Path], Path]]] = {
    "salt": (make_salt, salt_weights),
}


def test_every_family_is_made_here() -> None:
    assert set(MAKERS) == set(TEACHERS)


@pytest.fixture(scope="module", params=sorted(TEACHERS))
def family(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def directory(family: str, tiny_dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return MAKERS[family][0](tiny_dataset, tmp_path_factory.mktemp(family))


@pytest.fixture(scope="module")
def teacher(family: str, directory: Path) -> Teacher:
    return resolve(TEACHERS, family)(directory, geometry=None, device="cpu", dtype="float32", layer=None)


@pytest.fixture(scope="module")
def frames() -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    shape = (3, GEOMETRY.num_frames, GEOMETRY.image_size, GEOMETRY.image_size, 3)
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)


def test_it_says_what_it_is(teacher: Teacher) -> None:
    assert isinstance(teacher.name, str) and teacher.name
    assert isinstance(teacher.dim, int) and teacher.dim > 0
    assert isinstance(teacher.num_parameters, int) and teacher.num_parameters > teacher.dim**2
    assert isinstance(teacher.geometry, ClipGeometry)
    assert isinstance(teacher.fingerprint, str) and len(teacher.fingerprint) >= 16


def test_latents_are_one_float_vector_a_token(teacher: Teacher, frames: torch.Tensor) -> None:
    latents = teacher.latents(frames)
    assert latents.shape == (3, teacher.geometry.num_tokens, teacher.dim)
    assert latents.dtype == torch.float32
    assert torch.isfinite(latents).all()
    assert not latents.requires_grad


def test_latents_depend_on_the_clip_and_on_nothing_else(teacher: Teacher, frames: torch.Tensor) -> None:
    before = frames.clone()
    torch.manual_seed(0)
    first = teacher.latents(frames)
    torch.manual_seed(1)
    assert torch.equal(teacher.latents(frames), first)
    assert torch.equal(frames, before)
    alone = torch.cat([teacher.latents(frames[i : i + 1]) for i in range(3)])
    assert torch.allclose(alone, first, atol=1e-4)
    assert not torch.allclose(first[0], first[1], atol=1e-3)


def test_loading_twice_gives_the_same_teacher(
    teacher: Teacher, directory: Path, frames: torch.Tensor
) -> None:
    again = load_teacher(directory, geometry=teacher.geometry)
    assert (again.fingerprint, again.dim, again.geometry) == (
        teacher.fingerprint,
        teacher.dim,
        teacher.geometry,
    )
    assert torch.equal(again.latents(frames), teacher.latents(frames))


def test_the_fingerprint_is_of_the_content_not_of_the_place(
    teacher: Teacher, directory: Path, tmp_path: Path
) -> None:
    moved = shutil.copytree(directory, tmp_path / "moved")
    assert load_teacher(moved).fingerprint == teacher.fingerprint


def test_one_changed_weight_changes_the_fingerprint(
    teacher: Teacher, family: str, directory: Path, tmp_path: Path
) -> None:
    changed = shutil.copytree(directory, tmp_path / "changed")
    file = MAKERS[family][1](changed)
    tensors = load_file(file)
    for name in (min(tensors), max(tensors)):
        tensor = tensors[name].clone()
        tensor.view(-1)[0] += 1e-3
        save_file(tensors | {name: tensor}, file)
        assert load_teacher(changed).fingerprint != teacher.fingerprint, name
    save_file(tensors, file)
    assert load_teacher(changed).fingerprint == teacher.fingerprint


def test_another_geometry_is_refused(teacher: Teacher, directory: Path) -> None:
    for change in ({"num_frames": 8}, {"image_size": 64}, {"patch_size": 8}):
        wanted = dataclasses.replace(teacher.geometry, **change)
        with pytest.raises(ConfigError, match="takes clips of"):
            load_teacher(directory, geometry=wanted)


def test_clips_of_another_shape_are_refused(teacher: Teacher, frames: torch.Tensor) -> None:
    for wrong in (frames[:, :2], frames[:, :, :16, :16]):
        with pytest.raises(ConfigError, match="takes clips of shape"):
            teacher.latents(wrong)


def test_an_earlier_layer_gives_other_latents_under_another_fingerprint(
    teacher: Teacher, directory: Path, frames: torch.Tensor
) -> None:
    earlier = load_teacher(directory, layer=1)
    assert earlier.fingerprint != teacher.fingerprint
    assert earlier.latents(frames).shape == teacher.latents(frames).shape
    assert not torch.allclose(earlier.latents(frames), teacher.latents(frames), atol=1e-3)


@pytest.mark.parametrize("layer", [-1, 0, DEPTH + 1])
def test_a_layer_that_is_not_there_is_refused(directory: Path, layer: int) -> None:
    with pytest.raises(ConfigError, match=f"layer {layer} does not exist; it has layers 1 … {DEPTH}"):
        load_teacher(directory, layer=layer)


def test_lower_precision_is_close_and_has_its_own_fingerprint(
    teacher: Teacher, directory: Path, frames: torch.Tensor
) -> None:
    coarse = load_teacher(directory, dtype="bfloat16")
    exact, rounded = teacher.latents(frames), coarse.latents(frames)
    assert rounded.dtype == torch.float32
    assert torch.nn.functional.cosine_similarity(exact, rounded, dim=-1).min() > 0.98
    assert coarse.fingerprint != teacher.fingerprint
    with pytest.raises(ConfigError, match="dtype is one of float32, bfloat16, float16, not 'float99'"):
        load_teacher(directory, dtype="float99")


def test_a_run_is_found_by_its_name(
    teacher: Teacher, directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SALT_VLA_ROOT", str(directory.parents[1]))
    assert load_teacher(directory.name).fingerprint == teacher.fingerprint


def test_what_is_no_teacher_is_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SALT_VLA_ROOT", str(tmp_path))
    with pytest.raises(RunError, match="there is no teacher 'nobody': neither a directory nor a run in"):
        load_teacher("nobody")
    with pytest.raises(UserError, match="holds no encoder"):
        load_teacher(tmp_path)

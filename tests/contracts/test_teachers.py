"""Every family of teachers in the registry passes this suite; a new one adds a line to `MAKERS`."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from salt_vla.config import DataConfig, ViewConfig
from salt_vla.errors import ConfigError, RunError, UserError
from salt_vla.geometry import ClipGeometry
from salt_vla.jobs.train import train
from salt_vla.recipes import get_recipe
from salt_vla.registry import TEACHERS
from salt_vla.teachers import Teacher, family_of, load_teacher

transformers.logging.set_verbosity_error()
GEOMETRY = ClipGeometry(num_frames=4, image_size=32, tubelet_size=2, patch_size=16)
SIZES = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2}
Source = Path | str


def make_pixel(dataset: Path, folder: Path) -> Path:
    """A stage-1 run of one step."""
    config = get_recipe("demo_teacher").config
    config = dataclasses.replace(
        config,
        encoder=dataclasses.replace(config.encoder, name="vit_micro", geometry=GEOMETRY, depth=2),
        predictor=dataclasses.replace(config.predictor, dim=24, depth=1, num_heads=3),
        data=DataConfig(table=str(dataset), view=ViewConfig(frame_stride=2)),
        runtime=dataclasses.replace(config.runtime, device="cpu", precision="float32", threads=1),
        batch_size=4,
    )
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("SALT_VLA_ROOT", str(folder))
        train(config, "made", max_steps=1)
    return folder / "runs" / "made"


def make_published(config: Any, model: type[Any]) -> Callable[[Path, Path], Path]:
    """Saves a published class with random weights everywhere: biases too, which start at zero."""

    def make(dataset: Path, folder: Path) -> Path:
        torch.manual_seed(0)
        network = model(config)
        with torch.no_grad():
            for parameter in network.parameters():
                parameter.normal_(std=0.2)
        network.save_pretrained(folder / "made")
        return folder / "made"

    return make


def published_weights(directory: Path) -> Path:
    return directory / "model.safetensors"


VIDEOMAE = transformers.VideoMAEConfig(
    **SIZES, intermediate_size=64, image_size=32, num_frames=4, use_mean_pooling=False
)
PREDICTOR = {"pred_hidden_size": 16, "pred_num_hidden_layers": 1, "pred_num_attention_heads": 2}
VJEPA2 = transformers.VJEPA2Config(**SIZES, **PREDICTOR, mlp_ratio=2.0, crop_size=32, frames_per_clip=4)
DINOV2 = transformers.Dinov2Config(**SIZES, mlp_ratio=2, image_size=28, patch_size=14)
EVERYTHING = frozenset({"num_frames", "image_size", "patch_size"})


@dataclass(frozen=True)
class Maker:
    """`make` gives what `load_teacher` takes; `weights` finds the file; `encoder`: how the encoder's tensors
    begin there. `adapts`: fields of the geometry that the family takes as the caller has them."""

    make: Callable[[Path, Path], Source]
    weights: Callable[[Path], Path] | None = published_weights
    encoder: str = ""
    adapts: frozenset[str] = frozenset()


MAKERS = {
    "pixel": Maker(make_pixel, lambda run: next(run.glob("checkpoints/step_*/encoder.safetensors"))),
    "random": Maker(lambda dataset, folder: "random:vit_micro:0", None, adapts=EVERYTHING),
    "videomae": Maker(make_published(VIDEOMAE, transformers.VideoMAEModel)),
    "vjepa2": Maker(
        make_published(VJEPA2, transformers.VJEPA2Model),
        encoder="encoder.",
        adapts=frozenset({"num_frames", "image_size"}),
    ),
    "image": Maker(make_published(DINOV2, transformers.Dinov2Model), adapts=EVERYTHING),
}
every_family = pytest.mark.parametrize("family", sorted(TEACHERS))
families_with_files = pytest.mark.parametrize("family", [f for f in MAKERS if MAKERS[f].weights])


def test_every_family_is_made_here() -> None:
    assert set(MAKERS) == set(TEACHERS)


@pytest.fixture(scope="module")
def sources(tiny_dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Source]:
    return {name: maker.make(tiny_dataset, tmp_path_factory.mktemp(name)) for name, maker in MAKERS.items()}


@pytest.fixture(scope="module")
def teachers(sources: dict[str, Source]) -> dict[str, Teacher]:
    return {name: load_teacher(source, GEOMETRY) for name, source in sources.items()}


@pytest.fixture
def source(family: str, sources: dict[str, Source]) -> Source:
    return sources[family]


@pytest.fixture
def directory(family: str, sources: dict[str, Source]) -> Path:
    return Path(sources[family])


@pytest.fixture
def teacher(family: str, teachers: dict[str, Teacher]) -> Teacher:
    return teachers[family]


def clips_of(geometry: ClipGeometry) -> torch.Tensor:
    shape = (3, geometry.num_frames, geometry.image_size, geometry.image_size, 3)
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def frames() -> torch.Tensor:
    return clips_of(GEOMETRY)


@families_with_files
def test_a_directory_is_known_for_its_family(family: str, directory: Path) -> None:
    assert family_of(directory) == family


@every_family
def test_it_says_what_it_is(teacher: Teacher) -> None:
    assert re.fullmatch(rf".+/block{teacher.depth}/norm", teacher.name)
    assert isinstance(teacher.dim, int) and teacher.dim > 0
    assert isinstance(teacher.num_parameters, int) and teacher.num_parameters > teacher.dim**2
    assert teacher.geometry == GEOMETRY
    assert isinstance(teacher.fingerprint, str) and len(teacher.fingerprint) >= 16


@every_family
def test_latents_are_one_float_vector_a_token(teacher: Teacher, frames: torch.Tensor) -> None:
    latents = teacher.latents(frames)
    assert latents.shape == (3, GEOMETRY.num_tokens, teacher.dim)
    assert latents.dtype == torch.float32
    assert torch.isfinite(latents).all()
    assert not latents.requires_grad


@every_family
def test_latents_depend_on_the_clip_and_on_nothing_else(teacher: Teacher, frames: torch.Tensor) -> None:
    before = frames.clone()
    torch.manual_seed(0)
    first = teacher.latents(frames)
    torch.manual_seed(1)
    assert torch.equal(teacher.latents(frames), first)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(teacher.latents(frames), first)
    assert torch.equal(frames, before)
    alone = torch.cat([teacher.latents(frames[i : i + 1]) for i in range(3)])
    assert torch.allclose(alone, first, atol=1e-4)
    assert not torch.allclose(first[0], first[1], atol=1e-3)


@every_family
def test_every_token_is_of_its_own_place(teacher: Teacher, frames: torch.Tensor) -> None:
    """Time, row, column: a change in one tubelet moves its own token most."""
    _, rows, columns = GEOMETRY.token_grid
    before = teacher.latents(frames[:1])[0]
    for token in range(GEOMETRY.num_tokens):
        t, r, c = token // (rows * columns), token // columns % rows, token % columns
        changed = frames[:1].clone()
        place = (slice(2 * t, 2 * t + 2), slice(16 * r, 16 * r + 16), slice(16 * c, 16 * c + 16))
        changed[0][place] = 255 - changed[0][place]
        moved = (teacher.latents(changed)[0] - before).square().sum(dim=1)
        assert int(moved.argmax()) == token, moved


@every_family
def test_loading_twice_gives_the_same_teacher(teacher: Teacher, source: Source, frames: torch.Tensor) -> None:
    again = load_teacher(source, GEOMETRY)
    for field in ("name", "fingerprint", "dim", "depth", "geometry", "num_parameters"):
        assert getattr(again, field) == getattr(teacher, field), field
    assert torch.equal(again.latents(frames), teacher.latents(frames))


@families_with_files
def test_the_fingerprint_is_of_the_content_not_of_the_place(
    teacher: Teacher, directory: Path, tmp_path: Path
) -> None:
    moved = shutil.copytree(directory, tmp_path / "moved")
    assert load_teacher(moved, GEOMETRY).fingerprint == teacher.fingerprint


@families_with_files
def test_one_changed_weight_changes_the_fingerprint(
    teacher: Teacher, family: str, directory: Path, tmp_path: Path
) -> None:
    changed = shutil.copytree(directory, tmp_path / "changed")
    find = MAKERS[family].weights
    assert find is not None
    tensors = load_file(find(changed))
    names = [name for name in tensors if name.startswith(MAKERS[family].encoder)]
    for name in (min(names), max(names)):
        tensor = tensors[name].clone()
        tensor.view(-1)[0] += 1e-3
        save_file(tensors | {name: tensor}, find(changed))
        assert load_teacher(changed, GEOMETRY).fingerprint != teacher.fingerprint, name
    save_file(tensors, find(changed))
    assert load_teacher(changed, GEOMETRY).fingerprint == teacher.fingerprint


@every_family
@pytest.mark.parametrize("change", [{"num_frames": 8}, {"image_size": 64}, {"patch_size": 8}], ids=str)
def test_another_geometry_is_taken_as_asked_or_refused(
    family: str, teacher: Teacher, source: Source, change: dict[str, int]
) -> None:
    wanted = dataclasses.replace(GEOMETRY, **change)
    if not set(change) <= MAKERS[family].adapts:
        with pytest.raises(ConfigError, match="takes clips of"):
            load_teacher(source, wanted)
        return
    adapted = load_teacher(source, wanted)
    assert adapted.geometry == wanted and adapted.fingerprint != teacher.fingerprint
    assert adapted.latents(clips_of(wanted)).shape == (3, wanted.num_tokens, teacher.dim)


@every_family
def test_clips_of_another_shape_are_refused(teacher: Teacher, frames: torch.Tensor) -> None:
    for wrong in (frames[:, :2], frames[:, :, :16, :16], frames[..., :1], frames.float()):
        with pytest.raises(ConfigError, match="takes clips of shape"):
            teacher.latents(wrong)


@every_family
def test_an_earlier_layer_gives_other_latents_under_another_name_and_fingerprint(
    teacher: Teacher, source: Source, frames: torch.Tensor
) -> None:
    earlier = load_teacher(source, GEOMETRY, layer=1)
    assert earlier.name.endswith("/block1/raw")
    assert (earlier.fingerprint, earlier.num_parameters) != (teacher.fingerprint, teacher.num_parameters)
    assert earlier.num_parameters == teacher.num_parameters
    assert earlier.latents(frames).shape == teacher.latents(frames).shape
    assert not torch.allclose(earlier.latents(frames), teacher.latents(frames), atol=1e-3)
    from_the_end = load_teacher(source, GEOMETRY, layer=-teacher.depth)
    assert (from_the_end.name, from_the_end.fingerprint) == (earlier.name, earlier.fingerprint)
    assert load_teacher(source, GEOMETRY, layer=teacher.depth).fingerprint == teacher.fingerprint


@every_family
def test_without_the_final_norm_it_is_the_raw_stream(
    teacher: Teacher, source: Source, frames: torch.Tensor
) -> None:
    raw = load_teacher(source, GEOMETRY, final_norm="none")
    assert raw.name == teacher.name.replace("/norm", "/raw")
    assert raw.fingerprint != teacher.fingerprint
    assert not torch.allclose(raw.latents(frames), teacher.latents(frames), atol=1e-3)
    with pytest.raises(ConfigError, match="final_norm is model or none, not 'some'"):
        load_teacher(source, GEOMETRY, final_norm="some")  # type: ignore[arg-type]


@every_family
def test_a_layer_that_is_not_there_is_refused(source: Source, teacher: Teacher) -> None:
    for layer in (0, teacher.depth + 1, -teacher.depth - 1):
        with pytest.raises(
            ConfigError, match=f"layer {layer} does not exist; it has layers 1 … {teacher.depth}"
        ):
            load_teacher(source, GEOMETRY, layer=layer)


@every_family
def test_lower_precision_is_close_and_has_its_own_fingerprint(
    teacher: Teacher, source: Source, frames: torch.Tensor
) -> None:
    coarse = load_teacher(source, GEOMETRY, dtype="bfloat16")
    exact, rounded = teacher.latents(frames), coarse.latents(frames)
    assert rounded.dtype == torch.float32
    assert torch.nn.functional.cosine_similarity(exact, rounded, dim=-1).min() > 0.98
    assert coarse.fingerprint != teacher.fingerprint
    with pytest.raises(ConfigError, match="dtype is one of float32, bfloat16, float16, not 'float99'"):
        load_teacher(source, GEOMETRY, dtype="float99")


@every_family
@pytest.mark.parametrize(
    "frames", [None, [], torch.empty(0, 4, 32, 32, 3, dtype=torch.uint8), torch.tensor(1)]
)
def test_what_are_no_clips_is_a_sentence(teacher: Teacher, frames: Any) -> None:
    with pytest.raises(ConfigError, match="takes clips of shape"):
        teacher.latents(frames)


@every_family
@pytest.mark.parametrize("layer", ["x", 2.0, True, None])
def test_a_layer_that_is_no_number_is_refused(source: Source, layer: Any) -> None:
    with pytest.raises(ConfigError, match="a layer is a whole number, not"):
        load_teacher(source, GEOMETRY, layer=layer)


@every_family
def test_a_device_that_is_not_there_is_refused(source: Source) -> None:
    with pytest.raises(ConfigError, match="cannot go to device 'nowhere'"):
        load_teacher(source, GEOMETRY, device="nowhere")
    with pytest.raises(ConfigError, match="cannot go to device 'meta': nothing is computed there"):
        load_teacher(source, GEOMETRY, device="meta")


UNUSED = {"dtype": "nope", "attn_implementation": "x", "return_dict": False, "num_labels": 10**12}
WITH_FILES = [
    ("videomae", {"hidden_dropout_prob": 5}, "describes a network that cannot be built"),
    ("videomae", {"layer_norm_eps": 1e300}, "layer_norm_eps=1e[+]300 is not above 0 and at most 0.01"),
    ("vjepa2", {"layer_norm_eps": 0.0}, "layer_norm_eps=0.0 is not above 0"),
    ("image", {"quantization_config": {"bits": 4}}, "has quantization_config, which changes the numbers"),
    ("vjepa2", {"rope_parameters": {"rope_theta": 5}}, "has rope_parameters, which changes the numbers"),
    ("image", {"image_size": 10**12}, "describes a network that cannot be built"),
]


@pytest.mark.parametrize(("family", "change", "sentence"), WITH_FILES)
def test_a_config_that_cannot_be_is_a_sentence_that_names_it(
    family: str, change: dict[str, Any], sentence: str, directory: Path, tmp_path: Path
) -> None:
    changed = shutil.copytree(directory, tmp_path / "changed")
    said = json.loads((changed / "config.json").read_text())
    (changed / "config.json").write_text(json.dumps(said | change))
    with pytest.raises(RunError, match=rf"config\.json:? {sentence}"):
        load_teacher(changed, GEOMETRY)


@pytest.mark.parametrize("family", ["videomae", "vjepa2", "image"])
def test_what_a_config_says_of_loading_and_of_unused_parts_changes_nothing(
    family: str, directory: Path, teacher: Teacher, frames: torch.Tensor, tmp_path: Path
) -> None:
    changed = shutil.copytree(directory, tmp_path / "changed")
    said = json.loads((changed / "config.json").read_text())
    predictor = {"pred_num_hidden_layers": 10**9, "pred_hidden_size": 0} if family == "vjepa2" else {}
    (changed / "config.json").write_text(json.dumps(said | UNUSED | predictor))
    again = load_teacher(changed, GEOMETRY)
    assert again.fingerprint == teacher.fingerprint
    assert torch.equal(again.latents(frames), teacher.latents(frames))


def test_a_run_is_found_by_its_name(
    sources: dict[str, Source], teachers: dict[str, Teacher], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Path(sources["pixel"])
    monkeypatch.setenv("SALT_VLA_ROOT", str(run.parents[1]))
    found = load_teacher(run.name)
    assert (found.name, found.fingerprint) == ("made/block2/norm", teachers["pixel"].fingerprint)


def test_what_is_no_teacher_is_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SALT_VLA_ROOT", str(tmp_path))
    with pytest.raises(
        RunError, match="there is no encoder or teacher 'nobody': neither a directory nor a run in"
    ):
        load_teacher("nobody")
    with pytest.raises(UserError, match="holds no encoder"):
        load_teacher(tmp_path)


def test_a_name_that_is_nearly_right_is_asked_after(
    sources: dict[str, Source], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Path(sources["pixel"])
    monkeypatch.setenv("SALT_VLA_ROOT", str(run.parents[1]))
    for said in (run.name[:-1] + "_", f"runs/{run.name[:-1]}_"):
        with pytest.raises(RunError, match=rf"\(did you mean .*{run.name}.*\?\): neither"):
            load_teacher(said)
    with pytest.raises(RunError, match="a layer is a whole number, and 'last' is none"):
        load_teacher(f"{run.name}@last")
    with pytest.raises(RunError, match=f"begins with '='; write LABEL={run.name}, or {run.name} alone"):
        load_teacher(f"={run.name}")


def test_a_run_may_be_given_as_its_folder_below_the_root(
    sources: dict[str, Source], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    run = Path(sources["pixel"])
    monkeypatch.setenv("SALT_VLA_ROOT", str(run.parents[1]))
    monkeypatch.chdir(tmp_path)
    assert load_teacher(f"runs/{run.name}").fingerprint == load_teacher(run).fingerprint

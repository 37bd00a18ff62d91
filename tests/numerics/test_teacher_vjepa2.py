"""V-JEPA 2 teachers give what transformers' `VJEPA2Model` gives, from both published layouts, at any size."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import VJEPA2Config, VJEPA2ForVideoClassification, VJEPA2Model

from salt_vla.errors import ConfigError, RunError
from salt_vla.evaluation.teacher_inspection import QueryValueBiases, query_value_biases
from salt_vla.geometry import ClipGeometry
from salt_vla.teachers.base import TeacherRequest
from salt_vla.teachers.convert import convert
from salt_vla.teachers.vjepa2 import VJEPA2Teacher, clip_geometry, load, read_config

TOLERANCE = 1e-5
WIDTH, DEPTH, HEADS = 40, 3, 2  # Heads of 20 channels: 6 a rotary axis, 2 that are not turned.
SMALL = ClipGeometry(num_frames=4, image_size=32, tubelet_size=2, patch_size=16)
GEOMETRIES = (
    SMALL,
    ClipGeometry(num_frames=6, image_size=48, tubelet_size=1, patch_size=8),
    ClipGeometry(num_frames=6, image_size=80, tubelet_size=2, patch_size=16),
)
Films = Callable[..., Tensor]
Pixels = Callable[[Tensor], Tensor]
Shaken = Callable[[nn.Module], Any]


def config_of(geometry: ClipGeometry = SMALL, **changes: Any) -> VJEPA2Config:
    fields: dict[str, Any] = {
        "crop_size": geometry.image_size,
        "patch_size": geometry.patch_size,
        "frames_per_clip": geometry.num_frames,
        "tubelet_size": geometry.tubelet_size,
        "hidden_size": WIDTH,
        "num_hidden_layers": DEPTH,
        "num_attention_heads": HEADS,
        "mlp_ratio": 2.5,
        "num_pooler_layers": 1,
        "pred_hidden_size": 24,
        "pred_num_attention_heads": 2,
        "pred_num_hidden_layers": 1,
        "pred_num_mask_tokens": 2,
    }
    return VJEPA2Config(**fields | changes)


def teacher_in(folder: Path, **request: Any) -> VJEPA2Teacher:
    return load(folder, "taught", TeacherRequest(**request))


def original_weights(model: VJEPA2Model, prefix: str) -> dict[str, Tensor]:
    """The encoder as facebookresearch/vjepa2's vision_transformer.py names it, projections fused."""
    state = model.encoder.state_dict()
    named: dict[str, Tensor] = {}
    for kind in ("weight", "bias"):
        named[f"patch_embed.proj.{kind}"] = state[f"embeddings.patch_embeddings.proj.{kind}"]
        named[f"norm.{kind}"] = state[f"layernorm.{kind}"]
        for number in range(DEPTH):
            ours, theirs = f"layer.{number}", f"blocks.{number}"
            parts = [state[f"{ours}.attention.{part}.{kind}"] for part in ("query", "key", "value")]
            named[f"{theirs}.attn.qkv.{kind}"] = torch.cat(parts)
            named[f"{theirs}.attn.proj.{kind}"] = state[f"{ours}.attention.proj.{kind}"]
            for same in ("norm1", "norm2", "mlp.fc1", "mlp.fc2"):
                named[f"{theirs}.{same}.{kind}"] = state[f"{ours}.{same}.{kind}"]
    return {prefix + key: tensor for key, tensor in named.items()}


def write(folder: Path, tensors: dict[str, Tensor], config: dict[str, Any]) -> Path:
    folder.mkdir(exist_ok=True)
    save_file({key: tensor.clone() for key, tensor in tensors.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def close(ours: Tensor, theirs: Tensor) -> bool:
    return ours.shape == theirs.shape and bool((ours - theirs).abs().max() <= TOLERANCE)


@pytest.fixture(scope="module")
def reference(shaken: Shaken) -> VJEPA2Model:
    return shaken(VJEPA2Model(config_of()))


@pytest.fixture(scope="module")
def folder(reference: VJEPA2Model, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("vjepa2")
    reference.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def expected(reference: VJEPA2Model, films: Films, pixel_values: Pixels) -> Tensor:
    with torch.no_grad():
        return reference.get_vision_features(pixel_values(films(SMALL)))


@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
def test_latents_equal_transformers_at_odd_sizes(
    geometry: ClipGeometry, shaken: Shaken, films: Films, pixel_values: Pixels, tmp_path: Path
) -> None:
    model = shaken(VJEPA2Model(config_of(geometry)))
    model.save_pretrained(tmp_path)
    teacher = teacher_in(tmp_path)
    frames = films(geometry)
    with torch.no_grad():
        theirs = model(pixel_values_videos=pixel_values(frames)).last_hidden_state
    assert close(teacher.latents(frames), theirs)
    assert (teacher.geometry, teacher.dim, teacher.depth) == (geometry, WIDTH, DEPTH)
    assert teacher.num_parameters == sum(p.numel() for p in model.encoder.parameters())
    assert teacher.name == f"taught/block{DEPTH}/norm"


@pytest.mark.parametrize(("num_frames", "image_size"), [(4, 80), (10, 32), (8, 48), (2, 16)])
def test_another_geometry_gets_its_own_positions(
    num_frames: int,
    image_size: int,
    reference: VJEPA2Model,
    folder: Path,
    films: Films,
    pixel_values: Pixels,
) -> None:
    """A class configured for that geometry gives the truth; the one configured for another does not."""
    geometry = dataclasses.replace(SMALL, num_frames=num_frames, image_size=image_size)
    model = VJEPA2Model(config_of(geometry)).eval()
    model.load_state_dict(reference.state_dict())
    teacher = teacher_in(folder, geometry=geometry)
    pixels = pixel_values(films(geometry))
    with torch.no_grad():
        assert close(teacher.latents(films(geometry)), model.get_vision_features(pixels))
        if image_size != SMALL.image_size and geometry.num_tokens > 1:
            assert not close(teacher.latents(films(geometry)), reference.get_vision_features(pixels))
    assert teacher.geometry == geometry
    assert teacher.fingerprint != teacher_in(folder).fingerprint


def test_other_patches_or_tubelets_are_refused(folder: Path) -> None:
    for change in ({"patch_size": 8}, {"tubelet_size": 1}, {"patch_size": 8, "image_size": 40}):
        with pytest.raises(ConfigError, match="teacher taught takes clips of"):
            teacher_in(folder, geometry=dataclasses.replace(SMALL, **change))


@pytest.mark.parametrize("layer", [1, 2, 3, -1, -3])
def test_inner_layers_equal_transformers_hidden_states(
    layer: int, reference: VJEPA2Model, folder: Path, films: Films, pixel_values: Pixels
) -> None:
    frames = films(SMALL)
    with torch.no_grad():
        outputs = reference(pixel_values(frames), skip_predictor=True, output_hidden_states=True)
    block = layer if layer > 0 else DEPTH + 1 + layer
    teacher = teacher_in(folder, layer=layer, final_norm="none")
    assert teacher.name == f"taught/block{block}/raw"
    assert close(teacher.latents(frames), outputs.hidden_states[block])
    assert teacher.num_parameters == teacher_in(folder).num_parameters


def test_the_final_norm_is_in_the_name_and_in_the_fingerprint(folder: Path, films: Films) -> None:
    normed, raw = teacher_in(folder), teacher_in(folder, final_norm="none")
    assert (normed.name, raw.name) == (f"taught/block{DEPTH}/norm", f"taught/block{DEPTH}/raw")
    assert normed.fingerprint != raw.fingerprint
    assert not close(normed.latents(films(SMALL)), raw.latents(films(SMALL)))
    with pytest.raises(ConfigError, match="final_norm is model or none, not 'both'"):
        teacher_in(folder, final_norm="both")


LAYOUTS = {
    "distributed": "module.backbone.",
    "bare": "",
    "whole-checkpoint": "target_encoder.module.backbone.",
    "encoder-alone": "encoder.module.backbone.",
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_original_repositorys_layout_gives_the_same_teacher(
    layout: str, reference: VJEPA2Model, folder: Path, expected: Tensor, films: Films, tmp_path: Path
) -> None:
    tensors = original_weights(reference, LAYOUTS[layout])
    tensors[f"{LAYOUTS[layout]}pos_embed"] = torch.randn(1, 8, WIDTH)  # Rotary models do not use it.
    if layout == "whole-checkpoint":  # Beside the averaged encoder, the trained one and the predictor.
        others = original_weights(reference, "encoder.module.backbone.")
        tensors |= {key: torch.randn_like(tensor) for key, tensor in others.items()}
        tensors["predictor.module.backbone.predictor_blocks.0.norm1.weight"] = torch.ones(24)
    teacher = teacher_in(write(tmp_path, tensors, reference.config.to_dict()))
    assert close(teacher.latents(films(SMALL)), expected)
    assert teacher.fingerprint == teacher_in(folder).fingerprint


def test_a_converted_pickle_gives_the_same_teacher(
    reference: VJEPA2Model, expected: Tensor, films: Films, tmp_path: Path
) -> None:
    """A whole original checkpoint; the key is the one that its authors' loader takes."""
    averaged = original_weights(reference, "module.backbone.")
    trained = {key: torch.randn_like(tensor) for key, tensor in averaged.items()}
    saved = {"encoder": trained, "target_encoder": averaged, "predictor": {"module.x": torch.ones(1)}}
    torch.save(saved, tmp_path / "vitl.pt")
    (tmp_path / "config.json").write_text(json.dumps(reference.config.to_dict()))
    convert(tmp_path / "vitl.pt", tmp_path / "out", key="target_encoder")
    assert close(teacher_in(tmp_path / "out").latents(films(SMALL)), expected)


def test_the_documented_config_is_the_larges(tmp_path: Path) -> None:
    text = (Path(__file__).parents[2] / "docs" / "teachers.md").read_text()
    (said,) = [block for block in re.findall(r"```json\n(.*?)```", text, re.DOTALL) if '"vjepa2"' in block]
    (tmp_path / "config.json").write_text(said)
    config = read_config(tmp_path)
    assert clip_geometry(config, None, "large").num_tokens == 8192
    with torch.device("meta"):
        assert sum(p.numel() for p in VJEPA2Model(config).encoder.parameters()) == 303_885_312


def test_a_classifiers_checkpoint_gives_its_encoder(
    shaken: Shaken, films: Films, pixel_values: Pixels, tmp_path: Path
) -> None:
    model = shaken(VJEPA2ForVideoClassification(config_of(num_labels=5)))
    model.save_pretrained(tmp_path)
    frames = films(SMALL)
    with torch.no_grad():
        theirs = model.vjepa2.get_vision_features(pixel_values(frames))
    assert close(teacher_in(tmp_path).latents(frames), theirs)


def test_the_predictor_is_not_part_of_the_teacher(
    folder: Path, reference: VJEPA2Model, tmp_path: Path
) -> None:
    tensors = load_file(folder / "model.safetensors")
    alone = {key: tensor for key, tensor in tensors.items() if not key.startswith("predictor.")}
    assert len(alone) < len(tensors)
    teacher = teacher_in(write(tmp_path, alone, reference.config.to_dict()))
    assert teacher.fingerprint == teacher_in(folder).fingerprint


def test_query_and_value_biases_arrive(reference: VJEPA2Model, folder: Path, tmp_path: Path) -> None:
    teacher = teacher_in(folder)
    state = reference.encoder.state_dict()
    for key, parameter in teacher.module.state_dict().items():
        assert torch.equal(parameter, state[key]), key
    biases = [state[key] for key in state if key.endswith(("query.bias", "value.bias"))]
    assert query_value_biases(teacher.module) == QueryValueBiases(len(biases), 0)
    zeroed = {
        key: torch.zeros_like(t) if key.endswith(("query.bias", "value.bias")) else t
        for key, t in load_file(folder / "model.safetensors").items()
    }
    without = teacher_in(write(tmp_path, zeroed, reference.config.to_dict()))
    assert query_value_biases(without.module) == QueryValueBiases(len(biases), len(biases))


@pytest.mark.parametrize(
    "key", ["norms_block.3.weight", "module.backbone.video_mod_embed", "patch_embed_img.proj.bias"]
)
def test_a_vjepa_2_1_checkpoint_is_refused_by_name(key: str, reference: VJEPA2Model, tmp_path: Path) -> None:
    tensors = original_weights(reference, "") | {key: torch.zeros(WIDTH)}
    with pytest.raises(
        RunError, match=r"are V-JEPA 2\.1's \(.*\), a network that transformers does not have"
    ):
        teacher_in(write(tmp_path, tensors, reference.config.to_dict()))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_size": 80}, r"hidden_size=80 \(the weights have 40\)"),
        ({"num_hidden_layers": 24}, r"num_hidden_layers=24 \(the weights have 3\)"),
        ({"mlp_ratio": 4}, r"hidden_size × mlp_ratio=160 \(the weights have 100\)"),
        ({"patch_size": 8}, r"patch_size=8 \(the weights have 16\)"),
        ({"num_attention_heads": 3}, "hidden_size=40 is not a multiple of num_attention_heads=3"),
        ({"qkv_bias": False}, r"unexpected layer\.0\.attention\.key\.bias"),
    ],
)
def test_a_config_that_lies_about_the_weights_is_refused(
    change: dict[str, Any], message: str, folder: Path, reference: VJEPA2Model, tmp_path: Path
) -> None:
    config = reference.config.to_dict() | change
    with pytest.raises(RunError, match=message):
        teacher_in(write(tmp_path, load_file(folder / "model.safetensors"), config))


def test_clips_that_cannot_be_are_refused_before_anything_is_built(
    folder: Path, reference: VJEPA2Model, tmp_path: Path
) -> None:
    config = reference.config.to_dict() | {"in_chans": 1}
    with pytest.raises(ConfigError, match="1 colour channels; only square patches of 3 channels"):
        teacher_in(write(tmp_path, load_file(folder / "model.safetensors"), config))
    with pytest.raises(ConfigError, match=r"claims .* tokens a clip"):
        teacher_in(folder, geometry=dataclasses.replace(SMALL, image_size=2**14))


def test_lower_precision_is_close(folder: Path, films: Films, expected: Tensor) -> None:
    coarse = teacher_in(folder, dtype="bfloat16")
    latents = coarse.latents(films(SMALL))
    assert latents.dtype == torch.float32
    assert torch.nn.functional.cosine_similarity(latents, expected, dim=-1).min() > 0.98
    assert coarse.fingerprint != teacher_in(folder).fingerprint

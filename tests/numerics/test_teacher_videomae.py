"""VideoMAE teachers give what transformers' classes give, from every published layout of their weights."""

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
from transformers import (
    VideoMAEConfig,
    VideoMAEForPreTraining,
    VideoMAEForVideoClassification,
    VideoMAEModel,
)
from transformers.models.videomae.modeling_videomae import VideoMAEEncoder

from salt_vla.errors import ConfigError, RunError
from salt_vla.evaluation.teacher_inspection import QueryValueBiases, query_value_biases
from salt_vla.geometry import ClipGeometry
from salt_vla.targets import PixelTargets
from salt_vla.teachers.base import TeacherRequest
from salt_vla.teachers.convert import convert
from salt_vla.teachers.videomae import VideoMAETeacher, clip_geometry, load, read_config

TOLERANCE = 1e-5
WIDTH, DEPTH, HEADS, HIDDEN = 24, 3, 3, 40
SMALL = ClipGeometry(num_frames=4, image_size=32, tubelet_size=2, patch_size=16)
GEOMETRIES = (
    SMALL,
    ClipGeometry(num_frames=6, image_size=48, tubelet_size=1, patch_size=8),
    ClipGeometry(num_frames=6, image_size=80, tubelet_size=2, patch_size=16),
    ClipGeometry(num_frames=2, image_size=42, tubelet_size=2, patch_size=14),
)
Films = Callable[..., Tensor]
Pixels = Callable[[Tensor], Tensor]
Shaken = Callable[[nn.Module], Any]


def config_of(geometry: ClipGeometry = SMALL, **changes: Any) -> VideoMAEConfig:
    fields: dict[str, Any] = {
        "image_size": geometry.image_size,
        "patch_size": geometry.patch_size,
        "num_frames": geometry.num_frames,
        "tubelet_size": geometry.tubelet_size,
        "hidden_size": WIDTH,
        "num_hidden_layers": DEPTH,
        "num_attention_heads": HEADS,
        "intermediate_size": HIDDEN,
        "decoder_hidden_size": 16,
        "decoder_num_hidden_layers": 1,
        "decoder_num_attention_heads": 2,
        "decoder_intermediate_size": 32,
    }
    return VideoMAEConfig(**fields | changes)


def teacher_in(folder: Path, **request: Any) -> VideoMAETeacher:
    return load(folder, "taught", TeacherRequest(**request))


def original_weights(model: VideoMAEModel, prefix: str = "") -> dict[str, Tensor]:
    """The model's weights as MCG-NJU/VideoMAE's modeling_finetune.py names them, projections fused."""
    state = model.state_dict()
    named = {
        f"patch_embed.proj.{kind}": state[f"embeddings.patch_embeddings.projection.{kind}"]
        for kind in ("weight", "bias")
    }
    for number in range(DEPTH):
        ours, theirs = f"encoder.layer.{number}", f"blocks.{number}"
        attention = f"{ours}.attention.attention"
        parts = [state[f"{attention}.{part}.weight"] for part in ("query", "key", "value")]
        named[f"{theirs}.attn.qkv.weight"] = torch.cat(parts)
        named[f"{theirs}.attn.q_bias"] = state[f"{attention}.query.bias"]
        named[f"{theirs}.attn.v_bias"] = state[f"{attention}.value.bias"]
        for kind in ("weight", "bias"):
            named[f"{theirs}.norm1.{kind}"] = state[f"{ours}.layernorm_before.{kind}"]
            named[f"{theirs}.norm2.{kind}"] = state[f"{ours}.layernorm_after.{kind}"]
            named[f"{theirs}.attn.proj.{kind}"] = state[f"{ours}.attention.output.dense.{kind}"]
            named[f"{theirs}.mlp.fc1.{kind}"] = state[f"{ours}.intermediate.dense.{kind}"]
            named[f"{theirs}.mlp.fc2.{kind}"] = state[f"{ours}.output.dense.{kind}"]
    if model.layernorm is not None:
        named |= {f"norm.{kind}": state[f"layernorm.{kind}"] for kind in ("weight", "bias")}
    return {prefix + key: tensor for key, tensor in named.items()}


def finetuned_extras(prefix: str = "") -> dict[str, Tensor]:
    named = {"fc_norm.weight": torch.ones(WIDTH), "fc_norm.bias": torch.zeros(WIDTH)}
    named |= {"head.weight": torch.randn(5, WIDTH), "head.bias": torch.zeros(5)}
    return {prefix + key: tensor for key, tensor in named.items()}


def pretraining_extras(prefix: str = "") -> dict[str, Tensor]:
    named = {
        "decoder.blocks.0.attn.qkv.weight": torch.randn(48, 16),
        "decoder.blocks.0.attn.q_bias": torch.randn(16),
        "decoder.norm.weight": torch.ones(16),
        "decoder.head.weight": torch.randn(8, 16),
        "encoder_to_decoder.weight": torch.randn(16, WIDTH),
        "mask_token": torch.zeros(1, 1, 16),
        "pos_embed": torch.randn(1, SMALL.num_tokens, 16),  # The decoder's: outside `encoder.`.
    }
    return {prefix + key: tensor for key, tensor in named.items()}


def write(folder: Path, tensors: dict[str, Tensor], config: dict[str, Any]) -> Path:
    folder.mkdir(exist_ok=True)
    save_file({key: tensor.clone() for key, tensor in tensors.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def close(ours: Tensor, theirs: Tensor) -> bool:
    return ours.shape == theirs.shape and bool((ours - theirs).abs().max() <= TOLERANCE)


@pytest.fixture(scope="module", params=[True, False], ids=["mean-pooling", "final-norm"])
def reference(request: pytest.FixtureRequest, shaken: Shaken) -> VideoMAEModel:
    return shaken(VideoMAEModel(config_of(use_mean_pooling=request.param)))


@pytest.fixture(scope="module")
def folder(reference: VideoMAEModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("videomae")
    reference.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def expected(reference: VideoMAEModel, films: Films, pixel_values: Pixels) -> Tensor:
    with torch.no_grad():
        return reference(pixel_values(films(SMALL))).last_hidden_state


@pytest.mark.parametrize("pooling", [True, False])
@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
def test_latents_equal_transformers_at_odd_sizes(
    geometry: ClipGeometry, pooling: bool, shaken: Shaken, films: Films, pixel_values: Pixels, tmp_path: Path
) -> None:
    model = shaken(VideoMAEModel(config_of(geometry, use_mean_pooling=pooling)))
    model.save_pretrained(tmp_path)
    teacher = teacher_in(tmp_path, geometry=geometry)
    frames = films(geometry)
    with torch.no_grad():
        theirs = model(pixel_values(frames)).last_hidden_state
    assert close(teacher.latents(frames), theirs)
    assert (teacher.geometry, teacher.dim, teacher.depth) == (geometry, WIDTH, DEPTH)
    assert teacher.num_parameters == sum(parameter.numel() for parameter in model.parameters())
    assert teacher.name == f"taught/block{DEPTH}/{'raw' if pooling else 'norm'}"


@pytest.mark.parametrize("layer", [1, 2, 3, -1, -3])
def test_inner_layers_equal_transformers_hidden_states(
    layer: int, reference: VideoMAEModel, folder: Path, films: Films, pixel_values: Pixels
) -> None:
    frames = films(SMALL)
    with torch.no_grad():
        states = reference(pixel_values(frames), output_hidden_states=True).hidden_states
    block = layer if layer > 0 else DEPTH + 1 + layer
    teacher = teacher_in(folder, layer=layer, final_norm="none")
    assert teacher.name == f"taught/block{block}/raw"
    assert close(teacher.latents(frames), states[block])
    if block < DEPTH:
        normed = teacher_in(folder, layer=layer)  # The final norm is the last block's alone.
        assert torch.equal(normed.latents(frames), teacher.latents(frames))
        assert normed.fingerprint == teacher.fingerprint


@pytest.mark.parametrize("layer", [0, DEPTH + 1, -DEPTH - 1])
def test_a_layer_that_is_not_there_is_refused(layer: int, folder: Path) -> None:
    with pytest.raises(ConfigError, match=f"layer {layer} does not exist; it has layers 1 … {DEPTH}"):
        teacher_in(folder, layer=layer)


LAYOUTS: dict[str, tuple[str, Callable[[str], dict[str, Tensor]]]] = {
    "bare": ("", lambda prefix: {}),
    "finetuned": ("", finetuned_extras),
    "finetuned-module": ("module.", finetuned_extras),
    "v2-hub": ("model.", finetuned_extras),
    "v2-compiled-backbone": ("_orig_mod.backbone.", lambda prefix: {}),
    "pretraining": ("encoder.", lambda prefix: pretraining_extras()),
    "pretraining-module": ("module.encoder.", lambda prefix: pretraining_extras("module.")),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_original_repositories_layouts_give_the_same_teacher(
    layout: str, reference: VideoMAEModel, folder: Path, expected: Tensor, films: Films, tmp_path: Path
) -> None:
    prefix, extras = LAYOUTS[layout]
    tensors = original_weights(reference, prefix) | extras(prefix)
    teacher = teacher_in(write(tmp_path, tensors, reference.config.to_dict()))
    assert close(teacher.latents(films(SMALL)), expected)
    assert teacher.fingerprint == teacher_in(folder).fingerprint


def videomae_v2_config(model: VideoMAEModel) -> dict[str, Any]:
    """config.json of a VideoMAEv2 hub repository (OpenGVLab/VideoMAEv2-Base and its sisters)."""
    inner = {
        "img_size": SMALL.image_size,
        "patch_size": SMALL.patch_size,
        "in_chans": 3,
        "num_classes": 0,
        "embed_dim": WIDTH,
        "depth": DEPTH,
        "num_heads": HEADS,
        "mlp_ratio": HIDDEN / WIDTH,  # 5/3: no float times 24 has to be exactly 40.
        "qkv_bias": True,
        "qk_scale": None,
        "norm_layer": "nn.LayerNorm",
        "layer_norm_eps": model.config.layer_norm_eps,
        "init_values": 0.0,
        "use_learnable_pos_emb": False,
        "tubelet_size": SMALL.tubelet_size,
        "use_mean_pooling": model.config.use_mean_pooling,
        "num_frames": SMALL.num_frames,
        "cos_attn": False,
    }
    auto = {"AutoModel": "modeling_videomaev2.VideoMAEv2", "AutoConfig": "modeling_config.VideoMAEv2Config"}
    return {"model_type": "VideoMAEv2_Base", "auto_map": auto, "model_config": inner}


def test_a_videomae_v2_repository_needs_no_code_of_its_own(
    reference: VideoMAEModel, expected: Tensor, films: Films, tmp_path: Path
) -> None:
    (tmp_path / "modeling_videomaev2.py").write_text("raise SystemExit('remote code was run')")
    tensors = original_weights(reference, "model.") | finetuned_extras("model.")
    teacher = teacher_in(write(tmp_path, tensors, videomae_v2_config(reference)))
    assert close(teacher.latents(films(SMALL)), expected)


def test_the_giants_hidden_width_is_exact(shaken: Shaken, tmp_path: Path) -> None:
    """48/11 of the width, from a ratio that JSON holds rounded either way."""
    model = shaken(VideoMAEModel(config_of(hidden_size=44, num_attention_heads=2, intermediate_size=192)))
    for ratio in (4.3636, 48 / 11, 4.3637):
        config = videomae_v2_config(model)
        config["model_config"] |= {"embed_dim": 44, "num_heads": 2, "mlp_ratio": ratio}
        assert teacher_in(write(tmp_path, original_weights(model, "model."), config)).dim == 44


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"cos_attn": True}, "has cos_attn=True, which VideoMAEModel cannot compute"),
        ({"init_values": 1e-5}, "has init_values=1e-05, which"),
        ({"qk_scale": 0.5}, "has qk_scale=0.5, which"),
        ({"mlp_ratio": "wide"}, "model_config.mlp_ratio is no number"),
    ],
)
def test_what_the_class_cannot_compute_is_refused(
    change: dict[str, Any], message: str, reference: VideoMAEModel, tmp_path: Path
) -> None:
    config = videomae_v2_config(reference)
    config["model_config"] |= change
    with pytest.raises(RunError, match=message):
        teacher_in(write(tmp_path, original_weights(reference, "model."), config))


def test_a_videomae_v2_config_that_lacks_a_field_is_a_sentence(
    reference: VideoMAEModel, tmp_path: Path
) -> None:
    config = videomae_v2_config(reference)
    del config["model_config"]["num_frames"]
    with pytest.raises(RunError, match=r"lacks model_config\.num_frames"):
        teacher_in(write(tmp_path, original_weights(reference, "model."), config))


def test_a_converted_pickle_gives_the_same_teacher(
    reference: VideoMAEModel, expected: Tensor, films: Films, tmp_path: Path
) -> None:
    """A training script's checkpoint: weights under "module", beside an optimizer's state and an epoch."""
    saved = {"module": original_weights(reference) | finetuned_extras(), "epoch": 9, "optimizer": {"lr": 0.1}}
    torch.save(saved, tmp_path / "checkpoint.pth")
    (tmp_path / "settings.json").write_text(json.dumps(reference.config.to_dict()))
    convert(tmp_path / "checkpoint.pth", tmp_path / "out", config=tmp_path / "settings.json")
    assert close(teacher_in(tmp_path / "out").latents(films(SMALL)), expected)


def test_the_documented_config_is_the_giants(tmp_path: Path) -> None:
    text = (Path(__file__).parents[2] / "docs" / "teachers.md").read_text()
    (said,) = [block for block in re.findall(r"```json\n(.*?)```", text, re.DOTALL) if '"videomae"' in block]
    (tmp_path / "config.json").write_text(said)
    config = read_config(tmp_path)
    assert config.intermediate_size == round(1408 * 48 / 11) and config.layer_norm_eps == 1e-6
    assert clip_geometry(config, "giant").token_grid == (8, 16, 16)
    with torch.device("meta"):
        parameters = sum(p.numel() for p in VideoMAEEncoder(config).parameters())
    assert round(parameters / 1e9, 2) == 1.01


def test_a_pretraining_checkpoint_gives_its_encoder(
    shaken: Shaken, films: Films, pixel_values: Pixels, tmp_path: Path
) -> None:
    model = shaken(VideoMAEForPreTraining(config_of(use_mean_pooling=False)))
    model.save_pretrained(tmp_path)
    frames = films(SMALL)
    with torch.no_grad():
        theirs = model.videomae(pixel_values(frames)).last_hidden_state
    assert close(teacher_in(tmp_path).latents(frames), theirs)


def test_a_classifiers_checkpoint_gives_what_stands_before_its_fc_norm(
    shaken: Shaken, films: Films, pixel_values: Pixels, tmp_path: Path
) -> None:
    model = shaken(VideoMAEForVideoClassification(config_of(num_labels=5)))
    model.save_pretrained(tmp_path)
    frames = films(SMALL)
    latents = teacher_in(tmp_path).latents(frames)
    with torch.no_grad():
        logits = model(pixel_values(frames)).logits
        assert close(model.classifier(model.fc_norm(latents.mean(1))), logits)


def masked_labels(model: VideoMAEForPreTraining, pixels: Tensor, mask: Tensor) -> Tensor:
    """The labels that the class keeps to itself, from its loss: ∂MSE/∂logits = 2 (logits − labels) / n."""
    outputs = model(pixels, bool_masked_pos=mask)
    (gradient,) = torch.autograd.grad(outputs.loss, outputs.logits)
    return (outputs.logits - gradient * outputs.logits.numel() / 2).detach()


@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
def test_pixel_targets_are_the_labels_of_videomae(
    geometry: ClipGeometry, shaken: Shaken, films: Films, pixel_values: Pixels
) -> None:
    """Ours hold ImageNet-normalised colours, colour outermost; VideoMAE's are colours in 0 … 1, colour
    innermost, and with `norm_pix_loss` standardised within each colour (ours by the objective, over all)."""
    frames = films(geometry)
    generator = torch.Generator().manual_seed(1)
    order = torch.rand(len(frames), geometry.num_tokens, generator=generator).argsort(dim=1)
    mask = order < geometry.num_tokens // 2  # The same number of tokens in each clip.
    ours = PixelTargets(geometry).targets(frames, None).unflatten(-1, (3, -1)).transpose(-1, -2)
    standard = (ours - ours.mean(-2, keepdim=True)) / (ours.std(-2, keepdim=True) + 1e-6)
    colours = ours * torch.tensor([0.229, 0.224, 0.225]) + torch.tensor([0.485, 0.456, 0.406])
    for norm, wanted in ((False, colours), (True, standard)):
        model = shaken(
            VideoMAEForPreTraining(config_of(geometry, norm_pix_loss=norm, use_mean_pooling=False))
        )
        labels = masked_labels(model, pixel_values(frames), mask)
        wanted = wanted.flatten(-2)[mask].reshape(labels.shape)
        assert (wanted - labels).abs().max() <= 2e-5, norm
        loss = torch.nn.functional.mse_loss(model(pixel_values(frames), bool_masked_pos=mask).logits, wanted)
        assert torch.allclose(loss, model(pixel_values(frames), bool_masked_pos=mask).loss, rtol=TOLERANCE)


def test_query_and_value_biases_arrive(reference: VideoMAEModel, folder: Path, films: Films) -> None:
    state = reference.state_dict()
    biases = [state[key] for key in state if key.endswith(("query.bias", "value.bias"))]
    assert len(biases) == 2 * DEPTH
    teacher = teacher_in(folder)
    assert query_value_biases(teacher.module) == QueryValueBiases(2 * DEPTH, 0)
    for key, parameter in teacher.module.state_dict().items():
        assert torch.equal(parameter, state[key]), key


def test_biases_that_are_zero_in_the_file_are_told(
    reference: VideoMAEModel, folder: Path, films: Films, tmp_path: Path
) -> None:
    tensors = load_file(folder / "model.safetensors")
    zeroed = {k: torch.zeros_like(t) if k.endswith(("q_bias", "v_bias")) else t for k, t in tensors.items()}
    assert sum(key.endswith(("q_bias", "v_bias")) for key in tensors) == 2 * DEPTH
    teacher = teacher_in(write(tmp_path, zeroed, reference.config.to_dict()))
    assert query_value_biases(teacher.module) == QueryValueBiases(2 * DEPTH, 2 * DEPTH)
    healthy = teacher_in(folder)
    assert teacher.fingerprint != healthy.fingerprint
    assert not close(teacher.latents(films(SMALL)), healthy.latents(films(SMALL)))


@pytest.mark.parametrize("stored", [torch.float32, torch.float16, torch.bfloat16])
def test_the_sinusoid_in_a_file_is_recognised(
    stored: torch.dtype, reference: VideoMAEModel, expected: Tensor, films: Films, tmp_path: Path
) -> None:
    table = {"pos_embed": reference.embeddings.position_embeddings.to(stored)}
    written = write(tmp_path, original_weights(reference) | table, reference.config.to_dict())
    assert close(teacher_in(written).latents(films(SMALL)), expected)


@pytest.mark.parametrize("prefix", ["", "encoder."])
def test_another_position_table_is_refused(prefix: str, reference: VideoMAEModel, tmp_path: Path) -> None:
    ours = reference.embeddings.position_embeddings
    swapped = ours.clone()
    swapped[:, [0, 1]] = ours[:, [1, 0]]
    for table in (swapped, ours.flip(1), ours[:, :-1], torch.randn_like(ours)):
        tensors = original_weights(reference, prefix) | {f"{prefix}pos_embed": table.contiguous()}
        with pytest.raises(RunError, match=r"the position table in .* is not the sinusoid"):
            teacher_in(write(tmp_path, tensors, reference.config.to_dict()))


def test_another_geometry_is_refused(folder: Path) -> None:
    for change in ({"num_frames": 8}, {"image_size": 64}, {"patch_size": 8}, {"tubelet_size": 1}):
        with pytest.raises(ConfigError, match="teacher taught takes clips of"):
            teacher_in(folder, geometry=dataclasses.replace(SMALL, **change))


def test_a_norm_that_the_config_denies_is_named(shaken: Shaken, tmp_path: Path) -> None:
    model = shaken(VideoMAEModel(config_of(use_mean_pooling=False)))
    config = model.config.to_dict() | {"use_mean_pooling": True}
    with pytest.raises(RunError, match=r"unexpected layernorm\.bias, layernorm\.weight"):
        teacher_in(write(tmp_path, original_weights(model), config))
    without = {key: t for key, t in original_weights(model).items() if not key.startswith("norm.")}
    with pytest.raises(RunError, match=r"missing layernorm\.bias, layernorm\.weight"):
        teacher_in(write(tmp_path, without, model.config.to_dict()))


def test_layer_scale_is_not_dropped_in_silence(reference: VideoMAEModel, tmp_path: Path) -> None:
    tensors = original_weights(reference) | {"blocks.0.gamma_1": torch.ones(WIDTH)}
    with pytest.raises(RunError, match=r"unexpected encoder\.layer\.0\.gamma_1"):
        teacher_in(write(tmp_path, tensors, reference.config.to_dict()))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_size": 48}, r"hidden_size=48 \(the weights have 24\)"),
        ({"num_hidden_layers": 12}, r"num_hidden_layers=12 \(the weights have 3\)"),
        ({"intermediate_size": 96}, r"intermediate_size=96 \(the weights have 40\)"),
        ({"patch_size": 8}, r"patch_size=8 \(the weights have 16\)"),
        ({"tubelet_size": 1}, r"tubelet_size=1 \(the weights have 2\)"),
        ({"num_attention_heads": 5}, "hidden_size=24 is not a multiple of num_attention_heads=5"),
        ({"hidden_act": "guess"}, "hidden_act='guess' is no activation"),
        ({"hidden_size": "24"}, "is no videomae configuration"),
        ({"qv_bias": False}, r"unexpected encoder\.layer\.0\.attention\.attention\.query\.bias"),
    ],
)
def test_a_config_that_lies_about_the_weights_is_refused(
    change: dict[str, Any], message: str, reference: VideoMAEModel, tmp_path: Path
) -> None:
    config = reference.config.to_dict() | change
    with pytest.raises(RunError, match=message):
        teacher_in(write(tmp_path, original_weights(reference), config))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image_size": 2**20}, "claims .* tokens a clip"),
        ({"image_size": [32, 48]}, "only square ones can be used"),
        ({"num_channels": 1}, "takes 1 colour channels, not 3"),
        ({"num_frames": 0}, "geometry.num_frames must be a positive integer"),
    ],
)
def test_clips_that_cannot_be_are_refused_before_anything_is_built(
    change: dict[str, Any], message: str, reference: VideoMAEModel, tmp_path: Path
) -> None:
    config = reference.config.to_dict() | change
    with pytest.raises(ConfigError, match=message):
        teacher_in(write(tmp_path, original_weights(reference), config))


def test_the_processors_statistics_are_used(reference: VideoMAEModel, films: Films, tmp_path: Path) -> None:
    write(tmp_path, original_weights(reference), reference.config.to_dict())
    ordinary = teacher_in(tmp_path)
    half = {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(half))
    teacher = teacher_in(tmp_path)
    frames = films(SMALL)
    with torch.no_grad():
        pixels = (frames.float() / 127.5 - 1).permute(0, 1, 4, 2, 3)
        assert close(teacher.latents(frames), reference(pixels).last_hidden_state)
    assert teacher.fingerprint != ordinary.fingerprint


def test_precision_and_layer_are_in_the_fingerprint_device_and_path_are_not(folder: Path) -> None:
    requests: list[dict[str, Any]] = [
        {},
        {"dtype": "bfloat16"},
        {"dtype": "float16"},
        {"layer": 1},
        {"layer": 2},
    ]
    assert len({teacher_in(folder, **request).fingerprint for request in requests}) == len(requests)
    assert load(folder, "other", TeacherRequest()).fingerprint == teacher_in(folder).fingerprint


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_lower_precision_is_close_and_really_lower(
    dtype: str, folder: Path, expected: Tensor, films: Films
) -> None:
    teacher = teacher_in(folder, dtype=dtype)
    assert {parameter.dtype for parameter in teacher.module.parameters()} == {getattr(torch, dtype)}
    latents = teacher.latents(films(SMALL))
    assert latents.dtype == torch.float32
    assert torch.nn.functional.cosine_similarity(latents, expected, dim=-1).min() > 0.98
    assert not close(latents, expected)


def test_precision_counts_even_where_rounding_changes_no_weight(
    reference: VideoMAEModel, tmp_path: Path
) -> None:
    rounded = {key: tensor.bfloat16() for key, tensor in original_weights(reference).items()}
    written = write(tmp_path, rounded, reference.config.to_dict())
    assert teacher_in(written).fingerprint != teacher_in(written, dtype="bfloat16").fingerprint


def test_an_autocast_around_the_call_changes_nothing(folder: Path, films: Films) -> None:
    teacher, frames = teacher_in(folder), films(SMALL)
    outside = teacher.latents(frames)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(teacher.latents(frames), outside)


def test_normalised_pixels_in_place_of_frames_are_refused(folder: Path, films: Films) -> None:
    with pytest.raises(ConfigError, match=r"as torch\.uint8, not .* as torch\.float32"):
        teacher_in(folder).latents(films(SMALL).float())


def test_a_device_that_is_not_there_is_a_sentence(folder: Path) -> None:
    with pytest.raises(ConfigError, match="teacher taught cannot go to device 'nowhere'"):
        teacher_in(folder, device="nowhere")

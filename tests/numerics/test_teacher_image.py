"""Image teachers give transformers' own numbers, from every layout in which their weights are published.

Networks are small, of odd sizes, with random weights everywhere: biases and layer scales too, since what is
zero or one hides a wrong mapping. The original layouts are written here from the cited repositories' names.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

from salt_vla.errors import ConfigError, RunError
from salt_vla.evaluation.teacher_inspection import QueryValueBiases, query_value_biases
from salt_vla.geometry import ClipGeometry
from salt_vla.models.pixels import normalise_pixels
from salt_vla.teachers import load_teacher
from salt_vla.teachers.image import FRAMES_AT_ONCE
from salt_vla.teachers.image_weights import PERIODS

transformers.logging.set_verbosity_error()
WIDTH, DEPTH, HEADS = 48, 3, 3
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
HALF = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
GATED = {"use_gated_mlp": True, "hidden_act": "silu"}
# name → class name, settings, tokens before the patches, statistics of pixels, side of pictures at 35 pixels.
TOWERS: dict[str, tuple[str, dict[str, Any], int, Any, int]] = {
    "dinov2": ("Dinov2", {"image_size": 28, "patch_size": 7, "mlp_ratio": 3}, 1, IMAGENET, 35),
    "dinov2_swiglu": ("Dinov2", {"image_size": 35, "patch_size": 7, "use_swiglu_ffn": True}, 1, IMAGENET, 35),
    "registers": ("Dinov2WithRegisters", {"image_size": 35, "patch_size": 7}, 5, IMAGENET, 35),
    "dinov3": ("DINOv3Vit", {"image_size": 35, "patch_size": 5, "num_register_tokens": 4}, 5, IMAGENET, 35),
    "dinov3_gated": ("DINOv3Vit", {"patch_size": 7, **GATED}, 1, IMAGENET, 35),
    "siglip": ("SiglipVision", {"image_size": 42, "patch_size": 7}, 0, HALF, 42),
    "siglip2": ("Siglip2Vision", {"patch_size": 7, "num_patches": 16}, 0, HALF, 35),
}


def build(name: str) -> Any:
    """An eval-mode network whose every parameter is random; its rotary table is the class's own."""
    prefix, settings, _, _, _ = TOWERS[name]
    config_class = {"DINOv3Vit": "DINOv3ViTConfig"}.get(prefix, f"{prefix}Config")
    model_class = {"DINOv3Vit": "DINOv3ViTModel"}.get(prefix, f"{prefix}Model")
    sizes: dict[str, Any] = {"hidden_size": WIDTH, "num_hidden_layers": DEPTH, "num_attention_heads": HEADS}
    if not prefix.startswith("Dinov2"):
        sizes["intermediate_size"] = 72
    config = getattr(transformers, config_class)(**sizes, **settings)
    model = getattr(transformers, model_class)(config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.15)
    return model.eval()


def saved(model: Any, folder: Path) -> Path:
    model.save_pretrained(folder)
    return folder


def with_tensors(model: Any, folder: Path, tensors: dict[str, Tensor]) -> Path:
    """The network's config.json beside other tensors."""
    saved(model, folder)
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, folder / "model.safetensors")
    return folder


def clips(geometry: ClipGeometry, batch: int = 2) -> Tensor:
    shape = (batch, geometry.num_frames, geometry.image_size, geometry.image_size, 3)
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


def pictures_of(frames: Tensor, name: str) -> Tensor:
    """(clips · frames, 3, side, side), normalised by the family's statistics."""
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in TOWERS[name][3])
    return (frames.flatten(0, 1).permute(0, 3, 1, 2) / 255 - mean) / std


def run(model: Any, name: str, pictures: Tensor, **options: Any) -> Any:
    if name != "siglip2":
        return model(pictures, **options)
    patch = model.config.patch_size
    rows, columns = (size // patch for size in pictures.shape[2:])
    patches = pictures.reshape(len(pictures), 3, rows, patch, columns, patch).permute(0, 2, 4, 3, 5, 1)
    return model(
        patches.reshape(len(pictures), rows * columns, -1),
        torch.ones(len(pictures), rows * columns, dtype=torch.long),
        torch.tensor([[rows, columns]] * len(pictures)),
        **options,
    )


@torch.inference_mode()
def reference(model: Any, name: str, frames: Tensor, tubelet: int, hidden: int | None = None) -> Tensor:
    """(clips, tokens, dim) on the tower's own grid: `hidden` block's output, else what the forward gives."""
    prefix = TOWERS[name][2]
    output = run(model, name, pictures_of(frames, name), output_hidden_states=hidden is not None)
    tokens = output.last_hidden_state if hidden is None else output.hidden_states[hidden]
    tokens = tokens[:, prefix:].unflatten(0, (len(frames), -1, tubelet)).mean(dim=2)
    return tokens.flatten(1, 2)


def native(name: str, num_frames: int = 4, tubelet: int = 2) -> ClipGeometry:
    """A geometry whose frames and token grid are the tower's own: nothing is resampled."""
    settings = TOWERS[name][1]
    return ClipGeometry(num_frames, TOWERS[name][4], tubelet, settings["patch_size"])


@pytest.mark.parametrize("name", TOWERS)
def test_tokens_are_those_of_transformers_class(name: str, tmp_path: Path) -> None:
    model, geometry = build(name), native(name)
    teacher = load_teacher(saved(model, tmp_path / "m"), geometry)
    frames = clips(geometry)
    expected = reference(model, name, frames, geometry.tubelet_size)
    assert expected.std() > 0.1
    assert torch.allclose(teacher.latents(frames), expected, atol=1e-5, rtol=0)
    assert (teacher.dim, teacher.depth, teacher.name) == (WIDTH, DEPTH, f"m/block{DEPTH}/norm")


@pytest.mark.parametrize("name", TOWERS)
def test_inner_blocks_and_the_raw_stream_are_transformers_hidden_states(name: str, tmp_path: Path) -> None:
    model, geometry = build(name), native(name)
    folder, frames = saved(model, tmp_path), clips(geometry)
    inner = load_teacher(folder, geometry, layer=2)
    assert inner.name.endswith("/block2/raw")
    expected = reference(model, name, frames, geometry.tubelet_size, hidden=2)
    assert torch.allclose(inner.latents(frames), expected, atol=1e-5, rtol=0)
    raw = load_teacher(folder, geometry, final_norm="none")
    assert raw.name.endswith(f"/block{DEPTH}/raw")
    norm = next(child for child in model.children() if isinstance(child, torch.nn.LayerNorm))
    hidden = reference_raw(model, name, frames)
    assert not torch.allclose(raw.latents(frames), inner.latents(frames), atol=1e-2)
    single = load_teacher(folder, native(name, tubelet=1), final_norm="none").latents(frames).clone()
    assert torch.allclose(single, hidden, atol=1e-5, rtol=0)
    normed = load_teacher(folder, native(name, tubelet=1)).latents(frames)
    assert torch.allclose(norm(single), normed, atol=1e-5, rtol=0)


@torch.inference_mode()
def reference_raw(model: Any, name: str, frames: Tensor) -> Tensor:
    """What reaches the final norm, seen by a hook on it."""
    seen: list[Tensor] = []
    norm = next(child for child in model.children() if isinstance(child, torch.nn.LayerNorm))
    handle = norm.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    run(model, name, pictures_of(frames, name))
    handle.remove()
    return seen[0][:, TOWERS[name][2] :].unflatten(0, (len(frames), -1)).flatten(1, 2)


@pytest.mark.parametrize("name", TOWERS)
def test_bfloat16_is_transformers_bfloat16(name: str, tmp_path: Path) -> None:
    """Parameters in bfloat16, rotary angles in float32, to the last bit."""
    model, geometry = build(name), native(name, tubelet=1)
    folder, frames = saved(model, tmp_path), clips(geometry)
    teacher = load_teacher(folder, geometry, dtype="bfloat16")
    coarse = type(model).from_pretrained(folder, dtype=torch.bfloat16).eval()
    pixels = normalise_pixels(frames, *TOWERS[name][3]).bfloat16().transpose(1, 2).flatten(0, 1)
    with torch.inference_mode():
        tokens = run(coarse, name, pixels).last_hidden_state[:, TOWERS[name][2] :]
    expected = tokens.float().unflatten(0, (len(frames), -1)).flatten(1, 2)
    assert torch.equal(teacher.latents(frames), expected)


def triangle(inner: int, outer: int) -> Tensor:
    """(outer, inner) weights of an antialiased bilinear filter: a tent as wide as the step, cut off."""
    step = max(inner / outer, 1.0)
    centres = (torch.arange(outer, dtype=torch.float64) + 0.5) * inner / outer
    places = torch.arange(inner, dtype=torch.float64) + 0.5
    weights = (1 - (places - centres[:, None]).abs() / step).clamp(min=0)
    return weights / weights.sum(dim=1, keepdim=True)


@pytest.mark.parametrize("size", [28, 56])
def test_another_size_passes_an_antialiased_bilinear_filter(size: int, tmp_path: Path) -> None:
    """SigLIP's 42 pixels and 6 × 6 patches, against clips of another size with 4 × 4 or 8 × 8 tokens."""
    model, geometry = build("siglip"), ClipGeometry(2, size, 2, 7)
    teacher = load_teacher(saved(model, tmp_path), geometry)
    frames = clips(geometry, batch=1)
    down = triangle(size, 42)
    pictures = down @ pictures_of(frames, "siglip").double() @ down.T
    with torch.inference_mode():
        tokens = model(pictures.float()).last_hidden_state.double().mean(dim=0)
    across = triangle(6, size // 7)
    expected = torch.einsum("ir,jc,rcd->ijd", across, across, tokens.unflatten(0, (6, 6))).flatten(0, 1)
    assert torch.allclose(teacher.latents(frames)[0].double(), expected, atol=2e-5, rtol=0)


def test_a_side_that_the_patch_does_not_divide_becomes_the_nearest_that_it_does(tmp_path: Path) -> None:
    teacher = load_teacher(saved(build("dinov2"), tmp_path), ClipGeometry(2, 32, 2, 8))
    assert teacher.side == 35  # 5 patches of 7
    assert teacher.latents(clips(teacher.geometry)).shape == (2, 16, WIDTH)


def test_many_frames_in_bounded_pieces_are_the_frames_one_by_one(tmp_path: Path) -> None:
    geometry = native("dinov2", num_frames=10, tubelet=5)
    teacher = load_teacher(saved(build("dinov2"), tmp_path), geometry)
    frames = clips(geometry, batch=9)
    assert frames.shape[0] * frames.shape[1] > FRAMES_AT_ONCE
    alone = torch.cat([teacher.latents(clip[None]) for clip in frames])
    assert torch.allclose(teacher.latents(frames), alone, atol=1e-5)


def test_the_checkpoints_own_pixel_statistics_win(tmp_path: Path) -> None:
    geometry = native("siglip")
    folder, frames = saved(build("siglip"), tmp_path), clips(geometry)
    before = load_teacher(folder, geometry)
    (folder / "preprocessor_config.json").write_text(
        json.dumps({"image_mean": list(IMAGENET[0]), "image_std": list(IMAGENET[1])})
    )
    after = load_teacher(folder, geometry)
    assert before.fingerprint != after.fingerprint
    assert not torch.allclose(before.latents(frames), after.latents(frames), atol=1e-3)


def test_a_processor_without_statistics_leaves_the_familys(tmp_path: Path) -> None:
    geometry = native("siglip")
    folder = saved(build("siglip"), tmp_path)
    before = load_teacher(folder, geometry)
    (folder / "preprocessor_config.json").write_text('{"do_resize": true, "size": {"height": 42}}')
    after = load_teacher(folder, geometry)
    assert (after.mean, after.std) == HALF and after.fingerprint == before.fingerprint


# The layouts of the original repositories, written out of transformers' classes by hand.


def fused(parts: list[Tensor]) -> Tensor:
    return torch.cat(parts)


def dino_layout(model: Any, name: str) -> dict[str, Tensor]:
    """facebookresearch/dinov2 (`dinov2/models/vision_transformer.py`) or dinov3 (`dinov3/models/…`)."""
    third = name.startswith("dinov3")
    e, tensors = model.embeddings, {}
    tensors["cls_token"], tensors["mask_token"] = e.cls_token, e.mask_token.reshape(1, WIDTH)
    if hasattr(e, "register_tokens") and e.register_tokens.numel():
        tensors["storage_tokens" if third else "register_tokens"] = e.register_tokens
    elif third:
        tensors["storage_tokens"] = e.register_tokens
    patch = e.patch_embeddings if third else e.patch_embeddings.projection
    tensors |= {"patch_embed.proj.weight": patch.weight, "patch_embed.proj.bias": patch.bias}
    if not third:
        tensors["pos_embed"] = e.position_embeddings
    norm = model.norm if third else model.layernorm
    tensors |= {"norm.weight": norm.weight, "norm.bias": norm.bias}
    for number, layer in enumerate(model.model.layer if third else model.encoder.layer):
        a, m, at = layer.attention, layer.mlp, f"blocks.{number}"
        key_bias = torch.full((WIDTH,), 7.0) if third else a.k_proj.bias
        tensors |= {
            f"{at}.norm1.weight": layer.norm1.weight,
            f"{at}.norm1.bias": layer.norm1.bias,
            f"{at}.norm2.weight": layer.norm2.weight,
            f"{at}.norm2.bias": layer.norm2.bias,
            f"{at}.attn.qkv.weight": fused([a.q_proj.weight, a.k_proj.weight, a.v_proj.weight]),
            f"{at}.attn.qkv.bias": fused([a.q_proj.bias, key_bias, a.v_proj.bias]),
            f"{at}.attn.proj.weight": a.o_proj.weight,
            f"{at}.attn.proj.bias": a.o_proj.bias,
            f"{at}.ls1.gamma": layer.layer_scale1.lambda1,
            f"{at}.ls2.gamma": layer.layer_scale2.lambda1,
        }
        if third:
            mask = torch.cat([torch.ones(WIDTH), torch.zeros(WIDTH), torch.ones(WIDTH)])
            tensors[f"{at}.attn.qkv.bias_mask"] = mask
        if not hasattr(m, "gate_proj"):
            first, second = (m.up_proj, m.down_proj) if third else (m.fc1, m.fc2)
            pairs = {"fc1": first, "fc2": second}
        elif third:
            pairs = {"w1": m.gate_proj, "w2": m.up_proj, "w3": m.down_proj}
        else:
            pairs = {"w3": m.down_proj}
            for kind in ("weight", "bias"):
                both = [getattr(m.gate_proj, kind), getattr(m.up_proj, kind)]
                tensors[f"{at}.mlp.w12.{kind}"] = fused(both)
        for part, linear in pairs.items():
            tensors |= {f"{at}.mlp.{part}.weight": linear.weight, f"{at}.mlp.{part}.bias": linear.bias}
    if third:
        head_dim = WIDTH // HEADS
        periods = 100.0 ** (2 * torch.arange(head_dim // 4) / (head_dim // 2))
        tensors[PERIODS] = periods.bfloat16()
    return tensors


def open_clip_layout(model: Any, name: str) -> dict[str, Tensor]:
    """mlfoundations/open_clip with timm's ViT as tower, its text side and pooling head beside it."""
    e, at = model.embeddings, "visual.trunk"
    tensors = {
        f"{at}.patch_embed.proj.weight": e.patch_embedding.weight,
        f"{at}.patch_embed.proj.bias": e.patch_embedding.bias,
        f"{at}.pos_embed": e.position_embedding.weight[None],
        f"{at}.norm.weight": model.post_layernorm.weight,
        f"{at}.norm.bias": model.post_layernorm.bias,
        f"{at}.attn_pool.latent": torch.ones(1, 1, WIDTH),
        f"{at}.attn_pool.kv.weight": torch.ones(2 * WIDTH, WIDTH),
        "text.token_embedding.weight": torch.ones(5, WIDTH),
        "logit_scale": torch.ones(()),
        "logit_bias": torch.ones(()),
    }
    for number, layer in enumerate(model.encoder.layers):
        a, block = layer.self_attn, f"{at}.blocks.{number}"
        modules = {"norm1": layer.layer_norm1, "norm2": layer.layer_norm2, "attn.proj": a.out_proj}
        modules |= {"mlp.fc1": layer.mlp.fc1, "mlp.fc2": layer.mlp.fc2}
        for kind in ("weight", "bias"):
            parts = [getattr(linear, kind) for linear in (a.q_proj, a.k_proj, a.v_proj)]
            tensors[f"{block}.attn.qkv.{kind}"] = fused(parts)
            tensors |= {f"{block}.{part}.{kind}": getattr(module, kind) for part, module in modules.items()}
    return tensors


def own_names(model: Any, name: str) -> dict[str, Tensor]:
    """The installed version's module names, which differ from those in its files."""
    return dict(model.state_dict())


def in_a_bigger_model(model: Any, name: str) -> dict[str, Tensor]:
    """Below a classifier's prefix, with its head."""
    prefix = "dinov2." if name.startswith("dinov2") else "dinov2_with_registers."
    return {prefix + key: tensor for key, tensor in model.state_dict().items()} | {
        "classifier.weight": torch.ones(2, 2 * WIDTH),
        "classifier.bias": torch.ones(2),
    }


LAYOUTS: list[tuple[str, Callable[[Any, str], dict[str, Tensor]]]] = [
    *((name, dino_layout) for name in TOWERS if not name.startswith("siglip")),
    ("siglip", open_clip_layout),
    *((name, own_names) for name in TOWERS),
    *((name, in_a_bigger_model) for name in ("dinov2", "registers")),
]


@pytest.mark.parametrize(("name", "layout"), LAYOUTS, ids=[f"{n}-{f.__name__}" for n, f in LAYOUTS])
def test_other_layouts_give_the_same_numbers(
    name: str, layout: Callable[[Any, str], dict[str, Tensor]], tmp_path: Path
) -> None:
    model, geometry = build(name), native(name)
    tensors = {key: tensor.detach() for key, tensor in layout(model, name).items()}
    saved(model, tmp_path / "published")
    assert set(tensors) != set(load_file(tmp_path / "published" / "model.safetensors")) or layout is own_names
    teacher = load_teacher(with_tensors(model, tmp_path / "original", tensors), geometry)
    frames = clips(geometry)
    expected = reference(model, name, frames, geometry.tubelet_size)
    assert torch.allclose(teacher.latents(frames), expected, atol=1e-5, rtol=0)
    assert teacher.fingerprint == load_teacher(tmp_path / "published", geometry).fingerprint


def test_the_vision_tower_of_a_whole_siglip_is_taken(tmp_path: Path) -> None:
    vision = build("siglip")
    text = {"hidden_size": 24, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.SiglipConfig(
        vision_config=vision.config.to_dict(), text_config=text | {"vocab_size": 9}
    )
    whole = transformers.SiglipModel(config)
    whole.vision_model.load_state_dict(vision.state_dict())
    geometry = native("siglip")
    teacher = load_teacher(saved(whole, tmp_path), geometry)
    frames = clips(geometry)
    assert torch.allclose(teacher.latents(frames), reference(vision, "siglip", frames, 2), atol=1e-5, rtol=0)
    head = sum(parameter.numel() for parameter in vision.head.parameters())
    assert teacher.num_parameters == sum(p.numel() for p in vision.parameters()) - head


def test_query_and_value_biases_arrive_and_their_loss_shows(tmp_path: Path) -> None:
    model = build("dinov3")
    teacher = load_teacher(saved(model, tmp_path / "a"), native("dinov3"))
    attention = [layer.attention for layer in model.model.layer]
    assert query_value_biases(teacher.module) == QueryValueBiases(2 * len(attention), 0)
    with torch.no_grad():
        for a in attention:
            a.q_proj.bias.zero_(), a.v_proj.bias.zero_()
    without = load_teacher(saved(model, tmp_path / "b"), native("dinov3"))
    assert query_value_biases(without.module) == QueryValueBiases(2 * len(attention), 2 * len(attention))


# What is not whole, or not what it says.


def changed_config(folder: Path, **changes: Any) -> Path:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))
    return folder


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("siglip", {"num_hidden_layers": 2}, r"num_hidden_layers=2 \(the weights have 3\)"),
        ("dinov2", {"hidden_size": 96}, r"hidden_size=96 \(the weights have 48\)"),
        ("dinov2", {"patch_size": 14}, r"patch_size=14 \(the weights have 7\)"),
        ("siglip", {"image_size": 84}, "position_embedding.weight is"),
        ("dinov2", {"mlp_ratio": 4}, "mlp.fc1"),
        ("dinov2", {"num_attention_heads": 5}, "not a multiple of num_attention_heads=5"),
        ("dinov2", {"image_size": [28, 35]}, "only square pictures"),
        ("dinov2", {"hidden_size": "wide"}, "is no dinov2 configuration"),
        ("dinov3", {"num_register_tokens": 2}, "register_tokens is"),
        ("dinov2", {"model_type": "dinov2_tiny"}, "image towers are dinov2, "),
        ("dinov3", {"num_hidden_layers": 10**12}, "num_hidden_layers=1000000000000, more than any network"),
        ("dinov3", {"num_attention_heads": 24}, "need a multiple of 4 channels a head.*, not 2 and"),
        ("dinov3", {"rope_theta": 0.0}, "rope_theta above 0, not 16 and 0.0"),
        ("siglip2", {"patch_size": 10**12}, r"patch_size=1000000000000 \(the weights have 7\)"),
        ("siglip", {"model_type": "siglip"}, "must hold an object 'vision_config'"),
    ],
)
def test_a_config_that_does_not_fit_is_refused(
    name: str, changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises((RunError, ConfigError), match=message):
        load_teacher(changed_config(saved(build(name), tmp_path), **changes), ClipGeometry(2, 32, 2, 8))


@pytest.mark.parametrize("name", ["dinov3", "siglip"])
def test_missing_and_unexpected_tensors_are_named(name: str, tmp_path: Path) -> None:
    model = build(name)
    tensors = load_file(saved(model, tmp_path) / "model.safetensors")
    gone = next(key for key in tensors if key.endswith("norm2.bias"))
    with pytest.raises(RunError, match=r"missing .*norm2\.bias"):
        load_teacher(with_tensors(model, tmp_path, {k: v for k, v in tensors.items() if k != gone}))
    with pytest.raises(RunError, match=r"unexpected adapter\.weight"):
        load_teacher(with_tensors(model, tmp_path, tensors | {"adapter.weight": torch.ones(2)}))


def test_a_bias_of_keys_without_dinov3s_mask_is_not_dropped_in_silence(tmp_path: Path) -> None:
    model = build("dinov3")
    tensors = {k: v.detach() for k, v in dino_layout(model, "dinov3").items() if not k.endswith("bias_mask")}
    with pytest.raises(RunError, match=r"unexpected blocks\.0\.attn\.k\.bias"):
        load_teacher(with_tensors(model, tmp_path, tensors), native("dinov3"))


def test_rotary_periods_of_another_base_are_refused(tmp_path: Path) -> None:
    model = build("dinov3")
    tensors = {key: tensor.detach() for key, tensor in dino_layout(model, "dinov3").items()}
    tensors[PERIODS] = tensors[PERIODS] * 1.5
    with pytest.raises(RunError, match=r"rotary periods .* rope_theta=100\.0"):
        load_teacher(with_tensors(model, tmp_path, tensors), native("dinov3"))


def test_two_networks_in_one_file_are_refused(tmp_path: Path) -> None:
    model = build("dinov2")
    tensors = dict(model.state_dict())
    both = tensors | {f"module.{key}": tensor.clone() for key, tensor in tensors.items()}
    with pytest.raises(RunError, match="two networks"):
        load_teacher(with_tensors(model, tmp_path, both), native("dinov2"))

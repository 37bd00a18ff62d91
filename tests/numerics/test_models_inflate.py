"""An inflated encoder computes on a film of equal frames what the image model computes on one of them."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import xxhash
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import ViTConfig, ViTModel

from salt_vla.config import EncoderConfig
from salt_vla.errors import RunError
from salt_vla.geometry import ClipGeometry
from salt_vla.models import VideoEncoder, build_encoder, patchify
from salt_vla.models.inflate import initial_weights, provenance_of_start, starting_weights
from salt_vla.models.loading import save_encoder

GRID = ClipGeometry(num_frames=6, image_size=32, tubelet_size=2, patch_size=8)  # 3 × 4 × 4 tokens
CONFIG = EncoderConfig(name="vit_micro", geometry=GRID, depth=3)
Shaken = Callable[[nn.Module], ViTModel]


@pytest.fixture(scope="module")
def image_model(shaken: Shaken) -> ViTModel:
    config = ViTConfig(
        hidden_size=128,
        num_hidden_layers=3,
        num_attention_heads=4,
        intermediate_size=512,
        image_size=32,
        patch_size=8,
        layer_norm_eps=1e-6,
    )
    return shaken(ViTModel(config, add_pooling_layer=False))


def timm_layout(model: ViTModel) -> dict[str, Tensor]:
    """The image model's weights as timm names them, with a classifier that no video encoder has."""
    plain = {
        r"^embeddings\.patch_embeddings\.projection": "patch_embed.proj",
        r"^embeddings\.cls_token": "cls_token",
        r"^embeddings\.position_embeddings": "pos_embed",
        r"^(?:encoder\.layer|layers)\.": "blocks.",
        r"^layernorm\.": "norm.",
        r"\.layernorm_before\.": ".norm1.",
        r"\.layernorm_after\.": ".norm2.",
        r"\.attention\.(?:output\.dense|o_proj)\.": ".attn.proj.",
        r"\.(?:intermediate\.dense|mlp\.fc1)\.": ".mlp.fc1.",
        r"\.(?:output\.dense|mlp\.fc2)\.": ".mlp.fc2.",
        r"\.attention\.(?:attention\.)?(?:query|q_proj)\.": ".attn.q.",
        r"\.attention\.(?:attention\.)?(?:key|k_proj)\.": ".attn.k.",
        r"\.attention\.(?:attention\.)?(?:value|v_proj)\.": ".attn.v.",
    }
    named: dict[str, Tensor] = {}
    for name, tensor in model.state_dict().items():
        for theirs, ours in plain.items():
            name = re.sub(theirs, ours, name)
        named[name] = tensor.clone()
    for block in range(3):
        for kind in ("weight", "bias"):
            parts = [named.pop(f"blocks.{block}.attn.{part}.{kind}") for part in "qkv"]
            named[f"blocks.{block}.attn.qkv.{kind}"] = torch.cat(parts)
    return named | {"head.weight": torch.randn(10, 128), "head.bias": torch.zeros(10)}


@pytest.fixture
def file(image_model: ViTModel, tmp_path: Path) -> Path:
    save_file(timm_layout(image_model), tmp_path / "vit.safetensors")
    return tmp_path / "vit.safetensors"


def inflated(file: Path, **changes: object) -> VideoEncoder:
    encoder = build_encoder(replace(CONFIG, **changes)).eval()  # type: ignore[arg-type]
    initial_weights(file, encoder)
    return encoder


def without_positions(file: Path) -> VideoEncoder:
    encoder = inflated(file, positions="sincos")
    encoder.positions.zero_()  # type: ignore[operator]
    return encoder


def standing_still(picture: Tensor) -> Tensor:
    """(batch, 3, H, W) → a film of equal frames."""
    return picture.unsqueeze(2).expand(-1, -1, GRID.num_frames, -1, -1)


def pictures() -> Tensor:
    return torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(3))


@torch.no_grad()
def test_each_token_of_a_still_film_has_the_image_models_patch_embedding(
    file: Path, image_model: ViTModel
) -> None:
    tokens = inflated(file).patch_embed(patchify(standing_still(pictures()), GRID))
    theirs = image_model.embeddings.patch_embeddings(pictures())
    torch.testing.assert_close(tokens, theirs.repeat(1, 3, 1), atol=1e-5, rtol=0)


@torch.no_grad()
def test_a_still_film_passes_all_blocks_as_its_picture_passes_the_image_model(
    file: Path, image_model: ViTModel
) -> None:
    """Positions off, and no class token: each token then attends to three copies of what the picture's does,
    which is the same attention."""
    hidden = image_model.embeddings.patch_embeddings(pictures())
    for name, module in image_model.named_modules():
        if re.fullmatch(r"(encoder\.layer|layers)\.\d+", name):
            given = module(hidden)
            hidden = given[0] if isinstance(given, tuple) else given
    theirs = image_model.layernorm(hidden)
    ours = without_positions(file)(standing_still(pictures()))
    torch.testing.assert_close(ours, theirs.repeat(1, 3, 1), atol=1e-4, rtol=0)
    moving = standing_still(pictures()).clone()
    moving[:, :, 3:] *= 0.5
    assert (without_positions(file)(moving) - ours).abs().max() > 0.01


@torch.no_grad()
def test_a_kernel_over_tubelets_is_taken_as_it_is(file: Path, image_model: ViTModel, tmp_path: Path) -> None:
    tensors = timm_layout(image_model)
    kernel = torch.randn(128, 3, 2, 8, 8)
    save_file(tensors | {"patch_embed.proj.weight": kernel}, tmp_path / "video.safetensors")
    film = torch.randn(2, 3, 6, 32, 32)
    ours = inflated(tmp_path / "video.safetensors").patch_embed(patchify(film, GRID))
    theirs = F.conv3d(film, kernel, tensors["patch_embed.proj.bias"], stride=(2, 8, 8))
    torch.testing.assert_close(ours, theirs.flatten(2).transpose(1, 2), atol=1e-4, rtol=0)


def test_what_is_left_out_is_said(file: Path) -> None:
    said = starting_weights(file, CONFIG).note
    assert said == f"the encoder starts from {file}; left out: cls_token, head, pos_embed"


def test_half_precision_weights_become_float32(image_model: ViTModel, tmp_path: Path) -> None:
    halved = {name: tensor.half() for name, tensor in timm_layout(image_model).items()}
    save_file(halved, tmp_path / "half.safetensors")
    encoder = inflated(tmp_path / "half.safetensors")
    assert {p.dtype for p in encoder.parameters()} == {torch.float32}
    assert torch.equal(encoder.norm.weight, halved["norm.weight"].float())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"geometry": replace(GRID, patch_size=16)},
            r"tensor patch_embed\.proj\.weight is \(128, 3, 8, 8\) and has to be \(128, 3, 16, 16\)",
        ),
        ({"name": "vit_tiny"}, r"tensor patch_embed\.weight is \(128, 384\) and has to be \(192, 384\)"),
        ({"depth": 4}, r"it has no tensor blocks\.3\.norm1\.weight; a file must be in timm's layout"),
        ({"depth": 2}, r"its tensor blocks\.2\.attn\.proj\.bias has no place here"),
    ],
)
def test_weights_of_another_shape_are_refused_by_the_tensors_name(
    file: Path, changes: dict[str, object], message: str
) -> None:
    config = replace(CONFIG, **changes)  # type: ignore[arg-type]
    with pytest.raises(RunError, match=f"{config.name} cannot start from .*vit.safetensors: {message}"):
        starting_weights(file, config)


def test_other_layouts_and_absent_files_are_refused_in_words(tmp_path: Path, image_model: ViTModel) -> None:
    save_file({n: t.clone() for n, t in image_model.state_dict().items()}, tmp_path / "other.safetensors")
    with pytest.raises(RunError, match=r"has no tensor patch_embed\.weight; a file must be in timm's layout"):
        starting_weights(tmp_path / "other.safetensors", CONFIG)
    with pytest.raises(RunError, match=r"none\.safetensors are missing or damaged"):
        starting_weights(tmp_path / "none.safetensors", CONFIG)
    with pytest.raises(RunError, match=r"start_from: .*none\.safetensors cannot be read"):
        provenance_of_start(tmp_path / "none.safetensors")


def test_an_encoder_of_ours_is_begun_with_as_it_is(tmp_path: Path) -> None:
    """At another number of frames and other positions too, since neither is in the weights."""
    torch.manual_seed(4)
    theirs = build_encoder(CONFIG)
    save_encoder(theirs.state_dict(), theirs.config, tmp_path)
    longer = build_encoder(replace(CONFIG, geometry=replace(GRID, num_frames=12), positions="sincos"))
    initial_weights(tmp_path, longer)
    assert all(torch.equal(t, theirs.state_dict()[name]) for name, t in longer.state_dict().items())
    assert all(parameter.requires_grad for parameter in longer.parameters())
    assert starting_weights(tmp_path, CONFIG).note == f"the encoder starts from {tmp_path}"
    assert "whose positions were rope and are sincos now" in starting_weights(tmp_path, longer.config).note
    with pytest.raises(RunError, match=r"its tensor blocks\.2\..* has no place here"):
        starting_weights(tmp_path, replace(CONFIG, depth=2))


def test_the_start_is_known_by_its_bytes(file: Path, tmp_path: Path) -> None:
    told = provenance_of_start(file)
    assert told == {"weights": xxhash.xxh3_128_hexdigest(file.read_bytes())}
    theirs = build_encoder(CONFIG)
    (tmp_path / "export").mkdir()
    save_encoder(theirs.state_dict(), theirs.config, tmp_path / "export")
    assert provenance_of_start(tmp_path / "export") != told

"""The encoder computes what it is shown and nothing else, in the order that the geometry names."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from salt_vla.config import EncoderConfig
from salt_vla.errors import ConfigError
from salt_vla.geometry import ClipGeometry
from salt_vla.models import VideoEncoder, build_encoder, gather_tokens, patchify
from salt_vla.models.attention import Attention, Block, rotation
from salt_vla.models.encoder import SIZES, vit_size
from salt_vla.models.pixels import MEAN, STD, normalise_pixels

GRID = ClipGeometry(num_frames=6, image_size=32, tubelet_size=2, patch_size=8)  # 3 × 4 × 4 tokens
POSITIONS = ("rope", "sincos")


def encoder_of(positions: str = "rope", **changes: object) -> VideoEncoder:
    torch.manual_seed(0)
    config = EncoderConfig(name="vit_micro", geometry=GRID, positions=positions, depth=2)  # type: ignore[arg-type]
    return build_encoder(replace(config, **changes))  # type: ignore[arg-type]


def pixels_of(batch: int = 2, geometry: ClipGeometry = GRID) -> Tensor:
    size = (batch, 3, geometry.num_frames, geometry.image_size, geometry.image_size)
    return torch.randn(size, generator=torch.Generator().manual_seed(1))


def random_ids(batch: int, count: int, seed: int = 2) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    rows = [torch.randperm(GRID.num_tokens, generator=generator)[:count].sort().values for _ in range(batch)]
    return torch.stack(rows)


def tubelet(token: int) -> tuple[slice, slice, slice]:
    """Where in (frames, rows, columns) of pixels a token's tubelet lies, counted the slow way."""
    places = [(t, r, c) for t in range(3) for r in range(4) for c in range(4)]
    t, r, c = places[token]
    return slice(2 * t, 2 * t + 2), slice(8 * r, 8 * r + 8), slice(8 * c, 8 * c + 8)


@pytest.mark.parametrize("positions", POSITIONS)
def test_full_clip_gives_every_token(positions: str) -> None:
    encoder = encoder_of(positions)
    assert encoder(pixels_of()).shape == (2, GRID.num_tokens, encoder.dim)


@pytest.mark.parametrize("positions", POSITIONS)
def test_context_gives_its_own_tokens(positions: str) -> None:
    encoder = encoder_of(positions)
    assert encoder(pixels_of(), random_ids(2, 7)).shape == (2, 7, encoder.dim)


@pytest.mark.parametrize("positions", POSITIONS)
def test_all_ids_as_context_are_the_full_clip(positions: str) -> None:
    encoder = encoder_of(positions)
    ids = torch.arange(GRID.num_tokens).expand(2, -1)
    torch.testing.assert_close(encoder(pixels_of(), ids), encoder(pixels_of()))


@pytest.mark.parametrize("positions", POSITIONS)
def test_hidden_pixels_cannot_change_a_context(positions: str) -> None:
    """Bit for bit, and even where they are not numbers."""
    encoder, pixels, ids = encoder_of(positions), pixels_of(), random_ids(2, 7)
    expected = encoder(pixels, ids)
    for row in range(2):
        for token in set(range(GRID.num_tokens)) - set(ids[row].tolist()):
            pixels[row, :, *tubelet(token)] = torch.nan
    assert torch.equal(encoder(pixels, ids), expected)


@pytest.mark.parametrize("positions", POSITIONS)
def test_order_of_context_is_immaterial(positions: str) -> None:
    encoder, ids = encoder_of(positions), random_ids(2, 7)
    order = torch.tensor([3, 0, 6, 2, 5, 1, 4])
    shuffled = encoder(pixels_of(), ids[:, order])
    torch.testing.assert_close(shuffled, encoder(pixels_of(), ids)[:, order])


@pytest.mark.parametrize("positions", POSITIONS)
def test_where_a_token_stands_matters(positions: str) -> None:
    """Two contexts of the same pixels, one dark and one bright tubelet: only positions tell them apart."""
    encoder, halves = encoder_of(positions), torch.ones(1, 3, 6, 32, 32)
    halves[..., :16] = -1
    near, far = (encoder(halves, torch.tensor([ids])) for ids in ([0, 3], [0, 47]))
    assert (near - far).abs().max() > 1e-4


def test_tokens_stand_in_the_order_of_the_geometry() -> None:
    """One tubelet's pixels reach one token's patch embedding: time, row, column."""
    encoder, pixels = encoder_of(), pixels_of(1)
    before = encoder.patch_embed(patchify(pixels, GRID))
    for token in range(GRID.num_tokens):
        changed = pixels.clone()
        changed[:, :, *tubelet(token)] += 1
        differs = (encoder.patch_embed(patchify(changed, GRID)) != before).any(dim=-1)
        assert differs.nonzero()[:, 1].tolist() == [token]


def test_patch_embedding_is_a_strided_convolution() -> None:
    encoder, pixels = encoder_of(), pixels_of()
    convolution = nn.Conv3d(3, encoder.dim, kernel_size=(2, 8, 8), stride=(2, 8, 8))
    with torch.no_grad():
        convolution.weight.copy_(encoder.patch_embed.weight.view_as(convolution.weight))
        convolution.bias.copy_(encoder.patch_embed.bias)  # type: ignore[union-attr]
    expected = convolution(pixels).flatten(2).transpose(1, 2)
    torch.testing.assert_close(encoder.patch_embed(patchify(pixels, GRID)), expected, atol=1e-5, rtol=1e-5)


def test_gather_tokens_picks_rows() -> None:
    x = torch.arange(24).reshape(2, 4, 3)
    ids = torch.tensor([[3, 0], [1, 1]])
    assert torch.equal(gather_tokens(x, ids), torch.stack([x[0, [3, 0]], x[1, [1, 1]]]))
    assert torch.equal(gather_tokens(x[:1], ids), torch.stack([x[0, [3, 0]], x[0, [1, 1]]]))


def test_padded_context_does_not_change_the_rest() -> None:
    """Padding repeats whatever id; marked invalid it is not attended to."""
    encoder, pixels, ids = encoder_of(), pixels_of(), random_ids(2, 7)
    padded = torch.cat([ids, torch.tensor([[0, 0, 5], [9, 9, 9]])], dim=1)
    valid = torch.arange(10).expand(2, -1) < 7
    torch.testing.assert_close(encoder(pixels, padded, valid)[:, :7], encoder(pixels, ids))
    assert not torch.allclose(encoder(pixels, padded)[:, :7], encoder(pixels, ids))


@pytest.mark.parametrize("positions", POSITIONS)
def test_no_gradient_flows_from_padding(positions: str) -> None:
    """Token 47 is in no context: as padding it learns nothing and teaches nothing."""
    encoder = encoder_of(positions)
    tubelets = patchify(pixels_of(), GRID).requires_grad_()
    ids = torch.cat([random_ids(2, 7), torch.full((2, 2), 47)], dim=1)
    assert not (ids[:, :7] == 47).any()
    valid = torch.arange(9).expand(2, -1) < 7
    encoder.encode_tubelets(tubelets, ids, valid)[:, :7].square().sum().backward()
    assert tubelets.grad is not None
    assert not tubelets.grad[:, 47].any()
    seen = gather_tokens(tubelets.grad, ids[:, :7])
    assert seen.any(dim=-1).all()


@pytest.mark.parametrize("positions", POSITIONS)
def test_stochastic_depth_rests_in_eval(positions: str) -> None:
    dropping, plain = encoder_of(positions, drop_path=0.5).eval(), encoder_of(positions).eval()
    assert torch.equal(dropping(pixels_of()), plain(pixels_of()))


def test_stochastic_depth_drops_whole_clips_and_keeps_the_mean() -> None:
    torch.manual_seed(3)
    block = Block(dim=8, num_heads=2, mlp_ratio=2.0, drop_path=0.25)
    branch = torch.ones(4000, 3, 8)
    kept = block._drop(branch)
    assert kept.unique().tolist() == pytest.approx([0, 1 / 0.75])
    assert torch.equal(kept, kept[:, :1, :1].expand_as(kept))
    assert kept.mean().item() == pytest.approx(1.0, abs=0.05)


def test_stochastic_depth_grows_to_the_configured_rate() -> None:
    rates = [block.drop_path for block in encoder_of(drop_path=0.3, depth=4).blocks]
    assert rates == pytest.approx([0.0, 0.1, 0.2, 0.3])


@pytest.mark.parametrize("drop_path", [0.0, 0.5])
def test_gradient_checkpointing_gives_the_same_gradients(drop_path: float) -> None:
    """With stochastic depth too: the second forward pass must draw what the first drew."""

    def gradients(checkpointing: bool) -> list[Tensor]:
        encoder = encoder_of(drop_path=drop_path, grad_checkpointing=checkpointing, depth=3)
        torch.manual_seed(4)
        encoder(pixels_of(4), random_ids(4, 7)).square().sum().backward()
        return [p.grad for p in encoder.parameters() if p.grad is not None]

    kept, recomputed = gradients(False), gradients(True)
    assert len(kept) == len(recomputed) == len(list(encoder_of(depth=3).parameters()))
    for a, b in zip(kept, recomputed, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("layer", [1, 2, 3])
def test_layer_is_the_tokens_after_that_block_through_the_final_norm(layer: int) -> None:
    deep, cut = encoder_of(depth=3), encoder_of(depth=layer)
    cut.load_state_dict({key: deep.state_dict()[key] for key in cut.state_dict()})
    assert torch.equal(deep(pixels_of(), layer=layer), cut(pixels_of()))


@pytest.mark.parametrize("layer", [0, -1, 3])
def test_absent_layer_is_refused(layer: int) -> None:
    with pytest.raises(ConfigError, match=f"encoder vit_micro has layers 1 … 2, not {layer}"):
        encoder_of()(pixels_of(), layer=layer)


@pytest.mark.parametrize("positions", POSITIONS)
@pytest.mark.parametrize("num_queries", [0, 1, 5, 9])
def test_asking_for_the_last_tokens_alone_gives_their_answers(positions: str, num_queries: int) -> None:
    torch.manual_seed(5)
    block, x = Block(dim=32, num_heads=2, mlp_ratio=2.0), torch.randn(2, 9, 32)
    turn = rotation(random_ids(2, 9), 16, GRID) if positions == "rope" else None
    valid = torch.arange(9).expand(2, -1) != 1
    answers = block(x, turn, valid, last_queries=num_queries)
    torch.testing.assert_close(answers, block(x, turn, valid)[:, 9 - num_queries :])


def test_attention_is_the_formula() -> None:
    """softmax(qkᵀ ÷ √d)·v a head, in float64, written out."""
    torch.manual_seed(6)
    attention, x = Attention(dim=12, num_heads=3).double(), torch.randn(1, 5, 12, dtype=torch.float64)
    q, k, v = (part.reshape(5, 3, 4) for part in attention.qkv(x)[0].split(12, dim=-1))
    heads = []
    for head in range(3):
        weights = (q[:, head] @ k[:, head].T / 2).softmax(dim=-1)
        heads.append(weights @ v[:, head])
    expected = attention.proj(torch.cat(heads, dim=-1))
    torch.testing.assert_close(attention(x, None)[0], expected)


def test_sincos_table_gives_every_place_its_own_row() -> None:
    table = encoder_of("sincos").positions
    distances = torch.cdist(table, table) + torch.eye(GRID.num_tokens) * 9  # type: ignore[arg-type]
    assert distances.min() > 0.1


@pytest.mark.parametrize("size", sorted(SIZES))
@pytest.mark.parametrize("suffix", ["", "_patch8_32"])
def test_every_size_is_built_under_its_timm_name(size: str, suffix: str) -> None:
    config = EncoderConfig(name=f"vit_{size}{suffix}", geometry=GRID, depth=1)
    with torch.device("meta"):
        encoder = build_encoder(config)
    assert (encoder.dim, len(encoder.blocks)) == (SIZES[size].dim, 1)
    assert encoder.head_dim * SIZES[size].num_heads == encoder.dim


@pytest.mark.parametrize(
    ("name", "dim", "depth", "heads", "hidden"),
    [
        ("vit_tiny_patch16_224", 192, 12, 3, 768),
        ("vit_small_patch16_224", 384, 12, 6, 1536),
        ("vit_medium_patch16_224", 512, 12, 8, 2048),
        ("vit_base_patch16_224", 768, 12, 12, 3072),
        ("vit_large_patch16_224", 1024, 24, 16, 4096),
        ("vit_huge_patch16_224", 1280, 32, 16, 5120),
        ("vit_giant_patch16_224", 1408, 40, 22, 6144),  # V-JEPA 2's heads; timm has 16.
        ("vit_gigantic_patch16_224", 1664, 48, 16, 8192),
    ],
)
def test_timm_names_stand_for_timm_sizes(name: str, dim: int, depth: int, heads: int, hidden: int) -> None:
    size = vit_size(EncoderConfig(name=name))
    assert (size.dim, size.depth, size.num_heads, round(size.dim * size.mlp_ratio)) == (
        *(dim, depth, heads, hidden),
    )


def test_vit_base_has_the_parameters_of_the_reference() -> None:
    """12 blocks of 7.1 M, a tubelet embedding of 1.2 M, a norm: no class token, no position table."""
    with torch.device("meta"):
        encoder = build_encoder(EncoderConfig())
    block = 12 * 768**2 + 13 * 768
    embedding = 3 * 2 * 16 * 16 * 768 + 768
    assert sum(p.numel() for p in encoder.parameters()) == 12 * block + embedding + 2 * 768


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("vit_micro_patch16_32", "says patch 16 but the geometry has 8"),
        ("vit_micro_patch8_224", "says image 224 but the geometry has 32"),
        ("vit_colossal_patch8_32", "'vit_colossal_patch8_32' is unknown; sizes: vit_micro"),
        ("resnet50", "'resnet50' is unknown"),
        ("vit_base_patch8", "'vit_base_patch8' is unknown"),
    ],
)
def test_name_that_contradicts_the_geometry_or_is_unknown_is_refused(name: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build_encoder(EncoderConfig(name=name, geometry=GRID))


@pytest.mark.parametrize("shape", [(1, 3, 4, 32, 32), (1, 3, 6, 16, 32), (1, 6, 3, 32, 32), (3, 6, 32, 32)])
def test_clip_of_another_shape_is_refused_in_words(shape: tuple[int, ...]) -> None:
    with pytest.raises(ConfigError, match=r"takes clips of shape \(batch, 3, 6, 32, 32\)"):
        encoder_of()(torch.zeros(shape))


def test_fresh_weights_are_small_and_the_residual_outputs_smaller_with_depth() -> None:
    encoder = encoder_of(depth=4)
    assert encoder.patch_embed.weight.std().item() == pytest.approx(0.02, rel=0.1)
    for number, block in enumerate(encoder.blocks, start=1):
        expected = pytest.approx(0.02 / (2 * number) ** 0.5, rel=0.1)
        assert block.attn.proj.weight.std().item() == expected  # type: ignore[union-attr,operator]
        assert block.mlp.fc2.weight.std().item() == expected  # type: ignore[union-attr,operator]
        assert not block.attn.qkv.bias.any()  # type: ignore[union-attr,operator]


def test_tanh_gelu_is_used_where_it_is_asked_for() -> None:
    x = torch.linspace(-3, 3, 7)
    activations = [encoder_of(tanh_gelu=tanh).blocks[0].mlp.act(x) for tanh in (False, True)]  # type: ignore[union-attr,operator]
    assert torch.equal(activations[0], F.gelu(x))
    assert torch.equal(activations[1], F.gelu(x, approximate="tanh"))


def test_pixels_are_normalised_by_imagenets_statistics() -> None:
    frames = torch.randint(0, 256, (2, 4, 6, 6, 3), generator=torch.Generator().manual_seed(8)).byte()
    mean, std = (torch.tensor(values, dtype=torch.float64) for values in (MEAN, STD))
    expected = ((frames.double() / 255 - mean) / std).permute(0, 4, 1, 2, 3)
    pixels = normalise_pixels(frames)
    assert pixels.dtype == torch.float32
    torch.testing.assert_close(pixels.double(), expected, atol=1e-5, rtol=0)

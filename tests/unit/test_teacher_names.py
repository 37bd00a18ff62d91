"""What a teacher's name stands for: sizes computed from transformers' classes, claims held against what was
loaded, and a sentence for every way of naming none."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn
from transformers import Dinov2Config, Dinov2Model, VideoMAEConfig, VideoMAEModel

from salt_vla.errors import ConfigError, HubError, RunError
from salt_vla.geometry import ClipGeometry
from salt_vla.jobs.teacher import data_settings, load_to_inspect
from salt_vla.registry import TEACHERS
from salt_vla.teachers import family_of, load_teacher
from salt_vla.teachers import names as named
from salt_vla.teachers.names import NAMED, NamedTeacher

transformers.logging.set_verbosity_error()

# What the published config.json of each says (hub pages, and conversion scripts in transformers' repository).
SIZES = {
    "s": {"hidden_size": 384, "num_hidden_layers": 12, "num_attention_heads": 6},
    "b": {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12},
    "l": {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16},
    "h": {"hidden_size": 1280, "num_hidden_layers": 32, "num_attention_heads": 16},
    "g": {"hidden_size": 1408, "num_hidden_layers": 40},
}


def videomae(size: str, pooled: bool) -> nn.Module:
    heads, hidden = (
        ({"num_attention_heads": 16}, 6144) if size == "g" else ({}, 4 * SIZES[size]["hidden_size"])
    )
    patch = 14 if size == "g" else 16
    # Positions are no parameters, and the full table takes seconds.
    few = {"image_size": 2 * patch, "patch_size": patch, "num_frames": 2}
    return VideoMAEModel(
        VideoMAEConfig(**SIZES[size], **heads, **few, intermediate_size=hidden, use_mean_pooling=pooled)
    )


def vjepa2(size: str) -> nn.Module:
    more = {"num_attention_heads": 22, "mlp_ratio": 48 / 11} if size == "g" else {}
    return transformers.VJEPA2Model(transformers.VJEPA2Config(**SIZES[size], **more)).encoder


def dinov3(size: str) -> nn.Module:
    settings = {"intermediate_size": 4 * SIZES[size]["hidden_size"], "num_register_tokens": 4}
    return transformers.DINOv3ViTModel(transformers.DINOv3ViTConfig(**SIZES[size], **settings))


def siglip() -> nn.Module:
    return transformers.SiglipVisionModel(transformers.SiglipVisionConfig(vision_use_head=False))


BUILDERS: dict[str, Any] = {
    **{f"videomaev2_{n}": (videomae, n[0], True) for n in ("base", "large", "huge", "giant")},
    **{f"videomae_v1_{n}": (videomae, n[0], n == "huge") for n in ("base", "large", "huge", "base_ssv2")},
    **{f"vjepa2_vit{n}": (vjepa2, n[0]) for n in ("l", "h", "g", "g_384")},
    **{
        f"dinov2_vit{n}14": (lambda n: Dinov2Model(Dinov2Config(**SIZES[n], image_size=518)), n)
        for n in "sbl"
    },
    **{f"dinov3_vit{n}16": (dinov3, n) for n in "sbl"},
    "siglip_base": (siglip,),
    "siglip2_base": (siglip,),
}


@pytest.mark.parametrize("name", NAMED)
def test_a_names_sizes_are_those_of_the_network(name: str) -> None:
    build, *arguments = BUILDERS[name]
    with torch.device("meta"):
        network = build(*arguments)
    claim = NAMED[name]
    assert network.config.hidden_size == claim.dim
    assert network.config.num_hidden_layers == claim.depth
    assert network.config.num_attention_heads == claim.heads
    assert sum(parameter.numel() for parameter in network.parameters()) == claim.parameters


@pytest.mark.parametrize("claim", NAMED.values(), ids=NAMED.keys())
def test_a_named_teacher_is_complete(claim: NamedTeacher) -> None:
    assert claim.family in TEACHERS and "/" in claim.repository
    assert claim.revision is None or claim.is_pinned or claim.revision.startswith("refs/pr/")


def tiny(folder: Path, **changes: Any) -> Path:
    """A VideoMAE of 2 blocks, 32 wide."""
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    torch.manual_seed(0)
    config = VideoMAEConfig(**sizes, image_size=32, num_frames=4, **{"use_mean_pooling": False, **changes})
    VideoMAEModel(config).save_pretrained(folder)
    return folder


@pytest.fixture
def claim(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> NamedTeacher:
    """A name for what `tiny` makes."""
    made = load_teacher(tiny(tmp_path / "counted"))
    claim = NamedTeacher("tiny_base", "org/tiny", "image", 32, 2, 2, made.num_parameters, None, "Look twice")
    monkeypatch.setitem(named.NAMED, "tiny_base", claim)
    return claim


def test_a_directory_is_held_against_a_name(claim: NamedTeacher, tmp_path: Path) -> None:
    teacher = load_teacher(f"tiny_base={tmp_path / 'counted'}")
    assert teacher.name == "tiny_base/block2/norm"
    assert teacher.fingerprint == load_teacher(tmp_path / "counted").fingerprint


@pytest.mark.parametrize(
    ("sizes", "sentence"),
    [
        ((1280, 2), "has width 32, and tiny_base is 1280: this is not the model of that name"),
        ((32, 12), "has blocks: 2, and tiny_base is 12: this is not"),
        ((1280, 32), "has width 32, and tiny_base is 1280; blocks: 2, and tiny_base is 32: this"),
    ],
)
def test_another_network_under_a_name_is_refused(
    sizes: tuple[int, int],
    sentence: str,
    claim: NamedTeacher,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    other = NamedTeacher("tiny_base", "org/tiny", "image", *sizes, 2, claim.parameters)
    monkeypatch.setitem(named.NAMED, "tiny_base", other)
    with pytest.raises(RunError, match=sentence):
        load_teacher(f"tiny_base={tmp_path / 'counted'}")


def test_other_heads_or_clips_under_a_name_are_refused(
    claim: NamedTeacher, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Neither is seen in the shapes of weights: config.json may say what it likes."""
    config = tmp_path / "counted" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"num_attention_heads": 4}))
    with pytest.raises(RunError, match="has heads: 4, and tiny_base is 2: this is not the model of that"):
        load_teacher(f"tiny_base={config.parent}")
    film = replace(claim, family="videomae", heads=4)
    monkeypatch.setitem(named.NAMED, "tiny_base", film)
    with pytest.raises(
        RunError, match=r"has clips of .*image_size=32.*, and tiny_base takes .*image_size=224"
    ):
        load_teacher(f"tiny_base={config.parent}")


def test_another_number_of_parameters_under_a_name_is_refused(claim: NamedTeacher, tmp_path: Path) -> None:
    folder = tiny(tmp_path / "pooled", use_mean_pooling=True)  # Without the final norm: within tolerance.
    assert 0 < claim.parameters - load_teacher(f"tiny_base={folder}").num_parameters < 100
    more = json.loads((tmp_path / "counted" / "config.json").read_text()) | {"intermediate_size": 65}
    torch.manual_seed(0)
    VideoMAEModel(VideoMAEConfig.from_dict(more)).save_pretrained(tmp_path / "wider")
    assert load_teacher(f"tiny_base={tmp_path / 'wider'}").dim == 32
    VideoMAEModel(VideoMAEConfig.from_dict(more | {"intermediate_size": 80})).save_pretrained(
        tmp_path / "far"
    )
    with pytest.raises(RunError, match=r"M parameters, and tiny_base has .* M parameters: this is not"):
        load_teacher(f"tiny_base={tmp_path / 'far'}")


def test_a_name_that_cannot_be_fetched_says_what_not_to_take(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(HubError) as caught:
        load_teacher("videomae_v1_huge")
    said = str(caught.value)
    for part in (
        "HF_HUB_OFFLINE forbids",
        "`hf download MCG-NJU/videomae-huge-finetuned-kinetics --revision refs/pr/1",
        "videomae_v1_huge=DIRECTORY; it must be 1280 wide, with 32 blocks and 631.6 M parameters",
        "There is no MCG-NJU/videomae-huge",
        "a base classifier, 768 wide with 86 M parameters",
    ):
        assert part in said


def test_a_hub_id_is_asked_for_and_a_misspelt_path_is_not(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "weights").mkdir()
    with pytest.raises(HubError, match="model org/some-model is not on this machine"):
        load_teacher("org/some-model")
    with pytest.raises(
        RunError, match="there is no encoder or teacher 'weights/misspelt': neither a directory"
    ):
        load_teacher("weights/misspelt")
    with pytest.raises(
        RunError, match=r"there is no directory .*gone', which is to hold teacher vjepa2_vitl"
    ):
        load_teacher(f"vjepa2_vitl={tmp_path / 'gone'}")
    with pytest.raises(RunError, match="there is no directory '', which is to hold teacher vjepa2_vitl"):
        load_teacher("vjepa2_vitl=")


# Random teachers.


def test_a_random_teacher_is_a_function_of_its_name() -> None:
    geometry = ClipGeometry(4, 32, 2, 8)
    first = load_teacher("random:vit_micro:3", geometry)
    torch.manual_seed(99)
    state = torch.random.get_rng_state()
    assert load_teacher("random:vit_micro:3", geometry).fingerprint == first.fingerprint
    assert torch.equal(torch.random.get_rng_state(), state)
    others = {load_teacher(f"random:vit_micro:{seed}", geometry).fingerprint for seed in (0, 4)}
    assert len(others | {first.fingerprint}) == 3
    assert first.name == "random:vit_micro:3/block4/norm"
    zero = load_teacher("random:vit_micro", geometry)
    assert zero.name == "random:vit_micro:0/block4/norm" and zero.fingerprint in others


def test_a_random_teachers_geometry_is_that_of_its_name_or_of_the_caller() -> None:
    assert load_teacher("random:vit_micro_patch8_64:0").geometry == ClipGeometry(16, 64, 2, 8)
    with pytest.raises(ConfigError, match="says image 64 but the geometry has 32"):
        load_teacher("random:vit_micro_patch8_64:0", ClipGeometry(4, 32, 2, 8))


@pytest.mark.parametrize(
    "name", ["random:", "random:vit", "random:vit_micro:x", "random:vit_micro:-1", "random:a/b"]
)
def test_what_is_no_random_teacher_is_a_sentence(name: str) -> None:
    with pytest.raises(ConfigError, match=r"random:<encoder>\[:seed\]"):
        load_teacher(name)


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("random:nonsense", "vit_tiny_patch16_224:0, not 'random:nonsense'"),
        (f"random:vit_micro:{'9' * 23}", "a seed has at most 18 digits, not 23"),
        ("random:vit_micro_patch1_4096", "claims 134217728 tokens a clip; at most 65536 can be"),
        (
            "random:vit_micro_patch20000_20000",
            r"would have .*e\+11 parameters; a random one has at most 4e\+09",
        ),
    ],
)
def test_a_random_teacher_that_cannot_be_takes_no_memory(name: str, sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        load_teacher(name)


# Directories.


@pytest.mark.parametrize("name", ["", " ", "x" * 5000, f"runs/{'y' * 300}", "a\0b"], ids=len)
def test_what_can_be_no_path_is_no_teacher(name: str) -> None:
    for ask in (load_teacher, data_settings, load_to_inspect):
        with pytest.raises(RunError, match="is no teacher: give a directory, a run's name"):
            ask(name)  # type: ignore[operator]


def test_a_misspelt_claim_and_a_missing_directory_are_told_apart(tmp_path: Path) -> None:
    with pytest.raises(
        RunError, match=r"there is no published teacher 'vjepa2_vitx' to hold .* to; known: vid"
    ):
        load_teacher(f"vjepa2_vitx={tmp_path}")
    for ask in (load_teacher, load_to_inspect):
        with pytest.raises(
            RunError, match="there is no directory '/nope', which is to hold teacher vjepa2_vitl"
        ):
            ask("vjepa2_vitl=/nope")  # type: ignore[operator]


def test_a_run_without_a_checkpoint_is_to_be_gone_on_with(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"seed": 0}')
    (tmp_path / "status.json").write_text("{}")
    with pytest.raises(RunError, match="it was stopped before its first checkpoint; go on with the run"):
        load_teacher(tmp_path)
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(RunError, match="it was stopped before its first checkpoint; go on with the run"):
        load_teacher(tmp_path)


def test_a_published_folder_may_hold_checkpoints_of_its_own(tmp_path: Path) -> None:
    plain = load_teacher(tiny(tmp_path / "made"))
    (tmp_path / "made" / "checkpoints" / "step_5").mkdir(parents=True)
    assert load_teacher(tmp_path / "made").fingerprint == plain.fingerprint


def test_a_runs_config_that_is_no_text_is_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes(b'{"seed": "\xff"}')
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "encoder.safetensors").touch()
    with pytest.raises(ConfigError, match=r"config\.json"):
        data_settings(str(tmp_path))


@pytest.mark.parametrize(
    ("kind", "family"),
    [
        ("videomae", "videomae"),
        ("VideoMAEv2_Base", "videomae"),
        ("vjepa2", "vjepa2"),
        ("dinov2_with_registers", "image"),
        ("dinov3_vit", "image"),
        ("siglip2", "image"),
        ("siglip_vision_model", "image"),
    ],
)
def test_a_directorys_family_is_its_model_type(kind: str, family: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": kind}))
    assert family_of(tmp_path) == family


def test_a_directory_that_is_no_teacher_is_a_sentence(tmp_path: Path) -> None:
    config = tmp_path / "config.json"
    with pytest.raises(RunError, match=r"holds no encoder: neither encoder\.safetensors nor a checkpoint"):
        load_teacher(tmp_path)
    config.write_text('{"model_type": "bert"}')
    with pytest.raises(RunError, match="model_type='bert', which is no teacher here; known are our own runs"):
        load_teacher(tmp_path)
    config.write_text('{"seed": 0}')
    with pytest.raises(RunError, match=r"holds no encoder: config\.json has no model_type"):
        load_teacher(tmp_path)
    config.write_text("[1, 2]")
    with pytest.raises(RunError, match="must hold a JSON object, not a list"):
        load_teacher(tmp_path)
    config.write_text("{")
    with pytest.raises(RunError, match="cannot be read as JSON"):
        load_teacher(tmp_path)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "vitl.pt", "model.safetensors"])
def test_weights_without_a_config_and_pickles_are_sentences(name: str, tmp_path: Path) -> None:
    made = tiny(tmp_path / "made")
    shutil.copytree(made, tmp_path / "bare")
    (tmp_path / "bare" / "config.json").unlink()
    (tmp_path / "bare" / "model.safetensors").rename(tmp_path / "bare" / name)
    with pytest.raises(RunError, match=r"bare lacks config\.json, which says what the weights are"):
        load_teacher(tmp_path / "bare")
    (made / "model.safetensors").unlink()
    torch.save({"a": torch.ones(2)}, made / name)
    with pytest.raises(RunError, match=rf"{name} is a pickle.*: salt-vla teacher convert .*{name} --out"):
        load_teacher(made)

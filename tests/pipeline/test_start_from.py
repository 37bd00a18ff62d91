"""A run's first steps: the weights its encoder begins with, and what is noted of its masks, whatever happens
to the run afterwards."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import xxhash
from safetensors.torch import load_file, save_file
from torch import Tensor

from salt_vla.config import EncoderConfig
from salt_vla.geometry import ClipGeometry
from salt_vla.models import build_encoder

Command = Callable[..., list[object]]
OFTEN = {"runtime__validate_every": 2}  # A run that is cut at step 2 validates there too.
STILL = {"optimizer__lr_start": 0, "optimizer__lr": 0, "optimizer__lr_final": 0}
GRID = ClipGeometry(num_frames=4, image_size=32, tubelet_size=2, patch_size=8)


@pytest.fixture(scope="module")
def image_vit() -> dict[str, Tensor]:
    """An image ViT of the tiny runs' size in timm's layout, with what only images have."""
    torch.manual_seed(0)
    tensors = dict(build_encoder(EncoderConfig(name="vit_micro", geometry=GRID, depth=1)).state_dict())
    del tensors["patch_embed.weight"]
    tensors["patch_embed.proj.weight"] = torch.randn(128, 3, 8, 8)
    tensors["patch_embed.proj.bias"] = tensors.pop("patch_embed.bias")
    return tensors | {"cls_token": torch.zeros(1, 1, 128), "pos_embed": torch.zeros(1, 17, 128)}


@pytest.fixture
def file(image_vit: dict[str, Tensor], salt: Any) -> Path:
    """Below the root, so that a recipe can name it."""
    salt.root.mkdir(exist_ok=True)
    save_file(image_vit, salt.root / "vit.safetensors")
    return Path(salt.root / "vit.safetensors")


def encoder_at(salt: Any, name: str, step: int) -> dict[str, Tensor]:
    return load_file(salt.at(name).checkpoints / f"step_{step:08d}" / "encoder.safetensors")


def test_an_encoder_begins_with_the_image_models_weights_spread_over_time(
    salt: Any, pixels: Command, file: Path, image_vit: dict[str, Tensor]
) -> None:
    salt.ok(*pixels("run", "--max-steps", 2, start_from=file.name, **STILL))
    held = encoder_at(salt, "run", 2)
    spread = held["patch_embed.weight"].view(128, 3, 2, 8, 8)
    assert torch.equal(spread, image_vit["patch_embed.proj.weight"].unsqueeze(2).expand_as(spread) / 2)
    for name in ("blocks.0.attn.qkv.weight", "blocks.0.mlp.fc2.weight", "norm.weight"):
        assert torch.equal(held[name], image_vit[name]), name
    pinned = json.loads((salt.at("run").path / "start_provenance.json").read_text())
    assert pinned == {"weights": xxhash.xxh3_128_hexdigest(file.read_bytes())}
    said = salt.at("run").log_file.read_text()
    assert f"the encoder starts from {file}; left out: cls_token, pos_embed" in said


def test_an_encoder_begins_with_another_runs(
    salt: Any, pixels: Command, workshop: Any, tmp_path: Path
) -> None:
    teacher = shutil.copytree(workshop.salt.at("teacher").path, tmp_path / "teacher")
    salt.ok(*pixels("run", "--max-steps", 2, start_from=teacher, **STILL))
    (*_, last) = sorted((teacher / "checkpoints").glob("step_*"))
    theirs, ours = load_file(last / "encoder.safetensors"), encoder_at(salt, "run", 2)
    assert theirs.keys() == ours.keys()
    assert all(torch.equal(theirs[name], ours[name]) for name in ours)


def test_a_resume_needs_the_first_weights_no_more(salt: Any, pixels: Command, file: Path, curve: Any) -> None:
    salt.ok(*pixels("whole", "--max-steps", 4, start_from=file.name, **OFTEN))
    salt.ok(*pixels("cut", "--max-steps", 2, start_from=file.name, **OFTEN))
    file.unlink()
    salt.ok(*pixels("cut", "--max-steps", 4, start_from=file.name, **OFTEN))
    assert curve(salt.at("cut")) == curve(salt.at("whole"))
    ours, whole = (encoder_at(salt, name, 4) for name in ("cut", "whole"))
    assert all(torch.equal(tensor, whole[name]) for name, tensor in ours.items())


def test_a_run_that_died_before_its_first_checkpoint_begins_with_the_same_bytes_or_not_at_all(
    salt: Any, pixels: Command, file: Path, image_vit: dict[str, Tensor], curve: Any
) -> None:
    salt.ok(*pixels("run", "--max-steps", 2, start_from=file.name))
    first = curve(salt.at("run"))
    shutil.rmtree(salt.at("run").checkpoints)
    salt.ok(*pixels("run", "--max-steps", 2, start_from=file.name))
    assert curve(salt.at("run")) == first
    shutil.rmtree(salt.at("run").checkpoints)
    save_file(image_vit | {"norm.bias": torch.ones(128)}, file)
    refused = salt(*pixels("run", "--max-steps", 2, start_from=file.name))
    assert refused.code == 2 and "run 'run' began with another start: they differ in weights" in refused.err


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"encoder__depth": 2}, "vit.safetensors: it has no tensor blocks.1.norm1.weight"),
        ({"encoder__name": "vit_tiny"}, "tensor patch_embed.weight is (128, 384) and has to be (192, 384)"),
        ({"start_from": "nothing.safetensors"}, "nothing.safetensors are missing or damaged"),
        ({"start_from": "."}, "holds no encoder"),
    ],
)
def test_weights_that_do_not_fit_are_a_sentence_and_no_run(
    salt: Any, pixels: Command, file: Path, changes: dict[str, Any], named: str
) -> None:
    settings: dict[str, Any] = {"start_from": file.name} | changes
    before = salt.files()
    assert named in salt(*pixels("run", "--max-steps", 2, **settings)).sentence
    assert salt.files() == before


@pytest.mark.parametrize("truncate", ["pad", "even"])
def test_contexts_that_are_kept_resume_bitwise_and_add_up_from_micro_batches(
    salt: Any, pixels: Command, curve: Any, truncate: str
) -> None:
    settings = OFTEN | {"masks__truncate": truncate}
    salt.ok(*pixels("whole", "--max-steps", 4, **settings))
    salt.ok(*pixels("cut", "--max-steps", 2, **settings))
    salt.ok(*pixels("cut", "--max-steps", 4, **settings))
    assert curve(salt.at("cut")) == curve(salt.at("whole"))
    salt.ok(*pixels("parts", "--max-steps", 4, **settings, grad_accum_steps=4))
    for row, whole in zip(curve(salt.at("parts")), curve(salt.at("whole")), strict=True):
        assert row["loss"] == pytest.approx(whole["loss"], rel=1e-4)
    noted = json.loads((salt.at("cut").path / "masks.json").read_text())
    assert [group["padding"] > 0 for group in noted["groups"]] == [truncate == "pad"] * 2
    said = salt.at("cut").log_file.read_text()
    assert all(said.count(line) == 1 for line in noted["summary"])
    assert salt.json("runs", "show", "cut")["masks"] == noted

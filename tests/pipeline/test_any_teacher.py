"""Any video in, any frozen teacher on top: a folder of films → index → cache → student, for every family."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from transformers import (
    Dinov2Config,
    Dinov2Model,
    PreTrainedModel,
    VideoMAEConfig,
    VideoMAEModel,
    VJEPA2Config,
    VJEPA2Model,
)

VIDEOS, LENGTH = 14, 20
SMALL = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}


def videomae() -> PreTrainedModel:
    return VideoMAEModel(
        VideoMAEConfig(
            **SMALL,
            image_size=32,
            patch_size=8,
            num_frames=4,
            tubelet_size=2,
            intermediate_size=48,
            use_mean_pooling=False,
        )
    )


def vjepa2() -> PreTrainedModel:
    predictor = {"pred_hidden_size": 24, "pred_num_attention_heads": 2, "pred_num_hidden_layers": 1}
    return VJEPA2Model(VJEPA2Config(**SMALL, **predictor, crop_size=64, frames_per_clip=8, patch_size=8))


def dinov2() -> PreTrainedModel:
    return Dinov2Model(Dinov2Config(**SMALL, image_size=42, patch_size=14))


FAMILIES: dict[str, Callable[[], PreTrainedModel]] = {"videomae": videomae, "vjepa2": vjepa2, "image": dinov2}


@pytest.fixture(scope="module")
def films(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """VP9 films of squares that move right or down, in two class folders."""
    root = tmp_path_factory.mktemp("films")
    rng = np.random.default_rng(0)
    for number in range(VIDEOS):
        folder = root / ("right", "down")[number % 2]
        folder.mkdir(exist_ok=True)
        with av.open(str(folder / f"{number:03d}.webm"), "w") as container:
            stream = container.add_stream("libvpx-vp9", 12, options={"cpu-used": "8", "deadline": "realtime"})
            stream.width, stream.height, stream.pix_fmt = 48, 40, "yuv420p"
            ground = rng.integers(60, 120, (40, 48, 3), dtype=np.uint8)
            for frame in range(LENGTH):
                picture = ground.copy()
                left, top = (frame, 12) if number % 2 == 0 else (12, frame)
                picture[top : top + 9, left : left + 9] = (230, 40, 40)
                container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
            container.mux(stream.encode(None))
    return root


@pytest.mark.parametrize("family", FAMILIES)
def test_a_student_learns_from_this_family_on_a_folder_of_films(
    family: str, films: Path, salt: Any, tmp_path: Path
) -> None:
    torch.manual_seed(1)
    model = FAMILIES[family]()
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(tmp_path / "teacher")
    table, cache = tmp_path / "clips.parquet", tmp_path / "latents"
    salt.ok(
        *("data", "index", films, "--out", table, "--num-frames", 4, "--frame-stride", 2, "--hop", 6),
        *("--validation-share", 0.4),
    )
    tiny = [part for part in salt.train("demo_student", "s")[2:-2] if part.startswith(("encoder", "data"))]
    for split in ("train", "validation"):
        salt.ok(
            *("cache", "build", *tiny, "--teacher", tmp_path / "teacher", "--recipe", "demo_student"),
            *("--data", table, "--split", split, "--out", cache),
        )
    manifest = salt.json("cache", "show", cache)
    assert manifest["shape"] == [32, 24] and manifest["num_views"] == 2
    assert manifest["provenance"]["teacher"].endswith("/block2/norm")
    salt.ok(*salt.train("demo_student", "s", "--data", table, "--cache", cache, "--max-steps", 4))
    rows = salt.at("s").metrics("train")
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    assert all(np.isfinite(row["loss"]) for row in rows)
    assert salt.at("s").metrics("val")[-1]["r2_channel_mean"] is not None


def test_without_a_recipe_overrides_change_the_teachers_own_clips(
    films: Path, salt: Any, tmp_path: Path
) -> None:
    """Its 64² stays, where our default is 224²; 16 frames are our default, and are asked for all the same."""
    vjepa2().save_pretrained(tmp_path / "teacher")
    build = ("cache", "build", "--teacher", tmp_path / "teacher", "--data", films, "--num-views", 1)
    wide = "data.view.frame_stride=1"
    salt.ok(*build, "encoder.geometry.num_frames=16", wide, "--out", tmp_path / "sixteen")
    salt.ok(*build, wide, "--out", tmp_path / "own")
    found = [salt.json("cache", "show", tmp_path / name)["provenance"] for name in ("sixteen", "own")]
    sizes = [(p["geometry"]["num_frames"], p["geometry"]["image_size"], p["dtype"]) for p in found]
    assert sizes == [(16, 64, "float32"), (8, 64, "float32")]


def test_a_published_teacher_reads_clips_as_the_table_was_cut(films: Path, salt: Any, tmp_path: Path) -> None:
    """Its checkpoint names no stride: the default, 4, would reach beyond these films' ends."""
    torch.manual_seed(1)
    vjepa2().save_pretrained(tmp_path / "teacher")
    table = tmp_path / "clips.parquet"
    salt.ok("data", "index", films, "--out", table, "--num-frames", 8, "--frame-stride", 2)
    checked = salt("teacher", "check", tmp_path / "teacher", "--data", table, "--clips", 2, "--json")
    assert json.loads(checked.out)["clips"] == 2
    salt.ok("cache", "build", "--teacher", tmp_path / "teacher", "--data", table, "--out", tmp_path / "c")
    assert salt.json("cache", "show", tmp_path / "c")["num_quarantined"] == 0
    wide = salt("teacher", "check", tmp_path / "teacher", "--data", table, "--frame-stride", 4).sentence
    assert "too few for 8 frames at stride 4" in wide


def test_a_teacher_of_other_clips_than_the_recipes_is_refused(films: Path, salt: Any, tmp_path: Path) -> None:
    videomae().save_pretrained(tmp_path / "teacher")
    said = salt(
        *("cache", "build", "--teacher", tmp_path / "teacher", "--recipe", "demo_student"),
        *("--data", films, "--out", tmp_path / "latents"),
    ).sentence
    assert "takes clips of" in said and "num_frames=4" in said
    assert not (tmp_path / "latents").exists()

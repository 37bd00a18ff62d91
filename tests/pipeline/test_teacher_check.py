"""`teacher check` on every family: planted defects are named, and healthy teachers pass."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    Dinov2Config,
    Dinov2Model,
    PreTrainedModel,
    SiglipVisionConfig,
    SiglipVisionModel,
    VideoMAEConfig,
    VideoMAEModel,
    VJEPA2Config,
    VJEPA2Model,
)

from salt_vla.geometry import ClipGeometry
from salt_vla.models.attention import sincos_table

DIM = 48
COMMON = {"hidden_size": DIM, "num_hidden_layers": 2, "num_attention_heads": 4}
PICTURE = {"image_size": 48, "patch_size": 8}
MLP = {"intermediate_size": 96}


def videomae(**more: Any) -> PreTrainedModel:
    size = COMMON | PICTURE | MLP | {"num_frames": 4, "use_mean_pooling": False}
    return VideoMAEModel(VideoMAEConfig(**(size | more)))


def vjepa2() -> PreTrainedModel:
    predictor = {"pred_hidden_size": 24, "pred_num_hidden_layers": 1, "pred_num_attention_heads": 2}
    size = {"crop_size": 48, "patch_size": 8, "frames_per_clip": 4, "mlp_ratio": 2.0}
    return VJEPA2Model(VJEPA2Config(**COMMON, **size, **predictor))


def dinov2() -> PreTrainedModel:
    return Dinov2Model(Dinov2Config(**COMMON, image_size=96, patch_size=16, mlp_ratio=2))


def siglip() -> PreTrainedModel:
    return SiglipVisionModel(SiglipVisionConfig(**COMMON, **MLP, image_size=224, patch_size=16))


FAMILIES: dict[str, Callable[[], PreTrainedModel]] = {
    "videomae": videomae,
    "vjepa2": vjepa2,
    "dinov2": dinov2,
    "siglip": siglip,
}


def made(folder: Path, make: Callable[[], PreTrainedModel], name: str = "teacher") -> Path:
    """Random weights, and biases that are not zero, as a published checkpoint's are not."""
    torch.manual_seed(0)
    model = make()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if key.endswith("bias"):
                parameter.normal_(0, 0.1)
    model.save_pretrained(folder / name)
    return folder / name


def changed(directory: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> Path:
    file = directory / "model.safetensors"
    save_file(change(load_file(file)), file, {"format": "pt"})
    return directory


@pytest.fixture
def check(salt: Any, tiny_dataset: Path) -> Callable[..., tuple[int, dict[str, Any], dict[str, str]]]:
    """`check(teacher, …)`: exit code, the JSON, and the severity of each topic."""

    def run(teacher: object, *more: object) -> tuple[int, dict[str, Any], dict[str, str]]:
        data = ("--data", tiny_dataset, "--num-frames", 4, "--frame-stride", 2, "--clips", 6)
        answer = salt("teacher", "check", teacher, *data, *more, "--json")
        assert answer.code in (0, 1), answer.err
        found = json.loads(answer.out)
        return answer.code, found, {entry["topic"]: entry["severity"] for entry in found["findings"]}

    return run


def text_of(found: dict[str, Any], topic: str) -> str:
    return next(entry["text"] for entry in found["findings"] if entry["topic"] == topic)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_healthy_teacher_of_every_family_passes(family: str, check: Any, tmp_path: Path) -> None:
    code, found, severity = check(made(tmp_path, FAMILIES[family]))
    assert code == 0 and "bad" not in severity.values(), found["findings"]
    assert found["verdict"].startswith("usable")
    assert (found["dim"], found["depth"], found["clips"]) == (DIM, 2, 6)
    assert found["qv_biases"] == 4 and found["qv_biases_zero"] == 0
    assert found["places_in_order"] == "8 of 8"
    assert severity.keys() >= {"size", "biases", "token_order", "positions", "outlier_channels"}


def test_our_own_runs_and_the_random_baseline_pass(check: Any, workshop: Any) -> None:
    code, found, _ = check(workshop.teacher)
    assert code == 0 and found["stored_name"] == "teacher/block1/norm"
    code, found, severity = check("random:vit_micro_patch8_48:1")
    assert code == 0 and found["qv_biases_zero"] == found["qv_biases"] > 0
    assert severity["biases"] == "ok" and "fresh random weights" in text_of(found, "biases")


@pytest.mark.parametrize("family", FAMILIES)
def test_zeroed_query_and_value_biases_are_named(family: str, check: Any, tmp_path: Path) -> None:
    def zeroed(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        lost = ("q_bias", "v_bias", "query.bias", "value.bias", "q_proj.bias", "v_proj.bias")
        hit = [key for key in tensors if key.endswith(lost)]
        assert hit
        return tensors | {key: torch.zeros_like(tensors[key]) for key in hit}

    code, found, severity = check(changed(made(tmp_path, FAMILIES[family]), zeroed))
    assert code == 1 and severity["biases"] == "bad"
    assert "all query and value biases are zero" in found["verdict"]


def test_a_model_of_another_size_than_its_published_name_is_named(check: Any, tmp_path: Path) -> None:
    directory = made(tmp_path, videomae)
    code, found, severity = check(f"videomae_v1_huge={directory}")
    assert code == 1 and severity["size"] == "bad"
    assert "another model than its name says: 48 wide, 2 blocks" in found["verdict"]
    assert "'videomae_v1_huge' means 1280 wide, 32 blocks, 16 heads, 631.6 M parameters" in found["verdict"]
    assert (found["claimed_dim"], found["claimed_parameters"]) == (1280, 631_604_480)


def test_a_directory_called_huge_that_is_not_is_named(check: Any, tmp_path: Path) -> None:
    code, found, _ = check(made(tmp_path, videomae, name="VideoMAE-v1-Huge"))
    assert code == 1 and "'VideoMAE-v1-Huge' means 1280 wide" in found["verdict"]


def test_a_raw_residual_stream_with_loud_channels_is_named(check: Any, tmp_path: Path) -> None:
    """As `use_mean_pooling` gives it: no final norm, and a few channels that the last block writes loudly."""

    def loud(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        weight = tensors["encoder.layer.1.output.dense.weight"].clone()
        weight[:3] *= 3000
        return tensors | {"encoder.layer.1.output.dense.weight": weight}

    directory = changed(made(tmp_path, lambda: videomae(use_mean_pooling=True)), loud)
    code, found, severity = check(directory)
    assert found["stored_name"].endswith("/raw") and found["top_share"] > 0.9
    assert code == 1 and severity["outlier_channels"] == "bad"
    assert "raw residual stream: " in found["verdict"] and "of variance in 8 channels" in found["verdict"]


@pytest.mark.parametrize(("family", "side"), [("dinov2", 6), ("siglip", 14)])
def test_a_permuted_position_table_is_named(family: str, side: int, check: Any, tmp_path: Path) -> None:
    """Learned tables are smooth: this one is made so, then its rows are shuffled."""
    table = 0.05 * sincos_table(DIM, ClipGeometry(2, side, 2, 1))
    order = torch.randperm(side**2, generator=torch.Generator().manual_seed(0))

    def put(rows: Tensor) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
        def change(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
            key = next(key for key in tensors if "position_embedding" in key)
            old = tensors[key].clone()
            old.view(-1, DIM)[-(side**2) :] = rows
            return tensors | {key: old}

        return change

    directory = made(tmp_path, FAMILIES[family])
    code, found, _ = check(changed(directory, put(table)))
    assert code == 0 and found["positions"] == "ordered", found["findings"]
    code, found, severity = check(changed(directory, put(table[order])))
    assert code == 1 and severity["positions"] == "bad"
    assert "its position table is permuted" in found["verdict"]


def test_a_permuted_table_in_a_videomae_file_is_refused(
    salt: Any, tiny_dataset: Path, tmp_path: Path
) -> None:
    """The class computes its own, so a file with another one never becomes a teacher at all."""
    directory = made(tmp_path, videomae)
    table = videomae().embeddings.position_embeddings
    order = torch.randperm(table.shape[1], generator=torch.Generator().manual_seed(0))
    for rows, refused in ((table, False), (table[:, order], True)):
        changed(directory, lambda tensors, rows=rows: tensors | {"pos_embed": rows.contiguous()})
        answer = salt("teacher", "check", directory, "--data", tiny_dataset, "--frame-stride", 2)
        if refused:
            assert "position table" in answer.sentence and "permuted" in answer.sentence
        else:
            assert answer.code == 0, answer.err


def test_a_table_permuted_in_memory_is_found_in_families_that_compute_theirs(
    salt: Any, workshop: Any, tmp_path: Path
) -> None:
    from salt_vla.evaluation.teacher_inspection import position_order
    from salt_vla.teachers import load_teacher

    teacher = load_teacher(made(tmp_path, videomae))
    assert position_order(teacher.latents, teacher.module, teacher.geometry).judgement == "ordered"
    table = teacher.module.embeddings.position_embeddings
    order = torch.randperm(table.shape[1], generator=torch.Generator().manual_seed(0))
    teacher.module.embeddings.position_embeddings = table[:, order]
    assert position_order(teacher.latents, teacher.module, teacher.geometry).judgement == "shuffled"


def test_layer_norm_and_precision_are_chosen_and_stored(check: Any, tmp_path: Path) -> None:
    directory = made(tmp_path, videomae)
    whole = check(directory)[1]
    inner, raw = check(directory, "--layer", 1)[1], check(directory, "--final-norm", "none")[1]
    coarse = check(directory, "--dtype", "bfloat16")[1]
    assert (whole["stored_name"], inner["stored_name"]) == ("teacher/block2/norm", "teacher/block1/raw")
    assert raw["stored_name"] == "teacher/block2/raw"
    assert len({found["fingerprint"] for found in (whole, inner, raw, coarse)}) == 4


def test_the_files_and_the_picture(salt: Any, workshop: Any, tmp_path: Path) -> None:
    out = tmp_path / "checked"
    said = salt.ok("teacher", "check", workshop.teacher, "--data", workshop.table, "--out", out).out
    found = json.loads((out / "check.json").read_text())
    assert "Verdict: " + found["verdict"][:40] in said.replace("\n", " ")
    for entry in found["findings"]:
        assert entry["topic"] in said
    with Image.open(out / "tokens.png") as picture:
        assert picture.format == "PNG" and min(picture.size) > 200


def test_clips_that_cannot_be_read_are_counted_and_none_at_all_is_a_sentence(
    salt: Any, workshop: Any, tiny_dataset: Path, tmp_path: Path
) -> None:
    import shutil

    dataset = shutil.copytree(tiny_dataset, tmp_path / "films")
    table = tmp_path / "clips.parquet"
    salt.ok("data", "index", dataset, "--out", table, "--num-frames", 4, "--frame-stride", 2)
    films = sorted(dataset.rglob("*.mp4"))
    films[0].write_bytes(b"no film")
    found = salt.json("teacher", "check", workshop.teacher, "--data", table, "--clips", 100)
    assert found["unreadable_clips"] > 0 and found["clips"] > 0
    assert "could not be read" in found["verdict"]
    for film in films:
        film.write_bytes(b"no film")
    assert "can be read; the first: " in salt("teacher", "check", workshop.teacher, "--data", table).sentence


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (("--clips", "0"), "--clips must be at least 1, not 0"),
        (("--layer", "9"), "layer 9 does not exist"),
        (("--num-frames", "8"), "takes clips of"),
    ],
)
def test_wrong_options_are_sentences(
    salt: Any, workshop: Any, arguments: tuple[str, ...], named: str
) -> None:
    command = ("teacher", "check", workshop.teacher, "--data", workshop.table)
    assert named in salt(*command, *arguments).sentence

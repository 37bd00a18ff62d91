"""Pickled checkpoints become safetensors once, without running what is in them."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import Dinov2Config, Dinov2Model

from salt_vla.cli import main
from salt_vla.errors import ResourceError, RunError
from salt_vla.geometry import ClipGeometry
from salt_vla.teachers import load_teacher
from salt_vla.teachers.convert import convert

CONTAINERS = ("state_dict", "model", "module", "encoder", "target_encoder")


@pytest.fixture
def model() -> Dinov2Model:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    return Dinov2Model(Dinov2Config(**sizes, image_size=28, patch_size=7)).eval()


def settings(model: Dinov2Model, folder: Path) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(model.config.to_json_string())
    return folder / "config.json"


def test_a_converted_checkpoint_is_the_same_teacher(model: Dinov2Model, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path / "published")
    settings(model, tmp_path / "old")
    torch.save(model.state_dict(), tmp_path / "old" / "pytorch_model.bin")
    with pytest.raises(RunError, match="is a pickle, which can run code"):
        load_teacher(tmp_path / "old")
    done = convert(tmp_path / "old" / "pytorch_model.bin", tmp_path / "new")
    assert done.has_config and done.key == "" and done.num_tensors == len(model.state_dict())
    geometry = ClipGeometry(2, 28, 2, 7)
    fingerprints = {load_teacher(tmp_path / name, geometry).fingerprint for name in ("published", "new")}
    assert len(fingerprints) == 1


@pytest.mark.parametrize("container", CONTAINERS)
def test_the_only_container_is_taken(container: str, model: Dinov2Model, tmp_path: Path) -> None:
    optimizer = torch.optim.AdamW(model.parameters()).state_dict()
    torch.save({container: model.state_dict(), "optimizer": optimizer, "epoch": 3}, tmp_path / "a.pth")
    done = convert(tmp_path / "a.pth", tmp_path / "out", settings(model, tmp_path / "c"))
    assert done.key == container and done.left_out == ("epoch", "optimizer")
    held = load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.equal(held[key], tensor) for key, tensor in model.state_dict().items())


def test_of_several_containers_one_must_be_chosen(model: Dinov2Model, tmp_path: Path) -> None:
    zeros = {key: torch.zeros_like(tensor) for key, tensor in model.state_dict().items()}
    torch.save({"encoder": zeros, "target_encoder": model.state_dict()}, tmp_path / "vitl.pt")
    with pytest.raises(
        RunError, match="several containers; choose with --key one of: encoder, target_encoder"
    ):
        convert(tmp_path / "vitl.pt", tmp_path / "out")
    with pytest.raises(
        RunError, match="no container 'ema'; choose with --key one of: encoder, target_encoder"
    ):
        convert(tmp_path / "vitl.pt", tmp_path / "out", key="ema")
    assert not (tmp_path / "out").exists()
    convert(tmp_path / "vitl.pt", tmp_path / "out", key="target_encoder")
    assert load_file(tmp_path / "out" / "model.safetensors")["embeddings.cls_token"].abs().sum() > 0


def test_tied_and_odd_tensors_survive(tmp_path: Path) -> None:
    tied = torch.randn(3, 4)
    tensors = {"a": tied, "b": tied, "c": tied.T, "half": tied.bfloat16(), "one": torch.tensor(1)}
    torch.save(tensors | {"version": "1", "steps": 7}, tmp_path / "a.pt")
    done = convert(tmp_path / "a.pt", tmp_path / "out")
    assert done.left_out == ("steps", "version") and not done.has_config
    held = load_file(tmp_path / "out" / "model.safetensors")
    assert {key: (value.dtype, value.tolist()) for key, value in held.items()} == {
        key: (value.dtype, value.tolist()) for key, value in tensors.items()
    }


class Burglar:
    def __reduce__(self) -> tuple[Any, ...]:
        return (os.system, ("touch stolen",))


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (
            lambda file: torch.save({"model": {"a": torch.ones(2)}, "x": Burglar()}, file),
            r"would run code when it is opened \(it asks for posix\.system\); .*save its state_dict alone",
        ),
        (lambda file: torch.save(nn.Linear(2, 2), file), "would run code .*it asks for torch.nn.modules"),
        (lambda file: file.write_bytes(b""), "is empty; fetch it again"),
        (lambda file: file.write_bytes(b"\x80\x02nonsense"), "is damaged, or holds more than tensors"),
        (
            lambda file: (torch.save({"a": torch.ones(99)}, file), file.write_bytes(file.read_bytes()[:300])),
            "is damaged, or holds more than tensors",
        ),
        (lambda file: file.write_text("Not found"), "is no checkpoint of torch"),
        (lambda file: file.write_text("version https://git-lfs.github.com/spec/v1\n"), "is a Git LFS po"),
        (lambda file: save_file({"a": torch.ones(1)}, file), "is a safetensors file, which needs no conver"),
    ],
    ids=["code", "a-module", "empty", "damaged", "truncated", "text", "lfs", "safetensors"],
)
def test_what_torch_does_not_open_is_a_sentence_without_its_advice(
    make: Any, sentence: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    make(tmp_path / "a.pth")
    with pytest.raises(RunError, match=rf"a\.pth {sentence}") as caught:
        convert(tmp_path / "a.pth", tmp_path / "out")
    assert "weights_only" not in str(caught.value) and "\x1b" not in str(caught.value)
    assert not (tmp_path / "stolen").exists() and not (tmp_path / "out").exists()


def test_what_cannot_be_converted_is_a_sentence(model: Dinov2Model, tmp_path: Path) -> None:
    out, file = tmp_path / "out", tmp_path / "a.pt"
    with pytest.raises(RunError, match="there is no file"):
        convert(file, out)
    torch.save([torch.ones(2)], file)
    with pytest.raises(RunError, match="holds a list, not a dictionary of tensors"):
        convert(file, out)
    torch.save({"epoch": 3}, file)
    with pytest.raises(RunError, match="holds no tensors, neither by name nor in a container"):
        convert(file, out)
    torch.save({"a": torch.ones(2)}, file)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(RunError, match="must hold a JSON object"):
        convert(file, out)
    with pytest.raises(RunError, match=r"lacks nowhere\.json"):
        convert(file, out, tmp_path / "nowhere.json")
    (tmp_path / "config.json").unlink()
    with pytest.raises(ResourceError, match="cannot write"):
        convert(file, file / "out")
    convert(file, out)
    with pytest.raises(RunError, match=r"model\.safetensors exists already; choose another folder"):
        convert(file, out)


def test_tensors_beside_a_container_are_not_left_out_in_silence(tmp_path: Path) -> None:
    torch.save({"ema": {"a": torch.zeros(2)}, "a": torch.ones(2)}, tmp_path / "a.pt")
    with pytest.raises(
        RunError, match=r"several containers; choose with --key one of: \., ema \(\.: the tens"
    ):
        convert(tmp_path / "a.pt", tmp_path / "out")
    assert convert(tmp_path / "a.pt", tmp_path / "out", key=".").left_out == ("ema",)
    assert load_file(tmp_path / "out" / "model.safetensors")["a"].tolist() == [1, 1]


def test_settings_that_are_there_are_kept_and_a_cut_short_conversion_can_be_run_again(
    model: Dinov2Model, tmp_path: Path
) -> None:
    torch.save(model.state_dict(), settings(model, tmp_path / "old").parent / "a.pt")
    out = tmp_path / "out"
    out.mkdir()
    (out / "config.json").write_text('{"mine": 1}')
    with pytest.raises(
        RunError, match=r"out/config\.json exists already and is not .*old/config\.json; choose"
    ):
        convert(tmp_path / "old" / "a.pt", out)
    assert (out / "config.json").read_text() == '{"mine": 1}' and len(list(out.iterdir())) == 1
    shutil.copyfile(tmp_path / "old" / "config.json", out / "config.json")  # As after a kill.
    assert convert(tmp_path / "old" / "a.pt", out).has_config
    in_place = convert(tmp_path / "old" / "a.pt", tmp_path / "old")
    assert in_place.has_config and (tmp_path / "old" / "model.safetensors").is_file()
    shutil.move(tmp_path / "old" / "a.pt", tmp_path / "a.pt")
    (out / "model.safetensors").unlink()
    assert convert(tmp_path / "a.pt", out).has_config  # The config.json that was laid there beforehand.


@pytest.mark.parametrize(
    "tensor",
    [
        torch.ones(3).to_sparse(),
        torch.ones(3, dtype=torch.complex64),
        torch.ones(3, device="meta"),
    ],
    ids=["sparse", "complex", "meta"],
)
def test_tensors_that_are_not_plain_are_refused(tensor: torch.Tensor, tmp_path: Path) -> None:
    torch.save({"good": torch.ones(1), "odd": tensor}, tmp_path / "a.pt")
    with pytest.raises(RunError, match=r"a\.pt (holds 'odd', which is no plain tensor|would run code)"):
        convert(tmp_path / "a.pt", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_few_numbers_that_claim_to_be_many_take_no_memory(tmp_path: Path) -> None:
    torch.save({"a": torch.zeros(1).expand(10**13)}, tmp_path / "a.pt")
    with pytest.raises(RunError, match=r"would become 4\.0e\+13 bytes, more than 16 times its size"):
        convert(tmp_path / "a.pt", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_command_converts_and_says_what_it_did(
    model: Dinov2Model, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.save({"model": model.state_dict(), "epoch": 1, "lr": 0.1}, tmp_path / "a.pth")
    arguments = ["teacher", "convert", str(tmp_path / "a.pth"), "--out"]
    assert main([*arguments, str(tmp_path / "bare")]) == 0
    said = capsys.readouterr().out
    assert f"{len(model.state_dict())} tensors of 'model'" in said and "left out: epoch, lr" in said
    assert "still missing:" in said and "config.json" in said
    config = settings(model, tmp_path / "c")
    (tmp_path / "preprocessor_config.json").write_text(
        json.dumps({"image_mean": [0, 0, 0], "image_std": [1, 1, 1]})
    )
    assert main([*arguments, str(tmp_path / "whole"), "--config", str(config)]) == 0
    assert "still missing" not in capsys.readouterr().out
    assert load_teacher(tmp_path / "whole").mean == (0, 0, 0)
    assert main([*arguments, str(tmp_path / "whole")]) == 2
    assert "exists already" in capsys.readouterr().err

"""An encoder on disk comes back as it was, and what is missing or damaged is said in a sentence."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from salt_vla.config import EncoderConfig
from salt_vla.errors import ConfigError, RunError
from salt_vla.geometry import ClipGeometry
from salt_vla.models import VideoEncoder, build_encoder
from salt_vla.models.loading import (
    fingerprint,
    load_encoder,
    read_tensors,
    save_encoder,
    step_directories,
    write_tensors,
)

GRID = ClipGeometry(num_frames=4, image_size=16, tubelet_size=2, patch_size=8)


def encoder_of(seed: int = 0, positions: str = "rope") -> VideoEncoder:
    torch.manual_seed(seed)
    config = EncoderConfig(name="vit_micro", geometry=GRID, depth=1, positions=positions)  # type: ignore[arg-type]
    return build_encoder(config)


def save(encoder: VideoEncoder, folder: Path) -> Path:
    folder.mkdir(parents=True)
    save_encoder(encoder.state_dict(), encoder.config, folder)
    return folder


@pytest.mark.parametrize("positions", ["rope", "sincos"])
def test_saved_encoder_comes_back_bit_for_bit(positions: str, tmp_path: Path) -> None:
    encoder = encoder_of(positions=positions)
    loaded = load_encoder(save(encoder, tmp_path / "export"))
    pixels = torch.randn(2, 3, 4, 16, 16)
    assert torch.equal(loaded(pixels), encoder.eval()(pixels))
    assert not loaded.training and not any(p.requires_grad for p in loaded.parameters())


def test_run_directory_gives_its_last_checkpoint(tmp_path: Path) -> None:
    for step in (2, 10, 9):
        save(encoder_of(seed=step), tmp_path / "checkpoints" / f"step_{step:08d}")
    (tmp_path / "checkpoints" / ".writing-abc").mkdir()
    assert [step for step, _ in step_directories(tmp_path / "checkpoints")] == [2, 9, 10]
    loaded = load_encoder(tmp_path)
    assert torch.equal(loaded.patch_embed.weight, encoder_of(seed=10).patch_embed.weight)


def test_folder_without_an_encoder_is_refused_in_words(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"holds no encoder: neither encoder\.safetensors nor a checkpoint"):
        load_encoder(tmp_path)


def test_weights_without_their_configuration_are_refused_in_words(tmp_path: Path) -> None:
    folder = save(encoder_of(), tmp_path / "export")
    (folder / "encoder.json").unlink()
    with pytest.raises(RunError, match=r"lacks encoder\.json"):
        load_encoder(folder)


def test_damaged_configuration_is_refused_in_words(tmp_path: Path) -> None:
    folder = save(encoder_of(), tmp_path / "export")
    (folder / "encoder.json").write_text("{")
    with pytest.raises(ConfigError, match=r"encoder\.json is not valid JSON"):
        load_encoder(folder)


def test_weights_that_do_not_fit_their_configuration_are_refused_in_words(tmp_path: Path) -> None:
    folder = save(encoder_of(), tmp_path / "export")
    tensors = encoder_of().state_dict()
    write_tensors(tensors | {"norm.weight": torch.ones(3)}, folder / "encoder.safetensors")
    with pytest.raises(RunError, match=r"does not fit encoder\.json: size mismatch for norm\.weight"):
        load_encoder(folder)


@pytest.mark.parametrize("kept", [0, 5, 100, -1])
def test_truncated_weights_are_refused_in_words(kept: int, tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    write_tensors({"a": torch.arange(1000.0)}, path)
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(RunError, match=r"weights\.safetensors are missing or damaged"):
        read_tensors(path)


def test_missing_weights_are_refused_in_words(tmp_path: Path) -> None:
    for path in (tmp_path / "none.safetensors", tmp_path):
        with pytest.raises(RunError, match="are missing or damaged"):
            read_tensors(path)


def test_tensors_read_outlive_their_file(tmp_path: Path) -> None:
    """A file cut short after reading must not reach into the tensors (a mapped file would)."""
    path = tmp_path / "weights.safetensors"
    write_tensors({"a": torch.arange(100_000.0)}, path)
    tensor = read_tensors(path)["a"]
    path.write_bytes(b"")
    assert torch.equal(tensor, torch.arange(100_000.0))


def test_what_the_system_refuses_to_write_is_an_os_error(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="No such file or directory") as caught:
        write_tensors({"a": torch.zeros(2)}, tmp_path / "absent" / "weights.safetensors")
    assert caught.value.filename == str(tmp_path / "absent" / "weights.safetensors")


def test_fingerprint_knows_every_weight_and_the_configuration() -> None:
    encoder = encoder_of()
    before = fingerprint(encoder, "config")
    assert before == fingerprint(encoder_of(), "config") and before != fingerprint(encoder, "other")
    for name, parameter in encoder.named_parameters():
        changed = encoder_of()
        with torch.no_grad():
            changed.get_parameter(name).view(-1)[-1].add_(1)
        assert fingerprint(changed, "config") != before, name
        assert parameter.requires_grad


def test_a_folder_that_is_not_there_is_named_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RunError, match=f"there is no folder {tmp_path}/runs/nowhere to load"):
        load_encoder("runs/nowhere")

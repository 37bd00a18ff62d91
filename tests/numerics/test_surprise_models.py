"""Surprise is mean |prediction − LN(target)| over the tokens of later frames, as computed by hand from the
networks, and no prediction depends on a frame that it is of."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import VJEPA2Config, VJEPA2Model

from salt_vla.config import EncoderConfig, PredictorConfig
from salt_vla.errors import RunError
from salt_vla.evaluation.surprise import SurpriseModel, Windows, film_surprise
from salt_vla.evaluation.surprise_models import CopyLastFrame, PixelDifference, RunPredictor, VJEPA2Predictor
from salt_vla.geometry import ClipGeometry
from salt_vla.jobs.surprise_models import load_predictor
from salt_vla.masks import MaskGroup
from salt_vla.models import build_encoder, build_predictor, patchify
from salt_vla.models.pixels import normalise_pixels
from salt_vla.objectives.regression import latent_regression
from salt_vla.targets import PixelTargets, TargetProvider, Task, TeacherTargets
from salt_vla.targets.space import Mode, TargetSpace
from salt_vla.teachers.pixel import EncoderTeacher
from salt_vla.training.networks import Networks

GEOMETRY = ClipGeometry(num_frames=8, image_size=32, tubelet_size=2, patch_size=8)
CONTEXTS = (2, 4, 6)
Shaken = Callable[[nn.Module], Any]


def clips(seed: int = 0, batch: int = 3) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, (batch, GEOMETRY.num_frames, 32, 32, 3), dtype=np.uint8)


def run_predictor(shaken: Shaken, mode: Mode = "normalised", pixels: bool = False) -> RunPredictor:
    torch.manual_seed(1)
    config = EncoderConfig("vit_micro", GEOMETRY, depth=2)
    teacher = EncoderTeacher(shaken(build_encoder(config)), "taught")
    provider: TargetProvider = PixelTargets(GEOMETRY) if pixels else TeacherTargets(teacher)
    encoder = shaken(build_encoder(config))
    predictor = shaken(build_predictor(PredictorConfig(48, 2, 4), encoder.dim, provider.dim, GEOMETRY))
    mean = torch.randn(GEOMETRY.num_tokens, provider.dim) * 0.1
    task = Task(provider, TargetSpace(mode, mean))
    return RunPredictor(encoder, predictor, task, 1, "latents", 2)


@pytest.fixture(scope="module")
def reference(shaken: Shaken) -> VJEPA2Model:
    torch.manual_seed(2)
    config = VJEPA2Config(
        crop_size=32,
        patch_size=8,
        frames_per_clip=8,
        tubelet_size=2,
        hidden_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_pooler_layers=1,
        pred_hidden_size=24,
        pred_num_attention_heads=2,
        pred_num_hidden_layers=2,
        pred_num_mask_tokens=3,
    )
    return shaken(VJEPA2Model(config))


@pytest.fixture(scope="module")
def folder(reference: VJEPA2Model, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("vjepa2")
    reference.save_pretrained(path)
    return path


def future_group(context: int, batch: int) -> MaskGroup:
    """A training step's mask group whose context is the first frames."""
    ids = torch.arange(GEOMETRY.num_tokens).expand(batch, -1)
    end = context // 2 * GEOMETRY.tokens_per_step
    return MaskGroup(ids[:, :end], ids[:, end:])


@pytest.mark.parametrize("pixels", [False, True])
def test_surprise_of_a_run_is_its_training_loss_on_the_future(shaken: Shaken, pixels: bool) -> None:
    """Through the module and the loss that runs are trained with."""
    model = run_predictor(shaken, pixels=pixels)
    films = clips()
    found = model.surprise(films, CONTEXTS)
    assert found.shape == (3, 3)
    networks = Networks(model.encoder, model.predictor).eval()
    for number, film in enumerate(films):
        frames = torch.from_numpy(film[None])
        tubelets = patchify(normalise_pixels(frames), GEOMETRY)
        raw = model.task.provider.targets(frames, None)
        for place, context in enumerate(CONTEXTS):
            group = future_group(context, 1)
            with torch.no_grad():
                # The second group: the run's last one, whose mask token stands for large masks.
                predicted, _ = networks(tubelets, [group, group])
            target = raw[:, group.target_ids[0]]
            loss = latent_regression([predicted[1]], [target], power=1.0)
            assert found[number, place] == pytest.approx(float(loss), rel=1e-5)


def test_centred_targets_are_scored_where_r2_is(shaken: Shaken) -> None:
    centred = run_predictor(shaken, "centred")
    frames = torch.from_numpy(clips())
    group = future_group(4, 3)
    with torch.no_grad():
        context = centred.encoder(normalise_pixels(frames), group.context_ids)
        predicted = centred.predictor(context, group.context_ids, group.target_ids, 1)
        raw = centred.task.provider.targets(frames, None)[:, group.target_ids[0]]
    normal = (raw - raw.mean(-1, keepdim=True)) / (raw.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()
    mean = centred.task.space.position_mean[group.target_ids[0]]
    by_hand = (predicted + mean - normal).abs().mean((1, 2))
    assert centred.surprise(clips(), (4,))[:, 0] == pytest.approx(by_hand.numpy(), rel=1e-5)


def by_hand(model: VJEPA2Model, films: np.ndarray, context: int) -> Tensor:
    """From transformers' classes alone: a first pass of the first frames, a second of all of them."""
    pixels = normalise_pixels(torch.from_numpy(films)).transpose(1, 2)
    per_step = 16
    with torch.no_grad():
        seen = model(pixel_values_videos=pixels[:, :context], skip_predictor=True).last_hidden_state
        whole = model(pixel_values_videos=pixels, skip_predictor=True).last_hidden_state
        first = context // 2 * per_step
        places = torch.arange(whole.shape[1]).repeat(len(films), 1)
        answer = model.predictor(seen, [places[:, :first]], [places[:, first:]]).last_hidden_state
    target = nn.functional.layer_norm(whole[:, first:], (whole.shape[-1],))
    return (answer - target).abs().mean((1, 2))


def test_surprise_of_vjepa2_equals_transformers(reference: VJEPA2Model, folder: Path) -> None:
    model = load_predictor(str(folder))
    assert isinstance(model, VJEPA2Predictor)
    assert model.geometry == GEOMETRY
    films = clips(5)
    found = model.surprise(films, CONTEXTS)
    for place, context in enumerate(CONTEXTS):
        assert found[:, place] == pytest.approx(by_hand(reference, films, context).numpy(), rel=1e-4)


def test_vjepa2_looks_at_sixteen_frames_of_longer_clips(reference: VJEPA2Model, tmp_path: Path) -> None:
    reference.save_pretrained(tmp_path)
    config = tmp_path / "config.json"
    config.write_text(config.read_text().replace('"frames_per_clip": 8', '"frames_per_clip": 64'))
    assert load_predictor(str(tmp_path)).geometry.num_frames == 16


def test_vjepa2_without_a_predictor_is_refused(reference: VJEPA2Model, tmp_path: Path) -> None:
    bare = {k: v for k, v in reference.state_dict().items() if not k.startswith("predictor.")}
    reference.save_pretrained(tmp_path, state_dict=bare)
    with pytest.raises(RunError, match="encoder's alone"):
        load_predictor(str(tmp_path))


@pytest.mark.parametrize("family", ["run", "vjepa2"])
def test_predictions_do_not_depend_on_the_frames_that_they_are_of(
    family: str, shaken: Shaken, folder: Path
) -> None:
    """Bitwise: whatever comes after the context, what was predicted of it is the same."""
    model = run_predictor(shaken) if family == "run" else load_predictor(str(folder))
    predictor = model.predictor if isinstance(model, RunPredictor) else model.model.predictor
    said: list[Tensor] = []
    hook = predictor.register_forward_hook(
        lambda module, args, out: said.append(out if isinstance(out, Tensor) else out.last_hidden_state)
    )
    one, other = clips(1), clips(1)
    other[:, 4:] = clips(2)[:, 4:]
    values = [model.surprise(films, (2, 4, 6)) for films in (one, other)]
    hook.remove()
    assert torch.equal(said[0], said[3])
    assert torch.equal(said[1], said[4])
    assert not torch.equal(said[2], said[5])  # Frames 4 and 5 are context there.
    assert (values[0] != values[1]).all()


def test_copy_last_frame_and_pixel_difference_by_hand() -> None:
    films = np.zeros((1, 8, 32, 32, 3), np.uint8)
    films[0, 4:] = 51  # A fifth brighter from frame 4 on.
    films[0, 6:, :16] = 102  # Another fifth in half the picture.
    copied = CopyLastFrame(GEOMETRY, 1).surprise(films, (4, 6))
    assert copied[0] == pytest.approx([(0.2 + 0.2 + 0.3 + 0.3) / 4, 0.1], rel=1e-5)
    changed = PixelDifference(GEOMETRY, 1).surprise(films, (4, 6))
    assert changed[0] == pytest.approx([(0.2 + 0.0 + 0.1 + 0.0) / 4, (0.1 + 0.0) / 2], rel=1e-5)


@pytest.mark.parametrize("family", ["run", "vjepa2"])
def test_untrained_twins_are_other_networks_of_the_same_kind(
    family: str, shaken: Shaken, folder: Path
) -> None:
    model = run_predictor(shaken) if family == "run" else load_predictor(str(folder))
    twin, again, other = model.untrained(0), model.untrained(0), model.untrained(1)
    assert twin.fingerprint == again.fingerprint
    assert len({model.fingerprint, twin.fingerprint, other.fingerprint}) == 3
    assert twin.geometry == model.geometry
    films = clips()
    assert np.array_equal(twin.surprise(films, (4,)), again.surprise(films, (4,)))
    assert not np.array_equal(twin.surprise(films, (4,)), model.surprise(films, (4,)))


def test_a_films_surprise_does_not_depend_on_its_batch(shaken: Shaken) -> None:
    model: SurpriseModel = run_predictor(shaken)
    film = np.concatenate(list(clips(4)))
    alone, together = (film_surprise(model, film, Windows((4,), batch=size)) for size in (1, 6))
    assert alone.curves[0].values == pytest.approx(together.curves[0].values, rel=1e-5)

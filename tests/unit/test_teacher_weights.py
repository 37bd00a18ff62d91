"""Checkpoints on disk: whole, sharded, or wrong in a way that a sentence names."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from salt_vla.errors import RunError
from salt_vla.hub import MODEL_FILES
from salt_vla.models.pixels import MEAN, STD
from salt_vla.teachers import weights

TENSORS = {f"layer.{number}.weight": torch.arange(6.0).reshape(2, 3) + number for number in range(4)}


def sharded(folder: Path, change: Callable[[dict[str, Any]], None] = lambda index: None) -> Path:
    """Two shards and their index, as `save_pretrained` lays them out; `change` edits the index."""
    names = sorted(TENSORS)
    places = {key: f"model-0000{1 + number // 2}-of-00002.safetensors" for number, key in enumerate(names)}
    for place in set(places.values()):
        save_file({key: TENSORS[key] for key in names if places[key] == place}, folder / place)
    index = {"metadata": {"total_size": 96}, "weight_map": places}
    change(index)
    (folder / weights.INDEX).write_text(json.dumps(index))
    return folder


def network() -> nn.Module:
    """Two layers without weights of their own."""
    with torch.device("meta"):
        return nn.ModuleDict({"first": nn.Linear(3, 2), "second": nn.Linear(2, 2, bias=False)})


def fitting() -> dict[str, Tensor]:
    return {
        "first.weight": torch.randn(2, 3),
        "first.bias": torch.randn(2),
        "second.weight": torch.randn(2, 2),
    }


def test_one_file_and_shards_hold_the_same(tmp_path: Path) -> None:
    whole, parts, odd = (tmp_path / name for name in ("whole", "parts", "odd"))
    for folder in (whole, parts, odd):
        folder.mkdir()
    save_file(TENSORS, whole / weights.WEIGHTS)
    save_file(TENSORS, odd / "vit_b.safetensors")
    for folder in (whole, sharded(parts), odd):
        read = weights.read_weights(folder)
        assert read.keys() == TENSORS.keys()
        assert all(torch.equal(read[key], TENSORS[key]) for key in TENSORS)


def test_weights_stay_what_they_were_when_the_file_changes(tmp_path: Path) -> None:
    save_file(TENSORS, tmp_path / weights.WEIGHTS)
    read = weights.read_weights(tmp_path)
    with (tmp_path / weights.WEIGHTS).open("r+b") as file:
        file.seek(-96, 2)
        file.write(b"\xff" * 96)
    assert all(torch.equal(read[key], TENSORS[key]) for key in TENSORS)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "vitl.pt", "checkpoint.pth"])
def test_a_pickle_is_refused_with_the_command_that_converts_it(name: str, tmp_path: Path) -> None:
    torch.save(TENSORS, tmp_path / name)
    with pytest.raises(RunError, match=f"salt-vla teacher convert {tmp_path / name} --out DIRECTORY"):
        weights.read_weights(tmp_path)


def test_a_pickle_under_a_safetensors_name_is_never_opened(tmp_path: Path) -> None:
    """Both formats of torch.save and a bare pickle; each would leave a file behind if it were loaded."""

    class Trap:
        def __reduce__(self) -> tuple[Any, ...]:
            return (Path.touch, (tmp_path / "sprung",))

    file = tmp_path / weights.WEIGHTS
    for zipped in (True, False):
        torch.save({"trap": Trap()}, file, _use_new_zipfile_serialization=zipped)
        with pytest.raises(RunError, match="is a pickle under another name; convert it once with"):
            weights.read_weights(tmp_path)
    file.write_bytes(pickle.dumps({"trap": Trap()}))
    with pytest.raises(RunError, match="is a pickle under another name"):
        weights.read_weights(tmp_path)
    assert not (tmp_path / "sprung").exists()


def test_a_git_lfs_pointer_is_told_from_a_damaged_file(tmp_path: Path) -> None:
    file = tmp_path / weights.WEIGHTS
    file.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 343000000\n")
    with pytest.raises(RunError, match="is a Git LFS pointer, not the weights; run: git lfs pull"):
        weights.read_weights(tmp_path)
    save_file(TENSORS, file)
    file.write_bytes(file.read_bytes()[:-5])
    with pytest.raises(RunError, match="missing or damaged"):
        weights.read_weights(tmp_path)
    file.write_bytes(b"")
    with pytest.raises(RunError, match="missing or damaged"):
        weights.read_weights(tmp_path)


def test_a_folder_without_weights_is_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"holds no weights: neither model\.safetensors nor"):
        weights.read_weights(tmp_path)
    with pytest.raises(RunError, match="is no folder with a checkpoint"):
        weights.read_weights(tmp_path / "nowhere")
    for name in ("a.safetensors", "b.safetensors"):
        save_file(TENSORS, tmp_path / name)
    with pytest.raises(RunError, match="holds 2 safetensors files without"):
        weights.read_weights(tmp_path)


def test_shards_that_disagree_with_their_index_are_named(tmp_path: Path) -> None:
    def add(index: dict[str, Any]) -> None:
        index["weight_map"]["layer.9.weight"] = "model-00001-of-00002.safetensors"

    def remove(index: dict[str, Any]) -> None:
        del index["weight_map"]["layer.3.weight"]

    for change, key in ((add, "layer.9.weight"), (remove, "layer.3.weight")):
        with pytest.raises(RunError, match=rf"disagree about {key}: fetch the checkpoint again"):
            weights.read_weights(sharded(tmp_path, change))
    sharded(tmp_path)
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(RunError, match=r"model-00002-of-00002\.safetensors is missing"):
        weights.read_weights(tmp_path)


@pytest.mark.parametrize("place", ["../other.safetensors", "/etc/passwd", "model.bin", "sub/x.safetensors"])
def test_an_index_cannot_lead_out_of_its_folder(place: str, tmp_path: Path) -> None:
    save_file(TENSORS, tmp_path / "other.safetensors")
    folder = tmp_path / "inner"
    folder.mkdir()
    with pytest.raises(RunError, match="which is no safetensors file beside it"):
        weights.read_weights(sharded(folder, lambda index: index["weight_map"].update({"x": place})))


def test_an_index_of_another_form_is_a_sentence(tmp_path: Path) -> None:
    for content in ("{}", '{"weight_map": 3}', '{"weight_map": {"a": 1}}'):
        (tmp_path / weights.INDEX).write_text(content)
        with pytest.raises(RunError, match="must hold an object `weight_map`"):
            weights.read_weights(tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "lacks config.json, which says what the weights are"),
        ("{", "cannot be read as JSON"),
        ("[]", "must hold a JSON object, not a list"),
        ("\udcff", "cannot be read as JSON"),
    ],
)
def test_a_config_that_cannot_be_read_is_a_sentence(
    content: str | None, message: str, tmp_path: Path
) -> None:
    if content is not None:
        (tmp_path / weights.CONFIG).write_bytes(content.encode("utf-8", "surrogateescape"))
    with pytest.raises(RunError, match=message):
        weights.read_config(tmp_path)


def test_weights_arrive_as_float32_whatever_they_were_stored_as() -> None:
    for dtype in (torch.float32, torch.float16, torch.bfloat16, torch.float64):
        module, tensors = network(), {key: tensor.to(dtype) for key, tensor in fitting().items()}
        weights.load_weights(module, tensors, Path("teacher"))
        for key, held in module.state_dict().items():
            assert held.dtype == torch.float32
            assert torch.equal(held, tensors[key].float())


def test_missing_and_unexpected_names_are_all_counted() -> None:
    tensors = fitting()
    del tensors["first.bias"]
    tensors |= {f"extra.{number}": torch.zeros(1) for number in range(6)}
    message = r"not those of config\.json: missing first\.bias; unexpected extra\.0, .*extra\.3 and 2 more"
    with pytest.raises(RunError, match=message):
        weights.load_weights(network(), tensors, Path("teacher"))


def test_another_shape_is_named_with_both() -> None:
    with pytest.raises(RunError, match=r"first\.weight is \(3, 2\), not \(2, 3\)"):
        weights.load_weights(network(), fitting() | {"first.weight": torch.zeros(3, 2)}, Path("teacher"))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers_are_refused(value: float) -> None:
    with pytest.raises(RunError, match=r"hold infinities or NaN: first\.bias"):
        weights.load_weights(network(), fitting() | {"first.bias": torch.full((2,), value)}, Path("teacher"))


def test_a_module_that_loses_a_tensor_on_the_way_is_caught() -> None:
    """As the loading code of some transformers versions did with query and value biases."""

    class Forgetful(nn.Linear):
        def _load_from_state_dict(self, state: dict[str, Tensor], prefix: str, *rest: Any) -> None:
            state[f"{prefix}bias"] = torch.zeros(2)
            super()._load_from_state_dict(state, prefix, *rest)

    module = nn.ModuleDict({"first": Forgetful(3, 2), "second": nn.Linear(2, 2, bias=False)})
    with pytest.raises(RunError, match=r"first\.bias did not arrive in the network as it is in teacher"):
        weights.load_weights(module, fitting(), Path("teacher"))


def test_names_are_mapped_split_and_left_out_by_rule() -> None:
    held = {
        "module.blocks.0.attn.qkv.weight": torch.arange(12.0).reshape(6, 2),
        "module.head.weight": torch.zeros(1),
        "module.headless": torch.ones(1),
    }
    rules = ((r"^blocks\.(\d+)\.attn\.", r"layer.\1."),)
    mapped = weights.mapped(held, ((r"^module\.", ""),), (r"head\.weight",), rules, Path("teacher"))
    assert sorted(mapped) == [
        "headless",
        "layer.0.key.weight",
        "layer.0.query.weight",
        "layer.0.value.weight",
    ]
    assert mapped["layer.0.query.weight"].tolist() == [[0, 1], [2, 3]]
    assert mapped["layer.0.key.weight"].tolist() == [[4, 5], [6, 7]]
    assert mapped["layer.0.value.weight"].tolist() == [[8, 9], [10, 11]]


def test_two_networks_in_one_file_are_not_mixed() -> None:
    held = {"module.norm.weight": torch.zeros(1), "norm.weight": torch.ones(1)}
    with pytest.raises(RunError, match="hold two networks"):
        weights.mapped(held, ((r"^module\.", ""),), (r"head",), (), Path("teacher"))
    with pytest.raises(RunError, match=r"a\.qkv\.bias of shape \(4,\) is not three equal parts"):
        weights.mapped({"a.qkv.bias": torch.zeros(4)}, (), (r"head",), (), Path("teacher"))


def test_pixel_statistics_are_the_processors_or_imagenets(tmp_path: Path) -> None:
    assert weights.pixel_statistics(tmp_path) == (MEAN, STD)
    (tmp_path / "preprocessor_config.json").write_text('{"do_resize": true}')
    assert weights.pixel_statistics(tmp_path) == (MEAN, STD)
    (tmp_path / "video_preprocessor_config.json").write_text(
        '{"image_mean": [0, 0, 0.5], "image_std": [1, 1, 2]}'
    )
    assert weights.pixel_statistics(tmp_path) == ((0.0, 0.0, 0.5), (1.0, 1.0, 2.0))


@pytest.mark.parametrize(
    ("mean", "std"),
    [
        ([0.5], [1, 1, 1]),
        ("grey", [1, 1, 1]),
        ([0, 0, 0], [1, 0, 1]),
        ([True, False, True], [1, 1, 1]),
        ([123.6, 116.3, 103.5], [58.4, 57.1, 57.4]),
        ([0.5, 0.5, 10**400], [1, 1, 1]),
    ],
    ids=["one", "text", "zero", "truths", "of 255", "400 digits"],
)
def test_statistics_that_cannot_be_are_a_sentence(mean: Any, std: Any, tmp_path: Path) -> None:
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({"image_mean": mean, "image_std": std}))
    with pytest.raises(RunError, match="must be three numbers"):
        weights.pixel_statistics(tmp_path)


@pytest.mark.parametrize(
    ("said", "sentence"),
    [
        ({"image_mean": [0, 0, 0]}, "has image_mean alone; give image_mean and image_std, or neither"),
        ({"do_normalize": False}, "has do_normalize=False; pixels are divided by 255 and normalised here"),
        ({"do_rescale": False}, "has do_rescale=False; pixels"),
        ({"rescale_factor": 1 / 127.5, "offset": True}, "has offset=True, rescale_factor=0.0078"),
        ({"image_mean": [float("nan")] * 3, "image_std": [1, 1, 1]}, "NaN is no finite number"),
    ],
)
def test_what_a_processor_does_and_we_do_not_is_refused(
    said: dict[str, Any], sentence: str, tmp_path: Path
) -> None:
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(said))
    with pytest.raises(RunError, match=sentence):
        weights.pixel_statistics(tmp_path)


def test_nested_settings_count_and_a_familys_own_statistics_stand_where_there_are_none(
    tmp_path: Path,
) -> None:
    half = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    (tmp_path / "preprocessor_config.json").write_text('{"do_resize": true, "rescale_factor": 0.00392156862}')
    assert weights.pixel_statistics(tmp_path, half) == half
    nested = {"image_processor": {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.4, 0.4]}}
    (tmp_path / "processor_config.json").write_text(json.dumps(nested))
    assert weights.pixel_statistics(tmp_path, half) == ((0.1, 0.2, 0.3), (0.4, 0.4, 0.4))
    assert set(weights.PROCESSORS) < set(MODEL_FILES)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ('{"a":' * 3000 + "1" + "}" * 3000, "cannot be read as JSON"),
        ('{"a": 1e400}', "1e400 is no finite number"),
        (
            "version https://git-lfs.github.com/spec/v1",
            "is a Git LFS pointer, not the file; run: git lfs pull",
        ),
    ],
    ids=["deep", "infinite", "lfs"],
)
def test_a_config_that_is_no_json_of_finite_numbers_is_a_sentence(
    text: str, sentence: str, tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(RunError, match=sentence):
        weights.read_config(tmp_path)


@pytest.mark.parametrize("dtype", [torch.int8, torch.int64, torch.bool])
def test_weights_that_are_no_floating_point_are_refused(dtype: torch.dtype) -> None:
    module = torch.nn.Linear(2, 2)
    held = {"weight": torch.ones(2, 2, dtype=dtype), "bias": torch.ones(2)}
    kind = str(dtype).removeprefix("torch.")
    with pytest.raises(RunError, match=rf"are {kind} numbers \(weight\): quantised or damaged"):
        weights.load_weights(module, held, Path("teacher"))

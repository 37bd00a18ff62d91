"""Published checkpoints: a folder's configuration and tensors, and their way into a module, key by key.

Whatever does not fit exactly is a sentence that names it. Knows no family's names: those come as rules.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor, nn

from salt_vla.errors import RunError
from salt_vla.models.loading import read_tensors
from salt_vla.models.pixels import MEAN, STD

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
PICKLES = ("*.bin", "*.pt", "*.pth", "*.pth.tar", "*.ckpt", "*.pkl", "*.pickle")
# Where a folder keeps the settings of pixels; newer versions of transformers nest them in one file.
PROCESSORS = ("video_preprocessor_config.json", "preprocessor_config.json", "processor_config.json")
NESTED = ("video_processor", "image_processor")
# What a processor can do to pixels beside the statistics, and what alone can be had here.
PIXELS_ARE = {
    "do_normalize": (True, None),
    "do_rescale": (True, None),
    "do_flip_channel_order": (False, None),
    "do_grayscale": (False, None),
    "offset": (False, None),
}
LFS = b"version https://git-lfs"
FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
NOT_HERE = ("quantization_config", "rope_parameters", "rope_scaling")
MAX_EPSILON = 1e-2  # Published norms have 1e-12 … 1e-5.
# What Python, torch and transformers raise for sizes that no network can have.
CANNOT_BE = (
    StrictDataclassError, TypeError, ValueError, ArithmeticError, AttributeError, KeyError, IndexError,
    RuntimeError, MemoryError,
)  # fmt: skip

Rules = Sequence[tuple[str, str]]  # (pattern, replacement) by `re.sub`, all in turn.
Statistics = tuple[float, float, float]
C = TypeVar("C", bound="PreTrainedConfig")
M = TypeVar("M", bound=nn.Module)
T = TypeVar("T")


def read_config(folder: Path, name: str = CONFIG) -> dict[str, Any]:
    """A JSON object from the folder, its numbers finite; `RunError` where it is missing, damaged or
    something else."""
    path = folder / name
    try:
        text = path.read_bytes()
        value = json.loads(text, parse_constant=_finite, parse_float=_finite)
    except FileNotFoundError as error:
        raise RunError(f"{folder} lacks {name}, which says what the weights are") from error
    except (OSError, ValueError, RecursionError) as error:
        if isinstance(error, ValueError) and text.startswith(LFS):
            raise RunError(f"{path} is a Git LFS pointer, not the file; run: git lfs pull") from error
        raise RunError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(value, dict):
        raise RunError(f"{path} must hold a JSON object, not a {type(value).__name__}")
    return value


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{text[:20]} is no finite number")
    return number


def pixel_statistics(
    folder: Path, default: tuple[Statistics, Statistics] = (MEAN, STD)
) -> tuple[Statistics, Statistics]:
    """(mean, standard deviation) of each colour that the checkpoint's own processor file names, in 0 … 1.

    `default`: the family's, where no such file gives them. `RunError` for half of them, for numbers that are
    none, and for a processor that does more to pixels than dividing by 255 and normalising.
    """
    for name in PROCESSORS:
        if (folder / name).is_file():
            path, said = folder / name, read_config(folder, name)
            said = next((said[key] for key in NESTED if isinstance(said.get(key), dict)), said)
            _require_plain_pixels(said, path)
            given = [key for key in ("image_mean", "image_std") if said.get(key) is not None]
            if len(given) == 1:
                raise RunError(f"{path} has {given[0]} alone; give image_mean and image_std, or neither")
            if given:
                mean = _three(said["image_mean"], path, "image_mean", (0.0, 1.0))
                return mean, _three(said["image_std"], path, "image_std", (1e-3, 2.0))
    return default


def _require_plain_pixels(said: Mapping[str, Any], path: Path) -> None:
    odd = [f"{key}={said[key]!r}" for key, fit in PIXELS_ARE.items() if key in said and said[key] not in fit]
    factor = said.get("rescale_factor")
    if factor is not None and not (_is_number(factor) and abs(factor * 255 - 1) < 1e-3):
        odd.append(f"rescale_factor={factor!r}"[:60])
    if odd:
        raise RunError(
            f"{path} has {', '.join(odd)}; pixels are divided by 255 and normalised here, nothing else: such "
            "a checkpoint cannot be a teacher"
        )


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _three(value: object, path: Path, key: str, bounds: tuple[float, float]) -> Statistics:
    if (
        not isinstance(value, list)
        or len(value) != 3
        or not all(_is_number(number) and bounds[0] <= number <= bounds[1] for number in value)
    ):
        raise RunError(
            f"{path}: {key} must be three numbers of pixels in 0 … 1 (a standard deviation above zero), not "
            f"{str(value)[:80]}"
        )
    return (float(value[0]), float(value[1]), float(value[2]))


def read_weights(folder: Path) -> dict[str, Tensor]:
    """Every tensor of the folder's checkpoint, on the CPU: one safetensors file, or shards with their index.

    Raises `RunError` when there is none (a pickle beside is named with the command that converts it), when
    a file is damaged or is no safetensors file, or when shards and index disagree.
    """
    if not folder.is_dir():
        raise RunError(f"{folder} is no folder with a checkpoint")
    if (folder / WEIGHTS).is_dir():
        raise RunError(f"{folder / WEIGHTS} is a folder, not a file of weights; fetch the checkpoint again")
    if (folder / WEIGHTS).is_file():
        return _read_file(folder / WEIGHTS)
    if (folder / INDEX).is_file():
        return _read_shards(folder)
    files = sorted(folder.glob("*.safetensors"))
    if len(files) == 1:
        return _read_file(files[0])
    if files:
        raise RunError(
            f"{folder} holds {len(files)} safetensors files without {INDEX}; keep the one meant, as {WEIGHTS}"
        )
    pickles = sorted(path for pattern in PICKLES for path in folder.glob(pattern))
    if pickles:
        raise RunError(f"{pickles[0]} is a pickle, which can run code when it is opened; {_cure(pickles[0])}")
    raise RunError(f"{folder} holds no weights: neither {WEIGHTS} nor {INDEX}")


def _cure(pickle: Path) -> str:
    return f"convert it once with: salt-vla teacher convert {pickle} --out DIRECTORY"


def _read_file(path: Path) -> dict[str, Tensor]:
    try:
        return read_tensors(path)
    except RunError as error:
        with path.open("rb") as file:
            head = file.read(64)
        # torch's zip files, or pickles from protocol 2. A safetensors file has its JSON at the ninth byte.
        if head.startswith(b"PK\x03\x04") or (head[:1] == b"\x80" and head[8:9] != b"{"):
            raise RunError(f"{path} is a pickle under another name; {_cure(path)}") from error
        if head.startswith(LFS):
            raise RunError(f"{path} is a Git LFS pointer, not the weights; run: git lfs pull") from error
        raise


def _read_shards(folder: Path) -> dict[str, Tensor]:
    index = read_config(folder, INDEX)
    places = index.get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(place, str) for place in places.values()):
        raise RunError(f"{folder / INDEX} must hold an object `weight_map` of tensor names and file names")
    tensors: dict[str, Tensor] = {}
    for shard in sorted(set(places.values())):
        if Path(shard).name != shard or not shard.endswith(".safetensors"):
            raise RunError(f"{folder / INDEX} names {shard!r}, which is no safetensors file beside it")
        if not (folder / shard).is_file():
            raise RunError(f"{folder / shard} is missing; {INDEX} names it: fetch the checkpoint again")
        held = _read_file(folder / shard)
        promised = {key for key, place in places.items() if place == shard}
        if set(held) != promised:
            odd = _some(set(held) ^ promised)
            raise RunError(f"{folder / shard} and {INDEX} disagree about {odd}: fetch the checkpoint again")
        tensors |= held
    return tensors


def mapped(
    held: Mapping[str, Tensor], prefixes: Rules, ignored: Sequence[str], rules: Rules, folder: Path
) -> dict[str, Tensor]:
    """The encoder's tensors under its module's names: strip `prefixes`, drop `ignored`, split, apply `rules`.

    `ignored` are patterns of whole names: what a family knows and does not need. A fused "….qkv.weight|bias"
    of 3·D rows, as the original ViT code has it, becomes "query", "key" and "value". `RunError` where two
    tensors end under one name.
    """
    known = re.compile("|".join(f"(?:{pattern})" for pattern in ignored))
    found: dict[str, Tensor] = {}
    for key, tensor in held.items():
        bare = _renamed(key, prefixes)
        if known.fullmatch(bare):
            continue
        for name, part in _split_qkv(bare, tensor):
            name = _renamed(name, rules)
            if name in found:
                raise RunError(f"the weights in {folder} hold two networks ({key} twice); keep the one meant")
            found[name] = part
    return found


def _renamed(key: str, rules: Rules) -> str:
    for pattern, replacement in rules:
        key = re.sub(pattern, replacement, key)
    return key


def _split_qkv(key: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
    match = re.search(r"^(.*\.)qkv\.(weight|bias)$", key)
    if match is None:
        yield key, tensor
        return
    if tensor.ndim == 0 or len(tensor) % 3:
        raise RunError(f"{key} of shape {tuple(tensor.shape)} is not three equal parts")
    for name, part in zip(("query", "key", "value"), tensor.chunk(3), strict=True):
        yield f"{match[1]}{name}.{match[2]}", part


def build_config(kind: type[C], said: Mapping[str, Any], folder: Path) -> C:
    """A configuration of transformers from `said`; `RunError` for what it cannot be built or computed with.

    Fields that config.json leaves out take the class's defaults, as that format means them. Only fields of
    the architecture are handed on, not what every class of transformers knows of loading and running (dtype,
    kind of attention, names of labels, shape of outputs).
    """
    from transformers import PreTrainedConfig  # Seconds, which commands without such a teacher do not wait.
    from transformers.activations import ACT2FN

    for key in NOT_HERE:
        if said.get(key) is not None:
            raise RunError(
                f"{folder / CONFIG} has {key}, which changes the numbers and is not computed here; only "
                "plain weights and the class's own positions can be a teacher's"
            )
    common = {field.name for field in dataclasses.fields(PreTrainedConfig)}
    own = {field.name for field in dataclasses.fields(kind)} - common
    fields = {key: value for key, value in said.items() if key in own and not key.startswith("_")}
    config = _described(lambda: kind.from_dict(fields), folder, f"is no {kind.model_type} configuration")
    width, heads, epsilon = config.hidden_size, config.num_attention_heads, config.layer_norm_eps
    if heads < 1 or width < 1 or width % heads:
        raise RunError(
            f"{folder / CONFIG}: hidden_size={width} is not a multiple of num_attention_heads={heads}"
        )
    if not 0 < epsilon <= MAX_EPSILON:
        raise RunError(
            f"{folder / CONFIG}: layer_norm_eps={epsilon} is not above 0 and at most {MAX_EPSILON}"
        )
    if config.hidden_act not in ACT2FN:
        raise RunError(
            f"{folder / CONFIG}: hidden_act={config.hidden_act!r} is no activation of transformers"
        )
    return config


def build_module(make: Callable[[], M], folder: Path) -> M:
    """A module of transformers on the meta device: its weights come from the file, or it is an error."""

    def build() -> M:
        with torch.device("meta"):
            return make()

    return _described(build, folder, "describes a network that cannot be built")


def _described(make: Callable[[], T], folder: Path, what: str) -> T:
    try:
        return make()
    except CANNOT_BE as error:
        reason = " ".join(str(error).split())[:300]
        raise RunError(f"{folder / CONFIG} {what}: {reason or type(error).__name__}") from error


def require_sizes(folder: Path, said: Mapping[str, int], found: Mapping[str, int]) -> None:
    """`RunError` where config.json's sizes are not those of the weights beside it: both numbers are named."""
    lies = [f"{key}={said[key]} (the weights have {found[key]})" for key in found if said[key] != found[key]]
    if lies:
        raise RunError(f"{folder / CONFIG} does not describe the weights beside it: {', '.join(lies)}")


def video_sizes(tensors: Mapping[str, Tensor], patches: str, blocks: str, folder: Path) -> dict[str, int]:
    """The sizes that a video encoder's weights show, under the names that config.json gives them.

    `patches`: the patch embedding (width, colours, frames, rows, columns); `RunError` where there is none.
    `blocks`: the pattern of `blocks_in`.
    """
    if patches not in tensors or tensors[patches].ndim != 5:
        raise RunError(
            f"the weights in {folder} are not those of {CONFIG}: missing {patches} of five dimensions"
        )
    width, _, tubelet, patch, _ = tensors[patches].shape
    depth = blocks_in(tensors, blocks)
    return {"num_hidden_layers": depth, "hidden_size": width, "tubelet_size": tubelet, "patch_size": patch}


def blocks_in(tensors: Iterable[str], pattern: str) -> int:
    """How many blocks the names show: one more than the highest number that `pattern` captures."""
    return max((int(match[1]) for key in tensors if (match := re.match(pattern, key))), default=-1) + 1


def load_weights(module: nn.Module, tensors: Mapping[str, Tensor], folder: Path) -> None:
    """Put the tensors into `module` (which may live on the meta device), as float32.

    Raises `RunError` for every name that is missing or left over and for every shape that differs: nothing
    is filled in or dropped in silence. What the module then holds is compared with the file, since a class
    whose loading hooks rename keys has lost query and value biases that way before.
    """
    expected = module.state_dict()
    missing, extra = set(expected) - set(tensors), set(tensors) - set(expected)
    if missing or extra:
        parts = [f"missing {_some(missing)}"] if missing else []
        parts += [f"unexpected {_some(extra)}"] if extra else []
        raise RunError(f"the weights in {folder} are not those of {CONFIG}: {'; '.join(parts)}")
    shapes = {key: (tuple(tensors[key].shape), tuple(expected[key].shape)) for key in expected}
    wrong = [f"{key} is {held}, not {wanted}" for key, (held, wanted) in shapes.items() if held != wanted]
    if wrong:
        raise RunError(f"the weights in {folder} are not those of {CONFIG}: {'; '.join(wrong[:3])}")
    whole = sorted(key for key, tensor in tensors.items() if tensor.dtype not in FLOATS)
    if whole:
        kind = str(tensors[whole[0]].dtype).removeprefix("torch.")
        raise RunError(
            f"the weights in {folder} are {kind} numbers ({_some(whole)}): quantised or damaged; only "
            "checkpoints in floating point can be teachers"
        )
    broken = [key for key, tensor in tensors.items() if not torch.isfinite(tensor).all()]
    if broken:
        raise RunError(f"the weights in {folder} hold infinities or NaN: {_some(broken)}")
    values = {key: tensor.to(torch.float32).contiguous() for key, tensor in tensors.items()}
    module.load_state_dict(values, assign=True)
    for key, held in module.state_dict().items():
        if not torch.equal(held, values[key]):
            raise RunError(f"{key} did not arrive in the network as it is in {folder}")


def _some(names: Iterable[str], most: int = 4) -> str:
    listed = sorted(names)
    more = f" and {len(listed) - most} more" if len(listed) > most else ""
    return ", ".join(listed[:most]) + more

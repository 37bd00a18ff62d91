"""Every setting of a run as frozen dataclasses, checked when they are made; to and from JSON.

Knows neither torch nor the code that acts on the settings.
"""

from __future__ import annotations

import dataclasses
import json
import math
import types
import typing
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

from salt_vla.errors import ConfigError
from salt_vla.geometry import ClipGeometry

Positions = Literal["rope", "sincos"]
T = TypeVar("T")

LARGEST = 2**63 - 1  # of any number in the settings: what an int64 holds, and no infinity
ADDED_LATER = {"added_later": True}  # A field that older files lack: its default does what was done before.


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ConfigError(message)


def _require_at_least(least: int, config: Any, section: str, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        _require(value >= least, f"{section}{name} must be at least {least}, not {value}")


def _require_choices(config: Any, section: str) -> None:
    """Every `Literal` field holds one of its values: names typed in Python are checked as those in JSON."""
    for name, hint in typing.get_type_hints(type(config)).items():
        if typing.get_origin(hint) is Literal:
            _require_choice(getattr(config, name), hint, f"{section}.{name}")


def _require_choice(value: Any, hint: Any, where: str) -> None:
    choices = typing.get_args(hint)
    _require(value in choices, f"{where} must be one of {', '.join(choices)}, not {value!r}")


@dataclass(frozen=True)
class BlockSpec:
    """One mask generator of V-JEPA: how many blocks, how large.

    Scales are shares of the token grid (space: of rows × columns; time: of time steps); `aspect_ratio` is
    the range of height ÷ width.
    """

    num_blocks: int = 8
    spatial_scale: float = 0.15
    temporal_scale: float = 1.0
    aspect_ratio: tuple[float, float] = (0.75, 1.5)

    def __post_init__(self) -> None:
        _require_at_least(1, self, "masks.blocks.", "num_blocks")
        for name in ("spatial_scale", "temporal_scale"):
            value = getattr(self, name)
            _require(0 < value <= 1, f"masks.blocks.{name} must lie in (0, 1], not {value}")
        low, high = self.aspect_ratio
        _require(
            0 < low <= high, f"masks.blocks.aspect_ratio must be (low, high) > 0, not {self.aspect_ratio}"
        )


VJEPA_BLOCKS = (BlockSpec(num_blocks=8, spatial_scale=0.15), BlockSpec(num_blocks=2, spatial_scale=0.7))


@dataclass(frozen=True)
class MaskConfig:
    """Which tokens the encoder sees. `multiblock` is V-JEPA's; the others mask an exact share `ratio`.

    `max_targets` caps the masked tokens predicted per clip and group (0: all of them); it changes the
    compute of a step, never what the encoder sees.
    """

    strategy: Literal["multiblock", "random", "tube", "topup_block"] = "multiblock"
    blocks: tuple[BlockSpec, ...] = VJEPA_BLOCKS
    ratio: float = 0.75
    truncate: Literal["end", "random"] = "end"
    max_targets: int = 0

    def __post_init__(self) -> None:
        _require_choices(self, "masks")
        _require(0 < self.ratio < 1, f"masks.ratio must lie in (0, 1), not {self.ratio}")
        _require(bool(self.blocks), "masks.blocks is empty; give at least one block specification")
        _require(self.max_targets >= 0, f"masks.max_targets must be 0 (all) or more, not {self.max_targets}")

    @property
    def num_groups(self) -> int:
        """Mask groups a clip: V-JEPA's blocks make one each, the other strategies one in all."""
        return len(self.blocks) if self.strategy == "multiblock" else 1


@dataclass(frozen=True)
class EncoderConfig:
    """A ViT on tubelets, under timm's name for its size; `positions` are 3-axis RoPE or sin-cos tables.

    `depth` (0: the name's own) lets a recipe cut or add blocks.
    """

    name: str = "vit_base_patch16_224"
    geometry: ClipGeometry = field(default_factory=ClipGeometry)
    positions: Positions = "rope"
    depth: int = 0
    drop_path: float = 0.0
    tanh_gelu: bool = False
    grad_checkpointing: bool = False

    def __post_init__(self) -> None:
        _require_choices(self, "encoder")
        _require(0 <= self.drop_path < 1, f"encoder.drop_path must lie in [0, 1), not {self.drop_path}")
        _require(self.depth >= 0, f"encoder.depth must be 0 (the name's own) or more, not {self.depth}")


@dataclass(frozen=True)
class PredictorConfig:
    """The narrow ViT that fills in latents at masked tokens; one mask token per mask group."""

    dim: int = 384
    depth: int = 12
    num_heads: int = 6
    positions: Positions = "rope"
    num_mask_tokens: int = 2
    tanh_gelu: bool = False
    grad_checkpointing: bool = False

    def __post_init__(self) -> None:
        _require_choices(self, "predictor")
        _require_at_least(1, self, "predictor.", "dim", "depth", "num_heads", "num_mask_tokens")
        if self.dim % self.num_heads:
            fits = [h for h in range(1, self.dim + 1) if self.dim % h == 0 and self.dim // h >= 8] or [1]
            raise ConfigError(
                f"predictor.dim={self.dim} is not divisible by predictor.num_heads={self.num_heads}; "
                f"head counts that divide it: {', '.join(map(str, fits))}"
            )


@dataclass(frozen=True)
class ViewConfig:
    """What decides a clip's pixels besides its table row. View 0 is the canonical one (whole frame, no
    shift); views 1, 2, … are random resized crops and time shifts drawn from (clip id, view number).

    `sampling` says which frames are a clip's: every `frame_stride`-th frame of the file (`stride`), the
    frames nearest to `target_fps` pictures a second (`fps`), or frames spread evenly over the whole video
    or episode (`uniform`). A video shorter than a clip is left out (`short` = `skip`) or its last frame is
    held (`hold`). `crop_scale` is the range of the crop's share of the area; `max_shift` the largest time
    shift in file frames, cut to what the episode has.
    """

    frame_stride: int = 4
    num_views: int = 1
    crop_scale: tuple[float, float] = (1.0, 1.0)
    max_shift: int = 0
    sampling: Literal["stride", "fps", "uniform"] = field(default="stride", metadata=ADDED_LATER)
    target_fps: float = field(default=0.0, metadata=ADDED_LATER)
    short: Literal["skip", "hold"] = field(default="skip", metadata=ADDED_LATER)

    def __post_init__(self) -> None:
        _require_choices(self, "data.view")
        _require_at_least(1, self, "data.view.", "frame_stride", "num_views")
        _require_at_least(0, self, "data.view.", "target_fps")
        _require(
            self.sampling != "fps" or 0 < self.target_fps < math.inf,
            f"data.view.sampling 'fps' needs data.view.target_fps above 0, not {self.target_fps}",
        )
        _require_at_least(0, self, "data.view.", "max_shift")
        low, high = self.crop_scale
        _require(
            0 < low <= high <= 1,
            f"data.view.crop_scale must be (low, high) within (0, 1], not {self.crop_scale}",
        )


@dataclass(frozen=True)
class DataConfig:
    """Where clips come from. `table` is a clip table (Parquet); `store_views` keeps decoded views on disk,
    so that small data sets are decoded once and not at every step. `on_corrupt_record`: another clip of the
    batch takes the place of a damaged record, which is counted (`skip`), or the run ends there (`stop`).
    """

    table: str = ""
    view: ViewConfig = field(default_factory=ViewConfig)
    store_views: bool = False
    num_workers: int = 0
    on_corrupt_record: Literal["skip", "stop"] = field(default="skip", metadata=ADDED_LATER)

    def __post_init__(self) -> None:
        _require_choices(self, "data")
        _require_at_least(0, self, "data.", "num_workers")


@dataclass(frozen=True)
class TargetConfig:
    """What the predictor must produce: `pixels` of the masked tubelets (stage 1), latents from a `cache`
    (SALT), or latents from a frozen `teacher` run in the loop. `source` is the cache or teacher path.
    """

    provider: Literal["pixels", "cache", "teacher"] = "cache"
    source: str = ""

    def __post_init__(self) -> None:
        _require_choices(self, "target")


@dataclass(frozen=True)
class ObjectiveConfig:
    """Mean |prediction − target|^power ÷ power, plus optional VICReg terms on the predictions.

    `targets`: `normalised` = layer-normalised without affine (V-JEPA, SALT); `centred` = normalised, minus
    the training mean of its token place; `raw` = as the teacher gives them.
    """

    power: float = 1.0
    targets: Literal["normalised", "centred", "raw"] = "normalised"
    variance_weight: float = 0.0
    variance_target: float = 1.0
    covariance_weight: float = 0.0

    def __post_init__(self) -> None:
        _require_choices(self, "objective")
        _require(self.power > 0, f"objective.power must be positive, not {self.power}")
        _require_at_least(0, self, "objective.", "variance_weight", "variance_target", "covariance_weight")


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW with float32 parameters; warm-up then cosine for the rate, cosine for the weight decay (which
    spares norms, biases and mask tokens)."""

    lr_start: float = 2e-4
    lr: float = 6.25e-4
    lr_final: float = 1e-6
    warmup_steps: int = 10_000
    weight_decay: float = 0.04
    weight_decay_final: float = 0.4
    betas: tuple[float, float] = (0.9, 0.999)
    grad_clip: float = 0.02

    def __post_init__(self) -> None:
        _require_at_least(0, self, "optimizer.", "lr_start", "lr", "lr_final", "warmup_steps")
        _require_at_least(0, self, "optimizer.", "weight_decay", "weight_decay_final")
        _require(self.grad_clip > 0, f"optimizer.grad_clip must be positive, not {self.grad_clip}")
        for beta in self.betas:
            _require(0 <= beta < 1, f"optimizer.betas must lie in [0, 1), not {self.betas}")


@dataclass(frozen=True)
class RuntimeConfig:
    """How the work is done, never what is computed to the last mathematical sign. `auto` and 0 are measured
    at the first start and written into the run's config, so that a resume computes the same.
    `cudnn_benchmark` lets cuDNN time its kernels at the first step.
    """

    device: str = "auto"
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    threads: int = 0
    cudnn_benchmark: bool = False
    log_every: int = 20
    checkpoint_every: int = 100
    validate_every: int = 200
    validation_clips: int = 256
    keep_checkpoints: int = 2

    def __post_init__(self) -> None:
        _require_choices(self, "runtime")
        _require_at_least(0, self, "runtime.", "threads", "validation_clips")
        _require_at_least(1, self, "runtime.", "log_every", "checkpoint_every", "validate_every")
        _require_at_least(1, self, "runtime.", "keep_checkpoints")


@dataclass(frozen=True)
class TrainConfig:
    """One run, whole: together with the seed it decides every number the run computes."""

    encoder: EncoderConfig = field(default_factory=EncoderConfig)
    predictor: PredictorConfig = field(default_factory=PredictorConfig)
    data: DataConfig = field(default_factory=DataConfig)
    masks: MaskConfig = field(default_factory=MaskConfig)
    target: TargetConfig = field(default_factory=TargetConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    runtime: RuntimeConfig = field(default_factory=RuntimeConfig)
    steps: int = 200_000
    batch_size: int = 32
    grad_accum_steps: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        _require_at_least(1, self, "", "steps", "batch_size", "grad_accum_steps")
        _require_at_least(0, self, "", "seed")
        _require(
            self.batch_size % self.grad_accum_steps == 0,
            f"batch_size={self.batch_size} is not a multiple of grad_accum_steps={self.grad_accum_steps}",
        )
        _require(
            self.masks.num_groups <= self.predictor.num_mask_tokens,
            f"masks.blocks make {self.masks.num_groups} mask groups but predictor.num_mask_tokens is "
            f"{self.predictor.num_mask_tokens}; raise the latter",
        )

    @property
    def geometry(self) -> ClipGeometry:
        return self.encoder.geometry


@dataclass(frozen=True)
class Recipe:
    """A named experiment: what to run, why, and what result would count as success."""

    name: str
    summary: str
    config: TrainConfig
    parent: str = ""
    hypothesis: str = ""
    target: str = ""
    epochs: int = 0
    notes: str = ""


def to_json(config: Any) -> str:
    """The dataclass as indented JSON with sorted keys; `from_json` reads it back equal."""
    return json.dumps(dataclasses.asdict(config), indent=2, sort_keys=True)


def from_json(kind: type[T], text: str | bytes, where: str = "config.json") -> T:
    """Build `kind` from JSON text; unknown, missing or mistyped fields are named in a `ConfigError`.

    A field that was added after the file was written takes its default (docs/decisions/0009).
    """
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise ConfigError(f"{where} is not valid JSON (line {error.lineno}): {error.msg}") from error
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{where} is not valid JSON: {error}") from error
    return typing.cast(T, _build(kind, value, where))


def _build(kind: Any, value: Any, where: str) -> Any:
    origin = typing.get_origin(kind)
    if dataclasses.is_dataclass(kind):
        return _build_dataclass(typing.cast(type, kind), value, where)
    if origin is tuple:
        _require(isinstance(value, list), f"{where} must be a list, not {value!r}")
        inner = typing.get_args(kind)
        kinds = [inner[0]] * len(value) if inner[-1] is Ellipsis else list(inner)
        _require(len(kinds) == len(value), f"{where} must have {len(kinds)} entries, not {len(value)}")
        return tuple(_build(k, v, f"{where}[{i}]") for i, (k, v) in enumerate(zip(kinds, value, strict=True)))
    if origin is Literal:
        _require_choice(value, kind, where)
        return value
    if origin in (typing.Union, types.UnionType):
        return None if value is None else _build(typing.get_args(kind)[0], value, where)
    if kind is float and type(value) is int and abs(value) <= LARGEST:
        return float(value)
    _require(type(value) is kind, f"{where} must be {kind.__name__}, not {value!r}")
    if kind in (int, float):
        _require(abs(value) <= LARGEST, f"{where} is {value}, beyond what can be computed with")
    return value


def _build_dataclass(kind: type, value: Any, where: str) -> Any:
    _require(isinstance(value, dict), f"{where} must be an object, not {value!r}")
    hints = typing.get_type_hints(kind)
    unknown = sorted(set(value) - set(hints))
    _require(not unknown, f"{where} has unknown field(s) {', '.join(unknown)}; known: {', '.join(hints)}")
    later = {f.name for f in dataclasses.fields(kind) if f.metadata.get("added_later")}
    missing = sorted(set(hints) - set(value) - later)
    _require(not missing, f"{where} lacks field(s) {', '.join(missing)}")
    return kind(
        **{name: _build(hints[name], value[name], f"{where}.{name}") for name in hints if name in value}
    )

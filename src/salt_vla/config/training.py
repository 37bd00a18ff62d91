"""Settings of how it is trained, and the whole of a run and of a recipe."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from salt_vla.config.checks import ADDED_LATER, FREE, parse_bytes, require, require_at_least, require_choices
from salt_vla.config.criteria import parse_criterion
from salt_vla.config.data import DataConfig, TargetConfig
from salt_vla.config.model import EncoderConfig, MaskConfig, PredictorConfig
from salt_vla.geometry import ClipGeometry

MOST_THREADS = 1024  # More than any machine has cores: their stacks alone can use up its memory.


@dataclass(frozen=True)
class ObjectiveConfig:
    """A regression of predictions on targets, plus optional terms against collapse.

    `loss` names the regression (registry.LOSSES): `power` is mean |prediction − target|^power ÷ power.
    `targets`: `normalised` = layer-normalised without affine (V-JEPA, SALT); `centred` = normalised, minus
    the training mean of its token place; `raw` = as the teacher gives them. That mean is `measured` once at
    the start or `running`, an average over steps that keeps `statistics_momentum` of itself.
    VICReg's terms act on the predictions, on the encoder's pooled context, or on both (`regularised`).
    """

    power: float = 1.0
    targets: Literal["normalised", "centred", "raw"] = "normalised"
    variance_weight: float = 0.0
    variance_target: float = 1.0
    covariance_weight: float = 0.0
    loss: str = field(default="power", metadata=ADDED_LATER)
    statistics: Literal["measured", "running"] = field(default="measured", metadata=ADDED_LATER)
    statistics_momentum: float = field(default=0.99, metadata=ADDED_LATER)
    regularised: Literal["predictions", "encoder", "both"] = field(
        default="predictions", metadata=ADDED_LATER
    )
    contrastive_weight: float = field(default=0.0, metadata=ADDED_LATER)
    contrastive_temperature: float = field(default=0.1, metadata=ADDED_LATER)

    def __post_init__(self) -> None:
        require_choices(self, "objective")
        require(self.power > 0, f"objective.power must be positive, not {self.power}")
        require_at_least(0, self, "objective.", "variance_weight", "variance_target", "covariance_weight")
        require_at_least(0, self, "objective.", "contrastive_weight")
        require(
            0 <= self.statistics_momentum < 1,
            f"objective.statistics_momentum must lie in [0, 1), not {self.statistics_momentum}",
        )
        require(
            self.contrastive_temperature > 0,
            f"objective.contrastive_temperature must be positive, not {self.contrastive_temperature}",
        )


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW with float32 parameters; warm-up then cosine for the rate, cosine for the weight decay (which
    spares norms, biases and mask tokens).

    `schedule` `cooldown`: after the warm-up the rate stays at `lr` and falls linearly to `lr_final` over the
    last `cooldown_steps`, so that one long run can be cooled down from any of its checkpoints.
    `average`: the share of itself that a moving average of the weights keeps a step (0: none is kept).
    `decay_all` and `parameters` = `bfloat16` repeat an earlier attempt's mistakes, to be studied.
    """

    lr_start: float = 2e-4
    lr: float = 6.25e-4
    lr_final: float = 1e-6
    warmup_steps: int = 10_000
    weight_decay: float = 0.04
    weight_decay_final: float = 0.4
    betas: tuple[float, float] = (0.9, 0.999)
    grad_clip: float = 0.02
    schedule: Literal["cosine", "cooldown"] = field(default="cosine", metadata=ADDED_LATER)
    cooldown_steps: int = field(default=0, metadata=ADDED_LATER)
    average: float = field(default=0.0, metadata=ADDED_LATER)
    decay_all: bool = field(default=False, metadata=ADDED_LATER)
    parameters: Literal["float32", "bfloat16"] = field(default="float32", metadata=ADDED_LATER)

    def __post_init__(self) -> None:
        require_choices(self, "optimizer")
        require_at_least(
            0, self, "optimizer.", "lr_start", "lr", "lr_final", "warmup_steps", "cooldown_steps"
        )
        require(
            self.schedule == "cooldown" or not self.cooldown_steps,
            f"optimizer.cooldown_steps={self.cooldown_steps} does nothing with optimizer.schedule="
            f"{self.schedule}; set the schedule to cooldown, or the steps to 0",
        )
        require(0 <= self.average < 1, f"optimizer.average must lie in [0, 1), not {self.average}")
        require_at_least(0, self, "optimizer.", "weight_decay", "weight_decay_final")
        require(self.grad_clip > 0, f"optimizer.grad_clip must be positive, not {self.grad_clip}")
        for beta in self.betas:
            require(0 <= beta < 1, f"optimizer.betas must lie in [0, 1), not {self.betas}")


@dataclass(frozen=True)
class GuardConfig:
    """What is done about a step whose loss or gradient is not finite, or whose loss is more than
    `spike_factor` times the running mean (0: never a spike).

    `on_bad_step`: `skip` leaves the weights as they were, counts the step and goes on, or `stop`. After
    `rollback_after` bad steps in a row the run goes back to its last checkpoint and on with other clips, at
    most `max_rollbacks` times. Collapse: the predictions' deviation below `collapse_std` times the targets',
    or their effective rank below `collapse_rank` (0: not looked at), seen at `on_collapse` `warn` or `stop`.
    """

    on_bad_step: Literal["skip", "stop"] = "skip"
    spike_factor: float = 4.0
    rollback_after: int = 5
    max_rollbacks: int = 3
    on_collapse: Literal["warn", "stop"] = "warn"
    collapse_std: float = 0.02
    collapse_rank: float = 1.05

    def __post_init__(self) -> None:
        require_choices(self, "guards")
        require_at_least(0, self, "guards.", "spike_factor", "max_rollbacks", "collapse_std", "collapse_rank")
        require_at_least(1, self, "guards.", "rollback_after")
        require(
            not 0 < self.spike_factor <= 1,
            f"guards.spike_factor must be above 1, or 0 for none, not {self.spike_factor}",
        )


@dataclass(frozen=True)
class RuntimeConfig:
    """How the work is done, never what is computed to the last mathematical sign. `auto` and 0 are measured
    at the first start and written into the run's config, so that a resume computes the same.

    `cudnn_benchmark` lets cuDNN time its kernels at the first step; `deterministic` keeps to kernels that
    give the same bits every time; `allow_tf32` lets float32 products lose digits on a GPU. `parallel` is how
    several processes share the weights. `memory_limit` (such as 25GB) bounds what a step may take of the
    GPU, or of RAM without one. The last `keep_checkpoints` are kept, every `keep_every`-th step's for good
    (0: none), and the best. A step that takes `watchdog_seconds` ends the run (0: never). An
    online probe is fitted to the last `probe_clips` training clips (0: none) at validations of steps that are
    multiples of `probe_every` (0: as often, and to as many clips, as a small share of the run's cost allows).
    """

    device: str = "auto"
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    threads: int = 0
    cudnn_benchmark: bool = False
    log_every: int = field(default=20, metadata=FREE)
    checkpoint_every: int = field(default=100, metadata=FREE)
    validate_every: int = field(default=200, metadata=FREE)
    validation_clips: int = field(default=256, metadata=FREE)
    keep_checkpoints: int = field(default=2, metadata=FREE)
    keep_every: int = field(default=0, metadata=ADDED_LATER | FREE)
    compile: bool = field(default=False, metadata=ADDED_LATER)
    allow_tf32: bool = field(default=False, metadata=ADDED_LATER)
    deterministic: bool = field(default=False, metadata=ADDED_LATER)
    parallel: Literal["ddp", "fsdp"] = field(default="ddp", metadata=ADDED_LATER)
    memory_limit: str = field(default="", metadata=ADDED_LATER | FREE)
    watchdog_seconds: float = field(default=1800.0, metadata=ADDED_LATER | FREE)
    time_limit_minutes: float = field(default=0.0, metadata=ADDED_LATER | FREE)
    probe_clips: int = field(default=1024, metadata=ADDED_LATER | FREE)
    probe_every: int = field(default=0, metadata=ADDED_LATER | FREE)

    def __post_init__(self) -> None:
        require_choices(self, "runtime")
        require_at_least(0, self, "runtime.", "threads", "validation_clips", "keep_every")
        require_at_least(0, self, "runtime.", "probe_clips", "probe_every")
        require(
            self.threads <= MOST_THREADS,
            f"runtime.threads must be at most {MOST_THREADS}, not {self.threads}; 0 takes one a core",
        )
        require_at_least(0, self, "runtime.", "watchdog_seconds", "time_limit_minutes")
        if self.memory_limit:
            parse_bytes(self.memory_limit)
        require_at_least(1, self, "runtime.", "log_every", "checkpoint_every", "validate_every")
        require_at_least(1, self, "runtime.", "keep_checkpoints")


@dataclass(frozen=True)
class TrainConfig:
    """One run, whole: together with the seed it decides every number the run computes. `batch_size` is the
    global one, over all processes and micro-batches. `start_from`: weights of an image ViT (timm's layout,
    safetensors) or an encoder of ours that the encoder begins with."""

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
    guards: GuardConfig = field(default_factory=GuardConfig, metadata=ADDED_LATER)
    start_from: str = field(default="", metadata=ADDED_LATER)

    def __post_init__(self) -> None:
        require_at_least(1, self, "", "steps", "batch_size", "grad_accum_steps")
        require_at_least(0, self, "", "seed")
        rates = self.optimizer
        require(
            rates.schedule != "cooldown" or rates.warmup_steps + rates.cooldown_steps <= self.steps,
            f"optimizer.warmup_steps={rates.warmup_steps} and optimizer.cooldown_steps="
            f"{rates.cooldown_steps} do not fit into steps={self.steps}; make them fewer",
        )
        require(
            self.batch_size % self.grad_accum_steps == 0,
            f"batch_size={self.batch_size} is not a multiple of grad_accum_steps={self.grad_accum_steps}",
        )
        require(
            self.masks.num_groups <= self.predictor.num_mask_tokens,
            f"masks.blocks make {self.masks.num_groups} mask groups but predictor.num_mask_tokens is "
            f"{self.predictor.num_mask_tokens}; raise the latter",
        )

    @property
    def geometry(self) -> ClipGeometry:
        return self.encoder.geometry


@dataclass(frozen=True)
class Recipe:
    """A named experiment: what to run, why, and what result would count as success: `target` in words, and
    `criterion` as a condition that a program can check where there is one (`criteria.parse_criterion`)."""

    name: str
    summary: str
    config: TrainConfig
    parent: str = ""
    hypothesis: str = ""
    target: str = ""
    epochs: int = 0
    notes: str = ""
    criterion: str = field(default="", metadata=ADDED_LATER)

    def __post_init__(self) -> None:
        require(self.epochs >= 0, f"epochs must be at least 0, not {self.epochs}")
        if self.criterion:
            parse_criterion(self.criterion)

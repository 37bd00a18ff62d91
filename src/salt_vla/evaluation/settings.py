"""What a person chooses of an evaluation besides encoders, suites and data.

Every field is an option of `salt-vla eval`; importing this loads no numerical library.
"""

from __future__ import annotations

from dataclasses import dataclass

from salt_vla.config import parse_bytes
from salt_vla.errors import ConfigError

POOLINGS = ("grid", "step", "mean")  # That which reads out most comes first, in tables and reports.
PROTOCOLS = ("held-out", "vjepa2-max")
# How figures are computed, not what of: rounding apart, they are those of any computer.
HOW_COMPUTED = ("device", "memory_limit")
# What not every suite reads; a suite's module says which of them it does (`READS`).
OF_CLIPS = ("horizon", "moment_stride", "min_motion", "text")
OF_FILM_PAIRS = ("context_frames", "frame_step", "teacher")
OF_SUITES = (*OF_CLIPS, *OF_FILM_PAIRS)


@dataclass(frozen=True)
class EvalSettings:
    """What a person chooses of an evaluation besides encoders, suites and data.

    Attributes:
        seed: of the random encoder, of probes' folds and of resampling; where a label is given several times,
            every run's own takes its place.
        probe: what reads the features: linear, knn, attentive or attentive-small.
        protocol: held-out chooses everything within training clips and reads held-out clips once;
            vjepa2-max is the reference's, which reports its best head on the very clips that are scored.
        poolings: what is kept of a clip's tokens, one table each, for probes that read vectors.
        fraction: of the training episodes that probes learn from.
        horizon: file frames after a clip's end that robot suites predict.
        moment_stride: file frames from one moment of an episode, at which robot suites ask, to the next.
        min_motion: grey levels (of 255) by which a clip must move to be asked for its order.
        text: a file of text embeddings, for retrieval.
        context_frames: of a window of a film, for surprise: how many are seen before the rest is predicted,
            one or several; default: half.
        frame_step: file frames from one frame of a window to the next, for surprise, one or several; default:
            as the predictor was trained.
        teacher: where the frozen teacher of a run is, for surprise, if it has moved.
        device: where encoders run; auto is CUDA where there is one.
        memory_limit: as 25GB: so many clips pass an encoder at once as four fifths of this hold (default: by
            their tokens).
    """

    seed: int = 0
    probe: str = "linear"
    protocol: str = "held-out"
    poolings: tuple[str, ...] = POOLINGS
    fraction: float = 1.0
    horizon: int = 8
    moment_stride: int = 16
    min_motion: float = 0.0
    text: str = ""
    context_frames: tuple[int, ...] = ()
    frame_step: tuple[int, ...] = ()
    teacher: str = ""
    device: str = "auto"
    memory_limit: str = ""

    def __post_init__(self) -> None:
        if not 0 <= self.seed < 2**32:
            raise ConfigError(f"seed must lie in 0 … {2**32 - 1}, not {self.seed}")
        if self.protocol not in PROTOCOLS:
            raise ConfigError(f"unknown protocol {self.protocol!r}; known: {', '.join(PROTOCOLS)}")
        if unknown := set(self.poolings) - set(POOLINGS):
            raise ConfigError(f"unknown pooling {min(unknown)!r}; known: {', '.join(POOLINGS)}")
        if not self.poolings or len(set(self.poolings)) < len(self.poolings):
            raise ConfigError(f"--poolings needs one or several of {', '.join(POOLINGS)}, each once")
        if not 0 < self.fraction <= 1:
            raise ConfigError(f"fraction of training episodes must lie in (0, 1], not {self.fraction}")
        if self.horizon < 1:
            raise ConfigError(f"horizon must be 1 frame or more, not {self.horizon}")
        if self.moment_stride < 1:
            raise ConfigError(f"moment_stride must be 1 frame or more, not {self.moment_stride}")
        if not 0 <= self.min_motion <= 255:
            raise ConfigError(f"min_motion is a number of grey levels, 0 … 255, not {self.min_motion}")
        if self.memory_limit:
            parse_bytes(self.memory_limit)

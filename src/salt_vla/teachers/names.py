"""Published teachers by name: where each lies, and the sizes that a network of that name has.

Knows no network: they are compared after a family has loaded one.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from salt_vla.errors import HubError, RunError
from salt_vla.geometry import ClipGeometry
from salt_vla.hub import MODEL_FILES, local_folder

# Versions of transformers differ by a final norm or a mask token; sizes of one family by factors of two.
TOLERANCE = 0.01
GIANT = 1408


@dataclass(frozen=True)
class NamedTeacher:
    """A hub repository and the claim of its name: width, blocks, heads and parameters of the frozen encoder.

    Parameters are those of transformers' class without decoder, predictor, pooling head or classifier.
    `revision` is a commit where its page was seen with config.json and model.safetensors, else a moving
    branch (None: the newest). `note`: what to know before trusting an upload.
    """

    name: str
    repository: str
    family: str
    dim: int
    depth: int
    heads: int
    parameters: int
    revision: str | None = None
    note: str = ""

    @property
    def is_pinned(self) -> bool:
        """Whether the revision is a commit, which cannot change."""
        return self.revision is not None and len(self.revision) == 40

    def fetch(self) -> Path:
        """The folder with its files, downloaded when needed; a `HubError` says what not to take instead."""
        try:
            return local_folder(self.repository, "model", self.revision, MODEL_FILES)
        except HubError as error:
            raise HubError(
                f"teacher {self.name}: {error}. A local copy is held against the name with "
                f"{self.name}=DIRECTORY; it must be {self.dim} wide, with {self.depth} blocks and "
                f"{self.parameters / 1e6:.1f} M parameters{'. ' if self.note else ''}{self.note}"
            ) from error

    @property
    def geometry(self) -> ClipGeometry | None:
        """The clips of the published VideoMAEs, whose positions are those of no others; None: it adapts."""
        if self.family != "videomae":
            return None
        return ClipGeometry(patch_size=14 if self.dim == GIANT else 16)

    def require(
        self, dim: int, depth: int, heads: int, parameters: int, geometry: ClipGeometry, where: str
    ) -> None:
        """`RunError` where a loaded network is not of the sizes that the name claims; each is named."""
        sizes = (("width", dim, self.dim), ("blocks:", depth, self.depth), ("heads:", heads, self.heads))
        wrong = [f"{what} {found}, and {self.name} is {said}" for what, found, said in sizes if found != said]
        if abs(parameters - self.parameters) > TOLERANCE * self.parameters:
            found, said = (f"{number / 1e6:.1f} M parameters" for number in (parameters, self.parameters))
            wrong.append(f"{found}, and {self.name} has {said}")
        if self.geometry not in (None, geometry):
            wrong.append(f"clips of {geometry}, and {self.name} takes {self.geometry}")
        if wrong:
            raise RunError(f"{where} has {'; '.join(wrong)}: this is not the model of that name")


def require_directory(place: str, name: str) -> Path:
    """The directory of `NAME=DIRECTORY`; `RunError` where there is none."""
    if not place or len(place) > 4000 or not Path(place).is_dir():
        raise RunError(f"there is no directory {place[:80]!r}, which is to hold teacher {name}")
    return Path(place)


_UPLOADS = (
    "Uploads of the same title by others need not be it: one called VideoMAE-Huge was a base classifier, "
    "768 wide with 86 M parameters"
)
_NO_HUGE = (
    "There is no MCG-NJU/videomae-huge: of the huge size the hub holds the network fine-tuned on the labels "
    f"of Kinetics-400, with safetensors in a pull request alone. {_UPLOADS}"
)
_GATED = "Its terms must be accepted on its page first"

# One line a teacher: name, repository, family, width, blocks, heads, parameters, revision, note.
_TABLE = (
    ("videomaev2_base", "OpenGVLab/VideoMAEv2-Base", "videomae", 768, 12, 12, 86_225_664,
     "0e826d7e85e39f9d951e331cd91c5c2d8142d385", _UPLOADS),
    ("videomaev2_large", "OpenGVLab/VideoMAEv2-Large", "videomae", 1024, 24, 16, 303_858_688, None, _UPLOADS),
    ("videomaev2_huge", "OpenGVLab/VideoMAEv2-Huge", "videomae", 1280, 32, 16, 631_604_480, None, _UPLOADS),
    ("videomaev2_giant", "OpenGVLab/VideoMAEv2-giant", "videomae", 1408, 40, 16, 1_011_607_936,
     None, _UPLOADS),
    ("videomae_v1_base", "MCG-NJU/videomae-base", "videomae", 768, 12, 12, 86_227_200,
     "a6c2a8d371a8690497d78eee21fdb4fbfcf796da", _UPLOADS),
    ("videomae_v1_base_ssv2", "MCG-NJU/videomae-base-ssv2", "videomae", 768, 12, 12, 86_227_200,
     None, _UPLOADS),
    ("videomae_v1_large", "MCG-NJU/videomae-large", "videomae", 1024, 24, 16, 303_860_736, None, _UPLOADS),
    ("videomae_v1_huge", "MCG-NJU/videomae-huge-finetuned-kinetics", "videomae", 1280, 32, 16, 631_604_480,
     "refs/pr/1", _NO_HUGE),
    ("vjepa2_vitl", "facebook/vjepa2-vitl-fpc64-256", "vjepa2", 1024, 24, 16, 303_885_312, None, ""),
    ("vjepa2_vith", "facebook/vjepa2-vith-fpc64-256", "vjepa2", 1280, 32, 16, 631_648_000, None, ""),
    ("vjepa2_vitg", "facebook/vjepa2-vitg-fpc64-256", "vjepa2", 1408, 40, 22, 1_012_173_952, None, ""),
    ("vjepa2_vitg_384", "facebook/vjepa2-vitg-fpc64-384", "vjepa2", 1408, 40, 22, 1_012_173_952, None, ""),
    ("dinov2_vits14", "facebook/dinov2-small", "image", 384, 12, 6, 22_056_576,
     "8c0210022ead0e9012784aecff426ff6613bf835", ""),
    ("dinov2_vitb14", "facebook/dinov2-base", "image", 768, 12, 12, 86_580_480,
     "369b1309d0ea32e09fdc25ee029917e2e5a2db8f", ""),
    ("dinov2_vitl14", "facebook/dinov2-large", "image", 1024, 24, 16, 304_368_640, None, ""),
    ("dinov3_vits16", "facebook/dinov3-vits16-pretrain-lvd1689m", "image", 384, 12, 6, 21_596_544,
     None, _GATED),
    ("dinov3_vitb16", "facebook/dinov3-vitb16-pretrain-lvd1689m", "image", 768, 12, 12, 85_660_416,
     None, _GATED),
    ("dinov3_vitl16", "facebook/dinov3-vitl16-pretrain-lvd1689m", "image", 1024, 24, 16, 303_129_600,
     None, _GATED),
    ("siglip_base", "google/siglip-base-patch16-224", "image", 768, 12, 12, 85_797_120,
     "d9049814fd748f55717e7f6e8e330574f955bd0a", ""),
    ("siglip2_base", "google/siglip2-base-patch16-224", "image", 768, 12, 12, 85_797_120, None, ""),
)  # fmt: skip
NAMED: dict[str, NamedTeacher] = {row[0]: NamedTeacher(*row) for row in _TABLE}

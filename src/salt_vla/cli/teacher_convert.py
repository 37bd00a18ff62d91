"""`salt-vla teacher convert`"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import tyro


def convert(
    file: Annotated[Path, tyro.conf.Positional],
    out: Path,
    config: Path | None = None,
    key: str | None = None,
) -> None:
    """Turn a pickled checkpoint (.pth, .pt, .bin) into a folder with safetensors that teachers load from.

    Nothing in the file is run: it is opened for its tensors alone, and refused if that does not do.

    Example: salt-vla teacher convert vitl.pt --key target_encoder --config config.json --out teachers/vitl

    Args:
        file: the checkpoint.
        out: the folder to write.
        config: its config.json; default: the one beside the file.
        key: which container to take, where the file holds several; . for tensors outside of any.
    """
    from salt_vla.teachers.convert import convert as convert_file

    done = convert_file(file, out, config, key)
    taken = f" of {done.key!r}" if done.key else ""
    print(f"{done.folder}: {done.num_tensors} tensors{taken}")
    if done.left_out:
        more = f" and {len(done.left_out) - 8} more" if len(done.left_out) > 8 else ""
        print(f"left out: {', '.join(done.left_out[:8])}{more}")
    if not done.has_config:
        print(f"still missing: {done.folder}/config.json, which says what the weights are (docs/teachers.md)")

"""TensorBoard: event files in the run's folder `tensorboard/`, each flushed to disk before a row counts as
sent. Knows the file format through the `tensorboard` package, and needs neither TensorFlow nor torch.
"""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Sequence
from typing import Any

from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary, SummaryMetadata
from tensorboard.compat.proto.tensor_pb2 import TensorProto
from tensorboard.compat.proto.tensor_shape_pb2 import TensorShapeProto
from tensorboard.compat.proto.types_pb2 import DT_STRING
from tensorboard.summary.writer.record_writer import RecordWriter

from salt_vla.operations.trackers.base import Opening, Row, flat
from salt_vla.rundir import Status


class TensorBoard:
    """A new file for each process that sends; readers take them by name, which begins with the time."""

    keeps = True

    def __init__(self, opening: Opening) -> None:
        folder = opening.run.path / "tensorboard"
        folder.mkdir(exist_ok=True)
        self.destination = "tensorboard/"
        number = len(list(folder.iterdir()))
        name = f"events.out.tfevents.{int(time.time())}.{socket.gethostname()}.{os.getpid()}.{number}"
        self._file = (folder / name).open("xb")
        self._writer = RecordWriter(self._file)
        self._write(file_version="brain.Event:2")
        if not opening.is_continued:
            self._write(summary=_text("config", json.dumps(opening.config, indent=2)))
        self._flush()

    def held(self) -> int | None:
        return None

    def send(self, rows: Sequence[tuple[int, Row]]) -> None:
        for _, row in rows:
            figures = flat(row).items()
            values = [
                Summary.Value(tag=tag, simple_value=value)
                for tag, value in figures
                if isinstance(value, int | float)
            ]
            if values:
                self._write(step=row["step"], summary=Summary(value=values))
        self._flush()

    def rewind(self, step: int) -> None:
        """Readers drop what they have from `step` on: what the start of a session means to them."""
        self._write(step=step, session_log=SessionLog(status=SessionLog.START))

    def close(self, status: Status) -> None:
        self._flush()
        self._file.close()

    def _write(self, **fields: Any) -> None:
        self._writer.write(Event(wall_time=time.time(), **fields).SerializeToString())

    def _flush(self) -> None:
        self._writer.flush()
        os.fsync(self._file.fileno())


def _text(tag: str, text: str) -> Summary:
    tensor = TensorProto(dtype=DT_STRING, string_val=[text.encode()], tensor_shape=TensorShapeProto())
    plugin = SummaryMetadata(plugin_data=SummaryMetadata.PluginData(plugin_name="text"))
    return Summary(value=[Summary.Value(tag=tag, tensor=tensor, metadata=plugin)])

"""TensorBoard's events, a file in the run's folder: `tensorboard --logdir runs` shows runs by their names."""

import io
from collections.abc import Mapping, Sequence
from typing import Any

from lowbit_dist.tracking.content import numbers
from lowbit_dist.tracking.rows import RowFeeder

EVENTS = "events.out.tfevents.lowbit"
FRAME = 16  # bytes around each event of the file


class EventFile(RowFeeder):
    """What TensorBoard reads of a run: one file, which each start goes on with, an event for each row."""

    service, package = "TensorBoard", "tensorboard"

    def _open(self) -> int:
        from tensorboard.backend.event_processing.event_file_loader import RawEventFileLoader
        from tensorboard.compat.proto.event_pb2 import Event

        self._file = self.config.run_dir / EVENTS
        self._file.touch()
        self._size, newest = 0, -1
        events = RawEventFileLoader(str(self._file)).Load()  # without one that a kill or a full disk tore
        for event in events:
            newest = Event.FromString(event).step if self._size else -1  # the first only says which version
            self._size += FRAME + len(event)
        self.say(f"TensorBoard: tensorboard --logdir {self.config.run.dir}")
        return newest

    def _log(self, rows: Sequence[Mapping[str, Any]]) -> None:
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.compat.proto.summary_pb2 import Summary
        from tensorboard.summary.writer.record_writer import RecordWriter

        events = [] if self._size else [Event(file_version="brain.Event:2", wall_time=rows[0]["time"])]
        for row in rows:
            values = [Summary.Value(tag=name, simple_value=x) for name, x in numbers(row).items()]
            events.append(Event(step=row["step"], wall_time=row["time"], summary=Summary(value=values)))
        content = io.BytesIO()
        writer = RecordWriter(content)
        for event in events:
            writer.write(event.SerializeToString())
        with self._file.open("ab") as file:
            file.truncate(self._size)
            file.write(content.getbuffer())
        self._size += content.tell()

    def _end(self, status: str, summary: Mapping[str, Any]) -> None:
        """The file is whole at any time."""

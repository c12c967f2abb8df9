"""TensorBoard's event files, in the run's folder: `tensorboard --logdir runs` shows runs by their names."""

from collections.abc import Mapping, Sequence
from typing import Any

from lowbit_dist.tracking.content import numbers
from lowbit_dist.tracking.rows import RowFeeder


class EventFiles(RowFeeder):
    """What TensorBoard reads of a run: a file for each start that measured any row, an event for each row."""

    service, package = "TensorBoard", "tensorboard"

    def _open(self) -> int:
        from tensorboard.backend.event_processing.event_file_loader import LegacyEventFileLoader

        self._writer: Any = None
        files = [str(file) for file in self.config.run_dir.glob("events.out.tfevents.*")]
        events = (event for file in files for event in LegacyEventFileLoader(file).Load())
        return max((event.step for event in events if event.HasField("summary")), default=-1)

    def _log(self, rows: Sequence[Mapping[str, Any]]) -> None:
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.compat.proto.summary_pb2 import Summary
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        if self._writer is None:
            self._writer = EventFileWriter(str(self.config.run_dir))
            self.say(f"TensorBoard: tensorboard --logdir {self.config.run.dir}")
        for row in rows:
            values = [Summary.Value(tag=name, simple_value=x) for name, x in numbers(row).items()]
            # One event, so that a kill leaves all of a row or nothing.
            event = Event(step=row["step"], wall_time=row["time"], summary=Summary(value=values))
            self._writer.add_event(event)
        self._writer.flush()

    def _end(self, status: str, summary: Mapping[str, Any]) -> None:
        if self._writer is not None:
            self._writer.close()

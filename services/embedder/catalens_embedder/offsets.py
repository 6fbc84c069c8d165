"""Which offsets may be committed: per partition, everything below the lowest record that is not done."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection

from catalens.domain import Record, TopicPartition


class OffsetTracker:
    """Records come in offset order per partition, finish in any order, and are committed without gaps."""

    def __init__(self) -> None:
        self._open: dict[TopicPartition, OrderedDict[int, bool]] = {}
        self._next: dict[TopicPartition, int] = {}
        self._committed: dict[TopicPartition, int] = {}

    @property
    def in_flight(self) -> int:
        """How many records are taken and not done."""
        return sum(not done for records in self._open.values() for done in records.values())

    def take(self, record: Record) -> None:
        """Note that work on `record` begins; one that goes back (read again) begins its partition anew."""
        if record.offset < self._next.get(record.source, 0):
            self.drop([record.source])
        self._open.setdefault(record.source, OrderedDict())[record.offset] = False
        self._next[record.source] = record.offset + 1

    def done(self, record: Record) -> None:
        """Note that `record` needs no more work; of a partition that was dropped it means nothing."""
        records = self._open.get(record.source)
        if records is None or record.offset not in records:
            return
        records[record.offset] = True
        while records and records[next(iter(records))]:
            records.popitem(last=False)

    def idle(self, partitions: Collection[TopicPartition]) -> bool:
        """True when nothing of these partitions is in work."""
        return all(not self._open.get(partition) for partition in partitions)

    def committable(self) -> dict[TopicPartition, int]:
        """Return, for partitions that moved since `committed`, the offset of the next record to read."""
        ready: dict[TopicPartition, int] = {}
        for partition, following in self._next.items():
            records = self._open.get(partition)
            position = next(iter(records)) if records else following
            if position != self._committed.get(partition):
                ready[partition] = position
        return ready

    def committed(self, offsets: dict[TopicPartition, int]) -> None:
        """Note that these were stored."""
        self._committed.update(offsets)

    def drop(self, partitions: Collection[TopicPartition]) -> None:
        """Forget partitions that belong to somebody else now."""
        for partition in partitions:
            self._open.pop(partition, None)
            self._next.pop(partition, None)
            self._committed.pop(partition, None)

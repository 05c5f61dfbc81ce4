"""Reading single records out of shards."""

from __future__ import annotations

import contextlib
import os
from collections import OrderedDict

from kdfast.data.preflight import Fault, RecordTable
from kdfast.errors import ShardError

# Well below the usual limit of 1024 open files a process, which the caller needs too.
_OPEN_SHARDS = 128


class RecordLost(ShardError):
    """A shard has shrunk or gone since it was checked.

    Attributes:
        reason: Of the fault, without shard and key.
    """

    def __init__(self, fault: Fault) -> None:
        super().__init__(str(fault))
        self.reason = fault.reason

    def __reduce__(self) -> tuple[type[ShardError], tuple[str]]:
        return ShardError, (str(self),)


class RecordReader:
    """Reads records by number with ``pread``: no seek to share between processes, and no mapping to fault on
    when a file shrinks under it."""

    def __init__(self, table: RecordTable) -> None:
        self._table = table
        self._open: OrderedDict[int, int] = OrderedDict()

    def read(self, record: int) -> bytes:
        """The image file of a record.

        Raises:
            ShardError: The shard has shrunk or gone since it was checked.
        """
        table = self._table
        size = int(table.size[record])
        try:
            data = os.pread(self._descriptor(int(table.shard[record])), size, int(table.offset[record]))
        except OSError as error:
            raise RecordLost(table.fault(record, f"cannot be read: {error.strerror}")) from error
        if len(data) != size:
            raise RecordLost(table.fault(record, "the shard was cut short after it was checked"))
        return data

    def _descriptor(self, shard: int) -> int:
        if shard in self._open:
            self._open.move_to_end(shard)
        else:
            self._open[shard] = os.open(self._table.paths[shard], os.O_RDONLY)
            if len(self._open) > _OPEN_SHARDS:
                os.close(self._open.popitem(last=False)[1])
        return self._open[shard]

    def close(self) -> None:
        """Close the shards."""
        while self._open:
            with contextlib.suppress(OSError):
                os.close(self._open.popitem()[1])

    def __getstate__(self) -> dict[str, object]:
        # A spawned worker opens its own.
        return {"_table": self._table, "_open": OrderedDict()}

    def __del__(self) -> None:
        self.close()

"""Reading single records out of shards."""

from __future__ import annotations

import contextlib
import errno
import os
from collections import OrderedDict

from kdfast.data.preflight import Fault, RecordTable, open_shard, sha256_of, stamp_of
from kdfast.errors import ShardError

#: No descriptor is left, in this process or on the machine: no fault of the shard.
_NONE_LEFT = (errno.EMFILE, errno.ENFILE)
# Well below the usual limit of 1024 open files a process, which the caller needs too.
_OPEN_SHARDS = 128


class RecordLost(ShardError):
    """A shard has changed or gone since it was checked.

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
    when a file shrinks under it.

    Labels and places are those of the shard that was checked, so bytes are taken from that one only: a file that was
    written to or replaced since then is read against its SHA-256 again.
    """

    def __init__(self, table: RecordTable) -> None:
        self._table = table
        self._open: OrderedDict[int, int] = OrderedDict()
        #: Of each shard whose stamp is another: that stamp, and what has become of its bytes (None: nothing).
        self._seen: dict[int, tuple[tuple[int, ...], str | None]] = {}

    def read(self, record: int) -> bytes:
        """The image file of a record.

        Raises:
            ShardError: The shard has changed or gone since it was checked.
        """
        table = self._table
        size, shard = int(table.size[record]), int(table.shard[record])
        try:
            descriptor = self._descriptor(shard)
            if (change := self._change(shard, descriptor)) is not None:
                raise RecordLost(table.fault(record, f"the shard was {change} after it was checked"))
            data = os.pread(descriptor, size, int(table.offset[record]))
        except OSError as error:
            if error.errno in _NONE_LEFT:
                raise ShardError(
                    f"{table.paths[shard]}: cannot be opened: {error.strerror}; raise the limit (ulimit -n) or close "
                    "what is not needed"
                ) from error
            raise RecordLost(table.fault(record, f"cannot be read: {error.strerror}")) from error
        if len(data) != size:
            raise RecordLost(table.fault(record, "the shard was cut short after it was checked"))
        return data

    def _descriptor(self, shard: int) -> int:
        if shard in self._open:
            self._open.move_to_end(shard)
        else:
            self._open[shard] = self._opened(shard)
            if len(self._open) > _OPEN_SHARDS:
                os.close(self._open.popitem(last=False)[1])
        return self._open[shard]

    def _opened(self, shard: int) -> int:
        while True:
            try:
                with open_shard(self._table.paths[shard]) as stream:
                    return os.dup(stream.fileno())
            except OSError as error:
                if error.errno not in _NONE_LEFT or not self._open:
                    raise
                # What is open already is what this process can spare.
                os.close(self._open.popitem(last=False)[1])

    def _change(self, shard: int, descriptor: int) -> str | None:
        """What has become of a shard since it was checked; it is read again only where its stamp does not tell."""
        checked, stamp = self._table.contents[shard], stamp_of(descriptor)
        if stamp == checked.stamp:
            return None
        if self._seen.get(shard, ((), None))[0] != stamp:
            size, before = stamp[2], checked.stamp[2]
            change: str | None = "cut short" if size < before else "changed"
            if size == before:
                with open(os.dup(descriptor), "rb") as stream:
                    stream.seek(0)
                    change = None if sha256_of(stream) == checked.sha256 else change
            self._seen[shard] = stamp, change
        return self._seen[shard][1]

    def close(self) -> None:
        """Close the shards."""
        while self._open:
            with contextlib.suppress(OSError):
                os.close(self._open.popitem()[1])

    def __getstate__(self) -> dict[str, object]:
        # A spawned worker opens its own.
        return {"_table": self._table, "_open": OrderedDict(), "_seen": {}}

    def __del__(self) -> None:
        self.close()

"""`log.tensorboard`: the numbers of `metrics.jsonl` as an event file that TensorBoard reads, `RUN/tensorboard/`.

The event file is a function of `metrics.jsonl`: when a run begins, goes on or rolls back, it is written anew from the
lines that stand there, and the one before is emptied, so no point is ever doubled. A file opens with the mark of a
restart, at which a TensorBoard that is watching forgets what it had read before.

Format. A file is a sequence of TFRecords: length (uint64), masked CRC-32C of the length, data, masked CRC-32C of the
data, all little-endian. The data is a protobuf message, of which these fields are used:

    Event       1 wall_time (double)  2 step (int64)  3 file_version (string)  5 summary  7 session_log
    Summary     1 value (repeated)
    Value       1 tag (string)  2 simple_value (float)
    SessionLog  1 status (START = 1)

Sources: event.proto and summary.proto of TensorBoard, record_writer of TensorFlow, RFC 3720 appendix B.4 (CRC-32C).
"""

from __future__ import annotations

import functools
import json
import os
import struct
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from trine.engine.data.dpo import MEASURES
from trine.engine.errors import StorageError
from trine.engine.train.durable import ASIDE
from trine.engine.train.metrics import SCORES

FOLDER = "tensorboard"
_PREFIX = "events.out.tfevents."
_STEP_TAGS = (
    "loss", "lr", "muon_lr", "grad_norm", "expert_balance", "router_z", "busiest_expert", *MEASURES,
    "tokens_per_second", "mfu", "memory_bytes", "joules",
)  # fmt: skip
_EVAL_TAGS = ("loss", "bits_per_byte", *SCORES)


class TensorBoard:
    """Mirrors a metrics file into `folder`. Raises `StorageError` where that cannot be written."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._file: Any = None
        self._clock = _Clock()

    def begin(self, metrics: Path) -> None:
        """Put an event file with all lines of `metrics` in place of those that are there, and go on in it."""
        self.close()
        self._clock = _Clock()
        try:
            self.folder.mkdir(exist_ok=True)
            old = sorted(self.folder.glob(f"{_PREFIX}*"))
            last = max((int(path.name.split(".")[3]) for path in old), default=0)
            path = self.folder / f"{_PREFIX}{max(int(time.time()), last + 1):010d}.trine"
            aside = self.folder / f"{ASIDE}events"
            with aside.open("wb") as file:
                lines = metrics.read_text(encoding="utf-8").splitlines()
                file.writelines(map(record, self._opening()))
                file.writelines(map(record, filter(None, (self._event(json.loads(line)) for line in lines))))
            os.replace(aside, path)
            for entry in old[:-1]:
                entry.unlink()
            for entry in old[-1:]:
                os.truncate(
                    entry, 0
                )  # who is watching reads to the end of this one before the next, so it must be there
            self._file = path.open("ab", buffering=0)
        except OSError as error:
            raise self._error(error) from None

    def add(self, line: dict[str, Any]) -> None:
        """One line of the metrics file, as it was written there."""
        event = self._event(line)
        if event is None or self._file is None:
            return
        try:
            self._file.write(record(event))
        except OSError as error:
            raise self._error(error) from None

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def _opening(self) -> Iterator[bytes]:
        now = time.time()
        yield _double(1, now) + _text(3, "brain.Event:2")
        yield _double(1, now) + _int(2, 0) + _message(7, _int(1, 1))

    def _event(self, line: dict[str, Any]) -> bytes | None:
        wall = self._clock.at(line)
        values = [_message(1, _text(1, tag) + _float(2, value)) for tag, value in scalars(line)]
        return _double(1, wall) + _int(2, line["step"]) + _message(5, b"".join(values)) if values else None

    def _error(self, error: OSError) -> StorageError:
        return StorageError(
            f"cannot write {self.folder} ({error.strerror}); make room there, or continue without: "
            "log.tensorboard=false --resume auto"
        )


class _Clock:
    """When a line was written, from the lines alone: time of day at start and resume, seconds of training since."""

    def __init__(self) -> None:
        self._time, self._origin, self._seconds = 0.0, 0.0, 0.0

    def at(self, line: dict[str, Any]) -> float:
        if line["kind"] in ("start", "resume"):
            self._time, self._origin = float(line["time"]), self._seconds
        elif line["kind"] == "step":
            self._seconds = float(line["seconds"])
        return self._time + self._seconds - self._origin


def scalars(line: dict[str, Any]) -> Iterator[tuple[str, float]]:
    """Tag and value of the numbers of a line: `train/loss`, `validation/loss`, `validation/loss_ema` ..."""
    if line["kind"] == "step":
        for key in _STEP_TAGS:
            if line.get(key) is not None:
                yield f"train/{key}", float(line[key])
    elif line["kind"] == "eval":
        average = "_ema" if line["weights"] == "ema" else ""
        for key in _EVAL_TAGS:
            if line.get(key) is not None:
                yield f"{line['set']}/{key}{average}", float(line[key])


def record(data: bytes) -> bytes:
    """A TFRecord."""
    length = struct.pack("<Q", len(data))
    return length + _masked_crc(length) + data + _masked_crc(data)


def crc32c(data: bytes) -> int:
    """CRC-32 with the polynomial of Castagnoli."""
    table, crc = _table(), 0xFFFFFFFF
    for byte in data:
        crc = table[(crc ^ byte) & 0xFF] ^ (crc >> 8)
    return crc ^ 0xFFFFFFFF


@functools.cache
def _table() -> list[int]:
    table = []
    for entry in range(256):
        for _ in range(8):
            entry = (entry >> 1) ^ (0x82F63B78 if entry & 1 else 0)
        table.append(entry)
    return table


def _masked_crc(data: bytes) -> bytes:
    crc = crc32c(data)
    rotated = (crc >> 15 | crc << 17) & 0xFFFFFFFF
    return struct.pack("<I", (rotated + 0xA282EAD8) & 0xFFFFFFFF)


# ---- protobuf's wire format: a key (number and kind of the field) and a value; 0 varint, 1 double, 2 bytes, 5 float


def _varint(value: int) -> bytes:
    encoded = bytearray()
    while value > 0x7F:
        encoded.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*encoded, value])


def _int(number: int, value: int) -> bytes:
    return _varint(number << 3) + _varint(value)


def _double(number: int, value: float) -> bytes:
    return _varint(number << 3 | 1) + struct.pack("<d", value)


def _float(number: int, value: float) -> bytes:
    return _varint(number << 3 | 5) + struct.pack("<f", value)


def _message(number: int, data: bytes) -> bytes:
    return _varint(number << 3 | 2) + _varint(len(data)) + data


def _text(number: int, text: str) -> bytes:
    return _message(number, text.encode())

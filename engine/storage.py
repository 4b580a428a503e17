"""A disk without room, said by the name of what could not be written: the system's own error names no file."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from trine.engine.errors import StorageError

_NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


@contextmanager
def writing(target: Path, aside: Path | None = None) -> Iterator[None]:
    """Around writing `target`, through the file `aside`, which is removed where that fails.

    Raises `StorageError` where there is no room; other errors stay what they are.
    """
    try:
        yield
    except BaseException as error:
        if aside is not None:
            aside.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.errno in _NO_ROOM:
            raise StorageError(
                f"cannot write {target} ({error.strerror}); make room there, or choose another place"
            ) from None
        raise

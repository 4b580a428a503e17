"""Files behind URLs, by fsspec: `https://`, `s3://`, `gs://`, `hf://`, `memory://`, whatever is installed for it.

A file is read from its beginning to its end, or in places (Parquet), a few megabytes at a time. Where a connection
breaks, reading takes up again at the same byte, after checking that the file is still the same one.
"""

from __future__ import annotations

import io
import time
from pathlib import PurePosixPath
from typing import Any, BinaryIO, cast

from trine.engine.data.files import Source
from trine.engine.errors import DataError
from trine.engine.log import say, say_once

_BUFFER_BYTES = 1 << 20
_BLOCK_BYTES = 4 << 20
RETRY_SECONDS = (1.0, 4.0, 16.0)
# What stores say of a file's content, the surest first; names differ from store to store.
_VERSIONS = (
    "ETag", "etag", "e_tag", "md5", "Content-MD5", "content_md5", "md5Hash", "checksum", "Digest", "sha256", "blob_id",
    "LastModified", "Last-Modified", "last_modified", "mtime", "updated", "created",
)  # fmt: skip


def find_remote(url: str, suffixes: tuple[str, ...]) -> list[Source]:
    """The file at `url`, the files that a pattern (`*`) matches, or those below a folder; sorted, none hidden.

    Raises `DataError` naming the URL where it cannot be reached, and what to install where its protocol is not known.
    """
    system, path = _connect(url)
    try:
        if any(character in path for character in "*[") or ("?" in path and not _is_http(url)):
            names = [(found, PurePosixPath(found).name) for found in sorted(system.glob(path))]
            return [_source(system, found, name) for found, name in names if not _hidden(name)]
        info = system.info(path)
        if info["type"] != "directory":
            return [_source(system, path, _base_name(url))]
        root = info["name"].rstrip("/") + "/"
        return [
            _source(system, found, found.removeprefix(root))
            for found in sorted(system.find(path))
            if not _hidden(found.removeprefix(root)) and (not suffixes or found.endswith(suffixes))
        ]
    except DataError:
        raise
    except Exception as caught:  # every store has exceptions of its own
        error = caught.__cause__ or caught  # of HTTP, everything arrives as "not found", with the cause behind it
        if isinstance(error, FileNotFoundError) or getattr(error, "status", None) in (404, 410):
            raise DataError(f"no file or folder {url}; check the address, and that you may read it") from None
        raise DataError(f"{url} cannot be reached: {_reason(error)}; check the address and your access") from None


def open_remote(source: Source) -> BinaryIO:
    """The bytes of a source behind a URL, as they are stored; seeks where the server lets it."""
    return cast(BinaryIO, io.BufferedReader(_Resuming(source), _BUFFER_BYTES))


class _Resuming(io.RawIOBase):
    """A remote file that is opened again at the same byte where reading fails."""

    def __init__(self, source: Source) -> None:
        self._source = source
        self._system, self._path = _connect(source.location)
        self._position = 0
        self._file: Any = None
        self._begun = False

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return self._source.size > 0

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._source.size}[whence]
        self._position = start + offset
        return self._position

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        for wait in (*RETRY_SECONDS, None):
            try:
                block = self._read(len(buffer))
                break
            except DataError:
                raise
            except Exception as error:  # every store has exceptions of its own
                location, reason = self._source.location, _reason(error)
                self._let_go()
                if wait is None or _lasting(error):
                    raise DataError(f"{location} cannot be read: {reason}; try again later, or copy it here") from None
                say(f"{location}: {reason}; trying again at byte {self._position} in {wait:.0f} s")
                time.sleep(wait)
        buffer[: len(block)] = block
        self._position += len(block)
        return len(block)

    def close(self) -> None:
        if not self.closed:
            self._let_go()
        super().close()

    def _read(self, count: int) -> bytes:
        if self._file is None:
            self._open()
        if self._file.tell() != self._position:
            if not self._file.seekable():
                self._open()
            self._file.seek(self._position)
        block: bytes = self._file.read(count)
        if not block and self._position < self._source.size:
            raise EOFError(f"the connection ended after {self._position} of {self._source.size} bytes")
        return block

    def _open(self) -> None:
        # From the beginning, one long answer is the fastest and asks least of a server; later places need ranges.
        whole = _is_http(self._source.location) and self._position == 0
        if self._begun:
            self._let_go()
            self._check_unchanged()
        options = {"block_size": 0} if whole else {"block_size": _BLOCK_BYTES, "cache_type": "readahead"}
        self._file = self._system.open(self._path, "rb", **options)
        self._begun = True

    def _check_unchanged(self) -> None:
        self._system.invalidate_cache()
        now = _source(self._system, self._path, self._source.name)
        if (now.size, now.version) != (self._source.size, self._source.version):
            raise DataError(f"{self._source.location} has changed while it was read; start again")

    def _let_go(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None


def _lasting(error: Exception) -> bool:
    """Whether trying again cannot help: the file is not there, not ours, or cannot be read in places."""
    status = getattr(error, "status", None)
    refused = isinstance(status, int) and 400 <= status < 500 and status not in (408, 429)
    return refused or isinstance(error, (FileNotFoundError, PermissionError, IsADirectoryError, ValueError))


def _connect(url: str) -> tuple[Any, str]:
    try:
        import fsspec
    except ImportError:
        raise DataError(f"{url}: reading URLs needs fsspec; install it: pip install 'trine[data]'") from None
    try:
        system, path = fsspec.core.url_to_fs(url, **_options(url))
    except ImportError as error:
        remedy = "pip install 'trine[data]'" if _is_http(url) else "the package it names"
        raise DataError(f"{url}: {_reason(error)}; install {remedy} and try again") from None
    except ValueError as error:  # an unknown protocol
        raise DataError(f"{url}: {_reason(error)}; known are s3, gs, abfs, hf, https and others of fsspec") from None
    return system, path


def _options(url: str) -> dict[str, Any]:
    if not _is_http(url):
        return {}
    import aiohttp

    # The library's own limit is five minutes for a whole answer, which is too short for a file of many gigabytes.
    timeout = aiohttp.ClientTimeout(total=None, sock_connect=30, sock_read=60)
    return {"client_kwargs": {"timeout": timeout, "trust_env": True}}


def _source(system: Any, path: str, name: str) -> Source:
    location = system.unstrip_protocol(path)
    info = system.info(path)
    version = next((str(info[key]) for key in _VERSIONS if info.get(key)), "")
    if not version:
        say_once(f"{location}: its server gives no version or time, so that only its size tells whether it has changed")
    return Source(location=location, name=name, size=info.get("size") or 0, remote=True, version=version)


def _is_http(url: str) -> bool:
    return url.startswith(("http://", "https://"))


def _base_name(url: str) -> str:
    path = url.partition("?")[0] if _is_http(url) else url
    return PurePosixPath(path).name


def _hidden(path: str) -> bool:
    return any(part.startswith(".") or part == "__pycache__" for part in path.split("/"))


def _reason(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return text if isinstance(error, ImportError) else f"{type(error).__name__}: {text}" if text else repr(error)

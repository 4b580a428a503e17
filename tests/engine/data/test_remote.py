"""Files behind URLs: the same documents as on disk, taken up again after a broken connection, refused by name."""

from __future__ import annotations

import functools
import re
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import fsspec
import pytest

from trine.engine.data import remote
from trine.engine.data.files import Reader, Source, find_sources
from trine.engine.data.prepare import prepare
from trine.engine.data.shards import TokenShards
from trine.engine.errors import DataError, UsageError

CONTENT = b"".join(b"line %d of a long file\n" % number for number in range(300_000))  # 7 MB: several blocks


@dataclass
class Site:
    """What the server gives, and how it fails."""

    files: dict[str, bytes] = field(default_factory=dict)
    url: str = ""
    ranges: bool = True
    etag: str | None = "one"
    break_after: list[int] = field(default_factory=list)  # bytes given by the next answers before the line goes dead
    etag_after_break: str | None = None
    asked: list[str] = field(default_factory=list)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def __init__(self, site: Site, *arguments: object) -> None:
        self._site = site
        super().__init__(*arguments)  # type: ignore[arg-type]

    def do_HEAD(self) -> None:
        self._answer(with_body=False)

    def do_GET(self) -> None:
        self._answer(with_body=True)

    def log_message(self, format: str, *arguments: object) -> None:  # noqa: A002
        pass

    def _answer(self, *, with_body: bool) -> None:
        site, content = self._site, self._site.files.get(self.path)
        if content is None:
            self.send_error(404)
            return
        status, start, end = 200, 0, len(content)
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if with_body:
            site.asked.append(self.headers.get("Range", "all"))
        if wanted and site.ranges:
            status, start = 206, int(wanted[1])
            end = min(end, int(wanted[2]) + 1) if wanted[2] else end
        self.send_response(status)
        if status == 206:
            self.send_header("Content-Range", f"bytes {start}-{end - 1}/{len(content)}")
        if site.ranges:
            self.send_header("Accept-Ranges", "bytes")
        if site.etag:
            self.send_header("ETag", site.etag)
        self.send_header("Content-Length", str(end - start))
        self.end_headers()
        if with_body:
            body = content[start:end]
            if site.break_after:
                body = body[: site.break_after.pop(0)]
                site.etag = site.etag_after_break or site.etag
                self.close_connection = True
            self.wfile.write(body)


@pytest.fixture
def site() -> Iterator[Site]:
    site = Site()
    server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(_Handler, site))
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    site.url = f"http://127.0.0.1:{server.server_address[1]}"
    yield site
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "RETRY_SECONDS", (0.0, 0.0, 0.0))


@pytest.fixture
def memory() -> Iterator[fsspec.AbstractFileSystem]:
    system = fsspec.filesystem("memory")
    yield system
    system.store.clear()
    system.pseudo_dirs[:] = [""]


def whole(source: Source) -> bytes:
    with Reader(source) as reader:
        content = reader.file.read()
        assert reader.position == source.size or not source.size
        return content


def only(url: str) -> Source:
    (source,) = find_sources([url])
    return source


def test_folders_and_patterns_are_listed_as_on_disk(memory: fsspec.AbstractFileSystem, tmp_path: Path) -> None:
    for name in ("b.py", "a.txt", "sub/c.py", ".hidden/d.py", ".e.py", "__pycache__/f.py"):
        memory.pipe(f"/data/{name}", name.encode())
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    for root in ("memory://data", f"file://{tmp_path}"):
        assert [source.name for source in find_sources([root])] == ["a.txt", "b.py", "sub/c.py"]
        assert [source.name for source in find_sources([root], suffixes=[".py"])] == ["b.py", "sub/c.py"]
        assert [source.name for source in find_sources([f"{root}/*.py"])] == ["b.py"]
        found = find_sources([f"{root}/sub/c.py"])
        assert [(source.name, source.size, source.remote) for source in found] == [("c.py", 8, True)]
        assert whole(found[0]) == b"sub/c.py"
    with pytest.raises(DataError, match=r"holds no files that end in \.md"):
        find_sources(["memory://data"], suffixes=[".md"])
    with pytest.raises(UsageError, match=r"a\.txt is named more than once"):
        find_sources(["memory://data", "memory://data/a.txt"])


def test_a_url_prepares_to_the_tokens_of_the_file(
    memory: fsspec.AbstractFileSystem, site: Site, tmp_path: Path, tokenizer_dir: Path
) -> None:
    lines = b'{"text": "the cat sat"}\n{"text": "on a mat"}\n' * 30
    (tmp_path / "lines.jsonl").write_bytes(lines)
    memory.pipe("/lines.jsonl", lines)
    site.files["/lines.jsonl"] = lines
    places: list[Path | str] = [tmp_path / "lines.jsonl", f"file://{tmp_path}/lines.jsonl", "memory://lines.jsonl"]
    places.append(f"{site.url}/lines.jsonl")
    fingerprints = set()
    for number, place in enumerate(places):
        out = tmp_path / str(number)
        arguments = {"tokenizer_dir": tokenizer_dir, "out": out, "validation_fraction": 0.3}
        prepare([place], **arguments)  # type: ignore[arg-type]
        fingerprints.add((TokenShards.open(out).fingerprint, TokenShards.open(out, "validation").fingerprint))
        assert prepare([place], **arguments).unchanged  # type: ignore[arg-type]
    assert len(fingerprints) == 1
    site.etag = "two"
    with pytest.raises(DataError, match=r"the file http://127\.0\.0\.1.*lines\.jsonl has changed"):
        prepare([places[-1]], **arguments)  # type: ignore[arg-type]


def test_a_file_is_one_answer_and_goes_on_after_breaks(site: Site, capsys: pytest.CaptureFixture[str]) -> None:
    site.files["/a.txt"] = CONTENT
    assert whole(only(f"{site.url}/a.txt")) == CONTENT
    assert site.asked == ["all"]
    site.break_after = [1_500_000, 10, 2_000_000]
    assert whole(only(f"{site.url}/a.txt")) == CONTENT
    said = capsys.readouterr().err
    assert len(re.findall(r"a\.txt: \w+: .*; trying again at byte \d+ in 0 s", said)) >= 2


def test_a_line_that_stays_dead_is_an_error_that_names_the_url(site: Site) -> None:
    site.files["/a.txt"] = CONTENT
    site.break_after = [100] * 20
    with pytest.raises(DataError, match=r"http://127\.0\.0\.1:\d+/a\.txt cannot be read: .*; try again later"):
        whole(only(f"{site.url}/a.txt"))


def test_a_file_that_changes_while_it_is_read_is_refused(site: Site) -> None:
    site.files["/a.txt"] = CONTENT
    site.break_after, site.etag_after_break = [3_000_000], "two"
    with pytest.raises(DataError, match=r"a\.txt has changed while it was read; start again"):
        whole(only(f"{site.url}/a.txt"))


def test_servers_without_ranges_or_versions_serve_too(site: Site, capsys: pytest.CaptureFixture[str]) -> None:
    site.files["/a.txt?token=x"] = CONTENT
    site.ranges, site.etag = False, None
    source = only(f"{site.url}/a.txt?token=x")
    assert source.name == "a.txt"
    assert whole(source) == CONTENT
    assert "only its size tells whether it has changed" in capsys.readouterr().err
    site.break_after = [3_000_000]
    with pytest.raises(DataError, match=r"cannot be read: .*range"):
        whole(source)


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("memory://nowhere/a.txt", r"no file or folder memory://nowhere/a\.txt; check the address"),
        ("nope://a", r"nope://a: .*Protocol not known: nope; known are s3"),
        ("s3://bucket/a", r"s3://bucket/a: Install s3fs to access S3; install the package it names"),
    ],
)
def test_what_cannot_be_reached_is_named_with_the_remedy(url: str, message: str) -> None:
    with pytest.raises(DataError, match=message) as caught:
        find_sources([url])
    assert "\n" not in str(caught.value)


def test_missing_pages_and_dead_servers_are_named(site: Site) -> None:
    with pytest.raises(DataError, match=r"no file or folder http://127\.0\.0\.1:\d+/no; check the address"):
        find_sources([f"{site.url}/no"])
    with pytest.raises(DataError, match=r"http://127\.0\.0\.1:9/a cannot be reached: .*Connect"):
        find_sources(["http://127.0.0.1:9/a"])


def test_a_missing_package_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "fsspec", None)
    with pytest.raises(DataError, match=r"memory://a: .* needs fsspec; install it: pip install 'trine\[data\]'"):
        find_sources(["memory://a"])


def test_a_parquet_file_is_read_in_places(site: Site, tmp_path: Path, write_parquet: Callable[..., Path]) -> None:
    from trine.engine.data.sources import read_source

    texts = [f"row {number} " + "x" * (number % 97) for number in range(5000)]
    site.files["/a.parquet"] = write_parquet(tmp_path / "a.parquet", text=texts, other=["y" * 500] * 5000).read_bytes()
    pieces = read_source(only(f"{site.url}/a.parquet"), complain=lambda problem: pytest.fail(str(problem)))
    assert [piece.text for piece in pieces] == texts
    assert any(asked.startswith("bytes=") for asked in site.asked)

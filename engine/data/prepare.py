"""Turning text into token shards: `trine data prepare`.

One pass over the files in constant memory: pieces of text are read in order, encoded by several threads (the
tokenizers library leaves Python's lock), and written in order, so that the number of workers changes nothing in the
result. Everything is written to a folder beside the wished one, which takes its place by a rename at the end: what
bears the final name is complete.

A second run compares the tokenizer, the options and the files with the manifest. Equal: nothing is done. Different:
refused with what differs, since silently reusing or replacing prepared data has cost others whole training runs.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from trine.engine.data.encode import encode_pieces
from trine.engine.data.files import Source, find_sources
from trine.engine.data.progress import ByteProgress
from trine.engine.data.shard_writer import ShardWriter
from trine.engine.data.shards import FORMAT_VERSION, MANIFEST, SPLITS, Split, read_manifest
from trine.engine.data.sources import Complaints, Piece, read_source
from trine.engine.errors import DataError, UsageError
from trine.engine.storage import writing
from trine.engine.text.tokenizer import Tokenizer

SHARD_TOKENS = 1 << 27


@dataclass(frozen=True, slots=True)
class Prepared:
    """What `prepare` made or found: the folder, its manifest, and whether it was there already, unchanged."""

    folder: Path
    manifest: dict[str, Any]
    unchanged: bool


def prepare(
    files: Sequence[Path | str],
    *,
    tokenizer_dir: Path | str,
    out: Path | str,
    validation_files: Sequence[Path | str] = (),
    validation_fraction: float = 0.0,
    split_seed: int = 0,
    text_field: str = "text",
    suffixes: Sequence[str] = (),
    skip_bad: bool = False,
    overwrite: bool = False,
    workers: int | None = None,
    shard_tokens: int = SHARD_TOKENS,
) -> Prepared:
    """Encode `files` (text, .jsonl, .parquet; folders of them; URLs) into the folder `out`, laid out as in `shards`.

    validation_files: text for the validation split.
    validation_fraction: share of the documents of `files` to hold out instead, by a hash of `split_seed` and of the
        document's name (file name or path below the folder given, and line), whatever the order of the files.
    text_field: field of a JSON line, or column of a Parquet file, that holds the text.
    suffixes: which files of a folder to take (all if empty).
    skip_bad: leave out bad UTF-8, empty files and broken lines, and list them in the manifest, instead of stopping.
    overwrite: replace prepared data made from something else. workers: threads (default: one per core).

    Raises `DataError` for bad input and for prepared data that differs, `UsageError` for impossible options,
    `StorageError` where there is no room.
    """
    out = Path(out)
    _check_options(files, validation_fraction, shard_tokens, workers)
    tokenizer = Tokenizer.load(tokenizer_dir)
    if tokenizer.eos_id is None:
        raise DataError(f"the tokenizer in {tokenizer_dir} names no end-of-text token (eos_token); documents need one")
    sources: dict[Split, list[Source]] = {
        "train": find_sources(files, suffixes=suffixes),
        "validation": find_sources(validation_files, suffixes=suffixes),
    }
    _check_apart(sources)
    wanted = {
        "tokenizer": {
            "fingerprint": tokenizer.fingerprint,
            "eos_id": tokenizer.eos_id,
            "vocab_size": tokenizer.vocab_size,
        },
        "options": {
            "validation_fraction": validation_fraction,
            "split_seed": split_seed,
            "text_field": text_field,
            "suffixes": list(suffixes),
            "skip_bad": skip_bad,
            "shard_tokens": shard_tokens,
        },
    }
    _clear_up(out)
    found = _existing(out, wanted, sources, overwrite=overwrite)
    if found is not None:
        return Prepared(out, found, unchanged=True)
    workers = workers or len(os.sched_getaffinity(0))
    with _replacing(out) as folder:
        run = _Run(tokenizer, sources, wanted, folder, workers=workers)
        manifest = run.write()
        tokenizer.save(folder / "tokenizer")
        _write_manifest(folder, manifest)
    return Prepared(out, manifest, unchanged=False)


class _Run:
    """One run over the sources: reads, splits, encodes, writes; collects what the manifest tells."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        sources: dict[Split, list[Source]],
        wanted: dict[str, Any],
        folder: Path,
        *,
        workers: int,
    ) -> None:
        self._tokenizer = tokenizer
        self._sources = sources
        self._wanted = wanted
        self._options = wanted["options"]
        self._folder = folder
        self._workers = workers
        self._complaints = Complaints(skip_bad=self._options["skip_bad"])
        self._bytes_before = 0  # size of the files read completely, for progress

    def write(self) -> dict[str, Any]:
        """Write all splits and return the manifest."""
        total = sum(source.size for group in self._sources.values() for source in group)
        dtype = np.uint16 if self._tokenizer.vocab_size <= 1 << 16 else np.uint32
        writers = {
            split: ShardWriter(self._folder, split, dtype=dtype, shard_tokens=self._options["shard_tokens"])
            for split in SPLITS
        }
        try:
            with ThreadPoolExecutor(self._workers) as pool, ByteProgress(total, what="preparing") as progress:
                for encoded in encode_pieces(self._pieces(), self._tokenizer, pool=pool, workers=self._workers):
                    writer = writers[encoded.piece.split]
                    writer.add_tokens(encoded.ids, encoded.num_bytes)
                    if encoded.piece.ends:
                        writer.end_document()
                    progress.update(encoded.piece.position, tokens=len(encoded.ids))
                identities = {split: list(pool.map(_identity, group)) for split, group in self._sources.items()}
            splits = self._finish(writers)
        finally:
            for writer in writers.values():
                writer.close()
        records = [
            {"split": split, "name": source.name, "size": source.size, **identity}
            for split, group in self._sources.items()
            for source, identity in zip(group, identities[split], strict=True)
        ]
        return {
            "version": FORMAT_VERSION,
            "dtype": np.dtype(dtype).name,
            **self._wanted,
            "splits": splits,
            "num_skipped": self._complaints.count,
            "skipped": self._complaints.listed,
            "sources": records,
        }

    def _finish(self, writers: dict[Split, ShardWriter]) -> dict[str, Any]:
        splits: dict[str, Any] = {}
        for split, writer in writers.items():
            if writer.num_documents:
                splits[split] = writer.finish(self._tokenizer.fingerprint)
                continue
            writer.close()
            (self._folder / f"{split}-documents.bin").unlink()
            if split == "train":
                raise DataError("no document is left for training; give more text, or hold out less of it")
            if self._sources[split] or self._options["validation_fraction"] > 0:
                raise DataError(
                    "no document fell to the validation split; raise --validation-fraction, give more documents, "
                    "or name --validation files"
                )
        return splits

    def _pieces(self) -> Iterator[Piece]:
        for split, group in self._sources.items():
            for source in group:
                for piece in read_source(
                    source,
                    text_field=self._options["text_field"],
                    complain=self._complaints,
                    check_first=self._options["skip_bad"],
                ):
                    chosen = self._held_out(piece.document) if split == "train" else "validation"
                    yield piece.moved(split=chosen, position=self._bytes_before + piece.position)
                self._bytes_before += source.size

    def _held_out(self, document: str) -> Split:
        fraction = self._options["validation_fraction"]
        digest = hashlib.sha256(f"{self._options['split_seed']}:{document}".encode()).digest()
        return "validation" if int.from_bytes(digest[:8], "big") < fraction * 2.0**64 else "train"


def _check_options(
    files: Sequence[Path | str], validation_fraction: float, shard_tokens: int, workers: int | None
) -> None:
    if not files:
        raise UsageError("no files to prepare; name text files, folders, .jsonl or .parquet files")
    if not 0.0 <= validation_fraction < 1.0:
        raise UsageError(f"validation fraction {validation_fraction} should be at least 0 and below 1")
    if shard_tokens < 1:
        raise UsageError(f"{shard_tokens} tokens per shard; give at least 1")
    if workers is not None and workers < 1:
        raise UsageError(f"{workers} workers; give at least 1")


def _check_apart(sources: dict[Split, list[Source]]) -> None:
    training = {source.identity for source in sources["train"]}
    for source in sources["validation"]:
        if source.identity in training:
            raise UsageError(
                f"{source.location} is named both for training and for validation; name it for one of them"
            )


def _existing(
    out: Path, wanted: dict[str, Any], sources: dict[Split, list[Source]], *, overwrite: bool
) -> dict[str, Any] | None:
    """The manifest in `out` if it was made from just this; None if `out` is free to be written."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return None
    if not out.is_dir() or not (out / MANIFEST).is_file():
        raise UsageError(f"{out} exists and is no prepared data; choose another --out, or remove it yourself")
    if overwrite:
        try:
            manifest = read_manifest(out)
        except DataError:
            return None  # of another version, or damaged: what --overwrite is for
    else:
        manifest = read_manifest(out)
    difference = _difference(manifest, wanted, sources)
    if difference is None:
        return manifest
    if overwrite:
        return None
    raise DataError(f"{out} was prepared from something else: {difference}; use --overwrite or another --out")


def _difference(manifest: dict[str, Any], wanted: dict[str, Any], sources: dict[Split, list[Source]]) -> str | None:
    for section in ("tokenizer", "options"):
        for key, value in wanted[section].items():
            before = manifest[section].get(key)
            if before != value:
                short = [str(v)[:12] if key == "fingerprint" else repr(v) for v in (before, value)]
                return f"{section} {key} was {short[0]}, is {short[1]}"
    records = manifest["sources"]
    now = [(split, source) for split, group in sources.items() for source in group]
    names_before = [(record["split"], record["name"]) for record in records]
    names_now = [(split, source.name) for split, source in now]
    known_before, known_now = set(names_before), set(names_now)
    for split, name in names_now:
        if (split, name) not in known_before:
            return f"the {split} file {name} is new"
    for split, name in names_before:
        if (split, name) not in known_now:
            return f"the {split} file {name} is gone"
    if names_before != names_now:
        return "the files come in another order"
    for record, (_, source) in zip(records, now, strict=True):
        if record["size"] != source.size or not _same_content(record, source):
            return f"the file {source.location} has changed"
    return None


def _identity(source: Source) -> dict[str, Any]:
    """What the manifest keeps to tell whether a file has changed; one behind a URL is not read again for it."""
    if source.remote:
        return {"url": source.location, "version": source.version}
    return {"modified_ns": source.modified_ns, "sha256": _hash_file(source)}


def _same_content(record: dict[str, Any], source: Source) -> bool:
    if source.remote:
        return bool(record.get("version") == source.version)
    return record.get("modified_ns") == source.modified_ns or record.get("sha256") == _hash_file(source)


@contextmanager
def _replacing(out: Path) -> Iterator[Path]:
    """A new folder beside `out` that takes its place when the block ends well and vanishes when it does not."""
    out.parent.mkdir(parents=True, exist_ok=True)
    folder = out.parent / f".{out.name}.partial-{os.getpid()}"
    old = out.parent / f".{out.name}.old-{os.getpid()}"
    folder.mkdir()
    try:
        with writing(out):
            yield folder
        if out.exists():
            out.rename(old)
        folder.rename(out)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


def _clear_up(out: Path) -> None:
    """Folders of runs that were killed (their process is gone); one put aside for a new one that never came is back."""
    for folder in [*out.parent.glob(f".{out.name}.partial-*"), *out.parent.glob(f".{out.name}.old-*")]:
        process = folder.name.rpartition("-")[2]
        if not process.isdigit() or Path("/proc", process).exists():
            continue
        if folder.name.startswith(f".{out.name}.old-") and not out.exists():
            folder.rename(out)
        else:
            shutil.rmtree(folder)


def _write_manifest(folder: Path, manifest: dict[str, Any]) -> None:
    with (folder / MANIFEST).open("w", encoding="utf-8") as file:
        json.dump(manifest, file, indent=1, ensure_ascii=False)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())


def _hash_file(source: Source) -> str:
    with Path(source.location).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()

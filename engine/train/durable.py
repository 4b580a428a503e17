"""Files and folders on disk that are whole or not there, whatever ends the process or the machine.

The order is everything: what is new is written under a hidden name beside its place, its bytes are flushed to the
disk, then the folder that names them, and only then is it renamed, which the system does wholly or not at all; last,
the folder around it is flushed, so that the new name lasts too. A sealed folder holds a manifest of its files with
sizes and SHA-256 checksums, written after all others: `damage` tells from it whether the folder is still what was
written.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

ASIDE = ".writing-"  # hidden names that begin so are leftovers of an interrupted write
MANIFEST = "checksums.json"
_MANIFEST_VERSION = 1


def write_file(path: Path, text: str) -> None:
    """Put `text` in place of what `path` may hold."""
    aside = path.parent / f"{ASIDE}{path.name}"
    aside.write_text(text, encoding="utf-8")
    flush(aside)
    os.replace(aside, path)
    flush(path.parent)


def write_folder(folder: Path, fill: Callable[[Path], None], *, seal_in: str | None = None) -> int:
    """Have `fill` write a folder aside and put it in place of what may be there; returns its bytes.

    With `seal_in` the manifest is written into that subfolder. Where anything fails, what was written is removed again
    and `folder` is as it was.
    """
    aside = folder.parent / f"{ASIDE}{folder.name}"
    if aside.exists():
        shutil.rmtree(aside)
    try:
        aside.mkdir()
        fill(aside)
        written = _flush_tree(aside)
        if seal_in is not None:
            _seal(aside, seal_in, written)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)  # a full disk must not stay full
        raise
    if folder.exists():
        replaced = folder.parent / f"{ASIDE}old-{folder.name}"
        if replaced.exists():
            shutil.rmtree(replaced)
        os.rename(folder, replaced)
        os.rename(aside, folder)
        flush(folder.parent)
        shutil.rmtree(replaced)
    else:
        os.rename(aside, folder)
        flush(folder.parent)
    return sum(size for size, _ in written.values())


def remove_folder(folder: Path) -> None:
    """Remove a folder so that no half of it is ever seen under its name."""
    aside = folder.parent / f"{ASIDE}old-{folder.name}"
    if aside.exists():
        shutil.rmtree(aside)
    os.rename(folder, aside)
    shutil.rmtree(aside)


def clear_leftovers(parent: Path) -> None:
    """Remove what interrupted writes left in `parent`."""
    for entry in parent.glob(f"{ASIDE}*"):
        shutil.rmtree(entry) if entry.is_dir() else entry.unlink()


def damage(folder: Path, *, seal_in: str, contents: bool = True) -> str | None:
    """Why a sealed folder is not what was written, in a few words, or None where it is.

    `contents` compares checksums, by reading everything; without it only names and sizes are compared.
    """
    path = folder / seal_in / MANIFEST
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        version = manifest["version"]
        files: dict[str, Any] = manifest["files"]
        expected = {name: (int(entry["bytes"]), str(entry["sha256"])) for name, entry in files.items()}
    except FileNotFoundError:
        return f"{seal_in}/{MANIFEST}, which is written last, is missing"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{seal_in}/{MANIFEST} cannot be read ({error})"
    if version != _MANIFEST_VERSION:
        return f"{seal_in}/{MANIFEST} has version {version}, this Trine reads {_MANIFEST_VERSION}"
    for name, (size, checksum) in expected.items():
        wrong = _file_damage(folder / name, size, checksum if contents else None)
        if wrong is not None:
            return f"{name} {wrong}"
    return None


def flush(path: Path) -> None:
    """Have the system write a file or folder to the disk now."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _file_damage(path: Path, size: int, checksum: str | None) -> str | None:
    try:
        found = path.stat().st_size
        if found != size:
            return f"has {found:,} bytes instead of {size:,}"
        if checksum is not None and _digest(path) != checksum:
            return "does not have the checksum it was written with"
    except FileNotFoundError:
        return "is missing"
    except OSError as error:
        return f"cannot be read ({error.strerror})"
    return None


def _flush_tree(folder: Path) -> dict[str, tuple[int, str]]:
    """Flush everything in `folder` and the folder; returns size and checksum of each file by relative name."""
    found: dict[str, tuple[int, str]] = {}
    for entry in sorted(folder.rglob("*")):
        flush(entry)
        if entry.is_file():
            found[entry.relative_to(folder).as_posix()] = (entry.stat().st_size, _digest(entry))
    flush(folder)
    return found


def _seal(folder: Path, seal_in: str, written: dict[str, tuple[int, str]]) -> None:
    files = {name: {"bytes": size, "sha256": checksum} for name, (size, checksum) in written.items()}
    manifest = {"version": _MANIFEST_VERSION, "files": files}
    write_file(folder / seal_in / MANIFEST, json.dumps(manifest, indent=1) + "\n")


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()

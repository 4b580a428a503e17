"""Folders that are whole or not there, and how damage to them is told."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from trine.engine.train import durable
from trine.engine.train.durable import clear_leftovers, damage, remove_folder, write_file, write_folder


def fill(folder: Path) -> None:
    (folder / "weights").write_bytes(b"weights " * 100)
    (folder / "state").mkdir()
    (folder / "state" / "place").write_text("7")


@pytest.fixture
def sealed(tmp_path: Path) -> Path:
    write_folder(tmp_path / "step", fill, seal_in="state")
    return tmp_path / "step"


def test_a_folder_that_was_written_is_not_damaged_and_leaves_nothing_beside_it(sealed: Path) -> None:
    assert damage(sealed, seal_in="state") is None
    assert [entry.name for entry in sealed.parent.iterdir()] == ["step"]
    assert write_folder(sealed, fill, seal_in="state") == 801
    assert [entry.name for entry in sealed.parent.iterdir()] == ["step"]


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def shorten(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


@pytest.mark.parametrize(
    ("file", "harm", "told"),
    [
        ("weights", flip, "weights does not have the checksum it was written with"),
        ("weights", shorten, "weights has 799 bytes instead of 800"),
        ("state/place", Path.unlink, "state/place is missing"),
        ("state/checksums.json", Path.unlink, "state/checksums.json, which is written last, is missing"),
        ("state/checksums.json", shorten, None),
        ("state/checksums.json", lambda path: path.write_text("{"), "state/checksums.json cannot be read"),
        ("state/checksums.json", lambda path: path.write_text("[]"), "state/checksums.json cannot be read"),
        ("state/checksums.json", lambda path: path.write_text('{"version": 9, "files": {}}'), "has version 9"),
    ],
)  # fmt: skip
def test_damage_names_the_file_and_what_is_wrong(
    sealed: Path, file: str, harm: Callable[[Path], object], told: str | None
) -> None:
    harm(sealed / file)
    found = damage(sealed, seal_in="state")
    if told is None:  # the last newline of the manifest says nothing
        assert found is None
    else:
        assert found is not None
        assert told in found


def test_a_flipped_bit_is_only_found_by_reading_the_contents(sealed: Path) -> None:
    flip(sealed / "weights")
    assert damage(sealed, seal_in="state", contents=False) is None
    assert damage(sealed, seal_in="state") is not None


def test_a_write_that_fails_leaves_the_old_folder_and_frees_its_room(sealed: Path) -> None:
    def fail(folder: Path) -> None:
        fill(folder)
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        write_folder(sealed, fail, seal_in="state")
    assert damage(sealed, seal_in="state") is None
    assert [entry.name for entry in sealed.parent.iterdir()] == ["step"]


def test_everything_is_on_the_disk_before_the_name_and_the_manifest_comes_last(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[str] = []
    rename, flush = os.rename, durable.flush

    def seen_rename(source: Path, target: Path) -> None:
        done.append(f"rename {target.name}")
        rename(source, target)

    def seen_flush(path: Path) -> None:
        done.append(f"flush {path.name}")
        flush(path)

    monkeypatch.setattr(os, "rename", seen_rename)
    monkeypatch.setattr(durable, "flush", seen_flush)
    write_folder(tmp_path / "step", fill, seal_in="state")
    assert done == [
        "flush state", "flush place", "flush weights", "flush .writing-step",
        "flush .writing-checksums.json", "flush state", "rename step", f"flush {tmp_path.name}",
    ]  # fmt: skip


def test_a_file_is_replaced_whole_and_leftovers_are_cleared(tmp_path: Path) -> None:
    write_file(tmp_path / "latest", "one\n")
    write_file(tmp_path / "latest", "two\n")
    (tmp_path / ".writing-latest").write_text("thr")
    (tmp_path / ".writing-step-1" / "state").mkdir(parents=True)
    clear_leftovers(tmp_path)
    assert [entry.name for entry in tmp_path.iterdir()] == ["latest"]
    assert (tmp_path / "latest").read_text() == "two\n"


def test_a_folder_is_removed_under_another_name(sealed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    monkeypatch.setattr(shutil, "rmtree", lambda path: seen.append(path.name))
    remove_folder(sealed)
    assert seen == [".writing-old-step"]
    assert not sealed.exists()

"""Files that lie: mutated checkpoints are read, and every one must end as a clear error or a correct load.

    python -m trine.benchmarks.fuzz_readers --files 10000

Each reader (safetensors headers, the index of shards, config.json, GGUF headers) gets files of a tiny model with
lengths, offsets, shapes, types, names or bytes changed, cut, repeated or nested. What ends otherwise is a failure: an
error that is not ours, or not one printable line; a load with other numbers than the header points at; and taking
memory: the process may not grow by more than `--room` of address space, which stops a lie before it is believed.
Prints one line of figures for each reader, then one JSON object; exit status 1 where anything failed.
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import struct
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from trine.engine.errors import CheckpointError
from trine.engine.model.checkpoint import load_model, save_model
from trine.engine.model.config import ModelConfig
from trine.engine.model.gguf import read_gguf
from trine.engine.model.init import initialize
from trine.engine.model.transformer import Transformer

NUMBERS: tuple[Any, ...] = (0, 1, 2, 7, -1, 2**31, 2**32 - 1, 2**53, 2**63, 2**64 - 1, 2**64, 1.5, 1e300)
ODD: tuple[Any, ...] = (*NUMBERS, None, True, "", "x", [], {}, [[]], [1, [2]], {"a": 1})
KINDS = ("F64", "F32", "F16", "BF16", "I64", "I32", "I16", "I8", "U8", "BOOL", "F8_E4M3", "F8_E5M2", "F8_E8M0", "F4",
         "U16", "U32", "U64", "C64", "f32", "", "F32 ")  # fmt: skip
NAMES = ("", "x" * 5000, "a\nb", "\x1b[2J", "\ud800", "model", "__metadata__", "../x", "lm_head.weight\x00")
LENGTHS = (0, 1, 2, 7, 8, 100_000_000, 100_000_001, 2**31, 2**32, 2**63 - 1, 2**63, 2**64 - 1)


@dataclass
class Figures:
    """Of one reader: how its files ended, and the address space that reading them took."""

    reader: str
    files: int = 0
    refused: int = 0
    loaded: int = 0
    failures: Counter[str] = field(default_factory=Counter)
    grown_bytes: int = 0

    def line(self) -> str:
        """For people."""
        return (
            f"{self.reader:12} {self.files:6,} files: {self.refused:6,} refused, {self.loaded:5,} loaded, "
            f"{sum(self.failures.values())} failures; address space grew by {self.grown_bytes / 2**20:.1f} MiB"
        )


def main() -> None:
    """Read the command line, mutate, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--files", type=int, default=10_000, help="files for each reader (default 10000)")
    parser.add_argument("--reader", action="append", choices=READERS, help="these alone (repeatable)")
    parser.add_argument("--seed", type=int, default=0, help="of the mutations (default 0)")
    parser.add_argument("--room", type=int, default=64, help="MiB by which the process may grow (default 64)")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as place:
        names = options.reader or READERS
        results = [fuzz(name, options.files, options.seed, Path(place), options.room) for name in names]
    for result in results:
        print(result.line())
        for what, count in result.failures.most_common(10):
            print(f"    {count} x {what}")
    print(json.dumps({result.reader: {**vars(result), "failures": dict(result.failures)} for result in results}))
    sys.exit(any(result.failures for result in results))


def fuzz(reader: str, files: int, seed: int, place: Path, room_mib: int) -> Figures:
    """Read so many mutations with one reader."""
    prepare, mutate, read = READERS[reader]
    folder = place / reader
    folder.mkdir()
    path = prepare(folder)
    original, rng, result = path.read_bytes(), random.Random(seed), Figures(reader)
    read(path)  # what is imported and kept by the first use
    with _limited(room_mib * 2**20):
        before = _address_space("VmPeak")
        for _ in range(files):
            content = mutate(original, rng)
            path.write_bytes(content)
            result.files += 1
            try:
                read(path)
                result.loaded += 1
            except CheckpointError as error:
                told = str(error)
                if told.isprintable():
                    result.refused += 1
                else:
                    result.failures["a message of several lines, or that is not printable"] += 1
            except BaseException as error:  # a panic of a library in Rust is no Exception; all count as failures
                if isinstance(error, KeyboardInterrupt):
                    raise
                result.failures[f"{type(error).__name__}: {str(error)[:100]!r}"] += 1
        result.grown_bytes = _address_space("VmPeak") - before
    return result


# --- readers ----------------------------------------------------------------------------------------------------------


def _checkpoint(folder: Path, *, shards: bool = False) -> Path:
    """A tiny Llama; the weights, or their index."""
    config = ModelConfig(
        family="llama", vocab_size=16, width=8, num_layers=1, num_heads=2, num_kv_heads=1, head_dim=4, ffn_width=16,
        max_positions=16,
    )  # fmt: skip
    model = Transformer(config)
    initialize(model, seed=0)
    save_model(model, folder, max_shard_bytes=1000 if shards else 10**9)
    return folder / ("model.safetensors.index.json" if shards else "model.safetensors")


def _load(path: Path) -> None:
    """Load the folder, and compare every number with what the header points at."""
    model = load_model(path.parent, dtype=torch.float32)
    expected = {}
    for file in path.parent.glob("*.safetensors"):
        content = file.read_bytes()
        (length,) = struct.unpack("<Q", content[:8])
        header = json.loads(content[8 : 8 + length])
        header.pop("__metadata__", None)
        for name, entry in header.items():
            start, stop = (8 + length + at for at in entry["data_offsets"])
            kind = {"F32": torch.float32, "F64": torch.float64, "F16": torch.float16, "BF16": torch.bfloat16}
            raw = torch.frombuffer(bytearray(content[start:stop]), dtype=kind[entry["dtype"]])
            expected[name.removeprefix("model.")] = raw.float()
    for name, parameter in model.named_parameters():
        found = expected.get(name, expected.get(name.replace("embed_tokens", "lm_head")))
        if found is None or not torch.equal(found.nan_to_num(), parameter.detach().flatten().nan_to_num()):
            raise AssertionError(f"{name} was loaded with other numbers than the file holds")


def _config(folder: Path) -> Path:
    return _checkpoint(folder).with_name("config.json")


def _gguf(folder: Path) -> Path:
    """A file with metadata of every kind and tensors in F32 and Q8_0."""

    def text(value: str) -> bytes:
        return struct.pack("<Q", len(value)) + value.encode()

    entries = [text("general.architecture") + struct.pack("<I", 8) + text("llama")]
    entries += [text(f"number.{kind}") + struct.pack("<I", kind) + b"\1" * size for kind, size in _GGUF_SIZES.items()]
    entries += [text("words") + struct.pack("<IIQ", 9, 8, 3) + text("a") * 3]
    entries += [text("nested") + struct.pack("<IIQIQ", 9, 9, 1, 4, 2) + b"\0" * 8]
    infos, data = [], b""
    for name, shape, kind, size in (("a", (32, 4), 0, 512), ("b", (64, 2), 8, 136), ("c", (8,), 1, 16)):
        data += b"\0" * (-len(data) % 32)
        infos.append(text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, len(data)))
        data += bytes(size)
    header = b"GGUF" + struct.pack("<IQQ", 3, len(infos), len(entries)) + b"".join(entries + infos)
    path = folder / "model.gguf"
    path.write_bytes(header + b"\0" * (-len(header) % 32) + data)
    return path


_GGUF_SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}


def _read_gguf(path: Path) -> None:
    for tensor in read_gguf(path).tensors.values():
        if tensor.read().shape != tensor.shape:
            raise AssertionError(f"{tensor.name} was read in another shape than the header says")


# --- mutations --------------------------------------------------------------------------------------------------------


def _mutate_safetensors(content: bytes, rng: random.Random) -> bytes:
    """One to three lies: in the JSON of the header, in its text, in its length or in any byte."""
    (length,) = struct.unpack("<Q", content[:8])
    header, data = json.loads(content[8 : 8 + length]), content[8 + length :]
    for _ in range(rng.choice((0, 1, 1, 1, 2, 3))):
        _lie(header, rng)
    text = json.dumps(header).encode("ascii")
    if rng.random() < 0.25:
        text = _mutate_text(text, rng)
    stated = rng.choice((*LENGTHS, len(text) - 1, len(text) + 1)) if rng.random() < 0.1 else len(text)
    whole = struct.pack("<Q", stated) + text + data
    return _mutate_bytes(whole, rng, 8 + len(text)) if rng.random() < 0.25 else whole


def _lie(header: dict[str, Any], rng: random.Random) -> None:
    """Change one thing about one tensor."""
    name = rng.choice(list(header) or ["none"])
    entry = header.get(name)
    what = rng.randrange(9)
    if what == 0:
        header.pop(name, None)
    elif what == 1:
        header[rng.choice(NAMES)] = header.pop(name, {})
    elif what == 2:
        header["__metadata__"] = rng.choice((*ODD, {"a": "b"}, {"a": 1}, {"x" * 1000: "y" * 1000}))
    elif what == 3 or not isinstance(entry, dict) or "shape" not in entry:
        header[name] = rng.choice(ODD)
    elif what == 4:
        entry["dtype"] = rng.choice((*KINDS, *ODD))
    elif what == 5:
        shape = entry["shape"] if isinstance(entry["shape"], list) else [4]
        entry["shape"] = rng.choice(([*shape, 1], shape[:-1], shape[::-1], *ODD))
    elif what == 6 and isinstance(entry["shape"], list) and entry["shape"]:
        shape = list(entry["shape"])
        shape[rng.randrange(len(shape))] = rng.choice(NUMBERS)
        entry["shape"] = shape
    elif what == 7:
        other = header[rng.choice(list(header))]
        offsets = other.get("data_offsets") if isinstance(other, dict) else None
        entry["data_offsets"] = rng.choice((offsets, [0, 0], [0], [8, 0], [0, 2**63], *ODD))
    elif isinstance(entry.get("data_offsets"), list) and entry["data_offsets"]:
        offsets = list(entry["data_offsets"])
        offsets[rng.randrange(len(offsets))] = rng.choice(NUMBERS)
        entry["data_offsets"] = offsets
    if rng.random() < 0.1 and isinstance(entry, dict):
        entry[rng.choice(("extra", "shape2", "\ud800"))] = rng.choice(ODD)


def _mutate_text(text: bytes, rng: random.Random) -> bytes:
    """JSON that is not, is deep, or says a thing twice."""
    place, depth = rng.randrange(len(text)), rng.choice((3, 100, 200, 2_000, 50_000))
    what = rng.randrange(6)
    if what == 0:
        return text[:place] + bytes([rng.randrange(256)]) * rng.randrange(1, 5) + text[place:]  # bad UTF-8 too
    if what == 1:
        return b'{"a":' * depth + text + b"}" * rng.choice((depth, 0))
    if what == 2:
        return text[:-1] + b', "deep": ' + b"[" * depth + b"]" * depth + b"}"
    if what == 3:
        return text[:-1] + b", " + text[1:]  # all keys twice
    if what == 4:
        return text[: rng.randrange(len(text))]
    return text.replace(b'"', rng.choice((b"'", b"")), rng.randrange(1, 9))


def _mutate_bytes(content: bytes, rng: random.Random, header: int) -> bytes:
    """A few bytes changed, removed, repeated, or the end cut off."""
    changed = bytearray(content)
    for _ in range(rng.randrange(1, 4)):
        place = rng.randrange(max(1, min(header, len(changed))))
        what = rng.randrange(5)
        if what == 0:
            changed[place : place + 1] = bytes([rng.randrange(256)])
        elif what == 1:
            changed[place : place + 8] = struct.pack("<Q", rng.choice(LENGTHS))
        elif what == 2:
            del changed[place : place + rng.randrange(1, 16)]
        elif what == 3:
            changed[place:place] = changed[place : place + rng.randrange(1, 64)]
        else:
            del changed[rng.randrange(len(changed) + 1) :]
    return bytes(changed)


def _mutate_json(content: bytes, rng: random.Random) -> bytes:
    """Values of any type and size in a JSON file, or text that is none."""
    value = json.loads(content)
    for _ in range(rng.choice((1, 1, 2))):
        table = value
        while isinstance(inner := table.get(key := rng.choice(list(table))), dict) and inner and rng.random() < 0.9:
            table = inner
        if rng.random() < 0.1:
            table.pop(key)
        else:
            table[key] = rng.choice((*ODD, *NAMES, "llama", "default", "yarn", "silu"))
        if not value:
            break
    text = json.dumps(value).encode("ascii")
    return _mutate_text(text, rng) if rng.random() < 0.2 else text


Reader = tuple[Callable[[Path], Path], Callable[[bytes, random.Random], bytes], Callable[[Path], None]]
READERS: dict[str, Reader] = {
    "safetensors": (_checkpoint, _mutate_safetensors, _load),
    "index": (lambda folder: _checkpoint(folder, shards=True), _mutate_json, _load),
    "config": (_config, _mutate_json, _load),
    "gguf": (_gguf, lambda content, rng: _mutate_bytes(content, rng, len(content) - 700), _read_gguf),
}


# --- memory -----------------------------------------------------------------------------------------------------------


def _address_space(key: str) -> int:
    """VmPeak or VmSize of this process."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{key}:"))


@contextmanager
def _limited(room: int) -> Iterator[None]:
    """Within it the process may not have more than `room` bytes of address space on top of its most so far."""
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (_address_space("VmPeak") + room, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


if __name__ == "__main__":
    main()

"""The text that methods look at, as samples of one length: from text files, JSON lines, and conversations.

    text            documents joined, each with the end-of-text token behind it, and cut; where the tokenizer puts a
                    beginning-of-text token before a text, every sample begins with it
    conversations   lines of a .jsonl file with "messages", through the model's chat template; a sample begins with a
                    conversation and holds the next ones as far as they fit, the last cut short

Samples are taken at even distances from all that there are, so that no random numbers are needed, and files are thinned
in the same way where they are large. What was read is told apart by the SHA-256 of the files. Pairs of sources and
targets are read by `pair_files.py`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch

from trine.engine.data.files import DamagedError, Reader, Source, find_sources
from trine.engine.data.sources import JSON_LINES, BadInput, read_source
from trine.engine.errors import DataError, UsageError
from trine.engine.quantize.samples import DataFile, Samples
from trine.engine.text.chat import ChatTemplate
from trine.engine.text.tokenizer import Tokenizer

SAMPLES, LENGTH = 128, 512
HELD_OUT = 16
# Text that is turned into tokens at most; of more, every second (third ...) piece or line is taken.
TEXT_BYTES = 16 * 2**20
_CONVERSATION = "messages"


def read_calibration(
    paths: Sequence[Path],
    tokenizer: Tokenizer,
    *,
    samples: int | None = None,
    length: int | None = None,
    context: int,
    held_out: bool = False,
    ended: bool = False,
) -> tuple[Samples, Samples | None]:
    """(samples, others held out for measuring, where there are any and `held_out` asks for them).

    `samples` None takes up to 128 and leaves a ninth of few; `length` None is 512, or the model's `context` where that
    is less. `ended`: each sample ends with the end-of-text token, as an encoder-decoder knows its texts. Raises
    `DataError` for files that are missing, empty, broken, or too short; `UsageError` for a length beyond the context.
    """
    length = check_sizes(samples, length, context)
    sources = find_sources(paths)
    end = [tokenizer.eos_id] if ended and tokenizer.eos_id is not None else []
    pieces = [piece for group in _packed(sources, tokenizer, length - len(end)) for piece in group]
    if not pieces:
        raise DataError(
            f"{names_of(sources)}: less than one sample of {length} tokens; give more text, or a smaller "
            "--calibration-length"
        )
    what = f"{names_of(sources)} hold {len(pieces)} samples of {length} tokens"
    kept, apart = choose(len(pieces), samples, most=SAMPLES, spare=HELD_OUT if held_out else 0, what=what)
    files = tuple(hashed(source) for source in sources)

    def stack(numbers: Iterable[int]) -> Samples:
        ends = np.array(end, dtype=np.int64)
        return Samples(
            torch.stack([torch.from_numpy(np.concatenate((pieces[number], ends))) for number in numbers]), files
        )

    return stack(kept), stack(apart) if apart else None


def check_sizes(samples: int | None, length: int | None, context: int) -> int:
    """The tokens of a sample. Raises `UsageError` for a number of samples or a length that cannot be."""
    length = min(LENGTH, context) if length is None else length
    if samples is not None and samples < 1:
        raise UsageError(f"--calibration-samples is {samples}; it must be at least 1")
    if not 2 <= length <= context:
        raise UsageError(f"--calibration-length is {length}; it must be from 2 to the model's context of {context}")
    return length


def choose(found: int, wanted: int | None, *, most: int, spare: int, what: str) -> tuple[list[int], list[int]]:
    """Numbers of samples to take of those found, and of others to hold out, up to `spare`.

    `wanted` None takes up to `most`, and leaves a ninth of few where some are held out. Raises `DataError`, saying
    `what` there is, where there are fewer than wanted.
    """
    count = min(most, found - (found // 9 if spare else 0)) if wanted is None else wanted
    if count > found:
        raise DataError(
            f"{what}, not {count}; give more text, a smaller --calibration-length or fewer --calibration-samples"
        )
    spare = min(spare, found - count)
    chosen = _evenly(found, count + spare)
    apart = {chosen[number] for number in _evenly(len(chosen), spare)}
    return [number for number in chosen if number not in apart], sorted(apart)


def _evenly(total: int, count: int) -> list[int]:
    """`count` of the numbers below `total`, at even distances."""
    return [(2 * number + 1) * total // (2 * count) for number in range(count)]


def _packed(sources: Sequence[Source], tokenizer: Tokenizer, length: int) -> Iterator[list[np.ndarray[Any, Any]]]:
    """Samples of `length` tokens, int64, file by file; text that is left over goes on in the next file."""
    template = None
    bos, eos = _bos(tokenizer), tokenizer.eos_id
    every = -(-sum(source.size for source in sources) // TEXT_BYTES)
    rest = np.empty(0, dtype=np.int64)
    number = 0
    for source in sources:
        if _CONVERSATION in first_fields(source):
            template = template or _template(tokenizer, source)
            texts = (template.render(one, add_generation_prompt=False) for one in _conversations(source, every))
            yield _pack_conversations((tokenizer.encode(text) for text in texts), length)
            continue
        for piece in read_source(source, complain=_refuse):
            number += 1
            if number % every:
                continue
            ids = tokenizer.encode(piece.text, parse_special=False)
            end = [eos] if piece.ends and eos is not None else []
            rest = np.concatenate((rest, np.array([*ids, *end], dtype=np.int64)))
            step = length - len(bos)
            whole = len(rest) // step
            yield [np.concatenate((bos, part)) for part in rest[: whole * step].reshape(whole, step)]
            rest = rest[whole * step :]


def _pack_conversations(conversations: Iterable[list[int]], length: int) -> list[np.ndarray[Any, Any]]:
    found, current = [], list[int]()
    for ids in conversations:
        current += ids
        if len(current) >= length:
            found.append(np.array(current[:length], dtype=np.int64))
            current = []
    return found


def _bos(tokenizer: Tokenizer) -> np.ndarray[Any, Any]:
    """What the tokenizer puts before a text: one token or none."""
    bos = tokenizer.bos_id
    adds = bos is not None and bos in tokenizer.encode("", add_special_tokens=True)[:1]
    return np.array([bos] if adds else [], dtype=np.int64)


def first_fields(source: Source) -> Collection[str]:
    """The fields of the first line of a .jsonl file; none of any other file, or of a broken line."""
    if source.suffix not in JSON_LINES:
        return ()
    with Reader(source) as reader:
        try:
            first = json.loads(reader.file.readline())
        except (ValueError, RecursionError, DamagedError):
            return ()  # the reader of texts says what is wrong with it
    return first if isinstance(first, dict) else ()


def _conversations(source: Source, every: int) -> Iterator[list[dict[str, Any]]]:
    with Reader(source) as reader:
        for number, line in enumerate(reader.file, start=1):
            if number % every:
                continue
            try:
                messages = json.loads(line)[_CONVERSATION]
            except (ValueError, RecursionError, LookupError, TypeError) as error:
                raise DataError(f"{source.location}:{number}: no conversation ({error}); correct the line") from None
            if not isinstance(messages, list) or not all(isinstance(one, dict) for one in messages):
                raise DataError(f"{source.location}:{number}: {_CONVERSATION!r} should be a list of objects")
            yield messages


def _template(tokenizer: Tokenizer, source: Source) -> ChatTemplate:
    template = ChatTemplate.of(tokenizer)
    if template is None:
        raise DataError(
            f"{source.location} holds conversations, but the model has no chat template; give text, or add "
            "chat_template.jinja to the checkpoint"
        )
    return template


def hashed(source: Source) -> DataFile:
    """A file and the hash of what it holds."""
    digest = hashlib.sha256()
    with Reader(source) as reader:
        while block := reader.file.read(2**20):
            digest.update(block)
    return DataFile(source.name, source.size, digest.hexdigest())


def names_of(sources: Sequence[Source]) -> str:
    """The first few, for people."""
    names = [source.location for source in sources]
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _refuse(bad: BadInput) -> NoReturn:
    raise DataError(f"{bad}; correct the file or leave it out")

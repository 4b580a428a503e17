"""The errors Trine raises for what a user can cause.

    TrineError                   exit status 1
    ├── UsageError               exit status 2: a value on the command line or in a recipe is wrong
    │   └── GrammarError         what a text must match cannot be used
    ├── CheckpointError          a folder is no checkpoint, is damaged, or is of an unknown family
    ├── DataError                text, shards or tokenizer files are missing, damaged or do not fit together
    ├── ContextLengthError       a sequence is longer than the model's context
    ├── QueueFullError           a request came while too many are waiting
    ├── LossSpikeError           a loss is far above those before it
    ├── StorageError             a folder cannot be written: no room, no permission, a failing disk
    ├── RankError                a process of a run on several has failed, is gone, or does not answer
    ├── OutOfMemoryError         training needs more memory than there is
    └── NonFiniteError           a loss or gradient is not a number

Every message names the value that was given and what to do about it, on one line.
"""

from __future__ import annotations

from typing import ClassVar


class TrineError(Exception):
    """Base of all errors a user can cause; `exit_status` is what the command line returns."""

    exit_status: ClassVar[int] = 1


class UsageError(TrineError):
    """A command line argument or recipe value is wrong: unknown key, wrong type, impossible size."""

    exit_status: ClassVar[int] = 2


class GrammarError(UsageError):
    """What a text must match is wrong, too large, or not for this tokenizer."""


class CheckpointError(TrineError):
    """A folder is no checkpoint, is incomplete or damaged, or holds a family that is not supported.

    Names and values of files are part of the message; what could steer a terminal or break the line is escaped.
    """

    def __init__(self, message: str) -> None:
        super().__init__("".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in message))


class DataError(TrineError):
    """Text, prepared shards or tokenizer files are missing, damaged, or do not belong together."""


class ContextLengthError(TrineError):
    """A sequence does not fit the model's context."""


class QueueFullError(TrineError):
    """Too many requests are waiting already; the same request can succeed later."""


class StorageError(TrineError):
    """Something cannot be written: the disk is full or failing, or the folder is not to be written by this user."""


class LossSpikeError(TrineError):
    """The loss of a training step is far above those before it."""


class RankError(TrineError):
    """One of the processes of a run has failed, is gone, or keeps the others waiting."""


class OutOfMemoryError(TrineError):
    """A training step, or the model itself, does not fit the memory of the device."""


class NonFiniteError(TrineError):
    """A loss or a gradient is not finite."""

"""What to say when memory runs out: how large the pieces of a step were, and what would make them smaller."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from trine.engine.errors import OutOfMemoryError
from trine.engine.log import format_bytes
from trine.engine.train.plan import estimate_memory
from trine.engine.train.recipe import TrainSettings
from trine.engine.train.resolve import Setup
from trine.kernels.hardware import memory_bytes


def found_in(error: BaseException) -> bool:
    """Whether an error says that memory ran out: of a GPU, of the process (numpy, Python) or of torch on the CPU."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error)


def in_a_step(error: BaseException, setup: Setup, *, step: int, kept: str = "") -> OutOfMemoryError:
    """The error for training that ran out of memory at `step`; `kept` says what is left of it and how to go on."""
    train, tokens = setup.recipe.train, setup.recipe.data.seq_len
    return OutOfMemoryError(
        f"step {step} ran out of memory on {setup.device} with train.micro_batch_size = {setup.micro_batch_size} "
        f"sequences of {tokens} tokens ({first_sentence(error)}); {_remedy(train, setup.micro_batch_size)}"
        f"{'; ' if kept else ''}{kept}"
    )


@contextmanager
def told_before_the_first_step(setup: Setup) -> Iterator[None]:
    """Within it the weights and the optimizer's state are made. Raises `OutOfMemoryError` where they have no room."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if found_in(error):
            raise _before_the_first_step(error, setup) from None
        raise


def _before_the_first_step(error: BaseException, setup: Setup) -> OutOfMemoryError:
    need = estimate_memory(setup)
    return OutOfMemoryError(
        f"no room on {setup.device} for the weights and the optimizer's state ({first_sentence(error)}); training "
        f"takes about {format_bytes(need.total)}, there is {format_bytes(memory_bytes(setup.device))}: make the model "
        'smaller or set optim.state_dtype = "int8"; --dry-run shows what is needed for what'
    )


def _remedy(train: TrainSettings, micro: int) -> str:
    """The same batch in smaller pieces, or what is left where a piece is one sequence."""
    smaller = next((size for size in range(micro // 2, 0, -1) if train.batch_size % size == 0), None)
    if smaller is not None:
        return f"set train.micro_batch_size={smaller}: the same batch in more pieces"
    if not train.checkpoint_activations:
        return "set train.checkpoint_activations=true: layers are computed again instead of kept"
    return 'a piece is one sequence already: shorten data.seq_len or set optim.state_dtype = "int8", in a new run'


def first_sentence(error: BaseException) -> str:
    """What the allocator said, without the advice that may follow."""
    text = " ".join(str(error).split()) or type(error).__name__
    text = text.partition("DefaultCPUAllocator: ")[2] or text
    return text.split(". ")[0].rstrip(".")[:200]

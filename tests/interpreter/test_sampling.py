"""Sampling in the interpreter: the same tokens as sorting gives, filters, ties, masks, penalties, odd rows."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from trine.kernels.sampling.op import add_bias, adjust, penalize, sample, sample_forward, sample_reference
from trine.kernels.tuning import Config, force

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
V = 150


def rows(dtype: torch.dtype = torch.float32, *, count: int = 12, size: int = V, spread: float = 3.0) -> dict[str, Any]:
    """Logits and, for every row, other parameters: greedy, plain, each filter alone, all together."""
    generator = torch.Generator().manual_seed(0)
    kinds = [
        (0.0, 5, 0.5, 0.1),
        (1.0, 0, 1.0, 0.0),
        (0.7, 10, 1.0, 0.0),
        (1.3, 0, 0.8, 0.0),
        (1.0, 0, 1.0, 0.05),
        (0.9, 20, 0.7, 0.02),
        (1.0, 1, 1.0, 0.0),
        (1.0, 0, 1e-6, 0.0),
        (1.0, 10**6, 0.999, 1.0),
    ]
    chosen = [kinds[row % len(kinds)] for row in range(count)]
    temperature, top_k, top_p, min_p = zip(*chosen, strict=True)
    return {
        "logits_RV": (torch.randn(count, size, generator=generator) * spread).to(dtype),
        "uniforms_R": torch.rand(count, generator=generator, dtype=torch.float64),
        "temperature_R": torch.tensor(temperature, dtype=torch.float32),
        "top_k_R": torch.tensor(top_k, dtype=torch.int32),
        "top_p_R": torch.tensor(top_p, dtype=torch.float32),
        "min_p_R": torch.tensor(min_p, dtype=torch.float32),
    }


def check(arguments: dict[str, Any]) -> Tensor:
    """The tokens, after comparing them with those that sorting in float64 gives."""
    tokens, log_probs = sample(**arguments)
    wide = arguments | {"logits_RV": arguments["logits_RV"].double()}
    expected, expected_log_probs = sample_reference(**wide)
    assert tokens.dtype == torch.int64
    assert tokens.tolist() == expected.tolist()
    torch.testing.assert_close(log_probs, expected_log_probs.float(), rtol=0, atol=2e-5, equal_nan=True)
    return tokens


@DTYPES
def test_the_same_tokens_as_by_sorting(dtype: torch.dtype) -> None:
    check(rows(dtype, count=18))


@pytest.mark.parametrize("size", [1, 2, 63, 64, 65, 200])
def test_vocabularies(size: int) -> None:
    check(rows(size=size, count=9))


def test_every_uniform_number_meets_its_token() -> None:
    """Uniform numbers all along [0, 1): the borders between tokens are where they must be."""
    arguments = rows(count=9, size=40, spread=1.0)
    many = {name: x[5:6].expand(25, *x.shape[1:]).contiguous() for name, x in arguments.items()}
    many["uniforms_R"] = torch.linspace(0, 1 - 1e-16, 25, dtype=torch.float64)
    tokens = check(many).tolist()
    assert len(set(tokens)) > 3
    assert tokens == sorted(tokens)


def test_ties_stay_together() -> None:
    logits = torch.zeros(4, 100)
    logits[:, 40:60] = 2.0
    arguments = rows(count=4, size=100) | {
        "logits_RV": logits,
        "temperature_R": torch.ones(4),
        "top_k_R": torch.tensor([5, 20, 21, 0], dtype=torch.int32),
        "top_p_R": torch.tensor([1.0, 1.0, 1.0, 0.1]),
        "min_p_R": torch.zeros(4),
        "uniforms_R": torch.full((4,), 0.999, dtype=torch.float64),
    }
    assert check(arguments).tolist() == [59, 59, 99, 59]
    arguments |= {"temperature_R": torch.zeros(4)}
    assert check(arguments).tolist() == [40] * 4


def pack(allowed: Tensor) -> Tensor:
    """Booleans [R, V] as words of 32 bits."""
    wide = torch.nn.functional.pad(allowed, (0, -allowed.shape[1] % 32)).view(len(allowed), -1, 32).long()
    words = (wide << torch.arange(32)).sum(dim=-1)
    return torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)


@DTYPES
def test_only_allowed_tokens(dtype: torch.dtype) -> None:
    allowed = torch.rand(18, V, generator=torch.Generator().manual_seed(5)) < 0.2
    tokens = check(rows(dtype, count=18) | {"allowed_RW": pack(allowed)})
    assert allowed[torch.arange(18), tokens].all()


def test_rows_that_are_not_numbers_give_no_token() -> None:
    arguments = rows(count=6)
    logits = arguments["logits_RV"]
    logits[1, 3] = float("nan")
    logits[2, 149] = float("inf")
    logits[3] = float("-inf")
    logits[4, 7:] = float("-inf")
    allowed = torch.ones(6, V, dtype=torch.bool)
    allowed[5] = False
    tokens = check(arguments | {"allowed_RW": pack(allowed)})
    assert (tokens >= 0).tolist() == [True, False, False, False, True, False]
    logits[0, 3] = float("nan")
    assert check(arguments)[0] == -1  # greedy too


def alike(logits: Tensor, *, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0) -> Any:
    """Rows with the same parameters, the uniform numbers spread over [0, 1)."""
    count = len(logits)
    return {
        "logits_RV": logits,
        "uniforms_R": (torch.arange(count, dtype=torch.float64) + 0.37) / count,
        "temperature_R": torch.full((count,), temperature),
        "top_k_R": torch.full((count,), top_k, dtype=torch.int32),
        "top_p_R": torch.full((count,), top_p),
        "min_p_R": torch.full((count,), min_p),
    }


def configured(block: int, capacity: int) -> Any:
    """Splits of `block` logits, at most `capacity` candidates."""
    return force({"sample": Config({"BLOCK": block}), "sample row": Config({"CAPACITY": capacity, "LOOP": 64})})


@DTYPES
def test_rows_with_more_candidates_than_fit(dtype: torch.dtype) -> None:
    """Flat rows: top-p near 1 keeps nearly everything, so the rows are searched whole."""
    flat = (torch.randn(4, V, generator=torch.Generator().manual_seed(3)) / 10).to(dtype)
    with configured(32, 16):
        check(alike(flat, top_p=0.999))
        check(alike(flat, top_k=100, top_p=0.9, min_p=0.8))


@pytest.mark.parametrize("top_k", [15, 16, 17])
def test_top_k_near_what_a_program_holds(top_k: int) -> None:
    logits = torch.randn(3, V, generator=torch.Generator().manual_seed(4)) * 3
    with configured(32, 16):
        check(alike(logits, top_k=top_k))
        check(alike(logits.round(), temperature=0.5, top_k=top_k))  # many ties


def test_many_splits_give_what_one_gives() -> None:
    """Every kind of row in one batch; the least likely tokens of some rows are forbidden, whole splits of others."""
    arguments = rows(count=9, size=100)
    allowed = arguments["logits_RV"] > -2.0
    allowed[::2, 16:64] = False
    arguments["allowed_RW"] = pack(allowed)
    found = []
    for block, capacity in ((8, 64), (128, 128)):
        with configured(block, capacity):
            found.append(check(arguments).tolist())
    assert found[0] == found[1]


def test_ties_across_splits_stay_together() -> None:
    logits = torch.zeros(5, 96)
    logits[:, 10::20] = 4.0  # 10, 30, 50, 70, 90: five splits of 16
    with configured(16, 32):
        assert check(alike(logits, top_k=2)).tolist() == [10, 30, 50, 70, 90]
        assert check(alike(logits, top_p=0.01)).tolist() == [10, 30, 50, 70, 90]
        assert check(alike(logits, min_p=0.5)).tolist() == [10, 30, 50, 70, 90]
        assert check(alike(logits, temperature=0.0)).tolist() == [10] * 5


@DTYPES
def test_penalties_and_biases(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(3, 50, generator=generator).to(dtype)
    tokens = torch.cat([torch.randperm(50, generator=generator)[:n] for n in (0, 37, 5)]).to(torch.int32)
    starts = torch.tensor([0, 0, 37, 42], dtype=torch.int32)
    counts = torch.randint(0, 4, (42,), generator=generator, dtype=torch.int32)
    parameters = {
        "repetition_R": torch.tensor([2.0, 1.3, 0.8]),
        "presence_R": torch.tensor([1.0, 0.5, -0.5]),
        "frequency_R": torch.tensor([1.0, 0.25, 0.0]),
    }
    expected = logits.double()
    for row in range(3):
        for entry in range(int(starts[row]), int(starts[row + 1])):
            x = expected[row, tokens[entry]]
            r, p, f = (float(parameters[name][row]) for name in ("repetition_R", "presence_R", "frequency_R"))
            x = (x * r if x < 0 else x / r) - p * (counts[entry] > 0) - f * counts[entry]
            expected[row, tokens[entry]] = x
    found = logits.clone()
    penalize(found, starts=starts, tokens_M=tokens, counts_M=counts, **parameters)
    bound = torch.finfo(dtype).eps * 8
    torch.testing.assert_close(found.double(), expected, rtol=bound, atol=bound)
    assert torch.equal(found[0], logits[0])

    apart = torch.zeros(3, 64, dtype=dtype)
    apart[:, :50] = logits
    penalize(apart[:, :50], starts=starts, tokens_M=tokens, counts_M=counts, **parameters)
    assert torch.equal(apart[:, :50], found)
    assert not apart[:, 50:].any()

    biases = torch.randn(42, generator=generator)
    biases[3] = float("-inf")
    before = found.clone()
    add_bias(found, starts=starts, tokens_M=tokens, biases_M=biases)
    row_of = torch.repeat_interleave(torch.arange(3), torch.tensor([0, 37, 5]))
    expected = before.double()
    expected[row_of, tokens.long()] += biases.double()
    torch.testing.assert_close(found.double(), expected, rtol=bound, atol=bound)


def test_strides_and_no_rows() -> None:
    arguments = rows()
    wide = torch.zeros(12, 2 * V)
    wide[:, ::2] = arguments["logits_RV"]
    assert torch.equal(sample(**arguments | {"logits_RV": wide[:, ::2]})[0], sample(**arguments)[0])
    part = torch.zeros(12, V + 9)
    part[:, 4 : 4 + V] = arguments["logits_RV"]
    assert torch.equal(sample(**arguments | {"logits_RV": part[:, 4 : 4 + V]})[0], sample(**arguments)[0])
    tokens, log_probs = sample(**{name: x[:0] for name, x in arguments.items()})
    assert tokens.shape == log_probs.shape == (0,)


def test_registration() -> None:
    arguments = tuple(rows(count=3).values())
    torch.library.opcheck(sample_forward, (*arguments, None))
    lists = [torch.tensor(x, dtype=torch.int32) for x in ([0, 1, 2, 2], [5, 6], [1, 2])]
    torch.library.opcheck(adjust, (arguments[0].clone(), *lists, None, *(torch.ones(3) for _ in range(3))))

    def function(logits: Tensor) -> Tensor:
        return sample_forward(logits * 2, *arguments[1:], None)[0] + 1

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(arguments[0]), function(arguments[0]))


def test_double_precision_is_refused() -> None:
    with pytest.raises(ValueError, match=r"torch.float64 is not supported by the kernel"):
        sample(**rows(torch.float64))

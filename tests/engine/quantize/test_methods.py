"""What can be said of methods by name."""

from __future__ import annotations

import pytest
import torch

from trine.engine.errors import UsageError
from trine.engine.model.quantized.scheme import SCHEMES
from trine.engine.quantize.methods import METHODS, check_pair, with_alpha
from trine.engine.quantize.smoothquant import smooth_scales
from trine.engine.quantize.statistics import InputStatistics


def test_a_given_strength_is_used() -> None:
    inputs = InputStatistics.of(torch.randn(20, 32, generator=torch.Generator().manual_seed(0)))
    weights = [torch.randn(4, 32, generator=torch.Generator().manual_seed(1))]
    for name in ("smoothquant", "smoothquant-gptq"):
        choice = with_alpha(name, 0.7)
        assert choice.rescaling is not None
        assert (choice.quantize, choice.calibrated) == (METHODS[name].quantize, True)
        found = choice.rescaling(weights, SCHEMES["w8a8"], inputs, lambda s_K: s_K)
        assert torch.equal(found, smooth_scales(weights, SCHEMES["w8a8"], inputs, lambda s_K: s_K, alpha=0.7))
    assert with_alpha("gptq", None) is METHODS["gptq"]


@pytest.mark.parametrize(("method", "alpha", "words"), [("awq", 0.5, "method awq"), ("smoothquant", 1.5, "is 1.5")])
def test_a_strength_that_does_not_fit_is_refused(method: str, alpha: float, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        with_alpha(method, alpha)


@pytest.mark.parametrize(
    ("method", "scheme"), [("awq", "w8a8"), ("awq-gptq", "fp8"), ("smoothquant", "w4a16"), ("hqq", "fp8-block")]
)
def test_pairs_that_do_not_fit_are_refused_by_name(method: str, scheme: str) -> None:
    with pytest.raises(UsageError, match=f"method {method} does not fit scheme {scheme}: "):
        check_pair(method, scheme, SCHEMES[scheme])


@pytest.mark.parametrize("method", list(METHODS))
def test_every_method_says_whether_it_needs_data(method: str) -> None:
    """Without statistics, those that need none quantize, and the others say so or are rescaled before."""
    choice, scheme = METHODS[method], SCHEMES["w8a8" if "smooth" in method else "w8a16"]
    w_NK = torch.randn(8, 32, generator=torch.Generator().manual_seed(0))
    if choice.calibrated and choice.rescaling is None:
        with pytest.raises(ValueError, match="needs the statistics"):
            choice.quantize(w_NK, scheme)
    elif not choice.calibrated:
        assert choice.quantize(w_NK, scheme).codes_NK.shape == (8, 32)

"""On a GPU, here a pretended one: steps of the engine wait for the device when they must, and no tensor is left behind.

One wait a step reads the tokens. What is computed is not looked at here: `tests/interpreter/test_engine.py` does.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from trine.engine.generate.engine import Engine, EngineConfig, GenerationRequest, PoolingRequest
from trine.engine.generate.grammar import Grammar
from trine.engine.generate.load import load_for_inference
from trine.engine.generate.sampling import SamplingParams
from trine.engine.model.checkpoint import save_model
from trine.engine.model.families.registry import FAMILIES, config_from_hf
from trine.engine.model.paged_cache import bytes_per_block
from trine.engine.model.quantized.scheme import make_scheme
from trine.engine.model.transformer import Transformer
from trine.engine.quantize.methods import METHODS
from trine.engine.quantize.run import Settings, quantize_checkpoint
from trine.engine.text.tokenizer import Tokenizer

Pretend = Callable[[], AbstractContextManager[Any]]
READ = "Event.synchronize"
GREEDY = SamplingParams(temperature=0, max_tokens=5, ignore_eos=True)
DRAWN = SamplingParams(seed=1, max_tokens=5, temperature=0.8, top_k=9, top_p=0.9, min_p=0.01, ignore_eos=True)
PROMPTS = ["def add(", "the cat sat on the mat\n" * 2, "x", "the cat sat on the mat\n" * 2 + "def"]


def make_folder(
    folder: Path, tokenizer: Tokenizer, family: str = "llama", dtype: torch.dtype = torch.float32, **sizes: Any
) -> Path:
    """A model of width 64 whose logits differ."""
    sizes = {
        "hidden_size": 64, "intermediate_size": 128, "moe_intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 128,
        "num_local_experts": 4, "num_experts": 4, "num_experts_per_tok": 2, "shared_expert_intermediate_size": 64,
        "bos_token_id": 0, "eos_token_id": 0, "vocab_size": tokenizer.vocab_size, **sizes,
    }  # fmt: skip
    torch.manual_seed(0)
    model = Transformer(config_from_hf({"model_type": FAMILIES[family].model_types[0], **sizes}))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, 0.1, 0.3)
    save_model(model, folder, dtype=dtype)
    tokenizer.save(folder)
    return folder


@pytest.fixture(scope="module")
def llama(tiny_tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("llama"), tiny_tokenizer)


def engine_on_gpu(folder: Path, dtype: str = "bfloat16", draft: Path | None = None, **settings: Any) -> Engine:
    model, tokenizer = load_for_inference(folder, device="cuda", dtype=dtype)
    drafts = None if draft is None else load_for_inference(draft, device="cuda", dtype=dtype)[0]
    kv_bytes = 40 * bytes_per_block(model.config, 16, settings.get("kv_dtype") or model.dtype)
    settings = {"max_batch_tokens": 64, "max_running": 4, "kv_bytes": kv_bytes, **settings}
    return Engine(model, tokenizer, EngineConfig(**settings), draft=drafts)


def steps(gpu: Any, engine: Engine, params: SamplingParams | None = GREEDY, **fields: Any) -> list[list[str]]:
    """The waits of every step, by what was waited for, until all is done."""
    for index, prompt in enumerate(PROMPTS if params is not None else ()):
        ids = tuple(engine.encode(prompt))
        engine.add(GenerationRequest(id=str(index), prompt_ids=ids, params=params or GREEDY, **fields))
    found = []
    while engine.has_work:
        gpu.waits.clear()
        assert all(output.error is None for output in engine.step())
        found.append([wait.partition(" at ")[0] for wait in gpu.waits])
    assert engine.stats().generated_tokens > 0 or params is None
    return found


def kinds(found: Iterable[list[str]]) -> set[tuple[str, ...]]:
    return {tuple(each) for each in found}


CASES: dict[str, tuple[SamplingParams, dict[str, Any]]] = {
    "greedy": (GREEDY, {}),
    "drawn": (DRAWN, {}),
    "float32": (DRAWN, {"dtype": "float32"}),
    "read at once": (DRAWN, {"overlap": False}),
    "operation by operation": (DRAWN, {"decode_steps": False}),
    "several choices": (dataclasses.replace(DRAWN, n=2), {}),
    "several choices in fp8": (dataclasses.replace(DRAWN, n=2), {"kv_dtype": torch.float8_e4m3fn}),
    "int8 cache": (GREEDY, {"kv_dtype": torch.int8}),
    "deterministic": (GREEDY, {"deterministic": True}),
    "chunks of 8": (GREEDY, {"max_batch_tokens": 8}),
    "penalties": (dataclasses.replace(DRAWN, repetition_penalty=1.2, presence_penalty=0.5, frequency_penalty=0.5), {}),
    "biases": (dataclasses.replace(DRAWN, logit_bias=((5, 2.0),), banned_ids=(7,), min_tokens=2), {}),
    "allowed": (dataclasses.replace(GREEDY, allowed_ids=tuple(range(40, 120))), {}),
}


# With every commit what takes another path each.
FIRST = ("drawn", "operation by operation", "several choices in fp8", "penalties", "chunks of 8")


def some(names: Iterable[str], first: Iterable[str]) -> list[Any]:
    return [pytest.param(name, marks=[] if name in first else [pytest.mark.slow]) for name in names]


@pytest.mark.parametrize("name", some(CASES, FIRST))
def test_a_step_waits_once_to_read_its_tokens(pretended_gpu: Pretend, llama: Path, name: str) -> None:
    params, settings = CASES[name]
    with pretended_gpu() as gpu:
        engine = engine_on_gpu(llama, **settings)
        engine.prepare()
        assert (engine.num_decode_steps > 0) == settings.get("decode_steps", True)
        gpu.forget()
        found = steps(gpu, engine, params)
        # A step that chooses nothing has nothing to wait for; what overlaps reads in the next step.
        assert kinds(found) <= {(READ,), ()}
        assert sum(map(len, found)) >= params.max_tokens
        assert bool(gpu.replays) == settings.get("decode_steps", True)


@pytest.mark.parametrize(
    ("family", "settings", "launches", "operations"),
    [
        ("llama", {}, ["write_kernel"], 0),
        ("qwen3", {"kv_dtype": torch.float8_e4m3fn}, ["write_kernel"], 0),
        ("olmo2", {"kv_dtype": torch.int8}, ["_rows_kernel"] * 2 + ["write_kernel"], 0),
        ("llama", {"deterministic": True}, ["_rotate_kernel"] * 2, 2),
    ],
    ids=["llama", "heads normed", "whole rows normed", "deterministic"],
)
def test_heads_come_into_the_cache_in_one_launch(
    pretended_gpu: Pretend,
    tiny_tokenizer: Tokenizer,
    tmp_path: Path,
    family: str,
    settings: dict[str, Any],
    launches: list[str],
    operations: int,
) -> None:
    """What a layer starts between its products and attention in a captured step; `operations`: of torch, to write."""
    folder = make_folder(tmp_path, tiny_tokenizer, family)
    with pretended_gpu() as gpu, mock.patch.object(gpu, "compute", wraps=gpu.compute) as compute:
        engine = engine_on_gpu(folder, **settings)
        gpu.forget()
        compute.reset_mock()
        engine.prepare()
        names = [one.kernel.__name__ for one in gpu.launches]
        last = len(names) - 1 - names[::-1].index("attend_kernel")
        assert names[last - len(launches) : last] == launches
        written = [call for call in compute.call_args_list if "index_copy" in str(call.args[0])]
        layers = names.count("attend_kernel")
        assert len(written) == operations * layers
        assert (names.count("write_kernel") == layers) == (operations == 0)


def test_log_probabilities_cost_a_wait_more(pretended_gpu: Pretend, llama: Path) -> None:
    with pretended_gpu() as gpu:
        engine = engine_on_gpu(llama)
        engine.prepare()
        assert kinds(steps(gpu, engine, dataclasses.replace(GREEDY, logprobs=3))) == {(READ, "tolist")}
        first, *rest = steps(gpu, engine, dataclasses.replace(GREEDY, prompt_logprobs=2, max_tokens=3))
        assert first.count("tolist") <= len(PROMPTS)
        assert kinds(rest) <= {("tolist", READ), (READ,)}


def test_grammars_cost_no_wait(pretended_gpu: Pretend, llama: Path) -> None:
    with pretended_gpu() as gpu:
        engine = engine_on_gpu(llama)
        engine.prepare()
        for index, pattern in enumerate(("[a-z ]{5,9}", "[0-9]+")):
            request = GenerationRequest(
                id=str(index), prompt_ids=(5, 6), params=GREEDY, grammar=Grammar("regex", pattern)
            )
            engine.add(request)
        gpu.waits.clear()
        engine.step()  # nothing computes: the token that is read is not in the grammar
        assert [wait.partition(" at ")[0] for wait in gpu.waits] == [READ]


def test_guesses_cost_a_wait_for_each_token_of_a_guess(
    pretended_gpu: Pretend, llama: Path, tiny_tokenizer: Tokenizer, tmp_path: Path
) -> None:
    draft = make_folder(tmp_path, tiny_tokenizer, num_hidden_layers=1)
    with pretended_gpu() as gpu:
        engine = engine_on_gpu(llama, draft=draft, speculate=3, speculate_max_running=8)
        engine.prepare()
        assert all(each.count("tolist") <= 3 and each.count(READ) <= 4 for each in steps(gpu, engine))
        engine = engine_on_gpu(llama, speculate=3, speculate_max_running=8)  # looked up in the text
        engine.prepare()
        assert all(set(each) <= {READ} and len(each) <= 4 for each in steps(gpu, engine))


QUANTIZED: dict[str, tuple[str, dict[str, Any], set[str]]] = {
    "w4a16": ("llama", {"group_size": "32"}, {"weight_only_kernel"}),
    "w4a16 asymmetric": ("llama", {"group_size": "32", "symmetric": False}, {"weight_only_kernel"}),
    "w8a16": ("llama", {}, {"weight_only_kernel"}),
    "w8a8": ("llama", {}, {"quantize_rows_kernel", "scaled_matmul_kernel"}),
    "fp8": ("llama", {}, {"quantize_rows_kernel", "scaled_matmul_kernel"}),
    "fp8-block": ("llama", {}, {"quantize_rows_kernel", "scaled_matmul_kernel"}),
    "w4a16 experts": ("mixtral", {"group_size": "32"}, {"weight_only_kernel", "grouped_weight_only_kernel"}),
    "fp8 experts": ("qwen2_moe", {}, {"scaled_matmul_kernel", "grouped_weight_only_kernel"}),
}


@pytest.mark.parametrize("name", some(QUANTIZED, ("w4a16", "fp8-block", "w4a16 experts")))
def test_quantized_models_run_on_their_kernels(
    pretended_gpu: Pretend, tiny_tokenizer: Tokenizer, tmp_path: Path, name: str
) -> None:
    (family, details, kernels), scheme = QUANTIZED[name], name.partition(" ")[0]
    folder = make_folder(tmp_path / "model", tiny_tokenizer, family, torch.bfloat16)
    settings = Settings(
        scheme_name=scheme, scheme=make_scheme(scheme, **details), method_name="rtn", method=METHODS["rtn"],
        embeddings=True, head=True,
    )  # fmt: skip
    quantize_checkpoint(folder, tmp_path / "codes", settings)
    with pretended_gpu() as gpu:
        engine = engine_on_gpu(tmp_path / "codes")
        engine.prepare()
        gpu.forget()
        assert kinds(steps(gpu, engine, DRAWN)) <= {(READ,), ()}
        assert gpu.replays
        assert set(gpu.kernels) >= kernels | {"attend_kernel", "choose_kernel"}


@pytest.mark.parametrize("kind", ["sentence", "bare", "cross", "tagger"])
def test_vectors_of_texts_are_read_at_once(
    pretended_gpu: Pretend, encoder_folder: Callable[[str], Path], kind: str
) -> None:
    folder = encoder_folder(kind)
    with pretended_gpu() as gpu:
        model, tokenizer = load_for_inference(folder, device="cuda")
        engine = Engine(model, tokenizer, EngineConfig(max_batch_tokens=40, max_running=4))
        engine.add(PoolingRequest(id="a", inputs=((5, 6, 7), (9,), (8, 1, 2, 3))))
        assert steps(gpu, engine, None) == [["copy to the CPU"]]


@pytest.mark.parametrize("family", ["t5", "marian"])
def test_sources_are_encoded_without_waiting(
    pretended_gpu: Pretend, seq2seq_folder: Callable[[str], Path], family: str
) -> None:
    folder = seq2seq_folder(family)
    with pretended_gpu() as gpu:
        model, tokenizer = load_for_inference(folder, device="cuda")
        engine = Engine(model, tokenizer, EngineConfig(max_running=4))
        assert kinds(steps(gpu, engine, dataclasses.replace(GREEDY, max_tokens=4))) <= {(READ,), ()}

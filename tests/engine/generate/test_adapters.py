"""Requests with adapters, mixed in one batch, get what a model with the merged weights gives alone."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from trine.engine.errors import DataError, UsageError
from trine.engine.generate.batch_file import run_file
from trine.engine.generate.engine import Engine, EngineConfig, GenerationRequest
from trine.engine.generate.plain import generate
from trine.engine.generate.sampling import SamplingParams
from trine.engine.model.families import TensorRule
from trine.engine.model.families.registry import DECODERS, FAMILIES, config_from_hf
from trine.engine.model.transformer import Transformer
from trine.engine.text.tokenizer import Tokenizer

CONTEXT = 96
PREFIX = "the cat sat on the mat\n" * 6
PROMPTS = ["def add(", PREFIX, "x", PREFIX + "def", "return first + second", PREFIX + "the"]
GREEDY = SamplingParams(temperature=0, max_tokens=16, ignore_eos=True)
SIZES: dict[str, Any] = {
    "hidden_size": 32, "n_embd": 32, "num_hidden_layers": 2, "n_layer": 2, "num_attention_heads": 4, "n_head": 4,
    "num_key_value_heads": 2, "head_dim": 16, "intermediate_size": 48, "n_inner": 48, "bos_token_id": 0,
    "eos_token_id": 0, "max_position_embeddings": CONTEXT, "n_positions": CONTEXT, "ffn_dim": 48, "sliding_window": 24,
    "use_sliding_window": True, "max_window_layers": 1, "query_pre_attn_scalar": 1,
    "num_local_experts": 4, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24,
    "shared_expert_intermediate_size": 40,
}  # fmt: skip
# By name: rank, alpha, rank-stabilised, and the part of the model's linear layers that it changes.
ADAPTERS: dict[str, tuple[int, int, bool, Callable[[str], bool]]] = {
    "all": (4, 8, False, lambda path: True),
    "attention": (8, 4, True, lambda path: "attn" in path),
    "mlp": (2, 3, False, lambda path: "mlp" in path),
}


def make_model(family: str, vocab_size: int) -> Transformer:
    """A tiny model, every parameter far from its initial value."""
    model = Transformer(
        config_from_hf({"model_type": FAMILIES[family].model_types[0], "vocab_size": vocab_size, **SIZES})
    )
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(0.0, 0.1 if parameter.dim() == 1 else 0.4, generator=generator)
            if name.endswith("norm.weight") and model.config.norm != "rms_offset":
                parameter.add_(1.0)
        model.embed_tokens.weight.div_(model.config.embedding_scale)
    return model.eval()


def write_adapter(folder: Path, model: Transformer, name: str) -> tuple[Path, Transformer]:
    """An adapter with random numbers, and a copy of the model with it merged in float64."""
    rank, alpha, stable, wants = ADAPTERS[name]
    scale = alpha / (rank**0.5 if stable else rank)
    generator = torch.Generator().manual_seed(len(name))
    merged = Transformer(model.config)
    merged.load_state_dict(model.state_dict())
    weights, tensors, targets = dict(merged.named_parameters()), {}, set()
    fit = [rule for rule in FAMILIES[model.config.family].rules(model.config) if _is_adapted(rule, weights)]
    # Where all of a layer's feed-forward part is experts, there is none to adapt.
    for rule in [rule for rule in fit if wants(rule.ours[0])] or fit:
        ours = [weights[each] for each in rule.ours]
        path = rule.stored.removesuffix(".weight")
        targets.add(path.rpartition(".")[2])
        a = torch.randn(rank, ours[0].shape[1], generator=generator) * 0.3
        b = torch.randn(sum(len(w) for w in ours), rank, generator=generator) * 0.3
        tensors[f"base_model.model.{path}.lora_A.weight"] = a
        tensors[f"base_model.model.{path}.lora_B.weight"] = b
        change = scale * (b.double() @ a.double())
        with torch.no_grad():
            for weight, part in zip(ours, rule.split(change, [len(w) for w in ours]), strict=True):
                weight.copy_(weight.double() + part)
    folder.mkdir(parents=True)
    save_file(tensors, folder / "adapter_model.safetensors")
    settings = {"r": rank, "lora_alpha": alpha, "use_rslora": stable, "target_modules": sorted(targets)}
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "task_type": "CAUSAL_LM", **settings}))
    return folder, merged.eval()


def _is_adapted(rule: TensorRule, weights: Mapping[str, torch.Tensor]) -> bool:
    """A linear layer of a block, neither a router nor experts'."""
    name = rule.ours[0]
    other = name.endswith((".mlp.gate.weight", "shared_expert_gate.weight", ".bias")) or ".experts." in name
    return name.startswith("layers.") and weights[name].dim() == 2 and not other


class Case:
    """A model, its adapters' folders, and by name (None: without) the model that has it merged."""

    def __init__(self, folder: Path, family: str, tokenizer: Tokenizer) -> None:
        self.model, self.tokenizer = make_model(family, tokenizer.vocab_size), tokenizer
        made = {name: write_adapter(folder / name, self.model, name) for name in ADAPTERS}
        self.folders = {name: each for name, (each, _) in made.items()}
        self.models: dict[str | None, Transformer] = {None: self.model, **{n: m for n, (_, m) in made.items()}}

    def engine(self, *names: str, **settings: Any) -> Engine:
        engine = Engine(
            self.model, self.tokenizer, EngineConfig(**{"max_batch_tokens": 64, "max_running": 8, **settings})
        )
        for name in names:
            engine.load_adapter(name, self.folders[name])
        return engine

    def expected(self, prompt: str, adapter: str | None, params: SamplingParams = GREEDY) -> tuple[int, ...]:
        """Greedy tokens of the merged model, alone."""
        [completion] = generate(self.models[adapter], self.tokenizer, [prompt], params)
        return tuple(completion.token_ids)

    def request(self, prompt: str, adapter: str | None, **fields: Any) -> GenerationRequest:
        fields = {"id": f"{adapter}: {prompt}", "params": GREEDY, **fields}
        return GenerationRequest(prompt_ids=tuple(self.tokenizer.encode(prompt)), adapter=adapter, **fields)


def run(engine: Engine, requests: Sequence[GenerationRequest]) -> dict[str, tuple[int, ...]]:
    """All at once; ids of the first choice of each."""
    for request in requests:
        engine.add(request)
    found: dict[str, tuple[int, ...]] = {}
    while engine.has_work:
        for output in engine.step():
            assert output.error is None
            if output.choice == 0:
                found[output.request_id] = found.get(output.request_id, ()) + output.token_ids
    assert engine.stats().kv_blocks_used == 0
    return found


# With every commit: transposed weights, plain and joined ones, experts beside what is adapted.
FIRST = {"gpt2", "llama", "phi3", "qwen2_moe"}


@pytest.fixture(
    scope="module",
    params=[pytest.param(name, marks=[] if name in FIRST else [pytest.mark.slow]) for name in sorted(DECODERS)],
)
def case(request: pytest.FixtureRequest, tiny_tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Case:
    """Each family in turn."""
    return Case(tmp_path_factory.mktemp(request.param), request.param, tiny_tokenizer)


@pytest.fixture(scope="module")
def llama(tiny_tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Case:
    return Case(tmp_path_factory.mktemp("llama"), "llama", tiny_tokenizer)


@pytest.mark.parametrize("decode_steps", [False, True])
def test_mixed_in_one_batch_each_request_gets_its_merged_model(case: Case, decode_steps: bool) -> None:
    engine = case.engine(*ADAPTERS, decode_steps=decode_steps)
    adapters = [None, *ADAPTERS]
    requests = [case.request(prompt, adapters[i % 4]) for i, prompt in enumerate(PROMPTS * 2)]
    requests += [case.request("same", adapter) for adapter in adapters]
    expected = {r.id: case.expected(r.id.partition(": ")[2], r.adapter) for r in requests}
    assert len({expected[f"{adapter}: same"] for adapter in adapters}) == 4  # each changes the text
    unique = list({r.id: r for r in requests}.values())
    assert run(engine, unique) == expected
    assert run(engine, unique) == expected  # with what the cache holds now


def test_guesses_and_chunks_and_preemption_change_nothing(llama: Case) -> None:
    from trine.engine.model.paged_cache import bytes_per_block

    kv_bytes = 12 * bytes_per_block(llama.model.config, 16, torch.float32)
    engine = llama.engine("all", "mlp", max_batch_tokens=24, speculate=3, kv_bytes=kv_bytes)
    long = replace(GREEDY, max_tokens=40)
    requests = [llama.request(f"{i} the mat", (None, "all", "mlp")[i % 3], params=long) for i in range(6)]
    found = run(engine, requests)
    assert engine.stats().preemptions > 0
    assert found == {r.id: llama.expected(r.id.partition(": ")[2], r.adapter, long) for r in requests}


def test_every_choice_of_a_request_has_its_adapter(llama: Case) -> None:
    engine = llama.engine("all")
    params = replace(GREEDY, n=3, temperature=1.0, seed=7)
    engine.add(llama.request("the cat", "all", params=params))
    found: dict[int, tuple[int, ...]] = {}
    while engine.has_work:
        for output in engine.step():
            found[output.choice] = found.get(output.choice, ()) + output.token_ids
    expected = generate(llama.models["all"], llama.tokenizer, ["the cat"], params)
    assert found == {number: tuple(each.token_ids) for number, each in enumerate(expected)}


def test_cached_blocks_belong_to_an_adapter_and_to_its_content(llama: Case, tmp_path: Path) -> None:
    engine = llama.engine("all", "mlp")

    def cached(adapter: str | None) -> int:
        engine.add(llama.request(PREFIX, adapter, id="one"))
        tokens = [output.cached_tokens for _ in range(100) if engine.has_work for output in engine.step()]
        return tokens[-1]

    assert [cached(None), cached("all"), cached("mlp")] == [0, 0, 0]
    known = [cached(None), cached("all"), cached("mlp")]
    assert min(known) >= 16
    # The same content under another name is the same; other content under the old name is not.
    engine.unload_adapter("all")
    engine.load_adapter("again", llama.folders["all"])
    assert cached("again") == known[1]
    engine.load_adapter("all", llama.folders["attention"])
    assert cached("all") == 0
    assert run(engine, [llama.request("x", "all")]) == {"all: x": llama.expected("x", "attention")}


def test_a_slot_is_used_again_and_the_others_stay(llama: Case) -> None:
    engine = llama.engine(*ADAPTERS)
    assert engine.adapters == tuple(ADAPTERS)
    engine.unload_adapter("all")
    requests = [llama.request("x", name) for name in (None, "attention", "mlp")]
    assert run(engine, requests) == {r.id: llama.expected("x", r.adapter) for r in requests}
    engine.load_adapter("all", llama.folders["all"])
    requests.append(llama.request("x", "all"))
    assert run(engine, requests) == {r.id: llama.expected("x", r.adapter) for r in requests}
    for name in ADAPTERS:
        engine.unload_adapter(name)
    assert engine.adapters == ()
    assert run(engine, requests[:1]) == {"None: x": llama.expected("x", None)}


def test_loaded_while_requests_run_and_refused_while_used(llama: Case) -> None:
    engine = llama.engine("mlp")
    for adapter in (None, "mlp"):
        engine.add(llama.request("x", adapter))
    found: dict[str, tuple[int, ...]] = {}

    def step() -> None:
        for output in engine.step():
            found[output.request_id] = found.get(output.request_id, ()) + output.token_ids

    for _ in range(3):
        step()
    engine.load_adapter("all", llama.folders["all"])
    engine.add(llama.request("x", "all"))
    with pytest.raises(UsageError, match="adapter 'mlp' is in use by 1 requests"):
        engine.unload_adapter("mlp")
    while engine.has_work:
        step()
    assert found == {f"{name}: x": llama.expected("x", name) for name in (None, "mlp", "all")}
    engine.add(llama.request("x", "mlp"))
    engine.abort("mlp: x")
    engine.unload_adapter("mlp")
    assert engine.adapters == ("all",)


def test_only_steps_without_adapters_take_compiled_loops(llama: Case) -> None:
    from trine.kernels.cpu.compiled import available

    if not available():
        pytest.skip("no compiled loops here")
    engine = llama.engine("all")
    decoder = engine._runner._decoder
    assert decoder is not None
    rows: list[int] = []
    compute = decoder.run

    def counted(*inputs: Any, **beside: Any) -> Any:
        rows.append(len(inputs[0]))
        return compute(*inputs, **beside)

    decoder.run = counted  # type: ignore[method-assign, assignment]
    run(engine, [llama.request("x", "all")])
    assert rows == []
    run(engine, [llama.request("x", None)])
    assert rows == [1] * GREEDY.max_tokens  # the prompt, of one token, too


def test_prompt_logprobs_are_the_merged_models(llama: Case) -> None:
    engine = llama.engine("all")
    engine.add(llama.request(PREFIX, "all", params=replace(GREEDY, max_tokens=1, prompt_logprobs=0)))
    outputs = [output for _ in range(100) if engine.has_work for output in engine.step()]
    found = outputs[0].prompt_logprobs
    assert found is not None
    ids = torch.tensor([llama.tokenizer.encode(PREFIX)])
    merged = llama.models["all"]
    with torch.no_grad():
        logprobs = merged.logits(merged(ids))[0].log_softmax(-1)
    expected = [float(logprobs[i, token]) for i, token in enumerate(ids[0, 1:].tolist())]
    assert [each.logprob for each in found if each is not None] == pytest.approx(expected, abs=1e-4)


def test_refusals_change_nothing(llama: Case) -> None:
    engine = llama.engine("all")
    for request, complaint in (
        (lambda: engine.add(llama.request("x", "nope")), "there is no adapter 'nope'; loaded: all"),
        (lambda: engine.load_adapter("all", llama.folders["mlp"]), "there is an adapter 'all' already"),
        (lambda: engine.load_adapter("", llama.folders["mlp"]), "needs a name"),
        (lambda: engine.unload_adapter("mlp"), "there is no adapter 'mlp'; loaded: all"),
    ):
        with pytest.raises(UsageError, match=complaint):
            request()
    assert engine.adapters == ("all",)
    assert not engine.has_work
    assert run(engine, [llama.request("x", "all")]) == {"all: x": llama.expected("x", "all")}


def test_the_deterministic_mode_takes_no_adapters(llama: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trine.engine.generate.assembly.check_deterministic", lambda *_: None)
    engine = Engine(llama.model, llama.tokenizer, EngineConfig(deterministic=True))
    with pytest.raises(UsageError, match="adapters are not computed in the deterministic mode"):
        engine.load_adapter("all", llama.folders["all"])


def test_another_base_by_name_is_warned_of(llama: Case, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, _ = write_adapter(tmp_path / "named", llama.model, "mlp")
    settings = json.loads((folder / "adapter_config.json").read_text())
    settings["base_model_name_or_path"] = "someone/Small-1B"
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    engine = llama.engine()
    for number, base in enumerate(("models/small-1b", "models--someone--Small-1B/snapshots/0123", "models/Other-1B")):
        engine.load_adapter(str(number), folder, base=base)
    warnings = [line for line in capsys.readouterr().err.splitlines() if "was trained on" in line]
    assert len(warnings) == 1
    assert "'someone/Small-1B', not on models/Other-1B" in warnings[0]


# --- files of prompts -------------------------------------------------------------------------------------------------


def test_lines_of_a_file_name_their_adapters(llama: Case, tmp_path: Path) -> None:
    wanted = [("x", "mlp"), ("def add(", None), ("x", "attention"), ("x", None)]
    prompts, out = tmp_path / "prompts.jsonl", tmp_path / "out.jsonl"
    lines = [{"prompt": prompt, **({} if adapter is None else {"adapter": adapter})} for prompt, adapter in wanted]
    prompts.write_text("".join(json.dumps(line) + "\n" for line in lines))
    folders = {"mlp": "there", "attention": "elsewhere"}
    run_file(llama.engine("mlp", "attention"), prompts, out, GREEDY, checkpoint="here", adapters=folders)
    found = [tuple(json.loads(line)["token_ids"]) for line in out.read_text().splitlines()]
    assert found == [llama.expected(prompt, adapter) for prompt, adapter in wanted]
    with pytest.raises(UsageError, match="not made from the same adapters"):
        run_file(llama.engine("mlp"), prompts, out, GREEDY, checkpoint="here", adapters={**folders, "mlp": "new"})


def test_a_single_adapter_is_that_of_lines_without_one(llama: Case, tmp_path: Path) -> None:
    prompts, out = tmp_path / "prompts.jsonl", tmp_path / "out.jsonl"
    prompts.write_text('{"prompt": "x"}\n{"prompt": "x", "adapter": null}\n')
    run_file(llama.engine("mlp"), prompts, out, GREEDY, checkpoint="here", adapters={"mlp": "there"})
    found = [tuple(json.loads(line)["token_ids"]) for line in out.read_text().splitlines()]
    assert found == [llama.expected("x", "mlp"), llama.expected("x", None)]


@pytest.mark.parametrize(
    ("line", "names", "message"),
    [
        ({"adapter": "other"}, ("mlp",), r"prompts.jsonl:1: there is no adapter 'other'; loaded: mlp \(--adapter"),
        ({"adapter": "mlp"}, (), r"there is no adapter 'mlp'; none is loaded"),
        ({"adapter": "mlp"}, ("mlp", "all"), r"no line of .*prompts.jsonl names the adapter 'all'"),
    ],
)
def test_adapters_of_a_file_and_of_the_engine_go_together(
    llama: Case, tmp_path: Path, line: dict[str, Any], names: tuple[str, ...], message: str
) -> None:
    prompts, out = tmp_path / "prompts.jsonl", tmp_path / "out.jsonl"
    prompts.write_text(json.dumps({"prompt": "x", **line}) + "\n")
    with pytest.raises((DataError, UsageError), match=message):
        run_file(llama.engine(), prompts, out, GREEDY, checkpoint="here", adapters=dict.fromkeys(names, "there"))
    assert not out.exists()

"""Vectors from the engine equal transformers' plain forward, whatever else a step computes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from trine.engine.errors import CheckpointError, ContextLengthError, QueueFullError, UsageError
from trine.engine.evaluate.perplexity import perplexity
from trine.engine.generate.engine import Engine, EngineConfig, GenerationRequest, PoolingRequest
from trine.engine.generate.load import load_for_inference
from trine.engine.generate.plain import generate
from trine.engine.generate.pooler import Pooler
from trine.engine.generate.pooling_info import describe
from trine.engine.generate.sampling import SamplingParams
from trine.engine.model.transformer import Transformer
from trine.engine.text.tokenizer import Tokenizer

# Sums of fp32 products in another order.
TOLERANCE = 2e-5
TEXTS = ["the cat sat", "a dog", "the cat sat on the mat and a dog sat on the cat", "x", "sat on a mat", "the the the"]
Folder = Callable[[str], Path]


def make_engine(folder: Path, **config: Any) -> tuple[Engine, Tokenizer, Transformer]:
    model, tokenizer = load_for_inference(folder)
    config = {"max_batch_tokens": 40, "max_running": 4, **config}
    return Engine(model, tokenizer, EngineConfig(**config)), tokenizer, model


def request(tokenizer: Tokenizer, texts: list[Any], name: str = "a", **fields: Any) -> PoolingRequest:
    encoded = tokenizer.encode_inputs(texts)
    types = tuple(tuple(each) for _, each in encoded)
    return PoolingRequest(id=name, inputs=tuple(tuple(ids) for ids, _ in encoded), token_types=types, **fields)


def run(engine: Engine) -> dict[tuple[str, int], Any]:
    found: dict[tuple[str, int], Any] = {}
    while engine.has_work:
        for output in engine.step():
            if output.finish_reason is not None:
                found[output.request_id, output.choice] = output
    return found


def largest_difference(one: Any, two: Any) -> float:
    return float(np.abs(np.asarray(one, np.float64) - np.asarray(two, np.float64)).max())


@pytest.mark.parametrize("packs", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("kind", ["bare", "cross", "classifier", "tagger"])
def test_vectors_are_those_of_each_text_alone_in_transformers(encoder_folder: Folder, kind: str, packs: bool) -> None:
    import transformers

    engine, tokenizer, _ = make_engine(encoder_folder(kind))
    assert engine._pooler is not None
    engine._pooler._packs = packs
    texts: list[Any] = TEXTS if kind in ("bare", "tagger") else [*TEXTS, *((text, "a mat") for text in TEXTS)]
    asked = request(tokenizer, texts)
    engine.add(asked)
    found = run(engine)
    names = {"bare": "BertModel", "tagger": "BertForTokenClassification"}
    name = names.get(kind, "BertForSequenceClassification")
    theirs = getattr(transformers, name).from_pretrained(encoder_folder(kind), dtype=torch.float32).eval()
    for number, ids in enumerate(asked.inputs):
        assert asked.token_types is not None
        types = torch.tensor([asked.token_types[number]])
        with torch.no_grad():
            answer = theirs(torch.tensor([ids]), token_type_ids=types)
        expected = answer.last_hidden_state.mean(dim=1) if kind == "bare" else answer.logits
        output = found["a", number]
        assert (output.prompt_tokens, output.completion_tokens, output.error) == (len(ids), 0, None)
        assert largest_difference(output.vector, expected[0]) < TOLERANCE
    assert len(found) == len(texts)


def test_a_decoder_that_says_how_to_pool_embeds_by_its_last_token(tmp_path: Path, tiny_checkpoint: Path) -> None:
    from dataclasses import replace

    from transformers import LlamaModel

    from trine.engine.model.checkpoint import load_model, save_model
    from trine.engine.model.head_config import EmbeddingConfig, HeadConfig

    decoder = load_model(tiny_checkpoint)
    embedding = EmbeddingConfig(pooling=("last",), normalize=True)
    config = replace(decoder.config, head=HeadConfig(task="features", embedding=embedding))
    model = Transformer(config)
    model.load_state_dict({name: decoder.get_parameter(name) for name, _ in model.named_parameters()})
    save_model(model, tmp_path)
    Tokenizer.load(tiny_checkpoint).save(tmp_path)
    engine, _, _ = make_engine(tmp_path)
    assert not engine.generates
    engine.add(PoolingRequest(id="a", inputs=((5, 6, 7), (9,), (8, 1, 2, 3))))
    found = run(engine)
    theirs = LlamaModel.from_pretrained(tmp_path, dtype=torch.float32).eval()
    for number, ids in enumerate(((5, 6, 7), (9,), (8, 1, 2, 3))):
        with torch.no_grad():
            expected = theirs(torch.tensor([ids])).last_hidden_state[0, -1]
        assert largest_difference(found["a", number].vector, expected / expected.norm()) < TOLERANCE


def test_completions_and_vectors_in_one_engine(encoder_folder: Folder, tiny_checkpoint: Path) -> None:
    model, tokenizer = load_for_inference(tiny_checkpoint)
    encoder, encoders_own = load_for_inference(encoder_folder("bare"))
    config = EngineConfig(max_batch_tokens=24, max_running=4)
    engine = Engine(model, tokenizer, config)
    # No folder gives both: lend the engine of a decoder the pooler of an encoder.
    engine._pooler = Pooler(encoder.eval(), encoders_own.vocab_size)
    params = SamplingParams(max_tokens=12, temperature=0.0, ignore_eos=True)
    prompts = [(5, 6, 7), tuple(range(1, 40))]
    for number, ids in enumerate(prompts):
        engine.add(GenerationRequest(id=f"g{number}", prompt_ids=ids, params=params))
    engine.add(request(encoders_own, TEXTS))
    tokens: dict[str, list[int]] = {}
    vectors = {}
    while engine.has_work:
        for output in engine.step():
            if output.vector is None:
                tokens.setdefault(output.request_id, []).extend(output.token_ids)
            else:
                vectors[output.choice] = output.vector
    for number, ids in enumerate(prompts):
        assert tokens[f"g{number}"] == list(generate(model, tokenizer, [list(ids)], params)[0].token_ids)
    alone = Pooler(encoder, encoders_own.vocab_size)
    with torch.inference_mode():
        for number, text in enumerate(TEXTS):
            (expected,) = alone.vectors([encoders_own.encode_inputs([text])[0][0]])
            assert largest_difference(vectors[number], expected) < TOLERANCE
    assert engine.stats().prompt_tokens == sum(map(len, prompts)) + sum(
        len(ids) for ids, _ in encoders_own.encode_inputs(TEXTS)
    )


def test_an_aborted_request_brings_nothing_more(encoder_folder: Folder) -> None:
    engine, tokenizer, _ = make_engine(encoder_folder("bare"), max_batch_tokens=8)
    engine.add(request(tokenizer, TEXTS, "a"))
    engine.add(request(tokenizer, ["a dog"], "b"))
    engine.step()
    engine.abort("a")
    engine.abort("never there")
    assert set(run(engine)) == {("b", 0)}
    engine.add(request(tokenizer, ["a dog"], "a"))
    assert set(run(engine)) == {("a", 0)}


def test_numbers_that_are_not_finite_fail_alone(encoder_folder: Folder) -> None:
    engine, tokenizer, model = make_engine(encoder_folder("bare"))
    dog = tokenizer.vocabulary["dog"]
    with torch.no_grad():
        model.embed_tokens.weight[dog] = torch.nan
    engine.add(request(tokenizer, TEXTS))
    found = run(engine)
    failed = {number for _, number in found if found["a", number].error}
    assert failed == {number for number, text in enumerate(TEXTS) if "dog" in text}
    assert all(found["a", number].vector is None for number in failed)


def test_what_cannot_be_is_refused_and_changes_nothing(encoder_folder: Folder, tiny_checkpoint: Path) -> None:
    engine, tokenizer, _ = make_engine(encoder_folder("bare"), max_waiting=1)
    for inputs, types, error, match in (
        ((), None, UsageError, "no input"),
        (((),), None, UsageError, "input 0 has no tokens"),
        (((5,), (5,) * 65), None, ContextLengthError, "input 1 has 65 tokens but the model takes 64"),
        (((5, 99999),), None, UsageError, "input 0 holds id 99999"),
        (((5, -1),), None, UsageError, "input 0 holds id -1"),
        (((5, 6),), ((0,),), UsageError, "token_types do not fit"),
        (((5, 6),), ((0, 2),), UsageError, "token_types hold 2, but the model has 2"),
    ):
        with pytest.raises(error, match=match):
            engine.add(PoolingRequest(id="a", inputs=inputs, token_types=types))
    assert not engine.has_work
    engine.add(request(tokenizer, TEXTS))
    with pytest.raises(UsageError, match="'a' is in use"):
        engine.add(request(tokenizer, TEXTS))
    with pytest.raises(QueueFullError):
        engine.add(request(tokenizer, TEXTS, "b"))
    with pytest.raises(UsageError, match="completes no text"):
        engine.add(GenerationRequest(id="g", prompt_ids=(5,), params=SamplingParams()))
    decoder, _, _ = make_engine(tiny_checkpoint)
    with pytest.raises(UsageError, match="gives no vectors"):
        decoder.add(PoolingRequest(id="a", inputs=((5,),)))


@pytest.mark.parametrize("option", [{"kv_bytes": 2**20}, {"deterministic": True}, {"speculate": 2}])
def test_what_belongs_to_generating_is_refused(encoder_folder: Folder, option: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=f"{next(iter(option))} is for models that generate"):
        make_engine(encoder_folder("bare"), **option)


def test_what_a_folder_says_of_its_vectors(encoder_folder: Folder, tmp_path: Path) -> None:
    import json
    import shutil

    def info(kind: str, **written: Any) -> Any:
        folder = encoder_folder(kind)
        if written:
            folder = tmp_path / f"{kind}-{len(list(tmp_path.iterdir()))}"
            shutil.copytree(encoder_folder(kind), folder)
            config = json.loads((folder / "config.json").read_text())
            (folder / "config.json").write_text(json.dumps({**config, **written}))
        return describe(load_for_inference(folder)[0], folder)

    sentence = info("sentence")
    assert (sentence.kind, sentence.dim, sentence.max_tokens, sentence.normalized) == ("embedding", 32, 48, True)
    assert (info("bare").max_tokens, info("bare").dimensions) == (64, ())
    assert info("bare", matryoshka_dimensions=[16, 8]).dimensions == (8, 16)
    assert info("bare", is_matryoshka=True).dimensions == (0,)
    classifier = info("classifier")
    assert (classifier.kind, classifier.labels, classifier.activation) == (
        "classification",
        ("no", "yes", "maybe"),
        "softmax",
    )
    assert info("classifier", problem_type="multi_label_classification").activation == "sigmoid"
    assert info("cross").score_activation == "sigmoid"
    identity = {"activation_fn": "torch.nn.modules.linear.Identity"}
    assert info("cross", sentence_transformers=identity).score_activation == "identity"
    assert info("cross", sbert_ce_default_activation_function=identity["activation_fn"]).score_activation == "identity"
    assert info("cross", problem_type="regression").activation == "identity"
    assert info("cross", problem_type=None).activation == "sigmoid"
    with pytest.raises(CheckpointError, match=r"scores by torch\.nn\.ReLU"):
        info("cross", sentence_transformers={"activation_fn": "torch.nn.ReLU"})
    assert info("tagger").kind == "tagging"
    # As sentence-transformers 6 writes a cross-encoder: steps of its own, the activation beside them.
    folder = tmp_path / "cross-encoder"
    shutil.copytree(encoder_folder("cross"), folder)
    step = {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.base.modules.transformer.Transformer"}
    (folder / "modules.json").write_text(json.dumps([step]))
    said = {"model_type": "CrossEncoder", **identity}
    (folder / "config_sentence_transformers.json").write_text(json.dumps(said))
    tokenizer = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**tokenizer, "model_max_length": 20}))
    cross = describe(load_for_inference(folder)[0], folder)
    assert cross is not None
    assert (cross.kind, cross.score_activation, cross.max_tokens) == ("classification", "identity", 20)


def test_an_encoder_neither_completes_nor_has_a_perplexity(encoder_folder: Folder) -> None:
    model, tokenizer = load_for_inference(encoder_folder("bare"))
    with pytest.raises(UsageError, match="gives vectors and completes no text"):
        generate(model, tokenizer, ["a dog"], SamplingParams())
    with pytest.raises(UsageError, match="predicts no next token"):
        perplexity(model, tokenizer, ["a dog"])

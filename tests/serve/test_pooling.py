"""Embeddings, classes, scores and rankings over HTTP, and the same without a server; equal to other libraries'."""

from __future__ import annotations

import asyncio
import base64
import json
import random
import re
import shlex
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import msgspec
import numpy as np
import openai
import pytest

from trine.engine.text.tokenizer import Tokenizer
from trine.serve.engine_process import load
from trine.serve.errors import ApiError
from trine.serve.logprobs import TokenNames
from trine.serve.messages import Pooling, Start
from trine.serve.pooling_answers import PoolingAnswer, shortened, similarity
from trine.serve.pooling_bodies import ClassifyBody, EmbeddingBody, RerankBody, ScoreBody
from trine.serve.pooling_jobs import check_dimensions, classify_job, embedding_job, rerank_job, score_job
from trine.serve.schemas import parse_body
from trine.serve.service import Loaded

TOLERANCE = 1e-5
TEXTS = ["the cat sat", "a dog", "the cat sat on the mat and a dog sat", "x"]
LONG = "the cat sat on the mat " * 20
KINDS: dict[str, tuple[Any, Any]] = {
    "embeddings": (EmbeddingBody, embedding_job),
    "classify": (ClassifyBody, classify_job),
    "score": (ScoreBody, score_job),
    "rerank": (RerankBody, rerank_job),
}
Folder = Callable[[str], Path]
Ask = Callable[..., dict[str, Any]]


@pytest.fixture(scope="module")
def ask(encoder_folder: Folder) -> Ask:
    """`ask("cross", "score", text_1=...)`: the answer of a route for a folder, all in this process.

    `changed`: what the folder says otherwise of its vectors.
    """
    engines: dict[str, Any] = {}

    def of(kind: str) -> Any:
        if kind not in engines:
            engine, ready = load(Start(checkpoint=str(encoder_folder(kind)), threads=1))
            tokenizer = Tokenizer.load(ready.folder)
            loaded = Loaded(
                tokenizer=tokenizer,
                names=TokenNames(tokenizer),
                template=None,
                context_len=ready.context_len,
                created=0,
                generates=ready.generates,
                pooling=ready.pooling,
            )
            engines[kind] = engine, loaded
        return engines[kind]

    def answer(kind: str, route: str, *, changed: dict[str, Any] | None = None, **fields: Any) -> dict[str, Any]:
        engine, loaded = of(kind)
        loaded = replace(loaded, pooling=msgspec.structs.replace(loaded.pooling, **changed or {}))
        body_type, make_job = KINDS[route]
        job = asyncio.run(make_job(parse_body(body_type, json.dumps(fields).encode()), loaded))
        for request in job.requests:
            engine.add(request)
        deltas = []
        while engine.has_work:
            deltas += engine.step()
        return json.loads(json.dumps(PoolingAnswer(job, kind).whole(deltas)))

    return answer


def refusal(ask: Ask, kind: str, route: str, **fields: Any) -> ApiError:
    with pytest.raises(ApiError) as raised:
        ask(kind, route, **fields)
    assert raised.value.status == 400
    return raised.value


def vectors(answer: dict[str, Any]) -> Any:
    return np.array([each["embedding"] for each in answer["data"]])


# --- the answers, without a server ------------------------------------------------------------------------------------


@pytest.mark.slow
def test_embeddings_are_those_of_sentence_transformers(ask: Ask, encoder_folder: Folder) -> None:
    from sentence_transformers import SentenceTransformer

    theirs = SentenceTransformer(str(encoder_folder("sentence")), device="cpu")
    answer = ask("sentence", "embeddings", input=TEXTS)
    assert np.abs(vectors(answer) - theirs.encode(TEXTS)).max() < TOLERANCE
    cut = ask("sentence", "embeddings", input=LONG, truncate_prompt_tokens=-1)
    assert np.abs(vectors(cut) - theirs.encode([LONG])).max() < TOLERANCE
    assert cut["usage"] == {"prompt_tokens": 48, "total_tokens": 48}
    named = ask("sentence", "embeddings", input=TEXTS, prompt_name="query")
    assert np.abs(vectors(named) - theirs.encode(TEXTS, prompt_name="query")).max() < TOLERANCE
    ranked = ask("sentence", "rerank", query="cat", documents=TEXTS)
    expected = theirs.similarity(theirs.encode_query(["cat"]), theirs.encode_document(TEXTS))[0]
    assert [each["index"] for each in ranked["results"]] == sorted(range(4), key=lambda index: -float(expected[index]))
    for each in ranked["results"]:
        assert each["relevance_score"] == pytest.approx(float(expected[each["index"]]), abs=TOLERANCE)


@pytest.mark.slow
def test_scores_of_pairs_are_those_of_sentence_transformers(ask: Ask, encoder_folder: Folder) -> None:
    from sentence_transformers import CrossEncoder

    theirs = CrossEncoder(str(encoder_folder("cross")), device="cpu")
    expected = theirs.predict([("a cat", text) for text in TEXTS])
    answer = ask("cross", "score", text_1="a cat", text_2=TEXTS)
    assert answer["object"] == "list"
    assert [(each["index"], each["object"]) for each in answer["data"]] == [(number, "score") for number in range(4)]
    assert [each["score"] for each in answer["data"]] == pytest.approx(expected.tolist(), abs=TOLERANCE)
    ranked = ask("cross", "rerank", query="a cat", documents=TEXTS, top_n=3)["results"]
    assert [each["index"] for each in ranked] == np.argsort(-expected, kind="stable")[:3].tolist()
    assert [each["document"]["text"] for each in ranked] == [TEXTS[each["index"]] for each in ranked]


def test_scores_and_rankings_are_read_from_one_class(ask: Ask, encoder_folder: Folder) -> None:
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    model = AutoModelForSequenceClassification.from_pretrained(encoder_folder("cross"), dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(encoder_folder("cross"))
    expected = []
    for text in TEXTS:
        with torch.no_grad():
            expected.append(float(model(**tokenizer("a cat", text, return_tensors="pt")).logits.sigmoid()))
    for firsts in ("a cat", ["a cat"] * 4):
        answer = ask("cross", "score", text_1=firsts, text_2=TEXTS)
        assert [(each["index"], each["object"]) for each in answer["data"]] == [(n, "score") for n in range(4)]
        assert [each["score"] for each in answer["data"]] == pytest.approx(expected, abs=TOLERANCE)
    documents = [TEXTS[0], *({"text": text} for text in TEXTS[1:])]
    ranked = ask("cross", "rerank", query="a cat", documents=documents, top_n=3)["results"]
    assert [each["index"] for each in ranked] == np.argsort(-np.array(expected), kind="stable")[:3].tolist()
    assert [each["document"]["text"] for each in ranked] == [TEXTS[each["index"]] for each in ranked]
    bare = ask("cross", "rerank", query="a cat", documents=documents, return_documents=False)["results"]
    assert [set(each) for each in bare] == [{"index", "relevance_score"}] * 4


def test_classes_are_those_of_transformers(ask: Ask, encoder_folder: Folder) -> None:
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    model = AutoModelForSequenceClassification.from_pretrained(encoder_folder("classifier"), dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(encoder_folder("classifier"))
    answer = ask("classifier", "classify", input=TEXTS)
    pairs = ask("classifier", "classify", input=TEXTS, text_pair=TEXTS[::-1])
    raw = ask("classifier", "classify", input=TEXTS, use_activation=False)
    assert answer["labels"] == ["no", "yes", "maybe"]
    for number, text in enumerate(TEXTS):
        for found, second in ((answer, None), (pairs, TEXTS[::-1][number])):
            with torch.no_grad():
                logits = model.eval()(**tokenizer(text, second, return_tensors="pt")).logits[0]
            probs = logits.double().softmax(-1)
            each = found["data"][number]
            assert each["probs"] == pytest.approx(probs.tolist(), abs=TOLERANCE)
            assert (each["label"], each["num_classes"]) == (["no", "yes", "maybe"][int(probs.argmax())], 3)
            if second is None:
                assert raw["data"][number]["probs"] == pytest.approx(logits.tolist(), abs=TOLERANCE)


def test_texts_and_their_ids_mean_the_same(ask: Ask, tiny_wordpiece: Tokenizer) -> None:
    ids = [ids for ids, _ in tiny_wordpiece.encode_inputs(TEXTS)]
    texts = vectors(ask("sentence", "embeddings", input=TEXTS))
    assert np.abs(vectors(ask("sentence", "embeddings", input=ids)) - texts).max() < TOLERANCE
    assert np.abs(vectors(ask("sentence", "embeddings", input=ids[2])) - texts[2]).max() < TOLERANCE
    assert np.abs(vectors(ask("sentence", "embeddings", input=TEXTS[2])) - texts[2]).max() < TOLERANCE


def test_scores_between_embeddings_are_cosines(ask: Ask) -> None:
    one, two = vectors(ask("bare", "embeddings", input=TEXTS[:2]))
    expected = float(one @ two / np.linalg.norm(one) / np.linalg.norm(two))
    (each,) = ask("bare", "score", text_1=TEXTS[0], text_2=TEXTS[1])["data"]
    assert each["score"] == pytest.approx(expected, abs=TOLERANCE)
    pairs = ask("bare", "score", text_1=TEXTS, text_2=TEXTS)
    assert [each["score"] for each in pairs["data"]] == pytest.approx([1.0] * 4)
    # Each text is computed once, however many pairs it is in.
    assert pairs["usage"]["prompt_tokens"] == ask("bare", "embeddings", input=TEXTS)["usage"]["prompt_tokens"]


def test_similarities() -> None:
    one, two = np.array([3.0, 4.0]), np.array([0.0, 2.0])
    found = {kind: similarity(one, two, kind) for kind in ("cosine", "dot", "euclidean", "manhattan")}
    assert found == pytest.approx({"cosine": 0.8, "dot": 8.0, "euclidean": -(13**0.5), "manhattan": -5.0})
    assert similarity(one, np.zeros(2), "cosine") == 0.0


def test_shortened_embeddings_have_length_1() -> None:
    rows = np.array([[3.0, 4.0, 12.0], [0.0, 0.0, 1.0]], np.float32)
    assert np.allclose(shortened(rows, 2), [[0.6, 0.8], [0.0, 0.0]])
    assert shortened(rows, None) is rows
    any_size, listed = (Pooling(kind="embedding", dim=32, max_tokens=9, dimensions=each) for each in ((0,), (8, 16)))
    check_dimensions(7, any_size)
    check_dimensions(16, listed)
    check_dimensions(32, listed)
    for dimensions, pooling, match in ((33, any_size, "1 to 32"), (7, listed, "8, 16")):
        with pytest.raises(ApiError, match=match):
            check_dimensions(dimensions, pooling)


def test_what_a_folder_says_reaches_the_answer(ask: Ask) -> None:
    whole = vectors(ask("sentence", "embeddings", input=TEXTS))
    short = ask("sentence", "embeddings", input=TEXTS, dimensions=8, changed={"dimensions": (0,)})
    expected = whole[:, :8] / np.linalg.norm(whole[:, :8], axis=1, keepdims=True)
    assert np.abs(vectors(short) - expected).max() < TOLERANCE
    prompted = ask("sentence", "embeddings", input="cat", changed={"default_prompt": "query"})
    assert np.abs(vectors(prompted) - vectors(ask("sentence", "embeddings", input="the cat"))).max() < TOLERANCE
    dot = ask("bare", "score", text_1="a dog", text_2=["a cat", "x"], changed={"similarity": "dot"})
    one, *others = vectors(ask("bare", "embeddings", input=["a dog", "a cat", "x"]))
    assert [each["score"] for each in dot["data"]] == pytest.approx([float(one @ two) for two in others], rel=1e-5)
    raw = ask("cross", "score", text_1="a", text_2="b", changed={"score_activation": "identity"})["data"][0]["score"]
    squashed = ask("cross", "score", text_1="a", text_2="b")["data"][0]["score"]
    assert squashed == pytest.approx(1 / (1 + np.exp(-raw)))
    several = ask("classifier", "classify", input=TEXTS, changed={"activation": "sigmoid"})["data"]
    logits = ask("classifier", "classify", input=TEXTS, use_activation=False)["data"]
    for found, each in zip(several, logits, strict=True):
        assert found["probs"] == pytest.approx((1 / (1 + np.exp(-np.array(each["probs"])))).tolist())


@pytest.mark.parametrize(
    ("kind", "route", "fields", "param", "match"),
    [
        ("sentence", "embeddings", {}, "input", "input is required"),
        ("sentence", "embeddings", {"input": []}, "input", "must be a string, a list of strings"),
        ("sentence", "embeddings", {"input": [[]]}, "input", "must be a string, a list of strings"),
        ("sentence", "embeddings", {"input": ["a", 1]}, "input", "must be a string, a list of strings"),
        ("sentence", "embeddings", {"input": [True]}, "input", "must be a string, a list of strings"),
        ("sentence", "embeddings", {"input": [5, 999]}, "input", "token id 999; the vocabulary ends at"),
        ("sentence", "embeddings", {"input": [-1]}, "input", "token id -1"),
        ("sentence", "embeddings", {"input": "a", "dimensions": 8}, "dimensions", "does not say that they can be"),
        ("sentence", "embeddings", {"input": "a", "dimensions": 0}, "dimensions", "greater than or equal to 1"),
        ("sentence", "embeddings", {"input": "a", "encoding_format": "hex"}, "encoding_format", "'float' or 'base64'"),
        ("sentence", "embeddings", {"input": "a", "prompt_name": "x"}, "prompt_name", "has query, document"),
        (
            "sentence",
            "embeddings",
            {"input": [5], "prompt_name": "query"},
            "prompt_name",
            "token ids are taken as they are",
        ),
        ("sentence", "embeddings", {"input": "a", "inputs": "b"}, "inputs", "did you mean input?"),
        ("sentence", "embeddings", {"input": ["a", LONG]}, "input", "input 1 has 122 tokens but the model takes 48"),
        ("sentence", "embeddings", {"input": LONG, "truncate_prompt_tokens": 49}, "truncate_prompt_tokens", "takes 48"),
        (
            "sentence",
            "embeddings",
            {"input": LONG, "truncate_prompt_tokens": 0},
            "truncate_prompt_tokens",
            "keeps nothing",
        ),
        ("sentence", "embeddings", {"input": LONG, "truncate_prompt_tokens": 2}, "truncate_prompt_tokens", "no room"),
        ("sentence", "embeddings", {"input": "", "add_special_tokens": False}, "input", "input 0 has no tokens"),
        ("sentence", "classify", {"input": "a"}, None, "gives no classes; use /v1/embeddings"),
        ("classifier", "embeddings", {"input": "a"}, None, "gives no embeddings; use /v1/classify"),
        (
            "classifier",
            "score",
            {"text_1": "a", "text_2": "b"},
            None,
            "one class, and this one has 3; use /v1/classify",
        ),
        ("classifier", "classify", {"input": ["a", "b"], "text_pair": "c"}, "text_pair", "1 texts for 2 of input"),
        ("classifier", "classify", {"input": [5], "text_pair": "c"}, "text_pair", "not with token ids"),
        ("cross", "score", {"text_1": ["a", "b"], "text_2": ["c", "d", "e"]}, "text_1", "2 texts and text_2 3"),
        ("cross", "score", {"text_1": [], "text_2": "b"}, "text_1", "at least one string"),
        ("cross", "score", {"text_1": "a", "text_2": LONG}, "input", "input 0 has 124 tokens"),
        ("cross", "rerank", {"query": "a", "documents": []}, "documents", "at least one text"),
        ("cross", "rerank", {"query": "a", "documents": [{"title": "b"}]}, "documents", "each document must be"),
        ("cross", "rerank", {"query": "a", "documents": ["b"], "top_n": 0}, "top_n", "greater than or equal to 1"),
        ("tagger", "classify", {"input": "a"}, None, "tags tokens and gives no classes; use `trine classify`"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_what_is_wrong_is_said(
    ask: Ask, kind: str, route: str, fields: dict[str, Any], param: str | None, match: str
) -> None:
    error = refusal(ask, kind, route, **fields)
    assert match in error.message
    assert error.param == param


@pytest.mark.slow
def test_long_pairs_lose_the_end_of_the_longer_text(ask: Ask, encoder_folder: Folder) -> None:
    from sentence_transformers import CrossEncoder

    theirs = CrossEncoder(str(encoder_folder("cross")), device="cpu", max_length=64)
    (each,) = ask("cross", "score", text_1="a dog sat", text_2=LONG, truncate_prompt_tokens=-1)["data"]
    assert each["score"] == pytest.approx(float(theirs.predict([("a dog sat", LONG)])[0]), abs=TOLERANCE)


# --- a server ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sentences(server_class: Any, encoder_folder: Folder) -> Iterator[Any]:
    """`trine serve` on the sentence encoder."""
    command = [sys.executable, "-m", "trine.cli", "serve", str(encoder_folder("sentence")), "--port", "0"]
    running = server_class([*command, "--served-model-name", "tiny", "--max-texts", "300", "--log-requests"])
    try:
        running.wait_until("serving")
        yield running
        assert running.end() == 0, "\n".join(running.said)
    finally:
        running.kill()


def test_the_openai_client_gets_the_same_numbers_in_both_encodings(sentences: Any, ask: Ask) -> None:
    expected = vectors(ask("sentence", "embeddings", input=TEXTS))
    with openai.OpenAI(base_url=sentences.url, api_key="any", max_retries=0) as client:
        default = client.embeddings.create(model="tiny", input=TEXTS)  # base64 on the wire
        floats = client.embeddings.create(model="tiny", input=TEXTS, encoding_format="float")
        single = client.embeddings.create(model="tiny", input=[2, 5, 3])
    for answer in (default, floats):
        assert [each.index for each in answer.data] == [0, 1, 2, 3]
        found = np.array([each.embedding for each in answer.data])
        assert np.abs(found - expected).max() < TOLERANCE
    assert default.data[0].embedding == floats.data[0].embedding
    assert (default.object, default.model, default.data[0].object) == ("list", "tiny", "embedding")
    assert default.usage.prompt_tokens == default.usage.total_tokens > 4
    assert single.usage.prompt_tokens == 3
    with openai.OpenAI(base_url=sentences.url, api_key="any", max_retries=0) as client:
        raw = client.embeddings.with_raw_response.create(model="tiny", input="a dog", encoding_format="base64")
    wire = base64.b64decode(json.loads(raw.text)["data"][0]["embedding"])
    assert np.frombuffer(wire, "<f4").shape == (32,)


def test_a_model_that_generates_says_so(tiny_tokenizer: Tokenizer) -> None:
    names = TokenNames(tiny_tokenizer)
    loaded = Loaded(tokenizer=tiny_tokenizer, names=names, template=None, context_len=64, created=0)
    bodies: dict[str, dict[str, Any]] = {
        "embeddings": {"input": "a"},
        "classify": {"input": "a"},
        "score": {"text_1": "a", "text_2": "b"},
        "rerank": {"query": "a", "documents": ["b"]},
    }
    for route, fields in bodies.items():
        body_type, make_job = KINDS[route]
        body = parse_body(body_type, json.dumps(fields).encode())
        with pytest.raises(ApiError, match=r"this model gives no .*; use /v1/completions") as raised:
            asyncio.run(make_job(body, loaded))
        assert (raised.value.status, raised.value.code) == (400, "wrong_kind_of_model")


def test_routes_for_another_kind_of_model_say_what_to_use(sentences: Any) -> None:
    for path, body in (
        ("/v1/completions", {"prompt": "a"}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "a"}]}),
        ("/v1/classify", {"input": "a"}),
    ):
        status, answer, _ = sentences.ask(path, body)
        assert (status, answer["error"]["code"]) == (400, "wrong_kind_of_model")
        assert "use /v1/embeddings" in answer["error"]["message"]


def test_too_many_texts_are_refused_and_texts_are_counted(sentences: Any) -> None:
    status, answer, _ = sentences.ask("/v1/embeddings", {"input": ["a"] * 301})
    assert (status, answer["error"]["param"]) == (400, "input")
    assert "holds 301 texts; this server takes 300" in answer["error"]["message"]
    status, answer, _ = sentences.ask("/v1/rerank", {"query": "a", "documents": ["b"] * 300})
    assert (status, answer["error"]["param"]) == (400, "documents")
    before = _metric(sentences, 'trine_request_success_total{finished_reason="stop"}')
    assert sentences.ask("/v1/embeddings", {"input": ["a"] * 300})[0] == 200
    assert _metric(sentences, 'trine_request_success_total{finished_reason="stop"}') == before + 300
    assert _metric(sentences, "trine_texts_in_flight") == 0
    sentences.wait_for(r"^embd-[0-9a-f]+: 900 \+ 0 tokens")


def test_requests_side_by_side_get_their_own_answers(sentences: Any, ask: Ask) -> None:
    expected = vectors(ask("sentence", "embeddings", input=TEXTS))
    found: dict[int, Any] = {}

    def one(number: int) -> None:
        body = {"input": [TEXTS[(number + place) % 4] for place in range(3)]}
        found[number] = vectors(sentences.ask("/v1/embeddings", body)[1])

    threads = [threading.Thread(target=one, args=(number,)) for number in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for number, rows in found.items():
        wanted = [expected[(number + place) % 4] for place in range(3)]
        assert np.abs(rows - wanted).max() < TOLERANCE
    assert len(found) == 12


def test_a_client_that_leaves_is_aborted_and_a_full_server_says_so(scripted: Any, scripts: Any) -> None:
    server = scripted(max_texts_in_flight=4, device="pooling")
    leaving = server.connect()
    leaving.request("POST", "/v1/embeddings", json.dumps({"input": [[scripts.SILENT], [scripts.SILENT], [7]]}))
    _until(lambda: server.events("add"))
    status, answer, headers = server.ask("/v1/embeddings", {"input": [[7], [7]]})
    assert (status, answer["error"]["code"], headers["retry-after"]) == (429, "server_full", "1")
    assert "takes 4 texts at once" in answer["error"]["message"]
    status, answer, _ = server.ask("/v1/embeddings", {"input": [[7]] * 5})
    assert (status, answer["error"]["param"]) == (400, "input")
    assert server.ask("/v1/embeddings", {"input": [7]})[0] == 200
    leaving.sock.close()
    _until(lambda: server.events("abort"))
    assert server.ask("/v1/embeddings", {"input": [[7]] * 4})[0] == 200
    status, answer, _ = server.ask("/v1/embeddings", {"input": [scripts.FAILS_LATER]})
    assert (status, answer["error"]["code"]) == (500, "generation_failed")
    assert server.ask("/v1/embeddings", {"input": [scripts.FULL]})[0] == 429
    assert "trine_texts_in_flight 0.0" in server.ask("/metrics")[1]


ODD: tuple[Any, ...] = (
    None, 0, -1, 1, 2**40, 0.5, True, "", "a dog", "\udc80", [], [[]], [5], [5, 7], [[5], [7, 9]], ["a", "b"], ["a", 5],
    [None], [2**40], {"text": "a"}, [{"text": "a"}], {}, "base64", "query", ["the cat"] * 40, "x " * 100,
)  # fmt: skip


def test_no_body_wedges_the_server_or_passes_for_a_fault_of_its_own(sentences: Any) -> None:
    """Seeded random bodies: each is answered or refused, none is a 5xx, and afterwards nothing is held."""
    chance = random.Random(0)
    good: dict[str, dict[str, Any]] = {
        "embeddings": {"input": ["a", "b"]},
        "classify": {"input": "a"},
        "score": {"text_1": "a", "text_2": ["b", "c"]},
        "rerank": {"query": "a", "documents": ["b", "c"]},
    }
    statuses = []
    for _ in range(250):
        route = chance.choice(sorted(good))
        names = sorted(KINDS[route][0].model_fields)
        body = {**good[route], **{name: chance.choice(ODD) for name in chance.sample(names, chance.randrange(3))}}
        status, answer, _ = sentences.ask(f"/v1/{route}", json.dumps(body).encode())
        assert status in (200, 400, 404), (body, answer)
        if status != 200:
            assert answer["error"]["message"]
        statuses.append(status)
    assert min(statuses.count(200), statuses.count(400)) > 40
    assert _metric(sentences, "trine_texts_in_flight") == _metric(sentences, "trine_num_requests_waiting") == 0
    assert sentences.ask("/ready")[0] == 200


def test_the_examples_of_the_document_work(sentences: Any) -> None:
    page = (Path(__file__).resolve().parents[2] / "docs/encoders.md").read_text(encoding="utf-8")
    page = page.replace("http://127.0.0.1:8001", sentences.url.removesuffix("/v1"))
    lines = [line for line in page.splitlines() if line.startswith("curl ")]
    assert len(lines) == 3
    for line in lines:
        command = shlex.split(line)
        status, answer, _ = sentences.ask(urlsplit(command[1]).path, json.loads(command[-1]))
        assert status == 200, answer
    (code,) = re.findall(r"^```python\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "32\n"), done.stderr


def _until(holds: Callable[[], Any]) -> None:
    for _ in range(1000):
        if holds():
            return
        time.sleep(0.01)
    raise AssertionError("it never came to hold")


def _metric(server: Any, name: str) -> float:
    lines = [line for line in server.ask("/metrics")[1].splitlines() if line.startswith(f"{name} ")]
    return float(lines[0].rpartition(" ")[2]) if lines else 0.0

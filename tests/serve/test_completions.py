"""/v1/completions and /v1/chat/completions, field by field, against the model's own forward pass."""

from __future__ import annotations

import http.client
import json
import random
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from trine.engine.generate.load import load_for_inference

PROMPT = "def add(first"


@pytest.fixture(scope="module")
def loaded(chat_checkpoint: Path) -> Any:
    return load_for_inference(chat_checkpoint)


@torch.inference_mode()
def own_logprobs(loaded: Any, ids: list[int]) -> torch.Tensor:
    """[T - 1, V]: of the token after each of `ids` but the last, by one forward pass of the model."""
    model, tokenizer = loaded
    hidden = model(torch.tensor([ids]))
    logits: torch.Tensor = model.logits(hidden[0, :-1])[:, : tokenizer.vocab_size]
    return logits.log_softmax(-1)


def test_what_lm_eval_sends_gives_the_log_probabilities_of_the_forward_pass(server: Any, loaded: Any) -> None:
    """Batches of ids, echo, one token at the end that is not counted, the first entry null, the likeliest always in."""
    generator = random.Random(0)
    prompts = [[generator.randrange(1, 290) for _ in range(length)] for length in (2, 9, 40, 63)]
    asked = {"max_tokens": 1, "logprobs": 1, "echo": True, "seed": 1234, "temperature": 0, "model": "tiny"}
    answer = server.complete(prompt=prompts, **asked)
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2, 3]
    for ids, choice in zip(prompts, answer["choices"], strict=True):
        logprobs = choice["logprobs"]
        assert logprobs["token_logprobs"][0] is None
        assert logprobs["top_logprobs"][0] is None
        assert {len(values) for values in logprobs.values()} == {len(ids) + 1}
        expected = own_logprobs(loaded, ids)
        for position, token in enumerate(ids[1:]):
            given = logprobs["token_logprobs"][position + 1]
            assert given == pytest.approx(expected[position, token].item(), abs=1e-4)
            best = max(logprobs["top_logprobs"][position + 1].values())
            assert best == pytest.approx(expected[position].max().item(), abs=1e-4)
            assert (given == best) == (int(expected[position].argmax()) == token)


def test_log_probabilities_of_new_tokens_do_not_depend_on_how_they_were_chosen(server: Any, loaded: Any) -> None:
    """They are the model's own, before temperature, bias and bans."""
    asked = {"max_tokens": 6, "logprobs": 4, "seed": 1, "temperature": 1.7, "top_k": 20, "logit_bias": {"40": 30}}
    answer = server.complete(prompt=PROMPT, return_token_ids=True, ignore_eos=True, **asked)
    (choice,) = answer["choices"]
    ids = choice["prompt_token_ids"] + choice["token_ids"]
    assert choice["token_ids"] == [40] * 6
    expected = own_logprobs(loaded, ids)[len(choice["prompt_token_ids"]) - 1 :]
    given = choice["logprobs"]["token_logprobs"]
    assert given == pytest.approx([expected[place, 40].item() for place in range(6)], abs=1e-4)


def test_the_four_forms_of_a_prompt(server: Any, loaded: Any) -> None:
    tokenizer = loaded[1]
    ids, other = tokenizer.encode(PROMPT), tokenizer.encode("the cat")
    for prompt, number in ((PROMPT, 1), ([PROMPT, "the cat"], 2), (ids, 1), ([ids, other], 2)):
        answer = server.complete(prompt=prompt, max_tokens=4, temperature=0)
        assert len(answer["choices"]) == number
        assert (
            answer["choices"][0]["text"]
            == server.complete(prompt=ids, max_tokens=4, temperature=0)["choices"][0]["text"]
        )
        assert answer["usage"]["prompt_tokens"] == (len(ids) if number == 1 else len(ids) + len(other))


def test_choices_are_numbered_over_the_prompts(server: Any) -> None:
    answer = server.complete(prompt=[PROMPT, "the cat"], n=3, max_tokens=5, seed=7)
    assert [choice["index"] for choice in answer["choices"]] == list(range(6))
    alone = [server.complete(prompt=prompt, n=3, max_tokens=5, seed=7) for prompt in (PROMPT, "the cat")]
    texts = [choice["text"] for each in alone for choice in each["choices"]]
    assert [choice["text"] for choice in answer["choices"]] == texts
    assert len(set(texts)) > 3, "choices differ"


@pytest.mark.parametrize("stream", [False, True])
def test_echo(server: Any, stream: bool) -> None:
    asked = {"prompt": PROMPT, "max_tokens": 4, "temperature": 0, "logprobs": 2}
    plain = server.complete(**asked)["choices"][0]
    if stream:
        response = server.stream(echo=True, **asked)
        frames = [frame[6:] for frame in response.read().decode().split("\n\n") if frame.startswith("data: {")]
        pieces = [json.loads(frame)["choices"][0] for frame in frames]
        text = "".join(piece["text"] for piece in pieces)
        logprobs = {key: [value for piece in pieces for value in piece["logprobs"][key]] for key in plain["logprobs"]}
    else:
        echoed = server.complete(echo=True, **asked)["choices"][0]
        text, logprobs = echoed["text"], echoed["logprobs"]
    assert text == PROMPT + plain["text"]
    number = len(plain["logprobs"]["tokens"])
    assert logprobs["tokens"][-number:] == plain["logprobs"]["tokens"]
    assert logprobs["token_logprobs"][-number:] == pytest.approx(plain["logprobs"]["token_logprobs"], abs=1e-4)
    assert "".join(logprobs["tokens"][:-number]) == PROMPT
    for token, offset in list(zip(logprobs["tokens"], logprobs["text_offset"], strict=True))[:-number]:
        assert text[offset : offset + len(token)] == token
    assert logprobs["text_offset"][-number] == len(PROMPT)


def test_echo_of_the_prompt_alone(server: Any) -> None:
    answer = server.complete(prompt=PROMPT, max_tokens=0, echo=True, logprobs=0)
    (choice,) = answer["choices"]
    assert (choice["text"], choice["finish_reason"]) == (PROMPT, "length")
    assert "".join(choice["logprobs"]["tokens"]) == PROMPT
    assert answer["usage"]["completion_tokens"] == 0


def test_prompt_log_probabilities(server: Any, loaded: Any) -> None:
    ids = loaded[1].encode(PROMPT)
    (choice,) = server.complete(prompt=ids, max_tokens=1, prompt_logprobs=2)["choices"]
    first, *others = choice["prompt_logprobs"]
    assert first is None
    expected = own_logprobs(loaded, ids)
    for position, (token, entry) in enumerate(zip(ids[1:], others, strict=True)):
        row = expected[position]
        assert entry[str(token)]["logprob"] == pytest.approx(row[token].item(), abs=1e-4)
        assert entry[str(token)]["rank"] == 1 + int((row > row[token]).sum())
        assert entry[str(int(row.argmax()))]["rank"] == 1
        assert len(entry) in (2, 3)


def test_stops(server: Any, loaded: Any) -> None:
    tokenizer = loaded[1]
    long = server.complete(prompt=PROMPT, max_tokens=20, temperature=0, ignore_eos=True, return_token_ids=True)
    (choice,) = long["choices"]
    text, ids = choice["text"], choice["token_ids"]
    at = next(place for place in range(3, len(text) - 2) if "\ufffd" not in text[place : place + 2])
    stop = text[at : at + 2]
    asked = {"prompt": PROMPT, "max_tokens": 20, "temperature": 0, "ignore_eos": True}
    for given in (stop, ["never to be seen", stop]):
        (choice,) = server.complete(stop=given, **asked)["choices"]
        assert choice["text"] == text[: text.index(stop)]
        assert (choice["finish_reason"], choice["stop_reason"]) == ("stop", stop)
    (choice,) = server.complete(stop_token_ids=[ids[2]], return_token_ids=True, **asked)["choices"]
    assert choice["token_ids"] == ids[: ids.index(ids[2]) + 1]
    assert (choice["finish_reason"], choice["stop_reason"]) == ("stop", ids[2])
    (choice,) = server.complete(prompt=PROMPT, max_tokens=5, logit_bias={str(tokenizer.eos_id): 100})["choices"]
    assert (choice["text"], choice["finish_reason"]) == ("", "stop")
    asked = {"logit_bias": {str(tokenizer.eos_id): 100}, "min_tokens": 3, "return_token_ids": True}
    (choice,) = server.complete(prompt=PROMPT, max_tokens=5, **asked)["choices"]
    assert len(choice["token_ids"]) == 4


def test_what_may_be_chosen(server: Any) -> None:
    asked = {"prompt": PROMPT, "max_tokens": 8, "seed": 1, "return_token_ids": True, "ignore_eos": True}
    (choice,) = server.complete(allowed_token_ids=[41, 42], **asked)["choices"]
    assert set(choice["token_ids"]) == {41, 42}
    (choice,) = server.complete(allowed_token_ids=[41, 42], banned_token_ids=[42], **asked)["choices"]
    assert set(choice["token_ids"]) == {41}
    (choice,) = server.complete(logit_bias={"43": 100}, **asked)["choices"]
    assert set(choice["token_ids"]) == {43}


def test_tokens_named_by_their_ids(server: Any) -> None:
    asked = {"prompt": PROMPT, "max_tokens": 4, "temperature": 0, "logprobs": 3, "return_token_ids": True}
    (choice,) = server.complete(return_tokens_as_token_ids=True, **asked)["choices"]
    assert choice["logprobs"]["tokens"] == [f"token_id:{token}" for token in choice["token_ids"]]
    assert all(len(top) == 3 for top in choice["logprobs"]["top_logprobs"])


def test_a_prompt_that_began_alike_is_found_in_the_cache_under_its_salt_only(server: Any) -> None:
    prompt = [7 + place % 5 for place in range(50)]

    def cached(**fields: Any) -> int:
        answer = server.complete(prompt=prompt, max_tokens=2, **fields)
        number: int = answer["usage"]["prompt_tokens_details"]["cached_tokens"]
        return number

    assert cached(cache_salt="a") == 0
    assert cached(cache_salt="a") > 0
    assert cached(cache_salt="b") == 0


def test_the_context_is_the_limit(server: Any) -> None:
    (choice,) = server.complete(prompt=[5] * 60, max_tokens=100, ignore_eos=True, return_token_ids=True)["choices"]
    assert (len(choice["token_ids"]), choice["finish_reason"]) == (4, "length")
    status, answer, _ = server.ask("/v1/completions", {"prompt": [[5], [5] * 64]})
    assert (status, answer["error"]["code"], answer["error"]["param"]) == (400, "context_length_exceeded", "prompt")


@pytest.mark.parametrize(
    ("fields", "param", "said"),
    [
        ({"stop_token_ids": [99999]}, "stop_token_ids", "token id 99999; the vocabulary ends at"),
        ({"logit_bias": {"99999": 1}}, "logit_bias", "token id 99999"),
        ({"min_tokens": 50}, "min_tokens", "min_tokens 50 is above max_tokens 16"),
    ],
)
def test_what_the_model_does_not_have_is_refused_by_the_field(
    server: Any, fields: dict[str, Any], param: str, said: str
) -> None:
    status, answer, _ = server.ask("/v1/completions", {"prompt": PROMPT, **fields})
    assert (status, answer["error"]["param"]) == (400, param)
    assert said in answer["error"]["message"]


def test_special_tokens_can_be_shown(server: Any) -> None:
    asked = {"prompt": PROMPT, "max_tokens": 1, "logit_bias": {"0": 100}}
    assert server.complete(**asked)["choices"][0]["text"] == ""
    shown = server.complete(**asked, ignore_eos=True, skip_special_tokens=False)["choices"][0]["text"]
    assert shown == "<|endoftext|>"


def test_parts_of_a_message_are_joined(server: Any) -> None:
    parts = [{"type": "text", "text": "the"}, {"type": "text", "text": "cat"}]
    asked = {"max_completion_tokens": 4, "temperature": 0}
    answers = [
        server.ask("/v1/chat/completions", {"messages": [{"role": "user", "content": content}], **asked})[1]
        for content in (parts, "the\ncat")
    ]
    assert answers[0]["choices"] == answers[1]["choices"]
    assert answers[0]["usage"]["prompt_tokens"] == answers[1]["usage"]["prompt_tokens"]


def test_a_user_is_named_in_the_log(server: Any) -> None:
    answer = server.complete(prompt=PROMPT, max_tokens=2, user="some\nbody", ignore_eos=True)
    line = server.wait_for(answer["id"])
    assert f"user 'some\\nbody': {answer['usage']['prompt_tokens']} + 2 tokens" in line


def test_metrics_count_what_happened(server: Any) -> None:
    def read() -> dict[str, float]:
        lines = [line for line in server.ask("/metrics")[1].splitlines() if not line.startswith("#")]
        return {name: float(value) for name, _, value in (line.rpartition(" ") for line in lines)}

    before = read()
    server.complete(prompt=[9] * 11, max_tokens=7, n=2, ignore_eos=True, seed=1)
    after = read()
    grown = {name: after[name] - before.get(name, 0) for name in after}
    assert grown["trine_prompt_tokens_total"] == 11
    assert grown["trine_generation_tokens_total"] == 14
    assert grown['trine_request_success_total{finished_reason="length"}'] == 2
    assert grown["trine_time_to_first_token_seconds_count"] == 1
    assert grown["trine_inter_token_latency_seconds_count"] == 12
    assert grown["trine_e2e_request_latency_seconds_count"] == 2
    assert grown["trine_prefix_cache_queries_total"] >= 11
    assert grown["trine_engine_steps_total"] >= 7
    assert grown['trine_http_requests_total{method="POST",path="/v1/completions",status="200"}'] == 1
    assert after["trine_num_requests_running"] == after["trine_completions_in_flight"] == 0
    assert 0 <= after["trine_kv_cache_usage_perc"] <= 1


def test_a_mix_of_everything_at_once_changes_nobodys_answer(server: Any) -> None:
    kinds: list[dict[str, Any]] = [
        {"prompt": PROMPT, "max_tokens": 20, "temperature": 0},
        {"prompt": "the cat", "max_tokens": 9, "seed": 5, "top_p": 0.8},
        {"prompt": [5] * 50, "max_tokens": 12, "seed": 6, "min_p": 0.1},
        {"prompt": [[8, 9], [10] * 20], "max_tokens": 5, "seed": 7, "n": 2},
        {"prompt": "return", "max_tokens": 15, "seed": 8, "repetition_penalty": 1.3, "presence_penalty": 0.5},
        {"prompt": "mat", "max_tokens": 1, "temperature": 0, "echo": True, "logprobs": 1},
    ]
    alone = [[choice["text"] for choice in server.complete(**kind)["choices"]] for kind in kinds]
    hurry = threading.Event()

    def one(number: int) -> tuple[int, list[str]]:
        hurry.wait(60)
        kind = kinds[number % len(kinds)]
        if number % 5 == 4:  # somebody who does not wait for the answer
            connection: http.client.HTTPConnection = server.send(**kind)
            connection.close()
        return number, [choice["text"] for choice in server.complete(**kind)["choices"]]

    with ThreadPoolExecutor(12) as pool:
        waiting = [pool.submit(one, number) for number in range(36)]
        hurry.set()
        for future in waiting:
            number, texts = future.result()
            assert texts == alone[number % len(kinds)]
    assert "trine_completions_in_flight 0.0" in server.ask("/metrics")[1]

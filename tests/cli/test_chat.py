"""`trine chat`: answers, history, commands and what is refused, through a pipe and at a terminal."""

from __future__ import annotations

import io
import json
import os
import pty
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from trine.engine.generate.conversation import Conversation
from trine.engine.generate.engine import Engine, EngineConfig
from trine.engine.generate.load import load_for_inference
from trine.engine.generate.plain import generate
from trine.engine.generate.sampling import SamplingParams
from trine.engine.text.chat import ChatTemplate

Trine = Callable[..., tuple[int, str, str]]
TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'system' and not loop.first %}{{ raise_exception('late') }}{% endif %}"
    "{{ m.role[0] }}:{{ m.content }}{{ eos_token }}{% endfor %}{% if add_generation_prompt %}a:{% endif %}"
)


@pytest.fixture
def checkpoint(tiny_checkpoint: Path, tmp_path: Path) -> Path:
    """The tiny model (context 64) with a chat template."""
    folder = tmp_path / "checkpoint"
    shutil.copytree(tiny_checkpoint, folder)
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return folder


@pytest.fixture
def piped(trine: Trine, checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> Trine:
    """`piped(text, options...)`: `trine chat` with text on stdin, greedy and short unless told otherwise."""

    def run(*arguments: object) -> tuple[int, str, str]:
        text, *options = arguments
        content = text if isinstance(text, bytes) else str(text).encode()
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content), encoding="utf-8"))
        return trine("chat", checkpoint, "--temperature", 0, "--max-tokens", 6, *options)

    return run


def answer_to(checkpoint: Path, *turns: tuple[str, str], max_tokens: int = 6) -> str:
    """What the plain generator says to a rendered conversation."""
    model, tokenizer = load_for_inference(checkpoint)
    template = ChatTemplate.of(tokenizer)
    assert template is not None
    text = template.render([{"role": role, "content": content} for role, content in turns])
    (done,) = generate(model, tokenizer, [tokenizer.encode(text)], SamplingParams(temperature=0, max_tokens=max_tokens))
    return done.text


def test_each_line_is_answered_with_the_whole_conversation_in_mind(piped: Trine, checkpoint: Path) -> None:
    status, out, _ = piped("the cat\n\nsat\n", "--system", "on")
    first = answer_to(checkpoint, ("system", "on"), ("user", "the cat"))
    talk = (("system", "on"), ("user", "the cat"), ("assistant", first), ("user", "sat"))
    assert status == 0
    assert out == f"{first}\n{answer_to(checkpoint, *talk)}\n"


def test_commands_change_what_follows(piped: Trine, checkpoint: Path) -> None:
    said = "the cat\n/reset\n/system on\nsat\n/undo\n/max-tokens 2\nmat\n/exit\nnever\n"
    status, out, err = piped(said)
    assert status == 0, err
    assert out.split("\n")[:-1] == [
        *answer_to(checkpoint, ("user", "the cat")).split("\n"),
        *answer_to(checkpoint, ("system", "on"), ("user", "sat")).split("\n"),
        *answer_to(checkpoint, ("system", "on"), ("user", "mat"), max_tokens=2).split("\n"),
    ]
    assert "forgotten" in err


def test_conversations_are_saved_and_go_on(piped: Trine, checkpoint: Path, tmp_path: Path) -> None:
    file = tmp_path / "talk.json"
    status, first, _ = piped("the cat\n", "--system", "on", "--save", file)
    saved = json.loads(file.read_text())
    assert (status, saved["system"]) == (0, "on")
    assert saved["messages"] == [
        {"role": "user", "content": "the cat"},
        {"role": "assistant", "content": first.removesuffix("\n")},
    ]
    _, whole, _ = piped("the cat\nsat\n", "--system", "on")
    _, rest, err = piped(f"/load {file}\n/history\nsat\n/save {file}\n")
    assert whole == first + rest
    assert "user: the cat" in err
    assert len(json.loads(file.read_text())["messages"]) == 4
    _, again, _ = piped("sat\n", "--load", file)
    assert again
    for content in ("{", "[]", '{"format": "trine conversation 1", "messages": [{"role": "user", "content": "x"}]}'):
        file.write_text(content)
        status, _, err = piped("sat\n", "--load", file)
        assert status == 1
        assert str(file) in err


def test_a_seed_repeats_a_conversation_and_each_answer_has_its_own_numbers(piped: Trine) -> None:
    drawn = ("the\n/reset\nthe\n", "--temperature", 2, "--seed", 5, "--max-tokens", 8)
    one, two = piped(*drawn)[1], piped(*drawn)[1]
    assert one == two
    half = len(one) // 2
    assert one[:half] != one[half:]


def test_what_no_longer_fits_is_left_out_and_said(piped: Trine) -> None:
    _, out, err = piped("the cat sat on the mat\n" * 8)
    assert out
    assert "turns no longer fit the model's context and were left out" in err
    status, _, err = piped("the cat sat on the mat " * 20)
    assert status == 1
    assert "say less" in err


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ("/sytem x\n", "no command /sytem; did you mean /system?"),
        ("/temperature warm\n", "/temperature needs a number, got 'warm'"),
        ("/temperature\n", "/temperature needs X; it is 0"),
        ("/temperature -1\n", "temperature"),
        ("/top-k 1.5\n", "/top-k needs a whole number"),
        ("/undo\n", "nothing has been said yet"),
        ("/retry\n", "nothing has been said yet"),
        ("/save\n", "/save needs FILE"),
        ("/save /nowhere/x.json\n", "cannot be saved"),
        ("/reset now\n", "/reset takes nothing"),
        ("/load nowhere.json\n", "no conversation in nowhere.json"),
    ],
)
def test_wrong_commands_are_one_line_and_end_a_piped_talk(piped: Trine, said: str, message: str) -> None:
    status, out, err = piped(said)
    assert status in (1, 2)
    assert message in err
    assert out == ""


def test_wrong_input_is_refused(piped: Trine, trine: Trine, checkpoint: Path, tiny_checkpoint: Path) -> None:
    assert "stdin:2: the line is not UTF-8" in piped(b"the\n\xff\n")[2]
    (checkpoint / "other.jinja").write_text("{{ raise_exception('never') }}")
    status, _, err = piped("the\n", "--chat-template", checkpoint / "other.jinja")
    assert (status, "does not take this conversation: never" in err) == (2, True)
    assert "no chat template 'rag'; it has default" in piped("the\n", "--chat-template", "rag")[2]
    status, _, err = trine("chat", tiny_checkpoint)
    assert status == 1
    assert "has no chat template, so it was not made to chat" in err


def test_what_is_wrong_with_the_options_is_said_before_the_model_is_loaded(
    piped: Trine, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trine.engine.generate.load.load_model", None)
    for options, status, message in (
        (("--chat-template", tmp_path / "none.jinja"), 1, "no chat template in"),
        (("--load", tmp_path / "none.json"), 1, "no conversation in"),
        (("--save", tmp_path / "none" / "talk.json"), 2, "is not a file in a folder that is there"),
        (("--save", tmp_path), 2, "is not a file in a folder that is there"),
    ):
        got, out, err = piped("the\n", *options)
        assert (got, out) == (status, "")
        assert message in err
        assert len(err.splitlines()) == 1
    (checkpoint / "chat_template.jinja").unlink()
    assert "has no chat template, so it was not made to chat" in piped("the\n")[2]


def test_an_answer_ends_at_the_token_that_the_template_writes_after_it(checkpoint: Path) -> None:
    model, tokenizer = load_for_inference(checkpoint)
    template = ChatTemplate(TEMPLATE.replace("eos_token", "'<|endoftext|>'"))
    talk = Conversation(Engine(model, tokenizer, EngineConfig(max_running=1)), template, SamplingParams(), 64)
    assert talk._stop_ids() == (tokenizer.eos_id,)
    talk.template = ChatTemplate("{{ messages[-1].content }} and more")
    assert talk._stop_ids() == ()


def test_an_interrupted_answer_is_kept_and_the_talk_goes_on(checkpoint: Path) -> None:
    model, tokenizer = load_for_inference(checkpoint)
    template = ChatTemplate.of(tokenizer)
    assert template is not None
    params = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True)
    talk = Conversation(Engine(model, tokenizer, EngineConfig(max_running=1)), template, params, 64)
    shown: list[str] = []

    def stop(text: str) -> None:
        shown.append(text)
        if len(shown) == 3:
            raise KeyboardInterrupt

    answer = talk.say("the cat sat on the mat first second return", stop)
    assert answer.finish_reason == "interrupted"
    assert answer.text == "".join(shown) == talk.messages[-1]["content"]
    assert not talk.engine.has_work
    talk.params = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)
    again = talk.say("cat", lambda _: None)
    assert again.finish_reason == "length"
    assert again.cached_tokens >= 16  # what was said before is not computed again
    assert torch.is_grad_enabled()


def test_a_terminal_shows_a_prompt_answers_errors_and_goes_on(checkpoint: Path) -> None:
    """The real command under a terminal of its own."""
    leader, follower = pty.openpty()
    command = [sys.executable, "-m", "trine.cli", "chat", str(checkpoint), "--temperature", "0", "--max-tokens", "4"]
    done = subprocess.Popen(command, stdin=follower, stdout=follower, stderr=follower, close_fds=True)
    os.close(follower)
    shown = b""

    def until(expected: bytes) -> None:
        nonlocal shown
        end = time.monotonic() + 120
        while expected not in shown and time.monotonic() < end:
            shown += os.read(leader, 4096)
        assert expected in shown, shown

    try:
        until(b"> ")
        for line, expected in ((b"the cat", b"tokens/s"), (b"/nothing", b"no command /nothing"), (b"/exit", b"/exit")):
            os.write(leader, line + b"\n")
            until(expected)
        assert done.wait(60) == 0
    finally:
        done.kill()
        done.wait()
        os.close(leader)

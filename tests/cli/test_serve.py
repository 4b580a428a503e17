"""`trine serve`: options become settings."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from trine.cli import serve as command
from trine.serve.settings import ServerSettings

Trine = Callable[..., tuple[int, str, str]]


@pytest.fixture
def settings_of(trine: Trine, monkeypatch: pytest.MonkeyPatch, tiny_checkpoint: Path) -> Callable[..., ServerSettings]:
    """What a server would be started with."""
    found: list[ServerSettings] = []
    monkeypatch.setattr(command, "run", found.append)

    def settings(*options: object) -> ServerSettings:
        status, _, err = trine("serve", tiny_checkpoint, *options)
        assert status == 0, err
        return found.pop()

    return settings


@pytest.mark.parametrize(
    ("options", "speculate", "draft"),
    [
        ([], 0, None),
        (["--speculate", "2"], 2, None),
        (["--draft", "small"], 4, "small"),
        (["--draft", "small", "--speculate", "7"], 7, "small"),
    ],
)
def test_a_draft_model_guesses_four_tokens_unless_told_otherwise(
    settings_of: Callable[..., ServerSettings], options: list[str], speculate: int, draft: str | None
) -> None:
    start = settings_of(*options).start
    assert (start.speculate, start.draft) == (speculate, draft)


def test_adapters_become_names_and_folders(settings_of: Callable[..., ServerSettings]) -> None:
    given = settings_of("--adapter", "poems=a/b", "--adapter", "prose=c=d")
    assert given.start.adapters == (("poems", "a/b"), ("prose", "c=d"))

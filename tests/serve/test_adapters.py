"""LoRA adapters over HTTP: served beside the model, loaded and unloaded while the server runs, from one folder only."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from trine.engine.errors import UsageError
from trine.engine.generate.plain import generate
from trine.engine.generate.sampling import SamplingParams
from trine.engine.model.checkpoint import load_model
from trine.engine.model.transformer import Transformer
from trine.engine.text.tokenizer import Tokenizer
from trine.serve.messages import Start
from trine.serve.settings import ServerSettings

ServerClass = Callable[[list[str]], Any]
PROMPT = "the cat"


def write_adapter(folder: Path, checkpoint: Path, seed: int) -> Transformer:
    """An adapter of the query and output projections; returns the model with it merged in float64."""
    model = load_model(checkpoint)
    generator = torch.Generator().manual_seed(seed)
    tensors: dict[str, torch.Tensor] = {}
    for name, weight in model.named_parameters():
        if name.endswith(("q_proj.weight", "o_proj.weight")):
            path = f"base_model.model.model.{name.removesuffix('.weight')}"
            a = torch.randn(2, weight.shape[1], generator=generator)
            b = torch.randn(weight.shape[0], 2, generator=generator)
            tensors |= {f"{path}.lora_A.weight": a, f"{path}.lora_B.weight": b}
            with torch.no_grad():
                weight.copy_(weight.double() + 2.0 * b.double() @ a.double())
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    settings = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj", "o_proj"]}
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    return model


class Adapters:
    """A server with adapter `first` from the start; `second` lies below the root that may be loaded from."""

    def __init__(self, server: Any, root: Path, texts: dict[str, str]) -> None:
        self.server, self.root, self.texts = server, root, texts

    def change(self, what: str, **fields: Any) -> tuple[int, Any]:
        return self.server.ask(f"/v1/{what}_lora_adapter", fields)[:2]

    def complete(self, model: str) -> tuple[int, Any]:
        fields = {"model": model, "prompt": PROMPT, "max_tokens": 8, "temperature": 0, "ignore_eos": True}
        return self.server.ask("/v1/completions", fields)[:2]

    def text(self, model: str) -> str:
        status, answer = self.complete(model)
        assert status == 200, answer
        assert answer["model"] == model
        return str(answer["choices"][0]["text"])

    def listed(self) -> dict[str, str | None]:
        """Names of models, and what each is an adapter of."""
        return {each["id"]: each.get("parent") for each in self.server.ask("/v1/models")[1]["data"]}


@pytest.fixture(scope="module")
def adapters(
    tiny_checkpoint: Path,
    tiny_tokenizer: Tokenizer,
    tmp_path_factory: pytest.TempPathFactory,
    server_class: ServerClass,
) -> Iterator[Adapters]:
    root = tmp_path_factory.mktemp("adapters")
    outside = tmp_path_factory.mktemp("outside")
    models = {
        "tiny": load_model(tiny_checkpoint),
        "first": write_adapter(outside / "first", tiny_checkpoint, 1),
        "second": write_adapter(root / "second", tiny_checkpoint, 2),
    }
    (root / "link").symlink_to(outside / "first")
    (root / "empty").mkdir()
    params = SamplingParams(max_tokens=8, temperature=0, ignore_eos=True)
    texts = {name: generate(model, tiny_tokenizer, [PROMPT], params)[0].text for name, model in models.items()}
    assert len(set(texts.values())) == 3
    command = [sys.executable, "-m", "trine.cli", "serve", str(tiny_checkpoint), "--port", "0"]
    command += ["--served-model-name", "tiny", "--adapter", f"first={outside / 'first'}"]
    running = server_class([*command, "--runtime-adapters", str(root)])
    try:
        running.wait_until("serving")
        yield Adapters(running, root, texts)
        assert running.end() == 0, "\n".join(running.said)
    finally:
        running.kill()


def test_an_adapter_from_the_start_is_a_model_beside_the_model(adapters: Adapters) -> None:
    assert adapters.listed() == {"tiny": None, "first": "tiny"}
    assert adapters.server.ask("/v1/models/first")[1]["parent"] == "tiny"
    for name in ("tiny", "first", "tiny"):
        assert adapters.text(name) == adapters.texts[name]


def test_chat_takes_an_adapter_too(adapters: Adapters) -> None:
    body = {"model": "first", "messages": [{"role": "user", "content": "x"}], "max_tokens": 2}
    status, answer, _ = adapters.server.ask("/v1/chat/completions", body)
    assert (status, answer["error"]["code"]) == (400, "no_chat_template")  # past the check of the name
    body["model"] = "third"
    assert adapters.server.ask("/v1/chat/completions", body)[0] == 404


def test_loaded_and_unloaded_while_the_server_runs(adapters: Adapters) -> None:
    assert adapters.complete("second")[0] == 404
    assert adapters.change("load", lora_name="second", lora_path="second") == (
        200,
        {"name": "second", "status": "loaded"},
    )
    assert adapters.listed() == {"tiny": None, "first": "tiny", "second": "tiny"}
    for name in ("second", "first", "tiny", "second"):
        assert adapters.text(name) == adapters.texts[name]
    status, answer = adapters.change("load", lora_name="second", lora_path=str(adapters.root / "second"))
    assert (status, answer["error"]["param"]) == (400, "lora_name")
    assert adapters.change("unload", lora_name="second") == (200, {"name": "second", "status": "unloaded"})
    assert adapters.complete("second")[0] == 404
    status, answer = adapters.change("unload", lora_name="second")
    assert (status, answer["error"]["message"]) == (404, "there is no adapter 'second'; loaded: first")
    assert adapters.listed() == {"tiny": None, "first": "tiny"}


@pytest.mark.parametrize("path", ["..", "/etc", "second/../../x", "link", "a\0b"])
def test_only_folders_below_the_root_are_opened(adapters: Adapters, path: str) -> None:
    status, answer = adapters.change("load", lora_name="other", lora_path=path)
    assert (status, answer["error"]["param"]) == (400, "lora_path")
    assert "lies outside the folder" in answer["error"]["message"]


def test_a_folder_without_an_adapter_is_refused_and_nothing_changes(adapters: Adapters) -> None:
    for path, complaint in (("empty", "has no adapter_config.json"), ("nowhere", "there is no folder")):
        status, answer = adapters.change("load", lora_name="other", lora_path=path)
        assert status == 400
        assert complaint in answer["error"]["message"]
    assert adapters.listed() == {"tiny": None, "first": "tiny"}


@pytest.mark.parametrize(
    ("what", "fields", "complaint"),
    [
        ("load", {"lora_name": "x"}, "lora_path is required"),
        ("load", {"lora_name": "", "lora_path": "second"}, "lora_name"),
        ("load", {"lora_name": "x", "lora_path": "second", "load_inplace": True}, "unknown field load_inplace"),
        ("load", {"lora_name": "tiny", "lora_path": "second"}, "there is a model 'tiny' already"),
        ("unload", {"lora_name": 3}, "lora_name"),
        ("unload", {"lora_name": "tiny"}, "there is no adapter 'tiny'"),
    ],
)
def test_bodies_that_are_refused(adapters: Adapters, what: str, fields: dict[str, Any], complaint: str) -> None:
    status, answer = adapters.change(what, **fields)
    assert status in (400, 404)
    assert complaint in answer["error"]["message"]


def test_without_the_option_there_are_no_such_routes(server: Any) -> None:
    for path in ("/v1/load_lora_adapter", "/v1/unload_lora_adapter"):
        status, answer, _ = server.ask(path, {"lora_name": "x", "lora_path": "x"})
        assert (status, answer["error"]["code"]) == (404, "not_found")


def test_what_the_engine_refuses_and_its_death_are_answered(scripted: Callable[..., Any], tmp_path: Path) -> None:
    running = scripted(adapter_root=str(tmp_path))
    (tmp_path / "a").mkdir()
    assert running.ask("/v1/load_lora_adapter", {"lora_name": "fine", "lora_path": "a"})[0] == 200
    assert running.ask("/v1/load_lora_adapter", {"lora_name": "busy", "lora_path": "a"})[0] == 200
    assert running.events("load_adapter")[0]["folder"] == str((tmp_path / "a").resolve())
    status, answer, _ = running.ask("/v1/unload_lora_adapter", {"lora_name": "busy"})
    assert (status, answer["error"]["message"]) == (400, "adapter 'busy' is in use by 1 requests")
    status, answer, _ = running.ask("/v1/load_lora_adapter", {"lora_name": "mistake", "lora_path": "a"})
    assert (status, "the engine failed on this adapter" in answer["error"]["message"]) == (400, True)
    assert [each["id"] for each in running.ask("/v1/models")[1]["data"]] == ["scripted", "fine", "busy"]
    status, answer, _ = running.ask("/v1/load_lora_adapter", {"lora_name": "dies", "lora_path": "a"})
    assert (status, answer["error"]["code"]) == (503, "engine_died")
    assert running.wait() == 1


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"start": Start(checkpoint="x", adapters=(("tiny", "a"),))}, "adapter 'tiny' needs a name of its own"),
        ({"start": Start(checkpoint="x", adapters=(("a", "a"), ("a", "b")))}, "taken: tiny, a"),
        ({"adapter_root": Path("nowhere")}, "there is no folder nowhere"),
    ],
)
def test_settings_that_are_refused(settings: dict[str, Any], complaint: str) -> None:
    with pytest.raises(UsageError, match=complaint):
        ServerSettings(**{"start": Start(checkpoint="x"), "names": ("tiny",), **settings})


@pytest.mark.parametrize("given", ["first", "=folder", "first="])
def test_the_option_needs_a_name_and_a_folder(given: str) -> None:
    from trine.cli.options import names_and_folders

    with pytest.raises(UsageError, match="is not NAME=DIR"):
        names_and_folders([given])

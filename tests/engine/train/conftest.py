"""Prepared data and recipes for tiny runs (width 32, 2 layers)."""

from __future__ import annotations

import json
import random
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from trine.engine.config import parse
from trine.engine.train.recipe import Recipe, recipe_table

MakeRecipe = Callable[..., Recipe]


def words(count: int, seed: int) -> str:
    """Text with some structure: short sentences of a small vocabulary."""
    choose = random.Random(seed)
    names, verbs, things = ("Ada", "Bo", "Cy"), ("sees", "takes", "likes"), ("a cat", "the sun", "red shoes", "it")
    return " ".join(f"{choose.choice(names)} {choose.choice(verbs)} {choose.choice(things)}." for _ in range(count))


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """About 4,000 tokens in documents of ragged length, so that rows hold several of them, and a validation split."""
    from trine.engine.data.prepare import prepare
    from trine.engine.text.train_tokenizer import train_bpe

    folder = tmp_path_factory.mktemp("data")
    texts = [words(1 + (7 * index) % 23, index) for index in range(60)]
    for index, text in enumerate(texts):
        (folder / f"{index:02d}.txt").write_text(text)
    (folder / "held-out.text").write_text(words(60, 99))
    tokenizer = folder / "tokenizer"
    train_bpe(texts, vocab_size=300).save(tokenizer)
    prepare(
        sorted(folder.glob("*.txt")), tokenizer_dir=tokenizer, out=folder / "prepared",
        validation_files=[folder / "held-out.text"], workers=1,
    )  # fmt: skip
    return folder / "prepared"


@pytest.fixture
def make_recipe(data_dir: Path, tmp_path: Path) -> MakeRecipe:
    """`make_recipe(train={"steps": 9}, run={"dir": ...})`: a tiny recipe with changed settings by section."""

    def make(**changes: dict[str, Any]) -> Recipe:
        table: dict[str, dict[str, Any]] = {
            "model": {"family": "llama", "width": 32, "num_layers": 2, "num_heads": 2},
            "data": {"path": str(data_dir), "seq_len": 32},
            "train": {"steps": 8, "batch_size": 4, "threads": 1, "compute_dtype": "float32", "device": "cpu"},
            "optim": {"lr": 5e-3},
            "schedule": {"warmup_steps": 2},
            "eval": {"every": 0},
            "checkpoint": {"every": 0},
            "log": {"every": 1},
            "run": {"dir": str(tmp_path / "run")},
        }
        for section, values in changes.items():
            table[section] = {**table.get(section, {}), **values}
        return parse(Recipe, table, origin="test")

    return make


def recipe_of(data: Path, run: Path, model: dict[str, Any], **changes: dict[str, Any]) -> Recipe:
    """Six steps in float32, no section but these."""
    table: dict[str, dict[str, Any]] = {
        "model": model,
        "data": {"path": str(data), "seq_len": 32},
        "train": {"steps": 6, "batch_size": 4, "threads": 1, "compute_dtype": "float32", "device": "cpu"},
        "optim": {"lr": 1e-2},
        "eval": {"every": 0},
        "log": {"every": 1},
        "export": {"dtype": "float32"},
        "run": {"dir": str(run)},
    }
    for section, values in changes.items():
        table[section] = {**table.get(section, {}), **values}
    return parse(Recipe, table, origin="test")


FAMILIES: dict[str, dict[str, Any]] = {"llama": {"num_kv_heads": 1}, "gpt2": {}}


@pytest.fixture(scope="session")
def bases(data_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Tiny models after 20 steps, in float32, by family."""
    from trine.engine.train.loop import train

    found = {}
    for family, sizes in FAMILIES.items():
        run = tmp_path_factory.mktemp("base") / family
        model = {"family": family, "width": 32, "num_layers": 2, "num_heads": 2, **sizes}
        train(recipe_of(data_dir, run, model, train={"steps": 20}, eval={"every": 20}))
        found[family] = run / "final"
    return found


@pytest.fixture
def continued(data_dir: Path, bases: dict[str, Path], tmp_path: Path) -> MakeRecipe:
    """`continued("llama", run="name", adapter={...})`: a recipe of 6 steps that begins at a base, or at a folder."""

    def make(base: str | Path = "llama", run: str = "run", **changes: Any) -> Recipe:
        folder = bases[base] if isinstance(base, str) else base
        model = {"init_from": str(folder), **changes.pop("model", {})}
        return recipe_of(data_dir, tmp_path / run, model, **changes)

    return make


@dataclass
class Gang:
    """Processes that train one recipe after another as its ranks; see rank_worker.py."""

    folder: Path
    workers: list[subprocess.Popen[str]] = field(default_factory=list)
    _runs: int = 0

    def train(
        self,
        recipe: Recipe | list[Recipe],
        count: int,
        *,
        resume: str = "auto",
        fault: str | None = None,
        patience: int = 60,
    ) -> list[dict[str, Any]]:
        """What each of `count` ranks says of the run of a recipe, or of one for each rank."""
        while len(self.workers) < count:
            command = [sys.executable, str(Path(__file__).with_name("rank_worker.py"))]
            self.workers.append(subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True))
        self._runs += 1
        recipes = recipe if isinstance(recipe, list) else [recipe] * count
        for rank, worker in enumerate(self.workers[:count]):
            order = {
                "place": [rank, count, rank, count], "meeting": str(self.folder / str(self._runs)), "resume": resume,
                "recipe": recipe_table(recipes[rank]), "fault": fault, "patience": patience,
            }  # fmt: skip
            assert worker.stdin is not None
            worker.stdin.write(json.dumps(order) + "\n")
            worker.stdin.flush()
        outputs = [worker.stdout for worker in self.workers[:count]]
        return [json.loads(output.readline()) for output in outputs if output is not None]


@pytest.fixture(scope="session")
def gang(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gang]:
    gang = Gang(tmp_path_factory.mktemp("meetings"))
    yield gang
    for worker in gang.workers:
        worker.kill()
        worker.communicate()


_WORDS = ("red", "blue", "green", "seven", "eleven", "twenty")
_MODELS: dict[str, dict[str, Any]] = {
    "bert": {"family": "bert", "width": 32, "num_layers": 2, "num_heads": 2},
    "t5": {"family": "t5", "width": 32, "num_layers": 2, "num_heads": 2},
    "marian": {"family": "marian", "width": 32, "num_layers": 2, "num_heads": 2},
    "llama": {"family": "llama", "width": 32, "num_layers": 2, "num_heads": 2},
}


def _examples(count: int, seed: int) -> str:
    """Lines that serve every objective: a text, its reversal, whether red is in it, how long it is, colours tagged."""
    choose, lines = random.Random(seed), []
    for _ in range(count):
        words = [choose.choice(_WORDS) for _ in range(choose.randint(1, 6))]
        record = {
            "source": " ".join(words), "target": " ".join(reversed(words)), "text": " ".join(words),
            "label": "red" if "red" in words else "other", "score": len(words) / 6, "words": words,
            "labels": ["B-colour" if word in _WORDS[:3] else "O" for word in words],
            "chosen": " ".join(words[::-1]), "rejected": " ".join([*words, "green"]),
            "messages": [
                {"role": "user", "content": " ".join(words)},
                {"role": "assistant", "content": " ".join(reversed(words))},
            ],
        }  # fmt: skip
        lines.append(json.dumps(record))
    return "\n".join(lines)


def _make_objective_data(folder: Path) -> None:
    """`encoder/` and `encoder-decoder/`: prepared text with the tokenizer; `train.jsonl` and `dev.jsonl`."""
    from trine.engine.data.prepare import prepare
    from trine.engine.text.train_tokenizer import END_OF_TEXT, role_tokens, train_bpe, train_wordpiece, with_roles

    texts = [" ".join(json.loads(line)["text"] for line in _examples(2 + n % 5, n).splitlines()) for n in range(80)]
    for name, count, seed in (("train", 120, 1), ("dev", 24, 2)):
        (folder / f"{name}.jsonl").write_text(_examples(count, seed))
    (folder / "texts.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts))
    bpe = train_bpe(texts, vocab_size=290, special_tokens=[END_OF_TEXT, *role_tokens("encoder-decoder")])
    tokenizers = {
        "encoder": train_wordpiece(texts, vocab_size=60),
        "encoder-decoder": with_roles(bpe, "encoder-decoder", sentinels=12),
    }
    for name, tokenizer in tokenizers.items():
        tokenizer.save(folder / "tokenizer")
        prepare(
            [folder / "texts.jsonl"], tokenizer_dir=folder / "tokenizer", out=folder / name, validation_fraction=0.2,
            workers=1,
        )  # fmt: skip


def _objective_recipe(folder: Path, run: Path, base: str | dict[str, Any], **changes: dict[str, Any]) -> Recipe:
    """Eight steps in float32 of a model in `_MODELS` or another one; on examples where the objective is for them."""
    kind = changes.get("objective", {}).get("kind", "masked_lm" if base == "bert" else "span_corruption")
    byte_level = ("span_corruption", "seq2seq", "chat", "preference")
    shape = "encoder-decoder" if kind in byte_level else "encoder"
    data: dict[str, Any] = {"path": str(folder / shape), "seq_len": 32}
    if kind not in ("masked_lm", "span_corruption", "causal_lm"):
        data |= {"path": str(folder / "train.jsonl"), "validation": str(folder / "dev.jsonl")}
        if isinstance(base, str):
            data["tokenizer"] = str(folder / shape / "tokenizer")
    table: dict[str, dict[str, Any]] = {
        "model": _MODELS[base] if isinstance(base, str) else base,
        "objective": {"kind": kind},
        "data": data,
        "train": {"steps": 8, "batch_size": 4, "threads": 1, "compute_dtype": "float32", "device": "cpu"},
        "optim": {"lr": 5e-3},
        "eval": {"every": 4, "batch_size": 12},
        "checkpoint": {"every": 0},
        "log": {"every": 1},
        "export": {"dtype": "float32"},
        "run": {"dir": str(run)},
    }
    for section, values in changes.items():
        table[section] = {**table.get(section, {}), **values}
    return parse(Recipe, table, origin="test")


@pytest.fixture(scope="session")
def objectives_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """See `_make_objective_data`."""
    folder = tmp_path_factory.mktemp("objectives")
    _make_objective_data(folder)
    return folder


@pytest.fixture
def objective_recipe(objectives_dir: Path) -> MakeRecipe:
    """`objective_recipe(run folder, "bert", section={...})`: see `_objective_recipe`."""
    return partial(_objective_recipe, objectives_dir)


# What a script sees once the page is laid out, written into the title for `--dump-dom` to show: the charts that are
# visible, with what the pointer reads off them, and every request that was made.
_PROBE = """<script>
const seen = [...document.querySelectorAll(".chart")].filter((chart) => chart.offsetWidth > 0).map((chart) => {
  const box = chart.getBoundingClientRect();
  const at = {clientX: box.left + box.width * 0.6, clientY: box.top + 40};
  const fire = (name) => chart.dispatchEvent(new PointerEvent(name, at));
  fire("pointermove");
  const tip = chart.querySelector(".tip").textContent;
  fire("pointerleave");
  const drawn = [...chart.querySelectorAll("path")].filter((path) => path.getTotalLength() > 100);
  const colours = new Set(drawn.map((path) => getComputedStyle(path).stroke));
  return {tip, width: box.width, lines: drawn.length, colours: colours.size};
});
const requests = performance.getEntriesByType("resource").map((entry) => entry.name);
document.title = JSON.stringify({seen, requests, overflow: document.documentElement.scrollWidth - innerWidth});
</script></body>"""


@pytest.fixture
def look(tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """`look(page, width=..., first=SCRIPT)`: what a browser sees of it (see `_PROBE`), after `first` was run.

    Fails where the browser's console says anything.
    """

    def show(page: Path, *, width: int, first: str = "") -> dict[str, Any]:
        names = ("chromium", "chromium-browser", "google-chrome", "chrome")
        chromium = next(filter(None, map(shutil.which, names)), None)
        if chromium is None:
            pytest.skip("no Chromium on this machine")
        page.write_text(page.read_text().replace("</body>", f"<script>{first}</script>{_PROBE}"))
        quiet: tuple[str, ...] = ("headless", "no-sandbox", "disable-gpu", "disable-quic", "no-first-run")
        quiet += ("disable-background-networking", "disable-component-update", "disable-sync", "enable-logging=stderr")
        options = [*quiet, f"user-data-dir={tmp_path / 'profile'}", f"window-size={width},900", "dump-dom"]
        command = [chromium, *(f"--{option}" for option in options), page.as_uri()]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
        assert "CONSOLE" not in done.stderr
        title = re.search(r"<title>(.*?)</title>", done.stdout, flags=re.DOTALL)
        assert title is not None
        outcome: dict[str, Any] = json.loads(title.group(1).replace("&amp;", "&"))
        return outcome

    return show

"""Files of texts to vectors: rows in order, equal to each text alone; resumed, refused, cut."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from trine.engine.errors import DataError, UsageError
from trine.engine.generate import bulk
from trine.engine.generate.bulk import BulkSettings, classify_file, embed_file, open_for_vectors, prefix_of
from trine.engine.generate.pooler import Pooler
from trine.engine.generate.texts_file import TextsFile
from trine.engine.generate.unfinished import Unfinished

TEXTS = ["the cat sat", "", "a dog", "the cat sat on the mat and a dog", "x", "sat on a mat", "the the"]
LONG = "the cat sat on the mat " * 20
Folder = Callable[[str], Path]
Opened = tuple[Any, Any]


@pytest.fixture(scope="module")
def opened(encoder_folder: Folder) -> Callable[[str], Opened]:
    made: dict[str, Opened] = {}

    def of(kind: str) -> Opened:
        if kind not in made:
            folder = encoder_folder(kind)
            made[kind] = open_for_vectors(folder, dtype="float32", device="cpu", batch_tokens=32)[:2]
        return made[kind]

    return of


@pytest.fixture(autouse=True)
def small_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bulk, "WINDOW_ROWS", 3)


def settings(**fields: Any) -> BulkSettings:
    return BulkSettings(**{"checkpoint": "c", "dtype": "float32", **fields})


def lines(folder: Path, texts: list[str], name: str = "in.txt") -> str:
    (folder / name).write_text("".join(f"{text}\n" for text in texts))
    return str(folder / name)


def alone(engine: Any, texts: list[Any]) -> list[Any]:
    """Each text by itself."""
    pooler: Pooler = engine._pooler
    found = []
    for ids, types in engine.tokenizer.encode_inputs(texts):
        with torch.inference_mode():
            found += pooler.vectors([ids], [types])
    return found


def test_every_row_gets_the_embedding_it_has_alone(opened: Callable[[str], Opened], tmp_path: Path) -> None:
    import pyarrow.parquet

    engine, info = opened("sentence")
    texts = TextsFile.find(lines(tmp_path, TEXTS), None)
    done = embed_file(engine, info, texts, tmp_path / "out.npy", settings())
    assert (done.rows, done.before) == (7, 0)
    found = np.load(tmp_path / "out.npy")
    assert (found.dtype, found.shape) == (np.float32, (7, 32))
    assert np.abs(found - np.stack(alone(engine, TEXTS))).max() < 2e-5
    embed_file(engine, info, texts, tmp_path / "out.parquet", settings())
    column = pyarrow.parquet.read_table(tmp_path / "out.parquet")["embedding"]
    assert np.array_equal(np.array(column.to_pylist(), np.float32), found)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.txt", "out.npy", "out.parquet"]


def test_json_lines_and_parquet_name_a_field_or_two(opened: Callable[[str], Opened], tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    engine, info = opened("cross")
    records = [{"one": text, "two": "a mat", "n": 1} for text in TEXTS]
    lines(tmp_path, [json.dumps(record) for record in records], "in.jsonl")
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records), tmp_path / "in.parquet")
    for name in ("in.jsonl", "in.parquet"):
        texts = TextsFile.find(str(tmp_path / name), ["one", "two"])
        classify_file(engine, info, texts, tmp_path / f"{name}.out.jsonl", settings())
        found = [json.loads(line) for line in (tmp_path / f"{name}.out.jsonl").read_text().splitlines()]
        assert [each["row"] for each in found] == list(range(7))
        logits = np.array(alone(engine, [(text, "a mat") for text in TEXTS]), np.float64)[:, 0]
        assert [each["score"] for each in found] == pytest.approx((1 / (1 + np.exp(-logits))).tolist(), abs=1e-5)


def test_classes_have_names_and_probabilities(opened: Callable[[str], Opened], tmp_path: Path) -> None:
    engine, info = opened("classifier")
    out = tmp_path / "out.jsonl"
    classify_file(engine, info, TextsFile.find(lines(tmp_path, TEXTS), None), out, settings())
    for line, logits in zip(out.read_text().splitlines(), alone(engine, TEXTS), strict=True):
        record = json.loads(line)
        powers = np.exp(logits.astype(np.float64))
        expected = dict(zip(("no", "yes", "maybe"), (powers / powers.sum()).tolist(), strict=True))
        assert record["scores"] == pytest.approx(expected, abs=1e-5)
        assert record["label"] == max(expected, key=expected.__getitem__)
        assert record["score"] == record["scores"][record["label"]]


def test_words_are_tagged_by_their_first_token(opened: Callable[[str], Opened], tmp_path: Path) -> None:
    engine, info = opened("tagger")
    rows = [["the", "xyz", "sat"], "a dog xyz"]
    lines(tmp_path, [json.dumps({"text": row}) for row in rows], "in.jsonl")
    out = tmp_path / "out.jsonl"
    classify_file(engine, info, TextsFile.find(str(tmp_path / "in.jsonl"), None, words=True), out, settings())
    found = [json.loads(line) for line in out.read_text().splitlines()]
    assert [each["words"] for each in found] == [["the", "xyz", "sat"], ["a", "dog", "xyz"]]
    # [CLS] the x ##y ##z sat [SEP]
    (logits,) = alone(engine, ["the xyz sat"])
    assert len(logits) == 7
    assert found[0]["labels"] == [("O", "X")[int(logits[place].argmax())] for place in (1, 2, 5)]
    with pytest.raises(UsageError, match="cut off cannot be tagged"):
        classify_file(
            engine,
            info,
            TextsFile.find(str(tmp_path / "in.jsonl"), None),
            tmp_path / "o.jsonl",
            settings(truncate=True),
        )


@pytest.mark.parametrize("windows", [0, 2])
@pytest.mark.parametrize("suffix", ["npy", "jsonl"])
def test_an_interrupted_run_goes_on_where_it_ended(
    opened: Callable[[str], Opened],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    suffix: str,
    windows: int,
) -> None:
    engine, info = opened("sentence" if suffix == "npy" else "classifier")
    run = embed_file if suffix == "npy" else classify_file
    texts = TextsFile.find(lines(tmp_path, TEXTS), None)
    run(engine, info, texts, tmp_path / f"whole.{suffix}", settings())
    out = tmp_path / f"out.{suffix}"
    computed: list[int] = []
    interrupting = True
    original = bulk._vectors

    def failing(*arguments: Any) -> Any:
        if interrupting and len(computed) == windows:
            raise KeyboardInterrupt
        computed.append(len(arguments[1]))
        return original(*arguments)

    monkeypatch.setattr(bulk, "_vectors", failing)
    with pytest.raises(KeyboardInterrupt):
        run(engine, info, texts, out, settings())
    assert not out.exists()
    assert f"stopped; {3 * windows} rows are kept, and the same command goes on" in capsys.readouterr().err
    # What was written behind the last note does not count.
    with (tmp_path / f".out.{suffix}.partial").open("ab") as file:
        file.write(b"torn")
    computed.clear()
    interrupting = False
    done = run(engine, info, texts, out, settings())
    assert (done.rows, done.before, computed) == (7, 3 * windows, [3, 3, 1][windows:])
    assert out.read_bytes() == (tmp_path / f"whole.{suffix}").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.txt", f"out.{suffix}", f"whole.{suffix}"]


def test_another_job_does_not_go_on_with_an_unfinished_one(
    opened: Callable[[str], Opened], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, info = opened("sentence")
    texts = TextsFile.find(lines(tmp_path, TEXTS), None)
    out = tmp_path / "out.npy"
    with monkeypatch.context() as patch:
        patch.setattr(bulk, "_vectors", lambda *_: _interrupt())
        with pytest.raises(KeyboardInterrupt):
            embed_file(engine, info, texts, out, settings())
    with pytest.raises(UsageError, match="not made from the same prefix; begin anew with --restart"):
        embed_file(engine, info, texts, out, settings(prefix="the "))
    lines(tmp_path, TEXTS[:4])
    with pytest.raises(UsageError, match="not made from the same texts"):
        embed_file(engine, info, TextsFile.find(str(tmp_path / "in.txt"), None), out, settings())
    done = embed_file(engine, info, TextsFile.find(str(tmp_path / "in.txt"), None), out, settings(restart=True))
    assert (done.rows, done.before) == (4, 0)
    with pytest.raises(UsageError, match="exists; choose another --out or remove it"):
        embed_file(engine, info, texts, out, settings())


def test_two_runs_do_not_write_one_file(tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    with Unfinished(out, {"texts": "a"}) as first:
        first.append(b"1\n", rows=1)
        for restart in (False, True):
            with pytest.raises(UsageError, match=r"another process is writing .*out\.jsonl; wait for it"):
                Unfinished(out, {"texts": "a"}, restart=restart)
        first.append(b"2\n", rows=1)
        first.finish()
    assert out.read_bytes() == b"1\n2\n"


def _interrupt() -> Any:
    raise KeyboardInterrupt


def test_what_is_too_long_is_refused_before_anything_is_computed_or_cut(
    opened: Callable[[str], Opened], tmp_path: Path
) -> None:
    engine, info = opened("sentence")
    texts = TextsFile.find(lines(tmp_path, ["x", "a dog", "x", LONG]), None)
    steps = engine.stats().steps
    with pytest.raises(DataError, match=r"in\.txt, row 4: 122 tokens but the model takes 48; .* --truncate"):
        embed_file(engine, info, texts, tmp_path / "out.npy", settings())
    assert engine.stats().steps == steps
    assert [path.name for path in tmp_path.iterdir()] == ["in.txt"]
    embed_file(engine, info, texts, tmp_path / "out.npy", settings(truncate=True))
    ids = engine.tokenizer.encode_inputs([LONG], max_tokens=48)[0][0]
    with torch.inference_mode():
        (expected,) = engine._pooler.vectors([ids])
    assert np.abs(np.load(tmp_path / "out.npy")[3] - expected).max() < 2e-5


def test_a_prefix_goes_before_every_text(opened: Callable[[str], Opened], tmp_path: Path) -> None:
    engine, info = opened("sentence")
    assert (prefix_of(info, None, None), prefix_of(info, None, "query"), prefix_of(info, "q: ", None)) == (
        "",
        "the ",
        "q: ",
    )
    with pytest.raises(UsageError, match="there is no prompt 'x'; the checkpoint has query, document"):
        prefix_of(info, None, "x")
    texts = TextsFile.find(lines(tmp_path, ["cat", "dog"]), None)
    embed_file(engine, info, texts, tmp_path / "out.npy", settings(prefix="the "))
    expected = np.stack(alone(engine, ["the cat", "the dog"]))
    assert np.abs(np.load(tmp_path / "out.npy") - expected).max() < 2e-5


@pytest.mark.parametrize(
    ("content", "fields", "match"),
    [
        ('{"text": "a"}\n{"text": 1}\n', None, r"in.jsonl:2: field 'text' is int; it must hold a text"),
        ('{"text": "a"}\n{"body": "b"}\n', None, r"in.jsonl:2: no field 'text'; it has 'body' \(--field\)"),
        ('{"text": "a"}\n\n', None, "in.jsonl:2: the line is empty"),
        ('\ufeff["a"]\n', None, "in.jsonl:1: a list; give an object with 'text'"),
        ('{"text": "\\ud800"}\n', None, "in.jsonl:1: field 'text' holds half a surrogate pair"),
        ('{"text": "a"}\n', ["text", "pair"], "in.jsonl:1: no field 'pair'"),
        ("", None, "in.jsonl holds no rows"),
    ],
)
def test_a_wrong_row_is_named(
    opened: Callable[[str], Opened], tmp_path: Path, content: str, fields: list[str] | None, match: str
) -> None:
    engine, info = opened("classifier")
    (tmp_path / "in.jsonl").write_text(content)
    texts = TextsFile.find(str(tmp_path / "in.jsonl"), fields)
    with pytest.raises(DataError, match=match):
        classify_file(engine, info, texts, tmp_path / "out.jsonl", settings())
    assert [path.name for path in tmp_path.iterdir()] == ["in.jsonl"]


def test_files_and_models_that_do_not_fit(
    opened: Callable[[str], Opened], tmp_path: Path, tiny_checkpoint: Path
) -> None:
    plain = lines(tmp_path, TEXTS)
    (tmp_path / "bad.txt").write_bytes(b"a\n\xff\n")
    with pytest.raises(UsageError, match="lines of text, which have no field 'text'"):
        TextsFile.find(plain, ["text"])
    with pytest.raises(UsageError, match="is a folder; name one file"):
        TextsFile.find(str(tmp_path), None)
    with pytest.raises(DataError, match="no file or folder"):
        TextsFile.find(str(tmp_path / "none.txt"), None)
    with pytest.raises(DataError, match=r"bad\.txt:2: not valid UTF-8"):
        list(TextsFile.find(str(tmp_path / "bad.txt"), None).rows())
    texts = TextsFile.find(plain, None)
    for run, kind, name, match in (
        (embed_file, "sentence", "out.txt", "must end in .npy or .parquet"),
        (embed_file, "classifier", "out.npy", "use `trine classify`"),
        (classify_file, "sentence", "out.jsonl", "use `trine embed`"),
        (classify_file, "classifier", "out.json", "must end in .jsonl"),
    ):
        with pytest.raises(UsageError, match=match):
            run(*opened(kind), texts, tmp_path / name, settings())
    with pytest.raises(UsageError, match="generates text and gives no vectors"):
        open_for_vectors(tiny_checkpoint, dtype="auto", device="cpu", batch_tokens=32)

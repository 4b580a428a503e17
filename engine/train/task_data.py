"""The data of a recipe's objective: its tokenizer, its labels, its stream of samples, its sets for evaluation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

from trine.engine.data.chats import ChatLayout, ChatTask
from trine.engine.data.example_stream import ExampleStream, ExampleValidation
from trine.engine.data.examples import Task, read_records
from trine.engine.data.labels import Labels, gather_labels
from trine.engine.data.masking import MaskedRows, Masker, Masking
from trine.engine.data.pairs import PairTask
from trine.engine.data.preferences import PreferenceTask
from trine.engine.data.rows import Rows
from trine.engine.data.samples import SampleStream
from trine.engine.data.sentence_pairs import PairRows
from trine.engine.data.seq2seq_batch import Seq2SeqLayout
from trine.engine.data.shards import Split, open_together
from trine.engine.data.spans import Noise, SpanRows, sentinels_of
from trine.engine.data.stream import MixedSource, Stream
from trine.engine.data.tagged import TagTask
from trine.engine.data.texts import TextTask
from trine.engine.data.validation import ValidationSet
from trine.engine.errors import DataError, UsageError
from trine.engine.log import warn
from trine.engine.model.checkpoint import resolve_checkpoint
from trine.engine.model.config import ModelConfig
from trine.engine.model.lora_base import identify
from trine.engine.text.assistant import teaches_to_end, turn_end
from trine.engine.text.chat import ChatTemplate
from trine.engine.text.chat_styles import STYLES, with_template
from trine.engine.text.tokenizer import Tokenizer
from trine.engine.train.recipe import Recipe
from trine.engine.train.recipe_objective import CHATS

EvaluationSet = ValidationSet | ExampleValidation
REGRESSION_LABEL = "LABEL_0"  # how transformers names the number of a regression


def tokenizer_folder(recipe: Recipe, checkpoint: Path | None) -> Path:
    """Where the tokenizer of the data lies: in prepared text, or by the recipe or the checkpoint for examples.

    Raises `DataError` where sources were prepared with different ones, `UsageError` where a checkpoint has none.
    """
    if not recipe.objective.from_examples:
        return open_together([source.path for source in recipe.data.mixed], "train")[0].tokenizer_dir
    if recipe.data.tokenizer is not None:
        return recipe.data.tokenizer
    assert checkpoint is not None, "the recipe asks for data.tokenizer without model.init_from"
    if not (checkpoint / "tokenizer.json").is_file():
        raise UsageError(f"{checkpoint} has no tokenizer.json to encode examples with; put its tokenizer's files there")
    return checkpoint


def load_tokenizer(recipe: Recipe, folder: Path) -> Tokenizer:
    """The tokenizer in a folder; of conversations with the chat template that the recipe names, if it names one.

    Raises `DataError` where conversations are to be learned and there is no template, `UsageError` where it writes a
    date and the recipe names none.
    """
    tokenizer, objective = Tokenizer.load(folder), recipe.objective
    if objective.kind not in CHATS:
        return tokenizer
    if objective.chat_template is not None:
        tokenizer = with_template(tokenizer, objective.chat_template)
    if tokenizer.chat_template is None:
        styles = " or ".join(f'"{name}"' for name in STYLES)
        raise DataError(
            f"{folder} has no chat template; name one by objective.chat_template: a file that ends in .jinja, or "
            f"{styles} of Trine's own"
        )
    template = _template(recipe, tokenizer)
    if template.reads_date != (objective.chat_date is not None):
        raise UsageError(
            "the chat template writes the date, so that tomorrow the same run would be another one; fix it by "
            f"objective.chat_date={date.today()}"
            if template.reads_date
            else "objective.chat_date has no effect with a chat template that writes no date; remove it"
        )
    if not teaches_to_end(template, tokenizer):
        warn(
            "the chat template writes no special token at the end of an answer, or leaves it out of what it marks as "
            "generated: nothing teaches the model to end its answers"
        )
    return tokenizer


def reference_folder(recipe: Recipe) -> Path:
    """The checkpoint that preferences are measured from: the one that the run began with."""
    assert recipe.model.init_from is not None, "preferences ask for it"
    return resolve_checkpoint(recipe.model.init_from)


def sample_prompt(recipe: Recipe, tokenizer: Tokenizer, prompt: str) -> str | list[int]:
    """What the model is given for one of `eval.sample_prompts`: the text, or the ids of a chat's first message."""
    if recipe.objective.kind not in CHATS:
        return prompt
    return tokenizer.encode(_template(recipe, tokenizer).render([{"role": "user", "content": prompt}]))


def answer_ends(recipe: Recipe, config: ModelConfig, tokenizer: Tokenizer) -> tuple[int, ...]:
    """The ids that end what a model says, that which its chat template writes after an answer among them."""
    known = config.eos_token_ids or (() if tokenizer.eos_id is None else (tokenizer.eos_id,))
    end = turn_end(_template(recipe, tokenizer), tokenizer)
    return known if end is None or end in known else (*known, end)


def _template(recipe: Recipe, tokenizer: Tokenizer) -> ChatTemplate:
    template = ChatTemplate.of(tokenizer, day=recipe.objective.chat_date)
    assert template is not None, "load_tokenizer looks for it"
    return template


def find_labels(recipe: Recipe, known: Sequence[str] | None = None) -> tuple[str, ...]:
    """The classes of the recipe: those it names, or that a checkpoint of the same task has, or of the training data.

    Of a regression one name, of other objectives none.
    """
    objective = recipe.objective
    if objective.kind == "regression":
        return (REGRESSION_LABEL,)
    if objective.kind not in ("classification", "tagging"):
        return ()
    if objective.labels is not None:
        return objective.labels
    if known:
        return tuple(known)
    words = objective.kind == "tagging"
    field = str(objective.value("labels_field" if words else "label_field"))
    records = (record for source in recipe.data.mixed for record in read_records(source.path))
    found = ((record.place, record.field(field)) for record in records)
    each = ((place, one) for place, value in found for one in (value if words and isinstance(value, list) else [value]))
    labels = gather_labels(each)
    if len(labels) < 2:
        raise DataError(
            f"the training data has {len(labels)} different label{'s' * (len(labels) != 1)} ({labels.shown}); there is "
            "nothing to tell apart: give more data, or name all labels in objective.labels"
        )
    return labels.names


@dataclass(frozen=True, kw_only=True)
class TaskData:
    """What turns the data of a recipe into batches; `config` is that of the model with its head."""

    recipe: Recipe
    config: ModelConfig
    tokenizer: Tokenizer
    tokenizer_dir: Path
    labels: tuple[str, ...]

    @property
    def document_mask(self) -> bool:
        """Whether documents that share a row are kept apart."""
        return self.recipe.data.document_mask is not False and self.recipe.objective.kind != "span_corruption"

    def stream(self) -> Stream:
        """The samples of training."""
        data, seed = self.recipe.data, self.recipe.train.seed
        sources = [MixedSource(one.path, one.weight, one.max_epochs, one.max_tokens) for one in data.mixed]
        if self.recipe.objective.from_examples:
            return ExampleStream(sources, self._task(), self.tokenizer, tokenizer_dir=self.tokenizer_dir, seed=seed)
        return SampleStream(
            sources, seq_len=data.seq_len, seed=seed, document_mask=self.document_mask, rows=self._rows()
        )

    def evaluation_set(self, paths: Sequence[Path], split: Split) -> EvaluationSet:
        """A set for evaluation: a split of prepared folders, or one file of examples."""
        recipe = self.recipe
        batch = recipe.eval.batch_size or recipe.train.micro_batch_size or recipe.train.batch_size
        most = recipe.eval.max_batches * batch or None
        if recipe.objective.from_examples:
            [path] = paths
            return ExampleValidation(path, self._task(), self.tokenizer, max_examples=most)
        return ValidationSet(
            paths,
            seq_len=recipe.data.seq_len,
            max_tokens=None if most is None else most * recipe.data.seq_len,
            document_mask=self.document_mask,
            split=split,
            rows=self._rows(),
        )

    @property
    def _pad_id(self) -> int:
        """What fills rows; nothing is read from it, so any token will do where there is none for it."""
        return next((one for one in (self.config.pad_token_id, self.tokenizer.pad_id) if one is not None), 0)

    def _rows(self) -> Rows | None:
        """What makes rows of windows of prepared text; None for next tokens."""
        objective, data, tokenizer = self.recipe.objective, self.recipe.data, self.tokenizer
        if objective.kind == "span_corruption":
            noise = Noise(density=objective.value("noise_density"), mean_span=objective.value("mean_span"))
            layout = self._layout(noise.lengths(max(2, noise.text_len(data.seq_len)))[1])
            return SpanRows(noise=noise, layout=layout, sentinels=sentinels_of(tokenizer), eos_id=self._eos_id)
        if objective.kind != "masked_lm":
            return None
        names = ("mask_share", "random_share", "whole_words")
        masking = Masking(fraction=objective.value("mask_fraction"), **{name: objective.value(name) for name in names})
        masker = Masker(tokenizer, masking)
        first = tokenizer.bos_id if tokenizer.cls_id is None else tokenizer.cls_id
        if not objective.value("next_sentence"):
            return MaskedRows(
                seq_len=data.seq_len,
                document_mask=self.document_mask,
                masker=masker,
                first_id=first,
                pad_id=self._pad_id,
            )
        if first is None or tokenizer.sep_id is None:
            raise DataError(
                "the data's tokenizer names no cls_token or no sep_token, which frame the two texts of next_sentence; "
                "train one with `trine tokenizer train --kind wordpiece` or `--roles encoder`"
            )
        sep = tokenizer.sep_id
        return PairRows(seq_len=data.seq_len, masker=masker, first_id=first, sep_id=sep, pad_id=self._pad_id)

    def _task(self) -> Task:
        """What makes examples of records, and batches of them."""
        objective, data = self.recipe.objective, self.recipe.data
        common: dict[str, Any] = {"tokenizer": self.tokenizer, "truncate": data.truncate}
        if objective.kind in CHATS:
            layout = ChatLayout(
                template=_template(self.recipe, self.tokenizer),
                seq_len=data.seq_len,
                pad_id=self._pad_id,
                packed=data.packing,
                **common,
            )
            if objective.kind == "chat":
                return ChatTask(layout=layout, train_on=objective.value("train_on"))
            return PreferenceTask(layout=layout, reference=identify(reference_folder(self.recipe)).marks)
        if objective.kind == "seq2seq":
            return PairTask(
                layout=self._layout(data.target_len or data.seq_len),
                source_field=objective.value("source_field"),
                target_field=objective.value("target_field"),
                eos_id=self._eos_id,
                **common,
            )
        common |= {"seq_len": data.seq_len, "pad_id": self._pad_id}
        if objective.kind == "tagging":
            fields = {name: objective.value(name) for name in ("words_field", "labels_field")}
            return TagTask(labels=Labels(self.labels), **fields, **common)
        fields = {name: objective.value(name) for name in ("text_field", "pair_field", "label_field")}
        labels = Labels(self.labels) if objective.kind == "classification" else None
        return TextTask(labels=labels, **fields, **common)

    @property
    def _eos_id(self) -> int:
        found = [*self.config.eos_token_ids, *([] if self.tokenizer.eos_id is None else [self.tokenizer.eos_id])]
        if not found:
            raise DataError("neither model nor tokenizer names an eos_token, which sources and targets end with")
        return found[0]

    def _layout(self, target_len: int) -> Seq2SeqLayout:
        assert self.config.decoder_start_token_id is not None
        return Seq2SeqLayout(
            start_id=self.config.decoder_start_token_id,
            pad_id=self._pad_id,
            source_len=self.recipe.data.seq_len,
            target_len=target_len,
            packed=self.recipe.data.packing,
        )

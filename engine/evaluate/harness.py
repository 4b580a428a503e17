"""A model of Trine as lm-evaluation-harness sees one: `loglikelihood`, `loglikelihood_rolling`, `generate_until`.

The harness (`pip install "trine[eval]"`) builds the requests of its tasks and makes metrics of the answers; here is
what answers. Texts become ids as its own class for `transformers` makes them so (its `TemplateLM` splits context from
continuation), so the answers are the same numbers. Every answer is kept as it comes (`answers.py`).

This module imports `lm_eval`: import it only where tasks are run.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from lm_eval.api.model import TemplateLM
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from trine.engine.errors import ContextLengthError, DataError, UsageError
from trine.engine.evaluate.answers import Answers
from trine.engine.evaluate.scoring import Pair, score
from trine.engine.evaluate.task_generation import cut, sampling_of
from trine.engine.generate.engine import Engine, EngineConfig
from trine.engine.generate.offline import complete_each
from trine.engine.generate.plain import generate
from trine.engine.generate.request import Completion
from trine.engine.generate.sampling import SamplingParams
from trine.engine.log import progress, say
from trine.engine.model.transformer import Transformer
from trine.engine.text.chat import ChatTemplate
from trine.engine.text.tokenizer import Tokenizer

# Completions under way at once.
_MAX_RUNNING = 32


class TrineLM(TemplateLM):  # type: ignore[misc]
    """A loaded model that answers the harness's requests, batched by length, with progress on stderr.

    Args:
        model: as `load_for_inference` gives it; with an adapter attached where `adapted`.
        tokenizer: the model's.
        answers: where they are kept, and found again.
        adapted: the model computes with an adapter, which its own forward knows and the batching engine does not.
        max_length: tokens in view at most; default the model's context.
        chat_template: the name of the tokenizer's chat template.
    """

    def __init__(
        self,
        model: Transformer,
        tokenizer: Tokenizer,
        *,
        answers: Answers,
        adapted: bool = False,
        max_length: int | None = None,
        chat_template: str = "default",
    ) -> None:
        super().__init__()
        if model.config.encoder is not None or model.config.head is not None:
            raise UsageError(f"tasks are for models that go on with a text; a {model.config.family} model does not")
        context = model.config.max_positions
        if max_length is not None and not 2 <= max_length <= context:
            raise ContextLengthError(f"max_length {max_length} is not from 2 to the model's context of {context}")
        self._model, self._tokenizer = model, tokenizer
        self._answers, self._adapted = answers, adapted
        self._template = chat_template
        self.max_length = context if max_length is None else max_length
        self._engine: Engine | None = None

    @property
    def eot_token_id(self) -> int:
        """The end-of-text token."""
        return self._token(self._tokenizer.eos_id)

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text that has nothing before it: the beginning-of-text token, or else the other one."""
        return self._token(self._tokenizer.eos_id if self._tokenizer.bos_id is None else self._tokenizer.bos_id)

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Ids of a text: with what the tokenizer puts around one, unless it begins with that or is told not to."""
        if add_special_tokens is None:
            prefix = self._tokenizer.decode([self.prefix_token_id], skip_special_tokens=False)
            add_special_tokens = not string.startswith(prefix)
        return self._tokenizer.encode(string, add_special_tokens=add_special_tokens)

    # --- log-likelihoods ----------------------------------------------------------------------------------------------

    def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """For each (context, continuation): log p(continuation | context), and whether it is the greedy one."""
        keys = [self._answers.key("loglikelihood", list(one.args)) for one in requests]
        self._say_known("log-likelihoods", keys)
        super().loglikelihood(self._open(requests, keys), disable_tqdm=True)
        return [(value, greedy) for value, greedy in map(self._answered, keys)]

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[tuple[str, str], list[int], list[int]]], **_: Any
    ) -> list[tuple[float, bool]]:
        for (context, continuation), _context, ids in requests:
            if not ids:
                raise DataError(f"{continuation!r} has no tokens of its own after {context[-60:]!r}; change the task")
        pairs = [Pair(context, continuation) for _texts, context, continuation in requests]
        found: list[tuple[float, bool]] = [(0.0, False)] * len(pairs)
        for number, one in score(
            self._model, pairs, max_length=self.max_length, progress=progress, what="log-likelihoods"
        ):
            found[number] = one.log_likelihood, one.greedy
            key = self._answers.key("loglikelihood", list(requests[number][0]))
            self._answers.add([(key, list(found[number]))])
        return found

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """For each text: the log-likelihood of all of it, in disjoint windows as long as the context."""
        keys = [self._answers.key("loglikelihood_rolling", list(one.args)) for one in requests]
        self._say_known("texts", keys)
        pairs, owners = [], []
        for one in self._open(requests, keys):
            key, (text,) = self._answers.key("loglikelihood_rolling", list(one.args)), one.args
            windows = list(
                get_rolling_token_windows(
                    self.tok_encode(text), self.prefix_token_id, max_seq_len=self.max_length, context_len=1
                )
            )
            if not windows:
                self._answers.add([(key, 0.0)])
            for window in windows:
                pairs.append(Pair(*make_disjoint_window(window)))
                owners.append(key)
        open_windows, sums = Counter(owners), dict.fromkeys(owners, 0.0)
        for number, found in score(self._model, pairs, max_length=self.max_length, progress=progress, what="texts"):
            key = owners[number]
            sums[key] += found.log_likelihood
            open_windows[key] -= 1
            if not open_windows[key]:
                self._answers.add([(key, sums[key])])
        return [float(self._answered(key)) for key in keys]

    # --- generation ---------------------------------------------------------------------------------------------------

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """For each (context, settings): what the model says next, up to the first of the settings' stop strings."""
        keys = list(self._generation_keys(requests))
        self._say_known("generations", keys)
        work = []
        for one, key in zip(self._open(requests, keys), self._open(keys, keys), strict=True):
            context, wanted = one.args
            params = sampling_of(wanted, stop_ids=[self.eot_token_id], seed=int(key[:15], 16))
            room = self.max_length - params.max_tokens
            if room < 1:
                raise UsageError(
                    f"a task asks for {params.max_tokens} new tokens, which leave no room for its text in a context of "
                    f"{self.max_length}; give --max-gen-tokens a smaller number"
                )
            work.append((self.tok_encode(context)[-room:], params, key))
        work.sort(key=lambda item: -len(item[0]))
        shown = progress(self._completions([(ids, params) for ids, params, _ in work]), total=len(work), what="texts")
        for completion, (_, params, key) in zip(shown, work, strict=True):
            if completion.error is not None:
                raise DataError(f"a text could not be generated: {completion.error}")
            self._answers.add([(key, cut(completion.text, params.stop))])
        return [str(self._answered(key)) for key in keys]

    def _generation_keys(self, requests: Sequence[Any]) -> Iterator[str]:
        """A request that samples and is asked for several times has an answer each time."""
        times: Counter[str] = Counter()
        for one in requests:
            key = self._answers.key("generate_until", list(one.args))
            samples = not sampling_of(one.args[1], stop_ids=(), seed=0).greedy
            if samples and times[key]:
                yield self._answers.key("generate_until", [*one.args, times[key]])
            else:
                yield key
            times[key] += 1

    def _completions(self, work: Sequence[tuple[list[int], SamplingParams]]) -> Iterator[Completion]:
        if not work:
            return
        if self._adapted:
            for start in range(0, len(work), _MAX_RUNNING):
                part = work[start : start + _MAX_RUNNING]
                yield from generate(
                    self._model,
                    self._tokenizer,
                    [ids for ids, _ in part],
                    [params for _, params in part],
                    batch_size=_MAX_RUNNING,
                )
            return
        if self._engine is None:
            self._engine = Engine(self._model, self._tokenizer, EngineConfig(max_running=_MAX_RUNNING))
        yield from complete_each(self._engine, ((ids, params, None) for ids, params in work))

    # --- conversations ------------------------------------------------------------------------------------------------

    def apply_chat_template(self, chat_history: Sequence[Mapping[str, str]], add_generation_prompt: bool = True) -> str:
        """The conversation as text; without a prompt for the answer, it ends within its last message, to be gone on."""
        template = ChatTemplate.of(self._tokenizer, self._template)
        if template is None:
            raise UsageError("the tokenizer has no chat template; leave out --chat")
        text = template.render(chat_history, add_generation_prompt=add_generation_prompt)
        if add_generation_prompt:
            return text
        last = chat_history[-1]["content"].strip()
        return text[: text.rindex(last) + len(last)]

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """The source of the template in use, for the record."""
        return self._tokenizer.chat_templates.get(self._template) if chat_template else None

    @property
    def tokenizer_name(self) -> str:
        """Tells this tokenizer from others."""
        return self._tokenizer.fingerprint

    # --- answers ------------------------------------------------------------------------------------------------------

    def _token(self, token_id: int | None) -> int:
        if token_id is None:
            raise UsageError("the tokenizer names no end-of-text token, which tasks need; name one in its config")
        return token_id

    def _say_known(self, what: str, keys: Sequence[str]) -> None:
        known = sum(self._answers.get(key) is not None for key in keys)
        if known:
            say(f"{known:,} of {len(keys):,} {what} were answered before")

    def _answered(self, key: str) -> Any:
        answer = self._answers.get(key)
        assert answer is not None
        return answer

    def _open(self, items: Iterable[Any], keys: Sequence[str]) -> list[Any]:
        """Those without an answer, each key once."""
        seen: set[str] = set()
        found = []
        for item, key in zip(items, keys, strict=True):
            if self._answers.get(key) is None and key not in seen:
                seen.add(key)
                found.append(item)
        return found

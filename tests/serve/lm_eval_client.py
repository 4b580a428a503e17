"""lm-evaluation-harness as a client: `lm_eval_client.py URL CHECKPOINT CASES`, in a process of its own.

CASES is a JSON list of [context, continuation]. Prints one JSON object: the log-likelihood of each case and whether it
is the greedy continuation, that of each whole text, and what is generated from each context up to a line's end.
"""

from __future__ import annotations

import json
import sys

from lm_eval.api.instance import Instance
from lm_eval.models.openai_completions import LocalCompletionsAPI


def instance(kind: str, *arguments: object) -> Instance:
    return Instance(request_type=kind, doc={}, arguments=arguments, idx=0)  # type: ignore[arg-type]


def main() -> None:
    url, checkpoint = sys.argv[1:3]
    cases = json.loads(sys.argv[3])
    model = LocalCompletionsAPI(
        model="tiny",
        base_url=f"{url}/completions",
        tokenizer=checkpoint,
        tokenizer_backend="huggingface",
        batch_size=2,
        num_concurrent=2,
        max_length=64,
        max_retries=1,
    )
    until = {"until": ["\n"], "max_gen_toks": 12, "temperature": 0}
    found = {
        "loglikelihood": model.loglikelihood([instance("loglikelihood", *case) for case in cases]),
        "rolling": model.loglikelihood_rolling([instance("loglikelihood_rolling", "".join(case)) for case in cases]),
        "generate": model.generate_until([instance("generate_until", context, dict(until)) for context, _ in cases]),
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main()

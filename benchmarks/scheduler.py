"""What a step of the batching engine costs on the host besides the model: scheduling, drafts, grammar masks.

    python -m trine.benchmarks.scheduler [tokenizer folder]

Scheduling: `schedule`, `commit` and appending one token to each of R decoding sequences, prefix sharing on, so that one
step in 16 fills a block and hashes it; and the cost of hashing the prompts that are admitted. Drafts: one look-up in a
sequence of 4,096 tokens without repetition, which searches all of it. Masks: along a JSON text, with the tokenizer
given or one of at most 512 ids. Figures are processor time, in the fastest of many turns: a busy machine adds little.
The last line on stdout is one JSON object.
"""

from __future__ import annotations

import json
import random
import sys
import time
from collections.abc import Callable

from trine.engine.env import environment
from trine.engine.generate.blocks import BlockPool
from trine.engine.generate.grammar import Grammar, GrammarCompiler
from trine.engine.generate.lookup import propose
from trine.engine.generate.scheduler import Scheduler
from trine.engine.generate.sequence import Sequence
from trine.engine.text.tokenizer import Tokenizer
from trine.engine.text.train_tokenizer import train_bpe

RUNNING = (1, 16, 64, 256, 1024)
PROMPT, BLOCK, TURNS = 64, 16, 12
SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string"}, "numbers": {"type": "array", "items": {"type": "number"}}},
    "required": ["name", "numbers"],
}
TEXT = '{"name": "a name of some length", "numbers": [1, 2.5, -3e7, 4, 5, 6, 7, 8, 9]}'


def microseconds(call: Callable[[], object], *, calls: int) -> float:
    """Processor time of one call, in the fastest of `TURNS` turns of so many calls."""
    turns = []
    for _ in range(TURNS):
        began = time.process_time()
        for _ in range(calls):
            call()
        turns.append((time.process_time() - began) / calls)
    return min(turns) * 1e6


def decoding(num_running: int) -> float:
    """Microseconds of a step of R decoding sequences, each with a prompt of its own."""
    length = PROMPT + BLOCK * TURNS + BLOCK
    pool = BlockPool(num_running * (length // BLOCK + 2), BLOCK)
    scheduler = Scheduler(pool, max_batch_tokens=num_running * PROMPT, max_running=num_running, max_waiting=num_running)
    for index in range(num_running):
        prompt = [index, *range(PROMPT - 1)]
        scheduler.add(
            Sequence(
                id=f"{index}/0", request_id=str(index), tokens=prompt, num_prompt=PROMPT, max_total_tokens=length + 1
            )
        )

    def step() -> None:
        plan = scheduler.schedule()
        scheduler.commit(plan)
        for chunk in plan.chunks:
            chunk.sequence.tokens.append(7)

    while scheduler.num_waiting:
        step()
    return microseconds(step, calls=BLOCK)


def hashing() -> float:
    """Nanoseconds a token to hash a long prompt's blocks."""
    pool = BlockPool(1, BLOCK)
    tokens = list(range(BLOCK * 256))
    return microseconds(lambda: pool.extend_hashes([], tokens, len(tokens), b""), calls=4) / len(tokens) * 1e3


def looking_up() -> float:
    """Microseconds of one draft that finds nothing."""
    tokens = random.Random(0).sample(range(100_000), 4096)
    assert propose(tokens, max_tokens=8) == []
    return microseconds(lambda: propose(tokens, max_tokens=8), calls=8)


def masking(tokenizer: Tokenizer) -> tuple[float, float]:
    """(milliseconds to compile the schema, microseconds a token for its mask and acceptance)."""
    eos_ids = frozenset(() if tokenizer.eos_id is None else (tokenizer.eos_id,))
    compiler = GrammarCompiler(tokenizer, eos_ids)
    compiler.matcher(Grammar("json_object"))  # the tokenizer's own part is made once
    began = time.process_time()
    first = compiler.matcher(Grammar("json_schema", json.dumps(SCHEMA)))
    compiled = (time.process_time() - began) * 1e3
    ids = tokenizer.encode(TEXT, parse_special=False)

    def follow() -> None:
        matcher = first.copy()
        for token_id in ids:
            matcher.mask()
            matcher.accept(token_id)
        assert matcher.finished

    return compiled, microseconds(follow, calls=2) / len(ids)


def main() -> None:
    """Print a line for each figure, and all of them as JSON."""
    tokenizer = Tokenizer.load(sys.argv[1]) if len(sys.argv) > 1 else train_bpe([TEXT * 8], vocab_size=512)
    steps = {num_running: decoding(num_running) for num_running in RUNNING}
    for num_running, cost in steps.items():
        print(f"{num_running:5d} decoding: {cost:8.1f} us a step, {cost / num_running:5.2f} us a sequence")
    hashed, found = hashing(), looking_up()
    print(f"hashing a prompt: {hashed:.0f} ns a token; a look-up in 4096 tokens: {found:.0f} us")
    compiled, mask = masking(tokenizer)
    print(f"JSON schema, {tokenizer.vocab_size} ids: compiled in {compiled:.1f} ms, {mask:.1f} us a token")
    figures = {
        "microseconds_per_step": steps,
        "hash_nanoseconds_per_token": hashed,
        "lookup_microseconds": found,
        "grammar_vocabulary": tokenizer.vocab_size,
        "grammar_compile_milliseconds": compiled,
        "grammar_microseconds_per_token": mask,
    }
    print(json.dumps({"figures": figures, "environment": environment()}))


if __name__ == "__main__":
    main()

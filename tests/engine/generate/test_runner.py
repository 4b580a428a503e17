"""Block tables that are kept between steps equal those made anew, whatever the scheduler does to a sequence."""

from __future__ import annotations

import random

import numpy as np
import pytest

from trine.engine.generate.runner import BlockTables
from trine.engine.generate.sequence import Sequence

SIZE = 4


@pytest.mark.parametrize("seed", range(20))
def test_kept_tables_equal_fresh_ones(seed: int) -> None:
    rng = random.Random(seed)
    tables = BlockTables(6, 40)
    running: list[Sequence] = []
    for step in range(60):
        if len(running) < 6 and rng.random() < 0.5:
            sequence = Sequence(id=str(step), request_id=str(step), tokens=[1], num_prompt=1, max_total_tokens=160)
            sequence.blocks = [rng.randrange(1000) for _ in range(rng.randint(1, 10))]
            running.append(sequence)
        for sequence in list(running):
            chance = rng.random()
            if chance < 0.1:  # ended, or set back: what it holds later is another table
                tables.release(sequence)
                running.remove(sequence)
            elif chance < 0.3:  # blocks that were not computed yet are replaced by some that others have computed
                begin = sequence.num_computed // SIZE
                for place in range(begin, rng.randint(begin, len(sequence.blocks))):
                    sequence.blocks[place] = rng.randrange(1000)
                    sequence.num_computed = (place + 1) * SIZE
        chosen = [sequence for sequence in running if rng.random() < 0.7]
        if not chosen:
            continue
        starts = np.array([sequence.num_computed for sequence in chosen])
        found = tables.rows(chosen, starts // SIZE)
        for row, sequence in zip(found.tolist(), chosen, strict=True):
            assert row[: len(sequence.blocks)] == sequence.blocks
            sequence.num_computed += rng.randint(1, 6)
            while len(sequence.blocks) * SIZE <= sequence.num_computed:
                sequence.blocks.append(rng.randrange(1000))
            if rng.random() < 0.2:  # the block that is written next is copied for this sequence alone
                sequence.blocks[sequence.num_computed // SIZE] = rng.randrange(1000)
        for sequence in [one for one in running if len(one.blocks) > 36]:
            tables.release(sequence)
            running.remove(sequence)


def test_every_row_is_free_again() -> None:
    tables = BlockTables(2, 4)
    for round_number in range(5):
        pair = [
            Sequence(
                id=str(n), request_id=str(n), tokens=[1], num_prompt=1, max_total_tokens=9, blocks=[n, round_number]
            )
            for n in range(2)
        ]
        assert tables.rows(pair, np.array([0, 0])).tolist() == [[0, round_number], [1, round_number]]
        if round_number % 2:
            tables.clear()
        else:
            for sequence in (*pair, pair[0]):  # the second time it is not there any more
                tables.release(sequence)

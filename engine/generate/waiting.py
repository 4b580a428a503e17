"""The queue of sequences that wait to be admitted, in two orders: who comes first, and who has least to do."""

from __future__ import annotations

import heapq

from trine.engine.generate.sequence import Sequence


def work(sequence: Sequence) -> tuple[int, int, tuple[int, int, int]]:
    """Order among those that are not first: by priority, then least work, then rank."""
    return sequence.priority, sequence.num_uncomputed, sequence.rank


class WaitingQueue:
    """Waiting sequences in two orders at once, two heaps. What left stays in a heap until it comes up there."""

    def __init__(self) -> None:
        self._tickets: dict[Sequence, int] = {}  # of those that are here; a heap's entry counts if its ticket is this
        self._by_rank: list[tuple[tuple[int, int, int], int, Sequence]] = []
        self._by_work: list[tuple[tuple[int, int, tuple[int, int, int]], int, Sequence]] = []
        self._pushes = 0

    def __len__(self) -> int:
        return len(self._tickets)

    def push(self, sequence: Sequence) -> None:
        self._pushes += 1
        self._tickets[sequence] = self._pushes
        heapq.heappush(self._by_rank, (sequence.rank, self._pushes, sequence))
        heapq.heappush(self._by_work, (work(sequence), self._pushes, sequence))

    def remove(self, sequence: Sequence) -> None:
        del self._tickets[sequence]
        if len(self._by_rank) + len(self._by_work) > 4 * len(self._tickets) + 64:
            self._by_rank = [entry for entry in self._by_rank if self._tickets.get(entry[2]) == entry[1]]
            self._by_work = [entry for entry in self._by_work if self._tickets.get(entry[2]) == entry[1]]
            heapq.heapify(self._by_rank)
            heapq.heapify(self._by_work)

    def first(self) -> Sequence | None:
        """The one with the lowest rank."""
        while self._by_rank and self._tickets.get(self._by_rank[0][2]) != self._by_rank[0][1]:
            heapq.heappop(self._by_rank)
        return self._by_rank[0][2] if self._by_rank else None

    def smallest(self) -> Sequence | None:
        """The one of least work, of the best priority."""
        while self._by_work and self._tickets.get(self._by_work[0][2]) != self._by_work[0][1]:
            heapq.heappop(self._by_work)
        return self._by_work[0][2] if self._by_work else None

    def take_whole(self, budget: int) -> list[Sequence]:
        """Remove and return those that are computed whole in the next step: the first one, however long it is, and of
        the others those of least work that fit in the rest of the budget. So a long text neither waits for ever nor
        keeps short ones waiting.
        """
        taken: list[Sequence] = []
        candidate = self.first()
        while candidate is not None and (not taken or len(candidate.tokens) <= budget):
            self.remove(candidate)
            taken.append(candidate)
            budget -= len(candidate.tokens)
            candidate = self.smallest()
        return taken

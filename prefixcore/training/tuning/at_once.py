"""How many candidates to train in one batch: found while they train, from the seconds that steps take."""

from __future__ import annotations

import math

MOST_TOKENS = 2**14
"""Of one batch with the examples of all its candidates: more only take more memory."""

TIMES = 2
"""How often each number is tried: the first step of a size pays for what is made once."""


class AtOnce:
    """Chooses how many candidates share a batch.

    Whatever is chosen, the same is learnt. In the first steps powers of two, and all, take turns; then the quickest for
    a candidate is taken.

    Args:
        candidates: how many there are at first.
        tokens: of a batch for one candidate, about.
    """

    def __init__(self, candidates: int, tokens: int) -> None:
        most = min(candidates, max(1, MOST_TOKENS // max(1, tokens)))
        powers = [2**i for i in range(int(math.log2(most)) + 1)]
        self.seconds: dict[int, list[float]] = {count: [] for count in sorted({*powers, most})}

    def __call__(self, candidates: int) -> int:
        """How many to put into one batch now, of as many candidates as there are."""
        options = [count for count in self.seconds if count <= candidates]
        for count in options:
            if len(self.seconds[count]) < TIMES:
                return count
        return min(options, key=self.per_candidate)

    def note(self, at_once: int, candidates: int, seconds: float) -> None:
        """Takes note of a step of so many candidates."""
        self.seconds[at_once].append(seconds / candidates)

    def per_candidate(self, at_once: int) -> float:
        """Seconds of a step for one candidate, the least of those seen; infinity: none was seen."""
        return min(self.seconds[at_once], default=math.inf)

    def table(self) -> dict[int, float]:
        """Seconds of a step for one candidate, by how many shared a batch."""
        return {count: self.per_candidate(count) for count, seen in self.seconds.items() if seen}

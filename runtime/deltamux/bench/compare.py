"""Ratios on a noisy machine: candidate and reference alternate, and each round has a ratio of its own."""

import asyncio
import statistics
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import NamedTuple

from deltamux.bench.measure import Measurement

Figure = Callable[[Measurement], float]
"""What is compared: of a measurement, one number."""


class Candidate(NamedTuple):
    """A name, and what runs it once: the argument is the round's seed."""

    name: str
    run: Callable[[str], Awaitable[Measurement]]


@dataclass(frozen=True)
class Comparison:
    """A candidate and its reference, measured one after the other, once per round.

    Attributes:
        name: of the candidate.
        own: its measurements, by round; reference: the reference's of the same rounds.
    """

    name: str
    own: tuple[Measurement, ...]
    reference: tuple[Measurement, ...]

    def ratios(self, figure: Figure = lambda m: m.tokens_per_second) -> list[float]:
        """Returns each round's figure as a multiple of the reference's."""
        return [figure(own) / figure(other) for own, other in zip(self.own, self.reference, strict=True)]

    def ratio(self, figure: Figure = lambda m: m.tokens_per_second) -> float:
        """Returns the median of the rounds' ratios."""
        return statistics.median(self.ratios(figure))

    @property
    def whole(self) -> Measurement:
        """All rounds of the candidate as one measurement."""
        return reduce(Measurement.and_then, self.own)

    @property
    def whole_reference(self) -> Measurement:
        return reduce(Measurement.and_then, self.reference)


async def interleave(
    reference: Candidate,
    candidates: Sequence[Candidate],
    repeats: int,
    progress: Callable[[str], None] = lambda text: None,
    *,
    settle_seconds: float = 0.0,
) -> list[Comparison]:
    """Measures every candidate right next to a run of the reference, `repeats` times, after one round that warms up.

    A run of the reference comes between two candidates and is compared with both: A R B, C R D, and so on. Every second
    round goes backwards, so that what drifts does not favour those that come first; one that is left over comes before
    the reference in one round and after it in the next.

    Args:
        progress: called with what runs next.
        settle_seconds: pause before each run, where candidate and reference are different engines of one machine: a
            worker of vLLM looks for work at full speed for a second after its last, and would slow the next one down.
    """
    own: dict[str, list[Measurement]] = {c.name: [] for c in candidates}
    paired: dict[str, list[Measurement]] = {c.name: [] for c in candidates}
    for repeat in range(repeats + 1):
        order = candidates if repeat % 2 else candidates[::-1]
        for pair in (order[i : i + 2] for i in range(0, len(order), 2)):
            ran = dict[str, Measurement]()
            order_of_pair = (pair[0], reference, *pair[1:])
            for candidate in order_of_pair if len(pair) > 1 or repeat % 2 else order_of_pair[::-1]:
                progress(f"round {repeat} of {repeats}: {candidate.name}")
                await asyncio.sleep(settle_seconds)
                ran[candidate.name] = await candidate.run(f"{repeat} {candidate.name} {pair[0].name}")
            if repeat:
                for candidate in pair:
                    own[candidate.name].append(ran[candidate.name])
                    paired[candidate.name].append(ran[reference.name])
    return [Comparison(c.name, tuple(own[c.name]), tuple(paired[c.name])) for c in candidates]

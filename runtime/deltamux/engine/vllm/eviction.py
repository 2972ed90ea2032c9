"""`EvictionPolicy`: what a bounded cache keeps, by reuse and by what a reload costs. Pure: no tensors, no vLLM.

A key is worth its uses, each of which halves with age, times its cost (LRFU, Lee et al. 2001, with costs as GreedyDual
has them). A scan of keys that are used once pushes out none that is used again and again, and keys that were used often
fade.
"""

import math
from collections.abc import Collection, Hashable, Iterator
from dataclasses import dataclass
from typing import Generic, TypeVar

K = TypeVar("K", bound=Hashable)

HALF_LIFE = 8
"""Uses of the cache, in multiples of its capacity, after which a use counts half."""


@dataclass
class _Usage:
    """A key's uses, decayed to `at` (a time in uses of the cache), and the cost of a reload in any one unit."""

    uses: float
    at: int
    cost: float = 1.0
    held: int = 0
    pinned: bool = False


class EvictionPolicy(Generic[K]):
    """The keys that a cache of bounded size keeps: device slots, and host memory.

    Args:
        capacity: keys to keep; more only while more than that are held or pinned.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self._half_life = HALF_LIFE * capacity
        self._usages: dict[K, _Usage] = {}
        self._clock = 0

    def __contains__(self, key: K) -> bool:
        return key in self._usages

    def __iter__(self) -> Iterator[K]:
        return iter(self._usages)

    def __len__(self) -> int:
        return len(self._usages)

    def use(self, key: K) -> None:
        """Counts a use; a new key enters."""
        self._clock += 1
        usage = self._usages.setdefault(key, _Usage(0.0, self._clock))
        age = self._clock - usage.at
        usage.uses = 1.0 + usage.uses * 0.5 ** (age / self._half_life)
        usage.at = self._clock

    def set_cost(self, key: K, cost: float) -> None:
        """Sets what a reload of a key would take; more than nothing."""
        self._usages[key].cost = cost

    def hold(self, key: K) -> None:
        """Keeps a key until as many `release`."""
        self._usages[key].held += 1

    def release(self, key: K) -> None:
        self._usages[key].held -= 1

    def idle(self, key: K) -> bool:
        """Returns whether a key is neither held nor pinned."""
        usage = self._usages[key]
        return not usage.held and not usage.pinned

    def pin(self, key: K, pinned: bool) -> None:
        self._usages[key].pinned = pinned

    def remove(self, key: K) -> None:
        """Forgets a key; one that is not there may be removed."""
        self._usages.pop(key, None)

    def victim(self, spared: Collection[K] = (), *, pinned_too: bool = False) -> K | None:
        """Returns the key worth least of those that may go: not held, not `spared`, not pinned unless `pinned_too`."""
        idle = (k for k, s in self._usages.items() if not s.held and (pinned_too or not s.pinned))
        return min((k for k in idle if k not in spared), key=self._worth, default=None)

    def next_eviction(self) -> K | None:
        """Returns the key to drop next; None while the cache is within its capacity, or no key may go."""
        return self.victim() if len(self) > self.capacity else None

    def _worth(self, key: K) -> float:
        # As a logarithm, in which the age of all keys is the same summand: nothing overflows or needs an update.
        usage = self._usages[key]
        return math.log2(usage.uses * usage.cost) + usage.at / self._half_life

"""The adapters of a step when more of them have work than there are slots."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deltamux.engine.vllm.scheduling.time_slicing import QUANTUM, AdapterTimeSlicer, Work

DECODES = Work(None, True)


def play(slicer: AdapterTimeSlicer, work: dict[int, Work]) -> set[int]:
    """One step in which all that is chosen runs."""
    chosen = slicer.choose(work)
    ran = set(work) if chosen is None else set(chosen)
    slicer.record(work, ran)
    return ran


def test_adapters_that_fit_are_all_in_every_step() -> None:
    slicer = AdapterTimeSlicer(4)
    assert slicer.choose(dict.fromkeys(range(4), DECODES)) is None


@pytest.mark.slow
@given(st.integers(1, 6), st.integers(2, 20), st.data())
def test_no_adapter_with_work_waits_longer_than_the_bound(slots: int, adapters: int, data: st.DataObject) -> None:
    slicer = AdapterTimeSlicer(slots)
    waited: Counter[int] = Counter()
    arrivals = iter(range(1, 10_000))
    for _ in range(3 * slicer.max_wait(adapters)):
        starting = data.draw(st.sets(st.integers(0, adapters - 1), max_size=adapters), label="starting")
        work = {a: Work(float(next(arrivals)) if a in starting else None, True) for a in range(adapters)}
        ran = play(slicer, work)
        assert len(ran) <= slots or adapters <= slots
        for adapter in work:
            waited[adapter] = 0 if adapter in ran else waited[adapter] + 1
            assert waited[adapter] <= slicer.max_wait(adapters)


def test_decoding_adapters_share_the_steps_evenly_and_keep_a_slot_for_a_quantum() -> None:
    slicer, rounds = AdapterTimeSlicer(4), 6
    work = dict.fromkeys(range(8), DECODES)
    steps = [play(slicer, work) for _ in range(2 * QUANTUM * rounds)]
    served = Counter(adapter for step in steps for adapter in step)
    assert set(served.values()) == {QUANTUM * rounds}
    swaps = sum(len(after - before) for before, after in pairwise(steps))
    assert swaps == 4 * (2 * rounds - 1)


def test_a_first_token_comes_before_adapters_that_only_decode() -> None:
    slicer = AdapterTimeSlicer(2)
    work = dict.fromkeys(range(4), DECODES)
    play(slicer, work)
    assert 9 in play(slicer, {**work, 9: Work(1.0, False)})


def test_the_oldest_first_tokens_come_first() -> None:
    work = {adapter: Work(arrival, False) for adapter, arrival in ((1, 3.0), (2, 1.0), (3, 2.0))}
    assert play(AdapterTimeSlicer(2), work) == {2, 3}


def test_after_a_step_that_found_no_memory_those_run_that_hold_it() -> None:
    slicer = AdapterTimeSlicer(1)
    work = {1: Work(1.0, False), 2: DECODES}
    assert slicer.choose(work) == frozenset({1})
    slicer.record(work, set())
    assert slicer.choose(work) == frozenset({2})

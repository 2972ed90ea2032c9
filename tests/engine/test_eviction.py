"""What a tier keeps: by reuse and cost, never beyond its capacity unless all is in use."""

from __future__ import annotations

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from deltamux.engine.vllm.eviction import EvictionPolicy

CAPACITY = 4


@given(
    st.lists(st.tuples(st.sampled_from(("use", "hold", "release", "pin", "unpin")), st.integers(0, 9)), max_size=200)
)
def test_what_is_held_or_pinned_stays_and_the_rest_fits_the_capacity(events: list[tuple[str, int]]) -> None:
    tier: EvictionPolicy[int] = EvictionPolicy(CAPACITY)
    held: Counter[int] = Counter()
    pinned: set[int] = set()
    for event, key in events:
        if event == "use":
            tier.use(key)
        elif key in tier and event == "hold":
            tier.hold(key)
            held[key] += 1
        elif event == "release" and held[key]:
            tier.release(key)
            held[key] -= 1
        elif key in tier and event in ("pin", "unpin"):
            tier.pin(key, event == "pin")
            (pinned.add if event == "pin" else pinned.discard)(key)
        while (victim := tier.next_eviction()) is not None:
            assert not held[victim]
            assert victim not in pinned
            tier.remove(victim)
        kept = {k for k in tier if held[k] or k in pinned}
        assert len(tier) <= max(CAPACITY, len(kept))
        assert all(k in tier for k in pinned | set(+held))


@given(st.integers(2, 6), st.integers(0, 300))
def test_an_adapter_used_again_and_again_stays_during_a_scan_of_others(every: int, length: int) -> None:
    tier: EvictionPolicy[str] = EvictionPolicy(CAPACITY)
    for _ in range(5):
        tier.use("favourite")
    for i in range(length):
        tier.use(f"scanned-{i}")
        if i % every == 0:
            tier.use("favourite")
        while (victim := tier.next_eviction()) is not None:
            tier.remove(victim)
        assert "favourite" in tier


def test_a_former_favourite_fades() -> None:
    tier: EvictionPolicy[str] = EvictionPolicy(CAPACITY)
    for _ in range(50):
        tier.use("former")
    for i in range(400):
        tier.use(f"present-{i % CAPACITY}")
        while (victim := tier.next_eviction()) is not None:
            tier.remove(victim)
    assert "former" not in tier


def test_of_two_used_alike_the_one_that_costs_less_to_reload_goes() -> None:
    tier: EvictionPolicy[str] = EvictionPolicy(1)
    tier.use("dear")
    tier.set_cost("dear", 0.5)
    tier.use("cheap")
    tier.set_cost("cheap", 0.01)
    assert tier.next_eviction() == "cheap"


def test_a_pinned_key_is_evicted_only_by_name_and_a_spared_one_never() -> None:
    tier: EvictionPolicy[str] = EvictionPolicy(2)
    for key in ("pinned", "spared"):
        tier.use(key)
    tier.pin("pinned", True)
    assert tier.victim({"spared"}) is None
    assert tier.victim({"spared"}, pinned_too=True) == "pinned"


@given(st.lists(st.integers(0, 5), min_size=1))
def test_any_history_can_be_forgotten(history: list[int]) -> None:
    tier: EvictionPolicy[int] = EvictionPolicy(CAPACITY)
    for key in history:
        tier.use(key)
    for key in set(history):
        tier.remove(key)
        tier.remove(key)
    assert len(tier) == 0
    assert tier.victim() is None

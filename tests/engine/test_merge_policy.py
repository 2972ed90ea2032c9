"""When a program is merged and unmerged: the policy alone, step by step."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from deltamux.engine.vllm.auto_merge.policy import Action, Costs, Decision, Line, MergePolicy, Thresholds

DEAR = Costs(base=Line(1e-3, 1e-4), ops=Line(1e-3, 1e-4))
"""Ops as dear as the base's own projections, as a full fine-tuning's are."""
CHEAP = Costs(base=Line(1e-3, 1e-4), ops=Line(2e-5, 2e-6))
LIMITS = Thresholds()
Step = dict[int, int]
"""Rows by program, 0 for the base's."""

rows = st.integers(0, 64)
steps = st.dictionaries(st.integers(0, 4), rows, max_size=5)
traffic = st.lists(st.tuples(steps, st.integers(1, 300)), max_size=12)


def watch(policy: MergePolicy, step: Step, times: int, costs: Costs = DEAR) -> list[Decision]:
    """Observes a step many times, measuring whatever is to be measured; returns every decision."""
    decisions = []
    for _ in range(times):
        programs = {program: count for program, count in step.items() if program}
        decisions.append(policy.observe(programs, sum(step.values())))
        if decisions[-1].action is Action.MEASURE:
            policy.measured(decisions[-1].program_id, costs)
    return decisions


def actions(decisions: Iterable[Decision]) -> list[Decision]:
    return [decision for decision in decisions if decision.action is not Action.NOTHING]


def test_a_costly_program_with_most_rows_is_measured_then_merged_and_stays_so() -> None:
    decisions = watch(MergePolicy(), {7: 29, 0: 3}, 5000)
    assert actions(decisions) == [Decision(Action.MEASURE, 7), Decision(Action.MERGE, 7)]


def test_a_cheap_program_is_measured_once_and_never_merged() -> None:
    decisions = watch(MergePolicy(), {7: 32}, 5000, CHEAP)
    assert actions(decisions) == [Decision(Action.MEASURE, 7)]


def test_a_program_without_most_of_the_rows_is_not_even_measured() -> None:
    assert not actions(watch(MergePolicy(), {7: 12, 8: 10, 0: 10}, 5000))


def test_traffic_for_another_program_unmerges_and_then_merges_that_one() -> None:
    policy = MergePolicy()
    watch(policy, {7: 32}, 500)
    assert policy.merged == 7
    turned = actions(watch(policy, {8: 32}, 2000))
    assert turned == [Decision(Action.UNMERGE, 7), Decision(Action.MEASURE, 8), Decision(Action.MERGE, 8)]


def test_the_bases_own_traffic_unmerges() -> None:
    policy = MergePolicy()
    watch(policy, {7: 32}, 500)
    assert actions(watch(policy, {0: 32}, 2000)) == [Decision(Action.UNMERGE, 7)]


def test_a_forgotten_program_is_measured_anew_and_a_refused_one_is_never_merged() -> None:
    policy = MergePolicy()
    watch(policy, {7: 32}, 500)
    policy.keep({8})
    assert policy.merged is None
    assert actions(watch(policy, {7: 32}, 1000)) == [Decision(Action.MEASURE, 7), Decision(Action.MERGE, 7)]
    policy.refuse(7)
    assert policy.merged is None
    assert not actions(watch(policy, {7: 32}, 5000))


def test_a_postponed_merge_is_tried_again_later() -> None:
    policy = MergePolicy()
    watch(policy, {7: 32}, 500)
    policy.postpone()
    assert not actions(watch(policy, {7: 32}, LIMITS.rest - 1))
    assert actions(watch(policy, {7: 32}, LIMITS.patience + 1)) == [Decision(Action.MERGE, 7)]


@given(traffic)
def test_whatever_the_traffic_is_merging_does_not_oscillate(traffic: list[tuple[Step, int]]) -> None:
    policy = MergePolicy()
    decisions = [decision for step, times in traffic for decision in watch(policy, step, times)]
    changes = [(at, d) for at, d in enumerate(decisions) if d.action in (Action.MERGE, Action.UNMERGE)]
    assert [d.action for _, d in changes] == [(Action.MERGE, Action.UNMERGE)[i % 2] for i in range(len(changes))]
    for (before, first), (after, then) in pairwise(changes):
        assert after - before >= (LIMITS.patience if then.action is Action.UNMERGE else LIMITS.rest)
        assert then.action is Action.MERGE or then.program_id == first.program_id


@given(traffic)
def test_only_programs_that_were_measured_and_pay_are_merged(traffic: list[tuple[Step, int]]) -> None:
    policy = MergePolicy()
    decisions = [decision for step, times in traffic for decision in watch(policy, step, times, CHEAP)]
    assert not [d for d in decisions if d.action is Action.MERGE]
    measured = [d.program_id for d in decisions if d.action is Action.MEASURE]
    assert len(measured) == len(set(measured)), "costs do not change: each is measured once"


seconds = st.floats(0, 1e-2)
costs = st.builds(Costs, st.builds(Line, seconds, seconds), st.builds(Line, seconds, seconds))


@given(costs, rows, rows)
def test_a_step_runs_merged_when_all_rows_are_the_programs_or_when_that_saves_time(
    costs: Costs, own: int, others: int
) -> None:
    merged = costs.base.at(own + others) + costs.base.at(others)
    unmerged = costs.base.at(own + others) + costs.ops.at(own)
    if own == 0:
        assert not costs.worthwhile(own, others)
    elif others == 0:
        assert costs.worthwhile(own, others)
    elif abs(merged - unmerged) > 1e-9:
        assert costs.worthwhile(own, others) == (merged < unmerged)
    assert 0 <= costs.gain(own, others) <= 1
    if not costs.worthwhile(own, others):
        assert costs.gain(own, others) == 0


@given(seconds, seconds)
def test_a_line_goes_through_what_was_measured_unless_that_would_fall(few: float, many: float) -> None:
    line = Line.through(4, few, 32, many)
    assert line.at(0) == 0
    assert line.fixed >= 0
    assert line.per_row >= 0
    if few <= many <= 8 * few:
        assert abs(line.at(4) - few) < 1e-9
        assert abs(line.at(32) - many) < 1e-9

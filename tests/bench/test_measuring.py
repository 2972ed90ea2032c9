"""Traffic, times and ratios, against a system whose every token is known."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncGenerator
from dataclasses import dataclass, field

import pytest
import torch

from deltamux.bench import Candidate, Measurement, Request, Workload, drive, interleave, percentile
from deltamux.bench.floor import Work, floor
from deltamux.deltas import KVPrefix, LowRank, Program
from deltamux.errors import UnavailableError


@dataclass
class Echo:
    """Answers in chunks of the given sizes, and records which requests were under way together."""

    chunks: tuple[int, ...] = (1, 1, 2)
    vocab_size: int = 50
    seen: list[Request] = field(default_factory=list)
    under_way: int = 0
    most: int = 0

    async def stream(self, request: Request) -> AsyncGenerator[int]:
        self.seen.append(request)
        self.under_way += 1
        self.most = max(self.most, self.under_way)
        try:
            for count in self.chunks:
                await asyncio.sleep(0.001)
                yield count
        finally:
            self.under_way -= 1


@dataclass
class Dying:
    """Dies of its second request."""

    vocab_size: int = 50
    requests: int = 0

    async def stream(self, request: Request) -> AsyncGenerator[int]:
        self.requests += 1
        if self.requests > 1:
            raise UnavailableError("the engine has stopped")
        await asyncio.sleep(10)
        yield request.new_tokens


def test_a_seed_gives_the_same_traffic_and_another_seed_other_prompts() -> None:
    load = Workload(("a", None), prompt_tokens=8, sequences=6)
    first = load.traffic("1", 100)
    assert first == load.traffic("1", 100)
    assert [r.adapter for r in first] == ["a", None] * 3
    prompts = {r.prompt for r in [*first, *load.traffic("2", 100)]}
    assert len(prompts) == 12
    assert {len(p) for p in prompts} == {8}
    assert max(map(max, prompts)) < 100


def test_zipf_traffic_requests_the_first_adapters_most() -> None:
    load = Workload(tuple("abcd"), requests=4000, zipf=1.0)
    drawn = Counter(r.adapter for r in load.traffic("1", 10))
    shares = [drawn[name] / 4000 for name in "abcd"]
    assert shares == pytest.approx([12 / 25, 6 / 25, 4 / 25, 3 / 25], abs=0.03)


async def test_no_more_requests_are_under_way_than_there_are_callers() -> None:
    system = Echo()
    measured = await drive(system, Workload(new_tokens=4, sequences=3, requests=10), "1")
    assert (system.most, len(system.seen)) == (3, 10)
    assert measured.tokens == 40
    assert len(measured.first_token) == 10


async def test_every_token_but_the_first_has_a_gap_and_a_chunk_shares_its_own() -> None:
    measured = await drive(Echo((1, 1, 2)), Workload(new_tokens=4, sequences=1), "1")
    assert len(measured.gaps) == 3
    assert measured.gaps[1] == measured.gaps[2]
    assert measured.first_token[0] + sum(measured.gaps) == pytest.approx(measured.seconds, rel=0.2)


async def test_answers_of_another_length_are_no_measurement() -> None:
    with pytest.raises(RuntimeError, match="for 5 tokens got 4"):
        await drive(Echo((4,)), Workload(new_tokens=5), "1")


async def test_the_first_failure_ends_the_run_as_itself() -> None:
    with pytest.raises(UnavailableError, match="has stopped"):
        await drive(Dying(), Workload(sequences=2), "1")


def test_percentiles_are_interpolated() -> None:
    assert [percentile([4.0, 1.0, 3.0, 2.0], p) for p in (0, 50, 100)] == [1.0, 2.5, 4.0]


async def test_candidates_alternate_with_the_reference_and_the_first_round_does_not_count() -> None:
    ran: list[str] = []

    def candidate(name: str, speeds: list[int]) -> Candidate:
        left = iter(speeds)

        async def run(seed: str) -> Measurement:
            ran.append(name)
            return Measurement(1.0, next(left))

        return Candidate(name, run)

    reference = candidate("r", [1, 1, 100, 400, 100, 100])
    others = [candidate("a", [1, 50, 60]), candidate("b", [1, 80, 10]), candidate("c", [1, 100, 100])]
    a, b, c = await interleave(reference, others, 2)
    assert "".join(ran) == "crb" + "ra" + "arb" + "cr" + "crb" + "ra"
    assert (a.ratios(), b.ratios(), c.ratios()) == ([0.5, 0.6], [0.8, 0.1], [0.25, 1.0])
    assert a.ratio() == pytest.approx(0.55)
    assert (a.whole.tokens, a.whole.seconds, a.whole_reference.tokens) == (110, 2.0, 200)


def test_the_floor_counts_each_adapter_of_the_batch_once_per_step_and_each_row_with_its_own() -> None:
    base, adapters = Work(900), {"a": Work(100), "b": Work(300)}
    one = floor(base, adapters, Workload(("a",)))
    assert (one.bytes, one.operations) == (0.9, 0.9)
    both = floor(base, adapters, Workload(("a", "b")))
    assert (both.bytes, both.operations) == (900 / 1300, 900 / 1100)


def test_virtual_tokens_cost_rows_before_the_prompt_and_no_parameters() -> None:
    prefix = Program.of([("x", KVPrefix(torch.zeros(10, 2, 4), torch.zeros(10, 2, 4)))])
    assert Work.of_program(prefix) == Work(0, 10)
    low_rank = Program.of([("x", LowRank(torch.zeros(2, 6), torch.zeros(5, 2)))])
    assert Work.of_program(low_rank) == Work(22)
    found = floor(Work(900), {"p": Work(0, 10)}, Workload(("p",), prompt_tokens=30, new_tokens=60))
    assert (found.bytes, found.operations) == (1.0, 0.9)

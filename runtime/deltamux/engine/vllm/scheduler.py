"""vLLM's scheduler, with turns (``scheduler_cls``, vLLM's extension point).

vLLM admits no request whose adapter is not among the `max_loras` of the running batch until one of those requests ends:
with twice as many adapters as slots, the others wait for whole generations. Here requests of all adapters are admitted
and, when their adapters exceed the slots, take turns by the step. A request out of turn keeps its cache blocks and is
left out of the step, as vLLM itself does with requests for which a step has no room.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import chain, islice
from typing import Any

from vllm.config import VllmConfig
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.request import Request, RequestStatus

from deltamux.engine.vllm.grammar_threads import prepare_grammars
from deltamux.engine.vllm.prefixes import KnownPrefixes
from deltamux.engine.vllm.processes import end_with_engine
from deltamux.engine.vllm.turns import Turns, Work

READY = (RequestStatus.WAITING, RequestStatus.PREEMPTED)
"""States in which a waiting request can be admitted."""


class TurnMixin(Scheduler):
    """Overrides the two places where vLLM decides whether a request may be part of a step."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        end_with_engine()
        super().__init__(*args, **kwargs)
        assert self.lora_config is not None
        prepare_grammars(self.structured_output_manager)
        self._prefixes: Any = KnownPrefixes()
        self._turns = Turns(self.lora_config.max_loras)
        self._chosen: frozenset[int] | None = None
        self._admissible: frozenset[str] = frozenset()

    def schedule(self, throttle_prefills: bool = False) -> SchedulerOutput:
        """Plans a step; requests of adapters out of turn stay as they are."""
        room = max(0, self.max_num_active_reqs - len(self.running) - self.num_waiting_for_streaming_input)
        ready = (r for r in chain(self.kv_holding_waiting, self.waiting) if r.status in READY)
        waiting = list(islice(ready, room))
        work = _work(self.running, waiting)
        if not work and all(r.lora_request is None for r in self.running):
            self._chosen = None
            self._turns.took((), ())
            return self._plan(throttle_prefills)
        self._chosen = self._turns.choose(work)
        # Room is kept for the first in the queue: whoever waits for a turn is not overtaken for good.
        self._admissible = frozenset(r.request_id for r in waiting)
        for request in self.running:
            if not self._may_run(request):
                # vLLM's own field for pacing a running request: the first step that may hold it again.
                request.next_decode_eligible_step = self.current_step + 2
        output = self._plan(throttle_prefills)
        self._turns.took(work, {_adapter(self.requests[r]) for r in output.num_scheduled_tokens} & work.keys())
        return output

    def _plan(self, throttle_prefills: bool) -> SchedulerOutput:
        """Plans a step for the requests in turn, with known prefixes counted as computed (see `prefixes`)."""
        if self.connector is not None:  # the operator's own; prefixes are then computed
            return super().schedule(throttle_prefills)
        self.connector = self._prefixes
        try:
            return super().schedule(throttle_prefills)
        finally:
            self.connector = None

    def _handle_blocked_waiting_request(self, request: Request) -> bool:
        if not super()._handle_blocked_waiting_request(request):
            return False
        return self._chosen is None or (request.request_id in self._admissible and self._in_turn(request))

    def _in_turn(self, request: Request) -> bool:
        return self._chosen is None or request.lora_request is None or _adapter(request) in self._chosen

    def _may_run(self, request: Request) -> bool:
        # The runner reads the tokens of a request that comes back from the scheduler: the last one must have arrived.
        was_out = request.request_id not in self.prev_step_scheduled_req_ids
        return self._in_turn(request) and not (was_out and request.num_output_placeholders > 0)


class TurnScheduler(TurnMixin, Scheduler):
    """Turns over vLLM's synchronous scheduler."""


class AsyncTurnScheduler(TurnMixin, AsyncScheduler):
    """Turns over vLLM's asynchronous scheduler, which plans a step while the one before it runs."""


def turn_scheduler(vllm_config: VllmConfig, **kwargs: Any) -> Scheduler:
    """Makes the scheduler that fits the engine's configuration, which vLLM settles only after it was named."""
    kind = AsyncTurnScheduler if vllm_config.scheduler_config.async_scheduling else TurnScheduler
    return kind(vllm_config=vllm_config, **kwargs)


def _work(running: Iterable[Request], waiting: Iterable[Request]) -> dict[int, Work]:
    """Returns what each adapter has to do in the next step; base requests need no slot."""
    work: dict[int, Work] = {}
    runnable = ((r, True) for r in running if r.lora_request is not None and _has_tokens(r))
    for request, under_way in chain(runnable, ((r, False) for r in waiting if r.lora_request is not None)):
        known = work.get(_adapter(request), Work(None, False))
        arrivals = [t for t in (known.waiting_since, _waiting_since(request)) if t is not None]
        work[_adapter(request)] = Work(min(arrivals, default=None), known.running or under_way)
    return work


def _adapter(request: Request) -> int:
    return request.lora_request.lora_int_id if request.lora_request is not None else 0


def _has_tokens(request: Request) -> bool:
    """Whether a running request has anything to compute that no step in flight computes already."""
    in_flight = request.num_output_placeholders
    last = request.num_computed_tokens + 2 - in_flight >= request.num_prompt_tokens + request.max_tokens
    return not (in_flight and last) and request.num_tokens_with_spec + in_flight > request.num_computed_tokens


def _waiting_since(request: Request) -> float | None:
    return request.arrival_time if request.num_output_tokens + request.num_output_placeholders == 0 else None

"""vLLM's scheduler with time slicing by adapter (``scheduler_cls``, vLLM's extension point).

vLLM admits no request whose adapter is not among the `max_loras` of the running batch until one of those requests ends:
with twice as many adapters as slots, the others wait for whole generations. Here requests of all adapters are admitted,
and their adapters share the slots by the step. A request whose adapter is not chosen keeps its cache blocks and is left
out of the step, as vLLM itself does with requests for which a step has no room.
"""

from collections.abc import Iterable
from dataclasses import fields
from itertools import chain, islice
from typing import Any

from vllm.config import VllmConfig
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.kv_cache_interface import KVCacheConfig
from vllm.v1.request import Request, RequestStatus

from deltamux.engine.vllm.scheduling.grammars import prepare_grammars
from deltamux.engine.vllm.scheduling.known_prefixes import KnownPrefixes
from deltamux.engine.vllm.scheduling.time_slicing import AdapterTimeSlicer, Work

READY = (RequestStatus.WAITING, RequestStatus.PREEMPTED)
"""States in which a waiting request can be admitted."""


class TimeSlicingMixin(Scheduler):
    """Overrides the two places where vLLM decides whether a request may be part of a step."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        assert self.lora_config is not None
        prepare_grammars(self.structured_output_manager)
        self._prefixes: Any = KnownPrefixes()
        self._slicer = AdapterTimeSlicer(self.lora_config.max_loras)
        self._chosen: frozenset[int] | None = None
        self._admissible: frozenset[str] = frozenset()

    def schedule(self, throttle_prefills: bool = False) -> SchedulerOutput:
        """Plans a step; requests of adapters that are not chosen stay as they are."""
        room = max(0, self.max_num_active_reqs - len(self.running) - self.num_waiting_for_streaming_input)
        ready = (r for r in chain(self.kv_holding_waiting, self.waiting) if r.status in READY)
        waiting = list(islice(ready, room))
        work = _work(self.running, waiting)
        if not work and all(r.lora_request is None for r in self.running):
            self._chosen = None
            self._slicer.record((), ())
            return self._plan(throttle_prefills)
        self._chosen = self._slicer.choose(work)
        # Room is kept for the first in the queue, so that no request is overtaken for good.
        self._admissible = frozenset(r.request_id for r in waiting)
        for request in self.running:
            if not self._may_run(request):
                # vLLM's own field for pacing a running request: the first step that may hold it again.
                request.next_decode_eligible_step = self.current_step + 2
        output = self._plan(throttle_prefills)
        self._slicer.record(work, {_program_id(self.requests[r]) for r in output.num_scheduled_tokens} & work.keys())
        return output

    def _plan(self, throttle_prefills: bool) -> SchedulerOutput:
        """Plans a step for the chosen requests, with known prefixes counted as computed (see `prefixes`)."""
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
        return self._chosen is None or (request.request_id in self._admissible and self._is_chosen(request))

    def _is_chosen(self, request: Request) -> bool:
        return self._chosen is None or request.lora_request is None or _program_id(request) in self._chosen

    def _may_run(self, request: Request) -> bool:
        # The runner reads the tokens of a request that comes back from the scheduler: the last one must have arrived.
        was_out = request.request_id not in self.prev_step_scheduled_req_ids
        return self._is_chosen(request) and not (was_out and request.num_output_placeholders > 0)


class TimeSlicingScheduler(TimeSlicingMixin, Scheduler):
    """Time slicing on vLLM's synchronous scheduler."""


class AsyncTimeSlicingScheduler(TimeSlicingMixin, AsyncScheduler):
    """Time slicing on vLLM's asynchronous scheduler, which plans a step while the one before it runs."""


class ZeroedKVCacheConfig(KVCacheConfig):
    """A cache whose blocks are zeroed before a request gets them.

    vLLM's attention on a CPU multiplies also the values behind a sequence's end, by zero: NaN that an adapter has left
    in a block would reach the next request that gets the block, of whatever tenant.
    """

    @property
    def needs_kv_cache_zeroing(self) -> bool:
        return True


def time_slicing_scheduler(vllm_config: VllmConfig, kv_cache_config: KVCacheConfig, **kwargs: Any) -> Scheduler:
    """Makes the scheduler for the engine's configuration, which vLLM completes after `scheduler_cls` is set."""
    kind = AsyncTimeSlicingScheduler if vllm_config.scheduler_config.async_scheduling else TimeSlicingScheduler
    if vllm_config.device_config.device_type == "cpu":
        kv_cache_config = ZeroedKVCacheConfig(
            **{f.name: getattr(kv_cache_config, f.name) for f in fields(kv_cache_config)}
        )
    return kind(vllm_config=vllm_config, kv_cache_config=kv_cache_config, **kwargs)


def _work(running: Iterable[Request], waiting: Iterable[Request]) -> dict[int, Work]:
    """Returns the work of each adapter for the next step; requests of the base need no slot."""
    work: dict[int, Work] = {}
    runnable = ((r, True) for r in running if r.lora_request is not None and _has_tokens(r))
    for request, under_way in chain(runnable, ((r, False) for r in waiting if r.lora_request is not None)):
        known = work.get(_program_id(request), Work(None, False))
        arrivals = [t for t in (known.waiting_since, _waiting_since(request)) if t is not None]
        work[_program_id(request)] = Work(min(arrivals, default=None), known.running or under_way)
    return work


def _program_id(request: Request) -> int:
    return request.lora_request.lora_int_id if request.lora_request is not None else 0


def _has_tokens(request: Request) -> bool:
    """Whether a running request has anything to compute that no step in flight computes already."""
    in_flight = request.num_output_placeholders
    last = request.num_computed_tokens + 2 - in_flight >= request.num_prompt_tokens + request.max_tokens
    return not (in_flight and last) and request.num_tokens_with_spec + in_flight > request.num_computed_tokens


def _waiting_since(request: Request) -> float | None:
    return request.arrival_time if request.num_output_tokens + request.num_output_placeholders == 0 else None

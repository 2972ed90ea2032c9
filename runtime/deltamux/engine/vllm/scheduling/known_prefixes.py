"""`KnownPrefixes`: the scheduler's half of known prefixes, as a KV connector (see `prefixes`)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from deltamux.engine.vllm.prefixes import EXTRA_ARG

if TYPE_CHECKING:
    from vllm.v1.request import Request


class KnownPrefixes:
    """The calls of vLLM's scheduler to a KV connector while it plans a step; nothing is loaded or sent."""

    supports_divergent_local_hybrid_hits = False

    def get_num_new_matched_tokens(self, request: Request, num_computed_tokens: int) -> tuple[int, bool]:
        """Returns how many tokens beyond those of the prefix cache are known, and that no load is waited for."""
        parameters = request.sampling_params
        known = (parameters.extra_args or {}).get(EXTRA_ARG, 0) if parameters is not None else 0
        return max(0, known - num_computed_tokens), False

    def update_state_after_alloc(self, request: Request, blocks: object, num_external_tokens: int) -> None:
        """Does nothing: the worker finds requests with a prefix to write by their first position."""

    def has_pending_block_frees(self) -> bool:
        return False

    def get_loaded_kv_cache_group_ids(self, request: Request) -> tuple[int, ...]:
        return ()

    def build_connector_meta(self, scheduler_output: object) -> None:
        return None

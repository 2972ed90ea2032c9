"""Prefixes that nobody computes: where an adapter brings every layer's keys and values, they go straight to the cache.

A virtual token of prefix tuning stands for keys and values alone. Running it through the model gives nothing that is
kept, and a prefix of 16 in front of a prompt of 8 would triple the prompt's price. So the scheduler is told that these
tokens are computed already, as if they came from a cache elsewhere (the planning half of a vLLM KV connector), and the
worker writes them into the request's cache blocks before the first step that reads them.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors import SafetensorError

from deltamux.deltas import BaseModel, KVPrefix, Program
from deltamux.engine.base import ProgramRef

if TYPE_CHECKING:
    from vllm.v1.request import Request

EXTRA_ARG = "deltamux_prefix"
"""Key of ``SamplingParams.extra_args`` under which a request says how many of its first tokens are known."""


def known_prefix(program: Program, base: BaseModel) -> Mapping[str, KVPrefix] | None:
    """Returns the prefix of each attention by site; None where a program leaves one to be computed, or has none."""
    prefixes = {site: op for site, op in program if isinstance(op, KVPrefix)}
    return prefixes if prefixes.keys() == _attentions(base) else None


def known_tokens(program: ProgramRef, base: BaseModel) -> int:
    """Returns how many first tokens of a program's requests are known, by the header of its compiled file."""
    if not program.num_virtual_tokens:
        return 0
    try:
        return program.num_virtual_tokens if _prefixed(program.path) == _attentions(base) else 0
    except (OSError, SafetensorError, LookupError, TypeError, ValueError):
        return 0  # the file may be gone, or damaged, while its program is resident: then they are computed


@lru_cache(maxsize=4096)
def _prefixed(path: Path) -> frozenset[str]:
    return frozenset(site for site, op in Program.outline(path) if op == KVPrefix.name)


def _attentions(base: BaseModel) -> frozenset[str]:
    return frozenset(site.name for site in base.attentions)


def cache_slots(blocks: np.ndarray[Any, Any], block_size: int, count: int) -> torch.Tensor:
    """Returns where a request's first `count` tokens lie in the cache, [count] int64, of its row of the block table."""
    positions = np.arange(count)
    return torch.from_numpy(blocks[positions // block_size].astype(np.int64) * block_size + positions % block_size)


class KnownPrefixes:
    """What vLLM's scheduler asks of a KV connector while it plans a step; nothing is ever loaded, sent or awaited."""

    supports_divergent_local_hybrid_hits = False

    def get_num_new_matched_tokens(self, request: Request, num_computed_tokens: int) -> tuple[int, bool]:
        """Returns how many tokens beyond those of the prefix cache are known, and that no load is waited for."""
        parameters = request.sampling_params
        known = (parameters.extra_args or {}).get(EXTRA_ARG, 0) if parameters is not None else 0
        return max(0, known - num_computed_tokens), False

    def update_state_after_alloc(self, request: Request, blocks: object, num_external_tokens: int) -> None:
        """Nothing to note: the worker sees by a request's first position that its prefix is to be written."""

    def has_pending_block_frees(self) -> bool:
        return False

    def get_loaded_kv_cache_group_ids(self, request: Request) -> tuple[int, ...]:
        return ()

    def build_connector_meta(self, scheduler_output: object) -> None:
        return None

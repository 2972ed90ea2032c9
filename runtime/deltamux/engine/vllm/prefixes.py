"""Known prefixes: keys and values that an adapter brings for every layer are written to the cache, not computed.

A virtual token of prefix tuning is keys and values alone: computing it yields nothing that is kept, and a prefix of 16
before a prompt of 8 would triple the prompt's cost. So the scheduler counts these tokens as computed (see
`scheduling.known_prefixes`), and the worker writes them into the request's cache blocks before the first step that
reads them.
"""

from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError

from deltamux.deltas import BaseModel, KVPrefix, Program
from deltamux.engine.base import ProgramRef

EXTRA_ARG = "deltamux_prefix"
"""Key of ``SamplingParams.extra_args``: the number of a request's first tokens that are known."""


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


def slot_mapping(blocks: np.ndarray[Any, Any], block_size: int, count: int) -> torch.Tensor:
    """Returns the cache slots of a request's first `count` tokens, [count] int64, of its row of the block table."""
    positions = np.arange(count)
    return torch.from_numpy(blocks[positions // block_size].astype(np.int64) * block_size + positions % block_size)

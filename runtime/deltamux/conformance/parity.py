"""Holds what the engine generated against a reference: the same greedy tokens, the same log-probabilities."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from deltamux.engine.base import Engine, ProgramRef, SamplingOptions

TOLERANCE = 1e-3
"""Largest difference of log-probabilities; also the margin below which two best tokens count as tied."""


class Greedy(NamedTuple):
    """A greedy generation.

    Attributes:
        margins: by how much each chosen token's log-probability exceeds the second best.
    """

    token_ids: list[int]
    logprobs: list[float]
    margins: list[float]


def reference(model: nn.Module, prompt: Sequence[int], num_tokens: int) -> Greedy:
    """Generates with transformers' (or PEFT's) own `generate`."""
    ids = torch.tensor([list(prompt)])
    with torch.no_grad():
        out = model.generate(  # type: ignore[operator]  # hidden by nn.Module's __getattr__
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=num_tokens,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
            output_logits=True,
            return_dict_in_generate=True,
        )
    logprobs: list[Tensor] = [torch.log_softmax(step[0].float(), -1) for step in out.logits]
    best = [step.topk(2) for step in logprobs]
    token_ids = [int(b.indices[0]) for b in best]
    return Greedy(token_ids, [float(b.values[0]) for b in best], [float(b.values[0] - b.values[1]) for b in best])


async def served(
    engine: Engine, prompt: Sequence[int], program: ProgramRef | None, num_tokens: int, request_id: str
) -> Greedy:
    """Generates with the engine."""
    sampling = SamplingOptions(max_tokens=num_tokens, temperature=0.0, logprobs=2, ignore_eos=True)
    tokens: list[int] = []
    logprobs: list[float] = []
    margins: list[float] = []
    async for chunk in engine.generate(tuple(prompt), sampling, program, request_id=request_id):
        tokens += chunk.token_ids
        logprobs += [position.logprob for position in chunk.logprobs]
        margins += [position.top[0][1] - position.top[1][1] for position in chunk.logprobs]
    return Greedy(tokens, logprobs, margins)


def assert_same(expected: Greedy, actual: Greedy, tolerance: float = TOLERANCE) -> None:
    """Compares up to the first tie: past it, both may go on with another token and be right."""
    assert len(actual.token_ids) == len(expected.token_ids)
    for position, (token, logprob, margin) in enumerate(zip(*expected, strict=True)):
        difference = abs(actual.logprobs[position] - logprob)
        assert difference < tolerance, f"log-probability at {position} differs by {difference}"
        if actual.token_ids[position] != token:
            assert margin <= tolerance, f"token {position} is {actual.token_ids[position]}, not {token}"
            return

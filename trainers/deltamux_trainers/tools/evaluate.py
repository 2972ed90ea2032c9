"""Evaluates a base, or a base with an adapter, through the reference executor: no engine is started."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from deltamux.deltas import BaseModel, Program, attached
from deltamux.errors import FailedPreconditionError
from deltamux.prompts import encode_text
from deltamux.registry import Registry
from deltamux_trainers.data.collator import DataCollator
from deltamux_trainers.data.dataset import load_dataset
from deltamux_trainers.data.rows import PromptRow, Row
from deltamux_trainers.data.tokenization import IGNORE_INDEX, RowTokenizer
from deltamux_trainers.loading import describe_base, load_model, load_tokenizer, pick_device
from deltamux_trainers.model import causal_lm_loss
from deltamux_trainers.options import EvaluateOptions

T = TypeVar("T")


@dataclass(frozen=True)
class EvalResult:
    """How well the learnt tokens are predicted.

    Attributes:
        loss: mean cross-entropy a token (nats); perplexity: its exponential.
        rows: that have a learnt token; untaught_rows: that have none; truncated_rows: of `rows`, cut at `max_length`.
        accuracy: share of the learnt tokens that are predicted best.
        exact_match: share of prompts whose greedy answer is the completion; None where it was not asked for.
    """

    rows: int
    tokens: int
    loss: float
    perplexity: float
    accuracy: float
    exact_match: float | None = None
    untaught_rows: int = 0
    truncated_rows: int = 0


@torch.no_grad()
def evaluate(options: EvaluateOptions) -> EvalResult:
    """Evaluates on JSONL data; docs/data.md says of what form.

    Raises:
        BaseMismatchError: the adapter was trained on another base.
        FailedPreconditionError: the loss is not finite.
        InvalidArgumentError: a row is wrong, none has a learnt token, or exact matches are asked of rows without prompt
            and completion.
    """
    pick_device(options.device)
    base, tokenizer = describe_base(options.model), load_tokenizer(options.model)
    program = read_program(options.adapter, base)
    virtual = program.num_virtual_tokens if program else 0
    tokenize = RowTokenizer.for_base(base, tokenizer, options.max_length, options.turns, virtual)
    dataset = load_dataset(options.data, tokenize, options.limit)
    if options.generate:
        _check_prompts(dataset.rows)
    model = load_model(options.model, options.dtype, options.device).eval()
    with attached(model, base, program) if program else nullcontext():
        collate = DataCollator(tokenizer.pad_token_id or 0)
        total, right, count = 0.0, 0, 0
        for batch in _batches(dataset.sequences, options.batch_size):
            loss, hits, tokens = _score(model, collate(batch))
            total, right, count = total + loss, right + hits, count + tokens
        context = base.dims.max_position - virtual
        answers = Answers(model, tokenizer, tokenize.eos_token_ids, options.max_new_tokens, context)
        matches = _exact_matches(answers, dataset.rows, options.batch_size) if options.generate else None
    loss = total / count
    if not math.isfinite(loss):
        raise FailedPreconditionError(
            f"the loss is {loss:g}: the base's weights are not finite, or what they compute is not in {options.dtype}; "
            "use --dtype float32",
            reason="NOT_FINITE",
        )
    untaught, cut = len(dataset.untaught), len(dataset.truncated)
    return EvalResult(len(dataset.rows), count, loss, math.exp(min(loss, 80.0)), right / count, matches, untaught, cut)


def read_program(adapter: Path | None, base: BaseModel) -> Program | None:
    """Returns the program of an adapter's directory; None of None."""
    return None if adapter is None else Registry().load(adapter, base).program


class Answers(NamedTuple):
    """Generates greedy answers, which end where the server's do.

    Attributes:
        ends: ids of the tokens at which an answer ends.
        max_new_tokens: of an answer.
        room: tokens that the base's context holds beside the adapter's virtual tokens: a prompt and its answer.
    """

    model: Any
    tokenizer: Any
    ends: frozenset[int]
    max_new_tokens: int
    room: int

    def __call__(self, prompts: Sequence[str]) -> list[str]:
        """Returns each prompt's continuation: in one batch, padded on the left, where the context holds that."""
        encoded = [encode_text(self.tokenizer, prompt) for prompt in prompts]
        longest = max(map(len, encoded))
        if longest + self.max_new_tokens > self.room and len(prompts) > 1:
            return [text for prompt in prompts for text in self([prompt])]
        pad = self.tokenizer.pad_token_id or 0
        device = next(self.model.parameters()).device
        out: Tensor = self.model.generate(
            input_ids=torch.tensor([[pad] * (longest - len(e)) + e for e in encoded], device=device),
            attention_mask=torch.tensor([[0] * (longest - len(e)) + [1] * len(e) for e in encoded], device=device),
            max_new_tokens=min(self.max_new_tokens, self.room - longest),
            do_sample=False,
            pad_token_id=pad,
            eos_token_id=sorted(self.ends) or None,
        )
        return [self.tokenizer.decode(row[longest:], skip_special_tokens=True) for row in out]


def _score(model: nn.Module, batch: Mapping[str, Tensor]) -> tuple[float, int, int]:
    device = next(model.parameters()).device
    inputs = {name: tensor.to(device) for name, tensor in batch.items()}
    labels = inputs.pop("labels")
    logits = model(**inputs).logits
    targets = labels[:, 1:]
    learnt = targets != IGNORE_INDEX
    hits = (logits[:, :-1].argmax(-1) == targets) & learnt
    return float(causal_lm_loss(logits, labels, 1)), int(hits.sum()), int(learnt.sum())


def _exact_matches(answers: Answers, rows: Sequence[Row], batch_size: int) -> float:
    matches = 0
    for batch in _batches(rows, batch_size):
        asked = [row for row in batch if isinstance(row, PromptRow)]
        given = answers([row.prompt for row in asked])
        matches += sum(a.strip() == row.completion.strip() for a, row in zip(given, asked, strict=True))
    return matches / len(rows)


def _check_prompts(rows: Sequence[Row]) -> None:
    for row in rows:
        if not isinstance(row, PromptRow):
            raise row.error("has no prompt and completion, which exact matches need")


def _batches(items: Sequence[T], size: int) -> Iterator[Sequence[T]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]

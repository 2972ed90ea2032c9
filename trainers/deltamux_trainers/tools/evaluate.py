"""Evaluation of a base, or of a base with an adapter, in transformers: no engine is started."""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from deltamux.deltas import attached
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
    """The result of an evaluation.

    Attributes:
        rows: with a learnt token; untaught_rows: without one; truncated_rows: of `rows`, cut at `max_length`.
        tokens: the learnt ones.
        loss: mean cross-entropy per learnt token (nats); perplexity: its exponential.
        accuracy: share of the learnt tokens with the highest logit.
        exact_match: share of prompts whose greedy answer is the completion; None without `generate`.
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
    """Evaluates on JSONL data (docs/data.md).

    Raises:
        BaseMismatchError: the adapter was trained on another base.
        FailedPreconditionError: the loss is not finite.
        InvalidArgumentError: a row is wrong, none has a learnt token, or `generate` is set and a row has no prompt and
            completion.
    """
    pick_device(options.device)
    base, tokenizer = describe_base(options.model), load_tokenizer(options.model)
    program = Registry().load(options.adapter, base).program if options.adapter else None
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
        generate = GreedyGenerator(model, tokenizer, tokenize.eos_token_ids, options.max_new_tokens, context)
        matches = _exact_matches(generate, dataset.rows, options.batch_size) if options.generate else None
    loss = total / count
    if not math.isfinite(loss):
        raise FailedPreconditionError(
            f"the loss is {loss:g}: the base's weights are not finite, or their products overflow in {options.dtype}; "
            "use --dtype float32",
            reason="NOT_FINITE",
        )
    untaught, cut = len(dataset.untaught), len(dataset.truncated)
    return EvalResult(len(dataset.rows), count, loss, math.exp(min(loss, 80.0)), right / count, matches, untaught, cut)


class GreedyGenerator(NamedTuple):
    """Greedy decoding that stops at the server's end-of-sequence tokens.

    Attributes:
        eos_token_ids: tokens at which an answer ends.
        max_new_tokens: of an answer.
        max_length: tokens of a prompt with its answer: the base's context, less the adapter's virtual tokens.
    """

    model: Any
    tokenizer: Any
    eos_token_ids: frozenset[int]
    max_new_tokens: int
    max_length: int

    def __call__(self, prompts: Sequence[str]) -> list[str]:
        """Returns the answer to each prompt: in one batch, padded on the left, if the context is long enough."""
        encoded = [encode_text(self.tokenizer, prompt) for prompt in prompts]
        longest = max(map(len, encoded))
        if longest + self.max_new_tokens > self.max_length and len(prompts) > 1:
            return [text for prompt in prompts for text in self([prompt])]
        pad = self.tokenizer.pad_token_id or 0
        device = next(self.model.parameters()).device
        out: Tensor = self.model.generate(
            input_ids=torch.tensor([[pad] * (longest - len(e)) + e for e in encoded], device=device),
            attention_mask=torch.tensor([[0] * (longest - len(e)) + [1] * len(e) for e in encoded], device=device),
            max_new_tokens=min(self.max_new_tokens, self.max_length - longest),
            do_sample=False,
            pad_token_id=pad,
            eos_token_id=sorted(self.eos_token_ids) or None,
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


def _exact_matches(generate: GreedyGenerator, rows: Sequence[Row], batch_size: int) -> float:
    matches = 0
    for batch in _batches(rows, batch_size):
        prompts = [row for row in batch if isinstance(row, PromptRow)]
        answers = generate([row.prompt for row in prompts])
        matches += sum(a.strip() == row.completion.strip() for a, row in zip(answers, prompts, strict=True))
    return matches / len(rows)


def _check_prompts(rows: Sequence[Row]) -> None:
    for row in rows:
        if not isinstance(row, PromptRow):
            raise row.error("has no prompt and completion, which exact matches need")


def _batches(items: Sequence[T], size: int) -> Iterator[Sequence[T]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]

"""What is trained is what `Generate` sends: conversations of every template, over gRPC, token by token."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import torch

from deltamux.deltas import Program
from deltamux.engine.vllm.frontend.prompts import Prompts
from deltamux_testing.chat_templates import SHAPES
from deltamux_testing.reference_engine import ReferenceEngine
from deltamux_testing.servers import Servers
from deltamux_trainers.data.rows import read_rows
from deltamux_trainers.data.tokenization import IGNORE_INDEX, RowTokenizer

TURNS = [
    ("system", "be brief"),
    ("user", "what (is) it?"),
    ("assistant", "yes"),
    ("user", "again: ("),
    ("assistant", "no"),
]


class Listening(ReferenceEngine):
    """Takes over another tokenizer, and keeps the tokens of the last forward pass, which it makes with other ones."""

    seen: list[int]

    def __init__(self, model: Path) -> None:
        super().__init__(model)
        self.base = replace(self.base, dims=replace(self.base.dims, vocab_size=1000))

    def use(self, tokenizer: object) -> None:
        self._prompts.close()
        self._tokenizer, self._prompts = tokenizer, Prompts(tokenizer, self.max_model_len)

    def _logits(self, ids: list[int], program: Program | None) -> torch.Tensor:
        self.seen = ids
        return super()._logits([token % 200 for token in ids], program)


async def test_generate_sends_every_message_the_context_that_it_was_trained_with(
    tmp_path: Path, serve: Servers
) -> None:
    engine = Listening(serve.base)
    async with serve(lambda _: engine) as server, server.client() as client:
        for name, shape in SHAPES.items():
            engine.use(shape.tokenizer)
            messages = [{"role": role, "content": content} for role, content in TURNS[not shape.system :]]
            (file := tmp_path / "chat.jsonl").write_text(json.dumps({"messages": messages}))
            made = RowTokenizer(shape.tokenizer, shape.ends, turns="last")(read_rows(file)[0])
            (row,) = made.sequences
            context = [t for t, label in zip(row.input_ids, row.labels, strict=True) if label == IGNORE_INDEX]
            out = await client.generate(messages[:-1], max_tokens=1)
            assert engine.seen == context, name
            assert out.usage.prompt_tokens == len(context), name

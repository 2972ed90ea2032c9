"""What the engine's base does not take: uploads are refused with the reason, and nothing that is served changes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from deltamux.client import AsyncClient
from deltamux.deltas import BaseModel, BaseSupport, Bias, Program, SiteKind, SoftPrompt
from deltamux.errors import BaseMismatchError
from deltamux_testing.adapters import write_own
from deltamux_testing.random_ops import bottleneck
from deltamux_testing.reference_engine import ReferenceEngine
from deltamux_testing.servers import Served, Servers

NAME = "tenants/acme/adapters/tickets"
REASON = "vLLM's module computes something else"
GREEDY: dict[str, Any] = {"max_tokens": 5, "temperature": 0.0, "ignore_eos": True}
LAYER = "model.layers.1"


class Limited(ReferenceEngine):
    """An engine that takes less of its base."""

    def __init__(self, model: Path, limit: Callable[[BaseSupport], BaseSupport]) -> None:
        super().__init__(model)
        self._limit = limit

    async def start(self) -> None:
        await super().start()
        assert self.support is not None
        self.support = self._limit(self.support)


def without(kind: SiteKind, name: str) -> Callable[[BaseSupport], BaseSupport]:
    site = (str(kind), name)
    return lambda support: replace(support, sites=support.sites - {site}, refused={site: REASON})


@dataclass(frozen=True)
class Case:
    """A method whose adapters the limited engine refuses, with a part of the reason."""

    method: str
    limit: Callable[[BaseSupport], BaseSupport]
    reason: str = REASON


CASES = {
    "a projection": Case("lora", without(SiteKind.LINEAR, f"{LAYER}.self_attn.q_proj")),
    "a norm": Case("ln_tuning", without(SiteKind.NORM, f"{LAYER}.input_layernorm")),
    "a block": Case("pfeiffer", without(SiteKind.BLOCK, "layers.1.feed_forward")),
    "an attention": Case("prefix", without(SiteKind.ATTENTION, "layers.1.attention")),
    "the embedding": Case("prompt", without(SiteKind.EMBEDDING, "model.embed_tokens")),
    "the head": Case("full", without(SiteKind.HEAD, "lm_head")),
    "the input of a packed projection": Case(
        "ia3",
        lambda support: replace(support, packed=frozenset({f"{LAYER}.mlp.down_proj"})),
        "its input alone cannot be changed",
    ),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
async def test_an_upload_that_the_base_does_not_take_changes_nothing_and_hears_why(
    case: Case, serve: Servers, tiny_base: Path, tmp_path: Path
) -> None:
    base = BaseModel.from_pretrained(tiny_base)
    adapter = write_own(case.method, base, tmp_path / case.method)
    async with serve(lambda _: Limited(tiny_base, case.limit)) as served, served.client() as client:
        await client.upload_adapter(NAME, write_own("lora", base, tmp_path / "first", target_modules=["k_proj"]))
        before = await state(client, served)
        with pytest.raises(BaseMismatchError, match=case.reason) as refused:
            await client.upload_adapter(NAME, adapter, promote=True)
        assert refused.value.metadata["site"]
        assert await state(client, served) == before
        fits = (await client.get_base()).methods
        assert case.reason in fits[case.method]


async def state(client: AsyncClient, served: Served) -> tuple[object, ...]:
    versions = await client.list_adapter_versions(NAME)
    answer = await client.generate("hello", adapter=NAME, **GREEDY)
    return await client.get_adapter(NAME), versions, answer.token_ids, sorted(served.store.root.rglob("*.safetensors"))


async def test_every_method_that_trains_fits_a_base_that_takes_all(client: AsyncClient) -> None:
    methods = (await client.get_base()).methods
    assert len(methods) > 20
    assert set(methods.values()) == {""}


class Unknown(Bias):
    """An op of a plugin that does not say which of its tensors are by output."""


def test_an_op_follows_the_engines_model_or_is_refused(base: BaseModel) -> None:
    sites = frozenset((str(kind), name) for kind, name in base.sites)
    linear = base.linears[0]
    support = BaseSupport(sites, reordered=frozenset({linear.name}), scaled_embedding=True)
    bias = torch.zeros(linear.out_features)
    assert support.refusal(linear.name, Bias(bias)) is None
    assert "in another order" in (support.refusal(linear.name, Unknown(bias)) or "")
    assert support.refusal(base.linears[1].name, Unknown(bias)) is None
    _, block = bottleneck(1, residual=True)
    unread = replace(support, without_norm=frozenset({base.blocks[0].name}))
    assert support.refusal(base.blocks[0].name, block) is None
    assert "no norm before" in (unread.refusal(base.blocks[0].name, block) or "")
    prompt = SoftPrompt(torch.zeros(2, base.embedding.features))
    assert support.refusal(base.embedding.name, prompt) is None
    assert "no linear site" in (support.refusal("model.other", Bias(bias)) or "")
    with pytest.raises(BaseMismatchError, match="in another order"):
        support.check(Program.of([(linear.name, Unknown(bias))]))

"""What the server knows of an engine: requests in, chunks out, and programs by digest. Needs neither torch nor vLLM."""

from __future__ import annotations

import json
import re
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from deltamux.errors import InvalidArgumentError

if TYPE_CHECKING:
    from deltamux.deltas import BaseModel


@dataclass(frozen=True)
class EngineOptions:
    """What an engine is started with.

    Attributes:
        model: directory or Hugging Face id of the base model.
        dtype: "auto", "float32", "bfloat16" or "float16".
        device: "auto", "cpu" or "cuda".
        max_active_adapters: device slots: how many programs one batch may mix.
        max_host_adapters: programs kept ready in host memory.
        max_model_len: longest context in tokens, virtual tokens included; None takes the model's own.
        max_num_seqs: most sequences in one batch.
        kv_cache_gib: size of the key-value cache on CPU.
        engine_arguments: handed to the engine as they are, by its own names; they win over everything above.
    """

    model: str | Path
    dtype: str = "auto"
    device: str = "auto"
    max_active_adapters: int = 16
    max_host_adapters: int = 128
    max_model_len: int | None = None
    max_num_seqs: int = 64
    kv_cache_gib: float = 2.0
    seed: int = 0
    engine_arguments: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class ProgramRef:
    """A compiled program in the store.

    Attributes:
        digest: content digest of the version; equal digests are equal programs.
        path: the compiled file, readable for as long as the version exists.
    """

    digest: str
    path: Path
    num_virtual_tokens: int


@dataclass(frozen=True)
class GuidedDecoding:
    """Holds the output to a JSON schema (its text), a regular expression, or one of several strings: exactly one."""

    json_schema: str | None = None
    regex: str | None = None
    choice: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        given = [self.json_schema is not None, self.regex is not None, bool(self.choice)]
        if sum(given) != 1:
            raise _invalid("structured_output", "needs exactly one of json_schema, regex and choice")
        if self.json_schema is not None:
            _check_json_object(self.json_schema)
        if self.regex is not None:
            _check_regex(self.regex)


@dataclass(frozen=True)
class SamplingOptions:
    """How tokens are chosen; the names, defaults and meanings are those of vLLM's ``SamplingParams``.

    Attributes:
        max_tokens: None generates up to the end of the context.
        logprobs: None gives none; n gives the chosen token's and the n best alternatives' a generated token.
        logit_bias: token id to what is added to its logit.

    Raises:
        InvalidArgumentError: a value is out of range; the metadata name the field.
    """

    max_tokens: int | None = 16
    min_tokens: int = 0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    seed: int | None = None
    logprobs: int | None = None
    skip_special_tokens: bool = True
    guided: GuidedDecoding | None = None
    logit_bias: Mapping[int, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, (fits, requirement) in _checks(self).items():
            if not fits:
                raise _invalid(name, f"must be {requirement}, not {getattr(self, name)}")


@dataclass(frozen=True)
class TokenLogprobs:
    """Log-probability of a generated token, and of the best tokens of its position as (token id, value), best first."""

    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class GenerationChunk:
    """What a request has generated since its last chunk.

    Attributes:
        logprobs: one a token id, or empty where none were asked for.
        finish_reason: "stop" or "length" in the last chunk, otherwise None.
        stop_reason: the stop string or stop token id that ended it, where one did.
        prompt_tokens: tokens of the prompt; virtual tokens are not counted.
        cached_tokens: how many of those were served from the prefix cache.
    """

    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprobs, ...] = ()
    finish_reason: str | None = None
    stop_reason: str | int | None = None
    prompt_tokens: int = 0
    cached_tokens: int = 0


@dataclass(frozen=True)
class ChatMessage:
    role: str
    content: str


Prompt = str | tuple[int, ...] | tuple[ChatMessage, ...]
"""Text, token ids, or a conversation that the base model's chat template lays out."""


@dataclass(frozen=True)
class EngineStats:
    """A look at the engine: requests by state, programs by tier, share of the key-value cache in use."""

    running: int = 0
    waiting: int = 0
    host_programs: int = 0
    device_programs: int = 0
    device_slots: int = 0
    kv_cache_usage: float = 0.0


class Engine(Protocol):
    """Runs one base model for many programs at once."""

    base: BaseModel

    async def start(self) -> None:
        """Loads the base model; returns when requests are taken.

        Raises:
            FailedPreconditionError: the model or the device does not allow it; the message says what to change.
        """

    async def stop(self) -> None:
        """Frees everything; requests under way end with UnavailableError."""

    def generate(
        self, prompt: Prompt, sampling: SamplingOptions, program: ProgramRef | None, *, request_id: str
    ) -> AsyncIterator[GenerationChunk]:
        """Yields chunks as tokens come; closing the iterator aborts the request and frees what it held.

        Args:
            program: what is added to the base model; None generates with the base alone.
            request_id: unique among requests under way.

        Raises:
            InvalidArgumentError: the prompt is empty, too long, or has tokens outside the vocabulary.
            UnavailableError: the engine has stopped.
        """
        ...

    async def prepare(self, program: ProgramRef) -> None:
        """Brings a program into host memory, off the step loop, so that its first request finds it there."""

    async def pin(self, digest: str) -> None:
        """Keeps a program in host memory until it is unpinned."""

    async def unpin(self, digest: str) -> None: ...

    async def evict(self, digest: str) -> None:
        """Drops a program from every tier now, or as soon as its last request ends; waits for nothing."""

    async def stats(self) -> EngineStats: ...

    @property
    def healthy(self) -> bool:
        """Whether requests are taken; once False it stays so until `start`."""
        ...


def _checks(options: SamplingOptions) -> dict[str, tuple[bool, str]]:
    """Returns for every bounded field whether it fits, and the requirement in words. NaN fits nowhere."""
    o = options
    room = o.max_tokens if o.max_tokens is not None else o.min_tokens
    return {
        "max_tokens": (o.max_tokens is None or o.max_tokens >= 1, "at least 1"),
        "min_tokens": (0 <= o.min_tokens <= room, f"between 0 and max_tokens ({room})"),
        "temperature": (0.0 <= o.temperature <= 100.0, "between 0 and 100"),
        "top_p": (0.0 < o.top_p <= 1.0, "above 0 and at most 1"),
        "top_k": (o.top_k >= 0, "0 (all tokens) or more"),
        "min_p": (0.0 <= o.min_p <= 1.0, "between 0 and 1"),
        "presence_penalty": (-2.0 <= o.presence_penalty <= 2.0, "between -2 and 2"),
        "frequency_penalty": (-2.0 <= o.frequency_penalty <= 2.0, "between -2 and 2"),
        "repetition_penalty": (0.0 < o.repetition_penalty <= 100.0, "above 0 and at most 100"),
        "stop": (all(o.stop), "strings that are not empty"),
        "logprobs": (o.logprobs is None or 0 <= o.logprobs <= 20, "between 0 and 20"),
        "logit_bias": (all(-100.0 <= v <= 100.0 for v in o.logit_bias.values()), "values between -100 and 100"),
    }


def _check_json_object(text: str) -> None:
    try:
        schema = json.loads(text)
    except ValueError as error:
        raise _invalid("structured_output.json_schema", f"is no JSON: {error}") from error
    if not isinstance(schema, dict):
        raise _invalid("structured_output.json_schema", f"must be a JSON object, not {type(schema).__name__}")


def _check_regex(pattern: str) -> None:
    try:
        re.compile(pattern)
    except re.error as error:
        raise _invalid("structured_output.regex", f"is no regular expression: {error}") from error


def _invalid(field_name: str, problem: str) -> InvalidArgumentError:
    return InvalidArgumentError(
        f"{field_name} {problem}", reason="INVALID_SAMPLING", metadata={"field": f"sampling.{field_name}"}
    )

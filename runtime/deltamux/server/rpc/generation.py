"""Translation of generation requests and their results between messages and the runtime's types."""

from collections.abc import Callable
from typing import Any

from deltamux.engine.base import ChatMessage, GenerationChunk, Prompt, SamplingOptions, StructuredOutput, TokenLogprobs
from deltamux.engine.checks import too_long
from deltamux.engine.grammar_bounds import invalid
from deltamux.errors import InvalidArgumentError, UnavailableError
from deltamux.v1 import inference_pb2 as pb

_FINISH_REASONS = {"stop": pb.FINISH_REASON_STOP, "length": pb.FINISH_REASON_LENGTH}


def prompt_of(request: pb.GenerateRequest, max_tokens: int) -> Prompt:
    """Returns the prompt; raises InvalidArgumentError if the request has none, or more than `max_tokens` ids."""
    kind = request.WhichOneof("prompt")
    if kind == "text":
        return request.text
    if kind == "token_ids":
        if (count := len(request.token_ids.values)) > max_tokens:
            raise too_long(f"has {count} tokens", max_tokens, tokens=count)
        return tuple(request.token_ids.values)
    if kind == "chat" and request.chat.messages:
        return tuple(ChatMessage(m.role, m.content) for m in request.chat.messages)
    raise InvalidArgumentError(
        "the request has no prompt: set one of text, token_ids and chat",
        reason="EMPTY_PROMPT",
        metadata={"field": "prompt"},
    )


def sampling_of(message: pb.SamplingParameters) -> SamplingOptions:
    """Returns the options, unset fields at their defaults; raises InvalidArgumentError naming a field out of range."""
    given: dict[str, Any] = {field.name: value for field, value in message.ListFields()}
    if given.pop("fill_context", False):
        if "max_tokens" in given:
            raise invalid("fill_context", "excludes max_tokens: set one of them", "INVALID_SAMPLING")
        given["max_tokens"] = None
    for name, convert in _CONVERSIONS.items():
        if name in given:
            given[name] = convert(given[name])
    if "structured_output" in given:
        given["structured_output"] = _structured_output_of(given["structured_output"])
    return SamplingOptions(**given)


_CONVERSIONS: dict[str, Callable[[Any], Any]] = {"stop": tuple, "stop_token_ids": tuple, "logit_bias": dict}


def _structured_output_of(message: pb.StructuredOutput) -> StructuredOutput:
    kind = message.WhichOneof("format")
    if kind == "choice":
        return StructuredOutput(choice=tuple(message.choice.options))
    return StructuredOutput(
        json_schema=message.json_schema if kind == "json_schema" else None,
        regex=message.regex if kind == "regex" else None,
    )


class Responses:
    """Translation of one request's chunks to responses, with a count of their tokens.

    Args:
        alternatives: whether the likeliest tokens of every position were requested.
        adapter_version: resource name of the version that serves the request; "" for the base.
    """

    def __init__(self, alternatives: bool, *, adapter_version: str, request_id: str) -> None:
        self._alternatives = alternatives
        self._adapter_version = adapter_version
        self._request_id = request_id
        self._completion_tokens = 0

    def of(self, chunk: GenerationChunk) -> pb.GenerateResponse:
        self._completion_tokens += len(chunk.token_ids)
        response = pb.GenerateResponse(
            text=chunk.text,
            token_ids=chunk.token_ids,
            logprobs=[position.logprob for position in chunk.logprobs],
            top_logprobs=[_top(position) for position in chunk.logprobs] if self._alternatives else [],
            finish_reason=_finish_reason(chunk.finish_reason),
            usage=pb.Usage(
                prompt_tokens=chunk.prompt_tokens,
                completion_tokens=self._completion_tokens,
                cached_tokens=chunk.cached_tokens,
            ),
            adapter_version=self._adapter_version,
            request_id=self._request_id,
        )
        if isinstance(chunk.stop_reason, str):
            response.stop_string = chunk.stop_reason
        elif chunk.stop_reason is not None:
            response.stop_token_id = chunk.stop_reason
        return response


def add_increment(whole: pb.GenerateResponse, increment: pb.GenerateResponse) -> None:
    """Adds an increment to a response: text and tokens are appended, other fields are replaced."""
    # MergeFrom appends repeated fields and replaces set scalars; text alone is a scalar that must grow.
    text = whole.text + increment.text
    whole.MergeFrom(increment)
    whole.text = text


def _top(position: TokenLogprobs) -> pb.TopLogprobs:
    return pb.TopLogprobs(
        token_ids=[token for token, _ in position.top], logprobs=[logprob for _, logprob in position.top]
    )


def _finish_reason(reason: str | None) -> pb.FinishReason.ValueType:
    if reason is None:
        return pb.FINISH_REASON_UNSPECIFIED
    if reason not in _FINISH_REASONS:
        raise UnavailableError(f"the engine aborted the generation ({reason}); it may be sent again")
    return _FINISH_REASONS[reason]

"""Translation of sampling options to vLLM's parameters, and of vLLM's outputs to generation chunks."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from vllm import SamplingParams
from vllm.exceptions import GracefulHTTPError, VLLMClientError, VLLMServerError
from vllm.outputs import CompletionOutput, RequestOutput
from vllm.sampling_params import RequestOutputKind, StructuredOutputsParams
from vllm.v1.engine.exceptions import EngineDeadError, EngineGenerateError

from deltamux.engine.base import GenerationChunk, SamplingOptions, StructuredOutput, TokenLogprobs
from deltamux.engine.vllm.grammars.admission import Constraint
from deltamux.errors import InvalidArgumentError, UnavailableError

MAX_MESSAGE = 500
"""Characters of a message of vLLM's about a request; it quotes values whole."""


@contextmanager
def callers_mistakes() -> Iterator[None]:
    """A block in which vLLM checks a caller's parameters: what it refuses is INVALID_ARGUMENT."""
    try:
        yield
    except (VLLMClientError, ValueError) as error:
        field = getattr(error, "parameter", None)
        # The message alone: a validation error's `str` holds the refused value too.
        text = str(error.args[0] if error.args else error)
        raise InvalidArgumentError(
            text if len(text) <= MAX_MESSAGE else f"{text[:MAX_MESSAGE]}…",
            metadata={"field": f"sampling.{field}"} if field else None,
        ) from error


@contextmanager
def engine_faults() -> Iterator[None]:
    """A block in which a request runs: an engine that has died, or refuses requests, is UNAVAILABLE."""
    try:
        yield
    except (EngineDeadError, EngineGenerateError) as error:
        raise UnavailableError("the engine has stopped; the request may be sent again once it is back") from error
    except (GracefulHTTPError, VLLMServerError) as error:
        raise UnavailableError(f"the engine ended the request; it may be sent again ({error})") from error


class AdmittedParams(SamplingParams, dict=True):
    """Parameters with an admitted grammar, which vLLM does not parse again: other requests would wait for that."""

    def _validate_structured_outputs(self, *unused: object) -> None:
        return None


def sampling_params(options: SamplingOptions, constraint: Constraint | None, *, stream: bool) -> SamplingParams:
    """Returns vLLM's parameters; call it within `callers_mistakes`.

    Args:
        constraint: the admitted grammar; without one, vLLM checks that of the options.
        stream: return tokens as they come; otherwise all of them at the end.
    """
    kind = SamplingParams if constraint is None else AdmittedParams
    return kind(
        max_tokens=options.max_tokens,
        min_tokens=options.min_tokens,
        temperature=options.temperature,
        top_p=options.top_p,
        top_k=options.top_k,
        min_p=options.min_p,
        presence_penalty=options.presence_penalty,
        frequency_penalty=options.frequency_penalty,
        repetition_penalty=options.repetition_penalty,
        stop=list(options.stop),
        stop_token_ids=list(options.stop_token_ids),
        include_stop_str_in_output=options.include_stop_str_in_output,
        ignore_eos=options.ignore_eos,
        seed=options.seed,
        logprobs=options.logprobs,
        skip_special_tokens=options.skip_special_tokens,
        logit_bias=dict(options.logit_bias) or None,
        structured_outputs=_unchecked(options.structured_output) if constraint is None else _admitted(constraint),
        output_kind=RequestOutputKind.DELTA if stream else RequestOutputKind.FINAL_ONLY,
    )


def _unchecked(structured_output: StructuredOutput | None) -> StructuredOutputsParams | None:
    if structured_output is None:
        return None
    if structured_output.json_schema is not None:
        return StructuredOutputsParams(json=structured_output.json_schema)
    if structured_output.regex is not None:
        return StructuredOutputsParams(regex=structured_output.regex)
    return StructuredOutputsParams(choice=list(structured_output.choice))


def _admitted(constraint: Constraint) -> StructuredOutputsParams:
    given: dict[str, Any] = {constraint.kind: constraint.text}
    params = StructuredOutputsParams(**given)
    params._backend = "xgrammar"
    return params


def chunk(output: RequestOutput, prompt_tokens: int, num_virtual_tokens: int) -> GenerationChunk:
    """Returns an output's new tokens; virtual tokens count neither as prompt nor as cached."""
    completion: CompletionOutput = output.outputs[0]
    return GenerationChunk(
        text=completion.text,
        token_ids=tuple(completion.token_ids),
        logprobs=_logprobs(completion),
        finish_reason=completion.finish_reason,
        stop_reason=completion.stop_reason,
        prompt_tokens=prompt_tokens,
        cached_tokens=max(0, (output.num_cached_tokens or 0) - num_virtual_tokens),
    )


def _logprobs(completion: CompletionOutput) -> tuple[TokenLogprobs, ...]:
    if completion.logprobs is None:
        return ()
    # vLLM returns all positions so far or the new ones only, depending on the output kind: the last ones are new.
    new: list[Any] = list(completion.logprobs)[-len(completion.token_ids) :] if completion.token_ids else []
    return tuple(
        TokenLogprobs(
            position[token].logprob,
            tuple(sorted(((t, p.logprob) for t, p in position.items()), key=lambda pair: -pair[1])),
        )
        for token, position in zip(completion.token_ids, new, strict=True)
    )

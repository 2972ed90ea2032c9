"""`Engine`: the interface between the server and an engine, which serves one base model. Imports no torch.

Programs are identified by digest; methods, tenants and names are unknown to an engine.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple, Protocol

from deltamux.engine.grammar_bounds import check_choice, check_regex, check_schema, invalid
from deltamux.options import DTYPES, Option, Range, check_declared

if TYPE_CHECKING:
    from deltamux.deltas import BaseModel, BaseSupport


class ChatMessage(NamedTuple):
    """One message of a conversation; `role` is ``system``, ``user`` or ``assistant``."""

    role: str
    content: str


Prompt = str | tuple[int, ...] | tuple[ChatMessage, ...]
"""Text, token ids, or chat messages (rendered with the base model's chat template)."""


@dataclass(frozen=True)
class EngineOptions:
    """The options of an engine, which the command line has as well.

    Attributes:
        warm_grammars: start the process that compiles grammars with the engine, and not with the first grammar.
        engine_arguments: further arguments of vLLM's AsyncEngineArgs.

    Raises:
        InvalidConfigError: a value is out of range; the metadata name the field.
    """

    model: Annotated[str, Option("directory or Hugging Face id of the base model")]
    dtype: Annotated[str, Option("of the weights", choices=("auto", *DTYPES))] = "auto"
    device: Annotated[str, Option("where the model runs", choices=("auto", "cpu", "cuda"))] = "auto"
    max_model_len: Annotated[
        int | None, Option("longest context in tokens, virtual tokens included", Range(2, 1 << 27), unset="the model's")
    ] = None
    max_num_seqs: Annotated[int, Option("most sequences in one batch", Range(1, 1 << 16))] = 64
    max_active_adapters: Annotated[
        int | None, Option("adapters that one batch may mix", Range(1, 4096), unset="32 on a CPU, 8 on a GPU")
    ] = None
    max_host_adapters: Annotated[int, Option("compiled adapters kept ready in host memory", Range(1, 1_000_000))] = 256
    kv_cache_gib: Annotated[float, Option("size of the key-value cache on a CPU, in GiB", Range(0.01, 65536.0))] = 2.0
    enforce_eager: Annotated[
        bool, Option("leave the model uncompiled, and without CUDA graphs: ready sooner, slower at every token")
    ] = False
    auto_merge: Annotated[
        bool,
        Option(
            "never merge the adapter that carries most of the traffic into a second copy of the weights (on a CPU, "
            "where that is measured to be faster)",
            aliases=("fold_dominant",),
        ),
    ] = True
    grammar_seconds: Annotated[
        float, Option("CPU time that compiling the grammar of a structured output may take", Range(0.05, 60.0))
    ] = 2.0
    warm_grammars: bool = False
    seed: int = 0
    engine_arguments: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_declared(self)


@dataclass(frozen=True)
class ProgramRef:
    """A compiled program in the store.

    Attributes:
        digest: its identity: equal digests change the base alike.
        path: its file; replaced as a whole, if at all, by one of the same meaning.
        sha256: of the file, in hex: every load checks it. "" leaves it unchecked.
    """

    digest: str
    path: Path
    num_virtual_tokens: int = 0
    sha256: str = ""


@dataclass(frozen=True)
class StructuredOutput:
    """Structured output: exactly one of the three is set; a JSON schema is its text.

    Raises:
        InvalidArgumentError: none or several are set, or what is set is beyond the bounds of `grammar_bounds`.
    """

    json_schema: str | None = None
    regex: str | None = None
    choice: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if [self.json_schema is not None, self.regex is not None, bool(self.choice)].count(True) != 1:
            raise invalid("structured_output", "needs exactly one of json_schema, regex and choice", "INVALID_SAMPLING")
        if self.json_schema is not None:
            check_schema(self.json_schema)
        elif self.regex is not None:
            check_regex(self.regex)
        else:
            check_choice(self.choice)


@dataclass(frozen=True)
class SamplingOptions:
    """Sampling parameters, with vLLM's names and defaults.

    Attributes:
        max_tokens: None: as many as the context holds.
        logit_bias: token id to what is added to its logit.

    Raises:
        InvalidArgumentError: a value is out of range; the metadata name the field.
    """

    max_tokens: Annotated[int | None, Option("most tokens to generate")] = 16
    min_tokens: Annotated[int, Option("fewest tokens to generate")] = 0
    temperature: Annotated[float, Option("of sampling; 0 takes the likeliest token")] = 1.0
    top_p: Annotated[float, Option("sample from the likeliest tokens of this probability in all")] = 1.0
    top_k: Annotated[int, Option("sample from so many of the likeliest tokens; 0 is all")] = 0
    min_p: Annotated[float, Option("least probability of a token, as a share of the likeliest one's")] = 0.0
    presence_penalty: Annotated[float, Option("taken from the logits of tokens that were generated")] = 0.0
    frequency_penalty: Annotated[float, Option("the same, for each time that a token was generated")] = 0.0
    repetition_penalty: Annotated[float, Option("factor against tokens of prompt and answer; 1 is none")] = 1.0
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    seed: Annotated[int | None, Option("of sampling", unset="another one each time")] = None
    logprobs: Annotated[
        int | None, Option("alternatives to report for each token, with log-probabilities", unset="nothing is reported")
    ] = None
    skip_special_tokens: bool = True
    structured_output: StructuredOutput | None = None
    logit_bias: Mapping[int, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, (fits, requirement) in _checks(self).items():
            if not fits:
                raise invalid(name, f"must be {requirement}, not {str(getattr(self, name))[:80]}", "INVALID_SAMPLING")


@dataclass(frozen=True)
class TokenLogprobs:
    """A generated token's log-probability (natural logarithm) and the likeliest alternatives.

    Attributes:
        top: (token id, log-probability), best first; holds the generated token too.
    """

    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class GenerationChunk:
    """The tokens of a request since its last chunk. Virtual tokens are never counted or shown.

    Attributes:
        finish_reason: ``stop``, ``length`` or ``abort`` in the last chunk, None before.
        stop_reason: the stop string or token id that ended it, if one did.
        prompt_tokens: tokens of the caller's prompt.
        cached_tokens: of these, how many came from the prefix cache.
    """

    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprobs, ...] = ()
    finish_reason: str | None = None
    stop_reason: str | int | None = None
    prompt_tokens: int = 0
    cached_tokens: int = 0


@dataclass(frozen=True)
class EngineStats:
    """The engine's state.

    Attributes:
        running: requests under way (in vLLM's queue or batch).
        host_programs: programs in host memory.
        device_programs: programs in device slots, of `device_slots`.
        merged_program: digest of the program that is merged into second weights at the moment, if any.
    """

    running: int
    host_programs: int
    device_programs: int
    device_slots: int
    merged_program: str | None = None


class Engine(Protocol):
    """An engine. Methods raise the family of `deltamux.errors`; UnavailableError once the engine has died.

    Attributes:
        max_model_len: longest sequence in tokens; support: what the base takes. Both are known once it has started.
    """

    base: BaseModel
    max_model_len: int
    support: BaseSupport | None

    async def start(self) -> None:
        """Loads the base model; returns when requests can be served."""
        ...

    async def stop(self) -> None:
        """Ends the engine's processes, also of one that hangs or has died; requests under way end with UNAVAILABLE."""
        ...

    def generate(
        self,
        prompt: Prompt,
        sampling: SamplingOptions,
        program: ProgramRef | None,
        *,
        request_id: str,
        stream: bool = True,
        group: str = "",
        cache_salt: str = "",
    ) -> AsyncGenerator[GenerationChunk]:
        """Yields chunks as they come; closing the iterator, or cancelling its task, aborts the generation.

        The first token comes at once. Later ones may merge while the reader is slower than the engine, or while many
        requests run, so that the machine's time goes to the model.

        Args:
            stream: False: the last chunk may hold everything.
            group: of the request; costly preparations are served round robin by group.
            cache_salt: requests reuse the cached keys and values of those with the same salt alone.
        """
        ...

    async def prepare(self, program: ProgramRef) -> None:
        """Brings a program into host memory, off the step loop.

        Raises:
            FailedPreconditionError: the engine cannot use the program.
            DataLossError: its file is missing, or is not what was stored; it is read again at the next call.
        """
        ...

    async def check(self, program: ProgramRef) -> None:
        """Loads a program that is not stored yet, and drops it; no other is evicted for it.

        Raises:
            FailedPreconditionError: the engine cannot use the program.
        """
        ...

    async def pin(self, program: ProgramRef) -> None:
        """Brings a program into host memory and keeps it there, and in its device slot, until `unpin`.

        Raises:
            FailedPreconditionError: the engine cannot use the program.
        """
        ...

    async def unpin(self, digest: str) -> None: ...

    async def evict(self, digest: str) -> None:
        """Frees a program in host memory and in its slot, as soon as no request uses it; returns at once."""
        ...

    async def stats(self) -> EngineStats: ...

    async def ping(self) -> None:
        """Returns once the engine answers, which it does between steps; costs an idle engine nothing."""
        ...

    @property
    def healthy(self) -> bool: ...


def _checks(o: SamplingOptions) -> dict[str, tuple[bool, str]]:
    """Returns for every bounded field whether it fits, and the requirement in words. NaN fits nowhere."""
    room = o.max_tokens if o.max_tokens is not None else o.min_tokens
    return {
        "max_tokens": (o.max_tokens is None or o.max_tokens >= 1, "at least 1"),
        "min_tokens": (0 <= o.min_tokens <= room, f"between 0 and max_tokens ({room})"),
        "temperature": (0.0 <= o.temperature <= 2.0, "between 0 and 2"),
        "top_p": (0.0 < o.top_p <= 1.0, "above 0 and at most 1"),
        "top_k": (o.top_k >= 0, "0 (all tokens) or more"),
        "min_p": (0.0 <= o.min_p <= 1.0, "between 0 and 1"),
        "presence_penalty": (-2.0 <= o.presence_penalty <= 2.0, "between -2 and 2"),
        "frequency_penalty": (-2.0 <= o.frequency_penalty <= 2.0, "between -2 and 2"),
        "repetition_penalty": (0.0 < o.repetition_penalty <= 100.0, "above 0 and at most 100"),
        "stop": (all(o.stop), "strings that are not empty"),
        "logprobs": (o.logprobs is None or 0 <= o.logprobs <= 20, "between 0 and 20"),
        "ignore_eos": (
            not (o.ignore_eos and o.structured_output),
            "false with structured_output, which decides where the text ends",
        ),
        "logit_bias": (all(-100.0 <= v <= 100.0 for v in o.logit_bias.values()), "values between -100 and 100"),
    }

"""`Grammars`: admits to the engine the grammars that compile within a budget.

vLLM compiles grammars in the engine's process, and fills a grammar's token mask inside the step that all requests
share. So each grammar is first compiled and followed for some tokens in another process (`compiler.py`), with limits on
CPU time, memory, and time per token. Verdicts are cached.
"""

import asyncio
import hashlib
import logging
from collections import OrderedDict
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, NamedTuple, Self

from deltamux.engine.base import StructuredOutput
from deltamux.engine.fair import FairQueue
from deltamux.engine.grammar_bounds import CHOICE, REGEX, SCHEMA, invalid
from deltamux.engine.vllm.grammars.process import GrammarProcess, Settings
from deltamux.engine.vllm.grammars.schemas import honoured
from deltamux.engine.vllm.grammars.vocabulary import vocabulary_of
from deltamux.errors import UnavailableError

log = logging.getLogger("deltamux.engine")

QUICK_SECONDS = 0.5
"""CPU time of a grammar's first try, within which most end; those that need more queue among themselves."""

REMEMBERED = 4096
"""Verdicts in the cache."""

MAX_WAITING = 32
"""Grammars of one group that may wait; one more is refused."""


class Constraint(NamedTuple):
    """Structured output as the engine takes it.

    Attributes:
        kind: field of vLLM's StructuredOutputsParams: ``json``, ``regex`` or ``grammar``.
        field: the request's field, for messages.
    """

    kind: str
    text: str
    field: str

    @property
    def digest(self) -> bytes:
        return hashlib.sha256(f"{self.kind}\0{self.text}".encode("utf-8", "surrogatepass")).digest()


@dataclass
class _Trial:
    """A grammar that is tried, for one or more requests of one group."""

    task: asyncio.Task[str | None]
    callers: int = 0


class Grammars:
    """The grammars that are admitted, or tried. `close` it.

    Args:
        seconds: CPU time that compiling one grammar may take.
    """

    def __init__(self, settings: Settings, seconds: float) -> None:
        self._seconds = seconds
        self._process = GrammarProcess(settings)
        # Within both, one group holds one place at a time.
        self._quick = FairQueue(2, MAX_WAITING, "grammars", per_group=1)
        self._long = FairQueue(1, MAX_WAITING, "grammars")
        self._verdicts: OrderedDict[bytes, str | None] = OrderedDict()
        self._warming: asyncio.Task[None] | None = None
        self._trials: dict[tuple[str, bytes], _Trial] = {}

    @classmethod
    def of(cls, vllm_config: Any, tokenizer: Any, seconds: float) -> Self | None:
        """Returns that of an engine; None where its backend of grammars is not xgrammar."""
        settings = settings_of(vllm_config, tokenizer)
        return cls(settings, seconds) if settings is not None else None

    def warm(self) -> None:
        """Begins to start the process, so that the first grammar finds it."""
        self._warming = asyncio.create_task(self._warm())

    async def _warm(self) -> None:
        with suppress(UnavailableError):  # the first grammar tries again, and fails with the reason
            await self._process.start()

    async def close(self) -> None:
        """Ends the process, and every grammar in it."""
        if self._warming is not None:
            self._warming.cancel()
        await self._process.close()

    async def admit(self, structured_output: StructuredOutput, group: str) -> Constraint:
        """Returns structured output in the engine's form. Cancelling ends the work for it.

        Args:
            group: of the request; waiting grammars are served round robin by group.
        Raises:
            InvalidArgumentError: the grammar is not supported, matches nothing, or exceeds its budget
                (GRAMMAR_TOO_COMPLEX); the metadata name the field.
            ResourceExhaustedError: too many grammars of the group wait.
            UnavailableError: there is no process to try it in.
        """
        constraint = await asyncio.to_thread(constraint_of, structured_output)
        problem = await self._verdict(constraint, group)
        if problem is not None:
            too_complex = problem.startswith(("takes", "compiles"))
            raise invalid(constraint.field, problem, "GRAMMAR_TOO_COMPLEX" if too_complex else "INVALID_GRAMMAR")
        return constraint

    async def _verdict(self, constraint: Constraint, group: str) -> str | None:
        key = constraint.digest
        if key in self._verdicts:
            self._verdicts.move_to_end(key)
            return self._verdicts[key]
        trial = self._trials.get((group, key))
        if trial is None or trial.task.done():
            trial = _Trial(asyncio.create_task(self._try(constraint, key, group)))
            self._trials[group, key] = trial
        trial.callers += 1
        try:
            return await asyncio.shield(trial.task)
        finally:
            trial.callers -= 1
            if not trial.callers:
                trial.task.cancel()
                if self._trials.get((group, key)) is trial:
                    del self._trials[group, key]

    async def _try(self, constraint: Constraint, key: bytes, group: str) -> str | None:
        first = min(QUICK_SECONDS, self._seconds)
        async with self._quick.place(group):
            if key in self._verdicts:  # tried for another group meanwhile
                return self._verdicts[key]
            answer = await self._process.run(constraint.kind, constraint.text, first)
        if answer.ended and first < self._seconds:
            async with self._long.place(group):
                answer = await self._process.run(constraint.kind, constraint.text, self._seconds)
        problem = answer.problem
        if answer.ended:
            problem = (
                f"takes more than {self._seconds:g} s or {self._process.settings.memory_bytes >> 20} MiB to compile"
            )
        self._remember(key, problem)
        return problem

    def _remember(self, key: bytes, problem: str | None) -> None:
        self._verdicts[key] = problem
        if len(self._verdicts) > REMEMBERED:
            self._verdicts.popitem(last=False)


def constraint_of(structured_output: StructuredOutput) -> Constraint:
    """Returns the engine's form of it; raises InvalidArgumentError for a schema that it would not honour."""
    import json

    from vllm.v1.structured_output.backend_xgrammar import has_xgrammar_unsupported_json_features
    from vllm.v1.structured_output.utils import choice_as_grammar

    if structured_output.json_schema is not None:
        schema = honoured(structured_output.json_schema)
        try:
            unsupported = has_xgrammar_unsupported_json_features(json.loads(schema))
        except TypeError:  # a format that is no text, where no output is read from it
            unsupported = True
        if unsupported:
            raise invalid(SCHEMA, "has a keyword, or a combination of keywords, that structured output cannot hold to")
        return Constraint("json", schema, SCHEMA)
    if structured_output.regex is not None:
        return Constraint("regex", structured_output.regex, REGEX)
    return Constraint("grammar", choice_as_grammar(list(structured_output.choice)), CHOICE)


def settings_of(vllm_config: Any, tokenizer: Any) -> Settings | None:
    """Returns the settings for an engine.

    None where the operator chose another backend than xgrammar, or xgrammar cannot read the vocabulary: then vLLM
    alone decides.
    """
    from vllm.v1.structured_output.backend_xgrammar import XgrammarBackend

    config = vllm_config.structured_outputs_config
    if config.backend != "xgrammar":
        return None
    vocab_size = vllm_config.model_config.get_vocab_size()
    try:
        backend = XgrammarBackend(vllm_config, tokenizer=tokenizer, vocab_size=vocab_size)
    except Exception:
        log.exception("structured output is not available with this base: xgrammar cannot read its tokenizer")
        return None
    return Settings(
        tokenizer=vocabulary_of(backend, tokenizer).serialize_json(),
        any_whitespace=not config.disable_any_whitespace,
        separators=(",", ":") if config.disable_any_whitespace else None,
    )

"""Compiles grammars in the engine core's process: several at once, on threads of lower priority than the steps."""

import os
import sys
import threading
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any

from vllm import envs
from vllm.v1.structured_output.backend_xgrammar import XgrammarBackend

from deltamux.engine.vllm.grammars.vocabulary import vocabulary_of

THREADS = 4
"""Grammars compiled at once, each by one thread. With vLLM's own setting, one grammar by eight threads on two cores, a
small one waits for a large one, and the step loses more of the cores."""

NICE = 10


def prepare_grammars(manager: Any) -> None:
    """Makes vLLM's `StructuredOutputManager` ready before the first grammar, which would delay a step."""
    if manager.vllm_config.structured_outputs_config.backend != "xgrammar" or not hasattr(manager, "tokenizer"):
        return
    manager.executor.shutdown(wait=False)
    manager.executor = ThreadPoolExecutor(THREADS, "deltamux-grammars", initializer=_lower_priority)
    vocab_size = manager.vllm_config.model_config.get_vocab_size()
    # Where xgrammar cannot read the vocabulary, the first grammar fails, and nothing else.
    with suppress(Exception):
        import xgrammar

        backend = XgrammarBackend(manager.vllm_config, tokenizer=manager.tokenizer, vocab_size=vocab_size)
        compiler = xgrammar.GrammarCompiler(
            vocabulary_of(backend, manager.tokenizer), max_threads=1, cache_enabled=False
        )
        backend.compiler = CachedCompiler(compiler, envs.VLLM_XGRAMMAR_CACHE_MB << 20)  # type: ignore[assignment]  # alike
        manager.backend = backend


class CachedCompiler:
    """xgrammar's compiler with a cache of whole grammars.

    xgrammar's own cache keeps rules as well, and fails at grammars that compile without it, such as ``.{0,600}`` in a
    schema: grammars that were admitted, each in a process of its own, would fail here.

    Args:
        limit: bytes of grammars in the cache.
    """

    def __init__(self, compiler: Any, limit: int) -> None:
        self._compiler = compiler
        self._limit = limit
        self._size = 0
        self._lock = threading.Lock()
        self._made: OrderedDict[tuple[object, ...], Any] = OrderedDict()

    def compile_json_schema(self, schema: str, **given: Any) -> Any:
        return self._compiled("compile_json_schema", schema, **given)

    def compile_regex(self, regex: str) -> Any:
        return self._compiled("compile_regex", regex)

    def compile_grammar(self, grammar: str) -> Any:
        return self._compiled("compile_grammar", grammar)

    def _compiled(self, method: str, text: str, **given: Any) -> Any:
        key = (method, text, *sorted(given.items()))
        with self._lock:
            if key in self._made:
                self._made.move_to_end(key)
                return self._made[key]
        made = getattr(self._compiler, method)(text, **given)
        with self._lock:
            self._size += made.memory_size_bytes - (self._made[key].memory_size_bytes if key in self._made else 0)
            self._made[key] = made
            while self._size > self._limit and len(self._made) > 1:
                self._size -= self._made.popitem(last=False)[1].memory_size_bytes
        return made


def _lower_priority() -> None:
    """Lowers the priority of the calling thread and of those that it starts; on Linux alone."""
    if sys.platform == "linux":
        with suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICE)

"""How the engine's process compiles grammars: on threads that give way to the steps, and not one behind another."""

from __future__ import annotations

import os
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any

from vllm import envs
from vllm.v1.structured_output.backend_xgrammar import XgrammarBackend

from deltamux.engine.vllm.grammar_vocabulary import vocabulary_of

THREADS = 4
"""Grammars compiled at once, each by one thread: vLLM's own, which is one grammar by eight threads on two cores, would
have a small one wait for a large one, and take more of the cores from the step."""

NICE = 10


def prepare_grammars(manager: Any) -> None:
    """Makes vLLM's `StructuredOutputManager` ready before the first grammar, whose import would hold a step up."""
    if manager.vllm_config.structured_outputs_config.backend != "xgrammar" or not hasattr(manager, "tokenizer"):
        return
    manager.executor.shutdown(wait=False)
    manager.executor = ThreadPoolExecutor(THREADS, "deltamux-grammars", initializer=_give_way)
    vocab_size = manager.vllm_config.model_config.get_vocab_size()
    # Where xgrammar cannot read the vocabulary, the first grammar fails, and nothing else.
    with suppress(Exception):
        import xgrammar

        backend = XgrammarBackend(manager.vllm_config, tokenizer=manager.tokenizer, vocab_size=vocab_size)
        backend.compiler = xgrammar.GrammarCompiler(
            vocabulary_of(backend, manager.tokenizer),
            max_threads=1,
            cache_enabled=True,
            cache_limit_bytes=envs.VLLM_XGRAMMAR_CACHE_MB << 20,
        )
        manager.backend = backend


def _give_way() -> None:
    """Lowers the priority of the calling thread, which on Linux is a matter of the thread and what it starts."""
    if sys.platform == "linux":
        with suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICE)

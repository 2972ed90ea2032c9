"""What delta support costs a step without adapters: one engine, alternately with and without it.

    python -m benchmarks.studies.overhead --size mid --output overhead.json     (in tests/)

Two engines differ by some percent by where their memory lies, which is more than what is looked for. Here one engine
has its model compiled twice, with the layers' custom ops and, over the same weights, without them. Every other step
runs as plain vLLM's would: by the model without custom ops, vLLM's own scheduler, and a runner without adapters.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import date
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

from torch import nn
from vllm import envs
from vllm.compilation.wrapper import TorchCompileWithNoGuardsWrapper
from vllm.config import set_current_vllm_config
from vllm.v1.core.sched.scheduler import Scheduler

from benchmarks.command import machine, write_output
from benchmarks.inputs import SIZES, write_base
from benchmarks.steps import WARM_STEPS, Engine, Row, parse, row
from deltamux.engine.vllm.worker.cpu import CPUDeltaWorker

COMPILED = "aot_compiled_fn"
"""Where vLLM keeps a compiled model: in the model."""


class Override(NamedTuple):
    """An attribute that delta support has set on an object, over that of its class."""

    owner: Any
    name: str
    value: Any


def overrides(model: nn.Module) -> list[Override]:
    """Returns what delta support has put into a loaded model."""
    names = ("forward", "forward_modular")  # of layers, and of a mixture's experts
    places = [(model, "compute_logits"), *((module, name) for module in model.modules() for name in names)]
    return [Override(owner, name, vars(owner)[name]) for owner, name in places if name in vars(owner)]


class Support:
    """Takes delta support out of a runner, and puts it back: both cost a step the same.

    Args:
        runner: vLLM's, whose model is compiled with custom ops.
    """

    def __init__(self, runner: Any) -> None:
        self._runner = runner
        self._lora_config = runner.lora_config
        self._overrides = overrides(runner.model)
        self._model = next(m for m in runner.model.modules() if isinstance(m, TorchCompileWithNoGuardsWrapper))
        self._compiled = {True: vars(self._model)[COMPILED]}
        with self._without():
            self._compiled[False] = self._compile()

    def switch(self, on: bool) -> None:
        """Makes the next steps run with delta support, or without it."""
        for owner, name, value in self._overrides:
            vars(owner).pop(name, None)
            if on:
                vars(owner)[name] = value
        self._runner.lora_config = self._lora_config if on else None
        setattr(self._model, COMPILED, self._compiled[on])

    @contextmanager
    def _without(self) -> Iterator[None]:
        for owner, name, _ in self._overrides:
            del vars(owner)[name]
        self._runner.lora_config = None
        del vars(self._model)[COMPILED]
        try:
            yield
        finally:
            self.switch(True)

    def _compile(self) -> Any:
        config, model = self._runner.vllm_config, self._model
        model.compiled = False
        # The key of vLLM's cache is a model's class and configuration: it would return the one with deltas.
        with patch.object(envs, "VLLM_DISABLE_COMPILE_CACHE", True, create=True), set_current_vllm_config(config):
            TorchCompileWithNoGuardsWrapper.__init__(model)
            self._runner.warming_up_model()
        return vars(model)[COMPILED]


class SwitchingWorker(CPUDeltaWorker):
    """A worker whose odd steps run without delta support."""

    step = 0

    def compile_or_warm_up_model(self) -> Any:
        times = super().compile_or_warm_up_model()
        self.support = Support(self.model_runner)
        return times

    def start_over(self) -> None:
        """Makes the next step the first."""
        self.step = 0

    def execute_model(self, scheduler_output: Any, *args: Any, **kwargs: Any) -> Any:
        self.step += 1
        self.support.switch(_has_support(self.step))
        return super().execute_model(scheduler_output, *args, **kwargs)


def _has_support(step: int) -> bool:
    return step % 2 == 0 or step <= WARM_STEPS


class SwitchingEngine(Engine):
    """The engine around that worker; its scheduler is vLLM's own in the same steps."""

    def prepare(self, step: int) -> None:
        core: Any = self.llm.engine_core
        scheduler = core.engine_core.scheduler
        vars(scheduler).pop("schedule", None)
        if not _has_support(step):
            scheduler.schedule = Scheduler.schedule.__get__(scheduler)


def measure(model: Path, tokens: int, repeats: int, dtype: str) -> Row:
    engine = SwitchingEngine(model, {}, tokens, SwitchingWorker, dtype=dtype)
    pairs: list[tuple[float, float]] = []
    for _ in range(repeats):
        times = engine.step_times((None,))
        pairs += zip(times[::2], times[1::2], strict=False)
    return row("no adapter", pairs, "1.00")


def print_overhead(measured: Row) -> None:
    print(
        f"without delta support {measured.base_ms:.2f} ms; with it {measured.difference_ms:+.3f} ms: "
        f"{measured.ratio:.4f} ({measured.low:.4f} to {measured.high:.4f}, 95 %)"
    )


def main() -> int:
    given = parse("benchmarks.studies.overhead", __doc__, repeats=5)
    with tempfile.TemporaryDirectory() as folder:
        base = write_base(Path(folder) / "base", SIZES[given.size])
        measured = measure(base, given.tokens, given.repeats, given.dtype)
    print(f"{given.size} base, {machine()}, {date.today()}: steps of 32 rows")
    print_overhead(measured)
    write_output(given.output, measured._asdict())
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""`check_base`: adapters of several kinds on one base, alone and mixed in one batch, against PEFT and transformers."""

from __future__ import annotations

import asyncio
import copy
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import peft
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import AutoConfig

from deltamux.conformance.parity import Greedy, assert_same, reference, served
from deltamux.deltas import BaseModel, BlockRole, LinearSite, Program, attached
from deltamux.deltas.base_model import auto_model
from deltamux.engine.base import EngineOptions, ProgramRef
from deltamux.engine.vllm.frontend.engine import VLLMEngine
from deltamux.errors import DeltamuxError
from deltamux_testing.adapters import read_program, write_own
from deltamux_testing.engines import OPTIONS

PROMPT = (5, 17, 99, 200, 3, 42, 77)
NUM_TOKENS = 8
EXACT = "exact"
BASE = "base"


class Subject(NamedTuple):
    """An adapter of one kind, and what generates the reference."""

    program: Program
    reference: Callable[[], Greedy]


PEFT_KINDS: Mapping[str, Callable[[BaseModel], peft.PeftConfig]] = {
    "lora": lambda base: _lora(base, [site.name for site in base.linears if _takes_lora(site)]),
    "all-linear": lambda base: _lora(base, "all-linear"),
    "experts": lambda base: _experts(base),
    "ia3": lambda base: peft.IA3Config(fan_in_fan_out=_stored_transposed(base)),
    "norms": lambda base: peft.LNTuningConfig(target_modules=[site.name for site in base.norms]),
    "prompt": lambda _: peft.PromptTuningConfig(num_virtual_tokens=5),
    "prefix": lambda _: peft.PrefixTuningConfig(num_virtual_tokens=5),
}
OWN_KINDS = ("houlsby", "bitfit")
KINDS = (*PEFT_KINDS, *OWN_KINDS, "full")


def _lora(base: BaseModel, target_modules: str | list[str]) -> peft.PeftConfig:
    transposed = _stored_transposed(base)
    return peft.LoraConfig(r=4, lora_alpha=8, target_modules=target_modules, fan_in_fan_out=transposed)


def _experts(base: BaseModel) -> peft.PeftConfig:
    """Returns LoRA at the experts of a mixture and at attention, each parameter with a rank and an alpha of its own."""
    if not base.experts:
        raise ValueError("the base is not a mixture of experts")
    return peft.LoraConfig(
        r=4,
        lora_alpha=8,
        target_modules=r".*attn\.[qv]\w*_proj",
        target_parameters=[site.name for site in base.experts],
        rank_pattern={"down_proj": 3},
        alpha_pattern={"gate_up_proj": 12},
    )


def _takes_lora(site: LinearSite) -> bool:
    """Returns whether PEFT attaches to a projection: it does not to those that Mamba's kernels read themselves."""
    return site.block is not BlockRole.MIXER or not site.name.endswith("out_proj")


def _stored_transposed(base: BaseModel) -> bool:
    return any(site.transposed for site in base.linears)


def check_base(directory: Path, work: Path, *, eager: bool = False) -> dict[str, str]:
    """Returns what comes of each kind of adapter on a base: EXACT, or what is refused or wrong.

    Args:
        directory: of the base.
        work: a folder for the adapters.
        eager: the engine compiles nothing.
    """
    base = BaseModel.from_pretrained(directory)
    found: dict[str, str] = {}
    subjects: dict[str, Subject] = {}
    for kind in KINDS:
        try:
            with warnings.catch_warnings(action="ignore"):  # PEFT's, of patterns that it wrote itself
                subjects[kind] = _subject(kind, directory, base, work / kind)
        except DeltamuxError as error:
            found[kind] = f"refused: {error}"
        except (ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
            found[kind] = f"PEFT makes none: {type(error).__name__}: {error}"
    programs = {kind: each.program for kind, each in subjects.items()}
    answers, alone = asyncio.run(_serve(directory, programs, work, eager))
    plain = reference(_model(directory), PROMPT, NUM_TOKENS)
    if BASE in alone and (problem := _compare(plain, alone[BASE])) != EXACT:
        return {BASE: f"vLLM itself differs from transformers: {problem}"}
    for kind, answer in answers.items():
        if isinstance(answer, str):
            found[kind] = answer
            continue
        try:
            expected = plain if kind == BASE else subjects[kind].reference()
        except (RuntimeError, ValueError, TypeError, AttributeError) as error:
            found[kind] = f"PEFT runs none: {error}"
            continue
        found[kind] = _compare(expected, answer)
        if kind != BASE and expected.logprobs == plain.logprobs:
            found[kind] = "changes nothing: the test could not fail"
    return found


def _subject(kind: str, directory: Path, base: BaseModel, work: Path) -> Subject:
    model = _model(directory)
    if kind in PEFT_KINDS:
        config = PEFT_KINDS[kind](base)
        config.task_type = "CAUSAL_LM"
        torch.manual_seed(1)
        wrapped: Any = peft.get_peft_model(model, config)
        with torch.no_grad():
            for parameter in wrapped.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.1 * torch.randn_like(parameter))
        wrapped.save_pretrained(str(work))
        return Subject(read_program(work, base), lambda: reference(wrapped.eval(), PROMPT, NUM_TOKENS))
    program = read_program(write_own(kind, base, work), base)
    if kind == "full":
        transposed = {f"{site.name}.weight" for site in base.linears if site.transposed}
        changes = {
            name: c.T if name in transposed else c for name, c in load_file(next(work.glob("*.safetensors"))).items()
        }

        def with_weights() -> Greedy:
            changed = copy.deepcopy(model)
            parameters = dict(changed.named_parameters())
            with torch.no_grad():
                for name, change in changes.items():
                    parameters[name].add_(change)
            return reference(changed, PROMPT, NUM_TOKENS)

        return Subject(program, with_weights)

    def with_ops() -> Greedy:
        with attached(model, base, program):
            return reference(model, PROMPT, NUM_TOKENS)

    return Subject(program, with_ops)


def _model(directory: Path) -> nn.Module:
    auto = auto_model(AutoConfig.from_pretrained(directory))
    model: nn.Module = auto.from_pretrained(directory, attn_implementation="eager")
    return model.eval()


def _compare(expected: Greedy, actual: Greedy) -> str:
    try:
        assert_same(expected, actual)
    except AssertionError as error:
        return f"WRONG: {error}"
    return EXACT


async def _serve(
    directory: Path, programs: Mapping[str, Program], work: Path, eager: bool
) -> tuple[dict[str, Greedy | str], dict[str, Greedy]]:
    """Returns the answers of a mixed batch, or what is wrong with them, and those of each kind alone."""
    engine = VLLMEngine(EngineOptions(str(directory), enforce_eager=eager, **OPTIONS))  # type: ignore[arg-type]  # a dict of the common ones
    try:
        await engine.start()
    except DeltamuxError as error:
        return {BASE: f"refused: {error}"}, {}
    alone: dict[str, Greedy] = {}
    answers: dict[str, Greedy | str] = {}
    refs: dict[str, ProgramRef | None] = {BASE: None}
    try:
        for kind, program in programs.items():
            path = work / f"{kind}.program"
            program.save(path)
            ref = ProgramRef(kind, path, program.num_virtual_tokens)
            try:
                await engine.check(ref)
            except DeltamuxError as error:
                answers[kind] = f"refused: {error}"
            else:
                refs[kind] = ref
        for kind, each in refs.items():
            alone[kind] = await served(engine, PROMPT, each, NUM_TOKENS, f"{kind}-alone")
        jobs = (served(engine, PROMPT, ref, NUM_TOKENS, f"{kind}-mixed") for kind, ref in refs.items())
        mixed = dict(zip(refs, await asyncio.gather(*jobs), strict=True))
        for kind, answer in mixed.items():
            apart = _compare(alone[kind], answer)
            answers[kind] = answer if apart == EXACT else f"WRONG mixed: {apart}"
    except DeltamuxError as error:
        answers.update({kind: f"ENGINE ENDED: {error}" for kind in refs if kind not in answers})
    finally:
        await engine.stop()
    return answers, alone

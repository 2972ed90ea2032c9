"""The checks: each takes a `Case`, and raises `Refused` where it fails."""

import dataclasses
import tempfile
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from deltamux.conformance.cases import PROMPT, Case, Refused
from deltamux.deltas import Checkpoint, Program, SiteKind
from deltamux.deltas.batched_check import check_batched
from deltamux.errors import DeltamuxError, InvalidAdapterError, InvalidConfigError, NotMergeableError

TOLERANCE = 1e-4
QUANTISED = 5e-2
"""Over a base that the method quantised, another library's kernels compute, some of them in bfloat16."""

VISIBLE = 1e-3
EVERYTHING_HAS_A_BIAS = "gpt2"
"""On this base every projection and norm can hold a bias: what merges at all, merges here."""


def describes_itself(case: Case) -> None:
    """The method has a name, a summary, its paper, and the source of its learning rate."""
    info = case.method.info
    missing = [
        name
        for name in ("name", "title", "summary", "paper", "peft_type", "learning_rate_source")
        if not getattr(info, name)
    ]
    _hold(not missing, f"MethodInfo has no {', '.join(missing)}")
    _hold(info.learning_rate > 0, f"MethodInfo.learning_rate is {info.learning_rate}")
    _hold(dataclasses.is_dataclass(info.config_class), "MethodInfo.config_class is not a dataclass")


def refuses_unknown_options(case: Case) -> None:
    """A misspelled option is an error, not a silent default."""
    _refuses(lambda: case.method.parse({"no_such_option": 1}), InvalidConfigError, "an option it does not have")


def fresh_is_the_identity(case: Case) -> None:
    """Before the first step the base's output is unchanged, apart from virtual tokens."""
    program = _built(case, case.fresh())
    if program.num_virtual_tokens == 0:
        _same(case.logits(program), case.logits(), "a fresh adapter changes the base's output")


def every_parameter_learns(case: Case) -> None:
    """Gradients reach every declared parameter and nothing of the base; the change is visible."""
    parameters = {name: tensor.requires_grad_() for name, tensor in case.trained().items()}
    logits = case.logits(lambda: _built(case, parameters))
    _hold(not torch.allclose(logits, case.logits(), atol=VISIBLE), "a trained adapter changes nothing")
    logits.square().mean().backward()  # type: ignore[no-untyped-call]  # torch leaves it so
    dead = [name for name, tensor in parameters.items() if tensor.grad is None or not tensor.grad.any()]
    _hold(not dead, f"no gradient reaches {', '.join(dead[:3])} ({len(dead)} of {len(parameters)} parameters)")


def changed_weights_are_the_program(case: Case) -> None:
    """Where parameters are changes of weights that are trained in place, those weights have the program's effect."""
    named = case.method.weights(case.config, case.base)
    if not named:
        return
    changes = case.trained()
    _hold(named.keys() == changes.keys(), "deltamux_weights names other parameters than deltamux_parameters declares")
    changed = {}
    for name, own in named.items():
        site: Any = case.base.sites.get((SiteKind.LINEAR, own.removesuffix(".weight")))
        transposed = site is not None and site.transposed
        changed[own] = case.base.tensor(own).float() + (changes[name].t() if transposed else changes[name])
    _same(_merged_logits(case, changed), case.logits(_built(case, changes)), "changed weights and the program differ")


def detaching_restores_the_base(case: Case) -> None:
    """What was attached leaves no trace, bit for bit."""
    before = case.logits()
    case.logits(case.program(case.checkpoint()))
    _hold(torch.equal(case.logits(), before), "the base is changed after an adapter was detached")


def files_survive_a_round_trip(case: Case) -> None:
    """What is written is read back as the same method, with the same effect."""
    written = case.checkpoint()
    with tempfile.TemporaryDirectory() as directory:
        written.write(directory)
        read = Checkpoint.read(directory)
    _hold(read.tensors.keys() == written.tensors.keys(), "the files hold other tensors than were written")
    recognised, own = case.registry.recognise(read)
    expected = case.method.info.files_of or case.method.name
    _hold(recognised.name == expected, f"the files are taken for those of {recognised.name!r}")
    with torch.no_grad():
        before, after = case.logits(case.program(written)), case.logits(case.program(own))
    _same(after, before, "the adapter has another effect once it was written and read")


def compiled_programs_survive_a_round_trip(case: Case) -> None:
    """The engine reads the compiled file alone: it must hold everything."""
    program = case.program(case.checkpoint())
    with tempfile.TemporaryDirectory() as directory, torch.no_grad():
        program.save(Path(directory) / "program.safetensors")
        again = Program.load(Path(directory) / "program.safetensors")
        _same(case.logits(again), case.logits(program), "the compiled file has another effect than the program")


def ops_in_a_batch_are_the_ops_alone(case: Case) -> None:
    """In a step with other adapters' rows, every op does to its own rows what was trained, and to others nothing."""
    check_batched(case.program(case.checkpoint()).placed(case.base), foreign_only=False)


def merging_equals_attaching_or_is_refused(case: Case) -> None:
    """Merged weights alone give the adapter's logits; a method that cannot merge refuses with a reason."""
    checkpoint = case.checkpoint()
    config = case.method.parse(checkpoint.config)

    def merge() -> dict[str, Tensor]:
        return case.method.merge(config, case.base, checkpoint.tensors)

    if not case.method.info.merges:
        _refuses(merge, NotMergeableError, "to merge, although MethodInfo.merges is false")
        return
    try:
        merged = merge()
    except NotMergeableError as error:
        _hold(case.architecture != EVERYTHING_HAS_A_BIAS, f"merging is refused: {error.message}")
        return
    model, prepared = case.prepared_model()
    expected = case.logits(case.program(checkpoint), model)
    tolerance = QUANTISED if prepared else TOLERANCE
    _same(_merged_logits(case, merged), expected, "merged and attached differ", tolerance)


def files_that_lack_a_tensor_or_have_one_too_many_are_refused(case: Case) -> None:
    """Nothing that is missing is made up, and nothing that is there is ignored."""
    checkpoint = case.checkpoint()
    config, tensors = case.method.parse(checkpoint.config), dict(checkpoint.tensors)
    for name in tensors:
        rest = {other: tensor for other, tensor in tensors.items() if other != name}
        _refuses(partial(case.method.program, config, case.base, rest), DeltamuxError, f"files without {name}")
    stray = {**tensors, "stray": torch.zeros(1)}
    _refuses(
        lambda: case.method.program(config, case.base, stray), InvalidAdapterError, "a tensor that is none of its own"
    )


def files_of_another_base_are_refused(case: Case) -> None:
    """Tensors of other sizes are an error at upload, not a surprise in the engine."""
    checkpoint = case.checkpoint()
    config = case.method.parse(checkpoint.config)
    wider = {name: torch.cat([tensor, tensor], dim=-1) for name, tensor in checkpoint.tensors.items()}
    _refuses(lambda: case.method.program(config, case.base, wider), DeltamuxError, "tensors twice as wide")


def values_that_are_not_finite_are_found(case: Case) -> None:
    """A NaN in the files is found in the program: no op hides or drops it."""
    checkpoint = case.checkpoint()
    config = case.method.parse(checkpoint.config)
    for name in list(checkpoint.tensors)[:3]:
        if not checkpoint.tensors[name].is_floating_point():
            continue
        spoilt = {**checkpoint.tensors, name: torch.full_like(checkpoint.tensors[name], float("nan"))}
        _refuses(partial(_gate, case, config, spoilt), DeltamuxError, f"{name} full of NaN")


def _gate(case: Case, config: Any, tensors: Mapping[str, Tensor]) -> None:
    case.method.program(config, case.base, tensors).check_finite()


def costs_are_declared(case: Case) -> None:
    """Bytes, rank and virtual tokens are what the budgets of a server are held against."""
    program = case.program(case.checkpoint())
    _hold(program.num_bytes() > 0, "the program claims to need no bytes")
    held = sum(t.numel() * t.element_size() for _, op in program for t in op.tensors().values())
    _hold(program.num_bytes() >= held, f"the program claims {program.num_bytes()} bytes, and holds {held}")


CHECKS: dict[str, Callable[[Case], None]] = {
    check.__name__: check
    for check in (
        describes_itself,
        refuses_unknown_options,
        fresh_is_the_identity,
        every_parameter_learns,
        changed_weights_are_the_program,
        detaching_restores_the_base,
        files_survive_a_round_trip,
        compiled_programs_survive_a_round_trip,
        ops_in_a_batch_are_the_ops_alone,
        merging_equals_attaching_or_is_refused,
        files_that_lack_a_tensor_or_have_one_too_many_are_refused,
        files_of_another_base_are_refused,
        values_that_are_not_finite_are_found,
        costs_are_declared,
    )
}
"""All checks, by name."""


def _built(case: Case, parameters: dict[str, Tensor]) -> Program:
    exported = case.method.export(case.config, case.base, parameters)
    return case.method.program(case.config, case.base, exported)


def _merged_logits(case: Case, merged: dict[str, Tensor]) -> Tensor:
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(case.directory)
    with torch.no_grad():
        for name, tensor in merged.items():
            model.get_parameter(name).copy_(tensor)
        logits: Tensor = model(torch.tensor([PROMPT])).logits
    return logits


def _hold(kept: bool, problem: str) -> None:
    if not kept:
        raise Refused(problem)


def _same(actual: Tensor, expected: Tensor, problem: str, tolerance: float = TOLERANCE) -> None:
    difference = (actual - expected).abs().max().item()
    _hold(torch.allclose(actual, expected, atol=tolerance, rtol=tolerance), f"{problem} (by up to {difference:.2g})")


def _refuses(call: Callable[[], object], expected: type[DeltamuxError], what: str) -> None:
    try:
        call()
    except expected:
        return
    except Exception as error:
        raise Refused(f"it answers {what} with {type(error).__name__}, not {expected.__name__}: {error}") from error
    raise Refused(f"it takes {what}")

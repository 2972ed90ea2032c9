"""AdaLoRA's schedule: PEFT's pruning, step by step; and what is written holds only the ranks that are left."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM

from deltamux.deltas import BaseModel
from deltamux.errors import InvalidConfigError
from deltamux.registry import Registry

STEPS = 20
OPTIONS: dict[str, Any] = {"init_r": 6, "target_r": 2, "tinit": 3, "tfinal": 5, "deltaT": 2, "total_step": STEPS}
TARGETS = ["q_proj", "v_proj"]


def test_the_same_gradients_prune_the_same_triplets_as_in_peft(base: BaseModel, base_directory: Path) -> None:
    config = peft.AdaLoraConfig(target_modules=TARGETS, task_type="CAUSAL_LM", **OPTIONS)
    model: Any = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(base_directory), config)
    theirs = {n: p for n, p in model.base_model.model.named_parameters() if ".lora_" in n}
    method = Registry().get("adalora")
    ours_config = method.parse({**OPTIONS, "target_modules": TARGETS})
    schedule = method.schedule(ours_config, base, STEPS)
    ours = {f"base_model.model.{n.removesuffix('.default')}": p.detach().clone() for n, p in theirs.items()}
    assert set(ours) == set(method.parameters(ours_config, base))
    generator = torch.Generator().manual_seed(0)
    for step in range(1, STEPS + 1):
        for name, parameter in theirs.items():
            parameter.grad = torch.randn(parameter.shape, generator=generator)
            ours[f"base_model.model.{name.removesuffix('.default')}"].grad = parameter.grad.clone()
            parameter.data -= 0.1 * parameter.grad
        for tensor in ours.values():
            assert tensor.grad is not None
            tensor.data = tensor - 0.1 * tensor.grad
        model.base_model.update_and_allocate(step)
        with torch.no_grad():
            schedule.after_update(step, ours)
        for name, parameter in theirs.items():
            torch.testing.assert_close(ours[f"base_model.model.{name.removesuffix('.default')}"], parameter.data)
    written, tensors = schedule.finish(ours_config, ours)
    assert written.rank_pattern == {
        name.removesuffix(".default"): tuple(alive) for name, alive in model.peft_config["default"].rank_pattern.items()
    }
    assert sum(tensor.shape[0] for name, tensor in tensors.items() if name.endswith("lora_E")) == 2 * 4


def test_the_penalty_is_the_distance_from_orthogonality(base: BaseModel) -> None:
    method = Registry().get("adalora")
    config = method.parse({**OPTIONS, "target_modules": TARGETS, "orth_reg_weight": 2.0})
    schedule = method.schedule(config, base, STEPS)
    parameters = {n: torch.zeros(spec.shape) for n, spec in method.parameters(config, base).items()}
    penalty = schedule.penalty(parameters)
    torch.testing.assert_close(penalty, torch.tensor(2.0 * 6**0.5))


def test_a_run_that_goes_on_remembers_what_it_saw(base: BaseModel) -> None:
    method = Registry().get("adalora")
    config = method.parse({**OPTIONS, "target_modules": TARGETS})

    def run(restart: bool) -> dict[str, torch.Tensor]:
        generator = torch.Generator().manual_seed(0)
        shapes = {name: spec.shape for name, spec in method.parameters(config, base).items()}
        tensors = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
        schedule = method.schedule(config, base, STEPS)
        for step in range(1, STEPS + 1):
            for tensor in tensors.values():
                tensor.grad = torch.randn(tensor.shape, generator=generator)
            schedule.after_update(step, tensors)
            if restart and step == 9:
                kept = schedule.state
                schedule = method.schedule(config, base, STEPS)
                schedule.state = kept
        return {name: tensor.clone() for name, tensor in tensors.items()}

    straight, restarted = run(False), run(True)
    assert all(torch.equal(straight[name], restarted[name]) for name in straight)


@pytest.mark.parametrize("values", [{"target_r": 13}, {"target_r": 0}, {"beta1": 1.0}, {"deltaT": 0}])
def test_a_schedule_that_cannot_be_is_refused(values: dict[str, Any]) -> None:
    with pytest.raises(InvalidConfigError, match="|".join(values)):
        Registry().get("adalora").parse(values)

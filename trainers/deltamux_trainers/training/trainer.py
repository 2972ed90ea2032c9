"""transformers' Trainer around a `DeltaModel`: what its checkpoints hold, and how the method's schedule takes part."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import IntervalStrategy

from deltamux.errors import FailedPreconditionError
from deltamux_trainers.model import DeltaModel
from deltamux_trainers.training import checkpoints, ranks
from deltamux_trainers.training.checkpoints import RUN_FILE, STAGING
from deltamux_trainers.writing import told

PARAMETERS_FILE = "parameters.safetensors"
SCHEDULE_FILE = "schedule.safetensors"


class DeltaTrainer(Trainer):
    """Trains a `DeltaModel`; checkpoints hold the method's parameters, never the base.

    Attributes:
        determined_by: what determines the run, by name, as JSON values; a checkpoint of another run is not resumed.
        loss_sum: of the losses of all steps, also of those before a resume.
    """

    def __init__(self, determined_by: Mapping[str, Any], **given: Any) -> None:
        super().__init__(**given)
        self.determined_by = dict(determined_by)
        self.loss_sum = torch.zeros((), device=self.args.device)

    @property
    def delta_model(self) -> DeltaModel:
        assert isinstance(self.model, DeltaModel)
        return self.model

    def mean_loss(self) -> float:
        """Returns the mean loss of a step, over all processes; all call this."""
        return ranks.mean(float(self.loss_sum), self.args.device) / max(1, self.state.global_step)

    def load_best(self) -> None:
        """Gives the model the parameters of the best evaluation.

        Raises:
            FailedPreconditionError: their checkpoint was damaged meanwhile.
        """
        step = self.state.best_global_step
        if not step:
            return
        best = checkpoints.directory(Path(str(self.args.output_dir)), step)
        if problem := checkpoints.damage(best):
            raise FailedPreconditionError(
                f"the best checkpoint, {best}, is damaged: {problem}", reason="CHECKPOINT_DAMAGED"
            )
        self._load_parameters(best)

    def release(self) -> None:
        """Lets go of the optimizer's state and the gradients, which writing the adapter does not need."""
        self.optimizer = self.lr_scheduler = None
        self.callback_handler.optimizer = self.callback_handler.lr_scheduler = None
        self.accelerator.free_memory()
        self.delta_model.zero_grad(set_to_none=True)

    def training_step(self, model: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
        loss = super().training_step(model, *args, **kwargs)
        self.loss_sum += loss.detach()
        return loss

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        """Runs a pass over the data; none for a run that goes on from its last step, as transformers would."""
        if self.control.should_training_stop or self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
            return
        super()._run_epoch(*args, **kwargs)  # type: ignore[no-untyped-call]  # transformers leaves it untyped

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Writes a checkpoint whole, by the first process; each brings the state of its own random numbers."""
        root = Path(str(self.args.output_dir))
        staging, final = root / STAGING, checkpoints.directory(root, self.state.global_step)
        if ranks.is_first():
            shutil.rmtree(staging, ignore_errors=True)
            staging.mkdir(parents=True)
        ranks.wait_for_all()
        mean_loss = self.mean_loss()
        with told(final):
            self._save_optimizer_and_scheduler(str(staging))
            self._save_scaler(str(staging))
            self._save_rng_state(str(staging))
            if ranks.is_first():
                self._save_run(staging, mean_loss)
        ranks.wait_for_all()
        if ranks.is_first():
            with told(final):
                checkpoints.seal(staging, final)
            checkpoints.remove_old(root, self.state.best_global_step)

    def _save_run(self, staging: Path, mean_loss: float) -> None:
        save_tensors(self.delta_model.parameters_by_name(), staging / PARAMETERS_FILE)
        save_tensors(self.delta_model.schedule.state, staging / SCHEDULE_FILE)
        self.state.save_to_json(str(staging / TRAINER_STATE_NAME))
        run = {"determined_by": self.determined_by, "loss_sum": mean_loss * self.state.global_step}
        (staging / RUN_FILE).write_text(json.dumps(run, indent=2) + "\n")

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        directory = Path(resume_from_checkpoint)
        self._load_parameters(directory)
        self.loss_sum.fill_(json.loads((directory / RUN_FILE).read_text())["loss_sum"])

    def _load_parameters(self, directory: Path) -> None:
        self.delta_model.load_parameters(load_file(directory / PARAMETERS_FILE))
        self.delta_model.schedule.state = load_file(directory / SCHEDULE_FILE)


class Scheduled(TrainerCallback):
    """Lets the method's schedule take part in every update."""

    def __init__(self, trainer: DeltaTrainer) -> None:
        self._model = trainer.delta_model

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        kept = self._model.schedule.state
        self._model.begin(state.max_steps)
        self._model.schedule.state = {**self._model.schedule.state, **kept}

    def on_step_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        frozen = self._model.schedule.frozen(state.global_step)
        for name, parameter in self._model.parameters_by_name().items():
            parameter.requires_grad_(name not in frozen)

    @torch.no_grad()
    def on_optimizer_step(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._model.schedule.after_update(state.global_step + 1, self._model.parameters_by_name())


class Saving(TrainerCallback):
    """Saves every so many steps, whatever is evaluated when.

    Where a pass ends with an evaluation, it saves behind that: from a checkpoint before it, a run would go on without.
    """

    def __init__(self, steps: int) -> None:
        self._steps = steps

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        evaluates_next = args.eval_strategy == IntervalStrategy.EPOCH and (
            state.global_step >= state.max_steps or not (state.epoch or 0.0) % 1
        )
        if state.global_step % self._steps == 0 and not evaluates_next:
            control.should_save = True


def save_tensors(tensors: Mapping[str, Tensor], path: Path) -> None:
    save_file({name: _alone(tensor.detach().cpu().contiguous()) for name, tensor in tensors.items()}, path)


def _alone(tensor: Tensor) -> Tensor:
    """Returns a tensor that shares its memory with no other; itself where it holds all of its storage."""
    return tensor if tensor.untyped_storage().nbytes() == tensor.nbytes else tensor.clone()

"""transformers' Trainer for a `DeltaModel`, with checkpoints of the method's parameters."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import Trainer
from transformers.trainer import TRAINER_STATE_NAME

from deltamux.errors import FailedPreconditionError
from deltamux_trainers.model import DeltaModel
from deltamux_trainers.output_dir import write_errors
from deltamux_trainers.training import checkpoints, distributed
from deltamux_trainers.training.checkpoints import RUN_FILE, STAGING_DIR

PARAMETERS_FILE = "parameters.safetensors"
SCHEDULE_FILE = "schedule.safetensors"


class DeltaTrainer(Trainer):
    """A Trainer whose checkpoints hold the method's parameters, and none of the base.

    Attributes:
        settings: all that determines the run's losses, by name, as JSON values; saved in every checkpoint.
        loss_sum: of all steps, those before a resume included.
    """

    def __init__(self, settings: Mapping[str, Any], **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.settings = dict(settings)
        self.loss_sum = torch.zeros((), device=self.args.device)

    @property
    def delta_model(self) -> DeltaModel:
        assert isinstance(self.model, DeltaModel)
        return self.model

    def mean_loss(self) -> float:
        """Returns the mean loss per step, over all processes; all call this."""
        return distributed.mean(float(self.loss_sum), self.args.device) / max(1, self.state.global_step)

    def load_best(self) -> None:
        """Loads the parameters of the best evaluation into the model.

        Raises:
            FailedPreconditionError: their checkpoint is damaged.
        """
        step = self.state.best_global_step
        if not step:
            return
        best = checkpoints.checkpoint_dir(Path(str(self.args.output_dir)), step)
        if problem := checkpoints.find_damage(best):
            raise FailedPreconditionError(
                f"the best checkpoint, {best}, is damaged: {problem}", reason="CHECKPOINT_DAMAGED"
            )
        self._load_parameters(best)

    def free_memory(self) -> None:
        """Frees the optimizer's state and the gradients, which are not needed to write the adapter."""
        self.optimizer = self.lr_scheduler = None
        self.callback_handler.optimizer = self.callback_handler.lr_scheduler = None
        self.accelerator.free_memory()
        self.delta_model.zero_grad(set_to_none=True)

    def training_step(self, model: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
        loss = super().training_step(model, *args, **kwargs)
        self.loss_sum += loss.detach()
        return loss

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        """Runs an epoch; none for a run that resumes from its last step, where transformers would run one."""
        if self.control.should_training_stop or self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
            return
        super()._run_epoch(*args, **kwargs)  # type: ignore[no-untyped-call]  # transformers leaves it untyped

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Writes a checkpoint in the main process; every process writes the state of its own random numbers."""
        root = Path(str(self.args.output_dir))
        staging, final = root / STAGING_DIR, checkpoints.checkpoint_dir(root, self.state.global_step)
        if distributed.is_main_process():
            with write_errors(final):
                shutil.rmtree(staging, ignore_errors=True)
                staging.mkdir(parents=True)
        distributed.barrier()
        mean_loss = self.mean_loss()
        with write_errors(final):
            self._save_optimizer_and_scheduler(str(staging))
            self._save_scaler(str(staging))
            self._save_rng_state(str(staging))
            if distributed.is_main_process():
                self._save_run(staging, mean_loss)
        distributed.barrier()
        if distributed.is_main_process():
            with write_errors(final):
                checkpoints.commit(staging, final)
            checkpoints.rotate_checkpoints(root, self.state.best_global_step)

    def _save_run(self, staging: Path, mean_loss: float) -> None:
        _save_tensors(self.delta_model.parameters_by_name(), staging / PARAMETERS_FILE)
        _save_tensors(self.delta_model.schedule.state, staging / SCHEDULE_FILE)
        self.state.save_to_json(str(staging / TRAINER_STATE_NAME))
        run = {"determined_by": self.settings, "loss_sum": mean_loss * self.state.global_step}
        (staging / RUN_FILE).write_text(json.dumps(run, indent=2) + "\n")

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        directory = Path(resume_from_checkpoint)
        self._load_parameters(directory)
        self.loss_sum.fill_(json.loads((directory / RUN_FILE).read_text())["loss_sum"])

    def _load_parameters(self, directory: Path) -> None:
        self.delta_model.load_parameters(load_file(directory / PARAMETERS_FILE))
        self.delta_model.schedule.state = load_file(directory / SCHEDULE_FILE)


def _save_tensors(tensors: Mapping[str, Tensor], path: Path) -> None:
    save_file({name: _unshared(tensor.detach().cpu().contiguous()) for name, tensor in tensors.items()}, path)


def _unshared(tensor: Tensor) -> Tensor:
    """Returns a tensor that shares its storage with no other; itself where it fills all of its storage."""
    return tensor if tensor.untyped_storage().nbytes() == tensor.nbytes else tensor.clone()

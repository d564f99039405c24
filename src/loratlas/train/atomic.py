"""transformers' Trainer with checkpoints that are whole or absent, and hold no pickle."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import safetensors.torch
from peft import PeftModel
from transformers import PreTrainedModel, TrainerState
from transformers.trainer_utils import TrainOutput

from loratlas.errors import UserError
from loratlas.train.checkpoint import generators
from loratlas.train.complete import checkpoint_name, find_checkpoint, whole_checkpoint
from loratlas.train.model_state import fitting, read_model, write_model
from loratlas.train.optimizer_state import optimizer_state, read_optimizer_state, restore_optimizer
from loratlas.train.random_state import generator_states, set_generator_states
from loratlas.train.state import read_state, write_state

_STATE, _ARGUMENTS = "trainer_state.json", "training_args.json"


class AtomicCheckpoints:
    """Mixin for any Trainer: `class MyTrainer(AtomicCheckpoints, Trainer)`, before the Trainer in the list.

    A checkpoint appears under its name when all of it is on disk, `save_total_limit` removes older ones only then,
    and everything in it is safetensors or JSON. Callbacks with `load_state_dict` keep
    their `state_dict` there. `train(resume_from_checkpoint=True)` takes the newest complete one and
    logs which it skipped; a finished run is loaded and not trained further. Single device and DistributedDataParallel.

    Attributes:
        checkpoint_extra: stored in every checkpoint as extra.json; see `checkpoint.save_checkpoint`.
        check_extra: called with that and the checkpoint's path before anything is loaded; raises to refuse it.

    Raises:
        UserError: DeepSpeed and FSDP, which write their own formats; a checkpoint that is not complete or not of this
            model; state that safetensors and JSON cannot hold. `DiskFull` names the checkpoint that is left.
    """

    checkpoint_extra: Any = None
    check_extra: Callable[[Any, Path], None] | None = None
    _writing: Path | None = None
    _pushes = False

    def train(self: Any, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        if not resume_from_checkpoint:
            return super().train(None, *args, **kwargs)  # type: ignore[misc]
        _refuse_sharded(self)
        where = self.args.output_dir if resume_from_checkpoint is True else resume_from_checkpoint
        checkpoint = find_checkpoint(where)
        if self.check_extra is not None:
            self.check_extra(read_state(checkpoint, "extra")["extra"], checkpoint)
        state = TrainerState.load_from_json(str(checkpoint / _STATE))
        if state.global_step >= (self.args.max_steps if self.args.max_steps > 0 else state.max_steps):
            # Trainer would take one more step before it looks at the limit
            self._load_from_checkpoint(str(checkpoint))
            _restore_callbacks(self, checkpoint)
            self.state = state
            return TrainOutput(state.global_step, 0.0, {})
        return super().train(str(checkpoint), *args, **kwargs)  # type: ignore[misc]

    def _get_output_dir(self: Any, trial: Any) -> str:
        return str(self._writing) if self._writing else super()._get_output_dir(trial=trial)  # type: ignore[misc]

    def _save_checkpoint(self: Any, model: Any, trial: Any) -> None:
        _refuse_sharded(self)
        step, keep, best = self.state.global_step, self.args.save_total_limit, self.state.best_global_step
        target = Path(self._get_output_dir(trial)) / checkpoint_name(step)
        best_name = checkpoint_name(best) if best else None
        with whole_checkpoint(target, step, keep=keep, best=best_name) as folder:
            # Trainer writes to, and rotates in, the directory that we name here: it holds this checkpoint alone
            self._writing, self._pushes = folder.parent, False
            try:
                super()._save_checkpoint(model, trial)  # type: ignore[misc]
            finally:
                self._writing = None
            if self.state.best_model_checkpoint == str(folder):
                self.state.best_model_checkpoint = str(target)
            if self.args.should_save:
                self.state.save_to_json(str(folder / _STATE))
                write_state(folder, "extra", {"step": step, "extra": self.checkpoint_extra})
                for name, callback in _stateful(self):
                    write_state(folder, name, callback.state_dict())
        if self._pushes:
            super()._push_from_checkpoint(str(target))  # type: ignore[misc]

    def _push_from_checkpoint(self: Any, checkpoint_folder: str) -> None:
        self._pushes = True  # once it is complete

    def _save(self: Any, output_dir: str | None = None, state_dict: Any = None) -> None:
        # Trainer's, without the pickled arguments
        if not self.args.should_save:
            return
        folder = Path(output_dir or self.args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        model = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
        if isinstance(model, PeftModel):
            write_model(folder, model)
        elif isinstance(model, PreTrainedModel):
            model.save_pretrained(str(folder), state_dict=state_dict)
        else:
            tensors = model.state_dict() if state_dict is None else state_dict
            safetensors.torch.save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        processor = self.processing_class or getattr(self.data_collator, "tokenizer", None)
        if processor is not None:
            processor.save_pretrained(str(folder))
        text = json.dumps(self.args.to_dict(), indent=2, default=str)
        (folder / _ARGUMENTS).write_text(text + "\n", encoding="utf-8")

    def _save_optimizer_and_scheduler(self: Any, output_dir: str) -> None:
        if self.args.should_save:
            write_state(Path(output_dir), "optimizer", optimizer_state(self.model, self.optimizer))
            write_state(Path(output_dir), "scheduler", self.lr_scheduler.state_dict())

    def _save_scaler(self: Any, output_dir: str) -> None:
        scaler = getattr(self.accelerator, "scaler", None)
        if scaler is not None and self.args.should_save:
            write_state(Path(output_dir), "scaler", scaler.state_dict())

    def _save_rng_state(self: Any, output_dir: str) -> None:
        write_state(Path(output_dir), generators(self.args.process_index), generator_states())

    def _load_from_checkpoint(self: Any, resume_from_checkpoint: str, model: Any = None) -> None:
        folder, inner = Path(resume_from_checkpoint), self.model if model is None else model
        if isinstance(inner, PeftModel):
            read_model(folder, inner)
            return
        with fitting(folder):
            super()._load_from_checkpoint(resume_from_checkpoint, model)  # type: ignore[misc]

    def _load_optimizer_and_scheduler(self: Any, checkpoint: str | None) -> None:
        if checkpoint is not None:
            restore_optimizer(self.optimizer, read_optimizer_state(Path(checkpoint), self.model, self.optimizer))
            self.lr_scheduler.load_state_dict(read_state(Path(checkpoint), "scheduler"))
            _restore_callbacks(self, Path(checkpoint))

    def _load_scaler(self: Any, checkpoint: str | None) -> None:
        if checkpoint is not None and (Path(checkpoint) / "scaler.json").is_file():
            self.accelerator.scaler.load_state_dict(read_state(Path(checkpoint), "scaler"))

    def _load_rng_state(self: Any, checkpoint: str | None) -> None:
        if checkpoint is not None:
            set_generator_states(read_state(Path(checkpoint), generators(self.args.process_index)))


def _stateful(trainer: Any) -> list[tuple[str, Any]]:
    """(name of the state in a checkpoint, callback) of those whose state is more than trainer_state.json can hold."""
    found = [callback for callback in trainer.callback_handler.callbacks if hasattr(callback, "load_state_dict")]
    return [(f"callback-{type(callback).__name__}", callback) for callback in found]


def _restore_callbacks(trainer: Any, checkpoint: Path) -> None:
    """Before `on_train_begin`, which finds the state there."""
    for name, callback in _stateful(trainer):
        callback.load_state_dict(read_state(checkpoint, name))


def _refuse_sharded(trainer: Any) -> None:
    engines = {"DeepSpeed": "is_deepspeed_enabled", "FSDP": "is_fsdp_enabled", "FSDP on XLA": "is_fsdp_xla_enabled"}
    found = [name for name, flag in engines.items() if getattr(trainer, flag, False)]
    if trainer.args.save_on_each_node:
        found.append("save_on_each_node")
    if found:
        raise UserError(f"AtomicCheckpoints cannot write or resume with {', '.join(found)}: use Trainer's own there.")

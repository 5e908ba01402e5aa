"""The loop over block trainers: which block steps next, logs, held-out figures, checkpoints, resuming."""

import contextlib
import os
import time
from functools import cached_property
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm
from transformers import PreTrainedModel, TrainerCallback, TrainerControl, TrainerState

from ..likelihood.shares import likelihood_shares
from ..merging import merge_run
from ..modeling import BlockedPreTrainedModel, enable_checkpointing
from ..objectives import HeldOutLoss, default_objective, held_out_loss
from ..run_names import EVALUATIONS_NAME, LOSS_NAME, SHARE_NAME, UPDATES_NAME
from ..serialization import remove_tree
from .arguments import DiffusionBlocksTrainingArguments
from .block_order import block_schedule, is_sequential
from .block_trainer import BadSampleError, BlockTrainer, Objective
from .cascade import check_job, lower_outputs, mark_trained, with_gradient
from .checkpoint import (
    check_identity,
    chosen_checkpoint,
    clean_staging,
    find_checkpoints,
    last_good,
    load_checkpoint,
    read_state,
    run_identity,
    write_checkpoint,
)
from .data_stream import check_dataset
from .parallel import Group, keep_blocks, make_accelerator
from .residency import make_residency
from .run_files import check_other_jobs, flat_values, job_directory, set_aside, truncate_logs
from .run_status import RunStatus
from .stopping import StopRequest
from .update_log import NonFiniteLossError, append_rows, block_means, by_block, last_losses, read_rows


class DiffusionBlocksTrainer:
    """Trains the blocks of a model, each alone, by denoising score matching (arXiv 2506.14202, section 3).

    One block steps per iteration; the order and every random draw follow from ``args.seed``, so a run that was killed
    at any instant goes on to the same weights, bit for bit, on the same kind of machine.

    Args:
        model: a blocked model; its resident blocks (or ``args.blocks``) are trained in place. Where several processes
            own different blocks, each drops the others from its copy.
        args: settings.
        train_dataset: ``len()`` and ``dataset[list of indices]`` giving ``pixel_values`` [n, channels, height, width]
            in [-1, 1] and ``class_labels`` [n].
        eval_dataset: held-out data of the same form.
        objective: ``objective(model, block, batch, generator)``; the family's own by default
            (``default_objective``).
        teacher: frozen base for ``args.distillation_weight``.
        callbacks: transformers ``TrainerCallback``; they get ``model``, ``trainer`` and the log as keyword arguments.

    Raises:
        ValueError: for an empty data set, images or labels that do not fit the model, before any work.

    Example:
        >>> trainer = DiffusionBlocksTrainer(model, args, train_dataset)  # doctest: +SKIP
        >>> trainer.train()  # doctest: +SKIP
        >>> trainer.save_model("runs/model")  # doctest: +SKIP
    """

    def __init__(
        self,
        model: BlockedPreTrainedModel,
        args: DiffusionBlocksTrainingArguments,
        train_dataset: Any,
        eval_dataset: Any | None = None,
        *,
        objective: Objective | None = None,
        teacher: PreTrainedModel | None = None,
        callbacks: list[TrainerCallback] | None = None,
    ):
        args = with_gradient(model, args, distils=teacher is not None)
        self.args, self.train_dataset, self.eval_dataset = args, train_dataset, eval_dataset
        self.output_dir = Path(args.output_dir)
        self.accelerator = make_accelerator(args)
        self.model = model
        several = self.accelerator.num_processes > 1
        shared = Group.make(model.config, args, self.accelerator) if several else None
        if shared is not None and shared.alone:  # other processes have the others
            keep_blocks(model, shared.blocks)
        self.residency = make_residency(model, args, self.accelerator.device)
        if teacher is not None:
            teacher.to(self.accelerator.device)
        self.objective = objective or default_objective(
            model.config, args.gradient or "local", teacher=teacher, **args.objective_settings()
        )
        self.blocks = sorted(set(model.resident_blocks if args.blocks is None else args.blocks))
        if not self.blocks:
            raise ValueError("blocks=[] trains nothing: name at least one block, or None for all that are loaded.")
        self.group = Group(self.blocks) if shared is None else shared
        if self.group.alone:
            self.blocks = list(self.group.blocks)
            self.output_dir = job_directory(self.output_dir, self.blocks)
        for block in self.blocks:
            model.check_loaded(block)
        check_dataset(model, train_dataset, "training")
        if eval_dataset is not None:
            check_dataset(model, eval_dataset, "held-out")
        self.num_updates = args.updates_per_block(len(train_dataset), self.group.size)
        self.sequential = is_sequential(model.config, args)
        check_job(model, self.blocks, args, self.sequential)
        self._prepare_model()
        self.group.share_weights(model)
        self.trainers = self.residency.trainers
        self._make_trainers()
        self.schedule = block_schedule(self.blocks, self.num_updates, args, self.sequential)
        self._prepared: int | None = None
        self.iteration = 0
        self.control = TrainerControl()
        self.state = TrainerState(max_steps=len(self.schedule), is_world_process_zero=True)
        self.state.logging_steps, self.state.save_steps = args.logging_steps, args.save_steps
        self.status = RunStatus()
        self.callbacks = [self.status, *(callbacks or [])]
        self._pending: list[dict[str, Any]] = []
        self._stop = StopRequest()
        self._earlier_seconds = 0.0
        self._begun: float | None = None

    def _make_trainers(self) -> None:
        args = self.args
        for block in self.blocks:
            self.residency.pin(block)
            self.trainers[block] = BlockTrainer(
                self.model,
                block,
                self.objective,
                self.train_dataset,
                args,
                self.accelerator,
                self.num_updates,
                shared=args.train_shared == "all" or (args.train_shared == "first" and block == 0),
                group=self.group,
            )
        self.residency.release()

    def _prepare_model(self) -> None:
        self.model.train()
        if self.args.gradient_checkpointing:
            enable_checkpointing(self.model)
        if self.args.torch_compile:
            for block in self.blocks:
                self.model.block(block).compile()

    # -- the loop ------------------------------------------------------------------------------------------------

    def train(self, resume_from_checkpoint: str | os.PathLike | bool | None = None) -> dict[str, Any]:
        """Train every block for its budget.

        Args:
            resume_from_checkpoint: a checkpoint directory, True for the newest in ``output_dir`` (from the start if
                there is none), or None to start anew; an earlier run's files in ``output_dir`` are then set aside in
                ``previous-<n>``.

        Returns:
            A summary: iterations, updates per block, seconds, the mean loss of each block's last updates.

        Raises:
            ValueError: if the checkpoint is broken or belongs to another run.
            NonFiniteLossError: if a loss is not finite; names block, update and noise range. The last good checkpoint
                stays, nothing is written after it.
            OSError: if a checkpoint cannot be written.
        """
        self.output_dir.mkdir(parents=True, exist_ok=True)
        if self.group.is_leader:
            clean_staging(self.output_dir)
        if self.is_job:
            remove_tree(Path(self.args.output_dir) / "model")  # merged anew by the last job to end
        self.accelerator.wait_for_everyone()
        self._resume(resume_from_checkpoint)
        if self.args.report_to:
            self.accelerator.init_trackers("diffusionblocks", config=flat_values(self.args.to_dict()))
        self._notify("on_train_begin")
        self._begun = time.perf_counter()
        bar = tqdm(
            total=len(self.schedule),
            initial=self.iteration,
            desc=f"training {len(self.blocks)} block{'s' * (len(self.blocks) > 1)}",
            unit="update",
            disable=self.args.disable_tqdm or not self.group.is_leader,
        )
        with self._stop.listening(self.output_dir):
            with bar:
                while self.iteration < len(self.schedule):
                    self._iterate(bar)
                    if self._stop.by is not None or self.control.should_training_stop:
                        break
            self._flush()
            self._earlier_seconds, self._begun = self.training_seconds, None
            mark_trained(self.model, self.trainers, self.num_updates)
            saved = find_checkpoints(self.output_dir)
            if self.group.any(not saved or saved[-1].name != self._name)[0]:
                self._save_checkpoint()
        if self._stop.by is not None:
            self.status.on_stop(self)
            raise self._stop.interruption(self.iteration, self.output_dir / self._name)
        if self.iteration == len(self.schedule) and self.eval_dataset is not None and self._can_evaluate:
            self.evaluate()
        self._notify("on_train_end")
        if self.args.report_to:
            self.accelerator.end_training()
        return self.summary()

    @property
    def training_seconds(self) -> float:
        """Seconds that the updates took: those of this process, and those up to the checkpoint it goes on from."""
        return self._earlier_seconds + (0.0 if self._begun is None else time.perf_counter() - self._begun)

    @property
    def _name(self) -> str:
        return f"checkpoint-{self.iteration}"

    def _iterate(self, bar: tqdm) -> None:
        args = self.args
        block = self.schedule[self.iteration]
        if block != self._prepared:
            self._prepare_block(block)
        if block != self.residency.active:
            rest = range(self.iteration, len(self.schedule))
            self.residency.pin(block, next((self.schedule[i] for i in rest if self.schedule[i] != block), None))
        try:
            self._pending.append(self.trainers[block].step())
        except BadSampleError as error:
            raise ValueError(f"{error} {self._keep_good_state()}") from error
        self.iteration += 1
        self.state.global_step = self.iteration
        bar.update()
        log = self.iteration % args.logging_steps == 0
        save = args.save_steps > 0 and self.iteration % args.save_steps == 0
        evaluate = args.eval_steps > 0 and self.iteration % args.eval_steps == 0
        self._notify("on_step_end")
        self._agree()
        if log or save or evaluate or self.control.should_save or self.control.should_evaluate:
            means = self._flush()
            if means:
                bar.set_postfix({k.removeprefix("loss/"): f"{v:.3f}" for k, v in means.items() if "loss/" in k})
        if (evaluate or self.control.should_evaluate) and self.eval_dataset is not None and self._can_evaluate:
            self.evaluate()
        if save or self.control.should_save:
            self._save_checkpoint()
        self.control.should_save = self.control.should_evaluate = False

    def _agree(self) -> None:
        """What one process of a group is asked to do, all do, after the same update."""
        control, stop = self.control, self._stop.by is not None
        stop, control.should_training_stop, control.should_save, control.should_evaluate = self.group.any(
            stop, control.should_training_stop, control.should_save, control.should_evaluate
        )
        if stop and self._stop.by is None:
            self._stop.by = "another process"

    def _keep_good_state(self) -> str:
        """Before the run ends at an update that could not be made: save what was learned so far, and say where."""
        if self.iteration == 0:
            return "Nothing had been learned yet."
        if self.group.any(not (self.output_dir / self._name).is_dir())[0]:
            self._save_checkpoint()
        return (
            f"What was learned in {self.iteration} iterations is in {self.output_dir / self._name}: load it with "
            f"{type(self.model).__name__}.from_pretrained to go on with corrected data."
        )

    def _prepare_block(self, block: int) -> None:
        """Before the first update of a block, and before its next one after others were trained or the run resumed."""
        chained = self.args.gradient == "exact"  # then a block starts from what the chain has made of it
        if self.sequential and not chained and self.trainers[block].updates == 0:
            for lower, trainer in self.trainers.items():  # what is built upon is what will be saved
                if lower < block and trainer.ema is not None:
                    self.residency.pin(lower)
                    trainer.ema.copy_to(trainer.parameters)
            self.residency.pin(block)
            self.model.begin_block(block, self.args.hand_over)
            self.trainers[block].restart_average()
        if self.args.lower_outputs == "disk" and block > 0:
            with self.group.leader_first():
                self.trainers[block].dataset = lower_outputs(
                    self.model, block, self.train_dataset, self.output_dir / "lower-outputs", self.args.disable_tqdm
                )
        self._prepared = block

    def _notify(self, event: str, **values: Any) -> None:
        for callback in self.callbacks:
            getattr(callback, event)(self.args, self.state, self.control, model=self.model, trainer=self, **values)

    def _flush(self) -> dict[str, float]:
        """Bring pending losses to the host, check them, log them. Returns the means that were logged."""
        pending, self._pending = self._pending, []
        if not pending:
            return {}
        rows = read_rows(pending, self.iteration, last_good(self.output_dir, self.args.save_steps))
        if self.group.is_leader:
            append_rows(self.output_dir / UPDATES_NAME, rows)
        means = block_means(rows)
        self._track(means)
        self._notify("on_log", logs=means)
        return means

    def _track(self, values: dict[str, float]) -> None:
        self.state.log_history.append({"step": self.iteration, **values})
        if self.args.report_to:
            self.accelerator.log(values, step=self.iteration)

    # -- held-out figures ----------------------------------------------------------------------------------------

    @property
    def _can_evaluate(self) -> bool:
        """Held-out loss over all noise needs every block."""
        return len(self.model.resident_blocks) == self.model.partition.num_blocks

    def averaged_weights(self) -> contextlib.AbstractContextManager:
        """The averaged weights in place of the trained ones, for as long as the context lasts."""
        return self.residency.averaged()

    def evaluate(self, dataset: Any | None = None, num_draws: int = 1) -> HeldOutLoss:
        """Held-out loss of the averaged weights, over all noise and per block; logged, with likelihood_shares."""
        dataset = self.eval_dataset if dataset is None else dataset
        if dataset is None:
            raise ValueError("no held-out data: give eval_dataset to the trainer or a data set to evaluate().")
        with self.averaged_weights():
            held_out = getattr(self.objective, "held_out", held_out_loss)
            rows: dict[str, Any] = {"max_samples": self.args.eval_samples, "seed": self.args.seed}
            result = held_out(self.model, dataset, num_draws=num_draws, **rows)
            shares = [] if self.group.sharded else likelihood_shares(self.model, dataset, result, **rows)
        values = {LOSS_NAME: result.total, **by_block(LOSS_NAME, result.per_range), **by_block(SHARE_NAME, shares)}
        if self.group.is_leader:
            self.output_dir.mkdir(parents=True, exist_ok=True)
            append_rows(self.output_dir / EVALUATIONS_NAME, [{"iteration": self.iteration, **values}])
        self._track(values)
        self._notify("on_evaluate", metrics=values)
        return result

    def summary(self) -> dict[str, Any]:
        """Iterations, updates per block, seconds that they took, mean loss of each block's last updates."""
        return {
            "iterations": self.iteration,
            "updates_per_block": {block: trainer.updates for block, trainer in self.trainers.items()},
            "training_seconds": self.training_seconds,
            "last_losses": last_losses(self.output_dir / UPDATES_NAME),
        }

    # -- saving and resuming -------------------------------------------------------------------------------------

    def save_model(self, output_dir: str | os.PathLike | None = None) -> Path:
        """Save the averaged weights (the trained ones without an average) in the layout of ``from_pretrained``.

        All processes of a run call it. Where they own different blocks, each saves its own and returns their directory;
        unless one was named, the last to do so merges all in ``output_dir/model`` of the run, and returns that.
        """
        target = Path(output_dir) if output_dir is not None else self.output_dir / "model"
        mark_trained(self.model, self.trainers, self.num_updates)
        with self.averaged_weights():
            self.group.save_pretrained(self.model, target)
        if output_dir is None and self.is_job:
            return merge_run(Path(self.args.output_dir)) or target
        return target

    @property
    def is_job(self) -> bool:
        """Whether other processes of this run train other blocks, in directories beside this one's."""
        return self.output_dir != Path(self.args.output_dir)

    @cached_property
    def identity(self) -> dict[str, Any]:
        """What a checkpoint must agree on to be resumed: model, settings, data."""
        return run_identity(self.model, self.args, self.train_dataset, self.group.size)

    def _save_checkpoint(self) -> None:
        self._flush()
        keep = self.args.save_total_limit
        run = (self.output_dir, self.iteration, self.model, self.trainers, self.identity)
        write_checkpoint(*run, keep, self.residency, self.group, self.training_seconds)
        self._notify("on_save")

    def _resume(self, resume: str | os.PathLike | bool | None) -> None:
        checkpoint = chosen_checkpoint(self.output_dir, resume)
        if checkpoint is None:
            if self.iteration == 0 and self.group.is_leader:
                if self.is_job:
                    check_other_jobs(Path(self.args.output_dir), self.output_dir, bool(resume))
                set_aside(self.output_dir)
            return
        state = read_state(checkpoint)
        check_identity(state["identity"], self.identity, checkpoint)
        load_checkpoint(checkpoint, state, self.model, self.trainers, self.residency)
        self.iteration = self.state.global_step = state["iteration"]
        self._earlier_seconds = state["training_seconds"]
        self._prepared = None
        if self.group.is_leader:
            truncate_logs(self.output_dir, self.iteration)


__all__ = ["DiffusionBlocksTrainer", "NonFiniteLossError"]

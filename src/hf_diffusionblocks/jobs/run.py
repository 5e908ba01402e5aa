"""``diffusionblocks train``: one flow for every family.

load the data -> build the trainer -> train -> save the model, what belongs beside it and its card -> draw, score and
report. A family's class fills in the steps; what happens when, and in which process of a run, stands here alone.
"""

from pathlib import Path, PurePath
from typing import Any

import torch
from transformers import AutoConfig, AutoModel, TrainerCallback

from .. import serialization
from ..evaluation import format_figures
from ..hub import model_card, write_model_card
from ..hub.card import is_local
from ..memory import MemoryPlan
from ..modeling import BlockedPreTrainedModel, format_block_parameters
from ..recipes import Recipe
from ..report.run_state import read_object
from ..repository.block_table import stand_in
from ..run_names import FIGURES_DIR, FIGURES_NAME, MODEL_DIR, RECIPE_NAME
from ..training import DiffusionBlocksTrainer
from ..training.checkpoint import find_checkpoints
from ..training.run_record import read_record, record_run
from ..units import human_seconds
from .common import Say, merge_jobs, say_where, trainer_says
from .planning import memory_lines, planned_memory

Pictures = list[tuple[str, Path]]
_OF_THE_RUN = ("output_dir", "disable_tqdm")  # settings that say nothing of the model


class _OldFigures(TrainerCallback):
    """Removes the figures of an earlier model when updates begin that make another one of it."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_begin(self, args: Any, state: Any, control: Any, *, trainer: Any, **kwargs: Any) -> None:
        if trainer.iteration < len(trainer.schedule) and trainer.group.is_leader:
            self.path.unlink(missing_ok=True)


class Run:
    """One run of a recipe.

    Args:
        recipe: of the run; ``load`` puts the recipe of its method in its place.
        blocks: hold and train these only.
        lower: for a block of a cascade, the directory of a model that holds the trained blocks below it.
        report: draw and score at the end, and write a report.
        say: prints.
        command: that began the run, for the model's card.
    """

    def __init__(
        self,
        recipe: Recipe,
        *,
        blocks: list[int] | None = None,
        lower: str | None = None,
        report: bool = True,
        say: Say = print,
        command: str | None = None,
    ) -> None:
        self.recipe, self.blocks, self.lower, self.report, self.say = recipe, blocks, lower, report, say
        self.command = command
        self.train_data: Any = None
        self.test_data: Any = None

    # -- what a family defines -----------------------------------------------------------------------------------

    def load(self) -> None:
        """Load ``train_data`` and ``test_data``; ``recipe`` becomes the one that really runs."""
        raise TypeError(f"{type(self).__name__} must define load().")

    def build_trainer(self) -> DiffusionBlocksTrainer:
        """The trainer of the run."""
        raise TypeError(f"{type(self).__name__} must define build_trainer().")

    def check(self, model: BlockedPreTrainedModel) -> None:
        """Raise a ``ValueError`` for what would fail after training."""

    def data_lines(self, model: BlockedPreTrainedModel) -> list[str]:
        """Lines that say what the data are."""
        return []

    def parts(self, model: BlockedPreTrainedModel) -> list[str]:
        """Lines that name a model's parts besides its blocks."""
        return []

    def save_beside(self, model: BlockedPreTrainedModel, directory: Path) -> None:
        """Save in a model's directory what is needed to use it: a tokenizer, an image processor, a VAE."""

    def draw(self, model: BlockedPreTrainedModel, folder: Path) -> Pictures:
        """Pictures that come before the figures, which may take long: their names and files."""
        return []

    def score(self, model: BlockedPreTrainedModel) -> dict[str, Any]:
        """The table of figures of a trained model."""
        raise TypeError(f"{type(self).__name__} must define score().")

    def plot(
        self, model: BlockedPreTrainedModel, figures: dict[str, Any], memory: MemoryPlan, folder: Path
    ) -> Pictures:
        """Pictures of the figures, of memory and losses: their names and files."""
        raise TypeError(f"{type(self).__name__} must define plot().")

    def sample_lines(self) -> list[str]:
        """Lines that show a sample."""
        return []

    def usage_lines(self, model: BlockedPreTrainedModel, model_dir: PurePath) -> list[str]:
        """The lines of Python that load a saved model and use it."""
        raise TypeError(f"{type(self).__name__} must define usage_lines().")

    def card_settings(self) -> dict[str, Any]:
        """Of the model card: the Hub's task, and the base."""
        return {}

    # -- the flow ------------------------------------------------------------------------------------------------

    @property
    def output(self) -> Path:
        """The run's directory."""
        return Path(self.recipe.training_arguments().output_dir)

    @property
    def reports(self) -> bool:
        """Whether a run that is no job among others ends with a report: it then holds the whole model."""
        return self.report and (self.blocks is None or self.lower is not None)

    def train(self, resume: bool = True) -> Path:
        """Train, save and report; see ``hf_diffusionblocks.jobs.train``.

        Args:
            resume: go on from the last checkpoint.

        Returns:
            The directory of the saved model.
        """
        self.load()
        trainer = self.build_trainer()
        self.check(trainer.model)
        self.say = trainer_says(trainer, self.say)
        self.output.mkdir(parents=True, exist_ok=True)
        resumed = resume and bool(find_checkpoints(trainer.output_dir))
        begun = "going on with" if resumed else "training"
        self._say(f"{begun} {self.recipe.name} ({self.recipe.method}) in {trainer.output_dir}")
        self._say(*self.data_lines(trainer.model), format_block_parameters(trainer.model), *self.parts(trainer.model))
        if trainer.group.is_leader:
            serialization.write_json(self.output / RECIPE_NAME, self.recipe.to_dict())
            record_run(trainer.output_dir, trainer.accelerator.device, self.command, resumed)
        figures_file = self.output / FIGURES_DIR / FIGURES_NAME
        trainer.callbacks.append(_OldFigures(figures_file))
        summary = trainer.train(resume_from_checkpoint=resume)
        model_dir = trainer.save_model(trainer.output_dir / MODEL_DIR)
        if not trainer.group.is_leader:
            return model_dir
        record_run(trainer.output_dir, trainer.accelerator.device, self.command, resumed=True)
        self.save_beside(trainer.model, model_dir)
        known = {} if trainer.is_job else read_object(figures_file)  # there if all had been trained and scored before
        self.write_card(trainer.model, model_dir, {"training_seconds": summary["training_seconds"]} | known)
        self._say(f"{_done(summary, trainer.status.first)}; model saved in {model_dir}")
        return self._finish(trainer, model_dir, summary)

    def _finish(self, trainer: DiffusionBlocksTrainer, model_dir: Path, summary: dict[str, Any]) -> Path:
        """Report on the whole model, if this process has it or is the one that merged it."""
        device, model = trainer.model.device, trainer.model
        if trainer.is_job:
            merged = merge_jobs(self.output, summary, self.say)
            if merged is not None:
                self.write_card(described(merged), merged, {})
            if merged is not None and self.report:
                self.write_report(self._load(merged, device), summary)
            return model_dir if merged is None else merged
        if self.reports and len(model.resident_blocks) == model.partition.num_blocks:
            if trainer.group.sharded:
                self.write_report(self._load(model_dir, device), summary)
            else:
                with trainer.averaged_weights():
                    self.write_report(model, summary)
        return model_dir

    def write_report(self, model: BlockedPreTrainedModel, summary: dict[str, Any]) -> dict[str, Any]:
        """Pictures, samples and a table of figures of a trained model, under ``output/figures``."""
        folder = self.output / FIGURES_DIR
        folder.mkdir(parents=True, exist_ok=True)
        pictures = self.draw(model, folder)
        figures = self.score(model)
        figures |= {name: summary[name] for name in ("training_seconds", "updates_per_block") if name in summary}
        serialization.write_figures(folder / FIGURES_NAME, figures)
        memory = planned_memory(model.config, self.recipe, alternatives=False)
        pictures += self.plot(model, figures, memory, folder)
        model_dir = self.output / MODEL_DIR
        self.write_card(model, model_dir, figures)
        self._say("", *memory_lines(memory), "", format_figures(figures), "", *self.sample_lines())
        say_where(pictures, model_dir, self.usage_lines(model, model_dir), self.say)
        return figures

    def write_card(
        self,
        model: BlockedPreTrainedModel,
        model_dir: Path,
        figures: dict[str, Any],
        path: Path | None = None,
        runs: tuple[Path, ...] = (),
    ) -> None:
        """Write a model's card into its directory, or to ``path``; ``runs`` are those it was made by, if not this."""
        recipe = self.recipe
        own = isinstance(recipe.data.name, str) and is_local(recipe.data.name)
        title = (self.output.resolve().name or recipe.name) if own else recipe.name
        card = model_card(
            model,
            title=title,
            usage="\n".join(self.usage_lines(model, stand_in(title))),
            training={"method": recipe.method, **{k: v for k, v in recipe.training.items() if k not in _OF_THE_RUN}},
            figures=figures,
            dataset=recipe.data.name if isinstance(recipe.data.name, str) else None,
            made=read_record(*(runs or (self.output,))),
            license=recipe.license,
            **self.card_settings(),
        )
        write_model_card(model_dir if path is None else path, card)

    def _load(self, model_dir: Path, device: torch.device) -> BlockedPreTrainedModel:
        return self.recipe.kind.model_class.from_pretrained(model_dir).to(device)

    def _say(self, *lines: str) -> None:
        for line in lines:
            self.say(line)


def described(model_dir: Path) -> BlockedPreTrainedModel:
    """A saved model without its weights, which a card does not need."""
    with torch.device("meta"):
        return AutoModel.from_config(AutoConfig.from_pretrained(model_dir))


def _done(summary: dict[str, Any], first: int) -> str:
    """How many updates were made, in which time, and how many by this process, which began after the first so many."""
    made, taken = summary["iterations"], human_seconds(summary["training_seconds"])
    if first == 0:
        return f"trained {made} updates in {taken}"
    if first == made:
        return f"all {made} updates had been made before, in {taken}"
    return f"trained {made} updates in {taken}, the last {made - first} since the run was resumed"

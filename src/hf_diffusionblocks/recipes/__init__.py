"""Recipes: YAML presets of a whole run, with overrides. Every key is checked before any work."""

import copy
from collections.abc import Iterable
from dataclasses import dataclass, field, fields
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from ..families.dit import BlockedDiTConfig, BlockedDiTModel, base_config_defaults, config_fields
from ..suggest import unknown_name
from ..training.arguments import DiffusionBlocksTrainingArguments

METHODS = ("blocked", "end_to_end", "shallow")
MATCHES = ("updates", "compute")


@dataclass
class DataSettings:
    """Where the data comes from; see :func:`hf_diffusionblocks.data.load_image_dataset`."""

    name: str = "digits"
    train_split: str = "train"
    test_split: str = "test"
    image_column: str | None = None
    label_column: str | None = None
    image_size: int | None = None
    channels: int | None = None
    data_dir: str | None = None
    train_files: str | None = None
    test_files: str | None = None
    max_samples: int | None = None
    scaling_factor: float = 1.0


@dataclass
class SamplingSettings:
    """How images are sampled; every so many iterations during training too, if ``every`` is positive."""

    num_inference_steps: int = 50
    guidance_scale: float = 2.0
    solver: str = "euler"
    grid: str = "karras"
    vae: str | None = None
    every: int = 0


@dataclass
class EvaluationSettings:
    """How a trained model is scored."""

    num_samples: int = 1000
    guidance_scale: float = 1.0
    num_draws: int = 4
    held_out_samples: int | None = None
    batch_size: int = 250
    classifier_epochs: int = 10
    classifier_width: int = 32
    feature_network: str = "classifier"


@dataclass
class Recipe:
    """A whole run.

    Attributes:
        name: of the recipe.
        family: only ``dit`` so far.
        method: ``blocked``; or a baseline: ``end_to_end`` (all L layers at once) or ``shallow`` (L / B layers).
        match: ``updates`` or ``compute``: a shallow baseline gets the blocks' updates, or B times as many.
        model: config of the base network, or ``base``: a directory or Hub id to convert.
        blocks: fields of the blocked model's config.
        data, training, sampling, evaluation: settings of each.
    """

    name: str = "custom"
    family: str = "dit"
    method: str = "blocked"
    match: str = "updates"
    model: dict[str, Any] = field(default_factory=dict)
    blocks: dict[str, Any] = field(default_factory=dict)
    data: DataSettings = field(default_factory=DataSettings)
    training: dict[str, Any] = field(default_factory=dict)
    sampling: SamplingSettings = field(default_factory=SamplingSettings)
    evaluation: EvaluationSettings = field(default_factory=EvaluationSettings)

    def training_arguments(self) -> DiffusionBlocksTrainingArguments:
        """The training settings, checked."""
        return DiffusionBlocksTrainingArguments(**self.training)

    def config(self) -> BlockedDiTConfig:
        """The config of the model that this recipe trains (of a converted ``base``: after loading it)."""
        if "base" in self.model:
            return self.build_model().config
        return BlockedDiTModel.config_from(self.model, **self.blocks)

    def build_model(self, blocks: list[int] | None = None) -> BlockedDiTModel:
        """A new model, or the converted ``model.base``."""
        if "base" in self.model:
            return BlockedDiTModel.from_base(self.model["base"], **self.blocks)
        return BlockedDiTModel(self.config(), blocks=blocks)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as in a YAML file."""
        from dataclasses import asdict

        return asdict(self)


def recipe_names() -> list[str]:
    """Names of the recipes that come with the package."""
    files = resources.files(__package__).iterdir()
    return sorted(f.name.removesuffix(".yaml") for f in files if f.name.endswith(".yaml"))


def load_recipe(name_or_path: str, overrides: Iterable[str] = ()) -> Recipe:
    """Load a recipe by name or from a YAML file and apply overrides.

    Args:
        name_or_path: a recipe's name or the path of a YAML file.
        overrides: ``section.key=value`` with a YAML value, such as ``training.max_steps=100``.

    Raises:
        ValueError: for an unknown recipe or key (with the nearest valid one) or a value that is not allowed.
    """
    path = Path(name_or_path)
    if path.suffix in (".yaml", ".yml"):
        if not path.is_file():
            raise ValueError(f"there is no recipe file {path}.")
        text, name = path.read_text(encoding="utf-8"), path.stem
    elif name_or_path in recipe_names():
        text = (resources.files(__package__) / f"{name_or_path}.yaml").read_text(encoding="utf-8")
        name = name_or_path
    else:
        raise ValueError(unknown_name("recipe", name_or_path, recipe_names()) + " Or give a .yaml file.")
    try:
        values = yaml.safe_load(text) or {}
    except yaml.YAMLError as error:
        raise ValueError(f"recipe {name_or_path} is not valid YAML: {error}") from error
    for override in overrides:
        _apply_override(values, override)
    return make_recipe({"name": name, **values})


def _apply_override(values: dict[str, Any], override: str) -> None:
    key, separator, text = override.partition("=")
    if not separator or not key:
        raise ValueError(f"override {override!r} must look like section.key=value, such as training.max_steps=100.")
    *path, last = key.strip().split(".")
    for part in path:
        values = values.setdefault(part, {})
        if not isinstance(values, dict):
            raise ValueError(f"override {override!r}: {part!r} is a value, not a section.")
    values[last] = yaml.safe_load(text)


def make_recipe(values: dict[str, Any]) -> Recipe:
    """A checked recipe from plain values; see :func:`load_recipe`."""
    values = copy.deepcopy(values)
    _check_keys("recipe key", values, [f.name for f in fields(Recipe)])
    sections = {"data": DataSettings, "sampling": SamplingSettings, "evaluation": EvaluationSettings}
    for name, kind in sections.items():
        section = values.get(name) or {}
        _check_section(name, section, [f.name for f in fields(kind)])
        values[name] = kind(**section)
    _check_section("training", values.get("training") or {}, [f.name for f in fields(DiffusionBlocksTrainingArguments)])
    _check_section("model", values.get("model") or {}, ["base", *base_config_defaults()])
    _check_section("blocks", values.get("blocks") or {}, ["num_blocks", *config_fields()])
    recipe = Recipe(**values)
    for name, allowed in (("family", ("dit",)), ("method", METHODS), ("match", MATCHES)):
        if getattr(recipe, name) not in allowed:
            raise ValueError(unknown_name(name, getattr(recipe, name), allowed))
    for name, value in recipe.training.items():  # YAML reads 1e-4 as text
        recipe.training[name] = _number(value)
    recipe.training_arguments()
    if "base" not in recipe.model:
        recipe.config()
    return recipe


def _number(value: Any) -> Any:
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            return value
    return value


def _check_section(name: str, section: Any, allowed: list[str]) -> None:
    if not isinstance(section, dict):
        raise ValueError(f"the recipe's section {name!r} must hold settings, not {section!r}.")
    _check_keys(f"key in section {name!r}", section, allowed)


def _check_keys(what: str, section: dict[str, Any], allowed: list[str]) -> None:
    for key in section:
        if key not in allowed:
            raise ValueError(unknown_name(what, key, allowed))

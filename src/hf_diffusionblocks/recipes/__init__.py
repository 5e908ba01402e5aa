"""Recipes: YAML presets of a whole run, with overrides. Every key is checked before any work."""

import copy
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, fields
from importlib import resources
from pathlib import Path
from typing import Any

import yaml
from transformers import PreTrainedTokenizerBase

from ..configuration import DiffusionBlocksConfig
from ..families.base_config import check_can_be_cut
from ..modeling import BlockedPreTrainedModel
from ..suggest import unknown_name
from ..training.arguments import DiffusionBlocksTrainingArguments
from .families import FAMILIES, Family, check_text_recipe, language_model_config
from .sections import ImageData, ImageEvaluation, ImageSampling

METHODS = ("blocked", "end_to_end", "shallow")
MATCHES = ("updates", "compute")


@dataclass
class Recipe:
    """A whole run.

    Attributes:
        name: of the recipe.
        family: a name in ``FAMILIES``, such as ``dit`` or ``causal_lm``.
        method: ``blocked``; or a baseline: ``end_to_end`` (all L layers at once) or ``shallow`` (L / B layers).
        match: ``updates`` or ``compute``: a shallow baseline gets the blocks' updates, or as many as cost the same.
        layers: number of layers of a shallow baseline; by default L / B, rounded up.
        license: of the weights, the Hub's identifier (``apache-2.0``), for the model's card.
        model: config of the base network (of a language model: with its ``model_type``), or ``base``: a directory or
            Hub id to convert.
        blocks: fields of the blocked model's config.
        data, training, sampling, evaluation: settings of each.
    """

    name: str = "custom"
    family: str = "dit"
    method: str = "blocked"
    match: str = "updates"
    layers: int | None = None
    license: str | None = None
    model: dict[str, Any] = field(default_factory=dict)
    blocks: dict[str, Any] = field(default_factory=dict)
    # Each of a class that the family's `kind` names: what holds for one kind is checked there, not by types.
    data: Any = field(default_factory=ImageData)
    training: dict[str, Any] = field(default_factory=dict)
    sampling: Any = field(default_factory=ImageSampling)
    evaluation: Any = field(default_factory=ImageEvaluation)

    @property
    def kind(self) -> Family:
        """What the family's sections hold."""
        return FAMILIES[self.family]

    def training_arguments(self) -> DiffusionBlocksTrainingArguments:
        """The training settings, checked."""
        return DiffusionBlocksTrainingArguments(**self.training)

    def config(
        self, vocab_size: int | None = None, tokenizer: PreTrainedTokenizerBase | None = None
    ) -> DiffusionBlocksConfig:
        """The config of the model that this recipe trains (of a converted DiT: after loading it).

        Args:
            vocab_size: of a language model whose recipe gives none; by default 257, the bytes.
            tokenizer: gives a language model's vocabulary and special tokens.

        Raises:
            ValueError: if the settings, or the tokenizer, do not fit.
        """
        if self.kind.has_text:
            return language_model_config(self.kind.model_class, self.model, self.blocks, vocab_size, tokenizer)
        if "base" in self.model:
            return self.build_model().config
        return self.kind.model_class.config_from(self.model, **self.blocks)

    def build_model(
        self, blocks: Sequence[int] | None = None, tokenizer: PreTrainedTokenizerBase | None = None
    ) -> BlockedPreTrainedModel:
        """A new model, or the converted ``model.base``; see ``config``.

        Args:
            blocks: hold these blocks only; a base is loaded whole and the others are dropped.
            tokenizer: gives a language model's vocabulary and special tokens.
        """
        kind = self.kind.model_class
        if "base" in self.model:
            model = kind.from_base(self.model["base"], **self.blocks)
            if blocks is not None:
                for block in blocks:
                    model.block(block)
                for block in set(model.resident_blocks) - set(blocks):
                    del model.blocks[str(block)]
            return model
        return kind(self.config(tokenizer=tokenizer), blocks=blocks)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as in a YAML file."""
        return asdict(self)


def recipe_names() -> list[str]:
    """Names of the recipes that come with the package."""
    files = resources.files(__package__).iterdir()
    return sorted(f.name.removesuffix(".yaml") for f in files if f.name.endswith(".yaml"))


def recipe_path(name: str) -> str:
    """Where a file of this package lies: a recipe, a config of Accelerate's launcher, a script; ``list`` names all.

    Raises:
        ValueError: for another name.
    """
    folder = Path(str(resources.files(__package__)))
    names = [
        p.relative_to(folder).as_posix() for pattern in ("*.yaml", "*/*.yaml", "*/*.sh") for p in folder.glob(pattern)
    ]
    if name == "list":
        return "\n".join(sorted(names))
    for found in (name, f"{name}.yaml"):
        if found in names:
            return str(folder / found)
    raise ValueError(unknown_name("file", name, sorted(names)))


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
        try:
            text, name = path.read_text(encoding="utf-8"), path.stem
        except UnicodeDecodeError as error:
            raise ValueError(f"recipe {name_or_path} is not UTF-8: {error}.") from error
    elif name_or_path in recipe_names():
        text = (resources.files(__package__) / f"{name_or_path}.yaml").read_text(encoding="utf-8")
        name = name_or_path
    else:
        raise ValueError(unknown_name("recipe", name_or_path, recipe_names()) + " Or give a .yaml file.")
    try:
        values = yaml.safe_load(text) or {}
    except yaml.YAMLError as error:
        raise ValueError(f"recipe {name_or_path} is not valid YAML: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"recipe {name_or_path} holds {values!r:.60}, not sections such as data and training.")
    return make_recipe({"name": name, **values}, overrides)


def _apply_override(values: dict[str, Any], override: str) -> None:
    key, separator, text = override.partition("=")
    if not separator or not key:
        raise ValueError(f"override {override!r} must look like section.key=value, such as training.max_steps=100.")
    *path, last = key.strip().split(".")
    for part in path:
        values = values.setdefault(part, {})
        if not isinstance(values, dict):
            raise ValueError(f"override {override!r}: {part!r} is a value, not a section.")
    try:
        values[last] = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(f"override {override!r}: {text!r} is not valid YAML; put text in quotes.") from error


def make_recipe(values: dict[str, Any], overrides: Iterable[str] = ()) -> Recipe:
    """A checked recipe from plain values; see ``load_recipe``."""
    if not isinstance(values, dict):
        raise ValueError(f"a recipe holds sections such as data and training, not {values!r:.60}.")
    values = copy.deepcopy(values)
    for override in overrides:
        _apply_override(values, override)
    _check_keys("recipe key", values, [f.name for f in fields(Recipe)])
    family = values.setdefault("family", "dit")
    for name, allowed in (("family", tuple(FAMILIES)), ("method", METHODS), ("match", MATCHES)):
        if values.get(name, allowed[0]) not in allowed:
            own = (
                " One of your own is known where its module was imported: --import MODULE." if name == "family" else ""
            )
            raise ValueError(unknown_name(name, values[name], allowed) + own)
    if not isinstance(values.get("name", ""), str):
        raise ValueError(f"name={values['name']!r:.60} must be text: the recipe's name.")
    license = values.get("license")
    if license is not None and (not isinstance(license, str) or not license.strip()):
        raise ValueError(f"license={license!r:.60} must be the Hub's identifier of a licence, such as apache-2.0.")
    kind = FAMILIES[family]
    for name in ("data", "sampling", "evaluation"):
        section = values.get(name) or {}
        _check_section(name, section, [f.name for f in fields(getattr(kind, name))], family)
        values[name] = getattr(kind, name)(**section)
    arguments = [f.name for f in fields(DiffusionBlocksTrainingArguments)]
    known: dict[str, list[str] | None] = {"training": arguments, "blocks": sorted(kind.block_fields), "model": None}
    for name, names in known.items():
        section = values[name] = values.get(name) or {}
        _check_section(name, section, None, family)
        if names is None:
            names = kind.model_keys(section)
            unknown = [key for key in section if key not in names]
            if unknown and "model_type" in names:
                known_ones = {key: value for key, value in section.items() if key in names}
                check_can_be_cut(kind.model_class.config_class, known_ones, str(unknown[0]))
        _check_section(name, section, names, family)
    recipe = Recipe(**values)
    if recipe.layers is not None:
        _check_layers(recipe)
    if recipe.method == "blocked" and recipe.match != "updates":
        raise ValueError(
            f"match={recipe.match} is for a baseline, and method=blocked is what baselines are matched with: choose "
            "method=end_to_end or shallow as well, or leave match out."
        )
    args = recipe.training_arguments()
    recipe.training = {name: getattr(args, name) for name in recipe.training}  # YAML reads 1e-4 as text
    if kind.has_text:
        check_text_recipe(recipe.model, recipe.data)
    if "base" not in recipe.model:
        recipe.config()
    return recipe


def _check_layers(recipe: Recipe) -> None:
    if isinstance(recipe.layers, bool) or not isinstance(recipe.layers, int) or recipe.layers < 1:
        raise ValueError(f"layers={recipe.layers!r} must be a whole number of at least 1.")
    if recipe.method != "shallow":
        raise ValueError(
            f"layers={recipe.layers} is the depth of method=shallow, not of method={recipe.method}: for another depth "
            f"set model.{recipe.kind.layers_key}."
        )


def _check_section(name: str, section: Any, allowed: Sequence[str] | None, family: str) -> None:
    if not isinstance(section, dict):
        raise ValueError(f"the recipe's section {name!r} must hold settings, not {section!r}.")
    if allowed is not None:
        _check_keys(f"key in section {name!r} of family {family!r}", section, allowed)


def _check_keys(what: str, section: dict[str, Any], allowed: Sequence[str]) -> None:
    for key in section:
        if key not in allowed:
            raise ValueError(unknown_name(what, key, allowed))

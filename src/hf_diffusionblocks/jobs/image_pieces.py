"""Data, model, VAE and trainer of a recipe of images."""

from pathlib import Path
from typing import Any

from ..data import ImageDataset, load_image_dataset
from ..modeling import BlockedPreTrainedModel
from ..recipes import Recipe
from ..training import DiffusionBlocksTrainer
from ..training.arguments import DiffusionBlocksTrainingArguments
from . import building

LATENTS = "latents"  # where the recipes of latent models expect them


def is_latent_source(name: Any) -> bool:
    """Whether a directory holds cached latents, itself or in folders of splits."""
    path = Path(str(name))
    found = (file for pattern in ("", "*/") for file in path.glob(f"{pattern}latents*.safetensors"))
    return path.is_dir() and next(found, None) is not None


def load_data(recipe: Recipe) -> tuple[ImageDataset, ImageDataset]:
    """Training and held-out data of a recipe. Size and channels are the model's where the recipe gives none."""
    data = recipe.data
    size, channels = (recipe.model.get(name) for name in recipe.kind.image_keys)
    if is_latent_source(data.name) or "base" in recipe.model or channels not in (1, 3):
        size = channels = None  # latents come as they are, and a base is loaded later
    if data.name == "digits":  # 8 x 8 in every run: another size is a mistake
        size = channels = None
    common = {
        "image_column": data.image_column,
        "label_column": data.label_column,
        "image_size": size if data.image_size is None else data.image_size,
        "channels": channels if data.channels is None else data.channels,
        "data_dir": data.data_dir,
        "max_samples": data.max_samples,
        "scaling_factor": data.scaling_factor,
    }

    def load(key: str, name: str, files: str | None) -> ImageDataset:
        try:
            return load_image_dataset(data.name, name, data_files={name: files} if files else None, **common)
        except ValueError as error:
            if "has no split" in str(error) or "unknown split" in str(error):
                raise ValueError(f"{error} {_split_advice(key, name)}") from error
            raise

    train = load("data.train_split", data.train_split, data.train_files)
    if data.test_fraction is not None:
        return train.hold_out(data.test_fraction)
    test = load("data.test_split", data.test_split, data.test_files)
    if any(a != b for a, b in zip(test.class_names, train.class_names, strict=False)):
        raise ValueError(
            f"the classes of data.test_split={data.test_split} are {_names(test)}, those of data.train_split="
            f"{data.train_split} {_names(train)}: the same label would mean another class. Give both the same class "
            "folders, or label columns with the same names."
        )
    return train, test


def data_line(recipe: Recipe, train: ImageDataset, test: ImageDataset) -> str:
    """How many images there are, and on which the model is scored."""
    classes = f"{train.num_classes} class{'es' * (train.num_classes != 1)}"
    line = f"images: {len(train)}, in {classes}; held out: "
    if recipe.data.test_fraction is None and recipe.data.test_split == recipe.data.train_split:
        return line + "none, so all scores are of the training images"
    return line + f"{len(test)}"


def _split_advice(key: str, name: str) -> str:
    """How to mend a split that is not there, in the words of a recipe."""
    advice = f"The recipe's setting is {key}={name}: name another one"
    if key == "data.test_split":
        advice += (
            ", or its files with data.test_files= (a pattern such as held-out/*/*.png). data.test_fraction=0.1 holds "
            "some of the training images out; data.test_split=train scores on the training images"
        )
    return advice + "."


def _names(data: ImageDataset) -> str:
    return ", ".join(data.class_names[:8]) + (", ..." if data.num_classes > 8 else "")


def check_classes(data: ImageDataset, model: BlockedPreTrainedModel, key: str) -> None:
    """Raise a ``ValueError`` for data with more classes than the model has, by ``key`` of the section ``model``."""
    building.check_classes(data, model.config.num_classes, "class_labels", f"model.{key}")


def build_trainer(
    recipe: Recipe,
    train: ImageDataset,
    held_out: ImageDataset | None,
    *,
    blocks: list[int] | None = None,
    callbacks: list[Any] | None = None,
) -> DiffusionBlocksTrainer:
    """The trainer of a recipe; see ``building.make_trainer``."""

    def prepare(model: BlockedPreTrainedModel) -> None:
        check_classes(train, model, recipe.kind.classes_key)
        building.name_classes(model, train)

    def load_teacher(args: DiffusionBlocksTrainingArguments) -> BlockedPreTrainedModel | None:
        if args.distillation_weight <= 0:
            return None
        settings = {k: v for k, v in recipe.blocks.items() if k not in ("num_blocks", "layers_per_block", "edges")}
        return recipe.kind.model_class.from_base(building.base_to_distil(recipe), num_blocks=1, **settings)

    return building.make_trainer(
        recipe, train, held_out, prepare=prepare, load_teacher=load_teacher, blocks=blocks, callbacks=callbacks
    )


def load_vae(recipe: Recipe) -> Any:
    """The recipe's VAE, or None for models of pixels."""
    if recipe.sampling.vae is None:
        return None
    from diffusers import AutoencoderKL

    try:
        vae = AutoencoderKL.from_pretrained(recipe.sampling.vae)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"sampling.vae={recipe.sampling.vae!r} cannot be loaded: {error} Give the directory or Hub id of a "
            "diffusers AutoencoderKL."
        ) from error
    vae.enable_slicing()  # decodes image by image: a batch of large ones would not fit
    return vae.eval()

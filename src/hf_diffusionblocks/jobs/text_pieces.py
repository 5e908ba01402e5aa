"""Tokenizer, data, model and trainer of a language model's recipe."""

import os
import tempfile
from collections.abc import Iterable
from itertools import islice
from pathlib import Path
from typing import Any

from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase

from ..data import load_documents, load_text_dataset, load_tokenizer
from ..data.text_rows import Encode, TooShortError
from ..data.tokenizing import check_tokenizer, tokenizer_fingerprint, tokenizer_size, with_mask_token
from ..families.causal_lm import BlockedForCausalLM
from ..recipes import Recipe
from ..recipes.families import BYTES, FAMILIES
from ..recipes.sections import TRAINED_TOKENIZERS
from ..training import DiffusionBlocksTrainer
from ..training.arguments import DiffusionBlocksTrainingArguments
from .building import make_trainer
from .cascade_jobs import take_lower_blocks
from .common import family_of, loading, pick_device

# A tokenizer that is trained on a stream sees this many documents of its beginning.
STREAM_DOCUMENTS = 20_000


def _source(recipe: Recipe) -> dict[str, Any]:
    data = recipe.data
    if data.name is None:
        raise ValueError(
            f"recipe {recipe.name!r} names no text: give data.name= a text file, a directory or pattern of text files, "
            "or the id of a data set on the Hub."
        )
    return {
        "name": data.name,
        "data_files": data.data_files,
        "text_column": data.text_column,
        "test_fraction": data.test_fraction,
        "streaming": data.streaming,
        "config_name": data.config_name,
        **({"revision": data.revision} if data.revision else {}),
    }


def make_tokenizer(recipe: Recipe) -> PreTrainedTokenizerBase:
    """The recipe's tokenizer: the base's own, one by name, or one trained on the training split.

    Of a new model whose tokens are hidden it gets a mask token; a pretrained base knows its own tokens only.
    """
    tokenizer = _make_tokenizer(recipe)
    return with_mask_token(tokenizer) if recipe.kind.hides_tokens and "base" not in recipe.model else tokenizer


def _make_tokenizer(recipe: Recipe) -> PreTrainedTokenizerBase:
    data = recipe.data
    if data.tokenizer is None and "base" in recipe.model:
        return load_tokenizer(recipe.model["base"])
    kind = data.tokenizer or "character"
    if kind not in TRAINED_TOKENIZERS:
        return load_tokenizer(kind)
    texts: Iterable[str] = ()
    if kind != "byte":
        documents = load_documents(split=data.train_split, **_source(recipe))
        if data.streaming:
            texts = (row["text"] for row in islice(documents, STREAM_DOCUMENTS))
        else:
            texts = documents["text"]
            if not any(texts):
                raise ValueError(
                    f"{data.name} is empty: there is no text to make a {kind!r} tokenizer from, or to train on."
                )
    return load_tokenizer(None, texts, kind=kind, vocab_size=data.vocab_size)


def load_data(recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> tuple[Any, Any]:
    """Training and held-out rows of a recipe."""
    data = recipe.data
    shuffling = {"shuffle_buffer": data.shuffle_buffer, "seed": recipe.training_arguments().seed}
    train = _load_rows(recipe, tokenizer, data.train_split, max_samples=data.max_samples, **shuffling)
    return train, load_held_out(recipe, tokenizer)


def load_held_out(recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> Any:
    """Held-out rows of a recipe."""
    return _load_rows(recipe, tokenizer, recipe.data.test_split, max_samples=recipe.data.max_test_samples)


def _load_rows(recipe: Recipe, tokenizer: PreTrainedTokenizerBase, split: str, **settings: Any) -> Any:
    data, source = recipe.data, _source(recipe)
    try:
        return load_text_dataset(
            source.pop("name"),
            split,
            tokenizer=tokenizer,
            block_length=data.block_length,
            packing=data.packing,
            num_proc=data.num_proc,
            disable_progress=recipe.training_arguments().disable_tqdm,
            **source,
            **settings,
        )
    except TooShortError as error:
        raise ValueError(_too_short(recipe, tokenizer, split, error)) from error


def _too_short(recipe: Recipe, tokenizer: PreTrainedTokenizerBase, split: str, error: TooShortError) -> str:
    """Which part of a recipe's text is shorter than a row, and what to set."""
    data, whole = recipe.data, None if recipe.data.streaming else _whole_text(recipe)
    held_out = split == data.test_split != data.train_split
    part = (
        f"the {'held-out' if held_out else 'training'} part of {data.name} (split {split!r}) has {error.tokens} tokens"
    )
    ways = ["more text", f"a data.block_length of at most {error.tokens}"] if error.tokens > 1 else ["more text"]
    if whole is not None:
        total = sum(map(len, Encode(tokenizer)({"text": whole}, list(range(len(whole))))["input_ids"]))
        part += f", the whole text {total} (data.test_fraction={data.test_fraction} is held out)"
        if total >= (2 if held_out else 1) * data.block_length:
            ways += [f"a {'larger' if held_out else 'smaller'} data.test_fraction"]
    advice = f"{', '.join(ways[:-1])} or {ways[-1]}" if len(ways) > 1 else ways[0]
    return f"{part}: fewer tokens than one row of data.block_length={data.block_length}. Give {advice}."


def _whole_text(recipe: Recipe) -> list[str] | None:
    """The documents of a text that is parted by ``data.test_fraction``; None if it has a split of held-out text."""
    whole = _source(recipe) | {"test_fraction": 0}
    try:
        load_documents(split="test", **whole)
    except ValueError:  # nothing is held out at 0
        return list(load_documents(split="train", **whole)["text"])
    return None


def planned_vocabulary(recipe: Recipe) -> int | None:
    """The vocabulary's size without loading more than a plan needs; None if the recipe's model or base has its own."""
    data, mask = recipe.data, int(recipe.kind.hides_tokens)
    if "base" in recipe.model or "vocab_size" in recipe.model:
        return None
    if data.tokenizer == "byte":
        return BYTES + mask
    if data.tokenizer == "bpe":
        return data.vocab_size + mask
    if data.tokenizer in (None, "character") and data.name is None:
        return BYTES + mask
    return tokenizer_size(make_tokenizer(recipe))


def build_trainer(
    recipe: Recipe,
    train: Any,
    held_out: Any | None,
    tokenizer: PreTrainedTokenizerBase,
    *,
    blocks: list[int] | None = None,
    lower: str | None = None,
    callbacks: list[Any] | None = None,
) -> DiffusionBlocksTrainer:
    """The trainer of a language model's recipe; see ``building.make_trainer``."""

    def prepare(model: BlockedForCausalLM) -> None:
        if lower is not None and blocks:
            _take_lower_blocks(model, lower, min(blocks), tokenizer)

    def load_teacher(args: DiffusionBlocksTrainingArguments) -> Any:
        if args.distillation_weight <= 0 and args.hidden_weight <= 0:
            return None
        if "base" not in recipe.model:
            raise ValueError(
                "training.distillation_weight and training.hidden_weight need model.base, the pretrained network to "
                "learn from."
            )
        return AutoModelForCausalLM.from_pretrained(recipe.model["base"])

    made: dict[str, Any] = {
        "prepare": prepare,
        "load_teacher": load_teacher,
        "blocks": blocks,
        "lower": lower,
        "callbacks": callbacks,
    }
    return make_trainer(recipe, train, held_out, tokenizer=tokenizer, **made)


def _take_lower_blocks(
    model: BlockedForCausalLM, directory: str, count: int, tokenizer: PreTrainedTokenizerBase
) -> None:
    """Load the shared parts and the first so many blocks from a saved model of the same tokens."""
    if any(Path(directory).glob("tokenizer*")):  # a trainer's own save_model() leaves none
        theirs, ours = tokenizer_fingerprint(load_tokenizer(directory)), tokenizer_fingerprint(tokenizer)
        if theirs != ours:
            raise ValueError(
                f"the blocks in {directory} were trained with another tokenizer (fingerprint {theirs}, here {ours}): "
                "the same ids are other text to them. Use the same data and tokenizer for all blocks of a cascade, or "
                f"set data.tokenizer={directory}."
            )
    take_lower_blocks(model, directory, count)


def save_tokenizer(tokenizer: PreTrainedTokenizerBase, directory: Path) -> None:
    """Save a tokenizer beside a model, each file written beside its final name and renamed.

    Raises:
        ValueError: for one of special tokens alone, which transformers makes where there are no files of a tokenizer.
    """
    if len(tokenizer) <= len(tokenizer.all_special_ids):
        raise ValueError("its files are not there")
    with tempfile.TemporaryDirectory(prefix=".tokenizer.", dir=directory) as temporary:
        tokenizer.save_pretrained(temporary)
        for path in Path(temporary).iterdir():
            os.replace(path, directory / path.name)


def load_model(model_dir: str, block_streaming: str | None = None) -> tuple[Any, PreTrainedTokenizerBase]:
    """A saved blocked language model and its tokenizer.

    Args:
        model_dir: directory or Hub id.
        block_streaming: ``host`` or ``disk``: keep one block on the device, the others there.

    Raises:
        ValueError: if one of them cannot be loaded, or they do not fit each other.
    """
    tokenizer = load_tokenizer(model_dir)
    with loading(block_streaming):
        kind = FAMILIES[family_of(model_dir)]
        model = (kind.model_class if kind.has_text else BlockedForCausalLM).from_pretrained(model_dir)
    check_tokenizer(tokenizer, model.config.vocab_size)
    return model.to(pick_device()).eval(), tokenizer

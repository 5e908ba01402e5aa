"""End-to-end baselines of a recipe: the same trainer and data, one block that holds every layer.

With B = 1 a blocked model is an ordinary denoiser, or language model, whose layers are trained together, so the
baselines run through the same code as the blocks (arXiv 2506.14202, section 4.2).

``end_to_end``
    L layers.
``shallow``
    L / B layers (rounded up), what a user with the memory of one block would train otherwise; or ``recipe.layers`` of
    them: a cascade with an auxiliary layer holds L / B + 1.

With ``match="updates"`` both get the K updates of each block, with ``match="compute"`` as many as cost what the blocks
cost. For images an update of each of B blocks costs one of L layers, so ``end_to_end`` keeps K and ``shallow`` gets
B K. A blocked language model costs more than that: auxiliary layers, a head per block, lower blocks' forward passes, a
second stream. There the FLOPs are counted (``training_flops``), and both baselines get
K times the blocks' FLOPs over their own. Warm-up and schedule stretch with the updates.
"""

import copy
from typing import Any

from ..compute import training_flops
from ..recipes import Recipe, make_recipe

_STRETCHED = ("max_steps", "num_train_epochs", "warmup_steps")
# A baseline is one ordinary model: nothing below it, every parameter trained.
_OF_THE_WALK = ("mode", "steps", "grid", "bridge")  # of ``sampling``: an ordinary language model is decoded from f
_OF_BLOCKS = ("blocks", "order", "hand_over", "lower_outputs", "train_shared", "block_order", "hidden_weight")


def baseline_recipe(
    recipe: Recipe,
    method: str,
    match: str = "updates",
    vocab_size: int | None = None,
    num_rows: int | None = None,
) -> Recipe:
    """The recipe of a baseline, from the recipe of the blocked run.

    Args:
        recipe: a blocked run.
        method: ``end_to_end`` or ``shallow``.
        match: ``updates`` or ``compute``.
        vocab_size: of a language model whose tokenizer decides it; its head is part of what training costs.
        num_rows: of the training data, which lower_outputs=disk runs through once per block; without it they count as
            recomputed.

    Raises:
        ValueError: for an unknown method, or a recipe that converts a pretrained base, which has no shallow version.
    """
    values = copy.deepcopy(recipe.to_dict())
    plain = recipe.kind.plain
    if "base" in values["model"] and (method == "shallow" or plain is None):
        whole = "train the base itself end to end; "
        if plain is not None:
            whole = "method=end_to_end fine-tunes all of it at once, "
        raise ValueError(
            f"recipe {recipe.name!r} converts a pretrained base: {whole}a shallow baseline needs a recipe that defines "
            "the model by its config."
        )
    config = recipe.config(vocab_size)
    num_layers, num_blocks = config.num_layers, config.num_blocks
    values["method"], values["match"] = method, match
    if plain is not None:
        kept = {k: v for k, v in values["blocks"].items() if k in recipe.kind.kept}
        values["blocks"] = {**kept, "num_blocks": 1, **plain}
        values["training"] = {k: v for k, v in values["training"].items() if k not in _OF_BLOCKS}
        if not recipe.kind.hides_tokens:  # a masked model's steps are its own
            values["sampling"] = {k: v for k, v in values["sampling"].items() if k not in _OF_THE_WALK}
    else:
        dropped = ("edges", "layers_per_block", "partition")
        values["blocks"] = {k: v for k, v in values["blocks"].items() if k not in dropped} | {"num_blocks": 1}
    if method == "shallow":
        layers = recipe.layers or -(-num_layers // num_blocks)
        if layers > num_layers:
            raise ValueError(f"layers={layers} is more than the {num_layers} layers of the model: give fewer.")
        values["model"][recipe.kind.layers_key] = layers
        for name in ("layer_types", "no_rope_layers"):
            if values["model"].get(name):
                values["model"][name] = values["model"][name][:layers]
    baseline = make_recipe(values)
    if match == "compute":
        factor = compute_factor(recipe, baseline, vocab_size, num_rows)
        if factor != 1:
            training = values["training"]
            for name in _STRETCHED:
                if training.get(name, 0) > 0:
                    stretched = training[name] * factor
                    training[name] = stretched if name == "num_train_epochs" else round(stretched)
            training.setdefault("num_train_epochs", factor * 1.0)
            baseline = make_recipe(values)
    return baseline


def compute_factor(
    recipe: Recipe, baseline: Recipe, vocab_size: int | None = None, num_rows: int | None = None
) -> float:
    """How many updates of a baseline cost what one update of every block costs; see ``baseline_recipe``."""
    if not recipe.kind.counts_compute:
        return recipe.config().num_blocks if baseline.method == "shallow" else 1
    args = recipe.training_arguments()
    tokens: dict[str, Any] = {"tokens": recipe.data.block_length} if recipe.kind.has_text else {}
    lower = args.lower_outputs
    passes: float | None = args.num_train_epochs
    if args.max_steps > 0:
        per_update = args.per_device_train_batch_size * args.gradient_accumulation_steps
        passes = args.max_steps * per_update / num_rows if num_rows else None
    blocked = training_flops(
        recipe.config(vocab_size), lower_outputs=lower if passes else "recompute", passes=passes, **tokens
    )
    return blocked.flops / training_flops(baseline.config(vocab_size), **tokens).flops


def resolve_method(recipe: Recipe, vocab_size: int | None = None, num_rows: int | None = None) -> Recipe:
    """The recipe that really runs: itself if blocked, otherwise its baseline."""
    if recipe.method == "blocked":
        return recipe
    return baseline_recipe(recipe, recipe.method, recipe.match, vocab_size, num_rows)

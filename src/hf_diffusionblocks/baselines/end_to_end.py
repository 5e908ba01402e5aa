"""End-to-end baselines of a recipe: the same trainer and data, one block that holds every layer.

With B = 1 a blocked model is an ordinary EDM denoiser whose layers are trained together, so the baselines run through
the same code as the blocks (arXiv 2506.14202, section 4.2).

``end_to_end``
    L layers, K updates: the compute of B blocks with K updates each.
``shallow``
    L / B layers (rounded up), what a user with the memory of one block would train otherwise: K updates
    (``match="updates"``), or B times as many, the same memory and the same compute as the blocks
    (``match="compute"``). Warm-up and schedule stretch with the updates.
"""

import copy

from ..recipes import Recipe, make_recipe


def baseline_recipe(recipe: Recipe, method: str, match: str = "updates") -> Recipe:
    """The recipe of a baseline, from the recipe of the blocked run.

    Args:
        recipe: a blocked run.
        method: ``end_to_end`` or ``shallow``.
        match: ``updates`` or ``compute``; concerns ``shallow``.

    Raises:
        ValueError: for an unknown method, or a recipe that converts a pretrained base, which has no shallow version.
    """
    values = copy.deepcopy(recipe.to_dict())
    if "base" in values["model"]:
        raise ValueError(
            f"recipe {recipe.name!r} converts a pretrained base: train the base itself as its end-to-end baseline. "
            "A shallow baseline needs a recipe that defines the model by its config."
        )
    num_layers, num_blocks = recipe.config().num_layers, recipe.config().num_blocks
    values["method"], values["match"] = method, match
    values["blocks"] = {
        k: v for k, v in values["blocks"].items() if k not in ("edges", "layers_per_block", "partition")
    } | {"num_blocks": 1}
    if method == "shallow":
        values["model"]["num_layers"] = -(-num_layers // num_blocks)
        if match == "compute":
            for name in ("max_steps", "num_train_epochs", "warmup_steps"):
                if values["training"].get(name, 0) > 0:
                    values["training"][name] *= num_blocks
            values["training"].setdefault("num_train_epochs", num_blocks * 1.0)
    return make_recipe(values)


def resolve_method(recipe: Recipe) -> Recipe:
    """The recipe that really runs: itself if blocked, otherwise its baseline."""
    return recipe if recipe.method == "blocked" else baseline_recipe(recipe, recipe.method, recipe.match)

"""Whether blocks pay: what ``diffusionblocks plan`` says about a user's own case.

A user with little memory can train blocks of the large model, or a smaller model that needs the same memory, for as
long as the blocks would take. The smaller one wins until it saturates. How far along it is, is measured by the tokens
that it would read per parameter of its layers.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..compute import TrainingCompute
from ..families.causal_lm_config import BlockedCausalLMConfig
from ..families.recurrent_config import BlockedRecurrentConfig
from .planning import compute_values

# Where the small model stops to win, and where it has certainly stopped: tokens read per parameter of its layers, at
# equal memory and compute. From docs/experiments.md (the crossing of the curves "blocked" and "end to end, small");
# between the two, it was not measured or depends on the text.
SMALL_MODEL_WINS_BELOW = 400
BLOCKS_WIN_ABOVE = 1700


@dataclass(frozen=True)
class SmallModel:
    """The model that a user with the memory of one block would train otherwise.

    Attributes:
        layers: as many as the block that holds most: its own and its auxiliary ones.
        parameters: of these layers, without embeddings and head.
        updates: how many of its updates cost what one update of every block costs.
        tokens: that it reads in a whole run of that cost; None if the length of the run is not known.
    """

    layers: int
    parameters: int
    updates: float
    tokens: float | None

    @property
    def tokens_per_parameter(self) -> float | None:
        """Tokens read per parameter of its layers."""
        return None if self.tokens is None else self.tokens / self.parameters


def small_model(
    layer_parameters: int, cost: TrainingCompute, small_cost: TrainingCompute, layers: int, tokens: float | None
) -> SmallModel:
    """The small model of a plan.

    Args:
        layer_parameters: of one layer.
        cost: of the blocks.
        small_cost: of the small model.
        layers: of the small model.
        tokens: that each block reads in the whole run.
    """
    updates = cost.flops / small_cost.flops
    return SmallModel(layers, layers * layer_parameters, updates, None if tokens is None else tokens * updates)


def advice(config: BlockedCausalLMConfig, cost: TrainingCompute, small: SmallModel) -> str:
    """One paragraph on whether blocks pay here."""
    count = config.num_blocks
    if isinstance(config, BlockedRecurrentConfig):
        if not config.two_stream:
            return "Does denoising pay here? This is the unrolled core; see the plan with method=blocked."
        counted = f"{config.mean_recurrences + 1} recurrences on average, the gradient through the last "
        return (
            f"Does denoising pay here? An update runs the core once and costs {cost.ratio:.2f} updates of the unrolled "
            f"core ({counted}{config.backprop_depth}; --method end_to_end), so for that compute it gets "
            f"{1 / cost.ratio:.1f} times the updates. For the same compute an ordinary decoder of {small.layers} "
            f"layers (family causal_lm) gets {small.updates:.2f} times the denoiser's: compare with it."
        )
    if config.pretrained:
        return (
            f"Do blocks pay here? The base is pretrained and cannot be made smaller, so the choice is between training "
            f"all of it at once, adapters (LoRA), and blocks. One of {count} blocks needs the memory above; an update "
            f"of every block costs {cost.ratio:.2f} updates of the whole model. Where the whole model fits in memory, "
            "train it whole."
        )
    if count == 1:
        return "Do blocks pay here? There is one block: this is end-to-end training."
    head = (
        f"Do blocks pay here? In the memory of one block, a model of {small.layers} layers can be trained end to end, "
        f"and for the compute of the blocks it gets {small.updates:.2f} times their updates."
    )
    if small.tokens is None or small.tokens_per_parameter is None:
        return (
            f"{head} Whether it saturates depends on how long that is: set training.max_steps to see. Below "
            f"{SMALL_MODEL_WINS_BELOW} tokens per parameter of its layers the small model won our comparisons, above "
            f"{BLOCKS_WIN_ABOVE} the blocks did. Where all {config.num_layers} layers fit in memory, train them whole."
        )
    per = small.tokens_per_parameter
    head += f" It would read {small.tokens:.3g} tokens, {per:.3g} per parameter of its layers."
    if per < SMALL_MODEL_WINS_BELOW:
        verdict = (
            f"It is then far from saturated (the limit we measured: {SMALL_MODEL_WINS_BELOW}), and most likely better "
            "than the blocks: train it instead (--method shallow --match compute), or train much longer."
        )
    elif per > BLOCKS_WIN_ABOVE:
        verdict = (
            f"It is then saturated (the limit we measured: {BLOCKS_WIN_ABOVE}): more layers, trained as blocks, are "
            "most likely better."
        )
    else:
        verdict = (
            f"Between {SMALL_MODEL_WINS_BELOW} and {BLOCKS_WIN_ABOVE} our comparisons do not tell which is better: "
            "train both for a while (--method shallow --match compute) and look."
        )
    return f"{head} {verdict} Where all {config.num_layers} layers fit in memory, train them whole."


def advice_values(cost: TrainingCompute, small: SmallModel) -> Mapping[str, Any]:
    """The figures behind ``advice``, JSON-ready."""
    return {
        **compute_values(cost),
        "small_model_layers": small.layers,
        "small_model_updates_per_update_of_every_block": small.updates,
        "small_model_tokens_per_parameter": small.tokens_per_parameter,
    }

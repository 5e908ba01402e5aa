"""The sentences of a model card, by family and settings."""

from transformers import CONFIG_MAPPING

from ..families.categorical_config import CategoricalConfig
from ..families.masked_lm_config import BlockedMaskedLMConfig
from ..families.recurrent_config import BlockedRecurrentConfig
from ..modeling import BlockedPreTrainedModel
from ..repository import register_task

# Target, input and name of a family of categorical targets.
_TARGETS = {
    "blocked_causal_lm": ("next token", "clean tokens", "language model"),
    "blocked_image_classification": ("label", "image", "classifier"),
}


_STYLE = {"language model": "-style "}


def architecture(config: CategoricalConfig | BlockedMaskedLMConfig) -> str:
    """The name of a base's architecture as transformers spells it: ``Llama`` of ``llama``, ``ViT`` of ``vit``."""
    kind = config.base_config["model_type"]
    return CONFIG_MAPPING[kind].__name__.removesuffix("Config") if kind in CONFIG_MAPPING else kind


def with_article(words: str) -> str:
    """``A`` or ``An`` before words that begin a sentence."""
    return f"{'An' if words[0] in 'AEIOUaeio' else 'A'} {words}"


def uses_noise(model: BlockedPreTrainedModel) -> bool:
    """Whether noise levels matter for use: not in training or predicting with a clean readout."""
    return not isinstance(model.config, CategoricalConfig) or model.config.two_stream


def description(model: BlockedPreTrainedModel, base_model: str | None) -> str:
    """What the model is and how its blocks were trained."""
    config, count = model.config, model.partition.num_blocks
    link = "([arXiv 2506.14202](https://arxiv.org/abs/2506.14202))"
    source = f"(DiffusionBlocks, {link[1:]}"
    blocks = f"{count} blocks" if count > 1 else "one block"
    if isinstance(config, BlockedMaskedLMConfig):
        made = base_model or with_article(f"{architecture(config)}-style network")
        return (
            f"{made} that reads both sides, cut into {blocks} and trained block by block by masked diffusion {source}. "
            "Each block knows rows of its own range of mask rates, block 0 those with most tokens hidden; sampling "
            "reveals tokens step by step and runs one block per step."
        )
    if not isinstance(config, CategoricalConfig):
        return (
            f"A {type(model).__name__} cut into {blocks} and trained block by block with denoising score matching "
            f"{source}. Each block is a denoiser for its own range of noise levels; sampling runs one block per step."
        )
    kind = architecture(config)
    target, inputs, name = _TARGETS.get(config.model_type, _TARGETS["blocked_causal_lm"])
    made = base_model or f"A pretrained {kind} model"
    if not config.pretrained:
        made = with_article(kind + _STYLE.get(name, " ") + name)
    if isinstance(config, BlockedRecurrentConfig):
        parts = f"{len(config.prelude)} prelude, {len(config.core)} core and {len(config.coda)} coda layers"
        how = (
            "as one denoiser for all noise levels, in one pass at a random one"
            if config.two_stream
            else f"unrolled, {config.mean_recurrences + 1} recurrences on average, with the gradient through the last "
            f"{config.backprop_depth}"
        )
        return (
            f"{made} of recurrent depth ({parts}), its core trained {how}, with the library for DiffusionBlocks {link}."
        )
    if count == 1:
        return f"{made} in one block, trained end to end with the library for DiffusionBlocks {link}."
    how = f"trained block by block with the cross-entropy of the {target}"
    context = (
        "Each block reads what the blocks below it give, without a gradient; the last one's head gives the logits."
        if config.context == "cascade"
        else f"Each block reads the {inputs} through its own layers only and is a {name} by itself."
    )
    noise = (
        f" Each block denoises the {target}'s embedding in its own range of noise levels."
        if config.two_stream
        else " No block needs noise, neither to be trained nor to predict."
    )
    auxiliary = ""
    if extra := config.auxiliary_layers_of(0):
        stands, are = ("one auxiliary layer stands", "is") if extra == 1 else (f"{extra} auxiliary layers stand", "are")
        auxiliary = f" In training, {stands} between a block and its loss, and {are} not used afterwards."
    return f"{made} cut into {blocks}, {how} {source}. {context}{auxiliary}{noise}"


# Of each family: what a model is good for, and what it cannot do.
_USES = {
    "blocked_dit": (
        "For drawing images of the kind it was trained on, and for research on training block by block. It draws "
        "what its data hold, errors and biases included, was not checked for memorised images, and knows no other "
        "classes or prompts than those it was trained with."
    ),
    "blocked_causal_lm": (
        "For continuing text of the kind it was trained on, and for research on training block by block. It was not "
        "tuned to follow instructions or to be safe; what it writes may be false or offensive, so check it before "
        "use."
    ),
    "blocked_recurrent": (
        "For continuing text of the kind it was trained on, and for research on recurrent depth: how many "
        "recurrences suit a task is to be tried. It was not tuned to follow instructions or to be safe; what it "
        "writes may be false or offensive, so check it before use."
    ),
    "blocked_masked_lm": (
        "For filling gaps in text of the kind it was trained on, writing whole rows of it, and research on training "
        "block by block. It writes rows of at most the length it was trained on and was not tuned to be safe; what "
        "it writes may be false or offensive, so check it before use."
    ),
    "blocked_image_classification": (
        "For sorting images of the kind it was trained on into its own classes, and for research on training block "
        "by block. Every image gets one of these classes, images of something else too, and its probabilities hold "
        "for data like the held-out ones only."
    ),
}


def register_card(model_type: str, like: str) -> None:
    """Describe models of a family of your own, and name their task on the Hub, as those of another ``model_type``."""
    register_task(model_type, like)
    if like in _TARGETS:
        _TARGETS[model_type] = _TARGETS[like]
    if like in _USES:
        _USES[model_type] = _USES[like]


def intended_use(model: BlockedPreTrainedModel) -> str:
    """Two sentences on what a model of its family is for, and on its limits; none of a family that says nothing."""
    return _USES.get(model.config.model_type, "")


def settings(model: BlockedPreTrainedModel) -> str:
    """Edges, partition and what else decides which block works when."""
    config = model.config
    edges = ", ".join(f"{edge:.6g}" for edge in model.partition.edges)
    if isinstance(config, BlockedMaskedLMConfig):
        told = "are told" if config.time_conditioning else "are not told"
        return (
            f"Edges (mask rates, descending): {edges}. Partition: {config.partition}, overlap {config.overlap}. "
            f"Schedule: {config.schedule}. The layers {told} the mask rate. Mask token: {config.mask_token_id}."
        )
    if not uses_noise(model):
        return f"Readout: {config.readout}. Context: {config.context}."
    text = f"Edges (noise levels, descending): {edges}. Partition: {config.partition}, overlap {config.overlap}, "
    text += f"preconditioning {config.preconditioning}."
    if isinstance(config, CategoricalConfig):
        text += f" Readout: {config.readout}. Context: {config.context}."
    return text

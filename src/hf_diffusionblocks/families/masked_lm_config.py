"""Config of blocked masked diffusion language models."""

from typing import Any

from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

from ..masking import SCHEDULES, MaskNoise, MaskSchedule, make_schedule
from ..partition import BlockPartition
from ..suggest import unknown_name
from .base_config import TransformersBaseConfig, check_noise_embedding_dim, fields_of
from .language_config import LanguageConfigMixin, complete_language_config

# Ways to cut the mask rate: equal shares, or edges by hand. Its logarithm has no lower end.
PARTITIONS = ("equal_probability", "explicit")
MEND = "Encoders built like BERT, RoBERTa and ModernBERT can be cut, and decoders like Llama, made bidirectional."
_ADD_A_TOKEN = (
    "Name the id of the token that hides others: in Python from_base(..., mask_token_id=4), on the command line "
    "`diffusionblocks convert ... mask_token_id=4`, in a recipe blocks.mask_token_id=4. It may be any token that the "
    "text does not use. A vocabulary without one gets it in Python by "
    "tokenizer.add_special_tokens({'mask_token': '<mask>'}) and, for a pretrained base, "
    "base.resize_token_embeddings(len(tokenizer)); save both in one directory, whose "
    "tokenizer then says which it is."
)


class BlockedMaskedLMConfig(LanguageConfigMixin, TransformersBaseConfig):
    """Config of ``BlockedForMaskedLM``: ``DiffusionBlocksConfig`` and

    Its noise level is the mask rate ``m = 1 - alpha``, in [0, 1]; ``edges`` and ``overlap`` are in units of m, and
    ``noise``, ``preconditioning``, ``sigma_data`` and ``noise_scale`` have no meaning.

    Args:
        base_config: the config of a transformers encoder with a masked-language-model head, or of a decoder like
            Llama's, as a dict with its ``model_type``.
        mask_token_id: id of the token that hides others.
        schedule: alpha(t), ``linear`` or ``cosine``: how training draws mask rates within a block's range, and the
            steps of sampling. Does not move the edges.
        time_conditioning: whether the layers are told the mask rate. Off by default: given which tokens are hidden, the
            posterior of those tokens does not depend on the rate that hid them, and the input shows that rate.
        noise_embedding_dim: width of the mask rate's embedding, with ``time_conditioning``.
        pretrained: whether the blocks hold a trained base's weights.

    Raises:
        ValueError: for a value that is not allowed, or a vocabulary without a mask token.

    Example:
        >>> base = {"model_type": "bert", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 6,
        ...         "num_attention_heads": 4, "vocab_size": 100}
        >>> config = BlockedMaskedLMConfig(base_config=base, num_blocks=3, mask_token_id=4)
        >>> tuple(round(edge, 4) for edge in config.edges)
        (1.0, 0.6667, 0.3333, 0.0)
    """

    model_type = "blocked_masked_lm"

    overlap: float = 0.1
    mask_token_id: int | None = None
    schedule: str = "linear"
    time_conditioning: bool = False
    noise_embedding_dim: int = 24
    pretrained: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        check_mask_token(self.mask_token_id, self.vocab_size)

    def _make_partition(self) -> BlockPartition:
        if self.schedule not in SCHEDULES:
            raise ValueError(unknown_name("schedule", self.schedule, SCHEDULES))
        if self.partition not in PARTITIONS:
            raise ValueError(unknown_name("partition of a masked language model", self.partition, PARTITIONS))
        if self.preconditioning != "edm":
            raise ValueError(f"preconditioning={self.preconditioning!r} has no meaning where tokens are masked.")
        if self.noise:
            raise ValueError(f"noise={self.noise} has no meaning where tokens are masked: cut the mask rate by edges.")
        check_noise_embedding_dim(self.noise_embedding_dim)
        shape: dict[str, Any] = {
            "noise": MaskNoise(),
            "overlap": self.overlap,
            "layers_per_block": self.layers_per_block,
        }
        if self.edges is None:
            if self.partition == "explicit":
                raise ValueError("partition='explicit' needs edges: B + 1 mask rates from 1 down to 0.")
            return BlockPartition.equal_probability(self.num_blocks, self.num_layers, **shape)
        if len(self.edges) != self.num_blocks + 1:
            raise ValueError(
                f"edges={self.edges} has {len(self.edges)} values for num_blocks={self.num_blocks}: B blocks need "
                "B + 1 edges."
            )
        return BlockPartition.explicit(self.edges, self.num_layers, **shape)

    def complete_base_config(self, base_config: dict) -> dict:
        full = complete_language_config(base_config, MEND)
        if full.get("is_decoder"):
            raise ValueError(
                "base_config has is_decoder=True, whose tokens see earlier ones only: masked diffusion needs both "
                "sides. Set is_decoder=False."
            )
        return full

    def make_schedule(self) -> MaskSchedule:
        """alpha(t)."""
        return make_schedule(self.schedule)

    @property
    def max_position_embeddings(self) -> int:
        """The longest sequence, in tokens. RoBERTa's table has rows before its first position that no token uses."""
        rows = int(self.base_config.get("max_position_embeddings") or 2**31)
        return rows - self.first_position

    @property
    def first_position(self) -> int:
        """Position of the first token: 0, but in models like RoBERTa, which count from the padding's id plus 1."""
        counted = self.base_config["model_type"] in _POSITIONS_AFTER_PADDING
        return int(self.base_config.get("pad_token_id") or 0) + 1 if counted else 0

    @property
    def tied_head(self) -> bool:
        """Whether the head's matrix is the token embedding."""
        return bool(self.base_config.get("tie_word_embeddings", True))

    @property
    def is_encoder(self) -> bool:
        """Whether the base is one of transformers' masked language models; otherwise a decoder, made bidirectional."""
        return self.base_config["model_type"] in MODEL_FOR_MASKED_LM_MAPPING_NAMES


_POSITIONS_AFTER_PADDING = (
    "roberta",
    "xlm-roberta",
    "xlm-roberta-xl",
    "camembert",
    "roberta-prelayernorm",
    "data2vec-text",
)


def check_mask_token(mask_token_id: int | None, vocab_size: int) -> None:
    """Raise a ``ValueError`` for a vocabulary without a mask token, or an id outside of it."""
    if mask_token_id is None:
        raise ValueError(f"the vocabulary has no mask token (mask_token_id=None). {_ADD_A_TOKEN}")
    if isinstance(mask_token_id, bool) or not isinstance(mask_token_id, int) or not 0 <= mask_token_id < vocab_size:
        raise ValueError(
            f"mask_token_id={mask_token_id!r} is none of the vocabulary's {vocab_size} tokens, 0 to {vocab_size - 1}. "
            f"{_ADD_A_TOKEN}"
        )


def config_fields() -> frozenset[str]:
    """Settings of a blocked masked language model besides its base and number of blocks."""
    return fields_of(BlockedMaskedLMConfig)

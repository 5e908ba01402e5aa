"""What blocked models of tokens have in common: one table of token embeddings, which all blocks share."""

from torch import Tensor, nn
from transformers.cache_utils import Cache

from ..mixins import MixinBase
from ..modeling import BlockedPreTrainedModel
from .causal_lm_checks import check_tokens


class TokenTableMixin(MixinBase):
    """Of a ``BlockedPreTrainedModel`` of tokens: the embeddings, their number, and checks of batches."""

    embed_tokens: nn.Embedding

    def make_shared(self) -> None:
        self.embed_tokens = nn.Embedding(self.config.vocab_size, self.config.hidden_size)

    def get_input_embeddings(self) -> nn.Embedding:
        return self.embed_tokens

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        self.embed_tokens = value

    def resize_token_embeddings(
        self, new_num_tokens: int | None = None, pad_to_multiple_of: int | None = None, mean_resizing: bool = True
    ) -> nn.Embedding:
        """As in transformers, for the embeddings and every block's head; new tokens get the mean of a head's bias.

        Args:
            new_num_tokens: size of the vocabulary.
            pad_to_multiple_of: round the size up.
            mean_resizing: draw new rows around the mean of the old ones.

        Raises:
            ValueError: if not all blocks are loaded.
        """
        if new_num_tokens is not None or pad_to_multiple_of is not None:
            resize_vocabulary(self, new_num_tokens, pad_to_multiple_of, mean_resizing)
        return self.embed_tokens

    def check_tokens(
        self,
        input_ids: Tensor | None,
        attention_mask: Tensor | None = None,
        cache: Cache | None = None,
        **given: Tensor | None,
    ) -> None:
        """Raise a ``ValueError`` for tokens, or ``given`` embeddings, positions and labels, that do not fit."""
        check_tokens(self.config, input_ids, attention_mask, cache, **given)

    def check_batch(self, batch: dict[str, Tensor]) -> None:
        """Raise a ``ValueError`` for a training batch that does not fit the model."""
        if "input_ids" not in batch:
            raise ValueError(
                f"a batch holds {sorted(batch)}; the trainer needs 'input_ids'. Load it with load_text_dataset."
            )
        also = {name: batch.get(name) for name in ("position_ids", "labels")}
        self.check_tokens(batch["input_ids"], batch.get("attention_mask"), **also)


def resize_vocabulary(
    model: BlockedPreTrainedModel, tokens: int | None, pad_to_multiple_of: int | None, mean_resizing: bool
) -> None:
    """Give the embeddings and all heads another number of rows; see ``resize_token_embeddings``."""
    missing = sorted(set(range(model.partition.num_blocks)) - set(model.resident_blocks))
    if missing:
        raise ValueError(
            f"blocks {missing} are not loaded, and their heads would keep {model.config.vocab_size} tokens: load all "
            "blocks to resize the vocabulary."
        )
    old = model.embed_tokens
    new = model._get_resized_embeddings(old, tokens, pad_to_multiple_of, mean_resizing)
    model.embed_tokens = new.requires_grad_(old.weight.requires_grad)
    size = new.weight.shape[0]
    for b in model.resident_blocks:
        module, head = model.block(b), model.block(b).lm_head
        if head is not None:
            resized = model._get_resized_lm_head(head, size, mean_resizing=mean_resizing)
            module.lm_head = resized.requires_grad_(head.weight.requires_grad)
        bias = getattr(module, "head_bias", None)
        if bias is not None:
            new = bias.new_full((size,), float(bias.detach().mean()))
            kept = min(size, len(bias))
            new[:kept] = bias.detach()[:kept]
            module.head_bias = nn.Parameter(new, requires_grad=bias.requires_grad)
    model.config.base_config = model.config.base_config | {"vocab_size": size}

"""transformers' stop strings, for tokenizers that do not know the letters a to f."""

from typing import Any

from transformers import PreTrainedTokenizerBase
from transformers.generation import StopStringCriteria

_LETTERS = "abcdef"


class StopStrings(StopStringCriteria):
    """``StopStringCriteria``, which finds out how tokens are joined by a text that the tokenizer reads as it is.

    transformers takes "abcdef", which a tokenizer by character that was trained on text in another alphabet, or on
    little text, cannot read.
    """

    @staticmethod
    def clean_tokenizer_vocab(
        tokenizer: PreTrainedTokenizerBase, static_prefix: str = _LETTERS, **settings: Any
    ) -> Any:
        return StopStringCriteria.clean_tokenizer_vocab(tokenizer, _readable(tokenizer, static_prefix), **settings)


def _readable(tokenizer: PreTrainedTokenizerBase, wanted: str) -> str:
    """The wanted text if the tokenizer gives it back, else the first six characters that it does."""

    def kept(text: str) -> bool:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        return tokenizer.convert_tokens_to_string(tokenizer.convert_ids_to_tokens(ids)) == text

    if kept(wanted):
        return wanted
    single = (token for token in tokenizer.get_vocab() if len(token) == 1 and not token.isspace())
    text = "".join([token for token, _ in zip((t for t in single if kept(t)), range(6), strict=False)])
    return text if text and kept(text) else wanted

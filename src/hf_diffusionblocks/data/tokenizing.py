"""Tokenizers trained on the spot: byte-level BPE, bytes, or the characters of a text.

All three are ordinary fast tokenizers of transformers: ``save_pretrained`` beside the model, ``AutoTokenizer`` reads
them back.
"""

import hashlib
import json
import os
from collections.abc import Iterable
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from ..suggest import unknown_name

TOKENIZER_KINDS = ("bpe", "byte", "character")
END_OF_TEXT = "<|endoftext|>"
UNKNOWN = "<|unknown|>"
MASK = "<|mask|>"
_BYTE_TOKENS = 257  # every byte, and the end of text


def train_tokenizer(
    texts: Iterable[str] | str = (), kind: str = "bpe", vocab_size: int = 1024
) -> PreTrainedTokenizerFast:
    """Train a tokenizer. Token 0 is ``<|endoftext|>``: end, beginning and padding.

    Args:
        texts: the documents of the training split; ``"byte"`` needs none.
        kind: ``"bpe"``, byte-level byte-pair encoding as GPT-2's; ``"byte"``, the 256 bytes; ``"character"``, the
            characters that occur, every other one being read as ``<|unknown|>``. ``"bpe"`` and ``"byte"`` lose nothing:
            ``decode(encode(x)) == x`` for every text.
        vocab_size: number of tokens for ``"bpe"``, at least 257; fewer come out of a text too short for so many. The
            other kinds have as many as they need.

    Raises:
        ValueError: for an unknown kind, a vocabulary smaller than the bytes, or texts without a character.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    if kind not in TOKENIZER_KINDS:
        raise ValueError(unknown_name("tokenizer kind", kind, TOKENIZER_KINDS))
    texts = [texts] if isinstance(texts, str) else texts
    special = {"eos_token": END_OF_TEXT, "bos_token": END_OF_TEXT, "pad_token": END_OF_TEXT}
    if kind == "character":
        characters: set[str] = set()
        for text in texts:
            characters.update(text)
        _require_text(bool(characters), kind)
        vocabulary = {token: i for i, token in enumerate((END_OF_TEXT, UNKNOWN, *sorted(characters)))}
        # Without merges and without words, every character is a token.
        tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token=UNKNOWN, fuse_unk=False))
        tokenizer.decoder = decoders.Fuse()
        special["unk_token"] = UNKNOWN
    else:
        if kind == "bpe" and vocab_size < _BYTE_TOKENS:
            raise ValueError(
                f"vocab_size={vocab_size} is too small for 'bpe', which starts from the {_BYTE_TOKENS - 1} bytes and "
                f"{END_OF_TEXT}: give at least {_BYTE_TOKENS}, or kind='byte' or 'character'."
            )
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size if kind == "bpe" else _BYTE_TOKENS,
            special_tokens=[END_OF_TEXT],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        seen = _Counted(texts if kind == "bpe" else ())
        tokenizer.train_from_iterator(seen, trainer)
        _require_text(kind == "byte" or seen.characters > 0, kind)
    # On the left, as batches of prompts need it: what is generated follows the last token. Training rows have none.
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, clean_up_tokenization_spaces=False, padding_side="left", **special
    )


def load_tokenizer(
    name_or_path: Any = None,
    texts: Iterable[str] | str = (),
    *,
    kind: str = "bpe",
    vocab_size: int = 1024,
    **from_pretrained_kwargs: Any,
) -> PreTrainedTokenizerBase:
    """A tokenizer by name or path, or one trained on the spot.

    Args:
        name_or_path: of ``AutoTokenizer.from_pretrained``; None trains one; a tokenizer is returned as it is.
        texts: to train on. Give the training split only, ``load_documents(..., split="train")["text"]``: a
            vocabulary fitted to held-out text flatters the model.
        kind: see ``train_tokenizer``.
        vocab_size: see ``train_tokenizer``.
        **from_pretrained_kwargs: such as ``revision``, ``token``.

    Raises:
        ValueError: if there is no such tokenizer, or it cannot be trained.
    """
    if isinstance(name_or_path, PreTrainedTokenizerBase):
        return name_or_path
    if name_or_path is None:
        return train_tokenizer(texts, kind, vocab_size)
    try:
        return AutoTokenizer.from_pretrained(os.path.expanduser(name_or_path), **from_pretrained_kwargs)
    except (OSError, ValueError, KeyError) as error:
        reason = " ".join(str(error).split()).rstrip(".") or type(error).__name__
        raise ValueError(
            f"no tokenizer can be loaded from {str(name_or_path)!r}: {reason}. Give a directory with tokenizer.json or "
            "the name of a model on the Hub, or None to train one on the text."
        ) from error


def with_mask_token(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """The tokenizer, with the new token ``<|mask|>`` if it has no mask token yet."""
    if tokenizer.mask_token_id is None:
        tokenizer.add_special_tokens({"mask_token": MASK})
    return tokenizer


def tokenizer_size(tokenizer: PreTrainedTokenizerBase) -> int:
    """Largest token id plus 1: the smallest vocabulary of a model that reads this tokenizer's ids."""
    return max(tokenizer.get_vocab().values()) + 1


def check_tokenizer(tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> None:
    """Check that a model's vocabulary holds every id of a tokenizer. A model may have more, as padded ones do.

    Raises:
        ValueError: naming both sizes.
    """
    size = tokenizer_size(tokenizer)
    if size > vocab_size:
        raise ValueError(
            f"the tokenizer has ids up to {size - 1} ({size} tokens), the model's vocabulary {vocab_size} tokens, 0 to "
            f"{vocab_size - 1}. Use the tokenizer that the model was made with, or make the model with "
            f"vocab_size={size} (a pretrained one: resize_token_embeddings({size})) before training."
        )


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """First 16 hex digits of a SHA-256 of what decides the ids; the same before and after the tokenizer is used."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        state: list | dict = [type(tokenizer).__name__, sorted(tokenizer.get_vocab().items())]
    else:
        # A call leaves its truncation and padding in the tokenizer: they are not part of it.
        state = {k: v for k, v in json.loads(backend.to_str()).items() if k not in ("truncation", "padding")}
    content = json.dumps([state, tokenizer.eos_token_id], sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()[:16]


class _Counted:
    """Texts one by one, their characters counted on the way."""

    def __init__(self, texts: Iterable[str]):
        self.texts, self.characters = texts, 0

    def __iter__(self):
        for text in self.texts:
            self.characters += len(text)
            yield text


def _require_text(found: bool, kind: str) -> None:
    if not found:
        raise ValueError(f"a {kind!r} tokenizer needs text to be trained on, and there is none: give the documents.")

"""Tokenizers trained on the spot: nothing is lost, saved and loaded alike, and each error."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from hf_diffusionblocks.data import load_documents
from hf_diffusionblocks.data.tokenizing import (
    END_OF_TEXT,
    UNKNOWN,
    check_tokenizer,
    load_tokenizer,
    tokenizer_fingerprint,
    tokenizer_size,
    train_tokenizer,
)

KINDS = ("bpe", "byte", "character")
SAMPLE = "def f(x):\n\treturn  x ** 2 — naïve ☃\r\n\n    # done "
# Text with what tokenizers trip over: surrogate pairs, combining marks, control characters, runs of blanks.
TEXTS = st.text() | st.text(alphabet=" \n\tab.'é\u0301\U0001f600\x00").map(lambda text: text * 3)


@pytest.fixture(scope="module")
def texts() -> list[str]:
    return list(load_documents("pydoc", "train")["text"])


@pytest.fixture(scope="module")
def tokenizers(texts) -> dict[str, PreTrainedTokenizerFast]:
    return {kind: train_tokenizer(texts, kind, 512) for kind in KINDS}


@pytest.mark.parametrize("kind", ["bpe", "byte"])
@given(text=TEXTS)
def test_any_text_comes_back_from_its_ids(tokenizers, kind, text):
    tokenizer = tokenizers[kind]
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_byte_tokenizer_needs_no_training_and_has_one_token_per_byte(tokenizers):
    tokenizer = train_tokenizer(kind="byte")
    assert len(tokenizer) == 257
    assert len(tokenizer.encode(SAMPLE)) == len(SAMPLE.encode())
    assert tokenizer.encode(SAMPLE) == tokenizers["byte"].encode(SAMPLE)


def test_bpe_shortens_the_text_it_was_trained_on(tokenizers, texts):
    bpe, byte = (len(tokenizers[kind].encode(texts[0], verbose=False)) for kind in ("bpe", "byte"))
    assert len(tokenizers["bpe"]) == 512
    assert bpe < 0.6 * byte


def test_character_tokenizer_has_one_token_per_character(tokenizers, texts):
    tokenizer, text = tokenizers["character"], texts[3]
    ids = tokenizer.encode(text)
    assert len(ids) == len(text) and tokenizer.decode(ids) == text
    assert len(tokenizer) == 2 + len(set("".join(texts)))


def test_character_that_did_not_occur_is_unknown(tokenizers):
    tokenizer = tokenizers["character"]
    ids = tokenizer.encode("a☃☃b")
    assert ids[1:3] == [tokenizer.unk_token_id] * 2 and tokenizer.decode(ids) == f"a{UNKNOWN}{UNKNOWN}b"


@pytest.mark.parametrize("kind", KINDS)
def test_token_0_ends_begins_and_pads(tokenizers, kind):
    tokenizer = tokenizers[kind]
    assert tokenizer.eos_token == tokenizer.bos_token == tokenizer.pad_token == END_OF_TEXT
    assert tokenizer.eos_token_id == 0
    assert tokenizer.decode([0], skip_special_tokens=True) == ""


@pytest.mark.parametrize("kind", KINDS)
def test_saved_tokenizer_is_read_by_transformers(tokenizers, kind, tmp_path):
    tokenizers[kind].save_pretrained(tmp_path)
    for loaded in (AutoTokenizer.from_pretrained(tmp_path), load_tokenizer(tmp_path)):
        assert loaded.encode(SAMPLE) == tokenizers[kind].encode(SAMPLE)
        assert loaded.decode(loaded.encode(SAMPLE)) == tokenizers[kind].decode(tokenizers[kind].encode(SAMPLE))
        assert (loaded.eos_token_id, loaded.pad_token_id) == (0, 0)
        assert tokenizer_fingerprint(loaded) == tokenizer_fingerprint(tokenizers[kind])


def test_training_again_gives_the_same_tokenizer(tokenizers, texts):
    assert tokenizer_fingerprint(load_tokenizer(None, iter(texts), vocab_size=512)) == tokenizer_fingerprint(
        tokenizers["bpe"]
    )


def test_fingerprint_knows_the_tokenizer_and_not_its_use(tokenizers, texts):
    tokenizer = train_tokenizer(texts[:5], "bpe", 300)
    before = tokenizer_fingerprint(tokenizer)
    tokenizer(["a b", "a"], padding=True, truncation=True, max_length=2)
    assert tokenizer_fingerprint(tokenizer) == before
    assert len({before, *map(tokenizer_fingerprint, tokenizers.values())}) == 4


def test_given_tokenizer_is_returned_as_it_is(tokenizers):
    assert load_tokenizer(tokenizers["byte"]) is tokenizers["byte"]


def test_one_text_is_one_document_and_not_a_list_of_characters():
    text = "the cat sat on the mat " * 20
    assert len(train_tokenizer(text, "bpe", 270)) == len(train_tokenizer([text], "bpe", 270)) > 257


# The model's vocabulary


def test_model_may_have_more_tokens_than_the_tokenizer(tokenizers):
    assert tokenizer_size(tokenizers["byte"]) == 257
    check_tokenizer(tokenizers["byte"], 257)
    check_tokenizer(tokenizers["byte"], 1024)


def test_model_with_fewer_tokens_is_refused(tokenizers):
    with pytest.raises(ValueError, match=r"up to 256 \(257 tokens\), the model's vocabulary 256 .*vocab_size=257"):
        check_tokenizer(tokenizers["byte"], 256)


def test_added_token_counts(texts):
    tokenizer = train_tokenizer(kind="byte")
    tokenizer.add_tokens(["<|user|>"])
    assert tokenizer_size(tokenizer) == 258
    with pytest.raises(ValueError, match="258 tokens"):
        check_tokenizer(tokenizer, 257)


# Errors


def test_unknown_kind():
    with pytest.raises(ValueError, match="did you mean 'byte'"):
        train_tokenizer("text", kind="bytes")


def test_vocabulary_smaller_than_the_bytes():
    with pytest.raises(ValueError, match="vocab_size=256 is too small .* at least 257"):
        train_tokenizer("text", vocab_size=256)


@pytest.mark.parametrize("kind", ["bpe", "character"])
@pytest.mark.parametrize("texts", [[], [""], ""])
def test_training_on_no_text(kind, texts):
    with pytest.raises(ValueError, match=f"{kind!r} tokenizer needs text"):
        load_tokenizer(None, texts, kind=kind)


@pytest.mark.parametrize("made", [False, True])
def test_directory_without_a_tokenizer(tmp_path, made):
    path = tmp_path / "model"
    if made:
        path.mkdir()
        (path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="no tokenizer can be loaded from .*model"):
        load_tokenizer(path)

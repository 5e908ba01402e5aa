"""Text as rows of tokens: every source, exact packing, splits that share nothing, the cache, and each error."""

import re
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hf_diffusionblocks.data import TextDataset, load_documents, load_text_dataset, text_rows
from hf_diffusionblocks.data.text_sources import read_text
from hf_diffusionblocks.data.tokenizing import load_tokenizer, train_tokenizer
from hf_diffusionblocks.training.data_stream import fetch

END = 0  # <|endoftext|> of every tokenizer trained here
BYTES = train_tokenizer(kind="byte")


@pytest.fixture(scope="module")
def bpe():
    return load_tokenizer(None, load_documents("pydoc", "train")["text"])


@pytest.fixture(scope="module")
def austen() -> str:
    path = Path(__file__).resolve().parents[2] / "shared" / "data" / "text" / "austen.txt"
    if not path.is_file():
        pytest.skip(f"no real text: {path} is missing")
    return str(path)


def dataset(texts: list[str], column: str = "text") -> datasets.Dataset:
    return datasets.Dataset.from_dict({column: texts})


def load(source, block_length=8, tokenizer=BYTES, test_fraction=0.0, **kwargs) -> TextDataset:
    """Every document of a source, one token per byte."""
    return load_text_dataset(
        source, tokenizer=tokenizer, block_length=block_length, test_fraction=test_fraction, **kwargs
    )


def texts_of(rows: TextDataset, tokenizer=BYTES) -> list[str]:
    """The documents that rows hold, as text; the last one as far as they hold it."""
    ids, texts, current = rows[:]["input_ids"].flatten().tolist(), [], []
    for i in [*ids, END]:
        if i == END:
            texts.append(tokenizer.decode(current))
        current = [] if i == END else [*current, i]
    return texts


def packed(texts: list[str], length: int) -> tuple[list[list[int]], list[list[int]]]:
    """Token ids and positions of rows, one token after the other: slow, and plain to see."""
    ids, positions = [], []
    texts = [text for text in texts if text]
    for number, text in enumerate(texts):
        document = BYTES.encode(text) + [END] * (number < len(texts) - 1)
        for place, i in enumerate(document):
            new = place == 0 or len(ids) % length == 0
            positions.append(0 if new else positions[-1] + 1)
            ids.append(i)
    rows = range(0, len(ids) - length + 1, length)
    return [ids[r : r + length] for r in rows], [positions[r : r + length] for r in rows]


# Packing


def test_documents_are_joined_by_the_end_of_text_and_cut_into_rows():
    rows = load(dataset(["abc", "defgh", "i"]), 4)
    a = {c: BYTES.encode(c)[0] for c in "abcdefgh"}
    assert rows[:]["input_ids"].tolist() == [
        [a["a"], a["b"], a["c"], END],
        [a["d"], a["e"], a["f"], a["g"]],
    ]  # h, END, i are dropped: not a full row
    assert list(rows[0]) == ["input_ids"]


def test_positions_restart_with_each_document_and_each_row():
    rows = load(dataset(["abc", "defgh", "i", "jk"]), 4, packing="documents")
    assert rows[:]["position_ids"].tolist() == [[0, 1, 2, 3], [0, 1, 2, 3], [0, 1, 0, 1]]
    assert rows.packing == "documents"


@given(texts=st.lists(st.text(alphabet="abé\n", max_size=12), min_size=1, max_size=12), length=st.integers(2, 9))
def test_packing_is_that_of_one_token_after_the_other(texts, length):
    ids, positions = packed(texts, length)
    if not ids:
        with pytest.raises(ValueError, match="fewer than one row"):
            load(dataset(texts), length, packing="documents", disable_progress=True)
        return
    rows = load(dataset(texts), length, packing="documents", disable_progress=True)
    assert rows[:]["input_ids"].tolist() == ids
    assert rows[:]["position_ids"].tolist() == positions


@pytest.mark.parametrize("packing", ["concatenate", "documents"])
def test_documents_come_back_from_the_rows(bpe, packing):
    topics = load_documents("pydoc", "train")["text"]
    rows = load_text_dataset(tokenizer=bpe, block_length=48, packing=packing)
    found = texts_of(rows, bpe)
    assert found[:-1] == topics[: len(found) - 1] and len(found) == len(topics)
    assert topics[-1].startswith(found[-1]) and len(topics[-1]) - len(found[-1]) < 48 * 20


def test_tokenizer_without_an_end_of_text_joins_directly():
    tokenizer = train_tokenizer(kind="byte")
    tokenizer.eos_token = None
    rows = load(dataset(["abc", "de"]), 5, tokenizer, packing="documents")
    assert tokenizer.decode(rows[0]["input_ids"]) == "abcde"
    assert rows[0]["position_ids"].tolist() == [0, 1, 2, 0, 1]


def test_tokenizers_own_special_tokens_are_not_added():
    from tokenizers.processors import TemplateProcessing

    tokenizer = train_tokenizer(kind="byte")
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|endoftext|> $A <|endoftext|>", special_tokens=[("<|endoftext|>", 0)]
    )
    assert tokenizer.encode("a")[0] == END
    assert load(dataset(["ab", "cd"]), 5, tokenizer)[0]["input_ids"].tolist().count(END) == 1


def test_long_documents_are_tokenised_in_pieces_without_a_seam(bpe, monkeypatch):
    text = " ".join(load_documents("pydoc", "train")["text"])[:60_000]
    whole = bpe.encode(text, verbose=False)
    calls = []
    monkeypatch.setattr(text_rows, "PIECE_LENGTH", 1000)
    monkeypatch.setattr(text_rows, "_PIECES_LENGTH", 10_000)
    encode = text_rows.Encode._encode
    monkeypatch.setattr(text_rows.Encode, "_encode", lambda *args: (calls.append(len(args[1])), encode(*args)))
    result = text_rows.Encode(bpe)({"text": ["short", text]}, [0, 1])
    assert result["input_ids"][1].tolist() == whole and result["input_ids"][0].tolist() == bpe.encode("short")
    assert len(calls) > 5 and sum(calls) > 60


# Rows


def test_every_kind_of_index():
    rows = load(dataset(["abcdefgh" * 5]), 4, packing="documents")
    whole = rows[:]["input_ids"]
    assert whole.shape == (10, 4) and whole.dtype == torch.int64 and rows[3]["position_ids"].shape == (4,)
    assert torch.equal(rows[3]["input_ids"], whole[3]) and torch.equal(rows[-1]["input_ids"], whole[9])
    for index in ([4, 1, 1], torch.tensor([4, 1, 1]), np.array([4, 1, 1])):
        assert torch.equal(rows[index]["input_ids"], whole[[4, 1, 1]])
    assert torch.equal(rows[2:8:3]["input_ids"], whole[2:8:3])
    assert torch.equal(fetch(rows, [9, 0])["input_ids"], whole[[9, 0]])
    rows[0:1]["input_ids"].zero_()
    assert torch.equal(rows[:]["input_ids"], whole)


def test_tokens_are_held_in_two_bytes_where_ids_allow():
    ids = np.array([[0, 65_535]])
    assert TextDataset(ids, tokenizer_size=65_536, num_characters=2).tokens.dtype == np.uint16
    wide = TextDataset(ids + 1, tokenizer_size=65_537, num_characters=2)
    assert wide.tokens.dtype == np.int32 and wide[0]["input_ids"].tolist() == [1, 65_536]


def test_characters_of_the_held_text_are_counted(bpe):
    rows = load_text_dataset(tokenizer=bpe, block_length=64)
    for held in (rows, load_text_dataset(tokenizer=bpe, block_length=64, max_samples=100)):
        exact = sum(map(len, texts_of(held, bpe)))
        assert held.num_characters == pytest.approx(exact, rel=0.01)
        assert held.num_tokens == 64 * len(held)
        assert held.characters_per_token == held.num_characters / held.num_tokens
    assert rows.num_characters == pytest.approx(sum(map(len, texts_of(rows, bpe))), rel=1e-4)


def test_characters_are_exact_where_rows_end_with_the_text():
    assert load(dataset(["naïve", "☃☃"]), 13).num_characters == 7  # 6 bytes, END, 6 bytes


def test_max_samples_keeps_the_first_rows():
    rows = load(dataset(["abcdefgh" * 5]), 4)
    assert torch.equal(load(dataset(["abcdefgh" * 5]), 4, max_samples=3)[:]["input_ids"], rows[:3]["input_ids"])
    assert len(load(dataset(["abcdefgh" * 5]), 4, max_samples=99)) == 10


def test_fingerprint_is_of_the_content(bpe):
    first = load_text_dataset(tokenizer=bpe, block_length=64)
    assert load_text_dataset(tokenizer=bpe, block_length=64).fingerprint == first.fingerprint
    settings = {"block_length": 32}, {"packing": "documents"}, {"max_samples": 9}, {"tokenizer": BYTES}
    others = [load_text_dataset(**({"tokenizer": bpe, "block_length": 64} | s)).fingerprint for s in settings]
    others.append(load_text_dataset(split="test", tokenizer=bpe, block_length=64).fingerprint)
    assert len({first.fingerprint, *others}) == 6


# The cache


def no_more_tokenising(monkeypatch):
    def fail(*args):
        raise AssertionError("the cache was not used")

    monkeypatch.setattr(text_rows.Encode, "__call__", fail)


def test_text_is_tokenised_once(bpe, monkeypatch, tmp_path):
    (tmp_path / "a.txt").write_text("cached text " * 50)
    before = load(tmp_path / "a.txt", 16, bpe)
    no_more_tokenising(monkeypatch)
    assert load(tmp_path / "a.txt", 16, bpe).fingerprint == before.fingerprint
    assert load(tmp_path / "a.txt", 8, bpe, packing="documents").block_length == 8
    with pytest.raises(AssertionError):
        load(tmp_path / "a.txt", 16, BYTES)
    (tmp_path / "a.txt").write_text("other text " * 50)
    with pytest.raises(AssertionError):
        load(tmp_path / "a.txt", 16, bpe)


def test_two_processes_give_the_same_rows(bpe):
    topics = load_documents("pydoc", "train")["text"]
    one, two = load(dataset(topics[:9]), 32, bpe), load(dataset(topics[:9] + [""]), 32, bpe, num_proc=2)
    assert one.fingerprint == two.fingerprint


def test_novels_are_parted_without_overlap(austen, bpe):
    text = read_text(austen)
    train, test = (load_documents(austen, split)["text"][0] for split in ("train", "test"))
    assert train + test == text and len(test) == pytest.approx(0.05 * len(text), abs=1)
    held = load_text_dataset(austen, "test", tokenizer=bpe, block_length=128)
    assert test.startswith(texts_of(held, bpe)[0])
    assert held.num_characters == pytest.approx(len(test), rel=0.005)


# Errors


def error(match: str, *args, **kwargs) -> None:
    with pytest.raises(ValueError, match=match):
        load_text_dataset(*args, **{"tokenizer": BYTES, "block_length": 8} | kwargs)


@pytest.mark.parametrize("streaming", [False, True])
def test_too_little_text(tmp_path, streaming):
    (tmp_path / "a.txt").write_text("abc")
    (tmp_path / "empty.txt").write_text("")
    kwargs = {"test_fraction": 0, "streaming": streaming}
    error("has 3 tokens, fewer than one row of block_length=8.*shorter", str(tmp_path / "a.txt"), **kwargs)
    error("has 0 tokens", str(tmp_path / "empty.txt"), **kwargs)
    error("has no documents", dataset([]), **kwargs)


@pytest.mark.parametrize("length", [1, 0, -3, 2.5])
def test_rows_shorter_than_two_tokens(length):
    error(f"block_length={re.escape(str(length))} must be", block_length=length)


def test_settings_out_of_range():
    error("unknown packing 'document': did you mean 'documents'", packing="document")
    error("max_samples=0 must be", max_samples=0)
    error(r"test_fraction=1.0 must lie in \[0, 1\)", test_fraction=1.0)
    error("shuffle_buffer=5 is for streaming=True", shuffle_buffer=5)


def test_ids_outside_the_tokenizer():
    with pytest.raises(ValueError, match="token ids run from 3 to 257, outside the tokenizer's 257 ids"):
        TextDataset(np.array([[3, 257]]), tokenizer_size=257, num_characters=2)
    with pytest.raises(ValueError, match="run from -1 to 5"):
        TextDataset(np.array([[5, -1]]), tokenizer_size=257, num_characters=2)


def test_rows_that_are_none():
    with pytest.raises(ValueError, match="there are no rows"):
        TextDataset(np.empty((0, 4), int), tokenizer_size=9, num_characters=0)
    with pytest.raises(ValueError, match=r"float64 \[1, 2\]: expected integer ids"):
        TextDataset(np.zeros((1, 2)), tokenizer_size=9, num_characters=2)
    with pytest.raises(ValueError, match=r"starts \[1, 3\] do not fit"):
        TextDataset(np.zeros((1, 2), int), tokenizer_size=9, num_characters=2, starts=np.zeros((1, 3), bool))

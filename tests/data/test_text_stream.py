"""Text read in order: the rows of a data set in memory, from any position on, and never backwards."""

import json
import pickle
from types import SimpleNamespace

import datasets
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from hf_diffusionblocks.data import StreamingTextDataset, load_documents, load_text_dataset, text_rows, text_stream
from hf_diffusionblocks.data.tokenizing import load_tokenizer, train_tokenizer
from hf_diffusionblocks.training.data_stream import fetch

BYTES = train_tokenizer(kind="byte")
PACKINGS = ("concatenate", "documents")


@pytest.fixture(scope="module")
def bpe():
    return load_tokenizer(None, load_documents("pydoc", "train")["text"])


@pytest.fixture(autouse=True)
def small_windows(monkeypatch):
    monkeypatch.setattr(text_stream, "STREAM_WINDOW", 64)


@pytest.fixture
def stream(bpe):
    """Rows of 64 tokens of pydoc's topics, about 1,900."""
    return lambda **kwargs: load_text_dataset(
        **{"tokenizer": bpe, "block_length": 64, "streaming": True, "packing": "documents"} | kwargs
    )


def collect(rows) -> dict[str, torch.Tensor]:
    return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}


def assert_same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


# Rows and their order


@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize("split", ["train", "test"])
def test_rows_are_those_of_the_data_set_in_memory(bpe, packing, split):
    kwargs = {"split": split, "tokenizer": bpe, "block_length": 32, "packing": packing}
    memory, stream = load_text_dataset(**kwargs), load_text_dataset(**kwargs, streaming=True)
    assert_same(collect(list(stream.rows())), memory[:])


@given(
    texts=st.lists(st.text(alphabet="abé\n", max_size=40), min_size=1, max_size=20),
    length=st.integers(2, 9),
    window=st.integers(1, 5),
)
def test_rows_are_those_in_memory_for_every_window(texts, length, window):
    source = datasets.Dataset.from_dict({"text": texts})
    kwargs = {"tokenizer": BYTES, "block_length": length, "packing": "documents", "test_fraction": 0}
    try:
        memory = load_text_dataset(source, **kwargs, disable_progress=True)
    except ValueError as error:
        with pytest.raises(ValueError) as streamed:
            load_text_dataset(source, **kwargs, streaming=True)
        assert str(streamed.value) == str(error)
        return
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(text_stream, "STREAM_WINDOW", window)
        stream = load_text_dataset(source, **kwargs, streaming=True)
    assert_same(collect(list(stream.rows())), memory[:])


def test_held_out_documents_of_a_stream_are_those_in_memory():
    source = datasets.Dataset.from_dict({"text": [f"document number {i}" for i in range(500)]})
    for split in ("train", "test"):
        streamed = load_documents(source.to_iterable_dataset(), split, streaming=True)
        assert [row["text"] for row in streamed] == list(load_documents(source, split)["text"])


def test_shuffling_permutes_rows_within_a_window(stream, bpe):
    memory = load_text_dataset(tokenizer=bpe, block_length=64)[:]["input_ids"]
    shuffled = collect(list(stream(shuffle_buffer=100, packing="concatenate").rows()))["input_ids"]
    assert len(memory) == len(shuffled) and len(memory) % 100
    for start in range(0, len(memory), 100):
        a, b = memory[start : start + 100].tolist(), shuffled[start : start + 100].tolist()
        assert sorted(a) == sorted(b) and a != b


def test_order_is_a_function_of_the_seed(stream):
    first, again, other = (stream(shuffle_buffer=100, seed=seed)[list(range(300))] for seed in (1, 1, 2))
    assert_same(first, again)
    assert not torch.equal(first["input_ids"], other["input_ids"])


def test_positions_go_with_their_rows_when_shuffled(stream, bpe):
    memory = load_text_dataset(tokenizer=bpe, block_length=64, packing="documents")[:100]
    pairs = {tuple(i.tolist()): p.tolist() for i, p in zip(memory["input_ids"], memory["position_ids"], strict=True)}
    shuffled = stream(shuffle_buffer=100)[list(range(100))]
    for ids, positions in zip(shuffled["input_ids"], shuffled["position_ids"], strict=True):
        assert pairs[tuple(ids.tolist())] == positions.tolist()


# Reading as a trainer does


def test_batches_of_growing_indices(stream, bpe):
    rows, memory = stream(max_samples=1000), load_text_dataset(tokenizer=bpe, block_length=64, packing="documents")
    assert len(rows) == 1000
    for start in range(0, 1000, 40):
        indices = list(range(start, start + 40))
        assert_same(fetch(rows, indices), memory[indices])
    assert_same(rows[998], memory[998])
    assert rows[[]]["input_ids"].shape == (0, 64)


def test_slices_need_an_end_or_a_length(stream, bpe):
    memory = load_text_dataset(tokenizer=bpe, block_length=64, packing="documents")
    assert_same(stream()[3:9:2], memory[3:9:2])
    assert_same(stream(max_samples=70)[60:], memory[60:70])
    with pytest.raises(TypeError, match="give max_samples="):
        stream()[3:]


def test_rows_of_the_last_two_windows_are_held(stream):
    rows = stream()
    first = rows[[70, 64, 130]]
    assert_same(rows[[70, 64, 130]], first)


def test_going_back_is_refused(stream):
    rows = stream()
    rows[200]
    with pytest.raises(ValueError, match="row 100 of a stream has been passed: rows from 128 on are held"):
        rows[[100]]
    with pytest.raises(IndexError, match="row -1"):
        rows[-1]


def test_row_zero_starts_anew(stream):
    rows = stream()
    first = rows[[0, 1, 2]]
    rows[500]
    assert_same(rows[[0, 1, 2]], first)
    assert_same(collect(list(rows.rows())), collect(list(stream().rows())))


def test_stream_begins_at_any_position(stream):
    whole = collect(list(stream(shuffle_buffer=50).rows()))
    assert_same(
        collect(list(stream(shuffle_buffer=50).rows(start=777))), {name: value[777:] for name, value in whole.items()}
    )


def test_end_of_the_text(stream, bpe):
    count = len(load_text_dataset(tokenizer=bpe, block_length=64))
    rows = stream(max_samples=10_000)
    assert len(list(rows.rows())) == count
    rows[count - 1]
    with pytest.raises(IndexError, match=f"row {count} is beyond the end of the text: give a smaller max_samples"):
        rows[count]
    limited = stream(max_samples=70)
    assert len(list(limited)) == 70
    with pytest.raises(IndexError, match=r"row 70 is not in \[0, 70\)"):
        limited[70]


def test_stream_without_max_samples_has_no_length(stream):
    with pytest.raises(TypeError, match="give max_samples="):
        len(stream())


def test_one_worker_reads_and_two_are_refused(stream, monkeypatch):
    rows = stream(max_samples=150)
    alone = [batch["input_ids"] for batch in DataLoader(rows, batch_size=50)]
    worker = [batch["input_ids"] for batch in DataLoader(rows, batch_size=50, num_workers=1)]
    assert torch.equal(torch.cat(alone), torch.cat(worker))
    # Real workers that fail keep torch waiting for ten seconds.
    monkeypatch.setattr(text_stream, "get_worker_info", lambda: SimpleNamespace(num_workers=2))
    with pytest.raises(ValueError, match="not by 2 workers"):
        rows[0]


def test_pickled_stream_goes_on(stream):
    rows = stream(shuffle_buffer=50)
    rows[420]
    copy = pickle.loads(pickle.dumps(rows))
    assert_same(collect(list(copy.rows(421))), collect(list(rows.rows(421))))


# Resuming


@pytest.mark.parametrize("source", ["pydoc", "many", "files"])
def test_state_resumes_without_reading_what_came_before(stream, tmp_path, monkeypatch, source):
    texts = list(load_documents("pydoc")["text"])
    if source == "many":  # enough documents for a split by their hash
        source = datasets.Dataset.from_dict({"text": [line for text in texts for line in text.split("\n\n")]})
        source = source.to_iterable_dataset(num_shards=4)
    elif source == "files":
        for i, text in enumerate(texts):
            (tmp_path / f"{i:02d}.txt").write_text(text, encoding="utf-8")
        source = tmp_path
    rows = stream(name=source, shuffle_buffer=50)
    expected = collect(list(rows.rows(1000)))
    rows = stream(name=source, shuffle_buffer=50)
    rows[1030]
    state = json.loads(json.dumps(rows.state_dict()))

    resumed = stream(name=source, shuffle_buffer=50)
    seen, encode = [], text_rows.Encode._encode
    monkeypatch.setattr(
        text_rows.Encode, "_encode", lambda self, pieces, ids: (seen.extend(pieces), encode(self, pieces, ids))
    )
    resumed.load_state_dict(state)
    assert_same(collect(list(resumed.rows(1000))), expected)
    assert 0 < sum(len(text) for _, text in seen) < 0.9 * sum(map(len, texts))


def test_state_of_another_stream_is_refused(stream):
    with pytest.raises(ValueError, match="the state is of another stream"):
        stream().load_state_dict(stream(block_length=32).state_dict())


def test_fingerprint_knows_text_and_settings(stream):
    prints = [stream(**k).fingerprint for k in ({}, {"split": "test"}, {"block_length": 32}, {"max_samples": 9})]
    prints += [stream(**k).fingerprint for k in ({"seed": 1}, {"shuffle_buffer": 9}, {"packing": "concatenate"})]
    assert len(set(prints)) == len(prints)
    assert stream().fingerprint == prints[0]


# Errors


def test_settings_out_of_range(bpe):
    documents = load_documents("pydoc", streaming=True)
    for match, kwargs in (
        ("block_length=1 must be", {"block_length": 1}),
        ("max_samples=-1 must be", {"max_samples": -1}),
        ("unknown packing 'rows'", {"packing": "rows"}),
        ("shuffle_buffer=-2 must not be negative", {"shuffle_buffer": -2}),
    ):
        with pytest.raises(ValueError, match=match):
            StreamingTextDataset(documents, bpe, **({"block_length": 8} | kwargs))

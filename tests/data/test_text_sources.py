"""Where text comes from and what of it is held out: every source, splits that share nothing, and each error."""

import datasets
import pytest

from hf_diffusionblocks.data import load_documents, load_image_dataset, load_text_dataset
from hf_diffusionblocks.data.scripts import script_error
from hf_diffusionblocks.data.text_sources import check_utf8, read_text
from hf_diffusionblocks.data.tokenizing import train_tokenizer

BYTES = train_tokenizer(kind="byte")


def dataset(texts: list, column: str = "text") -> datasets.Dataset:
    return datasets.Dataset.from_dict({column: texts})


# Splits


def test_training_and_held_out_documents_are_disjoint_and_complete():
    source = dataset([f"document {i}" for i in range(2000)])
    train, test = (load_documents(source, split)["text"] for split in ("train", "test"))
    assert sorted([*train, *test]) == sorted(source["text"]) and not set(train) & set(test)
    assert len(test) == pytest.approx(100, abs=4)
    assert list(load_documents(source, "test")["text"]) == list(test)
    larger = load_documents(source, "test", test_fraction=0.2)["text"]
    assert len(larger) == pytest.approx(400, abs=4) and set(test) < set(larger)


@pytest.mark.parametrize("count", [1, 30])
def test_of_a_few_documents_the_last_part_of_each_is_held_out(count):
    source = dataset([f"{i:03d} " + "".join(chr(97 + j % 26) for j in range(996)) for i in range(count)])
    train, test = (load_documents(source, split, test_fraction=0.1)["text"] for split in ("train", "test"))
    assert [a + b for a, b in zip(train, test, strict=True)] == list(source["text"])
    assert {len(text) for text in test} == {100}


def test_held_out_topics_of_pydoc_are_not_in_the_training_text():
    train, test = (" ".join(" ".join(load_documents("pydoc", s)["text"]).split()) for s in ("train", "test"))
    pieces = [test[i : i + 80] for i in range(0, len(test) - 80, 80)]
    assert len(pieces) > 100 and sum(piece in train for piece in pieces) <= 0.01 * len(pieces)


def test_source_with_a_test_split_is_used_as_it_is():
    source = datasets.DatasetDict(train=dataset(["a" * 50]), test=dataset(["b" * 20]))
    assert list(load_documents(source, test_fraction=0.5)["text"]) == ["a" * 50]
    assert list(load_documents(source, "test", test_fraction=0.5)["text"]) == ["b" * 20]


def test_nothing_is_held_out_at_fraction_zero():
    assert list(load_documents(dataset(["abc"]), test_fraction=0)["text"]) == ["abc"]
    with pytest.raises(ValueError, match="holds out nothing"):
        load_documents(dataset(["abc"]), "test", test_fraction=0)


# Sources


@pytest.fixture
def folder(tmp_path):
    for name, text in {"b.txt": "second", "a.txt": "first", "deep/c.txt": "third", "notes.md": "no text"}.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    return tmp_path


def test_files_directories_lists_and_patterns(folder):
    def texts(source):
        return list(load_documents(source, test_fraction=0)["text"])

    assert texts(folder) == texts(str(folder)) == ["first", "second", "third"]
    assert texts(f"{folder}/*.txt") == ["first", "second"]
    assert texts([folder / "b.txt", f"{folder}/deep"]) == ["second", "third"]
    assert texts(folder / "notes.md") == ["no text"]


def test_line_ends_and_byte_order_mark_are_normalised(tmp_path):
    (tmp_path / "a.txt").write_bytes("\ufeffé\r\nb\rc\n".encode())
    assert list(load_documents(tmp_path / "a.txt", test_fraction=0)["text"]) == ["é\nb\nc\n"]


@pytest.mark.parametrize("streaming", [False, True])
def test_everything_that_datasets_reads(tmp_path, streaming):
    texts = ["one", "two", "three"]
    source = dataset(texts, "body")
    source.to_parquet(tmp_path / "a.parquet")
    source.to_json(tmp_path / "a.json")
    source.save_to_disk(tmp_path / "saved")
    (tmp_path / "lines.log").write_text("one\ntwo\nthree\n")
    forms = [
        (source, {}),
        (datasets.DatasetDict(train=source), {}),
        (str(tmp_path / "saved"), {}),
        (str(tmp_path / "a.parquet"), {}),
        ("parquet", {"data_files": str(tmp_path / "a.parquet")}),
        ("json", {"data_files": {"train": str(tmp_path / "a.json")}}),
    ]
    kwargs = {"test_fraction": 0, "streaming": streaming}
    for form, more in forms:
        documents = load_documents(form, text_column="body", **kwargs, **more)
        assert [row["text"] for row in documents] == texts, form
    documents = load_documents("text", data_files=[str(tmp_path / "lines.log")], **kwargs)
    assert [row["text"] for row in documents] == texts


# Errors


def error(match: str, *args, **kwargs) -> None:
    """Loading ends in a ValueError with this message."""
    with pytest.raises(ValueError, match=match):
        load_text_dataset(*args, **{"tokenizer": BYTES, "block_length": 8} | kwargs)


@pytest.mark.parametrize("streaming", [False, True])
def test_text_that_is_not_utf8_names_file_and_byte(tmp_path, streaming):
    (tmp_path / "a.txt").write_bytes(b"caf\xc3\xa9 or caf\xe9")
    place = r"a\.txt is not UTF-8: byte 0xe9 at position 12"
    error(place, str(tmp_path), streaming=streaming)
    error(place, "text", data_files=str(tmp_path / "a.txt"), streaming=streaming)


@pytest.mark.parametrize("bad", [b"\xff", b"\xe2\x98"])
@pytest.mark.parametrize("position", [0, (1 << 20) - 1, 1 << 20, (1 << 20) + 7])
def test_byte_that_is_not_utf8_is_found_in_a_large_file(tmp_path, bad, position):
    (tmp_path / "a.txt").write_bytes(b"a" * position + bad)
    for check in (check_utf8, read_text):
        with pytest.raises(ValueError, match=f"position {position} "):
            check(tmp_path / "a.txt")
    (tmp_path / "a.txt").write_bytes(b"a" * position + "☃é".encode())
    check_utf8(tmp_path / "a.txt")


@pytest.mark.parametrize("streaming", [False, True])
def test_cell_without_text(streaming):
    error("row 1 of the split has None in the text column", dataset(["a" * 50, None]), streaming=streaming)
    error("row 0 of the split has 3 in the text column", dataset([3]), streaming=streaming, test_fraction=0)


def test_missing_column_names_the_nearest():
    error("unknown text column 'text': did you mean 'texts'?.*text_column=", dataset(["a"], "texts"))


def test_unknown_sources(tmp_path):
    error("unknown text data set 'pydocs': did you mean 'pydoc'.*no path", "pydocs")
    error("there is no file .*missing.txt", str(tmp_path / "missing.txt"))
    error("there is no file .*none/", f"{tmp_path}/none/*")
    error("'nothing' is no text file", ["nothing"])
    error("list of text files is empty", [])
    error("a int is no data set", 3)
    error("unknown split 'trian': did you mean 'train'.*Allowed: test, train", split="trian")
    error("config_name: no setting for 'pydoc'", config_name="en")
    error("read with streaming=True", dataset(["a"]).to_iterable_dataset())
    (tmp_path / "a.parquet").write_bytes(b"PAR1 this is not parquet")
    error("a.parquet cannot be read by `datasets`", str(tmp_path / "a.parquet"))


def test_directory_of_text_and_of_tables_is_not_guessed(folder):
    dataset(["a"]).to_parquet(folder / "a.parquet")
    error(r"holds .txt files and .parquet files.*\*\.txt", str(folder))


def test_a_data_set_with_a_loading_script_says_how_to_get_its_rows(tmp_path):
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "old.py").write_text("raise AssertionError('never run')\n")
    message = "old has a loading script, which `datasets` 4 .*found old.py.*data.revision=refs/convert/parquet"
    for streaming in (False, True):
        with pytest.raises(ValueError, match=message):
            load_documents(str(tmp_path / "old"), streaming=streaming)
    with pytest.raises(ValueError, match="has a loading script.*revision='refs/convert/parquet'"):
        load_image_dataset(tmp_path / "old")
    with pytest.raises(RuntimeError, match="something else"):
        script_error("old", RuntimeError("something else"))

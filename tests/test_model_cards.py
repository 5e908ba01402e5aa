"""The cards in model_cards/ are what the library writes, and the Hub's library reads them."""

from pathlib import Path

import pytest
from huggingface_hub import ModelCard

CARDS = sorted((Path(__file__).parents[1] / "model_cards").glob("*.md"))


def test_there_is_the_demos_card():
    assert [path.stem for path in CARDS] == ["digits-dit"]


@pytest.mark.parametrize("path", CARDS, ids=lambda path: path.stem)
def test_a_card_parses_and_has_what_the_library_writes(path):
    card = ModelCard.load(path)
    assert card.data.to_dict()["library_name"] and card.data.tags and card.data.license is None
    text = path.read_text(encoding="utf-8")
    for heading in ("## Blocks", "## How to load", "## Training"):
        assert heading in text
    assert "from_pretrained" in text and "/tmp/" not in text
    (row,) = [line for line in text.splitlines() if line.startswith("all ")]
    assert int(row.split()[1].replace(",", "")) > 0

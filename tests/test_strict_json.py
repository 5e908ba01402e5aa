"""Everything that is written as JSON is JSON: no NaN, no infinity."""

import json
import math

import pytest

from hf_diffusionblocks import cli, serialization
from hf_diffusionblocks.evaluation import format_figures
from hf_diffusionblocks.likelihood.result import Likelihood
from hf_diffusionblocks.metrics import DistinctN
from hf_diffusionblocks.report.run_state import RunReader
from hf_diffusionblocks.strict_json import known, to_json
from hf_diffusionblocks.training.update_log import append_rows


def strictly(text: str):
    """What a reader makes of JSON that knows no NaN."""

    def refuse(name: str):
        raise AssertionError(f"{name} is no JSON")

    return json.loads(text, parse_constant=refuse)


UNKNOWN = {"error": math.nan, "shares": (1.0, math.inf), "deep": [{"x": -math.inf}], "n": 3, "name": "NaN"}
NULLED = {"error": None, "shares": [1.0, None], "deep": [{"x": None}], "n": 3, "name": "NaN"}


def test_unknown_figures_become_null():
    assert strictly(to_json(known(UNKNOWN))) == NULLED


@pytest.mark.parametrize(
    ("value", "place"),
    [
        ({"a": {"b": [0.0, math.nan]}}, r"a\.b\[1\] is nan"),
        ([1.0, math.inf], r"\[1\] is inf"),
        (-math.inf, "the value is -inf"),
    ],
)
def test_what_a_run_goes_on_from_is_refused_by_its_place(value, place, tmp_path):
    with pytest.raises(ValueError, match=place + ": JSON has no NaN and no infinity"):
        serialization.write_json(tmp_path / "state.json", value)
    assert list(tmp_path.iterdir()) == []


def test_an_error_of_another_kind_stays_as_it_is():
    loop: list = []
    loop.append(loop)
    with pytest.raises((ValueError, RecursionError)):
        to_json(loop)


def test_files_of_figures_and_logs_are_strict(tmp_path):
    serialization.write_figures(tmp_path / "figures.json", UNKNOWN)
    assert strictly((tmp_path / "figures.json").read_text()) == NULLED
    append_rows(tmp_path / "evaluations.jsonl", [{"iteration": 2, "eval_loss/block_0": math.nan}])
    assert strictly((tmp_path / "evaluations.jsonl").read_text()) == {"iteration": 2, "eval_loss/block_0": None}
    assert RunReader(tmp_path).read() is not None  # a page of such a run


def test_the_command_line_prints_strict_json(monkeypatch, capsys):
    monkeypatch.setattr("hf_diffusionblocks.cli.commands.run", lambda args: UNKNOWN)
    assert cli.main(["recipes", "--json"]) == 0
    assert strictly(capsys.readouterr().out) == NULLED


def test_figures_of_very_short_texts_and_single_rows_are_json():
    assert strictly(to_json(DistinctN([1, 3]).compute(predictions=["a b"])))["distinct_3"] is None
    one_row = Likelihood(nats_per_token=800.0, standard_error=math.nan, num_tokens=1)
    values = strictly(to_json(one_row.to_dict()))
    assert values["standard_error"] is None and values["perplexity"] is None and values["nats_per_token"] == 800


def test_the_table_says_what_is_not_known():
    assert [line.split()[-2:] for line in format_figures({"a": None, "b": math.nan}).splitlines()] == [
        ["not", "known"]
    ] * 2
    assert "1, not known" in format_figures({"a": [1.0, None]})

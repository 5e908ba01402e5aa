"""The paper's tables as a command: its figures, commands that exist, and ours as the kept results have them."""

import importlib
import json
import re
import shlex
import sys
from pathlib import Path

import pytest

from hf_diffusionblocks import plan_memory
from hf_diffusionblocks.baselines.end_to_end import resolve_method
from hf_diffusionblocks.cli import main, parse
from hf_diffusionblocks.paper_tables import aggregation, find_table, formatting, measured, studies, tables
from hf_diffusionblocks.recipes import load_recipe

ROOT = Path(__file__).parents[1]
ROWS = [
    pytest.param(setting, row, id=f"{table.name}, {setting.name}, {row.label}")
    for table in tables()
    for setting in table.settings
    for row in setting.rows
]


@pytest.fixture
def script(monkeypatch):
    """benchmarks/paper_tables.py, imported as its neighbours do."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    yield lambda name: importlib.import_module(name)
    for path in (ROOT / "benchmarks").glob("*.py"):
        sys.modules.pop(path.stem, None)


def recipe_of(command: str):
    """The recipe that a command of a table trains, with its options."""
    args = parse(shlex.split(command)[1:])
    chosen = [f"method={args.method}"] if args.method else []
    return args, load_recipe(args.recipe, [*args.overrides, *chosen])


def test_the_shipped_figures_are_those_of_the_kept_results(script):
    module = script("paper_tables")
    wanted = module.text(module.build())
    assert json.loads(wanted) == module.build()
    assert module.OUT.read_text(encoding="utf-8") == wanted, "run: python benchmarks/paper_tables.py write"


def test_the_tables_hold_every_experiment_of_the_paper_in_its_order():
    assert [table.name for table in tables()] == [
        "vit", "dit", "md4", "autoregressive", "recurrent", "noprop", "partition", "blocks",
    ]  # fmt: skip
    assert [find_table(str(n)).number for n in range(1, 9)] == list(range(1, 9))
    figures = {
        (table.name, setting.name): [row.figures for row in setting.rows]
        for table in tables()
        for setting in table.settings
    }
    assert figures["vit", "CIFAR-100"] == [(60.25,), (7.85,), (59.30,)]
    assert figures["vit", "Tiny ImageNet"] == [(35.32,), (36.16,)]
    assert figures["dit", "CIFAR-10"] == [(32.84, 39.83), (30.59, 37.20)]
    assert figures["dit", "ImageNet-256"] == [(9.01, 12.09), (9.00, 10.63)]
    assert figures["md4", "text8"] == [(1.56,), (1.45,)]
    assert figures["autoregressive", "LM1B"] == [(0.50, 14.58, 38.87), (0.71, 12.32, 30.99)]
    assert figures["autoregressive", "OpenWebText"] == [(0.85, 15.05, 25.24), (0.82, 14.99, 26.33)]
    assert figures["recurrent", "LM1B"] == [(0.49, 17.04, 46.73), (0.70, 16.08, 42.43)]
    assert figures["noprop", "CIFAR-100"] == [(47.80,), (46.06,), (21.31,), (37.57,), (46.88,)]
    equal = "CIFAR-10, equal shares of the noise distribution"
    assert figures["partition", equal] == [(38.03,), (41.64,), (45.42,), (40.40,)]
    assert figures["partition", "CIFAR-10, uniform"] == [(43.53,), (43.59,), (47.49,), (42.37,)]
    assert figures["blocks", "ImageNet-256"] == [(12.09,), (9.90,), (11.11,), (11.90,), (14.43,)]
    assert figures["blocks", "CIFAR-10"] == [(39.83,), (35.47,), (38.03,), (45.43,), (53.32,)]
    assert figures["blocks", "LM1B"] == [(0.61,), (0.65,), (0.67,), (0.62,)]
    assert len(figures) == 14


@pytest.mark.parametrize("setting, row", ROWS)
def test_every_row_has_a_command_that_would_make_it(script, setting, row):
    assert len(row.figures) == len(setting.columns)
    if setting.recipe is None or row.command.startswith("python "):
        name, command, study, option, arm = re.fullmatch(
            r"python benchmarks/(\w+)\.py (\w+) (\w+) (--only) '(.*)'", row.command
        ).groups()
        module = script(name)
        assert command == "run" and any(arm in known for known in module.arms_of(study))
        return
    args, recipe = recipe_of(row.command)
    assert args.recipe == setting.recipe and (recipe.method == "end_to_end" or recipe.method == "blocked")
    config = resolve_method(recipe).config()
    stated = re.search(r"B=(\d)", f"{row.label} {setting.what}")
    if stated:
        assert config.num_blocks == int(stated[1])
    if row.label.startswith("layers"):
        assert config.layers_per_block == [int(n) for n in row.label.split()[1].split("-")]
        assert config.partition == ("uniform" if setting.name.endswith("uniform") else "equal_probability")
    if "end to end" in row.label:
        assert config.num_blocks == 1


def test_runs_that_differ_go_to_different_directories():
    commands = {row.values[1].command for row in ROWS if row.values[1].command.startswith("diffusionblocks")}
    places = []
    for command in commands:
        args, recipe = recipe_of(command)
        places.append(args.output_dir or f"{args.recipe} {recipe.method}")
    assert len(places) == len(set(places)) > 20, sorted(places)


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[] if name == "text8-md4" else pytest.mark.slow)
        for name in sorted({setting.recipe for table in tables() for setting in table.settings} - {None})
    ],
)
def test_every_recipe_of_the_tables_plans(name):
    plan = plan_memory(load_recipe(name).config(), batch_size=1, alternatives=False, device="cpu")
    assert plan.worst("blocked").total > 0


def test_the_papers_figures_and_ours_never_stand_in_one_table(capsys):
    assert main(["evaluate", "--table", "md4"]) == 0
    said = capsys.readouterr().out
    papers, small = said.split("SMALL SETTINGS")
    assert "1.56" in papers and "1.45" in papers and papers.count("not run") == 2
    assert "diffusionblocks train text8-md4 --method end_to_end" in papers
    row = measured()["studies"]["masked-austen"]["rows"][0]
    assert row["arm"] == "end to end, L" and f"{row['figures'][0][0]:.4f}" in small
    assert "1.56" not in small and "1.45" not in small
    assert "not to be compared" in small and "python benchmarks/masked_quality.py run austen" in small


@pytest.mark.parametrize("table", tables(), ids=lambda table: table.name)
def test_every_table_prints_by_name_and_by_number(table, capsys):
    printed = []
    for value in (table.name, str(table.number)):
        assert main(["evaluate", "--table", value]) == 0
        printed.append(capsys.readouterr().out)
    assert printed[0] == printed[1]
    assert all(row.command in printed[0] for setting in table.settings for row in setting.rows)
    assert all(study.command in printed[0] for study in table.studies)
    assert "numbers of the paper's tables" in printed[0]
    assert main(["evaluate", "--json", "--table", table.name]) == 0
    assert json.loads(capsys.readouterr().out) == formatting.table_values(table.name)


def test_the_list_names_all_tables_and_so_does_no_value(capsys):
    assert main(["evaluate", "--table", "list"]) == 0
    said = capsys.readouterr().out
    assert main(["evaluate", "--table"]) == 0
    assert capsys.readouterr().out == said and all(f"{t.number}  {t.name}" in said for t in tables())
    assert main(["evaluate", "--table", "--json"]) == 0
    assert [table["name"] for table in json.loads(capsys.readouterr().out)] == [table.name for table in tables()]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--table", "vlt"], ["vlt", "'vit'", "1 to 8", "not of the paper"]),
        (["--table", "9"], ["'9'", "1 to 8"]),
        (["--table", "0"], ["'0'"]),
        (["--table", "list2"], ["did you mean 'list'?"]),
        (["--table", "1", "--seed", "0"], ["--table 1", "--seed"]),
        (["runs/digits-dit/model", "--table", "1"], ["--table 1", "leave out the model"]),
        (["--table", "1", "evaluation.rows=1"], ["--table 1", "leave out"]),
        ([], ["name a model", "--table"]),
    ],
)
def test_bad_input_says_how_to_mend_it(arguments, words, capsys):
    assert main(["evaluate", *arguments]) == 2
    said = capsys.readouterr().err
    assert all(word in said for word in words), said


def test_what_is_run_at_a_papers_setting_is_shown_beside_the_paper(monkeypatch, capsys):
    rows = [
        {"table": "md4", "setting": "text8", "label": "end to end", "figures": [f], "seed": s, "machine": "a GPU",
         "date": "2026-12-01"}
        for s, f in enumerate((1.50, 1.60))
    ]  # fmt: skip
    ours = aggregation.measure_paper(rows)
    monkeypatch.setitem(measured(), "paper", ours)
    said = formatting.format_table("md4").split("SMALL")[0]
    assert "1.55 +- 0.05" in said and "a GPU; 2026-12-01, seeds: 2" in said and said.count("not run") == 1
    with pytest.raises(ValueError, match="md4/text8/nothing.*no row"):
        aggregation.measure_paper([rows[0] | {"label": "nothing"}])
    with pytest.raises(ValueError, match="not one per column"):
        aggregation.measure_paper([rows[0] | {"figures": [1.0, 2.0]}])


def test_figures_are_means_and_standard_errors_of_the_arms_of_a_study():
    study = next(study for study in studies() if study.name == "masked-austen")
    common = {"study": "austen", "held_layers": 2, "updates_per_block": 8, "machine": "m", "seed": 0}
    rows = [
        common | {"arm": "blocks", "bits_per_character": 7.0, "date": "2026-01-02"},
        common | {"arm": "blocks", "bits_per_character": 2.0, "date": "2026-01-02"},  # the same seed again
        common | {"arm": "end to end, L", "bits_per_character": 3.0, "date": "2026-01-01"},
        common | {"arm": "blocks", "bits_per_character": 4.0, "date": "2026-01-03", "seed": 1},
        common | {"arm": "blocks", "bits_per_character": 9.0, "date": "2026-01-03", "study": "another"},
    ]
    found = aggregation.measure_study(study, rows)
    assert [(row["arm"], row["seeds"]) for row in found["rows"]] == [("end to end, L", 1), ("blocks", 2)]
    assert found["rows"][1]["figures"][0] == [3.0, 1.0] and found["rows"][0]["figures"][0] == [3.0, None]
    assert found["dates"] == ["2026-01-01", "2026-01-03"] and found["machines"] == ["m"]
    assert aggregation.measure_study(study, rows[4:]) is None


def test_the_arms_that_stand_first_are_among_those_that_were_run():
    for study in studies():
        found = measured()["studies"].get(study.name)
        if found and study.arms:
            assert study.arms[0] == found["rows"][0]["arm"], study.name

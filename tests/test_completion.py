"""What a shell completes: names of recipes, tables and files beside options, asked of a real bash."""

import shutil
import subprocess
import sys

import pytest

from hf_diffusionblocks.cli import build_parser, main
from hf_diffusionblocks.cli.completion import WORDS, completion_script
from hf_diffusionblocks.generation import BRIDGES
from hf_diffusionblocks.masked_generation import ORDERS
from hf_diffusionblocks.paper_tables import tables
from hf_diffusionblocks.recipes import recipe_names, recipe_path
from hf_diffusionblocks.sampling import GRIDS, SOLVERS


@pytest.fixture
def completed(tmp_path):
    """A function: what bash offers at the end of a line, in a directory with files of a user."""
    (tmp_path / "own.yaml").touch()
    (tmp_path / "novel.txt").touch()
    (tmp_path / "owned").mkdir()
    script = tmp_path / "completion.bash"
    script.write_text(completion_script(build_parser(), "bash"))

    def ask(*words: str) -> list[str]:
        line = ["diffusionblocks", *words]
        code = 'source "$0"; COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); _shtab_diffusionblocks; '
        code += 'printf "%s\\n" "${COMPREPLY[@]}"'
        command = ["bash", "--norc", "-c", code, str(script), *line]
        done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=tmp_path)
        assert done.stderr == ""
        return done.stdout.split()

    return ask


def test_bash_completes_names(completed):
    assert sorted(completed("train", "")) == sorted([*recipe_names(), "own.yaml"])
    assert completed("plan", "digits-") == ["digits-dit", "digits-vit"]
    assert completed("train", "--dry-run", "pydoc-m") == ["pydoc-md4"]
    assert completed("encode", "imagenet") == ["imagenet256-dit-l2"]
    assert completed("train", "ow") == ["owned", "own.yaml"]
    assert completed("evaluate", "owned", "--recipe", "digits-d") == ["digits-dit"]
    assert completed("evaluate", "--table", "") == ["list", *(table.name for table in tables())]
    assert completed("recipes", "--path", "") == ["list", *recipe_path("list").split("\n")]
    assert completed("recipes", "--path", "scripts/j") == ["scripts/jobs.sh"]
    assert completed("train", "--data", "nov") == ["novel.txt"] and completed("sample", "o") == ["owned"]
    assert completed("train", "--res") == ["--residency"] and completed("train", "--method", "sh") == ["shallow"]


def test_words_are_those_that_the_library_takes(completed):
    assert WORDS == {"grid": GRIDS, "solver": SOLVERS, "bridge": BRIDGES, "order": ORDERS}
    for name, words in WORDS.items():
        assert completed("sample", "owned", f"--{name}", "") == list(words)


def test_zsh_and_tcsh_have_the_names_too(capsys, tmp_path):
    for shell in ("zsh", "tcsh"):
        assert main(["completion", shell]) == 0
        script = capsys.readouterr().out
        assert " ".join(recipe_names()) in script and " ".join(table.name for table in tables()) in script
        if shell == "zsh":
            assert ":_diffusionblocks_recipe_or_file" in script and "scripts/jobs.sh" in script
        if shutil.which(shell):
            (tmp_path / shell).write_text(script)
            subprocess.run([shell, "-n", str(tmp_path / shell)], check=True)


def test_a_shell_waits_for_no_heavy_import():
    code = "import sys; from hf_diffusionblocks.cli import main; main(['completion', 'bash']); print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "torch" not in done.stdout.splitlines()[-1].split()

"""What is installed: the wheel and sdist hold every data file, each optional package has an extra, and (slow, as
`make check-wheel`) an empty environment trains, samples and scores from the wheel alone."""

import ast
import importlib
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import venv
import zipfile
from pathlib import Path

import pytest

from needed import needed

ROOT = Path(__file__).parents[1]
SRC = ROOT / "src" / "hf_diffusionblocks"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
EXTRAS = PROJECT["optional-dependencies"]
# Imported under another name than it is installed under.
DISTRIBUTIONS = {"PIL": "pillow", "yaml": "pyyaml", "sklearn": "scikit-learn", "mauve": "mauve-text"}
# Required by a dependency of ours for as long as it exists: markupsafe by jinja2, pyarrow by datasets, ...
BROUGHT = {"markupsafe": "jinja2", "pyarrow": "datasets", "tokenizers": "transformers", "packaging": "transformers"}
BROUGHT |= {"httpx": "huggingface_hub", "httpx2": "huggingface_hub", "starlette": "gradio"}
# Imported where it is wanted, by a function that names the extra if it is missing.
OPTIONAL = {"peft": "adapters", "bitsandbytes": "optim", "mauve": "text", "gradio": "demo", "starlette": "demo"}


def built(tmp_path: Path, kind: str) -> Path:
    """The package built from a copy of what is under version control here, so that no file of a build stays behind."""
    tree = tmp_path / "tree"
    ignored = shutil.ignore_patterns(".*", "runs", "build", "dist", "site", "*.egg-info", "__pycache__", "results")
    shutil.copytree(ROOT, tree, ignore=ignored)
    code = f"from setuptools import build_meta; print(build_meta.build_{kind}({str(tmp_path)!r}))"
    done = subprocess.run([sys.executable, "-c", code], cwd=tree, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return tmp_path / done.stdout.strip().splitlines()[-1]


def files_of_the_package() -> set[str]:
    return {
        path.relative_to(SRC.parent).as_posix()
        for path in SRC.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }


def name_of(requirement: str) -> str:
    return re.split(r"[<>=!~;\[ ]", requirement)[0].lower().replace("_", "-")


def test_the_wheel_holds_every_file_of_the_package(tmp_path):
    with zipfile.ZipFile(built(tmp_path, "wheel")) as wheel:
        names = {name for name in wheel.namelist() if ".dist-info/" not in name}
        entry_points = next(n for n in wheel.namelist() if n.endswith("entry_points.txt"))
        assert b"diffusionblocks = hf_diffusionblocks.cli:main" in wheel.read(entry_points)
    assert names == files_of_the_package()  # no test, no build product, and no data file forgotten
    assert {f"hf_diffusionblocks/{f}" for f in ("py.typed", "recipes/digits-dit.yaml")} <= names
    assert {"page.html", "style.css", "watch.js"} <= {Path(n).name for n in names if "/report/templates/" in n}


def test_the_sdist_holds_what_its_own_tests_need(tmp_path):
    with tarfile.open(built(tmp_path, "sdist")) as sdist:
        names = {name.split("/", 1)[-1] for name in sdist.getnames()}
    assert {f"src/{name}" for name in files_of_the_package()} <= names
    tests = {p.relative_to(ROOT).as_posix() for p in (ROOT / "tests").rglob("*.py")}
    assert {*tests, "README.md", "LICENSE", "CHANGELOG.md", "constraints.txt", "docs/design.md"} <= names


def imported_packages() -> set[str]:
    """Every package outside the standard library that a module of ours imports, at its top or later."""
    found = set()
    for path in SRC.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                found |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                found.add(str(node.module).split(".")[0])
    return found - set(sys.stdlib_module_names) - {"hf_diffusionblocks"}


def test_every_import_has_its_requirement():
    required = {name_of(r) for r in PROJECT["dependencies"]}
    for package in imported_packages():
        distribution = BROUGHT.get(package, DISTRIBUTIONS.get(package, package))
        if package in OPTIONAL:
            assert name_of(distribution) in map(name_of, EXTRAS[OPTIONAL[package]]), package
        else:
            assert name_of(distribution) in required, f"{package} is imported, but no requirement brings it"


def test_no_requirement_is_left_over():
    # tensorboard: what accelerate's tracker of that name imports.
    imported = {name_of(DISTRIBUTIONS.get(p, p)) for p in imported_packages()} | {"tensorboard"}
    assert {name_of(r) for r in PROJECT["dependencies"]} - imported == set()


@pytest.mark.parametrize(
    ("module", "function", "package"),
    [
        ("adapters", "_peft", "peft"),
        ("training.optimizers", "_adamw_8bit", "bitsandbytes"),
        ("metrics.mauve", "_load_mauve", "mauve"),
        ("demo.app", "import_gradio", "gradio"),
    ],
)
def test_a_missing_optional_package_is_an_error_that_names_its_extra(module, function, package, monkeypatch):
    for name in [n for n in sys.modules if n.split(".")[0] == package]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)  # `import` then raises ImportError
    load = getattr(importlib.import_module(f"hf_diffusionblocks.{module}"), function)
    with pytest.raises((ValueError, ImportError), match=rf"pip install 'hf-diffusionblocks\[{OPTIONAL[package]}\]'"):
        load()


def test_images_scored_without_inception_name_their_extra(monkeypatch):
    from hf_diffusionblocks.metrics import features

    def missing() -> None:
        raise ModuleNotFoundError("No module named 'torch_fidelity'")

    monkeypatch.setattr(features, "_load_inception", missing)
    with pytest.raises(ImportError, match=r"pip install 'hf-diffusionblocks\[metrics\]'"):
        features.InceptionFeatures()


def test_every_extra_that_an_error_names_exists():
    named = {e for p in SRC.rglob("*.py") for e in re.findall(r"hf[-_]diffusionblocks\[(\w+)\]", p.read_text())}
    assert {"adapters", "demo", "metrics", "optim", "text"} <= named <= set(EXTRAS)


def test_the_version_is_one():
    import hf_diffusionblocks

    assert hf_diffusionblocks.__version__ == PROJECT["version"]


@pytest.mark.slow
@pytest.mark.timeout(3600)  # an empty environment installs torch and all that goes with it
def test_an_empty_environment_runs_the_demo_from_the_wheel(tmp_path):
    unpacked = tmp_path / "from-sdist"
    with tarfile.open(built(tmp_path, "sdist")) as sdist:
        sdist.extractall(unpacked, filter="data")
    (source,) = unpacked.iterdir()
    code = f"from setuptools import build_meta; build_meta.build_wheel({str(tmp_path)!r})"
    subprocess.run([sys.executable, "-c", code], cwd=source, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")

    venv.create(tmp_path / "venv", with_pip=True)
    scripts = tmp_path / "venv" / ("Scripts" if os.name == "nt" else "bin")
    constraints = ["-c", str(ROOT / "constraints.txt")]
    install = [str(scripts / "python"), "-m", "pip", "install", "--disable-pip-version-check", *constraints, str(wheel)]
    subprocess.run(install, check=True, cwd=tmp_path)

    away = tmp_path / "away"  # outside of any checkout
    away.mkdir()
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV")}

    def diffusionblocks(*words: str) -> str:
        command = [str(scripts / "diffusionblocks"), *words]
        done = subprocess.run(command, cwd=away, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    demo(diffusionblocks, away)


def demo(diffusionblocks, away: Path) -> None:
    """Recipes, a short run with its report, samples, a score and the live page's help."""
    assert {p.stem for p in (SRC / "recipes").glob("*.yaml")} <= set(re.findall(r"[\w-]+", diffusionblocks("recipes")))
    script = Path(diffusionblocks("recipes", "--path", "scripts/jobs.sh").strip())
    assert script.is_file() and ROOT not in script.parents
    quick = ["training.max_steps=30", "training.save_steps=30", "evaluation.num_samples=20", "evaluation.num_draws=1"]
    diffusionblocks("train", "digits-dit", *quick, "evaluation.classifier_epochs=1")
    page = (away / "runs" / "digits-dit" / "report.html").read_text(encoding="utf-8")
    assert "<style" in page and "digits-dit" in page  # the templates came along
    diffusionblocks("sample", "runs/digits-dit/model", "--classes", "3", "7", "--steps", "4", "--output-dir", "drawn")
    assert len(list((away / "drawn").glob("*.png"))) >= 1
    quick_scores = [*quick[2:], "evaluation.classifier_epochs=1"]
    scores = diffusionblocks("evaluate", "runs/digits-dit/model", "--recipe", "digits-dit", *quick_scores, "--json")
    assert json.loads(scores)
    assert "127.0.0.1" in diffusionblocks("watch", "--help")


@pytest.mark.parametrize(("ci", "ruff"), [("1", None), ("", True), ("", None)], ids=["CI", "linter", "elsewhere"])
def test_a_tool_that_is_missing_fails_where_the_development_environment_is(ci, ruff, monkeypatch):
    monkeypatch.setenv("CI", ci)
    monkeypatch.setitem(sys.modules, "zensical", None)  # cannot be imported
    monkeypatch.setattr("importlib.util.find_spec", lambda name: ruff if name == "ruff" else None)
    kind = pytest.fail.Exception if ci or ruff else pytest.skip.Exception
    with pytest.raises(kind, match=r"zensical cannot be imported .*pip install -c constraints.txt"):
        needed("zensical")
    assert needed("json").dumps([]) == "[]"


def test_the_extra_dev_has_what_tests_need():
    dev = {re.split(r"[>=\[]", requirement)[0].lower() for requirement in EXTRAS["dev"]}
    asked = {m for p in Path(__file__).parent.rglob("*.py") for m in re.findall(r'needed\("(\w+)', p.read_text())}
    assert {"gradio", "mypy", "playwright"} <= asked
    assert asked - {"json", "gradio_client"} <= dev  # Gradio brings its client

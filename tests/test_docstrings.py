"""Every public name says what it takes, in which shape and unit, what it raises and where it comes from."""

import dataclasses
import inspect
import re
from collections.abc import Callable, Iterator

import pytest
from transformers import PreTrainedConfig

import hf_diffusionblocks

# A source: a paper, a section, an equation; or the interface of a library that it follows.
SOURCE = re.compile(r"arXiv|Eq\. \d|section \d|App\. [A-F]|Table \d|transformers|diffusers|Accelerate|evaluate", re.I)
ARGUMENTS = re.compile(r"^\s*(?:\*{0,2}\w+(?:, \*{0,2}\w+)*)(?: \([^)]*\))?:", re.MULTILINE)
NAMES = sorted(hf_diffusionblocks.__all__)


def named_in(section: str, doc: str) -> set[str]:
    """Names that a section of a docstring describes."""
    found = re.search(rf"^\s*{section}:\n(.*?)(?=^\s*[A-Z]\w+:\n|\Z)", doc, flags=re.MULTILINE | re.DOTALL)
    lines = ARGUMENTS.findall(found.group(1)) if found else []
    return {name.strip().lstrip("*") for line in lines for name in re.sub(r"\(.*?\)|:", "", line).split(",")}


def own_methods(cls: type) -> Iterator[tuple[str, Callable]]:
    """Public methods that this library defines for a class."""
    for name, value in inspect.getmembers(cls):
        value = getattr(value, "__func__", value)
        if name.startswith("_") or not inspect.isfunction(value):
            continue
        if value.__module__.startswith("hf_diffusionblocks") and value.__qualname__.startswith(cls.__name__ + "."):
            yield name, value


def parameters(function: Callable) -> set[str]:
    given = inspect.signature(function).parameters.values()
    return {p.name for p in given if p.name not in ("self", "cls") and p.kind is not p.VAR_KEYWORD}


@pytest.mark.parametrize("name", NAMES)
def test_a_public_name_says_what_it_is_and_where_it_comes_from(name):
    value = getattr(hf_diffusionblocks, name)
    doc = inspect.getdoc(value) or ""
    assert len(doc.splitlines()[0]) > 15, f"{name} has no summary"
    module = inspect.getmodule(value).__doc__ or ""
    assert SOURCE.search(doc + module), f"neither {name} nor its module names a source"


@pytest.mark.parametrize("name", NAMES)
def test_every_argument_is_described(name):
    value = getattr(hf_diffusionblocks, name)
    doc = inspect.getdoc(value) or ""
    if inspect.isfunction(value):
        assert parameters(value) <= named_in("Args", doc), parameters(value) - named_in("Args", doc)
        return
    given = parameters(value.__init__) if "__init__" in vars(value) else set()
    if issubclass(value, PreTrainedConfig):  # transformers' own settings are described there
        ours = [c for c in value.__mro__ if c.__module__.startswith("hf_diffusionblocks")]
        given = {n for c in ours for n in vars(c).get("__annotations__", {}) if n != "model_type"}
    elif dataclasses.is_dataclass(value):  # arguments carry their help with them
        given -= {f.name for f in dataclasses.fields(value) if f.metadata.get("help")}
    given -= {"args", "kwargs"}
    described = (
        named_in("Args", doc) | named_in("Attributes", doc) | named_in("Args", inspect.getdoc(value.__init__) or "")
    )
    inherited = {n for base in value.__mro__[1:] for n in named_in("Args", inspect.getdoc(base) or "")}
    assert given <= described | inherited, given - described - inherited


@pytest.mark.parametrize("name", [n for n in NAMES if inspect.isclass(getattr(hf_diffusionblocks, n))])
def test_public_methods_are_described(name):
    cls = getattr(hf_diffusionblocks, name)
    for method, _ in own_methods(cls):
        doc = inspect.getdoc(getattr(cls, method)) or ""
        assert doc, f"{name}.{method} has no docstring"

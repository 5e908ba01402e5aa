"""Importing the package is cheap, its names are there all the same, and the Auto classes know its models."""

import json
import subprocess
import sys

import pytest

import hf_diffusionblocks
from tiny import tiny_dit

HEAVY = ("torch", "transformers.modeling_utils", "diffusers", "accelerate", "scipy")


def in_a_new_process(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip().splitlines()[-1]


@pytest.mark.parametrize("module", ["hf_diffusionblocks", "hf_diffusionblocks.cli"])
def test_importing_it_imports_nothing_heavy(module):
    loaded = in_a_new_process(f"import sys, json, {module}; print(json.dumps(list(sys.modules)))")
    assert set(HEAVY) & set(json.loads(loaded)) == set()
    with_a_name = (
        "import sys, json; from hf_diffusionblocks import LogNormalNoise; print(json.dumps(list(sys.modules)))"
    )
    assert "torch" in json.loads(in_a_new_process(with_a_name))  # the probe sees it


def test_every_public_name_is_there_and_none_else():
    assert set(hf_diffusionblocks.__all__) == set(hf_diffusionblocks._MODULES) <= set(dir(hf_diffusionblocks))
    for name in hf_diffusionblocks.__all__:
        value = getattr(hf_diffusionblocks, name)
        assert value.__name__ == name and value.__module__.startswith("hf_diffusionblocks.")
    with pytest.raises(AttributeError, match="has no attribute 'BlockedDit'"):
        hf_diffusionblocks.BlockedDit  # noqa: B018
    namespace: dict = {}
    exec("from hf_diffusionblocks import *", namespace)
    assert set(hf_diffusionblocks.__all__) <= set(namespace)


@pytest.mark.parametrize("order", ["hf_diffusionblocks, transformers", "transformers, hf_diffusionblocks"])
def test_auto_classes_know_the_models_whichever_is_imported_first(tmp_path, order):
    tiny_dit(2, 2).save_pretrained(tmp_path / "model")
    path = str(tmp_path / "model")
    code = f"""
import {order}
from transformers import AutoConfig, AutoModel, CONFIG_MAPPING
assert "blocked_causal_lm" in CONFIG_MAPPING
config = AutoConfig.from_pretrained({path!r})
print(type(config).__name__, type(AutoModel.from_pretrained({path!r})).__name__, config.num_blocks)
"""
    assert in_a_new_process(code) == "BlockedDiTConfig BlockedDiTModel 2"


def test_the_auto_config_makes_a_config_by_name():
    code = """
import hf_diffusionblocks
from transformers import AutoConfig
print(AutoConfig.for_model("blocked_dit", base_config={"num_layers": 4}, num_blocks=2).layers_per_block)
"""
    assert in_a_new_process(code) == "[2, 2]"

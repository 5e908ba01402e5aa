"""Bases told by their settings: why a type cannot be cut comes before which of its settings are unknown."""

import pytest
from transformers import CONFIG_MAPPING

from hf_diffusionblocks import (
    BlockedForCausalLM,
    BlockedForImageClassification,
    BlockedForMaskedLM,
    BlockedRecurrentForCausalLM,
)
from hf_diffusionblocks.cli import main
from hf_diffusionblocks.families.base_config import check_can_be_cut
from tiny_masked import ARCHITECTURES as MASKED
from tiny_masked import SHAPE
from tiny_text import ARCHITECTURES as DECODERS
from tiny_vit import ARCHITECTURES as CLASSIFIERS

DECODER = "Models built like Llama, Mistral, Qwen2 and Qwen3 can be cut"
ENCODER = "Encoders built like BERT, RoBERTa and ModernBERT can be cut"


@pytest.mark.parametrize(
    ("recipe", "model_type", "why", "mend"),
    [
        ("pydoc-llama", "gpt2", "its config has no num_hidden_layers", DECODER),
        ("pydoc-llama", "opt", "its decoder has no 'layers'", DECODER),
        ("pydoc-recurrent", "gpt2", "its config has no num_hidden_layers", DECODER),
        ("pydoc-md4", "t5", "its config has no num_hidden_layers", ENCODER),
        ("pydoc-md4", "distilbert", "its config has no num_hidden_layers", ENCODER),
        ("pydoc-md4", "albert", "it has no one list of its ", ENCODER),
    ],
)
def test_a_recipe_says_why_its_base_cannot_be_cut(recipe, model_type, why, mend, capsys):
    assert main(["plan", recipe, f"model.model_type={model_type}"]) == 2
    error = capsys.readouterr().err
    assert f"a model of type '{model_type}' cannot be cut: {why}" in error and mend in error
    assert "is no setting" in error and "unknown" not in error and error.count("\n") == 1


@pytest.mark.parametrize(
    ("kind", "model_type"),
    [
        (BlockedForCausalLM, "gpt2"),
        (BlockedForCausalLM, "opt"),
        (BlockedRecurrentForCausalLM, "t5"),
        (BlockedForMaskedLM, "t5"),
        (BlockedForImageClassification, "swin"),
    ],
)
def test_so_does_from_base(kind, model_type):
    base = {
        "model_type": model_type,
        "hidden_size": 16,
        "num_attention_heads": 4,
        "intermediate_size": 24,
        "head_dim": 4,
    }
    with pytest.raises(ValueError, match=f"a model of type '{model_type}' cannot be cut.*can be cut"):
        kind.from_base(base, num_blocks=1)
    with pytest.raises(ValueError, match=f"a model of type '{model_type}' cannot be cut"):
        kind.from_base(CONFIG_MAPPING[model_type](), num_blocks=1)


@pytest.mark.parametrize(
    ("kind", "bases"),
    [
        (BlockedForCausalLM, DECODERS),
        (BlockedForMaskedLM, {name: SHAPE | base for name, base in MASKED.items()}),
        (BlockedForImageClassification, CLASSIFIERS),
    ],
)
def test_a_type_that_can_be_cut_passes_and_its_settings_are_named(kind, bases):
    for base in bases.values():
        check_can_be_cut(kind.config_class, base, "hidden_szie")
        with pytest.raises(ValueError, match="setting 'hidden_szie': did you mean 'hidden_size'"):
            kind.from_base(base | {"hidden_szie": 16}, num_blocks=1)


def test_a_misspelt_size_is_not_taken_for_a_base_that_cannot_be_cut():
    """Without num_attention_heads, transformers refuses the width: that is not the mistake."""
    base = {"model_type": "bert", "hidden_size": 16, "num_atention_heads": 4}
    with pytest.raises(ValueError, match="setting 'num_atention_heads': did you mean 'num_attention_heads'"):
        BlockedForMaskedLM.from_base(base, num_blocks=1, mask_token_id=0)


def test_each_allowed_key_is_named_once(capsys):
    assert main(["plan", "pydoc-llama", "model.hidden_szie=16"]) == 2
    assert capsys.readouterr().err.count("model_type") == 1

"""Each family's own figures: a function of another family names the one that is right."""

import importlib

import pytest
import torch
from transformers import BertConfig, BertForMaskedLM, T5Config, T5ForConditionalGeneration, ViTConfig, ViTModel

from hf_diffusionblocks import held_out_loss
from hf_diffusionblocks.families.dit import BlockedDiTModel
from hf_diffusionblocks.likelihood import (
    information_profile,
    language_model_likelihood,
    likelihood_bound,
    masked_likelihood_bound,
)
from tiny import TinyImages, as_users_run, tiny_dit
from tiny_masked import blocked_mlm
from tiny_text import TokenRows, blocked_lm
from tiny_vit import blocked_vit

MODELS = {
    "dit": (tiny_dit, "held_out_loss"),
    "lm": (blocked_lm, "likelihood.likelihood_bound or likelihood.language_model_likelihood"),
    "masked": (blocked_mlm, "likelihood.masked_likelihood_bound"),
    "vit": (blocked_vit, "evaluation.score_classifier"),
}
OWN = {
    held_out_loss: {"dit"},
    likelihood_bound: {"lm"},
    information_profile: {"lm"},
    language_model_likelihood: {"lm"},
    masked_likelihood_bound: {"masked"},
}


@pytest.mark.parametrize(
    ("function", "family"), [(f, name) for f, own in OWN.items() for name in MODELS if name not in own]
)
def test_the_wrong_function_names_the_right_one(function, family):
    make, right = MODELS[family]
    with as_users_run(), pytest.raises(ValueError, match=f"call {right}") as error:
        function(make(), TokenRows())
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("family", MODELS)
def test_what_is_named_exists(family):
    model = MODELS[family][0]()
    for path in [word for word in model.scored_by.replace(",", " ").split() if "." in word or "_" in word]:
        module, *names = ("objectives." + path if "." not in path else path).split(".")
        found = importlib.import_module(f"hf_diffusionblocks.{module}")
        for name in names:
            found = getattr(found, name.removesuffix("()"))


def test_ordinary_models_that_predict_no_next_token():
    small = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    t5 = T5Config(d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2, vocab_size=40)
    with torch.device("meta"):
        others = (
            BertForMaskedLM(BertConfig(vocab_size=40, **small)),
            T5ForConditionalGeneration(t5),
            ViTModel(ViTConfig(image_size=8, patch_size=4, **small)),
        )
    for model in others:
        with (
            as_users_run(),
            pytest.raises(ValueError, match=f"a {type(model).__name__} predicts no next token: give a causal"),
        ):
            language_model_likelihood(model, TokenRows())
        with as_users_run(), pytest.raises(ValueError, match="call language_model_likelihood for an ordinary causal"):
            likelihood_bound(model, TokenRows())
        with as_users_run(), pytest.raises(ValueError, match="cut one into a BlockedDiTModel"):
            held_out_loss(model, TinyImages())


def test_held_out_loss_needs_images():
    model = tiny_dit()
    assert isinstance(model, BlockedDiTModel)
    with pytest.raises(ValueError, match=r"a batch holds \['.*'\]; held_out_loss needs 'pixel_values'"):
        held_out_loss(model, TokenRows())

"""A base that is named by a directory or a Hub id: in another dtype, of another revision."""

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, DiTPipeline, DiTTransformer2DModel
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from hf_diffusionblocks import BlockedDiTModel, BlockedDiTPipeline, BlockedForCausalLM
from hf_diffusionblocks.cli import main
from hf_diffusionblocks.data import load_tokenizer, train_tokenizer
from tiny import perturbed, tiny_vae
from tiny_text import base_config, base_lm

MODELS = {"lm": BlockedForCausalLM, "dit": BlockedDiTModel}


def make(family: str, seed: int) -> Any:
    """A base: a language model, or a pipeline with a scheduler and a VAE."""
    if family == "lm":
        return base_lm(num_layers=3, seed=seed)
    torch.manual_seed(seed)
    transformer = DiTTransformer2DModel(
        num_layers=3, num_attention_heads=2, attention_head_dim=8, sample_size=8, in_channels=4, num_embeds_ada_norm=10
    )
    vae = tiny_vae(shift_factor=0.1 * seed)
    return DiTPipeline(perturbed(transformer, seed=seed), vae, DDIMScheduler(beta_end=0.01 * (seed + 1)))


@pytest.fixture
def hub(tmp_path):
    """A cache in which `user/base` lies with two revisions, as after downloads; gives its folder and both bases."""

    def fill(family: str) -> tuple[Path, dict[str, Any]]:
        bases = {}
        repository = tmp_path / "cache" / "models--user--base"
        (repository / "refs").mkdir(parents=True)
        for seed, name in enumerate(("main", "v2")):
            commit = str(seed) * 40
            (repository / "refs" / name).write_text(commit)
            bases[name] = make(family, seed)
            bases[name].save_pretrained(repository / "snapshots" / commit)
        return tmp_path / "cache", bases

    return fill


@pytest.mark.parametrize("family", MODELS)
def test_a_revision_of_a_base_on_the_hub(hub, family):
    cache, bases = hub(family)
    for name, given in (("main", {}), ("v2", {"revision": "v2"})):
        model = MODELS[family].from_base("user/base", 3, cache_dir=cache, **given)
        expected = MODELS[family].from_base(bases[name], 3)
        assert model.config.base_model == "user/base"
        assert model.config.base_revision == expected.config.base_revision
        assert model.config.noise_schedule == expected.config.noise_schedule
        for a, b in zip(model.parameters(), expected.parameters(), strict=True):
            assert torch.equal(a, b)


def convert(cache: Path, out: Path) -> None:
    command = ["convert", "user/base", "--output-dir", str(out), f"cache_dir={cache}", "revision=v2", "dtype=bfloat16"]
    assert main(command) == 0


def test_convert_takes_network_scheduler_and_vae_of_the_revision(hub, tmp_path):
    cache, bases = hub("dit")
    convert(cache, tmp_path / "out")
    pipe = BlockedDiTPipeline.from_pretrained(tmp_path / "out")
    assert pipe.model.dtype == torch.bfloat16
    assert pipe.scheduler.config.beta_end == bases["v2"].scheduler.config.beta_end == 0.02
    assert pipe.vae.config.shift_factor == 0.1


def test_convert_takes_a_language_model_of_the_revision_with_its_tokenizer(hub, tmp_path):
    cache, bases = hub("lm")
    for path in (cache / "models--user--base" / "snapshots").iterdir():
        letters = "abc" if path.name.startswith("0") else "xyz"
        train_tokenizer(letters, "character").save_pretrained(path)
    convert(cache, tmp_path / "out")
    model = BlockedForCausalLM.from_pretrained(tmp_path / "out")
    expected = BlockedForCausalLM.from_base(bases["v2"].to(torch.bfloat16), 3)
    assert model.dtype == torch.bfloat16
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), expected.parameters(), strict=True))
    assert "x" in load_tokenizer(tmp_path / "out").get_vocab()


@pytest.mark.parametrize("family", MODELS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, "bfloat16", torch.float64, None])
def test_a_base_is_loaded_in_the_dtype_that_is_asked_for(tmp_path, family, dtype):
    make(family, 0).save_pretrained(tmp_path)
    given = {} if dtype is None else {"dtype": dtype}
    model = MODELS[family].from_base(tmp_path, 3, **given)
    wanted = torch.float32 if dtype is None else torch.bfloat16 if dtype == "bfloat16" else dtype
    assert model.dtype == wanted and model.config.num_blocks == 3


def test_a_base_in_half_precision_stays_so_unless_asked(tmp_path):
    base_lm().to(torch.bfloat16).save_pretrained(tmp_path)
    assert BlockedForCausalLM.from_base(tmp_path).dtype == torch.bfloat16
    wide = BlockedForCausalLM.from_base(tmp_path, dtype=torch.float32)
    ids = torch.tensor([[3, 4, 5]])
    base = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert torch.equal(wide(ids).logits, base(ids).logits)


@pytest.mark.parametrize(
    ("base", "settings", "message"),
    [
        (lambda path: base_lm(), {"dtype": torch.bfloat16}, "dtype: no setting for a base .* as a LlamaForCausalLM"),
        (lambda path: base_config(), {"revision": "v2", "token": "x"}, "revision, token: no setting for .* as a dict"),
        (lambda path: path, {"dtype": "int8"}, "dtype='int8' must be a floating-point dtype"),
        (lambda path: path, {"revison": "v2"}, "unknown setting 'revison'"),
    ],
)
def test_settings_of_loading_that_mean_nothing(tmp_path, base, settings, message):
    base_lm().save_pretrained(tmp_path)
    assert isinstance(AutoModelForCausalLM.from_pretrained(tmp_path), LlamaForCausalLM)
    with pytest.raises(ValueError, match=message):
        BlockedForCausalLM.from_base(base(tmp_path), **settings)

"""Recipes, overrides and baselines."""

from importlib import resources

import pytest

from hf_diffusionblocks.baselines.end_to_end import baseline_recipe, resolve_method
from hf_diffusionblocks.data import train_tokenizer
from hf_diffusionblocks.objectives.exact_gradient import check_exact
from hf_diffusionblocks.recipes import load_recipe, make_recipe, recipe_names
from tiny_text import base_lm


@pytest.mark.parametrize("name", recipe_names())
def test_every_recipe_loads(name):
    recipe = load_recipe(name)
    assert recipe.name == name
    assert recipe.blocks["num_blocks"] in ((2, 3, 4) if recipe.family != "recurrent" else (1,))
    recipe.training_arguments()
    if "base" not in recipe.model:
        assert recipe.config().num_blocks == recipe.blocks["num_blocks"]


def test_the_recipes_that_come_with_the_package():
    images = {"folder-dit", "digits-dit", "fashion-mnist-dit", "cifar10-dit-s2", "imagenet256-dit-l2"}
    text = {"pydoc-llama", "austen-llama", "lm1b-llama", "openwebtext-llama", "smollm2-finetune"}
    classes = {"digits-vit", "fashion-mnist-vit", "cifar100-vit", "tiny-imagenet-vit"}
    masked, recurrent = {"pydoc-md4", "text8-md4"}, {"pydoc-recurrent", "lm1b-huginn"}
    assert set(recipe_names()) == images | text | classes | masked | recurrent
    assert {name for name in recipe_names() if load_recipe(name).family == "image_classification"} == classes
    assert {name for name in recipe_names() if load_recipe(name).family == "causal_lm"} == text


def test_the_papers_settings_stand_in_the_recipes():
    cifar = load_recipe("cifar10-dit-s2")
    args = cifar.training_arguments()
    assert (args.per_device_train_batch_size, args.learning_rate, args.num_train_epochs) == (512, 1e-4, 100)
    assert (cifar.config().num_layers, cifar.config().overlap, cifar.config().label_dropout) == (12, 0.05, 0.1)
    assert (cifar.sampling.guidance_scale, cifar.sampling.num_inference_steps) == (2.0, 50)
    imagenet = load_recipe("imagenet256-dit-l2")
    assert imagenet.training_arguments().learning_rate == 5e-5
    assert imagenet.config().num_layers == 24


@pytest.mark.parametrize(("name", "blocks", "classes"), [("cifar100-vit", 3, 100), ("tiny-imagenet-vit", 2, 200)])
def test_the_papers_settings_for_classifiers_stand_in_the_recipes(name, blocks, classes):
    recipe = load_recipe(name)
    args, config = recipe.training_arguments(), recipe.config()
    assert (args.per_device_train_batch_size, args.learning_rate, args.num_train_epochs) == (128, 5e-4, 500)
    assert (args.lr_scheduler_type, args.horizontal_flip, args.order) == ("cosine", True, None)
    assert args.rand_augment
    base = config.base_config
    assert (config.num_layers, config.hidden_size, base["num_attention_heads"], base["patch_size"]) == (12, 128, 4, 4)
    assert (base["hidden_dropout_prob"], config.num_blocks, config.num_classes) == (0.1, blocks, classes)
    assert (config.readout, config.context, config.overlap, config.num_inference_steps) == (
        "edm",
        "independent",
        0.05,
        4,
    )


@pytest.mark.parametrize(("name", "length"), [("lm1b-llama", 256), ("openwebtext-llama", 3072)])
def test_the_papers_settings_for_text_stand_in_the_recipes(name, length):
    recipe = load_recipe(name)
    args, config = recipe.training_arguments(), recipe.config()
    assert (args.per_device_train_batch_size, args.learning_rate) == (256, 3e-4)
    assert (args.warmup_steps, args.num_train_epochs, args.train_shared) == (2500, 10, "all")
    assert (config.num_layers, config.hidden_size, config.base_config["num_attention_heads"]) == (12, 768, 12)
    assert (config.num_blocks, config.overlap, config.readout, config.context) == (4, 0.1, "edm", "independent")
    assert recipe.data.block_length == config.max_position_embeddings == length
    assert "Llama-2" in recipe.data.tokenizer and recipe.data.streaming


@pytest.mark.parametrize("name", ["lm1b-llama", "openwebtext-llama", "smollm2-finetune"])
def test_recipes_that_were_not_run_here_say_so_and_what_to_do_about_loading_scripts(name):
    text = (resources.files("hf_diffusionblocks.recipes") / f"{name}.yaml").read_text(encoding="utf-8")
    said = " ".join(text.split("family:")[0].replace("#", " ").split()).lower()
    assert "not run at full scale here" in said and "parquet" in said
    assert load_recipe(name).data.revision in (None, "refs/convert/parquet")


def test_the_exact_gradient_that_the_recipe_of_smollm2_names_can_be_asked_for(tmp_path):
    base_lm(num_layers=3).save_pretrained(tmp_path)
    settings = [f"model.base={tmp_path}", "training.gradient=exact", "blocks.auxiliary_layers=0"]
    recipe = load_recipe("smollm2-finetune", settings)
    check_exact(recipe.config())


def test_text_by_default_is_a_clean_cascade_one_block_after_the_other_with_an_auxiliary_layer():
    recipe = load_recipe("pydoc-llama")
    config = recipe.config()
    assert (config.readout, config.context, config.auxiliary_layers) == ("clean", "cascade", 1)
    assert recipe.training_arguments().order == "sequential"
    assert load_recipe("austen-llama").data.name is None  # looks for nothing by itself


def test_vocabulary_and_special_tokens_follow_from_the_tokenizer():
    tokenizer = train_tokenizer("abc", "character")
    config = load_recipe("pydoc-llama").config(tokenizer=tokenizer)
    assert config.vocab_size == len(tokenizer)
    assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (0, 0, 0)
    assert load_recipe("pydoc-llama", ["model.vocab_size=64"]).config(tokenizer=tokenizer).vocab_size == 64
    with pytest.raises(ValueError, match="vocab_size=5"):
        load_recipe("pydoc-llama", ["model.vocab_size=4"]).config(tokenizer=tokenizer)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("data.image_column=x", ["image_column", "text_column", "causal_lm"]),
        ("sampling.guidance_scale=2", ["guidance_scale", "causal_lm"]),
        ("model.hiddensize=8", ["hiddensize", "hidden_size"]),
        ("model.model_type=lama", ["lama", "llama"]),
        ("model.model_type=null", ["model_type", "base"]),
        ("blocks.redout=clean", ["redout", "readout"]),
        ("blocks.readout=exakt", ["exakt", "exact"]),
        ("blocks.preset=papr", ["papr", "paper"]),
        ("blocks.pretrained=true", ["pretrained"]),
        ("sampling.temperature=0", ["temperature=0", "do_sample"]),
        ("sampling.mode=denose", ["denose", "denoise"]),
        ("sampling.prompts=[]", ["prompt is empty"]),
        ("evaluation.rows=0", ["evaluation.rows=0"]),
        ("data.block_length=1024", ["block_length=1024", "max_position_embeddings=512"]),
        ("family=causal", ["causal", "causal_lm"]),
        ("layers=2", ["layers=2", "model.num_hidden_layers"]),
    ],
)
def test_bad_text_overrides_name_the_key_and_the_nearest_valid_one(override, words):
    with pytest.raises(ValueError) as error:
        load_recipe("pydoc-llama", [override])
    assert all(word in str(error.value) for word in words), error.value


def test_overrides_reach_every_section_and_numbers_may_be_written_with_an_exponent():
    recipe = load_recipe(
        "digits-dit",
        ["blocks.num_blocks=2", "training.learning_rate=1e-3", "data.max_samples=10", "model.num_layers=4"],
    )
    assert recipe.config().layers_per_block == [2, 2]
    assert recipe.training_arguments().learning_rate == 1e-3
    assert recipe.data.max_samples == 10


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("training.max_stesp=3", ["max_stesp", "max_steps"]),
        ("trainig.max_steps=3", ["trainig", "training"]),
        ("model.patchsize=2", ["patchsize", "patch_size"]),
        ("blocks.overlp=0.1", ["overlp", "overlap"]),
        ("data.nam=x", ["nam", "name"]),
        ("evaluation.num_sample=1", ["num_sample", "num_samples"]),
        ("method=blokced", ["blokced", "blocked"]),
        ("blocks.num_blocks=7", ["num_blocks=7", "6 layers"]),
        ("blocks.num_blocks=0", ["num_blocks=0"]),
        ("blocks.partition=unifrm", ["unifrm", "uniform"]),
        ("training.learning_rate=-1", ["learning_rate=-1"]),
        ("training", ["section.key=value"]),
        ("family.x=1", ["family.x=1"]),
        ("model=3", ["model"]),
    ],
)
def test_bad_overrides_name_the_key_and_the_nearest_valid_one(override, words):
    with pytest.raises(ValueError) as error:
        load_recipe("digits-dit", [override])
    assert all(word in str(error.value) for word in words)


def test_unknown_recipe_names_the_nearest():
    with pytest.raises(ValueError, match="digits-dit"):
        load_recipe("digit-dit")
    with pytest.raises(ValueError, match="no recipe file"):
        load_recipe("nowhere/mine.yaml")


def test_a_recipe_file_of_ones_own(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("model: {num_layers: 4, sample_size: 8, in_channels: 1}\nblocks: {num_blocks: 4}\n")
    assert load_recipe(str(path)).config().layers_per_block == [1, 1, 1, 1]
    path.write_text("model: [")
    with pytest.raises(ValueError, match="not valid YAML"):
        load_recipe(str(path))


def test_round_trip_through_plain_values():
    for name in ("digits-dit", "pydoc-llama"):
        recipe = load_recipe(name)
        assert make_recipe(recipe.to_dict()) == recipe


def test_baselines_match_the_blocks_in_updates_or_compute():
    recipe = load_recipe("digits-dit", ["blocks.num_blocks=3", "training.max_steps=100"])
    end_to_end = baseline_recipe(recipe, "end_to_end")
    assert end_to_end.config().layers_per_block == [6]
    assert end_to_end.training["max_steps"] == 100
    same_updates = baseline_recipe(recipe, "shallow", "updates")
    assert (same_updates.config().layers_per_block, same_updates.training["max_steps"]) == ([2], 100)
    same_compute = baseline_recipe(recipe, "shallow", "compute")
    assert (same_compute.config().layers_per_block, same_compute.training["max_steps"]) == ([2], 300)
    assert same_compute.training["warmup_steps"] == 3 * recipe.training["warmup_steps"]
    # layers x updates: the compute of B blocks, of L layers, and of L/B layers B times as long
    compute = [3 * 100 * 2, 100 * 6, 300 * 2]
    assert len(set(compute)) == 1


def test_shallow_baseline_keeps_the_remainder_layer():
    recipe = load_recipe("digits-dit", ["model.num_layers=7"])
    assert baseline_recipe(recipe, "shallow").config().num_layers == 3


def test_explicit_partition_settings_do_not_leak_into_a_baseline():
    recipe = load_recipe(
        "digits-dit",
        ["blocks.layers_per_block=[1,4,1]", "blocks.partition=explicit", "blocks.edges=[80, 1, 0.1, 0.002]"],
    )
    assert baseline_recipe(recipe, "end_to_end").config().edges == [80.0, 0.002]


def test_resolve_method():
    assert resolve_method(load_recipe("digits-dit")).config().num_blocks == 3
    assert resolve_method(load_recipe("digits-dit", ["method=end_to_end"])).config().num_blocks == 1


def test_epochs_stretch_too_when_compute_is_matched():
    recipe = load_recipe("cifar10-dit-s2")
    assert baseline_recipe(recipe, "shallow", "compute").training_arguments().num_train_epochs == 300


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("sampling.solver=eulr", "unknown sampling.solver 'eulr': did you mean 'euler'"),
        ("sampling.grid=karas", "unknown sampling.grid 'karas': did you mean 'karras'"),
        ("sampling.num_inference_steps=0", "sampling.num_inference_steps=0 must be a whole number of at least 1"),
        ("sampling.guidance_scale=.nan", "sampling.guidance_scale=nan must be a finite number"),
        ("sampling.every=-1", "sampling.every=-1 must be"),
        ("evaluation.num_samples=0", "evaluation.num_samples=0 must be a whole number of at least 2"),
        ("evaluation.guidance_scale=many", "evaluation.guidance_scale='many' must be a finite number"),
        (
            "evaluation.feature_network=incepton",
            "feature_network 'incepton': did you mean 'inception'",
        ),
        ("evaluation.held_out_samples=0", "evaluation.held_out_samples=0 must be"),
    ],
)
def test_how_images_are_sampled_and_scored_is_checked_before_training(override, message):
    with pytest.raises(ValueError, match=message):
        load_recipe("digits-dit", [override])


def test_no_in_yaml_means_no_mixed_precision():
    assert load_recipe("digits-dit", ["training.mixed_precision=no"]).training_arguments().mixed_precision == "no"

"""Odd values on the command line, in recipes and beside models: one clear line, never a traceback or a silent guess."""

import json
import math
from pathlib import Path

import pytest
import torch
from diffusers import DiTTransformer2DModel

from hf_diffusionblocks import BlockedForCausalLM, denoising_generate
from hf_diffusionblocks.cli import main
from hf_diffusionblocks.data import train_tokenizer
from hf_diffusionblocks.likelihood import language_model_likelihood
from hf_diffusionblocks.merging import merge_blocks
from hf_diffusionblocks.recipes import load_recipe
from hf_diffusionblocks.training import DiffusionBlocksTrainingArguments
from test_cli import SMALL
from tiny import tiny_vae
from tiny_text import TEXT_RECIPE, base_lm, blocked_lm, words_file

IMAGES = ["train", "digits-dit", *SMALL, "training.max_steps=2", "--no-report"]


def said(capsys, command: list, code: int = 2) -> str:
    """What a command that must fail says."""
    capsys.readouterr()
    assert main([str(word) for word in command]) == code
    error = capsys.readouterr().err
    assert "Traceback" not in error
    return error[error.index(f"diffusionblocks {command[0]}:") :]  # after a progress bar


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, Path]:
    """A run of each family, a base of each, and a VAE."""
    root = tmp_path_factory.mktemp("odd")
    text = f"data.name={words_file(root)}"
    assert main([*IMAGES, "--output-dir", str(root / "dit")]) == 0
    assert main(["train", "pydoc-llama", *TEXT_RECIPE, text, "--no-report", "--output-dir", str(root / "lm")]) == 0
    base_lm(num_layers=3).save_pretrained(root / "base-lm")
    torch.manual_seed(0)
    shape = {"num_layers": 3, "num_attention_heads": 2, "attention_head_dim": 8, "sample_size": 8, "in_channels": 1}
    DiTTransformer2DModel(**shape).save_pretrained(root / "base-dit")
    tiny_vae().save_pretrained(root / "vae")
    return {path.name: path for path in root.iterdir()}


# -- settings of a run -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("training.max_steps=1e3x", "max_steps='1e3x' must be a whole number"),
        ("training.max_steps=2.5", "max_steps=2.5 must be a whole number"),
        ("training.max_steps=[1]", "max_steps=[1] must be a whole number"),
        ("training.max_steps={", "'{' is not valid YAML"),
        ("training.seed=abc", "seed='abc' must be a whole number"),
        ("training.seed=1e20", "seed=100000000000000000000 must lie between"),
        ("training.weight_decay=abc", "weight_decay='abc' must be a finite number"),
        ("training.max_grad_norm=abc", "max_grad_norm='abc' must be a finite number"),
        ("training.num_train_epochs=abc", "num_train_epochs='abc' must be"),
        ("training.disable_tqdm=abc", "disable_tqdm='abc' must be true or false"),
        ("training.hand_over=abc", "hand_over='abc' must be true or false"),
        ("training.blocks=abc", "blocks='abc' must be a list or None"),
        ("training.output_dir=3", "output_dir=3 must be text"),
        ("training.output_dir=''", "output_dir is empty"),
        ("data.max_samples=0", "data.max_samples=0 must be a whole number of at least 1"),
        ("data.max_samples=abc", "data.max_samples='abc' must be a whole number or None"),
        ("data.image_size=0", "data.image_size=0 must be a whole number of at least 1"),
        ("data.channels=0", "channels=0 is not possible for images"),
        ("data.scaling_factor=abc", "data.scaling_factor='abc' must be"),
        ("data.name=[a]", "data.name=['a'] must be text"),
        ("data.test_split=null", "data.test_split=None must be text"),
        ("name=[1]", "name=[1] must be text"),
        ("blocks.num_blocks=abc", "num_blocks='abc' must be a whole number"),
    ],
)
def test_a_setting_of_an_image_run_has_its_type(override, words, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert words in said(capsys, [*IMAGES, override])
    assert list(tmp_path.iterdir()) == []  # nothing was begun


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("data.block_length=abc", "data.block_length='abc' must be a whole number"),
        ("data.block_length=0", "data.block_length=0 must be a whole number of at least 2"),
        ("data.test_fraction=abc", "data.test_fraction='abc' must be"),
        ("data.num_proc=0", "data.num_proc=0 must be a whole number of at least 1"),
        ("data.num_proc=abc", "data.num_proc='abc' must be a whole number or None"),
        ("data.max_test_samples=0", "data.max_test_samples=0 must be"),
        ("data.tokenizer=3", "data.tokenizer=3 must be text or None"),
        ("data.tokenizer=[a]", "data.tokenizer=['a'] must be text or None"),
        ("data.vocab_size=abc", "data.vocab_size='abc' must be a whole number"),
        ("data.streaming=abc", "data.streaming='abc' must be true or false"),
        ("sampling.prompts=3", "sampling.prompts=3 must be a list"),
        ("sampling.prompts=[3]", "the prompt is empty"),
        ("sampling.max_new_tokens=1000", "are more than the model's 64 positions"),
        ("sampling.do_sample=abc", "sampling.do_sample='abc' must be true or false"),
        ("sampling.temperature=.nan", "sampling.temperature=nan must be positive"),
        ("model.max_position_embeddings=abc", "max_position_embeddings='abc' must be a whole number"),
        ("model.rope_theta=abc", "does not describe a"),
        ("model.hidden_act=abc", "the base's config does not describe a model that can be built: KeyError('abc')"),
    ],
)
def test_a_setting_of_a_text_run_has_its_type(override, words, capsys, tmp_path):
    command = ["train", "pydoc-llama", *TEXT_RECIPE, f"data.name={words_file(tmp_path)}", override]
    assert words in said(capsys, [*command, "--output-dir", tmp_path / "run"])
    assert not (tmp_path / "run").exists()


def test_a_plan_of_no_tokens_is_refused(capsys):
    assert "data.block_length=0" in said(capsys, ["plan", "pydoc-llama", "data.block_length=0"])


def test_whole_numbers_may_be_written_with_an_exponent():
    args = load_recipe("digits-dit", ["training.max_steps=1e3", "training.save_steps=2e2"]).training_arguments()
    assert (args.max_steps, args.save_steps) == (1000, 200) and isinstance(args.max_steps, int)
    shallow = load_recipe("pydoc-llama", ["training.max_steps=1e3", "data.test_fraction=1e-1", "data.max_samples=2e1"])
    assert shallow.training["max_steps"] == 1000  # what a baseline multiplies
    assert (shallow.data.test_fraction, shallow.data.max_samples) == (0.1, 20)
    assert DiffusionBlocksTrainingArguments(output_dir=Path("x"), warmup_steps=3.0).warmup_steps == 3


@pytest.mark.parametrize("count", [1, 3, 4])
def test_very_few_images_are_trained_on_and_scored_if_there_are_four(count, tmp_path, capsys):
    run = tmp_path / "ünï çødé 目录"
    few = [f"data.max_samples={count}", "training.seed=-1"]
    assert main([*IMAGES, *few, "--output-dir", str(run)]) == 0
    evaluate = ["evaluate", str(run / "model"), "evaluation.num_samples=4", "--seed", "-1"]
    if count == 4:
        assert main(evaluate) == 0
        return
    report = [word for word in IMAGES if word != "--no-report"]
    for command in (evaluate, [*report, *few, "--output-dir", tmp_path / "other"]):
        assert f"{count} held-out images are too few to score: at least 4" in said(capsys, command)
    assert not (tmp_path / "other").exists()  # said before the training, not after it


# -- recipe files ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"- a\n- b", "holds ['a', 'b'], not sections such as data and training"),
        (b"3", "holds 3, not sections"),
        (b"\xff\xfe", "is not UTF-8"),
        (b"family: [a]", "unknown family"),
        (b"data: [1]", "section 'data' must hold settings"),
        (b"1: 2", "unknown recipe key '1'"),
        (b"model: [", "not valid YAML"),
    ],
)
def test_a_recipe_file_that_is_none(content, words, tmp_path, capsys):
    path = tmp_path / "mine.yaml"
    path.write_bytes(content)
    assert words in said(capsys, ["train", path])


@pytest.mark.parametrize("content", ["[", "[1]", '"x"'])
def test_a_broken_recipe_beside_a_model_is_named(models, tmp_path, content, capsys):
    (tmp_path / "model").symlink_to(models["lm"] / "model")
    (tmp_path / "recipe.json").write_text(content)
    for command in (["evaluate"], ["sample", "--prompt", "alpha", "--max-new-tokens", "3"]):
        error = said(capsys, [command[0], tmp_path / "model", *command[1:]])
        assert f"{tmp_path / 'recipe.json'} is no recipe" in error and "--recipe" in error


# -- directories -------------------------------------------------------------------------------------------------


def test_overwrite_removes_runs_only(tmp_path, capsys):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "mine.txt").write_text("precious")
    error = said(capsys, [*IMAGES, "--overwrite", "--output-dir", tmp_path])
    assert "holds model, but no run" in error and (tmp_path / "model" / "mine.txt").read_text() == "precious"
    assert main([*IMAGES, "--output-dir", str(tmp_path / "run")]) == 0
    assert main([*IMAGES, "--overwrite", "training.seed=1", "--output-dir", str(tmp_path / "run")]) == 0


@pytest.mark.parametrize("command", ["evaluate", "sample"])
def test_an_empty_name_is_no_model(command, capsys):
    options = ["--recipe", "digits-dit"] if command == "evaluate" else []
    assert "there is no directory" in said(capsys, [command, "", *options])


def test_where_figures_cannot_be_written_is_said_before_they_are_computed(models, tmp_path, capsys):
    for family in ("dit", "lm"):
        for output in (tmp_path, tmp_path / "nowhere" / "f.json"):
            error = said(capsys, ["evaluate", models[family] / "model", "--output", output])
            assert f"--output {output} is a directory, or in one that does not exist" in error
    (tmp_path / "file").write_text("x")
    said(capsys, ["sample", models["dit"] / "model", "--output-dir", tmp_path / "file"], code=1)
    said(capsys, [*IMAGES, "--output-dir", tmp_path / "file" / "run"], code=1)


# -- sample, evaluate, convert, encode, merge --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--per-class", "0"], "per_class=0 must be at least 1"),
        (["--per-class", "-1"], "per_class=-1 must be at least 1"),
        (["--classes", "99"], "allowed are 0 to 9"),
        (["--steps", "0"], "must be"),
        (["--guidance-scale", "nan"], "guidance_scale=nan must be a finite number"),
        (["--seed", str(10**20)], "--seed 100000000000000000000 must lie between"),
    ],
)
def test_odd_samples_of_images(models, options, words, tmp_path, capsys):
    command = ["sample", models["dit"] / "model", "--output-dir", tmp_path, "--steps", "2"]
    assert words in said(capsys, [*command, *options])


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--temperature", "nan"], "temperature=nan must be positive"),
        (["--seed", str(-(10**20))], "must lie between"),
        (["--top-p", "nan"], "top_p=nan must lie in"),
    ],
)
def test_odd_samples_of_text(models, options, words, capsys):
    assert words in said(capsys, ["sample", models["lm"] / "model", "--prompt", "alpha", *options])


def test_a_recipe_of_the_other_family_is_refused(models, capsys):
    error = said(capsys, ["evaluate", models["dit"] / "model", "--recipe", "pydoc-llama"])
    assert "is a model of family 'dit'" in error and "digits-dit" in error


@pytest.mark.parametrize("base", ["base-lm", "base-dit"])
@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("base_config={}", "unknown setting 'base_config'"),
        ("base=x", "unknown setting 'base'"),
        ("pretrained=false", "unknown setting 'pretrained'"),
        ("trained_blocks=[1]", "unknown setting 'trained_blocks'"),
        ("overlap={", "'{' is not valid YAML"),
        ("overlap=abc", "overlap='abc' must be"),
        ("dtype=int8", "dtype='int8' must be a floating-point dtype"),
    ],
)
def test_odd_settings_of_a_conversion(models, base, setting, words, tmp_path, capsys):
    assert words in said(capsys, ["convert", models[base], setting, "--output-dir", tmp_path / "out"])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "words"),
    [(["--batch-size", "0"], "batch_size=0"), (["--split", "val"], "'val'"), (["--split", ""], "split")],
)
def test_odd_encodings(models, options, words, tmp_path, capsys):
    latent = ["model.in_channels=4", f"sampling.vae={models['vae']}", "data.max_samples=4"]
    assert words in said(capsys, ["encode", "digits-dit", *latent, *options, "--output-dir", tmp_path / "latents"])


@pytest.mark.parametrize("wait", [math.nan, -1])
def test_waiting_for_no_time_that_there_is(models, wait, tmp_path, capsys):
    with pytest.raises(ValueError, match=f"wait={wait} must be a number of seconds"):
        merge_blocks([tmp_path], tmp_path / "out", wait=wait)
    command = ["merge", models["dit"], f"--wait={wait}", "--output-dir", tmp_path / "out"]
    assert "wait=" in said(capsys, command)


def test_figures_of_the_runs_are_json(models):
    for family in ("dit", "lm"):
        assert json.loads((models[family] / "recipe.json").read_text())["training"]["max_steps"] in (2, 6)


# -- what a reader of the language models found ------------------------------------------------------------------


def test_plain_rows_are_scored_and_wrong_ones_named():
    model = blocked_lm()
    rows = [{"input_ids": list(range(3, 13))}] * 4
    as_tensors = [{"input_ids": torch.arange(3, 13)}] * 4
    scored = language_model_likelihood(model, rows).nats_per_token
    assert scored == language_model_likelihood(model, as_tensors).nats_per_token
    assert scored == pytest.approx(language_model_likelihood(model, rows[:1]).nats_per_token)
    with pytest.raises(ValueError, match="99"):
        language_model_likelihood(model, [{"input_ids": [3, 4, 99]}])
    with pytest.raises(ValueError, match="lengths 3, 2"):
        language_model_likelihood(model, [{"input_ids": [3, 4, 5]}, {"input_ids": [3, 4]}])


def test_walks_refuse_models_without_blocks_and_prompts_padded_on_the_right():
    ids = torch.tensor([[3, 4, 5, 6], [3, 4, 5, 6]])
    right = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1]])
    walk = {"custom_generate": denoising_generate, "max_new_tokens": 2}
    with pytest.raises(ValueError, match="LlamaForCausalLM has no blocks"):
        base_lm().generate(ids, attention_mask=torch.ones_like(ids), **walk)
    with pytest.raises(ValueError, match="padded on the right"):
        blocked_lm().generate(ids, attention_mask=right, **walk)
    blocked_lm().generate(ids, attention_mask=right.flip(1), **walk)


@pytest.mark.parametrize("text", ["hello world the cat sat on the mat", "ねこ が まど の うえ に いる", "abcdef ghi"])
def test_stop_strings_work_whatever_letters_the_tokenizer_knows(text):
    tokenizer = train_tokenizer([text] * 20, "character")
    model = BlockedForCausalLM.from_base(base_lm(vocab_size=len(tokenizer)), 3, auxiliary_layers=0).eval()
    prompt = tokenizer(text[:4], return_tensors="pt", return_token_type_ids=False)
    free = model.generate(**prompt, max_new_tokens=12, do_sample=False, eos_token_id=None)[0]
    new = free[prompt["input_ids"].shape[1] :]
    stop = tokenizer.decode(new[3:4])
    given = {"stop_strings": [stop], "tokenizer": tokenizer, "max_new_tokens": 12, "do_sample": False}
    stopped = model.generate(**prompt, **given, eos_token_id=None)[0][prompt["input_ids"].shape[1] :]
    first = next(i for i, token in enumerate(new) if stop in tokenizer.decode(token[None]))
    assert stopped.tolist() == new[: first + 1].tolist()


def test_a_base_that_is_no_directory_is_no_question_for_the_hub(tmp_path):
    with pytest.raises(ValueError, match="there is no directory"):
        BlockedForCausalLM.from_base(str(tmp_path / "none"), num_blocks=3)


def test_a_job_without_the_blocks_right_below_it_says_which_to_train(tmp_path, capsys):
    text = tmp_path / "text.txt"
    text.write_text("the cat sat on the mat. " * 100)
    small = ["model.hidden_size=16", "model.intermediate_size=32", "data.block_length=16", "training.max_steps=1"]
    run = ["train", "austen-llama", "--data", str(text), *small, "training.warmup_steps=0", "--no-report"]
    run += ["training.train_shared=none", "training.save_steps=0"]
    assert main([*run, "--block", "0", "--output-dir", str(tmp_path / "0")]) == 0
    lower = str(tmp_path / "0" / "model")
    error = said(capsys, [*run, "--block", "2", "--lower", lower, "--output-dir", tmp_path / "2"])
    assert f"--lower {lower} does not give block 1, which block 2 reads" in error and "Train --block 1 first" in error


@pytest.mark.parametrize("name, value", [("train_shared", True), ("residency", False), ("lower_outputs", True)])
def test_choices_that_yaml_reads_as_yes_or_no_name_what_is_allowed(name, value, tmp_path):
    with pytest.raises(ValueError, match=f"unknown {name} '{value}': Allowed: "):
        DiffusionBlocksTrainingArguments(tmp_path, **{name: value})

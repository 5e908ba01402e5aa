"""The command line on masked language models: plan, train, baselines, jobs, sample, evaluate, convert, bad input."""

import json
import math
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForMaskedLM, AutoTokenizer

from hf_diffusionblocks import BlockedForMaskedLM
from hf_diffusionblocks.cli import main
from hf_diffusionblocks.data import train_tokenizer
from hf_diffusionblocks.data.tokenizing import with_mask_token
from hf_diffusionblocks.families.loading import blocked_config_of
from hf_diffusionblocks.recipes import load_recipe
from tiny_masked import base_config, base_mlm
from tiny_text import TEXT_RECIPE, words_file


def weights(model_dir: Path, block: int) -> bytes:
    return (model_dir / f"block-{block:02d}.safetensors").read_bytes()


@pytest.fixture(scope="module")
def text_file(tmp_path_factory) -> Path:
    return words_file(tmp_path_factory.mktemp("text"))


@pytest.fixture(scope="module")
def command(text_file) -> list[str]:
    settings = [*TEXT_RECIPE, "training.train_shared=none", "sampling.steps=4", "evaluation.num_draws=2"]
    settings += ["model.num_key_value_heads=2", "model.layer_types=[sliding_attention, full_attention, full_attention]"]
    return ["train", "pydoc-md4", *settings, f"data.name={text_file}"]


@pytest.fixture(scope="module")
def run_dir(command, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "words"
    assert main([*command, "--output-dir", str(folder)]) == 0
    return folder


@pytest.fixture(scope="module")
def base_dir(tmp_path_factory) -> Path:
    """A pretrained BERT with its tokenizer, as on the Hub."""
    folder = tmp_path_factory.mktemp("base")
    tokenizer = with_mask_token(train_tokenizer("abcdefghijklmnopqrstuvwxyz \n", "character"))
    base_mlm("bert", num_layers=3).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_train_ends_with_pictures_figures_samples_and_a_card(run_dir):
    for name in ("losses", "bound", "partition", "memory", "samples"):
        assert (run_dir / "figures" / f"{name}.png").stat().st_size > 1000
    figures = json.loads((run_dir / "figures" / "figures.json").read_text())
    shares = figures["bound_bits_per_character_per_block"]
    assert len(shares) == 3 and sum(shares) == pytest.approx(figures["bound_bits_per_character"])
    assert figures["bound_bits_per_character"] == pytest.approx(figures["nats_per_token"] / math.log(2))
    assert figures["held_out_tokens"] == 8 * 32  # the first of a row too
    samples = (run_dir / "figures" / "samples.txt").read_text()
    assert samples.startswith("alpha ")
    card = (run_dir / "model" / "README.md").read_text()
    assert "pipeline_tag: fill-mask" in card and "mask rates" in card and "masked diffusion" in card
    model = AutoModelForMaskedLM.from_pretrained(run_dir / "model")
    tokenizer = AutoTokenizer.from_pretrained(run_dir / "model")
    assert isinstance(model, BlockedForMaskedLM)
    assert model.config.mask_token_id == tokenizer.mask_token_id == model.config.vocab_size - 1


def test_jobs_of_one_block_make_the_same_model(run_dir, command, tmp_path):
    folders = [tmp_path / f"b{block}" for block in range(3)]
    for block, folder in enumerate(folders):
        assert main([*command, "--block", str(block), "--no-report", "--output-dir", str(folder)]) == 0
        assert weights(folder / "model", block) == weights(run_dir / "model", block)
    assert main(["merge", *map(str, folders), "--output-dir", str(tmp_path / "merged")]) == 0
    assert weights(tmp_path / "merged", 1) == weights(run_dir / "model", 1)


@pytest.mark.parametrize(
    ("method", "layers", "updates"),
    [(["--method", "end_to_end"], 3, 6), (["--method", "shallow", "--match", "compute"], 1, 18)],
)
def test_the_same_command_trains_the_baselines(command, method, layers, updates, tmp_path):
    given = [*command, "training.train_shared=all", "blocks.schedule=cosine", *method]
    assert main([*given, "--no-report", "--output-dir", str(tmp_path)]) == 0
    config = BlockedForMaskedLM.from_pretrained(tmp_path / "model").config
    assert (config.num_blocks, config.num_layers, config.schedule) == (1, layers, "cosine")
    assert len((tmp_path / "updates.jsonl").read_text().splitlines()) == updates


def test_sample_fills_gaps_and_goes_on(run_dir, capsys):
    texts = []
    for extra in (["--seed", "1"], ["--seed", "1"], ["--seed", "2"], ["--order", "confidence", "--temperature", "0"]):
        options = ["--prompt", "gamma <mask:5> delta", "--max-new-tokens", "6", "--steps", "3", *extra]
        assert main(["sample", str(run_dir / "model"), *options]) == 0
        texts.append(capsys.readouterr().out.rstrip("\n"))
    assert all(text.startswith("gamma ") and " delta" in text for text in texts)
    assert texts[0] == texts[1] != texts[2]
    narrow = ["--prompt", "gamma <mask:5> delta", "--max-new-tokens", "6", "--steps", "1"]
    for extra in (["--top-k", "1"], ["--temperature", "0"]):
        assert main(["sample", str(run_dir / "model"), *narrow, "--seed", "1", *extra]) == 0
        texts.append(capsys.readouterr().out)
    assert texts[-1] == texts[-2]


def test_evaluate_gives_the_figures_of_the_run_again(run_dir, tmp_path, capsys):
    assert main(["evaluate", str(run_dir / "model"), "--output", str(tmp_path / "f.json")]) == 0
    assert "bound bits per character per block" in capsys.readouterr().out
    first = json.loads((run_dir / "figures" / "figures.json").read_text())
    for name, value in json.loads((tmp_path / "f.json").read_text()).items():
        assert value == pytest.approx(first[name], rel=1e-5), name


def test_convert_cuts_a_pretrained_base_and_trains_on(base_dir, text_file, tmp_path, capsys):
    assert main(["convert", str(base_dir), "--num-blocks", "1", "--output-dir", str(tmp_path / "one")]) == 0
    assert "mask rate" in capsys.readouterr().out
    ids = torch.arange(3, 20)[None]
    base, model = (AutoModelForMaskedLM.from_pretrained(path).eval() for path in (base_dir, tmp_path / "one"))
    assert torch.equal(model(ids).logits, base(input_ids=ids).logits)
    recipe = tmp_path / "words.yaml"
    recipe.write_text(f"family: masked_lm\nmodel: {{base: {base_dir}}}\ndata: {{name: {text_file}}}\n")
    for method, folder in (("blocked", "run"), ("end_to_end", "whole")):
        options = ["--method", method, "--no-report", "--output-dir", str(tmp_path / folder)]
        assert main(["train", str(recipe), *TEXT_RECIPE[5:], *options]) == 0
    assert BlockedForMaskedLM.from_pretrained(tmp_path / "whole" / "model").config.layers_per_block == [3]
    config = BlockedForMaskedLM.from_pretrained(tmp_path / "run" / "model").config
    assert config.pretrained and config.layers_per_block == [1, 1, 1] and config.is_encoder


def test_plan_counts_from_a_recipe_a_base_or_its_config(command, base_dir, capsys):
    assert main(["plan", *command[1:]]) == 0
    out = capsys.readouterr().out
    assert "mask rate" in out and "1 to 0.6667" in out and "end to end, checkpointing" in out
    assert blocked_config_of(base_dir, 3).model_type == "blocked_masked_lm"
    assert blocked_config_of(base_config("bert")).model_type == "blocked_masked_lm"
    assert blocked_config_of(base_config("llama")).model_type == "blocked_causal_lm"


def test_the_papers_recipe_has_the_papers_settings():
    recipe = load_recipe("text8-md4")
    config, args = recipe.config(30), recipe.training_arguments()
    assert (config.num_layers, config.hidden_size, config.num_blocks, recipe.data.block_length) == (12, 768, 3, 256)
    assert (args.per_device_train_batch_size, args.learning_rate, args.weight_decay) == (256, 3e-4, 0.03)
    assert (args.warmup_steps, args.num_train_epochs) == (2000, 100)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["sample", "{run}", "--prompt", "alpha", "--max-new-tokens", "0"], "has no gap: write <mask:12>"),
        (["sample", "{run}", "--prompt", "<mask:99>"], "more than the model's 64 positions"),
        (["sample", "{run}", "--order", "left"], "sample: unknown sampling.order 'left': Allowed"),
        (["sample", "{run}", "--denoise"], "--denoise has no meaning"),
        (["sample", "{run}", "--top-k", "0"], "top_k=0 must be a whole number of at least 1"),
        (["sample", "{run}", "--steps", "0"], "steps=0"),
        (["evaluate", "{run}", "--recipe", "pydoc-llama"], "is for family 'causal_lm'"),
        (["convert", "{run}", "--output-dir", "{new}"], "has been cut into blocks already"),
        (["train", "pydoc-md4", "blocks.readout=exact"], "readout"),
        (["train", "pydoc-md4", "blocks.mask_token_id=9000"], "mask_token_id=9000 is none of"),
        (["train", "pydoc-md4", "training.distillation_weight=0.5"], "distillation_weight"),
        (["train", "pydoc-md4", "data.block_length=1000"], "data.block_length=1000"),
        (["train", "text8-md4"], "names no text"),
    ],
)
def test_bad_input_ends_with_one_line_and_code_2(arguments, message, run_dir, tmp_path, capsys):
    names = {"run": str(run_dir / "model"), "new": str(tmp_path / "new")}
    extra = ["--output-dir", str(tmp_path / "out")] if arguments[0] == "train" else []
    assert main([a.format(**names) for a in arguments] + extra) == 2
    lines = capsys.readouterr().err.splitlines()
    error = [line for line in lines if line and "%|" not in line]  # progress bars end before it
    assert len(error) == 1 and message in error[0]

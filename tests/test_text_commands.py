"""The command line on text: plan, train, resume, jobs per block, baselines, sample, evaluate, convert, bad input."""

import json
import math
from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline

from hf_diffusionblocks import BlockedForCausalLM
from hf_diffusionblocks.cli import main
from hf_diffusionblocks.data import train_tokenizer
from hf_diffusionblocks.jobs.text_pieces import _take_lower_blocks, load_model
from tiny_text import TEXT_RECIPE, base_lm, new_lm, words_file


def weights(model_dir: Path, block: int) -> bytes:
    return (model_dir / f"block-{block:02d}.safetensors").read_bytes()


@pytest.fixture(scope="module")
def text_file(tmp_path_factory) -> Path:
    return words_file(tmp_path_factory.mktemp("text"))


@pytest.fixture(scope="module")
def command(text_file) -> list[str]:
    return ["train", "pydoc-llama", *TEXT_RECIPE, f"data.name={text_file}"]


@pytest.fixture(scope="module")
def run_dir(command, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "words"
    assert main([*command, "--output-dir", str(folder)]) == 0
    return folder


@pytest.fixture(scope="module")
def base_dir(tmp_path_factory) -> Path:
    """A pretrained language model with its tokenizer, as on the Hub."""
    folder = tmp_path_factory.mktemp("base")
    base_lm(num_layers=3).save_pretrained(folder)
    train_tokenizer("abcdefghijklmnopqrstuvwxyz \n", "character").save_pretrained(folder)
    return folder


# -- train ---------------------------------------------------------------------------------------------------------


def test_train_ends_with_pictures_figures_samples_and_a_card(run_dir):
    for name in ("losses", "bits", "memory", "samples"):
        with Image.open(run_dir / "figures" / f"{name}.png") as picture:
            assert min(picture.size) > 50
    figures = json.loads((run_dir / "figures" / "figures.json").read_text())
    assert figures["bits_per_character"] == pytest.approx(figures["nats_per_token"] / math.log(2), rel=1e-6)
    assert figures["perplexity_per_token"] == pytest.approx(math.exp(figures["nats_per_token"]))
    # Nothing stands between a cascade's last block and its head: its own loss is the model's.
    assert figures["local_bits_per_character_per_block"][-1] == pytest.approx(figures["bits_per_character"], rel=1e-5)
    assert figures["held_out_tokens"] == 8 * 31
    samples = (run_dir / "figures" / "samples.txt").read_text()
    assert samples.startswith("alpha ") and "\n\nbeta " in samples
    card = (run_dir / "model" / "README.md").read_text()
    assert "pipeline_tag: text-generation" in card and "bits per character" in card and "cascade" in card


def test_the_saved_directory_is_one_for_transformers(run_dir):
    model = AutoModelForCausalLM.from_pretrained(run_dir / "model")
    tokenizer = AutoTokenizer.from_pretrained(run_dir / "model")
    assert isinstance(model, BlockedForCausalLM)
    assert model.config.vocab_size == len(tokenizer) and model.config.trained_blocks == [0, 1, 2]
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id == 0
    ids = tokenizer("alpha beta", return_tensors="pt")["input_ids"]
    settings = {"return_dict_in_generate": True, "output_logits": True, "do_sample": False}
    generated = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=1, **settings)
    torch.testing.assert_close(generated.logits[0], model(ids).logits[:, -1])
    text = pipeline("text-generation", str(run_dir / "model"))("alpha", max_new_tokens=5, do_sample=False)
    assert text[0]["generated_text"].startswith("alpha")


def test_train_prints_memory_figures_a_sample_and_lines_that_run(run_dir, command, capsys):
    assert main([*command, "--output-dir", str(run_dir)]) == 0
    text = capsys.readouterr().out
    assert "going on with" in text and "end to end, all layers at once" in text and "sample (temperature 0.8" in text
    assert "shared by all blocks: embed_tokens.weight" in text and "auxiliary layers" in text
    lines = [line.strip() for line in text.split("load it:\n")[1].splitlines()[:3]]
    exec("\n".join(lines), {})  # what a reader would paste
    assert capsys.readouterr().out.startswith("alpha ")


def test_a_killed_run_goes_on_to_the_same_weights(run_dir, command, tmp_path):
    folder = tmp_path / "run"
    assert main([*command, "--no-report", "--output-dir", str(folder)]) == 0
    whole = [weights(folder / "model", b) for b in range(3)]
    assert whole == [weights(run_dir / "model", b) for b in range(3)]
    (folder / "checkpoint-18").rename(tmp_path / "checkpoint-18")  # as if it had been killed half-way
    assert [p.name for p in folder.glob("checkpoint-*")] == ["checkpoint-9"]
    assert main([*command, "--no-report", "--output-dir", str(folder)]) == 0
    assert [weights(folder / "model", b) for b in range(3)] == whole


def test_a_chain_of_jobs_equals_one_run(run_dir, command, tmp_path):
    lower: list[str] = []
    for block in range(3):
        folder = tmp_path / f"b{block}"
        assert main([*command, "--block", str(block), *lower, "--no-report", "--output-dir", str(folder)]) == 0
        assert weights(folder / "model", block) == weights(run_dir / "model", block)
        lower = ["--lower", str(folder / "model")]
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "b2" / "model")
    assert model.config.trained_blocks == [0, 1, 2]


@pytest.mark.parametrize(
    ("method", "layers", "updates"),
    [
        (["--method", "end_to_end"], 3, 6),
        (["--method", "shallow"], 1, 6),
        (["--method", "shallow", "--layers", "2", "--match", "compute"], 2, None),
    ],
)
def test_the_same_command_trains_the_baselines(command, method, layers, updates, tmp_path):
    assert main([*command, *method, "--no-report", "--output-dir", str(tmp_path / "b")]) == 0
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "b" / "model")
    assert (model.config.num_blocks, model.config.num_layers) == (1, layers)
    done = len((tmp_path / "b" / "updates.jsonl").read_text().splitlines())
    # In layer passes: blocks 3 * 2 + (3 * 2 + 1) + (3 + 2) = 18 per update, two layers 6; heads shift it a little.
    assert done == updates or (updates is None and 6 * 2.8 < done < 6 * 3.8)


def test_a_stream_is_trained_on_by_blocks_side_by_side(command, tmp_path, text_file):
    stream = ["data.streaming=true", "data.max_samples=40", "data.max_test_samples=8", "data.shuffle_buffer=8"]
    paper = ["training.order=simultaneous", "training.train_shared=all"]
    assert main([*command, *stream, *paper, "--no-report", "--output-dir", str(tmp_path / "run")]) == 0
    blocks = [json.loads(line)["block"] for line in (tmp_path / "run" / "updates.jsonl").read_text().splitlines()]
    assert sorted(blocks) == [0] * 6 + [1] * 6 + [2] * 6 and blocks != sorted(blocks)


def test_fine_tune_a_pretrained_base_whole_and_by_its_blocks(base_dir, text_file, tmp_path):
    common = [
        "train",
        "smollm2-finetune",
        f"model.base={base_dir}",
        f"data.name={text_file}",
        *TEXT_RECIPE[5:],
        "--no-report",
    ]
    assert main([*common, "--output-dir", str(tmp_path / "blocks")]) == 0
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "blocks" / "model")
    assert model.config.pretrained and model.config.layers_per_block == [1, 1, 1]
    assert main([*common, "--method", "end_to_end", "--output-dir", str(tmp_path / "whole")]) == 0
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "whole" / "model").config.layers_per_block == [3]
    # A job for one block needs no trained blocks beside it: the base's weights stand there. The exact gradient comes
    # through the blocks above, a local one needs those below only.
    for gradient, held in (("exact", {0, 1, 2}), ("local", {0, 1})):
        settings = ["--block", "1", f"training.gradient={gradient}", "--output-dir", str(tmp_path / gradient)]
        assert main([*common, *settings]) == 0
        files = {p.name for p in (tmp_path / gradient / "model").glob("block-*")}
        assert files == {f"block-{b:02d}.safetensors" for b in held}


# -- sample, evaluate, convert, plan ---------------------------------------------------------------------------------


def test_sample_streams_text_and_the_seed_decides(run_dir, capsys):
    texts = []
    for extra in (["--seed", "1"], ["--seed", "1"], ["--seed", "2"], ["--temperature", "0"], ["--denoise"]):
        options = ["--prompt", "gamma ", "--max-new-tokens", "12", *extra]
        assert main(["sample", str(run_dir / "model"), *options]) == 0
        texts.append(capsys.readouterr().out)
    assert all(text.startswith("gamma ") for text in texts)
    assert texts[0] == texts[1] != texts[2]


def test_sampling_options_reach_the_walk(run_dir, capsys):
    walk = ["--denoise", "--steps", "4", "--bridge", "argmax_row", "--grid", "karras", "--top-p", "0.9"]
    assert main(["sample", str(run_dir / "model"), "--prompt", "alpha ", *walk]) == 0
    assert capsys.readouterr().out.startswith("alpha ")


def test_top_k_bounds_what_is_drawn(run_dir, capsys):
    texts = []
    for extra in (["--top-k", "1"], ["--temperature", "0"], ["--top-k", "1", "--denoise"], ["--top-k", "40"], []):
        options = ["--prompt", "gamma ", "--max-new-tokens", "12", *extra]
        assert main(["sample", str(run_dir / "model"), *options]) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] != texts[4]  # the likeliest of one is the likeliest
    assert texts[2].startswith("gamma ") and texts[3] == texts[4]  # 40 are more than there are characters


def test_evaluate_gives_the_figures_of_the_run_again(run_dir, tmp_path, capsys):
    assert main(["evaluate", str(run_dir / "model"), "--output", str(tmp_path / "f.json")]) == 0
    assert "bits per character" in capsys.readouterr().out
    first = json.loads((run_dir / "figures" / "figures.json").read_text())
    again = json.loads((tmp_path / "f.json").read_text())
    for name, value in again.items():
        assert value == pytest.approx(first[name], rel=1e-5), name


def test_evaluate_gives_a_bound_where_blocks_have_noise_levels_of_their_own(command, tmp_path, capsys):
    folder = tmp_path / "exact"
    noisy = ["blocks.readout=exact", "blocks.context=independent", "blocks.auxiliary_layers=0", "training.order=null"]
    assert main([*command, *noisy, "--no-report", "--output-dir", str(folder)]) == 0
    assert main(["evaluate", str(folder / "model"), "--output", str(tmp_path / "f.json")]) == 0
    figures = json.loads((tmp_path / "f.json").read_text())
    shares = figures["bound_bits_per_character_per_block"]
    assert len(shares) == 3 and sum(shares) == pytest.approx(figures["bound_bits_per_character"], rel=1e-5)


def test_convert_computes_what_the_base_computes(base_dir, tmp_path, capsys):
    convert = ["convert", str(base_dir), "--num-blocks", "3", "--output-dir", str(tmp_path / "cut")]
    assert main(convert) == 0
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "cut")
    ids = AutoTokenizer.from_pretrained(tmp_path / "cut")("some text", return_tensors="pt")["input_ids"]
    base = AutoModelForCausalLM.from_pretrained(base_dir)
    torch.testing.assert_close(model(ids).logits, base(ids).logits, rtol=0, atol=0)
    capsys.readouterr()
    assert main(convert) == 2
    assert "not empty" in capsys.readouterr().err
    assert main(["convert", str(tmp_path / "cut"), "--output-dir", str(tmp_path / "again")]) == 2
    assert "already" in capsys.readouterr().err


def test_plan_names_shared_parts_compute_and_what_to_do(text_file, capsys):
    small = [*TEXT_RECIPE[:6], f"data.name={text_file}", "training.max_steps=20"]
    assert main(["plan", "pydoc-llama", *small]) == 0
    text = capsys.readouterr().out
    for words in ("embed_tokens.weight", "auxiliary layers", "forward only", "Do blocks pay here?", "train it instead"):
        assert words in text


def test_plan_of_a_pretrained_base_says_that_no_smaller_model_exists(base_dir, capsys):
    assert main(["plan", "smollm2-finetune", f"model.base={base_dir}", "data.block_length=32", "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert "cannot be made smaller" in plan["advice"] and plan["rows"]
    assert plan["compute"]["compute_ratio"] == pytest.approx(
        sum(plan["compute"]["flops_per_block"]) / plan["compute"]["flops_per_end_to_end_update"]
    )


# -- bad input -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("extra", "words"),
    [
        (["data.name=null"], ["names no text", "data.name="]),
        (["data.name=/no/such/file.txt"], ["/no/such/file.txt"]),
        (["data.block_length=4000", "model.max_position_embeddings=8000"], ["block_length=4000", "tokens"]),
        (["data.block_length=100"], ["block_length=100", "max_position_embeddings=64"]),
        (["data.streaming=true"], ["max_samples", "no length"]),
        (["data.tokenizer=/no/such/tokenizer"], ["/no/such/tokenizer"]),
        (["model.vocab_size=10"], ["10", "vocab"]),
        (["model.hiddensize=8"], ["hiddensize", "hidden_size"]),
        (["data.text_colum=x"], ["text_colum", "text_column"]),
        (["sampling.prompts=['']"], ["prompt", "empty"]),
        (["sampling.num_inference_steps=3"], ["num_inference_steps", "causal_lm"]),
        (["blocks.readout=exact"], ["auxiliary_layers"]),
        (["--block", "7"], ["block 7", "0 to 2"]),
        (["--block", "1"], ["have not been trained", "--lower"]),
        (["--block", "1", "training.train_shared=all"], ["training.train_shared=none"]),
        (["--block", "0", "blocks.context=independent", "training.order=null"], ["training.train_shared=none"]),
        (["--lower", "/no/such/model"], ["--block"]),
        (["--layers", "2"], ["layers=2", "shallow"]),
        (["--method", "shallow", "--layers", "9"], ["layers=9", "3 layers"]),
    ],
)
def test_bad_input_of_train_ends_in_one_clear_line(command, extra, words, capsys, tmp_path):
    assert main([*command, *extra, "--output-dir", str(tmp_path / "run")]) == 2
    error = capsys.readouterr().err.strip()
    assert all(word in error for word in words), error
    assert "Traceback" not in error


def test_a_text_that_is_not_utf8_is_named_with_the_position(command, tmp_path, capsys):
    path = tmp_path / "latin1.txt"
    path.write_bytes(b"gar\xe7on " * 100)
    assert main([*command, f"data.name={path}", "--output-dir", str(tmp_path / "run")]) == 2
    error = capsys.readouterr().err
    assert "latin1.txt is not UTF-8" in error and "position 3" in error


def test_a_tokenizer_that_does_not_fit_the_base(base_dir, text_file, tmp_path, capsys):
    large = tmp_path / "tokenizer"
    train_tokenizer("".join(map(chr, range(33, 126))), "character").save_pretrained(large)
    common = ["train", "smollm2-finetune", f"model.base={base_dir}", f"data.name={text_file}", "data.block_length=16"]
    assert main([*common, f"data.tokenizer={large}", "--output-dir", str(tmp_path / "run")]) == 2
    error = capsys.readouterr().err
    assert "40 tokens" in error and "Use the tokenizer that the model was made with" in error
    assert main([*common, "data.tokenizer=bpe", "--output-dir", str(tmp_path / "run")]) == 2
    assert "leave data.tokenizer out" in capsys.readouterr().err
    assert main([*common, "--method", "shallow", "--output-dir", str(tmp_path / "run")]) == 2
    assert "pretrained base" in capsys.readouterr().err


def test_lower_blocks_of_another_model(run_dir, command, tmp_path, capsys):
    other = [*command, "model.intermediate_size=32", "--block", "1", "--lower", str(run_dir / "model")]
    assert main([*other, "--output-dir", str(tmp_path / "run")]) == 2
    assert "belong to another model" in capsys.readouterr().err


def test_lower_blocks_of_other_tokens(tmp_path):
    """Two texts of equally many characters give models of one shape, whose ids mean different characters."""
    below, model = new_lm(), new_lm()
    below.config.trained_blocks = [0]
    below.save_pretrained(tmp_path)
    _take_lower_blocks(model, str(tmp_path), 1, train_tokenizer("abc", "character"))  # nothing to compare with
    train_tokenizer("abc", "character").save_pretrained(tmp_path)
    _take_lower_blocks(model, str(tmp_path), 1, train_tokenizer("cba", "character"))
    assert model.config.trained_blocks == [0]
    with pytest.raises(ValueError, match="were trained with another tokenizer .*same data and tokenizer"):
        _take_lower_blocks(model, str(tmp_path), 1, train_tokenizer("xyz", "character"))


def test_an_empty_text_file_is_named(tmp_path, capsys):
    empty = tmp_path / "empty.txt"
    empty.write_text("")
    command = ["train", "pydoc-llama", *TEXT_RECIPE, f"data.name={empty}", "--output-dir", str(tmp_path / "run")]
    assert main(command) == 2
    assert f"{empty} is empty: there is no text" in " ".join(capsys.readouterr().err.split())


def test_why_a_tokenizer_cannot_be_loaded_is_said_to_the_end(tmp_path):
    new_lm().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="Give a directory with tokenizer.json") as raised:
        load_model(str(tmp_path))
    assert " ".join(str(raised.value.__cause__).split()).rstrip(".") in str(raised.value)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--prompt", ""], ["prompt is empty"]),
        (["--prompt", "alpha " * 20], ["64 positions"]),
        (["--prompt", "alpha", "--max-new-tokens", "0"], ["max_new_tokens=0"]),
        (["--prompt", "alpha", "--top-p", "1.5"], ["top_p=1.5"]),
        (["--prompt", "alpha", "--top-k", "0"], ["top_k=0", "at least 1"]),
        (["--prompt", "alpha", "--top-k", "5", "--temperature", "0"], ["--top-k", "--temperature 0", "leave one out"]),
        (["--prompt", "alpha", "--temperature", "-1"], ["temperature=-1"]),
        (["--prompt", "alpha", "--bridge", "argmax_row"], ["--denoise"]),
        (["--prompt", "alpha", "--denoise", "--bridge", "argmax"], ["argmax", "argmax_row"]),
        (["--classes", "3"], ["--classes", "language model"]),
    ],
)
def test_bad_input_of_sample_ends_in_one_clear_line(run_dir, options, words, capsys):
    assert main(["sample", str(run_dir / "model"), *options]) == 2
    error = capsys.readouterr().err
    assert all(word in error for word in words), error


def test_commands_for_images_say_so(run_dir, capsys, tmp_path):
    assert main(["encode", "pydoc-llama", "--output-dir", str(tmp_path)]) == 2
    assert "no images" in capsys.readouterr().err
    assert main(["evaluate", str(run_dir / "model"), "--recipe", "digits-dit"]) == 2
    assert "is a model of family 'causal_lm'" in capsys.readouterr().err
    assert main(["train", "digits-dit", "--block", "1", "--lower", str(run_dir / "model")]) == 2
    assert "cascade" in capsys.readouterr().err


def test_a_model_beside_another_tokenizer_is_not_sampled(run_dir, tmp_path, capsys):
    BlockedForCausalLM.from_pretrained(run_dir / "model").save_pretrained(tmp_path / "model")
    assert main(["sample", str(tmp_path / "model"), "--prompt", "alpha"]) == 2
    assert "tokenizer" in capsys.readouterr().err
    train_tokenizer("".join(map(chr, range(33, 126))), "character").save_pretrained(tmp_path / "model")
    assert main(["sample", str(tmp_path / "model"), "--prompt", "alpha"]) == 2
    assert "Use the tokenizer that the model was made with" in capsys.readouterr().err


def test_an_unknown_character_in_the_prompt_is_said_and_kept(run_dir, capsys):
    with pytest.warns(UserWarning, match="does not know"):
        from hf_diffusionblocks.jobs import sample_text

        texts = sample_text(str(run_dir / "model"), ["ÄÖ alpha "], stream=False, max_new_tokens=4)
    assert texts[0].startswith("ÄÖ alpha ")


def test_a_plan_refuses_rows_that_training_would_refuse(base_dir, text_file, capsys):
    settings = [f"model.base={base_dir}", f"data.name={text_file}", "data.block_length=4000"]
    assert main(["plan", "smollm2-finetune", *settings]) == 2
    assert "data.block_length=4000 tokens are more than the model's" in capsys.readouterr().err

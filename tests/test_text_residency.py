"""The commands on text while blocks rest in host memory or on disk: the same weights and texts as without."""

from pathlib import Path

import pytest

from hf_diffusionblocks.cli import main
from tiny_text import TEXT_RECIPE, words_file


def block_files(model_dir: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in model_dir.glob("*.safetensors")}


@pytest.fixture(scope="module")
def command(tmp_path_factory) -> list[str]:
    data = f"data.name={words_file(tmp_path_factory.mktemp('text'), 600)}"
    short = ["training.max_steps=4", "training.save_steps=5"]
    return ["train", "pydoc-llama", *TEXT_RECIPE, *short, data, "--output-dir"]


@pytest.fixture(scope="module")
def run_dir(command, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "words"
    assert main([*command, str(folder), "--no-report"]) == 0
    return folder


@pytest.mark.parametrize("home", ["host", "disk"])
def test_a_run_gives_the_weights_of_a_resident_one_and_a_report(home, command, run_dir, tmp_path):
    assert main([*command, str(tmp_path / "run"), "--residency", home]) == 0
    assert block_files(tmp_path / "run" / "model") == block_files(run_dir / "model")
    assert (tmp_path / "run" / "figures" / "samples.txt").read_text().startswith("alpha ")


def test_a_job_takes_the_trained_blocks_below_home_as_well(command, run_dir, tmp_path):
    # The blocks below are loaded into a model whose blocks are away, and must be there when this block reads them.
    lower = ["--lower", str(run_dir / "model"), "--residency", "disk", "--no-report"]
    assert main([*command, str(tmp_path / "job"), "--block", "2", *lower]) == 0
    assert block_files(tmp_path / "job" / "model") == block_files(run_dir / "model")


@pytest.mark.parametrize("extra", [["--temperature", "0.7"], ["--denoise", "--steps", "4"]])
def test_texts_are_the_same_with_one_block_on_the_device(extra, run_dir, capsys):
    texts = []
    for streaming in ([], ["--block-streaming", "host"], ["--block-streaming", "disk"]):
        options = ["--prompt", "gamma ", "--max-new-tokens", "12", *extra, *streaming]
        assert main(["sample", str(run_dir / "model"), *options]) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0].startswith("gamma ") and texts[1] == texts[0] and texts[2] == texts[0]


def test_a_file_may_not_be_larger_than_asked_for_when_blocks_are_streamed(run_dir, tmp_path):
    from hf_diffusionblocks import BlockedForCausalLM

    model = BlockedForCausalLM.from_pretrained(run_dir / "model", block_streaming="host")
    with pytest.raises(ValueError, match=r"max_shard_size=1000, and .* takes .* bytes"):
        model.save_pretrained(tmp_path / "model", max_shard_size=1000)
    assert not (tmp_path / "model").exists()

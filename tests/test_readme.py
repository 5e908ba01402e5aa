"""Every Python line of the README runs, every command in it parses, every recipe and file it names exists.

So do those of the two pages that the README's longer examples stand on, whose lines build on each other.
"""

import contextlib
import io
import re
import shlex
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from hf_diffusionblocks import BlockedDiTPipeline
from hf_diffusionblocks.cli import build_parser
from hf_diffusionblocks.data import train_tokenizer
from hf_diffusionblocks.recipes import load_recipe, recipe_names
from hf_diffusionblocks.serialization import block_file
from tiny import tiny_dit

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = ("docs/how-to/images.md", "docs/how-to/text.md")


def blocks(language: str, text: str = TEXT) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", text, flags=re.DOTALL)


def make_what_is_named(folder: Path) -> None:
    """Small models under the names of those on the Hub, and a text: directories come before the Hub."""
    name = folder / "HuggingFaceTB" / "SmolLM2-135M"
    text = "It is a truth universally acknowledged, that a single man must be in want of a wife. " * 60
    (folder / "novels.txt").write_text(text)
    tokenizer = train_tokenizer([text], "character")
    shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **shape)).save_pretrained(name)
    tokenizer.save_pretrained(name)
    BlockedDiTPipeline(tiny_dit(num_blocks=3, num_layers=3)).save_pretrained(folder / "user" / "digits-dit")


def commands() -> list[str]:
    lines = [line.split("#")[0].strip() for block in blocks("bash") for line in block.splitlines()]
    inline = [re.sub(r"\s+", " ", c) for c in re.findall(r"`(diffusionblocks [^`]+)`", TEXT)]
    return [c for c in [*lines, *inline] if c.startswith("diffusionblocks ")]


@pytest.fixture(scope="module")
def ran(tmp_path_factory) -> dict:
    """What the Python blocks leave, run in order, and what they print (``said``) and write (``folder``)."""
    folder, said, left = tmp_path_factory.mktemp("readme"), io.StringIO(), {}
    make_what_is_named(folder)
    with contextlib.chdir(folder), contextlib.redirect_stdout(said):
        for name in ("README.md", *PAGES):
            namespace: dict = {}
            for block in blocks("python", (ROOT / name).read_text(encoding="utf-8")):
                exec(block, namespace)
            left[name] = namespace
    return (
        {"readme": left["README.md"], **left[PAGES[0]], "said": said.getvalue(), "folder": folder}
        | {name: left[PAGES[1]][name] for name in ("half", "config", "prompt")}
        | {"language_model": left[PAGES[1]]["model"]}
    )


def test_the_quick_starts_are_short_and_do_what_they_say(ran):
    assert all(sum(map(bool, block.splitlines())) < 10 for block in blocks("python"))  # blank lines aside
    readme = ran["readme"]
    assert readme["block"].resident_blocks == (1,) and len(readme["images"]) == 4
    again = AutoModelForCausalLM.from_pretrained(ran["folder"] / "runs" / "novels" / "base")
    base = AutoModelForCausalLM.from_pretrained(ran["folder"] / readme["base"])
    assert type(again) is LlamaForCausalLM
    assert not torch.equal(again.model.layers[1].mlp.up_proj.weight, base.model.layers[1].mlp.up_proj.weight)  # trained


def test_python_blocks_run_in_order(ran):
    assert len(ran["images"]) == 4
    assert ran["block"].resident_blocks == (1,)
    assert ran["half"].dtype == torch.bfloat16


def test_the_callback_sees_every_step_and_its_block(ran):
    steps = re.findall(r"step (\d) from sigma ([\d.]+), block (\d)", ran["said"])
    assert [int(step) for step, _, _ in steps] == list(range(6))
    assert [int(block) for *_, block in steps] == sorted(int(block) for *_, block in steps)
    assert float(steps[0][1]) == ran["pipe"].model.partition.edges[0] == 80


def test_merged_blocks_are_the_model(ran):
    whole, merged = (ran["folder"] / "runs" / name for name in ("mine/model", "mine-merged"))
    for b in range(3):
        assert (whole / block_file(b)).read_bytes() == (merged / block_file(b)).read_bytes()


def test_diffusers_own_loader_does_not_find_the_pipeline(ran):
    """As the README says. Should diffusers find it one day, the sentence can go."""
    directory = ran["folder"] / "runs" / "mine" / "model"
    BlockedDiTPipeline(ran["pipe"].model).save_index(directory)
    with pytest.raises(AttributeError, match="diffusers has no attribute BlockedDiTPipeline"):
        DiffusionPipeline.from_pretrained(directory)
    assert isinstance(BlockedDiTPipeline.from_pretrained(directory), BlockedDiTPipeline)


def test_a_cache_of_another_batch_is_refused_by_its_size_only(ran):
    model = ran["language_model"].eval()
    ours, theirs = torch.tensor([[1, 2, 3], [4, 5, 6]]), torch.tensor([[7, 8, 9], [10, 11, 12]])
    next_token = torch.tensor([[13], [14]])
    known = model(torch.cat([ours, next_token], dim=1)).logits[:, -1]
    for batch, same in ((ours, True), (theirs, False)):
        cache = model(batch, use_cache=True).past_key_values
        logits = model(next_token, past_key_values=cache).logits[:, -1]
        assert torch.allclose(logits, known, atol=1e-5) == same
    with pytest.raises(ValueError, match="it is another batch's cache"):
        model(next_token[:1], past_key_values=model(ours, use_cache=True).past_key_values)


def test_there_are_commands():
    assert len(commands()) >= 5


@pytest.mark.parametrize("command", commands())
def test_commands_parse(command):
    words = shlex.split(command)[1:]
    if len(words) == 1:  # a command named in passing
        assert words[0] in build_parser().format_help()
        return
    args = build_parser().parse_args(words)
    if getattr(args, "recipe", None):
        assert args.recipe in recipe_names()
        load_recipe(args.recipe, args.overrides)


def test_make_targets_and_files_exist():
    makefile = (ROOT / "Makefile").read_text()
    targets = re.findall(r"^make ([a-z-]+)", "".join(blocks("bash")), flags=re.MULTILINE)
    assert {"demo", "test"} <= set(targets)
    for target in targets:
        assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE), target
    for name in re.findall(r"\]\((docs/[^)]+)\)", TEXT) + re.findall(r"`(notebooks/[^`]+)`", TEXT):
        assert (ROOT / name.split("#")[0]).is_file(), name
    for script in re.findall(r"python (benchmarks/\w+\.py)", TEXT):
        assert (ROOT / script).is_file(), script

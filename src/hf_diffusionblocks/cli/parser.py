"""The arguments of every command, with examples."""

import argparse
import platform
from collections.abc import Sequence
from typing import Any

from .. import __version__
from ..base_names import CUT_FROM, what_can_be_cut
from ..versions import versions

_DESCRIPTION = """\
Train a network block by block, at 1/B of the memory (DiffusionBlocks, arXiv 2506.14202).

A run is described by a recipe, a YAML preset; any setting can be overridden with section.key=value:

  diffusionblocks plan digits-dit                        what a step will hold in memory
  diffusionblocks train digits-dit                       train, save, draw and score
  diffusionblocks train digits-dit blocks.num_blocks=2 training.max_steps=500
  diffusionblocks watch runs/digits-dit                  a live page of the run
  diffusionblocks sample runs/digits-dit/model --classes 3 3 7
  diffusionblocks evaluate runs/digits-dit/model --recipe digits-dit
  diffusionblocks train pydoc-llama                      the same for text
  diffusionblocks sample runs/pydoc-llama/model --prompt "The "
"""

_EPILOG = """\
exit codes: 0 done; 1 a run failed; 2 bad input (one line on stderr says what, and how to mend it); 130 interrupted
"""


def build_parser() -> argparse.ArgumentParser:
    """The parser of all commands."""
    parser = argparse.ArgumentParser(
        prog="diffusionblocks",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action=_Version, nargs=0, help="print this library's version and those below it")
    _add_habits(parser, default=False)
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    for add in (_add_plan, _add_train, _add_sample, _add_evaluate, _add_convert, _add_encode):
        add(commands)
    for add in (_add_merge, _add_card, _add_push, _add_watch, _add_demo, _add_recipes, _add_completion):
        add(commands)
    return parser


class _Version(argparse.Action):
    """Print versions, as a report of a bug needs them, and end. What is installed is asked, and not imported."""

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        below = {name: version for name, version in versions().items() if name != "hf-diffusionblocks"}
        named = [f"{name} {version}" for name, version in (below | {"Python": platform.python_version()}).items()]
        print(f"hf-diffusionblocks {__version__}\n{', '.join(named)}")
        parser.exit()


def _add_habits(parser: argparse.ArgumentParser, default: Any = argparse.SUPPRESS) -> None:
    """Options of every command, which may stand before or after its name."""
    parser.add_argument("--debug", action="store_true", default=default, help="show the whole traceback of an error")
    parser.add_argument("-q", "--quiet", action="store_true", default=default, help="print errors only")
    parser.add_argument("-v", "--verbose", action="store_true", default=default, help="log what is done, to stderr")
    parser.add_argument(
        "--import",
        dest="imports",
        metavar="MODULE",
        default=default,
        action="append" if default is argparse.SUPPRESS else "store",
        help="a module, or a .py file, that registers families of your own; read first (repeatable)",
    )


def _add_json(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print the result as JSON, and nothing else, to stdout")


def _command(commands: Any, name: str, summary: str, examples: str, json: bool = True) -> argparse.ArgumentParser:
    parser = commands.add_parser(
        name,
        help=summary,
        description=summary,
        epilog=f"examples:\n{examples}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    _add_habits(parser)
    if json:
        _add_json(parser)
    return parser


def _add_recipe(parser: argparse.ArgumentParser, option: bool = False) -> None:
    help_text = "a recipe's name (see `diffusionblocks recipes`) or a YAML file"
    if option:
        parser.add_argument("--recipe", help=help_text + "; default: the one the model was trained with")
    else:
        parser.add_argument("recipe", nargs="?", help=help_text)
    parser.add_argument("--data", metavar="PATH", help="your own data, images or text; chooses the recipe")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="settings that replace the recipe's")


def _add_plan(commands: Any) -> None:
    parser = _command(
        commands,
        "plan",
        "Print the partition, the parameters by block and what a training step holds, without allocating the model, "
        "beside what other methods (checkpointing, 8-bit Adam, LoRA, BAdam, ...) hold, alone and with one block. "
        "For text also what training costs, and whether blocks pay in your case.",
        "  diffusionblocks plan imagenet256-dit-l2\n"
        "  diffusionblocks plan lm1b-llama training.max_steps=100000\n"
        "  diffusionblocks plan digits-dit training.optim=adafactor training.gradient_release=true "
        "training.max_grad_norm=0\n"
        "  diffusionblocks plan cifar10-dit-s2 blocks.num_blocks=6 training.per_device_train_batch_size=64",
    )
    _add_recipe(parser)


def _add_train(commands: Any) -> None:
    parser = _command(
        commands,
        "train",
        "Train a model by a recipe. Started again after a kill, it goes on from the last checkpoint.",
        "  diffusionblocks train digits-dit\n"
        "  diffusionblocks train digits-dit --method end_to_end        # all L layers at once, the same compute\n"
        "  diffusionblocks train digits-dit --method shallow --match compute   # L/B layers, B times the updates\n"
        "  diffusionblocks train digits-dit --block 1                  # a job that holds block 1 only\n"
        "  diffusionblocks train --data path/to/imagefolder            # your own images, a folder per class\n"
        "  diffusionblocks train --data novels.txt training.max_steps=500\n"
        "  diffusionblocks train austen-llama --data novels.txt        # the same recipe by name\n"
        "  diffusionblocks train pydoc-llama --block 1 --lower runs/block-0/model --output-dir runs/block-1",
    )
    _add_recipe(parser)
    parser.add_argument("--output-dir", help="where checkpoints, the model and figures go; default runs/<recipe>")
    parser.add_argument("--method", choices=("blocked", "end_to_end", "shallow"), help="blocked training or a baseline")
    parser.add_argument("--match", choices=("updates", "compute"), help="what a baseline matches")
    parser.add_argument("--layers", type=int, help="layers of --method shallow; default L/B, rounded up")
    parser.add_argument("--block", type=int, action="append", help="hold and train this block only (repeatable)")
    parser.add_argument(
        "--residency",
        choices=("device", "host", "disk"),
        help="where blocks rest while others train; host and disk keep one block's state on the device",
    )
    parser.add_argument("--lower", metavar="DIR", help="a saved model with the trained blocks below (cascade)")
    parser.add_argument("--overwrite", action="store_true", help="start anew instead of going on from a checkpoint")
    parser.add_argument("--no-report", action="store_true", help="do not sample, draw and score at the end")
    parser.add_argument("--dry-run", action="store_true", help="print the plan and where it would go; write nothing")


def _add_sample(commands: Any) -> None:
    parser = _command(
        commands,
        "sample",
        "Sample from a saved model: images, one block per step; or text, printed as it comes.",
        "  diffusionblocks sample runs/digits-dit/model\n"
        "  diffusionblocks sample runs/digits-dit/model --classes 1 2 3 --per-class 8 --steps 30 --solver heun\n"
        '  diffusionblocks sample runs/pydoc-llama/model --prompt "The " --temperature 0.7 --max-new-tokens 300\n'
        '  diffusionblocks sample runs/pydoc-llama/model --prompt "The " --denoise --steps 6 --bridge argmax_row\n'
        '  diffusionblocks sample runs/pydoc-md4/model --prompt "The <mask:40> module" --max-new-tokens 0',
    )
    parser.add_argument("model", help="directory or Hub id of a blocked model")
    parser.add_argument(
        "--steps",
        type=int,
        help="steps; default 50 for images, one per block for text; of a recurrent model recurrences",
    )
    parser.add_argument("--grid", help="karras (default for images) or equal_probability (default for text)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--block-streaming", choices=("host", "disk"), help="keep one block's weights on the device, the others there"
    )
    images = parser.add_argument_group("images")
    images.add_argument("--output-dir", help="where the PNG files go (default: samples)")
    images.add_argument("--classes", type=int, nargs="+", help="class labels; default: the first ten")
    images.add_argument("--per-class", type=int, help="images per label (default: 1)")
    images.add_argument("--guidance-scale", type=float, help="1: no guidance (default: 2.0)")
    images.add_argument("--solver", help="euler or heun (default: euler)")
    text = parser.add_argument_group("text")
    text.add_argument("--prompt", action="append", help="what to go on from (repeatable); default: the recipe's")
    text.add_argument("--max-new-tokens", type=int, help="tokens to add")
    text.add_argument("--temperature", type=float, help="0: always the likeliest token")
    text.add_argument("--top-k", type=int, help="draw from so many of the likeliest tokens")
    text.add_argument("--top-p", type=float, help="draw from the likeliest tokens that hold so much probability")
    text.add_argument("--denoise", action="store_true", help="sample along the noise grid instead of decoding from f")
    text.add_argument("--bridge", help="posterior_mean or argmax_row (with --denoise)")
    text.add_argument("--order", help="of a masked model: random or confidence; <mask:12> in a prompt is a gap")


def _add_evaluate(commands: Any) -> None:
    parser = _command(
        commands,
        "evaluate",
        "Score a saved model. Images: held-out loss, Frechet and kernel distance, precision, recall, class agreement. "
        "Text: held-out likelihood, in bits per character. Or print a table of the paper, with --table.",
        "  diffusionblocks evaluate runs/digits-dit/model\n"
        "  diffusionblocks evaluate runs/pydoc-llama/model evaluation.rows=100\n"
        "  diffusionblocks evaluate user/model --recipe digits-dit evaluation.num_samples=2000 --output figures.json\n"
        "  diffusionblocks evaluate --table             # which tables there are\n"
        "  diffusionblocks evaluate --table vit         # or by its number in that list: --table 1",
    )
    parser.add_argument("model", nargs="?", help="directory or Hub id of a blocked model")
    parser.add_argument(
        "--table",
        nargs="?",
        const="list",
        metavar="NAME|NUMBER",
        help="print the paper's figures with the commands that make ours at its setting, and apart from them what "
        "small settings gave; scores nothing. The numbers are those of this command's list, not of the paper's tables. "
        "'list' (or nothing) names all",
    )
    _add_recipe(parser, option=True)
    parser.add_argument("--output", help="also write the figures to this JSON file")
    parser.add_argument("--seed", type=int, help="of everything random (default: 0)")


_CONVERT = "Cut a pretrained model into blocks and save it. " + what_can_be_cut()
_CONVERT_SETTINGS = "fields of the blocked model's config; dtype, revision, token, cache_dir: how to load the base"


def _add_convert(commands: Any) -> None:
    parser = _command(
        commands,
        "convert",
        _CONVERT,
        "  diffusionblocks convert facebook/DiT-XL-2-256 --num-blocks 4 --output-dir dit-xl-4\n"
        "  diffusionblocks convert HuggingFaceTB/SmolLM2-135M --num-blocks 3 --output-dir smollm2-3\n"
        "  diffusionblocks convert google/vit-base-patch16-224 --num-blocks 3 --output-dir vit-3 --dry-run\n"
        "  diffusionblocks convert google-bert/bert-base-cased --num-blocks 3 --output-dir bert-3\n"
        "  diffusionblocks convert HuggingFaceTB/SmolLM2-135M --family recurrent --output-dir smollm2-core "
        "num_recurrences=4\n"
        "  diffusionblocks convert path/to/dit --num-blocks 3 --output-dir out preconditioning=edm overlap=0.1",
    )
    parser.add_argument("base", help="directory or Hub id of a pretrained model")
    parser.add_argument("settings", nargs="*", metavar="key=value", help=_CONVERT_SETTINGS)
    parser.add_argument("--num-blocks", type=int, help="B (default: 3; a recurrent core is one block)")
    parser.add_argument(
        "--family",
        choices=tuple(CUT_FROM),
        help="default: that of the base; recurrent makes a decoder a recurrent core",
    )
    parser.add_argument("--output-dir", required=True, help="a new directory")
    parser.add_argument("--dry-run", action="store_true", help="say what would be written; loads no weight")


def _add_encode(commands: Any) -> None:
    parser = _command(
        commands,
        "encode",
        "Encode a recipe's images with its VAE and keep the latents, to train on them.",
        "  diffusionblocks encode imagenet256-dit-l2 data.name=ILSVRC/imagenet-1k --output-dir latents/train",
    )
    _add_recipe(parser)
    parser.add_argument("--split", default="train", help="which split (default: %(default)s)")
    parser.add_argument("--output-dir", required=True, help="where the latents go")
    parser.add_argument("--batch-size", type=int, default=32)


def _add_merge(commands: Any) -> None:
    parser = _command(
        commands,
        "merge",
        "Make one checkpoint out of jobs that trained one block each.",
        "  diffusionblocks merge runs/block-0 runs/block-1 runs/block-2 --output-dir runs/merged\n"
        "  diffusionblocks merge runs/block-* --output-dir runs/merged --wait 3600   # for jobs that still run\n"
        "  diffusionblocks merge runs/block-* --output-dir runs/merged --dry-run     # check, and write nothing",
    )
    parser.add_argument("directories", nargs="+", metavar="DIR", help="a job's run or the model that it saved")
    parser.add_argument("--output-dir", required=True, help="a new or empty directory")
    parser.add_argument("--wait", type=float, default=0, metavar="SECONDS", help="for blocks that are not there yet")
    parser.add_argument("--dry-run", action="store_true", help="check everything and write nothing")


def _add_push(commands: Any) -> None:
    parser = _command(
        commands,
        "push",
        "Send a saved model, or some of its blocks, to the Hub. The token is that of `hf auth login` or HF_TOKEN.",
        "  diffusionblocks push runs/digits-dit/model user/digits-dit --dry-run\n"
        "  diffusionblocks push runs/block-1/model user/digits-dit --block 1   # others push the other blocks",
    )
    parser.add_argument("model", help="directory of a saved model")
    parser.add_argument("repo_id", help="user/model, or model alone if you are logged in; made if it does not exist")
    parser.add_argument("--block", type=int, action="append", help="send this block only (repeatable); default: all")
    parser.add_argument("--revision", help="a branch; made if it does not exist")
    parser.add_argument("--message", help="of the commit")
    parser.add_argument("--private", action="store_true", default=None, help="if the repository is new")
    parser.add_argument("--create-pr", action="store_true", help="open a pull request instead")
    parser.add_argument("--dry-run", action="store_true", help="only tell what would be sent")


def _add_card(commands: Any) -> None:
    parser = _command(
        commands,
        "card",
        "Write the model card of a finished run anew, from the run's own files; nothing is scored again.",
        "  diffusionblocks card runs/digits-dit                        # into runs/digits-dit/model\n"
        "  diffusionblocks card runs/digits-dit --output model_cards/digits-dit.md",
    )
    parser.add_argument("run", metavar="RUN", help="the directory of a finished run")
    parser.add_argument("--output", metavar="FILE", help="a Markdown file, instead of the model's README.md")


def _port(text: str) -> int:
    if not (text.isascii() and text.isdigit() and 0 < int(text) < 65536):
        raise argparse.ArgumentTypeError(f"{text!r} is no port: give a number from 1 to 65535")
    return int(text)


def _add_watch(commands: Any) -> None:
    parser = _command(
        commands,
        "watch",
        "Show a run as a live page: losses, blocks, samples, time left. Ctrl-C ends the page, not the run.",
        "  diffusionblocks watch runs/digits-dit                       # before, while or after it trains\n"
        "  diffusionblocks watch runs/digits-dit --port 8000 --no-browser   # then: ssh -L 8000:127.0.0.1:8000 machine",
        json=False,
    )
    parser.add_argument("run", metavar="RUN", help="the run's directory; it need not be there yet")
    parser.add_argument("--port", type=_port, metavar="N", help="of the page, on 127.0.0.1; default: a free one")
    parser.add_argument("--no-browser", action="store_true", help="print the address only")


def _add_demo(commands: Any) -> None:
    parser = _command(
        commands,
        "demo",
        "Show a page that samples a blocked DiT and shows which block works at each step. Needs the extra [demo].",
        "  diffusionblocks demo runs/digits-dit/model                  # on 127.0.0.1; Ctrl-C ends it\n"
        "  diffusionblocks demo user/model --port 7860 --no-browser --block-streaming disk\n"
        "  diffusionblocks demo user/model --space my-space            # the files of a Space on the Hub",
        json=False,
    )
    parser.add_argument("model", help="directory or Hub id of a blocked DiT")
    parser.add_argument("--port", type=_port, metavar="N", help="of the page, on 127.0.0.1; default: a free one")
    parser.add_argument("--no-browser", action="store_true", help="print the address only")
    parser.add_argument(
        "--block-streaming", choices=("host", "disk"), help="keep one block's weights on the device, the others there"
    )
    parser.add_argument("--space", metavar="DIR", help="write the files of a Space there, and show no page")


def _add_recipes(commands: Any) -> None:
    parser = _command(
        commands,
        "recipes",
        "List the recipes that come with the package.",
        "  diffusionblocks recipes\n"
        "  accelerate launch --config_file $(diffusionblocks recipes --path accelerate/blocks.yaml) "
        "-m hf_diffusionblocks train cifar10-dit-s2\n"
        "  sh $(diffusionblocks recipes --path scripts/jobs.sh) digits-dit 3 runs/jobs",
    )
    parser.add_argument(
        "--path", metavar="NAME", help="where a recipe, a config of Accelerate or a script lies; 'list' names them"
    )


def _add_completion(commands: Any) -> None:
    parser = _command(
        commands,
        "completion",
        "Print what makes a shell complete these commands and options.",
        '  eval "$(diffusionblocks completion bash)"                   # for this shell; or in ~/.bashrc\n'
        "  diffusionblocks completion zsh > ~/.zfunc/_diffusionblocks",
        json=False,
    )
    parser.add_argument("shell", choices=("bash", "zsh", "tcsh"))


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The arguments. argparse ends a list of settings at the first option; those after it belong to it as well."""
    parser = build_parser()
    args, rest = parser.parse_known_args(argv)
    settings = getattr(args, "overrides", getattr(args, "settings", None))
    if rest and (settings is None or any(text.startswith("-") or "=" not in text for text in rest)):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest and settings is not None:
        settings += rest
    if getattr(args, "data", None) is not None and "=" in (args.recipe or ""):  # no recipe: the first of the settings
        args.recipe, args.overrides = None, [args.recipe, *args.overrides]
    return args

"""What each command does with its arguments: it calls ``hf_diffusionblocks.jobs``."""

import argparse
import dataclasses
import json
import logging
import os
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

Say = Callable[[str], None]


def run(args: argparse.Namespace) -> Any:
    """Run a command; returns what ``--json`` prints."""
    seed = getattr(args, "seed", None) or 0
    if not -(2**63) <= seed < 2**63:
        raise ValueError(f"--seed {seed} must lie between -2^63 and 2^63 - 1.")
    if args.quiet:
        _hide_progress()
    elif not sys.stderr.isatty():
        _calm_progress()
    if args.verbose:
        logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s: %(message)s")
    silent = args.quiet or getattr(args, "json", False)
    return COMMANDS[args.command](args, (lambda line: None) if silent else print)


def _calm_progress() -> None:
    """Where stderr is a file: a run's bar writes a line a minute, the short bars of other libraries nothing."""
    os.environ.setdefault("TQDM_MININTERVAL", "60")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")


def _hide_progress() -> None:
    """No progress bars, of this library and of those that it calls."""
    os.environ["TQDM_DISABLE"] = "1"  # read when tqdm is imported, which no command has done yet
    os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
    import datasets
    from transformers.utils.logging import disable_progress_bar

    datasets.disable_progress_bars()
    disable_progress_bar()


def _recipe(args: argparse.Namespace, say: Say) -> Any:
    """The recipe that is named, or the one for ``--data``, with its overrides."""
    from ..recipes import load_recipe
    from ..recipes.own_data import SCORED_ON_TRAINING, recipe_for

    overrides, name = list(args.overrides), args.recipe
    chosen: list[str] = []
    if args.data is not None:
        if name is None:
            name, chosen = recipe_for(args.data)
            say(f"recipe {name} {' '.join(chosen)}")
            overrides = [*chosen, *overrides]
        else:
            overrides = [f"data.name={json.dumps(args.data)}", *overrides]
    elif name is None:
        raise ValueError(
            "name a recipe, such as digits-dit (`diffusionblocks recipes` lists them), or give your own data: "
            "--data PATH."
        )
    overrides += [
        f"{name}={value}" for name in ("method", "match", "layers") if (value := getattr(args, name, None)) is not None
    ]
    recipe = load_recipe(name, overrides)
    if SCORED_ON_TRAINING in chosen and recipe.data.test_fraction is None and recipe.data.test_files is None:
        say("warning: so few images leave none to hold out: scores are of the training images.")
    return recipe


def _plan(args: argparse.Namespace, say: Say) -> Any:
    from .. import jobs

    planned = jobs.plan(_recipe(args, say), say=say)
    say(f"\nnext: diffusionblocks train {_words(args)}")
    return planned


def _words(args: argparse.Namespace, **settings: Any) -> str:
    """The recipe, data and settings of a command line, for another command; ``settings`` are its options."""
    named = [*([args.recipe] if args.recipe else []), *(["--data", args.data] if args.data else [])]
    chosen = [f"{name}={value}" for name, value in settings.items() if value is not None]
    return shlex.join([*named, *args.overrides, *chosen])


def _train(args: argparse.Namespace, say: Say) -> Any:
    from .. import jobs
    from ..run_names import REPORT_NAME
    from ..training.run_files import overwrite_run

    recipe = _recipe(args, say)
    if args.residency is not None:
        recipe.training["residency"] = args.residency
    if args.quiet:
        recipe.training["disable_tqdm"] = True
    if args.output_dir is not None:
        recipe.training["output_dir"] = args.output_dir
    elif "output_dir" not in recipe.training:
        suffix = "" if recipe.method == "blocked" else f"-{recipe.method}-{recipe.match}"
        suffix += f"-{recipe.layers}" if recipe.layers else ""
        recipe.training["output_dir"] = os.path.join("runs", recipe.name + suffix)
    output = Path(recipe.training["output_dir"])
    if args.dry_run:
        planned = jobs.plan(recipe, say=say, short=True, blocks=args.block, lower=args.lower, report=not args.no_report)
        words = _words(args, method=args.method, match=args.match, layers=args.layers)
        say(f"\nthe whole table, with other methods beside it: diffusionblocks plan {words}")
        say(f"dry run: would train in {output}; nothing was written.")
        return {"output_dir": str(output), "plan": planned}
    if args.overwrite and os.environ.get("RANK", "0") == "0":  # the other processes of a run wait for this one
        overwrite_run(output)
    model_dir = jobs.train(
        recipe, blocks=args.block, lower=args.lower, report=not args.no_report, say=say, command=_train_command(args)
    )
    figures = output / "figures" / "figures.json"
    given: dict[str, Any] = {"output_dir": str(output), "model": str(model_dir)}
    page = model_dir.parent / REPORT_NAME
    given["report"] = str(page) if page.is_file() and not args.no_report else None
    known = json.loads(figures.read_text(encoding="utf-8")) if figures.is_file() and not args.no_report else None
    if args.block is None:
        say(f"\nnext: {jobs.next_command(recipe, model_dir)}")
    return given | {"figures": known}


def _train_command(args: argparse.Namespace) -> str:
    """What made a model, for its card: without what says nothing of the model, such as where it was written."""
    settings = {name: getattr(args, name) for name in ("method", "match", "layers")}
    words = [f"--block {block}" for block in args.block or ()]
    words += [f"--lower {shlex.quote(args.lower)}"] if args.lower else []
    return " ".join(["diffusionblocks train", _words(args, **settings), *words])


def _card(args: argparse.Namespace, say: Say) -> Any:
    from .. import jobs

    path = jobs.card(args.run, args.output, say=say)
    say(f"next: diffusionblocks push {Path(args.run) / 'model'} user/model --dry-run")
    return {"card": str(path)}


def _sample(args: argparse.Namespace, say: Say) -> Any:
    from .sampling import sample

    made = sample(args, say)
    if Path(args.model).is_dir():
        say(f"next: diffusionblocks evaluate {args.model}")
    return made


def _print_table(args: argparse.Namespace, say: Say) -> Any:
    from ..paper_tables import formatting

    given = (args.overrides, args.recipe, args.data, args.output)
    if args.model is not None or any(given) or args.seed is not None:
        raise ValueError(
            f"--table {args.table} prints figures that are known and scores nothing: leave out the model, --recipe, "
            "--data, --output, --seed and settings."
        )
    if args.table == "list":
        say(formatting.format_list())
        return formatting.list_values()
    say(formatting.format_table(args.table))
    return formatting.table_values(args.table)


def _evaluate(args: argparse.Namespace, say: Say) -> Any:
    if args.table is not None:
        return _print_table(args, say)
    if args.model is None:
        raise ValueError("name a model, such as runs/digits-dit/model, or print a table: --table NAME.")
    from .. import jobs
    from ..recipes import load_recipe, make_recipe

    overrides = list(args.overrides)
    if args.data is not None:
        overrides = [f"data.name={json.dumps(args.data)}", *overrides]
    if args.recipe is not None:
        recipe = load_recipe(args.recipe, overrides)
    else:
        jobs.check_model_path(args.model)
        values = jobs.read_recipe_of(args.model)
        if values is None and not Path(args.model).is_dir():
            raise ValueError(
                f"there is no directory {args.model}. If it is a model on the Hub, name the recipe that has its data "
                "with --recipe: none lies beside it."
            )
        if values is None:
            raise ValueError(f"no recipe lies beside {args.model}: name one with --recipe.")
        recipe = make_recipe(values, overrides)
    figures = jobs.evaluate(args.model, recipe, args.output, args.seed or 0, say=say)
    if Path(args.model).is_dir():
        say(f"\nnext: diffusionblocks push {args.model} user/model --dry-run")
    return figures


def _convert(args: argparse.Namespace, say: Say) -> Any:
    from .. import jobs

    settings = {} if args.num_blocks is None else {"num_blocks": args.num_blocks}
    settings |= _settings(args.settings)
    dry = args.dry_run
    made = jobs.convert(args.base, args.output_dir, settings, say=say, family=args.family, dry_run=dry)
    say(
        "next: the same without --dry-run"
        if dry
        else f"next: diffusionblocks push {made['model']} user/model --dry-run"
    )
    return made


def _encode(args: argparse.Namespace, say: Say) -> Any:
    from .. import jobs

    target = jobs.encode(_recipe(args, say), args.output_dir, args.split, args.batch_size, say=say)
    return {"latents": str(target)}


def _merge(args: argparse.Namespace, say: Say) -> Any:
    from .. import jobs

    merged = jobs.merge(args.directories, args.output_dir, wait=args.wait, dry_run=args.dry_run, say=say)
    if args.dry_run:
        return {"model": str(merged), "dry_run": True}
    say(f"merged in {merged}")
    say(f"next: diffusionblocks sample {merged}")
    return {"model": str(merged)}


def _push(args: argparse.Namespace, say: Say) -> Any:
    from ..repository import push_directory

    push = push_directory(
        args.model,
        args.repo_id,
        blocks=args.block,
        revision=args.revision,
        private=args.private,
        commit_message=args.message,
        create_pr=args.create_pr,
        dry_run=args.dry_run,
    )
    say(str(push))
    if push.commit is not None or (push.files and not args.dry_run):
        say(f"next: diffusionblocks sample {push.repo_id}")
    return dataclasses.asdict(push)


def _watch(args: argparse.Namespace, say: Say) -> None:
    from ..report import watch

    watch(Path(args.run), args.port, not args.no_browser, say=say)


def _demo(args: argparse.Namespace, say: Say) -> None:
    from .. import demo, jobs

    if args.space is not None:
        for path in demo.write_space(args.model, args.space):
            say(str(path))
        say(f"next: hf upload user/{Path(args.space).name} {args.space} --repo-type space")
        return
    jobs.check_model_path(args.model)
    demo.serve(args.model, args.port, not args.no_browser, args.block_streaming, say=say)


def _recipes(args: argparse.Namespace, say: Say) -> Any:
    from ..recipes import recipe_names, recipe_path

    if args.path is not None:
        path = recipe_path(args.path)
        say(path)
        return path.split("\n") if args.path == "list" else path
    names = recipe_names()
    say("\n".join(names))
    return names


def _completion(args: argparse.Namespace, say: Say) -> Any:
    from .completion import completion_script
    from .parser import build_parser

    say(completion_script(build_parser(), args.shell))


def _settings(pairs: list[str]) -> dict[str, Any]:
    import yaml

    settings = {}
    for pair in pairs:
        key, separator, value = pair.partition("=")
        if not separator:
            raise ValueError(f"setting {pair!r} must look like key=value.")
        try:
            settings[key] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise ValueError(f"setting {pair!r}: {value!r} is not valid YAML; put text in quotes.") from error
    return settings


COMMANDS: dict[str, Callable[[argparse.Namespace, Say], Any]] = {
    "plan": _plan,
    "train": _train,
    "sample": _sample,
    "evaluate": _evaluate,
    "convert": _convert,
    "encode": _encode,
    "merge": _merge,
    "card": _card,
    "push": _push,
    "watch": _watch,
    "demo": _demo,
    "recipes": _recipes,
    "completion": _completion,
}

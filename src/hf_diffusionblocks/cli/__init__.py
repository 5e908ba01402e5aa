"""The command line: parses and calls ``hf_diffusionblocks.jobs``. Heavy imports wait until a command runs."""

import argparse
import os
import sys
import warnings
from collections.abc import Sequence

from ..strict_json import known, to_json
from .own_modules import import_own_modules
from .parser import build_parser, parse

_AFTER_CTRL_C = {
    "train": "Run the same command again to go on.",
    "sample": "Run the same command again for all of it: it draws the same samples.",
    "evaluate": "The model is as it was; feature networks and statistics that were made are kept in its cache. Run the "
    "same command again for the figures.",
    "merge": "Nothing half written stays. Run the same command again.",
    "convert": "Nothing half written stays. Run the same command again.",
    "push": "Commits arrive whole or not at all. Run the same command again to go on.",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit code.

    What a command has to say goes to stdout, with ``--json`` as one JSON value; progress bars and errors to stderr.
    """
    try:
        import_own_modules(argv)
    except ValueError as error:
        print(f"diffusionblocks: {error}", file=sys.stderr)
        return 2
    args = parse(argv)
    with warnings.catch_warnings():
        if not args.debug:
            warnings.showwarning = _show_warning
        return _run(args)


def _show_warning(message: Warning | str, *place: object, **more: object) -> None:
    """A warning as one line on stderr, without the line of Python that it comes from."""
    print(f"warning: {' '.join(str(message).split())}", file=sys.stderr)


def _run(args: argparse.Namespace) -> int:
    """Run a command that is parsed; returns the exit code."""
    try:
        from .commands import run

        result = run(args)
        if getattr(args, "json", False):
            print(to_json(known(result), indent=2, default=str))
        sys.stdout.flush()
    except BrokenPipeError:  # the reader of a pipe, such as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what python flushes at exit
    except KeyboardInterrupt as error:
        print(f"\ninterrupted. {error or ''}".rstrip(), file=sys.stderr)
        print(_AFTER_CTRL_C.get(args.command, "Run the same command again."), file=sys.stderr)
        return 130
    except (ValueError, OSError, RuntimeError) as error:
        if args.debug:
            raise
        print(f"diffusionblocks {args.command}: {error}", file=sys.stderr)
        return 2 if isinstance(error, ValueError) else 1
    return 0


__all__ = ["build_parser", "main", "parse"]

"""The `wan-ar` command: finds the subcommand, runs it, and turns every failure into one line and an exit code.

Exit codes: 0 done; 2 the input was wrong and nothing was written; 1 something failed on the way; 130 Ctrl-C.
"""

from __future__ import annotations

import argparse
import errno
import importlib
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from difflib import get_close_matches
from typing import Any, NoReturn

from wan_autoregressive._version import __version__

# Subcommand -> module with `add_parser(subparsers)` and `run(args) -> int`, and its line in the help. Only the module
# of the subcommand that is asked for is imported, since most of them import torch.
COMMANDS = {
    "generate": ("wan_autoregressive.scripts.generate", "render a video from a prompt"),
    "convert": ("wan_autoregressive.scripts.convert", "make a checkpoint folder from published weights"),
    "estimate": ("wan_autoregressive.scripts.estimate", "compute the memory and the FLOPs of a model of any size"),
    "benchmark": ("wan_autoregressive.scripts.benchmark", "measure the seconds of every stage with random weights"),
}

# OSErrors that say the machine gave out, rather than that a name was wrong.
_MACHINE_ERRNOS = {errno.EDQUOT, errno.EIO, errno.EFBIG, errno.ENOMEM, errno.EMFILE, errno.ENFILE}


class OneLineParser(argparse.ArgumentParser):
    """An argument parser whose errors are a single line, and which never guesses at shortened flags."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        kwargs.setdefault("allow_abbrev", False)
        super().__init__(*args, **kwargs)

    def error(self, message: str) -> NoReturn:
        """Print the line and leave with exit code 2."""
        print_error(f"{message} (see {self.prog} --help)")
        sys.exit(2)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command with `argv` (default: the process's arguments) and return its exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        parser = build_parser(arguments)
        args, unknown = parser.parse_known_args(arguments)
        if unknown:
            parser.error(_unknown_flag(parser, unknown[0]))
    except Exception as error:
        print_error(describe_error(error))
        return 1
    run: Callable[[argparse.Namespace], int] = args.run
    try:
        code = run(args)
        sys.stdout.flush()
        return code
    except BaseException as error:
        if isinstance(error, SystemExit):
            raise
        if args.debug:
            traceback.print_exc()
        if isinstance(error, BrokenPipeError):
            # Whoever read our output has left; nobody is there to be told, and flushing at exit would fail again.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 1
        print_error(describe_error(error))
        return exit_code(error)


def build_parser(arguments: Sequence[str]) -> argparse.ArgumentParser:
    """Build the parser: in full for the subcommand that `arguments` name, by its help line for the others."""
    parser = OneLineParser(prog="wan-ar", description="Endless video with Wan models, chunk by chunk.")
    parser.add_argument("--version", action="version", version=f"wan-ar {__version__}")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    subparsers = parser.add_subparsers(title="commands", dest="command", metavar="COMMAND", required=True)
    wanted = next((word for word in arguments if not word.startswith("-")), None)
    for name, (module_name, line) in COMMANDS.items():
        if name != wanted:
            subparsers.add_parser(name, help=line)
            continue
        module = importlib.import_module(module_name)
        module.add_parser(subparsers)
        command = subparsers.choices[name]
        command.set_defaults(run=module.run)
        command.add_argument(
            "--debug", action="store_true", default=argparse.SUPPRESS, help="show the traceback of an error"
        )
    return parser


def exit_code(error: BaseException) -> int:
    """Return the exit code for an error that a subcommand raised."""
    if isinstance(error, KeyboardInterrupt):
        return 130
    # A full disk is for the caller to mend, whether Python or ffmpeg ran into it.
    if os.strerror(errno.ENOSPC) in str(error):
        return 2
    if isinstance(error, OSError) and error.errno in _MACHINE_ERRNOS:
        return 1
    return 2 if isinstance(error, (ValueError, OSError)) else 1


def _unknown_flag(parser: argparse.ArgumentParser, word: str) -> str:
    """Say that `word` was not understood, naming the flag that is nearest to it."""
    flags = set(parser._option_string_actions)
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for command in action.choices.values():
                flags.update(command._option_string_actions)
    matches = get_close_matches(word.split("=")[0], sorted(flags), n=1) if word.startswith("-") else []
    return f"unknown argument '{word}'" + (f"; did you mean '{matches[0]}'?" if matches else "")


def print_error(message: str) -> None:
    """Write one line to stderr."""
    sys.stderr.write(f"wan-ar: error: {message}\n")


def describe_error(error: BaseException) -> str:
    """Say in one line what happened, with the notes that were added on the way."""
    words = " ".join(str(error).split())
    if isinstance(error, KeyboardInterrupt):
        words = "interrupted"
    elif isinstance(error, OSError) and error.strerror and error.filename is not None:
        words = f"{error.filename}: {error.strerror}"
    elif not isinstance(error, (ValueError, OSError, RuntimeError)):
        words = f"unexpected {type(error).__name__}: {words or 'no message'} (--debug shows where)"
    return "; ".join([words or type(error).__name__, *getattr(error, "__notes__", [])])


if __name__ == "__main__":
    sys.exit(main())

"""The `wan-ar` command: finds the subcommand, runs it, and turns every failure into one line and an exit code.

Exit codes: 0 done; 2 the input was wrong and nothing was written; 1 something failed on the way; 130 Ctrl-C, 143
SIGTERM, 129 SIGHUP.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
import traceback
from collections.abc import Sequence
from difflib import get_close_matches
from typing import Any, NoReturn

from wan_autoregressive._version import __version__
from wan_autoregressive.scripts.errors import describe_error, exit_code, print_error
from wan_autoregressive.scripts.interrupts import handle_stops, import_or_leave, raise_stopped

# Subcommand -> its module and its line in the help. The module has `add_parser(subparsers)` and `run(args) -> int`,
# or else `main(words) -> int`. Only that of the subcommand that is asked for is imported: most of them import torch.
COMMANDS = {
    "generate": ("wan_autoregressive.scripts.generate", "render a video from a prompt"),
    "pull": ("wan_autoregressive.scripts.pull", "get a published checkpoint by name"),
    "convert": ("wan_autoregressive.scripts.convert", "make a checkpoint folder from published weights"),
    "estimate": ("wan_autoregressive.scripts.estimate", "compute the memory and the FLOPs of a model of any size"),
    "serve": ("wan_autoregressive.scripts.serve", "serve a page with live video"),
    "benchmark": ("wan_autoregressive.scripts.benchmark", "measure the seconds of every stage with random weights"),
}


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
    _open_closed_streams()
    _quiet_torchao()
    try:
        with handle_stops(raise_stopped):
            code = _run(arguments)
            sys.stdout.flush()
            return code
    except SystemExit:
        raise
    except BaseException as error:
        if "--debug" in arguments:
            traceback.print_exc()
        if not isinstance(error, BrokenPipeError):  # whoever read our output has left; nobody is there to be told
            print_error(describe_error(error))
        _flush_or_drop_stdout()
        return 1 if isinstance(error, BrokenPipeError) else exit_code(error)


def build_parser(arguments: Sequence[str]) -> argparse.ArgumentParser:
    """Build the parser: in full for the subcommand that `arguments` name, by its help line for the others."""
    parser = OneLineParser(prog="wan-ar", description="Endless video with Wan models, chunk by chunk.")
    parser.add_argument("--version", action="version", version=f"wan-ar {__version__}")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    subparsers = parser.add_subparsers(title="commands", dest="command", metavar="COMMAND", required=True)
    wanted = _command_of(arguments)
    for name, (module_name, line) in COMMANDS.items():
        module = import_or_leave(module_name) if name == wanted else None
        if module is None or not hasattr(module, "add_parser"):
            subparsers.add_parser(name, help=line)
            continue
        module.add_parser(subparsers)
        command = subparsers.choices[name]
        command.set_defaults(run=module.run)
        command.add_argument(
            "--debug", action="store_true", default=argparse.SUPPRESS, help="show the traceback of an error"
        )
    return parser


def _run(arguments: list[str]) -> int:
    name = _command_of(arguments)
    parser = build_parser(arguments)
    if name in COMMANDS:
        module = import_or_leave(COMMANDS[name][0])
        if not hasattr(module, "add_parser"):
            at = arguments.index(name)
            parser.parse_args(arguments[: at + 1])
            code: int = module.main(arguments[at + 1 :])
            return code
    args, unknown = parser.parse_known_args(arguments)
    if unknown:
        parser.error(_unknown_flag(parser, unknown[0]))
    code = args.run(args)
    return code


def _command_of(arguments: Sequence[str]) -> str | None:
    return next((word for word in arguments if not word.startswith("-")), None)


def _unknown_flag(parser: argparse.ArgumentParser, word: str) -> str:
    """Say that `word` was not understood, naming the flag that is nearest to it."""
    flags = set(parser._option_string_actions)
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for command in action.choices.values():
                flags.update(command._option_string_actions)
    matches = get_close_matches(word.split("=")[0], sorted(flags), n=1) if word.startswith("-") else []
    return f"unknown argument '{word}'" + (f"; did you mean '{matches[0]}'?" if matches else "")


def _open_closed_streams() -> None:
    """Give a program that was started without stdin, stdout or stderr the null device in its place.

    Otherwise the next file that is opened gets the number, and a warning of some library is written into it.
    """
    if sys.stdin is not None and sys.stdout is not None and sys.stderr is not None:
        return
    while (number := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(number)
    sys.stdin = sys.stdin or open(0, closefd=False)  # noqa: SIM115
    sys.stdout = sys.stdout or open(1, "w", closefd=False)  # noqa: SIM115
    sys.stderr = sys.stderr or open(2, "w", closefd=False)  # noqa: SIM115


def _quiet_torchao() -> None:
    """diffusers imports torchao where it is installed, which warns of its kernels for other devices than this one."""
    for name in ("torchao", "torch.utils._pytree", "diffusers.quantizers.torchao.torchao_quantizer"):
        logging.getLogger(name).setLevel(logging.ERROR)


def _flush_or_drop_stdout() -> None:
    """What cannot be written now would fail again when the interpreter ends, with another exit code."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


if __name__ == "__main__":
    sys.exit(main())

"""The command line: `prefixcore COMMAND`, one file a command in `cli/`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

from . import _interrupt
from .cli import (
    add,
    audit,
    bake,
    convert,
    distill,
    doctor,
    generate,
    inspect,
    output,
    push,
    serve,
    train,
    tune,
    validate_serving,
    verify,
)
from .cli import list as list_
from .cli.common import INTERRUPTED, USER_ERROR
from .cli.failures import UserError, message
from .version import __version__

COMMANDS = {
    "train": train,
    "tune": tune,
    "generate": generate,
    "inspect": inspect,
    "verify": verify,
    "audit": audit,
    "bake": bake,
    "distill": distill,
    "convert": convert,
    "list": list_,
    "add": add,
    "push": push,
    "serve": serve,
    "validate-serving": validate_serving,
    "doctor": doctor,
}


class Parser(argparse.ArgumentParser):
    """An argument parser whose error is one line, and whose help is printed or an error."""

    def error(self, message: str) -> NoReturn:
        """As every error of ours, without the usage before it, which is a page of options."""
        output.say(f"{self.prog}: error: {output.one_line(message)} (options: {self.prog} --help)")
        self.exit(USER_ERROR)

    def _print_message(self, message: str, file: Any = None) -> None:
        if message and file is not sys.stderr:
            output.results(message.rstrip("\n"))


def parser() -> argparse.ArgumentParser:
    """All subcommands and their options."""
    result = Parser(prog="prefixcore", description="Soft prompts and prefixes for frozen transformers models.")
    result.add_argument("--version", action="version", version=f"prefixcore {__version__}")
    commands = result.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, module in COMMANDS.items():
        summary = (module.__doc__ or "").partition("\n")[0]
        module.add_arguments(commands.add_parser(name, help=summary, description=summary))
    return result


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one subcommand and return its exit code.

    0: done; 1: what was to be checked is not right; 2: an error to mend; 130: stopped by Ctrl-C.
    Without `arguments` this process is the command line's own: Ctrl-C ends it.
    """
    if arguments is not None:
        return _run(arguments)
    _interrupt.take_over()
    output.reserve_standard_streams()
    try:
        return _run(sys.argv[1:])
    finally:
        _interrupt.let_go()


def _run(arguments: Sequence[str]) -> int:
    program = "prefixcore"
    _interrupt.tell(_interrupt.NOTHING, program=program)
    try:
        options = parser().parse_args(arguments)  # SystemExit: it has printed its help, or what is wrong
        program = f"prefixcore {options.command}"
        _interrupt.tell(_interrupt.NOTHING, program=program)
        if any("\0" in argument for argument in arguments):  # as Python alone can call this
            raise UserError("an argument holds a NUL character, which no path or text can; take it out")
        return COMMANDS[options.command].run(options)
    except KeyboardInterrupt:
        output.say(f"\n{_interrupt.line()}")
        return INTERRUPTED
    except Exception as error:
        text = message(error)
        if text is None:
            raise
        written = _interrupt.written()
        suffix = "" if written == _interrupt.NOTHING else f" ({written})"
        output.say(f"{program}: error: {output.one_line(text)}{suffix}")
        return USER_ERROR


if __name__ == "__main__":
    sys.exit(main())

"""The command line: `prefixcore train | generate | inspect | doctor`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from .cli import doctor, generate, inspect, train
from .cli.common import INTERRUPTED, USER_ERROR, UserError
from .version import __version__

COMMANDS = {"train": train, "generate": generate, "inspect": inspect, "doctor": doctor}


def parser() -> argparse.ArgumentParser:
    """All subcommands and their options."""
    result = argparse.ArgumentParser(
        prog="prefixcore", description="Soft prompts and prefixes for frozen transformers models."
    )
    result.add_argument("--version", action="version", version=f"prefixcore {__version__}")
    commands = result.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, module in COMMANDS.items():
        summary = (module.__doc__ or "").partition("\n")[0]
        module.add_arguments(commands.add_parser(name, help=summary, description=summary))
    return result


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one subcommand and return its exit code: 0 done, 2 an error to mend, 130 stopped by Ctrl-C."""
    options = parser().parse_args(arguments)
    try:
        return COMMANDS[options.command].run(options)
    except UserError as error:
        print(f"prefixcore {options.command}: error: {error}", file=sys.stderr)
        return USER_ERROR
    except KeyboardInterrupt:
        print(f"\nprefixcore {options.command}: stopped; nothing was written", file=sys.stderr)
        return INTERRUPTED


if __name__ == "__main__":
    sys.exit(main())

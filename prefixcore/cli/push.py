"""Put an adapter on the Hugging Face Hub, with a page of what its manifest says."""

from __future__ import annotations

import argparse
from pathlib import Path

from .common import OK
from .failures import user_errors
from .output import check_open, results


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `prefixcore push`."""
    parser.add_argument("adapter", type=Path, metavar="ADAPTER", help="folder that prefixcore or PEFT wrote")
    parser.add_argument(
        "name", metavar="NAME", help="user/name, or user/name/folder where several are in one repository"
    )
    parser.add_argument(
        "--private",
        action=argparse.BooleanOptionalAction,
        help="whether others see a repository that is made now (default: as the user or organisation has set)",
    )
    parser.add_argument("--revision", metavar="BRANCH", help="branch, made where there is none (default: main)")
    parser.add_argument("--create-pr", action="store_true", help="open a pull request in place of a commit")
    parser.add_argument("--message", metavar="TEXT", help="of the commit")


def run(arguments: argparse.Namespace) -> int:
    """Read the whole adapter, upload it, and say where it is."""
    check_open()
    from ..adapters import AdapterError, upload

    with user_errors(AdapterError):
        commit = upload(
            arguments.adapter,
            arguments.name,
            private=arguments.private,
            revision=arguments.revision,
            create_pr=arguments.create_pr,
            commit_message=arguments.message,
        )
    results(str(commit.pr_url or commit))
    return OK

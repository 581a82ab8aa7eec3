"""Make a short prefix that stands in for a long text: a system prompt, examples, a document."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import _interrupt
from .common import INTERRUPTED, OK, columns_of, open_model, warnings_as_lines
from .distill_options import add_arguments, build_options
from .failures import UserError, user_errors
from .limits import check_ids, check_virtual_tokens
from .output import check_open, results, say, table, to_json
from .train import check_out

if TYPE_CHECKING:
    from ..distill import Distilled, Prompt

__all__ = ["add_arguments", "run"]


def run(arguments: argparse.Namespace) -> int:
    """Ask, answer, train, save, measure, save the scores; 130 if Ctrl-C ended it early (what was trained is saved)."""
    check_open()
    check_out(arguments.out)
    options = build_options(arguments)
    context = read_context(arguments.context)
    cache = arguments.cache or arguments.out.with_name(f"{arguments.out.name}.distill")
    check_cache(cache, arguments.out)

    from ..distill import DistillError, distill

    with user_errors(DistillError):
        prompts, held_out = read_both(arguments)
    model, tokenizer = open_model(arguments)
    check_virtual_tokens(model, options.num_virtual_tokens)
    check_ids(model, tokenizer(context)["input_ids"], f"--context {arguments.context}")
    _interrupt.tell(f"nothing was written but what is in {cache}, from where the same command goes on")
    failures = user_errors(DistillError, ValueError, TypeError, NotImplementedError)
    with failures, warnings_as_lines():
        distilled = distill(
            model,
            tokenizer,
            context,
            options=options,
            prompts=prompts,
            held_out=held_out,
            cache=cache,
            show_progress=None,
            say=say,
            on_trained=lambda trained: save(arguments, trained),
        )
    save(arguments, distilled)
    if distilled.interrupted:
        say(f"stopped after {distilled.record.steps_done} steps; saved what there is to {arguments.out}")
        return INTERRUPTED
    say(f"adapter  {arguments.out}\npicture  {arguments.out / 'curve.png'}\nanswers  {cache}")
    report = distilled.report
    results(
        to_json(report.to_dict(), indent=1) if arguments.json else "\n".join([table(report.rows()), *report.notes()])
    )
    return OK


def read_context(path: Path) -> str:
    """The text; UserError: no such file, not UTF-8, or nothing in it."""
    if not path.is_file():
        what = "is not a regular file" if path.exists() else "no such file"
        raise UserError(f"--context {path}: {what}; expected a text in UTF-8")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"--context {path}: not UTF-8 text ({error.reason} at byte {error.start})") from None
    if not text.strip():
        raise UserError(f"--context {path}: empty; expected a text that a prefix is to stand for")
    return text


def read_both(arguments: argparse.Namespace) -> tuple[list[Prompt], list[Prompt]]:
    """The user's prompts, and held-out ones, where they are given."""
    from ..distill import read_prompts

    columns = columns_of(arguments)
    prompts = [] if arguments.prompts is None else read_prompts(arguments.prompts, columns=columns)
    held_out = [] if arguments.eval_prompts is None else read_prompts(arguments.eval_prompts, columns=columns)
    shared = {prompt.text for prompt in prompts} & {prompt.text for prompt in held_out}
    if shared:
        say(f"{len(shared)} prompts of {arguments.prompts} are in {arguments.eval_prompts} too, and are left out of it")
    return prompts, held_out


def check_cache(folder: Path, out: Path) -> None:
    """Refuse a place where answers cannot be kept, or that the adapter, which is replaced as a whole, would take."""
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--cache {folder}: not a folder; expected one, or a name that is not there")
    if out.resolve() in (folder.resolve(), *folder.resolve().parents):
        raise UserError(f"--cache {folder}: is in --out {out}, which holds the adapter and nothing else; give another")
    there = next(each for each in (folder.absolute(), *folder.absolute().parents) if os.path.lexists(each))
    if not there.is_dir() or not os.access(there, os.W_OK):
        raise UserError(f"--cache {folder} cannot be written: {there} is not a folder that you may write to")


def save(arguments: argparse.Namespace, distilled: Distilled) -> None:
    """Write the adapter, whole or not at all."""
    from ..adapters import AdapterError

    record: dict[str, Any] = {"model": arguments.model}
    _interrupt.tell(f"{arguments.out} is as it was before, or the new adapter, whole", at_once=False)
    with user_errors(AdapterError):
        distilled.save(
            arguments.out,
            name=arguments.context.name,
            record=record,
            task=arguments.task or arguments.out.name,
            license=arguments.license,
            intended_use=arguments.intended_use,
        )
    _interrupt.tell(f"the adapter is in {arguments.out}")

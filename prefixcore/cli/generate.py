"""Continue prompts with a model and an adapter."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .._text import printable
from .common import (
    ADAPTER,
    NAMED,
    OK,
    adapter_folder,
    adapter_name,
    add_column_arguments,
    add_force_argument,
    add_model_arguments,
    columns_of,
    load_adapter,
    named_model,
    open_model,
    option,
    plain_escapes,
    positive,
    seed,
)
from .failures import UserError, user_errors
from .limits import check_ids, is_too_long, learned_positions, stated_positions
from .output import check_open, results, say, to_json
from .tokenizers import say_what_is_unknown

if TYPE_CHECKING:
    from ..training import Question

COLDEST, HOTTEST = 1e-6, 1e6
"""Temperatures outside make numbers that float32 cannot hold, and choose the likeliest token or any."""

MOST_BEAMS = 1024
MOST_NEW_TOKENS = 2**20


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `prefixcore generate`."""
    add_model_arguments(parser, required=False, said=NAMED)
    parser.add_argument("--adapter", type=adapter_name, required=True, metavar="ADAPTER", help=ADAPTER)
    add_force_argument(parser)
    parser.add_argument(
        "--prompt",
        action="append",
        help="text to continue; may be given several times (without it: one prompt a line from standard input)",
    )
    parser.add_argument(
        "--prompts",
        type=Path,
        metavar="FILE",
        help="JSON, CSV, Parquet or plain lines: prompts, or conversations (messages, tools); where the right "
        "answers are there, how many are right is printed, too",
    )
    add_column_arguments(parser)
    parser.add_argument("--max-new-tokens", type=positive, default=64, metavar="N", help="default: 64")
    parser.add_argument(
        "--end", type=plain_escapes, help=r"stop at this text, such as '\n' (default: as the adapter was trained)"
    )
    parser.add_argument(
        "--chat",
        action=argparse.BooleanOptionalAction,
        help="write each prompt as a user's turn, by the model's chat template (default: as the adapter was trained)",
    )
    parser.add_argument("--num-beams", type=positive, default=1, metavar="N", help="beam search (default: 1, none)")
    parser.add_argument("--sample", action="store_true", help="sample instead of taking the likeliest token")
    parser.add_argument("--temperature", type=float, default=1.0, help="of --sample (default: 1)")
    parser.add_argument("--top-p", type=float, default=1.0, help="of --sample (default: 1)")
    parser.add_argument("--seed", type=seed, default=0, help="of --sample (default: 0)")
    parser.add_argument("--batch-size", type=positive, default=16, metavar="N", help="default: 16")
    parser.add_argument(
        "--json", action="store_true", help="one JSON object a line: what was asked, completion, right answer"
    )


def run(arguments: argparse.Namespace) -> int:
    """Print the continuation of each prompt, in order."""
    check_open()
    questions = read_questions(arguments)
    sampling = sampling_options(arguments)
    arguments.adapter = adapter_folder(arguments.adapter)

    from ..adapters import AdapterError, read_adapter, read_record
    from ..adapters.record import how_read

    too_deep = user_errors(RecursionError, what=f"{arguments.adapter}: nested too deep")
    with user_errors(AdapterError), too_deep:
        adapter = read_adapter(arguments.adapter)
        record = read_record(arguments.adapter)
    virtual_tokens = adapter.config.num_virtual_tokens or 0
    arguments.model = arguments.model or named_model(adapter)
    trained_end, is_chat = how_read(record, adapter.manifest)
    end = arguments.end if arguments.end is not None else trained_end
    model, tokenizer = open_model(arguments)
    chat = arguments.chat if arguments.chat is not None else bool(is_chat)
    check_questions(model, tokenizer, questions, virtual_tokens, arguments.max_new_tokens, chat=chat)
    learned = learned_positions(model)

    import torch

    from ..training import DataError
    from ..training.evaluate import answers_to

    with user_errors(DataError):
        expected = [question.expected(tokenizer, end or None) for question in questions]
    torch.manual_seed(arguments.seed)
    failures = user_errors(AdapterError, ValueError, TypeError, NotImplementedError)
    with failures, load_adapter(model, arguments.adapter, force=arguments.force):
        found = answers_to(
            model,
            tokenizer,
            questions,
            max_new_tokens=arguments.max_new_tokens,
            end=end or None,
            batch_size=arguments.batch_size,
            max_length=None if learned is None else learned - virtual_tokens,
            chat=chat,
            **sampling,
        )
    answers = [answer.text for answer in found]
    if arguments.json:
        rows = zip(questions, answers, expected, strict=True)
        lines = [to_json(described(question, answer, right)) for question, answer, right in rows]
    else:
        lines = [answer.strip() for answer in answers]
        if sys.stdout is not None and sys.stdout.isatty():
            lines = [printable(line, keep="\n\t") for line in lines]
    results("\n".join(lines))
    if cut := sum(not answer.is_whole for answer in found):
        most = f"{arguments.max_new_tokens:,} tokens (--max-new-tokens)"
        ends = "" if learned is None else ", or where the model's positions end"
        say(f"{cut} of {len(found)} answers were cut at {most}{ends}")
    known = [is_same(answer, right) for answer, right in zip(answers, expected, strict=True) if right is not None]
    if known:
        say(f"right  {sum(known)} of {len(known)} ({sum(known) / len(known):.1%})")
    return OK


def described(question: Question, answer: str, right: str | None) -> dict[str, Any]:
    """What was asked and answered, as JSON can hold it."""
    asked = {"prompt": question.prompt} if isinstance(question.prompt, str) else {"messages": question.prompt}
    told = {} if right is None else {"expected": right, "right": is_same(answer, right)}
    return {**asked, "completion": answer, **told}


def is_same(answer: str, right: str) -> bool:
    """Whether an answer is the right one, white space around both aside."""
    return answer.strip() == right.strip()


def check_questions(
    model: Any, tokenizer: Any, questions: list[Question], virtual_tokens: int, new_tokens: int, *, chat: bool
) -> None:
    """Refuse prompts that the model cannot read, and say which are, or with their answers get, too long for it."""
    from ..training import DataError

    learned, stated = learned_positions(model), stated_positions(model)
    positions = learned if learned is not None else stated
    texts = []
    for question in questions:
        prompt, source = question.prompt, question.source
        if isinstance(prompt, str) and positions is not None and is_too_long(prompt, positions):
            raise UserError(f"{source}: {len(prompt):,} characters, far more than {positions:,} positions hold")
        with user_errors(DataError):
            ids = question.ids(tokenizer, chat=chat)
        check_ids(model, ids, source)
        texts.append((source, ids))
        needed = f"{source}: {len(ids):,} tokens and {virtual_tokens:,} virtual ones"
        if learned is not None and len(ids) + virtual_tokens >= learned:
            raise UserError(f"{needed} leave no room in the model's {positions:,} positions; shorten it")
        if positions is not None and len(ids) + virtual_tokens > positions:
            say(f"warning: {needed} are more than the {positions:,} positions that the model was made for")
        elif learned is None and positions is not None and len(ids) + virtual_tokens + new_tokens > positions:
            say(
                f"warning: {needed} with an answer of {new_tokens:,} are more than the {positions:,} positions that "
                "the model was made for (--max-new-tokens)"
            )
    say_what_is_unknown(tokenizer, texts, "prompts")


def read_questions(arguments: argparse.Namespace) -> list[Question]:
    """`--prompts`, `--prompt`, or the lines of standard input that are not blank."""
    from ..training import DataError, Question
    from ..training import read_questions as read

    if arguments.prompts is None:
        texts = read_prompts(arguments)
        return [Question(text, source=f"prompt {number}") for number, text in enumerate(texts, start=1)]
    if arguments.prompt is not None:
        raise UserError("--prompt and --prompts were both given; leave one of them out")
    with user_errors(DataError):
        return read(arguments.prompts, columns=columns_of(arguments))


def read_prompts(arguments: argparse.Namespace) -> list[str]:
    """`--prompt`, or the lines of standard input that are not blank."""
    prompts = arguments.prompt
    if prompts is None:
        if sys.stdin is None:
            raise UserError("standard input is closed; give --prompt TEXT, or one prompt a line on standard input")
        if sys.stdin.isatty():
            say("one prompt a line, then Ctrl-D:")
        try:
            text = sys.stdin.read().removeprefix("\ufeff")  # which some editors put before a text in UTF-8
            prompts = [line.rstrip("\r") for line in text.split("\n") if line.strip()]
        except UnicodeDecodeError as error:
            raise UserError(f"standard input is not {error.encoding.upper()} text ({error.reason})") from None
    if not prompts:
        raise UserError("there is no prompt; give --prompt TEXT, or one prompt a line on standard input")
    if arguments.prompt is not None and any(r"\n" in prompt for prompt in prompts):
        say(
            r"warning: a --prompt holds \n, a backslash and an n, and is asked as it stands. Most shells write a line "
            r"break as $'\n', and files of --prompts have them"
        )
    if "" in prompts:
        raise UserError(f"prompt {prompts.index('') + 1} is empty; give a text to continue, or leave it out")
    return list(prompts)


def sampling_options(arguments: argparse.Namespace) -> dict[str, Any]:
    """What `model.generate` is told, checked before a model is opened."""
    for name, most in (("num_beams", MOST_BEAMS), ("max_new_tokens", MOST_NEW_TOKENS)):
        if (value := getattr(arguments, name)) > most:
            raise UserError(f"{option(name)} must be at most {most:,}, got {value:,}")
    options: dict[str, Any] = {"num_beams": arguments.num_beams, "do_sample": arguments.sample}
    if not arguments.sample:
        if arguments.temperature != 1.0 or arguments.top_p != 1.0:
            raise UserError("--temperature and --top-p mean something with --sample only; add it or leave them out")
        return options
    if not COLDEST <= arguments.temperature <= HOTTEST:
        raise UserError(
            f"--temperature must be above 0, from {COLDEST:g} to {HOTTEST:g}, got {arguments.temperature}; "
            "leave out --sample for the likeliest tokens"
        )
    if not 0 < arguments.top_p <= 1:
        raise UserError(f"--top-p must be above 0 and at most 1, got {arguments.top_p}")
    return {**options, "temperature": arguments.temperature, "top_p": arguments.top_p}

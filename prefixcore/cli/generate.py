"""Continue prompts with a model and an adapter."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from .common import OK, UserError, add_model_arguments, open_model, plain_escapes, positive, user_errors


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `prefixcore generate`."""
    add_model_arguments(parser)
    parser.add_argument("--adapter", type=Path, required=True, help="folder that `prefixcore train` or PEFT wrote")
    parser.add_argument(
        "--prompt",
        action="append",
        help="text to continue; may be given several times (without it: one prompt a line from standard input)",
    )
    parser.add_argument("--max-new-tokens", type=positive, default=64, metavar="N", help="default: 64")
    parser.add_argument(
        "--end", type=plain_escapes, help=r"stop at this text, such as '\n' (default: as the adapter was trained)"
    )
    parser.add_argument("--num-beams", type=positive, default=1, metavar="N", help="beam search (default: 1, none)")
    parser.add_argument("--sample", action="store_true", help="sample instead of taking the likeliest token")
    parser.add_argument("--temperature", type=float, default=1.0, help="of --sample (default: 1)")
    parser.add_argument("--top-p", type=float, default=1.0, help="of --sample (default: 1)")
    parser.add_argument("--seed", type=int, default=0, help="of --sample (default: 0)")
    parser.add_argument("--batch-size", type=positive, default=16, metavar="N", help="default: 16")
    parser.add_argument("--json", action="store_true", help="one JSON object a line, with prompt and completion")


def run(arguments: argparse.Namespace) -> int:
    """Print the continuation of each prompt, in order."""
    prompts = read_prompts(arguments)
    sampling = sampling_options(arguments)
    if not arguments.adapter.is_dir():
        raise UserError(f"--adapter {arguments.adapter} is not a folder")

    from ..adapters import AdapterError, read_record

    with user_errors(AdapterError):
        record = read_record(arguments.adapter)
    end = arguments.end if arguments.end is not None else record.get("end")
    model, tokenizer = open_model(arguments)

    import torch

    from ..hf import load
    from ..training import predict

    torch.manual_seed(arguments.seed)
    with user_errors(AdapterError, ValueError, TypeError, NotImplementedError), load(model, arguments.adapter):
        answers = predict(
            model,
            tokenizer,
            prompts,
            max_new_tokens=arguments.max_new_tokens,
            end=end or None,
            batch_size=arguments.batch_size,
            **sampling,
        )
    for prompt, answer in zip(prompts, answers, strict=True):
        if arguments.json:
            print(json.dumps({"prompt": prompt, "completion": answer}, ensure_ascii=False))
        else:
            print(answer.strip())
    return OK


def read_prompts(arguments: argparse.Namespace) -> list[str]:
    """`--prompt`, or the lines of standard input that are not blank."""
    prompts = arguments.prompt
    if prompts is None:
        if sys.stdin.isatty():
            print("one prompt a line, then Ctrl-D:", file=sys.stderr)
        prompts = [line.rstrip("\r\n") for line in sys.stdin if line.strip()]
    if not prompts or not all(prompts):
        raise UserError("there is no prompt; give --prompt TEXT, or one prompt a line on standard input")
    return list(prompts)


def sampling_options(arguments: argparse.Namespace) -> dict[str, Any]:
    """What `model.generate` is told, checked before a model is opened."""
    options: dict[str, Any] = {"num_beams": arguments.num_beams, "do_sample": arguments.sample}
    if not arguments.sample:
        if arguments.temperature != 1.0 or arguments.top_p != 1.0:
            raise UserError("--temperature and --top-p mean something with --sample only; add it or leave them out")
        return options
    if not arguments.temperature > 0:
        raise UserError(f"--temperature must be above 0, got {arguments.temperature}")
    if not 0 < arguments.top_p <= 1:
        raise UserError(f"--top-p must be above 0 and at most 1, got {arguments.top_p}")
    return {**options, "temperature": arguments.temperature, "top_p": arguments.top_p}

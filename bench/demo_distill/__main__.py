"""`python -m bench.demo_distill`: a text as a prefix of a twelfth of its tokens, on a real model."""

from __future__ import annotations

import argparse
import contextlib
import io
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from bench.demo import base_model
from prefixcore.__main__ import main as prefixcore
from prefixcore.cli.common import positive

from .texts import Text, make

NAMES = ("capitals", "reviews", "desk", "harbour", "shop", "desk-chat")
SHOWN = NAMES[:3]
SHARE = 12
"""The text's tokens for each virtual token, where nothing else is said."""

DEFAULT_OUT = Path(__file__).parent / "out"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the demo; returns the exit status."""
    options = parser().parse_args(arguments)
    try:
        return run(options.texts, options.out, options.more, options.share)
    except base_model.DemoError as error:
        print(f"demo: {error}", file=sys.stderr)
        return 1


def parser() -> argparse.ArgumentParser:
    """The demo's options."""
    result = argparse.ArgumentParser(prog="python -m bench.demo_distill", description=__doc__)
    result.add_argument("--texts", nargs="+", choices=NAMES, default=SHOWN, help="which texts (default: %(default)s)")
    result.add_argument("--out", type=Path, default=DEFAULT_OUT, help="where results go (default: %(default)s)")
    result.add_argument(
        "--share",
        type=positive,
        default=SHARE,
        metavar="N",
        help="of a text's tokens for each virtual token (default: %(default)s)",
    )
    result.add_argument(
        "--more", type=shlex.split, default=[], help="further options of prefixcore distill, in one word"
    )
    return result


def run(names: Sequence[str], out: Path, more: Sequence[str], share: int) -> int:
    """Distills each text by the command that is shown, and keeps what it printed."""
    out.mkdir(parents=True, exist_ok=True)
    model = base_model.converted_model()
    for name in names:
        text = make(name, out)
        began, used = time.monotonic(), time.process_time()
        code, said = distill(text, model, out, more, share)
        if code:
            return code
        minutes, used = (time.monotonic() - began) / 60, time.process_time() - used
        summary = f"{name}: {text.what}, in {minutes:.0f} minutes ({used:.0f} seconds of a core)\n\n{said}\n"
        (out / f"{name}.summary.txt").write_text(summary, encoding="utf-8")
        print(f"\n{summary}", flush=True)
    return 0


def distill(text: Text, model: Path, out: Path, more: Sequence[str], share: int) -> tuple[int, str]:
    """The exit code of `prefixcore distill`, and what it printed, with the command above."""
    count = count_tokens(model, text) // share
    arguments = ["distill", "--model", str(model), "--context", str(text.context), "--num-virtual-tokens", str(count)]
    arguments += ["--out", str(out / text.name), *text.options, *more]
    print(shlex.join(["prefixcore", *arguments]), flush=True)
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        code = prefixcore(arguments)
    return code, printed.getvalue().rstrip("\n")


def count_tokens(model: Path, text: Text) -> int:
    """How many tokens the text has."""
    from transformers import AutoTokenizer

    return len(AutoTokenizer.from_pretrained(model)(text.context.read_text(encoding="utf-8"))["input_ids"])


if __name__ == "__main__":
    sys.exit(main())

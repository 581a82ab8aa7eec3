"""`python -m bench.serving.demo`: three trained prefixes behind one unmodified vLLM, asked at once, and validated."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from bench.demo import base_model
from bench.demo.__main__ import Progress, shown
from bench.demo.task import END
from prefixcore.serving.client import Client, ServingError
from prefixcore.serving.errors import LaunchError

from . import adapters, server, tasks

HERE = Path(__file__).parent
ASKED = ("Portugal", "Norway", "Kenya", "Vietnam", "Peru")
TOKENS = 8


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the demo; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m bench.serving.demo", description=(__doc__ or "").split("`: ")[-1])
    parser.add_argument("--out", type=Path, default=HERE / "out", help="where adapters and results go")
    parser.add_argument("--python", default=sys.executable, help="the Python that vLLM is installed in")
    options = parser.parse_args(arguments)
    server.end_with_us()
    try:
        return run(options.out, options.python)
    except (base_model.DemoError, LaunchError, ServingError) as error:
        print(f"serve-demo: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nserve-demo: stopped", file=sys.stderr)
        return 130


def run(out: Path, python: str) -> int:
    """Train what is not there, serve it, ask, validate; the exit status is the validation's."""
    announce = Progress()
    model = shown(base_model.converted_model())
    names = [task.name for task in tasks.all_tasks()]
    folder = adapters.train(model, tasks.all_tasks(), out, announce)
    adapters.run("list", folder)
    announce("vLLM starts, on the CPU")
    with server.start(model, folder, python, out / "vllm.log", announce) as served:
        announce(f"it serves; {len(ASKED)} questions to three adapters and to the bare model, all at once:")
        answers = ask(Client(served.url), names, model.name)
        print(f"\n{answers}\n", flush=True)
        announce("the same prompts on the server and in transformers")
        status, table = adapters.said(
            *("validate-serving", "--url", served.url, "--model", model, "--adapters", folder, "--dtype", "float32"),
            *("--json", out / "validation.json"),
        )
    print(f"\n{table}\n", flush=True)
    (out / "summary.txt").write_text(f"{answers}\n\n{table}\n", encoding="utf-8")
    announce("done" if status == 0 else "the server does not hold what it should: see the table")
    return status


def ask(client: Client, names: Sequence[str], base: str) -> str:
    """A table: each country's line asked of each adapter and of the bare model, every request in flight at once."""
    asked = [(country, name) for country in ASKED for name in (*names, base)]

    def answer(which: tuple[str, str]) -> str:
        country, name = which
        return client.generate(name, f"{country} ->", max_tokens=TOKENS, stop=END)

    with ThreadPoolExecutor(len(asked)) as pool:
        answers = dict(zip(asked, pool.map(answer, asked), strict=True))
    titles = {**{name: f'model="{name}"' for name in names}, base: "the bare model"}
    lines = ["".join(f"{cell:24}" for cell in ("prompt", *titles.values())).rstrip()]
    for country in ASKED:
        cells = (f"{country} ->", *(answers[country, name].strip() for name in (*names, base)))
        lines.append("".join(f"{shortened(cell):24}" for cell in cells).rstrip())
    return "\n".join(lines)


def shortened(text: str, width: int = 22) -> str:
    """One line of it, cut where the next column begins."""
    line = " ".join(text.split())
    return line if len(line) <= width else f"{line[: width - 3]}..."


if __name__ == "__main__":
    sys.exit(main())

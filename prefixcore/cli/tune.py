"""Find learning rate and number of virtual tokens in a stated time, and save the best adapter."""

from __future__ import annotations

import argparse
import math
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import _interrupt
from .common import INTERRUPTED, OK, add_model_arguments, load_adapter, open_model, option, positive, seed
from .failures import UserError, user_errors
from .limits import LengthLimit, check_virtual_tokens, learned_positions
from .output import check_open, results, say, table
from .tokenizers import say_what_ends, say_what_runs_together
from .train import check_out, count_virtual_tokens, signals_held_back
from .train_examples import HeldOutEvaluator, as_texts, read_examples, tokenize_all
from .train_options import (
    LEARNING_RATES,
    METHODS,
    PROMPT_LOSS_WEIGHT,
    add_data_arguments,
    add_prompt_loss_argument,
    add_reparameterization_arguments,
    add_start_arguments,
    add_text_arguments,
    build_config,
    number_list,
)
from .train_provenance import Provenance, add_author_arguments
from .train_result import AFTER, CURVE, asked_for
from .train_start import SAID, Start, say_what_a_prefix_leaves_out

if TYPE_CHECKING:
    from ..training.tuning import Candidate, Rung, Trial, Tuning

FACTORS = (0.3, 1.0, 3.0, 10.0)
"""Of the method's learning rate in `prefixcore train`, where none are given."""

LENGTHS = (4, 16, 64)
"""Numbers of virtual tokens, where neither they nor a text is given; with a text half, all and twice as many."""

SHARED = (
    "method", "num_virtual_tokens", "init_text", "init", "num_frozen_tokens", "layers", "reparameterization",
    "prefix_projection", "rank", "num_basis", "encoder_hidden_size", "encoder_reparameterization_type", "batch_size",
    "seed", "prompt_loss_weight", "end", "max_length", "skip_too_long", "eval_data", "eval_fraction", "eval_limit",
    "chat", "prompt_column", "completion_column", "dtype",
)  # fmt: skip
"""Options that `prefixcore train` has too, and which the printed command repeats."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `prefixcore tune`."""
    add_model_arguments(parser)
    add_data_arguments(parser)
    parser.add_argument("--out", type=Path, required=True, metavar="ADAPTER", help="folder to write the best one to")
    parser.add_argument("--method", choices=METHODS, required=True, help="what to train")
    add_author_arguments(parser.add_argument_group("what you say of it, for the manifest"))

    search = parser.add_argument_group("what is tried")
    search.add_argument("--minutes", type=float, default=10.0, metavar="N", help="for all of it (default: 10)")
    rates = ", ".join(f"{factor:g}" for factor in FACTORS)
    search.add_argument(
        "--lrs",
        type=lambda text: number_list(text, float),
        metavar="RATE,...",
        help=f"learning rates (default: those of train for the method times {rates})",
    )
    search.add_argument(
        "--lengths",
        type=lambda text: number_list(text, int),
        metavar="P,...",
        help="numbers of virtual tokens (default: "
        f"{', '.join(map(str, LENGTHS))}; with --init-text half, all and twice its tokens)",
    )
    search.add_argument("--most-steps", type=positive, metavar="N", help="of any candidate (default: as time allows)")
    search.add_argument("--batch-size", type=positive, default=8, metavar="N", help="default: 8")
    search.add_argument(
        "--seed", type=seed, default=0, metavar="N", help="of the start, the order and the split (default: 0)"
    )
    add_prompt_loss_argument(search)
    add_start_arguments(parser)
    add_reparameterization_arguments(parser)
    add_text_arguments(parser, eval_every=False)
    parser.set_defaults(resume=None, force=False, resumed_task=None)


def run(arguments: argparse.Namespace) -> int:
    """Tune, save, evaluate; exit code 130 if Ctrl-C ended it early (the best so far is saved)."""
    from ..hf import PromptBank
    from ..training import DataError
    from ..training.tuning import grid, tune

    check_out(arguments.out)
    check_open()
    if not (math.isfinite(arguments.minutes) and arguments.minutes > 0):
        raise UserError(f"--minutes must be a finite number above 0, got {arguments.minutes}")
    if arguments.lengths is not None and arguments.num_virtual_tokens is not None:
        raise UserError("--lengths and --num-virtual-tokens say the same: give one of them")
    config = build_config(arguments)
    arguments.split_seed = arguments.seed
    with user_errors(DataError):
        training, held_out = read_examples(arguments)
    if not held_out:
        raise UserError("tuning goes by held-out examples, and there are none; give --eval-data or --eval-fraction")

    model, tokenizer = open_model(arguments)
    training = as_texts(arguments, model, tokenizer, training)
    held_out = as_texts(arguments, model, tokenizer, held_out)
    own = count_virtual_tokens(arguments, model, tokenizer, config)
    lengths = lengths_of(arguments, own)
    longest = max(lengths)
    check_virtual_tokens(model, longest)
    with user_errors(ValueError, what="--lengths and --lrs"):
        candidates = grid(config, lengths, rates_of(arguments))
    with user_errors(DataError):  # as train does, from all examples, also such as are too long
        starts = {length: Start(arguments, config, training, tokenizer, length) for length in lengths}
    limit = LengthLimit.of(model, longest, arguments.max_length)
    end, skip = arguments.end, arguments.skip_too_long
    training, train_ids = tokenize_all(model, tokenizer, training, end, limit, skip=skip)
    held_out, held_out_ids = tokenize_all(model, tokenizer, held_out, end, limit, skip=skip)
    if not train_ids or not held_out_ids:
        raise UserError(f"no example has at most {limit.tokens} tokens; raise --max-length or shorten the examples")
    say_what_ends(arguments, model, tokenizer, train_ids)
    if not arguments.chat:
        say_what_runs_together(tokenizer, train_ids)
    say(f"{len(train_ids)} examples to train on, {len(held_out_ids)} held out to choose by")
    say(f"{how_many(len(candidates))}, {arguments.minutes:g} minutes")
    provenance = Provenance(arguments, training, held_out, limit.tokens, str(model.dtype).removeprefix("torch."))
    with user_errors(ValueError, TypeError, NotImplementedError):
        best = {length: start.best(model, training, train_ids) for length, start in starts.items()}
        candidates = [each for length in best for each in grid(best[length], [length], rates_of(arguments))]
    if any(start.is_made for start in starts.values()):
        say(SAID)
    say_what_a_prefix_leaves_out(model, candidates[0].config)

    with user_errors(ValueError, TypeError, NotImplementedError), PromptBank(model) as bank:
        found = tune(
            bank,
            tokenizer,
            candidates,
            train_ids,
            held_out_ids,
            seconds=60 * arguments.minutes,
            most_steps=arguments.most_steps,
            batch_size=arguments.batch_size,
            seed=arguments.seed,
            prompt_loss_weight=arguments.prompt_loss_weight,
            on_rung=say_rung,
        )
        if not found.best.steps:
            say("stopped before the first step; nothing was saved")
            return INTERRUPTED
        save(arguments, bank[found.best.name], found, {}, provenance, None)
    learned = learned_positions(model)
    room = None if learned is None else learned - longest
    evaluator = HeldOutEvaluator(model, tokenizer, end, held_out, held_out_ids, room)
    if not found.interrupted:
        with load_adapter(model, arguments.out, trainable=True) as handle:
            evaluator(AFTER)
            save(arguments, handle, found, evaluator.to_dict(), provenance, evaluator.results[AFTER])
    say_at_once(found)
    say_if_worthless(found)
    say(f"adapter  {arguments.out}\npicture  {arguments.out / CURVE}")
    results(f"{table_of(found)}\n\n{command(arguments, found)}")
    return INTERRUPTED if found.interrupted else OK


def lengths_of(arguments: argparse.Namespace, own: int) -> list[int]:
    """The lengths to try; `own`: that of the text or of `--num-virtual-tokens`."""
    if arguments.lengths is not None:
        if any(length < 1 for length in arguments.lengths):
            raise UserError(f"--lengths must be whole numbers from 1, got {','.join(map(str, arguments.lengths))}")
        return list(dict.fromkeys(arguments.lengths))
    if arguments.num_virtual_tokens is not None:
        return [own]
    if arguments.init_text is not None:
        return sorted({max(1, own // 2), own, 2 * own})
    return list(LENGTHS)


def rates_of(arguments: argparse.Namespace) -> list[float]:
    """The learning rates to try."""
    if arguments.lrs is not None:
        return list(dict.fromkeys(arguments.lrs))
    usual = LEARNING_RATES[arguments.method]
    return [float(f"{factor * usual:.2g}") for factor in FACTORS]


def say_rung(rung: Rung, best: Trial) -> None:
    """What came of a round."""
    say(
        f"{how_many(rung.candidates)}, {rung.steps} steps each in {rung.seconds:.0f} s ({rung.at_once} in one batch); "
        f"best: {best.candidate.name}, held-out loss {best.last_loss:.3f}"
    )


def how_many(candidates: int) -> str:
    """In words."""
    return "1 candidate" if candidates == 1 else f"{candidates} candidates"


def say_if_worthless(found: Tuning) -> None:
    """Where the best candidate has learnt nothing, or would diverge if it were trained by itself."""
    step, loss = found.best.best
    if step == 0 and not found.interrupted:
        say(
            f"warning: no step of the best candidate brought its held-out loss below {loss:.3f}, that of its start, "
            "which is what is saved; try lower learning rates (--lrs), or more time (--minutes)"
        )
    elif not math.isfinite(found.best.last_loss):
        say(
            f"warning: the best candidate diverged after step {step}, whose values are saved; its learning rate "
            f"{found.best.candidate.learning_rate:g} is too large: try lower ones (--lrs)"
        )


def say_at_once(found: Tuning) -> None:
    """What it costs to train several in one batch."""
    if len(found.step_seconds) > 1:
        shown = ", ".join(f"{count}: {seconds:.3f} s" for count, seconds in found.step_seconds.items())
        say(f"a step of one candidate, by how many share a batch: {shown}")


def table_of(found: Tuning) -> str:
    """All candidates, the best first."""
    rows = [("virtual tokens", "learning rate", "rounds", "steps", "held-out loss", "at step")]
    for trial in found.trials:
        step, loss = trial.best
        candidate: Candidate = trial.candidate
        rows.append(
            (str(candidate.num_virtual_tokens), f"{candidate.learning_rate:g}", str(trial.rung))
            + (str(trial.steps), f"{loss:.3f}", str(step))
        )
    return table(rows)


def command(arguments: argparse.Namespace, found: Tuning) -> str:
    """`prefixcore train` with what was found."""
    best = found.best
    parts = ["prefixcore", "train", "--model", str(arguments.model), "--data", str(arguments.data)]
    chosen: dict[str, Any] = {name: getattr(arguments, name) for name in SHARED}
    chosen["num_virtual_tokens"] = best.candidate.num_virtual_tokens
    usual = {
        "batch_size": 8, "seed": 0, "prompt_loss_weight": PROMPT_LOSS_WEIGHT, "eval_limit": 256, "dtype": "auto",
        "prompt_column": "prompt", "completion_column": "completion",
    }  # fmt: skip
    if arguments.eval_data is not None or arguments.eval_fraction == 0.1:
        del chosen["eval_fraction"]
    for name, value in chosen.items():
        if value is None or value is False or usual.get(name) == value:
            continue
        if value is True:
            parts.append(option(name))
            continue
        escaped = ",".join(map(str, value)) if isinstance(value, list) else str(value)
        escaped = escaped.replace("\n", "\\n").replace("\t", "\\t")
        # Behind a space, argparse takes what begins with a dash for an option.
        parts += [f"{option(name)}={escaped}"] if escaped.startswith("-") else [option(name), escaped]
    parts += ["--lr", str(best.candidate.learning_rate), "--steps", str(best.steps), "--out", str(arguments.out)]
    return shlex.join(parts)


def save(
    arguments: argparse.Namespace,
    handle: Any,
    found: Tuning,
    evaluations: dict[str, Any],
    provenance: Provenance,
    result: Any,
) -> None:
    """Write adapter, record and picture as one."""
    from ..adapters import AdapterError
    from ..training.tuning import draw_tuning

    record = found.best.record(
        arguments.batch_size,
        arguments.seed,
        prompt_loss_weight=arguments.prompt_loss_weight,
        interrupted=found.interrupted,
    )
    fields = {
        **asked_for(arguments), "held_out": evaluations, "tuning": found.to_dict(), **record.to_dict(),
    }  # fmt: skip
    picture = draw_tuning(found, title=f"{handle.config.method}, {arguments.data.name}")
    with signals_held_back(), user_errors(AdapterError):
        handle.save(arguments.out, record=fields, curve=picture, **provenance.fields(record, result))
    _interrupt.tell(f"the adapter is in {arguments.out}")

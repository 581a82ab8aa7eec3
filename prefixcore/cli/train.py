"""Train a prefix or a soft prompt for a frozen model, and evaluate it on held-out examples."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import math
import os
import secrets
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .common import adapter_folder, load_adapter, open_model, option
from .failures import UserError, user_errors
from .limits import (
    MOST_VIRTUAL_TOKENS,
    LengthLimit,
    check_ids,
    check_virtual_tokens,
    is_too_long,
    learned_positions,
    stated_positions,
)
from .output import check_open, say
from .tokenizers import say_what_ends, say_what_runs_together
from .train_examples import HeldOutEvaluator, as_texts, read_examples, tokenize_all
from .train_layers import check_train_layers
from .train_options import LEARNING_RATES, add_arguments, build_config
from .train_provenance import Provenance
from .train_report import Report
from .train_result import conclude
from .train_start import SAID, Start, most_start_tokens, say_what_a_prefix_leaves_out

if TYPE_CHECKING:
    from ..training import TrainingOptions

__all__ = ["add_arguments", "run"]

EPOCHS = 5.0
MOST_EPOCHS = 1e9


def run(arguments: argparse.Namespace) -> int:
    """Train, save, evaluate; exit code 130 if Ctrl-C ended the training early (what there was is saved)."""
    from ..training import DataError, train
    from ..training.tracking import TrackerError, check_trackers

    # Whatever is wrong with the request is found before the model is opened, and long before a write.
    check_out(arguments.out)
    with user_errors(TrackerError, what="--report-to"):
        check_trackers(arguments.report_to)
    config = build_config(arguments)
    inherit_from_resumed(arguments)
    with user_errors(DataError):
        training, held_out = read_examples(arguments)
    if held_out:
        check_open()
    training_options(arguments, len(training), has_held_out=bool(held_out))  # to be made again of what templates make
    check_cache(arguments, config)

    model, tokenizer = open_model(arguments)
    check_train_layers(arguments, config, model)
    training = as_texts(arguments, model, tokenizer, training)
    held_out = as_texts(arguments, model, tokenizer, held_out)
    options = training_options(arguments, len(training), has_held_out=bool(held_out))
    with user_errors(DataError):
        most = most_start_tokens(arguments, model, tokenizer, [*training, *held_out])
        start = Start(arguments, config, training, tokenizer, most=most)
    tokens = count_virtual_tokens(arguments, model, tokenizer, start.longest)
    limit = LengthLimit.of(model, tokens, arguments.max_length)
    end, skip = arguments.end, arguments.skip_too_long
    training, train_ids = tokenize_all(model, tokenizer, training, end, limit, skip=skip)
    held_out, held_out_ids = tokenize_all(model, tokenizer, held_out, end, limit, skip=skip)
    if not train_ids:
        raise UserError(f"no example has at most {limit.tokens} tokens; raise --max-length or shorten the examples")
    if not held_out_ids:
        check_goes_by_held_out(arguments, has_held_out=False)
        options = dataclasses.replace(options, keep="last")
    say_what_ends(arguments, model, tokenizer, train_ids)
    if not arguments.chat:
        say_what_runs_together(tokenizer, train_ids)
    say(f"{len(train_ids)} examples to train on, {len(held_out_ids)} held out")
    provenance = Provenance(arguments, training, held_out, limit.tokens, str(model.dtype).removeprefix("torch."))

    learned = learned_positions(model)
    longest = None if learned is None else learned - tokens
    evaluator = HeldOutEvaluator(model, tokenizer, end, held_out, held_out_ids, longest)
    evaluator("bare model")
    with user_errors(ValueError, TypeError, NotImplementedError):  # what `attach` refuses
        config = start.best(model, training, train_ids)
    if start.is_made:
        say(SAID)
    say_what_a_prefix_leaves_out(model, config)
    handle = attach(arguments, model, tokenizer, config)
    say(f"{handle.num_trainable:,} numbers to train in {handle.num_virtual_tokens} virtual tokens")
    with Report(arguments, handle, options, held_out_ids) as report:
        evaluator("at the start")
        with user_errors(ValueError):  # a loss that is not finite
            record = train(
                handle,
                tokenizer,
                train_ids,
                held_out=held_out_ids,
                options=options,
                activations_dir=activations_dir(arguments),
                say=say,
                **report.hooks(),
            )
        return conclude(arguments, handle, record, evaluator, provenance, report)


def check_out(out: Path) -> None:
    """Refuse a place where an adapter cannot be written, or where something else would be overwritten."""
    from ..adapters import AdapterError, check_target
    from ..adapters.writing import check_outside

    if out.name in ("", "..") or (out.is_dir() and out.samefile(os.curdir)):
        raise UserError(f"--out {out}: an adapter is replaced as a whole, name and all; give a folder of its own")
    with user_errors(UnicodeEncodeError, what=f"--out {out} is not UTF-8, as safetensors needs it"):
        str(out.absolute()).encode()
    with user_errors(AdapterError):
        check_target(out)
        check_outside(out)
    parent = next(folder for folder in out.absolute().parents if folder.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise UserError(f"--out {out} cannot be written: {parent} is not a folder that you may write to")
    with user_errors(OSError, what=f"--out {out} cannot be written"), signals_held_back():
        trial = parent / f".{out.name}.writing-{secrets.token_hex(4)}"  # as a save makes it
        trial.mkdir()
        trial.rmdir()


@contextlib.contextmanager
def signals_held_back() -> Iterator[None]:
    """A block of a moment that Ctrl-C and SIGTERM do not cut in two."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def inherit_from_resumed(arguments: argparse.Namespace) -> None:
    """With `--resume`, set options that are not given as in the earlier training, so that what it held out stays so."""
    arguments.split_seed, arguments.resumed_task = arguments.seed, None
    if arguments.resume is None:
        return
    arguments.resume = adapter_folder(arguments.resume)
    from ..adapters import AdapterError, read_adapter, read_record
    from ..adapters.record import how_read

    with user_errors(AdapterError), user_errors(RecursionError, what=f"{arguments.resume}: nested too deep"):
        resumed = read_adapter(arguments.resume)
        arguments.resumed_tokens = resumed.config.num_virtual_tokens
        arguments.resumed_task = resumed.manifest.task if resumed.manifest else None
        earlier = read_record(arguments.resume)
    end, was_chat = how_read(earlier, resumed.manifest)
    if was_chat is not None and was_chat is not arguments.chat:
        before, now = ("conversations", "prompts") if was_chat else ("prompts", "conversations")
        say(
            f"warning: {arguments.resume} was trained on {before}, and goes on with {now}, which the model reads as "
            f"another text; {'leave --chat out' if arguments.chat else 'give --chat'} to go on as before"
        )
    if arguments.end is None and not arguments.chat:
        arguments.end = end
    if arguments.eval_data is not None or arguments.eval_fraction == 0:
        return
    split = earlier.get("split")
    if split and split["fraction"] >= arguments.eval_fraction and is_seed(split["seed"]):
        arguments.split_seed = split["seed"]
    else:
        say(
            f"warning: what is held out now may be among what {arguments.resume} was trained on before; "
            "give --eval-data for an honest evaluation"
        )


def is_seed(value: Any) -> bool:
    """Whether a number that was read from a file is one that a generator can be seeded with."""
    return isinstance(value, int) and 0 <= value < 2**63


def training_options(arguments: argparse.Namespace, examples: int, *, has_held_out: bool) -> TrainingOptions:
    """How to train; `--epochs` become steps."""
    from ..training import TrainingOptions

    check_goes_by_held_out(arguments, has_held_out)
    steps = arguments.steps
    if steps is None:
        epochs = EPOCHS if arguments.epochs is None else arguments.epochs
        if not 0 < epochs <= MOST_EPOCHS:
            raise UserError(f"--epochs must be above 0 and at most {MOST_EPOCHS:,.0f}, got {arguments.epochs}")
        steps = max(1, round(epochs * math.ceil(examples / arguments.batch_size)))
    for name in ("lr", "weight_decay", "max_grad_norm", "prompt_loss_weight"):
        value = getattr(arguments, name)
        if value is not None and not math.isfinite(value):
            raise UserError(f"{option(name)} must be a finite number, got {value}")
    rate = arguments.lr if arguments.lr is not None else LEARNING_RATES.get(arguments.method, 1e-3)
    with user_errors(ValueError):
        return TrainingOptions(
            steps=steps,
            learning_rate=rate,
            batch_size=arguments.batch_size,
            warmup_steps=arguments.warmup_steps,
            schedule=arguments.schedule,
            weight_decay=arguments.weight_decay,
            max_grad_norm=arguments.max_grad_norm,
            seed=arguments.seed,
            eval_every=arguments.eval_every or max(1, steps // 5),
            average=arguments.average,
            prompt_loss_weight=arguments.prompt_loss_weight,
            keep=arguments.keep or ("best" if has_held_out else "last"),
            early_stopping_patience=arguments.early_stopping_patience,
            cache_activations=arguments.cache_activations,
            activation_dtype=arguments.activation_dtype,
        )


def check_cache(arguments: argparse.Namespace, config: Any) -> None:
    """Raises UserError if activations are to be kept and cannot be, whatever the model; or their folder is not one."""
    from ..training.activations.disk import Folder

    if arguments.activations_dir is not None and arguments.cache_activations != "disk":
        raise UserError("--activations-dir is for --cache-activations disk; leave it out")
    if arguments.cache_activations is None:
        return
    reached = arguments.train_layers or (None if config is None else getattr(config, "layers", None) or [0])
    if reached is not None and 0 in reached:
        raise UserError(
            "--cache-activations keeps what the layers below the trained ones make of each example, and here is none "
            "below: give --method prefix and --train-layers (or --layers) without the first ones, such as 15-29 of 30"
        )
    folder = activations_dir(arguments)
    if folder is not None:
        with user_errors(ValueError):
            Folder.check(folder)


def activations_dir(arguments: argparse.Namespace) -> Path | None:
    """Where activations are kept on the disk."""
    if arguments.cache_activations != "disk":
        return None
    if arguments.activations_dir is not None:
        return Path(arguments.activations_dir)
    out: Path = arguments.out
    return out.with_name(f"{out.name}.activations")


def check_goes_by_held_out(arguments: argparse.Namespace, has_held_out: bool) -> None:
    """Raises UserError if an option goes by held-out losses, and there will be none."""
    if has_held_out:
        return
    for name in ("keep", "early_stopping_patience"):
        if (value := getattr(arguments, name)) not in (None, "last"):
            raise UserError(
                f"{option(name)} {value} goes by held-out examples, and there are none; give --eval-data or an "
                f"--eval-fraction above 0, or leave {option(name)} out"
            )


def count_virtual_tokens(arguments: argparse.Namespace, model: Any, tokenizer: Any, config: Any) -> int:
    """How many virtual tokens there will be; an error if the model cannot take as many, or cannot read their text."""
    from ..training import DataError
    from ..training.data import encode

    if config is None:
        count = arguments.resumed_tokens
    else:
        count = config.num_virtual_tokens
        if config.init_text is not None:
            if is_too_long(config.init_text, stated_positions(model) or MOST_VIRTUAL_TOKENS):
                raise UserError(f"--init-text has {len(config.init_text):,} characters, more than the model can read")
            with user_errors(DataError):
                ids = encode(tokenizer, config.init_text, "--init-text")
            if not ids:
                raise UserError("--init-text has no token; give a longer one")
            check_ids(model, ids, "--init-text")
            count = count or len(ids)
    check_virtual_tokens(model, count)
    return int(count)


def attach(arguments: argparse.Namespace, model: Any, tokenizer: Any, config: Any) -> Any:
    """Attach a new adapter, or the one to go on with."""
    from .. import hf
    from ..adapters import AdapterError
    from ..training import train_layers

    with user_errors(AdapterError, ValueError, TypeError, NotImplementedError):
        if config is None:
            handle = load_adapter(model, arguments.resume, trainable=True, force=arguments.force)
        else:
            handle = hf.attach(model, config, tokenizer=tokenizer)
        if arguments.train_layers is not None:
            train_layers(handle, arguments.train_layers)
        return handle

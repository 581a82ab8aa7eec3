"""`distill`: a long text becomes a short prefix behind which the frozen model answers as behind the text."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from ..hf import attach
from ..hf.attaching import check_model
from ..training.causal import TO_ANSWER, check_causal
from ..training.data import pad_id
from ..training.weights import configuration_digest, weights_digest
from .checks import check_ids, check_kinds, check_length, positions_of
from .errors import DistillError
from .front import Front
from .measuring import measure
from .options import DistillOptions
from .progress import Progress
from .prompts import parts
from .questions import SelfStudy
from .report import Report
from .result import Distilled
from .store import Store
from .student import Found, Student
from .targets import Teacher, whole
from .writing import Prompt, writer


def distill(
    model: PreTrainedModel,
    tokenizer: Any,
    context: str,
    *,
    options: DistillOptions,
    prompts: Sequence[Prompt] = (),
    held_out: Sequence[Prompt] = (),
    cache: str | Path | None = None,
    show_progress: bool | None = False,
    say: Callable[[str], None] = lambda text: None,
    on_trained: Callable[[Distilled], object] = lambda distilled: None,
) -> Distilled:
    """Makes a prefix of P virtual tokens that stands in for a text of many more.

    The teacher is the model itself with the whole text before each prompt, the student the same model with the prefix,
    which starts from keys and values of the text and learns the teacher's probabilities on prompts and its answers.
    Prompts are yours, or those that the model asks itself about parts of the text, or both. Context distillation
    (Snell et al., arXiv:2209.15189) into keys and values by self-study (Cartridges: Eyuboglu et al.,
    arXiv:2506.06266), which start by attention matching (arXiv:2602.16284).

    Args:
        model: a causal transformers model with nothing attached; it is frozen.
        tokenizer: the model's.
        context: the text; with `options.chat` the system message.
        options: P, how many questions, and how it is trained.
        prompts: yours, to learn from; where they have a completion it says what is right, and is not learnt.
        held_out: prompts that are never trained on, on which all is measured; none: a part of `prompts`, or of the
            questions where there are no prompts, is set aside.
        cache: a folder in which questions and the teacher's answers are kept, to go on from; None: nothing is kept.
        show_progress: bars on standard error; None: on a terminal.
        say: is told what is being done.
        on_trained: is given each prefix that may be the one, before it is measured, which takes a while: it can be
            saved meanwhile.

    Returns:
        The prefix, attached to the model, with its report; `save` writes the adapter.

    Raises:
        DistillError: no text, a P that saves nothing, too few prompts, a text and prompts that the model has no
            positions for, or files in `cache` that are damaged.
        DataError: a text that cannot be encoded, or a model without a chat template that is to have one.
        TypeError, ValueError, NotImplementedError: as of `attach`.

    After an error the model is as it was. While it answers it is in evaluation mode, whichever it is in.

    Examples:
        >>> from prefixcore.distill import DistillOptions, distill
        >>> options = DistillOptions(num_virtual_tokens=4, questions=24, max_answer_tokens=4, steps=2)
        >>> distilled = distill(model, tokenizer, "France -> Paris; Japan -> Tokyo", options=options)
        >>> distilled.report.tokens_saved
        27
        >>> distilled.save("capitals").name
        'capitals'
    """
    check_model(model)
    check_causal(model, TO_ANSWER)
    check_kinds(context, options, (*prompts, *held_out))
    was_training = model.training
    model.eval()  # a teacher with dropout would answer otherwise each time
    try:
        return _distill(model, tokenizer, context, options, prompts, held_out, cache, show_progress, say, on_trained)
    finally:
        model.train(was_training)


def _distill(
    model: PreTrainedModel,
    tokenizer: Any,
    context: str,
    options: DistillOptions,
    prompts: Sequence[Prompt],
    held_out: Sequence[Prompt],
    cache: str | Path | None,
    show_progress: bool | None,
    say: Callable[[str], None],
    on_trained: Callable[[Distilled], object],
) -> Distilled:
    """`distill`, of a model in evaluation mode."""
    written = writer(tokenizer, context, chat=options.chat)
    count, length = options.num_virtual_tokens, len(written.front)
    if count >= length:
        raise DistillError(
            f"{count:,} virtual tokens save nothing of a text of {length:,} tokens: take fewer, or make the text "
            "itself a prefix (prefixcore bake --text-file)"
        )
    check_ids(model, written.front, "the text")
    check_length(model, length, 1 + options.max_answer_tokens, "the text")
    progress = Progress(show_progress)
    padding = pad_id(tokenizer, model)
    store = Store(None if cache is None else Path(cache))
    digest = "" if cache is None else digest_of(model)

    questions: list[Prompt] = []
    if options.questions:
        study = SelfStudy(model, tokenizer, context, digest, padding, options, store)
        with progress(options.questions, "questions") as advance:
            made = study.prompts(advance)
        room = (positions_of(model) or math.inf) - length - options.max_answer_tokens
        questions = [each for each in made if len(written.ask(each).behind) <= room]
        left_out = (
            f"; {len(made) - len(questions)} more leave no room for an answer" if len(questions) < len(made) else ""
        )
        say(f"{len(questions)} questions that the model asked itself{left_out}")
    training, validation, held = parts(prompts, questions, held_out, options)
    asked = [[written.ask(prompt) for prompt in part] for part in (training, validation, held)]
    for each in (each for part in asked for each in part):
        check_ids(model, each.behind, each.prompt.source)
    longest = max(len(each.behind) for part in asked for each in part)
    check_length(model, length, longest + options.max_answer_tokens, "the text and the longest prompt")
    longest = max(len(each.alone) for part in asked for each in part)  # with a template's own system message, say
    check_length(model, count, longest + options.max_answer_tokens, "the prefix and the longest request")
    say(f"{len(training)} prompts to learn from, {len(validation)} to choose the step by, {len(held)} held out")

    # What the model asks about a text leaves much of it out; said again, all of it is learnt.
    room = (positions_of(model) or math.inf) - length
    recited = [each for each in written.recite() if options.questions and each.length <= room]
    front = Front.of(model, written.front)
    if front.pairs is None:
        say(f"no prefix is equal to a text on {type(model).__name__}: its tokens stand before each prompt (slow)")
    teacher = Teacher(model, tokenizer, front, digest, padding, options, store)
    with progress(sum(map(len, [*asked, recited])), "answers") as advance:
        taught = teacher.targets(asked[0], greedy=False, progress=advance)
        said_again = teacher.targets(recited, greedy=False, progress=advance)
        judged = teacher.targets(asked[1], greedy=True, progress=advance)
        measured = teacher.targets(asked[2], greedy=True, progress=advance)
    # What the teacher expects of a prompt's own words says as much of the text as its answers do.
    with progress(len(taught), "the prompts' own words") as advance:
        learnt = teacher.targets([whole(each) for each in taught], greedy=False, progress=advance)
    learnt += said_again
    report = Report(
        length,
        count,
        {"training": len(learnt), "validation": len(judged), "held_out": len(measured)},
        is_prefix_exact=front.pairs is not None,
    )
    student = Student(model, tokenizer, front, learnt, judged, options, padding, show_progress, say)

    def attached(found: Found, interrupted: bool = False) -> Distilled:
        handle = attach(model, student.config(found.values), tokenizer=tokenizer)
        handle.module.requires_grad_(False)
        return Distilled(handle, report, found.record, interrupted, options, context, taught + said_again, measured)

    def keep(found: Found) -> None:
        distilled = attached(found)
        with distilled.handle:
            on_trained(distilled)

    found, interrupted = student.search(report, keep)
    if not interrupted:
        say("measuring on held-out prompts")
        measure(report, student, found, measured, writer(tokenizer, cut(tokenizer, context, report), chat=options.chat))
    return attached(found, interrupted)


def digest_of(model: PreTrainedModel) -> str:
    """What the model's answers follow from: weights, configuration, and where and how it is set to end and choose."""
    said = getattr(model, "generation_config", None)
    values = {} if said is None else said.to_dict()
    values.pop("transformers_version", None)
    return f"{weights_digest(model)} {configuration_digest(model)} {json.dumps(values, sort_keys=True, default=str)}"


def cut(tokenizer: Any, context: str, report: Report) -> str:
    """The text as far as its first P tokens, or as its first token that is no white space, which says something."""
    ids = tokenizer(context, add_special_tokens=False)["input_ids"]
    for count in range(report.num_virtual_tokens, len(ids)):
        if (text := str(tokenizer.decode(ids[:count]))).strip():
            return text
    return context

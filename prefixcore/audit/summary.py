"""The five sentences, the verdict table and the limits: what the numbers say, in words."""

from __future__ import annotations

from typing import Any

from .limits import limits
from .statistics import CHANCE
from .wording import interval, nats, p_value, percent, plural, token, visible

MOST_NAMED = 3
"""Other tasks that the summary names; the table has all."""


def summarize(data: dict[str, Any]) -> dict[str, Any]:
    """The data with `summary`, `verdicts` and `limits`, which are made of it alone."""
    sentences = [_what(data), _task(data), _leak(data), _inside(data), _text(data)]
    return {**data, "summary": sentences, "verdicts": verdicts(data), "limits": limits(data)}


def _what(data: dict[str, Any]) -> str:
    subject = data["subject"]
    task = subject["task"]
    stated = f"its author states its task as “{visible(task)}”" if task else "it does not say what its task is"
    return (
        f"“{visible(subject['name'])}” is a {subject['kind']} of "
        f"{plural(subject['num_virtual_tokens'], 'virtual token')} ({subject['numbers']:,} numbers) for "
        f"{visible(subject['base_model'] or data['model']['class'])}, and {stated}."
    )


def _task(data: dict[str, Any]) -> str:
    found = data["task"]["summary"]
    return (
        f"On {plural(found['probes'], 'probe')} of its task the model gives {found['right_with']} right answers with "
        f"it ({percent(found['right_share_with'])}, 95 % interval {interval(found['interval_with'])}) and "
        f"{found['right_without']} without it ({percent(found['right_share_without'])}); the loss of the right answer "
        f"goes from {nats(found['loss_without'])} to {nats(found['loss_with'])} nats a token."
    )


def _leak(data: dict[str, Any]) -> str:
    own, parts = data["task"]["summary"], []
    for found in data["others"][:MOST_NAMED]:
        summary = found["summary"]
        how = f"{summary['changed']} of {summary['probes']} greedy answers"
        parts.append(f"{how} on {visible(found['name'], 40)} (KL {nats(summary['kl_first'])} nats at the first token)")
    text = (
        f"Outside its task it changes {' and '.join(parts)}; in its task {own['changed']} of {own['probes']} "
        f"(KL {nats(own['kl_first'])})"
    )
    worst = max(found["summary"]["changed_share"] for found in data["others"])
    if worst >= 0.5:
        return f"{text}. It does not stay with its task, so it must be attached for that one task and no other."
    if worst >= 0.1:
        return f"{text}. It leaks into other tasks, so attach it for its own alone."
    return f"{text}. On these it hardly acts, which says nothing about texts that were not tried."


def _inside(data: dict[str, Any]) -> str:
    attention, without = data["attention"], data["leave_one_out"]
    if "not_measured" in without:
        return f"What the single virtual tokens do was not measured: {without['not_measured']}."
    total = data["subject"]["num_virtual_tokens"]
    part = ""
    if "not_measured" not in attention:
        part = (
            f"The virtual tokens together get {percent(attention['mean'])} of the attention (an even share would be "
            f"{percent(attention['uniform'])}); "
        )
    second = without["second_largest_change"]
    next_one = "" if second is None else f"; the next, {nats(second)}"
    text = (
        f"{part}taking out a single one raises the loss by at most {nats(without['largest_change'])} nats a token "
        f"(number {without['most_needed']} of 0 to {total - 1}{next_one}), and {without['of_little_effect']} of "
        f"{total} change it by less than {without['little']:g}."
    )
    return text[0].upper() + text[1:]


def _text(data: dict[str, Any]) -> str:
    text = data["text"]
    if "best" not in text:
        return "No written prompt was tried, so nothing is known about a text in its place."
    best = text["candidates"][text["best"]]
    tried = plural(len(text["candidates"]), "written prompt")
    scores = (
        f"The best of {tried} ({visible(best['name'], 60)}) gets {best['right']} of {text['scored']} right "
        f"({percent(best['share'])}, loss {nats(best['loss'])}), the adapter {text['adapter']['right']} "
        f"({percent(text['adapter']['share'])}, loss {nats(text['adapter']['loss'])})"
    )
    if text["metric"] == "loss":
        than = "no higher" if text["verdict"] == "as good" else "higher"
        return f"{scores}: neither gets one right, and the text's loss is {than}."
    verdict = TEXT_VERDICTS[text["verdict"]]
    if text["verdict"] != "adapter better" and text["loss_p"] < CHANCE and 2 * text["loss_lower"] > text["scored"]:
        lower = f"{text['loss_lower']} of {text['scored']}"
        verdict += f"; the adapter's loss is lower on {lower} all the same ({p_value(text['loss_p'])})"
    return f"{scores}: {verdict}."


TEXT_VERDICTS = {
    "as good": "the text is as good, so you may not need the vector at all",
    "not told apart": "on so few probes chance may explain the difference, so try the text on more before you rely on "
    "the vector",
    "adapter better": "none of these texts replaces it",
}


def verdicts(data: dict[str, Any]) -> list[dict[str, str]]:
    """What was measured, what came out, and how to read it."""
    task = data["task"]["summary"]
    rows = [
        (
            "Right answers in its task",
            f"{task['right_with']} of {task['probes']} with it, {task['right_without']} without",
            f"Greedy answers, compared letter by letter. The true share is likely within "
            f"{interval(task['interval_with'])}; {plural(task['lost'], 'probe')} went from right to wrong.",
        ),
        (
            "Loss in its task",
            f"{nats(task['loss_without'])} → {nats(task['loss_with'])} nats a token",
            "How surprised the model is by the right answer. Lower is better; it also moves where no answer changes.",
        ),
    ]
    rows += [_other(other) for other in data["others"]]
    rows += [_attention(data), _leave_one_out(data), _nearest(data), _text_row(data)]
    return [{"measured": a, "result": b, "reading": c} for a, b, c in rows]


def _other(other: dict[str, Any]) -> tuple[str, str, str]:
    found = other["summary"]
    result = (
        f"{found['changed']} of {found['probes']} answers changed, {nats(found['kl_first'])} nats at the first token"
    )
    reading = "0 would mean that it leaves other texts alone."
    if "lost" in found:
        reading += f" Right: {found['right_with']} with it, {found['right_without']} without."
    return f"Leak into {visible(other['name'], 60)}", result, reading


def _attention(data: dict[str, Any]) -> tuple[str, str, str]:
    name, found = "Attention on the virtual tokens", data["attention"]
    if "not_measured" in found:
        return name, "not measured", visible(found["not_measured"], 400)
    return (
        name,
        f"{percent(found['mean'])} of all, up to {percent(found['largest']['mass'])} (layer "
        f"{found['largest']['layer']}, head {found['largest']['head']})",
        f"An even share would be {percent(found['uniform'])}. Attention says where a head reads, not what it does with "
        "it.",
    )


def _leave_one_out(data: dict[str, Any]) -> tuple[str, str, str]:
    name, found = "Single virtual tokens", data["leave_one_out"]
    if "not_measured" in found:
        return name, "not measured", visible(found["not_measured"], 400)
    total = data["subject"]["num_virtual_tokens"]
    return (
        name,
        f"at most {nats(found['largest_change'])} nats for one (no. {found['most_needed']}); "
        f"{found['of_little_effect']} of {total} below {found['little']:g}",
        "Loss without one virtual token. Two that can stand in for each other both look useless, and are not.",
    )


def _nearest(data: dict[str, Any]) -> tuple[str, str, str]:
    name, found = "Nearest words", data["nearest"]
    if "not_measured" in found:
        return name, "not measured", visible(found["not_measured"], 400)
    kind = found["kinds"].get("embedding") or found["kinds"]["value"]
    shown = ", ".join(token(row[0]["text"]) for row in kind["tokens"][:6])
    where = "" if "embedding" in found["kinds"] else " (values of the first layer)"
    return (
        name,
        f"median cosine {kind['median_cosine']:.2f}{where}: {shown} …",
        f"Two real tokens come to {kind['median_between_real_tokens']:.2f}, random directions to "
        f"{kind['median_of_random_directions']:.2f}. A near word is no meaning.",
    )


def _text_row(data: dict[str, Any]) -> tuple[str, str, str]:
    name, text = "A text in its place", data["text"]
    if "best" not in text:
        return name, "not tried", "Give an instruction or examples, so that there is something to compare with."
    best = text["candidates"][text["best"]]
    words = {
        "as good": "A text that people can read does as well.",
        "not told apart": "The adapter is ahead, but not by more than chance may give.",
        "adapter better": "The adapter is ahead by more than chance is likely to give.",
    }[text["verdict"]]
    return (
        name,
        f"best text {best['right']} of {text['scored']}, adapter {text['adapter']['right']} of {text['scored']}",
        f"{words} (Sign test of the {text['metric']}: {p_value(text['p'])}.) Its loss is lower than the text's on "
        f"{text['loss_lower']} of {text['scored']} probes ({p_value(text['loss_p'])}).",
    )

"""What an audit cannot say, in general and of this adapter."""

from __future__ import annotations

from typing import Any

from .wording import plural, visible

ALWAYS = (
    "The probes decide what was seen. Behaviour on texts that were not tried is not known, and an adapter can hold "
    "behaviour that only a certain input brings out.",
    "Greedy decoding was measured. Sampling shows more of what the model may say.",
    "Nearest words, norms and attention describe vectors. None of them proves what a virtual token means or does.",
    "The statements about task, data, licence and use are the adapter's own. A digest shows that a file is the same "
    "one, not that what it says is true.",
    "Nothing here measures bias, safety or the leaking of personal data from the training set.",
)


def limits(data: dict[str, Any]) -> list[str]:
    """The limits of this audit, those of this adapter first."""
    found = []
    subject, task, text = data["subject"], data["task"], data["text"]
    if subject["forced"]:
        found.append(
            "The model is not the one that the adapter was trained for, and was taken all the same: "
            + "; ".join(visible(each) for each in subject["forced"])
            + "."
        )
    if (subject["data"] or {}).get("sha256") == task["sha256"]:
        found.append(
            "The probes are the adapter's training data, by their digest: it has seen every one of them, so its scores "
            "say nothing about prompts that it has not."
        )
    elif (subject["split"] or {}).get("sha256") == task["sha256"]:
        found.append("The probes are those that the adapter states it was not trained on, by their digest.")
    for probes in (task, *data["others"]):
        if probes["used"] < probes["given"]:
            some = f"{probes['used']:,} of {probes['given']:,}"
            found.append(f"Of {visible(probes['name'], 60)} {some} were used: the first, or built-in texts that fit.")
    if task["used"] < 30:
        found.append(f"{plural(task['used'], 'probe')} are few: the interval of the share of right answers is wide.")
    if not data["settings"]["others_given"]:
        found.append(
            "No other task's probes were given; the leak was measured on sixteen short texts that come with prefixcore."
        )
    if text["examples_from_probes"]:
        found.append(
            f"No examples were given for written prompts to show, so {plural(text['examples'], 'probe')} were set "
            "aside for it: texts and adapter are compared on the others."
        )
    if text["examples_left_out"]:
        found.append(
            f"{plural(text['examples_left_out'], 'probe')} are among the examples that were given. If these are the "
            "training data, the adapter has seen these probes, and its score is flattered."
        )
    if "best" in text:
        found.append(
            f"The best written prompt was chosen among {len(text['candidates'])} by the same probes that score it, "
            "which flatters the text a little. A person who takes pains may write a better one."
        )
    missing = [name for name, field in STATED.items() if not subject[field]]
    if missing:
        found.append(f"The adapter does not state: {', '.join(missing)}.")
    return [*found, *ALWAYS]


STATED = {
    "its task": "task",
    "its licence": "license",
    "its intended use": "intended_use",
    "its training data": "data",
}

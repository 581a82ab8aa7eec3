"""Texts of no particular task, for an audit that is given no other task's probes."""

from __future__ import annotations

from ..training import Example

NAME = "built-in texts"

_TEXTS = (
    ("The weather will stay dry until the evening, when", " clouds move in from the west and bring some rain."),
    ("She closed the book, looked out of the window and", " thought about what her brother had told her."),
    ("Dear Ms Hill, thank you for your letter of 3 May. We", " are sorry to hear that the parcel arrived damaged."),
    ("Question: How many legs does a spider have?\nAnswer:", " A spider has eight legs."),
    ("def area(width, height):\n    return", " width * height\n"),
    ("To make the dough, mix the flour with", " salt, water and a little yeast, and knead it for ten minutes."),
    ("2 + 2 = 4\n3 + 3 = 6\n4 + 4 =", " 8\n"),
    ("The committee met on Tuesday to discuss", " the budget for the coming year."),
    ("English: Good morning.\nFrench:", " Bonjour.\n"),
    ("Water boils at a lower temperature in the mountains because", " the pressure of the air is lower there."),
    ("Once upon a time there was a fox who", " lived at the edge of a great forest."),
    ("The patient was advised to take the tablets", " twice a day, after meals."),
    ("Monday, Tuesday, Wednesday, Thursday,", " Friday, Saturday, Sunday."),
    ("Review: The room was clean and the staff were kind.\nOpinion:", " positive\n"),
    ("If the train leaves at nine and takes two hours, it", " arrives at eleven."),
    ('{"name": "Ann", "age": 31, "city":', ' "London"}'),
)


def generic_texts() -> list[Example]:
    """Sixteen short texts: letters, prose, code, arithmetic, a translation, and how each may go on."""
    return [Example(text, rest, f"{NAME}, {i}") for i, (text, rest) in enumerate(_TEXTS, start=1)]

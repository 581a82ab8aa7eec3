"""The names that people know CPUs by, from what the system says: `lscpu`'s name, family and model."""

from __future__ import annotations

import re

PRODUCTS = {
    r"AMD EPYC\b.*, family 25, model 1$": "AMD EPYC, Zen 3",
    r"AMD EPYC\b.*, family 25, model 17$": "AMD EPYC, Zen 4",
    r"AMD EPYC\b.*, family 26, model 2$": "AMD EPYC, Zen 5",
    r"Intel\(R\) Xeon\(R\).*, family 6, model 106$": "Intel Xeon, Ice Lake",
    r"Intel\(R\) Xeon\(R\).*, family 6, model 143$": "Intel Xeon, Sapphire Rapids",
    r"Intel\(R\) Xeon\(R\).*, family 6, model 207$": "Intel Xeon, Emerald Rapids",
    r"Intel\(R\) Xeon\(R\).*, family 6, model 173$": "Intel Xeon, Granite Rapids",
    # A virtual machine that hides its model: 167 would be Rocket Lake, which has no AMX, and this one computes in AMX
    # tiles, which Sapphire Rapids was the first to have.
    r"Intel\(R\) Xeon\(R\) Processor, family 6, model 167$": "Intel Xeon, Sapphire Rapids or newer",
}


def product(cpu: str) -> str:
    """The product's name; where it is not known, the first two words and the model's number."""
    for pattern, name in PRODUCTS.items():
        if re.match(pattern, cpu):
            return name
    words = re.sub(r"\((R|TM)\)", "", cpu).replace(",", " ").split()
    return " ".join([*words[:2], *re.findall(r"model \d+$", cpu)])

"""A prefix trained by a bare PyTorch loop, then asked for an answer."""

import argparse

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import prefixcore
from prefixcore.training import Example, collate, tokenize

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--model", required=True)
parser.add_argument("--out", default="capitals")
parser.add_argument("--steps", type=int, default=50)
options = parser.parse_args()

model = AutoModelForCausalLM.from_pretrained(options.model)
tokenizer = AutoTokenizer.from_pretrained(options.model)
handle = prefixcore.attach(model, prefixcore.PrefixTuningConfig(init_text="France -> Paris\n"), tokenizer=tokenizer)
pairs = [("Portugal", "Lisbon"), ("Norway", "Oslo"), ("Peru", "Lima"), ("Kenya", "Nairobi")]
batch = collate(tokenize(tokenizer, [Example(f"{c} ->", f" {city}") for c, city in pairs], end="\n"), pad_token_id=0)
optimizer = torch.optim.AdamW(handle.parameters(), lr=2e-3)
for step in range(options.steps):
    loss = model(**batch).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    print(f"step {step + 1}: loss {loss.item():.3f}")
handle.save(options.out, task="name the capital")
asked = tokenizer("Portugal ->", return_tensors="pt")
print(tokenizer.decode(model.generate(**asked, max_new_tokens=5)[0]))

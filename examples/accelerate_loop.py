"""A prefix trained with Accelerate, by `python` on one device or by `accelerate launch` on several."""

import argparse

import torch
from accelerate import Accelerator
from transformers import AutoModelForCausalLM, AutoTokenizer

import prefixcore
from prefixcore.training import Example, collate, tokenize

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--model", required=True)
parser.add_argument("--out", default="capitals")
parser.add_argument("--steps", type=int, default=50)
parser.add_argument("--log-with", help="tensorboard, wandb, ...")
options = parser.parse_args()

accelerator = Accelerator(log_with=options.log_with, project_dir=f"{options.out}-logs")
accelerator.init_trackers("capitals")
model = AutoModelForCausalLM.from_pretrained(options.model)
tokenizer = AutoTokenizer.from_pretrained(options.model)
handle = prefixcore.attach(model, prefixcore.PrefixTuningConfig(init_text="France -> Paris\n"), tokenizer=tokenizer)
examples = tokenize(tokenizer, [Example("Portugal ->", " Lisbon"), Example("Norway ->", " Oslo")], end="\n")
loader = torch.utils.data.DataLoader(examples, 2, shuffle=True, collate_fn=lambda rows: collate(rows, pad_token_id=0))
optimizer = torch.optim.AdamW(handle.parameters(), lr=2e-3)
prepared, optimizer, loader = accelerator.prepare(model, optimizer, loader)
step = 0
while step < options.steps:
    for batch in loader:
        loss = prepared(**batch).loss
        accelerator.backward(loss)
        accelerator.log({"loss": loss.item(), **prefixcore.measure(handle, batch)}, step=step)
        optimizer.step()
        optimizer.zero_grad()
        step += 1
if accelerator.is_main_process:
    handle.save(options.out, task="name the capital")
accelerator.end_training()

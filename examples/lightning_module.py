"""A prefix trained by Lightning: a LightningModule whose optimizer has the virtual tokens alone."""

import argparse

import lightning
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import prefixcore
from prefixcore.training import Example, collate, tokenize

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--model", required=True)
parser.add_argument("--out", default="capitals")
parser.add_argument("--steps", type=int, default=50)
options = parser.parse_args()


class PrefixTuning(lightning.LightningModule):
    def __init__(self, model, handle):
        super().__init__()
        self.model, self.handle = model, handle

    def training_step(self, batch, index):
        return self.model(**batch).loss

    def configure_optimizers(self):
        return torch.optim.AdamW(self.handle.parameters(), lr=2e-3)


model = AutoModelForCausalLM.from_pretrained(options.model)
tokenizer = AutoTokenizer.from_pretrained(options.model)
handle = prefixcore.attach(model, prefixcore.PrefixTuningConfig(init_text="France -> Paris\n"), tokenizer=tokenizer)
examples = tokenize(tokenizer, [Example("Portugal ->", " Lisbon"), Example("Norway ->", " Oslo")], end="\n")
loader = torch.utils.data.DataLoader(examples, 2, collate_fn=lambda rows: collate(rows, pad_token_id=0))
trainer = lightning.Trainer(max_steps=options.steps, logger=False, enable_checkpointing=False)
trainer.fit(PrefixTuning(model, handle), loader)
handle.save(options.out, task="name the capital")

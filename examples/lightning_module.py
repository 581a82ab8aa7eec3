"""A prefix trained by Lightning: a LightningModule whose optimizer has the virtual tokens alone, and what it logs."""

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
    def training_step(self, batch, index):
        self.batch, self.loss = batch, self.model(**batch).loss
        return self.loss

    def on_before_optimizer_step(self, optimizer):
        self.log_dict({"loss": self.loss.detach(), **prefixcore.measure(self.handle, self.batch)})

    def configure_optimizers(self):
        return torch.optim.AdamW(self.handle.parameters(), lr=2e-3)


model = AutoModelForCausalLM.from_pretrained(options.model)
tokenizer = AutoTokenizer.from_pretrained(options.model)
handle = prefixcore.attach(model, prefixcore.PrefixTuningConfig(init_text="France -> Paris\n"), tokenizer=tokenizer)
rows = tokenize(tokenizer, [Example("Portugal ->", " Lisbon"), Example("Norway ->", " Oslo")], end="\n")
trainer = lightning.Trainer(max_steps=options.steps, enable_checkpointing=False, default_root_dir=f"{options.out}-logs")
module = PrefixTuning()
module.model, module.handle = model, handle
trainer.fit(module, torch.utils.data.DataLoader(rows, 2, collate_fn=lambda rows: collate(rows, pad_token_id=0)))
handle.save(options.out, task="name the capital")

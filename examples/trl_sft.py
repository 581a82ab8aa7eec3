"""A prefix trained by TRL's SFTTrainer: packed and padding-free, with the loss on the completions alone."""

import argparse

from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

import prefixcore

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--model", required=True)
parser.add_argument("--out", default="capitals")
parser.add_argument("--steps", type=int, default=50)
options = parser.parse_args()

model = AutoModelForCausalLM.from_pretrained(options.model)
tokenizer = AutoTokenizer.from_pretrained(options.model)
config = prefixcore.PrefixTuningConfig(init_text="The capital of a country.\nFrance -> Paris\n")
handle = prefixcore.attach(model, config, tokenizer=tokenizer)

pairs = [("Portugal", "Lisbon"), ("Norway", "Oslo"), ("Peru", "Lima"), ("Kenya", "Nairobi")]
dataset = Dataset.from_list([{"prompt": f"{country} ->", "completion": f" {capital}"} for country, capital in pairs])
arguments = SFTConfig(
    f"{options.out}-checkpoints", max_steps=options.steps, per_device_train_batch_size=2, learning_rate=2e-3,
    packing=True, max_length=64, gradient_checkpointing=False, bf16=False, logging_steps=5, report_to="none",
)  # fmt: skip
trainer = SFTTrainer(model, arguments, train_dataset=dataset, processing_class=tokenizer)
trainer.add_callback(prefixcore.PromptCallback(trainer))
trainer.train()
handle.save(options.out, task="name the capital")

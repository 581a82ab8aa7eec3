"""A prefix trained by transformers' Trainer: packed batches, small checkpoints, and what its tracker gets to see."""

import argparse

from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

import prefixcore

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--model", required=True)
parser.add_argument("--out", default="capitals")
parser.add_argument("--steps", type=int, default=50)
parser.add_argument("--report-to", default="none", help="tensorboard, wandb, ...")
options = parser.parse_args()

model = AutoModelForCausalLM.from_pretrained(options.model)
tokenizer = AutoTokenizer.from_pretrained(options.model)
config = prefixcore.PrefixTuningConfig(init_text="The capital of a country.\nFrance -> Paris\n")
handle = prefixcore.attach(model, config, tokenizer=tokenizer)


def features(country: str, capital: str) -> dict[str, list[int]]:
    prompt = tokenizer(f"{country} ->")["input_ids"]
    answer = tokenizer(f" {capital}\n", add_special_tokens=False)["input_ids"]
    return {"input_ids": prompt + answer, "labels": [-100] * len(prompt) + answer}


pairs = [("Portugal", "Lisbon"), ("Norway", "Oslo"), ("Peru", "Lima"), ("Kenya", "Nairobi")]
arguments = TrainingArguments(
    f"{options.out}-checkpoints", max_steps=options.steps, per_device_train_batch_size=4, learning_rate=2e-3,
    logging_steps=5, save_steps=options.steps, report_to=options.report_to,
)  # fmt: skip
dataset = [features(*pair) for pair in pairs]
trainer = Trainer(model, arguments, train_dataset=dataset, data_collator=prefixcore.PackedCollator())
trainer.add_callback(prefixcore.PromptCallback(trainer))
trainer.train()
handle.save(options.out, task="name the capital")

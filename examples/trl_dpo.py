"""A prefix trained by TRL's DPOTrainer. The reference is the same model with nothing attached: no second copy."""

import argparse

from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DPOConfig, DPOTrainer

import prefixcore

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--model", required=True)
parser.add_argument("--out", default="polite")
parser.add_argument("--steps", type=int, default=50)
parser.add_argument("--report-to", default="none", help="tensorboard, wandb, ...")
options = parser.parse_args()

model = AutoModelForCausalLM.from_pretrained(options.model)
tokenizer = AutoTokenizer.from_pretrained(options.model)
config = prefixcore.PrefixTuningConfig(init_text="Answer politely.\n")
handle = prefixcore.attach(model, config, tokenizer=tokenizer)

rows = [("The door?", " It is open, please come in.", " Open."), ("The bill?", " Here it is, thank you.", " Pay.")]
dataset = Dataset.from_list([{"prompt": ask, "chosen": good, "rejected": bad} for ask, good, bad in rows])
arguments = DPOConfig(
    f"{options.out}-checkpoints", max_steps=options.steps, per_device_train_batch_size=2, learning_rate=2e-3,
    precompute_ref_log_probs=True, gradient_checkpointing=False, bf16=False, logging_steps=5,
    report_to=options.report_to,
)  # fmt: skip
with handle.disabled():  # the reference's log-probabilities are computed here, once, before anything is trained
    trainer = DPOTrainer(model, args=arguments, train_dataset=dataset, processing_class=tokenizer)
trainer.add_callback(prefixcore.PromptCallback(trainer))
trainer.train()
handle.save(options.out, task="answer politely")

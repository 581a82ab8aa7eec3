"""A prefix trained by TRL's GRPOTrainer: the model answers, and a function says how right it was."""

import argparse

from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import GRPOConfig, GRPOTrainer

import prefixcore

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--model", required=True)
parser.add_argument("--out", default="sums")
parser.add_argument("--steps", type=int, default=50)
parser.add_argument("--report-to", default="none", help="tensorboard, wandb, ...")
options = parser.parse_args()

model = AutoModelForCausalLM.from_pretrained(options.model)
tokenizer = AutoTokenizer.from_pretrained(options.model)
config = prefixcore.PrefixTuningConfig(init_text="Add the numbers.\n12 + 13 = 25\n")
handle = prefixcore.attach(model, config, tokenizer=tokenizer)

rows = [{"prompt": f"{a} + {b} =", "total": str(a + b)} for a in range(10, 30) for b in range(10, 30)]
dataset = Dataset.from_list(rows).shuffle(seed=0)


def rewards(completions: list[str], total: list[str], **_: object) -> list[float]:
    answers = [(text.split() or [""])[0] for text in completions]  # a number is worth a tenth, right or not
    return [0.1 * answer.isdigit() + 0.9 * (answer == right) for answer, right in zip(answers, total, strict=True)]


arguments = GRPOConfig(
    f"{options.out}-checkpoints", max_steps=options.steps, per_device_train_batch_size=8, num_generations=8,
    max_completion_length=4, learning_rate=2e-3, gradient_checkpointing=False, bf16=False, report_to=options.report_to,
)  # fmt: skip
trainer = GRPOTrainer(model, rewards, args=arguments, train_dataset=dataset, processing_class=tokenizer)
trainer.add_callback(prefixcore.PromptCallback(trainer))
trainer.train()
handle.save(options.out, task="add two numbers")

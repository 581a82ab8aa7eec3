"""A prefix trained on a model in stages, one a process: `torchrun --nproc-per-node 2 examples/pipeline_loop.py ...`."""

import argparse
from functools import partial

import torch
import torch.distributed as dist
from torch.distributed.pipelining import PipelineStage, Schedule1F1B
from transformers import AutoModelForCausalLM, AutoTokenizer

import prefixcore
from prefixcore.training import Example, collate, tokenize

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--model", required=True)
parser.add_argument("--out", default="capitals")
parser.add_argument("--steps", type=int, default=50)
options = parser.parse_args()
alone = {} if dist.is_torchelastic_launched() else {"store": dist.HashStore(), "rank": 0, "world_size": 1}
dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo", **alone)
device = torch.device("cuda", dist.get_node_local_rank(0)) if torch.cuda.is_available() else torch.device("cpu")
model, tokenizer = AutoModelForCausalLM.from_pretrained(options.model), AutoTokenizer.from_pretrained(options.model)
handle = prefixcore.attach(model, prefixcore.PrefixTuningConfig(init_text="France -> Paris\n"), tokenizer=tokenizer)
stage = prefixcore.pipeline_stage(handle).to(device)  # from here on the model has the layers of this process
pairs = {"Portugal": "Lisbon", "Norway": "Oslo", "Peru": "Lima", "Kenya": "Nairobi"}
examples = tokenize(tokenizer, [Example(f"{country} ->", f" {city}") for country, city in pairs.items()], end="\n")
batch = {name: tensor.to(device) for name, tensor in collate(examples, pad_token_id=0).items()}
labels = batch.pop("labels")
loss = partial(model.loss_function, vocab_size=model.config.vocab_size, num_items_in_batch=(labels[:, 1:] >= 0).sum())
schedule = Schedule1F1B(PipelineStage(stage, stage.index, stage.count, device), 2, loss, scale_grads=False)
optimizer = torch.optim.AdamW(handle.parameters(), lr=2e-3)
for _ in range(options.steps):
    schedule.step(**batch, target=labels)
    stage.sum_gradients()
    optimizer.step()
    optimizer.zero_grad()
if stage.index == 0:
    handle.save(options.out, task="name the capital")
dist.destroy_process_group()

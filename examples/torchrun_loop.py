"""A prefix trained by a bare loop in several processes: `torchrun --nproc-per-node 2 examples/torchrun_loop.py ...`."""

import argparse

import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM, AutoTokenizer

import prefixcore
from prefixcore.training import Example, collate, tokenize

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--model", required=True)
parser.add_argument("--out", default="capitals")
parser.add_argument("--steps", type=int, default=50)
options = parser.parse_args()

if dist.is_torchelastic_launched():
    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
rank, size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
device = torch.device("cuda", rank % torch.cuda.device_count()) if torch.cuda.is_available() else torch.device("cpu")
model = AutoModelForCausalLM.from_pretrained(options.model).to(device)
tokenizer = AutoTokenizer.from_pretrained(options.model)
handle = prefixcore.attach(model, prefixcore.PrefixTuningConfig(init_text="France -> Paris\n"), tokenizer=tokenizer)
run = torch.nn.parallel.DistributedDataParallel(model) if size > 1 else model
pairs = [("Portugal", "Lisbon"), ("Norway", "Oslo"), ("Peru", "Lima"), ("Kenya", "Nairobi")]
own = tokenize(tokenizer, [Example(f"{c} ->", f" {city}") for c, city in pairs[rank::size]], end="\n")
batch = {name: tensor.to(device) for name, tensor in collate(own, pad_token_id=0).items()}
optimizer = torch.optim.AdamW(handle.parameters(), lr=2e-3)
for _ in range(options.steps):
    run(**batch).loss.backward()
    optimizer.step()
    optimizer.zero_grad()
if rank == 0:
    handle.save(options.out, task="name the capital")
if dist.is_initialized():
    dist.destroy_process_group()

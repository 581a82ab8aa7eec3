"""Keys and values fitted to attention: P of them, behind which a head answers its queries as behind the whole text.

What a prompt's tokens ask of the text is known: their queries, while the teacher reads. Behind P virtual tokens a query
q gets `a(q) V' + (1 - |a(q)|) r(q)`: a(q) is its attention on the virtual tokens, and r(q) what the rest of the
sequence answers. This is to be what it gets behind the text, output and share of the softmax at once. Each layer and
key-value head is a small problem of its own: keys of the text's tokens with the most attention, moved by gradient
descent, and values by least squares.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..hf.attention.prefix import KeyValue
from .reads import Reads, answered, capped, weights

STEPS, ROWS, RATE = 200, 1024, 0.03
"""Of the descent: steps, queries a step, and Adam's first rate as a share of the root mean square of what moves."""

RIDGE = 1e-3
"""How firmly values are held to what they are, as a share of the attention that a virtual token gets on average."""


def fitted(reads: Reads, key: Tensor, value: Tensor, count: int, *, steps: int = STEPS, seed: int = 0) -> KeyValue:
    """`count` keys and values, on the CPU, that answer a layer's queries as those of the whole text do.

    Args:
        reads: the queries and their answers.
        key, value: of the text [Hkv, N, D] and [Hkv, N, Dv], where it is computed.
        count: P.
        steps: of the descent; 0: the text's own keys, moved as one to what the text's share of the softmax was.
        seed: of the queries of each step.
    """
    key, value = key.float(), value.float()
    query, rest, rest_output, output = (x.to(key.device) for x in reads[:4])
    reads = Reads(query, rest, rest_output, output, reads.softcap)
    new_key, new_value = heaviest_of_each_head(reads, key, value, count)
    new_value = least_squares(reads, new_key, new_value)
    if steps:
        new_key, new_value = descend(reads, new_key, new_value, steps, seed)
        new_value = least_squares(reads, new_key, new_value)
    return new_key.cpu(), new_value.cpu()


def heaviest_of_each_head(reads: Reads, key: Tensor, value: Tensor, count: int) -> KeyValue:
    """The `count` tokens of the text that each key-value head attends to most, their keys made a little heavier.

    Squares are summed, so that a token counts that few queries look for, if they look at it alone.
    """
    heaviest, lighter = [], []
    for head in range(len(key)):
        scores = capped(reads.query[head] @ key[head].mT, reads.softcap)
        text = scores.logsumexp(-1)
        share = (scores - torch.logaddexp(text, reads.rest[head])[:, None]).exp()
        places = share.square().sum(0).topk(count).indices.sort().values
        heaviest.append(places)
        of_text = share.sum(-1)
        missing = text - scores[:, places].logsumexp(-1)
        lighter.append((of_text * missing).sum() / of_text.sum().clamp(min=1e-12))
    index = torch.stack(heaviest)[..., None]
    new_key = key.gather(1, index.expand(-1, -1, key.shape[-1]))
    new_value = value.gather(1, index.expand(-1, -1, value.shape[-1]))
    return new_key + torch.stack(lighter)[:, None, None] * direction(reads.query)[:, None], new_value


def direction(query: Tensor) -> Tensor:
    """What adds about one to the score of each query [Hkv, D]: least squares, as queries have a mean."""
    query = query.double()
    square = query.mT @ query
    ridge = 1e-3 * square.diagonal(dim1=-2, dim2=-1).mean(-1).clamp(min=1e-12)  # a pruned head's queries are zero
    square = square + ridge[:, None, None] * torch.eye(query.shape[-1]).to(square)
    return torch.linalg.solve(square, query.sum(1)[..., None])[..., 0].float()


def descend(reads: Reads, key: Tensor, value: Tensor, steps: int, seed: int) -> KeyValue:
    """Keys and values after Adam's steps on the squared error of the answers."""
    key, value = key.clone().requires_grad_(), value.clone().requires_grad_()
    groups = [{"params": [x], "lr": RATE * float(x.detach().square().mean().sqrt())} for x in (key, value)]
    optimizer = torch.optim.Adam(groups)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
    size = reads.output.square().mean((1, 2)).clamp(min=1e-12)
    generator = torch.Generator().manual_seed(seed)
    with torch.enable_grad():
        for _ in range(steps):
            rows = torch.randint(reads.query.shape[1], (ROWS,), generator=generator).to(key.device)
            query, rest, rest_output, output = (x[:, rows] for x in reads[:4])
            found = answered(query, key, value, rest, rest_output, reads.softcap)
            loss = ((found - output).square().mean((1, 2)) / size).sum()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return key.detach(), value.detach()


def least_squares(reads: Reads, key: Tensor, value: Tensor) -> Tensor:
    """The values, near `value`, with which these keys answer best."""
    attention, share = (x.double() for x in weights(reads.query, key, reads.rest, reads.softcap))
    missing = reads.output.double() - share * reads.rest_output.double() - attention @ value.double()
    square = attention.mT @ attention
    held = RIDGE * square.diagonal(dim1=-2, dim2=-1).mean(-1).clamp(min=1e-12)
    square = square + held[:, None, None] * torch.eye(square.shape[-1]).to(square)
    return (value.double() + torch.linalg.solve(square, attention.mT @ missing)).float()

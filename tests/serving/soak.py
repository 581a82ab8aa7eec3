"""Random requests for random adapters, from several clients at once, each answer compared with transformers'.

    python -m tests.serving.soak --minutes 10 --clients 4

In an environment with vLLM. Half of the answers are streamed, some requests are refused, some clients hang up, adapters
are replaced meanwhile, the host cache holds few of them, and there are so few blocks that requests are preempted. Not
one token may differ; the exit status says so.
"""

from __future__ import annotations

import argparse
import collections
import json
import random
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

from prefixcore.serving.salt import make_salt

from .engine.server import Failed, Server
from .engine.world import World, prompts

ADAPTERS = 24
OPTIONS = ("--block-size", "32", "--num-gpu-blocks-override", "20", "--max-num-batched-tokens", "128")
SETTINGS = {"host_cache_bytes": 2**21}
"""A fifth of what the adapters take."""


class Soak:
    """A run: the clients, and what they found.

    Args:
        world: the model and the registry, which gets adapters.
        server: serves them.
        seed: of everything that is random.
    """

    def __init__(self, world: World, server: Server, seed: int = 0) -> None:
        self.world, self.server, self.seed = world, server, seed
        self.counts: collections.Counter[str] = collections.Counter()
        self.differences: list[str] = []
        self.lock = threading.Lock()
        self.rng = random.Random(seed)
        self.names = [f"soak-{i}" for i in range(ADAPTERS)]
        self.prompts = prompts(12, 60, seed)
        for i, name in enumerate(self.names):
            self.world.add(name, self._size(i), seed=i)
        self.digests = {name: world.digest(name) for name in self.names}

    def _size(self, i: int) -> int:
        return (1, 17, 32, 64, 100, 200)[i % 6] if i < 6 else self.rng.randint(1, 200)

    def run(self, seconds: float, clients: int) -> dict[str, Any]:
        """Lets the clients ask for so long; what they found."""
        start = time.monotonic()
        ends = start + seconds
        threads = [threading.Thread(target=self._client, args=(ends, self.seed + i)) for i in range(clients)]
        threads.append(threading.Thread(target=self._replace, args=(ends,)))
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        alive = self.server.process.poll() is None
        if not alive:
            self.differences.append("the server has ended")
        return {
            "seconds": round(time.monotonic() - start, 1),
            "clients": clients,
            **dict(sorted(self.counts.items())),
            "preemptions": int(self.server.metric("vllm:num_preemptions_total")) if alive else None,
            "cached blocks hit, tokens": int(self.server.metric("vllm:prefix_cache_hits_total")) if alive else None,
            "differences": self.differences,
        }

    def _client(self, ends: float, seed: int) -> None:
        rng = random.Random(seed)
        while time.monotonic() < ends and not self.differences:
            try:
                self._ask(rng)
            except Exception as error:
                self.differences.append(f"{type(error).__name__}: {error}")

    def _ask(self, rng: random.Random) -> None:
        prompt, tokens, stream = rng.choice(self.prompts), rng.choice((1, 8, 32)), rng.random() < 0.5
        kind = rng.random()
        if kind < 0.1:
            self._refused(rng, prompt, stream)
            return
        with self.lock:  # one model computes the references, and is changed to do so
            name = None if kind < 0.25 else rng.choice(self.names)
            digest = None if name is None else self.digests[name]
            request = self.world.request(name, prompt, digest)
            expected = self.world.answer(name, prompt, tokens, digest)
        if kind > 0.95:
            self._hang_up(request)
            return
        try:
            found = self.server.complete(request, tokens, stream=stream)
        except Failed as error:
            if name is None or self.digests[name] == digest:
                self.differences.append(f"{name} {digest}: {error}")
            self.counts["ended because the adapter was replaced"] += 1
            return
        self.counts["requests answered"] += 1
        self.counts["tokens compared"] += len(expected)
        if found != expected:
            self.differences.append(f"{name} {digest} {prompt}: expected {expected}, got {found}")

    def _refused(self, rng: random.Random, prompt: list[int], stream: bool) -> None:
        name = rng.choice(self.names)
        with self.lock:
            request = self.world.request(name, prompt, self.digests[name])
        more: dict[str, Any] = {}
        kind = rng.randrange(4)
        if kind == 0:
            request["cache_salt"] = make_salt("nowhere", self.digests[name])
        elif kind == 1:
            request["cache_salt"] = make_salt(name, "f" * 64)
        elif kind == 2:
            request["prompt_token_ids"] = request["prompt_token_ids"][1:]
        else:
            more = {"echo": True, "logprobs": 1}
        try:
            found = self.server.complete(request, stream=stream, **more)
        except Failed:
            self.counts["requests refused"] += 1
        else:
            self.differences.append(f"{name} {more} {request}: expected an error, got {found}")

    def _hang_up(self, request: dict[str, Any]) -> None:
        """Reads the beginning of an answer and leaves."""
        body = {"model": "tiny", "prompt": request["prompt_token_ids"], "max_tokens": 64, "ignore_eos": True}
        body |= {"cache_salt": request.get("cache_salt", "nobody"), "stream": True, "temperature": 0}
        with self.server.client.stream("POST", "/completions", json=body) as response:
            next(response.iter_lines(), None)
        self.counts["clients that hung up"] += 1

    def _replace(self, ends: float) -> None:
        seed = 1000
        while time.monotonic() < ends - 3 and not self.differences:
            time.sleep(2)
            name = self.rng.choice(self.names)
            with self.lock:
                seed += 1
                # Told first, so that no client takes an error for a difference whose adapter is being replaced.
                old, self.digests[name] = self.digests[name], ""
                self.world.add(name, self.world.num_virtual_tokens(name, old), seed)
                self.digests[name] = self.world.digest(name)
            self.counts["adapters replaced"] += 1


def main() -> int:
    parser = argparse.ArgumentParser(description="Random requests to vLLM, compared with transformers.")
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--clients", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        world = World(Path(folder))
        with Server(world, Path(folder) / "server.log", SETTINGS, *OPTIONS) as server:
            found = Soak(world, server, arguments.seed).run(60 * arguments.minutes, arguments.clients)
            if found["differences"]:
                print(server.log.read_text()[-5000:], file=sys.stderr)
    print(json.dumps(found, indent=2))
    return 1 if found["differences"] else 0


if __name__ == "__main__":
    sys.exit(main())

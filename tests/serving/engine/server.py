"""vLLM's own HTTP server with the connector, on a free port, and requests to it."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import TracebackType
from typing import Any

import httpx

from .engines import transfer_config
from .world import World

PATIENCE = 900.0
"""Seconds that a server may take to start, on cores that others use too."""


class Failed(Exception):
    """A request ended with an error instead of tokens."""


class Server:
    """A server, started; as a context manager it is stopped at the end of the block.

    Args:
        world: the model and the registry.
        log: a file for what the server says.
        extra: settings of the connector.
        options: of vLLM's command line, without the dashes.
    """

    def __init__(self, world: World, log: Path, extra: dict[str, Any] | None = None, *options: str) -> None:
        self.world, self.log = world, log
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}/v1"
        command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(world.folder)]
        command += ["--served-model-name", "tiny", "--host", "127.0.0.1", "--port", str(port), "--dtype", "float32"]
        command += ["--max-model-len", "512", "--enforce-eager"]
        command += ["--kv-transfer-config", json.dumps(transfer_config(world, **(extra or {}))), *options]
        environment = {**os.environ, "VLLM_LOGGING_LEVEL": "INFO"}
        with log.open("wb") as output:
            self.process = subprocess.Popen(
                command, stdout=output, stderr=subprocess.STDOUT, env=environment, start_new_session=True
            )
        self.client = httpx.Client(base_url=self.url, timeout=120)
        self._wait()

    def __enter__(self) -> Server:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.client.close()
        self._end()

    def _end(self) -> None:
        """Ends the server with its engine and workers, which outlive it where it is killed."""
        self.process.terminate()
        try:
            self.process.wait(30)
        except subprocess.TimeoutExpired:
            pass
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()

    def _wait(self) -> None:
        end = time.monotonic() + PATIENCE
        while time.monotonic() < end:
            if self.process.poll() is not None:
                raise RuntimeError(f"the server ended: {self.log.read_text()[-3000:]}")
            try:
                if self.client.get("/models").is_success:
                    return
            except httpx.TransportError:
                pass
            time.sleep(0.5)
        self._end()
        raise RuntimeError(f"the server did not start within {PATIENCE:g} seconds: {self.log.read_text()[-3000:]}")

    def complete(self, request: dict[str, Any], tokens: int = 16, *, stream: bool = False, **more: Any) -> list[int]:
        """The tokens that a completion brings.

        Args:
            request: as of `World.request`.
            tokens: how many.
            stream: whether they come one by one.
            more: further fields of the request.

        Raises:
            Failed: the request ended with an error.
        """
        body = {"model": "tiny", "prompt": request["prompt_token_ids"], "max_tokens": tokens, "temperature": 0}
        body |= {"ignore_eos": True, "return_token_ids": True, "stream": stream, **more}
        if "cache_salt" in request:
            body["cache_salt"] = request["cache_salt"]
        if not stream:
            response = self.client.post("/completions", json=body)
            if not response.is_success:
                raise Failed(f"{response.status_code}: {response.text}")
            return response.json()["choices"][0]["token_ids"]
        found: list[int] = []
        with self.client.stream("POST", "/completions", json=body) as response:
            if not response.is_success:
                raise Failed(f"{response.status_code}: {response.read().decode()}")
            for line in response.iter_lines():
                if not line.startswith("data: ") or line == "data: [DONE]":
                    continue
                event = json.loads(line.removeprefix("data: "))
                if "error" in event:
                    raise Failed(str(event["error"]))
                found += event["choices"][0].get("token_ids") or []
        return found

    def metric(self, name: str, adapter: str | None = None) -> float:
        """The sum of a counter of vLLM's, over its labels; with an adapter, over those that are its own."""
        text = self.client.get(self.url.removesuffix("/v1") + "/metrics").text
        found = re.findall(rf"^{re.escape(name)}((?:{{[^}}]*}})?) (\S+)$", text, re.MULTILINE)
        own = "" if adapter is None else f'adapter="{adapter}"'
        return sum(float(value) for labels, value in found if own in labels)

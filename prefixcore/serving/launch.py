"""Start vLLM with a registry of adapters, wait until it serves, and stop it."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from .errors import LaunchError
from .salt import PLACEHOLDER
from .vllm_command import vllm_command, vllm_environment

START_TIMEOUT = 1800.0
"""Seconds: a large model takes minutes to load and to compile."""

_STOP_TIMEOUT = 30.0
_ERROR = re.compile(r"(Error|Exception)\b|prefixcore:")


@dataclass
class Server:
    """A server that has been started.

    Attributes:
        url: its address, without `/v1`.
        process: it.
        log: the file that it writes to; None: it writes where we do.
    """

    url: str
    process: subprocess.Popen[bytes]
    log: Path | None = None

    def stop(self) -> None:
        """Asks the server to end, and ends it with all its processes if it does not."""
        try:
            if self.process.poll() is None:
                self.process.send_signal(signal.SIGTERM)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    self.process.wait(_STOP_TIMEOUT)
        finally:  # also where someone who waits presses Ctrl-C once more
            with contextlib.suppress(OSError):  # its workers, in the group that it leads; mostly gone by now
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()


@contextlib.contextmanager
def start(
    model: str | Path,
    adapters: str | Path,
    *,
    host: str = "127.0.0.1",
    port: int | None = None,
    placeholder: int = PLACEHOLDER,
    unverified_models: bool = False,
    baked: Path | None = None,
    python: str = sys.executable,
    arguments: Sequence[str] = (),
    log: str | Path | None = None,
    timeout: float = START_TIMEOUT,
    say: Callable[[str], object] = lambda text: None,
) -> Iterator[Server]:
    """A server that serves the adapters of a registry, for the block.

    Args:
        model: a folder of a transformers model, or its id.
        adapters: the registry.
        host: where it listens.
        port: where it listens; None: a port that is free.
        placeholder, unverified_models, baked, python, arguments: as of `vllm_command`.
        log: a file for what vLLM prints; None: a temporary one, whose end stands in the error where it fails.
        timeout: seconds that it may take to start.
        say: told how far it is.

    Yields:
        The server, which answers by now.

    Raises:
        LaunchError: vLLM has ended by itself or did not answer in time.

    Examples:
        with start("my-model", "adapters") as server:
            print(Client(server.url).generate("capitals", "Portugal ->"))
    """
    port = free_port(host) if port is None else port
    command = vllm_command(
        str(model),
        Path(adapters),
        host=host,
        port=port,
        placeholder=placeholder,
        unverified_models=unverified_models,
        baked=baked,
        python=python,
        arguments=arguments,
    )
    with contextlib.ExitStack() as stack:
        if log is None:
            folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="prefixcore-"))
            log = Path(folder) / "vllm.log"
        log = Path(log)
        file = stack.enter_context(open(log, "wb"))
        server = launch(command, host, port, output=file)
        server.log = log
        stack.callback(server.stop)
        wait_until_ready(server, timeout=timeout, say=say)
        yield server


def launch(command: Sequence[str], host: str, port: int, *, output: IO[bytes] | None = None) -> Server:
    """Starts the server in a process group of its own, so that Ctrl-C comes to us alone.

    Args:
        command: from `vllm_command`.
        host, port: where it listens.
        output: where it writes; None: to standard error.

    Raises:
        LaunchError: the port is taken.
    """
    check_port(host, port)
    target: Any = sys.stderr if output is None else output
    process = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=target,
        stderr=subprocess.STDOUT if output is not None else target,
        env=vllm_environment(),
        start_new_session=True,
    )
    return Server(address(host, port), process)


def wait_until_ready(
    server: Server, *, timeout: float = START_TIMEOUT, say: Callable[[str], object] = lambda text: None
) -> float:
    """Waits until the server answers, and returns the seconds that it took.

    Raises:
        LaunchError: it has ended by itself, or does not answer in time.
    """
    begin = time.monotonic()
    told = 0.0
    while True:
        seconds = time.monotonic() - begin
        code = server.process.poll()
        if code is not None:
            raise LaunchError(f"vLLM has ended with code {code} before it served{_why(server.log)}")
        try:
            with urllib.request.urlopen(f"{server.url}/health", timeout=5) as answer:
                if answer.status == 200:
                    return seconds
        except (OSError, urllib.error.URLError, ValueError):
            pass
        if seconds > timeout:
            raise LaunchError(f"vLLM has not answered within {timeout:g} seconds{_why(server.log)}")
        if seconds - told >= 10:
            told = seconds
            say(f"vLLM is starting: {seconds:.0f} s")
        time.sleep(0.25)


def _why(log: Path | None) -> str:
    """The last lines of a log that say what went wrong."""
    if log is None:
        return "; what it has printed says why"
    lines = log.read_text(errors="replace").splitlines()
    telling = [line for line in lines if _ERROR.search(line)] or lines
    return ": " + " | ".join(line.strip() for line in telling[-3:])[-1000:] if telling else ""


def address(host: str, port: int) -> str:
    """The address of a server for a client on the same machine."""
    if host in ("", "0.0.0.0", "::"):
        host = "127.0.0.1"
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def check_port(host: str, port: int) -> None:
    """Raises LaunchError if something listens there already, or nothing may."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((host, port))
    except OSError as error:
        raise LaunchError(
            f"port {port} of {host or 'this machine'} cannot be used ({error.strerror or error}); give another --port"
        ) from error


def free_port(host: str = "127.0.0.1") -> int:
    """A port that nothing listens to at the moment."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.bind((host, 0))
        return int(probe.getsockname()[1])

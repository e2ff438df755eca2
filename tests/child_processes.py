"""Processes that tests start: the server they come from, and two that train together."""

from __future__ import annotations

import multiprocessing
import os
import socket
import time
from collections.abc import Callable
from pathlib import Path

import torch

#: Children start from a server that has imported everything once.
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(
    ["pytest", "torch.distributed.fsdp", "torch.distributed.checkpoint", "fewstep.runs.course", "fewstep.hub.native"]
)


def run_on_two(work: Callable[[int, Path], None], folder: Path, seconds: float = 300.0) -> None:
    """Call ``work(rank, folder)`` in two processes as ``torchrun`` starts them, on one thread each; both must end well
    and in time, and where one fails the other is not waited for."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    children = [CONTEXT.Process(target=_call, args=(work, rank, port, folder)) for rank in (0, 1)]
    for child in children:
        child.start()
    deadline = time.monotonic() + seconds
    while any(child.is_alive() for child in children) and time.monotonic() < deadline:
        if any(child.exitcode for child in children):
            break
        time.sleep(0.05)
    codes = [child.exitcode for child in children]
    for child in children:
        child.kill()
        child.join()
    assert codes == [0, 0]


def _call(work: Callable[[int, Path], None], rank: int, port: int, folder: Path) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    os.environ["MASTER_PORT"] = str(port)
    torch.set_num_threads(1)
    work(rank, folder)

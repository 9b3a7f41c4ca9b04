"""The ranks of a run, their devices, and the collectives that engines and training share."""

from __future__ import annotations

import errno
import ipaddress
import os
import socket
from dataclasses import dataclass
from datetime import timedelta

import torch
from torch import Tensor
from torch import distributed as dist
from torch.distributed import HashStore, Store, TCPStore, distributed_c10d  # type: ignore[attr-defined]

from data_pipeline.core.schema import ConfigError


@dataclass(frozen=True, slots=True)
class DistributedContext:
    """This process's rank, the number of ranks, and its device. Called `world` in the code, as in WORLD_SIZE."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    device: str = "cpu"

    def sum(self, values: Tensor) -> Tensor:
        """Sums `values` over all ranks, in place, and returns them."""
        if self.size > 1:
            dist.all_reduce(values)
        return values

    def sum_on_host(self, values: Tensor) -> Tensor:
        """Sums a host tensor over all ranks and returns it on the host."""
        return self.sum(values.to(self.device)).cpu() if self.size > 1 else values

    def from_first(self, text: str) -> str:
        """Returns rank 0's text on every rank; a collective operation."""
        texts = [text]
        if self.size > 1:
            dist.broadcast_object_list(texts, device=torch.device(self.device))
        return texts[0]

    def agree(self, text: str, what: str) -> None:
        """Raises RuntimeError on every rank unless `text` is the same on all ranks; `what` names it in the message."""
        if self.size == 1:
            return
        texts: list[str | None] = [None] * self.size
        dist.all_gather_object(texts, text)
        if len(set(texts)) > 1:
            raise RuntimeError(f"the ranks do not agree on {what}: {dict(enumerate(texts))}")


def join(device: str, timeout_minutes: float) -> DistributedContext:
    """Joins the process group described by RANK, WORLD_SIZE, LOCAL_RANK and MASTER_*; a group of one if they are unset.

    Args:
        device: "auto", "cpu" or "cuda".
        timeout_minutes: time limit of a collective operation.

    Raises:
        ConfigError: device=cuda, and torch sees no GPU.
    """
    rank, size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    if device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device=cuda: torch sees no GPU here; use device=cpu or device=auto, or see `auricle doctor`")
    kind = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    if kind == "cuda":
        torch.cuda.set_device(local_rank)
        kind = f"cuda:{local_rank}"
    if not dist.is_initialized():
        backend = "nccl" if kind.startswith("cuda") else "gloo"
        timeout = timedelta(minutes=timeout_minutes)
        store = _rendezvous_store(rank, size, timeout)
        dist.init_process_group(backend, rank=rank, world_size=size, timeout=timeout, store=store)
    return DistributedContext(rank, size, local_rank, kind)


def _rendezvous_store(rank: int, size: int, timeout: timedelta) -> Store | None:
    """Returns the store for the rendezvous of the ranks; None for that of torch's own environment rendezvous.

    torch's store listens on all interfaces and accepts any connection. This one listens on MASTER_ADDR only, the
    loopback if all ranks are on one machine.
    """
    if size == 1:
        return HashStore()  # DeepSpeed needs a process group even for one rank; this one needs no port
    host, port = os.environ.get("MASTER_ADDR", ""), int(os.environ.get("MASTER_PORT", "0"))
    try:
        address = ipaddress.ip_address("127.0.0.1" if host == "localhost" else host)
    except ValueError:
        return None  # a host name may resolve to the loopback on that host and to another address elsewhere
    if not port or os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        return None  # torchrun provides a store
    if rank:
        return TCPStore(str(address), port, size, is_master=False, timeout=timeout)
    listener = socket.socket(socket.AF_INET6 if address.version == 6 else socket.AF_INET)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((str(address), port))
    except OSError as error:
        listener.close()
        if error.errno == errno.EADDRNOTAVAIL:
            return None  # address translation: no local interface has that address
        raise
    listener.listen(size)
    # the store owns the descriptor from here on
    return TCPStore(str(address), port, size, is_master=True, timeout=timeout, master_listen_fd=listener.detach())


def limit_groups(timeout_minutes: float) -> None:
    """Sets the timeout of every process group; those that DeepSpeed creates have torch's default of 30 minutes."""
    if not dist.is_initialized():
        return
    for group in list(distributed_c10d._world.pg_map):
        distributed_c10d._set_pg_timeout(timedelta(minutes=timeout_minutes), group)


def leave() -> None:
    """Leaves the process group."""
    if dist.is_initialized():
        dist.destroy_process_group()

"""What a run stands on: seeds, device, precision, several processes, the lock on a folder, the end by a signal."""

import contextlib
import ctypes
import fcntl
import importlib.metadata
import os
import platform
import random
import shlex
import signal
import socket
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from project import UserError, shown


def seed_everything(seed: int) -> None:
    """Seed python, numpy and torch: initial weights, dropout.

    The order of the images (engine/training.py) and their augmentation (augment.py) have generators of their own, with
    the same seed; the lists have SPLIT_SEED.
    """
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def choose_device(local_rank: int = 0) -> torch.device:
    """The GPU of this process, or the CPU, made repeatable there: no TF32, no algorithms that a timing chooses.

    Raises:
        UserError: there are more processes than GPUs.
    """
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cudnn.deterministic = True
    torch.backends.cudnn.benchmark = False
    _keep_freed_memory()
    if not torch.cuda.is_available():
        return torch.device("cpu")
    if local_rank >= torch.cuda.device_count():
        raise UserError(
            f"process {local_rank + 1} of this machine has no GPU; start {torch.cuda.device_count()} at most"
        )
    torch.cuda.set_device(local_rank)
    return torch.device("cuda", local_rank)


def choose_precision(device: torch.device) -> torch.dtype:
    """What training computes in: bfloat16 by autocast on GPUs, float32 on a CPU. Saved logits are always float32."""
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def _keep_freed_memory() -> None:
    """Have the C library keep large freed blocks for the next batch; does nothing where it is not glibc.

    By default each tensor of more than 32 MB, and whatever lies free at the end of the heap, goes back to the system and
    is asked for again a moment later, page by page: a sixth of a training step on the CPU. Memory grows no further than
    its peak. The numbers are M_MMAP_THRESHOLD and M_TRIM_THRESHOLD of malloc.h.
    """
    with contextlib.suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-3, 2**30)
        mallopt(-1, 2**31 - 1)


def environment(device: torch.device) -> dict[str, str | int]:
    """What logits may depend on in their last bits."""
    cuda = device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(device) if cuda else f"cpu {torch.backends.cpu.get_cpu_capability()}",
        "threads": torch.get_num_threads(),
        "system": f"{platform.system()} {platform.machine()}",
        "torch": str(torch.__version__),
        "torchvision": importlib.metadata.version("torchvision"),
    }


# Several processes -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Processes:
    """The processes that train together: this one's rank among them, how many there are, this one's device."""

    rank: int
    size: int
    device: torch.device

    def announce(self, text: str) -> None:
        """Print once, not by every process."""
        if self.rank == 0:
            print(text, flush=True)

    @contextlib.contextmanager
    def first_process_first(self) -> Iterator[None]:
        """The others wait until the first one is through."""
        if self.rank > 0:
            dist.barrier()
        yield
        if self.size > 1 and self.rank == 0:
            dist.barrier()

    def broadcast(self, tensors: Iterable[torch.Tensor]) -> None:
        """Give all processes what the first one has in these."""
        for tensor in tensors if self.size > 1 else ():
            dist.broadcast(tensor, 0)

    def add_up(self, tensors: Iterable[torch.Tensor]) -> None:
        """Put the sum over all processes into these, in every process."""
        for tensor in tensors if self.size > 1 else ():
            dist.all_reduce(tensor)

    def gather(self, rows: torch.Tensor, total: int) -> torch.Tensor:
        """Put together what each process has of `total` rows: rank, rank + size, rank + 2 size, …"""
        if self.size == 1:
            return rows
        shares: list = [None] * self.size
        dist.all_gather_object(shares, rows)
        whole = torch.empty(total, *rows.shape[1:], dtype=rows.dtype)
        for rank, share in enumerate(shares):
            whole[rank :: self.size] = share
        return whole


@contextlib.contextmanager
def join_processes() -> Iterator[Processes]:
    """The processes that torchrun started, or this one alone."""
    size = int(os.environ.get("WORLD_SIZE", 1))
    if size == 1:
        yield Processes(0, 1, choose_device())
        return
    device = choose_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield Processes(dist.get_rank(), size, device)
    finally:
        dist.destroy_process_group()


# One training at a time, and its end -----------------------------------------------------------------------------


@contextlib.contextmanager
def lock_folder(folder: Path, processes: Processes) -> Iterator[None]:
    """Hold a lock on the folder; the system releases it however this process ends.

    Raises:
        UserError: another training holds it: says which.
    """
    if processes.rank > 0:
        yield
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = open(folder / "train.lock", "a+")
    except OSError as error:
        raise UserError(
            f"cannot write below {shown(folder)}: {error.strerror}; check PROJECT_ROOT in config.py"
        ) from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.seek(0)
            raise UserError(
                f"{shown(folder)} is being trained by {lock.read().strip()}; wait for it or stop it"
            ) from None
        except OSError as error:  # not every file system of a cluster has locks
            told = "do not start this training twice at once"
            print(f"note: {shown(folder)} cannot be locked ({error.strerror}): {told}")
        else:  # nobody else writes these now: what is there half-written is a killed run's
            for pattern in ("*/*.partial", "final_model.pt.*.partial", "selection.csv.*.partial"):
                for partial in folder.glob(pattern):
                    partial.unlink()
        lock.truncate(0)
        lock.write(f"process {os.getpid()} on {socket.gethostname()} since {time.strftime('%Y-%m-%d %H:%M:%S')}\n")
        lock.flush()
        yield


class Stopped(BaseException):
    """SIGTERM or Ctrl-C, raised wherever the program is: no `except Exception` holds it up."""


@contextlib.contextmanager
def stop_with_one_line(folder: Path, processes: Processes) -> Iterator[None]:
    """End at once on SIGTERM or Ctrl-C, and say what is kept and how to continue."""

    def stop(number: int, frame: object) -> None:
        raise Stopped(number)

    former = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    except Stopped as stopped:
        (number,) = stopped.args
        launcher = f"torchrun --nproc-per-node {os.environ['LOCAL_WORLD_SIZE']}" if processes.size > 1 else "python"
        own = [f"{key}={shlex.quote(value)}" for key, value in os.environ.items() if key.startswith("EUROSAT_")]
        script = Path(sys.argv[0])
        name = f"-m studies.{script.stem}" if script.parent.name == "studies" else script.name
        command = " ".join([*sorted(own), launcher, name])
        kept = f"all whole epochs are kept in {shown(folder)}"
        processes.announce(f"stopped by {signal.Signals(number).name}; {kept}. To continue: {command}")
        raise SystemExit(128 + number) from None
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def training_session(folder: Path) -> Iterator[Processes]:
    """All of the above for a training below `folder`."""
    with join_processes() as processes, lock_folder(folder, processes), stop_with_one_line(folder, processes):
        yield processes

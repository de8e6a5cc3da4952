"""Preparing a run: seeds, device, precision, processes, the folder's lock, and what happens on a signal."""

import contextlib
import ctypes
import datetime
import fcntl
import importlib.metadata
import os
import platform
import random
import signal
from collections.abc import Iterator
from pathlib import Path

from base.errors import UserError, started_by_torchrun
from base.project import display_path

import numpy as np
import torch
import torch.distributed as dist


def seed_everything(seed: int) -> None:
    """Seed Python, numpy and torch: before a network is built, and again before each epoch.

    The order of the images (engine/training.py) and their augmentation (augment.py) have other generators, which follow from
    the same seed. The lists follow from SPLIT_SEED.
    """
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def choose_device() -> torch.device:
    """The GPU of this process, or the CPU, made repeatable: no TF32, no algorithm that a timing chooses."""
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cudnn.deterministic = True
    torch.backends.cudnn.benchmark = False
    _keep_freed_memory()
    if not torch.cuda.is_available():
        return torch.device("cpu")
    rank = int(os.environ["LOCAL_RANK"]) if started_by_torchrun() else 0
    if rank >= torch.cuda.device_count():
        raise UserError(f"this machine has {torch.cuda.device_count()} GPUs; start at most one process on each")
    torch.cuda.set_device(rank)
    try:
        torch.zeros(1, device="cuda")
    except RuntimeError as error:
        raise UserError(f"this torch cannot use the GPU ({error}); to use the CPU: CUDA_VISIBLE_DEVICES=''") from error
    return torch.device("cuda", rank)


def choose_precision(device: torch.device) -> torch.dtype:
    """What training computes in: bfloat16 by autocast if the GPU has it, else float32. Saved logits are float32."""
    has_bfloat16 = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.bfloat16 if has_bfloat16 else torch.float32


def _keep_freed_memory() -> None:
    """Let the C library keep large freed blocks for the next batch, if it is glibc.

    By default each tensor of more than 32 MB, and whatever is free at the end of the heap, is returned to the system and
    requested again a moment later, page by page: a sixth of a training step on the CPU. Memory grows no further than its
    peak. The numbers are M_MMAP_THRESHOLD and M_TRIM_THRESHOLD of malloc.h.
    """
    with contextlib.suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-3, 2**30)
        mallopt(-1, 2**31 - 1)


def environment(device: torch.device) -> dict[str, str | int]:
    """What the last bits of logits may depend on."""
    cuda = device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(device) if cuda else f"cpu {torch.backends.cpu.get_cpu_capability()}",
        "threads": torch.get_num_threads(),
        "system": f"{platform.system()} {platform.machine()}",
        "torch": str(torch.__version__),
        "torchvision": importlib.metadata.version("torchvision"),
    }


def environment_changes(before: dict, now: dict) -> str:
    """ "threads was 2, is 1, …"; empty if nothing changed."""
    return ", ".join(f"{key} was {before.get(key)}, is {now[key]}" for key in now if before.get(key) != now[key])


def process_count() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def process_rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def is_main_process() -> bool:
    return process_rank() == 0


def announce(text: str) -> None:
    """Print once, not in every process."""
    if is_main_process():
        print(text, flush=True)


def wait_for_all() -> None:
    if dist.is_initialized():
        dist.barrier()


def sum_over_processes(tensor: torch.Tensor) -> torch.Tensor:
    """The sum of the tensor over all processes, in place. It must lie on the process's device."""
    if dist.is_initialized():
        assert tensor.is_cuda == (dist.get_backend() == "nccl"), "nccl takes tensors on the GPU only, gloo on the CPU"
        dist.all_reduce(tensor)
    return tensor


@contextlib.contextmanager
def joined_processes() -> Iterator[torch.device]:
    """Join the processes that torchrun started, if it did; yields this process's device."""
    several = os.environ.get("WORLD_SIZE", "") not in ("", "1")
    if (several or os.environ.get("SLURM_STEP_NUM_TASKS", "1") != "1") and not started_by_torchrun():
        raise UserError("several processes are started with torchrun: torchrun --nproc-per-node 4 train_rgb.py")
    device = choose_device()
    if not several:
        yield device
        return
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, timeout=datetime.timedelta(hours=1))  # a slow disk is no failure
    try:
        yield device
    finally:
        dist.destroy_process_group()


@contextlib.contextmanager
def locked_folder(folder: Path) -> Iterator[None]:
    """Hold a lock on the folder, or raise a UserError. The system releases it however this process ends."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = os.open(folder / "train.lock", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW)
    except OSError as error:
        told = f"cannot write {display_path(folder)}/train.lock: {error.strerror}"
        raise UserError(f"{told}; delete it if it is a link, or check PROJECT_ROOT in config.py") from error
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError(f"another training is at work in {display_path(folder)}; wait for it or stop it") from None
    except OSError as error:  # some file systems of clusters have no locks
        print(f"note: {display_path(folder)} cannot be locked ({error.strerror}): do not start this twice at once")
    for pattern in ("*/*.partial", "final_model.pt.*.partial", "selection.csv.*.partial"):  # left by a killed training
        for partial in folder.glob(pattern):
            partial.unlink(missing_ok=True)
    with open(lock):
        yield


@contextlib.contextmanager
def stopping_with_one_line(folder: Path) -> Iterator[None]:
    """On SIGTERM or Ctrl-C end at once, and say what is kept."""

    def stop(number: int, frame: object) -> None:
        raise SystemExit(128 + number)

    former = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    except SystemExit as end:
        if isinstance(end.code, int) and end.code > 128:
            name = signal.Signals(end.code - 128).name
            announce(
                f"stopped by {name}; complete epochs are kept in {display_path(folder)}; to continue, run it again"
            )
        raise
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def training_session(folder: Path) -> Iterator[torch.device]:
    """All of the above for a training below `folder`; yields the device."""
    with joined_processes() as device, locked_folder(folder) if is_main_process() else contextlib.nullcontext():
        with stopping_with_one_line(folder):
            yield device

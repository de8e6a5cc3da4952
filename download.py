"""Download what is missing: both EuroSAT archives (94 MB and 2 GB) and the initial weights that the settings name.

With `rgb`, `ms` or `weights` only that. It is safe to run again: complete files are kept, an interrupted download starts
again, checksums are verified. Needs a network, and 5.5 GB of disk space for everything.

writes  data/ below the project root (the default DATASET_ROOT): the archives and their content; pretrained/
"""

import shutil
import socket

from base.command_line import run
from base.errors import UserError, reason
from base.project import TASKS, Task, config, display_path, pretrained_dir

from dataset import find_images
from engine.weights import RGB_MODEL, TIMEOUT, fetch_weights, weights_file
from models import torchvision_downloads

IMAGES = 27_000
# URL, MD5 as torchvision and torchgeo state it, bytes needed for the archive and its content.
ARCHIVES = {
    "rgb": (
        "https://huggingface.co/datasets/torchgeo/eurosat/resolve/c877bcd43f099cd0196738f714544e355477f3fd/EuroSAT.zip",
        "c8fa014336c82ac7804f0398fcb19387",
        250_000_000,
    ),
    "ms": (
        "https://hf.co/datasets/torchgeo/eurosat/resolve/1ce6f1bfb56db63fd91b6ecc466ea67f2509774c/EuroSATallBands.zip",
        "5ac12b3b2557aa56e1826e981e8e200e",
        5_200_000_000,
    ),
}


def main(wanted: list[Task | None]) -> None:
    for task in wanted:
        if task is None:
            fetch_all_weights()
        else:
            fetch_images(task)
    print("next: python train_rgb.py" if wanted == [None] else "next: python split_data.py")


def fetch_images(task: Task) -> None:
    """Download and unpack one archive into data/, unless all its images are below DATASET_ROOT."""
    if config.dataset_root.is_dir() and len(find_images(config.dataset_root, task) or ()) == IMAGES:
        print(f"{task.title}: {IMAGES:,} images are already below {config.dataset_root}")
        return
    folder = config.project_root / "data"
    folder.mkdir(parents=True, exist_ok=True)
    url, md5, size = ARCHIVES[task.name]
    free = shutil.disk_usage(folder).free
    if free < size:
        raise UserError(
            f"{folder} has {free / 1e9:.1f} GB free, {task.title} needs {size / 1e9:.1f} GB: free some space"
        )
    archive = folder / url.rpartition("/")[2]
    socket.setdefaulttimeout(TIMEOUT)
    try:
        if not (archive.exists() and torchvision_downloads.check_md5(archive, md5)):
            partial = archive.with_name(f"{archive.name}.partial")
            partial.unlink(missing_ok=True)
            torchvision_downloads.download_url(url, folder, filename=partial.name, md5=md5)
            partial.replace(archive)
        print(f"unpacking {display_path(archive)}")
        torchvision_downloads.extract_archive(archive, folder)
    except Exception as error:
        raise UserError(
            f"{url} cannot be downloaded or unpacked ({reason(error)}); check network and disk and run this again, or download "
            f"it elsewhere, check its MD5 {md5} and put it at {archive}"
        ) from error
    count = len(find_images(folder, task) or ())
    if count != IMAGES:
        raise UserError(f"{display_path(archive)} has {count:,} images, not {IMAGES:,}; delete it and run this again")
    print(f"{task.title}: wrote {IMAGES:,} images below {display_path(folder)}")
    if config.dataset_root != folder:
        print(f"note: DATASET_ROOT is {config.dataset_root}; set it to {folder} to use these images")


def fetch_all_weights() -> None:
    """The initial weights of all settings of all profiles."""
    settings = [setting for tasks in config.settings.values() for task in tasks.values() for setting in task]
    for backbone, weights in dict.fromkeys((setting.backbone, setting.weights) for setting in settings):
        if weights not in (None, RGB_MODEL):
            path = fetch_weights(weights_file(backbone, weights), pretrained_dir())
            print(f"{backbone}: {display_path(path)} is complete")


if __name__ == "__main__":
    run(main, __doc__, choices={**TASKS, "weights": None})

"""Fetch what is missing: both EuroSAT archives (94 MB and 2 GB) and the initial weights that the settings name.

With `rgb`, `ms` or `weights` only that. Safe to run again: what is there is left alone, a download that broke off starts
anew, checksums are verified. Needs a network, and 5.5 GB of disk for all.

writes  data/ below the project root, the default DATASET_ROOT: the archives and what they hold; pretrained/
"""

import shutil
import socket
from pathlib import Path

from dataset import IMAGE_SETS, find_images
from engine.weights import RGB_MODEL, TIMEOUT, fetch_weights, weights_file
from models import torchvision_downloads
from project import TASKS, UserError, config, pretrained_dir, run, shown

IMAGES = 27_000
# URL, MD5 as torchvision and torchgeo state it, bytes needed for the archive and what it unpacks to.
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


def main(wanted: tuple[str, ...]) -> None:
    for task in TASKS:
        if task in wanted:
            fetch_images(task)
    if "weights" in wanted:
        fetch_all_weights()
    print("next: python split_data.py" if set(wanted) & set(TASKS) else "next: python train_rgb.py")


def fetch_images(task: str) -> None:
    """Download and unpack one archive into data/, unless all its images are below DATASET_ROOT.

    Raises:
        UserError: no network, too little disk, a damaged download, or an archive with other images.
    """
    name = IMAGE_SETS[task].name
    if config.dataset_root.is_dir() and len(find_images(config.dataset_root, task) or ()) == IMAGES:
        print(f"{name}: {IMAGES:,} images are below {config.dataset_root} already")
        return
    folder = config.project_root / "data"
    folder.mkdir(parents=True, exist_ok=True)
    url, md5, size = ARCHIVES[task]
    free = shutil.disk_usage(folder).free
    if free < size:
        raise UserError(f"{folder} has {free / 1e9:.1f} GB free; {name} needs {size / 1e9:.1f} GB: free some")
    archive = folder / url.rpartition("/")[2]
    _download(url, archive, md5)
    print(f"unpacking {shown(archive)}")
    try:
        torchvision_downloads.extract_archive(archive, folder)
    except (RuntimeError, ValueError) as error:
        raise UserError(f"{shown(archive)} cannot be unpacked ({error}); delete it and run this again") from error
    count = len(find_images(folder, task) or ())
    if count != IMAGES:
        raise UserError(
            f"{shown(archive)} unpacked to {count:,} images instead of {IMAGES:,}; delete it and run this again"
        )
    print(f"{name}: wrote {IMAGES:,} images below {shown(folder)}")
    if config.dataset_root != folder:
        print(f"note: DATASET_ROOT is {config.dataset_root}; set it to {folder} to use what was unpacked")


def _download(url: str, archive: Path, md5: str) -> None:
    """Fetch an archive under another name first: what lies under its own name is whole."""
    if archive.exists() and torchvision_downloads.check_md5(archive, md5):
        return
    partial = archive.with_name(f"{archive.name}.partial")
    partial.unlink(missing_ok=True)
    socket.setdefaulttimeout(TIMEOUT)
    try:
        torchvision_downloads.download_url(url, archive.parent, filename=partial.name, md5=md5)
    except (OSError, RuntimeError, ValueError) as error:
        raise UserError(
            f"{url} cannot be fetched ({' '.join(str(error).split())}); check network and disk and run this again, or fetch "
            f"it elsewhere, check its MD5 {md5} and put it at {archive}"
        ) from error
    partial.replace(archive)


def fetch_all_weights() -> None:
    """The initial weights of all settings of all profiles.

    Raises:
        UserError: they cannot be had, or are damaged.
    """
    settings = [setting for tasks in config.settings.values() for own in tasks.values() for setting in own]
    for backbone, weights in dict.fromkeys((setting.backbone, setting.weights) for setting in settings):
        if weights in (None, RGB_MODEL):
            continue
        file = weights_file(backbone, weights)
        there = file.path(pretrained_dir()).exists()
        print(
            f"{backbone}: {shown(fetch_weights(file, pretrained_dir()))} {'is there already' if there else f'from {file.origin}'}"
        )


if __name__ == "__main__":
    run(main, __doc__, choices=(*TASKS, "weights"))

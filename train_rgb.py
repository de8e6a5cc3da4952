"""Task 2: fine-tune on RGB with every setting in config.RGB_SETTINGS and keep the best model by val.

All layers of a network with loaded weights are trained. After each epoch accuracy and TPR per class on val are
written and drawn. A run that was interrupted continues when started again; a finished setting is not trained again.

reads   splits/<profile>/rgb/{train,val}.csv, the images, pretrained/<backbone>.pth (or torchvision's download)
writes  outputs/<profile>/rgb/<setting>/, final_model.pt and selection.csv beside these; cache/

Several GPUs: torchrun --nproc-per-node 4 train_rgb.py
"""

import config
from project import run


def main() -> None:
    from training import train

    train("rgb", config.RGB_SETTINGS)


if __name__ == "__main__":
    run(main, __doc__)

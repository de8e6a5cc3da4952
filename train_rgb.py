"""Task 2: fine-tune on RGB with every setting in SETTINGS of config.py and keep the best model by val.

All layers of a network with loaded weights are trained. After each epoch accuracy and TPR per class on val are
written and drawn. A run that was interrupted continues when started again; a finished setting is not trained again.

reads   splits/<profile>/rgb/{train,val}.csv, the images, pretrained/ (fetched where they are not there)
writes  outputs/<profile>/rgb/<setting>/, final_model.pt and selection.csv beside these; cache/

Several GPUs: torchrun --nproc-per-node 4 train_rgb.py
"""

from project import run
from training import train


def main() -> None:
    train("rgb")


if __name__ == "__main__":
    run(main, __doc__)

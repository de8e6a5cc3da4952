"""Task 3: fine-tune on six of the thirteen bands with every setting in SETTINGS of config.py and keep the best by val.

Each network is one network with one final linear layer; every other layer starts with loaded weights (the attention,
which is new, starts with no say). A run that was interrupted continues when started again.

reads   splits/<profile>/ms/{train,val}.csv, the images, pretrained/ (fetched where they are not there)
writes  outputs/<profile>/ms/<setting>/, final_model.pt and selection.csv beside these; cache/

Several GPUs: torchrun --nproc-per-node 4 train_ms.py
"""

from project import run
from training import train


def main() -> None:
    train("ms")


if __name__ == "__main__":
    run(main, __doc__)

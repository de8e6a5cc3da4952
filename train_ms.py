"""Task 3: fine-tune on six of the thirteen bands with every setting in SETTINGS of config.py, and keep the best by val.

Each network is one network with one final linear layer; every other layer starts with loaded weights (the attention, which
is new, starts without effect). A run that was interrupted continues when it is started again.

reads   splits/<profile>/ms/, the images, pretrained/ (initial weights, downloaded if they are missing); the final RGB model
        if a setting starts from it
writes  outputs/<profile>/ms/<setting>/, and final_model.pt and selection.csv beside these folders

Several GPUs: torchrun --nproc-per-node 4 train_ms.py
"""

import functools

from base.command_line import run
from base.project import MS, RGB, config, pretrained_dir

from dataset import EuroSATDataset
from engine.final_model import initial_weights, select_final_model
from engine.runtime import is_main_process, seed_everything, training_session
from engine.splits import read_splits, splits_hash
from engine.training import check_settings, train_setting
from models import build_model


def main() -> None:
    settings = check_settings(MS)
    with training_session(MS.outputs) as device:
        lists = read_splits(MS.splits, MS)
        images = functools.partial(EuroSATDataset, config.dataset_root, MS, device=device, seed=config.seed)

        @functools.cache  # settings with the same bands share their images
        def train_and_val(bands: tuple[str, ...]) -> tuple[EuroSATDataset, EuroSATDataset]:
            train = images(lists["train"], bands)
            return train, images(lists["val"], bands, train.statistics)

        for setting in settings:
            train, val = train_and_val(setting.bands)
            train.augmentation = setting.augmentation
            weights = initial_weights(setting, pretrained_dir(), RGB, lists)
            seed_everything(config.seed)  # the matriculation number, as soon as the team is filled in
            model = build_model(setting, weights)
            train_setting(setting, model, train, val, splits_hash(lists), MS.outputs / setting.name)
        if is_main_process():
            select_final_model(MS, settings, lists, pretrained_dir())


if __name__ == "__main__":
    run(main, __doc__)

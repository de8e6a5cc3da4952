"""Task 2: fine-tune on RGB with every setting in SETTINGS of config.py, and keep the best model by val.

All layers of a network with loaded weights are trained. Accuracy and TPR per class on val are written after each epoch and
drawn at a setting's end. A run that was interrupted continues when it is started again; a finished setting is not repeated.

reads   splits/<profile>/rgb/, the images, pretrained/ (initial weights, downloaded if they are missing)
writes  outputs/<profile>/rgb/<setting>/, and final_model.pt and selection.csv beside these folders

Several GPUs: torchrun --nproc-per-node 4 train_rgb.py
"""

import functools

from base.command_line import run
from base.project import RGB, config, pretrained_dir

from dataset import EuroSATDataset
from engine.final_model import select_final_model
from engine.runtime import is_main_process, seed_everything, training_session
from engine.splits import read_splits, splits_hash
from engine.training import check_settings, train_setting
from engine.weights import load_initial_weights
from models import build_model


def main() -> None:
    settings = check_settings(RGB)
    with training_session(RGB.outputs) as device:
        lists = read_splits(RGB.splits, RGB)
        images = functools.partial(EuroSATDataset, config.dataset_root, RGB, device=device, seed=config.seed)

        @functools.cache  # settings with the same bands share their images
        def train_and_val(bands: tuple[str, ...]) -> tuple[EuroSATDataset, EuroSATDataset]:
            train = images(lists["train"], bands)
            return train, images(lists["val"], bands, train.statistics)

        for setting in settings:
            train, val = train_and_val(setting.bands)
            train.augmentation = setting.augmentation
            weights = load_initial_weights(setting, pretrained_dir())
            seed_everything(config.seed)  # the matriculation number, as soon as the team is filled in
            model = build_model(setting, weights)
            train_setting(setting, model, train, val, splits_hash(lists), RGB.outputs / setting.name)
        if is_main_process():
            select_final_model(RGB, settings, lists, pretrained_dir())


if __name__ == "__main__":
    run(main, __doc__)

"""Task 3: fine-tune on six of the thirteen bands with every setting in SETTINGS of config.py and keep the best by val.

Each network is one network with one final linear layer; every other layer starts with loaded weights (the attention,
which is new, starts with no say). A run that was interrupted continues when started again.

reads   splits/<profile>/ms/, the images, pretrained/ (fetched where they are not there); the final RGB model where
        a setting starts from it
writes  outputs/<profile>/ms/<setting>/, final_model.pt and selection.csv beside these; cache/

Several GPUs: torchrun --nproc-per-node 4 train_ms.py
"""

from dataset import EuroSATDataset
from engine.evaluation import initial_weights, select_final_model
from engine.runtime import seed_everything, training_session
from engine.splits import read_splits, splits_hash
from engine.training import check_settings, train_setting
from models import build_model
from project import cache_dir, config, outputs_dir, pretrained_dir, run, settings_of, splits_dir


def main() -> None:
    settings = settings_of("ms")
    check_settings("ms", settings)
    with training_session(outputs_dir("ms")) as processes:
        lists = read_splits(splits_dir("ms"), "ms")
        common = {"seed": config.seed, "cache": cache_dir(), "device": processes.device}
        for setting in settings:
            with processes.first_process_first():  # it decodes the images, the others find them in the cache
                train = EuroSATDataset(
                    config.dataset_root,
                    "ms",
                    lists["train"],
                    setting.bands,
                    augmentation=setting.augmentation,
                    **common,
                )
                val = EuroSATDataset(config.dataset_root, "ms", lists["val"], setting.bands, train.statistics, **common)
            weights = initial_weights(setting, pretrained_dir(), outputs_dir("rgb"), splits_dir("rgb"), lists)
            seed_everything(config.seed)  # the first team member's matriculation number
            model = build_model(setting, weights)
            train_setting(setting, model, train, val, splits_hash(lists), outputs_dir("ms") / setting.name, processes)
        if processes.rank == 0:
            select_final_model("ms", settings, lists, outputs_dir("ms"), pretrained_dir())


if __name__ == "__main__":
    run(main, __doc__)

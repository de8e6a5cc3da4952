"""Task 1: write the train, val and test lists.

Each class is split separately: its names are put in a seeded order once and cut 60 / 20 / 20 % into pools, and a
profile's lists take the first of each class from these. Patches that show the ground of another part are left out. The
same seed gives the same lists on every machine; the same piece of land is in the same part in both image sets and in
every profile.

reads   the names of the files below DATASET_ROOT (no image is opened, moved or changed)
writes  splits/<profile>/<rgb|ms>/{train,val,test}.csv and split.json beside them
"""

import os

from dataset import CLASSES, IMAGE_SETS, find_images
from engine.splits import (
    PUBLISHED_PROFILES,
    Split,
    complete_patches,
    make_lists,
    make_record,
    read_record,
    read_splits,
    record_path,
    split_path,
    splits_hash,
)
from project import PARTS, TASKS, UserError, config, outputs_dir, run, shown, splits_dir, write_json, write_text

OVERWRITE = "to replace the lists (the former ones are kept): python split_data.py --overwrite"


def main(overwrite: bool) -> None:
    present = find_patches()
    # Everything is made, and compared with what is there, before anything is written.
    answers = {task: make_and_compare(task, present, overwrite) for task in tasks_to_split(present)}
    for task, (lists, smaller, answer) in answers.items():
        if answer == "":
            for part in PARTS:
                write_text(split_path(task, part), lists[part].text(), keep_former=True)
            write_json(record_path(task), make_record(lists, smaller, present.get(task, {})), keep_former=True)
        sizes = " / ".join(f"{len(lists[part].files):,}" for part in PARTS)
        print(f"{answer or 'wrote'} {shown(splits_dir() / task)}/{{train,val,test}}.csv: {sizes} images")
    print("next: python verify_splits.py")


def find_patches() -> dict[str, dict[str, str]]:
    """{task: {patch: file}} of the image sets that are there; what is not used of them is said.

    Raises:
        UserError: there is none.
    """
    present = {task: images for task in TASKS if (images := find_images(task)) is not None}
    if not present:
        folders = sorted({folder for image_set in IMAGE_SETS.values() for folder in image_set.folders} - {"."})
        raise UserError(
            f"no EuroSAT images below {config.dataset_root} (looked there and in {', '.join(folders)}); set DATASET_ROOT "
            "in config.py (or EUROSAT_DATASET_ROOT) to the unpacked archives, or run: python download.py"
        )
    for task in set(TASKS) - set(present):
        print(f"note: no {IMAGE_SETS[task].name} images below {config.dataset_root}: no lists for {task}")
    for task, images in present.items():
        folder = config.dataset_root / next(iter(images.values())).rpartition("/")[0] / ".."
        others = sorted(
            entry.name
            for entry in os.scandir(folder)
            if entry.name not in CLASSES
            and entry.is_dir()
            and any(name.lower().endswith(IMAGE_SETS[task].suffixes) for name in os.listdir(entry))
        )
        if others:
            print(f"note: {folder.parent.parent} also holds {', '.join(others)}, none of the ten classes: not used")
        strangers = [] if config.profile == "demo" else sorted(set(images) - set(complete_patches()))
        if strangers:
            print(
                f"note: {len(strangers):,} {IMAGE_SETS[task].name} images have names that are none of EuroSAT's 27,000 (for "
                f"example {images[strangers[0]]}): not used"
            )
    return present


def tasks_to_split(present: dict[str, dict[str, str]]) -> list[str]:
    """The tasks that the profile has lists for; those of the published splits are names alone."""
    if config.profile in PUBLISHED_PROFILES:
        return ["rgb"]
    return list(present)


def make_and_compare(
    task: str, present: dict[str, dict[str, str]], overwrite: bool
) -> tuple[dict[str, Split], bool, str]:
    """Make the lists of a task and hold them against those that are there.

    Returns:
        The lists, those on disk where they stay; whether they are smaller than asked for; and why they stay: "unchanged",
        or what more there would be. An empty answer: they are to be written.

    Raises:
        UserError: the lists on disk are others, and it is not that more images are at hand: says what differs.
    """
    there = [part for part in PARTS if split_path(task, part).exists()]
    if overwrite or not there:
        lists, smaller = make_lists(task, present, config.allow_smaller_splits)
        return lists, smaller, ""
    try:
        former, record = read_splits(task), read_record(task)
    except UserError as error:
        raise UserError(f"{error}; models that rest on them: {models_of(task)}") from error
    lists, smaller = make_lists(task, present, config.allow_smaller_splits or record["smaller_than_asked_for"])
    if splits_hash(lists) == splits_hash(former):
        return former, smaller, "unchanged"
    listed = [patch for split in former.values() for patch in split.patches]
    absent = [patch for patch in listed if patch not in present.get(task, ())]
    if record["lists_sha256"] != splits_hash(former):
        reason = "they were changed after they were made"
    elif record["seed"] != config.split_seed:
        reason = f"their seed is {record['seed']}, SPLIT_SEED in config.py is {config.split_seed}"
    elif absent:
        reason = f"{len(absent):,} of their images are not below {config.dataset_root}, for example {absent[0]}"
    elif not record["smaller_than_asked_for"] and record["sizes"] != [len(lists[part].files) for part in PARTS]:
        wanted, are = (" / ".join(map(str, sizes)) for sizes in ([len(lists[p].files) for p in PARTS], record["sizes"]))
        reason = f"they have {are} images, config.py asks for {wanted}"
        if config.profile in ("full", "demo"):
            return former, smaller, f"more images are at hand: {wanted} instead of {are}; {OVERWRITE}; kept"
    else:
        wanted = " / ".join(f"{len(lists[part].files):,}" for part in PARTS)
        return former, smaller, f"more images are at hand, for lists of {wanted}; {OVERWRITE}; kept"
    raise UserError(
        f"the {IMAGE_SETS[task].name} lists in {shown(splits_dir() / task)} are others than would be made now: {reason}; "
        f"models that rest on them: {models_of(task)}; {OVERWRITE}"
    )


def models_of(task: str) -> str:
    path = outputs_dir(task) / "final_model.pt"
    return shown(path) if path.exists() else "none"


if __name__ == "__main__":
    run(main, __doc__, switch=("--overwrite", "replace lists that exist and would change; the former are kept"))

"""Task 1: write the train, val and test lists.

Each class is split separately: its names are put in a seeded order once and cut 60 / 20 / 20 % into pools, and the lists
of `course` and `full` take the first of each class from these. Patches that show the ground of another part are left out.
The same seed gives the same lists on every machine; the same piece of land is in the same part in both image sets and in
both profiles. `published` and `spatial` are the lists that papers use, as they are. (The cut itself is `make_pools` in
engine/splits.py, which verify_splits.py makes again.)

reads   the names of the files below DATASET_ROOT (no image is opened, moved or changed)
writes  splits/<profile>/<rgb|ms>/{train,val,test}.csv and split.json beside them
"""

import functools
import os
from collections.abc import Collection

from dataset import CLASSES, IMAGE_SETS, Split, find_images
from engine.splits import (
    PUBLISHED_PROFILES,
    as_split,
    by_class,
    class_shares,
    complete_counts,
    complete_patches,
    make_pools,
    make_record,
    read_record,
    read_splits,
    record_path,
    split_path,
    split_text,
    splits_hash,
)
from project import PARTS, TASKS, UserError, config, outputs_dir, run, shown, splits_dir, write_json, write_text

OVERWRITE = "to replace the lists (the former ones are kept): python split_data.py --overwrite"


def main(overwrite: bool) -> None:
    present = find_patches()
    tasks = ["rgb"] if config.profile in PUBLISHED_PROFILES else list(present)
    # Everything is drawn, and compared with what is there, before anything is written.
    answers = {task: draw_and_compare(task, present, overwrite) for task in tasks}
    for task, (lists, smaller, kept) in answers.items():
        folder = splits_dir(task)
        if not kept:
            for part in PARTS:
                write_text(split_path(folder, part), split_text(lists[part]), keep_former=True)
            record = make_record(lists, smaller, present.get(task, {}), config.profile, config.split_seed)
            write_json(record_path(folder), record, keep_former=True)
        sizes = " / ".join(f"{len(lists[part].files):,}" for part in PARTS)
        print(f"{kept or 'wrote'} {shown(folder)}/{{train,val,test}}.csv: {sizes} images")
    print("next: python verify_splits.py")


# The draw --------------------------------------------------------------------------------------------------------


def draw_lists(
    task: str,
    present: dict[str, Collection[str]],
    profile: str,
    seed: int,
    sizes: tuple[int, int, int] | None,
    allow_smaller: bool = False,
) -> tuple[dict[str, Split], bool]:
    """Draw the lists of a task: {part: split}, and whether they are smaller than asked for.

    Args:
        present: {task: patches} that are at hand.
        sizes: images in train, val and test; None: all of the pools.
        allow_smaller: take the pools whole where the image set is too small for the sizes.

    Raises:
        UserError: the set is too small, or a part would lack a class.
    """
    if profile in PUBLISHED_PROFILES:  # names alone, as they are
        parts = complete_patches().items()
        return {part: as_split(task, [p for p, row in parts if row[profile] == part]) for part in PARTS}, False
    names = set().union(*present.values()) if profile == "demo" else complete_patches()
    pools = make_pools(names, seed)  # each class cut 60 / 20 / 20 % in its seeded order
    chosen: dict[str, list[str]] = {}
    too_few = []
    for part, size in zip(PARTS, sizes or (None, None, None), strict=True):
        pool = by_class(patch for patch in pools[part] if patch in present[task])
        shares = class_shares(size, complete_counts()) if size else {name: len(pool[name]) for name in CLASSES}
        if absent := [name for name in CLASSES if not pool[name]]:
            raise UserError(
                f"too few {IMAGE_SETS[task].name} images of {', '.join(absent)}: none is left for {part}; unpack more, or "
                "set another SPLIT_SEED"
            )
        too_few += [f"{len(pool[n])} {n} for {part}, not {shares[n]}" for n in CLASSES if len(pool[n]) < shares[n]]
        chosen[part] = [patch for name in CLASSES for patch in pool[name][: shares[name]]]
    if too_few and not allow_smaller:
        raise UserError(
            f"the {IMAGE_SETS[task].name} set has {len(present[task]):,} images, too few for the "
            f"{' / '.join(f'{size:,}' for size in sizes)} of train / val / test that the profile {profile} asks for (it has "
            f"{too_few[0]}); unpack the whole data set, or set ALLOW_SMALLER_SPLITS in config.py (or "
            "EUROSAT_ALLOW_SMALLER_SPLITS=1) to take what is there"
        )
    if too_few:  # the pools whole
        chosen = {part: [patch for patch in pools[part] if patch in present[task]] for part in PARTS}
    return {part: as_split(task, chosen[part]) for part in PARTS}, bool(too_few)


# What is there ---------------------------------------------------------------------------------------------------


def find_patches() -> dict[str, dict[str, str]]:
    """{task: {patch: file}} of the image sets that are there; what is not used of them is said.

    Raises:
        UserError: there is none.
    """
    present = {task: images for task in TASKS if (images := find_images(config.dataset_root, task)) is not None}
    if not present:
        folders = sorted({folder for image_set in IMAGE_SETS.values() for folder in image_set.folders} - {"."})
        raise UserError(
            f"no EuroSAT images below {config.dataset_root} (looked there and in {', '.join(folders)}); set DATASET_ROOT "
            "in config.py (or EUROSAT_DATASET_ROOT) to the unpacked archives, or run: python download.py"
        )
    for task in set(TASKS) - set(present):
        print(f"note: no {IMAGE_SETS[task].name} images below {config.dataset_root}: no lists for {task}")
    for task, images in present.items():
        folder = (config.dataset_root / next(iter(images.values()))).parent.parent
        others = sorted(
            entry.name
            for entry in os.scandir(folder)
            if entry.name not in CLASSES
            and entry.is_dir()
            and any(name.lower().endswith(IMAGE_SETS[task].suffixes) for name in os.listdir(entry))
        )
        if others:
            print(f"note: {folder} also holds {', '.join(others)}, none of the ten classes: not used")
        strangers = [] if config.profile == "demo" else sorted(set(images) - set(complete_patches()))
        if strangers:
            print(
                f"note: {len(strangers):,} {IMAGE_SETS[task].name} images have names that are none of EuroSAT's 27,000 (for "
                f"example {images[strangers[0]]}): not used"
            )
    return present


def draw_and_compare(
    task: str, present: dict[str, dict[str, str]], overwrite: bool
) -> tuple[dict[str, Split], bool, str]:
    """Draw the lists of a task and hold them against those that are there.

    Returns:
        The lists, those on disk where they stay; whether they are smaller than asked for; and why they stay: "unchanged",
        or what more there would be. Without a why they are to be written.

    Raises:
        UserError: the lists on disk are others, and it is not that more images are at hand: says what differs.
    """
    folder, profile = splits_dir(task), config.profile
    sizes = config.course_sizes if profile == "course" else None
    draw = functools.partial(draw_lists, task, present, profile, config.split_seed, sizes)
    if overwrite or not any(split_path(folder, part).exists() for part in PARTS):
        return *draw(config.allow_smaller_splits), ""
    try:
        former, record = read_splits(folder, task), read_record(folder)
    except UserError as error:
        raise UserError(f"{error}; models that rest on them: {models_of(task)}") from error
    lists, smaller = draw(config.allow_smaller_splits or record["smaller_than_asked_for"])
    if splits_hash(lists) == splits_hash(former):
        return former, smaller, "unchanged"
    are, would_be = record["sizes"], [len(lists[part].files) for part in PARTS]
    now = " / ".join(f"{size:,}" for size in would_be)
    listed = [patch for split in former.values() for patch in split.patches]
    absent = [patch for patch in listed if patch not in present.get(task, ())]
    if record["lists_sha256"] != splits_hash(former):
        reason = "they were changed after they were made"
    elif record["seed"] != config.split_seed:
        reason = f"their seed is {record['seed']}, SPLIT_SEED in config.py is {config.split_seed}"
    elif absent:
        reason = f"{len(absent):,} of their images are not below {config.dataset_root}, for example {absent[0]}"
    elif profile == "course" and are != would_be and not record["smaller_than_asked_for"]:
        reason = f"they have {' / '.join(f'{size:,}' for size in are)} images, config.py asks for {now}"
    else:
        return former, smaller, f"more images are at hand, for lists of {now} ({OVERWRITE}); kept"
    raise UserError(
        f"the {IMAGE_SETS[task].name} lists in {shown(folder)} are others than would be made now: {reason}; "
        f"models that rest on them: {models_of(task)}; {OVERWRITE}"
    )


def models_of(task: str) -> str:
    path = outputs_dir(task) / "final_model.pt"
    return shown(path) if path.exists() else "none"


if __name__ == "__main__":
    run(main, __doc__, switch=("--overwrite", "replace lists that exist and would change; the former are kept"))

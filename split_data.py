"""Task 1: write the train, val and test lists.

Every class is split once into pools of 60 / 20 / 20 % with the seed; a profile's lists are taken from these pools,
stratified. The same piece of land is in the same part in both image sets and in every profile.

reads   the names of the files below DATASET_ROOT (no image is opened, moved or changed)
writes  splits/<profile>/<rgb|ms>/{train,val,test}.csv and splits/<profile>/split.json
"""

import json
from collections.abc import Iterable

import numpy as np

import config
from dataset import CLASSES, IMAGE_SETS, Split, find_images, split_path
from project import PARTS, TASKS, UserError, outputs_dir, run, sha256, shown, splits_dir, write_json, write_text

FRACTIONS = {"train": 0.6, "val": 0.2, "test": 0.2}


def main(overwrite: bool) -> None:
    found = find_image_sets()
    lists = make_lists(found, config.SEED, config.SPLIT_SIZES[config.PROFILE], config.ALLOW_SMALLER_SPLITS)
    record = make_record(found, config.SEED)
    if not overwrite:
        refuse_to_replace(lists, record)
    write_lists(lists, record)


def find_image_sets() -> dict[str, dict[str, str]]:
    """{task: {patch: file}} of the image sets that are there.

    Raises:
        UserError: there is none.
    """
    found = {task: images for task in TASKS if (images := find_images(task)) is not None}
    if not found:
        folders = sorted({folder for image_set in IMAGE_SETS.values() for folder in image_set.folders} - {"."})
        raise UserError(
            f"no EuroSAT images below {config.DATASET_ROOT} (looked there and in {', '.join(folders)}); set DATASET_ROOT "
            "in config.py (or EUROSAT_DATASET_ROOT) to the unpacked archives, or run: python download_data.py"
        )
    for task in set(TASKS) - set(found):
        print(f"note: no {IMAGE_SETS[task].name} images below {config.DATASET_ROOT}: no lists for {task}")
    return found


# The split -------------------------------------------------------------------------------------------------------


def make_pools(found: dict[str, dict[str, str]], seed: int) -> dict[str, list[str]]:
    """Split the patches of each class into {part: patches}, sorted.

    Patches that lie in all image sets and patches that lie in one are split separately, so the fractions hold in each
    set, to an image, and a patch is in the same pool in all.
    """
    pools = {part: [] for part in PARTS}
    everywhere = set.intersection(*(set(images) for images in found.values()))
    groups_by_class = [by_class(sorted(everywhere))]
    groups_by_class += [by_class(patch for patch in images if patch not in everywhere) for images in found.values()]
    for class_name in CLASSES:
        groups = [patches[class_name] for patches in groups_by_class]
        common = len(groups[0])
        for index, group in enumerate(groups):
            before = common if index else 0  # an image set is its own group and the common one: round their sum
            train_end = _rounded(before + len(group), 0.6) - _rounded(before, 0.6)
            val_end = max(train_end, _rounded(before + len(group), 0.8) - _rounded(before, 0.8))
            train, rest = _draw(group, train_end, seed)
            val, test = _draw(rest, val_end - train_end, seed)
            for part, patches in zip(PARTS, (train, val, test), strict=True):
                pools[part] += patches
    return {part: sorted(patches) for part, patches in pools.items()}


def by_class(patches: Iterable[str]) -> dict[str, list[str]]:
    """{class: its patches}, in their order."""
    grouped: dict[str, list[str]] = {name: [] for name in CLASSES}
    for patch in patches:
        grouped[patch.partition("/")[0]].append(patch)
    return grouped


def _rounded(count: int, fraction: float) -> int:
    return int(count * fraction + 0.5)


def _draw(patches: list[str], count: int, seed: int, stratified: bool = False) -> tuple[list[str], list[str]]:
    """Draw `count` of the sorted patches with the seed: (drawn, rest), both sorted."""
    from sklearn.model_selection import train_test_split  # here: it takes longer to import than the rest to run

    if count in (0, len(patches)):  # scikit-learn refuses to leave a side empty
        return (patches, []) if count else ([], patches)
    labels = [patch.partition("/")[0] for patch in patches] if stratified else None
    drawn, rest = train_test_split(patches, train_size=count, random_state=seed, stratify=labels)
    return sorted(drawn), sorted(rest)


def make_lists(
    found: dict[str, dict[str, str]], seed: int, sizes: tuple[int, int, int] | None, allow_smaller: bool
) -> dict[tuple[str, str], Split]:
    """Take each list from its pool: {(task, part): split}.

    Args:
        found: {task: {patch: file}}.
        sizes: images in train, val and test, or None for the whole pools.
        allow_smaller: take the pools of a set whole where one is smaller than its size.

    Raises:
        UserError: a pool is smaller than its size, or a part would lack a class.
    """
    pools = make_pools(found, seed)
    lists = {}
    for task, images in found.items():
        own = {part: [patch for patch in pools[part] if patch in images] for part in PARTS}
        wanted = dict(zip(PARTS, sizes)) if sizes else {part: len(own[part]) for part in PARTS}
        if any(len(own[part]) < wanted[part] for part in PARTS):
            if not allow_smaller:
                raise UserError(
                    f"the {IMAGE_SETS[task].name} set has {len(images)} images, which gives "
                    f"{' / '.join(str(len(own[part])) for part in PARTS)} for train / val / test where the profile "
                    f"{config.PROFILE} asks for {' / '.join(str(wanted[part]) for part in PARTS)}; unpack the whole data "
                    "set, or set ALLOW_SMALLER_SPLITS in config.py (or EUROSAT_ALLOW_SMALLER_SPLITS=1) to take what is there"
                )
            wanted = {part: len(own[part]) for part in PARTS}
        for part in PARTS:
            absent = set(CLASSES) - {patch.partition("/")[0] for patch in own[part]}
            if absent:
                raise UserError(
                    f"too few {IMAGE_SETS[task].name} images of {', '.join(sorted(absent))}: none is left for {part}; "
                    "each class needs at least 4"
                )
            drawn, _ = _draw(own[part], wanted[part], seed, stratified=True)
            rows = sorted((images[patch], CLASSES.index(patch.partition("/")[0])) for patch in drawn)
            lists[task, part] = Split([file for file, _ in rows], np.array([label for _, label in rows], np.int64))
    return lists


def make_record(found: dict[str, dict[str, str]], seed: int) -> dict:
    """What the lists were made from: the seed, and for each image set its number of images and a hash of its patches."""
    record: dict = {"seed": seed, "fractions": FRACTIONS, "image_sets": {}}
    for task, images in found.items():
        patches = "".join(f"{patch}\n" for patch in images).encode()
        counts = {name: len(own) for name, own in by_class(images).items()}
        record["image_sets"][task] = {"images": counts, "patches_sha256": sha256(patches)}
    return record


# Writing ---------------------------------------------------------------------------------------------------------


def record_path():
    return splits_dir() / "split.json"


def refuse_to_replace(lists: dict[tuple[str, str], Split], record: dict) -> None:
    """Lists on disk that would change stay as they are.

    Raises:
        UserError: says what differs and which models rest on the lists.
    """
    changed = []
    for task, part in lists:
        path = split_path(task, part)
        if path.exists() and path.read_bytes().replace(b"\r\n", b"\n") != lists[task, part].text().encode():
            changed.append((task, part))
    if not changed:
        return
    models = [shown(path) for task in TASKS if (path := outputs_dir(task) / "final_model.pt").exists()]
    raise UserError(
        f"the lists in {shown(splits_dir())} exist and {len(changed)} of them would change "
        f"({', '.join(f'{task}/{part}.csv' for task, part in changed)}): {_difference(record)}; "
        f"models that rest on them: {', '.join(models) or 'none'}; to replace them: python split_data.py --overwrite"
    )


def _difference(record: dict) -> str:
    try:
        old = json.loads(record_path().read_text())
        reasons = [] if old["seed"] == record["seed"] else [f"the seed was {old['seed']} and is {record['seed']}"]
        for task in TASKS:
            was, now = (side["image_sets"].get(task) for side in (old, record))
            if was != now:
                count = [sum(side["images"].values()) if side else 0 for side in (was, now)]
                reasons.append(f"the {IMAGE_SETS[task].name} set had {count[0]} images and has {count[1]}, or others")
        return ", ".join(reasons) or "the sizes or the lists themselves were changed"
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return "their record split.json is missing or damaged"


def write_lists(lists: dict[tuple[str, str], Split], record: dict) -> None:
    for (task, part), split in lists.items():
        write_text(split_path(task, part), split.text())
    write_json(record_path(), record)
    for task in dict.fromkeys(task for task, _ in lists):
        sizes = " / ".join(f"{len(lists[task, part].files):,}" for part in PARTS)
        print(f"wrote {shown(splits_dir() / task)}/{{train,val,test}}.csv: {sizes} images, seed {record['seed']}")
    print("next: python verify_splits.py")


if __name__ == "__main__":
    run(main, __doc__, switch=("--overwrite", "replace lists that exist and would change"))

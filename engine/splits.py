"""Lists of images: made, written, read.

A *patch* is a piece of land, "Forest/Forest_1": Forest_1.jpg in the RGB set, Forest_1.tif in the multispectral one.

The pool of a patch, train, val or test, depends on its name and the split's seed alone: each class's names, those of the
complete EuroSAT, are sorted by a hash of seed and name and cut 60 / 20 / 20 %, whichever files are at hand. So whoever
has one image set, half of it, or unpacks the second a week later has every patch in the same pool as everyone else.

Some patches show the same ground: 639 pairs share at least 2 % of their area. Of such a pair in two pools the patch in the
earlier one (train before val before test) leaves it. So no two parts of the lists show the same ground.

patches.csv: the 27,000 names; longitude and latitude of the centre (WGS 84, five decimals: 1 m), from the tags of the
multispectral files; the part of each in the two published splits, "published" at random (Neumann et al., 2019) and
"spatial" by longitude, both as in torchgeo's lists, whose MD5s were checked (the random test list, of which only a copy
in another order was found, as what the other two leave of the 27,000).
overlaps.csv: pairs of patches whose squares of 640 m share at least 2 % of their area, and the share; computed from these
positions, both squares in the UTM zone of the first.
"""

import csv
import functools
import io
import json
from collections.abc import Collection, Iterable
from pathlib import Path

import numpy as np

from dataset import CLASSES, Split, canonical_file, class_of, patch_of
from project import PARTS, UserError, sha256, shown

PUBLISHED_PROFILES = ("published", "spatial")
LIST_HEADER = ["file", "label", "class_name"]
REMAKE = "python split_data.py --overwrite"


def split_text(split: Split) -> str:
    """A list as it stands on disk."""
    return list_text(LIST_HEADER, [[f, label, CLASSES[label]] for f, label in zip(split.files, split.labels)])


def list_text(header: list[str], rows: list[list]) -> str:
    """Rows as CSV text with LF line ends."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([header, *rows])
    return text.getvalue()


# What is known of the complete data set --------------------------------------------------------------------------


@functools.cache
def complete_patches() -> dict[str, dict[str, str]]:
    """{patch: its row of patches.csv} of the complete EuroSAT."""
    with (Path(__file__).parent / "patches.csv").open(encoding="utf-8") as file:
        return {row["patch"]: row for row in csv.DictReader(file)}


@functools.cache
def overlapping_pairs() -> list[tuple[str, str]]:
    """Pairs of patches that show the same ground."""
    with (Path(__file__).parent / "overlaps.csv").open(encoding="utf-8") as file:
        return [(row["patch"], row["other"]) for row in csv.DictReader(file)]


# Making lists ----------------------------------------------------------------------------------------------------


def by_class(patches: Iterable[str]) -> dict[str, list[str]]:
    """{class: its patches, in the order given}."""
    groups: dict[str, list[str]] = {name: [] for name in CLASSES}
    for patch in patches:
        groups[class_of(patch)].append(patch)
    return groups


def make_pools(patches: Iterable[str], seed: int) -> dict[str, list[str]]:
    """Cut the patches of each class 60 / 20 / 20 % in a seeded order: {part: patches}, in that order.

    The order is that of SHA-256 over seed and name: the same in every version of every library. Patches that show ground
    of a later part have left.
    """
    pools: dict[str, list[str]] = {part: [] for part in PARTS}
    for own in by_class(patches).values():
        ordered = sorted(own, key=lambda patch: sha256(f"{seed} {patch}".encode()))
        train_end, val_end = round(0.6 * len(ordered)), round(0.8 * len(ordered))
        pools["train"] += ordered[:train_end]
        pools["val"] += ordered[train_end:val_end]
        pools["test"] += ordered[val_end:]
    rank = {patch: number for number, part in enumerate(PARTS) for patch in pools[part]}
    leaving = set()
    for pair in overlapping_pairs():
        first, second = sorted(pair, key=lambda patch: rank.get(patch, -1))
        if -1 < rank.get(first, -1) < rank[second]:
            leaving.add(first)
    return {part: [patch for patch in own if patch not in leaving] for part, own in pools.items()}


def class_shares(size: int, counts: dict[str, int]) -> dict[str, int]:
    """Share out `size` images in proportion to the classes' counts, by the largest remainder: {class: images}."""
    total = sum(counts.values())
    shares = {name: size * count // total for name, count in counts.items()}
    remainders = {name: size * count % total for name, count in counts.items()}
    for name in sorted(remainders, key=lambda name: -remainders[name])[: size - sum(shares.values())]:
        shares[name] += 1
    return shares


def complete_counts() -> dict[str, int]:
    """Images per class of the complete EuroSAT."""
    return {name: len(own) for name, own in by_class(complete_patches()).items()}


def as_split(task: str, patches: Iterable[str]) -> Split:
    """The patches as a list names them, sorted."""
    files = sorted(canonical_file(task, patch) for patch in patches)
    return Split(files, np.array([CLASSES.index(class_of(patch_of(file))) for file in files], np.int64))


# On disk ---------------------------------------------------------------------------------------------------------


def split_path(folder: Path, part: str) -> Path:
    return folder / f"{part}.csv"


def record_path(folder: Path) -> Path:
    return folder / "split.json"


def make_record(
    lists: dict[str, Split], smaller: bool, present: Collection[str], profile: str, seed: int
) -> dict[str, object]:
    """What the lists of a task were made from, and the hash that tells whether they were changed since."""
    drawn = profile not in PUBLISHED_PROFILES
    return {
        "profile": profile,
        "seed": seed if drawn else None,
        "sizes": [len(lists[part].files) for part in PARTS],
        "smaller_than_asked_for": smaller,
        "images_at_hand": {name: len(own) for name, own in by_class(present).items()} if drawn else None,
        "lists_sha256": splits_hash(lists),
    }


def read_record(folder: Path) -> dict:
    """split.json of a task.

    Raises:
        UserError: it is missing, or is not what `split_data.py` writes.
    """
    path = record_path(folder)
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        known = record["sizes"], record["smaller_than_asked_for"], record["lists_sha256"], record["seed"]
        at_hand = record["images_at_hand"]
        kinds = (list, bool, str, (int, type(None)))
        if not all(map(isinstance, known, kinds)) or not (at_hand is None or set(at_hand) == set(CLASSES)):
            raise ValueError("a value of another kind")
        return record
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{shown(path)} is missing or damaged ({error}); bring it back, or run: {REMAKE}") from error


def read_split(folder: Path, task: str, part: str) -> Split:
    """Read and check one list of a task's folder.

    Raises:
        UserError: the list is missing or is not what `split_data.py` writes, with the line.
    """
    return parse_split(split_path(folder, part), task, missing="python split_data.py", damaged=REMAKE)


def parse_split(path: Path, task: str, missing: str, damaged: str) -> Split:
    """Read and check a file of listed images.

    Args:
        missing, damaged: the command that makes the file, or makes it again.

    Raises:
        UserError: it is missing or wrong, with the line.
    """
    try:
        # "sig": Excel puts a byte-order mark in front, which nobody sees.
        rows = list(csv.reader(io.StringIO(path.read_bytes().decode("utf-8-sig")), strict=True))
    except FileNotFoundError:
        raise UserError(f"the list {shown(path)} is missing; run: {missing}") from None
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"cannot read the list {shown(path)}: {error}; run: {damaged}") from error

    def wrong(line: int, what: str) -> UserError:
        return UserError(f"{shown(path)}, line {line}: {what}; run: {damaged}")

    if not rows or rows[0] != LIST_HEADER:
        raise wrong(1, f"the header is not {','.join(LIST_HEADER)}")
    if len(rows) == 1:
        raise wrong(1, "the list is empty")
    files, seen = [], set()
    labels = np.empty(len(rows) - 1, np.int64)
    for line, row in enumerate(rows[1:], start=2):
        if len(row) != 3:
            raise wrong(line, f"{len(row)} columns instead of 3")
        file, label, class_name = row
        folders = file.split("/")
        if not file.isprintable() or "\\" in file or ".." in folders or "" in folders:
            raise wrong(line, f"{file!r} is not a path from the data set root on, with / between folders")
        if class_name not in CLASSES:
            raise wrong(line, f"unknown class {class_name!r}; known: {', '.join(CLASSES)}")
        if label != str(CLASSES.index(class_name)) or len(folders) < 2 or folders[-2] != class_name:
            raise wrong(line, f"the label {label!r}, the class {class_name} and the folder of {file} disagree")
        if file != canonical_file(task, patch_of(file)):
            raise wrong(line, f"{file} is not of the form {canonical_file(task, f'{class_name}/{class_name}_1')}")
        if file in seen:
            raise wrong(line, f"{file} is listed twice")
        seen.add(file)
        files.append(file)
        labels[line - 2] = int(label)
    return Split(files, labels)


def read_splits(folder: Path, task: str) -> dict[str, Split]:
    """Read all three lists of a task's folder, {part: split}, and hold them to be disjoint.

    Raises:
        UserError: as `read_split`, or a patch is in two lists.
    """
    splits = {part: read_split(folder, task, part) for part in PARTS}
    part_of: dict[str, str] = {}
    for part, split in splits.items():
        for file in split.files:
            other = part_of.setdefault(file, part)
            if other != part:
                raise UserError(f"{file} is in {part}.csv and in {other}.csv of {shown(folder)}; run: {REMAKE}")
    return splits


def splits_hash(splits: dict[str, Split]) -> str:
    """SHA-256 of the three lists of a task, whatever their line ends: says which split a model rests on."""
    return sha256(*(split_text(splits[part]).encode() for part in PARTS))

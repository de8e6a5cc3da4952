"""Lists of images: made, written, read.

A *patch* is a piece of land, "Forest/Forest_1": Forest_1.jpg in the RGB set, Forest_1.tif in the multispectral set.

The pool of a patch (train, val or test) depends only on its name and the split's seed. The names of each class in the
complete EuroSAT are sorted by a hash of seed and name and cut 60 / 20 / 20 %, whichever files are at hand. So everyone has
every patch in the same pool, also with one image set, with half of it, or with the second set unpacked a week later.

Some patches show the same ground: 639 pairs share at least 2 % of their area. If the two patches of a pair are in different
pools, the one in the earlier pool (train before val before test) is left out. So no two lists show the same ground.

patches.csv: the 27,000 names; longitude and latitude of the centre (WGS 84, five decimals: 1 m), from the tags of the
multispectral files; the part of each in the two published splits, "published" at random (Neumann et al., 2019) and
"spatial" by longitude. Both are torchgeo's lists, whose MD5s were checked. Of the random test list only a copy in another
order was found; it equals what the other two lists leave of the 27,000 names.
overlaps.csv: pairs of patches whose squares of 640 m share at least 2 % of their area, and the share, computed from these
positions, with both squares in the UTM zone of the first.
"""

import csv
import functools
import itertools
from collections.abc import Iterable
from pathlib import Path

from base.errors import UserError
from base.files import csv_text, read_csv, read_json, reading, sha256
from base.project import CLASSES, PARTS, Task, display_path

import numpy as np

from dataset import Split, canonical_file, class_of, patch_of

PUBLISHED_PROFILES = ("published", "spatial")
LIST_HEADER = ("file", "label", "class_name")
REMEDY = "run: python split_data.py --overwrite"


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


def complete_counts() -> dict[str, int]:
    """Images per class of the complete EuroSAT."""
    return {name: len(patches) for name, patches in group_by_class(complete_patches()).items()}


def group_by_class(patches: Iterable[str]) -> dict[str, list[str]]:
    """{class: its patches, in the order given}."""
    groups: dict[str, list[str]] = {name: [] for name in CLASSES}
    for patch in patches:
        groups[class_of(patch)].append(patch)
    return groups


def make_pools(patches: Iterable[str], seed: int) -> dict[str, list[str]]:
    """Cut the patches of each class 60 / 20 / 20 % in a seeded order: {part: patches}, in that order.

    The order is that of SHA-256 of seed and name, which no version of a library can change. Patches that show ground of a
    later part are left out.
    """
    pools: dict[str, list[str]] = {part: [] for part in PARTS}
    for class_patches in group_by_class(patches).values():
        ordered = sorted(class_patches, key=lambda patch: sha256(f"{seed} {patch}".encode()))
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
    return {part: [patch for patch in pool if patch not in leaving] for part, pool in pools.items()}


def class_shares(size: int, counts: dict[str, int]) -> dict[str, int]:
    """Divide `size` images in proportion to the classes' counts, by the largest remainder: {class: images}."""
    total = sum(counts.values())
    shares = {name: size * count // total for name, count in counts.items()}
    remainders = {name: size * count % total for name, count in counts.items()}
    for name in sorted(remainders, key=lambda name: -remainders[name])[: size - sum(shares.values())]:
        shares[name] += 1
    return shares


def make_split(task: Task, patches: Iterable[str]) -> Split:
    """The patches as a list names them, sorted by file."""
    files = sorted(canonical_file(task, patch) for patch in patches)
    return Split(files, np.array([CLASSES.index(class_of(patch_of(file))) for file in files], np.int64))


def split_csv(split: Split) -> str:
    """A list as its file holds it."""
    rows = [(file, label, CLASSES[label]) for file, label in zip(split.files, split.labels, strict=True)]
    return csv_text(LIST_HEADER, rows)


def split_path(folder: Path, part: str) -> Path:
    return folder / f"{part}.csv"


def record_path(folder: Path) -> Path:
    """split.json: what the lists of a task were made from."""
    return folder / "split.json"


RECORD_KINDS = {
    **{"profile": str, "seed": int | None, "sizes": list, "smaller_than_asked_for": bool},
    **{"images_at_hand": dict | None, "lists_sha256": str},
}


def read_record(folder: Path) -> dict:
    """split.json of a task, as `split_data.py` writes it; a UserError says that it is missing or damaged."""
    with reading(record_path(folder), f"bring it back, or {REMEDY}"):
        record = read_json(record_path(folder))
        for key, kind in RECORD_KINDS.items():
            if not isinstance(record[key], kind):
                raise TypeError(f"{key} is {record[key]!r:.40}")
    return record


def read_split(folder: Path, task: Task, part: str) -> Split:
    """Read and check one list."""
    return parse_split(split_path(folder, part), task, REMEDY)


def parse_split(path: Path, task: Task, remedy: str) -> Split:
    """Read a list. Each line must be what its file gives; a UserError names the first that is not."""
    if not path.exists():
        raise UserError(f"the list {display_path(path)} is missing; {remedy.removesuffix(' --overwrite')}")
    with reading(path, remedy):
        rows = read_csv(path)
        if not rows or tuple(rows[0]) != LIST_HEADER:
            raise ValueError(f"it needs the header {','.join(LIST_HEADER)} and at least one image")
        lines: dict[str, int] = {}
        for line, row in enumerate(rows, start=2):
            patch = patch_of(row["file"])
            name = class_of(patch)
            expected = [canonical_file(task, patch), str(CLASSES.index(name)) if name in CLASSES else "", name]
            if list(row.values()) != expected or not row["file"].isprintable():
                form = f"{canonical_file(task, 'Forest/Forest_1')},1,Forest"
                raise ValueError(f"line {line} is {list(row.values())}, not of the form {form}")
            if row["file"] in lines:
                raise ValueError(f"line {line} repeats line {lines[row['file']]}, {row['file']}")
            lines[row["file"]] = line
    return Split(list(lines), np.array([int(row["label"]) for row in rows], np.int64))


def read_splits(folder: Path, task: Task) -> dict[str, Split]:
    """Read the three lists of a task, {part: split}; a UserError names a file that is in two of them."""
    splits = {part: read_split(folder, task, part) for part in PARTS}
    for first, second in itertools.combinations(PARTS, 2):
        if both := set(splits[first].files) & set(splits[second].files):
            raise UserError(f"{min(both)} is in {first}.csv and in {second}.csv of {display_path(folder)}; {REMEDY}")
    return splits


def splits_hash(splits: dict[str, Split]) -> str:
    """SHA-256 of the three lists of a task, whatever their line ends: identifies the split that a model rests on."""
    return sha256(*(split_csv(splits[part]).encode() for part in PARTS))

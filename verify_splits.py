"""Task 1: check the lists. One line for each check, with what it looked at; exit status 0 if all pass, 1 if not.

Disjoint by file, by patch, by content and on the ground, within a task, across both image sets and across the profiles
course and full; every patch in the pool that its name and the seed give; complete, well-formed, stratified; every file
there and an image.

reads   splits/, and the images below DATASET_ROOT
writes  nothing
"""

import itertools
import os
from collections import Counter, defaultdict
from concurrent.futures import ThreadPoolExecutor

from dataset import CLASSES, IMAGE_SETS, Split, decode_image, image_paths
from engine.splits import (
    PUBLISHED_PROFILES,
    by_class,
    class_shares,
    complete_counts,
    complete_patches,
    make_pools,
    overlapping_pairs,
    read_record,
    read_split,
    split_path,
    splits_hash,
)
from project import PARTS, TASKS, UserError, config, run, sha256, shown, splits_dir

Lists = dict[str, dict[str, Split]]  # {task: {part: split}}
Named = tuple[str, str, Split]  # profile/task, part, split
DISJOINT_PROFILES = ("course", "full")  # drawn from the same pools
KIND = {"published": "random", "spatial": "spatial"}
# SHA-256 of the names of each part of the published splits, sorted, a line each. The MD5s that torchgeo states are of the
# same names in the lists' own order; both were taken from the same files.
PUBLISHED_SHA256 = {
    ("published", "train"): "529599d11c82715ce405e88d1d046f83b7dfa7600ddd13d1e5f5e006b0e7f7ec",
    ("published", "val"): "d5de5495d66134375eba0a2663bfab4f6556a12f449e759348819395eebe2579",
    ("published", "test"): "174249f949747aca45c95aeafe6aa0dcefe6c9d32a4f0cb3eef9774528440653",
    ("spatial", "train"): "c45c1021f012e6dc57e8667d55488da1d6f48e22d92d247541fdee14bb54c5b4",
    ("spatial", "val"): "bbf84b6948062b77ce1e8a5aecd9048989ad28d68fadf47498039ab47a122d6d",
    ("spatial", "test"): "8aa46187620798d2ca5e78ce766ca12e78053f068a96658bf8694cca74158762",
}


class Checks:
    """Prints and counts checks."""

    def __init__(self) -> None:
        self.passed = self.failed = 0

    def report(self, what: str, problem: str = "") -> None:
        """One check: passed where there is no problem."""
        if problem:
            self.failed += 1
            print(f"FAIL  {what}: {problem}")
        else:
            self.passed += 1
            print(f"ok    {what}")


def main() -> int:
    checks = Checks()
    lists, records = read_lists(checks)
    others = lists_of_the_other_profile(checks)
    check_disjoint(checks, lists, others)
    check_ground(checks, lists, others)
    check_origin(checks, lists, records)
    check_sizes(checks, lists, records)
    check_images(checks, lists)
    if checks.failed:
        print(f"{checks.failed} of {checks.failed + checks.passed} checks failed in {shown(splits_dir('rgb').parent)}")
        return 1
    print(f"all {checks.passed} checks passed; nothing was written")
    print("next: python train_rgb.py")
    return 0


def read_lists(checks: Checks) -> tuple[Lists, dict[str, dict]]:
    """Read all lists that are there, and their records; a list that is wrong fails and is left out of the other checks."""
    lists: Lists = {}
    records = {}
    for task in TASKS:
        if not any(split_path(splits_dir(task), part).exists() for part in PARTS):
            if config.profile not in PUBLISHED_PROFILES or task == "rgb":
                print(f"note  no lists in {shown(splits_dir(task))}: nothing of {task} is checked")
            continue
        lists[task] = {}
        for part in PARTS:
            try:
                lists[task][part] = read_split(splits_dir(task), task, part)
                count = len(lists[task][part].files)
                checks.report(f"{task}/{part}.csv: {count:,} lines; header, paths and labels are right, no file twice")
            except UserError as error:
                checks.report(f"{task}/{part}.csv is well-formed", str(error))
        try:
            records[task] = read_record(splits_dir(task))
        except UserError as error:
            checks.report(f"{task}/split.json says what the lists were made from", str(error))
    if not lists:
        raise UserError(f"no lists in {shown(splits_dir('rgb').parent)}; run: python split_data.py")
    return lists, records


# Disjoint --------------------------------------------------------------------------------------------------------


def check_disjoint(checks: Checks, lists: Lists, others: list[Named]) -> None:
    for task, parts in lists.items():
        for a, b in itertools.combinations(parts, 2):
            common = sorted(set(parts[a].files) & set(parts[b].files))
            checks.report(
                f"{task}: {a} and {b} share no file ({len(parts[a].files):,} and {len(parts[b].files):,} compared)",
                f"{len(common)} are in both, for example {common[0]}" if common else "",
            )
    part_of, crossings, problem = {}, 0, ""
    everywhere = [*_named(lists), *others]
    for where, part, split in everywhere:
        for patch in split.patches:
            other_where, other = part_of.setdefault(patch, (where, part))
            crossings += other_where != where
            if other != part:
                problem = problem or f"{patch} is in {part} of {where} and in {other} of {other_where}"
    if crossings:
        names = ", ".join(dict.fromkeys(where for where, *_ in everywhere))
        checks.report(
            f"across image sets and profiles ({names}) a patch is in the same part ({crossings:,} meetings)", problem
        )


def _named(lists: Lists) -> list[Named]:
    return [(f"{config.profile}/{task}", part, split) for task in lists for part, split in lists[task].items()]


def lists_of_the_other_profile(checks: Checks) -> list[Named]:
    """Those of the profile that is drawn from the same pools, where it has any; a list that is wrong fails."""
    found = []
    others = set(DISJOINT_PROFILES) - {config.profile} if config.profile in DISJOINT_PROFILES else set()
    for profile, task, part in itertools.product(others, TASKS, PARTS):
        if split_path(splits_dir(task, profile), part).exists():
            try:
                found.append((f"{profile}/{task}", part, read_split(splits_dir(task, profile), task, part)))
            except UserError as error:
                checks.report(f"{profile}/{task}/{part}.csv is well-formed", str(error))
    return found


def check_ground(checks: Checks, lists: Lists, others: list[Named]) -> None:
    """No two parts show the same ground; of the published random split, which was drawn without knowing, it is counted."""
    part_of = {patch: part for _, part, split in [*_named(lists), *others] for patch in split.patches}
    pairs = overlapping_pairs()
    crossing = [(a, b) for a, b in pairs if a in part_of and b in part_of and part_of[a] != part_of[b]]
    kinds = Counter(" and ".join(sorted({part_of[a], part_of[b]}, key=PARTS.index)) for a, b in crossing)
    counts = ", ".join(f"{count} across {kind}" for kind, count in sorted(kinds.items()))
    if config.profile == "published":
        print(
            f"note  of {len(pairs)} pairs of patches on the same ground {len(crossing)} lie in different parts: {counts}"
        )
        return
    what = (
        f"no two parts show the same ground ({len(pairs)} overlapping pairs looked up among {len(part_of):,} patches)"
    )
    problem = f"{counts}, for example {' and '.join(crossing[0])}" if crossing else ""
    checks.report(what, problem)


# Where the lists come from, complete and stratified --------------------------------------------------------------


def check_origin(checks: Checks, lists: Lists, records: dict[str, dict]) -> None:
    """Lists as they were made; drawn ones from the pools that names and seed give, published ones as published."""
    for task, record in records.items():
        if len(lists[task]) == len(PARTS):
            same = record["lists_sha256"] == splits_hash(lists[task])
            checks.report(
                f"{task}: the lists are those that split_data.py wrote (SHA-256 in split.json)",
                "" if same else "they were changed since",
            )
    if config.profile in PUBLISHED_PROFILES:
        for part, split in lists["rgb"].items():
            names = "".join(f"{patch}\n" for patch in sorted(split.patches)).encode()
            same = sha256(names) == PUBLISHED_SHA256[config.profile, part]
            what = f"rgb: {part} has the {len(split.files):,} names of torchgeo's {KIND[config.profile]} split"
            checks.report(what, "" if same else "other names")
        return
    listed = [patch for parts in lists.values() for split in parts.values() for patch in split.patches]
    everything = sorted(set(listed)) if config.profile == "demo" else complete_patches()
    for task, record in records.items():
        seed = record["seed"]
        if seed != config.split_seed:
            print(
                f"note  the {task} lists were made with the seed {seed}; SPLIT_SEED in config.py is {config.split_seed}"
            )
        pool_of = {patch: part for part, patches in make_pools(everything, seed).items() for patch in patches}
        for part, split in lists[task].items():
            wrong = [patch for patch in split.patches if pool_of.get(patch) != part]
            checks.report(
                f"{task}: each of the {len(split.files):,} patches of {part} is in the pool that its name and the seed "
                f"{seed} give",
                f"{len(wrong)} are not, for example {wrong[0]}" if wrong else "",
            )


def check_sizes(checks: Checks, lists: Lists, records: dict[str, dict]) -> None:
    """Sizes as asked for, every class in every part, and each class's share where the image set was complete."""
    sizes = config.course_sizes if config.profile == "course" else (1, 1, 1)
    for task, record in records.items():
        complete = record["images_at_hand"] == complete_counts()
        if not complete and config.profile in DISJOINT_PROFILES:
            print(
                f"note  {task}: made of {sum(record['images_at_hand'].values()):,} images: class shares are not checked"
            )
        for part, size in zip(PARTS, sizes, strict=True):
            if part not in lists[task]:
                continue
            split = lists[task][part]
            counts = {name: len(own) for name, own in by_class(split.patches).items()}
            if record["smaller_than_asked_for"]:
                print(f"note  {task}: {part} has {len(split.files):,} images, all there were ({size:,} asked for)")
            else:
                few = f"it has {len(split.files):,}" if len(split.files) < size else ""
                checks.report(f"{task}: {part} has {len(split.files):,} images, at least {size:,}", few)
            absent = [name for name in CLASSES if not counts[name]]
            checks.report(
                f"{task}: all {len(CLASSES)} classes are in {part}, {min(counts.values())} to {max(counts.values())} images",
                f"no {', '.join(absent)}" if absent else "",
            )
            if complete and config.profile == "course":
                shares = class_shares(len(split.files), complete_counts())
                wrong = [
                    f"{name} has {counts[name]}, not {shares[name]}" for name in CLASSES if counts[name] != shares[name]
                ]
                checks.report(f"{task}: {part} has each class's share of EuroSAT, to the image", "; ".join(wrong))


# The images ------------------------------------------------------------------------------------------------------


def check_images(checks: Checks, lists: Lists) -> None:
    """Every file is there and an image; no two files of different parts are the same, byte for byte."""
    for task, parts in lists.items():
        part_of = {file: part for part, split in parts.items() for file in split.files}
        kind = IMAGE_SETS[task].name
        what = f"{task}: all {len(part_of):,} files are below {config.dataset_root} and are {kind} images of 64 x 64 pixels"
        try:
            paths = image_paths(config.dataset_root, task, list(part_of))
        except UserError as error:
            checks.report(what, str(error))
            continue
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            results = list(pool.map(_digest_or_problem, paths, itertools.repeat(task)))
        problems = [problem for _, problem in results if problem]
        checks.report(what, f"{len(problems)} are not, for example {problems[0]}" if problems else "")
        same = defaultdict(list)
        for file, (digest, _) in zip(part_of, results, strict=True):
            same[digest].append(file)
        twice = [files for files in same.values() if len({part_of[file] for file in files}) > 1]
        checks.report(
            f"{task}: no file of one part is, byte for byte, one of another ({len(same):,} different files)",
            f"{len(twice)} are, for example {' and '.join(twice[0])}" if twice else "",
        )


def _digest_or_problem(path: str, task: str) -> tuple[str, str]:
    """SHA-256 of a file, and what is wrong with its image, if anything."""
    try:
        with open(path, "rb") as file:
            content = file.read()
        decode_image(content, task, path)
        return sha256(content), ""
    except UserError as error:
        return path, str(error)
    except OSError as error:
        return path, f"cannot read {path}: {error.strerror}"


if __name__ == "__main__":
    run(main, __doc__)

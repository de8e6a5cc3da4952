"""Task 1: check the lists. One line for each check; exit status 0 if all pass, 1 if not.

Disjoint by file and by patch, within a task, across both image sets and across the profiles course and full; complete,
well-formed, stratified; every file there and an image; and the lists are what the seed gives.

reads   splits/, and the images below DATASET_ROOT
writes  nothing
"""

import itertools
import json
import os
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import config
from dataset import CLASSES, IMAGE_SETS, Split, find_images, patch_of, read_image, read_split, split_path
from project import PARTS, TASKS, UserError, run, shown, splits_dir
from split_data import FRACTIONS, make_lists, make_record, record_path

Lists = dict[str, dict[str, Split]]  # {task: {part: split}}
DISJOINT_PROFILES = ("course", "full")  # of the same data set; the demo's images are others


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
    lists = read_lists(checks)
    check_disjoint(checks, lists)
    check_sizes(checks, lists)
    check_proportions(checks, lists)
    check_images(checks, lists)
    check_seed(checks, lists)
    if checks.failed:
        print(f"{checks.failed} of {checks.failed + checks.passed} checks failed in {shown(splits_dir())}")
        return 1
    print(f"all {checks.passed} checks passed; nothing was written")
    print("next: python train_rgb.py")
    return 0


def read_lists(checks: Checks) -> Lists:
    """Read all lists that are there; a list that is wrong fails and is left out of the other checks."""
    lists: Lists = {}
    for task in TASKS:
        paths = {part: split_path(task, part) for part in PARTS}
        if not any(path.exists() for path in paths.values()):
            continue
        lists[task] = {}
        for part in PARTS:
            what = f"{task}/{part}.csv: header, paths and labels are right, no file twice"
            try:
                lists[task][part] = read_split(task, part)
                checks.report(what)
            except UserError as error:
                checks.report(what, str(error))
    if not lists:
        raise UserError(f"no lists in {shown(splits_dir())}; run: python split_data.py")
    return lists


# Disjoint --------------------------------------------------------------------------------------------------------


def check_disjoint(checks: Checks, lists: Lists) -> None:
    for task, parts in lists.items():
        for a, b in itertools.combinations(parts, 2):
            checks.report(f"{task}: {a} and {b} share no file", _shared(parts[a].files, parts[b].files))
            checks.report(f"{task}: {a} and {b} share no patch", _shared(_patches(parts[a]), _patches(parts[b])))
    everywhere = [(config.PROFILE, task, part, split) for task, parts in lists.items() for part, split in parts.items()]
    everywhere += _lists_of_the_other_profile()
    problem = ""
    crossings = 0
    for (profile_a, task_a, a, split_a), (profile_b, task_b, b, split_b) in itertools.combinations(everywhere, 2):
        if a != b and (profile_a, task_a) != (profile_b, task_b):
            crossings += 1
            if shared := _shared(_patches(split_a), _patches(split_b)):
                problem = problem or f"{profile_a}/{task_a}/{a} and {profile_b}/{task_b}/{b}: {shared}"
    if crossings:
        profiles = " and ".join(sorted({profile for profile, *_ in everywhere}))
        checks.report(f"across image sets and profiles ({profiles}), different parts share no patch", problem)


def _lists_of_the_other_profile() -> list[tuple[str, str, str, Split]]:
    others = set(DISJOINT_PROFILES) - {config.PROFILE} if config.PROFILE in DISJOINT_PROFILES else set()
    return [
        (profile, task, part, read_split(task, part, profile))
        for profile in others
        for task in TASKS
        for part in PARTS
        if split_path(task, part, profile).exists()
    ]


def _patches(split: Split) -> list[str]:
    return [patch_of(file) for file in split.files]


def _shared(a: list[str], b: list[str]) -> str:
    common = sorted(set(a) & set(b))
    return f"{len(common)} in both, for example {common[0]}" if common else ""


# Complete and stratified -----------------------------------------------------------------------------------------


def check_sizes(checks: Checks, lists: Lists) -> None:
    wanted = config.SPLIT_SIZES[config.PROFILE] or (1, 1, 1)
    for task, parts in lists.items():
        for part, size in zip(PARTS, wanted, strict=True):
            if part not in parts:
                continue
            count = len(parts[part].files)
            if count < size and config.ALLOW_SMALLER_SPLITS:
                print(f"note  {task}: {part} has {count} images, fewer than {size}: ALLOW_SMALLER_SPLITS is set")
                continue
            checks.report(f"{task}: {part} has at least {size} images", f"it has {count}" if count < size else "")


def check_proportions(checks: Checks, lists: Lists) -> None:
    """Every class in every part; pools against the fractions, and each list against its pool, to one image."""
    try:
        record = json.loads(record_path().read_text())
        images = {task: record["image_sets"][task]["images"] for task in lists}
    except (OSError, ValueError, KeyError, TypeError):
        checks.report("split.json says what the lists were made from", "it is missing or damaged")
        return
    for task, parts in lists.items():
        for part, split in parts.items():
            counts = Counter(int(label) for label in split.labels)
            absent = [name for label, name in enumerate(CLASSES) if not counts[label]]
            checks.report(f"{task}: every class is in {part}", f"no {', '.join(absent)}" if absent else "")
            total = sum(images[task].values())
            problem = ""
            for label, name in enumerate(CLASSES):
                target = len(split.files) * images[task][name] / total
                # A pool is its share of the class rounded to whole images; drawing from it rounds once more.
                drawn = len(split.files) / (FRACTIONS[part] * total)
                if abs(counts[label] - target) > (1 + drawn if drawn < 0.99 else 1):
                    problem = f"{name} has {counts[label]} images where {target:.1f} are its share"
            checks.report(f"{task}: {part} has each class's share of images", problem)


# The images and the seed -----------------------------------------------------------------------------------------


def check_images(checks: Checks, lists: Lists) -> None:
    def problem_of(file: str, task: str) -> str:
        try:
            read_image(file, task)
            return ""
        except UserError as error:
            return str(error)

    for task, parts in lists.items():
        files = [file for split in parts.values() for file in split.files]
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            problems = [problem for problem in pool.map(problem_of, files, itertools.repeat(task)) if problem]
        kind = IMAGE_SETS[task].name
        what = (
            f"{task}: all {len(files):,} files are below {config.DATASET_ROOT} and are {kind} images of 64 x 64 pixels"
        )
        checks.report(what, f"{len(problems)} are not, for example {problems[0]}" if problems else "")


def check_seed(checks: Checks, lists: Lists) -> None:
    """Split again and compare, where the files at hand are those that the lists were made from."""
    try:
        record = json.loads(record_path().read_text())
        found = {task: images for task in TASKS if (images := find_images(task)) is not None}
        seed = record["seed"]
        same_files = make_record(found, seed) == record
    except (OSError, ValueError, KeyError, TypeError):
        return  # reported as missing above
    except UserError as error:
        print(f"note  the lists cannot be compared with what the seed gives: {error}")
        return
    if seed != config.SEED:
        print(f"note  the lists were made with the seed {seed}; the SEED in config.py is {config.SEED}")
    if not same_files:
        print("note  the data set at hand holds other files than the lists were made from: not split again to compare")
        return
    again = make_lists(found, seed, config.SPLIT_SIZES[config.PROFILE], allow_smaller=True)
    for task, parts in lists.items():
        differ = [part for part in parts if parts[part].text() != again[task, part].text()]
        checks.report(
            f"{task}: the lists are what the seed {seed} gives", f"{', '.join(differ)} differ" if differ else ""
        )


if __name__ == "__main__":
    run(main, __doc__)

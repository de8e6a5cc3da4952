"""Task 1: check the lists. One line per check, with what it looked at; exit status 0 if all pass, 1 if not.

Disjoint by file, by patch, by content and on the ground, within a task and across both image sets. Every patch is in the pool
that its name and the seed give, so this also holds across the profiles course and full. The lists are complete, well-formed
and stratified; every file exists and is an image.

reads   splits/, and the images below DATASET_ROOT
writes  nothing
"""

import itertools
from collections import Counter, defaultdict
from pathlib import Path

from base.command_line import run
from base.errors import UserError
from base.files import sha256
from base.project import CLASSES, PARTS, TASKS, Task, config, display_path

from tqdm import tqdm

from dataset import Split, image_paths, read_image
from engine import splits

Lists = dict[Task, dict[str, Split]]  # {task: {part: split}}
PUBLISHED_SIZES = (16_200, 5_400, 5_400)
outcomes: list[bool] = []  # of the checks so far


def main() -> int:
    outcomes.clear()
    try:
        lists = read_lists()
        records = {task: splits.read_record(task.splits) for task in lists}
    except UserError as error:
        print(f"FAIL  {error}")
        return 1
    if not lists:
        raise UserError(f"no lists in {display_path(TASKS['rgb'].splits.parent)}; run: python split_data.py")
    check_disjoint(lists)
    check_ground(lists)
    check_origin(lists, records)
    check_sizes(lists, records)
    check_images(lists)
    if not all(outcomes):
        print(f"{outcomes.count(False)} of {len(outcomes)} checks failed for the profile {config.profile}")
        return 1
    print(f"all {len(outcomes)} checks passed; nothing was written\nnext: python train_rgb.py")
    return 0


def check(what: str, problem: str = "") -> None:
    """Print one check. It passed if there is no problem."""
    outcomes.append(not problem)
    print(f"FAIL  {what}: {problem}" if problem else f"ok    {what}")


def some(items: list, what: str) -> str:
    """ "3 …, for example …"; empty without items."""
    return f"{len(items):,} {what}, for example {items[0]}" if items else ""


def read_lists() -> Lists:
    """The lists of each task that has any; a UserError names a damaged one."""
    lists: Lists = {}
    for task in TASKS.values():
        if any(splits.split_path(task.splits, part).exists() for part in PARTS):
            lists[task] = {part: splits.read_split(task.splits, task, part) for part in PARTS}
            sizes = ", ".join(f"{len(split.files):,}" for split in lists[task].values())
            check(f"{task.name}: lists of {sizes} lines; header, paths and labels are correct, no file twice")
        elif config.profile not in splits.PUBLISHED_PROFILES:
            print(f"note  no lists in {display_path(task.splits)}: nothing of {task.name} is checked")
    return lists


def check_disjoint(lists: Lists) -> None:
    for task, parts in lists.items():
        for a, b in itertools.combinations(PARTS, 2):
            common = sorted(set(parts[a].files) & set(parts[b].files))
            sizes = f"{len(parts[a].files):,} and {len(parts[b].files):,} compared"
            check(f"{task.name}: {a} and {b} share no file ({sizes})", some(common, "are in both"))
    if len(lists) > 1:
        parts_of = defaultdict(list)
        for part, split in ((part, split) for parts in lists.values() for part, split in parts.items()):
            for patch in split.patches:
                parts_of[patch].append(part)
        both = [patch for patch, parts in parts_of.items() if len(parts) > 1]
        wrong = [f"{patch} ({' and '.join(parts_of[patch])})" for patch in both if len(set(parts_of[patch])) > 1]
        check(
            f"a patch is in the same part in both image sets ({len(both):,} patches are in both)",
            some(wrong, "are not"),
        )


def check_ground(lists: Lists) -> None:
    """No two parts show the same ground. In the published random split, drawn without this rule, pairs are counted."""
    part_of = {patch: part for parts in lists.values() for part, split in parts.items() for patch in split.patches}
    pairs = [pair for pair in splits.overlapping_pairs() if part_of.keys() >= set(pair)]
    crossing = [f"{a} and {b}" for a, b in pairs if part_of[a] != part_of[b]]
    kinds = Counter(" and ".join(sorted({part_of[a], part_of[b]}, key=PARTS.index)) for a, b in pairs)
    counts = ", ".join(f"{count} across {kind}" for kind, count in sorted(kinds.items()) if " and " in kind)
    if config.profile == "published":
        print(f"note  {len(crossing)} of {len(pairs)} pairs on the same ground are in different parts: {counts}")
    else:
        what = f"no two parts show the same ground ({len(pairs)} overlapping pairs among {len(part_of):,} patches)"
        check(what, some(crossing, f"pairs do: {counts}"))


def check_origin(lists: Lists, records: dict[Task, dict]) -> None:
    """Lists as they were made, for this profile: drawn from the pools that names and seed give, or as published."""
    for task, parts in lists.items():
        record = records[task]
        as_made = [len(parts[part].files) for part in PARTS], splits.splits_hash(parts)
        changed = "" if (record["sizes"], record["lists_sha256"]) == as_made else "they were changed afterwards"
        check(f"{task.name}: the lists are those that split_data.py wrote (SHA-256 in split.json)", changed)
        other = "" if record["profile"] == config.profile else f"split.json names {record['profile']}"
        check(f"{task.name}: the lists were made for the profile {config.profile}", other)
        if config.profile in splits.PUBLISHED_PROFILES:
            pool_of = {patch: row[config.profile] for patch, row in splits.complete_patches().items()}
            origin = f"torchgeo's {'random' if config.profile == 'published' else 'spatial'} split gives"
        else:
            seed, origin = record["seed"], f"its name and the seed {record['seed']} give"
            if seed != config.split_seed:
                print(f"note  the {task.name} lists have the seed {seed}, config.py has SPLIT_SEED {config.split_seed}")
            listed = {patch for each in lists.values() for split in each.values() for patch in split.patches}
            pools = splits.make_pools(listed if config.profile == "demo" else splits.complete_patches(), seed)
            pool_of = {patch: part for part, patches in pools.items() for patch in patches}
        for part, split in parts.items():
            wrong = [patch for patch in split.patches if pool_of.get(patch) != part]
            what = f"{task.name}: each of the {len(split.files):,} patches of {part} is in the part that {origin}"
            check(what, some(wrong, "are not"))


def check_sizes(lists: Lists, records: dict[Task, dict]) -> None:
    """Sizes as asked for; every class in every part; the class shares of EuroSAT if the image set was complete."""
    sizes = {"course": config.course_sizes, "published": PUBLISHED_SIZES, "spatial": PUBLISHED_SIZES}
    for task, record in records.items():
        complete = record["images_at_hand"] == splits.complete_counts()
        asked = sizes.get(config.profile, (1, 1, 1))
        if complete and config.profile == "full":
            pools = splits.make_pools(splits.complete_patches(), record["seed"])
            asked = [len(pools[part]) for part in PARTS]
        for part, size in zip(PARTS, asked, strict=True):
            patches = lists[task][part].patches
            counts = {name: len(of_class) for name, of_class in splits.group_by_class(patches).items()}
            if record["smaller_than_asked_for"]:
                print(f"note  {task.name}: {part} has {len(patches):,} images, all at hand ({size:,} asked for)")
            else:
                few = f"it has {len(patches):,}" if len(patches) < size else ""
                check(f"{task.name}: {part} has {len(patches):,} images, at least {size:,}", few)
            absent = ", ".join(name for name in CLASSES if not counts[name])
            span = f"{min(counts.values())} to {max(counts.values())} images"
            check(f"{task.name}: all {len(CLASSES)} classes are in {part}, {span}", f"no {absent}" if absent else "")
            if complete and config.profile == "course":
                shares = splits.class_shares(len(patches), splits.complete_counts())
                wrong = [
                    f"{name} has {counts[name]}, not {share}" for name, share in shares.items() if counts[name] != share
                ]
                check(f"{task.name}: {part} has each class's share of EuroSAT, to the image", "; ".join(wrong))


def check_images(lists: Lists) -> None:
    """Every file exists and is an image; no two files of different parts are byte-identical."""
    for task, parts in lists.items():
        part_of = {file: part for part, split in parts.items() for file in split.files}
        what = f"{task.name}: all {len(part_of):,} files are below {config.dataset_root} and are {task.title} images"
        same, problems = defaultdict(list), []  # {SHA-256: files}
        try:
            paths = image_paths(config.dataset_root, task, list(part_of))
        except UserError as error:
            check(what, str(error))
            continue
        for file, path in zip(part_of, tqdm(paths, task.name, unit="image", disable=None, leave=False), strict=True):
            try:
                read_image(path, task)
                same[sha256(Path(path).read_bytes())].append(file)
            except UserError as error:
                problems.append(str(error))
        check(what, some(problems, "are not"))
        twice = [" and ".join(files) for files in same.values() if len({part_of[file] for file in files}) > 1]
        what = f"{task.name}: no file of one part is byte-identical to one of another ({len(same):,} different files)"
        check(what, some(twice, "are"))


if __name__ == "__main__":
    run(main, __doc__)

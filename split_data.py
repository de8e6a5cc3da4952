"""Task 1: write the train, val and test lists.

Each class is split separately. Its names are put in a seeded order once and cut 60 / 20 / 20 % into pools; the lists of
`course` and `full` take the first names of each class from these pools. Patches that show the ground of another part are
left out. The same seed gives the same lists on every machine, and a patch is in the same part in both image sets and in
both profiles. `published` and `spatial` are the lists that papers use, unchanged. (`make_pools` in engine/splits.py cuts
the pools; verify_splits.py calls it again to check.)

reads   the names of the files below DATASET_ROOT (no image is opened, moved or changed)
writes  splits/<profile>/<rgb|ms>/{train,val,test}.csv and split.json beside them
"""

from collections.abc import Collection

from base.command_line import run
from base.errors import UserError
from base.files import write_json, write_text
from base.project import CLASSES, PARTS, RGB, TASKS, Task, config, display_path

from dataset import Split, find_images
from engine import splits

OVERWRITE = "to replace the lists (the old ones are kept): python split_data.py --overwrite"


def main(overwrite: bool) -> None:
    present = find_patches()
    tasks = [RGB] if config.profile in splits.PUBLISHED_PROFILES else [TASKS[name] for name in present]
    # Everything is drawn and compared before anything is written.
    draws = {task: draw_lists(task, present, allowed_smaller(task, overwrite)) for task in tasks}
    outcomes = {task: "" if overwrite else compare_with_disk(task, draws[task], present) for task in tasks}
    for task, outcome in outcomes.items():
        if not outcome:
            write_lists(task, draws[task], present)
        sizes = splits.read_record(task.splits)["sizes"]
        told = " / ".join(f"{size:,}" for size in sizes)
        print(f"{outcome or 'wrote'} {display_path(task.splits)}/{{train,val,test}}.csv: {told} images")
    print("next: python verify_splits.py")


def find_patches() -> dict[str, dict[str, str]]:
    """{task: {patch: file}} of the image sets at hand. Says what is not used of them; a UserError if there is none."""
    root = config.dataset_root
    present = {}
    for name, task in TASKS.items():
        images = find_images(root, task)
        if images is None:
            print(f"note: no {task.title} images below {root}: no lists for {name}")
            continue
        present[name] = images
        strangers = [] if config.profile == "demo" else sorted(set(images) - set(splits.complete_patches()))
        if strangers:
            told = f"{len(strangers):,} {task.title} names are none of EuroSAT's 27,000"
            print(f"note: {told} (for example {images[strangers[0]]}): not used")
    if not present:
        layouts = sorted({layout for task in TASKS.values() for layout in task.layouts} - {"."})
        raise UserError(
            f"no EuroSAT images below {root} (looked in {', '.join(layouts)}); set DATASET_ROOT in config.py (or "
            "EUROSAT_DATASET_ROOT) to the unpacked archives, or run: python download.py"
        )
    return present


Draw = tuple[dict[str, Split], bool]  # lists, and whether they are smaller than asked for


def allowed_smaller(task: Task, overwrite: bool) -> bool:
    """Whether smaller lists are allowed: by config.py, or because those on disk were."""
    if config.allow_smaller_splits or overwrite or not splits.record_path(task.splits).exists():
        return config.allow_smaller_splits
    return splits.read_record(task.splits)["smaller_than_asked_for"]


def draw_lists(task: Task, present: dict[str, Collection[str]], allow_smaller: bool) -> Draw:
    """Draw the lists of a task in the profile of config.py; a UserError says that the image set is too small.

    Args:
        present: {task: patches at hand}.
        allow_smaller: take the whole pools if they are too small for the sizes asked for.
    """
    profile, title, chosen, too_few = config.profile, task.title, {}, []
    if profile in splits.PUBLISHED_PROFILES:  # names alone, unchanged
        for part in PARTS:
            names = [patch for patch, row in splits.complete_patches().items() if row[profile] == part]
            chosen[part] = splits.make_split(task, names)
        return chosen, False
    everything = set().union(*present.values()) if profile == "demo" else splits.complete_patches()
    pools = splits.make_pools(everything, config.split_seed)  # each class cut 60 / 20 / 20 % in its seeded order
    pools = {part: [patch for patch in pool if patch in present[task.name]] for part, pool in pools.items()}
    for part, size in zip(PARTS, config.course_sizes, strict=True):
        pool = splits.group_by_class(pools[part])
        shares = splits.class_shares(size, splits.complete_counts())
        if absent := [name for name in CLASSES if not pool[name]]:
            raise UserError(f"no {title} image of {', '.join(absent)} is left for {part}; unpack more images")
        too_few += [f"{len(pool[n])} {n} for {part}, not {shares[n]}" for n in CLASSES if len(pool[n]) < shares[n]]
        chosen[part] = [patch for name in CLASSES for patch in pool[name][: shares[name]]]
    if profile != "course":  # the whole pools
        return {part: splits.make_split(task, pools[part]) for part in PARTS}, False
    if too_few and not allow_smaller:
        asked = " / ".join(f"{size:,}" for size in config.course_sizes)
        raise UserError(
            f"the {title} set has {len(present[task.name]):,} images, too few for the {asked} of train / val / test (it has "
            f"{too_few[0]}); unpack the whole data set, or set ALLOW_SMALLER_SPLITS in config.py (or "
            "EUROSAT_ALLOW_SMALLER_SPLITS=1) to take what is there"
        )
    chosen = pools if too_few else chosen
    return {part: splits.make_split(task, chosen[part]) for part in PARTS}, bool(too_few)


def write_lists(task: Task, draw: Draw, present: dict[str, Collection[str]]) -> None:
    lists, smaller = draw
    drawn = config.profile not in splits.PUBLISHED_PROFILES
    at_hand = {name: len(patches) for name, patches in splits.group_by_class(present.get(task.name, ())).items()}
    record = {
        "profile": config.profile,
        "seed": config.split_seed if drawn else None,
        "sizes": [len(lists[part].files) for part in PARTS],
        "smaller_than_asked_for": smaller,
        "images_at_hand": at_hand if drawn else None,
        "lists_sha256": splits.splits_hash(lists),
    }
    for part in PARTS:
        write_text(splits.split_path(task.splits, part), splits.split_csv(lists[part]), backup=True)
    write_json(splits.record_path(task.splits), record, backup=True)


def compare_with_disk(task: Task, draw: Draw, present: dict[str, Collection[str]]) -> str:
    """Why the lists on disk stay: "unchanged", or more images are at hand. Empty if there are none.

    A UserError says in which other way they differ.
    """
    if not any(splits.split_path(task.splits, part).exists() for part in PARTS):
        return ""
    model = task.outputs / "final_model.pt"
    models = f"models that rest on them: {display_path(model) if model.exists() else 'none'}"
    try:
        lists, record = splits.read_splits(task.splits, task), splits.read_record(task.splits)
    except UserError as error:
        raise UserError(f"{error}; {models}") from error
    if splits.splits_hash(draw[0]) == splits.splits_hash(lists):
        return "unchanged"
    sizes, possible = record["sizes"], [len(draw[0][part].files) for part in PARTS]
    told, now = (" / ".join(f"{size:,}" for size in each) for each in (sizes, possible))
    absent = [p for split in lists.values() for p in split.patches if p not in present.get(task.name, ())]
    if record["lists_sha256"] != splits.splits_hash(lists):
        reason = "they were changed after they were made"
    elif record["seed"] != config.split_seed:
        reason = f"their seed is {record['seed']}, SPLIT_SEED in config.py is {config.split_seed}"
    elif absent:
        reason = f"{len(absent):,} of their images are not below {config.dataset_root}, for example {absent[0]}"
    elif config.profile == "course" and sizes != possible and not record["smaller_than_asked_for"]:
        reason = f"they have {told} images, config.py asks for {now}"
    else:
        return f"more images are at hand, for lists of {now} ({OVERWRITE}); kept"
    told = f"the {task.title} lists in {display_path(task.splits)} differ from those that would be made now"
    raise UserError(f"{told}: {reason}; {models}; {OVERWRITE}")


if __name__ == "__main__":
    run(main, __doc__, switch=("--overwrite", "replace lists that would change; the old ones are kept"))

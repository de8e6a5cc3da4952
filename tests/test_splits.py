"""Task 1: the lists are seeded, stratified, disjoint also on the ground, the same everywhere, and never replaced in silence."""

import csv
import hashlib
import json
import os
import shutil

import numpy as np
import pytest
from conftest import CODE, User, files_below, jpeg

from dataset import CLASSES, IMAGE_SETS, canonical_file, find_images, patch_of
from engine import splits
from engine.splits import (
    class_shares,
    complete_counts,
    complete_patches,
    make_pools,
    overlapping_pairs,
    read_split,
    read_splits,
    split_text,
    splits_hash,
)
from project import PARTS, TASKS, UserError, config, splits_dir
from split_data import draw_lists

SEED = 20190702


def empty_images(root, patches, layout: dict[str, str]):
    """Files without content: splitting opens none."""
    for task, folder in layout.items():
        for patch in patches:
            path = root / folder / f"{patch}{IMAGE_SETS[task].suffixes[0]}"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
    return root


@pytest.fixture(scope="session")
def complete(tmp_path_factory):
    """All 27,000 names of the RGB set."""
    return empty_images(tmp_path_factory.mktemp("complete"), complete_patches(), {"rgb": "EuroSAT_RGB"})


def lists_below(root) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in sorted((root / "splits").rglob("*.csv"))}


def pool_table(seed) -> dict[str, str]:
    return {patch: part for part, patches in make_pools(complete_patches(), seed).items() for patch in patches}


# Pools -----------------------------------------------------------------------------------------------------------


def test_the_complete_data_set_is_known():
    """Counts per class as in Helber et al., 2019."""
    counts = [3000, 3000, 3000, 2500, 2500, 2000, 2500, 3000, 2500, 3000]
    assert list(complete_counts().values()) == counts and len(complete_patches()) == 27_000
    assert set(complete_patches()) == {f"{c}/{c}_{n + 1}" for c, count in zip(CLASSES, counts) for n in range(count)}
    assert len(overlapping_pairs()) == 639 and all(set(pair) <= set(complete_patches()) for pair in overlapping_pairs())
    for profile in ("published", "spatial"):
        parts = [row[profile] for row in complete_patches().values()]
        assert [parts.count(part) for part in PARTS] == [16_200, 5_400, 5_400]


def test_pools_are_60_20_20_of_each_class_and_follow_the_seed():
    pools = make_pools([f"{c}/x{n}" for c in CLASSES for n in range(50)], seed=3)  # names that overlap nothing
    for name in CLASSES:
        own = [[patch for patch in pools[part] if patch.startswith(f"{name}/")] for part in PARTS]
        assert [len(patches) for patches in own] == [30, 10, 10] and len(set().union(*own)) == 50
    again = make_pools([f"{c}/x{n}" for c in CLASSES for n in reversed(range(50))], seed=3)
    assert again == pools and make_pools([f"{c}/x{n}" for c in CLASSES for n in range(50)], seed=4) != pools


def test_what_overlaps_a_later_part_has_left_and_nothing_else():
    everything = pool_table(SEED)
    left = set(complete_patches()) - set(everything)
    parts = dict.fromkeys(left, "left") | everything
    for a, b in overlapping_pairs():
        assert parts[a] == parts[b] or "left" in (parts[a], parts[b])
    overlapping = {patch for pair in overlapping_pairs() for patch in pair}
    assert left <= overlapping and len(left) < len(overlapping) / 2
    assert sum(part == "test" for part in parts.values()) == 5_400  # of a pair across parts the test patch stays


def test_shares_are_exact_and_a_smaller_list_lies_inside_a_larger_one():
    former, counts = dict.fromkeys(CLASSES, 0), complete_counts()
    for size in range(16_200):
        shares = class_shares(size, counts)
        assert sum(shares.values()) == size and all(shares[name] >= former[name] for name in CLASSES)
        assert all(abs(shares[name] - size * count / 27_000) < 1 for name, count in counts.items())
        former = shares


# Lists -----------------------------------------------------------------------------------------------------------


def test_names_alone_give_the_lists_that_were_handed_in(here, complete, tmp_path):
    """Whatever lies in the images, whichever layout they were unpacked in: the same bytes, three profiles."""
    for number, layout in enumerate(("EuroSAT_RGB", "2750", "eurosat/2750", "EuroSAT", ".")):
        root = tmp_path / f"links {number}"
        link = root if layout == "." else root / layout
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(complete / "EuroSAT_RGB")
        config.dataset_root, config.project_root = root, tmp_path / layout.replace("/", "_").replace(".", "root")
        for config.profile in ("course", "published", "spatial"):
            here.run("split_data.py")
            for part in PARTS:
                name = f"splits/{config.profile}/rgb/{part}.csv"
                assert (config.project_root / name).read_bytes() == (CODE / name).read_bytes(), (layout, name)


def test_half_of_the_files_and_one_set_give_the_same_pools():
    names, pools = list(complete_patches()), pool_table(SEED)
    for present in ({"rgb": names[::2]}, {"ms": names[1::3]}, {"rgb": names[::5], "ms": names}):
        present = {task: set(own) for task, own in present.items()}
        for task, own in present.items():
            lists, smaller = draw_lists(task, present, "full", SEED, None)
            for part in PARTS:
                assert lists[part].patches == sorted(patch for patch in own if pools.get(patch) == part)
            assert not smaller


def test_course_lies_inside_full_and_has_each_class_s_share():
    present = {"rgb": complete_patches()}
    full, _ = draw_lists("rgb", present, "full", SEED, None)
    course, _ = draw_lists("rgb", present, "course", SEED, (2500, 1000, 2000))
    for part, size in zip(PARTS, (2500, 1000, 2000), strict=True):
        assert len(course[part].files) == size and set(course[part].files) <= set(full[part].files)
        counts = dict(zip(CLASSES, np.bincount(course[part].labels).tolist(), strict=True))
        assert counts == class_shares(size, complete_counts())


def test_lists_name_the_canonical_place_from_the_root_on(here):
    here.run("split_data.py")
    lines = (config.project_root / "splits/demo/ms/train.csv").read_bytes().decode().split("\n")
    assert lines[0] == "file,label,class_name" and lines[-1] == ""
    file, label, name = lines[1].split(",")
    assert file.startswith("EuroSAT_MS/AnnualCrop/AnnualCrop_") and (label, name) == ("0", "AnnualCrop")
    assert lines[1:-1] == sorted(lines[1:-1])


def test_the_same_bytes_wherever_the_folders_lie_and_others_for_another_seed(user, own_sample, tmp_path):
    user.run("split_data.py")
    other = User(tmp_path / "elsewhere", own_sample)
    other.run("split_data.py", TEST_CONFIG="config.seed = 8")  # the seed of training changes no list
    assert lists_below(user.root) == lists_below(other.root)
    other.run("split_data.py", "--overwrite", TEST_CONFIG="config.split_seed = 8")
    assert lists_below(user.root)["splits/demo/rgb/train.csv"] != lists_below(other.root)["splits/demo/rgb/train.csv"]


def test_a_team_changes_no_list(here, complete):
    """Filling in names is what everyone does first."""
    shutil.copytree(CODE / "splits", config.project_root / "splits")
    config.dataset_root, config.profile = complete, "course"
    config.team, config.seed = [("Ada Lovelace", 3141592)], 3141592
    assert "unchanged splits/course/rgb" in here.run("split_data.py")
    assert not os.system(f"diff -r '{CODE}/splits' '{config.project_root}/splits'")


# The sample ------------------------------------------------------------------------------------------------------


def test_the_sample_is_what_its_note_says():
    """From the train pool, so in no val or test list; none that overlaps; 40 and 10 of each class; small."""
    pools, overlapping = pool_table(SEED), {patch for pair in overlapping_pairs() for patch in pair}
    order = [hashlib.sha256(f"{SEED} {patch}".encode()).hexdigest() for patch in complete_patches()]
    rank = dict(zip(complete_patches(), order, strict=True))
    jpegs = sorted(patch_of(str(path)) for path in (CODE / "sample").rglob("*.jpg"))
    tifs = {patch_of(str(path)) for path in (CODE / "sample").rglob("*.tif")}
    assert all(pools[patch] == "train" and patch not in overlapping for patch in jpegs)
    for name in CLASSES:
        own = sorted((patch for patch in jpegs if patch.startswith(f"{name}/")), key=rank.get)
        assert len(own) == 40 and {patch for patch in tifs if patch.startswith(f"{name}/")} == set(own[3::4])
    assert sum(path.stat().st_size for path in (CODE / "sample").rglob("*") if path.is_file()) < 8_000_000


# Finding images --------------------------------------------------------------------------------------------------

LAYOUTS = [(folder, None) for folder in IMAGE_SETS["rgb"].folders] + [(None, f) for f in IMAGE_SETS["ms"].folders]
FEW = [f"{name}/{name}_{number}" for name in CLASSES for number in (1, 2, 3)]


@pytest.mark.parametrize("rgb, ms", [*LAYOUTS, ("2750", IMAGE_SETS["ms"].folders[2]), ("EuroSAT", "EuroSATallBands")])
def test_all_layouts_are_found(tmp_path, rgb, ms):
    layout = {task: folder for task, folder in (("rgb", rgb), ("ms", ms)) if folder}
    root = empty_images(tmp_path, FEW, layout)
    for task in TASKS:
        found = find_images(root, task)
        assert (found is None) == (task not in layout)
        if found:
            prefix = "" if layout[task] == "." else layout[task] + "/"
            assert len(found) == 30 and found["Forest/Forest_2"].startswith(f"{prefix}Forest/Forest_2.")


@pytest.mark.parametrize(
    "rgb, ms, how",
    [
        ("2750", "ds/images/remote_sensing/otherDatasets/sentinel_2/tif", "copied"),
        ("eurosat/2750", "EuroSATallBands", "linked files"),
        ("EuroSAT", "EuroSAT_MS", "linked folders"),
        (".", ".", "copied"),
    ],
)
def test_what_was_made_on_one_layout_works_on_every_other(place, tmp_path, rgb, ms, how):
    """Lists, models and logits of EuroSAT_RGB/ and EuroSAT_MS/: verified, reproduced, ranked, trained on."""
    elsewhere = tmp_path / "as unpacked"
    for layout, kind in ((rgb, "EuroSAT_RGB"), (ms, "EuroSAT_MS")):
        for folder in (config.dataset_root / kind).iterdir():
            target = elsewhere / layout / folder.name
            target.mkdir(parents=True, exist_ok=True)
            for path in folder.iterdir():
                if how == "linked files":
                    (target / path.name).symlink_to(path)
                elif how == "copied":
                    os.link(path, target / path.name)
            if how == "linked folders":
                target.rmdir()
                target.symlink_to(folder)
    config.dataset_root = elsewhere
    before = files_below(place.root)
    assert place.here.run("split_data.py").count("unchanged") == 2
    place.here.run("verify_splits.py")
    assert place.here.run("reproduce.py").count("\nREPRODUCED to the last bit") == 2
    assert files_below(place.root) == before
    place.here.run("rank_images.py")
    assert "first: finished before" in place.here.run("train_rgb.py")


def test_litter_is_passed_over_and_upper_case_is_not(tmp_path):
    root = empty_images(tmp_path, FEW, {"rgb": "EuroSAT_RGB"})
    folder = root / "EuroSAT_RGB" / "Forest"
    for name in ("._Forest_1.jpg", ".DS_Store", "Thumbs.db", "Forest_1.jpg.aux.xml", "train.csv"):
        (folder / name).touch()
    (root / "__MACOSX" / "EuroSAT_RGB" / "Forest").mkdir(parents=True)
    (root / "EuroSAT_RGB" / "label_map.json").touch()
    (folder / "Forest_3.jpg").rename(folder / "Forest_3.JPG")
    (folder / "a name with spaces ü.jpeg").touch()
    forest = [file for patch, file in find_images(root, "rgb").items() if patch.startswith("Forest/")]
    names = ["Forest_1.jpg", "Forest_2.jpg", "Forest_3.JPG", "a name with spaces ü.jpeg"]
    assert forest == [f"EuroSAT_RGB/Forest/{name}" for name in names]


def test_a_half_unpacked_copy_does_not_hide_the_data_set(tmp_path):
    root = empty_images(tmp_path, FEW, {"rgb": "EuroSAT"})
    empty_images(root, FEW[::3], {"rgb": "2750"})
    assert len(find_images(root, "rgb")) == 30


# What split_data.py answers --------------------------------------------------------------------------------------


def test_lists_that_would_be_others_are_kept(place, own_sample, sample):
    before, here = lists_below(place.root), place.here
    assert here.run("split_data.py").count("unchanged") == 2
    (own_sample / jpeg("Forest")).unlink()
    (own_sample / jpeg("Forest").replace("RGB", "MS").replace("jpg", "tif")).unlink()
    config.dataset_root = own_sample
    line = here.refused("split_data.py")
    assert "1 of their images are not below" in line and "outputs/demo/rgb/final_model.pt" in line
    config.dataset_root, config.split_seed = sample, 99
    line = here.refused("split_data.py")
    assert "their seed is 20190702, SPLIT_SEED in config.py is 99" in line and "--overwrite" in line
    config.split_seed = SEED
    path = place.root / "splits/demo/rgb/val.csv"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:-1]))
    assert "they were changed after they were made" in here.refused("split_data.py")
    path.write_bytes(before["splits/demo/rgb/val.csv"])
    assert lists_below(place.root) == before
    config.split_seed = 99
    here.run("split_data.py", "--overwrite")
    kept = {path.name.split(".csv.")[0]: path.read_bytes() for path in (path.parent).glob("*.csv.*.backup")}
    assert kept == {part: before[f"splits/demo/rgb/{part}.csv"] for part in PARTS}


def test_too_small_for_the_course_stops_or_is_recorded(here, complete):
    """And then it needs no further word: not to verify, not to split again, not when more images come."""
    some = sorted(complete_patches())[::30]
    config.profile = "course"
    config.dataset_root = empty_images(config.project_root / "images", some, {"ms": "EuroSAT_MS"})
    line = here.refused("split_data.py")
    assert "has 900 images, too few for the 2,500 / 1,000 / 2,000" in line and "EUROSAT_ALLOW_SMALLER_SPLITS" in line
    assert not (config.project_root / "splits").exists()
    config.allow_smaller_splits = True
    here.run("split_data.py")
    config.allow_smaller_splits = False
    assert json.loads((config.project_root / "splits/course/ms/split.json").read_text())["smaller_than_asked_for"]
    assert "unchanged" in here.run("split_data.py")
    before = lists_below(config.project_root)
    output = here.run("verify_splits.py", status=1)  # the images are empty
    assert output.count("FAIL") == 1 and "note  ms: train has" in output
    more = sorted(complete_patches())[::20] + some
    config.dataset_root = empty_images(config.project_root / "images", more, {"ms": "EuroSAT_MS"})
    output = here.run("split_data.py")
    assert "more images are at hand" in output and "python split_data.py --overwrite" in output
    config.dataset_root = empty_images(config.project_root / "images", complete_patches(), {"ms": "EuroSAT_MS"})
    output = here.run("split_data.py")
    assert "for lists of 2,500 / 1,000 / 2,000" in output and lists_below(config.project_root) == before


def test_one_image_set_alone_leaves_the_other_s_lists_and_record(place):
    """The record of the absent set was dropped once, and verifying ended in a KeyError."""
    before = files_below(place.root / "splits")
    shutil.rmtree(place.own_sample() / "EuroSAT_MS")
    place.here.run("split_data.py")
    assert files_below(place.root / "splits") == before
    output = place.here.run("verify_splits.py", status=1)
    assert output.count("FAIL") == 1 and "listed images are not below" in output


def test_a_strange_folder_is_told_where_it_lies_though_class_folders_are_links(here, own_sample, tmp_path):
    """It was looked for beside what the first class folder points to."""
    links = tmp_path / "links" / "EuroSAT_RGB"
    links.mkdir(parents=True)
    for folder in (own_sample / "EuroSAT_RGB").iterdir():
        (links / folder.name).symlink_to(folder)
    shutil.copytree(own_sample / "EuroSAT_RGB/Forest", links / "Desert")
    config.dataset_root = links.parent
    assert f"note: {links} also holds Desert, none of the ten classes: not used" in here.run("split_data.py")


def test_names_that_are_not_eurosat_s_are_told(here, complete, tmp_path):
    config.profile, config.dataset_root = "full", tmp_path / "images"
    empty_images(config.dataset_root, [*list(complete_patches())[::50], "Forest/My_own"], {"rgb": "2750"})
    assert "1 RGB images have names that are none of EuroSAT's 27,000 (for example 2750/Forest/My_own.jpg)" in here.run(
        "split_data.py"
    )


# Verifying -------------------------------------------------------------------------------------------------------


def edit(path, change) -> None:
    lines = path.read_text().splitlines()
    path.write_text("\n".join(change(lines)) + "\n")


@pytest.mark.parametrize(
    "name, change, told",
    [
        ("rgb/train.csv", lambda ls: [*ls, ls[1]], "listed twice"),
        ("rgb/train.csv", lambda ls: [ls[0], *ls[2:]], "the lists are those that split_data.py wrote"),
        ("rgb/test.csv", lambda ls: [line for line in ls if "Forest" not in line], "all 10 classes are in test"),
        (
            "ms/val.csv",
            lambda ls: [line.replace("Forest_", "Forest_9999") for line in ls],
            "listed images are not below",
        ),
        ("rgb/val.csv", lambda ls: [*ls[:-1], ls[-1].replace("SeaLake_", "SeaLake_9")], "in the pool that its name"),
    ],
)
def test_verify_finds(place, name, change, told):
    assert "all 38 checks passed" in place.here.run("verify_splits.py")
    edit(place.root / "splits/demo" / name, change)
    output = place.here.run("verify_splits.py", status=1)
    assert [line for line in output.splitlines() if line.startswith("FAIL") and told in line], output


@pytest.mark.parametrize("task_a, task_b", [("rgb", "rgb"), ("rgb", "ms")])
def test_verify_finds_every_pair_that_shares_a_patch(place, task_a, task_b):
    """Also val against test, and across the image sets: more than train against test."""
    folder = place.root / "splits/demo"
    taken = (folder / task_a / "val.csv").read_text().splitlines()[1]
    if task_b == "ms":
        taken = taken.replace("EuroSAT_RGB", "EuroSAT_MS").replace(".jpg", ".tif")
    edit(folder / task_b / "test.csv", lambda lines: [lines[0], *sorted([*lines[1:], taken])])
    if task_b == "ms":  # and out of the set's own val list, so only the other set's still holds it
        edit(folder / "ms" / "val.csv", lambda lines: [line for line in lines if line != taken])
    told = "rgb: val and test share no file" if task_b == "rgb" else "across image sets"
    assert f"FAIL  {told}" in place.here.run("verify_splits.py", status=1)


def test_verify_finds_patches_on_the_same_ground(place, monkeypatch):
    train, test = (read_split(splits_dir("rgb"), "rgb", part).patches[0] for part in ("train", "test"))
    monkeypatch.setattr(splits, "overlapping_pairs", lambda: [(train, test)])
    line = next(line for line in place.here.run("verify_splits.py", status=1).splitlines() if "same ground" in line)
    assert line.startswith("FAIL") and f"1 across train and test, for example {train} and {test}" in line


def test_verify_finds_one_image_under_two_names(place):
    train, test = (
        place.own_sample() / read_split(splits_dir("rgb"), "rgb", part).files[0] for part in ("train", "test")
    )
    content = train.read_bytes()
    test.unlink()
    test.write_bytes(content)
    output = place.here.run("verify_splits.py", status=1)
    assert output.count("FAIL") == 1 and "FAIL  rgb: no file of one part is, byte for byte, one of another" in output


def test_verify_counts_the_published_pairs_and_finds_another_name(here, complete):
    """174 pairs across train and test, as the positions say; a name moved to another part is found without its record."""
    config.dataset_root, config.profile = complete, "published"
    here.run("split_data.py")
    folder = config.project_root / "splits/published/rgb"
    output = here.run("verify_splits.py", status=1)  # the images are empty
    assert "note  of 639 pairs" in output and "174 across train and test" in output
    assert next(line for line in output.splitlines() if line.startswith("FAIL")).startswith(
        "FAIL  rgb: all 27,000 files"
    )
    moved = (folder / "test.csv").read_text().splitlines()[-1]
    edit(folder / "test.csv", lambda lines: lines[:-1])
    edit(folder / "val.csv", lambda lines: sorted([*lines[1:], moved, lines[0]], key=lambda x: (x != lines[0], x)))
    record = json.loads((folder / "split.json").read_text())
    record["lists_sha256"] = splits_hash(read_splits(splits_dir("rgb"), "rgb"))
    (folder / "split.json").write_text(json.dumps(record))
    output = here.run("verify_splits.py", status=1)
    assert "FAIL  rgb: test has the 5,399 names" in output and "FAIL  rgb: val has the 5,401 names" in output


def test_verify_finds_profiles_that_disagree(here, complete):
    config.dataset_root = complete
    for config.profile in ("full", "course"):
        here.run("split_data.py")
    assert "(course/rgb, full/rgb)" in here.run("verify_splits.py", status=1)
    config.profile, config.split_seed = "full", 5
    here.run("split_data.py", "--overwrite")
    config.profile = "course"
    assert "FAIL  across image sets and profiles (course/rgb, full/rgb)" in here.run("verify_splits.py", status=1)


def test_verify_fails_for_a_damaged_list_of_the_other_profile_and_goes_on(here, complete):
    config.dataset_root = complete
    for config.profile in ("full", "course"):
        here.run("split_data.py")
    (splits_dir("rgb", "full") / "val.csv").write_text("nonsense")
    output = here.run("verify_splits.py", status=1)
    assert "FAIL  full/rgb/val.csv is well-formed: splits/full/rgb/val.csv, line 1: the header is not" in output
    assert "ok    rgb: train and val share no file" in output


def test_verify_says_what_it_does_not_check(place):
    shutil.rmtree(splits_dir("ms"))
    output = place.here.run("verify_splits.py")
    assert "note  no lists in splits/demo/ms: nothing of ms is checked" in output


# Reading ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("change", [lambda b: b.replace(b"\n", b"\r\n"), lambda b: b"\xef\xbb\xbf" + b])
def test_line_ends_and_a_byte_order_mark_do_not_change_a_list(place, change):
    before, hash_before = (
        read_split(splits_dir("rgb"), "rgb", "train"),
        splits_hash(read_splits(splits_dir("rgb"), "rgb")),
    )
    path = place.list("rgb", "train")
    path.write_bytes(change(path.read_bytes()))
    assert (
        read_split(splits_dir("rgb"), "rgb", "train").files == before.files
        and splits_hash(read_splits(splits_dir("rgb"), "rgb")) == hash_before
    )
    assert "unchanged splits/demo/rgb" in place.here.run("split_data.py")
    place.here.run("verify_splits.py")


def test_a_comma_in_a_name_is_no_column(place):
    """Names with commas were cut there once, by two of three readers of lists."""
    files = [canonical_file("rgb", f"{name}/{name}, 1") for name in CLASSES]
    place.list("rgb", "val").write_text(
        "file,label,class_name\n" + "".join(f'"{file}",{i},{CLASSES[i]}\n' for i, file in enumerate(files))
    )
    assert read_split(splits_dir("rgb"), "rgb", "val").files == files
    assert list(csv.reader(split_text(read_split(splits_dir("rgb"), "rgb", "val")).splitlines()))[1][0] == files[0]


def test_no_lists(project):
    with pytest.raises(UserError, match=r"python split_data\.py"):
        read_split(splits_dir("rgb"), "rgb", "train")

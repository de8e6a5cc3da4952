"""Task 1: the lists are seeded, stratified, disjoint, and never replaced in silence."""

import json
import shutil

import numpy as np
import pytest

import config
from dataset import CLASSES, IMAGE_SETS, find_images, patch_of, read_split, read_splits, splits_hash
from project import PARTS, TASKS, UserError
from split_data import make_lists, make_pools


def empty_images(root, counts: dict[str, int], layout: dict[str, str]):
    """Files without content: splitting opens none."""
    for task, folder in layout.items():
        for name, count in counts.items():
            (root / folder / name).mkdir(parents=True, exist_ok=True)
            for number in range(1, count + 1):
                (root / folder / name / f"{name}_{number}{IMAGE_SETS[task].suffixes[0]}").touch()
    return root


def all_bytes(root) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in sorted((root / "splits").rglob("*.*"))}


def test_same_seed_same_bytes_wherever_the_folders_lie(user, own_sample, tmp_path):
    from conftest import User

    user.run("split_data.py")
    other = User(tmp_path / "elsewhere", own_sample)
    other.run("split_data.py")
    assert all_bytes(user.root) == all_bytes(other.root)
    other.run("split_data.py", "--overwrite", TEST_CONFIG="config.SEED = 8")
    assert all_bytes(user.root).keys() == all_bytes(other.root).keys()
    assert all_bytes(user.root)["splits/demo/rgb/train.csv"] != all_bytes(other.root)["splits/demo/rgb/train.csv"]


def test_lists_name_files_from_the_root_on(user):
    user.run("split_data.py")
    lines = (user.root / "splits/demo/ms/train.csv").read_bytes().decode().split("\n")
    assert lines[0] == "file,label,class_name" and lines[-1] == ""
    file, label, name = lines[1].split(",")
    assert file.startswith("EuroSAT_MS/AnnualCrop/AnnualCrop_") and (label, name) == ("0", "AnnualCrop")
    assert lines[1:-1] == sorted(lines[1:-1])


def images(counts: dict[str, range], folder: str) -> dict[str, str]:
    return {f"{c}/{c}_{n}": f"{folder}/{c}/{c}_{n}.x" for c in CLASSES for n in counts[c]}


@pytest.mark.parametrize("common, rgb_only, ms_only", [(30, 0, 0), (13, 40, 0), (7, 3, 11), (0, 21, 17), (1, 9, 9)])
def test_pools_hold_their_share_in_each_set_to_an_image(common, rgb_only, ms_only):
    rgb = images({c: range(common + rgb_only) for c in CLASSES}, "rgb")
    both_and_ms = [*range(common), *range(1000, 1000 + ms_only)]
    found = {"rgb": rgb, "ms": images(dict.fromkeys(CLASSES, both_and_ms), "ms")}
    pools = make_pools(found, seed=3)
    assert sum(map(len, pools.values())) == len(set().union(*pools.values())) == 10 * (common + rgb_only + ms_only)
    for patches in found.values():
        for part, fraction in zip(PARTS, (0.6, 0.2, 0.2), strict=True):
            for name in CLASSES:
                count = sum(p in patches and p.startswith(f"{name}/") for p in pools[part])
                total = sum(p.startswith(f"{name}/") for p in patches)
                assert abs(count - fraction * total) <= 1 + 1e-9, (part, name, count, total)


def test_course_lies_inside_full_and_is_stratified():
    found = {"rgb": images({c: range(300 + 20 * i) for i, c in enumerate(CLASSES)}, "rgb")}
    full = make_lists(found, 5, None, False)
    course = make_lists(found, 5, (250, 100, 200), False)
    for part, size in zip(PARTS, (250, 100, 200), strict=True):
        assert len(course["rgb", part].files) == size
        assert set(course["rgb", part].files) <= set(full["rgb", part].files)
        share = np.bincount(full["rgb", part].labels) * size / len(full["rgb", part].files)
        assert np.abs(np.bincount(course["rgb", part].labels) - share).max() < 1


def test_a_set_added_later_keeps_the_patches_where_they_were():
    rgb = images({c: range(50) for c in CLASSES}, "rgb")
    alone = make_lists({"rgb": rgb}, 5, None, False)
    both = make_lists({"rgb": rgb, "ms": images({c: range(50) for c in CLASSES}, "ms")}, 5, None, False)
    for part in PARTS:
        assert alone["rgb", part].files == both["rgb", part].files
        assert [patch_of(f) for f in both["ms", part].files] == [patch_of(f) for f in both["rgb", part].files]


LAYOUTS = [(folder, None) for folder in IMAGE_SETS["rgb"].folders] + [(None, f) for f in IMAGE_SETS["ms"].folders]


@pytest.mark.parametrize("rgb, ms", [*LAYOUTS, ("2750", IMAGE_SETS["ms"].folders[2]), ("EuroSAT", "EuroSATallBands")])
def test_all_layouts_are_found(tmp_path, monkeypatch, rgb, ms):
    layout = {task: folder for task, folder in (("rgb", rgb), ("ms", ms)) if folder}
    root = empty_images(tmp_path, dict.fromkeys(CLASSES, 3), layout)
    monkeypatch.setattr(config, "DATASET_ROOT", root)
    for task in TASKS:
        found = find_images(task)
        assert (found is None) == (task not in layout)
        if found:
            prefix = "" if layout[task] == "." else layout[task] + "/"
            assert len(found) == 30 and found["Forest/Forest_2"].startswith(f"{prefix}Forest/Forest_2.")


def test_litter_is_passed_over_and_upper_case_is_not(tmp_path, monkeypatch):
    root = empty_images(tmp_path, dict.fromkeys(CLASSES, 3), {"rgb": "EuroSAT_RGB"})
    folder = root / "EuroSAT_RGB" / "Forest"
    for name in ("._Forest_1.jpg", ".DS_Store", "Thumbs.db", "Forest_1.jpg.aux.xml", "train.csv"):
        (folder / name).touch()
    (root / "__MACOSX" / "EuroSAT_RGB" / "Forest").mkdir(parents=True)
    (root / "EuroSAT_RGB" / "label_map.json").touch()
    (folder / "Forest_3.jpg").rename(folder / "Forest_3.JPG")
    (folder / "a name with spaces ü.jpeg").touch()
    monkeypatch.setattr(config, "DATASET_ROOT", root)
    forest = [file for patch, file in find_images("rgb").items() if patch.startswith("Forest/")]
    names = ["Forest_1.jpg", "Forest_2.jpg", "Forest_3.JPG", "a name with spaces ü.jpeg"]
    assert forest == [f"EuroSAT_RGB/Forest/{name}" for name in names]


def test_lists_that_would_change_are_kept(trained_copy, own_sample):
    before = all_bytes(trained_copy.root)
    (own_sample / "EuroSAT_RGB" / "Forest" / "Forest_1.jpg").unlink()
    line = trained_copy.refused("split_data.py", EUROSAT_DATASET_ROOT=str(own_sample))
    assert "RGB set had 100 images and has 99" in line and "outputs/demo/rgb/final_model.pt" in line
    line = trained_copy.refused("split_data.py", TEST_CONFIG="config.SEED = 99")
    assert "the seed was" in line and "--overwrite" in line
    assert all_bytes(trained_copy.root) == before
    trained_copy.run("split_data.py")  # nothing would change: fine
    trained_copy.run("split_data.py", "--overwrite", TEST_CONFIG="config.SEED = 99")
    assert all_bytes(trained_copy.root) != before


def test_too_small_for_the_course(user):
    line = user.refused("split_data.py", EUROSAT_PROFILE="course")
    assert "60 / 20 / 20" in line and "2500 / 1000 / 2000" in line and "EUROSAT_ALLOW_SMALLER_SPLITS" in line
    assert not (user.root / "splits").exists()
    user.run("split_data.py", EUROSAT_PROFILE="course", EUROSAT_ALLOW_SMALLER_SPLITS="1")
    assert "FAIL" in user.run("verify_splits.py", EUROSAT_PROFILE="course", status=1)
    user.run("verify_splits.py", EUROSAT_PROFILE="course", EUROSAT_ALLOW_SMALLER_SPLITS="1")


def edit(path, change) -> None:
    lines = path.read_text().splitlines()
    path.write_text("\n".join(change(lines)) + "\n")


@pytest.mark.parametrize(
    "name, change, told",
    [
        ("rgb/train.csv", lambda ls: [*ls, ls[1]], "listed twice"),
        ("rgb/train.csv", lambda ls: [ls[0], *ls[2:]], "the lists are what the seed"),
        ("rgb/test.csv", lambda ls: [line for line in ls if "Forest" not in line], "every class is in test"),
        ("ms/val.csv", lambda ls: [line.replace("Forest_", "Forest_9999") for line in ls], "are not, for example"),
    ],
)
def test_verify_finds(user, name, change, told):
    user.run("split_data.py")
    assert "all 41 checks passed" in user.run("verify_splits.py")
    edit(user.root / "splits/demo" / name, change)
    output = user.run("verify_splits.py", status=1)
    assert [line for line in output.splitlines() if line.startswith("FAIL") and told in line], output


@pytest.mark.parametrize("task_a, task_b", [("rgb", "rgb"), ("rgb", "ms")])
def test_verify_finds_every_pair_that_overlaps(user, task_a, task_b):
    """Also val against test, and across the image sets: more than train against test."""
    user.run("split_data.py")
    folder = user.root / "splits/demo"
    taken = (folder / task_a / "val.csv").read_text().splitlines()[1]
    if task_b == "ms":
        taken = taken.replace("EuroSAT_RGB", "EuroSAT_MS").replace(".jpg", ".tif")
    edit(folder / task_b / "test.csv", lambda lines: [lines[0], *sorted([*lines[1:], taken])])
    if task_b == "ms":  # and out of the set's own val list, so only the other set's still holds it
        edit(folder / "ms" / "val.csv", lambda lines: [line for line in lines if line != taken])
    told = "rgb: val and test share no patch" if task_b == "rgb" else "across image sets"
    assert f"FAIL  {told}" in user.run("verify_splits.py", status=1)


def test_verify_finds_an_overlap_of_profiles(user):
    user.run("split_data.py", EUROSAT_PROFILE="full")
    small = "config.SPLIT_SIZES['course'] = (20, 10, 10)"
    user.run("split_data.py", EUROSAT_PROFILE="course", TEST_CONFIG=small)
    assert "(course and full)" in user.run("verify_splits.py", EUROSAT_PROFILE="course", TEST_CONFIG=small)
    user.run("split_data.py", "--overwrite", EUROSAT_PROFILE="full", TEST_CONFIG="config.SEED = 5")
    output = user.run("verify_splits.py", EUROSAT_PROFILE="course", TEST_CONFIG=small, status=1)
    assert "FAIL  across image sets and profiles (course and full)" in output


def test_verify_says_where_other_files_are_at_hand(user, own_sample):
    user.run("split_data.py")
    shutil.copy(own_sample / "EuroSAT_RGB/Forest/Forest_1.jpg", own_sample / "EuroSAT_RGB/Forest/Forest_77.jpg")
    output = user.run("verify_splits.py", EUROSAT_DATASET_ROOT=str(own_sample))
    assert "note  the data set at hand holds other files" in output


def test_line_ends_do_not_change_a_list(project, user):
    user.run("split_data.py")
    shutil.copytree(user.root / "splits", project / "splits")
    before, hash_before = read_split("rgb", "train"), splits_hash(read_splits("rgb"))
    path = project / "splits/demo/rgb/train.csv"
    path.write_bytes(path.read_bytes().replace(b"\n", b"\r\n"))
    assert read_split("rgb", "train").files == before.files and splits_hash(read_splits("rgb")) == hash_before


def test_record_says_what_the_lists_were_made_from(user):
    user.run("split_data.py")
    record = json.loads((user.root / "splits/demo/split.json").read_text())
    assert record["seed"] == 20190702 and sum(record["image_sets"]["ms"]["images"].values()) == 100


def test_no_lists(project):
    with pytest.raises(UserError, match=r"python split_data\.py"):
        read_split("rgb", "train")

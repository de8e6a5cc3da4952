"""Task 1: lists are seeded, stratified, disjoint also on the ground, the same everywhere, and never replaced in silence."""

import hashlib
import itertools
import json
import shutil

from base.errors import UserError
from base.project import CLASSES, MS, PARTS, RGB, TASKS, config

import numpy as np
import pytest
from conftest import CODE, files_below, jpeg, tif

from dataset import find_images, patch_of
from engine import splits
from engine.splits import complete_counts, complete_patches, make_pools, overlapping_pairs, read_split
from split_data import draw_lists

SEED = 20190702
FEW = [f"{name}/{name}_{number}" for name in CLASSES for number in (1, 2, 3)]
# SHA-256 of the sorted names, a line each, in torchgeo's lists, whose MD5s torchgeo states.
PUBLISHED_SHA256 = {
    ("published", "train"): "529599d11c82715ce405e88d1d046f83b7dfa7600ddd13d1e5f5e006b0e7f7ec",
    ("published", "val"): "d5de5495d66134375eba0a2663bfab4f6556a12f449e759348819395eebe2579",
    ("published", "test"): "174249f949747aca45c95aeafe6aa0dcefe6c9d32a4f0cb3eef9774528440653",
    ("spatial", "train"): "c45c1021f012e6dc57e8667d55488da1d6f48e22d92d247541fdee14bb54c5b4",
    ("spatial", "val"): "bbf84b6948062b77ce1e8a5aecd9048989ad28d68fadf47498039ab47a122d6d",
    ("spatial", "test"): "8aa46187620798d2ca5e78ce766ca12e78053f068a96658bf8694cca74158762",
}


def empty_images(root, patches, layout: dict):
    """Files without content in {task: folder}: making lists opens none."""
    for task, folder in layout.items():
        for patch in patches:
            path = root / folder / f"{patch}{task.suffixes[0]}"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
    return root


@pytest.fixture(scope="session")
def complete(once):
    """All 27,000 names of the RGB set."""
    return once("complete", lambda folder: empty_images(folder, complete_patches(), {RGB: "EuroSAT_RGB"}))


def pool_table(seed) -> dict[str, str]:
    return {patch: part for part, patches in make_pools(complete_patches(), seed).items() for patch in patches}


def test_the_table_of_the_complete_data_set_is_right():
    """Counts per class as in Helber et al., 2019; the published lists as torchgeo has them."""
    counts = dict(zip(CLASSES, (3000, 3000, 3000, 2500, 2500, 2000, 2500, 3000, 2500, 3000), strict=True))
    assert set(complete_patches()) == {f"{c}/{c}_{n + 1}" for c, count in counts.items() for n in range(count)}
    assert len(overlapping_pairs()) == 639 and all(set(pair) <= set(complete_patches()) for pair in overlapping_pairs())
    for (profile, part), expected in PUBLISHED_SHA256.items():
        names = sorted(patch for patch, row in complete_patches().items() if row[profile] == part)
        assert hashlib.sha256("".join(f"{name}\n" for name in names).encode()).hexdigest() == expected


def test_pools_are_60_20_20_percent_of_each_class_and_follow_the_seed():
    names = [f"{c}/x{n}" for c in CLASSES for n in range(50)]  # they overlap nothing
    pools = make_pools(names, seed=3)
    for name in CLASSES:
        parts = [[patch for patch in pools[part] if patch.startswith(f"{name}/")] for part in PARTS]
        assert [len(patches) for patches in parts] == [30, 10, 10] and len(set().union(*parts)) == 50
    assert make_pools(names[::-1], seed=3) == pools != make_pools(names, seed=4)


def test_a_patch_that_overlaps_a_later_part_is_left_out_and_no_other():
    everything = pool_table(SEED)
    left = set(complete_patches()) - set(everything)
    parts = dict.fromkeys(left, "left") | everything
    for a, b in overlapping_pairs():
        assert parts[a] == parts[b] or "left" in (parts[a], parts[b])
    overlapping = {patch for pair in overlapping_pairs() for patch in pair}
    assert left <= overlapping and len(left) < len(overlapping) / 2
    assert sum(part == "test" for part in parts.values()) == 5_400  # the test patch of a pair stays


def test_shares_are_exact_and_those_of_a_smaller_list_no_larger():
    former, counts = dict.fromkeys(CLASSES, 0), complete_counts()
    for size in range(0, 16_200, 7):
        shares = splits.class_shares(size, counts)
        assert sum(shares.values()) == size and all(shares[name] >= former[name] for name in CLASSES)
        assert all(abs(shares[name] - size * count / 27_000) < 1 for name, count in counts.items())
        former = shares


def test_names_alone_give_the_lists_that_were_handed_in(here, complete, tmp_path):
    """Three profiles, whichever layout the images were unpacked in; filling in the team's names changes none."""
    config.team, config.seed = [("Ada Lovelace", 3141592)], 3141592
    shutil.copytree(CODE / "splits", here.root / "splits")
    before = files_below(here.root)
    for number, layout in enumerate(RGB.layouts):
        config.dataset_root = tmp_path / f"links {number}"
        link = config.dataset_root if layout == "." else config.dataset_root / layout
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(complete / "EuroSAT_RGB")
        for config.profile in ("course", "published", "spatial"):
            assert f"unchanged splits/{config.profile}/rgb" in here.run("split_data.py")
    assert files_below(here.root) == before
    config.project_root = tmp_path / "from scratch"
    here.run("split_data.py")
    for part in PARTS:
        name = f"splits/spatial/rgb/{part}.csv"
        content = (config.project_root / name).read_bytes()
        header, *lines = content.decode().splitlines()
        assert content == (CODE / name).read_bytes() and header == "file,label,class_name" and lines == sorted(lines)
        assert lines[0].startswith("EuroSAT_RGB/AnnualCrop/AnnualCrop_") and lines[0].endswith(".jpg,0,AnnualCrop")


def test_half_of_the_files_and_one_set_give_the_same_pools(project):
    names, pools = list(complete_patches()), pool_table(SEED)
    config.profile = "full"
    for present in ({"rgb": names[::2]}, {"ms": names[1::3]}, {"rgb": names[::5], "ms": names}):
        for task, patches in present.items():
            lists, smaller = draw_lists(TASKS[task], {name: set(each) for name, each in present.items()}, False)
            for part in PARTS:
                assert lists[part].patches == sorted(patch for patch in patches if pools.get(patch) == part)
            assert not smaller


def test_course_lies_inside_full_and_has_each_classs_share(project):
    drawn = {}
    for config.profile in ("full", "course"):
        drawn[config.profile], _ = draw_lists(RGB, {"rgb": complete_patches()}, False)
    for part, size in zip(PARTS, (2500, 1000, 2000), strict=True):
        course = drawn["course"][part]
        assert len(course.files) == size and set(course.files) <= set(drawn["full"][part].files)
        counts = dict(zip(CLASSES, np.bincount(course.labels).tolist(), strict=True))
        assert counts == splits.class_shares(size, complete_counts())


def test_the_sample_is_what_its_note_says():
    """From the train pool, so in no val or test list; none overlaps; 40 JPEGs and 10 tifs of each class; small."""
    pools, overlapping = pool_table(SEED), {patch for pair in overlapping_pairs() for patch in pair}
    jpegs = sorted(patch_of(str(path)) for path in (CODE / "sample").rglob("*.jpg"))
    tifs = {patch_of(str(path)) for path in (CODE / "sample").rglob("*.tif")}
    assert all(pools[patch] == "train" and patch not in overlapping for patch in jpegs)
    for name in CLASSES:
        patches = [patch for patch in jpegs if patch.startswith(f"{name}/")]
        patches.sort(key=lambda patch: hashlib.sha256(f"{SEED} {patch}".encode()).hexdigest())
        assert len(patches) == 40 and {patch for patch in tifs if patch.startswith(f"{name}/")} == set(patches[3::4])
    assert sum(path.stat().st_size for path in (CODE / "sample").rglob("*") if path.is_file()) < 8_000_000


@pytest.mark.parametrize("rgb, ms", list(itertools.zip_longest(RGB.layouts, MS.layouts[::-1])))
def test_all_layouts_are_found(tmp_path, rgb, ms):
    layout = {task: folder for task, folder in ((RGB, rgb), (MS, ms)) if folder}
    root = empty_images(tmp_path, FEW, layout)
    empty_images(root, FEW[::3], {RGB: "elsewhere", MS: "2750"})  # a half unpacked copy does not hide the data set
    for task in (RGB, MS):
        found = find_images(root, task)
        assert (found is None) == (task not in layout)
        if found:
            prefix = "" if layout[task] == "." else layout[task] + "/"
            assert len(found) == 30 and found["Forest/Forest_2"].startswith(f"{prefix}Forest/Forest_2.")


@pytest.mark.parametrize("rgb, ms", [("2750", MS.layouts[2]), ("eurosat/2750", "EuroSATallBands"), (".", ".")])
def test_what_was_made_on_one_layout_works_on_every_other(place, tmp_path, rgb, ms):
    """Lists, models and logits of EuroSAT_RGB/ and EuroSAT_MS/: verified, reproduced, ranked, trained on."""
    elsewhere = tmp_path / "as unpacked"
    for layout, kind in ((rgb, "EuroSAT_RGB"), (ms, "EuroSAT_MS")):
        for folder in (config.dataset_root / kind).iterdir():
            target = elsewhere / layout / folder.name
            target.mkdir(parents=True, exist_ok=True)
            for path in folder.iterdir():
                (target / path.name).symlink_to(path)
    config.dataset_root, before = elsewhere, files_below(place.root)
    assert place.run("split_data.py").count("unchanged") == 2
    place.run("verify_splits.py")
    assert place.run("reproduce.py").count("\nREPRODUCED to the last bit") == 2
    assert files_below(place.root) == before
    place.run("rank_images.py")
    assert "first: finished before" in place.run("train_rgb.py")


def test_litter_is_ignored_and_upper_case_is_not(tmp_path):
    root = empty_images(tmp_path, FEW, {RGB: "EuroSAT_RGB"})
    folder = root / "EuroSAT_RGB" / "Forest"
    for name in ("._Forest_1.jpg", ".DS_Store", "Thumbs.db", "Forest_1.jpg.aux.xml", "train.csv"):
        (folder / name).touch()
    (root / "__MACOSX" / "EuroSAT_RGB" / "Forest").mkdir(parents=True)
    (folder / "Forest_3.jpg").rename(folder / "Forest_3.JPG")
    (folder / "a name with spaces ü.jpeg").touch()
    forest = [file for patch, file in find_images(root, RGB).items() if patch.startswith("Forest/")]
    names = ["Forest_1.jpg", "Forest_2.jpg", "Forest_3.JPG", "a name with spaces ü.jpeg"]
    assert forest == [f"EuroSAT_RGB/Forest/{name}" for name in names]


def test_lists_that_would_change_are_kept(place, sample):
    before = files_below(place.root / "splits")
    assert place.run("split_data.py").count("unchanged") == 2
    for name in (jpeg("Forest"), tif("Forest")):
        (place.own_sample() / name).unlink()
    line = place.refused("split_data.py")
    assert "1 of their images are not below" in line and "outputs/demo/rgb/final_model.pt" in line
    config.dataset_root, config.split_seed = sample, 99
    line = place.refused("split_data.py")
    assert "seed is 20190702" in line and "99" in line and "--overwrite" in line
    assert files_below(place.root / "splits") == before
    place.run("split_data.py --overwrite")
    config.split_seed = SEED
    place.edit("rgb", "val", lambda lines: lines[:-1])
    assert "they were changed" in place.refused("split_data.py")
    kept = {path.partition(".csv.")[0]: digest for path, digest in files_below(RGB.splits).items() if ".csv." in path}
    assert kept == {part: before[f"demo/rgb/{part}.csv"] for part in PARTS}


def test_an_image_set_too_small_for_the_course_stops_or_is_recorded(here, tmp_path):
    """The record then speaks for itself: to verify, to split again, and when more images come."""
    names = sorted(complete_patches())
    config.profile, config.dataset_root = "course", empty_images(tmp_path / "images", names[::30], {MS: "EuroSAT_MS"})
    line = here.refused("split_data.py")
    assert "has 900 images, too few for the 2,500 / 1,000 / 2,000" in line and "EUROSAT_ALLOW_SMALLER_SPLITS" in line
    assert not (here.root / "splits").exists()
    config.allow_smaller_splits = True
    here.run("split_data.py")
    config.allow_smaller_splits = False
    assert json.loads((here.root / "splits/course/ms/split.json").read_text())["smaller_than_asked_for"]
    assert "unchanged" in here.run("split_data.py")
    before = files_below(here.root)
    output = here.run("verify_splits.py", status=1)  # the images are empty
    assert output.count("FAIL") == 1 and "note  ms: train has" in output
    empty_images(config.dataset_root, names[::20], {MS: "EuroSAT_MS"})
    output = here.run("split_data.py")
    assert "more images are at hand" in output and "python split_data.py --overwrite" in output
    empty_images(config.dataset_root, names, {MS: "EuroSAT_MS"})
    assert "for lists of 2,500 / 1,000 / 2,000" in here.run("split_data.py") and files_below(here.root) == before


def test_one_complete_image_set_asks_nothing_of_the_other(here, complete, tmp_path):
    (tmp_path / "EuroSAT_RGB").symlink_to(complete / "EuroSAT_RGB")
    some = list(complete_patches())[::20]
    config.profile, config.dataset_root = "full", empty_images(tmp_path, some, {MS: "EuroSAT_MS"})
    here.run("split_data.py")
    output = here.run("verify_splits.py", status=1)  # the images are empty
    assert "rgb: train has 15,895 images, at least 15,895" in output and "ms: train has" in output
    assert not [line for line in output.splitlines() if line.startswith("FAIL") and "at least" in line]


def test_one_image_set_alone_leaves_the_lists_of_the_other(place):
    before = files_below(place.root / "splits")
    shutil.rmtree(place.own_sample() / "EuroSAT_MS")
    place.run("split_data.py")
    assert files_below(place.root / "splits") == before
    (line,) = failures(place)
    assert "listed images are not below" in line
    shutil.rmtree(MS.splits)
    assert "no lists in splits/demo/ms" in place.run("verify_splits.py")


def test_a_name_that_is_not_eurosats_is_reported(here, tmp_path):
    names = [*list(complete_patches())[::50], "Forest/Mine"]
    config.profile, config.dataset_root = "full", empty_images(tmp_path, names, {RGB: "2750"})
    assert "for example 2750/Forest/Mine.jpg" in here.run("split_data.py")


def failures(runner) -> list[str]:
    lines = runner.run("verify_splits.py", status=1).splitlines()
    return [line for line in lines if line.startswith("FAIL")]


@pytest.mark.parametrize(
    "task, part, change, told",
    [
        ("rgb", "train", lambda ls: [*ls, ls[1]], "line 62 repeats line 2"),
        ("rgb", "train", lambda ls: [ls[0], *ls[2:]], "the lists are those that split_data.py wrote"),
        ("rgb", "test", lambda ls: [line for line in ls if "Forest" not in line], "all 10 classes are in test"),
        ("ms", "val", lambda ls: [line.replace("Forest_", "Forest_9999") for line in ls], "are not below"),
        ("rgb", "val", lambda ls: [*ls[:-1], ls[-1].replace("SeaLake_", "SeaLake_9")], "the seed 20190702 give"),
    ],
)
def test_verify_finds_an_edited_list(place, task, part, change, told):
    assert "checks passed" in place.run("verify_splits.py")
    place.edit(task, part, change)
    assert any(told in line for line in failures(place))


@pytest.mark.parametrize("other", ["rgb", "ms"])
def test_verify_finds_a_patch_in_two_parts(place, other):
    """Within a list's own set, and across the two image sets."""
    taken = place.list_path("rgb", "val").read_text().splitlines()[1]
    if other == "ms":
        taken = taken.replace("EuroSAT_RGB", "EuroSAT_MS").replace(".jpg", ".tif")
        place.edit("ms", "val", lambda lines: [line for line in lines if line != taken])
    place.edit(other, "test", lambda lines: [lines[0], *sorted([*lines[1:], taken])])
    told = "rgb: val and test share no file" if other == "rgb" else "in both image sets"
    assert any(told in line for line in failures(place))


def test_verify_finds_patches_on_the_same_ground(place):
    train, test = (read_split(RGB.splits, RGB, part).patches[0] for part in ("train", "test"))
    place.monkeypatch.setattr(splits, "overlapping_pairs", lambda: [(train, test)])
    assert any("same ground" in line and train in line and test in line for line in failures(place))


def test_verify_finds_one_image_under_two_names(place):
    place.listed_image("rgb", "test").write_bytes(place.listed_image("rgb", "train").read_bytes())
    (line,) = failures(place)
    assert "byte-identical" in line


def test_verify_counts_the_published_pairs_and_finds_a_name_in_another_part(here, complete):
    """174 pairs lie across train and test. A moved name is found although its record agrees."""
    config.dataset_root, config.profile = complete, "published"
    here.run("split_data.py")
    output = here.run("verify_splits.py", status=1)  # the images are empty
    assert "174 across train and test" in output and output.count("FAIL") == 1
    names = {part: read_split(RGB.splits, RGB, part).patches for part in PARTS}
    names["val"].append(names["test"].pop())
    lists = {part: splits.make_split(RGB, patches) for part, patches in names.items()}
    for part, split in lists.items():
        splits.split_path(RGB.splits, part).write_text(splits.split_csv(split))
    record = json.loads(splits.record_path(RGB.splits).read_text())
    splits.record_path(RGB.splits).write_text(json.dumps({**record, "lists_sha256": splits.splits_hash(lists)}))
    assert any("torchgeo's random split" in line and names["val"][-1] in line for line in failures(here))


def test_verify_finds_lists_of_another_profile(here, complete):
    config.dataset_root = complete
    for config.profile in ("full", "course"):
        here.run("split_data.py")
        assert all("are RGB images" in line for line in failures(here))  # they are empty
    full = RGB.of_profile("full").splits
    shutil.rmtree(full)
    shutil.copytree(RGB.splits, full)
    config.profile = "full"
    assert any("made for the profile full" in line for line in failures(here))


@pytest.mark.parametrize("change", [lambda b: b.replace(b"\n", b"\r\n"), lambda b: b"\xef\xbb\xbf" + b])
def test_line_ends_and_a_byte_order_mark_do_not_change_a_list(place, change):
    before = splits.splits_hash(splits.read_splits(RGB.splits, RGB))
    path = place.list_path("rgb", "train")
    path.write_bytes(change(path.read_bytes()))
    assert splits.splits_hash(splits.read_splits(RGB.splits, RGB)) == before
    assert "unchanged splits/demo/rgb" in place.run("split_data.py")
    place.run("verify_splits.py")


# A line that is added to train.csv, or bytes in its place.
DAMAGE = (
    "EuroSAT_RGB\\Forest\\x.jpg,1,Forest",
    "/etc/Forest/x.jpg,1,Forest",
    "EuroSAT_RGB/../../Forest/x.jpg,1,Forest",
    "EuroSAT_RGB/Forest/x.jpg,1",
    "EuroSAT_RGB/Desert/x.jpg,10,Desert",
    "EuroSAT_RGB/Forest/x.jpg,2,Forest",
    "EuroSAT_MS/Forest/x.tif,1,Forest",
    *(b"", b"\xff\xfe\x00", b"file,label\nx,1\n", b"file,label,class_name\n"),
)


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_list_is_refused_and_its_line_named(place, damage):
    path, line = place.list_path("rgb", "train"), "line 62 is .*" if isinstance(damage, str) else ""
    path.write_bytes(path.read_bytes() + f"{damage}\n".encode() if line else damage)
    with pytest.raises(UserError, match=rf"rgb/train\.csv is damaged.*{line}split_data\.py --overwrite"):
        read_split(RGB.splits, RGB, "train")

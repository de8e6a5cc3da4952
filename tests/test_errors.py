"""A user's mistake ends in one line that says what, where and what to do, with status 2."""

import os
import pickle

import pytest
import torch
from PIL import Image
from tifffile import imwrite

import config
from dataset import load_images, read_image
from project import UserError, check_config, written_whole


class Cases:
    """Each makes a mistake and returns the script to run and the environment; its docstring is what must be told."""

    def root_wrong(user, sample):
        """is not there; set DATASET_ROOT in config.py (or EUROSAT_DATASET_ROOT)"""
        return "split_data.py", {"EUROSAT_DATASET_ROOT": "/nowhere"}

    def root_not_set(user, sample):
        """data is not there; set DATASET_ROOT"""
        return "split_data.py", {"EUROSAT_DATASET_ROOT": ""}

    def root_a_file(user, sample):
        """is not a folder; set DATASET_ROOT"""
        return "split_data.py", {"EUROSAT_DATASET_ROOT": __file__}

    def root_empty(user, sample):
        """no EuroSAT images below"""
        (user.root / "empty").mkdir()
        return "split_data.py", {"EUROSAT_DATASET_ROOT": str(user.root / "empty")}

    def class_missing(user, sample):
        """has no RGB images of Forest"""
        (sample / "EuroSAT_RGB/Forest").rename(sample / "Forest")
        return "split_data.py", {}

    def class_too_small(user, sample):
        """each class needs at least 4"""
        for number in range(2, 11):
            (sample / f"EuroSAT_RGB/Forest/Forest_{number}.jpg").unlink()
        return "split_data.py", {}

    def patch_twice(user, sample):
        """are of the same patch"""
        folder = sample / "EuroSAT_RGB/Forest"
        (folder / "Forest_1.JPEG").write_bytes((folder / "Forest_1.jpg").read_bytes())
        return "split_data.py", {}

    def line_break_in_a_name(user, sample):
        """characters that no list can hold"""
        folder = sample / "EuroSAT_RGB/Forest"
        (folder / "Forest_1.jpg").rename(folder / "Forest\n1.jpg")
        return "split_data.py", {}

    def profile_unknown(user, sample):
        """unknown PROFILE 'big'; known: course, full, demo"""
        return "split_data.py", {"EUROSAT_PROFILE": "big"}

    def seed_no_number(user, sample):
        """SEED in config.py is '12a'"""
        return "split_data.py", {"TEST_CONFIG": "config.SEED = '12a'"}

    def size_impossible(user, sample):
        """SPLIT_SIZES['demo'] in config.py"""
        return "split_data.py", {"TEST_CONFIG": "config.SPLIT_SIZES['demo'] = (-1, 2, 3)"}

    def lists_missing(user, sample):
        """is missing; run: python split_data.py"""
        return "train_rgb.py", {}

    def lists_missing_to_verify(user, sample):
        """no lists in splits/demo; run: python split_data.py"""
        return "verify_splits.py", {}

    def model_missing(user, sample):
        """there is no model outputs/demo/rgb/final_model.pt"""
        return "predict_test.py", {}

    def model_missing_to_compare(user, sample):
        """run: python train_rgb.py or python train_ms.py"""
        return "reproduce.py", {}

    def nothing_to_report(user, sample):
        """nothing to report"""
        return "make_report.py", {}

    def weights_missing(user, sample):
        """run: python download_weights.py"""
        user.run("split_data.py")
        change = (
            "import dataclasses; config.RGB_SETTINGS = [dataclasses.replace(config.RGB_SETTINGS[0], weights='DEFAULT')]"
        )
        return "train_rgb.py", {"TEST_CONFIG": change}

    def no_network_for_the_data(user, sample):
        """check the network and run it again"""
        return "download_data.py", {}

    def too_little_disk_for_the_data(user, sample):
        """GB free; RGB needs 0.2 GB: free some"""
        full = "import shutil, types; shutil.disk_usage = lambda path: types.SimpleNamespace(free=10**8)"
        return "download_data.py", {"TEST_CONFIG": full}

    def image_damaged(user, sample):
        """Forest_1.jpg is damaged or no RGB image"""
        user.run("split_data.py")
        lists = (user.root / "splits/demo/rgb").glob("*.csv")
        for path in lists:  # wherever the split put it: into train, which is read first
            path.write_text(path.read_text().replace("Forest_1.jpg", "Forest_x.jpg"))
        path = user.root / "splits/demo/rgb/train.csv"
        path.write_text(path.read_text() + "EuroSAT_RGB/Forest/Forest_1.jpg,1,Forest\n")
        (sample / "EuroSAT_RGB/Forest/Forest_x.jpg").write_bytes(
            (sample / "EuroSAT_RGB/River/River_1.jpg").read_bytes()
        )
        damaged = sample / "EuroSAT_RGB/Forest/Forest_1.jpg"
        damaged.write_bytes(damaged.read_bytes()[:700])
        return "train_rgb.py", {}

    def project_root_not_writable(user, sample):
        """cannot write"""
        return "split_data.py", {"EUROSAT_PROJECT_ROOT": "/proc/nowhere"}


@pytest.mark.parametrize("name", [name for name in vars(Cases) if not name.startswith("_")])
def test_mistakes_end_in_one_line(user, own_sample, name):
    user.environment["EUROSAT_DATASET_ROOT"] = str(own_sample)
    case = vars(Cases)[name]
    script, environment = case(user, own_sample)
    assert case.__doc__ in user.refused(script, **environment)


def jpeg(path, mode="RGB", size=(64, 64), kind="JPEG"):
    Image.new(mode, size).save(path, kind)


def tif(path, shape=(64, 64, 13), dtype="uint16"):
    imwrite(path, torch.ones(shape).numpy().astype(dtype), photometric="minisblack", planarconfig="contig")


@pytest.mark.parametrize(
    "task, make, told",
    [
        ("rgb", lambda path: path.touch(), "damaged"),
        ("rgb", lambda path: path.write_bytes(b"hello"), "damaged"),
        ("rgb", lambda path: jpeg(path, kind="PNG"), "damaged or no RGB image"),
        ("rgb", lambda path: jpeg(path, mode="L"), "not a colour image"),
        ("rgb", lambda path: jpeg(path, mode="CMYK"), "not a colour image"),
        ("rgb", lambda path: jpeg(path, size=(32, 64)), "64 x 32 pixels instead of 64 x 64"),
        ("rgb", lambda path: jpeg(path, size=(20000, 20000), mode="L"), "20000 x 20000 pixels"),
        ("rgb", lambda path: path.mkdir(), "cannot read"),
        ("ms", lambda path: path.touch(), "damaged"),
        ("ms", lambda path: jpeg(path), "damaged"),
        ("ms", lambda path: tif(path, (64, 64, 3)), "instead of uint16 (64, 64, 13)"),
        ("ms", lambda path: tif(path, (64, 64, 12)), "instead of uint16 (64, 64, 13)"),
        ("ms", lambda path: tif(path, (64, 64, 14)), "instead of uint16 (64, 64, 13)"),
        ("ms", lambda path: tif(path, dtype="float32"), "instead of uint16 (64, 64, 13)"),
        ("ms", lambda path: tif(path, (128, 64, 13)), "instead of uint16 (64, 64, 13)"),
    ],
)
def test_images_that_are_none_are_named(project, tmp_path, monkeypatch, task, make, told):
    monkeypatch.setattr(config, "DATASET_ROOT", tmp_path)
    make(tmp_path / "odd.x")
    with pytest.raises(UserError) as error:
        read_image("odd.x", task)
    assert told in str(error.value) and str(tmp_path / "odd.x") in str(error.value)
    with pytest.raises(UserError):
        load_images(task, ["odd.x"], ("B04",))
    assert not list(project.rglob("*.*"))  # nothing half-written


def test_truncated_images_are_refused(project, sample, tmp_path, monkeypatch):
    monkeypatch.setattr(config, "DATASET_ROOT", tmp_path)
    for task, file in (("rgb", "EuroSAT_RGB/River/River_1.jpg"), ("ms", "EuroSAT_MS/River/River_1.tif")):
        whole = (sample / file).read_bytes()
        for share in (0.1, 0.5, 0.9):
            (tmp_path / "x").write_bytes(whole[: int(len(whole) * share)])
            with pytest.raises(UserError):
                read_image("x", task)


class Evil:
    def __reduce__(self):
        return os.system, (f"touch {os.environ['EVIL_FILE']}",)


@pytest.mark.parametrize("script", ["predict_test.py", "train_rgb.py", "reproduce.py"])
def test_a_pickle_that_would_run_code_does_not(trained_copy, monkeypatch, tmp_path, script):
    monkeypatch.setenv("EVIL_FILE", str(tmp_path / "ran"))
    name = {"predict_test.py": "final_model.pt", "train_rgb.py": "first/last.pt", "reproduce.py": "test_logits.pt"}[
        script
    ]
    path = trained_copy.root / "outputs/demo/rgb" / name
    torch.save({"network": Evil()}, path)
    arguments = () if script == "train_rgb.py" else ("rgb",)
    line = trained_copy.refused(script, *arguments)
    assert "damaged" in line and not (tmp_path / "ran").exists()
    path.write_bytes(pickle.dumps(Evil()))
    trained_copy.refused(script, *arguments)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "line, told",
    [
        ("../outside.jpg,1,Forest", "is not a path from the data set root on"),
        ("/etc/Forest/x.jpg,1,Forest", "is not a path from the data set root on"),
        ("EuroSAT_RGB\\\\Forest\\\\x.jpg,1,Forest", "is not a path from the data set root on"),
        ("EuroSAT_RGB/Forest/x.jpg,2,Forest", "disagree"),
        ("EuroSAT_RGB/River/x.jpg,1,Forest", "disagree"),
        ("EuroSAT_RGB/Desert/x.jpg,10,Desert", "unknown class 'Desert'"),
        ("EuroSAT_RGB/Forest/x.tif,1,Forest", "is no RGB image"),
        ("EuroSAT_RGB/Forest/x.jpg,1", "2 columns instead of 3"),
    ],
)
def test_wrong_lists_are_named_by_line(user, line, told):
    user.run("split_data.py")
    path = user.root / "splits/demo/rgb/train.csv"
    path.write_text(path.read_text() + line + "\n")
    message = user.refused("train_rgb.py")
    assert told in message and "train.csv, line 62" in message


@pytest.mark.parametrize(
    "content, told", [("", "header"), ("file,label\n", "header"), ("file,label,class_name\n", "empty")]
)
def test_lists_without_content(user, content, told):
    user.run("split_data.py")
    (user.root / "splits/demo/rgb/val.csv").write_text(content)
    assert told in user.refused("train_rgb.py")


@pytest.mark.parametrize(
    "change, told", [("ms", "is a model of the task 'ms'"), ("half", "is damaged"), ("keys", "is no final model")]
)
def test_wrong_models_are_refused(trained_copy, change, told):
    path = trained_copy.root / "outputs/demo/rgb/final_model.pt"
    if change == "ms":
        path.write_bytes((trained_copy.root / "outputs/demo/ms/final_model.pt").read_bytes())
    elif change == "half":
        path.write_bytes(path.read_bytes()[:5000])
    else:
        content = torch.load(path, weights_only=True)
        content["setting"]["backbone"] = "resnet18"
        torch.save(content, path)
    assert told in trained_copy.refused("predict_test.py", "rgb")


def test_a_full_disk_leaves_the_old_file(project, monkeypatch):
    path = project / "kept.txt"
    path.write_text("old")
    with pytest.raises(UserError, match="No space left"), written_whole(path) as partial:
        partial.write_text("half")
        raise OSError(28, "No space left on device")
    assert path.read_text() == "old" and [p.name for p in project.iterdir()] == ["kept.txt"]


def test_a_team_of_four_is_refused(monkeypatch):
    monkeypatch.setattr(config, "TEAM", [("A B", 1)] * 4)
    with pytest.raises(UserError, match="at most three"):
        check_config()

"""A user's mistake ends in one line that says what, where and what to do, with status 2, and leaves all as it was."""

import json
import os
import pickle
import shutil
import subprocess

import pytest
import torch
from conftest import CODE, files_below, jpeg, tif, unlinked
from PIL import Image
from tifffile import imwrite

from dataset import read_image
from project import UserError, atomic_write, config


class Cases:
    """Each makes one mistake in `place` and returns the command; its docstring is what the user must be told."""

    # The data set root ---------------------------------------------------------------------------------------

    def root_missing(place):
        """is not there; set DATASET_ROOT in config.py (or EUROSAT_DATASET_ROOT)"""
        config.dataset_root = place.root / "nowhere"
        return "split_data.py"

    def root_a_file(place):
        """is not a folder; set DATASET_ROOT"""
        config.dataset_root = CODE / "config.py"
        return "split_data.py"

    def root_below_an_unreadable_folder(place):
        """Permission denied; check its permissions"""
        real = os.stat

        def refuse(path, *arguments, **keywords):
            if str(path) == str(config.dataset_root):
                raise PermissionError(13, "Permission denied", str(path))
            return real(path, *arguments, **keywords)

        place.monkeypatch.setattr(os, "stat", refuse)
        return "split_data.py"

    def root_over_long(place):
        """File name too long; check its permissions, or set DATASET_ROOT"""
        config.dataset_root = place.root / ("x" * 5000)
        return "split_data.py"

    def root_empty(place):
        """no EuroSAT images below"""
        config.dataset_root = place.root / "splits"
        return "split_data.py"

    def root_unreadable(place):
        """Permission denied; check its permissions"""
        real = os.scandir

        def refuse(path):
            if str(path).endswith("EuroSAT_RGB/River"):
                raise PermissionError(13, "Permission denied", str(path))
            return real(path)

        place.monkeypatch.setattr(os, "scandir", refuse)  # root, as which tests often run, may read everything
        return "split_data.py"

    def class_missing(place):
        """has no RGB images of Forest"""
        place.images("rgb", "Forest").rename(place.own_sample() / "elsewhere")
        return "split_data.py"

    def class_too_small(place):
        """too few RGB images of Forest: none is left for train; unpack more"""
        for path in sorted(place.images("rgb", "Forest").iterdir())[1:]:
            path.unlink()
        return "split_data.py --overwrite"

    def a_patch_twice(place):
        """are of the same patch"""
        path = place.own_sample() / jpeg("Forest")
        shutil.copy(path, path.with_suffix(".JPEG"))
        return "split_data.py"

    def a_line_break_in_a_name(place):
        """characters that no list can hold"""
        path = place.own_sample() / jpeg("Forest")
        path.rename(path.with_name("Forest\n1.jpg"))
        return "split_data.py"

    def links_in_a_circle(place):
        """Too many levels of symbolic links"""
        folder = place.images("rgb", "Forest")
        shutil.rmtree(folder)
        folder.symlink_to(folder)
        return "split_data.py"

    # Images: each case replaces the first image of a training list ------------------------------------------

    def image_missing(place):
        """1 of 60 listed images are not below"""
        place.first_image("rgb").unlink()
        return "train_rgb.py"

    def image_without_bytes(place):
        """is damaged or no RGB image"""
        place.first_image("rgb").write_bytes(b"")
        return "train_rgb.py"

    def image_truncated(place):
        """is damaged or no RGB image"""
        path = place.first_image("rgb")
        path.write_bytes(path.read_bytes()[:-200])
        return "train_rgb.py"

    def image_of_another_size(place):
        """has 64 x 32 pixels instead of 64 x 64"""
        Image.new("RGB", (32, 64)).save(place.first_image("rgb"))
        return "train_rgb.py"

    def image_gray(place):
        """is Gray, not a colour image"""
        Image.new("L", (64, 64)).save(place.first_image("rgb"))
        return "train_rgb.py"

    def image_cmyk(place):
        """CMYK, not a colour image"""
        Image.new("CMYK", (64, 64)).save(place.first_image("rgb"))
        return "train_rgb.py"

    def image_png_named_jpg(place):
        """is damaged or no RGB image"""
        Image.new("RGB", (64, 64)).save(place.first_image("rgb"), "PNG")
        return "train_rgb.py"

    def image_of_16_bit(place):
        """is Gray, not a colour image"""
        import imagecodecs
        import numpy as np

        pixels = np.zeros((64, 64), np.uint16)
        place.first_image("rgb").write_bytes(imagecodecs.ljpeg_encode(pixels, bitspersample=16))
        return "train_rgb.py"

    def image_a_bomb(place):
        """has 20000 x 20000 pixels instead of 64 x 64"""
        Image.new("L", (20000, 20000)).save(place.first_image("rgb"))
        return "train_rgb.py"

    def image_a_folder(place):
        """1 of 60 listed images are not below"""
        place.first_image("rgb").unlink()
        place.first_image("rgb").mkdir()
        return "train_rgb.py"

    def image_linked_to_itself(place):
        """Too many levels of symbolic links"""
        path = place.first_image("rgb")
        path.unlink()
        path.symlink_to(path)
        return "train_rgb.py"

    def tif_with_3_bands(place):
        """is uint16 of shape (64, 64, 3) instead of uint16 (64, 64, 13)"""
        write_tif(place.first_image("ms"), (64, 64, 3))
        return "train_ms.py"

    def tif_with_12_bands(place):
        """instead of uint16 (64, 64, 13)"""
        write_tif(place.first_image("ms"), (64, 64, 12))
        return "train_ms.py"

    def tif_with_14_bands(place):
        """instead of uint16 (64, 64, 13)"""
        write_tif(place.first_image("ms"), (64, 64, 14))
        return "train_ms.py"

    def tif_of_floats(place):
        """is float32 of shape (64, 64, 13) instead of uint16"""
        write_tif(place.first_image("ms"), dtype="float32")
        return "train_ms.py"

    def tif_of_nan(place):
        """is float32 of shape (64, 64, 13) instead of uint16"""
        write_tif(place.first_image("ms"), dtype="float32", value=float("nan"))
        return "train_ms.py"

    def tif_that_is_none(place):
        """is damaged or no multispectral image"""
        place.first_image("ms").write_bytes(b"II*\0 and then something else")
        return "train_ms.py"

    def tif_a_bomb(place):
        """instead of uint16 (64, 64, 13)"""
        write_tif(place.first_image("ms"), (3000, 3000, 13), dtype="uint8", compression="deflate")
        return "train_ms.py"

    # Lists ---------------------------------------------------------------------------------------------------

    def no_lists(place):
        """train.csv is missing; run: python split_data.py"""
        shutil.rmtree(place.root / "splits")
        return "train_rgb.py"

    def no_lists_to_verify(place):
        """no lists in splits/demo; run: python split_data.py"""
        shutil.rmtree(place.root / "splits")
        return "verify_splits.py"

    def one_list_missing(place):
        """val.csv is missing; run: python split_data.py"""
        place.list("rgb", "val").unlink()
        return "train_rgb.py"

    def list_without_bytes(place):
        """val.csv, line 1: the header is not file,label,class_name"""
        place.list("rgb", "val").write_text("")
        return "train_rgb.py"

    def list_without_header(place):
        """line 1: the header is not file,label,class_name"""
        place.edit("rgb", "val", lambda lines: lines[1:])
        return "train_rgb.py"

    def list_with_a_wrong_header(place):
        """line 1: the header is not file,label,class_name"""
        place.edit("rgb", "val", lambda lines: ["file,label", *lines[1:]])
        return "train_rgb.py"

    def list_without_images(place):
        """line 1: the list is empty"""
        place.edit("rgb", "val", lambda lines: lines[:1])
        return "train_rgb.py"

    def list_no_text(place):
        """cannot read the list splits/demo/rgb/val.csv"""
        place.list("rgb", "val").write_bytes(b"\xff\xfe\x00")
        return "train_rgb.py"

    def list_with_backslashes(place):
        """train.csv, line 62: 'EuroSAT_RGB\\\\Forest\\\\x.jpg' is not a path from the data set root on"""
        return place.line("EuroSAT_RGB\\Forest\\x.jpg,1,Forest")

    def list_with_an_absolute_path(place):
        """line 62: '/etc/Forest/x.jpg' is not a path from the data set root on"""
        return place.line("/etc/Forest/x.jpg,1,Forest")

    def list_that_points_outside(place):
        """line 62: 'EuroSAT_RGB/../../Forest/x.jpg' is not a path from the data set root on"""
        return place.line("EuroSAT_RGB/../../Forest/x.jpg,1,Forest")

    def list_with_two_columns(place):
        """line 62: 2 columns instead of 3"""
        return place.line("EuroSAT_RGB/Forest/x.jpg,1")

    def list_with_an_unknown_class(place):
        """line 62: unknown class 'Desert'; known: AnnualCrop"""
        return place.line("EuroSAT_RGB/Desert/x.jpg,10,Desert")

    def list_with_a_wrong_label(place):
        """line 62: the label '2', the class Forest and the folder of EuroSAT_RGB/Forest/x.jpg disagree"""
        return place.line("EuroSAT_RGB/Forest/x.jpg,2,Forest")

    def list_with_a_label_against_its_folder(place):
        """line 62: the label '1', the class Forest and the folder of EuroSAT_RGB/River/x.jpg disagree"""
        return place.line("EuroSAT_RGB/River/x.jpg,1,Forest")

    def list_of_the_other_images(place):
        """line 62: EuroSAT_MS/Forest/x.tif is not of the form EuroSAT_RGB/Forest/Forest_1.jpg"""
        return place.line("EuroSAT_MS/Forest/x.tif,1,Forest")

    def list_with_a_file_twice(place):
        """is listed twice"""
        return place.line(place.list("rgb", "train").read_text().splitlines()[5])

    def lists_that_overlap(place):
        """is in val.csv and in train.csv of splits/demo/rgb; run: python split_data.py --overwrite"""
        line = place.list("rgb", "train").read_text().splitlines()[5]
        place.edit("rgb", "val", lambda lines: [*lines, line])
        return "train_rgb.py"

    def lists_of_others_than_the_model(place):
        """was trained with other lists than those in splits/"""
        place.edit("rgb", "train", lambda lines: lines[:-1])
        return "predict_test.py rgb"

    def too_few_images_to_train(place):
        """1 training images in batches of at most 16 leave 1 process(es) fewer than two"""
        place.edit("rgb", "train", lambda lines: lines[:2])
        return "train_rgb.py"

    # The project root ----------------------------------------------------------------------------------------

    def project_root_where_nothing_can_be(place):
        """cannot write splits/demo/rgb/train.csv"""
        config.project_root = CODE / "config.py"
        return "split_data.py"

    # Checkpoints and models ----------------------------------------------------------------------------------

    def model_missing(place):
        """there is no model outputs/demo/rgb/final_model.pt; run: python train_rgb.py"""
        place.output("final_model.pt").unlink()
        return "predict_test.py rgb"

    def models_missing_to_compare(place):
        """run: python train_rgb.py or python train_ms.py"""
        shutil.rmtree(place.root / "outputs")
        return "reproduce.py"

    def model_truncated(place):
        """final_model.pt is damaged or holds more than tensors and plain values"""
        path = place.output("final_model.pt")
        path.write_bytes(path.read_bytes()[:5000])
        return "predict_test.py rgb"

    def model_of_the_other_task(place):
        """is a model of the task 'ms'"""
        shutil.copy(place.root / "outputs/demo/ms/final_model.pt", place.output("final_model.pt"))
        return "reproduce.py rgb"

    def model_of_another_backbone(place):
        """is no final model of this program"""
        return place.change("final_model.pt", lambda content: content["setting"].update(backbone="resnet18"))

    def model_of_other_bands(place):
        """bands and normalisation in outputs/demo/rgb/final_model.pt disagree"""
        return place.change("final_model.pt", lambda content: content.update(bands=["B08", "B11", "B12"]))

    def model_of_other_classes(place):
        """knows other classes: Desert"""
        return place.change("final_model.pt", lambda content: content.update(classes=["Desert"]))

    def model_of_an_older_program(place):
        """is no final model of this program (images, runs); run: python train_rgb.py"""
        return place.change("final_model.pt", lambda content: [content.pop("runs"), content.pop("images")])

    def model_that_is_a_list(place):
        """holds a list instead of a dict"""
        torch.save([1, 2], place.output("final_model.pt"))
        return "predict_test.py rgb"

    def checkpoint_truncated(place):
        """last.pt is damaged or holds more than tensors and plain values"""
        path = place.output("second/last.pt")
        path.write_bytes(path.read_bytes()[:5000])
        return "train_rgb.py"

    def checkpoint_of_another_network(place):
        """last.pt is no checkpoint of this model"""
        place.change("second/last.pt", lambda content: content["model"].popitem())
        return "train_rgb.py"

    def checkpoint_with_a_shortened_history(place):
        """last.pt is no checkpoint of this model (its parts disagree)"""
        place.change("second/last.pt", lambda content: content["history"].pop(0))
        return "train_rgb.py"

    def best_checkpoint_missing(place):
        """best.pt does not exist"""
        for name in ("first", "second"):
            place.output(f"{name}/best.pt").unlink()
        return "train_rgb.py"

    def best_checkpoint_of_another_run(place):
        """best.pt and last.pt are of different runs"""
        for name in ("first", "second"):
            place.change(f"{name}/best.pt", lambda content: content.update(epoch=7))
        return "train_rgb.py"

    def reference_missing(place):
        """there is no reference outputs/demo/rgb/test_logits.pt; run: python predict_test.py rgb"""
        place.output("test_logits.pt").unlink()
        return "reproduce.py rgb"

    def reference_damaged(place):
        """test_metrics.json in outputs/demo/rgb: damaged ('model_sha256')"""
        place.output("test_metrics.json").write_text("{}")
        return "reproduce.py rgb"

    def reference_with_a_row_cut(place):
        """damaged (logits (20, 10) torch.float32, 19 files)"""
        path = place.output("test_files.csv")
        path.write_text("".join(path.read_text().splitlines(keepends=True)[:-1]))
        return "rank_images.py rgb"

    def reference_with_rows_reversed(place):
        """the saved logits or file list were changed after saving;"""
        path = place.output("test_files.csv")
        header, *lines = path.read_text().splitlines()
        path.write_text("\n".join([header, *reversed(lines)]) + "\n")
        return "rank_images.py rgb"

    def reference_with_an_edited_logit(place):
        """the saved logits or file list were changed after saving;"""
        place.change("test_logits.pt", lambda logits: logits[0, 0].add_(50))
        return "rank_images.py rgb"

    def reference_with_edited_figures(place):
        """test_metrics.json has another accuracy than the saved logits give; run: python predict_test.py rgb"""
        path = place.output("test_metrics.json")
        record = json.loads(path.read_text())
        path.write_text(json.dumps({**record, "accuracy": 0.9999}))
        return "rank_images.py rgb"

    def ranking_of_another_model(place):
        """they are of another model; run: python predict_test.py rgb"""
        place.change("final_model.pt", lambda content: content.update(epoch=7))
        return "rank_images.py rgb"

    def nothing_to_report(place):
        """nothing to report"""
        shutil.rmtree(place.root / "outputs")
        return "make_report.py"

    def layout_missing(place):
        """report.typ is missing; bring it back (git checkout report/report.typ)"""
        code = place.root.parent / "code"
        shutil.copytree(CODE, code, ignore=shutil.ignore_patterns(".*", "report", "outputs", "sample", "cache", "data"))
        return f"{code}/make_report.py"

    def selection_damaged(place):
        """outputs/demo/rgb/selection.csv is damaged (KeyError: 'run'); run: python train_rgb.py"""
        place.output("selection.csv").write_text("setting,selected\nfirst,yes\n")
        return "make_report.py"

    # Initial weights -----------------------------------------------------------------------------------------

    def weights_missing(place):
        """cannot be had"""
        return place.settings("rgb", weights="DEFAULT", epochs=1)

    def weights_of_another_network(place):
        """the initial weights are not those of mobilenet_v3_small:"""
        place.pretrained({"some.weight": torch.zeros(3)})
        return place.settings("rgb", weights="DEFAULT", epochs=1)

    def weights_unknown(place):
        """unknown weights 'IMAGENET9' of mobilenet_v3_small; known: IMAGENET1K_V1, DEFAULT, None"""
        return place.settings("rgb", weights="IMAGENET9", epochs=1)

    # Names in settings (the rest of config.py: test_config.py) ------------------------------------------------

    def augmentation_unknown(place):
        """the setting 'first' in config.py: unknown augmentation; known: none, mild, strong"""
        return place.settings("rgb", augmentation="wild")

    def backbone_unknown(place):
        """unknown backbone; known: alexnet"""
        return place.settings("rgb", backbone="resnet1")

    def backbone_that_cannot_be_cut(place):
        """vit_b_16 cannot be cut after a global pooling"""
        return place.settings("rgb", backbone="vit_b_16")

    def fusion_unknown(place):
        """unknown fusion; known: none, concat"""
        return place.settings("rgb", fusion="magic")

    def one_group_to_fuse(place):
        """takes 2 group(s) of three bands"""
        return place.settings("rgb", fusion="concat")

    def band_of_the_other_images(place):
        """unknown band 'B08' of the RGB set; known: B04, B03, B02"""
        return place.settings("rgb", band_groups=(("B08", "B11", "B12"),))

    def two_bands(place):
        """takes 2 group(s) of three bands"""
        return place.settings("ms", band_groups=(("B04", "B03"), ("B04", "B03")))

    def nothing_to_train_for_the_profile(place):
        """config.py has no SETTINGS['demo']['ms']: nothing to train for this profile"""
        del config.settings["demo"]["ms"]
        return "train_ms.py"

    def a_loss_that_is_no_number(place):
        """is not a number in epoch 1; no epoch is kept in outputs/demo/rgb/first; lower its learning_rate"""
        shutil.rmtree(place.root / "outputs")
        return place.settings("rgb", learning_rate=1e30)

    # Downloads -----------------------------------------------------------------------------------------------

    def no_network_for_the_data(place):
        """cannot be fetched"""
        return "download.py rgb"

    def too_little_disk_for_the_data(place):
        """0.1 GB free; RGB needs 0.2 GB: free some"""
        place.monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 0, 10**8))
        return "download.py rgb"

    def nowhere_to_put_the_data(place):
        """Not a directory; check the two paths in config.py"""
        config.project_root = CODE / "config.py"
        return "download.py rgb"


def write_tif(path, shape=(64, 64, 13), dtype="uint16", value=1, **options):
    pixels = torch.full(shape, value, dtype=torch.float32).numpy().astype(dtype)
    imwrite(path, pixels, photometric="minisblack", planarconfig="contig", **options)


CASES = [name for name in vars(Cases) if not name.startswith("_")]


@pytest.mark.parametrize("name", CASES)
def test_mistakes_end_in_one_line(place, name):
    case = vars(Cases)[name]
    script, *arguments = case(place).split()
    before, images_before = files_below(place.root), files_below(place.root.parent / "own sample ü")
    line = place.here.refused(script, *arguments)
    assert case.__doc__ in line
    after = files_below(place.root)
    # Nothing that was there has changed, and what is new is the cache or of a setting that had none.
    assert {path: after.get(path) for path in before if not path.endswith("train.lock")} == {
        path: digest for path, digest in before.items() if not path.endswith("train.lock")
    }
    new = {path.rpartition("/")[2] for path in set(after) - set(before)}
    assert all(name.endswith((".npy", "setting.json", "train.lock")) for name in new), new
    assert files_below(place.root.parent / "own sample ü") == images_before


def test_there_are_enough_of_them():
    assert len(CASES) >= 40


@pytest.mark.parametrize("share", [0.02, 0.1, 0.5, 0.9, 0.999])
def test_truncated_images_are_refused(sample, tmp_path, share):
    for task, file in (("rgb", jpeg("River")), ("ms", tif("River"))):
        whole = (sample / file).read_bytes()
        (tmp_path / "x").write_bytes(whole[: int(len(whole) * share)])
        with pytest.raises(UserError, match="damaged"):
            read_image(str(tmp_path / "x"), task)


class Accepted:
    """What looks odd and is safe: each case prepares it and returns the commands that must work."""

    def line_ends_of_windows(place):
        for part in ("train", "val", "test"):
            path = place.list("rgb", part)
            path.write_bytes(path.read_bytes().replace(b"\n", b"\r\n"))
        return "predict_test.py rgb", "reproduce.py rgb"

    def litter_and_a_strange_class(place):
        folder = place.images("rgb", "Forest")
        for name in ("._Forest_1.jpg", ".DS_Store", "Thumbs.db", "Forest_1.jpg.aux.xml"):
            (folder / name).touch()
        shutil.copytree(folder, folder.with_name("Desert"))
        return "split_data.py", "verify_splits.py"

    def odd_names(place):
        path = place.own_sample() / jpeg("Forest")
        path.rename(path.with_name("Forest 1, ü “é”.JPEG"))
        return (
            "split_data.py --overwrite",
            "verify_splits.py",
            "train_rgb.py",
            "predict_test.py rgb",
            "rank_images.py rgb",
        )

    def odd_encodings_of_a_tif(place):
        import imagecodecs

        paths = sorted(place.images("ms", "Forest").iterdir())
        for path, options in zip(paths, ({"compression": "deflate"}, {"compression": "lzw"}, {"rowsperstrip": 64})):
            pixels = imagecodecs.tiff_decode(path.read_bytes())
            imwrite(unlinked(path), pixels, photometric="minisblack", planarconfig="contig", **options)
        imwrite(unlinked(paths[4]), pixels.transpose(2, 0, 1), photometric="minisblack", planarconfig="separate")
        return "split_data.py", "verify_splits.py"

    def one_image_in_the_last_batch(place):
        place.edit("rgb", "train", lambda lines: lines[:34])  # 33 images, batches of 16: 11 + 11 + 11
        return ("train_rgb.py",)

    def a_class_absent_from_val(place):
        place.edit("rgb", "val", lambda lines: [line for line in lines if "River" not in line])
        return "train_rgb.py", "predict_test.py rgb", "make_report.py"

    def a_band_without_variation(place):
        import imagecodecs

        for path in place.images("ms", "").rglob("*.tif"):
            pixels = imagecodecs.tiff_decode(path.read_bytes())
            pixels[:, :, 7] = 9
            imwrite(unlinked(path), pixels, photometric="minisblack", planarconfig="contig")
        return ("train_ms.py",)


@pytest.mark.parametrize("name", [name for name in vars(Accepted) if not name.startswith("_")])
def test_what_is_safe_is_accepted(place, name):
    for command in vars(Accepted)[name](place):
        script, *arguments = command.split()
        place.here.run(script, *arguments)


# Code in files -------------------------------------------------------------------------------------------------------


class Evil:
    def __reduce__(self):
        return os.system, (f"touch {os.environ['EVIL_FILE']}",)


@pytest.mark.parametrize(
    "name, command",
    [
        ("outputs/demo/rgb/final_model.pt", "predict_test.py rgb"),
        ("outputs/demo/rgb/second/last.pt", "train_rgb.py"),
        ("outputs/demo/rgb/test_logits.pt", "reproduce.py rgb"),
        ("pretrained/stand-in.pth", "train_rgb.py"),
    ],
)
def test_a_pickle_that_would_run_code_does_not(place, monkeypatch, tmp_path, name, command):
    monkeypatch.setenv("EVIL_FILE", str(tmp_path / "ran"))
    path = place.root / name
    for write in (lambda: torch.save({"model": Evil()}, path), lambda: path.write_bytes(pickle.dumps(Evil()))):
        if name.startswith("pretrained"):
            place.settings("rgb", weights="DEFAULT")
            path.parent.mkdir(exist_ok=True)
            write()
            place.weights_are(path)
        else:
            path.unlink(missing_ok=True)
            write()
        line = place.here.refused(*command.split())
        assert "is damaged or holds more than tensors" in line and not (tmp_path / "ran").exists()


# The disk ------------------------------------------------------------------------------------------------------------


def test_a_write_that_fails_leaves_the_old_file(project):
    path = project / "kept.txt"
    path.write_text("old")
    with pytest.raises(UserError, match="No space left"), atomic_write(path) as partial:
        partial.write_text("half")
        raise OSError(28, "No space left on device")
    assert path.read_text() == "old" and [p.name for p in project.iterdir()] == ["kept.txt"]


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 3 MB: mount options to a folder."""
    folder = tmp_path / "small disk"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3m", "none", str(folder)], capture_output=True).returncode:
        pytest.skip("mounting a file system takes root")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk(user, small_disk):
    """Lists and the cache fit, a checkpoint does not."""
    user.move(small_disk)
    user.run("split_data.py")
    before = files_below(small_disk / "splits")
    assert "No space left on device; free some space" in user.refused("train_rgb.py")
    assert files_below(small_disk / "splits") == before and not list(small_disk.rglob("*.partial"))


def test_a_project_root_that_is_read_only(trained_copy):
    """Nothing can be written, what only reads works: and a grader who compares logits needs no cache."""
    root = trained_copy.root
    shutil.rmtree(root / "cache")
    if subprocess.run(["mount", "--bind", "-o", "ro", str(root), str(root)], capture_output=True).returncode:
        pytest.skip("mounting a file system takes root")
    try:
        for command in ("split_data.py --overwrite", "train_rgb.py"):
            assert "Read-only file system" in trained_copy.refused(*command.split())
        trained_copy.run("verify_splits.py")
        assert trained_copy.run("reproduce.py").count("\nREPRODUCED to the last bit") == 2
    finally:
        subprocess.run(["umount", str(root)], check=True)

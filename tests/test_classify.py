"""classify.py: patches, scenes, their maps, units, and what it refuses."""

import csv
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import rasterio
import torch
from affine import Affine
from conftest import Here, jpeg, tif
from PIL import Image as Picture
from rasterio.windows import Window

from dataset import MS_BANDS, read_image
from engine.evaluation import load_model, model_path
from engine.maps import NO_CLASS, map_scene, predict_images, standardise
from engine.plots import MAP_COLOURS
from engine.scenes import SPECTRAL_ORDER, open_image, stretched
from engine.splits import read_splits, splits_hash
from engine.unlike import compare, statistics
from engine.weights import save_tensors
from models import build_model
from project import CLASSES, UserError, config, outputs_dir, splits_dir

POSITION = {"crs": "EPSG:32632", "transform": Affine(10, 0, 600000, 0, -10, 5300000)}


@pytest.fixture
def place(project, here):
    """A project root with lists of the sample and an untrained model of each kind; its scripts run in this process."""
    here.run("split_data.py")
    for task in ("rgb", "ms"):
        setting = config.settings["demo"][task][-1]
        torch.manual_seed(0)
        lists = splits_hash(read_splits(splits_dir(task), task))
        mean, std = {"rgb": (100 / 255, 40 / 255), "ms": (1500 / 65535, 700 / 65535)}[task]
        content = {
            **{key: {} for key in ("val", "images", "runs", "versions")},
            **{"task": task, "run": "", "epoch": 1, "seed": 0, "splits_sha256": lists, "setting": setting.values()},
            **{"classes": list(CLASSES), "bands": list(setting.bands)},
            **{"mean": torch.full((len(setting.bands),), mean), "std": torch.full((len(setting.bands),), std)},
            "model": build_model(setting, weights=None).state_dict(),
        }
        save_tensors(model_path(outputs_dir(task)), content)
    return Place(project, config.dataset_root, here)


@dataclass(frozen=True)
class Place:
    root: Path
    sample: Path
    here: Here


def write_tif(path, pixels, descriptions=None, **profile):
    """(rows, columns, bands), or one band (rows, columns), at POSITION."""
    planes = np.atleast_3d(pixels).transpose(2, 0, 1)
    shape = {"count": len(planes), "height": planes.shape[1], "width": planes.shape[2], "dtype": planes.dtype}
    with rasterio.open(path, "w", **{"driver": "GTiff", **shape, **POSITION, **profile}) as raster:
        raster.write(planes)
        if descriptions:
            raster.descriptions = descriptions
    return path


def stitched(sample, task, side=3):
    """side x side patches of known files as one scene: (64 side, 64 side, bands)."""
    name_of = {"rgb": jpeg, "ms": tif}[task]
    patches = [read_image(str(sample / name_of(CLASSES[i % 10], i // 10)), task) for i in range(side**2)]
    return np.concatenate([np.concatenate(patches[row * side :][:side], axis=1) for row in range(side)])


def pixels_of(path, bands=MS_BANDS):
    with open_image(path) as image:
        return image.read(bands, Window(0, 0, image.grid.width, image.grid.height)), image.notes


def final_model(task):
    return load_model(outputs_dir(task), task, torch.device("cpu"))


# Patches ---------------------------------------------------------------------------------------------------------


def test_a_patch_has_one_line_and_a_row_with_the_models_own_answer(place, tmp_path):
    names = [(jpeg("River"), "rgb"), (tif("Forest"), "ms")]
    output = place.here.run("classify.py", *(str(place.sample / name) for name, _ in names))
    rows = list(csv.DictReader((place.root / "outputs/classify/patches.csv").open()))
    assert [row["file"] for row in rows] == [str(place.sample / name) for name, _ in names]
    for row, (name, task) in zip(rows, names, strict=True):
        final = final_model(task)
        pixels = read_image(str(place.sample / name), task)
        bands = [("B04", "B03", "B02") if task == "rgb" else MS_BANDS][0]
        images = standardise(final, pixels[None, :, :, [bands.index(band) for band in final.bands]])
        probabilities, _ = predict_images(final, images, None, final.setting.views)
        best = probabilities[0].topk(2)
        assert [row["class_name"], row["runner_up"]] == [CLASSES[i] for i in best.indices]
        assert float(row["probability"]) == pytest.approx(float(best.values[0]), abs=1e-4)
        assert f"{row['file']}: {row['class_name']} " in output and f", then {row['runner_up']} " in output
    assert "8-bit RGB is taken as EuroSAT's stretch" in output and "baseline 04.00" in output


def test_jpeg_png_and_tif_give_the_pixels_that_the_models_were_trained_on(sample, tmp_path):
    pixels = read_image(str(sample / jpeg("Forest")), "rgb")
    Picture.fromarray(pixels).save(tmp_path / "a.png")
    write_tif(tmp_path / "a.tif", pixels)
    for path in (sample / jpeg("Forest"), tmp_path / "a.png", tmp_path / "a.tif"):
        assert np.array_equal(pixels_of(path, ("B04", "B03", "B02"))[0], pixels), path
    assert np.array_equal(pixels_of(sample / tif("Forest"))[0], read_image(str(sample / tif("Forest")), "ms"))


# Scenes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", ["rgb", "ms"])
def test_without_overlap_each_cell_is_the_networks_answer_for_its_patch(place, tmp_path, task):
    pixels, final = stitched(place.sample, task), final_model(task)
    path = write_tif(tmp_path / "scene.tif", pixels)
    with open_image(path) as image:
        land_use = map_scene(image, final, None, stride=64)
        patches = [image.read(final.bands, Window(64 * c, 64 * r, 64, 64)) for r in range(3) for c in range(3)]
    alone, _ = predict_images(final, standardise(final, np.stack(patches)), None, views=1)
    assert np.allclose(land_use.probabilities.reshape(10, 9).T, alone, atol=1e-5)
    assert np.array_equal(land_use.classes.ravel(), alone.argmax(1))


def test_a_scene_becomes_a_map_in_its_own_place(place, tmp_path):
    pixels = stitched(place.sample, "rgb")[:, :170]  # no multiple of a cell: what is over is left out
    pixels[:70, :70] = 0
    path = write_tif(tmp_path / "my scene.tif", pixels)
    output = place.here.run("classify.py", str(path))
    folder = place.root / "outputs/classify/my scene"
    with rasterio.open(path) as scene, rasterio.open(folder / "classes.tif") as raster:
        classes = raster.read(1)
        assert raster.crs == scene.crs and raster.shape == (12, 10) and raster.nodata == NO_CLASS
        assert (raster.bounds.left, raster.bounds.top) == (scene.bounds.left, scene.bounds.top)
        assert raster.res == (160, 160) and raster.bounds.right == scene.bounds.left + 1600
        red, green, blue, _ = raster.colormap(1)[CLASSES.index("SeaLake")]
        assert f"#{red:02X}{green:02X}{blue:02X}" == MAP_COLOURS[CLASSES.index("SeaLake")]
    with rasterio.open(folder / "probabilities.tif") as raster:
        percent = raster.read()
        assert raster.descriptions == CLASSES and percent.dtype == np.uint8
    known = classes != NO_CLASS
    assert not known[:4, :4].any() and known[5:].all() and known[:, 5:].all()  # no-data stays no-data
    assert np.array_equal(percent[:, ~known], np.full_like(percent[:, ~known], NO_CLASS))
    assert (abs(percent[:, known].sum(0, dtype=int) - 100) <= 5).all()
    best = np.take_along_axis(percent, np.minimum(classes, 9)[None], axis=0)[0]
    assert (best[known] == percent.max(0)[known]).all()
    shares = {row["class_name"]: float(row["share"]) for row in csv.DictReader((folder / "shares.csv").open())}
    assert shares["River"] == pytest.approx((classes == CLASSES.index("River")).sum() / known.sum(), abs=1e-5)
    with Picture.open(folder / "map.png") as picture:
        assert picture.width > picture.height > 400
    assert "10 x 12 cells of 160 m" in output and not list(place.root.rglob("*.partial"))


def test_an_interrupted_map_leaves_nothing(place, tmp_path, monkeypatch):
    def interrupt(*arguments, **keywords):
        raise KeyboardInterrupt

    path = write_tif(tmp_path / "scene.tif", stitched(place.sample, "rgb"))
    monkeypatch.setattr("engine.maps.predict_images", interrupt)
    status, _, error = place.here.finish("classify.py", str(path))
    assert status == 130 and error.strip().endswith("interrupted")
    assert not (place.root / "outputs/classify").exists()


def test_strips_are_read_as_the_whole(place, tmp_path, monkeypatch):
    final, path = final_model("rgb"), write_tif(tmp_path / "scene.tif", stitched(place.sample, "rgb"))
    with open_image(path) as image:
        whole = map_scene(image, final, None, stride=16)
        monkeypatch.setattr("engine.maps.STRIP", 2)
        monkeypatch.setattr("engine.maps.BATCH_SIZE", 7)
        strips = map_scene(image, final, None, stride=16)
    assert np.allclose(whole.probabilities, strips.probabilities, atol=1e-5)


# Units and bands -------------------------------------------------------------------------------------------------


def safe(folder, pixels, bands=MS_BANDS, metadata=None, suffix="{}"):
    """A product as Copernicus delivers it, its bands of 20 and 60 m as large as they are there."""
    images = folder / "S2A_MSIL1C_20220701.SAFE" / "GRANULE" / "L1C_T32" / "IMG_DATA"
    images.mkdir(parents=True)
    for band in bands:
        step = 6 if band in ("B01", "B09", "B10") else 1 if band in ("B02", "B03", "B04", "B08") else 2
        plane = pixels[::step, ::step, MS_BANDS.index(band)]
        place = Affine(10 * step, 0, 600000, 0, -10 * step, 5300000)
        name = suffix.format(band)
        write_tif(images / f"T32TQM_20220701T101031_{name}.tif", plane, transform=place)
    write_tif(images / "MSK_QUALIT_B02.tif", plane)
    if metadata is not None:
        (images.parents[2] / "MTD_MSIL1C.xml").write_text(metadata)
    return images.parents[2]


def metadata(offset):
    bands = "".join(f'<RADIO_ADD_OFFSET band_id="{i}">{offset}</RADIO_ADD_OFFSET>' for i in range(13))
    return f'<n1:Product xmlns:n1="https://example.org"><Offsets>{bands}</Offsets></n1:Product>'


SMOOTH = np.full((192, 192, 13), 100, np.uint16) * np.arange(11, 24, dtype=np.uint16)


def test_a_product_is_read_by_band_names_on_the_grid_of_10_m(tmp_path):
    path = safe(tmp_path, SMOOTH, metadata=metadata(-1000))
    pixels, notes = pixels_of(path)
    assert np.array_equal(pixels, SMOOTH - 1000)  # B8A last, whatever the folder's order
    assert "MTD_MSIL1C.xml states an offset of -1000, which is added to all values" in notes
    inner, notes = pixels_of(path / "GRANULE/L1C_T32/IMG_DATA", ("B8A", "B04"))
    assert np.array_equal(inner, (SMOOTH - 1000)[:, :, [12, 3]])


def test_nothing_is_taken_off_without_metadata_or_an_offset_in_it(tmp_path):
    for place, text, says in (("a", None, "has no metadata"), ("b", "<Product/>", "states no offset")):
        pixels, notes = pixels_of(safe(tmp_path / place, SMOOTH, metadata=text))
        assert np.array_equal(pixels, SMOOTH) and says in notes[0]


def test_level_2a_is_taken_with_a_warning_and_the_finest_of_each_band(place, tmp_path):
    pixels = np.tile(stitched(place.sample, "ms", 1), (3, 3, 1))
    bands = [band for band in MS_BANDS if band != "B10"]
    path = safe(tmp_path, pixels, bands, suffix="{}_20m")
    folder = path / "GRANULE/L1C_T32/IMG_DATA"
    write_tif(folder / "T32TQM_20220701T101031_B02_60m.tif", pixels[::6, ::6, 1])
    write_tif(folder / "T32TQM_20220701T101031_SCL_20m.tif", pixels[::2, ::2, 1])
    assert np.array_equal(pixels_of(path, ("B02",))[0], pixels[:, :, 1:2])
    assert "level 2A" in place.here.run("classify.py", str(path))


def test_rgb_of_16_bits_is_stretched_as_the_jpegs_are(tmp_path):
    assert stretched(np.array([0, 1375, 2750, 9000])).tolist() == [1, 128, 255, 255]
    path = write_tif(tmp_path / "a.tif", SMOOTH[:64, :64, [3, 2, 1]])
    pixels, notes = pixels_of(path, ("B04", "B03", "B02"))
    assert pixels.dtype == np.uint8 and np.array_equal(pixels, stretched(SMOOTH[:64, :64, [3, 2, 1]]))
    assert any("red, green, blue" in note for note in notes)


def test_names_in_the_file_win_over_their_order(tmp_path, sample):
    pixels = read_image(str(sample / tif("Forest")), "ms")
    order = [MS_BANDS.index(band) for band in SPECTRAL_ORDER]
    names = [band.replace("B0", "B") for band in SPECTRAL_ORDER]  # as Earth Engine writes them
    read, _ = pixels_of(write_tif(tmp_path / "named.tif", pixels[:, :, order], names))
    assert np.array_equal(read, pixels)
    with pytest.raises(UserError, match=r"B12 B8A; if yours is .*B08 B8A B09"):
        pixels_of(write_tif(tmp_path / "unnamed.tif", pixels[:, :, order]))


def test_no_data_of_the_raster_and_of_an_alpha_band_is_zero(tmp_path):
    pixels = SMOOTH[:64, :64, [3, 2, 1]].copy()
    pixels[:9] = 65535
    for path in (
        write_tif(tmp_path / "a.tif", pixels, nodata=65535),
        write_tif(
            tmp_path / "b.tif",
            np.dstack([pixels, np.where(pixels[..., :1] == 65535, 0, 65535).astype(np.uint16)]),
            photometric="RGB",
            alpha="YES",
        ),
    ):
        read, _ = pixels_of(path, ("B04", "B03", "B02"))
        assert not read[:9].any() and read[9:].all(), path


# Unlike the training set -----------------------------------------------------------------------------------------


def test_what_is_no_patch_is_marked(place, tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    Picture.fromarray(noise).save(tmp_path / "noise.png")
    output = place.here.run("classify.py", str(tmp_path / "noise.png"))
    assert "UNLIKE the training set: distance" in output and "wrote outputs/demo/rgb/features.pt" in output
    config.dataset_root = place.root / "nowhere"  # not needed any longer
    again = place.here.run("classify.py", str(tmp_path / "noise.png"), str(place.sample / jpeg("Forest")))
    assert again.count("UNLIKE") == 1 and "wrote outputs/demo/rgb/features.pt" not in again


def test_without_the_data_set_nothing_is_marked_and_that_is_said(place, tmp_path):
    (place.root / "outputs/demo/rgb/features.pt").unlink(missing_ok=True)
    path, config.dataset_root = place.sample / jpeg("Forest"), place.root / "nowhere"
    output = place.here.run("classify.py", str(path))
    assert "unlike the training set are not marked" in output and str(path) in output


def test_the_threshold_lets_99_percent_of_val_pass():
    torch.manual_seed(0)
    train, val = torch.randn(300, 20), torch.randn(200, 20)
    known = compare(train, val)
    images = torch.randn(2, 3, 64, 64)
    assert statistics(images).shape == (2, 33) and statistics(torch.zeros(1, 6, 64, 64)).isfinite().all()
    distances = torch.cdist((val - known.mean) @ known.whitening, known.features.float()).amin(1)
    assert (distances > known.threshold).sum() == 2


# Refused ---------------------------------------------------------------------------------------------------------


def grey(folder, sample):
    """has 1 band; 3 (red, green, blue) or 13 are needed"""
    Picture.fromarray(np.ones((64, 64), np.uint8)).save(folder / "a.png")
    return folder / "a.png"


def five_bands(folder, sample):
    """has 5 bands; 3 (red, green, blue) or 13 are needed"""
    return write_tif(folder / "a.tif", SMOOTH[:64, :64, :5])


def too_small(folder, sample):
    """has 80 x 63 pixels; 64 x 64 are the least"""
    Picture.fromarray(np.ones((63, 80, 3), np.uint8)).save(folder / "a.png")
    return folder / "a.png"


def no_image(folder, sample):
    """is damaged or no JPEG, PNG or GeoTIFF"""
    (folder / "a.jpg").write_text("no image")
    return folder / "a.jpg"


def half_a_jpeg(folder, sample):
    """is damaged or no JPEG, PNG or GeoTIFF"""
    (folder / "a.jpg").write_bytes((sample / jpeg("Forest")).read_bytes()[:1000])
    return folder / "a.jpg"


def half_a_tif(folder, sample):
    """is damaged"""
    (folder / "a.tif").write_bytes((sample / tif("Forest")).read_bytes()[:30000])
    return folder / "a.tif"


def missing(folder, sample):
    """does not exist"""
    return folder / "a.jpg"


def fractions(folder, sample):
    """holds float32; reflectances x 10,000 in 16 bits are needed"""
    return write_tif(folder / "a.tif", np.ones((64, 64, 3), np.float32))


def no_data(folder, sample):
    """holds no-data only"""
    return write_tif(folder / "a.tif", np.zeros((64, 64, 13), np.uint16))


def scene_of_no_data(folder, sample):
    """holds no window of 64 x 64 pixels with data"""
    return write_tif(folder / "a.tif", np.zeros((100, 100, 3), np.uint8))


def empty_folder(folder, sample):
    """has no single-band files"""
    return folder


def bands_missing(folder, sample):
    """has no B11, B12 (it has B02, B03, B04, B08), which the multispectral model needs"""
    return safe(folder, SMOOTH, ("B02", "B03", "B04", "B08"))


def damaged_metadata(folder, sample):
    """MTD_MSIL1C.xml is damaged"""
    return safe(folder, SMOOTH, metadata="<Product>")


REFUSED = (
    *(grey, five_bands, too_small, no_image, half_a_jpeg, half_a_tif, missing, fractions, no_data, scene_of_no_data),
    *(empty_folder, bands_missing, damaged_metadata),
)


@pytest.mark.parametrize("case", REFUSED, ids=lambda case: case.__name__)
def test_bad_input_ends_in_one_line(place, tmp_path, case):
    folder = tmp_path / "own"
    folder.mkdir()
    path = case(folder, place.sample)
    assert case.__doc__ in place.here.refused("classify.py", str(place.sample / jpeg("River")), str(path))
    assert not (place.root / "outputs/classify").exists()


def test_no_model_of_the_kind(place):
    model_path(outputs_dir("rgb")).unlink()
    line = place.here.refused("classify.py", str(place.sample / jpeg("River")))
    assert "there is no model outputs/demo/rgb/final_model.pt; run: python train_rgb.py" in line


def test_two_scenes_of_one_name_are_refused(place, tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        write_tif(tmp_path / name / "scene.tif", np.ones((100, 100, 3), np.uint8))
    line = place.here.refused("classify.py", str(tmp_path / "a/scene.tif"), str(tmp_path / "b/scene.tif"))
    assert "would be written to the same folder" in line

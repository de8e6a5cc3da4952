"""classify.py: patches, scenes and their maps; bands, units, grids and products as people have them; what it refuses."""

import csv
import itertools
import json
import os
import re
import shutil
import zipfile
from dataclasses import replace
from pathlib import Path

from base.files import save_tensors, sha256
from base.project import CLASSES, MS, MS_BANDS, RGB, TASKS, config
from base.setting import Setting

import numpy as np
import pytest
import rasterio
import rasterio.shutil
import torch
from conftest import CODE, Here, jpeg, tif
from PIL import Image as Picture
from rasterio.enums import ColorInterp
from rasterio.features import rasterize
from rasterio.warp import transform_geom

import classify
from dataset import read_image
from engine.final_model import FinalModel, load_model, model_path
from engine.splits import read_splits, splits_hash
from models import build_model
from scenes.files import SPECTRAL_ORDER, possible_bands
from scenes.map_figure import MAP_COLOURS, land_use_map
from scenes.maps import NO_CLASS, LandUse, map_scene, predict_images, write_map
from scenes.novelty import reference_features, statistics
from scenes.opening import jpeg_pixels, open_image
from scenes.shared import shared_layers, standardised

RED_GREEN_BLUE = ("B04", "B03", "B02")
SIX = ("B04", "B03", "B02", "B08", "B11", "B12")
UTM = {"crs": "EPSG:32632", "transform": rasterio.Affine(10, 0, 600000, 0, -10, 5300000)}
WAVES = (np.indices((192, 192)).sum(0) % 37)[..., None]
# (192, 192, 13) uint16 without structure that resampling changes much; B10 is dark, the others are above 1,000.
SMOOTH = (np.arange(11, 24) * 100 + WAVES).astype(np.uint16)
SMOOTH[..., 9] = 12
VIRGINIA = CODE / "sample/scene/virginia.tif"  # a real scene, (128, 128, 13)


@pytest.fixture
def classified(here) -> Here:
    """A project root with lists of the sample and an untrained model of each kind; its scripts run in this process."""
    here.run("split_data.py")
    for task in TASKS.values():
        torch.manual_seed(0)
        setting, lists = task.settings[-1], read_splits(task.splits, task)
        mean, std = {"rgb": (100 / 255, 40 / 255), "ms": (1500 / 65535, 700 / 65535)}[task.name]
        content = {
            **{key: {} for key in ("val", "images", "runs", "versions")},
            **{"task": task.name, "run": "", "epoch": 1, "seed": 0, "initial_weights": None},
            **{"splits_sha256": splits_hash(lists), "classes": list(CLASSES), "bands": list(setting.bands)},
            **{name: torch.full((len(setting.bands),), value) for name, value in (("mean", mean), ("std", std))},
            **{"setting": setting.values(), "model": build_model(setting, weights=None).state_dict()},
        }
        save_tensors(model_path(task), content)
    return here


def write_tif(path, pixels, names=None, colours=None, scales=None, offsets=None, **profile):
    """(rows, columns, bands), or one band (rows, columns), in UTM zone 32."""
    planes = np.atleast_3d(pixels).transpose(2, 0, 1)
    shape = {"count": len(planes), "height": planes.shape[1], "width": planes.shape[2], "dtype": planes.dtype}
    path.parent.mkdir(parents=True, exist_ok=True)
    with rasterio.open(path, "w", **{"driver": "GTiff", **shape, **UTM, **profile}) as raster:
        raster.write(planes)
        tags = {"descriptions": names, "colorinterp": colours, "scales": scales, "offsets": offsets}
        for name, values in tags.items():
            if values:
                setattr(raster, name, values)
    return path


def stitched(task, side=3):
    """side x side patches of the sample as one scene: (64 side, 64 side, bands)."""
    name_of = {"rgb": jpeg, "ms": tif}[task.name]
    patches = [read_image(str(config.dataset_root / name_of(CLASSES[i % 10], i // 10)), task) for i in range(side**2)]
    return np.concatenate([np.concatenate(patches[row * side :][:side], axis=1) for row in range(side)])


def read(path, bands=SIX):
    """The image's pixels, and what is said of it."""
    with open_image(path) as image:
        return image.read(bands), "\n".join(image.notes)


def pick(pixels, bands=SIX):
    return pixels[..., [MS_BANDS.index(band) for band in bands]]


def model_of(task):
    return load_model(task, torch.device("cpu"))


def test_a_patch_has_one_line_and_a_row_with_the_models_answer(classified):
    names = [(config.dataset_root / jpeg("River"), RGB), (config.dataset_root / tif("Forest"), MS)]
    output = classified.run("classify.py", *(str(path) for path, _ in names))
    rows = list(csv.DictReader((config.project_root / "outputs/classify/patches.csv").open()))
    assert [row["file"] for row in rows] == [str(path) for path, _ in names]
    for row, (path, task) in zip(rows, names, strict=True):
        final = model_of(task)
        pixels = read_image(str(path), task)[:, :, [task.bands.index(band) for band in final.bands]]
        best = predict_images(final, pixels[None], None, final.setting.views)[0][0].topk(2)
        assert [row["class_name"], row["runner_up"]] == [CLASSES[i] for i in best.indices]
        assert float(row["probability"]) == pytest.approx(float(best.values[0]), abs=1e-4)
        assert f"{row['file']}: {row['class_name']} " in output and f", then {row['runner_up']} " in output
    assert "8-bit RGB is taken as EuroSAT's stretch" in output


def test_the_model_of_all_images_answers_for_that_of_course_and_is_named(classified):
    patch, table = str(config.dataset_root / jpeg("River")), config.project_root / "outputs/classify/patches.csv"
    for part in ("outputs", "splits"):
        (config.project_root / part / "demo").rename(config.project_root / part / "course")
    config.profile = "course"
    for profile in ("course", "full"):
        if profile == "full":
            shutil.copytree(config.project_root / "outputs/course", config.project_root / "outputs/full")
        assert f"outputs/{profile}/rgb/final_model.pt" in classified.run("classify.py", patch)
        (row,) = csv.DictReader(table.open())
        path = config.project_root / row["model"]
        assert row["model"] == f"outputs/{profile}/rgb/final_model.pt"
        assert row["model_sha256"] == sha256(path.read_bytes())


def test_a_patch_in_any_form_becomes_what_the_model_was_trained_on(sample, tmp_path):
    """EuroSAT's JPEG stays as it is; its 16-bit tif becomes the JPEG's pixels, bit for bit."""
    patch, reflectances = read_image(str(sample / jpeg("Forest")), RGB), read_image(str(sample / tif("Forest")), MS)
    Picture.fromarray(patch).save(tmp_path / "a.png")
    forms = {
        sample / jpeg("Forest"): patch,
        tmp_path / "a.png": jpeg_pixels(patch),
        write_tif(tmp_path / "a.tif", pick(reflectances, RGB.bands)): patch,
        write_tif(tmp_path / "b.tif", pick(reflectances, RGB.bands) / 1e4): patch,
    }
    for path, expected in forms.items():
        with open_image(path) as image:
            assert np.array_equal(image.training_pixels("rgb", RGB.bands), expected), path
    assert np.array_equal(read(sample / tif("Forest"), MS_BANDS)[0], reflectances)


@pytest.mark.parametrize("task", TASKS.values(), ids=TASKS)
def test_without_overlap_each_cell_is_the_networks_answer_for_its_patch(classified, tmp_path, task):
    final, path = model_of(task), write_tif(tmp_path / "scene.tif", stitched(task))
    with open_image(path) as image:
        land_use = map_scene(image, final, None, stride=64)
        pixels = image.training_pixels(task.name, final.bands)
    patches = pixels.reshape(3, 64, 3, 64, -1).swapaxes(1, 2).reshape(9, 64, 64, -1)
    alone, _ = predict_images(final, patches, None, views=1)
    assert np.allclose(land_use.probabilities.reshape(10, 9).T, alone, atol=1e-5)
    assert np.array_equal(land_use.classes.ravel(), alone.argmax(1))


def test_a_scene_becomes_a_map_in_its_place(classified, tmp_path):
    pixels = stitched(RGB)[:, :170]  # no multiple of a cell
    pixels[:70, :70] = 0
    path = write_tif(tmp_path / "my scene.tif", pixels)
    output = classified.run("classify.py", str(path))
    folder = config.project_root / "outputs/classify/my scene"
    with rasterio.open(path) as scene, rasterio.open(folder / "classes.tif") as raster:
        classes = raster.read(1)
        assert raster.crs == scene.crs and raster.shape == (12, 11) and raster.nodata == NO_CLASS
        assert (raster.bounds.left, raster.bounds.top) == (scene.bounds.left, scene.bounds.top)
        assert raster.res == (160, 160) and raster.bounds.right == scene.bounds.left + 11 * 160
        red, green, blue, _ = raster.colormap(1)[CLASSES.index("SeaLake")]
        assert f"#{red:02X}{green:02X}{blue:02X}" == MAP_COLOURS[CLASSES.index("SeaLake")]
    with rasterio.open(folder / "probabilities.tif") as raster:
        percent = raster.read()
        assert raster.descriptions == CLASSES and percent.dtype == np.uint8
    has_class = classes != NO_CLASS
    assert not has_class[:4, :4].any() and has_class[5:].all() and has_class[:, 5:].all()  # no-data stays no-data
    assert (percent[:, ~has_class] == NO_CLASS).all() and (
        abs(percent[:, has_class].sum(0, dtype=int) - 100) <= 5
    ).all()
    best = np.take_along_axis(percent, np.minimum(classes, 9)[None], axis=0)[0]
    assert (best[has_class] == percent.max(0)[has_class]).all()
    counts = np.pad(pixels.any(-1), ((0, 0), (0, 6))).reshape(12, 16, 11, 16).sum((1, 3))  # the last cells hang over
    river, rows = classes == CLASSES.index("River"), list(csv.DictReader((folder / "shares.csv").open()))
    assert float(rows[CLASSES.index("River")]["share"]) == pytest.approx(
        counts[river].sum() / counts[has_class].sum(), abs=1e-5
    )
    assert {row["model_sha256"] for row in rows} == {model_of(RGB).sha256}
    assert sum(float(row["hectares"]) for row in rows) == pytest.approx(counts[has_class].sum() / 100)
    with Picture.open(folder / "map.png") as picture:
        assert picture.width > picture.height > 400
    assert "11 x 12 cells of 160 m" in output and not list(config.project_root.rglob("*.partial"))


def test_the_files_of_a_map_say_the_same(tmp_path):
    """Names where GIS programs look for them; percentages; polygons that, drawn again, are the map."""
    random = np.random.default_rng(0)
    probabilities = random.dirichlet(np.full(10, 0.2), (12, 11)).transpose(2, 0, 1).astype(np.float32)
    probabilities[:, 4:7, 4:7] = np.eye(10, dtype=np.float32)[8][:, None, None]  # a polygon with a hole
    probabilities[:, 5, 5] = np.nan
    land_use = LandUse(probabilities, random.random((12, 11)) < 0.3, np.full((12, 11), 256), 16)
    with open_image(write_tif(tmp_path / "scene.tif", np.ones((192, 170, 3), np.uint8))) as image:
        write_map(tmp_path, image, land_use, MAP_COLOURS)
    classes, has_class = land_use.classes, land_use.classes != NO_CLASS
    with rasterio.open(tmp_path / "classes.tif") as raster:
        assert np.array_equal(raster.read(1), classes) and raster.crs == UTM["crs"]
        assert raster.transform == UTM["transform"] @ rasterio.Affine.scale(16)
        crs, place = raster.crs, {"out_shape": raster.shape, "transform": raster.transform}
    rasterio.shutil.copy(tmp_path / "classes.tif", tmp_path / "read.vrt", driver="VRT")  # what GDAL has read
    assert re.findall("<Category>(.+?)</Category>", (tmp_path / "read.vrt").read_text()) == list(CLASSES)
    with rasterio.open(tmp_path / "uncertainty.tif") as raster:
        uncertainty, nodata = raster.read(1), raster.nodata
        assert raster.descriptions == ("percent: one minus the largest probability",)
    expected = 100 * (1 - probabilities.max(0)[has_class])
    assert abs(uncertainty[has_class] - expected).max() <= 0.51 and (uncertainty[~has_class] == nodata).all()
    with rasterio.open(tmp_path / "unlike.tif") as raster:
        assert np.array_equal(raster.read(1), np.where(has_class, land_use.unlike, NO_CLASS))
    features = json.loads((tmp_path / "polygons.geojson").read_text())["features"]
    indices = [CLASSES.index(feature["properties"]["class_name"]) for feature in features]
    geometries = [transform_geom("EPSG:4326", crs, feature["geometry"]) for feature in features]
    assert np.array_equal(rasterize(zip(geometries, indices, strict=True), **place, fill=NO_CLASS), classes)
    hectares = [feature["properties"]["hectares"] for feature in features]
    assert np.allclose(np.bincount(indices, hectares), np.bincount(classes[has_class]) * 2.56)
    assert all(9 < x < 12 and 47 < y < 48 for feature in features for x, y in feature["geometry"]["coordinates"][0])


def test_a_real_scene_lies_where_it_was(classified):
    output = classified.run("classify.py", str(VIRGINIA))
    assert "multispectral model" in output and "8 x 8 cells of 160 m" in output and "baseline" not in output
    folder = config.project_root / "outputs/classify/virginia"
    features = json.loads((folder / "polygons.geojson").read_text())["features"]
    points = np.concatenate([ring for feature in features for ring in feature["geometry"]["coordinates"]])
    assert np.allclose(points.min(0), (-75.6168, 37.6961), atol=1e-4) and np.allclose(
        points.max(0), (-75.6022, 37.7077), atol=1e-4
    )


@pytest.mark.parametrize("shape", [(60, 60), (20, 90), (90, 20)])
def test_the_legend_runs_into_nothing(tmp_path, monkeypatch, shape):
    drawn = []
    monkeypatch.setattr("scenes.map_figure.save", lambda figure, *_, **__: drawn.append(figure))
    probabilities = np.random.default_rng(0).random((10, *shape), np.float32)
    land_use = LandUse(probabilities, probabilities[0] > 0.9, np.full(shape, 256), 16)
    land_use_map(tmp_path / "map.png", np.zeros((*shape, 3), np.uint8), land_use, tuple(16 * n for n in shape), 10)
    (figure,) = drawn
    figure.draw_without_rendering()
    (legend,) = figure.legends
    boxes = [text.get_window_extent() for text in legend.get_texts()]
    assert len(boxes) == 11 and all(re.match(r"\d+\.\d % \w", text.get_text()) for text in legend.get_texts())
    assert all(handle.get_window_extent().x1 < box.x0 for handle, box in zip(legend.get_patches(), boxes, strict=True))
    assert all(upper.y0 >= lower.y1 for upper, lower in itertools.pairwise(boxes))
    assert max(box.x1 for box in boxes) <= figure.bbox.x1 and boxes[0].y1 <= figure.bbox.y1 and boxes[-1].y0 >= 0
    assert max(axes.get_window_extent().x1 for axes in figure.axes) < legend.get_window_extent().x0


@pytest.mark.parametrize("during", ["scenes.shared.standardised", "scenes.maps.shapes"])
def test_an_interrupted_map_leaves_nothing(classified, tmp_path, monkeypatch, during):
    def interrupt(*arguments, **keywords):
        raise KeyboardInterrupt

    path = write_tif(tmp_path / "scene.tif", stitched(RGB))
    monkeypatch.setattr(during, interrupt)
    status, _, error = classified.finish("classify.py", str(path))
    assert status == 130 and error.strip().endswith("interrupted")
    written = {path.name for path in (config.project_root / "outputs/classify").rglob("*.*")}
    rasters = {f"{name}.tif" for name in ("classes", "probabilities", "uncertainty", "unlike")}
    assert written == (rasters | {"classes.tif.aux.xml"} if during == "scenes.maps.shapes" else set())


def untrained(task: str, **values) -> FinalModel:
    groups = {"ms": {"band_groups": (SIX[:3], SIX[3:]), "fusion": "concat"}}.get(task, {})
    setting = Setting("new", "mild", epochs=1, weights=None, **{"backbone": "shufflenet_v2_x0_5", **groups, **values})
    torch.manual_seed(0)
    nothing = torch.zeros(len(setting.bands))
    return FinalModel(build_model(setting, weights=None), nothing, nothing, setting, {"task": task}, "", "")


def lively(task: str, **values) -> tuple[FinalModel, np.ndarray]:
    """An untrained network whose answers differ from place to place on the real scene, and the scene's pixels."""
    final = untrained(task, **values)
    with open_image(VIRGINIA) as image:
        pixels = image.training_pixels(task, final.bands)
    scaled = torch.tensor(pixels / np.iinfo(pixels.dtype).max, dtype=torch.float32).flatten(0, 1)
    final = replace(final, mean=scaled.mean(0), std=scaled.std(0))
    windows = standardised(final, np.stack([pixels[16 * y :, 16 * x :][:64, :64] for y, x in np.ndindex(5, 5)]))
    model = final.model.train()
    with torch.no_grad():
        for _ in range(10):
            model(windows)  # for the statistics of batch norm
        features = model.eval().embed(windows)
        model.linear.weight.mul_(10 / features.std(0).mean())
        model.linear.bias.copy_(-model.linear.weight @ features.mean(0))
    return final, pixels


def map_of_virginia(final: FinalModel) -> LandUse:
    with open_image(VIRGINIA) as image:
        return map_scene(image, final, None, stride=16)


def test_strips_and_tiles_are_read_as_the_whole(monkeypatch):
    final, _ = lively("ms", image_size=128)
    whole = map_of_virginia(final)
    for name, value in (("maps.STRIP", 2), ("shared.TILE", 3), ("shared.BATCH_SIZE", 7)):
        monkeypatch.setattr(f"scenes.{name}", value)
    strips = map_of_virginia(final)
    assert whole.probabilities.std() > 0.1 and np.allclose(whole.probabilities, strips.probabilities, atol=1e-4)
    assert np.array_equal(whole.pixels, strips.pixels) and whole.pixels.sum() == 128 * 128


@pytest.mark.parametrize("task", TASKS)
def test_windows_that_share_layers_keep_their_edges_and_classes(monkeypatch, task):
    """Only in their corners they see their neighbours."""
    final, pixels = lively(task, image_size=64)
    layers, recorded = shared_layers(final, 16), []
    recording = replace(layers, rest=lambda maps: recorded.append(maps) or layers.rest(maps))
    (((rows, columns), *_),) = recording.predict(pixels, np.ones((5, 5), bool), None)
    windows = np.stack([pixels[y:, x:][:64, :64] for y, x in zip(16 * rows, 16 * columns, strict=True)])
    with torch.inference_mode():
        alone = layers.first(standardised(final, windows).unflatten(1, (-1, 3)).flatten(0, 1))
    same = torch.isclose(recorded[0], alone, atol=1e-4).all(dim=(0, 1))
    begin, end = torch.arange(8) < layers.before, torch.arange(8) >= 8 - layers.after
    corners = (begin | end)[:, None] & (begin | end)
    assert len(rows) == 25 and torch.equal(same, ~corners)
    final, _ = lively(task, image_size=128)
    shared = map_of_virginia(final)
    monkeypatch.setattr("scenes.maps.shared_layers", lambda *_: None)
    separate = map_of_virginia(final)
    assert len(np.unique(separate.classes)) > 1 and (shared.classes == separate.classes).mean() >= 0.9


def test_windows_share_nothing_where_that_would_change_them():
    small = untrained("rgb", image_size=64)
    assert shared_layers(small, 16) and shared_layers(untrained("ms", image_size=64), 16)
    assert not shared_layers(small, 64)  # no overlap
    assert not shared_layers(untrained("rgb", image_size=112), 16)  # 16 pixels become 28, no multiple of 8
    assert not shared_layers(
        untrained("rgb", image_size=64, backbone="mobilenet_v3_small"), 16
    )  # looks at the whole image
    for fusion in ({"fusion": "add"}, {"fusion": "early"}, {"fusion": "attention"}, {"separate_backbones": True}):
        assert not shared_layers(untrained("ms", image_size=64, **fusion), 16), fusion


@pytest.mark.parametrize(
    ("band", "names"),
    [
        ("B02", ("B02", "B2", "b02", "Blue", "B02 - Blue", "Band 2", "B2, central wavelength 490 nm", "SR_B02")),
        ("B05", ("rededge1", "Red Edge 1", "rededge071")),
        ("B8A", ("B8A", "b8a", "nir08", "T32UNC_20180718T101031_B8A_20m")),
        ("B11", ("swir16", "B11 (SWIR 1)")),
        (None, ("QA60", "SCL", "ndvi", "red edge", "MSK_QUALIT_B02", "sur_refl_b02", "ST_B10", "B08 / B04", "")),
    ],
)
def test_names_of_bands(band, names):
    assert {name: possible_bands(name) for name in names} == {name: {band} - {None} for name in names}


def test_a_file_goes_to_the_model_whose_bands_it_has(classified, tmp_path):
    scene = stitched(MS, 1).repeat(2, 0)
    cases = {
        "six": ([*SIX, "SCL"], [*SIX, "B02"], "left out, as no bands of Sentinel-2: SCL"),
        "rgbn": (["B4", "B3", "B2", "B8"], ["B04", "B03", "B02", "B08"], "only red, green and blue are used"),
        "bgr": (["blue", "green", "red"], ["B02", "B03", "B04"], "bands by the names in the file, B02 B03 B04"),
    }
    files = [write_tif(tmp_path / f"{case}.tif", pick(scene, b), names) for case, (names, b, _) in cases.items()]
    output = classified.run("classify.py", *map(str, files))
    assert all(note in output for *_, note in cases.values())
    assert output.count("only red, green and blue are used") == 1
    folder = config.project_root / "outputs/classify"
    assert (folder / "rgbn/probabilities.tif").read_bytes() == (folder / "bgr/probabilities.tif").read_bytes()


def test_names_win_over_order_and_colours_over_nothing(tmp_path, sample):
    pixels = read_image(str(sample / tif("Forest")), MS)
    names = [band.replace("B0", "B") for band in SPECTRAL_ORDER]  # as Earth Engine writes them
    assert np.array_equal(read(write_tif(tmp_path / "a.tif", pick(pixels, SPECTRAL_ORDER), names))[0], pick(pixels))
    colours = [ColorInterp[name] for name in ("blue", "green", "red", "alpha")]
    blue_first = np.dstack([pick(pixels, RED_GREEN_BLUE[::-1]), np.full((64, 64), 65535, np.uint16)])
    found, notes = read(write_tif(tmp_path / "b.tif", blue_first, colours=colours), RGB.bands)
    assert np.array_equal(found, pick(pixels, RGB.bands)) and "alpha" in notes
    found, _ = read(write_tif(tmp_path / "c.tif", pixels, [f"b{i}" for i in range(1, 14)]))  # they only count
    assert np.array_equal(found, pick(pixels))


def test_units_that_the_file_states_are_applied(tmp_path):
    tags = {"scales": [1e-4] * 13, "offsets": [-0.1] * 13}
    pixels, notes = read(write_tif(tmp_path / "a.tif", SMOOTH + np.uint16(1000), MS_BANDS, **tags))
    assert np.array_equal(pixels, pick(SMOOTH)) and "x 0.0001 -0.1" in notes and "baseline" not in notes
    pixels, notes = read(write_tif(tmp_path / "b.tif", (SMOOTH / 1e4).astype(np.float32), MS_BANDS))
    assert np.array_equal(pixels, pick(SMOOTH)) and "from 0 to 1 are multiplied" in notes
    snow = pick(SMOOTH)
    snow[:120] = 8000
    _, notes = read(write_tif(tmp_path / "c.tif", snow, SIX))
    assert "baseline 04.00" in notes and "level 2A" in notes and "snow, cloud, or another scale" in notes


@pytest.mark.parametrize("tagged", [False, True])
@pytest.mark.parametrize("value", [np.uint16(0), np.uint16(65535), np.int16(-9999), np.float32("nan")])
def test_missing_pixels_are_zero(tmp_path, value, tagged):
    pixels = SMOOTH.astype(value.dtype)
    pixels[:50] = value
    options = {"nodata": value} if tagged else {}
    found, _ = read(write_tif(tmp_path / "a.tif", pixels, MS_BANDS, **options))
    assert not found[:50].any() and np.array_equal(found[50:], pick(SMOOTH)[50:])


def test_an_alpha_band_masks_and_water_set_to_zero_is_data(tmp_path):
    colours = [ColorInterp[name] for name in ("red", "green", "blue", "alpha")]
    alpha = np.full((192, 192), 65535, np.uint16)
    alpha[:9] = 0
    masked = np.dstack([pick(SMOOTH, RGB.bands), alpha])
    found, _ = read(write_tif(tmp_path / "a.tif", masked, colours=colours), RGB.bands)
    assert not found[:9].any() and found[9:].all()
    water = pick(SMOOTH)
    water[:50, :, 3:] = 0
    assert np.array_equal(read(write_tif(tmp_path / "b.tif", water, SIX, nodata=0))[0], water)


@pytest.mark.parametrize(
    ("crs", "width", "height", "hectares"),
    [
        ("EPSG:4326", 8.983e-5 / np.cos(np.radians(52)), 8.983e-5, 368.6),
        ("EPSG:4326", 8.983e-5, 8.983e-5, 368.6 * np.cos(np.radians(52))),
        ("EPSG:3857", 10 / np.cos(np.radians(52)), 10 / np.cos(np.radians(52)), 368.6),
        ("EPSG:32632", 20, 20, 4 * 368.6),
    ],
)
def test_other_pixels_are_warped_to_the_utm_zone_at_10_m(tmp_path, crs, width, height, hectares):
    left, top = {"EPSG:4326": (9, 52.01), "EPSG:3857": (1001875, 6802000), "EPSG:32632": (500000, 5766000)}[crs]
    place = {"crs": crs, "transform": rasterio.Affine(width, 0, left, 0, -height, top)}
    with open_image(write_tif(tmp_path / "a.tif", SMOOTH, MS_BANDS, **place)) as image:
        assert str(image.grid["crs"]) == "EPSG:32632" and image.metres == 10
        assert any("are resampled to 10 m" in note for note in image.notes)
        pixels = image.read(SIX)
    assert pixels.any(-1).all() and abs(pixels.any(-1).sum() / 100 / hectares - 1) < 0.02
    assert abs(pixels.mean((0, 1)) - pick(SMOOTH).mean((0, 1))).max() < 5


STEP = {"B01": 6, "B09": 6, "B10": 6, **dict.fromkeys(("B05", "B06", "B07", "B8A", "B11", "B12", "SCL"), 2)}


def pixels_of(step):
    return {"transform": UTM["transform"] @ rasterio.Affine.scale(step)}


def product(folder, name="T32TQM_20220701T101031_{}", bands=MS_BANDS, pixels=SMOOTH, **options):
    """One file for each band, those of 20 and 60 m as large as they are."""
    for band in bands:
        step = STEP.get(band, 1)
        plane = pick(pixels, [band])[::step, ::step]
        write_tif(folder / f"{name.format(band)}.tif", plane, **{**pixels_of(step), **options})
    return folder


def safe(root, offset=0):
    inner = product(root / "S2A_MSIL1C_20220701T101031.SAFE/GRANULE/L1C_T32TQM/IMG_DATA")
    write_tif(inner.parent / "QI_DATA/MSK_QUALIT_B02.tif", SMOOTH[..., 0])
    (inner / "._T32TQM_20220701T101031_B02.tif").write_bytes(b"\x00\x05\x16\x07" + bytes(100))  # a Mac's
    stated = "".join(f'<RADIO_ADD_OFFSET band_id="{i}">{offset}</RADIO_ADD_OFFSET>' for i in range(13))
    (inner.parents[2] / "MTD_MSIL1C.xml").write_text(f'<n1:P xmlns:n1="https://example.org">{stated}</n1:P>')
    return inner.parents[2]


def test_a_product_is_read_in_every_way_that_it_is_given(tmp_path):
    path = safe(tmp_path, -1000)
    with zipfile.ZipFile(tmp_path / "product.SAFE.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for file in path.rglob("*.*"):
            archive.write(file, file.relative_to(tmp_path))
    expected = np.maximum(pick(SMOOTH, RGB.bands).astype(int) - 1000, 0)
    expected[~expected.any(-1)] = 1  # data, however dark
    for given in (path, path / "MTD_MSIL1C.xml", path / "GRANULE/L1C_T32TQM/IMG_DATA", tmp_path / "product.SAFE.zip"):
        pixels, notes = read(given, RGB.bands)
        assert np.array_equal(pixels, expected), given
        assert "MTD_MSIL1C.xml states an offset of -1000, which is added to all values" in notes
    narrow, _ = read(path, ("B8A",))  # from 20 m; the last of EuroSAT's bands
    assert abs(narrow.mean() - (SMOOTH[..., 12].mean() - 1000)) < 5


@pytest.mark.parametrize("name", ["{}", "HLS.S30.T32UNC.v2.0.{}", "SENTINEL2A_FRE_{}", "2018-07-18_S2_{}_(Raw)"])
def test_folders_of_bands_as_others_name_them(tmp_path, name):
    folder = product(tmp_path / "folder", name)
    if "FRE" in name:
        product(folder, name.replace("FRE", "SRE"), pixels=SMOOTH // 2)
    assert np.array_equal(read(folder, RGB.bands)[0], pick(SMOOTH, RGB.bands))


def test_the_scene_classification_masks_level_2a(tmp_path):
    folder = product(tmp_path / "folder", bands=[band for band in MS_BANDS if band != "B10"])
    product(folder, "T32TQM_20220701T101031_{}_60m", ["B02"], SMOOTH[::6, ::6], **pixels_of(6))  # not read
    codes = np.full((96, 96), 4, np.uint8)
    codes[:24], codes[24:48] = 9, 3
    write_tif(folder / "T32TQM_20220701T101031_SCL_20m.tif", codes, **pixels_of(2))
    pixels, notes = read(folder)
    assert not pixels[:96].any() and pixels[96:].any(-1).all()
    assert "masks 50.0%" in notes and "level 2A" in notes


def vrt(path, source):
    source = f'<SourceFilename relativeToVRT="1">{source}</SourceFilename><SourceBand>%d</SourceBand>'
    band = f'<VRTRasterBand dataType="UInt16" band="%d"><SimpleSource>{source}</SimpleSource></VRTRasterBand>'
    bands = "".join(band % (index, index) for index in (1, 2, 3))
    path.write_text(f'<VRTDataset rasterXSize="192" rasterYSize="192">{bands}</VRTDataset>')
    return path


def test_a_vrt_of_local_files_is_read(tmp_path):
    write_tif(tmp_path / "a.tif", pick(SMOOTH, RGB.bands))
    assert np.array_equal(read(vrt(tmp_path / "a.vrt", "a.tif"), RGB.bands)[0], pick(SMOOTH, RGB.bands))


def test_what_is_no_patch_is_marked(classified, tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    Picture.fromarray(noise).save(tmp_path / "noise.png")
    Picture.fromarray(noise).save(tmp_path / "noise.jpg", quality=80)
    forest = str(config.dataset_root / jpeg("Forest"))
    output = classified.run("classify.py", str(tmp_path / "noise.png"))
    assert "UNLIKE the training set: distance" in output and "wrote outputs/demo/rgb/features.pt" in output
    config.dataset_root = tmp_path / "nowhere"  # not needed any longer
    again = classified.run("classify.py", str(tmp_path / "noise.png"), str(tmp_path / "noise.jpg"), forest)
    assert again.count("UNLIKE the") == 1 and "features.pt" not in again
    assert "nothing is marked UNLIKE, as JPEG of quality 80 alone makes an image so" in again


def test_without_the_data_set_nothing_is_marked_and_that_is_said(classified, tmp_path):
    path, config.dataset_root = config.dataset_root / jpeg("Forest"), tmp_path / "nowhere"
    output = classified.run("classify.py", str(path))
    assert "unlike the training set are not marked" in output and str(path) in output


def test_the_threshold_lets_99_percent_of_val_pass():
    torch.manual_seed(0)
    train, val = torch.randn(300, 20), torch.randn(200, 20)
    reference = reference_features(train, val)
    images = torch.randn(2, 3, 64, 64)
    assert statistics(images).shape == (2, 33) and statistics(torch.zeros(1, 6, 64, 64)).isfinite().all()
    distances = torch.cdist((val - reference.mean) @ reference.whitening, reference.features.float()).amin(1)
    assert (distances > reference.threshold).sum() == 2


def bad_inputs(at):
    """(what the line says, path) of one input after another."""

    def tif_of(name, values=SMOOTH, names=MS_BANDS, **options):
        return write_tif(at / f"{name}.tif", values, names, **options)

    def named(*names):
        return tif_of(" ".join(names), SMOOTH[..., : len(names)], names)

    def file(name, content):
        (at / name).write_bytes(content)
        return at / name

    def grey(name, *shape):
        Picture.fromarray(np.ones(shape, np.uint8)).save(at / name)
        return at / name

    def two_scenes(name, first, second, **options):
        product(at / name, first, MS_BANDS[:6])
        return product(at / name, second, MS_BANDS[6:8], **options)

    def metadata(name, text):
        file(f"{safe(at / name).relative_to(at)}/MTD_MSIL1C.xml", text.encode())
        return next((at / name).glob("*.SAFE"))

    def place(crs, side, left, top):
        return {"crs": crs, "transform": rasterio.Affine(side, 0, left, 0, -side, top)}

    yield "has 1 band without names", grey("grey.png", 64, 64)
    yield "has 80 x 63 pixels", grey("small.png", 63, 80, 3)
    yield "has 5 bands without names", tif_of("five", SMOOTH[..., :5], None)
    yield "ambiguous names", named("B1", "B2", "B3", "B4")
    yield "ambiguous names", named("B3 red", "B2 green", "B1 blue")
    yield "has names of Landsat", named("SR_B4", "SR_B3", "SR_B2", "ST_B10")
    yield "has names of Landsat", product(at / "hls", "HLS.L30.T32UNC.2020200T101031.v2.0.{}")
    yield "the RGB model needs B04 B03 B02", named("B01", "B02", "B03")
    yield "not in EuroSAT's order", tif_of("order", pick(SMOOTH, SPECTRAL_ORDER), None)
    yield "values are 1,000 too high", tif_of("raised", SMOOTH + np.uint16(1000), None)
    yield "has hardly a value above 50", tif_of("percent", SMOOTH // 100)
    yield "times 65,535 instead of 10,000", tif_of("bright", SMOOTH * np.uint16(6))
    yield "scale or offset in its tags", tif_of("scale", scales=[0] * 13)
    yield "holds no-data only", tif_of("empty", np.zeros((64, 64, 13), np.uint16))
    yield "no window of 64 x 64 pixels with data", tif_of("black", np.zeros((99, 99, 3), np.uint8), None)
    yield "has pixels of 60 x 60 m", tif_of("coarse", **place("EPSG:32632", 60, 600000, 5300000))
    yield "give it its true position", tif_of("nowhere", **place("EPSG:4326", 1e-4, 9, 952))
    yield "is damaged or cannot be read", file("none.jpg", b"no image")
    yield "is damaged", file("half.jpg", (config.dataset_root / jpeg("Forest")).read_bytes()[:1000])
    yield "is damaged", file("half.tif", (config.dataset_root / tif("Forest")).read_bytes()[:30000])
    yield "does not exist", at / "missing.jpg"
    os.mkfifo(at / "fifo.tif")
    yield "is no regular file", at / "fifo.tif"
    small = grey("giant.jpg", 64, 64, 3).read_bytes()
    yield (
        "claims 65,500 x 65,500 pixels",
        file("giant.jpg", small.replace(b"\x08\0\x40\0\x40", b"\x08\xff\xdc\xff\xdc")),
    )
    (at / "folder").mkdir()
    yield "has no single-band files", at / "folder"
    yield "is damaged or cannot be read", file("a.SAFE.zip", b"no archive")
    yield "has files of several scenes", two_scenes("tiles", "T32TQM_{}", "T32TQN_{}")
    yield "do not show the same ground", two_scenes("zones", "{}", "{}", crs="EPSG:32633")
    yield "do not show the same ground", two_scenes("places", "{}", "{}", **place("EPSG:32632", 10, 600100, 5300000))
    yield "has two files of B02", product(product(at / "twice", "{}") / "b", "{}", ["B02"]).parent
    yield "which is no local file", vrt(at / "network.vrt", "/vsicurl/http://127.0.0.1:9/a.tif")
    yield "is damaged or cannot be read", vrt(at / "itself.vrt", "itself.vrt")
    yield "MTD_MSIL1C.xml is damaged", metadata("cut", "<Product>")
    yield "MTD_MSIL1C.xml is damaged", metadata("band", '<a><RADIO_ADD_OFFSET band_id="99">1</RADIO_ADD_OFFSET></a>')
    yield "MTD_MSIL1C.xml is damaged", metadata("nan", '<a><RADIO_ADD_OFFSET band_id="1">nan</RADIO_ADD_OFFSET></a>')
    yield "MTD_MSIL1C.xml is damaged", metadata("nested", "<a>" * 100_000)


def test_bad_input_ends_in_one_line(classified, tmp_path):
    for message, path in bad_inputs(tmp_path):
        line = classified.refused("classify.py", str(config.dataset_root / jpeg("River")), str(path))
        assert message in line, f"{path}: {line}"
    assert not (config.project_root / "outputs/classify").exists()


def test_no_model_of_the_kind(classified):
    model_path(RGB).unlink()
    line = classified.refused("classify.py", str(config.dataset_root / jpeg("River")))
    assert "there is no model outputs/demo/rgb/final_model.pt; run: python train_rgb.py" in line


def test_damaged_features(classified):
    path = str(config.dataset_root / jpeg("River"))
    classified.run("classify.py", path)
    features = RGB.outputs / "features.pt"
    content = torch.load(features, weights_only=True)
    for change in ({"mean": content["mean"][:3]}, {"features": content["features"] * torch.nan}, {"threshold": "5"}):
        save_tensors(features, {**content, **change})
        assert "features.pt is damaged" in classified.refused("classify.py", path)


def test_names_of_folders(tmp_path):
    plain = ("scene", "my scene (1)", "S2A_MSIL1C_20180718T101031", "Aquileia ü", "product.SAFE")
    assert [classify.folder_name(Path(f"/data/{name}.tif")) for name in plain] == list(plain)
    odd = [
        Path(f"/data/{name}")
        for name in ("...png", "patches.csv.png", "a\nb.tif", "ü" * 120 + ".tif", " .tif", "..tif", "C:\\a.tif")
    ]
    names = [classify.folder_name(path) for path in (*odd, Path("/"))]
    assert len(set(names)) == len(names) and not {"", ".", "..", "patches.csv"} & set(names)
    assert all("/" not in name and "\n" not in name and len(name.encode()) <= 120 for name in names)


def test_two_scenes_of_one_name_are_refused(classified, tmp_path):
    for name in ("a", "b"):
        write_tif(tmp_path / name / "scene.tif", np.ones((100, 100, 3), np.uint8))
    line = classified.refused("classify.py", str(tmp_path / "a/scene.tif"), str(tmp_path / "b/scene.tif"))
    assert "would be written to the same folder" in line

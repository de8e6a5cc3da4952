"""What the data look like, the autoencoder, and what the explorer shows of both: rules by hand, studies on the sample, a browser."""

import csv
import dataclasses
import json
import math
import os
import shutil
from types import SimpleNamespace

from base.project import CLASSES, MS, RGB, config

import numpy as np
import pytest
import torch
from conftest import files_below

from dataset import class_of, patch_of
from engine import plots
from engine.metrics import compute_metrics
from engine.plots import source_of
from engine.splits import read_splits
from studies import autoencoder, explain_errors, explore, explorer, six_bands

BROWSER = [shutil.which(name) for name in ("chromium", "chromedriver")]


@pytest.fixture
def small(place, monkeypatch):
    """A copy of the trained project root, three small autoencoders and coarse figures."""
    monkeypatch.setattr(plots, "DPI", 40)
    monkeypatch.setattr(autoencoder, "CHANNELS", (12, 8, 4))
    monkeypatch.setattr(autoencoder, "TRAINING", dataclasses.replace(autoencoder.TRAINING, epochs=1))
    monkeypatch.setattr(autoencoder, "CHOSEN_EPOCHS", 2)
    return place


def study(task, name) -> dict:
    return json.loads((task.outputs / name / "study.json").read_text())


def table(task, name) -> list[dict[str, str]]:
    return list(csv.DictReader((task.outputs / name).open()))


def data_of(labels: np.ndarray, **values) -> explore.Data:
    """Training images in numbers, without pixels."""
    fields = dict.fromkeys((field.name for field in dataclasses.fields(explore.Data)), None)
    return explore.Data(**fields | {"lists": {"train": SimpleNamespace(labels=labels)}} | values)


def test_what_will_be_hard_by_hand():
    """Of 10 images per class: half of Forest becomes Pasture, 6 of River become three others, Highway is brighter in the east."""
    labels, confusion = np.repeat(np.arange(10), 10), 10 * np.eye(10, dtype=int)
    forest, highway, pasture, river = (CLASSES.index(name) for name in ("Forest", "Highway", "Pasture", "River"))
    confusion[forest, [forest, pasture]] = 5, 5
    confusion[river, [river, forest, highway, pasture]] = 4, 2, 2, 2
    assert explore.most_confused(confusion) == (forest, pasture, 0.25)
    places = np.stack([np.tile(np.arange(10) % 2, 10), np.tile(np.arange(10), 10)], axis=1).astype(float)
    brightness = np.tile([1.0, 1.0, -1.0, -1.0, 0.0], 20)
    brightness[labels == highway] += 3 * (places[labels == highway, 1] >= 5)
    data = data_of(labels, confusion=confusion, places=places, looks=np.stack([brightness, brightness], axis=1))
    label, axis, difference = explore.strongest_place(data)
    assert (label, axis) == (highway, 1) and math.isclose(difference, 3 / math.sqrt(0.8))
    overlap, least, place = explore.what_will_be_hard(data)
    assert overlap.startswith("Forest and Pasture overlap most: 25.0 %")
    assert least.startswith("River is found least (40.0 %")
    assert "Highway depends most on its place: in the east it is brighter than in the west by 3.4" in place


def test_the_discriminant_tells_apart_what_differs_and_folds_keep_one_ground_together(monkeypatch):
    """Classes 0 and 1 have the same features; images 0 and 1, 2 and 3, … show the same ground."""
    used = []
    monkeypatch.setattr(explore, "grounds", lambda train: np.arange(200) // 2)
    monkeypatch.setattr(explore, "folds", lambda *given: used.append(six_bands.folds(*given)) or used[-1])
    labels = np.repeat(np.arange(10), 20)
    random = np.random.default_rng(0)
    features = 10 * np.eye(10)[np.maximum(labels, 1)] + random.normal(size=(200, 10))
    train = SimpleNamespace(labels=labels, files=[""] * 200)
    confusion = explore.discriminant_confusion(features, train)
    assert confusion.sum() == 200 and np.array_equal(confusion[2:], 20 * np.eye(10, dtype=int)[2:])
    assert 8 < confusion[0, 1] + confusion[1, 0] < 32 and confusion[:2, 2:].sum() == 0
    assert np.array_equal(used[0][::2], used[0][1::2]) and len(set(used[0])) == 5


def test_exploring_needs_no_model_and_no_image_of_val_and_test(here, own_sample, monkeypatch):
    monkeypatch.setattr(plots, "DPI", 40)
    config.dataset_root = own_sample
    here.run("split_data.py")
    for task in (RGB, MS):
        lists = read_splits(task.splits, task)
        for file in lists["val"].files + lists["test"].files:
            (own_sample / file).unlink()
    explore.main([RGB, MS])
    before = files_below(here.root / "outputs")
    explore.main([RGB, MS])
    assert files_below(here.root / "outputs") == before
    for task, first in ((RGB, "samples.png"), (MS, "spectra.png")):
        content = study(task, "explore")
        assert content["figures"] == [first, "classes.png", "map.png"] and content["model_sha256"] is None
        assert all(source_of(task.outputs / "explore" / name) is None for name in content["figures"])
        tpr = content["values"]["discriminant_tpr"]
        assert math.isclose(
            np.mean(list(tpr.values())), content["values"]["discriminant"]
        )  # equally many of each class
        worst = min(tpr, key=tpr.get)
        assert f"{worst} is found least ({100 * tpr[worst]:.1f} %" in content["finding"]
        assert f"{len(read_splits(task.splits, task)['test'].files)} test images" in content["finding"]


def test_too_few_images_of_a_class_are_one_line(here):
    here.run("split_data.py")
    path = RGB.splits / "train.csv"
    path.write_text("".join(line for line in path.read_text().splitlines(True) if "River_" not in line))
    assert "too few to compare classes" in here.refused("studies/explore.py", "rgb")


def test_wavelengths_are_those_of_the_bands():
    """The order by wavelength puts B8A behind B08, which the file's order does not."""
    order = sorted(explore.WAVELENGTHS, key=explore.WAVELENGTHS.get)
    assert order == ["B01", "B02", "B03", "B04", "B05", "B06", "B07", "B08", "B8A", "B09", "B10", "B11", "B12"]


def test_elbow_and_psnr_by_hand():
    assert autoencoder.elbow({32: 10.0, 24: 11.0, 16: 12.0, 8: 14.0, 4: 80.0}) == 8
    assert autoencoder.elbow({12: 0.0, 8: 9.0, 4: 10.0}) == 4  # none lies below the line: the smallest
    assert math.isclose(autoencoder.psnr(255**2 / 100), 20)


def test_an_autoencoder_has_its_latent_space_and_learns(small):
    (subject,) = autoencoder.subjects([RGB], "autoencoder")
    data = subject.images("train")
    images, _ = data[torch.arange(4)]
    model = autoencoder.Autoencoder(20)
    assert model.encoder(images).shape == (4, 20, 4, 4) and model(images).shape == images.shape
    setting = dataclasses.replace(autoencoder.TRAINING, epochs=12)
    before, after = (
        autoencoder.squared_errors(autoencoder.train_autoencoder(8, data, each), data).mean()
        for each in (dataclasses.replace(setting, learning_rate=1e-9), setting)
    )
    pixels = data.pixels.astype(float)
    assert after < 0.5 * before and after < ((pixels - pixels.mean((0, 1, 2))) ** 2).mean()
    # The same scale as the files' pixels.
    constant = autoencoder.squared_errors(torch.zeros_like, data)
    expected = ((pixels - 255 * data.mean.numpy()) ** 2).mean((1, 2, 3))
    assert np.allclose(constant, expected, rtol=1e-3)


def test_the_autoencoder_is_chosen_on_val_and_compared_on_every_error(small, monkeypatch):
    trained_on, train = [], autoencoder.train_autoencoder

    def recorded(channels, data, setting):
        trained_on.append((channels, setting.epochs, data.split.files))
        return train(channels, data, setting)

    monkeypatch.setattr(autoencoder, "train_autoencoder", recorded)
    explain_errors.main([RGB])
    autoencoder.main()
    before = files_below(RGB.outputs / "autoencoder")
    lists, content, values = (
        read_splits(RGB.splits, RGB),
        study(RGB, "autoencoder"),
        study(RGB, "autoencoder")["values"],
    )
    errors = {int(size): error for size, error in values["val_mse"].items()}
    both = lists["train"].files + lists["val"].files
    assert trained_on == [*((size, 1, lists["train"].files) for size in (12, 8, 4)), (values["chosen"], 2, both)]
    assert values["chosen"] == autoencoder.elbow(errors)
    assert all(source_of(RGB.outputs / "autoencoder" / name) == content["model_sha256"] for name in content["figures"])
    rows, of_classifier = table(RGB, "autoencoder/errors.csv"), table(RGB, "explain_errors/errors.csv")
    for row in of_classifier:
        row.pop("verdict")
    in_space = {space: [row for row in rows if row.pop("space") == space] for space in ("classifier",)}
    assert in_space["classifier"] == of_classifier  # the same rules on the same features
    assert len(rows) == 2 * len(of_classifier) > 0
    counted = content["tables"][0]["rows"]
    assert [row[0] for row in counted] == ["classifier", "autoencoder"]
    for row in counted:
        causes = list(map(int, row[1:7]))
        assert sum(causes) == len(of_classifier) and int(row[7]) == sum(causes[:5]) == values["explained"][row[0]]
    near = table(RGB, "autoencoder/neighbours.csv")
    assert [row["file"] for row in near] == lists["test"].files
    for row in near:
        name, nearest = class_of(patch_of(row["file"])), [row[f"nearest_{rank}"] for rank in range(1, 11)]
        assert class_of(patch_of(row["example"])) == name != class_of(patch_of(row["counterexample"]))
        kind = "example" if float(row["example_distance"]) < float(row["counterexample_distance"]) else "counterexample"
        assert row[kind] == nearest[0] and len(set(nearest)) == 10 and set(nearest) <= set(lists["train"].files)
    autoencoder.main()
    assert files_below(RGB.outputs / "autoencoder") == before


def test_the_rules_name_each_cause_by_hand():
    """Features on a circle, in degrees. Train: class 0 from 0 to 9, class 1 from 20 to 29, both in steps of 1."""

    def on_circle(degrees):
        return np.stack([np.cos(np.radians(degrees)), np.sin(np.radians(degrees))], axis=1)

    degrees = np.array([*range(10), *range(20, 30)], float)
    train_labels = np.repeat([0, 1], 10)
    cases = {  # an image of class 0 that is predicted as 1: degrees, probability, brightness
        "noise": (14, 0.6, 900),
        "mislabelling": (25, 0.95, 100),
        "under-representation": (120, 0.6, 100),
        "underfitting": (-0.2, 0.6, 100),
        "overfitting": (8.2, 0.6, 100),
        "overlapping labels": (15, 0.6, 100),
    }
    angles, confidences, brightness = map(np.array, zip(*cases.values(), strict=True))
    features = {"train": on_circle(degrees), "val": on_circle(np.array([0.5, 35.0])), "test": on_circle(angles)}
    logits = np.log(np.stack([1 - confidences, confidences, *[np.full(6, 1e-9)] * 8], axis=1))
    pixels = {"train": np.linspace(90, 110, 20), "test": brightness}
    images = {
        part: SimpleNamespace(pixels=values[:, None, None, None] * np.ones((1, 2, 2, 1)))
        for part, values in pixels.items()
    }
    lists = {
        "train": SimpleNamespace(labels=train_labels, files=[f"train {degree:g}" for degree in degrees]),
        "test": SimpleNamespace(labels=np.zeros(6, int), files=list(cases)),
    }
    results = SimpleNamespace(predictions=np.ones(6, int), correct=np.zeros(6, bool), logits=torch.from_numpy(logits))
    subject = SimpleNamespace(lists=lists, results=results, images=images.get)
    predictions = train_labels.copy()
    predictions[0] = 1  # the network misclassifies the training image at 0 degrees
    near = explain_errors.neighbours(subject, features)
    rows = explain_errors.explained_errors(subject, features, near, predictions)
    assert {row["file"]: row["cause"] for row in rows} == {cause: cause for cause in cases}
    by_file = {row["file"]: row for row in rows}
    assert by_file["overfitting"]["example"] == "train 8" and by_file["mislabelling"]["counterexample"] == "train 25"


def test_the_page_says_how_often_a_person_agrees_with_the_rules(small):
    explain_errors.main([RGB])
    assert "A person judged" not in study(RGB, "explain_errors")["finding"]
    rows = table(RGB, "explain_errors/errors.csv")
    verdicts = [rows[0]["cause"].upper(), "a lake, beyond doubt", f" {rows[2]['cause']} "]
    lines = [f'{row["file"]},"{verdict}"\n' for row, verdict in zip(rows, verdicts, strict=False)]
    (RGB.outputs / "explain_errors/verdicts.csv").write_text("".join(["file,verdict\n", *lines]))
    explain_errors.main([RGB])
    content = study(RGB, "explain_errors")
    assert content["values"]["judged"] == 3 and content["values"]["agreeing"] == 2
    assert "judged 3 of the errors, and the rules propose the same cause for 2 of them (66.7 %" in content["finding"]
    assert sum(int(row[3]) for row in content["tables"][0]["rows"][:6]) == 2


@pytest.mark.skipif(
    not all(BROWSER) and os.environ.get("EUROSAT_BROWSER") != "required", reason="no chromium with chromedriver"
)
def test_the_explorer_shows_both_spaces_filters_and_can_be_used_without_a_mouse(small, monkeypatch):
    from selenium import webdriver
    from selenium.webdriver.common.by import By
    from selenium.webdriver.common.keys import Keys
    from selenium.webdriver.support.ui import Select

    monkeypatch.setenv("no_proxy", "localhost")  # the driver is there; all else stays out of reach
    explain_errors.main([RGB])
    autoencoder.main()
    explorer.main([RGB])
    (subject,) = explorer.subjects([RGB], "explorer")
    files, labels = subject.results.split.files, subject.results.split.labels
    predictions = subject.results.predictions
    confidence = subject.results.logits.double().softmax(1).amax(1).numpy().round(4)
    metrics = compute_metrics(subject.results.logits, labels)
    causes = [row["cause"] for row in table(RGB, "explain_errors/errors.csv")]
    near = {row["file"]: row for row in table(RGB, "autoencoder/neighbours.csv")}
    options = webdriver.ChromeOptions()
    for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--window-size=1500,1100"):
        options.add_argument(argument)
    options.binary_location = BROWSER[0]
    with webdriver.Chrome(options=options, service=webdriver.ChromeService(BROWSER[1])) as browser:
        browser.get((RGB.outputs / "explorer/explorer.html").as_uri())

        def one(name):
            return browser.find_element(By.CSS_SELECTOR, name)

        def every(name):
            return browser.find_elements(By.CSS_SELECTOR, name)

        def active():
            return browser.switch_to.active_element

        def count() -> int:
            return int(one("#count").text.split()[0])

        def choose(name, text):
            Select(one(name)).select_by_visible_text(text)

        # Ten random test images on the first screen, with their classes.
        drawn = every("#random button")
        expected = np.random.default_rng(config.split_seed).permutation(len(files))[:10]
        assert len(drawn) == 10 and max(each.rect["y"] + each.rect["height"] for each in drawn) < 1000
        for button, index in zip(drawn, expected, strict=True):
            wrong = "✗ " if labels[index] != predictions[index] else ""
            lines = [f"true: {CLASSES[labels[index]]}", f"{wrong}predicted: {CLASSES[predictions[index]]}"]
            assert button.text.split("\n") == lines
        # The keyboard alone: the image is chosen, and its neighbours in both spaces are shown.
        drawn[1].send_keys(Keys.ENTER)
        file = files[expected[1]]
        assert one("#detail figcaption").text.splitlines()[0] == file
        spaces = [heading.text for heading in every("#detail h3")][1:]
        assert [space.rpartition("by the ")[2] for space in spaces] == list(explorer.SPACES.values())
        nearest = [caption.text for caption in every("#detail .row:last-child .tiny figcaption")]
        assert nearest == [
            f"{rank}: {class_of(patch_of(near[file][f'nearest_{rank}']))}"
            for rank in range(1, explain_errors.NEIGHBOURS + 1)
        ]
        # Filters, alone and together.
        one("#all").click()
        assert count() == len(files)
        choose("#label", "River")
        assert count() == (labels == CLASSES.index("River")).sum()
        choose("#outcome", "errors")
        assert count() == ((labels == CLASSES.index("River")) & (predictions != labels)).sum()
        one("#all").click()
        choose("#predicted", CLASSES[predictions[0]])
        assert count() == (predictions == predictions[0]).sum()
        one("#all").click()
        choose("#cause", causes[0])
        assert count() == causes.count(causes[0])
        one("#all").click()
        middle = float(np.median(confidence).round(2))
        for name, keys in (("#low", str(middle)), ("#high", "0.99")):
            one(name).clear()
            one(name).send_keys(keys)
        assert count() == ((confidence >= middle) & (confidence <= 0.99)).sum()
        one("#errors").click()
        assert count() == len(files) - np.trace(metrics["confusion"])
        # The arrow keys move the focus, which a screen reader follows; only one image is a stop of the tab key.
        stops = every("#images button[tabindex='0']")
        assert len(stops) == 1
        browser.execute_script("arguments[0].focus()", stops[0])
        first = active().accessible_name
        active().send_keys(Keys.ARROW_RIGHT)
        assert active().accessible_name != first and active().get_attribute("aria-current") == "true"
        assert active().accessible_name.startswith(one("#detail figcaption").text.splitlines()[0])
        # Everything has a name, and the number of images is announced.
        for each in (*every("button:not([disabled])"), *every("input"), *every("select"), *every("img")):
            assert each.accessible_name.strip(), each.get_attribute("outerHTML")[:200]
        assert one("#count").get_attribute("aria-live") == "polite"
        # The page counts where a person agrees with the rules.
        one("#verdict").send_keys(one("#detail p").text.removeprefix("cause by rule: "))
        assert one("#agreement").text == "1 errors judged; the rules propose the same cause for 1"
        assert not [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"]


def test_the_explorer_does_without_the_autoencoder_and_refuses_neighbours_of_other_images(small, capsys):
    explain_errors.main([RGB])
    explorer.main([RGB])
    assert "neighbours by features of the classifier\n" in capsys.readouterr().out
    autoencoder.main()
    path = RGB.outputs / "autoencoder/neighbours.csv"
    path.write_text("".join(path.read_text().splitlines(True)[:-1]))
    told = small.refused("studies/explorer.py", "rgb")
    assert "autoencoder/neighbours.csv holds other test images; run: python -m studies.autoencoder" in told

"""The studies on small models: each fills its part of the appendix, verdicts live on, and the explorer works."""

import csv
import dataclasses
import json
import math
import os
import shutil

from base.project import CLASSES, MS, RGB, config

import numpy as np
import onnxruntime
import pytest
import torch
from conftest import CODE, files_below
from pypdf import PdfReader

import make_report
from dataset import class_of, load_images, patch_of
from engine import plots
from engine.plots import source_of
from engine.splits import complete_patches, make_pools, make_split, overlapping_pairs, read_splits, splits_hash
from studies import (
    baselines,
    calibration,
    corruptions,
    explain_errors,
    explorer,
    export,
    geography,
    label_audit,
    label_curve,
    robustness,
    search,
    six_bands,
    statistics,
    uncertainty,
)
from studies.subject import Subject, results_of_profiles, subjects

BROWSER = [shutil.which(name) for name in ("chromium", "chromedriver")]


@pytest.fixture
def quick(place, monkeypatch):
    """A copy of the trained project root; few draws, folds and images, and coarse figures."""
    monkeypatch.setattr(plots, "DPI", 40)
    monkeypatch.setattr(statistics, "DRAWS", 50)
    monkeypatch.setattr(label_audit, "FOLDS", 2)
    monkeypatch.setattr(robustness, "IMAGES", 12)
    monkeypatch.setattr(robustness, "ATTACKED", 12)
    monkeypatch.setattr(robustness, "PGD_STEPS", 2)
    monkeypatch.setattr(baselines, "C", (0.01, 1.0))
    return place


def study(task, name) -> dict:
    return json.loads((task.outputs / name / "study.json").read_text())


def predictions_of_class_0(confidences, correct):
    """Logits of class 0 with these probabilities, and labels that make them correct or not."""
    p = np.array(confidences)
    logits = np.log((1 - p) / 9)[:, None].repeat(10, 1)
    logits[:, 0] = np.log(p)
    return torch.from_numpy(logits), np.where(correct, 0, 1)


def test_mcnemar_by_hand():
    """Of nine images that one model alone predicts correctly eight are the second's: 2 (C(9,0) + C(9,1)) / 2^9."""
    first = np.array([True] * 5 + [True] + [False] * 8)
    second = np.array([True] * 5 + [False] + [True] * 8)
    result = statistics.mcnemar(first, second)
    assert (result["first_alone"], result["second_alone"]) == (1, 8)
    assert math.isclose(result["p_value"], 2 * (1 + 9) / 2**9) and statistics.mcnemar(first, first)["p_value"] == 1


def test_calibration_error_by_hand():
    """Two of ten bins: confidence 0.65 and half correct, 0.95 and all correct."""
    logits, labels = predictions_of_class_0([0.65, 0.65, 0.95, 0.95], [True, False, True, True])
    rows = statistics.reliability(logits, labels, bins=10)
    assert rows["images"].tolist() == [0] * 6 + [2, 0, 0, 2] and math.isnan(rows["accuracy"][0])
    assert math.isclose(statistics.calibration_error(logits, labels, bins=10), (2 * 0.15 + 2 * 0.05) / 4)


def test_temperature_undoes_a_scaling():
    random = np.random.default_rng(0)
    logits = torch.from_numpy(random.normal(size=(20000, 10)) * 2)
    labels = (logits.numpy() + random.gumbel(size=(20000, 10))).argmax(1)  # drawn from the probabilities: temperature 1
    assert math.isclose(statistics.temperature(logits, labels), 1, abs_tol=0.03)
    assert math.isclose(statistics.temperature(logits * 2.5, labels), 2.5, abs_tol=0.08)


def test_tail_accuracy_leaves_out_a_class_without_predictions_above():
    """Class 0 has predictions at 0.6 (wrong) and 0.9 (correct), class 2 one at 0.7 (correct)."""
    logits, labels = predictions_of_class_0([0.6, 0.9, 0.7], [False, True, True])
    logits[2, [0, 2]], labels[2] = logits[2, [2, 0]], 2
    accuracy, remain, mean = statistics.tail_accuracy(logits, labels, np.array([0.5, 0.65, 0.8, 0.95]))
    assert remain[:, 0].tolist() == [2, 1, 1, 0] and remain[:, 2].tolist() == [1, 1, 0, 0]
    assert accuracy[:2, 0].tolist() == [0.5, 1] and math.isnan(accuracy[2, 2])
    assert mean[:3].tolist() == [0.75, 1, 1] and math.isnan(mean[3])  # not 0.5 at 0.8, where class 2 has none


def test_every_study_fills_the_appendix_and_its_figures_are_of_the_model(quick, capsys):
    for module in (uncertainty, calibration, robustness, explain_errors):
        module.main([RGB])
    for module in (label_audit, baselines):
        module.main([MS])
    geography.main()
    # Tested below, in test_explore.py and test_segment.py.
    not_run = ["explore", "label_curve", "search", "six_bands", "autoencoder", "segment"]
    paths = list((quick.root / "outputs").rglob("study.json"))
    assert {path.parent.name for path in paths} == set(make_report.STUDIES) - set(not_run)
    for path in paths:
        content = json.loads(path.read_text())
        assert all(source_of(path.parent / name) == content["model_sha256"] for name in content["figures"])
    capsys.readouterr()
    # What is of another model is not shown.
    for _ in range(2):
        quick.run("make_report.py")
        pages = PdfReader(quick.root / "report/appendix-demo.pdf").pages
        text = " ".join(" ".join(page.extract_text() for page in pages).split())
        assert all((title in text) == (study not in not_run) for study, title in make_report.STUDIES.items())
        assert ", ".join(not_run) in text
        changed = study(RGB, "calibration") | {"model_sha256": "another"}
        (RGB.outputs / "calibration/study.json").write_text(json.dumps(changed))
        not_run.insert(1, "calibration")


def test_a_second_run_gives_the_same_files_and_changes_no_results(quick):
    before = files_below(quick.root / "outputs")
    files = []
    for _ in range(2):
        for module in (calibration, explain_errors, robustness):
            module.main([RGB])
        files.append(files_below(quick.root / "outputs"))
    assert files[0] == files[1] and before.items() <= files[0].items()


def test_models_are_compared_in_one_order_and_the_sample_only_with_itself(place):
    for profile in ("course", "full"):
        shutil.copytree(place.root / "outputs/demo", place.root / "outputs" / profile, copy_function=os.link)
    assert list(results_of_profiles([RGB, MS])) == [("demo", "rgb"), ("demo", "ms")]
    config.profile = "full"
    assert list(results_of_profiles([RGB])) == [("full", "rgb"), ("course", "rgb")]


def test_robustness_leaves_a_closed_test_list_closed(quick, monkeypatch):
    (RGB.outputs / "test_metrics.json").unlink()
    opened, images = [], Subject.images
    monkeypatch.setattr(Subject, "images", lambda self, part: opened.append(part) or images(self, part))
    robustness.main([RGB])
    assert opened == ["val"] and "unchanged val images" in study(RGB, "robustness")["finding"]
    assert results_of_profiles([RGB, MS]).keys() == {("demo", "ms")}


def test_errors_have_examples_of_both_classes_and_verdicts_live_on(quick):
    explain_errors.main([RGB])
    path = RGB.outputs / "explain_errors/errors.csv"
    rows = list(csv.DictReader(path.open()))
    assert rows and all(row["cause"] in explain_errors.CAUSES and row["verdict"] == "" for row in rows)
    for row in rows:
        assert class_of(patch_of(row["file"])) == row["true_class"] == class_of(patch_of(row["example"]))
        assert class_of(patch_of(row["counterexample"])) == row["counterexample_class"] != row["true_class"]
        assert row["predicted"] != row["true_class"]
    rows[0]["verdict"] = "a lake, beyond doubt"
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    (path.parent / "verdicts.csv").write_text(f'file,verdict\n{rows[1]["file"]},"noise, or fog"\n')
    explain_errors.main([RGB])
    again = [row["verdict"] for row in csv.DictReader(path.open())]
    assert again == ["a lake, beyond doubt", "noise, or fog", *[""] * (len(rows) - 2)]


def test_the_label_audit_finds_swapped_labels():
    random = np.random.default_rng(0)
    labels = np.repeat(np.arange(10), 12)
    features = np.eye(10)[labels] * 4 + random.normal(size=(120, 10)) * 0.3
    labels[[5, 50]] = labels[[50, 5]]
    probabilities = label_audit.out_of_fold(features, labels)
    assert set(probabilities[np.arange(120), labels].argsort()[:2]) == {5, 50}


def test_attacks_stay_within_their_strength_and_raise_the_loss(quick):
    (subject,) = subjects([MS], "robustness")
    sample = robustness.Sample(subject)
    for steps in (1, 3):
        changed = sample.attacked(0.1, steps)
        assert 0 < (changed - sample.floats).abs().max() <= 0.1 * 10_000 + 1e-2 and changed.min() >= 0
        before, after = (
            torch.nn.functional.cross_entropy(sample.logits(floats).detach(), sample.labels)
            for floats in (sample.floats, changed)
        )
        assert after > before
    assert sample.accuracy(sample.pixels) == sample.correct(sample.floats).double().mean()


@pytest.mark.parametrize("task", [RGB, MS], ids=str)
def test_corruptions_change_every_image_as_they_say(place, task):
    split = read_splits(task.splits, task)["test"]
    pixels = load_images(config.dataset_root, task, split.files, RGB.bands)
    changed = corruptions.corruptions(pixels, seed=1)
    assert len(changed) == (7 if task == RGB else 6) and set(corruptions.UNSEEN) < set(changed)
    for name, images in changed.items():
        assert images.shape == pixels.shape and images.dtype == pixels.dtype, name
        assert all((images != pixels).any(axis=(1, 2, 3))), name
        assert np.array_equal(images, corruptions.corruptions(pixels, seed=1)[name]), name
    covered = (changed["cloud over a tenth"] != pixels).any(3).mean()
    lost = (changed["lost lines"] == 0).all(axis=(2, 3)).sum(1)
    assert 0.08 < covered < 0.2 and set(lost) == {corruptions.LOST_LINES}
    assert np.abs(changed["half the light"] - pixels / 2).max() <= 0.5
    noise = (changed["noise of 5/255"] - pixels.astype(float)) if task == RGB else pixels * 0 + 5
    assert 4 < np.sqrt((noise**2).mean()) < 6


def test_distances_on_the_ground_and_their_bins():
    """A degree of latitude is 111.2 km; a degree of longitude at 60 degrees is half of it."""
    train = np.array([[50.0, 10.0], [60.0, 10.0]])
    assert np.allclose(geography.distances_to(train, np.array([[51.0, 10.0], [60.0, 11.0]])), [111.2, 55.6], atol=0.1)
    correct = np.array([True] * 30 + [False] * 30)
    rows = geography.by_distance(np.array([0.5] * 30 + [150.0] * 30), correct)
    assert [(row[2], row[3]) for row in rows] == [(30, 1.0), (30, 0.0)]
    a, b = overlapping_pairs()[0]
    assert geography.overlapping_train([a, b], {b}).tolist() == [True, False]


def test_the_exported_network_predicts_as_torch_does_for_any_number_of_images(quick, capsys):
    export.main([MS])
    (subject,) = subjects([MS], "export")
    session = onnxruntime.InferenceSession(str(MS.outputs / "export/model.onnx"))
    pixels, expected = subject.images("test").pixels, subject.results.logits.softmax(1).numpy()
    for images in (1, 7):
        (probabilities,) = session.run(None, {"pixels": pixels[:images].astype(np.float32)})
        assert np.abs(probabilities - expected[:images]).max() < 1e-4
    assert "0 of 20" in capsys.readouterr().out
    card = (MS.outputs / "export/MODEL_CARD.md").read_text()
    assert f"{100 * subject.results.metrics['accuracy']:.1f} %" in card and subject.final.sha256 in card


def test_the_label_curve_draws_equally_many_of_each_class_and_trains_nothing_twice(quick, monkeypatch, capsys):
    for name, value in {"SIZES": (10, 30), "SEEDS": 2, "STEPS": 1}.items():
        monkeypatch.setattr(label_curve, name, value)
    labels = read_splits(RGB.splits, RGB)["train"].labels
    for size in (10, 30):
        first, again = (labels[label_curve.drawn(labels, size, seed)] for seed in (1, 1))
        assert set(np.bincount(first)) == {size // 10} and np.array_equal(first, again)
    assert (label_curve.drawn(labels, 30, 1) != label_curve.drawn(labels, 30, 2)).any()
    label_curve.main()
    trained, before = capsys.readouterr().out, files_below(RGB.outputs / "label_curve")
    assert all(
        f"{name}-{run}: " in trained for name in ("tuned", "scratch") for run in ("10-0", "10-1", "30-0", "60-0")
    )
    label_curve.main()
    assert "tuned-10" not in capsys.readouterr().out
    assert files_below(RGB.outputs / "label_curve") == before
    rows = study(RGB, "label_curve")["tables"][0]["rows"]
    assert [row[0] for row in rows] == list(label_curve.METHODS) and all("±" in row[1] for row in rows)


def test_the_search_measures_each_run_once_on_images_that_are_in_no_list(place, monkeypatch):
    setting = config.settings["demo"]["rgb"][0]
    monkeypatch.setattr(search, "QUEUE", {"rgb": [(setting, 0), (setting, 1)]})
    place.edit("rgb", "train", lambda lines: lines[:-20])  # what leaves the list may be spare
    lists = read_splits(RGB.splits, RGB)
    spare = search.spare_images(RGB, lists)
    assert spare.files and not set(spare.files) & {file for split in lists.values() for file in split.files}
    assert set(spare.patches) <= set(make_pools(complete_patches(), config.split_seed)["train"])
    tables = []
    for _ in range(2):
        search.main([RGB])
        tables.append((RGB.outputs / "search/table.csv").read_text())
    rows = list(csv.DictReader(tables[0].splitlines()))
    assert tables[0] == tables[1] and [int(row["seed"]) - config.seed for row in rows] == [0, 1]
    assert all(int(row["spare_images"]) == len(spare.files) and 0 <= float(row["spare"]) <= 1 for row in rows)
    (row,) = study(RGB, "search")["tables"][0]["rows"]
    assert row[:2] == [setting.name, "2"] and row[-1] == "+0.00 (+0.00 to +0.00)"
    shares = [1 - len(row["wrong"].split()) / len(spare.files) for row in rows]
    assert np.allclose(shares, [float(row["spare"]) for row in rows])
    assert rows[0]["corrupted"].count(": ") == 7


def test_folds_of_six_bands_keep_the_same_ground_together():
    pairs = overlapping_pairs()
    overlapping = {patch for pair in pairs for patch in pair}
    alone = [patch for patch in complete_patches() if patch not in overlapping][::150]
    every = make_split(MS, dict.fromkeys([patch for pair in pairs[:40] for patch in pair] + alone))
    fold_of = dict(zip(every.patches, six_bands.folds(every, six_bands.grounds(every)), strict=True))
    sizes = np.bincount(list(fold_of.values()))
    assert len(sizes) == 5 and sizes.min() > 40
    assert all(fold_of[a] == fold_of[b] for a, b in pairs if a in fold_of and b in fold_of)


def test_six_bands_start_from_a_network_that_saw_no_multispectral_patch_and_no_ground_of_one(monkeypatch):
    """On the lists handed in, where some patches have to leave for each of the two reasons."""
    monkeypatch.setattr(config, "project_root", CODE)
    monkeypatch.setattr(config, "profile", "course")
    predicted = {patch for split in read_splits(MS.splits, MS).values() for patch in split.patches}
    shared = {patch for pair in overlapping_pairs() for patch in pair if predicted & set(pair)} - predicted
    lists = six_bands.start_lists(predicted)
    for part, split in read_splits(RGB.splits, RGB).items():
        assert set(split.patches) & predicted and (part != "train" or set(split.patches) & shared)
        assert lists[part].patches == [patch for patch in split.patches if patch not in predicted | shared]
    assert not any(split.files for split in six_bands.start_lists(complete_patches()).values())
    monkeypatch.setattr(six_bands, "load_initial_weights", lambda *_: "ImageNet's")
    assert six_bands.train_start(complete_patches(), CODE / "unused", torch.device("cpu")) == "ImageNet's"


def test_the_interval_of_six_bands_takes_patches_of_one_ground_together():
    """Each of 200 grounds has two patches with the same gain: as wide as that of 200 patches, not of 400."""
    gains = np.repeat(np.random.default_rng(0).integers(-3, 4, 200), 2)
    low, high = six_bands.interval_over_grounds(gains, np.repeat(np.arange(200), 2))
    assert np.allclose([low, high], gains.mean() + np.array([-1.96, 1.96]) * gains.std() / math.sqrt(200), atol=0.03)


@pytest.mark.parametrize(
    ("gained", "answer"), [(0, "are not shown to help."), (1, "are not shown to help."), (20, "help.")]
)
def test_six_bands_help_only_if_the_interval_excludes_zero(tmp_path, capsys, gained, answer):
    """Of 100 patches, three bands are correct on the last 70, six bands also on the first `gained`."""
    patches = np.arange(100)
    three, six = (np.array([hits] * 3) for hits in (patches >= 30, (patches >= 30) | (patches < gained)))
    six_bands.write_six_bands_study(tmp_path, patches, three, six)
    content = json.loads((tmp_path / "study.json").read_text())
    assert content["finding"].startswith(f"The infrared bands {answer}")
    assert content["tables"][0]["rows"][0][1:5] == ["70.0", f"{70 + gained}.0", "0", str(gained)]


def test_three_and_six_bands_are_compared_on_each_patch_and_no_fold_is_trained_twice(place, monkeypatch, capsys):
    small = {"weights": None, "backbone": "shufflenet_v2_x0_5", "image_size": 32, "views": 1, "epochs": 1}
    for name in ("START", "THREE", "SIX"):
        monkeypatch.setattr(six_bands, name, dataclasses.replace(getattr(six_bands, name), **small))
    monkeypatch.setattr(six_bands, "FOLDS", 2)
    monkeypatch.setattr(six_bands, "SEEDS", 2)
    for name in CLASSES:  # the other half is for the RGB network
        for path in sorted((place.own_sample() / "EuroSAT_MS" / name).iterdir())[5:]:
            path.unlink()
    six_bands.main()
    folder = MS.outputs / "six_bands"
    rows, values = list(csv.DictReader((folder / "predictions.csv").open())), study(MS, "six_bands")["values"]
    three, six = (
        np.array([[row[f"{kind}_bands_{seed}"] == row["class_name"] for row in rows] for seed in range(2)])
        for kind in ("three", "six")
    )
    assert len(rows) == 50 and {row["fold"] for row in rows} == set("01")
    assert values["three"] == three.mean(1).tolist() and values["six"] == six.mean(1).tolist()
    assert math.isclose(values["difference"], six.mean() - three.mean(), abs_tol=1e-9)
    assert values["low"] <= values["difference"] <= values["high"]
    trained_with = json.loads((folder / "rgb/setting.json").read_text())["identity"]["splits_sha256"]
    assert trained_with == splits_hash(six_bands.start_lists({patch_of(row["file"]) for row in rows}))
    before, logits = files_below(folder), torch.load(folder / "three-0-0.pt")["logits"]
    assert not torch.equal(logits, torch.load(folder / "three-1-0.pt")["logits"])  # another seed
    (folder / "three-1-0.pt").unlink()
    capsys.readouterr()
    six_bands.main()
    trained = [line for line in capsys.readouterr().out.splitlines() if " of 25" in line]
    assert len(trained) == 1 and trained[0].startswith("three-1-0: ") and files_below(folder) == before
    monkeypatch.setattr(six_bands, "START", dataclasses.replace(six_bands.START, learning_rate=1e-4))
    six_bands.main()  # other initial weights: all folds are trained again
    assert capsys.readouterr().out.count(" of 25") == 8
    assert not torch.equal(logits, torch.load(folder / "three-0-0.pt")["logits"])


@pytest.mark.skipif(
    not all(BROWSER) and os.environ.get("EUROSAT_BROWSER") != "required", reason="no chromium with chromedriver"
)
def test_the_explorer_in_a_browser(quick, tmp_path, monkeypatch):
    from selenium import webdriver
    from selenium.webdriver.common.by import By
    from selenium.webdriver.common.keys import Keys
    from selenium.webdriver.support.ui import WebDriverWait

    monkeypatch.setenv("no_proxy", "localhost")  # the driver is there; all else stays out of reach
    explain_errors.main([RGB])
    explorer.main([RGB])
    page = RGB.outputs / "explorer/explorer.html"
    assert "http" not in page.read_text().replace("data:image", "")  # nothing is loaded from elsewhere
    results = json.loads((RGB.outputs / "test_metrics.json").read_text())
    options = webdriver.ChromeOptions()
    for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--window-size=1500,1100"):
        options.add_argument(argument)
    options.add_experimental_option("prefs", {"download.default_directory": str(tmp_path)})
    options.binary_location = BROWSER[0]
    with webdriver.Chrome(options=options, service=webdriver.ChromeService(BROWSER[1])) as browser:
        browser.get(page.as_uri())

        def one(name):
            return browser.find_element(By.CSS_SELECTOR, name)

        confusion = np.array(results["confusion"])
        errors = confusion.sum() - np.trace(confusion)
        assert one("#count").text == f"{errors} images"
        label, predicted = np.argwhere(confusion * (1 - np.eye(10)))[0]
        one(f"#matrix button[data-cell='{label},{predicted}']").click()
        assert len(browser.find_elements(By.CSS_SELECTOR, "#images button")) == confusion[label, predicted]
        detail = one("#detail").text
        assert f"label {CLASSES[label]}, predicted {CLASSES[predicted]}" in detail and "counterexample" in detail
        assert browser.execute_script("return document.querySelector('#detail img').naturalWidth") == 64
        one("body").send_keys("a")
        assert one("#count").text == f"{results['images']} images"
        first = one("#detail figcaption").text
        one("body").send_keys(Keys.ARROW_RIGHT)
        assert one("#detail figcaption").text != first
        one("#search").send_keys("forest_")
        assert one("#count").text.startswith(str(confusion[CLASSES.index("Forest")].sum()))
        one("#verdict").send_keys('noise, or "fog"')
        judged = one("#detail figcaption").text.splitlines()[0]
        browser.refresh()  # the browser keeps it
        one("#search").send_keys(judged.rpartition("/")[2])
        one("body").click()
        browser.execute_script("choose('all')")
        assert one("#verdict").get_attribute("value") == 'noise, or "fog"'
        one("#save").click()
        WebDriverWait(browser, 10).until(lambda _: (tmp_path / "verdicts.csv").exists())
        assert not [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"]
    shutil.copy(tmp_path / "verdicts.csv", RGB.outputs / "explain_errors")
    assert explain_errors.former_verdicts(RGB.outputs / "explain_errors") == {judged: 'noise, or "fog"'}

"""The studies on small models: each leaves what the appendix shows, a person's verdicts live on, and the explorer works."""

import csv
import json
import os
import shutil

import numpy as np
import onnxruntime
import pytest
import torch
from conftest import files_below
from pypdf import PdfReader
from sklearn.metrics.pairwise import cosine_distances

import make_report
from dataset import CLASSES, class_of, patch_of
from engine import metrics, plots
from engine.plots import source_of
from engine.splits import overlapping_pairs
from project import UserError, config
from studies import (
    baselines,
    calibration,
    explain_errors,
    explorer,
    export,
    geography,
    label_audit,
    robustness,
    uncertainty,
)
from studies.subject import results_of_profiles, subjects

BROWSER = [shutil.which(name) for name in ("chromium", "chromedriver")]


@pytest.fixture
def quick(place, monkeypatch):
    """A copy of the trained project root; few draws, folds and images, and coarse figures."""
    monkeypatch.setattr(plots, "DPI", 40)
    monkeypatch.setattr(metrics, "DRAWS", 50)
    monkeypatch.setattr(label_audit, "FOLDS", 2)
    monkeypatch.setattr(robustness, "IMAGES", 12)
    monkeypatch.setattr(robustness, "PGD_STEPS", 2)
    monkeypatch.setattr(baselines, "C", (0.01, 1.0))
    return place


def folder(place, study, task="rgb"):
    return place.root / "outputs/demo" / task / study


def study(place, name, task="rgb"):
    return json.loads((folder(place, name, task) / "study.json").read_text())


def test_every_study_fills_the_appendix_and_its_figures_are_of_the_model(quick, capsys):
    for module in (uncertainty, calibration, robustness, explain_errors):
        module.main(("rgb",))
    for module in (label_audit, baselines):
        module.main(("ms",))
    geography.main()
    apart = {"six_bands", "search"}  # tested beside training
    assert set(make_report.STUDIES) - apart == {
        path.parent.name for path in (quick.root / "outputs").rglob("study.json")
    }
    capsys.readouterr()
    quick.here.run("make_report.py")
    text = "".join(page.extract_text() for page in PdfReader(quick.root / "report/appendix-demo.pdf").pages)
    assert all(title in text for name, title in make_report.STUDIES.items() if name not in apart)
    assert "Not run for the present models: search, six_bands" in " ".join(text.split())
    for path in (quick.root / "outputs").rglob("study.json"):
        content = json.loads(path.read_text())
        assert all(source_of(path.parent / name) == content["model_sha256"] for name in content["figures"])
    # of another model nothing is shown
    changed = study(quick, "calibration") | {"model_sha256": "another"}
    (folder(quick, "calibration") / "study.json").write_text(json.dumps(changed))
    quick.here.run("make_report.py")
    text = "".join(page.extract_text() for page in PdfReader(quick.root / "report/appendix-demo.pdf").pages)
    assert "Not run for the present models: calibration, search, six_bands" in " ".join(text.split())


def test_a_second_run_gives_the_same_files(quick):
    for module in (calibration, explain_errors, robustness):
        module.main(("rgb",))
    before = files_below(quick.root / "outputs")
    for module in (calibration, explain_errors, robustness):
        module.main(("rgb",))
    assert files_below(quick.root / "outputs") == before


def test_calibration_leaves_the_saved_logits_as_they_are(quick):
    before = (quick.root / "outputs/demo/rgb/test_logits.pt").read_bytes()
    calibration.main(("rgb",))
    assert (quick.root / "outputs/demo/rgb/test_logits.pt").read_bytes() == before
    assert study(quick, "calibration")["values"]["temperature"] > 0


def test_errors_have_examples_of_their_class_and_of_others_and_verdicts_live_on(quick):
    explain_errors.main(("rgb",))
    path = folder(quick, "explain_errors") / "errors.csv"
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
    explain_errors.main(("rgb",))
    again = list(csv.DictReader(path.open()))
    assert [row["verdict"] for row in again[:3]] == ["a lake, beyond doubt", "noise, or fog", *[""] * (len(again) > 2)]


def test_neighbours_are_the_nearest_of_each_kind():
    random = np.random.default_rng(0)
    train, test = random.normal(size=(40, 6)), random.normal(size=(9, 6))
    train_labels, test_labels = np.arange(40) % 4, np.arange(9) % 4
    found = explain_errors.neighbours(train, train_labels, test, test_labels)
    distances = cosine_distances(test, train)
    for i in range(9):
        own = train_labels == test_labels[i]
        assert found["example"][i] == np.where(own, distances[i], np.inf).argmin()
        assert found["counterexample"][i] == np.where(own, np.inf, distances[i]).argmin()
        assert np.isclose(found["counterexample_distance"][i], distances[i, ~own].min())


def test_label_audit_finds_labels_that_were_swapped_and_refuses_too_few_images(quick, monkeypatch):
    random = np.random.default_rng(0)
    labels = np.repeat(np.arange(10), 12)
    features = np.eye(10)[labels] * 4 + random.normal(size=(120, 10)) * 0.3
    labels[[5, 50]] = labels[[50, 5]]
    probabilities = label_audit.out_of_fold(features, labels)
    assert set(probabilities[np.arange(120), labels].argsort()[:2]) == {5, 50}
    monkeypatch.setattr(label_audit, "FOLDS", 50)
    with pytest.raises(UserError, match="fewer than 50 test images"):
        label_audit.main(("rgb",))


def test_attacks_stay_within_their_strength_and_raise_the_loss(quick):
    (subject,) = subjects(("ms",), "robustness")
    sample = robustness.Sample(subject)
    for steps in (1, 3):
        changed = sample.attacked(0.1, steps)
        assert 0 < (changed - sample.pixels).abs().max() <= 0.1 * 10_000 + 1e-2
        assert changed.min() >= 0
        with torch.no_grad():
            losses = [
                torch.nn.functional.cross_entropy(sample.logits(pixels), sample.labels)
                for pixels in (sample.pixels, changed)
            ]
        assert losses[1] > losses[0]


def test_cloud_covers_half_and_leaves_half(quick):
    (subject,) = subjects(("rgb",), "robustness")
    sample = robustness.Sample(subject)
    clouded = robustness.clouded(sample, np.random.default_rng(0))
    untouched = ((clouded - sample.pixels).abs() < 2).all(1).double().mean((1, 2))
    assert ((untouched > 0.2) & (untouched < 0.6)).all()


def test_distances_on_the_ground_and_their_bins():
    """A degree of latitude is 111.2 km; of longitude at 60 degrees half of it."""
    train = np.array([[50.0, 10.0], [60.0, 10.0]])
    assert np.allclose(geography.distances_to(train, np.array([[51.0, 10.0], [60.0, 11.0]])), [111.2, 55.6], atol=0.1)
    right = np.array([True] * 30 + [False] * 30)
    rows = geography.by_distance(np.array([0.5] * 30 + [150.0] * 30), right)
    assert [(row[2], row[3]) for row in rows] == [(30, 1.0), (30, 0.0)] and sum(row[2] for row in rows) == 60


def test_shared_ground_is_that_of_the_table():
    a, b = overlapping_pairs()[0]
    assert geography.overlapping_train([a, b], {b}).tolist() == [True, False]


def test_band_features_are_means_and_deviations():
    pixels = np.zeros((2, 64, 64, 3), np.uint8)
    pixels[0, :32, :, 1] = 10
    assert baselines.band_features(pixels)[0].tolist() == [0, 5, 0, 0, 5, 0]


def test_explorer_asks_for_the_examples_first(quick):
    with pytest.raises(UserError, match="explain_errors"):
        explorer.main(("rgb",))


@pytest.mark.skipif(
    not all(BROWSER) and os.environ.get("EUROSAT_BROWSER") != "required", reason="no chromium with chromedriver"
)
def test_explorer_in_a_browser(quick, tmp_path, monkeypatch):
    from selenium import webdriver
    from selenium.webdriver.common.by import By
    from selenium.webdriver.common.keys import Keys
    from selenium.webdriver.support.ui import WebDriverWait

    monkeypatch.setenv("no_proxy", "localhost")  # the driver is there; all else stays out of reach
    explain_errors.main(("rgb",))
    explorer.main(("rgb",))
    page = folder(quick, "explorer") / "explorer.html"
    assert "http" not in page.read_text().replace("data:image", "")  # nothing is loaded from elsewhere
    results = json.loads((quick.root / "outputs/demo/rgb/test_metrics.json").read_text())
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
        label, answer = np.argwhere(confusion - np.diag(np.diag(confusion)))[0]
        one(f"#matrix button[data-cell='{label},{answer}']").click()
        assert len(browser.find_elements(By.CSS_SELECTOR, "#images button")) == confusion[label, answer]
        detail = one("#detail").text
        assert f"label {CLASSES[label]}, answer {CLASSES[answer]}" in detail and "local counterexample" in detail
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
    shutil.copy(tmp_path / "verdicts.csv", folder(quick, "explain_errors"))
    assert explain_errors.former_verdicts(folder(quick, "explain_errors")) == {judged: 'noise, or "fog"'}


def test_export_answers_as_the_network_does_for_any_number_of_images(quick, capsys):
    export.main(("ms",))
    (subject,) = subjects(("ms",), "export")
    session = onnxruntime.InferenceSession(str(folder(quick, "export", "ms") / "model.onnx"))
    pixels = subject.images("test").pixels
    expected = subject.results.logits.softmax(1).numpy()
    for images in (1, 7):
        (answer,) = session.run(None, {"pixels": pixels[:images].astype(np.float32)})
        assert np.abs(answer - expected[:images]).max() < 1e-4
    assert "0 of 20 answers differ" in capsys.readouterr().out
    card = (folder(quick, "export", "ms") / "MODEL_CARD.md").read_text()
    assert f"{100 * subject.results.metrics['accuracy']:.1f} %" in card and subject.final.sha256 in card


def test_models_are_compared_in_one_order_and_the_sample_with_none_but_itself(place, monkeypatch):
    """They once came out of a set: in another order in every process."""
    for profile in ("course", "full"):
        shutil.copytree(place.root / "outputs/demo", place.root / "outputs" / profile, copy_function=os.link)
    assert list(results_of_profiles(("rgb", "ms"))) == [("demo", "rgb"), ("demo", "ms")]
    monkeypatch.setattr(config, "profile", "full")
    assert list(results_of_profiles(("rgb",))) == [("full", "rgb"), ("course", "rgb")]


def test_a_former_picture_stays_where_its_images_cannot_be_read(quick, tmp_path):
    (subject,) = subjects(("rgb",), "geography")
    path = folder(quick, "geography") / "two_labels.png"
    path.parent.mkdir()
    path.write_bytes(b"former")
    config.dataset_root = tmp_path / "nowhere"
    with pytest.raises(UserError):
        geography.draw_pairs(subject, [("River/River_1", "Highway/Highway_1", "River", "own")])
    assert path.read_bytes() == b"former"
    assert geography.draw_pairs(subject, []) == [] and not path.exists()

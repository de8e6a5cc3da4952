"""The whole chain as a user runs it, and what the grader's scripts say when something was changed."""

import csv
import json
import os
import shutil
import subprocess
import sys
import time
import zipfile

import numpy as np
import pypdf
import pytest
import torch
from conftest import CODE, state_of, unlinked
from sklearn.metrics import accuracy_score, recall_score

import make_report
from dataset import CLASSES, EuroSATDataset
from engine.evaluation import in_order, load_model, predict
from engine.metrics import compute_metrics
from engine.splits import read_splits
from project import UserError, config
from studies import submission

SCRIPTS = sorted(path.name for path in CODE.glob("*.py") if "__main__" in path.read_text())


def test_every_script_names_what_it_wrote_and_the_next_command(trained):
    for script, output in trained.transcript.items():
        assert "next: " in output, script
        assert "wrote" in output or "nothing was written" in output or script == "reproduce.py", script


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_says_what_is_read_and_written(here, script):
    output = here.run(script, "--help")
    assert "writes" in output and len(output.splitlines()) < 40
    assert here.run(script, "--sed", status=2).count("unrecognized arguments") == 1


def test_test_metrics_are_those_of_the_saved_logits(trained):
    for task in ("rgb", "ms"):
        folder = trained.root / "outputs/demo" / task
        logits = torch.load(folder / "test_logits.pt", weights_only=True)
        rows = list(csv.DictReader((folder / "test_files.csv").open()))
        metrics = json.loads((folder / "test_metrics.json").read_text())
        labels = [int(row["label"]) for row in rows]
        predicted = logits.argmax(1).tolist()
        assert logits.shape == (20, 10) and logits.dtype == torch.float32
        assert (folder / "test_files.csv").read_text() == (trained.root / "splits/demo" / task / "test.csv").read_text()
        assert metrics["accuracy"] == accuracy_score(labels, predicted)
        recall = recall_score(labels, predicted, labels=range(10), average=None, zero_division=np.nan)
        assert list(metrics["tpr"].values()) == recall.tolist() and list(metrics["tpr"]) == list(CLASSES)
        assert np.trace(metrics["confusion"]) == round(metrics["accuracy"] * 20)


def test_reproduced_to_the_last_bit(trained):
    output = trained.transcript["reproduce.py"]
    assert output.count("\nREPRODUCED to the last bit") == 2 and "max |difference| 0" in output


def test_comparing_never_writes(place):
    before = state_of(place.root)
    place.here.run("reproduce.py", "rgb")
    assert state_of(place.root) == before


def change_a_logit(place, by=0.01):
    place.change("test_logits.pt", lambda logits: logits[7, 3].add_(by))


def change_a_logit_a_little(place):
    """By less than any tolerance."""
    change_a_logit(place, 1e-6)


def swap_rows(place):
    path = place.output("test_files.csv")
    lines = path.read_text().splitlines()
    lines[3], lines[9] = lines[9], lines[3]
    path.write_text("\n".join(lines) + "\n")


def change_the_model(place):
    place.change("final_model.pt", lambda content: content["model"]["linear.bias"][0].add_(0.01))


@pytest.mark.parametrize(
    "change, told",
    [
        (change_a_logit, ["saved logits or file list were changed", "differ by up to 0.01", "row 8"]),
        (change_a_logit_a_little, ["saved logits or file list were changed"]),
        (swap_rows, ["in another order"]),
        (change_the_model, ["saved for another model"]),
    ],
)
def test_not_reproduced_says_why(place, change, told):
    change(place)
    output = place.here.run("reproduce.py", "rgb", status=1)
    verdict = [line for line in output.splitlines() if line.startswith("NOT REPRODUCED")]
    assert len(verdict) == 1 and all(text in verdict[0] for text in told), output


def test_one_swapped_image_is_not_reproduced(place):
    first, second = [
        unlinked(place.own_sample() / line.split(",")[0])
        for line in place.list("rgb", "test").read_text().splitlines()[5:15:9]
    ]
    kept = first.read_bytes()
    first.write_bytes(second.read_bytes())
    second.write_bytes(kept)
    output = place.here.run("reproduce.py", "rgb", status=1)
    assert "NOT REPRODUCED: the pixels of some test image differ" in output


def test_a_truncated_reference_is_named(place):
    path = place.output("test_logits.pt")
    path.write_bytes(path.read_bytes()[:200])
    assert "is damaged" in place.here.refused("reproduce.py", "rgb")


def test_save_keeps_the_former_reference(place):
    change_a_logit(place)
    folder = place.root / "outputs/demo/rgb"
    former = (folder / "test_logits.pt").read_bytes()
    for _ in range(2):  # the second time nothing differs, so nothing more is kept
        place.here.run("reproduce.py", "rgb", "--save")
        assert [path.read_bytes() for path in folder.glob("test_logits.pt.*.backup")] == [former]
    assert "\nREPRODUCED" in place.here.run("reproduce.py", "rgb")


def test_a_model_of_other_lists_does_not_see_the_test_list(place):
    config.split_seed = 99
    place.here.run("split_data.py", "--overwrite")
    assert "was trained with other lists" in place.here.refused("predict_test.py", "rgb")


def test_ranking(trained):
    folder = trained.root / "outputs/demo/rgb"
    rows = list(csv.DictReader((folder / "ranking.csv").open()))
    probabilities = torch.load(folder / "test_logits.pt", weights_only=True).double().softmax(1)
    files = [row["file"] for row in csv.DictReader((folder / "test_files.csv").open())]
    for name in ("AnnualCrop", "Forest", "Highway"):
        order = sorted(range(20), key=lambda i: -probabilities[i, CLASSES.index(name)])
        ranked = [files[i] for i in order]
        of = {
            row: [r["file"] for r in rows if (r["class_name"], r["row"]) == (name, row)]
            for row in ("top 5", "bottom 5")
        }
        assert of["top 5"] == ranked[:5] and of["bottom 5"] == ranked[:-6:-1]
    own = [row for row in rows if row["row"] == "own bottom 5"]
    assert all(row["true_class"] == row["class_name"] for row in own) and len(own) == 3 * 2


def test_report(trained):
    pdf = pypdf.PdfReader(trained.root / "report/report-demo.pdf")
    text = " ".join(" ".join(page.extract_text() for page in pdf.pages).split())
    accuracy = json.loads((trained.root / "outputs/demo/ms/test_metrics.json").read_text())["accuracy"]
    assert len(pdf.pages) <= 3
    for needed in (
        "not filled in",
        "DATASET_ROOT",
        "predict_test.py",
        "reproduce.py",
        f"{100 * accuracy:.1f}".rstrip("0").rstrip("."),
        "right. So few say little",
        "639 pairs of EuroSAT patches show the same ground",
        "174 of them",
    ):
        assert needed in text, needed
    assert "Missing here" not in text


def test_the_same_results_give_the_same_report_byte_by_byte(place):
    path = place.root / "report/report-demo.pdf"
    place.here.run("make_report.py")
    before = path.read_bytes()
    time.sleep(1.1)  # a date in it would have changed
    place.here.run("make_report.py")
    assert path.read_bytes() == before


def test_the_report_of_course_names_the_figures_on_the_splits_that_papers_compare_on(place):
    config.profile = "course"
    there = place.root / "outputs/published/rgb"
    shutil.copytree(place.root / "outputs/demo/rgb", there)
    accuracy = json.loads((there / "test_metrics.json").read_text())["accuracy"]
    missing = []
    assert f"published {accuracy:.1%} (" in make_report.limits([], missing) and not missing
    (there / "test_logits.pt").unlink()
    assert "published" not in make_report.limits([], missing) and "test_logits.pt" in missing[0]


def test_the_figure_with_one_view_is_beside_that_with_eight(trained, sample):
    """Of the setting that won; by hand from the model."""
    folder, lists = trained.root / "outputs/demo/ms", read_splits(trained.root / "splits/demo/ms", "ms")
    final = load_model(folder, "ms", torch.device("cpu"))
    test = EuroSATDataset(sample, "ms", lists["test"], final.bands, (final.mean, final.std))
    for views, name in ((1, "one_view"), (final.setting.views, "accuracy")):
        logits, labels = predict(final.model, in_order(test), views)
        expected = compute_metrics(logits, labels.numpy())["accuracy"]
        assert json.loads((folder / "test_metrics.json").read_text())[name] == expected


def test_report_names_what_is_missing_and_the_team(place):
    (place.root / "outputs/demo/ms/ranking.png").unlink()
    (place.root / "outputs/demo/rgb/test_metrics.json").unlink()
    config.team = [("Ada Lovelace", 3141592)]
    output = place.here.run("make_report.py")
    assert "missing: outputs/demo/ms/ranking.png" in output
    assert "missing: test results of the present outputs/demo/rgb/final_model.pt: there is no reference" in output
    text = text_of_report(place)
    assert "Missing here: test results of the present" in text and "Ada Lovelace (3141592)" in text


def test_old_test_results_are_not_reported_for_a_new_model(place):
    change_the_model(place)
    assert "missing: test results of the present" in place.here.run("make_report.py")
    assert "they are of another model" in place.here.refused("rank_images.py", "rgb")


def text_of_report(place) -> str:
    pages = pypdf.PdfReader(place.root / "report/report-demo.pdf").pages
    return " ".join(page.extract_text().replace("\n", " ") for page in pages)


def test_figures_edited_by_hand_are_neither_reproduced_nor_reported(place):
    path = place.output("test_metrics.json")
    path.write_text(json.dumps({**json.loads(path.read_text()), "accuracy": 0.9999}))
    output = place.here.run("reproduce.py", "rgb", status=1)
    assert "NOT REPRODUCED: test_metrics.json has another accuracy than the saved logits give" in output
    assert "missing: test results of the present outputs/demo/rgb/final_model.pt" in place.here.run("make_report.py")
    assert "99.99" not in text_of_report(place)


def old_ranking(place):
    """ranking.png of the present results"""
    swap(place, "ranking.png")


def old_confusion_matrix(place):
    """confusion_matrix.png of the present results"""
    swap(place, "confusion_matrix.png")


def old_curves(place):
    """first/val_curves.png of the present results"""
    swap(place, "first/val_curves.png", "second/val_curves.png")


def damaged_figure(place):
    """ranking.png of the present results (it is of others, or no figure)"""
    place.output("ranking.png").write_bytes(b"no figure")


def old_selection(place):
    """selection.csv of the present model (it is of other runs)"""
    path = place.output("selection.csv")
    run = next(csv.DictReader(path.open()))["run"]
    path.write_text(path.read_text().replace(run, "0123456789abcdef"))


def other_lists(place):
    """the lists that outputs/demo/rgb/final_model.pt was trained with (those in splits/ are others)"""
    place.edit("rgb", "train", lambda lines: lines[:-1])


def swap(place, name, other=None):
    """Put another result's figure in the place of one."""
    figure = place.root / "outputs/demo" / (f"rgb/{other}" if other else f"ms/{name}")
    place.output(name).write_bytes(figure.read_bytes())


@pytest.mark.parametrize(
    "change", [old_ranking, old_confusion_matrix, old_curves, damaged_figure, old_selection, other_lists]
)
def test_the_report_shows_nothing_of_another_run(place, change):
    change(place)
    output = place.here.run("make_report.py")
    assert output.count("missing: ") == 1 and change.__doc__ in output
    assert f"Missing here: {output.partition('missing: ')[2].splitlines()[0]}"[:60] in text_of_report(place)
    assert "60 / 20 / 20" in text_of_report(place)  # the model's own lists, whatever lies in splits/ now


def test_the_report_says_which_seed_the_models_were_trained_with(place):
    config.team, config.seed = [("Ada Lovelace", 3141592)], 3141592
    output = place.here.run("make_report.py")
    told = "Trained with another seed than the team's, 3141592 (RGB: 20190702, multispectral: 20190702)"
    assert told in output and told in text_of_report(place) and "seed 20190702" in text_of_report(place)


def test_letters_that_the_report_has_not_are_told(place):
    config.team = [("Ζωή Émilie Łukasiewicz-Петрова", 1)]
    assert "font lacks" not in place.here.run("make_report.py")
    config.team = [("王小明", 1), ("محمد", 2)]
    assert "The report's font lacks 6 of the team's letters" in place.here.run("make_report.py")
    assert "font lacks 6" in text_of_report(place)


def test_output_that_is_closed_is_no_verdict(trained):
    """`reproduce.py | head -1` ended with 1 once, as NOT REPRODUCED does."""
    process = trained.start("reproduce.py", "rgb")
    process.stdout.close()
    assert process.wait(timeout=100) == 141 and process.stderr.read() == ""


def test_one_task_works_without_the_other(here, own_sample):
    shutil.rmtree(own_sample / "EuroSAT_MS")
    config.dataset_root = own_sample
    assert "no lists for ms" in here.run("split_data.py")
    for script in (
        "verify_splits.py",
        "train_rgb.py",
        "predict_test.py",
        "reproduce.py",
        "rank_images.py",
        "make_report.py",
    ):
        here.run(script)
    assert "python split_data.py" in here.refused("train_ms.py")


def test_the_submission_verifies_and_reproduces_where_it_is_unpacked(place, tmp_path, sample, capsys):
    """From the zip's own code, in a folder of its own; no image lies in it."""
    shutil.copytree(place.trained_root / "report", place.root / "report")
    submission.main()
    out = capsys.readouterr().out
    path = place.root / "submission.zip"
    first = path.read_bytes()
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
        archive.extractall(tmp_path / "elsewhere")
    assert not [name for name in names if name.endswith((".jpg", ".tif", "best.pt", "last.pt", ".npy", ".backup"))]
    assert {"eurosat/outputs/demo/ms/final_model.pt", "eurosat/report/report-demo.pdf"} <= set(names)
    assert all(name.removeprefix("eurosat/") in out for name in names)
    folder = tmp_path / "elsewhere/eurosat"
    environment = {**os.environ, "EUROSAT_DATASET_ROOT": str(sample), "EUROSAT_PROFILE": "demo"}
    for script, says in (("verify_splits.py", ""), ("reproduce.py", "REPRODUCED to the last bit")):
        command = [sys.executable, folder / script]
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
        assert done.returncode == 0 and says in done.stdout, done.stdout + done.stderr
    submission.main()
    assert path.read_bytes() == first


def test_no_submission_without_results_of_the_present_model(place):
    place.output("test_logits.pt").unlink()
    with pytest.raises(UserError, match="there is no reference .*test_logits.pt; run: python predict_test.py rgb"):
        submission.main()

"""The whole chain as a user runs it, and what the grader's scripts say when something was changed."""

import csv
import json
import os
import re
import shutil
import subprocess
import sys
import time
import zipfile

from base.errors import UserError
from base.project import CLASSES, MS, RGB, config

import pypdf
import pytest
import torch
from conftest import CHAIN, CODE, files_below, state_of
from sklearn.metrics import accuracy_score, recall_score

from dataset import EuroSATDataset
from engine.final_model import load_model
from engine.metrics import compute_metrics
from engine.results import predict
from engine.splits import read_splits
from studies import submission

SCRIPTS = sorted(path.name for path in CODE.glob("*.py") if "__main__" in path.read_text())


def test_every_script_names_what_it_wrote_and_the_next_command(trained):
    for script in CHAIN:
        output = trained.transcript[script]
        assert "next: " in output, script
        assert "wrote" in output or "nothing was written" in output or script == "reproduce.py", script


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_says_what_is_read_and_written(here, script):
    output = here.run(f"{script} --help")
    assert "writes" in output and len(output.splitlines()) < 40
    assert "error: " in here.run(f"{script} --sed", status=2)


def test_output_that_is_closed_is_no_verdict(user):
    """`python reproduce.py | head -1` must not end with 1, which means NOT REPRODUCED."""
    process = user.start("split_data.py")
    process.stdout.close()
    assert process.wait(timeout=100) == 141 and process.stderr.read() == ""


def test_one_task_works_without_the_other(here, own_sample):
    shutil.rmtree(own_sample / "EuroSAT_MS")
    config.dataset_root = own_sample
    assert "no lists for ms" in here.run("split_data.py")
    here.run("verify_splits.py")
    config.settings["demo"]["rgb"] = config.settings["demo"]["rgb"][:1]
    for script in ("train_rgb.py", "predict_test.py", "reproduce.py", "rank_images.py", "make_report.py"):
        here.run(script)
    assert "python split_data.py" in here.refused("train_ms.py")


def text_of(path) -> str:
    return " ".join(" ".join(page.extract_text() for page in pypdf.PdfReader(path).pages).split())


def text_of_report(place) -> str:
    return text_of(place.root / "report/report-demo.pdf")


@pytest.mark.parametrize("task", [RGB, MS], ids=["rgb", "ms"])
def test_test_metrics_are_those_of_the_saved_logits_and_of_the_model(place, task):
    folder = task.outputs
    logits = torch.load(folder / "test_logits.pt", weights_only=True)
    metrics = json.loads((folder / "test_metrics.json").read_text())
    assert logits.shape == (20, 10) and logits.dtype == torch.float32
    assert (folder / "test_files.csv").read_text() == place.list_path(task.name, "test").read_text()
    labels = [int(row["label"]) for row in csv.DictReader((folder / "test_files.csv").open())]
    recall = recall_score(labels, logits.argmax(1), labels=range(10), average=None)
    assert list(metrics["tpr"].values()) == recall.tolist() and list(metrics["tpr"]) == list(CLASSES)
    assert metrics["accuracy"] == accuracy_score(labels, logits.argmax(1))
    # The accuracies with one view and with the setting's views are those of the model.
    final, split = load_model(task, torch.device("cpu")), read_splits(task.splits, task)["test"]
    data = EuroSATDataset(config.dataset_root, task, split, final.bands, (final.mean, final.std))
    for views, name in ((1, "one_view"), (final.setting.views, "accuracy")):
        assert metrics[name] == compute_metrics(predict(final.model, data, views), split.labels)["accuracy"]


def test_ranking(trained):
    folder = trained.root / "outputs/demo/rgb"
    rows = list(csv.DictReader((folder / "ranking.csv").open()))
    probabilities = torch.load(folder / "test_logits.pt", weights_only=True).double().softmax(1)
    files = [row["file"] for row in csv.DictReader((folder / "test_files.csv").open())]
    for name in ("AnnualCrop", "Forest", "Highway"):
        order = sorted(range(20), key=lambda i: -probabilities[i, CLASSES.index(name)])
        ranked = [files[i] for i in order]
        of_class = [file for file in ranked if f"/{name}/" in file]
        for row, expected in (("top 5", ranked[:5]), ("bottom 5", ranked[:-6:-1]), ("own bottom 5", of_class[::-1])):
            assert [r["file"] for r in rows if (r["class_name"], r["row"]) == (name, row)] == expected


def test_reproduced_to_the_last_bit(trained):
    output = trained.transcript["reproduce.py"]
    assert output.count("\nREPRODUCED to the last bit") == 2 and "max |difference| 0" in output


def test_comparing_writes_nothing(place):
    before = state_of(place.root)
    place.run("reproduce.py rgb")
    assert state_of(place.root) == before


def add_to_a_logit(by):
    return lambda place: place.change("test_logits.pt", lambda logits: logits[7, 3].add_(by))


def swap_two_rows(place):
    path = place.output("test_files.csv")
    lines = path.read_text().splitlines()
    lines[3], lines[9] = lines[9], lines[3]
    path.write_text("\n".join(lines) + "\n")


def swap_two_images(place):
    first, second = (place.listed_image("rgb", "test", index) for index in (4, 13))
    first.rename(first.with_name("x"))
    second.rename(first)
    first.with_name("x").rename(second)


def change_the_model(place):
    place.change("final_model.pt", lambda content: content["model"]["linear.bias"][0].add_(0.01))


def edit_a_figure(place):
    path = place.output("test_metrics.json")
    path.write_text(json.dumps({**json.loads(path.read_text()), "accuracy": 0.9999}))


# A change, and what the verdict must say. The second one is smaller than any tolerance.
CHANGES = [
    (add_to_a_logit(0.01), "saved logits or file list were changed.*up to 0.01.*row 8"),
    (add_to_a_logit(1e-6), "saved logits or file list were changed"),
    (swap_two_rows, "in another order"),
    (change_the_model, "saved for another model"),
    (edit_a_figure, "test_metrics.json has another accuracy"),
]


@pytest.mark.parametrize("change, told", [*CHANGES, (swap_two_images, "pixels of some test image differ")])
def test_not_reproduced_says_why(place, change, told):
    change(place)
    output = place.run("reproduce.py rgb", status=1)
    assert re.search(f"(?m)^NOT REPRODUCED: .*{told}", output), output


@pytest.mark.parametrize("change, _", CHANGES)
def test_changed_results_are_neither_reported_nor_ranked(place, change, _):
    change(place)
    assert "missing: test results of the present outputs/demo/rgb/final_model.pt" in place.run("make_report.py")
    assert "99.99" not in text_of_report(place)
    assert "python predict_test.py rgb" in place.refused("rank_images.py rgb")


def test_save_keeps_the_former_reference(place):
    add_to_a_logit(0.01)(place)
    former = (place.outputs / "test_logits.pt").read_bytes()
    for _ in range(2):  # the second time nothing differs, so nothing more is kept
        place.run("reproduce.py rgb --save")
        assert [path.read_bytes() for path in place.outputs.glob("test_logits.pt.*.backup")] == [former]
    assert "\nREPRODUCED" in place.run("reproduce.py rgb")


def test_the_report_has_what_the_assignment_asks_for_on_three_pages(trained):
    path = trained.root / "report/report-demo.pdf"
    text, metrics = text_of(path), json.loads((trained.root / "outputs/demo/ms/test_metrics.json").read_text())
    assert len(pypdf.PdfReader(path).pages) <= 3
    for needed in (
        *("not filled in", "DATASET_ROOT", "PROJECT_ROOT", "predict_test.py", "reproduce.py", "60 / 20 / 20"),
        *(f"{100 * metrics['accuracy']:.1f}".rstrip("0").rstrip("."), "639", "174", "huggingface.co"),
    ):
        assert needed in text, needed
    assert "missing" not in text.lower()


def test_the_report_of_the_models_here_has_room_for_every_notice(here):
    for name in ("outputs", "splits"):
        (config.project_root / name).symlink_to(CODE / name)
    config.profile, config.seed = "course", 3141592
    config.team = [("Ada Augusta Lovelace-Byron", 3141592), ("Emmy Noether", 2718281), ("Łukasz 王 Müller", 1618033)]
    output = here.run("make_report.py")
    assert "another seed" in output and "font lacks" in output and "missing" not in output
    assert len(pypdf.PdfReader(config.project_root / "report/report.pdf").pages) == 3


def test_the_same_results_give_the_same_report_byte_by_byte(place):
    contents = []
    for _ in range(2):
        place.run("make_report.py")
        contents.append((place.root / "report/report-demo.pdf").read_bytes())
        time.sleep(1.1)  # a date in it would change
    assert contents[0] == contents[1]


def test_the_report_names_what_is_missing_and_the_team(place):
    for path in (MS.outputs / "ranking.png", RGB.outputs / "test_metrics.json"):
        path.unlink()
    place.change("final_model.pt", lambda content: content.pop("selection"))  # as earlier versions wrote it
    config.team = [("Ada Lovelace", 3141592), ("Ζωή Łukasiewicz-Петрова", 1)]
    output = place.run("make_report.py")
    assert "missing: outputs/demo/ms/ranking.png" in output and "font" not in output
    assert "missing: the comparison of settings in outputs/demo/rgb/final_model.pt" in output
    assert "test results of the present outputs/demo/rgb/final_model.pt" in output and "test_metrics.json" in output
    text = text_of_report(place)
    assert "test results of the present" in text and "Ada Lovelace" in text and "3141592" in text


def replaced(name, other):
    """Another figure in the place of one in outputs/demo/rgb."""
    return lambda place: place.output(name).write_bytes((place.outputs / other).read_bytes())


@pytest.mark.parametrize(
    "told, change",
    [
        ("ranking.png", replaced("ranking.png", "../ms/ranking.png")),
        ("first/val_curves.png", replaced("first/val_curves.png", "second/val_curves.png")),
        ("confusion_matrix.png", replaced("confusion_matrix.png", "selection.csv")),
        ("the lists that outputs/demo/rgb", lambda place: place.edit("rgb", "train", lambda lines: lines[:-1])),
    ],
)
def test_the_report_shows_nothing_of_another_run(place, told, change):
    change(place)
    output = place.run("make_report.py")
    assert output.count("missing: ") == 1 and told in output.partition("missing: ")[2]
    text = text_of_report(place)
    assert told in text and "60 / 20 / 20" in text  # the model's lists, whatever lies in splits/ now


def test_the_report_says_which_seed_the_models_were_trained_with(place):
    config.team, config.seed = [("王小明", 3141592), ("محمد", 2)], 3141592
    output = place.run("make_report.py")
    assert "another seed than the team's, 3141592" in output and "font lacks 6 letters" in output
    text = text_of_report(place)
    assert "another seed than the team's, 3141592" in text and "20190702" in text and "font lacks 6 letters" in text


def test_the_report_of_course_compares_the_splits_that_papers_use(place):
    shutil.copytree(place.root / "outputs/demo", place.root / "outputs/published")
    shutil.move(place.root / "outputs/demo", place.root / "outputs/course")
    config.profile = "course"
    accuracy = json.loads((RGB.outputs / "test_metrics.json").read_text())["accuracy"]
    for _ in range(2):
        output = place.run("make_report.py")
        text = text_of(place.root / "report/report.pdf")
        there = (place.root / "outputs/published/rgb/test_logits.pt").exists()
        assert there == (f"published {accuracy:.1%}" in text.replace(" %", "%")) == ("published/rgb" not in output)
        (place.root / "outputs/published/rgb/test_logits.pt").unlink(missing_ok=True)


def test_the_submission_verifies_and_reproduces_where_it_is_unpacked(place, tmp_path, sample):
    """With the zip's code, in another folder, in new processes. No image is in it."""
    shutil.copytree(place.trained_root / "report", place.root / "report")
    submission.main()
    path = place.root / "submission.zip"
    first = path.read_bytes()
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
        archive.extractall(tmp_path / "elsewhere")
    assert not [name for name in names if name.endswith((".jpg", ".tif", "last.pt", ".backup", ".lock"))]
    for needed in ("outputs/demo/ms/final_model.pt", "report/report-demo.pdf", "base/project.py"):
        assert f"eurosat/{needed}" in names
    folder = tmp_path / "elsewhere/eurosat"
    environment = {**os.environ, "EUROSAT_DATASET_ROOT": str(sample), "EUROSAT_PROFILE": "demo"}
    for script, says in (("verify_splits.py", "checks passed"), ("reproduce.py", "REPRODUCED to the last bit")):
        done = subprocess.run([sys.executable, folder / script], env=environment, capture_output=True, text=True)
        assert done.returncode == 0 and says in done.stdout, done.stdout + done.stderr
    submission.main()
    assert path.read_bytes() == first


def test_no_submission_without_results_of_the_present_model(place):
    before = files_below(place.root)
    place.output("test_logits.pt").unlink()
    with pytest.raises(UserError, match=r"test_logits\.pt.*python predict_test\.py rgb"):
        submission.main()
    assert files_below(place.root).keys() < before.keys()

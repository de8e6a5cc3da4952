"""All test images in one file that opens in a browser: outputs/<profile>/<task>/explorer/explorer.html.

Run from the project root: python -m studies.explorer, with `rgb` or `ms` for one task; after studies.explain_errors, whose
examples it shows. A minute. The confusion matrix is the way in; the page needs no server, loads nothing from elsewhere, and
says its keys. A verdict per image is kept in the browser and saved as verdicts.csv: put that into explain_errors/, and
studies.explain_errors reads it back.

reads   the final model's test results, explain_errors/neighbours.csv and errors.csv, the images of train and test
writes  outputs/<profile>/<task>/explorer/explorer.html
"""

import base64
import csv
import io
import json
from pathlib import Path

import jinja2
import numpy as np
import simplejpeg

from dataset import CLASSES, class_of, patch_of
from project import TASKS, UserError, run, shown, write_text
from studies.explain_errors import CAUSES, HEADER, NEIGHBOURS_HEADER
from studies.subject import Subject, subjects

PAGE = Path(__file__).with_name("explorer.html")
JPEG_QUALITY = 88  # of the embedded pictures: 2,000 test images with their examples are some 10 MB


def main(tasks: tuple[str, ...]) -> None:
    for subject in subjects(tasks, "explorer"):
        records, files = describe(subject)
        page = jinja2.Template(PAGE.read_text(encoding="utf-8"), autoescape=True).render(
            title=f"EuroSAT {subject.title}: {len(records):,} test images",
            # "<" cannot end the script element that holds the text.
            data=json.dumps(
                {
                    "model": subject.final.sha256[:16],
                    "classes": CLASSES,
                    "causes": CAUSES,
                    "records": records,
                    "pictures": pictures(subject, files),
                }
            ).replace("<", "\\u003c"),
        )
        path = subject.folder / "explorer.html"
        write_text(path, page)
        print(f"{subject.title}: {len(records):,} test images\nwrote {shown(path)}: {path.stat().st_size / 1e6:.0f} MB")


def describe(subject: Subject) -> tuple[list[dict], list[str]]:
    """What the page knows of each test image, and the files of all pictures, to which its numbers point."""
    probabilities = subject.results.logits.double().softmax(1).numpy()
    causes = {row["file"]: row for row in read(subject, "errors.csv", HEADER)}
    near = {row["file"]: row for row in read(subject, "neighbours.csv", NEIGHBOURS_HEADER)}
    test = subject.results.split
    if set(near) != set(test.files):
        raise UserError(
            f"{shown(folder_of(subject))} is of other test images; run: python -m studies.explain_errors {subject.task}"
        )
    files = sorted({*test.files, *(row[kind] for row in near.values() for kind in ("example", "counterexample"))})
    number = {file: index for index, file in enumerate(files)}
    records = []
    for file, label, own in zip(test.files, test.labels.tolist(), probabilities, strict=True):
        row, error = near[file], causes.get(file, {})
        record = {"file": file, "picture": number[file], "label": label, "p": [round(float(p), 4) for p in own]}
        record["answer"] = int(own.argmax())
        for kind in ("example", "counterexample"):
            record[kind] = [number[row[kind]], class_of(patch_of(row[kind])), row[kind], row[f"{kind}_distance"]]
        records.append(record | {"cause": error.get("cause", ""), "verdict": error.get("verdict", "")})
    return records, files


def folder_of(subject: Subject) -> Path:
    return subject.folder.with_name("explain_errors")


def read(subject: Subject, name: str, header: list[str]) -> list[dict]:
    """A table that studies.explain_errors left.

    Raises:
        UserError: it is not there, or has other columns.
    """
    path = folder_of(subject) / name
    remedy = f"run: python -m studies.explain_errors {subject.task}"
    if not path.exists():
        raise UserError(f"there is no {shown(path)}; {remedy}")
    table = csv.DictReader(io.StringIO(path.read_text(encoding="utf-8")))
    rows = list(table)
    if table.fieldnames != header:
        raise UserError(f"{shown(path)} has other columns than {', '.join(header)}; {remedy}")
    return rows


def pictures(subject: Subject, files: list[str]) -> list[str]:
    """JPEGs in base64, in the order of the files."""
    encoded = (
        simplejpeg.encode_jpeg(np.ascontiguousarray(image), JPEG_QUALITY, colorsubsampling="444")
        for image in subject.pictures(files)
    )
    return [base64.b64encode(content).decode() for content in encoded]


if __name__ == "__main__":
    run(main, __doc__, choices=TASKS)

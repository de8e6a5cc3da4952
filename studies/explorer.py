"""All test images in one HTML file for a browser: outputs/<profile>/<task>/explorer/explorer.html.

Run from the project root: python -m studies.explorer; with `rgb` or `ms` for one task. Run studies.explain_errors first: the page
shows its examples. A minute. The page starts with the confusion matrix, needs no server, loads nothing from elsewhere and
explains its keys. The browser keeps a verdict per image and saves them as verdicts.csv. Put that file into explain_errors/;
studies.explain_errors then reads it.

reads   the final model's test results, explain_errors/neighbours.csv and errors.csv, the images of train and test
writes  outputs/<profile>/<task>/explorer/explorer.html
"""

import base64
import json
from pathlib import Path

from base.command_line import run
from base.errors import UserError
from base.files import read_csv, reading, write_text
from base.project import CLASSES, TASKS, Task, display_path

import jinja2
import numpy as np
import simplejpeg

from dataset import class_of, patch_of
from studies.explain_errors import CAUSES, HEADER, NEIGHBOURS_HEADER
from studies.subject import Subject, subjects

PAGE = Path(__file__).with_name("explorer.html")
JPEG_QUALITY = 88  # of the embedded images: 2,000 test images and their examples take some 10 MB


def main(tasks: list[Task]) -> None:
    for subject in subjects(tasks, "explorer"):
        records, files = page_records(subject)
        content = {"model": subject.final.sha256[:16], "classes": CLASSES, "causes": CAUSES, "records": records}
        data = json.dumps(content | {"pictures": encoded_pictures(subject, files)})
        page = jinja2.Template(PAGE.read_text(encoding="utf-8"), autoescape=True).render(
            title=f"EuroSAT {subject.task.title}: {len(records):,} test images",
            data=data.replace("<", "\\u003c"),  # "<" could end the script element that holds the text
        )
        path = subject.folder / "explorer.html"
        write_text(path, page)
        print(f"{subject.task.title}: {len(records):,} test images")
        print(f"wrote {display_path(path)}: {path.stat().st_size / 1e6:.0f} MB")


def page_records(subject: Subject) -> tuple[list[dict], list[str]]:
    """What the page needs for each test image, and the files of all images. Records name an image by its index there."""
    folder, test = subject.folder.with_name("explain_errors"), subject.results.split
    remedy = f"run: python -m studies.explain_errors {subject.task.name}"
    errors = {row["file"]: row for row in read_errors_table(folder / "errors.csv", HEADER, remedy)}
    near = {row["file"]: row for row in read_errors_table(folder / "neighbours.csv", NEIGHBOURS_HEADER, remedy)}
    if set(near) != set(test.files):
        raise UserError(f"{display_path(folder)} holds other test images; {remedy}")
    probabilities = subject.results.logits.double().softmax(1).numpy()
    files = sorted({*test.files, *(row[kind] for row in near.values() for kind in ("example", "counterexample"))})
    number = {file: index for index, file in enumerate(files)}
    records = []
    for file, label, p in zip(test.files, test.labels.tolist(), probabilities, strict=True):
        row, error = near[file], errors.get(file, {})
        record = {"file": file, "picture": number[file], "label": label, "p": [round(float(value), 4) for value in p]}
        record["predicted"] = int(p.argmax())
        for kind in ("example", "counterexample"):
            record[kind] = [number[row[kind]], class_of(patch_of(row[kind])), row[kind], row[f"{kind}_distance"]]
        records.append(record | {"cause": error.get("cause", ""), "verdict": error.get("verdict", "")})
    return records, files


def read_errors_table(path: Path, header: list[str], remedy: str) -> list[dict[str, str]]:
    """A table that studies.explain_errors wrote.

    Raises:
        UserError: it is missing, damaged, or has other columns.
    """
    with reading(path, remedy):
        rows = read_csv(path)
        if rows and list(rows[0]) != header:
            raise ValueError(f"its columns are not {', '.join(header)}")
    return rows


def encoded_pictures(subject: Subject, files: list[str]) -> list[str]:
    """JPEGs in base64, in the order of the files."""
    images = map(np.ascontiguousarray, subject.pictures(files))
    jpegs = (simplejpeg.encode_jpeg(image, JPEG_QUALITY, colorsubsampling="444") for image in images)
    return [base64.b64encode(content).decode() for content in jpegs]


if __name__ == "__main__":
    run(main, __doc__, choices=TASKS)

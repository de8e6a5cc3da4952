"""All test images in one HTML file for a browser: outputs/<profile>/<task>/explorer/explorer.html.

Run from the project root: python -m studies.explorer; with `rgb` or `ms` for one task. Run studies.explain_errors first: the page
shows its examples and nearest training images. If studies.autoencoder has run, those in its latent space stand below. A minute. The
page starts with ten random test images and the confusion matrix, needs no server, loads nothing from elsewhere and explains its
keys. The browser keeps a verdict per image and saves them as verdicts.csv. Put that file into explain_errors/;
studies.explain_errors then reads it.

reads   the final model's test results, explain_errors/neighbours.csv and errors.csv, autoencoder/neighbours.csv if it exists, the
        images of train and test
writes  outputs/<profile>/<task>/explorer/explorer.html
"""

import base64
import json
from pathlib import Path

from base.command_line import run
from base.errors import UserError
from base.files import read_csv, reading, write_text
from base.project import CLASSES, TASKS, Task, config, display_path

import jinja2
import numpy as np
import simplejpeg

from studies.explain_errors import CAUSES, HEADER, NEIGHBOURS_HEADER
from studies.subject import Subject, subjects

PAGE = Path(__file__).with_name("explorer.html")
JPEG_QUALITY = 88  # of the embedded images: 2,000 test images and 2,500 training images take some 20 MB
RANDOM_IMAGES = 10  # on the first screen, drawn by the split's seed
SPACES = {"explain_errors": "features of the classifier", "autoencoder": "latent space of the autoencoder"}


def main(tasks: list[Task]) -> None:
    for subject in subjects(tasks, "explorer"):
        content = page_content(subject)
        records = content["records"]
        data = json.dumps(content | {"pictures": encoded_pictures(subject, content["files"])})
        page = jinja2.Template(PAGE.read_text(encoding="utf-8"), autoescape=True).render(
            title=f"EuroSAT {subject.task.title}: {len(records):,} test images",
            data=data.replace("<", "\\u003c"),  # "<" could end the script element that holds the text
        )
        path = subject.folder / "explorer.html"
        write_text(path, page)
        print(f"{subject.task.title}: {len(records):,} test images, neighbours by {' and '.join(content['spaces'])}")
        print(f"wrote {display_path(path)}: {path.stat().st_size / 1e6:.0f} MB")


def page_content(subject: Subject) -> dict:
    """What the page needs but the pictures. Records, one for each test image, name an image by its index in "files"."""
    test, near = subject.results.split, read_neighbours(subject)
    path = subject.folder.with_name("explain_errors") / "errors.csv"
    rows = read_study_table(path, HEADER, f"run: python -m studies.explain_errors {subject.task.name}")
    errors = {row["file"]: row for row in rows}
    kinds = [name for name in NEIGHBOURS_HEADER if not name.endswith("_distance")]
    files = sorted({row[kind] for rows in near.values() for row in rows.values() for kind in kinds} - {""})
    number = {file: index for index, file in enumerate(files)}
    probabilities = subject.results.logits.double().softmax(1).numpy()
    records = []
    for file, label, p in zip(test.files, test.labels.tolist(), probabilities, strict=True):
        record = {"picture": number[file], "label": label, "predicted": int(p.argmax()), "spaces": []}
        for row in (rows[file] for rows in near.values()):
            space = {kind: [number[row[kind]], row[f"{kind}_distance"]] for kind in ("example", "counterexample")}
            nearest = [number[row[kind]] for kind in kinds if kind.startswith("nearest") and row[kind]]
            record["spaces"].append(space | {"nearest": nearest})
        error = errors.get(file, {})
        record |= {"cause": error.get("cause", ""), "verdict": error.get("verdict", "")}
        records.append(record | {"p": [round(float(value), 4) for value in p]})
    random = np.random.default_rng(config.split_seed).permutation(len(records))[:RANDOM_IMAGES].tolist()
    content = {"model": subject.final.sha256[:16], "classes": CLASSES, "causes": CAUSES, "spaces": list(near)}
    return content | {"files": files, "records": records, "random": random}


def read_neighbours(subject: Subject) -> dict[str, dict[str, dict[str, str]]]:
    """The tables that `write_neighbours` wrote, {space: {test file: row}}. Only the first must exist."""
    found = {}
    for study, space in SPACES.items():
        path, remedy = subject.folder.with_name(study) / "neighbours.csv", f"run: python -m studies.{study}"
        if found and not path.exists():
            continue
        found[space] = {row["file"]: row for row in read_study_table(path, NEIGHBOURS_HEADER, remedy)}
        if set(found[space]) != set(subject.results.split.files):
            raise UserError(f"{display_path(path)} holds other test images; {remedy}")
    return found


def read_study_table(path: Path, header: list[str], remedy: str) -> list[dict[str, str]]:
    """A table that another study wrote.

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

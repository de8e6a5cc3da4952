"""Pack what is handed in into one zip: code, lists, final models, logits, figures, report. It contains no images.

Run from the project root: make submission, or python -m studies.submission. Unpacked elsewhere, with DATASET_ROOT set,
verify_splits.py and reproduce.py give the same result as here. The same files give the same zip.

reads   the code, splits/, outputs/, report/; all profiles but "demo", unless that is the present one
writes  submission.zip
"""

import zipfile
from collections.abc import Iterator
from pathlib import Path

from base.command_line import run
from base.errors import UserError
from base.files import atomic_write
from base.project import PROFILES, TASKS, config, display_path, report_path

from engine.final_model import model_path, tasks_with_model
from engine.results import read_results_of_model

CODE = (
    *("*.py", "base/*", "engine/*", "scenes/*", "studies/*", "slurm/*", "report/*.typ", "docs/*"),
    *("README.md", "LICENSE", "Makefile", "requirements*.txt", "pyproject.toml"),
)
# Below the outputs of a task: its files, and those of its settings and studies.
RESULTS = (
    *("final_model.pt", "features.pt", "test_logits.pt"),
    *("*.csv", "*.json", "*.png", "*/*.csv", "*/*.json", "*/*.png", "*/*.md"),
)


def main() -> None:
    for task in tasks_with_model(list(TASKS.values())):
        read_results_of_model(task)  # stops if they are missing or belong to another model
    if not report_path().exists():
        raise UserError(f"there is no {display_path(report_path())}; run: python make_report.py")
    path = config.project_root / "submission.zip"
    with atomic_write(path) as partial, zipfile.ZipFile(partial, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, file in sorted(handed_in()):
            entry = zipfile.ZipInfo(f"eurosat/{name}", date_time=(2026, 1, 1, 0, 0, 0))
            entry.external_attr = 0o644 << 16
            archive.writestr(entry, file.read_bytes(), zipfile.ZIP_DEFLATED)
            print(f"{file.stat().st_size:>12,}  {name}")
    print(f"wrote {display_path(path)}: {path.stat().st_size / 1e6:.1f} MB")


def handed_in() -> Iterator[tuple[str, Path]]:
    """(name in the zip, file)."""
    yield from files_of(Path(__file__).parents[1], CODE, "")
    for task in (task.of_profile(profile) for profile in PROFILES for task in TASKS.values()):
        if model_path(task).exists() and (task.profile != "demo" or config.profile == "demo"):
            yield from files_of(task.splits, ("*.csv", "*.json"), f"splits/{task.profile}/{task.name}/")
            yield from files_of(task.outputs, RESULTS, f"outputs/{task.profile}/{task.name}/")
    for path in (report_path(), report_path("appendix")):
        if path.exists():
            yield f"report/{path.name}", path


def files_of(folder: Path, patterns: tuple[str, ...], prefix: str) -> Iterator[tuple[str, Path]]:
    """(prefix and name below the folder, file) of all files that a pattern matches; not what a training moved aside."""
    for file in (file for pattern in patterns for file in folder.glob(pattern) if file.is_file()):
        if not file.name.endswith(".backup") and "-before-" not in file.parent.name:
            yield prefix + file.relative_to(folder).as_posix(), file


if __name__ == "__main__":
    run(main, __doc__)

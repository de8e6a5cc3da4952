"""Pack what is handed in into one zip: code, lists, final models, logits, figures, report; no images, no caches.

Run from the project root: make submission, or python -m studies.submission. Unpacked elsewhere, with DATASET_ROOT set,
verify_splits.py and reproduce.py answer as they do here. The same files give the same zip.

reads   the code, splits/, outputs/, report/; of every profile but "demo" (unless that is the profile)
writes  submission.zip
"""

import zipfile
from collections.abc import Iterator
from pathlib import Path

from engine.evaluation import model_path, read_results_of_model, with_model
from project import TASKS, UserError, appendix_path, atomic_write, config, outputs_dir, report_path, run, shown

CODE = (
    *("*.py", "engine/*", "studies/*", "slurm/*", "report/*.typ", "docs/*"),
    *("README.md", "LICENSE", "Makefile", "requirements.txt", "pyproject.toml"),
)
# Below the folder of a profile and task: its own and those of its settings and studies.
RESULTS = (
    *("final_model.pt", "features.pt", "test_logits.pt"),
    *("*.csv", "*.json", "*.png", "*/*.csv", "*/*.json", "*/*.png", "*/*.md"),
)


def main() -> None:
    for task, folder in with_model({task: outputs_dir(task) for task in TASKS}).items():
        read_results_of_model(folder, task)  # stops where they are missing or of another model
    if not report_path().exists():
        raise UserError(f"there is no {shown(report_path())}; run: python make_report.py")
    path = config.project_root / "submission.zip"
    with atomic_write(path) as partial, zipfile.ZipFile(partial, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, file in sorted(handed_in()):
            entry = zipfile.ZipInfo(f"eurosat/{name}", date_time=(2026, 1, 1, 0, 0, 0))
            entry.external_attr = 0o644 << 16
            archive.writestr(entry, file.read_bytes(), zipfile.ZIP_DEFLATED)
            print(f"{file.stat().st_size:>12,}  {name}")
    print(f"wrote {shown(path)}: {path.stat().st_size / 1e6:.1f} MB")


def handed_in() -> Iterator[tuple[str, Path]]:
    """(name in the zip, file)."""
    code, root = Path(__file__).parent.parent, config.project_root
    yield from files_of(code, CODE)
    for folder in sorted((root / "outputs").glob("*/*")):
        profile, task = folder.parts[-2:]
        if task in TASKS and model_path(folder).exists() and (profile != "demo" or config.profile == "demo"):
            lists = root / "splits" / profile / task
            yield from (
                (f"splits/{profile}/{task}/{name}", file) for name, file in files_of(lists, ("*.csv", "*.json"))
            )
            yield from ((f"outputs/{profile}/{task}/{name}", file) for name, file in files_of(folder, RESULTS))
    for path in (report_path(), appendix_path()):
        if path.exists():
            yield f"report/{path.name}", path


def files_of(folder: Path, patterns: tuple[str, ...]) -> Iterator[tuple[str, Path]]:
    """(name below the folder, file) of all files that a pattern names; folders that a training put aside are left out."""
    for file in (file for pattern in patterns for file in folder.glob(pattern) if file.is_file()):
        if not file.name.endswith(".backup") and "-before-" not in file.parent.name:
            yield file.relative_to(folder).as_posix(), file


if __name__ == "__main__":
    run(main, __doc__)

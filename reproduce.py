"""Tasks 2 and 3: predict the test list again and compare with the saved logits.

Says REPRODUCED (exit status 0) or NOT REPRODUCED with the reason (status 1). On the machine that saved the logits they
agree to the last bit. Elsewhere float32 additions come in another order: allowed is ROUNDING of the logits' standard
deviation in the same environment (device, versions, threads), OTHER_ENVIRONMENT of it in another one. An edited
reference is found by its hash, however small the edit. Without an argument both tasks, where a model is there. Comparing
writes nothing.

reads   outputs/<profile>/<task>/final_model.pt, test_logits.pt, test_files.csv, test_metrics.json; the images
writes  only with --save, and then what predict_test.py writes; a former reference that differs is kept as *.backup
"""

import json

from predict_test import save_prediction, tasks_with_model
from project import UserError, outputs_dir, run, sha256, shown

# Measured with both final models, in standard deviations of the logits (about 1.4): batches of 1 to 246 images and 1 or 2
# threads move a logit by 2.5e-6 at most, another implementation of the convolutions by 1.6e-5; another image by about 1.
ROUNDING = 2e-5
OTHER_ENVIRONMENT = 1e-3  # with room for a GPU's own algorithms
REFERENCE = ("test_logits.pt", "test_files.csv", "test_metrics.json")


def main(tasks: tuple[str, ...], save: bool) -> int:
    there = tasks_with_model(tasks)
    if save:
        from evaluation import predict_test

        for task in there:
            save_prediction(task, predict_test(task))
        print("next: python reproduce.py")
        return 0
    reproduced = [compare(task) for task in there]
    print("next: python rank_images.py, python make_report.py")
    return 0 if all(reproduced) else 1


def compare(task: str) -> bool:
    """Predict again, print what agrees and what does not, and the verdict."""
    from dataset import IMAGE_SETS
    from evaluation import logits_hash, predict_test

    logits, files, record = load_reference(task)
    prediction = predict_test(task)
    print(
        f"{IMAGE_SETS[task].name}: {shown(outputs_dir(task) / 'final_model.pt')} on {len(prediction.files):,} test images"
    )
    named = [line.split(",")[0] for line in files.splitlines()[1:]]
    same_files = named == prediction.files
    reasons = []

    def check(what: str, same: bool, reason: str) -> None:
        print(f"  {what:<12}{'the same' if same else reason}")
        if not same:
            reasons.append(reason)

    order = "are in another order" if sorted(named) == sorted(prediction.files) else "are others"
    check("test files", same_files, f"the files of the reference {order} than those in splits/")
    check("images", record["images_sha256"] == prediction.images_sha256, "the pixels of some test image differ")
    check("model", record["model_sha256"] == prediction.model_sha256, "the reference was saved for another model")
    whole = record["logits_sha256"] == logits_hash(logits) and record["files_sha256"] == sha256(files.encode())
    check("reference", whole, "the saved logits or file list were changed after saving")
    same_machine = record["environment"] == prediction.environment
    print(
        f"  {'environment':<12}{'the same' if same_machine else environment_difference(record, prediction.environment)}"
    )

    if logits.shape != prediction.logits.shape:
        reasons.append(f"the reference has the shape {tuple(logits.shape)}, not {tuple(prediction.logits.shape)}")
    else:
        difference = (logits - prediction.logits).abs()
        largest, row = difference.max().item(), int(difference.amax(1).argmax())
        allowed = (ROUNDING if same_machine else OTHER_ENVIRONMENT) * prediction.logits.std().item()
        flipped = int((logits.argmax(1) != prediction.logits.argmax(1)).sum())
        print(
            f"  {'logits':<12}max |difference| {largest:.3g}, mean {difference.mean().item():.3g}; allowed {allowed:.3g}"
        )
        print(f"  {'predictions':<12}{flipped} of {len(logits):,} differ")
        if not largest <= allowed:  # also where it is not a number
            reasons.append(f"logits differ by up to {largest:.3g}, most in row {row + 1} ({prediction.files[row]})")
    if reasons:
        print(f"NOT REPRODUCED: {'; '.join(reasons)}")
    else:
        print("REPRODUCED to the last bit" if largest == 0 else "REPRODUCED to rounding")
    return not reasons


def load_reference(task: str):
    """The saved logits (images, 10), the text of the file list, and the record beside them.

    Raises:
        UserError: one of them is missing or damaged.
    """
    import torch

    from models import load_tensors

    folder = outputs_dir(task)
    for name in REFERENCE:
        if not (folder / name).exists():
            raise UserError(f"there is no reference {shown(folder / name)}; run: python predict_test.py {task}")
    logits = load_tensors(folder / "test_logits.pt", torch.Tensor)
    try:
        if logits.dtype != torch.float32 or logits.ndim != 2:
            raise ValueError("not a float32 matrix")
        files = (folder / "test_files.csv").read_bytes().decode().replace("\r\n", "\n")
        record = json.loads((folder / "test_metrics.json").read_text())
        needed = ("files_sha256", "images_sha256", "model_sha256", "logits_sha256", "environment")
        if not isinstance(record["environment"], dict):
            raise ValueError("no environment")
        return logits, files, {key: record[key] for key in needed}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"the reference {', '.join(REFERENCE)} in {shown(folder)} is damaged ({error}); bring it back, or run: "
            f"python predict_test.py {task}"
        ) from error


def environment_difference(record: dict, now: dict) -> str:
    was = record["environment"]
    return ", ".join(f"{key} was {was.get(key)}, is {now[key]}" for key in now if was.get(key) != now[key])


if __name__ == "__main__":
    run(main, __doc__, switch=("--save", "save a new reference instead of comparing"), tasks=True)

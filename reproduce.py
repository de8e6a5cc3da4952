"""Tasks 2 and 3: predict the test list again and compare with the saved logits.

Says REPRODUCED (exit status 0) or NOT REPRODUCED with the reason (status 1). On the machine that saved the logits they
agree to the last bit. Elsewhere float32 additions come in another order: allowed is ROUNDING of the logits' standard
deviation in the same environment (device, versions, threads), OTHER_ENVIRONMENT of it in another one. An edited
reference is found by its hash, however small the edit. Without an argument both tasks, where a model is there. Comparing
writes nothing.

reads   outputs/<profile>/<task>/final_model.pt, test_logits.pt, test_files.csv, test_metrics.json; the images
writes  only with --save, and then what predict_test.py writes; a former reference that differs is kept as *.backup
"""

from pathlib import Path

from dataset import IMAGE_SETS
from engine.evaluation import Prediction, Results, predict_test, read_results, save_results, with_model
from engine.splits import read_splits
from project import TASKS, config, outputs_dir, run, shown, splits_dir

# Measured with both final models, in standard deviations of the logits (about 1.4): batches of 1 to 246 images and 1 or 2
# threads move a logit by 2.5e-6 at most, another implementation of the convolutions by 1.6e-5; another image by about 1.
ROUNDING = 2e-5
OTHER_ENVIRONMENT = 1e-3  # with room for a GPU's own algorithms


def main(tasks: tuple[str, ...], save: bool) -> int:
    reproduced = []
    for task, folder in with_model({task: outputs_dir(task) for task in tasks}).items():
        lists = read_splits(splits_dir(task), task)
        if save:
            metrics = save_results(folder, task, predict_test(config.dataset_root, folder, task, lists))
            print(f"{IMAGE_SETS[task].name}: saved a new reference, test accuracy {metrics['accuracy']:.2%}")
        else:
            results = read_results(folder, task)  # before the time that predicting takes
            reproduced.append(compare(task, folder, results, predict_test(config.dataset_root, folder, task, lists)))
    print("next: python reproduce.py" if save else "next: python rank_images.py, python make_report.py")
    return 0 if all(reproduced) else 1


def compare(task: str, folder: Path, results: Results, prediction: Prediction) -> bool:
    """Print what agrees and what does not, and the verdict."""
    reference, record = results.split, results.record
    files = prediction.split.files
    print(f"{IMAGE_SETS[task].name}: {shown(folder / 'final_model.pt')} on {len(files):,} test images")
    reasons = list(results.changes)

    def check(what: str, same: bool, reason: str) -> None:
        print(f"  {what:<12}{'the same' if same else reason}")
        if not same:
            reasons.append(reason)

    order = "are in another order" if sorted(reference.files) == sorted(files) else "are others"
    same_files = reference.files == files
    check("test files", same_files, f"the files of the reference {order} than those in splits/")
    check("images", record["images_sha256"] == prediction.images_sha256, "the pixels of some test image differ")
    check("model", record["model_sha256"] == prediction.model_sha256, "the reference was saved for another model")
    print(f"  {'reference':<12}{'; '.join(results.changes) or 'as it was saved, its figures those of its logits'}")
    same_machine = record["environment"] == prediction.environment
    print(
        f"  {'environment':<12}"
        + ("the same" if same_machine else environment_difference(record["environment"], prediction.environment))
    )
    largest = float("nan")
    if same_files:
        difference = (results.logits - prediction.logits).abs()
        largest, row = difference.max().item(), int(difference.amax(1).argmax())
        allowed = (ROUNDING if same_machine else OTHER_ENVIRONMENT) * prediction.logits.std().item()
        flipped = int((results.logits.argmax(1) != prediction.logits.argmax(1)).sum())
        print(
            f"  {'logits':<12}max |difference| {largest:.3g}, mean {difference.mean().item():.3g}; allowed {allowed:.3g}"
        )
        print(f"  {'predictions':<12}{flipped} of {len(files):,} differ")
        print(f"  {'accuracy':<12}{results.metrics['accuracy']:.2%} by the saved logits")
        if not largest <= allowed:  # also where it is not a number
            reasons.append(f"logits differ by up to {largest:.3g}, most in row {row + 1} ({files[row]})")
    if reasons:
        print(f"NOT REPRODUCED: {'; '.join(reasons)}")
    else:
        print("REPRODUCED to the last bit" if largest == 0 else "REPRODUCED to rounding")
    return not reasons


def environment_difference(was: dict, now: dict) -> str:
    return ", ".join(f"{key} was {was.get(key)}, is {now[key]}" for key in now if was.get(key) != now[key])


if __name__ == "__main__":
    run(main, __doc__, switch=("--save", "save a new reference instead of comparing"), choices=TASKS)

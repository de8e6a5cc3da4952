"""Tasks 2 and 3: predict the test list again and compare with the saved logits.

Says REPRODUCED (exit status 0), or NOT REPRODUCED with the reason (status 1). On the machine that saved the logits they agree
to the last bit. Elsewhere float32 numbers are added in another order: the tolerance is ROUNDING of the logits' standard
deviation in the same environment (device, versions, threads), and OTHER_ENVIRONMENT of it in another one. An edited reference
is found by its hash, however small the edit. Without an argument both tasks, if their models exist. Comparing writes nothing.

reads   outputs/<profile>/<task>/final_model.pt, test_logits.pt, test_files.csv, test_metrics.json; the images
writes  only with --save: what predict_test.py writes; an old reference that differs is kept as *.backup
"""

from base.command_line import run
from base.project import TASKS, Task, config, display_path

from engine.final_model import model_path, tasks_with_model
from engine.metrics import compute_metrics
from engine.results import Prediction, Results, predict_test, read_results, save_results
from engine.runtime import environment_changes
from engine.splits import read_splits

# Measured with both final models, in standard deviations of the logits (about 1.4): batches of 1 to 246 images and 1 or 2
# threads change a logit by 2.5e-6 at most, another implementation of the convolutions by 1.6e-5; another image by about 1.
ROUNDING = 2e-5
OTHER_ENVIRONMENT = 1e-3  # leaves room for a GPU's own algorithms


def main(tasks: list[Task], save: bool) -> int:
    reproduced = []
    for task in tasks_with_model(tasks):
        lists = read_splits(task.splits, task)
        if save:
            metrics = save_results(task, predict_test(config.dataset_root, task, lists))
            print(f"{task.title}: saved a new reference, test accuracy {metrics['accuracy']:.2%}")
        else:
            reference = read_results(task)  # before predicting, which takes a minute
            reproduced.append(compare(task, reference, predict_test(config.dataset_root, task, lists)))
    print("next: python reproduce.py" if save else "next: python rank_images.py, python make_report.py")
    return 0 if all(reproduced) else 1


def compare(task: Task, reference: Results, prediction: Prediction) -> bool:
    """Print what agrees, what differs, and the verdict."""
    record, files = reference.record, prediction.split.files
    print(f"{task.title}: {display_path(model_path(task))} on {len(files):,} test images")
    problems = list(reference.changes)

    def agree(what: str, same: bool, problem: str) -> None:
        print(f"  {what:<12}{'the same' if same else problem}")
        if not same:
            problems.append(problem)

    same_files = reference.split.files == files
    order = "are in another order" if sorted(reference.split.files) == sorted(files) else "are others"
    agree("test files", same_files, f"the files of the reference {order} than those in splits/")
    agree("images", record["images_sha256"] == prediction.images_sha256, "the pixels of some test image differ")
    agree("model", record["model_sha256"] == prediction.model_sha256, "the reference was saved for another model")
    one_view = compute_metrics(prediction.one_view, prediction.split.labels)["accuracy"]
    told = f"accuracy with one view is {one_view:.2%}, saved was {record['one_view']:.2%}"
    agree("one view", abs(one_view - record["one_view"]) < 0.002, told)  # leaves room for images on a border
    print(f"  {'reference':<12}{'; '.join(reference.changes) or 'unchanged; its figures are those of its logits'}")
    changes = environment_changes(record["environment"], prediction.environment)
    print(f"  {'environment':<12}{changes or 'the same'}")
    largest = float("nan")
    if same_files:
        difference = (reference.logits - prediction.logits).abs()
        largest, row = difference.max().item(), int(difference.amax(1).argmax())
        allowed = (OTHER_ENVIRONMENT if changes else ROUNDING) * prediction.logits.std().item()
        flipped = int((reference.logits.argmax(1) != prediction.logits.argmax(1)).sum())
        mean = difference.mean().item()
        print(f"  {'logits':<12}max |difference| {largest:.3g}, mean {mean:.3g}; allowed {allowed:.3g}")
        print(f"  {'predictions':<12}{flipped} of {len(files):,} differ")
        print(f"  {'accuracy':<12}{reference.metrics['accuracy']:.2%} by the saved logits")
        if not largest <= allowed:  # also if it is not a number
            problems.append(f"logits differ by up to {largest:.3g}, most in row {row + 1} ({files[row]})")
    if problems:
        print(f"NOT REPRODUCED: {'; '.join(problems)}")
    else:
        print("REPRODUCED to the last bit" if largest == 0 else "REPRODUCED to rounding")
    return not problems


if __name__ == "__main__":
    run(main, __doc__, switch=("--save", "save a new reference instead of comparing"), choices=TASKS)

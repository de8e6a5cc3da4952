"""Tasks 2 and 3: the final model's logits, accuracy and TPR per class on the test list.

This is where the test list is looked at, once per final model. Without an argument both tasks, where a model is there.

reads   outputs/<profile>/<task>/final_model.pt, splits/<profile>/<task>/test.csv, the images
writes  beside the model: test_logits.pt, (images, 10) float32; test_files.csv, its line i for row i;
        test_metrics.json and confusion_matrix.png
"""

from project import UserError, outputs_dir, run, sha256, shown, write_json, write_text


def main(tasks: tuple[str, ...]) -> None:
    there = tasks_with_model(tasks)
    from evaluation import predict_test  # here: --help and a missing model need no torch

    for task in there:
        save_prediction(task, predict_test(task))
    print("next: python reproduce.py, python rank_images.py")


def tasks_with_model(tasks: tuple[str, ...]) -> list[str]:
    """Those of the tasks that have a final model.

    Raises:
        UserError: none has.
    """
    there = [task for task in tasks if (outputs_dir(task) / "final_model.pt").exists()]
    if not there:
        paths = " or ".join(shown(outputs_dir(task) / "final_model.pt") for task in tasks)
        raise UserError(f"there is no model {paths}; run: " + " or ".join(f"python train_{task}.py" for task in tasks))
    return there


def save_prediction(task: str, prediction) -> None:
    """Measure an `evaluation.Prediction` and write it; where that changes a former one, it is kept as *.backup."""
    import plots
    from dataset import CLASSES, IMAGE_SETS, Split
    from evaluation import logits_hash, measure, save_tensors

    metrics = measure(prediction.logits, prediction.labels)
    folder = outputs_dir(task)
    files = Split(prediction.files, prediction.labels).text()
    save_tensors(folder / "test_logits.pt", prediction.logits, keep_former=True)
    write_text(folder / "test_files.csv", files, keep_former=True)
    plots.confusion_matrix(folder / "confusion_matrix.png", metrics["confusion"], task)
    # Last, because its hashes vouch for the others.
    write_json(
        folder / "test_metrics.json",
        {
            "images": len(prediction.files),
            **metrics,
            "model_sha256": prediction.model_sha256,
            "files_sha256": sha256(files.encode()),
            "images_sha256": prediction.images_sha256,
            "logits_sha256": logits_hash(prediction.logits),
            "environment": prediction.environment,
        },
        keep_former=True,
    )
    print(
        f"{IMAGE_SETS[task].name}: test accuracy {metrics['accuracy']:.2%}, mean TPR {metrics['mean_tpr']:.2%} "
        f"on {len(prediction.files):,} images"
    )
    for name in CLASSES:
        tpr = metrics["tpr"][name]
        print(f"  TPR {name:<22}{'no image' if tpr is None else f'{tpr:7.2%}'}")
    print(f"wrote {shown(folder)}/test_logits.pt, test_files.csv, test_metrics.json, confusion_matrix.png")


if __name__ == "__main__":
    run(main, __doc__, tasks=True)

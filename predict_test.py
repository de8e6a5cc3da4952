"""Tasks 2 and 3: the final model's logits, accuracy and TPR per class on the test list.

No other script computes test figures of a model for the first time. Without an argument it does both tasks, if their models
exist.

reads   outputs/<profile>/<task>/final_model.pt, splits/<profile>/<task>/test.csv, the images
writes  beside the model: test_logits.pt, (images, 10) float32; test_files.csv, whose line i names the image of row i;
        test_metrics.json and confusion_matrix.png
"""

from base.command_line import run
from base.project import TASKS, Task, config, display_path

from engine.final_model import tasks_with_model
from engine.results import predict_test, save_results
from engine.splits import read_splits


def main(tasks: list[Task]) -> None:
    for task in tasks_with_model(tasks):
        prediction = predict_test(config.dataset_root, task, read_splits(task.splits, task))
        metrics = save_results(task, prediction)
        accuracy, mean_tpr = (f"{metrics[key]:.2%}" for key in ("accuracy", "mean_tpr"))
        images = len(prediction.split.files)
        print(f"{task.title}: test accuracy {accuracy}, mean TPR {mean_tpr} on {images:,} images")
        for name, tpr in metrics["tpr"].items():
            print(f"  TPR {name:<22}{'no image' if tpr is None else f'{tpr:7.2%}'}")
        names = "test_logits.pt, test_files.csv, test_metrics.json, confusion_matrix.png"
        print(f"wrote {display_path(task.outputs)}/{names}")
    print("next: python reproduce.py, python rank_images.py")


if __name__ == "__main__":
    run(main, __doc__, choices=TASKS)

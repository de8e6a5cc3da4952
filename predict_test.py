"""Tasks 2 and 3: the final model's logits, accuracy and TPR per class on the test list.

This is where the test list is looked at, once per final model. Without an argument both tasks, where a model is there.

reads   outputs/<profile>/<task>/final_model.pt, splits/<profile>/<task>/test.csv, the images
writes  beside the model: test_logits.pt, (images, 10) float32; test_files.csv, its line i for row i;
        test_metrics.json and confusion_matrix.png
"""

from dataset import CLASSES, IMAGE_SETS
from engine.evaluation import predict_test, save_results, with_model
from engine.splits import read_splits
from project import TASKS, config, outputs_dir, run, shown, splits_dir


def main(tasks: tuple[str, ...]) -> None:
    for task, folder in with_model({task: outputs_dir(task) for task in tasks}).items():
        prediction = predict_test(config.dataset_root, folder, task, read_splits(splits_dir(task), task))
        metrics = save_results(folder, task, prediction)
        print(
            f"{IMAGE_SETS[task].name}: test accuracy {metrics['accuracy']:.2%}, mean TPR {metrics['mean_tpr']:.2%} "
            f"on {len(prediction.split.files):,} images"
        )
        for name in CLASSES:
            tpr = metrics["tpr"][name]
            print(f"  TPR {name:<22}{'no image' if tpr is None else f'{tpr:7.2%}'}")
        print(f"wrote {shown(folder)}/test_logits.pt, test_files.csv, test_metrics.json, confusion_matrix.png")
    print("next: python reproduce.py, python rank_images.py")


if __name__ == "__main__":
    run(main, __doc__, choices=TASKS)

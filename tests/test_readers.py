"""Whatever bytes lie where a file is expected, its reader returns or raises the project's own error; nothing else."""

import contextlib
import copy
import dataclasses
import json
import math
import shutil

import pytest
import torch
from conftest import jpeg, tif
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.optim.swa_utils import AveragedModel

import make_report
import reproduce
from dataset import read_image
from engine import checkpoint
from engine.checkpoint import best_epoch, load_checkpoint
from engine.evaluation import load_model, read_results
from engine.splits import read_split
from engine.weights import load_tensors
from models import build_model
from project import UserError
from setting import Setting

# The same examples each time, and no more than the suite has time for.
FUZZ = settings(
    max_examples=120,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large],
)
# What a file that someone edited, or a program of another version, may hold in place of a value.
ODD = st.sampled_from([None, -1, 0, 10**30, float("nan"), "", "x", [], {}, (1,), True, b"x", torch.zeros(2)])


@st.composite
def damaged(draw, whole: bytes) -> bytes:
    """The whole with a few pieces cut out, overwritten or put in; or anything at all."""
    if draw(st.integers(0, 9)) == 0:
        return draw(st.binary(max_size=300))
    content = bytearray(whole)
    for _ in range(draw(st.integers(1, 4))):
        # Half of the damage at the front, where headers are.
        start = draw(st.integers(0, min(len(content), 400) if draw(st.booleans()) else len(content)))
        content[start : start + draw(st.sampled_from([0, 1, 2, 50, len(whole)]))] = draw(st.binary(max_size=6))
    return bytes(content)


def places(content, path=()) -> list[tuple]:
    """Where values lie in nested dictionaries and lists."""
    children = content.items() if isinstance(content, dict) else enumerate(content) if isinstance(content, list) else ()
    return [path] * bool(path) + [place for key, value in children for place in places(value, (*path, key))]


def put(content, path: tuple, value) -> None:
    for key in path[:-1]:
        content = content[key]
    content[path[-1]] = value


def remove(content, path: tuple) -> None:
    for key in path[:-1]:
        content = content[key]
    del content[path[-1]]


@st.composite
def edited(draw, whole):
    """A deep copy with one value replaced or taken out."""
    content = copy.deepcopy(whole)
    path = draw(st.sampled_from(places(whole)))
    if draw(st.booleans()):
        remove(content, path)
    else:
        put(content, path, draw(ODD))
    return content


def split_after(content: dict, count: int) -> tuple[dict, dict]:
    """A few of hundreds of tensors, which stand for all, and the rest."""
    items = list(content.items())
    return dict(items[:count]), dict(items[count:])


@pytest.fixture
def copied(trained, project):
    """The results of the chain in this process's project root."""
    for name in ("splits", "outputs"):
        shutil.copytree(trained.root / name, project / name)
    return project


def test_split_list(copied):
    path = copied / "splits/demo/rgb/val.csv"

    @FUZZ
    @given(damaged(path.read_bytes()))
    def fuzz(content):
        path.write_bytes(content)
        with contextlib.suppress(UserError):
            split = read_split(copied / "splits/demo/rgb", "rgb", "val")
            assert len(split.files) == len(split.labels) > 0
            assert not any(file.startswith("/") or ".." in file.split("/") for file in split.files)

    fuzz()


@pytest.mark.parametrize("task, file", [("rgb", jpeg("River")), ("ms", tif("River"))])
def test_image(sample, tmp_path, task, file):
    whole = (sample / file).read_bytes()

    @FUZZ
    @given(damaged(whole))
    def fuzz(content):
        (tmp_path / "x").write_bytes(content)
        with contextlib.suppress(UserError):
            assert read_image(str(tmp_path / "x"), task).shape == ((64, 64, 3) if task == "rgb" else (64, 64, 13))

    fuzz()


def test_bytes_of_a_checkpoint(trained, tmp_path, project):
    whole = (trained.root / "outputs/demo/rgb/test_logits.pt").read_bytes()

    @FUZZ
    @given(damaged(whole))
    def fuzz(content):
        (tmp_path / "x.pt").write_bytes(content)
        with contextlib.suppress(UserError):
            load_tensors(tmp_path / "x.pt", torch.Tensor)

    fuzz()


def test_checkpoint_and_its_history(trained, monkeypatch):
    whole = torch.load(trained.root / "outputs/demo/rgb/first/last.pt", weights_only=True)
    setting = Setting(**{field.name: whole["identity"][field.name] for field in dataclasses.fields(Setting)})
    model = build_model(setting, None)
    tensors, rest = split_after(whole["model"], 3)
    states, rest_of_states = split_after(whole["optimizer"]["state"], 2)
    few = {key: whole[key] for key in ("history", "versions", "mean", "std", "identity")}
    averaged, rest_of_averaged = split_after(whole["averaged"], 3)
    few |= {"model": tensors, "averaged": averaged, "optimizer": {**whole["optimizer"], "state": states}}

    @FUZZ
    @given(edited(few))
    def fuzz(content):
        if isinstance(content.get("model"), dict):
            content["model"] |= rest
        if isinstance(content.get("averaged"), dict):
            content["averaged"] |= rest_of_averaged
        if isinstance(content.get("optimizer"), dict) and isinstance(content["optimizer"].get("state"), dict):
            content["optimizer"]["state"] |= rest_of_states
        monkeypatch.setattr(checkpoint, "load_tensors", lambda path: content)
        optimizer, average = torch.optim.AdamW(model.parameters()), AveragedModel(model, use_buffers=True)
        with contextlib.suppress(UserError):
            history = load_checkpoint(trained.root / "outputs/demo/rgb/first/last.pt", model, average, optimizer)
            assert history == content["history"] and best_epoch(history) in history
            math.fsum(value for row in history for value in row.values() if value is not None)

    fuzz()


def test_final_model(copied):
    path = copied / "outputs/demo/rgb/final_model.pt"
    whole = torch.load(path, weights_only=True)

    tensors, rest = split_after(whole["model"], 3)

    @settings(FUZZ, max_examples=40)
    @given(edited({**whole, "model": tensors}))
    def fuzz(content):
        if isinstance(content.get("model"), dict):
            content["model"] |= rest
        torch.save(content, path)
        with contextlib.suppress(UserError):
            load_model(copied / "outputs/demo/rgb", "rgb", torch.device("cpu"))

    fuzz()


@pytest.mark.parametrize("name", ["test_metrics.json", "test_files.csv", "selection.csv"])
def test_results(copied, name):
    path = copied / "outputs/demo/rgb" / name
    whole = path.read_bytes()

    @FUZZ
    @given(st.data())
    def fuzz(data):
        if name.endswith(".json") and data.draw(st.booleans()):
            content = data.draw(edited(json.loads(whole)))
            path.write_text(json.dumps(content, default=str))
        else:
            path.write_bytes(data.draw(damaged(whole)))

        def compare():
            reproduce.environment_difference(
                read_results(copied / "outputs/demo/rgb", "rgb").record["environment"], {"torch": "2"}
            )

        for read in (compare, lambda: make_report.read_task("rgb", [])):
            with contextlib.suppress(UserError):
                read()

    fuzz()

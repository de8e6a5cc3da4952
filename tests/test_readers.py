"""Whatever bytes a file holds, its reader returns or raises the project's one error; nothing else."""

import contextlib
import copy

from base.errors import UserError
from base.files import load_tensors
from base.project import MS, RGB, read_config
from base.setting import Setting

import pytest
import torch
from conftest import CODE, jpeg, tif
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import make_report
from dataset import read_image
from engine import checkpoint, final_model
from engine.results import read_results
from engine.runtime import environment_changes
from engine.splits import read_record, read_split
from engine.training import make_optimizer
from models import build_model

# The same examples each time, and no more than the suite has time for.
FUZZ = settings(
    max_examples=100,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large],
)


@st.composite
def damaged(draw, whole: bytes) -> bytes:
    """The whole with a few pieces cut out, overwritten or put in; or anything at all."""
    if draw(st.integers(0, 9)) == 0:
        return draw(st.binary(max_size=300))
    content = bytearray(whole)
    for _ in range(draw(st.integers(1, 4))):
        # Half of the damage is at the front, where headers are.
        start = draw(st.integers(0, min(len(content), 400) if draw(st.booleans()) else len(content)))
        content[start : start + draw(st.sampled_from([0, 1, 2, 50, len(whole)]))] = draw(st.binary(max_size=6))
    return bytes(content)


def read_list(path) -> None:
    split = read_split(path.parent, RGB, "val")
    assert len(split.files) == len(split.labels) > 0
    assert not any(file.startswith("/") or ".." in file.split("/") for file in split.files)


def read_test_results(_) -> None:
    make_report.test_metrics(RGB, [])
    environment_changes(read_results(RGB).record["environment"], {"torch": "2"})


READERS = {
    jpeg("River"): lambda path: read_image(str(path), RGB).reshape(64, 64, 3),
    tif("River"): lambda path: read_image(str(path), MS).reshape(64, 64, 13),
    "config.py": lambda path: read_config(path, {}),
    "splits/demo/rgb/val.csv": read_list,
    "splits/demo/rgb/split.json": lambda path: read_record(path.parent),
    "outputs/demo/rgb/test_logits.pt": lambda path: load_tensors(path, "", torch.Tensor),
    "outputs/demo/rgb/test_metrics.json": read_test_results,
    "outputs/demo/rgb/test_files.csv": read_test_results,
}


@pytest.mark.parametrize("name", READERS)
def test_damaged_bytes(place, sample, name):
    (whole,) = [(root / name).read_bytes() for root in (place.root, sample, CODE) if (root / name).exists()]
    path = place.root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)  # it may be a link

    @FUZZ
    @given(damaged(whole))
    def fuzz(content):
        path.write_bytes(content)
        with contextlib.suppress(UserError):
            READERS[name](path)

    fuzz()


# What an edited file, or one of another version, may hold in the place of a value.
ODD = st.sampled_from([None, -1, 0, 10**30, float("nan"), "", "x", [], {}, (1,), True, b"x", torch.zeros(2)])


def places(content, path=()) -> list[tuple]:
    """Where values are in nested dictionaries and lists; of hundreds of tensors only a few."""
    children = content.items() if isinstance(content, dict) else enumerate(content) if isinstance(content, list) else ()
    few = [(key, value) for key, value in children if str(key).count(".") < 3]
    return [path] * bool(path) + [place for key, value in few for place in places(value, (*path, key))]


@st.composite
def edited(draw, whole):
    """A copy with one value replaced or taken out. Tensors are not copied."""
    content = copy.deepcopy(whole, {id(tensor): tensor for tensor in tensors_in(whole)})
    *parents, last = draw(st.sampled_from(places(whole)))
    inner = content
    for key in parents:
        inner = inner[key]
    if draw(st.booleans()):
        del inner[last]
    else:
        inner[last] = draw(ODD)
    return content


def tensors_in(content) -> list[torch.Tensor]:
    values = content.values() if isinstance(content, dict) else content if isinstance(content, list) else ()
    return [content] if isinstance(content, torch.Tensor) else [t for value in values for t in tensors_in(value)]


@pytest.mark.parametrize("name", ["first/last.pt", "final_model.pt"])
def test_edited_tensors(place, name):
    whole = torch.load(place.outputs / name, weights_only=True)
    setting = Setting.from_values(whole["identity"] if name == "first/last.pt" else whole["setting"])
    model = build_model(setting, None)
    optimizer = make_optimizer(model, setting)

    @settings(FUZZ, max_examples=40)
    @given(edited(whole))
    def fuzz(content):
        for module in (checkpoint, final_model):
            place.monkeypatch.setattr(module, "load_tensors", lambda path, remedy: content)
        with contextlib.suppress(UserError):
            if name == "final_model.pt":
                final_model.load_model(RGB, torch.device("cpu"))
            else:
                history, _, _ = checkpoint.load_checkpoint(place.outputs / "first", model, optimizer)
                assert history == whole["history"]

    fuzz()

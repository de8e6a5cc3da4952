"""Files: one way to read each kind, one way to write. Nobody ever reads a file that is half written."""

import contextlib
import csv
import hashlib
import io
import json
import os
import shutil
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path

from base.errors import UserError, reason
from base.project import display_path

import torch


@contextlib.contextmanager
def reading(path: Path, remedy: str) -> Iterator[None]:
    """Whatever goes wrong in this context is the file's damage: a UserError names the file, the reason and the remedy."""
    try:
        if path.exists() and not path.is_file() and not path.is_dir():
            raise OSError("no regular file")  # reading a pipe would wait for ever
        yield
    except (UserError, MemoryError):
        raise
    except FileNotFoundError:
        raise UserError(f"{display_path(path)} is missing; {remedy}") from None
    except Exception as error:
        said = f"{error.strerror}: {error.filename}" if isinstance(error, OSError) and error.strerror else reason(error)
        raise UserError(f"{display_path(path)} is damaged or cannot be read ({said}); {remedy}") from error


def read_csv(path: Path) -> list[dict[str, str]]:
    """The rows of a table, {column: text}. To be called inside `reading`."""
    # "sig": Excel puts a byte-order mark in front.
    text = path.read_bytes().decode("utf-8-sig")
    return list(csv.DictReader(io.StringIO(text), strict=True))


def read_json(path: Path):
    """To be called inside `reading`."""
    return json.loads(path.read_text(encoding="utf-8"))


def load_tensors(path: Path, remedy: str, kind: type = dict):
    """Tensors and plain values. A file that would run code, or holds something else than `kind`, is damaged."""
    with reading(path, remedy), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about pickles, which are refused anyway
        content = torch.load(path, map_location="cpu", weights_only=True)
        if not isinstance(content, kind):
            raise TypeError(f"it holds a {type(content).__name__} instead of a {kind.__name__}")
    return content


@contextlib.contextmanager
def atomic_write(path: Path, backup: bool = False) -> Iterator[Path]:
    """Yield a path beside `path` to write to, then rename it into place.

    With `backup`, an old file with different content is kept as <name>.<start of its SHA-256>.backup. A UserError says that
    the folder cannot be written to, or that the disk is full.
    """
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.unlink(missing_ok=True)  # never write through a link
        yield partial
        with open(partial, "rb") as file:
            os.fsync(file.fileno())  # otherwise a power cut could leave an empty file under the new name
        if backup and path.is_file() and (old := path.read_bytes()) != partial.read_bytes():
            kept = path.with_name(f"{path.name}.{sha256(old)[:8]}.backup")
            kept.unlink(missing_ok=True)
            shutil.copy2(path, kept)
            print(f"kept the old {display_path(path)} as {kept.name}")
        os.replace(partial, path)
    except OSError as error:
        told = f"cannot write {display_path(path)}: {error.strerror or error}"
        raise UserError(f"{told}; free some space, or set PROJECT_ROOT to a folder that can be written") from error
    finally:
        with contextlib.suppress(OSError):  # it was renamed or never begun, or the disk became read-only
            partial.unlink()


def write_text(path: Path, text: str, backup: bool = False) -> None:
    with atomic_write(path, backup) as partial:
        partial.write_bytes(text.encode())


def write_json(path: Path, content: object, backup: bool = False) -> None:
    write_text(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n", backup)


def csv_text(header: Sequence[str], rows: Sequence[Sequence]) -> str:
    """A table as CSV text with LF line ends."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([header, *rows])
    return text.getvalue()


def write_csv(path: Path, header: Sequence[str], rows: Sequence[Sequence], backup: bool = False) -> None:
    write_text(path, csv_text(header, rows), backup)


def save_tensors(path: Path, content: object, backup: bool = False) -> None:
    """`torch.save`; the same content gives the same bytes."""
    buffer = io.BytesIO()  # torch.save into a named file would store the name
    torch.save(content, buffer)
    with atomic_write(path, backup) as partial:
        partial.write_bytes(buffer.getbuffer())


def content_hash(value: object) -> str:
    """SHA-256 of all values in nested dictionaries and lists, with their types and shapes."""
    return sha256(*_contents(value))


def _contents(value: object) -> Iterator[bytes]:
    yield type(value).__name__.encode()
    if isinstance(value, torch.Tensor):
        yield f"{value.dtype} {tuple(value.shape)}".encode()
        yield value.cpu().numpy().tobytes()
    elif isinstance(value, dict | list | tuple):
        yield str(len(value)).encode()
        for part in value.items() if isinstance(value, dict) else value:
            yield from _contents(part)
    else:
        yield repr(value).encode()


def sha256(*contents: bytes) -> str:
    """SHA-256 of the contents one after another, as hexadecimal digits."""
    digest = hashlib.sha256()
    for content in contents:
        digest.update(content)
    return digest.hexdigest()

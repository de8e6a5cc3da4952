"""What the scripts leave alone: the data set, everything outside the project root, the network."""

import io
import zipfile
from pathlib import Path

from base.errors import UserError
from base.project import RGB, config

import pytest
from conftest import WATCH, User, state_of

import download


def test_the_chain_leaves_the_data_set_as_it_was(trained, sample):
    """Names, permissions, sizes, times and hashes are the same before and after."""
    assert state_of(sample) == trained.images_before
    assert sum(digest is not None for *_, digest in trained.images_before.values()) == 200


def test_the_chain_changes_nothing_outside_the_project_root_and_uses_no_network(trained):
    assert (trained.root / "site/watched.txt").read_text() == ""
    assert {path.name for path in trained.root.iterdir()} == {"site", "splits", "outputs", "report", "cache"}
    assert not list(trained.root.rglob("*.partial"))


def test_the_test_above_would_notice_both(tmp_path, sample):
    write = f"open({str(tmp_path / 'elsewhere')!r}, 'w'); import socket; socket.getaddrinfo('localhost', 80)"
    user = User(tmp_path / "root", sample, f"{WATCH}\n{write}", ("-c", ""))
    user.run("split_data.py")
    watched = (user.root / "site/watched.txt").read_text()
    assert f"open {tmp_path / 'elsewhere'}" in watched and "socket.getaddrinfo" in watched


@pytest.mark.parametrize("name", ["../evil", "/tmp/evil of a EuroSAT test", "2750/../../evil"])
def test_an_archive_cannot_write_outside_its_folder(project, tmp_path, monkeypatch, name):
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as archive:
        archive.writestr(name, "evil")
        archive.writestr("2750/Forest/Forest_1.jpg", "an image")
    folder = config.dataset_root = project / "data"

    def fetch(url, root, filename, md5):
        (root / filename).write_bytes(content.getvalue())

    monkeypatch.setattr(download.torchvision_downloads, "download_url", fetch)
    with pytest.raises(UserError, match="images"):
        download.fetch_images(RGB)
    assert all(path.is_relative_to(folder) for path in tmp_path.rglob("*evil*"))
    assert not list(tmp_path.parent.parent.glob("evil*")) and not Path("/tmp/evil of a EuroSAT test").exists()

"""What the scripts leave alone: the data set, everything outside the project root, the network."""

import io
import zipfile
from pathlib import Path

import pytest
from conftest import WATCH, state_of

import download
from project import UserError, config


def test_the_chain_leaves_the_data_set_as_it_was(trained, sample):
    """It lies in a read-only folder; names, permissions, sizes, times and hashes, before and after."""
    assert state_of(sample) == trained.images_before
    assert sum(digest is not None for *_, digest in trained.images_before.values()) == 200


def test_the_chain_changes_nothing_outside_the_project_root_and_uses_no_network(trained):
    assert (trained.root / "site/watched.txt").read_text() == ""


def test_the_watch_that_says_so_sees_both(trained_copy, tmp_path):
    """Or the test above could not fail."""
    with (trained_copy.root / "site/sitecustomize.py").open("a") as site:
        site.write(WATCH)
        site.write(f"open({str(tmp_path / 'elsewhere')!r}, 'w'); import socket; socket.getaddrinfo('localhost', 80)\n")
    trained_copy.run("reproduce.py", "rgb")
    watched = (trained_copy.root / "site/watched.txt").read_text()
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
    with pytest.raises(UserError, match="images instead of 27,000|has no RGB images"):
        download.fetch_images("rgb")
    assert all(path.is_relative_to(folder) for path in tmp_path.rglob("*evil*"))
    assert not list(tmp_path.parent.parent.glob("evil*")) and not list(tmp_path.glob("evil*"))
    assert not Path("/tmp/evil of a EuroSAT test").exists()

"""Listings: once per folder, by path or URI, and a state that tells when a file has changed."""

import os

import pytest

from cast_ray.data.reading.listing import Listing, open_listing, state_of


@pytest.fixture
def root(tmp_path):
    for name in ("b.txt", "a.txt", "sub/x.png", "sub/deep/y.png", "w? #%20.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    return tmp_path


@pytest.mark.parametrize("as_uri", [False, True])
def test_files_and_folders(root, as_uri):
    listing = Listing(f"file://{root}" if as_uri else str(root))
    assert listing.files("") == ["a.txt", "b.txt", "w? #%20.txt"] and listing.folders("") == ["sub"]
    assert listing.files("sub", "*.png") == ["x.png"] and listing.files("none") == [] == listing.files("a.txt")
    assert list(listing.walk("sub")) == ["sub", "sub/deep"]
    assert listing.file("sub/deep/y.png").size == len("sub/deep/y.png")
    assert listing.file("w? #%20.txt") is not None
    assert listing.file("sub") is None and listing.file("none/z") is None
    elsewhere = Listing("/nowhere")
    base = listing.uri("sub")
    assert elsewhere.files(base) == ["x.png"] and elsewhere.file(f"{base}/x.png") is not None
    assert list(elsewhere.walk(base)) == [base, f"{base}/deep"]


def test_the_state_of_what_was_looked_at(root):
    def seen():
        listing = Listing(str(root))
        listing.files("")
        listing.file("sub/x.png")
        return listing

    listing = seen()
    assert listing.seen == ["", "sub"] and state_of(str(root), listing.seen) == listing.state() == seen().state()
    (root / "sub/deep/y.png").write_text("not looked at")
    assert seen().state() == listing.state()
    status = (root / "sub/x.png").stat()
    (root / "sub/x.png").write_text("SUB/x.png")  # as many bytes
    changed = seen().state()
    assert changed != listing.state()
    os.utime(root / "sub/x.png", ns=(status.st_atime_ns, status.st_mtime_ns))  # as cp -p leaves it
    assert seen().state() not in (changed, listing.state())
    os.utime(root / "sub/x.png", ns=(status.st_atime_ns, status.st_mtime_ns))
    (root / "new.txt").write_text("")
    assert seen().state() not in (changed, listing.state())


def test_roots_that_are_no_folders(root):
    for given, message in (
        ("", "data.root is empty: expected the folder of cats .--set data.root=DIR."),
        (str(root / "none"), "none does not exist: expected the folder of cats"),
        (str(root / "a.txt"), "a.txt is a file: expected the folder of cats"),
        ("nosuch://x", "not a path or URI"),
    ):
        with pytest.raises(ValueError, match=message):
            open_listing(given, "cats")
    assert open_listing(str(root), "cats").files("sub") == ["x.png"]

"""MNIST's files: found where they are, else downloaded from a server on this machine."""

import gzip
import hashlib
import pickle
import threading
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest

from minicnn.data import mnist
from minicnn.data.idx import write_idx
from minicnn.data.mnist import NAMES, SOURCES, load_digits, load_fashion_mnist, load_mnist

NOBODY = "http://127.0.0.1:9/"  # a port where no server listens
IMAGES, LABELS = NAMES[2:]  # the test split, which most tests load


class Server(ThreadingHTTPServer):
    """Serves a folder; the first part of the path says how."""

    def __init__(self, folder):
        super().__init__(("127.0.0.1", 0), Handler)
        self.folder = folder
        self.requests = Counter()

    def url(self, behaviour):
        return f"http://127.0.0.1:{self.server_port}/{behaviour}/"


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        _, behaviour, name = self.path.split("/")
        self.server.requests[behaviour] += 1
        content = (self.server.folder / name).read_bytes()
        sent = {
            "whole": content,
            "cut": content[: len(content) // 2],
            "silent-cut": content[: len(content) // 2],
            "other": gzip.compress(b"\0\0\x08\1\0\0\0\1A"),
            "html": b"<!DOCTYPE html><title>Log in</title>",
            "gone": b"",
        }[behaviour]
        self.send_response(404 if behaviour == "gone" else 200)
        if behaviour != "silent-cut":
            length = content if behaviour == "cut" else sent
            self.send_header("Content-Length", str(len(length)))
        self.end_headers()
        self.wfile.write(sent)

    def log_message(self, *args):
        pass


@pytest.fixture
def server(tmp_path):
    folder = tmp_path / "served"
    folder.mkdir()
    server = Server(folder)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def arrays():
    rng = np.random.default_rng(0)
    shapes = {"images": (20, 28, 28), "labels": (20,)}
    return {name: rng.integers(0, 10, shapes[name.split("-")[1]], dtype=np.uint8) for name in NAMES}


@pytest.fixture
def data_dir(tmp_path, server, arrays, monkeypatch):
    """A small "mnist", served but not at hand; returns the folder that it goes to."""
    for name, array in arrays.items():
        write_idx(server.folder / name, array)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("MINICNN_DATA_DIR", str(tmp_path / "data"))
    set_hashes(monkeypatch, [gzip.decompress((server.folder / n).read_bytes()) for n in NAMES])
    set_mirrors(monkeypatch, server.url("whole"))
    return tmp_path / "data" / "mnist"


def set_mirrors(monkeypatch, *urls):
    monkeypatch.setitem(SOURCES, "mnist", SOURCES["mnist"]._replace(mirrors=urls))


def set_hashes(monkeypatch, contents):
    hashes = tuple(hashlib.sha256(content).hexdigest() for content in contents)
    monkeypatch.setitem(SOURCES, "mnist", SOURCES["mnist"]._replace(sha256=hashes))


def check(data, arrays, images=IMAGES, labels=LABELS):
    np.testing.assert_array_equal(data.x[:, 0], arrays[images] / np.float32(255))
    np.testing.assert_array_equal(data.y, arrays[labels])
    assert data.classes == tuple("0123456789")


@pytest.mark.parametrize(("split", "names"), [("train", NAMES[:2]), ("test", NAMES[2:])])
def test_downloaded_once(data_dir, server, arrays, capfd, split, names):
    check(load_mnist(split), arrays, *names)
    assert sorted(p.name for p in data_dir.iterdir()) == sorted(names)
    assert server.requests["whole"] == 2
    assert "100%" in capfd.readouterr().err  # the progress bar
    check(load_mnist(split), arrays, *names)
    assert server.requests["whole"] == 2


def test_hashes_of_the_published_files_serve_too(data_dir, server, arrays, monkeypatch):
    set_hashes(monkeypatch, [(server.folder / name).read_bytes() for name in NAMES])
    check(load_mnist("test"), arrays)
    check(load_mnist("test"), arrays)
    assert server.requests["whole"] == 2


@pytest.mark.parametrize("where", ["in its folder", "beside it", "in the cache"])
@pytest.mark.parametrize("how", ["compressed otherwise", "plain"])
def test_files_at_hand_need_no_network(data_dir, arrays, monkeypatch, where, how):
    set_mirrors(monkeypatch, NOBODY)
    folder = data_dir if where == "in its folder" else data_dir.parent
    if where == "in the cache":
        monkeypatch.delenv("MINICNN_DATA_DIR")
        monkeypatch.setenv("XDG_CACHE_HOME", str(data_dir))
        monkeypatch.setattr("pooch.os_cache", lambda name: data_dir / name)
        folder = data_dir / "minicnn" / "mnist"
    folder.mkdir(parents=True)
    for name in (IMAGES, LABELS):
        plain = folder / name.removesuffix(".gz")
        write_idx(plain, arrays[name])
        if how == "compressed otherwise":
            (folder / name).write_bytes(gzip.compress(plain.read_bytes(), 1))
            plain.unlink()
    check(load_mnist("test"), arrays)


@pytest.mark.parametrize("fault", ["cut", "silent-cut", "other", "html", "gone", "nobody"])
def test_next_mirror_is_tried(data_dir, server, arrays, monkeypatch, fault):
    first = NOBODY if fault == "nobody" else server.url(fault)
    set_mirrors(monkeypatch, first, server.url("whole"))
    check(load_mnist("test"), arrays)
    assert fault == "nobody" or server.requests[fault] == 2
    assert sorted(p.name for p in data_dir.iterdir()) == [IMAGES, LABELS]


@pytest.mark.parametrize("fault", ["cut", "silent-cut", "other", "html", "gone", "nobody"])
def test_no_mirror_left(data_dir, server, monkeypatch, fault):
    mirrors = [NOBODY if fault == "nobody" else server.url(fault), NOBODY + "second/"]
    set_mirrors(monkeypatch, *mirrors)
    data_dir.mkdir(parents=True)
    old = data_dir / IMAGES
    old.write_bytes(b"old and damaged")
    with pytest.raises(OSError, match="mnist: cannot get") as info:
        load_mnist("test")
    for part in (IMAGES, f"put it into {data_dir}", *(m + IMAGES for m in mirrors), str(old)):
        assert part in str(info.value)
    assert [p.name for p in data_dir.iterdir()] == [IMAGES]
    assert old.read_bytes() == b"old and damaged"


def test_wrong_hash_shows_both(data_dir, server, arrays, monkeypatch):
    set_mirrors(monkeypatch, server.url("other"))
    with pytest.raises(OSError, match="cannot get") as info:
        load_mnist("test")
    got = hashlib.sha256(b"\0\0\x08\1\0\0\0\1A").hexdigest()
    assert f"sha256: expected {SOURCES['mnist'].sha256[2]}, got " in str(info.value)
    assert f"(uncompressed {got})" in str(info.value)


def test_damaged_file_is_replaced(data_dir, arrays):
    load_mnist("test")
    damaged = bytearray((data_dir / IMAGES).read_bytes())
    damaged[len(damaged) // 2] ^= 1
    (data_dir / IMAGES).write_bytes(damaged)
    check(load_mnist("test"), arrays)
    assert (data_dir / IMAGES).read_bytes() != damaged


def test_one_flipped_pixel_is_not_taken(data_dir, arrays, monkeypatch):
    set_mirrors(monkeypatch, NOBODY)
    data_dir.mkdir(parents=True)
    arrays[IMAGES][3, 4, 5] ^= 1
    write_idx(data_dir / IMAGES, arrays[IMAGES])
    with pytest.raises(OSError, match=f"{IMAGES}: sha256: expected [0-9a-f]{{64}}, got"):
        load_mnist("test")


def test_folder_that_cannot_be_made(data_dir):
    data_dir.parent.write_text("a file where the folder should be")
    with pytest.raises(OSError, match=r"mnist: cannot get .* by hand"):
        load_mnist("test")


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (np.full(20, 10, np.uint8), r"mnist \(test\): labels: expected 0 to 9, got 10"),
        (np.zeros(19, np.uint8), r"mnist \(test\): labels: expected 20, .*, got 19"),
    ],
)
def test_labels_are_checked(data_dir, server, monkeypatch, labels, message):
    write_idx(server.folder / LABELS, labels)
    set_hashes(monkeypatch, [gzip.decompress((server.folder / n).read_bytes()) for n in NAMES])
    with pytest.raises(ValueError, match=message):
        load_mnist("test")


class Payload:
    """Unpickling this writes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


def test_served_pickle_is_not_executed(data_dir, server, tmp_path, monkeypatch):
    payload = gzip.compress(pickle.dumps(Payload(tmp_path / "executed")))
    (server.folder / IMAGES).write_bytes(payload)
    with pytest.raises(OSError, match="magic"):
        load_mnist("test")
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("loader", [load_mnist, load_fashion_mnist, load_digits])
def test_unknown_split(loader):
    with pytest.raises(ValueError, match="split: expected 'train' or 'test', got 'valid'"):
        loader("valid")


def test_fashion_mnist_has_its_own_folder_and_classes(data_dir, server, arrays, monkeypatch):
    source = SOURCES["fashion-mnist"]._replace(
        mirrors=(server.url("whole"),), sha256=SOURCES["mnist"].sha256
    )
    monkeypatch.setitem(SOURCES, "fashion-mnist", source)
    data = load_fashion_mnist("test")
    np.testing.assert_array_equal(data.y, arrays[LABELS])
    assert (data.classes[0], data.classes[9]) == ("T-shirt/top", "Ankle boot")
    assert (data_dir.parent / "fashion-mnist" / IMAGES).exists()


def test_sources_are_complete():
    for source in SOURCES.values():
        assert len(source.mirrors) > 1
        assert all(url.startswith("http") and url.endswith("/") for url in source.mirrors)
        assert len(source.classes) == 10
        assert len({bytes.fromhex(digest) for digest in source.sha256}) == len(NAMES)


@pytest.mark.parametrize(("split", "count"), [("train", 500), ("test", 100)])
def test_digits_come_along(split, count, monkeypatch):
    monkeypatch.setattr(mnist, "_find_or_download", None)  # no way to the network
    x, y, classes = load_digits(split)
    assert x.shape == (10 * count, 1, 28, 28)
    assert x.dtype == np.float32
    assert x.min() == 0
    assert x.max() == 1
    assert np.bincount(y).tolist() == [count] * 10
    assert classes == tuple("0123456789")


def test_real_mnist_where_it_is_at_hand(full_mnist):
    x, y, _ = load_mnist("test")
    assert x.shape == (10000, 1, 28, 28)
    assert y[:5].tolist() == [7, 2, 1, 0, 4]
    assert abs(float(x.mean(dtype=np.float64)) - 0.1325) < 1e-4

"""Pictures from files of all kinds, and folders of them."""

import numpy as np
import pytest
from PIL import Image

from minicnn.data import load_digits, load_folder, read_picture

RAMP = np.arange(0, 240, 10, dtype=np.uint8).reshape(4, 6)  # (H, W), dark border on the whole


@pytest.fixture
def save(tmp_path):
    """Save an array or picture as a file and return its path."""

    def save(picture, name="picture.png", **options):
        if isinstance(picture, np.ndarray):
            picture = Image.fromarray(picture)
        picture.save(tmp_path / name, **options)
        return tmp_path / name

    return save


def plain(path, channels=1, size=None):
    return read_picture(path, channels, size, invert=False, crop=False)


# --- what is in the file ---------------------------------------------------------------------


@pytest.mark.parametrize("suffix", ["png", "bmp", "tif", "gif", "pgm"])
def test_gray(save, suffix):
    x = plain(save(RAMP, f"ramp.{suffix}"))
    assert x.dtype == np.float32
    assert x.flags.c_contiguous
    np.testing.assert_array_equal(x, RAMP[None] / np.float32(255))


def test_gray_as_three_channels(save):
    np.testing.assert_array_equal(plain(save(RAMP), 3), np.stack([RAMP] * 3) / np.float32(255))


def test_colour(save):
    rgb = np.random.default_rng(0).integers(0, 256, (4, 6, 3), np.uint8)
    x = plain(save(rgb), 3)
    assert x.flags.c_contiguous
    np.testing.assert_array_equal(x, rgb.transpose(2, 0, 1) / np.float32(255))
    luma = rgb @ [0.299, 0.587, 0.114] / 255  # ITU-R BT.601
    np.testing.assert_allclose(plain(save(rgb))[0], luma, atol=0.6 / 255)


def test_16_bits_keep_their_depth(save):
    gray = np.array([[0, 1, 256], [257, 65534, 65535]], np.uint16)
    for name in ("a.png", "a.tif"):
        x = plain(save(gray, name))
        np.testing.assert_array_equal(x[0], gray / np.float32(65535))


def test_floats(save):
    gray = np.array([[0, 0.25], [0.5, 1]], np.float32)
    np.testing.assert_array_equal(plain(save(gray, "a.tif"))[0], gray)


@pytest.mark.parametrize("bad", [-0.1, 1.5, np.nan, np.inf])
def test_floats_out_of_range(save, bad):
    path = save(np.array([[0.5, bad]], np.float32), "odd.tif")
    with pytest.raises(ValueError, match=r"odd\.tif: expected values in \[0, 1\], got"):
        plain(path)


def test_one_bit(save):
    bits = np.array([[True, False], [False, True]])
    np.testing.assert_array_equal(plain(save(Image.fromarray(bits)))[0], bits)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "RGB", "L"])
def test_transparent_is_white(save, mode, channels):
    """Black, opaque on the left and transparent on the right."""
    rgba = np.zeros((2, 2, 4), np.uint8)
    rgba[:, 0, 3] = 255
    picture = Image.fromarray(rgba)
    if mode == "P":
        path = save(Image.fromarray(np.array([[0, 1]] * 2, np.uint8)).convert("P"), transparency=1)
    elif mode in ("RGB", "L"):  # one colour stands for transparent
        two = Image.new(mode, (2, 2), "black")
        key = (9, 9, 9) if mode == "RGB" else 9
        two.paste(key, (1, 0, 2, 2))
        path = save(two, transparency=key)
    else:
        path = save(picture.convert(mode))
    np.testing.assert_allclose(plain(path, channels), [[[0, 1]] * 2] * channels, atol=1 / 255)


def test_half_transparent(save):
    x = plain(save(np.array([[[0, 0, 0, 51]]], np.uint8)), 3)
    np.testing.assert_allclose(x, np.full((3, 1, 1), 0.8), atol=1 / 255)


@pytest.mark.parametrize(("orientation", "turns"), [(1, 0), (3, 2), (6, -1), (8, 1)])
def test_exif_rotation(save, orientation, turns):
    exif = Image.Exif()
    exif[0x0112] = orientation
    x = plain(save(RAMP, exif=exif))
    np.testing.assert_array_equal(x[0], np.rot90(RAMP, turns) / np.float32(255))


def test_resize_averages(save):
    gray = np.kron(RAMP, np.ones((50, 50), np.uint8))  # (200, 300)
    x = plain(save(gray), size=(4, 6))
    assert x.shape == (1, 4, 6)
    np.testing.assert_allclose(x[0, 1:-1, 1:-1], RAMP[1:-1, 1:-1] / 255, atol=0.01)
    checks = np.indices((64, 64)).sum(0) % 2 * 255
    np.testing.assert_allclose(plain(save(checks.astype(np.uint8)), size=8), 0.5, atol=0.02)


def test_resize_stays_in_range(save):
    x = plain(save(np.random.default_rng(0).integers(0, 2, (50, 50), np.uint8) * 255), size=77)
    assert x.shape == (1, 77, 77)
    assert x.min() >= 0
    assert x.max() <= 1


# --- damage ----------------------------------------------------------------------------------


def test_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match="not-there"):
        read_picture(tmp_path / "not-there.png")


@pytest.mark.parametrize("content", [b"", b"<html>", b"\x89PNG\r\n\x1a\n", b"\x80\x04K\x01."])
def test_no_picture(tmp_path, content):
    (tmp_path / "odd.png").write_bytes(content)
    with pytest.raises(ValueError, match=r"odd\.png: expected a whole picture, got"):
        read_picture(tmp_path / "odd.png")


@pytest.mark.parametrize("suffix", ["png", "jpg", "gif", "tif", "bmp"])
def test_cut_picture(save, suffix):
    noise = np.random.default_rng(0).integers(0, 256, (60, 60), np.uint8)
    path = save(noise, f"cut.{suffix}")
    whole = path.read_bytes()
    for cut in range(0, len(whole) * 9 // 10, 100):
        path.write_bytes(whole[:cut])
        with pytest.raises(ValueError, match=rf"cut\.{suffix}: expected a whole picture, got"):
            plain(path)


@pytest.mark.parametrize("pixels", [300, 150])  # above twice the limit, and where Pillow only warns
def test_too_many_pixels(save, monkeypatch, pixels):
    path = save(np.zeros((10, pixels // 10), np.uint8))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(ValueError, match=r"picture\.png: .*exceeds limit"):
        read_picture(path)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"channels": 2}, "channels: expected 1 or 3, got 2"),
        ({"size": 0}, "size: expected an integer >= 1, got 0"),
        ({"invert": "yes"}, "invert: expected True, False or 'auto', got 'yes'"),
        ({"crop": None}, "crop: expected True, False or 'auto', got None"),
        ({"crop": True, "size": None}, "crop: expected one channel and a size, got 1 and None"),
        ({"crop": True, "channels": 3}, "crop: expected one channel and a size, got 3"),
    ],
)
def test_arguments_are_checked(kwargs, message):
    with pytest.raises(ValueError, match=f"read_picture: {message}"):
        read_picture("never-opened", **kwargs)


# --- ink -------------------------------------------------------------------------------------


def test_dark_on_light_is_inverted(save):
    digit = load_digits("test").x[0, 0]
    bytes_ = np.round(digit * 255).astype(np.uint8)
    bright, dark = save(bytes_, "bright.png"), save(255 - bytes_, "dark.png")
    grey = save((100 - bytes_ // 4).astype(np.uint8), "grey.png")  # even the paper is below 0.5
    np.testing.assert_array_equal(read_picture(bright)[0], digit)
    np.testing.assert_allclose(read_picture(dark)[0], digit, atol=1e-6)
    assert np.corrcoef(read_picture(grey)[0].ravel(), digit.ravel())[0, 1] > 0.999
    chalk = save((60 + bytes_ // 2).astype(np.uint8), "chalk.png")  # on a board that is not black
    np.testing.assert_allclose(read_picture(chalk)[0], (60 + bytes_ // 2) / 255, atol=1e-6)
    np.testing.assert_allclose(read_picture(bright, invert=True)[0], 1 - digit, atol=1e-6)
    np.testing.assert_allclose(read_picture(dark, invert=False)[0], 1 - digit, atol=1e-6)


def test_three_channels_are_left_as_they_are(save):
    white = save(np.full((40, 60, 3), 255, np.uint8))
    np.testing.assert_array_equal(read_picture(white, 3), np.ones((3, 28, 28)))
    np.testing.assert_array_equal(read_picture(white, 3, invert=True), np.zeros((3, 28, 28)))


def photo(digit, rng, slope, noise):
    """A digit somewhere on a large sheet, dark on light, lit from one side."""
    ink = np.asarray(Image.fromarray(digit).resize((280, 280), Image.Resampling.BICUBIC))
    H, W = rng.integers(320, 700, 2)
    sheet = np.zeros((H, W), np.float32)
    top, left = rng.integers(10, H - 290), rng.integers(10, W - 290)
    sheet[top : top + 280, left : left + 280] = ink.clip(0, 1)
    light = 0.95 - slope * np.linspace(0, 1, W)
    pixels = light * (1 - 0.85 * sheet) + noise * rng.standard_normal((H, W))
    return (pixels.clip(0, 1) * 255).astype(np.uint8)


@pytest.mark.parametrize(("slope", "noise"), [(0, 0), (0.5, 0), (0.3, 0.05)])
def test_photo_of_a_digit_becomes_the_digit(save, slope, noise):
    rng = np.random.default_rng(0)
    likeness = []
    for digit in load_digits("test").x[:25, 0]:
        x = read_picture(save(photo(digit, rng, slope, noise)))
        assert x.shape == (1, 28, 28)
        assert x.max() == 1
        assert (x == 0).sum() > 0.8 * (digit == 0).sum()  # the paper is black
        # A centre of mass between two pixels may be rounded the other way.
        moved = [np.roll(x[0], (i, j), (0, 1)) for i in (-1, 0, 1) for j in (-1, 0, 1)]
        likeness.append(max(np.corrcoef(a.ravel(), digit.ravel())[0, 1] for a in moved))
    assert np.min(likeness) > 0.9


@pytest.mark.parametrize("shape", [(100, 40), (100, 35), (40, 100), (3, 200), (7, 7)])
def test_ink_fills_a_box_around_its_centre_of_mass(save, shape):
    sheet = np.zeros((300, 400), np.uint8)
    sheet[150 : 150 + shape[0], 30 : 30 + shape[1]] = 200
    x = read_picture(save(sheet), size=(28, 42))[0]
    rows, columns = np.flatnonzero(x.any(1)), np.flatnonzero(x.any(0))
    box = len(rows), len(columns)
    assert box[0] == 20 or box[1] == 30  # 5/7 of the size
    assert box[0] <= 20
    assert box[1] <= 30
    scale = min(20 / shape[0], 30 / shape[1])
    np.testing.assert_allclose(box, np.maximum(np.array(shape) * scale, 1), atol=1.5)
    centre = np.argwhere(x > 0).mean(0)
    np.testing.assert_allclose(centre, [14, 21], atol=0.51)


def test_crop_can_be_forced_and_forbidden(save):
    sheet = np.zeros((28, 28), np.uint8)
    sheet[2:12, 3:8] = 255
    path = save(sheet)
    np.testing.assert_array_equal(read_picture(path)[0], sheet / 255)
    assert np.flatnonzero(read_picture(path, crop=True)[0].any(1)).tolist() == list(range(4, 24))
    stretched = read_picture(save(np.kron(sheet, np.ones((2, 2), np.uint8))), crop=False)[0]
    np.testing.assert_allclose(stretched[4:10, 4:7], 1, atol=1e-6)
    assert stretched[:, 12:].max() == 0


@pytest.mark.parametrize("level", [0, 128, 255])
def test_blank_sheet(save, level):
    assert not read_picture(save(np.full((60, 80), level, np.uint8))).any()


# --- folders ---------------------------------------------------------------------------------


@pytest.fixture
def root(tmp_path):
    """Classes "b" (2 pictures) and "a" (1), with other things beside them."""
    root = tmp_path / "root"
    for name, level in (("b/2.png", 20), ("b/1.PNG", 10), ("a/x.bmp", 30)):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((4, 6), level, np.uint8)).save(root / name)
    (root / "a" / "notes.txt").write_text("no picture")
    (root / "a" / "._x.bmp").write_text("no picture")
    (root / ".hidden").mkdir()
    (root / "README.md").write_text("no class")
    return root


def test_folder(root):
    x, y, classes = load_folder(root)
    assert classes == ("a", "b")
    assert y.dtype == np.int64
    assert y.tolist() == [0, 1, 1]
    assert x.shape == (3, 3, 4, 6)
    assert x.dtype == np.float32
    np.testing.assert_array_equal(x[:, 0, 0, 0], np.float32([30, 10, 20]) / np.float32(255))


def test_folder_resized_and_gray(root):
    Image.fromarray(np.full((9, 9), 40, np.uint8)).save(root / "b" / "3.png")
    x, y, _ = load_folder(root, size=(2, 3), channels=1)
    assert y.tolist() == [0, 1, 1, 1]
    assert x.shape == (4, 1, 2, 3)
    np.testing.assert_allclose(x[:, 0, 1, 2] * 255, [30, 10, 20, 40], atol=1e-3)
    assert load_folder(str(root), size=5).x.shape == (4, 3, 5, 5)


def test_folder_leaves_light_pictures_light(root):
    Image.fromarray(np.full((4, 6), 255, np.uint8)).save(root / "b" / "3.png")
    assert load_folder(root, channels=1).x[3].min() == 1


def test_folder_sizes_differ(root):
    Image.fromarray(np.zeros((4, 5), np.uint8)).save(root / "b" / "3.png")
    with pytest.raises(ValueError, match=r"3\.png: expected \(4, 6\) pixels as in .*x\.bmp, got"):
        load_folder(root)


def test_folder_with_a_damaged_picture(root):
    (root / "b" / "3.png").write_bytes(b"\x89PNG")
    with pytest.raises(ValueError, match=r"3\.png: expected a whole picture, got"):
        load_folder(root)


def test_folder_without_pictures_of_a_class(root):
    (root / "c").mkdir()
    with pytest.raises(ValueError, match="c: expected pictures of class 'c', got none"):
        load_folder(root)


def test_folder_without_classes(tmp_path):
    with pytest.raises(ValueError, match="expected a sub-folder for each class, got none"):
        load_folder(tmp_path)


def test_no_folder(tmp_path, root):
    with pytest.raises(FileNotFoundError, match="not-there"):
        load_folder(tmp_path / "not-there")
    with pytest.raises(NotADirectoryError, match=r"README\.md"):
        load_folder(root / "README.md")

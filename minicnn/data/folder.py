"""Pictures from files: one for prediction, or a folder of them for training.

`read_picture` can bring a photo or drawing of a digit into the form of MNIST: bright ink on
black, scaled into a box of 20 x 20 and placed in 28 x 28 by its centre of mass.

References
----------
Y. LeCun, C. Cortes, C. J. C. Burges, "The MNIST database of handwritten digits", 1998 (how
its digits were scaled and centred).
N. Otsu, "A threshold selection method from gray-level histograms", IEEE Transactions on
Systems, Man, and Cybernetics 9 (1), 1979.
"""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import Any, Literal

import numpy as np

from minicnn.data.dataset import Dataset
from minicnn.shapes import pair

Switch = bool | Literal["auto"]

WORKING_SIZE = 280  # a larger picture is reduced first, which also averages its noise
MIN_CONTRAST = 0.1  # between ink and paper; less is a blank sheet


def read_picture(
    path: str | os.PathLike[str],
    channels: int = 1,
    size: int | tuple[int, int] | None = (28, 28),
    invert: Switch = "auto",
    crop: Switch = "auto",
) -> np.ndarray:
    """Read a picture file as a network expects it.

    Transparent parts become white, the rotation in the EXIF data is applied, and 16-bit
    pictures keep their depth.

    Parameters
    ----------
    path
        Any picture file that Pillow reads.
    channels
        1 for grayscale, 3 for RGB.
    size
        (H, W) of the result, or one number for both. None keeps the size of the file.
    invert
        Swap dark and bright. "auto": with one channel, if the outermost pixels are on average
        nearer to the brightest value than to the darkest, as those of ink on paper are.
    crop
        Find the ink, which has to be brighter than the paper (see `invert`), blacken the
        paper, and place the ink as MNIST does: scaled into 5/7 of the height and width with
        its proportions kept, the centre of mass in the middle. "auto": with one channel, if
        the picture is not of the given size already. Without it the picture is stretched to
        the size (bilinear, averaging when it is reduced).

    Returns
    -------
    ndarray
        (channels, H, W) float32 in [0, 1].

    Raises
    ------
    FileNotFoundError
        There is no such file.
    ValueError
        Not a whole picture, or one with more pixels than Pillow's limit against decompression
        bombs; or an argument out of range.
    """
    if channels not in (1, 3):
        raise ValueError(f"read_picture: channels: expected 1 or 3, got {channels!r}")
    for name, switch in (("invert", invert), ("crop", crop)):
        if switch not in (True, False, "auto"):
            raise ValueError(
                f"read_picture: {name}: expected True, False or 'auto', got {switch!r}"
            )
    target = None if size is None else pair("read_picture", "size", size, 1)
    if crop is True and (target is None or channels != 1):
        raise ValueError(
            f"read_picture: crop: expected one channel and a size, got {channels} and {size}"
        )

    x = _decode(Path(path), channels)
    if invert == "auto":
        invert = channels == 1 and _border(x[0]).mean() > (x.min() + x.max()) / 2
    if invert:
        x = 1 - x
    if target is None or (x.shape[1:] == target and crop is not True):
        return x
    if crop is True or (crop == "auto" and channels == 1):
        return _place_ink(x[0], target)[None]
    return np.stack([_resize(plane, target) for plane in x])


def load_folder(
    root: str | os.PathLike[str], size: int | tuple[int, int] | None = None, channels: int = 3
) -> Dataset:
    """Load a folder with one sub-folder of pictures for each class.

    Parameters
    ----------
    root
        Folder whose sub-folders, in sorted order, are the classes. Files in them that have no
        picture suffix, deeper folders, and names that start with a dot are passed over.
    size
        (H, W), or one number for both, to which pictures are stretched (bilinear). None: all
        have to be of one size.
    channels
        1 for grayscale, 3 for RGB.

    Returns
    -------
    Dataset
        Pictures sorted by class, then by file name.

    Raises
    ------
    NotADirectoryError, FileNotFoundError
        `root` is not a folder, or not there.
    ValueError
        No class, a class without pictures, a file that is not a picture, or sizes that differ;
        the message names the folder or file.
    """
    from PIL import Image

    suffixes = {s for s, kind in Image.registered_extensions().items() if kind in Image.OPEN}
    folders = [folder for folder in _visible(Path(root)) if folder.is_dir()]
    if not folders:
        raise ValueError(f"{root}: expected a sub-folder for each class, got none")
    files: list[tuple[Path, int]] = []
    for label, folder in enumerate(folders):
        pictures = [file for file in _visible(folder) if file.suffix.lower() in suffixes]
        if not pictures:
            raise ValueError(f"{folder}: expected pictures of class {folder.name!r}, got none")
        files += [(file, label) for file in pictures]

    first = read_picture(files[0][0], channels, size, invert=False, crop=False)
    x = np.empty((len(files), *first.shape), np.float32)
    for i, (file, _) in enumerate(files):
        picture = read_picture(file, channels, size, invert=False, crop=False)
        if picture.shape != first.shape:
            raise ValueError(
                f"{file}: expected {first.shape[1:]} pixels as in {files[0][0]}, "
                f"got {picture.shape[1:]}; give a size to resize to"
            )
        x[i] = picture
    y = np.array([label for _, label in files], np.int64)
    return Dataset(x, y, tuple(folder.name for folder in folders))


def _visible(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if not path.name.startswith("."))


def _decode(path: Path, channels: int) -> np.ndarray:
    """Read a picture file: (channels, H, W) float32 in [0, 1]."""
    from PIL import Image, ImageOps

    with open(path, "rb") as file:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error", Image.DecompressionBombWarning)
                image = ImageOps.exif_transpose(Image.open(file))
            x = _to_unit(image, channels)
        except Exception as error:  # damaged files raise nearly anything in Pillow
            raise ValueError(f"{path}: expected a whole picture, got: {error}") from error
    if not (x.min(initial=0) >= 0 and x.max(initial=0) <= 1):  # also refuses NaN
        raise ValueError(f"{path}: expected values in [0, 1], got {x.min()} to {x.max()}")
    return x


def _to_unit(image: Any, channels: int) -> np.ndarray:
    from PIL import Image

    if image.mode[0] in "IF":  # 16 bits, or floats; converting to L would clip
        scale = 1 if image.mode == "F" else 65535
        gray = np.asarray(image).astype(np.float32) / np.float32(scale)
        return np.repeat(gray[None], channels, axis=0)  # (channels, H, W)
    if {"A", "a"} & set(image.getbands()) or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    bytes_ = np.asarray(image.convert("L" if channels == 1 else "RGB"))
    x = np.divide(bytes_, 255, dtype=np.float32).reshape(*bytes_.shape[:2], channels)
    return np.ascontiguousarray(x.transpose(2, 0, 1))  # (channels, H, W)


def _resize(plane: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Resize (H, W) by bilinear interpolation, averaging over what each new pixel covers."""
    from PIL import Image

    if plane.shape == size:
        return plane
    resized = Image.fromarray(plane).resize(size[::-1], Image.Resampling.BILINEAR)
    return np.asarray(resized)


def _border(plane: np.ndarray) -> np.ndarray:
    """The outermost pixels of (H, W)."""
    return np.concatenate([plane[0], plane[-1], plane[:, 0], plane[:, -1]])


def _paper(plane: np.ndarray) -> np.ndarray:
    """Brightness (H, W) of the empty sheet: a + b*row + c*column through the outermost pixels.

    The slope takes care of light that comes from one side.
    """
    terms = np.stack([np.ones(plane.shape), *np.indices(plane.shape)])  # (3, H, W)
    known = np.stack([_border(term) for term in terms], axis=1)  # (border pixels, 3)
    weights, *_ = np.linalg.lstsq(known, _border(plane), rcond=None)
    return np.tensordot(weights, terms, 1).astype(plane.dtype)  # (H, W)


def _place_ink(plane: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Cut out bright ink and place it in the middle of a black (H, W) as MNIST does."""
    shrink = WORKING_SIZE / max(plane.shape)
    if shrink < 1:
        plane = _resize(plane, _scaled(plane.shape, shrink))
    placed = np.zeros(size, np.float32)
    ink = (plane - _paper(plane)).clip(0)
    contrast = ink.max()
    if contrast < MIN_CONTRAST:
        return placed
    ink /= contrast
    threshold = _otsu(ink)
    rows, columns = (np.flatnonzero((ink > threshold).any(axis)) for axis in (1, 0))
    ink[ink < threshold / 2] = 0  # grain of the paper
    ink = ink[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]

    scale = min(5 * n / 7 / m for n, m in zip(size, ink.shape, strict=True))
    ink = _resize(ink, _scaled(ink.shape, scale))
    corner = []
    for axis, (n, m) in enumerate(zip(size, ink.shape, strict=True)):
        profile = ink.sum(1 - axis, dtype=np.float64)
        centre = profile @ np.arange(m) / profile.sum()
        corner.append(int(np.clip(round(n / 2 - centre), 0, n - m)))
    top, left = corner
    # A thin line fades when it is reduced; in MNIST every digit reaches full brightness.
    placed[top : top + ink.shape[0], left : left + ink.shape[1]] = ink / ink.max()
    return placed


def _scaled(shape: tuple[int, ...], factor: float) -> tuple[int, int]:
    H, W = shape
    return max(1, round(H * factor)), max(1, round(W * factor))


def _otsu(plane: np.ndarray) -> float:
    """The level that splits [0, 1] values into two groups with the largest variance between."""
    counts, edges = np.histogram(plane, 256, (0, 1))
    middles = (edges[:-1] + edges[1:]) / 2
    below = counts.cumsum()[:-1]
    above = counts.sum() - below
    sums = (counts * middles).cumsum()
    with np.errstate(invalid="ignore", divide="ignore"):
        gap = sums[:-1] / below - (sums[-1] - sums[:-1]) / above
        between = np.nan_to_num(below * above * gap**2)
    return float(edges[1:-1][between.argmax()])

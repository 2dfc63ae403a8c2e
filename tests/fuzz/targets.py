"""The readers under test: whole files to damage, how to read one, and what is a wrong value.

Formats without a checksum cannot tell a changed number from a number. There a value is wrong if it
differs from what an independent decoder finds in the same damaged bytes.
"""

from __future__ import annotations

import gzip
import json
import math
import struct
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

import minicnn as mc
from fuzz.mutations import mutate
from minicnn import checkpoint
from minicnn.config import MODELS, Config
from minicnn.data.idx import read_idx, write_idx
from minicnn.runs import CONFIG, HISTORY, WEIGHTS, Run


class Target(NamedTuple):
    """A reader. `wrong` says what is wrong with a value that was read, or returns ""."""

    suffix: str
    files: Callable[[], list[bytes]]  # whole files, by which a damaged one begins
    read: Callable[[Path], Any]
    wrong: Callable[[Any, bytes, bytes], str]  # (value, damaged content, whole content)
    rewrite: Callable[[bytes, np.random.Generator], bytes] | None = None  # see `mutate`


def written(suffix: str, write: Callable[[Path], None]) -> bytes:
    """What `write` writes."""
    with tempfile.TemporaryDirectory() as name:
        path = Path(name) / f"file{suffix}"
        write(path)
        return path.read_bytes()


# ---------------------------------------------------------------- well-formed, but wrong

ODD: list[Any] = [
    None, True, False, 0, -1, 1, 2, 3, 2**31, 2**63, -(2**63), 10**30, 0.5, -0.5,
    1e308, math.inf, math.nan,
    "", "0", "digits", "mnist_cnn", "auto", "../../etc/passwd", "\0", "F32", "I64", [],
    [1], [1, 1], [0, 8],
    [28, 28], [[]], [2**40], {}, {"a": 1}, ["a", "b"], ["a", 1],
]  # fmt: skip


def rewrite_json(value: Any, rng: np.random.Generator) -> Any:
    """Replace, take away or repeat one value somewhere inside."""
    if isinstance(value, dict) and value and rng.random() < 0.9:
        key = sorted(value)[rng.integers(len(value))]
        if rng.random() < 0.1:
            return {k: v for k, v in value.items() if k != key}
        if rng.random() < 0.05:
            return value | {f"{key}x": value[key]}
        return value | {key: rewrite_json(value[key], rng)}
    if isinstance(value, list) and value and rng.random() < 0.8:
        i = int(rng.integers(len(value)))
        if rng.random() < 0.2:
            return value[:i] + value[i + 1 :]
        return [*value[:i], rewrite_json(value[i], rng), *value[i + 1 :]]
    if isinstance(value, int) and rng.random() < 0.5:
        return value + int(rng.integers(-8, 9))
    return ODD[rng.integers(len(ODD))]


def rewrite_text(content: bytes, rng: np.random.Generator) -> bytes:
    """Change one value in a JSON file of one value, or of one a line."""
    lines = content.splitlines()
    try:
        return json.dumps(rewrite_json(json.loads(content), rng)).encode()
    except ValueError:
        i = int(rng.integers(len(lines)))
        lines[i] = json.dumps(rewrite_json(json.loads(lines[i]), rng)).encode()
        return b"\n".join(lines) + b"\n"


def rewrite_header(content: bytes, rng: np.random.Generator) -> bytes:
    """Change the header of a safetensors file, whose length stays right."""
    (n,) = struct.unpack("<Q", content[:8])
    found = rewrite_json(json.loads(content[8 : 8 + n]), rng)
    header = json.dumps(found if isinstance(found, dict) else {}).encode()
    return struct.pack("<Q", len(header)) + header + content[8 + n :]


def rewrite_gzip(content: bytes, rng: np.random.Generator) -> bytes:
    """Change what is inside of a gzip file."""
    return gzip.compress(mutate([gzip.decompress(content)], rng)[1], mtime=0)


def rewrite_onnx(content: bytes, rng: np.random.Generator) -> bytes:
    """Change a field of a model: a name, an operator, an attribute, a shape, an array."""
    import onnx

    model = onnx.load_model_from_string(content)
    graph = model.graph

    def one(some: Any) -> Any:
        return some[int(rng.integers(len(some)))]

    number = int(one([0, 1, 2, 3, -1, 7, 2**31, 2**62, -(2**62), int(rng.integers(-9, 10))]))
    names = [name for node in graph.node for name in (*node.input, *node.output)] or [""]
    kinds = sorted({node.op_type for node in graph.node} | {"If", "Loop", "Add", "Reshape", "Pad"})
    node = one(graph.node) if graph.node else graph.node.add()
    tensor = one(graph.initializer) if graph.initializer else graph.initializer.add()
    choice = int(rng.integers(12))
    if choice == 0:
        node.op_type = str(one(kinds))
    elif choice == 1 and node.input:
        node.input[int(rng.integers(len(node.input)))] = str(one(names))
    elif choice == 2 and node.attribute:
        attribute = one(node.attribute)
        if attribute.ints:
            attribute.ints[int(rng.integers(len(attribute.ints)))] = number
        else:
            attribute.i, attribute.f = number, float(number)
    elif choice == 3 and node.attribute:
        attribute = one(node.attribute)
        attribute.ints.extend([number])
    elif choice == 4 and node.attribute:
        del node.attribute[int(rng.integers(len(node.attribute)))]
    elif choice == 5 and tensor.dims:
        tensor.dims[int(rng.integers(len(tensor.dims)))] = number
    elif choice == 6:
        tensor.data_type = int(rng.integers(0, 25))
    elif choice == 7:
        tensor.raw_data = mutate([tensor.raw_data or b"0"], rng)[1]
    elif choice == 8:
        tensor.name = str(one(names))
    elif choice == 9 and graph.input:
        dims = graph.input[0].type.tensor_type.shape.dim
        if dims:
            one(dims).dim_value = number
    elif choice == 10:
        model.opset_import[0].version = int(rng.integers(0, 30))
    else:
        graph.node.append(node)
    return model.SerializeToString()


# ---------------------------------------------------------------- IDX

IDX_TYPES = {0x08: "u1", 0x09: "i1", 0x0B: ">i2", 0x0C: ">i4", 0x0D: ">f4", 0x0E: ">f8"}


def idx_files(suffix: str) -> list[bytes]:
    rng = np.random.default_rng(0)
    arrays = [
        rng.integers(0, 256, (20, 28, 28), np.uint8),
        np.arange(10, dtype=np.uint8),
        rng.standard_normal((3, 4, 5)),
        rng.integers(-99, 99, (7, 2)).astype(np.int16),
        rng.standard_normal(6).astype(np.float32),
        np.zeros((0, 4), np.int32),
    ]
    return [written(suffix, lambda p, a=a: write_idx(p, a)) for a in arrays]


def decode_idx(content: bytes) -> np.ndarray | None:
    """The array, or None where the bytes are not exactly one."""
    if len(content) < 4 or content[:2] != b"\0\0" or content[2] not in IDX_TYPES:
        return None
    ndim, dtype = content[3], np.dtype(IDX_TYPES[content[2]])
    if len(content) < 4 + 4 * ndim:
        return None
    shape = struct.unpack(f">{ndim}I", content[4 : 4 + 4 * ndim])
    data = content[4 + 4 * ndim :]
    if len(data) != math.prod(shape) * dtype.itemsize:
        return None
    return np.frombuffer(data, dtype).reshape(shape)


def wrong_idx(value: np.ndarray, content: bytes, whole: bytes) -> str:
    return differs(value, decode_idx(content))


def wrong_idx_gz(value: np.ndarray, content: bytes, whole: bytes) -> str:
    try:
        return differs(value, decode_idx(gzip.decompress(content)))
    except Exception as error:
        return f"accepted what gzip refuses: {error}"


def differs(value: np.ndarray, expected: np.ndarray | None) -> str:
    if expected is None:
        return "accepted what is no whole array"
    same = value.shape == expected.shape and value.dtype == expected.dtype.newbyteorder("=")
    same = same and value.tobytes() == expected.astype(value.dtype).tobytes()
    return "" if same else "another array than the bytes hold"


# ---------------------------------------------------------------- weights and checkpoints


def network(rng: int = 0) -> mc.Sequential:
    rng = np.random.default_rng(rng)
    return mc.Sequential(
        mc.Conv2d(1, 4, 3, rng=rng), mc.BatchNorm2d(4), mc.ReLU(), mc.MaxPool2d(2),
        mc.Residual(mc.Conv2d(4, 4, 3, padding=1, rng=rng)), mc.Dropout(0.2, rng=rng),
        mc.Flatten(), mc.Linear(36, 3, rng=rng),
    )  # fmt: skip


def batch() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(1)
    return rng.random((8, 1, 8, 8), np.float32), rng.integers(0, 3, 8)


def weight_files() -> list[bytes]:
    whole = [written("", lambda p, m=m: checkpoint.save(m, p)) for m in (network(), network(5))]
    from safetensors.numpy import save

    return [*whole, save(network(7).state_dict())]  # the last as PyTorch writes it: no sha256


def decode_safetensors(content: bytes) -> dict[str, bytes]:
    (n,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + n])
    header.pop("__metadata__", None)
    data = content[8 + n :]
    return {name: data[slice(*entry["data_offsets"])] for name, entry in header.items()}


def digests(content: bytes) -> bool:
    (n,) = struct.unpack("<Q", content[:8])
    return checkpoint.DIGESTS in (json.loads(content[8 : 8 + n]).get("__metadata__") or {})


def read_weights(path: Path) -> dict[str, np.ndarray]:
    """Into a network, which must stay as it is when the file is refused."""
    model = network(99)
    before = model.state_dict()
    try:
        checkpoint.load(model, path)
    except Exception:
        for name, a in model.state_dict().items():
            if a.tobytes() != before[name].tobytes():
                raise AssertionError(f"{name} has changed though the file was refused") from None
        raise
    return model.state_dict()


def wrong_weights(value: dict[str, np.ndarray], content: bytes, whole: bytes) -> str:
    if digests(content) and digests(whole):
        stored = [decode_safetensors(file) for file in weight_files()]
        got = {name: a.tobytes() for name, a in value.items()}
        return "" if got in stored else "other weights than were saved, in spite of their sha256"
    stored = decode_safetensors(content)
    (n,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + n])
    types = {"F32": "<f4", "F64": "<f8", "F16": "<f2", "I64": "<i8", "I32": "<i4", "I16": "<i2",
             "I8": "i1", "U8": "u1", "U16": "<u2", "U32": "<u4", "U64": "<u8"}  # fmt: skip
    for name, a in value.items():
        kind = types.get(header[name]["dtype"])
        if kind is None or list(a.shape) != header[name]["shape"]:
            return f"{name}: a dtype or shape that the file does not have"
        with np.errstate(all="ignore"):
            found = np.frombuffer(stored[name], kind).astype(a.dtype)
        if found.tobytes() != a.tobytes():
            return f"{name}: other numbers than the bytes hold"
    return ""


def trainer(rng: int = 0) -> mc.Trainer:
    model = network(rng)
    return mc.Trainer(model, mc.optim.Adam(model, lr=1e-3))


def checkpoint_files() -> list[bytes]:
    contents = []
    for steps in (1, 3):
        t = trainer()
        with mc.use("numpy"):  # compiles nothing
            for _ in range(steps):
                t.step(*batch())
        contents.append(written("", lambda p, t=t: checkpoint.save_training(t, p)))
    return contents


def training_state(t: mc.Trainer) -> dict[str, bytes]:
    state = {f"model.{name}": a.tobytes() for name, a in t.model.state_dict().items()}
    state |= {
        f"optimizer.{k}": np.asarray(a).tobytes() for k, a in t.optimizer.state_dict().items()
    }
    return state | {"lr": repr(t.optimizer.lr).encode(), "history": repr(t.history).encode()}


def read_checkpoint(path: Path) -> dict[str, bytes]:
    t = trainer(99)
    before = training_state(t)
    try:
        checkpoint.load_training(t, path)
    except Exception:
        if training_state(t) != before:
            raise AssertionError("the trainer has changed though the file was refused") from None
        raise
    return training_state(t)


def wrong_checkpoint(value: dict[str, bytes], content: bytes, whole: bytes) -> str:
    with tempfile.TemporaryDirectory() as name:
        for original in checkpoint_files():
            path = Path(name) / "whole"
            path.write_bytes(original)
            if read_checkpoint(path) == value:
                return ""
    return "another state than was saved"


# ---------------------------------------------------------------- the files of a run


def config_files() -> list[bytes]:
    configs = [
        Config("digits", tuple("0123456789"), 1, (28, 28), versions={"numpy": "2.4"}),
        Config("a folder", ("cat", "dög"), 3, (64, 48), label_smoothing=0.1, crop="auto",
               options={"epochs": 3}),
    ]  # fmt: skip
    out = []
    with tempfile.TemporaryDirectory() as name:
        for config in configs:
            Run(name).write_config(config)
            out.append((Path(name) / CONFIG).read_bytes())
    return out


def read_config(path: Path) -> Config:
    (path.parent / CONFIG).write_bytes(path.read_bytes())
    return Run(path.parent).config


def wrong_config(value: Config, content: bytes, whole: bytes) -> str:
    found = json.loads(content)
    checks = {
        "classes": isinstance(value.classes, tuple) and list(value.classes) == found["classes"]
        and all(isinstance(name, str) for name in value.classes),
        "channels": type(value.channels) is int and value.channels == found["channels"] >= 1,
        "image_size": list(value.image_size) == _both(found["image_size"])
        and min(value.image_size) >= 1,
        "model": value.model in MODELS,
        "dataset": isinstance(value.dataset, str),
        "label_smoothing": isinstance(value.label_smoothing, int | float)
        and 0 <= value.label_smoothing <= 1,
        "invert": value.invert in (True, False, "auto"),
        "crop": value.crop in (True, False, "auto"),
        "options": isinstance(value.options, dict),
        "versions": isinstance(value.versions, dict),
    }  # fmt: skip
    return ", ".join(f"{name}: accepted {getattr(value, name)!r}" for name, ok in checks.items()
                     if not ok)  # fmt: skip


def _both(size: Any) -> list[int]:
    return size if isinstance(size, list) else [size, size]


def run_files() -> list[bytes]:
    return [config_files()[0]]


@cache
def run_weights() -> bytes:
    config = Config("digits", tuple("0123456789"), 1, (28, 28))
    return written("", lambda path: checkpoint.save(config.build(), path))


def read_run(path: Path) -> Any:
    """The network of a run whose config is damaged, and whose weights are whole."""
    (path.parent / CONFIG).write_bytes(path.read_bytes())
    if not (path.parent / WEIGHTS).exists():
        (path.parent / WEIGHTS).write_bytes(run_weights())
    return Run(path.parent).load_model().state_dict()


def wrong_run(value: dict[str, np.ndarray], content: bytes, whole: bytes) -> str:
    stored = decode_safetensors(run_weights())
    same = {name: a.tobytes() for name, a in value.items()} == stored
    return "" if same else "other weights than the file holds"


def history_files() -> list[bytes]:
    with tempfile.TemporaryDirectory() as name:
        Run(name).write_history(
            [{"epoch": i, "train_loss": 1 / (i + 1), "test_loss": math.nan} for i in range(5)]
        )
        return [(Path(name) / HISTORY).read_bytes()]


def read_history(path: Path) -> list[dict[str, float]]:
    (path.parent / HISTORY).write_bytes(path.read_bytes())
    return Run(path.parent).read_history()


def wrong_history(value: list[dict[str, float]], content: bytes, whole: bytes) -> str:
    for record in value:
        for name, number in record.items():
            if isinstance(number, bool) or not isinstance(number, int | float):
                return f"{name}: accepted {number!r}"
    return ""


# ---------------------------------------------------------------- ONNX


def onnx_files() -> list[bytes]:
    from minicnn.onnx.exporter import to_proto

    rng = np.random.default_rng(3)
    residual = mc.Sequential(
        mc.Residual(mc.Sequential(mc.Conv2d(2, 2, 3, padding=1, rng=rng), mc.ReLU()),
                    mc.Conv2d(2, 2, 1, rng=rng)),
        mc.ConvTranspose2d(2, 2, 2, stride=2, rng=rng), mc.GELU(),
        mc.AdaptiveAvgPool2d(1), mc.Flatten(), mc.Linear(2, 3, rng=rng), mc.LogSoftmax(),
    )  # fmt: skip
    plain = mc.Sequential(
        mc.Conv2d(1, 2, 3, rng=rng), mc.BatchNorm2d(2), mc.LeakyReLU(), mc.AvgPool2d(2),
        mc.GroupNorm(1, 2), mc.Flatten(), mc.Linear(8, 2, rng=rng), mc.Softmax(),
    )  # fmt: skip
    return [
        to_proto(m, s).SerializeToString() for m, s in ((residual, (2, 4, 4)), (plain, (1, 6, 6)))
    ]


def read_onnx(path: Path) -> Any:
    from minicnn.onnx import load

    return load(path)


def wrong_onnx(value: Any, content: bytes, whole: bytes) -> str:
    """What the network computes is what ONNX's own evaluator computes from the same bytes."""
    from onnx.reference import ReferenceEvaluator

    import onnx

    model = onnx.load_model_from_string(content)
    shape = [d.dim_value for d in model.graph.input[0].type.tensor_type.shape.dim]
    numbers = [
        n for node in model.graph.node for a in node.attribute for n in (*a.ints, a.i)
    ] + shape  # fmt: skip
    if len(shape) != 4 or min(shape[1:]) < 1 or max(map(abs, numbers)) > 16:
        return ""  # how a reader copes is what is tested; a huge graph may well be huge to run
    kind = np.float32 if model.graph.input[0].type.tensor_type.elem_type == 1 else np.float64
    x = np.random.default_rng(0).standard_normal((2, *shape[1:])).astype(kind)
    with np.errstate(all="ignore"):
        try:
            (expected,) = ReferenceEvaluator(model).run(None, {model.graph.input[0].name: x})
            y = value(x)
        except Exception:
            return ""  # one of them refuses to run it
        if y.shape != expected.shape:
            return f"an output of shape {y.shape}, where ONNX has {expected.shape}"
        finite = np.isfinite(y) & np.isfinite(expected)
        scale = 1 + max((float(np.abs(a).max()) for a in (*value.state_dict().values(), expected)
                         if a.size and np.isfinite(a).all()), default=0.0)  # fmt: skip
        if np.abs(y - expected)[finite].max(initial=0) > 1e-4 * scale:
            return "other results than ONNX's evaluator"
    return ""


TARGETS: dict[str, Target] = {
    "idx": Target(".idx", lambda: idx_files(".idx"), read_idx, wrong_idx),
    "idx.gz": Target(".gz", lambda: idx_files(".gz"), read_idx, wrong_idx_gz, rewrite_gzip),
    "safetensors": Target(
        ".safetensors", weight_files, read_weights, wrong_weights, rewrite_header
    ),
    "config": Target(".json", config_files, read_config, wrong_config, rewrite_text),
    "run": Target(".json", run_files, read_run, wrong_run, rewrite_text),
    "history": Target(".jsonl", history_files, read_history, wrong_history, rewrite_text),
    "onnx": Target(".onnx", onnx_files, read_onnx, wrong_onnx, rewrite_onnx),
}
if hasattr(checkpoint, "load_training"):
    TARGETS["checkpoint"] = Target(
        ".safetensors", checkpoint_files, read_checkpoint, wrong_checkpoint, rewrite_header
    )

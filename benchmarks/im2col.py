"""Time im2col and col2im, which the NumPy convolution is made of; PyTorch's are unfold and fold.

"CS231n-style" gathers with index arrays and adds back with np.add.at.

    python benchmarks/im2col.py --only 3x3
"""

from __future__ import annotations

import argparse
from typing import Any

import contest
import harness
import numpy as np
from peers import places

from minicnn import ops

CASES = {  # batch, channels, rows and columns, kernel
    "3x3, 64 channels 16x16": (64, 64, 16, 3),
    "5x5, 32 channels 12x12": (64, 32, 12, 5),
    "5x5, 1 channel 28x28": (64, 1, 28, 5),
}


def make(case: tuple[int, int, int, int], args: argparse.Namespace) -> contest.Contest:
    N, C, H, K = case
    x = contest.draw(0, (N, C, H, H))
    OH = H - K + 1
    cols = contest.draw(1, (C * K * K, N * OH * OH))
    calls: dict[str, contest.Passes] = {}
    for version in contest.versions_on(args, ("numpy", "numba")):
        own = contest.placed(version, (x, cols))

        def forward(version: str = version, x: Any = own[0]) -> Any:
            with contest.using(version):
                return ops.im2col(x, K)

        def backward(version: str = version, cols: Any = own[1]) -> Any:
            with contest.using(version):
                return ops.col2im(cols, x.shape, K)

        calls[f"{contest.OURS} {version}"] = {"forward": forward, "backward": backward}
    views = {}
    torch = harness.torch_on(args.device) if contest.asked(args, "PyTorch") else None
    if torch is not None:  # (N, K, L) where ours is (K, N*L)
        unfold, fold = torch.nn.functional.unfold, torch.nn.functional.fold
        tx = torch.from_numpy(x).to(args.device)
        columns = cols.reshape(C * K * K, N, -1).swapaxes(0, 1)
        tcols = torch.from_numpy(np.ascontiguousarray(columns)).to(args.device)
        calls["PyTorch eager"] = {
            "forward": lambda: unfold(tx, K),
            "backward": lambda: fold(tcols, (H, H), K),
        }
        views["PyTorch eager"] = lambda a: (
            contest.as_numpy(a).swapaxes(0, 1).reshape(cols.shape) if a.ndim == 3 else a
        )
    if contest.asked(args, "CS231n"):
        k, i, j, _ = places(x, K)

        def gather() -> Any:
            return x[:, k, i, j].transpose(1, 0, 2).reshape(cols.shape)

        def add_back() -> Any:
            dx = np.zeros_like(x)
            split = cols.reshape(C * K * K, N, -1).swapaxes(0, 1)
            np.add.at(dx, (slice(None), k, i, j), split)
            return dx

        calls["CS231n-style NumPy"] = {"forward": gather, "backward": add_back}
    traffic = contest.bytes_of(x, cols)
    return contest.Contest(calls, {}, dict.fromkeys(("forward", "backward"), traffic), views)


if __name__ == "__main__":
    contest.run(__doc__, CASES, make)

"""Kernels as one writes them by hand, with the mistakes that one makes by hand.

Written apart from the package, and without the suspects of `minicnn.gradcheck`, so that the tests
that let it name these mistakes prove something.
"""

import numpy as np


def conv2d_forward(x, w, b, stride=1, padding=0, dilation=1, groups=1):
    """Loop over the taps of the kernel."""
    N, _, H, W = x.shape
    F, CG, KH, KW = w.shape
    xp = np.pad(x, ((0, 0), (0, 0), (padding, padding), (padding, padding)))
    OH = (H + 2 * padding - dilation * (KH - 1) - 1) // stride + 1
    OW = (W + 2 * padding - dilation * (KW - 1) - 1) // stride + 1
    y = np.zeros((N, F, OH, OW)) + b[:, None, None]
    for f in range(F):
        first = f // (F // groups) * CG
        for p in range(KH):
            for q in range(KW):
                slab = xp[:, first : first + CG, p * dilation :, q * dilation :]
                slab = slab[:, :, ::stride, ::stride][:, :, :OH, :OW]
                y[:, f] += np.einsum("ncij,c->nij", slab, w[f, :, p, q])
    return y


def conv2d_backward(dy, x, w, b, stride=1, padding=0, dilation=1, groups=1, bug=""):
    """The same loop, backward."""
    N, C, H, W = x.shape
    F, CG, KH, KW = w.shape
    _, _, OH, OW = dy.shape
    xp = np.pad(x, ((0, 0), (0, 0), (padding, padding), (padding, padding)))
    dxp, dw = np.zeros_like(xp), np.zeros_like(w)
    s = 1 if bug == "stride" else stride
    d = 1 if bug == "dilation" else dilation
    for p in range(KH):
        for q in range(KW):
            rows = slice(p * d, p * d + (OH - 1) * s + 1, s)
            columns = slice(q * d, q * d + (OW - 1) * s + 1, s)
            term = np.zeros((N, C, OH, OW))
            for f in range(F):
                group = f % groups if bug == "groups" else f // (F // groups)
                channels = slice(group * CG, (group + 1) * CG)
                tap = w[f, :, KH - 1 - p, KW - 1 - q] if bug == "flip" else w[f, :, p, q]
                term[:, channels] += dy[:, f, None] * tap[:, None, None]
                seen = xp[:, channels, rows, columns]
                images = slice(-1, None) if bug == "last image" else slice(None)
                dw[f, :, p, q] = np.einsum("ncij,nij->c", seen[images], dy[images, f])
            if bug == "overwrite":
                dxp[:, :, rows, columns] = term
            else:
                dxp[:, :, rows, columns] += term
    top = 0 if bug == "crop" else padding
    dx = dxp[:, :, top : top + H, top : top + W]
    if bug == "border" and padding:
        dx = dx.copy()
        dx[:, :, :1] = 0
        dx[:, :, -1:] = 0
    if bug == "dw mean":
        dw /= N
    if bug == "dw flip":
        dw = dw[:, :, ::-1, ::-1]
    if bug == "reshape":  # (F, N, OH, OW) taken for (N, F, OH, OW)
        mixed = dy.reshape(F, N, OH, OW).swapaxes(0, 1)
        return (
            dx,
            conv2d_backward(mixed, x, w, b, stride, padding, dilation, groups)[1],
            dy.sum((0, 2, 3)),
        )
    db = dy.sum((1, 2, 3)) if bug == "bias axis" else dy.sum((0, 2, 3))
    return dx, dw, db


def linear_forward(x, w, b):
    """y = x w^T + b."""
    return x @ w.T + b


def max_pool_backward(dy, x, kernel_size=2, stride=None, bug=""):
    """Windows of k x k, one after the other."""
    k, s = kernel_size, stride or kernel_size
    dx = np.zeros_like(x)
    for n, c, i, j in np.ndindex(dy.shape):
        part = x[n, c, i * s : i * s + k, j * s : j * s + k]
        target = dx[n, c, i * s : i * s + k, j * s : j * s + k]
        if bug == "all":
            target += dy[n, c, i, j]
        elif bug == "ties":
            target[part == part.max()] += dy[n, c, i, j]
        elif bug == "last tie":
            at = part.size - 1 - np.argmax(part.ravel()[::-1])
            target[np.unravel_index(at, part.shape)] += dy[n, c, i, j]
        elif bug == "overwrite":
            target[np.unravel_index(np.argmax(part), part.shape)] = dy[n, c, i, j]
        else:
            target[np.unravel_index(np.argmax(part), part.shape)] += dy[n, c, i, j]
    return dx


def max_pool_forward(x, kernel_size=2, stride=None):
    """The largest of each window."""
    k, s = kernel_size, stride or kernel_size
    OH, OW = (x.shape[2] - k) // s + 1, (x.shape[3] - k) // s + 1
    windows = np.lib.stride_tricks.sliding_window_view(x, (k, k), (2, 3))[:, :, ::s, ::s]
    return windows[:, :, :OH, :OW].max((4, 5))


def batch_norm_forward(x, w, b, eps=1e-5):
    """Normalise each channel over the batch."""
    mean, var = x.mean((0, 2, 3), keepdims=True), x.var((0, 2, 3), keepdims=True)
    return w[:, None, None] * (x - mean) / np.sqrt(var + eps) + b[:, None, None]


def batch_norm_backward(dy, x, w, b, eps=1e-5, bug=""):
    """The three ways of the gradient: directly, through the variance and through the mean."""
    axes = (0, 2, 3)
    M = x.size // x.shape[1]
    mean, var = x.mean(axes, keepdims=True), x.var(axes, keepdims=True)
    rstd = 1 / np.sqrt(var + eps)
    g = dy if bug == "weight" else dy * w[:, None, None]
    dvar = (g * (x - mean)).sum(axes, keepdims=True) * -0.5 * rstd**3
    dmean = -(g * rstd).sum(axes, keepdims=True)
    dx = g * rstd
    if bug not in ("variance", "constant"):
        dx = dx + dvar * 2 * (x - mean) / M
    if bug not in ("mean", "constant"):
        dx = dx + dmean / M
    xhat = x if bug == "raw" else (x - mean) * rstd
    return dx, (dy * xhat).sum(axes), dy.sum(axes)


def softmax(x):
    """Along the rows."""
    e = np.exp(x - x.max(1, keepdims=True))
    return e / e.sum(1, keepdims=True)

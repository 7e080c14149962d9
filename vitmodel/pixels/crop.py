"""Where the breast lies in a low-resolution view of a mammogram, and on which side its chest wall is. Knows no file and no laterality."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import cv2
import numpy as np

from vitmodel.pixels.verdict import ImageRefused, Remark

Box = tuple[float, float, float, float]


@dataclass(frozen=True)
class Breast:
    """The breast in a view of H W pixels.

    `mask` is H W, true on the breast: skin line, nipple and the pectoral muscle that the image shows, without the arm above and the
    belly below a skin fold. `box` is (x0, y0, x1, y1) in fractions of the view, the mask's bounding box and one pixel of the view
    around it. `chest_wall` is the side of the view on which the breast rests. Where `inverted`, the view was bright where there is
    air: the caller takes 1 - grey, everywhere, before anything else.
    """

    mask: np.ndarray
    box: Box
    chest_wall: Literal["left", "right"]
    inverted: bool
    remarks: tuple[Remark, ...] = ()

    def box_in(self, rows: int, columns: int) -> tuple[int, int, int, int]:
        """The box in whole pixels (x0, y0, x1, y1) of an image of rows x columns, rounded outwards."""
        x0, y0, x1, y1 = self.box
        return int(x0 * columns), int(y0 * rows), int(np.ceil(x1 * columns)), int(np.ceil(y1 * rows))


def find_breast(grey: np.ndarray) -> Breast:
    g, inverted = upright(grey)
    frame = content(g)
    x0, y0, x1, y1 = frame
    inner = g[y0:y1, x0:x1]
    tone = tones(inner)
    t = air_limit(tone)
    tissue = (tone > t).astype(np.uint8)
    unit = max(grey.shape) / 512
    m = largest(tissue, unit)
    if m is None:
        raise ImageRefused("no_breast")
    mask = np.zeros(grey.shape, bool)
    side, certainty = chest_side(m)
    m = without_folds(m, side)
    mask[y0:y1, x0:x1] = m
    ys, xs = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    h, w = grey.shape
    box = (max(xs[0] - 1, 0) / w, max(ys[0] - 1, 0) / h, min(xs[-1] + 2, w) / w, min(ys[-1] + 2, h) / h)
    rem = []
    if certainty < 0.1: rem.append(Remark('doubtful_side', f'{certainty:.3f}'))
    return Breast(mask, box, side, inverted, tuple(rem))


def upright(g):
    lo, hi = float(g.min()), float(g.max())
    if hi - lo < 0.02: raise ImageRefused('blank')
    n = (g - lo) / (hi - lo)
    b = cv2.blur(n, (5, 5)); flat = np.abs(cv2.morphologyEx(n, cv2.MORPH_GRADIENT, np.ones((3, 3), np.uint8))) < 0.02
    white = (flat & (b > 0.9)).astype(np.uint8); black = (flat & (b < 0.1)).astype(np.uint8)
    k = np.ones((9, 9), np.uint8)
    ring = cv2.dilate(white, k) > 0
    mid = (b > .12) & (b < .88)
    inv = white.mean() > 0.05 and white.mean() > black.mean()
    return (1 - g if inv else g), inv


def content(g):
    h, w = g.shape
    x0, y0, x1, y1 = 0, 0, w, h
    tol = 0.04 * (float(g.max()) - float(g.min()))

    def uniform(line):
        lo, hi = np.quantile(line, (0.01, 0.99))
        return hi - lo < tol
    changed = True
    while changed and x1 - x0 > 16 and y1 - y0 > 16:
        changed = False
        while x1 - x0 > 16 and uniform(g[y0:y1, x0]): x0 += 1; changed = True
        while x1 - x0 > 16 and uniform(g[y0:y1, x1 - 1]): x1 -= 1; changed = True
        while y1 - y0 > 16 and uniform(g[y0, x0:x1]): y0 += 1; changed = True
        while y1 - y0 > 16 and uniform(g[y1 - 1, x0:x1]): y1 -= 1; changed = True
    return x0, y0, x1, y1


def tones(g):
    lo, hi = np.quantile(g, (0.001, 0.995))
    n = np.sqrt(np.clip((g - lo) / max(hi - lo, 1e-6), 0, 1))
    return cv2.GaussianBlur((n * 255).astype(np.uint8), (3, 3), 0)


def air_limit(tone):
    otsu, _ = cv2.threshold(tone, 0, 255, cv2.THRESH_OTSU)
    otsu = int(otsu)
    counts = np.bincount(tone.ravel(), minlength=256).astype(np.float64)
    counts = np.convolve(np.pad(counts, 4, mode='edge'), np.ones(9) / 9, mode='valid')
    mode = int(np.argmax(counts[: otsu + 1]))
    valley = counts[mode : otsu + 1].min()
    return mode + int(np.argmax(counts[mode : otsu + 1] <= 1.5 * valley + 1))


def largest(tissue, unit):
    k = 2 * round(5 * unit) + 1
    el = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (k, k))
    p = cv2.copyMakeBorder(tissue, k, k, k, k, cv2.BORDER_REPLICATE)
    core = cv2.morphologyEx(p, cv2.MORPH_OPEN, el)[k:-k, k:-k]
    n, lab, stats, _ = cv2.connectedComponentsWithStats(core, connectivity=4)
    if n < 2: return None
    i = 1 + int(np.argmax(stats[1:, cv2.CC_STAT_AREA]))
    if stats[i, cv2.CC_STAT_AREA] < 0.02 * tissue.size: return None
    m = (lab == i).astype(np.uint8)
    m = cv2.dilate(m, el) & tissue
    n, lab, stats, _ = cv2.connectedComponentsWithStats(m, connectivity=4)
    m = (lab == 1 + int(np.argmax(stats[1:, cv2.CC_STAT_AREA]))).astype(np.uint8)
    c, _ = cv2.findContours(cv2.copyMakeBorder(m, 1, 1, 1, 1, cv2.BORDER_CONSTANT), cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
    f = np.zeros((m.shape[0] + 2, m.shape[1] + 2), np.uint8)
    cv2.drawContours(f, c, -1, 1, cv2.FILLED)
    return f[1:-1, 1:-1]


def chest_side(m):
    rows = m[m.any(1)]
    xs = np.flatnonzero(m.any(0)); a, b = xs[0], xs[-1]
    left = rows.argmax(1) - a
    right = b - (m.shape[1] - 1 - rows[:, ::-1].argmax(1))
    w = b - a + 1
    d = (right.mean() - left.mean()) / w
    return ('left' if d >= 0 else 'right'), abs(d)


def without_folds(m, side):
    reach = m if side == 'left' else m[:, ::-1]
    w = m.shape[1]
    e = np.where(reach.any(1), w - reach[:, ::-1].argmax(1), 0).astype(float)
    base = np.flatnonzero(reach.any(0))[0]
    e = np.maximum(e - base, 0)
    ys = np.flatnonzero(e)
    a, b = ys[0], ys[-1] + 1
    q = (b - a) // 4
    peak = a + q + int(np.argmax(e[a + q : b - q]))
    top = peak - neck(e[a : peak + 1][::-1]); bottom = peak + neck(e[peak:b])
    out = np.zeros_like(m); out[top:bottom + 1] = m[top:bottom + 1]
    return out


def neck(e):
    low = np.minimum.accumulate(e)
    far = (e > FAR * e[0]) | ((low < 0.85 * e[0]) & (e > low + RISE * e[0]))
    if far.any(): e = e[: int(np.argmax(far))]
    n = len(e)
    if n < 3: return n - 1
    pts = np.stack([np.arange(n), e], 1)
    pts = np.concatenate([pts, [[n - 1, -1], [0, -1]]]).astype(np.float32)
    hull = cv2.convexHull(pts)[:, 0]
    hull = hull[hull[:, 1] >= 0]
    hull = hull[np.argsort(hull[:, 0])]
    depth = np.interp(np.arange(n), hull[:, 0], hull[:, 1]) - e
    i = int(np.argmax(depth))
    if depth[i] < DEPTH * e[0] or e[i] > 0.85 * e[0]: return n - 1
    if MODE[0] == 'h':
        return i + int(np.flatnonzero(depth[i:] >= MODE[1] * depth[i])[-1])
    if MODE[0] == 'min': return int(np.argmax(e <= e.min() + MODE[1] * e[0]))
    k = max(2, round(MODE[2] * LEN))
    pad = np.pad(e, k, mode='edge')
    bend = pad[:-2*k] + pad[2*k:] - 2 * e
    bend[:k] = -1; bend[n-k:] = np.where(bend[n-k:] > 0, bend[n-k:], -1)
    bend[depth < 0.5 * depth[i]] = -1
    i = int(np.argmax(bend))
    j = np.flatnonzero(bend[i:] >= MODE[1] * bend[i])
    return i + int(j[-1])

DEPTH=.05
MODE=('h',.8)
LEN=400
FAR=1.1
RISE=.08

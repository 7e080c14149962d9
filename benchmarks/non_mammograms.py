"""Pictures that are no screening mammogram: seeded drawings, sample images of other libraries, collages of phantoms.

Each generator takes a random generator and returns a grey picture, float `(H, W)` in [0, 1].
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from pathlib import Path

import cv2
import numpy as np

from vitmodel.config import Size
from vitmodel.phantoms.anatomy import BreastPhantom, render

Draw = Callable[[np.random.Generator], np.ndarray]
SAMPLE_IMAGES = {
    "skimage": ("data", "*"),
    "sklearn": ("datasets/images", "*.jpg"),
    "matplotlib": ("mpl-data/sample_data", "*.[jp][pn]g"),
}
"""Package -> folder and pattern of its sample images."""
WORDS = ("HELLO", "MAMMO", "L MLO", "R CC", "ERROR 404", "vitmodel", "Lorem ipsum dolor sit amet", "0123456789")


def shape_of(rng: np.random.Generator) -> tuple[int, int]:
    """Return a random height and width."""
    return int(rng.integers(256, 640)), int(rng.integers(256, 640))


def coordinates(shape: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Return the row and the column of each pixel, from 0 to 1."""
    y, x = np.mgrid[: shape[0], : shape[1]].astype(np.float32)
    return y / (shape[0] - 1), x / (shape[1] - 1)


def cloud(rng: np.random.Generator, shape: tuple[int, int], beta: float = 3.0) -> np.ndarray:
    """Return noise whose power falls as 1 / f^beta, scaled to [0, 1]."""
    fy, fx = np.meshgrid(np.fft.fftfreq(shape[0]), np.fft.rfftfreq(shape[1]), indexing="ij")
    frequency = np.hypot(fy, fx)
    frequency[0, 0] = 1
    spectrum = np.fft.rfft2(rng.standard_normal(shape)) * frequency ** (-beta / 2)
    return scaled(np.fft.irfft2(spectrum, shape))


def scaled(picture: np.ndarray) -> np.ndarray:
    """Return `picture` stretched to [0, 1]."""
    picture = picture - picture.min()
    return (picture / max(float(picture.max()), 1e-9)).astype(np.float32)


def noisy(rng: np.random.Generator, picture: np.ndarray, most: float = 0.04) -> np.ndarray:
    """Return `picture` with noise of a random level, clipped to [0, 1]."""
    return np.clip(picture + rng.uniform(0, most) * rng.standard_normal(picture.shape), 0, 1)


def ellipse(
    shape: tuple[int, int], centre: tuple[float, float], axes: tuple[float, float], angle: float = 0
) -> np.ndarray:
    """Return a filled ellipse with a soft edge, in fractions of the picture; values in [0, 1]."""
    height, width = shape
    canvas = np.zeros(shape, np.float32)
    size = (max(1, round(axes[1] * width)), max(1, round(axes[0] * height)))
    cv2.ellipse(canvas, (round(centre[1] * width), round(centre[0] * height)), size, angle, 0, 360, 1.0, -1)
    return cv2.GaussianBlur(canvas, None, 1.5)


def letter(
    picture: np.ndarray, text: str, place: tuple[int, int], grey: float, size: float = 0.4, thickness: int = 1
) -> None:
    """Write `text` into `picture`, whose lower left corner is at `place`, x before y."""
    ink = np.zeros(picture.shape, np.uint8)
    cv2.putText(ink, text, place, cv2.FONT_HERSHEY_SIMPLEX, size, 255, thickness)
    picture[ink > 127] = grey


def white_noise(rng: np.random.Generator) -> np.ndarray:
    noise = rng.standard_normal(shape_of(rng)).astype(np.float32)
    sigma = rng.choice([0, 0, 1, 2, 4, 8])
    return scaled(cv2.GaussianBlur(noise, None, float(sigma)) if sigma else noise)


def power_law_noise(rng: np.random.Generator) -> np.ndarray:
    return cloud(rng, shape_of(rng), rng.uniform(1, 3.5))


def disc(rng: np.random.Generator) -> np.ndarray:
    shape = shape_of(rng)
    radius = rng.uniform(0.15, 0.45)
    centre = (rng.uniform(radius, 1 - radius), rng.uniform(radius, 1 - radius))
    body = ellipse(shape, centre, (radius, radius * rng.choice([1, rng.uniform(0.5, 1.1)])))
    texture = cloud(rng, shape) if rng.random() < 0.5 else np.float32(1)
    return noisy(rng, body * (0.3 + 0.6 * texture))


def rectangle(rng: np.random.Generator) -> np.ndarray:
    shape = shape_of(rng)
    canvas = np.zeros(shape, np.float32)
    y0, y1 = np.sort(rng.integers(0, shape[0], 2))
    x0, x1 = np.sort(rng.integers(0, shape[1], 2))
    if rng.random() < 0.5:
        x0 = 0  # touches an edge, as the breast does
    canvas[y0 : max(y1, y0 + 60), x0 : max(x1, x0 + 60)] = 1
    texture = cloud(rng, shape) if rng.random() < 0.5 else np.float32(1)
    return noisy(rng, canvas * (0.3 + 0.6 * texture))


def polygon(rng: np.random.Generator) -> np.ndarray:
    shape = shape_of(rng)
    canvas = np.zeros(shape, np.float32)
    points = rng.uniform(0, 1, (int(rng.integers(3, 9)), 2)) * shape[::-1]
    cv2.fillPoly(canvas, [points.astype(np.int32)], float(rng.uniform(0.4, 1)))
    return noisy(rng, canvas)


def word(rng: np.random.Generator) -> np.ndarray:
    shape = shape_of(rng)
    canvas = np.zeros(shape, np.float32)
    text = str(rng.choice(WORDS))
    size = rng.uniform(1, 6)
    start = (int(rng.integers(0, 60)), int(rng.integers(60, shape[0])))
    letter(canvas, text, start, 1.0, size, int(rng.integers(2, 30)))
    return noisy(rng, canvas if rng.random() < 0.7 else 1 - canvas)


def report_page(rng: np.random.Generator) -> np.ndarray:
    page = np.full((640, int(rng.integers(440, 520))), rng.uniform(0.85, 1), np.float32)
    for line in range(50, 600, int(rng.integers(14, 26))):
        x = int(rng.integers(30, 60))
        while x < page.shape[1] - rng.integers(40, 120):
            length = int(rng.integers(8, 45))
            if rng.random() < 0.8:
                letter(page, "abcdefgh"[: length // 6], (x, line), 0.1)
            x += length + 6
    if rng.random() < 0.4:  # a table or a picture
        cv2.rectangle(page, (60, 300), (300, 500), 0.2, int(rng.choice([1, 2, -1])))
    if rng.random() < 0.4:  # a dark scanner lid around the page
        page = cv2.copyMakeBorder(page, 20, 40, 30, 50, cv2.BORDER_CONSTANT, value=0.05)
    return noisy(rng, page)


def chest_radiograph(rng: np.random.Generator) -> np.ndarray:
    shape = (int(rng.integers(400, 560)), int(rng.integers(400, 560)))
    _, x = coordinates(shape)
    picture = 0.65 + 0.1 * cloud(rng, shape)
    for side in (-1, 1):
        lung = ellipse(
            shape, (0.45, 0.5 + side * rng.uniform(0.18, 0.24)), (rng.uniform(0.28, 0.36), rng.uniform(0.12, 0.17))
        )
        picture -= 0.45 * lung
        for rib in np.linspace(0.12, 0.75, 9):
            arc = np.zeros(shape, np.float32)
            centre = (round((0.5 + side * 0.2) * shape[1]), round((rib + 0.1) * shape[0]))
            cv2.ellipse(arc, centre, (round(0.2 * shape[1]), round(0.1 * shape[0])), side * 15, 180, 360, 1.0, 8)
            picture += 0.12 * cv2.GaussianBlur(arc, None, 2)
    picture += 0.2 * np.exp(-(((x - 0.5) / 0.05) ** 2))
    picture += 0.15 * ellipse(shape, (0.6, 0.55), (0.15, 0.13))
    if rng.random() < 0.7:  # air beside the chest
        body = ellipse(shape, (0.75, 0.5), (0.8, rng.uniform(0.42, 0.5)))
        picture *= body
    return noisy(rng, picture)


def ct_slice(rng: np.random.Generator) -> np.ndarray:
    shape = (512, 512)
    centre = (0.5 + rng.uniform(-0.05, 0.05), 0.5 + rng.uniform(-0.05, 0.05))
    axes = (rng.uniform(0.22, 0.34), rng.uniform(0.32, 0.47))
    body = ellipse(shape, centre, axes)
    inner = ellipse(shape, centre, (axes[0] - 0.03, axes[1] - 0.03))
    picture = 0.35 * body + 0.15 * inner + 0.08 * inner * cloud(rng, shape)
    picture += 0.45 * ellipse(shape, (centre[0] + 0.6 * axes[0], centre[1]), (0.05, 0.05))  # spine
    if rng.random() < 0.5:  # lungs
        for side in (-1, 1):
            picture *= 1 - 0.95 * ellipse(
                shape, (centre[0] - 0.02, centre[1] + side * 0.45 * axes[1]), (0.6 * axes[0], 0.33 * axes[1])
            )
    else:  # organs
        for _ in range(6):
            place = (centre[0] + rng.uniform(-0.5, 0.4) * axes[0], centre[1] + rng.uniform(-0.6, 0.6) * axes[1])
            picture += rng.uniform(0, 0.2) * ellipse(shape, place, (rng.uniform(0.03, 0.1), rng.uniform(0.03, 0.1)))
    if rng.random() < 0.5:  # the table
        cv2.ellipse(picture, (256, 700), (400, 260), 0, 220, 320, 0.5, 3)
    return noisy(rng, picture * body)


def head_slice(rng: np.random.Generator) -> np.ndarray:
    """A slice of the head: skull, brain with folds, ventricles; as CT or as MR."""
    shape = (480, 480)
    axes = (rng.uniform(0.36, 0.46), rng.uniform(0.28, 0.38))
    outer = ellipse(shape, (0.5, 0.5), axes)
    inner = ellipse(shape, (0.5, 0.5), (axes[0] - 0.05, axes[1] - 0.05))
    bone = rng.choice([0.1, 1.0])
    brain = 0.45 + 0.25 * cloud(rng, shape, 2)
    picture = 0.5 * outer + (bone - 0.5) * (outer - inner) + (brain - 0.5) * inner
    for side in (-1, 1):
        picture -= 0.3 * ellipse(shape, (0.48, 0.5 + side * 0.05), (0.1, 0.03), side * 10.0)
    return noisy(rng, picture * outer)


def limb(rng: np.random.Generator) -> np.ndarray:
    """A knee or forearm: bones in a column of soft tissue."""
    shape = (600, int(rng.integers(360, 520)))
    y, x = coordinates(shape)
    bend = 0.5 + 0.05 * np.sin(3 * y + rng.uniform(0, 6))
    width = rng.uniform(0.2, 0.35) * (1 + 0.2 * np.cos(5 * (y - 0.5)))
    soft = np.clip((width - np.abs(x - bend)) * 40, 0, 1)
    picture = soft * (0.3 + 0.1 * cloud(rng, shape))
    for offset in rng.choice([-0.08, 0.08, 0.0], int(rng.integers(1, 3)), replace=False):
        bone = np.clip((0.3 * width - np.abs(x - bend - offset)) * 60, 0, 1) * (np.abs(y - 0.5) > 0.02)
        picture += 0.35 * bone
    return noisy(rng, np.rot90(picture) if rng.random() < 0.3 else picture)


def hand(rng: np.random.Generator) -> np.ndarray:
    shape = (600, 480)
    canvas = np.zeros(shape, np.float32)
    cv2.ellipse(canvas, (240, 400), (110, 130), 0, 0, 360, 0.45, -1)
    cv2.rectangle(canvas, (175, 480), (305, 600), 0.45, -1)
    bones = np.zeros(shape, np.float32)
    for finger, angle in enumerate(np.deg2rad([-55, -18, -4, 9, 24]) + rng.uniform(-0.05, 0.05, 5)):
        length = [200, 300, 330, 310, 250][finger]
        end = (round(240 + length * np.sin(angle)), round(400 - length * np.cos(angle)))
        cv2.line(canvas, (240, 400), end, 0.4, 42)
        cv2.line(bones, (240, 420), end, 0.35, 14)
    return noisy(rng, cv2.GaussianBlur(canvas + bones, None, 2) * (0.8 + 0.4 * cloud(rng, shape)))


def ultrasound(rng: np.random.Generator) -> np.ndarray:
    shape = (480, 640)
    y, x = coordinates(shape)
    if rng.random() < 0.5:  # sector
        radius = np.hypot(y + 0.1, (x - 0.5) * 1.33)
        field = (
            (radius > 0.2) & (radius < 0.95) & (np.abs(np.arctan2((x - 0.5) * 1.33, y + 0.1)) < rng.uniform(0.5, 0.8))
        )
    else:  # linear probe
        field = (np.abs(x - 0.5) < rng.uniform(0.25, 0.4)) & (y > 0.1) & (y < 0.9)
    speckle = np.abs(cv2.GaussianBlur(rng.standard_normal(shape).astype(np.float32), None, 1.2)) * 2.2
    picture = field * np.clip(0.25 + 0.6 * cloud(rng, shape), 0, 1) * speckle
    picture *= 1 - 0.9 * ellipse(shape, (rng.uniform(0.35, 0.6), rng.uniform(0.4, 0.6)), (0.08, 0.06))
    return captioned(np.clip(picture, 0, 1).astype(np.float32), rng)


def mr_screenshot(rng: np.random.Generator) -> np.ndarray:
    """An axial slice of both breasts with the chest below them."""
    shape = (400, 512)
    picture = 0.4 * ellipse(shape, (0.85, 0.5), (0.4, 0.46)) * (1 - 0.9 * ellipse(shape, (0.85, 0.5), (0.28, 0.36)))
    for side in (-1, 1):
        breast = ellipse(shape, (0.42, 0.5 + side * 0.21), (rng.uniform(0.22, 0.32), rng.uniform(0.13, 0.18)))
        picture = np.maximum(picture, breast * (0.35 + 0.4 * cloud(rng, shape)))
    return captioned(noisy(rng, picture).astype(np.float32), rng)


def captioned(picture: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Return `picture` with the captions of a screenshot."""
    picture = np.ascontiguousarray(picture, np.float32)
    for row in range(20, picture.shape[0] - 10, 24):
        if rng.random() < 0.4:
            letter(picture, "Gn 72 Fr 12", (4, row), 0.8)
    return picture


def specimen(rng: np.random.Generator) -> np.ndarray:
    """A radiograph of excised tissue: an irregular blob that touches no edge, with a wire or clips."""
    shape = (512, 480)
    y, x = coordinates(shape)
    angle = np.arctan2(y - 0.5, x - 0.5)
    radius = rng.uniform(0.18, 0.36)
    outline = radius * (1 + sum(rng.uniform(0, 0.15) * np.sin(k * angle + rng.uniform(0, 6)) for k in range(2, 6)))
    blob = np.clip((outline - np.hypot(y - 0.5, x - 0.5)) * 30, 0, 1)
    picture = (blob * (0.25 + 0.6 * cloud(rng, shape))).astype(np.float32)
    cv2.line(picture, (240, 256), (int(rng.integers(0, 480)), 0), 1.0, 2)
    return noisy(rng, picture)


def acr_phantom(rng: np.random.Generator) -> np.ndarray:
    """An accreditation phantom: a block with fibres, specks and masses, at the chest wall or over the field."""
    shape = (600, 480)
    block = np.zeros(shape, np.float32)
    y0, y1 = (0, 600) if rng.random() < 0.3 else (int(rng.integers(40, 150)), int(rng.integers(420, 560)))
    x1 = 480 if rng.random() < 0.3 else int(rng.integers(250, 440))
    block[y0:y1, :x1] = 1
    picture = 0.5 * block
    insert = (int(0.15 * x1), y0 + 40, int(0.85 * x1), y1 - 40)
    cv2.rectangle(picture, insert[:2], insert[2:], 0.56, -1)
    for number in range(16):
        place = (insert[0] + 30 + number % 4 * (x1 // 6), insert[1] + 30 + number // 4 * ((y1 - y0) // 6))
        if number < 6:
            cv2.line(picture, place, (place[0] + 22, place[1] + 22), 0.66, 2)
        elif number < 11:
            for dot in range(6):
                cv2.circle(picture, (place[0] + 8 * (dot % 3), place[1] + 8 * (dot // 3)), 1, 0.8, -1)
        else:
            cv2.circle(picture, place, 14, 0.62, -1)
    return noisy(rng, picture * np.where(block > 0, 1, rng.uniform(0, 0.3)), 0.02)


def cdmam_phantom(rng: np.random.Generator) -> np.ndarray:
    shape = (512, 640)
    plate = np.full(shape, 0.4, np.float32)
    step = int(rng.integers(28, 44))
    for position in range(10, max(shape), step):
        cv2.line(plate, (position, 0), (position, shape[0]), 0.75, 2)
        cv2.line(plate, (0, position), (shape[1], position), 0.75, 2)
    for row in range(10 + step // 2, shape[0], step):
        for column in range(10 + step // 2, shape[1], step):
            cv2.circle(plate, (column, row), int(rng.integers(1, 8)), float(rng.uniform(0.45, 0.7)), -1)
    if rng.random() < 0.5:  # turned by 45 degrees, as in the original plate
        plate = cv2.warpAffine(plate, cv2.getRotationMatrix2D((320, 256), 45, 0.8), (640, 512))
    return noisy(rng, plate)


def flat_field(rng: np.random.Generator) -> np.ndarray:
    """A uniform exposure: heel effect, vignetting and noise."""
    shape = shape_of(rng)
    y, x = coordinates(shape)
    falloff = rng.uniform(0.02, 0.6) * x + rng.uniform(0, 0.3) * (y - 0.5) ** 2
    level = rng.uniform(0.4, 0.95)
    return np.clip(level - falloff + rng.uniform(0.003, 0.05) * rng.standard_normal(shape), 0, 1)


def gradient(rng: np.random.Generator) -> np.ndarray:
    y, x = coordinates(shape_of(rng))
    angle = rng.uniform(0, 6.3)
    linear = np.cos(angle) * x + np.sin(angle) * y
    radial = -np.hypot(y - rng.uniform(0, 1), x - rng.uniform(0, 1))
    return noisy(rng, scaled(linear if rng.random() < 0.5 else radial) ** rng.uniform(0.5, 2))


def stripes(rng: np.random.Generator) -> np.ndarray:
    y, x = coordinates(shape_of(rng))
    count = rng.uniform(3, 40)
    angle = rng.uniform(0, 3.2)
    wave = np.sin(6.28 * count * (np.cos(angle) * x + np.sin(angle) * y))
    kind = rng.integers(3)
    if kind == 0:
        wave = wave * np.sin(6.28 * count * (np.cos(angle) * y - np.sin(angle) * x))
    return noisy(rng, scaled(np.sign(wave) if kind == 1 else wave))


def step_wedge(rng: np.random.Generator) -> np.ndarray:
    _, x = coordinates(shape_of(rng))
    steps = int(rng.integers(4, 16))
    picture = np.floor(x * steps) / steps
    return noisy(rng, picture.T if rng.random() < 0.5 else picture)


def scenery(rng: np.random.Generator) -> np.ndarray:
    """Many overlapping objects (dead leaves), whose statistics are those of photographs (Lee et al. 2001)."""
    shape = shape_of(rng)
    picture = np.full(shape, rng.random(), np.float32)
    for _ in range(int(rng.integers(20, 400))):
        size = int(min(200, 6 / rng.uniform(0.02, 1) ** 1))
        centre = (int(rng.integers(0, shape[1])), int(rng.integers(0, shape[0])))
        cv2.ellipse(
            picture,
            centre,
            (size, int(size * rng.uniform(0.4, 1)) + 1),
            rng.uniform(0, 180),
            0,
            360,
            float(rng.random()),
            -1,
        )
    return noisy(rng, picture)


def night_object(rng: np.random.Generator) -> np.ndarray:
    """A photograph of an object before a dark background, possibly cut by an edge of the picture."""
    shape = shape_of(rng)
    objects = scenery(np.random.default_rng(rng.integers(1 << 30)))
    objects = cv2.resize(objects.astype(np.float32), shape[::-1])
    place = (rng.uniform(0.2, 0.8), rng.uniform(0.2, 0.8))
    body = ellipse(shape, place, (rng.uniform(0.15, 0.4), rng.uniform(0.15, 0.4)), rng.uniform(0, 180))
    return noisy(rng, objects * body + rng.uniform(0, 0.1))


def drawn_face(rng: np.random.Generator) -> np.ndarray:
    shape = (480, 400)
    picture = np.full(shape, rng.uniform(0, 0.9), np.float32)
    skin = rng.uniform(0.4, 0.9)
    head = ellipse(shape, (0.5, 0.5), (rng.uniform(0.3, 0.4), rng.uniform(0.26, 0.34)))
    picture = picture * (1 - head) + head * (skin + 0.1 * cloud(rng, shape))
    for side in (-1, 1):
        picture -= 0.5 * ellipse(shape, (0.42, 0.5 + side * 0.12), (0.025, 0.05))
        picture -= 0.3 * ellipse(shape, (0.37, 0.5 + side * 0.12), (0.01, 0.07))
    picture -= 0.3 * ellipse(shape, (0.68, 0.5), (0.02, 0.1)) + 0.15 * ellipse(shape, (0.55, 0.5), (0.06, 0.02))
    return noisy(rng, np.clip(picture, 0, 1))


def phantom(rng: np.random.Generator, side: str) -> np.ndarray:
    """Return a synthetic mammogram."""
    breast = BreastPhantom(int(rng.integers(1 << 30)), side, "ABCD"[rng.integers(4)], depth_mm=rng.uniform(60, 110))
    return render(breast, "CC" if rng.random() < 0.5 else "MLO", Size(384, 312)).image


def collage(rng: np.random.Generator) -> np.ndarray:
    """Four or two views in one picture, back to back, facing each other or in a row."""
    first, second = rng.choice(["LR", "RL", "RL", "RR"], 1)[0]
    rows = [np.hstack([phantom(rng, first), phantom(rng, second)]) for _ in range(rng.integers(1, 3))]
    if rng.random() < 0.3:
        gap = np.full((rows[0].shape[0], 10), rng.choice([0.0, 0.5]), np.float32)
        rows = [np.hstack([row[:, : row.shape[1] // 2], gap, row[:, row.shape[1] // 2 :]]) for row in rows]
    return captioned(np.vstack(rows), rng) if rng.random() < 0.5 else np.vstack(rows)


def turned_mammogram(rng: np.random.Generator) -> np.ndarray:
    """A synthetic mammogram turned by 90 degrees."""
    return np.rot90(phantom(rng, "LR"[rng.integers(2)]), int(rng.choice([1, 3])))


GENERATORS: dict[str, Draw] = {
    "white or blurred noise": white_noise,
    "power-law noise": power_law_noise,
    "disc or ellipse": disc,
    "rectangle": rectangle,
    "polygon": polygon,
    "words": word,
    "scanned page": report_page,
    "chest radiograph": chest_radiograph,
    "CT slice of the trunk": ct_slice,
    "CT or MR slice of the head": head_slice,
    "radiograph of a limb": limb,
    "radiograph of a hand": hand,
    "ultrasound screenshot": ultrasound,
    "MR screenshot": mr_screenshot,
    "specimen radiograph": specimen,
    "ACR phantom": acr_phantom,
    "CDMAM phantom": cdmam_phantom,
    "flat field": flat_field,
    "gradient": gradient,
    "stripes": stripes,
    "step wedge": step_wedge,
    "scenery": scenery,
    "object before a dark background": night_object,
    "drawn face": drawn_face,
    "two or four views in one picture": collage,
    "mammogram turned by 90 degrees": turned_mammogram,
}
"""Kind of picture -> its generator."""


def sample_images() -> Iterator[tuple[str, np.ndarray]]:
    """Yield name and grey picture of the sample images of those libraries that are installed."""
    for package, (folder, pattern) in SAMPLE_IMAGES.items():
        spec = importlib.util.find_spec(package)
        root = Path(str(spec.origin)).parent / folder if spec else Path("/nonexistent")
        for path in sorted(root.glob(pattern)):
            picture = cv2.imread(str(path), cv2.IMREAD_GRAYSCALE)
            if path.name == "lfw_subset.npy":
                for number, face in enumerate(np.load(path)[:100]):  # the rest shows no faces
                    yield f"face {number}", np.clip(cv2.resize(face, (200, 200), interpolation=cv2.INTER_CUBIC), 0, 1)
            elif picture is not None:
                yield f"{package} {path.name}", picture / np.float32(255)


def cut_out(rng: np.random.Generator, picture: np.ndarray) -> np.ndarray:
    """Return a random part of a picture, as it is, mirrored or inverted."""
    height, width = (int(side * rng.uniform(0.4, 1)) for side in picture.shape)
    y = int(rng.integers(0, picture.shape[0] - height + 1))
    x = int(rng.integers(0, picture.shape[1] - width + 1))
    part = picture[y : y + height, x : x + width]
    part = part[:, ::-1] if rng.random() < 0.5 else part
    return np.ascontiguousarray(1 - part if rng.random() < 0.2 else part)

"""Tests of pictures: formats, grey range, orientation, transparency, and the same crop from every container."""

from __future__ import annotations

import io
import json
import struct
from dataclasses import replace
from pathlib import Path

import cv2
import imagecodecs
import numpy as np
import pytest
from PIL import Image, ImageOps, TiffImagePlugin
from test_dicom import write_dicom

from vitmodel.commands.etl import crop_release
from vitmodel.config import ETLConfig, Preprocessing, Size
from vitmodel.data.grey_range import add_shared_ranges
from vitmodel.data.manifest import read_manifest
from vitmodel.errors import ImageRefusedError, UsageError
from vitmodel.phantoms.anatomy import BreastPhantom, render
from vitmodel.pixels.open import open_image
from vitmodel.pixels.picture_range import common_bits, significant_bits
from vitmodel.pixels.preprocessing import preprocess
from vitmodel.pixels.raster import turn_upright
from vitmodel.releases.inputs import read_inputs

CONFIG = Preprocessing(size=Size(128, 64), bits=16)
RAMP = np.linspace(0, 4095, 40 * 52).round().astype("u2").reshape(40, 52)


@pytest.fixture(scope="module")
def breast() -> np.ndarray:
    """Return a mammogram, float `(H, W)` in [0, 1], with a bright marker so that its values reach 1."""
    image = render(BreastPhantom(seed=1, laterality="L", density="C"), "MLO", Size(256, 208)).image.copy()
    image /= image.max()
    return image


def levels(image: np.ndarray, bits: int) -> np.ndarray:
    """Return an image in [0, 1] as whole numbers of `bits` bits."""
    return np.rint(image * (2**bits - 1)).astype("u1" if bits == 8 else "u2")


def write(path: Path, pixels: np.ndarray) -> Path:
    """Write a picture in the format of its suffix and return its path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    assert cv2.imwrite(str(path), pixels)
    return path


def grey_of(path: Path, picture_range: str = "auto") -> np.ndarray:
    """Return the grey values of a picture."""
    file = open_image(path, picture_range=picture_range)
    return file.to_grey(file.read_stored())


def refusal(path: Path) -> ImageRefusedError:
    """Return the error with which a file is refused."""
    with pytest.raises(ImageRefusedError) as error:
        preprocess(path, CONFIG)
    return error.value


# Grey range


def test_dicom_and_its_exports_give_the_same_crop(breast: np.ndarray, tmp_path: Path) -> None:
    stored = levels(breast, 12)
    window = {"WindowCenter": 2048, "WindowWidth": 4096}
    dicom = preprocess(write_dicom(tmp_path / "a.dcm", stored, **window), CONFIG)
    exports = {
        "full range": np.rint(stored / 4095 * 65535).astype("u2"),
        "12 of 16 bits": stored,
        "8 bits": np.rint(stored / 4095 * 255).astype("u1"),
    }
    for name, pixels in exports.items():
        for suffix in ("png", "tif"):
            crop = preprocess(write(tmp_path / f"a.{suffix}", pixels), CONFIG)
            assert crop.geometry == dicom.geometry, name
            difference = np.abs(crop.crop.astype(float) - dicom.crop)[(crop.crop > 0) & (dicom.crop > 0)]
            assert difference.max() <= (65535 / 255 if pixels.dtype == np.uint8 else 65535 / 4095), name
            assert crop.warnings == dicom.warnings, name


@pytest.mark.parametrize(
    ("maximum", "bits"), [(0, 8), (255, 8), (256, 10), (1023, 10), (1024, 12), (4095, 12), (4096, 14), (65535, 16)]
)
def test_the_significant_bits_are_the_fewest_that_hold_the_maximum(maximum: int, bits: int, tmp_path: Path) -> None:
    assert significant_bits(maximum) == bits
    pixels = np.zeros((40, 52), "u2")
    pixels[3, 4] = maximum
    file = open_image(write(tmp_path / "a.png", pixels))
    assert file.to_grey(file.read_stored()).max() == pytest.approx(maximum / (2**bits - 1))
    assert file.header.voi == f"0:{2**bits - 1}"


@pytest.mark.parametrize(
    ("picture_range", "low", "high"), [("full", 0, 65535), ("1000:3000", 1000, 3000), ("percentile", 4, 4091)]
)
def test_the_range_can_be_set(picture_range: str, low: float, high: float, tmp_path: Path) -> None:
    grey = grey_of(write(tmp_path / "a.png", RAMP), picture_range)
    np.testing.assert_allclose(grey, np.clip((RAMP.astype(float) - low) / (high - low), 0, 1), atol=2e-3)


def test_an_impossible_range_is_a_usage_error() -> None:
    for text in ("4095", "10:10", "20:10", "all", "a:b"):
        with pytest.raises(UsageError, match="picture_range"):
            Preprocessing(picture_range=text)


def test_the_default_range_does_not_change_the_stored_preprocessing() -> None:
    """Crops and packages of earlier versions have no such field; their crops are the same where all bits are used."""
    assert "picture_range" not in json.loads(Preprocessing().to_json())
    assert Preprocessing.from_json(Preprocessing().to_json()).picture_range == "auto"
    full = Preprocessing(picture_range="full")
    assert Preprocessing.from_json(full.to_json()) == full


@pytest.mark.parametrize(
    ("own", "shared"),
    [
        ([12, 10, 12], [12, 12, 12]),
        ([12, 10, 10, 10], [12, 12, 12, 12]),
        ([16, 12, 12, 12, 10], [16, 12, 12, 12, 12]),
        ([16, 10, 12, 14, 12], [16, 10, 12, 14, 12]),
        ([8], [8]),
        ([], []),
    ],
)
def test_pictures_of_one_release_share_their_bits_unless_they_come_from_several_sources(
    own: list[int], shared: list[int]
) -> None:
    assert common_bits(own) == shared


def test_a_dark_picture_keeps_the_range_of_its_release(breast: np.ndarray, tmp_path: Path) -> None:
    """A picture of 12 bits whose values happen to fit into 10 is not stretched, neither by ETL nor by prediction."""
    release = tmp_path / "release"
    write(release / "a.png", levels(breast, 12))
    write(release / "b.png", levels(breast * 0.24, 12))
    config = ETLConfig(source=release, out=tmp_path / "crops", size=Size(128, 64), bits=16, jobs=1)
    table = crop_release(config, lambda message: None).set_index("image_id")
    assert table["voi"].tolist() == ["0:4095", "0:4095"]
    assert table.loc["b", "reason"] == "low_contrast"
    bright, dark = (cv2.imread(path, cv2.IMREAD_UNCHANGED) for path in table["path"])
    assert np.median(dark[dark > 1]) == pytest.approx(0.24 * np.median(bright[bright > 1]), rel=0.05)
    inputs = read_inputs([str(release)], "auto")
    assert add_shared_ranges(inputs, config.preprocessing, jobs=1)["voi"].tolist() == ["0:4095", "0:4095"]
    alone = read_inputs([str(release / "b.png")], "auto")
    assert add_shared_ranges(alone, config.preprocessing, jobs=1)["voi"].isna().all()


def test_a_new_picture_that_changes_the_range_of_a_release_renews_the_crops(
    breast: np.ndarray, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    release = tmp_path / "release"
    write(release / "a.png", levels(breast, 10))
    config = ETLConfig(source=release, out=tmp_path / "crops", size=Size(128, 64), jobs=1)
    crop_release(config, lambda message: None)
    write(release / "b.png", levels(breast, 12))
    crop_release(config, lambda message: None)
    manifest = read_manifest(tmp_path / "crops" / "manifest.csv")
    assert manifest["voi"].tolist() == ["0:4095", "0:4095"]
    monkeypatch.setattr("vitmodel.data.grey_range.measure_bits", lambda path: pytest.fail("measured again"))
    crop_release(config, lambda message: None)


# Low contrast


def test_a_window_beside_the_values_is_replaced_and_warned(breast: np.ndarray, tmp_path: Path) -> None:
    stored = levels(breast, 12)
    right = preprocess(write_dicom(tmp_path / "a.dcm", stored, WindowCenter=2048, WindowWidth=4096), CONFIG)
    assert not right.warnings
    for center, width in ((127, 255), (32768, 65535), (30000, 1000), (0, 1), (1, 1)):
        wrong = preprocess(write_dicom(tmp_path / "a.dcm", stored, WindowCenter=center, WindowWidth=width), CONFIG)
        assert [warning.code for warning in wrong.warnings] == ["low_contrast"]
        assert f"{center:g}/{width:g}" in wrong.warnings[0].message
        inside = (wrong.crop > 0) & (right.crop > 0)
        assert np.corrcoef(wrong.crop[inside], right.crop[inside])[0, 1] > 0.99


def test_a_dark_picture_is_warned_and_an_empty_one_stays_blank(breast: np.ndarray, tmp_path: Path) -> None:
    dark = preprocess(write(tmp_path / "a.png", levels(breast * 0.1, 8)), CONFIG)
    assert [warning.code for warning in dark.warnings] == ["low_contrast"]
    noise = np.random.default_rng(0).integers(0, 3, (256, 208)).astype("u2")
    noise[5, 5] = 65535
    assert refusal(write(tmp_path / "b.png", noise)).code == "blank"


def test_a_mask_is_refused(breast: np.ndarray, tmp_path: Path) -> None:
    for high in (1, 255):
        assert refusal(write(tmp_path / "a.png", np.where(breast > 0.05, high, 0).astype("u1"))).code == "mask"


# Formats


@pytest.mark.parametrize("orientation", range(1, 9))
def test_the_orientation_is_applied_as_pillow_does(orientation: int, tmp_path: Path) -> None:
    image = Image.fromarray((RAMP // 16).astype("u1"))
    exif = Image.Exif()
    exif[0x112] = orientation
    expected = np.asarray(ImageOps.exif_transpose(_reopened(image, exif)))
    np.testing.assert_array_equal(turn_upright(np.asarray(image), orientation), expected)
    image.save(tmp_path / "a.png", exif=exif)
    image.save(tmp_path / "a.jpg", exif=exif, quality=95)
    image.save(tmp_path / "a.tif", tiffinfo={274: orientation})
    for name in ("a.png", "a.jpg", "a.tif"):
        file = open_image(tmp_path / name)
        assert (file.header.rows, file.header.columns) == expected.shape
        assert np.abs(file.read_stored().astype(int) - expected).max() <= (6 if name == "a.jpg" else 0)
        turned = any("orientation" in warning.message for warning in file.header.warnings)
        assert turned == (orientation != 1)


def _reopened(image: Image.Image, exif: Image.Exif) -> Image.Image:
    """Return the image as it is read from a PNG file with EXIF data."""
    content = io.BytesIO()
    image.save(content, "PNG", exif=exif)
    return Image.open(content)


@pytest.mark.parametrize("compression", [None, "tiff_lzw", "tiff_adobe_deflate", "packbits", "jpeg"])
def test_tiff_is_read_in_every_compression(compression: str | None, tmp_path: Path) -> None:
    pixels = (RAMP // 16).astype("u1")
    Image.fromarray(pixels).save(tmp_path / "a.tif", compression=compression)
    assert np.abs(open_image(tmp_path / "a.tif").read_stored().astype(int) - pixels).max() <= (
        4 if compression == "jpeg" else 0
    )


def test_variants_of_tiff_are_read(tmp_path: Path) -> None:
    path = tmp_path / "a.tif"
    Image.fromarray(RAMP).save(path, big_tiff=True)
    np.testing.assert_array_equal(open_image(path).read_stored(), RAMP)
    Image.fromarray((RAMP // 4095).astype("f4") + RAMP.astype("f4") / 8190).save(path)
    np.testing.assert_allclose(grey_of(path).min(), 0)
    Image.fromarray(RAMP.astype("i4")).save(path)
    np.testing.assert_allclose(grey_of(path), RAMP / 4095, atol=1e-6)
    Image.fromarray(RAMP.astype("i4") - 2000).save(path)
    np.testing.assert_allclose(grey_of(path), RAMP / 4095, atol=1e-6)
    content = io.BytesIO()
    Image.fromarray(4095 - RAMP).save(content, "TIFF")
    black_is_zero, white_is_zero = (struct.pack("<HHII", 262, 3, 1, value) for value in (1, 0))
    path.write_bytes(content.getvalue().replace(black_is_zero, white_is_zero))
    np.testing.assert_allclose(grey_of(path), RAMP / 4095, atol=1e-6)


def test_a_preview_page_is_skipped_and_a_second_picture_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.tif"
    picture = Image.fromarray((RAMP // 16).astype("u1"))
    preview = picture.resize((13, 10))
    for pages in ([(picture, {}), (preview, {254: 1})], [(preview, {}), (picture, {})]):
        with TiffImagePlugin.AppendingTiffWriter(str(path), True) as file:
            for page, tags in pages:
                page.save(file, "TIFF", tiffinfo=tags)
                file.newFrame()
        np.testing.assert_array_equal(open_image(path).read_stored(), np.asarray(picture))
    picture.save(path, save_all=True, append_images=[picture])
    assert refusal(path).code == "multi_frame"


def test_a_picture_without_pixels_is_refused(tmp_path: Path) -> None:
    Image.new("L", (8, 8)).save(tmp_path / "a.bmp")
    content = bytearray((tmp_path / "a.bmp").read_bytes())
    content[18:26] = bytes(8)  # width and height
    (tmp_path / "a.bmp").write_bytes(content)
    with pytest.raises(ImageRefusedError, match="the header states 0 x 0 pixels"):
        open_image(tmp_path / "a.bmp")


def test_a_tiff_without_its_last_strips_is_called_cut_short(tmp_path: Path) -> None:
    path = tmp_path / "a.tif"
    content = io.BytesIO()
    Image.fromarray(RAMP).save(content, "TIFF")
    path.write_bytes(content.getvalue()[:-50])
    assert "cut short" in refusal(path).message


@pytest.mark.parametrize("bits", [8, 16])
def test_hidden_pixels_under_transparency_are_air(bits: int, tmp_path: Path) -> None:
    top = 2**bits - 1
    grey = np.full((40, 52), top // 2, f"u{bits // 8}")
    alpha = np.full_like(grey, top)
    alpha[:, 30:] = 0
    stored = open_image(write(tmp_path / "a.png", cv2.merge([grey, grey, grey, alpha]))).read_stored()
    assert (stored[:, :30] == top // 2).all()
    assert not stored[:, 30:].any()


def test_a_grey_palette_is_read(tmp_path: Path) -> None:
    pixels = (RAMP // 16).astype("u1")
    image = Image.fromarray(255 - pixels, "P")
    image.putpalette(np.repeat(np.arange(255, -1, -1, dtype="u1"), 3).tobytes())
    for name in ("a.png", "a.bmp", "a.tif"):
        image.save(tmp_path / name)
        np.testing.assert_array_equal(open_image(tmp_path / name).read_stored(), pixels)


@pytest.mark.parametrize("bits", [12, 16])
def test_a_jpeg_of_more_than_8_bits_is_read(bits: int, tmp_path: Path) -> None:
    pixels = RAMP if bits == 12 else RAMP * np.uint16(16)
    (tmp_path / "a.jpg").write_bytes(imagecodecs.jpeg8_encode(pixels, lossless=True, bitspersample=bits))
    np.testing.assert_array_equal(open_image(tmp_path / "a.jpg").read_stored(), pixels)


@pytest.mark.parametrize(
    ("content", "name"),
    [
        (b"\x93NUMPY\x01\0", "NumPy"),
        ((348).to_bytes(4, "little") + bytes(344), "NIfTI"),
        (b"ObjectType = Image\nNDims = 2\n", "MetaImage"),
        (b"GIF89a", "GIF"),
        (b"RIFF\0\0\0\0WEBP", "WebP"),
        (b"P6\n1 1\n255\n\0\0\0", "PPM"),
    ],
)
def test_another_format_is_refused_by_its_name_with_what_to_convert_it_to(
    content: bytes, name: str, tmp_path: Path
) -> None:
    (tmp_path / "a").write_bytes(content)
    error = refusal(tmp_path / "a")
    assert error.code == "not_an_image"
    assert name in error.message
    assert "save it as" in error.message


def test_crops_of_both_bit_depths_are_the_same(breast: np.ndarray, tmp_path: Path) -> None:
    path = write(tmp_path / "a.png", levels(breast, 12))
    eight = preprocess(path, replace(CONFIG, bits=8)).crop
    assert eight.max() > 200
    assert np.abs(preprocess(path, CONFIG).crop / 257 - eight).max() <= 1

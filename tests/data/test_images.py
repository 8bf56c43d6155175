"""Decoding every kind of file to RGB, and the views cut from it."""

import io
import pickle
import struct
import zlib

import numpy as np
import pytest
import tiny
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from unified_mm.data import images


def photo(width=160, height=120):
    """A smooth picture whose red grows to the right and green downwards."""
    y, x = np.mgrid[:height, :width]
    blue = 128 + 60 * np.sin(x / 30) * np.cos(y / 30)
    return np.stack([x * 255 / width, y * 255 / height, blue], -1).astype(np.uint8)


def coded(picture, format="JPEG", **options):
    out = io.BytesIO()
    image = picture if isinstance(picture, Image.Image) else Image.fromarray(picture)
    image.save(out, format, **options)
    return out.getvalue()


def png(rows, depth, colour, width, height, key=b""):
    """A PNG written by hand (W3C PNG, section 5): what Pillow itself does not write."""

    def chunk(kind, body):
        return (
            struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        )

    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    data = zlib.compress(b"".join(b"\0" + row for row in rows))
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + (chunk(b"tRNS", key) if key else b"")
        + chunk(b"IDAT", data)
        + chunk(b"IEND", b"")
    )


def difference(a, b):
    return np.abs(a.astype(float) - b.astype(float)).mean()


def test_lossless_pixels_come_back_exactly(tmp_path):
    path = tmp_path / "a.png"
    path.write_bytes(coded(photo(), "PNG"))
    for source in (path, str(path), path.read_bytes()):
        np.testing.assert_array_equal(images.decode(source), photo())


@pytest.mark.parametrize("backend", ["pillow", "opencv"])
@pytest.mark.parametrize(("at_least", "reduction"), [(None, 1), (61, 1), (60, 2), (30, 4), (4, 8)])
def test_reduced_decoding_keeps_the_short_side(backend, at_least, reduction):
    if backend == "opencv":
        pytest.importorskip("cv2")
    got = images.decode(coded(photo(), quality=95), at_least, backend=backend)
    assert got.shape == (120 // reduction, 160 // reduction, 3)
    cells = photo().reshape(120 // reduction, reduction, 160 // reduction, reduction, 3)
    assert difference(got, cells.mean((1, 3))) < 2.5


def test_opencv_and_pillow_agree_on_everything_but_plain_jpegs():
    pytest.importorskip("cv2")
    for picture in (coded(photo(), "PNG"), coded(Image.fromarray(photo()).convert("CMYK"))):
        np.testing.assert_array_equal(
            images.decode(picture, backend="opencv"), images.decode(picture)
        )


def test_backends_resolve_or_are_refused(monkeypatch):
    assert images.resolve_backend("pillow") == "pillow"
    with pytest.raises(ValueError, match="unknown image backend 'cv'"):
        images.resolve_backend("cv")
    with pytest.raises(ValueError, match="unknown image backend 'auto': resolve_backend"):
        images.decode(coded(photo()), backend="auto")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    assert images.resolve_backend("auto") == "opencv"
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert images.resolve_backend("auto") == "pillow"
    with pytest.raises(ImportError, match="pip install opencv-python-headless"):
        images.resolve_backend("opencv")


def test_greyscale_palette_and_cmyk_become_rgb():
    grey = photo()[:, :, 2]
    want = np.repeat(grey[:, :, None], 3, axis=2)
    np.testing.assert_array_equal(images.decode(coded(grey, "PNG")), want)
    palette = Image.fromarray(photo()).quantize(64)
    np.testing.assert_array_equal(
        images.decode(coded(palette, "PNG")), np.asarray(palette.convert("RGB"))
    )
    cmyk = coded(Image.fromarray(photo()).convert("CMYK"), quality=98)
    assert difference(images.decode(cmyk), photo()) < 2


@pytest.mark.parametrize("colour", [0, 2])
def test_sixteen_bits_are_scaled_to_eight(colour):
    channels = 1 if colour == 0 else 3
    values = np.array([[0, 257, 32768], [60000, 65534, 65535]])
    rows = [np.repeat(row, channels).astype(">u2").tobytes() for row in values]
    got = images.decode(png(rows, 16, colour, 3, 2))
    assert np.abs(got - (values / 65535 * 255)[:, :, None]).max() <= 1
    assert got[0, 0].tolist() == [0, 0, 0] and got[1, 2].tolist() == [255, 255, 255]


def test_transparency_lies_over_white():
    alpha = np.tile(np.array([0, 51, 255], np.uint8)[None, :, None], (4, 1, 1))
    rgba = np.concatenate([np.full((4, 3, 3), 100, np.uint8), alpha], axis=2)
    got = images.decode(coded(rgba, "PNG"))
    np.testing.assert_allclose(got[0, :, 0], [255, 100 * 0.2 + 255 * 0.8, 100], atol=1)
    palette = Image.new("P", (2, 1))
    palette.putpalette([10, 20, 30, 200, 0, 0])
    palette.putpixel((1, 0), 1)
    got = images.decode(coded(palette, "PNG", transparency=0))
    assert got.tolist() == [[[255, 255, 255], [200, 0, 0]]]


@pytest.mark.parametrize(
    ("depth", "row", "key", "kept"),
    [
        (1, bytes([0b10000000]), 1, 0),
        (2, bytes([0b01100000]), 1, 170),
        (4, bytes([0x3C]), 3, 204),
        (8, bytes([30, 200]), 30, 200),
        (16, struct.pack(">HH", 300, 60000), 300, 233),
    ],
)
def test_a_transparent_grey_is_white_at_every_depth(depth, row, key, kept):
    got = images.decode(png([row], depth, 0, 2, 1, struct.pack(">H", key)))
    assert got[0].tolist() == [[255] * 3, [kept] * 3]


def test_a_transparent_colour_is_white_or_refused():
    eight = png([bytes([9, 8, 7, 200, 1, 1])], 8, 2, 2, 1, struct.pack(">HHH", 9, 8, 7))
    assert images.decode(eight)[0].tolist() == [[255] * 3, [200, 1, 1]]
    # Pillow keeps the high bytes alone, where two colours may be one.
    row, key = struct.pack(">6H", 300, 400, 501, 60000, 1, 1), struct.pack(">HHH", 300, 400, 500)
    with pytest.raises(images.ImageError, match="transparent colour of 16 bits"):
        images.decode(png([row], 16, 2, 2, 1, key))


def test_pixels_of_32_bits_are_refused():
    grey = np.array([[0, 1000, 65535]])
    for format, kind in (("TIFF", np.int32), ("TIFF", np.uint16), ("PPM", np.uint16)):
        data = coded(Image.fromarray(grey.astype(kind)), format)
        if kind is np.int32:
            with pytest.raises(images.ImageError, match="pixels of 32 bits have no defined white"):
                images.decode(data)
        else:
            assert images.decode(data)[0, :, 0].tolist() == [0, 4, 255]
    with pytest.raises(images.ImageError, match="32 bits"):
        images.from_pil(Image.fromarray(np.array([[-1, 70000]], np.int32)))


@pytest.mark.parametrize("backend", ["pillow", "opencv"])
def test_pictures_are_turned_upright(backend):
    if backend == "opencv":
        pytest.importorskip("cv2")
    exif = Image.Exif()
    exif[274] = 6  # the picture's top is the right side of what is stored
    got = images.decode(coded(photo(), exif=exif, quality=95), backend=backend)
    assert got.shape == (160, 120, 3)
    assert difference(got, np.rot90(photo(), -1)) < 2.5


def damaged():
    jpeg = coded(photo(), quality=90)
    return {
        "truncated": jpeg[: len(jpeg) // 2],
        "header alone": jpeg[:30],
        "empty": b"",
        "text": b"<html>404</html>",
        "png cut": coded(photo(), "PNG")[:-5000],
        "float": coded(Image.new("F", (4, 4)), "TIFF"),
    }


@pytest.mark.parametrize("kind", damaged())
def test_damaged_files_are_named(kind, tmp_path):
    path = tmp_path / "broken.jpg"
    path.write_bytes(damaged()[kind])
    for read in (images.decode, images.check):
        with pytest.raises(images.ImageError, match=r"broken\.jpg cannot be decoded: \w+"):
            read(path)
    with pytest.raises(ValueError, match=r"an image of \d+ bytes cannot"):
        images.decode(damaged()[kind])


def test_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"gone\.jpg"):
        images.decode(tmp_path / "gone.jpg")


def test_bombs_are_refused_before_they_are_decoded():
    side = 9000  # 81 million pixels in a header, none in the file
    with pytest.raises(images.ImageError, match="9000 x 9000 pixels are over the limit"):
        images.decode(png([], 8, 2, side, side))


def test_errors_survive_the_way_between_processes():
    error = pickle.loads(pickle.dumps(images.ImageError("a.jpg", "the file is empty")))
    assert str(error) == "a.jpg cannot be decoded: the file is empty"


def test_check_says_what_is_converted(tmp_path):
    exif = Image.Exif()
    exif[274] = 3
    picture = Image.fromarray(photo())
    files = {
        "plain.jpg": (coded(photo()), None),
        "plain.JPEG": (coded(photo()), None),
        "plain.png": (coded(photo(), "PNG"), None),
        "named.jpg": (coded(photo(), "PNG"), "PNG named .jpg"),
        "grey.jpg": (coded(picture.convert("L")), "greyscale"),
        "cmyk.jpg": (coded(picture.convert("CMYK")), "CMYK"),
        "palette.png": (coded(picture.quantize(8), "PNG"), "palette"),
        "alpha.png": (coded(picture.convert("RGBA"), "PNG"), "transparency"),
        "deep.png": (png([bytes(2)], 16, 0, 1, 1), "16-bit"),
        "deep_rgb.png": (png([bytes(6)], 16, 2, 1, 1), "16-bit"),
        "turned.jpg": (coded(photo(), exif=exif), "turned by EXIF"),
    }
    for name, (data, _) in files.items():
        (tmp_path / name).write_bytes(data)
    got = {name: images.check(tmp_path / name) for name in files}
    assert got == {name: conversion for name, (_, conversion) in files.items()}


def test_evaluation_view_is_the_central_square():
    view = images.evaluation_view(photo(160, 120), 120)
    np.testing.assert_array_equal(view, photo(160, 120)[:, 20:140])
    half = images.evaluation_view(photo(160, 120), 60)
    cells = photo(160, 120)[:, 20:140].reshape(60, 2, 60, 2, 3).mean((1, 3))
    assert difference(half, cells) < 1


sides = st.integers(1, 70)


@settings(max_examples=60, deadline=None)
@given(sides, sides, st.integers(1, 40), st.integers(0, 2**32), st.floats(0.05, 1))
def test_views_of_any_picture_have_their_size(width, height, size, seed, smallest):
    picture = np.full((height, width, 3), 77, np.uint8)
    rng = np.random.default_rng(seed)
    view = images.training_view(picture, size, rng, scale=(smallest, 1.0), mirror=True)
    for each in (view, images.evaluation_view(picture, size)):
        assert each.shape == (size, size, 3) and (each == 77).all()


def test_views_do_not_alias():
    board = np.indices((64, 64)).sum(0) % 2 * 255  # finer than the view: mean grey is right
    picture = np.repeat(board[:, :, None], 3, axis=2).astype(np.uint8)
    training = images.training_view(picture, 16, np.random.default_rng(0))
    for view in (images.evaluation_view(picture, 16), training):
        assert np.abs(view[2:-2, 2:-2].astype(int) - 127).max() < 20


def test_training_views_lie_in_the_picture_with_the_scale_asked_for():
    # Pixels that hold their own coordinates: a view's corners tell where its crop lay.
    picture = photo(255, 255)
    areas = []
    for seed in range(200):
        rng = np.random.default_rng(seed)
        view = images.training_view(picture, 64, rng, scale=(0.3, 0.6)).astype(float)
        width = (view[:, -1, 0] - view[:, 0, 0]).mean() * 64 / 63
        height = (view[-1, :, 1] - view[0, :, 1]).mean() * 64 / 63
        assert 0.7 < width / height < 1.4
        areas.append(width * height / 255**2)
    assert 0.27 < min(areas) < 0.33 and 0.57 < max(areas) < 0.63


def test_mirror_flips_half_of_the_views_and_changes_no_crop():
    picture = photo()
    flipped = 0
    for seed in range(200):
        plain, mirrored = (
            images.training_view(picture, 16, np.random.default_rng(seed), mirror=mirror)
            for mirror in (False, True)
        )
        assert plain[0, 0, 0] < plain[0, -1, 0]
        if mirrored[0, 0, 0] > mirrored[0, -1, 0]:
            flipped += 1
            mirrored = mirrored[:, ::-1]
        np.testing.assert_array_equal(plain, mirrored)
    assert 70 < flipped < 130


def test_least_side_keeps_views_from_being_enlarged():
    side = images.least_side(64, (0.5, 1.0))
    assert side**2 * 0.5 >= 64**2 > (side - 1) ** 2 * 0.5


def test_least_side_knows_the_shapes_of_crops():
    """Of a square picture the widest and the tallest crop keep their short side."""
    for scale, ratio in (((0.5, 1.0), (0.75, 4 / 3)), ((0.1, 0.9), (0.5, 1.1))):
        side = images.least_side(64, scale, ratio)
        for width_to_height in ratio:
            area = side**2 * scale[0]
            width, height = (area * width_to_height) ** 0.5, (area / width_to_height) ** 0.5
            assert min(width, height) >= 64 - 1e-6
        assert side > images.least_side(64, scale)


@pytest.mark.parametrize("sharp", [False, True])
def test_training_decodes_for_the_shapes_of_crops_where_that_is_asked_for(sharp, monkeypatch):
    asked = []

    def decode(source, at_least, *, backend):
        asked.append(at_least)
        return np.zeros((at_least, at_least, 3), np.uint8)

    monkeypatch.setattr(images, "decode", decode)
    image = tiny.task(data__sharp_crops=sharp).modalities["image"]
    image.view("a.jpg", np.random.default_rng(0), mirrorable=False)
    image.view("a.jpg", None, mirrorable=False)
    shapes = (image.crop_ratio,) if sharp else ()
    assert asked == [images.least_side(image.size, image.crop_scale, *shapes), image.size]
    assert asked[0] == (27 if sharp else 23)


def test_a_squashed_view_is_of_the_whole_picture():
    view = images.evaluation_view(photo(160, 120), 40, fit="squash")
    cells = photo(160, 120).reshape(40, 3, 40, 4, 3).mean((1, 3))
    assert difference(view, cells) < 2


@pytest.mark.parametrize("resampling", images.RESAMPLINGS)
@pytest.mark.parametrize("shape", [(160, 120), (41, 97), (33, 32), (300, 31)])
def test_a_crop_of_the_resized_picture_is_just_that(shape, resampling):
    picture, size = photo(*shape), 24
    height, width = picture.shape[:2]
    sides = [int(size * side / min(height, width)) for side in (width, height)]
    kind = images.RESAMPLINGS[resampling]
    resized = np.asarray(Image.fromarray(picture).resize(sides, kind))
    top, left = (sides[1] - size) // 2, (sides[0] - size) // 2
    want = resized[top : top + size, left : left + size]
    view = images.evaluation_view(picture, size, resampling=resampling, fit="crop_resized")
    assert np.abs(view.astype(int) - want).max() <= 1

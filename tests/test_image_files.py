"""Image files: which are found in a folder, and how they are read."""

from __future__ import annotations

import io
import struct
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageCms

from cat_rs.evaluation import load_pictures
from cat_rs.image_files import IMAGE_SUFFIXES, ImageFileError, image_files, read_image, to_rgb
from tests.conftest import draw_picture


def test_files_come_in_the_order_of_their_names_whatever_the_case_of_their_suffix(tmp_path: Path) -> None:
    for name in ("b.PNG", "a.gif", "c.txt"):
        (tmp_path / name).touch()
    assert [path.name for path in image_files(tmp_path)] == ["a.gif", "b.PNG"]


@pytest.mark.parametrize("suffix", IMAGE_SUFFIXES)
def test_every_suffix_is_read_as_rgb(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a{suffix}"
    draw_picture(path, "red")
    image = read_image(path)
    assert image.mode == "RGB"
    assert image_files(tmp_path) == [path]


def test_transparent_parts_lie_on_white(tmp_path: Path) -> None:
    Image.new("RGBA", (4, 4), (255, 0, 0, 0)).save(tmp_path / "a.png")
    assert read_image(tmp_path / "a.png").getpixel((0, 0)) == (255, 255, 255)


def test_picture_is_turned_as_the_camera_says(tmp_path: Path) -> None:
    picture = Image.new("RGB", (4, 8), "red")
    exif = picture.getexif()
    exif[0x0112] = 6
    picture.save(tmp_path / "a.jpg", exif=exif)
    assert read_image(tmp_path / "a.jpg").size == (8, 4)


def test_animation_gives_its_first_frame(tmp_path: Path) -> None:
    first, second = (Image.new("RGB", (4, 4), colour) for colour in ("red", "blue"))
    first.save(tmp_path / "a.gif", save_all=True, append_images=[second])
    assert read_image(tmp_path / "a.gif").getpixel((0, 0)) == (255, 0, 0)


@pytest.mark.parametrize("content", [None, b"", b"no picture", b"\x89PNG\r\n\x1a\n"])
def test_missing_and_broken_files_are_named(tmp_path: Path, content: bytes | None) -> None:
    if content is not None:
        (tmp_path / "a.png").write_bytes(content)
    with pytest.raises(ImageFileError, match=r"a\.png cannot be read as a picture: "):
        read_image(tmp_path / "a.png")


def test_picture_cut_short_is_named(tmp_path: Path) -> None:
    draw_picture(tmp_path / "a.png", "red", (200, 200))
    whole = (tmp_path / "a.png").read_bytes()
    (tmp_path / "a.png").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ImageFileError, match=r"a\.png"):
        read_image(tmp_path / "a.png")


def test_hidden_files_and_folders_are_no_pictures(tmp_path: Path) -> None:
    for name in ("a.png", "._a.png", ".b.png"):
        (tmp_path / name).touch()
    (tmp_path / "c.png").mkdir()
    assert [path.name for path in image_files(tmp_path)] == ["a.png"]


@pytest.mark.parametrize("name", ["a.heic", "a.HEIF", "a.jxl", "a.psd", "a.CR2", "a.svg", "a.exr"])
def test_pictures_that_nothing_reads_are_named(tmp_path: Path, name: str) -> None:
    if Path(name).suffix.lower() in IMAGE_SUFFIXES:
        pytest.skip("a plugin reads it")
    for file in (name, "b.png", "notes.txt"):
        (tmp_path / file).touch()
    with pytest.warns(UserWarning, match=rf"skipped {name}; .*save as PNG or JPEG"):
        assert [path.name for path in image_files(tmp_path)] == ["b.png"]


def test_common_suffixes_are_read() -> None:
    wanted = {".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".gif", ".webp", ".bmp", ".tif", ".tiff", ".ppm", ".tga"}
    assert wanted <= {*IMAGE_SUFFIXES}
    assert (".avif" in IMAGE_SUFFIXES) == (".avif" in Image.registered_extensions())


RAMP = np.linspace(0, 1, 256)
TONES = np.arange(256)


def png(width: int, depth: int, colour: int, rows: bytes, *chunks: tuple[bytes, bytes]) -> bytes:
    """A PNG file of one row, for modes that Pillow does not write."""
    header = struct.pack(">IIBBBBB", width, 1, depth, colour, 0, 0, 0)
    parts = [(b"IHDR", header), *chunks, (b"IDAT", zlib.compress(b"\0" + rows)), (b"IEND", b"")]
    packed = (struct.pack(">I", len(d)) + n + d + struct.pack(">I", zlib.crc32(n + d)) for n, d in parts)
    return b"\x89PNG\r\n\x1a\n" + b"".join(packed)


@pytest.mark.parametrize(
    ("name", "row"),
    [
        ("grey16.png", (RAMP * 65535).astype(np.uint16)),
        ("grey16.tif", (RAMP * 65535).astype(np.uint16)),
        ("grey16-big-endian.tif", (RAMP * 65535).astype(">u2")),
        ("grey32.tif", (RAMP * 65535).astype(np.int32)),
        ("float.tif", RAMP.astype(np.float32)),
        ("float255.tif", (RAMP * 255).astype(np.float32)),
        ("grey8.png", TONES.astype(np.uint8)),
    ],
)
def test_deep_greys_keep_their_tones(tmp_path: Path, name: str, row: np.ndarray) -> None:
    Image.fromarray(row[None]).save(tmp_path / name)
    for image in (read_image(tmp_path / name), load_pictures(tmp_path / name).images[0]):
        values = np.asarray(image)[0]
        assert np.abs(values - TONES[:, None]).max() <= 1
        assert (values[0] == 0).all()
        assert (values[-1] == 255).all()


def test_deep_colours_keep_their_tones(tmp_path: Path) -> None:
    deep = (RAMP * 65535).astype(">u2")
    colour = np.stack([deep, deep[::-1], deep], axis=-1)
    (tmp_path / "rgb16.png").write_bytes(png(256, 16, 2, colour.tobytes()))
    values = np.asarray(read_image(tmp_path / "rgb16.png"))[0].astype(int)
    assert np.abs(values - np.stack([TONES, TONES[::-1], TONES], axis=-1)).max() <= 1
    grey_alpha = np.stack([deep, np.full_like(deep, 65535)], axis=-1)
    (tmp_path / "la16.png").write_bytes(png(256, 16, 4, grey_alpha.tobytes()))
    assert np.abs(np.asarray(read_image(tmp_path / "la16.png"))[0].astype(int) - TONES[:, None]).max() <= 1


def test_a_transparent_grey_of_16_bits_is_white(tmp_path: Path) -> None:
    Image.fromarray(np.array([[0, 65535, 30000, 30001]], dtype=np.uint16)).save(tmp_path / "a.png", transparency=30000)
    assert np.asarray(read_image(tmp_path / "a.png"))[0, :, 0].tolist() == [0, 255, 255, 117]


def test_highlights_of_a_float_image_are_white() -> None:
    image = Image.fromarray(np.array([[-0.5, 0.5, 1.0, 4.0]], dtype=np.float32))
    assert np.asarray(to_rgb(image))[0, :, 0].tolist() == [0, 128, 255, 255]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e9])
def test_floats_without_a_white_are_refused(tmp_path: Path, value: float) -> None:
    Image.fromarray(np.array([[0.0, value]], dtype=np.float32)).save(tmp_path / "a.tif")
    with pytest.raises(ImageFileError, match=r"a\.tif .*expected finite values up to 65535"):
        read_image(tmp_path / "a.tif")


COLOUR = (60, 160, 90)


def in_mode(mode: str) -> Image.Image:
    source = Image.new("RGB", (4, 4), COLOUR)
    if mode in ("P", "PA"):
        image = Image.new(mode, (4, 4))
        image.putpalette([*COLOUR, *([0] * 765)])
        if mode == "PA":
            image.putalpha(255)
        return image
    by_way_of = {"La": "LA", "RGBa": "RGBA"}.get(mode, "RGB")
    return source.convert(by_way_of).convert(mode)


@pytest.mark.parametrize(
    "mode", ["1", "L", "P", "RGB", "CMYK", "YCbCr", "HSV", "LA", "PA", "RGBA", "La", "RGBa", "RGBX"]
)
def test_every_mode_keeps_its_colour(mode: str) -> None:
    source = Image.new("RGB", (4, 4), COLOUR)
    expected = source.convert({"1": "1", "L": "L", "LA": "L", "La": "L"}.get(mode, "RGB")).convert("RGB")
    got = np.asarray(to_rgb(in_mode(mode))).astype(int)
    assert np.abs(got - np.asarray(expected)).max() <= (3 if mode in ("YCbCr", "HSV") else 0)


def test_lab_is_read() -> None:
    lab = ImageCms.profileToProfile(
        Image.new("RGB", (4, 4), COLOUR),
        ImageCms.createProfile("sRGB"),
        ImageCms.createProfile("LAB"),
        outputMode="LAB",
    )
    assert lab is not None
    assert np.abs(np.asarray(to_rgb(lab)).astype(int) - COLOUR).max() <= 5  # LAB of 8 bits is coarse.


def test_transparent_palette_lies_on_white(tmp_path: Path) -> None:
    image = Image.new("P", (2, 1))
    image.putpalette([255, 0, 0, 0, 255, 0, *([0] * 762)])
    image.putpixel((1, 0), 1)
    image.save(tmp_path / "a.png", transparency=1)
    assert np.asarray(read_image(tmp_path / "a.png"))[0].tolist() == [[255, 0, 0], [255, 255, 255]]


def icc_profile(primaries: tuple[tuple[float, float, float], ...], gamma: float, space: bytes = b"RGB ") -> bytes:
    """A matrix profile of version 2; with no primaries, a grey one."""

    def fixed(value: float) -> bytes:
        return struct.pack(">i", round(value * 65536))

    def xyz(value: tuple[float, float, float]) -> bytes:
        return b"XYZ \0\0\0\0" + b"".join(map(fixed, value))

    white = (0.9642, 1.0, 0.8249)
    text = b"desc\0\0\0\0" + struct.pack(">I", 5) + b"wide\0" + bytes(78)
    curve = b"curv\0\0\0\0" + struct.pack(">IH", 1, round(gamma * 256)) + b"\0\0"
    tags = [(b"desc", text + bytes(-len(text) % 4)), (b"cprt", b"text\0\0\0\0free\0\0\0\0"), (b"wtpt", xyz(white))]
    tags += [(name, xyz(value)) for name, value in zip((b"rXYZ", b"gXYZ", b"bXYZ"), primaries, strict=False)]
    tags += [(name, curve) for name in ((b"rTRC", b"gTRC", b"bTRC") if primaries else (b"kTRC",))]
    at, table, data = 132 + 12 * len(tags), b"", b""
    for name, tag in tags:
        table += name + struct.pack(">II", at + len(data), len(tag))
        data += tag
    body = struct.pack(">I", len(tags)) + table + data
    head = struct.pack(">I", 128 + len(body)) + bytes(4) + b"\x02\x10\0\0mntr" + space + b"XYZ "
    return (head + bytes(12) + b"acsp" + bytes(28) + b"".join(map(fixed, white))).ljust(128, b"\0") + body


ADOBE = icc_profile(
    ((0.60974, 0.31111, 0.01947), (0.20528, 0.62567, 0.06087), (0.14919, 0.06322, 0.74457)), 2.19921875
)
SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()


def in_srgb(image: Image.Image, profile: bytes) -> tuple[int, ...]:
    source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
    moved = ImageCms.profileToProfile(image, source, ImageCms.createProfile("sRGB"), outputMode="RGB")
    assert moved is not None
    return moved.getpixel((0, 0))  # type: ignore[return-value]


@pytest.mark.parametrize("suffix", [".png", ".tif", ".webp", ".jpg", ".avif"])
def test_profiles_are_honoured(tmp_path: Path, suffix: str) -> None:
    if suffix not in IMAGE_SUFFIXES:
        pytest.skip(f"Pillow reads no {suffix}")
    options = {".webp": {"lossless": True}, ".jpg": {"quality": 100}, ".avif": {"quality": 100}}.get(suffix, {})
    image = Image.new("RGB", (16, 16), COLOUR)
    image.save(tmp_path / f"a{suffix}", icc_profile=ADOBE, **options)  # type: ignore[arg-type]
    expected = in_srgb(image, ADOBE)
    assert expected == (0, 161, 85)
    exact = suffix not in (".jpg", ".avif")
    for read in (read_image(tmp_path / f"a{suffix}"), load_pictures(tmp_path / f"a{suffix}").images[0]):
        assert np.abs(np.array(read.getpixel((8, 8))) - expected).max() <= (0 if exact else 4)


@pytest.mark.parametrize(("space", "interoperability"), [(2, None), (0xFFFF, "R03")])
@pytest.mark.parametrize("suffix", [".png", ".jpg"])
def test_adobe_rgb_in_exif_alone_is_honoured(
    tmp_path: Path, suffix: str, space: int, interoperability: str | None
) -> None:
    colours = ((200, 60, 50), (60, 200, 50), (50, 60, 200), (128, 128, 128), (0, 255, 0))
    options = {"quality": 100, "subsampling": 0} if suffix == ".jpg" else {}
    for colour in colours:
        image = Image.new("RGB", (8, 8), colour)
        exif = Image.Exif()
        exif.get_ifd(0x8769)[0xA001] = space
        if interoperability:
            exif.get_ifd(0x8769)[0xA005] = {1: interoperability}
        image.save(tmp_path / f"a{suffix}", exif=exif.tobytes(), **options)  # type: ignore[arg-type]
        expected = in_srgb(image, ADOBE)
        got = read_image(tmp_path / f"a{suffix}").getpixel((4, 4))
        # JPEG's rounding is wide in the dark.
        assert np.abs(np.subtract(got, expected)).max() <= (1 if suffix == ".png" else 5), colour


def test_srgb_and_uncalibrated_pictures_keep_their_colours(tmp_path: Path) -> None:
    for space in (1, 0xFFFF):
        exif = Image.Exif()
        exif.get_ifd(0x8769)[0xA001] = space
        Image.new("RGB", (4, 4), COLOUR).save(tmp_path / "a.png", exif=exif.tobytes())
        assert read_image(tmp_path / "a.png").getpixel((0, 0)) == COLOUR


def test_profiles_are_honoured_under_transparency_and_palettes(tmp_path: Path) -> None:
    expected = in_srgb(Image.new("RGB", (1, 1), COLOUR), ADOBE)
    Image.new("RGBA", (4, 4), (*COLOUR, 255)).save(tmp_path / "rgba.png", icc_profile=ADOBE)
    palette = Image.new("P", (4, 4))
    palette.putpalette([*COLOUR, *([0] * 765)])
    palette.save(tmp_path / "p.png", icc_profile=ADOBE)
    assert read_image(tmp_path / "rgba.png").getpixel((0, 0)) == expected
    assert read_image(tmp_path / "p.png").getpixel((0, 0)) == expected


def test_a_grey_profile_is_honoured(tmp_path: Path) -> None:
    profile = icc_profile((), 1.0, b"GRAY")
    Image.new("L", (4, 4), 55).save(tmp_path / "linear.png", icc_profile=profile)
    expected = in_srgb(Image.new("L", (1, 1), 55), profile)
    assert expected[0] > 120
    assert read_image(tmp_path / "linear.png").getpixel((0, 0)) == expected
    Image.fromarray(np.full((4, 4), 55 * 257, dtype=np.uint16)).save(tmp_path / "deep.png", icc_profile=profile)
    assert read_image(tmp_path / "deep.png").getpixel((0, 0)) == expected


def test_a_picture_in_srgb_is_left_alone(tmp_path: Path) -> None:
    values = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    Image.fromarray(values).save(tmp_path / "a.png", icc_profile=SRGB)
    assert np.array_equal(np.asarray(read_image(tmp_path / "a.png")), values)


@pytest.mark.parametrize("profile", [b"", b"broken", ADOBE[:200], icc_profile((), 1.0, b"GRAY")])
def test_a_profile_that_does_not_fit_counts_as_none(tmp_path: Path, profile: bytes) -> None:
    Image.new("RGB", (4, 4), COLOUR).save(tmp_path / "a.png", icc_profile=profile)
    assert read_image(tmp_path / "a.png").getpixel((0, 0)) == COLOUR


def test_cmyk_is_read(tmp_path: Path) -> None:
    image = Image.new("CMYK", (8, 8), (200, 10, 40, 20))
    for name in ("a.tif", "a.jpg"):
        image.save(tmp_path / name)
        assert np.abs(np.array(read_image(tmp_path / name).getpixel((4, 4))) - (51, 226, 198)).max() <= 3


@pytest.mark.parametrize("suffix", [".jpg", ".png", ".webp", ".tif", ".avif"])
def test_every_format_is_turned_as_the_camera_says(tmp_path: Path, suffix: str) -> None:
    if suffix not in IMAGE_SUFFIXES:
        pytest.skip(f"Pillow reads no {suffix}")
    picture = Image.new("RGB", (16, 32), "red")
    exif = picture.getexif()
    exif[0x0112] = 6
    picture.save(tmp_path / f"a{suffix}", exif=exif)
    assert read_image(tmp_path / f"a{suffix}").size == (32, 16)


def test_broken_exif_names_its_file_or_is_left_out(tmp_path: Path) -> None:
    Image.new("RGB", (16, 32), "red").save(tmp_path / "a.jpg", exif=b"Exif\0\0II*\0\xff\xff\xff\xff")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert read_image(tmp_path / "a.jpg").size == (16, 32)

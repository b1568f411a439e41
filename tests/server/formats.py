"""A picture in the formats and modes that people have, and what a viewer shows of each.

``FORMATS``: name -> the file and the pixels that are shown, or the words of its 400.
"""

import io
import struct
import zlib
from collections.abc import Iterator, Mapping
from functools import cache

import cv2
import numpy as np
from PIL import Image, PngImagePlugin

from era_vllm.lab.samples import load_samples

DEFAULTS = "PNG,JPEG,MPO,WEBP,GIF,BMP,AVIF"
Shown = Image.Image | str


def encoded(image: Image.Image, form: str, **options: object) -> bytes:
    """Return a picture in a format."""
    with io.BytesIO() as buffer:
        image.save(buffer, form, **options)
        return buffer.getvalue()


def deep(image: Image.Image) -> np.ndarray:
    """Return it with 16 bits a channel."""
    return np.asarray(image).astype(np.uint16) * 257


def by_opencv(pixels: np.ndarray) -> bytes:
    """Return a PNG of 16 bits, which Pillow does not write of more than one channel."""
    order = [2, 1, 0, 3][: pixels.shape[2]]
    return cv2.imencode(".png", pixels[..., order])[1].tobytes()


def bmp_565(image: Image.Image) -> bytes:
    """Return a BMP of 16 bits a pixel, bit fields."""
    red, green, blue = (np.asarray(image).astype(np.uint16)[::-1, :, i] for i in range(3))
    pixels = ((red >> 3) << 11 | (green >> 2) << 5 | blue >> 3).tobytes()
    head = struct.pack("<IiiHHIIiiII", 40, *image.size, 1, 16, 3, len(pixels), 0, 0, 0, 0)
    masks = struct.pack("<III", 0xF800, 0x07E0, 0x001F)
    return b"BM" + struct.pack("<IHHI", 66 + len(pixels), 0, 0, 66) + head + masks + pixels


def with_chunk(data: bytes, kind: bytes, content: bytes, checksum: int | None = None) -> bytes:
    """Return a PNG with one more chunk behind its header."""
    checksum = zlib.crc32(kind + content) if checksum is None else checksum
    chunk = struct.pack(">I", len(content)) + kind + content + struct.pack(">I", checksum)
    return data[:33] + chunk + data[33:]


@cache
def formats() -> Mapping[str, tuple[bytes, Shown]]:
    """Return all."""
    return dict(_formats())


def _formats() -> Iterator[tuple[str, tuple[bytes, Shown]]]:
    image = load_samples()[0].image.convert("RGB").resize((336, 336))
    grey, other = image.convert("L"), Image.new("RGB", image.size, "blue")
    ramp = Image.fromarray(np.tile(np.linspace(0, 255, 336).astype(np.uint8), (336, 1)))
    clear = image.copy()
    clear.putalpha(ramp)
    shown = Image.alpha_composite(Image.new("RGBA", image.size, "white"), clear).convert("RGB")
    half = grey.copy()
    half.putalpha(ramp)
    half_shown = Image.composite(grey, Image.new("L", grey.size, 255), ramp)
    few = image.quantize(256)
    key = few.getpixel((100, 100))
    keyed = np.asarray(few.convert("RGB")).copy()
    keyed[np.asarray(few) == key] = 255
    keyed = Image.fromarray(keyed)
    bits, turned = image.convert("1"), Image.Exif()
    turned[0x0112] = 6  # a viewer turns it by 90 degrees
    lying = image.transpose(Image.Transpose.ROTATE_90)
    more = {"save_all": True, "append_images": [other]}
    png = encoded(image, "png")

    yield "PNG", (png, image)
    yield "PNG, alpha", (encoded(clear, "png"), shown)
    yield "PNG, grey", (encoded(grey, "png"), grey)
    yield "PNG, grey and alpha", (encoded(half, "png"), half_shown)
    yield "PNG, palette", (encoded(few, "png"), few)
    yield "PNG, palette, a colour transparent", (encoded(few, "png", transparency=key), keyed)
    yield "PNG, 1 bit", (encoded(bits, "png"), bits)
    yield "PNG, grey of 16 bits", (encoded(Image.fromarray(deep(grey)), "png"), grey)
    yield "PNG, colours of 16 bits", (by_opencv(deep(image)), image)
    yield "PNG, alpha of 16 bits", (by_opencv(deep(clear)), shown)
    yield "PNG, EXIF that turns it", (encoded(lying, "png", exif=turned), image)
    yield "PNG, animated", (encoded(image, "png", **more), image)
    text = with_chunk(png, b"tEXt", b"Comment\0x", checksum=1)
    yield "PNG, wrong checksum of a text", (text, image)
    long = PngImagePlugin.PngInfo()
    long.add_text("Comment", "x" * 20_000_000, zip=True)
    yield "PNG, text of 20 MB", (encoded(image, "png", pnginfo=long), image)
    yield "PNG without its last 2 bytes", (png[:-2], image)
    yield "half a PNG", (png[: len(png) // 2], f"its {len(png) // 2} bytes are no whole PNG: trunc")
    for name, options in (("JPEG", {}), ("JPEG, progressive", {"progressive": True})):
        jpeg = encoded(image, "jpeg", quality=95, subsampling=0, **options)
        yield name, (jpeg, image)
        yield f"{name}, without its last 2 bytes", (jpeg[:-2], image)
        part = jpeg[: len(jpeg) // 2]
        yield f"half a {name}", (part, f"its {len(part)} bytes are no whole JPEG: trunc")
    yield "JPEG, grey", (encoded(grey, "jpeg", quality=95), grey)
    yield "JPEG, CMYK", (encoded(image.convert("CMYK"), "jpeg", quality=95), image)
    jpeg = encoded(lying, "jpeg", quality=95, exif=turned)
    yield "JPEG, EXIF that turns it", (jpeg, image)
    yield "MPO", (encoded(image, "mpo", quality=95, subsampling=0, **more), image)
    yield "WEBP", (encoded(image, "webp", quality=95), image)
    yield "WEBP, lossless, alpha", (encoded(clear, "webp", lossless=True, exact=True), shown)
    yield "WEBP, animated", (encoded(image, "webp", lossless=True, **more), image)
    webp = encoded(image, "webp")
    yield "half a WEBP", (webp[: len(webp) // 2], "bytes are no whole WEBP: trunc")
    yield "GIF", (encoded(few, "gif"), few)
    yield "GIF, a colour transparent", (encoded(few, "gif", transparency=key), keyed)
    yield "GIF, animated", (encoded(few, "gif", **more), few)
    yield "BMP", (encoded(image, "bmp"), image)
    yield "BMP, grey", (encoded(grey, "bmp"), grey)
    yield "BMP, palette", (encoded(few, "bmp"), few)
    yield "BMP, 1 bit", (encoded(bits, "bmp"), bits)
    yield (
        "BMP, alpha",
        (encoded(clear, "bmp"), image),
    )  # of 32 bits without fields viewers show no alpha
    fields = np.round(np.asarray(image) // [8, 4, 8] * [255 / 31, 255 / 63, 255 / 31])
    yield "BMP, 5, 6 and 5 bits", (bmp_565(image), Image.fromarray(fields.astype(np.uint8)))
    yield "AVIF", (encoded(image, "avif", quality=90, subsampling="4:4:4"), image)
    yield "AVIF, alpha", (encoded(clear, "avif", quality=90, subsampling="4:4:4"), shown)
    avif = encoded(image, "avif", quality=90)
    yield "half an AVIF", (avif[: len(avif) // 2], "bytes are no whole AVIF: trunc")
    heic = b"\0\0\0\x18ftypheic\0\0\0\0mif1heic"
    yield (
        "HEIC",
        (
            heic + bytes(99),
            f"its format is HEIF (HEIC), which many phones write, allowed are {DEFAULTS}",
        ),
    )
    yield (
        "SVG",
        (b'<?xml version="1.0"?>\n<svg xmlns="a"/>', f"its format is SVG, allowed are {DEFAULTS}"),
    )
    yield "PDF", (b"%PDF-1.7\n", f"its format is PDF, allowed are {DEFAULTS}")
    yield "a video", (b"\0\0\0\x18ftypisom" + bytes(99), "its format is a video's")
    yield "TIFF", (encoded(image, "tiff"), f"its format is TIFF, allowed are {DEFAULTS}")


@cache
def by_setting() -> Mapping[str, tuple[bytes, Shown]]:
    """Return those of TIFF, which a setting allows."""
    image = load_samples()[0].image.convert("RGB").resize((336, 336))
    grey = image.convert("L")
    floats = np.asarray(grey).astype(np.float32)
    return {
        "TIFF": (encoded(image, "tiff"), image),
        "TIFF, CMYK": (encoded(image.convert("CMYK"), "tiff"), image),
        "TIFF, YCbCr": (encoded(image.convert("YCbCr"), "tiff"), image),
        "TIFF, 16 bits": (encoded(Image.fromarray(deep(grey)), "tiff"), grey),
        "TIFF, 16 bits, big-endian": (
            encoded(Image.fromarray(deep(grey).astype(">u2")), "tiff"),
            grey,
        ),
        "TIFF, 32 bits": (encoded(Image.fromarray(deep(grey).astype(np.int32)), "tiff"), grey),
        "TIFF, floats": (encoded(Image.fromarray(floats / 255), "tiff"), grey),
        "TIFF, floats to 255": (
            encoded(Image.fromarray(floats - 7), "tiff"),
            "its pixels are numbers from -7.0 to",
        ),
        "TIFF, not a number": (
            encoded(Image.fromarray(np.full((9, 9), np.nan, np.float32)), "tiff"),
            "its pixels are numbers from",
        ),
    }

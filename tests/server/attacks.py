"""Pictures and URLs that an attacker sends, by name; each must be served or be a 400."""

import base64
import gzip
import io
import struct
import zlib
from collections.abc import Mapping
from functools import cache

from PIL import Image, PngImagePlugin

from tests.server.attacker import data_url, picture, png

SVG = b'<svg xmlns="http://www.w3.org/2000/svg"><image href="file:///etc/passwd"/></svg>'


def png_of(width: int, height: int, data: bytes = b"", *extra: tuple[bytes, bytes]) -> bytes:
    """Return a PNG that says this size, whatever is in it."""

    def chunk(name: bytes, content: bytes) -> bytes:
        checked = name + content
        return struct.pack(">I", len(content)) + checked + struct.pack(">I", zlib.crc32(checked))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = [(b"IHDR", header), *extra, (b"IDAT", zlib.compress(data)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*each) for each in chunks)


def encoded(image: Image.Image, form: str, **options: object) -> bytes:
    """Return a picture in a format."""
    with io.BytesIO() as buffer:
        image.save(buffer, form, **options)
        return buffer.getvalue()


@cache
def pictures() -> Mapping[str, str]:
    """Return data URLs by name."""
    whole, jpeg = png(picture()), encoded(picture(), "jpeg")
    text = PngImagePlugin.PngInfo()
    text.add_text("Comment", "x" * 20_000_000, zip=True)
    frames = [picture(32, 32), Image.new("RGB", (32, 32), "blue")]
    animated = {"save_all": True, "append_images": frames[1:]}
    ico = encoded(picture(64, 64), "ico")
    raw = {
        "1x1": png(picture(1, 1)),
        "1x1 grey with alpha": png(picture(1, 1, "LA")),
        "200 x 1": png(picture(200, 1)),
        "201 x 1": png(picture(201, 1)),
        "30000 x 1": png(picture(30_000, 1)),
        "1 x 30000": png(picture(1, 30_000)),
        "palette": png(picture(8, 8, "P")),
        "one bit": png(picture(8, 8, "1")),
        "16 bit": png(Image.new("I;16", (8, 8))),
        "CMYK JPEG": encoded(picture(8, 8, "CMYK"), "jpeg"),
        "animated GIF": encoded(frames[0], "gif", **animated),
        "animated WEBP": encoded(frames[0], "webp", **animated),
        "animated PNG": encoded(frames[0], "png", **animated),
        "text of 20 MB in a PNG": encoded(picture(), "png", pnginfo=text),
        "EXIF of nonsense": encoded(picture(), "jpeg", exif=b"Exif\0\0" + b"\xff" * 9000),
        "2 gigapixels": png_of(50_000, 40_000),
        "bomb below PIL's bound": png_of(12_000, 12_000, bytes(100)),
        "2^31 wide": png_of(2**31 - 1, 1),
        "0 wide": png_of(0, 5),
        "bomb WEBP": encoded(picture(), "webp")[:24] + b"\xff\x3f\xff\x3f" + b"\0" * 40,
        "ICO": ico,
        "ICO with a bomb in it": ico[: ico.index(b"\x89PNG")] + png_of(12_000, 12_000, bytes(100)),
        "TIFF": encoded(picture(), "tiff"),
        "EPS": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n",
        "truncated PNG": whole[: len(whole) // 2],
        "truncated JPEG": jpeg[: len(jpeg) // 2],
        "PNG without data": png_of(64, 48),
        "PNG with a broken checksum": whole[:29] + bytes(4) + whole[33:],
        "iCCP of nonsense": png_of(2, 1, bytes(7), (b"iCCP", b"a\0\0" + zlib.compress(b"x" * 99))),
        "SVG": SVG,
        "gzip": gzip.compress(whole),
        "HTML": b"<html></html>",
        "a PDF": b"%PDF-1.7\n1 0 obj\n<<>>\nendobj\n",
        "zeros": bytes(4096),
        "nothing": b"",
    }
    urls = {name: data_url(data) for name, data in raw.items()}
    plain = base64.b64encode(whole).decode()
    return urls | {
        "SVG as SVG": data_url(SVG, "image/svg+xml"),
        "text/html": data_url(whole, "text/html"),
        "application/octet-stream": data_url(whole, "application/octet-stream"),
        "no type": f"data:;base64,{plain}",
        "upper case": f"DATA:IMAGE/PNG;BASE64,{plain}",
        "type with a parameter": f"data:image/png;charset=utf-8;base64,{plain}",
        "no base64": "data:image/png,abc",
        "no comma": "data:image/png;base64",
        "not base64": "data:image/png;base64,!!!!",
        "base64 with a line break": f"data:image/png;base64,{plain[:40]}\n{plain[40:]}",
        "percent-encoded base64": "data:image/png;base64," + plain.replace("=", "%3D"),
        "too long": "data:image/png;base64," + "A" * 400_000,
        "empty": "",
        "only a scheme": "data:",
        "ftp": "ftp://example.com/a.png",
        "no scheme": "/etc/passwd",
        "javascript": "javascript:alert(1)",
        "a name": "cat.png",
        "NUL": "data:image/png;base64,\0",
        "surrogate": "http://\ud800/",
    }


SERVED = frozenset(
    {
        *("1x1", "1x1 grey with alpha", "200 x 1", "palette", "one bit", "16 bit", "CMYK JPEG"),
        *("animated GIF", "animated WEBP", "animated PNG", "EXIF of nonsense"),
        *("iCCP of nonsense", "text of 20 MB in a PNG"),
        *("upper case", "type with a parameter", "text/html", "application/octet-stream"),
        *("no type", "base64 with a line break"),
    }
)
"""Those that are pictures, whatever is said of them; the first frame where there are several."""


def inside(port: int) -> Mapping[str, str]:
    """Return URLs of a web server on loopback, in the ways to write its address."""
    return {
        "IPv4": f"http://127.0.0.1:{port}/picture.png",
        "a name for it": f"http://localhost:{port}/picture.png",
        "decimal": f"http://2130706433:{port}/picture.png",
        "hexadecimal": f"http://0x7f000001:{port}/picture.png",
        "octal": f"http://0177.0.0.1:{port}/picture.png",
        "short": f"http://127.1:{port}/picture.png",
        "0.0.0.0": f"http://0.0.0.0:{port}/picture.png",
        "IPv6 mapped": f"http://[::ffff:127.0.0.1]:{port}/picture.png",
        "redirect": f"http://localhost:{port}/redirect",
        "backslash": f"http://127.0.0.1:{port}\\@localhost/picture.png",
        "backslash behind": f"http://localhost\\@127.0.0.1:{port}/picture.png",
        "user": f"http://localhost@127.0.0.1:{port}/picture.png",
        "fragment": f"http://127.0.0.1:{port}#@localhost/picture.png",
        "query": f"http://127.0.0.1:{port}?@localhost/picture.png",
        "upper case": f"HTTP://LOCALHOST:{port}/picture.png",
        "trailing dot": f"http://localhost.:{port}/picture.png",
        "full width": f"http://ｌｏｃａｌｈｏｓｔ:{port}/picture.png",
        "tab": f"http://127.0.0.1\t:{port}/picture.png",
        "metadata": "http://169.254.169.254/latest/meta-data/",
    }

"""Pictures of records: found, decoded once before they are needed, and opened upright as RGB."""

from __future__ import annotations

import io
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from adaskip.errors import DataError
from adaskip.sources import expanded

_ORIENTATION, _LYING = 0x0112, (5, 6, 7, 8)  # the EXIF tag, and its values of pictures that are stored on their side
_EXPECTED = "expected a path, a PIL picture, the bytes of a picture file, or a list of them"


def pictures_of(record: Mapping[str, Any]) -> list[Any]:
    """Return a record's pictures, none, one or several, from ``image`` or ``images``; an empty text is none.

    Raises:
        DataError: both fields hold pictures.
    """
    fields = {name: pictures for name in ("image", "images") if (pictures := _listed(record.get(name)))}
    if len(fields) > 1:
        raise DataError("has both image and images; give one of them")
    return next(iter(fields.values()), [])


def _listed(value: Any) -> list[Any]:
    if value is None or (isinstance(value, str) and not value.strip()):
        return []
    return [*value] if isinstance(value, list | tuple) else [value]


def located(picture: Any, folder: Path | None) -> Any:
    """Return a picture of a record with its path made absolute or relative to the working directory.

    Raises:
        DataError: it is no picture at all, or a file that is not there.
    """
    if not isinstance(picture, str | Path):
        _stream(picture)
        return picture
    text = str(picture)
    if "://" in text[:12] or text.startswith("data:"):
        raise DataError(f"image {text[:60]!r} is a URL; download the pictures and give their paths")
    base = folder or Path()
    # a record written on Windows names scans\1.png; a file whose name really holds a backslash comes first
    choices = [base / expanded(name) for name in (text, text.replace("\\", "/"))]
    path = next((choice for choice in choices if choice.is_file()), None)
    if path is None:
        if not text.strip():
            raise DataError(f"image is {text!r}; {_EXPECTED}")
        fault = "is a folder" if choices[0].is_dir() else "does not exist"
        raise DataError(f"image {choices[0]} {fault}; expected a picture file, its path relative to the file's folder")
    return path


def look(picture: Any, max_pixels: int | None = None) -> None:
    """Decode a picture once, at the least size that its format offers, so that none breaks in the middle of training.

    Args:
        picture: as records hold them.
        max_pixels: of its width times its height; None: what Pillow opens.

    Raises:
        DataError: it is no picture, ends early, or is larger than that.
    """
    try:
        with _opened(picture) as opened:
            _check_size(opened, picture, max_pixels)
            if opened is not picture:  # a JPEG of an eighth of the size, which reads the file to its end all the same
                opened.draft("RGB", (1, 1))
            opened.load()
            if opened.mode.startswith("I") or opened.mode == "F":
                to_rgb(opened)
    except DataError:
        raise
    except Exception as error:  # a damaged file makes its decoder raise anything: OSError, SyntaxError, struct.error
        raise DataError(_unreadable(picture, error)) from error


def picture_size(picture: Any) -> tuple[int, int]:
    """Return width and height of a picture as `open_image` gives it, which its header tells.

    Raises:
        DataError: it is no picture.
    """
    try:
        with _opened(picture) as opened:
            turned = opened.getexif().get(_ORIENTATION, 1) in _LYING
            return (opened.height, opened.width) if turned else (opened.width, opened.height)
    except Exception as error:
        raise DataError(_unreadable(picture, error)) from error


def open_image(picture: Any) -> Image.Image:
    """Return a picture upright, as its EXIF orientation says, in RGB; what is transparent becomes white.

    Raises:
        DataError: it is missing, no picture, damaged, or larger than Pillow opens.
    """
    try:
        if isinstance(picture, Image.Image):
            return to_rgb(ImageOps.exif_transpose(picture))
        with Image.open(_stream(picture)) as opened:
            _check_size(opened, picture)
            return to_rgb(ImageOps.exif_transpose(opened))
    except DataError:
        raise
    except Exception as error:  # a damaged file makes its decoder raise anything: OSError, SyntaxError, struct.error
        raise DataError(_unreadable(picture, error)) from error


def to_rgb(image: Image.Image) -> Image.Image:
    """Return a picture of any mode in RGB, with the brightness that a viewer shows.

    Raises:
        DataError: numbers that no range of brightness is known for.
    """
    if image.mode.startswith("I") or image.mode == "F":  # `convert` would clip all above 255 to white
        image = Image.fromarray(_bytes_of(np.asarray(image)))
    elif image.has_transparency_data:  # `convert` would show whatever colour lies under transparent pixels
        layer = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer)
    return image.convert("RGB")


def _bytes_of(pixels: np.ndarray) -> np.ndarray:
    """Scale 16-bit, 32-bit or float grey values to 0..255, by the smallest usual range that holds them."""
    low, high = float(pixels.min()), float(pixels.max())
    tops = {("f", 4): (1.0, 255.0, 65535.0), ("u", 2): (65535.0,)}.get((pixels.dtype.kind, pixels.dtype.itemsize))
    top = next((top for top in tops or (255.0, 65535.0) if high <= top), None)
    if low < 0 or top is None:
        raise DataError(
            f"a picture holds values from {low:g} to {high:g}; expected 0 to 1, to 255 or to 65535. "
            "Save it as an 8-bit PNG"
        )
    return np.rint(pixels * (255 / top)).astype(np.uint8)


def _stream(picture: Any) -> Any:
    """Return what Pillow opens: a path, or a stream of the bytes that a picture of a data set may come as."""
    content = picture
    if isinstance(picture, Mapping):  # {"bytes": ..., "path": ...}: a column of pictures, not decoded
        content = picture.get("bytes") or picture.get("path")
    if isinstance(content, bytes | bytearray):
        return io.BytesIO(content)
    if isinstance(content, str | Path | Image.Image):
        return content
    raise DataError(f"image is {_short(picture)}; {_EXPECTED}")


def _opened(picture: Any) -> Any:
    """Return a picture that closes its file, and not a picture that somebody else has opened."""
    return nullcontext(picture) if isinstance(picture, Image.Image) else Image.open(_stream(picture))


def _check_size(image: Image.Image, picture: Any, wanted: int | None = None) -> None:
    limit, size = Image.MAX_IMAGE_PIXELS, f"{image.width} x {image.height} pixels"
    if limit is not None and image.width * image.height > limit:
        raise DataError(_too_large(picture, size))
    if wanted is not None and image.width * image.height > wanted:
        raise DataError(f"image {_short(picture)}: {size}, more than data.max_pixels={wanted}; make it smaller")


def _too_large(picture: Any, size: str) -> str:
    return (
        f"image {_short(picture)}: {size}, more than the {Image.MAX_IMAGE_PIXELS} that Pillow opens without fear of a "
        "decompression bomb; make it smaller"
    )


def _unreadable(picture: Any, error: Exception) -> str:
    if isinstance(error, Image.DecompressionBombError | Image.DecompressionBombWarning):
        return _too_large(picture, str(error).partition(" exceeds")[0])
    reason = (str(error).strip() or type(error).__name__).split("\n")[0]
    return f"image {_short(picture)}: cannot be read ({reason}); expected a picture file that Pillow opens"


def _short(value: Any) -> str:
    text = str(value) if isinstance(value, str | Path) else repr(value)
    return text if isinstance(value, str | Path) or len(text) <= 60 else f"{text[:57]}..."

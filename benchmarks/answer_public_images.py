r"""Asks a MobileNetV2 in a LiteRT file about a public .npz once, and stores its answers.

    pip install ai-edge-litert
    python -m benchmarks.answer_public_images --model=mobilenet_v2_1.0_224_quant.tflite \
        --labels=imagenet_labels.txt --public=pathmnist_1000_clip.npz \
        --out=answers/pathmnist_mobilenet_v2.npz

A real pretrained network, though of natural images: it stands in for the foundation model in the
studies of ``docs/results.md``. Its logits, not its 8-bit probabilities, are kept: a tensor inside
the graph.
"""

import hashlib
from pathlib import Path

import numpy as np
from absl import app, flags
from PIL import Image

from fedhelp_jax.data.types import image_sha256
from fedhelp_jax.teachers.answers import Answers, save_answers

_MODEL = flags.DEFINE_string("model", None, "LiteRT file of a quantised MobileNet", required=True)
_LABELS = flags.DEFINE_string("labels", None, "its class names, a line each", required=True)
_PUBLIC = flags.DEFINE_string("public", None, "public images: .npz", required=True)
_OUT = flags.DEFINE_string("out", None, "where the answers go: .npz", required=True)

_LOGITS = "MobilenetV2/Logits/Squeeze1"
_SIDE = 224


def main(_: list[str]) -> None:
    """Answers every image at its own size, resized to the network's input."""
    from ai_edge_litert.interpreter import Interpreter

    with np.load(_PUBLIC.value, allow_pickle=False) as file:
        images = file["images"]
    network = Interpreter(_MODEL.value, experimental_preserve_all_tensors=True, num_threads=2)
    network.allocate_tensors()
    logits_tensor = next(d for d in network.get_tensor_details() if d["name"] == _LOGITS)
    scale, zero = logits_tensor["quantization"]
    input_index = network.get_input_details()[0]["index"]
    rows = []
    for image in images:
        picture = (
            Image.fromarray(image).convert("RGB").resize((_SIDE, _SIDE), Image.Resampling.BICUBIC)
        )
        network.set_tensor(input_index, np.asarray(picture)[None])
        network.invoke()
        rows.append(
            (network.get_tensor(logits_tensor["index"])[0].astype(np.float32) - zero) * scale
        )
    digest = hashlib.sha256(Path(_MODEL.value).read_bytes()).hexdigest()[:12]
    answers = Answers(
        logits=np.stack(rows),
        sha256=tuple(image_sha256(image) for image in images),
        label_names=tuple(Path(_LABELS.value).read_text().splitlines()),
        fingerprint=f"{Path(_MODEL.value).stem} (sha256 {digest}, bicubic {_SIDE}, logits)",
    )
    out = Path(_OUT.value)
    out.parent.mkdir(parents=True, exist_ok=True)
    save_answers(out, answers)
    print(f"{len(rows)} answers over {len(answers.label_names)} classes in {out}")


if __name__ == "__main__":
    app.run(main)

"""Asks what public images and a foundation model must be like to help: chest X-rays.

    export FEDHELP_DATA_DIR=/path/to/data
    fedhelp teach --study=configs/studies/relevance.py
    fedhelp compare --study=configs/studies/relevance.py --workdir=runs/relevance

FedHelp learns from 700 public images of four kinds: near the private ones (other chest X-rays, with
tuberculosis labels), farther (histology), far (photographs) and noise. Small hospitals learn their
public labels, the answers of a MobileNetV2 trained on ImageNet, or both, since labels alone can
hide a useless teacher. On the histology, teachers that are right by chance only and always
(simulated), and CLIP with a linear probe on the public labels, take MobileNetV2's place. The
hospitals are those of `scarcity.py`.

`relevance.py:gradients` measures instead how the gradients of small hospitals' private and public
losses are related (`benchmarks/gradients.py`), with one seed and without the teachers.
"""

import os

from fedhelp_jax.experiments.study import Study

_FOLDER = os.environ.get("FEDHELP_DATA_DIR", "")
_PUBLIC = {
    "xrays": {
        "public.name": "benchmarks.public_images:chest_xrays",
        "public.path": os.path.join(_FOLDER, "lung_cxr_seg_128.npz"),
    },
    "histology": {},
    "photographs": {"public.path": os.path.join(_FOLDER, "cifar100_6000.npz")},
    "noise": {"public.name": "benchmarks.public_images:noise", "public.path": None},
}
_UNLABELLED = {"algorithm.public_labels": False}
_LEARNED = {"labels": {"teacher.name": "none"}, "answers": _UNLABELLED, "both": {}}
_TEACHERS = {
    "chance": {"teacher.name": "simulated", "teacher.accuracy": 1 / 9},
    "perfect": {"teacher.name": "simulated", "teacher.accuracy": 1.0},
    "clip": {
        "teacher.name": "stored",
        "teacher.path": os.path.join(_FOLDER, "pathmnist_1000_clip.npz"),
        "teacher.array": "clip_embeddings",
        "teacher.head": "probe",
    },
}


def get_study(what: str = "gain") -> Study:
    """Returns the study; `what` is "gain" or "gradients"."""
    if what not in ("gain", "gradients"):
        raise ValueError(f"{what!r} must be gain or gradients")
    name = "fedhelp" if what == "gain" else "benchmarks.gradients:fedhelp_measured"
    fedhelp = {"algorithm.name": name, "public.num_examples": 700}
    compared = {
        f"{images} {learned}": fedhelp | chosen | settings
        for images, chosen in _PUBLIC.items()
        for learned, settings in _LEARNED.items()
    }
    if what == "gradients":
        return Study(
            datasets={"chest": "../pneumonia.py:sixteen"},
            methods=compared,
            seeds=(0,),
            reference="histology both",
        )
    return Study(
        datasets={"chest": "../pneumonia.py:sixteen"},
        methods={"local": {}, "nothing public": {**fedhelp, "public.name": "none"}}
        | compared
        | {
            f"histology {teacher}": fedhelp | _UNLABELLED | settings
            for teacher, settings in _TEACHERS.items()
        },
        seeds=range(5),
        reference="nothing public",
    )

"""Writes ``hospital_x/``: 400 JPEGs from four hospitals and a CSV, like a hospital's export.

    python examples/make_hospital.py hospital_x

**Synthetic**: the pictures are fedhelp_jax's phantoms, and the patients are made up.
"""

import csv
import sys
from pathlib import Path

import numpy as np
from PIL import Image

import fedhelp_jax as fh


def main(folder: Path, count: int = 400) -> None:
    data = fh.data.load("phantoms", num_examples=count, image_size=64)
    rng = np.random.default_rng(0)
    site = rng.choice(["central", "north", "coast", "valley"], count, p=[0.6, 0.2, 0.12, 0.08])
    (folder / "photos").mkdir(parents=True, exist_ok=True)
    with (folder / "findings.csv").open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["filename", "diagnosis", "hospital", "patient"])
        for i, pixels in enumerate(data.images):
            name = f"photos/{i:04}.jpg"
            Image.fromarray(pixels).save(folder / name, quality=95)
            diagnosis = data.label_names[int(data.labels[i])]
            table.writerow([name, diagnosis, site[i], f"{site[i]}-{i // 2}"])
    print(f"written: {count} synthetic pictures and {folder / 'findings.csv'}")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "hospital_x"))

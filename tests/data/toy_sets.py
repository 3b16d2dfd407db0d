"""Writes small TFDS data sets that none of our builders knows, in the format of TFDS."""

import io

import tensorflow_datasets as tfds
from PIL import Image


def png(array):
    file = io.BytesIO()
    Image.fromarray(array).save(file, "PNG")
    return io.BytesIO(file.getvalue())


def write_set(folder, name, features, splits, metadata=None):
    """Writes a data set.

    Args:
        folder: The folder of prepared sets.
        name: Name of the set.
        features: Features of the set.
        splits: The examples of each split, as dicts in the order of their keys; images are uint8
            arrays.
        metadata: Further metadata from the builder.
    """

    class Toy(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        VERSION = tfds.core.Version("1.0.0")
        code_path = None

        def _info(self):
            kept = None if metadata is None else tfds.core.MetadataDict(metadata)
            return tfds.core.DatasetInfo(
                builder=self, features=tfds.features.FeaturesDict(features), metadata=kept
            )

        def _split_generators(self, dl_manager):
            return {split: self._generate_examples(split) for split in splits}

        def _generate_examples(self, split):
            for number, example in enumerate(splits[split]):
                pictures = {
                    key: png(example[key])
                    for key, kind in features.items()
                    if isinstance(kind, tfds.features.Image)
                }
                yield example.get("id", number), example | pictures

    Toy.name = name
    Toy(data_dir=str(folder), file_format="array_record").download_and_prepare(
        download_dir=str(folder / "downloads")
    )

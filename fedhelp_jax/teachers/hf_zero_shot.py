"""Zero-shot image classification behind a Hugging Face inference endpoint, such as a CLIP.

References:
  https://huggingface.co/docs/inference-providers/tasks/zero-shot-image-classification
"""

import base64
import io
import json

import numpy as np
from PIL import Image

from fedhelp_jax.errors import UserError
from fedhelp_jax.teachers.foundation import Fingerprint, PublicImages
from fedhelp_jax.teachers.transport import Endpoint, Transport, version_name

# Of a score that was rounded to 0.
_LEAST_SCORE = 1e-7


class HuggingFaceZeroShot(Endpoint):
    """A model that scores images against candidate labels; one image a request.

    Its scores ``s`` are a softmax over the candidates, so ``log s`` are logits of the same
    distribution, the model's own up to a constant. Scores below 1e-7 count as 1e-7.

    Args:
      transport: The endpoint.
      model: Its name, for the record.
      version: Its revision, for the record.
      label_names: The candidate labels.
      template: Sentence that each candidate is put into, with ``{}`` for it; None leaves the
        endpoint's own.
    """

    batch_limit: int | None = 1

    def __init__(
        self,
        transport: Transport,
        model: str,
        version: str | None,
        label_names: tuple[str, ...],
        template: str | None,
    ):
        super().__init__(transport)
        self._labels, self._template = label_names, template
        how = f"PNG at native size, template {template or 'the endpoint’s own'}"
        self.fingerprint = Fingerprint(model, version_name(version), how, label_names)

    def answer(self, images: PublicImages) -> np.ndarray:
        """See `FoundationModel`."""
        return np.stack([self._scores(body) for body in self._bodies(images)])

    def request_bytes(self, images: PublicImages) -> int:
        """See `FoundationModel`."""
        return sum(len(body) for body in self._bodies(images))

    def _bodies(self, images: PublicImages) -> list[bytes]:
        parameters: dict[str, object] = {"candidate_labels": list(self._labels)}
        if self._template:
            parameters["hypothesis_template"] = self._template
        bodies = []
        for pixels in images.pixels:
            file = io.BytesIO()
            Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels).save(file, "PNG")
            encoded = base64.b64encode(file.getvalue()).decode()
            bodies.append(json.dumps({"inputs": encoded, "parameters": parameters}).encode())
        return bodies

    def _scores(self, body: bytes) -> np.ndarray:
        reply = self._transport.post("", body, {"Content-Type": "application/json"})
        try:
            rows = json.loads(reply.body)
            scores = {str(row["label"]): float(row["score"]) for row in rows}
        except (ValueError, TypeError, KeyError, RecursionError, OverflowError):
            said = self._transport.quote(reply.body)
            raise UserError(
                f"teacher.url: the answer is no list of labels and scores{said}"
            ) from None
        if set(scores) != set(self._labels) or len(rows) != len(scores):
            raise UserError(
                f"teacher.url: the answer scores {len(rows)} labels, not the {len(self._labels)} "
                "candidates that were sent"
            )
        values = np.array([scores[label] for label in self._labels])
        if not np.isfinite(values).all() or values.min() < 0 or abs(values.sum() - 1) > 0.01:
            raise UserError(
                f"teacher.url: the scores must be probabilities over the candidates, they add up "
                f"to {values.sum():g}"
            )
        return np.log(np.maximum(values, _LEAST_SCORE)).astype(np.float32)

"""Zero-shot image classifiers, such as CLIP, behind a Hugging Face inference endpoint.

References:
  https://huggingface.co/docs/inference-providers/tasks/zero-shot-image-classification
"""

import base64
import io
import json

import numpy as np
from PIL import Image

from fedhelp_jax.core.errors import UserError
from fedhelp_jax.teachers.base import Fingerprint, Images, check_public
from fedhelp_jax.teachers.http import Endpoint, Transport, version_name

# Stands for a score that was rounded to 0.
_LEAST_SCORE = 1e-7


class HuggingFaceZeroShot(Endpoint):
    """A model that scores images against candidate labels, one image per request.

    With ``scores="softmax"``, as for CLIP, the scores ``s`` are a softmax over the candidates.
    ``log s`` are then logits of the same distribution, equal to the model's own up to a constant.
    The scores may be rounded, so their sum may differ from 1 by the rounding error. With
    ``"sigmoid"``, as for SigLIP, each score is the sigmoid of its own logit, which is
    ``log s - log(1 - s)``. Scores below 1e-7 are raised to 1e-7; sigmoids above 1 - 1e-7 are
    lowered to that value.

    Args:
      transport: The endpoint.
      model: Name of the model, for the record.
      version: Revision of the model, for the record.
      label_names: The candidate labels.
      template: Sentence into which each candidate is inserted at ``{}``; None leaves the endpoint's
        own.
      scores: The kind of scores, ``"softmax"`` or ``"sigmoid"``.
    """

    batch_limit: int | None = 1

    def __init__(
        self,
        transport: Transport,
        model: str,
        version: str | None,
        label_names: tuple[str, ...],
        template: str | None,
        scores: str = "softmax",
    ):
        super().__init__(transport)
        self._labels, self._template, self._kind = label_names, template, scores
        how = f"PNG at native size, template {template or 'the endpoint’s own'}"
        if scores != "softmax":  # keeps the fingerprint of answers stored before this setting
            how += f", {scores} scores"
        self.fingerprint = Fingerprint(model, version_name(version), how, label_names)

    def answer(self, images: Images) -> np.ndarray:
        """See `FoundationModel`."""
        return np.stack([self._scores(body) for body in self._bodies(images)])

    def request_bytes(self, images: Images) -> int:
        """See `FoundationModel`."""
        return sum(len(body) for body in self._bodies(images))

    def _bodies(self, images: Images) -> list[bytes]:
        check_public(images)
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
        if not ((values >= 0) & (values <= 1)).all():
            raise UserError("teacher.url: the scores must be probabilities, each from 0 to 1")
        if self._kind == "sigmoid":
            values = np.clip(values, _LEAST_SCORE, 1 - _LEAST_SCORE)
            return (np.log(values) - np.log1p(-values)).astype(np.float32)
        if abs(values.sum() - 1) > _rounding(values):
            raise UserError(
                "teacher.url: the scores must be probabilities over the candidates, they add up "
                f"to {values.sum():g}; if the model scores each label by itself, as SigLIP does, "
                "set teacher.scores=sigmoid"
            )
        return np.log(np.maximum(values, _LEAST_SCORE)).astype(np.float32)


def _rounding(values: np.ndarray) -> float:
    """Returns how far the sum may be from 1: half a unit in the last digit per probability."""
    digits = next((d for d in range(2, 8) if np.allclose(values, values.round(d), 0, 1e-9)), 8)
    # Half-precision scores are not rounded to decimal digits.
    return max(0.01, len(values) * 0.5 * 10.0**-digits) + 1e-9

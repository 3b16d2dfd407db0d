"""Foundation models and their stored answers about public images, asked for only once."""

from typing import TYPE_CHECKING

import lazy_loader

__getattr__, __dir__, _names = lazy_loader.attach(
    __name__,
    submod_attrs={
        "answers": ["Answers", "from_logits", "load_answers", "save_answers"],
        "backends.simulated": ["simulated"],
    },
)

if TYPE_CHECKING:
    from fedhelp_jax.teachers.answers import Answers, from_logits, load_answers, save_answers
    from fedhelp_jax.teachers.backends.simulated import simulated

__all__ = ["Answers", "from_logits", "load_answers", "save_answers", "simulated"]

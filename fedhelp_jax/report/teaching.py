"""Console output of ``fedhelp teach``: the plan, progress, stored answers and their quality."""

import sys
import time

from rich import progress
from rich.console import Console

from fedhelp_jax.core.terminal import wrapped
from fedhelp_jax.report.console import duration
from fedhelp_jax.settings.schema import FoundationConfig
from fedhelp_jax.teachers.base import Fingerprint
from fedhelp_jax.teachers.query import Plan
from fedhelp_jax.typing import Record

_SECONDS_A_LINE = 5.0
_INDENT = 11


def print_plan(
    fingerprint: Fingerprint, config: FoundationConfig, plan: Plan, public_images: int
) -> None:
    """Prints what would be asked and what it would cost."""
    _say(f"teacher    {fingerprint}")
    _say(f"images     {public_images:,}, {plan.images:,} of them distinct")
    _say(f"known      {plan.known:,} in {config.store}")
    _say(f"to ask     {plan.to_ask:,} in {len(plan.batches):,} requests")
    sent = f"about {plan.bytes_out / 1e6:,.2f} MB" if plan.bytes_out else "nothing: it runs here"
    _say(f"to send    {sent if plan.to_ask else 'nothing'}")
    if config.price_per_query is not None:
        _say(f"cost       {plan.to_ask * config.price_per_query:,.2f}, tries not counted")
    if config.max_queries is not None:
        _say(f"budget     {plan.sent_before:,} of {config.max_queries:,} images sent so far")


def print_stored(name: str, store: str = "", sent: int = 0, truncation_kl: float = 0.0) -> None:
    """Prints where a model's answers are stored, the images sent, and the nats lost by storing."""
    if not store:
        _say(f"teacher    {name}: there is nothing to ask")
        return
    _say(f"stored     in {store}; {sent:,} images asked about so far, tries counted")
    if truncation_kl:
        _say(f"lost       {truncation_kl:.2g} nats an image by storing less than float32 logits")


def print_agreement(fingerprint: str, public: str, found: Record) -> None:
    """Prints how well the answers agree with the public labels."""
    _say(f"answers    {found['images']:,} over {found['classes']:,} classes, of {fingerprint}")
    if found["look_like_probabilities"]:
        _say("warning    these look like probabilities; name the output before the softmax")
    if "dice" in found:
        _say(f"agreement  with the masks of {public}: Dice {found['dice']:.3f}")
        return
    if "top_1" not in found:
        _say(f"agreement  not measured: {found.get('note', '')}")
        return
    how = " by a linear probe, as its classes are others" if found["probed"] else ""
    _say(
        f"agreement  with the labels of {public}{how}: top-1 {found['top_1']:.3f} (the most "
        f"frequent label alone {found['chance']:.3f}), calibration error {found['ece']:.3f}, "
        f"loss {found['loss']:.3f} nats"
    )
    if found["top_1"] <= found["chance"] + 1e-6 and found["images"] >= 100:
        _say("warning    these answers say nothing about the labels; is it the right model?")


class AskingProgress:
    """Shows the images answered, the rate and the remaining time; a context manager.

    In a terminal this is one live line; elsewhere it is a plain line every few seconds.
    """

    def __init__(self, total: int):
        self._total, self._done = total, 0
        self._console = Console(file=sys.stdout, highlight=False)
        self._started = self._shown = time.monotonic()
        self._live: progress.Progress | None = None
        self._task = progress.TaskID(0)

    def __enter__(self) -> "AskingProgress":
        """Starts the display."""
        if self._console.is_terminal:
            self._live = progress.Progress(
                progress.TextColumn("asking"),
                progress.BarColumn(bar_width=20),
                progress.TextColumn("{task.description}"),
                console=self._console,
            )
            self._task = self._live.add_task("", total=self._total)
            self._live.start()
        return self

    def __exit__(self, *exception: object) -> None:
        """Ends the display; after an error, prints how many answers are kept."""
        if self._live is not None:
            self._live.stop()
        if exception[0] is not None:
            _say(f"kept       {self._done:,} answers of {self._total:,}; the same command goes on")

    def advance(self, images: int) -> None:
        """Shows that ``images`` more images are answered and stored."""
        self._done += images
        now = time.monotonic()
        rate = self._done / max(now - self._started, 1e-9)
        left = duration((self._total - self._done) / rate)
        text = f"{self._done:,}/{self._total:,} images  {rate:.1f}/s  left {left}"
        if self._live is not None:
            self._live.update(self._task, completed=self._done, description=text)
        elif self._done == self._total or now - self._shown >= _SECONDS_A_LINE:
            self._shown = now
            _say(f"asking     {text}")

    @staticmethod
    def note_waiting(store: str) -> None:
        """Prints that another process is asking the same model."""
        _say(f"waiting    another fedhelp teach asks this model for {store}")


def _say(text: str) -> None:
    print(wrapped(text, sys.stdout, indent=_INDENT), flush=True)

"""Defines commands with their flags, parses command lines, and prints help."""

import shutil
import textwrap
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from absl import flags

from fedhelp_jax.core.errors import UserError, suggest
from fedhelp_jax.settings.checks import LOCAL

_WIDEST = 100
_SETTINGS = "--config."


class Flag(NamedTuple):
    """A flag of a command.

    Attributes:
      name: Name of the flag; on the command line, underscores may be written as hyphens.
      about: Help text.
      kind: "text", "folder", "switch", "number" or "many" (text, given any number of times).
      value: Placeholder for the value in the help.
      choices: The allowed values of a text flag; the first is the default.
      least: Minimum of a number.
      most: Maximum of a number.
      needed: An example value if the flag is required; else empty.
      short: One letter that a switch may be called too, after a single hyphen; else empty.
    """

    name: str
    about: str
    kind: str = "text"
    value: str = ""
    choices: tuple[str, ...] = ()
    least: int | None = None
    most: int | None = None
    needed: str = ""
    short: str = ""


class Command(NamedTuple):
    """A command.

    Attributes:
      name: Name of the command, one or two words.
      about: What the command does, in one sentence.
      examples: Complete command lines.
      run: A function of the `Given` arguments that runs the command and returns its exit code.
      flags: The command's own flags.
      settings: Whether the command also takes ``--config.KEY=VALUE``.
      arguments: Placeholder in the help for positional arguments; empty if there are none.
      more: Further help text, below the flags.
    """

    name: str
    about: str
    examples: tuple[str, ...]
    run: Callable[["Given"], int]
    flags: tuple[Flag, ...] = ()
    settings: bool = False
    arguments: str = ""
    more: str = ""


class Given(NamedTuple):
    """The parsed command line: the values of flags by name, and the remaining words."""

    values: dict[str, Any]
    rest: list[str]

    def __getitem__(self, name: Any) -> Any:
        return self.values[name]


CONFIG = Flag(
    "config",
    "a Python file with get_config(), which returns the settings",
    value="FILE.py[:ARGUMENT]",
    needed="configs/quickstart.py",
)
STUDY = Flag(
    "study",
    "a Python file with get_study()",
    value="FILE.py[:ARGUMENT]",
    needed="configs/studies/miniature.py",
)
OUTPUT = (
    Flag("quiet", "print nothing but warnings and errors", "switch", short="q"),
    Flag(
        "verbose",
        "also tell what is read, compiled and saved, and where in the code an error arose",
        "switch",
        short="v",
    ),
)
DISTRIBUTED = (
    Flag(
        "distributed",
        "one of many processes, on one host or many, that share the folder and run the same "
        "command",
        "switch",
    ),
    Flag(
        "coordinator_address",
        "HOST:PORT of process 0, which all can reach; this and the next two are left out where JAX "
        "finds them itself: SLURM, Open MPI, GKE, TPU pods",
        value="HOST:PORT",
    ),
    Flag("num_processes", "how many processes there are", "number", "N", least=1),
    Flag("process_id", "which one this is, from 0", "number", "I", least=0),
    Flag(
        "heartbeat_timeout",
        "seconds without a sign of life after which a process counts as lost: 60",
        "number",
        "SECONDS",
        least=1,
        most=90,
    ),
)


def workdir(about: str, example: str) -> Flag:
    """Returns the flag for a command's folder."""
    return Flag("workdir", about, "folder", "FOLDER", needed=example)


def read(command: Command, arguments: Sequence[str]) -> Given:
    """Parses a command line with its own set of flags, so that calls share no state.

    Raises:
      UserError: If a flag is unknown, missing or invalid, or there is an unexpected argument.
    """
    found = flags.FlagValues()
    found.set_gnu_getopt(True)
    for flag in command.flags:
        _define(flag, found)
    try:
        rest = found(["fedhelp", *_underscored(command, arguments)], known_only=True)[1:]
    except flags.Error as error:
        raise UserError(str(error)) from None
    own = [f"--{flag.name}" for flag in command.flags]
    settings = ("--config.", "--noconfig.") if command.settings else ()
    for word in rest:
        if word.startswith("-") and word != "--" and not word.startswith(settings):
            name = word.split("=", 1)[0]
            raise UserError(
                f"{name} is not a flag of fedhelp {command.name}{suggest(name, own)}; see fedhelp "
                f"{command.name} --help"
            )
        if not word.startswith("-") and not command.arguments:
            raise UserError(f"{word!r} is one argument too many; flags are --name=value")
    values = {flag.name: found[flag.name].value for flag in command.flags}
    for flag in command.flags:
        _check(flag, values[flag.name])
    return Given(values, rest)


def help_of(command: Command) -> str:
    """Returns the help of a command: examples first, then its flags, then the settings."""
    title = textwrap.wrap(f"fedhelp {command.name}: {command.about}", width())
    lines = [*title, "", *_usage(command), "", "examples:"]
    lines += [line for text in command.examples for line in example(text, 2)]
    if command.flags:
        lines += ["", "flags:"]
        for flag in command.flags:
            short = f"-{flag.short}, " if flag.short else ""
            lines += _described(short + _shown(flag), _about(flag))
    if command.more:
        lines += ["", *textwrap.wrap(command.more, width())]
    if command.settings:
        from fedhelp_jax.experiments.config import describe

        lines += ["", "settings, with their defaults:"]
        for key, default, about in describe():
            lines += _described(f"{_SETTINGS}{key}={default}", about)
    return "\n".join(lines) + "\n"


def width() -> int:
    """Returns the width of the terminal, but at most 100."""
    return min(_WIDEST, shutil.get_terminal_size((_WIDEST, 24)).columns)


def example(text: str, indent: int) -> list[str]:
    """Returns the lines of a command, with those too long for the terminal continued in others."""
    fold = textwrap.TextWrapper(
        width() - indent - len(" \\"),
        subsequent_indent="    ",
        break_long_words=False,
        break_on_hyphens=False,
    )
    folded = (" \\\n".join(fold.wrap(line)) for line in text.split("\n"))
    return textwrap.indent("\n".join(folded), " " * indent).split("\n")


def _define(flag: Flag, values: flags.FlagValues) -> None:
    if flag.kind == "switch":
        short = flag.short or None
        flags.DEFINE_bool(flag.name, False, flag.about, flag_values=values, short_name=short)
    elif flag.kind == "number":
        flags.DEFINE_integer(flag.name, None, flag.about, flag.least, flag.most, flag_values=values)
    elif flag.kind == "many":
        flags.DEFINE_multi_string(flag.name, [], flag.about, flag_values=values)
    elif flag.choices:
        choices = list(flag.choices)
        flags.DEFINE_enum(flag.name, choices[0], choices, flag.about, flag_values=values)
    else:
        flags.DEFINE_string(flag.name, None, flag.about, flag_values=values)


def _underscored(command: Command, arguments: Sequence[str]) -> list[str]:
    """Returns the words of a line, with the command's own flags spelt as they are defined."""
    known = {flag.name for flag in command.flags}
    changed = []
    for word in arguments:
        name, equals, value = word.partition("=")
        spelt = name.lstrip("-").replace("-", "_")
        if name.startswith("--") and {spelt, spelt.removeprefix("no")} & known:
            word = f"--{spelt}{equals}{value}"
        changed.append(word)
    return changed


def _check(flag: Flag, value: Any) -> None:
    if flag.needed and not value:
        raise UserError(f"--{flag.name} is missing; e.g. --{flag.name}={flag.needed}")
    # For s3://..., a local folder called s3: would be created.
    if flag.kind == "folder" and value and not LOCAL.passes(value):
        raise UserError(f"--{flag.name}={value} must be {LOCAL.right}")


def _shown(flag: Flag) -> str:
    if flag.kind == "switch":
        return f"--{flag.name}"
    return f"--{flag.name}={'|'.join(flag.choices) or flag.value or flag.name.upper()}"


def _about(flag: Flag) -> str:
    return f"{flag.about}; {flag.choices[0]} if left out" if flag.choices else flag.about


def _usage(command: Command) -> list[str]:
    parts = [_shown(flag) if flag.needed else f"[{_shown(flag)}]" for flag in command.flags]
    parts += [command.arguments] if command.arguments else []
    parts += [f"[{_SETTINGS}KEY=VALUE ...]"] if command.settings else []
    start = f"usage: fedhelp {command.name} "
    lines, line = [], start
    for part in parts:
        if len(line) + len(part) > width() and line.strip():
            lines.append(line.rstrip())
            line = " " * len(start)
        line += f"{part} "
    return [*lines, line.rstrip()]


def _described(name: str, about: str) -> list[str]:
    """Returns lines with a name and its help text, beside or below it."""
    indent = min(34, width() // 2)
    text = textwrap.wrap(about, width() - indent) or [""]
    first = f"  {name}"
    if len(first) < indent - 1:
        head = [f"{first:<{indent}}{text[0]}"]
        text = text[1:]
    else:
        head = [first]
    return head + [" " * indent + line for line in text]

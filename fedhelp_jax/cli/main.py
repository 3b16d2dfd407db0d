"""The command ``fedhelp``, which turns errors into exit codes.

0: success. 2: an error that the user can fix, reported in one line on stderr. 1: a failed run,
reported in one line, or a bug, with its traceback. 3: another process of a distributed run is lost.
130: interrupted, after the run was saved.

Heavy modules are imported only when needed, so that ``fedhelp --help`` is fast and the number of
CPU devices can be set before JAX starts.
"""

import sys
import textwrap
import traceback
from collections.abc import Sequence

from fedhelp_jax.cli.command import Command, example, help_of, read, width
from fedhelp_jax.cli.data import CHECK, DATA_LIST, DESCRIBE, PREPARE
from fedhelp_jax.cli.process import as_loud_as_asked, complain, printed
from fedhelp_jax.cli.report import REPORT
from fedhelp_jax.cli.show import LIST, SHOW
from fedhelp_jax.cli.study import COMPARE, TUNE
from fedhelp_jax.cli.sweep import SWEEP
from fedhelp_jax.cli.teach import TEACH
from fedhelp_jax.cli.train import EVALUATE, TRAIN
from fedhelp_jax.cli.verdict import VERDICT
from fedhelp_jax.core.errors import Failure, UserError, suggest
from fedhelp_jax.core.storage import StorageError, storage_errors
from fedhelp_jax.core.terminal import dispensable_terminal

COMMANDS: tuple[Command, ...] = (
    *(TRAIN, TEACH, EVALUATE, SHOW, REPORT, VERDICT, COMPARE, TUNE, SWEEP),
    *(LIST, DATA_LIST, DESCRIBE, PREPARE, CHECK),
)
_HELP = ("--help", "-h", "-help")


def main_entry() -> None:
    """Runs the command line of this process and exits with its code."""
    sys.exit(main(sys.argv))


def main(argv: Sequence[str]) -> int:
    """Runs one command and returns its exit code; may be called many times in a process.

    Args:
        argv: program name, command and flags, as in `sys.argv`.
    """
    with dispensable_terminal():
        return _exit_code(list(argv))


def _exit_code(argv: list[str]) -> int:
    try:
        with storage_errors():
            return _command(argv[1:])
    except StorageError as error:
        complain(f"{error}; what was saved before is kept, and the same command goes on from it")
        return 2
    except UserError as error:
        complain(str(error))
        return 2
    except Failure as error:
        complain(str(error))
        return 1
    except KeyboardInterrupt:
        complain("interrupted")
        return 130
    except Exception as error:
        # NumPy and XLA raise these errors, with the size, when an allocation fails.
        if isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error):
            complain(
                f"out of memory ({str(error).splitlines()[0] if str(error) else 'no size is told'})"
                "; smaller batches, images or networks need less"
            )
            return 2
        traceback.print_exc()
        return 1


def _command(words: list[str]) -> int:
    if words[:1] == ["--version"]:
        from fedhelp_jax import __version__

        print(f"fedhelp_jax {__version__}")
        return printed()
    asked = any(word in _HELP for word in words)
    named = [word for word in words[:2] if not word.startswith("-")]
    found = [c for c in COMMANDS if c.name.split() == named[: len(c.name.split())]]
    if len(found) == 1:
        command = found[0]
        if asked:
            print(help_of(command), end="")
            return printed()
        given = read(command, words[len(command.name.split()) :])
        with as_loud_as_asked(given):
            return command.run(given)
    group = [c for c in COMMANDS if named and c.name.split()[0] == named[0]]
    if asked or words[:1] == ["help"]:
        print(_overview(group or COMMANDS), end="")
        return printed()
    names = list(dict.fromkeys(c.name.split()[0] for c in COMMANDS))
    if group:
        kinds = ", ".join(c.name.split()[1] for c in group)
        raise UserError(f"fedhelp {named[0]} takes one of {kinds}; see fedhelp {named[0]} --help")
    said = f"{words[0]!r} is not a command" if words else "no command is given"
    hint = suggest(words[0], names) if words else ""
    raise UserError(f"{said}; it is one of {', '.join(names)}{hint} (see fedhelp --help)")


def _overview(commands: Sequence[Command]) -> str:
    group = {command.name.partition(" ")[0] for command in commands}
    name = f"{group.pop()} COMMAND" if len(group) == 1 else "COMMAND"
    lines = [f"usage: fedhelp {name} [--flag=value ...]", ""]
    for command in commands:
        title = f"fedhelp {command.name}: {command.about}"
        lines += textwrap.wrap(title, width(), subsequent_indent="  ")
        lines += example(command.examples[0], 4)
    lines += ["", f"fedhelp {name} --help shows its flags; fedhelp --version the version."]
    return "\n".join(lines) + "\n"

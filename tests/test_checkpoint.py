import logging
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedhelp_jax.core.errors import UserError
from fedhelp_jax.experiments.checkpoint import Checkpointer


class State(NamedTuple):
    count: Any
    moments: Any


def make_state(seed: int):
    rng = np.random.default_rng(seed)
    return {
        "params": {"conv": {"kernel": jnp.asarray(rng.normal(size=(3, 3, 4)), jnp.float32)}},
        "opt": (
            State(jnp.int32(seed), (rng.normal(size=5), np.float32(np.nan))),
            State(np.int32(-1), ()),
        ),
        "key": jnp.asarray(rng.integers(0, 2**32, 2), jnp.uint32),
        "done": np.array([True, False, True]),
        "nobody": np.zeros((0, 4), np.int32),
        "half": jnp.asarray(rng.normal(size=3), jnp.bfloat16),
        "none": None,
    }


def assert_same(ours, theirs):
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        a = np.asarray(a)
        assert isinstance(b, np.ndarray)
        assert (a.dtype, a.shape) == (b.dtype, b.shape)
        assert a.tobytes() == b.tobytes()


def save(folder: Path, *rounds: int) -> None:
    checkpointer = Checkpointer(folder)
    for round in rounds:
        checkpointer.save(round, make_state(round), {"round": round, "text": "ä"})
    checkpointer.close()


def restore(folder: Path):
    checkpointer = Checkpointer(folder)
    try:
        return checkpointer.restore_latest(jax.eval_shape(lambda: make_state(0)))
    finally:
        checkpointer.close()


def restored(folder: Path) -> tuple[int, Any, dict]:
    found = restore(folder)
    assert found is not None
    return found


def rounds_in(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir() if path.name.isdigit()}


@pytest.fixture(autouse=True)
def with_float64():
    """The state holds a float64 leaf, which `eval_shape` would make float32 without this."""
    with jax.enable_x64(True):
        yield


def test_round_trip_is_bit_exact(tmp_path):
    save(tmp_path / "c", 3)
    round, state, meta = restored(tmp_path / "c")
    assert round == 3
    assert meta == {"round": 3, "text": "ä"}
    assert_same(make_state(3), state)


def test_nothing_saved_is_nothing_restored(tmp_path):
    assert restore(tmp_path / "c") is None


def test_the_last_two_are_kept(tmp_path):
    save(tmp_path / "c", 1, 2, 3, 4)
    assert rounds_in(tmp_path / "c") == {"3", "4"}


def largest_data_file(checkpoint: Path) -> Path:
    files = [path for path in (checkpoint / "state").rglob("d/*") if path.is_file()]
    return max(files, key=lambda path: path.stat().st_size)


def truncate(checkpoint: Path) -> None:
    file = largest_data_file(checkpoint)
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def flip_a_byte(checkpoint: Path) -> None:
    file = largest_data_file(checkpoint)
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 0x10
    file.write_bytes(bytes(data))


def flip_a_byte_of_meta(checkpoint: Path) -> None:
    file = checkpoint / "envelope" / "metadata"
    file.write_bytes(file.read_bytes().replace(b'"round": 2', b'"round": 3'))


def delete_a_file(checkpoint: Path) -> None:
    largest_data_file(checkpoint).unlink()


def delete_the_metadata(checkpoint: Path) -> None:
    (checkpoint / "state" / "_METADATA").unlink()


def delete_the_state(checkpoint: Path) -> None:
    shutil.rmtree(checkpoint / "state")


def delete_the_sums(checkpoint: Path) -> None:
    (checkpoint / "SHA256SUMS").unlink()


def empty_the_sums(checkpoint: Path) -> None:
    (checkpoint / "SHA256SUMS").write_text("")


def empty_the_folder(checkpoint: Path) -> None:
    shutil.rmtree(checkpoint)
    checkpoint.mkdir()


DAMAGES = [
    truncate,
    flip_a_byte,
    flip_a_byte_of_meta,
    delete_a_file,
    delete_the_metadata,
    delete_the_state,
    delete_the_sums,
    empty_the_sums,
    empty_the_folder,
]


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_the_one_before_a_corrupt_newest_is_used(tmp_path, caplog, damage):
    folder = tmp_path / "c"
    save(folder, 1, 2)
    damage(folder / "2")
    with caplog.at_level(logging.WARNING, logger="fedhelp_jax"):
        round, state, meta = restored(folder)
    assert (round, meta["round"]) == (1, 1)
    assert_same(make_state(1), state)
    warnings = [r for r in caplog.records if r.name.startswith("fedhelp_jax")]
    assert len(warnings) == 1
    message = warnings[0].getMessage()
    assert str(folder / "1") in message and str(folder / "2") in message
    assert "\n" not in message


def test_every_single_damaged_file_is_harmless_or_noticed(tmp_path):
    """Whichever file is cut or has a byte changed, what is restored is a state that was saved."""
    source = tmp_path / "source"
    save(source, 1, 2)
    names = [path.relative_to(source) for path in (source / "2").rglob("*") if path.is_file()]
    assert len(names) > 5
    for name in names:
        folder = tmp_path / "damaged"
        shutil.copytree(source, folder)
        data = bytearray((folder / name).read_bytes())
        if not data:
            continue
        data[len(data) // 2] ^= 0xFF
        (folder / name).write_bytes(bytes(data))
        round, state, _ = restored(folder)
        assert_same(make_state(round), state)
        shutil.rmtree(folder)


def test_a_round_whose_checkpoint_was_corrupt_can_be_saved_again(tmp_path):
    folder = tmp_path / "c"
    save(folder, 1, 2)
    truncate(folder / "2")
    checkpointer = Checkpointer(folder)
    checkpointer.restore_latest(jax.eval_shape(lambda: make_state(0)))
    checkpointer.save(2, make_state(2), {"round": 2})
    checkpointer.save(3, make_state(3), {"round": 3})
    checkpointer.close()
    assert rounds_in(folder) == {"2", "3"}
    round, state, _ = restored(folder)
    assert round == 3
    assert_same(make_state(3), state)


def test_all_corrupt_is_for_the_user_to_mend(tmp_path):
    folder = tmp_path / "c"
    save(folder, 1, 2)
    truncate(folder / "1")
    truncate(folder / "2")
    with pytest.raises(UserError, match="--overwrite") as error:
        restore(folder)
    assert "\n" not in str(error.value)
    assert rounds_in(folder) == {"1", "2"}, "nothing is thrown away"


def test_another_state_is_refused_by_the_name_of_the_leaf(tmp_path):
    save(tmp_path / "c", 1)
    checkpointer = Checkpointer(tmp_path / "c")
    template = make_state(0) | {"done": np.zeros(4, bool)}
    with pytest.raises(UserError, match="done"):
        checkpointer.restore_latest(template)
    checkpointer.close()


def test_what_a_killed_run_was_writing_is_no_checkpoint(tmp_path):
    folder = tmp_path / "c"
    save(folder, 1, 2)
    (folder / "3.orbax-checkpoint-tmp-17" / "state").mkdir(parents=True)
    (folder / "4.orbax-checkpoint-tmp").mkdir()
    (folder / "notes.txt").write_text("mine")
    assert restored(folder)[0] == 2
    save(folder, 3)
    assert restored(folder)[0] == 3
    assert (folder / "notes.txt").exists()


def test_reading_changes_nothing_that_another_process_writes(tmp_path):
    folder = tmp_path / "c"
    save(folder, 1, 2)
    (folder / "3.orbax-checkpoint-tmp" / "state").mkdir(parents=True)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    checkpointer = Checkpointer(folder, read_only=True)
    found = checkpointer.restore_latest(jax.eval_shape(lambda: make_state(0)))
    checkpointer.close()
    assert found is not None and found[0] == 2
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before

"""Segmentation data from .npz files: images or volumes with masks, split among clients."""

from collections.abc import Sequence

import numpy as np

from fedhelp_jax.core.errors import UserError
from fedhelp_jax.data.bad_examples import Bad, BadExample
from fedhelp_jax.data.partition.fractions import partition, rng_for, split_validation
from fedhelp_jax.data.readers.images import existing_path, resize_arrays
from fedhelp_jax.data.readers.masks import stored_names, take_masks
from fedhelp_jax.data.readers.npz import (
    WITH_MASKS,
    read_npz,
    take_labels,
    take_pictures,
)
from fedhelp_jax.data.readers.volumes import resize_volumes
from fedhelp_jax.data.readers.volumes import scanner_shift as shift_scanner
from fedhelp_jax.data.types import ClientSplit, FederatedDataset


def load_npz_masks(
    path: str | None,
    *,
    fractions: Sequence[float],
    split_by: str | None,
    image_size: int,
    volume_size: tuple[int, ...],
    validation_fraction: float,
    test_fraction: float,
    max_train: int | None,
    scanner_shift: bool,
    seed: int,
    bad: Bad | None = None,
) -> FederatedDataset:
    """Returns images or volumes with masks, split among clients.

    The file has these arrays:

    - `images`, uint8 [N, H, W] or [N, H, W, 3], or `volumes`, uint8 [N, D, H, W];
    - `masks` or `labels`, whose resolution may differ from that of the images;
    - optionally `label_names` (one foreground class, or the background and the other classes),
      `names` (for messages), `site` (integers) and `site_names`.

    Args:
        path: `data.path`, the file.
        fractions: Each client's share with `split_by="fractions"`; positive, with sum 1.
        split_by: "fractions" assigns the examples at random to `client_0`, ...; "site" makes one
            client per site, named after the site or `site_<k>`. None means "site" if there are
            sites, otherwise "fractions".
        image_size: Height and width of the images.
        volume_size: Sides of the volumes.
        validation_fraction: Share of a client's training examples held out for validation.
        test_fraction: Share of a client's examples used for testing, at least one example.
        max_train: Maximum number of training examples per client; None keeps all.
        scanner_shift: Whether each client gets its own SIMULATED scanner; volumes only.
        seed: The run's seed.
        bad: Collects masks that cannot be used; None raises an error for the first.

    Raises:
        UserError: The file is missing or not as described, or a value is invalid.

    Notes:
        The files hold no patient ids, so splits are by example. If a patient has several examples,
        the splits leak.
    """
    bad = bad or Bad()
    file = existing_path(path, "data.path", "an .npz file with images or volumes and masks")
    where = f"data.path: {file}"
    arrays = read_npz(file, "data.path", WITH_MASKS)
    pictures, volumes = take_pictures(arrays, where)
    if scanner_shift and not volumes:
        raise UserError(f"data.scanner_shift is for volumes; {file} has images")
    taken = take_masks(arrays, file, len(pictures), volumes=volumes, where=where, bad=bad)
    if taken is None:
        raise UserError(f"{where} has no masks; it must have one per example, as masks or labels")
    masks, label_names = taken
    split_by = split_by or ("site" if "site" in arrays else "fractions")
    owners: list[str] = []
    if split_by == "site":
        site, site_names = _sites(arrays, len(pictures), where)
        owners = [site_names[number] for number in site.tolist()]
    bad.check(len(pictures), where)
    examples = stored_names(arrays, "names", where)

    def describe(place: int) -> BadExample:
        example = f"example {place}" if examples is None else examples[place]
        return BadExample("", owners[place] if owners else "", example, file.name)

    left_out = bad.listed(describe)
    left_out_pictures = bad.dropped(pictures)
    pictures, masks = bad.drop(pictures), bad.drop(masks)
    if split_by == "site":
        members = _by_site(bad.drop(site), site_names, where)
    elif split_by == "fractions":
        members = _by_fractions(len(pictures), fractions, seed)
    else:
        raise UserError(f"data.split_by must be fractions or site, got {split_by!r}")
    clients = tuple(
        _split(
            name,
            indices,
            test_fraction=test_fraction,
            validation_fraction=validation_fraction,
            max_train=max_train,
            seed=seed,
            client=number,
        )
        for number, (name, indices) in members.items()
    )
    if scanner_shift:
        shifted = np.empty_like(pictures)
        for number, (_, indices) in members.items():
            shifted[indices] = shift_scanner(pictures[indices], seed, number)
        pictures = shifted

    def resized(pictures: np.ndarray) -> np.ndarray:
        if volumes:
            return resize_volumes(pictures, volume_size)
        return resize_arrays(pictures, image_size)

    return FederatedDataset(
        # Simulated differences are disclosed wherever the name of the data appears.
        name=f"{file.stem}_simulated_scanners" if scanner_shift else file.stem,
        synthetic=False,
        images=resized(pictures),
        labels=masks,
        label_names=label_names,
        clients=clients,
        left_out=left_out,
        left_out_images=None if left_out_pictures is None else resized(left_out_pictures),
    )


def _by_fractions(
    total: int, fractions: Sequence[float], seed: int
) -> dict[int, tuple[str, np.ndarray]]:
    """Returns name and sorted examples of each client, by its number, assigned at random."""
    # Every client needs one example for training and one for testing.
    parts = partition(total, fractions, rng_for(seed, "npz_masks"), minimum=2)
    return {number: (f"client_{number}", part) for number, part in enumerate(parts)}


def _sites(
    arrays: dict[str, np.ndarray], total: int, where: str
) -> tuple[np.ndarray, tuple[str, ...]]:
    """Returns the number of each example's site, and the sites' names."""
    if "site" not in arrays:
        raise UserError(f"{where} has no array site, which data.split_by=site needs")
    site = take_labels(arrays, "site", total, where)
    names = stored_names(arrays, "site_names", where)
    if names is None:
        names = tuple(f"site_{number}" for number in range(site.max() + 1))
    elif len(set(names)) < len(names) or len(names) <= site.max():
        raise UserError(
            f"{where}: site_names must be different names of the sites 0..{site.max()}, got {names}"
        )
    return site, names


def _by_site(
    site: np.ndarray, names: Sequence[str], where: str
) -> dict[int, tuple[str, np.ndarray]]:
    """Returns name and sorted examples of each client, by the number of its site."""
    members = {}
    for number in np.unique(site).tolist():
        members[number] = (names[number], np.flatnonzero(site == number))
        if len(members[number][1]) < 2:
            raise UserError(
                f"{where}: site {names[number]} has one example; a client needs at least two, "
                f"one to train on and one to test on"
            )
    return members


def _split(
    name: str,
    indices: np.ndarray,
    *,
    test_fraction: float,
    validation_fraction: float,
    max_train: int | None,
    seed: int,
    client: int,
) -> ClientSplit:
    """Returns one client's examples, assigned at random to its three splits."""
    order = rng_for(seed, "npz_masks test", client).permutation(indices)
    num_test = min(max(1, round(len(order) * test_fraction)), len(order) - 1)
    train = np.sort(order[num_test:])
    train, validation = split_validation(
        train,
        train,
        validation_fraction=validation_fraction,
        max_train=max_train,
        seed=seed,
        client=client,
    )
    return ClientSplit(name, train, validation, np.sort(order[:num_test]).astype(np.int32))

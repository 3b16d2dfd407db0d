"""U-Nets of both ranks: shapes, sizes, normalisations, masks, memory."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedhelp_jax.models.model import apply_model
from fedhelp_jax.models.unet import UNETS, UNetSize, unet

TINY = UNetSize((2, 3, 4), 2)
IMAGES = {2: (10, 7, 3), 3: (6, 5, 9, 1)}  # four divides no side


def network(rank, norm="batch", num_classes=2, remat=False):
    model = unet(TINY, num_classes, norm=norm, remat=remat)
    variables = jax.jit(model.init, static_argnums=1)(jax.random.key(0), IMAGES[rank])
    return model, variables, jax.random.normal(jax.random.key(1), (3, *IMAGES[rank]))


def num_params(size, rank):
    """By hand: convolutions with a normalisation's two numbers a channel, growing ones, no head."""
    total, before = 0, IMAGES[rank][-1]
    down = list(size.widths)
    for width in down:
        for _ in range(size.convs):
            total += 3**rank * before * width + 2 * width
            before = width
    for width in down[-2::-1]:
        total += 2**rank * before * width + width
        before = 2 * width
        for _ in range(size.convs):
            total += 3**rank * before * width + 2 * width
            before = width
    return total


@pytest.mark.slow
@pytest.mark.parametrize("rank", [2, 3])
@pytest.mark.parametrize("name", UNETS)
def test_the_sizes_by_name(name, rank):
    model = unet(UNETS[name], 1)
    shapes = jax.eval_shape(lambda key: model.init(key, IMAGES[rank]), jax.random.key(0))
    leaves = jax.tree.leaves(shapes["params"]["features"])
    assert sum(leaf.size for leaf in leaves) == num_params(UNETS[name], rank)
    assert shapes["params"]["head"]["kernel"].shape == (UNETS[name].widths[0], 1)


def test_the_papers_widths_and_the_names_in_the_settings():
    assert UNETS["unet_small"] == ((64, 128, 256, 512, 1024), 2)
    assert UNETS["unet_large"] == ((128, 256, 512, 1024, 2048), 3)


@pytest.mark.slow
@pytest.mark.parametrize("norm", ["batch", "group", "none"])
@pytest.mark.parametrize("rank", [2, 3])
def test_a_map_of_the_images_own_size(rank, norm):
    model, variables, x = network(rank, norm)
    logits, stats = jax.jit(lambda v, x: apply_model(model, v, x, train=True))(variables, x)
    assert logits.shape == (3, *IMAGES[rank][:-1], 2)
    assert np.isfinite(logits).all() and np.std(logits) > 0
    assert bool(stats) == (norm == "batch")
    if norm == "batch":
        changed = [
            not np.array_equal(a, b)
            for a, b in zip(
                jax.tree.leaves(stats), jax.tree.leaves(variables["batch_stats"]), strict=True
            )
        ]
        assert all(changed)


def test_a_side_is_padded_with_its_border_and_cropped_again():
    """As if the user had padded: 10x7 to 12x8 with the border's values, evenly, the rest after."""
    model, variables, x = network(2)
    padded = jnp.pad(x, [(0, 0), (1, 1), (0, 1), (0, 0)], mode="edge")
    run = jax.jit(lambda x: apply_model(model, variables, x)[0])
    np.testing.assert_allclose(run(x), run(padded)[:, 1:11, :7], rtol=1e-5, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("norm", ["batch", "group"])
def test_examples_beyond_the_mask_change_nothing(norm):
    model, variables, x = network(2, norm)
    mask = jnp.array([True, True, False])
    run = jax.jit(lambda x: apply_model(model, variables, x, train=True, mask=mask))
    (logits, stats), (others, other_stats) = run(x), run(x.at[2].set(7.0))
    np.testing.assert_allclose(logits[:2], others[:2], rtol=1e-5, atol=1e-6)
    jax.tree.map(np.testing.assert_array_equal, stats, other_stats)


@pytest.mark.slow
@pytest.mark.parametrize("rank", [2, 3])
def test_rematerialisation_keeps_less_and_changes_nothing(rank):
    grads, kept = [], []
    for remat in (False, True):
        model, variables, x = network(rank, remat=remat)

        def loss(params, stats, x, model=model):
            logits, stats = apply_model(
                model, {"params": params, "batch_stats": stats}, x, train=True
            )
            return jnp.mean(logits**2), stats

        given = variables["params"], variables["batch_stats"], x
        grads.append(jax.jit(jax.grad(loss, has_aux=True))(*given))
        # The function that goes backward holds what was kept of the way forward.
        pull = jax.eval_shape(
            lambda *args, loss=loss: jax.vjp(loss, *args, has_aux=True)[1], *given
        )
        kept.append(sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(pull)))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), *grads)
    assert kept[1] < 0.5 * kept[0]


@pytest.mark.parametrize(
    ("size", "norm", "words"),
    [
        (TINY, "layer", "norm must be one of batch, group, none, got 'layer'"),
        (UNetSize((), 2), "batch", "widths"),
        (UNetSize((4, 0), 2), "batch", "widths"),
        (UNetSize((4, 8), 0), "batch", "convolutions"),
        (UNetSize((4, 12), 2), "group", "multiples of 8"),
    ],
)
def test_other_sizes_are_refused(size, norm, words):
    with pytest.raises(ValueError, match=words):
        unet(size, 1, norm=norm)

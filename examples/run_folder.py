"""The same as ``fedhelp train``, from Python and with a callback."""

import fedhelp_jax as fh

config = fh.default_config()
config.rounds, config.batch_size = 5, 16
config.data.num_examples, config.data.image_size = 400, 16
config.public.num_examples = 32
config.model.small, config.model.large = "cnn_small", "cnn_large"
config.algorithm.name = "fedhelp"


def stop_when_good(round, metrics, state):
    """Prints each round, and ends the run once the small clients' mean score exceeds 0.9."""
    print(f"round {round}: loss {metrics['loss']:.3f}")
    return (metrics.get("small_mean") or 0) > 0.9


result = fh.run(config, callbacks=[stop_when_good])
print(result.summary["small_mean"], result.history["loss"])
images = fh.data.load("phantoms", num_examples=400, image_size=16).images[:3]
print(result.predict(images, client="client_0").shape)

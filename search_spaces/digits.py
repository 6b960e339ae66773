"""scikit-learn's handwritten digits on a small VGG: a whole sweep in a minute and a half."""

from raytickets.config import Comparison, Data, Network, Proof, Retraining, SearchSpace, Training


def space() -> SearchSpace:
    return SearchSpace(
        name="digits",
        network=Network("cifar_vgg", {"depth": 9, "width": 0.5}),
        data=Data("digits", validation=0.1, test=0.25, crop_padding=1),
        penalties=(1e-4, 3e-4, 1e-3),
        prune_ratios=(0.3, 0.4, 0.5, 0.6),
        training=Training(epochs=20, batch_size=32, learning_rate=0.05, weight_decay=5e-4),
        proof=Proof(budget=0.5, batch_size=32),
        # One worker: in steps of a few milliseconds, several would mostly wait for each other.
        retraining=Retraining(
            epochs=30, batch_size=32, learning_rate=0.05, weight_decay=5e-4, num_workers=1
        ),
        comparison=Comparison(prune_ratios=(0.3, 0.6, 0.9)),
    )

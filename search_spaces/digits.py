"""scikit-learn's handwritten digits on a small VGG: a whole sweep in a minute or two."""

from raytickets.config import Data, Network, Retraining, SearchSpace, Training


def space() -> SearchSpace:
    return SearchSpace(
        name="digits",
        network=Network("cifar_vgg", {"depth": 9, "width": 0.5}),
        data=Data(source="digits", validation=0.1, test=0.25, crop_padding=1),
        penalties=(1e-4, 3e-4, 1e-3),
        prune_ratios=(0.3, 0.5, 0.7, 0.8),
        training=Training(epochs=20, learning_rate=0.05),
        proof=Training(epochs=2, learning_rate=0.02, schedule="cosine"),
        retraining=Retraining(epochs=30, learning_rate=0.05),
    )

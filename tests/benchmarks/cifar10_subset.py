"""10,000 images of CIFAR-10 on VGG16 at 1/8 width: every method side by side, on two cores.

raytickets compare tests/benchmarks/cifar10_subset.py --data FOLDER
"""

from raytickets.config import Comparison, Data, Network, Retraining, SearchSpace, Training


def space() -> SearchSpace:
    return SearchSpace(
        name="cifar10_subset",
        network=Network("cifar_vgg", {"depth": 16, "width": 0.125}),
        data=Data("folder", "cifar10", limit=10_000, validation=0.1, crop_padding=4, flip=True),
        penalties=(1e-4,),
        prune_ratios=(0.3, 0.5, 0.7),
        training=Training(epochs=20, batch_size=64, learning_rate=0.05, weight_decay=5e-4),
        retraining=Retraining(
            epochs=20, batch_size=64, learning_rate=0.05, weight_decay=5e-4, num_workers=1
        ),
        comparison=Comparison(),
    )

"""CIFAR-10 as an ImageFolder on VGG16, with the recipe of the early-bird paper.

The images are expected in data/cifar10/train/<class>/ and data/cifar10/test/<class>/; another
folder is given with `--data`. `--smoke` takes 2,000 images and a network of 1/8 the width.
"""

import dataclasses

from raytickets.config import Data, Network, Proof, Retraining, SearchSpace, Training


def space(smoke: bool = False) -> SearchSpace:
    full = SearchSpace(
        name="cifar10",
        network=Network("cifar_vgg", {"depth": 16}),
        data=Data("folder", "data/cifar10", validation=0.1, crop_padding=4, flip=True),
        penalties=(1e-5, 1e-4, 1e-3),
        prune_ratios=(0.3, 0.5, 0.7),
        training=Training(epochs=40, batch_size=256, learning_rate=0.1),
        proof=Proof(budget=1, rungs=3, batch_size=256),
        retraining=Retraining(
            epochs=160,
            batch_size=256,
            learning_rate=0.1,
            schedule="multistep",
            milestones=(80, 120),
        ),
    )
    if not smoke:
        return full
    return dataclasses.replace(
        full,
        name="cifar10-smoke",
        network=Network("cifar_vgg", {"depth": 16, "width": 0.125}),
        data=dataclasses.replace(full.data, limit=2000),
        penalties=(1e-4, 1e-3),
        training=Training(epochs=20, batch_size=64, learning_rate=0.05),
        proof=Proof(budget=0.5),
        retraining=Retraining(epochs=5, batch_size=64, learning_rate=0.05),
        winners=1,
    )

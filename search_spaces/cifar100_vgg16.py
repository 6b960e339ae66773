"""CIFAR-100 on VGG16, as the early-bird paper trains it (arXiv 1909.11957).

The original CIFAR-100 is expected in data/cifar-100-python/, as torchvision keeps it; a copy of
this file with `download=True` in `Data` fetches it. `--data FOLDER` takes an ImageFolder instead,
FOLDER/train/<class>/ and FOLDER/test/<class>/. A tenth of the training images is held out to choose
tickets by; the paper trains on all of them. Needs a GPU, but for `--smoke`: 2,000 images and a
VGG16 of 1/8 the width.
"""

import dataclasses

from raytickets.config import (
    Data,
    Network,
    Proof,
    Resources,
    Retraining,
    SearchSpace,
    Training,
)


def space(smoke: bool = False) -> SearchSpace:
    full = SearchSpace(
        name="cifar100_vgg16",
        network=Network("cifar_vgg", {"depth": 16, "scale_init": 0.5}),
        data=Data("cifar100", "data", validation=0.1, crop_padding=4, flip=True),
        penalties=(1e-4,),
        prune_ratios=(0.3, 0.5, 0.7),
        # The published schedule up to its first drop: tickets that come later are late.
        training=Training(epochs=80, batch_size=256, learning_rate=0.1),
        proof=Proof(batch_size=256),
        retraining=Retraining(
            epochs=160,
            batch_size=256,
            learning_rate=0.1,
            schedule="multistep",
            milestones=(80, 120),
        ),
        resources=Resources(gpus_per_trial=1),
    )
    if not smoke:
        return full
    return dataclasses.replace(
        full,
        name="cifar100_vgg16-smoke",
        network=Network("cifar_vgg", {"depth": 16, "width": 0.125, "scale_init": 0.5}),
        data=dataclasses.replace(full.data, limit=2000),
        penalties=(1e-3,),
        training=Training(epochs=20, batch_size=64, learning_rate=0.05),
        proof=Proof(budget=0.5),
        retraining=Retraining(epochs=5, batch_size=64, learning_rate=0.05),
        winners=1,
        resources=Resources(),
    )

"""ImageNet on ResNet-50 at 224 pixels, as the early-bird paper trains it (arXiv 1909.11957).

ImageNet (ILSVRC 2012) is expected as an ImageFolder in data/imagenet/train/<class>/ and
data/imagenet/val/<class>/; `--data FOLDER` looks for both in FOLDER. The test accuracy is that on
val/, as in every table of ImageNet; 2% of the training images are held out to choose tickets by.
Images are decoded in every epoch. Needs a GPU, but for `--smoke`: 2,000 images of 64 pixels.
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
        name="imagenet_resnet50",
        network=Network("resnet50"),
        data=Data(
            "folder",
            "data/imagenet",
            image_size=224,
            validation=0.02,
            random_resized_crop=True,
            flip=True,
            loader_workers=16,
        ),
        penalties=(1e-4,),
        prune_ratios=(0.3, 0.5, 0.7),
        # The published schedule up to its first drop: tickets that come later are late.
        training=Training(epochs=30, batch_size=256, learning_rate=0.1),
        proof=Proof(batch_size=256),
        retraining=Retraining(
            epochs=90,
            batch_size=256,
            learning_rate=0.1,
            schedule="multistep",
            milestones=(30, 60),
        ),
        resources=Resources(gpus_per_trial=1),
    )
    if not smoke:
        return full
    return dataclasses.replace(
        full,
        name="imagenet_resnet50-smoke",
        data=dataclasses.replace(full.data, limit=2000, image_size=64, loader_workers=2),
        penalties=(1e-3,),
        training=Training(epochs=8, batch_size=64, learning_rate=0.05),
        proof=Proof(budget=0.5),
        retraining=Retraining(epochs=2, batch_size=64, learning_rate=0.05),
        winners=1,
        resources=Resources(),
    )

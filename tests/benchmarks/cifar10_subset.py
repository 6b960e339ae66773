"""10,000 images of CIFAR-10 on VGG16 at 1/8 width, every method side by side, on two cores:

raytickets compare tests/benchmarks/cifar10_subset.py --data FOLDER

The recipe is the paper's, with its learning rate of 0.1 at batch 256 scaled to batch 64. The stop
rule is laxer than by default: with a fifth of the images and 20 epochs, masks never come as close
as 0.2 at most seeds and ratios.
"""

from raytickets.config import Data, Network, Retraining, SearchSpace, StopRule, Training


def space() -> SearchSpace:
    return SearchSpace(
        name="cifar10_subset",
        network=Network("cifar_vgg", {"depth": 16, "width": 0.125, "scale_init": 0.5}),
        data=Data("folder", "cifar10", limit=10_000, validation=0.1, crop_padding=4, flip=True),
        penalties=(1e-4,),
        prune_ratios=(0.5, 0.7),
        stop_rule=StopRule(threshold=0.3),
        training=Training(epochs=20, batch_size=64, learning_rate=0.025),
        retraining=Retraining(epochs=20, batch_size=64, learning_rate=0.025, num_workers=1),
    )

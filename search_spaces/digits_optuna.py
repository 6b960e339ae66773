"""Digits with penalty, learning rate and width proposed by Optuna: about two minutes."""

from raytickets.config import (
    Data,
    Network,
    Optuna,
    Proof,
    Range,
    Retraining,
    SearchSpace,
    Training,
)


def space() -> SearchSpace:
    return SearchSpace(
        name="digits_optuna",
        network=Network("cifar_vgg", {"depth": 9, "width": 0.5}),
        data=Data("digits", validation=0.1, test=0.25, crop_padding=1),
        penalties=(1e-4,),
        prune_ratios=(0.3, 0.4, 0.5, 0.6),
        training=Training(epochs=15, batch_size=32, learning_rate=0.05, weight_decay=5e-4),
        optuna=Optuna(
            trajectories=12,
            ranges={
                "penalty": Range(3e-5, 3e-3, log=True),
                "training.learning_rate": Range(0.01, 0.1, log=True),
                "network.options.width": (0.25, 0.375, 0.5),
            },
            startup=6,
        ),
        proof=Proof(budget=0.5, batch_size=32),
        retraining=Retraining(
            epochs=30, batch_size=32, learning_rate=0.05, weight_decay=5e-4, num_workers=1
        ),
    )

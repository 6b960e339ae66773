"""Networks by name: built in for small images, torchvision's, timm's, and the user's own."""

import difflib
import importlib
import sys
from collections import OrderedDict
from collections.abc import Callable
from importlib.machinery import SourceFileLoader
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn

from raytickets.config import InputError, Network
from raytickets.vision import torchvision


def _family(prefix: str, endings: str) -> list[str]:
    return [prefix + ending for ending in endings.split()]


# Names as text, so that a wrong one is refused without importing torchvision, which takes 5 s.
TORCHVISION = (
    *_family("densenet", "121 161 169 201"),
    *_family("efficientnet_", "b0 b1 b2 b3 b4 b5 b6 b7 v2_l v2_m v2_s"),
    *_family("mnasnet", "0_5 0_75 1_0 1_3"),
    *_family("mobilenet_", "v2 v3_large v3_small"),
    *_family("regnet_x_", "400mf 800mf 1_6gf 3_2gf 8gf 16gf 32gf"),
    *_family("regnet_y_", "400mf 800mf 1_6gf 3_2gf 8gf 16gf 32gf 128gf"),
    *_family("resnet", "18 34 50 101 152"),
    *_family("resnext", "50_32x4d 101_32x8d 101_64x4d"),
    *_family("vgg", "11_bn 13_bn 16_bn 19_bn"),
    *_family("wide_resnet", "50_2 101_2"),
    "googlenet",
    "inception_v3",
)
"""torchvision's classification networks that have BatchNorm2d layers and can be shrunk."""

REFUSED = {
    **dict.fromkeys(
        (
            *_family("convnext_", "base large small tiny"),
            *_family("squeezenet", "1_0 1_1"),
            *_family("swin_", "b s t v2_b v2_s v2_t"),
            *_family("vgg", "11 13 16 19"),
            *_family("vit_", "b_16 b_32 h_14 l_16 l_32"),
            "alexnet",
        ),
        "it has no BatchNorm2d layer",
    ),
    **dict.fromkeys(
        _family("shufflenet_v2_x", "0_5 1_0 1_5 2_0"),
        "torch-pruning cannot trace its channel shuffle",
    ),
    "maxvit_t": "it reads channels of its stem without a BatchNorm2d, so no mask can drop them",
}
"""torchvision's other classification networks, and why they cannot be used."""

_VGG_STAGES = {
    9: (2, 2, 2),
    11: (1, 1, 2, 2, 2),
    13: (2, 2, 2, 2, 2),
    16: (2, 2, 3, 3, 3),
    19: (2, 2, 4, 4, 4),
}


def build_network(network: Network, *, in_channels: int, num_classes: int, seed: int) -> nn.Module:
    """The network `network` names, with new weights: float32, on the CPU, in train mode.

    It takes images [batch, in_channels, height, width] and gives logits [batch, num_classes].
    The same seed gives the same weights, and torch's global random state stays as it was. Only
    networks of torchvision and timm import these. Raises `InputError` on an unknown name, on a
    network without BatchNorm2d layers and on options that its builder does not take.
    """
    with torch.random.fork_rng(devices=[]):
        # The user's file may seed torch when it is imported.
        builder = _find_builder(network.name)
        torch.manual_seed(seed)
        try:
            built = builder(num_classes=num_classes, in_channels=in_channels, **network.options)
        except (Exception, SystemExit) as error:  # The builder may be the user's own code.
            options, kind = dict(network.options), type(error).__name__
            allowed = f"{network.name} raised {kind}: {error}"
            raise InputError("network.options", options, allowed) from error
    if not isinstance(built, nn.Module):
        allowed = f"must return a torch.nn.Module, not {type(built).__name__}"
        raise InputError("network.name", network.name, allowed)
    return built.float().train()


def check_network(
    network: Network, *, in_channels: int, num_classes: int, image_size: int
) -> nn.Module:
    """Build the network with seed 0 and try two blank images on it; return it in train mode.

    Images are float32 [2, in_channels, image_size, image_size]. Raises `InputError` where
    `build_network` does, and for a network that has no BatchNorm2d, fails on such images, or
    does not give logits [2, num_classes].
    """
    built = build_network(network, in_channels=in_channels, num_classes=num_classes, seed=0)
    if not any(isinstance(module, nn.BatchNorm2d) for module in built.modules()):
        raise InputError("network.name", network.name, "it has no BatchNorm2d layer")
    images = torch.zeros(2, in_channels, image_size, image_size)
    size = f"{in_channels}x{image_size}x{image_size}"
    try:
        with torch.no_grad():
            logits = built.eval()(images)
    except Exception as error:
        reason = " ".join(str(error).split())
        allowed = f"must take images of {size}, but fails with: {reason}"
        raise InputError("network.name", network.name, allowed) from error
    shape = list(logits.shape) if isinstance(logits, torch.Tensor) else type(logits).__name__
    if shape != [2, num_classes]:
        allowed = f"must give [2, {num_classes}] logits for 2 images of {size}, not {shape}"
        raise InputError("network.name", network.name, allowed)
    return built.train()


def cifar_vgg(
    *,
    num_classes: int,
    in_channels: int,
    depth: int = 16,
    width: float = 1.0,
    scale_init: float = 1.0,
) -> nn.Sequential:
    """VGG with BatchNorm for small images: Simonyan and Zisserman, arXiv 1409.1556, table 1.

    Depths are 9, 11, 13, 16 and 19, which count the three linear layers of the original; here
    global average pooling and one linear layer take their place. `width` multiplies the stages'
    64, 128, 256, 512 and 512 channels, and `scale_init` is every BatchNorm scale (gamma) at the
    start. Images must measure 16 pixels, or 4 for depth 9, which has three stages. Raises
    `ValueError` on another depth and on a width or `scale_init` that is not above 0.
    """
    if depth not in _VGG_STAGES:
        raise ValueError(f"depth must be one of {', '.join(map(str, _VGG_STAGES))}, not {depth!r}")
    if not width > 0:
        raise ValueError(f"width must be above 0, not {width!r}")
    layers: dict[str, nn.Module] = {}
    channels = in_channels
    for stage, convs in enumerate(_VGG_STAGES[depth], 1):
        if stage > 1:
            layers[f"pool{stage - 1}"] = nn.MaxPool2d(2)
        for place in range(1, convs + 1):
            out = max(8, round(width * (64, 128, 256, 512, 512)[stage - 1]))
            layers[f"conv{stage}_{place}"] = _conv(channels, out, 3)
            layers[f"bn{stage}_{place}"] = _norm(out, scale_init)
            layers[f"relu{stage}_{place}"] = nn.ReLU(inplace=True)
            channels = out
    layers |= {"pool": nn.AdaptiveAvgPool2d(1), "flatten": nn.Flatten()}
    layers["head"] = nn.Linear(channels, num_classes)
    return nn.Sequential(OrderedDict(layers))


class _BasicBlock(nn.Module):
    def __init__(self, in_channels: int, channels: int, stride: int, scale_init: float):
        super().__init__()
        self.conv1 = _conv(in_channels, channels, 3, stride)
        self.bn1 = _norm(channels, scale_init)
        self.conv2 = _conv(channels, channels, 3)
        self.bn2 = _norm(channels, scale_init)
        self.relu = nn.ReLU(inplace=True)
        self.shortcut = nn.Sequential()
        if stride != 1 or in_channels != channels:
            projection = nn.Conv2d(in_channels, channels, 1, stride, bias=False)
            self.shortcut = nn.Sequential(projection, _norm(channels, scale_init))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        inner = self.relu(self.bn1(self.conv1(images)))
        return self.relu(self.bn2(self.conv2(inner)) + self.shortcut(images))


def cifar_resnet(
    *,
    num_classes: int,
    in_channels: int,
    depth: int = 20,
    width: int = 16,
    scale_init: float = 1.0,
) -> nn.Sequential:
    """The ResNet for small images of He et al., arXiv 1512.03385, section 4.2.

    Three stages of (depth - 2) / 6 blocks with `width`, 2 and 4 times `width` channels. Where the
    shape changes the shortcut is a projection (option B of the paper), because the paper's zero
    padding (option A) would tie channels of different stages to each other by position.
    `scale_init` is every BatchNorm scale (gamma) at the start. Raises `ValueError` on a depth that
    is not 6n+2, a width below 1 and a `scale_init` that is not above 0.
    """
    if depth < 8 or depth % 6 != 2:
        raise ValueError(f"depth must be 6n+2, as 8, 14, 20, 32, 44, 56 or 110, not {depth!r}")
    _check_width(width)
    layers = [_conv(in_channels, width, 3), _norm(width, scale_init), nn.ReLU(inplace=True)]
    channels = width
    for stage in range(3):
        for block in range((depth - 2) // 6):
            stride = 2 if stage and not block else 1
            layers.append(_BasicBlock(channels, width * 2**stage, stride, scale_init))
            channels = width * 2**stage
    layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, num_classes)]
    return nn.Sequential(*layers)


class _PreactivationBlock(nn.Module):
    def __init__(self, in_channels: int, channels: int, stride: int, scale_init: float):
        super().__init__()
        self.bn1 = _norm(in_channels, scale_init)
        self.conv1 = _conv(in_channels, channels, 1)
        self.bn2 = _norm(channels, scale_init)
        self.conv2 = _conv(channels, channels, 3, stride)
        self.bn3 = _norm(channels, scale_init)
        self.conv3 = _conv(channels, 4 * channels, 1)
        self.relu = nn.ReLU(inplace=True)
        self.projection = None
        if stride != 1 or in_channels != 4 * channels:
            self.projection = _conv(in_channels, 4 * channels, 1, stride)

    def forward(self, stream: torch.Tensor) -> torch.Tensor:
        inner = self.relu(self.bn1(stream))
        if self.projection is not None:
            stream = self.projection(inner)
        inner = self.relu(self.bn2(self.conv1(inner)))
        inner = self.relu(self.bn3(self.conv2(inner)))
        return stream + self.conv3(inner)


def cifar_preresnet(
    *,
    num_classes: int,
    in_channels: int,
    depth: int = 101,
    width: int = 16,
    scale_init: float = 1.0,
) -> nn.Sequential:
    """The pre-activation ResNet of bottleneck blocks of He et al. 2016, arXiv 1603.05027.

    Three stages of (depth - 2) / 9 blocks, which compute in `width`, 2 and 4 times `width` channels
    and add to a stream of 4 times as many. A stage's first block shares its first BatchNorm and
    ReLU between the convolutions and the projection, as in the code of the paper; so a channel of
    the stream is only ever read behind a BatchNorm and can be removed. The early-bird paper's code
    projects the bare stream, and drops a channel of it for one block while others read it.
    `scale_init` is every BatchNorm scale (gamma) at the start. Raises `ValueError` on a depth that
    is not 9n+2, a width below 1 and a `scale_init` that is not above 0.
    """
    if depth < 11 or depth % 9 != 2:
        raise ValueError(f"depth must be 9n+2, as 11, 20, 29, 56, 101 or 164, not {depth!r}")
    _check_width(width)
    layers: list[nn.Module] = [_conv(in_channels, width, 3)]
    channels = width
    for stage in range(3):
        for block in range((depth - 2) // 9):
            stride = 2 if stage and not block else 1
            layers.append(_PreactivationBlock(channels, width * 2**stage, stride, scale_init))
            channels = 4 * width * 2**stage
    layers += [_norm(channels, scale_init), nn.ReLU(inplace=True)]
    layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, num_classes)]
    return nn.Sequential(*layers)


def _check_width(width: object):
    if not isinstance(width, int) or width < 1:
        raise ValueError(f"width must be a whole number, at least 1, not {width!r}")


def _conv(in_channels: int, out_channels: int, size: int, stride: int = 1) -> nn.Conv2d:
    conv = nn.Conv2d(in_channels, out_channels, size, stride, padding=size // 2, bias=False)
    nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
    return conv


def _norm(channels: int, scale_init: float) -> nn.BatchNorm2d:
    if not scale_init > 0:
        raise ValueError(f"scale_init must be above 0, not {scale_init!r}")
    norm = nn.BatchNorm2d(channels)
    nn.init.constant_(norm.weight, scale_init)
    return norm


_BUILT_IN: dict[str, Callable[..., nn.Module]] = {
    "cifar_preresnet": cifar_preresnet,
    "cifar_resnet": cifar_resnet,
    "cifar_vgg": cifar_vgg,
}


def _find_builder(name: str) -> Callable[..., Any]:
    """What to call as `builder(num_classes=..., in_channels=..., **options)`."""
    if name.startswith("timm/"):
        return _timm(name)
    if ":" in name:
        return _users_own(name)
    if name in _BUILT_IN:
        return _BUILT_IN[name]
    if name in TORCHVISION:
        return lambda **options: _torchvision(name, **options)
    if name in REFUSED:
        raise InputError("network.name", name, REFUSED[name])
    near = difflib.get_close_matches(name, [*_BUILT_IN, *TORCHVISION], n=1)
    hint = f"did you mean {near[0]}?" if near else "there is no such network;"
    choices = f"{', '.join(_BUILT_IN)}, networks of torchvision with BatchNorm2d, timm/..."
    allowed = f"{hint} There are {choices}, and your own as package.module:function"
    raise InputError("network.name", name, allowed)


def _torchvision(name: str, *, num_classes: int, in_channels: int, **options: Any) -> nn.Module:
    fixed = {}
    if name in ("googlenet", "inception_v3"):
        # Auxiliary heads would make the output a tuple.
        fixed = {"aux_logits": False, "init_weights": True}
    built = torchvision("models").get_model(
        name, weights=None, num_classes=num_classes, **fixed, **options
    )
    if in_channels != 3:
        _widen_stem(built, in_channels)
    return built


def _timm(name: str) -> Callable[..., nn.Module]:
    """What builds the network `timm/...` with new weights."""
    try:
        import timm
    except ImportError as error:
        allowed = f"needs raytickets with its extra timm ({error})"
        raise InputError("network.name", name, allowed) from error
    wanted = name.removeprefix("timm/")
    # Another name could be one of timm's Hub, or a file, with weights to load.
    if not timm.is_model(wanted):
        near = difflib.get_close_matches(wanted, timm.list_models(), n=1)
        hint = f", did you mean timm/{near[0]}?" if near else ""
        raise InputError("network.name", name, f"timm {timm.__version__} has no such network{hint}")

    def build(*, num_classes: int, in_channels: int, **options: Any) -> nn.Module:
        shape = {"num_classes": num_classes, "in_chans": in_channels}
        built = timm.create_model(
            wanted, pretrained=False, checkpoint_path=None, **shape, **options
        )
        # timm begins with gammas of 0 at the ends of residual branches, also where an option asks
        # for them: a mask would be of that.
        for module in built.modules():
            if isinstance(module, nn.BatchNorm2d) and module.affine:
                nn.init.ones_(module.weight)
        return built

    return build


def _widen_stem(network: nn.Module, in_channels: int):
    """Let the first convolution read `in_channels` channels, with new weights."""
    stem = next(module for module in network.modules() if isinstance(module, nn.Conv2d))
    stem.in_channels = in_channels
    stem.weight = nn.Parameter(torch.empty(stem.out_channels, in_channels, *stem.kernel_size))
    stem.reset_parameters()


def _users_own(name: str) -> Callable[..., Any]:
    place, _, function = name.rpartition(":")
    load = _load_file if place.endswith(".py") else importlib.import_module
    try:
        module = load(place)
    except (Exception, SystemExit) as error:
        allowed = f"{place} cannot be imported: {type(error).__name__}: {error}"
        raise InputError("network.name", name, allowed) from error
    builder = getattr(module, function, None)
    if not callable(builder):
        raise InputError("network.name", name, f"{place} has no function {function!r}")
    return builder


def _load_file(path: str) -> ModuleType:
    # The prefix keeps a file called random.py from replacing the standard library's.
    name = f"raytickets_user_{Path(path).stem}"
    loader = SourceFileLoader(name, path)
    module = ModuleType(name)
    module.__file__ = path
    # Pickle and dataclasses look the module of a class up by its name.
    sys.modules[name] = module
    loader.exec_module(module)
    return module

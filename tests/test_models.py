"""Networks are found by name, built from a seed, and refused with a reason."""

import subprocess
import sys

import pytest
import torch
from torch import nn

from raytickets import models
from raytickets.config import InputError, Network
from raytickets.models import build_network, check_network
from raytickets.shrink import channel_groups, check_prunable


def build(name, in_channels=3, num_classes=10, seed=0, **options):
    return build_network(
        Network(name, options), in_channels=in_channels, num_classes=num_classes, seed=seed
    )


def convolutions(network):
    return [module for module in network.modules() if isinstance(module, nn.Conv2d)]


@pytest.mark.parametrize("name", ["cifar_vgg", "cifar_resnet", "mobilenet_v3_small"])
def test_the_seed_decides_the_weights_and_nothing_else_moves(name):
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first, same, other = build(name), build(name), build(name, seed=1)
    assert torch.equal(torch.get_rng_state(), before)
    weights = [convolutions(network)[0].weight for network in (first, same, other)]
    assert all(map(torch.equal, first.state_dict().values(), same.state_dict().values()))
    assert not torch.equal(weights[0], weights[2])
    assert first.training
    assert {p.dtype for p in first.parameters()} == {torch.float32}


@pytest.mark.parametrize(("depth", "count"), [(9, 6), (11, 8), (13, 10), (16, 13), (19, 16)])
def test_cifar_vgg_has_the_convolutions_of_its_depth(depth, count):
    network = build("cifar_vgg", depth=depth, width=0.125)
    assert len(convolutions(network)) == count
    assert network.eval()(torch.zeros(2, 3, 16, 16)).shape == (2, 10)


def test_cifar_vgg_width_multiplies_the_channels_down_to_eight():
    def widths(width):
        return sorted({c.out_channels for c in convolutions(build("cifar_vgg", width=width))})

    assert widths(1.0) == [64, 128, 256, 512]
    assert widths(0.5) == [32, 64, 128, 256]
    assert widths(0.01) == [8]


@pytest.mark.parametrize("depth", [8, 14, 20])
def test_cifar_resnet_has_six_convolutions_for_each_n_and_two_projections(depth):
    assert len(convolutions(build("cifar_resnet", depth=depth))) == depth - 1 + 2


def test_cifar_resnet_20_has_the_paper_s_parameters_and_those_of_its_projections():
    # 0.27 million in table 6 of arXiv 1512.03385, whose shortcuts have none.
    projections = (16 * 32 + 2 * 32) + (32 * 64 + 2 * 64)
    assert sum(p.numel() for p in build("cifar_resnet").parameters()) == 269_722 + projections


@pytest.mark.parametrize("depth", [11, 20, 101])
def test_cifar_preresnet_has_nine_convolutions_for_each_n_a_stem_and_three_projections(depth):
    network = build("cifar_preresnet", depth=depth, width=4)
    assert len(convolutions(network)) == depth - 1 + 3
    assert network.eval()(torch.zeros(2, 3, 8, 8)).shape == (2, 10)


def test_cifar_preresnet_164_has_the_paper_s_parameters():
    # 1.7 million, as arXiv 1605.07146 counts them.
    assert sum(p.numel() for p in build("cifar_preresnet", depth=164).parameters()) == 1_703_258


def test_the_stream_of_cifar_preresnet_is_read_behind_batchnorms_only():
    network = build("cifar_preresnet", depth=20, width=4).eval()
    images = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    groups = channel_groups(network, images)
    streams = {group.name: group for group in groups if len(group.batchnorms) > 1}
    assert {name: group.width for name, group in streams.items()} == {
        "1.conv3": 16,
        "3.conv3": 32,
        "5.conv3": 64,
    }
    assert [part.module for part in streams["1.conv3"].batchnorms] == ["2.bn1", "3.bn1"]
    assert [part.module for part in streams["5.conv3"].batchnorms] == ["6.bn1", "7"]
    norms = [m for m in network.modules() if isinstance(m, nn.BatchNorm2d)]
    covered = sum(len(part.channels) for group in groups for part in group.batchnorms)
    assert covered == sum(norm.num_features for norm in norms)


@pytest.mark.parametrize("name", ["cifar_vgg", "cifar_resnet", "cifar_preresnet"])
def test_scale_init_is_every_scale_at_the_start_and_changes_nothing_else(name):
    half, whole = build(name, scale_init=0.5), build(name)
    scales = {f"{n}.weight" for n, m in half.named_modules() if isinstance(m, nn.BatchNorm2d)}
    for (key, one), other in zip(
        half.state_dict().items(), whole.state_dict().values(), strict=True
    ):
        if key in scales:
            assert set(one.tolist()) == {0.5}
            assert set(other.tolist()) == {1.0}
        else:
            assert torch.equal(one, other)


@pytest.mark.parametrize(
    "name", ["timm/resnet18", "timm/mobilenetv3_small_050", "timm/regnetx_002"]
)
def test_networks_of_timm_can_be_shrunk(name):
    pytest.importorskip("timm", reason="needs the extra `timm`")
    network = check(name, image_size=64, num_classes=7)
    images = torch.zeros(1, 3, 64, 64)
    check_prunable(network, channel_groups(network, images), images)
    again = build(name, num_classes=7)
    assert all(map(torch.equal, network.state_dict().values(), again.state_dict().values()))


def test_scales_of_timm_are_all_alike_at_the_start():
    pytest.importorskip("timm", reason="needs the extra `timm`")
    norms = [m for m in build("timm/resnet18").modules() if isinstance(m, nn.BatchNorm2d)]
    assert {scale for norm in norms for scale in norm.weight.tolist()} == {1.0}


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("timm/resnet19", {}, r"network\.name: .* no such network, did you mean timm/resnet18\?"),
        ("timm/hf-hub:timm/resnet18.a1_in1k", {}, r"network\.name: .* no such network"),
        ("timm/vit_tiny_patch16_224", {}, r"network\.name: .* no BatchNorm2d layer"),
        (
            "timm/resnet18",
            {"pretrained": True},
            r"network\.options: .* multiple values .*pretrained",
        ),
        ("timm/resnet18", {"checkpoint_path": "x"}, r"network\.options: .* multiple values"),
        ("timm/resnet18", {"dept": 3}, r"network\.options: .* unexpected keyword argument 'dept'"),
    ],
)
def test_what_timm_has_not_or_cannot_be_shrunk_is_refused(name, options, words):
    pytest.importorskip("timm", reason="needs the extra `timm`")
    with pytest.raises(InputError, match=f"^{words}"):
        check(name, image_size=224, **options)


def test_without_timm_its_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(InputError, match=r"^network\.name: 'timm/resnet18' .* its extra timm"):
        build("timm/resnet18")


@pytest.mark.parametrize("name", ["cifar_vgg", "cifar_resnet", "mobilenet_v3_small", "googlenet"])
def test_any_number_of_image_channels_will_do(name):
    network = build(name, in_channels=1, num_classes=7).eval()
    assert network(torch.zeros(2, 1, 32, 32)).shape == (2, 7)


def test_another_number_of_image_channels_changes_nothing_else_of_the_stem():
    grey, coloured = (convolutions(build("resnet18", in_channels=c))[0] for c in (1, 3))
    assert str(grey) == str(coloured).replace("Conv2d(3,", "Conv2d(1,")
    assert torch.equal(grey.weight, convolutions(build("resnet18", in_channels=1))[0].weight)


def test_options_reach_torchvision_s_builder():
    assert convolutions(build("mobilenet_v2", width_mult=0.5))[0].out_channels == 16


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("cifar_vgg", {"depth": 15}, "depth must be one of 9, 11, 13, 16, 19, not 15"),
        ("cifar_vgg", {"width": 0}, "width must be above 0"),
        ("cifar_vgg", {"dept": 16}, "unexpected keyword argument 'dept'"),
        ("cifar_resnet", {"depth": 18}, "depth must be 6n"),
        ("cifar_resnet", {"width": 0.5}, "width must be a whole number"),
        ("cifar_preresnet", {"depth": 18}, "depth must be 9n"),
        ("cifar_preresnet", {"width": 0}, "width must be a whole number"),
        ("cifar_vgg", {"scale_init": 0}, "scale_init must be above 0"),
        ("resnet18", {"dept": 16}, "unexpected keyword argument 'dept'"),
        ("resnet18", {"groups": 2}, "BasicBlock only supports groups=1"),
        ("resnet18", {"weights": "DEFAULT"}, "multiple values for keyword argument 'weights'"),
        ("resnet18", {"num_classes": 3}, "multiple values for keyword argument 'num_classes'"),
        ("googlenet", {"aux_logits": True}, "multiple values for keyword argument 'aux_logits'"),
    ],
)
def test_wrong_options_are_refused_in_the_builder_s_words(name, options, words):
    with pytest.raises(InputError, match=rf"^network\.options: .*{words}"):
        build_network(Network(name, options), in_channels=3, num_classes=10, seed=0)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("resnet81", r"did you mean resnet18\?"),
        ("cifar_vg", r"did you mean cifar_vgg\?"),
        ("zzz", "there is no such network"),
        ("vgg16", "it has no BatchNorm2d layer"),
        ("shufflenet_v2_x1_0", "cannot trace its channel shuffle"),
        ("maxvit_t", "its stem"),
    ],
)
def test_a_name_that_cannot_be_used_is_refused_with_the_reason(name, words):
    with pytest.raises(InputError, match=rf"^network\.name: '{name}' is not allowed: .*{words}"):
        build(name)


def test_only_a_network_of_torchvision_imports_torchvision():
    script = """
import sys
from raytickets.config import InputError, Network
from raytickets.models import build_network
for name in ("cifar_vgg", "cifar_resnet", "alexnet", "resnet81", "no.such.module:function"):
    try:
        build_network(Network(name), in_channels=3, num_classes=10, seed=0)
    except InputError as error:
        print(error)
assert "torchvision" not in sys.modules
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 3


USERS_FILE = """
import torch
from torch import nn
torch.manual_seed(3)
def tiny(num_classes, in_channels, width=4):
    return nn.Sequential(
        nn.Conv2d(in_channels, width, 3), nn.BatchNorm2d(width), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, num_classes))
def plain(num_classes, in_channels):
    return nn.Sequential(nn.Flatten(), nn.LazyLinear(num_classes))
def number(num_classes, in_channels):
    return 7
"""


@pytest.fixture
def users_file(tmp_path, monkeypatch):
    path = tmp_path / "nets_of_a_user.py"
    path.write_text(USERS_FILE)
    monkeypatch.syspath_prepend(tmp_path)
    return path


def test_the_user_s_own_function_is_found_by_module_and_by_file(users_file):
    before = torch.get_rng_state()
    by_module = build("nets_of_a_user:tiny", width=6)
    by_file = build(f"{users_file}:tiny", width=6)
    assert torch.equal(torch.get_rng_state(), before)
    assert convolutions(by_module)[0].out_channels == 6
    assert torch.equal(convolutions(by_module)[0].weight, convolutions(by_file)[0].weight)


@pytest.mark.usefixtures("users_file")
@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("no_such_module:tiny", {}, "no_such_module cannot be imported: ModuleNotFoundError"),
        ("no/such/file.py:tiny", {}, "file.py cannot be imported: FileNotFoundError"),
        ("nets_of_a_user:giant", {}, "nets_of_a_user has no function 'giant'"),
        ("nets_of_a_user:number", {}, "must return a torch.nn.Module, not int"),
        ("nets_of_a_user:tiny", {"depth": 3}, "unexpected keyword argument 'depth'"),
    ],
)
def test_a_user_s_own_function_that_cannot_be_used_is_refused(name, options, words):
    with pytest.raises(InputError, match=words):
        build(name, **options)


@pytest.mark.parametrize(
    ("text", "error"), [("1 / 0", "ZeroDivisionError"), ("raise SystemExit", "SystemExit")]
)
def test_a_file_that_does_not_run_is_refused_with_its_error(tmp_path, text, error):
    path = tmp_path / "broken.py"
    path.write_text(text)
    with pytest.raises(InputError, match=f"cannot be imported: {error}"):
        build(f"{path}:tiny")


def check(name, image_size=32, num_classes=10, **options):
    return check_network(
        Network(name, options), in_channels=3, num_classes=num_classes, image_size=image_size
    )


def test_a_checked_network_comes_back_ready_to_train():
    network = check("cifar_resnet")
    assert network.training
    assert not any(
        m.num_batches_tracked for m in network.modules() if isinstance(m, nn.BatchNorm2d)
    )


def test_images_too_small_for_the_network_are_refused_in_one_line():
    with pytest.raises(InputError, match=r"must take images of 3x8x8, but fails with: .*too small"):
        check("cifar_vgg", image_size=8)
    assert check("cifar_vgg", image_size=8, depth=9)


def test_a_network_without_batchnorm_is_refused(users_file):
    with pytest.raises(InputError, match="has no BatchNorm2d layer"):
        check(f"{users_file}:plain")


def test_logits_of_another_shape_are_refused(tmp_path):
    path = tmp_path / "wide.py"
    path.write_text(USERS_FILE.replace("width, num_classes)", "width, 99)"))
    with pytest.raises(InputError, match=r"must give \[2, 10\] logits .* not \[2, 99\]"):
        check(f"{path}:tiny")


@pytest.mark.slow
def test_every_network_of_torchvision_is_on_the_right_list(monkeypatch):
    import torchvision
    from torchvision.models import regnet

    init = regnet.BlockParams.from_init_params.__func__

    def on_the_cpu(*args, **options):
        with torch.device("cpu"):
            return init(*args, **options)

    # RegNet reads numbers off a tensor while it is built, which the meta device cannot give.
    monkeypatch.setattr(regnet.BlockParams, "from_init_params", classmethod(on_the_cpu))
    with_batchnorm = set()
    names = torchvision.models.list_models(module=torchvision.models)
    for name in names:
        with torch.device("meta"):
            fixed = {"init_weights": False} if name in ("googlenet", "inception_v3") else {}
            network = torchvision.models.get_model(name, weights=None, **fixed)
        if any(isinstance(module, nn.BatchNorm2d) for module in network.modules()):
            with_batchnorm.add(name)
    without = {name for name, reason in models.REFUSED.items() if "no BatchNorm2d" in reason}
    assert set(models.TORCHVISION) | set(models.REFUSED) == set(names)
    assert not set(models.TORCHVISION) & set(models.REFUSED)
    assert set(names) - with_batchnorm == without

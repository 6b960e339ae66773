"""The published numbers, and which comparisons they may stand beside."""

import pytest

from raytickets.config import InputError
from raytickets.paper import PUBLISHED, Published, ours, published_for, relative_flops


def part(network, data) -> Published:
    (found,) = [p for p in PUBLISHED if (p.network, p.data) == (network, data)]
    return found


def row(published, name, ratio):
    (found,) = [r for r in published.rows if (r.name, r.prune_ratio) == (name, ratio)]
    return found


def report(**changes):
    """What of a comparison's report decides whether it matches."""
    return {
        "name": "mine",
        "space": "cifar10_vgg16",
        "network": {"name": "cifar_vgg", "options": {"depth": 16, "scale_init": 0.5}},
        "data": {"source": "cifar10", "limit": None},
        "prune_ratios": [0.3, 0.4],
        "table": [{"method": "early_bird", "prune_ratio": 0.3, "n": 3}],
    } | changes


def test_table_2_as_printed():
    table = part("cifar_vgg", "cifar100")
    assert [r.accuracy for r in table.rows if r.name == "EB Train"] == [71.81, 72.17, 71.28]
    assert [r.accuracy for r in table.rows if r.name == "NS"] == [71.24, 71.28, 69.74]
    found = row(table, "EB Train", 0.3)
    assert (found.flops, found.kilojoules) == (pytest.approx(243 * 0.05), 262.2)
    # The printed improvements in accuracy over the best of the others.
    best = {0.1: 72.62, 0.3: 71.31, 0.5: 70.96}
    for ratio, gain in {0.1: -0.81, 0.3: 0.86, 0.5: 0.32}.items():
        assert row(table, "EB Train", ratio).accuracy - best[ratio] == pytest.approx(gain)


def test_table_3_as_printed():
    table = part("resnet18", "imagenet")
    dense = row(table, "Unpruned", 0.0).accuracy
    for name, ratio, gain in (
        ("EB Train", 0.1, 0.27),
        ("EB Train", 0.3, -1.29),
        ("Network Slimming", 0.1, 0.08),
        ("Network Slimming", 0.3, -1.72),
        ("SFP", 0.3, -2.47),
    ):
        assert row(table, name, ratio).accuracy - dense == pytest.approx(gain)


def test_what_was_read_off_a_figure_says_so():
    assert {p.data: p.within for p in PUBLISHED if p.within} == {"cifar10": 0.2}
    for published in PUBLISHED:
        if published.within:
            assert all(r.flops is r.kilojoules is None for r in published.rows)


def test_cost_is_relative_to_progressive_at_the_same_ratio():
    table = part("cifar_vgg", "cifar100")
    assert relative_flops(table, row(table, "EB Train", 0.3)) == pytest.approx(243 / 542)
    assert relative_flops(table, row(table, "NS", 0.3)) == 1
    figure = part("cifar_vgg", "cifar10")
    assert relative_flops(figure, figure.rows[1]) is None


def test_a_comparison_matches_by_network_data_and_ratio():
    (found,) = published_for(report())
    assert (found.network, found.data) == ("cifar_vgg", "cifar10")
    assert published_for(report(data={"source": "folder", "limit": None})) == [found]
    hundred = report(data={"source": "cifar100", "limit": None}, space="cifar100_vgg16")
    assert published_for(hundred) == [part("cifar_vgg", "cifar100")]


@pytest.mark.parametrize(
    "changes",
    [
        {"network": {"name": "cifar_vgg", "options": {"depth": 16, "width": 0.125}}},
        {"network": {"name": "cifar_vgg", "options": {"depth": 9}}},
        {"network": {"name": "cifar_resnet", "options": {}}},
        {"data": {"source": "digits", "limit": None}, "space": "digits"},
        {"data": {"source": "folder", "limit": None}, "space": "flowers"},
        {"data": {"source": "cifar10", "limit": 10_000}},
    ],
)
def test_another_network_or_data_set_has_no_published_numbers(changes):
    with pytest.raises(InputError, match=r"name: 'mine' .* nothing for its network and data"):
        published_for(report(**changes))


def test_other_ratios_have_no_published_numbers():
    with pytest.raises(InputError, match=r"name: 'mine' .* nothing at these prune ratios"):
        published_for(report(prune_ratios=[0.4, 0.6]))


def test_ours_is_the_line_of_the_same_method_and_ratio():
    figure = part("cifar_vgg", "cifar10")
    assert ours(report(), row(figure, "drawn at epoch 20", 0.3)) == report()["table"][0]
    assert ours(report(), row(figure, "drawn at epoch 20", 0.5)) is None
    table = part("cifar_vgg", "cifar100")
    assert ours(report(), row(table, "ThiNet", 0.3)) is None

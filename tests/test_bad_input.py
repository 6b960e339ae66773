"""Bad input ends in one line with field, value and what is allowed, and before Ray starts."""

import os
import re
import shutil
import subprocess
import sys

import made_up_comparison
import pytest
from made_up_space import source
from made_up_sweep import FINISHED, write

SPACES = [
    ({"prune_ratios": "(0,)"}, r"prune_ratios: 0 .* above 0 and below 1"),
    ({"prune_ratios": "(1,)"}, r"prune_ratios: 1 .* above 0 and below 1"),
    ({"prune_ratios": "(0.5, 1.2)"}, r"prune_ratios: 1\.2 .* above 0 and below 1"),
    ({"prune_ratios": "(-0.3,)"}, r"prune_ratios: -0\.3 .* above 0 and below 1"),
    ({"prune_ratios": "(float('nan'),)"}, "prune_ratios: nan .* above 0 and below 1"),
    ({"prune_ratios": "(True,)"}, "prune_ratios: True .* a number above 0"),
    ({"prune_ratios": "('30%',)"}, "prune_ratios: '30%' .* a number above 0"),
    ({"prune_ratios": "(0.5, 0.5)"}, r"prune_ratios: \(0.5, 0.5\) .* may occur once"),
    ({"prune_ratios": "()"}, r"prune_ratios: \(\) .* tuple of at least one value"),
    ({"prune_ratios": "0.5"}, r"prune_ratios: 0\.5 .* tuple of at least one value"),
    ({"prune_ratios": "[0.5]"}, r"prune_ratios: \[0\.5\] .* tuple of at least one value"),
    ({"penalties": "(-1e-4,)"}, r"penalties: -0\.0001 .* at least 0"),
    ({"penalties": "(float('inf'),)"}, "penalties: inf .* finite number, at least 0"),
    ({"penalties": "(1e-4, '1e-3')"}, "penalties: '1e-3' .* number, at least 0"),
    ({"seeds": "(-1,)"}, "seeds: -1 .* whole number, at least 0"),
    ({"seeds": "(None,)"}, "seeds: None .* whole number, at least 0"),
    ({"name": "'my space'"}, "name: 'my space' .* letters, digits"),
    ({"min_channels": "0"}, "min_channels: 0 .* at least 1"),
    ({"winners": "0"}, "winners: 0 .* at least 1"),
    ({"round_to": "0"}, "round_to: 0 .* whole number, at least 1"),
    ({"precision": "'half'"}, "precision: 'half' .* one of auto, float32, bfloat16"),
    ({"channels_last": "1"}, "channels_last: 1 .* must be a bool"),
    ({"halving": "True"}, "halving: True .* must be a Halving"),
    ({"halving": "Halving(reduction=1)"}, r"halving\.reduction: 1 .* at least 2"),
    ({"stop_rule": "StopRule(window=1)"}, r"stop_rule\.window: 1 .* at least 2"),
    ({"stop_rule": "StopRule(threshold=0)"}, r"stop_rule\.threshold: 0 .* above 0 and below 1"),
    ({"stop_rule": "StopRule('papers')"}, r"stop_rule\.rule: 'papers' .* corrected, paper"),
    (
        {"stop_rule": "StopRule(checks_per_epoch=0)"},
        r"stop_rule\.checks_per_epoch: 0 .* at least 1",
    ),
    (
        {"stop_rule": "StopRule(checks_per_epoch=4)"},
        r"stop_rule\.checks_per_epoch: 4 .* at most 3, the batches of an epoch",
    ),
    ({"stop_rule": "None"}, "stop_rule: None .* must be a StopRule"),
    (
        {"training": "Training(epochs=4)"},
        r"training\.epochs: 4 .* enough for stop_rule\.window, which is 5",
    ),
    ({"training": "Training(epochs=0)"}, r"training\.epochs: 0 .* at least 1"),
    ({"proof": "Proof(budget=0)"}, r"proof\.budget: 0 .* finite number above 0"),
    ({"proof": "Proof(rungs=0)"}, r"proof\.rungs: 0 .* at least 1"),
    ({"proof": "Training(epochs=5)"}, r"proof: Training\(.* must be a Proof"),
    ({"training": "Training(epochs=7.5)"}, r"training\.epochs: 7\.5 .* whole number"),
    (
        {"training": "Training(epochs=9, learning_rate=0)"},
        r"training\.learning_rate: 0 .* above 0",
    ),
    ({"training": "Training(epochs=9, momentum=1.0)"}, r"training\.momentum: 1\.0 .* below 1"),
    ({"training": "Training(epochs=9, batch_size=1)"}, r"training\.batch_size: 1 .* at least 2"),
    (
        {"training": "Training(epochs=9, batch_size=64)"},
        r"training\.batch_size: 64 .* at most 28, the number of training images",
    ),
    (
        {"training": "Training(epochs=9, milestones=(3,))"},
        r"training\.milestones: \(3,\) .* `multistep` needs milestones",
    ),
    (
        {"retraining": "Retraining(epochs=9, schedule='multistep')"},
        r"retraining\.milestones: \(\) .* `multistep` needs milestones",
    ),
    (
        {"retraining": "Retraining(epochs=9, num_workers=0)"},
        r"retraining\.num_workers: 0 .* at least 1",
    ),
    (
        {"retraining": "Retraining(epochs=9, weights='old')"},
        r"retraining\.weights: 'old' .* inherit, reinit",
    ),
    ({"retraining": "Training(epochs=9)"}, r"retraining: Training\(.* must be a Retraining"),
    ({"resources": "Resources(cpus_per_trial=0)"}, r"resources\.cpus_per_trial: 0 .* at least 1"),
    ({"resources": "Resources(gpus_per_trial=-1)"}, r"resources\.gpus_per_trial: -1 .* at least 0"),
    ({"network": "'cifar_vgg'"}, "network: 'cifar_vgg' .* must be a Network"),
    ({"network": "Network('cifar_vg')"}, r"network\.name: 'cifar_vg' .* did you mean cifar_vgg"),
    ({"network": "Network('resnet19')"}, r"network\.name: 'resnet19' .* did you mean resnet"),
    ({"network": "Network('unheard-of')"}, "'unheard-of' .* no such network; There are cifar_"),
    ({"network": "Network('vgg16')"}, r"network\.name: 'vgg16' .* no BatchNorm2d"),
    ({"network": "Network('shufflenet_v2_x1_0')"}, "'shufflenet_v2_x1_0' .* cannot trace"),
    (
        {"network": "Network('cifar_vgg', {'depth': 16, 'width': 0.125})"},
        r"network\.name: 'cifar_vgg' .* images of 3x8x8, but fails with",
    ),
    (
        {"network": "Network('cifar_vgg', {'depth': 10})"},
        r"network\.options: \{'depth': 10\} .* depth must be one of 9, 11",
    ),
    ({"network": "Network('cifar_vgg', {'layers': 9})"}, "network.options: .* 'layers'"),
    ({"network": "Network('cifar_vgg', {'width': open})"}, r"network\.options: .* plain values"),
    ({"network": "Network('nest:tiny')"}, "network.name: 'nest:tiny' .* No module named 'nest'"),
    ({"network": "Network('nets:tiny')"}, "network.name: 'nets:tiny' .* no function 'tiny'"),
    ({"network": "Network('nets:nothing')"}, r"must return a torch\.nn\.Module, not NoneType"),
    ({"network": "Network('nets:plain')"}, "'nets:plain' .* no BatchNorm2d"),
    ({"network": "Network('nets:headless')"}, r"must give \[2, 2\] logits .* not \[2, 4, 6, 6\]"),
    (
        {"network": "Network('nets:broken')"},
        "network.options: .* nets:broken raised ValueError: no weights at all",
    ),
    ({"network": "Network('nets:oddly_named')"}, r"no ticket can hold it: .* cannot be '\[1\]'"),
    (
        {"network": "Network('nets:oddly_named', {'note': 'two\\nlines'})"},
        "no ticket can hold it: network.options.note cannot be",
    ),
    (
        {"network": "Network('nets:oddly_named', {'note': 2**63})"},
        "no ticket can hold it: the number 9223372036854775808... is too large",
    ),
    ({"seeds": "(2**63,)"}, r"seeds: 9223372036854775808 .* must be below 2\*\*63"),
    ({"network": "Network('nets:narrow')"}, "images of 3x8x8, but fails with: .*mat1 and mat2"),
    ({"data": "Data('mnist')"}, r"data\.source: 'mnist' .* digits, folder"),
    ({"data": "Data('cifar10')"}, r"data\.path: None .* path of a folder"),
    (
        {"data": "Data('cifar10', 'images')"},
        r"data\.path: 'images' .* is not there; .*download=True",
    ),
    ({"data": "Data('huggingface', 'cats')"}, r"data\.path: 'cats' .* is no folder here; download"),
    ({"data": "Data('digits', loading='stream')"}, r"data\.loading: 'stream' .* always in memory"),
    (
        {"data": "Data('folder', 'images', loading='lazy')"},
        r"data\.loading: 'lazy' .* memory, stream",
    ),
    ({"data": "Data('folder')"}, r"data\.path: None .* path of a folder"),
    ({"data": "Data('folder', 'pictures')"}, r"data\.path: 'pictures' .* must be a folder with"),
    ({"data": "Data('folder', 'images', image_size=0)"}, r"data\.image_size: 0 .* at least 1"),
    ({"data": "Data('folder', 'images', image_size=10**6)"}, "image_size: 1000000 .* memory"),
    ({"data": "Data('folder', 'images', crop_padding=-1)"}, r"data\.crop_padding: -1 .* at least"),
    ({"data": "Data('folder', 'images', validation=0)"}, r"data\.validation: 0 .* above 0"),
    ({"data": "Data('folder', 'images', validation=0.01)"}, r"data\.validation: 0\.01 .* without"),
    (
        {"data": "Data('folder', 'images', validation=0.5, test=0.5)"},
        r"data\.validation: 0\.5 .* below 1 together",
    ),
    ({"ratios": "(0.5,)"}, r"space: 'mine\.py' .* TypeError in line 4 .* argument 'ratios'"),
    ({"proof": "Proof(epochs=5)"}, r"space: 'mine\.py' .* TypeError in line \d+ .* 'epochs'"),
]


@pytest.mark.parametrize(("fields", "said"), SPACES, ids=[said for _, said in SPACES])
def test_a_space_that_cannot_be_used(folder, refusal, fields, said):
    (folder / "mine.py").write_text(source(**fields))
    line = refusal("search", "mine.py")
    assert re.search(said, line), line
    assert " is not allowed: " in line


def nothing(folder):
    pass


def space_file(content):
    return lambda folder: (folder / "mine.py").write_bytes(content)


def empty_class(folder):
    (folder / "images" / "fish").mkdir()


def one_class(folder):
    shutil.rmtree(folder / "images" / "dog")


def no_class(folder):
    shutil.rmtree(folder / "images")
    (folder / "images").mkdir()


def other_classes(folder):
    for split, names in {"train": ("cat", "dog"), "test": ("cat", "cow")}.items():
        for name in names:
            shutil.copytree(folder / "images" / "cat", folder / "split" / split / name)


def broken_image(folder):
    (folder / "images" / "dog" / "3.png").write_bytes(b"\x89PNG\r\n")


def resized(size):
    def prepare(folder):
        from PIL import Image

        for path in (folder / "images").rglob("0.png"):
            Image.new("RGB", size).save(path)

    return prepare


SEARCHES = [
    (nothing, "digit", r"space: 'digit' .* did you mean digits\?"),
    (nothing, "nosuch.py", r"space: 'nosuch\.py' .* no such file"),
    (nothing, "mine.py --smoke", r"smoke: True .* mine\.py takes no argument `smoke`"),
    (space_file(b"def space(): return 1 / 0"), "mine.py", "ZeroDivisionError in line 1 of"),
    (space_file(b"x = '\xe9'"), "mine.py", "syntax error in line 1 of .* can't decode"),
    (nothing, "images", "space: 'images' .* must be one of .* a .py file"),
    (nothing, "mine.py --name a/b", "name: 'a/b' .* letters, digits"),
    (nothing, "mine.py --name=", "name: '' .* letters, digits"),
    (nothing, "mine.py --name ..", r"name: '\.\.' .* letters, digits"),
    (nothing, "mine.py --name a*b", r"name: 'a\*b' .* letters, digits"),
    (nothing, "mine.py --name .hidden", r"name: '\.hidden' .* letters, digits"),
    (nothing, "mine.py --storage mine.py/sweeps", r"storage: 'mine\.py/sweeps' .* writable"),
    (nothing, "mine.py --storage /proc/sweeps", "storage: '/proc/sweeps' .* writable"),
    (nothing, "mine.py --storage ftp://host/x", "storage: 'ftp://host/x' .* folder, or one of s3:"),
    (nothing, "mine.py --storage s3://", "storage: 's3://' .* must be a bucket and names"),
    (nothing, "mine.py --storage s3://b/../x", r"storage: 's3://b/\.\./x' .* must be a bucket"),
    (nothing, "mine.py --storage s3://me:key@b", r"storage: 's3://\.\.\.' .* no credentials"),
    (nothing, "mine.py --data nosuch", r"data\.path: 'nosuch' .* must be a folder"),
    (nothing, "mine.py --data mine.py", r"data\.path: 'mine\.py' .* must be a folder"),
    (no_class, "mine.py", r"data\.path: 'images' .* at least two class folders"),
    (one_class, "mine.py", r"data\.path: 'images' .* at least two class folders"),
    (empty_class, "mine.py", r"data\.path: 'images/fish' .* holds no image"),
    (other_classes, "mine.py --data split", "data.path: 'split/test' .* which are cat, dog"),
    (broken_image, "mine.py", r"data\.path: 'images/dog/3\.png' .* not a readable image"),
    (resized((8, 9)), "mine.py", r"data\.image_size: None .* not square \(8x9 pixels\)"),
    (resized((9, 9)), "mine.py", r"data\.image_size: None .* images differ in size"),
]


@pytest.mark.parametrize(
    ("prepare", "arguments", "said"), SEARCHES, ids=[said for *_, said in SEARCHES]
)
def test_a_search_that_cannot_be_done(folder, refusal, prepare, arguments, said):
    prepare(folder)
    line = refusal("search", *arguments.split())
    assert re.search(said, line), line


COMPARISONS = [
    ("mine.py --seeds 0", r"seeds: 0 .* between 1 and 1000"),
    ("mine.py --seeds=-3", r"seeds: -3 .* between 1 and 1000"),
    ("mine.py --methods=", r"comparison\.methods: '' .* one of dense, early"),
    ("mine.py --prune-ratios inf", r"comparison\.prune_ratios: inf .* above 0 and below 1"),
    ("mine.py --storage ftp://host/x", "storage: 'ftp://host/x' .* folder, or one of s3:"),
    ("nosuch.py", r"space: 'nosuch\.py' .* no such file"),
    ("paper --data images", "data: 'images' .* `compare paper` takes a name"),
    ("paper --smoke", "smoke: True .* `compare paper` takes a name"),
    (
        "mine.py --methods dense eary_bird",
        r"comparison\.methods: 'eary_bird' .* one of dense, early",
    ),
    ("mine.py --methods early_bird", r"comparison\.methods: .* every comparison needs dense"),
    ("mine.py --methods dense random", r"comparison\.methods: .* random needs early_bird"),
    ("mine.py --methods dense dense", r"comparison\.methods: .* each value may occur once"),
    ("mine.py --prune-ratios 1.5", r"comparison\.prune_ratios: 1\.5 .* above 0 and below 1"),
    ("mine.py --prune-ratios 0.5 0.5", r"comparison\.prune_ratios: .* may occur once"),
    ("mine.py --prune-ratios nan", r"comparison\.prune_ratios: nan .* above 0 and below 1"),
    ("mine.py --name a/b", "name: 'a/b' .* letters, digits"),
    ("mine.py --data nosuch", r"data\.path: 'nosuch' .* must be a folder"),
    ("digit", r"space: 'digit' .* did you mean digits\?"),
    ("paper --seeds 3", r"seeds: \(0, 1, 2\) .* `compare paper` takes a name"),
    ("paper --name nosuch", r"sweep: 'sweeps/nosuch' .* must be the folder of a sweep"),
    ("paper --name first", "name: 'first' .* must be a comparison, and this is a sweep"),
    ("paper --name duel", "name: 'duel' .* the paper has nothing for its network and data"),
    ("mine.py --name first", "^name: 'first' .* it is a sweep's, and this is a comp.*; choose"),
    ("mine.py --name duel", "name: 'duel' .* this comparison began with another name, .* a new"),
]


@pytest.mark.parametrize(("arguments", "said"), COMPARISONS, ids=[said for _, said in COMPARISONS])
def test_a_comparison_that_cannot_be_done(folder, refusal, arguments, said):
    write(folder / "sweeps" / "first", FINISHED)
    write(folder / "sweeps" / "duel", made_up_comparison.finished())
    line = refusal("compare", *arguments.split())
    assert re.search(said, line), line


def test_a_rewind_after_the_end_of_training(folder, refusal):
    (folder / "mine.py").write_text(source(comparison="Comparison(rewind=5)"))
    line = refusal("compare", "mine.py")
    assert line.startswith("comparison.rewind: 5 is not allowed: must be below retraining.epochs")


NOT_FOUND = [
    ("report nosuch", "sweep: 'sweeps/nosuch' .* must be the folder of a sweep"),
    ("report mine.py", r"sweep: 'sweeps/mine\.py' .* must be the folder of a sweep"),
    ("report .", r"sweep: '\.' .* the folder of a sweep, which holds journal\.jsonl"),
    ("report images", "sweep: 'images' .* must be the folder of a sweep"),
    ("report ../first", r"sweep: 'sweeps/\.\./first' .* must be the folder of a sweep"),
    ("report bad", "sweep: 'sweeps/bad' .* its journal is damaged: line 1"),
    ("report torn", "sweep: 'sweeps/torn' .* its journal is damaged: line 1"),
    ("report empty", "sweep: 'sweeps/empty' .* its journal is empty"),
    ("report ftp://host/x", "storage: 'ftp://host/x' .* must be a folder, or one of s3:"),
    ("report s3://", "storage: 's3://' .* must be a bucket"),
    ("show nosuch", "ticket: 'nosuch' .* must be a ticket's folder, or an id under sweeps"),
    ("show *", r"ticket: '\*' .* must be a ticket's folder, or an id"),
    ("show mine.py", r"ticket: 'mine\.py' .* must be a ticket's folder, or an id"),
    ("show /nosuch", "ticket: '/nosuch' .* must be a ticket's folder, or an id"),
    ("show images", "ticket: 'images' .* not a whole ticket .*'cat'"),
    ("show sweeps/first", "ticket: 'sweeps/first' .* not a whole ticket"),
    ("show sweeps/first/tickets/none", "ticket: .* not a whole ticket .*No such file"),
    ("show ftp://host/x", "storage: 'ftp://host/x' .* must be a folder, or one of s3:"),
    ("retrain nosuch", "ticket: 'nosuch' .* must be a ticket's folder, or an id"),
    ("retrain images", "sweep: .* must be the folder of a sweep"),
    ("retrain sweeps/first/tickets/none --epochs 0", r"retraining\.epochs: 0 .* at least 1"),
    ("retrain sweeps/first/tickets/none --epochs -1", r"retraining\.epochs: -1 .* at least 1"),
]


@pytest.mark.parametrize(("words", "said"), NOT_FOUND, ids=[words for words, _ in NOT_FOUND])
def test_what_is_not_there_or_damaged(folder, refusal, words, said):
    write(folder / "sweeps" / "first", FINISHED)
    (folder / "sweeps" / "first" / "tickets" / "none").mkdir(parents=True)
    for name, text in {"bad": '{"event"\n{}\n', "torn": '["a"]\n', "empty": ""}.items():
        (folder / "sweeps" / name).mkdir()
        (folder / "sweeps" / name / "journal.jsonl").write_text(text)
    line = refusal(*words.split())
    assert re.search(said, line), line
    assert " is not allowed: " in line


@pytest.mark.parametrize(
    ("changes", "arguments", "said"),
    [
        ({}, "--tracking-uri sqlite:///mine.py", "tracking_uri: .* file is not a database"),
        (
            {"resources": "Resources(cpus_per_trial=64)"},
            "",
            r"resources\.cpus_per_trial: 64 .* no machine of the cluster has over 2",
        ),
        (
            {"resources": "Resources(gpus_per_trial=1)"},
            "",
            r"resources\.gpus_per_trial: 1 .* no machine of the cluster has over 0",
        ),
        (
            {"retraining": "Retraining(epochs=5, batch_size=16, num_workers=8)"},
            "",
            r"retraining\.num_workers: 8 .* room for 2",
        ),
    ],
)
@pytest.mark.usefixtures("ray_instance")
def test_what_only_mlflow_or_the_cluster_can_refuse(folder, cli, changes, arguments, said):
    (folder / "mine.py").write_text(source(**changes))
    code, output, errors = cli("search", "mine.py", "--name", "first", *arguments.split())
    assert code == 2
    assert re.search(f"^raytickets: {said}.*\n\\Z", errors, re.MULTILINE), errors
    assert output == f"sweep first in {folder / 'sweeps' / 'first'}\n"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["serch"], "serch"),
        ([], "search"),
        (["search", "--penalty", "1"], "--penalty"),
        (["search", "--name"], "--name"),
        (["compare", "--prune-ratios", "half"], "half"),
        (["retrain", "x", "--epochs", "many"], "many"),
        (["retrain", "x", "--weights", "old"], "inherit"),
        (["compare", "--seeds", "many"], "many"),
        (["report"], "SWEEP"),
        (["show"], "TICKET"),
        (["spaces", "x"], "x"),
    ],
)
def test_arguments_that_there_are_not(cli, words, said):
    code, output, errors = cli(*words)
    assert (code, output) == (2, "")
    assert said in errors
    assert "Traceback" not in errors


FRESH = """
import sys
from raytickets.cli import main
try:
    main()
finally:
    print(*{"torch", "ray", "mlflow"} & sys.modules.keys())
"""


@pytest.mark.parametrize(
    ("variable", "words", "said"),
    [
        ("RAY_ADDRESS=ftp://host", "", "RAY_ADDRESS: 'ftp://host' .* must be auto or host:port"),
        ("RAY_ADDRESS=127.0.0.1:1", "", r"RAY_ADDRESS: '127\.0\.0\.1:1' .* no Ray cluster"),
        ("", "--address host", "address: 'host' .* must be auto or host:port"),
        ("RAYTICKETS_DEADLINE_S=soon", "", "RAYTICKETS_DEADLINE_S: 'soon' .* at least 0"),
        ("MLFLOW_TRACKING_URI=ftp://host", "", "tracking_uri: 'ftp://host' .* a database or a"),
        ("", "--tracking-uri sqlite:///images", "tracking_uri: 'sqlite:///images' .* Is a direct"),
        ("", "--storage ~nobody-here", "storage: '~nobody-here' .* must be a folder"),
        ("RAYTICKETS_WORK=~nobody/x", "--storage s3://bucket/x", "storage: 's3://bucket/x'"),
    ],
)
def test_what_cannot_be_used_elsewhere_is_seen_before_torch_ray_and_mlflow_are_imported(
    folder, variable, words, said
):
    name, _, value = variable.partition("=")
    done = subprocess.run(
        [sys.executable, "-c", FRESH, "search", "mine.py", *words.split()],
        env=os.environ | ({name: value} if name else {}),
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout) == (2, "\n"), done.stderr
    assert re.fullmatch(f"raytickets: {said}.*\n", done.stderr), done.stderr
    assert sorted(path.name for path in folder.iterdir()) == ["images", "mine.py", "nets.py"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("compare mine.py --address ray://host:1", "address: 'ray://host:1' .* ray job submit"),
        ("retrain sweeps/first/tickets/none --address host", "address: 'host' .* must be auto"),
        ("retrain sweeps/first/tickets/none --tracking-uri x", "tracking_uri: 'x' .* a database"),
        ("sync first --tracking-uri http://", "tracking_uri: 'http://' .* no host"),
    ],
)
def test_every_command_looks_where_ray_and_mlflow_are(folder, refusal, words, said):
    write(folder / "sweeps" / "first", FINISHED)
    (folder / "sweeps" / "first" / "tickets" / "none").mkdir(parents=True)
    line = refusal(*words.split())
    assert re.search(said, line), line

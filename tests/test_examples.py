"""The examples: their data, their networks, a short training run, and an interrupted one."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

EXAMPLES = Path(__file__).parent.parent / "examples"
sys.path.insert(0, str(EXAMPLES))

pytest.importorskip("ignite", reason="the examples need the extra [examples]")

import digits  # noqa: E402
import filters  # noqa: E402
import mnist  # noqa: E402
from models import MODELS  # noqa: E402

import cnnops.nn  # noqa: E402

PARAMETERS = {"lecture": 274_570, "two-layer": 50_186, "keras": 840_554, "mlp": 669_706}


def weights(learner):
    return {name: value.clone() for name, value in learner.model.state_dict().items()}


def assert_same_bits(ours, theirs):
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert torch.equal(ours[name], theirs[name]), name


# The bundled digits


def test_the_bundle_has_the_same_number_of_each_digit():
    training, test = digits.load()
    assert training.images.shape == (10_000, 1, 28, 28) and test.images.shape == (2_000, 1, 28, 28)
    assert training.labels.bincount().tolist() == [1000] * 10
    assert test.labels.bincount().tolist() == [200] * 10


def test_the_digits_are_normalised_and_look_like_ink_on_paper():
    training, _ = digits.load()
    assert training.images.mean().abs() < 1e-4
    assert abs(training.images.std() - 1) < 1e-4
    corners = training.images[:, 0, [0, 0, -1, -1], [0, -1, 0, -1]]
    assert (corners == training.images.min()).all()  # MNIST leaves a margin of 4 pixels of paper


def test_no_bundled_digit_is_in_twice():
    training, test = digits.load()
    every = torch.cat([training.images, test.images]).flatten(1)
    assert len(every.unique(dim=0)) == 12_000


def test_the_bundle_is_small_and_has_its_licence():
    files = list((digits.BUNDLE / "MNIST" / "raw").glob("*.gz"))
    assert len(files) == 4 and sum(file.stat().st_size for file in files) < 2_100_000
    readme = (EXAMPLES / "data" / "README.md").read_text()
    for words in ("Yann LeCun", "Corinna Cortes", "Burges", "CC BY-SA 3.0", "make_digits.py"):
        assert words in readme


@pytest.mark.parametrize("unpacked", [False, True], ids=["gz", "unpacked"])
@pytest.mark.parametrize("below", ["", "FashionMNIST/raw"], ids=["flat", "torchvision"])
def test_other_folders_are_read_too(tmp_path, below, unpacked):
    folder = tmp_path / below
    shutil.copytree(digits.BUNDLE / "MNIST" / "raw", folder, dirs_exist_ok=True)
    if unpacked:
        subprocess.run(["gunzip", *folder.glob("*.gz")], check=True)
    training, _ = digits.load(tmp_path, "fashion", limit=7)
    assert torch.equal(training.labels, digits.load()[0].labels[:7])


def test_torchvision_reads_the_bundle(tmp_path):
    torchvision = pytest.importorskip("torchvision")
    shutil.copytree(digits.BUNDLE, tmp_path, dirs_exist_ok=True)
    subprocess.run(["gunzip", *tmp_path.rglob("*.gz")], check=True)
    theirs = torchvision.datasets.MNIST(tmp_path, train=False, download=False)
    _, ours = digits.load()
    assert torch.equal(theirs.targets, ours.labels)
    ink = theirs.data.flatten().float()
    assert torch.corrcoef(torch.stack([ink, ours.images.flatten()]))[0, 1] > 0.9999


def test_shuffled_batches_start_anywhere():
    everything = digits.Digits(torch.arange(10.0).view(10, 1, 1, 1), torch.arange(10))
    stream = everything.shuffled_batches(4, seed=1)
    labels = [next(stream)[1].tolist() for _ in range(9)]  # three epochs of 4 + 4 + 2
    epochs = [sum(labels[i : i + 3], []) for i in (0, 3, 6)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    for start in range(9):
        assert next(everything.shuffled_batches(4, seed=1, start=start))[1].tolist() == labels[start]


# The networks


@pytest.mark.parametrize("name", MODELS)
def test_parameters(name):
    for ops in (cnnops.nn, torch.nn):
        model = MODELS[name].build(ops)
        assert sum(weight.numel() for weight in model.parameters()) == PARAMETERS[name]
        assert model(torch.zeros(2, 1, 28, 28)).shape == (2, 10)


def test_ours_is_made_of_cnnops_and_the_twin_is_not():
    def homes(ops):
        return {type(layer).__module__.split(".")[0] for layer in MODELS["lecture"].build(ops)}

    assert homes(cnnops.nn) == {"cnnops", "torch"}  # torch for the linear layer
    assert homes(torch.nn) == {"torch"}


# Training


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Runs the example on 200 of the test digits, and draws only when told to."""

    def few(*arguments):
        training, test = digits.load(*arguments)
        return training, digits.Digits(test.images[:200], test.labels[:200])

    def run(*arguments, picture=None):
        if not picture:
            monkeypatch.setattr(mnist.pictures, "draw_run", lambda *arguments: None)
        return mnist.main([*map(str, arguments), "--picture", str(picture or tmp_path / "none.png")])

    monkeypatch.setattr(mnist, "load", few)
    return run


@pytest.fixture
def double_precision():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("name", MODELS)
def test_the_loss_follows_the_twins(tmp_path, run, name):
    _, history = run("--model", name, "--limit", 960, "--epochs", 1, picture=tmp_path / "run.png")
    ours, twins = (torch.tensor(history[net]["loss"]) for net in ("cnnops", "torch.nn"))
    assert len(ours) == 15
    # Training multiplies a difference of rounding quickly, here by up to 10^5: so do two layouts of torch's own.
    assert (ours[0] - twins[0]).abs() < 1e-5
    assert (ours - twins).abs().max() < 0.05
    assert ours[-5:].mean() < 0.8 * ours[0]  # and it learns
    assert (tmp_path / "run.png").stat().st_size > 20_000


@pytest.mark.parametrize("name", MODELS)
def test_the_loss_is_the_twins_in_double_precision(double_precision, run, name):
    _, history = run("--model", name, "--limit", 640, "--epochs", 1)
    ours, twins = (torch.tensor(history[net]["loss"]) for net in ("cnnops", "torch.nn"))
    assert (ours - twins).abs().max() < 1e-8  # no gradient is even slightly wrong


@pytest.mark.parametrize("model", ["two-layer", "keras"])  # keras draws random numbers for its dropout
def test_an_interrupted_run_reaches_the_same_bits(tmp_path, monkeypatch, run, model):
    settings = ["--model", model, "--limit", 320, "--epochs", 3, "--seed", 5]
    learners, history = run(*settings)
    expected = [weights(learner) for learner in learners]

    # The same run is interrupted in the midst of its second epoch,
    step, calls = mnist.Learner.step, iter(range(100))

    def interrupted_step(learner, images, labels):
        if next(calls) == 15:  # two networks, five steps in an epoch
            raise KeyboardInterrupt
        return step(learner, images, labels)

    saved = tmp_path / "saved"
    with monkeypatch.context() as patch, pytest.raises(SystemExit, match="--resume .*saved goes on"):
        patch.setattr(mnist.Learner, "step", interrupted_step)
        run(*settings, "--save", saved)
    assert [file.name for file in saved.iterdir()] == ["checkpoint_5.pt"]

    # whatever happens to torch's random numbers meanwhile;
    torch.manual_seed(99)
    learners, resumed_history = run("--resume", saved)
    for learner, weights_then in zip(learners, expected, strict=True):
        assert_same_bits(weights(learner), weights_then)
    for name in history:
        assert resumed_history[name]["loss"] == history[name]["loss"]
        assert resumed_history[name]["accuracy"] == history[name]["accuracy"]

    # and a finished run stays as it is.
    learners, _ = run("--resume", saved)
    assert_same_bits(weights(learners[0]), expected[0])
    assert sorted(file.name for file in saved.iterdir()) == ["checkpoint_10.pt", "checkpoint_15.pt"]


def test_the_seed_decides(run):
    runs = [run("--no-twin", "--limit", 128, "--epochs", 1, "--seed", seed)[0] for seed in (1, 1, 2)]
    first, again, other = (weights(learners[0]) for learners in runs)
    assert_same_bits(first, again)
    assert not torch.equal(first["0.weight"], other["0.weight"])


def test_channels_last_and_an_algorithm_by_name(run):
    _, history = run("--limit", 128, "--epochs", 1, "--channels-last", "--algorithm", "direct")
    ours, twins = (torch.tensor(of["loss"]) for of in history.values())
    assert (ours - twins).abs().max() < 1e-4


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--dataset", "fashion"], "only MNIST is bundled"),
        (["--download"], "only MNIST is bundled"),
        (["--resume", "nowhere"], "there is no checkpoint in nowhere"),
        (["--save", "saved"], "--resume saved goes on"),
        (["--resume", "saved", "--epochs", "9"], "--epochs was 1"),
        (["--resume", "saved", "--save", "other"], "not allowed with"),
        pytest.param(
            ["--device", "cuda"],
            "no GPU",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU"),
        ),
    ],
)
def test_refusals(tmp_path, monkeypatch, capsys, run, arguments, message):
    monkeypatch.chdir(tmp_path)
    if "saved" in arguments:
        run("--no-twin", "--model", "mlp", "--limit", 64, "--epochs", 1, "--save", "saved")
    with pytest.raises(SystemExit):
        mnist.main(arguments)
    assert message in capsys.readouterr().err


def test_missing_data_is_said(tmp_path):
    with pytest.raises(SystemExit, match="train-images-idx3-ubyte.gz is in"):
        mnist.main(["--data-root", str(tmp_path)])


# As a newcomer types it


def test_commands(tmp_path):
    def python(*arguments):
        command = [sys.executable, *map(str, arguments)]
        path = os.pathsep.join([str(Path(cnnops.__file__).parent.parent), os.environ.get("PYTHONPATH", "")])
        environment = os.environ | {"PYTHONPATH": path}  # the same cnnops as here
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    out = python(EXAMPLES / "mnist.py", "--epochs", 1, "--limit", 256, "--model", "two-layer")
    for words in ("50,186 parameters", "test accuracy", "time per step", "largest difference", "runs/mnist.png"):
        assert words in out
    assert "filters.png" in python(EXAMPLES / "filters.py")
    for name in ("mnist.png", "filters.png"):
        picture = (tmp_path / "runs" / name).read_bytes()
        assert picture.startswith(b"\x89PNG") and 20_000 < len(picture) < 300_000


def test_the_filters_do_what_their_names_say():
    flat = torch.ones(9, 9)
    for name, inside in [("outline", 0), ("emboss", 1), ("blur", 1), ("diagonal", 0)]:
        convolved, activated, pooled = filters.apply(flat, filters.FILTERS[name])
        assert torch.equal(convolved[1:-1, 1:-1], torch.full((7, 7), float(inside)))
        assert activated.min() >= 0 and pooled.shape == (4, 4)
    diagonals = torch.eye(8), torch.eye(8).flip(0)
    falling, rising = (filters.apply(line, filters.FILTERS["diagonal"])[2].max() for line in diagonals)
    assert falling == 6 and falling > 2 * rising

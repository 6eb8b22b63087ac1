"""Train a CNN made of cnnops on handwritten digits, side by side with its twin made of torch.nn.

    python examples/mnist.py                                     the lecture's CNN on the bundled digits
    python examples/mnist.py --model keras                       another network of models.py
    python examples/mnist.py --data-root data --download         the full MNIST, fetched by torchvision
    python examples/mnist.py --save runs/a                       keep checkpoints; and after an interruption:
    python examples/mnist.py --resume runs/a                     go on, to the same final weights bit for bit

Both networks start from the same weights and see the same batches (and the same dropout), so all that can tell them
apart is rounding. At the end come a table and a picture.
"""

import argparse
import time
from operator import itemgetter
from pathlib import Path

import pictures
import torch
from digits import BUNDLE, CLASSES, Digits, load
from ignite.engine import Engine, Events, create_supervised_evaluator
from ignite.handlers import Checkpoint, DiskSaver, ProgressBar
from ignite.metrics import Accuracy, RunningAverage
from models import MODELS
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import cnnops.nn

console = Console(highlight=False)
NOT_KEPT = {"save", "resume", "download", "picture"}  # options that a checkpoint does not remember
MAY_CHANGE = {"data_root", "device"}  # options that a resumed run may change


class Learner:
    """A network and what it takes to train it."""

    def __init__(self, name: str, model: nn.Module, options: argparse.Namespace, steps: int):
        memory_format = torch.channels_last if options.channels_last else torch.contiguous_format
        self.name = name
        self.model = model.to(options.device, memory_format=memory_format)
        self.loss = MODELS[options.model].loss
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=options.lr)
        # Large steps first, ever smaller ones towards the end.
        self.schedule = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, steps)
        self.evaluator = create_supervised_evaluator(self.model, {"accuracy": Accuracy()})
        if options.compile:
            self.model.compile()

    def step(self, images: Tensor, labels: Tensor) -> float:
        """Learn from one batch: forward, backward, one step downhill."""
        self.model.train()
        self.optimizer.zero_grad()
        loss = self.loss(self.model(images), labels)
        loss.backward()
        self.optimizer.step()
        self.schedule.step()
        return loss.item()  # on a GPU this waits until all of the above is done

    def test(self, digits: Digits) -> float:
        """The share of the digits that it recognises."""
        return self.evaluator.run(digits.batches(500)).metrics["accuracy"]

    @property
    def parts(self) -> dict:
        """What a checkpoint keeps of it."""
        return {"model": self.model, "optimizer": self.optimizer, "schedule": self.schedule}


def make_learners(options: argparse.Namespace, steps: int) -> list[Learner]:
    """Our network and, unless --no-twin, torch's with the same initial weights."""
    torch.manual_seed(options.seed)
    build = MODELS[options.model].build
    ours = build(cnnops.nn)
    if options.algorithm:
        for layer in ours.modules():
            if isinstance(layer, cnnops.nn.Conv2d):
                layer.algorithm = options.algorithm
    learners = [Learner("cnnops", ours, options, steps)]
    if not options.no_twin:
        twin = build(torch.nn)
        twin.load_state_dict(ours.state_dict())
        learners.append(Learner("torch.nn", twin, options, steps))
    return learners


def make_trainer(learners: list[Learner], test: Digits, options: argparse.Namespace) -> Engine:
    """The training loop: an Engine calls `step` for every batch, and its handlers do everything else."""

    def step(engine: Engine, batch: tuple[Tensor, Tensor]) -> dict[str, float]:
        losses = {}
        for learner in learners:
            # Dropout draws from here: the same for both networks, and for a resumed run.
            torch.manual_seed(options.seed + engine.state.iteration)
            start = time.perf_counter()
            losses[learner.name] = learner.step(*batch)
            engine.state.history[learner.name]["seconds"].append(time.perf_counter() - start)
        return losses

    trainer = Engine(step)
    trainer.state.history = {learner.name: {"loss": [], "seconds": [], "accuracy": []} for learner in learners}
    trainer.state.settings = {name: value for name, value in vars(options).items() if name not in NOT_KEPT}
    trainer.state_dict_user_keys.extend(["history", "settings"])  # checkpoints keep them, too

    for learner in learners:
        running = RunningAverage(output_transform=itemgetter(learner.name), alpha=0.9)
        running.attach(trainer, f"{learner.name} loss")
    progress = ProgressBar(persist=True)
    progress.attach(trainer, metric_names="all")

    @trainer.on(Events.ITERATION_COMPLETED)
    def keep_losses(engine: Engine) -> None:
        for name, loss in engine.state.output.items():
            engine.state.history[name]["loss"].append(loss)

    @trainer.on(Events.EPOCH_COMPLETED)
    def test_all(engine: Engine) -> None:
        for learner in learners:
            engine.state.history[learner.name]["accuracy"].append(learner.test(test))
        scores = [f"{learner.name} {engine.state.history[learner.name]['accuracy'][-1]:.2%}" for learner in learners]
        progress.log_message(f"Test accuracy after epoch {engine.state.epoch}: {', '.join(scores)}")

    return trainer


def train(options: argparse.Namespace, training: Digits, test: Digits) -> tuple[list[Learner], dict]:
    """Train from the start or from a checkpoint. Returns the networks and the history of the run."""
    steps_per_epoch = -(-len(training) // options.batch_size)  # rounded up
    steps = steps_per_epoch * options.epochs
    learners = make_learners(options, steps)
    parameters = sum(weights.numel() for weights in learners[0].model.parameters())
    console.print(
        f"{options.model}: {parameters:,} parameters; {len(training):,} training images, {len(test):,} test images"
    )
    trainer = make_trainer(learners, test, options)

    parts = {"trainer": trainer, **{learner.name: learner.parts for learner in learners}}
    folder = options.resume or options.save
    if folder:
        saver = Checkpoint(parts, DiskSaver(folder, require_empty=False), n_saved=2, include_self=True)
        trainer.add_event_handler(Events.EPOCH_COMPLETED, saver)
    if options.resume:
        checkpoint = torch.load(newest_checkpoint(folder), options.device, weights_only=True)
        Checkpoint.load_objects({**parts, "checkpointer": saver}, checkpoint)

    done = trainer.state.iteration
    if done < steps:
        batches = training.shuffled_batches(options.batch_size, options.seed, start=done)
        trainer.run(batches, max_epochs=options.epochs, epoch_length=steps_per_epoch)
    return learners, trainer.state.history


def newest_checkpoint(folder: str) -> Path | None:
    """The file of the run's last completed epoch: checkpoint_<step>.pt with the largest step."""
    return max(Path(folder).glob("checkpoint_*.pt"), key=lambda file: int(file.stem.split("_")[1]), default=None)


def report(history: dict, seconds: float) -> None:
    """The table at the end."""
    names = list(history)
    table = Table("")
    for name in names:
        table.add_column(name, justify="right")
    table.add_row("test accuracy", *(f"{history[name]['accuracy'][-1]:.2%}" for name in names))
    table.add_row("time per step, median", *(f"{1000 * median(history[name]['seconds']):.1f} ms" for name in names))
    table.add_row("training time", *(f"{sum(history[name]['seconds']):.0f} s" for name in names))
    console.print(table)
    if len(names) > 1:
        difference = pictures.loss_difference(history)
        step = difference.argmax()
        console.print(f"largest difference of loss along the way: {difference[step]:.2g}, at step {step + 1}")
    console.print(f"all in all {seconds:.0f} s")


def median(values: list[float]) -> float:
    return torch.tensor(values).median().item()


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Train a CNN made of cnnops on handwritten digits, side by side with its torch.nn twin."
    )
    add = parser.add_argument
    add("--model", choices=MODELS, default="lecture", help="a network of models.py (%(default)s)")
    add("--no-twin", action="store_true", help="train ours only")
    add("--dataset", choices=CLASSES, default="mnist", help="digits, or clothes (%(default)s)")
    add("--data-root", metavar="DIR", help="other data than the bundled: as torchvision lays it out, or the four files")
    add("--download", action="store_true", help="let torchvision fetch the data set into --data-root")
    add("--limit", type=int, metavar="N", help="train on the first N digits only")
    add("--epochs", type=int, default=5, help="how often to go through the training digits (%(default)s)")
    add("--batch-size", type=int, default=64, help="digits per step (%(default)s)")
    add("--lr", type=float, default=1e-3, help="learning rate at the start; it falls to 0 along a cosine (%(default)s)")
    add(
        "--seed", type=int, default=0, help="of the initial weights, the order of the digits, and dropout (%(default)s)"
    )
    add("--device", default="cpu", help="cpu or cuda (%(default)s)")
    add("--channels-last", action="store_true", help="keep the channels of a pixel next to each other in memory")
    add("--compile", action="store_true", help="torch.compile both networks")
    add("--algorithm", help="run our convolutions with this one, not the one that cnnops would choose")
    checkpoints = parser.add_mutually_exclusive_group()
    checkpoints.add_argument("--save", metavar="DIR", help="write a checkpoint there after every epoch")
    checkpoints.add_argument("--resume", metavar="DIR", help="go on from the last checkpoint there, as it was set")
    add("--picture", default="runs/mnist.png", metavar="FILE", help="where the picture goes (%(default)s)")
    options = parser.parse_args(arguments)

    if options.resume:
        checkpoint = newest_checkpoint(options.resume)
        if not checkpoint:
            parser.error(f"there is no checkpoint in {options.resume}: no epoch was completed")
        settings = torch.load(checkpoint, "cpu", weights_only=True)["trainer"]["settings"]
        parser.set_defaults(**settings)
        options = parser.parse_args(arguments)
        for name in settings.keys() - MAY_CHANGE:
            if getattr(options, name) != settings[name]:
                parser.error(f"a resumed run keeps its settings, and --{name.replace('_', '-')} was {settings[name]}")
    elif options.save and newest_checkpoint(options.save):
        parser.error(f"{options.save} has checkpoints already: --resume {options.save} goes on with them")
    if options.device.startswith("cuda") and not torch.cuda.is_available():
        parser.error("torch sees no GPU here")
    if not options.data_root and (options.download or options.dataset != "mnist"):
        parser.error("only MNIST is bundled: give a folder with --data-root, and --download to fetch the data into it")
    return options


def main(arguments: list[str] | None = None) -> tuple[list[Learner], dict]:
    options = parse(arguments)
    memory_format = torch.channels_last if options.channels_last else torch.contiguous_format
    try:
        training, test = load(
            options.data_root or BUNDLE, options.dataset, options.download, options.limit, options.device, memory_format
        )
    except FileNotFoundError as error:
        raise SystemExit(f"No {options.dataset} here: {error}") from None
    start = time.perf_counter()
    try:
        learners, history = train(options, training, test)
    except KeyboardInterrupt:
        folder = options.resume or options.save
        go_on = f" --resume {folder} goes on." if folder and newest_checkpoint(folder) else ""
        raise SystemExit("Interrupted." + go_on) from None
    report(history, time.perf_counter() - start)
    pictures.draw_run(options.picture, options.model, history, learners[0].model, test, CLASSES[options.dataset])
    console.print(f"picture: {options.picture}")
    return learners, history


if __name__ == "__main__":
    main()

"""What an epoch of training costs, as a ratio to a plain PyTorch loop: ``DataLoader``, transforms image by image.

    python benchmarks/training.py                                                # on a GPU if there is one
    python benchmarks/training.py --workers 8
    python benchmarks/training.py --device cpu --threads 1 --clock cpu           # on a busy machine

Both train the same network by the same optimizer on the same random images of CIFAR's shape with the standard
augmentation, and count loss and accuracy; evaluation and files are left out. The plain loop is the usual one: images
become Pillow's, are padded by 4 and cropped, mirrored, made a tensor and normalized as torchvision's transforms do it;
the loss is read after every update. Times are of epochs interleaved in one process; "batches alone" trains nothing.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

import harness
from flatminima.lab.data import ImageSet
from flatminima.lab.networks import build_model, resolve_device
from flatminima.lab.runs import RECIPES, RunSpec, Session, TrainingSets, launch

OURS, PLAIN = "flatminima", "plain loop"
SIZE, PADDING = 32, 4


def images(count: int) -> ImageSet:
    """Random images with random labels."""
    generator = torch.Generator().manual_seed(0)
    return ImageSet(
        images=torch.randint(256, (count, 3, SIZE, SIZE), generator=generator, dtype=torch.uint8),
        labels=torch.randint(10, (count,), generator=generator),
        num_classes=10,
        mean=torch.tensor([0.4914, 0.4822, 0.4465]),
        std=torch.tensor([0.2470, 0.2435, 0.2616]),
    )


class Transformed(Dataset[tuple[Tensor, int]]):
    """The images one by one, each transformed when it is asked for."""

    def __init__(self, data: ImageSet, *, augmented: bool = True) -> None:
        self.pixels = data.images.permute(0, 2, 3, 1).contiguous().numpy()  # (N, H, W, C), as CIFAR is kept
        self.labels = data.labels.tolist()
        self.mean, self.std = data.mean[:, None, None], data.std[:, None, None]
        self.augmented = augmented

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        """The image ``(C, H, W)`` and its label."""
        image = Image.fromarray(self.pixels[index])
        if self.augmented:
            image = ImageOps.expand(image, border=PADDING, fill=0)
            left, top = random.randint(0, 2 * PADDING), random.randint(0, 2 * PADDING)
            image = image.crop((left, top, left + SIZE, top + SIZE))
            if random.random() < 0.5:
                image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        tensor = torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous().float().div_(255)
        return tensor.sub_(self.mean).div_(self.std), self.labels[index]


class PlainLoop:
    """The training loop of a tutorial."""

    def __init__(self, spec: RunSpec, data: ImageSet, workers: int, device: torch.device, layout: Any) -> None:
        torch.manual_seed(0)
        self.device = device
        self.model = build_model(spec.model).to(device, memory_format=layout)
        self.optimizer = torch.optim.SGD(
            self.model.parameters(),
            lr=spec.lr,
            momentum=spec.momentum,
            nesterov=spec.nesterov,
            weight_decay=spec.weight_decay,
        )
        self.loader = DataLoader(
            Transformed(data),
            batch_size=spec.batch_size,
            shuffle=True,
            drop_last=True,
            num_workers=workers,
            persistent_workers=workers > 0,
            pin_memory=device.type == "cuda",
        )

    def epoch(self) -> None:
        """Train on every image once."""
        loss_sum, correct = 0.0, 0
        for inputs, targets in self.loader:
            x, y = inputs.to(self.device, non_blocking=True), targets.to(self.device, non_blocking=True)
            self.optimizer.zero_grad()
            logits = self.model(x)
            loss = F.cross_entropy(logits, y)
            loss.backward()
            self.optimizer.step()
            loss_sum += loss.item()
            correct += int((logits.argmax(1) == y).sum())

    def batches(self) -> None:
        """Make an epoch's batches, and leave them."""
        for inputs, targets in self.loader:
            inputs.to(self.device), targets.to(self.device)


class Ours:
    """A run's updates."""

    def __init__(self, spec: RunSpec, data: ImageSet, device: torch.device) -> None:
        few = data.subset(range(2))
        self.run = Session(spec, TrainingSets(data, data, few, few), launch(spec, device.type))

    def epoch(self) -> None:
        """Train on every image once."""
        for _ in range(self.run.iterations_per_epoch):
            self.run.update()
        self.run.read()

    def batches(self) -> None:
        """Make an epoch's batches, and leave them."""
        for _ in range(self.run.iterations_per_epoch):
            inputs, _ = self.run.next_batch()
        inputs.sum().item()  # the device is done


def times(network: str, count: int, workers: int, repetitions: int, clock: str, device: str) -> dict[str, Any]:
    """Seconds per epoch by method."""
    where, data, spec = resolve_device(device), images(count), RECIPES[network]
    require_same_images(data)
    ours = Ours(spec, data, where)
    plain, channels_last = (
        PlainLoop(spec, data, workers, where, layout) for layout in (torch.contiguous_format, torch.channels_last)
    )
    epochs: dict[str, Callable[[], object]] = {
        OURS: ours.epoch,
        PLAIN: plain.epoch,
        f"{PLAIN}, channels-last": channels_last.epoch,
        f"{OURS}, batches alone": ours.batches,
        f"{PLAIN}, batches alone": plain.batches,
    }
    for epoch in epochs.values():  # make pools, and start workers, first
        epoch()
    return harness.interleaved(epochs, repetitions, clock)


def require_same_images(data: ImageSet) -> None:
    """Raise AssertionError unless both make the same of an image that is not augmented."""
    ours, plain = data.normalize(data.images[:8]), Transformed(data, augmented=False)
    torch.testing.assert_close(torch.stack([plain[i][0] for i in range(8)]), ours)


def summary(seconds: dict[str, list[float]]) -> dict[str, Any]:
    """Seconds per epoch, and their ratio to the plain loop's, or to the plain loop's batches."""
    return {
        name: {
            "seconds": harness.summary(values),
            "ratio": harness.ratios(values, seconds[f"{PLAIN}, batches alone" if "alone" in name else PLAIN]),
        }
        for name, values in seconds.items()
    }


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", choices=["resnet20", "cnn", "wrn28-2"], default=["resnet20", "cnn"])
    parser.add_argument("--images", type=int, default=1280, help="in an epoch (default: 1280, ten mini-batches)")
    parser.add_argument("--workers", type=int, default=0, help="processes of the plain loop's DataLoader (default: 0)")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda", "mps"], default="auto")
    options = harness.parse(parser)
    if options.clock == "cpu" and options.workers:
        parser.error("--clock cpu does not see what worker processes take: use it with --workers 0")
    device = resolve_device(options.device)
    record: dict[str, Any] = {
        "environment": harness.environment(options, device.type),
        "images": options.images,
        "workers": options.workers,
        "results": {},
    }
    for network in options.networks:
        arguments = (network, options.images, options.workers, options.repetitions, options.clock, device.type)
        seconds = harness.in_own_process(times, *arguments, **harness.limits(options))
        result = seconds if "error" in seconds else summary(seconds)
        record["results"][network] = result
        path = harness.write_json(options.output or "training", record)
        print(f"\n{network} on {record['environment']['device']}, {options.images} images an epoch")
        if "error" in result:
            print(f"  fails: {result['error']}")
            continue
        for name, row in result.items():
            ratio = row["ratio"]
            spread = f"({ratio['min']:.2f} – {ratio['max']:.2f})"
            print(f"  {name:30} {row['seconds']['median']:8.3f} s  {ratio['median']:5.2f} {spread}", flush=True)
    print(f"written to {path}")


if __name__ == "__main__":
    main()

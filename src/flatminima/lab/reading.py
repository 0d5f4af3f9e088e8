"""How a user's own data are read and made a network's inputs: options alone, which the command line shows."""

from __future__ import annotations

from dataclasses import dataclass

from flatminima.errors import FlatminimaError, require, require_positive


@dataclass(frozen=True)
class Reading:
    """How data are read and prepared; what is left out is guessed, and said.

    Raises:
        FlatminimaError: For a value outside its range.
    """

    split: str = "train"
    """Which part of a Hugging Face data set: the one that the network was trained on."""
    input_column: tuple[str, ...] = ()
    """Column or array of the images or texts; two columns for pairs of texts (None: by type and name)."""
    label_column: str | None = None
    """Column or array of the labels (None: by type and name)."""
    train_size: int | None = None
    """Only so many of the samples, drawn at random, always the same ones (None: all). Of image folders, `normalize` as
    data is then by these alone."""
    normalize: str | None = None
    """How the training normalized pixels of 0 to 1, as ``Normalization.named`` reads it (None: as a run, a checkpoint
    of ours, or a network's own transforms say; else a guess that is said, by the training loss)."""
    resize: str | None = None
    """Pixels of every image's shorter side, or HEIGHTxWIDTH (None: images as they are, or as the network's own
    transforms make them)."""
    crop: int | None = None
    """Then only the middle, so many pixels square (None: all of it)."""
    in_channels: int | None = None
    """Make every image grey (1) or RGB (3), as torchvision's ImageFolder does with 3 (None: as the first one is)."""
    max_length: int | None = None
    """Tokens of a text at most (None: as many as the network takes)."""

    def __post_init__(self) -> None:
        require(len(self.input_column) <= 2, f"input_column takes one name, or two, got {', '.join(self.input_column)}")
        require(self.in_channels in (None, 1, 3), f"in_channels must be 1 (grey) or 3 (RGB), got {self.in_channels}")
        for name in ("train_size", "crop", "max_length"):
            if getattr(self, name) is not None:
                require_positive(name, getattr(self, name))
        _ = self.size

    @property
    def size(self) -> tuple[int, ...] | None:
        """What ``resize`` says: the shorter side, or height and width."""
        if self.resize is None:
            return None
        try:
            sides = tuple(int(side) for side in self.resize.lower().split("x"))
        except ValueError:
            sides = ()
        if not 1 <= len(sides) <= 2 or min(sides) < 1:
            raise FlatminimaError(
                f"resize must be a number of pixels, or HEIGHTxWIDTH as in 224x224, got {self.resize!r}"
            )
        return sides

    @property
    def changes_images(self) -> bool:
        """Whether images are prepared in another way than their network's own."""
        return any(option is not None for option in (self.normalize, self.resize, self.crop, self.in_channels))

"""scikit-learn's 8x8 digits: real data without a download, and a classifier that judges them."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..randomness import Place, fresh_seed, generator_for, global_rng
from ..training.progress import ProgressBar

DIGIT_SHAPE = (1, 8, 8)


def digits() -> tuple[Tensor, Tensor]:
    """All 1797 images, ``(1797, 1, 8, 8)`` in [-1, 1], and their labels ``(1797,)``.

    Raises:
        ImportError: scikit-learn is not installed; names the extra that has it.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ImportError(
            "the digits come with scikit-learn, which is not installed; pip install 'sdecontrol[examples]'."
        ) from error
    bunch: Any = load_digits()
    images = torch.tensor(bunch.images, dtype=torch.get_default_dtype()).div(8).sub(1)
    return images.unsqueeze(1), torch.tensor(bunch.target, dtype=torch.long)


class DigitClassifier(nn.Module):
    """A small convolutional network: images ``(batch, 1, 8, 8)`` to logits ``(batch, 10)``."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1),
            nn.SiLU(),
            nn.Conv2d(16, 32, 3, padding=1, stride=2),
            nn.SiLU(),
            nn.Flatten(),
            nn.Linear(32 * 4 * 4, 64),
            nn.SiLU(),
            nn.Linear(64, 10),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)


_BATCH, _NOISE, _SMOOTHING = 128, 0.4, 0.02  # of the classifier: images of a step, their noise, that of labels


def fit_digit_classifier(
    images: Tensor,
    labels: Tensor,
    *,
    iterations: int = 1500,
    seed: int | None = None,
    progress: bool | None = None,
) -> DigitClassifier:
    """Cross-entropy on images with Gaussian noise, its standard deviation uniform in [0, 0.4] per image.

    Noise and label smoothing keep the log-probabilities tame off the data, where a reward is asked too.
    """
    seed = fresh_seed(seed)
    with global_rng("cpu", seed, Place.CLASSIFIER_WEIGHTS):
        network = DigitClassifier().to(images)
    generator = generator_for("cpu", seed, Place.CLASSIFIER_BATCH)
    optimizer = torch.optim.AdamW(network.parameters(), lr=3e-3, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, iterations)
    with ProgressBar(iterations, "classifier", progress, measure="loss") as bar:
        for i in range(iterations):
            index = torch.randint(len(images), (_BATCH,), generator=generator)
            x = images[index]
            sd = _NOISE * torch.rand((_BATCH, 1, 1, 1), generator=generator, dtype=x.dtype)
            x = x + sd * torch.randn(x.shape, generator=generator, dtype=x.dtype)
            loss = F.cross_entropy(network(x), labels[index], label_smoothing=_SMOOTHING)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            schedule.step()
            bar.update(i + 1, iterations, {"loss": float(loss.detach())})
    return network.eval()

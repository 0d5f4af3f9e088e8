"""Made-up minima, for what is computed from records."""

from __future__ import annotations

from typing import Any

from flatminima.lab.experiments import INDICATORS, Record


def record_of(
    case: str,
    arm: str,
    seed: int,
    test_error: float,
    *,
    run: str | None = None,
    train_accuracy: float = 1.0,
    seconds: float = 1.0,
    warnings: tuple[str, ...] = (),
    **indicators: Any,
) -> Record:
    """A minimum whose indicators are 1 where they are not named."""
    return Record(
        case=case,
        arm=arm,
        seed=seed,
        run=run or f"{case} {arm} {seed}",
        test_error=test_error,
        validation_error=None,
        train_accuracy=train_accuracy,
        indicators={**dict.fromkeys(INDICATORS, 1.0), **indicators},
        seconds=seconds,
        warnings=warnings,
        environment={},
    )

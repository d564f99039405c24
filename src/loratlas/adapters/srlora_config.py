"""The options of SRLoRA; `srlora` says what they do."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from loratlas.engine.config import SvdConfig, knob
from loratlas.engine.reservoir import LORA_LENGTH
from loratlas.errors import UserError

# what makes the directions of the gradient pay, see benchmarks/srlora_study.py
GRADIENT: dict[str, Any] = {
    "init_weights": "lora",
    "reservoir": "gradient",
    "select": "oldest",
    "optimizer_reset": "corrected",
    "fresh_length": 0.3,
    "fresh_warmup": 3,
}


@dataclass
class SRLoraConfig(SvdConfig):
    """SRLoRA. Defaults are the sheet's; what the paper does not say is marked as a choice in the docs.

    Training needs `loratlas.attach(model, optimizer, total_steps=N)` or `LifecycleCallback` in a Trainer; without it
    the adapter trains as PiSSA. Use weight_decay=0: decay pulls b a towards 0 and so takes principal directions out of
    W.

    Raises:
        UserError: a field is out of its range.
    """

    r_target: int | None = knob(
        None, "Directions visited in total, at least r; None: 4 r. Clipped to what a layer has."
    )
    gamma: float = knob(0.5, "Fraction of the pairs recomposed at an event; 0 means none (PiSSA).")
    beta1: float = knob(0.85, "Moving average of the sensitivity.")
    beta2: float = knob(0.85, "Moving average of the uncertainty.")
    schedule: str = knob(
        "spread", "'spread': the last pairs train as long as the others. 'paper': interval N / N_switch."
    )
    total_step: int | None = knob(None, "Optimizer steps of the run; None: from attach or the Trainer.")
    score_reset: str = knob("all", "After an event forget the scores of 'all' pairs or of the 'replaced' ones.")
    optimizer_reset: str = knob(
        "keep", "Adam moments of re-seeded slots: 'keep', 'zero', 'corrected' (as a fresh Adam) or 'mean_v'."
    )
    fuse_mode: str = knob(
        "difference",
        "'difference': exact everywhere. 'inplace': train over a dense working copy of W (faster, more memory).",
    )
    exhaustion: str = knob(
        "stop", "When a layer has no unused direction left: 'stop' its events, or 'resvd' of its frozen part (ours)."
    )
    reservoir_device: str | None = knob(
        None, "'cpu' keeps the unused directions in host memory; None: beside the weight."
    )

    reservoir: str = knob(
        "principal",
        "Where pairs start again: on the next 'principal' directions of W (the paper's); ours: on its 'minor' ones, "
        "smallest first, or with b = 0 on those of the current 'gradient'.",
    )
    sketch_steps: int = knob(4, "Steps before an event in which the gradient's directions are gathered.")
    fresh_length: float = knob(
        LORA_LENGTH,
        "Length of a gradient's direction on which a pair starts again (ours). Inputs are far longer along such "
        "directions than along random ones, so shorter ones keep the first steps as large as LoRA's.",
    )
    fresh_warmup: int = knob(0, "Steps in which the learning rate of a fresh pair rises to that of the others (ours).")
    select: str = knob("score", "Pairs that start again: those with the lowest 'score', or the 'oldest' (ours).")

    @classmethod
    def paper(cls, **options: Any) -> SRLoraConfig:
        """The literal method: principal directions, lowest scores, an event every N / N_switch steps, moments as they
        are."""
        literal = {"init_weights": True, "reservoir": "principal", "select": "score", "schedule": "paper"}
        return cls(**{**literal, "optimizer_reset": "keep", "fresh_warmup": 0, **options})

    @classmethod
    def gradient(cls, **options: Any) -> SRLoraConfig:
        """Ours: LoRA's start; the oldest pairs start again on the gradient's directions, with an Adam that is fresh.

        Choose lora_alpha as for LoRA; with the paper's start it is 1 r.
        """
        return cls(**{**GRADIENT, **options})

    @property
    def sketches(self) -> bool:
        """Whether new directions come from the gradient."""
        return self.reservoir == "gradient"

    def svd_options(self) -> dict[str, Any]:
        options = super().svd_options()
        # the other methods find leading directions
        return {**options, "method": "full"} if self.reservoir == "minor" else options

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require(self.sketch_steps >= 1, "sketch_steps", "at least 1")
        self._require(self.fresh_length > 0.0, "fresh_length", "positive")
        self._require(self.fresh_warmup >= 0, "fresh_warmup", "at least 0")
        self._require(self.r_target is None or self.r_target >= self.r, "r_target", f"at least r={self.r}")
        self._require(0.0 <= self.gamma <= 1.0, "gamma", "in [0, 1]")
        for name in ("beta1", "beta2"):
            self._require(0.0 <= getattr(self, name) < 1.0, name, "in [0, 1)")
        self._require(self.total_step is None or self.total_step >= 1, "total_step", "at least 1")
        for name, allowed in _CHOICES.items():
            self._require(getattr(self, name) in allowed, name, "one of " + ", ".join(map(str, allowed)))
        if self.reservoir == "minor" and self.svd_method not in ("auto", "full"):
            raise UserError(
                f"SRLoraConfig: svd_method={self.svd_method!r} finds leading directions, and reservoir='minor' needs "
                "the last ones: choose svd_method='auto' or 'full'.",
                field="svd_method",
            )
        if self.reservoir == "minor" and self.exhaustion == "resvd":
            raise UserError(
                "SRLoraConfig: exhaustion='resvd' goes on with leading directions, and reservoir='minor' asks for the "
                "last ones: choose exhaustion='stop' or reservoir='principal'.",
                field="exhaustion",
            )


_CHOICES: dict[str, tuple[str | bool | None, ...]] = {
    "init_weights": (True, False, "lora"),
    "reservoir": ("principal", "minor", "gradient"),
    "select": ("score", "oldest"),
    "schedule": ("spread", "paper"),
    "score_reset": ("all", "replaced"),
    "optimizer_reset": ("keep", "zero", "corrected", "mean_v"),
    "fuse_mode": ("difference", "inplace"),
    "exhaustion": ("stop", "resvd"),
    "reservoir_device": (None, "cpu"),
}

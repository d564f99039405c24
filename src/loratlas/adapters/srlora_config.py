"""The options of SRLoRA, and which of them go together; `srlora` says what they do."""

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
        "smallest first, or with b = 0 on those of the current 'gradient' or 'activation'.",
    )
    sketch_steps: int = knob(4, "Steps before an event in which directions of gradient or activation are gathered.")
    fresh_warmup: int = knob(0, "Steps in which the learning rate of a fresh pair rises to that of the others (ours).")
    fresh_length: float = knob(
        LORA_LENGTH,
        "Length of a direction of gradient or activation on which a pair starts again (ours). As inputs are far longer "
        "along such directions, shorter ones keep the update's first steps as large as those of LoRA.",
    )
    budget: str = knob(
        "layer",
        "Pairs of an event: as many in every layer ('layer'), or as many in all, the lowest scores relative to their "
        "layer's mean ('global', ours).",
    )
    trigger: str = knob(
        "interval",
        "A layer's events come by the plan ('interval'), or earlier where its lowest scores have 'settled' (ours).",
    )
    settle_steps: int = knob(5, "Steps between two looks at whether scores have settled.")
    settle_tolerance: float = knob(0.1, "Relative change between two looks up to which scores have settled.")
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
        """Whether new directions are gathered while training."""
        return self.reservoir in ("gradient", "activation")

    @property
    def of_input(self) -> bool:
        """Whether they are those of the layer's input."""
        return self.reservoir == "activation"

    def svd_options(self) -> dict[str, Any]:
        options = super().svd_options()
        # the other methods find leading directions
        return {**options, "method": "full"} if self.reservoir == "minor" else options

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require(self.sketch_steps >= 1, "sketch_steps", "at least 1")
        self._require(self.fresh_warmup >= 0, "fresh_warmup", "at least 0")
        self._require(self.fresh_length > 0.0, "fresh_length", "positive")
        self._require(self.settle_steps >= 1, "settle_steps", "at least 1")
        self._require(self.settle_tolerance >= 0.0, "settle_tolerance", "at least 0")
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
        if self.budget == "global" and self.select == "oldest":
            raise UserError(
                "SRLoraConfig: budget='global' compares scores between layers, and the oldest pairs are as old in all "
                "of them: choose select='score' or budget='layer'.",
                field="budget",
            )
        if self.budget == "global" and self.trigger == "settled":
            raise UserError(
                "SRLoraConfig: budget='global' shares out events that all layers have at once, and with "
                "trigger='settled' each has its own: choose trigger='interval' or budget='layer'.",
                field="budget",
            )


_CHOICES: dict[str, tuple[str | bool | None, ...]] = {
    "init_weights": (True, False, "lora"),
    "reservoir": ("principal", "minor", "gradient", "activation"),
    "select": ("score", "oldest"),
    "budget": ("layer", "global"),
    "trigger": ("interval", "settled"),
    "schedule": ("spread", "paper"),
    "score_reset": ("all", "replaced"),
    "optimizer_reset": ("keep", "zero", "corrected", "mean_v"),
    "fuse_mode": ("difference", "inplace"),
    "exhaustion": ("stop", "resvd"),
    "reservoir_device": (None, "cpu"),
}

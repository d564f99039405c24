"""BA-LoRA: three regularisers of the outputs against what noisy or unbalanced data teach (arXiv 2408.04556, code read).

    L = L_task + l1 consistency(Z, P) + l2 diversity(Z) + l3 spectral_energy(Z)

Z are the logits, P those of the pretrained model, which is the model with its adapter switched off. The first term
holds knowledge, the second keeps predictions from collapsing, the third gathers a batch's logits in few singular
directions; the last two pull against each other by design, so their weights are small. `regularisers` has the terms.

    l1(s) = l1 (0.1 + 0.9 (1 + cos(pi s / S)) / 2)        l2, l3: 0 for 0.2 S steps, full 0.05 S steps later

    objective = BALoraConfig().build(model)
    objective.at(step, total); objective.loss(model, batch).backward()       # a Trainer's callback calls `at`
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar, NamedTuple

from torch import Tensor, nn

from loratlas.engine.config import knob
from loratlas.engine.parts import Objective, ObjectiveConfig
from loratlas.errors import UserError
from loratlas.objectives import regularisers as terms
from loratlas.objectives import schedules
from loratlas.objectives.teacher import Teacher, check_can_disable
from loratlas.objectives.tokens import labelled, labels_of

TASKS, VARIANTS = ("nlg", "nlu"), ("v6", "v1")


@dataclass(frozen=True)
class Settings:
    """What differs between the published forms; `BALoraConfig` has the same fields with None for these."""

    lambda1: float
    lambda2: float
    lambda3: float
    svd_k: int
    svd_norm: str = "sum"
    top_k_entropy: int = 0
    lambda1_schedule: str = "cosine"
    focus_schedule: str = "two_phase"


_FIRST_CODE = Settings(1e-4, 3e-4, 1e-4, svd_k=3, lambda1_schedule="constant", focus_schedule="constant")
PUBLISHED = {
    ("nlg", "v6"): Settings(0.025, 0.005, 0.005, svd_k=10, svd_norm="fro", top_k_entropy=20),
    ("nlu", "v6"): Settings(0.15, 0.03, 0.03, svd_k=5),
    ("nlg", "v1"): _FIRST_CODE,
    ("nlu", "v1"): _FIRST_CODE,
}


class Form(NamedTuple):
    """The terms of one published form, of logits as `BALora.logits` gives them."""

    consistency: Callable[[Tensor, Tensor, BALoraConfig], Tensor]
    diversity: Callable[[Tensor, Settings], Tensor]
    energy: Callable[[Tensor, Settings], Tensor]


def _kl(z: Tensor, p: Tensor, cfg: BALoraConfig) -> Tensor:
    return terms.kl_consistency(z, p, cfg.temperature)


def _energy(z: Tensor, s: Settings) -> Tensor:
    return terms.spectral_energy(z, s.svd_k, s.svd_norm)


FORMS = {
    ("nlg", "v6"): Form(_kl, lambda z, s: terms.entropy_diversity(z, s.top_k_entropy), _energy),
    ("nlu", "v6"): Form(_kl, lambda z, s: terms.covariance_diversity(z), _energy),
    ("nlg", "v1"): Form(
        lambda z, p, cfg: terms.summed_kl(z, p),
        lambda z, s: terms.eps_entropy_diversity(z),
        lambda z, s: _energy(z.flatten(1), s),
    ),
    ("nlu", "v1"): Form(
        lambda z, p, cfg: terms.cosine_consistency(z, p), lambda z, s: terms.covariance_diversity(z), _energy
    ),
}


class BALora(Objective):
    """The objective of `BALoraConfig.build`. A term whose weight is 0 at a step is not computed in it.

    Attributes:
        weights: l1, l2, l3 of the last batch.
    """

    def __init__(self, cfg: BALoraConfig, teacher: Teacher | None) -> None:
        super().__init__()
        self.cfg, self.teacher = cfg, teacher
        self.weights = (0.0, 0.0, 0.0)
        self._clock: tuple[int, int] | None = None

    def at(self, step: int, total: int) -> None:
        self._clock = (step, total)

    def __call__(self, model: nn.Module, inputs: Mapping[str, Any], outputs: Any) -> Tensor:
        """The task's loss plus the weighted terms; `outputs.loss` itself where all weights are 0.

        Raises:
            UserError: no loss or logits in `outputs`, logits of another shape than the task's, no label in the batch, a
                schedule that was not told the step.
        """
        loss, logits = getattr(outputs, "loss", None), getattr(outputs, "logits", None)
        if loss is None or logits is None:
            raise UserError("BA-LoRA adds terms to the model's own loss: the model must return a loss and logits.")
        task = self.cfg.task_of(logits)
        settings, form = self.cfg.settings(task), FORMS[task, self.cfg.variant]
        self.terms = {"task": loss.detach()}
        l1, l2, l3 = self.weights = self._scheduled(settings)
        if self.weights == (0.0, 0.0, 0.0):
            return loss
        z = self._rows(logits, inputs, task)
        if l1 > 0.0 and self.teacher is not None:
            p = self._rows(self.teacher(model, inputs, logits), inputs, task)
            if self.cfg.adaptive:
                l1 = self._adapted(p, settings)
                self.weights = (l1, l2, l3)
            loss = loss + l1 * self._keep("consistency", form.consistency(z, p, self.cfg))
        if l2 > 0.0:
            loss = loss + l2 * self._keep("diversity", form.diversity(z, settings))
        if l3 > 0.0:
            loss = loss + l3 * self._keep("svd", form.energy(z, settings))
        return loss

    def _scheduled(self, s: Settings) -> tuple[float, float, float]:
        cfg = self.cfg
        fades = s.lambda1 > 0.0 and s.lambda1_schedule != "constant" and not cfg.adaptive
        rises = max(s.lambda2, s.lambda3) > 0.0 and s.focus_schedule != "constant"
        if not (fades or rises):
            return s.lambda1, s.lambda2, s.lambda3
        if self._clock is None or self._clock[1] < 1:
            raise UserError(
                "BA-LoRA's weights follow the step: call objective.at(step, total) before every optimizer step, or set "
                "lambda1_schedule and focus_schedule to 'constant'."
            )
        fade = schedules.cosine(*self._clock) if fades else 1.0
        rise = schedules.rising(s.focus_schedule, *self._clock, cfg.warmup_ratio, cfg.ramp_ratio)
        return s.lambda1 * fade, s.lambda2 * rise, s.lambda3 * rise

    def _adapted(self, p: Tensor, s: Settings) -> float:
        low = 0.1 * s.lambda1 if self.cfg.lambda1_min is None else self.cfg.lambda1_min
        high = s.lambda1 if self.cfg.lambda1_max is None else self.cfg.lambda1_max
        return low + (high - low) * terms.confidence(p, self.cfg.temperature)

    def _rows(self, logits: Tensor, inputs: Mapping[str, Any], task: str) -> Tensor:
        """What the terms are taken of: samples, labelled tokens or, in the first code, all tokens (B, T, V)."""
        if task == "nlu" or self.cfg.variant == "v1":
            return logits
        return labelled(logits, labels_of(inputs, "BA-LoRA"), "BA-LoRA", shift=self.cfg.shift_mask)

    def _keep(self, name: str, term: Tensor) -> Tensor:
        self.terms[name] = term.detach()
        return term


@dataclass
class BALoraConfig(ObjectiveConfig):
    """BA-LoRA's loss, for any adapter. Fields that are None take the published value of the task and variant.

    | | text (nlg) | classification (nlu) | variant "v1" |
    |---|---|---|---|
    | lambda1, lambda2, lambda3 | 0.025, 0.005, 0.005 | 0.15, 0.03, 0.03 | 1e-4, 3e-4, 1e-4 |
    | svd_k, svd_norm | 10, "fro" | 5, "sum" | 3, "sum" |
    | top_k_entropy | 20 | - | - |
    | schedules | cosine, two_phase | cosine, two_phase | constant |

    Raises:
        UserError: a field is out of its range.
    """

    name: ClassVar[str] = "ba-lora"

    task: str | None = knob(None, "'nlg' (text) or 'nlu' (classification); None: by the shape of the logits.")
    variant: str = knob("v6", "'v6': the terms of the ICLR 2026 version and its code. 'v1': those of the first code.")
    lambda1: float | None = knob(None, "Weight of consistency with the pretrained model; 0 saves its forward.")
    lambda2: float | None = knob(None, "Weight of diversity.")
    lambda3: float | None = knob(None, "Weight of the energy in the leading singular directions.")
    svd_k: int | None = knob(None, "Number of leading singular directions.")
    svd_norm: str | None = knob(None, "What their sum is divided by: 'fro' or 'sum' (of all singular values).")
    top_k_entropy: int | None = knob(None, "Entropy over the K most likely tokens of text, 0: over all.")
    temperature: float = knob(2.0, "Temperature T of the consistency term of v6.")
    lambda1_schedule: str | None = knob(None, "'cosine': falls to a tenth over the run; or 'constant'.")
    focus_schedule: str | None = knob(
        None, "Of lambda2 and lambda3: 'two_phase', 'linear_warmup', 'quadratic_warmup' or 'constant'."
    )
    warmup_ratio: float = knob(0.2, "Share of the run that focus_schedule waits or warms up.")
    ramp_ratio: float = knob(0.05, "Share of the run in which 'two_phase' then rises.")
    adaptive: bool = knob(
        False, "lambda1 by the teacher's confidence on the batch, 1 - entropy / ln V, instead of by its schedule."
    )
    lambda1_min: float | None = knob(None, "lambda1 of an adaptive run for an undecided teacher; None: a tenth.")
    lambda1_max: float | None = knob(None, "lambda1 of an adaptive run for a certain teacher; None: lambda1.")
    shift_mask: bool = knob(
        False,
        "Take text's terms at the positions that predict a label, as the task's loss does. False, as published: at the "
        "labels' own positions, one further on.",
    )

    def __post_init__(self) -> None:
        self._require(self.task in (None, *TASKS), "task", "None, 'nlg' or 'nlu'")
        self._require(self.variant in VARIANTS, "variant", "'v6' or 'v1'")
        for name in ("lambda1", "lambda2", "lambda3", "lambda1_min", "lambda1_max", "top_k_entropy"):
            value = getattr(self, name)
            self._require(value is None or value >= 0, name, "at least 0")
        self._require(self.svd_k is None or self.svd_k >= 1, "svd_k", "at least 1")
        self._require(self.svd_norm in (None, *terms.NORMS), "svd_norm", "'fro' or 'sum'")
        self._require(self.temperature > 0, "temperature", "positive")
        for name, known in (("lambda1_schedule", schedules.FADING), ("focus_schedule", schedules.RISING)):
            self._require(getattr(self, name) in (None, *known), name, f"one of {', '.join(known)}")
        for name in ("warmup_ratio", "ramp_ratio"):
            self._require(0.0 <= getattr(self, name) <= 1.0, name, "in [0, 1]")

    def check(self, model: nn.Module) -> None:
        if self.teaches():
            check_can_disable(model, "BA-LoRA's consistency term")

    def build(self, model: nn.Module, teacher: nn.Module | None = None) -> BALora:
        """The objective. teacher: a model to be consistent with instead of `model` without its adapter.

        Raises:
            UserError: consistency is wanted and there is no teacher: no adapter, or one that has changed its base.
        """
        taught = Teacher(model, teacher, "BA-LoRA's consistency term") if self.teaches() else None
        return BALora(self, taught)

    def teaches(self) -> bool:
        """Whether the consistency term has a weight."""
        return self.lambda1 is None or self.lambda1 > 0

    def task_of(self, logits: Tensor) -> str:
        """The task; `logits` decide where the config leaves it open.

        Raises:
            UserError: logits of another shape than the task's.
        """
        task = self.task or ("nlu" if logits.dim() == 2 else "nlg")
        fits = logits.dim() == 2 and logits.shape[1] > 1 if task == "nlu" else logits.dim() == 3
        if not fits:
            form = "(samples, classes) with two or more classes" if task == "nlu" else "(batch, tokens, vocabulary)"
            raise UserError(
                f"BA-LoRA with task={task!r} needs logits of shape {form}, but they are {tuple(logits.shape)}."
            )
        return task

    def settings(self, task: str) -> Settings:
        """Every value that the published forms differ in, for one task."""
        given = {f.name: getattr(self, f.name) for f in fields(Settings)}
        return replace(
            PUBLISHED[task, self.variant], **{name: value for name, value in given.items() if value is not None}
        )

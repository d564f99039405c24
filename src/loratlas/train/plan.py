"""The plan of a comparison: everything that decides its results, written before the first run."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from loratlas.errors import UserError
from loratlas.files import write_json
from loratlas.train.forgetting import BaseTask
from loratlas.train.spec import RunSpec
from loratlas.train.work import Work

PLAN = "plan.json"
_FILLED_IN = ("method", "seed", "output_dir")  # by the comparison, run by run


@dataclass(frozen=True)
class Plan:
    """See `compare` for the fields; grid is empty where no learning rate is searched."""

    methods: tuple[str, ...]
    baseline: str
    spec: RunSpec
    work: Work | str
    seeds: tuple[int, ...]
    grid: tuple[float, ...]
    widen: int
    options: dict[str, dict[str, Any]]
    search_steps: int | None
    minutes: float | None
    noise_floor: bool
    base_task: BaseTask | None

    def to_dict(self) -> dict[str, Any]:
        """As JSON. Fields of the run specification and of the work lie beside the others."""
        value = asdict(self)
        spec = value.pop("spec")
        work = value.pop("work")
        value |= {name: item for name, item in spec.items() if name not in (*_FILLED_IN, "options")}
        value["options"] = {"all": self.spec.options, **self.options}
        value |= work if isinstance(work, dict) else {"work": work}
        value["model"] = self.spec.model
        return json.loads(json.dumps(value))

    def keep(self, root: Path, *, resume: bool) -> None:
        """Write plan.json below `root`, or make sure that it says the same.

        Raises:
            UserError: with `resume`, nothing there, or another plan: the fields that differ are named.
        """
        file, new = root / PLAN, self.to_dict()
        if not resume:
            write_json(file, new)
            return
        try:
            old = json.loads(file.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise UserError(f"{root} holds no comparison to go on with (there is no {PLAN}).") from None
        changed = [name for name in {**old, **new} if old.get(name) != new.get(name)]
        if changed:
            words = ", ".join(f"{name} was {old.get(name)!r} and is {new.get(name)!r} now" for name in changed)
            raise UserError(
                f"{root} was begun with other settings: {words}; go on with the old ones or take another --out."
            )

"""pytest plugin that points PEFT's own test battery at one of our config classes.

PEFT's tests are parametrised over module-level lists; pytest reads them when it collects, so replacing their contents
before that is enough. Everything that does not name our class is deselected. $LORATLAS_CONFORMANCE holds the case as
JSON.
"""

from __future__ import annotations

import importlib
import importlib.machinery
import json
import os
import sys
import types
from pathlib import Path
from typing import Any

import pytest

CASE = json.loads(os.environ["LORATLAS_CONFORMANCE"])
OUTCOMES: dict[str, str] = {}


def config_class() -> type:
    module, _, name = CASE["config"].partition(":")
    return getattr(importlib.import_module(module), name)


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "regression: used by PEFT's suite")
    # PEFT's helpers import one diffusers class for an isinstance check
    stub = types.ModuleType("diffusers")
    stub.__spec__ = importlib.machinery.ModuleSpec("diffusers", None)
    stub.StableDiffusionPipeline = type("StableDiffusionPipeline", (), {})  # type: ignore[attr-defined]
    sys.modules.setdefault("diffusers", stub)
    sys.path.insert(0, os.getcwd())
    cls, kwargs = config_class(), CASE["kwargs"]
    name = cls.__name__
    calibrate_everything()
    accept_any_base()
    if CASE["suite"] == "decoder":
        tests = importlib.import_module("tests.test_decoder_models")
        tests.PEFT_DECODER_MODELS_TO_TEST[:] = CASE["models"]
        tests.SMALL_GRID_MODELS[:] = CASE["models"]
        tests.ALL_CONFIGS[:] = [(cls, {"task_type": "CAUSAL_LM", **kwargs})]
        return
    tests = importlib.import_module("tests.test_custom_models")
    tests.TEST_CASES[:] = [
        (f"{name} {label}", model, cls, {**kwargs, **targets})
        for kind, label, model, targets in _MODELS
        if kind in CASE["kinds"]
    ]
    tests.ALL_PEFT_CONFIG_CLASSES[:] = [cls]
    random = {**kwargs, "init_weights": False, "target_modules": ["lin0"]}
    other = {**random, "target_modules": ["lin1"]}
    tests.MULTIPLE_ACTIVE_ADAPTERS_TEST_CASES[:] = [
        (f"{name} Same", name.lower(), cls, random, random),
        (f"{name} Different", name.lower(), cls, random, other),
    ]
    tests.MIXED_ADAPTER_TEST_CASES[:] = [(f"{name} mixed", cls(**random), cls(**random))]


def calibrate_everything() -> None:
    """Let every adapter that starts from data find synthetic statistics, wherever PEFT's tests make one.

    The tests build models and adapters out of configurations alone. Their start is then the method's own, on a seeded
    random gradient instead of a measured one.
    """
    from loratlas.engine.calibrate import needs
    from loratlas.engine.model import AtlasModel

    inject = AtlasModel.inject_adapter

    def calibrated(self: Any, model: Any, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        cfg = self.peft_config[adapter_name]
        if cfg.calibration is None and (names := needs(cfg)):
            cfg.calibration = {
                path: {name: statistic(module, name) for name in names}
                for path, module in model.named_modules()
                if getattr(module, "weight", None) is not None and module.weight.dim() > 1
            }
        inject(self, model, adapter_name, *args, **kwargs)

    AtlasModel.inject_adapter = calibrated  # type: ignore[method-assign]


def accept_any_base() -> None:
    """Some of PEFT's tests load an adapter on a base drawn anew, which adapters that belong to one base refuse."""
    from loratlas.engine.making import Making

    Making.check_base = lambda self, adapter, saved: None  # type: ignore[method-assign]


def statistic(module: Any, name: str) -> Any:
    import torch
    from transformers.pytorch_utils import Conv1D

    base = module.get_base_layer() if hasattr(module, "get_base_layer") else module
    shape = base.weight.T.shape if isinstance(base, Conv1D) else base.weight.flatten(1).shape
    generator = torch.Generator().manual_seed(0)
    if name == "activation":
        rows = torch.randn(64, shape[1], generator=generator)
        return rows.T @ rows / len(rows)
    gradient = torch.randn(shape, generator=generator)
    return gradient.square() if name == "fisher" else gradient


_MODELS: list[tuple[str, str, str, dict[str, Any]]] = [
    ("linear", "MLP str", "MLP", {"target_modules": "lin0"}),
    ("linear", "MLP lin0", "MLP", {"target_modules": ["lin0"]}),
    ("linear", "MLP lin1", "MLP", {"target_modules": ["lin1"]}),
    ("linear", "MLP both", "MLP", {"target_modules": ["lin0", "lin1"]}),
    ("linear", "MLP saved", "MLP", {"target_modules": ["lin0"], "modules_to_save": ["lin1"]}),
    ("conv1d", "Conv1D", "EmbConv1D", {"target_modules": ["conv1d"]}),
    ("embedding", "Embedding", "EmbConv1D", {"target_modules": ["emb"]}),
    ("embedding", "Embedding and Conv1D", "EmbConv1D", {"target_modules": ["emb", "conv1d"]}),
    ("conv2d", "Conv2d", "Conv2d", {"target_modules": ["conv2d"]}),
    ("conv2d", "Conv2d and Linear", "Conv2d", {"target_modules": ["conv2d", "lin0"]}),
]


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    cls, prefix = config_class(), f"{config_class().__name__} "
    ours, others = [], []
    for item in items:
        values = list(getattr(getattr(item, "callspec", None), "params", {}).values())
        names_us = any(value is cls or (isinstance(value, str) and value.startswith(prefix)) for value in values)
        (ours if names_us else others).append(item)
    items[:] = ours
    config.hook.pytest_deselected(items=others)


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.when == "call" or report.outcome != "passed":
        worse = OUTCOMES.get(report.nodeid) == "failed"
        OUTCOMES[report.nodeid] = "failed" if worse else report.outcome


def pytest_sessionfinish() -> None:
    Path(CASE["report"]).write_text(json.dumps(OUTCOMES), encoding="utf-8")

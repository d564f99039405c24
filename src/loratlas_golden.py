"""The pytest option --golden-dir of this project's tests.

An entry point, because pytest takes the value of an option that it does not know yet for a path of tests, and would
look for the project there instead of here.
"""

from __future__ import annotations

from typing import Any


def pytest_addoption(parser: Any) -> None:
    parser.getgroup("loratlas").addoption(
        "--golden-dir", default=None, help="folder of <slug>/*.safetensors that LoRAtlas' own tests replay"
    )

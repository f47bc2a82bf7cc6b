"""Scenes to one self-contained HTML page."""

from __future__ import annotations

import json
from importlib.resources import files
from typing import Any

from .. import SPEC_ID, __version__


def page(scenes: list[dict[str, Any]]) -> str:
    """The page for one or more scenes of one call, from ``trace.py``; it needs no network.

    >>> import torch
    >>> from torch_naiveconv.pages import trace
    >>> text = page([trace.conv(torch.ones(1, 1, 3, 3), torch.ones(1, 1, 2, 2), None)])
    >>> text.startswith("<!DOCTYPE html>"), "http://" in text.replace("http://www.w3.org/", "")
    (True, False)
    """
    folder = files(__package__)
    parts = {
        "@TITLE@": f"{scenes[0]['function']}, number by number",
        "@VERSION@": f"torch_naiveconv {__version__}",
        "@SPEC@": SPEC_ID,
        "@STYLE@": folder.joinpath("page.css").read_text(encoding="utf-8"),
        "@SCRIPT@": folder.joinpath("page.js").read_text(encoding="utf-8"),
        "@DATA@": json.dumps(scenes, separators=(",", ":")).replace("<", "\\u003c"),
    }
    text = folder.joinpath("page.html").read_text(encoding="utf-8")
    for mark, value in parts.items():
        text = text.replace(mark, value)
    return text

"""The toybox's commands answer without torch."""

from __future__ import annotations

import subprocess
import sys

import pytest


@pytest.mark.parametrize("page", ["train", "measure", "methods"])
def test_settings_are_read_without_torch(page):
    code = f"import sys, finetune.toybox.{page} as page; page.Config; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout == "False\n"

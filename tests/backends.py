"""What tests ask about the operations' two implementations."""

from __future__ import annotations

import pytest

from cat_rs._native import WHY_COMPOSED

about_kernels = pytest.mark.skipif(WHY_COMPOSED is not None, reason="about the extension's kernels")

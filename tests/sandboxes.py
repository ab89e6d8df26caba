"""What tests that run programs of others need: `sandboxed` skips them, and says why, where no sandbox works."""

import pytest

from agent.sandbox import SandboxError, backend

try:
    backend("auto")
    WHY = ""
except SandboxError as error:
    WHY = str(error)
sandboxed = pytest.mark.skipif(bool(WHY), reason=WHY)

"""The world as a whole: what tells a resumed run that its makers are others.

pytest tests/world/test_world.py
"""

import shutil
from pathlib import Path

import world


def test_the_fingerprint_is_of_the_code_alone(tmp_path: Path) -> None:
    for path in Path(world.__file__).parent.glob("*.py"):
        shutil.copy(path, tmp_path)
    assert world.fingerprint(tmp_path) == world.fingerprint()
    path = tmp_path / "scene.py"
    code = path.read_text()

    def changed(text: str) -> str:
        path.write_text(text)
        world.fingerprint.cache_clear()
        return world.fingerprint(tmp_path)

    assert changed(code.replace('"""', '"""A word more. ', 1) + "\n# and a comment\n") == world.fingerprint()
    assert changed(code.replace("220, 40, 40", "221, 40, 40")) != world.fingerprint()
    assert changed(code.replace('"star", "cross"', '"moon", "cross"')) != world.fingerprint()

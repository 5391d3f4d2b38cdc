"""Random models of every family, for the tests of this folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tiny_models import make_variation


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """name of VARIATIONS -> (folder, transformers model), made once."""
    made: dict[str, tuple[Path, Any]] = {}

    def get(name: str) -> tuple[Path, Any]:
        if name not in made:
            folder, model = tmp_path_factory.mktemp(name), make_variation(name)
            model.save_pretrained(folder)
            made[name] = (folder, model)
        return made[name]

    return get

"""Use an environment that exists already: on clusters, and on GPU machines without a network."""

from __future__ import annotations

import os
import shutil

from tunesmith.core.errors import SetupError
from tunesmith.core.events import Event, OnEvent, ignore_event
from tunesmith.core.records import EnvironmentRecord
from tunesmith.frameworks.catalog import find_framework
from tunesmith.frameworks.doctor import inspect_environment, make_record
from tunesmith.frameworks.environments import open_environment


def add_environment(name: str, python: str, *, on_event: OnEvent = ignore_event) -> EnvironmentRecord:
    """Use an environment that exists, once the framework has been imported in it. Its packages stay as they are."""
    framework, environment = find_framework(name), open_environment(name)
    # Made absolute and no more: an environment's interpreter is a link, which says where its packages are.
    path = os.path.abspath(shutil.which(python) or python)
    with environment.own():
        before = environment.read()
        if before is not None and before.origin == "installed":
            cure = f"Run first: tunesmith frameworks remove {name}"
            raise SetupError(name, "is installed already", cure=cure)
        on_event(Event("stage", text=f"Importing {framework.title} with {path}"))
        found = inspect_environment(name, path)
        if not found.ok:
            cure = "Repair that environment, or give another --python"
            raise SetupError(f"frameworks add {name}", found.problems[0], cure=cure)
        build = "cpu" if found.cuda is None else "cuda"
        record = make_record(
            framework, found, origin="added", slot="", build=build, installer="", seconds=0.0
        )
        environment.write(record)
    return record

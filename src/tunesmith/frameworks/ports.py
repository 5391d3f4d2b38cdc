"""The adapters there are. Another framework is a file with an adapter, its worker, its lock, and a line here."""

from __future__ import annotations

from tunesmith.frameworks.axolotl import Axolotl
from tunesmith.frameworks.llamafactory import LlamaFactory
from tunesmith.frameworks.port import Port
from tunesmith.frameworks.trl import Trl
from tunesmith.frameworks.unsloth import Unsloth

PORTS: dict[str, Port] = {port.name: port for port in (Trl(), LlamaFactory(), Axolotl(), Unsloth())}


def find_port(name: str) -> Port:
    """The adapter of a framework that an arm can name."""
    return PORTS[name]

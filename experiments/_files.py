"""Files a command leaves behind, whole or not at all."""

import json
from pathlib import Path
from typing import Any


def write_json(path: Path, document: Any) -> None:
    """Writes a JSON file by an atomic replacement, so that a kill leaves the old one or the new."""
    temporary = path.with_name(f"{path.name}.tmp")
    temporary.write_text(json.dumps(document, indent=2) + "\n")
    temporary.replace(path)

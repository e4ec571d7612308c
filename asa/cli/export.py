"""asa-export: a trained network as an ONNX file."""

import sys
from pathlib import Path

from asa.cli.front import Config, run_command
from asa.engine.export import export_onnx


def export(config: Config) -> None:
    """Write the file."""
    out = Path(str(config["out"]))
    difference = export_onnx(config["checkpoint"], out)
    print(f"wrote {out}; its outputs differ from PyTorch's by at most {difference:.1e} of the largest")


def main() -> int:
    """Entry point."""
    return run_command("export", "Write a trained network as ONNX, for programs without PyTorch.", export)


if __name__ == "__main__":
    sys.exit(main())

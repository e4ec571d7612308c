"""The machine's rate of large matrix products, measured in a separate process.

The rate drifts with the machine's load and clock, so it is measured before and after every timed repeat. It is measured
in another process, so that its matrices and buffers do not count towards the memory of a row.
"""

import json
import subprocess
import sys
from types import TracebackType
from typing import Any

TYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
SECONDS = 0.25  # products are repeated for about this long


class MatrixRate:
    """Client of the measuring process, a context manager.

    Args:
        spec: "device", "precision", "matrix" (edge of the square matrices) and "threads".
    """

    def __init__(self, spec: dict[str, Any]) -> None:
        settings = json.dumps({key: spec[key] for key in ("device", "precision", "matrix", "threads")})
        command = [sys.executable, "-m", "scripts.benchmark.matrix", settings]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def __enter__(self) -> "MatrixRate":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.process.communicate()  # closes its input, which ends it

    def __call__(self) -> dict[str, float]:
        """Current operations per second by precision: fp32, and the one in use. The first call waits for the warm-up.

        Raises:
            RuntimeError: the other process ended.
        """
        assert self.process.stdin and self.process.stdout
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError("the process that measures the matrix-product rate ended")
        return json.loads(line)


def serve(spec: dict[str, Any]) -> None:
    """Answer each line of the input with the rates, one JSON object per line, until the input ends."""
    import torch

    from scripts.benchmark.clock import seconds_of

    torch.set_num_threads(spec["threads"])
    device, n = torch.device(spec["device"]), spec["matrix"]
    matrices = {}
    for name in {"fp32", spec["precision"]}:
        a, b = (torch.randn(n, n, device=device).to(getattr(torch, TYPES[name])) for _ in range(2))
        # Always written into the same memory: new pages would cost a quarter of the rate.
        matrices[name] = a, b, torch.mm(a, b)

    def seconds(name: str, products: int) -> float:
        a, b, out = matrices[name]
        return seconds_of(lambda: torch.mm(a, b, out=out), device, products)

    products = {name: min(max(round(SECONDS / seconds(name, 1)), 1), 1000) for name in matrices}
    for _ in sys.stdin:
        rates = {name: 2 * n**3 * count / seconds(name, count) for name, count in products.items()}
        print(json.dumps(rates), flush=True)


if __name__ == "__main__":
    serve(json.loads(sys.argv[1]))

"""One run, for torchrun: once.py MODEL OUT METHOD DEVICE [RANK], which dies after the first layer.

DEVICE cuda is card.py's stand-in, with gloo for its tensors too.
"""

import os
import signal
import sys
from contextlib import nullcontext
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from sweep import quantize  # noqa: E402

from card import Card  # noqa: E402
from fewbit.distributed import BACKENDS  # noqa: E402
from fewbit.errors import FewbitError  # noqa: E402


def main() -> None:
    model, out, method, device, *dying = sys.argv[1:]
    BACKENDS["cuda"] = "cpu:gloo,cuda:gloo"

    def callback(event: dict) -> None:
        if event["event"] == "layer" and dying == [os.environ["RANK"]]:
            os.kill(os.getpid(), signal.SIGKILL)

    try:
        with Card() if device == "cuda" else nullcontext():
            quantize(Path(model), Path(out), method, device=device, callback=callback)
        if device == "cuda":
            # The stand-in's tensors are Python objects: gloo's threads drop the last of them when
            # they will, and one that does while the interpreter shuts down ends the process.
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(0)
    except FewbitError as error:
        print(f"rank {os.environ['RANK']}: {error}", file=sys.stderr)
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main()

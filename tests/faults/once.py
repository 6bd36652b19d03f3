"""One run, for torchrun: once.py MODEL OUT METHOD [RANK], which dies after the first layer."""

import os
import signal
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from sweep import quantize  # noqa: E402

from fewbit.errors import FewbitError  # noqa: E402


def main() -> None:
    model, out, method, *dying = sys.argv[1:]

    def callback(event: dict) -> None:
        if event["event"] == "layer" and dying == [os.environ["RANK"]]:
            os.kill(os.getpid(), signal.SIGKILL)

    try:
        quantize(Path(model), Path(out), method, callback=callback)
    except FewbitError as error:
        print(f"rank {os.environ['RANK']}: {error}", file=sys.stderr)
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main()

"""Say whether the vLLM installed here has all that the plugin leans on.

    python scripts/vllm_hooks.py

One JSON document on stdout: version, what is missing, what the plugin says at start. Exit code 1 where it would refuse to start.
"""

from __future__ import annotations

import json
import sys


def main() -> int:
    try:
        from vllm.version import __version__
    except ImportError:
        sys.exit("vllm_hooks: vLLM is not installed, expected it beside flashhead_edge; pip install vllm")
    from flashhead_edge.errors import DeviceError
    from flashhead_edge.integrations.vllm import HOOKS, check_version, missing_hooks, span

    try:
        said, refused = check_version(), False
    except DeviceError as error:
        said, refused = str(error), True
    print(json.dumps({"vllm": __version__, "tried": span(), "hooks": len(HOOKS), "missing": missing_hooks(), "said": said, "refused": refused}, indent=1))
    return int(refused)


if __name__ == "__main__":
    sys.exit(main())

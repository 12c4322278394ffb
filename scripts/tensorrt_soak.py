"""Many steps of an engine: whether memory of the host or of the GPU grows.

    python scripts/tensorrt_soak.py FOLDER [--steps 10000] [--plugin LIB]

Two backends of the same folder in one process take turns: their texts are equal, their weights lie on the device once. Prints one JSON document;
exit code 1 where memory grew.
"""

import argparse
import json
import re
import sys
from pathlib import Path

from flashhead_edge.jetson import plugins
from flashhead_edge.jetson.tensorrt_backend import open_folder

WARM = 500  # steps before the first look
ALLOWED = 4 << 20  # bytes of the host: a Python process moves by about one


def anonymous_bytes() -> int:
    return 1024 * int(re.search(r"RssAnon:\s+(\d+)", Path("/proc/self/status").read_text())[1])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--steps", type=int, default=10_000)
    parser.add_argument("--plugin", type=Path)
    args = parser.parse_args()
    first = open_folder(args.folder, args.plugin)
    once = plugins.device_bytes(first.library)
    second = open_folder(args.folder, args.plugin)
    twice = plugins.device_bytes(first.library)
    prompt, looks, said = list(range(1, 40)), [], set()
    for part in range(2):
        done, wanted = 0, WARM if part == 0 else args.steps
        while done < wanted:
            steps = min(first.manifest.context - len(prompt), 400, wanted - done + 1)
            texts = [tuple(int(t[0]) for t in backend.decode([prompt], steps + 1)) for backend in (first, second)]
            said.add(texts[0] == texts[1])
            done += 2 * steps
        first.stream.wait()
        looks.append((anonymous_bytes(), first.device.memory()[0]))
    grown = {"host": looks[1][0] - looks[0][0], "device": looks[0][1] - looks[1][1]}
    captures = first.captures, second.captures
    first.close()  # in the order in which they were opened: the second still runs
    after_first = [int(t[0]) for t in second.decode([prompt], 5)]
    second.close()
    result = {"steps": args.steps, "grown_bytes": grown, "weights": {"one": once, "two": twice, "none": plugins.device_bytes(second.library)}}
    result |= {"captures": captures, "texts_equal": said == {True}, "after_the_first_was_closed": after_first}
    print(json.dumps(result))
    return int(grown["device"] > 0 or grown["host"] > ALLOWED or once != twice or said != {True} or result["weights"]["none"] != 0)


if __name__ == "__main__":
    sys.exit(main())

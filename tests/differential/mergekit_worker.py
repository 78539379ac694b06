"""A child process that runs mergekit merges: one JSON request per line in, one JSON reply per line out.

Importing mergekit costs seconds, so one process serves a whole test session. A request is
``{"config": YAML text, "out": folder, "options": {...}}``, the reply ``{"error": null or text}``. The first line out
says that the import is done: ``{"error": ..., "version": ..., "torch": ..., "capability": ...}``.
"""

from __future__ import annotations

import json
import os
import sys
from importlib.metadata import version
from typing import Any, TextIO


def reply(channel: TextIO, **values: Any) -> None:
    channel.write(json.dumps(values) + "\n")
    channel.flush()


def main() -> None:
    # The replies go to the stdout this process was given; whatever libraries print goes to stderr.
    channel = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    try:
        import torch
        import yaml
        from mergekit.config import MergeConfiguration
        from mergekit.merge import run_merge
        from mergekit.options import MergeOptions
    except Exception as e:
        reply(channel, error=f"{type(e).__name__}: {e}")
        return
    torch.set_num_threads(1)
    reply(
        channel,
        error=None,
        version=version("mergekit"),
        torch=torch.__version__,
        capability=torch.backends.cpu.get_cpu_capability(),
    )
    for line in sys.stdin:
        request = json.loads(line)
        options = MergeOptions(quiet=True, write_model_card=False, **request["options"])
        try:
            config = MergeConfiguration.model_validate(yaml.safe_load(request["config"]))
            run_merge(config, request["out"], options)
        except Exception as e:
            reply(channel, error=f"{type(e).__name__}: {e}")
        else:
            reply(channel, error=None)
    os._exit(0)  # taking torch and transformers down in order takes a second


if __name__ == "__main__":
    main()

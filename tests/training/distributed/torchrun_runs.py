"""Started by torchrun in test_parallel.py: several runs in one start, and a process that fails.

torchrun … torchrun_runs.py '[{settings of a run}, …]' '{"how": "error", "rank": 1, "step": 2}'
"""

import json
import os
import signal
import sys

import torch.distributed as dist

from nanovlm.errors import NanoVLMError
from nanovlm.training import loop
from nanovlm.training.run import run_stage
from nanovlm.training.settings import Settings
from nanovlm.utils.console import run_command

dist.destroy_process_group = lambda: None  # the next run goes on with it
RUNS, HARM = map(json.loads, sys.argv[1:])


def harm(step: int) -> None:
    """What `HARM` says, in the middle of its step and in its process."""
    if HARM and (step, os.environ["RANK"]) == (HARM["step"], str(HARM["rank"])):
        if HARM["how"] == "error":
            raise NanoVLMError("this process has had enough")
        os.kill(os.getpid(), {"kill": signal.SIGKILL, "interrupt": signal.SIGINT}[HARM["how"]])


def main() -> None:
    schedule = loop.schedule
    loop.schedule = lambda step, *rest: harm(step) or schedule(step, *rest)
    for settings in RUNS:
        run_stage(Settings(**settings))


run_command(main)
